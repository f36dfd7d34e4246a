"""The inflated encoder against the image encoder, a naive loop and PyTorch's counter."""

from itertools import product

import pytest
import torch
from test_counted_flops import counted
from torch import nn
from torch.nn import functional as F

from harness.models.heads import Classifier
from harness.models.init import initial_values, initialize
from harness.models.video import (
    Inflation,
    RelativeBias,
    VideoClassifier,
    VideoEncoder,
    bias_rows,
    inflate,
    relative_index,
)
from harness.models.vit import VisionEncoder
from harness.study import flops
from harness.study.recipes import Model
from harness.train.groups import is_decayed, layer_id

MODEL = Model(width=32, depth=2, heads=2, patch=4, image_size=16)


def image_encoder() -> VisionEncoder:
    encoder = VisionEncoder(MODEL)
    initialize(encoder, 3)
    return encoder.eval()


def video_encoder(
    frames: int = 4, tube: int = 2, relative_bias: RelativeBias = "shared"
) -> VideoEncoder:
    encoder = VideoEncoder(MODEL, frames=frames, tube=tube, relative_bias=relative_bias)
    initialize(encoder, 0)
    return encoder.eval()


def start_from_image(encoder: VideoEncoder, tube: int, how: Inflation = "central") -> None:
    found = encoder.load_state_dict(inflate(image_encoder().state_dict(), tube, how), strict=False)
    assert set(found.missing_keys) <= {"time_embed", "relative_bias"}
    assert not found.unexpected_keys


@pytest.mark.parametrize("how", ["central", "mean"])
@pytest.mark.parametrize(("frames", "tube"), [(2, 2), (3, 3), (1, 1)])
def test_one_tube_of_a_still_clip_is_the_image(how: Inflation, frames: int, tube: int) -> None:
    encoder = video_encoder(frames, tube)
    start_from_image(encoder, tube, how)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = image_encoder()(images)
        got = encoder(images[:, None].expand(-1, frames, -1, -1, -1))
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("how", ["central", "mean"])
def test_a_still_clip_of_many_tubes_is_the_image_shown_so_often(how: Inflation) -> None:
    encoder = video_encoder(6, 2)
    start_from_image(encoder, 2, how)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = encoder(images[:, None].expand(-1, 6, -1, -1, -1))
        tubes = got[:, 1:].reshape(2, 3, 16, 32)
        torch.testing.assert_close(tubes, tubes[:, :1].expand_as(tubes), atol=1e-6, rtol=0)
        # The image encoder with each patch token thrice is what joint attention then computes.
        plain = image_encoder()
        tokens = plain.patch_embed(images) + plain.pos_embed[:, 1:]
        cls = (plain.cls_token + plain.pos_embed[:, :1]).expand(2, -1, -1)
        wanted = plain.norm(plain.blocks(torch.cat([cls, tokens.repeat(1, 3, 1)], dim=1)))
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("frames", "grid"), [(1, 3), (3, 2), (4, 4)])
def test_a_row_of_the_bias_table_stands_for_an_offset(frames: int, grid: int) -> None:
    index = relative_index(frames, grid)
    places = list(product(range(frames), range(grid), range(grid)))
    row_of: dict[tuple[int, ...] | str, int] = {}
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            offset = tuple(a - b for a, b in zip(query, key, strict=True))
            assert row_of.setdefault(offset, int(index[i + 1, j + 1])) == index[i + 1, j + 1]
        row_of.setdefault("from cls", int(index[0, i + 1]))
        row_of.setdefault("to cls", int(index[i + 1, 0]))
        assert index[0, i + 1] == row_of["from cls"] and index[i + 1, 0] == row_of["to cls"]
    row_of["cls"] = int(index[0, 0])
    assert sorted(row_of.values()) == list(range(bias_rows(frames, grid)))


@pytest.mark.parametrize("relative_bias", ["shared", "per_block"])
def test_biases_are_added_to_the_scores(relative_bias: RelativeBias) -> None:
    """Against attention written out, query by query."""
    encoder = video_encoder(4, 2, relative_bias)
    table = encoder.relative_bias
    assert table is not None and len(table) == (2 if relative_bias == "per_block" else 1)
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(table, generator=generator)
    nn.init.normal_(encoder.time_embed, generator=generator)
    clips = torch.randn(2, 4, 3, 16, 16, generator=generator)
    with torch.no_grad():
        got = encoder(clips)
        tokens = torch.stack([naive(encoder, clip) for clip in clips])
    torch.testing.assert_close(got, tokens, atol=1e-5, rtol=1e-5)


