"""Pictures for people: of each model, and their differences, made visible."""

import math
from pathlib import Path

import torch
from PIL import Image

from lora_export.contracts import Picture
from lora_export.validation.pipelines.outputs import psnr, rmse

LARGEST_GAIN = 2.0**16


def save_pictures(folder: Path, pictures: dict[str, torch.Tensor], reference: str) -> tuple[Picture, ...]:
    """Write each picture, and its difference from the one called `reference`, as PNG files into an existing folder.

    pictures: (height, width, 3) in 0 … 1, by name. Differences are absolute, times a power of two that shows them.
    """
    of = pictures[reference]
    shown = [_saved(folder, reference, of, None, None)]
    for name, picture in pictures.items():
        if name != reference and picture.shape == of.shape:
            distance = psnr(rmse(of, picture))
            difference = (picture - of).abs()
            gain = _gain(float(difference.max()))
            shown.append(_saved(folder, name, picture, distance, None))
            shown.append(_saved(folder, f"{name} − {reference}", difference * gain, distance, gain))
    return tuple(shown)


def _gain(largest: float) -> float:
    if not 0 < largest < math.inf:
        return 1.0
    return min(LARGEST_GAIN, max(1.0, 2.0 ** math.floor(-math.log2(largest))))


def _saved(folder: Path, name: str, picture: torch.Tensor, distance: float | None, gain: float | None) -> Picture:
    values = (picture.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    file = name.replace(" − ", "-minus-").replace(" ", "-") + ".png"
    Image.fromarray(values).save(folder / file)
    height, width = values.shape[:2]
    return Picture(name, file, width, height, distance, gain)
