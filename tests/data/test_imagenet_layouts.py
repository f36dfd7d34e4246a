"""ImageNet and its further test sets, in all the folders they come in."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from harness.data.pack import pack
from harness.data.sources.imagenet import imagenet_wnids
from harness.errors import UserError
from tests.data.layouts import Read, dump, image, text

WNIDS = imagenet_wnids()
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
