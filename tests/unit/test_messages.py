"""Messages: what is right passes, and each kind of wrong is the error that the caller chose."""

from __future__ import annotations

import dataclasses
import enum
import importlib
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedgestalt.errors import FedgestaltError, PeerError, ServerError
from fedgestalt.federation.matching.messages import Ask
from fedgestalt.messages import (
    MAXIMUM_SITES,
    Message,
    array,
    arrays_by_name,
    from_server,
    from_site,
    integer,
    message,
    message_by_site,
    octets,
    octets_by_site,
    real,
    several,
    size_of,
    text,
    texts_by_name,
    word,
)


class Chosen(FedgestaltError):
    """The error that the caller of these tests chose."""


@dataclass(frozen=True)
class Inner(Message):
    """A message inside others."""

    schema: ClassVar[str] = "test.inner/1"
    secret: bytes = octets(2)
    sites: tuple[str, ...] = several(text(5))


@dataclass(frozen=True)
class Everything(Message):
    """One field of each declaration."""

    schema: ClassVar[str] = "test.everything/1"

    key: bytes = octets(4)
    box: bytes = octets(1, 3)
    cipher: str = word(6)
    offer: Inner = message(Inner)
    offers: Mapping[str, Inner] = message_by_site(Inner, 2)
    name: str = text(10)
    count: int = integer(1, 9)
    share: float = real(0, 1)
    matrix: NDArray[np.float32] = array("float32", 2)
    words: NDArray[np.uint64] = array("uint64", 1)
    keys: Mapping[str, bytes] = octets_by_site(2)
    seals: Mapping[str, bytes] = octets_by_site(1, 3, 2)
    boxes: Mapping[str, bytes] = octets_by_site()
    roster: tuple[str, ...] = several(text(5))
    tensors: Mapping[str, NDArray[np.float32]] = arrays_by_name("float32")


def inner(**changes: Any) -> dict[str, Any]:
    return {"schema": "test.inner/1", "secret": b"ab", "sites": ("ulm",)} | changes


def good(**changes: Any) -> dict[str, Any]:
    return {
        "schema": "test.everything/1",
        "key": b"abcd",
        "box": b"ab",
        "cipher": "aes-2",
        "offer": inner(),
        "offers": {"bonn": inner(), "berlin": inner(sites=())},
        "name": "bonn",
        "count": 3,
        "share": 0.25,
        "matrix": np.eye(2, dtype=np.float32),
        "words": np.arange(3, dtype=np.uint64),
        "keys": {"bonn": b"ab", "berlin": b"cd"},
        "seals": {"bonn": b"a", "berlin": b"abc"},
        "boxes": {"bonn": b"", "berlin": b"long and short"},
        "roster": ("bonn", "ulm"),
        "tensors": {"fc.weight": np.zeros((2, 1), np.float32)},
    } | changes


def decode(fields: object) -> Everything:
    return Everything.from_fields(fields, Chosen)


def test_a_good_message_is_read_as_it_was_sent() -> None:
    read = decode(good())
    for name, value in good().items():
        if name not in ("schema", "offer", "offers"):
            np.testing.assert_equal(getattr(read, name), value)


def test_a_message_inside_another_is_read_as_a_message() -> None:
    read = decode(good())
    assert read.offer == Inner(b"ab", ("ulm",))
    assert read.offers == {"bonn": Inner(b"ab", ("ulm",)), "berlin": Inner(b"ab", ())}


def test_a_message_survives_the_way_there_and_back() -> None:
    fields = decode(good()).to_fields()
    np.testing.assert_equal(fields, good())
    np.testing.assert_equal(decode(fields).to_fields(), good())


def test_a_word_of_an_enumeration_travels_as_a_plain_word() -> None:
    class Site(enum.StrEnum):
        BONN = "bonn"

    fields = dataclasses.replace(decode(good()), name=Site.BONN).to_fields()
    assert type(fields["name"]) is str
    assert decode(fields).name == Site.BONN


