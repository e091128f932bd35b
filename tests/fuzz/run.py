"""`python -m tests.fuzz.run TARGET [options of libFuzzer]`: atheris on one target, from its corpus.

New inputs go into the folder that the first line names, beside the finds. What shows a bug belongs into the corpus by
hand; of the others those that reach lines which the corpus does not, made as few as can be:

    python -m tests.fuzz.run TARGET --keep FOLDER
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["tabstop", "json", "jinja2"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.seeds import CORPUS

MOST_KEPT = 1500  # bytes of an input


def main() -> None:
    logging.disable(logging.CRITICAL)  # every bad frame leaves a line
    name, *options = sys.argv[1:]
    corpus, program = str(CORPUS / name), sys.argv[0]
    if options[:1] == ["--keep"]:
        program = _launcher(name)
        options = ["-set_cover_merge=1", "-use_counters=0", f"-max_len={MOST_KEPT}", corpus, options[1]]
    elif options[:1] == ["--inner"]:
        del options[0]
    else:
        new = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
        print(f"{name}: new inputs go to {new}", flush=True)
        options = ["-max_len=20000", f"-artifact_prefix={new}/finds-", *options, new, corpus]
    atheris.Setup([program, "-timeout=20", "-rss_limit_mb=3000", *options], TARGETS[name])
    atheris.Fuzz()


def _launcher(name: str) -> str:
    """A file that can be run: libFuzzer looks at inputs in another process, which it starts as argv[0]."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-keep-")) / "run"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.fuzz.run {name} --inner "$@"\n')
    path.chmod(0o700)
    return str(path)


if __name__ == "__main__":
    main()
