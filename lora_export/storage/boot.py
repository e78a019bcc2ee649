"""Which kernel this is: processes that share one see the same locks and the same process numbers."""

from pathlib import Path

_PROC = Path("/proc")


def boot_id() -> str:
    """Of this start of the kernel, also seen from a container; "" where the system does not tell."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def process_numbers() -> str:
    """Of the processes that can see each other by number (a container has its own); "" where there is none."""
    try:
        return str((_PROC / "self/ns/pid").readlink())
    except OSError:
        return ""
