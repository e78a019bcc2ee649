"""What a merge shows of its base to the kinds of adapters that need more of it than the weight that they change."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_export import meta_model as skeleton
from lora_export import tasks
from lora_export.adapters.kind import Layer
from lora_export.checkpoint.reader import Checkpoint
from lora_export.checkpoint.shards import OutputTensor
from lora_export.contracts import MergeOptions
from lora_export.errors import AdapterError
from lora_export.merging.planning.base import BaseWeight, quantized_in_training
from lora_export.merging.planning.loaded_names import Piece, loaded_weights
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
    _layers: dict[str | None, Mapping[str, Layer]] = field(default_factory=dict)
    _loaded: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def layers(self, config: Mapping[str, Any]) -> Mapping[str, Layer]:
        name = trained_class(config, self.base.config)
        with self._lock:
            if name not in self._layers:
                change = {"architectures": [name]} if name else {}
                model = skeleton.build(self.base.folder, {**self.base.config, **change})
                self._layers[name] = {n: _layer(m) for n, m in model.named_modules() if _has_weight(m)}
            return self._layers[name]

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
        found = self.weights[stored]
        training = quantized_in_training(self.base, self.weights, self.options).get(found.name)
        output = OutputTensor(found.name, found.dtype, found.shape, found.info.file.name)
        tensor = PlannedTensor(output, "copied", found.info, found.shape, (), found.quantized, training)
        packed = found.quantized.load(self.base) if found.quantized else None
        height, width = found.shape[0], max(1, output.nbytes // max(1, found.shape[0]))
        step = max(1, BLOCK // width) if training is None else height
        for start in range(0, height, step):
            yield base_rows(tensor, packed, start, min(start + step, height)).float()

    def _stored(self, weight: str) -> str | None:
        """The name on disk of what an adapter calls so."""
        if weight in self.weights:
            return weight
        like = [n for n in self.weights if f".{n}".endswith(f".{weight}") or f".{weight}".endswith(f".{n}")]
        if like:
            return like[0]
        with self._lock:
            if not self._loaded:
                self._loaded.update(loaded_weights(self.base, {n: w.shape for n, w in self.weights.items()}))
                self._loaded.setdefault("", ())
        pieces = self._loaded.get(weight, ())
        whole = len(pieces) == 1 and pieces[0].expert is None and not pieces[0].transposed
        return pieces[0].name if whole else None


def trained_class(config: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """The class of transformers that an adapter was trained on, by its own words; None if it has none.

    config: of the adapter; base: the base's config.json.
    """
    from transformers.models.auto import modeling_auto

    written = config.get("auto_mapping")
    if isinstance(written, Mapping) and isinstance(written.get("base_model_class"), str):
        return str(written["base_model_class"])
    task = tasks.PEFT_TASKS.get(str(config.get("task_type")))
    (table,) = tasks.TASKS[task] if task else ("",)
    found = getattr(modeling_auto, f"{table}_NAMES", {}).get(base.get("model_type"))
    return found if isinstance(found, str) else None


def _has_weight(module: Any) -> bool:
    import torch

    return isinstance(getattr(module, "weight", None), torch.Tensor)


def _layer(module: Any) -> Layer:
    import torch
    from transformers.pytorch_utils import Conv1D

    conv1d = isinstance(module, Conv1D)
    embedding = isinstance(module, torch.nn.Embedding)
    linear = conv1d or isinstance(module, torch.nn.Linear)
    return Layer(linear, embedding, tuple(module.weight.shape), conv1d, _scale(module) if embedding else 1.0)


def _scale(module: Any) -> float:
    """A buffer of a model without weights has no value: transformers keeps its number beside it. It is fp32's."""
    import torch

    found = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    if isinstance(found, torch.Tensor):
        return 1.0 if found.is_meta else float(found)
    return (
        float(torch.tensor(found, dtype=torch.float32)) if hasattr(module, "scalar_embed_scale") else float(found)
    )
