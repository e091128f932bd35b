"""Typed reads of a config mapping. Knows no key by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tabstop.errors import UnsupportedModelError
from tabstop.models.gguf_header import shown


@dataclass(frozen=True, slots=True)
class ConfigValues:
    """Typed reads of a config mapping; every refusal names the file, the key, the value and what is known."""

    values: Mapping[str, Any]
    origin: str  # for messages
    spelling: Mapping[str, str] = field(default_factory=dict)  # key → what the file calls it, where that differs

    def refuse(self, key: str, known: str) -> UnsupportedModelError:
        value = f"is {shown(self.values[key])}" if key in self.values else "is missing"
        return UnsupportedModelError(f"{self.origin}: {self.spelling.get(key, key)} {value}; known: {known}")

    def integer(self, key: str, default: int | None = None, maximum: int = 1 << 31) -> int:
        """A positive whole number; a missing or null key takes the default."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.refuse(key, f"a whole number from 1 to {maximum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; a missing or null key takes the default."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refuse(key, "a number over 0")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers over 0."""
        value = self.values.get(key)
        found = [each for each in value if isinstance(each, int | float)] if isinstance(value, list) else []
        if len(found) != count or not all(0 < number < float("inf") for number in found):
            raise self.refuse(key, f"{count} numbers over 0")
        return tuple(map(float, found))

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, "true, false")
        return value

    def require(self, key: str, *known: Any) -> None:
        """Refuses any other value than `known`; a missing key counts as None."""
        if self.values.get(key) not in known:
            raise self.refuse(key, ", ".join(repr(value) for value in known if value is not None))
