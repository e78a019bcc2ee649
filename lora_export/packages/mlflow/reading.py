"""How the packaged model reads texts: by its tokenizer alone, and as transformers does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputError
from lora_export.graph_runs.feeds import rows_of
from lora_export.packages.job import Run
from lora_export.packages.programs import PROMPT
from lora_export.storage import sealed

UNLIMITED = 2**31 - 1
_FAST, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_decoder_position_embeddings")
_RELATIVE = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})  # n_positions is no limit of theirs
# Models that count positions from the padding id on.
_PADDED = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "mpnet", "longformer", "xmod"}
)
_TEXTS = (PROMPT, " Ünïcode, 😀\n\tand  spaces. ", "def f(x):\n    return [1, 2.5e-3]", "<s>x</s>")
_CHAT = [{"role": "user", "content": "Who are you?"}]


def check_tokenizer(run: Run) -> None:
    """InputError unless tokenizer.json gives the ids, and the template the chat, that transformers gives."""
    from tokenizers import Tokenizer

    path = next((p for p in (f / _FAST for f in (run.companions, run.export.output)) if p.is_file()), None)
    if path is None:
        raise InputError(
            f"the run has no {_FAST}",
            where=run.companions,
            expected=f"{_FAST}: the package reads text with the library tokenizers",
            next_step="save the base's tokenizer as a fast one, and repeat the run",
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = [s.prompt for s in run.validation.samples if s.prompt] + [*_TEXTS]
    read = [(text, tokenizer.encode(text).ids) for text in texts]
    pairs = zip([p for p in read if p[1]], rows_of(run.companions, texts, UNLIMITED), strict=True)
    for (text, ours), theirs in pairs:
        if ours != theirs:
            raise InputError(
                f"{_FAST} reads {text!r} as {ours}, and transformers as {theirs}",
                where=path,
                expected="the same ids",
                next_step=f"save the base's tokenizer with transformers, which writes {_FAST}, and repeat the run",
            )


def check_template(run: Run) -> None:
    """InputError unless the code of the package makes the text of a chat that transformers makes."""
    from transformers import AutoTokenizer

    from lora_export.packages.mlflow.served.chats import template_of

    ours = template_of(run.companions, _document(run, _SETTINGS))
    if ours is None:
        return
    tokenizer = AutoTokenizer.from_pretrained(run.companions, local_files_only=True)
    theirs = tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True)
    if ours(_CHAT) != theirs:
        raise InputError(
            f"the template makes {ours(_CHAT)!r} of a chat, and under transformers {theirs!r}",
            where=run.companions,
            expected="the same text: the package has no transformers",
            next_step="--for hf, or --for genai",
        )


def longest(run: Run) -> int:
    """How many tokens the model takes, its answer included."""
    config: Mapping[str, Any] = run.config.get("text_config") or run.config
    kind = str(config.get("model_type"))
    positions = [config[n] for n in _POSITIONS if isinstance(config.get(n), int)] if kind not in _RELATIVE else []
    limits = [n - (int(config.get("pad_token_id") or 0) + 1 if kind in _PADDED else 0) for n in positions[:1]]
    if not run.task.generates:  # longer texts are cut, as by transformers and sentence-transformers
        limits.append(_document(run, _SETTINGS).get("model_max_length"))
        limits.append(_document(run, "sentence_bert_config.json").get("max_seq_length"))
    return min((int(n) for n in limits if isinstance(n, int | float) and 0 < n < UNLIMITED), default=UNLIMITED)


def has_template(run: Run) -> bool:
    """Whether the package will have a template of chats, in a file that its code reads."""
    text = _document(run, _SETTINGS).get("chat_template")
    return (run.companions / "chat_template.jinja").is_file() or isinstance(text, str)


def _document(run: Run, name: str) -> dict[str, Any]:
    path: Path = run.companions / name
    return sealed.read_json(path) if path.is_file() else {}
