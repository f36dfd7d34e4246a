"""Masking, targets and loss of MAE against small examples and a version in numpy."""

import numpy as np
import pytest
import torch

from harness.models.init import initialize
from harness.models.mae import (
    Mae,
    hidden_mask,
    masked_loss,
    target_statistics,
    visible_patches,
)
from harness.models.pixels import patchify, standardise, to_bytes, unpatchify
from harness.study.recipes import Duration, MaeRecipe, Model
from harness.study.sizes import SIZES

RECIPE = MaeRecipe(duration=Duration(steps=1), decoder_width=16, decoder_depth=1, decoder_heads=2)
SMALL = Model(width=32, depth=2, heads=2, patch=4, image_size=16)


@pytest.mark.parametrize(
    ("size", "total", "trained"),
    [
        ("b", 111_907_840, 111_655_680),
        ("l", 329_541_888, 329_239_296),
        ("h", 657_074_508, 656_613_964),
        ("2b", 1_917_374_028, 1_916_584_524),
        ("6.5b", 6_475_383_884, 6_474_199_628),
    ],
)
def test_parameter_counts_with_the_stock_decoder(size: str, total: int, trained: int) -> None:
    s = SIZES[size]
    model = Model(width=s.width, depth=s.depth, heads=s.heads, patch=s.patch, image_size=224)
    with torch.device("meta"):
        mae = Mae(model, MaeRecipe(duration=Duration(steps=1)))
    params = sum(param.numel() for param in mae.parameters())
    assert params == trained
    assert params + sum(buffer.numel() for buffer in mae.buffers()) == total


def test_mask_example() -> None:
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.2]])
    keep = visible_patches(noise, 0.75)
    assert keep.tolist() == [[1]]
    assert hidden_mask(keep, 4).tolist() == [[1, 0, 1, 1]]


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [
        (196, 0.75, 49),
        (256, 0.75, 64),
        (196, 0.9, 19),
        (256, 0.9, 25),
        (196, 0.6, 78),
        (256, 0.6, 102),
        (1024, 0.75, 256),
        (1369, 0.75, 342),
    ],
)
def test_number_of_kept_patches_is_cut_off_not_rounded(
    patches: int, ratio: float, kept: int
) -> None:
    assert visible_patches(torch.rand(2, patches), ratio).shape == (2, kept)


def test_patch_vectors_run_by_row_column_channel() -> None:
    values = torch.arange(12.0).reshape(1, 3, 2, 2)  # c * 4 + y * 2 + x
    patches = patchify(values, 2)
    assert patches.tolist() == [[[0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]]
    assert torch.equal(unpatchify(patches, 2), values)


def test_pixels_survive_the_way_to_network_input_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    assert torch.equal(to_bytes(standardise(pixels)), pixels)


@pytest.mark.parametrize("patch", [16, 14])
def test_zero_prediction_costs_less_than_one_as_the_variance_is_unbiased(patch: int) -> None:
    numbers = patch * patch * 3
    target = torch.rand(1, 1, numbers, generator=torch.Generator().manual_seed(0))
    mean, scale = target_statistics(target)
    loss = masked_loss(torch.zeros_like(target), (target - mean) / scale, torch.ones(1, 1))
    # 767/768 and 587/588, up to the 1e-6 beside a variance of 1/12.
    assert loss.item() == pytest.approx((numbers - 1) / numbers, abs=2e-5)


def test_target_example() -> None:
    target = torch.arange(12.0).reshape(1, 1, 12)
    mean, scale = target_statistics(target)
    normed = (target - mean) / scale
    assert normed[0, 0, 0].item() == pytest.approx(-1.525425, abs=1e-6)
    loss = masked_loss(torch.zeros_like(normed), normed, torch.ones(1, 1))
    assert loss.item() == pytest.approx(0.9166666, abs=1e-6)
    flat_mean, flat_scale = target_statistics(torch.full((1, 1, 12), 3.0))
    assert ((3.0 - flat_mean) / flat_scale).abs().max().item() == 0


def test_loss_counts_hidden_patches_only() -> None:
    mae = Mae(SMALL, RECIPE)
    initialize(mae, 0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    noise = torch.rand(3, 16, generator=generator)
    with torch.no_grad():
        loss, pred, mask = mae(images, noise)
    # The same in numpy, one sample and one patch at a time.
    errors = []
    for b in range(3):
        hidden = np.argsort(noise[b].numpy())[4:]
        assert np.array_equal(np.sort(hidden), np.flatnonzero(mask[b].numpy()))
        for patch in hidden:
            y, x = divmod(int(patch), 4)
            block = images[b].numpy()[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            target = block.transpose(1, 2, 0).reshape(-1).astype(np.float64)
            target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(((pred[b, patch].numpy() - target) ** 2).mean())
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-6)


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    mae = Mae(SMALL, RECIPE)
    initialize(mae, 0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, 16, 16, generator=generator)
    noise = torch.rand(1, 16, generator=generator)
    with torch.no_grad():
        _, before, mask = mae(images, noise)
        hidden = unpatchify(mask[..., None].expand(-1, -1, 48), 4)
        _, after, _ = mae(images + 5 * hidden, noise)
    assert torch.equal(before, after)


def test_gradient_through_the_decoder_agrees_with_finite_differences() -> None:
    mae = Mae(SMALL, RECIPE).double()
    initialize(mae, 0)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    noise = torch.rand(2, 16)
    mae.decoder.mask_token.requires_grad_()

    def loss(token: torch.Tensor) -> torch.Tensor:
        swapped = {"decoder.mask_token": token}
        return torch.func.functional_call(mae, swapped, (images, noise))[0]

    token = mae.decoder.mask_token.detach().clone().requires_grad_()
    # The loss is summed in float32, so differences are coarse.
    assert torch.autograd.gradcheck(loss, (token,), eps=1e-2, atol=1e-3, rtol=1e-2)


def test_fixed_positions_stay_float32_and_tokens_do_not() -> None:
    """DeepSpeed casts weights, not buffers; a float32 table would make all tokens float32."""
    model = Mae(SMALL, RECIPE)
    initialize(model, 0)
    for param in model.parameters():
        param.data = param.data.bfloat16()
    seen = []
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.register_forward_pre_hook(lambda _, tokens: seen.append(tokens[0].dtype))
    side = SMALL.image_size
    model(torch.zeros(2, 3, side, side, dtype=torch.bfloat16))
    assert model.encoder.pos_embed.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
