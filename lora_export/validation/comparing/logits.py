"""Outputs of two models on the same tokens, compared in float64."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

TOP = 5


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


# A model beside itself.
UNMOVED = Difference(0.0, (0.0,), 1.0, 1.0, 0.0, 0.0, 0.0, 1)


def compare_logits(
    reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor], tokens: Sequence[torch.Tensor]
) -> Difference:
    """reference, other: logits (length, vocabulary) of each prompt; tokens: its (length,) ids."""
    apart, hits, shared, positions = [], 0, 0.0, 0
    kl: list[float] = []
    nll = torch.zeros(3, dtype=torch.float64)
    for a, b, ids in zip(reference, other, tokens, strict=True):
        apart.append(max_abs(a, b))
        hits += int((a.argmax(-1) == b.argmax(-1)).sum())
        shared += _shared(a, b)
        positions += len(ids)
        p, q = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
        kl += torch.sum(p.exp() * (p - q), -1).clamp_min(0).tolist()
        p_token, q_token = (x[:-1].gather(-1, ids[1:, None]).squeeze(-1) for x in (p, q))
        nll += torch.stack([-p_token.sum(), -q_token.sum(), (p_token - q_token).abs().sum()])
    nll /= max(positions - len(tokens), 1)
    nll_reference, nll_other, spread = nll.tolist()
    agreed = hits / positions, shared / positions
    return Difference(largest(apart), tuple(kl), *agreed, nll_reference, nll_other, spread, positions)


def _shared(a: torch.Tensor, b: torch.Tensor) -> float:
    """The sum over positions of the share of a's most likely tokens that are among b's."""
    count = min(TOP, a.shape[-1])
    one, other = (x.topk(count, -1).indices for x in (a, b))
    return float((one[:, :, None] == other[:, None, :]).any(-1).double().mean(-1).sum())


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
    reference: Sequence[torch.Tensor], tokens: Sequence[torch.Tensor]
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
