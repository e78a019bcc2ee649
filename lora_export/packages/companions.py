"""The small files of every package: configuration, tokenizer, chat template, licences.

Configurations are written so that transformers 4.57 and 5 read them alike. 5 writes the rotary embedding as
`rope_parameters` and has a tokenizer class of its own; 4.57 silently takes the default theta instead of the first,
and stops at the second. Each version reads its own spelling, so both are written. A tokenizer without a limit gets
the model's own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.allowed.files import TEXTS
from lora_export.errors import InputError
from lora_export.folder_files import SENTENCE_MODULES, TOKENIZER_FILES, is_whole_tokenizer
from lora_export.packages import text_length
from lora_export.packages.job import Run
from lora_export.storage import sealed

_TOKENIZER_CONFIG, _FAST = "tokenizer_config.json", "tokenizer.json"
_SENTENCE = "sentence_bert_config.json"
# What processors and generation read. tokenizer_config.json is written anew.
_READ = (TOKENIZER_FILES - {_TOKENIZER_CONFIG}) | {
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "normalizer.json",
    "modules.json", _SENTENCE, "config_sentence_transformers.json",
}  # fmt: skip
_LICENCES = ("licence", "license", "notice", "copying", "use_policy", "usage_policy", "copyright")
_CLASS_OF_5, _CLASS_OF_4 = "TokenizersBackend", "PreTrainedTokenizerFast"
_INPUTS_OF_5 = ("input_ids", "attention_mask")  # where the file names none; 4.57's default has token_type_ids
# rope_parameters by layer type → the legacy keys of ModernBERT and of Gemma 3.
_LOCAL = {"modernbert": "local_rope_theta", "gemma3_text": "rope_local_base_freq", "gemma3": "rope_local_base_freq"}
_ORIGINAL = "original_max_position_embeddings"
_GLOBAL = {"modernbert": "global_rope_theta"}


def check(run: Run) -> None:
    """InputError for a run without a file that a package needs: a tokenizer, a promised chat template, or a
    processor of sound or images."""
    present, task = {p.name for p in run.companions.iterdir()}, run.task
    if task.input in ("text", "both") and not is_whole_tokenizer(present):
        raise _missing(run, "no tokenizer", "tokenizer.json, tokenizer.model, or vocab.json with merges.txt")
    if task.input != "text" and not {"preprocessor_config.json", "processor_config.json"} & present:
        raise _missing(run, "no preprocessor", "preprocessor_config.json")
    if task.generates and task.input in ("audio", "image") and not has_fast_tokenizer(run):
        raise _missing(run, "no tokenizer", "tokenizer.json")
    if task.name == "text-generation" and _promises_chat(run.manifest.base.name) and not _has_chat(run, present):
        raise _missing(run, "no chat template, and its name says that it is a chat model", "chat_template.jinja")


def has_fast_tokenizer(run: Run) -> bool:
    """Whether there is a tokenizer.json: the base's, or the export's."""
    return any((folder / _FAST).is_file() for folder in (run.companions, run.export.output))


def _promises_chat(base: str) -> bool:
    """Whether a base says in its name that it was tuned to chat."""
    return bool({"instruct", "chat", "it"} & {*base.lower().replace("_", "-").replace("/", "-").split("-")})


def _has_chat(run: Run, present: set[str]) -> bool:
    if {"chat_template.jinja", "chat_template.json"} & present:
        return True
    return _TOKENIZER_CONFIG in present and "chat_template" in sealed.read_json(run.companions / _TOKENIZER_CONFIG)


def _missing(run: Run, found: str, expected: str) -> InputError:
    return InputError(
        f"the run has {found}",
        where=run.companions,
        expected=f"{expected}, without which a package cannot be used",
        next_step="copy it into the base's folder and repeat the run",
    )


def lay(run: Run, target: Path, changes: Mapping[str, Any] | None = None, *, modules: bool = True) -> None:
    """Write configuration, tokenizer and processor into `target`. changes: further keys of config.json; modules:
    whether with the folders of sentence-transformers' modules and their list."""
    sealed.write_settings(target / "config.json", for_both(run.config) | dict(changes or {}))
    _lay_tokenizer(run, target)
    if not modules:
        (target / SENTENCE_MODULES).unlink(missing_ok=True)
    elif (run.companions / SENTENCE_MODULES).is_file():
        files = (*run.companions.glob("*/config.json"), *run.companions.glob("*/model.safetensors"))
        for path in sorted(files):
            sealed.refuse_outward_link(path, run.companions)
            (target / path.parent.name).mkdir(exist_ok=True)
            sealed.copy(path, target / path.parent.name / path.name, run.companions)


