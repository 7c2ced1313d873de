"""A RunSpec as commented TOML, for `spec_file`. The comments are the lines under each key in `spec.py`."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pydantic import BaseModel

from shoal.training.spec import RunSpec

SECTIONS: dict[str, type[BaseModel]] = {
    name: type(section) for name, section in RunSpec() if isinstance(section, BaseModel)
}

_COLUMNS = 100
_HEAD = """\
# A Shoal run. Every key is here; one that you delete takes its default. `shoal plan FILE` shows what follows
# from it: stages, memory, bytes on the network. Once a run has started its spec is fixed: the hash of these
# values names the run, and any change begins a new one.
"""


def render(spec: RunSpec) -> str:
    """TOML text that loads as the same spec: every key with what it does and what it may be."""
    blocks = [_HEAD]
    for name, kind in SECTIONS.items():
        blocks.append(f"\n\n{_comment(kind.__doc__ or '')}[{name}]\n")
        section = getattr(spec, name)
        for key, field in kind.model_fields.items():
            bounds = f"# May be: {allowed(name, key)}. Default: {_toml(field.default)}.\n"
            setting = f"{key} = {_toml(getattr(section, key))}\n"
            blocks.append(f"\n{_comment(field.description or '')}{bounds}{setting}")
    return "".join(blocks)


def allowed(section: str, key: str) -> str:
    """What a key may be, in words, such as `an integer from 1 to 512`."""
    schema = SECTIONS[section].model_json_schema()["properties"][key]
    if schema.get("type") == "array":
        return f"a list; each {_kind(schema['items'])}"
    return _kind(schema)


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(_toml(choice) for choice in schema["enum"])
    match schema["type"]:
        case "boolean":
            return "true or false"
        case "string":
            return "text" + _length(schema)
        case number:
            return ("an integer" if number == "integer" else "a number") + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    words = []
    if low is not None:
        words.append(f"from {_number(low)}")
    if above is not None:
        words.append(f"above {_number(above)}")
    if high is not None and high < 2**53:  # larger ones only keep numbers exact on the wire
        words.append(f"to {_number(high)}")
    if below is not None and below < 2**53:
        words.append(f"{'and ' if words else ''}below {_number(below)}")
    if len(words) == 1 and words[0].startswith("from"):
        return f" of at least {words[0][5:]}"
    return " " + " ".join(words) if words else ""


def _length(schema: dict[str, Any]) -> str:
    words = ""
    if "maxLength" in schema:
        words += f" of {schema.get('minLength', 0)} to {schema['maxLength']} characters"
    if "pattern" in schema:
        words += f" like {schema['pattern']}"
    return words


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _comment(text: str) -> str:
    lines = textwrap.wrap(" ".join(text.split()), _COLUMNS - 2, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def _toml(value: object) -> str:
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        return f"{value:_}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
