"""Run in the engines' process: the proof of one export. Writes its verdict as JSON into a file beside the graphs.

A request has the folders of model and export, the graphs, their kind, precision and provider, the level (quick or
full), whether the numbers were streamed past the model's files, an adapter that is part of the graph, and `result`.
"""

import contextlib
import gc
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_export.validation.proof import decoder, reference, seq2seq, single
from lora_export.validation.proof.first_module import Recorder, first_differing, inner_values
from lora_export.validation.proof.judge import (
    HOPELESS,
    RELATIVE,
    TIMES,
    Measured,
    allowed,
    floors,
    measured,
    worst,
)
from lora_export.validation.proof.trial import Expected, Extent, Graphs, Reference, Trial, expert_count

Battery = Callable[[Reference, Graphs, Extent], Iterator[Trial]]


def battery_of(kind: str) -> Battery:
    """What is tried on a kind of graph."""
    if kind == "vision-language":
        from lora_export.validation.proof import vision_language  # its inputs bring PEFT, which takes a second

        return vision_language.trials
    if kind == "component":
        from lora_export.validation.proof import diffusion  # its own inputs, of no other model

        return diffusion.trials
    return {"encoder": single.trials, "decoder": decoder.trials, "seq2seq": seq2seq.trials}[kind]


@dataclass
class Verdict:
    """What the record and a refusal need: figures of the worst case, and what differs first if it is refused.

    fewer_layers: whether borders are left that only a model of the first layers can reach.
    """

    cases: int = 0
    difference: float = 0.0
    allowed: float = RELATIVE
    case: str = ""
    output: str = ""
    graph: str = ""
    reference: str = ""
    experts: str = ""
    note: str = ""
    module: str = ""
    tensors: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    fewer_layers: bool = False
    passed: bool = True


def main(request: Mapping[str, Any]) -> None:
    warnings.simplefilter("ignore")
    graphs = Graphs(Path(request["export"]), request["graphs"], request["provider"])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(graphs.open)  # while the other core loads the model
        with reference.loaded(request) as of:
            pool.shutdown()
            verdict = Proof(request, of, graphs).verdict()
    gc.collect()
    document = asdict(verdict) | {k: repr(getattr(verdict, k)) for k in ("difference", "allowed")}
    document["fewer_layers"] = verdict.fewer_layers and verdict.passed
    Path(request["export"], request["result"]).write_text(json.dumps(document), encoding="utf-8")


