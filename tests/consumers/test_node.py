"""Packages on Node: transformers.js, and ONNX Runtime's own module with what a test has tokenised."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.consumers.agreement import near, same_tokens
from tests.consumers.answers import cell
from tests.consumers.environments import module_version, node
from tests.consumers.javascript import CONSUMERS, arrays, ask, compare
from tests.consumers.models import TOKENS, Delivered

pytestmark = pytest.mark.slow
KINDS = ["decoder", "encoder", "encoder_decoder", "speech"]
COMMAND = 'AutoModel.from_pretrained(folder, { dtype: "fp32" })'
_SESSION = """
import runtime from "onnxruntime-node";
{ask}
console.log(JSON.stringify(await askSession(runtime, {given})));
"""
_ASK_SESSION = Path(__file__).with_name("ask_session.mjs")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_js_on_node_answers_as_unmerged_model(kind: str, request: pytest.FixtureRequest) -> None:
    delivered: Delivered = request.getfixturevalue(kind)
    version = module_version("@huggingface/transformers")
    with cell(CONSUMERS["node"], version, "transformers-js", delivered.kind, delivered.name, COMMAND) as told:
        compare(told, ask("node", delivered, delivered.package("transformers-js"), "fp32"), delivered)


def _session(graph: Path, delivered: Delivered) -> Any:
    """What onnxruntime-node makes of each prompt's tokens."""
    read = transformers.AutoTokenizer.from_pretrained(delivered.merged)
    ids = [read(p)["input_ids"] for p in delivered.prompts]
    given = {"graph": str(graph), "kind": delivered.kind, "ids": ids, "tokens": TOKENS}
    return node(_SESSION.format(ask=_ASK_SESSION.read_text(), given=json.dumps(given)))


def test_onnxruntime_node_gives_states_of_unmerged_encoder(encoder: Delivered) -> None:
    command = 'InferenceSession.create("optimum/model.onnx")'
    version = module_version("onnxruntime-node")
    with cell("onnxruntime-node", version, "optimum", encoder.kind, encoder.name, command) as told:
        answers = _session(encoder.package("optimum") / "model.onnx", encoder)
        told.same(f"the states of {len(answers)} texts", near(arrays(answers), encoder.wanted.states))


def test_onnxruntime_node_continues_as_unmerged_decoder(decoder: Delivered) -> None:
    command = 'InferenceSession.create("genai/model.onnx")'
    version = module_version("onnxruntime-node")
    with cell("onnxruntime-node", version, "genai", decoder.kind, decoder.name, command) as told:
        told.same(same_tokens(_session(decoder.package("genai") / "model.onnx", decoder), decoder))
