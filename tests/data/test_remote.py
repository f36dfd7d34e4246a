"""Datasets behind URLs: fetched once, checked, kept within bounds; read as if they were here."""

from __future__ import annotations

import http.server
import importlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer

from harness.data import storage
from harness.data.dataset import Dataset, open_dataset
from harness.errors import DataError, NotFoundError, UserError
from harness.study.datasets import describe


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; counts what was asked for, and fails where told to."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        self.failures: dict[str, int] = {}
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        if self.server.failures.get(name, 0) > 0:
            self.server.failures[name] -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(scenes: Dataset) -> Iterator[Server]:
    with Server(Path(scenes.location)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)


def assert_same(near: Dataset, far: Dataset, split: str = "pretrain") -> None:
    a, b = near.split(split), far.split(split)
    assert a.num_samples == b.num_samples
    np.testing.assert_array_equal(a.subset(a.num_samples), b.subset(b.num_samples))
    np.testing.assert_array_equal(a.label_ids, b.label_ids)
    for row in range(0, a.num_samples, 37):
        assert a.read(row) == b.read(row) and a.keys[row] == b.keys[row]


def test_a_set_behind_a_url_is_the_same_set_and_is_fetched_once(
    scenes: Dataset, server: Server, tmp_path: Path
) -> None:
    assert describe(server.url) == scenes.meta
    far = open_dataset(server.url, tmp_path)
    assert server.asked["pretrain/000000.tar"] == 0, "opening needs no shard"
    far.split("pretrain")
    assert server.asked["index/pretrain.safetensors"] == 1
    assert server.asked["pretrain/000000.tar"] == 0
    assert_same(scenes, far)
    assert_same(scenes, open_dataset(server.url, tmp_path))
    assert server.asked["pretrain/000000.tar"] == server.asked["index/pretrain.safetensors"] == 1
    assert server.asked["val/000000.tar"] == 0, "what is not read is not fetched"


def test_threads_that_want_one_shard_fetch_it_once(server: Server, tmp_path: Path) -> None:
    split = open_dataset(server.url, tmp_path).split("pretrain")
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda row=row: found.append(split.read(row))) for row in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and server.asked["pretrain/000000.tar"] == 1


def test_a_busy_server_is_asked_again(scenes: Dataset, server: Server, tmp_path: Path) -> None:
    server.failures["pretrain/000000.tar"] = 2
    assert_same(scenes, open_dataset(server.url, tmp_path))
    assert server.asked["pretrain/000000.tar"] == 3


def test_a_server_that_stays_down_is_named(server: Server, tmp_path: Path) -> None:
    server.failures["pretrain/000000.tar"] = 99
    split = open_dataset(server.url, tmp_path).split("pretrain")
    with pytest.raises(DataError, match=r"000000\.tar: cannot be read .*503.* after 4 tries"):
        split.read(0)


def test_a_file_that_is_not_what_was_written_is_refused(
    scenes: Dataset, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = open_dataset(server.url, tmp_path)
    far.split("train")
    for damage, message in ((b"x", "truncated"), (None, "not those that were written")):
        real = storage.copy_file

        def copy(url: str, target: Path, damage: bytes | None = damage, real: Any = real) -> None:
            real(url, target)
            content = bytearray(target.read_bytes())
            content[1000] ^= 1
            target.write_bytes(damage or bytes(content))

        with monkeypatch.context() as patch:
            patch.setattr(storage, "copy_file", copy)
            with pytest.raises(DataError, match=rf"000000\.tar: byte offset \d+: .*{message}"):
                far.split("train").read(0)
    assert_same(scenes, far, "train")  # nothing damaged was kept


def test_what_is_missing_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no http://.*/nothing/dataset\.json"):
        describe(f"{server.url}/nothing")
    far = open_dataset(server.url, tmp_path)
    entry = {**far.meta.shards["val"][0], "file": "val/lost.tar"}
    far.meta.shards["val"][0].update(entry)
    with pytest.raises(DataError, match=r"val/lost\.tar: byte offset 0: there is no such file"):
        far.split("val").read(0)


def test_unknown_schemes_and_missing_readers_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match=r"nosuch://x/dataset\.json: .*nosuch"):
        describe("nosuch://x")
    # Not installed, nor remembered by fsspec from an earlier test of the same process.
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(known, "gs", raising=False)
    with pytest.raises(UserError, match=r"reading gs:// needs `pip install gcsfs`"):
        describe("gs://bucket/set")


def test_the_cache_keeps_to_its_size_dropping_what_was_opened_longest_ago(
    scenes: Dataset, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = scenes.meta
    sizes = {s: int(meta.shards[s][0]["bytes"]) for s in ("val", "train", "test")}
    kept = tmp_path / "cache" / meta.fingerprint / "files"
    monkeypatch.setenv("HARNESS_CACHE_BYTES", str(sizes["val"] + sizes["train"] + 200_000))
    far = open_dataset(server.url, tmp_path)
    for split in ("val", "train", "val", "test"):
        far.split(split).read(0)
        total = sum(path.stat().st_size for path in kept.iterdir() if path.suffix == ".tar")
        assert total <= sizes["val"] + sizes["train"] + 200_000
    far.split("val").read(3)  # gone from the cache or not, an open file reads on
    assert_same(scenes, open_dataset(server.url, tmp_path), "val")
    monkeypatch.setenv("HARNESS_CACHE_BYTES", "a lot")
    far = open_dataset(server.url, tmp_path / "other")
    with pytest.raises(UserError, match="HARNESS_CACHE_BYTES: found 'a lot', expected a size"):
        far.split("val").read(0)


def files_of(scenes: Dataset) -> Iterator[tuple[str, Path]]:
    top = Path(scenes.location)
    for path in sorted(top.rglob("*")):
        if path.is_file():
            yield path.relative_to(top).as_posix(), path


def test_s3_by_the_same_reader(
    scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for name, path in files_of(scenes):
            client.upload_file(str(path), "images", f"set/{name}")
        far = open_dataset("s3://images/set", tmp_path)
        assert far.meta == scenes.meta
        assert_same(scenes, far)
        with pytest.raises(NotFoundError, match=r"no s3://images/none/dataset\.json"):
            describe("s3://images/none")
    finally:
        server.stop()


def test_gs_by_the_same_reader(
    scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gcsfs would ask for the kind of bucket by gRPC, which the emulator does not speak.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="images")
    server.start()
    try:
        while server._api._httpd is None:  # its port is not known before
            time.sleep(0.01)
        host, port = server._api._httpd.server_address[:2]
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        bucket = fsspec.filesystem("gs", token="anon", skip_instance_cache=True)
        for name, path in files_of(scenes):
            bucket.pipe(f"images/set/{name}", path.read_bytes())
        far = open_dataset("gs://images/set", tmp_path)
        assert far.meta == scenes.meta
        assert_same(scenes, far)
        with pytest.raises(NotFoundError, match=r"no gs://images/none/dataset\.json"):
            describe("gs://images/none")
    finally:
        server.stop()
