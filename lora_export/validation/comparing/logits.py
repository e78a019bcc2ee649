"""Outputs of two models on the same inputs, compared in float64."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

TOP = 5
PIECE = 512  # neighbours in a row of logits, of which the largest is looked for first
BLOCK = 8  # positions that are compared at once: their float64 copies stay in the processor's cache


def largest(values: Iterable[float]) -> float:
    """The largest value, NaN if one of them is no number: Python's max would drop it. 0 of none."""
    known = list(values)
    return math.nan if any(math.isnan(v) for v in known) else max(known, default=0.0)


@dataclass(frozen=True)
class Difference:
    """How far `other` is from `reference`, over all positions of all prompts.

    kl: Kullback-Leibler divergence of the next-token distributions in nats, one figure a position;
    top1: the share of positions whose most likely token agrees; top5: the share of the reference's five most
    likely tokens that are among the other's five, mean over positions; nll: mean negative log-likelihood of the
    text, in nats a token; nll_spread: mean absolute difference of log-likelihood at a position.
    """

    max_abs: float
    kl: tuple[float, ...]
    top1: float
    top5: float
    nll_reference: float
    nll_found: float
    nll_spread: float
    positions: int

    @property
    def kl_mean(self) -> float:
        return sum(self.kl) / len(self.kl)


@dataclass(frozen=True)
class Shift:
    """How far something moves one output: the largest difference, and √(1 − cos) of the pooled vector."""

    max_abs: float = 0.0
    angle: float = 0.0

    def widest(self, other: "Shift") -> "Shift":
        return Shift(largest((self.max_abs, other.max_abs)), largest((self.angle, other.angle)))

    def plus(self, other: "Shift", times: float = 1.0) -> "Shift":
        return Shift(self.max_abs + times * other.max_abs, self.angle + times * other.angle)


# A model beside itself.
UNMOVED = Difference(0.0, (0.0,), 1.0, 1.0, 0.0, 0.0, 0.0, 1)


def compare_logits(
    reference: Iterable[torch.Tensor], other: Iterable[torch.Tensor], tokens: Sequence[torch.Tensor]
) -> Difference:
    """reference, other: logits (length, vocabulary) of each prompt; tokens: its (length,) ids.

    A few rows at a time, so that the float64 copies stay small however wide the vocabulary is.
    """
    apart, hits, shared, positions = [], 0, 0.0, 0
    kl: list[float] = []
    nll = torch.zeros(3, dtype=torch.float64)
    for a, b, ids in zip(reference, other, tokens, strict=True):
        rows = [_rows(*pair) for pair in zip(blocks_of(a), blocks_of(b), blocks_of(_next(ids)), strict=True)]
        apart += [found.apart for found in rows]
        hits += sum(found.hits for found in rows)
        shared += float(torch.cat([found.shared for found in rows]).sum())
        positions += len(ids)
        kl += torch.cat([found.kl for found in rows]).tolist()
        p_token, q_token = (torch.cat([getattr(r, n) for r in rows])[:-1] for n in ("p_token", "q_token"))
        nll += torch.stack([-p_token.sum(), -q_token.sum(), (p_token - q_token).abs().sum()])
    nll /= max(positions - len(tokens), 1)
    nll_reference, nll_other, spread = nll.tolist()
    agreed = hits / positions, shared / positions
    return Difference(largest(apart), tuple(kl), *agreed, nll_reference, nll_other, spread, positions)


@dataclass(frozen=True)
class _Rows:
    """Of some positions: `shared`, `kl`, and both log-probabilities of the next token are (positions,)."""

    apart: float
    hits: int
    shared: torch.Tensor
    kl: torch.Tensor
    p_token: torch.Tensor
    q_token: torch.Tensor


