"""A tiny Qwen2.5-VL with an adapter on both towers: merged, exported, checked with pictures, packaged, and run by
transformers.js and onnxruntime-genai."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lora_export.contracts import AdapterChoice, ExportOptions
from lora_export.merging import merge
from lora_export.onnx_export import export, reweight
from lora_export.progress import Silent
from lora_export.report import load as load_report
from tests import seeing
from tests.consumers import environments as consumers
from tests.consumers.answers import cell
from tests.end_to_end.conftest import Run
from tests.onnx_export.test_reweight import same_files

pytestmark = pytest.mark.slow
COUNT, NAME = 12, "tiny Qwen2.5-VL"
EQUAL = f"{COUNT} of {COUNT} tokens behind a picture and a text"
PROMPT = "ab<|vision_start|><|vision_end|>cd"


@dataclass(frozen=True)
class Made:
    """root: with base, adapter, run and packages; said: greedy tokens of the unmerged model for `inputs`."""

    root: Path
    inputs: dict[str, torch.Tensor]
    said: list[int]


@pytest.fixture(scope="module")
def made(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("seeing")
    base = seeing.save(root / "base")
    seeing.save_adapter(base, root / "adapter")
    words = ["-b", root / "base", "-a", root / "adapter", "-o", root / "run", "--max-time", "5s"]
    code, _, talk = run("merge-and-export", *words)
    assert code == 0, talk
    for target, more in (("transformers-js", ["--variant", "fp32"]), ("genai", [])):
        code, _, talk = run("package", root / "run", "--for", target, "-o", root / target, *more)
        assert code == 0, talk
    inputs = _inputs(root / "base")
    plain = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(root / "base", dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(plain, root / "adapter").eval()
    kinds = (inputs["input_ids"] == 47).long()
    length = inputs["input_ids"].shape[1]
    how = {
        "do_sample": False,
        "max_new_tokens": COUNT,
        "min_new_tokens": COUNT,
        "eos_token_id": 37,
        "pad_token_id": 3,
    }
    said = tuned.generate(**inputs, mm_token_type_ids=kinds, **how)[0, length:].tolist()
    with tuned.disable_adapter():
        other = tuned.generate(**inputs, mm_token_type_ids=kinds, **how)[0, length:].tolist()
    assert said != other, "the adapter changes nothing that is said"
    return Made(root, inputs, said)


def _inputs(base: Path) -> dict[str, torch.Tensor]:
    """PROMPT with a picture, as Qwen's processor makes them: a placeholder for each 2 × 2 patches."""
    config = transformers.AutoConfig.from_pretrained(base)
    seen = seeing.patches(seeing.picture(), config.vision_config)
    count = int(seen["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2
    reader = transformers.AutoTokenizer.from_pretrained(base)
    ids = reader(PROMPT.replace("<|vision_end|>", "<|image_pad|>" * count + "<|vision_end|>"))["input_ids"]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64), **seen}


def test_run_is_checked_with_pictures(made: Made) -> None:
    report = load_report(made.root / "run" / "report")
    assert report.validate is not None and report.validate.passed
    notes = " ".join(check.note or "" for check in report.validate.checks)
    assert "pictures through the folder's own processor" in notes


def test_transformers_js_says_what_the_unmerged_model_says(made: Made) -> None:
    kinds = {
        torch.int64: ("int64", "BigInt64Array.from({}.map(BigInt))"),
        torch.float32: ("float32", "Float32Array.from({})"),
    }
    tensors = []
    for name, value in made.inputs.items():
        kind, array = kinds[value.dtype]
        data = array.format(json.dumps(value.flatten().tolist()))
        tensors.append(f"{name}: new Tensor({kind!r}, {data}, {list(value.shape)})")
    program = f"""
        import {{ AutoModelForImageTextToText, Tensor, env }} from "@huggingface/transformers";
        Object.assign(env, {{ allowRemoteModels: false, localModelPath: "{made.root}/" }});
        const model = await AutoModelForImageTextToText.from_pretrained("transformers-js", {{ dtype: "fp32" }});
        const how = {{ max_new_tokens: {COUNT}, min_new_tokens: {COUNT}, do_sample: false, eos_token_id: 37 }};
        const out = await model.generate({{ {", ".join(tensors)}, ...how }});
        console.log(JSON.stringify(out.tolist()[0].map(Number).slice({made.inputs["input_ids"].shape[1]})));
    """
    release = consumers.TRANSFORMERS_JS.rpartition("@")[2]
    command = 'AutoModelForImageTextToText.from_pretrained("PACKAGE")'
    with cell("transformers.js (Node)", release, "transformers-js", "vision-language", NAME, command) as told:
        assert consumers.node(program) == made.said
        told.same(EQUAL)


def test_transformers_js_prepares_the_picture(made: Made) -> None:
    """The processor of the package: the same patches of a picture that needs no resizing."""
    height, width, _ = seeing.picture().shape
    numbers = seeing.picture().flatten().tolist()
    words = PROMPT.replace("<|vision_end|>", "<|image_pad|><|vision_end|>")
    made_by_js = consumers.node(f"""
        import {{ AutoProcessor, RawImage, env }} from "@huggingface/transformers";
        Object.assign(env, {{ allowRemoteModels: false, localModelPath: "{made.root}/" }});
        const reader = await AutoProcessor.from_pretrained("transformers-js");
        const image = new RawImage(Uint8ClampedArray.from({numbers}), {width}, {height}, 3);
        const inputs = await reader({json.dumps(words)}, image);
        console.log(JSON.stringify([inputs.input_ids.tolist()[0].map(Number), inputs.pixel_values.tolist()]));
    """)
    assert made_by_js[0] == made.inputs["input_ids"][0].tolist()
    torch.testing.assert_close(torch.tensor(made_by_js[1]), made.inputs["pixel_values"], atol=1e-5, rtol=0)


def test_genai_says_what_the_unmerged_model_says(made: Made) -> None:
    import onnxruntime_genai as og
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(seeing.picture()).save(file, "PNG")
    command = 'onnxruntime_genai.Model("PACKAGE")'
    with cell("onnxruntime-genai", og.__version__, "genai", "vision-language", NAME, command) as told:
        model = og.Model(og.Config(str(made.root / "genai")))
        inputs = model.create_multimodal_processor()(PROMPT, images=og.Images.open_bytes(file.getvalue()))
        ids: Any = inputs["input_ids"].as_numpy()
        assert ids.tolist() == made.inputs["input_ids"].tolist()
        params = og.GeneratorParams(model)
        length = ids.shape[1] + COUNT
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.set_inputs(inputs)
        while not generator.is_done():
            generator.generate_next_token()
        assert [int(i) for i in generator.get_sequence(0)[ids.shape[1] :]] == made.said
        told.same(EQUAL)


def test_next_adapter_is_byte_equal_to_a_fresh_export(made: Made, tmp_path: Path) -> None:
    base = made.root / "base"
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    seeing.save_adapter(model, tmp_path / "adapter", seed=3)
    merge(base, [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    reweight(made.root / "run" / "onnx", tmp_path / "merged", tmp_path / "next", progress=Silent())
    export(tmp_path / "merged", tmp_path / "fresh", ExportOptions("fp32", "cpu"), progress=Silent())
    same_files(tmp_path / "next", tmp_path / "fresh")
