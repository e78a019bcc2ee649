"""A transformers model without weights: the shapes and names that a config.json stands for."""

from pathlib import Path
from typing import Any


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
