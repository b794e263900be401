"""Files damaged at random by their structure: JSON, its lines, safetensors, YAML; and a limit of time to read them."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import struct
from collections.abc import Iterator
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**20, -(10**30), 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "x", "\0", "\ud800", "../../x", "/dev/zero", "x" * 100_000, "(" * 50, "é", "1", "[", "float32", "auto"),
    *([], {}, [None], [-1, 5], ["x"], {"x": None}, {"": ""}, [[]], ["\0"], {"$tensor": "9"}, {"a": {"b": []}}),
)
ODD_YAML = (
    *("!!int ''", "&a [*a]", "2024-01-01", "[" * 300, "{" * 30, "!!binary x", "1e999", ".nan", "9" * 30, "-1", "~"),
    *("[a, [b]]", "{a: 1}", '"\\0"', '"\\uD800"', "!!python/name:os.system", "'x", "? y", "on", "0x7fffffffffffffff"),
    "0x" + "f" * 5000,
)
LONG_YAML = (
    str([f"x{index}" for index in range(3000)]),
    "{" + ", ".join(f"k{index}: 1" for index in range(3000)) + "}",
    "x" * 100_000,
    "=1,".join(map(str, range(3000))),
)


class TooSlowError(BaseException):
    """No Exception: nothing may catch it."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def nested(depth: int, opening: str = "[") -> str:
    return opening * depth + ("]" * depth if opening == "[" else "1" + "}" * depth)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in list(items)[:200] for place in places(value, (*path, key)))]


def with_odd_value(draw: random.Random, text: str) -> str:
    content = json.loads(text)
    place = draw.choice(places(content)[1:] or [()])
    value = draw.choice(ODD_VALUES)
    if not place:
        return json.dumps(value)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    kind = draw.random()
    if kind < 0.1 and isinstance(parent, dict):
        del parent[place[-1]]
    elif kind < 0.2:
        # What is there as text, as a list, or negative.
        old = parent[place[-1]]
        parent[place[-1]] = draw.choice([str(old), [old], {"x": old}, -old if isinstance(old, int | float) else [old]])
    else:
        parent[place[-1]] = value
    return json.dumps(content)


def with_deep_nesting(draw: random.Random, text: str) -> str:
    deep = nested(draw.choice([70, 500, 3000, 100_000]), draw.choice(["[", '{"a":']))
    content = json.loads(text)
    if isinstance(content, dict) and content and draw.random() < 0.8:
        content[draw.choice(list(content))] = "PLACE"
        return json.dumps(content).replace('"PLACE"', deep)
    return deep


def with_many_parts(draw: random.Random, text: str) -> str:
    """A value becomes some thousand values: readers may not take long over what is only long."""
    content = json.loads(text)
    paths = places(content)[1:]
    if not paths or len(text) > 50_000:
        return json.dumps([content, content])
    *above, last = draw.choice(paths)
    parent = content
    for key in above:
        parent = parent[key]
    old = parent[last]
    count = min(draw.choice([300, 5000]), 200_000 // len(json.dumps(old)))
    names = [f"{draw.choice(['x', 'k.', '(a', 'layers.0.', '[b]*'])}{index}" for index in range(count)]
    kind = draw.random()
    if kind < 0.2 and isinstance(parent, dict):
        parent |= dict.fromkeys(names, old)
    else:
        parent[last] = draw.choice([names, dict.fromkeys(names, old), [old] * len(names), list(range(len(names)))])
    return json.dumps(content)


def with_a_huge_number(draw: random.Random, text: str) -> str:
    content = json.loads(text)
    if isinstance(content, dict) and content:
        content[draw.choice(list(content))] = "PLACE"
    number = draw.choice(["1e999", "-1e999", "9" * 400, "9" * 5000, "NaN", "-Infinity", "1" * 41, "1e-999"])
    return json.dumps(content).replace('"PLACE"', number)


def cut(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def with_another_byte(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 3])):
        changed[draw.randrange(min(len(changed), 4000))] = draw.choice([0, 0xFF, 0x80, 0x22, 0x7B, draw.randrange(256)])
    return bytes(changed)


def damaged_json(draw: random.Random, content: bytes) -> bytes:
    by_text = [with_odd_value] * 12 + [with_deep_nesting, with_a_huge_number] * 2 + [with_many_parts]
    how = draw.choice([*by_text, *[cut, with_another_byte] * 2])
    if how in (cut, with_another_byte):
        return how(draw, content)
    return how(draw, content.decode()).encode()


def damaged_lines(draw: random.Random, content: bytes) -> bytes:
    lines = content.splitlines()
    index = draw.randrange(len(lines))
    lines[index] = damaged_json(draw, lines[index])
    return b"\n".join(lines) + b"\n"


def damaged_safetensors(draw: random.Random, content: bytes) -> bytes:
    (size,) = struct.unpack_from("<Q", content)
    header = damaged_json(draw, content[8 : 8 + size])
    if draw.random() < 0.1:
        size = draw.choice([0, 2**63, len(header) + 5])
        return struct.pack("<Q", size) + header + content[8 + size :]
    return struct.pack("<Q", len(header)) + header + content[8 + struct.unpack_from("<Q", content)[0] :]


def damaged_values(draw: random.Random, content: bytes) -> bytes:
    """A sound header over other bytes."""
    changed = bytearray(content)
    for _ in range(20):
        changed[-1 - draw.randrange(min(len(changed) - 8, 2000))] = draw.choice([0xFF, 0x7F, 0x80, draw.randrange(256)])
    return bytes(changed)


def damaged_yaml(draw: random.Random, content: bytes) -> bytes:
    lines = content.decode().splitlines()
    kind = draw.random()
    if kind < 0.8:
        index = draw.randrange(len(lines))
        value = draw.choice(LONG_YAML if kind < 0.01 else ODD_YAML)
        lines[index] = lines[index].partition(":")[0] + ": " + value
        return "\n".join(lines).encode()
    return (cut if kind < 0.9 else with_another_byte)(draw, content)