def test_a_message_cannot_be_changed() -> None:
    read = decode(good())
    with pytest.raises(FrozenInstanceError):
        read.count = 4  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        read.offer.secret = b"cd"  # type: ignore[misc]


def test_a_list_arrives_as_a_tuple() -> None:
    assert decode(good(roster=["bonn", "ulm"])).roster == ("bonn", "ulm")
    assert decode(good(offer=inner(sites=["ulm"]))).offer.sites == ("ulm",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "x"),
        ("name", "x" * 10),
        ("name", "Müller"),
        ("count", 1),
        ("count", 9),
        ("box", b"a"),
        ("box", b"abc"),
        ("cipher", ""),
        ("cipher", "a-z0-9"),
        ("offers", {}),
        ("matrix", np.zeros((0, 3), np.float32)),
        ("words", np.array([2**64 - 1], np.uint64)),
        ("keys", {}),
        ("keys", {f"site-{number}": b"ab" for number in range(MAXIMUM_SITES)}),
        ("seals", {}),
        ("boxes", {}),
        ("roster", ()),
        ("tensors", {}),
        ("tensors", {"scalar": np.array(1.0, np.float32)}),
    ],
)
def test_values_at_the_edge_pass(field: str, value: object) -> None:
    np.testing.assert_equal(getattr(decode(good(**{field: value})), field), value)


NOT_A_NUMBER = np.array([[np.nan]], np.float32)
INFINITE = np.array([[-np.inf]], np.float32)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("key", b"abc", "3 bytes, not 4"),
        ("key", b"abcde", "5 bytes, not 4"),
        ("key", "abcd", "str, not bytes"),
        ("key", bytearray(b"abcd"), "bytearray, not bytes"),
        ("key", None, "NoneType, not bytes"),
        ("box", b"", "0 bytes, not 1..3"),
        ("box", b"abcd", "4 bytes, not 1..3"),
        ("box", "ab", "str, not bytes"),
        ("cipher", "aes-256", "no word of letters"),
        ("cipher", "AES", "no word of letters"),
        ("cipher", "a b", "no word of letters"),
        ("cipher", "a\n", "no word of letters"),
        ("cipher", "ä", "no word of letters"),
        ("cipher", "²", "no word of letters"),
        ("cipher", b"aes", "bytes, not text"),
        ("offer", None, "NoneType, not a mapping"),
        ("offer", b"ab", "bytes, not a mapping"),
        ("offers", [inner()], "list, not a mapping"),
        ("offers", {"a": inner(), "b": inner(), "c": inner()}, "3 entries, more than 2"),
        ("offers", {1: inner()}, "a name that is int, not text"),
        ("offers", {"": inner()}, "a name that is empty, long or unprintable"),
        ("offers", {"x" * 201: inner()}, "a name that is empty, long or unprintable"),
        ("name", "", "empty, long or unprintable"),
        ("name", "x" * 11, "empty, long or unprintable"),
        ("name", "two\nlines", "empty, long or unprintable"),
        ("name", "\x1b[31m", "empty, long or unprintable"),
        ("name", b"bonn", "bytes, not text"),
        ("count", 0, "outside 1..9"),
        ("count", 10, "outside 1..9"),
        ("count", True, "bool, not an integer"),
        ("count", 3.0, "float, not an integer"),
        ("count", "3", "str, not an integer"),
        ("matrix", np.eye(2), "float64 with 2 axes, not float32 with 2"),
        ("matrix", np.zeros(4, np.float32), "float32 with 1 axes, not float32 with 2"),
        ("matrix", np.eye(2, dtype=np.float32).astype(">f4"), "not float32"),
        ("matrix", np.array([[object()]]), "object with 2 axes"),
        ("matrix", [[1.0]], "list, not an array"),
        ("matrix", NOT_A_NUMBER, "NaN or infinity"),
        ("matrix", INFINITE, "NaN or infinity"),
        ("words", np.zeros(3, np.int64), "int64 with 1 axes, not uint64"),
        ("keys", {"bonn": b"a"}, "1 bytes, not 2"),
        ("keys", {f"site-{n}": b"ab" for n in range(MAXIMUM_SITES + 1)}, "entries, more than"),
        ("seals", {"bonn": b""}, "one that has 0 bytes, not 1..3"),
        ("seals", {"bonn": b"a", "berlin": b"abcd"}, "one that has 4 bytes, not 1..3"),
        ("seals", {"a": b"a", "b": b"a", "c": b"a"}, "3 entries, more than 2"),
        ("keys", {"bonn": "ab"}, "holds str, not bytes"),
        ("keys", {3: b"ab"}, "int, not text"),
        ("keys", {"": b"ab"}, "empty, long or unprintable"),
        ("keys", [("bonn", b"ab")], "list, not a mapping"),
        ("boxes", {"bonn": None}, "holds NoneType, not bytes"),
        ("boxes", b"", "bytes, not a mapping"),
        ("roster", "bonn", "str, not a sequence"),
        ("roster", b"bonn", "bytes, not a sequence"),
        ("roster", {"bonn"}, "set, not a sequence"),
        ("roster", ("bonn", 3), "a member that is int, not text"),
        ("roster", ("bonn", "berlin"), "a member that is empty, long or unprintable"),
        ("tensors", [], "list, not a mapping"),
        ("tensors", {1: np.zeros(1, np.float32)}, "names to arrays"),
        ("tensors", {"a": [1.0]}, "names to arrays"),
        ("tensors", {"a": np.zeros(1)}, "a as float64, not float32"),
        ("tensors", {"a": NOT_A_NUMBER}, "NaN or infinity in a"),
        ("tensors", {"a": np.zeros(1, np.float32), "b": INFINITE}, "NaN or infinity in b"),
    ],
)
def test_a_wrong_value_is_refused_and_its_field_named(field: str, value: object, says: str) -> None:
    with pytest.raises(Chosen) as refusal:
        decode(good(**{field: value}))
    assert f"field {field!r}" in str(refusal.value)
    assert says in str(refusal.value)
    assert Everything.schema in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"secret": b"abc"}, "field 'secret' has 3 bytes, not 2"),
        ({"sites": ("berlin",)}, "field 'sites' has a member that is empty, long"),
        ({"schema": "test.inner/2"}, "expected test.inner/1, got 'test.inner/2'"),
        ({"schema": "test.everything/1"}, "expected test.inner/1, got"),
        ({"extra": 1}, "test.inner/1: missing or unknown field 'extra'"),
    ],
)
def test_what_is_wrong_inside_a_message_inside_is_refused_and_named(
    change: dict[str, Any], says: str
) -> None:
    wrong = inner(**change)
    for fields in (good(offer=wrong), good(offers={"bonn": inner(), "ulm": wrong})):
        with pytest.raises(Chosen) as refusal:
            decode(fields)
        assert says in str(refusal.value)


