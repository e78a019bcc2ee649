"""Generated pages, written again or compared with what is there."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent


def settle(pages: Iterable[tuple[Path, str]], check: bool) -> NoReturn:
    """Write each (file, text) that differs, or with `check` only name it; ends with 1 if one was named."""
    stale = [(path, text) for path, text in pages if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path, text in stale:
        if not check:
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'written'}")
    sys.exit(1 if check and stale else 0)
