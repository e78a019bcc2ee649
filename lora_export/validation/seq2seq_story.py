"""How an encoder-decoder is compared: teacher-forced logits, and greedy texts token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_export.contracts import Check, Progress, ValidationResult
from lora_export.errors import InputError
from lora_export.validation.compare import Difference, Divergence, compare_logits, greedy_divergences
from lora_export.validation.noise import DRAWS, rounding_noise
from lora_export.validation.subject import plain, takes
from lora_export.validation.thresholds import FACTOR, Floor, Greedy, decoder_checks


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

    def compare(self, unmerged: Any, merged: Any) -> ValidationResult:
        self.progress.stage("validate: noise floor of the rounding, without any adapter")
        with unmerged.disable_adapter():
            self._base = self._logits(unmerged)
            before = self._generate(unmerged)
            rounding: list[Difference] = []
            for seed in range(DRAWS):
                with rounding_noise(unmerged, self.dtypes, seed):
                    rounding.append(compare_logits(self._base, self._logits(unmerged), self.tokens))
        scale = max(float(x.abs().max()) for x in self._base)
        where = "rounding errors of the output type on the base, no adapter"
        floor = Floor((tuple(rounding),), scale, where)
        self.progress.stage(f"validate: {len(self.tokens)} texts, teacher-forced and generated")
        found = compare_logits(self._logits(unmerged), self._logits(merged), self.tokens)
        wanted, generated = self._generate(unmerged), self._generate(merged)
        steps = self._logits(unmerged, wanted)
        chosen = [x.argmax(-1) for x in self._logits(merged, wanted)]
        agreement, divergences = greedy_divergences(steps, chosen)
        parted = Greedy(agreement, divergences, self.tokenizer.decode)
        checks = decoder_checks(floor, found, parted, self.factor)
        greedy = next(c for c in checks if c.name == "greedy_agreement")
        checks.append(token_agreement(wanted, generated, divergences, greedy))
        return ValidationResult(tuple(checks), self._samples(before, wanted, generated), found.kl)

    @property
    def windows(self) -> Sequence[torch.Tensor]:
        """What it says depends on what the encoder is given: a text alone has no perplexity."""
        return ()

    def once(self, model: Any) -> Any:
        first = {k: v[:1] for k, v in self.batches[0].items()}
        return plain(model)(**first, decoder_input_ids=self.tokens[0][None], use_cache=False)

    def compare_onnx(self, model: Path, base: Path, provider: str) -> list[Check]:
        raise InputError("ONNX graphs of encoder-decoders are not validated", where=model)

    @torch.inference_mode()
    def _logits(self, model: Any, generated: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """fp32 logits (length, vocabulary) of each row: teacher-forced, or at the steps of what was generated."""
        body = plain(model)
        given = iter(self.tokens if generated is None else [self._before(ids) for ids in generated])
        found = []
        for inputs in self.batches:
            for row in range(self._rows(inputs)):
                one = {k: v[row : row + 1] for k, v in inputs.items()}
                found.append(body(**one, decoder_input_ids=next(given)[None]).logits[0].float())
        return found

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
    wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], divergences: Sequence[Divergence], greedy: Check
) -> Check:
    """1 − edits/length of all generated texts, as a word error rate is counted, but of tokens.

    After a tie both texts go their own ways, so what differs is excused exactly where the first differing token is.
    """
    edits = [edit_distance(a.tolist(), b.tolist()) for a, b in zip(wanted, found, strict=True)]
    share = 1 - sum(edits) / max(sum(map(len, wanted)), 1)
    differing = {i for i, n in enumerate(edits) if n}
    excused = greedy.passed and differing <= {d.prompt for d in divergences}
    note = "1 − edit distance / length of the greedy texts, each model continuing its own"
    return Check("token_agreement", share, 1.0, excused, f"{note}; {greedy.note}" if differing else note)


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and substitutions that turn a into b (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
