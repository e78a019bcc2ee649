"""The graphs of an exported pipeline: their numbers, their arithmetic, and the picture that they make together."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_export.choices import Precision
from lora_export.contracts import Check, Component, ExportedPair, ExportedPipeline, Progress
from lora_export.storage.sealed import read_json
from lora_export.validation.comparing.arithmetic import Arithmetic
from lora_export.validation.graphs.exports import arithmetic_of
from lora_export.validation.pipelines.arithmetic import computing, eight_bit_inputs, moved_times
from lora_export.validation.pipelines.graphs import DECODER, ENCODER, Graph, Part, in_place, numbers_into, parts_of
from lora_export.validation.pipelines.loading import load
from lora_export.validation.pipelines.outputs import Floor, Outputs, SampleFloor, answers, apart, rmse
from lora_export.validation.pipelines.sampling import Call, Sample, Sampler

RECORD = "export.json"
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Reference:
    """The unmerged pipeline, while it is in memory.

    models: its components in fp32; floors: of the merged components' outputs, by component; sampler: of whole
    pictures, None for a component alone; sampling: the floor of these.
    """

    models: Mapping[str, Any]
    floors: Mapping[str, Floor]
    sampler: Sampler | None
    sampling: SampleFloor | None


@dataclass(frozen=True)
class Expected:
    """What graphs of one precision should answer. floors: by the part's name, of arithmetic alone; arithmetic: the
    largest errors of each output, by part; moved: pictures of models that compute so."""

    calls: Mapping[str, Sequence[Call]]
    reference: Mapping[str, Sequence[Outputs]]
    arithmetic: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]
    rounding: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]
    moved: Sequence[Sample]


@dataclass(frozen=True)
class Judged:
    """checks: of every graph, and of the picture that all of them make; outputs: of each part's graph; sample: that
    picture, None for a component alone."""

    checks: tuple[Check, ...]
    outputs: Mapping[str, Sequence[Outputs]]
    sample: Sample | None


def precision_of(part: Part, export: ExportedPipeline) -> Precision:
    """A graph may be in another precision than the pipeline: an autoencoder that fp16 is too narrow for."""
    record = part.path.parent / RECORD
    told = read_json(record).get("precision") if record.is_file() else None
    precision: Precision = told if isinstance(told, str) else export.precision  # type: ignore[assignment]
    return precision


def computed_as(part: Part, export: ExportedPipeline) -> Arithmetic:
    """The arithmetic of a graph: of its type, and of what it does with inputs of 8 bits."""
    folder = part.path.parent
    return arithmetic_of(ExportedPair(folder, folder, precision_of(part, export), 0), (part.path,))


def expected_of(
    export: ExportedPipeline, components: Mapping[str, Component], reference: Reference, progress: Progress
) -> Expected:
    """Measured on the unmerged models: their outputs, and how far the graphs' arithmetic moves them."""
    progress.stage(f"validate: arithmetic in {export.precision}, measured in PyTorch")
    parts = parts_of(export, components)
    calls = {p.name: _calls(p, reference) for p in parts}
    outputs: dict[str, Sequence[Outputs]] = {}
    arithmetic: dict[str, Sequence[Sequence[Mapping[str, float]]]] = {}
    rounding: dict[str, Sequence[Sequence[Mapping[str, float]]]] = {}
    for part in parts:
        model = _method(reference.models[part.component], part.name)
        floor = reference.floors.get(part.component) if part.name not in (DECODER, ENCODER) else None
        given = calls[part.name]
        outputs[part.name] = floor.reference if floor else answers(model, given)
        rounding[part.name] = floor.draws if floor else []
        how = computed_as(part, export)
        with eight_bit_inputs(reference.models[part.component], how):
            found = _computed(model, given, how)
        causes = [apart(outputs[part.name], found)] * how.times
        if part.component in DENOISERS:
            with moved_times(reference.models[part.component]):
                causes.append(apart(outputs[part.name], answers(model, given)))
        arithmetic[part.name] = causes
    return Expected(calls, outputs, arithmetic, rounding, _moved(export, parts, reference))


def _computed(model: Any, calls: Sequence[Call], how: Arithmetic) -> list[Outputs]:
    """Answers in a type; in bf16, whose errors are larger, where fp16 overflows."""
    with computing(how):
        found = answers(model, calls)
    finite = all(bool(v.isfinite().all()) for outputs in found for v in outputs.values())
    return found if finite or how.dtype != torch.float16 else _computed(model, calls, how.in_bfloat16())


def _moved(export: ExportedPipeline, parts: Sequence[Part], reference: Reference) -> list[Sample]:
    """Pictures that the unmerged pipeline makes with the arithmetic of the graphs."""
    sampler = reference.sampler
    if sampler is None:
        return []
    denoiser = next(reference.models[p.component] for p in parts if p.component in DENOISERS)
    how = computed_as(next(p for p in parts if p.component in DENOISERS), export)
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(eight_bit_inputs(reference.models[part.component], computed_as(part, export)))
        with computing(how):
            moved = [sampler.sample()]
        if not bool(moved[0].picture.isfinite().all()):
            with computing(how.in_bfloat16()):
                moved = [sampler.sample()]
    with moved_times(denoiser):
        moved.append(sampler.sample())
    return moved


