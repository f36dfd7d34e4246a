"""`harness`: entry point, and how a verb's answer becomes an exit code."""

from __future__ import annotations

import atexit
import difflib
import functools
import importlib
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any

import typer
import typer.core

from harness.cli import base, show
from harness.errors import EXIT_FAILED, EXIT_INTERRUPTED, HarnessError, storage_error

# Looking for plugins, pydantic reads a file of every installed package.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


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
        from importlib import metadata  # takes 0.03 s that no verb needs

        print(f"harness {metadata.version('vision-scaling-harness')}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


_VERBS: dict[str, str] = {
    "grid": "grid",
    "why": "why",
    "diff": "diff",
    "status": "status",
    "logs": "logs",
    "run": "run",
    "cancel": "steer",
    "resume": "steer",
    "retry": "steer",
    "gc": "gc",
    "tune": "tune",
    "report": "report",
    "fit": "fit",
}
"""Verb -> the module of `harness.cli` that has a function of its name, in the order of --help."""
_GROUPS: dict[str, dict[str, str]] = {
    "data": {
        "pack": "data",
        "sample": "data_sample",
        "labels": "data_checks",
        "overlap": "data_checks",
        "verify": "data_checks",
        "show": "data_checks",
    },
    "weights": {"inspect": "weights", "convert": "weights"},
}
"""The same of verbs that are two words; the group's help stands in a function of its own name."""


def command_line(verb: str | None = None) -> typer.Typer:
    """The parser of all verbs; of just one where it is known which, for the sake of its start.

    What a study is made of takes half a second to import, and `status` needs none of it.
    """
    app = typer.Typer(
        cls=_Guessing,
        name="harness",
        help="Scaling studies of vision pretraining: does MAE before weak supervision pay, and does"
        " it keep paying as model and data grow?",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_top)
    one = {verb} if verb in _VERBS or verb in _GROUPS else {*_VERBS, *_GROUPS}
    for name, module in _VERBS.items():
        if name in one:
            app.command(name)(_exiting(_function(module, name)))
    for group, verbs in _GROUPS.items():
        if group in one:
            inner = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
            inner.callback()(_function(group, group))
            for name, module in verbs.items():
                inner.command(name)(_exiting(_function(module, name)))
            app.add_typer(inner, name=group)
    return app


def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"harness.cli.{module}"), name)


def main() -> None:
    """Runs a verb.

    Exit codes: 0 ok, 1 something failed, 2 usage or config, 4 not found, 130 Ctrl-C. Workers, whose
    codes schedulers see, also have 74 (a file cannot be written) and 75 (asked to stop, run again).
    """
    try:
        command_line(sys.argv[1] if len(sys.argv) > 1 else None)()
    except SystemExit as end:
        if base.held and threading.active_count() == 1 and isinstance(end.code, int):
            _leave(end.code)
        raise


def _leave(code: int) -> None:
    """Ends the process without freeing what it holds."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
