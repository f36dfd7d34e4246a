"""Closed forms against published parameter counts, and against sums written out by hand."""

import pytest

from harness.study import flops
from harness.study.recipes import MaeRecipe, Model
from harness.study.sizes import SIZES

# Without a head at 224 px. b, l, h: the known 1000-class counts (86,567,656 / 304,326,632 /
# 632,045,800) less the head d * 1000 + 1000.
PARAMS = {
    "ti": 5_717_416 - 193_000,
    "s": 22_050_664 - 385_000,
    "b": 86_567_656 - 769_000,
    "l": 304_326_632 - 1_025_000,
    "h": 632_045_800 - 1_281_000,
    "2b": 1_890_408_960,
    "6.5b": 6_447_632_384,
}


def model(size: str, image_size: int = 224) -> Model:
    s = SIZES[size]
    return Model(width=s.width, depth=s.depth, heads=s.heads, patch=s.patch, image_size=image_size)


@pytest.mark.parametrize(("size", "params"), PARAMS.items())
def test_parameter_counts_equal_the_published_ones(size: str, params: int) -> None:
    assert flops.encoder_params(model(size)) == params


@pytest.mark.parametrize(
    ("size", "gmacs"),
    [("b", 17.563), ("l", 61.554), ("h", 167.294), ("2b", 493.573), ("6.5b", 1673.641)],
)
def test_forward_flops_are_twice_the_multiply_adds(size: str, gmacs: float) -> None:
    # A 1000-class head costs d * 1000 multiply-adds on the one pooled token.
    with_head = flops.vit_forward(model(size), 1000) / 2e9
    assert with_head == pytest.approx(gmacs, abs=0.005)


@pytest.mark.parametrize(
    ("size", "wsp", "mae"),
    [("s", 27.6, 39.0), ("b", 105.4, 58.7), ("l", 369.3, 124.5), ("h", 1004, 291.4)],
)
def test_training_costs_of_the_paper_sizes(size: str, wsp: float, mae: float) -> None:
    recipe = MaeRecipe.model_validate({"duration": {"samples": 1}})
    assert flops.vit_train(model(size), 0) / 1e9 == pytest.approx(wsp, rel=0.005)
    # The usual account projects the hidden patches as well (forward and weight gradient) and
    # predicts pixels for the class token (three passes); this model does neither.
    shape = model(size)
    pixels = 3 * shape.patch**2
    hidden = shape.num_patches - flops.num_kept(shape, 0.75)
    usual = flops.mae_train(shape, recipe)
    usual += 2 * 2 * hidden * pixels * shape.width + 3 * 2 * 512 * pixels
    assert usual / 1e9 == pytest.approx(mae, rel=0.005)


def test_visible_patches_are_rounded_down() -> None:
    assert flops.num_kept(model("b"), 0.75) == 49
    assert flops.num_kept(model("b"), 0.9) == 19
    assert flops.num_kept(model("h"), 0.75) == 64
    assert flops.num_kept(model("h", 518), 0.75) == 342


@pytest.mark.parametrize(
    ("size", "image_size", "params"),
    [
        ("b", 512, 87_203_560),
        ("l", 512, 305_174_504),
        ("h", 518, 633_470_440),
        ("2b", 518, 1_895_819_240),
        ("6.5b", 518, 6_456_288_232),
    ],
)
def test_parameter_counts_at_high_resolution_with_1000_classes(
    size: str, image_size: int, params: int
) -> None:
    shape = model(size, image_size)
    assert flops.encoder_params(shape) + 1000 * shape.width + 1000 == params


def test_parts_of_the_mae_add_up() -> None:
    recipe = MaeRecipe.model_validate({"duration": {"samples": 1}})
    for size in PARAMS:
        shape = model(size)
        encoder, decoder = (
            part(shape, recipe) for part in (flops.mae_encoder_forward, flops.mae_decoder_forward)
        )
        assert encoder + decoder == flops.mae_forward(shape, recipe)
        # A quarter of the patches, and attention among them alone: less than a quarter of the ViT,
        # but for the class token.
        assert 0.2 < encoder / flops.vit_forward(shape) < 0.26
