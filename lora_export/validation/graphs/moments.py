"""Reads what the products of an export multiply on calibration texts: calibration.safetensors beside the graphs.

This reader shares no code with the writer in onnx_export/.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_export.errors import ExportError

NAME = "calibration.safetensors"


class Moments:
    """The mean of x xᵀ over the inputs x of each weight that has one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with self._opened() as file:
                pieces = json.loads((file.metadata() or {})["pieces"])
                sizes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise self._odd(f"no table of its matrices ({error})") from None
        if not isinstance(pieces, Mapping) or not all(isinstance(n, str) for n in pieces.values()):
            raise self._odd("a table that names no matrices")
        self._names: dict[str, str] = dict(pieces)
        self._sizes = sizes

    @classmethod
    def beside(cls, folder: Path) -> "Moments | None":
        """Of an export's folder. ExportError for a file that is damaged."""
        path = folder / NAME
        return cls(path) if path.is_file() and not path.is_symlink() else None

    def of(self, piece: str) -> torch.Tensor | None:
        """piece: "tensor[start:stop]", the first that an initializer is made of. (in, in) float64, symmetric; None
        where the texts said nothing of it. ExportError for numbers that are no moments."""
        name = self._names.get(piece)
        return None if name is None else self._matrix(name)

    @functools.lru_cache(maxsize=1)  # noqa: B019 (weights that share their inputs follow each other)
    def _matrix(self, name: str) -> torch.Tensor:
        size = self._sizes.get(f"{name}.diagonal", ())
        if len(size) != 1 or self._sizes.get(f"{name}.triangle") != (size[0] * (size[0] + 1) // 2,):
            raise self._odd("no matrix of this name", name)
        with self._opened() as file:
            diagonal = file.get_tensor(f"{name}.diagonal").double()
            triangle = file.get_tensor(f"{name}.triangle")
        if not (bool((diagonal >= 0).all()) and bool((triangle.abs() <= 1).all()) and diagonal.isfinite().all()):
            raise self._odd("numbers that no mean of squares has", name)
        matrix = torch.empty(size[0], size[0], dtype=torch.float64)
        for row, values in enumerate(triangle.split([size[0] - row for row in range(size[0])])):
            matrix[row, row:] = values
            matrix[row:, row] = values
        root = diagonal.sqrt()
        matrix *= root
        matrix *= root[:, None]
        matrix.diagonal().copy_(diagonal)
        return matrix

    def _opened(self) -> Any:
        return safe_open(self._path, framework="pt")

    def _odd(self, what: str, tensor: str | None = None) -> ExportError:
        return ExportError(
            f"the statistics have {what}",
            where=self._path,
            tensor=tensor,
            expected=f"{NAME}, as the export with gptq left it",
            next_step="export the model again",
        )
