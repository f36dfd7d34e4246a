"""Work that ranks share out by files: who waits says so, and the watchdog knows it from work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.errors import PreemptedError
from harness.transfer.parts import Part, make_parts
from tests import tiny


def test_a_rank_that_waits_for_another_is_seen_to_wait(tmp_path: Path) -> None:
    ctx = tiny.context(tmp_path, ranks=2, should_stop=tiny.StopAfter(3))
    seen: list[object] = []

    def make() -> dict[str, torch.Tensor]:
        seen.append(ctx.whereabouts.at)
        return {"x": torch.ones(1)}

    parts = [Part(path=tmp_path / "features" / f"{k}.safetensors", make=make) for k in range(2)]
    with pytest.raises(PreemptedError):
        make_parts(ctx, parts)  # rank 1 never makes its own
    assert seen == [(0, "compute")]
    assert ctx.whereabouts.at == (0, "reduce")


def test_what_follows_the_parts_is_not_judged(tmp_path: Path) -> None:
    ctx = tiny.context(tmp_path)
    part = Part(path=tmp_path / "features/0.safetensors", make=lambda: {"x": torch.ones(1)})
    make_parts(ctx, [part])
    assert ctx.whereabouts.at is None
