"""How a decoder is compared: floors first, then the merged model in fp32, as it is loaded, and as an ONNX graph."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lora_export.contracts import Check, Perplexity, Progress, ValidationResult
from lora_export.validation.comparing.arithmetic import Arithmetic, InTypes, draw
from lora_export.validation.comparing.decoders import GREEDY_TOKENS, greedy, greedy_steps, logits
from lora_export.validation.comparing.logits import Difference, compare_logits, greedy_divergences, largest
from lora_export.validation.comparing.noise import draws
from lora_export.validation.comparing.subject import Graph, running
from lora_export.validation.comparing.text import perplexity
from lora_export.validation.comparing.thresholds import (
    FACTOR,
    Floor,
    Greedy,
    decoder_checks,
    graph_checks,
    run_to_run,
)
from lora_export.validation.effect import effect

if TYPE_CHECKING:
    from lora_export.validation.graphs.runs import OnnxDecoder

PADDED = 4  # prompts that are run in one batch, the shortest ones
SAMPLES = 3  # prompts that are continued greedily


@dataclass
class DecoderStory:
    """tokens: the prompts; text: pieces of running text for the perplexities (none: they are left out); steps: how
    many tokens are generated after a prompt.

    What is measured on the unmerged model is kept, so that several merged ones can be judged by it.
    """

    tokens: Sequence[torch.Tensor]
    tokenizer: Any
    dtypes: Mapping[str, torch.dtype]
    progress: Progress
    factor: float = FACTOR
    text: Sequence[torch.Tensor] = ()
    steps: int = GREEDY_TOKENS
    _base: list[torch.Tensor] = field(default_factory=list)
    _rounding: tuple[Difference, ...] = ()
    _again: tuple[Difference, ...] = ()
    _sums: tuple[Difference, ...] = ()
    _arithmetic: tuple[Difference, ...] = ()
    _unmerged: list[torch.Tensor] = field(default_factory=list)
    _continued: list[torch.Tensor] = field(default_factory=list)
    _steps: list[torch.Tensor] = field(default_factory=list)
    _perplexities: list[Perplexity] = field(default_factory=list)

    def measure(self, unmerged: Any) -> None:
        """The unmerged model's outputs, and the noise floors of rounding, of sums and of running it again."""
        self.progress.stage(f"validate: {len(self.tokens)} prompts, unmerged, and how far rounding moves them")
        with unmerged.disable_adapter(), running(unmerged):
            self._base = logits(unmerged, self.tokens)
            self._perplexities += self._perplexity("base", unmerged)
        with running(unmerged):
            self._unmerged = logits(unmerged, self.tokens)
        self._again = (self._from_unmerged(logits(unmerged, self.tokens)),)
        self._rounding = tuple(
            draws(unmerged, self.dtypes, lambda: self._from_unmerged(logits(unmerged, self.tokens)))
        )
        self._sums = (self._draw(unmerged, Arithmetic()),)
        self._perplexities += self._perplexity("unmerged", unmerged)
        self.progress.stage("validate: greedy continuations")
        for ids in self._prompts:
            self._continued.append(greedy(unmerged, ids, self.steps))
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
        where = "rounding errors of the output type on the unmerged model, and the order of fp32 sums"
        found = self._from_unmerged(logits(merged, self.tokens))
        parted = parted or self._parted(self._along(merged))
        return ValidationResult(
            checks=tuple(
                decoder_checks(self._floor(where, self._rounding, self._sums), found, parted, self.factor)
            ),
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
        narrow = self._draw(unmerged, InTypes(self.dtypes))
        where = f"rounding errors, and the unmerged model computed in {dtype} against fp32"
        floor = self._floor(where, self._rounding, (narrow,))
        found = self._from_unmerged(logits(loaded, self.tokens))
        parted = self._parted(self._along(loaded))
        checks = decoder_checks(floor, found, parted, self.factor, prefix="loaded_")
        return checks, self._perplexity(f"merged as loaded ({dtype})", loaded)

    def compare_onnx(self, unmerged: Any, graph: Graph) -> list[Check]:
        from lora_export.validation.graphs.runs import OnnxDecoder

        self.progress.stage(f"validate: {graph.arithmetic.words}, measured in PyTorch")
        self._arithmetic = self._sums
        if graph.arithmetic != Arithmetic():
            self._arithmetic = (self._draw(unmerged, graph.arithmetic),)
        exact = None if graph.model is None else logits(graph.model, self.tokens)
        self.progress.stage("validate: ONNX Runtime, the merged graph at several lengths and with its cache")
        runner = OnnxDecoder(graph.paths[0], graph.provider)
        answered = [runner.logits(ids) for ids in self.tokens]
        chosen = [runner.greedy(ids, len(c)) for ids, c in zip(self._prompts, self._continued, strict=True)]
        known = self._from_unmerged(exact) if exact and graph.shifted else None
        where = f"rounding errors, and {graph.arithmetic.words}"
        floor = self._floor(where, self._rounding, *self._noise(graph), known=known)
        found = self._from_unmerged(answered)
        checks = decoder_checks(floor, found, self._parted(chosen), self.factor, graph.prefix)
        return [*checks, *self._graph_checks(graph, exact or self._unmerged, answered, runner)]

    def compare_base(self, unmerged: Any, graph: Graph) -> list[Check]:
        from lora_export.validation.graphs.runs import OnnxDecoder

        runner = OnnxDecoder(graph.paths[0], graph.provider)
        self._arithmetic = (*self._arithmetic, self._draw(unmerged, graph.arithmetic, adapted=False))
        exact = self._base if graph.model is None else logits(graph.model, self.tokens)
        return self._graph_checks(graph, exact, [runner.logits(ids) for ids in self.tokens], runner)

    def _graph_checks(
        self, graph: Graph, exact: list[torch.Tensor], answered: list[torch.Tensor], runner: "OnnxDecoder"
    ) -> list[Check]:
        """One by one through the cache, and all at once with padding, against PyTorch with the graph's numbers."""
        rounding = () if graph.model is not None else (self._rounding,)
        floor = self._floor(graph.arithmetic.words, *self._noise(graph), *rounding)
        one_by_one = compare_logits(exact, answered, self.tokens)
        checks = graph_checks(floor, one_by_one, self.factor, f"{graph.prefix}graph")
        some = sorted(range(len(self.tokens)), key=lambda i: len(self.tokens[i]))[:PADDED]
        tokens = [self.tokens[i] for i in some]
        padded = compare_logits([exact[i] for i in some], runner.padded_logits(tokens), tokens)
        return [*checks, *graph_checks(floor, padded, self.factor, f"{graph.prefix}padded")]

    def effect(self, unmerged: Any, base: Graph, merged: Graph) -> effect.Effect:
        from lora_export.validation.graphs.runs import OnnxDecoder

        graphs = [OnnxDecoder(g.paths[0], g.provider).logits for g in (base, merged)]
        models = (effect.without_adapter(unmerged), effect.of(unmerged), *graphs)
        found = effect.Effect(self._noise_of_16_bits(merged))
        for ids in self.windows:
            found.add(ids, *(logits_of(ids) for logits_of in models))
        return found

    def _noise_of_16_bits(self, graph: Graph) -> float:
        """KL a position that 16-bit arithmetic makes, with the tolerance of all checks; 0 for fp32."""
        nats = largest(d.kl_mean for d in self._arithmetic)
        return self.factor**2 * nats if graph.arithmetic.times > 1 else 0.0

    def _noise(self, graph: Graph) -> list[tuple[Difference, ...]]:
        return [self._arithmetic] * graph.arithmetic.times

    def _draw(self, unmerged: Any, how: "Arithmetic | InTypes", adapted: bool = True) -> Difference:
        """How far arithmetic moves the logits of the unmerged model."""

        def measure(active: bool) -> Difference:
            reference = self._unmerged if active else self._base
            return compare_logits(reference, logits(unmerged, self.tokens), self.tokens)

        return draw(unmerged, how, list(self.dtypes), measure, lambda d: math.isfinite(d.max_abs), adapted)

    @property
    def _prompts(self) -> Sequence[torch.Tensor]:
        return self.tokens[:SAMPLES]

    def _from_unmerged(self, found: list[torch.Tensor]) -> Difference:
        return compare_logits(self._unmerged, found, self.tokens)

    def _floor(self, where: str, *sources: tuple[Difference, ...], known: Difference | None = None) -> Floor:
        scale = largest(float(x.abs().max()) for x in (*self._unmerged, *self._base))
        return Floor((*sources, self._again), scale, where, known)

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
                before = greedy(unmerged, ids, max(1, len(continued) // 2))
            after = greedy(merged, ids, max(1, len(continued) // 2))
            texts = {"prompt": ids, "base": before, "unmerged": continued[: len(after)], "merged": after}
            sample = {k: self.tokenizer.decode(v, skip_special_tokens=True) for k, v in texts.items()}
            samples.append(sample | ({"first_difference": shown[i]} if i in shown else {}))
        return tuple(samples)
