"""What every package holds, and that the same run gives the same bytes."""

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from peft import PeftModel

from lora_export.contracts import ExportOptions, PackageOptions
from lora_export.errors import InputError, OutputError
from lora_export.packages import archive
from lora_export.packages.interpreters import Python
from lora_export.packages.job import PackageFacts, Sample
from lora_export.packages.targets import target_named, targets, triton
from lora_export.packages.tasks import task_of
from lora_export.progress import Silent
from lora_export.storage.sealed import hash_folder
from lora_export.workflows import delivered
from lora_export.workflows.packaging import package, read_run
from lora_export.workflows.pluggable import export_pluggable
from tests.daily import daily, later
from tests.packages.conftest import Packed, save_decoder, save_lora

DECODER_TARGETS = ["genai", "optimum", "triton", "transformers-js", "hf", "mlflow"]
ALL = [("decoder_run", t) for t in DECODER_TARGETS] + [("encoder_run", t) for t in DECODER_TARGETS[1:]]
PROMPT = "The capital of France is"


@pytest.fixture(params=ALL, ids=[f"{r.partition('_')[0]}-{t}" for r, t in ALL])
def made(request: pytest.FixtureRequest, packed: Packed) -> tuple[Path, Path, str]:
    """run, package, target."""
    run, target = request.getfixturevalue(request.param[0]), request.param[1]
    return run, packed(run, target, **_quick(target)).output, target


def _quick(target: str) -> dict[str, Any]:
    return {"variants": ("fp32", "q4")} if target == "transformers-js" else {}


def manifest_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return document


def test_package_registry_has_every_target() -> None:
    assert list(targets()) == [*DECODER_TARGETS, "gguf"]


def test_verify_package_passes(made: tuple[Path, Path, str]) -> None:
    _, folder, target = made
    found = delivered.verify(folder, None, False, None, Silent())
    assert found.verified, found
    assert {c.name for c in found.checks} >= {"manifest", "package_files"} | (
        {"graphs"} if target != "hf" else set()
    )
    assert any("not signed" in text for text in found.not_checked)


def test_package_tokenizer_states_length_of_model(made: tuple[Path, Path, str]) -> None:
    """The bases' state none: other runtimes read transformers' 10^30 as a number of 64 bits, or refuse it."""
    run, folder, _ = made
    (settings,) = folder.rglob("tokenizer_config.json")
    found = json.loads(settings.read_text())["model_max_length"]
    assert found == json.loads((run / "onnx" / "config.json").read_text())["max_position_embeddings"]


