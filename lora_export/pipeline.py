"""The whole story: an adapter and its base go in, a proven merged model and its ONNX export come out."""

import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export import __version__, manifest
from lora_export.choices import MIN_SURVIVAL, Certify, ExtraArm, Optimize, Precision, Provider
from lora_export.contracts import (
    AdapterChoice,
    BenchmarkArm,
    BenchmarkOptions,
    BenchmarkResult,
    CompareBases,
    ExportedPair,
    ExportResult,
    MergeOptions,
    MergeResult,
    Progress,
    QuantizationOptions,
    Source,
    ValidationResult,
    Verification,
)
from lora_export.errors import ExportError, GateFailed, InputError
from lora_export.files import check_space, output_folder, read_json
from lora_export.workflows.latency import benchmark, extra_arms, refuse_extra, refuse_slower

if TYPE_CHECKING:
    from lora_export.onnx_export.weight_source import WeightSource


@dataclass(frozen=True)
class StoryOptions:
    merge: MergeOptions = field(default_factory=MergeOptions)
    precision: Precision = "fp32"
    provider: Provider = "auto"
    engine: str | None = None
    optimize: Optimize = "full"
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    graph_from: Path | None = None  # an earlier export of the same base: its graph, its precision, its engine
    merged_folder: bool = True  # False: base and adapter go straight into the export
    benchmark: BenchmarkOptions = field(default_factory=BenchmarkOptions)
    extra_arms: tuple[ExtraArm, ...] = ()  # measured besides base, merged and unmerged
    prompts: Path | None = None
    text: Path | None = None
    rows: int | None = 64
    tolerance: float = 4.0
    min_survival: float = MIN_SURVIVAL
    validation_memory: int | None = None  # bytes for the weights that validation compares; None: as there is
    force: bool = False


@dataclass(frozen=True)
class Story:
    """What a run left: its folder and the result of each stage that ran."""

    output: Path
    merge: MergeResult
    export: ExportResult | None = None
    validate: ValidationResult | None = None
    benchmark: BenchmarkResult | None = None

    def as_json(self) -> dict[str, Any]:
        stages = {
            "merge": self.merge,
            "validate": self.validate,
            "export": self.export,
            "benchmark": self.benchmark,
        }
        return {
            "output": str(self.output),
            **{name: result.as_json() if result else None for name, result in stages.items()},
            "report": str(self.output / "report" / "report.html"),
        }


def merge_and_export(
    base: Source,
    adapters: Sequence[tuple[Source, float]],
    output: Path,
    options: StoryOptions,
    progress: Progress,
) -> Story:
    """Merge, export, validate, benchmark, report. A gate that fails leaves everything in `output.failed`."""
    from lora_export.runtime import resolve_provider

    options = _like_earlier(replace(options, provider=resolve_provider(options.provider)))
    choices = [AdapterChoice(source.folder, weight) for source, weight in adapters]
    inputs = [base.folder, *(c.folder for c in choices), *([options.graph_from] if options.graph_from else [])]
    _preflight(base, choices, output, options)
    with output_folder(output, options.force, inputs=inputs) as stage:
        work = stage / ".work"
        work.mkdir()
        story = _run(base, choices, stage, work, options, progress)
        shutil.rmtree(work)
        story = _relocated(story, stage, output)
        _write_report(story, stage, base, adapters, options)
        manifest.write(stage, base, adapters, options_json(options))
        _gates(story)
    return story


def _run(
    base: Source,
    adapters: Sequence[AdapterChoice],
    stage: Path,
    work: Path,
    options: StoryOptions,
    progress: Progress,
) -> Story:
    from lora_export.merging import merge
    from lora_export.validation import validate

    folder = stage / "merged" if options.merged_folder else work / "outline"
    merged = merge(base.folder, adapters, folder, options.merge, progress) if options.merged_folder else None
    trained_on = prepared_base(base.folder, options.merge, work, progress)
    base_onnx = _export(trained_on, work / "base", options, progress, "the base, to compare with")
    if merged is not None:
        exported = _export_merged(base_onnx, folder, stage / "onnx", options, progress)
    else:
        merged, exported = _merge_into(base_onnx, base.folder, adapters, folder, stage, options, progress)
    unmerged_onnx, why_not = _export_unmerged(trained_on, adapters, work, options, exported, progress)
    story = Story(stage, merged, exported)

    checked = validate(
        base.folder,
        adapters,
        folder,
        exports=[_pair(exported, base_onnx.output)],
        dequantized=_stand_in(base.folder, folder, options, work, progress),
        graphs_alone=not options.merged_folder,
        options=_validation_options(options, options.provider),
        progress=progress,
    )
    story = replace(story, validate=checked)
    if not checked.passed:
        return story

    arms = [BenchmarkArm("base", base_onnx.paths), BenchmarkArm("merged", exported.paths)]
    if unmerged_onnx:
        arms.append(BenchmarkArm("unmerged", unmerged_onnx.paths))
    unmerged_graph = unmerged_onnx.model if unmerged_onnx else None
    extra, without = extra_arms(options.extra_arms, unmerged_graph, trained_on, adapters, progress)
    measured = benchmark([*arms, *extra], replace(options.benchmark, provider=options.provider), progress)
    return replace(story, benchmark=replace(measured, notes=(*measured.notes, *why_not, *without)))


