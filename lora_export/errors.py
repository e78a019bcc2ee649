"""What can go wrong, said so that a person can act on it, and the exit code that says it to a script."""

from pathlib import Path

EXIT_FAILED = 1
EXIT_GATE = 3
EXIT_INTERRUPTED = 130
LONGEST = 2000  # characters of one part of a message; a name in a file may be longer than a screen


class LoraExportError(Exception):
    """A refusal or failure that is told in plain words, without a traceback (exit code 1).

    found: what is there; where: file and tensor; expected: what would be right; next_step: a command to try.
    All of them may quote a file, so they are kept as `plain` text.
    """

    exit_code = EXIT_FAILED

    def __init__(
        self,
        found: str,
        *,
        where: str | Path | None = None,
        tensor: str | None = None,
        expected: str | None = None,
        next_step: str | None = None,
    ) -> None:
        self.found = plain(found)
        self.where = plain(str(where)) if where is not None else None
        self.tensor = plain(tensor) if tensor is not None else None
        self.expected = plain(expected) if expected is not None else None
        self.next_step = plain(next_step) if next_step is not None else None
        super().__init__(self.message())

    def message(self) -> str:
        lines = [self.found]
        for label, text in (
            ("file", self.where),
            ("tensor", self.tensor),
            ("expected", self.expected),
            ("try", self.next_step),
        ):
            if text:
                lines.append(f"  {label + ':':<10}{text}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, str | None]:
        return {
            "error": type(self).__name__,
            "found": self.found,
            "where": self.where,
            "tensor": self.tensor,
            "expected": self.expected,
            "next": self.next_step,
        }


def plain(text: str) -> str:
    """The text on one line, for any terminal and log: what cannot be printed is escaped, what is too long is cut.

    A tensor's name could otherwise move the cursor, add a line "try: …" of its own, or (a lone surrogate) be
    something that no stream can write.
    """
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class InputError(LoraExportError):
    """A path, option or file that cannot be what was asked for."""


class CheckpointError(LoraExportError):
    """A safetensors file, index or config that is damaged, unsafe or not understood."""


class AdapterError(LoraExportError):
    """An adapter that cannot be merged, or not into this base."""


class OutputError(LoraExportError):
    """The output cannot be written: it exists, is held by another process, or does not fit."""


class ExportError(LoraExportError):
    """No engine can export this model, or the engine failed."""


class RuntimeUnavailable(LoraExportError):
    """An execution provider or library that was asked for does not work here."""


class GateFailed(LoraExportError):
    """The result was made but did not pass its checks (exit code 3)."""

    exit_code = EXIT_GATE
