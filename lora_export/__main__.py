"""`python -m lora_export`, for a checkout that is not installed."""

from lora_export.commands.main import cli

cli(prog_name="lora-export")
