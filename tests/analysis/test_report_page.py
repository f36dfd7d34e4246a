"""The page in a browser: fits every window, in light, dark and print, and asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from runtree import Spec, Truth, write_tree

from analysis.report import build
from tests.analysis.conftest import holes

pytestmark = pytest.mark.browser

LONG = "averyveryverylongnamewithoutanyplacetobreakit" * 3


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    program = chromium.find()
    if program is None:
        pytest.skip("no chromium")
    with chromium.Browser.start(program) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with holes, three inits and a word that no line can hold."""
    root = tmp_path_factory.mktemp("page")
    spec = Spec(
        question=f"Does {LONG} help?", state_of=holes, truth=Truth(noise=0.01), tasks=("probe",)
    )
    write_tree(root / "runs", spec)
    return build(root / "runs", spec.name, root / "out").index


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1024, 1600])
def test_page_fits_the_window(
    browser: chromium.Browser, page: Path, width: int, scheme: str
) -> None:
    seen = browser.visit(page, width, scheme)
    assert seen.facts["over"] == 0, seen.facts
    assert not seen.facts["outside"]
    # Less the scroll bar, which a phone does not have.
    assert width - 20 <= seen.facts["width"] <= width
    assert seen.facts["images"] and not seen.facts["broken"] and not seen.facts["empty"]
    assert not seen.requests and not seen.complaints
    light = sum(map(int, seen.facts["paper"].strip("rgb()").split(","))) > 3 * 128
    assert light == (scheme == "light")


def test_print_fits_the_paper(browser: chromium.Browser, page: Path, tmp_path: Path) -> None:
    # A4 less Chromium's margins of 1 cm.
    seen = browser.visit(page, 718, "dark", media="print")
    assert seen.facts["over"] == 0 and not seen.facts["outside"], seen.facts
    assert seen.facts["paper"] == "rgb(255, 255, 255)"
    browser.pdf(tmp_path / "page.pdf")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF-") and content.count(b"/Type /Page\n") >= 4
