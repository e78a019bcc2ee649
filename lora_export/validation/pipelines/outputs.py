"""What models answer, and how far two answers are apart, against a measured floor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.contracts import Check
from lora_export.validation.comparing.logits import largest, max_abs
from lora_export.validation.comparing.thresholds import FP32_ARITHMETIC, below
from lora_export.validation.pipelines.sampling import Call, Sample

Outputs = dict[str, torch.Tensor]


@torch.no_grad()
def answers(model: Any, calls: Sequence[Call]) -> list[Outputs]:
    """All floating-point outputs of each call, by name."""
    return [dict(_tensors(model(**call.arguments))) for call in calls]


def _tensors(output: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        return [(name or "output", output.detach().float())] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        parts = [(str(k), v) for k, v in output.items()]
    elif isinstance(output, tuple | list):
        parts = [(str(i), v) for i, v in enumerate(output)]
    else:
        return []
    return [pair for k, v in parts for pair in _tensors(v, f"{name}.{k}" if name else k)]


@dataclass(frozen=True)
class Floor:
    """How far honest errors move each output of each call.

    reference: the outputs without them; draws: one entry for each cause, the largest of its draws; known: the
    shift that the very numbers of a quantized graph cause, which is no draw, so that no tolerance applies to it.
    """

    calls: Sequence[Call]
    reference: Sequence[Outputs]
    draws: Sequence[Sequence[Mapping[str, float]]]
    where: str
    known: Sequence[Mapping[str, float]] = ()

    def limit(self, call: int, output: str) -> float:
        scale = float(self.reference[call][output].abs().max())
        return sum(cause[call][output] for cause in self.draws) + scale * FP32_ARITHMETIC

    @property
    def _shift(self) -> str:
        return "what the graph's numbers do in PyTorch + " if self.known else ""

    def checks(self, name: str, found: Sequence[Outputs], tolerance: float) -> list[Check]:
        """A check for each label: the output that is farthest away, in floors."""
        worst: dict[str, tuple[float, float, float, str]] = {}
        for number, (call, outputs) in enumerate(zip(self.calls, found, strict=True)):
            for output in self.reference[number].keys() & outputs.keys():
                error = _apart(self.reference[number][output], outputs[output])
                limit = tolerance * self.limit(number, output)
                limit += self.known[number][output] if self.known else 0.0
                share = error / limit if limit else math.inf
                known = worst.get(call.label)
                if known is None or not share <= known[0]:
                    worst[call.label] = share, error, limit, output
        return [
            below(
                f"{name}_{label}_max_abs" if label else f"{name}_max_abs", error, limit,
                f"{self._shift}{tolerance:g} × the noise floor of {self.where}; output {output}",
            )
            for label, (_, error, limit, output) in worst.items()
        ]  # fmt: skip


def apart(reference: Sequence[Outputs], other: Sequence[Outputs]) -> list[dict[str, float]]:
    """The largest difference of each output of each call."""
    pairs = zip(reference, other, strict=True)
    return [{n: _apart(a[n], b[n]) for n in a.keys() & b.keys()} for a, b in pairs]


def widest(draws: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Of several draws, the largest difference of each output of each call."""
    return [{n: largest(d[n] for d in each) for n in each[0]} for each in zip(*draws, strict=True)]


def kept(base: Sequence[Outputs], unmerged: Sequence[Outputs], other: Sequence[Outputs]) -> float | None:
    """The share of the adapters' effect on the outputs that another model has: along the direction of the effect,
    over all calls. None where there is no effect."""
    along = whole = 0.0
    for b, u, o in zip(base, unmerged, other, strict=True):
        for name in b.keys() & u.keys() & o.keys():
            effect = u[name].double() - b[name].double()
            whole += float(effect.square().sum())
            along += float((effect * (o[name].double() - b[name].double())).sum())
    return along / whole if whole > 0 else None


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return max_abs(a, b) if a.shape == b.shape else math.inf


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ ÷ ‖a‖."""
    if a.shape != b.shape:
        return math.inf
    return float((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30))


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt()) if a.shape == b.shape else math.inf


def psnr(error: float) -> float:
    """Of a root mean square error of numbers in 0 … 1, in dB."""
    return -20 * math.log10(error) if error > 0 else (math.inf if error == 0 else math.nan)


@dataclass(frozen=True)
class SampleFloor:
    """reference: the unmerged picture; draws: those of models that rounding errors moved; moved: those that other
    causes moved, one of each; known: the relative error of the latents and the root mean square error of the
    picture that the very numbers of quantized graphs cause."""

    reference: Sample
    draws: Sequence[Sample]
    where: str
    moved: Sequence[Sample] = ()
    known: tuple[float, float] = (0.0, 0.0)

    def relative_to(self, other: Sample) -> float:
        return relative(self.reference.latents, other.latents)

    def checks(self, found: Sample, tolerance: float, prefix: str = "") -> list[Check]:
        own = self.reference
        latents = largest(self.relative_to(d) for d in self.draws) + sum(self.relative_to(m) for m in self.moved)
        picture = largest(rmse(own.picture, d.picture) for d in self.draws)
        picture += sum(rmse(own.picture, m.picture) for m in self.moved)
        limits = [
            k + tolerance * (f + FP32_ARITHMETIC) for k, f in zip(self.known, (latents, picture), strict=True)
        ]
        error = rmse(own.picture, found.picture)
        shift = "what the graphs' numbers do in PyTorch + " if any(self.known) else ""
        note = f"{shift}{tolerance:g} × the error of the same sampling on models moved by {self.where}"
        return [
            below(f"{prefix}latents_relative", self.relative_to(found), limits[0], note),
            Check(f"{prefix}image_psnr", psnr(error), psnr(limits[1]), error <= limits[1] < math.inf,
                  f"dB, at least that of {note}"),
        ]  # fmt: skip
