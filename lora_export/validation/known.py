"""What validations of one base have in common: computed once, kept in a folder, and read by the next one.

An answer is found by a digest of all that it depends on: the bytes of the base in memory, the token ids or other
inputs, the bytes of a graph, the arithmetic, the libraries, the processor and the number of threads. Another digest
is another answer, so that nothing is used where it does not belong. Numbers are stored as they are, in fp32, and
hashed before they are read.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from lora_export.contracts import Progress
from lora_export.errors import InputError
from lora_export.storage.sealed import hashed_once, sha256
from lora_export.validation import values as plain_values
from lora_export.validation.comparing import sentence
from lora_export.validation.prints import digest, fingerprint
from lora_export.validation.reference.kept import KeptBase, state_of

MOST_BYTES = 2**31  # of answers that are kept; what is beyond is computed anew each time
_LIBRARIES = ("torch", "transformers", "peft", "onnxruntime", "numpy", "lora_export")
_VALUE = "value.json"
Value = TypeVar("Value")


@dataclass
class KnownBase:
    """folder: a local one, made on first use, that outlives the process (`bases/KEY/reference` of a fleet);
    most_bytes: how much of it may be filled; weights: a folder of this machine for a file with the base's weights
    in fp32, which its processes share (None: each has its own); stays: whether the model stays in memory for the
    next validation of this process.

    The object may be passed to one validation after another of a process, one at a time.
    """

    folder: Path
    most_bytes: int = MOST_BYTES
    weights: Path | None = None
    stays: bool = True
    told: dict[str, tuple[str, bool]] = field(default_factory=dict)  # what → digest, and whether it was known
    _sound: dict[Path, tuple[int, int]] = field(default_factory=dict)  # files whose hash was checked → size, time

    def __post_init__(self) -> None:
        self.base = KeptBase(self.weights, self.stays)

    def forget(self) -> None:
        """Free what is kept in memory; the folders stay."""
        self._sound.clear()
        self.base.forget()


class Shelf(Sequence[torch.Tensor]):
    """Tensors in files of a folder, each mapped when it is asked for: only what is read of it comes into memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return Shelf(self._files[at])
        return torch.from_numpy(np.load(self._files[at], mmap_mode="c"))


@dataclass
class Answers:
    """What a validation computes of the base alone. known: where it is kept, None to keep it for this validation
    only; depends: what every answer depends on; scratch: a folder of this validation."""

    scratch: Path
    progress: Progress
    known: KnownBase | None = None
    depends: Mapping[str, object] = field(default_factory=dict)
    trusted: bool = True
    taken: list[str] = field(default_factory=list)  # what was found, in words
    _count: int = 0
    _mark: str = field(default_factory=lambda: f".{os.getpid()}-{secrets.token_hex(4)}-")

    def shelf(self, tensors: Iterable[torch.Tensor]) -> Shelf:
        """Tensors of this validation, one after another into files, so that memory does not hold them."""
        self._count += 1
        folder = self.scratch / f"tensors-{self._count}"
        return Shelf(_written(tensors, folder))

    def take(self, what: str, inputs: Mapping[str, object], compute: Callable[[], Value]) -> Value:
        """The answer to `what` on these inputs, which is computed if nobody knows it.

        Of lists of tensors, those at the top and below one name are read when they are asked for. inputs: numbers,
        texts, tensors, and what is made of them.
        """
        known = self.known
        if known is None or not self.trusted:
            value: Value = self._put(compute(), Path(tempfile.mkdtemp(dir=self.scratch)))[1]
            return value
        place = known.folder / digest({"what": what, "inputs": inputs, **self.depends})
        if place.is_dir():
            with contextlib.suppress(InputError):
                value = self._read(place, known)
                self.taken.append(what)
                known.told[what] = place.name, True
                return value
            self.progress.warn(f"{place} is damaged, so it is computed again")
            shutil.rmtree(place, ignore_errors=True)
        known.told[what] = place.name, False
        made = self._folder(known)
        try:
            document, value = self._put(compute(), made)
            _state(made, document)
        except OSError:  # no room there; what is not kept is computed all the same
            shutil.rmtree(made, ignore_errors=True)
            made = Path(tempfile.mkdtemp(dir=self.scratch))
            value = self._put(compute(), made)[1]
        if made.parent == known.folder and _bytes_below(known.folder) <= known.most_bytes:
            with contextlib.suppress(OSError):  # another worker was faster, and its answer is the same
                made.rename(place)
                known._sound |= {file: _seen(file) for file in place.glob("*.npy")}
                value = self._read(place, known)
        return value

    def distrust(self) -> None:
        """Take nothing more: what is known is not what this base answers here."""
        self.trusted = False

    def rest(self) -> None:
        """The base is not used for a while: its memory is of use elsewhere."""
        if self.known is not None:
            self.known.base.rest(self.depends.get("numbers"))

    def end(self) -> None:
        """Delete what was made in the known folder and found no room there."""
        self.rest()
        if self.known is not None and self.known.folder.is_dir():
            for folder in self.known.folder.glob(f"{self._mark}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, known: KnownBase) -> Path:
        """A new one where answers are kept; in the scratch where nothing can be written there."""
        try:
            known.folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=self._mark, dir=known.folder))
        except OSError:
            return Path(tempfile.mkdtemp(dir=self.scratch))

    def _put(self, value: Any, folder: Path) -> tuple[Any, Any]:
        """(the value as a document, the value itself with its tensors in the folder)."""
        files: list[Path] = []

        def put(tensor: torch.Tensor) -> int:
            files.extend(_written([tensor], folder, len(files)))
            return len(files) - 1

        document = plain_values.packed(value, put)
        return document, plain_values.unpacked(document, files.__getitem__, Shelf)

    def _read(self, place: Path, known: KnownBase) -> Any:
        try:
            stated = json.loads((place / _VALUE).read_text(encoding="utf-8"))
            files = [place / name for name in stated["files"]]
            for file in files:
                if known._sound.get(file) != (seen := _seen(file)):
                    if sha256(file) != stated["files"][file.name]:
                        raise InputError("the answers were changed", where=file)
                    known._sound[file] = seen
            return plain_values.unpacked(stated["value"], files.__getitem__, Shelf)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError("the answers are damaged", where=place) from error


