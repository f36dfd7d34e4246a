"""Names, values and files made to do harm: refused in a line, or nothing but text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.ledger import store
from harness.ledger.tree import Tree
from harness.study.cells import build_grid
from harness.study.schema import load_study
from tests.conftest import SMALL, Harness

WriteStudy = Callable[..., Path]

NAMES = [
    "../../etc",
    "a/b",
    "a\nb",
    "a\n",
    "$(touch pwned)",
    "`touch pwned`",
    "a;b",
    "a b",
    "-rf",
    ".hidden",
    "x" * 65,
    "\x1b[31mred",
    "<script>",
    "nul\0l",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_study_name_that_is_no_plain_name_is_refused(
    name: str, study_file: WriteStudy, here: Harness
) -> None:
    file = study_file(SMALL.replace("name: small", f"name: {json.dumps(name)}"))
    done = here("grid", str(file), check=None)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "not a usable name" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("word", ["../..", "$(touch pwned)\n%", "\x1b[2J"])
@pytest.mark.parametrize(
    "verb", ["status", "report", "logs", "run", "cancel", "resume", "retry", "gc"]
)
def test_a_name_nobody_has_is_a_line_and_not_a_path(
    verb: str, word: str, here: Harness, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = here(verb, word, check=None)
    assert done.returncode in (2, 4), done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert sorted(p for p in tmp_path.rglob("*") if p.name == "pwned") == []
    assert [p for p in before if not p.exists()] == []


def test_a_file_of_aliases_of_aliases_is_refused_at_once(
    study_file: WriteStudy, harness: Harness
) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    done = harness("grid", study_file("\n".join([*levels, SMALL])), check=None)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_values_of_an_axis_never_become_paths(study_file: WriteStudy, here: Harness) -> None:
    """An axis of our own may hold anything; ids and folders made of it hold none of it."""
    values = ["../../x; $(id)", "a\nb\x1b[2J<b>"]
    text = SMALL.replace("axes:\n", f"axes:\n  note: {json.dumps(values)}\n")
    text += "overrides:\n"
    for number, value in enumerate(values, 1):
        text += f"- {{match: {{note: {json.dumps(value)}}}, set: {{wsp.lr: {number}e-3}}}}\n"
    found = json.loads(here("grid", str(study_file(text)), "--json").stdout)
    assert {cell["axes"]["note"] for cell in found["cells"]} == set(values)
    ids = [c["id"] for c in found["cells"]] + [s["id"] for s in found["stages"]]
    names = ids + [c["name"] for c in found["cells"]]
    assert not [i for i in names if set(i) & set("/;$()<>[ \n\x1b")]
    assert "\x1b" not in here("grid", str(study_file(text))).stdout


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_tag_that_is_no_plain_name_is_refused(
    name: str, study_file: WriteStudy, here: Harness, tmp_path: Path
) -> None:
    store.register(Tree(tmp_path / "runs"), build_grid(load_study(study_file())), [])
    done = here("run", "d16x2-1k-mae-s0", "--set", "wsp.lr=1e-3", f"--tag={name}", check=None)
    assert done.returncode == 2 and "not a usable name" in done.stderr
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr
    assert not list(tmp_path.rglob("pwned"))


def test_a_record_whose_package_is_missing_is_said_before_anything_runs(
    study_file: WriteStudy, harness: Harness, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'pymongo' else found(name, *a)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    env = {"HARNESS_MONGO_URL": "mongodb://127.0.0.1", "PYTHONPATH": path}
    done = harness("grid", study_file(), "--submit", check=2, env=env)
    assert done.stderr.startswith("HARNESS_MONGO_URL is set, but pymongo is not installed")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs" / "studies").exists()
