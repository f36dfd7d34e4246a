"""Contact sheets: the right pictures under the right words, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from harness.data.augment import view
from harness.data.dataset import Dataset
from harness.data.pack import pack
from harness.data.sheet import MAX_LINES, Tile, _font, _wrapped, caption, draw_sheet, sample_sheet
from harness.study.recipes import Augmentation
from tests.conftest import Harness


def test_every_picture_is_where_its_place_in_the_grid_is() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    tiles = [Tile(np.full((4, 8, 3), colour, np.uint8), "x") for colour in colours]
    sheet = np.asarray(draw_sheet(tiles, 2, 40))
    assert sheet.shape == (12 + 3 * (40 + 17) + 3 * 12, 2 * 52 + 12, 3)
    for place, colour in enumerate(colours):
        row, column = divmod(place, 2)
        left, upper = 12 + column * 52, 12 + row * (40 + 17 + 12)
        # Twice as wide as high: 40 x 20 pixels, in the middle of its square.
        assert (sheet[upper + 10 : upper + 30, left : left + 40] == colour).all()
        assert (sheet[upper : upper + 9, left : left + 40] == 255).all()
    assert (sheet[12 + 2 * 69 :, 64:] == 255).all(), "no sixth picture"


def test_small_pictures_keep_their_pixels_when_enlarged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    sheet = np.asarray(draw_sheet([Tile(image, "")], 1, 40))
    np.testing.assert_array_equal(
        sheet[12:52, 12:52], np.kron(image, np.ones((10, 10, 1), np.uint8))
    )


def test_captions_fit_and_say_when_something_is_missing() -> None:
    font = _font(13)
    text = "#golden #retriever #" + "w" * 40 + " " + " ".join(f"#tag{k}" for k in range(30))
    lines = _wrapped(text, font, 96)
    assert len(lines) == MAX_LINES and lines[-1].endswith("...")
    assert all(font.getlength(line) <= 96 for line in lines)
    assert "".join(lines).startswith("#golden#retriever")
    assert _wrapped("one\ntwo", font, 96) == ["one", "two"]


def test_letters_beyond_latin_are_drawn() -> None:
    font = _font(13)

    def drawn(letter: str) -> bytes:
        picture = Image.new("L", (30, 30))
        ImageDraw.Draw(picture).text((2, 2), letter, fill=255, font=font)
        return picture.tobytes()

    for letter in "\u0439\u03bb\u05d0\u00e9":
        assert drawn(letter) != drawn("\U000f0000"), "not the box of a missing letter"


def test_captions_are_class_and_hashtags(scenes: Dataset) -> None:
    test, weak = scenes.split("test"), scenes.split("pretrain")
    assert caption(scenes, test, 0) == scenes.meta.classes[test.class_ids[0]]
    row = int(np.flatnonzero(np.diff(weak.label_offsets) == 2)[0])
    ids = weak.label_ids[weak.label_offsets[row] : weak.label_offsets[row + 1]]
    assert caption(scenes, weak, row) == " ".join(scenes.meta.hashtags[k] for k in ids)


def first_picture(sheet: Image.Image) -> np.ndarray:
    top = 12 + 17 + 12  # gap, title, gap
    return np.asarray(sheet)[top : top + 64, 12 : 12 + 64]


def enlarged(image: np.ndarray) -> np.ndarray:
    return np.kron(image, np.ones((2, 2, 1), np.uint8))


def draw(scenes: Dataset, **options: object) -> tuple[Image.Image, int]:
    chosen = {"count": 9, "seed": 0, "label": None, "size": 64, "has_views": False, **options}
    return sample_sheet(scenes, "pretrain", **chosen)  # type: ignore[arg-type]


def test_a_sheet_is_a_function_of_its_seed(scenes: Dataset) -> None:
    one, again, other = (draw(scenes, seed=seed)[0] for seed in (0, 0, 1))
    assert one.tobytes() == again.tobytes() != other.tobytes()
    row = int(np.random.default_rng(0).permutation(600)[0])
    np.testing.assert_array_equal(
        first_picture(one), enlarged(scenes.split("pretrain").decode(row))
    )


def test_a_label_chooses_its_images(scenes: Dataset) -> None:
    split = scenes.split("pretrain")
    tag = scenes.meta.hashtags.index("#striped")
    having = [
        row
        for row in range(600)
        if tag in split.label_ids[split.label_offsets[row] : split.label_offsets[row + 1]]
    ]
    assert draw(scenes, label="#Striped", count=600)[1] == len(having)
    seen = first_picture(draw(scenes, label="striped", count=36)[0])
    assert any(np.array_equal(seen, enlarged(split.decode(row))) for row in having)


def test_views_are_those_of_training(scenes: Dataset) -> None:
    sheet = np.asarray(draw(scenes, count=1, has_views=True, seed=3)[0])
    split = scenes.split("pretrain")
    row, augment = int(np.random.default_rng(3).permutation(600)[0]), Augmentation()
    for epoch in range(7):
        key = (3, epoch, int(split.key_hashes[row]))
        expected = view(split.decode(row), 32, key, augment.crop_scale, augment.flip)
        left = 12 + (epoch + 1) * 76
        np.testing.assert_array_equal(sheet[41:105, left : left + 64], enlarged(expected))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["digits", "--label", "sevn"], 2, "--label sevn: no such class or hashtag"),
        (["digits", "--split", "dev"], 4, "no split 'dev'; it has: train, test"),
        (["digits", "--out", "x.jpg"], 2, "x.jpg: expected a name that ends in .png"),
        (["nowhere"], 4, "nowhere': no"),
    ],
)
def test_mistakes_are_one_line(
    here: Harness, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    pack("digits", tmp_path / "digits")
    out = [] if "--out" in arguments else ["--out", "x.png"]
    done = here("data", "show", *arguments, *out, check=code)
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_the_command_writes_a_picture(harness: Harness, tmp_path: Path) -> None:
    pack("digits", tmp_path / "digits")
    done = harness("data", "show", "digits", "--out", "deep/er.png", "--count", 10, "--label", 7)
    assert "10 images" in done.stdout
    with Image.open(tmp_path / "deep" / "er.png") as picture:
        assert picture.format == "PNG"
