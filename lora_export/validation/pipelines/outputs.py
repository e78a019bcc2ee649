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
    """draws: how far honest errors move each output of each call, one entry for each cause, largest of its draws;
    scale: the largest number of each."""

    calls: Sequence[Call]
    reference: Sequence[Outputs]
    draws: Sequence[Sequence[Mapping[str, float]]]
    where: str

    def limit(self, call: int, output: str) -> float:
        scale = float(self.reference[call][output].abs().max())
        return sum(cause[call][output] for cause in self.draws) + scale * FP32_ARITHMETIC

    def checks(self, name: str, found: Sequence[Outputs], tolerance: float) -> list[Check]:
        """A check for each label: the output that is farthest away, in floors."""
        worst: dict[str, tuple[float, float, float, str]] = {}
        for number, (call, outputs) in enumerate(zip(self.calls, found, strict=True)):
            for output in self.reference[number].keys() & outputs.keys():
                error = _apart(self.reference[number][output], outputs[output])
                limit = tolerance * self.limit(number, output)
                share = error / limit if limit else math.inf
                known = worst.get(call.label)
                if known is None or not share <= known[0]:
                    worst[call.label] = share, error, limit, output
        return [
            below(
                f"{name}_{label}_max_abs" if label else f"{name}_max_abs", error, limit,
                f"{tolerance:g} × the noise floor of {self.where}; output {output}",
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
    """reference: the unmerged picture; draws: the pictures of models that honest errors moved."""

    reference: Sample
    draws: Sequence[Sample]
    where: str

    def checks(self, found: Sample, tolerance: float, prefix: str = "", extra: float = 0.0) -> list[Check]:
        """extra: more of the floor, in relative units, of a cause that no draw has."""
        arithmetic = FP32_ARITHMETIC + extra
        latents = largest(relative(self.reference.latents, d.latents) for d in self.draws) + arithmetic
        picture = largest(rmse(self.reference.picture, d.picture) for d in self.draws) + arithmetic
        error = rmse(self.reference.picture, found.picture)
        note = f"{tolerance:g} × the error of the same sampling on models moved by {self.where}"
        least = psnr(tolerance * picture)
        return [
            below(f"{prefix}latents_relative", relative(self.reference.latents, found.latents),
                  tolerance * latents, note),
            Check(f"{prefix}image_psnr", psnr(error), least, error <= tolerance * picture < math.inf,
                  f"dB, at least that of {note}"),
        ]  # fmt: skip
