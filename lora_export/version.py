"""The version: of the package, of what a run records, of `--version`."""

__version__ = "0.1.0"
