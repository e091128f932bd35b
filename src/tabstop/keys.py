"""Who may use the server, and how much: keys by their digests, one JSON object a line in a file (--key-file).

    {"name":"ci","sha256":"…","scopes":["infer"],"tenant":"build","class":"background","requests_per_minute":60}

Only digests are kept. A key is 256 random bits, so SHA-256 is enough: a slow hash protects what people can remember
against guessing, and would cost every request its time. Knows no HTTP; who counts is api/ceilings.py.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from tabstop.errors import ConfigError
from tabstop.types import Priority

Scope = Literal["infer", "admin"]
INFER: Final = "infer"
ADMIN: Final = "admin"
"""Scopes: use the model; see what the whole server does."""

PREFIX = "sk-tabstop-"
"""What new keys begin with, so that scanners of leaked secrets can find them."""

MAX_FILE_BYTES = 8 << 20

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._@-]{1,64}\Z")]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Rate = Annotated[float, Meta(gt=0, le=1e9)]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is known of a key. None: no such ceiling."""

    name: Name
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)] = (INFER,)
    tenant: Name | None = None  # whose cached prompts it shares; None: a tenant of its own, by its name
    priority_class: Literal["interactive", "normal", "background"] = msgspec.field(default="interactive", name="class")
    requests_per_minute: Rate | None = None
    max_concurrent: Count | None = None
    tokens_per_minute: Rate | None = None  # of prompts and completions together

    @property
    def priority(self) -> Priority:
        """The best class that its requests get."""
        return Priority[self.priority_class.upper()]


class KeyRing:
    """The keys that are valid now."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._by_digest: dict[bytes, Key] = {}
        self.replace(keys)

    def replace(self, keys: Iterable[Key]) -> None:
        """All of them at once; requests that run go on."""
        self._by_digest = {bytes.fromhex(key.sha256): key for key in keys}

    def find(self, given: Iterable[str]) -> Key | None:
        """The first valid one of the keys that a request carries.

        The same work for every guess, right or wrong: one digest, one look into a table whose order is random in each
        process, one comparison in constant time. Nobody chooses digests, so nothing can be approached step by step.
        """
        found = [self._find(digest_of(key)) for key in given]
        return next((key for key in found if key is not None), None)

    def _find(self, digest: bytes) -> Key | None:
        key = self._by_digest.get(digest)
        expected = bytes(32) if key is None else bytes.fromhex(key.sha256)
        return key if hmac.compare_digest(digest, expected) else None


def digest_of(key: str) -> bytes:
    """SHA-256 of a key as a header carries it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def single_key(text: str) -> Key:
    """What --api-key gives: everything, without ceilings. Its tenant is named after its digest."""
    digest = digest_of(text).hex()
    return Key("api-key", digest, (INFER, ADMIN), digest[:16])


def new_key() -> str:
    """A key that nobody can guess; printed once, kept by nobody here."""
    return PREFIX + secrets.token_urlsafe(32)


# ---- from the command line


def parse_scopes(texts: Iterable[str]) -> list[str]:
    """Of an option that may be repeated, with commas or without; each scope once."""
    return list(dict.fromkeys(part.strip() for text in texts for part in text.split(",") if part.strip()))


def parse_rate(text: str) -> float:
    """Requests a minute of 60, 60/min, 2/s or 1000/h. Raises ConfigError."""
    number, _, unit = text.partition("/")
    factor = {"": 1.0, "min": 1.0, "s": 60.0, "h": 1 / 60}.get(unit.strip())
    try:
        return float(number) * factor if factor else float("")
    except ValueError:
        raise ConfigError("--rate is a number of requests a minute, as 60/min, or 2/s, or 1000/h") from None


_A_NAME = "1 to 64 letters, digits and . _ @ -"
_A_RATE = "a number over 0, at most 1000000000"
_OPTIONS = {
    "name": ("--name", _A_NAME),
    "scopes": ("--scope", "infer, admin, or infer,admin"),
    "tenant": ("--tenant", _A_NAME),
    "class": ("--class", "interactive, normal or background"),
    "requests_per_minute": ("--rate", f"{_A_RATE}, a minute"),
    "max_concurrent": ("--max-concurrent", "a whole number from 1 to 2147483647"),
    "tokens_per_minute": ("--tokens-per-minute", _A_RATE),
}
"""Fields that the command sets: its option, and what that may be."""


def make_key(fields: dict[str, object]) -> Key:
    """Raises ConfigError naming the option and what it may be."""
    try:
        return msgspec.convert(fields, Key)
    except msgspec.ValidationError as error:
        found = re.search(r"at `\$\.(\w+)", str(error))
        assert found is not None
        option, allowed = _OPTIONS[found[1]]
        raise ConfigError(f"{option} must be {allowed}") from None


# ---- the file


def read_keys(path: str | os.PathLike[str]) -> tuple[Key, ...]:
    """The keys of a file; blank lines and lines that begin with # are skipped.

    Raises ConfigError naming the line and never what stands there: it may be a key.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path} ({error.strerror}); see --key-file") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"the key file {path} is over {MAX_FILE_BYTES} bytes; split the server or its users")
    keys: list[Key] = []
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith(b"#"):
            keys.append(_key_of(line, f"line {number} of the key file {path}"))
    for what in ("name", "sha256"):
        if len({getattr(key, what) for key in keys}) < len(keys):
            raise ConfigError(f"two keys of the key file {path} have the same {what}; remove one")
    return tuple(keys)


def _key_of(line: bytes, place: str) -> Key:
    try:
        return msgspec.json.decode(line, type=Key)
    except msgspec.ValidationError as error:
        field = re.search(r"at `\$\.(\w+)", str(error)) or re.search(r"missing required field `(\w+)`", str(error))
        problem = f"`{field[1]}` is missing, or not what it may be" if field else "it is not an object of known fields"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        problem = "it is not a JSON object"
    raise ConfigError(f"{place}: {problem}; docs/operations.md has the fields, `tabstop key new` writes lines")


def append_key(path: str | os.PathLike[str], key: Key) -> None:
    """Adds a line to a file, which is made for its owner alone. Raises ConfigError, also for a name that is taken."""
    known = read_keys(path) if Path(path).exists() else ()
    if key.name in [other.name for other in known]:
        raise ConfigError(f"the key file {path} has a key {key.name} already; choose another --name")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            is_open_line = bool(end) and os.pread(descriptor, 1, end - 1) != b"\n"
            file.write(b"\n" * is_open_line + line_of(key))
    except OSError as error:
        raise ConfigError(f"cannot write the key file {path} ({error.strerror})") from None


def line_of(key: Key) -> bytes:
    """A key as its line in the file."""
    return msgspec.json.encode(key) + b"\n"
