"""Click's options from the fields that declare them (contracts/options.py), and the dataclasses from what click
read."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from lora_export.choices import GRIDS, Grid
from lora_export.commands import types
from lora_export.commands.configuration import key_of, variables
from lora_export.commands.talk import talking
from lora_export.contracts.option import Configurable, Nested, Option, declared
from lora_export.contracts.options import INPUTS, ExportOptions
from lora_export.errors import InputError

T = TypeVar("T")
FOLDER = click.Path(path_type=Path)
ADAPTER_HELP = (
    "Adapter: a folder or a Hub ID. Give it several times to merge several, with weights as in -a A:0.7 -a B:0.3."
)


class Given(click.Option):
    """A click option with its section of --help, its default in words, and the weakest place that may set it."""

    def __init__(
        self, *names: Any, section: str = INPUTS, default_text: str = "",
        configurable: Configurable = "environment", **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(names, **more)
        self.section, self.default_text, self.configurable = section, default_text, configurable

    def get_help_extra(self, ctx: click.Context) -> Any:
        return super().get_help_extra(ctx) | ({"default": self.default_text} if self.default_text else {})


class Command(click.Command):
    """A command whose --help has sections, with the options for messages that every command has.

    Its body is called with a `Talk`, inside of which every error has its words and its exit code. configured:
    refuse to run with a configuration file that cannot be read.
    """

    def __init__(self, *args: Any, configured: bool = True, **more: Any) -> None:
        super().__init__(*args, **more)
        self.configured = configured
        self.params += map(copy.copy, _MESSAGES)
        for option in self.params:
            if isinstance(option, Given) and option.configurable != "command line":
                option.envvar = variables(str(self.name), option)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = None if isinstance(option, click.Argument) else option.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(option, "section", "Messages"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=26)

    def invoke(self, ctx: click.Context) -> Any:
        assert self.callback is not None
        shown = {name: ctx.params.get(name) or ctx.meta.get(name, False) for name in ("json", "quiet", "verbose")}
        with talking(shown["json"], shown["quiet"], shown["verbose"], configured=self.configured) as talk:
            given = {name: value for name, value in ctx.params.items() if name not in shown}
            return ctx.invoke(self.callback, talk, **given)


def command(
    name: str, *params: click.Parameter | Sequence[Given], configured: bool = True
) -> Callable[[Callable[..., None]], Command]:
    """The decorator that makes a command of a function; its docstring is the help."""
    flat = [copy.copy(p) for one in params for p in ((one,) if isinstance(one, click.Parameter) else one)]

    def make(body: Callable[..., None]) -> Command:
        return Command(name, params=flat, callback=body, help=body.__doc__, configured=configured)

    return make


def options_of(
    of: type,
    only: Collection[str] = (),
    without: Collection[str] = (),
    hidden: Collection[str] = (),
    **changed: Mapping[str, Any],
) -> list[Given]:
    """The options that set the fields of a dataclass, nested ones included.

    only, without: names of fields; hidden: accepted, and left out of --help; changed: by the field's name, what is
    otherwise here than its Option says.
    """
    made: dict[str, Given] = {}
    hints = get_type_hints(of)
    for each, how in declared(of):
        if (only and each.name not in only) or each.name in without:
            continue
        if isinstance(how, Nested):
            inner = options_of(how.of, without=how.without)
            if how.switch is not None:
                inner.insert(0, _option(bool, False, how.switch, flag_of(each.name, how.switch), ""))
        else:
            how = replace(how, **changed.get(each.name, {}))
            inner = [_option(hints[each.name], each.default, how, flag_of(each.name, how), of.SECTION)]  # type: ignore[attr-defined]
            inner[0].hidden = each.name in hidden
        made |= {str(option.name): option for option in inner if option.name not in made}
    return list(made.values())


def flag_of(name: str, how: Option) -> str:
    return how.flags[0] if how.flags else f"--{name.replace('_', '-')}"


def _option(hint: Any, default: Any, how: Option, flag: str, section: str) -> Given:
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    multiple = get_origin(hint) is tuple
    if multiple:
        hint = get_args(hint)[0]
    more: dict[str, Any] = {
        "type": _type(hint, how),
        "multiple": multiple,
        "default": None if multiple else default,
    }
    if hint is bool:
        more = {"default": default} if "/" in flag else {"is_flag": True}
    return Given(
        *(how.flags or (flag,)), _name(flag), help=how.help, section=how.section or section, metavar=how.metavar,
        default_text=how.default_text, configurable=how.configurable,
        show_default=hint is not bool and default not in (None, ()), **more,
    )  # fmt: skip


def _type(hint: Any, how: Option) -> Any:
    if callable(how.choices):
        return types.LazyChoice(how.choices)
    if how.choices or get_origin(hint) is Literal:
        return click.Choice(how.choices or get_args(hint))
    if how.unit:
        return types.SPELLED[how.unit](how.minimum, how.maximum)
    least = how.minimum if how.above is None else how.above
    if hint is int:
        bounds = [None if bound is None else int(bound) for bound in (least, how.maximum)]
        return click.IntRange(min=bounds[0], max=bounds[1])
    if hint is float:
        return types.FiniteRange(least, how.maximum, min_open=how.above is not None)
    return FOLDER if hint is Path else hint


def _name(flag: str) -> str:
    """The name under which click keeps the value of a flag."""
    return flag.partition("/")[0].removeprefix("--").replace("-", "_")


def build(of: type[T], given: Mapping[str, Any], **fixed: Any) -> T:
    """The dataclass whose options a command was given. fixed: fields that have another source; what the command
    does not offer has its default."""
    values = dict(fixed)
    for each, how in declared(of):
        if each.name in values:
            continue
        if isinstance(how, Nested):
            values[each.name] = _build_nested(each.name, how, given)
            continue
        flag = flag_of(each.name, how)
        if _name(flag) in given:
            value = given[_name(flag)]
            if each.default is True and flag.startswith("--no-"):
                value = not value
            values[each.name] = tuple(dict.fromkeys(value)) if isinstance(value, tuple) else value
    return of(**values)


def _build_nested(name: str, how: Nested, given: Mapping[str, Any]) -> Any:
    if how.switch is None:
        made: Any = build(how.of, given)
        return getattr(made, how.attribute) if how.attribute else made
    switch = flag_of(name, how.switch)
    if given.get(_name(switch)):
        return build(how.of, given)
    for each, inner in declared(how.of):
        assert isinstance(inner, Option)
        flag = flag_of(each.name, inner)
        if given.get(_name(flag)) is not None:
            raise InputError(
                f"{flag} without {switch}",
                expected=f"{switch} with it",
                next_step=f"the same command with {switch}",
            )
    return None


# --- what was given ------------------------------------------------------------------------------------------


def asked(flag: str, *sources: ParameterSource) -> bool:
    """Whether an option was given for this command, on its line or by a variable (or from `sources`): not by a
    file, whose defaults are not meant for this run."""
    source = click.get_current_context().get_parameter_source(_name(flag))
    return source in (sources or (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT))


def stated(of: type, given: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a dataclass that were given on the command's line."""
    flags = [(each.name, flag_of(each.name, how)) for each, how in declared(of) if isinstance(how, Option)]
    return tuple(n for n, flag in flags if _name(flag) in given and asked(flag, ParameterSource.COMMANDLINE))


