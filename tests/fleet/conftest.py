"""What the tests of a fleet's report share."""

from pathlib import Path

import pytest

from tests.fleet.made_up import FolderPlace, Made, fleet


@pytest.fixture
def made() -> Made:
    """A fleet with rows in every state, of three bases."""
    return fleet(24, seed=10, weights=(80, 5, 5, 5, 5))


@pytest.fixture
def place(tmp_path: Path) -> FolderPlace:
    return FolderPlace(tmp_path)
