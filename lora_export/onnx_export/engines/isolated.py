"""Runs engines in a separate process: its memory is freed, its output goes to a log, and its crashes stay there."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import ExportError

LAST_LINES = 12
_KEPT = frozenset({"PATH", "HOME", "USER", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LANG", "VIRTUAL_ENV"})
_KEPT_PREFIXES = ("LC_", "LD_LIBRARY", "DYLD_", "CUDA", "NVIDIA", "OMP_", "MKL_", "KMP_")


def run(module: str, request: Mapping[str, Any], *, engine: str) -> None:
    """Run `python -m module` with `request` as JSON on stdin; ExportError with its last lines if it fails.

    The child runs in an empty folder, offline, and without the tokens and proxies of this environment.
    """
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        log = Path(scratch, "log.txt")
        with log.open("wb") as sink:
            done = subprocess.run(
                [sys.executable, "-m", module],
                input=json.dumps({**request, "cache": str(Path(scratch, "cache"))}).encode(),
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=scratch,
                env=_environment(scratch),
                check=False,
            )
        if done.returncode:
            raise ExportError(
                f"the engine {engine} failed (status {done.returncode}); its last lines were:\n{_tail(log)}",
                where=request.get("model"),
                next_step="lora-export env shows the versions; another --precision may be possible",
            )


def _environment(scratch: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    package_root = str(Path(__file__).resolve().parents[3])
    return kept | {
        "PYTHONPATH": package_root,
        "PYTHONIOENCODING": "utf-8",
        "HF_HOME": str(Path(scratch, "hf")),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }


def _tail(log: Path) -> str:
    """The end of a log without the frames of a traceback, which do not help a user."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    messages = [line for line in lines if not line.startswith((" ", "Traceback"))]
    return "\n".join(f"    {line[:300]}" for line in messages[-LAST_LINES:])
