"""Parts of a report: numbers lead to their cells, long tables are cut, files hold all, one seam."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from runtree import Spec, Truth, write_tree

from analysis import contents, export, page, panels, report, scaling_sections, style
from analysis.checklist import checklist
from analysis.load import load
from analysis.markdown import escaped
from analysis.report import build
from analysis.sections import Analysis, Section, analysed
from analysis.tables import Table
from tests.analysis.conftest import holes

SMALL: dict[str, Any] = {"sizes": ["xs", "s"], "data": [1_000, 4_000], "seeds": [0]}
DATA_FILES = ("cells", "curves", "gains", "results", "tasks")


class Rows(HTMLParser):
    """Rows of each table: text, links, and the text of what unfolds. Keyed by the section's id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.section = ""
        self._row: dict[str, Any] | None = None
        self._in_head = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        if tag == "h2":
            self.section = about.get("id") or ""
        elif tag == "thead":
            self._in_head = True
        elif tag == "tr" and not self._in_head:
            self._row = {"id": about.get("id"), "text": "", "links": []}
            self.rows.setdefault(self.section, []).append(self._row)
        elif tag == "a" and self._row is not None:
            self._row["links"].append((about.get("href") or "").lstrip("#"))

    def handle_endtag(self, tag: str) -> None:
        if tag == "thead":
            self._in_head = False
        elif tag == "tr":
            self._row = None

    def handle_data(self, data: str) -> None:
        if self._row is not None:
            self._row["text"] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run root, report) of a study with holes."""
    root = tmp_path_factory.mktemp("parts")
    spec = Spec(state_of=holes, truth=Truth(noise=0.01), tasks=("probe", "fine_tune"))
    write_tree(root / "runs", spec)
    return root / "runs", build(root / "runs", "made", root / "out").index.parent


def test_every_row_leads_to_the_cells_it_comes_from(made: tuple[Path, Path]) -> None:
    root, folder = made
    found = Rows((folder / "index.html").read_text(encoding="utf-8")).rows
    cells = load(root, "made").cells
    anchors = {f"cell-{cell}" for cell in cells["cell"]}
    assert {row["id"] for row in found["table-cells"]} == anchors
    for name in ("results", "gains", "fits", "diagnostics", "tasks"):
        rows = found[f"table-{name}"]
        assert rows and all(row["links"] and {*row["links"]} <= anchors for row in rows), name

    # A gain rests on both arms of its grid point, and `worth in images` on all of random's arm.
    gain = next(row for row in found["table-gains"] if row["text"].startswith("s, 4k"))
    point = cells[(cells["size"] == "s") & (cells["data"] == 4_000)]
    arm = cells[(cells["size"] == "s") & (cells["init"] == "random")]
    wanted = {f"cell-{cell}" for cell in {*point["cell"], *arm["cell"]}}
    assert {*gain["links"]} == wanted and len(gain["links"]) == len(wanted)


def test_fit_lists_used_and_dropped_cells_with_the_reason(made: tuple[Path, Path]) -> None:
    _, folder = made
    rows = Rows((folder / "index.html").read_text(encoding="utf-8")).rows["table-fits"]
    fits = json.loads((folder / "fits.json").read_text())["fits"]
    assert len(rows) == len(fits)
    assert any(fit["rows_dropped"] for fit in fits)
    for row, fit in zip(rows, fits, strict=True):
        dropped = [d["cell"] for d in fit["rows_dropped"]]
        assert row["links"] == [f"cell-{c}" for c in [*fit["cells_used"], *dropped]]
        assert all(f"dropped, {d['reason']}" in row["text"] for d in fit["rows_dropped"])


def test_cell_names_the_folders_of_its_stages(made: tuple[Path, Path]) -> None:
    root, folder = made
    rows = Rows((folder / "index.html").read_text(encoding="utf-8")).rows["table-cells"]
    cells = load(root, "made").cells
    finished = {f"cell-{cell}" for cell in cells.loc[cells["state"] == "done", "cell"]}
    assert finished
    for row in rows:
        paths = re.findall(r"stages/\w+/\S+", row["text"])
        assert paths
        assert row["id"] not in finished or all((root / path).is_dir() for path in paths)
    in_file = pd.read_csv(folder / "cells.csv")["stages"]
    assert in_file.str.startswith("stages/").all()


@pytest.mark.parametrize("name", DATA_FILES)
def test_csv_and_parquet_hold_the_same(made: tuple[Path, Path], name: str) -> None:
    _, folder = made
    one, two = pd.read_csv(folder / f"{name}.csv"), pd.read_parquet(folder / f"{name}.parquet")
    assert list(one) == list(two) and len(one) == len(two) > 0
    for column in one:
        numbers = two[column].dtype.kind in "fi" and one[column].dtype.kind in "fi"
        kind = float if numbers else str
        both = (one[column], two[column])
        # CSV has one way to leave a field empty: no number and no text look alike in it.
        left, right = (c.astype(object).where(c.notna() & (c != ""), np.nan) for c in both)
        assert left.astype(kind).tolist() == pytest.approx(right.astype(kind).tolist(), nan_ok=True)


def test_parquet_of_curves_is_what_was_logged(made: tuple[Path, Path]) -> None:
    root, folder = made
    data = load(root, "made")
    found = pd.read_parquet(folder / "curves.parquet")
    for name in ("step", "samples", "val_loss", "lr"):
        logged = data.curves[name].to_numpy(float)
        np.testing.assert_array_equal(found[name].to_numpy(float), logged)
    assert found["stage"].astype(str).tolist() == data.curves["stage"].astype(str).tolist()


def test_thinned_curves_keep_the_ends_of_each_and_stay_below_the_limit(tmp_path: Path) -> None:
    write_tree(tmp_path, Spec(**SMALL, evals=101, tasks=()))
    curves = load(tmp_path, "made").curves
    kept = export.thinned(curves, most=len(curves) // 7)
    assert 0.5 * len(curves) // 7 < len(kept) <= len(curves) // 7
    assert {*kept.index} < {*curves.index}
    for stage, own in curves.groupby("stage", observed=True):
        few = kept[kept["stage"] == stage]
        assert few["step"].iloc[0] == own["step"].iloc[0]
        assert few["step"].iloc[-1] == own["step"].iloc[-1]
    assert export.thinned(curves, most=len(curves)) is curves


def test_page_says_that_the_curves_file_is_thinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_CSV_ROWS", 30)
    monkeypatch.setattr(export.thinned, "__defaults__", (30,))
    write_tree(tmp_path / "runs", Spec(**SMALL, tasks=()))
    folder = build(tmp_path / "runs", "made", tmp_path / "out").index.parent
    assert len(pd.read_csv(folder / "curves.csv")) <= 30
    whole = pd.read_parquet(folder / "curves.parquet")
    assert f"every k-th of the {len(whole)} logged rows" in (folder / "index.html").read_text()


def test_long_tables_are_cut_on_the_page_and_whole_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MAX_ROWS", 3)
    monkeypatch.setattr(page, "MAX_CELLS", 5)
    write_tree(tmp_path / "runs", Spec(tasks=("probe",), seeds=[0]))
    folder = build(tmp_path / "runs", "made", tmp_path / "out").index.parent
    text = (folder / "index.html").read_text(encoding="utf-8")
    found = Rows(text).rows
    assert len(found["table-results"]) == 3 and len(found["table-cells"]) == 5
    assert "3 of 32 rows. All are in results.csv." in text
    assert "5 of 32 rows. All are in cells.csv." in text
    # No link leads nowhere; cells that are not shown are named all the same.
    ids = {*re.findall(r'\bid="([^"]+)"', text)}
    assert {*re.findall(r'href="#([^"]+)"', text)} <= ids
    assert len(pd.read_csv(folder / "cells.csv")) == 32


def test_spreadsheets_find_no_formula(tmp_path: Path) -> None:
    evil = ["=1+1", "@SUM(A1)", "+cmd", "-2", "\tx", "plain", 'a"b,\n<c>', None]
    frame = pd.DataFrame({"=name": evil, "kind": pd.Categorical(evil), "value": [-1.0] * 8})
    export.write_frame(tmp_path, "rows", frame)
    found = pd.read_csv(tmp_path / "rows.csv", dtype={"value": str})
    assert not [w for w in [*found, *found["kind"].dropna()] if w[0] in "=+-@\t"]
    assert found["value"].tolist() == ["-1"] * 8
    assert found["'=name"].iloc[6] == evil[6]
    # The other files have the text as it is.
    assert pd.read_parquet(tmp_path / "rows.parquet")["=name"].tolist()[:7] == evil[:7]


def test_half_a_surrogate_pair_breaks_no_file(tmp_path: Path) -> None:
    rows = write_tree(tmp_path / "runs", Spec(**SMALL, tasks=(), question="half \ud83d of a pair"))
    rows[0]["name"] = "cell \udc00"
    path = tmp_path / "runs" / "studies" / "made" / "cells.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = build(tmp_path / "runs", "made", tmp_path / "out").index
    assert "half ? of a pair" in index.read_text(encoding="utf-8")
    assert "cell ?" in pd.read_csv(index.parent / "cells.csv")["name"].tolist()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("d16x2-1k_mae", "d16x2-1k_mae"),
        ("_emphasis_ *too*", r"\_emphasis\_ \*too\*"),
        ("a | b\nc", r"a \| b c"),
        ("# no heading", r"\# no heading"),
        ("- no list", r"\- no list"),
        ("1. no list", r"1\. no list"),
        ("-0.3 [-0.4 to +0.1]", r"-0.3 \[-0.4 to +0.1\]"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        (r"\*", r"\\\*"),
        ("$x$ ~~y~~ `z`", r"\$x\$ \~\~y\~\~ \`z\`"),
    ],
)
def test_markdown_shows_text_as_text(text: str, wanted: str) -> None:
    assert escaped(text) == wanted


def test_checklist_is_filled_from_the_study_and_shows_what_is_missing(
    made: tuple[Path, Path],
) -> None:
    root, folder = made
    with analysed(load(root, "made"), root) as a:
        groups = {f.title: dict(f.rows) for f in checklist(a)[0].facts}
    assert list(groups) == [
        *("Hypothesis", "Training setup", "Data collection", "Fitting", "Validation")
    ]
    assert groups["Hypothesis"]["Question"] == "Does it work?"
    assert groups["Training setup"]["Models"].startswith("4 sizes: xs (8k), s (30k)")
    assert groups["Training setup"]["Seeds"] == "2 (0, 1)"
    assert groups["Data collection"]["Runs"] == (
        "56 of 64 cells finished, 2 failed, 2 diverged, 4 missing"
    )
    dropped = groups["Data collection"]["Rows left out of fits"]
    assert "diverged" in dropped and "blocked" in dropped
    assert groups["Validation"]["Noise between seeds"].startswith("2 seeds")
    # The made tree has no recipe, no commit and no published weights: empty, not guessed.
    for group, name in (
        ("Training setup", "WSP recipe"),
        ("Training setup", "How hyperparameters were chosen"),
        ("Data collection", "Weights that are published"),
    ):
        assert groups[group][name] == ""
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert '<dt>WSP recipe</dt><dd class="empty">not recorded</dd>' in text
    assert "- WSP recipe: not recorded" in (folder / "report.md").read_text()


def test_one_line_adds_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def extra(a: Analysis) -> list[Section]:
        table = Table(
            name="extra", title="Numbers", note="", header=("a", "b"), rows=(("one", "1"),)
        )
        rows = pd.DataFrame({"a": ["one"], "b": [len(a.data.cells)]})
        return [
            Section(
                name="extra",
                title="One <more>",
                intro="Said in words.",
                figures=contents.convergence(a)[0].figures[:0],
                tables=(table,),
                frames={"extra": ("a row each", rows)},
                numbers={"extra": {"b": np.float64("nan")}},
            )
        ]

    monkeypatch.setattr(report, "SECTIONS", (*report.SECTIONS, extra))
    write_tree(tmp_path / "runs", Spec(**SMALL, tasks=()))
    folder = build(tmp_path / "runs", "made", tmp_path / "out").index.parent
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert '<h2 id="extra">One &lt;more&gt;</h2>' in text and '<a href="#extra">' in text
    assert '<h3 id="table-extra">Numbers</h3>' in text
    assert "## One &lt;more&gt;" in (folder / "report.md").read_text()
    assert pd.read_parquet(folder / "extra.parquet")["b"].tolist() == [8]
    assert "extra.csv, extra.parquet" in text
    assert json.loads((folder / "fits.json").read_text())["extra"] == {"b": None}


def test_two_sections_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = (*report.SECTIONS, contents.convergence)
    monkeypatch.setattr(report, "SECTIONS", twice)
    write_tree(tmp_path / "runs", Spec(**SMALL, tasks=()))
    with pytest.raises(AssertionError, match="share a name"):
        build(tmp_path / "runs", "made", tmp_path / "out")


# -- looks ----------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, two: str) -> float:
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_labels_and_lines_stand_out_in_both_themes(theme: int) -> None:
    paper = style.THEMED["paper"][theme]
    for name, colours in style.THEMED.items():
        if name not in ("paper", "rule"):
            assert contrast(colours[theme], paper) >= 4.5, name


def test_inits_of_a_study_have_colours_of_their_own() -> None:
    inits = ["random", "mae", *(f"checkpoint:w{i}.safetensors" for i in range(5))]
    style.introduce(inits)
    assert len({style.colour(i) for i in inits}) == 7
    assert len({style.mark(i) for i in inits}) == 7
    style.introduce(reversed(inits))
    assert [style.colour(i) for i in inits] == [style.colour(i) for i in inits]
    assert {style.css_colour(i) for i in inits} <= {f"var(--{n})" for n in style.THEMED}
    assert style.ordered(inits)[:2] == ("mae", "random")


def test_processes_draw_what_one_process_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path, Spec(**SMALL, tasks=("probe",)))
    with analysed(load(tmp_path, "made"), tmp_path) as a:
        figures = [f for s in contents.convergence(a) + contents.gains(a) for f in s.figures]
    drawn = []
    for limit in (1, 1000):
        monkeypatch.setattr(panels, "_WORTH_FORKING", limit)
        with panels.renderer(figures) as render:
            drawn.append(render())
    for name, one in drawn[0].items():
        for left, right in zip(one, drawn[1][name], strict=True):
            assert left.svg == right.svg and np.array_equal(left.pixels, right.pixels)


@pytest.mark.parametrize(
    ("name", "value", "ends", "text"),
    [
        ("A", -0.196, (-0.26, -0.134), "-0.196 [-0.26 to -0.134]"),
        ("E", -20.0, (-20.0, -20.0), "at a limit of the search"),
        ("E", -0.267, (-20.0, -0.102), "-0.267 [no end to -0.102]"),
        ("beta", 2.0, (-0.163, 2.0), "at a limit of the search"),
        ("beta", 0.1, None, "0.1"),
    ],
)
def test_a_change_at_a_limit_of_the_search_is_no_number(
    name: str, value: float, ends: tuple[float, float] | None, text: str
) -> None:
    # Scales are searched for 20 in ln either way, exponents for 2.
    assert scaling_sections.change_text(name, value, ends) == text
