"""ViT weights between layouts: a file's tensors taken apart, checked, resized, named anew.

Nothing is skipped: a tensor that is missing, unexpected or of the wrong shape is a problem, and
all problems are listed at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from harness.errors import UserError
from harness.models import layouts
from harness.models.layouts import Layout, Section
from harness.models.positions import grid_of
from harness.models.vit import sincos_positions
from harness.study.recipes import Pool
from harness.study.sizes import SIZES, Size

_HEADS_BY_WIDTH = {size.width: size.heads for size in SIZES.values()}
_SINCOS_NOTE = "positions of the {} are not in the file; they are 2-D sin-cos, as in MAE"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of one file, whatever its layout was."""

    layout: Layout
    encoder: dict[str, Tensor]
    """timm's names. `fc_norm` in place of `norm` where the model averages patch tokens."""
    decoder: dict[str, Tensor] = field(default_factory=dict)
    """Names of `harness.models.mae.Decoder`, with `pos_embed`; empty if there is none."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """`weight` [Q, D] and `bias` [Q]; empty if there is none."""
    width: int
    depth: int
    patch: int
    num_positions: int
    """Rows of the position table: the class token and a square grid of patches."""
    heads: int | None
    """Said by the file, else those of the size table for this width, else None."""
    decoder_heads: int | None = None
    pool: Pool | None = None
    """What the file says; `mean_fc_norm` if it has `fc_norm`; None if it does not tell."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the file says: its metadata and config.json, names of things beside the weights."""
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """What is missing, unexpected or of the wrong shape; `read_weights` raises on any."""

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return grid_of(self.num_positions) or 0

    @property
    def image_size(self) -> int:
        """Pixels along a side of the images the position table is made for."""
        return self.grid * self.patch

    @property
    def size_name(self) -> str | None:
        """Name in the size table, None if it has no such width, depth, heads and patch."""
        if self.heads is None:
            return None
        size = Size(width=self.width, depth=self.depth, heads=self.heads, patch=self.patch)
        return next((name for name, known in SIZES.items() if known == size), None)

    def sections(self) -> dict[Section, dict[str, Tensor]]:
        """Encoder, decoder and head, those that are there."""
        parts: dict[Section, dict[str, Tensor]] = {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "head": self.head,
        }
        return {section: tensors for section, tensors in parts.items() if tensors}

    def said(self, layout: Layout) -> dict[str, Any]:
        """What tensors do not tell, for the metadata of a file in `layout`."""
        return {
            "layout": layout,
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "patch": self.patch,
            "image_size": self.image_size,
            "pool": self.pool,
            **({"decoder_heads": self.decoder_heads} if self.decoder else {}),
        }


class _Reader:
    """Takes tensors by the names a layout gives them; what is left over is unexpected."""

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout, prefix: str) -> None:
        self.layout: Layout = layout
        self.prefix: dict[Section, str] = {
            "encoder": prefix,
            "decoder": layouts.outer_prefix(prefix),
            "head": layouts.outer_prefix(prefix),
        }
        self.left: dict[str, Tensor] = {}
        self.unexpected: list[str] = []
        self.missing: list[str] = []
        for name, tensor in tensors.items():
            shown = layouts.published_name(name) if layout == "hf" else name
            if shown in self.left:
                self.unexpected.append(name)
            else:
                self.left[shown] = tensor

    def has(self, section: Section, name: str) -> bool:
        return any(n in self.left for n in self._names(section, name))

    def take(self, section: Section, names: Sequence[str]) -> dict[str, Tensor]:
        taken: dict[str, Tensor] = {}
        for name in names:
            wanted = self._names(section, name)
            absent = [n for n in wanted if n not in self.left]
            self.missing += absent
            parts = [self.left.pop(n) for n in wanted if n in self.left]
            if absent:
                continue
            # Query, key and value, in the order of timm's fused projection. Where they do not
            # fit together, the query alone stands there and is of the wrong shape.
            fit = parts[0].dim() > 0 and len({(p.shape[1:], p.dtype, p.dim()) for p in parts}) == 1
            taken[name] = torch.cat(parts) if len(parts) > 1 and fit else parts[0]
        return taken

    def depth(self, section: Section) -> int:
        stem = layouts.file_names(self.layout, section, "blocks.0.norm1.weight")[0]
        stem = self.prefix[section] + stem.partition(".0.")[0] + "."
        return layouts.depth_of(self.left, stem)

    def _names(self, section: Section, name: str) -> tuple[str, ...]:
        return tuple(
            self.prefix[section] + n for n in layouts.file_names(self.layout, section, name)
        )


