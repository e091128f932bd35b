"""Random JSON schemas of bounded size, and what answers make of them.

    PYTHONPATH=src:. python -m tests.grammar.schemas 1000 [MODEL]

prints how many answers were valid, invalid and unfinished. Without MODEL (a folder, or `default`) a tiny random one
answers: it takes every turn that a grammar leaves open.
"""

from __future__ import annotations

import datetime
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.grammar.specs import json_schema_constraint
from tabstop.types import FinishReason, Limits, Sampling
from tests.engine.driver import Driver

MAX_TOKENS = 480
NAMES = ("name", "age", "tags", "id", "é", "a b", 'q"uote', "items", "x", "y", "price", "next")
PATTERNS = ("^[a-c]{2,5}$", "^\\d{3}-\\d{2}$", "^(foo|ba[rz])$", "ab", "^x[^y]?z$", "^[A-Z][a-z]{0,6}$")
FORMATS = ("date", "uuid", "ipv4", "ipv6", "email", "date-time")

checker = jsonschema.FormatChecker(formats=["date", "uuid", "ipv4", "ipv6", "email"])


@checker.checks("date-time", raises=ValueError)
def is_date_time(value: object) -> bool:
    """The standard library reads what RFC 3339 allows, leap seconds aside."""
    return not isinstance(value, str) or bool(
        datetime.datetime.fromisoformat(value.upper().replace("Z", "+00:00").replace(":60", ":59"))
    )


