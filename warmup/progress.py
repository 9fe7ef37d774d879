"""The warmup as people see it: one bar on a terminal, one line a phase elsewhere (floor 6)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from toka.warmup.report import WarmupReport


class WarmupProgress:
    """Times phases into a report and shows them. Use as a context manager around the whole warmup.

    quiet: show nothing (for the library's use in process); the report is filled all the same.
    """

    def __init__(self, report: WarmupReport, *, quiet: bool = False):
        self._report = report
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> WarmupProgress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    @contextlib.contextmanager
    def phase(self, name: str, num_parts: int = 1) -> Iterator[None]:
        """Time and show one phase; `advance` counts its parts."""
        self._task = self._bar.add_task(name, total=num_parts, detail="")
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._report.phases_s[name] = self._report.phases_s.get(name, 0.0) + seconds
        self._bar.remove_task(self._task)
        self._console.print(f"[dim]{name:<12}{seconds:6.1f} s[/dim]", highlight=False)

    def detail(self, text: str) -> None:
        """Name the part that begins now."""
        if self._task is not None:
            self._bar.update(self._task, detail=text)

    def start_part(self, text: str) -> None:
        """Name the part that begins now and count the one before it as done."""
        if self._task is not None:
            self._bar.update(self._task, detail=text, advance=1 if self._bar.tasks[-1].fields["detail"] else 0)

    def advance(self) -> None:
        """One part of the phase is done."""
        if self._task is not None:
            self._bar.advance(self._task)
