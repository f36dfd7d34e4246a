"""`harness fit`: a scaling law to any CSV file of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from harness.errors import EXIT_OK

Law = Literal[
    "power",
    "power_irreducible",
    "shifted",
    "m4",
    "broken",
    "chinchilla",
    "tied",
    "kaplan",
    "envelope",
    "isoflop",
]


def _column(text: str) -> Any:
    return typer.Option(metavar="COL", help=text, show_default=False)


def fit(
    file: Annotated[Path, typer.Argument(metavar="FILE.csv", help="CSV file with a header.")],
    law: Annotated[Law, typer.Option(help="Which law; see below.")],
    n: Annotated[str | None, _column("Parameters of the model.")] = None,
    d: Annotated[str | None, _column("Samples or tokens, the data axis.")] = None,
    c: Annotated[str | None, _column("FLOPs, for envelope and isoflop; default 6 N D.")] = None,
    loss: Annotated[str | None, _column("What falls, for laws over N and D.")] = None,
    x: Annotated[str | None, _column("Input of a law over one axis.")] = None,
    y: Annotated[str | None, _column("What falls, for laws over one axis.")] = None,
    run: Annotated[
        str | None, _column("Run of each row: rows of a run are resampled together.")
    ] = None,
    train: Annotated[
        str | None, _column("One axis: rows with 0 here are held out and predicted.")
    ] = None,
    schedule: Annotated[
        str | None,
        _column(
            "Schedule of each row; several kinds are not pooled. Default: a column of that name,"
            " `none` for none."
        ),
    ] = None,
    drop_highest: Annotated[
        int, typer.Option(help="Leave out so many rows with the highest loss.")
    ] = 0,
    delta: Annotated[float, typer.Option(help="Of the Huber loss of ln y.")] = 1e-3,
    bootstrap: Annotated[int, typer.Option(help="Draws for intervals; 0 for none.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    chance: Annotated[
        float | None, typer.Option(help="m4: e0, the error at chance level.", show_default=False)
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare all forms by what they predict.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("fit.json"),
) -> int:
    """Fit a scaling law to a CSV file: parameters, intervals, held-out error, or why not.

    Laws over one axis (--x, --y):

      power              y = a * x**-b

      power_irreducible  y = a * x**-b + c

      shifted            y = a * (x + d)**-b + c

      m4                 (y - c) / (e0 - y)**g = a * x**-b

      broken             y = c + a * x**-b * (1 + (x / d)**(1 / f))**(-g * f)

    Laws over two axes (--n, --d, --loss):

      chinchilla         L = E + A / N**alpha + B / D**beta

      tied               L = E + A / N**alpha + B / D**alpha

      kaplan             L = ((Nc / N)**(alpha_N / alpha_D) + Dc / D)**alpha_D

    Compute-optimal models from curves (--n, --loss, --d or --c):

      envelope, isoflop  N* = G * C**a, D* = H * C**b

    Fits minimise the sum of Huber losses of ln y. A law that the rows cannot identify is refused,
    with the reason and no number; that ends with exit code 0, as an answer.

    Example:

      harness fit runs.csv --law chinchilla --n N --d D --loss loss
    """
    # pandas is slow to import; the other verbs must not wait for it
    from analysis.fit_file import Question, answer, write

    question = Question(
        law=law,
        n=n,
        d=d,
        c=c,
        x=x,
        y=_observed(law, loss, y),
        run=run,
        train=train,
        schedule=schedule,
        drop_highest=drop_highest,
        delta=delta,
        bootstrap=bootstrap,
        seed=seed,
        chance=chance,
        compare=compare,
    )
    found = answer(file, question)
    write(out, found)
    print("\n".join(_lines(found)))
    print(f"fit: {out}")
    return EXIT_OK


def _observed(law: str, loss: str | None, y: str | None) -> str | None:
    """--loss and --y name the same thing; the one that fits the law goes first."""
    is_one_axis = law in ("power", "power_irreducible", "shifted", "m4", "broken")
    return (y or loss) if is_one_axis else (loss or y)


def _lines(found: Mapping[str, Any]) -> list[str]:
    out = [f"{found['law']}: {found['status'].replace('_', ' ')}"]
    if found.get("formula"):
        out[0] += f"; {found['formula']}"
    if found.get("reason"):
        out.append(f"  {found['reason']}")
    for name, value in found["params"].items():
        interval = found["ci95"].get(name)
        band = "" if interval is None else f"  [{interval[0]:.5g}, {interval[1]:.5g}]"
        out.append(f"  {name:<8} {value:.6g}{band}")
    rows = f"  rows: {found['rows_used']} used, {len(found['rows_dropped'])} dropped"
    counts = found.get("bootstrap") or {}
    if counts.get("draws"):
        rows += (
            f"; intervals: {counts['used']} draws over {counts.get('units', '')} {counts['unit']}"
        )
    out.append(rows)
    if found.get("objective") is not None and "starts" in found:
        out.append(
            f"  objective {found['objective']:.6g} (sum of Huber losses, delta {found['delta']:g});"
            f" {found['starts_at_best']} of {found['starts']} starts agree;"
            f" condition number {found.get('condition_number') or math.nan:.3g}"
        )
    out += _held_out_lines(found.get("heldout"))
    for row in found.get("forms", ()):
        error = f"{row['log_rmse']:.4g}" if "log_rmse" in row else f"refused: {row['reason']}"
        out.append(f"  {row['law']:<18} {row['parameters']} parameters  held-out log RMSE {error}")
    return out + [f"  warning: {text}" for text in found["warnings"]]


def _held_out_lines(held: Mapping[str, Any] | None) -> list[str]:
    if not held:
        return []
    if "log_rmse" not in held:
        return [f"  held out: {held['reason']}"]
    last, line = (held["baselines_log_rmse"][k] for k in ("last_value", "log_log_line"))
    return [
        f"  held out: {held['rows_held_out']} rows, {held['input']} up to"
        f" {held['extrapolation_factor']:.3g} times what was fitted: {held['relative_error']:+.2%},"
        f" log RMSE {held['log_rmse']:.4g} (last value {last:.4g}, log-log line {line:.4g})"
    ]
