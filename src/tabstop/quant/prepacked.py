"""What PyTorch's own kernels multiply fast on a CPU, where no library of ours can be compiled.

Blocks of 4 bits (Q4_0, Q4_1, Q4_K) go to its int4 kernel, with a bfloat16 scale and zero for every 32 values; all other
weights are rounded to 8 bits with one scale a row. Inputs are bfloat16. Those kernels are for few rows; for many, a
matrix is decoded to bfloat16 window by window and multiplied as such. Logits of 8 bits go to a third kernel, whose
inputs are 8 bits, too: each row of inputs is two of them. The twin is the float matrix (`decoded`).
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.nn import functional

from tabstop.quant import Loading, MatrixPart, QuantScheme, StoredTensor, TensorRead
from tabstop.quant.dense import WINDOW_VALUES, stored_windows
from tabstop.quant.encodings import Encoding
from tabstop.quant.gguf import dequantize, half, nibbles, scales_and_minima

log = logging.getLogger(__name__)

GROUP = 32
INT4_ROWS, INT8_ROWS = 56, 4
"""Most rows of inputs for which the packed kernels win over decoding the matrix (benchmarks/RESULTS.md)."""
LOGIT_ROWS = 48
"""The same for logits of 8 bits."""
HEAD_ROWS = 1 << 14
"""A matrix of so many rows may be a head, which keeps a second form of its 8 bits."""
NUM_TRIES = 5
INT4_ENCODINGS = ("Q4_0", "Q4_1", "Q4_K")
TINY = 1e-30
"""Instead of 0 as the largest value of a row, which would make NaNs of its zeros."""
ONE, ZERO = torch.tensor(1.0), torch.tensor(128)
"""The scale and the zero of bytes that hold integers from -128 on."""


class Scratch(threading.local):
    """Where windows are decoded to, one after the other; the system zeroes fresh memory page by page."""

    def __init__(self) -> None:
        self.integers = torch.empty(0, dtype=torch.int8)
        self.floats = torch.empty(0, dtype=torch.bfloat16)

    def take(self, num_rows: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 and bfloat16 [num_rows, num_columns], until the next call."""
        size = num_rows * num_columns
        if len(self.floats) < size:
            with torch.inference_mode(False):
                self.integers = torch.empty(size, dtype=torch.int8)
                self.floats = torch.empty(size, dtype=torch.bfloat16)
        integers, floats = self.integers[:size], self.floats[:size]
        return integers.view(num_rows, num_columns), floats.view(num_rows, num_columns)


SCRATCH = Scratch()


