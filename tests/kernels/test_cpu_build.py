"""The CPU's library: compiled once, known by what it is made of, the same numbers from every version of it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from tabstop import LLM, SamplingParams
from tabstop.attention.cpu import CpuAttention
from tabstop.attention.reference import ReferenceAttention
from tabstop.config import cache_folder
from tabstop.kernels.cpu import build, library
from tabstop.quant.tiles import multiply_torch
from tests.attention.test_cpu import Steps, allocate, make_need
from tests.quant.test_tiles import FORMATS, error, random_weight
from tests.tiny import tiny_llama

if reason := library.refuse():
    pytest.skip(reason, allow_module_level=True)

VERSIONS = {
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "portable": ("-DTABSTOP_PORTABLE",),
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for an optimiser here."""
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))


@pytest.mark.usefixtures("quick")
def test_it_is_compiled_once_and_known_by_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, int, int]] = []
    first = build.build(tmp_path, lambda *stage: stages.append(stage))
    assert [stage[1:] for stage in stages] == [(0, 1), (1, 1)]
    again = build.build(tmp_path, lambda *stage: stages.append(stage))
    assert again == first and len(stages) == 2

    (tmp_path / "tabstop-killed.1.partial").touch()
    os.truncate(first, first.stat().st_size // 2)  # loading this would be a bus error
    assert build.build(tmp_path) == first and library.open_library(first).tabstop_machine()
    assert sorted(file.suffix for file in tmp_path.iterdir()) == ["", ".so"]  # the lock and the library, no rests

    compiler = build.compiler()
    assert compiler is not None
    names = {build.digest(compiler, ("-O3",)), build.digest(compiler, ("-O2",))}
    monkeypatch.setattr(build, "cpu_flags", lambda: "sse2")
    names.add(build.digest(compiler, ("-O3",)))
    other = tmp_path / "another compiler"
    other.write_text("#!/bin/sh\necho 1.0")
    other.chmod(0o755)
    names.add(build.digest([str(other)], ("-O3",)))
    sources = tmp_path / "sources"
    shutil.copytree(build.SOURCES, sources)
    (sources / "matrix.h").write_text((sources / "matrix.h").read_text() + "\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    names.add(build.digest(compiler, ("-O3",)))
    assert len(names) == 5


@pytest.mark.usefixtures("quick")
def test_a_package_brings_the_compiler_that_a_system_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package here is as small as it can be; ours for real takes a minute (benchmarks/RESULTS.md)."""
    real = build.compiler()
    assert real is not None
    monkeypatch.setattr(build, "COMPILERS", ())
    monkeypatch.setattr(build, "PACKAGE", "a_compiler")
    assert build.compiler() is None
    with pytest.raises(build.CannotBuild, match="pip install"):
        build.build(tmp_path)

    (tmp_path / "a_compiler").mkdir()
    (tmp_path / "a_compiler" / "__init__.py").touch()
    program = tmp_path / "a_compiler" / "zig"
    program.write_text(f'#!/bin/sh\n[ "$1" = c++ ] && shift && exec {shlex.join(real)} "$@"')
    program.chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    assert library.open_library(build.build(tmp_path / "kernels")).tabstop_machine()


@pytest.mark.usefixtures("quick")
def test_two_that_start_at_once_compile_once(tmp_path: Path) -> None:
    stages: list[int] = []
    threads = [threading.Thread(target=build.build, args=(tmp_path, lambda *stage: stages.append(1))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stages) == 2


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo too old >&2; exit 1; }')
    broken.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda: [str(broken)])
    with pytest.raises(build.CannotBuild, match=r"failed; a newer one may do: install g\+\+.*too old"):
        build.build(tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["lock"]
    monkeypatch.setattr(build, "compiler", lambda: ["true"])
    (tmp_path / "file").touch()
    with pytest.raises(build.CannotBuild, match=r"cannot write.*set XDG_CACHE_HOME"):
        build.build(tmp_path / "file")
    broken.write_text("no program")
    with pytest.raises(build.CannotBuild, match=r"cannot run .*; install"):
        build.said_by([str(broken)], 60)
    with pytest.raises(build.CannotBuild, match=r"set XDG_CACHE_HOME to a folder whose files may be executed"):
        library.open_library(broken)
    broken.write_text("#!/bin/sh\nprintf '\\377'; printf '\\377' >&2")
    assert build.said_by([str(broken)], 60) == (0, "\ufffd", "\ufffd")


def test_a_compiler_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    slow = tmp_path / "g++"
    slow.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >> {tmp_path}/pids; wait")
    slow.chmod(0o755)
    pids = tmp_path / "pids"
    pids.touch()
    with pytest.raises(build.CannotBuild, match=r"took more than 0.5 s"):
        build.said_by([str(slow)], 0.5)
    num_before = len(pids.read_text().splitlines())
    thread = threading.Thread(target=build.said_by, args=([str(slow)], 600))
    thread.start()
    while len(numbers := [int(line) for line in pids.read_text().splitlines()]) == num_before:
        time.sleep(0.01)
    build.interrupt()
    thread.join()
    for number in numbers:
        with contextlib.suppress(psutil.NoSuchProcess):  # nobody may have reaped it yet
            psutil.Process(number).wait(10)


def test_without_a_home_folder_it_is_said_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it gives a user that the system does not know
    with pytest.raises(OSError, match="set HOME or XDG_CACHE_HOME"):
        cache_folder({})


def test_a_cache_that_our_attention_takes_needs_the_library_before_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 1")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_chosen", library._Chosen())
    llm = LLM(model=str(tiny_llama(tmp_path / "model")), dtype="float32", kv_dtype="bfloat16", num_threads=1)
    assert llm._client.info.kernels["attention"] == "reference"
    assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    llm.close()


LITTLE = """
import os, resource, torch
from tabstop.kernels.cpu.library import Threads
from tests.quant.test_tiles import FORMATS, random_weight
weight, x = random_weight(FORMATS[0], 64, 64), torch.randn(40, 64)
wide, many = random_weight(FORMATS[0], 16, 4096), torch.zeros(12_000, 4096)
Threads.count = 1
expected = weight.multiply(x, None)
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)  # a few stacks
Threads.count = 64
assert torch.equal(weight.multiply(x, None), expected) and torch.equal(weight.multiply(x, None), expected)
try:
    wide.multiply(many, None)
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_where_the_system_gives_no_threads_the_caller_works_and_where_it_gives_no_memory_it_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", LITTLE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no memory for 12000 rows of inputs\n"


SCRIPT = """
import logging, sys
logging.basicConfig(format="%(message)s")
from tabstop import LLM, SamplingParams
from tabstop.engine.build import build_core
from tabstop.kernels.cpu import build
build.PACKAGE = "no compiler"  # it may be installed beside us
llm = LLM(model=sys.argv[1], max_model_len=64)
print(llm._client.core.info.kernels)
for output in llm.generate([[5, 6, 7, 8]], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False):
    print(output.outputs[0].token_ids)
llm.close()
"""


def test_without_a_compiler_it_is_said_once_and_served_all_the_same(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_llama(tmp_path / "model"))],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("there is no C++ compiler: install g++") == 1
    kernels, ids = done.stdout.splitlines()
    assert "int8 (PyTorch)" in kernels and "'attention': 'sdpa'" in kernels and len(ids.split(",")) == 8
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module", params=list(VERSIONS))
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Makes the named version this process's library; only one that this machine can run."""
    flags = " ".join((build.cpu_flags(), "")).split()
    needed = {"avx512": "avx512dq", "avx2": "avx2", "portable": ""}[request.param]
    if needed and needed not in flags:
        pytest.skip(f"this processor has no {needed}")
    made = library.open_library(build.build(tmp_path_factory.mktemp("library"), None, VERSIONS[request.param]))
    before, library._chosen.library = library.library(), made
    request.addfinalizer(lambda: setattr(library._chosen, "library", before))
    return str(request.param)


