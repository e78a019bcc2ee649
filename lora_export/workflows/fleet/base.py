"""The base of many rows: whether a row can share one, and its preparation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_export.checkpoint.adapter_files import CONFIG, WEIGHTS, open_adapter_files
from lora_export.checkpoint.header import header_bytes
from lora_export.checkpoint.pipeline import is_pipeline
from lora_export.contracts import AdapterChoice, StoryOptions
from lora_export.contracts.fleet import FleetRow
from lora_export.errors import LoraExportError
from lora_export.folder_files import VALUE_HEAD
from lora_export.storage.sealed import LARGEST_SETTINGS, read_json
from lora_export.workflows.shared_base import why_not_exported_alike, why_other_modules

# Parts of tensor names: what changes a vocabulary, of which a tied head is a part; and modules trained whole.
_VOCABULARY = (
    b"embed_tokens", b"lm_head", b".wte.", b"embed_in", b"embed_out", b"word_embeddings", b"shared.",
    b"tok_embeddings", b"token_adapter", b"lora_embedding_", b"trainable_tokens",
)  # fmt: skip
_WHOLE = (b"modules_to_save", b"original_module")
_OTHER_GRAPH = {
    "layer_replication": "the adapter repeats layers, so its graph is not the base's",
    "trainable_token_indices": "the adapter trains tokens of the vocabulary",
    "modules_to_save": "the adapter brings modules that were trained whole",
}


def why_alone(row: FleetRow, base_folder: Path, adapters: Sequence[AdapterChoice]) -> str:
    """Why the row cannot share its base's export, reference and benchmark; "" where it can.

    From options, names and headers alone. A row that shares says again by its plan whether it may.
    """
    if is_pipeline(base_folder):
        return "a pipeline of images has no part of which all rows could take one export"
    return _by_options(row.options, base_folder) or _by_adapters(base_folder, adapters)


def _by_options(options: StoryOptions, base: Path) -> str:
    if reason := why_not_exported_alike(options, base):
        return reason
    if options.extra_arms:
        return f"--arm {options.extra_arms[0]} measures this adapter outside of the weights"
    if options.merge.combine != "none":
        return f"--combine {options.merge.combine}: the reference is made of all adapters together"
    return ""


def _by_adapters(base: Path, adapters: Sequence[AdapterChoice]) -> str:
    if len(adapters) != 1:
        return f"{len(adapters)} adapters, of which one after the other is the reference"
    folder = adapters[0].folder
    try:
        config, names = _headers(folder)
    except (LoraExportError, OSError) as error:
        return f"the adapter is refused: {getattr(error, 'found', error)}"
    if reason := why_other_modules(base, adapters):
        return reason
    if (folder / VALUE_HEAD).is_file():
        return "the adapter brings a trained head"
    for name, reason in _OTHER_GRAPH.items():
        if config.get(name):
            return reason
    if any(part in names for part in _WHOLE):
        return _OTHER_GRAPH["modules_to_save"]
    changed = next((part.decode().strip(".") for part in _VOCABULARY if part in names), "")
    return f"the adapter changes {changed}: vocabulary and tied heads are a part of the graph" if changed else ""


def _headers(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The configuration of an adapter, and its header without the cost of checking every entry of it."""
    if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
        return read_json(folder / CONFIG, limit=LARGEST_SETTINGS), header_bytes(folder / WEIGHTS)
    config, tensors = open_adapter_files(folder)
    return config, "\n".join(tensors.tensors).encode()
