"""What the measurements of one GPU share, ours and the peer's: the workload's lengths and the command line.

Needs nothing but Python, so that it can be read where the peer is installed and Tabstop is not.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

NUM_NEW = 256
"""Tokens of every answer."""


def prompt_lengths(num_requests: int) -> list[int]:
    """Half of the prompts are short, half long."""
    return [512 if n % 2 else 128 for n in range(num_requests)]


def arguments_of(description: str | None, batches: str) -> argparse.Namespace:
    """folder, requests, loads, batches (a list of numbers), option and sampling (dicts), from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--loads", type=int, default=1, help="times that all requests are run")
    parser.add_argument("--batches", default=batches)
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--sampling", action="append", default=["temperature=0.0"], help="how tokens are drawn")
    arguments = parser.parse_args()
    arguments.batches = [int(text) for text in arguments.batches.split(",") if text]
    arguments.option = parse_options(arguments.option)
    arguments.sampling = parse_options(arguments.sampling)
    return arguments


def parse_options(given: list[str]) -> dict[str, Any]:
    """From name=value: values are JSON where they can be, else text."""
    return dict(_parse(option) for option in given)


def _parse(option: str) -> tuple[str, Any]:
    name, _, value = option.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def model_name(folder: str) -> str:
    return folder.rstrip("/").split("/")[-1]
