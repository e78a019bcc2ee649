"""What transformers.js answers on Node or in a page, and how it compares with other answers."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.consumers import browser
from tests.consumers.agreement import near, same_tokens
from tests.consumers.answers import Cell
from tests.consumers.environments import node
from tests.consumers.models import TOKENS, Delivered, sound_of

Place = Literal["node", "wasm", "webgpu"]
CONSUMERS: Mapping[Place, str] = {
    "node": "transformers.js (Node)",
    "wasm": "transformers.js (WASM, Chromium)",
    "webgpu": "transformers.js (WebGPU, Chromium)",
}
_NODE = """
import * as library from "@huggingface/transformers";
{ask}
library.env.allowRemoteModels = false;
console.log(JSON.stringify(await ask(library, {given})));
"""


def ask(
    place: Place, delivered: Delivered, package: Path, dtype: str, count: int | None = None, **more: Any
) -> Any:
    """The tokens or states of the first `count` prompts. more: as in ask.mjs."""
    prompts: list[Any] = list(delivered.prompts)[:count]
    if delivered.kind == "speech":
        prompts = [sound_of(delivered.root / name).tolist() for name in prompts]
    options = {"dtype": dtype, "device": "cpu" if place == "node" else place}
    given = {"kind": delivered.kind, "prompts": prompts, "tokens": TOKENS, "options": options, **more}
    if place == "node":
        return node(_NODE.format(ask=browser.ASK.read_text(), given=json.dumps({**given, "place": str(package)})))
    return browser.transformers_js(package, given, place == "webgpu").answer


def folder_of(delivered: Delivered) -> Path:
    """The package for transformers.js, with the usual variants, if the model has them."""
    words = ("--variant", "fp32") if delivered.kind == "speech" else ()
    return delivered.package("transformers-js", *words)


def placed(delivered: Delivered, package: Path, dtype: str) -> dict[str, Counter[str]]:
    """Execution provider → operators, as a page on WebGPU places the nodes of the first graph that it loads."""
    options = {"dtype": dtype, "device": "webgpu", "session_options": {"logSeverityLevel": 0}}
    given = {"kind": delivered.kind, "prompts": [], "options": options, "verbose": True}
    found: dict[str, Counter[str]] = {}
    here: Counter[str] = Counter()
    for line in browser.transformers_js(package, given, True).log:
        if named := re.search(r"laced on \[(\w+)\]", line):
            here = found.setdefault(named[1], Counter())
        elif node := re.search(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(", line):
            here[node[1]] += 1
    return found


def arrays(answers: Any) -> list[Any]:
    """States or logits of each prompt, without the batch's dimension."""
    return [np.array(a["data"], np.float32).reshape(a["dims"])[0] for a in answers]


def compare(told: Cell, answers: Any, delivered: Delivered) -> None:
    """Fill a cell with a comparison with the unmerged model's tokens or states."""
    if delivered.kind == "encoder":
        figure = near(arrays(answers), delivered.wanted.states)
        told.same(f"the states of {len(answers)} texts", figure)
    else:
        told.same(same_tokens(answers, delivered))
