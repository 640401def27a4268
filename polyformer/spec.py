"""A model is data: immutable typed records, read and written as JSON and TOML, compared by value.

`Record` is plain data (a rule, a size, a recipe's section). `Spec` is a record that builds a module. A subclass
only writes down its fields; construction, checking, reading, writing and JSON Schema follow from the annotations:

    class Linear(Spec):
        inputs: int
        outputs: int
        bias: bool = True

The conventions of the file format:

- a field that equals its default is left out; an optional field's default is therefore always `None`;
- `"type"` stands in a table only where the field's annotation leaves it open;
- in a tuple of records, equal neighbours (or a repeating pattern of them) are written once, as
  `{"repeat": 6, "of": [...]}`, so that a deep model is a short file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform

from polyformer.errors import SpecError, suggest

if TYPE_CHECKING:
    import torch

    from polyformer.parts.contract import Clause, Term
    from polyformer.parts.part import Part

R = TypeVar("R", bound="Record")
Change = Callable[[str, "Record"], "Record"]


@dataclass_transform(frozen_default=True)
class Record:
    """Immutable typed data. Subclasses are frozen dataclasses; their values are checked when made.

    Raises:
        SpecError: a value of the wrong kind, or one that `check` refuses.
    """

    registry: ClassVar[dict[str, type[Record]]] = {}
    abstract: ClassVar[bool] = True
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, abstract: bool = False, **options: Any) -> None:
        """Register a type of record; `abstract` ones only stand above others, and no file can hold them."""
        super().__init_subclass__(**options)
        cls.abstract = abstract
        dataclasses.dataclass(frozen=True)(cls)
        known = Record.registry.get(cls.__name__)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two record types are named {cls.__name__}: {known.__module__} and {cls.__module__}")
        Record.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name, kind in field_types(type(self)).items():
            value = _coerce(getattr(self, name), kind, f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raise `SpecError` when values that are each of the right kind don't fit together."""

    def require(self, condition: bool, message: str) -> None:
        """Raise `SpecError` with `message` unless `condition` holds; for use in `check`."""
        if not condition:
            raise SpecError(f"{type(self).__name__}: {message}")

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        unknown = set(changes) - set(field_types(type(self)))
        if unknown:
            name = sorted(unknown)[0]
            raise SpecError(f"{type(self).__name__} has no field '{name}'{suggest(name, field_types(type(self)))}")
        return dataclasses.replace(self, **changes)

    def to_data(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and values; the fields that equal their defaults are left out."""
        data: dict[str, Any] = _encode(self, type(self))
        return data

    @classmethod
    def from_data(cls, data: Any, where: str = "") -> Self:
        """Read what `to_data` wrote.

        Args:
            data: dictionaries, lists and plain values.
            where: what to call the outermost table in error messages.
        Raises:
            SpecError: an unknown key or type (the nearest known one is named), a missing or wrong value.
        """
        return typing.cast(Self, _decode(data, cls, where or cls.__name__))

    def to_json(self) -> str:
        """Return indented JSON; it has a `"type"` at the top so that any reader knows what it holds."""
        return json.dumps({"type": type(self).__name__, **self.to_data()}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "") -> Self:
        """Read what `to_json` wrote; raises `SpecError` for text that is not JSON or not such a record."""
        try:
            data = json.loads(text, object_pairs_hook=_unrepeated)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{where or cls.__name__} is not JSON: {error}") from None
        return cls.from_data(data, where)

    def to_toml(self) -> str:
        """Return TOML, the form of recipes."""
        import tomli_w

        return tomli_w.dumps({"type": type(self).__name__, **self.to_data()})

    @classmethod
    def from_toml(cls, text: str, where: str = "") -> Self:
        """Read what `to_toml` wrote; raises `SpecError` for text that is not TOML or not such a record."""
        try:
            data = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise SpecError(f"{where or cls.__name__} is not TOML: {error}") from None
        return cls.from_data(data, where)


class Spec(Record, abstract=True):
    """A record that builds a module: the same tree of names, one `Part` for each `Spec`.

    Attributes:
        spared: by field, the clauses of the invariance contract that what stands there is never put to.
    """

    spared: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def breaks(self) -> Mapping[Clause, Term]:
        """Return the clauses of the invariance contract that this part itself doesn't hold, and why (`contract_of`)."""
        return {}

    def module(self) -> Part:
        """Make this spec's own part (its children are made by `Part`); every buildable spec overrides it."""
        raise SpecError(f"{type(self).__name__} describes data and can't be built")

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Part:
        """Build the module with freshly initialised weights.

        Args:
            device: where the tensors are made; `"meta"` makes shapes only, without memory.
            dtype: of the floating-point tensors; PyTorch's default if None.
        Raises:
            SpecError: a spec in the tree can't be built.
        """
        import torch

        with torch.device(device or torch.get_default_device()):
            part = self.module()
        return part if dtype is None else part.to(dtype)


# ---------------------------------------------------------------------------------------------------------------
# Trees


def walk(spec: Record, path: str = "") -> Iterator[tuple[str, Record]]:
    """Yield `(path, record)` for the record itself and all below it, parents first.

    The path of a `Spec` is also the path of its module: `"decoder.blocks.0.steps.1.op.q"`.
    """
    yield path, spec
    for name, value in children(spec):
        yield from walk(value, f"{path}.{name}" if path else name)


def children(spec: Record) -> Iterator[tuple[str, Record]]:
    """Yield the records directly below; an element of a tuple is named `"blocks.3"`."""
    for name in field_types(type(spec)):
        value = getattr(spec, name)
        if isinstance(value, Record):
            yield name, value
        elif isinstance(value, tuple):
            yield from ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Record))


