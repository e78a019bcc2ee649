"""An exported encoder under ONNX Runtime, at several lengths and in a padded batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export.runtime import open_session


class OnnxEncoder:
    def __init__(self, model: Path, provider: str) -> None:
        self._session = open_session(model, provider)
        self._inputs = [i.name for i in self._session.get_inputs()]

    def outputs(self, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The first output of each prompt in fp32; odd prompts from one padded batch, which tests the mask."""
        alone = {i: self._run(tokens[i][None], None)[0] for i in range(0, len(tokens), 2)}
        odd = list(range(1, len(tokens), 2))
        if odd:
            batch = torch.nn.utils.rnn.pad_sequence([tokens[i] for i in odd], batch_first=True)
            lengths = torch.tensor([len(tokens[i]) for i in odd])
            found = self._run(batch, lengths)
            for row, i in enumerate(odd):
                # Class logits (batch, classes) have no length to cut.
                alone[i] = found[row][: len(tokens[i])] if found.dim() == 3 else found[row]
        return [alone[i] for i in range(len(tokens))]

    def _run(self, ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        mask = torch.ones_like(ids)
        if lengths is not None:
            mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).to(ids.dtype)
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        feeds: dict[str, Any] = {name: values[name].numpy() for name in self._inputs}
        return torch.from_numpy(self._session.run(None, feeds)[0].astype(np.float32))
