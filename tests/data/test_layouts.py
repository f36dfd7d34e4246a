"""Published datasets, in miniature but in the folders and files they really come in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from webdataset.compat import WebDataset

from harness.data.dataset import Split, open_dataset
from harness.data.images import ImageOptions
from harness.data.pack import PackReport, pack
from harness.data.sources.imagenet import imagenet_wnids
from harness.errors import UserError
from tests.data.test_images import MP4, WEBM

RNG = np.random.default_rng(0)
WNIDS = imagenet_wnids()


def image(path: Path, size: tuple[int, int] = (24, 20)) -> Path:
    """A picture of this width and height that no other file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def dump(path: Path, value: object) -> None:
    text(path, json.dumps(value))


class Read:
    """A packed set, read back by stock webdataset."""

    def __init__(self, src: Path, work: Path, **options: Any) -> None:
        self.report: PackReport = pack(str(src), work / "out", **options)
        self.meta, self._out, self._root = self.report.meta, work / "out", work / "root"

    def samples(self, split: str) -> dict[str, dict[str, Any]]:
        urls = [str(self._out / str(entry["file"])) for entry in self.meta.shards[split]]
        read = WebDataset(urls, shardshuffle=False)
        samples = {sample["__key__"]: sample for sample in read}
        assert len(samples) == self.meta.splits[split]
        return samples

    def classes(self, split: str) -> dict[str, str]:
        """Class name by key."""
        samples = self.samples(split)
        return {key: self.meta.classes[int(s["cls"])] for key, s in samples.items()}

    def fields(self, split: str) -> dict[str, dict[str, Any]]:
        """Content of .json by key."""
        return {key: json.loads(sample["json"]) for key, sample in self.samples(split).items()}

    def split(self, name: str) -> Split:
        return open_dataset(str(self._out), self._root).split(name)

    def notes(self, name: str) -> dict[str, str]:
        """Lines of refused.txt and its like."""
        path = self._out / f"{name}.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return dict(line.split("\t") for line in lines)


# --- ImageNet ----------------------------------------------------------------------------------

TRUTH = {1: WNIDS[7], 2: WNIDS[3], 3: WNIDS[7]}


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def train_images(folder: Path) -> None:
    for wnid in (WNIDS[7], WNIDS[3]):
        for number in range(3):
            image(folder / "train" / wnid / f"{wnid}_{number}.JPEG")


def in_class_folders(folder: Path) -> None:
    for number, wnid in TRUTH.items():
        image(folder / "val" / wnid / val_name(number))


def flat_with_devkit(folder: Path) -> None:
    for number in TRUTH:
        image(folder / "val" / val_name(number))
    devkit = folder / "ILSVRC2012_devkit_t12" / "data"
    # The devkit numbers classes in an order of its own.
    number_of = {WNIDS[7]: 1, WNIDS[3]: 2}
    text(
        devkit / "ILSVRC2012_validation_ground_truth.txt",
        *(str(number_of[wnid]) for wnid in TRUTH.values()),
    )
    dtype = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    synsets = np.array([(k, w, "words, more") for w, k in number_of.items()], dtype=dtype)
    savemat(devkit / "meta.mat", {"synsets": synsets.reshape(-1, 1)})


def flat_from_kaggle(folder: Path) -> None:
    place = folder / "ILSVRC" / "Data" / "CLS-LOC"
    (folder / "train").rename(place.mkdir(parents=True) or place / "train")
    for number in TRUTH:
        image(place / "val" / val_name(number))
    image(place / "test" / "ILSVRC2012_test_00000001.JPEG")
    rows = [f"{val_name(k)[:-5]},{wnid} 1 2 30 40 {wnid} 5 6 7 8" for k, wnid in TRUTH.items()]
    text(folder / "LOC_val_solution.csv", "ImageId,PredictionString", *rows)
    text(folder / "LOC_synset_mapping.txt", f"{WNIDS[3]} some fish")


