"""Tied embeddings: when an adapter changes only one of the pair, the merged model has to untie them."""

from collections.abc import Mapping, Sequence

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging.names import INPUT_EMBEDDINGS, OUTPUT_HEADS, stored_pair, tied_pair

EMBEDDING_NAMES = frozenset({n.split(".")[-2] for n in INPUT_EMBEDDINGS})
_TIED_HEADS = ("MaskedLM", "PreTraining", "ConditionalGeneration", "LMHead", "CausalLM")


def pair_to_untie(
    base: Checkpoint, weights: Mapping[str, object], targets: Mapping[str, Sequence[TargetUpdate]]
) -> tuple[str, str] | None:
    """(embedding, head) if the adapter changes one of a tied pair: PEFT's forward changes only that one."""
    # A head may be stored although the config ties it: then the two are still one until the config says otherwise.
    pair = tied_pair(weights) or stored_pair(weights)
    if not base.config.get("tie_word_embeddings", True):
        return None
    if pair is None or not _is_language_model(base):
        _refuse_hidden_tie(base, weights, targets)
        return None
    alone = any(not u.tied for u in targets.get(pair[0], ()))
    return pair if alone or pair[1] in targets else None


def _refuse_hidden_tie(
    base: Checkpoint, weights: Mapping[str, object], targets: Mapping[str, Sequence[TargetUpdate]]
) -> None:
    """Refuse to change an embedding that shares its weight with an output this tool cannot give its own."""
    architecture = (base.config.get("architectures") or [""])[0]
    if not any(head in architecture for head in _TIED_HEADS) or any(w.endswith(OUTPUT_HEADS) for w in weights):
        return
    for name, updates in targets.items():
        is_embedding = name.endswith(".weight") and name.split(".")[-2] in EMBEDDING_NAMES
        if is_embedding and any(not u.tied for u in updates):
            raise AdapterError(
                f"the adapter changes an embedding whose weight {architecture} also uses for its output",
                where=base.folder,
                tensor=name,
                expected="an adapter that leaves the tied embedding alone, or a base without tied weights",
                next_step="serve it unmerged with PEFT",
            )


def _is_language_model(base: Checkpoint) -> bool:
    return any("LMHead" in a or "CausalLM" in a for a in base.config.get("architectures") or ())
