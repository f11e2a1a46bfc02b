"""Errors across the wire, and the constants that both packages have."""

import ast
import json
import pickle
from pathlib import Path

import ase.units
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rootstock_client.ase_errors
import rootstock_client.units
import rootstockd.worker.units
from rootstock_client import errors
from rootstock_client.errors import ProtocolError, RootstockError
from rootstockd.processes.messages import Failure

ROOT = Path(__file__).parent.parent
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


OURS = {kind.__name__ for kind in (*CLASSES, *rootstock_client.ase_errors.OF_ASE.values())} | {"Refused", "StoreError"}


def unfinished(text: ast.expr) -> bool:
    """Whether a message ends without a full stop, as far as the code says: its last words may come from others."""
    match text:
        case ast.Constant(value=str(words)):
            return bool(words) and not words.endswith((".", "?", "!"))
        case ast.JoinedStr(values=[*_, last]):
            return unfinished(last)
        case ast.FormattedValue(value=ast.IfExp() as either):
            return unfinished(either)
        case ast.FormattedValue(conversion=conversion, format_spec=form):
            return conversion != -1 or form is not None
        case ast.IfExp(body=one, orelse=other):
            return unfinished(one) or unfinished(other)
        case ast.BinOp(right=right):
            return unfinished(right)
    return False


@pytest.mark.parametrize("package", ["rootstock_client", "rootstockd"])
def test_messages_are_sentences(package):
    """So that the advice behind them, and what others say with them, can follow."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OURS:
                texts = node.args[:2] if node.func.id not in ("Refused", "StoreError") else node.args[:1]
                found += [f"{path.name}:{node.lineno}: {ast.unparse(text)}" for text in texts if unfinished(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("end", ["", ".", "?", " \n"])
def test_what_a_worker_says_becomes_a_sentence(end):
    """Whoever wrote its engine."""
    error = Failure(code="unsupported", message=f"model 'x' has no head 'y'{end}", hint="Leave it out.").error
    assert str(error) == f"model 'x' has no head 'y'{end.strip() or '.'}\nLeave it out."


@pytest.mark.parametrize("module", [rootstock_client.units, rootstockd.worker.units])
def test_units_are_ases(module):
    assert (ase.units.Bohr, ase.units.Hartree) == (module.BOHR, module.HARTREE)
