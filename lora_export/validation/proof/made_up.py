"""Made-up inputs that matter: tokens of the whole vocabulary, padding on either side, sounds and images of noise.

Which of transformers' rules hold for an input (one end of text in each row, the token of padding where the mask is
zero) follows from the configuration: a classifier counts its tokens of padding, CLIP pools where the end is.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lora_export.graph_runs.signature import ENCODER_MASK, IDS, MASK, POSITIONS, TYPES, GraphValue

Side = Literal["none", "left", "right"]
CHOICES, BOXES = 3, 1000


@dataclass(frozen=True)
class Sizes:
    """Of one run: rows, tokens, and other axes by a word in their names. side: where rows are padded."""

    rows: int
    tokens: int
    side: Side = "none"
    named: Mapping[str, int] | None = None

    @property
    def words(self) -> str:
        padded = "" if self.side == "none" else f", padded on the {self.side}"
        return f"batch {self.rows}, length {self.tokens}{padded}"

    def doubled(self) -> "Sizes":
        """With images twice as high and as wide."""
        named = {
            name: size * (2 if name in ("height", "width") else 1) for name, size in (self.named or {}).items()
        }
        return replace(self, named=named)

    def axis(self, axis: int | str | None) -> int:
        """The size of an axis of a graph's input."""
        if isinstance(axis, int):
            return axis
        words = axis or ""
        for word, size in (self.named or {}).items():
            if word in words:
                return size
        if "batch" in words:
            return self.rows + ("image" in words)
        return CHOICES if "choice" in words else self.tokens


def mask_of(sizes: Sizes) -> torch.Tensor:
    """Ones, and zeros for padding: each row is shorter than the one before. (rows, tokens)"""
    if sizes.side == "none":
        return torch.ones(sizes.rows, sizes.tokens, dtype=torch.long)
    lengths = torch.tensor([max(2, sizes.tokens - 5 * i) if i else sizes.tokens for i in range(sizes.rows)])
    right = (torch.arange(sizes.tokens)[None] < lengths[:, None]).long()
    return right.flip(1) if sizes.side == "left" else right


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """As `generate` counts: the first token that is not padding has position 0."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def generator(*seeds: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(seeds).encode()))


class Ids:
    """Token ids of a model. tame: without special tokens, one end of text in each row."""

    def __init__(self, config: Any) -> None:
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        self.vocabulary = int(getattr(text, "vocab_size", None) or getattr(config, "vocab_size", 64) or 64)
        found = (getattr(c, f"{n}_token_id", None) for n in ("pad", "bos", "eos") for c in (text, config))
        flat = [x for f in found if f is not None for x in (f if isinstance(f, list | tuple) else [f])]
        self.special = list(dict.fromkeys(x for x in flat if 0 <= x < self.vocabulary))
        pad = getattr(text, "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) and 0 <= pad < self.vocabulary else 0
        end = getattr(text, "eos_token_id", None)
        self.end = end if isinstance(end, int) and 0 <= end < self.vocabulary else None
        others = (v for k, v in vars(config).items() if k.endswith(("_token_id", "_token_index")))
        self.avoided = {v for v in others if isinstance(v, int)} - set(self.special)  # of images

    def __call__(self, mask: torch.Tensor, seed: object, tame: bool = False) -> torch.Tensor:
        """Ids for a mask, (rows, tokens): random ones, special ones among them, padding where the mask is zero."""
        ids = torch.randint(0, self.vocabulary, tuple(mask.shape), generator=generator("ids", seed, *mask.shape))
        ids = torch.where(mask.bool(), ids, self.pad)
        for row, (own, seen) in enumerate(zip(ids, mask, strict=True)):
            places = seen.nonzero().flatten()
            for token in self.avoided | set(self.special if tame else ()):
                own[(own == token) & seen.bool()] = self._plain(token)
            if not tame and len(places) > 3 and self.special:
                own[places[1 + row % 2]] = self.special[row % len(self.special)]
            if self.end is not None and len(places):  # CLIP's text is read there
                own[places[-1]] = self.end
        return ids

    def unpadded(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids with no padding among them: M2M-100 counts positions by it, over all steps at once only."""
        return torch.where(ids == self.pad, self._plain(self.pad), ids)

    def _plain(self, token: int) -> int:
        taken = self.avoided | set(self.special)
        return (
            next((t for t in range(token + 1, token + 64) if t % self.vocabulary not in taken), 0) % self.vocabulary
        )


def value(of: GraphValue, sizes: Sizes, config: Any, seed: object, tame: bool) -> torch.Tensor:
    """A made-up value for an input of a graph, by its name, type and axes."""
    shape = [sizes.axis(axis) for axis in of.shape]
    random = generator(of.name, seed, *shape)
    if of.dtype.kind not in "iub":
        return torch.randn(shape, generator=random)
    mask = _mask(shape, sizes)
    if of.name.endswith(IDS):
        return Ids(config)(mask.reshape(-1, shape[-1]), (of.name, seed), tame).reshape(shape)
    if of.name in (MASK, ENCODER_MASK) or of.name.endswith("mask"):
        return mask
    if of.name == POSITIONS:
        return positions_of(mask)
    if of.name == TYPES:
        return torch.randint(0, max(1, getattr(config, "type_vocab_size", 2) or 1), shape, generator=random)
    if of.name == "bbox":
        edges = torch.randint(0, BOXES + 1, (*shape[:-1], 2, 2), generator=random).sort(-2).values
        return edges.flatten(-2)
    return torch.randint(0, 2, shape, generator=random)


def _mask(shape: list[int], sizes: Sizes) -> torch.Tensor:
    """Rows of different lengths along the last axis; an image is not masked."""
    if len(shape) < 2 or len(shape) > 3:
        return torch.ones(shape, dtype=torch.long)
    rows = shape[0] if len(shape) == 2 else shape[0] * shape[1]
    return mask_of(Sizes(rows, shape[-1], sizes.side)).reshape(shape)
