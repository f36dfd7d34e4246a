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
    assert len(plan["cells"]) == 48  # 3 sizes x 4 data sizes x 2 inits x 2 seeds
    assert {s["feeds"] for s in plan["stages"] if s["kind"] == "mae"} == {4}

    small = tmp_path / "small.yaml"
    text = GRID.read_text().replace("64k}", "4k}").replace("{samples: 16k}", "{samples: 8k}")
    small.write_text(text.replace("name: fashion_mnist", "name: small"))
    chosen = ("--only", "size=d32x3,data=full,seed=0")
    harness("grid", small, "--submit", *chosen, env={"HARNESS_CORES": "2"})
    probes = [
        json.loads(p.read_text())["metrics"]["acc1"]
        for p in tmp_path.glob("runs/stages/linear_probe/*/result.json")
    ]
    # Ten classes: chance is 0.10. A random encoder's features reach about 0.6 here.
    assert len(probes) == 2 and all(0.5 < p < 1 for p in probes), probes
    done = harness("report", "small", "--out", "reports")
    page = (tmp_path / "reports/small/index.html").read_text()
    assert "44" in done.stdout or "44" in page  # the cells that were not run are shown as missing
