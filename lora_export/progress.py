"""Progress on stderr: a live bar on a terminal, plain lines elsewhere, nothing when asked to be quiet."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from types import TracebackType
from typing import TYPE_CHECKING

from lora_export.escape import shown

if TYPE_CHECKING:
    from rich.console import RenderableType as RichRenderable
    from rich.live import Live as RichLive
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from lora_export.contracts import Progress


class Silent:
    """Says nothing: for the Python API and for tests."""

    def stage(self, title: str) -> None: ...

    def detail(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def advance(self, done: int, total: int) -> None: ...


class Turns:
    """One progress for two threads, a call at a time. beside: for the second thread, whose calls raise
    CancelledError after `stop`."""

    def __init__(self, to: "Progress") -> None:
        self.to, self.turn, self.stopped = to, threading.Lock(), False
        self.beside = Meanwhile(self)

    def stop(self) -> None:
        self.stopped = True

    def stage(self, title: str) -> None:
        with self.turn:
            self.to.stage(title)

    def detail(self, text: str) -> None:
        with self.turn:
            self.to.detail(text)

    def warn(self, text: str) -> None:
        with self.turn:
            self.to.warn(text)

    def advance(self, done: int, total: int) -> None:
        with self.turn:
            self.to.advance(done, total)


class Meanwhile:
    """What the second thread of `Turns` says. The bar belongs to the first one."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def stage(self, title: str) -> None:
        with self._turn() as to:
            if isinstance(to, Console):
                to.beside(title)
            else:
                to.stage(title)

    def detail(self, text: str) -> None:
        with self._turn() as to:
            to.detail(f"meanwhile: {text}")

    def warn(self, text: str) -> None:
        with self._turn() as to:
            to.warn(text)

    def advance(self, done: int, total: int) -> None:
        with self._turn():
            pass

    def over(self) -> None:
        """The stage is over."""
        if isinstance(self._turns.to, Console):
            with self._turns.turn:
                self._turns.to.beside("")

    @contextlib.contextmanager
    def _turn(self) -> "Iterator[Progress]":
        if self._turns.stopped:
            raise CancelledError
        with self._turns.turn:
            yield self._turns.to


class Console:
    """Talks to a person. verbosity: -1 warnings only, 0 stages, 1 details as well."""

    def __init__(self, verbosity: int = 0) -> None:
        self.verbosity = verbosity
        self._live = sys.stderr.isatty() and verbosity >= 0
        self._bar: RichProgress | None = None
        self._live_table: RichLive | None = None
        self._task: TaskID | None = None
        self._titles = ["", ""]  # of the stage, and of the one beside it

    def __enter__(self) -> "Console":
        if self._live:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
            self._bar = Bars(*columns, console=RichConsole(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @contextlib.contextmanager
    def showing(self, table: "RichRenderable") -> Iterator[None]:
        """Show something that changes below what is said, in place of the bar; nothing where there is no bar."""
        if self._bar is None:
            yield
            return
        from rich.live import Live

        self._table: RichRenderable = table
        bar, self._bar = self._bar, None
        if self._task is not None:
            bar.remove_task(self._task)  # its stage is over
            self._task = None
        bar.stop()
        try:
            with Live(
                console=bar.console, get_renderable=lambda: self._table, refresh_per_second=2, transient=True
            ) as live:
                self._live_table = live
                yield
        finally:
            self._live_table = None
            self._bar = bar
            bar.start()

    def _say(self, text: str) -> None:
        text = shown(text)
        shown_by = self._bar or self._live_table
        if shown_by is not None:
            shown_by.console.print(text, markup=False, highlight=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def stage(self, title: str) -> None:
        if self.verbosity >= 0:
            self._say(f"• {title}")
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._titles[0] = shown(title)
            self._task = self._bar.add_task(self._described, total=None)

    def beside(self, title: str) -> None:
        """A stage that runs beside the other one, whose bar names both; "" when it is over."""
        if title and self.verbosity >= 0:
            self._say(f"• meanwhile: {title}")
        self._titles[1] = shown(title)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=self._described)

    @property
    def _described(self) -> str:
        return ", meanwhile ".join(filter(None, self._titles))

    def detail(self, text: str) -> None:
        if self.verbosity >= 1:
            self._say(f"    {text}")

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def advance(self, done: int, total: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
