"""The report of a run: who made it, of what, and what each stage found."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lora_export import manifest
from lora_export.contracts import (
    AdapterChoice,
    NamedAdapter,
    NamedSource,
    NamedSources,
    Report,
    ReportPages,
    Source,
    Story,
    StoryOptions,
)
from lora_export.contracts.option import kept
from lora_export.contracts.report import SCHEMA_VERSION
from lora_export.storage.sealed import refuse_outward_link
from lora_export.version import __version__


def write_report(
    story: Story,
    stage: Path,
    base: Source,
    adapters: Sequence[AdapterChoice],
    options: StoryOptions,
) -> None:
    """Into the folder `report` of the stage. Paths in it start at the run's folder."""
    from lora_export.report import write

    passed = story.validate is not None and story.validate.passed
    slower = story.benchmark is not None and story.benchmark.verdict == "slower"
    merge, export, root = story.merge, story.export, story.output
    report = replace(
        new_report("merge-and-export", kept(options), base, adapters),
        status="passed" if passed and not slower else "failed",
        merge=replace(merge, output=_inside(root, merge.output), certificate=_inside(root, merge.certificate)),
        validate=story.validate,
        export=replace(export, output=_inside(root, export.output)) if export else None,
        benchmark=story.benchmark,
        budget=story.budget,
        pipeline=story.pipeline,
        cache=story.cache,
    )
    write(report, stage / "report")


def _inside(root: Path, path: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


def new_report(
    title: str,
    options: Mapping[str, object],
    base: Source | None = None,
    adapters: Sequence[AdapterChoice] = (),
) -> Report:
    """A report without any stage: who made it, when, from what. Names, never folders of this machine."""
    names = [a.folder.resolve().name for a in adapters]
    return Report(
        schema_version=SCHEMA_VERSION,
        title=f"{' + '.join(names)} on {base.folder.resolve().name}" if base and names else title,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool_version=__version__,
        status="passed",
        options=options,
        sources=NamedSources(
            base=NamedSource(**manifest.named(base)) if base else None,
            adapters=tuple(NamedAdapter(**manifest.named(a.source), weight=a.weight) for a in adapters),
        ),
    )


def render(run: Path) -> ReportPages:
    """Write the pages of a finished run or benchmark again, from its report.json."""
    from lora_export.report import render as draw

    folder = _report_folder(run)
    draw(folder)
    return _pages(folder)


def compare(run: Path, other: Path, output: Path | None = None, *, force: bool = False) -> ReportPages:
    """Write the pages of a run beside those of another one into the new folder `output`.

    None: RUN-vs-OTHER beside the run, never in it, as its manifest seals what is in it.
    """
    from lora_export.report import compare as draw

    home = run.resolve()
    output = output or home.with_name(f"{home.name}-vs-{other.resolve().name}")
    draw(_report_folder(run), _report_folder(other), output, force=force, inputs=[run, other])
    return _pages(output)


def _pages(folder: Path) -> ReportPages:
    return ReportPages(folder / "report.html", folder / "report.md")


def _report_folder(run: Path) -> Path:
    """The folder of report.json: in a run, or a benchmark's own."""
    inner = run / "report"
    if not inner.is_dir():
        return run
    refuse_outward_link(inner)
    return inner
