"""The program in each README gives the unmerged model's answer, and `verify --run` finds it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from lora_export.packages.programs import NUMBERS
from lora_export.progress import Silent
from lora_export.workflows import delivered
from tests.consumers import environments as consumers
from tests.consumers.agreement import NEAR
from tests.consumers.models import Delivered
from tests.packages.test_packages import PROMPT, run_readme

pytestmark = pytest.mark.slow


def program(folder: Path) -> str:
    """The program in a README, which runs in the folder, for one that runs elsewhere."""
    text = (folder / "README.md").read_text()
    found = re.search(r"<<'END'\n(.*?)\nEND$", text, re.S | re.M)
    assert found
    return found[1].replace("'.'", repr(str(folder))).replace('"."', json.dumps(str(folder)))


def packed(model: Delivered, target: str) -> tuple[Path, Path | None]:
    """A package, and where its runtime is, if not in this environment."""
    words = ["--variant", "fp32"] if target == "transformers-js" else []
    runtimes = {"optimum": consumers.optimum_python, "transformers-js": consumers.node_folder}
    return model.package(target, *words), runtimes[target]() if target in runtimes else None


def said_by(folder: Path, target: str) -> Any:
    if target == "optimum":
        return consumers.python(consumers.optimum_python(), program(folder))
    if target == "transformers-js":
        return consumers.node(program(folder))
    return run_readme(folder)


@pytest.fixture(scope="module")
def states(encoder: Delivered) -> Any:
    """The unmerged encoder's first output for the prompt of READMEs: (tokens, 384)."""
    model = transformers.AutoModel.from_pretrained(encoder.root / "base", dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(model, encoder.root / "adapter").eval()
    inputs = transformers.AutoTokenizer.from_pretrained(encoder.root / "base")(PROMPT, return_tensors="pt")
    with torch.no_grad():
        return tuned(**inputs).last_hidden_state[0].numpy()


@pytest.mark.parametrize("target", ["genai", "optimum", "transformers-js", "hf"])
def test_readme_of_decoder_says_what_unmerged_model_says(target: str, decoder: Delivered) -> None:
    folder, _ = packed(decoder, target)
    assert said_by(folder, target) == decoder.wanted.texts[0]


@pytest.mark.parametrize("target", ["optimum", "transformers-js", "hf"])
def test_readme_of_encoder_gives_numbers_of_unmerged_model(target: str, encoder: Delivered, states: Any) -> None:
    folder, _ = packed(encoder, target)
    np.testing.assert_allclose(said_by(folder, target), states.flatten()[:NUMBERS], atol=NEAR)


@pytest.mark.parametrize("target", ["genai", "optimum", "triton", "transformers-js", "hf"])
@pytest.mark.parametrize("kind", ["decoder", "speech"])
def test_verify_run_of_package_passes(kind: str, target: str, request: pytest.FixtureRequest) -> None:
    """Of a speech model it is only known that its runtime hears a second of silence; what runtimes make of spoken
    sounds is compared elsewhere."""
    folder, runtime = packed(request.getfixturevalue(kind), target)
    found = delivered.verify(folder, None, True, runtime, Silent())
    assert found.verified and any(c.name == "runs" for c in found.checks), found
