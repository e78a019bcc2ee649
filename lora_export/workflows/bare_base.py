"""A base in whose folder an adapter lies, too: other programs would load both without a word."""

import os
from pathlib import Path

from lora_export.folder_files import is_adapters
from lora_export.storage import sealed


def without_adapter(base: Path, work: Path) -> Path:
    """The folder itself, or where an adapter lies in it, one in `work` with everything but the adapter.

    Its files are the same ones by hard links, or copies where `work` is on another disk.
    """
    if not (base / "adapter_config.json").is_file() or not (base / "config.json").is_file():
        return base
    bare = work / "base-alone" / base.resolve().name
    for path in sorted(p for p in (*base.glob("*"), *base.glob("*/*")) if p.is_file()):
        if not is_adapters(path.name):
            link(path, base, bare)
    return bare


def link(path: Path, folder: Path, target: Path) -> None:
    """Put a file of `folder` at the same place in `target`, as the same file if that can be, else as a copy."""
    sealed.refuse_outward_link(path, folder)
    place = target / path.relative_to(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), place)
    except OSError:
        sealed.copy(path, place, folder)
