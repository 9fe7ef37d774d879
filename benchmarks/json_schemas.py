"""JSON schemas by the number: nested, with references, enums, formats, unions, bounds and Unicode; the same seed, the same schema."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

FORMATS = ("date", "time", "date-time", "duration", "email", "uuid", "ipv4", "ipv6", "hostname")
PATTERNS = (
    "^[a-z]{2,5}$",
    r"^\d{3}-\d{4}$",
    "^(foo|bar)+$",
    "^[A-ZÄÖÜ][a-zäöüß]{1,8}$",
    "^#[0-9a-f]{6}$",
    r"^[^\s@]{1,4}@\w{1,4}$",
)
NAMES = (
    "name",
    "größe",
    "価格",
    "a b",
    'quo"te',
    "back\\slash",
    "x",
    "items",
    "id",
    "Ünïcode",
    "new\nline",
    "😀",
    "$ref",
    "a/b~c",
)
WORDS = ("red", "green", "日本語", "naïve", "", " ", 'say "hi"', "tab\there", "😀😀", "\\", "true", "12", "a" * 40)
_UNMADE: Schema = {}  # stands for a definition that is being made; nothing below it refers to it


class Schemas:
    """Draws schemas. max_depth: of nesting."""

    def __init__(self, seed: int, max_depth: int = 4):
        self._random = random.Random(seed)
        self._max_depth = max_depth
        self._defs: dict[str, Schema] = {}

    def draw(self) -> Schema:
        """A schema with its definitions."""
        self._defs = {}
        schema = self._any(0)
        if self._defs:
            schema = {**schema, "$defs": self._defs}
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def _any(self, depth: int) -> Schema:
        leaves: list[Callable[[int], Schema]] = [self._string, self._number, self._integer, self._enum, self._simple]
        branches: list[Callable[[int], Schema]] = [
            self._object,
            self._object,
            self._array,
            self._union,
            self._reference,
        ]
        chosen = leaves if depth >= self._max_depth or (depth and self._random.random() < 0.4) else branches
        return self._random.choice(chosen)(depth)

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(NAMES, self._random.randrange(5))
        schema: Schema = {"type": "object", "properties": {name: self._any(depth + 1) for name in names}}
        schema["required"] = [name for name in names if self._random.random() < 0.7]
        more = self._random.random()
        if more < 0.9:
            schema["additionalProperties"] = False
        elif more < 0.95:
            schema["additionalProperties"] = {"type": "integer", "minimum": 0, "maximum": 9}
        return schema

    def _array(self, depth: int) -> Schema:
        least = self._random.randrange(3)
        schema: Schema = {"type": "array", "minItems": least, "maxItems": least + self._random.randrange(3)}
        schema["items"] = self._any(depth + 1)
        if self._random.random() < 0.2:
            schema["prefixItems"] = [self._any(depth + 1) for _ in range(self._random.randrange(1, 3))]
        return schema

    def _union(self, depth: int) -> Schema:
        if self._random.random() < 0.3:
            return {"oneOf": [{"type": "null"}, self._string(depth), self._integer(depth)]}
        return {"anyOf": [self._any(depth + 1) for _ in range(self._random.randrange(2, 4))]}

    def _reference(self, depth: int) -> Schema:
        """To a definition that was made before, to a new one, or to a list that refers to itself."""
        whole = [name for name, schema in self._defs.items() if schema is not _UNMADE]
        if whole and self._random.random() < 0.4:
            return {"$ref": f"#/$defs/{self._random.choice(whole)}"}
        name = f"def{len(self._defs)}"
        self._defs[name] = _UNMADE
        if self._random.random() < 0.3:
            rest = {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]}
            self._defs[name] = {
                "type": "object",
                "properties": {"value": self._simple(depth), "next": rest},
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        else:
            self._defs[name] = self._any(depth + 1)
        return {"$ref": f"#/$defs/{name}"}

    def _string(self, depth: int) -> Schema:
        kind = self._random.randrange(5)
        if kind == 0:
            return {"type": "string", "format": self._random.choice(FORMATS)}
        if kind == 1:
            return {"type": "string", "pattern": self._random.choice(PATTERNS)}
        if kind == 2:
            return {"type": "string"}
        least = self._random.randrange(4)
        return {"type": "string", "minLength": least, "maxLength": least + self._random.randrange(8)}

    def _integer(self, depth: int) -> Schema:
        low = self._random.randrange(-1000, 1000)
        high = low + self._random.randrange(1, 5000)
        bounds = self._random.choice(
            [
                {},
                {"minimum": low},
                {"minimum": low, "maximum": high},
                {"exclusiveMinimum": low, "exclusiveMaximum": high + 1},
            ]
        )
        return {"type": "integer", **bounds}

    def _number(self, depth: int) -> Schema:
        low = self._random.randrange(-100, 100) / 4
        return {"type": "number", **self._random.choice([{}, {"minimum": low, "maximum": low + 12.5}])}

    def _enum(self, depth: int) -> Schema:
        values: list[Any] = [*self._random.sample(WORDS, self._random.randrange(1, 6)), 3, -1.5, None, True]
        if self._random.random() < 0.3:
            return {"const": self._random.choice([*values, {"a": [1, "b"]}, ["x", None]])}
        return {"enum": self._random.sample(values, self._random.randrange(1, len(values)))}

    def _simple(self, depth: int) -> Schema:
        return {"type": self._random.choice(["boolean", "null", ["boolean", "null"], ["integer", "null"]])}
