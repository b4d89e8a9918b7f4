"""Configuration that cannot be misspelt.

Configurations are frozen stdlib dataclasses that derive from `Strict`; YAML becomes one of them here. An unknown
key, a wrong type or a value out of range is answered with the file, the key, what was found and what to do.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Hashable
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from medsegdiff.errors import UserError

T = TypeVar("T")

MAX_CONFIG_BYTES = 1_000_000  # A configuration is a page of text; anything larger is the wrong file.


class Strict:
    """Base of every configuration dataclass: unknown keys are refused when it is read from a file or the wire."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


def load_yaml(path: Path) -> Any:
    """Read one YAML file as plain data.

    Raises:
        UserError: the file is missing, too large, not text, or not YAML (with the line).
    """
    # Imported here, as pydantic below: training from a cache on a bare GPU machine reads no YAML.
    import yaml

    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(
                f"{path}: {path.stat().st_size:,} bytes are no configuration file (limit {MAX_CONFIG_BYTES:,})."
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file. Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as a YAML text file ({error}). Check that it is the right file."
        ) from error
    try:
        return yaml.load(text, Loader=_unique_key_loader())  # a SafeLoader: builds plain data only
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: is not valid YAML: {error}. Mend that line.") from error


def _unique_key_loader() -> type:
    """`yaml.safe_load` keeps the last of two equal keys silently; this loader refuses them."""
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    continue  # refused below, with its line
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} stands twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

    return UniqueKeyLoader


def read_config(path: Path, kind: type[T]) -> T:
    """Read a YAML file as the configuration `kind`. Raises UserError with file and key."""
    return parse_config(load_yaml(path), kind, source=str(path))


def parse_config(data: Any, kind: type[T], source: str) -> T:
    """Validate plain data as the configuration `kind`; `source` names it in the error.

    Raises:
        UserError: names `source`, the dotted key, what was found, and a near-miss if there is one.
    """
    # Imported here: reading a configuration needs pydantic, training from a cache on a bare GPU machine does not.
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(data, dict):
        raise UserError(
            f"{source}: expected a mapping of keys to values, found {_kind_of(data)}. See docs/configuration.md."
        )
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # A misspelt key shows up twice, as unknown and as missing: the unknown one tells what to mend.
        faults.sort(key=lambda fault: fault["type"] not in _UNKNOWN_KEY)
        text = _explain(faults[0], kind)  # type: ignore[arg-type]
        if faults[0]["type"] in _UNKNOWN_KEY:
            faults = [fault for fault in faults if fault["type"] not in ("missing", "missing_argument")]
        more = f" ({len(faults) - 1} more after this one)" if len(faults) > 1 else ""
        raise UserError(f"{source}: {text}{more}") from None


def _explain(fault: dict[str, Any], kind: type) -> str:
    """Turn one pydantic fault into a line for a person."""
    location = [part for part in fault["loc"] if not (isinstance(part, str) and part in _TAGS)]
    key = ".".join(str(part) for part in location)
    value = fault.get("input")
    if fault["type"] in _UNKNOWN_KEY:
        known = _fields_at(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}."
        return f"{key}: unknown key; {hint}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{key}: this key is required and is not there. Add it."
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(value, (dict, list, tuple)) or fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key or 'the whole file'}: {message}; found {value!r}."


_UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")
_TAGS = {"dataclass", "list", "tuple", "dict", "str", "int", "float", "bool", "function-after", "none"}


def _fields_at(kind: Any, location: list[Any]) -> list[str]:
    """Field names of the dataclass found under `location` inside `kind`."""
    for part in location:
        kind = _unwrap(kind)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            kind = get_type_hints(kind).get(str(part), object)
        else:
            inner = get_args(kind)
            kind = inner[-1] if inner and inner[-1] is not Ellipsis else (inner[0] if inner else object)
    kind = _unwrap(kind)
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _unwrap(kind: Any) -> Any:
    """The dataclass inside `X | None`, else the type itself."""
    if get_origin(kind) not in (Union, UnionType):  # a tuple or dict of dataclasses has a level of its own
        return kind
    return next((option for option in get_args(kind) if dataclasses.is_dataclass(option)), kind)


def _kind_of(data: Any) -> str:
    return "nothing" if data is None else f"a {type(data).__name__}"


def plain(config: Any) -> Any:
    """A configuration as plain data (dicts, lists, scalars), ready for YAML or JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data, equal text. For hashes, not to be read back; NaN is refused."""
    return json.dumps(plain(data), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def compact_json(data: Any) -> str:
    """JSON without spaces, keys in the order of declaration. NaN is refused.

    For what is read back: the order of labels and targets is the order of indices and channels.
    """
    return json.dumps(plain(data), separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def dump_yaml(data: Any) -> str:
    """Plain data or a configuration as YAML text, keys in the order of declaration."""
    import yaml

    return yaml.safe_dump(plain(data), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
