"""The loss over several hashtags against worked examples and a dense version."""

import math

import pytest
import torch
from torch.nn import functional as F

from harness.models.heads import (
    Head,
    label_entropy,
    label_targets,
    mixed_targets,
    multi_label_cross_entropy,
    soft_cross_entropy,
)

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


@pytest.mark.parametrize(
    ("labels", "loss"),
    [([0, 2], 1.4401897), ([0], 0.4401897), ([0, 1, 2], 1.4401897)],
)
def test_worked_examples(labels: list[int], loss: float) -> None:
    offsets = torch.tensor([0, len(labels)])
    got = multi_label_cross_entropy(LOGITS, torch.tensor(labels), offsets)
    assert got.item() == pytest.approx(loss, abs=1e-6)


def test_equals_cross_entropy_against_dense_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, generator=generator)
    sets = [[1], [0, 8], [2, 3, 4], [5, 6, 7, 8]]
    dense = torch.zeros(4, 9)
    for row, labels in enumerate(sets):
        dense[row, labels] = 1 / len(labels)
    offsets = torch.tensor([0, 1, 3, 6, 10])
    flat = torch.tensor([label for labels in sets for label in labels])
    got = multi_label_cross_entropy(logits, flat, offsets)
    torch.testing.assert_close(got, F.cross_entropy(logits, dense, reduction="none"))


def test_the_floor_is_reached_by_the_perfect_prediction() -> None:
    offsets = torch.tensor([0, 2])
    perfect = torch.tensor([[10.0, -10.0, 10.0, -10.0]])
    loss = multi_label_cross_entropy(perfect, torch.tensor([0, 2]), offsets)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert label_entropy(offsets).item() == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize(
    ("classes", "loss"),
    [(28_000, 10.239960), (27_000, 10.203592), (21_000, 9.952278), (1000, 6.907755)],
)
def test_zero_logits_cost_ln_of_the_number_of_classes(classes: int, loss: float) -> None:
    offsets = torch.tensor([0, 1, 4])
    labels = torch.tensor([5, 0, 7, classes - 1])
    got = multi_label_cross_entropy(torch.zeros(2, classes), labels, offsets)
    assert got.tolist() == pytest.approx([loss, loss], abs=1e-5)


def test_an_image_without_hashtags_costs_nothing() -> None:
    got = multi_label_cross_entropy(LOGITS.repeat(2, 1), torch.tensor([0]), torch.tensor([0, 0, 1]))
    assert got.tolist() == pytest.approx([0.0, 0.4401897], abs=1e-6)


SETS = [[1], [0, 8], [], [5, 6, 7, 8], [2, 3, 4], [2]]
FLAT = torch.tensor([label for labels in SETS for label in labels])
OFFSETS = torch.tensor([0, 1, 3, 3, 7, 10, 11])


def dense_targets(classes: int) -> torch.Tensor:
    dense = torch.zeros(len(SETS), classes)
    for row, labels in enumerate(SETS):
        dense[row, labels] = 1 / max(1, len(labels))
    return dense


def test_mixed_targets_are_the_mixture_of_dense_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator)
    share = torch.tensor([0.3, 0.3, 0.9, 0.9, 1.0, 1.0])
    dense = dense_targets(9)
    dense = share[:, None] * dense + (1 - share[:, None]) * dense[[1, 0, 3, 2, 5, 4]]
    got = soft_cross_entropy(logits, mixed_targets(label_targets(FLAT, OFFSETS), share))
    torch.testing.assert_close(got, -(dense * logits.log_softmax(1)).sum(1))


@pytest.mark.parametrize("images", [1, 2, 4, 5, 6, 100])
def test_a_head_that_works_in_parts_gives_the_losses_and_gradients_of_dense_targets(
    images: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    head = Head(4, 9)
    torch.nn.init.normal_(head.weight, generator=generator)
    torch.nn.init.normal_(head.bias, generator=generator)
    features = torch.randn(6, 4, generator=generator, requires_grad=True)
    weight = torch.randn(6, generator=generator)  # so that images count differently
    leaves = [features, head.weight, head.bias]
    losses = head(features, label_targets(FLAT, OFFSETS), images)
    found = torch.autograd.grad((losses * weight).sum(), leaves)
    expected = -(dense_targets(9) * F.linear(*leaves).log_softmax(1)).sum(1)
    torch.testing.assert_close(losses, expected)
    for one, other in zip(
        found, torch.autograd.grad((expected * weight).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_head_that_works_in_parts_keeps_no_logits_for_the_backward_pass() -> None:
    def kept(images: int | None) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        features = torch.randn(64, 8, requires_grad=True)
        head = Head(8, 1000)
        labels = torch.arange(64)
        targets = label_targets(labels, torch.arange(65))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            head(features, targets, images).sum()
        return sum(sizes.values())

    logits = 64 * 1000 * 4
    assert kept(None) > logits
    # The weight of 8 x 1000 (a quarter of that) stays, and the features; no logits do.
    assert kept(16) < logits / 4
