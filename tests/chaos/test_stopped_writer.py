"""A process that is stopped while it writes weights, and continued when it owns nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.ledger.files import read_json, write_json

pytestmark = pytest.mark.long

WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from harness.errors import LeaseLostError
from harness.ledger.lease import Lease
from harness.models.weight_files import guarded, write_atomically

folder = Path(sys.argv[1])
lease = Lease.acquire(folder / "lease")

def write(path):
    lease.guard()
    save_file({"w": torch.ones(3)}, path)
    os.kill(os.getpid(), signal.SIGSTOP)

try:
    with guarded(lease.guard):
        write_atomically(folder / "weights.safetensors", write)
except LeaseLostError:
    sys.exit(76)
"""


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_writer_continued_after_a_takeover_names_no_file(tmp_path: Path, is_taken: bool) -> None:
    weights, lease = tmp_path / "weights.safetensors", tmp_path / "lease"
    weights.write_bytes(b"of the new owner")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        _, status = os.waitpid(writer.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        if is_taken:
            write_json(lease, {**(read_json(lease) or {}), "token": "another"})
        time.sleep(1.2)  # longer than a look at the lease counts
        os.kill(writer.pid, signal.SIGCONT)
        assert writer.wait(60) == (76 if is_taken else 0)
    finally:
        writer.kill()
        writer.wait()
    assert (weights.read_bytes() == b"of the new owner") == is_taken
    assert not list(tmp_path.glob(".tmp.*"))
