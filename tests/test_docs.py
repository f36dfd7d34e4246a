"""Every command in the README and the docs runs; every link leads somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.launch.settings import Hosts, Settings, Slurm, find_profile, load_settings

TOP = Path(__file__).parents[1]
UNIVERSAL = "python docs/universal_checkpoint.py"
OURS = ("harness ", "python -m analysis.")
PAGES = [TOP / "README.md", *sorted((TOP / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Lines of the sh blocks, in order, without comments; each once."""
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    stripped = [re.sub(r"\s+#.*$", "", line).strip() for line in lines]
    return list(dict.fromkeys(line for line in stripped if line))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_study_files_in_the_docs_are_valid(page: Path, tmp_path: Path) -> None:
    from harness.study.cells import build_grid
    from harness.study.groups import groups_of
    from harness.study.schema import load_study

    for i, text in enumerate(b for b in blocks(page, "yaml") if "axes:" in b):
        file = tmp_path / f"{i}.yaml"
        file.write_text(text)
        grid = build_grid(load_study(file))
        assert grid.cells
        if grid.loaded.study.tune is not None:
            assert groups_of(grid)


def profiles_of(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings file that a page shows."""
    (text,) = [b for b in blocks(TOP / "docs" / page, "yaml") if "profiles:" in b]
    file = folder / "settings.yaml"
    file.write_text(text)
    monkeypatch.setenv("HARNESS_SETTINGS", str(file))
    return load_settings()


def test_the_settings_on_the_page_of_clusters_load_with_the_values_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = profiles_of("cluster.md", tmp_path, monkeypatch)
    assert (shown.cluster, shown.root) == ("lab", Path("/shared/me/runs"))
    lab = Slurm(
        partition="gpu",
        account="vision",
        gpus_per_node=8,
        cpus_per_gpu=12,
        time=24 * 3600.0,
        signal_s=120,
        parallel=16,
        setup=["module load cuda/12.8"],
        env={"NCCL_SOCKET_IFNAME": "ib0"},
        sbatch={"mail-type": "FAIL"},
    )
    pair = Hosts(kind="hosts", hostfile=Path("~/hosts"))
    assert shown.profiles == {"lab": lab, "pair": pair}
    monkeypatch.delenv("HARNESS_CLUSTER", raising=False)
    assert find_profile(None) == ("lab", lab) and find_profile("pair") == ("pair", pair)


def test_the_pages_name_every_field_of_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = profiles_of("cluster.md", tmp_path, monkeypatch).profiles["lab"]
    page = " ".join((TOP / "docs/cluster.md").read_text().split())
    (further,) = re.findall(r"Further fields: (.*?)\. ", page)
    named = set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", further)))
    assert lab.model_fields_set | named == Slurm.model_fields.keys()
    assert not lab.model_fields_set & named
    (pair,) = profiles_of("hosts.md", tmp_path, monkeypatch).profiles.values()
    assert pair.model_fields_set == Hosts.model_fields.keys()


def test_the_resources_on_the_page_of_clusters_fit_the_profile_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.launch.batch import options_of
    from harness.study.cells import build_grid
    from harness.study.schema import load_study

    lab = profiles_of("cluster.md", tmp_path, monkeypatch).profiles["lab"]
    assert isinstance(lab, Slurm)
    (rules,) = [b for b in blocks(TOP / "docs/cluster.md", "yaml") if b.startswith("resources:")]
    file = tmp_path / "study.yaml"
    file.write_text(
        "name: large\n"
        "axes: {size: [l, h, 2b], data: [1k], init: [random]}\n"
        "defaults: {dataset: scenes-4k, image_size: 24, patch: 4}\n"
        "stages: {wsp: {duration: {samples: 2k}}}\n" + rules
    )
    asked = {}
    for stage in build_grid(load_study(file)).stages.values():
        options = options_of(stage, lab, "large", "large.t", 0, "")
        needs = tuple(options[k] for k in ("nodes", "gpus_per_node", "time"))
        asked[stage.config.size] = (*needs, stage.execution.activation_checkpointing)
    day = 24 * 60
    assert asked == {
        "l": (1, 8, day, False),
        "h": (1, 8, day, False),
        "2b": (8, 8, day, True),
    }


def test_ids_in_the_docs_are_those_of_the_shipped_studies() -> None:
    from harness.study.cells import build_grid
    from harness.study.schema import load_study

    grid = build_grid(load_study(TOP / "grids/smoke.yaml"))
    known = {c.id for c in grid.cells} | set(grid.stages)
    text = "".join(block for page in PAGES for block in blocks(page, "text"))
    shown = set(re.findall(r"^ *(\S+-[0-9a-f]{10,12}) ", text, re.MULTILINE))
    assert len(shown) >= 4
    assert shown <= known, shown - known


def test_make_targets_exist() -> None:
    for command in commands():
        if command.startswith("make "):
            done = subprocess.run(
                ["make", "-n", *command.split()[1:]], cwd=TOP, capture_output=True, check=False
            )
            assert done.returncode == 0, command


@pytest.mark.long
def test_every_command_runs_in_order(tmp_path: Path) -> None:
    shutil.copytree(TOP / "grids", tmp_path / "grids")
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HARNESS_DEVICE": "cpu",
        "HARNESS_CORES": "2",
    }
    env.pop("HARNESS_ROOT", None)
    ours = [c for c in commands() if c.startswith(OURS)]
    assert len(ours) >= 8
    for command in ours:
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "reports/smoke/index.html").exists()
    others = [c for c in commands() if not c.startswith((*OURS, "make "))]
    assert others == [UNIVERSAL], f"nobody runs these: {others}"


@pytest.mark.long
def test_the_report_to_deepspeed_says_what_happens() -> None:
    """A universal checkpoint drifts after the load; mended as the report says, it does not."""
    command = [sys.executable, *UNIVERSAL.split()[1:]]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True)
    parts = re.split(r"^(never stopped|loaded|mended)$", done.stdout, flags=re.MULTILINE)
    losses = {
        name: re.findall(r"^1\d (0\.\d+)$", text, re.MULTILINE)
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    assert {len(found) for found in losses.values()} == {10}
    assert losses["mended"] == losses["never stopped"]
    assert losses["loaded"][0] == losses["never stopped"][0]
    assert all(
        a != b for a, b in zip(losses["loaded"][1:], losses["never stopped"][1:], strict=True)
    )
    assert "is [0.5, 0.5]; one step count for all groups: True" in done.stdout
    shown = (TOP / "docs/deepspeed_universal_checkpoint.md").read_text()
    wanted = [float(loss) for loss in re.findall(r"^1[19] (0\.\d+)$", shown, re.MULTILINE)]
    whole, loaded = losses["never stopped"], losses["loaded"]
    found = [float(x) for x in (whole[1], whole[9], loaded[1], loaded[9], whole[1], whole[9])]
    assert found == pytest.approx(wanted, abs=2e-5)
