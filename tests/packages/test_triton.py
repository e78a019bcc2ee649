"""Model repositories of Triton: what their folders hold, and the programs of ours in them."""

import dataclasses
import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.contracts import PackageOptions
from lora_export.errors import InputError
from lora_export.packages import companions
from lora_export.packages.job import PackageFacts
from lora_export.packages.targets import target_named, triton
from lora_export.packages.tasks import PackageTask, task_of
from lora_export.packages.triton import config, served, writing
from lora_export.progress import Silent
from lora_export.storage.sealed import hash_folder
from lora_export.workflows.packaging import package, read_run
from tests.packages.conftest import Packed
from tests.packages.test_attacks import reseal, run
from tests.packages.test_packages import PROMPT, unmerged_text

Copied = Callable[..., Path]
SERVED = Path(served.__file__).parent
SESSION = (SERVED / "onnx_session.py").read_text()


def notes(folder: Path) -> str:
    """What `verify` finds wrong; it exits with 1."""
    result = run("verify", folder)
    assert result.exit_code == 1, result.stdout
    return "\n".join(c["note"] for c in json.loads(result.stdout)["checks"] if not c["passed"])


# --- the repository ----------------------------------------------------------------------------------------


def test_triton_repository_has_no_folder_of_sentence_transformers(encoder_run: Path, tmp_path: Path) -> None:
    """The server would take 1_Pooling for a model, and not start."""
    base = Path(shutil.copytree(read_run(encoder_run, Silent()).companions, tmp_path / "base"))
    (base / "modules.json").write_text("[]")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    changed = dataclasses.replace(read_run(encoder_run, Silent()), companions=base)
    for modules in (True, False):
        stage = tmp_path / str(modules)
        stage.mkdir()
        companions.lay(changed, stage, modules=modules)
        assert (stage / "tokenizer.json").is_file()
        assert (stage / "1_Pooling").is_dir() is (stage / "modules.json").is_file() is modules


def _stranger(folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")


def _renamed(folder: Path) -> None:
    path = folder / "adapter" / "config.pbtxt"
    path.write_text(path.read_text().replace('name: "adapter"', 'name: "other"'))


def _empty(folder: Path) -> None:
    shutil.rmtree(folder / "adapter" / "1")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_stranger, "1_Pooling/ is not a model"),
        (_renamed, "that of the model 'other'"),
        (_empty, "has no 1/model.onnx/model.onnx"),
    ],
)
def test_verify_triton_repository_that_server_refuses_fails(
    spoil: Callable[[Path], None], told: str, encoder_run: Path, copied: Copied
) -> None:
    folder = copied(encoder_run, "triton")
    spoil(folder)
    reseal(folder)
    assert told in notes(folder)


def test_triton_warm_up_is_never_skipped(packed: Packed, decoder_run: Path) -> None:
    """The server ignores a sample whose batch_size is 0, also of a model without batches."""
    made = packed(decoder_run, "triton", backend="python").output
    texts = [p.read_text() for p in made.glob("*/config.pbtxt")]
    assert len(texts) == 2
    for text in texts:
        assert "batch_size: 1\n" in text.partition("model_warmup")[2]


@pytest.mark.parametrize(("states", "length"), [(1500, 1500), ("encoder_sequence_length", None)])
def test_triton_warm_up_knows_how_many_states_an_encoder_gives(states: int | str, length: int | None) -> None:
    """Whisper's decoder takes 1500 and nothing else."""
    output = ir.val("last_hidden_state", ir.DataType.FLOAT, ["batch_size", states, 4])
    given = ir.val("encoder_hidden_states", ir.DataType.FLOAT, ["batch_size", "encoder_sequence_length", 4])
    models = {
        "encoder_model": ir.Model(ir.Graph([], [output], nodes=[]), ir_version=10),
        "decoder_model_merged": ir.Model(ir.Graph([given], [], nodes=[]), ir_version=10),
    }
    found = config.always_encoded(models)
    assert found == length
    made, _ = config.configured("m", models["decoder_model_merged"], "cpu", "onnxruntime", found)
    assert list(made.model_warmup[0].inputs["encoder_hidden_states"].dims) == [length or 8, 4]


