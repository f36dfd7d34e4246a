"""The plain backbone's windows, relative positions and pyramid, and the cascade's corner cases."""

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

from harness.models.detector import CascadeMaskRCNN, starting_zeros
from harness.models.init import assign, initial_values
from harness.models.vit import VisionEncoder
from harness.models.vitdet import (
    PlainBackbone,
    RelativePositions,
    SimplePyramid,
    WindowAttention,
    backbone_tensors,
    global_blocks,
)
from harness.study import flops_detection
from harness.study.protocols import Detection
from harness.study.protocols.heads import Heads
from harness.study.recipes import Duration, Model

MODEL = Model(width=16, depth=2, heads=2, patch=4, image_size=40)
HEADS = Heads(
    channels=8, scales=(1.0, 0.5), anchor=4.0, proposals=20, rois=16, box_width=16, mask_convs=1
)


def detector(**fields: object) -> CascadeMaskRCNN:
    recipe = Detection.model_validate({"duration": Duration(steps=1), "heads": HEADS} | fields)
    model = CascadeMaskRCNN(MODEL, recipe, 3, torch.tensor([5.0, 1.0, 0.0]))
    assign(model, initial_values(model, 0) | starting_zeros(model))
    return model


def objects(num: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Two images, the first with `num` objects, the second without any."""
    boxes = torch.tensor([[4.0, 6.0, 20.0, 26.0], [18.0, 2.0, 38.0, 20.0]])[:num]
    masks = torch.zeros(num, 40, 40, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    none = torch.zeros(0, dtype=torch.int64)
    return (
        [boxes, boxes[:0]],
        [torch.tensor([1, 2])[:num], none],
        [masks, torch.zeros(0, 40, 40, dtype=torch.uint8)],
    )


def test_global_blocks_end_equal_parts() -> None:
    """Of ViT-H: blocks 7, 15, 23 and 31."""
    assert global_blocks(32, 4) == [7, 15, 23, 31]
    assert global_blocks(24, 4) == [5, 11, 17, 23]
    assert global_blocks(2, 4) == [0, 1]


@pytest.mark.parametrize("window", [5, 4, 10])
def test_a_window_attends_to_itself_alone(window: int) -> None:
    """The oracle is timm's attention on each window; 4 does not divide 10: zeros fill it up."""
    torch.manual_seed(0)
    own = WindowAttention(MODEL, window, relative=False)
    theirs = Attention(16, num_heads=2, qkv_bias=True)
    theirs.load_state_dict(own.state_dict())
    tokens = torch.randn(2, 100, 16)
    square = F.pad(tokens.unflatten(1, (10, 10)), (0, 0, 0, -10 % window, 0, -10 % window))
    expected = torch.zeros_like(square)
    for top in range(0, square.shape[1], window):
        for left in range(0, square.shape[2], window):
            part = square[:, top : top + window, left : left + window]
            out = theirs(part.flatten(1, 2)).unflatten(1, (window, window))
            expected[:, top : top + window, left : left + window] = out
    torch.testing.assert_close(own(tokens), expected[:, :10, :10].flatten(1, 2))


def test_relative_positions_are_sums_over_the_two_distances() -> None:
    torch.manual_seed(0)
    own = RelativePositions(3, 4)
    torch.nn.init.normal_(own.relative_bias)
    query = torch.randn(1, 2, 9, 4)
    got = own(query)
    for at in range(9):
        for to in range(9):
            down = own.relative_bias[0, at // 3 - to // 3 + 2]
            across = own.relative_bias[1, at % 3 - to % 3 + 2]
            expected = query[0, :, at] @ (down + across)
            torch.testing.assert_close(got[0, :, at, to], expected)


def test_the_backbone_is_the_encoder_without_class_token_and_norm() -> None:
    """With global attention everywhere, against timm's blocks run by hand."""
    torch.manual_seed(0)
    image = VisionEncoder(MODEL)
    own = PlainBackbone(MODEL, window=4, num_global=2, relative=False, drop_path=0.0)
    own.load_state_dict(backbone_tensors(image.state_dict()))
    pixels = torch.randn(2, 3, 40, 40)
    tokens = image.blocks(image.patch_embed(pixels) + image.pos_embed[:, 1:])
    torch.testing.assert_close(own(pixels).flatten(2).transpose(1, 2), tokens)


def test_the_pyramid_has_its_scales() -> None:
    maps = SimplePyramid(16, 8, (4.0, 2.0, 1.0, 0.5))(torch.randn(1, 16, 10, 10))
    assert [level.shape[-1] for level in maps.values()] == [40, 20, 10, 5, 3]
    assert {level.shape[1] for level in maps.values()} == {8}


@pytest.mark.parametrize("loss", ["softmax", "federated"])
@pytest.mark.parametrize("num", [2, 0])
def test_every_weight_is_used_whatever_is_in_the_images(num: int, loss: str) -> None:
    """Images without objects too: ranks of ZeRO-3 wait for each other's modules."""
    model = detector(loss=loss)
    torch.manual_seed(0)
    losses = model(torch.randn(2, 3, 40, 40), *objects(num))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.isfinite()
    unused = [name for name, param in model.named_parameters() if param.grad is None]
    assert not unused
    assert (losses["mask"] > 0) == (num > 0)


def test_the_federated_loss_looks_at_the_classes_of_the_images_and_some_others() -> None:
    model = detector(loss="federated", federated_classes=2)
    torch.manual_seed(0)
    seen = model._looked_at([torch.tensor([3]), torch.zeros(0, dtype=torch.int64)])
    assert seen is not None and seen[2] and seen.sum() == 2
    # A class without training images is never drawn.
    model = detector(loss="federated", federated_classes=3)
    seen = model._looked_at([torch.tensor([2])])
    assert seen is not None and seen.tolist() == [True, True, False]


@pytest.mark.slow
def test_a_detector_learns_two_objects_by_heart() -> None:
    heads = HEADS.model_copy(update={"box_convs": 0, "rpn_convs": 1, "rpn_samples": 32})
    model = detector(heads=heads, window=5)
    pixels = torch.zeros(2, 3, 40, 40)
    boxes, classes, masks = objects(2)
    for k in range(2):
        pixels[0, k][masks[0][k].bool()] = 1.0
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(100):
        torch.manual_seed(step)
        losses = model(pixels, boxes, classes, masks)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        first, second = model(pixels)
    best = [int((first["scores"] * (first["classes"] == k)).argmax()) for k in (1, 2)]
    assert (box_iou(first["boxes"][best], boxes[0]).diag() > 0.5).all()
    assert (second["scores"] < first["scores"][best].min()).all()


@pytest.mark.parametrize("scales", [(1.0, 0.5), (4.0, 2.0, 1.0, 0.5)])
def test_flops_are_those_that_torch_counts(scales: tuple[float, ...]) -> None:
    """Part by part: how many boxes an image has is known in training only."""
    heads = HEADS.model_copy(update={"scales": scales, "box_convs": 2})
    model = detector(heads=heads, window=4, global_blocks=1)

    def counted(module: torch.nn.Module, inputs: object) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(inputs)
        return counter.get_total_flops()

    pixels = torch.randn(1, 3, 40, 40)
    assert counted(model.encoder, pixels) == flops_detection.backbone_forward(MODEL, 4, 1, True)
    last = model.encoder(pixels)
    assert counted(model.pyramid, last) == flops_detection.pyramid_forward(MODEL, heads)
    maps = list(model.pyramid(last).values())
    assert counted(model.rpn.head, maps) == flops_detection.proposals_forward(MODEL, heads)
    boxes = counted(model.box_heads[0], torch.randn(5, 8, 7, 7))
    assert boxes == 5 * flops_detection.box_head_forward(heads, 3)
    masks = counted(model.mask_head, torch.randn(5, 8, 14, 14))
    assert masks == 5 * flops_detection.mask_head_forward(heads, 3)
