"""A small study on the real Fashion-MNIST files, from packing to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Harness

FILES = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
GRID = Path(__file__).parents[1] / "grids" / "fashion_mnist.yaml"

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.mark.skipif(not FILES.is_dir(), reason="Debian's package dataset-fashion-mnist is absent")
def test_pack_plan_run_and_report(harness: Harness, tmp_path: Path) -> None:
    packed = harness("data", "pack", FILES, "--out", "data/fashion_mnist")
    assert "train 60000, test 10000 images, 10 classes" in packed.stdout
    meta = json.loads((tmp_path / "data/fashion_mnist/dataset.json").read_text())
    assert meta["classes"][9] == "ankle boot" and meta["image_size"] == 28

    plan = json.loads(harness("grid", GRID, "--json").stdout)
    # 3 sizes x 4 data sizes x 2 inits x 2 seeds, and 4 longer random runs
    assert len(plan["cells"]) == 48 + 4
    assert {s["feeds"] for s in plan["stages"] if s["kind"] == "mae"} == {4}

    small = tmp_path / "small.yaml"
    text = GRID.read_text().replace("name: fashion_mnist", "name: small")
    for long, short in (("96k}", "4k}"), ("{samples: 16k}", "{samples: 8k}"), ("76k}", "12k}")):
        assert long in text
        text = text.replace(long, short)
    small.write_text(text)
    chosen = ("--only", "size=d32x3,data=16k,seed=0")
    harness("grid", small, "--submit", *chosen, env={"HARNESS_CORES": "2"})
    probes = [
        json.loads(p.read_text())["metrics"]["acc1"]
        for p in tmp_path.glob("runs/stages/linear_probe/*/result.json")
    ]
    # Ten classes: chance is 0.10. A random encoder's features reach about 0.6 here.
    assert len(probes) == 3 and all(0.5 < p < 1 for p in probes), probes
    # The cells that were not run are counted as missing.
    done = harness("report", "small", "--out", "reports")
    assert "Partial: 3 of 52 cells are finished (49 missing)." in done.stdout
