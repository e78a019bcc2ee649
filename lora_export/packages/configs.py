"""config.json and tokenizer_config.json that transformers 4.57 and 5 read alike.

transformers 5 writes the rotary embedding as `rope_parameters` and names its own tokenizer class; 4.57 takes the
first for the default theta without a word, and stops at the second. Both spellings beside each other mend it: each
version reads its own.
"""

from collections.abc import Mapping
from typing import Any

_OURS = "TokenizersBackend"
_THEIRS = "PreTrainedTokenizerFast"
_INPUTS = ("input_ids", "attention_mask")  # what the class of transformers 5 gives where the file says nothing
# rope_parameters by layer type → the legacy keys of ModernBERT and of Gemma 3.
_LOCAL = {"modernbert": "local_rope_theta", "gemma3_text": "rope_local_base_freq", "gemma3": "rope_local_base_freq"}
_GLOBAL = {"modernbert": "global_rope_theta"}


def for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the legacy spelling beside the new one, in nested configurations too.

    Values that are there already stay as they are.
    """
    found = {k: for_both(v) if k.endswith("_config") and isinstance(v, dict) else v for k, v in config.items()}
    legacy = _legacy_rope(found)
    if isinstance(found.get("dtype"), str):
        legacy["torch_dtype"] = found["dtype"]
    return found | {k: v for k, v in legacy.items() if k not in found}


def _legacy_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    kind = str(config.get("model_type"))
    if "rope_type" in rope or "rope_theta" in rope:
        return _one(rope, "rope_theta")
    legacy: dict[str, Any] = {}
    if isinstance(rope.get("full_attention"), dict):
        legacy |= _one(rope["full_attention"], _GLOBAL.get(kind, "rope_theta"))
    local = rope.get("sliding_attention")
    if isinstance(local, dict) and kind in _LOCAL:
        legacy[_LOCAL[kind]] = local.get("rope_theta")
    return legacy


def _one(rope: Mapping[str, Any], theta: str) -> dict[str, Any]:
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    legacy = {theta: rope["rope_theta"]} if "rope_theta" in rope else {}
    if "partial_rotary_factor" in rope:
        legacy["partial_rotary_factor"] = rope["partial_rotary_factor"]
    plain = scaling.get("rope_type", "default") == "default"
    return legacy | {"rope_scaling": None if plain else scaling}


def tokenizer_for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that names a class both know, and without where the tokenizer once lay."""
    found = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only")}
    if found.get("tokenizer_class") == _OURS:
        found["tokenizer_class"] = _THEIRS
        found.setdefault("model_input_names", list(_INPUTS))  # 4.57's own default has token_type_ids
    extra = found.get("extra_special_tokens")
    if isinstance(extra, list):  # 4.57 wants a name for each, and had this for tokens without one
        del found["extra_special_tokens"]
        found.setdefault("additional_special_tokens", extra)
    return found
