"""The battery for encoder-decoders: the encoder on padded rows, the decoder's first step and later ones."""

from collections.abc import Iterator
from typing import Any

import torch

from lora_export.graph_runs.signature import ENCODER_MASK, IDS, MASK, POSITIONS, STATES, read_as
from lora_export.validation.proof.decoder import empty
from lora_export.validation.proof.made_up import Ids, Sizes, generator, mask_of
from lora_export.validation.proof.single import rounded
from lora_export.validation.proof.trial import Extent, Graphs, Reference, Trial, counted, counted_array, outputs_of

_FRAMES, _WAVE = 3000, 8000  # of Whisper's spectrogram, always; samples of a sound
_SIGNALS = ("input_features", "audio_features", "input_values", "pixel_values")


def trials(model: Reference, graphs: Graphs, extent: Extent) -> Iterator[Trial]:
    cases = [(Sizes(3, 9, "right"), (5, 1, 1)), (Sizes(1, 21), (1, 1, 1, 1))]
    if extent.full:
        cases += [(Sizes(2, 33, "left"), (3, *[1] * 9)), (Sizes(1, 120), (40, 1, 1))]
    for sizes, steps in cases:
        yield from _case(model, graphs, sizes, steps)


def _case(model: Reference, graphs: Graphs, sizes: Sizes, steps: tuple[int, ...]) -> Iterator[Trial]:
    encoder, first, later = (*graphs.names, graphs.names[-1])[:3]
    inputs, mask, words = _inputs(model, graphs, sizes)
    encoded = model(model.model.get_encoder(), **inputs)
    feed = dict(inputs)
    if "input_features" in inputs:
        feed["audio_features"] = inputs["input_features"]
    found, failure = graphs.run(encoder, feed)
    states = next((n for n in found if read_as(n) == STATES), "last_hidden_state")
    hidden = encoded.last_hidden_state.float()
    keep = mask if mask is not None and hidden.shape[:2] == mask.shape else None
    shown = {states: counted_array(found[states], keep)} if states in found else {}
    yield Trial(f"the encoder, {words}", encoder, feed, {states: counted(hidden, keep)}, shown, failure)
    if failure:
        return
    fixed: dict[str, Any] = {read_as(n): v for n, v in found.items()}
    fixed[ENCODER_MASK] = torch.ones(hidden.shape[:2], dtype=torch.long) if mask is None else mask
    draw = Ids(model.config)
    every = torch.ones(sizes.rows, sum(steps), dtype=torch.long)
    decoded = draw.unpadded(draw(every, ("decoded", sizes, model.seed)))
    start = model.config.get_text_config(decoder=True)
    decoded[:, 0] = getattr(model.config, "decoder_start_token_id", None) or getattr(start, "bos_token_id", 0) or 0
    past, at = None, 0
    cache: dict[str, Any] = {}
    more: dict[str, Any] = {"encoder_outputs": encoded} | ({} if mask is None else {MASK: mask})
    whole = None if model.watch else model(decoder_input_ids=decoded, **more)
    for number, length in enumerate(steps):
        ids = decoded[:, at : at + length]
        result = whole
        if result is None:
            result = model(decoder_input_ids=ids, past_key_values=past, use_cache=True, **more)
            past = result.past_key_values
        name = later if number else first
        signature = graphs.signature(name)
        positions = torch.arange(at, at + length).expand(sizes.rows, -1)
        behind = {MASK: torch.ones(sizes.rows, at + length, dtype=torch.long), POSITIONS: positions}
        given = {**empty(signature, sizes.rows), **behind, **fixed, **cache, IDS: ids, "decoder_input_ids": ids}
        found, failure = graphs.run(name, given)
        names = [n for n in outputs_of(signature) if n in result]
        yield Trial(
            f"the decoder, {words}, {length} tokens" + (f" behind a cache of {at}" if at else " at once"),
            name,
            given,
            {n: (result[n] if whole is None else whole[n][:, at : at + length]).float() for n in names},
            {n: found[n] for n in names if n in found},
            failure,
        )
        if failure:
            return
        cache |= {read_as(n): v for n, v in found.items() if n not in names}
        at += length


def _inputs(model: Reference, graphs: Graphs, sizes: Sizes) -> tuple[dict[str, torch.Tensor], Any, str]:
    """What the encoder is given, its mask if it takes one, and the case in words."""
    signature = graphs.signature(graphs.names[0])
    signal = next((n for n in _SIGNALS if n in signature.inputs), None)
    if signal is None:
        mask = mask_of(sizes)
        return {IDS: Ids(model.config)(mask, (sizes, model.seed)), MASK: mask}, mask, sizes.words
    shape = signature.inputs[signal].shape
    own = "input_features" if signal == "audio_features" else signal
    frames = min(_FRAMES, getattr(model.config, "max_source_positions", None) or _FRAMES)
    lengths = [d if isinstance(d, int) else frames if own == "input_features" else _WAVE for d in shape[1:]]
    values = torch.randn(sizes.rows, *lengths, generator=generator(own, sizes, model.seed))
    inputs = {own: rounded(values, signature.inputs[signal])}
    heard = None
    if MASK in signature.inputs:  # as long as the axis that has no number
        longest = next((n for n, d in zip(lengths, shape[1:], strict=True) if not isinstance(d, int)), lengths[-1])
        inputs[MASK] = heard = mask_of(Sizes(sizes.rows, longest, "right"))
    return inputs, heard, f"batch {sizes.rows}, {own} {list(values.shape)}"
