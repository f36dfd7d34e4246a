"""Encoders that tasks are tried on: one that has learned something, one that has not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from harness.models.init import initialize
from harness.models.vit import VisionEncoder
from harness.models.weights import save_encoder
from harness.study.recipes import Duration, Model, WspRecipe
from harness.study.scenes_spec import HASHTAGS
from harness.study.stages import Images
from harness.train.loop import train

MODEL = Model(width=64, depth=4, heads=4, patch=4, image_size=32)
PRETRAIN_IMAGES = 16_000


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root below which built-in sets are drawn once for all tests."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="session")
def trained_encoder(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """weights.safetensors of a d64x4 trained on hashtags of scenes for a minute or two."""
    recipe = WspRecipe(duration=Duration(steps=400), batch=64, lr=2e-3, val_images=200)
    file = tiny.stage(recipe)
    images = Images(dataset="scenes", fingerprint="", split="pretrain", images=PRETRAIN_IMAGES)
    update = {"model": MODEL, "images": images, "num_classes": len(HASHTAGS)}
    config = file.config.model_copy(update=update)
    where = {"dataset_path": f"scenes-{PRETRAIN_IMAGES}", "eval_points": 1}
    execution = file.execution.model_copy(update=where)
    folder = tmp_path_factory.mktemp("trained")
    context = replace(tiny.context(folder), root=data_root)
    train(file.model_copy(update={"config": config, "execution": execution}), context)
    return folder / "weights.safetensors"


@pytest.fixture(scope="session")
def random_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights.safetensors of the same encoder as it was before training."""
    encoder = VisionEncoder(MODEL)
    initialize(encoder, 0)
    path = tmp_path_factory.mktemp("random") / "weights.safetensors"
    save_encoder(path, encoder.state_dict(), MODEL)
    return path
