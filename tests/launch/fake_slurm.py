"""A Slurm of shell scripts that print what a test wants, and count how often they are called."""

from __future__ import annotations

from pathlib import Path

NAMES = ("sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")


class FakeSlurm:
    """Commands that print files of this folder, and note that they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in NAMES:
            self.says(name, f"cat {folder}/{name}.txt 2>/dev/null; exit 0")
        # Each sbatch is a job of its own, in the queue until somebody takes it out.
        number = f"n=$(cat {folder}/sbatch.calls | wc -l)"
        self.says("sbatch", f'{number}; echo "Submitted batch job $n"')
        self.write("scontrol", "ClusterName = lab\nMaxArraySize = 1001\n")

    def says(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/sh\necho "$@" >>{self.folder}/{name}.calls\n{script}\n')
        path.chmod(0o755)

    def write(self, name: str, text: str) -> None:
        (self.folder / f"{name}.txt").write_text(text)

    def calls(self, name: str) -> int:
        path = self.folder / f"{name}.calls"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def holds(self, *rows: tuple[str, str]) -> None:
        """The queue: (job, comment)."""
        lines = ["\x1f".join((job, "PENDING", comment, "None")) for job, comment in rows]
        self.write("squeue", "".join(f"{line}\n" for line in lines))
