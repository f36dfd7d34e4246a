"""Optimizer groups: what is decayed, and layer-wise scales against the published numbers."""

import pytest
import torch

from harness.models.heads import Classifier
from harness.models.mae import Mae
from harness.models.vit import VisionEncoder
from harness.study.recipes import Duration, MaeRecipe, Model
from harness.train.groups import layer_id, layer_scale, parameter_groups

SMALL = Model(width=32, depth=3, heads=2, patch=4, image_size=16)


def names_of(model: torch.nn.Module, params: list[torch.Tensor]) -> set[str]:
    by_id = {id(param): name for name, param in model.named_parameters()}
    return {by_id[id(param)] for param in params}


@pytest.mark.parametrize(
    ("decay", "depth", "layer", "scale"),
    [
        (0.65, 12, 0, 0.003697206),
        (0.75, 24, 0, 7.525434e-4),
        (0.75, 32, 0, 7.533932e-5),
        (0.7, 12, 0, 0.009688901),
        (0.9, 32, 0, 0.030903154),
        (0.65, 12, 1, 0.005688009),
        (0.75, 24, 1, 0.001003391),
        (0.75, 24, 24, 0.75),
        (0.75, 24, 25, 1.0),
    ],
)
def test_scales_are_the_published_ones(decay: float, depth: int, layer: int, scale: float) -> None:
    assert layer_scale(layer, depth, decay) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.cls_token", 0),
        ("encoder.pos_embed", 0),
        ("encoder.patch_embed.proj.weight", 0),
        ("encoder.blocks.0.norm1.weight", 1),
        ("encoder.blocks.11.mlp.fc2.bias", 12),
        ("encoder.norm.weight", 13),
        ("head.weight", 13),
    ],
)
def test_layer_of_a_parameter(name: str, layer: int) -> None:
    assert layer_id(name, 12) == layer


def test_biases_norms_tokens_and_positions_are_not_decayed() -> None:
    model = Classifier(VisionEncoder(SMALL), 5, "cls")
    groups = parameter_groups(model, depth=3, weight_decay=0.05)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.05]
    free = next(group for group in groups if group["weight_decay"] == 0.0)
    for name in names_of(model, free["params"]):
        assert name.endswith(("bias", "cls_token", "pos_embed")) or "norm" in name, name
    decayed = next(group for group in groups if group["weight_decay"] == 0.05)
    assert all(name.endswith("weight") for name in names_of(model, decayed["params"]))


def test_the_mask_token_is_not_decayed() -> None:
    recipe = MaeRecipe(
        duration=Duration(steps=1), decoder_width=16, decoder_depth=1, decoder_heads=2
    )
    mae = Mae(SMALL, recipe)
    groups = parameter_groups(mae, depth=3, weight_decay=0.05)
    free = next(group for group in groups if group["weight_decay"] == 0.0)
    assert "decoder.mask_token" in names_of(mae, free["params"])


def test_layer_decay_gives_two_groups_a_layer_and_every_parameter_once() -> None:
    model = Classifier(VisionEncoder(SMALL), 5, "cls")
    groups = parameter_groups(model, depth=3, weight_decay=0.05, layer_decay=0.5)
    assert len(groups) == 2 * (3 + 2)
    params = [param for group in groups for param in group["params"]]
    assert len(params) == len(set(map(id, params))) == len(list(model.parameters()))
    scales = {group["lr_scale"] for group in groups}
    assert scales == {1.0, 0.5, 0.25, 0.125, 0.0625}
