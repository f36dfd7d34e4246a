"""The transfer protocols on a tiny set: numbers, files, what decides them."""

from pathlib import Path

import pyarrow.parquet
import pytest
import tiny
import torch

from harness.study.protocols import FewShot, FineTune, LinearProbe
from harness.study.recipes import Duration, WspRecipe
from harness.train.loop import train
from harness.transfer.fewshot import choose

FINE_TUNE = FineTune(duration=Duration(steps=30), batch=16, lr=3e-3)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a short wsp run."""
    folder = tmp_path_factory.mktemp("wsp")
    recipe = WspRecipe(duration=Duration(steps=40), batch=32)
    train(tiny.stage(recipe), tiny.context(folder))
    return folder / "weights.safetensors"


def predictions(folder: Path) -> dict[str, list[object]]:
    return pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()


@pytest.mark.parametrize("recipe", [LinearProbe(), LinearProbe(pool="mean"), FINE_TUNE])
def test_accuracy_is_that_of_the_written_predictions(
    recipe: LinearProbe | FineTune, pretrained: Path, tmp_path: Path
) -> None:
    context = tiny.context(tmp_path, upstream=pretrained)
    result = tiny.judge(tiny.stage(recipe), context)
    table = predictions(tmp_path)
    assert list(table) == ["key", "label", "pred"]
    test = tiny.opened(tmp_path).split("test")
    order = test.subset(test.num_samples)
    assert table["key"] == [test.keys[index] for index in order]
    assert table["label"] == test.class_ids[order].tolist()
    right = [a == b for a, b in zip(table["label"], table["pred"], strict=True)]
    assert result.metrics["acc1"] == pytest.approx(sum(right) / len(right))
    assert result.metrics["n_test"] == 120
    assert result.metrics["acc1"] > 0.5  # type: ignore[operator]  # five classes: chance is 0.2


def test_few_shot_reports_mean_and_spread_and_more_shots_do_better(
    pretrained: Path, tmp_path: Path
) -> None:
    recipe = FewShot(shots=(1, 5, 10), splits=5)
    result = tiny.judge(tiny.stage(recipe), tiny.context(tmp_path, upstream=pretrained))
    metrics = result.metrics
    assert set(metrics) == {"n_test", "iterations", "relative_gradient"} | {
        f"acc1_{k}shot{end}" for k in (1, 5, 10) for end in ("", "_std")
    }
    assert metrics["acc1_10shot"] > metrics["acc1_1shot"]  # type: ignore[operator]  # numbers
    table = predictions(tmp_path)
    assert list(table) == ["key", "label", "pred", "split", "shots"]
    by_split = [
        [a == b for a, b, s, k in zip(*columns, strict=True) if s == split and k == 5]
        for columns in [(table["label"], table["pred"], table["split"], table["shots"])]
        for split in range(5)
    ]
    accuracies = torch.tensor([sum(right) / len(right) for right in by_split])
    assert metrics["acc1_5shot"] == pytest.approx(accuracies.mean().item())
    assert metrics["acc1_5shot_std"] == pytest.approx(accuracies.std().item(), abs=1e-6)


def test_one_split_has_no_spread(pretrained: Path, tmp_path: Path) -> None:
    recipe = FewShot(shots=(2,), splits=1)
    result = tiny.judge(tiny.stage(recipe), tiny.context(tmp_path, upstream=pretrained))
    assert result.metrics["acc1_2shot_std"] is None


def test_shots_are_at_most_k_of_each_class_nested_and_fixed_by_the_split() -> None:
    class_M = torch.tensor([0] * 12 + [1] * 3 + [2] * 40)
    ten = choose(class_M, 10, split=0)
    assert torch.bincount(class_M[ten]).tolist() == [10, 3, 10]
    assert set(choose(class_M, 1, split=0).tolist()) < set(ten.tolist())
    assert torch.equal(ten, choose(class_M, 10, split=0))
    assert not torch.equal(ten, choose(class_M, 10, split=1))


def test_a_probe_without_upstream_judges_the_initial_weights_of_its_seed(tmp_path: Path) -> None:
    def accuracy(name: str, seed: int) -> list[object]:
        stage = tiny.stage(LinearProbe(penalties=(1e-2,)), seed=seed)
        tiny.judge(stage, tiny.context(tmp_path / name))
        return predictions(tmp_path / name)["pred"]

    assert accuracy("a", 0) == accuracy("b", 0)
    assert accuracy("a", 0) != accuracy("c", 1)


def test_the_test_split_is_looked_at_once_in_fine_tuning(pretrained: Path, tmp_path: Path) -> None:
    rows = tiny.Rows()
    context = tiny.context(tmp_path, upstream=pretrained, metrics=rows)
    tiny.judge(tiny.stage(FINE_TUNE), context)
    assert [row["step"] for row in rows.rows if "acc1" in row] == [30]


def test_train_images_limits_the_labelled_images(pretrained: Path, tmp_path: Path) -> None:
    # The study turns `train_images` into the number of images of the stage.
    recipe = LinearProbe(penalties=(1e-2,))
    results = []
    for images in (3, 200):  # three images show three of the five classes at most
        context = tiny.context(tmp_path / str(images), upstream=pretrained)
        results.append(tiny.judge(tiny.stage(recipe, images=images), context))
    assert results[0].metrics["acc1"] < results[1].metrics["acc1"]  # type: ignore[operator]
