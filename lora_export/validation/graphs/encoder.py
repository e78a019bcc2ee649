"""An exported model that does not generate, under ONNX Runtime, on the inputs of the PyTorch model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export.errors import InputError
from lora_export.runtime import numpy_dtype, open_session


class OnnxEncoder:
    """One session. Inputs that a batch leaves out are what transformers takes in their place."""

    def __init__(self, model: Path, provider: str) -> None:
        self._model = model
        self._session = open_session(model, provider)
        self._names = [o.name for o in self._session.get_outputs()]

    def outputs(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """All outputs of each batch by name, in fp32."""
        found = (self._session.run(None, self._feeds(batch)) for batch in batches)
        return [
            {
                name: torch.from_numpy(value.astype(np.float32))
                for name, value in zip(self._names, some, strict=True)
            }
            for some in found
        ]

    def _feeds(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            i.name: self._value(i.name, batch).numpy().astype(numpy_dtype(i.type))
            for i in self._session.get_inputs()
        }

    def _value(self, name: str, batch: Mapping[str, Any]) -> torch.Tensor:
        if name in batch:
            given: torch.Tensor = batch[name]
            return given
        like = next((batch[n] for n in ("input_ids", "input_values") if n in batch), None)
        if like is None or name not in ("attention_mask", "token_type_ids"):
            raise InputError(
                f"the graph reads {name!r}, which the inputs of validation do not have",
                where=self._model,
                expected=", ".join(batch),
            )
        make = torch.ones_like if name == "attention_mask" else torch.zeros_like
        return make(like, dtype=torch.int64)
