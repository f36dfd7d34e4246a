"""Which code an attempt runs: commit and diff, taken once per submission."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import harness
from harness.ledger.files import write_bytes, write_json
from harness.ledger.tree import Tree


@dataclass(frozen=True, kw_only=True)
class GitState:
    """Commit of the checkout the package runs from, and what differs from it."""

    sha: str | None
    diff: bytes

    @property
    def name(self) -> str:
        """Folder name under code/: same code, same name."""
        return f"{(self.sha or 'no-git')[:12]}-{hashlib.sha256(self.diff).hexdigest()[:10]}"


def git_state() -> GitState:
    """Commit and uncommitted diff; no commit for an installed package outside a checkout."""
    top = Path(harness.__file__).resolve().parent.parent
    if not (top / ".git").exists():
        return GitState(sha=None, diff=b"")
    try:
        sha = _git(top, "rev-parse", "HEAD")
        diff = _git(top, "diff", "HEAD", "--", "*.py", "*.json", "*.yaml", "*.toml")
    except (OSError, subprocess.SubprocessError):
        return GitState(sha=None, diff=b"")
    return GitState(sha=sha.decode().strip(), diff=diff)


def _git(top: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(top), *arguments]
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout


def write_attempt(folder: Path, git: GitState, tree: Tree) -> None:
    """Writes git.json, git.diff and env.json of one attempt; the diff is stored once per code."""
    kept = tree.code / git.name
    if not (kept / "git.diff").exists():
        write_bytes(kept / "git.diff", git.diff)
    about = {"schema": 1, "sha": git.sha, "dirty": bool(git.diff), "code": git.name}
    write_json(folder / "git.json", about)
    try:
        os.link(kept / "git.diff", folder / "git.diff")
    except OSError:  # a file system without hard links
        write_bytes(folder / "git.diff", git.diff)
    shown = ("HARNESS_", "CUDA_", "DS_", "SLURM_", "OMP_", "MKL_", "NCCL_")
    hidden = ("KEY", "TOKEN", "SECRET", "PASSWORD", "URL")
    env = {
        k: v
        for k, v in sorted(os.environ.items())
        if k.startswith(shown) and not any(h in k for h in hidden)
    }
    write_json(
        folder / "env.json",
        {"schema": 1, "python": sys.version.split()[0], "argv": sys.argv, "env": env},
    )
