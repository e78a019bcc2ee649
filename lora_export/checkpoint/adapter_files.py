"""The files of an adapter folder: its configuration, and its tensors by their headers."""

from pathlib import Path
from typing import Any

from lora_export.checkpoint.header import read_header
from lora_export.checkpoint.reader import TensorFiles, refuse_code
from lora_export.errors import CheckpointError, InputError
from lora_export.files import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


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
        raise InputError(f"no {CONFIG} here", where=folder, expected="a PEFT adapter folder")
    config = read_json(folder / CONFIG)
    refuse_code(config, folder / CONFIG)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise _no_weights(folder)
    return config, TensorFiles(read_header(weights).tensors)


def _no_weights(folder: Path) -> CheckpointError:
    pickle = folder / "adapter_model.bin"
    if pickle.is_file():
        return CheckpointError(
            "the adapter is pickled, and a pickle can run code when it is loaded",
            where=pickle,
            expected=WEIGHTS,
            next_step="where you trust it: PeftModel.from_pretrained(base, DIR).save_pretrained(DIR2)",
        )
    return CheckpointError("the adapter has no weights", where=folder, expected=WEIGHTS)
