"""A run that was stopped or killed and resumed is the undisturbed run, to the last bit."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from harness.errors import PreemptedError, UserError
from harness.study.recipes import Duration, FineTune, MaeRecipe, Optimization, WspRecipe
from harness.train import checkpoint
from harness.train.loop import train

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


def test_only_a_complete_checkpoint_counts(tmp_path: Path) -> None:
    with pytest.raises(PreemptedError):
        run(WSP, tmp_path, tiny.Rows(), stop=3)
    found = checkpoint.latest(tmp_path)
    assert found == tmp_path / "checkpoints" / "step_3"
    (found / "COMPLETE").unlink()
    assert checkpoint.latest(tmp_path) is None


def test_a_checkpoint_of_other_ranks_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PreemptedError):
        run(WSP, tmp_path, tiny.Rows(), stop=3)
    progress = tmp_path / "checkpoints" / "step_3" / "progress.json"
    content = json.loads(progress.read_text())
    progress.write_text(json.dumps(content | {"ranks": 2}))
    with pytest.raises(UserError) as error:
        run(WSP, tmp_path, tiny.Rows())
    assert error.value.problems == (
        f"{progress.parent}: checkpoint was written by 2 ranks, this attempt has 1; resume with"
        " resources.ranks: 2, or remove the checkpoint to start the stage again",
    )


def test_a_checkpoint_runs_no_code_when_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("this line must never be printed",))

    with pytest.raises(PreemptedError):
        run(WSP, tmp_path, tiny.Rows(), stop=3)
    states = next((tmp_path / "checkpoints").rglob("*model_states.pt"))
    torch.save({"module": Bomb()}, states)
    with pytest.raises(Exception, match="Weights only load failed"):
        run(WSP, tmp_path, tiny.Rows())
