"""Owns the parsing of durations and sizes, and the text of durations.

A message names the option of the value, because the user can change that.
"""

from __future__ import annotations

import math
import re

from ckpt_tools.errors import UsageError

_SECONDS = {"w": 604800.0, "d": 86400.0, "h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0, "ms": 1e-3}
_BYTES = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
}
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_ONE_DURATION = re.compile(rf"({_NUMBER}) ?(w|d|h|min|ms|m|s) ?")
_DURATION = re.compile(rf"(?:{_ONE_DURATION.pattern})+")
_SIZE = re.compile(rf"({_NUMBER}) ?([kmgtp]?i?b)?")

# Wide enough for any run. Products of two values do not overflow.
SHORTEST, LONGEST = 1e-9, 1e15
_LARGEST = 10**18
_DURATION_HINT = "Write it as 12s, 250ms, 1.5h, 9h30m or 2d. A number alone is seconds."
_SIZE_HINT = "Write it as 140GB, 1.3TB or 130GiB. A number alone is bytes."


def seconds(option: str, value: float | str, *, zero: bool = False) -> float:
    """A duration in seconds.

    Args:
        option: what to call it in a message, such as ``--mtbf``.
        value: seconds, or text: numbers with units, longest unit first (``9h30m``). Units are ``w``,
            ``d``, ``h``, ``m`` or ``min``, ``s`` and ``ms``; a number alone is seconds.
        zero: zero is allowed too.

    Raises:
        UsageError: it is not a duration, is not above zero, or is not from a nanosecond to 10^15 seconds.
    """
    found = _seconds(value) if isinstance(value, str) else float(value)
    if found is None or math.isnan(found):
        raise UsageError(f"{option}: {value!r} is not a duration", hint=_DURATION_HINT)
    if found == 0 and zero:
        return 0.0
    if found <= 0:
        least = "must not be negative" if zero else "must be longer than zero"
        raise UsageError(f"{option}: a duration here {least}, not {value!r}", hint=_DURATION_HINT)
    if not SHORTEST <= found <= LONGEST:
        raise UsageError(
            f"{option}: {value!r} is not between a nanosecond and 10^15 seconds",
            hint=_DURATION_HINT,
        )
    return found


def _seconds(text: str) -> float | None:
    text = text.strip().lower()
    sign = -1.0 if text.startswith("-") else 1.0
    text = text.removeprefix("-")
    if re.fullmatch(_NUMBER, text):
        return sign * float(text)
    if not _DURATION.fullmatch(text):
        return None
    parts = [(float(number), _SECONDS[unit]) for number, unit in _ONE_DURATION.findall(text)]
    units = [unit for _, unit in parts]
    if sorted(set(units), reverse=True) != units:
        return None
    return sign * sum(number * unit for number, unit in parts)


def nbytes(option: str, value: int | str) -> int:
    """A size in bytes.

    Args:
        option: what to call it in a message.
        value: bytes, or text: a number with a decimal (``GB``) or binary (``GiB``) unit.

    Raises:
        UsageError: it is not a size, is less than a byte, or more than 10^18 bytes.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip().lower())
        if match is None:
            raise UsageError(f"{option}: {value!r} is not a size", hint=_SIZE_HINT)
        amount: float = float(match[1]) * _BYTES[match[2] or "b"]
    else:
        amount = value
    if not 1 <= amount <= _LARGEST:
        raise UsageError(
            f"{option}: a size must be from one byte to 10^18 bytes, not {value!r}",
            hint=_SIZE_HINT,
        )
    return round(amount)


def duration_text(seconds: float) -> str:
    """A duration in the form that :func:`seconds` reads: ``40m15s``, ``9h``, ``2d4h``."""
    if seconds < 60:
        return f"{seconds:.3g}s" if seconds >= 1 or seconds == 0 else f"{seconds * 1000:.3g}ms"
    if seconds >= 86400e3:
        return f"{seconds / 86400:.0f}d"
    # Two units are enough. The smaller one is rounded before the split, so that 60s never appears.
    for large, small, name, below in (
        (86400, 3600, "d", "h"),
        (3600, 60, "h", "m"),
        (60, 1, "m", "s"),
    ):
        whole = math.floor(seconds / small + 0.5)
        count, rest = divmod(whole, large // small)
        if count:
            return f"{count}{name}{rest}{below}" if rest else f"{count}{name}"
    raise AssertionError(seconds)
