"""Perplexity on a running text: the one figure of a language model that everybody knows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_export.contracts import Perplexity
from lora_export.errors import InputError
from lora_export.validation.comparing.prompts import MAX_TOKENS
from lora_export.validation.effect.effect import as_perplexity, predicted, surprise

# Lincoln 1863, Darwin 1859, Austen 1813: long in the public domain, and of three registers.
BUILT_IN = Path(__file__).parents[1] / "texts" / "public_domain.txt"
LEAST_TOKENS = 32  # below, one unusual word decides the figure


def read_text(file: Path | None) -> str:
    """The built-in text, or a file's; InputError if that is missing, empty or not UTF-8."""
    if file is None:
        return BUILT_IN.read_text(encoding="utf-8")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the text cannot be read: {error.strerror}", where=file) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text is not UTF-8: {error}", where=file, expected="running text in UTF-8, such as a chapter"
        ) from None
    if not text.strip():
        raise InputError("the text is empty", where=file, expected="running text, a page or more")
    return text


def windows(
    tokenizer: Any, text: str, vocabulary: int, where: Path | None = None, longest: int = MAX_TOKENS
) -> list[torch.Tensor]:
    """The text's ids in pieces of at most `longest`, shape (length,); a piece of one token predicts none.

    vocabulary: how many ids the model knows. InputError if fewer than LEAST_TOKENS are left.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    ids = ids[ids < vocabulary]
    if len(ids) < LEAST_TOKENS:
        raise InputError(
            f"the text has {len(ids)} tokens, too few for a perplexity",
            where=where,
            expected=f"{LEAST_TOKENS} tokens or more; a page or more tells something",
        )
    return [piece for piece in torch.split(ids, longest) if len(piece) > 1]


def perplexity(
    name: str, logits: Callable[[torch.Tensor], torch.Tensor], pieces: Sequence[torch.Tensor]
) -> Perplexity:
    """exp of the mean negative log-likelihood, in float64. logits(ids): (length, vocabulary) of (length,) ids."""
    total = sum(surprise(torch.log_softmax(logits(ids).double(), -1), ids) for ids in pieces)
    return as_perplexity(name, total, predicted(pieces))
