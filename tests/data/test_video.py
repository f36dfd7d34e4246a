"""Frames of stored clips against frames that were encoded, and against a full decode."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
from PIL import Image
from webdataset import WebDataset
from webdataset.writer import TarWriter

from harness.data import video
from harness.data.dataset import Split, open_dataset
from harness.data.index import build_index, shard_entry, write_index
from harness.data.png import encode_png
from harness.data.shards import Sample, list_shard, write_shard
from harness.data.video import decode_video, read_frames
from harness.errors import DataError
from harness.ledger.files import write_json
from harness.study.datasets import DatasetMeta

NUM = 30
HEIGHT, WIDTH = 48, 64


def pictures(num: int = NUM, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [num, H, W, 3]: the brightness of the left half tells the frame's number."""
    frames = np.full((num, height, width, 3), 60, dtype=np.uint8)
    frames[:, :, : width // 2] = (np.arange(num) * 7 + 20).astype(np.uint8)[:, None, None, None]
    return frames


def encoded(
    frames: np.ndarray,
    codec: str = "libx264",
    kind: str = "mp4",
    *,
    times: list[int] | None = None,
    gop: int = 10,
    rotation: int = 0,
    **options: str,
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for place, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[place] if times else place * 40
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def everything(raw: bytes) -> np.ndarray:
    """All frames, decoded from the first to the last."""
    with av.open(io.BytesIO(raw)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def wanted(*numbers: int) -> Callable[[int], np.ndarray]:
    return lambda num: np.array(numbers)


def numbers_in(frames: np.ndarray) -> list[int]:
    """Which of `pictures` each frame is."""
    side = frames[:, 8:-8, 8 : frames.shape[2] // 2 - 8].mean(axis=(1, 2, 3))
    return np.round((side - 20) / 7).astype(int).tolist()


ENCODINGS = {
    "h264": ("libx264", "mp4", {}),
    "h264 with B frames": ("libx264", "mp4", {"bf": "3", "b_strategy": "0"}),
    "mpeg4": ("mpeg4", "mp4", {}),
    "vp9": ("libvpx-vp9", "webm", {}),
    "vp8": ("libvpx", "webm", {}),
    # Packets that are never shown.
    "vp8 with hidden frames": ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_chosen_frames_are_those_of_a_full_decode(name: str) -> None:
    codec, kind, options = ENCODINGS[name]
    raw = encoded(pictures(), codec, kind, **options)
    counts = []

    def choose(num: int) -> np.ndarray:
        counts.append(num)
        return np.array([3, 17, 3, 25, 29, 0])

    got = decode_video(raw, kind, choose)
    whole = everything(raw)
    assert len(whole) == NUM
    if "hidden" not in name:
        assert counts == [NUM]
        np.testing.assert_array_equal(got, whole[[3, 17, 3, 25, 29, 0]])
    for frame in got:
        assert any(np.array_equal(frame, other) for other in whole)
    assert numbers_in(got)[:2] == [3, 17]


def test_no_more_is_decoded_than_from_the_keyframe_to_the_last_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = encoded(pictures(), bf="0", sc_threshold="0")  # keyframes at 0, 10, 20
    seen: list[int] = []
    shown = video._shown_frames

    def counting(*arguments: object) -> object:
        for time, frame in shown(*arguments):  # type: ignore[arg-type]
            seen.append(numbers_in(frame.to_ndarray(format="rgb24")[None])[0])
            yield time, frame

    monkeypatch.setattr(video, "_shown_frames", counting)
    assert numbers_in(decode_video(raw, "mp4", wanted(22, 24))) == [22, 24]
    assert seen == [20, 21, 22, 23, 24]
    seen.clear()
    decode_video(raw, "mp4", wanted(1, 21))
    assert seen == [0, 1, 20, 21]


def test_frames_that_last_unequally_are_numbered_as_they_are_shown() -> None:
    times = np.cumsum([0] + [10 + 90 * (place % 3 == 0) for place in range(NUM - 1)]).tolist()
    raw = encoded(pictures(), times=times, bf="2")
    assert numbers_in(decode_video(raw, "mp4", lambda num: np.arange(num))) == list(range(NUM))


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_turned_video_comes_upright(degrees: int) -> None:
    raw = encoded(pictures(), rotation=degrees)
    with av.open(io.BytesIO(raw)) as container:
        turned = next(container.decode(video=0))
        assert turned.rotation % 360 == degrees % 360
    got = decode_video(raw, "mp4", wanted(0))
    plain = everything(raw)[0]
    np.testing.assert_array_equal(got[0], np.rot90(plain, degrees // 90))


def test_frames_of_another_size_take_the_size_of_the_first() -> None:
    raw = encoded(pictures(10), "libvpx", "webm")
    other = encoded(pictures(10, 24, 32), "libvpx", "webm")
    with av.open(io.BytesIO(raw)) as first, av.open(io.BytesIO(other)) as second:
        file = io.BytesIO()
        with av.open(file, "w", format="webm") as glued:
            stream = glued.add_stream_from_template(first.streams.video[0])
            for start, source in ((0, first), (400, second)):
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = packet.pts + start
                        packet.stream = stream
                        glued.mux(packet)
    got = decode_video(file.getvalue(), "webm", wanted(2, 12))
    assert got.shape == (2, HEIGHT, WIDTH, 3) and numbers_in(got) == [2, 2]


# --- in shards --------------------------------------------------------------------------------


def in_shard(folder: Path, samples: list[Sample]) -> Split:
    """The samples as the only split of a dataset."""
    path = folder / "data" / "test" / "000000.tar"
    write_shard(path, samples)
    return opened(folder, path)


def opened(folder: Path, path: Path) -> Split:
    top = folder / "data"
    listed = list_shard(path)
    shards = {"test": [shard_entry(path, top, len(listed))]}
    index = build_index([listed], shards["test"], [], ["a", "b"])
    meta = DatasetMeta(
        name="clips",
        fingerprint="clips",
        image_size=16,
        classes=["a", "b"],
        splits={"test": len(listed)},
        shards=shards,
        indexes={"test": write_index(top, "test", index, shards)},
    )
    write_json(top / "dataset.json", meta.model_dump(mode="json", by_alias=True))
    return open_dataset(str(top), folder / "root").split("test")


def test_a_strip_and_images_a_frame_hold_the_same_clip(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    strip = encode_png(frames.reshape(-1, 16, 3))
    # webdataset cuts a name at its first dot: these members are one sample.
    members = {f"{place:03d}.png": encode_png(frame) for place, frame in enumerate(frames)}
    path = tmp_path / "data" / "test" / "000000.tar"
    path.parent.mkdir(parents=True)
    with TarWriter(str(path), encoder=False) as writer:
        writer.write({"__key__": "strip", "png": strip, "cls": b"1"})
        writer.write({"__key__": "frames", **members, "cls": b"0"})
    split = opened(tmp_path, path)
    assert list(split.keys) == ["strip", "frames"] and split.class_ids.tolist() == [1, 0]
    for row in (0, 1):
        got = read_frames(split, row, wanted(11, 0, 4, 4))
        np.testing.assert_array_equal(got, frames[[11, 0, 4, 4]])
    read = {s["__key__"]: s for s in WebDataset(str(path), shardshuffle=False)}
    decoded = [Image.open(io.BytesIO(read["frames"][f"{k:03d}.png"])) for k in range(12)]
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in decoded]), frames)


def test_damage_names_shard_and_offset(tmp_path: Path) -> None:
    whole = encoded(pictures())
    header = whole.index(b"mdat")
    cases = {
        "cut": ("mp4", whole[: len(whole) // 2], "cut short"),
        "empty": ("mp4", whole[:4] + b"ftyp" + bytes(60), "damaged"),
        "noise": ("mp4", whole[: header + 4] + bytes(len(whole) - header - 4), "cut short|moov"),
        "webm": ("webm", encoded(pictures(), "libvpx", "webm")[:-300], "cut short"),
        "image": ("png", encode_png(np.zeros((15, 10, 3), dtype=np.uint8)), "no strip of square"),
        "text": ("jpg", b"not an image", "not a readable clip"),
    }
    samples = [
        Sample(key=name, image=raw, image_type=kind, class_id=0)
        for name, (kind, raw, _) in cases.items()
    ]
    split = in_shard(tmp_path, samples)
    for row, (name, (*_, said)) in enumerate(cases.items()):
        where = rf"000000\.tar: byte offset {split.place(row)[1]}: sample {name}: .*({said})"
        with pytest.raises(DataError, match=where):
            read_frames(split, row, wanted(0, 25))


def test_damaged_pictures_in_a_whole_container_are_an_error(tmp_path: Path) -> None:
    raw = bytearray(encoded(pictures(), g="30"))
    start = raw.index(b"mdat") + 4
    raw[start : start + 200] = bytes(200)
    split = in_shard(tmp_path, [Sample(key="a", image=bytes(raw), image_type="mp4", class_id=0)])
    with pytest.raises(DataError, match=r"byte offset \d+: sample a: not a readable clip"):
        read_frames(split, 0, wanted(0, 29))


def test_a_sound_without_pictures_is_an_error() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="no video stream"):
        decode_video(file.getvalue(), "mp4", wanted(0))


def test_many_threads_read_what_one_reads(tmp_path: Path) -> None:
    raw = encoded(pictures(), bf="2")
    samples = [Sample(key=f"k{k}", image=raw, image_type="mp4", class_id=0) for k in range(8)]
    split = in_shard(tmp_path, samples)
    single = read_frames(split, 0, wanted(4, 19))
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda row: read_frames(split, row % 8, wanted(4, 19)), range(64)):
            np.testing.assert_array_equal(got, single)


def test_tiny_images_are_clips_of_one_frame(tmp_path: Path) -> None:
    split = tiny.opened(tmp_path).split("test")
    counts = []
    read_frames(split, 5, lambda num: counts.append(num) or np.zeros(3, dtype=np.int64))
    assert counts == [1]
