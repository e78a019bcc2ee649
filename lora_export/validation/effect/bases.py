"""The bases that a QLoRA adapter could be merged into, compared on a text.

It was trained on weights that had been quantized and dequantized. The yardstick is PEFT's unmerged forward on just
those, in fp32: what training computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_export.contracts import (
    AdapterChoice,
    AdapterSurvival,
    BaseComparison,
    CompareBases,
    MergeOptions,
    Progress,
    ValidationResult,
)
from lora_export.errors import InputError
from lora_export.validation.effect import effect
from lora_export.validation.effect.advice import bases_advice
from lora_export.validation.reference import loading
from lora_export.validation.reference import unmerged as reference
from lora_export.validation.reference.files import FLOATS, headers
from lora_export.validation.reference.quantized import is_quantized, requantize

Windows = Sequence[torch.Tensor]


def check_request(request: CompareBases, base: Path, merge: MergeOptions, streamed: bool) -> None:
    """Refuse, before any model is loaded, a comparison for which there are no two bases, or no memory."""
    if streamed:
        raise InputError(
            "the bases are compared in memory, and there is not enough of it for this model in fp32",
            expected="memory for the model in fp32, four times",
            next_step="the same command without --compare-bases, or on a larger machine; or a larger --max-memory",
        )
    if not _is_quantized(base) and merge.training_quantization == "none":
        raise InputError(
            "there is only one base to merge into: this one is stored in 16 bits or more, and training did not "
            "quantize it",
            where=base / "config.json",
            expected="a base stored in 4 or 8 bits, or one that training quantized",
            next_step="the same command with --training-quantization nf4 (fp4, int8), if the adapter is a QLoRA; "
            "else without --compare-bases",
        )
    if request.original is None:
        return
    if not _is_quantized(base):
        raise InputError(
            "--original-base is for a base that is stored in 4 or 8 bits; this one is the original itself",
            where=base / "config.json",
            next_step="the same command without --original-base",
        )
    if _is_quantized(request.original):
        raise InputError(
            "the original base is itself stored quantized",
            where=request.original / "config.json",
            expected="the 16-bit model that the base was made from",
            next_step="--original-base with that model, or drop the option",
        )


def _is_quantized(folder: Path) -> bool:
    """By its configuration, by matrices that are no floats, or because no safetensors are here: GGUF."""
    stored = headers(folder)
    codes = any(t.dtype not in FLOATS and len(t.shape) == 2 for t in stored.values())
    return codes or not stored or is_quantized(folder)


@dataclass(frozen=True)
class Bases:
    """What is compared. unmerged and merged: the two models that validation has loaded; dequantized: an fp32 copy
    that stands for a base which transformers cannot load here; windows: (length,) ids each."""

    request: CompareBases
    base: Path
    adapters: Sequence[AdapterChoice]
    merged_folder: Path
    unmerged: Any
    merged: Any
    merge: MergeOptions
    dequantized: Path | None
    windows: Windows
    progress: Progress

    def compare(self) -> ValidationResult:
        self.progress.stage("validate: the bases that the adapter could be merged into")
        trained = self._trained()
        faithful = effect.of(self.merged) if self._merged_faithfully else effect.of(trained)
        yardstick = effect.perplexity("trained", effect.of(trained), self.windows)
        comparisons = [BaseComparison("trained", yardstick.value, 0.0), self._one("dequantized", trained, faithful)]
        untrained = [effect.perplexity("base dequantized", effect.without_adapter(trained), self.windows)]
        original = self._original()
        if original is not None:
            merged = effect.of(original if self._merged_faithfully else self.merged)
            comparisons.append(self._one("original", trained, merged))
            untrained.append(effect.perplexity("base original", effect.without_adapter(original), self.windows))
        del original
        kept = self._requantized(trained, comparisons)
        bases = {b.base: b for b in comparisons}
        scale = {p.model: p.value for p in untrained}
        advice = bases_advice(bases, scale, kept, self.request.requantize, self._merged_faithfully)
        return ValidationResult(
            checks=(),
            perplexities=tuple(untrained),
            adapter_survival=(kept,) if kept else (),
            bases=tuple(comparisons),
            advice=advice,
        )

    @property
    def _merged_faithfully(self) -> bool:
        return self.merge.base_weights == "dequantized"

    def _trained(self) -> Any:
        if self._merged_faithfully:
            return self.unmerged
        return self._attached(self.base, replace(self.merge, base_weights="dequantized"), self.dequantized)

    def _original(self) -> Any:
        """The adapter on the original base, unmerged: the merge into it up to rounding. None if it is not here."""
        if not self._merged_faithfully:
            return self.unmerged
        if self.request.original is not None:
            _same_model(self.request.original, self.merged)
            return self._attached(self.request.original, MergeOptions(), None)
        if _is_quantized(self.base):
            return None
        return self._attached(self.base, replace(self.merge, base_weights="original"), None)

    def _attached(self, base: Path, options: MergeOptions, dequantized: Path | None) -> Any:
        return reference.attach_adapters(loading.load_base(base, options, dequantized), self.adapters)

    def _one(self, name: str, trained: Any, model: effect.LogitsOf) -> BaseComparison:
        self.progress.detail(f"perplexity and divergence: {name}")
        return BaseComparison(name, *effect.distance(effect.of(trained), model, self.windows))

    def _requantized(self, trained: Any, comparisons: list[BaseComparison]) -> AdapterSurvival | None:
        """Add the merged weights, put back into 4 or 8 bits, to `comparisons`; return what is left of the adapter.

        Its base in lower precision is the base of the merge, put into the same format.
        """
        method = self.request.requantize
        if method is None:
            return None
        self.progress.detail(f"the merged weights put back into {method}")
        low, dtypes = loading.load_merged(self.merged_folder)
        low_base = loading.load_base(self.base, self.merge, self.dequantized)
        for model in (low, low_base):
            requantize(model, method, self.merge.training_double_quant, dtypes)
        comparisons.append(self._one("requantized", trained, effect.of(low)))
        of_base, of_unmerged = effect.without_adapter(self.unmerged), effect.of(self.unmerged)
        models = (of_base, of_unmerged, effect.of(low_base), effect.of(low))
        return effect.measured(self.windows, models).survival(f"requantized {method}")


def _same_model(original: Path, merged: Any) -> None:
    """Refuse an original base of other shapes by the first of them, before it is loaded."""
    shapes = _shapes(original)
    for name, parameter in merged.named_parameters():
        if name in shapes and shapes[name] != tuple(parameter.shape):
            raise InputError(
                f"the original base is another model: shape {list(shapes[name])}",
                where=original,
                tensor=name,
                expected=f"shape {list(parameter.shape)}, as in the merged model",
                next_step="--original-base with the model that the 4-bit base was made from",
            )


def _shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter of the architecture in `folder`, of a model without weights."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = loading.architecture(folder)(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}
