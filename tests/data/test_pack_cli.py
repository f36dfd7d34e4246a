"""`harness data pack` at the command line: messages, exit codes, options that reach the bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Harness
from tests.data.layouts import image


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in ("ant", "bee"):
        for number in range(3):
            image(tmp_path / "src" / name / f"{number}.jpg", (60, 40))
    return tmp_path / "src"


def test_what_was_refused_is_said_and_listed_and_is_no_failure(
    harness: Harness, source: Path, tmp_path: Path
) -> None:
    (source / "ant" / "bad.jpg").write_bytes(b"")
    image(source / "ant" / "old.bmp")
    done = harness("data", "pack", source, "--out", "out", "--split", "train", "--resize", "20")
    lines = done.stdout.splitlines()
    assert "train 7 images, 2 classes" in lines[0]
    assert lines[1] == "converted: bmp to png 1, resized 6"
    assert lines[2].startswith("1 had to be converted, listed in")
    assert lines[-1].startswith("warning: 1 refused, listed in")
    assert lines[-1].endswith("refused.txt; the first: ant/bad.jpg: empty file")
    assert (tmp_path / "out" / "refused.txt").read_text() == "ant/bad.jpg\tempty file\n"
    meta = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert meta["image_size"] == 20 and set(meta["layout"]) == {"train"}


def test_options_that_change_the_bytes_change_the_fingerprint(
    here: Harness, source: Path, tmp_path: Path
) -> None:
    found = set()
    for place, options in enumerate(
        ([], ["--resize", "30"], ["--format", "webp"], ["--format", "webp", "--quality", "50"])
    ):
        here("data", "pack", source, "--out", f"out{place}", *options)
        meta = json.loads((tmp_path / f"out{place}" / "dataset.json").read_text())
        found.add(meta["fingerprint"])
    assert len(found) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 4, "nowhere: does not exist; expected IDX files"),
        (["src", "--layout", "imagnet"], 2, "--layout imagnet: unknown; did you mean"),
        (["src", "--layout", "coco"], 2, "not coco: expected annotations/instances_train2017.json"),
        (["digits", "--out", "src"], 2, "src: exists and is not empty; choose another --out"),
        (["empty"], 2, "no image could be packed; the first of 1 refused: a/x.png: empty file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    here: Harness,
    source: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "a" / "x.png").write_bytes(b"")
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "out"]
    done = here("data", "pack", *arguments, check=code)
    # On a slow machine a line of progress comes first.
    said = [line for line in done.stderr.splitlines() if not line.startswith("packing: ")]
    assert len(said) == 1 and message in said[0]
    assert {path.name for path in tmp_path.iterdir()} == {"src", "empty"}
