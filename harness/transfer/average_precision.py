"""Average precision by pycocotools and lvis, and again on resampled images.

Shapes: K categories, I images, T IoU thresholds, D detections of a category, R replicates.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from harness.transfer.samples import REPLICATES, resample

_Json = dict[str, Any]


@dataclass(frozen=True)
class Precision:
    """What one evaluation found."""

    metrics: dict[str, float]
    """Shares in 0..1."""
    replicates: dict[str, np.ndarray]
    """Metric -> [R], of those that are resampled."""


@dataclass(frozen=True)
class _Matches:
    """Detections of one category against its objects, best first."""

    image_D: np.ndarray
    is_hit_TD: np.ndarray
    counts_TD: np.ndarray
    """False where a detection is ignored."""
    objects_I: np.ndarray
    """Objects of each image that count."""


def ground_truth(
    fields: Sequence[_Json], categories: Sequence[_Json], *, with_ids_of: str = "coco"
) -> _Json:
    """COCO's (or LVIS') JSON of samples, from their .json; image i has the id i + 1.

    Categories have the ids 1, 2, ... in the order of the set's classes.
    """
    images, notes = [], []
    for place, own in enumerate(fields):
        size = own["height"], own["width"]
        image = {"id": place + 1, "height": size[0], "width": size[1]}
        if with_ids_of == "lvis":
            image["neg_category_ids"] = [k + 1 for k in own.get("negative", [])]
            image["not_exhaustive_category_ids"] = [k + 1 for k in own.get("not_exhaustive", [])]
        images.append(image)
        for note in own["annotations"]:
            notes.append(
                {
                    "id": len(notes) + 1,
                    "image_id": place + 1,
                    "category_id": note["class"] + 1,
                    "bbox": note["bbox"],
                    "area": note["area"],
                    "iscrowd": note.get("iscrowd", 0),
                    "segmentation": note["segmentation"],
                }
            )
    named = [{**category, "id": k + 1} for k, category in enumerate(categories)]
    return {"images": images, "annotations": notes, "categories": named}


def coco_precision(truth: _Json, found: Sequence[_Json], most: int = 100) -> Precision:
    """box_ap, box_ap50, mask_ap, mask_ap50 (COCOeval), the four resampled over images.

    `found` is COCO's result format: image_id, category_id, bbox, score, segmentation. An
    evaluation without any detection is 0.
    """
    metrics: dict[str, float] = {}
    replicates: dict[str, np.ndarray] = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        evaluated = _evaluated(truth, found, kind, most)
        if evaluated is None:
            values = {f"{name}_ap": 0.0, f"{name}_ap50": 0.0}
            again = {key: np.zeros(REPLICATES) for key in values}
        else:
            precision = evaluated.eval["precision"][..., 0, -1]  # [T, 101, K], all sizes
            values = {f"{name}_ap": _mean(precision), f"{name}_ap50": _mean(precision[:1])}
            matches = _matches(evaluated.evalImgs, evaluated.params)
            own = [
                _resampled(matches, np.bincount(drawn, minlength=len(drawn)), evaluated.params)
                for drawn in (resample(len(truth["images"]), r) for r in range(REPLICATES))
            ]
            again = {f"{name}_ap": np.array([ap for ap, _ in own])}
            again[f"{name}_ap50"] = np.array([ap50 for _, ap50 in own])
        metrics |= values
        replicates |= again
    return Precision(metrics, replicates)


def _evaluated(truth: _Json, found: Sequence[_Json], kind: Any, most: int) -> Any:
    if not found:
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
        coco: Any = COCO()
        coco.dataset = {**truth, "annotations": [dict(note) for note in truth["annotations"]]}
        coco.createIndex()
        # loadRes writes into what it gets; without boxes it derives them from the masks.
        results = [dict(note) for note in found]
        if kind == "segm":
            for note in results:
                del note["bbox"]
        evaluated = COCOeval(coco, coco.loadRes(results), kind)
        evaluated.params.maxDets = [1, 10, most]
        evaluated.evaluate()
        evaluated.accumulate()
    return evaluated


def _mean(precision: np.ndarray) -> float:
    """Over categories with objects; -1 marks the others."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else 0.0


def _matches(eval_imgs: list[Any], params: Any) -> list[_Matches]:
    """By category, of all sizes of objects."""
    num_images, num_areas = len(params.imgIds), len(params.areaRng)
    most, found = params.maxDets[-1], []
    for k in range(len(params.catIds)):
        rows = eval_imgs[k * num_areas * num_images : k * num_areas * num_images + num_images]
        objects_I = np.zeros(num_images, dtype=np.int64)
        parts = []
        for place, row in enumerate(rows):
            if row is None:
                continue
            objects_I[place] = np.count_nonzero(np.asarray(row["gtIgnore"]) == 0)
            scores = np.asarray(row["dtScores"][:most], dtype=np.float64)
            hits, ignored = row["dtMatches"][:, :most] > 0, row["dtIgnore"][:, :most] > 0
            parts.append((np.full(len(scores), place), scores, hits & ~ignored, ~ignored))
        if parts:
            image_D, scores_D = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
            hit_TD, counts_TD = (np.concatenate([part[k] for part in parts], 1) for k in (2, 3))
        else:
            image_D, scores_D = np.zeros(0, dtype=np.int64), np.zeros(0)
            hit_TD = counts_TD = np.zeros((len(params.iouThrs), 0), dtype=bool)
        order = np.argsort(-scores_D, kind="mergesort")
        found.append(_Matches(image_D[order], hit_TD[:, order], counts_TD[:, order], objects_I))
    return found


