"""An exported decoder under ONNX Runtime, run as a user's program would: with its KV cache."""

from collections.abc import Sequence
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

    def padded_logits(self, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """fp32 logits (length, vocabulary) of each prompt, all in one batch that is padded on the right.

        The shorter prompts are masked. That is what a runtime does with requests of several lengths.
        """
        longest = max(map(len, tokens))
        ids = torch.stack([torch.nn.functional.pad(t, (0, longest - len(t))) for t in tokens])
        mask = torch.stack([(torch.arange(longest) < len(t)).long() for t in tokens])
        logits, _ = self._run(ids, mask, self._empty_cache(len(tokens)), 0)
        return [logits[i, : len(t)] for i, t in enumerate(tokens)]

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
        mask = torch.ones(1, seen + len(ids), dtype=torch.long)
        logits, present = self._run(ids[None], mask, past, seen)
        return logits[0], present

    def _run(
        self, ids: torch.Tensor, mask: torch.Tensor, past: list[Any], seen: int
    ) -> tuple[torch.Tensor, list[Any]]:
        """fp32 logits (batch, length, vocabulary) of ids (batch, length), and the cache after them.

        mask: (batch, seen + length); seen: how many tokens the cache holds.
        """
        signature = self._signature
        feeds = {signature.input_ids: value(ids.numpy().astype(signature.ids_dtype))}
        if signature.attention_mask:
            feeds[signature.attention_mask] = value(mask.numpy().astype(signature.ids_dtype))
        if signature.position_ids:
            positions = np.arange(seen, seen + ids.shape[1], dtype=signature.ids_dtype)
            feeds[signature.position_ids] = value(np.tile(positions, (len(ids), 1)))
        feeds |= dict(zip([n for pair in signature.past for n in pair], past, strict=True))
        names = [signature.logits, *(n for pair in signature.present for n in pair)]
        logits, *present = run_values(self._session, names, feeds, self._model)
        return torch.from_numpy(logits.numpy().astype(np.float32)), present

    def _empty_cache(self, rows: int = 1) -> list[Any]:
        signature = self._signature
        empty = np.zeros((rows, signature.kv_heads, 0, signature.head_dim), signature.cache_dtype)
        return [value(empty) for pair in signature.past for _ in pair]
