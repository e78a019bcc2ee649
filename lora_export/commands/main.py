"""The command line. A command's module is imported when the command is asked for, so that --help answers at
once."""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import click

from lora_export.version import __version__

# Command → the first sentence of its help, in the order in which a newcomer meets them.
COMMANDS = {
    "merge-and-export": "Merge an adapter, prove the result, export it to ONNX and measure it.",
    "inspect": "Say what PATH is (base, adapter, ONNX export, run, package or fleet), or what an adapter has "
    "learnt.",
    "merge": "Merge adapters into their base and write a Hugging Face folder.",
    "validate": "Compare a merged folder with PEFT's unmerged forward in fp32.",
    "export": "Export a model folder to ONNX: decoders for onnxruntime-genai, all others with Optimum's names.",
    "benchmark": "Measure base, merged and unmerged graphs in turn, and say whether merging costs latency.",
    "package": "Package RUN, a folder that merge-and-export left, so that a runtime loads it as it is.",
    "fleet": "Merge, prove, export and package every adapter of JOBS, each once, on one machine or many.",
    "switch": "Put another adapter into a merged folder, or into its ONNX export, in place.",
    "combine": "Make one adapter of several, without a base.",
    "extract": "Take a LoRA out of a fully tuned model.",
    "truncate": "Write an adapter in a lower rank, each module in its own.",
    "report": "Write report.html and report.md of RUN again from its report.json.",
    "verify": "Check a merged folder, the folder of a whole run, a package, or the root of a fleet, again.",
    "env": "Show versions, hardware, working execution providers, and configured options.",
}


class Commands(Mapping[str, click.Command]):
    """The commands by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> click.Command:
        if name not in COMMANDS:
            raise KeyError(name)
        module = importlib.import_module(f"lora_export.commands.{name.replace('-', '_')}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Group(click.Group):
    """Lists the commands in their order, and gives each the defaults of the configuration file."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            limit = formatter.width - 6 - max(map(len, COMMANDS))
            formatter.write_dl([(n, shorten(text, limit, placeholder="...")) for n, text in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from lora_export.commands import configuration
        from lora_export.errors import LoraExportError

        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None and not {"-h", "--help"} & set(rest):
            try:
                if (file := configuration.read(Path.cwd())) is not None:
                    configuration.refuse_unknown(self, *file)
                    configuration.remember(ctx, file[0])
                    ctx.default_map = {name: configuration.defaults(command, name, *file)}
            except LoraExportError as error:
                ctx.obj = error  # the command reports it, in its way
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # before a command's own `talking` could hear it; click would exit with 1
            from lora_export.errors import EXIT_INTERRUPTED

            click.echo("error: interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def _keep(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[str(param.name)] = value


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--json", is_flag=True, expose_value=False, callback=_keep, hidden=True)
@click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_keep, hidden=True)
@click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_keep, hidden=True)
@click.version_option(__version__, prog_name="lora-export", message="%(prog)s %(version)s")
def cli() -> None:
    """Take a trained LoRA or QLoRA adapter to production.

    Merge it into its base, prove that the merged model computes what the adapter was trained to compute,
    export it to ONNX, and prove that it costs no extra latency:

    \b
        lora-export merge-and-export -b BASE -a ADAPTER -o OUT

    --json, -q and -v may stand before or after the command.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 a gate or a check failed (an output that did not
    pass is kept in OUT.failed), 130 interrupted.
    """


cli.commands = Commands()  # type: ignore[assignment]
