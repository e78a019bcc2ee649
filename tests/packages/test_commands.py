"""The command as it is typed: what it refuses, what odd names become, the hub, and what other commands say."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard

from lora_export.commands.main import cli
from lora_export.contracts import PackageOptions
from lora_export.errors import OutputError
from lora_export.packages.companions import for_both, tokenizer_for_both
from lora_export.progress import Silent
from lora_export.storage.sealed import read_sealed, sha256, write_sealed
from lora_export.workflows.packaging import package, push
from tests.packages.conftest import Packed

ODD = (
    'quo"te\'s', "new\nline: x", "<script>alert(1)</script>", "../../etc",
    "é漢\u202e", "`$(rm -rf .)`", "{{ 7*7 }}",
    "[a](javascript:x)", "END\nimport os", "---\nlicense: mit",
)  # fmt: skip


def invoke(*words: object) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(cli, [*map(str, words), "--json"])
    assert "Traceback" not in result.output and "internal error" not in result.output, result.output
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def changed(decoder_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """changed(path, text, **manifest) → a copy of the run in which a file holds `text`; its manifest fits."""

    def make(name: str | None = None, text: str | None = None, **fields: Any) -> Path:
        run = Path(shutil.copytree(decoder_run, tmp_path / "run"))
        document = read_sealed(run / "manifest.json")
        if name is not None:
            if text is None:
                (run / name).unlink()
                del document["files"][name]
            else:
                (run / name).write_text(text)
                document["files"][name] = {"sha256": sha256(run / name), "size": (run / name).stat().st_size}
        for key, value in fields.items():
            document[key] = value
        write_sealed(run / "manifest.json", document)
        return run

    return make


def test_package_command_prints_document(decoder_run: Path, tmp_path: Path) -> None:
    code, found = invoke("package", decoder_run, "--for", "optimum", "-o", tmp_path / "p", "--name", "tiny-1.0")
    assert code == 0
    on_disk = {p.name: p.stat().st_size for p in (tmp_path / "p").iterdir()}
    assert found["files"] == on_disk and found["bytes"] == sum(on_disk.values())
    assert (found["target"], found["name"], found["signed"], found["archive"]) == (
        "optimum",
        "tiny-1.0",
        False,
        None,
    )
    assert (tmp_path / "p" / "README.md").read_text().startswith("# tiny-1.0 for Optimum")
    code, found = invoke("package", decoder_run, "--for", "optimum", "-o", tmp_path / "p")
    assert code == 1 and "--force" in found["next"]
    assert invoke("package", decoder_run, "--for", "optimum", "-o", tmp_path / "p", "--force")[0] == 0
    code, found = invoke("inspect", tmp_path / "p")
    assert code == 0 and (found["kind"], found["target"], found["base"]) == ("package", "optimum", "base")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--for", "hf", "--variant", "q4"], "--variant q4 with --for hf"),
        (["--for", "optimum", "--variant", "q4"], "no variants"),
        (["--for", "transformers-js", "--variant", "q5"], "q4f16, all"),
        (["--for", "genai", "--push", "me/model"], "--push with --for genai"),
        (["--for", "hf", "--private"], "--private without --push"),
        (["--for", "hf", "--name", "../x"], "letters, digits"),
        (["--for", "triton", "--name", "a\nb"], "letters, digits"),
    ],
)
def test_package_invalid_options_are_refused(
    words: list[str], found: str, decoder_run: Path, tmp_path: Path
) -> None:
    code, document = invoke("package", decoder_run, *words, "-o", tmp_path / "p")
    assert code == 1 and found in json.dumps(document), document
    assert not list(tmp_path.iterdir())


def test_package_q4f16_of_fp32_model_is_refused(encoder_run: Path, tmp_path: Path) -> None:
    words = ["--for", "transformers-js", "--variant", "q4f16", "-o", tmp_path / "p"]
    code, document = invoke("package", encoder_run, *words)
    assert code == 1 and "q4f16" in document["found"] and "fp16" in document["expected"]


@pytest.mark.parametrize(
    ("name", "missing"),
    [("merged/tokenizer.json", "no tokenizer"), ("merged/chat_template.jinja", "no chat template")],
)
def test_package_without_required_files_is_refused(
    name: str, missing: str, changed: Callable[..., Path], tmp_path: Path, decoder_run: Path
) -> None:
    """A chat template where the base is called a chat model; without that name there is nothing to miss."""
    base = read_sealed(decoder_run / "manifest.json")["base"]
    run = changed(name, None, base=base | {"name": "Tiny-1B-Instruct"})
    code, document = invoke("package", run, "--for", "hf", "-o", tmp_path / "p")
    assert code == 1 and missing in document["found"] and Path(name).name in document["expected"]
    assert not (tmp_path / "p").exists()


def test_package_base_without_chat_template_is_accepted(
    changed: Callable[..., Path], decoder_run: Path, tmp_path: Path
) -> None:
    """Its package has none either, though that of the same run with a template does."""
    run = changed("merged/chat_template.jinja", None)
    for source, name in ((decoder_run, "with"), (run, "without")):
        code, document = invoke("package", source, "--for", "genai", "-o", tmp_path / name)
        assert code == 0, document
        told = [p.name for p in (tmp_path / name).rglob("*") if p.is_file() and b"chat_template" in p.read_bytes()]
        files = [p.name for p in (tmp_path / name).rglob("*chat_template*")]
        assert bool(files) == (name == "with"), files
        settings = json.loads(next((tmp_path / name).rglob("tokenizer_config.json")).read_text())
        assert "chat_template" not in settings or name == "with", told


def test_package_failed_or_changed_run_is_refused(
    decoder_run: Path, changed: Callable[..., Path], tmp_path: Path
) -> None:
    report = json.loads((decoder_run / "report" / "report.json").read_text())
    run = changed("report/report.json", json.dumps(report | {"status": "failed"}))
    code, document = invoke("package", run, "--for", "hf", "-o", tmp_path / "p")
    assert code == 1 and "did not pass its gates" in document["found"]
    (run / "merged" / "NOTICE").write_text("another")
    code, document = invoke("package", run, "--for", "hf", "-o", tmp_path / "p")
    assert code == 1 and "merged/NOTICE was changed" in document["found"]


@pytest.mark.parametrize("place", ["merged", "onnx", ".", "nothing"])
def test_package_of_no_run_is_refused(place: str, decoder_run: Path, packed: Packed, tmp_path: Path) -> None:
    folder = packed(decoder_run, "hf").output if place == "." else decoder_run / place
    code, document = invoke("package", folder, "--for", "hf", "-o", tmp_path / "p")
    assert code == 1 and "not a run" in document["found"] and "merge-and-export" in document["next"]


def test_package_run_without_merged_folder_is_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    run = changed()
    document = read_sealed(run / "manifest.json")
    shutil.rmtree(run / "merged")
    document["files"] = {n: f for n, f in document["files"].items() if not n.startswith("merged/")}
    write_sealed(run / "manifest.json", document)
    for target in ("hf", "transformers-js"):
        code, found = invoke("package", run, "--for", target, "-o", tmp_path / target)
        assert code == 1 and "--no-merged-folder" in found["found"]
    assert invoke("package", run, "--for", "genai", "-o", tmp_path / "genai")[0] == 0
    assert invoke("verify", tmp_path / "genai")[0] == 0


def test_switch_package_is_refused(decoder: tuple[Path, Path, Path], packed: Packed) -> None:
    base, adapter, run = decoder
    folder = packed(run, "hf").output
    code, document = invoke("switch", "-m", folder, "--from", adapter, "--to", adapter, "-b", base)
    assert code == 1 and "is a package" in document["found"]


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ODD)
def test_package_unusual_names_stay_text(
    odd: str, changed: Callable[..., Path], decoder_run: Path, tmp_path: Path
) -> None:
    document = read_sealed(decoder_run / "manifest.json")
    report = json.loads((decoder_run / "report" / "report.json").read_text())
    run = changed(
        "report/report.json", json.dumps(report | {"title": odd}), base=document["base"] | {"name": odd},
        adapters=[a | {"name": odd} for a in document["adapters"]],
    )  # fmt: skip
    for target in ("hf", "triton", "genai"):
        folder = package(run, target, tmp_path / target, PackageOptions(licence=odd), Silent()).output
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
        assert all(re.fullmatch(r"[A-Za-z0-9._/-]+", n) for n in names)
        text = (folder / "README.md").read_text()
        body = text.partition("\n---\n")[2] if target == "hf" else text
        assert "<script>" not in body and "[a](" not in body
        programs = 3 if target == "hf" else 1  # with the requests to vLLM and TGI
        assert body.count("<<'END'") == programs == len(re.findall(r"^END$", body, re.M))
        bom = json.loads((folder / "bom.cdx.json").read_text())
        assert bom["metadata"]["component"]["type"] == "machine-learning-model"
        assert invoke("verify", folder)[0] == 0
    card = ModelCard.load(tmp_path / "hf" / "README.md", ignore_metadata_errors=True)
    front = yaml.safe_load((tmp_path / "hf" / "README.md").read_text().split("\n---\n")[0].removeprefix("---\n"))
    assert "\n" not in front["base_model"] and set(front) == set(card.data.to_dict())


# --- the hub -----------------------------------------------------------------------------------------------


class Hub:
    """What HfApi is asked, and what it answers."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self) -> None:
        Hub.calls = []

    def create_repo(self, repository: str, **words: Any) -> str:
        Hub.calls.append((repository, words))
        return f"https://hub.invalid/{repository}"

    def upload_folder(self, **words: Any) -> None:
        Hub.calls.append(("upload", words))


