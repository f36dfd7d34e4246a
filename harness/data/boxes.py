"""Images with their objects, as a detector sees them: resized, cut and padded to a square."""

# Shapes: B images, S side of a view, n objects of an image.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from harness.data.dataset import Split
from harness.data.decode import decode_image
from harness.data.hashing import GOLDEN, fold, mix_int
from harness.data.loader import Batch, MakeBatch, labelled
from harness.data.order import Places
from harness.data.outlines import Outline, mask_of
from harness.errors import DataError

_TO_UNIT = 2.0**-64
_GREY = 128


@dataclass(frozen=True)
class Frame:
    """Where an image of (width, height) lies in a view: times `scale`, then moved up and left."""

    scale: float
    left: int
    top: int
    flip: bool
    side: int


def frame_of(
    width: int, height: int, side: int, key: tuple[int, ...] | None, jitter: tuple[float, float]
) -> Frame:
    """Large-scale jitter (Ghiasi et al. 2021, arXiv 2012.07177, sec. 3): a function of the key.

    Without a key: the longer side fills the view.
    """
    fit = side / max(width, height)
    if key is None:
        return Frame(fit, 0, 0, False, side)
    state = fold(*key)
    size, across, down = (mix_int(state + GOLDEN * place) * _TO_UNIT for place in (1, 2, 3))
    scale = fit * (jitter[0] + (jitter[1] - jitter[0]) * size)
    left = int(max(0.0, width * scale - side) * across)
    top = int(max(0.0, height * scale - side) * down)
    return Frame(scale, left, top, bool(mix_int(state ^ GOLDEN) & 1), side)


def pixels_in(frame: Frame, image_HWC: np.ndarray) -> np.ndarray:
    """uint8 [S, S, 3]; grey where the image is not."""
    height, width = image_HWC.shape[:2]
    right, bottom, box = _part(frame, width, height)
    picture = Image.fromarray(image_HWC)
    part = picture.resize((right, bottom), Image.Resampling.BICUBIC, box=box)
    view = np.full((frame.side, frame.side, 3), _GREY, dtype=np.uint8)
    view[:bottom, :right] = np.asarray(part)
    return view[:, ::-1] if frame.flip else view


def mask_in(frame: Frame, outline: Outline) -> np.ndarray:
    """uint8 [S, S] of an object. Raises ValueError for what is no outline."""
    side = frame.side
    if isinstance(outline, dict):
        whole = mask_of(outline)
        right, bottom, box = _part(frame, whole.shape[1], whole.shape[0])
        picture = Image.fromarray(whole.astype(np.uint8))
        part = picture.resize((right, bottom), Image.Resampling.NEAREST, box=box)
        mask = np.zeros((side, side), dtype=np.uint8)
        mask[:bottom, :right] = np.asarray(part)
    else:
        shift = np.array([frame.left, frame.top])
        polygons = [
            (np.asarray(polygon, dtype=np.float64).reshape(-1, 2) * frame.scale - shift).ravel()
            for polygon in outline
            if len(polygon) >= 6  # fewer corners have no area
        ]
        if not polygons:
            return np.zeros((side, side), dtype=np.uint8)
        corners: Any = [polygon.tolist() for polygon in polygons]
        parts: Any = coco_mask.frPyObjects(corners, side, side)
        mask = coco_mask.decode(coco_mask.merge(parts))
    return mask[:, ::-1] if frame.flip else mask


def _part(
    frame: Frame, width: int, height: int
) -> tuple[int, int, tuple[float, float, float, float]]:
    """Right and bottom edge of the image in the view, and the box of the image that is there."""
    right = max(1, min(frame.side, round(width * frame.scale) - frame.left))
    bottom = max(1, min(frame.side, round(height * frame.scale) - frame.top))
    left, top = frame.left / frame.scale, frame.top / frame.scale
    box = (
        left,
        top,
        min(width, left + right / frame.scale),
        min(height, top + bottom / frame.scale),
    )
    return right, bottom, box


