"""What the code blocks of a page find in their folder."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.docs.pages import ROOT

TEXT = "The government of the people has been in the hands of its citizens since the year of its foundation.\n"


def checkout(folder: Path) -> None:
    """What the tutorials use of a checkout."""
    for name in ("examples", "tools"):
        (folder / name).symlink_to(ROOT / name)


def decoder(folder: Path) -> None:
    """A tiny chat model as `base`; LoRAs of it as `my-lora`, `a`, `b`, and `my-qlora`, as if trained on NF4."""
    from tests.packages.conftest import save_decoder, save_lora

    checkout(folder)
    base = save_decoder(folder / "base")
    for name, targets in (
        ("my-lora", ["q_proj", "down_proj"]),
        ("my-qlora", ["q_proj", "v_proj"]),
        ("a", ["q_proj", "v_proj"]),
        ("b", ["o_proj", "v_proj"]),
    ):
        save_lora(base, folder / name, targets)
    (folder / "my-text.txt").write_text(TEXT * 8)
    (folder / "prompts.txt").write_text(TEXT)
    config = json.loads((folder / "base" / "config.json").read_text())
    assert config["architectures"]


SCENERIES: dict[str, Callable[[Path], None]] = {"checkout": checkout, "decoder": decoder}
