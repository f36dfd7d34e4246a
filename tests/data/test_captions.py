"""The built-in captions: drawn equal everywhere, true of their pictures, told apart by words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from harness.data import captions, scenes
from harness.data.captions import draw, with_article
from harness.data.dataset import open_dataset
from harness.study import captions_spec as spec
from harness.study.builtin import builtin

# Pixels and words of the first 8 pairs: a change of either needs a new captions_spec.VERSION.
GOLDEN = {"train": "d6ed591823f3948c", "test": "481ed2fe509d4444"}


def digest(split: str) -> str:
    drawn = draw(split, 0, 8)
    words = json.dumps(drawn.captions).encode()
    return hashlib.sha256(drawn.pixels.tobytes() + words).hexdigest()[:16]


@pytest.mark.parametrize("split", spec.SPLITS)
def test_first_pairs_are_those_of_every_other_machine(split: str) -> None:
    assert digest(split) == GOLDEN[split], f"VERSION {spec.VERSION}: {split}: {digest(split)}"


def test_a_pair_depends_on_its_index_only() -> None:
    whole = draw("train", 0, 150)
    for start, num in ((0, 1), (60, 70)):
        part = draw("train", start, num)
        np.testing.assert_array_equal(part.pixels, whole.pixels[start : start + num])
        assert part.captions == whole.captions[start : start + num]


def test_the_pictures_are_none_of_the_scenes_that_encoders_train_and_are_judged_on() -> None:
    own = draw("train", 0, 64).pixels
    for split in ("pretrain", "val", "train", "test"):
        assert (scenes.draw(split, 0, 64).pixels != own).mean() > 0.5


def test_a_caption_says_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word for a shape, texture or colour in a caption names the main or second object."""
    seen: list[tuple[scenes._Objects, scenes._Objects]] = []
    real = captions._facts

    def spy(main: scenes._Objects, second: scenes._Objects, *rest: np.ndarray) -> object:
        seen.append((main, second))
        return real(main, second, *rest)

    monkeypatch.setattr(captions, "_facts", spy)
    drawn = draw("test", 0, 300)
    tables = {"shape": spec.SHAPES, "texture": spec.TEXTURES, "colour": spec.COLOURS}
    meaning = {
        word: (kind, place)
        for kind, table in tables.items()
        for place, words in enumerate(table.values())
        for word in words
    }
    image = 0
    for main, second in seen:
        for row in range(len(main.shape)):
            true = {(kind, int(getattr(main, kind)[row])) for kind in tables}
            if second.shown[row]:
                true |= {(k, int(getattr(second, k)[row])) for k in ("shape", "colour")}
            for caption in drawn.captions[image]:
                said = {meaning[w] for w in caption.replace(",", "").split() if w in meaning}
                assert said == true, caption  # a test caption says everything, nothing else
            image += 1
    assert image == 300


def test_captions_are_varied_and_test_captions_tell_images_apart() -> None:
    train = [own[0] for own in draw("train", 0, 2000).captions]
    assert len(set(train)) > 1900
    test = draw("test", 0, 1000).captions
    assert {len(own) for own in test} == {spec.TEST_CAPTIONS}
    assert len({caption for own in test for caption in own}) > 1950


def test_every_class_of_scenes_can_be_said_in_the_words_of_captions() -> None:
    found = builtin("scenes")
    assert found is not None and set(found.class_names) == set(found.classes)
    words = {
        word for table in (spec.SHAPES, spec.TEXTURES) for names in table.values() for word in names
    }
    names = [name for own in found.class_names.values() for name in own]
    assert all(set(name.split()) <= words for name in names)
    assert len(set(names)) == len(names) == 4 * len(found.classes)


def test_shards_hold_the_captions(tmp_path: Path) -> None:
    data = open_dataset("captions-100", tmp_path)
    assert data.meta.splits == {"train": 100, "test": 1000} and data.meta.num_classes == 0
    train, test = data.split("train"), data.split("test")
    assert train.fields(7) == {"caption": draw("train", 7, 1).captions[0][0]}
    assert test.fields(3) == {"captions": draw("test", 3, 1).captions[0]}


def test_articles() -> None:
    assert with_article("ring") == "a ring" and with_article("orange ring") == "an orange ring"
