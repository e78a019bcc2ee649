"""How a model without next-token logits is compared: all its outputs, and the embedding pooled from the first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.contracts import Check, ValidationResult
from lora_export.errors import InputError
from lora_export.validation.comparing import sentence
from lora_export.validation.comparing.comparison import Comparison, Graph
from lora_export.validation.comparing.logits import Shift, largest, max_abs
from lora_export.validation.comparing.tested_model import plain
from lora_export.validation.comparing.thresholds import FP32_ARITHMETIC, below, reported
from lora_export.validation.effect.effect import OutputEffect
from lora_export.validation.graphs.runs import OnnxEncoder

Outputs = dict[str, torch.Tensor]
# A pooled vector is a mean of the outputs; 1 − cos of two that differ by fp32 arithmetic alone.
COSINE_ARITHMETIC = 1e-6


Shifts = dict[str, Shift]


def _widest(draws: Sequence[Shifts]) -> Shifts:
    """Of each output."""
    widest: Shifts = {}
    for drawn in draws:
        for name, shift in drawn.items():
            widest[name] = widest.get(name, Shift()).widest(shift)
    return widest


@dataclass(kw_only=True)
class EncoderComparison(Comparison[Outputs, Shifts]):
    """batches: keyword inputs of one forward each."""

    batches: Sequence[Mapping[str, Any]]

    @property
    def _positions(self) -> int:
        return len(self.batches) * len(self._unmerged[0])

    @property
    def _given(self) -> Mapping[str, object]:
        return {"batches": self.batches}

    def once(self, model: Any) -> Any:
        return plain(model)(**self.batches[0])

    def _compared(self, unmerged: Any, merged: Any) -> ValidationResult:
        sums = _widest(self._sums)
        noise = {name: shift.plus(sums[name]) for name, shift in _widest(self._rounding).items()}
        where = "rounding errors on the unmerged model, and the order of fp32 sums"
        self._merged = self._outputs(merged)
        checks = self._checks(noise, {}, self._merged, "", where)
        floor = Check("noise_floor_max_abs", self._limit(next(iter(self._unmerged[0])), noise), None, True, where)
        return ValidationResult((*checks, floor))

    def _runner(self, graph: Graph) -> OnnxEncoder:
        return OnnxEncoder(graph.paths[0], graph.provider)

    def _answers(self, runner: OnnxEncoder) -> list[Outputs]:
        """The outputs of the graph by their names, padded batches among them."""
        return runner.outputs(self.batches)

    def _judge_graph(
        self, graph: Graph, runner: Any, answers: Sequence[Outputs], known: Shifts | None, where: str
    ) -> list[Check]:
        self._refuse_unknown(graph, answers)
        noise = self._noise(graph, rounding=True)
        floor = self._limit(next(n for n in self._unmerged[0] if n in answers[0]), noise)
        return [
            *self._checks(noise, known or {}, answers, graph.prefix, where),
            reported(f"{graph.prefix}noise_floor_max_abs", floor, where),
        ]

    def effect(self, merged: Graph) -> OutputEffect:
        """Along every output of the graphs."""
        low, low_base = self._low
        # 1 − cos of two vectors is half the square of what is between them, relative to their length.
        angle = largest(shift.angle for shift in _widest(self._arithmetic).values())
        narrow = merged.arithmetic.times > 1
        effect = OutputEffect(2 * (self.factor * angle) ** 2 if narrow else 0.0)
        for at in zip(self.batches, self._base, self._unmerged, low_base, low, strict=True):
            batch, *outputs = at
            for name in (n for n in outputs[1] if n in outputs[3]):
                effect.add(*(self._valid(o[name], batch) for o in outputs))
        return effect

    def _along(self, outputs: Sequence[Outputs]) -> float:
        effect = OutputEffect()
        for batch, base, unmerged, other in zip(self.batches, self._base, self._unmerged, outputs, strict=True):
            for name in (n for n in unmerged if n in other):
                b, m, o = (self._valid(x[name], batch) for x in (base, unmerged, other))
                effect.add(b, m, torch.zeros_like(o), o)
        return sum(effect.kept)

    def _refuse_unknown(self, graph: Graph, answers: Sequence[Outputs]) -> None:
        if not any(name in answers[0] for name in self._unmerged[0]):
            raise InputError(
                f"no output of the graph ({', '.join(answers[0])}) is one of the model",
                where=graph.paths[0],
                expected=", ".join(self._unmerged[0]),
            )

    def _beside(
        self, graph: Graph, exact: Sequence[Outputs], answers: Sequence[Outputs], runner: Any
    ) -> dict[str, Shifts]:
        self._refuse_unknown(graph, answers)
        return super()._beside(graph, exact, answers, runner)

    def _graph_checks(self, graph: Graph, beside: Mapping[str, Shifts]) -> list[Check]:
        noise = self._noise(graph, rounding=not graph.readable)
        note = (
            f"{self.factor:g} × the noise floor of {graph.arithmetic.words}, against PyTorch with the weights that "
            "the graph holds"
        )
        return [
            below(
                f"{graph.prefix}graph_{name}_max_abs",
                moved.max_abs,
                self.factor * self._limit(name, noise),
                note,
            )
            for name, moved in beside["graph"].items()
        ]

    @torch.inference_mode()
    def _outputs(self, model: Any, first: int | None = None) -> list[Outputs]:
        body = plain(model)
        return [_all_outputs(body, batch) for batch in self.batches[:first]]

    def _noise(self, graph: Graph, rounding: bool) -> Shifts:
        """Of the graph's arithmetic, and of the rounding of its weights."""
        times, arithmetic = graph.arithmetic.times, _widest(self._arithmetic)
        rounded = _widest(self._rounding) if rounding else {}
        return {name: rounded.get(name, Shift()).plus(shift, times) for name, shift in arithmetic.items()}

    def _is_finite(self, apart: Shifts) -> bool:
        return all(math.isfinite(shift.max_abs) for shift in apart.values())

    def _apart(self, reference: Sequence[Outputs], other: Sequence[Outputs]) -> Shifts:  # type: ignore[override]
        """For each output that both have: how far it moved, over all batches; padding does not count."""
        return {n: self._difference(n, reference, other) for n in reference[0] if n in other[0]}

    def _difference(self, name: str, reference: Sequence[Outputs], other: Sequence[Outputs]) -> Shift:
        pairs = [
            (self._valid(a[name], batch), self._valid(b[name], batch))
            for a, b, batch in zip(reference, other, self.batches, strict=True)
        ]
        if any(a.shape != b.shape for a, b in pairs):
            return Shift(math.nan, math.nan)
        apart = largest(_one_minus_cosine(a, b) for a, b in pairs)
        return Shift(largest(max_abs(a, b) for a, b in pairs), apart**0.5)

    def _valid(self, output: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        mask = batch.get("attention_mask")
        if mask is None or output.shape[:2] != mask.shape:
            return output
        valid: torch.Tensor = output * mask.reshape(*mask.shape, *[1] * (output.dim() - 2))
        return valid

    def _limit(self, name: str, noise: Shifts) -> float:
        """One noise floor, the order of fp32 sums included."""
        scale = largest(float(x[name].abs().max()) for x in (*self._unmerged, *self._base))
        return noise[name].max_abs + scale * FP32_ARITHMETIC

    def _checks(
        self, noise: Shifts, known: Shifts, answers: Sequence[Outputs], prefix: str, where: str
    ) -> list[Check]:
        """Each output against the unmerged model's. known: what the weights of a graph do, without a factor."""
        shift = "what these weights do in PyTorch + " if known else ""
        note = f"{shift}{self.factor:g} × the noise floor ({where})"
        first, *others = (n for n in self._unmerged[0] if n in answers[0])
        apart = self._apart(self._unmerged, answers)
        limits = {n: known.get(n, Shift()).max_abs + self.factor * self._limit(n, noise) for n in apart}
        angle = known.get(first, Shift()).angle + self.factor * noise[first].angle
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


def _all_outputs(body: Any, batch: Mapping[str, Any]) -> Outputs:
    """The model's own, and the embedding that sentence-transformers' modules make of its states."""
    given = body(**batch)
    outputs, states = dict(_tensors(given)), getattr(given, "last_hidden_state", None)
    pooled = None if states is None else sentence.embedding(body, states, batch.get("attention_mask"))
    return outputs if pooled is None else {**outputs, sentence.OUTPUT: pooled.float()}


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
