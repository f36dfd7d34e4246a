"""Views of images that are kept with a fourth channel are those of the images themselves."""

import numpy as np
import pytest

from harness.data.augment import view


@pytest.mark.parametrize("key", [None, (0, 1, 2), (3, 4, 5)])
@pytest.mark.parametrize("side", [24, 16])
def test_a_fourth_channel_changes_no_bit(key: tuple[int, ...] | None, side: int) -> None:
    rng = np.random.default_rng(0)
    image_HWC = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    kept_HWC = np.concatenate([image_HWC, np.zeros((24, 24, 1), np.uint8)], axis=2)
    plain, kept = (view(i, side, key, (0.2, 1.0), flip=True) for i in (image_HWC, kept_HWC))
    assert kept.shape == (side, side, 3) and np.array_equal(plain, kept)
