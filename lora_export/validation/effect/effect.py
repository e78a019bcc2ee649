"""What an adapter does to a decoder's outputs, and how much of it a model in lower precision still does.

Logits are taken a window of the text at a time, so that memory does not grow with the text.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_export.contracts import AdapterSurvival, Perplexity
from lora_export.validation.comparing.logits import blocks_of, of_next
from lora_export.validation.comparing.thresholds import LARGEST_NLL

LogitsOf = Callable[[torch.Tensor], torch.Tensor]  # ids (length,) → logits (length, vocabulary)
NO_EFFECT = 1e-8  # nats of symmetric KL a position, which two fp32 forwards of one model may show


def of(model: Any) -> LogitsOf:
    """The logits of a transformers model (or PEFT's unmerged one)."""

    @torch.inference_mode()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
        return answer

    return logits


def without_adapter(unmerged: Any) -> LogitsOf:
    """The logits of the base inside PEFT's unmerged model."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with unmerged.disable_adapter():
            return of(unmerged)(ids)

    return logits


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """float64 log-probabilities. A logit that is no number counts as impossible: fp16 overflows to such."""
    return torch.log_softmax(logits.double().nan_to_num_(nan=-1e4, posinf=1e4, neginf=-1e4), -1)


def divergence(p: torch.Tensor, q: torch.Tensor, likely: torch.Tensor | None = None) -> torch.Tensor:
    """KL(p‖q) in nats at each position, (length,); p, q: log-probabilities (length, vocabulary); likely: e^p, where
    it is known."""
    return ((p.exp() if likely is None else likely) * (p - q)).sum(-1).clamp_min(0)


def _likelihood(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """The log-probability of each next token, from logits (length, vocabulary), without those of all others."""
    wide = logits.double()
    return of_next(wide, following) - wide.logsumexp(-1)


def surprise(of_tokens: Sequence[torch.Tensor]) -> float:
    """Negative log-likelihood of a text in nats; of_tokens: what `of_next` gives, block by block. No token follows
    the last position."""
    return float(-torch.cat(list(of_tokens))[:-1].sum())


def perplexity(name: str, logits_of: LogitsOf, windows: Sequence[torch.Tensor]) -> Perplexity:
    """exp of the mean negative log-likelihood, in float64, on windows of a text: (length,) ids each, of which the
    first is not predicted."""
    return perplexity_of(name, map(logits_of, windows), windows)


def perplexity_of(name: str, logits: Iterable[torch.Tensor], windows: Sequence[torch.Tensor]) -> Perplexity:
    """The same of the logits (length, vocabulary) on each window."""
    total = 0.0
    for whole, ids in zip(logits, windows, strict=True):
        at = zip(blocks_of(whole), _following(ids), strict=True)
        total += surprise([_likelihood(rows, following) for rows, following in at])
    return as_perplexity(name, total, predicted(windows))


def _following(ids: torch.Tensor) -> Sequence[torch.Tensor]:
    """The token after each, block by block; after the last any."""
    return blocks_of(ids.roll(-1))


def as_perplexity(name: str, surprise: float, tokens: int) -> Perplexity:
    return Perplexity(name, math.exp(min(surprise / tokens, LARGEST_NLL)), tokens)


def predicted(windows: Sequence[torch.Tensor]) -> int:
    return sum(len(ids) - 1 for ids in windows)


def distance(reference: LogitsOf, model: LogitsOf, windows: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Of a model on a text from a reference: (its perplexity, the mean KL(reference‖model) in nats)."""
    lost, nats = 0.0, 0.0
    for ids in windows:
        apart, tokens = [], []
        for a, b, following in zip(blocks_of(reference(ids)), blocks_of(model(ids)), _following(ids), strict=True):
            p, q = log_probabilities(a), log_probabilities(b)
            apart.append(divergence(p, q))
            tokens.append(of_next(q, following))
        lost += float(torch.cat(apart).sum())
        nats += surprise(tokens)
    value = as_perplexity("", nats, predicted(windows)).value
    return value, lost / sum(len(ids) for ids in windows)


def along(base: torch.Tensor, merged: torch.Tensor, other: torch.Tensor) -> float:
    """Σ (p_M − p_B)·ℓ of other logits: its part in the direction of the adapter's change. Each
    (length, vocabulary)."""
    parts = []
    for at in zip(*map(blocks_of, (base, merged, other)), strict=True):
        b, m, o = (log_probabilities(x) for x in at)
        parts.append(((m.exp() - b.exp()) * o).sum(-1))
    return float(torch.cat(parts).sum())


def effect_exists(whole: float, positions: int, noise: float = 0.0) -> bool:
    """Whether an effect is more than noise, given for a position."""
    return whole > max(NO_EFFECT, noise) * positions


def _standard_error(parts: Sequence[float], sizes: Sequence[float]) -> float:
    """Of Σ parts / Σ sizes, from how it varies between inputs (ratio estimator); NaN for one input."""
    count, total = len(sizes), sum(sizes)
    if count < 2 or not total > 0:
        return math.nan
    ratio = sum(parts) / total
    rest = sum((p - ratio * s) ** 2 for p, s in zip(parts, sizes, strict=True))
    return math.sqrt(rest * count / (count - 1)) / total


def _known(figure: float) -> float | None:
    return None if math.isnan(figure) else figure


@dataclass
class AnyEffect(ABC):
    """Sums over inputs of what an adapter does, and of what a model in lower precision keeps of it.

    noise: of a position, from the arithmetic of the lower precision; a smaller effect cannot be told from it.
    """

    noise: float = 0.0
    whole: list[float] = field(default_factory=list)  # one figure an input
    kept: list[float] = field(default_factory=list)

    @property
    @abstractmethod
    def count(self) -> int:
        """Positions of which each is noisy."""

    @property
    def share(self) -> float | None:
        """Of the effect that is kept: 1 for all, 0 for none; None without an effect beyond the noise."""
        whole = sum(self.whole)
        return sum(self.kept) / whole if effect_exists(whole, self.count, self.noise) else None

    @property
    def uncertainty(self) -> float:
        """Standard error of the share, from how it varies between inputs; NaN for one input."""
        return math.nan if self.share is None else _standard_error(self.kept, self.whole)

    def survival(self, name: str) -> AdapterSurvival:
        return AdapterSurvival(name, self.share, None, None, _known(self.uncertainty))

    @property
    def fidelity(self) -> "Fidelity | None":
        """How far the outputs in lower precision are from the merged model's; None where that has no unit."""
        return None

    def perplexities(self, names: Sequence[tuple[str, str]]) -> tuple[Perplexity, ...]:
        """None, where there is no next token to predict."""
        return ()


@dataclass(frozen=True)
class Fidelity:
    """Mean KL divergences in nats. lost: from the merged model to the same in lower precision; error: its standard
    error, from how it varies between texts, NaN for one; of_base: what the base loses; effect: the adapter's, which
    is KL(M‖B) + KL(B‖M)."""

    lost: float
    error: float
    of_base: float
    effect: float


@dataclass
class Effect(AnyEffect):
    """Of a model that predicts tokens: base → merged, and the same two in lower precision, in nats.

    Let p be the probabilities and ℓ the log-probabilities of base (B), merged (M), and both in lower precision (BQ,
    Q). The effect is Σ (p_M − p_B)·(ℓ_M − ℓ_B) = KL(M‖B) + KL(B‖M), exactly. What is kept of it is
    Σ (p_M − p_B)·(ℓ_Q − ℓ_BQ): what the adapter does in lower precision, measured along what it should do.
    Damage that lower precision does to base and merged alike cancels in ℓ_Q − ℓ_BQ.
    """

    kl_base: float = 0.0
    lost: list[float] = field(default_factory=list)  # KL(merged‖in lower precision), one figure a text
    lost_of_base: float = 0.0
    lengths: list[int] = field(default_factory=list)
    predicted: int = 0
    surprises: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("B", "M", "BQ", "Q"), 0.0))

    def add(self, ids: torch.Tensor, base: torch.Tensor, merged: torch.Tensor, low_base: torch.Tensor,
            low: torch.Tensor) -> None:  # fmt: skip
        """One window: ids (length,), and the logits (length, vocabulary) of the four models on it."""
        logits = map(blocks_of, (base, merged, low_base, low))
        rows = [_Rows.of(*block) for block in zip(_following(ids), *logits, strict=True)]

        def sums(name: str) -> float:
            return float(torch.cat([getattr(found, name) for found in rows]).sum())

        self.whole.append(sums("whole"))
        self.kept.append(sums("kept"))
        self.kl_base += sums("kl_base")
        self.lost.append(sums("lost"))
        self.lost_of_base += sums("lost_of_base")
        self.lengths.append(len(ids))
        self.predicted += len(ids) - 1
        for at, name in enumerate(self.surprises):
            self.surprises[name] += surprise([found.tokens[at] for found in rows])

    @property
    def count(self) -> int:
        return sum(self.lengths)

    @property
    def fidelity(self) -> Fidelity:
        lost, of_base, effect = (x / self.count for x in (sum(self.lost), self.lost_of_base, sum(self.whole)))
        return Fidelity(lost, _standard_error(self.lost, self.lengths), of_base, effect)

    def survival(self, name: str) -> AdapterSurvival:
        far, errors = self.fidelity, (_known(self.uncertainty), _known(self.fidelity.error))
        return AdapterSurvival(name, self.share, self.kl_base / self.count, far.lost, *errors)

    def perplexities(self, names: Sequence[tuple[str, str]]) -> tuple[Perplexity, ...]:
        """names: (B, M, BQ or Q, how it is called) for those that are wanted."""
        return tuple(as_perplexity(name, self.surprises[key], self.predicted) for key, name in names)


