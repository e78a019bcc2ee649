"""A compressed-tensors base, read a second time by the library of that name, so that a wrong reading is noticed.

The reference of a validation is a dequantized copy of such a base, which the merge's own reader made: the copy
alone cannot show that the reader is wrong.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_export.errors import CheckpointError
from lora_export.storage.sealed import read_json
from lora_export.validation.reference.files import FLOATS, Stored, headers

METHOD = "compressed-tensors"
LOCAL = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale",
)  # fmt: skip


@dataclass(frozen=True)
class ReadAgain:
    """compared: weights that the library reads as the copy has them; not_read: those that it cannot read."""

    compared: int
    not_read: int


def compare(base: Path, dequantized: Path) -> ReadAgain | None:
    """Every weight of the copy whose values are codes in the base. None where the library is not installed.

    CheckpointError names the first weight that the library reads otherwise.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        return None
    from compressed_tensors.quantization import QuantizationConfig

    settings = QuantizationConfig.model_validate(read_json(base / "config.json")["quantization_config"])
    before, after = headers(base), headers(dequantized)
    compared = not_read = 0
    for name, copy in after.items():
        module = name.removesuffix(".weight")
        parts = {n: before[f"{module}.{n}"] for n in LOCAL if f"{module}.{n}" in before}
        if name == module or (name in before and before[name].dtype in FLOATS) or not parts:
            continue
        expected = _decompressed(module, parts, settings)
        if expected is None:
            not_read += 1
            continue
        _refuse_another(copy, expected)
        compared += 1
    return ReadAgain(compared, not_read)


def _decompressed(module: str, parts: Mapping[str, Stored], settings: Any) -> torch.Tensor | None:
    """What the library makes of one layer; None for what it does not read (act-order, since 0.20)."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.utils.match import is_match

    with torch.device("meta"):
        layer = torch.nn.Linear(1, 1)
    schemes = [
        s for s in settings.config_groups.values() if is_match(module, layer, s.targets, settings.ignore or ())
    ]
    if len(schemes) != 1 or "weight_g_idx" in parts:
        return None
    values = {n: stored.read() for n, stored in parts.items()}
    values = {n: v.float() if n != "weight" and v.dtype in FLOATS.values() else v for n, v in values.items()}
    form = schemes[0].format or settings.format
    try:
        compressor = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
        weight: torch.Tensor = compressor.decompress(values, schemes[0])["weight"]
    except (KeyError, NotImplementedError):
        return None
    return weight


def _refuse_another(copy: Stored, expected: torch.Tensor) -> None:
    """Beyond the last places of the type in which the library computes."""
    actual = copy.read()
    allowed = 2 * torch.finfo(expected.dtype).eps * expected.double().abs()
    if actual.shape == expected.shape and bool(((actual.double() - expected.double()).abs() <= allowed).all()):
        return
    raise CheckpointError(
        f"{METHOD} itself reads other numbers from this weight of the base than this tool does",
        where=copy.file,
        tensor=copy.name,
        expected="the same numbers from both readers",
        next_step="report it with the base's config.json; until then, merge into the unquantized base",
    )
