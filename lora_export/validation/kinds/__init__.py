"""Which kind of model is validated how, and the inputs for it."""

from lora_export.validation.kinds.models import KINDS, ComparedKind, choose

__all__ = ["KINDS", "ComparedKind", "choose"]
