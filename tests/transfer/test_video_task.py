"""The video protocol: on miniatures of Kinetics-400 and Something-Something v2, and on motion."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from video_jobs import MODEL, RECIPE, in_root, stage

from harness import transfer
from harness.data.dataset import open_dataset
from harness.data.pack import pack
from harness.data.video import read_frames
from harness.errors import PreemptedError, UserError
from harness.models.init import initialize
from harness.models.pixels import standardise
from harness.models.vit import VisionEncoder
from harness.models.weights import save_encoder
from harness.study import motion_spec
from harness.study.protocols import Video
from harness.study.recipes import Augmentation, Duration, Model
from harness.transfer.video import VideoObjective, video


def table(path: Path) -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(path).to_pydict()


def samples_of(folder: Path, metric: str) -> dict[str, float]:
    """Key -> value."""
    columns = table(folder / "samples.parquet")
    rows = zip(columns["metric"], columns["key"], columns["value"], strict=True)
    return {key: value for name, key, value in rows if name == metric}


# --- the layouts of the real sets -----------------------------------------------------------------


def film(path: Path, codec: str, grows: bool, seed: int) -> None:
    """A video that becomes brighter, or darker: single frames of both look alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shades = np.linspace(40, 200, 16)[:: 1 if grows else -1] + seed % 7
    file = io.BytesIO()
    with av.open(file, "w", format="mp4" if path.suffix == ".mp4" else "webm") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for shade in shades:
            pixels = np.full((32, 48, 3), shade, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(file.getvalue())


def kinetics(folder: Path) -> None:
    for split, num in (("train", 16), ("val", 6)):
        rows = []
        for number in range(num):
            label = ("growing", "fading away")[number % 2]
            name = f"{split}_{number:06d}_{number + 10:06d}.mp4"
            film(folder / split / label / name, "libx264", number % 2 == 0, number)
            rows.append([label, split, number, number + 10, split.replace("val", "validate")])
        (folder / "annotations").mkdir(exist_ok=True)
        with open(folder / "annotations" / f"{split}.csv", "w", newline="") as file:
            header = ["label", "youtube_id", "time_start", "time_end", "split"]
            csv.writer(file).writerows([header, *rows])


def something(folder: Path) -> None:
    templates = ["Lighting [something]", "Dimming [something]"]
    labels = folder / "labels"
    labels.mkdir(parents=True)
    names = {template.replace("[", "").replace("]", ""): k for k, template in enumerate(templates)}
    (labels / "labels.json").write_text(json.dumps({name: str(k) for name, k in names.items()}))
    for split, numbers in (("train", range(16)), ("validation", range(100, 106))):
        entries = []
        for number in numbers:
            film(folder / "videos" / f"{number}.webm", "libvpx-vp9", number % 2 == 0, number)
            template = templates[number % 2]
            entries.append({"id": str(number), "label": "lamp", "template": template})
        (labels / f"{split}.json").write_text(json.dumps(entries))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kinetics-400", "something-something-v2"])
def test_the_whole_protocol_on_a_miniature_of_the_layout(name: str, tmp_path: Path) -> None:
    (kinetics if name == "kinetics-400" else something)(tmp_path / "src")
    meta = pack(str(tmp_path / "src"), tmp_path / "packed").meta
    assert meta.splits == {"train": 16, "test": 6}
    update = {"duration": Duration(steps=30), "layer_decay": 1.0, "spatial_views": 3}
    recipe = RECIPE.model_copy(update=update)
    if name != "kinetics-400":
        recipe = recipe.model_copy(update={"sampling": "segments", "stride": 1})
    file = stage(recipe, str(tmp_path / "packed"), classes=2, model=tiny.MODEL, num=16)
    result = transfer.run(file, tiny.context(tmp_path / "run"))
    split = open_dataset(str(tmp_path / "packed"), tmp_path / "run").split("test")
    found = table(tmp_path / "run" / "predictions.parquet")
    label = dict(zip(split.keys, split.class_ids.tolist(), strict=True))
    assert found["label"] == [label[key] for key in found["key"]] and len(found["key"]) == 6
    assert result.metrics["acc1"] == 1.0  # the order of the frames tells the class
    assert "acc5" not in result.metrics  # of two classes


# --- what the numbers are ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with few moving objects."""
    folder = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(motion_spec, "counts", lambda n=None: {"train": n or 64, "test": 40})
        open_dataset("motion-64", folder)
    return folder


class Kept(VideoObjective):
    """Keeps the trained weights."""

    tensors: dict[str, torch.Tensor]

    def finish(self, engine: Any) -> dict[str, float]:
        self.tensors = dict(engine.tensors())
        return super().finish(engine)


def test_numbers_are_those_of_the_views_average_in_a_plain_loop(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Kept] = []

    def kept(*arguments: Any) -> Kept:
        made.append(Kept(*arguments))
        return made[0]

    monkeypatch.setattr("harness.transfer.video.VideoObjective", kept)
    update: dict[str, Any] = {
        "duration": Duration(steps=6),
        "temporal_views": 3,
        "spatial_views": 1,
        "stride": 1,
    }
    file = stage(RECIPE.model_copy(update=update))
    result = video(file, in_root(root, tmp_path))
    (objective,) = made
    model = objective._model().eval()
    model.load_state_dict(objective.tensors)
    split = open_dataset("motion-64", root).split("test")
    right, loss, top = {}, {}, {}
    for row in range(40):
        frames = read_frames(split, row, np.arange)
        views = np.stack([frames[start : start + 4] for start in (0, 2, 4)])
        with torch.no_grad():
            clips = torch.from_numpy(views).permute(0, 1, 4, 2, 3)
            share = model(standardise(clips)).softmax(dim=1).mean(dim=0)
        key, label = split.keys[row], int(split.class_ids[row])
        right[key] = float(share.argmax() == label)
        loss[key] = -share[label].log().item()
        top[key] = float(label in share.topk(5).indices)
    assert samples_of(tmp_path, "acc1") == right
    assert samples_of(tmp_path, "acc5") == top
    assert samples_of(tmp_path, "val_loss") == pytest.approx(loss, abs=1e-5)
    for name, values in (("acc1", right), ("acc5", top), ("val_loss", loss)):
        assert result.metrics[name] == pytest.approx(np.mean(list(values.values())), abs=1e-5)
    found = table(tmp_path / "predictions.parquet")
    assert {
        key: float(a == b)
        for key, a, b in zip(found["key"], found["label"], found["pred"], strict=True)
    } == right


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(root: Path, tmp_path: Path) -> None:
    update = {"duration": Duration(steps=8), "drop_path": 0.2, "dropout": 0.3, "repeats": 2}
    file = stage(RECIPE.model_copy(update=update))
    rows, again = tiny.Rows(), tiny.Rows()
    whole = video(file, in_root(root, tmp_path / "whole", metrics=rows))
    stop = tiny.StopAfter(3)
    with pytest.raises(PreemptedError):
        video(file, in_root(root, tmp_path / "cut", metrics=again, should_stop=stop))
    resumed = video(file, in_root(root, tmp_path / "cut", metrics=again))
    assert rows.timeless() == again.timeless()
    assert whole.metrics == resumed.metrics


@pytest.mark.long
def test_two_ranks_equal_one_rank_with_two_accumulation_steps(root: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    script = Path(__file__).with_name("video_jobs.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(root), str(tmp_path)],
            env={
                **os.environ,
                **address,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    rows = tiny.Rows()
    video(stage(RECIPE, micro_batch=4), in_root(root, tmp_path / "one", metrics=rows))
    both = [json.loads((tmp_path / f"rows_{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1]
    for one, other in zip(rows.timeless(), both[0], strict=True):
        assert one == pytest.approx(other, rel=2e-5)
    for metric in ("acc1", "val_loss"):
        alone, shared = (samples_of(tmp_path / name, metric) for name in ("one", "both"))
        assert shared == pytest.approx(alone, rel=1e-4)


def test_every_arm_starts_as_its_image_encoder_inflated(root: Path, tmp_path: Path) -> None:
    file = stage(RECIPE)
    data = open_dataset("motion-64", root)
    image = VisionEncoder(MODEL)
    initialize(torch.nn.ModuleDict({"encoder": image}), file.config.seed)
    save_encoder(tmp_path / "weights.safetensors", image.state_dict(), MODEL)
    random = VideoObjective(file.config, in_root(root, tmp_path), data)
    given = VideoObjective(
        file.config, in_root(root, tmp_path, upstream=tmp_path / "weights.safetensors"), data
    )
    for objective in (random, given):
        model, _ = objective.blueprint().whole()
        encoder = model.get_submodule("encoder")
        for name, value in image.state_dict().items():
            got = encoder.state_dict()[name]
            if name == "patch_embed.proj.weight":
                value = value[:, :, None].expand_as(got) / 2
            torch.testing.assert_close(got, value, atol=0, rtol=0)
    path = tmp_path / "weights.safetensors"
    save_file({**load_file(path), "x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="unexpected: x"):
        given.blueprint().whole()


# --- whether it measures anything --------------------------------------------------------------

CHALLENGE = Video(
    duration=Duration(steps=250),
    batch=32,
    lr=3e-3,
    layer_decay=1.0,
    frames=8,
    stride=1,
    tube=4,
    inflation="mean",
    pool="mean",
    augment=Augmentation(crop_scale=(0.8, 1.0), flip=False),
    repeats=1,
    temporal_views=1,
    spatial_views=1,
)


@pytest.mark.long
def test_a_trained_encoder_beats_a_random_one_on_motion(
    trained_encoder: Path, random_encoder: Path, data_root: Path, tmp_path: Path
) -> None:
    values = {}
    model = Model(width=64, depth=4, heads=4, patch=4, image_size=32)
    for name, weights in (("trained", trained_encoder), ("random", random_encoder)):
        file = stage(CHALLENGE, "motion", model=model, num=2000)
        video(file, in_root(data_root, tmp_path / name, upstream=weights))
        values[name] = samples_of(tmp_path / name, "acc1")
    keys = sorted(values["trained"])
    assert keys == sorted(values["random"]) and len(keys) == 800
    gain = np.array([values["trained"][key] - values["random"][key] for key in keys])
    rng = np.random.default_rng(0)
    means = gain[rng.integers(0, len(gain), (2000, len(gain)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    assert low > 0, f"{gain.mean():.3f} ({low:.3f} to {high:.3f})"
