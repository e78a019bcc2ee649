"""What has to lie beside the weights of a merged folder: made anew from base and adapters, not taken from a merge.

Tokenizer, chat template, generation and processor settings are the base's, a tokenizer that an adapter brings takes
their place, and of config.json the keys change that the merge must change.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.folder_files import (
    SENTENCE,
    SENTENCE_MODULES,
    TOKENIZER_FILES,
    VALUE_HEAD,
    is_adapters,
    is_state,
    is_whole_tokenizer,
)
from lora_export.storage.sealed import read_json, refuse_outward_link, write_json
from lora_export.validation.folder.ends import follow
from lora_export.validation.folder.stored import HEADS
from lora_export.validation.reference.files import FLOATS, adapter_config, headers
from lora_export.validation.reference.quantized import FILES, is_quantized, without_settings
from lora_export.validation.reference.trained import trained_as

CONFIG = "config.json"
CERTIFICATE = "lora_export_certificate.json"
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".data",
    ".py", ".pkl", ".lock",
)  # fmt: skip
MOST = 256 * 2**20  # bytes of a file of settings
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


def expected_folder(
    base: Path, adapters: Sequence[AdapterChoice], merged: Path, options: MergeOptions, folder: Path
) -> Path:
    """`folder`, filled with the settings that a merge writes.

    merged: its files tell which tensors were resized or untied, which is judged by their values elsewhere.
    """
    folder.mkdir()
    left_out = FILES if is_quantized(base) else frozenset[str]()
    for path in settings_of(base):
        if path.name not in left_out:
            _copy(path, folder / path.name)
    _copy_modules(base, folder)
    for choice in adapters:
        for path in _tokenizer_of(choice.folder):
            _copy(path, folder / path.name)
        # With its modules.json come the settings that sentence-transformers reads beside it.
        whole = (choice.folder / SENTENCE_MODULES).is_file()
        for name in (VALUE_HEAD, *(SENTENCE if whole else ())):
            if (choice.folder / name).is_file():
                _copy(choice.folder / name, folder / name)
        _copy_modules(choice.folder, folder)
    config = _config(base, adapters, merged, options)
    follow(base, [choice.folder for choice in adapters], config, folder)
    write_json(folder / CONFIG, config)
    return folder


def _copy_modules(source: Path, folder: Path) -> None:
    """What sentence-transformers reads in folders of their own: settings, and weights of a dense layer."""
    for path in modules_of(source):
        (folder / path.parent.name).mkdir(exist_ok=True)
        _copy(path, folder / path.parent.name / path.name)


def modules_of(folder: Path) -> list[Path]:
    if not (folder / SENTENCE_MODULES).is_file():
        return []
    inner = (*folder.glob("*/*.json"), *folder.glob("*/model.safetensors"))
    return [p for p in sorted(inner) if p.is_file() and not p.parent.name.startswith(".")]


def declared(base: Path, merged: Path, options: MergeOptions) -> MergeOptions:
    """The options with the type that the merge was asked for, where they do not tell: its config.json does.

    All its tensors have to be of that type, then, and the base's are compared after they were rounded to it.
    """
    before, after = (_type(read_json(folder / CONFIG)) for folder in (base, merged))
    known = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS.values())
    if options.dtype != "keep" or after == before or after not in known:
        return options
    return replace(options, dtype=after)


def _type(config: Mapping[str, Any]) -> Any:
    return config.get("dtype", config.get("torch_dtype"))


def settings_of(folder: Path) -> Iterator[Path]:
    """The files beside the weights, config.json left out."""
    for path in sorted(folder.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        of_training = is_adapters(path.name) or is_state(path.name)
        other = weights or of_training or path.name[0] == "." or path.name in (CONFIG, CERTIFICATE)
        if path.is_file() and not other and path.stat().st_size <= MOST:
            yield path


def _tokenizer_of(adapter: Path) -> list[Path]:
    """A tokenizer of its own; of a stray part only the chat template counts."""
    files = [p for p in sorted(adapter.iterdir()) if p.name in TOKENIZER_FILES and p.is_file()]
    whole = is_whole_tokenizer(p.name for p in files)
    return files if whole else [p for p in files if p.name.startswith("chat_template")]


def _copy(path: Path, target: Path) -> None:
    refuse_outward_link(path)
    shutil.copyfile(path, target)


def _config(base: Path, adapters: Sequence[AdapterChoice], merged: Path, options: MergeOptions) -> dict[str, Any]:
    config = without_settings(read_json(base / CONFIG))
    if options.dtype != "keep":
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = options.dtype
    before, after = headers(base), headers(merged)
    trained = trained_as(base, adapters, options.task)
    heads = trained.heads if trained else ()
    both = [(before[name], tensor) for name, tensor in after.items() if name in before and name not in heads]
    matrices = [(a, b) for a, b in both if len(a.shape) == len(b.shape) == 2 and a.dtype in FLOATS]
    resized = {b.shape[0] for a, b in matrices if a.shape[0] != b.shape[0] and a.shape[1] == b.shape[1]}
    merged_config = read_json(merged / CONFIG)
    if len(resized) == 1:
        rows = resized.pop()
        _take(config, merged_config, lambda key, value: key.endswith("vocab_size") and value == rows)
    # A head of its own is compared with what PEFT computes, whatever the configuration says of it.
    if any(name.endswith(HEADS) or name not in before for name in after):
        _take(config, merged_config, lambda key, value: key.startswith("tie_") and value is False)
    config |= trained.changes if trained else {}
    return config | _replicated(config, adapters)


def _take(config: dict[str, Any], merged: Mapping[str, Any], wanted: Callable[[str, Any], bool]) -> None:
    """Set in `config`, at any depth, the settings of the merged model that were wanted."""
    for key, value in merged.items():
        if wanted(key, value):
            config[key] = value
        elif isinstance(value, dict) and isinstance(config.get(key, {}), dict):
            part = dict(config.get(key, {}))
            _take(part, value, wanted)
            if part:
                config[key] = part


def _replicated(config: Mapping[str, Any], adapters: Sequence[AdapterChoice]) -> dict[str, Any]:
    """With layer_replication: the number of layers, and lists that have an entry for each layer."""
    ranges = replication(adapters)
    count = next((config[k] for k in _LAYER_COUNTS if k in config), None)
    if not ranges or count is None:
        return {}
    order = [i for start, stop in ranges for i in range(start, min(stop, count))]
    changed: dict[str, Any] = {key: len(order) for key in _LAYER_COUNTS if key in config}
    lists = {k: v for k, v in config.items() if isinstance(v, list) and len(v) == count and k != "architectures"}
    return changed | {key: [value[i] for i in order] for key, value in lists.items()}


def replication(adapters: Sequence[AdapterChoice]) -> list[list[int]]:
    """layer_replication of the adapters, empty without one."""
    named = (adapter_config(a.folder).get("layer_replication") for a in adapters)
    return next((ranges for ranges in named if ranges), [])
