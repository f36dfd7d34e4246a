"""Tests of transfer read the stand-in data set."""

import pytest
import standin


@pytest.fixture(autouse=True)
def _stand_in_data(monkeypatch: pytest.MonkeyPatch) -> None:
    standin.install(monkeypatch.setattr)
