"""Packages in a page in headless Chromium: transformers.js on WASM, and on WebGPU with the software adapter."""

import json
import re
from typing import Any

import numpy as np
import pytest

from tests.consumers import browser
from tests.consumers.agreement import near
from tests.consumers.answers import cell
from tests.consumers.environments import module_version, node_folder
from tests.consumers.javascript import CONSUMERS, Place, arrays, ask, compare, folder_of, placed
from tests.consumers.models import Delivered
from tests.docs.pages import ROOT, blocks

pytestmark = pytest.mark.slow
COMMAND = 'AutoModel.from_pretrained("model", {{ dtype: "fp32", device: "{place}" }})'
ON_WASM = ["tiny_decoder", "encoder", "encoder_decoder", "speech"]
ON_WEBGPU = ["encoder", "encoder_decoder"]


@pytest.mark.parametrize(("place", "kind"), [*(("wasm", k) for k in ON_WASM), *(("webgpu", k) for k in ON_WEBGPU)])
def test_page_answers_as_unmerged_model(place: Place, kind: str, request: pytest.FixtureRequest) -> None:
    delivered: Delivered = request.getfixturevalue(kind)
    version, command = module_version("@huggingface/transformers"), COMMAND.format(place=place)
    with cell(CONSUMERS[place], version, "transformers-js", delivered.kind, delivered.name, command) as told:
        compare(told, ask(place, delivered, folder_of(delivered), "fp32"), delivered)


# Of the largest value. Products round their inputs to 8 bits, each build of ONNX Runtime in its own way.
BOUNDS = {"q4": 0.05, "q8": 0.05}
QUANTIZED = ["encoder"]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_graph_in_page_gives_numbers_of_cpu(
    kind: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    """Against ONNX Runtime on the processor, which Node has."""
    delivered: Delivered = request.getfixturevalue(kind)
    wanted = _numbers("node", delivered, dtype)
    for place in ("wasm", "webgpu"):
        for one, other in zip(_numbers(place, delivered, dtype), wanted, strict=True):
            assert np.abs(one - other).max() <= BOUNDS[dtype] * np.abs(other).max(), place


def _numbers(place: Any, delivered: Delivered, dtype: str) -> list[Any]:
    return arrays(ask(place, delivered, folder_of(delivered), dtype, numbers=True))


@pytest.mark.parametrize("place", ["wasm", "webgpu"])
def test_padded_texts_have_states_of_unmerged_encoder(place: Place, encoder: Delivered) -> None:
    """The mask of a batch is heard: its shorter texts get the states that they have alone."""
    states = ask(place, encoder, folder_of(encoder), "fp32", together=True)[0]
    rows = np.array(states["data"], np.float32).reshape(states["dims"])
    near([row[: len(w)] for row, w in zip(rows, encoder.wanted.states, strict=True)], encoder.wanted.states)


def test_attention_runs_on_webgpu(encoder: Delivered) -> None:
    """Nothing between the embeddings and the states goes back to the processor."""
    nodes = placed(encoder, folder_of(encoder), "fp32")
    on_graphics = nodes["WebGpuExecutionProvider"]
    assert on_graphics["Attention"] == 6 and on_graphics["SkipLayerNormalization"] == 12
    assert not {"Attention", "MatMul", "SkipLayerNormalization"} & set(nodes["CPUExecutionProvider"])


@pytest.mark.parametrize("webgpu", [False, True])
def test_page_of_readme_shows_answer(webgpu: bool, encoder: Delivered) -> None:
    folder = folder_of(encoder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    page, answer = (re.search(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("html", "json"))
    assert page and answer
    modules = node_folder() / "node_modules"
    said = browser.shown(page[1], {"model": folder, "node_modules": modules}, webgpu)
    np.testing.assert_allclose(said, json.loads(answer[1]), atol=1e-4)


def test_page_of_documentation_shows_text_of_unmerged_decoder(tiny_decoder: Delivered) -> None:
    page = next(b.code for b in blocks(ROOT / "docs" / "how-to" / "browser.md") if b.language == "html")
    assert tiny_decoder.prompts[0] in page
    modules = node_folder() / "node_modules"
    said = browser.shown(page, {"model": folder_of(tiny_decoder), "node_modules": modules}, webgpu=True)
    assert said == tiny_decoder.wanted.texts[0]


def test_threads_are_there_for_isolated_pages(encoder: Delivered) -> None:
    answers = browser.transformers_js(
        folder_of(encoder), {"kind": "encoder", "prompts": list(encoder.prompts), "threads": 2,
                             "options": {"dtype": "fp32", "device": "wasm"}}
    ).answer  # fmt: skip
    near(arrays(answers), encoder.wanted.states)
