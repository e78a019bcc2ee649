"""One tensor of the output being computed: blocks of its rows in fp32 (or wider, see `wide`), rounded once."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_export.contracts import RowReader, TensorSource, Update
from lora_export.contracts.tensors import file_dtype, torch_dtype
from lora_export.errors import CheckpointError
from lora_export.finite import all_below
from lora_export.merging.planning.plan import FLOATS, PlannedTensor
from lora_export.merging.running.rounding import round_once
from lora_export.merging.running.rows import base_rows, load_updates, moved
from lora_export.merging.running.survival import Survival, sampled

if TYPE_CHECKING:
    import torch


def saturated(values: "torch.Tensor") -> int:
    """How many of them are infinite or the largest number of their type."""
    import torch

    largest = torch.finfo(values.dtype).max
    if values.element_size() < 8 and all_below(values.float(), largest):
        return 0
    return int((values.abs() >= largest).sum())


@dataclass
class TensorWork:
    """base: gives the parts of a quantized weight; hashed: takes the bytes of the base's tensor as they are read.

    Several threads may compute blocks of rows. saturated: how many of the numbers became the largest or infinite.
    """

    tensor: PlannedTensor
    base: TensorSource
    allow_nonfinite: bool = False
    device: str = "cpu"
    hashed: Callable[[int, memoryview], None] | None = None
    saturated: int = 0
    _blocks: dict[int, tuple[Survival, Survival]] = field(default_factory=dict)
    _updates: list[Update] | None = None
    _packed: RowReader | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def survival(self) -> Survival:
        """Of the rows that are looked at; of all rows if nothing changed in those. Blocks are summed in order."""
        some, rest = Survival(), Survival()
        for _, (of_some, of_all) in sorted(self._blocks.items()):
            some.join(of_some)
            rest.join(of_all)
        return some if some.delta != 0 else rest

    def compute(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) in the output's type. CheckpointError for NaN and infinity."""
        updates, dtype = self._load(), torch_dtype(self.tensor.output.dtype)
        rows = slice(start, stop)
        rounded = None if updates or self.device != "cpu" else self._as_written(start, stop, dtype)
        if rounded is not None:
            return rounded
        result = self._read(start, stop, self.hashed).to(self.device)
        some = sampled(self.tensor.shape, start, len(result)) if self.tensor.shape else ...
        before = (result if some is None else result[some]).clone() if updates else None
        for update in updates:
            result = update.apply(result, rows)
        rounded = round_once(result, dtype).contiguous()
        self._check_range(result, rounded, start, stop)
        if before is not None:
            self._survey(before, result, rounded, some, start, stop)
        return rounded.cpu()

    def _as_written(self, start: int, stop: int, dtype: "torch.dtype") -> "torch.Tensor | None":
        """Rows of a weight that is only dequantized, in the output's type, if its format can give them finite."""
        direct = getattr(self._packed, "rows_in", None)
        rows: torch.Tensor | None = direct(start, stop, dtype) if direct else None
        return rows

    def _survey(
        self,
        before: "torch.Tensor",
        result: "torch.Tensor",
        rounded: "torch.Tensor",
        some: Any,
        start: int,
        stop: int,
    ) -> None:
        """Add a block to the survival: by some of its rows, by all where those are none or did not change."""
        some_rows, rest = Survival(), Survival()
        if some is None:
            rest.add(before, result, rounded)
        else:
            some_rows.add(before, result[some], rounded[some])
        if some is not None and some_rows.delta == 0:
            rest.add(self._read(start, stop).to(self.device), result, rounded)
        with self._lock:
            self._blocks[start] = some_rows, rest

    def _load(self) -> list[Update]:
        """The adapter's matrices and the packed weight, read by the first thread that needs them."""
        with self._lock:
            if self._updates is None:
                if self.tensor.quantized:
                    self._packed = self.tensor.quantized.load(self.base)
                loaded = load_updates(self.tensor, self.tensor.wide)
                self._updates = [u if self.device == "cpu" else moved(u, self.device) for u in loaded]
            return self._updates

    def _read(
        self, start: int, stop: int, hashed: Callable[[int, memoryview], None] | None = None
    ) -> "torch.Tensor":
        import torch

        block = base_rows(self.tensor, self._packed, start, stop, hashed)
        block = block.to(torch.float64 if self.tensor.wide else torch.float32)
        return block if self.tensor.shape else block.reshape(())

    def _check_range(self, result: "torch.Tensor", rounded: "torch.Tensor", start: int, stop: int) -> None:
        """Refuse NaN and infinity, unless they are allowed; count what is as large as the type can hold."""
        import torch

        # Half of it: what is a little smaller may become the largest by the rounding.
        if self.tensor.output.dtype not in FLOATS or all_below(result, torch.finfo(rounded.dtype).max / 2):
            return
        count = saturated(rounded)
        with self._lock:
            self.saturated += count
        if self.allow_nonfinite or bool(torch.isfinite(rounded).all()):
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
