"""The type of an option that takes the name of an engine or a target."""

import click

from lora_export.registered import names


class RegisteredNames(click.Choice[str]):
    """Names of a group of entry points, plug-ins' included; looked up when help is printed or a name is given."""

    def __init__(self, group: str) -> None:
        self._group = group
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        return names(self._group)
