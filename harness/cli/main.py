"""`harness`: entry point, and what every verb shares."""

from __future__ import annotations

import sys
from typing import NoReturn

import click
import typer

from harness.cli import data, grid, logs, report, run, status
from harness.errors import EXIT_FAILED, HarnessError, UserError

app = typer.Typer(
    name="harness",
    help="Scaling studies of vision pretraining: does MAE before weak supervision pay, and does it"
    " keep paying as model and data grow?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("grid")(grid.grid)
app.command("status")(status.status)
app.command("logs")(logs.logs)
app.command("run")(run.run)
app.command("report")(report.report)
app.add_typer(data.app, name="data")


def main() -> NoReturn:
    """Runs a verb; a user's mistake is one line per problem on stderr and exit code 2 or 4."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(error.exit_code)
    except HarnessError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # `harness status | head`: the reader has what it wanted.
        sys.stderr.close()
        sys.exit(EXIT_FAILED)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
