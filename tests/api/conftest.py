from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tabstop.checkpoint import Checkpoint
from tabstop.engine.fake import FakeEngine, hashed, scripted
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tests.api.serving import EOS, Running, serving, text_checkpoint

SCRIPT = "return x + 1\nprint(10)\n"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return text_checkpoint(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[Running]:
    """Says SCRIPT and an end token, whatever it is asked."""
    engine = FakeEngine(script=scripted([*tokenizer.encode(SCRIPT), EOS]), stop_sets={"eos": frozenset([EOS])})
    with serving(checkpoint, engine) as running:
        yield running


@pytest.fixture(scope="module")
def endless(checkpoint: Checkpoint) -> Iterator[Running]:
    """Talks until max_tokens, slowly enough to be interrupted."""
    with serving(checkpoint, FakeEngine(script=hashed, stop_sets={"eos": frozenset()}, delay=0.002)) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client
    server.assert_idle()
