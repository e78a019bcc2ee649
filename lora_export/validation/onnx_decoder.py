"""An exported decoder under ONNX Runtime, run as a user's program would: with its KV cache."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export.runtime import DecoderSignature, open_session
from lora_export.validation.onnx_run import run_values, value

SPLIT = 3  # a prompt is fed in this many pieces, so that the cache has to carry the context


class OnnxDecoder:
    """One session, and its cache kept as ONNX Runtime values so that no type is converted on the way."""

    def __init__(self, model: Path, provider: str) -> None:
        self._model = model
        self._session = open_session(model, provider)
        self._signature = DecoderSignature.of(self._session)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """fp32 logits (length, vocabulary) of a prompt, fed in up to SPLIT pieces through the KV cache."""
        past, seen, out = self._empty_cache(), 0, []
        for piece in torch.tensor_split(ids, min(SPLIT, len(ids))):
            logits, past = self._step(piece, past, seen)
            seen += len(piece)
            out.append(logits)
        return torch.cat(out)

    def greedy(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """`count` greedy tokens after the prompt, one at a time, shape (count,)."""
        logits, past = self._step(ids, self._empty_cache(), 0)
        out, seen = [logits[-1].argmax()], len(ids)
        while len(out) < count:
            logits, past = self._step(out[-1][None], past, seen)
            seen += 1
            out.append(logits[-1].argmax())
        return torch.stack(out)

    def _step(self, ids: torch.Tensor, past: list[Any], seen: int) -> tuple[torch.Tensor, list[Any]]:
        signature = self._signature
        feeds = {signature.input_ids: value(ids.numpy()[None].astype(signature.ids_dtype))}
        if signature.attention_mask:
            feeds[signature.attention_mask] = value(np.ones((1, seen + len(ids)), signature.ids_dtype))
        if signature.position_ids:
            positions = np.arange(seen, seen + len(ids), dtype=signature.ids_dtype)[None]
            feeds[signature.position_ids] = value(positions)
        feeds |= dict(zip([n for pair in signature.past for n in pair], past, strict=True))
        names = [signature.logits, *(n for pair in signature.present for n in pair)]
        logits, *present = run_values(self._session, names, feeds, self._model)
        return torch.from_numpy(logits.numpy().astype(np.float32))[0], present

    def _empty_cache(self) -> list[Any]:
        signature = self._signature
        empty = np.zeros((1, signature.kv_heads, 0, signature.head_dim), signature.cache_dtype)
        return [value(empty) for pair in signature.past for _ in pair]
