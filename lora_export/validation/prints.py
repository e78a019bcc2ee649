"""Digests of what answers depend on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def digest(value: object) -> str:
    """SHA-256 of anything made of tensors, numbers, texts, lists and mappings, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(_bytes_of(value)).hexdigest()]
    if is_dataclass(value):
        return [type(value).__name__, {f.name: _plain(getattr(value, f.name)) for f in fields(value)}]
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(map(str, value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | None) else repr(value)


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes."""
    whole, seen = hashlib.sha256(), dict[int, str]()
    for name in sorted(tensors):
        tensor = tensors[name]
        first = seen.setdefault(id(tensor), name)
        whole.update(f"{name} {first} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if first == name and tensor.numel():  # a tied weight has two names
            whole.update(_bytes_of(tensor))
    return whole.hexdigest()
