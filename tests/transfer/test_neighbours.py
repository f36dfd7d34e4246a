"""k-NN against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from harness.transfer import neighbours
from harness.transfer.neighbours import vote


def problem(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    class_M = torch.randint(0, 7, (num,), generator=generator)
    centres = torch.randn(7, 16, generator=torch.Generator().manual_seed(9))
    return centres[class_M] + 1.5 * torch.randn(num, 16, generator=generator), class_M


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_votes_are_those_of_scikit_learn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, class_M = problem(400, 0)
    test, test_class_M = problem(150, 1)
    theirs = KNeighborsClassifier(
        n_neighbors=min(k, 400),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),  # type: ignore[arg-type]  # the stubs know names only
    )
    theirs.fit(train.double().numpy(), class_M.numpy())
    wanted = theirs.predict(test.double().numpy())
    monkeypatch.setattr(neighbours, "SIMILARITIES", 400 * 64)  # three pieces, the last is short
    found = vote(train, class_M, test, 7, k, 0.07)
    assert found.tolist() == wanted.tolist()
    assert 0.6 < (found == test_class_M).double().mean().item() < 1


def test_near_images_weigh_more_than_many_far_ones() -> None:
    train = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.5, 1.0]])
    class_M = torch.tensor([0, 1, 1])
    test = torch.tensor([[1.0, 0.1]])
    assert vote(train, class_M, test, 2, 3, 0.07).tolist() == [0]
    assert vote(train, class_M, test, 2, 3, 100.0).tolist() == [1]
