"""Packages of pipelines: what is in them, what runs them, and what is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_export import manifest
from lora_export.allowed import pipelines as allowed
from lora_export.contracts import AdapterChoice, PackageOptions, VerifyOptions
from lora_export.errors import ExportError, InputError, LoraExportError
from lora_export.packages import contents
from lora_export.packages.pipelines import families, laying, programs
from lora_export.progress import Silent
from lora_export.storage.sealed import hash_folder
from lora_export.workflows import delivered, verifying
from lora_export.workflows.packaging import package
from lora_export.workflows.pipelines import packaging as of_pipelines
from tests.diffusion.runs import INDEX, make_run, picture, save_adapter, save_base

GRAPHS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside its base and style.safetensors."""
    root = tmp_path_factory.mktemp("pipeline")
    return make_run(save_base(root / "base"), save_adapter(root / "style.safetensors"), root / "run")


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that only copy draw nothing: a picture of noise stands for theirs."""

    def draw(
        folder: Path, class_name: str, prompt: str, how: Any, target: Path, provider: str, progress: Any
    ) -> None:
        assert (class_name, how.width, provider) == ("StableDiffusionPipeline", 16, "cpu")
        picture(target)

    monkeypatch.setattr(of_pipelines, "draw", draw)


Packed = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """packed("hf") → the package, made once; not to be changed."""
    done: dict[str, Path] = {}

    def get(target: str) -> Path:
        if target not in done:
            place = tmp_path_factory.mktemp("packages") / target
            done[target] = package(run, target, place, PackageOptions(), Silent()).output
        return done[target]

    return get


@pytest.fixture
def copied(packed: Packed, tmp_path: Path) -> Packed:
    """A copy of a package, free to be spoiled."""
    return lambda target: Path(shutil.copytree(packed(target), tmp_path / "package"))


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def json_of(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_optimum_package_holds_graphs_scheduler_and_tokenizer(packed: Packed, run: Path) -> None:
    folder = packed("optimum")
    wanted = {f"{part}/{name}" for part in GRAPHS for name in ("model.onnx", "model.onnx_data", "config.json")}
    wanted |= {"model_index.json", "scheduler/scheduler_config.json", "sample.png", "LICENSE.md"}
    wanted |= {f"tokenizer/{p.name}" for p in (run / "merged" / "tokenizer").iterdir()}
    assert names(folder) == wanted | {"README.md", "manifest.json", "bom.cdx.json"}
    for name in wanted:
        if name.startswith(("tokenizer/", "scheduler/")) or name == "model_index.json":
            assert (folder / name).read_bytes() == (run / "merged" / name).read_bytes()


def test_hf_package_holds_merged_models_and_certificates(packed: Packed, run: Path) -> None:
    folder, merged = packed("hf"), run / "merged"
    own = {"README.md", "manifest.json", "bom.cdx.json", "sample.png"}
    assert names(folder) - own == names(merged) - {"README.md"}
    for name in names(folder) - own:
        assert (folder / name).read_bytes() == (merged / name).read_bytes()


@pytest.mark.parametrize("target", ["optimum", "hf"])
def test_package_verifies_and_names_what_it_is(target: str, packed: Packed) -> None:
    folder = packed(target)
    found = delivered.verify(folder, None, False, None, Silent())
    assert found.verified, found
    document = json_of(folder / "manifest.json")
    assert (document["task"], document["architecture"]) == ("text-to-image", "StableDiffusionPipeline")
    assert document["name"] == "style"
    assert document["sample"]["drawing"]["latents"] == [1, 4, 8, 8]
    assert set(document["base"]["files"]) > {"unet/config.json", "tokenizer/merges.txt", "model_index.json"}


def test_package_is_reproducible(packed: Packed, run: Path, tmp_path: Path) -> None:
    again = package(run, "optimum", tmp_path / "elsewhere", PackageOptions(), Silent()).output
    assert hash_folder(again) == hash_folder(packed("optimum"))


def test_archive_of_pipeline_verifies(run: Path, tmp_path: Path) -> None:
    done = package(run, "optimum", tmp_path / "style", PackageOptions(archive="tar.zst"), Silent())
    assert delivered.verify(done.output, None, False, None, Silent()).verified


def test_model_card_says_what_pipeline_is(packed: Packed) -> None:
    card = (packed("hf") / "README.md").read_text()
    for line in ("library_name: diffusers", "pipeline_tag: text-to-image", "base_model: base"):
        assert f"\n{line}\n" in card
    assert "license: creativeml-openrail-m" in card
    assert "StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)" in card
    assert "![sample](sample.png)" in card


@pytest.mark.parametrize("target", ["genai", "triton", "transformers-js"])
def test_package_refuses_runtimes_without_pipelines(target: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pipelines of images") as error:
        package(run, target, tmp_path / "p", PackageOptions(), Silent())
    assert "--for optimum, hf" in str(error.value.expected)
    assert not (tmp_path / "p").exists()


def test_package_refuses_run_without_scheduler(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for part in ("merged", "onnx"):
        shutil.rmtree(copy / part / "scheduler")
    _seal(copy)
    with pytest.raises(InputError, match="the run has no scheduler"):
        package(copy, "optimum", tmp_path / "p", PackageOptions(), Silent())


def _seal(run: Path) -> None:
    """As if the run had been made as it is."""
    document = manifest.read(run)
    (run / manifest.NAME).unlink()
    files = hash_folder(run)
    manifest.write_sealed(run / manifest.NAME, manifest.as_json(replace(document, files=files)))


# --- what an older Optimum reads ------------------------------------------------------------------------------


def test_lay_graphs_mends_what_transformers_5_saved(run: Path, tmp_path: Path) -> None:
    export = tmp_path / "onnx"
    shutil.copytree(run / "onnx", export)
    index = INDEX | {
        "tokenizer": ["transformers", "T5Tokenizer"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
    }
    (export / "model_index.json").write_text(json.dumps(index))
    settings = {"extra_special_tokens": ["<extra>"], "tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (export / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    stage = tmp_path / "stage"
    stage.mkdir()
    laying.lay_graphs(of_export(export), stage)
    written = json_of(stage / "model_index.json")
    assert written["tokenizer"] == ["transformers", "T5TokenizerFast"]
    assert written["safety_checker"] == [None, None] and written["requires_safety_checker"] is False
    mended = json_of(stage / "tokenizer" / "tokenizer_config.json")
    assert mended["additional_special_tokens"] == ["<extra>"] and "extra_special_tokens" not in mended


def of_export(folder: Path) -> Any:
    from lora_export.onnx_export import load_export

    return load_export(folder)


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        (["unet/diffusion_pytorch_model.safetensors"], ""),
        (["merged/unet/diffusion_pytorch_model.fp16.safetensors", "merged/vae/x.safetensors"], "fp16"),
        (["transformer/diffusion_pytorch_model.bf16-00001-of-00002.safetensors"], "bf16"),
        (["transformer/diffusion_pytorch_model-00001-of-00002.safetensors"], ""),
        (["model.safetensors"], ""),
    ],
)
def test_weights_of_finds_variant(files: list[str], variant: str) -> None:
    assert laying.weights_of(files) == variant


def test_program_names_variant_and_leaves_out_checker(packed: Packed) -> None:
    facts = contents.facts_of(packed("hf"), contents.read(packed("hf")))
    index = {**facts.config, "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    code = facts.target.check(replace(facts, config=index, weights="fp16"), "here").code
    assert "from_pretrained(folder, variant='fp16', safety_checker=None)" in code
    assert "picture.png" not in code and "../picture.png" in facts.target.snippet(facts, "here").code


def test_program_takes_class_from_list_alone(packed: Packed) -> None:
    facts = contents.facts_of(packed("hf"), contents.read(packed("hf")))
    odd = replace(facts, config={"_class_name": "os; import evil"})
    with pytest.raises(ExportError, match="no package is made of os"):
        facts.target.check(odd, "here")


def test_program_marks_no_picture_and_names_provider(packed: Packed) -> None:
    facts = contents.facts_of(packed("optimum"), contents.read(packed("optimum")))
    sdxl = replace(facts, config={"_class_name": "StableDiffusionXLPipeline"}, providers=("cuda", "cpu"))
    snippet = facts.target.check(sdxl, "here")
    words = 'from_pretrained(folder, provider="CUDAExecutionProvider", add_watermarker=False)'
    assert f"ORTStableDiffusionXLPipeline.{words}" in snippet.code and "onnxruntime-gpu" in snippet.setup


@pytest.mark.parametrize(
    ("name", "denoiser", "shape", "size"),
    [
        ("StableDiffusionPipeline", {"in_channels": 4, "sample_size": 64}, (1, 4, 32, 32), 256),
        ("StableDiffusionXLPipeline", {"in_channels": 4, "sample_size": [128, 128]}, (1, 4, 64, 64), 512),
        ("StableDiffusion3Pipeline", {"in_channels": 16, "sample_size": 128}, (1, 16, 64, 64), 512),
        ("FluxPipeline", {"in_channels": 64}, (1, 256, 64), 256),
        ("StableDiffusionPipeline", {"in_channels": 4, "sample_size": 50}, (1, 4, 24, 24), 192),
    ],
)
def test_drawing_has_latents_that_pipeline_takes(
    name: str, denoiser: dict[str, Any], shape: tuple[int, ...], size: int
) -> None:
    made = families.drawing_of(name, denoiser, {"block_out_channels": [1, 2, 3, 4]}, "fp32", Path("x"))
    assert (made.latents, made.width, made.height) == (shape, size, size)


# --- the verdict on a picture ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "precision", "passed", "said"),
    [
        ("equal", "fp32", True, "pixel by pixel"),
        (61.2, "fp32", True, "61.2 dB from the picture of the validated fp32 graphs"),
        (59.9, "fp32", False, "at least 60 dB: fewer than one number in fifteen"),
        (float("nan"), "fp32", False, "instead of a PSNR"),
        (float("inf"), "fp32", False, "instead of a PSNR"),
        ("fine", "fp32", False, "instead of a PSNR"),
        (True, "fp32", False, "instead of a PSNR"),
        (41.5, "fp16", True, "no limit is set"),
        (None, "int8", False, "instead of a PSNR"),
    ],
)
def test_verify_judges_picture_by_its_psnr(
    answer: Any, precision: str, passed: bool, said: str, packed: Packed
) -> None:
    facts = contents.facts_of(packed("optimum"), contents.read(packed("optimum")))
    assert facts.sample is not None and facts.sample.drawing is not None
    sample = replace(facts.sample, drawing=replace(facts.sample.drawing, precision=precision))
    found = delivered._judged(answer, replace(facts, sample=sample))
    assert found.passed is passed and said in found.note, found.note


FAKE = """
import sys, types
import numpy as np
class Pipeline:
    @classmethod
    def from_pretrained(cls, folder):
        made = cls()
        made.folder = folder
        return made
    def set_progress_bar_config(self, disable):
        pass
    def __call__(self, prompt, height, width, latents, **more):
        from PIL import Image
        drawn = np.asarray(Image.open(self.folder + "/sample.png"), dtype=float) / 255
        assert drawn.shape == (height, width, 3) and latents.shape == (1, 4, 8, 8)
        OFF
        return types.SimpleNamespace(images=[drawn])
