"""Where the user's settings are."""

from __future__ import annotations

import os
from pathlib import Path


def settings_path() -> Path:
    """HARNESS_SETTINGS, or ~/.config/harness/settings.yaml (XDG_CONFIG_HOME honoured)."""
    named = os.environ.get("HARNESS_SETTINGS")
    if named:
        return Path(named)
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "harness" / "settings.yaml"
