"""Programs that run in an environment of a runtime, and what they are given."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from tests.consumers.environments import python
from tests.consumers.models import RATE, Delivered, sound_of


def ask(interpreter: Path, program: str, **data: Any) -> Any:
    """What a program prints last, as JSON. data: what it finds as names of its own."""
    given = "".join(f"{name} = json.loads({json.dumps(value)!r})\n" for name, value in data.items())
    return python(interpreter, f"import json\n{given}{program}")


def heard(speech: Delivered, folder: Path) -> list[str]:
    """Files of `folder`, one of each sound: what the processor makes of it, (1, bins, frames)."""
    reader = transformers.AutoProcessor.from_pretrained(speech.root / "base")
    files = []
    for name in speech.prompts:
        made = reader(sound_of(speech.root / name), sampling_rate=RATE, return_tensors="np").input_features
        np.save(folder / f"{name}.npy", made)
        files.append(str(folder / f"{name}.npy"))
    return files
