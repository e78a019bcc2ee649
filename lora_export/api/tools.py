"""What is done with results and with adapters: switch, combine, extract, truncate, inspect, report, verify, env."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_export.checkpoint.adapter_files import single_file
from lora_export.checkpoint.pipeline import is_pipeline
from lora_export.checkpoint.sources import Adapters, Model, adapter_choices, resolve
from lora_export.contracts import (
    FleetPages,
    MergeOptions,
    Progress,
    RankOptions,
    ReportPages,
    Understanding,
    Verification,
    VerifyOptions,
)
from lora_export.errors import InputError

if TYPE_CHECKING:
    from lora_export.adapter_tools import Derived
    from lora_export.workflows.switching import Switched
from lora_export.api.arguments import SILENT, File, Folder, as_path


def switch(
    model: Folder,
    before: Adapters,
    after: Adapters,
    base: Model | None = None,
    options: MergeOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> "Switched":
    """Put other adapters in the place of those in a merged folder or its ONNX export, bit for bit as a fresh merge.

    Args:
        model: A merged folder, or an ONNX export of one, which is changed.
        before: The adapters that are in it, with their weights.
        after: The adapters that replace them.
        base: The base of both; None: the one that the first adapter of `after` names.
        options: Of the merge that an export was made of; a merged folder has its own in its certificate.
        progress: Receives stages and warnings.

    Returns:
        How many tensors differ, bytes written, and seconds.

    Raises:
        InputError: The folder does not hold `before`, or the two need folders of different layout.
        CheckpointError: The base is not the one that the folder was made of.
    """
    from lora_export.workflows import switching

    old, new = adapter_choices(before), adapter_choices(after)
    of_both = resolve(base or switching.base_of(new[0].folder)).folder
    return switching.switch(Path(model), of_both, old, new, progress, options or MergeOptions())


def combine(
    adapters: Adapters,
    output: Folder,
    options: MergeOptions | None = None,
    rank: RankOptions | None = None,
) -> "Derived":
    """Make one adapter of several, without a base.

    Args:
        adapters: The adapters, with their weights.
        output: New folder of a LoRA that PEFT loads.
        options: How they are combined; None: their weighted sum (linear).
        rank: Rank and type of the new adapter; without one a sum of LoRAs is exact.

    Returns:
        Ranks, size, and the error that the rank costs, relative to ‖ΔW‖.

    Raises:
        AdapterError: An adapter needs the weights of the base (DoRA, OFT, IA3).
        InputError: The options do not go together.
    """
    from lora_export.adapter_tools import combine as combine_adapters
    from lora_export.adapter_tools import combine_files
    from lora_export.adapter_tools.saving import Rank

    options, rank = options or MergeOptions(combine="linear"), rank or RankOptions()
    cut, choices = Rank(rank.rank, rank.energy), adapter_choices(adapters)
    files = [path for c in choices if (path := single_file(c.folder)) is not None]
    if files and len(files) < len(choices):
        raise InputError(
            "single files of image models and PEFT folders together",
            where=files[0],
            expected="adapters of one form",
            next_step="lora-export merge -b PIPELINE -a A -a B --combine …, then extract -b PIPELINE -m MERGED",
        )
    if files:
        return combine_files(choices, files, Path(output), options, cut, rank.dtype, rank.force)
    return combine_adapters(choices, Path(output), options, cut, rank.dtype, rank.force)


def extract(
    base: Model,
    tuned: Model,
    output: Folder,
    rank: RankOptions | None = None,
    *,
    rest: Literal["save", "drop", "refuse"] = "save",
    progress: Progress = SILENT,
) -> "Derived":
    """Take a LoRA out of a fully tuned model: B·A of the largest singular values of each layer's difference.

    Args:
        base: Folder or Hub ID of the base.
        tuned: Folder or Hub ID of the tuned model.
        output: New folder of a LoRA that PEFT loads; of two pipelines, with a file as diffusers names it.
        rank: A rank, or a share of ‖ΔW‖² to keep; one of them is needed.
        rest: Changed weights that are not matrices of a layer: saved whole, left out, or refused.
        progress: Receives how far it is.

    Returns:
        Ranks, size, and the error that the rank costs, relative to ‖ΔW‖.

    Raises:
        CheckpointError: The two models have different architectures.
        InputError: No rank is given.
    """
    from lora_export.adapter_tools import extract as extract_adapter
    from lora_export.adapter_tools import extract_pipeline
    from lora_export.adapter_tools.saving import Rank

    rank, folders = rank or RankOptions(), (resolve(base).folder, resolve(tuned).folder)
    cut, of_pipelines = Rank(rank.rank, rank.energy), [is_pipeline(f) for f in folders]
    if of_pipelines[0] != of_pipelines[1]:
        raise InputError(
            "one of the two is a pipeline of diffusers, the other is not",
            where=folders[1],
            expected=f"two pipelines, or two models; the base is {folders[0]}",
        )
    if of_pipelines[0]:
        return extract_pipeline(*folders, Path(output), cut, rest, rank.dtype, rank.force, progress)
    return extract_adapter(*folders, Path(output), cut, rest, rank.dtype, rank.force, progress)


def truncate(adapter: Model, output: Folder, rank: RankOptions | None = None) -> "Derived":
    """Write an adapter in a lower rank, each module with the largest singular values of its own B·A.

    Args:
        adapter: Folder or Hub ID.
        output: New folder.
        rank: A rank, or a share of ‖ΔW‖² to keep; one of them is needed.

    Returns:
        Ranks, size, and the error that the rank costs, relative to ‖ΔW‖.

    Raises:
        AdapterError: A kind that has no rank.
        InputError: No rank is given.
    """
    from lora_export.adapter_tools import truncate as truncate_adapter
    from lora_export.adapter_tools import truncate_file
    from lora_export.adapter_tools.saving import Rank

    rank, folder = rank or RankOptions(), resolve(adapter, single=True).folder
    cut, file = Rank(rank.rank, rank.energy), single_file(folder)
    if file is not None:
        return truncate_file(file, Path(output), cut, rank.dtype, rank.force)
    return truncate_adapter(folder, Path(output), cut, rank.dtype, rank.force)


def inspect(path: Model, base: Model | None = None) -> dict[str, Any]:
    """Say what a folder is and what a person would ask about it, from headers alone.

    Args:
        path: A base, an adapter, an ONNX export, a run, a package, or the root of a fleet.
        base: For an adapter: the base to match it with, tensor by tensor.

    Returns:
        `kind`, and facts about that kind by their names in JSON.

    Raises:
        LoraExportError: The folder is none of these, or is damaged.
    """
    from lora_export.workflows.inspection import inspect_folder

    return inspect_folder(resolve(path, single=True).folder, resolve(base).folder if base else None)


def understand(
    adapter: Model,
    base: Model | None = None,
    picture: File | None = None,
    force: bool = False,
    *,
    progress: Progress = SILENT,
) -> Understanding:
    """Read the numbers of an adapter and say what it has learnt (`lora-export inspect -a`).

    Args:
        adapter: Folder or Hub ID.
        base: Its base, to compare the size of its change with.
        picture: A heat map by layer and module to write: FILE.svg, or FILE.html with everything.
        force: Replace an existing picture.
        progress: Receives how far it is.

    Returns:
        Norms, singular values and ranks of each weight, sentences about them, and warnings.

    Raises:
        AdapterError: The adapter does not fit the base.
        OutputError: The picture exists.
    """
    from lora_export.workflows.understanding import understand_adapter

    folders = resolve(adapter, single=True).folder, resolve(base).folder if base else None
    return understand_adapter(*folders, as_path(picture), force, progress)


def report(
    run: Folder, compare: Folder | None = None, output: Folder | None = None, *, force: bool = False
) -> ReportPages | FleetPages:
    """Write report.html and report.md of a run again from its report.json, or a comparison of two runs, or the
    report of a fleet from its records.

    Args:
        run: Folder of a run, or a folder with a report.json, or the root of a fleet (a folder or a URL).
        compare: Another run. Then `run` stays as it is, and the pages go into `output`.
        output: New folder for a comparison. None: RUN-vs-OTHER, next to the run.
        force: Replace an existing output.

    Returns:
        The files written: `html` and `markdown`; of a fleet also `metrics`, `document` and `totals`.

    Raises:
        InputError: There is no report, or it is damaged; or an output without a run to compare with.
    """
    from lora_export.workflows import run_report
    from lora_export.workflows.fleet import joined
    from lora_export.workflows.fleet.verifying import is_root

    if is_root(str(run)):
        if compare is not None or output is not None:
            raise InputError(
                "a fleet, which is not compared with a run",
                where=str(run),
                next_step=f"lora-export report {run}; fleet.json says what changed since the run before",
            )
        return joined.report(str(run))

    if compare is not None:
        return run_report.compare(Path(run), Path(compare), Path(output) if output else None, force=force)
    if output is not None:
        raise InputError(f"an output, {output}, without a run to compare with", next_step="--compare OTHER")
    return run_report.render(Path(run))


def verify(
    path: Folder | File,
    base: Model | None = None,
    adapters: Adapters = (),
    options: VerifyOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> Verification:
    """Check again what an earlier merge, run or packaging left.

    Args:
        path: A merged folder, the folder of a whole run, a package (folder or archive), or the root of a fleet
            (a folder or a URL).
        base: The base that was merged into; without it (and for packages) only hashes can be checked.
        adapters: What was merged, with the same weights.
        options: How much of a merge is recomputed; the key, and the runtime, of a package.
        progress: Receives stages.

    Returns:
        Every finding, and what could not be checked; `verified` says whether all held.

    Raises:
        InputError: The path is none of these, or an argument is for another of them.
    """
    from lora_export.workflows.verifying import verify as verify_path

    folder = resolve(base).folder if base else None
    return verify_path(path, folder, adapter_choices(adapters), options or VerifyOptions(), progress)


def env() -> dict[str, Any]:
    """Versions, hardware, and which execution providers really run a model here.

    Returns:
        What `lora-export env --json` prints, but for the configuration of commands.

    Raises:
        RuntimeUnavailable: ONNX Runtime is not installed.
    """
    import platform

    import psutil

    from lora_export.manifest import versions
    from lora_export.runtime import providers_report
    from lora_export.version import __version__

    return {
        "lora_export": __version__,
        "platform": platform.platform(),
        "cpu_count": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "versions": versions(),
        "providers": providers_report(),
    }
