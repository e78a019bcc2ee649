"""The pipelines that packages are made of, and the picture with which each of them is proved."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import ExportError
from lora_export.packages.job import Drawing

PROMPT = "a photograph of a red house by the sea"
SEED = 1  # of numpy's RandomState, whose stream is the same in every version
STEPS = 4
_TOKENS = 256  # of T5: FLUX.1 [schnell] takes no more
_SIDE = 64  # numbers of a latent, where no configuration says how many
_DIVIDED = 8  # what a UNet's levels divide a side by
_PACKED = 2  # numbers along a side that FLUX packs into one position
LARGEST_SIDE = 4096  # pixels
HALF = 2  # of the own size along a side, which costs a quarter


@dataclass(frozen=True)
class Family:
    """guidance: how far a picture follows its prompt, by default; tokens: of its T5 encoder; packed: whether its
    latents are a row of positions; marks: whether diffusers marks its pictures where it finds a library for it."""

    guidance: float
    tokens: int | None = None
    packed: bool = False
    marks: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of from_pretrained, so that a picture is as the model draws it."""
        return ("add_watermarker=False",) if self.marks else ()


# Class of diffusers → what is special. Optimum's class has "ORT" before this name.
FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family(7.5),
    "StableDiffusionXLPipeline": Family(5.0, marks=True),
    "StableDiffusion3Pipeline": Family(7.0, _TOKENS),
    "FluxPipeline": Family(3.5, _TOKENS, packed=True),
}


def family_of(class_name: str) -> Family:
    """ExportError for a pipeline of which no packages are made."""
    if class_name not in FAMILIES:
        raise ExportError(
            f"no package is made of {class_name}",
            expected=", ".join(FAMILIES),
            next_step="use the merged folder of the run with diffusers as it is",
        )
    return FAMILIES[class_name]


def drawing_of(
    class_name: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any], precision: str, where: Path
) -> Drawing:
    """The picture that a pipeline is asked for: half of its own size along a side.

    denoiser, vae: their configurations; precision: of what draws it.
    """
    family, each, channels = family_of(class_name), pixels_each(vae), denoiser.get("in_channels")
    side = _side(denoiser.get("sample_size")) // HALF
    side -= side % (_DIVIDED if side >= _DIVIDED else _PACKED)
    if not isinstance(channels, int) or not 0 < side * each <= LARGEST_SIDE:
        raise ExportError(
            f"its configuration says in_channels {channels!r}, and {side} × {each} pixels along a side",
            where=where,
            expected=f"a number of channels, and pictures of at most {LARGEST_SIDE} pixels along a side",
        )
    rows, size = side // _PACKED, side * each
    shape = (1, rows * rows, channels) if family.packed else (1, channels, side, side)
    return Drawing(SEED, STEPS, family.guidance, family.tokens, size, size, shape, precision)


def pixels_each(vae: Mapping[str, Any]) -> int:
    """Pixels along a side for each number of a latent: each block but the last halves it."""
    blocks = vae.get("block_out_channels")
    return int(2 ** (len(blocks) - 1)) if isinstance(blocks, list) and 0 < len(blocks) <= 8 else 8


def _side(size: object) -> int:
    """Configurations hold one side, both, or none."""
    value = size[0] if isinstance(size, list) and size else size
    return value if isinstance(value, int) and value > 1 else _SIDE
