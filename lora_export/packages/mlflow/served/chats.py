"""The template of a chat, with what transformers gives to one. It came with the model, so it runs in a sandbox."""

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


def template_of(folder: Path, settings: Mapping[str, Any]) -> Callable[[Iterable[Any]], str] | None:
    """Messages → the text of the chat, up to where the answer begins; None for a model without a template.

    settings: its tokenizer_config.json.
    """
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if not isinstance(text, str):
        return None
    named = {k: v for k, v in settings.items() if k.endswith("_token")}
    tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    template = _environment().from_string(text)

    def words(chat: Iterable[Any]) -> str:
        messages = [dict(message) for message in chat]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        return str(template.render(tokens | given))

    return words


class Generation(Extension):
    """The tag `generation` marks what the model says, and changes nothing of it."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _as_json
    made.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return made


def _as_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """Without the escapes that jinja's own filter writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _raise(words: str) -> None:
    raise TemplateError(words)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
