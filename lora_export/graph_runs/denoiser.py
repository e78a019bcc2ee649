"""One step of a denoiser: what its graph reads, by Optimum's names, and the same for the class of diffusers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.graph_runs.signature import STATES, Array, GraphValue, Signature

if TYPE_CHECKING:
    from lora_export.graph_runs.feeds import Feed

TIMESTEP, POOLED, PLACES, TEXT_PLACES, GUIDANCE = (
    "timestep", "pooled_projections", "img_ids", "txt_ids", "guidance",
)  # fmt: skip
MICRO = "time_ids"  # of SDXL: original height and width, top and left of the crop, height and width
_ADDED = ("text_embeds", MICRO)  # what a UNet takes in a mapping of its own
_CLIP, _T5, _FLUX = 77, 256, 512  # tokens of a prompt
_PIXELS = 8  # along a side, for each number of the latent
_HALFWAY, _TRAINED = 500.0, 1000.0  # a timestep, and how many the schedulers count
_SCALE = 3.5  # guidance that FLUX was distilled with
_PACKED = 2  # numbers along a side that FLUX packs into one position


def is_denoiser(signature: Signature) -> bool:
    """Whether a graph does one step from noise to a picture."""
    return {TIMESTEP, STATES} <= signature.inputs.keys()


def step_feed(signature: Signature, batch: int, side: int, seed: int = 0) -> "Feed":
    """Inputs of one step, halfway: a latent of noise of (side, side), and embeddings of noise.

    batch: latents; side: of the latent before it is packed. Axes that the graph fixes stay as they are.
    """
    random = np.random.default_rng(seed)
    made = ((v, _value(v, signature, batch, side, random)) for v in signature.inputs.values())
    return {v.name: np.array(array, v.dtype, order="C") for v, array in made}


def _value(value: GraphValue, signature: Signature, batch: int, side: int, random: "np.random.Generator") -> Array:
    packed = PLACES in signature.inputs
    rows = side // _PACKED
    if value.name == TIMESTEP:
        step = _HALFWAY / _TRAINED if packed else _HALFWAY
        return np.full((batch,) * len(value.shape), step)
    if value.name == GUIDANCE:
        return np.full((batch,), _SCALE)
    if value.name == PLACES:
        return np.stack([np.zeros((rows, rows)), *np.indices((rows, rows))], -1).reshape(rows * rows, 3)
    if value.name == TEXT_PLACES:
        return np.zeros((_FLUX, 3))
    if value.name == MICRO:
        size = _PIXELS * side
        return np.tile([size, size, 0, 0, size, size], (batch, 1))
    if value.name == STATES:
        length = _FLUX if packed else _CLIP + _T5 if POOLED in signature.inputs else _CLIP
        shape = [batch, length, value.shape[2]]
    elif packed and len(value.shape) == 3:
        shape = [batch, rows * rows, value.shape[2]]
    else:
        shape = [batch, *(size if isinstance(size, int) else side for size in value.shape[1:])]
    return random.standard_normal([_known(s) for s in shape], np.float32)


def _known(size: int | str | None) -> int:
    assert isinstance(size, int), "widths of a denoiser's inputs are fixed by its weights"
    return size


def as_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a graph as arguments of the class of diffusers that it was exported from."""
    added = {name: given[name] for name in _ADDED if name in given}
    rest = {name: value for name, value in given.items() if name not in added}
    return {**rest, "added_cond_kwargs": added} if added else rest
