"""T5's encoder: its own names, and the second name of its embedding."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import Base, Spelling

CLASSES = frozenset({"T5EncoderModel", "UMT5EncoderModel", "MT5EncoderModel"})


def spellings(base: Base) -> Iterator[Spelling]:
    names = {"encoder.embed_tokens": "shared", "shared": "encoder.embed_tokens"}
    yield from base.table({k: v for k, v in names.items() if not base.has(k)})
