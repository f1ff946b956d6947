"""The page in a real headless Chromium: both schemes, both widths, keyboard, and nothing from elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.test_consolidate import run
from tests.support.page.browser import chromium

pytestmark = pytest.mark.slow

HOSTILE = "</script><img src=x onerror=document.title='pwned'>"
# Where pictures of the pages go, for a person to look at.
PICTURES = os.environ.get("CKPT_TOOLS_PICTURES")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of verify with problems and statistics, and one of diff."""
    root = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    state = {
        f"model.layers.{layer}.{kind}.weight": torch.randn(8, layer + 1)
        for layer in range(60)
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    }
    state[HOSTILE] = torch.ones(3, dtype=torch.bfloat16)
    (root / "a").mkdir()
    save_file(state, root / "a" / "model.safetensors", {"format": "pt"})
    state["model.layers.7.mlp.up_proj.weight"][0, 0] = math.nan
    state["model.layers.9.mlp.up_proj.weight"] *= 3
    del state["model.layers.11.mlp.up_proj.weight"]
    (root / "b").mkdir()
    save_file(state, root / "b" / "model.safetensors", {"format": "pt"})
    run("verify", root / "b", "--report", root / "verify.html", "--statistics", "-q")
    run("diff", root / "a", root / "b", "--report", root / "diff.html", "-q")
    return {name: root / f"{name}.html" for name in ("verify", "diff")}


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a page; the test fails if it says something on the console or asks for anything else."""
    contexts, asked, said = [], [], []

    def open_page(path: Path, width: int = 1400, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        assert set(asked) == {path.as_uri()}
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said


# The least contrast of a text with what is behind it.
_CONTRAST = """() => {
  const texts = "h1,h2,h3,p,dt,dd,td,th button,.value,.label,.note,b,code,li";
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (colour) => parts(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
  };
  let least = 99;
  for (const one of document.querySelectorAll(texts)) {
    if (!one.textContent.trim() || !one.getClientRects().length) continue;
    const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
}"""


@pytest.mark.parametrize("name", ["verify", "diff"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(
    name: str, width: int, scheme: str, pages: dict[str, Path], opened: Any
) -> None:
    page = opened(pages[name], width, scheme)
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}-{width}-{scheme}.png", full_page=True)

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    lines = page.locator(".option").evaluate_all(
        "all => all.map(one => one.getClientRects().length)"
    )
    assert lines and set(lines) == {1}
    assert page.evaluate(_CONTRAST) >= 4.5
    shade = page.evaluate(
        "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    )
    assert (shade > 128) == (scheme == "light")
    for svg in page.locator("main svg").all():
        box = svg.bounding_box()
        assert box and box["width"] > 0 and box["height"] > 0
    assert page.title() != "pwned"
    assert page.locator("main img").count() == 0


def test_problems_are_seen_without_scrolling(pages: dict[str, Path], opened: Any) -> None:
    page = opened(pages["verify"])

    assert page.locator(".verdict.error").bounding_box()["y"] < 300
    assert page.locator(".notice.error").first.bounding_box()["y"] < 900


def test_the_table_is_worked_by_keyboard_alone(pages: dict[str, Path], opened: Any) -> None:
    page = opened(pages["verify"])
    table = page.locator("figure.table").first

    def press_until(label: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent.trim()") == label:
                return
        raise AssertionError(f"{label} is not reached by Tab")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "search"
    assert table.locator("output").inner_text() == "1 to 100 of 240"
    press_until("Next")
    page.keyboard.press("Enter")
    assert table.locator("output").inner_text() == "101 to 200 of 240"
    page.keyboard.press("Enter")
    assert table.locator("output").inner_text() == "201 to 240 of 240"
    # The button for the next page is off now; the other one has the focus.
    assert page.evaluate("document.activeElement.textContent") == "Back"
    press_until("NaN")
    page.keyboard.press("Enter")
    head = table.locator("th", has_text="NaN")
    assert head.get_attribute("aria-sort") == "descending"
    first = table.locator("tbody tr").first.inner_text()
    assert first.startswith("model.layers.7.mlp.up_proj.weight")
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"


def test_names_sort_by_their_numbers_and_the_filter_takes_words(
    pages: dict[str, Path], opened: Any
) -> None:
    page = opened(pages["verify"])
    table = page.locator("figure.table").first

    table.locator("input").fill("LAYERS.1 q_proj")
    table.get_by_role("button", name="tensor").click()

    names = [row.split("\t")[0] for row in table.locator("tbody").inner_text().split("\n")]
    assert names[:3] == [f"model.layers.{n}.self_attn.q_proj.weight" for n in (1, 10, 11)]
    assert table.locator("output").inner_text() == "1 to 11 of 11"
    table.locator("input").fill("nothing of this kind")
    assert table.locator("output").inner_text() == "no row has this text"


def test_without_javascript_the_first_rows_are_there(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["verify"].as_uri())

    assert page.locator("figure.table").first.locator("tbody tr").count() == 100
    assert page.get_by_text("Without JavaScript").first.is_visible()
    context.close()
