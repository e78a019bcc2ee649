"""The benchmark of a pipeline: the step of its denoiser, timed in one process, and the graphs of all parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_export.allowed import check_pipeline_folder
from lora_export.checkpoint.pipeline import INDEX
from lora_export.choices import GRIDS
from lora_export.contracts import (
    BenchmarkArm,
    BenchmarkOptions,
    BenchmarkResult,
    Component,
    GraphComparison,
    PictureTime,
    Pipeline,
    Progress,
)
from lora_export.errors import ExportError, InputError
from lora_export.storage.files import output_folder
from lora_export.storage.sealed import read_json
from lora_export.workflows.latency import refuse_slower
from lora_export.workflows.run_report import new_report

GRAPH = "model.onnx"
DENOISERS, ALONE = ("unet", "transformer"), "denoiser"
DECODER = "vae_decoder"
_LONGEST = 20.0  # seconds of pictures, after which no further one of an arm is begun
_SIDE = 64  # of a latent, where no configuration says a size
Loaded = Callable[[str], Any]  # device → a module of diffusers


def benchmark_pipelines(
    merged: Path,
    base: Path | None,
    output: Path,
    options: BenchmarkOptions,
    progress: Progress,
    *,
    force: bool = False,
) -> BenchmarkResult:
    """Compare two exported pipelines on the disk, and write a report and every raw sample into the new folder
    `output`. GateFailed if merged is slower: then everything is in `output.failed`."""
    from lora_export.report import write
    from lora_export.runtime import resolve_provider

    if base is None:
        raise InputError(
            "an exported pipeline is measured against its base", where=merged, next_step="-b BASE_ONNX"
        )
    for folder in (base, merged):
        check_pipeline_folder(folder)
    pipeline = exported(merged)
    options, side = replace(options, provider=resolve_provider(options.provider)), own_side(pipeline)
    with output_folder(output, force, inputs=[base, merged]) as stage:
        result = with_pictures(
            measure(base, merged, options, side, progress), base, merged, pipeline.class_name, progress
        )
        report = new_report("benchmark", {"benchmark": asdict(options) | {"arms": ["base", "merged"]}})
        write(replace(report, status="failed" if result.verdict == "slower" else "passed", benchmark=result), stage)
        refuse_slower(result, output, "report.html")
    return result


def refuse_arms(names: Sequence[str]) -> None:
    """InputError for arms that a pipeline's benchmark has not."""
    if names:
        raise InputError(
            f"--{', --'.join(names)} with an exported pipeline",
            expected="its base and itself: -b BASE_ONNX -m MERGED_ONNX",
            next_step="lora-export merge-and-export, which measures the unmerged denoiser under PyTorch, too",
        )


def is_exported(folder: Path) -> bool:
    """Whether this is a pipeline in Optimum's layout."""
    return (folder / INDEX).is_file() and any((folder / name / GRAPH).is_file() for name in DENOISERS)


def exported(folder: Path) -> Pipeline:
    """An exported pipeline, as far as its sizes are told: the denoiser and the VAE by their configurations."""
    parts = {}
    for name, part in (*((n, n) for n in DENOISERS), ("vae", DECODER)):
        if (folder / part / GRAPH).is_file():
            config = read_json(folder / part / "config.json")
            parts[name] = Component(name, folder / part, "diffusers", str(config.get("_class_name")), config)
    class_name = read_json(folder / INDEX).get("_class_name")
    return Pipeline(folder, class_name if isinstance(class_name, str) else None, parts)


def measure(
    base: Path,
    merged: Path,
    options: BenchmarkOptions,
    side: int,
    progress: Progress,
    pytorch: Mapping[str, Loaded] | None = None,
) -> BenchmarkResult:
    """Compare the graphs of all parts, and time the denoiser's step. base, merged: exported pipelines.

    side: of the latent that they were made for; pytorch: further arms, which PyTorch runs: what loads their module.
    """
    from lora_export.benchmarking import run

    parts = _parts(base, merged)
    denoiser = next(name for name in (*DENOISERS, ALONE) if name in parts)
    progress.stage("benchmark: comparing the optimized graphs of base and merged, part by part")
    graphs = compared(parts, options.provider, progress)
    arms = [BenchmarkArm(name, (graph,)) for name, graph in zip(("base", "merged"), parts[denoiser], strict=True)]
    for name, load in (pytorch or {}).items():
        arms.append(BenchmarkArm(name, arms[-1].graphs, forward=_forward(load)))
    progress.stage(f"benchmark: {', '.join(arm.name for arm in arms)}, the step of {denoiser} in one process")
    options, grid = with_own_size(options, side, alike=graphs[denoiser].identical)
    measured = run(arms, options=options, progress=progress, graph=graphs[denoiser])
    differ = [f"{part}: {text}" for part, graph in graphs.items() for text in graph.differences]
    unlike = [part for part, graph in graphs.items() if not graph.identical]
    verdict, notes = measured.verdict, [*measured.notes, *([grid] if grid else [])]
    if unlike and verdict == "equivalent_by_structure":
        verdict = "inconclusive"
        notes.append(f"the denoiser is the base's graph, but {', '.join(unlike)} is not, which was not measured")
    return replace(
        measured,
        verdict=verdict,
        notes=tuple(notes),
        graphs=graphs,
        graph_identical=not unlike,
        graph_differences=tuple(differ),
    )


