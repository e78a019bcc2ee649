"""A merged pipeline against an unmerged one of our own: tensors, models, pictures, graphs."""

from lora_export.validation.pipelines.story import validate_pipeline

__all__ = ["validate_pipeline"]