# --- --backend python --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_triton_python_package_has_code_of_this_project_alone(
    kind: str, packed: Packed, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(f"{kind}_run")
    folder = packed(made, "triton", backend="python").output
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.py")}
    wanted = {"adapter": "graph.py"} | ({"adapter-generate": "generate.py"} if kind == "decoder" else {})
    assert found == {
        f"{model}/1/{name}": text
        for model, file in wanted.items()
        for name, text in (("model.py", (SERVED / file).read_text()), ("onnx_session.py", SESSION))
    }
    for model in wanted:
        text = (folder / model / "config.pbtxt").read_text()
        assert 'backend: "python"' in text and "default_model_filename" not in text
    assert run("verify", folder, *["--run"] * (kind == "decoder")).exit_code == 0
    again = package(made, "triton", tmp_path / "again", PackageOptions(backend="python"), Silent()).output
    assert hash_folder(again) == hash_folder(folder)
    assert "pip install onnxruntime tokenizers 'numpy<2'" in (folder / "README.md").read_text()


def test_triton_default_backend_is_onnxruntime(packed: Packed, decoder_run: Path) -> None:
    plain = packed(decoder_run, "triton").output
    named = packed(decoder_run, "triton", backend="onnxruntime").output
    assert not list(plain.rglob("*.py"))
    for path in plain.glob("adapter/**/*"):
        assert path.is_dir() or path.read_bytes() == (named / path.relative_to(plain)).read_bytes()


@pytest.mark.parametrize("name", ["adapter/1/model.py", "adapter-generate/1/model.py", "adapter/1/onnx_session.py"])
def test_verify_triton_package_with_edited_code_fails(name: str, decoder_run: Path, copied: Copied) -> None:
    """With a manifest that fits."""
    folder = copied(decoder_run, "triton", backend="python")
    with (folder / name).open("a") as file:
        file.write("\nimport os\n")
    reseal(folder)
    assert f"{name} is not the program that lora-export writes for the Triton" in notes(folder)


def test_verify_triton_package_with_code_elsewhere_fails(decoder_run: Path, copied: Copied) -> None:
    folder = copied(decoder_run, "triton", backend="python")
    shutil.copy(folder / "adapter" / "1" / "model.py", folder / "model.py")
    reseal(folder)
    assert "model.py is not the program" in notes(folder)


def test_triton_generate_model_has_ends_and_length(packed: Packed, decoder_run: Path) -> None:
    """Of generation_config.json and config.json; its tokenizer gives transformers' tokens."""
    import tokenizers
    import transformers

    folder = packed(decoder_run, "triton", backend="python").output
    made = _parsed(folder / "adapter-generate" / "config.pbtxt")
    assert {k: v.string_value for k, v in made.parameters.items()} == {
        "graph": "adapter", "end_tokens": "2", "context_length": "256",
    }  # fmt: skip
    assert made.model_transaction_policy.decoupled and made.max_batch_size == 0
    fast = tokenizers.Tokenizer.from_file(str(folder / "adapter-generate" / "1" / "tokenizer.json"))
    assert fast.encode(PROMPT).ids == transformers.AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]


def _parsed(path: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    return text_format.Parse(path.read_text(), pb.ModelConfig())


def _facts(task: PackageTask, precision: str) -> PackageFacts:
    return PackageFacts(target_named("triton"), "n", task, precision, (), ("cpu",), None, {}, backend="python")


TEXT, SPEECH = task_of("text-generation", "X"), task_of("automatic-speech-recognition", "WhisperX")


@pytest.mark.parametrize(
    ("task", "precision", "graphs", "told"),
    [
        (TEXT, "bf16", ["model"], "a bf16 graph"),
        (TEXT, "fp32", ["model", "other"], "for the graphs model, other"),
        (SPEECH, "fp32", ["model"], "for the graphs model"),
    ],
)
def test_triton_python_backend_refuses_what_it_cannot_run(
    task: PackageTask, precision: str, graphs: list[str], told: str
) -> None:
    made = {name: ir.Model(ir.Graph([], [], nodes=[]), ir_version=10) for name in graphs}
    with pytest.raises(InputError, match=told):
        triton._refuse_for_python(_facts(task, precision), made)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"input_ids": ["batch", "n"], "pixel_values": ["batch", 3]}, "takes pixel_values"),
        ({"input_ids": ["batch", "n"], "past_key_values.0.key": ["batch", "heads", "past_n", 4]}, "takes past_key"),
        ({"input_ids": ["batch", "n"]}, "no logits"),
    ],
)
def test_triton_generate_refuses_graph_that_is_not_continued_by_tokens(
    inputs: dict[str, list[Any]], told: str
) -> None:
    values = [ir.val(name, ir.DataType.FLOAT, shape) for name, shape in inputs.items()]
    outputs = [] if told == "no logits" else [ir.val("logits", ir.DataType.FLOAT, ["batch", "n", 9])]
    with pytest.raises(InputError, match=told):
        writing._refuse_states(ir.Model(ir.Graph(values, outputs, nodes=[]), ir_version=10))


