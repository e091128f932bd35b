"""HumanEval-Infilling by transformers: the reference for `tabstop eval infilling` of a Qwen-Coder GGUF file.

    python benchmarks/infilling_reference.py FILE.gguf --limit 200 --out reference.json
    tabstop serve FILE.gguf --dtype float32 --port 8000 &
    tabstop eval infilling http://127.0.0.1:8000 --limit 200 --healing off --out server.json
    tabstop eval compare reference.json server.json

transformers' own loader decodes the file to float32, its own tokenizer reads the template of the family's README as one
text, its own model computes; greedy, one hole at a time. Stops and cuts are the server's documented ones (docs/fim.md):
the README's end tokens, the line end of a line, a repeated start of the suffix. Programs are judged as there. What a
prompt shares with the last one is not computed again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tabstop.evaluation import Answer, Task
from tabstop.evaluation.cli import new_report
from tabstop.evaluation.infilling import completion_of, judge
from tabstop.evaluation.progress import LiveCount
from tabstop.evaluation.tasks import DATA, SETS, load_tasks
from tabstop.text.shaping import overlap_of

TEMPLATE = "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>"
END_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
CURSOR = "<|cursor|>"  # instruct models write it as text


def cut(text: str, stops: Sequence[str]) -> str | None:
    """The text before the stop string that is complete first (of those, the longest); None without one."""
    ends = [(at + len(stop), -len(stop)) for stop in stops if stop and (at := text.find(stop)) >= 0]
    if not ends:
        return None
    end, minus_length = min(ends)
    return text[: end + minus_length]


class Reference:
    """Greedy answers of one model."""

    def __init__(self, path: Path) -> None:
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        self.tokenizer = AutoTokenizer.from_pretrained(**source)
        self.model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
        self.cache = DynamicCache(config=self.model.config)
        self.cached: list[int] = []  # ids of which the cache knows
        self.end_ids = set(self.tokenizer.convert_tokens_to_ids(list(END_TOKENS)))

    def without_cached(self, ids: list[int]) -> list[int]:
        """The ids that must be computed, at least one; the cache is cut to those before."""
        pairs = zip(self.cached, ids[:-1], strict=False)
        num_common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if num_common < len(self.cached):
            self.cache.crop(num_common - len(self.cached))
        self.cached = ids[:num_common]
        return ids[num_common:]

    @torch.inference_mode()
    def answer(self, task: Task, max_tokens: int, *, is_line: bool) -> Answer:
        """One token at a time, until a stop."""
        suffix = task.suffix or "\n"
        overlap = overlap_of(suffix)
        stops = (CURSOR, overlap, "\n" if is_line else "")
        prompt = TEMPLATE.format(prefix=task.prompt, suffix=suffix)
        new = self.without_cached(self.tokenizer(prompt, add_special_tokens=False).input_ids)
        written: list[int] = []
        while len(written) < max_tokens:
            output = self.model(torch.tensor([new]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cached += new
            token_id = int(output.logits[0, -1].argmax())
            new = [token_id]
            if token_id in self.end_ids:
                text = self.tokenizer.decode(written)
                return Answer(text=without_end(text, overlap), finish_reason="stop", num_tokens=len(written) + 1)
            written.append(token_id)
            found = cut(self.tokenizer.decode(written), stops)
            if found is not None:
                return Answer(text=found, finish_reason="stop", num_tokens=len(written))
        return Answer(text=self.tokenizer.decode(written), finish_reason="length", num_tokens=len(written))


def without_end(text: str, overlap: str) -> str:
    """An answer that ends with the start of the suffix, of which only the line end is missing."""
    repeated = overlap.removesuffix("\n")
    return text.removesuffix(repeated) if repeated else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="Qwen2.5-Coder or Qwen3-Coder as GGUF")
    parser.add_argument("--set", default="single-line", choices=list(SETS))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many of the first tasks")
    parser.add_argument("--max-tokens", type=int, help="default: the set's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = SETS[options.set]
    tasks = load_tasks(DATA / kind.file)[options.skip : options.limit]
    reference = Reference(options.file)
    report = new_report(options.set, "transformers")
    report.model = options.file.name
    report.settings = {"max_tokens": options.max_tokens or kind.max_tokens, "temperature": 0.0, "dtype": "float32"}
    with LiveCount(Console(stderr=True), report.set, len(tasks)) as live:
        for task in tasks:
            start = time.perf_counter()
            answer = reference.answer(task, options.max_tokens or kind.max_tokens, is_line=kind.is_line)
            answer = msgspec.structs.replace(answer, seconds=time.perf_counter() - start)
            result = asyncio.run(judge(task, answer, completion_of(answer, is_line=kind.is_line)))
            report.results.append(result)
            live(result)
            report.is_complete = len(report.results) == len(tasks)
            options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)))  # it takes long: keep each
    print(f"{report.num_passed} of {len(tasks)} passed")


if __name__ == "__main__":
    main()
