"""The solver against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

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
    weights = logistic.fit(features, class_M, 4, penalty, tolerance=1e-6).weights
    theirs = LogisticRegression(C=1 / (len(features) * penalty), tol=1e-8, max_iter=5000)
    theirs.fit(features.double().numpy(), class_M.numpy())
    ours = torch.softmax(logistic.logits(weights, features), dim=1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(features.double().numpy()), atol=5e-4)
    np.testing.assert_allclose(weights[:-1].T.numpy(), theirs.coef_, atol=5e-3)


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    features, class_M = problem()
    strong = logistic.fit(features, class_M, 4, 1e-1).weights
    warm = logistic.fit(features, class_M, 4, 1e-3, start=strong, tolerance=1e-6).weights
    cold = logistic.fit(features, class_M, 4, 1e-3, tolerance=1e-6).weights
    torch.testing.assert_close(warm[:-1], cold[:-1], atol=5e-3, rtol=0)


def objective(
    weights: torch.Tensor, features: torch.Tensor, class_M: torch.Tensor, penalty: float
) -> float:
    loss = F.cross_entropy(logistic.logits(weights, features), class_M)
    return (loss + penalty / 2 * weights[:-1].square().sum()).item()


def one_shot(classes: int, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(classes, width, generator=generator)
    return F.normalize(values, dim=1), torch.arange(classes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_the_default_tolerance_finds_the_minimum_of_two_thousand_classes_of_one_image() -> None:
    features, class_M = one_shot(2000)
    fit = logistic.fit(features, class_M, 2000, 1e-4)
    theirs = LogisticRegression(C=1 / (2000 * 1e-4), tol=1e-8, max_iter=1000)
    theirs.fit(features.double().numpy(), class_M.numpy())
    weights = torch.from_numpy(np.vstack([theirs.coef_.T, theirs.intercept_]))
    wanted = objective(weights, features, class_M, 1e-4)
    assert fit.is_converged
    assert objective(fit.weights, features, class_M, 1e-4) == pytest.approx(wanted, rel=1e-6)


def test_a_gradient_that_is_small_at_the_start_ends_no_search() -> None:
    features, class_M = one_shot(100)
    fit = logistic.fit(features / 100, class_M, 100, 1e-5)  # no entry above 1e-4
    assert fit.is_converged and fit.iterations > 1
    pred = logistic.logits(fit.weights, features / 100).argmax(dim=1)
    assert (pred == class_M).all()


def test_a_weak_penalty_on_classes_that_can_be_told_apart_is_fitted_tightly() -> None:
    features, class_M = one_shot(20)
    penalty = 1e-6
    found = objective(
        logistic.fit(features, class_M, 20, penalty).weights, features, class_M, penalty
    )
    tight = logistic.fit(features, class_M, 20, penalty, tolerance=1e-9)
    assert found == pytest.approx(objective(tight.weights, features, class_M, penalty), rel=1e-3)


def test_a_search_that_ends_early_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    features, class_M = problem()
    whole = logistic.fit(features, class_M, 4, 1e-6)
    assert logistic.summary([whole], "linear_probe")["iterations"] == whole.iterations
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(logistic, "MAX_ITERATIONS", 2)
    short = logistic.fit(features, class_M, 4, 1e-6)
    assert whole.is_converged and not short.is_converged
    found = logistic.summary([whole, short], "linear_probe")
    assert found["relative_gradient"] == short.relative_gradient > 1e-5
    assert "linear_probe: 1 of 2 fits ended before they converged" in capsys.readouterr().err


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
        weights = logistic.fit(features[~held_M], class_M[~held_M], 4, penalty).weights
        pred = logistic.logits(weights, features[held_M]).argmax(dim=1)
        accuracies[penalty] = (pred == class_M[held_M]).double().mean().item()
    assert len(set(accuracies.values())) == 3, accuracies
    best = max(penalties, key=lambda penalty: accuracies[penalty])
    chosen, fits = choose_penalty(features, class_M, 4, penalties)
    again, same = choose_penalty(features, class_M, 4, penalties[::-1])
    assert chosen == again == best
    assert torch.equal(fits[best].weights, same[best].weights)
