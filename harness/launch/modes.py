"""What `--submit` does with stages that were run before: `--mode`."""

from __future__ import annotations

from typing import Literal

Mode = Literal["cached", "retry", "force", "read-only"]
