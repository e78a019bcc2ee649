"""sentence-transformers and fastembed embed as PEFT's unmerged model does, from a run of an encoder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.consumers.answers import cell
from tests.consumers.environments import python, sentence_python, version
from tests.consumers.models import Delivered

pytestmark = pytest.mark.slow
CLOSE = 1e-4

_EMBED = """
import json
from sentence_transformers import SentenceTransformer
made = {{name: SentenceTransformer(folder, device="cpu", backend=backend)
        for name, (folder, backend) in {folders!r}.items()}}
print(json.dumps([{{n: m.encode({texts!r}).tolist() for n, m in made.items()}},
                  {{n: type(m[0].auto_model).__name__ for n, m in made.items()}}]))
"""


@pytest.fixture(scope="module")
def embedded(encoder: Delivered) -> Any:
    """Embeddings, and the class that computes them, of each package in the backend that is meant for it."""
    folders = {
        "merged": (str(encoder.merged), "torch"),
        "hf": (str(encoder.package("hf")), "torch"),
        "optimum": (str(encoder.package("optimum")), "onnx"),
    }
    return python(sentence_python(), _EMBED.format(folders=folders, texts=list(encoder.prompts)))


def _compared(found: Any, encoder: Delivered, answer: Any) -> None:
    worst = float(np.abs(np.array(found) - np.array(encoder.wanted.embeddings)).max())
    assert worst < CLOSE
    answer.same(f"embeddings of {len(encoder.prompts)} texts", worst)


@pytest.mark.parametrize("package", ["merged", "hf", "optimum"])
def test_sentence_transformers_embeds_as_unmerged_model(encoder: Delivered, embedded: Any, package: str) -> None:
    backend = "ONNX" if package == "optimum" else "torch"
    given = ', backend="onnx"' if backend == "ONNX" else ""
    told = (package, encoder.kind, encoder.name, f'SentenceTransformer("PACKAGE"{given})')
    name = f"sentence-transformers ({backend})"
    with cell(name, version(sentence_python(), "sentence-transformers"), *told) as answer:
        vectors, classes = embedded
        assert (classes[package] == "ORTModelForFeatureExtraction") == (backend == "ONNX")
        _compared(vectors[package], encoder, answer)


_FAST = """
import json
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
TextEmbedding.add_custom_model(
    model="own/model", pooling=PoolingType.MEAN, normalization=True, sources=ModelSource(hf="own/model"), dim=384,
    model_file="model.onnx", additional_files=["model.onnx_data"],
)
try:
    model = TextEmbedding("own/model", specific_model_path={folder!r})
    print(json.dumps([row.tolist() for row in model.embed({texts!r})]))
except ValueError as error:
    print(json.dumps(str(error)))
"""
FASTEMBED = (
    'TextEmbedding.add_custom_model("own/model", …); TextEmbedding("own/model", specific_model_path="PACKAGE")'
)


def test_fastembed_embeds_as_unmerged_model(encoder: Delivered) -> None:
    package = encoder.package("optimum")
    told = ("optimum", encoder.kind, encoder.name, FASTEMBED)
    with cell("fastembed", version(sentence_python(), "fastembed"), *told) as answer:
        code = _FAST.format(folder=str(package), texts=list(encoder.prompts))
        _compared(python(sentence_python(), code), encoder, answer)


def test_fastembed_refuses_tokenizer_without_limit(encoder: Delivered, tmp_path: Path) -> None:
    """What a package would hold if it had the limit that transformers writes for none."""
    for path in encoder.package("optimum").iterdir():
        (tmp_path / path.name).symlink_to(path)
    settings = tmp_path / "tokenizer_config.json"
    stated = json.loads(settings.read_text())
    settings.unlink()
    settings.write_text(json.dumps(stated | {"model_max_length": int(1e30)}))
    said = python(sentence_python(), _FAST.format(folder=str(tmp_path), texts=["x"]))
    assert "maximum context length" in said