@pytest.mark.parametrize("make", [in_class_folders, flat_with_devkit, flat_from_kaggle])
def test_imagenet_has_the_same_keys_and_classes_in_all_its_layouts(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    train_images(tmp_path / "src")
    make(tmp_path / "src")
    read = Read(tmp_path / "src", tmp_path)
    assert read.meta.classes == [WNIDS[3], WNIDS[7]] and read.report.refused == []
    assert read.classes("test") == {
        f"val/{wnid}/{val_name(number)[:-5]}_jpeg": wnid for number, wnid in TRUTH.items()
    }
    train = read.classes("train")
    assert len(train) == 6 and all(key.split("/")[1] == wnid for key, wnid in train.items())
    if make is flat_from_kaggle:
        assert read.notes("left_out") == {
            "ILSVRC/Data/CLS-LOC/test": "ImageNet's test images have no published labels"
        }


def test_imagenet_in_class_folders_is_the_image_folder_it_is(tmp_path: Path) -> None:
    train_images(tmp_path / "src")
    in_class_folders(tmp_path / "src")
    one = pack(str(tmp_path / "src"), tmp_path / "a", layout="imagenet-1k").meta
    two = pack(str(tmp_path / "src"), tmp_path / "b", layout="image-folder").meta
    assert one.fingerprint == two.fingerprint


def test_a_flat_val_without_its_truth_says_what_is_missing(tmp_path: Path) -> None:
    image(tmp_path / "src" / "val" / val_name(1))
    with pytest.raises(UserError, match=r"labels are not here: expected ILSVRC2012_devkit_t12"):
        pack(str(tmp_path / "src"), tmp_path / "out")


def test_real_keeps_all_labels_and_leaves_out_images_that_are_not_scored(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for number in (1, 2, 3, 5):
        image(src / "val" / val_name(number))
    dump(src / "real.json", [[5, 2], [], [999], [7]])
    read = Read(src, tmp_path)
    assert read.meta.classes == WNIDS and read.meta.splits == {"test": 2}
    keys = [f"val/{val_name(k)[:-5]}_jpeg" for k in (1, 3)]
    assert {k: v["classes"] for k, v in read.fields("test").items()} == {
        keys[0]: [2, 5],
        keys[1]: [999],
    }
    split = read.split("test")
    row = list(split.keys).index(keys[0])
    ids = split.label_ids[split.label_offsets[row] : split.label_offsets[row + 1]]
    assert ids.tolist() == [2, 5] and (split.class_ids == -1).all()
    assert read.notes("refused") == {
        val_name(4)[:-5]: "in real.json, but there is no such file",
    }
    assert set(read.notes("left_out")) == {f"val/{val_name(2)}", f"val/{val_name(5)}"}


def test_imagenet_v2_has_class_numbers_for_folders(tmp_path: Path) -> None:
    src = tmp_path / "imagenetv2-matched-frequency-format-val"
    for class_id in (0, 12, 999):
        image(src / str(class_id) / "0af3f1b55de791c4.jpeg")
    image(src / "1000" / "x.jpeg")
    read = Read(tmp_path, tmp_path)
    assert read.classes("test") == {f"{k}/0af3f1b55de791c4_jpeg": WNIDS[k] for k in (0, 12, 999)}
    assert set(read.notes("refused")) == {"1000/x.jpeg"}


def test_folders_with_numbers_are_not_taken_for_imagenet_v2(tmp_path: Path) -> None:
    for digit in range(10):
        image(tmp_path / "src" / str(digit) / "a.png")
    assert Read(tmp_path / "src", tmp_path).meta.num_classes == 10


def test_objectnet_loses_its_border_and_the_classes_imagenet_lacks(tmp_path: Path) -> None:
    src = tmp_path / "objectnet-1.0"
    clock = image(src / "images" / "alarm_clock" / "aa11.png", (30, 40))
    image(src / "images" / "alarm_clock" / "bb22.png")
    image(src / "images" / "air_freshener" / "cc33.png")
    mappings = src / "mappings"
    dump(
        mappings / "folder_to_objectnet_label.json",
        {"alarm_clock": "Alarm clock", "air_freshener": "Air freshener"},
    )
    dump(
        mappings / "objectnet_to_imagenet_1k.json",
        {"Alarm clock": "analog clock; digital clock"},
    )
    text(mappings / "imagenet_to_label_2012_v2", "kit fox", "digital clock", "analog clock")
    dump(mappings / "pytorch_to_imagenet_2012_id.json", {"278": 0, "530": 1, "409": 2})
    read = Read(tmp_path, tmp_path)
    assert read.meta.splits == {"test": 2} and read.meta.classes == WNIDS
    fields = read.fields("test")["images/alarm_clock/aa11_png"]
    assert fields == {"classes": [409, 530], "objectnet": "Alarm clock"}
    stored = read.samples("test")["images/alarm_clock/aa11_png"]["png"]
    with Image.open(clock) as before, Image.open(io.BytesIO(stored)) as after:
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before)[2:-2, 2:-2])
    assert read.notes("left_out") == {
        "images/air_freshener": "1 images: not a class of ImageNet-1k"
    }
    assert "border cut off 2" in read.report.summary()
    assert "1 classes are mapped to ImageNet's; ObjectNet's own files map 113" in (
        read.report.summary()
    )
    text(
        mappings / "imagenet_to_label_2012_v2",
        "one more",
        "kit fox",
        "digital clock",
        "analog clock",
    )
    with pytest.raises(UserError, match=r"has 4 lines and .* 3 classes, expected as many, 1000"):
        pack(str(src), tmp_path / "again")


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