def prepared_base(base: Path, options: MergeOptions, work: Path, progress: Progress) -> Path:
    """The folder of the base that the adapter belongs to: itself, or a dequantized copy in `work`."""
    from lora_export.merging import merge, plan

    planned = plan(base, [], replace(options, dtype="keep"))
    if planned.counts["dequantized"] == 0:
        return base
    merge(base, [], work / "base-weights", replace(options, dtype="keep", force=True), progress)
    return work / "base-weights"


def _stand_in(base: Path, merged: Path, options: StoryOptions, work: Path, progress: Progress) -> Path | None:
    """An fp32 copy of a quantized base, for validation, unless bitsandbytes itself can dequantize it there."""
    from lora_export.merging import merge
    from lora_export.quantization import method_of
    from lora_export.validation import streams

    settings = read_json(base / "config.json").get("quantization_config")
    on_the_fly = options.merge.training_quantization != "none" and options.merge.base_weights == "dequantized"
    method = method_of(settings) if settings else "bitsandbytes" if on_the_fly else None
    if method is None or (method == "bitsandbytes" and not streams(merged, options.validation_memory)):
        return None
    progress.warn(
        f"{method} weights are read by this tool alone: validation checks what was merged into them, "
        "not how they were read"
    )
    return merge(base, [], work / "stand-in", replace(options.merge, dtype="float32"), progress).output


def _like_earlier(options: StoryOptions) -> StoryOptions:
    """With the precision and the engine of the export whose graph is to be taken, if there is one."""
    if options.graph_from is None:
        return options
    from lora_export.onnx_export import load_export

    like = load_export(options.graph_from)
    return replace(options, precision=like.precision, engine=like.engine)


def _merge_into(
    base_onnx: ExportResult,
    base: Path,
    adapters: Sequence[AdapterChoice],
    outline: Path,
    stage: Path,
    options: StoryOptions,
    progress: Progress,
) -> tuple[MergeResult, ExportResult]:
    """Merge and export in one pass; the certificate lies in `stage`, the rest of a merged folder in `outline`."""
    from lora_export.merging import CERTIFICATE, begin_stream, end_stream

    started = time.monotonic()
    source = begin_stream(base, adapters, outline, options.merge, progress)
    exported = _export_merged(base_onnx, outline, stage / "onnx", options, progress, source)
    seconds = time.monotonic() - started
    return end_stream(source, adapters, stage / CERTIFICATE, seconds, progress), exported


def _export_merged(
    base_onnx: ExportResult,
    merged: Path,
    output: Path,
    options: StoryOptions,
    progress: Progress,
    source: "WeightSource | None" = None,
) -> ExportResult:
    """The merged model with the base's graph; with one of its own where the merge changed more than weights.

    source: where the numbers come from, if `merged` is an outline without them.
    """
    progress.stage("export: the merged model, with the graph of the base")
    return _with_graph_of(base_onnx, merged, output, options, progress, "the merged model", source)


def _with_graph_of(
    earlier: ExportResult,
    model: Path,
    output: Path,
    options: StoryOptions,
    progress: Progress,
    what: str,
    source: "WeightSource | None" = None,
) -> ExportResult:
    """`model` with the graph of `earlier`; with one of its own where that does not take its weights."""
    from lora_export.onnx_export import reweight

    try:
        return reweight(earlier.output, model, output, source=source, progress=progress)
    except ExportError as error:
        if options.graph_from is not None:
            raise
        progress.detail(f"a graph of its own: {error.found}")
    return _export(model, output, options, progress, what, source=source)


