"""Tiny models of five kinds, their adapters, merges and exports, each made once in a work folder.

The weights are large enough that attention is peaked. With the small ones of an untrained model it is nearly
uniform, and a fault in it moves nothing.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from lora_export.choices import Precision
from lora_export.contracts import AdapterChoice, ExportOptions
from lora_export.merging import merge
from lora_export.onnx_export import export, reweight
from lora_export.progress import Silent
from tests.onnx_export.architectures import DYNAMO, GENAI, Architecture, build
from tests.onnx_export.conftest import save_tokenizer

POSITIONS = 160  # validation leaves 64 of them to greedy texts, so prompts have up to 95 tokens
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int4")
BUILT_RATIO = 0.3  # an adapter's update, as a share of the norm of its weights, unless a case says otherwise


@dataclass(frozen=True)
class Tiny:
    """kind: of the model, as the faults are counted; head: channels of an attention head; softer: parts of names of
    weights that are a quarter as large (T5 keeps the attention scale in its query weights)."""

    kind: str
    cls: str
    head: int = 16
    softer: tuple[str, ...] = ()
    changes: Mapping[str, Any] | None = None

    @property
    def architecture(self) -> Architecture:
        known = (DYNAMO | GENAI)[self.cls]
        longer = {k: POSITIONS for k in known.settings if k in ("max_position_embeddings", "n_positions")}
        return replace(known, settings={**known.settings, **longer, **(self.changes or {})})

    @property
    def model(self) -> Any:
        return getattr(transformers, self.cls)

    def save(self, folder: Path) -> Path:
        model = build(self.architecture)
        for name, parameter in model.named_parameters():
            if any(part in name for part in self.softer):
                parameter.data *= 0.25
        model.save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    def save_adapter(self, base: Path, folder: Path, seed: int, ratio: float) -> Path:
        """A LoRA whose update of each weight W has the norm ratio · ‖W‖."""
        torch.manual_seed(seed)
        model = self.model.from_pretrained(base, dtype=torch.float32)
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(self.architecture.targets))
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.15)
        for module in wrapped.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                size = module.get_delta_weight("default").norm() / module.get_base_layer().weight.norm()
                module.lora_B["default"].weight.data *= ratio / size.item()
        wrapped.save_pretrained(folder)
        return folder


MODELS: tuple[Tiny, ...] = (
    Tiny("decoder", "LlamaForCausalLM"),
    Tiny("decoder", "Gemma2ForCausalLM", changes={"sliding_window": 24}),
    Tiny("decoder", "Qwen2ForCausalLM"),
    Tiny("decoder", "GPT2LMHeadModel"),
    Tiny("encoder", "BertForSequenceClassification"),
    Tiny("encoder", "DistilBertForSequenceClassification"),
    Tiny("encoder-decoder", "MarianMTModel"),
    Tiny("encoder-decoder", "T5ForConditionalGeneration", softer=(".q.",)),
    Tiny("vision", "ViTForImageClassification"),
    Tiny("vision", "Dinov2Model"),
    Tiny("speech", "Wav2Vec2ForCTC"),
    Tiny("speech", "WhisperForConditionalGeneration"),
)
KINDS = tuple(dict.fromkeys(tiny.kind for tiny in MODELS))


@dataclass(frozen=True)
class Adapted:
    """An adapter and the folder that was merged with it."""

    adapter: Path
    merged: Path


class Workshop:
    """What is made is kept under `root`, by name, and found again by the next run."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def base(self, tiny: Tiny) -> Path:
        return self._once(self._root / tiny.cls / "base", tiny.save)

    def adapted(self, tiny: Tiny, seed: int = 1, ratio: float = BUILT_RATIO) -> Adapted:
        base, name = self.base(tiny), f"{seed}-{ratio:g}"
        folder = self._root / tiny.cls
        adapter = self._once(folder / f"adapter-{name}", lambda made: tiny.save_adapter(base, made, seed, ratio))
        merged = self._once(folder / f"merged-{name}", lambda made: merge(base, [AdapterChoice(adapter)], made))
        return Adapted(adapter, merged)

    def exported(self, tiny: Tiny, precision: Precision) -> Path:
        """The base's graphs, of which all others of the model and the precision are copies with other weights."""
        base = self.base(tiny)
        return self._once(
            self._root / tiny.cls / f"onnx-{precision}",
            lambda made: export(base, made, ExportOptions(precision, "cpu"), progress=Silent()),
        )

    def reweighted(self, tiny: Tiny, precision: Precision, adapted: Adapted) -> Path:
        earlier = self.exported(tiny, precision)
        made = self._root / tiny.cls / f"onnx-{precision}-{adapted.merged.name}"
        return self._once(made, lambda made: reweight(earlier, adapted.merged, made, progress=Silent()))

    @staticmethod
    def _once(folder: Path, make: Any) -> Path:
        """A folder that is there is whole: it is made beside its place."""
        if not folder.is_dir():
            beside = folder.with_name(f"{folder.name}.making")
            shutil.rmtree(beside, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            make(beside)
            beside.rename(folder)
        return folder
