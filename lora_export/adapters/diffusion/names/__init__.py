"""Spellings of a component's modules: its own names, and those of the repository that it came from.

A file a family. Every spelling is looked up in a table made from the names of the base's own tensors: names contain
underscores themselves, so none can be computed back from a flattened one.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from types import ModuleType

from lora_export.adapters.diffusion.names import (
    auraflow,
    clip,
    cosmos,
    flux,
    flux2,
    hunyuan,
    language,
    ltx,
    lumina,
    mochi,
    plain,
    sana,
    sd3,
    t5,
    unet,
    wan,
)
from lora_export.adapters.diffusion.names.tables import Base, Spelling, Table
from lora_export.contracts import Component

# Each names its CLASSES (of diffusers or transformers) and gives spellings(base).
FAMILIES: tuple[ModuleType, ...] = (
    unet, sd3, flux, flux2, wan, hunyuan, lumina, ltx, mochi, sana, auraflow, cosmos, clip, t5, language,
)  # fmt: skip


def table(component: Component, shapes: Mapping[str, tuple[int, ...]]) -> Table:
    """All spellings of a component. shapes: of its tensors, by their names."""
    base = Base(component.class_name, component.config, shapes)
    families = [f for f in FAMILIES if component.class_name in f.CLASSES]
    spellings = chain(plain.spellings(base), *(f.spellings(base) for f in families))
    aliases = chain(plain.aliases(base), *(_aliases(f)(base) for f in families))
    return Table(spellings, aliases)


def _aliases(family: ModuleType) -> Callable[[Base], Iterator[Spelling]]:
    return getattr(family, "aliases", lambda base: iter(()))
