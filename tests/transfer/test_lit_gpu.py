"""LiT on CUDA, in bfloat16: nearly the losses of the CPU, and towers that read back on either."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
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


def losses_on(device: str, root: Path) -> list[float]:
    """Of a LiT stage; a process of its own has the backend of its device alone."""
    rows = tiny.Rows()
    context = tiny.context(root / device, metrics=rows)
    transfer.run(
        lit_jobs.stage(lit_jobs.RECIPE, device=device), lit_jobs.with_features(root, context)
    )
    return [row["loss"] for row in rows.rows]


def test_losses_are_nearly_those_of_the_cpu(tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found[device] = pool.submit(losses_on, device, tmp_path).result()
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.05)
    texts = ["a red ring", "a blue star"]
    one, other = (
        read_lit(tmp_path / "cuda", torch.device(device)).texts(texts) for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
