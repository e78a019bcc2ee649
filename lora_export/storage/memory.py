"""The memory of this process."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator


def freed() -> None:
    """Give back to the system what is not needed any more; what is still in use stays."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def importing(module: str) -> Iterator[None]:
    """No search for garbage while a large module is imported, nor later among what it made: torch alone leaves half
    a million objects, which last.

    It would take a quarter of the import, and a part of what comes after it.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
