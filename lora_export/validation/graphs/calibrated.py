"""How far the numbers of a gptq export may be from the weights that they stand for.

GPTQ moves numbers by many steps on purpose, so what counts is what comes out on the calibration texts: with e the
error of a row of weights and H the mean of x xᵀ over its inputs, e H eᵀ. The yardstick is the same row rounded to
nearest, on blocks from the smallest to the largest number.
"""

from dataclasses import dataclass

import torch

from lora_export.validation.graphs.weights import Held, Quantized

# e H eᵀ relative to that of rounding to nearest. Of SmolLM2 and MiniLM, int4 and int8, no matrix has more than 0.46
# and no row more than 2.2; another layer's statistics give a matrix more than 1, another row hundreds.
ROW, MATRIX = 4.0, 1.0
# A constant added to a block would make up for its wrong zero point: of how many steps, and for which share of the
# row's error. Of 2.3 million blocks none asks for so much; of those with a zero point off by one, nearly all do.
STEPS, SHARE = 0.5, 0.2
# A factor on a row would make up for scales that are too large: how much of one, for which share of its error, and
# for which share of what rounding to nearest loses. The last is for rows with one input a thousand times the
# others, which rounding to nearest would lose: there, what is left may well lie along the row itself.
FACTOR, FACTOR_SHARE, FACTOR_LIMIT = 0.02, 0.1, 0.25
# Without statistics, a block has the range that loses least, and loses no more than with its whole range. Scales in
# another rounding, and weights that differ in the last place, move this by a little.
NEAREST = 1.1  # root mean square
ROUNDING = 2.0**-20  # of a row's outputs: arithmetic in fp32
_NARROW = 2.0**-8  # a scale in bf16, or a weight that bf16 has rounded to its neighbour
_LEAST = 1e-300
TOGETHER = 2048  # rows that are judged at once


@dataclass(frozen=True)
class Sums:
    """Of squares over a matrix: of its weights, of what quantizing changed in them, and the same of its outputs on
    calibration texts (0 without statistics)."""

    weights: float = 0.0
    lost: float = 0.0
    outputs: float = 0.0
    outputs_lost: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.weights + other.weights,
            self.lost + other.lost,
            self.outputs + other.outputs,
            self.outputs_lost + other.outputs_lost,
        )


