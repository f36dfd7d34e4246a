"""`harness`: entry point, and how a verb's answer becomes an exit code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from harness.cli import (
    data,
    data_checks,
    data_sample,
    fit,
    grid,
    logs,
    report,
    run,
    shared,
    status,
    steer,
    tune,
    weights,
)
from harness.errors import EXIT_FAILED, HarnessError, storage_error

app = typer.Typer(
    name="harness",
    help="Scaling studies of vision pretraining: does MAE before weak supervision pay, and does it"
    " keep paying as model and data grow?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _exiting(verb: Callable[..., int]) -> Callable[..., None]:
    """A verb that ends the process with the code it returns, a user's mistake in one line each."""

    @functools.wraps(verb)
    def run_verb(*args: Any, **kwargs: Any) -> None:
        try:
            code = verb(*args, **kwargs)
            sys.stdout.flush()
        except HarnessError as error:
            print(shared.printable(str(error)), file=sys.stderr)
            code = error.exit_code
        except BrokenPipeError:
            # `harness status | head`: the reader has what it wanted. Nothing more can be said.
            sys.stdout = sys.stderr = None  # type: ignore[assignment]
            code = EXIT_FAILED
        except OSError as error:
            known = storage_error(error)
            if known is None:
                raise
            print(shared.printable(str(known)), file=sys.stderr)
            code = known.exit_code
        raise typer.Exit(code)

    return run_verb


app.command("grid")(_exiting(grid.grid))
app.command("status")(_exiting(status.status))
app.command("logs")(_exiting(logs.logs))
app.command("run")(_exiting(run.run))
app.command("cancel")(_exiting(steer.cancel))
app.command("resume")(_exiting(steer.resume))
app.command("retry")(_exiting(steer.retry))
app.command("tune")(_exiting(tune.tune))
app.command("report")(_exiting(report.report))
app.command("fit")(_exiting(fit.fit))

data_app = typer.Typer(
    help="Pack, label, check and look at datasets.", no_args_is_help=True, rich_markup_mode=None
)
data_app.callback()(data.data)
data_app.command("pack")(_exiting(data.pack))
data_app.command("sample")(_exiting(data_sample.sample))
data_app.command("labels")(_exiting(data_checks.labels))
data_app.command("overlap")(_exiting(data_checks.overlap))
data_app.command("verify")(_exiting(data_checks.verify))
data_app.command("show")(_exiting(data_checks.show))
app.add_typer(data_app, name="data")

weights_app = typer.Typer(
    help="Look into weight files, convert them.", no_args_is_help=True, rich_markup_mode=None
)
weights_app.callback()(weights.weights)
weights_app.command("inspect")(_exiting(weights.inspect))
weights_app.command("convert")(_exiting(weights.convert))
app.add_typer(weights_app, name="weights")


def main() -> None:
    """Runs a verb. Exit codes: 0 ok, 1 something failed, 2 usage or config, 4 not found."""
    app()


if __name__ == "__main__":
    main()
