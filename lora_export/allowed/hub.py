"""What transformers, sentence-transformers and transformers.js read in a model's folder.

config.json has keys of hundreds of architectures, so values are listed here: nothing passes, at any depth, that
makes a library import code, a kernel or a file by name. Documents with few keys have lists of keys.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.allowed.fields import FILE, WHOLE, Rule, Value, check, read
from lora_export.errors import CheckpointError
from lora_export.storage import sealed
from lora_export.storage.documents import walk

_CODE = "makes transformers run code that came with the model"
_REDIRECTED = "makes transformers read other weights than those of the folder"
# Keys that must have no value, at any depth, and what they do.
REFUSED: Mapping[str, str] = {
    "auto_map": _CODE, "custom_pipelines": _CODE, "trust_remote_code": _CODE, "custom_generate": _CODE,
    "_attn_implementation_internal": _CODE, "_experts_implementation_internal": _CODE, "kernel_config": _CODE,
    "use_kernels": _CODE, "allow_all_kernels": _CODE, "compile_config": _CODE,
    "transformers_weights": _REDIRECTED, "gguf_file": _REDIRECTED, "_adapter_model_path": _REDIRECTED,
}  # fmt: skip
# Implementations that are part of transformers; any other string names a kernel on a hub.
_IMPLEMENTATIONS = frozenset(
    {
        "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "grouped_mm", "batched_mm",
    }
)  # fmt: skip
# Attributes with an underscore are transformers' own: only those that its models save may be set to a string.
_INTERNAL = frozenset(
    {
        "_name_or_path", "_attn_implementation", "_experts_implementation", "_class_name", "_commit_hash",
        "_diffusers_version", "_from_model_config", "_model_name_or_path", "__version__",
    }
)  # fmt: skip
# What transformers writes for a number that JSON lacks: {"__float__": "Infinity"}.
_NUMBERS = frozenset({"Infinity", "-Infinity", "NaN"})
# The name of a class that reads text, sound or images; a name with a dot or a slash is looked up elsewhere.
_READER = re.compile(
    r"[A-Za-z]\w*(Tokenizer|TokenizerFast|Backend|Processor|ProcessorFast|ProcessorPil|FeatureExtractor)"
)
_READERS = frozenset(
    {
        "tokenizer_class", "processor_class", "image_processor_type", "image_processor_class",
        "feature_extractor_type", "feature_extractor_class", "video_processor_type", "video_processor_class",
    }
)  # fmt: skip
_SENTENCE = re.compile(r"sentence_transformers(\.[A-Za-z_]\w*)+")
_ACTIVATION = re.compile(r"torch\.nn\.modules\.(activation|linear)\.[A-Z]\w*")
_KEYWORDS = Value("words", lambda v: isinstance(v, str) and v.isidentifier())
_FOLDER = Value("'' or the plain name of a folder", lambda v: v == "" or FILE.holds(v))
_MODULES: Rule = [
    {
        "idx": WHOLE,
        "name": Value("a string", lambda v: isinstance(v, str)),
        "path": _FOLDER,
        "type": Value("a class of sentence_transformers", lambda v: isinstance(v, str) and _matches(_SENTENCE, v)),
        "kwargs": [_KEYWORDS],
    }
]
# Keys of generation_config.json that may have a string. Numbers name nothing, whatever their key.
_GENERATION_TEXTS = frozenset(
    {
        "transformers_version", "chat_format", "dtype", "early_stopping", "language", "model_type",
        "num_assistant_tokens_schedule", "speculation_type", "stop_strings", "task", "torch_dtype",
    }
)  # fmt: skip
_CACHES = frozenset(
    {
        "dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "hybrid", "hybrid_chunked",
        "offloaded_hybrid", "sliding_window",
    }
)  # fmt: skip


def check_config(config: Any, where: Path) -> None:
    """CheckpointError, with the key, for what makes a library load something that the folder names."""
    for key, value in _pairs(_without_torchao(config), where):
        if key in REFUSED and value:
            raise CheckpointError(
                f"the key {key!r} {REFUSED[key]}",
                where=where,
                expected="a model that transformers itself implements",
                next_step=f"remove {key!r} from the file if the model works without it",
            )
        for wrong, expected in _faults(key, value):
            raise CheckpointError(
                f"{key} is {wrong!r}, which names something to load",
                where=where,
                expected=expected,
                next_step=f"remove {key!r} from the file if the model works without it",
            )


def _without_torchao(config: Any) -> Any:
    """The configuration without torchao's quant_type, which names a class: transformers loads no such folder."""
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or settings.get("quant_method") != "torchao":
        return config
    return {**config, "quantization_config": {k: v for k, v in settings.items() if k != "quant_type"}}


