"""Modelfile: what Ollama is told about a GGUF model, line by line from a list.

FROM can name a model elsewhere, ADAPTER another file, TEMPLATE and SYSTEM put words into every conversation.
"""

import re
from pathlib import Path

from lora_export.allowed.fields import LIMIT
from lora_export.errors import InputError
from lora_export.storage import sealed

NAME = "Modelfile"
_FROM = re.compile(r"FROM \./([^/\\\s]+\.gguf)")
_LINES = re.compile(
    r"PARAMETER (temperature|top_k|top_p|min_p|repeat_penalty) [0-9][0-9.e+-]{0,20}"
    r'|PARAMETER stop "[^"\\\s\x00-\x1f\x7f]{1,100}"'
    r'|LICENSE """[A-Za-z0-9][A-Za-z0-9 .+-]{0,99}"""',
    re.ASCII,
)
_EXPECTED = "FROM ./NAME.gguf, PARAMETER with a number or a stop, LICENSE with an identifier"


def check_modelfile(path: Path) -> None:
    """InputError for an instruction that is not on the list, or a model that does not lie beside it."""
    try:
        sealed.refuse_outward_link(path)
        if path.stat().st_size > LIMIT:
            raise InputError(f"a Modelfile of more than {LIMIT} bytes", where=path)
        first, *others = path.read_text(encoding="utf-8").splitlines() or [""]
    except UnicodeDecodeError:
        raise InputError("the Modelfile is not text", where=path, expected=_EXPECTED) from None
    model = _FROM.fullmatch(first)
    if model is None or not sealed.plain_name(model[1]) or not (path.parent / model[1]).is_file():
        raise InputError(f"the Modelfile begins with {first!r}", where=path, expected="FROM ./NAME.gguf")
    wrong = next((line for line in others if not _LINES.fullmatch(line)), None)
    if wrong is not None:
        raise InputError(f"the Modelfile says {wrong!r}", where=path, expected=_EXPECTED)
