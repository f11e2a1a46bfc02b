"""What INIT texts ask for."""

import contextlib
import json
import re
from pathlib import Path

import ase.units
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootstock_client.errors import InvalidInitError, InvalidStructureError
from rootstockd.sessions.functionals import FUNCTIONALS
from rootstockd.sessions.init_request import MAX_BATCH_SIZE, is_announced, parse_init
from rootstockd.worker.engines import dispersion

FIELDS = {"rootstock": 1, "model": "emt", "numbers": [29, 29], "pbc": [True, True, False]}


def text(**changes: object) -> bytes:
    return json.dumps({**FIELDS, **changes}).encode()


def without(key: str) -> bytes:
    return json.dumps({name: value for name, value in FIELDS.items() if name != key}).encode()


def test_the_least_that_says_enough():
    request = parse_init(text())
    assert request.model == "emt"
    assert request.numbers == [29, 29]
    assert request.pbc == (True, True, False)
    assert (request.charge, request.spin, request.head, request.dtype) == (None, None, None, None)
    assert request.batch_size == 1


def test_a_spin_of_zero_says_nothing_and_a_charge_of_zero_does():
    request = parse_init(text(charge=0, spin=0.0))
    assert (request.charge, request.spin) == (0.0, None)


def test_all_that_can_be_said():
    request = parse_init(
        text(charge=-1, spin=2.0, head="omat", dtype="float32", want=["energy", "energies"], batch_size=8)
    )
    assert (request.charge, request.spin, request.head, request.dtype) == (-1.0, 2.0, "omat", "float32")
    assert request.want == {"energy", "energies"}
    assert request.batch_size == 8


@pytest.mark.parametrize(
    ("want", "pbc", "stress", "energies"),
    [
        (None, [False] * 3, False, False),
        (None, [False, False, True], True, False),
        ([], [True] * 3, False, False),
        (["energy", "forces"], [True] * 3, False, False),
        (["stress"], [False] * 3, True, False),
        (["energies"], [True] * 3, False, True),
    ],
)
def test_what_is_computed(want, pbc, stress, energies):
    request = parse_init(text(want=want, pbc=pbc))
    assert request.stress is stress
    assert request.energies is energies


@pytest.mark.parametrize(
    ("init", "named"),
    [
        *[(without(key), f"{key} is missing") for key in FIELDS],
        (text(colour="red"), "there is no field colour"),
        (text(numbers=[29.5]), r"numbers\.0: 29\.5 is not an integer"),
        (text(numbers=["Cu"]), r"numbers\.0: 'Cu' is not an integer"),
        (text(numbers="Cu"), "numbers: 'Cu' is not a list"),
        (text(pbc=[True, True]), r"pbc\.2 is missing"),
        (text(pbc=[True] * 4), "pbc: there are 4 of them, and 3 have a place"),
        (text(pbc=True), "pbc: True is not a list"),
        (text(model="m" * 201), r"model: 'mm+\.\.\.mm+' has more than 200 characters"),
        (text(model=None), "model: null is not a text"),
        (text(head="h" * 201), "head: .* has more than 200 characters"),
        (text(dtype="float16"), r"dtype: 'float16' is not one of float32, float64\."),
        (text(dtype=[64] * 10_000), r"dtype: \[64, .*\.\.\.\] is not one of"),
        (text(want=["dipole"]), r"want\.0: 'dipole' is not one of energy, forces, stress, energies"),
        (text(charge=float("nan")), "charge: nan is not a finite number"),
        (text(charge="1"), "charge: '1' is not a number"),
        (text(spin=float("inf")), "spin: inf is not a finite number"),
        (text(exact=1), "exact: 1 is neither true nor false"),
        (text(dispersion=1), "dispersion: 1 is not a table of fields"),
        (text(dispersion={"damping": "bk"}), r"dispersion\.damping: 'bk' is not one of bj, zero"),
        (text(dispersion={"xc": 1}), r"dispersion\.xc: 1 is not a text"),
        (text(dispersion={"xc": "x" * 51}), r"dispersion\.xc: .* has more than 50 characters"),
        (text(dispersion={"cutoff": 0}), r"dispersion\.cutoff: 0 is not more than 0"),
        (text(dispersion={"cnthr": 101}), r"dispersion\.cnthr: 101 is more than 100"),
        (text(dispersion={"xc": "pbbe"}), r"dispersion\.xc: .* 'pbbe' with damping 'bj'. Near it are pbe"),
        (text(dispersion={"xc": "M06", "damping": "bj"}), "'M06' with damping 'bj'. There are with zero"),
        (text(dispersion={"xc": "????"}), "those of s-dftd3, such as pbe"),
        (text(dispersion={"cutoff": float("nan")}), r"dispersion\.cutoff"),
        (text(dispersion={"abc": True}), r"there is no field dispersion\.abc"),
        (text(batch_size=0), "batch_size: 0 is less than 1"),
        (text(batch_size=MAX_BATCH_SIZE + 1), "batch_size: 1025 is more than 1024"),
        (b"{", "Invalid JSON"),
        (b'{"rootstock": ', "Invalid JSON"),
        (b"{\xff}", "Invalid JSON"),
        (b'{"a":' * 5000, "Invalid JSON"),
    ],
)
def test_what_is_wrong_is_named(init, named):
    said = "INIT can't be read" if named == "Invalid JSON" else "the session's request is invalid"
    with pytest.raises(InvalidInitError, match=f"^{said}: .*{named}") as caught:
        parse_init(init)
    assert len(str(caught.value)) < 400


