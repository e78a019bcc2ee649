"""Kinds, formats, engines and targets that other installed packages bring, found through their entry points.

An entry point is a line of a package's pyproject.toml, such as
`[project.entry-points."lora_export.adapter_kinds"]` with `mine = "my_package.mine"`.
"""

import functools
from dataclasses import dataclass

from lora_export.errors import InputError


@dataclass(frozen=True)
class Plugin:
    """name: of the entry point; value: the object it points to; distribution, version: the package it is from."""

    name: str
    value: object
    distribution: str
    version: str

    def refuse(self, found: str, expected: str) -> InputError:
        """The error for a plug-in that cannot be used; the caller raises it."""
        return InputError(
            f"the plug-in {self.name!r} of the package {self.distribution} {self.version} {found}",
            expected=expected,
            next_step=f"pip install --upgrade {self.distribution}, or pip uninstall {self.distribution}",
        )

    def check_members(self, protocol: type) -> None:
        """InputError if the object lacks a member of the protocol. Types of members are not checked."""
        members = {n for cls in protocol.__mro__ for n in (*vars(cls), *getattr(cls, "__annotations__", ()))}
        missing = sorted(n for n in members if not n.startswith("_") and not hasattr(self.value, n))
        if missing:
            raise self.refuse(f"lacks {', '.join(missing)}", f"an object with all members of {protocol.__name__}")


@functools.cache
def plugins(group: str) -> tuple[Plugin, ...]:
    """The plug-ins of an entry-point group, sorted by name, each loaded; looked up once per process and group.

    InputError, naming the package, if one cannot be imported or if two packages use the same name.
    """
    from importlib.metadata import entry_points

    loaded: dict[str, Plugin] = {}
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        package = entry.dist
        plugin = Plugin(entry.name, None, package.name if package else "?", package.version if package else "?")
        if entry.name in loaded:
            raise plugin.refuse(
                f"has the same name as one of {loaded[entry.name].distribution}", f"unique names in {group}"
            )
        try:
            value = entry.load()
        except Exception as error:  # a plug-in may raise anything when it is imported
            raise plugin.refuse(
                f"cannot be loaded: {type(error).__name__}: {error}", f"an importable object, {entry.value}"
            ) from error
        loaded[entry.name] = Plugin(plugin.name, value, plugin.distribution, plugin.version)
    return tuple(loaded.values())
