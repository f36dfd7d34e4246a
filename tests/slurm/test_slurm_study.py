"""Studies on a real Slurm: submitted once, finished by themselves, whatever happens to the jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.ledger.files import read_json, read_jsonl
from tests.slurm.conftest import Site

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def stages(root: Path) -> dict[str, Path]:
    return {p.name: p for p in sorted(root.glob("stages/*/*"))}


def states(site: Site) -> dict[str, str]:
    found = json.loads(site.harness("status", "tiny", "--json").stdout)
    return {s["id"]: s["state"] for s in found["studies"][0]["stages"]}


def test_a_study_finishes_by_itself_and_a_second_submit_does_nothing(site: Site) -> None:
    file = site.study()
    said = site.harness("grid", str(file), "--submit").stdout
    assert "5 stages submitted to test" in said
    site.cluster.wait_empty()
    assert set(states(site).values()) == {"done"}, dump(site)
    assert "nothing to do" in site.harness("grid", str(file), "--submit").stdout
    assert site.cluster.queue() == []
    for folder in stages(site.root).values():
        assert [p.name for p in (folder / "attempts").iterdir()] == ["1"]
        attempt = read_json(folder / "attempts/1/attempt.json") or {}
        assert attempt["end"] == "done"
        assert attempt["job"]
        assert read_json(folder / "attempts/1/git.json")
        assert sum(e["event"] == "done" for e in read_jsonl(folder / "events.jsonl")) == 1


def dump(site: Site) -> str:
    parts: list[Any] = [states(site)]
    for log in sorted(site.root.glob("slurm/*/jobs/*_log.*")):
        parts.append(f"--- {log.name}\n{log.read_text()[-2000:]}")
    for log in sorted(site.root.glob("stages/*/*/attempts/*/stderr.log")):
        parts.append(f"--- {log}\n{log.read_text()[-2000:]}")
    return "\n".join(map(str, parts))
