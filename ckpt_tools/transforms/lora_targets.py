"""Owns the targets of LoRA factors: which tensor of the base, at which rank, in which orientation.

The targets follow from shapes. PEFT wraps modules with a ``weight``, and single parameters of a module, such
as fused experts. Several parameters of one module are wrapped one around the other, in the module's order.
Their names do not tell them apart.

Source: ``peft/tuners/lora/layer.py`` (``Linear``, ``Embedding``, ``ParamWrapper``, ``_ConvNd``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import permutations

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout, UsageError, listed
from ckpt_tools.tensors.catalogue import Shape
from ckpt_tools.transforms.lora import Part, plain_name


@dataclass(frozen=True)
class Factors:
    """The tensors that adapt one module or parameter, by their names in the state.

    Attributes:
        module: the wrapper, below ``base_model.model.``.
        a: ``A``.
        b: ``B``.
        embedding: whether they adapt an embedding.
        bias: the bias of ``B``, if it has one.
        magnitude: DoRA's vector, if there is one.
    """

    module: str
    a: str
    b: str
    embedding: bool
    bias: str | None = None
    magnitude: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(filter(None, (self.a, self.b, self.bias, self.magnitude)))


@dataclass(frozen=True)
class Target:
    """What factors adapt.

    Attributes:
        weight: the tensor's name in a model without adapters; None if the base is absent.
        key: the name that the config's patterns must match: the module's, or the parameter's.
        rank: ``r``.
        experts: how many matrices the tensor stacks, 1 for a single matrix.
        transposed: whether it is stored (in, out); None if the shapes do not tell.
    """

    weight: str | None
    key: str
    rank: int
    experts: int = 1
    transposed: bool | None = False

    @property
    def is_parameter(self) -> bool:
        """Whether a parameter is adapted, and not a module."""
        return self.key == self.weight


def factors(parts: Iterable[Part]) -> dict[str, Factors]:
    """The pairs of an adapter, by wrapper.

    Raises:
        DamagedCheckpoint: a tensor has no partner, or is of an unknown kind.
    """
    roles: dict[str, dict[str, str]] = {}
    for part in parts:
        if part.is_lora:
            role = ".".join(filter(None, (part.container, part.tail)))
            roles.setdefault(part.module, {})[role] = part.name
    pairs = {}
    for module, held in roles.items():
        embedding = "lora_embedding_A" in held or "lora_embedding_B" in held
        wanted = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        missing = [role for role in wanted if role not in held]
        if missing:
            raise DamagedCheckpoint(
                f"{module} has {listed(list(held))} and no {' and no '.join(missing)}",
                hint="The adapter is incomplete. The run that saved it left tensors out.",
            )
        magnitude = held.pop(
            "lora_magnitude_vector.weight", held.pop("lora_magnitude_vector", None)
        )
        found = Factors(
            module,
            held.pop(wanted[0]),
            held.pop(wanted[1]),
            embedding,
            held.pop("lora_B.bias", None),
            magnitude,
        )
        if held:
            raise DamagedCheckpoint(f"unknown LoRA tensors: {listed(list(held.values()))}")
        pairs[module] = found
    return pairs


def find_targets(
    pairs: Mapping[str, Factors], shapes: Mapping[str, Shape], base: Mapping[str, Shape]
) -> dict[str, Target]:
    """What each pair adapts.

    Args:
        pairs: the pairs, by wrapper.
        shapes: shapes of the factors, by their names in the state.
        base: shapes of the base, by plain name; empty if the base is absent.

    Raises:
        DamagedCheckpoint: the ranks of two factors differ.
        UsageError: factors fit no tensor of the base.
        UnsupportedLayout: they are those of another kind of layer.
    """
    by_module: dict[str, list[Factors]] = {}
    for pair in pairs.values():
        _refuse_unfit(pair, shapes)
        by_module.setdefault(plain_name(pair.module), []).append(pair)
    targets: dict[str, Target] = {}
    for module, wrappers in by_module.items():
        # The innermost wrapper has the most `base_layer` segments after the module.
        wrappers.sort(key=lambda pair: -len(pair.module))
        found = _targets(module, wrappers, shapes, base)
        if f"{module}.out_proj" in by_module:
            # PEFT adapts both projections of nn.MultiheadAttention where its config names the module.
            found = {
                name: replace(target, key=module)
                if target.weight == f"{module}.in_proj_weight"
                else target
                for name, target in found.items()
            }
        targets |= found
    return _decided(targets, pairs)


def _targets(
    module: str,
    wrappers: list[Factors],
    shapes: Mapping[str, Shape],
    base: Mapping[str, Shape],
) -> dict[str, Target]:
    weight = f"{module}.weight"
    own = [n for n, shape in base.items() if n.rpartition(".")[0] == module and len(shape) > 1]
    if not own:
        return {p.module: Target(None, module, shapes[p.a][0]) for p in wrappers}
    names = [weight] if len(wrappers) == 1 and weight in own else own
    for chosen in permutations(names, len(wrappers)):
        fits = [
            _target(name, base[name], pair, shapes)
            for name, pair in zip(chosen, wrappers, strict=True)
        ]
        if all(fits):
            return {p.module: t for p, t in zip(wrappers, fits, strict=True) if t is not None}
    if len(wrappers) == 1 and weight not in own:
        # A quantiser that is not known may keep the weight under other names.
        return {p.module: Target(None, module, shapes[p.a][0]) for p in wrappers}
    sizes = ", ".join(f"{name} {base[name]}" for name in names)
    pair = wrappers[0]
    fact = (
        f"its shape {shapes[pair.a]}, with {shapes[pair.b]} of {pair.b}, fits no tensor of the base "
        f"({sizes})"
    )
    if any(len(base[name]) > 3 for name in names) or len(shapes[pair.a]) > 2:
        raise UnsupportedLayout(
            f"{fact}, as it does for a convolution with groups",
            tensor=pair.a,
            hint="PEFT does not merge such a layer either. Write the adapter with extract-lora, and load it "
            "beside its base.",
        )
    raise UsageError(
        fact,
        tensor=pair.a,
        hint="Adapter and base are of different models. Pass the base that the adapter was trained on.",
    )


def _target(name: str, base: Shape, pair: Factors, shapes: Mapping[str, Shape]) -> Target | None:
    """The target, if the factors fit the tensor."""
    a, b = shapes[pair.a], shapes[pair.b]
    module = name.removesuffix(".weight")
    if len(a) > 2:
        # The kernel of a convolution is a matrix of its outputs and of all other axes.
        return Target(name, module, a[0]) if base == (b[0], *a[1:]) else None
    (rows, width), height = a, b[0]
    experts = base[0] if len(base) == 3 else 1
    sides = base[-2:]
    if len(base) > 3 or rows % experts or sides not in ((height, width), (width, height)):
        return None
    transposed: bool | None = None if height == width else sides == (width, height)
    if pair.embedding:
        if sides != (width, height):
            return None
        transposed = True
    return Target(name, module, rows // experts, experts, transposed)


def _decided(targets: dict[str, Target], pairs: Mapping[str, Factors]) -> dict[str, Target]:
    """The targets, with square matrices in the orientation that the shapes of the others show."""
    for stacked in (False, True):
        alike = [
            module
            for module, target in targets.items()
            if (target.experts > 1) == stacked and not pairs[module].embedding
        ]
        known = {targets[m].transposed for m in alike if targets[m].weight is not None} - {None}
        if len(known) == 1:
            (transposed,) = known
            for module in alike:
                if targets[module].transposed is None:
                    targets[module] = replace(targets[module], transposed=transposed)
    return targets


def _refuse_unfit(pair: Factors, shapes: Mapping[str, Shape]) -> None:
    """Refuse factors whose product does not exist.

    Those of a convolution are convolutions: ``A`` with the kernel of the base, ``B`` with a kernel of 1.

    Raises:
        DamagedCheckpoint: the ranks of the factors differ.
        UnsupportedLayout: the factors are not of a linear layer, an embedding or a plain convolution.
    """
    a, b = shapes[pair.a], shapes[pair.b]
    known = 2 <= len(a) == len(b) <= 5 and all(size == 1 for size in b[2:])
    if known and a[0] == b[1] and a[0]:
        return
    fact = f"its shape {b} does not fit {a} of {pair.a}"
    if known and len(a) == 2:
        raise DamagedCheckpoint(
            fact,
            tensor=pair.b,
            hint="The factors have different ranks: they are of two adapters, or one was not gathered from "
            "its ranks.",
        )
    raise UnsupportedLayout(
        f"{fact} as in a linear layer, an embedding or a convolution without groups",
        tensor=pair.b,
        hint="Write the adapter with extract-lora, which copies its tensors.",
    )
