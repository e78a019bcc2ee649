"""Whether a merged folder would have every weight that its class needs: transformers draws others at random.

To ask the class takes seconds, most of a merge's time. So it is asked where names alone raise a suspicion: layers
that lack what the other layers have, fewer layers than the configuration says, a class with a head and no tensor
beside the body's.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lora_export.checkpoint.reader import Checkpoint
from lora_export.errors import CheckpointError
from lora_export.merging.architecture.model import architecture_of
from lora_export.merging.architecture.pieces import Shape
from lora_export.sentence_modules import embeds

# A layer on top of a body that few callers read, and that many checkpoints lack.
_OPTIONAL = "pooler"
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_EMBEDDINGS = ("emb", "wte", "shared")
_OF_A_LIST = re.compile(r"(.+?)\.(\d+)\.(.+)")


def refuse_incomplete(base: Checkpoint, outputs: Mapping[str, Shape], changes: Mapping[str, Any]) -> list[str]:
    """CheckpointError for a weight that neither the base nor an adapter has.

    outputs: shapes of the merged folder's tensors; changes: of its config.json. A class that transformers cannot
    build is not asked. Where most weights are missing, the folder is a part of a model, made as one: a warning says
    so, and `export` refuses it.
    """
    if "_class_name" in base.config:  # of diffusers: no adapter brings it another class, nor takes weights away
        return []
    if embeds(base.folder):  # stored as a language model, often, and loaded as its body alone
        changes = {**changes, "architectures": ["AutoModel"]}
    config = {**base.config, **changes}
    if not any(_suspicions(outputs.keys(), config)):
        return []
    known = architecture_of(base, changes)
    if known is None:
        return []
    missing = [n for n in known.unfilled(known.loaded(outputs)) if _OPTIONAL not in n.split(".")]
    if not missing:
        return []
    if len(missing) > len(outputs):
        return [
            f"the base is a part of a {known.name}: it lacks {len(missing)} of the weights, such as {missing[0]}"
        ]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise CheckpointError(
        f"the base lacks weights of a {known.name}, which transformers would draw at random: {missing[0]}{more}",
        where=base.folder,
        tensor=missing[0],
        expected="every weight of the merged model in the base or in the adapter",
        next_step="download the base again, or name the class that it was saved from in its config.json",
    )


def _suspicions(names: Collection[str], config: Mapping[str, Any]) -> Iterator[bool]:
    layers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        match = _OF_A_LIST.fullmatch(name)
        if match:
            layers[match[1]][int(match[2])].add(match[3])
    for of_list in layers.values():
        counts: dict[str, int] = defaultdict(int)
        for own in of_list.values():
            for rest in own:
                counts[rest] += 1
        # What a minority of the layers has is another kind of layer's.
        yield any(len(of_list) > count >= len(of_list) / 2 for count in counts.values())
        yield max(of_list) + 1 != len(of_list)
    longest = max((len(of_list) for of_list in layers.values()), default=0)
    wanted = next((config[key] for key in _COUNTS if isinstance(config.get(key), int)), 0)
    yield longest < wanted
    yield not any(word in name for name in names for word in _EMBEDDINGS)
    yield _without_head(names, config)


def _without_head(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether a class with a head, which is not the embeddings once more, has one module alone."""
    architecture = (config.get("architectures") or [""])[0]
    if "For" not in architecture or config.get("tie_word_embeddings"):
        return False
    return len({name.partition(".")[0] for name in names}) == 1
