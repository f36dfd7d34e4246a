"""Datasets read by torchvision: its files, splits and messages."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness.data.pack import pack
from harness.errors import UserError
from tests.data.layouts import Read, image, text


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

    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", ["a", "b"]))
    folder = tmp_path / "src" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng, made = np.random.default_rng(0), {}
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ):
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
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
