"""The merged model as it will be loaded: its own type for the weights, and for the arithmetic."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_export.validation.reference.loading import architecture


def load_as_stored(merged: Path) -> Any:
    """What a user of transformers gets from this folder with dtype="auto", ready for inference."""
    model = architecture(merged).from_pretrained(merged, dtype="auto", local_files_only=True)
    model.eval()
    model.requires_grad_(False)
    return model


def own_type(dtypes: Mapping[str, torch.dtype]) -> str | None:
    """The type that the model computes in, or None if it is fp32 anyway, and nothing is to be compared."""
    narrow = {d for d in dtypes.values() if d != torch.float32}
    return str(max(narrow, key=lambda d: torch.finfo(d).eps)).removeprefix("torch.") if narrow else None
