"""A row's settings as options: every option of merge-and-export and of package that makes sense in a fleet."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import click

from lora_export.commands import derive
from lora_export.commands.configuration import key_of
from lora_export.contracts import FleetRow, PackageOptions, StoryOptions
from lora_export.contracts.fleet import Keep
from lora_export.errors import InputError
from lora_export.fleet.job_files import Faults, Layer
from lora_export.fleet.jobs import Job, effective, read_jobs
from lora_export.registered import target_names

_KEEPS: tuple[str, ...] = get_args(Keep)
FOR, PUBLISH = "for", "publish"
WITH = "for = RUNTIME with it"
# Options of the two commands that a row cannot have, and what is said of them.
REFUSED: Mapping[str, str] = {
    "force": "an object of a fleet is never replaced: an input or an option that changes makes another one",
    "output": "objects lie below ROOT, the -o of lora-export fleet",
    "graph-from": "the rows of a base share its graph without it",
    "cache": "what rows share of a base lies in ROOT",
    "no-cache": "what rows share of a base lies in ROOT",
    "cache-size": "what rows share of a base lies in ROOT",
    "pluggable": "it names one export in place of the row's",
    "converter": "it is a program of one machine, and rows are worked on anywhere",
    "push": "a fleet writes to ROOT alone: lora-export package --push for one of its runs",
    "private": "it belongs to --push",
    "dry-run": "it is an option of lora-export fleet",
    "json": "it is an option of lora-export fleet",
    "quiet": "it is an option of lora-export fleet",
    "verbose": "it is an option of lora-export fleet",
}
# Set by the row's own keys (its name, its provider), or by nothing here.
_NOT_PACKAGE = ("name", "provider", "adapter", "pluggable", "converter", "force")


@functools.cache
def keys() -> Mapping[str, click.Option]:
    """Key of a jobs file → the option of the command line that it stands for."""
    every = (*derive.options_of(StoryOptions), *derive.options_of(PackageOptions, without=_NOT_PACKAGE))
    return {key_of(option): option for option in every if key_of(option) not in REFUSED}


@functools.cache
def _of_packages() -> frozenset[str]:
    run = {key_of(option) for option in derive.options_of(StoryOptions)}
    return frozenset(keys()) - run


def read_rows(path: Path) -> tuple[FleetRow, ...]:
    """The rows of a jobs file with their options. InputError with every fault of the file, each with its place."""
    faults = Faults(path)
    jobs = read_jobs(path, {*keys(), *REFUSED, FOR, PUBLISH}, faults)
    convert = _Conversion(faults)
    rows = tuple(map(convert.row, jobs))
    faults.refuse()
    return rows


@dataclass
class _Conversion:
    """Rows with the same settings share one object of each kind of options."""

    faults: Faults
    _made: dict[Any, tuple[StoryOptions, PackageOptions, str | None, Keep]] = field(default_factory=dict)

    def row(self, job: Job) -> FleetRow:
        settings = effective(job)
        sign = tuple((key, repr(value), layer.folder) for key, (value, layer) in settings.items())
        if sign not in self._made:
            before = len(self.faults)
            made = self._options(settings, job)
            if len(self.faults) == before:
                self._made[sign] = made
        else:
            made = self._made[sign]
        story, package, target, keep = made
        if target is not None:
            package = replace(package, name=job.name)
        return FleetRow(job.name, job.base, job.model, job.adapters, story, package, target, keep)

    def _options(
        self, settings: Mapping[str, tuple[object, Layer]], job: Job
    ) -> tuple[StoryOptions, PackageOptions, str | None, Keep]:
        given: dict[str, Any] = {}
        for key, (value, layer) in settings.items():
            if key in REFUSED:
                self.faults.add(layer.place, key, f"{key} is no key of a row", REFUSED[key])
            elif key in keys():
                option = keys()[key]
                given[str(option.name)] = self._value(key, value, layer)
        target, keep = self._target(settings), self._keep(settings)
        self._check(settings, given, target, job)
        given = {name: value for name, value in given.items() if value is not None}
        try:
            story = derive.build(StoryOptions, given, cache=None)
            package = derive.build(PackageOptions, {k: v for k, v in given.items() if k not in _NOT_PACKAGE})
        except (InputError, TypeError, ValueError) as error:
            if not len(self.faults):
                self.faults.add(job.place, "", getattr(error, "found", str(error)))
            return StoryOptions(), PackageOptions(), target, "run"
        # With one of its own, validation of models is layer by layer only where that was asked for.
        memory = story.validation.max_memory or (story.merge.max_memory if "max_memory" in given else None)
        provider = "cpu" if story.export.provider == "auto" else story.export.provider
        story = replace(
            story,
            validation=replace(story.validation, max_memory=memory),
            export=replace(story.export, provider=provider),
        )
        return story, package, target, keep or ("run" if target is None else "package")

    # --- values ----------------------------------------------------------------------------------------------

    def _value(self, key: str, value: object, layer: Layer) -> Any:
        """As the command line converts it; None, with a fault, for what it would not take."""
        option = keys()[key]
        try:
            made = _located(option.type_cast_value(_CONTEXT, _as_typed(option, value)), layer.folder)
            if isinstance(made, Path) and not made.is_file():
                self.faults.add(layer.place, key, f"{key} = {_spelled(value)}: there is no such file", str(made))
            return made
        except click.BadParameter as error:
            self.faults.add(layer.place, key, f"{key} = {_spelled(value)}: {error.message}")
        except (TypeError, ValueError) as error:
            self.faults.add(layer.place, key, f"{key} = {_spelled(value)}: {error}", f"a value of --{key}")
        return None

    def _target(self, settings: Mapping[str, tuple[object, Layer]]) -> str | None:
        value, layer = settings.get(FOR, (None, None))
        if layer is not None and value not in target_names():
            self.faults.add(layer.place, FOR, f"for = {_spelled(value)}", f"one of {', '.join(target_names())}")
        return value if isinstance(value, str) else None

    def _keep(self, settings: Mapping[str, tuple[object, Layer]]) -> Keep | None:
        value, layer = settings.get(PUBLISH, (None, None))
        if layer is None:
            return None
        if value not in _KEEPS:
            self.faults.add(layer.place, PUBLISH, f"publish = {_spelled(value)}", f"one of {', '.join(_KEEPS)}")
        elif value != "run" and FOR not in settings:
            self.faults.add(layer.place, PUBLISH, f"publish = {_spelled(value)} without a runtime", WITH)
        return cast(Keep, value)

    def _check(
        self, settings: Mapping[str, tuple[object, Layer]], given: Mapping[str, Any], target: str | None, job: Job
    ) -> None:
        """What does not go together."""
        value, layer = settings.get("keep", (None, None))
        if layer is not None and value in _KEEPS:
            self.faults.add(
                layer.place,
                "keep",
                f"keep = {value!r} names weights that are not quantized",
                f"publish = {value!r}",
            )
        value, layer = settings.get("provider", (None, None))
        if layer is not None and value == "auto":
            told = 'provider = "auto" would make bytes depend on the machine that takes the row'
            self.faults.add(layer.place, "provider", told, '"cpu", which is the default here, or "cuda"')
        for key in sorted(_of_packages() & set(settings) if target is None and FOR not in settings else ()):
            self.faults.add(settings[key][1].place, key, f"{key} without a runtime to package for", WITH)
        try:
            derive.refuse_sizes(
                given.get("sessions"), given.get("grid"), bool(given.get("batch") or given.get("prompt_length"))
            )
        except InputError as error:
            self.faults.add(job.place, "", error.found, error.expected or "")


_CONTEXT = click.Context(click.Command(None))


def _as_typed(option: click.Option, value: object) -> object:
    """The value of TOML, CSV or JSON as the words that stand on a command line."""
    if option.is_flag:
        if not isinstance(value, bool) and str(value).lower() not in ("true", "false"):
            raise ValueError("it is switched on or off: true or false")
        return str(value).lower() == "true"
    several = value if isinstance(value, list) else [value]
    for one in several:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise ValueError(f"{_spelled(one)} is not a text or a number")
    if not option.multiple and isinstance(value, list):
        raise ValueError("it takes one value")
    words = [str(one) for one in several]
    return words if option.multiple else words[0]


def _located(value: object, folder: Path) -> object:
    """With paths from the folder of the file that they stand in."""
    if isinstance(value, tuple):
        return tuple(_located(one, folder) for one in value)
    return (folder / value.expanduser()).absolute() if isinstance(value, Path) else value


def _spelled(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"{text[:60]}…" if len(text) > 60 else text
