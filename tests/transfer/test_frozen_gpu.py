"""The frozen protocols on CUDA: solvers to rounding as on the CPU, bfloat16 passes nearly so."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from harness.study.protocols import FewShot, Knn, LinearProbe, PromptTuning, SgdProbe
from harness.study.stages import Recipe
from harness.transfer import logistic
from harness.transfer.neighbours import vote
from harness.transfer.probe import choose_penalty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    class_M = torch.randint(0, 20, (2000,), generator=generator)
    centres = torch.randn(20, 64, generator=generator)
    return centres[class_M] + 2 * torch.randn(2000, 64, generator=generator), class_M


def test_logistic_regression_finds_the_minimum_of_the_cpu() -> None:
    features, class_M = problem()
    penalties = (1e-4, 1e-2, 1.0)
    wanted, _ = choose_penalty(features, class_M, 20, penalties)
    found, _ = choose_penalty(features.cuda(), class_M.cuda(), 20, penalties)
    assert found == wanted
    one, other = (
        logistic.fit(*values, 20, 1e-3, tolerance=1e-9).weights
        for values in ((features, class_M), (features.cuda(), class_M.cuda()))
    )
    assert other.dtype == torch.float64
    # Each is within gradient / curvature of the minimum, 1e-9 / 1e-3 in every direction.
    torch.testing.assert_close(other.cpu(), one, atol=1e-5, rtol=0)


def test_neighbours_vote_as_on_the_cpu() -> None:
    features, class_M = problem()
    wanted = vote(features[:1500], class_M[:1500], features[1500:], 20, 20, 0.07)
    found = vote(features[:1500].cuda(), class_M[:1500], features[1500:], 20, 20, 0.07)
    assert (found == wanted).double().mean().item() > 0.995


@pytest.mark.parametrize(
    "recipe",
    [
        LinearProbe(),
        SgdProbe(batch=64, base_lr=1.0),
        Knn(),
        FewShot(shots=(5,), splits=2),
        PromptTuning(shots=(5,), splits=2, epochs=20, warmup_epochs=2),
    ],
    ids=lambda recipe: recipe.protocol,
)
def test_accuracy_is_nearly_that_of_the_cpu(recipe: Recipe, tmp_path: Path) -> None:
    name = "acc1_5shot" if hasattr(recipe, "shots") else "acc1"
    one, other = (
        tiny.judge(tiny.stage(recipe, device=device), tiny.context(tmp_path / device))
        for device in ("cpu", "cuda")
    )
    assert other.metrics[name] == pytest.approx(one.metrics[name], abs=0.05)
