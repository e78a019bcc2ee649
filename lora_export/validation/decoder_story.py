"""How a decoder is compared: floors first, then the merged model in fp32, as it is loaded, and as an ONNX graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_export.contracts import Check, ExportedPair, Perplexity, Progress, ValidationResult
from lora_export.validation.compare import Difference, compare_logits, greedy_divergences
from lora_export.validation.decoders import greedy, greedy_steps, logits
from lora_export.validation.noise import draws, in_output_types
from lora_export.validation.text import perplexity
from lora_export.validation.thresholds import FACTOR, Floor, Greedy, decoder_checks, run_to_run

SAMPLES = 3  # prompts that are continued greedily


@dataclass
class DecoderStory:
    """tokens: the prompts; text: pieces of running text for the perplexities (none: they are left out).

    What is measured on the unmerged model is kept, so that several merged ones can be judged by it.
    """

    tokens: Sequence[torch.Tensor]
    tokenizer: Any
    dtypes: Mapping[str, torch.dtype]
    progress: Progress
    factor: float = FACTOR
    text: Sequence[torch.Tensor] = ()
    _base: list[torch.Tensor] = field(default_factory=list)
    _rounding: tuple[Difference, ...] = ()
    _again: tuple[Difference, ...] = ()
    _unmerged: list[torch.Tensor] = field(default_factory=list)
    _continued: list[torch.Tensor] = field(default_factory=list)
    _steps: list[torch.Tensor] = field(default_factory=list)
    _perplexities: list[Perplexity] = field(default_factory=list)

    def measure(self, unmerged: Any) -> None:
        """The unmerged model's outputs, and the noise floors of rounding and of running it again."""
        self.progress.stage("validate: noise floor of the rounding, without any adapter")
        with unmerged.disable_adapter():
            self._base = logits(unmerged, self.tokens)
            self._perplexities += self._perplexity("base", unmerged)
        self._rounding = self._measure_rounding(unmerged)
        self.progress.stage(f"validate: {len(self.tokens)} prompts, unmerged and merged")
        self._unmerged = logits(unmerged, self.tokens)
        self._again = (self._from_unmerged(logits(unmerged, self.tokens)),)
        self._perplexities += self._perplexity("unmerged", unmerged)
        self.progress.stage("validate: greedy continuations")
        for ids in self._prompts:
            self._continued.append(greedy(unmerged, ids))
            self._steps.append(greedy_steps(unmerged, ids, self._continued[-1]))

    def compare(self, unmerged: Any, merged: Any) -> ValidationResult:
        """The merged model (fp32 arithmetic on its stored weights) against PEFT's unmerged forward."""
        self.measure(unmerged)
        parted = self._parted(self._along(merged))
        judged = self.judge(merged, parted)
        return ValidationResult(
            checks=(*judged.checks, run_to_run(self._again[0].max_abs)),
            samples=self._samples(unmerged, merged, parted),
            kl_by_position=judged.kl_by_position,
            perplexities=(*self._perplexities, *self._perplexity("merged", merged)),
        )

    def judge(self, merged: Any, parted: Greedy | None = None) -> ValidationResult:
        """The checks of a merged model alone, by what `measure` found. parted: its continuations, if known."""
        where = "rounding errors of the output type on the base, no adapter"
        found = self._from_unmerged(logits(merged, self.tokens))
        parted = parted or self._parted(self._along(merged))
        return ValidationResult(
            checks=tuple(decoder_checks(self._floor(where, self._rounding), found, parted, self.factor)),
            kl_by_position=found.kl,
        )

    @property
    def windows(self) -> Sequence[torch.Tensor]:
        """The text, or the prompts where none can be read: ids (length,); all but the first are predicted."""
        return self.text or self.tokens

    def once(self, model: Any) -> Any:
        """One forward on the longest prompt, without a cache."""
        return model(input_ids=max(self.tokens, key=len)[None], use_cache=False)

    def compare_loaded(self, unmerged: Any, loaded: Any, dtype: str) -> tuple[list[Check], list[Perplexity]]:
        """The merged model in its own type, weights and arithmetic, against the unmerged one in fp32."""
        self.progress.stage(f"validate: the merged model as it will be loaded ({dtype})")
        with unmerged.disable_adapter(), in_output_types(unmerged, self.dtypes):
            narrow = self._from_base(logits(unmerged, self.tokens))
        where = f"rounding errors, and the base computed in {dtype} against the base in fp32"
        floor = self._floor(where, self._rounding, (narrow,))
        found = self._from_unmerged(logits(loaded, self.tokens))
        parted = self._parted(self._along(loaded))
        checks = decoder_checks(floor, found, parted, self.factor, prefix="loaded_")
        return checks, self._perplexity(f"merged as loaded ({dtype})", loaded)

    def compare_onnx(self, pair: ExportedPair, provider: str) -> list[Check]:
        """The exported graph, run with its KV cache, against the same unmerged forward."""
        from lora_export.validation.onnx_decoder import OnnxDecoder

        self.progress.stage("validate: ONNX Runtime, noise floor from the base exported the same way")
        reference = OnnxDecoder(pair.base_graphs[0], provider)
        noisy = self._from_base([reference.logits(ids) for ids in self.tokens])
        where = "rounding errors, and the base exported the same way against the base in PyTorch"
        floor = self._floor(where, self._rounding, (noisy,))
        self.progress.stage("validate: ONNX Runtime, the merged graph at several lengths and with its cache")
        runner = OnnxDecoder(pair.merged_graphs[0], provider)
        found = self._from_unmerged([runner.logits(ids) for ids in self.tokens])
        chosen = [runner.greedy(ids, len(c)) for ids, c in zip(self._prompts, self._continued, strict=True)]
        return decoder_checks(floor, found, self._parted(chosen), self.factor, prefix="onnx_")

    def _measure_rounding(self, unmerged: Any) -> tuple[Difference, ...]:
        return tuple(draws(unmerged, self.dtypes, lambda: self._from_base(logits(unmerged, self.tokens))))

    @property
    def _prompts(self) -> Sequence[torch.Tensor]:
        return self.tokens[:SAMPLES]

    def _from_base(self, noisy: list[torch.Tensor]) -> Difference:
        return compare_logits(self._base, noisy, self.tokens)

    def _from_unmerged(self, found: list[torch.Tensor]) -> Difference:
        return compare_logits(self._unmerged, found, self.tokens)

    def _floor(self, where: str, *sources: tuple[Difference, ...]) -> Floor:
        return Floor((*sources, self._again), max(float(x.abs().max()) for x in self._base), where)

    def _perplexity(self, name: str, model: Any) -> list[Perplexity]:
        return [perplexity(name, lambda ids: logits(model, [ids])[0], self.text)] if self.text else []

    def _along(self, model: Any) -> list[torch.Tensor]:
        """What a model would have chosen at each step of the unmerged model's continuations."""
        pairs = zip(self._prompts, self._continued, strict=True)
        return [greedy_steps(model, ids, continuation).argmax(-1) for ids, continuation in pairs]

    def _parted(self, chosen: Sequence[torch.Tensor]) -> Greedy:
        agreement, divergences = greedy_divergences(self._steps, chosen)
        return Greedy(agreement, divergences, self.tokenizer.decode)

    def _samples(self, unmerged: Any, merged: Any, parted: Greedy) -> tuple[dict[str, str], ...]:
        samples = []
        shown = {d.prompt: parted.show(d) for d in parted.divergences}
        for i, (ids, continued) in enumerate(zip(self._prompts, self._continued, strict=True)):
            with unmerged.disable_adapter():
                before = greedy(unmerged, ids, len(continued) // 2)
            after = greedy(merged, ids, len(continued) // 2)
            texts = {"prompt": ids, "base": before, "unmerged": continued[: len(after)], "merged": after}
            sample = {k: self.tokenizer.decode(v, skip_special_tokens=True) for k, v in texts.items()}
            samples.append(sample | ({"first_difference": shown[i]} if i in shown else {}))
        return tuple(samples)
