"""A graph and the transformers model that it is made from, on the same inputs: largest relative differences."""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import transformers

from lora_export.contracts import ExportResult
from tests.onnx_export.conftest import VOCABULARY

Arrays = dict[str, np.ndarray[Any, Any]]
SHAPES = ((1, 5), (3, 12), (2, 17))


def worst(result: ExportResult, model: Any) -> float:
    """Over shapes, masks and steps: the largest difference over the largest value of the same output."""
    kinds = {"encoder": _single, "decoder": _decoder, "seq2seq": _seq2seq}
    return max(_relative(a, b) for a, b in kinds[result.kind](result, model))


def session(path: Path) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _relative(expected: torch.Tensor, found: np.ndarray[Any, Any]) -> float:
    assert tuple(expected.shape) == found.shape
    wanted = expected.float().numpy()
    assert np.isfinite(found).all()
    return float(np.abs(wanted - found).max() / np.abs(wanted).max())


def _ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


def _mask(batch: int, length: int) -> torch.Tensor:
    """Rows of different lengths, padded on the right."""
    lengths = torch.tensor([length - 2 * i for i in range(batch)]).clamp(min=2)
    return (torch.arange(length)[None] < lengths[:, None]).long()


def _run(runs: Any, feeds: Mapping[str, Any]) -> Arrays:
    outputs = [o.name for o in runs.get_outputs()]
    types = {"tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(float)": np.float32}
    given = {i.name: np.asarray(feeds[i.name]).astype(types[i.type]) for i in runs.get_inputs()}
    return dict(zip(outputs, runs.run(outputs, given), strict=True))


@torch.no_grad()
def _single(result: ExportResult, model: Any) -> Iterator[tuple[torch.Tensor, np.ndarray[Any, Any]]]:
    runs = session(result.model)
    names = {i.name for i in runs.get_inputs()}
    for batch, length in SHAPES:
        feeds = {n: v for n, v in _inputs(model, batch, length).items() if n in names}
        expected, found = model(**feeds), _run(runs, feeds)
        for name, value in found.items():
            wanted, mask = expected[name], feeds.get("attention_mask")
            if mask is not None and wanted.shape[:2] == mask.shape:  # what stands at padding is nobody's business
                keep = mask.reshape(*mask.shape, *[1] * (wanted.dim() - 2))
                wanted, value = wanted * keep, value * keep.numpy()
            yield wanted, value


def _inputs(model: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(length)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 0)
    ids = _ids(batch, length)
    if hasattr(config, "vision_config"):
        ids[:, -1] = 2  # CLIP pools where the end is
    waves = 640 * length
    return {
        "input_ids": ids,
        "attention_mask": _mask(batch, waves if hasattr(config, "conv_dim") else length),
        "token_type_ids": (torch.arange(length)[None] % 2).expand(batch, length).contiguous(),
        "pixel_values": torch.rand(batch, 3, size, size, generator=generator) * 2 - 1,
        "input_values": torch.randn(batch, waves, generator=generator),
    }


def _empty(runs: Any, batch: int) -> Arrays:
    found = {}
    for i in runs.get_inputs():
        if i.name.startswith("past_"):
            dims = [d if isinstance(d, int) else 0 for d in i.shape]
            found[i.name] = np.zeros((batch, *dims[1:]), np.float32)
    return found


