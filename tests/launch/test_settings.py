"""Which root and which cluster count: those said nearest to the command."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli import base
from harness.errors import UserError
from harness.launch.settings import Local, Slurm, find_profile, load_settings
from tests.conftest import Harness

SETTINGS = """\
cluster: of_file
root: ROOT
profiles:
  of_file: {kind: slurm, partition: one}
  of_environment: {kind: slurm, partition: two}
  of_flag: {kind: slurm, partition: three}
"""


@pytest.fixture(autouse=True)
def nothing_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without settings or variables, in a folder of the test's."""
    for name in ("HARNESS_ROOT", "HARNESS_CLUSTER", "HARNESS_SETTINGS", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def say(tmp_path: Path) -> Callable[..., Path]:
    """Writes the user's settings file."""

    def write(text: str = SETTINGS, folder: str = ".config") -> Path:
        path = tmp_path / folder / "harness" / "settings.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("ROOT", str(tmp_path / "of_file")))
        return path

    return write


def root(flag: str | None = None) -> str:
    return os.path.relpath(base.tree(None if flag is None else Path(flag)).root)


def test_of_run_roots_the_flag_counts_before_the_variable_the_settings_and_runs(
    say: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert root() == "runs"
    say()
    assert root() == "of_file"
    monkeypatch.setenv("HARNESS_ROOT", "of_environment")
    assert root() == "of_environment"
    assert root("of_flag") == "of_flag"
    monkeypatch.setenv("HARNESS_ROOT", "")  # as if it were not set
    assert root() == "of_file"
    assert root("of_flag") == "of_flag"
    monkeypatch.setenv("HARNESS_ROOT", "~/of_environment")
    assert root() == os.path.relpath(Path.home() / "of_environment")
    monkeypatch.setenv("HARNESS_ROOT", "")
    say("cluster: local\n")
    assert root() == "runs"


def test_of_clusters_the_flag_counts_before_the_variable_the_settings_and_local(
    say: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(flag: str | None = None) -> tuple[str, str | None]:
        name, profile = find_profile(flag)
        assert isinstance(profile, Slurm)
        return name, profile.partition

    assert find_profile(None) == ("local", Local())
    say()
    assert found() == ("of_file", "one")
    monkeypatch.setenv("HARNESS_CLUSTER", "of_environment")
    assert found() == ("of_environment", "two")
    assert found("of_flag") == ("of_flag", "three")
    assert find_profile("local") == ("local", Local())
    monkeypatch.setenv("HARNESS_CLUSTER", "")
    assert found() == ("of_file", "one")


def test_a_command_takes_its_root_in_that_order(
    here: Harness, say: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    say()
    said = here("status", "--root", "of_flag").stdout  # HARNESS_ROOT is `runs`
    assert said.startswith(f"no study in {tmp_path / 'of_flag'};")
    assert here("status").stdout.startswith(f"no study in {tmp_path / 'runs'};")
    monkeypatch.delenv("HARNESS_ROOT")
    assert here("status").stdout.startswith(f"no study in {tmp_path / 'of_file'};")


def test_a_root_in_the_settings_may_begin_at_home(say: Callable[..., Path], tmp_path: Path) -> None:
    say("root: ~/large/runs\n")
    assert base.tree(None).root == tmp_path / "large" / "runs"


def test_settings_lie_where_the_variable_says_or_among_the_users_others(
    say: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings().cluster is None
    say("cluster: usual\n")
    assert load_settings().cluster == "usual"
    say("cluster: moved\n", "elsewhere")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    assert load_settings().cluster == "moved"
    named = say("cluster: named\n", "named")
    monkeypatch.setenv("HARNESS_SETTINGS", str(named))
    assert load_settings().cluster == "named"
    named.unlink()
    for ask in (load_settings, lambda: base.tree(None), lambda: find_profile("local")):
        with pytest.raises(UserError, match=f"HARNESS_SETTINGS={named}: no such file"):
            ask()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("of_flags", "did you mean 'of_flag'?"),
        ("moon", "known: local, slurm, of_file, of_environment, of_flag"),
    ],
)
def test_a_cluster_nobody_has_is_named_with_those_there_are(
    name: str, hint: str, say: Callable[..., Path]
) -> None:
    path = say()
    with pytest.raises(UserError) as caught:
        find_profile(name)
    assert str(caught.value) == f"no cluster '{name}' in {path}; {hint}"


def test_every_mistake_in_the_settings_is_told_with_its_line(say: Callable[..., Path]) -> None:
    path = say(
        "clutser: lab\n"
        "profiles:\n"
        "  lab: {kind: slurm, gpus_per_nod: 8}\n"
        "  old: {kind: slurm, gpu_option: gpus}\n"
        "  odd: {kind: slrm}\n"
        "  far: {kind: hosts}\n"
        "  bare: {partition: gpu}\n"
        "  own: {kind: slurm, sbatch: {comment: mine, job_name: x, mail-type: END}}\n"
        "  away: {kind: slurm, sbatch: {clusters: other, ntasks: 4, wait: true}}\n"
        "  bare2: {kind: slurm, sbatch: {export: NONE}}\n"
    )
    with pytest.raises(UserError) as caught:
        load_settings()
    wanted = {
        1: "clutser: unknown key; did you mean 'cluster'?",
        3: "profiles.lab.gpus_per_nod: unknown key; did you mean 'gpus_per_node'?",
        4: "gpu_option: expected gpus_per_node, gres, none; found 'gpus'",
        5: "kind: expected local, hosts, slurm; found 'slrm'; did you mean 'slurm'?",
        6: "hostfile: is missing",
        7: "kind is missing; expected for example kind: slurm",
        8: "comment, job-name: the harness sets this itself; remove it",
        9: "clusters, ntasks, wait: the harness sets this itself; remove it",
        10: "ranks need what the batch script sets; write ALL, or ALL,NAME=value, or use `env`",
    }
    found = caught.value.problems
    assert len(found) == len(wanted)
    for line, words in wanted.items():
        assert any(p.startswith(f"{path}:{line}: ") and p.endswith(words) for p in found), found


def test_a_user_without_a_home_has_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no entry in its passwd file."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert find_profile(None) == ("local", Local())
    with pytest.raises(UserError, match=r"no cluster 'lab' in ~/\.config/"):
        find_profile("lab")
