"""LARS against numpy."""

import numpy as np
import torch

from harness.transfer.lars import Lars


def steps(decay: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ten steps of a matrix and a bias on random gradients: ours, and the formula in float64."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=(3, 4)), rng.normal(size=3)]
    ours = [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in start]
    optimizer = Lars(ours, lr=0.1, momentum=0.9, weight_decay=decay)
    plain, speed = [value.copy() for value in start], [np.zeros((3, 4)), np.zeros(3)]
    for step in range(10):
        lr = 6.4 / (step + 1)
        optimizer.param_groups[0]["lr"] = lr
        for i, param in enumerate(ours):
            gradient = rng.normal(size=plain[i].shape)
            param.grad = torch.from_numpy(gradient.copy())
            if gradient.ndim > 1:
                norm = np.sqrt((plain[i] ** 2).sum())
                gradient_norm = np.sqrt((gradient**2).sum())
                trust = 0.001 * norm / (gradient_norm + decay * norm)
                gradient = trust * (gradient + decay * plain[i])
            speed[i] = 0.9 * speed[i] + gradient
            plain[i] = plain[i] - lr * speed[i]
        optimizer.step()
    return [param.detach().numpy() for param in ours], plain


def test_ten_steps_are_those_of_the_formula() -> None:
    for decay in (0.0, 0.1):
        ours, plain = steps(decay)
        for mine, other in zip(ours, plain, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-12)


def test_weights_of_zero_are_moved_by_plain_sgd() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    Lars([weight], lr=0.5, momentum=0.9).step()
    assert torch.equal(weight, torch.full((2, 2), -0.5))
