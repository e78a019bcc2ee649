"""What an adapter has learnt, and a picture of it."""

from pathlib import Path

from lora_export.checkpoint.adapter_files import single_file
from lora_export.checkpoint.pipeline import is_pipeline
from lora_export.contracts import Progress, Understanding
from lora_export.errors import InputError, OutputError
from lora_export.storage.files import output_file

_ENDINGS = (".svg", ".html")


def understand_adapter(
    adapter: Path, base: Path | None, picture: Path | None, force: bool, progress: Progress
) -> Understanding:
    """Read the adapter's numbers, and draw them into `picture`. What is wrong with it is refused before any
    work."""
    from lora_export.adapter_tools.understand import understand
    from lora_export.adapter_tools.understand_files import understand_of_images
    from lora_export.report.adapter_page import picture as drawn

    if picture is not None:
        _check_picture(picture, force)
    of_images = single_file(adapter) is not None or (base is not None and is_pipeline(base))
    learnt = (understand_of_images if of_images else understand)(adapter, base, progress)
    if picture is not None:
        with output_file(picture, force) as work:
            (work / picture.name).write_text(drawn(learnt, picture), encoding="utf-8")
    return learnt


def _check_picture(picture: Path, force: bool) -> None:
    if picture.suffix not in _ENDINGS:
        raise InputError(f"--picture {picture}", expected=f"a name that ends in {' or '.join(_ENDINGS)}")
    if not picture.absolute().parent.is_dir():
        raise OutputError("there is no such folder", where=picture.parent, expected="a folder for the picture")
    if picture.exists() and not force:
        raise OutputError("the picture exists", where=picture, next_step="add --force to replace it")
