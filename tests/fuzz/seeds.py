"""Writes the seeds of the corpus: `python -m tests.fuzz.seeds`. Small and valid, so that damage reaches deep."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

from tabstop.engine import wire
from tabstop.types import Abort, Command, ConstraintSpec, Limits, Sampling, Submit, pack_ids
from tests import tiny
from tests.tiny_gguf import write_gguf

CORPUS = Path(__file__).parent / "corpus"
TEMPLATES = {
    "chatml": tiny.CHATML_TEMPLATE,
    "strict": "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
    "macro": "{% macro f(x) %}[{{ x|trim|upper }}]{% endmacro %}{% set ns = namespace(n=0) %}"
    "{% for m in messages[1:] %}{% set ns.n = ns.n + 1 %}{{ f(m.content) }}{{ loop.index0 }}{% endfor %}{{ ns.n }}",
    "loop": "{% for a in range(100000) %}{% for b in range(100000) %}{{ a * b }}{% endfor %}{% endfor %}",
    "tools": "{% if tools %}{{ tools|tojson(indent=2) }}{% endif %}{{ messages[0]['content'].split('x')|join('y') }}",
}
BODIES = (
    (0, {"prompt": "def f", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["a", "b"], "n": 2}),
    (
        0,
        {"prompt": [[1, 2, 3]], "logit_bias": {"5": -100}, "suffix": None, "stream": True, "echo": True, "logprobs": 2},
    ),
    (0, {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}),
    (1, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_completion_tokens": 1}),
    (2, {"model": "m", "prompt": "def f(", "suffix": "return x", "min_tokens": 1}),
    (3, {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": "f", "text": "t"}], "n_predict": 3}),
    (4, {"prompt": "x", "n_predict": 3, "samplers": ["top_k"], "logit_bias": [[1, False]], "dry_multiplier": 0}),
)
STREAMS = (
    b'data: {"a": 1}\n\ndata: [DONE]\n\n',
    b": ping\r\n\r\nevent: x\ndata:a\ndata: b\r\rid: 1\n\n",
    b"data\n\ndatax: 1\n\n",
)


def files() -> dict[str, bytes]:
    """Every seed by its target and name."""
    found = {f"template/{name}": text.encode() for name, text in TEMPLATES.items()}
    found |= {f"body/{n}": bytes([kind]) + json.dumps(body).encode() for n, (kind, body) in enumerate(BODIES)}
    found |= {f"events/{n}": stream for n, stream in enumerate(STREAMS)}
    for name, config in (("llama", tiny.llama_config()), ("qwen2", tiny.qwen2_config())):
        found[f"config/{name}"] = json.dumps(config).encode()
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    found["config/yarn"] = json.dumps(tiny.llama_config(rope_scaling=rope)).encode()
    found["safetensors/two"] = save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"k": "v"})
    found |= {f"frame/{name}": wire.encode(message) for name, message in frames().items()}
    with tempfile.TemporaryDirectory() as folder:
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 2}
        written = write_gguf(Path(folder) / "m.gguf", tiny.llama_config(**small))
        found["gguf/llama"] = written.path.read_bytes()
    return found


def frames() -> dict[str, Submit | Abort | Command]:
    """Messages that a front end sends."""
    plain = Submit((1, 0), pack_ids([1, 2, 3]), Sampling(), Limits(3))
    odd = Sampling(temperature=0.7, top_p=0.5, top_k=4, min_p=0.1, seed=7, repetition_penalty=1.2, num_logprobs=3)
    rule = (ConstraintSpec("regex", "[ab]+"),)
    return {
        "plain": plain,
        "several": Submit(
            (1, 1), pack_ids(range(40)), odd, Limits(4, stop_token_ids=(5,), min_tokens=1), num_samples=3
        ),
        "constrained": Submit((1, 2), pack_ids([7]), Sampling(), Limits(4), constraints=rule),
        "abort": Abort((1, 0)),
        "join": Command(0, "join"),
        "gone": Command(1, "front_end_gone", {"front_end": 1}),
        "warm": Command(2, "warm", {}),
    }


def main() -> None:
    for name, data in files().items():
        path = CORPUS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
