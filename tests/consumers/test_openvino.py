"""OpenVINO reads the graphs of genai and Optimum packages as they lie, and computes what the unmerged model does.

It needs no package of its own, and no converter: its frontend of ONNX knows the operators that these graphs have.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.consumers.answers import cell
from tests.consumers.environments import installed, version
from tests.consumers.models import TOKENS, Delivered
from tests.consumers.programs import ask, heard

pytestmark = pytest.mark.slow
COMMAND = 'openvino.Core().compile_model("PACKAGE/{}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})'
CLOSE = 1e-4

_READ = """
import json
import numpy as np
import openvino

core = openvino.Core()


def opened(name):
    return core.compile_model(folder + "/" + name, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def size(at, dimension):
    return 1 if at == 0 else 0 if dimension.is_dynamic else dimension.get_length()


def empty(model):
    "A cache without tokens."
    inputs = ((i.any_name, i.partial_shape) for i in model.inputs if "past" in i.any_name)
    return {n: np.zeros([size(j, d) for j, d in enumerate(shape)], np.float32) for n, shape in inputs}


def run(model, feeds):
    types = {i.any_name: i.element_type.to_dtype() for i in model.inputs}
    return {o.any_name: v for o, v in model({n: np.asarray(feeds[n], t) for n, t in types.items()}).items()}
"""

_DECODE = (
    _READ
    + """
model, said = opened("model.onnx"), []
for ids in prompts:
    state, given, seen, tokens = empty(model), ids, 0, []
    while len(tokens) < most:
        seen += len(given)
        feeds = {"input_ids": np.array([given]), "attention_mask": np.ones((1, seen), np.int64),
                 "position_ids": np.arange(seen - len(given), seen)[None]}
        out = run(model, {**feeds, **state})
        given = [int(out["logits"][0, -1].argmax())]
        state = {n: out[n.replace("past_key_values", "present")] for n in state}
        tokens += given
    said.append(tokens)
print(json.dumps(said))
"""
)

_OPEN = (
    _READ
    + """
try:
    said = opened(file) and ""
except RuntimeError as error:
    said = str(error)
print(json.dumps(said))
"""
)

_EMBED = (
    _READ
    + """
model, found = opened("model.onnx"), []
for row in rows:
    out = run(model, {n: np.array([v]) for n, v in row.items()})
    found.append([out["last_hidden_state"][0].tolist(), out["sentence_embedding"][0].tolist()])
print(json.dumps(found))
"""
)

# Names as Optimum has them: the first step fills the keys and values of the encoder.
_TRANSLATE = (
    _READ
    + """
encoder, decoder, said = opened("encoder_model.onnx"), opened("decoder_model_merged.onnx"), []
for row in rows:
    row = {n: np.load(v) if isinstance(v, str) else np.array([v]) for n, v in row.items()}
    states = run(encoder, row)["last_hidden_state"]
    state, tokens, first = empty(decoder), [], True
    while len(tokens) < most and tokens[-1:] != [end]:
        given = {"input_ids": np.array([[tokens[-1] if tokens else start]]), "encoder_hidden_states": states,
                 "encoder_attention_mask": row.get("attention_mask", np.ones(states.shape[:2], np.int64)),
                 "use_cache_branch": np.array([not first])}
        out = run(decoder, {**given, **state})
        tokens.append(int(out["logits"][0, -1].argmax()))
        state = {n: out[n.replace("past_key_values", "present")] if first or "encoder" not in n else v
                 for n, v in state.items()}
        first = False
    said.append(tokens)
print(json.dumps(said))
"""
)

_TRANSCRIBE_GENAI = (
    _READ
    + """
encoder, decoder, said = opened("encoder.onnx"), opened("decoder.onnx"), []
for row in rows:
    heard = run(encoder, {"audio_features": np.load(row["input_features"])})
    state, tokens = empty(decoder), []
    state |= {n.replace("present", "past"): v for n, v in heard.items() if "cross" in n}
    while len(tokens) < most and tokens[-1:] != [end]:
        out = run(decoder, {"input_ids": np.array([[tokens[-1] if tokens else start]]), **state})
        tokens.append(int(out["logits"][0, -1].argmax()))
        state |= {n: out[n.replace("past", "present")] for n in state if "self" in n}
    said.append(tokens)
print(json.dumps(said))
"""
)


@pytest.fixture(scope="module")
def interpreter() -> Path:
    return installed("openvino", ("openvino==2026.4.1",))


def _opened(interpreter: Path, target: str, delivered: Delivered, file: str = "model.onnx") -> Any:
    told = (target, delivered.kind, delivered.name, COMMAND.format(file))
    return cell("OpenVINO", version(interpreter, "openvino"), *told)


@pytest.mark.parametrize("target", ["genai", "optimum"])
def test_openvino_generates_as_unmerged_model(interpreter: Path, decoder: Delivered, target: str) -> None:
    package = decoder.package(target)
    reader = transformers.AutoTokenizer.from_pretrained(package)
    prompts = [reader(prompt)["input_ids"] for prompt in decoder.prompts]
    with _opened(interpreter, target, decoder) as answer:
        found = ask(interpreter, _DECODE, folder=str(package), prompts=prompts, most=TOKENS)
        assert tuple(map(tuple, found)) == decoder.wanted.tokens
        answer.same(f"{TOKENS * len(prompts)} of {TOKENS * len(prompts)} tokens of {len(prompts)} prompts")


def test_openvino_embeds_as_unmerged_model(interpreter: Path, encoder: Delivered) -> None:
    package = encoder.package("optimum")
    reader = transformers.AutoTokenizer.from_pretrained(package)
    rows = [dict(reader(text)) for text in encoder.prompts]
    with _opened(interpreter, "optimum", encoder) as answer:
        found = ask(interpreter, _EMBED, folder=str(package), rows=rows)
        pairs = zip(found, encoder.wanted.states, encoder.wanted.embeddings, strict=True)
        worst = max(
            float(np.abs(np.array(a) - np.array(b)).max())
            for (states, embedding), wanted, mean in pairs
            for a, b in ((states, wanted), (embedding, mean))
        )
        assert worst < CLOSE
        answer.same(f"states and embeddings of {len(rows)} texts", worst)


def test_openvino_translates_as_unmerged_model(interpreter: Path, encoder_decoder: Delivered) -> None:
    package = encoder_decoder.package("optimum")
    reader = transformers.AutoTokenizer.from_pretrained(package)
    config = json.loads((package / "config.json").read_text())
    rows = [{n: v for n, v in reader(t).items() if n != "token_type_ids"} for t in encoder_decoder.prompts]
    ends = {"start": config["decoder_start_token_id"], "end": config["eos_token_id"], "most": TOKENS}
    with _opened(interpreter, "optimum", encoder_decoder, "decoder_model_merged.onnx") as answer:
        found = ask(interpreter, _TRANSLATE, folder=str(package), rows=rows, **ends)
        assert tuple(map(tuple, found)) == encoder_decoder.wanted.tokens
        count = sum(map(len, found))
        answer.same(f"{count} of {count} tokens of {len(rows)} texts")


@pytest.mark.parametrize("target", ["genai", "optimum"])
def test_openvino_transcribes_as_unmerged_model(
    interpreter: Path, speech: Delivered, target: str, tmp_path: Path
) -> None:
    package = speech.package(target)
    rows = [{"input_features": file} for file in heard(speech, tmp_path)]
    config = json.loads((package / "config.json").read_text())
    ends = {"start": config["decoder_start_token_id"], "end": config["eos_token_id"], "most": TOKENS}
    optimum = (_TRANSLATE, "decoder_model_merged.onnx")
    program, file = optimum if target == "optimum" else (_TRANSCRIBE_GENAI, "decoder.onnx")
    with _opened(interpreter, target, speech, file) as answer:
        found = ask(interpreter, program, folder=str(package), rows=rows, **ends)
        assert tuple(map(tuple, found)) == tuple((*said, ends["end"]) for said in speech.wanted.tokens)
        count = sum(map(len, found))
        answer.same(f"{count} of {count} tokens of {len(rows)} sounds")


@pytest.mark.parametrize("variant", ["q8", "q4"])
def test_openvino_refuses_quantized_embeddings(interpreter: Path, encoder: Delivered, variant: str) -> None:
    """Of the variants for transformers.js. Its frontend takes GatherBlockQuantized of a stored tensor alone; ours
    gets a Reshape of one."""
    package = encoder.package("transformers-js")
    file = f"onnx/model_{'quantized' if variant == 'q8' else variant}.onnx"
    with _opened(interpreter, f"transformers-js {variant}", encoder, file) as answer:
        said = ask(interpreter, _OPEN, folder=str(package), file=file)
        assert "GatherBlockQuantized: 'data' must be a constant" in said
        answer.refused("GatherBlockQuantized: 'data' must be a constant")
