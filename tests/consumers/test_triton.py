"""Packages in Triton's real server, as they lie: each kind of model, by both backends, over HTTP and gRPC."""

import concurrent.futures
import http.client
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.progress import Silent
from lora_export.workflows import delivered
from tests.consumers import answers
from tests.consumers.environments import python
from tests.consumers.models import PROMPTS, TEXTS, TOKENS, Delivered
from tests.consumers.triton import NotStarted, Server, serving, triton_python

pytestmark = pytest.mark.slow
CONSUMERS = {
    "onnxruntime": "Triton Inference Server", "python": "Triton Inference Server (Python backend)"
}  # fmt: skip
WITHIN = 1e-4
ALIVE = 3  # servers at a time: those that the tests after the first ask again
MODEL, GENERATE = "v2/models/adapter", "v2/models/adapter-generate"
Served = Callable[..., Server]


def package(model: Delivered, backend: str) -> Path:
    return model.package("triton", *(["--backend", backend] if backend != "onnxruntime" else []))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """served(model, backend) → a server with that package alone. The last ALIVE of them are kept."""
    running: dict[tuple[str, str], tuple[ExitStack, Server]] = {}

    def get(model: Delivered, backend: str) -> Server:
        key = model.kind, backend
        if key not in running:
            while len(running) >= ALIVE:
                running.pop(next(iter(running)))[0].close()
            stack, work = ExitStack(), tmp_path_factory.mktemp("triton")
            running[key] = stack, stack.enter_context(serving(package(model, backend), work))
        return running[key][1]

    yield get
    for stack, _ in running.values():
        stack.close()


# The program of the README, once for each prompt, in one process.
ASK = """
import contextlib, io, json, os, wave
import numpy
os.chdir({folder!r})
def sound(path):
    with wave.open(path, "rb") as file:
        return numpy.frombuffer(file.readframes(file.getnframes()), "<i2").astype("float32") / 32768
found = []
for prompt in {prompts!r}:
    said = {{"sound": sound}}
    with contextlib.redirect_stdout(io.StringIO()):
        exec({program!r}.replace({old!r}, {new!r}.format(repr(prompt))), said)
    out = {{n: v.tolist() for n, v in said["out"].items() if n != "logits" and "present" not in n}}
    found.append({{"tokens": said.get("said"), "out": out}})
print(json.dumps(found))
"""


def asked(model: Delivered, folder: Path, server: Server) -> list[Any]:
    """Tokens or outputs that the README's program gets for each prompt. Its port is this server's."""
    found = re.search(r"^python - <<'END'\n(.*?)\nEND$", (folder / "README.md").read_text(), re.S | re.M)
    assert found and "localhost:8001" in found[1]
    sample = json.loads((folder / "manifest.json").read_text())["sample"]
    old, new = (repr(sample["prompt"]), "{}") if sample else ('numpy.zeros(16000, "float32")', "sound({})")
    assert old in found[1]
    prompts = [str(model.root / p) for p in model.prompts] if model.kind == "speech" else list(model.prompts)
    program = found[1].replace("localhost:8001", f"127.0.0.1:{server.grpc}")
    code = ASK.format(folder=str(folder), prompts=prompts, program=program, old=old, new=new)
    return list(python(triton_python(), code))


@pytest.mark.parametrize("backend", CONSUMERS)
@pytest.mark.parametrize("kind", ["encoder_decoder", "speech", "decoder", "encoder"])
def test_triton_serves_package_as_it_lies(
    kind: str, backend: str, served: Served, request: pytest.FixtureRequest
) -> None:
    model: Delivered = request.getfixturevalue(kind)
    folder = package(model, backend)
    server = served(model, backend)
    version = server.version()
    assert version == "2.51.0"
    models = {p.parent.name for p in folder.glob("*/config.pbtxt")}
    warm = re.findall(
        r"model '(\S+)' instance \S+ is running warmup sample 'first request'", server.log.read_text()
    )
    assert {*warm} == models
    command = "tritonserver --model-repository=/models"
    with answers.cell(CONSUMERS[backend], version, "triton", model.kind, model.name, command) as cell:
        found = asked(model, folder, server)
        if model.wanted.tokens:
            same = sum(_same(f["tokens"], w) for f, w in zip(found, model.wanted.tokens, strict=True))
            assert same == len(model.prompts), [f["tokens"] for f in found]
            cell.same(f"{same} of {same} texts of up to {TOKENS} tokens")
        else:
            states = [np.array(f["out"]["last_hidden_state"])[0] for f in found]
            vectors = [np.array(f["out"]["sentence_embedding"])[0] for f in found]
            wanted = [*model.wanted.states, *model.wanted.embeddings]
            off = max(
                float(np.abs(a - np.array(w)).max()) for a, w in zip([*states, *vectors], wanted, strict=True)
            )
            assert off <= WITHIN
            cell.same(f"{len(vectors)} texts: states and embeddings", off)


