"""Cascade Mask R-CNN on a plain ViT, of torchvision's parts; only the cascade is our own.

Cai & Vasconcelos 2018, "Cascade R-CNN" (arXiv 1712.00726); heads and losses as ViTDet has them.
Shapes: B images of side S, R boxes (rois) of all images, K classes, M side of a predicted mask.
Boxes are [x, y, x, y] in pixels, float32. Class 0 is the background; an object's class id is its
place in the set's classes plus 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image

from harness.models.vitdet import PlainBackbone, SimplePyramid
from harness.study.protocols import Detection
from harness.study.protocols.heads import Heads
from harness.study.recipes import Model

IOUS = (0.5, 0.6, 0.7)
"""From which on a box is positive, stage by stage."""
_DELTA_SCALES = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
_BOX_SIDE, _MASK_SIDE = 7, 14
_ASPECTS = (0.5, 1.0, 2.0)

Losses = dict[str, Tensor]
Found = dict[str, Tensor]
"""Of one image: boxes [n, 4], scores [n], classes [n] from 0, masks [n, M, M] in 0..1."""


class CascadeMaskRCNN(nn.Module):
    """The whole detector. In training it answers with losses, else with what it found."""

    def __init__(
        self, model: Model, recipe: Detection, num_classes: int, frequency_K: Tensor | None = None
    ) -> None:
        super().__init__()
        heads = recipe.heads
        self.recipe, self.num_classes, self.side = recipe, num_classes, model.image_size
        self.frequency_K = frequency_K
        self.encoder = PlainBackbone(
            model,
            window=recipe.window,
            num_global=recipe.global_blocks,
            relative=recipe.relative_positions,
            drop_path=recipe.drop_path,
        )
        self.pyramid = SimplePyramid(model.width, heads.channels, heads.scales)
        self.rpn = _proposals(model, heads)
        levels = [str(k) for k in range(len(heads.scales))]
        # A box goes to the map in whose pixels it has the side 1.75 anchors, which is FPN's rule
        # (224 pixels at stride 16) in units of ViTDet's anchors.
        pool = partial(
            MultiScaleRoIAlign,
            levels,
            sampling_ratio=2,
            canonical_scale=round(1.75 * heads.anchor * model.patch),
            canonical_level=round(math.log2(model.patch)),
        )
        self.box_pool, self.mask_pool = pool(_BOX_SIDE), pool(_MASK_SIDE)
        self.box_heads = nn.ModuleList(_BoxHead(heads, num_classes) for _ in IOUS)
        self.mask_head = _MaskHead(heads, num_classes)
        self.matchers = [Matcher(iou, iou, allow_low_quality_matches=False) for iou in IOUS]
        self.coders = [BoxCoder(scales) for scales in _DELTA_SCALES]
        self.sampler = BalancedPositiveNegativeSampler(heads.rois, 0.25)

    def forward(
        self,
        images_BCSS: Tensor,
        boxes: list[Tensor] | None = None,
        classes: list[Tensor] | None = None,
        masks: list[Tensor] | None = None,
    ) -> Losses | list[Found]:
        """Losses by name with objects (boxes [n, 4], class ids [n] from 0, masks [n, S, S]).

        Every module runs in every call, in the same order, whatever is in the images: with ZeRO-3
        ranks would wait for each other for ever otherwise.
        """
        maps = self.pyramid(self.encoder(images_BCSS))
        sizes = [(self.side, self.side)] * len(images_BCSS)
        if boxes is None:
            proposals, _ = self.rpn(ImageList(images_BCSS, sizes), maps)
            return self._found(maps, proposals)
        assert classes is not None and masks is not None, "boxes without classes or masks"
        targets = [{"boxes": own} for own in boxes]
        proposals, losses = self.rpn(ImageList(images_BCSS, sizes), maps, targets)
        labels = [own + 1 for own in classes]
        return losses | self._cascade(maps, proposals, boxes, labels, masks)

    # --- training ---

    def _cascade(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        boxes: list[Tensor],
        labels: list[Tensor],
        masks: list[Tensor],
    ) -> Losses:
        losses: Losses = {}
        # An object is a proposal too: without these there are no positive ones at the start.
        rois = [torch.cat([own, true]) for own, true in zip(proposals, boxes, strict=True)]
        rois = self._sampled(rois, boxes, labels)
        first = rois
        seen = self._looked_at(labels)
        for stage, (head, coder) in enumerate(zip(self.box_heads, self.coders, strict=True)):
            matched = [self._matched(stage, *own) for own in zip(rois, boxes, labels, strict=True)]
            label_R = torch.cat([label for _, label in matched])
            weight = 1.0
            if not len(label_R):  # no proposal in any image: a box that counts nothing
                rois = [_dummy(own) if k == 0 else own for k, own in enumerate(rois)]
                label_R, weight = label_R.new_zeros(1), 0.0
            scores_RK, deltas_R4 = self._box_head(head, maps, rois)
            losses[f"class_{stage}"] = weight * self._class_loss(scores_RK, label_R, seen)
            is_object_R = label_R > 0
            if weight:
                true_R4 = torch.cat(
                    [
                        true[place] if len(true) else torch.zeros_like(own)
                        for (place, _), true, own in zip(matched, boxes, rois, strict=True)
                    ]
                )
                target_O4 = coder.encode_single(true_R4[is_object_R], torch.cat(rois)[is_object_R])
                gap = (deltas_R4[is_object_R] - target_O4).abs().sum()
                losses[f"box_{stage}"] = gap / len(label_R)
            else:
                losses[f"box_{stage}"] = deltas_R4.sum() * 0.0
            if stage + 1 < len(IOUS):
                rois = self._refined(coder, deltas_R4.detach(), rois)
                if not weight:
                    rois = [own[:0] for own in rois]
        losses["mask"] = self._mask_loss(maps, first, boxes, labels, masks)
        return losses

    def _matched(
        self, stage: int, rois: Tensor, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Place of the object that each box of one image is on, and its label, 0 for none."""
        if not len(boxes):
            none = torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
            return none, none
        if not len(rois):
            none = torch.zeros(0, dtype=torch.int64, device=rois.device)
            return none, none
        place = self.matchers[stage](box_iou(boxes, rois))
        return place.clamp(min=0), labels[place.clamp(min=0)] * (place >= 0)

    def _sampled(
        self, rois: list[Tensor], boxes: list[Tensor], labels: list[Tensor]
    ) -> list[Tensor]:
        found = [self._matched(0, *own)[1] for own in zip(rois, boxes, labels, strict=True)]
        positive, negative = self.sampler(found)
        return [
            own[(yes | no).bool()] for own, yes, no in zip(rois, positive, negative, strict=True)
        ]

    def _looked_at(self, labels: list[Tensor]) -> Tensor | None:
        """bool [K]: classes that the federated loss looks at; None with softmax.

        Those in the images, filled up to `federated_classes` by the root of their frequency.
        """
        if self.recipe.loss == "softmax":
            return None
        assert self.frequency_K is not None, "federated loss without frequencies"
        own = torch.cat(labels).unique() - 1
        seen_K = torch.zeros(self.num_classes, dtype=torch.bool, device=own.device)
        seen_K[own] = True
        chance_K = self.frequency_K.to(own.device).sqrt() * ~seen_K
        wanted = min(self.recipe.federated_classes - len(own), int((chance_K > 0).sum()))
        if wanted > 0:
            seen_K[torch.multinomial(chance_K, wanted)] = True
        return seen_K

    def _class_loss(self, scores_RK: Tensor, label_R: Tensor, seen_K: Tensor | None) -> Tensor:
        if seen_K is None:
            return F.cross_entropy(scores_RK, label_R)
        target_RK = F.one_hot(label_R, self.num_classes + 1)[:, 1:].float()
        loss_RK = F.binary_cross_entropy_with_logits(scores_RK[:, 1:], target_RK, reduction="none")
        return (loss_RK * seen_K).sum() / len(label_R)

    def _mask_loss(
        self,
        maps: dict[str, Tensor],
        rois: list[Tensor],
        boxes: list[Tensor],
        labels: list[Tensor],
        masks: list[Tensor],
    ) -> Tensor:
        matched = [self._matched(0, *own) for own in zip(rois, boxes, labels, strict=True)]
        own = [roi[label > 0] for roi, (_, label) in zip(rois, matched, strict=True)]
        place = [place[label > 0] for place, label in matched]
        if not sum(len(part) for part in own):
            logits = self._mask_logits(maps, [_dummy(own[0]), *own[1:]])
            return logits.sum() * 0.0
        logits = self._mask_logits(maps, own)
        # project_masks_on_boxes inside cannot take images without objects.
        used = [k for k, part in enumerate(own) if len(part)]
        return maskrcnn_loss(
            logits,
            [own[k] for k in used],
            [masks[k] for k in used],
            [labels[k] for k in used],
            [place[k] for k in used],
        )

    # --- both ---

    def _box_head(
        self, head: nn.Module, maps: dict[str, Tensor], rois: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        pooled = self.box_pool(maps, rois, [(self.side, self.side)] * len(rois))
        if self.training:
            # Three heads pull at the maps: each with a third (as Detectron2's cascade).
            share = 1 / len(IOUS)
            pooled = pooled * share + pooled.detach() * (1 - share)
        return head(pooled)

    def _refined(self, coder: BoxCoder, deltas_R4: Tensor, rois: list[Tensor]) -> list[Tensor]:
        moved = coder.decode_single(deltas_R4, torch.cat(rois))
        moved = clip_boxes_to_image(moved, (self.side, self.side))
        return list(moved.split([len(own) for own in rois]))

    def _mask_logits(self, maps: dict[str, Tensor], rois: list[Tensor]) -> Tensor:
        return self.mask_head(self.mask_pool(maps, rois, [(self.side, self.side)] * len(rois)))

    # --- testing ---

    def _found(self, maps: dict[str, Tensor], rois: list[Tensor]) -> list[Found]:
        num = [len(own) for own in rois]
        if not sum(num):
            rois = [_dummy(rois[0]), *rois[1:]]
        total: Tensor | float = 0.0
        for head, coder in zip(self.box_heads, self.coders, strict=True):
            scores_RK, deltas_R4 = self._box_head(head, maps, rois)
            is_softmax = self.recipe.loss == "softmax"
            chance = scores_RK.softmax(dim=1) if is_softmax else scores_RK.sigmoid()
            total = total + chance[:, 1:] / len(IOUS)
            rois = self._refined(coder, deltas_R4, rois)
        assert isinstance(total, Tensor)
        scores = list(total.split([len(own) for own in rois]))
        found = [
            self._kept(own[:real], score[:real])
            for own, score, real in zip(rois, scores, num, strict=True)
        ]
        boxes = [own["boxes"] for own in found]
        if not sum(len(own) for own in boxes):
            self._mask_logits(maps, [_dummy(boxes[0]), *boxes[1:]])
            masks_R = torch.zeros(0, 2 * _MASK_SIDE, 2 * _MASK_SIDE, device=boxes[0].device)
        else:
            logits = self._mask_logits(maps, boxes)
            label_R = torch.cat([own["classes"] for own in found]) + 1
            places = torch.arange(len(logits), device=logits.device)
            masks_R = logits[places, label_R].sigmoid()
        parts = masks_R.split([len(own) for own in boxes])
        return [own | {"masks": mask} for own, mask in zip(found, parts, strict=True)]

    def _kept(self, boxes_R4: Tensor, scores_RK: Tensor) -> Found:
        """Of one image: above the least score, after non-maximum suppression within a class."""
        row, class_id = torch.nonzero(scores_RK > self.recipe.score, as_tuple=True)
        scores = scores_RK[row, class_id]
        keep = batched_nms(boxes_R4[row], scores, class_id, 0.5)[: self.recipe.detections]
        return {
            "boxes": boxes_R4[row][keep],
            "scores": scores[keep],
            "classes": class_id[keep],
        }


def starting_zeros(model: CascadeMaskRCNN) -> dict[str, Callable[[], Tensor]]:
    """Last layers that start at zero: no box moves, and all classes are as likely.

    With scores of chance the first proposals would be noise.
    """
    ends = ("cls_logits.weight", "bbox_pred.weight", "scores.weight", "deltas.weight")
    return {
        name: partial(torch.zeros, param.shape, device="cpu")
        for name, param in model.named_parameters()
        if name.endswith(ends)
    }


class _ProposalHead(RPNHead):
    """torchvision's, in the type of its weights; what it says is float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        dtype = self.cls_logits.weight.dtype
        scores, deltas = super().forward([level.to(dtype) for level in x])
        return [own.float() for own in scores], [own.float() for own in deltas]


class _BoxHead(nn.Module):
    """Convolutions, one fully connected layer, scores [R, 1 + K] and one box [R, 4]."""

    def __init__(self, heads: Heads, num_classes: int) -> None:
        super().__init__()
        size = (heads.channels, _BOX_SIDE, _BOX_SIDE)
        convs = [heads.channels] * heads.box_convs
        self.layers = FastRCNNConvFCHead(size, convs, [heads.box_width], norm_layer=LayerNorm2d)
        self.scores = nn.Linear(heads.box_width, 1 + num_classes)
        self.deltas = nn.Linear(heads.box_width, 4)

    def forward(self, pooled_RCYX: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.layers(pooled_RCYX.to(self.scores.weight.dtype))
        return self.scores(pooled).float(), self.deltas(pooled).float()


class _MaskHead(nn.Module):
    """Convolutions, twice the resolution, one mask a class: [R, 1 + K, M, M]."""

    def __init__(self, heads: Heads, num_classes: int) -> None:
        super().__init__()
        width = heads.channels
        self.layers = MaskRCNNHeads(width, [width] * heads.mask_convs, 1, norm_layer=LayerNorm2d)
        self.predictor: Any = MaskRCNNPredictor(width, width, 1 + num_classes)

    def forward(self, pooled_RCYX: Tensor) -> Tensor:
        dtype = self.predictor.mask_fcn_logits.weight.dtype
        return self.predictor(self.layers(pooled_RCYX.to(dtype))).float()


def _proposals(model: Model, heads: Heads) -> RegionProposalNetwork:
    strides = [model.patch / scale for scale in heads.scales]
    strides.append(2 * strides[-1])
    sizes = tuple((heads.anchor * stride,) for stride in strides)
    anchors = AnchorGenerator(sizes, (_ASPECTS,) * len(sizes))
    before = 2 * heads.proposals
    return RegionProposalNetwork(
        anchors,
        _ProposalHead(heads.channels, len(_ASPECTS), conv_depth=heads.rpn_convs),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=heads.rpn_samples,
        positive_fraction=0.5,
        pre_nms_top_n={"training": before, "testing": before},
        post_nms_top_n={"training": heads.proposals, "testing": heads.proposals},
        nms_thresh=0.7,
    )


def _dummy(like: Tensor) -> Tensor:
    return torch.tensor([[0.0, 0.0, 8.0, 8.0]], device=like.device)