def _export(
    model: Path,
    output: Path,
    options: StoryOptions,
    progress: Progress,
    what: str,
    adapter: Path | None = None,
    source: "WeightSource | None" = None,
) -> ExportResult:
    from lora_export.onnx_export import export, reweight

    progress.stage(f"export: {what}")
    if options.graph_from is not None and adapter is None:
        return reweight(options.graph_from, model, output, progress=progress)
    return export(
        model,
        output,
        precision=options.precision,
        provider=options.provider,
        engine=options.engine,
        optimize=options.optimize,
        quantization=options.quantization,
        adapter=adapter,
        source=source,
        progress=progress,
    )


def _export_unmerged(
    trained_on: Path,
    adapters: Sequence[AdapterChoice],
    work: Path,
    options: StoryOptions,
    exported: ExportResult,
    progress: Progress,
) -> tuple[ExportResult | None, tuple[str, ...]]:
    """The unmerged graph, or why there is none: it is a control, so a run goes on without it and says so."""
    if exported.kind != "decoder":
        return None, ("no unmerged graph: the engine for this architecture exports merged models only",)
    if len(adapters) != 1 or adapters[0].weight != 1.0 or options.merge.combine != "none":
        return None, ("no unmerged graph: it takes exactly one adapter of weight 1, as it is",)
    try:
        what = "the unmerged model, the control of the benchmark"
        return (
            _export(trained_on, work / "unmerged", options, progress, what, adapter=adapters[0].folder),
            (),
        )
    except ExportError as error:
        progress.warn(f"no unmerged graph to compare with: {error.found}")
        return None, (f"no unmerged graph: {error.found}",)


def validate_folder(
    base: Source,
    adapters: Sequence[tuple[Source, float]],
    merged: Path,
    onnx: Sequence[Path],
    base_onnx: Sequence[Path],
    options: StoryOptions,
    progress: Progress,
    bases: CompareBases | None = None,
    own_texts: Sequence[Path] = (),
) -> ValidationResult:
    """Validate what an earlier run left.

    onnx: exports in different precisions; base_onnx: the base exported in the same ways and order, or none: then it
    is exported anew for each. bases: compare the bases that a QLoRA adapter could be merged into. own_texts: a text
    for each adapter, on which is measured what the merged model has left of it.
    """
    from lora_export.onnx_export import load_export
    from lora_export.runtime import resolve_provider
    from lora_export.validation import validate
    from lora_export.validation.own_texts import own_texts as measure

    exports = [load_export(folder) for folder in onnx]
    _check_exports(exports, base_onnx)
    if own_texts and len(own_texts) != len(adapters):
        raise InputError(
            f"{len(own_texts)} × --own-text and {len(adapters)} × -a",
            expected="one text for each adapter, in the same order",
            next_step="the same command with an --own-text for each -a",
        )
    choices = [AdapterChoice(source.folder, weight) for source, weight in adapters]
    provider: Provider = resolve_provider(options.provider) if onnx else "cpu"
    with tempfile.TemporaryDirectory(prefix="lora-export-") as folder:
        work = Path(folder)
        pairs = []
        for i, exported in enumerate(exports):
            if base_onnx:
                same = base_onnx[i]
            else:
                same = _export_base(base.folder, exported, work, replace(options, provider=provider), progress)
            prefix = "onnx_" if i == 0 else f"onnx_{exported.precision}_"
            pairs.append(_pair(exported, same, prefix))
        stand_in = _stand_in(base.folder, merged, options, work, progress)
        result = validate(
            base.folder,
            choices,
            merged,
            exports=pairs,
            dequantized=stand_in,
            options=_validation_options(options, provider, bases, _again(merged, onnx[0]) if onnx else None),
            progress=progress,
        )
        if not own_texts:
            return result
        found = measure(base.folder, choices, merged, own_texts, options.merge, stand_in, progress)
        return replace(
            result,
            perplexities=(*result.perplexities, *found.perplexities),
            adapter_survival=(*result.adapter_survival, *found.adapter_survival),
        )


def _validation_options(
    options: StoryOptions, provider: Provider, bases: CompareBases | None = None, again: str | None = None
) -> Any:
    from lora_export.validation import ValidationOptions

    return ValidationOptions(
        prompts=options.prompts,
        text=options.text,
        rows=options.rows,
        provider=provider,
        merge=options.merge,
        tolerance=options.tolerance,
        min_survival=options.min_survival,
        max_memory=options.validation_memory,
        bases=bases,
        **({"again": again} if again else {}),
    )


