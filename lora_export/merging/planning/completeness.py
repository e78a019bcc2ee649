"""Whether a merged folder would have every weight that its class needs: transformers draws others at random."""

from collections.abc import Mapping
from typing import Any

from lora_export.checkpoint.reader import Checkpoint
from lora_export.errors import CheckpointError
from lora_export.merging.architecture.model import architecture_of
from lora_export.merging.architecture.pieces import Shape

# Layers on top of a body that few callers read, and that many checkpoints lack.
_OPTIONAL = "pooler"


def refuse_incomplete(base: Checkpoint, outputs: Mapping[str, Shape], changes: Mapping[str, Any]) -> None:
    """CheckpointError for a weight that neither the base nor an adapter has.

    outputs: shapes of the merged folder's tensors; changes: of its config.json. A class that transformers cannot
    build is not asked.
    """
    known = architecture_of(base, changes)
    if known is None:
        return
    missing = [n for n in known.unfilled(known.loaded(outputs)) if _OPTIONAL not in n.split(".")]
    if not missing:
        return
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise CheckpointError(
        f"the base lacks weights that a {known.name} needs and transformers would draw at random: {missing[0]}{more}",
        where=base.folder,
        tensor=missing[0],
        expected="every weight of the merged model in the base or in the adapter",
        next_step="download the base again, or name the class that it was saved from in its config.json",
    )
