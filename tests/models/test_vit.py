"""The encoder against timm's own forward, published counts and hand-made position tables."""

import math
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from harness.models.heads import Classifier, pooled
from harness.models.init import initialize
from harness.models.vit import VisionEncoder, sincos_positions
from harness.study.flops import encoder_params
from harness.study.recipes import Model, Pool
from harness.study.sizes import SIZES

SMALL = Model(width=32, depth=2, heads=2, patch=4, image_size=16)


def model_of(size: str, image_size: int = 224) -> Model:
    s = SIZES[size]
    return Model(width=s.width, depth=s.depth, heads=s.heads, patch=s.patch, image_size=image_size)


def count(module: torch.nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


@pytest.mark.parametrize(
    ("size", "bare", "with_head"),
    [
        ("ti", 5_524_416, 5_717_416),
        ("s", 21_665_664, 22_050_664),
        ("b", 85_798_656, 86_567_656),
        ("l", 303_301_632, 304_326_632),
        ("h", 630_764_800, 632_045_800),
        ("2b", 1_890_408_960, 1_892_969_960),
        ("6.5b", 6_447_632_384, 6_451_729_384),
    ],
)
def test_parameter_counts_are_the_published_ones(size: str, bare: int, with_head: int) -> None:
    with torch.device("meta"):
        encoder = VisionEncoder(model_of(size))
        assert count(encoder) == bare
        assert count(Classifier(encoder, 1000, "cls")) == with_head


@pytest.mark.parametrize(
    ("size", "image_size", "patches", "with_head", "minus_positions", "hashtag_head"),
    [
        ("b", 512, 1024, 87_203_560, 85_647_360, 21_532_000),
        ("l", 512, 1024, 305_174_504, 303_099_904, 28_700_000),
        ("h", 518, 1369, 633_470_440, 630_435_840, 35_868_000),
        ("2b", 518, 1369, 1_895_819_240, 1_889_751_040, 71_708_000),
        ("6.5b", 518, 1369, 6_456_288_232, 6_446_579_712, 114_716_000),
    ],
)
def test_parameter_counts_at_high_resolution_and_of_the_heads(
    size: str,
    image_size: int,
    patches: int,
    with_head: int,
    minus_positions: int,
    hashtag_head: int,
) -> None:
    with torch.device("meta"):
        encoder = VisionEncoder(model_of(size, image_size))
        assert encoder.pos_embed.shape[1] == patches + 1
        assert count(Classifier(encoder, 1000, "cls")) == with_head
        # Whatever the resolution, nothing but the positions depends on it.
        assert count(encoder) - encoder.pos_embed.numel() == minus_positions
        hashtags = Classifier(VisionEncoder(model_of(size)), 28_000, "cls")
        assert count(hashtags.head) == hashtag_head
        positions = hashtags.encoder.pos_embed.numel()
        assert count(hashtags) == minus_positions + positions + hashtag_head


@pytest.mark.parametrize("image_size", [224, 448])
@pytest.mark.parametrize("size", SIZES)
def test_the_closed_form_counts_what_the_module_has(size: str, image_size: int) -> None:
    model = model_of(size, image_size)
    with torch.device("meta"):
        assert count(VisionEncoder(model)) == encoder_params(model)


def test_timm_weights_load_strictly_and_give_timms_features() -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).eval()
    ours = VisionEncoder(model_of("ti", 32)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images))


def test_kept_patches_are_what_timm_would_see_with_the_others_removed() -> None:
    encoder = VisionEncoder(SMALL)
    initialize(encoder, 0)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[3, 0, 7], [15, 2, 1]])
    with torch.no_grad():
        got = encoder(images, keep)
        weight, bias = encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias
        tokens = torch.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
        tokens = tokens + encoder.pos_embed[:, 1:]
        for b in range(2):
            cls = encoder.cls_token[0] + encoder.pos_embed[0, :1]
            rows = torch.cat([cls, tokens[b, keep[b]]])[None]
            expected = encoder.norm(encoder.blocks(rows))
            torch.testing.assert_close(got[b : b + 1], expected)


def test_positions_are_sines_of_column_and_row_and_zero_for_the_class_token() -> None:
    table = sincos_positions(3, 8)
    assert table.shape == (1, 10, 8)
    assert torch.equal(table[0, 0], torch.zeros(8))
    row, column = 2, 1
    frequencies = [1.0, 10000 ** (-1 / 2)]
    expected = [
        f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in frequencies
    ]
    torch.testing.assert_close(table[0, 1 + row * 3 + column], torch.tensor(expected))


def test_positions_are_trained_in_supervised_stages_and_a_buffer_in_mae() -> None:
    trained = VisionEncoder(SMALL)
    fixed = VisionEncoder(SMALL, train_positions=False)
    assert "pos_embed" in dict(trained.named_parameters())
    assert "pos_embed" in dict(fixed.named_buffers())
    assert trained.state_dict().keys() == fixed.state_dict().keys()


def test_a_wrong_image_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"images are 20x20, the encoder takes \(16, 16\)"):
        VisionEncoder(SMALL)(torch.zeros(1, 3, 20, 20))


@pytest.mark.parametrize(
    ("pool", "theirs"),
    [
        ("cls", {"global_pool": "token"}),
        ("mean", {"global_pool": "avg", "fc_norm": False}),
        ("mean_fc_norm", {"global_pool": "avg", "fc_norm": True}),
    ],
)
def test_pooling_is_timms(pool: Pool, theirs: dict[str, Any]) -> None:
    encoder = VisionEncoder(SMALL)
    initialize(encoder, 0)
    for param in encoder.parameters():
        param.data += 0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
    shape = {"embed_dim": SMALL.width, "depth": SMALL.depth, "num_heads": SMALL.heads}
    timms = VisionTransformer(
        img_size=SMALL.image_size, patch_size=SMALL.patch, num_classes=0, **shape, **theirs
    )
    weights = encoder.state_dict()
    if pool == "mean_fc_norm":
        weights = {
            k.replace("norm.", "fc_norm.", k.startswith("norm.")): v for k, v in weights.items()
        }
    timms.load_state_dict(weights)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(pooled(encoder, images, pool), timms(images))


def test_layer_norm_of_a_bfloat16_model_computes_in_float32() -> None:
    """Its kernel reads bfloat16 and rounds once, at the end; else some per mille would differ."""
    norm = VisionEncoder(model_of("b")).norm
    generator = torch.Generator().manual_seed(0)
    norm.weight.data.normal_(1, 0.2, generator=generator)
    norm.bias.data.normal_(0, 0.2, generator=generator)
    norm = norm.bfloat16()
    tokens = (3 * torch.randn(64, 50, 768, generator=generator)).bfloat16()
    exact = F.layer_norm(
        tokens.float(), (768,), norm.weight.float(), norm.bias.float(), norm.eps
    ).bfloat16()
    assert (norm(tokens) != exact).float().mean() < 1e-4