def test_dispersion():
    assert parse_init(text()).options == ""
    assert parse_init(text(dispersion=False)).options == ""
    assert parse_init(text(dispersion=None)).options == ""
    usual = parse_init(text(dispersion=True))
    assert usual.options == parse_init(text(dispersion={})).options
    assert json.loads(usual.options)["dispersion"] == {
        "damping": "bj",
        "xc": "pbe",
        "cutoff": 40 * ase.units.Bohr,
        "cnthr": 40 * ase.units.Bohr,
    }
    a = parse_init(text(dispersion={"xc": "rpbe", "cutoff": 20}))
    b = parse_init(text(dispersion={"cutoff": 20.0, "xc": "rpbe", "damping": "bj"}))
    assert a.options == b.options != usual.options
    assert parse_init(text(dispersion={"xc": "R-PBE", "cutoff": 20})).options == a.options


@pytest.mark.parametrize("damping", FUNCTIONALS)
def test_functionals_are_those_of_the_library(damping):
    """All that are listed, and of those that its table of parameters has no other."""
    table = Path(dispersion.interface.__file__).with_name("parameters.toml")
    names = set(re.findall(r"^\[?parameter\.([\w]+)", table.read_text(), re.MULTILINE))
    assert len(names) > 100

    def known(name: str) -> bool:
        with contextlib.suppress(ValueError):
            dispersion.D3(damping, name, 20.0, 20.0)
            return True
        return False

    assert [name for name in FUNCTIONALS[damping] if not known(name)] == []
    assert {name for name in names if known(name)} <= FUNCTIONALS[damping]


@pytest.mark.parametrize("version", [0, 2, -1])
def test_another_version_of_the_protocol_is_refused_with_both_named(version):
    with pytest.raises(InvalidInitError, match=rf"version {version}, this daemon version 1") as caught:
        parse_init(text(rootstock=version))
    assert "Upgrade the older" in caught.value.hint


@pytest.mark.parametrize(
    ("number", "said"), [(0, '0 ("X")'), (119, "119"), (-1, "-1"), (10**30, "1" + 19 * "0" + "... (31 characters)")]
)
def test_what_is_no_element(number, said):
    with pytest.raises(InvalidInitError) as caught:
        parse_init(text(numbers=[29, number]))
    assert caught.value.message == f"atom 1 has the atomic number {said}."
    assert "ASE's X" in caught.value.hint


def test_no_atoms():
    with pytest.raises(InvalidStructureError, match="zero atoms"):
        parse_init(text(numbers=[]))


@pytest.mark.parametrize(
    ("init", "announced"),
    [(b"{}", True), (b" \n\t{", True), (b"", False), (b"\0", False), (b"a {", False), (b"[]", False)],
)
def test_who_is_one_of_ours(init, announced):
    assert is_announced(init) is announced


@pytest.mark.parametrize("init", [b"", b"\0", b"nbeads:4", b"\xff\xfe", b"[1]"])
def test_what_stock_drivers_say_is_not_enough(init):
    with pytest.raises(InvalidInitError, match="names no model and no species"):
        parse_init(init)


def test_a_long_text_is_not_repeated_in_full():
    with pytest.raises(InvalidInitError) as caught:
        parse_init(b"x" * 100_000)
    assert len(str(caught.value)) < 400


@settings(max_examples=200)
@given(st.one_of(st.binary(), st.binary().map(lambda tail: b"{" + tail)))
def test_no_text_does_anything_else(init):
    with pytest.raises(InvalidInitError):
        parse_init(init)
