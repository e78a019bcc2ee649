"""The files of a merged folder besides its weights."""

from pathlib import Path

from lora_export.checkpoint.companions import (
    copy_files,
    copy_subfolders,
    pickled_modules,
    tokenizer_files,
    write_config,
)
from lora_export.checkpoint.shards import write_index
from lora_export.checkpoint.trained_beside import MOST, carried, other_weights
from lora_export.folder_files import VALUE_HEAD
from lora_export.merging.planning.ends import GENERATION
from lora_export.merging.planning.plan import MergePlan
from lora_export.storage.sealed import copy, write_settings

# Settings of the quantized base. A server would apply them to the result, in which nothing is quantized.
OF_QUANTIZERS = frozenset({"hf_quant_config.json", "quantize_config.json", "quant_config.json"})


def write_beside(planned: MergePlan, companions: list[Path], stage: Path) -> list[str]:
    """Write the index, copy the base's files, and over them the tokenizer that an adapter brings.

    The adapter was trained with that one. companions: those of the base; returns warnings.
    """
    base, warnings = planned.base.folder, []
    write_index(stage, planned.shards, planned.base.files)
    dequantized = any(t.quantized for t in planned.tensors.values())
    copy_files([p for p in companions if not (dequantized and p.name in OF_QUANTIZERS)], stage)
    copy_subfolders(base, stage)
    warnings += _pickled(base)
    changes = planned.base.config, planned.config_changes, planned.config_removals
    write_config(base / "config.json", stage / "config.json", *changes)
    for adapter in planned.adapters:
        if not adapter.folder.is_dir():  # a file has nothing beside it that belongs to it
            continue
        own = tokenizer_files(adapter.folder)
        differing = [
            p.name for p in own if not (stage / p.name).is_file() or (stage / p.name).read_bytes() != p.read_bytes()
        ]
        if differing:
            copy_files(own, stage)
            warnings.append(f"{', '.join(differing)} taken from the adapter, which was trained with it")
        warnings += _carry(adapter.folder, base, stage)
    if planned.end is not None and planned.end.generation is not None:
        write_settings(stage / GENERATION, planned.end.generation)
    return warnings


def _carry(adapter: Path, base: Path, stage: Path) -> list[str]:
    """Copy what belongs to the merged model; returns a warning for it, and for what is left behind."""
    warnings = []
    files = carried(adapter)
    for path in files:
        target = stage / path.relative_to(adapter)
        target.parent.mkdir(exist_ok=True)
        copy(path, target, adapter)
    if adapter / VALUE_HEAD in files:
        warnings.append(
            f"{VALUE_HEAD} copied as it is: transformers does not load it; TRL's "
            "AutoModelForCausalLMWithValueHead, LLaMA-Factory and ms-swift read it from the merged folder"
        )
    modules = [p.relative_to(adapter).as_posix() for p in files if p.name != VALUE_HEAD]
    if modules and adapter != base:
        warnings.append(
            "sentence-transformers' modules taken from the adapter, which was trained with them: "
            + ", ".join(modules)
        )
        warnings += _pickled(adapter)
    left = other_weights(adapter)
    if left:
        files_left = ", ".join(left[:MOST]) + (f" and {len(left) - MOST} more" if len(left) > MOST else "")
        warnings.append(
            f"nothing was merged of {files_left}, beside the adapter {adapter.name}: was more trained than it?"
        )
    return warnings


def _pickled(folder: Path) -> list[str]:
    left = pickled_modules(folder)
    return (
        [f"{', '.join(left)} not copied, because a pickle can run code: save it with safetensors"] if left else []
    )
