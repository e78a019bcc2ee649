"""Packages in Optimum's ONNX Runtime classes, in an environment with transformers 4.57."""

import pytest

from tests.consumers.agreement import near, same_tokens
from tests.consumers.answers import cell
from tests.consumers.environments import optimum_python, python, version
from tests.consumers.models import RATE, TOKENS, Delivered, sound_of

pytestmark = pytest.mark.slow
CLASSES = {
    "decoder": "ORTModelForCausalLM",
    "encoder": "ORTModelForFeatureExtraction",
    "encoder-decoder": "ORTModelForSeq2SeqLM",
    "speech": "ORTModelForSpeechSeq2Seq",
}
_HEAD = """
import json, torch
from optimum.onnxruntime import {name} as Model
from transformers import AutoProcessor, AutoTokenizer
model = Model.from_pretrained({folder!r})
answers = []
"""
_TEXTS = """
reader = AutoTokenizer.from_pretrained({folder!r})
for text in {prompts!r}:
    inputs = reader(text, return_tensors="pt")
    answers.append({answer})
print(json.dumps(answers))
"""
_SOUNDS = """
reader = AutoProcessor.from_pretrained({folder!r})
for sound in {sounds!r}:
    inputs = reader(torch.tensor(sound).numpy(), sampling_rate={rate}, return_tensors="pt")
    answers.append(model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)[0].tolist())
print(json.dumps(answers))
"""
_GENERATED = "model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)[0, {start}:].tolist()"
_ANSWERS = {
    "decoder": _GENERATED.format(tokens=TOKENS, start="inputs.input_ids.shape[1]"),
    "encoder": "model(**inputs).last_hidden_state[0].tolist()",
    "encoder-decoder": _GENERATED.format(tokens=TOKENS, start="1"),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_optimum_answers_as_unmerged_model(kind: str, request: pytest.FixtureRequest) -> None:
    delivered: Delivered = request.getfixturevalue(kind.replace("-", "_"))
    interpreter, name = optimum_python(), CLASSES[kind]
    release = version(interpreter, "optimum-onnx")
    command = f'{name}.from_pretrained("PACKAGE")'
    with cell("Optimum", release, "optimum", kind, delivered.name, command) as told:
        folder = str(delivered.package("optimum"))
        code = _HEAD.format(name=name, folder=folder)
        if kind == "speech":
            sounds = [sound_of(delivered.root / file).tolist() for file in delivered.prompts]
            code += _SOUNDS.format(folder=folder, sounds=sounds, rate=RATE, tokens=TOKENS)
        else:
            code += _TEXTS.format(folder=folder, prompts=delivered.prompts, answer=_ANSWERS[kind])
        answers = python(interpreter, code)
        if kind == "encoder":
            told.same(f"states of {len(answers)} texts", near(answers, delivered.wanted.states))
        else:
            told.same(same_tokens(answers, delivered))
