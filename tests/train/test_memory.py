"""Out of memory: real limits, a smaller micro-batch, the same global batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch
from torch._C import _LinAlgError as LinAlgError
from torch.distributed import DistBackendError, DistError, DistNetworkError

from harness.errors import OutOfMemoryError
from harness.exits import is_lost_rank
from harness.ledger.files import read_json
from harness.study.protocols import FineTune, Lit
from harness.study.recipes import Duration, WspRecipe
from harness.train.memory import memory_checked, smaller_micro_batch
from harness.train.objectives import WspObjective
from harness.transfer.finetune import FineTuneObjective
from harness.transfer.lit import LitObjective
from tests.conftest import Harness

Kind = TypeVar("Kind", FineTuneObjective, LitObjective, WspObjective)

STUDY = """\
name: large
axes:
  size: [d64x4]
  data: [1k]
  init: [random]
defaults:
  dataset: scenes-2k
  image_size: 24
stages:
  wsp:
    duration: {steps: 2}
    batch: 1024
    val_images: 64
resources: {MEMORY}
"""


class Batches:
    micro_batch, accumulation = 32, 3


@pytest.mark.parametrize(
    ("share", "micro", "smaller"), [(64, 64, 32), (96, 32, 24), (7, 7, 1), (8, 1, None)]
)
def test_the_next_micro_batch_is_the_largest_that_still_divides(
    share: int, micro: int, smaller: int | None
) -> None:
    assert smaller_micro_batch(share, micro) == smaller


def test_a_recipe_that_mixes_pairs_goes_on_with_whole_pairs_or_not_at_all() -> None:
    recipe = FineTune(duration=Duration(steps=1), batch=12, mixup=0.8)
    mixing = objective(FineTuneObjective, recipe=recipe)
    assert [smaller_micro_batch(12, size, mixing.allows) for size in (12, 6, 4, 2)] == [
        6,
        4,
        2,
        None,
    ]
    wsp = objective(WspObjective, recipe=WspRecipe(duration=Duration(steps=1), mixup=0.2))
    assert smaller_micro_batch(9, 9, wsp.allows) is None and wsp.allows(6)
    plain = objective(WspObjective, recipe=WspRecipe(duration=Duration(steps=1)))
    assert smaller_micro_batch(9, 9, plain.allows) == 3
    with pytest.raises(OutOfMemoryError, match="micro_batch 2; no smaller one will do") as error:
        engine = Batches()
        engine.micro_batch = 2
        with memory_checked(engine, mixing.allows):
            raise MemoryError
    assert error.value.smaller is None


def test_the_batch_of_a_text_tower_is_never_cut() -> None:
    recipe = Lit(duration=Duration(steps=1), batch=64)
    lit = objective(LitObjective, recipe=recipe, ctx=SimpleNamespace(ranks=2))
    assert lit.allows(32)
    assert smaller_micro_batch(32, 32, lit.allows) is None


def objective(kind: type[Kind], **fields: object) -> Kind:
    """An objective that has only what decides its forward passes."""
    made = kind.__new__(kind)
    vars(made).update(fields)
    return made


def test_other_errors_come_out_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_checked(Batches()):
        raise RuntimeError("shapes do not agree")
    with (
        pytest.raises(OutOfMemoryError, match="micro_batch 32; next: 24") as error,
        memory_checked(Batches()),
    ):
        raise MemoryError
    assert error.value.smaller == 24


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous"),
        torch.AcceleratorError("CUDA error: out of memory", 2),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=lambda error: str(error)[-28:],
)
def test_every_way_in_which_memory_ends_is_out_of_memory(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError), memory_checked(Batches()):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        DistBackendError("NCCL error: ncclRemoteError: remote process exited"),
        DistBackendError("ncclUnhandledCudaError: CUDA error: out of memory"),
        DistNetworkError("connection reset by peer"),
        torch.AcceleratorError("CUDA error: device-side assert triggered", 710),
        LinAlgError("the input matrix is singular"),
        NotImplementedError("no kernel for this type"),
        RecursionError("maximum recursion depth exceeded"),
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x2)"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:24]}",
)
def test_no_other_failure_of_a_step_is_taken_for_want_of_memory(error: Exception) -> None:
    """A smaller micro-batch would help none of them; what ends another rank, it ends here too."""
    with pytest.raises(type(error)) as caught, memory_checked(Batches()):
        raise error
    assert caught.value is error
    is_of_ranks = isinstance(error, DistError) or "gloo" in str(error)
    assert is_lost_rank(caught.value) == is_of_ranks


@pytest.mark.long
def test_a_stage_that_is_too_large_for_its_memory_goes_on_with_the_largest_part_that_fits(
    harness: Harness, tmp_path: Path
) -> None:
    free = tmp_path / "free.yaml"
    free.write_text(STUDY.replace("MEMORY", "threads: 2"))
    harness("grid", free, "--submit", env={"HARNESS_CORES": "2"})
    (whole,) = (tmp_path / "runs").glob("stages/wsp/*")
    expected = read_json(whole / "result.json")
    assert expected and expected["micro_batch"] is None
    # A worker starts with about 1 GiB; the whole batch needs as much again, a single image little.
    bound = tmp_path / "bound.yaml"
    bound.write_text(STUDY.replace("MEMORY", "threads: 2, memory_gib: 1.5"))
    harness("grid", bound, "--submit", "--mode", "force", env={"HARNESS_CORES": "2"})
    result = read_json(whole / "result.json")
    assert result and result["micro_batch"] in (32, 64, 128, 256, 512)
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
    memory = read_json(whole / "memory.json")
    assert memory and memory["micro_batch"] == result["micro_batch"]
    assert memory["failed"] == 2 * result["micro_batch"]
    ends = [
        read_json(attempt / "attempt.json")["end"]  # type: ignore[index]  # each attempt has one
        for attempt in sorted((whole / "attempts").iterdir(), key=lambda path: int(path.name))
    ]
    assert ends[-1] == "done" and set(ends[1:-1]) == {"oom"}
