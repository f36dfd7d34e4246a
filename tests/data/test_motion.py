"""The set of moving objects: its bytes, its classes, and that a single frame says nothing."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from harness.data import motion
from harness.data.dataset import open_dataset
from harness.data.video import read_frames
from harness.study import motion_spec as spec

NUM_TRAIN, NUM_TEST = 1600, 800


@pytest.fixture(scope="module")
def train() -> motion.Clips:
    return motion.draw("train", 0, NUM_TRAIN)


@pytest.fixture(scope="module")
def test() -> motion.Clips:
    return motion.draw("test", 0, NUM_TEST)


def test_the_bytes_are_those_of_every_machine() -> None:
    digest = hashlib.sha256(motion.draw("train", 7, 40).pixels.tobytes()).hexdigest()
    assert digest[:16] == DIGEST, "raise motion_spec.VERSION with a change of pixels"


DIGEST = "581b19b3abc4393f"


def test_a_clip_does_not_depend_on_what_is_drawn_with_it() -> None:
    many = motion.draw("test", 0, 70)
    for place in (0, 31, 32, 69):
        alone = motion.draw("test", place, 1)
        np.testing.assert_array_equal(alone.pixels[0], many.pixels[place])
        assert alone.class_ids[0] == many.class_ids[place]
    assert not np.array_equal(many.pixels[0], motion.draw("train", 0, 1).pixels[0])


def test_stored_clips_are_the_drawn_ones(tmp_path: Path) -> None:
    split = open_dataset("motion-50", tmp_path).split("train")
    drawn = motion.draw("train", 0, 50)
    assert split.num_samples == 50 and split.class_ids.tolist() == drawn.class_ids.tolist()
    for row in (0, 17, 49):
        np.testing.assert_array_equal(read_frames(split, row, np.arange), drawn.pixels[row])


def test_classes_are_equally_frequent(test: motion.Clips) -> None:
    assert np.bincount(test.class_ids).tolist() == [NUM_TEST // len(spec.CLASSES)] * 8


def test_the_class_is_the_shift_from_frame_to_frame(test: motion.Clips) -> None:
    """Phase correlation of first and second half of the clips finds the direction."""
    grey = test.pixels.astype(float).mean(axis=-1)
    spectrum = np.fft.fft2(grey - grey.mean(axis=1, keepdims=True))  # what stands still is gone
    cross = spectrum[:, 2:] * spectrum[:, :-2].conj()
    peak = np.fft.ifft2(cross.sum(axis=1)).real.reshape(len(grey), -1).argmax(axis=1)
    down, right = np.divmod(peak, spec.IMAGE_SIZE)
    shift = np.stack([right, down], axis=1)
    shift = (shift + 16) % 32 - 16
    pred = (shift @ np.array(list(spec.DIRECTIONS.values())).T).argmax(axis=1)
    assert (pred == test.class_ids).mean() > 0.8


@pytest.mark.parametrize("time", [0, 3, spec.FRAMES - 1])
def test_a_single_frame_does_not_tell_the_direction(
    train: motion.Clips, test: motion.Clips, time: int
) -> None:
    """Linear in pixels, and in the spectrum of brightness, which no shift changes."""
    for features in (pixels_of, spectrum_of):
        model = LogisticRegression(C=1e-3, max_iter=200)
        model.fit(features(train, time), train.class_ids)
        accuracy = model.score(features(test, time), test.class_ids)
        chance = 1 / len(spec.CLASSES)
        # Three standard deviations of a guesser's accuracy.
        assert abs(accuracy - chance) < 3 * np.sqrt(chance * (1 - chance) / NUM_TEST)


def pixels_of(clips: motion.Clips, time: int) -> np.ndarray:
    return clips.pixels[:, time].reshape(len(clips.pixels), -1) / 255.0 - 0.3


def spectrum_of(clips: motion.Clips, time: int) -> np.ndarray:
    grey = clips.pixels[:, time].astype(float).mean(axis=-1) / 255
    return np.log(np.abs(np.fft.rfft2(grey)) + 0.1).reshape(len(grey), -1)
