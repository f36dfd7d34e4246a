"""`harness weights inspect` and `convert`: what a weight file holds; the same in other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from harness.errors import EXIT_FAILED, EXIT_OK, UserError

if TYPE_CHECKING:
    from harness.models.interchange import Weights
    from harness.study.recipes import Pool

_CLOSE_TO_SINCOS = 1e-5
_POOLING: dict[Pool | None, str] = {
    "cls": "class token",
    "mean": "mean of the patches",
    "mean_fc_norm": "mean of the patches, then the norm",
    None: "not said",
}
Drop = Annotated[
    list[str] | None,
    typer.Option(help="Leave out tensors whose names begin so; repeatable.", show_default=False),
]


def weights() -> None:
    """Look into weight files and convert them between layouts.

    Example:

      harness weights inspect mae_pretrain_vit_base.pth
    """


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Weight file, or folder of them.")],
    drop: Drop = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Say what a weight file holds; 1 if tensors are missing or unexpected.

    Example:

      harness weights inspect mae_pretrain_vit_base.pth
    """
    # torch is slow to import; the other verbs must not wait for it
    from harness.models.weight_files import inspect_weights

    found = _facts(file, inspect_weights(file, drop or []))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(_lines(found)))
    return EXIT_FAILED if found["problems"] else EXIT_OK


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Weight file, or folder of them.")],
    dst: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            help="A name without a suffix gets .safetensors; or .pth, .pt, .bin. For hf a folder.",
        ),
    ],
    to: Annotated[
        Literal["timm", "hf", "mae", "maws", "harness"], typer.Option(help="Layout to write.")
    ],
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Resize positions for such images.", show_default=False),
    ] = None,
    resize: Annotated[
        Literal["mae", "swag", "timm"] | None,
        typer.Option(help="Whose bicubic resizing; needed with --image-size.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Default: as it is.", show_default=False),
    ] = None,
    decoder: Annotated[
        bool | None,
        typer.Option(
            "--decoder/--no-decoder",
            help="The MAE decoder must be there, or is left out. Default: as it is.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads, if the file does not say.", show_default=False),
    ] = None,
    decoder_heads: Annotated[
        int | None, typer.Option(min=1, help="The same of the decoder.", show_default=False)
    ] = None,
    drop: Drop = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DST.")] = False,
) -> int:
    """Write the same weights with the names of another layout; tensors keep their bits.

    Example:

      harness weights convert mae_pretrain_vit_base.pth vit_base --to hf
    """
    from dataclasses import replace

    import torch

    from harness.models import convert as conversion
    from harness.models.weight_files import read_weights, write_weights

    if (image_size is None) != (resize is None):
        raise UserError("--image-size and --resize go together: mae, swag and timm differ")
    if not dst.suffix and to != "hf":
        dst = dst.with_suffix(".safetensors")
    if dst.exists() and not force:
        raise UserError(f"{dst}: is there already; --force replaces it")
    found = read_weights(src, drop or [])
    if decoder is False:
        found = replace(found, decoder={}, decoder_heads=None)
    elif decoder and not found.decoder:
        raise UserError(f"{src}: has no decoder")
    _check_heads(src, found, heads, decoder_heads)
    found = replace(
        found,
        heads=heads or found.heads,
        decoder_heads=(decoder_heads or found.decoder_heads) if found.decoder else None,
    )
    if image_size is not None and resize is not None:
        found = conversion.resized(found, image_size, resize)
    if dtype is not None:
        found = conversion.cast(found, getattr(torch, dtype))
    for path in write_weights(found, dst, to):
        print(f"{path}: {path.stat().st_size:,} bytes")
    extra = {"dropped": found.extra.get("dropped", [])}
    print("\n".join(_lines(_facts(dst, replace(found, layout=to, extra=extra)))))
    return EXIT_OK


