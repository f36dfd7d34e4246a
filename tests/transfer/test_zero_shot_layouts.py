"""The zero-shot protocol from the command line, on sets in the layouts they really come in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from harness.data.captions import draw
from harness.data.pack import pack
from harness.data.sources.imagenet import imagenet_wnids
from harness.errors import UserError
from harness.study.cells import build_grid
from harness.study.schema import load_study
from tests.conftest import Harness
from tests.models.text_folders import tiny_xlm_roberta

WNIDS = [imagenet_wnids()[place] for place in (1, 7, 300)]
RNG = np.random.default_rng(0)

STUDY = """\
name: words
axes: {size: [d16x2], data: [32], init: [random]}
defaults: {dataset: sets/captions, image_size: 32}
stages:
  wsp: {duration: {steps: 3}, batch: 8}
  transfer:
    lit:
      protocol: lit
      duration: {epochs: 2}
      batch: 16
      text: {width: 16, depth: 1, heads: 2}
    imagenet:
      protocol: zero_shot
      of: lit
      dataset: sets/imagenet
      names: names.yaml
      templates: prompts.txt
    food: {protocol: zero_shot, of: lit, dataset: sets/food}
    retrieval: {protocol: retrieval, of: lit, recalls: [1, 5]}
"""


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)


def img2dataset(folder: Path) -> None:
    """Shards as img2dataset writes them: a tar with .jpg, .txt and .json, two files beside it."""
    folder.mkdir(parents=True)
    drawn = draw("train", 0, 60)
    for shard in range(2):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for place in range(30):
                key, number = f"{shard:05d}{place:04d}", shard * 30 + place
                caption = drawn.captions[number][0]
                jpeg = io.BytesIO()
                Image.fromarray(drawn.pixels[number]).resize((48, 40)).save(jpeg, "JPEG")
                about = {"url": f"https://example.org/{key}", "caption": caption, "key": key}
                about |= {"status": "success", "error_message": None, "width": 48, "height": 40}
                rows.append(about)
                for suffix, raw in (
                    ("jpg", jpeg.getvalue()),
                    ("json", json.dumps(about).encode()),
                    ("txt", caption.encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 30}))


def imagenet(folder: Path) -> None:
    for wnid in WNIDS:
        for number in range(3):
            picture(folder / "train" / wnid / f"{wnid}_{number}.JPEG")
            name = f"ILSVRC2012_val_{WNIDS.index(wnid) * 3 + number + 1:08d}.JPEG"
            picture(folder / "val" / wnid / name)


def food_101(folder: Path) -> None:
    names = ("apple_pie", "baby_back_ribs", "ice_cream")
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for place, name in enumerate(names):
        for number in range(4):
            picture(folder / "images" / name / f"{place}{number}.jpg")
            lists["train" if number else "test"].append(f"{name}/{place}{number}")
    meta = folder / "meta"
    meta.mkdir()
    for split, own in lists.items():
        (meta / f"{split}.txt").write_text("".join(f"{line}\n" for line in own))
    (meta / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    labels = (name.replace("_", " ").capitalize() for name in names)
    (meta / "labels.txt").write_text("".join(f"{label}\n" for label in labels))


def sources(top: Path) -> dict[str, Path]:
    """Set -> its folder as it was published; and the files that a user writes, in `top`."""
    names = {WNIDS[0]: "goldfish", WNIDS[1]: ["cock", "rooster"], WNIDS[2]: ["tiger beetle"]}
    (top / "names.yaml").write_text(json.dumps(names))
    (top / "prompts.txt").write_text("a photo of a {}\n\nthe {} in the wild\n")
    img2dataset(top / "raw" / "captions")
    imagenet(top / "raw" / "imagenet")
    food_101(top / "raw" / "food" / "food-101")
    return {name: top / "raw" / name for name in ("captions", "imagenet", "food")}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the packed sets and the user's files."""
    top = tmp_path_factory.mktemp("packed")
    for name, source in sources(top).items():
        pack(str(source), top / "sets" / name)
    return top


