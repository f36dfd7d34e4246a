"""Where a study's numbers come from: code, versions, machines, data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.load import StudyData
from analysis.tables import NONE
from harness.units import format_seconds


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What the attempts and results of a study say of how they were made; each list sorted."""

    versions: dict[str, tuple[str, ...]]
    code: tuple[str, ...]
    """Commits, those with uncommitted changes marked."""
    devices: tuple[str, ...]
    hosts: tuple[str, ...]
    seconds: float
    """Process time of all finished stages."""
    stages: int
    done: int
    attempts: int


def origins(study: StudyData) -> Origins:
    """Reads attempt.json and git.json of every attempt; what is unreadable says nothing."""
    versions: dict[str, set[str]] = {}
    code: set[str] = set()
    hosts: set[str] = set()
    devices: set[str] = set()
    commits: set[bytes] = set()
    seconds = 0.0
    for stage in study.stages.values():
        result = stage.result
        if result.get("harness_version"):
            versions.setdefault("harness", set()).add(str(result["harness_version"]))
        if result.get("device"):
            devices.add(str(result["device"]))
        seconds += float(result.get("wall_s", {}).get("total", 0.0))
        for folder in stage.tries:
            about = _parsed(_read(f"{folder}/attempt.json"))
            # After the name come boot and pid namespace: every container is another one.
            hosts |= {str(about["host"]).partition(":")[0]} if about.get("host") else set()
            for name, text in (about.get("versions") or {}).items():
                versions.setdefault(str(name), set()).add(str(text))
            commits.add(_read(f"{folder}/git.json"))
    for git in map(_parsed, commits):
        if git.get("sha"):
            code.add(str(git["sha"])[:12] + (" with changes" if git.get("dirty") else ""))
    return Origins(
        versions={name: tuple(sorted(versions[name])) for name in sorted(versions)},
        code=tuple(sorted(code)),
        devices=tuple(sorted(devices)),
        hosts=tuple(sorted(hosts)),
        seconds=seconds,
        stages=len(study.stages),
        done=sum(stage.state == "done" for stage in study.stages.values()),
        attempts=sum(stage.attempts for stage in study.stages.values()),
    )


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def provenance(study: StudyData, found: Origins) -> list[tuple[str, str]]:
    """The same as name and value, with what went wrong while reading."""
    dataset = study.resolved.get("dataset", {})
    entries = [
        ("run root", _from_here(study.root)),
        ("dataset", f"{dataset.get('name', NONE)}, {dataset.get('fingerprint', 'no fingerprint')}"),
        ("stages", f"{found.done} of {found.stages} done, {found.attempts} attempts"),
        ("process time", format_seconds(found.seconds) if found.seconds else NONE),
        *((f"{name} version", ", ".join(texts)) for name, texts in found.versions.items()),
        ("code", ", ".join(found.code) or NONE),
        ("device", ", ".join(found.devices) or NONE),
        ("hosts", _some(found.hosts) or NONE),
    ]
    return entries + [("while reading", text) for text in study.notes]


def _some(names: tuple[str, ...], num: int = 40) -> str:
    more = f" and {len(names) - num} more" if len(names) > num else ""
    return ", ".join(names[:num]) + more


def _from_here(path: Path) -> str:
    """Relative where it can be: a report is passed on, the folders of one machine are not."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
