"""How a decoder is compared: floors first, then the merged model in fp32, as it is loaded, and as an ONNX graph."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_export.contracts import Check, Continuation, Perplexity, ValidationResult
from lora_export.validation.comparing.arithmetic import InTypes
from lora_export.validation.comparing.comparison import SOME, Graph, LogitsComparison
from lora_export.validation.comparing.logits import Difference, compare_logits
from lora_export.validation.comparing.tested_model import plain, running, takes
from lora_export.validation.comparing.thresholds import Greedy, decoder_checks, graph_checks, reported
from lora_export.validation.effect import effect
from lora_export.validation.graphs.runs import OnnxDecoder

RUN_TO_RUN = "the same forward run twice; added to every noise floor"
PADDED = 4  # prompts that are run in one batch, the shortest ones
GREEDY_TOKENS = 64
TOKENS_WITHOUT_CACHE = 16  # each of which reads the whole text again
# What transformers' caches raise that a model's layers cannot use: hybrids of attention and recurrence have some.
_UNUSABLE = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(kw_only=True)
class DecoderComparison(LogitsComparison):
    """tokens: the prompts; text: pieces of running text for the perplexities (none: they are left out); steps: how
    many tokens are generated after a prompt."""

    text: Sequence[torch.Tensor] = ()
    steps: int = GREEDY_TOKENS
    _recalled: tuple[effect.LogitsOf, effect.LogitsOf] | None = None
    _continued: list[torch.Tensor] = field(default_factory=list)
    _perplexities: list[Perplexity] = field(default_factory=list)

    INPUTS = "prompts"
    KEEPS_ANSWERS = False  # the effect is measured on windows of the text

    def _measure_base(self, base: Any) -> None:
        self._perplexities += self._perplexity("base", base)

    def _measure_unmerged(self, unmerged: Any) -> None:
        self._again = (self._from_unmerged(self._outputs(unmerged)),)

    def _continue(self, unmerged: Any) -> None:
        self._perplexities += self._perplexity("unmerged", unmerged)
        self.progress.stage("validate: greedy continuations")
        for ids in self._prompts:
            self._continued.append(greedy(unmerged, ids, self.steps))
            self._steps.append(greedy_steps(unmerged, ids, self._continued[-1]))

    def _compared(self, unmerged: Any, merged: Any) -> ValidationResult:
        parted = self._parted(self._follow(merged))
        judged = self.judge(merged, parted)
        return ValidationResult(
            checks=(*judged.checks, reported("run_to_run_max_abs", self._again[0].max_abs, RUN_TO_RUN)),
            samples=self._samples(unmerged, merged, parted),
            kl_by_position=judged.kl_by_position,
            perplexities=(*self._perplexities, *self._perplexity("merged", merged)),
        )

    def judge(self, merged: Any, parted: Greedy | None = None) -> ValidationResult:
        """The checks of a merged model alone, after `measure`. parted: its continuations, if known."""
        where = "rounding errors of the output type on the unmerged model, and the order of fp32 sums"
        apart = self._from_unmerged(self._outputs(merged))
        parted = parted or self._parted(self._follow(merged))
        floor = self._floor(where, self._rounding, self._sums)
        checks = decoder_checks(floor, apart, parted, self.factor)
        return ValidationResult(tuple(checks), kl_by_position=apart.kl)

    @property
    def windows(self) -> Sequence[torch.Tensor]:
        """The text, or the prompts where none can be read: ids (length,); all but the first are predicted."""
        return self.text or self.tokens

    def once(self, model: Any) -> Any:
        return model(input_ids=max(self.tokens, key=len)[None], use_cache=False)

    def compare_loaded(self, unmerged: Any, loaded: Any, dtype: str) -> tuple[list[Check], list[Perplexity]]:
        """The merged model in its own type, weights and arithmetic, against the unmerged one in fp32."""
        self.progress.stage(f"validate: the merged model as it will be loaded ({dtype})")
        narrow = self._draw(unmerged, InTypes(self.dtypes))
        where = f"rounding errors, and the unmerged model computed in {dtype} against fp32"
        floor = self._floor(where, self._rounding, (narrow,))
        apart = self._from_unmerged(self._outputs(loaded))
        checks = decoder_checks(floor, apart, self._parted(self._follow(loaded)), self.factor, prefix="loaded_")
        return checks, self._perplexity(f"merged as loaded ({dtype})", loaded)

    def _outputs(self, model: Any, first: int | None = None) -> list[torch.Tensor]:
        return logits(model, self.tokens[:first])

    def _runner(self, graph: Graph) -> OnnxDecoder:
        return OnnxDecoder(graph.paths[0], graph.provider)

    def _answers(self, runner: OnnxDecoder) -> list[torch.Tensor]:
        return [runner.logits(ids) for ids in self.tokens]

    def _judge_graph(
        self, graph: Graph, runner: Any, answers: list[torch.Tensor], known: Difference | None, where: str
    ) -> list[Check]:
        tokens = [runner.greedy(ids, len(c)) for ids, c in zip(self._prompts, self._continued, strict=True)]
        floor = self._floor(where, self._rounding, *self._noise(graph), known=known)
        return decoder_checks(floor, self._from_unmerged(answers), self._parted(tokens), self.factor, graph.prefix)

    def _graph_checks(
        self, graph: Graph, exact: list[torch.Tensor], answers: list[torch.Tensor], runner: Any
    ) -> list[Check]:
        """One by one through the cache, and all at once with padding."""
        checks = super()._graph_checks(graph, exact, answers, runner)
        some = sorted(range(len(self.tokens)), key=lambda i: len(self.tokens[i]))[:PADDED]
        longest = min(len(self.tokens[i]) for i in some) if runner.equal_rows else None
        tokens = [self.tokens[i][:longest] for i in some]
        padded = compare_logits([exact[i][:longest] for i in some], runner.padded_logits(tokens), tokens)
        floor = self._graph_floor(graph)
        return [*checks, *graph_checks(floor, padded, self.factor, f"{graph.prefix}padded")]

    def effect(self, unmerged: Any, base: Graph, merged: Graph) -> effect.Effect:
        graphs = [self._runner(graph).logits for graph in (base, merged)]
        models = (*(self._recalled or (effect.without_adapter(unmerged), effect.of(unmerged))), *graphs)
        return effect.measured(self.windows, models, self._noise_of_16_bits(merged))

    def recall(self, unmerged: Any, scratch: Path) -> None:
        with running(unmerged):
            models = effect.without_adapter(unmerged), effect.of(unmerged)
            kept = [effect.stored(m, self.windows, scratch / n) for n, m in zip(("B", "M"), models, strict=True)]
        self._recalled = kept[0], kept[1]

    @property
    def _prompts(self) -> Sequence[torch.Tensor]:
        return self.tokens[:SOME]

    def _from_unmerged(self, other: list[torch.Tensor]) -> Difference:
        return self._apart(self._unmerged, other)

    def _perplexity(self, name: str, model: Any) -> list[Perplexity]:
        if not self.text:
            return []
        return [effect.perplexity(name, lambda ids: logits(model, [ids])[0], self.text)]

    def _follow(self, model: Any) -> list[torch.Tensor]:
        """What a model would have chosen at each step of the unmerged model's continuations."""
        pairs = zip(self._prompts, self._continued, strict=True)
        return [greedy_steps(model, ids, continuation).argmax(-1) for ids, continuation in pairs]

    def _samples(self, unmerged: Any, merged: Any, parted: Greedy) -> tuple[Continuation, ...]:
        samples = []
        shown = {d.prompt: parted.show(d) for d in parted.divergences}
        for i, (ids, continued) in enumerate(zip(self._prompts, self._continued, strict=True)):
            with unmerged.disable_adapter():
                before = greedy(unmerged, ids, max(1, len(continued) // 2))
            after = greedy(merged, ids, max(1, len(continued) // 2))
            texts = {"prompt": ids, "base": before, "unmerged": continued[: len(after)], "merged": after}
            decoded = {k: self.tokenizer.decode(v, skip_special_tokens=True) for k, v in texts.items()}
            samples.append(Continuation(**decoded, first_difference=shown.get(i)))
        return tuple(samples)


@torch.inference_mode()
def logits(model: Any, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """fp32 logits (length, vocabulary) of each prompt, one prompt at a time so that no padding enters."""
    return [_forward(model, ids).logits[0].float() for ids in tokens]


def _forward(model: Any, ids: torch.Tensor) -> Any:
    """One forward on a whole text (length,), without a cache where the model can have one."""
    body = plain(model)
    switch = {"use_cache": False} if "use_cache" in takes(body) else {}
    return body(input_ids=ids[None], **switch)


def has_cache(body: Any) -> bool:
    """Whether a transformers model takes a KV cache; what it takes may yet not work."""
    return {"past_key_values", "use_cache"} <= takes(body)


@torch.inference_mode()
def greedy(model: Any, ids: torch.Tensor, count: int = GREEDY_TOKENS) -> torch.Tensor:
    """`count` greedy tokens after the prompt, shape (count,); end-of-text does not stop it.

    With a KV cache where the model has one that works. Others keep a state of another kind, each called otherwise,
    or none: they read the whole text again for each token.
    """
    body = plain(model)
    if has_cache(body):
        try:
            return _with_cache(body, ids, count)
        except _UNUSABLE:
            pass  # without a cache the model may run all the same; if not, that tells why
    out = ids
    for _ in range(count):
        out = torch.cat([out, _forward(model, out).logits[0, -1:].argmax(-1)])
    return out[len(ids) :]


def _with_cache(body: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    out, past, step = [], None, ids[None]
    for _ in range(count):
        result = body(input_ids=step, past_key_values=past, use_cache=True)
        past = result.past_key_values
        if past is None:
            raise ValueError("the model returns no cache")
        step = result.logits[:, -1].argmax(-1, keepdim=True)
        out.append(step[0])
    return torch.cat(out)


@torch.inference_mode()
def greedy_steps(model: Any, ids: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
    """Logits (count, vocabulary) at each step of a given continuation, in one forward."""
    steps: torch.Tensor = _forward(model, torch.cat([ids, continuation[:-1]])).logits[0, len(ids) - 1 :].float()
    return steps
