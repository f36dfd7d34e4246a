"""ImageNet-1k, ReaL, ImageNetV2, ObjectNet and iNaturalist 2018 in miniature."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from harness.data.pack import pack
from harness.data.sources.imagenet import imagenet_wnids
from harness.ledger.files import read_json
from tests.conftest import Harness
from tests.transfer.test_real_layouts import imagenet, inaturalist, picture, submitted

pytestmark = pytest.mark.slow

PLACES = range(0, 1000, 200)
"""ImageNet's numbers of the five classes that the miniature of it has."""


def real(src: Path) -> None:
    """val/ with real.json: one label, two labels, none."""
    labels = []
    for number in range(1, 16):
        own = (number - 1) % 5
        picture(src / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", own, 2000 + number)
        others = [PLACES[(own + 1) % 5]] if number % 3 == 0 else []
        labels.append([] if number % 5 == 0 else [PLACES[own], *others])
    (src / "real.json").write_text(json.dumps(labels))


def imagenet_v2(src: Path) -> None:
    """<class number>/<hash>.jpeg."""
    top = src / "imagenetv2-matched-frequency-format-val"
    for own, place in enumerate(PLACES):
        for number in range(3):
            picture(top / str(place) / f"{number:016x}.jpeg", own, 3000 + number)


def objectnet(src: Path) -> None:
    """images/<folder>/*.png and mappings/: a class for two of ImageNet's, one, and none."""
    top = src / "objectnet-1.0"
    for folder, own in (("plates", 0), ("t_shirt", 3), ("air_freshener", 1)):
        for number in range(4):
            picture(top / "images" / folder / f"{number:015x}.png", own, 4000 + number)
    mappings = top / "mappings"
    mappings.mkdir()
    contents = {
        "folder_to_objectnet_label.json": {
            "plates": "Plate",
            "t_shirt": "T-shirt",
            "air_freshener": "Air freshener",
        },
        "objectnet_to_imagenet_1k.json": {"Plate": "first; second", "T-shirt": "fourth"},
        "pytorch_to_imagenet_2012_id.json": {str(PLACES[k]): k for k in range(5)},
    }
    for name, content in contents.items():
        (mappings / name).write_text(json.dumps(content))
    names = ["first", "second", "third", "fourth", "fifth"]
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(names) + "\n")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "imagenet": imagenet,
    "inaturalist": inaturalist,
    "real": real,
    "v2": imagenet_v2,
    "objectnet": objectnet,
}
STUDY = """\
name: real
axes:
  init: [random]
defaults: {{size: d16x2, data: 500, dataset: scenes-2k}}
stages:
  transfer:
    in1k:
      protocol: fine_tune
      dataset: {top}/imagenet
      image_size: 48
      duration: {{steps: 40}}
      batch: 16
      lr: 5e-3
      rand_augment: rand-m9-mstd0.5-inc1
      erase: 0.25
      mixup: 0.8
      cutmix: 1.0
      ema: 0.9
      ema_warmup: true
    inat: {{protocol: fine_tune, dataset: {top}/inaturalist, duration: {{steps: 10}}, batch: 16}}
    in_real: {{protocol: evaluate, of: in1k, dataset: {top}/real}}
    in_v2: {{protocol: evaluate, of: in1k, dataset: {top}/v2, crop: centre}}
    in_objectnet: {{protocol: evaluate, of: in1k, dataset: {top}/objectnet, among: present}}
"""


@pytest.mark.long
def test_one_fine_tuned_model_is_judged_on_the_real_layouts(
    harness: Harness, tmp_path: Path
) -> None:
    for name, make in LAYOUTS.items():
        make(tmp_path / f"src-{name}")
        assert pack(str(tmp_path / f"src-{name}"), tmp_path / name).refused == []
    folders = submitted(harness, tmp_path / "runs", STUDY.format(top=tmp_path))
    counts = {"in1k": 30, "inat": 15, "in_real": 12, "in_v2": 15, "in_objectnet": 8}
    wnids = imagenet_wnids()
    for task, count in counts.items():
        result = read_json(folders[task] / "result.json")
        assert result is not None
        metrics = result["metrics"]
        assert metrics["n_test"] == count, task
        samples = pyarrow.parquet.read_table(folders[task] / "samples.parquet").to_pandas()
        own = samples[samples.metric == "acc1"]
        assert len(own) == count and own.value.mean() == pytest.approx(metrics["acc1"])
    table = pyarrow.parquet.read_table(folders["in_real"] / "predictions.parquet").to_pylist()
    assert {len(row["right"]) for row in table} == {1, 2}
    objects = pyarrow.parquet.read_table(folders["in_objectnet"] / "predictions.parquet")
    # Outputs of the model are sorted WordNet ids: places in the miniature's five classes.
    assert sorted(wnids[place] for place in PLACES) == [wnids[place] for place in PLACES]
    right = {tuple(row["right"]) for row in objects.to_pylist()}
    assert right == {(0, 1), (3,)}
    assert {row["pred"] for row in objects.to_pylist()} <= {0, 1, 3}
