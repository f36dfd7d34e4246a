"""Prompt tuning as a protocol: against a plain loop, stopped, shared out, judged."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score

from harness import transfer
from harness.data import loader
from harness.errors import OutOfMemoryError, PreemptedError
from harness.ledger.context import StageResult
from harness.models.init import generator_of, initialize
from harness.models.pixels import standardise
from harness.models.prompts import PromptedClassifier
from harness.models.vit import VisionEncoder
from harness.study.protocols import FewShot, PromptTuning
from harness.transfer import prompt_tuning
from harness.transfer.fewshot import choose

RECIPE = PromptTuning(shots=(1, 5), splits=2, prompts=3, epochs=8, warmup_epochs=2, batch=16)


def run(
    folder: Path, recipe: PromptTuning = RECIPE, micro_batch: int | None = None, **options: Any
) -> StageResult:
    stage = tiny.stage(recipe, micro_batch=micro_batch)
    return transfer.run(stage, tiny.context(folder, **options))


def learned(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "prompts" / f"{name}.safetensors")


def content(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("prompts/*"), *folder.glob("predicted/*")]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageResult]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def model_of(shots: int, number: int) -> PromptedClassifier:
    """The model that a run begins with."""
    encoder = VisionEncoder(tiny.MODEL)
    initialize(encoder, 0)
    generator = generator_of(0, "prompt_tuning", shots, number)
    return PromptedClassifier(encoder, 3, tiny.NUM_CLASSES, "cls", generator)


def by_hand(
    root: Path, shots: int, number: int, optimizer: str, lr: float
) -> dict[str, torch.Tensor]:
    """Prompts and head after a plain loop over the images, whole batches at once."""
    split = tiny.opened(root).split("train")
    rows = split.subset(200)
    rows = rows[choose(torch.tensor(split.class_ids[rows]).long(), shots, number).numpy()]
    model = model_of(shots, number)
    params = [model.prompts, model.head.weight, model.head.bias]
    make = {
        "adamw": lambda: torch.optim.AdamW(params, weight_decay=0.01),
        "sgd": lambda: torch.optim.SGD(params, 1.0, momentum=0.9, weight_decay=0.01),
    }
    trainer = make[optimizer]()
    orders = [
        torch.randperm(len(rows), generator=generator_of(0, "prompts", shots, number, epoch))
        for epoch in range(8)
    ]
    seen = 0
    for chosen in torch.cat(orders).split(min(16, len(rows))):
        if len(chosen) < min(16, len(rows)):
            break
        epoch = seen / len(rows)
        share = epoch / 2 if epoch < 2 else (1 + math.cos(math.pi * (epoch - 2) / 6)) / 2
        trainer.param_groups[0]["lr"] = lr * share
        trainer.zero_grad()
        pixels = [torch.tensor(split.decode(row)) for row in rows[chosen.numpy()]]
        images = standardise(torch.stack(pixels).permute(0, 3, 1, 2))
        classes = torch.tensor(split.class_ids[rows[chosen.numpy()]]).long()
        torch.nn.functional.cross_entropy(model(images), classes).backward()
        trainer.step()
        seen += len(chosen)
    return model.learned()


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.01), ("sgd", 1.0)])
def test_training_is_that_of_a_plain_loop(tmp_path: Path, optimizer: str, lr: float) -> None:
    recipe = RECIPE.model_copy(update={"optimizer": optimizer, "lr": lr})
    run(tmp_path, recipe, micro_batch=5)  # forward passes of 5, 5, 5 and 1 images
    for shots, number in ((1, 0), (5, 1)):
        found = learned(tmp_path, f"{shots}shot-{number}")
        wanted = by_hand(tmp_path, shots, number, optimizer, lr)
        assert found.keys() == wanted.keys()
        start = model_of(shots, number).learned()
        for name, value in found.items():
            moved = (wanted[name] - start[name]).abs().mean()
            # AdamW makes steps of rounding where a gradient is nearly zero.
            assert moved > 1e-3
            assert (value - wanted[name]).abs().mean() < 1e-3 * moved, name


def test_numbers_are_those_of_the_predictions(finished: tuple[Path, StageResult]) -> None:
    folder, result = finished
    assert set(result.metrics) == {
        "n_test",
        *(f"acc1_{k}shot{end}" for k in (1, 5) for end in ("", "_std")),
    }
    table = pd.read_parquet(folder / "predictions.parquet")
    samples = pd.read_parquet(folder / "samples.parquet")
    assert len(table) == 4 * 120
    for shots, rows in table.groupby("shots"):
        accuracies = [accuracy_score(g["label"], g["pred"]) for _, g in rows.groupby("split")]
        name = f"acc1_{shots}shot"
        assert result.metrics[name] == pytest.approx(np.mean(accuracies), abs=1e-12)
        assert result.metrics[f"{name}_std"] == pytest.approx(np.std(accuracies, ddof=1))
        values = samples[samples["metric"] == name]
        assert values["value"].mean() == pytest.approx(result.metrics[name], abs=1e-12)
        share_right = (rows["label"] == rows["pred"]).groupby(rows["key"]).mean()
        assert values.set_index("key")["value"].to_dict() == share_right.to_dict()


def test_it_sees_the_images_of_few_shot_and_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    read = loader.eval_batches

    def watch(split: Any, rows: np.ndarray, **options: Any) -> Any:
        seen.append(rows)
        return read(split, rows, **options)

    monkeypatch.setattr(loader, "eval_batches", watch)
    run(tmp_path / "prompts")
    split = tiny.opened(tmp_path).split("train")
    order = split.subset(200)
    class_M = torch.tensor(split.class_ids[order]).long()
    wanted = [order[choose(class_M, k, s).numpy()] for k in (1, 5) for s in (0, 1)]
    assert [sorted(set(rows.tolist())) for rows in seen[:4]] == [sorted(w.tolist()) for w in wanted]
    assert [rows.tolist() for rows in seen[4:]] == [
        tiny.opened(tmp_path).split("test").subset(120).tolist()
    ]
    context = tiny.context(tmp_path / "few")
    tiny.judge(tiny.stage(FewShot(shots=(1, 5), splits=2)), context)
    keys = [
        pd.read_parquet(tmp_path / n / "predictions.parquet")["key"] for n in ("prompts", "few")
    ]
    assert list(keys[0]) == list(keys[1])


def test_the_encoder_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[VisionEncoder] = []
    build = prompt_tuning.frozen_encoder

    def watch(*arguments: Any) -> VisionEncoder:
        made.append(build(*arguments))
        return made[-1]

    monkeypatch.setattr(prompt_tuning, "frozen_encoder", watch)
    run(tmp_path)
    fresh = VisionEncoder(tiny.MODEL)
    initialize(fresh, 0)
    (used,) = made
    assert all(torch.equal(value, used.state_dict()[k]) for k, value in fresh.state_dict().items())
    assert all(param.grad is None for param in used.parameters())


def test_a_stopped_one_keeps_the_splits_it_has(
    tmp_path: Path, finished: tuple[Path, StageResult]
) -> None:
    wanted, attempts = content(finished[0]), 0
    assert len(wanted) == 5
    kept: list[int] = []
    while True:
        attempts += 1
        try:
            result = run(tmp_path, should_stop=tiny.StopAfter(20))
            break
        except PreemptedError:
            kept.append(len(content(tmp_path)))
            assert content(tmp_path).items() <= wanted.items()
    assert attempts > 2 and kept == sorted(kept) and kept[0] < 5
    assert content(tmp_path) == wanted
    assert result.metrics == finished[1].metrics


def test_two_ranks_leave_the_bytes_of_one(
    tmp_path: Path, finished: tuple[Path, StageResult]
) -> None:
    # One after the other, as they exchange nothing but files: rank 1 is stopped while it waits.
    with pytest.raises(PreemptedError):
        run(tmp_path, rank=1, ranks=2, should_stop=tiny.StopAfter(26))
    assert sorted(content(tmp_path)) == ["1shot-1.safetensors", "5shot-1.safetensors"]
    result = run(tmp_path, rank=0, ranks=2)
    assert content(tmp_path) == content(finished[0])
    assert result.metrics == finished[1].metrics


def test_where_memory_ends_a_smaller_forward_pass_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PromptedClassifier.forward

    def limited(self: PromptedClassifier, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 4 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no memory for so many images")
        return forward(self, images)

    monkeypatch.setattr(PromptedClassifier, "forward", limited)
    tried: list[int | None] = [16]
    while True:
        try:
            result = run(tmp_path, micro_batch=tried[-1])
            break
        except OutOfMemoryError as error:
            tried.append(error.smaller)
    assert tried == [16, 8, 4]
    assert result.metrics["acc1_5shot"] is not None


def test_a_change_of_prompts_seed_or_split_changes_what_is_learned(tmp_path: Path) -> None:
    first = learned_prompts(tmp_path / "a", 0)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], learned_prompts(tmp_path / "b", 1)[0])


def learned_prompts(folder: Path, seed: int) -> list[torch.Tensor]:
    transfer.run(tiny.stage(RECIPE, seed=seed), tiny.context(folder))
    return [learned(folder, f"5shot-{number}")["prompts"] for number in range(2)]
