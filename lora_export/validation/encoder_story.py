"""How a model without next-token logits is compared: all its outputs, and the embedding pooled from the first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_export.contracts import Check, ExportedPair, Progress, ValidationResult
from lora_export.errors import InputError
from lora_export.validation.noise import draws
from lora_export.validation.subject import plain
from lora_export.validation.thresholds import FACTOR, FP32_ARITHMETIC

Outputs = dict[str, torch.Tensor]
# A pooled vector is a mean of the outputs; 1 − cos of two that differ by fp32 arithmetic alone.
COSINE_ARITHMETIC = 1e-6


@dataclass(frozen=True)
class Floor:
    """How far rounding alone moves one output: the largest difference, and √(1 − cos) of the pooled vector."""

    max_abs: float = 0.0
    angle: float = 0.0

    def widest(self, other: "Floor") -> "Floor":
        return Floor(max(self.max_abs, other.max_abs), max(self.angle, other.angle))

    def plus(self, other: "Floor") -> "Floor":
        return Floor(self.max_abs + other.max_abs, self.angle + other.angle)


@dataclass
class EncoderStory:
    """batches: keyword inputs of one forward each."""

    batches: Sequence[Mapping[str, Any]]
    dtypes: Mapping[str, torch.dtype]
    progress: Progress
    factor: float = FACTOR
    _base: list[Outputs] = field(default_factory=list)
    _unmerged: list[Outputs] = field(default_factory=list)
    _rounding: dict[str, Floor] = field(default_factory=dict)

    def measure(self, unmerged: Any) -> None:
        self.progress.stage("validate: noise floor of the rounding, without any adapter")
        with unmerged.disable_adapter():
            self._base = self._outputs(unmerged)
        for drawn in draws(unmerged, self.dtypes, lambda: self._from_base(self._outputs(unmerged))):
            for name, floor in drawn.items():
                self._rounding[name] = self._rounding.get(name, Floor()).widest(floor)
        self._unmerged = self._outputs(unmerged)

    def compare(self, unmerged: Any, merged: Any) -> ValidationResult:
        self.measure(unmerged)
        self.progress.stage(f"validate: {len(self.batches)} inputs, unmerged and merged")
        found = self._outputs(merged)
        where = "rounding errors on the base, no adapter"
        first, *others = self._base[0]
        checks = self._checks(first, self._rounding[first], found, "", where)
        for name in others:
            checks.append(self._max_abs_check(name, self._rounding[name], found, f"{name}_max_abs"))
        return ValidationResult(tuple(checks))

    @property
    def windows(self) -> Sequence[torch.Tensor]:
        """There is no next token to predict."""
        return ()

    def once(self, model: Any) -> Any:
        return plain(model)(**self.batches[0])

    def compare_onnx(self, pair: ExportedPair, provider: str) -> list[Check]:
        """The outputs of an exported graph, by their names, against the same unmerged forward."""
        from lora_export.validation.onnx_encoder import OnnxEncoder

        self.progress.stage("validate: ONNX Runtime, on the same inputs")
        noisy = OnnxEncoder(pair.base_graphs[0], provider).outputs(self.batches)
        found = OnnxEncoder(pair.merged_graphs[0], provider).outputs(self.batches)
        names = [name for name in self._base[0] if name in found[0]]
        if not names:
            raise InputError(
                f"no output of the graph ({', '.join(found[0])}) is one of the model",
                where=pair.merged_graphs[0],
                expected=", ".join(self._base[0]),
            )
        apart = self._from_base(noisy)
        floors = {n: self._rounding[n].plus(apart[n]) for n in names}
        where = "rounding errors, and the base exported the same way against PyTorch"
        first, *others = names
        return [
            *self._checks(first, floors[first], found, "onnx_", where),
            *(self._max_abs_check(n, floors[n], found, f"onnx_{n}_max_abs") for n in others),
        ]

    @torch.inference_mode()
    def _outputs(self, model: Any) -> list[Outputs]:
        body = plain(model)
        return [dict(_tensors(body(**batch))) for batch in self.batches]

    def _from_base(self, noisy: list[Outputs]) -> dict[str, Floor]:
        """For each output of the base that is there."""
        return {n: self._difference(n, self._base, noisy) for n in self._base[0] if n in noisy[0]}

    def _difference(self, name: str, reference: list[Outputs], found: list[Outputs]) -> Floor:
        """Over all batches; positions that are padding do not count."""
        pairs = [
            (self._valid(a[name], batch), self._valid(b[name], batch))
            for a, b, batch in zip(reference, found, self.batches, strict=True)
        ]
        worst = max(float((a - b).abs().max()) for a, b in pairs)
        apart = max(_one_minus_cosine(a, b) for a, b in pairs)
        return Floor(worst, apart**0.5)

    def _valid(self, output: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        mask = batch.get("attention_mask")
        if mask is None or output.shape[:2] != mask.shape:
            return output
        valid: torch.Tensor = output * mask.reshape(*mask.shape, *[1] * (output.dim() - 2))
        return valid

    def _floor(self, name: str, noise: Floor) -> float:
        """In proportion to the outputs: an adapter may make them larger, and the errors with them."""
        base, adapted = (max(float(x[name].abs().max()) for x in found) for found in (self._base, self._unmerged))
        larger = max(1.0, adapted / base) if base else 1.0
        return (noise.max_abs + base * FP32_ARITHMETIC) * larger

    def _max_abs_check(self, output: str, noise: Floor, found: list[Outputs], name: str) -> Check:
        limit = self.factor * self._floor(output, noise)
        worst = self._difference(output, self._unmerged, found).max_abs
        return Check(name, worst, limit, worst <= limit, f"{self.factor:g} × the noise floor; output {output}")

    def _checks(self, output: str, noise: Floor, found: list[Outputs], prefix: str, where: str) -> list[Check]:
        similar = 1 - self._difference(output, self._unmerged, found).angle ** 2
        least = 1 - (self.factor * noise.angle) ** 2 - COSINE_ARITHMETIC
        return [
            self._max_abs_check(output, noise, found, f"{prefix}logits_max_abs"),
            Check(
                f"{prefix}embedding_cosine",
                similar,
                least,
                similar >= least,
                f"of {output}, mean over positions, least of all inputs; from {self.factor**2:g} × the floor's",
            ),
            Check(f"{prefix}noise_floor_max_abs", self._floor(output, noise), None, True, where),
        ]


def _tensors(output: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """Every floating-point tensor of a transformers output, those of nested outputs (CLIP's towers) included."""
    if isinstance(output, torch.Tensor):
        return [(name or "output", output.float())] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        parts = [(k, v) for k, v in output.items() if k != "loss" and not k.startswith("past_")]
    elif isinstance(output, tuple | list):
        parts = [(str(i), v) for i, v in enumerate(output)]
    else:
        return []
    joined = [(f"{name}.{k}" if name else k, v) for k, v in parts]
    return [pair for k, v in joined for pair in _tensors(v, k)]


def _one_minus_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest over a batch; all dimensions between the first and the last are pooled by their mean.

    float64, and from the difference of unit vectors: 1 − cos of two that are almost equal would be cancellation.
    """
    x, y = (v.double().reshape(v.shape[0] if v.dim() > 1 else 1, -1, v.shape[-1]).mean(1) for v in (a, b))
    unit = [torch.nn.functional.normalize(v, dim=-1) for v in (x, y)]
    return float((unit[0] - unit[1]).square().sum(-1).max() / 2)