def _lay_tokenizer(run: Run, target: Path) -> None:
    for path in sorted(run.companions.iterdir()):
        if path.name in _READ and path.is_file():
            sealed.copy(path, target / path.name)
    made = run.export.output / _FAST
    if made.is_file() and not (target / _FAST).is_file():  # the export's, of SentencePiece files
        sealed.copy(made, target / _FAST)
    # A base without one gets the one that the exporter made for it.
    places = [folder / _TOKENIZER_CONFIG for folder in (run.companions, run.export.output)]
    settings = next((p for p in places if p.is_file()), None)
    if settings is not None or (target / _FAST).is_file():
        config = sealed.read_json(settings) if settings else {"tokenizer_class": _CLASS_OF_5}
        sentence = run.companions / _SENTENCE
        most = text_length.most_tokens(run.config, sealed.read_json(sentence) if sentence.is_file() else {})
        sealed.write_settings(target / _TOKENIZER_CONFIG, text_length.bounded(tokenizer_for_both(config), most))


def licences(run: Run) -> list[Path]:
    """The files that a model's licence requires to be passed on."""
    return [
        path
        for path in sorted(run.companions.iterdir())
        if path.is_file() and path.name.lower().startswith(_LICENCES) and path.suffix.lower() in TEXTS
    ]


def for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the legacy spelling beside the new one, in nested configurations too.

    Values that are there already stay as they are.
    """
    both = {k: for_both(v) if k.endswith("_config") and isinstance(v, dict) else v for k, v in config.items()}
    legacy = _legacy_rope(both)
    if isinstance(both.get("dtype"), str):
        legacy["torch_dtype"] = both["dtype"]
    return both | {k: v for k, v in legacy.items() if k not in both}


def _legacy_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    kind = str(config.get("model_type"))
    if "rope_type" in rope or "rope_theta" in rope:
        return _of_one_layer_type(rope, "rope_theta")
    legacy: dict[str, Any] = {}
    if isinstance(rope.get("full_attention"), dict):
        legacy |= _of_one_layer_type(rope["full_attention"], _GLOBAL.get(kind, "rope_theta"))
    local = rope.get("sliding_attention")
    if isinstance(local, dict) and kind in _LOCAL:
        legacy[_LOCAL[kind]] = local.get("rope_theta")
    return legacy


def _of_one_layer_type(rope: Mapping[str, Any], theta: str) -> dict[str, Any]:
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    legacy = {theta: rope["rope_theta"]} if "rope_theta" in rope else {}
    if "partial_rotary_factor" in rope:
        legacy["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if scaling.get("rope_type", "default") == "default":
        return legacy | {"rope_scaling": None}
    if scaling["rope_type"] == "longrope":
        return legacy | _long(scaling)
    return legacy | {"rope_scaling": scaling}


def _long(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """4.57 refuses a Phi-3 whose rope_scaling has more than three fields, and finds the original length beside it.

    An attention factor of its own has no place there, and stays, so that 4.57 refuses it: it would compute another.
    """
    moved = ("rope_type", _ORIGINAL, "factor")
    kept = {k: v for k, v in scaling.items() if k not in moved and v is not None}
    original = {_ORIGINAL: scaling[_ORIGINAL]} if scaling.get(_ORIGINAL) else {}
    return {"rope_scaling": {"type": "longrope", **kept}, **original}


def tokenizer_for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that names a class that both know, without the place that it was loaded from."""
    both = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only")}
    if both.get("tokenizer_class") == _CLASS_OF_5:
        both["tokenizer_class"] = _CLASS_OF_4
        both.setdefault("model_input_names", list(_INPUTS_OF_5))
    extra = both.get("extra_special_tokens")
    if isinstance(extra, list):  # 4.57 wants a name for each, and has another key for tokens without one
        del both["extra_special_tokens"]
        both.setdefault("additional_special_tokens", extra)
    return both
