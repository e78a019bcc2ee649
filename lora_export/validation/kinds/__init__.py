"""Which kind of model is validated how, and the inputs for it."""

from lora_export.validation.kinds.models import KINDS, Kind, choose

__all__ = ["KINDS", "Kind", "choose"]
