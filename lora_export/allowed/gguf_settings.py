"""GGUF files: which settings may stand before the weights, and which tensors an adapter may have.

llama.cpp runs no code of a file. It reads what a setting names, and shows what it says.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from lora_export.errors import CheckpointError

_KEY = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_-]+)+", re.ASCII)
_ROOMS = ("general", "tokenizer", "adapter")  # and that of the architecture
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)
_MATRICES = (".lora_a", ".lora_b")
_TYPES = ("model", "adapter")


def check_gguf(settings: Mapping[str, object], tensors: Collection[str], where: Path, adapter: bool) -> None:
    """CheckpointError for a setting of no known room, or a file of another kind than its name says.

    settings: numbers and strings before the weights; adapter: whether a LoRA is expected.
    """
    architecture = settings.get("general.architecture")
    if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
        raise CheckpointError(f"general.architecture is {architecture!r}", where=where, expected="a name")
    for key in settings:
        if not _KEY.fullmatch(key) or key.partition(".")[0] not in (*_ROOMS, architecture):
            raise CheckpointError(
                f"the GGUF file has the setting {key!r}, which is not on the list",
                where=where,
                expected=f"{', '.join(f'{room}.…' for room in (*_ROOMS, architecture))}",
            )
    kind = settings.get("general.type", "model")
    if kind not in _TYPES or (kind == "adapter") is not adapter:
        raise CheckpointError(f"general.type is {kind!r}", where=where, expected="adapter" if adapter else "model")
    lora = [n for n in tensors if n.endswith(_MATRICES)]
    if len(lora) != (len(tensors) if adapter else 0) or not tensors:
        raise CheckpointError(
            f"{len(lora)} of {len(tensors)} tensors are matrices of a LoRA",
            where=where,
            expected="all of an adapter's, and none of a model's",
        )
