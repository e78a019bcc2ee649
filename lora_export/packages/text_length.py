"""How many tokens of a text a model reads, as its configurations have it, and tokenizers that say so.

transformers writes "no limit" as 10^30. Others read that as an integer of 64 bits and fail (onnxruntime-genai), or
take no tokenizer without a limit (fastembed).
"""

from collections.abc import Mapping
from typing import Any

_LIMIT = "model_max_length"
_ENDLESS = 2**31  # no text is this long: transformers also writes 10^20
# n_positions only of these: T5 has it too, and no table of positions.
_COUNTED = ("gpt2", "gptj", "codegen", "openai-gpt", "ctrl", "gpt_bigcode")
_LENGTHS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_target_positions")
# Their positions begin behind that of the padding token, so that the table has rows that no text reaches.
_BEHIND_PADDING = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod", "mpnet", "longformer",
    "data2vec-text", "ibert", "luke", "lilt", "layoutlmv3", "markuplm", "esm",
)  # fmt: skip


def most_tokens(config: Mapping[str, Any], sentence: Mapping[str, Any]) -> int | None:
    """How many tokens of a text are read; None if neither file says it.

    config: config.json; sentence: sentence_bert_config.json, or {}. A rope that is stretched counts with its
    factor: some configurations keep the length from before, and no text may be cut that the model reads.
    """
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    kind = str(text.get("model_type"))
    names = (*_LENGTHS, "n_positions") if kind in _COUNTED else _LENGTHS
    known = next((n for n in (_whole(text.get(name)) for name in names) if n), None)
    if known is not None:
        behind = int(text.get("pad_token_id") or 1) + 1 if kind in _BEHIND_PADDING else 0
        known = max(known - behind, _stretched(text, known))
    said = [n for n in (known, _whole(sentence.get("max_seq_length"))) if n]
    return min(said, default=None)


def _stretched(config: Mapping[str, Any], length: int) -> int:
    """Positions of a rope that is stretched; 0 for another. Those by layer type are within the stated length."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if isinstance(rope, Mapping) and isinstance(rope.get("factor"), int | float):
            return int(rope["factor"] * (_whole(rope.get("original_max_position_embeddings")) or length))
    return 0


def _whole(value: Any) -> int | None:
    """A length, if this is one: neither null, nor 0, nor endless."""
    plain = isinstance(value, int) and not isinstance(value, bool)
    return value if plain and 0 < value < _ENDLESS else None


def bounded(tokenizer: Mapping[str, Any], most: int | None) -> dict[str, Any]:
    """tokenizer_config.json with the limit `most` where it states none.

    Without `most` the key is left out: that means "no limit" to every reader. A limit that is stated stays.
    """
    if _whole(tokenizer.get(_LIMIT)):
        return dict(tokenizer)
    free = {k: v for k, v in tokenizer.items() if k != _LIMIT}
    return free if most is None else free | {_LIMIT: most}
