"""How a decoder is compared: floors first, then the merged model in fp32, as it is loaded, and as an ONNX graph."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export.contracts import Check, Continuation, Perplexity, ValidationResult
from lora_export.validation.comparing.arithmetic import InTypes
from lora_export.validation.comparing.comparison import SOME, Graph, LogitsComparison
from lora_export.validation.comparing.logits import Difference, compare_logits
from lora_export.validation.comparing.tested_model import plain, running, takes
from lora_export.validation.comparing.thresholds import Greedy, decoder_checks, reported
from lora_export.validation.effect import effect
from lora_export.validation.graphs.runs import OnnxDecoder

RUN_TO_RUN = "the same forward run twice; added to every noise floor"
PADDED = 4  # prompts that are run in one batch, the shortest ones
GREEDY_TOKENS = 64
SURE = 2.0**-14  # of the largest logit: 64 times what the order of fp32 sums changes
BASE = "base_"  # how the names of checks of the base's graph begin
TOKENS_WITHOUT_CACHE = 16  # each of which reads the whole text again
# What transformers' caches raise that a model's layers cannot use: hybrids of attention and recurrence have some.
_UNUSABLE = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(kw_only=True)
class DecoderComparison(LogitsComparison):
    """tokens: the prompts; text: pieces of running text for the perplexities (none: they are left out); steps: how
    many tokens are generated after a prompt."""

    text: Sequence[torch.Tensor] = ()
    steps: int = GREEDY_TOKENS
    _base_text: Sequence[torch.Tensor] = ()  # logits on `text`
    _unmerged_text: Sequence[torch.Tensor] = ()
    _written_by_base: Sequence[torch.Tensor] = ()
    _continued: list[torch.Tensor] = field(default_factory=list)
    _longest_under_errors: Sequence[torch.Tensor] = ()  # logits
    _ran: dict[tuple[Path, ...], "DecoderRun"] = field(default_factory=dict)

    INPUTS = "prompts"

    @property
    def _given(self) -> Mapping[str, object]:
        return {"tokens": self.tokens, "text": self.text, "steps": self.steps}

    def _measure_base(self, unmerged: Any) -> None:
        self._base_text = self._of_base("text", unmerged, self._on_text)

    def _measure_unmerged(self, unmerged: Any) -> None:
        """The longest prompt once more: threads share the most work there, and may add up in another order."""
        self._longest_under_errors = ()
        at = slice(self._longest, self._longest + 1)
        again = logits(unmerged, self.tokens[at])
        self._again = (compare_logits(self._unmerged[at], again, self.tokens[at]),)

    @property
    def _longest(self) -> int:
        return max(range(len(self.tokens)), key=lambda i: len(self.tokens[i]))

    def _under_errors(self, unmerged: Any) -> Iterator[torch.Tensor]:
        """The longest of several prompts under the first draw's errors only. It is half of the work of a draw. The
        largest error is most often elsewhere, and a mean over so many positions hardly varies between draws."""
        for at, ids in enumerate(self.tokens):
            shared = at == self._longest and len(self.tokens) > SOME
            if shared and not self._longest_under_errors:
                self._longest_under_errors = self._shelf(logits(unmerged, [ids]))
            yield from self._longest_under_errors if shared else logits(unmerged, [ids])

    def _continue(self, unmerged: Any) -> None:
        self._unmerged_text = self._shelf(self._on_text(unmerged))
        self.progress.stage("validate: greedy continuations")
        drafts = next((run.tokens for run in self._ran.values()), None) or self._guess(unmerged, self.steps)
        texts = [written(unmerged, ids, self.steps, d) for ids, d in zip(self._prompts, drafts, strict=True)]
        self._continued = [text.tokens for text in texts]
        self._steps = self._shelf(text.logits for text in texts)
        self._written_by_base = self._of_base("greedy texts", unmerged, self._beginnings)

    def _beginnings(self, base: Any) -> Iterator[torch.Tensor]:
        drafts = self._guess(base, self._shown)
        return (written(base, *at).tokens for at in zip(self._prompts, repeat(self._shown), drafts))

    def _guess(self, model: Any, count: int) -> Sequence[torch.Tensor | None]:
        """Drafts of a model's greedy texts."""
        return guesses(model, self._prompts, count)

    @property
    def _shown(self) -> int:
        """Tokens of a greedy text that a report shows."""
        return max(1, self.steps // 2)

    def _compared(self, unmerged: Any, merged: Any) -> ValidationResult:
        followed = [logits for _, logits in self._followed(merged)]
        parted = self._parted([logits.argmax(-1) for logits in followed])
        self._merged = self._shelf(self._outputs(merged))
        judged = self._judged(self._merged, parted)
        perplexities = [
            *self._perplexity("base", self._base_text),
            *self._perplexity("unmerged", self._unmerged_text),
            *self._perplexity("merged", self._on_text(merged)),
        ]
        return ValidationResult(
            checks=(*judged.checks, reported("run_to_run_max_abs", self._again[0].max_abs, RUN_TO_RUN)),
            samples=self._samples(merged, followed, parted),
            kl_by_position=judged.kl_by_position,
            perplexities=tuple(perplexities),
        )

    def judge(self, merged: Any) -> ValidationResult:
        """The checks of a merged model alone, after `measure`."""
        return self._judged(self._outputs(merged), self._parted(self._follow(merged)))

    def _judged(self, outputs: Iterable[torch.Tensor], parted: Greedy) -> ValidationResult:
        where = "rounding errors of the output type on the unmerged model, and the order of fp32 sums"
        apart = self._from_unmerged(outputs)
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
        return checks, self._perplexity(f"merged as loaded ({dtype})", self._on_text(loaded))

    def _outputs(self, model: Any, first: int | None = None) -> Iterator[torch.Tensor]:
        return logits(model, self.tokens[:first])

    def _on_text(self, model: Any) -> Iterator[torch.Tensor]:
        return logits(model, self.text)

    def run_first(self, paths: tuple[Path, ...], provider: str) -> None:
        """Run a graph before any model that is compared with it needs the memory. Its greedy texts are a guess at
        the unmerged model's."""
        self.progress.stage("validate: the exported graph in ONNX Runtime")
        self._ran[paths] = self._run(paths, provider, greedy=True)

    def _session(self, paths: tuple[Path, ...], provider: str) -> Any:
        return OnnxDecoder(paths[0], provider)

    def _run(self, paths: tuple[Path, ...], provider: str, greedy: bool) -> "DecoderRun":
        """All that is asked of a graph, in one session, which is closed again."""
        session = self._session(paths, provider)
        answers = self._shelf(session.logits(ids) for ids in self.tokens)
        padded = self._shelf(session.padded_logits(self._padded_tokens(session.equal_rows)))
        texts = session.greedy(self._prompts, self.steps) if greedy else []
        low = answers if self._reads_prompts else self._shelf(session.logits(ids) for ids in self.text)
        return DecoderRun(answers, padded, session.equal_rows, texts, low)

    def _runner(self, graph: Graph) -> "DecoderRun":
        return self._ran.get(graph.paths) or self._run(graph.paths, graph.provider, not graph.prefix.endswith(BASE))

    def _answers(self, runner: "DecoderRun") -> Sequence[torch.Tensor]:
        return runner.answers

    def _for_effect(self, runner: "DecoderRun", answers: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return runner.low

    def _low_alone(self, graph: Graph) -> Iterator[torch.Tensor]:
        session = self._session(graph.paths, graph.provider)
        return (session.logits(ids) for ids in self.windows)

    @property
    def _reads_prompts(self) -> bool:
        """Whether the effect is measured on the prompts, because there is no text for it."""
        return self.windows is not self.text

    def _judge_graph(
        self, graph: Graph, runner: Any, answers: Sequence[torch.Tensor], known: Difference | None, where: str
    ) -> list[Check]:
        floor = self._floor(where, self._rounding, *self._noise(graph), known=known)
        parted = self._parted(runner.tokens)
        return decoder_checks(floor, self._from_unmerged(answers), parted, self.factor, graph.prefix)

    def _beside(
        self, graph: Graph, exact: Sequence[torch.Tensor], answers: Sequence[torch.Tensor], runner: "DecoderRun"
    ) -> dict[str, Difference]:
        """One by one through the cache, and all at once with padding."""
        some, tokens = self._padded_prompts, self._padded_tokens(runner.equal_rows)
        pairs = zip(some, tokens, strict=True)
        padded = compare_logits((exact[i][: len(ids)] for i, ids in pairs), runner.padded, tokens)
        return {**super()._beside(graph, exact, answers, runner), "padded": padded}

    @property
    def _padded_prompts(self) -> list[int]:
        return sorted(range(len(self.tokens)), key=lambda i: len(self.tokens[i]))[:PADDED]

    def _padded_tokens(self, equal_rows: bool) -> list[torch.Tensor]:
        tokens = [self.tokens[i] for i in self._padded_prompts]
        return [ids[: min(map(len, tokens))] for ids in tokens] if equal_rows else tokens

    def effect(self, merged: Graph) -> effect.Effect:
        prompts = self._reads_prompts
        models = (self._base, self._unmerged) if prompts else (self._base_text, self._unmerged_text)
        low, low_base = self._low
        return effect.measured_by(self.windows, (*models, low_base, low), self._noise_of_16_bits(merged))

    def recall(self, unmerged: Any) -> None:
        if self._reads_prompts:
            super().recall(unmerged)
            return
        with running(unmerged):
            self._base_text = self._of_base("text", unmerged, self._on_text)
            self._unmerged_text = self._shelf(self._on_text(unmerged))

    @property
    def _prompts(self) -> Sequence[torch.Tensor]:
        return self.tokens[:SOME]

    def _from_unmerged(self, other: Iterable[torch.Tensor]) -> Difference:
        return self._apart(self._unmerged, other)

    def _perplexity(self, name: str, outputs: Iterable[torch.Tensor]) -> list[Perplexity]:
        """outputs: logits on the text."""
        return [effect.perplexity_of(name, outputs, self.text)] if self.text else []

    def _followed(self, model: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(the prompt, a model's logits at each step of the unmerged model's continuation of it)."""
        for ids, continuation in zip(self._prompts, self._continued, strict=True):
            yield ids, greedy_steps(model, ids, continuation)

    def _follow(self, model: Any) -> list[torch.Tensor]:
        """What a model would have chosen at each step of the unmerged model's continuations."""
        return [steps.argmax(-1) for _, steps in self._followed(model)]

    def _samples(self, merged: Any, followed: Sequence[torch.Tensor], parted: Greedy) -> tuple[Continuation, ...]:
        """followed: the merged model's logits at each step of the unmerged model's texts."""
        samples = []
        shown = {d.prompt: parted.show(d) for d in parted.divergences}
        for i, (ids, continued) in enumerate(zip(self._prompts, self._continued, strict=True)):
            begun = continued[: self._shown]
            after = written(merged, ids, self._shown, begun, followed[i][: self._shown]).tokens
            texts = {"prompt": ids, "base": self._written_by_base[i], "unmerged": begun, "merged": after}
            decoded = {k: self.tokenizer.decode(v, skip_special_tokens=True) for k, v in texts.items()}
            samples.append(Continuation(**decoded, first_difference=shown.get(i)))
        return tuple(samples)


@dataclass(frozen=True)
class DecoderRun:
    """What a graph answered: logits on the prompts one by one, and of some in one padded batch, whose rows had to
    be equally long or not; its greedy texts; logits on the windows."""

    answers: Sequence[torch.Tensor]
    padded: Sequence[torch.Tensor]
    equal_rows: bool
    tokens: Sequence[torch.Tensor]
    low: Sequence[torch.Tensor]


@torch.inference_mode()
def logits(model: Any, tokens: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """fp32 logits (length, vocabulary) of each prompt, one prompt at a time so that no padding enters."""
    for ids in tokens:
        yield _forward(model, ids).logits[0].float()


def _forward(model: Any, ids: torch.Tensor) -> Any:
    """One forward on a whole text (length,), without a cache where the model can have one."""
    body = plain(model)
    switch = {"use_cache": False} if "use_cache" in takes(body) else {}
    return body(input_ids=ids[None], **switch)


def has_cache(body: Any) -> bool:
    """Whether a transformers model takes a KV cache; what it takes may yet not work."""
    return {"past_key_values", "use_cache"} <= takes(body)


@dataclass(frozen=True)
class Written:
    """A greedy text (count,), and the logits (count, vocabulary) at each of its steps, in one forward."""

    tokens: torch.Tensor
    logits: torch.Tensor


def written(
    model: Any,
    ids: torch.Tensor,
    count: int,
    draft: torch.Tensor | None = None,
    followed: torch.Tensor | None = None,
) -> Written:
    """What `greedy` gives. draft: tokens (count,) that the model is likely to write; followed: its logits at their
    steps, if known.

    A token of the draft is the model's own where its logits, which one forward gives for all steps, prefer it by
    far more than the order of sums can change; from the first one on that is not, the model writes itself.
    """
    begun = 0
    if draft is not None:
        followed = greedy_steps(model, ids, draft) if followed is None else followed
        begun = _agreed(followed, draft)
        if begun == count:
            return Written(draft, followed)
    tokens = greedy(model, ids, count, *([] if draft is None else [draft[:begun]]))
    return Written(tokens, greedy_steps(model, ids, tokens))


@torch.inference_mode()
def guesses(model: Any, prompts: Sequence[torch.Tensor], count: int) -> Sequence[torch.Tensor | None]:
    """`count` tokens after each prompt (length,), all written in one batch, which reads the weights once for all;
    None for each where the model cannot.

    The shorter prompts are padded on the left. Not every model takes that as it should: `written` takes these for
    drafts.
    """
    body, longest = plain(model), max(map(len, prompts))
    if not has_cache(body) or "attention_mask" not in takes(body):
        return [None] * len(prompts)
    step = torch.stack([nn.functional.pad(ids, (longest - len(ids), 0)) for ids in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(ids)).long() for ids in prompts])
    past, out = None, []
    try:
        for _ in range(count):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -step.shape[1] :]
            given = {"position_ids": positions} if "position_ids" in takes(body) else {}
            result = body(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True, **given)
            past, step = result.past_key_values, result.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            out.append(step)
    except _UNUSABLE:
        return [None] * len(prompts)
    return list(torch.cat(out, 1))


def _agreed(steps: torch.Tensor, draft: torch.Tensor) -> int:
    """How many tokens of a draft are surely those of a model with these logits (count, vocabulary)."""
    best = steps.topk(min(2, steps.shape[-1]), -1).values
    sure = best[:, 0] - best[:, -1] > SURE * steps.abs().amax(-1)
    differing = (~(sure & (steps.argmax(-1) == draft))).nonzero()
    return int(differing[0]) if len(differing) else len(draft)


@torch.inference_mode()
def greedy(
    model: Any, ids: torch.Tensor, count: int = GREEDY_TOKENS, begun: torch.Tensor | None = None
) -> torch.Tensor:
    """`count` greedy tokens after the prompt, shape (count,); end-of-text does not stop it.

    With a KV cache where the model has one that works. Others keep a state of another kind, each called otherwise,
    or none: they read the whole text again for each token. begun: the first of the tokens, if they are known.
    """
    known = ids[:0] if begun is None else begun
    body, text = plain(model), torch.cat([ids, known])
    if has_cache(body):
        try:
            return torch.cat([known, _with_cache(body, text, count - len(known))])
        except _UNUSABLE:
            pass  # without a cache the model may run all the same; if not, that tells why
    for _ in range(count - len(known)):
        text = torch.cat([text, _forward(model, text).logits[0, -1:].argmax(-1)])
    return text[len(ids) :]


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
