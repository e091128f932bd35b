from __future__ import annotations

from pathlib import Path

import pytest

from tabstop.checkpoint import Checkpoint, open_checkpoint
from tabstop.errors import CheckpointError
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tests import tiny


@pytest.fixture(scope="session")
def default_checkpoint() -> Checkpoint:
    try:
        return open_checkpoint("default", offline=True)
    except CheckpointError as error:
        pytest.skip(f"the default model is not installed: {error}")


@pytest.fixture(scope="session")
def default_tokenizer(default_checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(default_checkpoint)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(tiny.tokenizer_json(), bos_token="<|im_start|>", add_bos=True)


@pytest.fixture(scope="session")
def default_oracle(default_checkpoint: Checkpoint):
    """transformers' tokenizer of the default model, cut as the original's tokenizer.json says.

    transformers reads vocabulary and merges from the GGUF file but knows no rule for the pre-tokenizer 'smollm'; the
    original (HuggingFaceTB/SmolLM2-135M-Instruct) cuts out single digits before the byte-level rules.
    """
    transformers = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers

    path = Path(str(default_checkpoint.gguf))
    oracle = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return oracle
