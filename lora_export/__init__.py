"""Take a trained LoRA or QLoRA adapter to production: merge, prove, export, measure, package."""
