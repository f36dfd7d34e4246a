"""How published ViT weights name their tensors, and what shape each must have.

harness   timm's names; `decoder.*` and `head.*` beside them. Our own files.
timm      timm's VisionTransformer. MAWS encoders (`maws`) have the same names.
mae       timm's names for the encoder, `decoder_*` and `mask_token` for the decoder.
hf        `transformers`: ViTModel, ViTForImageClassification, ViTMAEForPreTraining. Query, key
          and value are three tensors there, one in all others.

One function, `file_names`, is the whole mapping. Reading and writing both go through it, so each
is the exact inverse of the other. Sections of a file are the encoder, the decoder (names of
`harness.models.mae.Decoder`) and the head.

Shapes: D encoder width, E decoder width, N positions (class token first), p patch side, Q classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

Layout = Literal["harness", "timm", "mae", "maws", "hf"]
Section = Literal["encoder", "decoder", "head"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_KINDS = ("weight", "bias")
_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_MAE_DECODER = {
    "embed": "decoder_embed",
    "mask_token": "mask_token",
    "pos_embed": "decoder_pos_embed",
    "blocks": "decoder_blocks",
    "norm": "decoder_norm",
    "head": "decoder_pred",
}
_HF_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HF_DECODER = {
    "embed": "decoder.decoder_embed",
    "mask_token": "decoder.mask_token",
    "pos_embed": "decoder.decoder_pos_embed",
    "norm": "decoder.decoder_norm",
    "head": "decoder.decoder_pred",
}
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# transformers 5 builds modules with new names but writes files with the old ones, the decoder's
# blocks excepted. A state dict may be either; the old names are those of all published files.
_HF_RENAMED = (
    (re.compile(r"\bdecoder_encoder\.layer\.(?=\d)"), "decoder_layers."),
    (re.compile(r"\blayers\.(?=\d)"), "encoder.layer."),
    (re.compile(r"\battention\.q_proj\b"), "attention.attention.query"),
    (re.compile(r"\battention\.k_proj\b"), "attention.attention.key"),
    (re.compile(r"\battention\.v_proj\b"), "attention.attention.value"),
    (re.compile(r"\battention\.o_proj\b"), "attention.output.dense"),
    (re.compile(r"\bmlp\.fc1\b"), "intermediate.dense"),
    (re.compile(r"\bmlp\.fc2\b"), "output.dense"),
)
_ENCODER_MARK = {
    "hf": re.compile(
        r"^(.*\.)?(?:embeddings\.(?:cls_token|position_embeddings|patch_embeddings\..*)"
        r"|encoder\.layer\.\d+\.layernorm_before\.weight)$"
    ),
    "other": re.compile(
        r"^(.*\.)?(?:cls_token|pos_embed|patch_embed\.proj\.(?:weight|bias)"
        r"|blocks\.\d+\.norm1\.weight)$"
    ),
}
HEAD_NAMES = _KINDS


def encoder_names(depth: int, norms: Iterable[str] = ("norm",)) -> list[str]:
    """Names of an encoder's tensors, as timm has them. `norms`: `norm`, `fc_norm` or both."""
    blocks = [f"blocks.{i}.{part}.{k}" for i in range(depth) for part in _BLOCK for k in _KINDS]
    patch = [f"patch_embed.proj.{k}" for k in _KINDS]
    return ["cls_token", "pos_embed", *patch, *blocks, *(f"{n}.{k}" for n in norms for k in _KINDS)]


def decoder_names(depth: int) -> list[str]:
    """Names of an MAE decoder's tensors, its positions included."""
    blocks = [f"blocks.{i}.{part}.{k}" for i in range(depth) for part in _BLOCK for k in _KINDS]
    linear = [f"{part}.{k}" for part in ("embed", "norm", "head") for k in _KINDS]
    return ["mask_token", "pos_embed", *linear, *blocks]


def file_names(layout: Layout, section: Section, name: str) -> tuple[str, ...]:
    """Names in a file of one tensor; three (query, key, value) for `attn.qkv` in `hf`.

    Without the prefix that a wrapper may have put before them (`outer_prefix`).
    """
    if layout == "hf":
        return _hf_names(section, name)
    if section == "encoder":
        return (name,)
    if section == "head":
        return (f"head.{name}",)
    if layout == "mae":
        first, dot, rest = name.partition(".")
        return (_MAE_DECODER[first] + dot + rest,)
    return (f"decoder.{name}",)


