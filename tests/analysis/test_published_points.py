"""The shipped published points: closed forms, the texts they come from, series, figure, export."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import panels, published
from harness.errors import UserError
from harness.study.sizes import SIZES

POINTS = published.points()


@pytest.mark.parametrize("size", sorted(POINTS["size"].unique()))
def test_params_are_those_of_the_closed_form(size: str) -> None:
    """Patch embedding, class token, positions at 224 pixels, blocks, last norm; no head."""
    shape = SIZES[size]
    d, p = shape.width, shape.patch
    patches = (224 // p) ** 2
    expected = 3 * p * p * d + d + d + (patches + 1) * d
    expected += shape.depth * (12 * d * d + 13 * d) + 2 * d
    assert POINTS.loc[POINTS["size"] == size, "params"].unique().tolist() == [expected]


def test_every_point_says_what_it_is_and_where_it_stands() -> None:
    assert tuple(POINTS.columns) == published.COLUMNS
    for name in ("size", "init", "pretrain_data", "task", "metric", "version", "source"):
        assert (POINTS[name].str.len() > 0).all(), name
    assert set(POINTS["version"]) == set(published.VERSIONS)
    assert POINTS["unit"].unique().tolist() == ["percent"]
    assert not POINTS.duplicated(list(published.KEY)).any()
    doubtful = POINTS[POINTS["status"] == "unverified"]
    assert (doubtful["note"].str.len() > 0).all()


def test_values_are_percentages_and_their_errors_shares() -> None:
    assert POINTS["value"].between(15, 97).all()
    np.testing.assert_allclose(POINTS["error"] * 100 + POINTS["value"], 100, atol=1e-4)


def test_a_data_set_has_one_number_of_images() -> None:
    counts = POINTS.groupby("pretrain_data")["pretrain_images"].unique()
    assert {k: v.tolist() for k, v in counts.items()} == {
        "IG-3.6B": [3_600_000_000],
        "IG-3B": [3_000_000_000],
        "IN1k": [1_281_167],
        "IN21k": [14_000_000],
    }


def test_a_robustness_set_is_harder_than_the_set_that_was_trained_on() -> None:
    """INv2 and ObjectNet are harder than ImageNet, its cleaned labels easier: for every model."""
    wide = POINTS[(POINTS["version"] == "iccv") & (POINTS["resolution"] == 518)]
    wide = wide.pivot(index=["size", "init"], columns="task", values="value").dropna()
    assert len(wide) == 3
    assert (wide["in_v2"] < wide["in1k_fine_tune"]).all()
    assert (wide["objectnet"] < wide["in_v2"]).all()
    assert (wide["in_real"] > wide["in1k_fine_tune"]).all()


@pytest.mark.parametrize(
    "version", ["maws_readme_2024", "maws_readme_2023", "swag_readme", "mae_finetune"]
)
def test_a_larger_model_of_one_text_has_the_smaller_error(version: str) -> None:
    """True of every series of a release; a slip of a digit would break it."""
    rows = POINTS[POINTS["version"] == version]
    for key, group in rows.groupby(["task", "metric", "init", "pretrain_data", "regime"]):
        assert group.sort_values("params")["error"].is_monotonic_decreasing, key


def test_more_shots_are_never_worse_and_masks_never_better_than_boxes() -> None:
    few = POINTS[POINTS["metric"].str.endswith("shot")].copy()
    few["shots"] = few["metric"].str.extract(r"(\d+)").astype(int)
    for _, group in few.groupby(["size", "init", "task", "version"]):
        assert group.sort_values("shots")["value"].is_monotonic_increasing
    detection = POINTS[POINTS["task"].isin(["coco", "lvis"])]
    wide = detection.pivot(
        index=["size", "init", "pretrain_data", "task"], columns="metric", values="value"
    ).dropna()
    assert len(wide) == 8
    assert (wide["box_ap"] > wide["mask_ap"]).all()


def test_what_contradicts_the_headline_is_there() -> None:
    """docs/published.md speaks of these."""

    def value(size: str, init: str, task: str, metric: str, data: str | None = None) -> float:
        found = published.select(
            task=task, metric=metric, init=init, data=data, version="iccv"
        ).query("size == @size")
        assert len(found) == 1
        return float(found["value"].iloc[0])

    one_shot = [value("h", i, "in1k_prompts", "acc1_1shot") for i in ("mae", "random")]
    assert one_shot == [57.1, 59.4]
    for task, mae, mae_only, random in (("coco", 57.7, 58.7, 55.7), ("lvis", 50.8, 51.5, 47.1)):
        assert value("h", "mae", task, "box_ap") == mae
        assert value("h", "mae_only", task, "box_ap", "IN1k") == mae_only
        assert value("h", "random", task, "box_ap") == random


def test_the_gain_of_more_mae_images_is_the_documented_one() -> None:
    big = published.series(task="in1k_fine_tune", init="mae_only", data="IG-3B", regime="224")
    small = POINTS[(POINTS["pretrain_data"] == "IN1k") & (POINTS["task"] == "in1k_fine_tune")]
    small = small[(small["regime"] == "224")]
    small = small[small["version"].isin(["mae_readme", "maws_readme_2024"])]
    gain = big.set_index("size")["value"] - small.set_index("size")["value"]
    assert gain.dropna().round(1).to_dict() == {"b": -0.1, "l": 0.2, "h": 0.5, "2b": 0.4}


@pytest.mark.parametrize(
    ("choice", "numbers"),
    [
        ({"task": "in1k_probe", "init": "mae"}, (10.0, 11.4, 11.9)),
        ({"task": "in1k_fine_tune", "init": "mae", "regime": "high"}, (9.0, 9.9, 10.2)),
        ({"task": "in1k_fine_tune", "init": "mae_only", "data": "IG-3B"}, (10.4, 11.7, 12.2)),
    ],
)
def test_a_power_law_overshoots_the_largest_model_as_documented(
    choice: dict[str, str], numbers: tuple[float, float, float]
) -> None:
    """(predicted from the four smaller, observed, value of 2B), in percent."""
    rows = published.series(**choice)  # type: ignore[arg-type]
    x, y = np.log(rows["params"].to_numpy(float)), np.log(rows["error"].to_numpy())
    slope, offset = np.polyfit(x[:4], y[:4], 1)
    found = 100 * np.exp([offset + slope * x[4], y[4], y[3]])
    assert tuple(np.round(found, 1)) == numbers


def test_the_exponent_of_the_probe_breaks_at_the_huge_model() -> None:
    rows = published.series(task="in1k_probe", init="mae")
    slopes = -np.diff(np.log(rows["error"])) / np.diff(np.log(rows["params"]))
    np.testing.assert_allclose(slopes[:2], 0.145, atol=5e-4)
    np.testing.assert_allclose(slopes[2:], 0.04, atol=6e-3)


def test_the_gain_in_fine_tuning_is_the_documented_one() -> None:
    with_mae = published.series(task="in1k_fine_tune", init="mae").set_index("size")
    without = published.series(task="in1k_fine_tune", init="random").set_index("size")
    gain = (with_mae["value"] - without["value"]).dropna().round(1).to_dict()
    assert gain == {"b": 1.5, "l": 0.7, "h": 1.0}
    same = with_mae["resolution"].eq(without["resolution"].reindex(with_mae.index))
    assert same[["b", "l", "h"]].tolist() == [False, True, True]


def test_a_series_is_of_one_text_and_leaves_out_what_is_doubtful() -> None:
    rows = published.series(task="in1k_probe", init="mae")
    assert rows["version"].unique().tolist() == ["maws_readme_2024"]
    assert rows["error"].tolist() == [0.167, 0.139, 0.125, 0.119, 0.114]
    assert rows["params"].is_monotonic_increasing
    wsp_only = published.series(task="in1k_probe", init="random")
    assert wsp_only["value"].tolist() == [85.8]
    doubtful = published.select(task="in1k_probe", init="random", unverified=True)
    assert doubtful["value"].tolist() == [85.8, 87.8]
    older = published.series(task="in1k_fine_tune", init="mae", version="maws_readme_2023")
    assert older["value"].tolist() == [86.4, 88.8, 89.4, 89.7]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"task": "in1k"}, "task 'in1k': none; there are: 'coco'"),
        ({"task": "coco", "metric": "acc1"}, "metric 'acc1': none with task coco; there are:"),
        ({"task": "coco", "init": "dino"}, "there are: 'mae', 'mae_only', 'random'"),
    ],
)
def test_a_choice_that_is_not_there_names_what_is(choice: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as error:
        published.series(**choice)  # type: ignore[arg-type]
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_exported_series_reads_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "maws.csv"
    rows = published.export(path, task="in1k_probe", init="mae")
    back = pd.read_csv(path)
    assert list(back.columns) == list(published.COLUMNS)
    assert back["params"].tolist() == rows["params"].tolist()
    assert back["error"].tolist() == rows["error"].tolist()


def test_the_command_line_lists_writes_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert published.main([]) == 0
    assert "b,l,h,2b,6.5b" in capsys.readouterr().out
    assert published.main(["in1k_probe", "--init", "mae", "--out", str(tmp_path / "a.csv")]) == 0
    assert "5 points (b, l, h, 2b, 6.5b), in1k_probe acc1, init mae" in capsys.readouterr().out
    assert published.main(["in1k_probe", "--init", "random"]) == 0
    assert len(pd.read_csv(io.StringIO(capsys.readouterr().out))) == 1
    assert published.main(["probe"]) == 2
    assert capsys.readouterr().err.startswith("published points: task 'probe': none")


def test_the_figure_draws_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = published.figure()
        files = panels.save(figure, panels.render(figure), tmp_path)
        svg = panels.panel_svg(panels.render(figure)[0], "published-0")
    assert all(file.stat().st_size > 10_000 for file in files)
    assert "var(--mae)" in svg and "var(--random)" in svg
    assert [p.title for p in figure.panels] == [title for *_, title in published.PANELS]
    assert "MAE, then WSP 0.167 at 85.8M" in figure.panels[0].alt
    assert "0.125 at 631M" in figure.panels[0].alt


def test_a_study_is_drawn_beside_the_points_of_the_same_task(tmp_path: Path) -> None:
    rows = [
        ("in1k_probe", "acc1", init, params, seed, value)
        for init, params, value in (
            ("random", 5.5e6, 0.55),
            ("mae", 5.5e6, 0.57),
            ("mae", 2.2e7, np.nan),
        )
        for seed in (0, 1)
    ]
    rows.append(("wsp", "val_loss", "mae", 5.5e6, 0, 3.0))
    results = pd.DataFrame(rows, columns=["task", "metric", "init", "params", "seed", "value"])
    assert published.shared(results) == [("in1k_probe", "acc1")]
    assert published.shared(results[results["task"] == "wsp"]) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = published.figure(results)
        panels.save(figure, panels.render(figure), tmp_path)
    assert "this study" in figure.caption
    assert "this study" not in published.figure().caption


def test_an_overlay_has_each_init_once_for_its_data() -> None:
    found = published.overlay(task="in1k_fine_tune", metric="acc1", regime="224")
    assert [(o.init, o.data, len(o.x)) for o in found] == [
        ("mae_only", "IG-3B", 5),
        ("mae_only", "IN1k", 3),
    ]
    assert published.overlay(task="probe", metric="acc1") == ()
