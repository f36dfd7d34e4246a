"""Fine-tuned on scenes, judged on their variants: a trained encoder beats a random one on each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny

from harness import transfer
from harness.ledger.context import StageContext
from harness.study.protocols import Evaluate, FineTune
from harness.study.recipes import Duration
from harness.study.scene_variants_spec import SHIFTED_CLASSES
from harness.study.scenes_spec import CLASSES
from harness.study.stages import Images, StageFile
from tests.transfer.conftest import MODEL

pytestmark = pytest.mark.long

RECIPE = FineTune(duration=Duration(steps=150), batch=32, lr=1e-3, ema=0.99, ema_warmup=True)
SHIFT = {name: (own,) for name, own in SHIFTED_CLASSES}
NUM_TRAIN = 1000


def right(folder: Path) -> dict[str, float]:
    """Key -> whether the answer is right."""
    table = pyarrow.parquet.read_table(folder / "samples.parquet").to_pydict()
    rows = zip(table["metric"], table["key"], table["value"], strict=True)
    return {key: value for metric, key, value in rows if metric == "acc1"}


def all_sets(encoder: Path, top: Path, root: Path) -> dict[str, dict[str, float]]:
    """Set -> what is right on it, after fine-tuning this encoder once."""

    def stage_of(recipe: FineTune | Evaluate, dataset: str) -> StageFile:
        file = tiny.stage(recipe)
        images = Images(dataset=dataset, fingerprint="", split="train", images=NUM_TRAIN)
        if isinstance(recipe, Evaluate):
            images = images.model_copy(update={"split": "test"})
        update = {"model": MODEL, "images": images, "num_classes": len(CLASSES)}
        execution = file.execution.model_copy(update={"dataset_path": dataset})
        config = file.config.model_copy(update=update)
        return file.model_copy(update={"config": config, "execution": execution})

    def context(name: str) -> StageContext:
        return replace(tiny.context(top / name), root=root)

    tuned = replace(context("fine_tune"), upstream_weights=encoder)
    transfer.run(stage_of(RECIPE, "scenes-100"), tuned)
    found = {"scenes": right(top / "fine_tune")}
    for name in ("scenes_real", "scenes_v2", "scenes_shift"):
        recipe = Evaluate(of="fine_tune", names=SHIFT if name == "scenes_shift" else {})
        own = replace(context(name), upstream={"model": top / "fine_tune"})
        transfer.run(stage_of(recipe, name), own)
        found[name] = right(top / name)
    return found


def test_a_trained_encoder_beats_a_random_one_on_every_set(
    trained_encoder: Path, random_encoder: Path, data_root: Path, tmp_path: Path
) -> None:
    trained = all_sets(trained_encoder, tmp_path / "trained", data_root)
    fresh = all_sets(random_encoder, tmp_path / "random", data_root)
    for name, own in trained.items():
        assert own.keys() == fresh[name].keys()
        gain_M = np.array([own[key] - fresh[name][key] for key in sorted(own)])
        rng = np.random.default_rng(0)
        means = [gain_M[rng.integers(0, len(gain_M), len(gain_M))].mean() for _ in range(1000)]
        low, high = np.quantile(means, (0.025, 0.975))
        assert low > 0, (name, low, high)
