"""The texts on which models are compared: prompts, and running text for perplexities."""

from pathlib import Path
from typing import Any

import torch

from lora_export.errors import InputError

# Different registers, lengths and scripts, because a fault may show in one only. From works long in the public
# domain (Lincoln 1862, Austen 1813, Darwin 1859) or written for this list.
PROMPTS = (
    "The capital of France is",
    "Fellow-Citizens of the Senate and House of Representatives: Since your last annual assembling another year "
    "of health and bountiful harvests has passed; and while it has not pleased the Almighty to bless us with a "
    "return of peace, we can but press on, guided by the best light He gives us, trusting that in His own good "
    "time and wise way all will yet be well.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want "
    "of a wife. However little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered "
    "as the rightful property of some one or other of their daughters.",
    "def fib(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "Wer reitet so spät durch Nacht und Wind? Es ist der Vater mit seinem Kind.",
    "There is grandeur in this view of life, with its several powers, having been originally breathed into a few "
    "forms or into one; and that, whilst this planet has gone cycling on according to the fixed law of gravity, "
    "from so simple a beginning endless forms most beautiful and most wonderful have been, and are being, evolved.",
)
# Lincoln 1863, Darwin 1859, Austen 1813: long in the public domain, and of three registers.
RUNNING_TEXT = Path(__file__).parents[1] / "texts" / "public_domain.txt"
MAX_TOKENS = 512
LEAST_TOKENS = 32  # below, one unusual word decides the perplexity


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """The built-in prompts, or one prompt a line of a UTF-8 text file (blank lines skipped)."""
    if file is None:
        return PROMPTS
    prompts = tuple(line for line in _read(file, "prompts").splitlines() if line.strip())
    if not prompts:
        raise InputError("the file holds no prompt", where=file, expected="one prompt a line")
    return prompts


def read_text(file: Path | None) -> str:
    """The built-in text, or a file's; InputError if that is missing, empty or not UTF-8."""
    text = _read(file or RUNNING_TEXT, "text")
    if not text.strip():
        raise InputError("the text is empty", where=file, expected="running text, a page or more")
    return text


def _read(file: Path, what: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the {what}: {error.strerror}", where=file) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"the file with the {what} is not UTF-8: {error}", where=file, expected="plain text in UTF-8"
        ) from None


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
            expected=f"at least {LEAST_TOKENS} tokens; a page or more is better",
        )
    return [piece for piece in torch.split(ids, longest) if len(piece) > 1]


def tokenize(tokenizer: Any, prompts: tuple[str, ...], vocabulary: int) -> list[torch.Tensor]:
    """Ids of each prompt, shape (length,), at least two and at most MAX_TOKENS of them."""
    tokens = []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")["input_ids"][0]
        ids = ids[ids < vocabulary]
        if len(ids) >= 2:
            tokens.append(ids)
    return tokens
