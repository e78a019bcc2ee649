"""How an encoder-decoder is compared: teacher-forced logits, and greedy texts token by token."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_export.contracts import Check, Progress, ValidationResult
from lora_export.validation.comparing.arithmetic import Arithmetic, draw
from lora_export.validation.comparing.logits import (
    Difference,
    Divergence,
    compare_logits,
    greedy_divergences,
    largest,
)
from lora_export.validation.comparing.noise import draws
from lora_export.validation.comparing.subject import Graph, plain, running, takes
from lora_export.validation.comparing.thresholds import FACTOR, Floor, Greedy, decoder_checks, graph_checks
from lora_export.validation.effect.effect import Effect


@dataclass
class Seq2SeqStory:
    """batches: what the encoder gets, as keyword inputs; tokens: for each row of each batch in turn, the ids
    (length,) that the decoder is given, its start token first; steps: how many tokens are generated."""

    batches: Sequence[Mapping[str, torch.Tensor]]
    tokens: Sequence[torch.Tensor]
    steps: int
    tokenizer: Any
    dtypes: Mapping[str, torch.dtype]
    progress: Progress
    factor: float = FACTOR
    _base: list[torch.Tensor] = field(default_factory=list)
    _unmerged: list[torch.Tensor] = field(default_factory=list)
    _rounding: tuple[Difference, ...] = ()
    _sums: tuple[Difference, ...] = ()
    _arithmetic: tuple[Difference, ...] = ()
    _first: list[torch.Tensor] = field(default_factory=list)  # what the base generates
    _wanted: list[torch.Tensor] = field(default_factory=list)
    _steps: list[torch.Tensor] = field(default_factory=list)

    def measure(self, unmerged: Any) -> None:
        self.progress.stage(f"validate: {len(self.tokens)} texts, unmerged, and how far rounding moves them")
        with running(unmerged):
            with unmerged.disable_adapter():
                self._base = self._logits(unmerged)
                self._first = self._generate(unmerged)
            self._unmerged = self._logits(unmerged)
        self._rounding = tuple(draws(unmerged, self.dtypes, lambda: self._from_unmerged(self._logits(unmerged))))
        self._sums = (self._draw(unmerged, Arithmetic()),)
        self._wanted = self._generate(unmerged)
        self._steps = self._logits(unmerged, self._wanted)

    def compare(self, unmerged: Any, merged: Any) -> ValidationResult:
        self.measure(unmerged)
        found = self._from_unmerged(self._logits(merged))
        generated = self._generate(merged)
        along = self._logits(merged, self._wanted)
        where = "rounding errors of the output type on the unmerged model, and the order of fp32 sums"
        floor = self._floor(where, self._rounding, self._sums)
        checks = self._checks(floor, found, along, generated)
        return ValidationResult(tuple(checks), self._samples(self._first, self._wanted, generated), found.kl)

    @property
    def windows(self) -> Sequence[torch.Tensor]:
        """What it says depends on what the encoder is given: a text alone has no perplexity."""
        return ()

    def once(self, model: Any) -> Any:
        first = {k: v[:1] for k, v in self.batches[0].items()}
        return plain(model)(**first, decoder_input_ids=self.tokens[0][None], use_cache=False)

    def compare_onnx(self, unmerged: Any, graph: Graph) -> list[Check]:
        """The exported graphs, run with their caches."""
        from lora_export.validation.graphs.runs import OnnxSeq2Seq

        self.progress.stage(f"validate: {graph.arithmetic.words}, measured in PyTorch")
        self._arithmetic = self._sums
        if graph.arithmetic != Arithmetic():
            self._arithmetic = (self._draw(unmerged, graph.arithmetic),)
        exact = None if graph.model is None else self._logits(graph.model)
        self.progress.stage("validate: ONNX Runtime, encoder and decoder of the merged model")
        runner = OnnxSeq2Seq(graph.paths, graph.provider)
        answered = [runner.logits(*row) for row in self._rows_of(self.tokens)]
        along = [runner.logits(*row) for row in self._rows_of([self._before(ids) for ids in self._wanted])]
        texts = [runner.greedy(inputs, self.tokens[0][:1], self.steps) for inputs in self.batches]
        known = self._from_unmerged(exact) if exact and graph.shifted else None
        where = f"rounding errors, and {graph.arithmetic.words}"
        floor = self._floor(where, self._rounding, *self._noise(graph), known=known)
        found = self._from_unmerged(answered)
        checks = self._checks(floor, found, along, list(torch.cat(texts)), graph.prefix)
        return [*checks, *self._graph_checks(graph, exact or self._unmerged, answered)]

    def compare_base(self, unmerged: Any, graph: Graph) -> list[Check]:
        from lora_export.validation.graphs.runs import OnnxSeq2Seq

        runner = OnnxSeq2Seq(graph.paths, graph.provider)
        self._arithmetic = (*self._arithmetic, self._draw(unmerged, graph.arithmetic, adapted=False))
        exact = self._base if graph.model is None else self._logits(graph.model)
        return self._graph_checks(graph, exact, [runner.logits(*row) for row in self._rows_of(self.tokens)])

    def effect(self, unmerged: Any, base: Graph, merged: Graph) -> Effect:
        """On the teacher-forced texts."""
        from lora_export.validation.graphs.runs import OnnxSeq2Seq

        runners = [OnnxSeq2Seq(g.paths, g.provider) for g in (base, merged)]
        found = Effect(self._noise_of_16_bits(merged))
        rows = zip(self.tokens, self._base, self._unmerged, self._rows_of(self.tokens), strict=True)
        for ids, without, with_adapter, row in rows:
            found.add(ids, without, with_adapter, *(runner.logits(*row) for runner in runners))
        return found

    def _graph_checks(
        self, graph: Graph, exact: Sequence[torch.Tensor], answered: Sequence[torch.Tensor]
    ) -> list[Check]:
        rounding = () if graph.model is not None else (self._rounding,)
        floor = self._floor(graph.arithmetic.words, *self._noise(graph), *rounding)
        return graph_checks(
            floor, compare_logits(exact, answered, self.tokens), self.factor, f"{graph.prefix}graph"
        )

    def _noise_of_16_bits(self, graph: Graph) -> float:
        """KL a position that 16-bit arithmetic makes, with the tolerance of all checks; 0 for fp32."""
        nats = largest(d.kl_mean for d in self._arithmetic)
        return self.factor**2 * nats if graph.arithmetic.times > 1 else 0.0

    def _noise(self, graph: Graph) -> list[tuple[Difference, ...]]:
        return [self._arithmetic] * graph.arithmetic.times

    def _draw(self, unmerged: Any, how: Arithmetic, adapted: bool = True) -> Difference:
        def measure(active: bool) -> Difference:
            reference = self._unmerged if active else self._base
            return compare_logits(reference, self._logits(unmerged), self.tokens)

        return draw(unmerged, how, list(self.dtypes), measure, lambda d: math.isfinite(d.max_abs), adapted)

    def _checks(
        self,
        floor: Floor,
        found: Difference,
        along: Sequence[torch.Tensor],
        generated: Sequence[torch.Tensor],
        prefix: str = "",
    ) -> list[Check]:
        """along: logits at each step of the unmerged model's texts; generated: the other model's own texts."""
        agreement, divergences = greedy_divergences(self._steps, [x.argmax(-1) for x in along])
        parted = Greedy(agreement, divergences, self.tokenizer.decode)
        checks = decoder_checks(floor, found, parted, self.factor, prefix)
        greedy = next(c for c in checks if c.name == f"{prefix}greedy_agreement")
        return [*checks, token_agreement(self._wanted, generated, divergences, greedy, prefix)]

    def _from_unmerged(self, found: Sequence[torch.Tensor]) -> Difference:
        return compare_logits(self._unmerged, found, self.tokens)

    def _floor(self, where: str, *sources: tuple[Difference, ...], known: Difference | None = None) -> Floor:
        return Floor(sources, largest(float(x.abs().max()) for x in (*self._unmerged, *self._base)), where, known)

    def _rows_of(self, tokens: Sequence[torch.Tensor]) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Each row of the inputs, and the ids that its decoder is given."""
        given = iter(tokens)
        for inputs in self.batches:
            for row in range(self._rows(inputs)):
                yield {k: v[row : row + 1] for k, v in inputs.items()}, next(given)

    @torch.inference_mode()
    def _logits(self, model: Any, generated: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """fp32 logits (length, vocabulary) of each row: teacher-forced, or at the steps of what was generated."""
        body = plain(model)
        given = self.tokens if generated is None else [self._before(ids) for ids in generated]
        return [
            body(**inputs, decoder_input_ids=ids[None]).logits[0].float() for inputs, ids in self._rows_of(given)
        ]

    def _before(self, generated: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.tokens[0][:1], generated[:-1]])

    @torch.inference_mode()
    def _generate(self, model: Any) -> list[torch.Tensor]:
        """`steps` greedy tokens (steps,) for each row, a batch at a time with padding and a KV cache."""
        body = plain(model)
        rows: list[torch.Tensor] = []
        for inputs in self.batches:
            mask = {k: v for k, v in inputs.items() if k == "attention_mask" and k in takes(body)}
            encoded = body.get_encoder()(**inputs)
            step = self.tokens[0][:1].expand(self._rows(inputs), 1)
            past, out = None, []
            for _ in range(self.steps):
                result = body(
                    encoder_outputs=encoded, decoder_input_ids=step, past_key_values=past, use_cache=True, **mask
                )
                past = result.past_key_values
                step = result.logits[:, -1:].argmax(-1)
                out.append(step)
            rows += list(torch.cat(out, 1))
        return rows

    @staticmethod
    def _rows(inputs: Mapping[str, torch.Tensor]) -> int:
        return len(next(iter(inputs.values())))

    def _samples(self, *texts: list[torch.Tensor]) -> tuple[dict[str, str], ...]:
        ids = [x["input_ids"][i] for x in self.batches if "input_ids" in x for i in range(self._rows(x))]
        samples = []
        for i, row in enumerate(zip(*texts, strict=True)):
            named = dict(zip(("base", "unmerged", "merged"), row, strict=True))
            prompt = self.tokenizer.decode(ids[i], skip_special_tokens=True) if ids else f"input {i + 1}"
            decoded = {k: self.tokenizer.decode(v, skip_special_tokens=True) for k, v in named.items()}
            samples.append({"prompt": prompt} | decoded)
        return tuple(samples[:3])


def token_agreement(
    wanted: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
    divergences: Sequence[Divergence],
    greedy: Check,
    prefix: str = "",
) -> Check:
    """1 − edits/length of all generated texts, as a word error rate is counted, but of tokens.

    After a tie both texts go their own ways, so what differs is excused exactly where the first differing token is.
    """
    edits = [edit_distance(a.tolist(), b.tolist()) for a, b in zip(wanted, found, strict=True)]
    share = 1 - sum(edits) / max(sum(map(len, wanted)), 1)
    differing = {i for i, n in enumerate(edits) if n}
    excused = greedy.passed and differing <= {d.prompt for d in divergences}
    note = "1 − edit distance / length of the greedy texts, each model continuing its own"
    return Check(f"{prefix}token_agreement", share, 1.0, excused, f"{note}; {greedy.note}" if differing else note)


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and substitutions that turn a into b (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