def parse(
    tensors: Mapping[str, Tensor],
    *,
    said: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    default: Layout = "timm",
    drop: Sequence[str] = (),
) -> Weights:
    """Tensors of a file, by the names in it, taken apart.

    `said` is the metadata that `Weights.said` makes, `config` a config.json of `transformers`,
    `default` the layout of a plain encoder, `drop` beginnings of names to leave out. UserError
    if so much is missing that the shape of the encoder cannot be told.
    """
    said, config = said or {}, config or {}
    dropped = [name for name in tensors if name.startswith(tuple(drop))] if drop else []
    tensors = {name: value for name, value in tensors.items() if name not in set(dropped)}
    known = layouts.recognise(tensors)
    if known is None:
        first = ", ".join(sorted(tensors)[:4]) or "none"
        raise UserError(f"no ViT: expected tensors such as patch_embed.proj.weight, found {first}")
    layout, prefix = known
    if layout == "timm":
        stated = said.get("layout")
        layout = stated if stated in ("harness", "timm", "mae", "maws") else default
    reader = _Reader(tensors, layout, prefix)
    encoder, decoder, head, notes = _take_sections(reader)
    unexpected = sorted([*reader.unexpected, *reader.left])
    problems = [
        f"{title}: {', '.join(names)}"
        for title, names in (("missing", reader.missing), ("unexpected", unexpected))
        if names
    ]
    patch = encoder.get("patch_embed.proj.weight")
    table = encoder.get("pos_embed")
    if patch is None or table is None:
        raise UserError(*problems)
    num_positions = table.shape[1] if table.dim() == 3 else 0
    if patch.dim() != 4 or grid_of(num_positions) is None:
        raise UserError(
            *problems,
            f"pos_embed is {tuple(table.shape)} and patch_embed.proj.weight {tuple(patch.shape)};"
            " expected (1, 1 + grid * grid, width) and (width, 3, patch, patch)",
        )
    width = patch.shape[0]
    sizes = {"D": width, "N": num_positions, "p": patch.shape[3]}
    if decoder:
        sizes["E"] = _last(decoder.get("mask_token"))
    if head:
        sizes["Q"] = _last(head.get("bias"))
    problems += _shape_problems("encoder", encoder, sizes)
    if decoder:
        problems += _shape_problems("decoder", decoder, sizes)
    if head:
        problems += _shape_problems("head", head, sizes)
    problems += _not_finite(tensors)
    heads, decoder_heads = _count(said, "heads"), _count(said, "decoder_heads")
    heads = heads or _count(config, "num_attention_heads") or _HEADS_BY_WIDTH.get(width)
    decoder_heads = decoder_heads or _count(config, "decoder_num_attention_heads")
    if not decoder_heads and decoder and sizes["E"] == 512:
        decoder_heads = 16  # The reference decoder; He et al. 2022 use it for every encoder.
    pool = said.get("pool") if said.get("pool") in get_args(Pool) else None
    if layout == "harness" and pool == "mean_fc_norm" and "fc_norm.weight" not in encoder:
        # Our encoder has one norm, whichever side of the mean it stands on.
        encoder = {
            f"fc_{name}" if name.startswith("norm.") else name: value
            for name, value in encoder.items()
        }
    if not pool and "fc_norm.weight" in encoder:
        pool = "mean_fc_norm"
    weights = Weights(
        layout=layout,
        encoder=encoder,
        decoder=decoder,
        head=head,
        width=width,
        depth=layouts.depth_of(encoder, "blocks."),
        patch=patch.shape[3],
        num_positions=num_positions,
        heads=heads,
        decoder_heads=decoder_heads if decoder else None,
        pool=pool,
        extra={k: v for k, v in (("said", said), ("config", config), ("dropped", dropped)) if v},
        notes=tuple(notes),
    )
    return replace(weights, problems=(*problems, *_contradictions(weights, said, config)))


