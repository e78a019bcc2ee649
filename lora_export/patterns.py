"""Regular expressions from an adapter: what `re` would match, within bounds of size and time.

`re` itself can take practically forever for one name ((a+)+b), and cannot be interrupted.
"""

import contextlib
import importlib
import re
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import regex

from lora_export.errors import AdapterError

LONGEST = 2**16  # characters; an expression may list all modules of a model
LARGEST_REPEAT = 10_000  # copies of a part that {m,n} makes when it is compiled, multiplied over the expression
PATIENCE = 0.5  # seconds of processor time for one name
TOTAL = 2.0  # seconds of processor time for all names and expressions of an adapter
MOST_REMEMBERED = 500  # expressions that need not be looked at again; `regex` keeps as many
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
# Only `regex` takes these for a class of characters and an approximate match.
_DISPUTED = re.compile(r"\[:\^?\w+:\]|(?<!\\)\{(?!\d+,?\d*\}|,\d+\})")
_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclass
class _Budget:
    """seconds: of processor time that are left; where: the adapter, for a refusal."""

    seconds: float
    where: str | None = None


_accepted: set[str] = set()
_budget: ContextVar[_Budget | None] = ContextVar("_budget", default=None)


def reason_against(expression: str) -> str | None:
    """Why a string is not a regular expression, or too large to compile; None if it is fine."""
    if expression in _accepted or (_PLAIN.fullmatch(expression) and len(expression) <= LONGEST):
        return None
    budget, started = _budget.get(), time.thread_time()
    reason = _judged(expression)
    if budget is not None:
        budget.seconds -= time.thread_time() - started
        if budget.seconds <= 0:
            return reason or "it is one of too many"
    if reason is None and len(_accepted) < MOST_REMEMBERED:
        _accepted.add(expression)
    return reason


def _judged(expression: str) -> str | None:
    if len(expression) > LONGEST:
        return "it is too large"
    copies = 1
    for low, high in _REPEAT.findall(expression):
        copies *= max(1, *(min(int(n[:9]), 10**9) for n in (low, high) if n)) if low or high else 1
        if copies > LARGEST_REPEAT:
            return "it is too large"
    if _DISPUTED.search(expression):
        return "Python's two regular-expression engines read its brackets or braces differently"
    try:
        re.compile(expression)
        regex.compile(expression)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        return str(error)
    return None


@contextlib.contextmanager
def within(seconds: float, where: str | None = None) -> Iterator[None]:
    """All matching inside may take this much processor time altogether; AdapterError beyond that."""
    token = _budget.set(_Budget(seconds, where))
    try:
        yield
    finally:
        _budget.reset(token)


def fullmatch(expression: str, name: str) -> Any:
    """As re.fullmatch: a match or None. AdapterError for an expression that is too large or takes too long."""
    return _matched("fullmatch", expression, name)


def ends_with(expression: str, name: str) -> bool:
    """PEFT's rule for the keys of rank_pattern: whether the expression matches the end of a module's name, after a
    dot or from the beginning."""
    if _PLAIN.fullmatch(expression):  # without an engine: there may be as many keys as modules
        rest = len(name) - len(expression)
        if rest < 0 or (rest and name[rest - 1] != "."):
            return False
        return all(a in (b, ".") for a, b in zip(expression, name[rest:], strict=True))
    return fullmatch(rf"(.*\.)?({expression})", name) is not None


class _Bounded:
    """`re`, with its functions bounded; with flags, they are those of `re`."""

    def __getattr__(self, name: str) -> Any:
        own = getattr(re, name)
        if name not in ("match", "fullmatch", "search"):
            return own
        return lambda pattern, text, *flags: own(pattern, text, *flags) if flags else _matched(name, pattern, text)


@contextlib.contextmanager
def bounded(library: Literal["peft", "transformers.quantizers"], where: str) -> Iterator[None]:
    """Inside, a library matches the expressions of a configuration as this module does.

    PEFT's are in target_modules, exclude_modules, modules_to_save, layers_pattern, rank_pattern and more, and are
    matched in many places of it, some of them against names that it makes; those of transformers are in
    modules_to_not_convert.
    """
    importlib.import_module(library)
    stand_in = _Bounded()
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(f"{library}.") and vars(module).get("re") is re
    ]
    for module in users:
        module.re = stand_in  # type: ignore[attr-defined]
    try:
        with within(TOTAL, where):
            yield
    finally:
        for module in users:
            module.re = re  # type: ignore[attr-defined]


def _matched(how: str, expression: str, name: str) -> Any:
    budget = _budget.get() or _Budget(PATIENCE)
    reason = reason_against(expression)
    if reason:
        raise _refused(f"the regular expression {expression!r}: {reason}", name, budget)
    started = time.thread_time()
    try:
        match = getattr(regex, how)(expression, name, timeout=max(1e-3, min(PATIENCE, budget.seconds)))
    except TimeoutError:
        budget.seconds = 0.0
    budget.seconds -= time.thread_time() - started
    if budget.seconds <= 0:
        raise _refused(f"the regular expression {expression!r} takes too long to match", name, budget)
    return match


def _refused(found: str, name: str, budget: _Budget) -> AdapterError:
    return AdapterError(
        found,
        where=budget.where,
        tensor=name,
        expected=f"regular expressions that take less than {PATIENCE:g} s for a name and {TOTAL:g} s for all",
        next_step="write them without nested repeats, or list the names themselves",
    )
