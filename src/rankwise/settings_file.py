"""The YAML file of ``--config``, read within limits: plain values, mappings and lists.

Anchors are refused: a few bytes of them stand for gigabytes. A date is text, as every option that could hold one is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from rankwise.errors import ConfigError

LARGEST_BYTES = 1 << 18
DEEPEST = 16
PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


class _PlainLoader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", mark)
        if self.depth >= DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} levels deep", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            [(twice, _)] = Counter(keys).most_common(1)
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_TAG = "tag:yaml.org,2002:"
_PlainLoader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in PLAIN
}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.removeprefix(_TAG) in PLAIN]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_settings_file(file: Path) -> dict[str, Any]:
    """``{key: value}``, the keys with underscores. Raises ConfigError (RW102) for a file that cannot be read."""
    try:
        with open(file, "rb") as stream:
            text = stream.read(LARGEST_BYTES + 1)
        if len(text) > LARGEST_BYTES:
            raise ConfigError("RW102", f"the settings file {file} is larger than {LARGEST_BYTES:,} bytes; shorten it.")
        content = yaml.load(text.decode("utf-8-sig"), _PlainLoader)
    except FileNotFoundError:
        raise ConfigError("RW102", f"there is no settings file {file}; check the path of --config.") from None
    except UnicodeDecodeError:
        raise ConfigError("RW102", f"the settings file {file} is not UTF-8; save it as such.") from None
    except OSError as error:
        reason = (error.strerror or "no reason given").lower()
        raise ConfigError("RW102", f"cannot read the settings file {file}: {reason}; give a file.") from None
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        # An explicit tag on what it does not fit (`!!int ""`) comes as any of these.
        raise ConfigError("RW102", f"the settings file {file} is no YAML{_where(error)}; mend it there.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError("RW102", f"the settings file {file} holds a {kind}; write one `option: value` a line.")
    given = {str(key).replace("-", "_"): value for key, value in content.items()}
    if len(given) < len(content):
        raise ConfigError("RW102", f"the settings file {file} gives an option twice, with `-` and with `_`; give one.")
    return given


def _where(error: Any) -> str:
    """``: mapping values are not allowed here, line 2, column 4``; of YAML's two marks the one where it gave up."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if problem is None and not isinstance(error, yaml.YAMLError):
        problem = f"a value does not fit its tag ({type(error).__name__})"
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f": {problem}{place}" if problem else place
