"""How a model without next-token logits is compared: all its outputs, and the embedding pooled from the first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_export.contracts import Check, Progress, ValidationResult
from lora_export.errors import InputError
from lora_export.validation.comparing.arithmetic import Arithmetic, draw
from lora_export.validation.comparing.logits import largest, max_abs
from lora_export.validation.comparing.noise import draws
from lora_export.validation.comparing.subject import Graph, plain, running
from lora_export.validation.comparing.thresholds import FACTOR, FP32_ARITHMETIC, below
from lora_export.validation.effect.effect import OutputEffect

Outputs = dict[str, torch.Tensor]
# A pooled vector is a mean of the outputs; 1 − cos of two that differ by fp32 arithmetic alone.
COSINE_ARITHMETIC = 1e-6


@dataclass(frozen=True)
class Floor:
    """How far something moves one output: the largest difference, and √(1 − cos) of the pooled vector."""

    max_abs: float = 0.0
    angle: float = 0.0

    def widest(self, other: "Floor") -> "Floor":
        return Floor(largest((self.max_abs, other.max_abs)), largest((self.angle, other.angle)))

    def plus(self, other: "Floor", times: float = 1.0) -> "Floor":
        return Floor(self.max_abs + times * other.max_abs, self.angle + times * other.angle)


Floors = dict[str, Floor]


@dataclass
class EncoderStory:
    """batches: keyword inputs of one forward each."""

    batches: Sequence[Mapping[str, Any]]
    dtypes: Mapping[str, torch.dtype]
    progress: Progress
    factor: float = FACTOR
    _base: list[Outputs] = field(default_factory=list)
    _unmerged: list[Outputs] = field(default_factory=list)
    _rounding: Floors = field(default_factory=dict)
    _sums: Floors = field(default_factory=dict)
    _arithmetic: Floors = field(default_factory=dict)

    def measure(self, unmerged: Any) -> None:
        self.progress.stage(f"validate: {len(self.batches)} inputs, unmerged, and how far rounding moves them")
        with running(unmerged):
            with unmerged.disable_adapter():
                self._base = self._outputs(unmerged)
            self._unmerged = self._outputs(unmerged)
        for drawn in draws(unmerged, self.dtypes, lambda: self._between(self._unmerged, self._outputs(unmerged))):
            for name, floor in drawn.items():
                self._rounding[name] = self._rounding.get(name, Floor()).widest(floor)
        self._sums = self._draw(unmerged, Arithmetic())

    def compare(self, unmerged: Any, merged: Any) -> ValidationResult:
        self.measure(unmerged)
        found = self._outputs(merged)
        noise = {name: floor.plus(self._sums[name]) for name, floor in self._rounding.items()}
        where = "rounding errors on the unmerged model, and the order of fp32 sums"
        checks = [
            *self._checks(noise, {}, found, "", where),
            Check("noise_floor_max_abs", self._limit(self._first, noise), None, True, where),
        ]
        return ValidationResult(tuple(checks))

    @property
    def windows(self) -> Sequence[torch.Tensor]:
        """There is no next token to predict."""
        return ()

    def once(self, model: Any) -> Any:
        return plain(model)(**self.batches[0])

    def compare_onnx(self, unmerged: Any, graph: Graph) -> list[Check]:
        """The outputs of an exported graph by their names, padded batches among them."""
        self.progress.stage(f"validate: {graph.arithmetic.words}, measured in PyTorch")
        self._arithmetic = self._sums
        if graph.arithmetic != Arithmetic():
            self._arithmetic = self._draw(unmerged, graph.arithmetic)
        exact = None if graph.model is None else self._outputs(graph.model)
        self.progress.stage("validate: ONNX Runtime, on the same inputs")
        answered = self._answers(graph)
        known = self._between(self._unmerged, exact) if exact and graph.shifted else {}
        where = f"rounding errors, and {graph.arithmetic.words}"
        noise = self._noise(graph, rounding=True)
        floor = self._limit(next(n for n in self._unmerged[0] if n in answered[0]), noise)
        return [
            *self._checks(noise, known, answered, graph.prefix, where),
            Check(f"{graph.prefix}noise_floor_max_abs", floor, None, math.isfinite(floor), where),
            *self._graph_checks(graph, exact or self._unmerged, answered),
        ]

    def compare_base(self, unmerged: Any, graph: Graph) -> list[Check]:
        of_base = self._draw(unmerged, graph.arithmetic, adapted=False)
        self._arithmetic = {n: f.widest(of_base[n]) for n, f in self._arithmetic.items()}
        exact = self._base if graph.model is None else self._outputs(graph.model)
        return self._graph_checks(graph, exact, self._answers(graph))

    def effect(self, unmerged: Any, base: Graph, merged: Graph) -> OutputEffect:
        """Along every output of the graphs."""
        low_base, low = self._answers(base), self._answers(merged)
        # 1 − cos of two vectors is half the square of what is between them, relative to their length.
        angle = largest(f.angle for f in self._arithmetic.values())
        narrow = merged.arithmetic.times > 1
        found = OutputEffect(2 * (self.factor * angle) ** 2 if narrow else 0.0)
        for index, batch in enumerate(self.batches):
            outputs = (self._base[index], self._unmerged[index], low_base[index], low[index])
            for name in (n for n in self._unmerged[index] if n in low[index]):
                found.add(*(self._valid(o[name], batch) for o in outputs))
        return found

    def _answers(self, graph: Graph) -> list[Outputs]:
        from lora_export.validation.graphs.runs import OnnxEncoder

        answered = OnnxEncoder(graph.paths[0], graph.provider).outputs(self.batches)
        if not any(name in answered[0] for name in self._unmerged[0]):
            raise InputError(
                f"no output of the graph ({', '.join(answered[0])}) is one of the model",
                where=graph.paths[0],
                expected=", ".join(self._unmerged[0]),
            )
        return answered

    def _graph_checks(self, graph: Graph, exact: list[Outputs], answered: list[Outputs]) -> list[Check]:
        """Against PyTorch with the numbers that the graph holds: nothing but arithmetic may differ."""
        apart = self._between(exact, answered)
        noise = self._noise(graph, rounding=graph.model is None)
        note = (
            f"{self.factor:g} × the noise floor of {graph.arithmetic.words}, against PyTorch with the weights that "
            "the graph holds"
        )
        return [
            below(f"{graph.prefix}graph_{name}_max_abs", moved.max_abs, self.factor * limit, note)
            for name, moved in apart.items()
            for limit in [self._limit(name, noise)]
        ]

    @torch.inference_mode()
    def _outputs(self, model: Any) -> list[Outputs]:
        body = plain(model)
        return [dict(_tensors(body(**batch))) for batch in self.batches]

    def _noise(self, graph: Graph, rounding: bool) -> Floors:
        """Of the graph's arithmetic, and of the rounding of its weights."""
        times = graph.arithmetic.times
        return {n: (self._rounding[n] if rounding else Floor()).plus(f, times) for n, f in self._arithmetic.items()}

    @property
    def _first(self) -> str:
        return next(iter(self._unmerged[0]))

    def _draw(self, unmerged: Any, how: Arithmetic, adapted: bool = True) -> Floors:
        def measure(active: bool) -> Floors:
            return self._between(self._unmerged if active else self._base, self._outputs(unmerged))

        def finite(found: Floors) -> bool:
            return all(math.isfinite(f.max_abs) for f in found.values())

        return draw(unmerged, how, list(self.dtypes), measure, finite, adapted)

    def _between(self, reference: list[Outputs], found: list[Outputs]) -> Floors:
        """For each output that both have: how far it moved, over all batches; padding does not count."""
        return {n: self._difference(n, reference, found) for n in reference[0] if n in found[0]}

    def _difference(self, name: str, reference: list[Outputs], found: list[Outputs]) -> Floor:
        pairs = [
            (self._valid(a[name], batch), self._valid(b[name], batch))
            for a, b, batch in zip(reference, found, self.batches, strict=True)
        ]
        if any(a.shape != b.shape for a, b in pairs):
            return Floor(math.nan, math.nan)
        apart = largest(_one_minus_cosine(a, b) for a, b in pairs)
        return Floor(largest(max_abs(a, b) for a, b in pairs), apart**0.5)

    def _valid(self, output: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        mask = batch.get("attention_mask")
        if mask is None or output.shape[:2] != mask.shape:
            return output
        valid: torch.Tensor = output * mask.reshape(*mask.shape, *[1] * (output.dim() - 2))
        return valid

    def _limit(self, name: str, noise: Floors) -> float:
        """One noise floor, the order of fp32 sums included."""
        scale = largest(float(x[name].abs().max()) for x in (*self._unmerged, *self._base))
        return noise[name].max_abs + scale * FP32_ARITHMETIC

    def _checks(self, noise: Floors, known: Floors, found: list[Outputs], prefix: str, where: str) -> list[Check]:
        """Each output against the unmerged model's. known: what the weights of a graph do, without a factor."""
        shift = "what these weights do in PyTorch + " if known else ""
        note = f"{shift}{self.factor:g} × the noise floor ({where})"
        first, *others = (n for n in self._unmerged[0] if n in found[0])
        apart = self._between(self._unmerged, found)
        limits = {n: known.get(n, Floor()).max_abs + self.factor * self._limit(n, noise) for n in apart}
        angle = known.get(first, Floor()).angle + self.factor * noise[first].angle
        least = 1 - angle**2 - COSINE_ARITHMETIC
        similar = 1 - apart[first].angle ** 2
        cosine = Check(
            f"{prefix}embedding_cosine",
            similar,
            least,
            similar >= least > -1,
            f"of {first}, mean over positions, least of all inputs; from the angles of the same noise",
        )
        # A single score has no direction: its cosine is ±1, and the sign of a score near zero is noise.
        single = self._unmerged[0][first].shape[-1] == 1
        return [
            below(f"{prefix}logits_max_abs", apart[first].max_abs, limits[first], f"{note}; output {first}"),
            *([] if single else [cosine]),
            *(below(f"{prefix}{n}_max_abs", apart[n].max_abs, limits[n], f"{note}; output {n}") for n in others),
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
