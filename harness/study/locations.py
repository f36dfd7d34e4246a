"""Where files of a dataset lie: a local path, or a URL that fsspec can read."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, cast

from harness.errors import UserError

_EXTRAS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def is_remote(location: str) -> bool:
    """Whether a location is a URL, such as s3://bucket/set; a file:// URL counts too."""
    return "://" in location


def join_location(base: str, name: str) -> str:
    """A file of a folder or below a URL; absolute names stand for themselves."""
    if is_remote(name) or Path(name).is_absolute():
        return name
    return f"{base.rstrip('/')}/{name}" if is_remote(base) else str(Path(base) / name)


def opened(location: str) -> IO[bytes]:
    """A file opened for reading from its first byte on.

    Raises UserError if the reader of such URLs is not installed, OSError if the file is not there.
    """
    if not is_remote(location):
        return open(location, "rb")
    import fsspec  # only for those who need it

    scheme = location.split("://", 1)[0]
    try:
        file = fsspec.open(location, "rb")
    except ImportError:
        need = _EXTRAS.get(scheme)
        hint = f"`pip install {need}`, or the extra `remote`" if need else "its fsspec package"
        raise UserError(f"{location}: reading {scheme}:// needs {hint}") from None
    except ValueError as error:
        raise UserError(f"{location}: {error}") from None
    return cast("IO[bytes]", cast(Any, file).open())
