"""lora-export verify: what an earlier run left, checked again."""

import sys
from pathlib import Path
from typing import Any

import click

from lora_export.commands import derive
from lora_export.commands.derive import Given
from lora_export.commands.talk import Talk
from lora_export.contracts.tool_options import VerifyOptions


@derive.command(
    "verify",
    click.Argument(["path"]),
    Given("-b", "--base", metavar="BASE", help="The base that was merged into."),
    Given("-a", "--adapter", "adapters", multiple=True, metavar="ADAPTER",
          help="The adapter that was merged, with its weight if it had one. Give several as for the merge."),
    derive.options_of(VerifyOptions),
)  # fmt: skip
def verify(talk: Talk, path: str, base: str | None, adapters: tuple[str, ...], **given: Any) -> None:
    """Check a merged folder, a whole run, a package or a fleet again.

    Exit code 3 if a check fails, and 1 for a package that was changed.

    The certificate in the folder is not trusted. With -b and -a the merge is done again, and every byte of the
    folder, every file beside the weights and every figure of the certificate is compared with the result. For a run
    the ONNX export is compared as well: its weights are converted or quantized again, and its graph is built again.
    Without base and adapters only hashes can be checked. The verdict names whatever was not checked.

    For a package (a folder, .tar.zst or .zip) every file is hashed, its signature is checked with --key, its graphs
    are checked before anything opens them, and with --run its runtime answers as the unmerged model did.

    Of a fleet (a folder, or a URL such as s3://BUCKET/FLEET) every file of every object, prepared base and verdict
    is hashed and compared with its record, and names/ with the objects. Uploads without a record are named.
    """
    from lora_export import api
    from lora_export.commands.words import verification_words
    from lora_export.errors import EXIT_FAILED, EXIT_GATE
    from lora_export.storage.documents import as_json
    from lora_export.workflows.delivered import is_package

    options = derive.build(VerifyOptions, given)
    result = api.verify(path, base, adapters, options, progress=talk.progress)
    talk.result(as_json(result) | result.about, verification_words(result))
    if not result.verified:
        click.echo(f"not verified: {sum(not c.passed for c in result.checks)} checks failed", err=True)
        sys.exit(EXIT_FAILED if is_package(Path(path)) else EXIT_GATE)
