"""Cells of the matrix that do not run, each with the words of the refusal."""

PEFT_REFUSES: dict[tuple[str, str], str] = {}
WE_REFUSE: dict[tuple[str, str], str] = {}
