"""Options from lora-export.toml or pyproject.toml: flags beat environment variables, which beat the file.

The file is that of the folder in which the command is started, which may be a model's own: it may say how work is
done, but nothing that affects what is written, what it is compared with, or when it passes.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lora_export.contracts.option import Configurable
from lora_export.errors import InputError

FILE = "lora-export.toml"
PREFIX = "LORA_EXPORT"
_META = "lora_export.configuration"  # where a click context keeps the path of the file


def variables(command: str, option: click.Option) -> list[str]:
    """Environment variables that stand for an option: of one command, then of all."""
    name = key_of(option).upper().replace("-", "_")
    return [f"{PREFIX}_{command.upper().replace('-', '_')}_{name}", f"{PREFIX}_{name}"]


def in_a_file(group: click.Group) -> list[str]:
    """The options that a file may set. Every other one can weaken a verdict, direct it elsewhere, or hide it."""
    every = (item for c in group.commands.values() for item in options(c).items())
    return sorted({key for key, option in every if _configurable(option) == "file"})


def read(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The configuration in a folder, and its file; lora-export.toml comes first. InputError if damaged."""
    for path, inner in ((folder / FILE, ()), (folder / "pyproject.toml", ("tool", "lora-export"))):
        if not path.is_file():
            continue
        import tomllib

        try:
            document: Any = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"this is not TOML: {error}", where=path, expected="key = value") from None
        for key in inner:
            document = document.get(key, {}) if isinstance(document, dict) else {}
        if document or not inner:
            return path, document
    return None


def refuse_unknown(group: click.Group, path: Path, document: Mapping[str, Any]) -> None:
    """InputError for a table that is not a command, a key that is not an option (of this command), or an option
    that must not stand in a file."""
    allowed = in_a_file(group)
    for key, value in document.items():
        if not isinstance(value, Mapping):
            every = {k: o for c in group.commands.values() for k, o in options(c).items()}
            if key not in every:
                raise _unknown(path, key, allowed, "an option of a command, by its long name, or a table")
            _refuse_in_file(path, key, every[key], allowed)
        elif key not in group.commands:
            raise _unknown(path, f"[{key}]", list(group.commands))
        else:
            known = options(group.commands[key])
            for inner in value:
                if inner not in known:
                    raise _unknown(path, f"{inner} in [{key}]", sorted(set(allowed) & set(known)))
                _refuse_in_file(path, inner, known[inner], allowed)


def _refuse_in_file(path: Path, key: str, option: click.Option, allowed: Sequence[str]) -> None:
    if key in allowed:
        return
    remedy = f"--{key} on the command line"
    if _configurable(option) != "command line":
        remedy += f", or {PREFIX}_{key.upper().replace('-', '_')} in the environment"
    raise InputError(
        f"{key} must not stand in a configuration file: it affects what is written, or what passes",
        where=path,
        expected=f"one of {', '.join(allowed)}",
        next_step=f"remove it from {path.name}, and give {remedy}",
    )


def defaults(command: click.Command, name: str, path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Option → value for one command, as click takes it: its own table over what is meant for all.

    InputError for a value that the option does not take.
    """
    own, known = document.get(name, {}), options(command)
    values = {k: v for k, v in document.items() if k in known and not isinstance(v, Mapping)} | dict(own)
    return {str(known[key].name): _value(known[key], key, value, path) for key, value in values.items()}


def used(context: click.Context) -> list[tuple[str, str, str]]:
    """(option, value, where it was read) of what the command was given by a file or a variable."""
    from click.core import ParameterSource

    settings = []
    for key, option in _configurables(context.command).items():
        source = context.get_parameter_source(str(option.name))
        if source not in (ParameterSource.DEFAULT_MAP, ParameterSource.ENVIRONMENT):
            continue
        given = [v for v in variables(str(context.info_name), option) if os.environ.get(v)]
        where = given[0] if source is ParameterSource.ENVIRONMENT else context.meta[_META].name
        settings.append((key, _words(context.params[str(option.name)]), where))
    return settings


def remember(context: click.Context, path: Path) -> None:
    """Keep the path of the file that gives a command its defaults."""
    context.meta[_META] = path


def from_file(context: click.Context | None) -> dict[str, Any] | None:
    """The file that gave options to the command, by its path, and the options; None if none did."""
    if context is None or _META not in context.meta:
        return None
    path: Path = context.meta[_META]
    values = {option: value for option, value, where in used(context) if where == path.name}
    return {"file": str(path), "options": values} if values else None


def in_words(settings: Mapping[str, Any] | None) -> str:
    """What from_file returned, in a line; '' for nothing."""
    if not settings:
        return ""
    return f"{Path(settings['file']).name}: {', '.join(f'--{k} {v}' for k, v in settings['options'].items())}"


def in_environment(group: click.Group) -> dict[str, str]:
    """Variables that are set and stand for an option of a command."""
    known = {v for n, c in group.commands.items() for o in _configurables(c).values() for v in variables(n, o)}
    return {name: os.environ[name] for name in sorted(known) if os.environ.get(name)}


def _configurables(command: click.Command) -> dict[str, click.Option]:
    """What the environment may set: not what names or replaces an output, or says what program is run."""
    return {key: option for key, option in options(command).items() if _configurable(option) != "command line"}


def _configurable(option: click.Option) -> Configurable:
    where: Configurable = getattr(option, "configurable", "command line")
    return where


def options(command: click.Command) -> dict[str, click.Option]:
    """The options of a command, by their long names without dashes."""
    return {key_of(option): option for option in command.params if isinstance(option, click.Option)}


def key_of(option: click.Option) -> str:
    return next(o for o in option.opts if o.startswith("--")).removeprefix("--")


def _value(option: click.Option, key: str, value: Any, path: Path) -> Any:
    value = [value] if option.multiple and not isinstance(value, list) else value
    try:
        option.type_cast_value(click.Context(click.Command(None)), value)
    except (click.BadParameter, TypeError, ValueError) as error:
        why = error.format_message() if isinstance(error, click.BadParameter) else str(error)
        raise InputError(f"{key} = {value!r}: {why}", where=path, expected=f"a value of --{key}") from None
    return value


def _unknown(path: Path, key: str, known: list[str], expected: str = "") -> InputError:
    import difflib

    near = difflib.get_close_matches(key.strip("[]").partition(" ")[0], known, n=1)
    return InputError(
        f"{key} is not an option that can be configured",
        where=path,
        expected=expected or f"one of {', '.join(known)}",
        next_step=f"did you mean {near[0]}?" if near else "lora-export COMMAND --help lists the options",
    )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
