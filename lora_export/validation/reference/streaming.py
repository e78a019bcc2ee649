"""Models larger than memory: their weights stay in the files and are in memory while a layer works with them.

transformers itself says where each weight lies (its placement on "disk"), because it renames and fuses tensors
while it loads. Each of those weights becomes a `Slot` behind a parameter without storage, which reads as NaN: a use
of a weight that is not there shows. PEFT wraps such a model as any other; its own matrices stay in memory.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import nn
from transformers import modeling_utils

from lora_export.errors import AdapterError
from lora_export.validation.reference.files import headers
from lora_export.validation.reference.mended import DECOMPOSING, kind_of

Change = Callable[[str, torch.Tensor], torch.Tensor]
BLOCK = 16 * 2**20  # bytes in fp32
COPIES = 3  # unmerged, merged, and the adapted weights once more while the noise floor changes them
WORKING = 3  # of the largest weight while it is compared: as it is stored, in fp32, and a block of rows
# These inits take something out of the base's weights when an adapter is attached, so they must be in memory.
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def kept_bytes(merged: Path, max_memory: int | None) -> int | None:
    """None if both models fit into memory in fp32; else how many bytes of weights each may keep between uses.

    max_memory: bytes for weights, None for half of what the machine has available. What the libraries, the adapters
    and the outputs take comes on top.
    """
    sizes = [4 * math.prod(stored.shape) for stored in headers(merged).values()]
    limit = psutil.virtual_memory().available // 2 if max_memory is None else max_memory
    if COPIES * sum(sizes) <= limit or not sizes:
        return None
    return max(0, limit - WORKING * max(sizes)) // 2


@dataclass(eq=False)
class Stream:
    """change: what a weight becomes when it is read, by its name in the wrapped model; keep: bytes of weights that
    may stay in memory between uses, for speed."""

    keep: int
    folder: tempfile.TemporaryDirectory[str]  # where transformers puts what it fuses; goes when the model goes
    change: Change | None = None


@dataclass(eq=False)
class Slot:
    """One weight in its file. While `users` is above 0 the parameter holds its values in fp32."""

    parameter: nn.Parameter
    file: str
    key: str
    dtype: torch.dtype
    stream: Stream
    name: str = ""
    users: int = 0
    kept: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.parameter.numel() * 4

    def read(self) -> torch.Tensor:
        """fp32 values, changed as the stream says."""
        value = _read(self.file, self.key, self.dtype)
        value = self.stream.change(self.name, value) if self.stream.change else value
        return value.reshape(self.parameter.shape)

    def enter(self) -> None:
        if self.users == 0:
            kept = self.kept
            if kept is not None and self.stream.change is not None:
                kept = self.stream.change(self.name, kept)
            self.parameter.data = self.read() if kept is None else kept
        self.users += 1

    def leave(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.parameter.data = _nothing(self.parameter.shape)


def _read(file: str, key: str, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values of a tensor, through `dtype`.

    The file is mapped for one block of rows at a time, or its pages would count as memory in use. And it is a copy:
    kernels add in another order where memory is not aligned as torch's own is, and a file's tensors are not.
    """
    with safe_open(file, framework="pt") as tensors:
        shape = tensors.get_slice(key).get_shape()
        if not shape:
            return tensors.get_tensor(key).to(dtype).to(torch.float32, copy=True)  # type: ignore[no-any-return]
    value = torch.empty(shape)
    rows = max(1, BLOCK // (4 * math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        with safe_open(file, framework="pt") as tensors:
            value[start : start + rows] = tensors.get_slice(key)[start : start + rows].to(dtype)
    return value


def _nothing(shape: torch.Size) -> torch.Tensor:
    """A tensor of this shape that takes four bytes."""
    return torch.full((1,) * len(shape), float("nan")).expand(shape)


def load_streamed(
    cls: Any, folder: Path, dtype: Any, keep: int, written: Collection[str] = (), **more: Any
) -> tuple[Any, Any]:
    """(model without its large weights, transformers' loading info). dtype, more: as from_pretrained takes them;
    written: weights that PEFT will overwrite with an adapter's.

    `attach` must follow before the model is used, once everything that wraps it is there.
    """
    stream = Stream(keep, tempfile.TemporaryDirectory(prefix="lora-export-"))
    with _without_dispatch() as places:
        model, info = cls.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": "disk"},
            offload_folder=stream.folder.name,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    _make_slots(model, places, stream, written)
    return model, info


@contextlib.contextmanager
def _without_dispatch() -> Iterator[dict[str, Any]]:
    """transformers finds the place of every weight and hands the places to accelerate: they are kept here instead.

    accelerate's own hooks would load a weight for each layer alone: DoRA looks at the weight of a layer after it
    ran, and what the files lack, and transformers computes (Marian's positions), has no place at all.
    """
    places: dict[str, Any] = {}
    original = modeling_utils.accelerate_dispatch

    def keep(model: Any, quantizer: Any, device_map: Any, folder: Any, index: Any, buffers: Any) -> None:
        places.update(index)

    modeling_utils.accelerate_dispatch = keep
    try:
        yield places
    finally:
        modeling_utils.accelerate_dispatch = original


def _make_slots(model: nn.Module, places: Mapping[str, Any], stream: Stream, written: Collection[str]) -> None:
    """Vectors are read at once: they are small, and a trained bias is written into them."""
    made: dict[tuple[str, str], nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                name = f"{prefix}.{leaf}" if prefix else leaf
                place = places[name]["safetensors_file"], places[name]["weight_name"]
                if place not in made:  # tied weights lie in one place, and stay one parameter
                    small = parameter.dim() < 2 or name in written
                    value = _read(*place, parameter.dtype) if small else _nothing(parameter.shape)
                    if value.shape != parameter.shape:  # a head of another size, which an adapter replaces
                        value = torch.zeros(parameter.shape)
                    made[place] = nn.Parameter(value, requires_grad=False)
                    if small:
                        made[place].stored_dtype = parameter.dtype  # type: ignore[attr-defined]
                    else:
                        made[place].slot = Slot(made[place], *place, parameter.dtype, stream)  # type: ignore[attr-defined]
                module._parameters[leaf] = made[place]


def attach(model: nn.Module, wrappers: Iterable[nn.Module]) -> None:
    """Weights are read when their layer runs, and dropped after it.

    model: the transformers model; wrappers: PEFT's outermost ones, which use the weights of the layers inside
    (DoRA's norms, trained tokens) and get them all at once.
    """
    for name, parameter in model.named_parameters():
        if slot := _slot(parameter):
            slot.name = name
    _keep_small(slots_of(model))
    inside: set[nn.Module] = set()
    for wrapper in wrappers:
        inside |= set(wrapper.modules())
        _hook(wrapper, slots_of(wrapper))
    for module in model.modules():
        direct = [s for p in module._parameters.values() if p is not None and (s := _slot(p))]
        if direct and module not in inside:
            _hook(module, direct)
            _answer_when_asked(module)


def _keep_small(slots: Sequence[Slot]) -> None:
    """Fill the memory that may be kept, the smallest weights first: reading them costs the most for their size."""
    left = slots[0].stream.keep if slots else 0
    for slot in sorted(slots, key=lambda s: s.nbytes):
        left -= slot.nbytes
        if left < 0:
            break
        slot.kept = slot.read()


def _hook(module: nn.Module, slots: list[Slot]) -> None:
    def enter(*_: Any) -> None:
        for slot in slots:
            slot.enter()

    def leave(*_: Any) -> None:
        for slot in slots:
            slot.leave()

    if slots:  # closures and no methods: a module that is copied must not copy its stream
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)


def _answer_when_asked(module: nn.Module) -> None:
    """Some models use the weight of a layer that they never call (DeBERTa's relative positions): read it then."""
    plain = type(module)

    def answer(self: nn.Module, name: str) -> Any:
        slot = _slot(self.__dict__["_parameters"].get(name))
        return slot.read() if slot and slot.users == 0 else plain.__getattr__(self, name)

    module.__class__ = type(plain.__name__, (plain,), {"__getattr__": answer, "__module__": plain.__module__})


def stored_dtype(parameter: nn.Parameter) -> torch.dtype:
    """The type that a weight was loaded in: a streamed one is fp32 in memory."""
    slot = _slot(parameter)
    dtype: torch.dtype = slot.dtype if slot else getattr(parameter, "stored_dtype", parameter.dtype)
    return dtype


def _slot(parameter: Any) -> Slot | None:
    return getattr(parameter, "slot", None)


def slots_of(*owners: nn.Module | torch.Tensor | None) -> list[Slot]:
    """The slots behind parameters, and behind all parameters of modules."""
    slots: dict[int, Slot] = {}
    for owner in owners:
        for parameter in owner.parameters() if isinstance(owner, nn.Module) else [owner]:
            if slot := _slot(parameter):
                slots[id(slot)] = slot
    return list(slots.values())


@contextlib.contextmanager
def present(*owners: nn.Module | torch.Tensor | None) -> Iterator[None]:
    """Inside, these parameters, and all parameters of these modules, hold their values. For any model: what is in
    memory anyway stays as it is."""
    slots = slots_of(*owners)
    for slot in slots:
        slot.enter()
    try:
        yield
    finally:
        for slot in slots:
            slot.leave()


@contextlib.contextmanager
def changing(unmerged: Any, change: Change) -> Iterator[None]:
    """Inside, PEFT's unmerged model has the weights that `change` makes of its own: of those in memory at once, of
    streamed ones when they are read. What `change` returns as it is stays."""
    model = unmerged.base_model.model
    streams = {id(s.stream): s.stream for s in slots_of(model)}
    for stream in streams.values():
        stream.change = change
    in_memory = ((name, p) for name, p in model.named_parameters() if not _slot(p))
    try:
        with holding((p, change(name, p.data)) for name, p in in_memory):
            yield
    finally:
        for stream in streams.values():
            stream.change = None


@contextlib.contextmanager
def holding(values: Iterable[tuple[nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Inside, these parameters hold these values."""
    before: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        for parameter, value in values:
            if value is not parameter.data:
                before.append((parameter, parameter.data))
                parameter.data = value
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


def refuse_changing_inits(configs: Iterable[Any], folder: Path) -> None:
    """Refuse to stream under adapters that change the base's weights when PEFT attaches them."""
    for config in configs:
        init = getattr(config, "init_lora_weights", None)
        if kind_of(config) in DECOMPOSING:
            reason = f"peft_type is {kind_of(config)!r}: PEFT decomposes the base's weights"
        elif isinstance(init, str) and init.lower().startswith(_CHANGING_INITS):
            reason = f"init_lora_weights is {init!r}: PEFT changes the base's weights"
        else:
            continue
        raise AdapterError(
            f"{reason} when it attaches this adapter, so the model cannot be streamed",
            where=folder,
            expected="memory for the whole model in fp32, twice",
            next_step="validate on a machine with more memory, or give a larger --max-memory",
        )