def test_every_version_multiplies_as_the_twin_does(version: str) -> None:
    assert library.machine() == version
    for form in FORMATS:
        weight = random_weight(form, 70, 100)
        x = torch.randn(21, 100)
        alone = torch.cat([weight.multiply(row[None], None) for row in x])
        assert error(weight.multiply(x, None), multiply_torch(weight, x, None)) < 2e-6
        assert torch.equal(weight.multiply(x, None), alone)


def test_every_version_keeps_what_is_no_number(version: str) -> None:
    for form in FORMATS:
        weight, x = random_weight(form, 70, 100), torch.randn(21, 100)
        healthy = weight.multiply(x, None)
        x[3, 40], x[8, 99], x[13], x[20, 1:3] = torch.nan, -torch.inf, torch.nan, torch.nan
        found = weight.multiply(x, None)
        bad = torch.zeros(21, dtype=torch.bool)
        bad[[3, 8, 13, 20]] = True
        assert not found[bad].isfinite().any(), (form, version)
        assert torch.equal(found[~bad], healthy[~bad])


def test_every_version_attends_as_the_reference_does(version: str) -> None:
    need = make_need(6, 2, 64)
    steps, reference, backend = Steps(need), ReferenceAttention(need), CpuAttention(need)
    expected_kv, kv = allocate(reference, need), allocate(backend, need)
    for lens in ([30, 1, 9, 300], [1, 1, 5, 1]):
        batch, (q, k, v) = steps.next(lens)
        expected = reference.run(q, k, v, expected_kv, reference.plan(batch), 0.125, 40)
        found = backend.run(q, k, v, kv, backend.plan(batch), 0.125, 40)
        assert error(found, expected) < 3e-3, version
