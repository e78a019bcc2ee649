"""A row of the matrix: a class of transformers, how its model is made tiny, and how it is compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_export.contracts import ExportResult
from tests.architectures.tiny import small
from tests.export_matrix.comparing import worst
from tests.onnx_export.conftest import save_tokenizer

Compare = Callable[[ExportResult, Any], float]


@dataclass(frozen=True)
class Row:
    """cls: in transformers; settings: of its configuration, beside small sizes; compare: the largest relative
    difference between an export and a model; files: what the folder has besides model and tokenizer."""

    cls: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    compare: Compare = worst
    files: Callable[[Path, Any], None] = lambda folder, model: None
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.cls} {self.variant}".strip()

    def build(self, seed: int = 7) -> Any:
        """The model with weights large enough to matter: any graph agrees with one that computes nothing."""
        cls = getattr(transformers, self.cls)
        config = _with(small(cls.config_class), self.settings)
        config.architectures = [self.cls]
        torch.manual_seed(seed)
        model = cls(config).eval()
        generator = torch.Generator().manual_seed(seed + 4)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.15, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.data.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.data.normal_(0, 0.1, generator=generator)
        model.tie_weights()
        return model

    def save(self, folder: Path, seed: int = 7) -> Any:
        model = self.build(seed)
        model.save_pretrained(folder)
        save_tokenizer(folder)
        self.files(folder, model)
        return type(model).from_pretrained(folder).eval()  # sinusoids are not saved, and computed anew


def _with(config: Any, settings: Mapping[str, Any]) -> Any:
    """The configuration with other settings, through its constructor; parts by their names."""
    parts = getattr(type(config), "sub_configs", {}) or {}
    own = {k: v for k, v in settings.items() if k not in parts}
    changed = {k: _part(getattr(config, k), settings[k]) for k in parts if k in settings}
    return type(config)(**{**config.to_dict(), **own, **changed})


def _part(config: Any, settings: Any) -> Any:
    """A part of a configuration: with other settings, or another altogether."""
    if isinstance(settings, transformers.PretrainedConfig):
        return settings.to_dict()
    return _with(config, settings).to_dict()
