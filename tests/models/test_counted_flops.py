"""The study's closed-form FLOPs against PyTorch's counter on the real modules."""

import pytest
import torch
from timm.layers.attention import Attention
from torch.utils.flop_counter import FlopCounterMode

from harness.models.heads import Classifier
from harness.models.lit import TwoTowers
from harness.models.mae import Mae
from harness.models.vit import VisionEncoder
from harness.study import flops
from harness.study.protocols import Lit, TextTower
from harness.study.recipes import Duration, MaeRecipe, Model
from harness.study.sizes import SIZES

SIZES_AND_SIDES = [("d32x3", 24), ("d64x4", 32), ("s", 224)]


def model_of(size: str, image_size: int) -> Model:
    s = SIZES[size]
    return Model(width=s.width, depth=s.depth, heads=s.heads, patch=s.patch, image_size=image_size)


def counted(module: torch.nn.Module, *inputs: torch.Tensor, train: bool) -> float:
    """FLOPs of one forward pass, with `train` of the backward pass as well.

    With attention written out: a fused kernel computes the scores again in its backward pass,
    which the counter counts and the formulas, as everybody's, do not.
    """
    for part in module.modules():
        if isinstance(part, Attention):
            part.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        output = module(*inputs)
        if train:
            (output[0] if isinstance(output, tuple) else output.sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("size", "side"), SIZES_AND_SIDES)
@pytest.mark.parametrize("train", [False, True])
def test_classifier(size: str, side: int, train: bool) -> None:
    model = model_of(size, side)
    with torch.device("meta"):
        module, images = Classifier(VisionEncoder(model), 20, "cls"), torch.rand(1, 3, side, side)
        got = counted(module, images, train=train)
    formula = flops.vit_train if train else flops.vit_forward
    assert got == formula(model, 20)


@pytest.mark.parametrize(("size", "side"), SIZES_AND_SIDES)
@pytest.mark.parametrize("train", [False, True])
def test_mae(size: str, side: int, train: bool) -> None:
    model = model_of(size, side)
    recipe = MaeRecipe(
        duration=Duration(steps=1), decoder_width=32, decoder_depth=2, decoder_heads=2
    )
    with torch.device("meta"):
        module = Mae(model, recipe)
        images = torch.rand(1, 3, side, side)
        noise = torch.rand(1, model.num_patches)
        got = counted(module, images, noise, train=train)
    formula = flops.mae_train if train else flops.mae_forward
    assert got == formula(model, recipe)


@pytest.mark.parametrize(("size", "side"), SIZES_AND_SIDES)
def test_each_part_of_the_mae(size: str, side: int) -> None:
    model = model_of(size, side)
    recipe = MaeRecipe(
        duration=Duration(steps=1), decoder_width=32, decoder_depth=2, decoder_heads=2
    )
    kept = flops.num_kept(model, recipe.mask_ratio)
    with torch.device("meta"):
        module = Mae(model, recipe)
        keep = torch.zeros(1, kept, dtype=torch.long)
        encoder = counted(module.encoder, torch.rand(1, 3, side, side), keep, train=False)
        decoder = counted(module.decoder, torch.rand(1, kept + 1, model.width), keep, train=False)
    assert encoder == flops.mae_encoder_forward(model, recipe)
    assert decoder == flops.mae_decoder_forward(model, recipe)


@pytest.mark.parametrize("size", ["b", "l", "h", "2b", "6.5b"])
@pytest.mark.parametrize("is_fused", [True, False])
def test_attention_alone(size: str, is_fused: bool) -> None:
    model = model_of(size, 224)
    tokens, d = model.num_patches + 1, model.width
    with torch.device("meta"):
        block = VisionEncoder(model.model_copy(update={"depth": 1})).blocks[0]
        assert isinstance(block.attn, Attention)
        block.attn.fused_attn = is_fused
        with FlopCounterMode(display=False) as counter:
            block.attn(torch.rand(1, tokens, d))
    projections = 8.0 * tokens * d * d
    assert counter.get_total_flops() == flops.attention(tokens, d) + projections


@pytest.mark.parametrize(
    ("size", "side"),
    [("ti", 224), ("s", 512), ("b", 512), ("l", 224), ("h", 518), ("2b", 224), ("6.5b", 224)],
)
def test_the_papers_own_sizes(size: str, side: int) -> None:
    model, recipe = model_of(size, side), MaeRecipe(duration=Duration(steps=1))
    with torch.device("meta"):
        images = torch.rand(1, 3, side, side)
        vit = counted(Classifier(VisionEncoder(model), 1000, "cls"), images, train=True)
        noise = torch.rand(1, model.num_patches)
        mae = counted(Mae(model, recipe), images, noise, train=True)
    assert vit == flops.vit_train(model, 1000)
    assert mae == flops.mae_train(model, recipe)


@pytest.mark.parametrize(("width", "embed"), [(32, None), (48, 20)])
def test_training_a_text_tower_to_features(width: int, embed: int | None) -> None:
    model = model_of("d32x3", 24)
    text = TextTower(width=width, depth=2, heads=4)
    recipe = Lit(duration=Duration(steps=1), text=text, context=30, embed=embed)
    with torch.device("meta"):
        towers = TwoTowers(recipe, model.width)
        tokens = torch.zeros(1, recipe.context + 2, dtype=torch.long)
        for part in towers.modules():
            if isinstance(part, Attention):
                part.fused_attn = False
        with FlopCounterMode(display=False) as counter:
            image, words, _ = towers(torch.rand(1, model.width), tokens, tokens == 0)
            assert image is not None and words is not None
            (image * words).sum().backward()
    # The first token alone goes through the last norm and the projection.
    assert counter.get_total_flops() == recipe.flops(model, 1, 1, 1, 0)