@torch.no_grad()
def _decoder(result: ExportResult, model: Any) -> Iterator[tuple[torch.Tensor, np.ndarray[Any, Any]]]:
    """Prefill, one token, several tokens, with the cache growing; rows padded on either side; more tokens than the
    windows of tiny models have; greedy tokens equal."""
    runs = session(result.model)
    own = result.engine == "dynamo"  # GroupQueryAttention takes padding on the right, and steps of one token
    shapes = [(*shape, "left") for shape in (*SHAPES, (2, 37))]
    for batch, length, side in [*shapes, *([(3, 12, "right")] if own else [])]:
        ids, mask = _ids(batch, length + 4), _mask(batch, length + 4)
        if side == "left":
            mask = mask.flip(1) if own else torch.ones_like(mask)
        else:
            mask = torch.cat([_mask(batch, length), torch.ones((batch, 4), dtype=torch.int64)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        steps = (length, 1, 3) if own or batch == 1 else (length, 1, 1, 1, 1)
        expected = _logits(model, ids, mask, positions, steps)
        past, at = _empty(runs, batch), 0
        for step in steps:
            now = slice(at, at + step)
            feeds = {
                "input_ids": ids[:, now], "attention_mask": mask[:, : at + step], "position_ids": positions[:, now],
                **past,
            }  # fmt: skip
            found = _run(runs, feeds)
            past, at = _grown(found), at + step
            keep = mask[:, now, None]
            yield expected[:, now] * keep, found["logits"] * keep.numpy()
    if not own:
        ids, mask = _ids(3, 12), _mask(3, 12)
        positions = torch.arange(12).expand(3, 12)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **_empty(runs, 3)}
        found = _run(runs, feeds)
        yield (
            model(input_ids=ids, attention_mask=mask).logits * mask[..., None],
            found["logits"] * mask[..., None].numpy(),
        )
    assert (
        _greedy_decoder(runs, _ids(1, 6), model.generation_config.eos_token_id)
        == model.generate(
            _ids(1, 6), do_sample=False, max_new_tokens=12, min_new_tokens=12, use_cache=True, pad_token_id=3
        )[0, 6:].tolist()
    )


def _logits(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, steps: tuple[int, ...]
) -> torch.Tensor:
    """Of all tokens at once; in steps where keys are turned by frequencies that follow the length so far."""
    rope = str(model.config.to_dict().get("rope_parameters"))
    if "dynamic" not in rope and "longrope" not in rope:
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    cache, out, at = None, [], 0
    for step in steps:
        now = slice(at, at + step)
        given = {
            "input_ids": ids[:, now],
            "attention_mask": mask[:, : at + step],
            "position_ids": positions[:, now],
        }
        result = model(**given, past_key_values=cache, use_cache=True)
        cache, at = result.past_key_values, at + step
        out.append(result.logits)
    return torch.cat(out, 1)


def _grown(found: Arrays) -> Arrays:
    return {n.replace("present.", "past_key_values.").replace("present_", "past_"): v for n, v in found.items()}


def _greedy_decoder(runs: Any, ids: torch.Tensor, ends: Any) -> list[int]:
    past, tokens, seen = _empty(runs, 1), ids.numpy(), 0
    out: list[int] = []
    while len(out) < 12:
        total = seen + tokens.shape[1]
        feeds = {
            "input_ids": tokens, "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(seen, total)[None], **past,
        }  # fmt: skip
        found = _run(runs, feeds)
        past, seen = _grown(found), total
        logits = found["logits"][0, -1].copy()
        if ends is not None:
            logits[ends] = -np.inf  # as min_new_tokens keeps the end away
        out.append(int(logits.argmax()))
        tokens = np.array([[out[-1]]])
    return out


@torch.no_grad()
def _seq2seq(result: ExportResult, model: Any) -> Iterator[tuple[torch.Tensor, np.ndarray[Any, Any]]]:
    """The encoder on padded rows; the decoder's first step, then more with the growing cache; greedy tokens."""
    encoder, first, later = (session(result.output / name) for name in (*result.graphs, result.graphs[-1])[:3])
    hears = "input_features" in inspect.signature(model.forward).parameters
    steps = (1, 1, 1, 1) if hears else (1, 3)  # the builder's decoder goes on by one token at a time
    for batch, length in SHAPES:
        mask, given = _mask(batch, length), _ids(batch, 9, seed=1)
        given[:, 0] = model.config.decoder_start_token_id
        inputs: dict[str, Any] = {"input_ids": _ids(batch, length), "attention_mask": mask}
        if hears:
            inputs = {"input_features": _sounds(batch)}
        expected = model(**inputs, decoder_input_ids=given)
        found = _run(encoder, {**inputs, "audio_features": inputs.get("input_features")})
        states = found.pop("hidden_states" if hears else "last_hidden_state")
        keep = torch.ones(states.shape[:2])[..., None] if hears else mask[..., None]
        yield expected.encoder_last_hidden_state * keep, states * keep.numpy()
        fixed = {"encoder_hidden_states": states, "encoder_attention_mask": mask, **_grown(found)}
        found = _run(first, {"input_ids": given[:, :5], **_empty(first, batch), **fixed})
        yield expected.logits[:, :5], found.pop("logits")
        cache, at = _grown(found), 5
        for step in steps:
            found = _run(later, {"input_ids": given[:, at : at + step], **fixed, **cache})
            yield expected.logits[:, at : at + step], found.pop("logits")
            cache |= _grown(found)
            at += step
    yield _greedy_seq2seq(model, inputs, (first, later), fixed)


def _sounds(batch: int) -> torch.Tensor:
    return torch.randn(batch, 80, 3000, generator=torch.Generator().manual_seed(batch))


def _greedy_seq2seq(
    model: Any, inputs: Mapping[str, Any], decoders: Any, fixed: Arrays
) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """12 tokens for each row, by transformers and by the graphs."""
    rows = len(next(iter(inputs.values())))
    plain = {"do_sample": False, "num_beams": 1, "max_new_tokens": 12, "min_new_tokens": 12}
    expected = transformers.GenerationMixin.generate(model, **inputs, **plain)[:, 1:]
    session, cache, out = decoders[0], _empty(decoders[0], rows), []
    ids = np.full((rows, 1), model.config.decoder_start_token_id)
    for _ in range(12):
        found = _run(session, {"input_ids": ids, **cache, **fixed})
        logits = found.pop("logits")[:, -1].copy()
        logits[:, model.generation_config.eos_token_id] = -np.inf  # as min_new_tokens keeps the end away
        ids = logits.argmax(-1)[:, None]
        out.append(ids)
        cache, session = cache | _grown(found), decoders[1]
    return expected, np.concatenate(out, 1)
