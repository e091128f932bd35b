"""Workloads of random content: given lengths, the article's mix, shared prefixes."""

from __future__ import annotations

from tabstop.bench.records import Session
from tabstop.bench.workloads import WorkloadSpec
from tabstop.bench.workloads.lengths import draw_lengths
from tabstop.bench.workloads.prompts import PromptMaker, join, turn_of

ARTICLE_LENGTHS, ARTICLE_OUTPUT = (128, 512), 256


def random_lengths(spec: WorkloadSpec, maker: PromptMaker) -> list[Session]:
    """Independent random prompts."""
    shape, content = spec.shape_rng(), spec.content_rng()
    inputs = draw_lengths(spec.input_tokens, spec.num_requests, shape)
    outputs = draw_lengths(spec.output_tokens, spec.num_requests, shape)
    return [
        Session(
            index=index,
            turns=[
                turn_of(
                    maker.make(num_in, content), maker, max_tokens=num_out, ignore_end=spec.ignore_end, kind="random"
                )
            ],
        )
        for index, (num_in, num_out) in enumerate(zip(inputs, outputs, strict=True))
    ]


def article(spec: WorkloadSpec, maker: PromptMaker) -> list[Session]:
    """Half 128, half 512 tokens in, in random order; 256 out, to the last token. The article has 1,000 of them."""
    shape, content = spec.shape_rng(), spec.content_rng()
    lengths = [ARTICLE_LENGTHS[i % 2] for i in range(spec.num_requests)]
    shape.shuffle(lengths)
    return [
        Session(
            index=index,
            turns=[
                turn_of(
                    maker.make(length, content),
                    maker,
                    max_tokens=ARTICLE_OUTPUT,
                    ignore_end=True,
                    kind=f"article-{length}",
                )
            ],
        )
        for index, length in enumerate(lengths)
    ]


def shared_prefix(spec: WorkloadSpec, maker: PromptMaker) -> list[Session]:
    """`num_prefixes` common starts, drawn with Zipf weights; each request ends in its own `input_tokens`."""
    shape, content = spec.shape_rng(), spec.content_rng()
    prefixes = [maker.make(spec.prefix_tokens, content) for _ in range(spec.num_prefixes)]
    weights = [1 / (rank + 1) for rank in range(spec.num_prefixes)]
    chosen = shape.choice(spec.num_prefixes, size=spec.num_requests, p=[w / sum(weights) for w in weights])
    inputs = draw_lengths(spec.input_tokens, spec.num_requests, shape)
    outputs = draw_lengths(spec.output_tokens, spec.num_requests, shape)
    return [
        Session(
            index=index,
            turns=[
                turn_of(
                    join(prefixes[int(chosen[index])], maker.make(inputs[index], content)),
                    maker,
                    max_tokens=outputs[index],
                    ignore_end=spec.ignore_end,
                    kind=f"prefix-{chosen[index]}",
                )
            ],
        )
        for index in range(spec.num_requests)
    ]
