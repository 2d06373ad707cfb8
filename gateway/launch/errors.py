"""What a person is told when something cannot go on: one sentence, and where to look."""

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup


class LaunchError(Exception):
    """One sentence somebody can act on; `log` names a file that knows more, `tail` its last lines."""

    code = 1

    def __init__(self, sentence: str, log: Path | None = None, tail: str = "") -> None:
        super().__init__(sentence)
        self.log = log
        self.tail = tail


class UsageError(LaunchError):
    """The command line itself is what must change."""

    code = 2


class Commands(TyperGroup):
    """A LaunchError out of any command becomes its sentence and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LaunchError as exc:
            _print(exc)
            raise typer.Exit(exc.code) from None


def _print(error: LaunchError) -> None:
    """The last lines of the log first, the sentence last: that is where eyes rest."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if error.tail:
        console.print(error.tail, style="dim", markup=False)
    if error.log:
        console.print(f"log: {error.log}", markup=False)
    console.print(f"cairn: {error}", style="bold red", markup=False)
