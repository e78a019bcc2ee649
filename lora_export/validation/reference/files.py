"""What lies in the folders of models and adapters: headers and settings, read without a model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_export.folder_files import VALUE_HEAD
from lora_export.storage.sealed import LARGEST_SETTINGS, read_json

ADAPTER_CONFIG = "adapter_config.json"
START = "base_model.model."  # of names in PEFT's files
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, by its name there; dtype as safetensors spells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    name: str

    def read(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as file:
            value: torch.Tensor = file.get_tensor(self.name)
        return value


def headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the safetensors files in a folder; of a name that several have, the last."""
    return {stored.name: stored for stored in all_headers(folder)}


def all_headers(folder: Path) -> Iterator[Stored]:
    for file in sorted(p for p in folder.glob("*.safetensors") if p.name != VALUE_HEAD):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                view = tensors.get_slice(name)
                yield Stored(file, view.get_dtype(), tuple(view.get_shape()), name)


def adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, empty where there is none."""
    path = folder / ADAPTER_CONFIG
    return read_json(path, limit=LARGEST_SETTINGS) if path.is_file() else {}
