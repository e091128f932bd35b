"""The borders between parts, and the house budgets, checked on the tree itself.

A fresh interpreter imports every module of a part; what it must not have pulled in is looked up in sys.modules.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tabstop.api.dialects import DIALECTS, dialect_routes

PACKAGE = Path(__file__).parents[1] / "src" / "tabstop"
SOURCES = sorted(PACKAGE.rglob("*.py"))

HTTP = {"fastapi", "starlette", "uvicorn"}
ORACLE = {"transformers"}  # costs seconds to import, and is only what the tests compare with

LIGHT = ("api", "text", "evaluation", "engine/client.py", "engine/process_client.py", "engine/process.py")
"""Beside all modules at the top of the package but those in HEAVY: parts that start fast and never see a tensor."""

HEAVY = ("llm.py",)

WITHOUT_HTTP = (
    *(
        "engine",
        "worker",
        "cache",
        "models",
        "layers",
        "attention",
        "quant",
        "sampling",
        "grammar",
        "text",
        "evaluation",
    ),
    *("types.py", "config.py", "errors.py", "checkpoint.py", "supervisor.py", "cli.py", "llm.py", "service.py"),
)

MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_PARAMETERS = 40, 400, 5

MANY_PARAMETERS = {
    "engine/core.py:__init__": "the core's collaborators, by name, from one place (engine/build.py)",
    "llm.py:chat": "vLLM's signature, too",
    "outputs.py:__init__": "vLLM's signature, which its users' scripts call",
}
"""Functions over MAX_PARAMETERS, each with its reason."""

TENSOR_CALLS = re.compile(r"kernels/.*|attention/.*:run")
"""Hot calls that take tensors: packing them into an object would cost time."""

INTERFACES = ("jit", "command", "with_options", "fails_in_one_line")
"""Decorators of kernels and of commands: their parameters are pointers and strides, or options, and do not count."""


def modules(part: str) -> list[str]:
    """The dotted names of a folder's or file's modules."""
    place = PACKAGE / part
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    names = [".".join(("tabstop", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in files]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


@functools.cache
def imported_by(part: str) -> set[str]:
    """Top-level packages in sys.modules after importing all of a part."""
    script = f"import sys, json, {', '.join(modules(part))}\nprint(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in json.loads(result.stdout)}


def top_level() -> list[str]:
    return [file.name for file in sorted(PACKAGE.glob("*.py"))]


@pytest.mark.parametrize("part", [*LIGHT, *(name for name in top_level() if name not in (*HEAVY, "__main__.py"))])
def test_what_starts_fast_imports_no_torch(part: str) -> None:
    assert not imported_by(part) & ({"torch"} | ORACLE)


@pytest.mark.parametrize("part", WITHOUT_HTTP)
def test_what_computes_knows_no_http(part: str) -> None:
    assert not imported_by(part) & (HTTP | ORACLE)


def imported_in(file: Path) -> set[str]:
    """What a file's import statements name: modules, and the names taken from them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_nothing_imports_a_dialect() -> None:
    """But their registry, by name: what two of them need has its place beside app.py, which knows none of them."""
    found = []
    for file in SOURCES:
        own = ".".join(("tabstop", *file.relative_to(PACKAGE).with_suffix("").parts))
        others = [module for module in DIALECTS.values() if not f"{own}.".startswith(f"{module}.")]
        found += [
            f"{own}: {name}" for name in imported_in(file) if f"{name}.".startswith(tuple(f"{m}." for m in others))
        ]
    assert found == []


def test_only_the_application_knows_that_there_are_dialects() -> None:
    """And it names none: not a module, a path or a body of one."""
    knowing = {str(file.relative_to(PACKAGE)) for file in SOURCES if "tabstop.api.dialects" in imported_in(file)}
    assert knowing == {"api/app.py"}
    told = (PACKAGE / "api/app.py").read_text().lower()
    bodies = {route.body.__name__ for route in dialect_routes() if route.body is not None}
    paths = {f'"{route.path}' for route in dialect_routes()}
    assert [name for name in {*DIALECTS, *bodies, *paths} if name.lower() in told] == []


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file.relative_to(PACKAGE)}:{node.name}", node


def test_files_and_functions_fit_on_a_screen() -> None:
    long_files = [str(file) for file in SOURCES if len(file.read_text().splitlines()) > MAX_FILE_LINES]
    long_functions = [name for name, node in functions() if num_lines(node) > MAX_FUNCTION_LINES]
    assert (long_files, long_functions) == ([], [])


def test_functions_take_few_parameters() -> None:
    many = set()
    for name, node in functions():
        arguments = node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        if is_interface(node) or TENSOR_CALLS.fullmatch(name):
            continue
        if len([argument for argument in named if argument.arg not in ("self", "cls")]) > MAX_PARAMETERS:
            many.add(name)
    assert many == set(MANY_PARAMETERS)


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    start = node.body[0].lineno if is_interface(node) else node.lineno
    return node.end_lineno - start + 1


def is_interface(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorators = [entry.func if isinstance(entry, ast.Call) else entry for entry in node.decorator_list]
    return any(dotted(decorator).rpartition(".")[2] in INTERFACES for decorator in decorators)


def test_every_module_says_what_it_knows() -> None:
    """But a folder's empty __init__.py."""
    silent = [
        str(file)
        for file in SOURCES
        if ast.get_docstring(ast.parse(file.read_text())) is None and file.read_text().strip()
    ]
    assert silent == []


def test_nothing_runs_foreign_code_or_unpickles() -> None:
    """But the program that is started for it, in a process with limits (evaluation/programs.py)."""
    found = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            name = dotted(node.func) if isinstance(node, ast.Call) else ""
            if name == "runpy.run_path" and file.parts[-2:] == ("evaluation", "child.py"):
                continue
            if name in ("eval", "exec", "torch.load", "os.system", "yaml.load", "compile", "runpy.run_path"):
                found.append(f"{file}:{node.lineno} {name}")
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [
                f"{file}:{node.lineno} {name}" for name in names if name in ("pickle", "cloudpickle", "dill", "marshal")
            ]
    assert found == []


def test_only_the_config_reads_the_environment() -> None:
    """Writing is another thing: a front end sets where its metrics go before their library looks."""
    found = []
    for file in SOURCES:
        if file.name == "config.py" and file.parent == PACKAGE:
            continue
        tree = ast.parse(file.read_text())
        written = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
        }
        for node in ast.walk(tree):
            name = dotted(node) if isinstance(node, ast.Attribute) else ""
            if name in ("os.environ", "os.getenv") and id(node) not in written:
                found.append(f"{file}:{node.lineno}")
    assert found == []


def dotted(node: ast.AST) -> str:
    """'torch.load' for the expression torch.load; '' for what is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""
