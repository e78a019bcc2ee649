"""The memory of this process."""

import contextlib
import ctypes
import gc


def freed() -> None:
    """Give back to the system what is not needed any more; what is still in use stays."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)
