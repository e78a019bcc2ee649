"""Configuration, tokenizer and chat template: copied byte for byte; in config.json only necessary keys change."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_export.folder_files import SENTENCE_MODULES, TOKENIZER_FILES, is_adapters, is_state, is_whole_tokenizer
from lora_export.storage.sealed import copy, refuse_outward_link, write_settings

WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".data"}
)
# config.json is written anew; the others describe an earlier merge, and codes that are now weights.
NOT_KEPT = frozenset({"config.json", "lora_export_certificate.json", "quanto_qmap.json"})
# Code and training runs are not part of the model; an index belongs to shards that are written anew.
SKIPPED_SUFFIXES = WEIGHT_SUFFIXES | {
    ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".node", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".lock",
}  # fmt: skip


def companion_files(folder: Path) -> list[Path]:
    """The files beside the weights that a user of the model needs, except config.json."""
    return _own(
        p
        for p in sorted(folder.iterdir())
        if p.is_file()
        and not p.name.startswith(".")
        and p.suffix not in SKIPPED_SUFFIXES
        and not p.name.endswith(".index.json")
        and not is_adapters(p.name)
        and not is_state(p.name)
        and p.name not in NOT_KEPT
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files in a folder, if they are a whole tokenizer; else only its chat template."""
    files = _own(p for p in sorted(folder.iterdir()) if p.name in TOKENIZER_FILES and p.is_file())
    return files if has_tokenizer(folder) else [p for p in files if p.name.startswith("chat_template")]


def _own(paths: Iterable[Path]) -> list[Path]:
    """The same paths; InputError for a link that leads out of their folder."""
    files = list(paths)
    for path in files:
        refuse_outward_link(path)
    return files


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has all files of one tokenizer, of whichever library."""
    return folder.is_dir() and is_whole_tokenizer(p.name for p in folder.iterdir())


def copy_subfolders(folder: Path, target: Path) -> None:
    """Copy the folders that sentence-transformers' modules.json names (1_Pooling/…)."""
    for path in module_files(folder):
        (target / path.parent.name).mkdir(exist_ok=True)
        copy(path, target / path.parent.name / path.name, folder)


def module_files(folder: Path) -> list[Path]:
    """Settings and weights of sentence-transformers' modules. InputError for a link that leads out of `folder`."""
    if not (folder / SENTENCE_MODULES).is_file():
        return []
    files = [p for p in sorted(folder.glob("*/*")) if p.suffix == ".json" or p.name == "model.safetensors"]
    files = [p for p in files if not p.parent.name.startswith(".")]
    for path in files:
        refuse_outward_link(path, folder)
    return [p for p in files if p.is_file()]


def pickled_modules(folder: Path) -> list[str]:
    """Weights of such modules that are not copied, because a pickle can run code."""
    if not (folder / SENTENCE_MODULES).is_file():
        return []
    return [p.relative_to(folder).as_posix() for p in sorted(folder.glob("*/pytorch_model.bin")) if p.is_file()]


def copy_files(files: list[Path], target: Path) -> None:
    """Copy contents only: the new files get the mode of the umask, and a link becomes a file."""
    for path in files:
        copy(path, target / path.name)


def write_config(
    source: Path, target: Path, config: Mapping[str, Any], changes: Mapping[str, Any], removals: frozenset[str]
) -> None:
    """Copy config.json, which holds `config`, with some keys set or removed; without a change, byte for byte.

    removals: keys; for one inside a part of the configuration, the keys on the way to it, joined by dots.
    """
    wanted = _without(config, removals) | dict(changes)
    if wanted == config:
        copy(source, target)
    else:
        write_settings(target, wanted)


def _without(config: Mapping[str, Any], removals: Iterable[str]) -> dict[str, Any]:
    kept = {k: v for k, v in config.items() if k not in removals}
    for key, value in kept.items():
        inner = [r.removeprefix(f"{key}.") for r in removals if r.startswith(f"{key}.")]
        if inner and isinstance(value, dict):
            kept[key] = _without(value, inner)
    return kept
