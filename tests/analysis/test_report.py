"""The report as files: whole, harmless, and never a crash on an odd study."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from runtree import Spec, Truth, write_json, write_tree

from analysis import pictures, style
from analysis.load import load
from analysis.report import ReportResult, build
from harness.errors import NotFoundError
from tests.analysis.conftest import holes

SMALL: dict[str, Any] = {"sizes": ["xs", "s"], "data": [1_000, 4_000], "seeds": [0]}


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def values(self, name: str) -> list[str]:
        return [a[name] or "" for _, a in self.tags if name in a]


def report(tmp_path: Path, spec: Spec) -> tuple[ReportResult, str]:
    write_tree(tmp_path / "runs", spec)
    result = build(tmp_path / "runs", spec.name, tmp_path / "out")
    return result, result.index.read_text(encoding="utf-8")


def test_whole_report_of_a_study_with_holes(tmp_path: Path) -> None:
    spec = Spec(state_of=holes, truth=Truth(noise=0.01), tasks=("probe", "fine_tune"))
    result, page = report(tmp_path, spec)
    folder = result.index.parent
    assert folder == tmp_path / "out" / "made"
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert all(sentence + "." in text for sentence in result.finding.rstrip(".").split(". ")[:2])
    assert result.counts.done == 56

    names = {p.name for p in (folder / "figures").iterdir()}
    wanted = [
        "convergence",
        "transfer-params",
        "transfer-data",
        "gain",
        "power-laws",
        "tasks",
        "task-laws",
    ]
    assert {f"{n}.{e}" for n in [*wanted, "reconstructions"] for e in ("svg", "png")} == names
    for svg in (folder / "figures").glob("*.svg"):
        ElementTree.parse(svg)

    parsed = Page(page)
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    assert all(h.startswith("#") and h[1:] in ids for h in parsed.values("href"))
    assert all(s.startswith("data:image/png;base64,") for s in parsed.values("src"))
    assert all(u.startswith("#") for u in re.findall(r"url\(([^)]*)\)", page))
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert all("alt" in a for t, a in parsed.tags if t == "img")
    assert all(a.get("aria-label") for t, a in parsed.tags if t == "svg")

    for cell, name in load(tmp_path / "runs", "made").cells[["cell", "name"]].to_numpy():
        assert f'<a href="#cell-{cell}">{name}</a>' in page  # results
        assert page.count(f'<tr id="cell-{cell}"><th scope="row">{name}') == 1
    assert "wsp diverged: as the test wants" in page

    results = pd.read_csv(folder / "results.csv")
    assert len(results) == len(load(tmp_path / "runs", "made").results)
    assert results.loc[results["state"] != "done", "value"].isna().all()
    assert {"samples", "val_loss", "cells"} <= set(pd.read_csv(folder / "curves.csv"))

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    fits = json.loads((folder / "fits.json").read_text(), parse_constant=no_constant)["fits"]
    for fit in fits:
        assert fit["status"] in ("converged", "not_converged", "at_bound", "refused")
        assert fit["rows_used"] == len(fit["cells_used"])
        assert (fit["status"] == "refused") == (not fit["params"])
    dropped = [d for f in fits for d in f["rows_dropped"]]
    assert {"diverged", "blocked"} <= {d["reason"] for d in dropped}
    text = (folder / "report.md").read_text()
    assert "## Every cell" in text and "![Convergence](figures/convergence.png)" in text


ODD: dict[str, dict[str, Any]] = {
    "one cell": {"sizes": ["xs"], "data": [1_000], "seeds": [0], "inits": ["random"]},
    "one pair": {"sizes": ["xs"], "data": [1_000], "seeds": [0]},
    "only mae": {**SMALL, "inits": ["mae"], "tasks": ("few_shot",)},
    "no transfer": {**SMALL, "tasks": ()},
    "only fine-tuning, no question": {**SMALL, "tasks": ("fine_tune",), "question": None},
    "one size": {"sizes": ["s"], "seeds": [0], "tasks": ("probe",)},
    "nothing run": {**SMALL, "state_of": lambda axes, role: "planned"},
    "all diverged": {**SMALL, "state_of": lambda axes, role: "diverged"},
    "one eval": {**SMALL, "evals": 1, "tasks": ()},
    "extra axes": {
        "sizes": ["xs"],
        "data": [1_000, 4_000],
        "seeds": [0],
        "tasks": (),
        "extra": {"wsp.duration.samples": [8_000, 16_000], "dataset": ["a", "$b_{$"]},
    },
}


@pytest.mark.parametrize("name", ODD)
def test_odd_studies_get_a_report(tmp_path: Path, name: str) -> None:
    result, page = report(tmp_path, Spec(**ODD[name]))
    assert result.finding and result.counts.expected > 0
    assert "Every cell" in page
    text = re.sub(r"<svg.*?</svg>|base64,[^\"]*", "", page, flags=re.DOTALL).lower()
    assert not re.search(r"\b(nan|inf)\b", text)


def test_study_without_cells(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "studies" / "empty"
    folder.mkdir(parents=True)
    (folder / "cells.jsonl").write_text("")
    assert build(tmp_path / "runs", "empty", tmp_path / "out").finding.startswith(
        "The study has no cells."
    )


def test_unknown_study_writes_nothing(tmp_path: Path) -> None:
    write_tree(tmp_path / "runs", Spec(**SMALL, tasks=()))
    with pytest.raises(NotFoundError, match="made"):
        build(tmp_path / "runs", "mad", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_from_files_is_text(tmp_path: Path) -> None:
    evil = "\"'><script>alert(1)</script><img src=x onerror=y>|[a](javascript:b)"
    spec = Spec(
        **{**SMALL, "data": [1_000]},
        question=evil,
        tasks=("probe",),
        extra={"wsp.note": [evil, "plain"]},
        state_of=lambda axes, role: "failed" if role == "probe" else "done",
    )
    rows = write_tree(tmp_path / "runs", spec)
    (tmp_path / "runs" / "studies" / "made" / "study.yaml").write_text(f"</pre>{evil}")
    stage = rows[0]["stages"]["probe"]
    write_json(
        tmp_path / "runs" / "stages" / "linear_probe" / stage / "status.json",
        {"schema": 1, "state": "failed", "reason": evil, "message": f"\ud800{evil}"},
    )
    index = build(tmp_path / "runs", "made", tmp_path / "out").index
    page = Page(index.read_text(encoding="utf-8"))
    assert {t for t, _ in page.tags}.isdisjoint({"script", "iframe", "object", "link"})
    assert not [n for _, a in page.tags for n in a if n.startswith("on")]
    markdown = (index.parent / "report.md").read_text(encoding="utf-8")
    markdown, _, listing = markdown.partition("\n```\n")
    assert "<" not in markdown.replace("&lt;", "")
    assert listing == f"</pre>{evil}\n```\n"
    assert not re.search(r"(?<!\\)\]\(javascript", markdown)
    assert all(re.fullmatch(r"[a-z0-9.-]+", p.name) for p in (index.parent / "figures").iterdir())


def test_same_tree_same_bytes(tmp_path: Path) -> None:
    write_tree(tmp_path / "runs", Spec(**{**SMALL, "data": [1_000]}, tasks=()))
    first = build(tmp_path / "runs", "made", tmp_path / "a").index.parent
    second = build(tmp_path / "runs", "made", tmp_path / "b").index.parent
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_ablations_are_apart_from_the_grid(tmp_path: Path) -> None:
    rows = write_tree(tmp_path / "runs", Spec(**SMALL, tasks=("probe",)))
    child = dict(rows[0], id="child-0123456789", name="child-low-lr", parent=rows[0]["id"])
    child["set"] = {"wsp.lr": 3e-4}
    path = tmp_path / "runs" / "studies" / "made" / "cells.jsonl"
    with open(path, "a") as file:
        file.write(json.dumps(child) + "\n")
    result = build(tmp_path / "runs", "made", tmp_path / "out")
    assert result.counts.expected == len(rows)
    page = result.index.read_text()
    assert "Ablations" in page and "wsp.lr = 0.0003" in page


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    rows = write_tree(tmp_path, Spec(**SMALL, tasks=()))
    stages = [r["stages"]["mae"] for r in rows if "mae" in r["stages"]]
    folders = [tmp_path / "stages" / "mae" / s for s in dict.fromkeys(stages)]
    (folders[0] / "reconstructions.npz").write_bytes(b"PK not a zip")
    (folders[1] / "reconstructions.npz").unlink()
    strips, hidden = pictures.strips(load(tmp_path, "made"))
    assert hidden == 0
    assert [s.pixels is None for s in strips] == [True, True]
    assert "cannot be read" in strips[0].problem
    assert strips[1].problem == "no reconstructions.npz"


def test_strip_holds_the_pictures_in_order(tmp_path: Path) -> None:
    write_tree(tmp_path, Spec(sizes=["xs"], data=[1_000], seeds=[0], tasks=()))
    strip = pictures.strips(load(tmp_path, "made"))[0][0]
    with np.load(next(tmp_path.glob("stages/mae/*/reconstructions.npz"))) as arrays:
        for row, name in enumerate(("masked", "reconstructed", "original")):
            assert strip.pixels is not None
            found = strip.pixels[row * 26 : row * 26 + 24, 26 : 26 + 24, :3]
            assert np.array_equal(found, arrays[name][1])


def test_labels_are_apart_and_near_their_lines() -> None:
    wanted = [0.1, 0.11, 0.12, 0.5, 0.98, 0.99, 1.0]
    heights = style._spread(wanted, 0.05)
    assert np.all(np.diff(heights) >= 0.05 - 1e-9)
    assert heights[3] == 0.5
    assert 0 <= heights[0] and heights[-1] <= 1
    assert np.abs(np.subtract(heights, wanted)).max() < 0.12
