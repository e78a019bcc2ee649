"""What a runtime said, compared with the unmerged model's answers, in the words of a cell."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.consumers.models import Delivered

NEAR = 1e-4  # between vectors in fp32, of length 1 or of states as large as 1


def same_tokens(found: Sequence[Sequence[int]], delivered: Delivered) -> str:
    """AssertionError unless each prompt, text or sound is answered by the same tokens. Lists of token ids."""
    wanted = delivered.wanted.tokens
    assert [list(row) for row in found] == [list(row) for row in wanted]
    what = {"decoder": "prompts", "encoder-decoder": "texts", "speech": "sounds"}[delivered.kind]
    count = sum(map(len, wanted))
    return f"{count} of {count} tokens of {len(wanted)} {what}"


def near(found: Any, wanted: Any) -> float:
    """The largest difference of two lists of vectors, which may be of unequal numbers of rows. AssertionError
    unless it is below NEAR."""
    assert len(found) == len(wanted)
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(found, wanted, strict=True)]
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    largest = max(float(np.abs(a - b).max()) for a, b in pairs)
    assert largest < NEAR, largest
    return largest
