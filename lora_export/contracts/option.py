"""How a field of a frozen dataclass is an option: its metadata, and its JSON form."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Configurable = Literal["file", "environment", "command line"]


@dataclass(frozen=True)
class Option:
    """How an option is set from outside, and how JSON keeps it.

    flags: of the command line; empty: from the field's name. choices: where the type is not a Literal. minimum,
    maximum: inclusive bounds; above: an exclusive one. unit: how the number is written. default_text: what help
    shows as the default in place of the value. configurable: the weakest place that may set it; what bears on a
    verdict may not come from a file in a model's folder. json: its name; None: not kept. changes_result: whether
    the bytes of the output depend on it. conditional: it matters for some models only, and a certificate keeps the
    default for the others.
    """

    help: str
    section: str = ""
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    choices: Sequence[str] | Callable[[], Sequence[str]] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    unit: Literal["", "bytes", "share", "seconds"] = ""
    default_text: str = ""
    configurable: Configurable = "environment"
    json: str | None = ""
    changes_result: bool = True
    conditional: bool = False


@dataclass(frozen=True)
class Nested:
    """Options within options. without: fields that are not offered here; switch: the option without which the whole
    is None; attribute: what the field holds of them, if not all; flat: JSON keeps them beside the outer ones; json:
    the name otherwise, None: not kept."""

    of: type
    without: Collection[str] = ()
    switch: Option | None = None
    attribute: str = ""
    flat: bool = False
    json: str | None = ""


def option(default: T, help: str, section: str = "", **more: Any) -> T:
    """A field with an Option. A default that is a tuple or None is that of a repeatable or an optional option."""
    made: T = field(default=default, metadata={"option": Option(help, section, **more)})
    return made


def nested(of: type[T], **more: Any) -> T:
    """A field that holds other options, all of them with their defaults unless they are given."""
    made: T = field(default_factory=of, metadata={"option": Nested(of, **more)})
    return made


def switched(of: type[T], flag: str, help: str, section: str, **more: Any) -> T | None:
    """A field that holds other options where `flag` is given, and None otherwise."""
    how = Nested(of, switch=Option(help, section, flags=(flag,)), **more)
    made: T | None = field(default=None, metadata={"option": how})
    return made


def taken_from(of: type, attribute: str, default: T, json: str | None = "") -> T:
    """A field that holds one attribute of other options."""
    made: T = field(default=default, metadata={"option": Nested(of, attribute=attribute, json=json)})
    return made


def hidden(default: T, json: str | None = "") -> T:
    """A field that Python alone can set."""
    made: T = field(default=default, metadata={"json": json})
    return made


def declared(of: type) -> Iterator[tuple[Field[Any], Option | Nested]]:
    """The fields of an options dataclass that can be set from outside, with how."""
    for each in fields(of):
        if "option" in each.metadata:
            yield each, each.metadata["option"]


def names(of: type, that: Callable[[Option], bool]) -> tuple[str, ...]:
    """The fields of an options dataclass whose Option is so."""
    return tuple(f.name for f, how in declared(of) if isinstance(how, Option) and that(how))


def kept(options: Any, default: Collection[str] = ()) -> dict[str, Any]:
    """Options as reports, manifests and certificates keep them: JSON, in which a path is its last part.

    default: fields that did not matter, which are kept with their defaults: no other value can be claimed.
    """
    document: dict[str, Any] = {}
    for each in fields(options):
        how = each.metadata.get("option")
        name = how.json if how else each.metadata.get("json", "")
        if name is None:
            continue
        value = each.default if each.name in default else getattr(options, each.name)
        if isinstance(how, Nested) and how.flat:
            document |= kept(value)
        elif is_dataclass(value):
            document[name or each.name] = kept(value)
        else:
            plain = list(value) if isinstance(value, tuple) else value
            document[name or each.name] = value.name if isinstance(value, Path) else plain
    return document
