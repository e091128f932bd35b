"""What goes to PyTorch's packed kernels, against the float matrix."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tabstop.attention.reference import ReferenceAttention
from tabstop.kernels.cpu import library
from tabstop.quant import TensorRead, make_scheme
from tabstop.quant.encodings import ENCODINGS
from tabstop.quant.gguf import dequantize
from tabstop.quant.prepacked import (
    HEAD_ROWS,
    LOGIT_ROWS,
    PROBE,
    Int4Weight,
    Int8Weight,
    PrepackedScheme,
    Probe,
    Scratch,
    has_integer_products,
    int4_parts,
    int8_parts,
    tried,
)
from tests.models.oracle import load, oracle_logits
from tests.models.paged import PagedRunner
from tests.quant.test_tiles import error, stored
from tests.tiny import llama_config, tiny_llama
from tests.tiny_gguf import write_gguf

if (reason := PROBE.reason()) and "is wrong" not in reason:  # what is wrong may be our own decoding
    pytest.skip(reason, allow_module_level=True)

COUNTS = (1, 2, 8, 33, 64, 65, 600)


@pytest.mark.parametrize("encoding", ["Q4_0", "Q4_1", "Q4_K"])
def test_blocks_of_4_bits_keep_their_integers(encoding: str) -> None:
    blocks = stored(encoding, 48, 256)
    weight, expected = Int4Weight(*int4_parts(blocks)), dequantize(blocks)
    assert error(weight.decoded(slice(0, 48)).T.float(), expected) < 4e-3  # scales are bfloat16
    ids = torch.tensor([47, 0, 5])
    assert error(weight.gather(ids).float(), expected[ids]) < 6e-3
    for count in COUNTS:
        x = torch.randn(count, 256).bfloat16()
        assert error(weight.multiply(x, None).float(), x.float() @ expected.T) < 1e-2


@pytest.mark.parametrize("encoding", ["Q5_0", "Q6_K", "Q8_0", "F16", "BF16"])
def test_other_weights_are_rounded_to_8_bits_a_row(encoding: str) -> None:
    blocks = stored(encoding, 37, 256)
    weight, expected = Int8Weight(*int8_parts(blocks)), dequantize(blocks).float()
    ids = torch.tensor([36, 0, 5])
    assert error(weight.gather(ids).float(), expected[ids]) < 3e-2
    bias = torch.randn(37).bfloat16()
    for count in COUNTS:
        x = torch.randn(count, 256).bfloat16()
        assert error(weight.multiply(x, bias).float(), x.float() @ expected.T + bias) < 3e-2


@pytest.mark.parametrize("encoding", ["Q4_1", "Q8_0"])
def test_many_rows_meet_the_matrix_window_by_window(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first window was decoded in inference mode, whose tensors nobody else may write to."""
    blocks = stored(encoding, 112, 256)
    weight = Int4Weight(*int4_parts(blocks)) if encoding == "Q4_1" else Int8Weight(*int8_parts(blocks))
    x = torch.randn(70, 256).bfloat16()
    monkeypatch.setattr("tabstop.quant.prepacked.SCRATCH", Scratch())
    with torch.inference_mode():
        expected = weight.many(x)
    monkeypatch.setattr("tabstop.quant.prepacked.WINDOW_VALUES", 48 * 128)
    assert error(weight.many(x).float(), expected.float()) < 1e-3


