"""What a package of a pipeline takes of its run, beyond what every package does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.allowed import check_pipeline_folder
from lora_export.contracts import ExportResult, Progress
from lora_export.errors import InputError
from lora_export.packages.job import PackageFacts, PackageTarget, Run, Sample
from lora_export.packages.pipelines.families import PROMPT, drawing_of, family_of
from lora_export.packages.pipelines.laying import INDEX, parts_in
from lora_export.packages.pipelines.programs import SAMPLE
from lora_export.packages.targets import targets
from lora_export.runtime import why_not
from lora_export.storage import sealed
from lora_export.workflows.pipelines.drawing import CONFIG, DECODER, DENOISERS, draw


def index_of(export: ExportResult, kept: Path) -> Mapping[str, Any]:
    """The index of a pipeline whose graphs can be packaged. InputError for one that no library may load."""
    from lora_export.onnx_export import check_export

    if not (export.output / INDEX).is_file():
        raise InputError(
            "the run is of a model of diffusers alone, which draws no pictures",
            where=export.output,
            expected="the run of a whole pipeline, with model_index.json",
            next_step="merge-and-export -b PIPELINE, the folder that the model is a part of",
        )
    check_pipeline_folder(export.output)
    if kept != export.output:
        check_pipeline_folder(kept)
    for path in export.paths:
        check_export(path.parent, [path.name])
    return sealed.read_json(kept / INDEX)


def check(run: Run, target: PackageTarget) -> None:
    """InputError for a runtime that draws no pictures, or a run without a part that they need."""
    if not target.draws:
        able = ", ".join(name for name, one in targets().items() if one.draws)
        raise InputError(
            f"--for {target.name} with the run of {run.architecture}: this runtime has no pipelines of images",
            where=run.folder,
            expected=f"--for {able}",
            next_step="--for optimum runs the graphs, --for hf the merged weights with diffusers",
        )
    family_of(run.architecture)
    missing = [name for name in parts_in(run.config) if not _is_there(run, name)]
    if missing:
        raise InputError(
            f"the run has no {', '.join(missing)}, which its model_index.json names",
            where=run.companions,
            expected="a graph of each model, and scheduler and tokenizers",
            next_step="repeat the run",
        )


def _is_there(run: Run, name: str) -> bool:
    return any((place / name).is_dir() for place in (run.companions, run.export.output))


def sample(run: Run) -> Sample:
    """What the graphs of the run are asked to draw."""
    folder = run.export.output
    denoiser = next((name for name in DENOISERS if (folder / name / CONFIG).is_file()), None)
    if denoiser is None or not (folder / DECODER / CONFIG).is_file():
        raise InputError(
            "the export has no graph of a denoiser, or none of a decoder",
            where=folder,
            expected=f"{' or '.join(DENOISERS)}, and {DECODER}",
        )
    own, vae = (sealed.read_json(folder / name / CONFIG) for name in (denoiser, DECODER))
    return Sample(PROMPT, drawing=drawing_of(run.architecture, own, vae, run.export.precision, folder))


def lay_sample(stage: Path, run: Run, facts: PackageFacts, progress: Progress) -> None:
    """Draw the sample with the graphs of the run, into the package."""
    assert facts.sample is not None and facts.sample.drawing is not None
    provider = facts.providers[0] if why_not(facts.providers[0]) is None else "cpu"
    prompt, how = facts.sample.prompt, facts.sample.drawing
    draw(run.export.output, facts.class_name, prompt, how, stage / SAMPLE, provider, progress)
