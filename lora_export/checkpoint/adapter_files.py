"""The files of an adapter folder: its configuration, and its tensors by their headers."""

from pathlib import Path
from typing import Any

from lora_export.checkpoint.header import read_header
from lora_export.checkpoint.reader import read_tensors, refuse_code
from lora_export.checkpoint.tensor_files import TensorFiles
from lora_export.checkpoint.trained_beside import refuse_lost
from lora_export.checkpoint.weight_files import PICKLED
from lora_export.errors import CheckpointError, InputError
from lora_export.storage.sealed import LARGEST_SETTINGS, read_json, refuse_outward_link, sha256

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
MLX = "adapters.safetensors"
DIFFUSERS = "pytorch_lora_weights.safetensors"
# Before axolotl's pull request 3585, an adapter that was gathered from FSDP shards kept the name of a model.
# mlx-lm's name for the file comes last: a folder may hold PEFT's form of the same adapter, too.
_NAMES = (
    (WEIGHTS, INDEX),
    ("model.safetensors", "model.safetensors.index.json"),
    (MLX, f"{MLX}.index.json"),
)
# Other adapters, by a file's name or pattern: what it is, what helps.
_ELSEWHERE = {
    DIFFUSERS: (
        "a diffusers adapter, which belongs to an image model",
        "give its pipeline as -b, the folder with model_index.json",
    ),
    "pytorch_model_fsdp_0": ("unmerged FSDP shards", "accelerate merge-weights DIR/pytorch_model_fsdp_0 OUT"),
    "lora.safetensors": (
        "mistral-finetune's adapter: its names and the order of its heads are those of Mistral's own checkpoints, "
        "and its scaling is not in the file",
        "mistral-finetune's `python -m utils.merge_lora`, transformers' convert_mistral_weights_to_hf.py, and then "
        "`lora-export export -m`",
    ),
    "adapter_0.pt": (
        "torchtune's own, pickled form of an adapter",
        "in the recipe's checkpointer: FullModelHFCheckpointer with safe_serialization: True, which writes "
        f"{CONFIG} and {WEIGHTS}",
    ),
    "*.gguf": (
        "llama.cpp's form of an adapter, which may be quantized and uses llama.cpp's tensor names and head order",
        "give the folder that convert_lora_to_gguf.py read, or llama.cpp's llama-export-lora",
    ),
    "zero_to_fp32.py": ("unmerged DeepSpeed shards", "python DIR/zero_to_fp32.py DIR OUT --safe_serialization"),
}


def open_adapter_files(folder: Path) -> tuple[dict[str, Any], TensorFiles]:
    """adapter_config.json and the tensors of an adapter folder. Pickled weights are refused."""
    if folder.is_file():
        raise InputError(
            "this file is an adapter of an image model, and the base is no pipeline",
            where=folder,
            expected=f"an adapter folder with {CONFIG} and {WEIGHTS}",
            next_step="give its pipeline as -b, the folder with model_index.json",
        )
    if not folder.is_dir():
        raise InputError(
            "there is no such folder",
            where=folder,
            expected=f"an adapter folder with {CONFIG} and {WEIGHTS}",
            next_step="give a folder, or a Hub ID such as owner/name",
        )
    if not (folder / CONFIG).is_file():
        inner = sorted(p.parent for p in folder.glob(f"*/{CONFIG}"))
        if not inner:
            _refuse_other(folder)
        raise InputError(
            f"no {CONFIG} here",
            where=folder,
            expected="a PEFT adapter folder",
            next_step=f"give one of {', '.join(map(str, inner))}" if inner else None,
        )
    config = read_json(folder / CONFIG, limit=LARGEST_SETTINGS)
    refuse_code(config, folder / CONFIG)
    refuse_lost(folder)
    for single, index in _NAMES:
        if (folder / single).is_file() or (folder / index).is_file():
            return config, TensorFiles(read_tensors(folder, single, index)[0])
    raise _no_weights(folder)


def single_file(path: Path) -> Path | None:
    """The one file of an adapter without a configuration, as image models have them; None for PEFT's folder, also
    for one that lacks its configuration.

    path: the file, or a folder with exactly one, or with diffusers' own name for it. InputError for several.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                "a pickled adapter can run code when it is loaded" if path.suffix in PICKLED else "not an adapter",
                where=path,
                expected="a .safetensors file",
                next_step="load it once where you trust it, and save its tensors with safetensors.torch.save_file",
            )
        return path
    if not path.is_dir() or (path / CONFIG).is_file():
        return None
    if (path / DIFFUSERS).is_file():
        return path / DIFFUSERS
    files = sorted(path.glob("*.safetensors"))
    if any(p.name in (WEIGHTS, MLX) for p in files):
        return None
    if len(files) > 1:
        raise InputError(
            f"{len(files)} adapters here: {', '.join(p.name for p in files[:4])}",
            where=path,
            expected="one .safetensors file",
            next_step=f"-a {files[0]}",
        )
    return files[0] if files else None


def open_single_file(path: Path) -> tuple[TensorFiles, dict[str, str]]:
    """The tensors of a file and the metadata of its header."""
    refuse_outward_link(path)
    header = read_header(path)
    return TensorFiles(header.tensors), header.metadata


def adapter_tensors(path: Path) -> TensorFiles:
    """The tensors of an adapter, a folder or a file."""
    single = single_file(path)
    return open_adapter_files(path)[1] if single is None else open_single_file(single)[0]


def _no_weights(folder: Path) -> CheckpointError:
    pickles = [p for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
    pickle = next((p for p in pickles if p.name.startswith("adapter_model")), None)
    if pickle is None:
        _refuse_other(folder)
        pickle = next(iter(pickles), None)
    if pickle is not None:
        return CheckpointError(
            "the adapter is pickled, and a pickle can run code when it is loaded",
            where=pickle,
            expected=WEIGHTS,
            next_step="if you trust it: PeftModel.from_pretrained(base, DIR).save_pretrained(DIR2)",
        )
    return CheckpointError("the adapter has no weights", where=folder, expected=WEIGHTS)


def _refuse_other(folder: Path) -> None:
    """CheckpointError for an adapter of a form that this tool does not read, by its name."""
    for pattern, (what, next_step) in _ELSEWHERE.items():
        path = next(iter(sorted(folder.glob(pattern))), None)
        if path is not None:
            raise CheckpointError(f"this is {what}", where=path, expected=WEIGHTS, next_step=next_step)


def adapter_hashes(folder: Path, used: set[Path]) -> dict[str, str]:
    """SHA-256 of an adapter's files: those that its tensors are in, and whatever is called adapter_…."""
    return {p.name: sha256(p) for p in sorted({*folder.glob("adapter_*"), *used}) if p.is_file()}