@pytest.mark.parametrize("wrong", [None, "text", [], 3, b""])
def test_what_is_no_message_in_a_mapping_of_messages_is_refused(wrong: object) -> None:
    with pytest.raises(Chosen, match=f"expected test.inner/1, got {type(wrong).__name__}"):
        decode(good(offers={"bonn": wrong}))


@pytest.mark.parametrize("name", [name for name in good() if name != "schema"])
def test_a_missing_field_is_named(name: str) -> None:
    fields = good()
    del fields[name]
    with pytest.raises(Chosen, match=f"missing or unknown field '{name}'"):
        decode(fields)


@pytest.mark.parametrize("extra", ["weights", 7, None, "x" * 500])
def test_an_extra_field_is_refused(extra: object) -> None:
    with pytest.raises(Chosen, match="missing or unknown field") as refusal:
        decode(good() | {extra: 1})
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("schema", ["test.everything/2", "", None, 1, b"test.everything/1", []])
def test_another_schema_is_refused(schema: object) -> None:
    with pytest.raises(Chosen, match=r"expected test\.everything/1, got"):
        decode(good(schema=schema))


@pytest.mark.parametrize("schema", [np.zeros(2), np.array(["a", "b"]), np.array([])])
def test_an_array_where_the_schema_belongs_is_refused(schema: NDArray[Any]) -> None:
    with pytest.raises(Chosen, match="expected"):
        decode(good(schema=schema))


