"""A run that was stopped or killed and resumed is the undisturbed run, to the last bit."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import numpy as np
import pytest
import tiny
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file

from harness.data.loader import eval_batches
from harness.errors import LeaseLostError, PreemptedError, UserError
from harness.models.mae import Mae
from harness.study.protocols import FineTune
from harness.study.recipes import Duration, MaeRecipe, Optimization, WspRecipe
from harness.train import checkpoint
from harness.train.checkpoint import Progress
from harness.train.engine import Engine, checkpoint_blocks
from harness.train.loop import train
from harness.train.objectives import OBJECTIVES
from harness.train.reshard import shares

MAE = MaeRecipe(
    duration=Duration(steps=12), batch=16, decoder_width=16, decoder_depth=1, decoder_heads=2
)
WSP = WspRecipe(duration=Duration(steps=12), batch=16, drop_path=0.3)


def run(
    recipe: Optimization, folder: Path, rows: tiny.Rows, stop: int = 10**9, **execution: object
) -> None:
    context = tiny.context(folder, metrics=rows, should_stop=tiny.StopAfter(stop))
    assert isinstance(recipe, MaeRecipe | WspRecipe | FineTune)
    train(tiny.stage(recipe, **execution), context)


def same_weights(left: Path, right: Path) -> None:
    one, other = load_file(left / "weights.safetensors"), load_file(right / "weights.safetensors")
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("recipe", [MAE, WSP], ids=["mae", "wsp"])
def test_stopped_and_resumed_equals_undisturbed(recipe: Optimization, tmp_path: Path) -> None:
    straight, resumed = tiny.Rows(), tiny.Rows()
    run(recipe, tmp_path / "straight", straight, micro_batch=8)
    with pytest.raises(PreemptedError, match="checkpoint saved at step 5"):
        run(recipe, tmp_path / "resumed", resumed, stop=5, micro_batch=8)
    assert [row["step"] for row in resumed.rows] == [1, 2, 3, 4, 5]
    run(recipe, tmp_path / "resumed", resumed, micro_batch=8)
    assert resumed.timeless() == straight.timeless()
    same_weights(tmp_path / "straight", tmp_path / "resumed")


def test_rows_are_on_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that goes down between the two would leave a curve with a gap."""
    rows, seen, save = tiny.Rows(), [], checkpoint.save

    def save_and_look(*given: Any) -> Path:
        seen.append((rows.synced, len(rows.rows)))
        return save(*given)

    monkeypatch.setattr(checkpoint, "save", save_and_look)
    with pytest.raises(PreemptedError):
        run(WSP, tmp_path, rows, stop=5)
    assert seen == [(5, 5)]


