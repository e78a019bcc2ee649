"""An exported encoder-decoder under ONNX Runtime: the encoder once, then the decoder with its caches.

The graphs are those of Optimum (encoder, decoder, decoder with past) or of onnxruntime-genai (encoder, decoder).
What one gives, the next reads under a name that tells so: present… as past…, the encoder's states as
encoder_hidden_states.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export.runtime import numpy_dtype, open_session
from lora_export.validation.graphs.run import run_values, value

STEPS = 2  # tokens at the end of a text that the decoder is given one at a time, from its cache
_SAME = {"last_hidden_state": "encoder_hidden_states", "hidden_states": "encoder_hidden_states"}
_AUDIO = "audio_features"  # onnxruntime-genai's name of Whisper's input_features

State = dict[str, Any]


class OnnxSeq2Seq:
    """graphs: the encoder's, the decoder's, and the decoder's with a cache where that is another."""

    def __init__(self, graphs: Sequence[Path], provider: str) -> None:
        self._model = graphs[0]
        opened = [open_session(graph, provider) for graph in graphs]
        self._encoder, self._first, self._later = opened[0], opened[1], opened[-1]

    def logits(self, inputs: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """fp32 logits (length, vocabulary) of one row of inputs, the decoder given `ids` (length,)."""
        state, out = self._encode(inputs), []
        for piece in (ids[:-STEPS], *torch.split(ids[-STEPS:], 1)):
            if len(piece):
                logits, state = self._step(piece[None], state)
                out.append(logits[0])
        return torch.cat(out)

    def greedy(self, inputs: Mapping[str, torch.Tensor], start: torch.Tensor, count: int) -> torch.Tensor:
        """`count` greedy tokens for each row of inputs, shape (rows, count); start: the first token (1,)."""
        state = self._encode(inputs)
        step = start.expand(len(next(iter(inputs.values()))), 1)
        out = []
        for _ in range(count):
            logits, state = self._step(step, state)
            step = logits[:, -1:].argmax(-1)
            out.append(step)
        return torch.cat(out, 1)

    def _encode(self, inputs: Mapping[str, torch.Tensor]) -> State:
        given = {k: v.numpy() for k, v in inputs.items()}
        first = next(iter(given.values()))
        given.setdefault(_AUDIO, first)
        mask = given.setdefault("attention_mask", np.ones(first.shape[:2], np.int64))
        names = [i.name for i in self._encoder.get_inputs()]
        found = self._run(self._encoder, {name: given[name] for name in names})
        return {"encoder_attention_mask": mask, "seen": 0, **_renamed(found)}

    def _step(self, ids: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """fp32 logits (rows, length, vocabulary) of these ids, and the state after them."""
        seen, length = state["seen"], ids.shape[1]
        session = self._later if seen else self._first
        own = {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((len(ids), seen + length), np.int64),
            "position_ids": np.tile(np.arange(seen, seen + length), (len(ids), 1)),
        }
        feeds = {}
        for given in session.get_inputs():
            values = own if given.name in own else state
            feeds[given.name] = values[given.name] if given.name in values else _empty(given, len(ids))
        found = self._run(session, feeds)
        logits = torch.from_numpy(found.pop("logits").numpy().astype(np.float32))
        return logits, {**state, **_renamed(found), "seen": seen + length}

    def _run(self, session: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
        types = {i.name: numpy_dtype(i.type) for i in session.get_inputs()}
        values = {name: _as_value(given, types[name]) for name, given in feeds.items()}
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, run_values(session, names, values, self._model), strict=True))


def _renamed(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a graph gave, by the names under which the next one reads it."""
    plain = {_SAME.get(name, name): given for name, given in found.items()}
    return {
        name.replace("present.", "past_key_values.").replace("present_", "past_"): given
        for name, given in plain.items()
    }


def _empty(given: Any, rows: int) -> "np.ndarray[Any, Any]":
    """A cache (rows, heads, 0, head size) without any token."""
    _, heads, _, size = given.shape
    return np.zeros((rows, heads, 0, size), numpy_dtype(given.type))


def _as_value(given: Any, dtype: "np.dtype[Any]") -> Any:
    """An array in the type that the graph reads; what a graph gave is as it should be."""
    return value(np.ascontiguousarray(given.astype(dtype, copy=False))) if isinstance(given, np.ndarray) else given
