"""Answers as JSON and tensors, and back: exactly, figures that are no numbers included."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export.contracts import Check
from lora_export.validation.comparing.logits import Difference, Shift

_CLASSES = {cls.__name__: cls for cls in (Check, Difference, Shift)}


def packed(value: Any, put: Callable[[torch.Tensor], int]) -> Any:
    """The JSON document of a value made of tensors, numbers, texts, lists, mappings and _CLASSES. put: keeps a
    tensor, and gives its number."""
    if isinstance(value, torch.Tensor):
        return {"tensor": put(value)}
    if isinstance(value, Mapping):
        return {"map": {name: packed(part, put) for name, part in value.items()}}
    if is_dataclass(value):
        parts = {f.name: packed(getattr(value, f.name), put) for f in fields(value)}
        return {"class": type(value).__name__, "fields": parts}
    if isinstance(value, tuple):
        return {"tuple": [packed(part, put) for part in value]}
    if isinstance(value, Iterator | Sequence) and not isinstance(value, str):
        return [packed(part, put) for part in value]
    return value


def unpacked(
    document: Any, file_of: Callable[[int], Path], shelf: Callable[[Sequence[Path]], Sequence[torch.Tensor]]
) -> Any:
    """The value again. Lists of nothing but tensors are a `shelf`, which reads them when they are asked for."""

    def of(part: Any) -> Any:
        if isinstance(part, list):
            numbers = [p["tensor"] for p in part if isinstance(p, Mapping) and "tensor" in p]
            return shelf([file_of(n) for n in numbers]) if len(numbers) == len(part) > 0 else [of(p) for p in part]
        if not isinstance(part, Mapping):
            return part
        if "tensor" in part:
            return torch.from_numpy(np.load(file_of(part["tensor"])))
        if "map" in part:
            return {name: of(p) for name, p in part["map"].items()}
        if "tuple" in part:
            return tuple(of(p) for p in part["tuple"])
        return _CLASSES[part["class"]](**{name: of(p) for name, p in part["fields"].items()})

    return of(document)
