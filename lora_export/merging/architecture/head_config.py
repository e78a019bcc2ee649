"""What config.json says of a new head: the class, and the names of its labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_export import tasks
from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import Adapter
from lora_export.merging.architecture.outline import Outline
from lora_export.storage.sealed import LARGEST_SETTINGS, read_json

_LABELLED = ("Classification", "ClassificationWithTeacher", "Segmentation")


def labels_of(new: Outline) -> int | None:
    """How many labels the class has with its configuration; None for a class without labels."""
    return int(new.model.config.num_labels) if new.name.endswith(_LABELLED) else None


def head_config(
    base: Checkpoint, new: Outline, changes: Mapping[str, Any], adapters: Sequence[Adapter]
) -> tuple[dict[str, Any], list[str]]:
    """(the keys of config.json that change, warnings). changes: those without which the head would not fit.

    Names of labels are those of a config.json beside the adapter, or the base's if there are as many.
    """
    found: dict[str, Any] = {"architectures": [new.name], **changes}
    warnings, labels = [], labels_of(new)
    if labels is not None:
        own = next((n for n in (_names(_beside(a), labels) for a in adapters) if n), None)
        if own:
            found |= tasks.with_labels(base.config, labels, own)
        elif labels > 1 and not _names(base.config, labels):
            warnings.append(
                f"what the labels are called is in no file of the adapter: LABEL_0 … LABEL_{labels - 1}; "
                "id2label and label2id of config.json hold the names"
            )
    if "score.weight" in new.shapes and base.config.get("pad_token_id") is None:
        warnings.append(
            f"config.json has no pad_token_id: a {new.name} refuses more than one text at a time without it; "
            "set it to the one of the training"
        )
    return {k: v for k, v in found.items() if base.config.get(k) != v}, warnings


def _beside(adapter: Adapter) -> Mapping[str, Any]:
    path = adapter.folder / "config.json"
    return read_json(path, limit=LARGEST_SETTINGS) if path.is_file() else {}


def _names(config: Mapping[str, Any], count: int) -> dict[int, str] | None:
    """Label → name, if the configuration has exactly so many, each with a name of its own."""
    names = config.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(count)}:
        return None
    found = {int(i): name for i, name in names.items() if isinstance(name, str)}
    return found if len(set(found.values())) == count else None
