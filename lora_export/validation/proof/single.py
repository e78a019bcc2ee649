"""The battery for graphs with one forward: texts, images, sounds, pairs of them, in sizes that were not traced."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lora_export.graph_runs.signature import IDS, MASK, Signature
from lora_export.validation.comparing import sentence
from lora_export.validation.proof.made_up import Sizes, value
from lora_export.validation.proof.trial import Expected, Extent, Graphs, Reference, Trial, counted, counted_array

_DOUBLINGS = 4
_SECOND = 16_000  # samples of a sound


def trials(model: Reference, graphs: Graphs, extent: Extent) -> Iterator[Trial]:
    """Every case that the inputs and the configuration tell; a case that PyTorch itself refuses is left out."""
    name = graphs.names[0]
    signature = graphs.signature(name)
    left = not (_pools(signature) and borders(model.config)) or _is_causal(model.model)
    for wanted in _sizes(signature, model.config, extent.full, left):
        sizes = wanted
        feed, expected = _answer(model, signature, sizes)
        for _ in range(_DOUBLINGS if sizes.named else 0):
            if expected:
                break
            sizes = sizes.doubled()  # an image may be too small for the model's own strides
            feed, expected = _answer(model, signature, sizes)
        if not expected:
            continue
        found, failure = graphs.run(name, feed)
        mask = feed.get(MASK)
        yield Trial(
            _words(sizes, feed),
            name,
            feed,
            {n: counted(v, mask) for n, v in expected.items()},
            {n: counted_array(found[n], mask) for n in expected if n in found},
            failure,
        )


def _answer(model: Reference, signature: Signature, sizes: Sizes) -> tuple[dict[str, torch.Tensor], Expected]:
    """The feed, and PyTorch's outputs by the graph's names: none if PyTorch cannot take any such feed."""
    for tame in (False, True):
        feed = {
            n: rounded(value(v, sizes, model.config, (sizes, model.seed), tame), v)
            for n, v in signature.inputs.items()
        }
        try:
            result = model(**feed)
        except Exception:  # transformers raises anything for inputs against a model's rules
            continue
        found = {n: result[n].float() for n in signature.outputs if _tensor(result, n)}
        if sentence.OUTPUT in signature.outputs:
            embedding = sentence.embedding(model.model, result["last_hidden_state"], feed.get(MASK))
            found |= {} if embedding is None else {sentence.OUTPUT: embedding.float()}
        return feed, found
    return feed, {}


def _tensor(result: Any, name: str) -> bool:
    return name in result and isinstance(result[name], torch.Tensor)


def rounded(values: torch.Tensor, of: Any) -> torch.Tensor:
    """Floating-point numbers as the graph gets them: rounded to its type."""
    kinds = {"tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}
    return values.to(kinds[of.type]).float() if of.type in kinds and values.is_floating_point() else values


def _words(sizes: Sizes, feed: Mapping[str, torch.Tensor]) -> str:
    if IDS in feed:
        return sizes.words
    shapes = ", ".join(f"{n} {list(v.shape)}" for n, v in feed.items() if not n.endswith("mask"))
    return shapes if sizes.side == "none" else f"{shapes}, padded on the {sizes.side}"


def _pools(signature: Signature) -> bool:
    """Whether an output stands for a whole text."""
    return any("sequence_length" not in map(str, v.shape[1:]) for v in signature.outputs.values())


def _is_causal(model: Any) -> bool:
    return any(getattr(module, "is_causal", False) for module in model.modules())


def _sizes(signature: Signature, config: Any, full: bool, left: bool) -> list[Sizes]:
    """Rows and lengths that differ from those traced, and beyond every border that the configuration has.

    left: whether rows are padded on the left, too. An encoder with windows that reads its answer from the first
    token would read it from padding that sees padding alone, for which nothing is defined.
    """
    if IDS not in signature.inputs:
        return _of_signals(signature, config, full)
    longest = _longest(config)
    sizes = [Sizes(3, 7, "right"), Sizes(1, 23), Sizes(4, 13, "left" if left else "right")]
    border = max((b for b in borders(config).values()), default=0)
    if border + 9 > 23 and border <= (4096 if full else 512):
        sizes += [Sizes(1, border + 9), Sizes(2, border + 9, "right")]
    if full:
        sizes += [Sizes(5, 40, "right"), Sizes(1, min(longest, 512)), Sizes(2, 1)]
    named = _named(signature, config)[0] if "pixel_values" in signature.inputs else None
    return [Sizes(s.rows, min(s.tokens, longest), s.side, named) for s in sizes]


def _longest(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    # RoBERTa counts positions from behind the token of padding
    offset = (getattr(text, "pad_token_id", 0) or 0) + 1
    return max(2, int(most) - offset) if isinstance(most, int) and most > 0 else 2**20


_UNBOUNDED = ("default", "linear", "proportional")  # one formula for every position


def borders(config: Any) -> dict[str, int]:
    """Lengths at which a model begins to compute otherwise, by what they are: windows, chunks, the length that its
    rotary positions were trained for."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found: dict[str, int] = {}
    for key in ("sliding_window", "local_attention", "attention_window", "attention_chunk_size", "window_size"):
        given = getattr(text, key, None)
        size = max(given, default=0) if isinstance(given, list | tuple) else given
        if isinstance(size, int) and size > 0 and getattr(text, "use_sliding_window", True):
            found[key.replace("_", " ")] = size
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if kind.get("rope_type", "default") not in _UNBOUNDED and not kind.get("alpha"):  # HunYuan's is fixed
            length: Any = kind.get("original_max_position_embeddings")
            length = length or getattr(text, "original_max_position_embeddings", None)
            longest = int(getattr(text, "max_position_embeddings", 0) or 0)
            found["original rope length"] = int(length or longest)
            if kind["rope_type"] == "dynamic":
                found["length that changes the angles"] = longest
    return {what: size for what, size in found.items() if size}


def rope_types(config: Any) -> set[str]:
    """The kinds of rotary positions that the layers of a model have."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    return {str(k["rope_type"]) for k in kinds if "rope_type" in k}


def _of_signals(signature: Signature, config: Any, full: bool) -> list[Sizes]:
    shapes = _named(signature, config)
    sizes = [Sizes(3, _SECOND // 2 + 123, named=shapes[0]), Sizes(1, _SECOND + 77, named=shapes[-1])]
    if any(n.endswith("mask") for n in signature.inputs):
        sizes.append(Sizes(2, _SECOND + 400, "right", shapes[0]))
    if full:
        sizes += [Sizes(5, 3 * _SECOND, named=named) for named in shapes]
    return sizes


def _named(signature: Signature, config: Any) -> list[dict[str, int]]:
    """Heights and widths of images, frames of a spectrogram: the model's own, and others."""
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    patch: Any = getattr(vision, "patch_size", None) or 32
    step = 2 * int(max(patch) if isinstance(patch, list | tuple) else patch)
    own = {"height": int(height), "width": int(width), "channels": int(getattr(vision, "num_channels", 3) or 3)}
    spectrogram = any(len(v.shape) == 3 and v.name == "input_features" for v in signature.inputs.values())
    if spectrogram:
        return [own | {"length": 96, "frame": 96}, own | {"length": 131, "frame": 131}]
    other = own | {"height": own["height"] + step, "width": max(step, own["width"] - step)}
    return [own, other]