@pytest.mark.parametrize("count", [1, 2, 16, LOGIT_ROWS, LOGIT_ROWS + 1])
def test_logits_of_8_bits_are_those_of_the_float_matrix(count: int) -> None:
    """Nearer than bfloat16 comes, each row by itself: one has an outlier, another is tiny, another is zero."""
    if not torch.cpu._is_vnni_supported():
        pytest.skip("this processor adds pairs of products in 16 bits")
    assert has_integer_products()
    values, scales = int8_parts(stored("Q8_0", 300, 256))
    values[5], scales[5] = 0, 0.0  # a token that nobody trained
    weight = Int8Weight(values, scales)
    x = torch.randn(count, 256).bfloat16()
    x[0, 7] = 500.0
    x[count // 2] *= 1e-20
    x[count // 3 + 1 : count // 3 + 2] = 0.0
    expected = x.double() @ (weight.values * weight.scales.double()[:, None]).T
    found = weight.multiply_wide(x).double()
    limit = 6e-4 if count <= LOGIT_ROWS else 6e-3
    assert (found - expected).norm(dim=1).le(limit * expected.norm(dim=1)).all()


@pytest.mark.parametrize("nonsense", [torch.nan, torch.inf])
def test_no_nonsense_passes_unseen(nonsense: float) -> None:
    weight = Int8Weight(*int8_parts(stored("Q8_0", 300, 256)))
    x = torch.randn(3, 256).bfloat16()
    x[1, 5] = nonsense
    assert weight.multiply_wide(x).isfinite().all(1).tolist() == [True, False, True]
    assert not weight.multiply_wide(x)[1].isfinite().any()


@pytest.mark.parametrize("is_missing", [True, False])
def test_kernels_that_saturate_or_are_missing_give_no_logits(is_missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(self: Int8Weight, x: torch.Tensor) -> torch.Tensor:
        if is_missing:
            raise RuntimeError("no such kernel")
        return (x.float() @ (self.values * self.scales.float()[:, None]).T).clamp(max=100)

    weight = Int8Weight(*int8_parts(stored("Q8_0", 37, 256)))
    x = torch.randn(2, 256).bfloat16()
    monkeypatch.setattr(Int8Weight, "integer_product", saturating)
    has_integer_products.cache_clear()
    try:
        assert not has_integer_products()
        assert torch.equal(weight.multiply_wide(x), weight.multiply(x, None).float())
    finally:
        has_integer_products.cache_clear()


def test_a_head_has_room_for_its_second_form() -> None:
    scheme = PrepackedScheme(make_scheme("gguf"))
    sizes = [
        scheme.num_bytes(TensorRead("x", (rows, 64), (slice(0, rows), slice(0, 64))), ENCODINGS["Q8_0"], 2)
        for rows in (HEAD_ROWS - 1, HEAD_ROWS)
    ]
    assert sizes == [64 * (HEAD_ROWS - 1), 64 * HEAD_ROWS * (1 + has_integer_products())]


def test_a_probe_finds_wrong_and_missing_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, values, scales: x @ values.bfloat16().T)
    assert Probe()._try() == f"Int8Weight is wrong in torch {torch.__version__}"
    monkeypatch.delattr(torch, "_weight_int4pack_mm_for_cpu")
    assert "has none for this processor" in str(Probe()._try())


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library._chosen, "library", None)
    monkeypatch.setattr(library._chosen, "reason", "there is no compiler")


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize(("encoding", "form"), [("Q4_1", "int4"), ("Q8_0", "int8")])
def test_a_file_is_served_without_a_library(encoding: str, form: str, tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "model.gguf", llama_config(hidden_size=64, vocab_size=320), encoding)
    served: Any = load(written.path, dtype="auto", compute=torch.bfloat16)
    assert served.weights == f"{form} (PyTorch)"
    ids = list(range(5, 60))
    expected = PagedRunner(load(written.path)).logits(ids)
    runner = PagedRunner(served, backend=ReferenceAttention, dtype=torch.bfloat16)
    assert error(runner.logits(ids), expected) < 0.05


@pytest.mark.usefixtures("no_library")
def test_a_folder_is_served_without_a_library(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    served: Any = load(folder, dtype="auto", compute=torch.bfloat16)
    (expected,) = oracle_logits(folder, [list(range(40))])
    assert served.weights == "int8 (PyTorch)"
    assert error(PagedRunner(served, dtype=torch.bfloat16).logits(list(range(40))), expected) < 0.05


@pytest.mark.parametrize(("num_slow", "reason"), [(10, None), (1000, "slower than bfloat16")])
def test_a_kernel_is_given_up_for_being_slow_but_not_for_a_slow_moment(num_slow: int, reason: str | None) -> None:
    class Disturbed(Int8Weight):
        num_calls = 0

        def packed(self, x: torch.Tensor) -> torch.Tensor:
            self.num_calls += 1
            if self.num_calls <= num_slow:
                time.sleep(0.05)
            return super().packed(x)

    weight = Disturbed(torch.randint(-127, 128, (64, 64), dtype=torch.int8), torch.full((64,), 0.01))
    found = tried(weight, torch.randn(2, 64).bfloat16())
    assert found is None if reason is None else reason in str(found)