@dataclass(frozen=True)
class _Rows:
    """Of some positions of a window, (positions,) each; tokens: log-probabilities of the next one by each model."""

    whole: torch.Tensor
    kept: torch.Tensor
    kl_base: torch.Tensor
    lost: torch.Tensor
    lost_of_base: torch.Tensor
    tokens: Sequence[torch.Tensor]

    @classmethod
    def of(cls, following: torch.Tensor, *logits: torch.Tensor) -> "_Rows":
        b, m, bq, q = (log_probabilities(x) for x in logits)
        of_base, of_merged = b.exp(), m.exp()
        change = of_merged - of_base
        return cls(
            (change * (m - b)).sum(-1),
            (change * (q - bq)).sum(-1),
            divergence(b, m, of_base),
            divergence(m, q, of_merged),
            divergence(b, bq, of_base),
            [of_next(p, following) for p in (b, m, bq, q)],
        )


def measured(windows: Sequence[torch.Tensor], models: Sequence[LogitsOf], noise: float = 0.0) -> Effect:
    """models: base, merged, and both in lower precision."""
    return measured_by(windows, [map(logits_of, windows) for logits_of in models], noise)


def measured_by(
    windows: Sequence[torch.Tensor], logits: Sequence[Iterable[torch.Tensor]], noise: float = 0.0
) -> Effect:
    """logits: of the four models, on each window."""
    effect = Effect(noise)
    for ids, *of_models in zip(windows, *logits, strict=True):
        effect.add(ids, *of_models)
    return effect


@dataclass
class OutputEffect(AnyEffect):
    """Of outputs that are no probabilities, in squares of their numbers.

    Let y be an output of base (B), merged (M), and both in lower precision (BQ, Q). The effect is |y_M − y_B|², and
    what is kept of it is (y_M − y_B)·(y_Q − y_BQ). Each output counts in proportion to its own numbers. noise: the
    share of |y|² that the arithmetic of the lower precision makes.
    """

    def add(self, base: torch.Tensor, merged: torch.Tensor, low_base: torch.Tensor,
            low: torch.Tensor) -> None:  # fmt: skip
        """One output on one batch, all four of one shape."""
        b, m, bq, q = (x.double().flatten() for x in (base, merged, low_base, low))
        size = float(m.square().sum()) or 1.0
        self.whole.append(float((m - b).square().sum()) / size)
        self.kept.append(float(((m - b) * (q - bq)).sum()) / size)

    @property
    def count(self) -> int:
        return len(self.whole)
