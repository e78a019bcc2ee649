"""lora-export env: versions and providers that really work."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lora_export.commands import derive
from lora_export.commands.talk import Talk, table
from lora_export.errors import LoraExportError


@derive.command("env", configured=False)
def env(talk: Talk) -> None:
    """Show versions, hardware, working execution providers, and configured options.

    Paste it into an issue: it names no folder of this machine, except in values that the configuration has.

    Put options you always use in lora-export.toml, or in pyproject.toml under [tool.lora-export]: for all commands
    at the top, for one in a table of its name. A flag beats a variable (LORA_EXPORT_DTYPE, or
    LORA_EXPORT_MERGE_DTYPE for one command), which beats the file.
    """
    from lora_export import api

    document = api.env()
    configured = configuration_of()
    rows = [
        ("lora-export", str(document["lora_export"])),
        ("platform", str(document["platform"])),
        ("processors", str(document["cpu_count"])),
        ("memory", f"{document['memory_bytes'] / 2**30:.1f} GiB"),
        *document["versions"].items(),
        *(
            (p["provider"], "works" if p["works"] else f"does not work: {p['reason']}")
            for p in document["providers"]
        ),
    ]
    rows += [(f"option ({where})", words) for where, words in _configured(configured)]
    talk.result(document | {"configuration": configured}, table(rows))


def configuration_of() -> dict[str, Any]:
    """What a configuration file and the environment set for commands started in this folder."""
    from lora_export.commands import configuration

    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    try:
        file, error = configuration.read(Path.cwd()), None
        if file is not None:
            configuration.refuse_unknown(group, *file)
            for name, command in group.commands.items():
                configuration.defaults(command, name, *file)
    except LoraExportError as wrong:
        file, error = None, wrong.message()
    return {
        "file": file[0].name if file else None,
        "values": file[1] if file else {},
        "error": error,
        "environment": configuration.in_environment(group),
    }


def _configured(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in document["values"].items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [(document["file"], f"{key} {k}".strip() + f" = {json.dumps(v)}") for k, v in inner]
    rows += [("environment", f"{name}={value}") for name, value in document["environment"].items()]
    return rows + ([("file", document["error"])] if document["error"] else [])