class Generator:
    """Schemas whose texts are bounded where that can be said: strings, arrays and objects have a largest size."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.definitions: dict[str, Any] = {}

    def schema(self) -> dict[str, Any]:
        """A whole one."""
        names = [f"d{n}" for n in range(self.random.choice((0, 0, 1, 2)))]
        for name in names:  # each knows those before it, and the last one may hold itself
            self.definitions[name] = self.node(2)
        if names and self.random.random() < 0.3:
            self.definitions[names[-1]] = self.chain(names[-1])
        root = self.node(4) if self.random.random() < 0.3 else self.object(4)
        keyword = self.random.choice(("$defs", "definitions"))
        text = json.dumps(root | ({keyword: self.definitions} if names else {}))
        whole: dict[str, Any] = json.loads(text.replace("#/$defs/", f"#/{keyword}/"))
        return whole

    def chain(self, name: str) -> dict[str, Any]:
        inner = {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]}
        return self.closed({"value": self.scalar(), "next": inner}, ["next"])

    def node(self, depth: int) -> dict[str, Any]:
        makers = [self.scalar, self.scalar, self.scalar, self.union]
        if self.definitions:
            makers.append(self.reference)
        if depth > 0:
            makers += [lambda: self.object(depth), lambda: self.array(depth), lambda: self.any_of(depth)]
            makers += [lambda: self.all_of()]
        return self.random.choice(makers)()

    def reference(self) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{self.random.choice(list(self.definitions))}"}

    def object(self, depth: int) -> dict[str, Any]:
        names = self.random.sample(NAMES, self.random.randint(0, 4))
        required = [name for name in names if self.random.random() < 0.6]
        made = self.closed({name: self.node(depth - 1) for name in names}, required)
        if self.random.random() < 0.2:
            extra = {"type": "integer", "minimum": 0, "maximum": 9}
            if required == names:
                made |= {"additionalProperties": extra, "maxProperties": len(names) + 2}
            elif self.random.random() < 0.5:
                made |= {"patternProperties": {"^zz[0-9]$": extra}}
        return made

    @staticmethod
    def closed(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
        made = {"type": "object", "properties": properties, "additionalProperties": False}
        return made | ({"required": required} if required else {})

    def array(self, depth: int) -> dict[str, Any]:
        least = self.random.randint(0, 2)
        made = {"type": "array", "items": self.node(depth - 1), "minItems": least}
        made["maxItems"] = least + self.random.randint(0, 3)
        if self.random.random() < 0.2:
            made["prefixItems"] = [self.node(depth - 1) for _ in range(2)]
            made["maxItems"] = max(2, made["maxItems"])
        return made

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.node(depth - 1) for _ in range(self.random.randint(2, 3))]}

    def all_of(self) -> dict[str, Any]:
        least = self.random.randint(-5, 5)
        return {"allOf": [{"type": "integer", "minimum": least}, {"maximum": least + self.random.randint(1, 200)}]}

    def union(self) -> dict[str, Any]:
        kinds = self.random.sample(("null", "boolean", "string"), 2)
        if self.random.random() < 0.3:
            return {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "integer", "minimum": 0, "maximum": 99}]}
        return {"type": kinds} | ({"maxLength": 5} if "string" in kinds else {})

    def scalar(self) -> dict[str, Any]:
        pick = self.random.choice
        makers = (self.integer, self.number, self.string, self.string, self.fixed)
        plain: tuple[dict[str, Any], ...] = ({"type": "boolean"}, {"type": "null"})
        made = pick(plain) if self.random.random() < 0.2 else pick(makers)()
        return made | ({"description": "of it", "title": "T"} if self.random.random() < 0.2 else {})

    def integer(self) -> dict[str, Any]:
        least = self.random.randint(-300, 300)
        if self.random.random() < 0.2:
            return {"type": "integer", "minimum": 0, "maximum": 500, "multipleOf": self.random.choice((2, 5, 7))}
        return {"type": "integer", "minimum": least, "exclusiveMaximum": least + self.random.randint(2, 5000)}

    def number(self) -> dict[str, Any]:
        least = round(self.random.uniform(-50, 50), self.random.randint(0, 2))
        low, high = self.random.choice((("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")))
        return {"type": "number", low: least, high: least + self.random.choice((0.5, 3, 100))}

    def string(self) -> dict[str, Any]:
        kind = self.random.random()
        if kind < 0.25:
            return {"type": "string", "pattern": self.random.choice(PATTERNS), "maxLength": 12}
        if kind < 0.45:
            return {"type": "string", "format": self.random.choice(FORMATS)}
        least = self.random.randint(0, 4)
        return {"type": "string", "minLength": least, "maxLength": least + self.random.randint(0, 8)}

    def fixed(self) -> dict[str, Any]:
        values = ["red", "a\nb", "ü", 1, 2.5, None, True, ["x", 1], {"k": "v"}, ""]
        if self.random.random() < 0.3:
            return {"const": self.random.choice(values)}
        return {"enum": self.random.sample(values, self.random.randint(1, 4))}


def answers(model: str, seeds: list[int], **options: Any) -> Iterator[tuple[dict[str, Any], str, FinishReason, str]]:
    """(schema, text, how it ended, why it failed) for each seed; all run together, half of them greedily."""
    core = build_core(EngineConfig(model=model, num_kv_blocks=4096, max_num_waiting=4096, **options))
    encode, decode = core.vocabulary.encode, core.vocabulary.token_bytes
    driver, keys = Driver(core), {}
    for seed in seeds:
        schema = Generator(seed).schema()
        sampling = Sampling(temperature=seed % 2, seed=seed, top_p=0.98)
        limits = Limits(MAX_TOKENS, stop_sets=("eos",))
        prompt = list(encode(f"An example of {json.dumps(schema)[:200]}:\n"))[:200]
        key = driver.add(prompt, sampling=sampling, limits=limits, constraints=(json_schema_constraint(schema),))
        keys[key] = schema
    while core.has_work() or driver.pending or core.stats().num_waiting:
        driver.step()
    core.close()
    for key, schema in keys.items():
        failure = driver.deltas[key, 0].failure
        text = b"".join(decode[token] for token in driver.tokens[key, 0]).decode(errors="replace")
        yield schema, text, driver.finish[key, 0], failure.message if failure else ""


def judge(schema: dict[str, Any], text: str) -> str:
    """What is wrong with a text, as jsonschema sees it; nothing where nothing is."""
    try:
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).partition("\n")[0]
    return ""


def main() -> None:
    num, model = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    with tempfile.TemporaryDirectory() as folder:
        if not model:
            from tests.tiny import tiny_llama

            model = str(tiny_llama(Path(folder) / "tiny", max_position_embeddings=1024))
        counts: Counter[str] = Counter()
        for schema, text, finish, failure in answers(model, list(range(num))):
            wrong = judge(schema, text) if finish is FinishReason.STOP else ""
            counts["invalid" if wrong else f"{finish}: {failure}" if failure else str(finish)] += 1
            if wrong or failure:
                print(json.dumps(schema), repr(text), wrong or failure, sep="\n  ")
    print(dict(counts))


if __name__ == "__main__":
    main()
