"""lora-export switch: another adapter in a merged folder or an export."""

from pathlib import Path
from typing import Any

from lora_export.commands import derive
from lora_export.commands.derive import FOLDER, Given
from lora_export.commands.talk import Talk, table
from lora_export.contracts.options import MergeOptions


@derive.command(
    "switch",
    Given("-m", "--model", required=True, type=FOLDER, metavar="MERGED|ONNX",
          help="A merged folder, or an ONNX export of one. It is changed."),
    Given("--from", "before", required=True, multiple=True, metavar="ADAPTER",
          help="The adapter that is in it (with its weight, as in A:0.7). May be given more than once."),
    Given("--to", "after", required=True, multiple=True, metavar="ADAPTER",
          help="The adapter that replaces it. May be given more than once."),
    Given("-b", "--base", metavar="BASE", default_text="the base that the adapter of --to names",
          help="The base of both adapters."),
    derive.options_of(MergeOptions, without=("force",)),
)  # fmt: skip
def switch(
    talk: Talk, model: Path, before: tuple[str, ...], after: tuple[str, ...], base: str | None, **given: Any
) -> None:
    """Put another adapter into a merged folder, or into its ONNX export, in place.

    The weights are computed from the base, and the result is byte for byte that of a fresh merge, with its
    certificate: nothing drifts, however often it is done. The new folder is made beside the old one, and the two
    exchange their names in one step: whatever kills this command, the folder is either the old one or the new one.

    A merged folder knows the options that it was merged with. For an ONNX folder give them again, if they were not
    the defaults (--dtype, --training-quantization, …).

    \b
        lora-export switch -m MERGED --from A --to B -b BASE
    """
    from lora_export import api

    options = derive.build(MergeOptions, given)
    switched = api.switch(model, before, after, base, options, progress=talk.progress)
    rows = [
        ("switched", f"{switched.tensors} tensors differ; {switched.nbytes / 1e6:,.1f} MB were written"),
        ("time", f"{switched.seconds:.2f} s"),
        ("output", str(switched.output)),
    ]
    talk.result(switched.as_json(), table(rows))
