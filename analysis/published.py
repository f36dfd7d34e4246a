"""The published points of MAE before weakly supervised pretraining, to hold a study's against.

They are those of Singh et al. 2023 (arXiv 2303.13496), of its model release, and of the SWAG and
MAE models that it compares with: published.csv beside this file, a row per number and per text
that gives it. docs/published.md says what they can and cannot identify.

    python -m analysis.published                                      which series there are
    python -m analysis.published in1k_probe --init mae --out maws.csv one of them, for `harness fit`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import style
from analysis.panels import Figure, Panel
from harness.errors import UserError
from harness.ledger.files import write_bytes

INITS = {
    "mae": "MAE, then WSP",
    "random": "WSP only",
    "mae_only": "MAE only",
}
"""What comes before the task. `random` and `mae` are a study's inits; `mae_only` has no WSP."""

VERSIONS = {
    "maws_readme_2024": "README of facebookresearch/maws, commit 8fd8599 (July 2024)",
    "maws_readme_2023": "README of facebookresearch/maws, commits 062029a, 33d9b5e (autumn 2023)",
    "iccv": "main text of Singh et al. 2023 as published at ICCV",
    "arxiv_v3": "abstract of arXiv 2303.13496v3 (January 2024)",
    "arxiv_v1": "abstract of arXiv 2303.13496v1 (March 2023)",
    "swag_readme": "README of facebookresearch/SWAG, commit 45a8b73 (Singh et al. 2022)",
    "mae_readme": "README of facebookresearch/mae, commit 1e4b9e4 (He et al. 2022)",
    "mae_finetune": "FINETUNE.md of facebookresearch/mae, commit 2f170f2",
    "mae_finetune_seeds": "the trials with several seeds in that FINETUNE.md",
    "mae_paper": "He et al. 2022 (arXiv 2111.06377) as quoted in that FINETUNE.md",
    "internvl": "InternVL (Chen et al. 2024, arXiv 2312.14238), quoting Singh et al.",
}
"""Where a number stands, newest text of the models first. All were read in public copies."""

KEY = ("size", "init", "pretrain_data", "task", "metric", "resolution", "version")
_TYPES = {
    "size": "string",
    "params": "int64",
    "init": "string",
    "pretrain_data": "string",
    "pretrain_images": "int64",
    "task": "string",
    "metric": "string",
    "resolution": "Int64",
    "value": "float64",
    "unit": "string",
    "repeats": "Int64",
    "sd": "float64",
    "version": "string",
    "source": "string",
    "status": "string",
    "note": "string",
}
COLUMNS = (*_TYPES, "error", "regime")
_SERIES = ("task", "metric", "init", "pretrain_data", "regime", "version")

PANELS = (
    ("in1k_probe", "acc1", "224", "ImageNet-1k, linear probe"),
    ("in1k_fine_tune", "acc1", "high", "ImageNet-1k, fine-tuned, high resolution"),
    ("in1k_fine_tune", "acc1", "224", "ImageNet-1k, fine-tuned at 224 pixels"),
    ("in1k_zero_shot", "acc1", "224", "ImageNet-1k, zero-shot"),
    ("in1k_prompts", "acc1_1shot", "", "ImageNet-1k, 1 shot"),
    ("inat18_fine_tune", "acc1", "high", "iNaturalist 2018, fine-tuned"),
    ("lvis", "box_ap", "", "LVIS, box AP"),
    ("coco", "box_ap", "", "COCO, box AP"),
)
"""(task, metric, regime, title) of the figure; tasks are named as in grids/maws.yaml."""


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """One published series, ready to draw over model parameters."""

    init: str
    data: str
    version: str
    label: str
    x: np.ndarray
    """Parameters without head, ascending."""
    y: np.ndarray
    """Error as a share: 1 - accuracy, 1 - AP."""


# -- reading --------------------------------------------------------------------------------


def points() -> pd.DataFrame:
    """All published points, a row per number and text.

    `value` in percent; `error` = 1 - value / 100; `params` without head at 224 pixels;
    `pretrain_images` distinct images; `resolution` in pixels, missing where the text does not say;
    `regime` 224, high, or empty where not said. `sd` in percent over `repeats`. `status`
    unverified: a reading of ours, or a number that contradicts another.
    """
    frame = pd.read_csv(Path(__file__).with_suffix(".csv"), dtype=_TYPES)  # type: ignore[arg-type]
    for name in ("note", "unit", "source"):
        frame[name] = frame[name].fillna("")
    assert list(frame.columns) == list(_TYPES), list(frame.columns)
    assert frame["init"].isin(list(INITS)).all(), frame["init"].unique()
    assert frame["version"].isin(list(VERSIONS)).all(), frame["version"].unique()
    assert frame["status"].isin(["published", "unverified"]).all(), frame["status"].unique()
    assert frame["value"].between(0, 100, inclusive="neither").all()
    assert not frame.duplicated(list(KEY)).any(), frame[frame.duplicated(list(KEY))]
    # Rounded: 1 - 0.886 is not 0.114 in binary, and this is read by people.
    frame["error"] = (1 - frame["value"] / 100).round(6)
    regime = np.where(frame["resolution"].fillna(0) == 224, "224", "high")
    frame["regime"] = np.where(frame["resolution"].isna(), "", regime)
    return frame


