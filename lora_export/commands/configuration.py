"""Repeated options from lora-export.toml or pyproject.toml: flags beat environment variables, which beat the file.

Only the folder in which the command is started is looked at, which may be a model's own: a file may say how work is
done, and nothing that bears on what is made, on what it is compared with, or on when it passes.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lora_export.errors import InputError

FILE = "lora-export.toml"
PREFIX = "LORA_EXPORT"
# Of the environment, too: what names an output, replaces one, or says what program is run.
NOT_HERE = frozenset({"output", "force", "dry_run", "run_it", "runtime", "key", "repository", "private"})
# All that may stand in a file. Every other option can weaken a verdict, direct it to something else, or hide it.
IN_A_FILE = frozenset({"device", "engine", "json", "max-memory", "max-shard-size", "optimize", "verbose"})
_META = "lora_export.configuration"  # where a click context keeps the path of the file


def variables(command: str, option: click.Option) -> list[str]:
    """Environment variables that stand for an option: of one command, then of all."""
    name = _key(option).upper().replace("-", "_")
    return [f"{PREFIX}_{command.upper().replace('-', '_')}_{name}", f"{PREFIX}_{name}"]


def name_variables(group: click.Group) -> None:
    """Let each option that may be configured be given by its environment variables."""
    for name, command in group.commands.items():
        for option in _options(command).values():
            option.envvar = variables(name, option)


def read(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The configuration in a folder, and its file; lora-export.toml comes first. InputError if damaged."""
    for path, inner in ((folder / FILE, ()), (folder / "pyproject.toml", ("tool", "lora-export"))):
        if not path.is_file():
            continue
        import tomllib

        try:
            found: Any = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"this is no TOML: {error}", where=path, expected="key = value") from None
        for key in inner:
            found = found.get(key, {}) if isinstance(found, dict) else {}
        if found or not inner:
            return path, found
    return None


def refuse_unknown(group: click.Group, path: Path, document: Mapping[str, Any]) -> None:
    """InputError for a table that is no command, a key that no command, or not this one, has, or one that must not
    stand in a file."""
    for key, value in document.items():
        if not isinstance(value, Mapping):
            every = {k: o for c in group.commands.values() for k, o in _every(c).items()}
            if key not in every:
                raise _unknown(path, key, sorted(IN_A_FILE), "an option of a command, by its long name, or a table")
            _refuse_in_file(path, key, every[key])
        elif key not in group.commands:
            raise _unknown(path, f"[{key}]", list(group.commands))
        else:
            known = _every(group.commands[key])
            for inner in value:
                if inner not in known:
                    raise _unknown(path, f"{inner} in [{key}]", sorted(IN_A_FILE & set(known)))
                _refuse_in_file(path, inner, known[inner])


def _refuse_in_file(path: Path, key: str, option: click.Option) -> None:
    if key in IN_A_FILE:
        return
    asked = f"--{key} on the command line"
    if option.name not in NOT_HERE:
        asked += f", or {PREFIX}_{key.upper().replace('-', '_')} in the environment"
    raise InputError(
        f"{key} must not stand in a configuration file: it bears on what comes out, or on what passes",
        where=path,
        expected=f"one of {', '.join(sorted(IN_A_FILE))}",
        next_step=f"take it out of {path.name}, and give {asked}",
    )


def defaults(command: click.Command, name: str, path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Option → value for one command, as click takes it: its own table over what is meant for all.

    InputError for a value that is none of its option.
    """
    own, options = document.get(name, {}), _every(command)
    asked = {k: v for k, v in document.items() if k in options and not isinstance(v, Mapping)} | dict(own)
    return {str(options[key].name): _value(options[key], key, value, path) for key, value in asked.items()}


def used(context: click.Context) -> list[tuple[str, str, str]]:
    """(option, value, where it was read) of what the command was given by a file or a variable."""
    from click.core import ParameterSource

    found = []
    for option in _options(context.command).values():
        source = context.get_parameter_source(str(option.name))
        if source not in (ParameterSource.DEFAULT_MAP, ParameterSource.ENVIRONMENT):
            continue
        named = [v for v in variables(str(context.info_name), option) if os.environ.get(v)]
        where = named[0] if source is ParameterSource.ENVIRONMENT else context.meta[_META].name
        found.append((_key(option), _words(context.params[str(option.name)]), where))
    return found


def remember(context: click.Context, path: Path) -> None:
    """Keep the path of the file that gives a command its defaults."""
    context.meta[_META] = path


def from_file(context: click.Context | None) -> dict[str, Any] | None:
    """The file that gave options to the command, by its path, and the options; None if none did."""
    if context is None or _META not in context.meta:
        return None
    path: Path = context.meta[_META]
    options = {option: value for option, value, where in used(context) if where == path.name}
    return {"file": str(path), "options": options} if options else None


def said(found: Mapping[str, Any] | None) -> str:
    """What from_file found, in a line; '' for nothing."""
    if not found:
        return ""
    return f"{Path(found['file']).name}: {', '.join(f'--{k} {v}' for k, v in found['options'].items())}"


def in_environment(group: click.Group) -> dict[str, str]:
    """Variables that are set and stand for an option of a command."""
    known = {v for n, c in group.commands.items() for o in _options(c).values() for v in variables(n, o)}
    return {name: os.environ[name] for name in sorted(known) if os.environ.get(name)}


def _options(command: click.Command) -> dict[str, click.Option]:
    """What the environment may give, by its long name without dashes."""
    return {key: option for key, option in _every(command).items() if option.name not in NOT_HERE}


def _every(command: click.Command) -> dict[str, click.Option]:
    return {_key(option): option for option in command.params if isinstance(option, click.Option)}


def _key(option: click.Option) -> str:
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
        f"{key} is no option that can be configured",
        where=path,
        expected=expected or f"one of {', '.join(known)}",
        next_step=f"did you mean {near[0]}?" if near else "lora-export COMMAND --help lists the options",
    )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
