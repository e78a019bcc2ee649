"""A package for MLflow: its documents, the code that runs in it, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from peft import PeftModel

from lora_export.allowed import mlflow_model
from lora_export.errors import InputError
from lora_export.packages.job import Run
from lora_export.packages.mlflow import reading
from lora_export.packages.mlflow.served import _load_pyfunc
from lora_export.packages.mlflow.served.graphs import Graph
from lora_export.packages.mlflow.served.models import Refused, rows_of
from lora_export.packages.mlflow.served.reading import labelled, scores
from lora_export.packages.mlflow.served.writing import Choice
from lora_export.packages.targets.mlflow import TARGET, module
from lora_export.packages.tasks import task_of
from lora_export.progress import Silent
from lora_export.storage.documents import as_json
from lora_export.storage.sealed import hash_folder, read_sealed, write_sealed
from lora_export.workflows import delivered
from lora_export.workflows.packaging import read_run
from tests.packages.conftest import Packed
from tests.packages.test_packages import PROMPT, unmerged_text

Copied = Callable[..., Path]


def model_of(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8")))


def loaded(folder: Path) -> Any:
    return _load_pyfunc(str(folder), model_of(folder)["flavors"]["python_function"]["config"])


# --- documents ---------------------------------------------------------------------------------------------


def test_mlflow_model_names_code_graph_and_signature(packed: Packed, decoder_run: Path, encoder_run: Path) -> None:
    decoder = packed(decoder_run, "mlflow").output
    model = model_of(decoder)
    function = model["flavors"]["python_function"]
    assert (decoder / "code" / function["loader_module"] / "__init__.py").is_file()
    assert function["config"] == {
        "longest": 256, "providers": ["CPUExecutionProvider"], "task": "text-generation",
    }  # fmt: skip
    assert "onnx" not in model["flavors"]  # its norms stand in a domain where onnx.checker does not look
    inputs, params = (json.loads(model["signature"][n]) for n in ("inputs", "params"))
    assert [(c["name"], c["required"]) for c in inputs] == [("prompt", False), ("messages", False)]
    assert [p["name"] for p in params] == ["max_tokens", "temperature", "top_k", "top_p", "seed"]
    assert model["utc_time_created"][:10] == read_sealed(decoder / "manifest.json")["run"]["created"][:10]
    example = json.loads((decoder / "input_example.json").read_text())
    assert (
        example["inputs"]["data"]
        == json.loads((decoder / "serving_input_example.json").read_text())["dataframe_split"]["data"]
    )
    encoder = packed(encoder_run, "mlflow").output
    model = model_of(encoder)
    assert model["flavors"]["onnx"]["data"] == "model.onnx" and (encoder / "model.onnx").is_file()
    assert model["signature"]["params"] is None and "params" not in model["saved_input_example_info"]
    assert json.loads(model["signature"]["outputs"])[0]["type"] == "map"


def test_mlflow_environments_pin_what_the_run_used(packed: Packed, encoder_run: Path) -> None:
    folder = packed(encoder_run, "mlflow").output
    versions = read_sealed(folder / "manifest.json")["versions"]
    lines = (folder / "requirements.txt").read_text().splitlines()
    runtime = versions.get("onnxruntime-gpu") or versions["onnxruntime"]
    assert {f"onnx=={versions['onnx']}", f"onnxruntime=={runtime}"} <= {*lines}
    conda = yaml.safe_load((folder / "conda.yaml").read_text())
    assert conda["dependencies"][-1] == {"pip": lines}
    on_gpu = packed(encoder_run, "mlflow", provider="cuda").output
    assert f"onnxruntime-gpu=={runtime}" in (on_gpu / "requirements.txt").read_text().splitlines()
    assert model_of(on_gpu)["flavors"]["onnx"]["providers"] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert model_of(on_gpu)["model_uuid"] != model_of(folder)["model_uuid"]


# --- what it computes --------------------------------------------------------------------------------------


def test_mlflow_code_continues_as_the_unmerged_model(decoder: tuple[Path, Path, Path], packed: Packed) -> None:
    base, adapter, run = decoder
    model = loaded(packed(run, "mlflow").output)
    said = model.predict([{"prompt": PROMPT}, {"prompt": "x"}], {"max_tokens": 32, "seed": None})
    assert said[0] == unmerged_text(base, adapter) and len(said) == 2
    chat = [{"role": "user", "content": "The capital of"}, {"role": "assistant", "content": " France is"}]
    assert model.predict({"messages": chat}, {"max_tokens": 5}) == model.predict(PROMPT, {"max_tokens": 5})
    drawn = [model.predict(PROMPT, {"max_tokens": 8, "temperature": 2.0, "seed": s}) for s in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and drawn[0] not in drawn[2:]


def test_mlflow_on_a_gpu_continues_the_same_text(
    packed: Packed, decoder_run: Path, played: Callable[..., None]
) -> None:
    """The cache stays on the device, which the CPU plays."""
    folder = packed(decoder_run, "mlflow").output
    config = model_of(folder)["flavors"]["python_function"]["config"]
    played()
    model = _load_pyfunc(str(folder), config | {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]})
    assert [part.device for part in vars(model.model).values() if isinstance(part, Graph)] == ["cuda"]
    assert model.predict(PROMPT, {"max_tokens": 8}) == loaded(folder).predict(PROMPT, {"max_tokens": 8})


@pytest.mark.parametrize("faults", [{"compiled": False}, {"library": "libcudnn.so.9"}, {"silent": True}])
def test_mlflow_graph_says_that_it_does_not_run_on_the_gpu(
    faults: dict[str, Any],
    packed: Packed,
    encoder_run: Path,
    played: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = packed(encoder_run, "mlflow").output / "model.onnx"
    played(**faults)
    graph = Graph(path, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert graph.device == "cpu"
    assert "CUDAExecutionProvider does not work here, so the model runs on CPUExecutionProvider" in caplog.text


@pytest.mark.parametrize(
    ("data", "params", "words"),
    [
        ("", {}, "row 0 has 0 tokens, and 1 to 255 are expected"),
        ("x" * 256, {}, "row 0 has 256 tokens"),
        ([PROMPT, 3], {}, "row 1 has a value of type int in the column 'prompt'"),
        ([{"prompt": "x"}, {}], {}, "row 1 has nothing in the column 'prompt'"),
        ({"prompt": "x", "messages": []}, {}, "has a prompt and messages"),
        ({"messages": [3]}, {}, "template does not take the messages of row 0"),
        ("x", {"max_tokens": 0}, "max_tokens is 0, and 1 or more is expected"),
        ("x", {"temperature": -1.0}, "temperature is -1.0"),
        ("x", {"temperature": math.nan}, "temperature is nan"),
        ("x", {"top_k": -1}, "top_k is -1"),
        ("x", {"top_p": 0.0}, "top_p is 0.0"),
        ("x", {"seed": -1}, "seed is -1"),
    ],
)
def test_mlflow_code_refuses_in_words(
    data: Any, params: dict[str, Any], words: str, packed: Packed, decoder_run: Path
) -> None:
    model = loaded(packed(decoder_run, "mlflow").output)
    with pytest.raises(Refused, match=words):
        model.predict(data, {"max_tokens": 1} | params)


def test_mlflow_code_scores_as_the_unmerged_model(encoder: tuple[Path, Path, Path], packed: Packed) -> None:
    base, adapter, run = encoder
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    inputs = transformers.AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt")
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(model, adapter).eval()(**inputs).logits[0].softmax(0).tolist()
    served = loaded(packed(run, "mlflow").output)
    said = served.predict({"input": np.array([PROMPT, "x"], object)})
    assert list(said[0]) == ["LABEL_0", "LABEL_1", "LABEL_2"] and len(said) == 2
    np.testing.assert_allclose(list(said[0].values()), wanted, atol=1e-5)
    assert served.predict("x" * 500) == served.predict("x" * 200)  # both cut to 128
    with pytest.raises(Refused, match="row 0 has nothing in the column 'input'"):
        served.predict([{"text": "x"}])


def test_mlflow_scores_follow_the_problem() -> None:
    logits = np.array([0.0, math.log(3)])
    np.testing.assert_allclose(scores(logits, None), [0.25, 0.75])
    np.testing.assert_allclose(scores(logits, "multi_label_classification"), [0.5, 0.75])
    np.testing.assert_allclose(scores(logits, "regression"), logits)
    np.testing.assert_allclose(scores(logits[1:], None), [0.75])  # a single label, as of a reranker
    assert labelled(np.array([0.5]), {"id2label": {"0": "good"}}) == {"good": 0.5}


def test_mlflow_choice_keeps_the_likeliest() -> None:
    logits, random = np.log(np.array([0.1, 0.4, 0.2, 0.3])), np.random.default_rng(0)

    def drawn(**settings: Any) -> set[int]:
        return {Choice(1, 1.0, **settings).token(logits, random) for _ in range(300)}

    assert Choice(1).token(logits, random) == 1
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.6) == {1, 3} and drawn(top_p=0.3) == {1}
    hot = [Choice(1, 50.0).token(logits, random) for _ in range(2000)]
    assert 400 < hot.count(0) < 600  # a high temperature makes all alike
    with pytest.raises(ArithmeticError, match="not numbers"):
        Choice(1).token(np.array([math.nan, 1.0]), random)


class Table(dict[str, list[Any]]):
    """Of pandas, as far as it is read."""

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return [dict(zip(self, row, strict=True)) for row in zip(*self.values(), strict=True)]


def test_mlflow_rows_of_every_shape() -> None:
    columns = ("prompt", "messages")
    wanted = [{"prompt": "a"}, {"prompt": "b"}]
    for data in (
        ["a", "b"], np.array(["a", "b"], object), Table(prompt=["a", "b"]), {"prompt": ["a", "b"]}, wanted,
        Table(prompt=[["a", "b"]]), Table(prompt=["a", "b"], messages=[None, math.nan], other=[1, 2]),
    ):  # fmt: skip
        assert rows_of(data, columns) == wanted, data
    assert rows_of("a", columns) == wanted[:1] and rows_of(Table(prompt=[]), columns) == []
    with pytest.raises(Refused, match="no column 'prompt' or 'messages'"):
        rows_of(Table(text=["a"]), columns)


# --- what is refused ---------------------------------------------------------------------------------------


def resealed(folder: Path) -> None:
    """Who changes a file can write another manifest."""
    files = {n: f for n, f in as_json(hash_folder(folder)).items() if n != "manifest.json"}
    write_sealed(folder / "manifest.json", read_sealed(folder / "manifest.json") | {"files": files})


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("code/MODULE/models.py", "import json", "import os, json", "is not the program that lora-export writes"),
        ("code/os.py", "", "print(1)", "os.py is not"),
        (
            "MLmodel",
            "loader_module: lora_export_served_",
            "loader_module: lora_export_served_0000",
            "loader_module",
        ),
        ("MLmodel", "    code: code\n", "    code: elsewhere\n", "code to 'elsewhere'"),
        ("MLmodel", "MODULE", "lora_export_served_00000000", "MLmodel loads lora_export_served_00000000"),
        ("requirements.txt", "numpy==", "evil==1.0\nnumpy==", "requirements.txt sets line to 'evil==1.0'"),
    ],
)
def test_verify_mlflow_changed_package_is_not_run(
    file: str, old: str, new: str, words: str, encoder_run: Path, copied: Copied
) -> None:
    folder = copied(encoder_run, "mlflow")
    path, old = folder / file.replace("MODULE", module()), old.replace("MODULE", module())
    text = path.read_text() if path.is_file() else ""
    assert old in text
    path.write_text(text.replace(old, new, 1) if old else new)
    resealed(folder)
    found = delivered.verify(folder, None, True, None, Silent())
    assert [c.name for c in found.checks if not c.passed] == ["contents"]
    assert words in found.checks[-1].note, found.checks


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("MLmodel", "loader_module: lora_export_served_", "loader_module: os.lora_export_served_", "loader_module"),
        (
            "MLmodel",
            "streamable: false\n",
            "streamable: false\n  sklearn:\n    data: model.pkl\n",
            "flavors.sklearn",
        ),
        ("MLmodel", "    config:\n", "    config:\n      hook: os\n", "config.hook"),
        ("MLmodel", "task: text-classification\n    env", "task: shell\n    env", "config.task"),
        ("MLmodel", "streamable: false", "streamable: true", "streamable"),
        ("MLmodel", "code: code", "code: &a code", "not spelled"),
        ("MLmodel", "code: code", "code: !!python/name:os.system ''", "not spelled"),
        ("MLmodel", "streamable: false", "streamable: false\n    streamable: false", "not spelled"),
        ("MLmodel", "flavors:", "# a word\nflavors:", "not spelled"),
        ("MLmodel", "flavors:", "flavors: {", "not spelled"),
        ("MLmodel", '"type": "string"', '"type": "string", "hook": "os"', "signature.inputs"),
        ("MLmodel", "virtualenv: python_env.yaml", "virtualenv: ../python_env.yaml", "env.virtualenv"),
        ("requirements.txt", "mlflow==", "--index-url https://example.org\nmlflow==", "--index-url"),
        ("requirements.txt", "numpy==", "numpy @ https://example.org/#", "numpy @"),
        ("conda.yaml", "conda-forge", "elsewhere", "channels"),
        ("conda.yaml", "  - jinja2==", "  - evil==", "evil"),
        ("conda.yaml", "- pip\n", "- curl\n", "curl"),
        ("python_env.yaml", "- -r requirements.txt", "- -r other.txt", "-r other.txt"),
        ("python_env.yaml", "- setuptools", "- evil", "evil"),
        ("input_example.json", '"columns"', '"index": [0], "columns"', "index"),
        ("serving_input_example.json", "{", '{"more": 1, ', "more"),
    ],
)
def test_mlflow_documents_off_the_list_are_refused(
    file: str, old: str, new: str, words: str, encoder_run: Path, packed: Packed, tmp_path: Path
) -> None:
    path = Path(shutil.copy(packed(encoder_run, "mlflow").output / file, tmp_path))
    mlflow_model.check_file(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as refused:
        mlflow_model.check_file(path)
    assert words in str(refused.value)


@pytest.fixture
def run(encoder_run: Path) -> Run:
    return read_run(encoder_run, Silent())


@pytest.mark.parametrize(
    ("task", "architecture"),
    [
        ("image-text-to-text", "Qwen2VLForConditionalGeneration"), ("fill-mask", "BertForMaskedLM"),
        ("automatic-speech-recognition", "WhisperForConditionalGeneration"), ("image-classification", "ViT"),
    ],
)  # fmt: skip
def test_package_mlflow_of_other_task_is_refused(task: str, architecture: str, run: Run) -> None:
    with pytest.raises(InputError, match=f"a model of the task {task}"):
        TARGET.variants(replace(run, task=task_of(task, architecture)), ())


def test_package_mlflow_in_bf16_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match="bf16"):
        TARGET.variants(replace(run, export=replace(run.export, precision="bf16")), ())


def test_package_mlflow_with_other_tokens_is_refused(run: Run, tmp_path: Path) -> None:
    """transformers adds a token that tokenizer.json does not have, or there is no such file."""
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        reading.check_tokenizer(replace(run, companions=tmp_path, export=replace(run.export, output=tmp_path)))
    for path in run.companions.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    reading.check_tokenizer(replace(run, companions=tmp_path))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"extra_special_tokens": ["France"]}))
    with pytest.raises(InputError, match=r"reads 'The capital of France is' as .* and transformers as"):
        reading.check_tokenizer(replace(run, companions=tmp_path))


def test_package_mlflow_with_other_chat_is_refused(run: Run, tmp_path: Path) -> None:
    for path in run.companions.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    other = replace(run, companions=tmp_path)
    reading.check_template(other)
    template = tmp_path / "chat_template.jinja"
    template.write_text(
        "{%- if tools is not none %}tools{% endif %}{{ bos_token }}{% for m in messages %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    )
    reading.check_template(other)
    template.write_text("{{ strftime_now('%f') }}")  # another one each time
    with pytest.raises(InputError, match="under transformers"):
        reading.check_template(other)


@pytest.mark.parametrize(
    ("config", "generates", "limit"),
    [
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, False, 512),
        ({"model_type": "llama", "max_position_embeddings": 4096}, True, 4096),
        ({"model_type": "t5", "n_positions": 512}, True, reading.UNLIMITED),
        ({"model_type": "x", "text_config": {"max_position_embeddings": 77}}, False, 77),
    ],
)
def test_mlflow_longest_text(config: dict[str, Any], generates: bool, limit: int, run: Run, tmp_path: Path) -> None:
    task = task_of("text-generation" if generates else "feature-extraction", "X")
    assert reading.longest(replace(run, config=config, task=task, companions=tmp_path)) == limit
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 50}')
    assert reading.longest(replace(run, config=config, task=task, companions=tmp_path)) == (
        limit if generates else 50
    )