def select(
    *,
    task: str | None = None,
    metric: str | None = None,
    init: str | None = None,
    data: str | None = None,
    regime: str | None = None,
    version: str | None = None,
    unverified: bool = False,
) -> pd.DataFrame:
    """The points that match, by size; all versions unless one is named.

    Raises UserError, naming what there is, for a value that no point has and for an empty choice.
    """
    frame = points()
    if not unverified:
        frame = frame[frame["status"] == "published"]
    wanted = {"task": task, "metric": metric, "init": init}
    wanted |= {"pretrain_data": data, "regime": regime, "version": version}
    for name, value in wanted.items():
        if value is None:
            continue
        left = frame[frame[name] == value]
        if not len(left):
            given = ", ".join(f"{k} {v}" for k, v in wanted.items() if v is not None and k != name)
            there = ", ".join(repr(v) for v in sorted(frame[name].unique()))
            raise UserError(
                f"published points: {name} {value!r}: none"
                + (f" with {given}" if given else "")
                + f"; there are: {there}"
            )
        frame = left
    return frame.sort_values(["params", "version"], ignore_index=True)


def series(
    *,
    task: str,
    metric: str | None = None,
    init: str | None = None,
    data: str | None = None,
    regime: str | None = None,
    version: str | None = None,
    unverified: bool = False,
) -> pd.DataFrame:
    """Points that may stand in one fit: one task, metric, init, data, regime and version.

    Versions disagree by more than seeds do, so they are not mixed: without `version` it is the one
    with the most sizes, then the newest. Of other things that are not named, the choice with the
    most sizes. Raises UserError where nothing matches.
    """
    frame = select(
        task=task,
        metric=metric,
        init=init,
        data=data,
        regime=regime,
        version=version,
        unverified=unverified,
    )
    order = list(VERSIONS)
    groups = [group for _, group in frame.groupby(list(_SERIES), sort=False)]
    best = max(groups, key=lambda g: (len(g), -order.index(g["version"].iloc[0])))
    return best.reset_index(drop=True)


def export(path: Path, **choice: str | None) -> pd.DataFrame:
    """Writes the `series` of a choice as a CSV that `harness fit` reads; returns it.

    Columns of `points`; for a law over model size --x params --y error.
    """
    found = series(**choice)  # type: ignore[arg-type]
    write_bytes(path, found.to_csv(index=False).encode("utf-8"))
    return found


def catalogue(unverified: bool = False) -> pd.DataFrame:
    """Which series there are: sizes, number of them, decades of parameters."""
    rows = []
    for key, group in select(unverified=unverified).groupby(list(_SERIES), sort=True):
        span = float(np.log10(group["params"].max() / group["params"].min()))
        sizes = ",".join(group.sort_values("params")["size"])
        rows.append([*key, sizes, len(group), round(span, 2)])  # type: ignore[misc]
    return pd.DataFrame(rows, columns=[*_SERIES, "sizes", "points", "decades"])


# -- drawing --------------------------------------------------------------------------------


def overlay(*, task: str, metric: str, regime: str | None = None) -> tuple[Overlay, ...]:
    """Every published series of a task, an init and its data once, most sizes first.

    Empty for a task that has none. Points of other versions are left out: see `points`.
    """
    frame = points()
    frame = frame[(frame["status"] == "published") & (frame["task"] == task)]
    frame = frame[frame["metric"] == metric]
    if regime is not None:
        frame = frame[frame["regime"] == regime]
    found = []
    for init, data in dict.fromkeys(zip(frame["init"], frame["pretrain_data"], strict=True)):
        rows = series(task=task, metric=metric, init=init, data=data, regime=regime)
        # WSP-only and MAE-then-WSP each have one data set a task; MAE alone has several.
        label = INITS[init] + (f", {data}" if init == "mae_only" else "")
        found.append(
            Overlay(
                init=init,
                data=data,
                version=rows["version"].iloc[0],
                label=label,
                x=rows["params"].to_numpy(float),
                y=rows["error"].to_numpy(float),
            )
        )
    return tuple(sorted(found, key=lambda o: (-len(o.x), list(INITS).index(o.init), o.data)))