def _check_exports(exports: Sequence[ExportResult], bases: Sequence[Path]) -> None:
    precisions = [e.precision for e in exports]
    twice = next((p for p in precisions if precisions.count(p) > 1), None)
    if twice is not None:
        raise InputError(
            f"two of the exports are in {twice}",
            where=[e.output for e in exports if e.precision == twice][1],
            expected="one --onnx a precision: their checks are told apart by it",
            next_step="validate them one at a time",
        )
    if bases and len(bases) != len(exports):
        raise InputError(
            f"{len(exports)} × --onnx and {len(bases)} × --base-onnx",
            expected="one --base-onnx for each --onnx, in the same order and the same precisions, or none",
            next_step="leave out --base-onnx: the base is then exported the same way, and deleted",
        )


def _export_base(base: Path, like: ExportResult, work: Path, options: StoryOptions, progress: Progress) -> Path:
    """The base that the adapter belongs to, exported as `like` was: with its graph, if that takes other weights."""
    quantization = replace(options.quantization, activations=like.activations)
    same = replace(options, precision=like.precision, engine=like.engine, quantization=quantization)
    weights = work / "base-weights"
    trained_on = weights if weights.is_dir() else prepared_base(base, options.merge, work, progress)
    what, output = f"the base in {like.precision}, for the noise floor", work / f"base-{like.precision}"
    progress.stage(f"export: {what}")
    return _with_graph_of(like, trained_on, output, same, progress, what).output


def _pair(exported: ExportResult, base: Path, prefix: str = "onnx_") -> ExportedPair:
    size = sum(exported.files.values())
    return ExportedPair(exported.output, base, exported.precision, size, prefix, exported.graphs)


def _again(merged: Path, onnx: Path) -> str:
    """The commands that try another precision of what was validated."""
    other = f"{shlex.quote(str(onnx))}-{{precision}}"
    export = f"lora-export export -m {shlex.quote(str(merged))} -o {other} --precision {{precision}}"
    return f"{export}, and then this command with --onnx {other}"


def verify(
    path: Path,
    base: Source | None,
    adapters: Sequence[tuple[Source, float]],
    certify: Certify,
    progress: Progress,
) -> Verification:
    """Check a merged folder, or all of a run folder, again. InputError if it is neither."""
    from lora_export.merging.verification import verify_folder, verify_streamed

    if not path.is_dir():
        raise InputError("there is no such folder", where=path, expected="a merged folder, or that of a whole run")
    choices = [AdapterChoice(source.folder, weight) for source, weight in adapters]
    folder = base.folder if base else None
    if not manifest.is_run(path):
        return verify_folder(path, folder, choices, certify, progress)
    progress.stage("verify: every file of the run")
    files, not_checked = manifest.verify(path, folder, choices)
    if (path / "merged").is_dir():
        merged = verify_folder(path / "merged", folder, choices, certify, progress)
    else:
        from lora_export.onnx_export import tensor_hashes

        merged = verify_streamed(path, tensor_hashes(path / "onnx"))
    return Verification((*files, *merged.checks), (*not_checked, *merged.not_checked))


