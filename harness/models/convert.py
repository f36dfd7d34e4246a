"""Weights on their way out: named for a layout, resized, or fitted to an encoder of ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from harness.models.interchange import Weights
from harness.models.layouts import Layout, file_names
from harness.models.positions import Resize, resize_positions
from harness.models.vit import sincos_positions
from harness.study.recipes import Model, Pool


def encoder_tensors_for(
    weights: Weights, model: Model, resize: Resize, pool: Pool = "cls"
) -> dict[str, Tensor]:
    """The encoder's tensors, float32, ready for `VisionEncoder(model).load_state_dict`.

    With pool `mean_fc_norm` the encoder's norm is the file's `fc_norm`, if it has no other.

    Positions are resized where the grid differs. Decoder and head are left behind: they belong
    to the stage that trained them. UserError with every other mismatch.
    """
    problems = [
        f"{key} is {found}, the model has {wanted}"
        for key, found, wanted in (
            ("width", weights.width, model.width),
            ("depth", weights.depth, model.depth),
            ("patch", weights.patch, model.patch),
            ("heads", weights.heads or model.heads, model.heads),
        )
        if found != wanted
    ]
    encoder = dict(weights.encoder)
    if pool == "mean_fc_norm" and "norm.weight" not in encoder:
        encoder = {name.replace("fc_norm.", "norm."): value for name, value in encoder.items()}
    if "norm.weight" not in encoder:
        problems.append(
            "has fc_norm (after the mean over patches) and no norm (over all tokens): the encoder"
            " here ends in norm, so these weights would compute something else; pool:"
            " mean_fc_norm uses them as they are"
        )
    elif "fc_norm.weight" in encoder:
        problems.append("has fc_norm beside norm, which the encoder here has no place for")
    problems = [*weights.problems, *problems]
    if problems:
        raise UserError(*problems)
    tensors = {name: value.float() for name, value in encoder.items()}
    grid = model.image_size // model.patch
    tensors["pos_embed"] = resize_positions(tensors["pos_embed"], grid, resize)
    return tensors


def resized(weights: Weights, image_size: int, variant: Resize) -> Weights:
    """The same weights with positions for images of `image_size` pixels, the decoder's too."""
    if image_size < weights.patch or image_size % weights.patch:
        raise UserError(f"image size {image_size} is no multiple of patch {weights.patch}")
    grid = image_size // weights.patch
    parts = {
        section: {
            name: resize_positions(value, grid, variant) if name == "pos_embed" else value
            for name, value in part.items()
        }
        for section, part in (("encoder", weights.encoder), ("decoder", weights.decoder))
    }
    return replace(weights, num_positions=1 + grid * grid, **parts)


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same weights in another floating type."""
    parts = {
        section: {name: value.to(dtype) for name, value in part.items()}
        for section, part in weights.sections().items()
    }
    return replace(weights, **parts)


def tensors_in(layout: Layout, weights: Weights) -> dict[str, Tensor]:
    """All tensors by their names in `layout`. UserError if it has no place for some."""
    problems = _without_a_place(layout, weights)
    if problems:
        raise UserError(*problems)
    tensors: dict[str, Tensor] = {}
    inner = "vit." if layout == "hf" and (weights.decoder or weights.head) else ""
    for section, part in weights.sections().items():
        prefix = inner if section == "encoder" else ""
        for name, value in part.items():
            if layout == "harness" and section == "decoder" and name == "pos_embed":
                # Our decoder makes this table itself; it is kept only if it is another one.
                if _is_sincos(value, weights.grid):
                    continue
            names = file_names(layout, section, name)
            for key, piece in zip(names, value.chunk(len(names)), strict=True):
                tensors[prefix + key] = piece
    return tensors


def _is_sincos(table_1NE: Tensor, grid: int) -> bool:
    """Bit for bit what reading the file without it would put in its place."""
    width = table_1NE.shape[2]
    return width % 4 == 0 and torch.equal(
        table_1NE, sincos_positions(grid, width).to(table_1NE.dtype)
    )


def _without_a_place(layout: Layout, weights: Weights) -> list[str]:
    problems = []
    if weights.decoder and layout in ("timm", "maws"):
        problems.append(f"layout {layout} has no decoder; leave it out with --no-decoder")
    if layout != "hf":
        return problems
    if "fc_norm.weight" in weights.encoder:
        problems.append("the ViT of transformers has no fc_norm; use timm, mae or harness")
    if weights.head and weights.decoder:
        problems.append("no class of transformers has a head and a decoder; use --no-decoder")
    if weights.head and weights.pool in ("mean", "mean_fc_norm"):
        problems.append(
            "ViTForImageClassification classifies the class token, these weights the mean of the"
            " patches; use timm, mae or harness"
        )
    return problems


def hf_config(weights: Weights) -> dict[str, Any]:
    """config.json for `from_pretrained`. UserError if the number of heads is not known."""
    problems = [
        f"the number of {what} heads is not known; say it with --{option}"
        for what, option, known in (
            ("attention", "heads", weights.heads),
            ("decoder", "decoder-heads", weights.decoder_heads or not weights.decoder),
        )
        if not known
    ]
    if problems:
        raise UserError(*problems)
    architecture = "ViTModel"
    if weights.decoder or weights.head:
        architecture = "ViTMAEForPreTraining" if weights.decoder else "ViTForImageClassification"
    before = weights.extra.get("config", {})
    config: dict[str, Any] = {
        # What this project does not know about (mask ratio, label names) stays as it was.
        **{k: before[k] for k in ("mask_ratio", "norm_pix_loss") if k in before},
        "architectures": [architecture],
        "model_type": "vit_mae" if weights.decoder else "vit",
        "hidden_size": weights.width,
        "intermediate_size": 4 * weights.width,
        "num_hidden_layers": weights.depth,
        "num_attention_heads": weights.heads,
        "image_size": weights.image_size,
        "patch_size": weights.patch,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "dtype": str(weights.encoder["cls_token"].dtype).removeprefix("torch."),
    }
    if weights.decoder:
        width = weights.decoder["mask_token"].shape[-1]
        depth = 1 + max(int(n.split(".")[1]) for n in weights.decoder if n.startswith("blocks."))
        config |= {
            "decoder_hidden_size": width,
            "decoder_intermediate_size": 4 * width,
            "decoder_num_hidden_layers": depth,
            "decoder_num_attention_heads": weights.decoder_heads,
        }
    if weights.head:
        # Without names, transformers takes a head to have two classes.
        numbers = [str(i) for i in range(len(weights.head["bias"]))]
        labels = before.get("id2label")
        if not isinstance(labels, dict) or labels.keys() != set(numbers):
            labels = {i: f"LABEL_{i}" for i in numbers}
        config |= {"id2label": labels, "label2id": {str(labels[i]): int(i) for i in numbers}}
    return config
