"""The small files that go into every package: configuration, tokenizer, chat template, licences."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.allowed.files import TEXTS
from lora_export.errors import InputError
from lora_export.folder_files import TOKENIZER_FILES, is_whole_tokenizer
from lora_export.packages.configs import for_both, tokenizer_for_both
from lora_export.packages.job import Run
from lora_export.storage import sealed

# What a processor and generation read; tokenizer_config.json is written anew.
_READ = (TOKENIZER_FILES - {"tokenizer_config.json"}) | {
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "normalizer.json",
    "modules.json",
    "sentence_bert_config.json", "config_sentence_transformers.json",
}  # fmt: skip
_LICENCES = ("licence", "license", "notice", "copying", "use_policy", "usage_policy", "copyright")


def check(run: Run) -> None:
    """InputError for a run that lacks what its users cannot do without: a tokenizer, a promised chat template, a
    processor of sound or images."""
    present = {p.name for p in run.companions.iterdir()}
    if run.task.input in ("text", "both") and not is_whole_tokenizer(present):
        raise _missing(run, "no tokenizer", "tokenizer.json, tokenizer.model, or vocab.json with merges.txt")
    if run.task.input != "text" and not {"preprocessor_config.json", "processor_config.json"} & present:
        raise _missing(run, "no preprocessor", "preprocessor_config.json")
    if run.task.generates and run.task.input == "audio" and "tokenizer.json" not in present:
        raise _missing(run, "no tokenizer", "tokenizer.json")
    if _promises_chat(run) and not _has_chat(run.companions, present):
        raise _missing(run, "no chat template, and its name says that it is a chat model", "chat_template.jinja")


def _promises_chat(run: Run) -> bool:
    """Whether the base says in its name that it was tuned to chat."""
    if run.task.name != "text-generation":
        return False
    words = run.manifest.base.name.lower().replace("_", "-").replace("/", "-").split("-")
    return bool({"instruct", "chat", "it"} & set(words))


def _has_chat(folder: Path, present: set[str]) -> bool:
    if {"chat_template.jinja", "chat_template.json"} & present:
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and "chat_template" in sealed.read_json(path)


def _missing(run: Run, found: str, expected: str) -> InputError:
    return InputError(
        f"the run has {found}",
        where=run.companions,
        expected=f"{expected}, without which a package cannot be used",
        next_step="copy it into the base's folder and repeat the run",
    )


def lay(run: Run, target: Path, changes: Mapping[str, Any] | None = None) -> None:
    """Write configuration, tokenizer and processor into `target`. changes: keys of config.json that this runtime
    needs besides."""
    sealed.write_settings(target / "config.json", for_both(run.config) | dict(changes or {}))
    lay_tokenizer(run, target)
    if (run.companions / "modules.json").is_file():  # sentence-transformers
        modules = (*run.companions.glob("*/config.json"), *run.companions.glob("*/model.safetensors"))
        for path in sorted(modules):
            sealed.refuse_outward_link(path, run.companions)
            (target / path.parent.name).mkdir(exist_ok=True)
            sealed.copy(path, target / path.parent.name / path.name, run.companions)


def lay_tokenizer(run: Run, target: Path) -> None:
    for path in sorted(run.companions.iterdir()):
        if path.name in _READ and path.is_file():
            sealed.copy(path, target / path.name)
    # A base without one gets what the exporter made for it.
    places = [folder / "tokenizer_config.json" for folder in (run.companions, run.export.output)]
    settings = next((p for p in places if p.is_file()), None)
    if settings is not None or (target / "tokenizer.json").is_file():
        config = sealed.read_json(settings) if settings else {"tokenizer_class": "TokenizersBackend"}
        sealed.write_settings(target / "tokenizer_config.json", tokenizer_for_both(config))


def lay_licences(run: Run, target: Path) -> None:
    for path in licences(run):
        sealed.copy(path, target / path.name)


def licences(run: Run) -> list[Path]:
    """The files that a model's licence asks to be handed on."""
    return [
        path
        for path in sorted(run.companions.iterdir())
        if path.is_file() and path.name.lower().startswith(_LICENCES) and path.suffix.lower() in TEXTS
    ]
