"""The solver against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from harness.transfer import logistic
from harness.transfer.probe import choose_penalty, held_out


def problem(num: int = 300, width: int = 8, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    class_M = torch.randint(0, classes, (num,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    features = centres[class_M] + 1.5 * torch.randn(num, width, generator=generator)
    return features, class_M


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_finds_the_minimum_scikit_learn_finds(penalty: float) -> None:
    features, class_M = problem()
    weights = logistic.fit(features, class_M, 4, penalty, tolerance=1e-6)
    theirs = LogisticRegression(C=1 / (len(features) * penalty), tol=1e-8, max_iter=5000)
    theirs.fit(features.double().numpy(), class_M.numpy())
    ours = torch.softmax(logistic.logits(weights, features), dim=1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(features.double().numpy()), atol=5e-4)
    np.testing.assert_allclose(weights[:-1].T.numpy(), theirs.coef_, atol=5e-3)


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    features, class_M = problem()
    strong = logistic.fit(features, class_M, 4, 1e-1)
    warm = logistic.fit(features, class_M, 4, 1e-3, start=strong, tolerance=1e-6)
    cold = logistic.fit(features, class_M, 4, 1e-3, tolerance=1e-6)
    torch.testing.assert_close(warm[:-1], cold[:-1], atol=5e-3, rtol=0)


def test_a_fifth_of_each_class_is_held_out() -> None:
    class_M = torch.tensor([0] * 10 + [1] * 7 + [2])
    held_M = held_out(class_M)
    assert [int(held_M[class_M == cls].sum()) for cls in range(3)] == [2, 1, 0]


def test_the_penalty_with_the_best_held_out_accuracy_is_chosen_in_any_order() -> None:
    features, class_M = problem(num=400, width=40)
    features = features + 3 * torch.randn(400, 40, generator=torch.Generator().manual_seed(1))
    penalties = (1e-7, 3e-2, 100.0)
    held_M = held_out(class_M)
    accuracies = {}
    for penalty in penalties:
        weights = logistic.fit(features[~held_M], class_M[~held_M], 4, penalty)
        pred = logistic.logits(weights, features[held_M]).argmax(dim=1)
        accuracies[penalty] = (pred == class_M[held_M]).double().mean().item()
    assert len(set(accuracies.values())) == 3, accuracies
    best = max(penalties, key=lambda penalty: accuracies[penalty])
    chosen, weights = choose_penalty(features, class_M, 4, penalties)
    again, same = choose_penalty(features, class_M, 4, penalties[::-1])
    assert chosen == again == best
    assert torch.equal(weights, same)
