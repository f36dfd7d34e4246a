"""`harness`: entry point, and how a verb's answer becomes an exit code."""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import typer
import typer.core

from harness.cli import (
    data,
    data_checks,
    data_sample,
    fit,
    gc,
    grid,
    logs,
    report,
    run,
    show,
    status,
    steer,
    tune,
    weights,
)
from harness.errors import EXIT_FAILED, EXIT_INTERRUPTED, HarnessError, storage_error


class _Guessing(typer.core.TyperGroup):
    """Says which of the words of a closed set was probably meant."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            found, _, words = error.message.partition(" is not one of ")
            known = re.findall(r"'([^']*)'", words)
            near = difflib.get_close_matches("".join(re.findall(r"'([^']*)'", found)), known, n=1)
            if near:
                error.message += f" Did you mean '{near[0]}'?"
            raise


app = typer.Typer(
    cls=_Guessing,
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
            print(show.printable(str(error)), file=sys.stderr)
            code = error.exit_code
        except BrokenPipeError:
            # `harness status | head`: the reader has what it wanted. Nothing more can be said.
            sys.stdout = sys.stderr = None  # type: ignore[assignment]
            code = EXIT_FAILED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = EXIT_INTERRUPTED
        except OSError as error:
            known = storage_error(error)
            if known is None:
                raise
            print(show.printable(str(known)), file=sys.stderr)
            code = known.exit_code
        raise typer.Exit(code)

    return run_verb


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"harness {metadata.version('vision-scaling-harness')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


app.command("grid")(_exiting(grid.grid))
app.command("status")(_exiting(status.status))
app.command("logs")(_exiting(logs.logs))
app.command("run")(_exiting(run.run))
app.command("cancel")(_exiting(steer.cancel))
app.command("resume")(_exiting(steer.resume))
app.command("retry")(_exiting(steer.retry))
app.command("gc")(_exiting(gc.gc))
app.command("tune")(_exiting(tune.tune))
app.command("report")(_exiting(report.report))
app.command("fit")(_exiting(fit.fit))

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
data_app.callback()(data.data)
data_app.command("pack")(_exiting(data.pack))
data_app.command("sample")(_exiting(data_sample.sample))
data_app.command("labels")(_exiting(data_checks.labels))
data_app.command("overlap")(_exiting(data_checks.overlap))
data_app.command("verify")(_exiting(data_checks.verify))
data_app.command("show")(_exiting(data_checks.show))
app.add_typer(data_app, name="data")

weights_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
weights_app.callback()(weights.weights)
weights_app.command("inspect")(_exiting(weights.inspect))
weights_app.command("convert")(_exiting(weights.convert))
app.add_typer(weights_app, name="weights")


def main() -> None:
    """Runs a verb.

    Exit codes: 0 ok, 1 something failed, 2 usage or config, 4 not found, 130 Ctrl-C. Workers, whose
    codes schedulers see, also have 74 (a file cannot be written) and 75 (asked to stop, run again).
    """
    app()


if __name__ == "__main__":
    main()
