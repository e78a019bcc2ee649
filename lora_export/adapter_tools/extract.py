"""A LoRA out of a fully tuned model: the difference to its base, layer by layer, by its largest singular values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lora_export import meta_model as skeleton
from lora_export.adapter_tools.saving import Derived, DType, NewAdapter, Rank, check_rank
from lora_export.checkpoint import open_checkpoint
from lora_export.contracts import MergeOptions, Progress
from lora_export.deltas import spectrum
from lora_export.errors import CheckpointError
from lora_export.merging.planning.plan import FLOATS, MergePlan, PlannedTensor, plan_merge
from lora_export.merging.running.rows import whole_base
from lora_export.progress import Silent

Rest = Literal["save", "drop", "refuse"]
Shape = Literal["linear", "conv1d", "embedding", "whole"]


def extract(
    base: Path,
    tuned: Path,
    output: Path,
    wanted: Rank,
    rest: Rest = "save",
    dtype: DType = "float32",
    force: bool = False,
    progress: Progress | None = None,
) -> Derived:
    """Write an adapter that makes `tuned` of `base`: a pair for each linear layer and embedding that differs.

    rest: what becomes of other weights that differ (norms, biases, convolutions): saved whole with the adapter
    (modules_to_save), left out, or refused. One weight is in memory at a time, in float64. CheckpointError where
    the two are not of one architecture.
    """
    check_rank(wanted, needed=True)
    progress = progress or Silent()
    before, after = (plan_merge(open_checkpoint(folder), [], MergeOptions()) for folder in (base, tuned))
    check_alike(before, after)
    extraction = Extraction(before, after, _layers(base), wanted, rest, NewAdapter("extract"))
    names = list(before.tensors)
    for at, name in enumerate(names):
        extraction.take(name)
        progress.advance(at + 1, len(names))
    extraction.finish(base)
    return extraction.new.write(output, dtype, force, [base, tuned])


def check_alike(base: MergePlan, tuned: MergePlan) -> None:
    """CheckpointError unless the two have the same tensors of the same shapes."""
    missing = base.tensors.keys() ^ tuned.tensors.keys()
    if missing:
        name = min(missing)
        there, lacking = (tuned, base) if name in tuned.tensors else (base, tuned)
        raise CheckpointError(
            f"{len(missing)} tensors are in only one of the two models",
            where=there.base.folder,
            tensor=name,
            expected=f"the same tensors as in {lacking.base.folder}",
            next_step="give the base that this model was tuned from, saved by the same version of transformers",
        )
    for name, tensor in base.tensors.items():
        if tensor.shape != tuned.tensors[name].shape:
            raise CheckpointError(
                f"the shape is {list(tuned.tensors[name].shape)}, the base's is {list(tensor.shape)}",
                where=tuned.base.folder,
                tensor=name,
                expected="a model of the base's sizes (a resized vocabulary is not a low-rank change)",
            )


def _layers(folder: Path) -> dict[str, Shape]:
    """Module of the model → what it is."""
    from transformers.pytorch_utils import Conv1D

    kinds: list[tuple[Any, Shape]] = [
        (torch.nn.Linear, "linear"),
        (Conv1D, "conv1d"),
        (torch.nn.Embedding, "embedding"),
        (torch.nn.Module, "whole"),
    ]
    return {
        name: next(kind for cls, kind in kinds if isinstance(module, cls))
        for name, module in skeleton.build(folder).named_modules()
    }


@dataclass
class Extraction:
    base: MergePlan
    tuned: MergePlan
    layers: Mapping[str, Shape]
    wanted: Rank
    rest: Rest
    new: NewAdapter

    def take(self, name: str) -> None:
        """What became of one weight."""
        module, _, leaf = name.rpartition(".")
        before, after = (read_float(plan, plan.tensors[name]) for plan in (self.base, self.tuned))
        if before is None or after is None or bool((before == after).all()):
            return
        kind = self.layers.get(self._path(module), "whole")
        if leaf != "weight" or kind == "whole" or before.dim() != 2:
            self._take_rest(name, after)
            return
        delta = after - before
        values = spectrum.of_matrix(delta.T if kind == "conv1d" else delta)
        self.new.add(self._path(module), values, self.wanted.of(values), kind == "embedding")

    def _path(self, module: str) -> str:
        """The module's name in the model, which may have a prefix that the file has not, or the other way round."""
        if module in self.layers:
            return module
        ends = (n for n in self.layers if n and (n.endswith(f".{module}") or module.endswith(f".{n}")))
        return next(ends, module)

    def _take_rest(self, name: str, after: torch.Tensor) -> None:
        if self.rest == "refuse":
            raise CheckpointError(
                "the tuned model differs in a weight that LoRA cannot represent",
                where=self.tuned.base.folder,
                tensor=name,
                expected="linear layers and embeddings alone",
                next_step="--rest save keeps such weights whole in the adapter, --rest drop leaves them out",
            )
        if self.rest == "drop":
            self.new.dropped.append(name)
            return
        stored = self.tuned.tensors[name].output.dtype
        types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        self.new.whole[name] = after.to(types.get(stored, torch.float32)).contiguous()

    def finish(self, base: Path) -> None:
        """Whole weights as PEFT has them: modules_to_save, of which every tensor is saved, and biases of layers."""
        pairs, saved = {p.module for p in self.new.pairs}, set[str]()
        whole, self.new.whole = self.new.whole, {}
        for key, value in whole.items():
            module, _, leaf = key.rpartition(".")
            path = self._path(module)
            if path in pairs:
                self.new.whole[f"{path}.base_layer.{leaf}"] = value
                self.new.changes["bias"] = "all"
            else:
                saved.add(module)
                self.new.whole[f"{path}.{leaf}"] = value
        self._fill(saved)
        if saved:
            self.new.changes["modules_to_save"] = sorted(map(self._path, saved))
        if any(kind == "conv1d" for kind in self.layers.values()):
            self.new.changes["fan_in_fan_out"] = True
        self.new.changes["base_model_name_or_path"] = base.resolve().name

    def _fill(self, saved: set[str]) -> None:
        """What belongs to a module that is saved whole, and has not changed."""
        for name in self.tuned.tensors:
            module, _, leaf = name.rpartition(".")
            key = f"{self._path(module)}.{leaf}"
            if module in saved and key not in self.new.whole:
                value = read_float(self.tuned, self.tuned.tensors[name])
                if value is not None:
                    self.new.whole[key] = value.float().contiguous()


def read_float(plan: MergePlan, tensor: PlannedTensor) -> torch.Tensor | None:
    """A weight in float64; None for what holds no floats."""
    if tensor.output.dtype not in FLOATS:
        return None
    return whole_base(tensor, plan.base)
