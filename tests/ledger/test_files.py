"""Files are whole or absent, whatever happens while they are written."""

import errno
import json
import os
from pathlib import Path

import pytest

from harness.errors import LeaseLostError, UserError
from harness.ledger import files
from harness.ledger.files import JsonlWriter, read_json, read_jsonl, write_json


def test_json_round_trip_and_absence(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    write_json(tmp_path / "deep" / "a.json", {"x": [1, 2.5, None, "ü"]})
    assert read_json(tmp_path / "deep" / "a.json") == {"x": [1, 2.5, None, "ü"]}
    assert os.listdir(tmp_path / "deep") == ["a.json"]


def test_a_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_json(tmp_path / "a.json", {"new": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def lost() -> None:
    raise LeaseLostError("another process owns the stage")


def test_who_loses_a_file_while_it_is_written_leaves_the_new_owners_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "a.json", {"of": "the new owner"})
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)

    def guard() -> None:
        assert synced, "looked before the file was on the disk"
        lost()

    with pytest.raises(LeaseLostError):
        write_json(tmp_path / "a.json", {"of": "the old one"}, guard)
    assert read_json(tmp_path / "a.json") == {"of": "the new owner"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_who_lost_a_file_appends_nothing_and_drops_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    JsonlWriter(path).append({"step": 1})
    old = JsonlWriter(path, lost)
    for write in (lambda: old.append({"step": 2}), lambda: old.rewind(0)):
        with pytest.raises(LeaseLostError):
            write()
    assert path.read_bytes() == b'{"step": 1}\n'
    path.write_bytes(b'{"step": 1}\n{"st')  # the new owner is in the middle of a row
    with pytest.raises(LeaseLostError):
        JsonlWriter(path, lost)
    assert path.read_bytes() == b'{"step": 1}\n{"st'


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    for step in range(5):
        writer.append({"step": step, "loss": 1 / (step + 1)})
    whole = path.read_bytes()
    for cut in range(1, 20):
        path.write_bytes(whole[:-cut])
        rows = read_jsonl(path)
        assert [r["step"] for r in rows] == [0, 1, 2, 3]
        JsonlWriter(path).append({"step": 4, "loss": 0.2})
        assert path.read_bytes() == whole


def test_rewind_drops_later_rows_and_keeps_the_rest_to_the_byte(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl")
    for step in (10, 20, 30):
        writer.append({"step": step, "loss": 0.1 * step})
    whole = writer.path.read_bytes()
    writer.rewind(20)
    assert [r["step"] for r in read_jsonl(writer.path)] == [10, 20]
    writer.append({"step": 30, "loss": 0.1 * 30})
    assert writer.path.read_bytes() == whole


def test_rubbish_in_a_json_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json: not JSON"):
        read_json(tmp_path / "a.json")


def test_a_file_that_another_host_replaces_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "status.json", {"state": "done"})
    stale, read = [2], Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if stale[0]:
            stale[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert read_json(tmp_path / "status.json") == {"state": "done"}


def test_machines_of_one_name_can_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for host in ("one", "two"):
        monkeypatch.setenv("HARNESS_HOST", host)
        files._machine.cache_clear()
        names.add(files._machine())
    files._machine.cache_clear()
    assert len(names) == 2


def test_rows_are_on_disk_when_they_are_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.sync()  # before the first row there is no file
    writer.append({"step": 1})
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.pread(fd, 100, 0)))
    writer.sync()
    assert synced == [b'{"step": 1}\n']
