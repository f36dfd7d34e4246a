"""The probe by SGD against a loop in numpy, and against logistic regression."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from harness.models.init import generator_of
from harness.study.protocols import SgdProbe
from harness.transfer.sgd_probe import fit, head, rate


def problem(num: int = 150, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    class_M = torch.randint(0, 4, (num,), generator=generator)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    scale = torch.tensor([0.01, 0.1, 1.0, 1.0, 10.0, 100.0])  # what the batch norm is for
    noise = torch.randn(num, 6, generator=generator)
    return (centres[class_M] + 0.7 * noise) * scale + 3 * scale, class_M


def in_numpy(
    features: np.ndarray, classes: np.ndarray, recipe: SgdProbe, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights, bias, running mean and running variance after training, in float64."""
    batch, num = min(recipe.batch, len(features)), len(features)
    weight = head(6, 4, seed)[1].weight.detach().double().numpy().copy()
    bias, speed, bias_speed = np.zeros(4), np.zeros_like(weight), np.zeros(4)
    mean, variance = np.zeros(6), np.ones(6)
    steps = num // batch
    for epoch in range(recipe.epochs):
        order = torch.randperm(num, generator=generator_of(seed, "sgd_probe", epoch)).numpy()
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            now = epoch + step / steps
            if now < recipe.warmup_epochs:
                share = now / recipe.warmup_epochs
            else:
                after = (now - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
                share = (1 + math.cos(math.pi * after)) / 2
            lr = share * recipe.base_lr * batch / 256
            x = features[chosen]
            mean = 0.9 * mean + 0.1 * x.mean(axis=0)
            variance = 0.9 * variance + 0.1 * x.var(axis=0, ddof=1)
            x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-6)
            scores = x @ weight.T + bias
            odds = np.exp(scores - scores.max(axis=1, keepdims=True))
            odds /= odds.sum(axis=1, keepdims=True)
            odds[np.arange(batch), classes[chosen]] -= 1
            gradient, bias_gradient = odds.T @ x / batch, odds.mean(axis=0)
            if recipe.optimizer == "lars":
                gradient *= 1e-3 * np.linalg.norm(weight) / np.linalg.norm(gradient)
            speed, bias_speed = 0.9 * speed + gradient, 0.9 * bias_speed + bias_gradient
            weight, bias = weight - lr * speed, bias - lr * bias_speed
    return weight, bias, mean, variance


@pytest.mark.parametrize(
    "recipe",
    [
        SgdProbe(epochs=5, warmup_epochs=2, batch=64),
        SgdProbe(epochs=5, warmup_epochs=0, batch=1024, base_lr=1.0),
        SgdProbe(optimizer="lars", epochs=5, warmup_epochs=2, batch=64, base_lr=30.0),
    ],
)
def test_training_is_that_of_the_formulas(recipe: SgdProbe) -> None:
    features, class_M = problem()
    model = fit(features, class_M, 4, recipe, seed=3)
    weight, bias, mean, variance = in_numpy(
        features.double().numpy(), class_M.numpy(), recipe, seed=3
    )
    np.testing.assert_allclose(model[1].weight.detach(), weight, rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(model[1].bias.detach(), bias, rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(model[0].running_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(model[0].running_var, variance, rtol=1e-5)


@pytest.mark.parametrize(
    "recipe", [SgdProbe(), SgdProbe(optimizer="lars", batch=16384, base_lr=30.0)]
)
def test_it_ends_near_what_logistic_regression_reaches(recipe: SgdProbe) -> None:
    features, class_M = problem(2000)
    test, test_class_M = problem(1000, seed=1)
    scale = features.std(dim=0)
    theirs = LogisticRegression(max_iter=1000).fit((features / scale).numpy(), class_M.numpy())
    wanted = theirs.score((test / scale).numpy(), test_class_M.numpy())
    pred = fit(features, class_M, 4, recipe, seed=0)(test).argmax(dim=1)
    found = accuracy_score(test_class_M.numpy(), pred.numpy())
    assert wanted > 0.8
    assert found == pytest.approx(wanted, abs=0.02)


def test_the_rate_rises_linearly_and_falls_along_half_a_cosine() -> None:
    found = [rate(epoch, 10, 90) for epoch in (0, 2.5, 10, 50, 90)]
    assert found == pytest.approx([0, 0.25, 1, 0.5, 0])


def test_warm_up_is_shorter_than_training() -> None:
    with pytest.raises(ValueError, match="warmup_epochs 10 must be fewer than epochs 10"):
        SgdProbe(epochs=10)