def with_pictures(
    result: BenchmarkResult, base: Path, merged: Path, class_name: str | None, progress: Progress
) -> BenchmarkResult:
    """With the time of a whole picture by the graphs of each, or a note why there is none."""
    from lora_export.packages.pipelines.families import PROMPT, drawing_of
    from lora_export.workflows.pipelines.drawing import seconds_of

    if class_name is None:
        return replace(result, notes=(*result.notes, "no time of a picture: a denoiser alone makes none"))
    taken = []
    denoiser = next(name for name in DENOISERS if (merged / name / GRAPH).is_file())
    own, vae = (read_json(merged / part / "config.json") for part in (denoiser, DECODER))
    try:
        how = drawing_of(class_name, own, vae, "", merged)
        progress.stage(f"benchmark: a picture of {how.width} pixels in {how.steps} steps")
        for name, folder in (("base", base), ("merged", merged)):
            seconds = seconds_of(folder, class_name, PROMPT, how, _LONGEST)
            taken.append(PictureTime(name, seconds, how.steps, how.width))
    except ExportError as error:
        return replace(result, notes=(*result.notes, f"no time of a picture: {error.found}"))
    return replace(result, pictures=tuple(taken))


def compared(
    parts: Mapping[str, tuple[Path, Path]], provider: str, progress: Progress
) -> dict[str, GraphComparison]:
    """Part → its optimized graphs of base and merged."""
    from lora_export.onnx_export.graphs.identity import compare

    found = {}
    for part, (base, merged) in parts.items():
        found[part] = compare((base,), (merged,), provider)
        for warning in found[part].warnings:
            progress.warn(f"{part}: {warning}")
    return found


def with_own_size(options: BenchmarkOptions, side: int, *, alike: bool) -> tuple[BenchmarkOptions, str]:
    """A named grid's batches, with latents of this side; other shapes as they are. And a note of the grid, where
    nobody asked for one. alike: base and merged are one graph."""
    from lora_export.benchmarking import shapes_of

    shapes, note = shapes_of(options, alike=alike)
    if shapes in GRIDS.values():
        shapes = tuple(dict.fromkeys((batch, side) for batch, _ in shapes))
    return replace(options, shapes=shapes), note


def refuse_without_denoiser(pipeline: Pipeline) -> None:
    """InputError for a pipeline without what is measured."""
    if pipeline.denoiser is None:
        raise InputError(
            f"{pipeline.class_name or 'the model'} has neither a unet nor a transformer",
            where=pipeline.folder,
            expected="a pipeline whose denoiser is merged, exported and measured",
            next_step="lora-export merge, which takes any component",
        )


def own_side(pipeline: Pipeline) -> int:
    """Of the latent that the pipeline was made for: of the denoiser's configuration, or of its VAE's."""
    denoiser, vae = pipeline.denoiser, pipeline.components.get("vae")
    side = denoiser.config.get("sample_size") if denoiser else None
    if side is None and vae is not None:
        pixels = _first(vae.config.get("sample_size"))
        side = pixels // pixels_each(pipeline) if pixels else None
    return _first(side) or _SIDE


def pixels_each(pipeline: Pipeline) -> int:
    """Pixels along a side for each number of the latent."""
    vae = pipeline.components.get("vae")
    blocks = vae.config.get("block_out_channels") if vae else None
    return int(2 ** (len(blocks) - 1)) if blocks else 8


def _first(size: object) -> int | None:
    """Configurations hold one side, or both."""
    value = size[0] if isinstance(size, list | tuple) and size else size
    return value if isinstance(value, int) and value > 0 else None


def _parts(base: Path, merged: Path) -> dict[str, tuple[Path, Path]]:
    """Part → its graphs of base and merged. InputError unless both have the same parts, with a denoiser."""
    own, other = _graphs(base), _graphs(merged)
    if own.keys() != other.keys() or not own.keys() & {*DENOISERS, ALONE}:
        raise InputError(
            f"the exports have the parts {', '.join(own) or 'none'} and {', '.join(other) or 'none'}",
            where=merged,
            expected="two exports of one pipeline, each with a unet or a transformer",
        )
    return {name: (own[name], other[name]) for name in own}


def _graphs(folder: Path) -> dict[str, Path]:
    """Part → its graph, of a pipeline or of a denoiser alone."""
    if (folder / GRAPH).is_file():
        return {ALONE: folder / GRAPH}
    return {p.parent.name: p for p in sorted(folder.glob(f"*/{GRAPH}"))}


def _forward(load: Loaded) -> Callable[[str], Callable[[Mapping[str, Any]], object]]:
    """What PyTorch runs: the module, given a graph's inputs in its own type."""

    def opened(device: str) -> Callable[[Mapping[str, Any]], object]:
        from lora_export.graph_runs.denoiser import as_arguments

        model = load(device)
        dtype = next(model.parameters()).dtype

        def forward(given: Mapping[str, Any]) -> object:
            cast = {name: v.to(dtype) if v.is_floating_point() else v for name, v in given.items()}
            return model(**as_arguments(cast), return_dict=False)

        return forward

    return opened
