"""lora-export env: versions and providers that really work."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lora_export.commands import options
from lora_export.commands.talk import table, talking
from lora_export.errors import LoraExportError


@click.command("env")
@options.talk_options
def env(as_json: bool, quiet: bool, verbose: bool) -> None:
    """Show versions, hardware, which execution providers really run a model here, and configured options.

    Paste it into an issue: it names no folder of this machine, but for values that the configuration has.

    Options that are always the same can stand in lora-export.toml, or in pyproject.toml under [tool.lora-export]:
    for all commands at the top, for one in a table of its name. A flag beats a variable (LORA_EXPORT_DTYPE, or
    LORA_EXPORT_MERGE_DTYPE for one command), which beats the file.
    """
    with talking(as_json, quiet, verbose, configured=False) as talk:
        import platform

        import psutil

        from lora_export.manifest import versions
        from lora_export.runtime import providers_report
        from lora_export.version import __version__

        providers = providers_report()
        configured = configuration_of()
        document = {
            "lora_export": __version__,
            "platform": platform.platform(),
            "cpu_count": psutil.cpu_count(logical=False) or psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "versions": versions(),
            "providers": providers,
        }
        rows = [
            ("lora-export", str(document["lora_export"])),
            ("platform", str(document["platform"])),
            ("processors", str(document["cpu_count"])),
            ("memory", f"{psutil.virtual_memory().total / 2**30:.1f} GiB"),
            *versions().items(),
            *((p["provider"], "works" if p["works"] else f"does not work: {p['reason']}") for p in providers),
        ]
        rows += [(f"option ({where})", words) for where, words in _configured(configured)]
        talk.result(document | {"configuration": configured}, table(rows))


def configuration_of() -> dict[str, Any]:
    """What a configuration file and the environment give to commands started in this folder."""
    from lora_export.commands import configuration

    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    try:
        found, error = configuration.read(Path.cwd()), None
        if found is not None:
            configuration.refuse_unknown(group, *found)
            for name, command in group.commands.items():
                configuration.defaults(command, name, *found)
    except LoraExportError as wrong:
        found, error = None, wrong.message()
    return {
        "file": found[0].name if found else None,
        "values": found[1] if found else {},
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
