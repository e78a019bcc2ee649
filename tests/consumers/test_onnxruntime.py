"""The graphs of the Optimum package in ONNX Runtime itself: Python, numpy and the tokenizer."""

import onnxruntime as ort
import pytest
import transformers

from tests.consumers.agreement import near, same_tokens
from tests.consumers.answers import cell
from tests.consumers.loops import continued, features_of, translated
from tests.consumers.models import Delivered

pytestmark = pytest.mark.slow
CONSUMER = "ONNX Runtime (Python)"


def test_onnxruntime_continues_as_unmerged_decoder(decoder: Delivered) -> None:
    command = 'onnxruntime.InferenceSession("PACKAGE/model.onnx")'
    with cell(CONSUMER, ort.__version__, "optimum", decoder.kind, decoder.name, command) as told:
        folder = decoder.package("optimum")
        session = ort.InferenceSession(folder / "model.onnx")
        reader = transformers.AutoTokenizer.from_pretrained(folder)
        told.same(same_tokens([continued(session, reader(p)["input_ids"]) for p in decoder.prompts], decoder))


def test_onnxruntime_encodes_as_unmerged_encoder(encoder: Delivered) -> None:
    command = 'onnxruntime.InferenceSession("PACKAGE/model.onnx")'
    with cell(CONSUMER, ort.__version__, "optimum", encoder.kind, encoder.name, command) as told:
        folder = encoder.package("optimum")
        session = ort.InferenceSession(folder / "model.onnx")
        reader = transformers.AutoTokenizer.from_pretrained(folder)
        names = {i.name for i in session.get_inputs()}
        texts = [{k: v for k, v in reader(t, return_tensors="np").items() if k in names} for t in encoder.prompts]
        states = [session.run(["last_hidden_state"], inputs)[0][0] for inputs in texts]
        told.same(f"states of {len(states)} texts", near(states, encoder.wanted.states))


@pytest.mark.parametrize("kind", ["encoder_decoder", "speech"])
def test_onnxruntime_generates_as_unmerged_model(kind: str, request: pytest.FixtureRequest) -> None:
    delivered: Delivered = request.getfixturevalue(kind)
    command = 'onnxruntime.InferenceSession("PACKAGE/decoder_model_merged.onnx")'
    with cell(CONSUMER, ort.__version__, "optimum", delivered.kind, delivered.name, command) as told:
        folder = delivered.package("optimum")
        encoder, decoder = (
            ort.InferenceSession(folder / f"{name}.onnx") for name in ("encoder_model", "decoder_model_merged")
        )
        config = transformers.AutoConfig.from_pretrained(folder)
        ends = (config.decoder_start_token_id, config.eos_token_id)
        said = [translated(encoder, decoder, given, *ends) for given in features_of(folder, delivered)]
        told.same(same_tokens(said, delivered))
