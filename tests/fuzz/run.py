"""`python -m tests.fuzz.run TARGET [options of libFuzzer]`: atheris on one target, from its corpus.

New inputs go into a folder beside the finds (`-artifact_prefix` names it); what shows a bug belongs into the corpus.
"""

from __future__ import annotations

import logging
import sys
import tempfile

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["tabstop", "json", "jinja2"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.seeds import CORPUS


def main() -> None:
    logging.disable(logging.CRITICAL)  # every bad frame leaves a line
    name, *options = sys.argv[1:]
    new = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
    settings = ["-timeout=20", "-rss_limit_mb=3000", "-max_len=20000", f"-artifact_prefix={new}/", *options]
    atheris.Setup([sys.argv[0], *settings, new, str(CORPUS / name)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