# --- COCO, LVIS --------------------------------------------------------------------------------


def coco(folder: Path, under: str = "") -> None:
    # As in COCO, category ids have gaps, and some images have no objects.
    categories = [
        {"id": 18, "name": "dog", "supercategory": "animal"},
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
    ]
    for split, first in (("train", 1), ("val", 101)):
        images = [
            {"id": first + k, "file_name": f"{first + k:012d}.jpg", "width": 80, "height": 60}
            for k in range(3)
        ]
        for entry in images:
            image(folder / under / f"{split}2017" / entry["file_name"], (80, 60))
        annotations = [
            {
                "id": 7,
                "image_id": first,
                "category_id": 18,
                "bbox": [10.5, 20, 30, 12.25],
                "area": 300.5,
                "iscrowd": 0,
                "segmentation": [[1, 2, 3, 4, 5, 6]],
            },
            {
                "id": 8,
                "image_id": first,
                "category_id": 1,
                "bbox": [0, 0, 80, 60],
                "area": 4800,
                "iscrowd": 1,
                "segmentation": {"counts": [0, 2400, 2400], "size": [60, 80]},
            },
            {
                "id": 9,
                "image_id": first + 1,
                "category_id": 90,
                "bbox": [1, 2, 3, 4],
                "area": 12,
                "iscrowd": 0,
                "segmentation": [],
            },
        ]
        whole = {"images": images, "annotations": annotations, "categories": categories}
        dump(folder / "annotations" / f"instances_{split}2017.json", whole)
        dump(folder / "annotations" / f"captions_{split}2017.json", {"images": images})


@pytest.mark.parametrize("under", ["", "images"])
def test_coco_keeps_boxes_and_all_classes(tmp_path: Path, under: str) -> None:
    coco(tmp_path / "src", under)
    read = Read(tmp_path / "src", tmp_path)
    assert read.meta.classes == ["person", "dog", "toothbrush"]
    assert read.meta.splits == {"train": 3, "test": 3}
    fields = read.fields("test")
    assert fields["val2017/000000000101_jpg"] == {
        "classes": [0, 1],
        "annotations": [
            {
                "bbox": [10.5, 20, 30, 12.25],
                "class": 1,
                "area": 300.5,
                "iscrowd": 0,
                "segmentation": [[1, 2, 3, 4, 5, 6]],
            },
            {
                "bbox": [0, 0, 80, 60],
                "class": 0,
                "area": 4800,
                "iscrowd": 1,
                "segmentation": {"counts": [0, 2400, 2400], "size": [60, 80]},
            },
        ],
        "image_id": 101,
        "width": 80,
        "height": 60,
    }
    assert fields["val2017/000000000103_jpg"]["annotations"] == []
    split = read.split("test")
    row = list(split.keys).index("val2017/000000000101_jpg")
    ids = split.label_ids[split.label_offsets[row] : split.label_offsets[row + 1]]
    assert ids.tolist() == [0, 1]
    categories = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert [c["id"] for c in categories] == [1, 18, 90]


def test_boxes_shrink_with_their_image(tmp_path: Path) -> None:
    coco(tmp_path / "src")
    read = Read(tmp_path / "src", tmp_path, options=ImageOptions(resize=30))
    fields = read.fields("train")["train2017/000000000001_jpg"]
    assert (fields["width"], fields["height"]) == (40, 30)
    assert fields["annotations"][0]["bbox"] == [5.25, 10, 15, 6.125]
    assert fields["annotations"][0]["area"] == 75.125
    assert fields["annotations"][0]["segmentation"] == [[0.5, 1, 1.5, 2, 2.5, 3]]
    # The left half, as before.
    assert fields["annotations"][1]["segmentation"] == {"size": [30, 40], "counts": [0, 600, 600]}
    assert read.meta.image_size == 30


