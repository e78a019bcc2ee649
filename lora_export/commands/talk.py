"""What every command does around its one call: progress, results on stdout, error messages and exit codes."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from lora_export.escape import shown

if TYPE_CHECKING:
    from lora_export.progress import Console


@dataclass
class Talk:
    """progress: where stages report to; result: prints the outcome once, as JSON or as text; configuration: the
    file that set options, and which: every outcome names it."""

    progress: "Console"
    as_json: bool
    verbose: bool = False
    configuration: dict[str, Any] | None = None
    done: bool = False

    @property
    def configured(self) -> str:
        """The configuration file and what it set, for a report."""
        from lora_export.commands import configuration

        return configuration.in_words(self.configuration)

    def result(self, document: object, words: str) -> None:
        """document: a result, or what its JSON has."""
        from lora_export.storage.documents import as_json

        self.done = True
        if self.configured:
            words = f"{words}\nconfigured by {self.configured}"
        click.echo(_json(self.named(as_json(document))) if self.as_json else _lines(words))

    def named(self, document: dict[str, Any]) -> dict[str, Any]:
        """The document with the configuration file, if one was used."""
        return document | ({"configuration": self.configuration} if self.configuration else {})


def _lines(words: str) -> str:
    return "\n".join(map(shown, words.split("\n")))


def _json(document: dict[str, Any]) -> str:
    from lora_export.storage.sealed import json_text

    return json_text(document).rstrip("\n")


@contextlib.contextmanager
def talking(as_json: bool, quiet: bool, verbose: bool, *, configured: bool = True) -> Iterator[Talk]:
    """Run a command's body; every way it can end has its exit code.

    configured: refuse to run with a configuration file that cannot be read, and say what it set.
    """
    from lora_export.errors import EXIT_FAILED, EXIT_INTERRUPTED, LoraExportError
    from lora_export.progress import Console

    # PEFT and transformers look for updates, warn and draw bars; stdout and stderr are ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        import logging
        import warnings

        warnings.simplefilter("ignore")
        # It reports a missing faster kernel, which nothing here would use.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    _interrupt_once()
    talk = Talk(Console(-1 if quiet else int(verbose)), as_json, verbose)
    try:
        with talk.progress:
            _refuse_unreadable_paths()
            if configured:
                talk.configuration = _say_configured(talk.progress)
            yield talk
    except (click.ClickException, click.exceptions.Exit):
        raise
    except LoraExportError as error:
        _fail(talk, error.as_json(), error.message(), error.exit_code)
    except KeyboardInterrupt:
        _fail(talk, {"error": "Interrupted", "found": "interrupted"}, "interrupted", EXIT_INTERRUPTED)
    except OSError as error:
        names = " → ".join(str(n) for n in (error.filename, error.filename2) if n)
        text = f"{error.strerror or error}{f' ({names})' if names else ''}"
        _fail(talk, {"error": "OSError", "found": text}, text, EXIT_FAILED)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        text = f"internal error, please report it: {type(error).__name__}: {error}"
        hint = "" if verbose else "\n  try:      the same command with -v shows where it happened"
        _fail(talk, {"error": "InternalError", "found": text}, text + hint, EXIT_FAILED)


def _refuse_unreadable_paths() -> None:
    """InputError for a path that is not UTF-8: JSON cannot name it, and the libraries that read models refuse
    it."""
    from lora_export.checkpoint.sources import refuse_unreadable

    context = click.get_current_context(silent=True)
    for value in context.params.values() if context else ():
        for path in value if isinstance(value, tuple | list) else (value,):
            if isinstance(path, str | os.PathLike):
                refuse_unreadable(path)


def _say_configured(progress: "Console") -> dict[str, Any] | None:
    from lora_export.commands import configuration
    from lora_export.errors import LoraExportError

    context = click.get_current_context(silent=True)
    if context is None:
        return None
    if isinstance(context.obj, LoraExportError):
        raise context.obj
    for option, value, where in configuration.used(context):
        progress.stage(f"--{option} {value}, from {where}")
    return configuration.from_file(context)


def _fail(talk: Talk, document: dict[str, Any], words: str, code: int) -> None:
    click.echo(_lines(f"error: {words}"), err=True)
    if talk.configured:
        click.echo(_lines(f"  configured by {talk.configured}"), err=True)
    if talk.as_json and not talk.done:
        click.echo(_json(talk.named(document)))
    sys.exit(code)


def _interrupt_once() -> None:
    """Let the first Ctrl-C, SIGTERM or SIGHUP end the command; later ones do not disturb how it ends."""
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
            signal.signal(number, interrupt)


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns, a row a line."""
    rows = [(shown(name), shown(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
