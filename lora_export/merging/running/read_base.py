"""What adapter kinds can ask of the base beyond the weight that they change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_export import tasks
from lora_export.adapters.kind import Layer
from lora_export.checkpoint.reader import Checkpoint
from lora_export.checkpoint.shards import OutputTensor
from lora_export.contracts import MergeOptions
from lora_export.errors import AdapterError
from lora_export.merging.architecture.model import built, loaded_weights
from lora_export.merging.architecture.pieces import StoredPiece
from lora_export.merging.planning.base import BaseWeight, quantized_in_training
from lora_export.merging.planning.plan import PlannedTensor
from lora_export.merging.running.rows import base_rows
from lora_export.storage.workers import BLOCK

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ReadBase:
    """adapters.kind.BaseModel over a checkpoint and its weights."""

    base: Checkpoint
    weights: Mapping[str, BaseWeight]
    options: MergeOptions

    def layers(self, config: Mapping[str, Any]) -> Mapping[str, Layer]:
        name = trained_class(config, self.base.config)
        return built(self.base, {"architectures": [name]} if name else None).layers

    def has(self, weight: str) -> bool:
        return self._stored(weight) is not None

    def blocks(self, weight: str) -> "Iterator[torch.Tensor]":
        stored = self._stored(weight)
        if stored is None:
            raise AdapterError(
                "the base has no such weight, which this kind of adapter needs",
                where=self.base.folder,
                tensor=weight,
                expected="the base that the adapter was trained on",
            )
        own = self.weights[stored]
        training = quantized_in_training(self.base, self.weights, self.options).get(own.name)
        output = OutputTensor(own.name, own.dtype, own.shape, own.info.file.name)
        tensor = PlannedTensor(output, "copied", own.info, own.shape, (), own.quantized, training)
        packed = own.quantized.load(self.base) if own.quantized else None
        height, width = own.shape[0], max(1, output.nbytes // max(1, own.shape[0]))
        step = max(1, BLOCK // width) if training is None else height
        for start in range(0, height, step):
            yield base_rows(tensor, packed, start, min(start + step, height)).float()

    @cached_property
    def _loaded(self) -> Mapping[str, tuple[StoredPiece, ...]]:
        return loaded_weights(self.base, {n: w.shape for n, w in self.weights.items()})

    def _stored(self, weight: str) -> str | None:
        """The name on disk of what an adapter calls so."""
        if weight in self.weights:
            return weight
        like = [n for n in self.weights if f".{n}".endswith(f".{weight}") or f".{weight}".endswith(f".{n}")]
        if like:
            return like[0]
        pieces = self._loaded.get(weight, ())
        whole = len(pieces) == 1 and pieces[0].expert is None and not pieces[0].transposed
        return pieces[0].name if whole else None


def trained_class(config: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """The class of transformers that an adapter says it was trained on; None if it does not say.

    config: of the adapter; base: the base's config.json.
    """
    from transformers.models.auto import modeling_auto

    written = config.get("auto_mapping")
    if isinstance(written, Mapping) and isinstance(written.get("base_model_class"), str):
        return str(written["base_model_class"])
    task = tasks.PEFT_TASKS.get(str(config.get("task_type")))
    (table,) = tasks.TASKS[task] if task else ("",)
    name = getattr(modeling_auto, f"{table}_NAMES", {}).get(base.get("model_type"))
    return name if isinstance(name, str) else None
