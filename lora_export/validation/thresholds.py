"""From a measured noise floor to thresholds. What is honest noise in one sample may be some times that in
another, but a fault is orders of magnitude above it; docs and report carry the reason with each figure."""

import math
from dataclasses import dataclass

from lora_export.contracts import Check
from lora_export.validation.compare import Difference, Divergence

FACTOR = 4.0  # on logits; divergences are quadratic in them, so they get its square
# fp32 sums in another order differ by about this share of the largest logit (6e-5 of 37 on SmolLM2,
# measured against float64).
FP32_ARITHMETIC = 2.0**-20
COIN_TOSSES = 3  # positions at which two tokens are as good as equally likely


@dataclass(frozen=True)
class Floor:
    """Noise measured without an adapter; `scale` is the largest logit of the base.

    sources: what moves the outputs (the rounding of the merged weights, the export), each measured in one draw or
    several. They add up, and so does the order of fp32 sums, which differs from one forward to another.
    """

    sources: tuple[tuple[Difference, ...], ...]
    scale: float
    where: str

    @property
    def arithmetic(self) -> float:
        return self.scale * FP32_ARITHMETIC

    @property
    def max_abs(self) -> float:
        return sum(max(d.max_abs for d in draws) for draws in self.sources) + self.arithmetic

    @property
    def kl(self) -> float:
        # KL between two softmaxes whose logits differ by at most d is at most d²/2 (to second order), so that it is
        # the roots that add up.
        roots = [math.sqrt(max(d.kl_mean for d in draws)) for draws in self.sources]
        return (sum(roots) + self.arithmetic / math.sqrt(2)) ** 2

    @property
    def top1(self) -> float:
        return 1 - sum(max(1 - d.top1 for d in draws) for draws in self.sources)

    @property
    def nll_spread(self) -> float:
        return sum(max(d.nll_spread for d in draws) for draws in self.sources) + self.arithmetic


def decoder_checks(
    floor: Floor, found: Difference, agreement: float, divergences: list[Divergence], prefix: str = ""
) -> list[Check]:
    """The checks that DESIGN names, for logits of a decoder against the unmerged ones."""
    logits = FACTOR * floor.max_abs
    note = f"{FACTOR:g} × the noise floor ({floor.where})"
    kl = FACTOR**2 * floor.kl
    top1 = 1 - FACTOR * (1 - floor.top1) - COIN_TOSSES / found.positions
    spread = FACTOR * floor.nll_spread
    unexplained = [d for d in divergences if d.gap > 2 * logits]
    perplexity = math.exp(found.nll_reference)
    limit = perplexity * math.exp(spread)
    return [
        _below(f"{prefix}logits_max_abs", found.max_abs, logits, note),
        _below(f"{prefix}logits_kl_mean", found.kl_mean, kl, f"{FACTOR**2:g} × the noise floor's, nats"),
        Check(
            f"{prefix}top1_agreement",
            found.top1,
            top1,
            found.top1 >= top1,
            f"{FACTOR:g} × the floor's disagreement, and {COIN_TOSSES} coin tosses",
        ),
        Check(
            f"{prefix}perplexity_unmerged",
            perplexity,
            None,
            math.isfinite(perplexity),
            "the reference, for comparison",
        ),
        Check(
            f"{prefix}perplexity_merged",
            math.exp(min(found.nll_found, 700.0)),
            limit,
            abs(found.nll_found - found.nll_reference) <= spread,
            "the unmerged one's, within the floor's change of log-likelihood",
        ),
        Check(
            f"{prefix}greedy_agreement", agreement, 1.0, not unexplained, _explain(divergences, unexplained, logits)
        ),
        Check(f"{prefix}noise_floor_max_abs", floor.max_abs, None, math.isfinite(floor.max_abs), floor.where),
    ]


def _explain(divergences: list[Divergence], unexplained: list[Divergence], logits: float) -> str:
    if not divergences:
        return "all greedy tokens equal"
    first = (unexplained or divergences)[0]
    verdict = "more than noise explains" if unexplained else "a tie within the noise"
    return (
        f"prompt {first.prompt + 1}, token {first.step + 1}: the unmerged model preferred its own by "
        f"{first.gap:.3g}, {verdict} (2 × {logits:.3g})"
    )


def _below(name: str, value: float, threshold: float, note: str) -> Check:
    return Check(name, value, threshold, value <= threshold, note)


def tensor_checks(worst: float, faulty: int, total: int) -> list[Check]:
    """The arithmetic of each tensor: no tensor beyond what one rounding explains."""
    bound = "½ ulp + 2⁻²²·|W| + 4 × the fp32 error of the unmerged layer, against float64"
    return [
        Check("tensor_errors", faulty, 0, faulty == 0, f"of {total} tensors; bound {bound}"),
        _below("tensor_max_error", worst, 1.0, f"in units of the bound {bound}"),
    ]
