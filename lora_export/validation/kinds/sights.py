"""Texts with pictures for models that read both: the features of a picture stand where its placeholders are."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.errors import InputError
from lora_export.validation.comparing.tested_model import ModelUnderTest, plain, setting, takes
from lora_export.validation.kinds.signals import SEED, processed_images

Seen = Mapping[str, torch.Tensor]
PICTURES = (1, 2)  # in the first text, in the second one; the others have none
# Models whose prompt sees itself in both directions: with an answer behind it, what they compute depends on where
# the prompt ends, which no comparison of texts can tell.
PREFIX = frozenset({"paligemma"})
_AFTER = 2  # tokens of a text that stand before its pictures


@dataclass(frozen=True)
class Sights:
    """pictures: what the model reads of them, by the number of placeholders in a text (0: nothing); placeholder,
    start: the ids for each token of a picture, and before a picture (None: nothing stands there); counts: of the
    tokens of each picture, for each text that has some; merge, whole: as in VisionLanguageComparison."""

    pictures: Mapping[int, Seen]
    placeholder: int
    start: int | None
    counts: Sequence[Sequence[int]]
    merge: int
    whole: bool

    def of(self, ids: torch.Tensor) -> Seen:
        """What belongs to the placeholders among ids, of any shape."""
        return self.pictures[int((ids == self.placeholder).sum())]

    def removed_from(self, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Texts with another id where one happens to be a placeholder."""
        return [torch.where(ids == self.placeholder, int(self.placeholder == 0), ids) for ids in tokens]

    def put_into(self, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The first texts with pictures among their tokens; none has a placeholder besides."""
        own = self.removed_from(tokens)
        for i, counts in enumerate(self.counts[: len(own)]):
            start = [] if self.start is None else [self.start]
            pieces = [torch.tensor([*start, *[self.placeholder] * n], dtype=torch.long) for n in counts]
            own[i] = torch.cat([own[i][:_AFTER], *pieces, own[i][_AFTER:]])
        return own


def sights(subject: ModelUnderTest) -> tuple[Sights, str]:
    """(pictures for the model, where they come from)."""
    model = plain(subject.model)
    placeholder = setting(model.config, "image_token_id", "image_token_index")
    if placeholder is None:
        raise InputError(
            f"{type(model).__name__} reads pictures, but its configuration names no token that stands for them",
            expected="image_token_id in config.json",
        )
    made, note = processed_images(subject, PICTURES), "with seeded pictures through the folder's own processor"
    if not made:
        made, note = [seeded(model, n) for n in PICTURES], "with seeded random pictures"
    counts = [counts_of(model, seen, n) for seen, n in zip(made, PICTURES, strict=True)]
    known = {sum(c): seen for c, seen in zip(counts, made, strict=True)}
    start = setting(model.config, "vision_start_token_id")
    merge = setting(model.config.vision_config, "spatial_merge_size") or 1
    return Sights({0: {}, **known}, placeholder, start, counts, merge, "token_type_ids" in takes(model)), note


@torch.inference_mode()
def counts_of(model: Any, seen: Seen, pictures: int) -> list[int]:
    """How many tokens each of so many pictures has. Some models give the features of a row of pictures together:
    these are of one size."""
    made = model.get_image_features(**seen, return_dict=True).pooler_output
    counts = [part.reshape(-1, part.shape[-1]).shape[0] for part in made]
    return counts if len(counts) == pictures else [sum(counts) // pictures] * pictures


def seeded(model: Any, count: int, shift: int = 0) -> dict[str, torch.Tensor]:
    """Random pictures, each of another size where the model takes any; `shift` makes others."""
    vision = model.config.vision_config
    names = set(inspect.signature(model.get_image_features).parameters)
    generator = torch.Generator().manual_seed(SEED + count + 97 * shift)
    channels = setting(vision, "num_channels", "in_channels", "in_chans") or 3
    if "image_grid_thw" in names:
        merge = vision.spatial_merge_size
        grids = torch.tensor([[1, merge * (2 + i + shift), merge * 3] for i in range(count)])
        values = channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.rand(int(grids.prod(1).sum()), values, generator=generator) * 2 - 1
        return {"pixel_values": patches, "image_grid_thw": grids}
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    pixels = torch.rand(count, channels, height, width, generator=generator) * 2 - 1
    if "pixel_attention_mask" in names:
        mask = torch.ones(1, count, height, width, dtype=torch.bool)
        mask[:, -1, height // 2 :] = False  # the lower half of the last one is padding
        return {"pixel_values": pixels[None] * mask[:, :, None], "pixel_attention_mask": mask}
    if "image_sizes" in names:
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]] * count)}
    return {"pixel_values": pixels}
