"""From the words of the command line to the dataclasses of the rooms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_export.checkpoint.sources import resolve
from lora_export.commands.options import split_weight
from lora_export.contracts import AdapterChoice, BenchmarkOptions, MergeOptions, Source
from lora_export.pipeline import StoryOptions

MERGE_KEYS = (
    "base_weights", "training_quantization", "training_double_quant", "dtype", "max_shard_size", "max_memory",
    "expert_packing", "expert_layout", "allow_nonfinite", "device", "certify",
)  # fmt: skip


def adapters_of(names: Sequence[str]) -> list[tuple[Source, float]]:
    """Each adapter found and its weight; a folder whose own name ends in :NUMBER is taken as it is."""
    found = []
    for name in names:
        plain, weight = (name, 1.0) if Path(name).is_dir() else split_weight(name)
        found.append((resolve(plain), weight))
    return found


def choices_of(adapters: Sequence[tuple[Source, float]]) -> list[AdapterChoice]:
    return [AdapterChoice(source.folder, weight) for source, weight in adapters]


def merge_options_of(words: dict[str, Any], force: bool = False) -> MergeOptions:
    return MergeOptions(**{key: words[key] for key in MERGE_KEYS}, force=force)


def story_options_of(words: dict[str, Any]) -> StoryOptions:
    return StoryOptions(
        merge=merge_options_of(words),
        precision=words["precision"],
        provider=words["provider"],
        engine=words["engine"],
        benchmark=benchmark_options_of(words),
        prompts=words["prompts"],
        rows=words["rows"],
        force=words["force"],
    )


def benchmark_options_of(words: dict[str, Any]) -> BenchmarkOptions:
    return BenchmarkOptions(
        provider=words["provider"],
        batches=words["batches"],
        prompts=words["lengths"],
        margin=words["margin"],
        max_seconds=words["max_seconds"],
    )
