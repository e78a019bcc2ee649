"""A model in MLflow's format, run by ONNX Runtime and tokenizers.

MLflow imports this package and calls `_load_pyfunc` with the folder of the model and the `config` of its MLmodel.
The code is the same for every model: all that it knows of one, it reads in that folder. It imports nothing of the
project that wrote it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .models import Model, Refused
from .reading import Classifier, Embedder, Tagger
from .writing import Rewriter, Writer

KINDS: dict[str, type[Model]] = {
    "text-generation": Writer,
    "text2text-generation": Rewriter,
    "feature-extraction": Embedder,
    "text-classification": Classifier,
    "token-classification": Tagger,
}


def _load_pyfunc(path: str, model_config: Mapping[str, Any]) -> "Served":
    """model_config: `task`, by Optimum's name; `providers` of ONNX Runtime, the first choice first; `longest`: how
    many tokens the model takes."""
    return Served(KINDS[model_config["task"]](Path(path), model_config))


class Served:
    """What MLflow calls."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> list[Any]:
        """An answer for each row. MLflow's server answers status 400, with the words, to what a model refuses."""
        try:
            return self.model.answers(data, {k: v for k, v in (params or {}).items() if v is not None})
        except Refused as error:
            try:
                from mlflow.exceptions import MlflowException
            except ImportError:
                raise error from None
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def get_raw_model(self) -> Model:
        """The model, behind `mlflow.pyfunc.load_model(…).get_raw_model()`."""
        return self.model
