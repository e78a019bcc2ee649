"""Where a fleet keeps its objects: a folder, or an object store."""

from lora_export.fleet.stores.protocol import Store, opened

__all__ = ["Store", "opened"]
