"""What a person sees while things start: one line per step, with its time.

On a terminal the lines are live (a spinner until done); elsewhere each is printed once, when it is done.
"""

import time
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text


class _Seconds(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_time or task.elapsed or 0.0:6.1f} s", style="dim")


class Board:
    """begin() and done() in pairs; steps may overlap.  A context manager: leaving it freezes the lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._begun: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._live: Progress | None = None
        if console.is_terminal:
            self._live = Progress(
                SpinnerColumn(finished_text="[green]✓[/]"),
                TextColumn("{task.description}"),
                _Seconds(),
                TextColumn("[dim]{task.fields[detail]}[/]"),
                console=console,
            )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def begin(self, name: str, detail: str = "") -> None:
        """`detail` is shown on a terminal while the step lasts."""
        self._begun[name] = time.monotonic()
        if self._live:
            self._tasks[name] = self._live.add_task(f"{name:<10}", total=1, detail=detail)

    def done(self, name: str, detail: str = "") -> None:
        seconds = time.monotonic() - self._begun.pop(name)
        if self._live:
            self._live.update(self._tasks[name], completed=1, detail=detail)
        else:
            self.say(f"✓ {name:<10} {seconds:6.1f} s  {detail}".rstrip())

    def say(self, line: str) -> None:
        """A line of its own, above the live ones.  Printed as it is: no markup, no wrapping."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
