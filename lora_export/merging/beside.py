"""What lies beside the weights of a merged folder."""

from pathlib import Path

from lora_export.checkpoint.companions import copy_files, copy_subfolders, tokenizer_files, write_config
from lora_export.checkpoint.shards import write_index
from lora_export.merging.plan import MergePlan

# Settings that a server would take for the result's, though nothing in it is quantized any more.
OF_QUANTIZERS = frozenset({"hf_quant_config.json", "quantize_config.json", "quant_config.json"})


def write_beside(planned: MergePlan, companions: list[Path], stage: Path) -> list[str]:
    """Write the index, copy the base's files, and over them the tokenizer that an adapter brings.

    The adapter was trained with that one. companions: those of the base; returns warnings.
    """
    base, warnings = planned.base.folder, []
    write_index(stage, planned.shards)
    dequantized = any(t.quantized for t in planned.tensors.values())
    copy_files([p for p in companions if not (dequantized and p.name in OF_QUANTIZERS)], stage)
    copy_subfolders(base, stage)
    changes = planned.base.config, planned.config_changes, planned.config_removals
    write_config(base / "config.json", stage / "config.json", *changes)
    for adapter in planned.adapters:
        own = tokenizer_files(adapter.folder)
        differing = [
            p.name for p in own if not (stage / p.name).is_file() or (stage / p.name).read_bytes() != p.read_bytes()
        ]
        if differing:
            copy_files(own, stage)
            warnings.append(f"{', '.join(differing)} taken from the adapter, which was trained with it")
    return warnings