def naive(encoder: VideoEncoder, clip: torch.Tensor) -> torch.Tensor:
    projected = F.conv3d(
        clip.transpose(0, 1)[None], encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias,
        stride=(2, 4, 4),
    )[0]  # fmt: skip
    rows = [encoder.cls_token[0, 0] + encoder.pos_embed[0, 0]]
    places = list(product(range(2), range(4), range(4)))
    for time, row, column in places:
        position = encoder.pos_embed[0, 1 + 4 * row + column] + encoder.time_embed[0, time, 0]
        rows.append(projected[:, time, row, column] + position)
    x = torch.stack(rows)
    table = encoder.relative_bias
    assert table is not None
    for number, block in enumerate(encoder.blocks):
        own = table[number % len(table)]
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).reshape(33, 3, 2, 16)
        mixed = torch.empty(33, 2, 16)
        for head in range(2):
            for query in range(33):
                scores = torch.empty(33)
                for key in range(33):
                    if query and key:
                        dt, dy, dx = (
                            a - b for a, b in zip(places[query - 1], places[key - 1], strict=True)
                        )
                        place = ((dt + 1) * 7 + dy + 3) * 7 + dx + 3
                    else:
                        place = len(own) - (1 if query == key else 2 if query else 3)
                    score = qkv[query, 0, head] @ qkv[key, 1, head] / 4.0
                    scores[key] = score + own[place, head]
                mixed[query, head] = scores.softmax(0) @ qkv[:, 2, head]
        x = x + attention.proj(mixed.reshape(33, 32))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)


def test_all_that_is_new_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = VideoClassifier(video_encoder(relative_bias="per_block"), 5, "mean")
    initialize(model, 0)
    nn.init.normal_(model.head.weight)
    model(torch.randn(2, 4, 3, 16, 16)).square().sum().backward()
    assert all(param.grad is not None and param.grad.any() for param in model.parameters())


def test_the_tables_are_neither_decayed_nor_slowed_down() -> None:
    model = VideoClassifier(video_encoder(), 5, "cls")
    named = dict(model.named_parameters())
    for name in ("encoder.time_embed", "encoder.relative_bias"):
        assert not is_decayed(name, named[name])
        assert layer_id(name, MODEL.depth) == MODEL.depth + 1
    assert is_decayed("encoder.patch_embed.proj.weight", named["encoder.patch_embed.proj.weight"])


def test_a_model_on_the_meta_device_has_the_same_initial_values() -> None:
    with torch.device("meta"):
        empty = VideoClassifier(VideoEncoder(MODEL, frames=4, tube=2), 5, "cls")
    whole = VideoClassifier(video_encoder(), 5, "cls")
    initialize(whole, 0)
    values = initial_values(empty, 0)
    assert all(torch.equal(values[name](), param) for name, param in whole.named_parameters())
    empty.to_empty(device="cpu").load_state_dict(whole.state_dict())
    clips = torch.randn(1, 4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(empty.eval()(clips), whole.eval()(clips))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("model", "frames", "tube"),
    [(MODEL, 4, 2), (Model(width=768, depth=12, heads=12, patch=16, image_size=224), 16, 2)],
)
def test_flops_are_those_of_the_real_module(
    model: Model, frames: int, tube: int, train: bool
) -> None:
    with torch.device("meta"):
        module = VideoClassifier(VideoEncoder(model, frames=frames, tube=tube), 400, "cls")
        clips = torch.rand(1, frames, 3, model.image_size, model.image_size)
        got = counted(module, clips, train=train)
    formula = flops.video_train if train else flops.video_forward
    assert got == formula(model, frames, tube, 400)


def test_a_clip_of_one_frame_costs_what_an_image_costs() -> None:
    assert flops.video_train(MODEL, 1, 1, 7) == flops.vit_train(MODEL, 7)
    assert isinstance(VideoClassifier(video_encoder(), 2, "cls"), Classifier)
