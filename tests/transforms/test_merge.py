"""Merging, element by element.

Three oracles, none of which depends on the processor:

- the formula of :mod:`ckpt_tools.transforms.merge` in Python's own numbers, which are IEEE fp64 and never
  fused: every bit must be the same, however a tensor is cut into windows and tiles, with any threads;
- operands that are small integers times powers of two: all products and sums are exact in fp32, in any order,
  so that torch's fp32 product has one result;
- for random operands, an fp64 product and a bound on its distance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_tools.readers.containers.weight_files import read_weight_files
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.derived import cast, view
from ckpt_tools.tensors.dtypes import BFLOAT16
from ckpt_tools.tensors.gather import Gatherer, load
from ckpt_tools.transforms import merge
from ckpt_tools.transforms.merge import (
    ColumnNorms,
    Merged,
    MergedBias,
    merged_experts,
    roots,
    with_rows,
)
from tests.support.merges import assert_rounded

R, ROWS, WIDTH, EXPERTS = 19, 37, 29, 4
SCALE = 0.7
CUTS = pytest.mark.parametrize(
    ("size", "tile"),
    [(7, 1), (29, 1 << 16), (100, 29 * 9), (10**6, 1), (10**6, 29 * 9), (10**6, 1 << 16)],
)
State = dict[str, torch.Tensor]


def shapes(rows: int = ROWS, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    return {
        "w": (rows, width),
        "a": (R, width),
        "b": (rows, R),
        "m": (rows,),
        "columns": (width,),
        "experts": (EXPERTS, rows, width),
        "ea": (EXPERTS * R, width),
        "eb": (rows, EXPERTS * R),
    }


@pytest.fixture
def random() -> State:
    """Numbers of both dtypes that LoRA is trained in, of magnitudes far apart."""
    generator = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        magnitudes = torch.exp2(torch.randint(-12, 4, shape, generator=generator))
        return torch.randn(shape, generator=generator) * magnitudes

    found = {name: values(shape) for name, shape in shapes().items()}
    return found | {name: found[name].bfloat16() for name in ("w", "b", "experts", "eb", "m")}


@pytest.fixture
def exact() -> State:
    """Integers below 9, some of them eighths; 19 products of them need 13 bits."""
    generator = torch.Generator().manual_seed(1)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float()

    found = {name: values(shape) for name, shape in shapes().items()}
    return found | {"w": found["w"].bfloat16() / 8, "b": found["b"].bfloat16()}


def stored(values: State, directory: Path) -> dict[str, Tensor]:
    save_file(values, directory / "x.safetensors")
    return dict(read_weight_files(directory / "x.safetensors").tensors)


def windows(tensor: Tensor, size: int) -> torch.Tensor:
    with Gatherer() as gatherer:
        parts = [
            gatherer.window(tensor, at, min(at + size, tensor.numel))
            for at in range(0, tensor.numel, size)
        ]
    return torch.cat(parts).view(tensor.shape)


def turned(tensor: Tensor) -> Tensor:
    rows, columns = tensor.shape
    return view(tensor, 0, (columns, rows), (1, columns))


# -- the formula in Python's numbers ---------------------------------------------------------------


def reference(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[list[float]]:
    """``w + SCALE * (b @ a)``, the products added one after the other."""
    columns, rows = b.T.tolist(), a.tolist()
    merged = []
    for i, line in enumerate(w.tolist()):
        merged.append([])
        for j, element in enumerate(line):
            total = 0.0
            for column, row in zip(columns, rows, strict=True):
                total += column[i] * row[j]
            merged[-1].append(SCALE * total + element)
    return merged


def halved(elements: list[float]) -> float:
    """Their sum: the second half is added to the first, and so on."""
    while len(elements) > 1:
        half = (len(elements) + 1) // 2
        second = elements[half:] + [0.0] * (len(elements) % 2)
        elements = [x + y for x, y in zip(elements[:half], second, strict=True)]
    return elements[0]


def scaled_rows(merged: list[list[float]], magnitude: torch.Tensor) -> list[list[float]]:
    """Each row times its magnitude over its norm."""
    factors = [
        m / math.sqrt(halved([x * x for x in line]))
        for m, line in zip(magnitude.tolist(), merged, strict=True)
    ]
    return [[x * f for x in line] for line, f in zip(merged, factors, strict=True)]


def column_norms(merged: list[list[float]]) -> list[float]:
    """The norm of each column, its squares added from the first row to the last."""
    totals = [0.0] * len(merged[0])
    for line in merged:
        totals = [total + x * x for total, x in zip(totals, line, strict=True)]
    return [math.sqrt(total) for total in totals]


def fp64(numbers: Sequence[object]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@CUTS
def test_every_bit_is_that_of_the_formula(
    random: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, tile: int
) -> None:
    monkeypatch.setattr(merge, "_TILE", tile)
    v, s = random, stored(random, tmp_path)
    plain = reference(v["w"], v["a"], v["b"])
    norms = column_norms(plain)
    factors = [m / norm for m, norm in zip(v["columns"].tolist(), norms, strict=True)]
    by_column = [[x * f for x, f in zip(line, factors, strict=True)] for line in plain]
    a, b, w = s["a"], s["b"], s["w"]
    # Stored as (in, out), A and B change places: what was a row of the update stays one.
    places = (w, turned(b), turned(a), SCALE)

    for merged, expected in [
        (Merged(w, a, b, SCALE), plain),
        (Merged(w, a, b, SCALE, magnitude=s["m"]), scaled_rows(plain, v["m"])),
        (Merged(*places, transposed=True), plain),
        (Merged(*places, transposed=True, magnitude=s["columns"]), by_column),
    ]:
        assert torch.equal(windows(merged, size), fp64(expected).float())
        with Gatherer() as gatherer:
            # Before it is rounded, where an order of its own shows.
            assert torch.equal(merged.tile(0, ROWS, gatherer), fp64(plain))
            assert torch.equal(gatherer.whole(ColumnNorms(merged)), fp64(norms))


def test_it_is_rounded_to_fp32_and_then_to_the_dtype(random: State, tmp_path: Path) -> None:
    v, s = random, stored(random, tmp_path)
    expected = fp64(reference(v["w"], v["a"], v["b"])).float().bfloat16()

    assert torch.equal(load(cast(Merged(s["w"], s["a"], s["b"], SCALE), BFLOAT16)), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads: int, tmp_path: Path) -> None:
    """More elements than torch leaves to one thread."""
    generator = torch.Generator().manual_seed(3)
    v = {name: torch.randn(s, generator=generator) for name, s in shapes(101, 331).items()}
    s = stored({name: v[name] for name in ("w", "a", "b", "m")}, tmp_path)
    expected = fp64(scaled_rows(reference(v["w"], v["a"], v["b"]), v["m"])).float()

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = load(Merged(s["w"], s["a"], s["b"], SCALE, magnitude=s["m"]))
    finally:
        torch.set_num_threads(before)

    assert torch.equal(found, expected)


def test_rows_are_added_in_halves() -> None:
    generator = torch.Generator().manual_seed(4)
    for width in (1, 2, 3, 29, 64, 1000):
        elements = torch.rand(5, width, generator=generator, dtype=torch.float64)
        expected = fp64([halved(line) for line in elements.tolist()])
        assert torch.equal(merge._row_sums(elements), expected)


def test_roots_are_correctly_rounded() -> None:
    """Those of torch.sqrt are not: one in eighty is a bit off where torch computes with MKL."""
    squares = torch.rand(5000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    below, above = (torch.nextafter(roots(squares), fp64([end])) for end in (0, 2))

    for square, *near in zip(squares, below, roots(squares), above, strict=True):
        distances = [abs(Fraction(root.item()) ** 2 - Fraction(square.item())) for root in near]
        assert min(distances) == distances[1]


# -- operands whose products and sums are exact ----------------------------------------------------


@CUTS
def test_exact_operands_have_one_result(
    exact: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, tile: int
) -> None:
    monkeypatch.setattr(merge, "_TILE", tile)
    v, s = exact, stored(exact, tmp_path)
    whole = v["w"].float() + (v["b"].float() @ v["a"]) * 0.5
    places = (s["w"], turned(s["b"]), turned(s["a"]), 0.5)

    assert torch.equal(windows(Merged(s["w"], s["a"], s["b"], 0.5), size), whole)
    assert torch.equal(windows(Merged(*places, transposed=True), size), whole)


@CUTS
def test_dora_of_exact_operands_has_one_result(
    exact: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, tile: int
) -> None:
    """Matrices of ones of either sign: the norm of a row of 16 is 4, that of a column of 64 is 8."""
    monkeypatch.setattr(merge, "_TILE", tile)
    a, b = exact["a"][:, :16].contiguous(), torch.cat([exact["b"], exact["b"][:27]]).float()
    signs = torch.where(b[:, :1] * a[:1] > 0, 1.0, -1.0)
    v = {"w": signs - (b @ a) * 0.5, "a": a, "b": b, "m": b[:, 1] + 0.25, "columns": a[1] + 0.25}
    s = stored({name: value.contiguous() for name, value in v.items()}, tmp_path)
    places = (s["w"], turned(s["b"]), turned(s["a"]), 0.5)

    rows = Merged(s["w"], s["a"], s["b"], 0.5, magnitude=s["m"])
    columns = Merged(*places, transposed=True, magnitude=s["columns"])

    assert torch.equal(windows(rows, size), (v["m"] / 4).unsqueeze(1) * signs)
    assert torch.equal(windows(columns, size), (v["columns"] / 8) * signs)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@CUTS
def test_experts(
    exact: State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    tile: int,
    transposed: bool,
) -> None:
    """Rows of A lie one expert after the other; columns of B alternate."""
    monkeypatch.setattr(merge, "_TILE", tile)
    v, s = exact, stored(exact, tmp_path)
    a = v["ea"].reshape(EXPERTS, R, WIDTH)
    b = v["eb"].reshape(ROWS, R, EXPERTS)
    update = torch.einsum("ore,eri->eoi", b, a) * 0.5
    base = s["experts"]
    expected = v["experts"] + update
    if transposed:
        base = view(base, 0, (EXPERTS, WIDTH, ROWS), (ROWS * WIDTH, 1, WIDTH))
        expected = expected.transpose(1, 2)

    merged = merged_experts(base, s["ea"], s["eb"], 0.5, transposed=transposed)

    assert merged.shape == expected.shape
    assert torch.equal(windows(merged, size), expected)


# -- how near it is to the exact merge -------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [False, True])
def test_random_operands_are_within_a_rounding_of_the_exact_merge(
    random: State, tmp_path: Path, magnitude: bool
) -> None:
    """The bound, with u = 2**-53.

    The products are exact. Each of r - 1 additions of them, the product with s and the addition of W
    rounds once: v is off by at most (r + 1) u T, T = |W| + |s| sum |b a|, to first order. The norm of a row
    of n elements is off by the norm of that, and by (n + 1) u / 2 of itself for n squares and n - 1
    additions, halved by the root, which rounds once, as do the quotient and the last product. The fp64
    product that it is compared with is held to no order: it is off by as much, which doubles the bound.
    """
    v, s = random, stored(random, tmp_path)
    w, a, b = (v[name].double() for name in ("w", "a", "b"))
    exact = w + (b @ a) * SCALE
    error = (R + 1) * 2.0**-53 * (w.abs() + (b.abs() @ a.abs()) * SCALE)
    if magnitude:
        norm = torch.linalg.norm(exact, dim=1, keepdim=True)
        factor = v["m"].double().unsqueeze(1) / norm
        relative = torch.linalg.norm(error, dim=1, keepdim=True) / norm
        relative += ((WIDTH + 1) / 2 + 3) * 2.0**-53
        exact *= factor
        error = error * factor.abs() + exact.abs() * relative
    merged = Merged(s["w"], s["a"], s["b"], SCALE, magnitude=s["m"] if magnitude else None)

    # The terms of the second order are smaller by 2**-40.
    assert_rounded(load(merged), exact, 2 * error * (1 + 2.0**-30))


def test_bias(random: State, tmp_path: Path) -> None:
    values = {"bias": random["b"][:, 0].contiguous(), "update": random["m"]}
    s = stored(values, tmp_path)
    pairs = zip(values["bias"].tolist(), values["update"].tolist(), strict=True)
    expected = fp64([base + update * SCALE for base, update in pairs])

    assert torch.equal(load(MergedBias(s["bias"], s["update"], SCALE)), expected.float())


@pytest.mark.parametrize("indices", [[3, 5, 36], [36, 0, 1], [1, 2, 3]])
def test_rows_are_replaced(random: State, tmp_path: Path, indices: list[int]) -> None:
    s = stored(random, tmp_path)
    expected = random["w"].clone()
    expected[indices] = random["a"][:3].bfloat16()
    rows = view(s["a"], 0, (3, WIDTH), (WIDTH, 1))

    assert torch.equal(load(with_rows(s["w"], rows, indices)), expected)
