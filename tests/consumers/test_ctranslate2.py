"""CTranslate2 converts hf packages, and computes what the unmerged model does, in fp32.

Its converter reads with transformers 4.57, and so takes a bare merged folder only if the base was not written by
transformers 5.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator
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
COMMAND = "ct2-transformers-converter --model PACKAGE --output_dir CT2"
CLOSE = 1e-4

_CONTINUE = """
import ctranslate2
model = ctranslate2.Generator(folder, compute_type="float32")
given = dict(max_length=most, sampling_topk=1, beam_size=1, include_prompt_in_result=False)
print(json.dumps([r.sequences_ids[0] for r in model.generate_batch(rows, **given)]))
"""
_EMBED = """
import ctranslate2
import numpy as np
model = ctranslate2.Encoder(folder, compute_type="float32")
states = [np.array(model.forward_batch([row]).last_hidden_state)[0] for row in rows]
print(json.dumps([s.tolist() for s in states]))
"""
_TRANSLATE = """
import ctranslate2
model = ctranslate2.Translator(folder, compute_type="float32")
given = dict(max_decoding_length=most, beam_size=1)
print(json.dumps([r.hypotheses[0] for r in model.translate_batch(rows, **given)]))
"""
_TRANSCRIBE = """
import ctranslate2
import numpy as np
model = ctranslate2.models.Whisper(folder, compute_type="float32")
given = dict(beam_size=1, max_length=most, suppress_blank=False, suppress_tokens=[])
heard = [ctranslate2.StorageView.from_array(np.load(row)) for row in rows]
print(json.dumps([model.generate(h, [first], **given)[0].sequences_ids[0] for h in heard]))
"""


@pytest.fixture(scope="module")
def interpreter() -> Path:
    return installed("ctranslate2", ("ctranslate2==4.8.5", "torch==2.13.0", "transformers==4.57.6"))


@pytest.fixture
def converted() -> Iterator[Path]:
    """A place for what the converter writes, as large as the model."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "ct2"


def _convert(interpreter: Path, package: Path, converted: Path) -> str:
    """The last line of what the converter says; '' if it converted."""
    command = [interpreter.with_name("ct2-transformers-converter"), "--model", package, "--output_dir", converted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def _opened(interpreter: Path, package: str, delivered: Delivered) -> Any:
    told = (package, delivered.kind, delivered.name, COMMAND)
    return cell("CTranslate2", version(interpreter, "ctranslate2"), *told)


def _rows(delivered: Delivered, package: Path) -> list[list[str]]:
    """Tokens of each text, in words."""
    reader = transformers.AutoTokenizer.from_pretrained(package)
    return [reader.convert_ids_to_tokens(reader(text)["input_ids"]) for text in delivered.prompts]


def test_ctranslate2_generates_as_unmerged_model(interpreter: Path, decoder: Delivered, converted: Path) -> None:
    package = decoder.package("hf")
    with _opened(interpreter, "hf", decoder) as answer:
        assert _convert(interpreter, package, converted) == ""
        rows = _rows(decoder, package)
        found = ask(interpreter, _CONTINUE, folder=str(converted), rows=rows, most=TOKENS)
        assert tuple(map(tuple, found)) == decoder.wanted.tokens
        answer.same(f"{TOKENS * len(rows)} of {TOKENS * len(rows)} tokens of {len(rows)} prompts")


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_ctranslate2_refuses_merged_folder_of_transformers_5(
    interpreter: Path, kind: str, converted: Path, request: pytest.FixtureRequest
) -> None:
    delivered = request.getfixturevalue(kind)
    with _opened(interpreter, "merged", delivered) as answer:
        said = _convert(interpreter, delivered.merged, converted)
        assert "TokenizersBackend" in said
        answer.refused(said)


@pytest.mark.parametrize("package", ["merged", "hf"])
def test_ctranslate2_embeds_as_unmerged_model(
    interpreter: Path, encoder: Delivered, package: str, converted: Path
) -> None:
    folder = encoder.merged if package == "merged" else encoder.package(package)
    with _opened(interpreter, package, encoder) as answer:
        assert _convert(interpreter, folder, converted) == ""
        rows = _rows(encoder, folder)
        found = ask(interpreter, _EMBED, folder=str(converted), rows=rows)
        pairs = zip(found, encoder.wanted.states, strict=True)
        worst = max(float(np.abs(np.array(a) - np.array(b)).max()) for a, b in pairs)
        assert worst < CLOSE
        answer.same(f"states of {len(rows)} texts", worst)


def test_ctranslate2_translates_as_unmerged_model(
    interpreter: Path, encoder_decoder: Delivered, converted: Path
) -> None:
    """The tokenizer has no unknown token, which CTranslate2 asks for at its first request."""
    package = encoder_decoder.package("hf")
    with _opened(interpreter, "hf", encoder_decoder) as answer:
        assert _convert(interpreter, package, converted) == ""
        settings = json.loads((converted / "config.json").read_text())
        assert settings["unk_token"] is None
        (converted / "config.json").write_text(json.dumps(settings | {"unk_token": settings["eos_token"]}))
        rows = _rows(encoder_decoder, package)
        said = ask(interpreter, _TRANSLATE, folder=str(converted), rows=rows, most=TOKENS)
        reader = transformers.AutoTokenizer.from_pretrained(package)
        found = tuple(tuple(reader.convert_tokens_to_ids(tokens)) for tokens in said)
        assert found == encoder_decoder.wanted.tokens
        count = sum(map(len, found))
        answer.same(f"{count} of {count} tokens of {len(rows)} texts")


@pytest.mark.parametrize("package", ["merged", "hf"])
def test_ctranslate2_transcribes_as_unmerged_model(
    interpreter: Path, speech: Delivered, package: str, converted: Path, tmp_path: Path
) -> None:
    folder = speech.merged if package == "merged" else speech.package(package)
    rows = heard(speech, tmp_path)
    with _opened(interpreter, package, speech) as answer:
        assert _convert(interpreter, folder, converted) == ""
        start = json.loads((folder / "config.json").read_text())["decoder_start_token_id"]
        first = [start, speech.wanted.tokens[0][0]]  # the second says that there are no time stamps
        found = ask(interpreter, _TRANSCRIBE, folder=str(converted), rows=rows, first=first, most=TOKENS)
        assert tuple((first[1], *said) for said in found) == speech.wanted.tokens
        count = sum(map(len, found))
        answer.same(f"{count} of {count} tokens of {len(rows)} sounds")
