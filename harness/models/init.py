"""Initial weights: every tensor from a generator seeded by (seed, its name).

A tensor's values depend on nothing else: not on what is built before it, not on the number of
ranks. Arms that are compared therefore start alike wherever their networks are alike: the
encoder of MAE and the encoder of supervised training from scratch have the same initial
weights for the same seed.

The rules (one set for all stages): Linear weights and the flattened patch projection Xavier
uniform, as in MAE (He et al. 2022, appendix A.1) and as in the MLPs of supervised ViTs
(Dosovitskiy et al. 2021). Not the usual truncated normal of 0.02: that number suits width 768
and is far too small at width 32. Norms 1 and 0, biases 0, class and mask token N(0, 0.02),
positions 2-D sin-cos, classifier heads 0. What a video encoder adds to an image's starts at 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from harness.models.heads import Classifier
from harness.models.text import ByteTower
from harness.models.vit import VisionEncoder, sincos_positions

Values = dict[str, Callable[[], Tensor]]
"""Name of a parameter -> a function that makes its value, whole, on the CPU in float32."""


def initialize(model: nn.Module, seed: int) -> None:
    """Set every parameter of `model`, in place, on the CPU in float32.

    Must come before deepspeed.initialize: a partitioned parameter is an empty tensor, and
    writing to it changes nothing, without an error.
    """
    assign(model, initial_values(model, seed))


def assign(model: nn.Module, values: Values) -> None:
    """Set every parameter of `model`, in place."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            assert param.numel() > 0, f"{name} is empty: initialize before sharding"
            param.copy_(values[name]())


def initial_values(model: nn.Module, seed: int) -> Values:
    """The initial value of every parameter; `model` may be on the meta device."""
    zeroed = {
        id(param)
        for module in model.modules()
        if isinstance(module, Classifier)
        for param in module.head.parameters()
    }
    values: Values = {}
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            if id(param) in zeroed:
                values[full_name] = partial(torch.zeros, param.shape, device="cpu")
            else:
                values[full_name] = partial(_value, module, name, param.shape, seed, full_name)
    return values


def set_tables(model: nn.Module) -> None:
    """Fixed position tables, which a model that was built on the meta device lacks."""
    for module in model.modules():
        table = dict(module.named_buffers(recurse=False)).get("pos_embed")
        if table is not None:
            grid = math.isqrt(table.shape[1] - 1)
            module.pos_embed = sincos_positions(grid, table.shape[2])


def seed_of(seed: int, *key: object) -> int:
    """A number for a random generator, from (seed, key) alone; 63 bits."""
    text = "/".join(str(part) for part in (seed, *key))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_of(seed: int, *key: object) -> torch.Generator:
    """A CPU generator whose state is a function of (seed, key) alone."""
    return torch.Generator().manual_seed(seed_of(seed, *key))


def _value(module: nn.Module, name: str, shape: torch.Size, seed: int, full_name: str) -> Tensor:
    value = torch.empty(shape, device="cpu")
    _fill(module, name, value, generator_of(seed, full_name))
    return value


def _fill(module: nn.Module, name: str, param: Tensor, generator: torch.Generator) -> None:
    if isinstance(module, nn.LayerNorm):
        param.fill_(1.0 if name == "weight" else 0.0)
    elif isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d):
        if name == "bias":
            param.zero_()
        else:
            fan_out, fan_in = param.shape[0], param[0].numel()
            bound = math.sqrt(6 / (fan_in + fan_out))
            param.uniform_(-bound, bound, generator=generator)
    elif isinstance(module, nn.Embedding) or (
        name == "pos_embed" and isinstance(module, ByteTower)
    ):
        # A text's token or place: vectors of length 1, about, at any width.
        param.normal_(0.0, param.shape[-1] ** -0.5, generator=generator)
    elif name in ("cls_token", "mask_token"):
        param.normal_(0.0, 0.02, generator=generator)
    elif name in ("time_embed", "relative_bias"):
        param.zero_()
    elif name == "pos_embed" and isinstance(module, VisionEncoder):
        table = sincos_positions(module.patch_embed.grid_size[0], module.embed_dim)
        param.copy_(table[:, -param.shape[1] :])  # a detector's has no class row
    else:
        raise AssertionError(f"no initial value is defined for {type(module).__name__}.{name}")
