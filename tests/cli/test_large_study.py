"""Plans and status of a large study: what they do once, however many stages are done.

How long that takes `benchmarks/large_study.py` measures, of ten thousand cells. Here is counted
what it rests on: no file is opened for each stage, no chain is built twice, nobody is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.ledger import store
from harness.ledger.files import write_json
from harness.ledger.index import row_of
from harness.ledger.tree import Tree
from harness.study.cells import Grid, build_grid
from harness.study.chain import Chain
from harness.study.schema import load_study

SEEDS = 5
STUDY = """\
name: large
axes:
  seed: [0, 1, 2, 3, 4]
  size: [d16x2, d32x3]
  data: [500, 1k, 2k, 4k]
  init: [random, mae]
  wsp.lr: [0.0001, 0.0002, 0.0003, 0.0004, 0.0005]
defaults: {dataset: scenes-4k, image_size: 24, patch: 4}
stages:
  mae: {duration: {samples: 1M}, decoder_width: 32, decoder_depth: 1, decoder_heads: 2}
  wsp: {duration: {samples: 1M}}
  transfer:
    probe: {protocol: linear_probe}
"""
COUNTED = """\
import collections, json, sys
counts = collections.Counter()
def count(event, arguments):
    if event in ("open", "os.scandir", "subprocess.Popen"):
        counts[event, str(arguments[0])] += 1
sys.addaudithook(count)
import atexit
atexit.register(lambda: print(json.dumps([[*k, n] for k, n in counts.items()]), file=sys.stderr))
from harness.cli.main import main
sys.argv = ["harness", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Grid]:
    """Run root, study file and grid: the stages of every second cell are done."""
    folder = tmp_path_factory.mktemp("large")
    file = folder / "large.yaml"
    file.write_text(STUDY)
    tree, grid = Tree(folder / "runs"), build_grid(load_study(file))
    store.register(tree, grid, [])
    done = {s for cell in grid.cells[::2] for s in cell.stages.values()}
    for stage in (s for s in grid.stages.values() if s.id in done):
        own = store.write_stage(tree, stage)
        uids = {u: f"uid-{u}" for u in stage.config.upstream.values()}
        about = {"uid": f"uid-{stage.id}", "upstream_uids": uids, "flops": stage.flops}
        about |= {"kind": stage.kind, "size": stage.config.size, "attempts": 1, "device": "cpu"}
        wall = {"total": 3.0, "harness": 0.5}
        write_json(own.result, {**about, "wall_s": wall, "metrics": {}, "processes": 1})
        write_json(own.status, {"schema": 1, "state": "done", "attempt": 1})
    return tree.root, file, grid


def counted(root: Path, *arguments: str) -> tuple[str, dict[tuple[str, str], int]]:
    """What a command printed, and how often it did what the audit hook counts."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, *arguments, "--root", str(root)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HARNESS_DEVICE": "cpu", "HARNESS_CORES": "1"},
    )
    rows = json.loads(done.stderr.splitlines()[-1])
    return done.stdout, {(event, path): n for event, path, n in rows}


def test_neither_a_plan_nor_a_status_opens_a_file_of_each_stage(
    half_done: tuple[Path, Path, Grid],
) -> None:
    root, file, _ = half_done
    plan, status = ("grid", str(file), "--json"), ("status", "large", "--json")
    first, _ = counted(root, *plan)  # leaves the index
    for verb in (plan, status):
        shown, counts = counted(root, *verb)
        opened = [path for event, path in counts if event == "open" and str(root) in path]
        # Of the ten MAE stages the files are read: so few are not worth an index.
        assert not [path for path in opened if "/stages/" in path and "/stages/mae/" not in path]
        assert len(opened) < 40, opened
        assert not any(event == "subprocess.Popen" for event, _ in counts)
        assert '"done"' in shown
    states = {s["id"]: s["state"] for s in json.loads(first)["stages"]}
    assert states == {s["id"]: s["state"] for s in json.loads(counted(root, *plan)[0])["stages"]}
    assert list(states.values()).count("done") >= len(states) // 2


def test_chains_are_built_for_one_seed_and_repeated_for_the_others(
    half_done: tuple[Path, Path, Grid], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    put = Chain.put

    def counting(self: Chain, role: str, *arguments: object, **named: object) -> str:
        built.append(role)
        return put(self, role, *arguments, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Chain, "put", counting)
    grid = build_grid(load_study(half_done[1]))
    assert len(grid.cells) == 400
    links = sum(len(cell.stages) for cell in grid.cells if cell.axes["seed"] == 0)
    assert len(built) >= links
    assert len(built) * SEEDS <= sum(len(cell.stages) for cell in grid.cells) * 1.5


def test_a_row_of_the_index_says_of_a_result_what_states_and_estimates_need() -> None:
    result = {
        **{"uid": "u", "upstream_uids": {"a": "b"}, "kind": "wsp", "size": "b", "flops": 2.0},
        **{"metrics": {"loss": 0.5}, "wall_s": {"total": 3.0, "harness": 1.0, "train": 2.0}},
        **{"device": "cpu", "processes": 2, "attempts": 3},
    }
    row = row_of({**result, "others": "are left out"})
    assert row.result == result
    assert (row.total_s, row.harness_s) == (3.0, 1.0)
    assert row_of({"uid": "u"}).result == {"uid": "u", "upstream_uids": {}}
