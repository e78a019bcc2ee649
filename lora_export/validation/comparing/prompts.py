"""The texts on which models are compared."""

from pathlib import Path

from lora_export.errors import InputError

# Different registers, lengths and scripts, because a fault may show in one only. From works long in the public
# domain (Lincoln 1862, Austen 1813, Darwin 1859) or written for this list.
BUILT_IN = (
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
MAX_TOKENS = 512


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """The built-in prompts, or one prompt a line of a UTF-8 text file (blank lines skipped)."""
    if file is None:
        return BUILT_IN
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"the prompts cannot be read: {error.strerror}", where=file) from None
    except UnicodeDecodeError as error:
        raise InputError(f"the prompts are not UTF-8 text: {error}", where=file) from None
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise InputError("the file holds no prompt", where=file, expected="one prompt a line")
    return prompts
