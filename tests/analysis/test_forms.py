"""Laws as forms: derivatives against differences, natural parameters, starts."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.forms import CHINCHILLA, Form
from analysis.joint import FACTOR, joint
from analysis.shapes import FORMS, m4_with_chance

ALL = {**FORMS, "m4 with chance": m4_with_chance(0.9)}


def example(form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Some coordinates (B, K) within the limits and inputs (I, P)."""
    rng = np.random.default_rng(0)
    u = rng.uniform(-3, 3, (len(form.inputs), 30))
    y = 0.6 * np.exp(rng.normal(0, 0.1, 30))
    low, high = form.limits(u, np.log(y))
    starts = form.starts(u, y)
    return np.clip(starts[len(starts) // 3 :][:4], low + 1e-3, high - 1e-3), u


def joint_example() -> tuple[Form, np.ndarray, np.ndarray]:
    _, u = example(CHINCHILLA)
    marked = (np.arange(30) % 2).astype(float)
    form = joint(CHINCHILLA, ("E", "alpha", "B", FACTOR), marked, np.array([18.0, 23.0]))
    base = np.array([0.5, -1.0, -1.0, 0.3, 0.4, 0.05, 0.02, -0.1, 0.03])
    return form, np.stack([base, base * 0.9]), u


def cases() -> list[tuple[Form, np.ndarray, np.ndarray]]:
    return [(form, *example(form)) for form in ALL.values()] + [joint_example()]


@pytest.mark.parametrize(("form", "theta", "u"), cases(), ids=[*ALL, "joint"])
def test_derivatives_are_those_of_the_value(form: Form, theta: np.ndarray, u: np.ndarray) -> None:
    value, jacobian = form.jacobian(theta, u)
    assert value == pytest.approx(form.value(theta, u), rel=1e-12)
    for k in range(form.size):
        step = 1e-6 * np.eye(form.size)[k]
        difference = (form.value(theta + step, u) - form.value(theta - step, u)) / 2e-6
        assert jacobian[:, :, k] == pytest.approx(difference, abs=2e-8)


@pytest.mark.parametrize(("form", "theta", "u"), cases(), ids=[*ALL, "joint"])
def test_curvature_is_that_of_the_derivatives(form: Form, theta: np.ndarray, u: np.ndarray) -> None:
    _, jacobian = form.jacobian(theta, u)
    psi = np.random.default_rng(1).normal(size=jacobian.shape[:2])
    found = form.curvature(theta, u, jacobian, psi)
    expected = Form.curvature(form, theta, u, jacobian, psi)
    assert found == pytest.approx(expected, abs=1e-5 * np.abs(expected).max() + 1e-8)


@pytest.mark.parametrize("law", FORMS)
def test_natural_parameters_do_not_depend_on_the_centre(law: str) -> None:
    form = FORMS[law]
    theta, u = example(form)
    centre = np.full(len(form.inputs), 7.0)
    params = form.natural(theta, centre)
    x = np.exp(u + 7.0)
    assert np.isfinite(params).all()
    for row, line in zip(params, form.value(theta, u), strict=True):
        expected = written_out(law, dict(zip(form.names, row, strict=True)), x)
        if law == "m4":
            p = dict(zip(form.names, row, strict=True))
            y = np.exp(line)
            left = (y - p["c"]) / (p["e0"] - y) ** p["g"]
            assert left == pytest.approx(p["a"] * x[0] ** -p["b"], rel=1e-6)
        else:
            assert np.exp(line) == pytest.approx(expected, rel=1e-9)


def written_out(law: str, p: dict[str, float], x: np.ndarray) -> np.ndarray:
    """The formula as `harness fit --help` prints it."""
    names = {**p, "x": x[0], "N": x[0], "D": x[-1], "np": np}
    formula = FORMS[law].formula.partition("= ")[2] if law != "m4" else "x"
    return eval(formula, {"__builtins__": {}}, names)
