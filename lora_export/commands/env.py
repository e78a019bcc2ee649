"""lora-export env: versions and providers that really work."""

import click

from lora_export.commands import options
from lora_export.commands.talk import table, talking


@click.command("env")
@options.talk_options
def env(as_json: bool, quiet: bool, verbose: bool) -> None:
    """Show versions, hardware, and which execution providers really run a model here."""
    with talking(as_json, quiet, verbose) as talk:
        import platform

        import psutil

        from lora_export import __version__
        from lora_export.manifest import versions
        from lora_export.runtime import providers_report

        providers = providers_report()
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
        talk.result(document, table(rows))
