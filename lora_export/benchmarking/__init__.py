"""Compare the latency of exported graphs: sessions and providers, measuring, statistics."""

from lora_export.benchmarking.benchmark import run, shapes_of

__all__ = ["run", "shapes_of"]
