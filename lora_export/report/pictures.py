"""What a report says about a pipeline of images: its pictures, its models, its adapters, the denoiser's errors."""

import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path

from lora_export.contracts import Check, MergeResult, Picture, PipelineFacts, Report, ValidationResult
from lora_export.escape import one_line
from lora_export.report.drawing import BASE, MERGED, PLUGGED, PYTORCH, UNMERGED, drawable, figure, quiet, svg
from lora_export.wording import DASH, decibels, number, percent

Row = tuple[str, ...]
FOLDER = "pictures"  # beside report.json
MODELS_HEAD = ("Model", "Class", "Updated", "Copied", "Kinds", "Survived", "Type")
CHECKS_HEAD = (
    "Model",
    "Wrong tensors",
    "Merged against unmerged",
    "Graph against PyTorch",
    "Graph against unmerged",
)
ADAPTERS_HEAD = ("Adapter", "Format", "Modules", "Kinds", "Weight")
REFERENCE = "unmerged"
_LARGEST = 4 * 2**20  # bytes of a picture in the page
_MAGIC = b"\x89PNG\r\n\x1a\n"
_FILE = re.compile(r"\w[\w.-]*\.png")
_AT_TIME = re.compile(r"(?P<model>\w+?)_t(?P<time>\d{1,5})_max_abs")
_WORDS = {
    "base": "what the base paints",
    REFERENCE: "the adapter beside the base, as it was trained: the reference",
    "merged": "the merged weights",
}
_COLOURS = (MERGED, UNMERGED, PLUGGED, PYTORCH, BASE)
_FEW = 128  # pixels below which a picture is drawn with visible pixels


@dataclass(frozen=True)
class Shown:
    """A picture on the page. source: a data URI, or None where the file is missing or is no picture."""

    name: str
    words: str
    source: str | None
    file: str
    width: int
    height: int

    @property
    def style(self) -> str:
        return "pixels" if self.width < _FEW else ""


_OF_MODEL = re.compile(
    r"(?P<graph>onnx_(?:(?:fp32|fp16|bf16|int8|int4|nf4)_)?)?"
    r"(?P<model>(?:unet|transformer|text_encoder|vae|prior|image_encoder|model)(?:_(?:\d|encoder|decoder))?)_"
    r"(?:t\d+_)?(?P<check>tensor_errors|stored_tensors_differ|weight_errors|graph_max_abs|max_abs)"
)


def load(report: Report, folder: Path) -> dict[str, str]:
    """File name → data URI, of the pictures in a report's folder that can be shown."""
    validate = report.validate
    files = [p.file for p in validate.pictures] if validate else []
    found = {}
    for name in files:
        path = folder / FOLDER / name
        if _FILE.fullmatch(name) and path.is_file() and not path.is_symlink() and path.stat().st_size <= _LARGEST:
            data = path.read_bytes()
            if data.startswith(_MAGIC):
                found[name] = f"data:image/png;base64,{b64encode(data).decode()}"
    return found


def copy(images: Mapping[str, str], folder: Path, target: Path) -> None:
    """The files of what `load` found, into another report's folder."""
    for name in images:
        (target / FOLDER).mkdir(exist_ok=True)
        (target / FOLDER / name).write_bytes((folder / FOLDER / name).read_bytes())


def pictures(validate: ValidationResult, sources: Mapping[str, str]) -> list[Shown]:
    """The pictures that models made: the base's first, then the reference, then what is judged."""
    made = [p for p in validate.pictures if p.gain is None]
    order = {"base": 0, REFERENCE: 1, "merged": 2}
    return [_shown(p, sources) for p in sorted(made, key=lambda p: order.get(p.name, len(order)))]


def differences(validate: ValidationResult, sources: Mapping[str, str]) -> list[Shown | None]:
    """Below each of `pictures` its difference from the reference; None where there is none."""
    made = {one_line(p.name.split(" − ")[0]): p for p in validate.pictures if p.gain is not None}
    below = [made.get(p.name) for p in pictures(validate, sources)]
    return [_shown(p, sources) if p is not None else None for p in below]


def _shown(picture: Picture, sources: Mapping[str, str]) -> Shown:
    return Shown(
        one_line(picture.name),
        _in_words(picture),
        sources.get(picture.file),
        picture.file if _FILE.fullmatch(picture.file) else "",
        picture.width,
        picture.height,
    )


def _in_words(picture: Picture) -> str:
    if picture.gain is not None:
        return "the differences" + (f" × {number(picture.gain)}" if picture.gain != 1 else ", as they are")
    what = _WORDS.get(picture.name, "through the graphs" if picture.name.startswith("onnx") else "")
    return ", ".join(text for text in (what, _near(picture.psnr, picture.name)) if text)


def sentence(validate: ValidationResult) -> str:
    """For the head of the page: how near the pictures are."""
    near = {p.name: _near(p.psnr) for p in validate.pictures if p.gain is None and p.name != REFERENCE}
    judged = [f"{one_line(name)}: {text}" for name, text in near.items() if name != "base"]
    if not judged:
        return ""
    base = f", and the base's own picture {near['base']}" if "base" in near else ""
    return f"Against the unmerged pipeline's picture, by PSNR, {'; '.join(judged)}{base}."


