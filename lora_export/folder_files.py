"""Files of a model's folder by their names: tokenizers, and what a training leaves behind; and the user's cache."""

import os
from collections.abc import Iterable
from pathlib import Path

# A reward model's last layer, which TRL, LLaMA-Factory and ms-swift read beside the weights under this very name.
VALUE_HEAD = "value_head.safetensors"
# What sentence-transformers reads beside the weights; modules.json names folders besides.
SENTENCE_MODULES = "modules.json"
SENTENCE = frozenset({SENTENCE_MODULES, "config_sentence_transformers.json", "sentence_bert_config.json"})
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
        "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    }
)  # fmt: skip
_WHOLE_TOKENIZERS = (
    {"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"}, {"vocab.txt"}, {"spiece.model"},
    {"sentencepiece.bpe.model"}, {"source.spm", "target.spm"},
)  # fmt: skip
_STATE = frozenset(
    {
        "trainer_state.json", "trainer_log.jsonl", "all_results.json", "train_results.json", "eval_results.json",
        "predict_results.json", "training_args.json", "args.json", "sft_args.json", "additional_config.json",
        "latest",
    }
)  # fmt: skip
_STATE_OF_LIBRARIES = ("optimizer", "scheduler", "rng_state", "scaler", "training_args", "random_states")


def is_adapters(name: str) -> bool:
    """Whether a file of this name belongs to an adapter, which a merge does not copy from its base."""
    return name.startswith("adapter_") or name == "adapters.safetensors" or name == VALUE_HEAD


def is_state(name: str) -> bool:
    """Whether it is a trainer's own: logs, arguments, and what it needs to resume."""
    return name in _STATE or name.startswith(_STATE_OF_LIBRARIES)


def is_whole_tokenizer(names: Iterable[str]) -> bool:
    """Whether all files of one tokenizer, of whichever library, are among these names."""
    present = set(names)
    return any(needed <= present for needed in _WHOLE_TOKENIZERS)


def user_cache() -> Path:
    """Where what is kept for this user lies."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lora-export"
