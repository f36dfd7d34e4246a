"""Frames of stored clips: decoded from a video, or from images in the shard.

A sample is a clip in one of three forms, all of which stock webdataset reads:

- a video, `<key>.mp4` or `<key>.webm`, decoded by PyAV;
- an image a frame, `<key>.000.jpg`, `<key>.001.jpg` ... (webdataset cuts names at the first dot, so
  these are one sample), in the order of their names;
- a strip, one image of square frames below each other: its height is a multiple of its width.

Frames are numbered as they are shown. Of a video only the packets are counted to know how many
there are, which also holds where frames do not last equally long; then only the stretches from a
keyframe to the last wanted frame are decoded.
"""

# Shapes: T frames that are wanted, H height, W width.

from __future__ import annotations

import io
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from harness.data.dataset import Split
from harness.data.decode import decode_image
from harness.data.images import Refusal, store_video
from harness.data.shards import IMAGE_TYPES
from harness.errors import DataError

Choose = Callable[[int], np.ndarray]
"""Number of frames -> int64 [T]: the frames wanted, in any order and as often as one likes."""

_KINDS = {b"ftyp": "mp4", b"\x1a\x45\xdf\xa3": "webm"}


def read_frames(split: Split, row: int, choose: Choose) -> np.ndarray:
    """uint8 [T, H, W, 3]: the frames of a clip that `choose` names.

    Threads may call it side by side. Raises DataError naming the shard and the byte offset.
    """
    raw = split.read(row)
    try:
        kind = _KINDS.get(raw[4:8]) or _KINDS.get(raw[:4])
        if kind is not None:
            return decode_video(raw, kind, choose)
        images = _images_of(split.read_sample(row))
        return _decode_strip(raw, choose) if len(images) == 1 else _decode_images(images, choose)
    except DataError:
        raise
    # Libav, Pillow and tarfile raise many kinds for bytes that are no clip.
    except Exception as error:
        raise DataError(f"{split.where(row)}: not a readable clip ({error})") from None


def decode_video(raw: bytes, kind: str, choose: Choose) -> np.ndarray:
    """uint8 [T, H, W, 3] of an mp4 or webm, turned upright.

    Raises ValueError or what libav raises for a video that is cut short, damaged or empty.
    """
    try:
        store_video(raw, kind)
    except Refusal as error:
        raise ValueError(str(error)) from None
    with av.open(io.BytesIO(raw), "r") as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        # The loader has threads of its own.
        stream.thread_type = "NONE"
        shown, keyframes = _timetable(container, stream)
        wanted = choose(len(shown))
        frames = _decode(container, stream, shown, keyframes, sorted(set(wanted.tolist())))
        return np.stack([frames[number] for number in wanted.tolist()])


def _timetable(container: InputContainer, stream: VideoStream) -> tuple[list[int], list[int]]:
    """When each frame is shown, and when keyframes are, in the stream's unit; nothing decoded."""
    shown, keyframes = set(), []
    for packet in container.demux(stream):
        time = packet.dts if packet.pts is None else packet.pts
        # Not shown: what an edit list cuts off, and the empty packet at the end.
        if time is None or not packet.size:
            continue
        if packet.is_keyframe:
            keyframes.append(time)
        if not packet.is_discard:
            shown.add(time)
    if not shown:
        raise ValueError("it has no frames")
    return sorted(shown), sorted(keyframes)


def _decode(
    container: InputContainer,
    stream: VideoStream,
    shown: list[int],
    keyframes: list[int],
    wanted: list[int],
) -> dict[int, np.ndarray]:
    """Number -> pixels. One pass from each keyframe that wanted frames hang on."""
    passes: dict[int, list[int]] = {}
    for number in wanted:
        place = bisect_right(keyframes, shown[number]) - 1
        start = keyframes[place] if place >= 0 else shown[0]
        passes.setdefault(start, []).append(number)
    frames: dict[int, np.ndarray] = {}
    size: tuple[int, int] | None = None
    for start, numbers in passes.items():
        container.seek(start, stream=stream, backward=True)
        waiting = list(numbers)
        last: VideoFrame | None = None
        for time, frame in _shown_frames(container, stream):
            # VP8 has packets that are never shown: the frame before stands for them.
            while last is not None and waiting and shown[waiting[0]] < time:
                frames[waiting.pop(0)] = _pixels(last, size := size or _size(last))
            last = frame
            while waiting and shown[waiting[0]] == time:
                frames[waiting.pop(0)] = _pixels(frame, size := size or _size(frame))
            if not waiting:
                break
        if waiting and (last is None or waiting[0] < len(shown) - 1):
            raise ValueError(f"frame {waiting[0]} of {len(shown)} cannot be decoded")
        for number in waiting:
            assert last is not None
            frames[number] = _pixels(last, size := size or _size(last))
    return frames


def _shown_frames(
    container: InputContainer, stream: VideoStream
) -> Iterator[tuple[int, VideoFrame]]:
    for frame in container.decode(stream):
        if frame.pts is not None:
            if frame.is_corrupt:
                raise ValueError(f"the frame at {frame.time:.3f} s is damaged")
            yield frame.pts, frame


def _size(frame: VideoFrame) -> tuple[int, int]:
    return frame.width, frame.height


def _pixels(frame: VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at `size`, which all frames of a clip then have, turned upright."""
    pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    # Counter-clockwise, in degrees; phones write multiples of 90.
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.rot90(pixels, turns) if turns else pixels


# --- images ---------------------------------------------------------------------------------------


def _images_of(sample: bytes) -> list[bytes]:
    """The images among a sample's members, by name."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(sample + bytes(1024)), mode="r:") as members:
        for member in members:
            suffix = PurePosixPath(member.name).suffix[1:].lower()
            file = members.extractfile(member) if suffix in IMAGE_TYPES else None
            if file is not None:
                found[member.name] = file.read()
    return [found[name] for name in sorted(found)]


def _decode_images(images: list[bytes], choose: Choose) -> np.ndarray:
    wanted = choose(len(images)).tolist()
    frames = {number: decode_image(images[number]) for number in sorted(set(wanted))}
    height, width = frames[wanted[0]].shape[:2]
    for number, pixels in frames.items():
        if pixels.shape[:2] != (height, width):
            picture = Image.fromarray(pixels)
            frames[number] = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    return np.stack([frames[number] for number in wanted])


def _decode_strip(raw: bytes, choose: Choose) -> np.ndarray:
    strip = decode_image(raw)
    height, width = strip.shape[:2]
    if height % width:
        raise ValueError(
            f"an image of {width}x{height} is no strip of square frames: its height is no"
            " multiple of its width"
        )
    return strip.reshape(-1, width, width, 3)[choose(height // width)]
