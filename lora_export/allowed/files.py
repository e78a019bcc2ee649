"""Types of files: which ones a package may hold, and which ones no folder that a runtime reads may hold."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from lora_export.errors import InputError
from lora_export.folder_files import TOKENIZER_FILES

# Native code by its name, versions included.
_LIBRARY = re.compile(r".*\.(so(\.\d+)*|dll|dylib|pyd|node)", re.IGNORECASE)
_MAGIC = (
    b"\x7fELF",
    b"MZ",
    b"\xfe\xed\xfa\xce",
    b"\xfe\xed\xfa\xcf",
    b"\xce\xfa\xed\xfe",
    b"\xcf\xfa\xed\xfe",
    b"\xca\xfe\xba\xbe",
)
_WEIGHTS = re.compile(r".*\.(onnx|onnx\.data|onnx_data(_\d+)?|safetensors|onnx_adapter|model|spm)")
_DOCUMENTS = TOKENIZER_FILES | {
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "normalizer.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "genai_config.json", "genai_config.cpu.json", "genai_config.cuda.json",
    "audio_processor_config.json", "vision_processor.json",
    "manifest.json", "bom.cdx.json", "model.safetensors.index.json",
    "lora_export_certificate.json", "README.md", "model.sig", "config.pbtxt", "model_index.json",
    "scheduler_config.json",
}  # fmt: skip
_PICTURE = "sample.png"  # beside the README, which shows it
_SHARDS = re.compile(r"(model|diffusion_pytorch_model)(\.[\w-]+)?\.safetensors\.index(\.[\w-]+)?\.json", re.ASCII)
_LICENCE = re.compile(
    r"[^/]*(licen[cs]e|notice|copying|use_policy|usage_policy|copyright)[^/.]*(\.(txt|md|rst|pdf|html))?", re.I
)
TEXTS = frozenset({"", ".txt", ".md", ".rst", ".pdf", ".html"})  # endings of licences


def refuse_libraries(folder: Path) -> None:
    """InputError for a shared library in a folder, by its name or by its first bytes."""
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        if _is_library(path):
            raise InputError(
                f"{path.name} is a shared library, which a runtime could load",
                where=path,
                expected="graphs, weights, configuration and tokenizer",
                next_step="move it out of the folder",
            )


def refuse_strangers(folder: Path, also: Sequence[str] = ()) -> None:
    """InputError for a file of a package that no package of this tool has. also: patterns of further names."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if _is_library(path) or not (_belongs(PurePosixPath(name)) or any(fnmatchcase(path.name, p) for p in also)):
            raise InputError(
                f"{name} is not a type of file that a package contains",
                where=path,
                expected="graphs, weights, configuration, tokenizer, licences and README.md",
                next_step="do not run it; get the package again from its source",
            )


def _belongs(path: PurePosixPath) -> bool:
    if path.name in _DOCUMENTS or _WEIGHTS.fullmatch(path.name) or _SHARDS.fullmatch(path.name):
        return True
    if path.parent.name == "warmup":  # of Triton: a file for each input, named after it
        return path.suffix == ""
    return len(path.parts) == 1 and (path.name == _PICTURE or _LICENCE.fullmatch(path.name) is not None)


def _is_library(path: Path) -> bool:
    if _LIBRARY.fullmatch(path.name):
        return True
    if _WEIGHTS.fullmatch(path.name) or path.suffix in (".data", ".bin"):  # weights may begin with any bytes
        return False
    with path.open("rb") as f:
        return f.read(4).startswith(_MAGIC)