def _take_sections(
    reader: _Reader,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Encoder, decoder and head; positions that MAE files may leave out are put in."""
    notes: list[str] = []
    norms = [n for n in ("norm", "fc_norm") if _holds_norm(reader, n)] or ["norm"]
    depth, decoder_depth = reader.depth("encoder"), reader.depth("decoder")
    names = layouts.decoder_names(decoder_depth)
    has_decoder = any(reader.has("decoder", name) for name in names)
    decoder_positions = has_decoder and reader.has("decoder", "pos_embed")
    if has_decoder and reader.layout == "harness" and not decoder_positions:
        names.remove("pos_embed")
    decoder = reader.take("decoder", names) if has_decoder else {}
    wanted = layouts.encoder_names(max(1, depth), norms)
    if has_decoder and not reader.has("encoder", "pos_embed") and decoder_positions:
        wanted.remove("pos_embed")
    encoder = reader.take("encoder", wanted)
    has_head = any(reader.has("head", name) for name in layouts.HEAD_NAMES)
    head = reader.take("head", layouts.HEAD_NAMES) if has_head else {}
    # Of an MAE either table tells the grid, and both are sin-cos by definition.
    for title, part, token, other in (
        ("encoder", encoder, "cls_token", decoder),
        ("decoder", decoder, "mask_token", encoder),
    ):
        table, width = other.get("pos_embed"), _last(part.get(token))
        side = grid_of(table.shape[1]) if table is not None and table.dim() == 3 else None
        if part and "pos_embed" not in part and table is not None and side and width % 4 == 0:
            part["pos_embed"] = sincos_positions(side, width).to(table.dtype)
            notes.append(_SINCOS_NOTE.format(title))
    return encoder, decoder, head, notes


def _last(tensor: Tensor | None) -> int:
    """Length of the last dimension; 0 if there is none."""
    return tensor.shape[-1] if tensor is not None and tensor.dim() else 0


def _holds_norm(reader: _Reader, name: str) -> bool:
    if reader.layout == "hf" and name == "fc_norm":
        return False
    return any(reader.has("encoder", f"{name}.{kind}") for kind in ("weight", "bias"))


def _shape_problems(
    section: Section, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> list[str]:
    expected = layouts.shapes(section, sizes)
    problems = []
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        key = f"blocks.*.{rest.partition('.')[2]}" if first == "blocks" else name
        place = "" if section == "encoder" else f"{section}."
        if tuple(tensor.shape) != expected[key]:
            shape = tuple(tensor.shape)
            problems.append(f"{place}{name} is {shape}, expected {expected[key]}")
        elif not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            problems.append(f"{place}{name} is {kind}, expected floating point")
    return problems


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Weights of a run that diverged, or a damaged file."""
    names = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    return [f"not finite: {', '.join(sorted(names))}"] if names else []


def _count(said: Mapping[str, Any], key: str) -> int | None:
    value = said.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _contradictions(
    weights: Weights, said: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    """Where metadata or config.json say something that the tensors or the encoder deny."""
    problems = []
    for source, words, keys in (
        ("metadata", said, ("width", "depth", "patch", "image_size")),
        (
            "config.json",
            config,
            ("hidden_size", "num_hidden_layers", "patch_size", "image_size"),
        ),
    ):
        found = (weights.width, weights.depth, weights.patch, weights.image_size)
        for key, number in zip(keys, found, strict=True):
            stated = _count(words, key)
            if stated is not None and stated != number:
                problems.append(f"{source}: {key} is {stated}, the tensors have {number}")
    if weights.heads and weights.width % weights.heads:
        problems.append(f"{weights.heads} heads do not divide width {weights.width}")
    if weights.decoder_heads and _last(weights.decoder.get("mask_token")) % weights.decoder_heads:
        problems.append(f"{weights.decoder_heads} heads do not divide the decoder's width")
    if config.get("hidden_act", "gelu") != "gelu":
        problems.append(f"config.json: hidden_act is {config['hidden_act']}; the encoder has gelu")
    return problems
