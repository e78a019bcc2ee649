"""MLflow loads, serves and registers a package as it is: MLmodel, code, signature, example."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.consumers import answers
from tests.consumers.environments import installed, python, version
from tests.consumers.models import TOKENS, Delivered

pytestmark = pytest.mark.slow

PACKAGES = (
    "mlflow==3.17.2", "onnx==1.23.2", "onnxruntime==1.32.0", "tokenizers==0.23.3", "numpy==2.4.6", "pandas==3.1.1",
    "jinja2==3.1.6",
)  # fmt: skip
# Nothing of MLflow's own goes into the package, whose every file `verify` knows, or out of this machine.
QUIET = {"PYTHONDONTWRITEBYTECODE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}
LIMIT = 1e-4


@pytest.fixture(scope="module")
def mlflow() -> Path:
    """The interpreter of an environment with MLflow, ONNX Runtime and tokenizers, and without transformers."""
    os.environ.update(QUIET)
    return installed("mlflow", PACKAGES)


Post = Callable[[Any], tuple[int, Any]]


@contextlib.contextmanager
def served(interpreter: Path, folder: Path) -> Iterator[Post]:
    """`mlflow models serve`; a function that sends a body to it: (status, answer)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [interpreter.with_name("mlflow"), "models", "serve", "-m", folder, "--env-manager", "local"]
    path = f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as place, Path(place, "log").open("w+b") as log:
        server = subprocess.Popen(
            [*command, "-p", str(port), "-h", "127.0.0.1"], cwd=place, stdout=log, stderr=log,
            env=os.environ | QUIET | {"PATH": path}, start_new_session=True,
        )  # fmt: skip
        try:
            _wait(port, server, Path(place, "log"))
            yield lambda body: _post(port, body)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def _post(port: int, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def table(column: str, texts: Any, **params: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"dataframe_split": {"columns": [column], "data": [[text] for text in texts]}}
    return body | ({"params": params} if params else {})


def test_mlflow_serves_decoder(decoder: Delivered, mlflow: Path) -> None:
    """Prompts as a table, as inputs and as a completion; a chat; and what it cannot take, without an end."""
    folder = decoder.package("mlflow")
    made = version(mlflow, "mlflow")
    wanted = list(decoder.wanted.texts)
    with (
        answers.cell("MLflow", made, "mlflow", "decoder", decoder.name, "mlflow models serve -m .") as cell,
        served(mlflow, folder) as post,
    ):
        assert post(table("prompt", decoder.prompts, max_tokens=TOKENS)) == (200, {"predictions": wanted})
        inputs = {"inputs": {"prompt": list(decoder.prompts[:2])}, "params": {"max_tokens": TOKENS}}
        assert post(inputs) == (200, {"predictions": wanted[:2]})
        assert post({"prompt": decoder.prompts[0], "max_tokens": TOKENS}) == (200, wanted[:1])
        with ThreadPoolExecutor(4) as pool:
            bodies = [{"prompt": prompt, "max_tokens": TOKENS} for prompt in decoder.prompts]
            assert [answer for _, (answer,) in pool.map(post, bodies)] == wanted
        _chat(post, decoder.root / "base")
        _drawn(post, decoder.prompts[0])
        _refusals(post, decoder.prompts[0], wanted[0])
        cell.same(f"{len(wanted)} texts of {TOKENS} tokens")
    assert_unchanged(decoder, folder)


def _chat(post: Post, base: Path) -> None:
    """The model's own template, as transformers renders it."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Say "hello" & <bye>.'}]
    reader = transformers.AutoTokenizer.from_pretrained(base)
    words = reader.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    code, said = post({"messages": messages, "max_tokens": 12})
    assert code == 200 and said == post({"prompt": words, "max_tokens": 12})[1]
    rows = {"dataframe_records": [{"messages": messages}, {"messages": messages}], "params": {"max_tokens": 12}}
    assert post(rows) == (200, {"predictions": said * 2})


def _drawn(post: Post, prompt: str) -> None:
    def drawn(**params: Any) -> Any:
        code, said = post({"prompt": prompt, "max_tokens": 12, "temperature": 1.5, **params})
        assert code == 200, said
        return said

    assert drawn(seed=1) == drawn(seed=1)
    assert len({str(drawn(seed=seed)) for seed in range(4)}) > 1
    assert drawn(top_k=1) == post({"prompt": prompt, "max_tokens": 12})[1]


def _refusals(post: Post, prompt: str, wanted: str) -> None:
    """Each with status 400 and words; the server answers afterwards."""
    both = [{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}]
    for body, words in (
        (b"{", "valid JSON"),
        ({"rows": []}, "exactly one of the input fields"),
        (table("prompt", [""]), "row 0 has 0 tokens, and 1 to"),
        (table("prompt", ["x " * 9000]), "tokens, and 1 to 8191 are expected"),
        (table("prompt", ["good", None]), "row 1 has nothing in the column 'prompt'"),
        (table("text", ["x"]), "the table has no column 'prompt' or 'messages'"),
        ({"dataframe_records": both}, "has a prompt and messages"),
        ({"messages": [{"role": "user"}]}, "content"),
        (table("prompt", [prompt], max_tokens=0), "max_tokens is 0, and 1 or more is expected"),
        (table("prompt", [prompt], temperature=-0.5), "temperature is -0.5"),
        (table("prompt", [prompt], top_p=0.0), "top_p is 0.0"),
        (table("prompt", [prompt], max_tokens="many"), "max_tokens"),
    ):
        code, said = post(body)
        assert code == 400 and words in str(said), (body, code, said)
    assert post({"prompt": prompt, "max_tokens": TOKENS}) == (200, [wanted])


def test_mlflow_serves_encoder(encoder: Delivered, mlflow: Path) -> None:
    folder = encoder.package("mlflow")
    made = version(mlflow, "mlflow")
    wanted = np.array(encoder.wanted.embeddings)
    with (
        answers.cell("MLflow", made, "mlflow", "encoder", encoder.name, "mlflow models serve -m .") as cell,
        served(mlflow, folder) as post,
    ):
        worst = 0.0
        for body in (table("input", encoder.prompts), {"inputs": {"input": list(encoder.prompts)}}):
            code, said = post(body)
            assert code == 200, said
            worst = max(worst, float(np.abs(np.array(said["predictions"]) - wanted).max()))
        code, said = post({"input": list(encoder.prompts)})
        assert code == 200 and np.array(said).shape == wanted.shape
        assert post(table("input", ["long " * 5000]))[0] == 200  # cut, as by sentence-transformers
        for body, words in ((table("text", ["x"]), "missing inputs"), (table("input", [3]), "input")):
            code, said = post(body)
            assert code == 400 and words in said, said
        assert post({"input": list(encoder.prompts)})[0] == 200
        assert worst <= LIMIT
        cell.same(f"{len(wanted)} vectors", worst)
    assert_unchanged(encoder, folder)


def test_mlflow_serves_encoder_decoder(encoder_decoder: Delivered, mlflow: Path) -> None:
    folder = encoder_decoder.package("mlflow")
    made, name = version(mlflow, "mlflow"), encoder_decoder.name
    wanted = list(encoder_decoder.wanted.texts)
    with (
        answers.cell("MLflow", made, "mlflow", "encoder-decoder", name, "mlflow models serve -m .") as cell,
        served(mlflow, folder) as post,
    ):
        body = table("prompt", encoder_decoder.prompts, max_tokens=TOKENS)
        assert post(body) == (200, {"predictions": wanted})
        assert post({"messages": [{"role": "user", "content": "x"}]})[0] == 400
        assert post(body) == (200, {"predictions": wanted})
        cell.same(f"{len(wanted)} texts of {TOKENS} tokens")
    assert_unchanged(encoder_decoder, folder)


def assert_unchanged(delivered: Delivered, folder: Path) -> None:
    code, found, _ = delivered.call("verify", folder)
    assert code == 0, found


def test_mlflow_refuses_speech(speech: Delivered, mlflow: Path) -> None:
    with answers.cell(
        "MLflow", version(mlflow, "mlflow"), "mlflow", "speech", speech.name, "package --for mlflow"
    ) as cell:
        said = speech.refusal("mlflow")
        assert "automatic-speech-recognition" in said
        cell.refused(said)


LOADED = """
import json, mlflow, numpy
from mlflow.models import Model, validate_serving_input
from mlflow.models.signature import ModelSignature
folder = {folder!r}
model = mlflow.pyfunc.load_model(folder)
meta = Model.load(folder)
signature = meta.signature.to_dict()
sent = open(folder + "/serving_input_example.json").read()
answer = validate_serving_input(folder, sent)
print(json.dumps({{
    "signature": signature, "same": ModelSignature.from_dict(signature) == meta.signature,
    "example": meta.load_input_example(folder).to_dict("list"), "params": meta.load_input_example_params(folder),
    "answer": answer if isinstance(answer[0], str) else answer[0][:8],
    "again": model.predict(model.input_example, params=meta.load_input_example_params(folder))[0][:8],
}}))
"""


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_mlflow_reads_signature_and_example(kind: str, mlflow: Path, request: pytest.FixtureRequest) -> None:
    """The signature is the one that MLflow writes, and the example is answered."""
    delivered: Delivered = request.getfixturevalue(kind)
    found = python(mlflow, LOADED.format(folder=str(delivered.package("mlflow"))))
    assert found["same"]
    column = "prompt" if kind == "decoder" else "input"
    assert found["example"] == {column: ["The capital of France is"]}
    if kind == "decoder":
        assert found["params"] == {"max_tokens": TOKENS}
        assert found["answer"] == [delivered.wanted.texts[0]]
        assert [p["name"] for p in json.loads(found["signature"]["params"])] == [
            "max_tokens", "temperature", "top_k", "top_p", "seed",
        ]  # fmt: skip
    else:
        np.testing.assert_allclose(found["answer"], found["again"], atol=1e-6)


GRAPH = """
import json, mlflow, numpy, onnxruntime
model = mlflow.onnx.load_model({folder!r})
session = onnxruntime.InferenceSession(model.SerializeToString())
from tokenizers import Tokenizer
reader = Tokenizer.from_file({folder!r} + "/tokenizer.json")
reader.no_padding()
read = reader.encode({text!r})
feeds = {{"input_ids": [read.ids], "attention_mask": [read.attention_mask], "token_type_ids": [read.type_ids]}}
names = [value.name for value in session.get_inputs()]
out = session.run(["sentence_embedding"], {{n: numpy.array(feeds[n], numpy.int64) for n in names}})[0]
print(json.dumps(out[0].tolist()))
"""


def test_mlflow_onnx_loads_encoder(encoder: Delivered, mlflow: Path) -> None:
    folder = encoder.package("mlflow")
    said = python(mlflow, GRAPH.format(folder=str(folder), text=encoder.prompts[1]))
    np.testing.assert_allclose(said, encoder.wanted.embeddings[1], atol=LIMIT)


REGISTERED = """
import json, mlflow, pathlib, shutil, tempfile
with tempfile.TemporaryDirectory() as store:
    mlflow.set_tracking_uri(f"sqlite:///{{store}}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{{store}}/mlflow.db")
    place = pathlib.Path(store, "artifacts").as_uri()
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("e", artifact_location=place))
    own = shutil.copytree({folder!r}, pathlib.Path(store, "own"))  # MLflow writes into what it loads in its place
    straight = mlflow.register_model(own.as_uri(), "straight")
    with mlflow.start_run() as run:
        mlflow.log_artifacts({folder!r}, "model")
    logged = mlflow.register_model(f"runs:/{{run.info.run_id}}/model", "logged")
    said = []
    for made in (straight, logged):
        model = mlflow.pyfunc.load_model(f"models:/{{made.name}}/{{made.version}}")
        said.append(model.predict([{{"prompt": {prompt!r}}}], params={{"max_tokens": {tokens}}})[0])
    print(json.dumps(said))
"""


def test_mlflow_registers_and_loads_back(encoder_decoder: Delivered, mlflow: Path) -> None:
    """From the folder, and from a run that it was logged to."""
    folder, prompt = encoder_decoder.package("mlflow"), encoder_decoder.prompts[0]
    said = python(mlflow, REGISTERED.format(folder=str(folder), prompt=prompt, tokens=TOKENS))
    assert said == [encoder_decoder.wanted.texts[0]] * 2
    assert_unchanged(encoder_decoder, folder)


def test_mlflow_verify_run_asks_mlflow(decoder: Delivered, mlflow: Path) -> None:
    code, found, _ = decoder.call("verify", decoder.package("mlflow"), "--run", "--runtime", mlflow)
    assert code == 0, found
    assert [c["passed"] for c in found["checks"] if c["name"] == "runs"] == [True]
