"""Where the user's settings are."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def settings_path() -> Path:
    """HARNESS_SETTINGS, or ~/.config/harness/settings.yaml (XDG_CONFIG_HOME honoured)."""
    named = os.environ.get("HARNESS_SETTINGS")
    if named:
        return Path(named)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    # Of a user without a home (a container) it is a file that is not there.
    with contextlib.suppress(RuntimeError):
        config = config.expanduser()
    return config / "harness" / "settings.yaml"