sys.modules["optimum.onnxruntime"].ORTStableDiffusionPipeline = Pipeline
"""


@pytest.mark.parametrize(
    ("off", "answer"),
    [("", "equal"), ("drawn[0, 0, 0] = (255 * drawn[0, 0, 0] + 128) % 256 / 255", 34.84), ("drawn[:] = 0", None)],
)
def test_program_prints_psnr_against_sample(
    off: str, answer: Any, packed: Packed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed("optimum")
    for name in ("optimum", "optimum.onnxruntime"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    facts = contents.facts_of(folder, contents.read(folder))
    code = facts.target.check(facts, str(folder)).code
    exec(FAKE.replace("OFF", off) + code, {})
    said = json.loads(capsys.readouterr().out)
    if answer is None:
        answer = -10 * np.log10(np.mean((np.asarray(Image.open(folder / "sample.png")) / 255) ** 2))
    assert said == (answer if answer == "equal" else pytest.approx(answer, abs=0.01))
    assert programs.EQUAL == "equal"


# --- lists ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unet": ["diffusers", "os"]}, "unet is"),
        ({"unet": ["evil", "UNet2DConditionModel"]}, "unet is"),
        ({"unet": ["pipeline_code", "MyUNetModel"]}, "unet is"),
        ({"scheduler": ["subprocess", "Popen"]}, "scheduler is"),
        ({"scheduler": ["diffusers", "DiffusionPipeline"]}, "scheduler is"),
        ({"tokenizer": ["transformers", "CLIPTokenizer", "code"]}, "tokenizer is"),
        ({"tokenizer": ["transformers", None]}, "tokenizer is"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "names the part 'controlnet'"),
        ({"_class_name": ["pipeline.py", "MyPipeline"]}, "_class_name is ['pipeline.py'"),
        ({"_class_name": "os.system"}, "_class_name is"),
        ({"custom_pipeline": "evil/code"}, "custom_pipeline"),
        ({"requires_safety_checker": {"a": 1}}, "requires_safety_checker"),
        ({"safety_checker": ["diffusers", "StableDiffusionSafetyChecker"]}, "safety_checker is"),
    ],
)
def test_check_index_refuses_what_names_code(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(INDEX))
    allowed.check_index(path)
    path.write_text(json.dumps(INDEX | change))
    with pytest.raises(InputError) as error:
        allowed.check_index(path)
    assert said in error.value.found, error.value.found


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "os"},
        {"_class_name": ["code.py", "MyScheduler"]},
        {"auto_map": "x"},
        {"trained_betas": {"file": "x"}},
        {"solver_type": "a" * 201},
    ],
)
def test_check_scheduler_refuses_what_it_does_not_know(change: dict[str, Any], tmp_path: Path) -> None:
    path, good = tmp_path / "scheduler_config.json", {"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2]}
    path.write_text(json.dumps(good))
    allowed.check_scheduler(path)
    path.write_text(json.dumps(good | change))
    with pytest.raises(LoraExportError):
        allowed.check_scheduler(path)


def _more(folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("unet/modeling.py", b"raise SystemExit"),
        ("unet/diffusion_pytorch_model.bin", b"pickle"),
        ("unet/libcustom.so", b"\x7fELF"),
        ("lora/model.safetensors", b"{}"),
        ("unet/inner/config.json", b"{}"),
        ("unet/sample.png", b"\x89PNG"),
        ("sample.png", b"GIF89a"),
        ("sample.png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR" + b"\x00\x01\x00\x00" * 2 + b"\x08\x02"),
        ("unet/config.json", b'{"_class_name": ["code.py", "MyModel"]}'),
        ("unet/config.json", b'{"_class_name": "UNet2DConditionModel", "auto_map": {"a": "b"}}'),
        ("unet/diffusion_pytorch_model.safetensors.index.json", b'{"weight_map": {"a": "../../x.safetensors"}}'),
        ("unet/diffusion_pytorch_model.safetensors.index.json", b'{"weight_map": {"a": "x.bin"}}'),
        ("tokenizer/tokenizer_config.json", b'{"tokenizer_class": "evil.Tokenizer"}'),
    ],
)
def test_verify_refuses_strange_contents(name: str, content: bytes, copied: Packed) -> None:
    folder = copied("hf")
    _more(folder, name, content)
    _reseal(folder)
    found = delivered.verify(folder, None, True, None, Silent())
    assert [c.name for c in found.checks if not c.passed] == ["contents"], found
    assert name.rpartition("/")[2] in str(found.checks) or name.partition("/")[0] in str(found.checks)


def _reseal(folder: Path) -> None:
    """As somebody does who changes a file and the manifest."""
    document = json_of(folder / "manifest.json")
    del document["digest"]
    files = {n: h for n, h in hash_folder(folder).items() if n != "manifest.json"}
    manifest.write_sealed(folder / "manifest.json", document | {"files": manifest.as_json(files)})


# --- a run, checked again --------------------------------------------------------------------------------------


def test_verify_run_covers_files_of_base_and_adapter(run: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(run.parent, tmp_path / "all"))
    base, adapter = root / "base", AdapterChoice(root / "style.safetensors")

    def failed() -> list[str]:
        checks, _ = manifest.verify(root / "run", base, [adapter])
        return [f"{c.name}: {c.note}" for c in checks if not c.passed]

    assert failed() == []
    (base / "tokenizer" / "merges.txt").write_text("#version: 0.3\n")
    (base / "unet" / "more.json").write_text("{}")
    (base / "README.md").write_text("of no matter")
    assert failed() == ["base_files: unet/more.json was added", "base_files: tokenizer/merges.txt was changed"]
    adapter.folder.write_bytes(adapter.folder.read_bytes() + b" ")
    assert failed()[-1] == "adapter_files: style.safetensors was changed"


def test_verify_run_without_base_says_what_it_did_not_check(run: Path) -> None:
    found = verifying.verify(run, None, [], VerifyOptions(), Silent())
    assert found.verified, found
    assert {c.name for c in found.checks} >= {"run_files", "files", "unet: certificate", "onnx_graphs"}
    assert any("takes the base (-b) and every adapter (-a)" in text for text in found.not_checked)


def test_verify_run_finds_changed_file_of_component(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "merged" / "scheduler" / "scheduler_config.json").write_text("{}")
    _seal(copy)
    found = verifying.verify(copy, None, [], VerifyOptions(), Silent())
    wrong = [c for c in found.checks if not c.passed]
    assert [c.name for c in wrong] == ["files"] and "scheduler_config.json was changed" in wrong[0].note


def test_verify_run_finds_options_that_were_changed(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    document = manifest.read(copy)
    options = json.loads(json.dumps(document.options))
    options["merge"]["dtype"] = "float16"
    manifest.write_sealed(copy / manifest.NAME, manifest.as_json(replace(document, options=options)))
    found = verifying.verify(copy, None, [], VerifyOptions(), Silent())
    assert "its merge options are not those of the certificate" in [c.note for c in found.checks if not c.passed]
