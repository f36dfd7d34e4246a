"""A fine-tuned model on further sets: the rules, the matching of classes, the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny
import torch

from harness import transfer
from harness.data.dataset import open_dataset
from harness.data.index import build_index, shard_entry, write_index
from harness.data.shards import Sample, list_shard, write_shard
from harness.errors import DataError, UserError
from harness.ledger.context import StageContext, StageResult
from harness.ledger.files import write_json
from harness.models.classifiers import read_classifier
from harness.models.pixels import standardise
from harness.study.datasets import DatasetMeta
from harness.study.protocols import Evaluate, FineTune
from harness.study.recipes import Duration
from harness.transfer.evaluate import right_answers

FINE_TUNE = FineTune(duration=Duration(steps=40), batch=32, lr=3e-3)


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a fine-tuning stage on the tiny set."""
    folder = tmp_path_factory.mktemp("fine_tune")
    transfer.run(tiny.stage(FINE_TUNE), tiny.context(folder))
    return folder


def packed(folder: Path, classes: Sequence[str], answers: Sequence[Sequence[int]]) -> str:
    """The tiny set's test images with other answers: several an image, or none."""
    own = tiny.opened(folder / "cache").split("test")

    def samples() -> Iterator[Sample]:
        for row, places in enumerate(answers):
            fields = {"classes": list(places)}
            raw = own.read(row)
            yield Sample(key=f"x-{row:04d}", image=raw, image_type="png", fields=fields)

    top = folder / "packed"
    path = top / "test" / "000000.tar"
    write_shard(path, samples())
    listed = list_shard(path)
    shards = {"test": [shard_entry(path, top, len(listed))]}
    index = build_index([listed], shards["test"], [], classes)
    meta = DatasetMeta(
        name="further",
        fingerprint="further",
        image_size=tiny.SIZE,
        classes=list(classes),
        splits={"test": len(answers)},
        shards=shards,
        indexes={"test": write_index(top, "test", index, shards)},
    )
    write_json(top / "dataset.json", meta.model_dump(mode="json", by_alias=True))
    return str(top)


def run(recipe: Evaluate, dataset: str, model: Path, folder: Path, **context: int) -> StageResult:
    file = tiny.stage(recipe)
    images = file.config.images.model_copy(update={"split": "test"})
    config = file.config.model_copy(update={"images": images})
    execution = file.execution.model_copy(update={"dataset_path": dataset})
    file = file.model_copy(update={"config": config, "execution": execution})
    surroundings: StageContext = tiny.context(folder, **context)  # type: ignore[arg-type]
    return transfer.run(file, replace(surroundings, upstream={"model": model}))


def logits_of(model: Path, dataset: str, root: Path) -> np.ndarray:
    """By hand: every image through the model, in the order of the rows."""
    split = open_dataset(dataset, root).split("test")
    judge = read_classifier(model)
    images = np.stack([split.decode(row) for row in range(split.num_samples)])
    with torch.no_grad():
        batch = torch.from_numpy(images).permute(0, 3, 1, 2)
        return judge.model(standardise(batch)).numpy()


def test_on_its_own_test_split_the_accuracy_is_that_of_fine_tuning(
    fine_tuned: Path, tmp_path: Path
) -> None:
    result = run(Evaluate(of="x"), str(tiny.folder()), fine_tuned, tmp_path)
    before = pyarrow.parquet.read_table(fine_tuned / "predictions.parquet").to_pydict()
    after = pyarrow.parquet.read_table(tmp_path / "predictions.parquet").to_pydict()
    assert dict(zip(before["key"], before["pred"], strict=True)) == dict(
        zip(after["key"], after["pred"], strict=True)
    )
    right = [a == b for a, b in zip(before["label"], before["pred"], strict=True)]
    assert result.metrics["acc1"] == pytest.approx(np.mean(right))
    assert result.metrics["n_test"] == 120 and result.metrics["n_left_out"] == 0


