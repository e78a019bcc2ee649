"""A package with entry points that is installed for the length of a test."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from lora_export.plugins import plugins


@contextlib.contextmanager
def installed(
    folder: Path, code: str, entry_points: Mapping[str, Mapping[str, str]], name: str = "tiny_plugin"
) -> Iterator[None]:
    """A distribution `name` 1.2 with one module of that name; entry_points: group → {entry point: object}.

    folder is made; it must not hold another distribution. `"module:object"` may be just `":object"`.
    """
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = [
        line
        for group, entries in entry_points.items()
        for line in (f"[{group}]", *(f"{k} = {name if v.startswith(':') else ''}{v}" for k, v in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        plugins.cache_clear()
        try:
            yield
        finally:
            sys.modules.pop(name, None)
            plugins.cache_clear()
