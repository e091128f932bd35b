"""GPT-2's printable spelling of bytes, in which byte-level vocabularies are written."""

from __future__ import annotations


def _symbols() -> dict[str, int]:
    """Bytes that Latin-1 prints stand for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTES = _symbols()
"""Symbol → byte."""

SYMBOLS = {byte: symbol for symbol, byte in BYTES.items()}
"""Byte → symbol."""


def spelled(data: bytes) -> str:
    """The bytes as a token of a byte-level vocabulary."""
    return "".join(map(SYMBOLS.__getitem__, data))