class Proof:
    def __init__(self, request: Mapping[str, Any], of: reference.Loaded, graphs: Graphs) -> None:
        self._of, self._request, self._graphs = of, request, graphs
        self._export = Path(request["export"])
        self._extent = Extent(request["level"] == "full", request["far_only"], of.streamed)
        self._battery = battery_of(request["kind"])
        self._type = reference.arithmetic_of(self._export, request["graphs"])

    def verdict(self) -> Verdict:
        verdict = Verdict(reference=self._of.words)
        if self._of.wrong:
            verdict.passed, verdict.tensors, verdict.cases = False, list(self._of.wrong[:5]), 1
            verdict.difference, verdict.note = float("inf"), "the graph holds other weights than the checkpoint"
            return verdict
        model = Reference(self._of.model)
        found, unusable = self._measure(model)
        if unusable:
            verdict.not_reached.append(unusable)
            return verdict
        if self._graphs.taken_apart:
            verdict.not_reached.append(
                f"the kernel of {self._graphs.taken_apart} GroupNorm, which CUDA alone has: taken apart here"
            )
        found = self._allow(found)
        if _chooses(self._of.model) and not all(m.passes for m in found if not m.limit):
            found = self._again(found)
        verdict.cases = len({m.number for m in found})
        verdict.experts = _experts(model)
        verdict.limits = _limits(found)
        if self._request["kind"] == "decoder":
            verdict.not_reached += decoder.unreached(model, self._graphs, self._extent)
            verdict.fewer_layers = self._needs_fewer_layers()
        most = worst(m for m in found if not m.limit)
        if most is None:
            verdict.passed, verdict.note = False, "PyTorch takes none of the inputs that were made up"
            verdict.difference = float("inf")
            return verdict
        verdict.difference, verdict.allowed, verdict.case = most.difference, most.allowed, most.case
        verdict.output, verdict.graph, verdict.note, verdict.passed = (
            most.output,
            most.graph,
            most.note,
            most.passes,
        )
        if not verdict.passed:
            verdict.module = self._first_module([m for m in found if not m.limit and not m.passes])
        return verdict

    def _needs_fewer_layers(self) -> bool:
        """Whether some border of the configuration is left to a model of the first layers."""
        signature = self._graphs.signature(self._graphs.names[-1])
        found = single.borders(self._of.model.config).values()
        return any(decoder.left_to_fewer_layers(signature, border, self._extent) for border in found)

    def _measure(self, model: Reference) -> tuple[list[Measured], str]:
        """Every output of every trial, and why the graph cannot be run here at all."""
        found: list[Measured] = []
        with model.counting_experts():
            for number, trial in enumerate(self._battery(model, self._graphs, self._extent)):
                if number == 0 and trial.failure and self._request["elsewhere"]:
                    return (
                        [],
                        f"the graph is for {self._request['elsewhere']}, and does not run here: {trial.failure}",
                    )
                found += measured(trial, number)
        return found, ""

    def _allow(self, found: list[Measured]) -> list[Measured]:
        """With what the arithmetic of the graph's type does to PyTorch itself, where that matters."""
        failed = [m for m in found if not m.passes and not m.limit]
        if not failed or self._of.streamed:
            wide = 0.05 if self._of.streamed and self._type != "float32" else RELATIVE
            return [replace(m, allowed=wide) for m in found]
        if self._type == "float32" and any(m.difference > HOPELESS for m in failed):
            return found
        own, times = self._noise(self._type), TIMES[self._type]
        if not all(map(math.isfinite, own.values())) and self._type == "float16":
            own = self._noise("bfloat16")  # what overflows in fp16 does not there, and its errors are larger
        return [replace(m, allowed=allowed(times * own.get((m.number, m.output), 0.0))) for m in found]

    def _noise(self, dtype: str) -> dict[tuple[int, str], float]:
        """What arithmetic in a type does to PyTorch's outputs; of fp32, against sums in float64."""
        plain = self._expected(contextlib.nullcontext())
        with _arithmetic(self._of.model, dtype) as changed:
            return floors(plain, self._expected(changed))

    def _expected(self, within: contextlib.AbstractContextManager[Any]) -> list[Expected]:
        with within:
            return [t.expected for t in self._battery(Reference(self._of.model), self._graphs, self._extent)]

    def _again(self, found: list[Measured]) -> list[Measured]:
        """The better of two drawings: experts with nearly the same score change places in another arithmetic."""
        second, _ = self._measure(Reference(self._of.model, seed=1))
        allowed = {(m.number, m.output): m.allowed for m in found}
        other = {(m.number, m.output): m for m in second}
        return [
            min(m, replace(other.get(key, m), allowed=allowed[key]), key=lambda x: x.share)
            for m in found
            for key in [(m.number, m.output)]
        ]

    def _first_module(self, failed: list[Measured]) -> str:
        """Of the first trial that fails with a figure: its modules and the graph's values, beside each other."""
        one = next((m for m in failed if m.output and not m.note), None)
        if one is None:
            return ""
        recorder = Recorder()
        model = Reference(self._of.model, watch=recorder.watch)
        again = enumerate(self._battery(model, self._graphs, self._extent))
        trial = next(trial for number, trial in again if number == one.number)
        read = [*trial.before, (one.graph, trial.feed)]
        values = [
            v for name, feed in read for v in inner_values(self._export / name, feed, self._request["provider"])
        ]
        return first_differing(recorder.passed, values, min(one.allowed, one.difference / 8))


def _chooses(model: Any) -> bool:
    return any(expert_count(module) for module in model.modules())


def _experts(model: Reference) -> str:
    """How many of each layer's experts were visited, in words."""
    counts = {p: expert_count(model.model.get_submodule(p)) for p in model.visited}
    if not counts:
        return ""
    fewest = min(counts, key=lambda p: len(model.visited[p]) / counts[p])
    return f"{len(model.visited[fewest])} of {counts[fewest]} in the layer with the fewest"


def _limits(found: list[Measured]) -> list[str]:
    """What the graph's operators cannot do, with the figure."""
    failed = [m for m in found if m.limit and not m.passes]
    if not failed:
        return []
    most = max(failed, key=lambda m: m.share)
    figure = most.note or f"{most.difference:.2g} of the largest value"
    return [f"rows of one batch padded on the left differ ({figure}): give rows of one length, or pad on the right"]


@contextlib.contextmanager
def _arithmetic(model: Any, name: str) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """What to run the model in, for its outputs in another arithmetic."""
    from lora_export.validation.comparing import arithmetic

    if name == "float32":
        yield arithmetic.in_double()
        return
    dtype = getattr(torch, name)
    held = [*model.parameters(), *(b for m in model.modules() if m._parameters for b in m._buffers.values())]
    original = [(p, p.data) for p in held if p is not None and p.is_floating_point()]
    try:
        for parameter, value in original:
            parameter.data = value.to(dtype)
        yield contextlib.nullcontext()
    finally:
        for parameter, value in original:
            parameter.data = value