def test_other_boxes_are_another_fingerprint(tmp_path: Path) -> None:
    coco(tmp_path / "src")
    one = pack(str(tmp_path / "src"), tmp_path / "a").meta
    path = tmp_path / "src" / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace("10.5", "10.6"))
    assert pack(str(tmp_path / "src"), tmp_path / "b").meta.fingerprint != one.fingerprint


def test_lvis_finds_its_images_among_those_of_coco(tmp_path: Path) -> None:
    src = tmp_path / "src"
    categories = [
        {
            "id": k + 1,
            "name": name,
            "synset": f"{name}.n.01",
            "synonyms": [name],
            "def": "a thing",
            "frequency": frequency,
            "image_count": 3,
            "instance_count": 5,
        }
        for k, (name, frequency) in enumerate((("aerosol_can", "c"), ("air_conditioner", "f")))
    ]
    # Some of LVIS' validation images are COCO's training images.
    for split, of_coco, number in (("train", "train", 3), ("val", "train", 4), ("val", "val", 5)):
        image(src / f"{of_coco}2017" / f"{number:012d}.jpg", (50, 40))
        path = src / f"lvis_v1_{split}.json"
        empty: dict[str, Any] = {"images": [], "annotations": []}
        whole = json.loads(path.read_text()) if path.exists() else empty
        whole["categories"] = categories if split == "train" else categories[::-1]
        whole["images"].append(
            {
                "id": number,
                "coco_url": f"http://images.cocodataset.org/{of_coco}2017/{number:012d}.jpg",
                "width": 50,
                "height": 40,
                "neg_category_ids": [1],
                "not_exhaustive_category_ids": [2],
            }
        )
        note = {"id": number, "image_id": number, "category_id": 2, "area": 9.5}
        whole["annotations"].append({**note, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2]]})
        dump(path, whole)
    read = Read(src, tmp_path)
    assert set(read.fields("test")) == {
        "train2017/000000000004_jpg",
        "val2017/000000000005_jpg",
    }
    assert read.fields("train")["train2017/000000000003_jpg"] == {
        "classes": [1],
        "annotations": [
            {
                "bbox": [1, 2, 3, 4],
                "class": 1,
                "area": 9.5,
                "iscrowd": 0,
                "segmentation": [[1, 2]],
            }
        ],
        "image_id": 3,
        "width": 50,
        "height": 40,
        "negative": [0],
        "not_exhaustive": [1],
    }
    categories = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert [c["frequency"] for c in categories] == ["c", "f"]


def test_annotations_that_are_no_annotations_name_their_file(tmp_path: Path) -> None:
    coco(tmp_path / "src")
    path = tmp_path / "src" / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace('"bbox"', '"box"'))
    with pytest.raises(UserError, match=r"instances_train2017\.json: not as its layout says"):
        pack(str(tmp_path / "src"), tmp_path / "out")
    path.write_text("{")
    with pytest.raises(UserError, match=r"instances_train2017\.json: not a readable JSON file"):
        pack(str(tmp_path / "src"), tmp_path / "out")


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


# --- torchvision -------------------------------------------------------------------------------


def test_torchvision_sets_of_files_keep_them(tmp_path: Path) -> None:
    root = tmp_path / "src"
    for split, ids in (("trainval", ("Abyssinian_1", "beagle_2")), ("test", ("beagle_7",))):
        lines = []
        for name in ids:
            image(root / "oxford-iiit-pet" / "images" / f"{name}.jpg")
            lines.append(f"{name} {1 + name.startswith('b')} 1 1")
        text(root / "oxford-iiit-pet" / "annotations" / f"{split}.txt", *lines)
    read = Read(root, tmp_path, layout="torchvision:OxfordIIITPet")
    assert read.meta.classes == ["Abyssinian", "Beagle"]
    assert read.classes("train") == {
        "oxford-iiit-pet/images/Abyssinian_1_jpg": "Abyssinian",
        "oxford-iiit-pet/images/beagle_2_jpg": "Beagle",
    }
    assert read.classes("test") == {"oxford-iiit-pet/images/beagle_7_jpg": "Beagle"}


