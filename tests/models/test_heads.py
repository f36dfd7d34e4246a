"""The loss over several hashtags against worked examples and a dense version."""

import math

import pytest
import torch
from torch.nn import functional as F

from harness.models.heads import label_entropy, multi_label_cross_entropy

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
