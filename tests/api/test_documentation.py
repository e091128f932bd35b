"""docs/api.md names everything that there is, and nothing that there is not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import httpx

from tabstop.api.dialects import dialect_routes
from tabstop.api.dialects.openai import ChatBody, CompletionBody
from tabstop.api.schema import Generation, Refused
from tabstop.config import ServerConfig, flag
from tabstop.errors import StartupError, TabstopError
from tests.api.serving import Running

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`\n]+)`", PAGE))


def section(heading: str) -> str:
    return PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_every_parameter_is_named() -> None:
    for body in {route.body for route in dialect_routes() if route.body}:
        assert set(body.__struct_fields__) <= NAMED, body.__name__


def test_the_list_of_refused_parameters_is_whole() -> None:
    refused = re.search(r"Refused, unless.*?\n\n", PAGE, re.DOTALL)
    assert refused is not None
    ours = {"chat_template", "documents", "modalities", "audio", "echo"}
    ours |= {"functions", "function_call"}
    assert ours <= set(ChatBody.__struct_fields__)
    assert set(re.findall(r"`([a-z_]+)`", refused[0])) == set(Refused.__struct_fields__) | ours | {"not_supported"}
    assert not ours & (set(Generation.__struct_fields__) | set(CompletionBody.__struct_fields__) - {"echo"})


def test_every_error_is_in_the_table() -> None:
    rows = re.findall(r"\| (\d+) \| (`[^|]+`) \|", section("Errors"))
    listed = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}

    def below(cls: type[TabstopError]) -> set[tuple[int, str]]:
        return {(cls.status, cls.code)}.union(*map(below, cls.__subclasses__()))

    ours = below(TabstopError) - below(StartupError)
    assert listed == ours | {(404, "not_found"), (405, "method_not_allowed")}


def test_every_metric_is_in_the_tables(server: Running) -> None:
    httpx.post(server.url + "/v1/completions", json={"prompt": "x"})
    page = httpx.get(server.url + "/metrics").text
    families = re.findall(r"^# TYPE (\w+) (\w+)", page, re.MULTILINE)
    assert {name for name in NAMED if name.startswith("tabstop_")} == {
        name for name, kind in families if not name.endswith("_created")
    }


def test_every_option_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(--[\w-]+)` \| ([^|]*) \| ([^|]*) \|$", section("Options of the HTTP side"), re.MULTILINE)
    assert [name for name, _, _ in rows] == [flag(field.name) for field in dataclasses.fields(ServerConfig)]
    for field, (name, default, text) in zip(dataclasses.fields(ServerConfig), rows, strict=True):
        assert text.startswith(field.metadata["help"])
        given = str(field.default).lower() if isinstance(field.default, bool) else str(field.default or "")
        assert default.strip().strip("`") == ("" if field.default in (None, ()) else given), name
    assert {name for name in NAMED if name.startswith("--")} >= {"--max-body-bytes", "--unknown-model"}


def test_every_route_is_in_the_table(server: Running) -> None:
    paths = httpx.get(server.url + "/openapi.json").json()["paths"]
    table = PAGE.partition("## A request")[0]
    for path in paths:
        plain = path.removeprefix("/v1").replace("{model}", "{id}").replace("{model:path}", "{id}")
        assert plain in table, path
