"""What a JSON schema says of types, and values made to fit: "5" becomes 5 where an integer is expected.

Models that write arguments as bare text, or that quote numbers, mean the schema's types. Only types are looked at: a
value that cannot be made to fit stays what it is, and whether it is valid is the client's question.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MAX_NODES = 256
"""Parts of a schema that are looked at for one value."""

WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
"""JSON's, and Python's, which models fall into."""


class Expected:
    """The values that one place may have, by the schemas that speak of it."""

    __slots__ = ("_nodes", "_root", "types")

    def __init__(self, nodes: tuple[Any, ...] = (), root: Mapping[str, Any] | None = None) -> None:
        """`nodes`: schemas, any of which may hold. `root`: where their references point into."""
        self._nodes = nodes
        self._root = root or {}
        types = [self._types_of(node) for node in nodes]
        self.types: frozenset[str] = frozenset() if not all(types) else frozenset().union(*types)
        """JSON schema's names of them; empty: any."""

    def allows(self, kind: str) -> bool:
        return not self.types or kind in self.types or (kind == "integer" and "number" in self.types)

    def property(self, key: str) -> Expected:
        """Of an object's value."""
        nodes = [node for top in self._nodes for node in self._parts(top)]
        found = [node["properties"][key] for node in nodes if key in _mapping(node.get("properties"))]
        more = [node["additionalProperties"] for node in nodes if isinstance(node.get("additionalProperties"), Mapping)]
        return Expected(tuple(found or more), self._root)

    def item(self) -> Expected:
        """Of an array's value."""
        nodes = [node for top in self._nodes for node in self._parts(top)]
        return Expected(tuple(node["items"] for node in nodes if isinstance(node.get("items"), Mapping)), self._root)

    def coerced(self, value: Any) -> Any:
        """The value in the type that is expected, and those inside it; what does not fit stays."""
        try:
            return self._coerced(value)
        except RecursionError:
            return value

    def _coerced(self, value: Any) -> Any:
        if not self.allows(kind_of(value)):
            value = self._converted(value)
        if isinstance(value, dict):
            return {key: self.property(key)._coerced(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.item()._coerced(inner) for inner in value]
        return value

    def _converted(self, value: Any) -> Any:
        if isinstance(value, float) and value.is_integer() and "integer" in self.types:
            return int(value)
        if isinstance(value, str):
            found = _read(value.strip())
            if isinstance(found, float) and found.is_integer() and not self.allows("number"):
                found = int(found) if "integer" in self.types else found
            return found if not isinstance(found, str) and self.allows(kind_of(found)) else value
        if "string" in self.types and value is not None:
            return dump(value)
        return value

    def _types_of(self, node: Any) -> frozenset[str]:
        """Empty: any. What a node says itself comes before what its parts say."""
        waiting, seen, found = [node], set[int](), set[str]()
        while waiting and len(seen) < MAX_NODES:
            part = waiting.pop()
            if not isinstance(part, Mapping):
                return frozenset()
            if id(part) in seen:
                continue
            seen.add(id(part))
            if own := _own_types(part):
                found |= own
                continue
            inner = self._referred(part) + _branches(part, ("anyOf", "oneOf"))
            inner = inner or [branch for branch in _branches(part, ("allOf",)) if _says_types(branch)]
            if not inner:
                return frozenset()
            waiting += inner
        return frozenset() if waiting else frozenset(found)

    def _parts(self, node: Any) -> Iterator[Mapping[str, Any]]:
        """The node, what it refers to, and what these are made of. References may go round in circles."""
        waiting, seen = [node], set[int]()
        while waiting and len(seen) < MAX_NODES:
            part = waiting.pop(0)
            if not isinstance(part, Mapping) or id(part) in seen:
                continue
            seen.add(id(part))
            yield part
            waiting += self._referred(part) + _branches(part, ("anyOf", "oneOf", "allOf"))

    def _referred(self, node: Mapping[str, Any]) -> list[Any]:
        """What `#/$defs/name` points to; None for what is not in this schema."""
        reference = node.get("$ref")
        if not isinstance(reference, str):
            return []
        place: Any = self._root if reference.startswith("#") else None
        for name in reference[1:].split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            place = place.get(name) if isinstance(place, Mapping) else None
        return [place]


def expected_of(schema: Mapping[str, Any] | None) -> Expected:
    """Of a whole schema."""
    return ANYTHING if schema is None else Expected((schema,), schema)


def kind_of(value: Any) -> str:
    """JSON schema's name of a value's type."""
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


def dump(value: Any) -> str:
    """JSON as answers have it. Raises ValueError for what JSON does not have."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or _is_unicode(text) else json.dumps(value, allow_nan=False)


def _is_unicode(text: str) -> bool:
    """Half a surrogate pair is none; escaped it can be sent."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _read(text: str) -> Any:
    """The value that a text spells; the text if it spells none."""
    if text in WORDS:
        return WORDS[text]
    try:
        value = json.loads(text, strict=False)
        dump(value)
        return value
    except (ValueError, RecursionError):
        return text


def _own_types(node: Mapping[str, Any]) -> frozenset[str]:
    named = node.get("type")
    if isinstance(named, str):
        return frozenset((named,))
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str))
    values = node.get("enum") if isinstance(node.get("enum"), list) else [node["const"]] if "const" in node else None
    if values:
        return frozenset(map(kind_of, values))
    shapes = {"properties": "object", "items": "array"}
    return frozenset(kind for key, kind in shapes.items() if isinstance(node.get(key), Mapping))


def _says_types(node: Any) -> bool:
    return isinstance(node, Mapping) and bool(_own_types(node) or "$ref" in node or _branches(node, ("anyOf", "oneOf")))


def _branches(node: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    return [branch for name in names if isinstance(node.get(name), list) for branch in node[name]]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


ANYTHING = Expected()
OBJECT = Expected(({"type": "object"},))
