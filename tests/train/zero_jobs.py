"""Child of test_zero3.py: one of several ranks, doing the jobs of a list.

Usage: zero_jobs.py JOBS.json, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set.
A job: {"recipe": name, "folder": where, "stop": step to be asked to stop at, "execution": {...}}.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny

from harness.errors import PreemptedError
from harness.study.recipes import Duration, FineTune, MaeRecipe, WspRecipe

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


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
