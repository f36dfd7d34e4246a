"""Where files of a dataset lie: a local path, or a URL that fsspec can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from harness.errors import UserError

_EXTRAS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def is_remote(location: str) -> bool:
    """Whether a location is a URL, such as s3://bucket/set; a file:// URL counts too."""
    return "://" in location


def join_location(base: str, name: str) -> str:
    """A file of a folder or below a URL; absolute names stand for themselves."""
    if is_remote(name) or Path(name).is_absolute():
        return name
    if not is_remote(base):
        return str(Path(base) / name)
    base = base.rstrip("/")
    while name.startswith("../"):  # a bucket has no parent folders to walk
        base, name = base.rpartition("/")[0], name.removeprefix("../")
    return f"{base}/{name}"


def read_bytes(location: str) -> bytes:
    """Content of a small file.

    Raises UserError if the reader of such URLs is not installed, OSError if it cannot be read.
    """
    if not is_remote(location):
        return Path(location).read_bytes()
    files, path = _file_system(location)
    return cast(bytes, files.cat_file(path))


def copy_file(location: str, target: Path) -> None:
    """Copies a remote file of any size to a local path. Raises as `read_bytes` does."""
    files, path = _file_system(location)
    files.get_file(path, str(target))


def _file_system(location: str) -> tuple[Any, str]:
    import fsspec  # only for those who need it

    scheme = location.split("://", 1)[0]
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            # Its default ends any transfer after five minutes, however well it goes.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": timeout}
        return fsspec.core.url_to_fs(location, **options)
    except ImportError:
        need = _EXTRAS.get(scheme)
        hint = f"`pip install {need}`, or the extra `remote`" if need else "its fsspec package"
        raise UserError(f"{location}: reading {scheme}:// needs {hint}") from None
    except ValueError as error:
        raise UserError(f"{location}: {error}") from None