def _preflight(base: Source, choices: Sequence[AdapterChoice], output: Path, options: StoryOptions) -> None:
    """Everything that can be refused on headers and config, before minutes of work."""
    from lora_export.merging import plan
    from lora_export.onnx_export import check_request
    from lora_export.validation.prompts import read_prompts
    from lora_export.validation.text import read_text

    read_prompts(options.prompts)
    read_text(options.text)
    planned = plan(base.folder, choices, options.merge)
    config = dict(planned.base.config)
    config.pop("quantization_config", None)  # the merge removes it
    check_request(config, options.precision, options.provider, options.engine, options.quantization)
    refuse_extra(options.extra_arms, choices, options.precision, options.merge.combine)
    # merged, and the graphs of merged, base and unmerged, and perhaps the dequantized base; fp32 at most
    widest = max(planned.nbytes, planned.nbytes * 4 // _width(planned.dtype))
    folders = 2 if options.merged_folder else 1
    check_space(output.absolute().parent, planned.nbytes * folders + widest * 3)


def _width(dtype: str) -> int:
    return {"float16": 2, "bfloat16": 2}.get(dtype, 4)


def _relocated(story: Story, stage: Path, output: Path) -> Story:
    """The same results with the paths that the run will have when it is renamed."""
    assert story.export is not None
    moved = replace(
        story.merge,
        output=output / story.merge.output.relative_to(stage),
        certificate=output / story.merge.certificate.relative_to(stage),
    )
    return replace(story, output=output, merge=moved, export=replace(story.export, output=output / "onnx"))


def _gates(story: Story) -> None:
    """Raise GateFailed for the first gate that did not pass; the report says it in full."""
    if story.validate is not None and not story.validate.passed:
        lost = _only_survival_failed(story.validate)
        raise GateFailed(
            "validation failed: " + failures(story.validate),
            where=story.output.with_name(story.output.name + ".failed"),
            tensor=next(iter(_suspects(story.validate)), None),
            expected="an export that keeps the adapter's effect"
            if lost
            else "a merged model that computes what the unmerged one computes",
            next_step=story.validate.advice[-1] if lost else "read report/report.html in that folder",
        )
    if story.benchmark is not None:
        refuse_slower(story.benchmark, story.output, "report/report.html")


def _suspects(result: ValidationResult) -> tuple[str, ...]:
    """Tensors at fault: those of the first module that goes wrong, then all others."""
    return (*(result.deviation.tensors if result.deviation else ()), *result.weight_errors)


def _only_survival_failed(result: ValidationResult) -> bool:
    return bool(result.advice) and all(c.passed or c.name.endswith("adapter_survival") for c in result.checks)


def failures(result: ValidationResult) -> str:
    """The failed checks in one line (name, value and threshold), and the first module that goes wrong."""
    failed = [
        f"{c.name} is {c.value:.4g}" + (f", allowed {c.threshold:.4g}" if c.threshold is not None else "")
        for c in result.checks
        if not c.passed
    ]
    where = [f"the first module that differs is {result.deviation.module}"] if result.deviation else []
    return "; ".join([*failed, *where])


# --- what a run leaves -------------------------------------------------------------------------------------


def _write_report(
    story: Story,
    stage: Path,
    base: Source,
    adapters: Sequence[tuple[Source, float]],
    options: StoryOptions,
) -> None:
    from lora_export.report import write

    passed = story.validate is not None and story.validate.passed
    slower = story.benchmark is not None and story.benchmark.verdict == "slower"
    report = new_report("merge-and-export", options_json(options), base, adapters)
    report |= {
        "status": "passed" if passed and not slower else "failed",
        "merge": _relative(story.merge.as_json(), story.output)
        | {"records": [asdict(r) for r in story.merge.records]},
        "validate": story.validate.as_json() if story.validate else None,
        "export": _relative(story.export.as_json(), story.output) if story.export else None,
        "benchmark": story.benchmark.as_json() if story.benchmark else None,
    }
    write(report, stage / "report", *raw(story.benchmark))


def raw(measured: BenchmarkResult | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Every timing, and the conditions under which each block was measured."""
    return (dict(measured.samples), dict(measured.conditions)) if measured else (None, None)


def new_report(
    title: str,
    options: Mapping[str, Any],
    base: Source | None = None,
    adapters: Sequence[tuple[Source, float]] = (),
) -> dict[str, Any]:
    """report.json without any stage: who made it, when, from what. Names, never folders of this machine."""
    from lora_export.report import SCHEMA_VERSION

    names = [a.folder.resolve().name for a, _ in adapters]
    return {
        "schema_version": SCHEMA_VERSION,
        "title": f"{' + '.join(names)} on {base.folder.resolve().name}" if base and names else title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool_version": __version__,
        "status": "passed",
        "options": dict(options),
        "sources": {
            "base": manifest.named(base) if base else None,
            "adapters": [manifest.named(source) | {"weight": weight} for source, weight in adapters],
        },
        "merge": None,
        "validate": None,
        "export": None,
        "benchmark": None,
    }


def _relative(result: dict[str, Any], output: Path) -> dict[str, Any]:
    prefix = f"{output}/"
    return {k: v.removeprefix(prefix) if isinstance(v, str) else v for k, v in result.items()}


def options_json(options: StoryOptions) -> dict[str, Any]:
    """The options as a report and a manifest keep them."""
    kept = asdict(options)
    kept["prompts"] = options.prompts.name if options.prompts else None
    kept["text"] = options.text.name if options.text else None
    kept["graph_from"] = options.graph_from.name if options.graph_from else None
    calibration = options.quantization.calibration
    kept["quantization"]["calibration"] = calibration.name if calibration else None
    kept.pop("force")
    kept["merge"].pop("force")
    return kept


def load_run(run: Path) -> dict[str, Any]:
    """report.json of a run folder or of its report folder."""
    inner = run / "report" / "report.json"
    return read_json(inner if inner.is_file() else run / "report.json")