def _resampled(matches: list[_Matches], times_I: np.ndarray, params: Any) -> tuple[float, float]:
    """AP and AP50 where image i is there `times_I[i]` times.

    Its detections stand together in the order of scores, so they enter as weights.
    """
    rows = [precision_at(own, times_I, params.recThrs) for own in matches]
    known = np.array([row for row in rows if row is not None])
    if not known.size:
        return 0.0, 0.0
    return float(known.mean()), float(known[:, 0].mean())


def precision_at(own: _Matches, times_I: np.ndarray, recalls: np.ndarray) -> np.ndarray | None:
    """[T]: mean over `recalls` of the best precision at that recall or more; None: no objects."""
    num_objects = int((own.objects_I * times_I).sum())
    if not num_objects:
        return None
    weight_D = times_I[own.image_D]
    hits_TD = np.cumsum(own.is_hit_TD * weight_D, axis=1)
    all_TD = np.cumsum(own.counts_TD * weight_D, axis=1)
    precision_TD = hits_TD / np.maximum(all_TD, np.spacing(1))
    best_TD = np.maximum.accumulate(precision_TD[:, ::-1], axis=1)[:, ::-1]
    result = np.zeros(len(hits_TD))
    for place, (hits_D, best_D) in enumerate(zip(hits_TD, best_TD, strict=True)):
        first = np.searchsorted(hits_D / num_objects, recalls, side="left")
        reached = first[first < len(best_D)]
        result[place] = best_D[reached].sum() / len(recalls)
    return result


def lvis_precision(truth: _Json, found: Sequence[_Json], most: int = 300) -> Precision:
    """box_ap, mask_ap and those of rare, common and frequent categories (box_ap_rare ...), by lvis.

    `truth`'s categories need their frequency: r, c or f. Box and mask AP are resampled.
    """
    package = _lvis_package()
    LVIS, LVISEval, LVISResults = package.LVIS, package.LVISEval, package.LVISResults
    # The lvis package is from before numpy 1.24, which dropped this alias.
    if not hasattr(np, "float"):
        np.float = float  # type: ignore[attr-defined]
    metrics: dict[str, float] = {}
    replicates: dict[str, np.ndarray] = {}
    logging.getLogger("lvis").setLevel(logging.WARNING)
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        keys = {"AP": "ap", "AP50": "ap50", "APr": "ap_rare", "APc": "ap_common"}
        keys["APf"] = "ap_frequent"
        if not found:
            metrics |= {f"{name}_{key}": 0.0 for key in ("ap", "ap50")}
            replicates |= {f"{name}_{key}": np.zeros(REPLICATES) for key in ("ap", "ap50")}
            continue
        lvis = LVIS.__new__(LVIS)
        lvis.logger = logging.getLogger("lvis")
        lvis.dataset = {**truth, "annotations": [dict(note) for note in truth["annotations"]]}
        lvis._create_index()
        results = [dict(note) for note in found]
        if kind == "segm":
            for note in results:
                del note["bbox"]
        evaluated = LVISEval(lvis, LVISResults(lvis, results, max_dets=most), kind)
        evaluated.params.max_dets = most
        evaluated.run()
        for key, own in keys.items():
            if evaluated.results[key] > -1:
                metrics[f"{name}_{own}"] = float(evaluated.results[key])
        matches = _lvis_matches(evaluated)
        params = type("Params", (), {"recThrs": evaluated.params.rec_thrs})
        drawn = [resample(len(truth["images"]), r) for r in range(REPLICATES)]
        again = [_resampled(matches, np.bincount(d, minlength=len(d)), params) for d in drawn]
        replicates[f"{name}_ap"] = np.array([ap for ap, _ in again])
        replicates[f"{name}_ap50"] = np.array([ap50 for _, ap50 in again])
    return Precision(metrics, replicates)


def _lvis_package() -> Any:
    """The lvis package. It imports OpenCV to draw with, which needs libGL: servers have none, and
    nothing is drawn here.
    """
    try:
        importlib.import_module("cv2")
    except ImportError:
        sys.modules["cv2"] = types.ModuleType("cv2")
    return importlib.import_module("lvis")


def _lvis_matches(evaluated: Any) -> list[_Matches]:
    """lvis' rows, named as those of COCOeval."""
    params = evaluated.params
    rows = [
        None
        if row is None
        else {
            "gtIgnore": row["gt_ignore"],
            "dtScores": row["dt_scores"],
            "dtMatches": row["dt_matches"],
            "dtIgnore": row["dt_ignore"],
        }
        for row in evaluated.eval_imgs
    ]
    like = type(
        "Params",
        (),
        {
            "imgIds": params.img_ids,
            "areaRng": params.area_rng,
            "maxDets": [params.max_dets],
            "catIds": params.cat_ids,
            "iouThrs": params.iou_thrs,
        },
    )
    return _matches(rows, like)
