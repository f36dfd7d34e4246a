"""Files of a dataset, near or far: a local path is read where it lies, any other is copied once.

Everything that fsspec knows (s3://, gs://, https:// ...) can hold a dataset. A file is fetched
whole, by one process of the machine, checked against the size and checksum that dataset.json
records, and kept in a cache of bounded size; from then on it is a local file like any other.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import ByteSize, TypeAdapter

from harness.data.index import check_size, sha256_of
from harness.errors import DataError, HarnessError, UserError
from harness.ledger.lease import exclusive
from harness.study.datasets import ShardEntry
from harness.study.locations import copy_file, is_remote, join_location

CACHE_BYTES_VARIABLE = "HARNESS_CACHE_BYTES"
CACHE_BYTES = 64 << 30
"""Copies of remote files that are kept, if the variable does not say otherwise."""
TRIES = 4
_OPEN_FILES = 256


class Storage:
    """The folder or URL of a dataset, and where copies of its remote files lie."""

    def __init__(self, location: str, cache: Path) -> None:
        self.location, self._cache = location, cache
        self.is_remote = is_remote(location)

    def name(self, entry: ShardEntry) -> str:
        """Full path or URL of a file."""
        return join_location(self.location, str(entry["file"]))

    def shown(self, entry: ShardEntry) -> str:
        """The same for messages: without detours by way of "..", but perhaps of links."""
        name = self.name(entry)
        return name if is_remote(name) else os.path.normpath(name)

    def local(self, entry: ShardEntry) -> Path:
        """Path of a file, which is fetched if need be.

        Raises DataError, naming the URL, if it cannot be read or is not what was written.
        """
        name = self.name(entry)
        if not is_remote(name):
            return Path(name)
        kept = self._cache / f"{str(entry['sha256'])[:32]}{Path(name).suffix}"
        if not _is_whole(kept, entry):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(kept.with_suffix(".lock")):
                if not _is_whole(kept, entry):
                    _make_room(self._cache, int(entry["bytes"]))
                    _fetch(name, kept, entry)
        with suppress(OSError):
            os.utime(kept)  # the least recently opened is the first to go
        return kept


class Reader:
    """Reads byte ranges of a split's shards from any thread, keeping some files open."""

    def __init__(self, num: int, path_of: Callable[[int], Path]) -> None:
        self._path_of = path_of
        self._locks = [threading.Lock() for _ in range(num)]
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _File] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a shard; fewer if it ends there. Raises OSError."""
        file = self._acquire(shard)
        try:
            return os.pread(file.descriptor, size, offset)
        finally:
            with self._lock:
                file.users -= 1

    def _acquire(self, shard: int) -> _File:
        file = self._known(shard)
        if file is not None:
            return file
        with self._locks[shard]:  # one thread fetches a remote shard, others read theirs meanwhile
            file = self._known(shard)
            if file is not None:
                return file
            file = _File(os.open(self._path_of(shard), os.O_RDONLY))
            with self._lock:
                self._open[shard] = file
                idle = [key for key, other in self._open.items() if not other.users]
                for key in idle[: max(0, len(self._open) - _OPEN_FILES)]:
                    os.close(self._open.pop(key).descriptor)
            return file

    def _known(self, shard: int) -> _File | None:
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
                file.users += 1
            return file

    def close(self) -> None:
        """Closes every file."""
        with self._lock:
            for file in self._open.values():
                os.close(file.descriptor)
            self._open.clear()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


class _File:
    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.users = descriptor, 1


def _is_whole(path: Path, entry: ShardEntry) -> bool:
    try:
        return path.stat().st_size == entry["bytes"]
    except OSError:
        return False


def _fetch(url: str, target: Path, entry: ShardEntry) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        found = _copied(url, temporary)
        check_size(temporary, entry, 0, None, name=url)
        if found != entry["sha256"]:
            raise DataError(
                f"{url}: byte offset 0: the bytes are not those that were written (checksum"
                f" {found[:12]}, expected {str(entry['sha256'])[:12]}); upload the file again"
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _copied(url: str, target: Path) -> str:
    """Copies a remote file, trying again where the connection may be at fault; its SHA-256."""
    for attempt in range(1, TRIES + 1):
        try:
            copy_file(url, target)
            break
        except FileNotFoundError:
            raise DataError(f"{url}: byte offset 0: there is no such file") from None
        except Exception as error:  # every file system of fsspec has its own kinds
            if isinstance(error, HarnessError):
                raise
            if attempt == TRIES:
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise DataError(
                    f"{url}: cannot be read ({reason}) after {TRIES} tries; check the connection"
                    " and submit again"
                ) from None
            time.sleep(0.5 * 2**attempt)
    return sha256_of(target)


def _make_room(cache: Path, needed: int) -> None:
    """Removes copies that were opened longest ago until `needed` bytes more may be kept."""
    text = os.environ.get(CACHE_BYTES_VARIABLE)
    try:
        limit = CACHE_BYTES if text is None else TypeAdapter(ByteSize).validate_python(text)
    except ValueError:
        raise UserError(
            f"{CACHE_BYTES_VARIABLE}: found '{text}', expected a size such as 64GiB or 500MB"
        ) from None
    found: list[tuple[int, int, Path]] = []
    for path in cache.iterdir():
        if path.suffix in (".lock", ".tmp"):
            continue
        with suppress(OSError):  # another process removed it
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in found) + needed
    for _, size, path in sorted(found):
        if total <= limit:
            return
        # Whoever has it open reads on: the bytes go when the last reader closes it.
        path.unlink(missing_ok=True)
        total -= size