@pytest.mark.parametrize("stage", [0, 1])
def test_lower_zero_stages_resume_exactly_too(stage: int, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    straight, resumed = tiny.Rows(), tiny.Rows()
    run(WSP, tmp_path / "straight", straight, zero_config=str(path))
    with pytest.raises(PreemptedError):
        run(WSP, tmp_path / "resumed", resumed, stop=5, zero_config=str(path))
    run(WSP, tmp_path / "resumed", resumed, zero_config=str(path))
    assert resumed.timeless() == straight.timeless()
    same_weights(tmp_path / "straight", tmp_path / "resumed")


def test_rows_between_intervals_survive_the_stop(tmp_path: Path) -> None:
    """Rows average over several steps here, and the stop falls between two of them."""
    long = WSP.model_copy(update={"duration": Duration(steps=150)})
    straight, resumed = tiny.Rows(), tiny.Rows()
    run(long, tmp_path / "straight", straight, eval_points=2)
    with pytest.raises(PreemptedError):
        run(long, tmp_path / "resumed", resumed, stop=100, eval_points=2)
    assert resumed.rows[-1]["step"] == 99
    run(long, tmp_path / "resumed", resumed, eval_points=2)
    assert resumed.timeless() == straight.timeless()


def test_killed_after_a_checkpoint_the_rows_are_written_again_identically(tmp_path: Path) -> None:
    straight = tiny.Rows()
    run(WSP, tmp_path / "straight", straight)
    killed = tiny.Rows(broken_at=8)
    with pytest.raises(ConnectionError):
        run(WSP, tmp_path / "killed", killed, checkpoint_every_s=0.0)
    # Only the checkpoint of step 7 is left; torn ones beside it must not matter.
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_7"]
    (checkpoints / "step_9.partial").mkdir()
    (checkpoints / "step_8").mkdir()
    # Rows that the killed attempt wrote after its checkpoint are dropped first.
    killed.rows.append({"step": 8, "samples": 1, "loss": -1.0})
    killed.broken_at = None
    run(WSP, tmp_path / "killed", killed)
    assert killed.timeless() == straight.timeless()
    same_weights(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize("stopped_at", [1, 2, 3])
def test_stopped_while_it_removes_files_a_process_touches_none_of_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    folder, remove, calls = tmp_path / "checkpoints", shutil.rmtree, 0
    for name in ("step_3", "step_5", "step_4.partial-0"):
        (folder / name).mkdir(parents=True)
    theirs = ("step_5/of the successor", "step_5/COMPLETE", "step_6.partial-1/of the successor")

    def stopped(path: Path, **about: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stopped_at:
            remove(folder)
            for name in theirs:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
        remove(path, **about)

    def guard() -> None:
        if calls >= stopped_at:
            raise LeaseLostError("another process owns the stage")

    about = {"rank": 0, "ranks": 1, "device": "cpu", "barrier": lambda: None}
    engine = SimpleNamespace(**about, save=lambda path: None, total=lambda value: value)
    monkeypatch.setattr(shutil, "rmtree", stopped)
    with contextlib.suppress(LeaseLostError):  # the last thing it removes is the last it does
        checkpoint.save(tmp_path, engine, Progress(step=5), guard)  # type: ignore[arg-type]
    assert calls >= stopped_at
    assert {str(p.relative_to(folder)) for p in folder.glob("*/*")} == set(theirs)


def test_only_a_complete_checkpoint_counts(tmp_path: Path) -> None:
    with pytest.raises(PreemptedError):
        run(WSP, tmp_path, tiny.Rows(), stop=3)
    found = checkpoint.latest(tmp_path)
    assert found == tmp_path / "checkpoints" / "step_3"
    (found / "COMPLETE").unlink()
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize(("wrote", "reads"), [(1, 1), (1, 3), (3, 1)])
def test_only_zero_3_goes_on_with_other_ranks_and_that_is_said(
    wrote: int, reads: int, tmp_path: Path
) -> None:
    for stage in (1, 3):
        config = {"zero_optimization": {"stage": stage}}
        (tmp_path / f"{stage}.json").write_text(json.dumps(config))
    with pytest.raises(PreemptedError):
        run(WSP, tmp_path, tiny.Rows(), stop=3, zero_config=str(tmp_path / f"{wrote}.json"))
    progress = tmp_path / "checkpoints" / "step_3" / "progress.json"
    content = json.loads(progress.read_text())
    progress.write_text(json.dumps(content | {"ranks": 2}))
    folder = progress.parent / "deepspeed"
    for file in folder.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        shutil.copy(file, folder / file.name.replace("rank_0_mp", "rank_1_mp"))
    with pytest.raises(UserError, match="resume with") as error:
        run(WSP, tmp_path, tiny.Rows(), zero_config=str(tmp_path / f"{reads}.json"))
    assert len(error.value.problems) == 1 and "2" in error.value.problems[0]


def test_a_checkpoint_runs_no_code_when_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("this line must never be printed",))

    with pytest.raises(PreemptedError):
        run(WSP, tmp_path, tiny.Rows(), stop=3)
    states = next((tmp_path / "checkpoints").rglob("*model_states.pt"))
    torch.save({"module": Bomb()}, states)
    with pytest.raises(UserError) as caught:
        run(WSP, tmp_path, tiny.Rows())
    assert str(caught.value).startswith(f"{states}: refused, it holds more than tensors and plain")
    assert "\n" not in str(caught.value) and "print" in str(caught.value)
    assert "never be printed" not in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shares_put_together_are_the_whole(ranks: int) -> None:
    whole = torch.arange(11.0)
    cut = [shares(whole, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in cut}) == 1
    assert torch.equal(torch.cat(cut)[:11], whole) and torch.cat(cut)[11:].eq(0).all()


def test_the_export_is_what_deepspeeds_own_tool_finds_in_the_checkpoint(tmp_path: Path) -> None:
    """Weights of weights.safetensors, gathered by name, against zero_to_fp32 on the same step."""
    stage = tiny.stage(WSP)
    context = tiny.context(tmp_path, should_stop=tiny.StopAfter(5))
    objective = OBJECTIVES["wsp"](stage.config, context, tiny.opened(tmp_path))
    model, groups = objective.blueprint().whole()
    engine = Engine(model, groups, WSP, stage.execution, rank=0, ranks=1)
    split = tiny.opened(tmp_path).split("pretrain")
    for step in range(3):
        batch = next(eval_batches(split, np.arange(16), batch=16, image_size=16))
        engine.set_lr(1e-2)
        engine.backward(objective.loss(engine, batch, step, 0))
        engine.step()
    engine.save(tmp_path)
    exported = dict(engine.tensors())
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="deepspeed")
    live = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            live[name] = param.detach().clone()
    engine.close()
    assert exported.keys() == found.keys() == live.keys()
    for name, value in exported.items():
        assert torch.equal(value, found[name]) and torch.equal(value, live[name]), name


@pytest.mark.parametrize("recipe", [MAE, WSP], ids=["mae", "wsp"])
def test_activation_checkpointing_changes_no_bit_drop_path_included(
    recipe: Optimization, tmp_path: Path
) -> None:
    rows = {"without": tiny.Rows(), "with": tiny.Rows()}
    for name, found in rows.items():
        run(recipe, tmp_path / name, found, activation_checkpointing=name == "with")
    assert rows["with"].timeless() == rows["without"].timeless()
    same_weights(tmp_path / "with", tmp_path / "without")


def test_activation_checkpointing_keeps_a_block_s_input_only(tmp_path: Path) -> None:
    def kept(checkpointed: bool) -> int:
        model = Mae(tiny.MODEL, MAE)
        if checkpointed:
            checkpoint_blocks(model)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(64, 3, 16, 16))
        return sum(sizes.values())

    assert kept(True) < kept(False) / 3


