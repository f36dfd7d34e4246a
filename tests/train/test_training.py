"""The loop: equality with a plain PyTorch loop, rows, files, divergence."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from plain import plain_loop
from safetensors.torch import load_file
from torch import Tensor

from harness.data.dataset import open_dataset
from harness.data.loader import Batch
from harness.errors import DivergedError
from harness.ledger.files import read_json
from harness.study.recipes import Duration, MaeRecipe, WspRecipe
from harness.train import loop
from harness.train.checkpoint import Progress
from harness.train.engine import Engine
from harness.train.loop import _LossReader, train
from harness.train.objectives import WspObjective
from tests.conftest import Harness


def mae_recipe(steps: int = 8, **fields: object) -> MaeRecipe:
    base: dict[str, object] = {
        "duration": Duration(steps=steps),
        "batch": 16,
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
    }
    return MaeRecipe.model_validate(base | fields)


def wsp_recipe(steps: int = 8, **fields: object) -> WspRecipe:
    return WspRecipe.model_validate({"duration": Duration(steps=steps), "batch": 16, **fields})


@pytest.mark.parametrize("micro_batch", [None, 8])
@pytest.mark.parametrize(
    "recipe",
    [
        mae_recipe(),
        mae_recipe(clip=0.5),
        wsp_recipe(),
        wsp_recipe(schedule="wsd", pool="mean", warmup={"samples": 24}),
        wsp_recipe(mixup=0.8, pool="mean_fc_norm"),
    ],
    ids=["mae", "mae-clipped", "wsp", "wsp-wsd-mean", "wsp-mixup-fc-norm"],
)
def test_equals_a_plain_loop(
    recipe: MaeRecipe | WspRecipe, micro_batch: int | None, tmp_path: Path
) -> None:
    rows = tiny.Rows()
    train(tiny.stage(recipe, micro_batch=micro_batch), tiny.context(tmp_path, metrics=rows))
    losses, encoder = plain_loop(recipe, tmp_path)
    assert [row["loss"] for row in rows.rows] == pytest.approx(losses, rel=1e-5)
    tiny.assert_same_to_rounding(load_file(tmp_path / "weights.safetensors"), encoder)


def test_rows_results_and_files_of_mae(tmp_path: Path) -> None:
    rows = tiny.Rows()
    result = train(tiny.stage(mae_recipe(60)), tiny.context(tmp_path, metrics=rows))
    assert [row["step"] for row in rows.rows] == list(range(1, 61))
    last = rows.rows[-1]
    assert last["samples"] == 960
    assert last["flops"] == 1e6
    assert {"wall_s", "loss", "lr", "grad_norm", "val_loss"} <= last.keys()
    assert [row["step"] for row in rows.rows if "val_loss" in row] == [60]
    assert result.metrics == {"loss": last["loss"], "val_loss": last["val_loss"]}
    assert result.steps == 60
    assert result.samples == 960
    assert last["loss"] < rows.rows[0]["loss"]
    # Trained on the mean of 36 patches' worth of noise, so not far below 1, yet below.
    assert 0.5 < result.metrics["val_loss"] < 1.0  # type: ignore[operator]  # is a number
    with np.load(tmp_path / "reconstructions.npz") as pictures:
        assert set(pictures) == {"original", "masked", "reconstructed"}
        arrays = {name: pictures[name] for name in pictures}
    for array in arrays.values():
        assert array.shape == (8, 16, 16, 3)
        assert array.dtype == np.uint8
    split = tiny.opened(tmp_path).split("val")
    first = np.stack([split.decode(row) for row in split.subset(50)[:8]])
    assert np.array_equal(arrays["original"], first)
    kept = (arrays["masked"] == arrays["original"]).all(axis=3).mean()
    assert 0.25 <= kept < 0.3
    same = (arrays["reconstructed"] == arrays["original"]).all(axis=3)
    assert same[(arrays["masked"] == arrays["original"]).all(axis=3)].mean() > 0.95


def test_rows_are_about_fifty_and_wsp_is_evaluated_on_the_way(tmp_path: Path) -> None:
    rows = tiny.Rows()
    stage = tiny.stage(wsp_recipe(130), eval_points=4)
    result = train(stage, tiny.context(tmp_path, metrics=rows))
    assert 50 <= len(rows.rows) <= 70
    assert [row["step"] for row in rows.rows if "val_loss" in row] == [32, 65, 98, 130]
    split = tiny.opened(tmp_path).split("val")
    floor = np.log(np.diff(split.label_offsets)).mean()
    assert result.metrics["val_floor"] == pytest.approx(floor, rel=1e-6)
    assert result.metrics["val_loss"] > floor  # type: ignore[operator]  # is a number
    assert result.metrics["val_loss"] < math.log(tiny.NUM_HASHTAGS)  # type: ignore[operator]
    parts = result.wall_s
    assert parts["total"] == pytest.approx(
        parts["setup"] + parts["train"] + parts["eval"] + parts["checkpoint"]
    )


def test_first_loss_of_wsp_is_ln_of_the_number_of_hashtags(tmp_path: Path) -> None:
    rows = tiny.Rows()
    train(tiny.stage(wsp_recipe(2)), tiny.context(tmp_path, metrics=rows))
    assert rows.rows[0]["loss"] == pytest.approx(math.log(tiny.NUM_HASHTAGS), rel=1e-6)


def test_wsp_starts_from_the_weights_of_mae(tmp_path: Path) -> None:
    train(tiny.stage(mae_recipe(4)), tiny.context(tmp_path / "mae"))
    upstream = tmp_path / "mae" / "weights.safetensors"
    # A learning rate too small to move a float32 weight shows what training began with.
    still = wsp_recipe(1, lr=1e-30, weight_decay=0.0)
    context = tiny.context(tmp_path / "wsp", upstream=upstream)
    train(tiny.stage(still), context)
    before, after = load_file(upstream), load_file(tmp_path / "wsp" / "weights.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_a_diverged_loss_ends_the_stage_and_names_the_step(tmp_path: Path) -> None:
    rows = tiny.Rows()
    stage = tiny.stage(wsp_recipe(20, lr=1e30, warmup=0.0))
    with pytest.raises(DivergedError, match=r"loss became (nan|inf) at step \d+") as error:
        train(stage, tiny.context(tmp_path, metrics=rows))
    assert error.value.step == rows.rows[-1]["step"] + 1
    assert error.value.samples == 16 * error.value.step
    assert all(math.isfinite(row["loss"]) for row in rows.rows)
    assert not (tmp_path / "weights.safetensors").exists()


def fails_with(
    patch: pytest.MonkeyPatch, at: tuple[int, int], spoil: Callable[[Tensor], Tensor]
) -> None:
    """Spoils the loss of the forward pass at (step, place of its first image)."""
    whole = WspObjective.loss

    def loss(self: WspObjective, engine: Engine, batch: Batch, step: int, first: int) -> Tensor:
        found = whole(self, engine, batch, step, first)
        return spoil(found) if (step, first) == at else found

    patch.setattr(WspObjective, "loss", loss)


def test_a_diverged_run_names_the_samples_of_the_pass_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_with(monkeypatch, (3, 8), lambda loss: loss * math.nan)
    with pytest.raises(DivergedError, match="loss became nan at step 4") as error:
        train(tiny.stage(wsp_recipe(), micro_batch=4), tiny.context(tmp_path))
    split = tiny.opened(tmp_path).split("pretrain")
    rows = split.stream(200, 0).at(3 * 16 + 8, 4).rows
    assert error.value.keys == [split.keys[row] for row in rows]


def test_a_gradient_that_is_not_finite_is_found_in_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A root of 0: the loss is what it was, its gradient is infinite.
    fails_with(monkeypatch, (3, 0), lambda loss: loss + (loss - loss.detach()).sqrt())
    with pytest.raises(DivergedError, match=r"gradient norm became (inf|nan) at step 4") as error:
        train(tiny.stage(wsp_recipe()), tiny.context(tmp_path))
    assert error.value.norm is not None and not math.isfinite(error.value.norm)
    assert len(error.value.keys) == 16


def test_a_held_out_loss_that_is_not_finite_is_named_with_step_norm_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WspObjective, "evaluate", lambda self, engine: {"val_loss": math.inf})
    with pytest.raises(DivergedError, match=r"^val_loss became inf at step \d") as error:
        train(tiny.stage(wsp_recipe()), tiny.context(tmp_path))
    assert error.value.norm is not None and 0 < error.value.norm < math.inf
    split = tiny.opened(tmp_path).split("pretrain")
    rows = split.stream(200, 0).at((error.value.step - 1) * 16, 16).rows
    assert error.value.keys == [split.keys[row] for row in rows]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_loss_that_is_read_late_comes_with_the_norm_of_its_own_step(lag: int) -> None:
    """As on CUDA, where a step is read while the next one is under way."""

    class NextStep:
        ranks, rank, micro_batch = 1, 0, 2
        norm = torch.tensor(0.0)

        def norm_on_device(self) -> Tensor:
            return self.norm.clone()

        def total(self, values: Tensor) -> Tensor:
            return values

    engine = NextStep()
    reader = _LossReader(engine, Progress(), 4, lag)  # type: ignore[arg-type]  # all it uses of one
    with pytest.raises(DivergedError, match="loss became nan at step 2") as error:
        for step in range(1, 5):
            engine.norm.fill_(10.0 * step)  # in place, as an optimizer may
            losses = torch.tensor([1.0, math.nan if step == 2 else 1.0])
            reader.put(step, losses, stop=False, save=False)
    assert (error.value.norm, error.value.places) == (20.0, [2, 3])


def test_a_checkpoint_due_at_a_bad_step_names_its_samples_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the queue of losses first."""
    fails_with(monkeypatch, (7, 0), lambda loss: loss * math.nan)

    def late(engine: Engine, progress: Progress, batch: int, lag: int) -> _LossReader:
        return _LossReader(engine, progress, batch, 1)

    monkeypatch.setattr(loop, "_LossReader", late)
    with pytest.raises(DivergedError, match="at step 8") as error:  # the last: a row drains it
        train(tiny.stage(wsp_recipe()), tiny.context(tmp_path))
    assert len(error.value.keys) == 16


