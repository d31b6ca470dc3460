"""Versioned messages with strict decoding.

A message is a frozen dataclass whose fields say what they accept. On the wire it is a flat mapping
of ``str``, ``int``, ``bytes``, arrays and tuples of these, plus its schema name. Decoding checks
the schema, that no field is missing or extra, and every value; the first difference is raised as
the error that the caller chose, so that it names whoever sent the message.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Self

import numpy as np

from fedgestalt.errors import FedgestaltError, PeerError, ServerError

Check = Callable[[object], str]
"""Returns what is wrong with a value, or an empty string."""

Fault = Callable[[str], FedgestaltError]
"""Makes the error for a sentence about a message."""

_SCHEMA_KEY = "schema"
_WORD_LETTERS = set("abcdefghijklmnopqrstuvwxyz0123456789-")

MAXIMUM_SITES: Final = 64
"""Most sites that one message may speak of."""


def from_site(site: str) -> Fault:
    """Faults of a message that ``site`` sent."""
    return lambda what: PeerError(what, site=site, remedy="all sites must run the same version")


def from_server(what: str) -> FedgestaltError:
    """Fault of a message that the server sent."""
    return ServerError(what, where="server", remedy="server and sites must run the same version")


class Message:
    """Base of all messages; subclasses are frozen dataclasses built from the fields below."""

    schema: ClassVar[str]

    def to_fields(self) -> dict[str, Any]:
        """Return the message as a flat mapping."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {_SCHEMA_KEY: self.schema, **values}

    @classmethod
    def from_fields(cls, fields: object, fault: Fault) -> Self:
        """Check ``fields`` and return the message.

        Raises:
            FedgestaltError: made by ``fault`` from the first difference found.
        """
        if not isinstance(fields, Mapping):
            raise fault(f"expected {cls.schema}, got {type(fields).__name__}")
        said = fields.get(_SCHEMA_KEY)
        if not isinstance(said, str) or said != cls.schema:
            raise fault(f"expected {cls.schema}, got {_shown(said)}")
        expected = dataclasses.fields(cls)  # type: ignore[arg-type]
        names = {f.name for f in expected} | {_SCHEMA_KEY}
        if fields.keys() != names:
            differing = sorted(map(_shown, fields.keys() ^ names))
            raise fault(f"{cls.schema}: missing or unknown field {differing[0]}")
        for spec in expected:
            wrong = spec.metadata["check"](fields[spec.name])
            if wrong:
                raise fault(f"{cls.schema}: field {spec.name!r} {wrong}")
        values = {}
        for spec in expected:
            inner = spec.metadata.get("inner")
            value = fields[spec.name]
            values[spec.name] = inner(value, fault) if inner else _frozen(value)
        return cls(**values)


