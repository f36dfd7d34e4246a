"""The one pass over the images: files, stops, ranks, and who reads it."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from harness import transfer
from harness.errors import DataError, PreemptedError
from harness.models.heads import pooled
from harness.models.init import initialize
from harness.models.pixels import standardise
from harness.models.vit import VisionEncoder
from harness.study.protocols import Features, FewShot, LinearProbe
from harness.study.recipes import Pool
from harness.transfer import features as module
from harness.transfer.features import map_features, read_features
from harness.transfer.fewshot import choices


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 training and 120 test images are four and two files."""
    monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr(module, "CHUNK", 64)


def run(folder: Path, pool: Pool = "cls", **surroundings: object) -> Path:
    context = tiny.context(folder, **surroundings)  # type: ignore[arg-type]
    transfer.run(tiny.stage(Features(pool=pool)), context)
    return folder / "features"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("pool", ["cls", "mean", "mean_fc_norm"])
def test_values_are_those_of_the_encoder_for_every_image_once(tmp_path: Path, pool: Pool) -> None:
    folder = run(tmp_path / "stage", pool)
    assert sorted(content(folder)) == [f"test-{k:06d}.safetensors" for k in range(2)] + [
        f"train-{k:06d}.safetensors" for k in range(4)
    ]
    encoder = VisionEncoder(tiny.MODEL)
    initialize(encoder, 0)
    for name, num in (("train", 200), ("test", 120)):
        split = tiny.opened(tmp_path).split(name)
        found = [load_file(path) for path in sorted(folder.glob(f"{name}-*"))]
        rows = torch.cat([chunk["rows"] for chunk in found])
        assert rows.tolist() == split.subset(num).tolist()
        classes = torch.cat([chunk["classes"] for chunk in found])
        assert classes.tolist() == split.class_ids[rows.numpy()].tolist()
        images = torch.stack([torch.tensor(split.decode(row)) for row in rows.tolist()])
        with torch.inference_mode():
            wanted = pooled(encoder.eval(), standardise(images.permute(0, 3, 1, 2)), pool)
        values = torch.cat([chunk["values"] for chunk in found])
        torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-5)


def test_chunks_do_not_move_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = run(tmp_path / "cut")
    parts = [load_file(cut / f"train-{k:06d}.safetensors")["values"] for k in range(4)]
    monkeypatch.setattr(module, "CHUNK", 16384)
    whole = load_file(run(tmp_path / "whole") / "train-000000.safetensors")["values"]
    assert torch.equal(torch.cat(parts), whole)


def test_a_stopped_pass_goes_on_behind_the_files_it_has(tmp_path: Path) -> None:
    wanted = content(run(tmp_path / "never"))
    stopped = tmp_path / "stopped"
    images: list[int] = []
    attempts = 0
    while True:
        attempts += 1
        seen = images[-1] if images else 0
        context = replace(
            tiny.context(stopped, should_stop=tiny.StopAfter(8)),
            report=lambda step, samples, seen=seen: images.append(seen + samples),
        )
        try:
            transfer.run(tiny.stage(Features()), context)
            break
        except PreemptedError:
            here = content(stopped / "features")
            assert here.items() <= wanted.items()
            assert not [name for name in here if name.startswith(".")]
    assert content(stopped / "features") == wanted
    assert attempts > 2
    # A stop costs what was not yet in a file: less than one chunk each time.
    assert images[-1] < 320 + (attempts - 1) * 64


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import tiny
from harness import transfer
from harness.study.protocols import Features
from harness.transfer import features

features.BATCH, features.CHUNK = 16, 64

def die_after_150(step, samples):
    if samples >= 150:
        os.kill(os.getpid(), signal.SIGKILL)

context = replace(tiny.context(Path(sys.argv[1])), report=die_after_150)
transfer.run(tiny.stage(Features()), context)
"""


def test_a_killed_pass_goes_on_behind_the_files_it_has(tmp_path: Path) -> None:
    wanted = content(run(tmp_path / "never"))
    killed = tmp_path / "killed"
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"}
    done = subprocess.run([sys.executable, "-c", KILLED, killed], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    first = content(killed / "features")
    assert sorted(first) == ["train-000000.safetensors", "train-000001.safetensors"]
    times = {path: path.stat().st_mtime_ns for path in (killed / "features").iterdir()}
    assert content(run(killed)) == wanted
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_two_ranks_leave_the_bytes_of_one(tmp_path: Path) -> None:
    wanted = content(run(tmp_path / "one"))
    both = tmp_path / "both"
    # Rank 0 waits for rank 1, which begins later and knows nothing of it.
    waiting = Thread(target=run, args=(both,), kwargs={"rank": 0, "ranks": 2})
    waiting.start()
    run(both, rank=1, ranks=2)
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    assert content(both / "features") == wanted


def test_a_rank_makes_its_own_files_only(tmp_path: Path) -> None:
    stop = tiny.StopAfter(16)
    with pytest.raises(PreemptedError):
        run(tmp_path, rank=1, ranks=2, should_stop=stop)  # waits for rank 0 until it is stopped
    assert sorted(content(tmp_path / "features")) == [
        "test-000001.safetensors",
        "train-000001.safetensors",
        "train-000003.safetensors",
    ]


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    folder = run(tmp_path)
    wanted = content(folder)
    damaged = folder / "train-000002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert content(run(tmp_path)) == wanted


def test_files_of_other_images_are_refused(tmp_path: Path) -> None:
    folder = run(tmp_path / "stage")
    context = replace(tiny.context(tmp_path / "probe"), upstream={"features": folder.parent})
    with pytest.raises(DataError, match=r"train-000003.*features of other images"):
        read_features(tiny.stage(LinearProbe(), images=199), context)
    (folder / "test-000001.safetensors").unlink()
    with pytest.raises(DataError, match=r"test-000001.*cannot be read as features"):
        read_features(tiny.stage(LinearProbe()), context)


def test_only_what_is_needed_is_read_and_it_is_the_same(tmp_path: Path) -> None:
    folder = run(tmp_path / "stage")
    context = replace(tiny.context(tmp_path / "probe"), upstream={"features": folder.parent})
    stage = tiny.stage(FewShot())
    whole, test = read_features(stage, context)
    places = torch.cat(list(choices(whole.class_M, (1, 5), 5).values())).unique()
    some, same = read_features(stage, context, lambda class_M: places)
    assert torch.equal(some.values_MD, whole.values_MD[places])
    assert torch.equal(some.class_M, whole.class_M[places])
    assert some.keys == [whole.keys[place] for place in places.tolist()]
    assert torch.equal(same.values_MD, test.values_MD)


def test_mapped_features_are_the_same_in_any_order_and_stay_in_their_files(tmp_path: Path) -> None:
    folder = run(tmp_path / "stage")
    context = replace(tiny.context(tmp_path / "lit"), upstream={"features": folder.parent})
    stage = tiny.stage(LinearProbe())
    both = zip(read_features(stage, context), map_features(stage, context), strict=True)
    for whole, mapped in both:
        assert len(mapped) == len(whole.values_MD)
        places = np.random.default_rng(0).integers(0, len(mapped), 300)
        assert torch.equal(mapped.rows(places), whole.values_MD[torch.from_numpy(places)])
        everything = np.arange(len(mapped))
        assert torch.equal(mapped.rows(everything), whole.values_MD)
        assert mapped.rows(places[:0]).shape == (0, tiny.MODEL.width)
        opened = Path("/proc/self/maps")
        assert not opened.exists() or str(folder) in opened.read_text()
