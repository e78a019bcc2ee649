"""The merged folder and the package for the Hub in transformers 5, which wrote the base, and in 4.57."""

import re
import sys
from pathlib import Path

import pytest

from tests.consumers.agreement import near, same_tokens
from tests.consumers.answers import cell
from tests.consumers.environments import optimum_python, python, version
from tests.consumers.models import RATE, TOKENS, Delivered, sound_of

pytestmark = pytest.mark.slow
CLASSES = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModel",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "speech": "AutoModelForSpeechSeq2Seq",
}
OLD, NEW = "transformers 4", "transformers 5"
_CODE = """
import json, numpy, torch
from transformers import AutoProcessor, AutoTokenizer, {name} as Model
model = Model.from_pretrained({folder!r}, torch_dtype=torch.float32).eval()
reader = {reader}.from_pretrained({folder!r})
answers = []
for given in {prompts!r}:
    inputs = reader({given}, return_tensors="pt")
    with torch.no_grad():
        answers.append({answer})
print(json.dumps(answers))
"""
_GENERATED = "model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)[0, {start}:].tolist()"
_ANSWERS = {
    "decoder": _GENERATED.format(tokens=TOKENS, start="inputs.input_ids.shape[1]"),
    "encoder": "model(**inputs).last_hidden_state[0].tolist()",
    "encoder-decoder": _GENERATED.format(tokens=TOKENS, start="1"),
    "speech": _GENERATED.format(tokens=TOKENS, start="0"),
}


def code_for(folder: Path, delivered: Delivered) -> str:
    """A program that prints the answers of the model in a folder."""
    heard, prompts = delivered.kind == "speech", list(delivered.prompts)
    if heard:
        prompts = [sound_of(delivered.root / name).tolist() for name in delivered.prompts]
    return _CODE.format(
        name=CLASSES[delivered.kind],
        folder=str(folder),
        reader="AutoProcessor" if heard else "AutoTokenizer",
        prompts=prompts,
        given=f"numpy.array(given, 'float32'), sampling_rate={RATE}" if heard else "given",
        answer=_ANSWERS[delivered.kind],
    )


def compared(answers: list[list[int]], delivered: Delivered) -> tuple[str, float | None]:
    if delivered.kind == "encoder":
        return f"states of {len(answers)} texts", near(answers, delivered.wanted.states)
    return same_tokens(answers, delivered), None


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("consumer", "package"), [(NEW, "merged"), (NEW, "hf"), (OLD, "hf")])
def test_transformers_answers_as_unmerged_model(
    consumer: str, package: str, kind: str, request: pytest.FixtureRequest
) -> None:
    delivered: Delivered = request.getfixturevalue(kind.replace("-", "_"))
    interpreter = Path(sys.executable) if consumer == NEW else optimum_python()
    release = version(interpreter, "transformers")
    command = f'{CLASSES[kind]}.from_pretrained("PACKAGE")'
    with cell(consumer, release, package, kind, delivered.name, command) as told:
        folder = delivered.merged if package == "merged" else delivered.package(package)
        told.same(*compared(python(interpreter, code_for(folder, delivered)), delivered))


def test_transformers_4_refuses_tokenizer_of_merged_folder(decoder: Delivered) -> None:
    """Which has the base's settings, in the spelling of transformers 5."""
    interpreter = optimum_python()
    command = f'{CLASSES["decoder"]}.from_pretrained("PACKAGE")'
    with cell(OLD, version(interpreter, "transformers"), "merged", "decoder", decoder.name, command) as told:
        with pytest.raises(AssertionError) as failed:
            python(interpreter, code_for(decoder.merged, decoder))
        said = re.search(
            r"ValueError: (Tokenizer class TokenizersBackend does not exist[^.\n]*)", str(failed.value)
        )
        assert said
        told.refused(said[1])


@pytest.mark.parametrize("kind", CLASSES)
def test_base_does_not_answer_as_unmerged_model(kind: str, request: pytest.FixtureRequest) -> None:
    """Otherwise no test of a runtime would tell a merged model from its base."""
    delivered: Delivered = request.getfixturevalue(kind.replace("-", "_"))
    answers = python(Path(sys.executable), code_for(delivered.root / "base", delivered))
    with pytest.raises(AssertionError):
        compared(answers, delivered)
