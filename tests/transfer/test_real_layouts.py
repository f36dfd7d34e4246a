"""ImageNet-1k and iNaturalist 2018 in miniature, in their own files: packed, and every protocol."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from harness.data.pack import pack
from harness.data.sources.imagenet import imagenet_wnids
from harness.ledger.files import read_json
from tests.conftest import Harness

pytestmark = pytest.mark.slow

SPECIES = {0: 14, 1: 14, 2: 14, 3: 3, 4: 1}
"""Training images of each species: two have fewer than ten, one has a single one."""


def picture(path: Path, class_id: int, number: int) -> None:
    """A JPEG whose stripes tell its class; sizes differ, as those of photographs do."""
    rng = np.random.default_rng((class_id, number, len(path.name)))
    height, width = 40 + int(rng.integers(0, 20)), 40 + int(rng.integers(0, 20))
    place = np.arange(width)[None, :] * (class_id % 3 + 1) + np.arange(height)[:, None] * class_id
    stripes = 90 * np.sin(place / 4)[..., None] * np.array([1, class_id % 2, 0.3])
    pixels = 128 + stripes + rng.normal(0, 25, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def imagenet(src: Path) -> None:
    """train/<wnid>/<wnid>_<n>.JPEG, and val flat with the numbers of the development kit."""
    wnids = imagenet_wnids()[::200]
    for class_id, wnid in enumerate(wnids):
        for number in range(12):
            picture(src / "train" / wnid / f"{wnid}_{number}.JPEG", class_id, number)
    truth = [class_id for class_id in range(len(wnids)) for _ in range(6)]
    rows = []
    for number, class_id in enumerate(truth, start=1):
        name = f"ILSVRC2012_val_{number:08d}"
        picture(src / "val" / f"{name}.JPEG", class_id, 1000 + number)
        rows.append(f"{name},{wnids[class_id]} 1 2 30 40")
    (src / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")


def inaturalist(src: Path) -> None:
    """train_val2018/<group>/<species>/<hash>.jpg, and COCO-like lists of train and val."""
    categories = [{"id": k, "name": str(k), "supercategory": "Aves"} for k in SPECIES]
    for split, counts in (("train", SPECIES), ("val", dict.fromkeys(SPECIES, 3))):
        images, annotations = [], []
        for class_id, count in counts.items():
            for _ in range(count):
                number = len(images) + (1000 if split == "val" else 0)
                name = hashlib.md5(f"{split}{number}".encode()).hexdigest()
                file = f"train_val2018/Aves/{class_id}/{name}.jpg"
                picture(src / file, class_id, number)
                images.append({"id": number, "file_name": file, "width": 50, "height": 50})
                annotations.append({"id": number, "image_id": number, "category_id": class_id})
        whole = {"images": images, "annotations": annotations, "categories": categories}
        (src / f"{split}2018.json").write_text(json.dumps(whole))


STUDY = """\
name: real
axes:
  init: [random]
defaults: {size: d16x2, data: 500, dataset: scenes-2k, image_size: 24}
stages:
  transfer:
"""
TASKS = """\
    {name}_linear: {{protocol: linear_probe, dataset: {path}}}
    {name}_sgd: {{protocol: sgd_probe, dataset: {path}, batch: 16, base_lr: 1.0}}
    {name}_knn: {{protocol: knn, dataset: {path}, k: 3}}
    {name}_few_shot: {{protocol: few_shot, dataset: {path}}}
    {name}_prompts: {{protocol: prompt_tuning, dataset: {path}, epochs: 12, warmup_epochs: 1}}
"""
LAYOUTS = {"imagenet": imagenet, "inaturalist": inaturalist}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each packed set."""
    top = tmp_path_factory.mktemp("packed")
    for name, make in LAYOUTS.items():
        make(top / f"src-{name}")
        report = pack(str(top / f"src-{name}"), top / name)
        assert report.refused == []
    return {name: top / name for name in LAYOUTS}


def submitted(harness: Harness, root: Path, text: str) -> dict[str, Path]:
    """Task -> folder of its stage, after the study has run below this root."""
    root.mkdir()
    file = root / "real.yaml"
    file.write_text(text)
    harness("grid", file, "--submit", env={"HARNESS_CORES": "2", "HARNESS_ROOT": str(root)})
    (cell,) = (json.loads(line) for line in (root / "studies/real/cells.jsonl").open())
    return {
        task: root / "stages" / cell["kinds"][stage] / stage
        for task, stage in cell["stages"].items()
    }


def tensors(folder: Path, kinds: tuple[str, ...]) -> dict[str, bytes]:
    """Content of the files that stages of these kinds were cut into, by stage and name."""
    found = [path for kind in kinds for path in folder.glob(f"stages/{kind}/*/*/*.safetensors")]
    return {"/".join(path.parts[-3:]): path.read_bytes() for path in found}


@pytest.mark.long
def test_two_ranks_leave_the_bytes_of_one(
    harness: Harness, tmp_path: Path, packed: dict[str, Path]
) -> None:
    text = STUDY + TASKS.format(name="inaturalist", path=packed["inaturalist"])
    one = submitted(harness, tmp_path / "one", text)
    # What each task was solved by is the same, so its numbers are.
    two = submitted(harness, tmp_path / "two", text + "resources: {ranks: 2, threads: 1}\n")
    kinds = ("features", "prompt_tuning")
    wanted = tensors(tmp_path / "one", kinds)
    assert len(wanted) == 2 + 15 + 1
    assert tensors(tmp_path / "two", kinds) == wanted
    assert one.keys() == two.keys()
    for task, folder in two.items():
        first, second = (read_json(f / "result.json") or {} for f in (one[task], folder))
        assert first["metrics"] == second["metrics"]
        assert (first["processes"], second["processes"]) == (1, 2)


@pytest.mark.long
def test_every_protocol_runs_on_the_real_layouts(
    harness: Harness, tmp_path: Path, packed: dict[str, Path]
) -> None:
    text = STUDY + "".join(TASKS.format(name=name, path=path) for name, path in packed.items())
    folders = submitted(harness, tmp_path / "runs", text)
    features = list((tmp_path / "runs/stages/features").iterdir())
    assert len(features) == 2  # one pass for each set
    sources = {"imagenet": 30, "inaturalist": 15}
    for name, num_test in sources.items():
        for task in ("linear", "sgd", "knn", "few_shot", "prompts"):
            folder = folders[f"{name}_{task}"]
            result = read_json(folder / "result.json")
            assert result is not None
            metrics = result["metrics"]
            assert metrics["n_test"] == num_test
            wanted = (
                {f"acc1_{k}shot" for k in (1, 5, 10)}
                if task in ("few_shot", "prompts")
                else {"acc1"}
            )
            samples = pd.read_parquet(folder / "samples.parquet")
            means = samples.groupby("metric", observed=True)["value"].mean().to_dict()
            assert means.keys() == wanted
            assert means == pytest.approx({metric: metrics[metric] for metric in wanted})
            assert max(means.values()) > 0.4, (name, task, means)  # five classes
            assert samples["key"].nunique() == num_test
            begin = {"imagenet": "val/n", "inaturalist": "train_val2018/Aves/"}[name]
            assert samples["key"].str.startswith(begin).all()
