"""Key files and `tabstop key new`: what a line may be, and that no message says what stands in one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import msgspec
import pytest

from tabstop.errors import ConfigError
from tabstop.keys import _OPTIONS, Key, KeyRing, append_key, digest_of, line_of, new_key, parse_rate, read_keys
from tabstop.types import Priority
from tests.test_cli import run

SECRET = "sk-planted-where-a-digest-belongs"


def key_of(text: str, name: str = "someone", **fields: object) -> Key:
    return Key(name, hashlib.sha256(text.encode()).hexdigest(), **fields)


def test_a_ring_finds_a_key_by_its_text_alone() -> None:
    first, second = key_of("one", "a"), key_of("two", "b")
    ring = KeyRing([first, second])
    assert ring.find(["two"]) == second
    assert ring.find(["wrong", "one"]) == first
    assert ring.find([first.sha256, "a", "", "ONE", "one "]) is None
    ring.replace([second])
    assert ring.find(["one"]) is None and ring.find(["two"]) == second


def test_new_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100 and min(map(len, keys)) >= 43 + len("sk-tabstop-")


def test_a_file_has_lines_blanks_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    full = key_of("x", "full", scopes=("infer", "admin"), tenant="t", priority_class="background", max_concurrent=2)
    path.write_bytes(b"# ours\n\n" + line_of(full) + b"  # indented\r\n" + line_of(key_of("y", "plain")).rstrip())
    assert read_keys(path) == (full, key_of("y", "plain"))
    assert full.priority is Priority.BACKGROUND and json.loads(line_of(full))["class"] == "background"
    assert read_keys(path)[1].scopes == ("infer",) and read_keys(path)[1].priority is Priority.INTERACTIVE
    path.write_bytes(b"")
    assert read_keys(path) == ()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"name": "a", "sha256": SECRET}, "`sha256`"),
        ({"name": "a", "sha256": "A" * 64}, "`sha256`"),
        ({"name": "a", "sha256": "a" * 64 + "\n"}, "`sha256`"),
        ({"name": "a"}, "`sha256` is missing"),
        ({"name": SECRET + "/", "sha256": "a" * 64}, "`name`"),
        ({"name": "a\0b", "sha256": "a" * 64}, "`name`"),
        ({"name": "", "sha256": "a" * 64}, "`name`"),
        ({"name": "a", "sha256": "a" * 64, "scopes": [SECRET]}, "`scopes`"),
        ({"name": "a", "sha256": "a" * 64, "scopes": []}, "`scopes`"),
        ({"name": "a", "sha256": "a" * 64, "class": SECRET}, "`class`"),
        ({"name": "a", "sha256": "a" * 64, "requests_per_minute": 0}, "`requests_per_minute`"),
        ({"name": "a", "sha256": "a" * 64, "max_concurrent": 1.5}, "`max_concurrent`"),
        ({"name": "a", "sha256": "a" * 64, SECRET: 1}, "known fields"),
        (SECRET, "known fields"),
        (b'{"name": "' + SECRET.encode(), "not a JSON object"),
        (SECRET.encode(), "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b"[" * 100_000, "known fields"),
    ],
)
def test_a_bad_line_is_named_and_not_shown(tmp_path: Path, line: object, problem: str) -> None:
    path = tmp_path / "keys"
    content = line if isinstance(line, bytes) else json.dumps(line).encode()
    path.write_bytes(line_of(key_of("x", "good")) + content)
    with pytest.raises(ConfigError) as error:
        read_keys(path)
    assert "line 2" in error.value.message and problem in error.value.message
    assert SECRET not in error.value.message


def test_two_keys_of_one_name_or_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for second in (key_of("y", "a"), key_of("x", "b")):
        path.write_bytes(line_of(key_of("x", "a")) + line_of(second))
        with pytest.raises(ConfigError, match="the same"):
            read_keys(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "nowhere")


def test_appending_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    append_key(path, key_of("x", "a"))
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes().rstrip())  # an editor left no line end
    append_key(path, key_of("y", "b"))
    assert [key.name for key in read_keys(path)] == ["a", "b"]
    with pytest.raises(ConfigError, match="already"):
        append_key(path, key_of("z", "b"))
    with pytest.raises(ConfigError, match="cannot write"):
        append_key(tmp_path / "no folder" / "keys", key_of("z", "c"))


@pytest.mark.parametrize(("text", "rate"), [("60", 60), ("60/min", 60), ("2/s", 120), ("90/h", 1.5), ("0.5/min", 0.5)])
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["x", "", "60/day", "/min"])
def test_bad_rates(text: str) -> None:
    with pytest.raises(ConfigError, match="--rate"):
        parse_rate(text)


def test_the_command_prints_a_key_once(tmp_path: Path) -> None:
    key, line = run("key", "new", "--name", "ci").stdout.splitlines()
    assert json.loads(line) == {"name": "ci", "sha256": digest_of(key).hex(), "scopes": ["infer"]}
    path = tmp_path / "keys"
    options = ["--scope", "infer,admin", "--tenant", "team", "--class", "normal", "--rate", "2/s"]
    options += ["--max-concurrent", "3", "--tokens-per-minute", "5000", "--file", str(path)]
    printed = run("key", "new", "--name", "full", *options)
    (made,) = read_keys(path)
    assert printed.stdout.split() == [printed.stdout.strip()] and digest_of(printed.stdout.strip()).hex() == made.sha256
    assert printed.stdout.strip() not in path.read_text() and os.stat(path).st_mode & 0o777 == 0o600
    ceilings = {"requests_per_minute": 120.0, "max_concurrent": 3, "tokens_per_minute": 5000.0}
    assert made == Key("full", made.sha256, ("infer", "admin"), "team", "normal", **ceilings)


def test_a_repeated_scope_takes_none_away() -> None:
    """The last one alone counted: a key of both scopes had one, without a word."""
    _, line = run("key", "new", "--name", "a", "--scope", "infer", "--scope", "admin,infer").stdout.splitlines()
    assert json.loads(line)["scopes"] == ["infer", "admin"]


def test_every_option_of_a_key_says_what_it_may_be() -> None:
    fields = {field.encode_name for field in msgspec.structs.fields(Key)}
    assert set(_OPTIONS) == fields - {"sha256"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--name", "a b"], "--name must be 1 to 64 letters"),
        (["--name", "a", "--scope", "root"], "--scope must be infer, admin, or infer,admin"),
        (["--name", "a", "--scope", ","], "--scope must be infer, admin, or infer,admin"),
        (["--name", "a", "--class", "best"], "--class must be interactive, normal or background"),
        (["--name", "a", "--rate", "-1"], "--rate must be a number over 0"),
        (["--name", "a", "--rate", "nan"], "--rate must be a number over 0"),
        (["--name", "a", "--max-concurrent", "0"], "--max-concurrent must be a whole number from 1"),
    ],
)
def test_the_command_refuses_in_one_line(options: list[str], named: str) -> None:
    done = run("key", "new", *options)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and named in done.stderr and len(done.stderr.splitlines()) == 1
