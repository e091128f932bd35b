"""transformers as the oracle: the logits it computes from the same files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig
from tabstop.models import Model
from tabstop.models.loader import load_model


def load(path: Path | str, device: str = "cpu", compute: torch.dtype = torch.float32, **options: Any) -> Model:
    """Our model of a folder or file, in float32; with dtype="auto" as a CPU serves it."""
    config = EngineConfig(**{"dtype": "float32", **options})
    return load_model(open_checkpoint(str(path)), config, torch.device(device), compute, None)


def oracle_logits(folder: Path, prompts: list[list[int]], **options: Any) -> list[torch.Tensor]:
    """[n, vocab_size] for each prompt, each computed alone, float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        from transformers import AutoModelForCausalLM

        oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        with torch.inference_mode():
            return [oracle(torch.tensor([prompt])).logits[0] for prompt in prompts]