def _calls(part: Part, reference: Reference) -> Sequence[Call]:
    floor = reference.floors.get(part.component)
    if part.name not in (DECODER, ENCODER):
        assert floor is not None
        return floor.calls
    if reference.sampling is None:
        model = reference.models[part.component]
        generator = torch.Generator().manual_seed(0)
        if part.name == DECODER:
            return [Call("", {"z": torch.randn(1, model.config.latent_channels, 8, 8, generator=generator)})]
        return [Call("", {"x": torch.randn(1, model.config.in_channels, 32, 32, generator=generator)})]
    known = reference.sampling.reference
    if part.name == DECODER:
        return [Call("", {"z": known.latents})]
    return [Call("", {"x": known.picture.permute(2, 0, 1)[None] * 2 - 1})]


def _method(model: Any, part: str) -> Any:
    """What of a model is a graph: an autoencoder has two."""
    if part == DECODER:
        return lambda z: {"sample": model.decode(z, return_dict=False)[0]}
    if part == ENCODER:
        return lambda x: {"latent_parameters": model.encode(x).latent_dist.parameters}
    return model


def judge_export(
    export: ExportedPipeline,
    merged: Mapping[str, Component],
    expected: Expected,
    sampling: SampleFloor | None,
    sampler: Sampler | None,
    tolerance: float,
    provider: str,
    progress: Progress,
) -> Judged:
    """sampler: with the merged models."""
    progress.stage(f"validate: the exported graphs in {export.precision}, in ONNX Runtime")
    checks: list[Check] = []
    graphs, exact, outputs = [], {}, {}
    for part in parts_of(export, merged):
        graph = Graph(part, provider)
        model = load(merged[part.component])
        found, quantized = numbers_into(model, graph, merged[part.component], export.prefix)
        checks += found
        own = answers(_method(model, part.name), expected.calls[part.name])
        outputs[part.name] = graph.answers(expected.calls[part.name], expected.reference[part.name])
        checks += _graph_checks(export, part, expected, outputs[part.name], own, quantized, tolerance)
        graphs.append(graph)
        if quantized:
            exact[part.name] = model
    if sampler is None or sampling is None or not any(g.part.component in DENOISERS for g in graphs):
        return Judged(tuple(checks), outputs, None)
    known = 0.0, 0.0
    if exact:
        with _models_in_place(sampler, graphs, exact):
            picture = sampler.sample()
        known = sampling.relative_to(picture), rmse(sampling.reference.picture, picture.picture)
    del exact
    with in_place(sampler.pipe, graphs):
        picture = sampler.sample()
    floor = replace(
        sampling, moved=expected.moved, known=known, where=f"{sampling.where}, arithmetic of the graphs"
    )
    return Judged((*checks, *floor.checks(picture, tolerance, export.prefix)), outputs, picture)


@contextlib.contextmanager
def _models_in_place(sampler: Sampler, graphs: Sequence[Graph], exact: Mapping[str, Any]) -> Any:
    """Inside, the pipeline has the models with the graphs' numbers; of an autoencoder those of its decoder."""
    before = {g.part.component: getattr(sampler.pipe, g.part.component) for g in graphs}
    for graph in graphs:
        if graph.part.name in exact and graph.part.name != ENCODER:
            setattr(sampler.pipe, graph.part.component, exact[graph.part.name])
    try:
        yield
    finally:
        for name, model in before.items():
            setattr(sampler.pipe, name, model)


def _graph_checks(
    export: ExportedPipeline,
    part: Part,
    expected: Expected,
    found: Sequence[Outputs],
    own: Sequence[Outputs],
    quantized: bool,
    tolerance: float,
) -> list[Check]:
    """Against PyTorch with the graph's numbers, where arithmetic alone differs, and against the unmerged model."""
    calls, reference = expected.calls[part.name], expected.reference[part.name]
    how = computed_as(part, export).words
    alone = Floor(calls, own, expected.arithmetic[part.name], f"{how}, against PyTorch with the graph's numbers")
    name = f"{export.prefix}{part.name}"
    known = apart(reference, own) if quantized else ()
    both = [*expected.rounding[part.name], *expected.arithmetic[part.name]]
    whole = Floor(calls, reference, both, f"rounding errors and {how}", known)
    return [_one(f"{name}_graph_max_abs", alone.checks(name, found, tolerance)),
            _one(f"{name}_max_abs", whole.checks(name, found, tolerance))]  # fmt: skip


def _one(name: str, checks: Sequence[Check]) -> Check:
    """The worst of all timesteps."""
    worst = max(checks, key=lambda c: _share(c))
    at = worst.name.removesuffix("_max_abs").rpartition("_")[2]
    note = f"{worst.note}; at {at}" if len(checks) > 1 else worst.note
    passed = all(c.passed for c in checks)
    return replace(worst, name=name, passed=passed, note=note)


def _share(check: Check) -> float:
    limit = float(check.threshold or 0.0)
    share = float(check.value) / limit if limit > 0 else float("inf")
    return share if share == share else float("inf")
