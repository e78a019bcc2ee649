"""SmolLM2-135M with the adapters of this repository: the bars of the main job through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import ROOT, Run

pytestmark = pytest.mark.slow

ADAPTERS = ROOT / "examples" / "adapters"
QLORA = ["--training-quantization", "nf4", "--training-double-quant"]
STORIES = {"lora-speeches": [], "qlora-speeches": QLORA}


@pytest.fixture(scope="module", params=list(STORIES))
def story(
    request: pytest.FixtureRequest, smollm2: Path, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Any]:
    out = tmp_path_factory.mktemp("smollm2") / request.param
    adapter = ADAPTERS / request.param
    code, document, talk = run(
        "merge-and-export", "-b", smollm2, "-a", adapter, "-o", out, "--provider", "cpu", *STORIES[request.param]
    )
    assert code == 0, talk
    return request.param, out, document


def checks(document: Any) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in document["validate"]["checks"]}


def test_smollm2_gates_pass(story: tuple[str, Path, Any]) -> None:
    _, _, document = story
    found = checks(document)
    assert document["validate"]["passed"]
    assert found["logits_max_abs"]["value"] <= found["noise_floor_max_abs"]["value"]
    assert found["onnx_logits_max_abs"]["value"] <= 1e-3
    assert found["greedy_agreement"]["value"] == found["onnx_greedy_agreement"]["value"] == 1.0
    assert found["tensor_errors"]["value"] == 0
    assert document["export"]["nodes"] <= 342
    assert document["benchmark"]["graph_identical"] is True


def test_smollm2_onnx_generates_like_transformers(story: tuple[str, Path, Any]) -> None:
    """64 greedy tokens of the ONNX folder in onnxruntime-genai, and of the merged folder in transformers."""
    import onnxruntime_genai as og
    import torch
    import transformers

    _, out, _ = story
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    ids = tokenizer("The condition of the Treasury", return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0].tolist()
    onnx = og.Model(str(out / "onnx"))
    parameters = og.GeneratorParams(onnx)
    parameters.set_search_options(do_sample=False, max_length=ids.shape[1] + 64, min_length=ids.shape[1] + 64)
    generator = og.Generator(onnx, parameters)
    generator.append_tokens(ids[0].numpy().astype("int32"))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == wanted


def test_smollm2_companions_are_copied(story: tuple[str, Path, Any], smollm2: Path) -> None:
    _, out, _ = story
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / "merged" / name).read_bytes() == (smollm2 / name).read_bytes()
    assert (out / "merged" / "config.json").read_bytes() == (smollm2 / "config.json").read_bytes()
    assert (out / "onnx" / "chat_template.jinja").is_file()


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp16", 0.99, 275e6), ("int8", 0.99, 150e6), ("int4", 0.4, 86e6)]
)
def test_smollm2_lower_precisions_report_survival(
    smollm2: Path, run: Run, tmp_path: Path, precision: str, least: float, most: float
) -> None:
    """int4 loses half of this adapter's effect on the built-in text: the default gate does not let it through.
    most: bytes of the folder, with embedding and head as one tensor."""
    adapter = ADAPTERS / "lora-speeches"
    words = ["--precision", precision, "--min-survival", least, "--provider", "cpu", "--max-seconds", 20]
    code, document, talk = run("merge-and-export", "-b", smollm2, "-a", adapter, "-o", tmp_path / "out", *words)
    assert code == 0, talk
    found = checks(document)
    assert document["export"]["precision"] == precision
    assert sum(f.stat().st_size for f in (tmp_path / "out" / "onnx").rglob("*") if f.is_file()) <= most
    # What the precision costs is visible: far more than fp32, and no more than it costs the base.
    assert found["onnx_logits_max_abs"]["value"] > 1e-3
    assert found["onnx_logits_max_abs"]["value"] <= 4 * found["onnx_noise_floor_max_abs"]["value"]
    assert (found["onnx_adapter_survival"]["value"] > 0.99) == (precision != "int4")


def test_smollm2_tampered_projection_fails(smollm2: Path, run: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = ADAPTERS / "lora-speeches"
    merged = tmp_path / "merged"
    code, _, _ = run("merge", "-b", smollm2, "-a", adapter, "-o", merged, "--dtype", "bfloat16")
    assert code == 0
    state = load_file(merged / "model.safetensors")
    name = "model.layers.17.self_attn.v_proj.weight"
    state[name] = (state[name].float() * 1.02).to(state[name].dtype)
    save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
    code, document, talk = run("validate", "-b", smollm2, "-a", adapter, "-m", merged, "--dtype", "bfloat16")
    assert code == 3
    assert document["weight_errors"] == [name]
    assert "tensor_errors" in talk


def test_minilm_story_passes(minilm: Path, run: Run, tmp_path: Path) -> None:
    """MiniLM with a LoRA of random matrices: merged, exported with fused attention, compared."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModel.from_pretrained(minilm)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"]))
    torch.manual_seed(0)
    for key, parameter in tuned.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    words = ["--provider", "cpu", "--max-seconds", 20]
    code, document, talk = run("merge-and-export", "-b", minilm, "-a", tmp_path / "adapter", "-o", out, *words)
    assert code == 0, talk
    assert document["export"]["engine"] == "dynamo"
    assert checks(document)["onnx_embedding_cosine"]["value"] > 0.99999
    assert json.loads((out / "report" / "report.json").read_text())["status"] == "passed"


def test_minilm_validate_command_passes(minilm: Path, run: Run, tmp_path: Path) -> None:
    """A real encoder with its own tokenizer: honest passes, in memory and streamed alike, and spoiled fails."""
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    tuned = peft.get_peft_model(transformers.AutoModel.from_pretrained(minilm), config)
    torch.manual_seed(0)
    for key, parameter in tuned.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(tmp_path / "adapter")
    words = ["-b", minilm, "-a", tmp_path / "adapter"]
    assert run("merge", *words, "-o", tmp_path / "merged")[0] == 0
    words += ["-m", tmp_path / "merged"]
    code, resident, talk = run("validate", *words)
    assert code == 0, talk
    assert "layer by layer" not in talk
    assert {"logits_max_abs", "embedding_cosine", "pooler_output_max_abs"} <= {
        c["name"] for c in resident["checks"]
    }
    assert "random" not in resident["checks"][0]["note"]
    code, streamed, talk = run("validate", *words, "--max-memory", "50MB")
    assert code == 0, talk
    assert "layer by layer" in talk
    for a, b in zip(streamed["checks"], resident["checks"], strict=True):
        assert (a["name"], a["value"]) == (b["name"], pytest.approx(b["value"], rel=1e-6, abs=1e-6))
    state = load_file(tmp_path / "merged" / "model.safetensors")
    name = next(n for n in state if n.endswith("layer.3.attention.self.value.weight"))
    state[name] *= 1.05
    save_file(state, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    code, spoiled, talk = run("validate", *words)
    assert code == 3
    assert len(spoiled["weight_errors"]) == 1
    assert name.endswith(spoiled["weight_errors"][0])
