"""An engine whose rows share a prefix, with our kernels under the interpreter, against the same without sharing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tabstop.attention.triton import TritonAttention
from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.kernels import decode
from tabstop.kernels.attention import Rows
from tabstop.kernels.prefix import PrefixPlan
from tests.engine.driver import Driver
from tests.kernels.rows import DEVICE
from tests.tiny import tiny_llama

COMMON = [(at * at + 3 * at) % 250 for at in range(140)]
PROMPTS = [[*COMMON, *((n * 31 + at) % 250 for at in range(1 + n % 5))] for n in range(16)]
ALONE = [[(7 * n + at) % 250 for at in range(20)] for n in range(2)]


def drawn(folder: Path, attention: str) -> list[list[int]]:
    options = {"max_model_len": 256, "num_kv_blocks": 256, "dtype": "float32", "max_num_seqs": 24}
    core = build_core(
        EngineConfig(model=str(folder), device=str(DEVICE), attention=attention, cuda_graphs=False, **options)
    )
    driver = Driver(core)
    driver.add(COMMON, 1)  # so that the others find it
    driver.run()
    keys = [driver.add(prompt, 3) for prompt in PROMPTS + ALONE]
    driver.run()
    core.close()
    return [driver.tokens[key, 0] for key in keys]


@pytest.mark.parametrize("windows", [[], ["full_attention", "sliding_attention"]])
def test_an_engine_reads_a_prefix_once_and_draws_the_same(
    windows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where layers with a window follow one without."""
    shared: list[list[int]] = []

    def attend(q: torch.Tensor, kv: torch.Tensor, rows: Rows, plan: PrefixPlan, scale: float) -> None:
        shared.append(plan.sharing.lens.tolist())
        attend_prefix(q, kv, rows, plan, scale)

    attend_prefix = decode.prefix_triton
    monkeypatch.setattr(decode, "prefix_triton", attend)
    monkeypatch.setattr(TritonAttention, "refuse", staticmethod(lambda need: None))
    folder = tiny_llama(tmp_path, num_hidden_layers=max(1, len(windows)), num_attention_heads=2, num_key_value_heads=1)
    if windows:
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], "hidden_act": "silu"}
        (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 64, "layer_types": windows}))
    assert drawn(folder, "triton") == drawn(folder, "reference")
    assert [0, 0] + [128] * 16 in [sorted(lens) for lens in shared]
