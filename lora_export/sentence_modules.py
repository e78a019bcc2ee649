"""modules.json of sentence-transformers: what makes one embedding of a transformer's states, and where it lies.

Each entry names a class and a folder beside the weights, with the class's config.json and, if it has any,
model.safetensors (sentence-transformers, `Module.save`). An entry with the path "" is the transformer itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.allowed.fields import read as read_fields
from lora_export.allowed.hub import check_modules
from lora_export.errors import CheckpointError
from lora_export.folder_files import SENTENCE_MODULES
from lora_export.storage.sealed import read_json

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
POOLING = "Pooling"
_WEIGHTED = ("Dense", "LayerNorm")
# pooling_mode_… of config.json → the mode, in the order in which several are joined.
MODES = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class SentenceModule:
    """kind: the class without its package; path: its folder, "" for the model's own; settings: its config.json."""

    kind: str
    path: str
    settings: Mapping[str, Any]

    def weight(self, name: str) -> str:
        """The name that one of its weights has among those of the model."""
        return f"{self.path}.{name}"

    @property
    def modes(self) -> tuple[str, ...]:
        """Of a Pooling: what it takes of the states, in the order in which it joins them."""
        own = self.settings.get("pooling_mode")
        if own is not None:
            return (own,) if isinstance(own, str) else tuple(own)
        return tuple(m for key, m in MODES.items() if self.settings.get(f"pooling_mode_{key}")) or ("mean",)


def modules_of(folder: Path) -> tuple[SentenceModule, ...]:
    """The modules in order, none without a modules.json. InputError or CheckpointError for a damaged one."""
    path = folder / SENTENCE_MODULES
    if not path.is_file():
        return ()
    entries = read_fields(path)
    check_modules(entries, path)
    return tuple(
        SentenceModule(entry["type"].rpartition(".")[2], entry["path"], _settings(folder, entry["path"]))
        for entry in entries
    )


def pools(modules: Iterable[SentenceModule]) -> bool:
    """Whether a graph can pool as they do. It is not told where a prompt ends, which some leave out."""
    poolings = [m for m in modules if m.kind == POOLING]
    return bool(poolings) and all(m.settings.get("include_prompt", True) for m in poolings)


def embeds(folder: Path) -> bool:
    """Whether the folder's modules pool the states of its transformer, so that it is an embedder, whatever class
    its config.json names."""
    return any(module.kind == POOLING for module in modules_of(folder))


def weight_files(folder: Path) -> dict[str, Path]:
    """Path of a module → the file of its weights. CheckpointError for weights that are only pickled."""
    files = {}
    for module in modules_of(folder):
        home = folder / module.path
        if module.path and (home / WEIGHTS).is_file():
            files[module.path] = home / WEIGHTS
        elif module.path and (home / PICKLED).is_file():
            raise CheckpointError(
                f"the weights of {module.path} are pickled, which can run code when they are loaded",
                where=home / PICKLED,
                expected=f"{module.path}/{WEIGHTS}",
                next_step="load the model with sentence-transformers where you trust it, and save it again",
            )
    return files


def without_weights(folder: Path) -> str | None:
    """The first module whose weights are not there; None where all are."""
    files = weight_files(folder)
    return next((m.path for m in modules_of(folder) if m.kind in _WEIGHTED and m.path not in files), None)


def _settings(folder: Path, path: str) -> dict[str, Any]:
    file = folder / path / "config.json"
    return read_json(file) if path and file.is_file() else {}