class PackedWeight(ABC):
    """What both forms share: inputs and products are bfloat16."""

    num_rows_packed: int
    rows: int
    num_bytes: int

    @abstractmethod
    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """x bfloat16 [T, columns] → [T, rows] by the packed kernel."""

    @abstractmethod
    def decoded(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """These rows of the matrix as the columns of a bfloat16 matrix [columns, n], but for `scaled`. In SCRATCH."""

    def scaled(self, product: torch.Tensor, rows: slice) -> torch.Tensor:
        """What a product with decoded rows still lacks, in place."""
        return product

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x bfloat16; a wider bias gives wider results."""
        result = self.packed(x) if len(x) <= self.num_rows_packed else self.many(x)
        return result if bias is None else result + bias

    def multiply_wide(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, None).float()

    def many(self, x: torch.Tensor) -> torch.Tensor:
        """x bfloat16 [T, columns] → [T, rows], the matrix decoded a window at a time."""
        result = x.new_empty(len(x), self.rows)
        step = max(GROUP, 2 * WINDOW_VALUES // x.shape[1])
        for first in range(0, self.rows, step):
            rows = slice(first, min(first + step, self.rows))
            self.scaled(torch.mm(x, self.decoded(rows), out=result[:, rows]), rows)
        return result

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        gate, up = self.multiply(x, bias).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)


class Int4Weight(PackedWeight):
    """q [N, K] in 0..15, scales and minima [N, K / 32]: w = q · scale + minimum."""

    num_rows_packed = INT4_ROWS

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> None:
        self.rows, self.columns = values.shape
        self.kernel = torch._convert_weight_to_int4pack_for_cpu(values.int(), 1)
        # The kernel's weight is (q - 8) · scale + zero.
        self.scales_and_zeros = torch.stack([scales.T, (minima + 8 * scales).T], -1).contiguous().bfloat16()
        # A byte holds q - 8 of a column (low half) and of the one K / 2 further; a row of bytes, one for each row of
        # the matrix, so that scales meet rows that lie side by side: all of it runs in the processor's wide registers.
        low, high = (values.T.contiguous().to(torch.int8) - 8).chunk(2)
        self.pairs = low & 15 | high << 4  # int8 [K / 2, N]
        self.scales, self.zeros = (self.scales_and_zeros[:, None, :, at].contiguous() for at in (0, 1))
        parts = (self.kernel, self.scales_and_zeros, self.pairs, self.scales, self.zeros)
        self.num_bytes = sum(part.numel() * part.element_size() for part in parts)

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, self.kernel, GROUP, self.scales_and_zeros)

    def decoded(self, rows: slice | torch.Tensor) -> torch.Tensor:
        pairs = self.pairs[:, rows]
        integers, floats = SCRATCH.take(self.columns, pairs.shape[1])
        low, high = integers.chunk(2)
        torch.bitwise_left_shift(pairs, 4, out=low).bitwise_right_shift_(4)
        torch.bitwise_right_shift(pairs, 4, out=high)
        grouped = floats.copy_(integers).view(-1, GROUP, pairs.shape[1])
        torch.addcmul(self.zeros[..., rows], grouped, self.scales[..., rows], out=grouped)
        return floats

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoded(ids).T.clone(memory_format=torch.contiguous_format)


class Int8Weight(PackedWeight):
    """q int8 [N, K], scales [N]: w = q · scale."""

    num_rows_packed = INT8_ROWS

    def __init__(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        self.values, self.scales = values, scales.bfloat16()
        self.rows, self.columns = values.shape
        self.num_bytes = values.numel() + 2 * len(scales)

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x, self.values, self.scales)

    def multiply_wide(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= LOGIT_ROWS and has_integer_products():
            return self.integer_product(x)
        return super().multiply_wide(x)

    @functools.cached_property
    def integers(self) -> object:
        """What the kernel of `integer_product` takes: the same integers, in an order of its own."""
        scales, zeros = self.scales.double(), torch.zeros(self.rows, dtype=torch.int64)
        with warnings.catch_warnings():  # these tensors will go, PyTorch says; then so does this path
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(self.values, scales, zeros, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)

    def integer_product(self, x: torch.Tensor) -> torch.Tensor:
        """x bfloat16 [T, columns] → float32 [T, rows].

        The kernel rounds inputs to 8 bits by one scale for all rows, which is too coarse: each row is given twice, as
        127ths of its own largest value and as 127ths of what those lack. Twice the rows are still half of the time.
        """
        wide = x.float()
        units = torch.linalg.vector_norm(wide, torch.inf, -1, keepdim=True).div_(127).clamp_(min=TINY)
        wide.div_(units)
        halves = torch.cat((wide.trunc(), wide.frac().mul_(127)))
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(halves, ONE, ZERO, self.integers)
        coarse, fine = product.chunk(2)
        return coarse.add_(fine, alpha=1 / 127).mul_(units)  # type: ignore[no-any-return]

    def decoded(self, rows: slice | torch.Tensor) -> torch.Tensor:
        values = self.values[rows]
        return SCRATCH.take(*values.shape)[1].copy_(values).T

    def scaled(self, product: torch.Tensor, rows: slice) -> torch.Tensor:
        return product.mul_(self.scales[rows])

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return self.values[ids].bfloat16() * self.scales[ids][:, None]


def int4_parts(stored: StoredTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks of 4 bits, stored rows → (values uint8 [n, K], scales and minima float32 [n, K / 32])."""
    rows = len(stored.data)
    blocks = stored.data.reshape(-1, stored.encoding.block_bytes)
    if stored.encoding.name == "Q4_K":
        scales, minima = scales_and_minima(blocks)
        values = nibbles(blocks[:, 16:144].reshape(-1, 4, 32))
        return values.reshape(rows, -1), scales.reshape(rows, -1), -minima.reshape(rows, -1)
    is_plain = stored.encoding.name == "Q4_0"
    scales = half(blocks, 0)
    minima = -8 * scales if is_plain else half(blocks, 2)
    values = nibbles(blocks[:, 2:18] if is_plain else blocks[:, 4:20])
    return values.reshape(rows, -1), scales.view(rows, -1), minima.view(rows, -1)


def int8_parts(stored: StoredTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored rows → (values int8 [n, K], scales bfloat16 [n]); the integers answer to the rounded scale."""
    values = dequantize(stored).float()
    scales = (values.abs().amax(1) / 127).bfloat16()
    divisors = torch.where(scales > 0, scales.float(), 1)[:, None]
    return torch.round(values / divisors).clamp_(-127, 127).to(torch.int8), scales


class PrepackedScheme:
    """Reads what the checkpoint's own scheme reads."""

    name = "prepacked"
    compute_dtype = "bfloat16"  # what the kernels take and give: anything else is converted twice a product

    def __init__(self, stored_as: QuantScheme) -> None:
        self.stored_as = stored_as
        self.used: set[str] = set()

    @staticmethod
    def refuse() -> str | None:
        return PROBE.reason()

    @property
    def description(self) -> str:
        return f"{' '.join(sorted(self.used))} (PyTorch)"

    def reads(self, part: MatrixPart) -> list[TensorRead]:
        return self.stored_as.reads(part)

    def num_bytes(self, read: TensorRead, encoding: Encoding, dtype_bytes: int) -> int:
        """The int4 kernel's copy and one for decoding; 8 bits else, twice where a head may want its other form."""
        if len(read.shape) < 2:
            return read.num_values * dtype_bytes
        if encoding.name in INT4_ENCODINGS:
            return read.num_values * 5 // 4
        return read.num_values * (1 + (read.shape[0] >= HEAD_ROWS and has_integer_products()))

    def load(self, parts: Sequence[MatrixPart], loading: Loading) -> PackedWeight:
        windows = (stored for part in parts for stored in self._windows(part, loading))
        first = next(windows)
        is_int4 = first.encoding.name in INT4_ENCODINGS and parts[0].num_columns % GROUP == 0
        found = []
        for stored in chain([first], windows):
            if is_int4 and stored.encoding.name not in INT4_ENCODINGS:
                return self.load_mixed(parts, loading)
            found.append(int4_parts(stored) if is_int4 else int8_parts(stored))
        merged = [torch.cat(each) for each in zip(*found, strict=True)]
        if is_int4 and len(merged[0]) % 16 == 0:
            self.used.add("int4")
            return Int4Weight(*merged)
        if is_int4:
            return self.load_mixed(parts, loading)
        self.used.add("int8")
        return Int8Weight(*merged)

    def load_mixed(self, parts: Sequence[MatrixPart], loading: Loading) -> Int8Weight:
        """8 bits hold anything."""
        found = [int8_parts(stored) for part in parts for stored in self._windows(part, loading)]
        self.used.add("int8")
        return Int8Weight(*[torch.cat(each) for each in zip(*found, strict=True)])

    def _windows(self, part: MatrixPart, loading: Loading) -> Iterator[StoredTensor]:
        return stored_windows(part, self.reads(part), loading)


@dataclass
class Probe:
    """Whether this torch's kernels are right and fast here, tried once: they promise nothing between versions,
    and where there is no kernel, a reference loop is right and thirty times too slow."""

    result: str | None = None
    is_done: bool = False

    def reason(self) -> str | None:
        if not self.is_done:
            self.result, self.is_done = self._try(), True
            if self.result:
                log.warning("PyTorch's packed kernels are not used: %s", self.result)
        return self.result

    def _try(self) -> str | None:
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(0, 16, (1024, 512), generator=generator, dtype=torch.uint8)
        scales = torch.rand(1024, 16, generator=generator) * 0.01
        x = torch.randn(2, 512, generator=generator).bfloat16()
        try:
            weights = (Int4Weight(values, scales, -8 * scales), Int8Weight(values.to(torch.int8), scales[:, 0]))
            return next((reason for weight in weights if (reason := tried(weight, x))), None)
        except (AttributeError, RuntimeError) as error:
            return f"torch {torch.__version__} has none for this processor ({error})"


PROBE = Probe()


@functools.cache
def has_integer_products() -> bool:
    """Whether `Int8Weight.integer_product` is right here: older processors add pairs of products in 16 bits."""
    weight = Int8Weight(torch.full((64, 64), 127, dtype=torch.int8), torch.full((64,), 0.01))
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)).add_(1).bfloat16()
    try:
        product = weight.integer_product(x)
    except (AttributeError, RuntimeError):  # no such kernel, or no such pair of forms
        return False
    expected = x.float().sum(1, keepdim=True) * 127 * weight.scales.float()
    return bool((product - expected).norm() <= 1e-3 * expected.norm())


def tried(weight: PackedWeight, x: torch.Tensor) -> str | None:
    """What is wrong with a packed kernel, None when nothing is."""
    name, version, rows = type(weight).__name__, torch.__version__, slice(0, weight.rows)
    plain = weight.decoded(rows)
    expected = weight.scaled(x @ plain, rows).float()
    if not (weight.packed(x).float() - expected).norm() <= 0.02 * expected.norm():
        return f"{name} is wrong in torch {version}"
    for _ in range(NUM_TRIES):  # other processes make either side slow, for a while
        if fastest(lambda: weight.packed(x)) <= 3 * fastest(lambda: x @ plain):
            break
    else:
        return f"{name} is slower than bfloat16 in torch {version}"
    return None


def fastest(function: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