def _hf_names(section: Section, name: str) -> tuple[str, ...]:
    if section == "head":
        return (f"classifier.{name}",)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if block:
        index, part, kind = block.groups()
        place = f"decoder.decoder_layers.{index}"
        if section == "encoder":
            place = f"encoder.layer.{index}"
        if part == "attn.qkv":
            stem = f"{place}.attention.attention"
            return tuple(f"{stem}.{which}.{kind}" for which in ("query", "key", "value"))
        return (f"{place}.{_HF_BLOCK[part]}.{kind}",)
    table = _HF_TOP if section == "encoder" else _HF_DECODER
    if name in table:
        return (table[name],)
    stem, _, kind = name.rpartition(".")
    return (f"{table[stem]}.{kind}",)


def published_name(name: str) -> str:
    """The name `transformers` writes to files, from that or the one its modules have now."""
    for pattern, old in _HF_RENAMED:
        name = pattern.sub(old, name)
    return name


def recognise(names: Iterable[str]) -> tuple[Layout, str] | None:
    """Layout and prefix of the encoder's tensors (`vit.`, `trunk.` ...); None if it is no ViT.

    A plain encoder is `timm`: in `mae`, `maws` and `harness` it has the same names.
    """
    names = list(names)
    is_hf = any("embeddings.patch_embeddings." in name for name in names)
    mark = _ENCODER_MARK["hf" if is_hf else "other"]
    found: dict[str, int] = {}
    for name in names:
        match = mark.match(published_name(name) if is_hf else name)
        if match and (match[1] or "") != "decoder.":
            found[match[1] or ""] = found.get(match[1] or "", 0) + 1
    if not found:
        return None
    prefix = max(found, key=lambda p: (found[p], -len(p)))
    if is_hf:
        return "hf", prefix
    outer = outer_prefix(prefix)
    if any(name.removeprefix(outer).startswith("decoder.") for name in names):
        return "harness", prefix
    stems = {name.removeprefix(outer).split(".")[0] for name in names}
    return ("mae" if stems & set(_MAE_DECODER.values()) - {"mask_token"} else "timm"), prefix


def outer_prefix(prefix: str) -> str:
    """Prefix of decoder and head, from the encoder's: `encoder.` and `vit.` cover it alone."""
    return re.sub(r"(^|\.)(?:encoder|vit)\.$", r"\1", prefix)


def depth_of(names: Iterable[str], stem: str) -> int:
    """Number of blocks: one more than the largest number that follows `stem`."""
    pattern = re.compile(re.escape(stem) + r"(\d{1,4})\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, names) if m), default=-1)


def shapes(section: Section, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a section, blocks as `blocks.*`.

    `sizes`: D, N and p always; E for a decoder, Q for a head.
    """
    d, n, p = sizes["D"], sizes["N"], sizes["p"]
    if section == "head":
        return {"weight": (sizes["Q"], d), "bias": (sizes["Q"],)}
    if section == "encoder":
        return {
            "cls_token": (1, 1, d),
            "pos_embed": (1, n, d),
            "patch_embed.proj.weight": (d, 3, p, p),
            "patch_embed.proj.bias": (d,),
            **_norm_shapes("norm", d),
            **_norm_shapes("fc_norm", d),
            **_block_shapes(d),
        }
    e = sizes["E"]
    return {
        "mask_token": (1, 1, e),
        "pos_embed": (1, n, e),
        "embed.weight": (e, d),
        "embed.bias": (e,),
        "head.weight": (3 * p * p, e),
        "head.bias": (3 * p * p,),
        **_norm_shapes("norm", e),
        **_block_shapes(e),
    }


def _norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (width,) for kind in _KINDS}


def _block_shapes(width: int) -> dict[str, tuple[int, ...]]:
    linear = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    found: dict[str, tuple[int, ...]] = {}
    for part, (rows, columns) in linear.items():
        found[f"blocks.*.{part}.weight"] = (rows, columns)
        found[f"blocks.*.{part}.bias"] = (rows,)
    for part in ("norm1", "norm2"):
        found |= _norm_shapes(f"blocks.*.{part}", width)
    return found