def test_a_message_without_a_schema_is_refused() -> None:
    fields = good()
    del fields["schema"]
    with pytest.raises(Chosen, match="got NoneType"):
        decode(fields)


@pytest.mark.parametrize("fields", [None, [], "message", 3, np.zeros(2)])
def test_what_is_no_mapping_is_refused(fields: object) -> None:
    with pytest.raises(Chosen, match=f"got {type(fields).__name__}"):
        decode(fields)


def test_a_fault_of_a_site_names_the_site() -> None:
    with pytest.raises(PeerError, match="site 'ulm'") as refusal:
        Everything.from_fields({}, from_site("ulm"))
    assert refusal.value.site == "ulm"


def test_a_fault_of_the_server_is_a_server_error() -> None:
    with pytest.raises(ServerError, match="server: expected"):
        Everything.from_fields({}, from_server)


arrays = hnp.arrays(
    st.sampled_from([np.dtype(t) for t in ("float32", "float64", "uint64", "bool", "U3")]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | arrays
junk = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(fields=junk | st.dictionaries(st.sampled_from(list(good())) | st.text(), junk))
@settings(deadline=None)
def test_junk_raises_the_chosen_error_and_no_other(fields: object) -> None:
    with pytest.raises(Chosen):
        decode(fields)


@given(field=st.sampled_from([name for name in good() if name != "schema"]), value=junk)
@settings(deadline=None)
def test_junk_in_one_field_is_either_valid_or_the_chosen_error(field: str, value: object) -> None:
    try:
        read = decode(good(**{field: value}))
    except Chosen as refusal:
        inside = field.startswith("offer") and Inner.schema in str(refusal)
        assert inside or f"field {field!r}" in str(refusal)  # noqa: PT017  either outcome is right
    else:
        np.testing.assert_equal(decode(read.to_fields()).to_fields(), read.to_fields())


@given(field=st.sampled_from(list(inner())), value=junk)
@settings(deadline=None)
def test_junk_inside_a_message_inside_is_either_valid_or_the_chosen_error(
    field: str, value: object
) -> None:
    fields = good(offers={"bonn": inner(**{field: value})})
    try:
        read = decode(fields)
    except Chosen as refusal:
        assert Inner.schema in str(refusal)  # noqa: PT017  either outcome is right
    else:
        np.testing.assert_equal(decode(read.to_fields()).to_fields(), read.to_fields())


MODULES = (
    "fedgestalt.secagg",
    "fedgestalt.federation.job.transfer",
    "fedgestalt.similarity.kernel",
    "fedgestalt.federation.training.messages",
    "fedgestalt.federation.matching.messages",
    "fedgestalt.federation.job.handshake",
)


def real_messages() -> list[type[Message]]:
    for module in MODULES:
        importlib.import_module(module)
    found, left = [], [Message]
    while left:
        children = left.pop().__subclasses__()
        left += children
        found += [kind for kind in children if kind.__module__.startswith("fedgestalt.")]
    return sorted(found, key=lambda kind: kind.schema)


def test_every_message_has_a_versioned_schema_of_its_own() -> None:
    schemas = [kind.schema for kind in real_messages()]
    assert len(schemas) > 5
    assert len(set(schemas)) == len(schemas)
    for schema in schemas:
        name, slash, version = schema.rpartition("/")
        assert name.startswith("fedgestalt."), schema
        assert slash, schema
        assert int(version) > 0, schema


@pytest.mark.parametrize("kind", real_messages(), ids=lambda kind: kind.__name__)
def test_every_message_refuses_junk_in_each_of_its_fields(kind: type[Message]) -> None:
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        assert field.metadata["check"](object()), field.name


@pytest.mark.parametrize("kind", real_messages(), ids=lambda kind: kind.__name__)
def test_every_message_refuses_a_field_that_is_not_its_own(kind: type[Message]) -> None:
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    fields: dict[str, object] = {"schema": kind.schema} | dict.fromkeys([*names, "x"], object())
    with pytest.raises(Chosen, match="missing or unknown field 'x'"):
        kind.from_fields(fields, Chosen)


@pytest.mark.parametrize("kind", real_messages(), ids=lambda kind: kind.__name__)
def test_every_message_refuses_a_field_too_few(kind: type[Message]) -> None:
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in names:
        fields: dict[str, object] = {"schema": kind.schema} | dict.fromkeys(names, object())
        del fields[name]
        with pytest.raises(Chosen, match=f"missing or unknown field '{name}'"):
            kind.from_fields(fields, Chosen)


def test_a_message_may_have_no_field() -> None:
    schema = Ask.schema
    assert Ask().to_fields() == {"schema": schema}
    assert Ask.from_fields({"schema": schema}, Chosen) == Ask()


# --- texts by name, and sizes --------------------------------------------------------------------


@dataclass(frozen=True)
class Facts(Message):
    """Some facts."""

    schema: ClassVar[str] = "test.facts/1"
    facts: Mapping[str, str] = texts_by_name(limit=5, count=2)


@pytest.mark.parametrize("facts", [{}, {"a": "x"}, {"abcde": "vwxyz", "b": "Ärger"}])
def test_short_texts_by_name_pass(facts: dict[str, str]) -> None:
    read = Facts.from_fields({"schema": Facts.schema, "facts": facts}, Chosen)
    assert read.facts == facts


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"a": "x", "b": "y", "c": "z"}, "3 entries, more than 2"),
        ({"a": "abcdef"}, "empty, long or unprintable"),
        ({"abcdef": "a"}, "empty, long or unprintable"),
        ({"a": ""}, "empty, long or unprintable"),
        ({"": "a"}, "empty, long or unprintable"),
        ({"a": "\x1b[31m"}, "empty, long or unprintable"),
        ({"a": b"x"}, "bytes, not text"),
        ({"a": 1}, "int, not text"),
        ({1: "a"}, "int, not text"),
        ({"a": {"b": "c"}}, "dict, not text"),
        ([("a", "b")], "list, not a mapping"),
        ("a", "str, not a mapping"),
    ],
)
def test_other_texts_by_name_are_refused(facts: object, says: str) -> None:
    with pytest.raises(Chosen, match="field 'facts'") as refusal:
        Facts.from_fields({"schema": Facts.schema, "facts": facts}, Chosen)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (np.zeros((3, 5), np.float32), 60),
        (np.zeros(7, np.uint8), 7),
        (np.zeros((0, 4)), 0),
        (b"abc", 3),
        ("abcd", 4),
        ("", 0),
        ("Köln", 5),
        ("日本", 6),
        ("😀", 4),
        ({"Köln": "é"}, 7),
        (5, 8),
        (None, 8),
        ({}, 0),
        ({"ab": b"cde", "f": {"g": 1}}, 2 + 3 + 1 + 1 + 8),
        (("ab", ["c", b"d"]), 4),
    ],
)
def test_the_size_of_a_message_is_that_of_its_content(value: object, size: int) -> None:
    assert size_of(value) == size


def test_a_text_that_is_no_unicode_has_a_size() -> None:
    assert size_of("\ud800") == 3


def test_the_size_of_a_whole_message_counts_names_and_values() -> None:
    fields = Facts({"a": "xy"}).to_fields()
    assert size_of(fields) == len("schema" + "test.facts/1" + "facts" + "a" + "xy")


# --- real numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_real_number_within_its_bounds_is_taken(value: float) -> None:
    assert decode(good(share=value)).share == value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-0.5, "is -0.5, not in 0..1"),
        (1.5, "is 1.5, not in 0..1"),
        (float("nan"), "is nan, not in 0..1"),
        (float("inf"), "is inf, not in 0..1"),
        (1, "is int, not float"),
        (True, "is bool, not float"),
        ("0.5", "is str, not float"),
    ],
)
def test_any_other_real_number_is_refused(value: object, said: str) -> None:
    with pytest.raises(Chosen, match=f"field 'share' {said}"):
        decode(good(share=value))
