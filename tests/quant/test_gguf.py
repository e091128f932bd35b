"""Decoded blocks equal the gguf package's, bit for bit, and the sizes that we know equal its table."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from tabstop.errors import CheckpointError
from tabstop.models.gguf_header import TENSOR_TYPES
from tabstop.quant import StoredTensor
from tabstop.quant.encodings import ENCODINGS
from tabstop.quant.gguf import DECODERS, dequantize


@pytest.mark.parametrize("name", DECODERS)
def test_random_blocks_decode_as_the_reference_decodes_them(name: str) -> None:
    encoding = ENCODINGS[name]
    blocks = np.random.default_rng(0).integers(0, 256, (6, 5 * encoding.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales may be infinite
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    decoded = dequantize(StoredTensor(encoding, torch.from_numpy(blocks)))
    assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(decoded.numpy(), expected)


def test_an_all_zero_block_is_zero() -> None:
    for name in DECODERS:
        blocks = torch.zeros(2, ENCODINGS[name].block_bytes, dtype=torch.uint8)
        assert torch.equal(
            dequantize(StoredTensor(ENCODINGS[name], blocks)), torch.zeros(2, ENCODINGS[name].block_values)
        )


def test_known_types_and_sizes_are_the_format_s() -> None:
    for number, name in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == (ENCODINGS[name].block_values, ENCODINGS[name].block_bytes)


def test_every_type_that_the_issue_names_can_be_read() -> None:
    named = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    assert set(named) <= set(TENSOR_TYPES.values())
    assert set(named) - {"F32", "F16", "BF16"} == set(DECODERS)


def test_a_row_that_is_no_whole_number_of_blocks_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"33 values.*Q4_0"):
        ENCODINGS["Q4_0"].num_bytes(33)
