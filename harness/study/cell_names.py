"""What cells are called."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from harness.study.expand import same
from harness.study.schema import LoadedStudy
from harness.study.starting import label_of
from harness.units import format_count, safe_name

if TYPE_CHECKING:
    from harness.study.cells import Ablation


def varied(loaded: LoadedStudy) -> list[tuple[str, str, Any]]:
    """Axes besides the usual ones: (key, its name in cells' names, the value of most cells)."""
    keys = {*loaded.study.axes, *(k for i in loaded.study.include for k in i)}
    keys -= {"size", "data", "init", "seed"}
    last_words = Counter(key.split(".")[-1] for key in keys)
    found = []
    for key in sorted(keys):
        word = key.split(".")[-1]
        name = word if last_words[word] == 1 else key
        found.append((key, name, loaded.study.defaults.get(key)))
    return found


def cell_name(
    axes: dict[str, Any], varied: list[tuple[str, str, Any]], ablation: Ablation | None
) -> str:
    """Readable part of a cell's id, such as `d64x4-4k-mae-s0`."""
    before, after = around_seed(axes, varied, ablation)
    return f"{before}{axes['seed']}{after}"


def around_seed(
    axes: dict[str, Any], varied: list[tuple[str, str, Any]], ablation: Ablation | None
) -> tuple[str, str]:
    """The name up to its seed, and from there on."""
    parts = [str(axes["size"]), format_count(axes["data"]), safe_name(label_of(axes["init"])), "s"]
    more = []
    for key, name, usual in varied:
        # What the study says of all cells does not tell one from another.
        if key in axes and not same(axes[key], usual):
            more.append(safe_name(f"{name}={axes[key]}"))
    if ablation:
        more.append(
            safe_name(ablation.tag or "-".join(f"{k}={v}" for k, v in ablation.set.items()))
        )
    return "-".join(parts), "".join(f"-{part}" for part in more)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Axis values as they enter a cell's id."""
    return {k: v if isinstance(v, (int, float, str, bool)) else repr(v) for k, v in values.items()}
