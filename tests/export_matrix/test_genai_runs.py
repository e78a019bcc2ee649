"""onnxruntime-genai itself on the builder's exports: the greedy tokens of transformers' `generate`."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_export.contracts import ExportOptions
from lora_export.onnx_export import export
from lora_export.progress import Silent
from tests.export_matrix.builder import MODELS
from tests.export_matrix.configurations import CONFIGURATIONS
from tests.onnx_export import architectures
from tests.onnx_export.conftest import VOCABULARY

NEW = 12
# Experts; experts and convolutions; convolutions; heads that attention does not rotate; layers without positions.
NAMES = ["gpt-oss", "lfm2-moe", "lfm2", "llama-headdim", "smollm3-nope"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_genai_writes_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    architecture = {**CONFIGURATIONS, **MODELS}[name]
    architectures.save(architecture, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "onnx", ExportOptions("fp32", "cpu", engine="genai"), progress=Silent())
    model, runtime = architectures.build(architecture), og.Model(str(tmp_path / "onnx"))
    for length in (20, 31):
        prompt = torch.randint(4, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
        wanted = model.generate(
            prompt, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=3, eos_token_id=2
        )
        options = og.GeneratorParams(runtime)
        options.set_search_options(max_length=length + NEW, min_length=length + NEW, do_sample=False)
        generator = og.Generator(runtime, options)
        generator.append_tokens(prompt[0].numpy().astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_sequence(0).tolist() == wanted[0].tolist()
