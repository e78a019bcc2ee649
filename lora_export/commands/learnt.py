"""The part of `lora-export inspect` that reads an adapter's numbers, in words."""

from collections.abc import Sequence
from pathlib import Path

from lora_export.adapter_tools.understand import understand
from lora_export.commands.talk import Talk
from lora_export.contracts import Understanding
from lora_export.errors import InputError, OutputError
from lora_export.storage.documents import as_json
from lora_export.storage.files import output_file

_ENDINGS = (".svg", ".html")


def learnt(adapter: Path, base: Path | None, picture: Path | None, force: bool, every: bool, talk: Talk) -> None:
    """Say what the adapter has learnt; every: list all its weights."""
    from lora_export.report.adapter_page import RANKS_HEAD, TYPES_HEAD, rank_rows, type_rows
    from lora_export.report.adapter_page import picture as drawn

    if picture is not None:
        _check_picture(picture, force)
    found = understand(adapter, base, talk.progress)
    if picture is not None:
        with output_file(picture, force) as work:
            (work / picture.name).write_text(drawn(found, picture), encoding="utf-8")
    blocks = [
        f"{found.adapter}\n" + "\n".join(found.sentences),
        columns([TYPES_HEAD, *type_rows(found)]),
        columns([RANKS_HEAD, *rank_rows(found)]) if found.truncation else "",
        columns([_MODULE_HEAD, *_modules(found)]) if every else "",
        "\n".join(f"without figures: {name}, {why}" for name, why in found.skipped.items()),
        "\n".join(f"warning: {w}" for w in found.warnings) or "no signs of trouble",
        f"picture: {picture}" if picture else "",
    ]
    document = as_json(found) | ({"picture": str(picture)} if picture else {})
    talk.result(document, "\n\n".join(block for block in blocks if block))


def _check_picture(picture: Path, force: bool) -> None:
    if picture.suffix not in _ENDINGS:
        raise InputError(f"--picture {picture}", expected=f"a name that ends in {' or '.join(_ENDINGS)}")
    if not picture.absolute().parent.is_dir():
        raise OutputError("there is no such folder", where=picture.parent, expected="a folder for the picture")
    if picture.exists() and not force:
        raise OutputError("the picture exists", where=picture, next_step="add --force to replace it")


_MODULE_HEAD = ("Weight", "Rank", "Alpha", "Scaling", "‖ΔW‖", "‖ΔW‖/‖W‖", "σ₁", "σ last", "Effective", "For 99 %")


def _modules(found: Understanding) -> list[Sequence[str]]:
    def known(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        (
            m.name.removesuffix(".weight"), known(m.rank, "d"), known(m.alpha, "g"), known(m.scaling, "g"),
            f"{m.norm:.4g}", known(m.relative, ".2%"), f"{m.singular_values[0]:.3g}",
            f"{m.singular_values[min(m.rank or len(m.singular_values), len(m.singular_values)) - 1]:.3g}",
            f"{m.effective_rank:.1f}", str(m.enough),
        )
        for m in found.modules if m.singular_values
    ]  # fmt: skip


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows under each other, the first column to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