def memory_of_validation() -> int | None:
    """--max-memory where it was asked for. Its default, also one from a file, is meant for the merge's blocks: it
    would make validation read models layer by layer that fit into memory easily, and leave out how they are loaded.
    """
    return int(click.get_current_context().params["max_memory"]) if asked("--max-memory") else None


def as_the_earlier(options: ExportOptions) -> ExportOptions:
    """The options of an export with --graph-from, whose graph has its precision, engine, … already.

    What the configuration file says of them does not matter. InputError for one that was asked for.
    """
    if options.graph_from is None:
        return options
    same = ("provider", "graph_from", "unmerged", "shared_as", "force")
    for option in options_of(ExportOptions, without=same):
        if asked(flag := f"--{key_of(option)}"):
            raise InputError(
                f"{flag} with --graph-from, which takes the options of the earlier export",
                expected="one of them",
                next_step=f"the same command without {flag}, or without --graph-from",
            )
    return ExportOptions(**{name: getattr(options, name) for name in same})


def check_benchmark() -> None:
    """InputError for a grid that was asked for beside sizes, or too few sets of sessions for a spread."""
    given = click.get_current_context().params
    grid = given["grid"] if asked("--grid") else None
    refuse_sizes(given["sessions"], grid, bool(given["batch"] or given["prompt_length"]))


def refuse_sizes(sessions: int | None, grid: Grid | None, sizes: bool) -> None:
    """The same. None: not asked for; sizes: whether batch sizes or lengths were."""
    from lora_export.benchmarking.statistics import MIN_SESSIONS

    if 1 < (sessions or 1) < MIN_SESSIONS:
        raise InputError(
            f"--sessions {sessions}",
            expected=f"1, or at least {MIN_SESSIONS}: fewer have no spread from which an interval could be taken",
            next_step=f"the same command with --sessions {2 * MIN_SESSIONS}",
        )
    if sizes and grid is not None:
        raise InputError(
            "--grid with --batch or --prompt-length",
            expected="one of them: a grid has both",
            next_step=f"the same command without --grid, whose sizes are {GRIDS[grid]}",
        )


def pairs(flag: str, texts: Sequence[str]) -> list[tuple[str, Path]]:
    """NAME=FOLDER taken apart."""
    for text in texts:
        if "=" not in text:
            raise InputError(f"{flag} {text}", expected="NAME=ONNX", next_step=f"{flag} other={text}")
    return [(name, Path(folder)) for name, _, folder in (text.partition("=") for text in texts)]


# --- what several commands ask for, besides options ----------------------------------------------------------

BASE = Given(
    "-b", "--base", required=True, metavar="BASE",
    help="Base model: a folder, or a Hub ID such as owner/name@revision.",
)  # fmt: skip
ADAPTERS = Given("-a", "--adapter", "adapters", required=True, multiple=True, metavar="ADAPTER", help=ADAPTER_HELP)
ADAPTERS_OR_NONE = Given(
    "-a", "--adapter", "adapters", multiple=True, metavar="ADAPTER",
    help=f"{ADAPTER_HELP} Without one a quantized base is only dequantized.",
)  # fmt: skip
OUTPUT = Given(
    "-o", "--output", required=True, type=FOLDER, metavar="OUT", configurable="command line",
    help="Folder to write, all or nothing.",
)  # fmt: skip
FORCE = Given("--force", is_flag=True, configurable="command line", help="Replace an existing output.")
DRY_RUN = Given(
    "--dry-run", is_flag=True, configurable="command line", help="Read headers, print the plan, write nothing."
)
_MESSAGES = (
    Given("--json", is_flag=True, section="Messages", configurable="file",
          help="Print exactly one JSON document on stdout."),
    Given("-q", "--quiet", is_flag=True, section="Messages", help="Print warnings and errors only."),
    Given("-v", "--verbose", is_flag=True, section="Messages", configurable="file",
          help="Print more, and tracebacks of internal errors."),
)  # fmt: skip
