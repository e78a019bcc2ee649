"""The transformers model without weights that a config.json describes, and which layers are stored transposed."""

import tempfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from lora_export.errors import CheckpointError
from lora_export.storage.sealed import LARGEST_SETTINGS, read_json, write_settings

_MOST_LAYERS = 1000
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_LAYERS = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def is_conv1d(model_types: Set[str], module: str) -> bool:
    """Whether a layer of such a model is a Conv1D, whose weight is stored (in, out).

    model_types: every model_type in the configuration; module: the layer's name.
    """
    return bool(model_types & _CONV1D_MODELS) and module.rpartition(".")[2] in _CONV1D_LAYERS


def build(folder: Path, config: Mapping[str, Any] | None = None) -> Any:
    """The model that config.json in `folder` describes, on the meta device; CheckpointError if there is none.

    config: used instead of the contents of config.json, where a merge changes them.
    """
    try:
        if config is None or dict(config) == read_json(folder / "config.json", limit=LARGEST_SETTINGS):
            return _build(folder)
        with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
            write_settings(Path(scratch) / "config.json", dict(config))
            return _build(Path(scratch))
    except Exception as error:  # a configuration can make transformers raise anything
        raise CheckpointError(
            f"transformers cannot build the model that this describes: {error or type(error).__name__}",
            where=folder / "config.json",
            expected="a configuration that transformers itself understands",
        ) from error


def parameter_names(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The parameters of that model in the order in which its modules define them; none if it cannot be built."""
    try:
        model = build(folder, config)
    except (CheckpointError, ImportError):
        return ()
    return tuple(name for name, _ in model.named_parameters(remove_duplicate=False))


def _build(folder: Path) -> Any:
    import torch
    import transformers

    settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    for key, value in _settings(settings.to_dict()):
        if "layer" in key and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"{key} is {value}, which would take hours to build")
    name = (settings.architectures or ["AutoModel"])[0]
    architecture = getattr(transformers, name, None)
    if architecture is transformers.AutoModel:  # what from_pretrained makes where no architecture is named
        architecture = transformers.MODEL_MAPPING[type(settings)]
    if architecture is None:
        raise ValueError(f"transformers has no {name}")
    with torch.device("meta"):  # buffers too: they may be as large as a configuration likes
        model = architecture(settings)
    model.tie_weights()
    return model


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _settings(value)
