"""How an encoder is compared: hidden states (or class logits) of each prompt, and the mean-pooled embedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_export.contracts import Check, Perplexity, Progress, ValidationResult
from lora_export.validation.noise import DRAWS, rounding_noise
from lora_export.validation.thresholds import FACTOR, FP32_ARITHMETIC


@dataclass
class EncoderStory:
    tokens: Sequence[torch.Tensor]
    dtypes: Mapping[str, torch.dtype]
    progress: Progress
    factor: float = FACTOR
    _base: list[torch.Tensor] = field(default_factory=list)
    _unmerged: list[torch.Tensor] = field(default_factory=list)
    _rounding: float = 0.0

    def compare(self, unmerged: Any, merged: Any) -> ValidationResult:
        self.progress.stage("validate: noise floor of the rounding, then unmerged and merged")
        with unmerged.disable_adapter():
            self._base = self._outputs(unmerged)
            for seed in range(DRAWS):
                with rounding_noise(unmerged, self.dtypes, seed):
                    self._rounding = max(self._rounding, _max_abs(self._base, self._outputs(unmerged)))
        self._unmerged = self._outputs(unmerged)
        where = "rounding errors on the base, no adapter"
        return ValidationResult(tuple(self._checks(self._rounding, self._outputs(merged), "", where)))

    def once(self, model: Any) -> Any:
        """One forward on the longest prompt."""
        return model(input_ids=max(self.tokens, key=len)[None])

    def compare_onnx(
        self, model: Path, base: Path, provider: str, precision: str | None
    ) -> tuple[list[Check], list[Perplexity]]:
        from lora_export.validation.onnx_encoder import OnnxEncoder

        self.progress.stage("validate: ONNX Runtime, at several lengths and in one padded batch")
        noisy = OnnxEncoder(base, provider).outputs(self.tokens)
        found = OnnxEncoder(model, provider).outputs(self.tokens)
        where = "rounding errors, and the base exported the same way against PyTorch"
        return self._checks(self._rounding + _max_abs(self._base, noisy), found, "onnx_", where), []

    @torch.inference_mode()
    def _outputs(self, model: Any) -> list[torch.Tensor]:
        return [model(input_ids=ids[None])[0][0].float() for ids in self.tokens]

    def _checks(self, noise: float, found: list[torch.Tensor], prefix: str, where: str) -> list[Check]:
        scale = max(float(x.abs().max()) for x in self._base)
        floor = noise + scale * FP32_ARITHMETIC
        worst = _max_abs(self._unmerged, found)
        similar = min(_cosine(a, b) for a, b in zip(self._unmerged, found, strict=True))
        # Both vectors lie within the threshold of each other, so 1 − cos is bounded by its square.
        least = 1 - (self.factor * floor / scale) ** 2 - 1e-6
        return [
            Check(
                f"{prefix}logits_max_abs",
                worst,
                self.factor * floor,
                worst <= self.factor * floor,
                f"{self.factor:g} × the noise floor; hidden states or class logits",
            ),
            Check(
                f"{prefix}embedding_cosine", similar, least, similar >= least, "mean-pooled, least of all prompts"
            ),
            Check(f"{prefix}noise_floor_max_abs", floor, None, True, where),
        ]


def _max_abs(reference: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(reference, found, strict=True))


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = (v.double().mean(0) if v.dim() == 2 else v.double() for v in (a, b))
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0))
