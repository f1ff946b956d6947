"""What pages derive from the program is derived anew; the site builds; links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml  # type: ignore[import-untyped]

from ckpt_tools import errors
from tests.support.docs.blocks import ROOT

DOCS = ROOT / "docs"


sys.path.insert(0, str(DOCS))
generate = importlib.import_module("generate")
error_messages = importlib.import_module("error_messages")


@pytest.mark.slow
def test_the_derived_parts_are_those_of_the_program() -> None:
    pages = generate.pages()

    assert {path.name for path in pages} == {
        "commands.md",
        "formats.md",
        "messages.md",
        "security.md",
        "verify.md",
    }
    for path, text in pages.items():
        assert path.read_text() == text, f"{path.name}: `make pages` puts it right"


@pytest.mark.slow
def test_every_class_of_errors_has_messages() -> None:
    found = {error for error, _, _ in error_messages.Source.of_the_package().errors()}
    raised = {
        error
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.CkptError)
    }

    assert found == raised


def test_a_message_is_built_as_the_source_builds_it() -> None:
    """Constants, choices, concatenations, what callers pass: each kind once, from a source of its own."""
    module = ast.parse(
        """
HINT = "Do it again."

def outer(count):
    fail("a" if count else f"b {count}")

def fail(fact):
    text = "x" + f" {HINT}"
    raise UsageError(fact, hint=HINT)
    raise NotACheckpoint(text, hint=None)
    raise UsageError(f"{unknown}")
"""
    )
    source = error_messages.Source({"m": module})

    assert sorted((error.__name__, fact, hint) for error, fact, hint in source.errors()) == [
        ("NotACheckpoint", "x Do it again.", ""),
        ("UsageError", "a", "Do it again."),
        ("UsageError", "b …", "Do it again."),
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from a copy, as `make docs` builds it."""
    copy = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", copy)
    shutil.copytree(DOCS, copy / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "build" / "site"


class References(HTMLParser):
    """What a page of the site refers to: links, and what a browser fetches with it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        if held.get("id"):
            self.ids.add(str(held["id"]))
        if tag == "a" and held.get("href"):
            self.links.add(str(held["href"]))
        elif tag == "link" and held.get("rel") != "canonical" and held.get("href"):
            self.fetched.add(str(held["href"]))
        elif held.get("src"):
            self.fetched.add(str(held["src"]))


def test_the_site_has_every_page_and_search(site: Path) -> None:
    nav = re.findall(
        r"[\w-]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    )
    assert sorted(nav) == sorted(path.name for path in DOCS.glob("*.md"))
    for name in nav:
        stem = name.removesuffix(".md")
        assert (site / ("index.html" if stem == "index" else f"{stem}/index.html")).is_file()
    assert "exclude_frozen_parameters" in (site / "search.json").read_text()
    assert not list(site.rglob("*.py"))


def test_a_browser_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        assert not [url for url in References(page).fetched if urlsplit(url).netloc], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:", sheet.read_text()), sheet


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for link in References(page).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in References(target).ids, f"{page}: {link}"


@pytest.mark.parametrize(
    "path",
    [
        *sorted(ROOT.glob("*.md")),
        *(ROOT / name / "README.md" for name in ("fixtures", "benchmarks")),
        *sorted(DOCS.glob("*.md")),
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_relative_link_of_a_document_leads_to_a_file(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if not urlsplit(link).scheme:
            assert (path.parent / link).exists(), link


@pytest.mark.parametrize(
    "path", [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name
)
def test_a_file_of_the_repository_that_a_document_names_is_there(path: Path) -> None:
    named = re.findall(
        r"`((?:benchmarks|ckpt_tools|docs|examples|fixtures|tests)/[\w./-]+)`", path.read_text()
    )
    for name in named:
        assert (ROOT / name).exists(), name