def _same(found: list[int], wanted: tuple[int, ...]) -> bool:
    """Whether these are the tokens wanted, which may begin with a start and finish with an end of text."""
    return (
        bool(found) and (" ".join(map(str, found)) in " ".join(map(str, wanted))) and len(wanted) - len(found) <= 2
    )


# --- an encoder: protocols, batches, refusals --------------------------------------------------------------

CONCURRENT = """
import json
import numpy, tritonclient.grpc, tritonclient.http
rows = numpy.array({rows!r}, dtype="int64")
names = ("input_ids", "attention_mask", "token_type_ids")
def inputs(library, row):
    made = [library.InferInput(n, [1, len(row)], "INT64") for n in names]
    for tensor, values in zip(made, (row, numpy.ones_like(row), numpy.zeros_like(row))):
        tensor.set_data_from_numpy(values[None])
    return made
http = tritonclient.http.InferenceServerClient("127.0.0.1:{http}", concurrency=len(rows))
sent = [http.async_infer("adapter", inputs(tritonclient.http, row)) for row in rows]
by_http = [s.get_result().as_numpy("sentence_embedding")[0].tolist() for s in sent]
grpc, by_grpc = tritonclient.grpc.InferenceServerClient("127.0.0.1:{grpc}"), []
for row in rows:
    by_grpc.append(grpc.infer("adapter", inputs(tritonclient.grpc, row)).as_numpy("sentence_embedding")[0].tolist())
print(json.dumps([by_http, by_grpc]))
"""


@pytest.mark.parametrize("backend", CONSUMERS)
def test_triton_batches_concurrent_requests(backend: str, encoder: Delivered, served: Served) -> None:
    """64 at once over HTTP, then one after the other over gRPC: the same numbers, in fewer runs."""
    server = served(encoder, backend)
    # So long that the client asks faster than the server answers.
    rows = np.random.default_rng(7).integers(1000, 20000, (64, 192)).tolist()
    before = server.statistics("adapter")
    code = CONCURRENT.format(rows=rows, http=server.http, grpc=server.grpc)
    at_once, alone = (np.array(v) for v in python(triton_python(), code))
    after = server.statistics("adapter")
    assert np.abs(at_once - alone).max() <= 1e-5 and len({tuple(v) for v in alone.tolist()}) == 64
    runs = after["execution_count"] - before["execution_count"]
    assert after["inference_count"] - before["inference_count"] == 128
    assert 64 + 8 <= runs < 64 + 48, runs  # 64 alone, and at most 8 in a batch
    assert max(b["batch_size"] for b in after["batch_stats"]) > 4


def tensor(name: str, rows: list[list[Any]], kind: str = "INT64") -> dict[str, Any]:
    return {"name": name, "shape": [len(rows), len(rows[0])], "datatype": kind, "data": rows}


def request_of(ids: list[int]) -> dict[str, Any]:
    """A request of the v2 protocol of KServe and Seldon, in plain JSON."""
    values = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
    return {"inputs": [tensor(name, [value]) for name, value in values.items()]}


def test_triton_answers_kserve_v2_in_plain_json(encoder: Delivered, served: Served) -> None:
    """Without any client's library."""
    import transformers

    server = served(encoder, "python")
    (ready,) = server.get("v2/models/adapter")["versions"]
    reader = transformers.AutoTokenizer.from_pretrained(package(encoder, "python"))
    with answers.cell(
        "KServe v2 protocol (Triton)", server.version(), "triton", "encoder", encoder.name,
        f"POST /v2/models/NAME/versions/{ready}/infer",
    ) as cell:  # fmt: skip
        off = 0.0
        for text, wanted in zip(TEXTS, encoder.wanted.embeddings, strict=True):
            document = {**request_of(reader(text)["input_ids"]), "outputs": [{"name": "sentence_embedding"}]}
            status, body = server.post(f"{MODEL}/versions/{ready}/infer", document)
            assert status == 200, body
            (output,) = json.loads(body)["outputs"]
            assert output["name"] == "sentence_embedding" and output["shape"] == [1, 384]
            off = max(off, float(np.abs(np.array(output["data"]) - np.array(wanted)).max()))
        assert off <= WITHIN
        cell.same(f"{len(TEXTS)} embeddings", off)


