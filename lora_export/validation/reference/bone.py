"""Bone adapters for a PEFT that calls Bone MiSS: the same numbers under the new names."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from lora_export.contracts import AdapterChoice
from lora_export.storage.sealed import LARGEST_SETTINGS, read_json

_CONFIG, _OLD, _NEW = "adapter_config.json", ".bone_block", ".miss_block"


@contextlib.contextmanager
def as_miss(adapters: Sequence[AdapterChoice]) -> Iterator[list[AdapterChoice]]:
    """The adapters, those of Bone as MiSS in folders of their own, which last as long as this."""
    with contextlib.ExitStack() as folders:
        found = []
        for choice in adapters:
            config = read_json(choice.folder / _CONFIG, limit=LARGEST_SETTINGS)
            if config.get("peft_type") == "BONE":
                scratch = Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="lora-export-")))
                (scratch / _CONFIG).write_text(json.dumps({**config, "peft_type": "MISS"}), encoding="utf-8")
                for file in choice.folder.glob("*.safetensors"):
                    renamed = {name.replace(_OLD, _NEW): value for name, value in load_file(file).items()}
                    save_file(renamed, scratch / file.name, {"format": "pt"})
                choice = replace(choice, folder=scratch)
            found.append(choice)
        yield found
