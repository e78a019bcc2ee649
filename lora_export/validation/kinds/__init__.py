"""Which kind of model is validated how. Exactly one kind matches a model; a new one is a file and a line here."""

from typing import Any, Protocol

from lora_export.errors import InputError
from lora_export.validation.comparing.subject import Story, Subject, takes
from lora_export.validation.kinds import audio, decoder, pair, seq2seq, text, vision

__all__ = ["KINDS", "Kind", "Story", "Subject", "choose"]


class Kind(Protocol):
    """NAME: for a person; matches: whether a transformers model is of this kind; story: how it is compared."""

    NAME: str

    def matches(self, model: Any) -> bool: ...

    def story(self, subject: Subject) -> Story: ...


KINDS: tuple[Kind, ...] = (decoder, seq2seq, text, vision, audio, pair)


def choose(model: Any) -> Kind:
    """The kind of a transformers model; InputError where none or several match."""
    found = [k for k in KINDS if k.matches(model)]
    if len(found) != 1:
        several = f" ({' and '.join(k.NAME for k in found)})" if found else ""
        raise InputError(
            f"{type(model).__name__} is {'of several kinds' if found else 'of no kind'} that validation knows"
            f"{several}; its inputs are {', '.join(sorted(takes(model)))}",
            expected="exactly one of: " + "; ".join(k.NAME for k in KINDS),
            next_step="validate what it is made of, or ask for this architecture in an issue",
        )
    return found[0]
