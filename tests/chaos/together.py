"""Many commands submit one study at the same moment: every stage runs exactly once.

python -m tests.chaos.together --commands 20
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from harness.ledger.files import read_jsonl
from tests.chaos.tiny_study import STUDY, flaws, start

# Steps are few: what is looked at is who starts what.
SHORT = STUDY.replace("steps: 300", "steps: 20").replace("steps: 60", "steps: 10")


def together(folder: Path, commands: int) -> list[str]:
    """What is wrong in the end, a line each."""
    file, root = folder / "tiny.yaml", folder / "runs"
    file.write_text(SHORT)
    processes = [start(root, file, HARNESS_CORES="1") for _ in range(commands)]
    codes = [process.wait(1200) for process in processes]
    problems = [f"command {k}: exit code {code}" for k, code in enumerate(codes) if code]
    for stage in sorted(root.glob("stages/*/*")):
        started = [e for e in read_jsonl(stage / "events.jsonl") if e["event"] == "started"]
        if len(started) != 1:
            problems.append(f"{stage.name}: started {len(started)} times")
    return problems + flaws(root)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--commands", type=int, default=20)
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    problems = together(folder, parser.parse_args().commands)
    print("\n".join(problems) or "nothing is wrong")
    if problems:
        print(f"files: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
