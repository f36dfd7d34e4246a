"""`harness data`: real images into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def data() -> None:
    """Pack datasets."""


def pack(
    src: Annotated[
        str, typer.Argument(help="IDX folder, image folder, or `digits` (scikit-learn's own).")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; must not hold anything yet.")],
) -> int:
    """Write images as webdataset shards with an index and a fingerprint.

    Example:

      harness data pack digits --out data/digits
    """
    # numpy and webdataset are slow to import; the other verbs must not wait for them
    from harness.data.pack import pack as pack_images

    result = pack_images(src, out)
    print(result.summary())
    return 0
