"""Every block of README.md and docs/ that can run is run, and prints what its page shows.

``REWRITE=1`` puts what is printed into the pages instead of failing: `make pages` does that.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.docs.blocks import PAGES, ROOT, PageError, blocks_of, run_page

REWRITE = os.environ.get("REWRITE") == "1"
TEXTS = {path: path.read_text() for path in PAGES}


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path, text in TEXTS.items() if "```" in text],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_page_shows_what_its_commands_print(path: Path, tmp_path: Path) -> None:
    page = TEXTS[path]
    found = run_page(page, tmp_path)
    if REWRITE:
        path.write_text(found)
    else:
        assert found.splitlines() == page.splitlines(), "`make pages` puts it right"


def test_most_blocks_are_run() -> None:
    blocks = [block for text in TEXTS.values() for block in blocks_of(text)]
    run = [block for block in blocks if block.is_run]

    assert sum(block.language == "console" for block in run) >= 20
    assert sum(block.language == "python" for block in run) >= 4


FIXTURE = "fixtures/zero/zero3-bf16-olmo2-chat-2ranks/checkpoint"


def page(*lines: str, language: str = "console") -> str:
    return "\n".join([f"```{language}", *lines, "```", ""])


@pytest.mark.parametrize(
    "right",
    [
        page("$ echo a b", "a b"),
        page("$ echo a \\", "    b", "a b"),
        page("$ echo a; echo b; echo c", "a", "...", "c"),
        page("$ echo abc", "a..."),
        page("$ false", "$ echo $?", "1"),
        page("$ echo '3.6 s (9.56 MB/s written)'", "11.1 s (88 kB/s written)"),
        page("$ echo a > b", "$ cat b", "a"),
        page("print('a')", language="python")
        + "\n<!-- prints -->\n\n"
        + page("a", language="text"),
        "<!-- not run: it needs two machines -->\n" + page("$ false"),
    ],
)
def test_a_page_that_shows_the_truth_stays(right: str, tmp_path: Path) -> None:
    assert run_page(right, tmp_path) == right


@pytest.mark.parametrize(
    ("wrong", "corrected"),
    [
        (page("$ echo a", "b"), page("$ echo a", "a")),
        (page("$ echo a"), page("$ echo a", "a")),
        (page("$ true", "a"), page("$ true")),
        (page("$ false", "$ echo $?", "0"), page("$ false", "$ echo $?", "1")),
        (page("$ echo a; echo b", "a", "...", "c"), page("$ echo a; echo b", "a", "b")),
    ],
)
def test_a_page_that_does_not_is_corrected(wrong: str, corrected: str, tmp_path: Path) -> None:
    assert run_page(wrong, tmp_path) == corrected


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (page("$ false"), "ends with status 1"),
        (page("$ ckpt-tools inspect nothing"), "ends with status 3"),
        (page("exit 3", language="bash"), "ends with status 3"),
        (page("a", "$ true"), "output before the first command"),
        (page("true", language="sh"), "of the language 'sh'"),
        (page("true", language=""), "of the language ''"),
        (page("$ true", language="text"), "commands in a 'text' block"),
        ("a\n\n    b\n", "an indented block"),
    ],
)
def test_a_page_that_breaks_the_convention_fails(broken: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(PageError, match=why):
        run_page(broken, tmp_path)


def test_a_command_works_on_a_copy_of_the_fixtures_that_the_page_names(tmp_path: Path) -> None:
    run_page(page(f"$ rm -r {FIXTURE}/global_step120", f"$ ls {FIXTURE}", "latest"), tmp_path)

    assert (ROOT / FIXTURE / "global_step120").is_dir()
