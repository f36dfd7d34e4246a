"""The command line as a user meets it: output, exit codes, one-line errors."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL, Harness

Write = Callable[..., Path]


def test_help_of_every_verb_has_an_example(here: Harness) -> None:
    shown = here("--help").stdout
    verbs = re.findall(r"^  ([a-z]+)  ", shown, re.MULTILINE)
    assert set(verbs) >= {"grid", "status", "logs", "run", "report", "gc", "data"}
    for verb in verbs:
        text = here(verb, "--help").stdout
        assert "Example:" in text, text
        # A line of an example is a command and nothing else, however wide the terminal.
        example = text.split("Example:")[1].split("Options:")[0].split("Arguments:")[0]
        lines = [line.strip() for line in example.splitlines() if line.strip()]
        assert lines and all(line.startswith(f"harness {verb}") for line in lines), text


def test_a_plan_writes_nothing_and_imports_no_torch(
    study_file: Write, harness: Harness, tmp_path: Path
) -> None:
    path = study_file()
    before = sorted(tmp_path.rglob("*"))
    done = harness("grid", path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert sorted(tmp_path.rglob("*")) == before
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "harness.study.cells" in imported
    assert not imported & {"torch", "numpy", "deepspeed", "pandas", "sacred", "timm"}


def test_the_plan_as_json(study_file: Write, harness: Harness) -> None:
    plan = json.loads(harness("grid", study_file(), "--json").stdout)
    assert len(plan["cells"]) == 8
    for cell in plan["cells"]:
        assert {"id", "name", "axes", "stages", "state", "flops"} <= set(cell)
    known = {s["id"]: s for s in plan["stages"]}
    for stage in known.values():
        assert {"id", "kind", "feeds", "samples", "flops", "params", "state"} <= set(stage)
        users = [c for c in plan["cells"] if stage["id"] in c["stages"].values()]
        assert stage["feeds"] == len(users)
    totals = plan["totals"]
    naive = sum(known[s]["flops"] for c in plan["cells"] for s in c["stages"].values())
    assert totals["flops_naive"] == pytest.approx(naive)
    assert totals["flops_shared"] == pytest.approx(sum(s["flops"] for s in known.values()))
    assert totals["flops_remaining"] == totals["flops_shared"] < totals["flops_naive"]


def test_only_narrows_the_plan(study_file: Write, harness: Harness) -> None:
    path = study_file()
    plan = json.loads(harness("grid", path, "--only", "size=d32x3,init=mae", "--json").stdout)
    assert [c["name"] for c in plan["cells"]] == ["d32x3-1k-mae-s0", "d32x3-4k-mae-s0"]
    missing = harness("grid", path, "--only", "size=b", check=4)
    assert "matches no cell" in missing.stderr and missing.stdout == ""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("decoder_depth", "decoder_dept"),
        ("samples: 2k", "samples: 2k, epochs: 1"),
        ("name: small", "name: small\nresources: {ranks: 3}"),
    ],
)
def test_a_wrong_file_is_one_line_exit_2_and_nothing_written(
    study_file: Write, harness: Harness, tmp_path: Path, old: str, new: str
) -> None:
    path = study_file(SMALL.replace(old, new, 1))
    before = sorted(tmp_path.rglob("*"))
    done = harness("grid", path, "--submit", check=2)
    assert sorted(tmp_path.rglob("*")) == before
    lines = done.stderr.strip().splitlines()
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert lines and all(re.match(rf"{re.escape(str(path))}:\d+: ", line) for line in lines), lines


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["grid", "none.yaml"], 4, "no such file"),
        (["status", "nothing"], 4, "no study 'nothing'"),
        (["logs", "d1"], 4, "no cell 'd1'"),
        (["run", "d1"], 4, "no cell 'd1'"),
        (["report", "nothing"], 4, "no study"),
        (["report"], 4, "no study"),
        (["gird"], 2, "No such command"),
        (["grid"], 2, "Missing argument"),
        (["grid", "x.yaml", "--mode", "sometimes"], 2, "cached"),
        (["grid", "x.yaml", "--mode", "cache"], 2, "Did you mean 'cached'?"),
        (["grid", "x.yaml", "--mode", "force"], 2, "--mode force says how to run; add --submit"),
        (["grid", "x.yaml", "--json", "--submit"], 2, "--json prints the plan"),
        (["data", "pack", "digit", "--out", "x"], 4, "did you mean 'digits'?"),
        (["data", "pack", "none", "--out", "x"], 4, "none"),
    ],
)
def test_exit_codes(here: Harness, arguments: list[str], code: int, message: str) -> None:
    done = here(*arguments, check=code)
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_study_that_is_only_described_is_not_submitted(harness: Harness) -> None:
    plan = json.loads(harness("grid", "grids/maws.yaml", "--device", "cuda", "--json").stdout)
    assert {c["axes"]["size"] for c in plan["cells"]} == {"b", "l", "h", "2b", "6.5b"}
    assert {s["feeds"] for s in plan["stages"] if s["kind"] == "mae"} == {1}
    refused = harness("grid", "grids/maws.yaml", "--submit", check=2)
    assert "pack your own images" in refused.stderr


def test_every_shipped_study_plans(here: Harness) -> None:
    folder = Path(__file__).parents[2] / "grids"
    for path in sorted(folder.glob("*.yaml")):
        head = path.read_text().split("name:")[0]
        assert all(f"# {word}:" in head for word in ("Question", "Cost", "Command")), path
        if path.name == "fashion_mnist.yaml":
            continue  # needs the packed images: tests/test_fashion_mnist.py
        plan = json.loads(here("grid", path, "--json").stdout)
        assert plan["cells"], path


def test_a_plan_cut_off_by_its_reader_is_quiet(study_file: Write, harness: Harness) -> None:
    import subprocess
    import sys

    command = f"{sys.executable} -m harness.cli.main grid {study_file()} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr


def submitted(study_file: Write, tmp_path: Path) -> Path:
    """A run root with the small study registered, as after a submission; the path of its study."""
    from harness.ledger.store import register
    from harness.ledger.tree import Tree
    from harness.study.cells import build_grid
    from harness.study.schema import load_study

    register(Tree(tmp_path / "runs"), build_grid(load_study(study_file())), [])
    return tmp_path / "runs/studies/small"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("size=d8x3", "--set: size 'd8x3': unknown; did you mean 'd8x2'?"),
        ("size=", "--set: size None: unknown"),
        ("data=abc", "--set: data 'abc': 'abc' is not a count"),
        ("seed=x", "--set: seed 'x': expected a whole number"),
        ("siez=d8x2", "--set siez: unknown; did you mean 'size'?"),
        ("wsp.lr=x", "--set: wsp.lr: input should be a valid number"),
    ],
)
def test_a_wrong_set_is_one_line(
    study_file: Write, here: Harness, tmp_path: Path, change: str, message: str
) -> None:
    submitted(study_file, tmp_path)
    done = here("run", "d16x2-1k-mae-s0", "--set", change, check=2)
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("file", ["cells.jsonl", "ablations.jsonl"])
@pytest.mark.parametrize("line", ["{half a row", "[1]", "{}"])
def test_a_corrupt_row_of_a_study_is_named(
    study_file: Write, here: Harness, tmp_path: Path, file: str, line: str
) -> None:
    path = submitted(study_file, tmp_path) / file
    path.write_text(line + "\n")
    done = here("run", "d16x2-1k-mae-s0", check=2)
    assert str(path) in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_place_that_takes_no_files_is_one_line(
    study_file: Write, here: Harness, tmp_path: Path
) -> None:
    submitted(study_file, tmp_path)
    file = tmp_path / "file"
    file.touch()
    for out in (file, "/proc/none"):
        done = here("report", "small", "--out", out, check=2)
        assert f"--out {out}: cannot be" in done.stderr and done.stderr.count("\n") == 1
    for verb in (["grid", study_file()], ["status"]):
        done = here(*verb, "--root", file, check=2)
        assert (
            done.stderr
            == f"run root {file}: is a file; expected a folder, new or of earlier runs\n"
        )


def test_the_version_is_that_of_the_package(harness: Harness) -> None:
    from importlib.metadata import version

    assert harness("--version").stdout == f"harness {version('vision-scaling-harness')}\n"


def test_the_plan_for_people_shows_axes_and_feeds(study_file: Write, harness: Harness) -> None:
    path = study_file()
    text = harness("grid", path).stdout
    row = next(line for line in text.splitlines() if line.startswith("d16x2-1k-mae-s0-"))
    assert "size=d16x2 data=1k init=mae" in row and "dataset=" not in row  # equal for all cells
    feeds = {kind: re.search(rf"^{kind} x \d+ +(\S+) ", text, re.M) for kind in ("mae", "wsp")}
    assert {k: m and m[1] for k, m in feeds.items()} == {"mae": "2", "wsp": "1"}
    some = harness("grid", path, "--only", "init=mae", "--only", "size=d16x2", "--json").stdout
    names = {c["name"] for c in json.loads(some)["cells"]}
    assert names == {"d16x2-1k-mae-s0", "d16x2-4k-mae-s0"}


def test_logs_take_the_id_of_a_stage(study_file: Write, harness: Harness, tmp_path: Path) -> None:
    path = submitted(study_file, tmp_path)
    cell = json.loads((path / "cells.jsonl").read_text().splitlines()[0])
    stage = cell["stages"]["wsp"]
    attempt = tmp_path / f"runs/stages/wsp/{stage}/attempts/1"
    attempt.mkdir(parents=True)
    (attempt / "stdout.log").write_text("what it said\n")
    done = harness("logs", stage)
    assert done.stdout == f"== wsp: {stage}, attempt 1: running\nwhat it said\n"


def test_a_wrong_selector_is_told_as_what_it_is(
    study_file: Write, harness: Harness, tmp_path: Path
) -> None:
    submitted(study_file, tmp_path)
    done = harness("cancel", "size=d9x9", check=4)
    assert "selector 'size=d9x9' matches no cell" in done.stderr and "--only" not in done.stderr
    done = harness("retry", "state=fialed", check=2)
    assert "no state 'fialed'; did you mean 'failed'? states: planned, waiting" in done.stderr
