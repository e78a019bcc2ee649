"""One run of an exported graph, its values kept as ONNX Runtime's own so that no type is converted on the way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from lora_export.errors import RuntimeUnavailable


def run_values(session: Any, names: Sequence[str], feeds: Mapping[str, Any], model: Path) -> list[Any]:
    """The outputs `names` as OrtValues. RuntimeUnavailable, naming `model`, if the provider cannot run it."""
    try:
        return list(session.run_with_ort_values(names, feeds))
    except Exception as error:  # ONNX Runtime's exceptions share no base but this one
        raise RuntimeUnavailable(
            f"the exported graph fails when it runs: {' '.join(str(error).split())}",
            where=model,
            expected="a graph that the execution provider can run",
            next_step="another --precision or --provider",
        ) from None


def value(array: "np.ndarray[Any, Any]") -> Any:
    return ort.OrtValue.ortvalue_from_numpy(array)
