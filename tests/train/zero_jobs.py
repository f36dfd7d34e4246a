"""Child of test_zero3.py: one of several ranks, doing the jobs of a list.

Usage: zero_jobs.py JOBS.json, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set.
A job: {"recipe": name, "folder": where, "stop": step to be asked to stop at, "execution": {...}},
or {"weights": recipe, "folder": where, "upstream": file, "sharded": how, "config": of DeepSpeed},
which keeps the initial weights there.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
from safetensors.torch import save_file

from harness.errors import PreemptedError
from harness.study.protocols import FineTune
from harness.study.recipes import Duration, MaeRecipe, WspRecipe
from harness.train.build import build_engine
from harness.train.objectives import OBJECTIVES

STEPS = 50
RECIPES = {
    "mae": MaeRecipe(
        duration=Duration(steps=STEPS),
        batch=48,
        clip=0.5,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
    ),
    "wsp": WspRecipe(duration=Duration(steps=STEPS), batch=48, weight_decay=0.3, clip=0.5),
    "fine_tune": FineTune(duration=Duration(steps=STEPS), batch=48, weight_decay=0.3, clip=0.5),
}


def main(jobs: list[dict[str, object]]) -> None:
    """Runs the jobs; rank 0 appends the rows of each to rows.jsonl in its folder."""
    from harness import transfer
    from harness.train.loop import train

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for job in jobs:
        if "weights" in job:
            keep_initial_weights(job, rank, ranks)
            continue
        folder, recipe, rows = Path(str(job["folder"])), RECIPES[str(job["recipe"])], tiny.Rows()
        context = tiny.context(
            folder,
            metrics=rows,
            should_stop=tiny.StopAfter(int(str(job.get("stop", 10**9)))),
            rank=rank,
            ranks=ranks,
        )
        entry = transfer.run if isinstance(recipe, FineTune) else train
        execution = {"ranks": ranks, **dict(job.get("execution", {}))}  # type: ignore[call-overload]  # from JSON
        try:
            entry(tiny.stage(recipe, **execution), context)
        except PreemptedError:
            pass
        if rank == 0:
            with (folder / "rows.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows.timeless())


def keep_initial_weights(job: dict[str, object], rank: int, ranks: int) -> None:
    """The weights that an engine starts with, whole, as initial.safetensors in the job's folder."""
    recipe, folder = RECIPES[str(job["weights"])], Path(str(job["folder"]))
    upstream = Path(str(job["upstream"])) if job.get("upstream") else None
    context = tiny.context(folder, upstream=upstream, rank=rank, ranks=ranks)
    stage = tiny.stage(recipe, sharded_init=job["sharded"], zero_config=job["config"])
    objective = OBJECTIVES[stage.config.kind](stage.config, context, tiny.opened(folder))
    engine = build_engine(objective.blueprint(), recipe, stage.execution, rank=rank, ranks=ranks)
    tensors = dict(engine.tensors())
    engine.close()
    if rank == 0:
        save_file(tensors, folder / "initial.safetensors")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