def _check_heads(src: Path, found: Weights, heads: int | None, decoder_heads: int | None) -> None:
    widths = {"heads": found.width}
    if decoder_heads and not found.decoder:
        raise UserError(f"{src}: has no decoder for --decoder-heads")
    if found.decoder:
        widths["decoder-heads"] = found.decoder["mask_token"].shape[-1]
    for option, number in (("heads", heads), ("decoder-heads", decoder_heads)):
        if number and widths[option] % number:
            raise UserError(f"--{option} {number} does not divide width {widths[option]}")


def _facts(file: Path, found: Weights) -> dict[str, Any]:
    from harness.models.positions import distance_from_sincos

    sections = found.sections()
    counts = {name: sum(t.numel() for t in part.values()) for name, part in sections.items()}
    # Of a damaged file the table may not fit the width at all.
    distance = None if found.problems else distance_from_sincos(found.encoder["pos_embed"])
    tensors = [tensor for part in sections.values() for tensor in part.values()]
    return {
        "file": str(file),
        "layout": found.layout,
        "size": found.size_name,
        "parameters": {**counts, "total": sum(counts.values())},
        "width": found.width,
        "depth": found.depth,
        "heads": found.heads,
        "patch": found.patch,
        "image_size": found.image_size,
        "positions": found.num_positions,
        "distance_from_sincos": distance,
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors}),
        "decoder": _decoder_facts(found) if found.decoder else None,
        "classes": len(found.head["bias"]) if "bias" in found.head else None,
        "norm": [n for n in ("norm", "fc_norm") if f"{n}.weight" in found.encoder],
        "pool": found.pool,
        "beside": found.extra.get("beside", []),
        "dropped": found.extra.get("dropped", []),
        "config": found.extra.get("config", {}),
        "notes": list(found.notes),
        "problems": list(found.problems),
    }


def _decoder_facts(found: Weights) -> dict[str, Any]:
    from harness.models.layouts import depth_of

    token = found.decoder.get("mask_token")
    return {
        "width": token.shape[-1] if token is not None and token.dim() else None,
        "depth": depth_of(found.decoder, "blocks."),
        "heads": found.decoder_heads,
    }


def _lines(found: dict[str, Any]) -> list[str]:
    """The facts for a person, a line each; what is not there is left out."""
    count, decoder = found["parameters"], found["decoder"]
    shape = f"width {found['width']}, depth {found['depth']}, heads {found['heads'] or 'unknown'}"
    rows = [
        ("encoder", f"{count['encoder']:,} parameters: {shape}, patch {found['patch']}"),
        ("positions", f"{found['positions']} ({found['image_size']} px), {_kind(found)}"),
    ]
    if decoder:
        shape = (
            f"width {decoder['width']}, depth {decoder['depth']},"
            f" heads {decoder['heads'] or 'unknown'}"
        )
        rows.append(("decoder", f"{count['decoder']:,} parameters: {shape}"))
    if "head" in count:
        rows.append(("head", f"{count['head']:,} parameters: {found['classes']} classes"))
    rows.append(("total", f"{count['total']:,} parameters, {', '.join(found['dtypes'])}"))
    ends = " and ".join(found["norm"]) or "no norm"
    rows.append(("pooling", f"{_POOLING[found['pool']]}; ends in {ends}"))
    eps = found["config"].get("layer_norm_eps", 1e-6)
    if eps != 1e-6:
        rows.append(("note", f"config.json: layer_norm_eps is {eps}; the encoder here has 1e-06"))
    rows += [("note", note) for note in found["notes"]]
    rows += [("left out", ", ".join(found[k])) for k in ("beside", "dropped") if found[k]]
    rows += [("problem", problem) for problem in found["problems"]]
    size = f", size {found['size']}" if found["size"] else ""
    title = f"{found['file']}: {found['layout']}{size}"
    return [title, *(f"  {name:<10} {text}" for name, text in rows)]


def _kind(found: dict[str, Any]) -> str:
    distance = found["distance_from_sincos"]
    if distance is None:
        return "not compared with sin-cos"
    lowest = {"float16": 1e-3, "bfloat16": 8e-3}
    close = max(lowest.get(kind, _CLOSE_TO_SINCOS) for kind in found["dtypes"])
    return "2-D sin-cos" if distance <= close else f"not 2-D sin-cos (off by {distance:.3g})"
