"""lora-export package: a finished run for a production runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lora_export.choices import ARCHIVES
from lora_export.commands import options
from lora_export.commands.lazy_choice import LazyChoice
from lora_export.commands.talk import megabytes, table, talking
from lora_export.registered import target_names


@click.command("package")
@click.argument("run", type=options.FOLDER)
@click.option("--for", "target", required=True, type=LazyChoice(target_names), help="The runtime that loads it.")
@options.output_option
@click.option(
    "--name", default=None, help="Of the model, as its README and Triton call it.  [default: the adapter's]"
)
@click.option(
    "--variant", "variants", multiple=True, metavar="DTYPE",
    help="transformers-js: fp32, fp16, q8, q4, q4f16 or all; repeat it.  [default: fp32, q8 and q4]",
)  # fmt: skip
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default=None,
    help="What genai and Triton are to run it on where nobody says.  [default: that of the run]",
)  # fmt: skip
@click.option("--license", "licence", default=None, metavar="ID", help="Licence, if the base's card does not tell.")
@click.option("--archive", type=click.Choice(ARCHIVES), default=None, help="One file in place of a folder.")
@click.option(
    "--sign", "key", type=options.FOLDER, default=None, metavar="KEY",
    help="Sign it with this private key (PEM, P-256, P-384 or P-521), by model-signing and without a network.",
)  # fmt: skip
@click.option(
    "--pluggable", type=options.FOLDER, default=None, metavar="EXPORT",
    help="genai: in place of the merged model an export with slots (export -m BASE -a ADAPTER), with its adapters.",
)  # fmt: skip
@click.option("--push", "repository", default=None, metavar="OWNER/NAME", help="hf: upload the package to the hub.")
@click.option("--private", is_flag=True, help="With --push: a repository that others cannot see.")
@options.force_option
@options.talk_options
def package(
    run: Path, target: str, output: Path, key: Path | None, repository: str | None, private: bool,
    as_json: bool, quiet: bool, verbose: bool, **words: Any,
) -> None:  # fmt: skip
    """Make of RUN, a folder that merge-and-export left, a package that a runtime loads as it is.

    Beside what the runtime reads it holds a README with the commands that run it, manifest.json (hashes, base,
    adapters, options, what proves it), a bill of materials and the licences. The same run gives the same bytes,
    but for a signature.

    \b
        lora-export package ./run --for genai -o ./genai
        lora-export package ./run --for transformers-js --variant q4 -o ./web
        lora-export package ./run --for hf -o ./hub --push me/my-model
        lora-export package ./run --for triton -o ./triton --archive tar.zst --sign key.pem
        lora-export verify ./genai --run
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export import api
        from lora_export.contracts import PackageOptions
        from lora_export.errors import InputError
        from lora_export.workflows.packaging import push

        if repository is not None and (target != "hf" or words["archive"]):
            raise InputError(
                "--push with another target than hf, or with --archive",
                expected="--for hf and a folder, which is what the hub takes",
            )
        if private and repository is None:
            raise InputError("--private without --push", expected="--push OWNER/NAME with it")
        result = api.package(run, target, output, PackageOptions(key=key, **words), progress=talk.progress)
        address = push(output, repository, private, talk.progress) if repository else None
        rows = [
            ("package", f"{result.name} for {target}"),
            *((name, _found(measured)) for name, measured in result.measured.items()),
            *((name, megabytes(size)) for name, size in result.files.items()),
            ("signed", "yes" if result.signed else "no"),
            ("time", f"{result.seconds:.1f} s"),
            ("output", str(result.output)),
            *([("pushed", address)] if address else []),
        ]
        talk.result(result.as_json() | {"pushed": address}, table(rows))


def _found(measured: Mapping[str, Any]) -> str:
    """A variant beside the run's own export, in words."""
    against = measured["against"]
    if "top1_agreement" in measured:
        return (
            f"chooses the token of {against} at {measured['top1_agreement']:.1%} of positions, "
            f"KL {measured['kl_mean']:.2g}"
        )
    return f"cosine {measured['cosine']:.5f} with {against}" if "cosine" in measured else "not compared"