def test_any_of_several_classes_is_right_and_images_without_one_are_left_out(
    fine_tuned: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    answers = [sorted(rng.choice(5, rng.integers(0, 4), replace=False).tolist()) for _ in range(80)]
    dataset = packed(tmp_path, tiny.CLASSES, answers)
    result = run(Evaluate(of="x"), dataset, fine_tuned, tmp_path / "stage")
    pred = logits_of(fine_tuned, dataset, tmp_path).argmax(axis=1)
    right = [int(p) in own for p, own in zip(pred, answers, strict=True) if own]
    assert result.metrics["acc1"] == pytest.approx(np.mean(right))
    assert result.metrics["n_test"] == len(right)
    assert result.metrics["n_left_out"] == 80 - len(right) > 0
    table = pyarrow.parquet.read_table(tmp_path / "stage" / "samples.parquet").to_pydict()
    by_key = dict(zip(table["key"], table["value"], strict=True))
    assert [by_key[f"x-{i:04d}"] for i, own in enumerate(answers) if own] == right


def test_a_class_may_stand_for_several_of_the_models(fine_tuned: Path, tmp_path: Path) -> None:
    names = {"vowel": ("a", "e"), "other": ("b",)}
    answers = [[place % 2] for place in range(60)]
    dataset = packed(tmp_path, ["vowel", "other"], answers)
    logits = logits_of(fine_tuned, dataset, tmp_path)
    rights = ({0, 4}, {1})
    for among, allowed in (("all", range(5)), ("present", (0, 1, 4))):
        recipe = Evaluate(of="x", names=names, among=among)  # type: ignore[arg-type]
        result = run(recipe, dataset, fine_tuned, tmp_path / among)
        best = [max(allowed, key=lambda q, own=own: own[q]) for own in logits]
        right = [p in rights[own[0]] for p, own in zip(best, answers, strict=True)]
        assert result.metrics["acc1"] == pytest.approx(np.mean(right))


def test_a_class_that_the_model_does_not_know_is_named(fine_tuned: Path, tmp_path: Path) -> None:
    dataset = packed(tmp_path, ["a", "zebra", "unused"], [[0], [1]])
    with pytest.raises(UserError, match=r"its class 'zebra' is none of the fine-tuned model's"):
        run(Evaluate(of="x"), dataset, fine_tuned, tmp_path / "stage")
    # A class that no image has needs no counterpart: ReaL's list has all 1000, whatever occurs.
    data = open_dataset(dataset, tmp_path)
    split, rows = data.split("test"), np.array([0])
    assert right_answers(data, split, rows, tiny.CLASSES, {}) == [frozenset({0})]


def test_ranks_share_the_images(fine_tuned: Path, tmp_path: Path) -> None:
    """Rank 1 has nothing to do with so few images: both must end, and rank 0 alone writes."""
    alone = run(Evaluate(of="x"), str(tiny.folder()), fine_tuned, tmp_path / "one")
    shared = run(Evaluate(of="x"), str(tiny.folder()), fine_tuned, tmp_path / "two", ranks=2)
    other = run(Evaluate(of="x"), str(tiny.folder()), fine_tuned, tmp_path / "two", rank=1, ranks=2)
    assert alone.metrics == shared.metrics == other.metrics


def test_the_saved_model_says_what_its_outputs_mean(fine_tuned: Path) -> None:
    judge = read_classifier(fine_tuned)
    assert judge.classes == tiny.CLASSES and judge.shape == tiny.MODEL


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_model_that_cannot_be_read_is_an_error_of_one_line(
    content: bytes | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"model.safetensors: not a fine-tuned model") as error:
        read_classifier(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_of_names_is_read_and_checked(tmp_path: Path) -> None:
    meta = DatasetMeta(
        name="m", fingerprint="m", image_size=8, classes=["donut"], splits={"test": 1}
    )
    (tmp_path / "names.json").write_text(json.dumps({"donut": ["ring", "circle"]}))
    recipe = Evaluate(of="x", names="names.json").resolved([tmp_path], meta)
    assert recipe.names == {"donut": ("ring", "circle")}
    (tmp_path / "names.json").write_text(json.dumps({"donuts": "ring"}))
    with pytest.raises(UserError, match=r"m has no class 'donuts'; did you mean 'donut'\?"):
        Evaluate(of="x", names="names.json").resolved([tmp_path], meta)
