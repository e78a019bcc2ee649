"""Take a trained LoRA or QLoRA adapter to production: merge, prove, export, measure, package."""

__version__ = "0.1.0"
