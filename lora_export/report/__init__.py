"""report.json, and the HTML and Markdown pages made from it."""

from lora_export.report.output import render, write
from lora_export.report.schema import SCHEMA_VERSION, load

__all__ = ["SCHEMA_VERSION", "load", "render", "write"]
