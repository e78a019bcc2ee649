"""From the words of the command line to the dataclasses of the rooms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lora_export.checkpoint.sources import choices_of, resolve, resolve_all
from lora_export.commands import configuration
from lora_export.commands.options import GRIDS
from lora_export.commands.types import split_weight
from lora_export.contracts import (
    AdapterChoice,
    BenchmarkOptions,
    CompareBases,
    ExportOptions,
    MergeOptions,
    QuantizationOptions,
    StoryOptions,
    ValidationOptions,
)
from lora_export.errors import InputError

MERGE_KEYS = (
    "base_weights", "training_quantization", "training_double_quant", "dtype", "max_shard_size", "max_memory",
    "expert_packing", "expert_layout", "allow_nonfinite", "device", "certify",
    "combine", "combine_on", "density", "seed", "majority_sign", "svd_rank", "task",
)  # fmt: skip


def weighted(names: Sequence[str]) -> list[tuple[str, float]]:
    """Each adapter's name and its weight; a folder whose own name ends in :NUMBER is taken as it is."""
    return [(name, 1.0) if Path(name).is_dir() else split_weight(name) for name in names]


def chosen(names: Sequence[str]) -> list[AdapterChoice]:
    """Each adapter's folder and its weight."""
    return choices_of(resolve_all(weighted(names)))


def merge_options_of(words: dict[str, Any], force: bool = False) -> MergeOptions:
    return MergeOptions(**{key: words[key] for key in MERGE_KEYS}, force=force)


def refuse_mere_copy(base: str, options: MergeOptions) -> None:
    """InputError for a merge without an adapter that would change nothing."""
    from lora_export.merging import plan

    if not plan(resolve(base).folder, [], options).computes:
        raise InputError(
            "no adapter is given, and this base is not quantized: there is nothing to merge",
            where=base,
            expected="an adapter, or a base that is to be dequantized",
            next_step="-a ADAPTER",
        )


def bases_of(words: dict[str, Any]) -> CompareBases | None:
    """The comparison of bases that was asked for; refuses its details without it."""
    given = [f"--{key.replace('_', '-')}" for key in ("requantize", "original_base") if words[key] is not None]
    if not words["compare_bases"]:
        if given:
            raise InputError(
                f"{given[0]} says how the bases are compared, and no comparison was asked for",
                expected="--compare-bases beside it",
                next_step="the same command with --compare-bases",
            )
        return None
    original = words["original_base"]
    return CompareBases(words["requantize"], resolve(original).folder if original else None)


def validation_memory_of(words: dict[str, Any]) -> int | None:
    """--max-memory where it was asked for. Its default, also one from a file, is meant for the merge's blocks: it
    would make validation read models layer by layer that fit into memory easily, and leave out how they are loaded.
    """
    return int(words["max_memory"]) if _asked("max_memory") else None


def _asked(key: str) -> bool:
    """Whether an option was given for this command, and is no default of one's own."""
    source = click.get_current_context().get_parameter_source(key)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def story_options_of(words: dict[str, Any]) -> StoryOptions:
    return StoryOptions(
        merge=merge_options_of(words),
        export=export_options_of(words),
        merged_folder=not words["no_merged_folder"],
        benchmark=benchmark_options_of(words),
        extra_arms=tuple(dict.fromkeys(words["extra_arms"])),
        validation=ValidationOptions(
            prompts=words["prompts"],
            text=words["text"],
            rows=words["rows"],
            tolerance=words["tolerance"],
            min_survival=words["min_survival"],
            max_memory=validation_memory_of(words),
            seed=words["validation_seed"],
        ),
        force=words["force"],
        configured=_configured(),
    )


def export_options_of(words: dict[str, Any], force: bool = False) -> ExportOptions:
    return ExportOptions(
        precision=words["precision"],
        provider=words["provider"],
        engine=words["engine"],
        optimize=words["optimize"],
        quantization=quantization_of(words),
        graph_from=words.get("graph_from"),
        force=force,
    )


def quantization_of(words: dict[str, Any]) -> QuantizationOptions:
    return QuantizationOptions(
        block_size=words["block_size"],
        algorithm=words["quantizer"],
        accuracy_level=words["accuracy_level"],
        keep=words["keep"],
        activations=words["activations"],
        calibration=words["calibration"],
    )


def benchmark_options_of(words: dict[str, Any]) -> BenchmarkOptions:
    """InputError for a grid that is asked for beside sizes of one's own, or too few sets of sessions for a
    spread."""
    from lora_export.benchmarking.statistics import MIN_SESSIONS

    if 1 < words["sessions"] < MIN_SESSIONS:
        raise InputError(
            f"--sessions {words['sessions']}",
            expected=f"1, or at least {MIN_SESSIONS}: fewer have no spread that an interval could be taken from",
            next_step=f"the same command with --sessions {2 * MIN_SESSIONS}",
        )
    shapes = GRIDS[words["grid"]]
    if words["batches"] or words["lengths"]:
        if _asked("grid"):
            raise InputError(
                "--grid beside --batch or --prompt-length",
                expected="one of them: a grid has both",
                next_step=f"the same command without --grid, whose sizes are {shapes}",
            )
        batches, lengths = words["batches"] or (shapes[0][0],), words["lengths"] or (shapes[0][1],)
        shapes = tuple((batch, length) for batch in batches for length in lengths)
    return BenchmarkOptions(
        provider=words["provider"],
        shapes=shapes,
        margin=words["margin"],
        max_seconds=words["max_seconds"],
        sessions=words["sessions"],
        configured=_configured(),
    )


def _configured() -> str:
    """The configuration file and what it gave, for the report."""
    return configuration.said(configuration.from_file(click.get_current_context()))


def named_folders(pairs: Sequence[str]) -> list[tuple[str, Path]]:
    """NAME=FOLDER taken apart."""
    found = []
    for pair in pairs:
        name, given, folder = pair.partition("=")
        if not given:
            raise InputError(f"--beside {pair}", expected="NAME=ONNX", next_step=f"--beside other={pair}")
        found.append((name, Path(folder)))
    return found


GRAPH_OPTIONS = (
    "precision", "engine", "optimize", "block_size", "quantizer", "accuracy_level", "keep", "activations",
    "calibration",
)  # fmt: skip


def as_the_earlier(words: dict[str, Any]) -> dict[str, Any]:
    """The words beside --graph-from: an earlier export has its precision, engine, … already.

    What the configuration file has of them does not matter. InputError for one that is asked for.
    """
    for key in GRAPH_OPTIONS:
        if _asked(key):
            key = key.replace("_", "-")
            raise InputError(
                f"--{key} beside --graph-from, which takes the options of the earlier export",
                expected="one of them",
                next_step=f"the same command without --{key}, or without --graph-from",
            )
    context = click.get_current_context()
    plain = context.command.make_context(context.info_name, [], resilient_parsing=True).params
    return words | {key: plain[key] for key in GRAPH_OPTIONS}
