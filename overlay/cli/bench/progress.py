"""What is being measured now: a line that renews itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

#: A pipe gets a line about the step of a phase at most this often.
QUIET_SECONDS = 15.0


class Progress:
    """Of one run. Use it as a context manager; without a terminal it writes lines with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.console = console
        self._begin = time.monotonic()
        self._last_line = 0.0
        self._name = ""
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self.console.print(f"[{time.monotonic() - self._begin:5.0f} s] {text}", style=style, soft_wrap=True)

    def problem(self, text: str) -> None:
        """A line that stays and that nobody overlooks."""
        self.say(text, "bold red")

    def phase(self, name: str, steps: int) -> None:
        """A phase of so many steps begins."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._name = name
        self._task = self._bars.add_task(name, total=steps)
        if not self.console.is_terminal:
            self.say(name)
            self._last_line = time.monotonic()

    def step(self, text: str) -> None:
        """The next step of the phase begins: what it measures."""
        self._bars.update(self._task, description=f"{self._name}: {text}", advance=1)
        if not self.console.is_terminal and time.monotonic() - self._last_line > QUIET_SECONDS:
            self.say(f"{self._name}: {text}")
            self._last_line = time.monotonic()
