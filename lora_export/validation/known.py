"""What validations of one base have in common: computed once, kept in a folder, and read by the next one."""

from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 2**31  # of answers that are kept; what is beyond is computed anew each time


@dataclass
class KnownBase:
    """folder: a local one, made on first use, that outlives the process (`bases/KEY/reference` of a fleet).

    The object may be passed to one validation after another of a process, one at a time.
    """

    folder: Path
    most_bytes: int = MOST_BYTES

    def forget(self) -> None:
        """Free what is kept in memory; the folder stays."""