def test_package_is_reproducible(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    run, folder, target = made
    again = package(run, target, tmp_path / "elsewhere", PackageOptions(**_quick(target)), Silent()).output
    assert hash_folder(again) == hash_folder(folder)


def test_package_manifest_records_files_and_proof(made: tuple[Path, Path, str]) -> None:
    run, folder, target = made
    manifest, of_run = manifest_of(folder), manifest_of(run)
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    assert manifest["target"] == target
    for part in ("base", "adapters", "versions"):
        assert manifest[part] == of_run[part]
    assert manifest["options"]["run"] == of_run["options"]
    certificate = of_run["files"]["merged/lora_export_certificate.json"]
    assert manifest["certificate"]["sha256"] == certificate["sha256"]
    assert manifest["certificate"]["adapter_tensors"]["used"] > 0
    assert manifest["validation"]["passed"] and manifest["validation"]["checks"]
    assert manifest["latency"]["graph_identical"] is True
    assert manifest["latency"]["verdict"] in ("equivalent", "equivalent_by_structure")


def test_package_has_only_plain_files(packed: Packed, decoder_run: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = package(decoder_run, "optimum", tmp_path / "p", PackageOptions(), Silent()).output
    finally:
        os.umask(old)
    for path in folder.rglob("*"):
        status = path.lstat()
        assert stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1), path
        assert stat.S_IMODE(status.st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_package_names_no_path_of_machine(made: tuple[Path, Path, str]) -> None:
    run, folder, _ = made
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(run.parent).encode() not in path.read_bytes(), path


def test_package_has_licences_and_chat_template(packed: Packed, decoder_run: Path) -> None:
    for target in DECODER_TARGETS:
        folder = packed(decoder_run, target, **_quick(target)).output
        assert (folder / "LICENSE.txt").read_bytes() == b"The licence of the base.\r\n"
        assert (folder / "NOTICE").is_file()
        assert (folder / "chat_template.jinja").read_bytes().endswith(b"{% endfor %}\n\n")
        assert "apache-2.0" in (folder / "README.md").read_text()


def test_package_bom_is_valid_cyclonedx(made: tuple[Path, Path, str]) -> None:
    _, folder, _ = made
    text = (folder / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert [a["name"] for a in model["pedigree"]["ancestors"]] == ["adapter", "base"]
    metrics = {m["type"]: m["value"] for m in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert float(metrics["tensor_errors"]) == 0
    hashes = {c["name"]: c["hashes"][0]["content"] for c in bom["components"] if c["type"] == "file"}
    files = manifest_of(folder)["files"]
    assert hashes == {n: f["sha256"] for n, f in files.items() if n != "bom.cdx.json"}


def test_package_model_card_has_proof(packed: Packed, decoder_run: Path) -> None:
    folder = packed(decoder_run, "hf").output
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "base" and card.data.base_model_relation == "finetune"
    assert card.data.license == "apache-2.0" and card.data.language == "en"
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "transformers"
    assert "adapter" in card.text and "certificate" in card.text
    other = packed(decoder_run, "hf", licence="mit").output
    assert ModelCard.load(other / "README.md").data.license == "mit"


def test_package_base_without_card_has_unknown_licence(packed: Packed, encoder_run: Path) -> None:
    assert ModelCard.load(packed(encoder_run, "hf").output / "README.md").data.license == "unknown"


# --- what it computes --------------------------------------------------------------------------------------


def unmerged_text(base: Path, adapter: Path, count: int = 32) -> str:
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    reader = transformers.AutoTokenizer.from_pretrained(base)
    inputs = reader(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0]
    text: str = reader.decode(tokens[inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("target", daily(["genai", "triton", "hf"], ["genai"]))
def test_package_readme_program_matches_unmerged_model(
    target: str, decoder: tuple[Path, Path, Path], packed: Packed
) -> None:
    """The commands as they stand in the README, run in the package; Triton's with a server that is ONNX Runtime."""
    base, adapter, run = decoder
    folder = packed(run, target).output
    said = run_readme(folder, FAKE_TRITON if target == "triton" else "")
    assert said == unmerged_text(base, adapter)
    checked = delivered.verify(folder, None, True, None, Silent())
    assert checked.verified, checked


def run_readme(folder: Path, before: str = "") -> Any:
    text = (folder / "README.md").read_text()
    program = re.search(r"^python - <<'END'\n(.*?)\nEND$", text, re.S | re.M)
    assert program
    code = f"{before}\n{program[1]}"
    done = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


# Takes requests as the server would, with the inputs, types and sizes of the config, and answers by ONNX Runtime.
FAKE_TRITON = """
import sys, types
import numpy, onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
import tritonclient.grpc as real
TYPES = {"INT64": "TYPE_INT64", "FP32": "TYPE_FP32", "FP16": "TYPE_FP16", "BOOL": "TYPE_BOOL"}
class Client:
    def __init__(self, address):
        assert address == "localhost:8001"
    def infer(self, model, inputs):
        config = text_format.Parse(open(f"{model}/config.pbtxt").read(), model_config_pb2.ModelConfig())
        assert config.name == model
        known = {i.name: i for i in config.input}
        assert {i.name() for i in inputs} == set(known)
        feeds = {}
        for sent in inputs:
            wanted = known[sent.name()]
            assert TYPES[sent.datatype()] == model_config_pb2.DataType.Name(wanted.data_type), sent.name()
            shape = sent.shape()[1:] if config.max_batch_size else sent.shape()
            assert len(shape) == len(wanted.dims) and all(w in (-1, s) for w, s in zip(wanted.dims, shape))
            kind = {"INT64": "int64", "FP32": "float32", "FP16": "float16", "BOOL": "bool"}[sent.datatype()]
            feeds[sent.name()] = numpy.frombuffer(sent._get_content(), kind).reshape(sent.shape())
        session = onnxruntime.InferenceSession(f"{model}/1/model.onnx/model.onnx")
        names = [o.name for o in session.get_outputs()]
        assert names == [o.name for o in config.output]
        return Answer(dict(zip(names, session.run(names, feeds))))
class Answer:
    def __init__(self, values):
        self.values = values
    def get_response(self):
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(name=n) for n in self.values])
    def as_numpy(self, name):
        return self.values[name]
real.InferenceServerClient = Client
"""


@pytest.mark.parametrize("target", ["triton", later("hf")])
def test_package_encoder_matches_unmerged_model(
    target: str, encoder: tuple[Path, Path, Path], packed: Packed
) -> None:
    base, adapter, run = encoder
    folder = packed(run, target).output
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    inputs = transformers.AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt")
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(model, adapter).eval()(**inputs).logits
    said = run_readme(folder, FAKE_TRITON if target == "triton" else "")
    np.testing.assert_allclose(said, wanted.flatten()[:8].numpy(), rtol=1e-4, atol=1e-4)
    assert delivered.verify(folder, None, True, None, Silent()).verified


@pytest.mark.parametrize("target", [*DECODER_TARGETS, "gguf"])
def test_package_program_escapes_prompts(target: str) -> None:
    """The prompt is somebody's text, and the program is code."""
    import ast

    prompt = "a\"b'c\\\nimport os\n\u2028</script>{x} 😀"
    task = task_of("text-generation", "LlamaForCausalLM")
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "eos_token_id": "x'+y"}
    facts = PackageFacts(
        targets()[target], "n", task, "fp32", ("fp32",), ("cpu",), Sample(prompt, "t"), config, ("p'q",)
    )
    snippet = facts.target.check(facts, "/f'{o}lder")
    if isinstance(snippet.interpreter, Python):
        found = {n.value for n in ast.walk(ast.parse(snippet.code)) if isinstance(n, ast.Constant)}
    else:  # strings of JavaScript as JSON writes them
        found = {json.loads(text) for text in re.findall(r'"(?:[^"\\]|\\.)*"', snippet.code)}
    assert prompt in found


def test_verify_run_other_answer_fails(decoder_run: Path, packed: Packed, tmp_path: Path) -> None:
    """Another model under a manifest that fits it: the files agree, the words do not."""
    import shutil

    from lora_export.storage.sealed import read_sealed, write_sealed

    folder = Path(shutil.copytree(packed(decoder_run, "hf").output, tmp_path / "p"))
    document = read_sealed(folder / "manifest.json")
    document["sample"]["text"] = "I never said that."
    write_sealed(folder / "manifest.json", document)
    found = delivered.verify(folder, None, True, None, Silent())
    assert [c.name for c in found.checks if not c.passed] == ["runs"]
    assert delivered.verify(folder, None, False, None, Silent()).verified


@pytest.mark.parametrize("run", ["decoder_run", "encoder_run"])
def test_package_triton_warm_up_runs(run: str, packed: Packed, request: pytest.FixtureRequest) -> None:
    """The request in config.pbtxt, made as the server makes it, goes through ONNX Runtime."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    folder = packed(request.getfixturevalue(run), "triton").output
    (home,) = (p.parent for p in folder.glob("*/config.pbtxt"))
    config = text_format.Parse((home / "config.pbtxt").read_text(), pb.ModelConfig())
    assert config.name == home.name == "adapter"
    assert config.backend == "onnxruntime" and config.max_batch_size == 8
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    assert [g.kind for g in config.instance_group] == [pb.ModelInstanceGroup.KIND_CPU]
    session = ort.InferenceSession(str(home / "1" / "model.onnx" / "model.onnx"))
    kinds = {pb.TYPE_INT64: np.int64, pb.TYPE_FP32: np.float32}
    feeds = {}
    for name, sent in config.model_warmup[0].inputs.items():
        shape, kind = (1, *sent.dims), kinds[sent.data_type]
        if sent.input_data_file:
            data = (home / "warmup" / sent.input_data_file).read_bytes()
            feeds[name] = np.frombuffer(data, kind).reshape(shape)
            assert (feeds[name] == 1).all()
        else:
            feeds[name] = np.zeros(shape, kind)
    assert np.isfinite(session.run(None, feeds)[0]).all()


@pytest.mark.parametrize(
    ("precision", "wanted", "made_for", "providers"),
    [
        ("fp16", None, "auto", ("cpu", "cuda")), ("fp16", None, "cuda", ("cuda", "cpu")),
        ("fp16", None, "tensorrt", ("cuda", "cpu")), ("fp16", "cpu", "cuda", ("cpu", "cuda")),
        ("fp16", "cuda", "cpu", ("cuda", "cpu")), ("bf16", "cpu", "cpu", ("cuda",)),
    ],
)  # fmt: skip
def test_package_providers_are_the_wanted_one_first(
    precision: Any, wanted: Any, made_for: Any, providers: tuple[str, ...], decoder_run: Path
) -> None:
    run = read_run(decoder_run, Silent())
    options = replace(run.manifest.recorded_options, provider=made_for)
    run = replace(run, export=replace(run.export, precision=precision))
    run = replace(run, manifest=SimpleNamespace(recorded_options=options))
    assert target_named("genai").providers(run, wanted) == providers


@pytest.mark.parametrize(
    ("provider", "wheel", "gpus"), [("cpu", "onnxruntime ", ""), ("cuda", "onnxruntime-gpu ", "--gpus all ")]
)
def test_package_triton_of_python_installs_what_the_provider_needs(provider: str, wheel: str, gpus: str) -> None:
    facts: Any = SimpleNamespace(providers=(provider,), backend="python")
    assert f"pip install {wheel}" in triton._start(facts) and f"run --rm {gpus}-" in triton._start(facts)


def test_package_triton_on_cuda_has_cuda_options(packed: Packed, decoder_run: Path) -> None:
    folder = packed(decoder_run, "triton", provider="cuda", name="chat.v2").output
    text = (folder / "chat.v2" / "config.pbtxt").read_text()
    assert "KIND_GPU" in text and "cudnn_conv_algo_search" in text
    assert "--gpus all" in (folder / "README.md").read_text()


# --- genai -------------------------------------------------------------------------------------------------


def test_package_genai_has_config_per_provider(packed: Packed, decoder_run: Path) -> None:
    import onnxruntime_genai as og

    folder = packed(decoder_run, "genai").output
    plain, cuda = (json.loads((folder / n).read_text()) for n in ("genai_config.json", "genai_config.cuda.json"))
    assert plain["model"]["decoder"]["session_options"]["provider_options"] == []
    assert list(cuda["model"]["decoder"]["session_options"]["provider_options"][0]) == ["cuda"]
    assert plain["search"]["temperature"] == 0.7 and plain["search"]["top_k"] == 13
    assert plain["search"]["do_sample"] is True
    assert plain["search"]["max_length"] == plain["model"]["context_length"] == 256
    config = og.Config(str(folder))
    config.overlay((folder / "genai_config.cuda.json").read_text())  # as the README says; the GPU is not needed yet
    first = json.loads((packed(decoder_run, "genai", provider="cuda").output / "genai_config.json").read_text())
    assert first == cuda


@pytest.mark.slow
def test_package_genai_pluggable_adapters_load(decoder: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The run's own is plugged in by the README's program, and says what the unmerged model says; another base does
    not, and is refused."""
    base, adapter, run = decoder
    save_lora(base, tmp_path / "second", ["q_proj"])
    other = save_decoder(tmp_path / "other", initializer_range=0.21)
    for name, model in (("plug", base), ("wrong", other)):
        adapters = [tmp_path / "second", adapter]
        export_pluggable(model, adapters, tmp_path / name, ExportOptions("fp32", "cpu"), Silent())
    made = package(run, "genai", tmp_path / "p", PackageOptions(pluggable=tmp_path / "plug"), Silent())
    assert {n for n in made.files if n.endswith(".onnx_adapter")} == {"adapter.onnx_adapter", "second.onnx_adapter"}
    assert run_readme(made.output) == unmerged_text(base, adapter)
    assert "`second`" in (made.output / "README.md").read_text()
    assert delivered.verify(made.output, None, True, None, Silent()).verified
    with pytest.raises(InputError, match="not the model of this run"):
        package(run, "genai", tmp_path / "q", PackageOptions(pluggable=tmp_path / "wrong"), Silent())
    with pytest.raises(InputError, match="no adapters beside it"):
        package(run, "genai", tmp_path / "q", PackageOptions(pluggable=run / "onnx"), Silent())
    assert not (tmp_path / "q").exists()


def test_package_genai_of_other_engine_is_refused(encoder_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dynamo engine"):
        package(encoder_run, "genai", tmp_path / "p", PackageOptions(), Silent())
    assert not list(tmp_path.iterdir())


# --- archives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar.zst"])
def test_package_archive_is_reproducible_and_complete(
    kind: str, packed: Packed, decoder_run: Path, tmp_path: Path
) -> None:
    made = [
        package(decoder_run, "genai", tmp_path / n, PackageOptions(archive=kind), Silent()) for n in ("one", "two")
    ]
    assert [m.output.name for m in made] == [f"one.{kind}", f"two.{kind}"]
    assert made[0].output.read_bytes() == made[1].output.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {m.output.name for m in made}
    (tmp_path / "out").mkdir()
    archive.extract(made[0].output, tmp_path / "out")
    assert hash_folder(tmp_path / "out") == hash_folder(packed(decoder_run, "genai").output)
    assert delivered.verify(made[0].output, None, False, None, Silent()).verified
    with pytest.raises(OutputError, match="exists"):
        package(decoder_run, "genai", tmp_path / "one", PackageOptions(archive=kind), Silent())
    package(decoder_run, "genai", tmp_path / "one", PackageOptions(archive=kind, force=True), Silent())