def _without_mask(document: dict[str, Any]) -> None:
    del document["inputs"][1]


def _floats(document: dict[str, Any]) -> None:
    document["inputs"][0] = tensor("input_ids", [[1.0, 2.0, 3.0]], "FP32")


def _flat(document: dict[str, Any]) -> None:
    document["inputs"][0]["shape"] = [3]


def _many(document: dict[str, Any]) -> None:
    document["inputs"] = [tensor(i["name"], [[1] * 3] * 9) for i in document["inputs"]]


def _stranger(document: dict[str, Any]) -> None:
    document["inputs"][2]["name"] = "labels"


def _ragged(document: dict[str, Any]) -> None:
    document["inputs"][1] = tensor("attention_mask", [[1] * 5])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_without_mask, "expected 3 inputs but got 2"),
        (_floats, "'input_ids' data-type is 'FP32', but model 'adapter' expects 'INT64'"),
        (_flat, "input 'input_ids' batch size does not match other inputs"),
        (_many, "batch-size must be <= 8"),
        (_stranger, "unexpected inference input 'labels'"),
        (_ragged, "Attempting to broadcast"),  # the graph's words: to the server every length is right
    ],
)
@pytest.mark.parametrize("backend", CONSUMERS)
def test_triton_wrong_request_is_refused(
    spoil: Callable[[dict[str, Any]], None], told: str, backend: str, encoder: Delivered, served: Served
) -> None:
    server = served(encoder, backend)
    document = request_of([101, 2000, 102])
    assert server.post(f"{MODEL}/infer", document)[0] == 200
    spoil(document)
    status, body = server.post(f"{MODEL}/infer", document)
    assert status in (400, 500) and told in json.loads(body)["error"], body
    assert server.post(f"{MODEL}/infer", request_of([101, 2000, 102]))[0] == 200


@pytest.mark.parametrize(
    ("backend", "kind", "model", "file"),
    [
        ("onnxruntime", "encoder", "adapter", "attention_mask"),
        ("python", "decoder", "adapter-generate", "text_input"),
    ],
)
def test_triton_missing_warm_up_file_stops_server(
    backend: str, kind: str, model: str, file: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = package(request.getfixturevalue(kind), backend)
    copy = Path(shutil.copytree(folder, tmp_path / "models", copy_function=_linked))
    missing = copy / model / "warmup" / file
    missing.unlink()
    with pytest.raises(NotStarted, match=f"failed to open text file .*{file}"), serving(copy, tmp_path / "work"):
        pass


def _linked(old: str, new: str) -> None:
    Path(new).symlink_to(old)


def test_triton_folder_without_model_stops_server(tmp_path: Path, encoder: Delivered) -> None:
    """What packages hold no such folder for."""
    copy = Path(shutil.copytree(package(encoder, "onnxruntime"), tmp_path / "models", copy_function=_linked))
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text("{}")
    with pytest.raises(NotStarted, match="1_Pooling"), serving(copy, tmp_path / "work"):
        pass


# --- a decoder that takes and gives text -------------------------------------------------------------------


def generated(server: Server, prompt: str, **settings: Any) -> str:
    document = {"text_input": prompt, "max_tokens": TOKENS, **settings}
    status, body = server.post(f"{GENERATE}/generate", document)
    assert status == 200, body
    return str(json.loads(body)["text_output"])


def streamed(server: Server, prompt: str, **settings: Any) -> list[str]:
    document = {"text_input": prompt, "max_tokens": TOKENS, "stream": True, **settings}
    status, body = server.post(f"{GENERATE}/generate_stream", document)
    assert status == 200, body
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line]
    return [json.loads(line)["text_output"] for line in lines]


def test_triton_generates_text_of_unmerged_model(decoder: Delivered, served: Served) -> None:
    """In one answer and in pieces, several at once."""
    server = served(decoder, "python")
    command = "curl localhost:8000/v2/models/NAME-generate/generate"
    consumer = "Triton's generate endpoint"
    with answers.cell(consumer, server.version(), "triton", "decoder", decoder.name, command) as cell:
        with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as threads:
            said = list(threads.map(lambda p: generated(server, p), PROMPTS))
            pieces = list(threads.map(lambda p: streamed(server, p), PROMPTS))
        assert said == list(decoder.wanted.texts)
        assert ["".join(p) for p in pieces] == said and all(len(p) > TOKENS / 2 for p in pieces)
        cell.same(f"{len(said)} of {len(said)} texts of {TOKENS} tokens, at once and in pieces")


