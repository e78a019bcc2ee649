"""Ctrl-C, SIGTERM and SIGHUP, deferred while something is done that must not stop halfway."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Inside it, signals wait; inside `welcome` the first one acts at once, and later ones wait for the end.

    A signal that waited is raised again on leaving, unless an error is being raised already. Only the main thread
    can handle signals: in another thread, and for a signal without a Python handler, nothing changes.
    """

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._waiting: list[int] = []
        self._welcome = False

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._before[number] = handler
                    signal.signal(number, self._arrived)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._waiting and error is None:
            signal.raise_signal(self._waiting[0])

    @contextlib.contextmanager
    def welcome(self) -> Iterator[None]:
        """Inside, a signal can leave nothing half done."""
        self._welcome = True
        if self._waiting:
            self._arrived(self._waiting.pop(0), None)
        try:
            yield
        finally:
            self._welcome = False

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if not self._welcome:
            self._waiting.append(number)
            return
        self._welcome = False  # a second signal must not disturb the clean-up after what this one raises
        self._before[number](number, frame)
        self._welcome = True