def dtd(root: Path) -> dict[str, dict[str, str]]:
    found = {}
    for split, name in (("train", "dots_1"), ("val", "lace_2"), ("test", "dots_3")):
        folder = name.split("_")[0]
        image(root / "dtd" / "dtd" / "images" / folder / f"{name}.jpg")
        text(root / "dtd" / "dtd" / "labels" / f"{split}1.txt", f"{folder}/{name}.jpg")
        found[split] = {f"dtd/dtd/images/{folder}/{name}_jpg": folder}
    # torchvision numbers the classes of each split on its own.
    for split in found:
        for name in ("dots_8", "lace_9"):
            folder, name = name[:4], f"{name}{split}"
            image(root / "dtd" / "dtd" / "images" / folder / f"{name}.jpg")
            with open(root / "dtd" / "dtd" / "labels" / f"{split}1.txt", "a") as file:
                file.write(f"{folder}/{name}.jpg\n")
            found[split][f"dtd/dtd/images/{folder}/{name}_jpg"] = folder
    return found


def gtsrb(root: Path) -> dict[str, dict[str, str]]:
    base = root / "gtsrb" / "GTSRB"
    for class_id in (0, 1):
        image(base / "Training" / f"{class_id:05d}" / "00000_00000.ppm")
    image(base / "Final_Test" / "Images" / "00000.ppm")
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    text(root / "gtsrb" / "GT-final_test.csv", header, "00000.ppm;24;20;1;1;2;2;1")
    return {
        "train": {f"gtsrb/GTSRB/Training/{k:05d}/00000_00000_ppm": str(k) for k in (0, 1)},
        "test": {"gtsrb/GTSRB/Final_Test/Images/00000_ppm": "1"},
    }


def country211(root: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for split, folder in (("train", "train"), ("val", "valid"), ("test", "test")):
        for name in ("AD", "ZW"):
            image(root / "country211" / folder / name / "1.jpg")
            found.setdefault(split, {})[f"country211/{folder}/{name}/1_jpg"] = name
    return found


@pytest.mark.parametrize(
    ("name", "make"), [("DTD", dtd), ("GTSRB", gtsrb), ("Country211", country211)]
)
def test_torchvision_sets_have_their_own_splits(
    tmp_path: Path, name: str, make: Callable[[Path], dict[str, dict[str, str]]]
) -> None:
    expected = make(tmp_path / "src")
    read = Read(tmp_path / "src", tmp_path, layout=f"torchvision:{name}")
    assert {split: read.classes(split) for split in read.meta.splits} == expected


def test_torchvision_sets_without_splits_are_split_by_key(tmp_path: Path) -> None:
    for number in range(40):
        image(tmp_path / "src/eurosat/2750" / ("Forest", "River")[number % 2] / f"{number}.jpg")
    read = Read(tmp_path / "src", tmp_path, layout="torchvision:EuroSAT")
    assert read.meta.classes == ["Forest", "River"]
    assert sum(read.meta.splits.values()) == 40 and 1 <= read.meta.splits["test"] <= 20


def test_torchvision_sets_of_pixels_are_stored_as_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", ["a", "b"]))
    folder = tmp_path / "src" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    made = {}
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ):
        pixels = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
        made[name] = pixels
        with open(folder / name, "wb") as file:
            pickle.dump({"data": pixels, "labels": [0, 1, 1, 0]}, file)
    read = Read(tmp_path / "src", tmp_path, layout="torchvision:CIFAR10")
    assert read.meta.splits == {"train": 20, "test": 4} and read.meta.image_size == 32
    assert read.classes("test") == {
        f"test-{row:06d}": name for row, name in enumerate(["a", "b", "b", "a"])
    }
    split = read.split("test")
    row = list(split.keys).index("test-000002")
    expected = made["test_batch"][2].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(split.decode(row), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR10", r"src: torchvision's CIFAR10: Dataset not found or corrupted\.$"),
        ("Cifar10", r"torchvision:Cifar10: unknown; did you mean torchvision:CIFAR10\?"),
        ("MNIST", r"src/MNIST: no train-images-idx3-ubyte"),
    ],
)
def test_torchvision_says_what_is_wrong_in_one_line(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        pack(str(tmp_path / "src"), tmp_path / "out", layout=f"torchvision:{name}")
    assert "\n" not in str(caught.value)


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
