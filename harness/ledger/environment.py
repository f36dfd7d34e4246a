"""What a process saw of its surroundings: content of an attempt's env.json, without secrets."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from harness.ledger.lease import this_host

_SHOWN = (
    *("HARNESS_", "CUDA_", "NVIDIA_", "DS_", "SLURM_", "OMP_", "MKL_", "OPENBLAS_", "NCCL_"),
    *("GLOO_", "TORCH", "PYTORCH_", "PYTHON", "LD_LIBRARY_PATH", "RANK", "WORLD_SIZE", "LOCAL_"),
    *("MASTER_", "UCX_", "FI_"),
)
_HIDDEN = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH", "URL")
_LOGIN = re.compile(r"//[^/@\s]+@")


def environment(by: str) -> dict[str, Any]:
    """Of this process; `by` says what it is to the attempt."""
    env = {
        name: _LOGIN.sub("//***@", value)
        for name, value in sorted(os.environ.items())
        if name.startswith(_SHOWN) and not any(word in name.upper() for word in _HIDDEN)
    }
    return {
        **{"schema": 1, "by": by, "host": this_host(), "python": sys.version.split()[0]},
        **{"executable": sys.executable, "argv": sys.argv, "env": env},
    }
