"""SECURITY.md names tests: each exists, and every test of a CVE is named. docs/operations.md names every limit."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from tabstop.config import EngineConfig, ServerConfig, flag
from tabstop.errors import TabstopError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")


def names_in(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, kinds) and node.name.startswith("test_")}


def test_every_test_of_the_checklist_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE + OPERATIONS)
    assert len(named) > 70
    assert [f"{file}::{name}" for file, name in named if name not in names_in(ROOT / file)] == []


def test_the_checklist_has_all_of_its_lines() -> None:
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 22))
    assert [number for number, tests in rows if "tests/" not in tests] == ["18"]


def test_every_test_of_a_cve_is_on_the_page() -> None:
    for file in sorted((ROOT / "tests/security").glob("test_*.py")):
        for name in names_in(file):
            assert not name.startswith("test_cve_") or f"::{name}`" in PAGE, name


OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")


def test_the_table_of_limits_is_whole() -> None:
    table = OPERATIONS.partition("## Limits\n")[2].partition("\n## ")[0]
    options = {flag(field.name) for cls in (EngineConfig, ServerConfig) for field in dataclasses.fields(cls)}
    named = set(re.findall(r"`(--[\w-]+)`", table))
    assert named <= options
    timed = {flag(field.name) for field in dataclasses.fields(ServerConfig) if field.metadata["unit"] == "seconds"}
    assert timed and named == timed | {name for name in options if re.match(r"--max-|.*-timeout$", name)}


def test_every_option_metric_and_code_of_the_operations_page_exists() -> None:
    options = {flag(field.name) for cls in (EngineConfig, ServerConfig) for field in dataclasses.fields(cls)}
    commands = {
        "--scope",
        "--tenant",
        "--class",
        "--rate",
        "--max-concurrent",
        "--tokens-per-minute",
        "--file",
        "--name",
    }
    assert set(re.findall(r"(?<![\w-])(--[a-z][\w-]+)", OPERATIONS)) - options - commands == set()
    api = (ROOT / "docs/api.md").read_text(encoding="utf-8")  # tests/api/test_documentation.py holds that to the server
    assert set(re.findall(r"tabstop_\w+", OPERATIONS)) - set(re.findall(r"tabstop_\w+", api)) == set()

    def codes(cls: type[TabstopError]) -> set[str]:
        return {cls.code}.union(*map(codes, cls.__subclasses__()))

    refusals = OPERATIONS.partition("## Limits\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"\d{3} `(\w+)`", refusals)) <= codes(TabstopError)