def rewrite(spec: R, change: Change, path: str = "") -> R:
    """Copy the tree bottom-up, handing each record to `change(path, record)`, which returns it or another.

    Everything that changes a model is such a rewrite. What `change` leaves alone is not copied, and the result
    compares equal to the original when nothing was changed.
    """
    found: dict[str, Any] = {}
    for name in field_types(type(spec)):
        value = getattr(spec, name)
        inner = f"{path}.{name}" if path else name
        if isinstance(value, Record):
            found[name] = rewrite(value, change, inner)
        elif isinstance(value, tuple):
            items = (rewrite(v, change, f"{inner}.{i}") if isinstance(v, Record) else v for i, v in enumerate(value))
            found[name] = tuple(items)
        if name in found and _same(found[name], value):
            del found[name]
    return typing.cast(R, change(path, dataclasses.replace(spec, **found) if found else spec))


def _same(new: Any, old: Any) -> bool:
    if isinstance(old, tuple):
        return len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))
    return new is old


# ---------------------------------------------------------------------------------------------------------------
# Kinds of values


def field_types(cls: type[Record]) -> dict[str, Any]:
    """Return the annotation of each field, resolved, in order."""
    return _field_types(typing.cast(Any, cls))


@functools.cache
def _field_types(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for field in dataclasses.fields(cls):
        optional = type(None) in typing.get_args(kinds[field.name])
        if optional and field.default not in (None, dataclasses.MISSING):
            raise TypeError(f"{cls.__name__}.{field.name} is optional, so its default must be None")
    return kinds


def child_fields(cls: type[Spec]) -> dict[str, str]:
    """Return the fields that hold what a module is made of: `"one"` spec (or none), or `"many"` in a tuple."""
    found = {}
    for name, kind in field_types(cls).items():
        for option in _alternatives(kind):
            item = typing.get_args(option)[0] if typing.get_origin(option) is tuple else option
            if isinstance(item, type) and issubclass(item, Spec):
                found[name] = "many" if item is not option else "one"
    return found


def _alternatives(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _records(kind: Any) -> list[type[Record]]:
    return [option for option in _alternatives(kind) if isinstance(option, type) and issubclass(option, Record)]


def _name_of(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {_name_of(typing.get_args(kind)[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    if kind in names:
        return names[kind]
    return kind.__name__ if isinstance(kind, type) else " or ".join(_name_of(k) for k in _alternatives(kind))


def _coerce(value: Any, kind: Any, where: str) -> Any:
    """Return `value` as the annotation `kind` wants it, or raise; lists become tuples, whole numbers floats."""
    for option in _alternatives(kind):
        origin = typing.get_origin(option)
        if origin is typing.Literal:
            if any(value == allowed and type(value) is type(allowed) for allowed in typing.get_args(option)):
                return value
        elif origin is tuple:
            if isinstance(value, (tuple, list)):
                return _coerce_items(value, typing.get_args(option), where)
        elif option is float:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and abs(value) <= sys.float_info.max:
                return float(value)
        elif option is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        elif isinstance(value, option):
            return value
    wanted = " or ".join(_name_of(option) for option in _alternatives(kind) if option is not type(None))
    shown = type(value).__name__ if isinstance(value, (Record, dict, list, tuple)) else repr(value)
    shown = shown if len(shown) <= 80 else shown[:79] + "…"
    literal = typing.get_origin(kind) is typing.Literal and isinstance(value, str)
    near = suggest(value, typing.get_args(kind)) if literal else ""
    raise SpecError(f"{where} should be {wanted}, not {shown}{near if 'did you' in near else ''}")


def _coerce_items(value: typing.Sequence[Any], kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_coerce(item, kinds[0], f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(kinds):
        raise SpecError(f"{where} should have {len(kinds)} entries, not {len(value)}")
    return tuple(_coerce(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


# ---------------------------------------------------------------------------------------------------------------
# Writing


def _encode(value: Any, kind: Any) -> Any:
    if isinstance(value, Record):
        kinds = field_types(type(value))
        data: dict[str, Any] = {}
        if _records(kind) != [type(value)]:
            data["type"] = type(value).__name__
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if default is dataclasses.MISSING or item != default:
                data[field.name] = _encode(item, kinds[field.name])
        return data
    if isinstance(value, tuple):
        inner = next(typing.get_args(option) for option in _alternatives(kind) if typing.get_origin(option) is tuple)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return _encode_items(value, inner[0])
        return [_encode(item, one) for item, one in zip(value, inner, strict=True)]
    return value


def _encode_items(items: tuple[Any, ...], kind: Any) -> list[Any]:
    """Encode a tuple; records that repeat, singly or as a pattern, are written once with their count."""
    if not any(isinstance(item, Record) for item in items):
        return [_encode(item, kind) for item in items]
    written: list[Any] = []
    for start, period, count in repetitions(items):
        pattern = [_encode(item, kind) for item in items[start : start + period]]
        written += [{"repeat": count, "of": pattern}] if count > 1 else pattern
    return written


def repetitions(items: tuple[Any, ...]) -> Iterator[tuple[int, int, int]]:
    """Cut a sequence into patterns that repeat: yield (start, length of the pattern, how often it stands there).

    From left to right, the pattern that covers most is taken; an item that does not repeat is a pattern of one.
    """
    start = 0
    while start < len(items):
        best = (1, 1)
        for period in range(1, (len(items) - start) // 2 + 1):
            pattern, count = items[start : start + period], 1
            while items[start + count * period : start + (count + 1) * period] == pattern:
                count += 1
            if count > 1 and period * count > best[0] * best[1]:
                best = (period, count)
        yield start, *best
        start += best[0] * best[1]


# ---------------------------------------------------------------------------------------------------------------
# Reading


def _decode(data: Any, kind: Any, where: str) -> Any:
    if _records(kind) and isinstance(data, dict):
        return _decode_record(data, _records(kind), where)
    if isinstance(data, list):
        for option in _alternatives(kind):
            if typing.get_origin(option) is tuple:
                return _coerce(_decode_items(data, typing.get_args(option), where), kind, where)
    return _coerce(data, kind, where)


def _decode_items(data: list[Any], kinds: tuple[Any, ...], where: str) -> list[Any]:
    if len(kinds) != 2 or kinds[1] is not Ellipsis:
        pairs = enumerate(zip(data, kinds, strict=False))
        known = [_decode(item, inner, f"{where}[{i}]") for i, (item, inner) in pairs]
        return known + data[len(kinds) :]  # too long a list is refused, but only if all of it is seen
    items: list[Any] = []
    for i, item in enumerate(data):
        if isinstance(item, dict) and set(item) == {"repeat", "of"}:
            count = _coerce(item["repeat"], int, f"{where}[{i}].repeat")
            if not isinstance(item["of"], list) or not item["of"]:
                raise SpecError(f"{where}[{i}].of should be a list of what is repeated")
            pattern = [_decode(inner, kinds[0], f"{where}[{i}].of[{j}]") for j, inner in enumerate(item["of"])]
            if not 1 <= count * len(pattern) <= 100_000:
                raise SpecError(f"{where}[{i}].repeat should be between 1 and 100,000, not {count}")
            items += pattern * count
        else:
            items.append(_decode(item, kinds[0], f"{where}[{i}]"))
    return items


def _decode_record(data: dict[str, Any], bases: list[type[Record]], where: str) -> Record:
    wanted = " or ".join(base.__name__ for base in bases)
    name = data.get("type", wanted)
    if "type" not in data and (len(bases) > 1 or bases[0].abstract):
        raise SpecError(f"{where} lacks the key 'type', which says what {wanted} it is")
    cls = Record.registry.get(name) if isinstance(name, str) else None
    if cls is None or cls.abstract or not issubclass(cls, tuple(bases)):
        fitting = [n for n, known in Record.registry.items() if issubclass(known, tuple(bases)) and not known.abstract]
        raise SpecError(f"{where}: there is no {wanted} of type '{name}'{suggest(str(name), fitting)}")
    kinds = field_types(cls)
    for key in data:
        if key not in kinds and key != "type":
            raise SpecError(f"{where} has an unknown key '{key}'{suggest(key, kinds)}")
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in data:
            raise SpecError(f"{where} lacks the key '{field.name}' ({_name_of(kinds[field.name])})")
    values = {k: _decode(v, kinds[k], f"{where}.{k}") for k, v in data.items() if k != "type"}
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of JSON's pairs; plain `json` would drop all but the last of equal keys."""
    data = dict(pairs)
    if len(data) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise SpecError(f"a table has the key '{twice}' twice")
    return data


# ---------------------------------------------------------------------------------------------------------------
# JSON Schema


def json_schema(cls: type[Record]) -> dict[str, Any]:
    """Return a JSON Schema (draft 2020-12) of the files that `cls.from_json` accepts, for editors and other tools.

    A field whose annotation is open (`Spec`, `Rule`) accepts every type known when this is called.
    """
    definitions: dict[str, Any] = {}
    _define(cls, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": f"#/$defs/{cls.__name__}",
        "$defs": definitions,
    }


def _define(cls: type[Record], definitions: dict[str, Any]) -> None:
    if cls.__name__ in definitions:
        return
    definitions[cls.__name__] = {}
    kinds = field_types(cls)
    needed = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    properties = {name: _schema_of(kind, definitions) for name, kind in kinds.items()}
    own = {
        "type": "object",
        "description": (cls.__doc__ or cls.__name__).split("\n")[0],
        "properties": {"type": {"const": cls.__name__}, **properties},
        "required": needed,
        "additionalProperties": False,
    }
    kin = [known for known in list(Record.registry.values()) if known is not cls and issubclass(known, cls)]
    below = [known for known in kin if not known.abstract]
    for known in below:
        _define(known, definitions)
    references = [{"allOf": [{"$ref": f"#/$defs/{known.__name__}"}, {"required": ["type"]}]} for known in below]
    fitting = references if cls.abstract else [own, *references]
    definitions[cls.__name__] = own if fitting == [own] else {"anyOf": fitting}


def _schema_of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    plain = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    options = _alternatives(kind)
    if len(options) > 1:
        return {"anyOf": [_schema_of(option, definitions) for option in options]}
    if typing.get_origin(kind) is typing.Literal:
        return {"enum": list(typing.get_args(kind))}
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            item = _schema_of(kinds[0], definitions)
            pattern = {"type": "array", "items": item, "minItems": 1}
            repeat = {
                "type": "object",
                "properties": {"repeat": {"type": "integer", "minimum": 1}, "of": pattern},
                "required": ["repeat", "of"],
                "additionalProperties": False,
            }
            return {"type": "array", "items": {"anyOf": [item, repeat]} if any(map(_records, kinds)) else item}
        return {"type": "array", "prefixItems": [_schema_of(k, definitions) for k in kinds], "items": False}
    if isinstance(kind, type) and issubclass(kind, Record):
        _define(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    return {"type": plain[kind]}
