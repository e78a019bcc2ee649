"""Which files are a tokenizer, of whichever library."""

from collections.abc import Iterable

FILES = frozenset(
    {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
        "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    }
)  # fmt: skip
_COMPLETE = (
    {"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"}, {"vocab.txt"}, {"spiece.model"},
    {"sentencepiece.bpe.model"}, {"source.spm", "target.spm"},
)  # fmt: skip


def complete(names: Iterable[str]) -> bool:
    """Whether all files of one tokenizer are among these names."""
    present = set(names)
    return any(needed <= present for needed in _COMPLETE)
