"""lora-export package: a finished run for a production runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lora_export.commands import derive
from lora_export.commands.derive import FOLDER, Given
from lora_export.commands.talk import Talk, megabytes, table
from lora_export.commands.types import LazyChoice
from lora_export.contracts.tool_options import PackageOptions
from lora_export.registered import target_names


@derive.command(
    "package",
    click.Argument(["run"], type=FOLDER),
    Given("--for", "target", required=True, type=LazyChoice(target_names), help="The runtime that loads it."),
    derive.OUTPUT,
    derive.options_of(PackageOptions),
    Given("--push", "repository", metavar="OWNER/NAME", section=PackageOptions.SECTION, configurable="command line",
          help="hf: upload the package to the Hub."),
    Given("--private", is_flag=True, section=PackageOptions.SECTION, configurable="command line",
          help="With --push: a repository that others cannot see."),
)  # fmt: skip
def package(
    talk: Talk, run: Path, target: str, output: Path, repository: str | None, private: bool, **given: Any
) -> None:
    """Package RUN, a folder that merge-and-export left, so that a runtime loads it as it is.

    Beside what the runtime reads it holds a README with the commands that run it, manifest.json (hashes, base,
    adapters, options, what proves it), a bill of materials and the licences. The same run gives the same bytes,
    except for a signature.

    \b
        lora-export package ./run --for genai -o ./genai
        lora-export package ./run --for transformers-js --variant q4 -o ./web
        lora-export package ./run --for gguf --variant f16 --variant q8_0 -o ./gguf
        lora-export package ./run --for hf -o ./hub --push me/my-model
        lora-export package ./run --for triton -o ./triton --archive tar.zst --sign key.pem
        lora-export verify ./genai --run
    """
    from lora_export import api
    from lora_export.errors import InputError
    from lora_export.packages.targets import target_named
    from lora_export.storage.documents import as_json
    from lora_export.workflows.packaging import push

    options = derive.build(PackageOptions, given)
    if repository is not None and (options.archive or not target_named(target).for_hub):
        raise InputError(
            f"--push with --for {target}, or with --archive",
            expected="--for hf and a folder, which is what the Hub takes",
        )
    if private and repository is None:
        raise InputError("--private without --push", expected="--push OWNER/NAME with it")
    result = api.package(run, target, output, options, progress=talk.progress)
    address = push(output, repository, private, talk.progress) if repository else None
    rows = [
        ("package", f"{result.name} for {target}"),
        *((name, _compared(measured)) for name, measured in result.measured.items()),
        *((name, megabytes(size)) for name, size in result.files.items()),
        ("signed", "yes" if result.signed else "no"),
        ("time", f"{result.seconds:.1f} s"),
        ("output", str(result.output)),
        *([("pushed", address)] if address else []),
    ]
    talk.result(as_json(result) | {"pushed": address}, table(rows))


def _compared(measured: Mapping[str, Any]) -> str:
    """A variant beside the run's own export, in words."""
    against = measured["against"]
    if "weights" in measured:
        error = measured["largest_error"]
        rounded = "each number rounded once" if not error else f"largest error of a block {error:.1%}"
        return (
            f"{measured['weights']} weights are the merged ones, {rounded}" if error is not None else "not compared"
        )
    if "top1_agreement" in measured:
        return (
            f"chooses the token of {against} at {measured['top1_agreement']:.1%} of positions, "
            f"KL {measured['kl_mean']:.2g}"
        )
    return f"cosine {measured['cosine']:.5f} with {against}" if "cosine" in measured else "not compared"