@pytest.mark.parametrize(("prompt", "sign"), [("東京 東京 東京 東京 東京", "東京"), ("🎉🎉🎉🎉🎉🎉", "🎉")])
def test_triton_generates_characters_of_several_tokens_whole(
    prompt: str, sign: str, decoder: Delivered, served: Served
) -> None:
    """The last may be cut by the limit of tokens; no other is."""
    server = served(decoder, "python")
    whole = generated(server, prompt, max_tokens=16)
    pieces = streamed(server, prompt, max_tokens=16)
    assert "".join(pieces) == whole and whole.count(sign) > 2
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces[:-1])


def test_triton_generates_by_settings(decoder: Delivered, served: Served) -> None:
    server, prompt = served(decoder, "python"), PROMPTS[0]
    drawn = [generated(server, prompt, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = decoder.wanted.texts[0]
    assert greedy not in drawn
    assert generated(server, prompt, temperature=9.0, top_k=1) == greedy
    assert generated(server, prompt, temperature=9.0, top_p=1e-6) == greedy
    assert greedy.startswith(generated(server, prompt, max_tokens=3))
    shorter = server.post(f"{GENERATE}/generate", {"text_input": prompt})[1]
    assert greedy.startswith(json.loads(shorter)["text_output"]) and json.loads(shorter)["text_output"] != greedy


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"text_input": ""}, "text_input is missing, or has no tokens"),
        ({"max_tokens": 3}, "text_input is missing, or has no tokens"),
        ({"text_input": 3}, "Unable to parse"),
        ({"text_input": "x", "max_tokens": 0}, "max_tokens is 0; expected: at least 1"),
        ({"text_input": "x", "max_tokens": "many"}, "Unable to parse"),
        ({"text_input": "x", "temperature": -1}, "temperature is -1.0"),
        ({"text_input": "x", "top_k": -2}, "top_k is -2"),
        ({"text_input": "x", "top_p": 0}, "top_p is 0.0"),
        ({"text_input": "x", "seed": -1}, "seed is -1"),
        ({"text_input": "word " * 9000}, "text is at most 8192 with its answer"),
    ],
)
def test_triton_wrong_text_is_an_error(
    document: dict[str, Any], told: str, decoder: Delivered, served: Served
) -> None:
    server = served(decoder, "python")
    status, body = server.post(f"{GENERATE}/generate", document)
    assert status in (400, 500) and told in json.loads(body)["error"], body
    assert generated(server, PROMPTS[0], max_tokens=2)


def test_triton_client_that_goes_away_ends_its_text(decoder: Delivered, served: Served) -> None:
    server = served(decoder, "python")
    client = http.client.HTTPConnection("127.0.0.1", server.http)
    document = {"text_input": PROMPTS[0], "max_tokens": 2000, "stream": True}
    client.request("POST", f"/{GENERATE}/generate_stream", json.dumps(document))
    answer = client.getresponse()
    assert b"text_output" in answer.readline()
    answer.close()
    client.close()
    end = time.monotonic() + 60
    while not (found := re.search(r"cancelled after (\d+) of 2000 tokens", server.log.read_text())):
        assert time.monotonic() < end, server.log.read_text()[-2000:]
        time.sleep(0.2)
    assert int(found[1]) < 1000
    assert generated(server, PROMPTS[0]) == decoder.wanted.texts[0]


def test_triton_killed_server_leaves_package_unharmed(decoder: Delivered, served: Served, tmp_path: Path) -> None:
    """kill -9 in the middle of a text; the next server gives the same text."""
    folder = package(decoder, "python")
    with serving(folder, tmp_path / "first") as server:
        client = http.client.HTTPConnection("127.0.0.1", server.http)
        document = {"text_input": PROMPTS[0], "max_tokens": 2000, "stream": True}
        client.request("POST", f"/{GENERATE}/generate_stream", json.dumps(document))
        assert b"text_output" in client.getresponse().readline()
        server.process.send_signal(signal.SIGKILL)
        assert server.process.wait(30) == -signal.SIGKILL
    found = delivered.verify(folder, None, False, None, Silent())
    assert found.verified, found
    with serving(folder, tmp_path / "second") as server:
        assert generated(server, PROMPTS[0]) == decoder.wanted.texts[0]
