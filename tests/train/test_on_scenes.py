"""mae, wsp and a probe on the built-in images, through the real data room."""

import dataclasses
from pathlib import Path

import pytest
import tiny

from harness import transfer
from harness.errors import PreemptedError
from harness.study.protocols import Features, LinearProbe
from harness.study.recipes import Duration, MaeRecipe, Model, WspRecipe
from harness.study.scenes_spec import CLASSES, HASHTAGS
from harness.study.stages import Images, Recipe, StageFile
from harness.train.loop import train

pytestmark = pytest.mark.slow

DURATION = Duration(steps=24)
MAE = MaeRecipe(duration=DURATION, batch=32, decoder_width=16, decoder_depth=1, decoder_heads=2)
WSP = WspRecipe(duration=DURATION, batch=32)


def stage(recipe: Recipe) -> StageFile:
    file = tiny.stage(recipe)
    split, images, num_classes = {
        "mae": ("pretrain", 500, 0),
        "wsp": ("pretrain", 500, len(HASHTAGS)),
        "features": ("train", 400, 0),
        "linear_probe": ("train", 400, len(CLASSES)),
    }[file.kind]
    config = file.config.model_copy(
        update={
            "model": Model(width=32, depth=2, heads=2, patch=4, image_size=24),
            "images": Images(dataset="scenes", fingerprint="", split=split, images=images),
            "num_classes": num_classes,
        }
    )
    execution = file.execution.model_copy(update={"dataset_path": "scenes-1k", "eval_points": 1})
    return file.model_copy(update={"config": config, "execution": execution})


@pytest.mark.long
def test_the_whole_way_and_a_stop_in_the_middle(tmp_path: Path) -> None:
    def context(name: str, **fields: object) -> tiny.StageContext:
        made = tiny.context(tmp_path / name, **fields)  # type: ignore[arg-type]  # passed on
        return dataclasses.replace(made, root=tmp_path)

    first_rows = tiny.Rows()
    mae = train(stage(MAE), context("mae", metrics=first_rows))
    weights = tmp_path / "mae" / "weights.safetensors"
    straight, resumed = tiny.Rows(), tiny.Rows()
    wsp = train(stage(WSP), context("wsp", upstream=weights, metrics=straight))
    with pytest.raises(PreemptedError):
        stop = tiny.StopAfter(11)
        train(stage(WSP), context("r", upstream=weights, metrics=resumed, should_stop=stop))
    train(stage(WSP), context("r", upstream=weights, metrics=resumed))
    encoder = tmp_path / "wsp" / "weights.safetensors"
    transfer.run(stage(Features()), context("features", upstream=encoder))
    upstream = {"features": tmp_path / "features"}
    probe = transfer.run(
        stage(LinearProbe()), dataclasses.replace(context("probe"), upstream=upstream)
    )
    assert resumed.timeless() == straight.timeless()
    assert mae.metrics["val_loss"] < first_rows.rows[0]["loss"]  # type: ignore[operator]
    assert wsp.metrics["val_loss"] < straight.rows[0]["loss"]  # type: ignore[operator]
    assert wsp.metrics["val_floor"] < wsp.metrics["val_loss"]  # type: ignore[operator]
    assert probe.metrics["acc1"] > 1.2 / len(CLASSES)  # type: ignore[operator]  # above chance
