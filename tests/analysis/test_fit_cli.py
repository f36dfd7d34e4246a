"""`harness fit`: any CSV in, an answer or a refusal out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.fit_file import LAWS
from analysis.shapes import FORMS
from harness.cli.main import command_line

TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def surface(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    p = TRUTH
    return p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]


def table(noise: float = 0.0, sizes: int = 6) -> pd.DataFrame:
    n = np.repeat(np.geomspace(4e7, 1.6e10, sizes), 6)
    d = np.tile(np.geomspace(1e9, 3e11, 6), sizes)
    luck = noise * np.random.default_rng(0).normal(size=len(n))
    return pd.DataFrame({"Model Size": n, "tokens": d, "loss": surface(n, d) * np.exp(luck)})


def run(tmp_path: Path, rows: pd.DataFrame, *options: str) -> tuple[dict[str, Any], str]:
    """fit.json and what was printed."""
    path, out = tmp_path / "rows.csv", tmp_path / "fit.json"
    rows.to_csv(path, index=False)
    done = CliRunner().invoke(command_line(), ["fit", str(path), *options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text()), done.output


SURFACE = ("--law", "chinchilla", "--n", "Model Size", "--d", "tokens", "--loss", "loss")


def test_noise_free_rows_give_back_the_law(tmp_path: Path) -> None:
    found, said = run(tmp_path, table(), *SURFACE, "--bootstrap", "0")
    assert found["status"] == "converged"
    assert found["params"] == pytest.approx(TRUTH, rel=1e-6)
    assert found["rows_used"] == 36 and found["rows_dropped"] == []
    assert found["heldout"]["log_rmse"] < 1e-6
    assert found["reduction"] == "sum" and found["delta"] == 1e-3
    assert "alpha" in said and "fit: " in said


def test_rows_that_cannot_be_used_are_listed_by_line(tmp_path: Path) -> None:
    rows = table(0.005).astype(object)
    rows.loc[3, "loss"] = "nan"
    rows.loc[5, "tokens"] = "many"
    rows.loc[7, "Model Size"] = -1
    found, _ = run(tmp_path, rows, *SURFACE, "--bootstrap", "0")
    assert found["rows_used"] == 33
    assert [(r["line"], r["reason"]) for r in found["rows_dropped"]] == [
        (5, "loss is 'nan'; expected a number above 0"),
        (7, "tokens is 'many'; expected a number above 0"),
        (9, "Model Size is '-1'; expected a number above 0"),
    ]


def test_the_highest_rows_are_dropped_when_asked_and_their_effect_is_told(tmp_path: Path) -> None:
    rows = table()
    rows.loc[4, "loss"] = 9.0
    found, _ = run(tmp_path, rows, *SURFACE, "--bootstrap", "0", "--drop-highest", "1")
    assert found["params"] == pytest.approx(TRUTH, rel=1e-6)
    assert found["rows_dropped"] == [
        {"line": 6, "reason": "among the 1 highest values of loss (--drop-highest)"}
    ]
    assert found["all_rows"]["rows_used"] == 36


def test_a_row_far_off_is_named_and_used(tmp_path: Path) -> None:
    rows = table(0.002)
    rows.loc[4, "loss"] *= 1.5
    found, _ = run(tmp_path, rows, *SURFACE, "--bootstrap", "0")
    assert found["rows_used"] == 36
    assert any("1 rows are far off" in text and "line 6" in text for text in found["warnings"])


def test_rows_of_a_run_are_resampled_together(tmp_path: Path) -> None:
    rows = table(0.005)
    rows["run id"] = np.arange(36) % 12
    found, _ = run(tmp_path, rows, *SURFACE, "--run", "run id", "--bootstrap", "100")
    assert found["bootstrap"]["unit"] == "runs" and found["bootstrap"]["units"] == 12
    low, high = found["ci95"]["alpha"]
    assert low < found["params"]["alpha"] < high


def test_schedules_of_several_kinds_are_not_pooled(tmp_path: Path) -> None:
    rows = table()
    rows["schedule"] = np.where(np.arange(36) % 2, "cosine, finished", "cosine, running")
    found, said = run(tmp_path, rows, *SURFACE)
    assert found["status"] == "refused" and found["params"] == {}
    assert "mixed schedules" in found["reason"] and "mixed schedules" in said
    found, _ = run(tmp_path, rows, *SURFACE, "--schedule", "none", "--bootstrap", "0")
    assert found["status"] == "converged"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (table().head(6), "too few points (6); at least 7 needed"),
        (table(sizes=2), "2 distinct N; at least 3 needed"),
        (table()[table()["tokens"] < 2e10], "D spans 0.99 decades"),
    ],
)
def test_rows_that_identify_nothing_are_refused(
    tmp_path: Path, rows: pd.DataFrame, reason: str
) -> None:
    found, said = run(tmp_path, rows, *SURFACE)
    assert found["status"] == "refused" and reason in found["reason"] and reason in said
    assert found["params"] == {} and found["ci95"] == {} and found["objective"] is None


def test_held_out_rows_of_a_law_over_one_axis_are_predicted(tmp_path: Path) -> None:
    x = np.geomspace(1e3, 1e6, 9)
    rows = pd.DataFrame({"x": x, "error rate": 5 * x**-0.4 + 0.1, "fit": (x < 2e5).astype(int)})
    one = ("--law", "power_irreducible", "--x", "x", "--y", "error rate", "--train", "fit")
    found, _ = run(tmp_path, rows, *one, "--bootstrap", "0", "--compare")
    assert found["params"] == pytest.approx({"a": 5.0, "b": 0.4, "c": 0.1}, rel=1e-6)
    assert found["rows_used"] == int((x < 2e5).sum())
    assert found["heldout"]["rows_held_out"] == int((x >= 2e5).sum())
    assert found["heldout"]["log_rmse"] < 1e-6
    assert found["forms"][0]["log_rmse"] < 1e-6
    assert {row["law"] for row in found["forms"]} == {n for n in FORMS if FORMS[n].inputs == ("x",)}


def test_the_chance_level_of_an_error_can_be_given(tmp_path: Path) -> None:
    x = np.geomspace(1e2, 1e6, 12)
    low, high = np.full(12, 0.1), np.full(12, 0.9)
    for _ in range(100):  # (y - .1) / (.9 - y) = 30 x^-.5
        y = (low + high) / 2
        above = (y - 0.1) / (0.9 - y) > 30 * x**-0.5
        low, high = np.where(above, low, y), np.where(above, y, high)
    rows = pd.DataFrame({"x": x, "y": y})
    one = ("--law", "m4", "--x", "x", "--y", "y", "--chance", "0.9", "--bootstrap", "0")
    found, _ = run(tmp_path, rows, *one)
    assert found["params"] == pytest.approx({"a": 30.0, "b": 0.5, "c": 0.1, "g": 1.0}, rel=1e-5)


def optimum(c: np.ndarray) -> np.ndarray:
    """N* at compute c = 6 N D, in closed form."""
    p = TRUTH
    scale = p["A"] * p["alpha"] / (p["B"] * p["beta"])
    return (scale * (c / 6) ** p["beta"]) ** (1 / (p["alpha"] + p["beta"]))


@pytest.mark.parametrize("law", ["envelope", "isoflop"])
def test_compute_optimal_models_come_from_curves(tmp_path: Path, law: str) -> None:
    if law == "isoflop":  # nine sizes around the best at each of seven budgets
        c = np.repeat(np.geomspace(1e18, 1e21, 7), 9)
        n = optimum(c) * np.tile(np.geomspace(0.25, 4, 9), 7)
        d = c / (6 * n)
    else:  # curves of ten sizes
        n = np.repeat(optimum(np.geomspace(1e18, 1e21, 10)), 60)
        d = np.tile(np.geomspace(1e9, 1e12, 60), 10)
        c = 6 * n * d
    frame = pd.DataFrame({"n": n, "d": d, "c": c, "loss": surface(n, d), "run": n})
    options = ("--law", law, "--n", "n", "--d", "d", "--c", "c", "--loss", "loss")
    found, _ = run(tmp_path, frame, *options, "--bootstrap", "0")
    assert found["status"] == "converged", found["reason"]
    assert found["params"]["a"] == pytest.approx(0.3658 / 0.7136, abs=0.03)
    assert found["params"]["a"] + found["params"]["b"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--law", "chinchilla", "--n", "Model Size"], "--law chinchilla needs --loss"),
        (["--law", "power", "--x", "tokens", "--y", "los"], "no column 'los'"),
        (["--law", "power", "--x", "tokens", "--y", "los"], "did you mean 'loss'?"),
        (["--law", "power", "--x", "tokens", "--y", "loss", "--n", "loss"], "--n means nothing"),
        ([*SURFACE, "--drop-highest", "-1"], "--drop-highest -1: expected 0 or more"),
        ([*SURFACE, "--delta", "0"], "--delta 0: expected a number above 0"),
        ([*SURFACE, "--bootstrap", "5"], "--bootstrap 5: expected 0, or at least 20"),
        ([*SURFACE, "--chance", "0.9"], "and --law m4"),
        (["--law", "envelope", "--n", "Model Size", "--loss", "loss"], "needs --d or --c"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path: Path, options: list[str], message: str) -> None:
    table().to_csv(tmp_path / "rows.csv", index=False)
    out = tmp_path / "fit.json"
    done = CliRunner().invoke(
        command_line(), ["fit", str(tmp_path / "rows.csv"), *options, "--out", str(out)]
    )
    assert done.exit_code == 2
    assert message in done.output and "Traceback" not in done.output
    assert not out.exists()


@pytest.mark.parametrize("text", ["", "\n", "a,b\n", "\x00\x01", "x,x\n1,2\n"])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    options = ["--law", "power", "--x", "x", "--y", "y", "--out", str(tmp_path / "fit.json")]
    done = CliRunner().invoke(command_line(), ["fit", str(tmp_path / "rows.csv"), *options])
    assert done.exit_code == 2 and "Traceback" not in done.output


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    done = CliRunner().invoke(command_line(), ["fit", str(tmp_path / "no.csv"), *SURFACE])
    assert done.exit_code == 4 and "no such file" in done.output


def test_help_states_every_law_as_it_is_fitted() -> None:
    text = " ".join(CliRunner().invoke(command_line(), ["fit", "--help"]).output.split())
    for law in LAWS:
        assert law in text
    for form in FORMS.values():
        assert form.formula in text
