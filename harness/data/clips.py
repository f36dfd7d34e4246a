"""Views of clips: which frames, and which part of them, for training and for multi-view testing."""

# Shapes: B clips, V views of a clip, T frames of a view, S side of a frame, C channels.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from harness.data.augment import view
from harness.data.dataset import Split
from harness.data.hashing import GOLDEN, fold, mix_int
from harness.data.loader import Batch, MakeBatch, labelled
from harness.data.order import Places
from harness.data.video import read_frames
from harness.study.recipes import Augmentation

Sampling = Literal["dense", "segments"]

_TO_UNIT = 2.0**-64
# Told apart from the draws of the crop, which take the key as it is.
_OF_TIME = 0x71E


@dataclass(frozen=True, kw_only=True)
class ClipSampler:
    """Which frames of a video make a clip.

    `dense`: T frames `stride` apart. `segments`: the video is cut into T parts of equal length, and
    one frame is taken of each (Wang et al. 2016, TSN, arXiv 1608.00859, sec. 3.1), so that a clip
    spans the whole video whatever its length. Of a video that is too short the last frame is taken
    again.
    """

    frames: int
    stride: int
    sampling: Sampling = "dense"

    def train(self, num: int, key: tuple[int, ...]) -> np.ndarray:
        """int64 [T] of `num` frames: at a random time, a function of the key alone."""
        state = fold(*key, _OF_TIME)
        if self.sampling == "dense":
            return self._from(int((self._room(num) + 1) * _unit(state, 1)), num)
        shares = np.array([_unit(state, place + 1) for place in range(self.frames)])
        return self._segments(num, shares)

    def test(self, num: int, views: int) -> np.ndarray:
        """int64 [views, T]: evenly spread over the video, from its first frame to its last.

        One view is the middle one. Of segments, view v has the frames (v + 1/2) / views into each.
        """
        if self.sampling == "segments":
            shares = [(place + 0.5) / views for place in range(views)]
            return np.stack([self._segments(num, np.full(self.frames, s)) for s in shares])
        room = self._room(num)
        starts = [room // 2] if views == 1 else [v * room // (views - 1) for v in range(views)]
        return np.stack([self._from(start, num) for start in starts])

    def _room(self, num: int) -> int:
        return max(0, num - (self.frames - 1) * self.stride - 1)

    def _from(self, start: int, num: int) -> np.ndarray:
        return np.minimum(start + np.arange(self.frames) * self.stride, num - 1)

    def _segments(self, num: int, shares: np.ndarray) -> np.ndarray:
        places = (np.arange(self.frames) + shares) * num / self.frames
        return np.minimum(places.astype(np.int64), num - 1)


def _unit(state: int, place: int) -> float:
    return mix_int(state + GOLDEN * place) * _TO_UNIT


def augmented_clips(
    split: Split, sampler: ClipSampler, seed: int, image_size: int, augment: Augmentation
) -> MakeBatch:
    """Draws batches of augmented clips, uint8 [B, T, C, S, S].

    All frames of a clip have one crop and one flip. Time, crop and flip are functions of (seed,
    epoch, key of the clip, how often it was shown in this epoch before).
    """

    def make(places: Places, first: int) -> Batch:
        clips = _empty(len(places.rows), sampler.frames, image_size)
        hashes = split.key_hashes[places.rows].tolist()
        for place, row in enumerate(places.rows.tolist()):
            key = (seed, int(places.epochs[place]), hashes[place], int(places.repeats[place]))
            frames = read_frames(split, row, lambda num, key=key: sampler.train(num, key))
            for time, frame in enumerate(frames):
                clips[place, time] = view(frame, image_size, key, augment.crop_scale, augment.flip)
        return labelled(split, places.rows, _tensor(clips), first)

    return make


def multi_view_clips(
    split: Split, sampler: ClipSampler, image_size: int, temporal_views: int, spatial_views: int
) -> MakeBatch:
    """Draws batches of all views of clips, uint8 [B, V, T, C, S, S], V = temporal x spatial.

    A spatial view is a square crop as high as the shorter side: evenly spread along the longer one,
    from edge to edge; one view is the centre (Feichtenhofer et al. 2019, SlowFast, arXiv
    1812.03982, sec. 4, has 10 x 3).
    """

    def make(places: Places, first: int) -> Batch:
        num = len(places.rows)
        clips = _empty(num, temporal_views * spatial_views * sampler.frames, image_size)
        shape = (num, temporal_views, spatial_views, sampler.frames, *clips.shape[2:])
        views = clips.reshape(shape)
        for place, row in enumerate(places.rows.tolist()):
            frames = read_frames(split, row, lambda num: sampler.test(num, temporal_views).ravel())
            for number, frame in enumerate(frames):
                when, time = divmod(number, sampler.frames)
                for where in range(spatial_views):
                    views[place, when, where, time] = _square(
                        frame, image_size, where, spatial_views
                    )
        images = _tensor(views.reshape(num, -1, *shape[3:]))
        return labelled(split, places.rows, images, first)

    return make


def _square(frame: np.ndarray, side: int, number: int, views: int) -> np.ndarray:
    height, width = frame.shape[:2]
    short = min(height, width)
    share = 0.5 if views == 1 else number / (views - 1)
    left, top = round((width - short) * share), round((height - short) * share)
    crop = np.ascontiguousarray(frame[top : top + short, left : left + short])
    if short == side:
        return crop
    return np.asarray(Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC))


def _empty(num: int, frames: int, side: int) -> np.ndarray:
    return np.empty((num, frames, side, side, 3), dtype=np.uint8)


def _tensor(frames: np.ndarray) -> torch.Tensor:
    """Channels before rows and columns; last in memory."""
    return torch.from_numpy(frames).movedim(-1, -3)
