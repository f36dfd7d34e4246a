"""The three approaches side by side, conventions of compute, and their figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from surfaces import BESIROGLU, HOFFMANN, STEEP_D, Study, curves, exponent, valleys

from analysis import style
from analysis.approaches import approaches_table, conventions_table
from analysis.envelope import fit_envelope
from analysis.frontier import Frontier, frontier
from analysis.isoflop import fit_isoflop
from analysis.optimum import OptimumFit
from analysis.optimum_figures import envelope_curves, frontiers, isoflop_valleys
from analysis.panels import Figure, panel_svg, render, save

BUDGETS = np.geomspace(6e18, 3e21, 6)


def draws_of(surface: tuple, num: int = 300) -> np.ndarray:
    return np.array(surface) * np.exp(0.01 * np.random.default_rng(0).normal(size=(num, 5)))


@pytest.fixture(scope="module")
def runs() -> Study:
    return curves(np.geomspace(4e7, 4e9, 12), BESIROGLU, noise=0.002)


@pytest.fixture(scope="module")
def rows() -> Study:
    return valleys(BUDGETS, BESIROGLU, noise=0.002)


@pytest.fixture(scope="module")
def fits(runs: Study, rows: Study) -> dict[str, OptimumFit | Frontier]:
    return {
        "envelope": fit_envelope(runs.n, runs.d, runs.loss, runs=list(runs.run), bootstrap=300),
        "isoflop": fit_isoflop(rows.n, rows.d, rows.loss, rows.c, bootstrap=300),
        "surface": frontier(BESIROGLU, BUDGETS, draws_of(BESIROGLU)),
    }


def test_three_approaches_to_one_surface_agree(fits: dict[str, OptimumFit | Frontier]) -> None:
    table = approaches_table(fits)
    assert table.agree is True
    assert table.disagreements == () and table.not_compared == ()
    for row in table.rows:
        assert row.total == pytest.approx(1.0, abs=1e-9)
        assert row.a_ci95 is not None
        assert row.a_ci95[0] <= exponent(BESIROGLU) <= row.a_ci95[1]
    json.dumps(table.to_json(), allow_nan=False)


def test_a_disagreement_beyond_the_intervals_is_flagged(
    fits: dict[str, OptimumFit | Frontier],
) -> None:
    other = frontier(STEEP_D, BUDGETS, draws_of(STEEP_D))
    table = approaches_table({"isoflop": fits["isoflop"], "surface": other})
    assert table.agree is False
    assert len(table.disagreements) == 2
    assert table.disagreements[0].startswith("a of isoflop and surface: 0.509 and 0.643")


def test_without_intervals_nothing_is_compared() -> None:
    table = approaches_table(
        {
            "isoflop": OptimumFit(law="isoflop", status="refused", reason="too few"),
            "surface": frontier(HOFFMANN, BUDGETS),
        }
    )
    assert table.agree is None
    assert table.not_compared[0] == "a of isoflop and surface: no interval for isoflop and surface"
    assert table.rows[0].a is None and table.rows[0].reason == "too few"


def test_difference_is_that_of_independent_normal_estimates() -> None:
    """For symmetric intervals MOVER is the root of the sum of squares."""

    def law(a: float, half: float) -> Frontier:
        return Frontier(
            status="converged", params={"a": a, "b": 1 - a}, ci95={"a": (a - half, a + half)}
        )

    near = approaches_table({"one": law(0.5, 0.03), "two": law(0.549, 0.04)})
    far = approaches_table({"one": law(0.5, 0.03), "two": law(0.551, 0.04)})
    assert near.agree is True and far.agree is False


def test_conventions_move_the_exponent_as_they_should(runs: Study) -> None:
    """C = 6 N^1.2 D: the same optima weigh more on N, so a falls by the closed form."""
    steep = 6 * runs.n**1.2 * runs.d
    table = {
        row.name: row
        for row in conventions_table(
            runs.n,
            runs.d,
            runs.loss,
            {"exact": steep, "GPU-hours": None, "kWh": "no meter on these hosts"},
            list(runs.run),
            surface=BESIROGLU,
            draws=draws_of(BESIROGLU),
            bootstrap=100,
        )
    }
    assert list(table) == ["6 N D", "exact", "GPU-hours", "kWh"]
    assert table["GPU-hours"].rows == () and "not recorded" in table["GPU-hours"].reason
    assert table["kWh"].reason == "no meter on these hosts"
    plain, exact = ({r.approach: r for r in table[k].rows} for k in ("6 N D", "exact"))
    # alpha A N^-alpha / 1.2 = beta B D^-beta: N* goes with C^(beta / (alpha + 1.2 beta)).
    alpha, beta = BESIROGLU[3:]
    assert plain["surface"].a == pytest.approx(exponent(BESIROGLU), abs=1e-9)
    assert exact["surface"].a == pytest.approx(beta / (alpha + 1.2 * beta), abs=1e-6)
    assert exact["envelope"].a == pytest.approx(beta / (alpha + 1.2 * beta), abs=0.03)
    assert exact["isoflop"].a == pytest.approx(beta / (alpha + 1.2 * beta), abs=0.05)
    json.dumps([row.to_json() for row in table.values()], allow_nan=False)


def test_a_cost_that_n_and_d_do_not_tell_is_refused_or_warned_of(runs: Study) -> None:
    noisy = runs.c * np.exp(0.3 * np.random.default_rng(0).normal(size=len(runs.c)))
    one_size = np.where(runs.run < 2, runs.c, np.nan)
    table = conventions_table(
        runs.n,
        runs.d,
        runs.loss,
        {"noisy": noisy, "few": one_size},
        list(runs.run),
        surface=BESIROGLU,
        bootstrap=0,
    )
    noisy_row, few_row = ({r.approach: r for r in t.rows}["surface"] for t in table[1:])
    assert any("N and D give noisy only to 30%" in w for w in noisy_row.warnings)
    assert few_row.status == "refused" and "2 N" in few_row.reason


# -- figures --------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_draw_and_say_what_they_show(
    fits: dict[str, OptimumFit | Frontier], runs: Study, rows: Study, tmp_path: Path
) -> None:
    envelope, isoflop = fits["envelope"], fits["isoflop"]
    assert isinstance(envelope, OptimumFit) and isinstance(isoflop, OptimumFit)
    found = [
        isoflop_valleys(isoflop, rows.n, rows.loss),
        envelope_curves(envelope, runs.n, runs.loss, runs.c, list(runs.run)),
        frontiers(fits),
    ]
    for figure in found:
        assert isinstance(figure, Figure)
        drawings = render(figure)
        for path in save(figure, drawings, tmp_path):
            assert path.stat().st_size > 5000
        for drawing in drawings:
            svg = panel_svg(drawing, "p")
            assert svg.startswith("<svg") and "$" not in svg
    assert found[0] is not None and found[2] is not None
    assert "C 6e+18: N*" in found[0].panels[0].alt
    assert f"2 isoFLOP: a {isoflop.params['a']:.3f} (" in found[2].panels[0].alt


def test_refused_fits_are_drawn_without_a_law(runs: Study, tmp_path: Path) -> None:
    few = runs.run < 3
    fit = fit_envelope(
        runs.n[few], runs.d[few], runs.loss[few], runs=list(runs.run[few]), bootstrap=0
    )
    assert fit.status == "refused"
    figure = envelope_curves(fit, runs.n[few], runs.loss[few], runs.c[few], list(runs.run[few]))
    assert figure is not None and fit.reason in figure.panels[0].alt
    save(figure, render(figure), tmp_path)
    assert frontiers({"envelope": fit}) is None
    assert isoflop_valleys(replace(fit, law="isoflop", points=()), runs.n, runs.loss) is None


def test_a_wide_loss_axis_has_numbers_and_no_source_of_formulas() -> None:
    with style.apply():
        ax = plt.figure().add_subplot()
        style.log_y(ax, np.array([0.01, 10.0]))
        labels = [label.get_text() for label in ax.get_yticklabels()]
        plt.close(ax.figure)  # type: ignore[arg-type]
    assert {"0.01", "0.1", "1", "10"} <= set(labels)


@pytest.mark.slow
def test_same_figure_same_bytes(fits: dict[str, OptimumFit | Frontier], tmp_path: Path) -> None:
    one, two = frontiers(fits), frontiers(fits)
    assert one is not None and two is not None
    texts = [
        save(f, render(f), tmp_path / str(i))[0].read_bytes() for i, f in enumerate((one, two))
    ]
    assert texts[0] == texts[1]