def shared(results: pd.DataFrame) -> list[tuple[str, str]]:
    """(task, metric) of a study's results that published points have too, by their names."""
    known = set(zip(points()["task"], points()["metric"], strict=True))
    own = results.drop_duplicates(["task", "metric"])
    return [k for k in zip(own["task"], own["metric"], strict=True) if k in known]


def figure(results: pd.DataFrame | None = None) -> Figure:
    """Error over model size for eight of the published tasks, on log axes.

    `results`, a study's `grid_results`, are drawn too where task and metric have the same names.
    """
    own = pd.DataFrame(columns=["task", "metric", "init", "params", "value"])
    if results is not None and len(results):
        own = results[np.isfinite(results["value"].astype(float))]
    panels = tuple(_panel(own, *entry) for entry in PANELS)
    mixed = any(len(_own(own, task, metric)) for task, metric, _, _ in PANELS)
    caption = (
        "Published points of Singh et al. 2023, its model release, SWAG and MAE; none has a seed"
        " repeated. Lines join points of one text; open marks without a line are other texts on the"
        " same models, or points no line can be drawn through. 1 - AP for detection."
    )
    if mixed:
        caption += " Filled marks: this study, mean over seeds, tasks matched by their names."
    return Figure(
        name="published",
        title="Published points",
        caption=caption,
        panels=panels,
        inits=("mae", "random"),
    )


def _own(results: pd.DataFrame, task: str, metric: str) -> pd.DataFrame:
    rows = results[(results["task"] == task) & (results["metric"] == metric)]
    means = rows.groupby(["init", "params"], as_index=False)["value"].mean()
    return means.assign(error=1 - means["value"])


def _panel(results: pd.DataFrame, task: str, metric: str, regime: str, title: str) -> Panel:
    lines = overlay(task=task, metric=metric, regime=regime)
    rows = select(task=task, metric=metric, regime=regime)
    own = _own(results, task, metric)

    def draw(ax: Axes) -> None:
        params = [*rows["params"].astype(float), *own["params"].astype(float)]
        style.log_x(ax, params)
        style.log_y(ax, np.array([*rows["error"], *own["error"]], dtype=float))
        for row in rows.itertuples():
            _mark(ax, str(row.init), float(row.params), float(row.error), filled=False)  # type: ignore[arg-type]
        labels = []
        for line in lines:
            tone = style.colour(line.init)
            dash = "-" if line.init != "mae_only" or line.data == "IG-3B" else (0, (4, 2))
            ax.plot(line.x, line.y, color=tone, lw=1.4, ls=dash)
            labels.append((float(line.y[-1]), line.label, tone))
        for row in own.itertuples():
            _mark(ax, str(row.init), float(row.params), float(row.error), filled=True)  # type: ignore[arg-type]
        ax.set_xlabel("model parameters")
        ax.set_ylabel("1 - AP" if metric.endswith("_ap") else "error")
        style.end_labels(ax, labels, size=8.5)

    alt = f"{title}: error against model parameters. {'; '.join(map(_words, lines))}."
    return Panel(title=title, alt=alt, draw=draw, width=4.6)


def _words(line: Overlay) -> str:
    values = [f"{y:.3f} at {style.short(x)}" for x, y in zip(line.x, line.y, strict=True)]
    return f"{line.label} {', '.join(values)}"


def _mark(ax: Axes, init: str, x: float, y: float, *, filled: bool) -> None:
    tone = style.colour(init)
    face, edge, size = (tone, style.PAPER, 6.5) if filled else (style.PAPER, tone, 5.0)
    ax.plot([x], [y], style.mark(init), mfc=face, mec=edge, mew=1.1, ms=size, ls="none", zorder=3)


# -- command line ---------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m analysis.published`: lists the series, or writes one of them."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.published",
        description="Published points as a CSV for `harness fit`; without a task: what there is.",
    )
    parser.add_argument("task", nargs="?", help="such as in1k_probe")
    for name in ("metric", "init", "data", "regime", "version"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--unverified", action="store_true", help="also points of doubtful origin")
    parser.add_argument("--out", type=Path, help="file to write; without it the rows are printed")
    given = parser.parse_args(arguments)
    choice = {k: v for k, v in vars(given).items() if k not in ("out",)}
    try:
        if given.task is None:
            print(catalogue(given.unverified).to_string(index=False))
        elif given.out is None:
            print(series(**choice).to_csv(index=False), end="")
        else:
            print(_written(given.out, export(given.out, **choice)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _written(path: Path, rows: pd.DataFrame) -> str:
    first, sizes = rows.iloc[0], ", ".join(rows["size"])
    return (
        f"{path}: {len(rows)} points ({sizes}), {first['task']} {first['metric']}, init"
        f" {first['init']}, {first['pretrain_data']}, {VERSIONS[first['version']]}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
