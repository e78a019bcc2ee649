"""The files of an adapter folder: its configuration, and its tensors by their headers."""

from pathlib import Path
from typing import Any

from lora_export.checkpoint.reader import TensorFiles, read_tensors, refuse_code
from lora_export.errors import CheckpointError, InputError
from lora_export.sealed import LARGEST_SETTINGS, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
# Before axolotl's pull request 3585, an adapter that was gathered from FSDP shards kept the name of a model.
# mlx-lm's name for the file comes last: a folder may hold PEFT's form of the same adapter, too.
_NAMES = (
    (WEIGHTS, INDEX),
    ("model.safetensors", "model.safetensors.index.json"),
    ("adapters.safetensors", "adapters.safetensors.index.json"),
)
# Trained weights beside the adapter, which merging the adapter alone would lose: file → who writes it, what helps.
_BESIDE = {
    "vit.safetensors": (
        "ms-swift's lora_llm trained the vision tower in full",
        "swift export --adapters DIR --merge_lora true",
    ),
    "extra_states": ("ms-swift trained other weights in full", "swift export --adapters DIR --merge_lora true"),
}
_ELSEWHERE = {
    "pytorch_lora_weights.safetensors": (
        "a diffusers adapter, which belongs to an image model",
        "in diffusers: pipe.fuse_lora()",
    ),
    "pytorch_model_fsdp_0": ("unmerged FSDP shards", "accelerate merge-weights DIR/pytorch_model_fsdp_0 OUT"),
    "zero_to_fp32.py": ("unmerged DeepSpeed shards", "python DIR/zero_to_fp32.py DIR OUT --safe_serialization"),
}


def open_adapter_files(folder: Path) -> tuple[dict[str, Any], TensorFiles]:
    """adapter_config.json and the tensors of an adapter folder. Pickled weights are refused."""
    if not folder.is_dir():
        raise InputError(
            "there is no such folder",
            where=folder,
            expected=f"an adapter folder with {CONFIG} and {WEIGHTS}",
            next_step="give a folder, or a hub id such as owner/name",
        )
    if not (folder / CONFIG).is_file():
        inner = sorted(p.parent for p in folder.glob(f"*/{CONFIG}"))
        raise InputError(
            f"no {CONFIG} here",
            where=folder,
            expected="a PEFT adapter folder",
            next_step=f"give one of {', '.join(map(str, inner))}" if inner else None,
        )
    config = read_json(folder / CONFIG, limit=LARGEST_SETTINGS)
    refuse_code(config, folder / CONFIG)
    for name, (why, next_step) in _BESIDE.items():
        if (folder / name).exists():
            raise CheckpointError(
                f"beside the adapter lies {name}: {why}, and merging the adapter alone would lose it",
                where=folder / name,
                expected="an adapter folder that holds all that was trained",
                next_step=next_step,
            )
    for single, index in _NAMES:
        if (folder / single).is_file() or (folder / index).is_file():
            return config, TensorFiles(read_tensors(folder, single, index)[0])
    raise _no_weights(folder)


def _no_weights(folder: Path) -> CheckpointError:
    pickle = next((p for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth")), None)
    if pickle is not None:
        return CheckpointError(
            "the adapter is pickled, and a pickle can run code when it is loaded",
            where=pickle,
            expected=WEIGHTS,
            next_step="where you trust it: PeftModel.from_pretrained(base, DIR).save_pretrained(DIR2)",
        )
    for name, (what, next_step) in _ELSEWHERE.items():
        if (folder / name).exists():
            return CheckpointError(f"this is {what}", where=folder / name, expected=WEIGHTS, next_step=next_step)
    return CheckpointError("the adapter has no weights", where=folder, expected=WEIGHTS)
