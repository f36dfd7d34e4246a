"""Numbers as people write them: counts (16k, 3B), durations, seconds, and back again."""

from __future__ import annotations

import functools
import math
import re

from harness.errors import UserError

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_COUNT = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kmbgt]?)\s*$", re.IGNORECASE)
_SI_POWERS = (("Y", 24), ("Z", 21), ("E", 18), ("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3))
_TIME = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_count(value: object) -> int:
    """A whole, positive number from 1000, '1k', '0.5M', '3B' (decimal multiples).

    Raises UserError for anything else, fractions of one included.
    """
    if isinstance(value, bool):
        raise UserError(f"{value!r} is not a count; expected a number such as 4000, 4k or 3B")
    if isinstance(value, int):
        number = float(value)
        exact = value
    else:
        match = _COUNT.match(str(value))
        if match is None:
            raise UserError(f"{value!r} is not a count; expected a number such as 4000, 4k or 3B")
        number = float(match[1]) * _SUFFIX[match[2].lower()]
        exact = round(number)
    if not math.isfinite(number) or exact < 1 or abs(exact - number) > 1e-6 * max(1.0, number):
        raise UserError(f"{value!r} is not a count; expected a whole number of at least 1")
    return exact


@functools.lru_cache(maxsize=10_000, typed=True)
def format_count(number: int) -> str:
    """The shortest exact form: 16000 -> '16k', 1797 -> '1797', 3000000000 -> '3B'."""
    for suffix, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor and number % (factor // 10) == 0:
            return f"{number / factor:g}{suffix}"
    return str(number)


@functools.lru_cache(maxsize=10_000, typed=True)
def safe_name(text: str) -> str:
    """At most 48 characters that are safe in a folder's name; others become '_'."""
    return "".join(c if c.isalnum() or c in "_.+=" else "_" for c in text)[:48]


def format_si(number: float, unit: str = "") -> str:
    """Three significant digits with a decimal multiple: 1.23e12 -> '1.23 T'."""
    for suffix, power in _SI_POWERS:
        factor = 10.0**power
        if abs(number) >= factor:
            return f"{number / factor:.3g} {suffix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def parse_seconds(value: object) -> float:
    """Seconds from 90, '90s', '15m', '2h', '3d'. Raises UserError for anything else."""
    match = re.match(r"^\s*([0-9]*\.?[0-9]+)\s*([smhd]?)\s*$", str(value))
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{value!r} is not a time; expected for example 90s, 15m, 2h or 3d")
    return float(match[1]) * _TIME[match[2] or "s"]


def format_seconds(seconds: float) -> str:
    """'42 s', '3 min 05 s', '2 h 10 min', '4 d 03 h'; whole units, rounded."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 2 * 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def steps_of(unit: str, amount: float, num_images: int, batch: int) -> int:
    """Optimizer steps of a duration given as samples, epochs or steps.

    The one place where durations are converted. An epoch is `num_images` samples; a duration
    that is not a whole number of batches is rounded up to one, never to none.
    """
    samples = {"samples": amount, "epochs": amount * num_images, "steps": amount * batch}[unit]
    # The small slack keeps 0.1 epochs of 1280 images at batch 128 one step, not two.
    return max(1, math.ceil(samples / batch - 1e-9))
