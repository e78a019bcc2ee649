"""The graphs of an encoder-decoder and transformers' own model, on the same inputs, step by step."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lora_export.contracts import ExportResult
from tests.onnx_export.runs import _grown as grown
from tests.onnx_export.runs import _relative as relative
from tests.onnx_export.runs import _run as run
from tests.onnx_export.runs import session

Pair = tuple[torch.Tensor, np.ndarray[Any, Any]]
SHAPES = ((1, 5), (3, 12), (2, 19))
STEPS = (4, 1, 3, 1)  # tokens of the decoder at a time


def agreement(result: ExportResult, model: Any) -> float:
    """The largest difference over states and logits, relative to the largest value of the same tensor."""
    return max(relative(a, b) for a, b in _pairs(result, model))


@torch.no_grad()
def _pairs(result: ExportResult, model: Any) -> Iterator[Pair]:
    encoder, first, later = (session(result.output / name) for name in result.graphs)
    for batch, length in SHAPES:
        inputs = _inputs(encoder, model, batch, length)
        ids = _ids(model, batch, sum(STEPS))
        start = getattr(model.config, "decoder_start_token_id", None)
        ids[:, 0] = 0 if start is None else start
        expected = model(**inputs, decoder_input_ids=ids)
        states = run(encoder, inputs)["last_hidden_state"]
        keep = torch.ones(states.shape[:2])[..., None]
        if "input_ids" in inputs:
            keep = inputs["attention_mask"][..., None]
        yield expected.encoder_last_hidden_state * keep, states * keep.numpy()
        cache = {"encoder_hidden_states": states, "encoder_attention_mask": inputs.get("attention_mask")}
        runs, at = first, 0
        for step in STEPS:
            found = run(runs, {"input_ids": ids[:, at : at + step], **cache})
            yield expected.logits[:, at : at + step], found.pop("logits")
            cache |= grown(found)
            runs, at = later, at + step


def _ids(model: Any, batch: int, length: int) -> torch.Tensor:
    """Without the tokens that have a meaning."""
    config = model.config.get_text_config(decoder=True)
    special = {v for k, v in config.to_dict().items() if k.endswith("token_id") and isinstance(v, int)}
    allowed = torch.tensor([i for i in range(4, config.vocab_size) if i not in special])
    generator = torch.Generator().manual_seed(length)
    return allowed[torch.randint(len(allowed), (batch, length), generator=generator)]


def _inputs(encoder: Any, model: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the right, where the encoder takes a mask."""
    shapes = {i.name: i.shape for i in encoder.get_inputs()}
    if "input_ids" in shapes:
        inputs = {"input_ids": _ids(model, batch, length)}
    else:
        (name,) = (n for n in shapes if n != "attention_mask")
        sized = 8000 + 640 * length if name == "input_values" else 20 * length + 60
        shape = [n if isinstance(n, int) else sized for n in shapes[name][1:]]
        generator = torch.Generator().manual_seed(length)
        inputs = {name: torch.randn(batch, *shape, generator=generator)}
    if "attention_mask" in shapes:
        longest = length if "input_ids" in shapes else sized
        lengths = torch.tensor([longest - longest * i // 5 for i in range(batch)])
        inputs["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    return inputs