@pytest.mark.long
def test_the_whole_protocol_runs_on_real_layouts(
    tmp_path: Path, harness: Harness, study_file: Callable[..., Path]
) -> None:
    for name, source in sources(tmp_path).items():
        harness("data", "pack", source, "--out", f"sets/{name}")
    harness("grid", study_file(STUDY), "--submit")
    results = {
        path.parent.name.split("-")[3]: (json.loads(path.read_text()), path.parent)
        for kind in ("lit", "zero_shot", "retrieval")
        for path in (tmp_path / "runs" / "stages" / kind).glob("*/result.json")
    }
    assert set(results) == {"lit", "imagenet", "food", "retrieval"}
    lit, _ = results["lit"]
    assert lit["steps"] == 6 and lit["metrics"]["val_loss"] > 0  # 2 epochs of 48 pairs or so
    for task, num_test in (("imagenet", 9), ("food", 3)):
        result, folder = results[task]
        predictions = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()
        right = [a == b for a, b in zip(predictions["label"], predictions["pred"], strict=True)]
        assert result["metrics"]["acc1"] == pytest.approx(sum(right) / num_test)
        assert len(right) == num_test and set(predictions["label"]) == {0, 1, 2}
    retrieval, folder = results["retrieval"]
    table = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pandas()
    of_text = table[table["query"] == "text"]
    assert retrieval["metrics"]["t2i_recall5"] == pytest.approx((of_text["rank"] < 5).mean())
    assert len(of_text) == retrieval["metrics"]["n_captions"] == retrieval["metrics"]["n_test"]


def ids(packed: Path, text: str) -> dict[str, str]:
    """Task -> stage id."""
    file = packed / "study.yaml"
    file.write_text(text)
    return build_grid(load_study(file, bases=(packed,))).cells[0].stages


def test_what_a_file_holds_is_the_identity_not_where_it_is(packed: Path) -> None:
    before = ids(packed, STUDY)
    (packed / "elsewhere.yaml").write_text((packed / "names.yaml").read_text())
    assert ids(packed, STUDY.replace("names.yaml", "elsewhere.yaml")) == before
    (packed / "fewer.txt").write_text("a photo of a {}\n")
    after = ids(packed, STUDY.replace("prompts.txt", "fewer.txt"))
    assert {task for task in before if before[task] != after[task]} == {"imagenet"}


def test_a_text_tower_is_its_content_wherever_it_lies(packed: Path) -> None:
    tower = "{width: 16, depth: 1, heads: 2}"
    for name in ("one", "other"):
        tiny_xlm_roberta(packed / name)
    one, other = (ids(packed, STUDY.replace(tower, name)) for name in ("one", "other"))
    assert one == other and one["lit"] != ids(packed, STUDY)["lit"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("      names: names.yaml\n", "", "calls a class 'n01443537', which is no word"),
        ("names.yaml", "absent.yaml", "no such file of class names; looked for"),
        ("names: names.yaml", "names: {n01443538: fish}", "did you mean 'n01443537'"),
        ("prompts.txt", "names.yaml", "expected a list of templates"),
        ("templates: prompts.txt", "templates: [a photo]", "expected {} once"),
        ("recalls: [1, 5]", "recalls: [1, 500]", "recall among all of them is 1"),
        ("{width: 16, depth: 1, heads: 2}", "sets", "does not give hidden_size"),
        ("{width: 16, depth: 1, heads: 2}", "{width: 15, heads: 2}", "not a multiple of heads"),
    ],
)
def test_what_is_wrong_is_said_when_the_study_is_planned(
    packed: Path, old: str, new: str, message: str
) -> None:
    assert old in STUDY
    with pytest.raises(UserError, match=message.replace("{}", r"\{\}")):
        ids(packed, STUDY.replace(old, new, 1))


def test_a_micro_batch_below_the_share_is_refused_when_the_study_is_planned(
    packed: Path,
) -> None:
    rule = "resources: [{match: {stage: lit}, set: {micro_batch: 4}}]\n"
    with pytest.raises(UserError, match="a micro_batch of 4 is less than a rank's share"):
        ids(packed, STUDY + rule)
