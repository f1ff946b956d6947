"""The markup of a page: text stays text, the page loads nothing, and it stays bounded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from html.parser import HTMLParser

import pytest

from ckpt_tools.cli.page import Page, rendered, shell_line
from ckpt_tools.cli.page.layers import Bins, place_of
from ckpt_tools.cli.page.numbers import counts, numbers, share_text, texts
from ckpt_tools.cli.page.parts import Notice, Section, Table
from ckpt_tools.cli.page.pictures import Size, of_changes, of_dtypes, of_kinds, of_layers
from ckpt_tools.cli.page.rendering import FIRST

HOSTILE = (
    "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&amp;{{ 7*7 }}\x1b[2J\u202e"
    "\u2028\n::error::x ##[group]x ##vso[task]x"
)


class Elements(HTMLParser):
    """The elements of a page, its text, and the content of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.text = ""
        self._inside: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = (tag, dict(attrs))
        self.tags.append(self._inside)

    def handle_data(self, data: str) -> None:
        if self._inside[0] in ("script", "style"):
            self.scripts.append((self._inside[1].get("type"), data))
            self._inside = ("", {})
        else:
            self.text += data


def page_of(name: str, rows: int = 1) -> Page:
    """A page in which every text is ``name``."""
    names = [f"{name}{row}" if row else name for row in range(rows)]
    changes: dict[str, float | str | None] = {f"{name}.1.w": 1.0, f"{name}.2.w": None}
    sizes = [Size(f"{name}.{layer}.w", name, 10) for layer in range(20)]
    pictures = [of_changes(changes), of_dtypes(sizes), of_kinds(sizes), of_layers(sizes)]
    section = Section(
        title=name,
        level="error",
        verdict=name,
        facts=[(name, name)],
        notices=[Notice("error", name, name, name, name)],
        pictures=[picture for picture in pictures if picture is not None],
        tables=[Table(name, [texts(name, names), counts(name, range(rows))], name)],
    )
    return Page(name, name, [section, section], [(name, shell_line([name]))])


def test_names_are_text_and_never_markup() -> None:
    plain, hostile = rendered(page_of("plain")), rendered(page_of(HOSTILE))

    before, after = Elements(plain), Elements(hostile)
    assert [tag for tag, _ in after.tags if tag != "wbr"] == [
        tag for tag, _ in before.tags if tag != "wbr"
    ]
    assert {name for _, held in after.tags for name in held} == {
        name for _, held in before.tags for name in held
    }
    assert "<script>alert(1)</script>" in after.text
    assert "{{ 7*7 }}" in after.text
    for line in hostile.split("\n"):
        assert line.isprintable(), repr(line)
        assert not re.search(r"##\[|##vso\[", line)
    data = [json.loads(text) for kind, text in after.scripts if kind == "application/json"]
    assert data[0][0]["cells"][0].startswith("</script><script>alert(1)")


def test_the_policy_allows_the_own_script_and_style_alone() -> None:
    elements = Elements(rendered(page_of("plain")))
    (policy,) = (
        str(held["content"])
        for tag, held in elements.tags
        if tag == "meta" and "http-equiv" in held
    )
    own = [text for kind, text in elements.scripts if kind is None]

    digests = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own}

    assert len(digests) == 2
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == digests
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag, held in elements.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert not {"src", "href", "style"} & held.keys(), (tag, held)


def test_a_page_of_many_tensors_holds_few_elements() -> None:
    page = rendered(page_of("plain", rows=20_000))

    elements = Elements(page)
    assert sum(tag == "tr" for tag, _ in elements.tags) == 2 * (FIRST + 1)
    data = [json.loads(text) for kind, text in elements.scripts if kind == "application/json"]
    assert len(data[0][0]["cells"]) == 20_000


@pytest.mark.slow
def test_pictures_are_bounded_whatever_the_names() -> None:
    sizes = [
        Size(f"a{kind}.{layer}.w", f"dtype{kind}", 1) for kind in range(60) for layer in range(500)
    ]
    changes: dict[str, float | str | None] = {size.name: 0.5 for size in sizes}
    pictures = [of_dtypes(sizes), of_kinds(sizes), of_layers(sizes), of_changes(changes)]
    for picture in pictures:
        assert picture is not None
        assert len(picture.rows) <= 24
        assert all(len(row.marks) <= 96 for row in picture.rows)
    assert sum(row.marks[0].length for row in of_dtypes(sizes).rows) == pytest.approx(1.0)


def test_a_long_name_does_not_hide_the_rest() -> None:
    page = rendered(page_of("x" * 5_000))

    assert "(5,000 characters)" in Elements(page).text


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.31.mlp.w", "model.layers.*.mlp.w", 31),
        ("h.3.experts.17.w", "h.*.experts.*.w", 3),
        ("lm_head.weight", "lm_head.weight", None),
        ("a." + "9" * 5_000, "a." + "9" * 5_000, None),
        ("a.\u0663.w", "a.\u0663.w", None),
        ("", "", None),
    ],
)
def test_the_place_of_a_tensor(name: str, kind: str, layer: int | None) -> None:
    assert place_of(name) == (kind, layer)


def test_neighbouring_layers_share_a_column() -> None:
    bins = Bins(range(10), 4)

    assert [bins.column(layer) for layer in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert bins.ends == ("layers 0 to 2", "layer 9")


def test_numbers_that_json_does_not_hold_sort_last_or_at_the_end() -> None:
    column = numbers("x", [float("nan"), float("inf"), None, 1.0])

    assert column.cells == ["NaN", "∞", "–", "1"]
    assert column.keys == [None, 1.7e308, None, 1.0]
    assert counts("x", [2**4000]).keys == [1.7e308]
    assert [share_text(share) for share in (0.0, 1e-9, 0.99999, 1.0)] == [
        "0%",
        "0.0001%",
        "99.9%",
        "100%",
    ]


def test_a_command_line_is_the_same_words_in_a_shell() -> None:
    words = ["a b", "it's", "\x1b[2J\n", "##[group]", "$HOME", "ü", "\\x"]
    line = shell_line(["printf", r"%s\0", *words], {"X": "1 2"})

    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words
