"""docs/adding-a-model.md is true: its file, saved and registered, is a family that computes as the oracle does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tabstop import models
from tests.models.oracle import load, oracle_logits
from tests.models.paged import PagedRunner
from tests.tiny import tiny_llama

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


def test_the_page_s_family_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, registration = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_coder.py").write_text(family)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, dict[str, str]] = {}
    exec(registration, names)
    for architecture, builder in names["FAMILIES"].items():
        monkeypatch.setitem(models.FAMILIES, architecture, builder.removeprefix("tabstop.models."))
    folder = tiny_llama(tmp_path / "model", attention_bias=True, rope_theta=300.0)
    (expected,) = oracle_logits(folder, [list(range(40))])
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MyCoderForCausalLM"))
    logits = PagedRunner(load(folder)).logits(list(range(40)))
    assert "my_coder" in sys.modules
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_the_page_names_only_files_that_exist() -> None:
    root = PAGE.parents[1]
    for name in re.findall(r"`((?:src|tests|models|layers|quant)/[\w/.]+)`", PAGE.read_text(encoding="utf-8")):
        path = name if name.startswith(("src", "tests")) else f"src/tabstop/{name}"
        assert (root / path).exists(), name
