"""Reads `run.toml`, explains everything that is wrong in it at once, and checks a spec from the network.

    run.toml:12: inner.learning_rte is not a key; did you mean learning_rate?
    run.toml:31: model.layers = 0: must be an integer from 1 to 512

Called by the command line (`init`, `plan`, `up`, `demo`) and by a joiner, which gets the owner's spec as its
canonical bytes. Templates and their comments: `spec_text`, `templates`.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from shoal.protocol.errors import SpecError, StorageError, UsageError
from shoal.protocol.limits import SPEC_BYTES
from shoal.training.spec import RunSpec
from shoal.training.spec_text import SECTIONS, allowed, render
from shoal.training.templates import TEMPLATES

_PROBLEMS_SHOWN = 20
_VALUE_CHARACTERS = 60

KeyPath = tuple[str, ...]


def load(path: Path) -> RunSpec:
    """The spec in a TOML file. Raises SpecError with a line per problem; StorageError if unreadable."""
    try:
        with path.open("rb") as file:
            data = file.read(SPEC_BYTES + 1)
    except FileNotFoundError as error:
        raise SpecError(f"{path} does not exist; write one with: shoal init {path}") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > SPEC_BYTES:
        raise SpecError(f"{path} is larger than {SPEC_BYTES} bytes; a run.toml is a few thousand")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error
    return parse(text, path.name)


def parse(text: str, name: str) -> RunSpec:
    """The spec in TOML text; `name` stands for the file in messages. Raises SpecError."""
    text = text.replace("\r\n", "\n")
    try:
        values = tomllib.loads(text)
        # By way of JSON: pydantic's strict mode then takes an array for a tuple, but no text for a number.
        document = json.dumps(values, default=str)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(error))
        reason, line = (found[1], f":{found[2]}") if found else (str(error), f":{text.count(chr(10)) + 1}")
        raise SpecError(f"{name}{line}: not TOML: {reason}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise SpecError(f"{name}: not TOML that can be read: {error}") from error
    try:
        spec = RunSpec.model_validate_json(document, strict=True)
    except ValidationError as error:
        raise SpecError(_explain(error, values, _lines(text), name)) from error
    if len(spec.canonical()) > SPEC_BYTES:
        raise SpecError(f"{name}: the spec takes more than {SPEC_BYTES} bytes; use globs in data.paths")
    return spec


def from_canonical(data: bytes) -> RunSpec:
    """A spec from the network: at most SPEC_BYTES of exactly what `canonical` writes, else SpecError."""
    if len(data) > SPEC_BYTES:
        raise SpecError(f"the spec received has {len(data)} bytes, {SPEC_BYTES} are allowed")
    try:
        spec = RunSpec.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = ascii(f"{where[:100]}: {first['msg'][:200]}")  # a stranger's text: no terminal codes
        raise SpecError(
            f"the spec received is not valid: {reason}; is this version too old for it?"
        ) from None
    if spec.canonical() != data:
        raise SpecError("the spec received is not in its canonical form; its hash would not name the run")
    return spec


def write_template(template: str, path: Path) -> None:
    """A commented `run.toml`. Raises UsageError for an unknown template or an existing file, StorageError."""
    if template not in TEMPLATES:
        raise UsageError(f"there is no template {template!r}; there are: {', '.join(TEMPLATES)}")
    write(TEMPLATES[template], path)


def write(spec: RunSpec, path: Path) -> None:
    """A spec as a commented `run.toml`. Raises UsageError for an existing file, StorageError."""
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(render(spec))
    except FileExistsError as error:
        raise UsageError(f"{path} exists and is left as it is; name another file or remove it") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def _explain(error: ValidationError, values: dict[str, Any], lines: dict[KeyPath, int], name: str) -> str:
    found = []
    for detail in error.errors(include_url=False):
        keys = tuple(str(part) for part in detail["loc"] if isinstance(part, str))[:2]
        problem = _problem(keys, detail, values)
        line = lines.get(keys) if len(keys) == 2 else _first_named(problem, keys, lines)
        found.append((line or 1, f"{name}:{line or 1}: {problem}"))
    texts = list(dict.fromkeys(text for _, text in sorted(found)))
    if len(texts) > _PROBLEMS_SHOWN:
        texts[_PROBLEMS_SHOWN:] = [f"and {len(texts) - _PROBLEMS_SHOWN} more"]
    return "\n".join(texts)


def _problem(keys: KeyPath, detail: ErrorDetails, values: dict[str, Any]) -> str:
    key = _short(".".join(keys))
    if detail["type"] == "extra_forbidden":
        kind = "a section" if len(keys) == 1 and isinstance(detail["input"], dict) else "a key"
        return f"{key} is not {kind}{_suggestion(keys)}"
    if detail["type"] == "value_error":  # one of ours, which names keys and values itself
        return f"{keys[0]}: {detail['ctx']['error']}" if keys else str(detail["ctx"]["error"])
    if not keys:
        return _short(detail["msg"])
    if len(keys) < 2:
        return f"{key} must be a section: [{key}] on a line of its own, its keys below"
    value = values[keys[0]][keys[1]]
    finite = " and finite" if detail["type"] == "finite_number" else ""
    shown = _short(json.dumps(value, default=str, ensure_ascii=False))
    return f"{key} = {shown}: must be {allowed(*keys)}{finite}"


def _suggestion(keys: KeyPath) -> str:
    """The nearest key or section, or the section where such a key is at home."""
    *section, key = keys
    siblings = SECTIONS[section[0]].model_fields if section else SECTIONS
    if near := difflib.get_close_matches(key, siblings, n=1):
        return f"; did you mean {near[0]}?"
    homes = [name for name, kind in SECTIONS.items() if key in kind.model_fields]
    if homes:
        return f"; {key} belongs under {' or '.join(f'[{name}]' for name in homes)}"
    everywhere = {f"{name}.{field}": field for name, kind in SECTIONS.items() for field in kind.model_fields}
    if near := difflib.get_close_matches(key, everywhere.values(), n=1):
        home = next(full for full, field in everywhere.items() if field == near[0])
        return f"; did you mean {home}?"
    return f"; there are: {', '.join(siblings)}"


def _first_named(problem: str, keys: KeyPath, lines: dict[KeyPath, int]) -> int | None:
    """Where to look first: the key that a problem between several keys names first and the file holds."""
    words = re.findall(r"[a-z0-9_.]+", problem)
    paths = [tuple(word.split(".")) if "." in word else (*keys, word) for word in words]
    named = [lines[path] for path in paths if len(path) == 2 and path in lines]
    return named[0] if named else lines.get(keys)


def _lines(text: str) -> dict[KeyPath, int]:
    """On which line each key and section begins, in valid TOML.

    tomllib does not tell, so statements are parsed one by one, each under the last header: lines are taken
    in until they parse, which also does strings and arrays over several lines.
    """
    found: dict[KeyPath, int] = {}
    header, statement, start = "", "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            values = tomllib.loads(header + statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            header = statement
        for section, keys in values.items():
            found.setdefault((section,), start)
            for key in keys if isinstance(keys, dict) else ():
                found.setdefault((section, key), start)
        statement, start = "", number + 1
    return found


def _short(text: str) -> str:
    return text if len(text) <= _VALUE_CHARACTERS else text[: _VALUE_CHARACTERS - 1] + "…"
