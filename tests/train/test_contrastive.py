"""The contrastive loss: equal to the plain one, whole or in chunks, on one rank or several."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contrastive_job import LIMIT, NUM, inputs, outcome
from torch import Tensor
from torch.nn import functional as F

from harness.train.contrastive import bounded, contrastive_loss


def plain(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """Radford et al. 2021, fig. 3."""
    logits = log_scale.exp() * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def with_gradients(loss: object, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    value = loss(*leaves)  # type: ignore[operator]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("chunk", [None, 1, 5, NUM, 100])
def test_loss_and_gradients_are_those_of_the_plain_loss(chunk: int | None) -> None:
    expected = with_gradients(plain, *inputs())
    found = with_gradients(lambda *x: contrastive_loss(*x, chunk=chunk), *inputs())
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_equal_similarities_cost_the_logarithm_of_the_batch() -> None:
    same = F.normalize(torch.ones(8, 4), dim=-1)
    loss = contrastive_loss(same, same, torch.tensor([math.log(1 / 0.07)]))
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)


def test_chunks_bound_the_memory_that_waits_for_the_backward_pass() -> None:
    def kept(chunk: int) -> int:
        sizes: list[int] = []
        image, text = (torch.randn(256, 4, requires_grad=True) for _ in range(2))

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            contrastive_loss(image, text, torch.zeros(1, requires_grad=True), chunk=chunk)
        return max(sizes)

    assert kept(16) < 256 * 16  # and not 256 x 256


@pytest.mark.parametrize(("value", "gradient", "passes"), [(1.0, -3.0, -3.0), (1.0, 3.0, 3.0)])
def test_below_the_limit_the_scale_is_free(value: float, gradient: float, passes: float) -> None:
    leaf = torch.tensor([value], requires_grad=True)
    bounded(leaf, LIMIT).backward(torch.tensor([gradient]))
    assert leaf.grad is not None and leaf.grad.item() == passes


def test_beyond_the_limit_a_gradient_passes_only_if_it_leads_back() -> None:
    leaf = torch.tensor([LIMIT + 0.1], requires_grad=True)
    out = bounded(leaf, LIMIT)
    assert out.item() == pytest.approx(LIMIT)
    for gradient, passes in ((2.0, 2.0), (-2.0, 0.0)):  # a step goes against the gradient
        found = torch.autograd.grad(out, leaf, torch.tensor([gradient]), retain_graph=True)[0]
        assert found.item() == passes


@pytest.mark.long
def test_two_ranks_have_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("contrastive_job.py")
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(rank)],
            env={
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(2)
    ]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, limit in (("free", 700.0), ("bounded", LIMIT)):
        expected = outcome(*inputs(), limit)
        found = [(a + b) / 2 for a, b in zip(*(part[name] for part in parts), strict=True)]
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    # What the whole batch wants of the temperature, on every rank.
    assert torch.equal(parts[0]["bounded"][-1], parts[1]["bounded"][-1])