def test_package_push_uploads(decoder_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    words = ["--for", "hf", "-o", tmp_path / "p", "--push", "me/model", "--private"]
    code, document = invoke("package", decoder_run, *words)
    assert code == 0 and document["pushed"] == "https://hub.invalid/me/model"
    assert Hub.calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert Hub.calls[1][1]["folder_path"] == tmp_path / "p" and Hub.calls[1][1]["repo_id"] == "me/model"


def test_package_push_offline_keeps_package(tmp_path: Path, packed: Packed, decoder_run: Path) -> None:
    folder = packed(decoder_run, "hf").output
    with pytest.raises(OutputError, match="the package is written") as refused:
        push(folder, "me/model", False, Silent())
    assert "hf upload me/model" in str(refused.value.next_step)


# --- configurations ----------------------------------------------------------------------------------------


def test_package_config_has_legacy_rotary_spelling() -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 7.0, "factor": 8.0}
    found = for_both({"rope_parameters": scaled, "dtype": "bfloat16"})
    assert found["rope_theta"] == 7.0 and found["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert found["rope_parameters"] == scaled and found["torch_dtype"] == "bfloat16"
    assert for_both({"rope_theta": 3.0}) == {"rope_theta": 3.0}
    kept = for_both({"rope_theta": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}})
    assert kept["rope_theta"] == 3.0
    nested = for_both({"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}})
    assert nested["text_config"]["rope_theta"] == 5.0


def test_package_tokenizer_loads_in_both_versions() -> None:
    found = tokenizer_for_both(
        {"tokenizer_class": "TokenizersBackend", "is_local": True, "extra_special_tokens": ["<a>"]}
    )
    assert found == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": ["<a>"],
    }
    kept = {"tokenizer_class": "BertTokenizer", "model_input_names": ["x"], "extra_special_tokens": {"a": "<a>"}}
    assert tokenizer_for_both(kept) == kept


GENERATION = {"eos_token_id": [2, 5], "top_p": 0.3, "early_stopping": "never"}


def test_package_search_defaults_accept_eos_list(changed: Callable[..., Path], tmp_path: Path) -> None:
    run = changed("merged/generation_config.json", json.dumps(GENERATION))
    folder = package(run, "genai", tmp_path / "p", PackageOptions(), Silent()).output
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2, 5] and config["search"]["top_p"] == 0.3
    assert config["search"]["early_stopping"] is False  # genai stops at a word where it reads true or false
