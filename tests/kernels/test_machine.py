"""Every version of what the CPU's library asks of a processor computes what plain loops do; ARM's run in an emulator.

Of ARM this is all that is tested: machine.h holds what is particular to it, and an emulator shows no order of memory.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tabstop.kernels.cpu import build

SOURCE = Path(__file__).with_name("machine_values.cpp")
ARM = "aarch64-linux-gnu-g++"
EMULATOR = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
VERSIONS = {
    "avx512 vnni bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
    "avx512 vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx512": ["-march=x86-64-v4"],
    "avx2": ["-march=x86-64-v3"],
    "neon": ["-march=armv8-a"],
    "neon dotprod": ["-march=armv8.2-a+dotprod"],
    "neon dotprod bf16": ["-march=armv8.6-a"],
}
TOLERANCE = {"multiply_add": 1e-6, "power_of_two": 1e-6, "pairs": 1e-4}
"""Of the largest value; the others are exact."""

Values = list[tuple[str, list[float]]]


def values(compiler: list[str], flags: list[str], runner: list[str], folder: Path) -> Values:
    program = folder / "values"
    subprocess.run([*compiler, "-std=c++17", "-O2", "-Wno-psabi", *flags, "-o", program, SOURCE], check=True)
    printed = subprocess.run([*runner, program], check=True, capture_output=True, text=True).stdout
    lines = [line.split(" ") for line in printed.splitlines()]
    name = " ".join(lines[0][1:])
    return [(name, [])] + [(line[0], [float(number) for number in line[1:]]) for line in lines[1:]]


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    if (found := build.compiler()) is None:
        pytest.skip("there is no C++ compiler")
    return found


@pytest.fixture(scope="module")
def expected(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Values:
    return values(compiler, ["-DTABSTOP_PORTABLE"], [], tmp_path_factory.mktemp("portable"))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_computes_what_plain_loops_do(
    version: str, compiler: list[str], expected: Values, tmp_path: Path
) -> None:
    runner: list[str] = []
    if version.startswith("neon"):
        if shutil.which(ARM) is None or shutil.which(EMULATOR[0]) is None:
            pytest.skip("apt install g++-aarch64-linux-gnu qemu-user")
        compiler, runner = [ARM], EMULATOR
    elif platform.machine() != "x86_64" or (missing := lacking(version)):
        pytest.skip(f"this processor has no {missing if platform.machine() == 'x86_64' else version}")
    found = values(compiler, VERSIONS[version], runner, tmp_path)
    assert found[0][0] == version and len(found) == len(expected) > 700
    for (name, numbers), (_, wanted) in zip(found[1:], expected[1:], strict=True):
        assert numbers == pytest.approx(wanted, rel=TOLERANCE.get(name, 0), abs=largest(name, wanted), nan_ok=True), (
            name
        )


@pytest.mark.parametrize("version", [version for version in VERSIONS if version.startswith("neon")])
def test_the_whole_library_compiles_for_arm(version: str) -> None:
    if shutil.which(ARM) is None:
        pytest.skip("apt install g++-aarch64-linux-gnu")
    flags = [flag for flag in build.FLAGS if flag != "-O3"]
    command = [ARM, *flags, *VERSIONS[version], "-Wall", "-Werror", "-fsyntax-only", str(build.SOURCES / build.MAIN)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]


def largest(name: str, wanted: list[float]) -> float:
    return TOLERANCE.get(name, 0.0) * max(map(abs, wanted))


def lacking(version: str) -> str | None:
    names = {"avx512": "avx512dq", "vnni": "avx512_vnni", "bf16": "avx512_bf16", "avx2": "avx2"}
    present = build.cpu_flags().split()
    return next((names[word] for word in version.split() if names[word] not in present), None)