def _rows(a: torch.Tensor, b: torch.Tensor, following: torch.Tensor) -> _Rows:
    wide = a.to(torch.float64, copy=True)  # which is overwritten below
    p_token = of_next(wide, following)
    if torch.equal(a, b) and bool(a.isfinite().all()):  # the same bits: most often one run beside another
        p_token = p_token - wide.logsumexp(-1)
        nothing = torch.zeros(len(a), dtype=torch.float64)
        return _Rows(0.0, len(a), nothing + 1, nothing, p_token, p_token)
    other = b.to(torch.float64, copy=True)
    q_token = of_next(other, following)
    lost = wide - other
    p, p_sum = exponentials(wide)
    # Σ p·(ln p − ln q), of which the sums over all exponentials are the same in every term.
    kl = torch.linalg.vecdot(p, lost) / p.sum(-1) - p_sum
    q_sum = exponentials(other)[1]
    one, two = best(a), best(b)
    apart = float(lost.abs_().max()) if a.numel() else 0.0
    shared = (one[:, :, None] == two[:, None, :]).any(-1).double().mean(-1)
    hits = int((one[:, 0] == two[:, 0]).sum())
    return _Rows(apart, hits, shared, (kl + q_sum).clamp_min(0), p_token - p_sum, q_token - q_sum)


def of_next(values: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Of each position's values (length, vocabulary) that of the token that follows, (length,)."""
    return values.gather(-1, following[:, None])[:, 0]


def exponentials(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e^(x − max x), which takes the place of x; ln Σ e^x) of float64 logits, over the last dimension."""
    most = wide.amax(-1, keepdim=True)
    raised = wide.sub_(most).exp_()
    return raised, raised.sum(-1).log_().add_(most.squeeze(-1))


def best(logits: torch.Tensor) -> torch.Tensor:
    """Indices of the TOP most likely tokens of each position. Of equal ones the first counts as the most likely."""
    columns = _candidates(logits)
    found = logits.gather(-1, columns).topk(min(TOP, logits.shape[-1]), -1)
    indices = columns.gather(-1, found.indices)
    tied = (found.values[:, :1] == found.values[:, 1:2]).any(-1)
    if bool(tied.any()):
        indices[tied, 0] = logits[tied].argmax(-1)
    return indices


def _candidates(logits: torch.Tensor) -> torch.Tensor:
    """Indices (positions, some) that the TOP largest are among: those of the TOP pieces of a row with the largest
    maxima, and what is left beside the pieces. To look through whole rows takes several times as long."""
    count = logits.shape[-1] // PIECE
    everywhere = torch.arange(logits.shape[-1])
    if count <= TOP:
        return everywhere.expand(logits.shape)
    pieces = logits[:, : count * PIECE].reshape(-1, count, PIECE).amax(-1).topk(TOP, -1).indices
    inside = (pieces[:, :, None] * PIECE + everywhere[:PIECE]).flatten(1)
    rest = everywhere[count * PIECE :].expand(len(logits), -1)
    return torch.cat([inside, rest], 1)


def _next(ids: torch.Tensor) -> torch.Tensor:
    """The token after each; the last one has none, and its figure is left out."""
    return torch.cat([ids[1:], ids[:1]])


def blocks_of(rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views of BLOCK rows each."""
    return torch.split(rows, BLOCK) if len(rows) else (rows,)


def max_abs(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two tensors of one shape; NaN where one of them holds what is no number."""
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


@dataclass(frozen=True)
class Divergence:
    """The first greedy token that differs, counted from 0.

    gap: how much the reference preferred its own token, in logits; own, other: the ids of the two tokens.
    """

    prompt: int
    step: int
    gap: float
    own: int
    other: int


def greedy_divergences(
    reference: Iterable[torch.Tensor], tokens: Sequence[torch.Tensor]
) -> tuple[float, list[Divergence]]:
    """Share of greedy steps before the first difference, and the differences.

    reference: the reference's logits (steps, vocabulary) at each greedy step of each prompt; tokens: what the
    other model chose at the same steps, which counts up to its first difference.
    """
    agreed, total = 0, 0
    divergences = []
    for i, (logits, choices) in enumerate(zip(reference, tokens, strict=True)):
        own = logits.argmax(-1)
        differing = (own != choices).nonzero()
        step = int(differing[0]) if len(differing) else len(own)
        agreed += step
        total += len(own)
        if step < len(own):
            gap = float(logits[step, own[step]] - logits[step, choices[step]])
            divergences.append(Divergence(i, step, gap, int(own[step]), int(choices[step])))
    return agreed / max(total, 1), divergences