def _near(psnr: float | None, name: str = "") -> str:
    """How near a picture is to the unmerged one."""
    if psnr is None:
        return ""
    return decibels(psnr) + (" from it" if name == "base" else "")


# --- tables --------------------------------------------------------------------------------------------------


def models(pipeline: PipelineFacts, merge: MergeResult | None) -> list[Row]:
    """Each model of the pipeline, and what the merge did with it."""
    rows: list[Row] = []
    for name, class_name in pipeline.models.items():
        part = merge.components.get(name) if merge else None
        if part is None:
            left = "left as it is, as asked" if name in pipeline.skipped else "byte for byte"
            rows.append((one_line(name), one_line(class_name), DASH, left, DASH, DASH, DASH))
            continue
        changed = part.tensors.get("updated", 0) + part.tensors.get("replaced", 0)
        rows.append(
            (
                one_line(name),
                one_line(class_name),
                number(changed),
                number(part.tensors.get("copied", 0)),
                _counts(part.kinds),
                percent(part.delta_survival),
                one_line(part.dtype),
            )
        )
    return rows


def adapters(pipeline: PipelineFacts) -> list[Row]:
    return [
        (
            one_line(a.name),
            one_line(a.format) + (f", {len(a.vectors)} new words" if a.vectors else ""),
            _counts(a.modules),
            _counts(a.kinds),
            number(a.weight),
        )
        for a in pipeline.adapters
    ]


def metadata(pipeline: PipelineFacts) -> list[tuple[str, str]]:
    """What the files say of themselves."""
    return [(one_line(key), one_line(value)) for a in pipeline.adapters for key, value in a.metadata.items()]


def _counts(values: Mapping[str, int]) -> str:
    return ", ".join(f"{one_line(name)} {number(count)}" for name, count in values.items()) or DASH


def model_checks(validate: ValidationResult) -> list[Row]:
    """Of each model that checks name: its wrong tensors, and how much of what is allowed its outputs differ by."""
    found: dict[str, dict[str, Check]] = {}
    for check in validate.checks:
        match = _OF_MODEL.fullmatch(check.name)
        if match:
            column = ("graph " if match["graph"] else "") + match["check"]
            known = found.setdefault(match["model"], {}).get(column)
            if known is None or not _share(check) <= _share(known):
                found[match["model"]][column] = check
    rows: list[Row] = []
    for model, checks in found.items():
        stored = [
            checks[n] for n in ("tensor_errors", "stored_tensors_differ", "graph weight_errors") if n in checks
        ]
        outputs = (checks.get(n) for n in ("max_abs", "graph graph_max_abs", "graph max_abs"))
        wrong = DASH if not stored else number(sum(c.value for c in stored))
        rows.append((one_line(model), wrong, *(_in_limits(c) for c in outputs)))
    return rows


def _in_limits(check: Check | None) -> str:
    return DASH if check is None else f"{number(check.value, 2)}, {percent(_share(check), 0)} of the limit"


def _share(check: Check) -> float:
    """Of what is allowed; infinite where that is nothing, or the value is no number."""
    allowed = check.threshold
    if allowed and not isnan(check.value):
        return check.value / allowed
    return 0.0 if check.value == 0 else inf


# --- the denoiser over the scheduler's range -----------------------------------------------------------------


@dataclass(frozen=True)
class AtTime:
    """An error at a timestep, and the most that it may be. model: of the check's name."""

    model: str
    time: int
    error: float
    allowed: float


def at_times(validate: ValidationResult) -> list[AtTime]:
    found = []
    for check in validate.checks:
        match = _AT_TIME.fullmatch(check.name)
        if match and check.threshold is not None:
            found.append(AtTime(match["model"], int(match["time"]), check.value, check.threshold))
    return found


def errors(validate: ValidationResult) -> str | None:
    """Errors of the denoiser over the scheduler's range (points), and what is allowed (lines)."""
    rows = [e for e in at_times(validate) if (drawable(e.error) or 0) > 0 and (drawable(e.allowed) or 0) > 0]
    if not rows:
        return None
    names = list(dict.fromkeys(e.model for e in rows))
    with figure(2.3) as fig:
        ax = fig.subplots()
        for name, colour in zip(names, _COLOURS, strict=False):
            own = sorted((e.time, e.error, e.allowed) for e in rows if e.model == name)
            times, values, limits = zip(*own, strict=True)
            ax.semilogy(times, values, "o-", color=colour, lw=1.2, ms=4, label=one_line(name).replace("_", " "))
            ax.semilogy(times, limits, ":", color=colour, lw=1)
        low, high = ax.get_ylim()
        ax.set_ylim(low / 2, high * 3)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        ax.yaxis.set_minor_formatter(lambda value, _: "")
        ax.set_xlabel("timestep")
        ax.set_ylabel("largest error")
        ax.legend(frameon=False, fontsize=8)
        quiet(ax, "y")
        return svg(fig, "Errors of the denoiser by timestep, and what is allowed")
