"""MAE against `transformers`: the same weights, images and noise give the same everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from harness.models import interchange
from harness.models.mae import Mae
from harness.models.pixels import unpatchify
from harness.models.vit import sincos_positions
from harness.models.weight_files import write_weights
from tests.models import weight_cases as cases

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def theirs(ours: Mae, folder: Path, norm_target: bool, attention: str) -> Any:
    """Their model, from the folder that `convert --to hf` writes; every tensor came from it."""
    write_weights(cases.weights_of(ours), folder / "hf", "hf")
    model, info = transformers.ViTMAEForPreTraining.from_pretrained(
        folder / "hf",
        norm_pix_loss=norm_target,
        attn_implementation=attention,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.train()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("norm_target", [True, False])
def test_loss_prediction_mask_and_every_gradient_agree(
    norm_target: bool, attention: str, tmp_path: Path
) -> None:
    ours = cases.mae(cases.RECIPE.model_copy(update={"norm_target": norm_target})).train()
    other = theirs(ours, tmp_path, norm_target, attention)
    images = cases.images()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(8))

    loss, pred, mask = ours(images, noise)
    found = other(images, noise=noise)
    torch.testing.assert_close(found.loss, loss, **CLOSE)
    torch.testing.assert_close(found.logits, pred, **CLOSE)
    assert torch.equal(found.mask, mask)
    assert mask.sum() == 3 * 12
    # The patch vector runs the same way: both put the pixels back at the same places.
    torch.testing.assert_close(other.unpatchify(found.logits), unpatchify(pred, 4), **CLOSE)

    loss.backward()
    found.loss.backward()
    grads: dict[str, Tensor] = {
        name: torch.zeros_like(param) if param.grad is None else param.grad
        for name, param in other.named_parameters()
    }
    back = interchange.parse(grads, said=cases.SAID)
    assert not back.problems
    compared = 0
    for name, param in ours.named_parameters():
        section, _, rest = name.partition(".")
        expected = {"encoder": back.encoder, "decoder": back.decoder}[section][rest]
        assert param.grad is not None, name
        assert param.grad.abs().max() > 0, name
        torch.testing.assert_close(expected, param.grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        compared += 1
    # And nothing of theirs is left: a qkv of ours is three of theirs. The two position tables
    # are fixed in both (transformers 5 forgets to freeze them when it loads a folder).
    blocks = cases.SMALL.depth + cases.RECIPE.decoder_depth
    assert len(grads) == compared + 2 * 2 * blocks + 2


def test_position_tables_are_theirs() -> None:
    from transformers.models.vit_mae import modeling_vit_mae

    build = getattr(modeling_vit_mae, "build_2d_sinusoidal_position_embedding", None)
    if build is None:
        pytest.skip("another version of transformers")
    # Theirs begins with the row; the published weights, and ours, with the column.
    table = build(height=5, width=5, embed_dim=48, cls_token=True)
    swapped = torch.cat([table[:, 24:], table[:, :24]], dim=1)
    torch.testing.assert_close(sincos_positions(5, 48)[0], swapped, rtol=0, atol=1e-7)
