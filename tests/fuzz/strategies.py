"""Valid documents and files, damaged: a JSON tree changed in places, bytes flipped, cut and added."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

Slot = tuple[Any, Any]  # a dict or list, and the key or index in it


def _nested(depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = [inner] if depth % 2 else {"a": inner}
    return inner


ODD_NUMBERS = [
    True, False, 0, -1, 1, 2, 3, 4, 5, 7, 8, 16, 64, 255, 256, 4096, 10_001, 2**31, 2**53 + 1, 2**62, 2**63 - 1,
    2**63, 2**64, -(2**63), 10**40, 10**400, 0.5, 1.5, 4.0, -0.0, 1e-320, 1e308, 1e40, float("nan"), float("inf"),
    float("-inf"),
]  # fmt: skip
ODD_TEXTS = [
    "", " ", "a", "0", "-1", "NaN", "none", "None", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:x", "\0",
    "\n\x1b[31m", "\ud800", "é" * 3, "\u202e", "x" * 300, "9" * 5000, "(", "(a+)+$", "(.*)*(.*)*(.*)*x", "(?i)a",
    "\\1", "a{99999999999999999999}", "(" * 2000 + ")" * 2000, "[", ".*", "|", "bfloat16", "F32", "default", "<b>",
]  # fmt: skip
ODD_TREES: list[Any] = [
    None, [], {}, [[]], [None], [0], [""], ["a", 1], [1, 2], [2, 1], [0, 0], [[0, 1]], [[0, 10**9]],
    [[0, 2], [1, 2]], {"": None}, {"a": 1}, {"a": {"b": []}}, {"a": "b"}, [{}], [1.5], [True], [-1],
    [10**30], ["\ud800"], _nested(60, 1), _nested(300, 1), _nested(701, {}),
]  # fmt: skip
_ODD = [*ODD_NUMBERS, *ODD_TEXTS, *ODD_TREES]
odd = st.integers(0, len(_ODD) - 1).map(lambda i: _copy(_ODD[i]))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner)
)
values = odd | scalars | trees


def _copy(tree: Any) -> Any:
    """copy.deepcopy takes too many frames a level."""
    return json.loads(json.dumps(tree)) if isinstance(tree, (dict, list)) else tree


def _slots(tree: Any) -> list[Slot]:
    found: list[Slot] = []
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)) and len(found) < 500:
                waiting.append(holder[key])
    return found


@st.composite
def damaged_tree(draw: st.DrawFn, valid: Any, keys: Sequence[str] = ()) -> Any:
    """The JSON object with one to four places changed; keys: that a reader looks for, to be put in anywhere."""
    tree = _copy(valid)
    for _ in range(draw(st.integers(1, 4))):
        slots = _slots(tree)
        holder, key = draw(st.sampled_from(slots)) if slots else (tree, None)
        match draw(st.sampled_from(["replace", "replace", "add", "near", "remove", "rename", "move", "wrap"])):
            case "replace" if key is not None:
                holder[key] = draw(values)
            case "add" if isinstance(holder, dict):
                name = draw(st.sampled_from(keys) if keys else st.sampled_from(ODD_TEXTS))
                holder[name] = draw(values)
            case "add":
                holder.insert(draw(st.integers(0, len(holder))), draw(values))
            case "near" if key is not None:
                holder[key] = _near(draw, holder[key])
            case "remove" if key is not None:
                del holder[key]
            case "rename" if isinstance(holder, dict) and key is not None:
                names = [*keys, *ODD_TEXTS]
                holder[draw(st.integers(0, len(names) - 1).map(names.__getitem__) | st.text(max_size=5))] = (
                    holder.pop(key)
                )
            case "move" if key is not None:
                target, place = draw(st.sampled_from(slots))
                if isinstance(target, dict) or place < len(target):
                    target[place] = _copy(holder[key])
            case "wrap" if key is not None:
                holder[key] = draw(
                    st.sampled_from([[holder[key]], {"a": holder[key]}, [holder[key], _copy(holder[key])]])
                )
    return tree


def _near(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        real = float(value) if abs(value) < 1e300 else 0.5
        near = [value + 1, value - 1, value * 2, -value, value * 10**9, str(value), real]
        return draw(st.sampled_from(near))
    if isinstance(value, str):
        texts = [value[:-1], value[1:], f"{value}x", value.upper(), f"../{value}", value * 2, [value]]
        return draw(st.sampled_from(texts))
    if isinstance(value, list):
        return draw(st.sampled_from([value * 2, value[:-1], value[::-1], dict.fromkeys(map(str, value), 1)]))
    return list(value) if isinstance(value, dict) else {}


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """The bytes with one to four places changed."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(["flip", "bit", "cut", "insert", "delete", "text", "repeat"])):
            case "flip" if content:
                content[at] = draw(st.integers(0, 255))
            case "bit" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del content[at : at + draw(st.integers(1, 9))]
            case "text" if content:
                content[at] = draw(st.sampled_from(list(b'0123456789-[]{}",:e.')))
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 60))]
    return bytes(content)


def encoded(tree: Any) -> bytes:
    """As JSON, with NaN, lone surrogates and whatever else Python's writer lets through."""
    return json.dumps(tree).encode()


def json_files(valid: Any, keys: Sequence[str] = ()) -> st.SearchStrategy[bytes]:
    """What may stand in a JSON file instead of a valid one."""
    return (
        damaged_tree(valid, keys).map(encoded)
        | damaged_tree(valid, keys).map(encoded)
        | damaged_bytes(encoded(valid))
        | trees.map(encoded)
        | st.binary(max_size=60)
    )
