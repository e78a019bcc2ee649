"""Several deltas of one weight made one: a weighted sum, or TIES' sum of what agrees in sign.

Task arithmetic (arXiv:2212.04089, sec. 2): Σ wᵢΔᵢ. TIES (arXiv:2306.01708, algorithm 1): each delta is trimmed, a
sign is elected for each element by the sum of the trimmed deltas, and the elements that have it are averaged. As in
PEFT's `add_weighted_adapter`, the weights multiply the elements that are averaged and take no part in the election,
the average is over how many agree, whatever their weights, and a sum of zero elects plus. With equal weights w that
is the paper's with λ = w.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_export.choices import MajoritySign

if TYPE_CHECKING:
    import torch


def summed(deltas: Sequence["torch.Tensor"], weights: Sequence[float]) -> "torch.Tensor":
    """Σ wᵢΔᵢ; deltas of one shape."""
    total = weights[0] * deltas[0]
    for weight, delta in zip(weights[1:], deltas[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total


def agreed(deltas: Sequence["torch.Tensor"], weights: Sequence[float], election: MajoritySign) -> "torch.Tensor":
    """The mean of wᵢΔᵢ over those Δᵢ that have the elected sign, element by element.

    election: by the sum of the deltas (total), or by how many are positive and negative (frequency).
    """
    import torch

    votes = sum(d if election == "total" else d.sign() for d in deltas)
    elected = torch.where(torch.as_tensor(votes) >= 0, 1.0, -1.0).to(deltas[0])
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for weight, delta in zip(weights, deltas, strict=True):
        agrees = delta.sign() == elected
        total += torch.where(agrees, weight * delta, 0.0)
        count += agrees
    return total / count.clamp(min=1.0)
