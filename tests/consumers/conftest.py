"""A run of each kind of model, shared by the tests of all runtimes."""

import pytest

from tests.consumers.models import Delivered, deliver
from tests.end_to_end.conftest import Run, run

__all__ = ["run"]


@pytest.fixture(scope="session")
def decoder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    """SmolLM2 with the demo's adapter."""
    return deliver("decoder", tmp_path_factory.mktemp("decoder"), run)


@pytest.fixture(scope="session")
def tiny_decoder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    """A tiny Llama with a LoRA."""
    return deliver("tiny-decoder", tmp_path_factory.mktemp("tiny-decoder"), run)


@pytest.fixture(scope="session")
def encoder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    """all-MiniLM-L6-v2, a sentence-transformers folder, with a LoRA."""
    return deliver("encoder", tmp_path_factory.mktemp("encoder"), run)


@pytest.fixture(scope="session")
def encoder_decoder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    """A tiny T5 with a LoRA."""
    return deliver("encoder-decoder", tmp_path_factory.mktemp("encoder-decoder"), run)


@pytest.fixture(scope="session")
def speech(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    """whisper-tiny.en with a LoRA."""
    return deliver("speech", tmp_path_factory.mktemp("speech"), run)
