"""Two ranks do what one rank does with two accumulation steps."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import tiny
import torch
from rank_jobs import AVERAGED, FINE_TUNE, MAE, WSP
from safetensors.torch import load_file

from harness import transfer
from harness.study.recipes import Optimization
from harness.train.loop import train

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes ran rank_jobs.py."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("rank_jobs.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(out)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return out


def rows_of(two_ranks: Path, name: str, rank: int = 0) -> list[dict[str, float]]:
    return json.loads((two_ranks / f"rows_{rank}.json").read_text())[name]


def assert_rows_close(left: list[dict[str, float]], right: list[dict[str, float]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one == pytest.approx(other, rel=2e-5)


@pytest.mark.parametrize(("name", "recipe"), [("mae", MAE), ("wsp", WSP)])
def test_two_ranks_equal_one_rank_with_two_accumulation_steps(
    name: str, recipe: Optimization, two_ranks: Path, tmp_path: Path
) -> None:
    rows = tiny.Rows()
    stage = tiny.stage(recipe, micro_batch=8)  # type: ignore[arg-type]  # a gradient recipe
    train(stage, tiny.context(tmp_path, metrics=rows))
    assert_rows_close(rows_of(two_ranks, name), rows.timeless())
    both = load_file(two_ranks / name / "weights.safetensors")
    tiny.assert_same_to_rounding(load_file(tmp_path / "weights.safetensors"), both)


def test_two_ranks_stopped_and_resumed_equal_two_undisturbed(two_ranks: Path) -> None:
    assert rows_of(two_ranks, "resumed") == rows_of(two_ranks, "wsp")
    straight = load_file(two_ranks / "wsp" / "weights.safetensors")
    resumed = load_file(two_ranks / "resumed" / "weights.safetensors")
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_every_rank_sees_the_same_metrics(two_ranks: Path) -> None:
    for name in ("mae", "wsp", "fine_tune"):
        assert rows_of(two_ranks, name, 0) == rows_of(two_ranks, name, 1)


def test_fine_tuning_predicts_every_test_image_once(two_ranks: Path, tmp_path: Path) -> None:
    rows = tiny.Rows()
    transfer.run(tiny.stage(FINE_TUNE, micro_batch=8), tiny.context(tmp_path, metrics=rows))
    assert_rows_close(rows_of(two_ranks, "fine_tune"), rows.timeless())
    alone = pyarrow.parquet.read_table(tmp_path / "predictions.parquet").to_pydict()
    both = pyarrow.parquet.read_table(two_ranks / "fine_tune" / "predictions.parquet").to_pydict()
    assert both["key"] == alone["key"]
    assert both["label"] == alone["label"]
    assert sum(a != b for a, b in zip(both["pred"], alone["pred"], strict=True)) <= 1


def test_an_average_is_that_of_one_rank_also_where_ranks_change(
    two_ranks: Path, tmp_path: Path
) -> None:
    """Mixing, erasing and the moving average: on two ranks, and stopped there to go on alone."""
    stage = tiny.stage(AVERAGED, micro_batch=8)
    rows = tiny.Rows()
    transfer.run(stage, tiny.context(tmp_path / "alone", metrics=rows))
    assert_rows_close(rows_of(two_ranks, "averaged_whole"), rows.timeless())
    shutil.copytree(two_ranks / "averaged", tmp_path / "changed")
    files = sorted(path.name for path in (tmp_path / "changed").rglob("ema_rank_*"))
    assert files == ["ema_rank_0.safetensors", "ema_rank_1.safetensors"]
    transfer.run(stage, tiny.context(tmp_path / "changed"))
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    for folder in (two_ranks / "averaged_whole", tmp_path / "changed"):
        tiny.assert_same_to_rounding(alone, load_file(folder / "model.safetensors"))


def test_divergence_is_raised_on_all_ranks(two_ranks: Path) -> None:
    messages = {(two_ranks / f"diverged_{rank}.txt").read_text() for rank in range(2)}
    assert len(messages) == 1
    assert "loss became" in messages.pop()
