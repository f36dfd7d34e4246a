"""Detection stages: what they leave, ranks, patches, real layouts, and that pretraining helps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import detection_jobs
import numpy as np
import pandas as pd
import pytest
import small_detector
import tiny
import torch
from PIL import Image

from harness import transfer
from harness.data import objects
from harness.data.boxes import frame_of, mask_in, pixels_in, tight_boxes, training_views
from harness.data.dataset import open_dataset
from harness.data.order import Places
from harness.data.outlines import mask_of, run_lengths
from harness.data.pack import pack
from harness.errors import DataError, UserError
from harness.models.vit import VisionEncoder
from harness.models.weights import save_encoder
from harness.study.recipes import Model
from harness.transfer.detection import start_with_patch
from harness.transfer.samples import REPLICATES


def test_masks_and_pixels_of_a_view_move_alike(tmp_path: Path) -> None:
    """A picture that is its own mask: bright where the object is."""
    mask = np.zeros((30, 50), dtype=bool)
    mask[8:20, 15:40] = True
    picture = np.repeat((mask * np.uint8(255))[:, :, None], 3, axis=2)
    runs = {"size": [30, 50], "counts": run_lengths(mask)}
    polygon = [[15.0, 8.0, 40.0, 8.0, 40.0, 20.0, 15.0, 20.0]]
    for key in range(20):
        frame = frame_of(50, 30, 64, (key,), (0.5, 2.0))
        bright = pixels_in(frame, picture)[:, :, 0] > 128
        for outline in (runs, polygon):
            seen = mask_in(frame, outline).astype(bool)
            # They differ on the edge at most.
            assert (seen != bright).sum() <= 0.12 * max(seen.sum(), 60)
    assert len({frame_of(50, 30, 64, (key,), (0.5, 2.0)) for key in range(20)}) == 20


def test_a_batch_has_the_objects_of_its_images(tmp_path: Path) -> None:
    split = open_dataset("objects-40", tmp_path).split("train")
    rows, zeros = np.array([3, 11]), np.zeros(2, dtype=np.int64)
    make = training_views(split, 0, 64, (1.0, 1.0), False)
    batch = make(Places(rows, zeros, zeros), 0)
    drawn = objects.draw("train", 0, 40)
    for place, row in enumerate(rows.tolist()):
        seen = drawn.masks[row].any(axis=(1, 2))
        np.testing.assert_array_equal(batch.extra["masks"][place], drawn.masks[row][seen])
        np.testing.assert_array_equal(batch.extra["classes"][place], drawn.class_ids[row][seen])
        boxes = [note["bbox"] for note in split.fields(row)["annotations"]]
        expected = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=np.float32)
        np.testing.assert_array_equal(batch.extra["boxes"][place], expected)
        np.testing.assert_array_equal(tight_boxes(drawn.masks[row][seen]), expected)
        shown = batch.images[place].movedim(0, -1).numpy()
        np.testing.assert_array_equal(shown, drawn.pixels[row])


def test_a_set_without_annotations_is_refused(tmp_path: Path) -> None:
    stage = small_detector.stage(small_detector.recipe(2), images=20, dataset=str(tiny.folder()))
    with pytest.raises(DataError, match="no annotations; detection needs a set packed from COCO"):
        transfer.run(stage, tiny.context(tmp_path))


def test_a_patch_that_no_map_fits_is_refused(tmp_path: Path) -> None:
    model = Model(width=16, depth=1, heads=2, patch=14, image_size=56)
    stage = small_detector.stage(small_detector.recipe(2), images=20, model=model)
    with pytest.raises(UserError, match="patch 14 is no power of two"):
        transfer.run(stage, tiny.context(tmp_path))


def test_a_resampled_patch_sees_the_same_in_a_resized_image(tmp_path: Path) -> None:
    """Flat colours, whatever the patch: the projection of a patch keeps its value."""
    model = Model(width=32, depth=2, heads=2, patch=14, image_size=56)
    encoder = VisionEncoder(model)
    torch.manual_seed(0)
    torch.nn.init.normal_(encoder.patch_embed.proj.weight)
    save_encoder(tmp_path / "w.safetensors", encoder.state_dict(), model)
    other = model.model_copy(update={"patch": 16, "image_size": 64})
    recipe = small_detector.recipe(1, patch=16)
    config = small_detector.stage(recipe, images=20, model=other).config
    tensors = start_with_patch(tmp_path / "w.safetensors", config, recipe)
    resized = VisionEncoder(other)
    resized.load_state_dict(tensors)
    colour = torch.tensor([0.3, -0.7, 1.1])[None, :, None, None]
    one = encoder.patch_embed(colour.expand(1, 3, 56, 56))
    two = resized.patch_embed(colour.expand(1, 3, 64, 64))
    torch.testing.assert_close(two, one, rtol=2e-2, atol=2e-2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tiny.Rows, Any]:
    """Root, rows and result of a stage of one rank."""
    root, rows = tmp_path_factory.mktemp("alone"), tiny.Rows()
    return root, rows, detection_jobs.train(root, root / "one", metrics=rows)


@pytest.mark.slow
def test_a_stage_leaves_its_detections_and_replicates(alone: tuple[Path, tiny.Rows, Any]) -> None:
    root, _, result = alone
    assert result.metrics.keys() >= {"box_ap", "box_ap50", "mask_ap", "mask_ap50", "n_test"}
    found = pd.read_parquet(root / "one" / "predictions.parquet")
    assert set(found.category) <= set(objects.spec.CLASSES)
    assert (found.groupby("key").size() <= 100).all() and found.score.between(0.01, 1).all()
    replicates = pd.read_parquet(root / "one" / "replicates.parquet")
    counts = replicates.groupby("metric").size()
    assert set(counts.index) == {"box_ap", "box_ap50", "mask_ap", "mask_ap50"}
    assert (counts == REPLICATES).all()


@pytest.mark.long
def test_two_ranks_do_what_one_does(alone: tuple[Path, tiny.Rows, Any]) -> None:
    root, rows, _ = alone
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("detection_jobs.py")
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(root)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [child.communicate(timeout=500)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    for rank in range(2):
        found = json.loads((root / f"rows_{rank}.json").read_text())
        for one, other in zip(found, rows.timeless(), strict=True):
            # Rounding moves boxes over the thresholds of matching: AP is left out.
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


# --- the real layouts in miniature -------------------------------------------------------------


def write_layout(src: Path, layout: str, counts: dict[str, int]) -> None:
    """Objects of the built-in set as COCO's or LVIS' files: JPEGs, polygons, gaps in the ids."""
    names = objects.spec.CLASSES
    categories: list[dict[str, Any]] = [
        {"id": 3 * k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(names)
    ]
    if layout == "lvis":
        for k, category in enumerate(categories):
            category |= {"frequency": "rcf"[k % 3], "synset": f"{category['name']}.n.01"}
            category |= {"synonyms": [category["name"]], "def": "a shape"}
            category |= {"image_count": 3, "instance_count": 5}
    for split, num in counts.items():
        images, notes = [], []
        for number, sample in enumerate(
            objects.samples("train" if split == "train" else "test", 0, num), start=1
        ):
            name = f"{number:012d}.jpg"
            path = src / f"{split}2017" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn = objects.draw("train" if split == "train" else "test", number - 1, 1)
            Image.fromarray(drawn.pixels[0][:56]).save(path, quality=95)  # not square
            entry: dict[str, Any] = {"id": number, "file_name": name, "width": 64, "height": 56}
            if layout == "lvis":
                del entry["file_name"]
                entry["coco_url"] = f"http://images.cocodataset.org/{split}2017/{name}"
                own = sample.fields["classes"]
                entry["neg_category_ids"] = [3 * k + 1 for k in range(10) if k not in own][:3]
                entry["not_exhaustive_category_ids"] = [3 * own[0] + 1]
            images.append(entry)
            for note in sample.fields["annotations"]:
                mask = mask_of(note["segmentation"])[:56]
                if not mask.any():
                    continue
                left, top, right, bottom = tight_boxes(mask[None])[0].tolist()
                corners = [left, top, right, top, right, bottom, left, bottom]
                row = {
                    "id": len(notes) + 1,
                    "image_id": number,
                    "category_id": 3 * note["class"] + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "segmentation": [corners],
                }
                notes.append(row if layout == "lvis" else {**row, "iscrowd": 0})
        whole = {"images": images, "annotations": notes, "categories": categories}
        name = f"lvis_v1_{split}.json"
        if layout == "coco":
            name = f"annotations/instances_{split}2017.json"
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_text(json.dumps(whole))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["coco", "lvis"])
def test_the_real_layouts_are_packed_and_judged(tmp_path: Path, layout: str) -> None:
    write_layout(tmp_path / "src", layout, {"train": 24, "val": 8})
    meta = pack(str(tmp_path / "src"), tmp_path / "set").meta
    assert meta.splits == {"train": 24, "test": 8}
    fields = {"loss": "federated", "metric": "lvis", "federated_classes": 4, "detections": 300}
    recipe = small_detector.recipe(4, batch=8, score=0.01, **fields if layout == "lvis" else {})
    stage = small_detector.stage(recipe, images=24, dataset=str(tmp_path / "set"))
    result = transfer.run(stage, tiny.context(tmp_path / "stage"))
    assert 0 <= (result.metrics["box_ap"] or 0) <= 1 and result.metrics["n_test"] == 8
    found = pd.read_parquet(tmp_path / "stage" / "predictions.parquet")
    assert set(found.key) <= {f"val2017/{k:012d}_jpg" for k in range(1, 9)}
    assert (found.x + found.width <= 64.001).all() and (found.y + found.height <= 56.001).all()
    if layout == "lvis":
        assert any(name.startswith("box_ap_") for name in result.metrics)


# --- what pretraining is worth -----------------------------------------------------------------


@pytest.mark.long
def test_a_trained_encoder_beats_a_random_one(
    tmp_path: Path, data_root: Path, trained_encoder: Path, random_encoder: Path
) -> None:
    """The lower end of the paired 95% interval of the difference in box AP is above 0."""
    replicates = []
    for name, encoder in (("trained", trained_encoder), ("random", random_encoder)):
        context = replace(tiny.context(tmp_path / name, upstream=encoder), root=data_root)
        transfer.run(small_detector.stage(small_detector.recipe(200), images=2000), context)
        table = pd.read_parquet(tmp_path / name / "replicates.parquet")
        replicates.append(table[table.metric == "box_ap"].value.to_numpy())
    assert np.quantile(replicates[0] - replicates[1], 0.025) > 0
