"""One tensor of the output being computed: blocks of its rows in fp32, rounded once."""

import threading
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from lora_export.checkpoint.reader import file_dtype, read_rows, torch_dtype
from lora_export.contracts import TensorRecord, TensorSource, Update
from lora_export.errors import CheckpointError
from lora_export.finite import all_below
from lora_export.merge.plan import FLOATS, PlannedTensor
from lora_export.merge.survival import Survival, sampled

if TYPE_CHECKING:
    import torch


def record(tensor: PlannedTensor, survival: Survival) -> TensorRecord:
    """What happened to a tensor, for the certificate."""
    return TensorRecord(
        name=tensor.output.name,
        operation=tensor.operation,
        dtype=tensor.output.dtype,
        shape=tensor.output.shape,
        kinds=tuple(u.kind for u in tensor.updates),
        relative_delta=survival.relative_delta if tensor.updates else None,
        survival=survival.share,
    )


def moved(update: Any, device: str) -> Any:
    """The same update with its tensors on another device, whatever it is made of."""
    import torch

    if isinstance(update, torch.Tensor):
        return update.to(device)
    if isinstance(update, tuple | list):
        return type(update)(moved(part, device) for part in update)
    if not is_dataclass(update) or isinstance(update, type):
        return update
    parts = {f.name: moved(getattr(update, f.name), device) for f in fields(update)}
    return replace(update, **parts)


class Rows(Protocol):
    def rows(self, start: int, stop: int) -> "torch.Tensor": ...


@dataclass
class TensorWork:
    """base: where the numbers come from; blocks: how many there are, which several threads may compute."""

    tensor: PlannedTensor
    base: TensorSource
    blocks: int
    allow_nonfinite: bool = False
    device: str = "cpu"
    survival: Survival = field(default_factory=Survival)
    _updates: list[Update] | None = None
    _packed: Rows | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def finished(self) -> bool:
        """To be called once after each block: whether it was the last one."""
        with self._lock:
            self.blocks -= 1
            return self.blocks == 0

    def compute(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) in the output's type. CheckpointError for NaN and infinity."""
        updates, dtype = self._load(), torch_dtype(self.tensor.output.dtype)
        rows = slice(start, stop)
        result = self._read(start, stop).to(self.device)
        some = sampled(result)
        before = result[some].clone() if updates else None
        for update in updates:
            result = update.apply(result, rows)
        rounded = result.to(dtype).contiguous()
        if not self.allow_nonfinite:
            self._check_finite(result, rounded, start, stop)
        if before is not None:
            found = Survival()
            found.add(before, result[some], rounded[some])
            if found.delta == 0:  # perhaps only the rows that were looked at are unchanged
                found.add(self._read(start, stop).to(self.device), result, rounded)
            with self._lock:
                self.survival.join(found)
        return rounded.cpu()

    def _load(self) -> list[Update]:
        """The adapter's matrices and the packed weight, read by the first thread that needs them."""
        with self._lock:
            if self._updates is None:
                if self.tensor.quantized:
                    self._packed = self.tensor.quantized.load(self.base)
                loaded = (u.load(self.tensor.shape) for u in self.tensor.updates)
                self._updates = [u if self.device == "cpu" else moved(u, self.device) for u in loaded]
            return self._updates

    def _read(self, start: int, stop: int) -> "torch.Tensor":
        import torch

        tensor, info = self.tensor, self.tensor.source
        assert info is not None
        if self._packed is not None:
            return self._packed.rows(start, stop)
        if info.shape != tensor.shape:  # resized: the old rows do not enter
            return torch.zeros((stop - start, *tensor.shape[1:]), dtype=torch.float32)
        block = read_rows(info, start, stop)
        if tensor.training is not None:
            return tensor.training.round_trip(block)
        block = block.to(torch.float32)
        return block if tensor.shape else block.reshape(())

    def _check_finite(self, result: "torch.Tensor", rounded: "torch.Tensor", start: int, stop: int) -> None:
        import torch

        if self.tensor.output.dtype not in FLOATS:
            return
        if all_below(result, torch.finfo(rounded.dtype).max) or bool(torch.isfinite(rounded).all()):
            return
        tensor, in_base = self.tensor, not bool(torch.isfinite(self._read(start, stop)).all())
        kind = file_dtype(str(rounded.dtype).removeprefix("torch."))
        raise CheckpointError(
            f"{'the base' if in_base else 'the merged result'} holds NaN or infinity as {kind}",
            where=tensor.source.file if tensor.source and in_base else None,
            tensor=tensor.output.name,
            expected="finite numbers",
            next_step="--dtype bfloat16 or float32 has the range that float16 lacks"
            if kind == "F16" and not in_base
            else "check this tensor in the base and in the adapter; --allow-nonfinite takes it as it is",
        )
