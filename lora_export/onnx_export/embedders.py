"""What a folder of sentence-transformers is exported as: an embedder, whatever class its config.json names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import ExportError
from lora_export.folder_files import SENTENCE_MODULES
from lora_export.onnx_export.engines.export_tasks import body_of, task_of
from lora_export.sentence_modules import MODES, POOLING, SentenceModule, modules_of, without_weights

KEY = "sentence_modules"  # of the configuration that engines get: what the graph depends on besides config.json
_KINDS = ("Transformer", POOLING, "Dense", "LayerNorm", "Normalize", "Dropout")
_STATES, _EMBEDDING = "token_embeddings", "sentence_embedding"


def as_exported(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """config.json as engines get it: of an embedder with the class of its body, and its modules.

    An embedder is often stored as the class that it was trained from (Qwen3ForCausalLM), and sentence-transformers
    loads the body alone. ExportError for modules that no graph holds.
    """
    modules = modules_of(folder)
    if not any(m.kind == POOLING for m in modules):
        return dict(config)
    for module in modules:
        _check(module, folder)
    bare = without_weights(folder)
    if bare is not None:
        raise _refusal(f"{bare}, whose weights are missing", folder, f"{bare}/model.safetensors")
    named = (config.get("architectures") or [None])[0]
    body = body_of(str(config.get("model_type"))) if _has_head(config, named) else named
    if body is None:
        return dict(config)
    described = [{"kind": m.kind, "path": m.path, "settings": dict(m.settings)} for m in modules]
    return {**config, "architectures": [body], KEY: described}


def _has_head(config: Mapping[str, Any], named: Any) -> bool:
    return bool(config.get("is_encoder_decoder")) or task_of(str(named)) != "feature-extraction"


def _check(module: SentenceModule, folder: Path) -> None:
    """ExportError for a module whose embedding would not be sentence-transformers'."""
    if module.kind not in _KINDS:
        raise _refusal(f"the module {module.kind}", folder, ", ".join(_KINDS))
    if module.kind == POOLING:
        for mode in module.modes:
            if mode not in MODES.values():
                raise _refusal(f"pooling by {mode!r}", folder, ", ".join(MODES.values()))
    if module.kind == "Dense":
        reads = module.settings.get("module_input_name") or _EMBEDDING
        writes = module.settings.get("module_output_name") or reads
        if (reads, writes) != (_EMBEDDING, _EMBEDDING):
            raise _refusal(f"a Dense from {reads} to {writes}", folder, f"a Dense on the {_EMBEDDING}")


def _refusal(found: str, folder: Path, expected: str) -> ExportError:
    return ExportError(
        f"modules.json has {found}, which no graph is made of here",
        where=folder / SENTENCE_MODULES,
        expected=expected,
        next_step="move modules.json away to export the transformer's states alone",
    )