def training_views(
    split: Split, seed: int, side: int, jitter: tuple[float, float], flip: bool
) -> MakeBatch:
    """Draws batches of jittered views with their objects: `extra` has boxes, classes and masks.

    boxes float32 [n, 4] (x, y, x, y), tight around the masks; classes int64 [n]; masks uint8
    [n, S, S]. Crowds and objects outside are left out. A view is a function of (seed, epoch, key).
    """

    def make(places: Places, first: int) -> Batch:
        images = np.empty((len(places.rows), side, side, 3), dtype=np.uint8)
        extra: dict[str, list[Any]] = {"boxes": [], "classes": [], "masks": []}
        hashes = split.key_hashes[places.rows].tolist()
        for place, row in enumerate(places.rows.tolist()):
            key = (seed, int(places.epochs[place]), hashes[place], int(places.repeats[place]))
            pixels = decode_image(split.read(row))
            frame = frame_of(pixels.shape[1], pixels.shape[0], side, key, jitter)
            if not flip:
                frame = Frame(frame.scale, frame.left, frame.top, False, side)
            images[place] = pixels_in(frame, pixels)
            for name, values in _objects(split, row, frame).items():
                extra[name].append(values)
        batch = labelled(split, places.rows, torch.from_numpy(images).movedim(-1, 1), first)
        return _with(batch, extra)

    return make


def whole_views(split: Split, side: int) -> MakeBatch:
    """Draws batches of whole images, padded: `extra` has the size (width, height) of each."""

    def make(places: Places, first: int) -> Batch:
        images = np.empty((len(places.rows), side, side, 3), dtype=np.uint8)
        sizes = []
        for place, row in enumerate(places.rows.tolist()):
            pixels = decode_image(split.read(row))
            height, width = pixels.shape[:2]
            sizes.append((width, height))
            images[place] = pixels_in(frame_of(width, height, side, None, (1.0, 1.0)), pixels)
        batch = labelled(split, places.rows, torch.from_numpy(images).movedim(-1, 1), first)
        return _with(batch, {"sizes": sizes})

    return make


def _objects(split: Split, row: int, frame: Frame) -> dict[str, torch.Tensor]:
    side = frame.side
    masks, classes = [], []
    for note in annotations_of(split, row):
        if note.get("iscrowd"):
            continue
        try:
            mask = mask_in(frame, note["segmentation"])
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"{split.where(row)}: an annotation without an outline ({error})"
            ) from None
        if mask.any():
            masks.append(mask)
            classes.append(note["class"])
    stacked = np.stack(masks) if masks else np.zeros((0, side, side), dtype=np.uint8)
    return {
        "boxes": torch.from_numpy(tight_boxes(stacked)),
        "classes": torch.tensor(classes, dtype=torch.int64),
        "masks": torch.from_numpy(np.ascontiguousarray(stacked)),
    }


def annotations_of(split: Split, row: int) -> list[dict[str, Any]]:
    """Objects of a sample. Raises DataError where its .json has no annotations."""
    fields = split.fields(row)
    if "annotations" not in fields:
        raise DataError(
            f"{split.where(row)}: no annotations; detection needs a set packed from COCO or LVIS"
        )
    return fields["annotations"]


def tight_boxes(masks_nSS: np.ndarray) -> np.ndarray:
    """float32 [n, 4]: outer edges of the pixels of masks that are not empty."""
    boxes = np.zeros((len(masks_nSS), 4), dtype=np.float32)
    for place, mask in enumerate(masks_nSS):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes[place] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def _with(batch: Batch, extra: dict[str, list[Any]]) -> Batch:
    return Batch(
        images=batch.images,
        label_ids=batch.label_ids,
        label_offsets=batch.label_offsets,
        class_ids=batch.class_ids,
        first_position=batch.first_position,
        extra=extra,
    )
