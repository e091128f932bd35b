"""`python -m tests.serve_stub JSON`: `tabstop serve` with a stub engine core. A program for test_supervisor.py."""

from __future__ import annotations

import asyncio
import sys

import msgspec

from tabstop import logs, supervisor
from tabstop.config import EngineConfig, ServerConfig
from tabstop.errors import StartupError
from tests.engine import stub_core


class Settings(msgspec.Struct):
    engine: EngineConfig
    server: ServerConfig


async def run(settings: Settings) -> int:
    return await supervisor.Supervisor(settings.engine, settings.server, core=stub_core.NAME).run()


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    logs.configure(logs.LogSettings(), "supervisor")
    try:
        sys.exit(asyncio.run(run(settings)))
    except StartupError as error:
        sys.exit(f"error: {error.message}")  # exit code 1: the real command's 2 is cli.py's business


if __name__ == "__main__":
    main()
