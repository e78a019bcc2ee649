"""A model of the first layers of another, in a folder of links: caches of thousands of tokens are small there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.storage import sealed

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_types")


def with_fewer_layers(model: Path, folder: Path) -> int:
    """Make `folder` of `model` with as many first layers as have one of each kind, two at least. How many.

    The weights are links to the files of `model`, whose other layers nobody reads.
    """
    config = sealed.read_json(model / "config.json", limit=sealed.LARGEST_SETTINGS)
    layers = _enough(config)
    for path in model.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    sealed.write_settings(folder / "config.json", _cut(config, layers))
    return layers


def _enough(config: Mapping[str, Any]) -> int:
    found = [2]
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for kinds in (part.get(key) for key in _KINDS):
            if isinstance(kinds, list) and kinds:
                found.append(max(kinds.index(kind) for kind in set(kinds)) + 1)
        pattern = part.get("sliding_window_pattern") or part.get("no_rope_layer_interval")
        found.append(pattern if isinstance(pattern, int) else 0)
    return max(found)


def _cut(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The configuration with `layers` layers, and lists of one entry a layer cut to that length."""
    counts = {k: v for k, v in config.items() if k in _COUNTS and isinstance(v, int)}
    whole = max(counts.values(), default=0)
    changed = dict(config)
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config"):
            changed[key] = _cut(value, layers)
        elif key in counts:
            changed[key] = min(value, layers)
        elif isinstance(value, list) and whole > 1 and len(value) == whole:
            changed[key] = value[:layers]
    return changed
