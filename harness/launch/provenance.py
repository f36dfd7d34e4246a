"""Which code an attempt runs: commit and diff, taken once per submission."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

import harness
from harness.ledger.environment import environment
from harness.ledger.files import write_bytes, write_json
from harness.ledger.tree import Tree
from harness.study.stages import Execution

_IMPORTED = ("harness/*.py", "analysis/*.py", "ds_configs/*.json")
"""What runs without git having been told of it."""


@dataclass(frozen=True, kw_only=True)
class GitState:
    """Commit of the checkout the package runs from, and what differs from it."""

    sha: str | None
    diff: bytes

    @property
    def name(self) -> str:
        """Folder name under code/: same code, same name."""
        return f"{(self.sha or 'no-git')[:12]}-{hashlib.sha256(self.diff).hexdigest()[:10]}"

    @classmethod
    def of_kept(cls, tree: Tree, sha: str | None, name: str) -> GitState:
        """The state that an earlier submission kept under code/ with `keep_diff`."""
        return cls(sha=sha, diff=(tree.code / name / "git.diff").read_bytes())


def git_state() -> GitState:
    """Commit and uncommitted diff; no commit for an installed package outside a checkout."""
    top = Path(harness.__file__).resolve().parent.parent
    if not (top / ".git").exists():
        return GitState(sha=None, diff=b"")
    try:
        sha = _git(top, "rev-parse", "HEAD")
        diff = _git(top, "diff", "HEAD", "--", "*.py", "*.json", "*.yaml", "*.toml")
        new = _git(top, "ls-files", "-oz", "--exclude-standard", "--", *_IMPORTED).split(b"\0")
        diff += b"".join(_added(top, os.fsdecode(path)) for path in new if path)
    except (OSError, subprocess.SubprocessError):
        return GitState(sha=None, diff=b"")
    return GitState(sha=sha.decode().strip(), diff=diff)


def snapshot(tree: Tree, git: GitState) -> Path:
    """A copy of the code as it is now, for processes that start later: the folder for PYTHONPATH.

    One copy a state of the code; its name is a hash of the files themselves, so that files git
    does not know are in it too.
    """
    package = Path(harness.__file__).resolve().parent
    top = package.parent
    folders = [package, *(top / n for n in ("analysis", "ds_configs", "grids"))]
    files = sorted(
        p
        for f in folders
        for p in f.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and not p.is_symlink()
    )
    digest, contents = hashlib.sha256(), dict[Path, bytes]()
    for path in files:
        contents[path] = path.read_bytes()
        digest.update(f"{path.relative_to(top)}\0{len(contents[path])}\0".encode())
        digest.update(contents[path])
    final = tree.code / f"{(git.sha or 'no-git')[:12]}-{digest.hexdigest()[:10]}" / "src"
    if final.is_dir():
        for path, content in contents.items():
            copy = final / path.relative_to(top)
            if not copy.is_file() or copy.read_bytes() != content:
                write_bytes(copy, content)  # the machine went down before the disk had it all
        return final
    partial = final.with_name(f"src.{uuid.uuid4().hex[:8]}.partial")
    try:
        for path, content in contents.items():
            target = partial / path.relative_to(top)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except OSError:  # no space: what is half there must not hold it
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        partial.rename(final)
    except OSError:  # another submission was quicker
        shutil.rmtree(partial, ignore_errors=True)
    return final


@dataclass(frozen=True, kw_only=True)
class Code:
    """The code of a submission."""

    git: GitState
    path: Path
    """The copy that its stages run: the folder for PYTHONPATH."""


def code_now(tree: Tree) -> Code:
    """The code as it is now, in a copy."""
    git = git_state()
    return Code(git=git, path=snapshot(tree, git))


def kept(tree: Tree, execution: Execution) -> Execution:
    """The way to run a stage, by a copy of the user's own DeepSpeed config as it is now.

    As with the code: a later edit does not reach stages that wait. Configs of ds_configs/ are part
    of the code.
    """
    config = execution.zero_config
    if config is None or not config.endswith(".json") or tree.code in Path(config).parents:
        return execution
    try:
        content = Path(config).read_bytes()
    except OSError:  # gone, or not seen from this host: its own worker says so, if it comes to it
        return execution
    name = f"{Path(config).stem}-{hashlib.sha256(content).hexdigest()[:10]}.json"
    path = tree.code / "ds_configs" / name
    if not path.exists():
        write_bytes(path, content)
    return execution.model_copy(update={"zero_config": str(path)})


def _git(top: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(top), *arguments]
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout


def _added(top: Path, path: str) -> bytes:
    """The diff that makes a file git does not know."""
    command = ["git", "-C", str(top), "diff", "--no-index", "--", os.devnull, path]
    # 1: they differ.
    return subprocess.run(command, capture_output=True, check=False, timeout=60).stdout


def keep_diff(tree: Tree, git: GitState) -> Path:
    """Stores the diff below code/, once for each state of the code; returns its folder."""
    kept = tree.code / git.name
    if not (kept / "git.diff").exists():
        write_bytes(kept / "git.diff", git.diff)
    return kept


def write_attempt(folder: Path, git: GitState, tree: Tree) -> None:
    """Writes git.json, git.diff and env.json of one attempt; the diff is stored once per code."""
    kept = keep_diff(tree, git)
    about = {"schema": 1, "sha": git.sha, "dirty": bool(git.diff), "code": git.name}
    write_json(folder / "git.json", about)
    try:
        os.link(kept / "git.diff", folder / "git.diff")
    except OSError:  # a file system without hard links
        write_bytes(folder / "git.diff", git.diff)
    # Until the worker says what it found where it runs.
    write_json(folder / "env.json", environment("driver"))
