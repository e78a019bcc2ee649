"""How an encoder-decoder is compared: teacher-forced logits, and greedy texts token by token."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_export.contracts import Check, Continuation, ValidationResult
from lora_export.validation.comparing.comparison import SOME, Graph, LogitsComparison
from lora_export.validation.comparing.logits import Difference, Divergence
from lora_export.validation.comparing.tested_model import plain, takes
from lora_export.validation.comparing.thresholds import Floor, decoder_checks
from lora_export.validation.effect.effect import Effect
from lora_export.validation.graphs.runs import OnnxSeq2Seq


@dataclass(kw_only=True)
class Seq2SeqComparison(LogitsComparison):
    """batches: what the encoder gets, as keyword inputs; tokens: for each row of each batch in turn, the ids
    (length,) that the decoder is given, its start token first; steps: how many tokens are generated."""

    batches: Sequence[Mapping[str, torch.Tensor]]
    steps: int
    _written_by_base: Sequence[torch.Tensor] = ()
    _written: list[torch.Tensor] = field(default_factory=list)  # by the unmerged model

    INPUTS = "texts"

    @property
    def _given(self) -> Mapping[str, object]:
        return {"batches": self.batches, "tokens": self.tokens, "steps": self.steps}

    def _measure_base(self, unmerged: Any) -> None:
        self._written_by_base = self._of_base("greedy texts", unmerged, self._generate)

    def _continue(self, unmerged: Any) -> None:
        self._written = self._generate(unmerged)
        self._steps = self._logits(unmerged, self._rows_of(self._before_written()))

    def _compared(self, unmerged: Any, merged: Any) -> ValidationResult:
        self._merged = self._shelf(self._outputs(merged))
        apart = self._apart(self._unmerged, self._merged)
        generated = self._generate(merged)
        steps = self._logits(merged, self._rows_of(self._before_written()))
        where = "rounding errors of the output type on the unmerged model, and the order of fp32 sums"
        checks = self._checks(self._floor(where, self._rounding, self._sums), apart, steps, generated)
        samples = self._samples(self._written_by_base, self._written, generated)
        return ValidationResult(tuple(checks), samples, apart.kl)

    def once(self, model: Any) -> Any:
        first = {k: v[:1] for k, v in self.batches[0].items()}
        return plain(model)(**first, decoder_input_ids=self.tokens[0][None], use_cache=False)

    def _runner(self, graph: Graph) -> OnnxSeq2Seq:
        return OnnxSeq2Seq(graph.paths, graph.provider)

    def _answers(self, runner: OnnxSeq2Seq) -> Iterator[torch.Tensor]:
        return (runner.logits(*row) for row in self._rows_of(self.tokens))

    def _judge_graph(
        self, graph: Graph, runner: Any, answers: Sequence[torch.Tensor], known: Difference | None, where: str
    ) -> list[Check]:
        steps = [runner.logits(*row) for row in self._rows_of(self._before_written())]
        texts = [runner.greedy(inputs, self.tokens[0][:1], self.steps) for inputs in self.batches]
        floor = self._floor(where, self._rounding, *self._noise(graph), known=known)
        apart = self._apart(self._unmerged, answers)
        return self._checks(floor, apart, steps, list(torch.cat(texts)), graph.prefix)

    def effect(self, merged: Graph) -> Effect:
        """On the teacher-forced texts."""
        effect = Effect(self._noise_of_16_bits(merged))
        low, low_base = self._low
        for at in zip(self.tokens, self._base, self._unmerged, low_base, low, strict=True):
            effect.add(*at)
        return effect

    def _checks(
        self,
        floor: Floor,
        apart: Difference,
        steps: Sequence[torch.Tensor],
        generated: Sequence[torch.Tensor],
        prefix: str = "",
    ) -> list[Check]:
        """steps: logits at each step of the unmerged model's texts; generated: the other model's own texts."""
        parted = self._parted([x.argmax(-1) for x in steps])
        checks = decoder_checks(floor, apart, parted, self.factor, prefix)
        greedy = next(c for c in checks if c.name == f"{prefix}greedy_agreement")
        return [*checks, token_agreement(self._written, generated, parted.divergences, greedy, prefix)]

    def _rows_of(self, tokens: Sequence[torch.Tensor]) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Each row of the inputs, and the ids that its decoder is given."""
        given = iter(tokens)
        for inputs in self.batches:
            for row in range(_rows(inputs)):
                yield {k: v[row : row + 1] for k, v in inputs.items()}, next(given)

    def _outputs(self, model: Any, first: int | None = None) -> list[torch.Tensor]:
        """Teacher-forced."""
        return self._logits(model, list(self._rows_of(self.tokens))[:first])

    @torch.inference_mode()
    def _logits(
        self, model: Any, rows: Iterable[tuple[dict[str, torch.Tensor], torch.Tensor]]
    ) -> list[torch.Tensor]:
        """fp32 logits (length, vocabulary) of each row of the inputs with its ids."""
        body = plain(model)
        return [body(**inputs, decoder_input_ids=ids[None]).logits[0].float() for inputs, ids in rows]

    def _before_written(self) -> list[torch.Tensor]:
        """What the decoder has read at each step of the unmerged model's texts."""
        return [torch.cat([self.tokens[0][:1], ids[:-1]]) for ids in self._written]

    @torch.inference_mode()
    def _generate(self, model: Any) -> list[torch.Tensor]:
        """`steps` greedy tokens (steps,) for each row, a batch at a time with padding and a KV cache."""
        body = plain(model)
        rows: list[torch.Tensor] = []
        for inputs in self.batches:
            mask = {k: v for k, v in inputs.items() if k == "attention_mask" and k in takes(body)}
            encoded = body.get_encoder()(**inputs)
            step = self.tokens[0][:1].expand(_rows(inputs), 1)
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

    def _samples(self, *texts: Sequence[torch.Tensor]) -> tuple[Continuation, ...]:
        ids = [x["input_ids"][i] for x in self.batches if "input_ids" in x for i in range(_rows(x))]
        samples = []
        for i, row in enumerate(zip(*texts, strict=True)):
            named = dict(zip(("base", "unmerged", "merged"), row, strict=True))
            prompt = self.tokenizer.decode(ids[i], skip_special_tokens=True) if ids else f"input {i + 1}"
            decoded = {k: self.tokenizer.decode(v, skip_special_tokens=True) for k, v in named.items()}
            samples.append(Continuation(prompt, **decoded))
        return tuple(samples[:SOME])


def _rows(inputs: Mapping[str, torch.Tensor]) -> int:
    return len(next(iter(inputs.values())))


def token_agreement(
    expected: Sequence[torch.Tensor],
    written: Sequence[torch.Tensor],
    divergences: Sequence[Divergence],
    greedy: Check,
    prefix: str = "",
) -> Check:
    """1 − edits/length of all generated texts, as a word error rate is counted, but of tokens.

    After a tie both texts go their own ways, so what differs is excused exactly where the first differing token is.
    """
    edits = [edit_distance(a.tolist(), b.tolist()) for a, b in zip(expected, written, strict=True)]
    share = 1 - sum(edits) / max(sum(map(len, expected)), 1)
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
