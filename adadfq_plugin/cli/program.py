"""How the command ends: one line for each error, and an exit code that says what kind it was."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from adadfq_plugin.errors import AdaDFQError

__all__ = ["EXIT_CODES", "Program"]

INTERRUPTED = 130
EXIT_CODES = """\b
Exit codes:
  0    done
  1    any other failure
  2    an option, setting, preset or name that can't be used
  3    a network that can't be quantized
  4    weights, images or a synthetic set that can't be read
  5    an output that can't be written
  6    a plugin that can't be loaded
  130  interrupted; nothing half-written is left"""


class Program(click.Group):
    """A group of commands that turns whatever happens into a word on stderr and an exit code."""

    def main(  # type: ignore[override]  # click's standalone_mode=False returns; this never does
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Runs one command and ends the process with its exit code.

        Args:
            args: the words after the program's name; unset: those of this process.
            prog_name: the program's name in messages.
            extra: as click takes it.
        """
        words = list(sys.argv[1:] if args is None else args) or ["--help"]
        extra["standalone_mode"] = False
        debug = "--debug" in words
        with warnings.catch_warnings():
            warnings.showwarning = _shown(everything=debug)
            try:
                code = super().main(words, prog_name or "adadfq", **extra)
            except (click.Abort, KeyboardInterrupt):
                code = _say("interrupted; nothing half-written is left", INTERRUPTED)
            except click.ClickException as error:
                code = _say(f"error: {error.format_message()}{_hint(error)}", error.exit_code)
            except AdaDFQError as error:
                code = _say(f"error: {error}", error.exit_code, debug)
            except Exception as error:  # the last door: a user sees a sentence, --debug shows the rest
                said = f"error: {type(error).__name__}: {error}"
                code = _say(said if debug else f"{said} (--debug shows where)", AdaDFQError.exit_code, debug)
        sys.exit(code if isinstance(code, int) else 0)


def _say(text: str, code: int, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"adadfq: {' '.join(text.split())}", err=True)
    return code


def _hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if isinstance(context, click.Context) else ""


def _shown(everything: bool) -> Callable[..., None]:
    def show(message: Warning | str, category: type[Warning], filename: str, *_place: object) -> None:
        # What the toolkits warn of concerns whoever calls them, and here that isn't the user.
        if everything or Path(__file__).parents[1] in Path(filename).parents:
            click.echo(f"adadfq: warning: {' '.join(str(message).split())}", err=True)

    return show