def _pairs(document: Any, where: Path) -> Iterator[tuple[str, Any]]:
    for value in walk(document, where):
        if isinstance(value, dict):
            yield from value.items()


def _faults(key: str, value: Any) -> Iterator[tuple[Any, str]]:
    if key.endswith(("attn_implementation", "experts_implementation")):
        each = value.values() if isinstance(value, dict) else [value]
        for one in each:
            if one is not None and not (isinstance(one, str) and one in _IMPLEMENTATIONS):
                yield one, ", ".join(sorted(_IMPLEMENTATIONS))
    elif key == "__float__":
        if not (isinstance(value, str) and value in _NUMBERS):
            yield value, ", ".join(sorted(_NUMBERS))
    elif key.startswith("_") and key not in _INTERNAL and not _inert(value):
        yield value, "a number, true, false or null: the name is one of transformers' own attributes"
    elif key in _READERS and not (value is None or (isinstance(value, str) and _matches(_READER, value))):
        yield value, "the name of a class of transformers that reads text, sound or images"
    elif key == "megatron_core" and value not in (None, "megatron.core"):
        yield value, "megatron.core"
    elif key == "activation_function" and "." in str(value) and not _matches(_ACTIVATION, str(value)):
        yield value, "an activation of torch.nn"


def check_quantization(config: Mapping[str, Any], where: Path) -> None:
    """CheckpointError for a quantization whose library transformers would call with settings of the file.

    Only methods that this tool reads itself pass, and of those transformers is only ever given bitsandbytes.
    """
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None:
        return
    from lora_export.quantization.registry import formats

    if method not in formats():
        raise CheckpointError(f"quant_method is {method!r}", where=where, expected=", ".join(sorted(formats())))


def check_tokenizer(config: Mapping[str, Any], where: Path) -> None:
    """As check_config; and every file that a tokenizer reads is beside its configuration."""
    check_config(config, where)
    for key, value in config.items():
        # Old versions recorded where these two files once were, and no version reads them there.
        if not key.endswith(("_file", "_files", "_spm")) or key in (
            "special_tokens_map_file",
            "tokenizer_config_file",
        ):
            continue
        names = value if isinstance(value, list) else [value]
        for name in names:
            if name is not None and not FILE.holds(name):
                raise CheckpointError(
                    f"{key} is {name!r}, which is outside the folder",
                    where=where,
                    expected=FILE.expected,
                    next_step=f"remove {key!r} from the file",
                )


def check_generation(config: Mapping[str, Any], where: Path) -> None:
    """As check_config; and only known keys may have a string."""
    check_config(config, where)
    for key, value in config.items():
        if key == "cache_implementation" and value is not None and value not in _CACHES:
            raise CheckpointError(f"{key} is {value!r}", where=where, expected=", ".join(sorted(_CACHES)))
        if key not in _GENERATION_TEXTS | _INTERNAL | {"cache_implementation"} and not _inert(value):
            raise CheckpointError(
                f"generation_config.json has a string under the key {key!r}, which is not on the list",
                where=where,
                expected=f"numbers, or a string under one of {', '.join(sorted(_GENERATION_TEXTS))}",
                next_step=f"remove {key!r} from the file",
            )


def check_modules(modules: Any, where: Path) -> None:
    """InputError unless modules.json names classes of sentence_transformers, and folders beside it."""
    check(modules, _MODULES, where.name, where)


def _inert(value: Any) -> bool:
    """Whether a value contains no string, apart from keys of objects: a number cannot name what to load."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            return False
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []
    return True


def _matches(pattern: re.Pattern[str], value: str) -> bool:
    return pattern.fullmatch(value) is not None


CHECKS: Mapping[str, Callable[[Any, Path], None]] = {
    "config.json": check_config,
    "adapter_config.json": check_config,
    "generation_config.json": check_generation,
    "tokenizer_config.json": check_tokenizer,
    "special_tokens_map.json": check_config,
    "preprocessor_config.json": check_config,
    "processor_config.json": check_config,
    "video_preprocessor_config.json": check_config,
    "sentence_bert_config.json": check_config,
    "config_sentence_transformers.json": check_config,
}


def check_files(folder: Path) -> None:
    """All of these in a folder, and the JSON files of the folders that modules.json names."""
    for name, ask in CHECKS.items():
        if (folder / name).is_file():
            ask(sealed.read_json(folder / name), folder / name)
    if (folder / "config.json").is_file():
        check_quantization(sealed.read_json(folder / "config.json"), folder / "config.json")
    if (folder / "modules.json").is_file():
        check_modules(read(folder / "modules.json"), folder / "modules.json")
        for path in sorted(folder.glob("*/*.json")):
            if path.is_file():
                check_config(sealed.read_json(path), path)