@pytest.mark.parametrize("target", ["genai", "hf", "optimum"])
def test_package_backend_of_triton_for_other_target_is_refused(
    target: str, decoder_run: Path, tmp_path: Path
) -> None:
    result = run("package", decoder_run, "--for", target, "--backend", "python", "-o", tmp_path / "p")
    assert result.exit_code == 1 and "--backend with --for" in result.stdout
    assert not list(tmp_path.iterdir())


# --- the programs in the server, which stands in for itself ------------------------------------------------


class Response:
    def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
        self.tensors, self.error = {t.name: t.value for t in output_tensors}, error


class Sender:
    """Keeps what is sent. cancelled: after how many answers the client goes away."""

    def __init__(self, cancelled: int | None = None) -> None:
        self.sent: list[Response] = []
        self.cancelled, self.over = cancelled, False

    def send(self, response: Response, flags: int = 0) -> None:
        assert not self.over
        self.sent.append(response)
        self.over = bool(flags)

    def is_cancelled(self) -> bool:
        return self.cancelled is not None and len(self.sent) >= self.cancelled

    @property
    def text(self) -> str:
        return "".join(r.tensors["text_output"][0].decode() for r in self.sent)


class Request:
    def __init__(self, values: dict[str, Any], sender: Sender | None = None) -> None:
        self.values, self.sender = values, sender

    def get_response_sender(self) -> Any:
        return self.sender

    def requested_output_names(self) -> list[str]:
        return ["logits"]


class Tensor:
    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def as_numpy(self) -> Any:
        return self.value


class Error:
    INVALID_ARG, INTERNAL, CANCELLED, UNAVAILABLE = range(4)

    def __init__(self, words: str, code: int = 0) -> None:
        self.words, self.code = words, code


class Backend(types.ModuleType):
    """triton_python_backend_utils, as far as the programs use it."""

    Tensor, InferenceResponse, TritonError = Tensor, Response, Error
    TritonModelException: ClassVar[type[Exception]] = RuntimeError
    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    Logger = types.SimpleNamespace(log_info=lambda words: None)

    @staticmethod
    def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
        return Tensor(name, request.values[name]) if name in request.values else None


@pytest.fixture
def loaded(packed: Packed, decoder_run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """loaded(model, **args) → its model.py, as the server imports and initializes it."""
    folder = packed(decoder_run, "triton", backend="python").output
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend("triton_python_backend_utils"))
    monkeypatch.delitem(sys.modules, "onnx_session", raising=False)
    done = []

    def get(model: str, **args: str) -> Any:
        home = folder / model
        monkeypatch.syspath_prepend(home / "1")
        spec = util.spec_from_file_location("model", home / "1" / "model.py")
        assert spec is not None and spec.loader is not None
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made = _parsed(home / "config.pbtxt")
        parameters = {k: {"string_value": v.string_value} for k, v in made.parameters.items()}
        about = {"max_batch_size": made.max_batch_size, "parameters": parameters}
        given = {
            "model_repository": str(home), "model_version": "1", "model_config": json.dumps(about),
            "model_instance_kind": "CPU", "model_instance_device_id": "0",
        }  # fmt: skip
        found = module.TritonPythonModel()
        found.initialize(given | args)
        done.append(found)
        return found

    yield get
    for found in done:
        getattr(found, "finalize", lambda: None)()
    sys.modules.pop("onnx_session", None)


def asked(model: Any, *wanted: tuple[Sender, dict[str, Any]]) -> None:
    """Requests that come at once, until each has its last answer."""
    model.execute([Request({k: np.array([v]) for k, v in values.items()}, sender) for sender, values in wanted])
    model.arrived.put(None)
    model.worker.join(60)
    assert not model.worker.is_alive()


