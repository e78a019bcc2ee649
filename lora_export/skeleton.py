"""What a config.json stands for: a transformers model without weights, and which layers are stored transposed."""

from collections.abc import Set
from pathlib import Path
from typing import Any

_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_LAYERS = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def is_conv1d(model_types: Set[str], module: str) -> bool:
    """Whether a layer of such a model is a Conv1D, whose weight is stored (in, out).

    model_types: every model_type in the configuration; module: the layer's name.
    """
    return bool(model_types & _CONV1D_MODELS) and module.rpartition(".")[2] in _CONV1D_LAYERS


def build(folder: Path) -> Any:
    """The model that config.json in `folder` describes, on the meta device. ValueError if transformers cannot."""
    import transformers
    from accelerate import init_empty_weights

    settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (settings.architectures or ["AutoModel"])[0]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise ValueError(f"transformers has no {name}")
    with init_empty_weights():
        model = architecture(settings)
    model.tie_weights()
    return model
