"""Tokens a second with a JSON schema beside the same lengths without, 16 streams, the embedded model.

    python benchmarks/grammars.py [--model MODEL] [--streams 16] [--tokens 160] [--rounds 9] [--temperature 0]

Both sides take turns in one process, with the same prompts and numbers of tokens (no end token counts; the schema's
list is long enough); ratios are taken turn by turn. `first` is the first turn of a schema that was not compiled before.
Prints rows for RESULTS.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from tabstop import LLM, SamplingParams, StructuredOutputsParams

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "year": {"type": "integer"},
        "kind": {"enum": ["function", "class", "module"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "year", "kind", "tags"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "records": {"type": "array", "minItems": 500, "items": RECORD},
    "one long text": {"type": "object", "properties": {"text": {"type": "string", "minLength": 20_000}}},
    "numbers": {"type": "array", "minItems": 5000, "items": {"type": "integer"}},
}
SCHEMAS["one long text"] |= {"required": ["text"]}


def turn(llm: LLM, options: argparse.Namespace, schema: dict[str, Any] | None) -> tuple[float, float]:
    """All streams at once: seconds, and seconds of all cores, which a busy machine changes less."""
    params = SamplingParams(
        temperature=options.temperature,
        seed=1,
        max_tokens=options.tokens,
        min_tokens=options.tokens,
        ignore_eos=True,
        structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
    )
    prompts = [f"Example {n}: a list of Python tools as JSON:\n" for n in range(options.streams)]
    start, start_cores = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    taken, of_cores = time.perf_counter() - start, time.process_time() - start_cores
    assert all(len(output.outputs[0].token_ids) == options.tokens for output in outputs), "a text ended early"
    return taken, of_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--temperature", type=float, default=0)
    options = parser.parse_args()
    llm = LLM(options.model, max_model_len=1024)
    num = options.streams * options.tokens
    turn(llm, options, None)
    print(f"| {options.streams} streams × {options.tokens} tokens, temperature {options.temperature:g} | without, tok/s"
          " | with | ratio: median (quartiles) | ratio of core seconds | first turn, tok/s |")  # fmt: skip
    for name, schema in SCHEMAS.items():
        first, _ = turn(llm, options, schema)
        turns = []
        for number in range(options.rounds):
            order = (None, schema) if number % 2 else (schema, None)
            taken = {side is None: turn(llm, options, side) for side in order}
            turns.append((*taken[True], *taken[False]))
        low, middle, high = statistics.quantiles((without / with_it for without, _, with_it, _ in turns), n=4)
        cores = statistics.median(without / with_it for _, without, _, with_it in turns)
        rates = [num / statistics.median(side) for side in list(zip(*turns, strict=True))[::2]]
        print(f"| {name} | {rates[0]:.0f} | {rates[1]:.0f} | {middle:.3f} ({low:.3f} to {high:.3f})"
              f" | {cores:.3f} | {num / first:.0f} |", flush=True)  # fmt: skip
    llm.close()


if __name__ == "__main__":
    main()