STUDY = """\
name: hot
axes: {size: [d16x2], data: [256], init: [random]}
defaults: {dataset: scenes-2k, image_size: 16}
stages:
  wsp: {duration: {steps: 6}, batch: 16, val_images: 16, lr: 1.0e+30, warmup: 0}
resources: {threads: 1}
"""


@pytest.mark.long
def test_the_record_of_a_diverged_attempt_has_step_samples_and_norm(
    harness: Harness, tmp_path: Path
) -> None:
    study = tmp_path / "hot.yaml"
    study.write_text(STUDY)
    harness("grid", study, "--submit", check=1)
    (attempt,) = (tmp_path / "runs").glob("stages/wsp/*/attempts/*/attempt.json")
    row = read_json(attempt)
    assert row and row["end"] == "diverged"
    found = row["diverged"]
    assert 1 <= found["step"] <= 6 and found["samples"] == 16 * found["step"]
    assert found["loss"] in ("nan", "inf") or found["grad_norm"] in ("nan", "inf")
    assert found["grad_norm"] is not None
    data = open_dataset("scenes-2k", tmp_path / "runs").split("pretrain")
    rows = data.stream(256, 0).at(16 * (found["step"] - 1), 16).rows
    assert set(found["keys"]) <= {data.keys[row] for row in rows} and found["keys"]


def test_masks_depend_on_seed_and_step_not_on_the_micro_batch(tmp_path: Path) -> None:
    losses = []
    for micro_batch in (None, 4):
        rows = tiny.Rows()
        stage = tiny.stage(mae_recipe(3), micro_batch=micro_batch)
        train(stage, tiny.context(tmp_path / str(micro_batch), metrics=rows))
        losses.append([row["loss"] for row in rows.rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_head_that_works_in_parts_trains_the_same(tmp_path: Path) -> None:
    losses = []
    for name, head_batch in (("whole", None), ("parts", 5)):
        rows = tiny.Rows()
        stage = tiny.stage(wsp_recipe(), head_batch=head_batch)
        train(stage, tiny.context(tmp_path / name, metrics=rows))
        losses.append([row["loss"] for row in rows.rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
