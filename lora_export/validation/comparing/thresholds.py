"""From a measured noise floor to thresholds. What is honest noise in one sample may be some times that in
another, but a fault is orders of magnitude above it; docs and report carry the reason with each figure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_export.contracts import Check
from lora_export.validation.comparing.logits import TOP, UNMOVED, Difference, Divergence, largest

FACTOR = 4.0  # on logits, unless --tolerance says otherwise
KL_POWER = 2  # KL is quadratic in the difference of logits, and so is the factor on it
# fp32 sums in another order differ by about this share of the largest logit (6e-5 of 37 on SmolLM2,
# measured against float64).
FP32_ARITHMETIC = 2.0**-20
COIN_TOSSES = 3  # positions at which two tokens are as good as equally likely
LARGEST_NLL = 700.0  # its exponential is still a float


@dataclass(frozen=True)
class Floor:
    """What moves the outputs of a right model away from the reference, measured in PyTorch.

    sources: random errors (the rounding of the merged weights, arithmetic in a type, one run beside another), each
    measured in one draw or several. They add up, and so does the order of fp32 sums, which differs from one forward
    to another. known: the shift that the very weights of a quantized graph cause; it is no draw, so no factor
    applies to it. scale: the largest logit of the reference.
    """

    sources: tuple[tuple[Difference, ...], ...]
    scale: float
    where: str
    known: Difference | None = None

    @property
    def arithmetic(self) -> float:
        return self.scale * FP32_ARITHMETIC

    @property
    def max_abs(self) -> float:
        return self._sum(lambda d: d.max_abs) + self.arithmetic

    @property
    def kl(self) -> float:
        # KL between two softmaxes whose logits differ by at most d is at most d²/2 (to second order), so that it is
        # the roots that add up.
        return (self._sum(lambda d: math.sqrt(d.kl_mean)) + self.arithmetic / math.sqrt(2)) ** 2

    @property
    def top1(self) -> float:
        return 1 - self._sum(lambda d: 1 - d.top1)

    @property
    def top5(self) -> float:
        return 1 - self._sum(lambda d: 1 - d.top5)

    @property
    def nll_spread(self) -> float:
        return self._sum(lambda d: d.nll_spread) + self.arithmetic

    def _sum(self, figure: Callable[[Difference], float]) -> float:
        return sum(largest(figure(d) for d in draws) for draws in self.sources)


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations beside the unmerged model's: the share of equal tokens, and where they part.

    decode: a token's text, for the words that show the first one that differs.
    """

    agreement: float
    divergences: Sequence[Divergence]
    decode: Callable[[int], str]

    def show(self, divergence: Divergence) -> str:
        own, other = (repr(self.decode(token)) for token in (divergence.own, divergence.other))
        return (
            f"prompt {divergence.prompt + 1}, token {divergence.step + 1}: unmerged {own}, here {other}, which the "
            f"unmerged model finds {divergence.gap:.3g} less likely (in logits)"
        )


def decoder_checks(
    floor: Floor, apart: Difference, greedy: Greedy, factor: float = FACTOR, prefix: str = ""
) -> list[Check]:
    """The checks of a decoder's logits against the unmerged ones."""
    known = floor.known or UNMOVED
    logits = known.max_abs + factor * floor.max_abs
    kl = (math.sqrt(known.kl_mean) + factor * math.sqrt(floor.kl)) ** KL_POWER
    spread = abs(known.nll_found - known.nll_reference) + factor * floor.nll_spread
    perplexity = math.exp(min(apart.nll_reference, LARGEST_NLL))
    shift = "what these weights do in PyTorch + " if floor.known else ""
    return [
        below(
            f"{prefix}logits_max_abs", apart.max_abs, logits, f"{shift}{factor:g} × the noise floor ({floor.where})"
        ),
        below(
            f"{prefix}logits_kl_mean", apart.kl_mean, kl, f"{shift}{factor**KL_POWER:g} × the noise floor's, nats"
        ),
        _agreement(f"{prefix}top1_agreement", apart.top1, known.top1, floor.top1, apart.positions, factor, 1),
        _agreement(f"{prefix}top5_agreement", apart.top5, known.top5, floor.top5, apart.positions, factor, TOP),
        Check(
            f"{prefix}perplexity_unmerged",
            perplexity,
            None,
            math.isfinite(apart.nll_reference),
            "the reference, for comparison",
        ),
        Check(
            f"{prefix}perplexity_merged",
            math.exp(min(apart.nll_found, LARGEST_NLL)),
            perplexity * math.exp(min(spread, LARGEST_NLL)),
            abs(apart.nll_found - apart.nll_reference) <= spread < math.inf,
            f"the unmerged one's, within {shift}{factor:g} × the floor's change of log-likelihood",
        ),
        _greedy(f"{prefix}greedy_agreement", greedy, 2 * logits),
        reported(f"{prefix}noise_floor_max_abs", floor.max_abs, floor.where),
    ]


def graph_checks(floor: Floor, apart: Difference, factor: float, prefix: str) -> list[Check]:
    """A graph against PyTorch with the very weights that the graph holds: nothing but arithmetic may differ."""
    note = f"{factor:g} × the noise floor of {floor.where}, against PyTorch with the weights that the graph holds"
    return [
        below(f"{prefix}_max_abs", apart.max_abs, factor * floor.max_abs, note),
        below(
            f"{prefix}_kl_mean",
            apart.kl_mean,
            factor**KL_POWER * floor.kl,
            f"{factor**KL_POWER:g} × the floor's, nats",
        ),
    ]


def _agreement(
    name: str, value: float, known: float, floor: float, positions: int, factor: float, tokens: int
) -> Check:
    """tokens: how many of the most likely ones are compared. A threshold that nothing could miss is no check."""
    least = 1 - (1 - known) - factor * (1 - floor) - COIN_TOSSES / positions
    what = "" if tokens == 1 else f"share of the unmerged model's {tokens} most likely that are among these; "
    note = f"{what}{factor:g} × the floor's disagreement, and {COIN_TOSSES} coin tosses"
    if not least > 0:
        note += "; the noise leaves nothing to compare, so this fails"
    return Check(name, value, least, value >= least > 0, note)


def _greedy(name: str, greedy: Greedy, tie: float) -> Check:
    """tie: how far apart two tokens may be and still be exchanged by noise, each moved by it, in logits."""
    unexplained = [d for d in greedy.divergences if not d.gap <= tie < math.inf]
    note = "all greedy tokens equal"
    if greedy.divergences:
        verdict = "more than noise explains" if unexplained else "a tie within the noise"
        note = f"{greedy.show((unexplained or greedy.divergences)[0])}: {verdict} ({tie:.3g})"
    return Check(name, greedy.agreement, 1.0, not unexplained, note)


def reported(name: str, value: float, note: str) -> Check:
    """A figure without a threshold, which has only to be a number."""
    return Check(name, value, None, math.isfinite(value), note)


def below(name: str, value: float, threshold: float, note: str) -> Check:
    return Check(name, value, threshold, value <= threshold < math.inf, note)


def tensor_checks(worst: float, faulty: int, total: int) -> list[Check]:
    """The arithmetic of each tensor: no tensor beyond what one rounding explains."""
    bound = "½ ulp + 2⁻²²·|W| + 4 × the fp32 error of the unmerged layer, against float64"
    return [
        Check("tensor_errors", faulty, 0, faulty == 0, f"of {total} tensors; bound {bound}"),
        below("tensor_max_error", worst, 1.0, f"in units of the bound {bound}"),
    ]