def rows_of(held: Held, wanted: torch.Tensor, how: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """What a graph holds and what it should stand for, (out, in) in float64."""
    both = (x.reshape(-1, how.width).double() for x in (held.values, wanted))
    values, exact = (x if how.axis == 1 else x.T for x in both)
    return values, exact


def sums(values: torch.Tensor, exact: torch.Tensor, moment: torch.Tensor | None) -> Sums:
    pairs = zip(torch.split(values, TOGETHER), torch.split(exact, TOGETHER), strict=True)
    parts = (_sums(some, wanted, moment) for some, wanted in pairs)
    return sum(parts, Sums())


def _sums(values: torch.Tensor, exact: torch.Tensor, moment: torch.Tensor | None) -> Sums:
    error = values - exact
    if moment is None:
        return Sums(float(exact.square().sum()), float(error.square().sum()))
    outputs, lost = (float(((x @ moment) * x).sum()) for x in (exact, error))
    return Sums(float(exact.square().sum()), float(error.square().sum()), outputs, lost)


def calibrated_error(
    values: torch.Tensor, exact: torch.Tensor, how: Quantized, scales: torch.dtype, moment: torch.Tensor
) -> float:
    """values, exact: as `rows_of`; scales: their type; moment: (in, in). Above 1, or NaN, is a fault."""
    if moment.shape[0] != exact.shape[1]:
        return float("inf")
    worst, lost, allowed = [], torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for some, wanted in zip(torch.split(values, TOGETHER), torch.split(exact, TOGETHER), strict=True):
        rows, own, limit = _rows_error(some, wanted, how, scales, moment)
        worst.append(rows)
        lost, allowed = lost + own, allowed + limit
    return float(torch.stack([*worst, lost / allowed]).max())


def _rows_error(
    values: torch.Tensor, exact: torch.Tensor, how: Quantized, scales: torch.dtype, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The worst of some rows, relative to what is allowed; and their errors together, found and allowed."""
    nearest, step = _nearest(exact, how, scales)
    error, rounded = values - exact, nearest - exact
    blamed = error @ moment
    own = (blamed * error).sum(1)
    limit = torch.maximum(((rounded @ moment) * rounded).sum(1), _typical(step, how, moment))
    power = ((exact @ moment) * exact).sum(1).clamp_min(0) + _LEAST
    noise = ROUNDING**2 * power
    rows = (own / (ROW * limit + noise)).max()
    pull = (blamed * exact).sum(1)
    share = pull.square() / power / (own + noise)
    much = pull.square() / power / (FACTOR_LIMIT * limit + noise)
    factors = torch.minimum((pull / power).abs() / FACTOR, share / FACTOR_SHARE).minimum(much).max()
    worst = [rows, factors, *_shifts(blamed, own + noise, step, how, moment)]
    return torch.stack(worst).max(), own.sum(), (MATRIX * limit + noise).sum()


def _typical(step: torch.Tensor, how: Quantized, moment: torch.Tensor) -> torch.Tensor:
    """The error of each row's outputs for rounding errors that are even and independent: by luck, a row may have
    less where one input counts for almost all."""
    weight = _blocks(moment.diagonal()[None], how.block_size).sum(2)
    return (step.square() * weight).sum(1) / 12


def _shifts(
    blamed: torch.Tensor, own: torch.Tensor, step: torch.Tensor, how: Quantized, moment: torch.Tensor
) -> list[torch.Tensor]:
    """For each block, the worst of the rows: how much a constant would help, above 1 if too much."""
    found = []
    for block, start in enumerate(range(0, blamed.shape[1], how.block_size)):
        stop = min(start + how.block_size, blamed.shape[1])
        power = moment[start:stop, start:stop].sum().clamp_min(_LEAST)
        pull = blamed[:, start:stop].sum(1)
        steps = (pull / power).abs() / step[:, block].clamp_min(_LEAST)
        share = pull.square() / power / own
        found.append(torch.minimum(steps / STEPS, share / SHARE).max())
    return found


def searched_error(
    values: torch.Tensor, exact: torch.Tensor, how: Quantized, scales: torch.dtype, narrow: bool
) -> float:
    """The same of a matrix without statistics. narrow: whether scales or weights have passed through 16 bits."""
    nearest, _ = _nearest(exact, how, scales)
    found, limit = (_blocks(x - exact, how.block_size).square().mean(2).sqrt() for x in (values, nearest))
    largest = _blocks(exact, how.block_size).abs().amax(2)
    slack = _NARROW * largest if narrow else ROUNDING * largest
    return float((found / (NEAREST * limit + slack + _LEAST)).max())


def _nearest(exact: torch.Tensor, how: Quantized, scales: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows rounded to nearest, with zero and all numbers within the range of each block; and the steps
    (out, blocks)."""
    blocks = _blocks(exact, how.block_size)
    most = 2 ** int(how.method.removeprefix("int")) - 1
    high, low = blocks.amax(2).clamp_min(0), blocks.amin(2).clamp_max(0)
    middle = most // 2 + 1
    wide = torch.maximum(high / (most - middle), -low / middle) if how.symmetric else (high - low) / most
    step = wide.to(scales).double()[..., None].clamp_min(_LEAST)
    zero = torch.full_like(step, middle) if how.symmetric else (-low[..., None] / step).round().clamp(0, most)
    codes = ((blocks / step).round() + zero).clamp(0, most)
    return ((codes - zero) * step).flatten(1)[:, : exact.shape[1]], step[..., 0]


def _blocks(rows: torch.Tensor, size: int) -> torch.Tensor:
    """(out, blocks, size), filled up with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % size))
    return padded.reshape(len(rows), -1, size)
