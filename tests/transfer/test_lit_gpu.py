"""LiT on CUDA, in bfloat16: nearly the losses of the CPU, and towers that read back on either."""

from __future__ import annotations

from pathlib import Path

import lit_jobs
import pytest
import tiny
import torch

from harness import transfer
from harness.models.lit import read_lit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_losses_are_nearly_those_of_the_cpu(tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        rows = tiny.Rows()
        context = tiny.context(tmp_path / device, metrics=rows)
        stage = lit_jobs.stage(lit_jobs.RECIPE, device=device)
        transfer.run(stage, lit_jobs.with_features(tmp_path, context))
        found[device] = [row["loss"] for row in rows.rows]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.05)
    texts = ["a red ring", "a blue star"]
    one, other = (
        read_lit(tmp_path / "cuda", torch.device(device)).texts(texts) for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
