"""The command line. Modules of the commands import click and nothing heavy, so that --help answers at once."""

from pathlib import Path
from typing import Any

import click

from lora_export.commands import (
    benchmark,
    combine,
    configuration,
    env,
    export,
    extract,
    inspect,
    merge,
    merge_and_export,
    package,
    report,
    switch,
    truncate,
    validate,
    verify,
)
from lora_export.errors import EXIT_INTERRUPTED, LoraExportError
from lora_export.version import __version__


def _version(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        click.echo(f"lora-export {__version__}")
        ctx.exit()


class InOrder(click.Group):
    """Lists the commands as a newcomer meets them, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Of a command that is not only asked for its help, with defaults from the configuration file."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None and not {"-h", "--help"} & set(rest):
            try:
                if (found := configuration.read(Path.cwd())) is not None:
                    configuration.refuse_unknown(self, *found)
                    configuration.remember(ctx, found[0])
                    ctx.default_map = {name: configuration.defaults(command, name, *found)}
            except LoraExportError as error:
                ctx.obj = error  # told by the command, in its way
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # before a command's own `talking` could hear it; click would exit with 1
            click.echo("error: interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Take a trained LoRA or QLoRA adapter to production.

    Merge it into its base, prove that the merged model computes what the adapter was trained to compute,
    export it to ONNX, and prove that it costs no extra latency:

    \b
        lora-export merge-and-export -b BASE -a ADAPTER -o OUT

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 a gate or a check failed (an output that did not
    pass is kept aside in OUT.failed), 130 interrupted.
    """


for command in (
    merge_and_export.merge_and_export,
    inspect.inspect,
    merge.merge,
    validate.validate,
    export.export,
    benchmark.benchmark,
    package.package,
    switch.switch,
    combine.combine,
    extract.extract,
    truncate.truncate,
    report.report,
    verify.verify,
    env.env,
):
    cli.add_command(command)
configuration.name_variables(cli)
