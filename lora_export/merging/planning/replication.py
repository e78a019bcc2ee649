"""layer_replication: the merged model has more layers, made of the base's layers in an order of their own."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_export.contracts import Adapter
from lora_export.errors import AdapterError

# Where PEFT looks for the layers: model.layers, bert.encoder.layer, transformer.h, with or without a head.
_LAYER = re.compile(r"^((?:model\.|bert\.|transformer\.)*(?:layers|encoder\.layer|h)\.)(\d{1,6})(\..+)$")
MOST_LAYERS = 10_000  # [[0, 1000000000]] would fill the memory before the base is looked at
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


def layer_order(adapters: Sequence[Adapter]) -> list[int] | None:
    """The base's layer for each layer of the result, None without replication: [[0, 4], [2, 5]] → 0 1 2 3 2 3 4."""
    maps = [a.config.get("layer_replication") for a in adapters]
    if not any(maps):
        return None
    if any(m != maps[0] for m in maps):
        raise AdapterError(
            "two adapters replicate the layers differently",
            where=adapters[-1].folder,
            expected="one layer_replication",
        )
    ranges = maps[0]
    if not isinstance(ranges, list) or not all(_is_range(r) for r in ranges):
        raise AdapterError(
            f"layer_replication is {ranges!r}", where=adapters[0].folder, expected="pairs such as [[0, 4], [2, 5]]"
        )
    count = sum(end - start for start, end in ranges)
    if count > MOST_LAYERS:
        raise AdapterError(
            f"layer_replication makes {count} layers", where=adapters[0].folder, expected=f"at most {MOST_LAYERS}"
        )
    return [i for start, end in ranges for i in range(start, end)]


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        and 0 <= value[0] < value[1]
    )


def replicated_names(names: Iterable[str], order: Sequence[int], where: str) -> dict[str, str]:
    """Name in the result → name in the base."""
    result: dict[str, str] = {}
    layers: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        match = _LAYER.match(name)
        if match is None:
            result[name] = name
        else:
            layers.setdefault(int(match[2]), []).append((match[1], match[3]))
    missing = set(order) - layers.keys()
    if missing:
        raise AdapterError(
            f"layer_replication names the layer {max(missing)}, the base has {len(layers)}",
            where=where,
            expected="the base that the adapter was trained on",
        )
    for new, old in enumerate(order):
        for prefix, rest in layers[old]:
            result[f"{prefix}{new}{rest}"] = f"{prefix}{old}{rest}"
    return result


def config_changes(config: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The new number of layers, and every list that has one entry for each layer."""
    count = next((config[k] for k in _COUNTS if k in config), None)
    changes: dict[str, Any] = {k: len(order) for k in _COUNTS if k in config}
    for key, value in config.items():
        a_layer_each = isinstance(value, list) and len(value) == count and max(order) < len(value)
        if a_layer_each and key != "architectures":
            changes[key] = [value[i] for i in order]
    return changes
