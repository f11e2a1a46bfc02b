"""Errors across the wire, and the constants that both packages have."""

import json
import pickle

import ase.units
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rootstock_client.units
import rootstockd.worker.units
from rootstock_client import errors
from rootstock_client.errors import ProtocolError, RootstockError

CLASSES = [RootstockError, *RootstockError.by_code.values()]


def test_every_class_has_a_code_of_its_own():
    defined = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RootstockError)]
    assert len(defined) > 10
    assert set(defined) == set(CLASSES)
    assert len({kind.code for kind in defined}) == len(defined)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("hint", ["", "do this\nand that"])
def test_an_error_comes_out_as_it_went_in(kind, hint):
    error = kind("model 'é' \ud800 is \"gone\"", hint)
    back = RootstockError.from_json(error.to_json())
    assert type(back) is kind
    assert (back.message, back.hint) == (error.message, error.hint)
    assert str(back) == (f"{error.message}\n{hint}" if hint else error.message)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_can_be_pickled(kind):
    """A driver that runs calculators in other processes gets their errors so."""
    back = pickle.loads(pickle.dumps(kind("what", "how")))
    assert type(back) is kind
    assert (back.message, back.hint, str(back)) == ("what", "how", "what\nhow")


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.DaemonNotFoundError, ConnectionError),
        (errors.ConnectionLostError, ConnectionError),
        (errors.UnknownModelError, KeyError),
        (errors.InvalidStructureError, ValueError),
        (errors.UnsupportedError, NotImplementedError),
        (errors.InStepError, RuntimeError),
    ],
)
def test_who_knows_only_pythons_own_errors_can_catch_them(kind, builtin):
    with pytest.raises(builtin):
        raise kind("what")


def test_a_code_of_another_version():
    error = RootstockError.from_json(b'{"code": "from-the-future", "message": "what", "hint": "how", "more": 1}')
    assert type(error) is RootstockError
    assert (error.message, error.hint) == ("what", "how")


def test_a_hint_may_be_missing():
    assert RootstockError.from_json(b'{"code": "limit", "message": "what"}').hint == ""


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"3",
        b"{}",
        b'{"code": "limit"}',
        b'{"message": "x"}',
        b"\xff",
        b"[" * 10**5,
    ],
)
def test_what_is_not_an_error_is_a_protocol_error(body):
    with pytest.raises(ProtocolError, match="an ERROR frame that is not") as caught:
        RootstockError.from_json(body)
    assert len(caught.value.message) < 500


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["code", "message", "hint"]), inner),
    max_leaves=5,
)


@settings(max_examples=150)
@given(st.one_of(st.binary(), json_values.map(lambda value: json.dumps(value).encode())))
def test_no_body_does_anything_else(body):
    try:
        error = RootstockError.from_json(body)
    except ProtocolError:
        return
    assert isinstance(error.message, str)
    assert isinstance(error.hint, str)


@pytest.mark.parametrize("module", [rootstock_client.units, rootstockd.worker.units])
def test_units_are_ases(module):
    assert (ase.units.Bohr, ase.units.Hartree) == (module.BOHR, module.HARTREE)
