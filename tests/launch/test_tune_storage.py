"""`harness tune --storage`: a database that cannot be used, in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.ledger.tree import Tree
from harness.tune import _storage


def test_a_missing_driver_names_the_extra_that_brings_it_and_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)  # as where it is not installed
    with pytest.raises(UserError) as error:
        _storage(Tree(tmp_path), "rates", "postgresql://me:secret@host/trials")
    text = str(error.value)
    assert text.startswith("--storage host/trials: cannot be used: ") and "\n" not in text
    assert text.endswith("; pip install 'vision-scaling-harness[postgresql]'")
    assert "secret" not in text