def test_triton_generate_writes_unmerged_text(decoder: tuple[Path, Path, Path], loaded: Callable[..., Any]) -> None:
    """Twelve at once, more than have a cache at a time; whole, in pieces, sampled, and refused ones among them."""
    base, adapter, _ = decoder
    ask = {"text_input": PROMPT.encode(), "max_tokens": 32}
    whole, pieces, short, greedy, drawn, again, other = (Sender() for _ in range(7))
    gone, wrong, long, none = Sender(cancelled=3), Sender(), Sender(), Sender()
    many = Sender()
    model = loaded("adapter-generate")
    done = model._goes_on
    model._goes_on = lambda text: done(text) or _stop_when_all(model, everything)
    everything = [whole, pieces, short, greedy, drawn, again, other, gone, wrong, long, none, many]
    asked_all = (
        (whole, ask), (pieces, ask | {"stream": True}), (short, ask | {"max_tokens": 2}),
        (greedy, ask | {"temperature": 9.0, "top_k": 1}), (drawn, ask | {"temperature": 2.0, "seed": 1}),
        (again, ask | {"temperature": 2.0, "seed": 1}), (other, ask | {"temperature": 2.0, "seed": 2}),
        (gone, ask | {"stream": True}), (wrong, ask | {"top_p": 1.5}), (long, ask | {"text_input": b"x" * 400}),
        (none, {"max_tokens": 3}), (many, ask | {"max_tokens": 1000}),
    )  # fmt: skip
    model.execute(
        [Request({k: np.array([v], dtype=object) for k, v in values.items()}, s) for s, values in asked_all]
    )
    model.worker.join(120)
    wanted = unmerged_text(base, adapter)
    assert whole.text == wanted == pieces.text == greedy.text
    assert len(whole.sent) == 1 and len(pieces.sent) > 16
    assert short.text == wanted[: len(short.text)] and 0 < len(short.text) < 8
    assert drawn.text == again.text != other.text and wanted not in (drawn.text, other.text)
    assert [r.error.words for s in (gone, wrong, long, none) for r in s.sent if r.error] == [
        "the client cancelled the request", "top_p is 1.5; expected: above 0, at most 1",
        "text_input has 400 tokens, and text is at most 256 with its answer",
        "text_input is missing, or has no tokens",
    ]  # fmt: skip
    assert gone.sent[-1].error.code == Error.CANCELLED and 3 <= len(gone.sent) < 6
    assert many.text.startswith(wanted) and len(many.text) <= 256


def _stop_when_all(model: Any, senders: list[Sender]) -> bool:
    """Ends the worker after the last answer."""
    if all(sender.over for sender in senders):
        model.arrived.put(None)
    return False


def test_triton_graph_answers_a_batch_as_one_by_one(loaded: Callable[..., Any]) -> None:
    model = loaded("adapter")
    shapes = {v.name: [1 if d == "batch_size" else d for d in v.shape] for v in model.session.get_inputs()}
    rows = []
    for ids in ([20, 30, 40], [50, 60, 70]):
        row = {n: np.zeros([d if isinstance(d, int) else 0 for d in s], "float32") for n, s in shapes.items()}
        rows.append(row | {"input_ids": np.array([ids]), "attention_mask": np.ones((1, 3), "int64")})
    together = [r.tensors["logits"] for r in model.execute([Request(row) for row in rows])]
    alone = [model.execute([Request(row)])[0].tensors["logits"] for row in rows]
    np.testing.assert_allclose(np.array(together), np.array(alone), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1
    wrong = Request(rows[0] | {"input_ids": np.array([[20, 30, 10**6]])})
    answers = model.execute([wrong, Request(rows[0])])
    assert "onnxruntime" in answers[0].error.words and model.execute([wrong])[0].error
    np.testing.assert_allclose(answers[1].tensors["logits"], alone[0], atol=1e-5)


def test_triton_on_a_gpu_writes_the_same_text(loaded: Callable[..., Any], played: Callable[..., None]) -> None:
    """States stay on the device, which the CPU plays."""
    texts = []
    for kind in ("CPU", "GPU"):
        if kind == "GPU":
            played()
        sender, model = Sender(), loaded("adapter-generate", model_instance_kind=kind)
        assert (model.decoder.device, model.decoder.number) == ("cuda" if kind == "GPU" else "cpu", 0)
        goes_on = model._goes_on
        model._goes_on = lambda text, goes_on=goes_on, model=model, sender=sender: (
            goes_on(text) or _stop_when_all(model, [sender])
        )
        ask = {"text_input": np.array([PROMPT.encode()], dtype=object), "max_tokens": np.array([8])}
        model.execute([Request(ask, sender)])
        model.worker.join(60)
        texts.append(sender.text)
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ({"compiled": False}, "has no CUDA provider: pip install onnxruntime-gpu"),
        ({"library": "libcudnn.so.9"}, "CUDA does not start"),
        ({"silent": True}, "CUDA does not start"),
    ],
)
def test_triton_session_refuses_what_would_be_silent(
    faults: dict[str, Any], told: str, loaded: Callable[..., Any], played: Callable[..., None]
) -> None:
    played(**faults)
    with pytest.raises(RuntimeError, match=told):
        loaded("adapter", model_instance_kind="GPU")


def test_triton_session_without_its_graph_is_refused(loaded: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="side by side"):
        loaded("adapter-generate", model_config=json.dumps({"parameters": {"graph": {"string_value": "x"}}}))
