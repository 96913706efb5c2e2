"""YAML as people read it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from grath_utils.errors import ConfigError, DataError
from grath_utils.files.reading import read_text


def read_yaml(path: Path) -> Any:
    """Read a YAML file; ConfigError if it cannot be read, or see :func:`parse_yaml`."""
    try:
        return parse_yaml(read_text(path), str(path))
    except DataError as error:
        raise ConfigError(str(error)) from error


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of YAML text that stands at ``where``.

    Raises:
        ConfigError: it is not YAML, gives a key twice, or has endless brackets.
    """
    try:
        return yaml.load(text, Loader=_Yaml)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", "no text")
        if not isinstance(error, yaml.constructor.ConstructorError):
            reason = f"not valid YAML ({reason})"
        raise ConfigError(f"{where}{line}: {reason}") from error
    # What PyYAML lets through: endless brackets or digits, and values that do not fit their !!tag.
    except (RecursionError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"{where}: not valid YAML ({str(error).partition(';')[0]})") from error


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's core schema: 010 is ten, 5e-4 a number, ``no`` and ``1:30`` are texts.

    Its hexadecimal and octal numbers are texts, too: no setting and no prompt has one.

    A key that is given twice is an error: by itself, the later value would replace the earlier one.
    """

    # PyYAML's own rules of YAML 1.1, by the first character.
    yaml_implicit_resolvers: ClassVar = {
        first: [rule for rule in rules if rule[0].rpartition(":")[2] in ("null", "merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            is_word = isinstance(key, yaml.ScalarNode)
            if not is_word or key.value in seen:
                problem = f'"{key.value}" is given twice' if is_word else "a key must be one word"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_NUMBER = (
    r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_BOOL = r"(true|True|TRUE|false|False|FALSE)$"
_FIRST = list("-+.0123456789")
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(_BOOL), list("tTfF"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), _FIRST)
_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_NUMBER), _FIRST)
_Yaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