def _seen(file: Path) -> tuple[int, int]:
    now = file.stat()
    return now.st_size, now.st_mtime_ns


def _state(folder: Path, document: Any) -> None:
    """Write down what an answer is, and the hashes of its tensors."""
    files = {f.name: sha256(f) for f in sorted(folder.iterdir(), key=lambda f: int(f.stem))}
    (folder / _VALUE).write_text(json.dumps({"value": document, "files": files}), encoding="utf-8")


def materialized(value: Any) -> Any:
    """With lists in the place of what makes its parts one after another."""
    if isinstance(value, Iterator):
        return list(value)
    return {name: materialized(part) for name, part in value.items()} if isinstance(value, dict) else value


def _written(tensors: Iterable[torch.Tensor], folder: Path, first: int = 0) -> list[Path]:
    folder.mkdir(exist_ok=True)
    files = []
    for at, tensor in enumerate(tensors, first):
        files.append(folder / f"{at}.npy")
        np.save(files[-1], tensor.numpy())
    return files


def _bytes_below(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def of_model(body: Any, plain: Collection[str]) -> dict[str, object]:
    """What the answers of a model depend on besides their inputs: its class, configuration and numbers, and `here`.

    body: a transformers model, in which PEFT's layers may be; plain: the names of what is the model's own without
    them.
    """
    own, config, state = set(plain), body.config, state_of(body)
    head = sentence.head_of(body)
    return {
        "class": f"{type(body).__module__}.{type(body).__qualname__}",
        "config": {name: value for name, value in config.to_dict().items() if name != "_name_or_path"},
        "attention": str(getattr(config, "_attn_implementation", None)),
        "numbers": fingerprint({name: value for name, value in state.items() if name in own}),
        "sentence": None
        if head is None
        else (head.modules, {p: dict(m.state_dict()) for p, m in head.layers.items()}),
        **here(),
    }


def files_digest(folder: Path) -> str:
    """SHA-256 of the names and bytes of a folder's files."""
    whole = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        whole.update(f"{file.relative_to(folder)} {hashed_once(file).sha256};".encode())
    return whole.hexdigest()


@functools.cache
def _processor() -> str:
    """What kernels are chosen by: the model of the processor and its instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
        return digest(sorted(told))
    return f"{platform.machine()} {platform.processor()}"


def here() -> dict[str, object]:
    """What the bits of a forward depend on besides the model and its inputs."""
    return {
        "libraries": {name: import_module(name).__version__ for name in _LIBRARIES},
        "processor": _processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