@pytest.mark.parametrize("kind", ["mae", "wsp", "fine_tune"])
def test_offload_to_the_host_trains_the_same(kind: str, tmp_path: Path) -> None:
    shipped = json.loads((Path(__file__).parents[2] / "ds_configs/zero3_offload.json").read_text())
    assert shipped.pop("bf16") == {"enabled": True}  # emulated on a CPU, and far too slow
    for part in ("offload_optimizer", "offload_param"):
        assert shipped["zero_optimization"][part].pop("pin_memory")
    (tmp_path / "offload.json").write_text(json.dumps(shipped))
    rows = {"without": tiny.Rows(), "with": tiny.Rows()}
    tuned = FineTune(duration=Duration(steps=12), batch=16)
    recipe = {"mae": MAE, "wsp": WSP, "fine_tune": tuned}[kind]
    judged = tiny.judge if kind == "fine_tune" else train
    for name, found in rows.items():
        config = {"zero_config": str(tmp_path / "offload.json")} if name == "with" else {}
        judged(tiny.stage(recipe, **config), tiny.context(tmp_path / name, metrics=found))
    losses = {name: [row["loss"] for row in found.rows] for name, found in rows.items()}
    assert losses["with"] == pytest.approx(losses["without"], rel=1e-5)


@pytest.mark.parametrize("recipe", [MAE, WSP], ids=["mae", "wsp"])
def test_bfloat16_trains_near_float32(recipe: Optimization, tmp_path: Path) -> None:
    """The path of CUDA, emulated: eight bits of mantissa, so near and not equal."""
    losses = {}
    for name in ("zero3_fp32", "zero3_bf16"):
        rows = tiny.Rows()
        short = recipe.model_copy(update={"duration": Duration(steps=4)})
        run(short, tmp_path / name, rows, zero_config=name)
        losses[name] = [row["loss"] for row in rows.rows]
    assert losses["zero3_bf16"] != losses["zero3_fp32"]
    assert losses["zero3_bf16"] == pytest.approx(losses["zero3_fp32"], rel=0.02)


def test_in_bfloat16_many_micro_batches_have_the_gradient_of_one(tmp_path: Path) -> None:
    """Added up in bfloat16 the norm of 128 parts is off by 2e-3; in float32 only the parts are."""
    recipe = WspRecipe(duration=Duration(steps=1), batch=128)
    norms = {}
    for micro_batch in (128, 1):
        rows = tiny.Rows()
        folder = tmp_path / str(micro_batch)
        run(recipe, folder, rows, zero_config="zero3_bf16", micro_batch=micro_batch)
        norms[micro_batch] = rows.rows[0]["grad_norm"]
    assert norms[1] != norms[128]
    assert norms[1] == pytest.approx(norms[128], rel=6e-4)