def size_of(value: object) -> int:
    """Bytes of a message's content, without the serialisation around it."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(size_of(key) + size_of(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    return 8


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: object) -> str:
    """A text for an error; of anything else only the type, for it may be endless."""
    return repr(value[:80]) if isinstance(value, str) else type(value).__name__


def _checked(check: Check) -> Any:
    return dataclasses.field(metadata={"check": check})


def _plain(value: object) -> object:
    if isinstance(value, Message):
        return value.to_fields()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, enum.Enum):  # FLARE lets no class of ours onto the line
        return value.value
    return value


def octets(least: int, most: int | None = None) -> Any:
    """Declare a field of ``least`` to ``most`` bytes; without ``most``, of exactly ``least``."""
    return _checked(lambda value: _octets(value, least, most))


def _octets(value: object, least: int, most: int | None) -> str:
    if not isinstance(value, bytes):
        return f"is {type(value).__name__}, not bytes"
    if most is None:
        return "" if len(value) == least else f"has {len(value)} bytes, not {least}"
    return "" if least <= len(value) <= most else f"has {len(value)} bytes, not {least}..{most}"


def message(kind: type[Message]) -> Any:
    """Declare a field that holds another message."""
    return dataclasses.field(metadata={"check": _mapping, "inner": kind.from_fields})


def message_by_site(kind: type[Message], limit: int = MAXIMUM_SITES) -> Any:
    """Declare a mapping from site name to another message."""

    def decode(value: Mapping[str, object], fault: Fault) -> dict[str, Message]:
        return {site: kind.from_fields(inner, fault) for site, inner in value.items()}

    return dataclasses.field(metadata={"check": lambda v: _sites(v, limit), "inner": decode})


def _mapping(value: object) -> str:
    return "" if isinstance(value, Mapping) else f"is {type(value).__name__}, not a mapping"


def _sites(value: object, limit: int) -> str:
    if not isinstance(value, Mapping):
        return _mapping(value)
    if len(value) > limit:
        return f"has {len(value)} entries, more than {limit}"
    return next((f"has a name that {wrong}" for s in value if (wrong := _text(s, 200))), "")


def text(limit: int = 200) -> Any:
    """Declare a field of 1..``limit`` printable characters."""
    return _checked(lambda value: _text(value, limit))


def _text(value: object, limit: int) -> str:
    if not isinstance(value, str):
        return f"is {type(value).__name__}, not text"
    return (
        "" if 0 < len(value) <= limit and value.isprintable() else "is empty, long or unprintable"
    )


def word(limit: int) -> Any:
    """Declare a field of 0..``limit`` lower-case letters, digits and hyphens."""

    def check(value: object) -> str:
        if not isinstance(value, str):
            return f"is {type(value).__name__}, not text"
        right = len(value) <= limit and not set(value) - _WORD_LETTERS
        return "" if right else "is no word of letters, digits and hyphens"

    return _checked(check)


def hexadecimal(length: int = 64) -> Any:
    """Declare a field of exactly ``length`` lower-case hexadecimal digits: safe in a file name."""

    def check(value: object) -> str:
        if not isinstance(value, str):
            return f"is {type(value).__name__}, not text"
        if len(value) != length or set(value) - set("0123456789abcdef"):
            return f"is not {length} hexadecimal digits"
        return ""

    return _checked(check)


def integer(low: int, high: int) -> Any:
    """Declare a field with an integer in ``low``..``high``."""
    return _checked(lambda value: _integer(value, low, high))


def _integer(value: object, low: int, high: int) -> str:
    if not isinstance(value, int) or isinstance(value, bool):
        return f"is {type(value).__name__}, not an integer"
    if low <= value <= high:
        return ""
    shown = value if value.bit_length() <= 64 else f"of {value.bit_length()} bits"
    return f"is {shown}, outside {low}..{high}"


def real(low: float, high: float) -> Any:
    """Declare a finite floating-point field in ``low``..``high``."""
    return _checked(lambda value: _real(value, low, high))


def _real(value: object, low: float, high: float) -> str:
    if not isinstance(value, float):
        return f"is {type(value).__name__}, not float"
    return "" if low <= value <= high else f"is {value:.6g}, not in {low}..{high}"  # nor NaN


def array(dtype: str, dimensions: int) -> Any:
    """Declare a field with a NumPy array of this dtype and number of axes; floats are finite."""

    def check(value: object) -> str:
        if not isinstance(value, np.ndarray):
            return f"is {type(value).__name__}, not an array"
        if value.dtype != np.dtype(dtype) or value.ndim != dimensions:
            return f"is {value.dtype} with {value.ndim} axes, not {dtype} with {dimensions}"
        if value.dtype.kind == "f" and not bool(np.isfinite(value).all()):
            return "holds NaN or infinity"
        return ""

    return _checked(check)


def octets_by_site(
    least: int | None = None, most: int | None = None, limit: int = MAXIMUM_SITES
) -> Any:
    """Declare a mapping from site name to bytes; sizes as for :func:`octets`, if given."""

    def check(value: object) -> str:
        wrong = _sites(value, limit)
        if wrong or not isinstance(value, Mapping):
            return wrong
        for content in value.values():
            if not isinstance(content, bytes):
                return f"holds {type(content).__name__}, not bytes"
            if least is not None and (wrong := _octets(content, least, most)):
                return f"holds one that {wrong}"
        return ""

    return _checked(check)


def several(check_one: Any, limit: int = 1000) -> Any:
    """Declare a sequence of at most ``limit`` members that pass the check of another field."""
    inner: Check = check_one.metadata["check"]

    def check(value: object) -> str:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return f"is {type(value).__name__}, not a sequence"
        if len(value) > limit:
            return f"has {len(value)} members, more than {limit}"
        return next((f"has a member that {wrong}" for wrong in map(inner, value) if wrong), "")

    return _checked(check)


def arrays_by_name(dtype: str) -> Any:
    """Declare a mapping from tensor name to an array of ``dtype`` with finite values."""

    def check(value: object) -> str:
        if not isinstance(value, Mapping):
            return f"is {type(value).__name__}, not a mapping"
        for name, tensor in value.items():
            if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
                return "is not a mapping from names to arrays"
            if tensor.dtype != np.dtype(dtype):
                return f"holds {name} as {tensor.dtype}, not {dtype}"
            if tensor.dtype.kind == "f" and not bool(np.isfinite(tensor).all()):
                return f"holds NaN or infinity in {name}"
        return ""

    return _checked(check)


def texts_by_name(limit: int = 200, count: int = 200) -> Any:
    """Declare a mapping from names to texts, at most ``count`` of at most ``limit`` characters."""

    def check(value: object) -> str:
        if not isinstance(value, Mapping):
            return f"is {type(value).__name__}, not a mapping"
        if len(value) > count:
            return f"has {len(value)} entries, more than {count}"
        parts = (part for pair in value.items() for part in pair)
        return next((f"has a part that {wrong}" for p in parts if (wrong := _text(p, limit))), "")

    return _checked(check)
