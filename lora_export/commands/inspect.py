"""lora-export inspect: what is this folder, and what has this adapter learnt?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_export.commands import derive
from lora_export.commands.derive import FOLDER, Given
from lora_export.commands.inspected import columns, found_words
from lora_export.commands.talk import Talk

if TYPE_CHECKING:
    from lora_export.contracts import Understanding


@derive.command(
    "inspect",
    click.Argument(["path"], required=False),
    Given("-a", "--adapter", metavar="ADAPTER", help="Read this adapter's numbers and say what it has learnt."),
    Given("-b", "--base", help="For an adapter: the base to match it with; with -a also to compare sizes with."),
    Given("--picture", type=FOLDER, metavar="FILE",
          help="With -a: a heat map by layer and module, as FILE.svg, or FILE.html with everything."),
    derive.FORCE,
)  # fmt: skip
def inspect(
    talk: Talk, path: str | None, adapter: str | None, base: str | None, picture: Path | None, force: bool
) -> None:
    """Say what PATH is (base, adapter, ONNX export, run, package or fleet), or what an adapter has learnt.

    Reads headers only, and answers at once. With -b, an adapter is matched with that base, tensor by tensor.

    With -a it reads an adapter's numbers: for each weight rank, alpha and scaling, ‖ΔW‖ and (with -b) ‖ΔW‖/‖W‖,
    singular values, effective rank, and what each lower rank would keep; whether the rank was too large or too
    small, which modules did the work, and signs of trouble. -v lists every weight, --json every figure.

    \b
        lora-export inspect FOLDER
        lora-export inspect -a ADAPTER -b BASE --picture adapter.html
    """
    from lora_export import api
    from lora_export.storage.documents import as_json

    if adapter is not None and path is None:
        learnt = api.understand(adapter, base, picture, force, progress=talk.progress)
        document = as_json(learnt) | ({"picture": str(picture)} if picture else {})
        talk.result(document, _learnt_words(learnt, picture, talk.verbose))
        return
    if path is None or adapter is not None:
        raise click.UsageError("Give either a PATH or -a ADAPTER.")
    if picture is not None:
        raise click.UsageError("--picture shows the numbers of an adapter: give it as -a ADAPTER.")
    document = api.inspect(path, base)
    talk.result(document, found_words(document))


# --- what an adapter has learnt ------------------------------------------------------------------------------


def _learnt_words(learnt: "Understanding", picture: Path | None, every: bool) -> str:
    """every: list all its weights."""
    from lora_export.report.adapter_page import RANKS_HEAD, TYPES_HEAD, rank_rows, type_rows

    blocks = [
        f"{learnt.adapter}\n" + "\n".join(learnt.sentences),
        columns([TYPES_HEAD, *type_rows(learnt)]),
        columns([RANKS_HEAD, *rank_rows(learnt)]) if learnt.truncation else "",
        columns([_MODULE_HEAD, *_modules(learnt)]) if every else "",
        "\n".join(f"without figures: {name}, {why}" for name, why in learnt.skipped.items()),
        "\n".join(f"warning: {w}" for w in learnt.warnings) or "no signs of trouble",
        f"picture: {picture}" if picture else "",
    ]
    return "\n\n".join(block for block in blocks if block)


_MODULE_HEAD = ("Weight", "Rank", "Alpha", "Scaling", "‖ΔW‖", "‖ΔW‖/‖W‖", "σ₁", "σ last", "Effective", "For 99 %")


def _modules(learnt: "Understanding") -> list[Sequence[str]]:
    def known(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        (
            m.name.removesuffix(".weight"), known(m.rank, "d"), known(m.alpha, "g"), known(m.scaling, "g"),
            f"{m.norm:.4g}", known(m.relative, ".2%"), f"{m.singular_values[0]:.3g}",
            f"{m.singular_values[min(m.rank or len(m.singular_values), len(m.singular_values)) - 1]:.3g}",
            f"{m.effective_rank:.1f}", str(m.enough),
        )
        for m in learnt.modules if m.singular_values
    ]  # fmt: skip
