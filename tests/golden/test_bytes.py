"""Files that must come out byte for byte as they came out before, on any machine.

All numbers are small multiples of powers of two, so every sum is exact in whatever order it is taken, and only the
rounding to the output's type, the random choice of DARE and the layout of the files are left to differ. Should one
of these change on purpose, say so in CHANGELOG.md: somebody's hashes change with it.
"""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.merging import merge
from tests.builders import handmade_adapter, handmade_base

ROWS, COLUMNS, RANK = 96, 64, 4


def numbers(rows: int, columns: int, step: int, unit: float) -> torch.Tensor:
    """−16 to 16 units in an order that repeats late."""
    count = torch.arange(rows * columns, dtype=torch.float64)
    return ((count * step) % 33 - 16).reshape(rows, columns) * unit


def made(folder: Path, dtype: torch.dtype) -> tuple[Path, list[AdapterChoice]]:
    base = handmade_base(folder / "base", {"m.proj.weight": (ROWS, COLUMNS), "m.norm.weight": (COLUMNS,)}, dtype)
    values = {"m.proj.weight": numbers(ROWS, COLUMNS, 7, 2.0**-7), "m.norm.weight": numbers(1, COLUMNS, 5, 0.5)[0]}
    save_file({n: v.to(dtype) for n, v in values.items()}, base / "model.safetensors", {"format": "pt"})
    adapters = []
    for i, step in enumerate((5, 13)):
        a, b = numbers(RANK, COLUMNS, step, 2.0**-8).float(), numbers(ROWS, RANK, step + 2, 2.0**-6).float()
        adapters.append(AdapterChoice(handmade_adapter(folder / f"adapter{i}", {"m.proj": (a, b)}, alpha=2)))
    return base, adapters


@pytest.mark.parametrize(
    ("dtype", "count", "options", "digest"),
    [
        ("float32", 1, {}, "8482d6bd4363fe56"),
        ("bfloat16", 1, {}, "4ddb425938065837"),
        ("float16", 1, {}, "dbbbaa9540cc4576"),
        ("bfloat16", 2, {}, "618a58e692acacfb"),
        ("float32", 2, {"combine": "ties", "density": 0.5}, "18235053c85020de"),
        ("float32", 2, {"combine": "dare_linear", "density": 0.5, "seed": 3}, "b92721f8bec5c2a9"),
    ],
)
def test_merged_file_has_golden_bytes(
    tmp_path: Path, dtype: str, count: int, options: dict[str, Any], digest: str
) -> None:
    base, adapters = made(tmp_path, getattr(torch, dtype))
    merge(base, adapters[:count], tmp_path / "out", MergeOptions(**options))
    assert hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()[:16] == digest
