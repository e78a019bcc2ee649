"""mistral.rs generates what the unmerged model does from an hf package, and refuses a folder of transformers 5.

A merge keeps the base's config.json as it is. `package --for hf` also writes the older spelling of the rotary
embedding and of tokenizers, without which this reader stops.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.consumers.answers import cell
from tests.consumers.environments import installed, python, version
from tests.consumers.models import TOKENS, Delivered

pytestmark = pytest.mark.slow
COMMAND = 'mistralrs.Runner(which=mistralrs.Which.Plain("PACKAGE", dtype=mistralrs.ModelDType.F32))'

_LOAD = """
import json
import mistralrs
plain, said = mistralrs.Which.Plain({folder!r}, dtype=mistralrs.ModelDType.F32), []
try:
    runner = mistralrs.Runner(which=plain, token_source="none")
except ValueError as error:
    runner, said = None, str(error)
"""
_CONTINUE = (
    _LOAD
    + """
for prompt in {prompts!r} if runner else ():
    given = mistralrs.CompletionRequest(model="default", prompt=prompt, max_tokens={most}, temperature=0.0)
    said.append(runner.send_completion_request(given).choices[0].text)
print(json.dumps(said))
"""
)


@pytest.fixture(scope="module")
def interpreter() -> Path:
    return installed("mistralrs", ("mistralrs==0.9.5",))


def _opened(interpreter: Path, package: str, delivered: Delivered) -> Any:
    told = (package, delivered.kind, delivered.name, COMMAND)
    return cell("mistral.rs", version(interpreter, "mistralrs"), *told)


def test_mistralrs_generates_as_unmerged_model(interpreter: Path, decoder: Delivered) -> None:
    package = decoder.package("hf")
    with _opened(interpreter, "hf", decoder) as answer:
        found = python(interpreter, _CONTINUE.format(folder=str(package), prompts=decoder.prompts, most=TOKENS))
        assert tuple(found) == decoder.wanted.texts
        count = TOKENS * len(found)
        answer.same(f"the text of {count} tokens of {len(found)} prompts")


def test_mistralrs_refuses_merged_folder_of_transformers_5(interpreter: Path, decoder: Delivered) -> None:
    """Its base was written by transformers 5: the theta is in rope_parameters alone."""
    assert "rope_theta" not in json.loads((decoder.merged / "config.json").read_text())
    with _opened(interpreter, "merged", decoder) as answer:
        said = python(interpreter, _LOAD.format(folder=str(decoder.merged)) + "print(json.dumps(said))")
        assert "missing field `rope_theta`" in said
        answer.refused(said)
