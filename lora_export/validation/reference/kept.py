"""One base that stays in memory between validations, under one adapter after another.

Its weights lie in a file that all workers of a machine map, so that the memory holds them once. An adapter is taken
off as PEFT takes it off, and the model is used again only where nothing is left of the adapter: the same modules,
parameters and buffers, no hook and no attribute more, and the same bytes. Else the base is loaded anew.
"""

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export.validation.prints import fingerprint

ALIGNED = 64  # bytes, as torch aligns its own memory: kernels add in another order where it is not
_DONTNEED = 4  # of madvise on Linux
Loaded = tuple[Any, Mapping[str, torch.Tensor]]


@dataclass
class KeptBase:
    """folder: for the file of weights, local; None to have them in memory; keeps: whether a model stays at all."""

    folder: Path | None = None
    keeps: bool = True
    _key: Hashable = None
    _loaded: Loaded | None = None
    _unmerged: Any = None  # PEFT's model around it
    _shape: Any = None  # of its modules
    _print: str = ""
    _weights: torch.Tensor | None = None

    def take(self, key: Hashable, load: Callable[[], Loaded]) -> Loaded:
        """(the plain model, what its files lack): the one that is here if it was loaded for the same key and is as
        it was then, else a new one."""
        if not self.keeps:
            return load()
        if self._loaded is None or key != self._key or not self._is_clean():
            self.forget()
            self._loaded, self._key = load(), key
            state = state_of(self._loaded[0])
            self._print = fingerprint(state)
            self._map(state)
            self._shape = _shape(self._loaded[0])
        return self._loaded

    def attached(self, unmerged: Any) -> None:
        """PEFT's model around the one that was taken."""
        self._unmerged = unmerged

    def rest(self, found: object) -> None:
        """Give back the memory of the weights, which are read from the file again when they are used. found: the
        fingerprint of the model under its adapter: what an adapter wrote over is in no file."""
        if self._weights is not None and found == self._print:
            at, size = self._weights.data_ptr(), self._weights.nbytes
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), _DONTNEED)

    def forget(self) -> None:
        """Free the memory."""
        self._key = self._loaded = self._unmerged = self._shape = self._weights = None

    def _is_clean(self) -> bool:
        """Take the adapter off, and look whether all is as it was."""
        assert self._loaded is not None
        model, unmerged, self._unmerged = self._loaded[0], self._unmerged, None
        if unmerged is not None:
            try:
                unmerged.base_model.unload()
            except Exception:  # a kind that PEFT cannot take off: whatever it raises
                return False
        return bool(_shape(model) == self._shape) and fingerprint(state_of(model)) == self._print

    def _map(self, state: Mapping[str, torch.Tensor]) -> None:
        """Let the parameters be views of a file's pages, which other processes share."""
        model = self._loaded[0] if self._loaded else None
        places, end = dict[int, tuple[nn.Parameter, int]](), 0
        for parameter in model.parameters() if model is not None else ():
            if parameter.dtype == torch.float32 and not parameter.is_meta and parameter.numel():
                places[id(parameter)] = parameter, end
                end += -(-parameter.numel() * 4 // ALIGNED) * ALIGNED
        if self.folder is None or not places:
            return
        try:
            file = _written(self.folder / f"{self._print}.bin", list(places.values()), end)
            weights = torch.from_file(str(file), shared=False, size=end // 4, dtype=torch.float32)
        except (OSError, RuntimeError):  # no room, or no such mapping: the model stays in its own memory
            return
        for parameter, start in places.values():
            values = weights[start // 4 : start // 4 + parameter.numel()].view(parameter.shape)
            if not torch.equal(values.view(torch.int32), parameter.data.contiguous().view(torch.int32)):
                file.unlink(missing_ok=True)  # damaged, or of other sizes
                return
            parameter.data = values
        self._weights = weights


def _written(file: Path, places: list[tuple[nn.Parameter, int]], size: int) -> Path:
    if not file.is_file() or file.stat().st_size != size:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as opened:
                opened.truncate(size)
                for parameter, start in places:
                    opened.seek(start)
                    opened.write(parameter.detach().contiguous().numpy().data)
            Path(name).replace(file)
        finally:
            Path(name).unlink(missing_ok=True)
    return file


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name → parameter or buffer, each under every name that it has, without what PEFT puts around them."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {n.replace(".base_layer", "").replace(".original_module", ""): value for n, value in named}


def _shape(model: nn.Module) -> Any:
    """All of a model but its numbers: modules, their attributes and hooks, parameters and buffers by identity."""
    return [
        (name, id(module), type(module), sorted(vars(module)), list(_tensors(module)), list(_hooks(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def _tensors(module: nn.Module) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    for named in (module._parameters, module._buffers):
        yield from ((name, id(value), tuple(value.shape)) for name, value in named.items() if value is not None)


def _hooks(module: nn.Module) -> Iterator[tuple[str, list[int]]]:
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            yield name, sorted(map(id, value.values()))
