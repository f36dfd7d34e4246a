"""Child of test_ranks.py: one of two ranks, running the same stages as the test does alone.

Usage: rank_jobs.py OUT, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny

from harness.errors import DivergedError, PreemptedError
from harness.study.protocols import FineTune
from harness.study.recipes import Duration, MaeRecipe, Optimization, WspRecipe

MAE = MaeRecipe(
    duration=Duration(steps=12), batch=16, decoder_width=16, decoder_depth=1, decoder_heads=2
)
WSP = WspRecipe(duration=Duration(steps=12), batch=16, drop_path=0.3)
FINE_TUNE = FineTune(duration=Duration(steps=6), batch=16)
AVERAGED = FineTune(duration=Duration(steps=8), batch=16, ema=0.8, mixup=0.8, cutmix=1.0, erase=0.3)


def main(out: Path) -> None:
    """Each stage once; wsp also stopped at step 5 and resumed; one that diverges."""
    from harness import transfer
    from harness.train.loop import train

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def run(name: str, recipe: Optimization, rows: tiny.Rows, stop: int = 10**9) -> Any:
        # Asked on rank 1 only: the ranks must agree.
        should_stop = tiny.StopAfter(stop if rank == 1 else 10**9)
        context = tiny.context(
            out / name, metrics=rows, should_stop=should_stop, rank=rank, ranks=ranks
        )
        entry = transfer.run if isinstance(recipe, FineTune) else train
        return entry(tiny.stage(recipe), context)  # type: ignore[arg-type]  # a gradient recipe

    rows = {
        name: tiny.Rows()
        for name in ("mae", "wsp", "resumed", "fine_tune", "averaged_whole", "diverged")
    }
    run("mae", MAE, rows["mae"])
    run("wsp", WSP, rows["wsp"])
    try:
        run("resumed", WSP, rows["resumed"], stop=5)
    except PreemptedError:
        run("resumed", WSP, rows["resumed"])
    run("fine_tune", FINE_TUNE, rows["fine_tune"])
    try:
        run("averaged", AVERAGED, tiny.Rows(), stop=5)
    except PreemptedError:
        pass  # one rank goes on with it
    run("averaged_whole", AVERAGED, rows["averaged_whole"])
    try:
        run("diverged", WSP.model_copy(update={"lr": 1e30, "warmup": 0.0}), rows["diverged"])
    except DivergedError as error:
        (out / f"diverged_{rank}.txt").write_text(str(error))
    content = {name: value.timeless() for name, value in rows.items()}
    (out / f"rows_{rank}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
