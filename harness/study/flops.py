"""Closed-form parameter counts and FLOPs of the encoder, the MAE and the classifier.

One multiply-add is two FLOPs; matrix products are counted, attention included, elementwise work
is not. Training costs three forward passes (forward, gradient of the inputs, gradient of the
weights), less the input gradient of the first layer, which nobody needs. A test checks all of it
against PyTorch's counter on the real modules.

n is the number of patches, d the width, p the patch side.
"""

from __future__ import annotations

from harness.study.recipes import MaeRecipe, Model


def encoder_params(model: Model) -> int:
    """Parameters of the ViT encoder: patch embedding, class token, positions, blocks, norm."""
    d, n, p = model.width, model.num_patches, model.patch
    embed = 3 * p * p * d + d
    block = 12 * d * d + 13 * d
    return embed + d + (n + 1) * d + model.depth * block + 2 * d


def _patch_embed(model: Model, patches: int | None = None) -> float:
    """Projection of `patches` patches, of all when None."""
    count = model.num_patches if patches is None else patches
    return 2.0 * count * 3 * model.patch**2 * model.width


def attention(tokens: float, width: float) -> float:
    """The two products of attention, scores and weighted values; its projections not counted."""
    return 4.0 * tokens**2 * width


def _block(tokens: float, width: float) -> float:
    """One transformer block: qkv, projection and a 4x MLP (24 n d^2), and attention."""
    return 24.0 * tokens * width**2 + attention(tokens, width)


def num_kept(model: Model, mask_ratio: float) -> int:
    """Visible patches of one image (He et al. 2022: the integer part)."""
    return int(model.num_patches * (1.0 - mask_ratio))


def text_forward(width: int, depth: int, tokens: int) -> float:
    """FLOPs of a text of so many tokens through the blocks of a transformer."""
    return depth * _block(tokens, width)


def vit_forward(model: Model, num_classes: int = 0) -> float:
    """FLOPs of one image through the encoder and a linear head."""
    blocks = model.depth * _block(model.num_patches + 1, model.width)
    return _patch_embed(model) + blocks + 2.0 * model.width * num_classes


def vit_train(model: Model, num_classes: int) -> float:
    """FLOPs of one image in supervised training."""
    return 3.0 * vit_forward(model, num_classes) - _patch_embed(model)


def prompted_forward(model: Model, prompts: int, num_classes: int) -> float:
    """FLOPs of one image through encoder and head, with `prompts` more tokens in every block."""
    blocks = model.depth * _block(model.num_patches + 1 + prompts, model.width)
    return _patch_embed(model) + blocks + 2.0 * model.width * num_classes


def prompted_train(model: Model, prompts: int, num_classes: int) -> float:
    """FLOPs of one image in prompt tuning: no weight of the encoder has a gradient.

    Backward, a product with weights costs as much as forward, and one of two activations twice as
    much: those of attention, and the head.
    """
    forward = prompted_forward(model, prompts, num_classes)
    tokens = model.num_patches + 1 + prompts
    twice = model.depth * attention(tokens, model.width) + 2.0 * model.width * num_classes
    return 2 * forward - _patch_embed(model) + twice


def video_forward(model: Model, frames: int, tube: int, num_classes: int = 0) -> float:
    """FLOPs of one clip through the encoder inflated in time and a linear head.

    `frames` per clip, `tube` of them in a tube: patches of tube * p * p * 3 numbers, and attention
    over all times together. Adding position biases is elementwise: it counts nothing.
    """
    tubes = frames // tube * model.num_patches
    blocks = model.depth * _block(tubes + 1, model.width)
    return tube * _patch_embed(model, tubes) + blocks + 2.0 * model.width * num_classes


def video_train(model: Model, frames: int, tube: int, num_classes: int) -> float:
    """FLOPs of one clip in training."""
    tubes = frames // tube * model.num_patches
    forward = video_forward(model, frames, tube, num_classes)
    return 3.0 * forward - tube * _patch_embed(model, tubes)


def mae_forward(model: Model, recipe: MaeRecipe) -> float:
    """FLOPs of one image through a masked autoencoder: visible patches only, then the decoder.

    Hidden patches are never projected, and pixels are predicted for patches, not the class token.
    """
    return mae_encoder_forward(model, recipe) + mae_decoder_forward(model, recipe)


def mae_encoder_forward(model: Model, recipe: MaeRecipe) -> float:
    """FLOPs of the encoder alone on the visible patches of one image."""
    kept = num_kept(model, recipe.mask_ratio)
    return _patch_embed(model, kept) + model.depth * _block(kept + 1, model.width)


def mae_decoder_forward(model: Model, recipe: MaeRecipe) -> float:
    """FLOPs of the decoder alone: from the visible tokens to the pixels of every patch."""
    n, width = model.num_patches, recipe.decoder_width
    embed = 2.0 * (num_kept(model, recipe.mask_ratio) + 1) * model.width * width
    blocks = recipe.decoder_depth * _block(n + 1, width)
    return embed + blocks + 2.0 * n * width * 3 * model.patch**2


def mae_train(model: Model, recipe: MaeRecipe) -> float:
    """FLOPs of one image in MAE pre-pretraining."""
    kept = num_kept(model, recipe.mask_ratio)
    return 3.0 * mae_forward(model, recipe) - _patch_embed(model, kept)
