"""`harness data`: real images into shards."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from harness.errors import NotFoundError

if TYPE_CHECKING:
    from harness.data.pack import Progress

_LINE_EVERY_S = 10.0


def data() -> None:
    """Pack, label, check and look at datasets.

    Example:

      harness data pack digits --out data/digits
    """


def pack(
    src: Annotated[
        str,
        typer.Argument(
            help="Image folder, IDX folder, shards, a manifest (CSV, TSV, JSONL, Parquet), a"
            " published dataset's folder, or `digits` (scikit-learn's own)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; must not hold anything yet.")],
    layout: Annotated[
        str,
        typer.Option(help="imagenet-1k, coco, torchvision:CIFAR10 ...; docs/data.md has them all."),
    ] = "auto",
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of all samples, where the source names none: pretrain, val, train, test.",
            show_default=False,
        ),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pixels of the shorter side, where it is longer.", show_default=False
        ),
    ] = None,
    encode: Annotated[
        Literal["keep", "jpeg", "webp", "png"],
        typer.Option("--format", help="Of the stored images; keep: as they are, if possible."),
    ] = "keep",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.")] = 90,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse images that would have to be converted.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: one per core.", show_default=False),
    ] = None,
) -> int:
    """Write images as webdataset shards with an index and a fingerprint.

    A run that was killed goes on where it stopped when it is run again.

    Example:

      harness data pack digits --out data/digits
    """
    # numpy and Pillow are slow to import; the other verbs must not wait for them
    from harness.data.images import ImageOptions
    from harness.data.pack import pack as pack_images

    if src != "digits" and get_close_matches(src, ["digits"]) and not Path(src).exists():
        raise NotFoundError(f"{src}: no such file or folder; did you mean 'digits'?")
    options = ImageOptions(resize=resize, format=encode, quality=quality, strict=strict)
    try:
        with shown_progress(f"listing {src}", "packing") as progress:
            result = pack_images(
                src,
                out,
                layout=layout,
                split=split,
                options=options,
                workers=workers,
                progress=progress,
                say=lambda line: print(line, file=sys.stderr),
            )
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    print(result.summary())
    return 0


@contextmanager
def shown_progress(before: str, doing: str) -> Iterator[Progress]:
    """A progress bar on a terminal, else a line now and then; `before` until work begins."""
    if not sys.stderr.isatty():
        yield _lines(doing)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(before, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, description=doing, completed=done, total=total)

        yield update


def _lines(doing: str) -> Progress:
    last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            print(f"{doing}: {done} of {total}", file=sys.stderr, flush=True)

    return update
