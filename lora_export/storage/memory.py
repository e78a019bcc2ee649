"""The memory of this process."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_FROM_THE_HEAP = 32 * 2**20  # bytes: the largest block of which the C library can reuse the memory
_KEPT_FREE = 128 * 2**20  # bytes at the end of the heap that stay with the process


def reusing() -> None:
    """Let the C library use freed memory again, rather than have the system clear new pages for each activation of
    a forward. `freed` gives back what it then keeps."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _FROM_THE_HEAP)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_FREE)


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
