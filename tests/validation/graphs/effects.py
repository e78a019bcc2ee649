"""What graphs answer on valid inputs, so that a fault without an effect is told from one with it.

Apart from validation's own inputs: other lengths, a padded batch, and steps from the cache.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from lora_export.graph_runs.signature import numpy_dtype
from tests.onnx_export.conftest import VOCABULARY

Array = Any
SHORT, LONG, STEPS = 37, 90, 6
_RENAMED = {"last_hidden_state": "encoder_hidden_states", "hidden_states": "encoder_hidden_states"}


def effect(honest: Sequence[Array], found: Sequence[Array]) -> float:
    """The largest difference as a share of the largest honest output; ∞ for what is not a number."""
    largest = max(float(np.abs(a).max()) for a in honest)
    apart = max(float(np.abs(a - b).max()) for a, b in zip(honest, found, strict=True))
    return apart / largest if np.isfinite(apart) else float("inf")


def answers(kind: str, graphs: Sequence[Path]) -> list[Array]:
    """fp32 outputs at all positions that are no padding. Raises what ONNX Runtime raises."""
    sessions = [_session(graph) for graph in graphs]
    if kind == "decoder":
        return _decoder(sessions[0])
    if len(sessions) > 1:
        return _pair(sessions)
    return _encoder(sessions[0], kind)


def _session(graph: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _ids(rows: int, length: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(4, VOCABULARY, (rows, length))


def _run(session: Any, given: Mapping[str, Array]) -> dict[str, Array]:
    feeds = {}
    for wanted in session.get_inputs():
        dtype = numpy_dtype(wanted.type)
        value = given.get(wanted.name)
        if value is None:  # an empty cache
            rows = len(given["input_ids"])
            shape = [rows, *(0 if isinstance(n, str) else n for n in wanted.shape[1:])]
            value = np.zeros(shape, dtype)
        feeds[wanted.name] = np.ascontiguousarray(value).astype(dtype, copy=False)
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))


def _text(ids: Array, mask: Array, seen: int = 0) -> dict[str, Array]:
    positions = np.tile(np.arange(seen, seen + ids.shape[1]), (len(ids), 1))
    types = np.zeros_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "token_type_ids": types}


def _padded(length: int, shorter: int) -> Array:
    mask = np.ones((2, length), np.int64)
    mask[1, shorter:] = 0
    return mask


def _past(found: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name.replace("present.", "past_key_values.").replace("present_", "past_"): value
        for name, value in found.items()
    }


def _decoder(session: Any) -> list[Array]:
    """A padded batch, and a text with steps from the cache."""
    out = _padded_decoder(session)
    ids, past = _ids(1, LONG + STEPS, 2), {}
    seen = 0
    for length in (LONG, *[1] * STEPS):
        piece = ids[:, seen : seen + length]
        found = _run(session, {**_text(piece, np.ones((1, seen + length), np.int64), seen), **past})
        out.append(found.pop("logits").astype(np.float32)[0])
        past, seen = _past(found), seen + length
    return out


def _padded_decoder(session: Any) -> list[Array]:
    """Padded on the left where the graph is told positions; else on the right, with a step of both rows after it,
    as onnxruntime-genai does."""
    mask, given = _padded(LONG, SHORT), _text(_ids(2, LONG, 1), _padded(LONG, SHORT))
    if any(x.name == "position_ids" for x in session.get_inputs()):
        left = {**given, "attention_mask": mask[:, ::-1]}
        left["position_ids"] = np.maximum(left["attention_mask"].cumsum(-1) - 1, 0)
        logits = _run(session, left)["logits"].astype(np.float32)
        return [logits[0], logits[1, -SHORT:]]
    first = _run(session, given)
    logits = first.pop("logits").astype(np.float32)
    more = np.concatenate([mask[:, :1], mask], 1)  # one token more in each row
    step = _run(session, {"input_ids": _ids(2, 1, 9), "attention_mask": more, **_past(first)})
    return [logits[0], logits[1, :SHORT], step["logits"].astype(np.float32)]


def _encoder(session: Any, kind: str) -> list[Array]:
    rng = np.random.default_rng(3)
    if kind == "vision":
        return _floats(_run(session, {"pixel_values": rng.standard_normal((2, 3, 32, 32))}), None)
    if kind == "speech":
        sound = rng.standard_normal((2, 4000))
        return _floats(
            _run(session, {"input_values": sound, "attention_mask": np.ones(sound.shape, np.int64)}), None
        )
    whole, mask = np.ones((1, LONG), np.int64), _padded(LONG, SHORT)
    alone = _floats(_run(session, _text(_ids(1, LONG, 4), whole)), whole)
    return [*alone, *_floats(_run(session, _text(_ids(2, LONG, 5), mask)), mask)]


def _floats(found: Mapping[str, Array], mask: Array | None) -> list[Array]:
    floats = [v.astype(np.float32) for v in found.values() if np.issubdtype(v.dtype, np.floating)]
    if mask is None:
        return floats
    return [v[mask.astype(bool)] if v.shape[:2] == mask.shape else v for v in floats]


def _pair(sessions: Sequence[Any]) -> list[Array]:
    """Texts of two lengths in one batch, or two sounds; then a decoder's first step and further ones."""
    encoder, first, later = sessions[0], sessions[1], sessions[-1]
    mask = _padded(LONG, SHORT)
    given = _text(_ids(2, LONG, 6), mask)
    given["audio_features"] = np.random.default_rng(7).standard_normal((2, 80, 3000))
    found = _run(encoder, given)
    state = {"encoder_attention_mask": mask} | {_RENAMED.get(k, k): v for k, v in _past(found).items()}
    out, seen, ids = [], 0, _ids(2, 20 + STEPS, 8)
    for length in (20, *[1] * STEPS):
        piece = ids[:, seen : seen + length]
        whole = np.ones((2, seen + length), np.int64)
        found = _run(later if seen else first, {**_text(piece, whole, seen), **state})
        out.append(found.pop("logits").astype(np.float32))
        state, seen = {**state, **_past(found)}, seen + length
    return out
