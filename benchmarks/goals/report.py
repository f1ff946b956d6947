"""Owns RESULTS.md and results.svg: a line for each measurement, and a bar for each ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from compare import machine

from goals import times
from goals.raw import Line

TITLES = {
    1: "Warm files to bf16",
    2: "Warm files, fp32 to fp32",
    3: "Cold files",
    4: "Start",
    5: "Memory",
    6: "Many ranks, many tensors",
    7: "Slow storage",
    8: "Simulated checkpoints",
    9: "torchrun",
    10: "Other tools on the same files",
}
INTRODUCTION = (
    "`make bench` writes this page and the picture from its raw data in `build/bench`. Change "
    "`benchmarks/goals/`, not the page. `benchmarks/README.md` says how it is measured."
)
MEANING = (
    "Measurements are medians, with the smallest and the largest in brackets. A ratio is the median divided "
    "by what it is compared with, or the inverse where it says *times as fast*."
)
BAR, LABEL, ROW = 360, 470, 22


def write(directory: Path, lines: Sequence[Line], failures: Mapping[str, str]) -> None:
    """Write both files.

    Args:
        directory: where.
        lines: the measurements.
        failures: the groups that could not be measured, and why.
    """
    text = [
        "# Results",
        "",
        INTRODUCTION,
        "",
        machine_text(),
        "",
        MEANING,
        "",
        "![Ratios and their goals](results.svg)",
        "",
    ]
    for goal, title in TITLES.items():
        own = [line for line in lines if line.goal == goal]
        if own:
            text += [
                f"## Goal {goal}: {title}",
                "",
                "| what | command | measured | compared with | ratio | goal | limited by |",
                "|---|---|---|---|---|---|---|",
                *map(row, own),
                "",
            ]
    if failures:
        text += [
            "## Not measured",
            "",
            "| group | why |",
            "|---|---|",
            *(f"| {name} | {why.replace('|', '/')} |" for name, why in failures.items()),
            "",
        ]
    text += times.table()
    # What measurements alone do not say: before and after, what was tried, why goals are missed.
    text.append((Path(__file__).parent / "notes.md").read_text())
    (directory / "RESULTS.md").write_text("\n".join(text).rstrip() + "\n")
    (directory / "results.svg").write_text(
        picture([line for line in lines if line.ratio and goal_of(line)])
    )


def machine_text() -> str:
    """The machine and the versions."""
    shown = machine()
    packages = ", ".join(f"{name} {number}" for name, number in shown["packages"].items())
    kernel = shown["kernel"].partition("-")[0]
    return (
        f"Machine: {shown['cores']} cores, {shown['ram_gib']} GiB, Linux {kernel}; "
        f"Python {shown['python']}, {packages}."
    )


def row(line: Line) -> str:
    """A line as a row of Markdown."""
    low, high = number(min(line.values)), number(max(line.values))
    spread = f" ({low} to {high})" if len(line.values) > 1 else ""
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    verdict = {None: "", True: " met", False: " **missed**"}[line.met]
    cells = (
        line.what,
        f"`{line.command}`",
        f"{number(line.median)} {line.unit}{spread}",
        line.versus,
        ratio,
        f"{goal_of(line)}{verdict}",
        line.limit,
    )
    return f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def goal_of(line: Line) -> str:
    """The goal as text; empty where there is none."""
    if line.most is not None:
        return f"at most {line.most:g}"
    return f"at least {line.least:g}" if line.least is not None else ""


def picture(lines: Sequence[Line]) -> str:
    """A bar for each ratio: its part of the largest that the goal allows; the line is the goal."""
    height = ROW * (len(lines) + 2)
    width = LABEL + BAR + 130
    title = "Cost as a share of what the goal allows (line: all of it)"
    size = f'width="{width}" height="{height}"'
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect {size} fill="white"/>',
        f'<text x="8" y="{ROW - 6}" font-weight="bold">{title}</text>',
    ]
    for index, line in enumerate(lines):
        y = ROW * (index + 1) + 6
        assert line.ratio is not None
        share = line.ratio / line.most if line.most else (line.least or 0) / line.ratio
        length = min(share, 1.4) / 1.4 * BAR
        color = "#2a7f4f" if line.met else "#b5482f"
        shapes += [
            f'<text x="8" y="{y + 12}">Goal {line.goal}: {line.what}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{ROW - 8}" fill="{color}"/>',
            f'<text x="{LABEL + BAR + 8}" y="{y + 12}">{line.ratio:.2f}, {goal_of(line)}</text>',
        ]
    at = LABEL + BAR / 1.4
    shapes.append(
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{ROW}" y2="{height - ROW}" stroke="black"/>'
    )
    return "\n".join([*shapes, "</svg>"]) + "\n"
