"""The moving average of the weights: timm's, whatever the ranks, judged and saved when on."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from timm.utils.model_ema import ModelEmaV3

from harness.errors import UserError
from harness.study.protocols import FineTune
from harness.study.recipes import Duration
from harness.train import ema
from harness.train.build import build_engine
from harness.train.ema import Average
from harness.train.engine import Engine
from harness.transfer.finetune import FineTuneObjective

RECIPE = FineTune(duration=Duration(steps=6), batch=16, ema=0.8)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_decay_and_the_average_are_timms(warmup: bool) -> None:
    model = torch.nn.Linear(5, 3)
    timms = ModelEmaV3(model, decay=0.9, use_warmup=warmup)
    ours = Average(0.9, warmup)
    generator = torch.Generator().manual_seed(0)
    for update in range(1, 60):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape, generator=generator))
        timms.update(model, step=update)
        ours.update([param.data for param in model.parameters()])
        assert ours.decay_at(update) == pytest.approx(timms.get_decay(update), abs=0)
    for flat, param in zip(ours.flats, timms.module.parameters(), strict=True):
        assert torch.equal(flat, param.data)


def test_a_short_warm_up_is_below_the_final_decay() -> None:
    average = Average(0.9999, warmup=True)
    assert average.decay_at(2) < average.decay_at(100) < 0.96 < Average(0.9999, False).decay_at(100)


def engine_of(tmp_path: Path, recipe: FineTune = RECIPE, **execution: object) -> Engine:
    stage = tiny.stage(recipe, **execution)
    data = tiny.opened(tmp_path)
    objective = FineTuneObjective(stage.config, tiny.context(tmp_path), data)
    return build_engine(objective.blueprint(), recipe, stage.execution, rank=0, ranks=1)


def steps(engine: Engine, num: int, average: dict[str, torch.Tensor]) -> None:
    """Steps on noise, and a plain average of the whole weights beside them."""
    for step in range(num):
        for part in range(engine.accumulation):
            generator = torch.Generator().manual_seed(100 * step + part)
            images = torch.randn(engine.micro_batch, 3, 16, 16, generator=generator)
            engine.set_lr(1e-2)
            logits = engine.forward(images)
            engine.backward(logits.square().mean() + logits[:, 0].mean())
            engine.step()
        for name, value in engine.tensors():
            average[name] = average[name].lerp(value, 0.2) if name in average else value


def test_sharded_weights_have_the_average_of_a_plain_loop_and_come_back(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, micro_batch=8)
    plain: dict[str, torch.Tensor] = {}
    steps(engine, 5, plain)
    before = dict(engine.tensors())
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    with engine.evaluating():
        logits = engine.forward(images)
        with engine.averaged():
            averaged, of_average = dict(engine.tensors()), engine.forward(images)
        assert torch.equal(engine.forward(images), logits)
    assert not torch.equal(of_average, logits)
    for name, value in plain.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-6, atol=1e-8)
    for name, value in engine.tensors():
        assert torch.equal(value, before[name]), name
    # The forward pass used the average too, not only what is exported.
    engine.close()
    model = FineTuneObjective(
        tiny.stage(RECIPE).config, tiny.context(tmp_path), tiny.opened(tmp_path)
    )
    whole, _ = model.blueprint().whole()
    whole.load_state_dict(averaged, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(whole.eval()(images), of_average)


def test_a_share_is_read_as_it_was_written(tmp_path: Path) -> None:
    average = Average(0.9, warmup=False)
    for _ in range(3):
        average.update([torch.randn(7), torch.randn(12)])
    average.save(ema.file_of(tmp_path, 0))
    flats, updates = ema.read(ema.file_of(tmp_path, 0))
    assert updates == 3
    assert all(torch.equal(a, b) for a, b in zip(flats, average.flats, strict=True))


def test_an_average_needs_stage_3(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    with pytest.raises(UserError, match="needs ZeRO stage 3"):
        engine_of(tmp_path, zero_config=str(path))


def test_the_saved_model_is_the_average(tmp_path: Path) -> None:
    from harness import transfer

    for name, recipe in (("plain", RECIPE.model_copy(update={"ema": None})), ("ema", RECIPE)):
        transfer.run(tiny.stage(recipe), tiny.context(tmp_path / name))
    plain, averaged = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "ema"))
    assert not torch.equal(plain["head.weight"], averaged["head.weight"])
    # Zero at first and grown since: the average lags behind.
    assert averaged["head.weight"].norm() < plain["head.weight"].norm()
