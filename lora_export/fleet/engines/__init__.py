"""What runs tasks of a fleet: processes of this machine, or a Ray cluster."""

from lora_export.fleet.engines.protocol import Engine, Slot, Work

__all__ = ["Engine", "Slot", "Work"]
