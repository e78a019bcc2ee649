"""How a decoder is compared: floor first, then the merged model, then its ONNX graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_export.contracts import Check, Progress, ValidationResult
from lora_export.validation.compare import Difference, compare_logits, greedy_divergences
from lora_export.validation.decoders import greedy, greedy_steps, logits
from lora_export.validation.noise import DRAWS, rounding_noise
from lora_export.validation.thresholds import Floor, decoder_checks

SAMPLES = 3  # prompts that are continued greedily


@dataclass
class DecoderStory:
    tokens: Sequence[torch.Tensor]
    tokenizer: Any
    dtypes: Mapping[str, torch.dtype]
    progress: Progress
    # What later comparisons need of the unmerged model, so that it need not run twice.
    _base: list[torch.Tensor] = field(default_factory=list)
    _rounding: tuple[Difference, ...] = ()
    _unmerged: list[torch.Tensor] = field(default_factory=list)
    _continued: list[torch.Tensor] = field(default_factory=list)
    _steps: list[torch.Tensor] = field(default_factory=list)

    def compare(self, unmerged: Any, merged: Any) -> ValidationResult:
        """The merged model (fp32 arithmetic on its stored weights) against PEFT's unmerged forward."""
        self.progress.stage("validate: noise floor of the rounding, without any adapter")
        with unmerged.disable_adapter():
            self._base = logits(unmerged, self.tokens)
            for seed in range(DRAWS):
                with rounding_noise(unmerged, self.dtypes, seed):
                    self._rounding += (self._from_base(logits(unmerged, self.tokens)),)
        floor = self._floor("rounding errors of the output type on the base, no adapter", self._rounding)
        self.progress.stage(f"validate: {len(self.tokens)} prompts, unmerged and merged")
        self._unmerged = logits(unmerged, self.tokens)
        found = compare_logits(self._unmerged, logits(merged, self.tokens), self.tokens)
        chosen = self._continue(unmerged, merged)
        agreement, divergences = greedy_divergences(self._steps, chosen)
        return ValidationResult(
            checks=tuple(decoder_checks(floor, found, agreement, divergences)),
            samples=self._samples(unmerged, merged),
            kl_by_position=found.kl,
        )

    def compare_onnx(self, model: Path, base: Path, provider: str) -> list[Check]:
        """The exported graph, run with its KV cache, against the same unmerged forward."""
        from lora_export.validation.onnx_decoder import OnnxDecoder

        self.progress.stage("validate: ONNX Runtime, noise floor from the base exported the same way")
        reference = OnnxDecoder(base, provider)
        noisy = [reference.logits(ids) for ids in self.tokens]
        where = "rounding errors, and the base exported the same way against the base in PyTorch"
        floor = self._floor(where, self._rounding, (self._from_base(noisy),))
        self.progress.stage("validate: ONNX Runtime, the merged graph at several lengths and with its cache")
        runner = OnnxDecoder(model, provider)
        found = compare_logits(self._unmerged, [runner.logits(ids) for ids in self.tokens], self.tokens)
        chosen = [runner.greedy(ids, len(c)) for ids, c in zip(self._prompts, self._continued, strict=True)]
        agreement, divergences = greedy_divergences(self._steps, chosen)
        return decoder_checks(floor, found, agreement, divergences, prefix="onnx_")

    @property
    def _prompts(self) -> Sequence[torch.Tensor]:
        return self.tokens[:SAMPLES]

    def _from_base(self, noisy: list[torch.Tensor]) -> Difference:
        return compare_logits(self._base, noisy, self.tokens)

    def _floor(self, where: str, *sources: tuple[Difference, ...]) -> Floor:
        return Floor(sources, max(float(x.abs().max()) for x in self._base), where)

    def _continue(self, unmerged: Any, merged: Any) -> list[torch.Tensor]:
        self.progress.stage("validate: greedy continuations")
        chosen = []
        for ids in self._prompts:
            continuation = greedy(unmerged, ids)
            self._continued.append(continuation)
            self._steps.append(greedy_steps(unmerged, ids, continuation))
            chosen.append(greedy_steps(merged, ids, continuation).argmax(-1))
        return chosen

    def _samples(self, unmerged: Any, merged: Any) -> tuple[dict[str, str], ...]:
        samples = []
        for ids, continued in zip(self._prompts, self._continued, strict=True):
            with unmerged.disable_adapter():
                before = greedy(unmerged, ids, len(continued) // 2)
            after = greedy(merged, ids, len(continued) // 2)
            texts = {"prompt": ids, "base": before, "unmerged": continued[: len(after)], "merged": after}
            samples.append({k: self.tokenizer.decode(v, skip_special_tokens=True) for k, v in texts.items()})
        return tuple(samples)
