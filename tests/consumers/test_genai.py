"""Packages in onnxruntime-genai, which runs in this project's environment."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.consumers.agreement import same_tokens
from tests.consumers.answers import cell
from tests.consumers.environments import python
from tests.consumers.models import TOKENS, Delivered

pytestmark = pytest.mark.slow
CONSUMER, COMMAND = "onnxruntime-genai", 'onnxruntime_genai.Model("PACKAGE")'
_HERE = Path(sys.executable)

_CONTINUE = """
import json
import onnxruntime_genai as og
model = og.Model({folder!r})
reader = og.Tokenizer(model)
said = []
for prompt in {prompts!r}:
    ids = reader.encode(prompt)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + {tokens}, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    said.append(generator.get_sequence(0)[len(ids):].tolist())
print(json.dumps(said))
"""

_HEAR = """
import json
import onnxruntime_genai as og
model = og.Model({folder!r})
processor = model.create_multimodal_processor()
said = []
for sound in {sounds!r}:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length={tokens} + 1, do_sample=False, num_beams=1)
    generator = og.Generator(model, params)
    generator.set_inputs(processor(["<|startoftranscript|>"], audios=og.Audios.open(sound)))
    while not generator.is_done():
        generator.generate_next_token()
    said.append(generator.get_sequence(0)[1:].tolist())
print(json.dumps(said))
"""


def version() -> str:
    import onnxruntime_genai as og

    return str(og.__version__)


def without_end(rows: Any, end: int) -> list[list[int]]:
    """The unmerged model's answers to sounds have no end of text either."""
    return [[*row[:-1]] if row[-1] == end else [*row] for row in rows]


def test_genai_continues_as_unmerged_decoder(decoder: Delivered) -> None:
    with cell(CONSUMER, version(), "genai", decoder.kind, decoder.name, COMMAND) as told:
        folder = str(decoder.package("genai"))
        said = python(_HERE, _CONTINUE.format(folder=folder, prompts=decoder.prompts, tokens=TOKENS))
        told.same(same_tokens(said, decoder))


def test_genai_transcribes_as_unmerged_speech_model(speech: Delivered) -> None:
    with cell(CONSUMER, version(), "genai", speech.kind, speech.name, COMMAND) as told:
        sounds = [str(speech.root / name) for name in speech.prompts]
        said = python(_HERE, _HEAR.format(folder=str(speech.package("genai")), sounds=sounds, tokens=TOKENS))
        told.same(same_tokens(without_end(said, 50256), speech))


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_genai_package_of_other_kinds_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    delivered: Delivered = request.getfixturevalue(kind)
    with cell(CONSUMER, version(), "genai", delivered.kind, delivered.name, COMMAND) as told:
        said = delivered.refusal("genai")
        assert "without a genai_config.json" in said
        told.refused(said)
