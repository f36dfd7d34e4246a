"""Sets with lists of their own, and which layout a folder is taken for."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from harness.data.pack import pack
from harness.errors import UserError
from tests.data.layouts import Read, coco, dump, image, text
from tests.data.test_images import MP4, WEBM

# --- Food-101, iNaturalist ---------------------------------------------------------------------


def test_food_101_has_its_own_lists(tmp_path: Path) -> None:
    src = tmp_path / "food-101"
    for name in ("apple_pie/11", "apple_pie/12", "baby_back_ribs/21", "baby_back_ribs/23"):
        image(src / "images" / f"{name}.jpg")
    text(src / "meta" / "classes.txt", "apple_pie", "baby_back_ribs")
    text(src / "meta" / "labels.txt", "Apple pie", "Baby back ribs")
    text(src / "meta" / "train.txt", "apple_pie/11", "baby_back_ribs/21")
    text(src / "meta" / "test.txt", "apple_pie/12", "baby_back_ribs/22")
    read = Read(tmp_path, tmp_path)
    assert read.classes("train") == {
        "images/apple_pie/11_jpg": "apple_pie",
        "images/baby_back_ribs/21_jpg": "baby_back_ribs",
    }
    assert read.classes("test") == {"images/apple_pie/12_jpg": "apple_pie"}
    assert list(read.notes("refused")) == ["images/baby_back_ribs/22.jpg"]
    assert list(read.notes("left_out")) == ["images/baby_back_ribs/23.jpg"]
    categories = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert categories[1] == {"name": "baby_back_ribs", "label": "Baby back ribs"}


@pytest.mark.parametrize("is_named", [False, True])
def test_inaturalist_has_one_species_per_image(tmp_path: Path, is_named: bool) -> None:
    src = tmp_path / "src"
    categories = [{"id": k, "name": str(k), "supercategory": "Aves"} for k in (0, 1, 2)]
    for split, species in (("train", (2, 0, 2)), ("val", (1,))):
        images, annotations = [], []
        for number, category in enumerate(species):
            name = f"train_val2018/Aves/{category}/{split}{number}.jpg"
            image(src / name)
            images.append({"id": 10 + number, "file_name": name, "width": 24, "height": 20})
            annotations.append({"id": number, "image_id": 10 + number, "category_id": category})
        whole = {"images": images, "annotations": annotations, "categories": categories}
        dump(src / f"{split}2018.json", whole)
    names = ["0", "1", "2"]
    if is_named:
        names = ["Corvus corax", "Pica pica", "Turdus merula"]
        named = [{"id": k, "name": name, "class": "Aves"} for k, name in enumerate(names)]
        dump(src / "categories.json", named[::-1])
    (src / "train_val2018/Aves/2/train2.jpg").unlink()
    read = Read(src, tmp_path)
    assert read.meta.classes == names
    assert sorted(read.classes("train").values()) == sorted([names[2], names[0]])
    assert list(read.classes("test").values()) == [names[1]]
    assert list(read.notes("refused")) == ["train_val2018/Aves/2/train2.jpg"]


# --- videos ------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_folders", [False, True])
def test_kinetics_finds_its_videos_by_name(tmp_path: Path, in_folders: bool) -> None:
    src = tmp_path / "src"
    header = ["label", "youtube_id", "time_start", "time_end", "split"]
    rows = {
        "train": [
            ["abseiling", "-3B32lodo2M", 59, 69, "train"],
            ["playing cards, fast", "xyz", 0, 10, "train"],
            ["abseiling", "gone", 1, 11, "train"],
        ],
        "val": [["abseiling", "v_1", 7, 17, "validate"]],
        "test": [["abseiling", "t_1", 7, 17, "test"]],
    }
    for split, entries in rows.items():
        (src / "annotations").mkdir(parents=True, exist_ok=True)
        with open(src / "annotations" / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *entries])
        for label, video, begin, end, _ in entries:
            if video == "gone":
                continue
            folder = src / split / (str(label).replace(" ", "_") if in_folders else "")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{video}_{begin:06d}_{end:06d}.mp4").write_bytes(MP4)
    (src / "train" / "stray_000001_000011.mp4").write_bytes(MP4)
    broken = next(src.rglob("xyz_*"))
    broken.write_bytes(MP4[:-20])
    read = Read(src, tmp_path)
    assert read.meta.classes == ["abseiling", "playing cards, fast"]
    assert read.classes("train") == {"-3B32lodo2M_000059_000069_mp4": "abseiling"}
    (sample,) = read.samples("test").values()
    assert sample["mp4"] == MP4 and sample["__key__"] == "v_1_000007_000017_mp4"
    assert read.split("test").read(0) == MP4  # the index points at the video
    refused = read.notes("refused")
    assert set(refused) == {"gone_000001_000011", broken.relative_to(src).as_posix()}
    left_out = read.notes("left_out")
    assert left_out["train/stray_000001_000011.mp4"] == "not in the lists"
    assert left_out["test"].startswith("1 videos")


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_something_something_has_templates_for_classes(tmp_path: Path, prefix: str) -> None:
    src = tmp_path / "src"
    templates = ["Pushing [something] so that it falls", "Holding [something]"]
    names = [template.replace("[", "").replace("]", "") for template in templates]
    dump(src / "labels" / f"{prefix}labels.json", {names[0]: "1", names[1]: "0"})
    for split, numbers in (("train", (78687, 42, 43)), ("validation", (74225,)), ("test", (5,))):
        entries = []
        for number in numbers:
            entry = {"id": str(number)}
            if split != "test":
                template = templates[number % 2]
                label = template.replace("[something]", "potato").lower()
                entry |= {"label": label, "template": template, "placeholders": ["potato"]}
            entries.append(entry)
            if number != 43:
                path = src / "20bn-something-something-v2" / f"{number}.webm"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(WEBM)
        dump(src / "labels" / f"{prefix}{split}.json", entries)
    read = Read(src, tmp_path)
    assert read.meta.classes == [names[1], names[0]]
    assert read.classes("train") == {"78687_webm": names[1], "42_webm": names[0]}
    assert read.classes("test") == {"74225_webm": names[1]}
    assert read.fields("test")["74225_webm"] == {"caption": "holding potato"}
    assert read.samples("test")["74225_webm"]["webm"] == WEBM
    assert list(read.notes("refused")) == ["43"]
    assert read.notes("left_out") == {f"{prefix}test.json": "1 videos without labels"}


# --- which layout ------------------------------------------------------------------------------


def test_a_folder_that_could_be_two_layouts_asks_which(tmp_path: Path) -> None:
    coco(tmp_path / "src")
    dump(tmp_path / "src" / "lvis_v1_val.json", {})
    with pytest.raises(UserError, match="src: could be coco or lvis; say which: --layout coco"):
        pack(str(tmp_path / "src"), tmp_path / "out")
    assert pack(str(tmp_path / "src"), tmp_path / "out", layout="coco").meta.num_classes == 3


def test_a_misspelt_layout_or_split_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--layout imagnet-1k: unknown; did you mean 'imagenet-1k"):
        pack(str(tmp_path), tmp_path / "out", layout="imagnet-1k")
    with pytest.raises(UserError, match="--split dev: unknown; known: pretrain, val, train, test"):
        pack("digits", tmp_path / "out", split="dev")
    with pytest.raises(UserError, match="--split train: layout digits has splits of its own"):
        pack("digits", tmp_path / "out", split="train")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("imagenet-1k", "not ImageNet-1k: expected train/<wnid>/ or val/"),
        ("imagenet-real", "no real.json"),
        ("objectnet", "not ObjectNet"),
        ("food-101", "not Food-101"),
        ("coco", "not coco: expected annotations/instances_train2017.json"),
        ("lvis", "not lvis: expected lvis_v1_train.json"),
        ("inaturalist-2018", "expected train2018.json"),
        ("kinetics-400", "no train.csv or val.csv"),
        ("something-something-v2", "no labels.json and train.json"),
        ("webdataset", "nothing to pack was found"),
        ("image-folder", "nothing to pack was found"),
        ("imagenet-v2", "nothing to pack was found"),
    ],
)
def test_a_folder_that_is_not_of_its_layout_says_what_was_expected(
    tmp_path: Path, layout: str, message: str
) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        pack(str(tmp_path / "src"), tmp_path / "out", layout=layout)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
