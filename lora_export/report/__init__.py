"""report.json, and the HTML and Markdown pages made from it."""

from lora_export.report.files import compare, load, load_samples, render, write

__all__ = ["compare", "load", "load_samples", "render", "write"]
