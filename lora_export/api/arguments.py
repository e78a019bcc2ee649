"""Types and defaults that the functions of the API share."""

from pathlib import Path

from lora_export.progress import Silent

SILENT = Silent()
Folder = str | Path  # of this machine, never a Hub ID; an output is created
File = str | Path


def as_path(path: Folder | File | None) -> Path | None:
    return None if path is None else Path(path)
