"""MACE models in a form that is not code: the same numbers, and nothing in it that runs."""

import itertools
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mace")
pytest.importorskip("safetensors")

from test_mace_backends import ARCHITECTURES, STRUCTURES, engine, make_model, task  # noqa: E402

from conftest import EMBEDDED_MODEL, sha256  # noqa: E402
from rootstock_client.errors import ModelLoadError  # noqa: E402
from rootstockd.models import store  # noqa: E402
from rootstockd.models.add import add  # noqa: E402
from rootstockd.models.catalogue import Entry  # noqa: E402
from rootstockd.models.convert import _NUMBERS, _compared, _safe_form, with_safe_form  # noqa: E402
from rootstockd.models.store import Record  # noqa: E402
from rootstockd.models.whole_files import StoreError  # noqa: E402
from rootstockd.worker.engines import EngineError, ModelSpec  # noqa: E402
from rootstockd.worker.engines.mace import basis, load, safe  # noqa: E402

PLAIN = {
    "without shift, two heads, repulsion": {**ARCHITECTURES["two heads"], "plain": True, "pair_repulsion": True},
}
UNKNOWN_GATE = {"gate": torch.nn.functional.softplus}


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield
    torch.set_default_dtype(torch.float32)


def spec(dtype="float64", path="", **arguments):
    digest = sha256(path) if path else ""
    return ModelSpec("test", "mace", "cpu", dtype, str(path), digest, arguments=arguments)


@pytest.mark.parametrize(
    "architecture",
    [
        "as MACE-MP-0 small",
        "density, as the embedded model",
        "one layer",
        "two heads",
        "repulsion and Agnesi",
        "without shift",
        "without shift, two heads, repulsion",
    ],
)
def test_the_same_numbers(architecture):
    model = make_model(**PLAIN.get(architecture) or ARCHITECTURES[architecture])
    again = safe.from_safe(safe.to_safe(model), "cpu")
    head = (getattr(model, "heads", None) or [None])[-1]
    one, other = (
        found.evaluate([task(found, STRUCTURES["alloy"], head=head)])[0] for found in (engine(model), engine(again))
    )
    assert one.energy == pytest.approx(other.energy, rel=1e-13)
    np.testing.assert_allclose(other.forces, one.forces, atol=1e-11)
    np.testing.assert_allclose(other.virial, one.virial, atol=1e-10)


def test_single_precision_stays_as_it_was():
    model = make_model(dtype=torch.float32)
    state = model.state_dict()
    again = safe.from_safe(safe.to_safe(model), "cpu").state_dict()
    assert set(again) == set(state)
    for key, value in state.items():
        assert again[key].dtype == value.dtype
        assert torch.equal(again[key], value), key


@pytest.fixture
def reduced_model(monkeypatch):
    """A model in the basis that mace-torch has where cuEquivariance is installed, here from its other one."""
    from mace.modules import symmetric_contraction

    own = symmetric_contraction.U_matrix_real

    def reduced(**asked):
        whole, degree = own(**asked | {"use_cueq_cg": False})[-1], asked["correlation"]
        *ahead, paths = range(whole.dim())
        orders = list(itertools.permutations(ahead[-degree:]))
        symmetric = sum(whole.permute(*ahead[:-degree], *order, paths) for order in orders) / len(orders)
        columns, sizes, _ = torch.linalg.svd(symmetric.flatten(end_dim=-2), full_matrices=False)
        return [columns[:, sizes > 1e-9].reshape(*whole.shape[:-1], -1)]

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(symmetric_contraction, "U_matrix_real", reduced)
        return make_model(hidden="4x0e + 4x1o", max_ell=2, correlation=3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_basis_stays_what_it_was(reduced_model, tmp_path):
    """Whatever mace-torch would make here of the same configuration."""
    whole = make_model(hidden="4x0e + 4x1o", max_ell=2, correlation=3, use_reduced_cg=False)
    assert sum(map(torch.numel, whole.parameters())) > sum(map(torch.numel, reduced_model.parameters()))
    kept = tmp_path / safe.FILE_NAME
    for model, reduced in ((whole, False), (reduced_model, True)):
        assert basis.is_reduced(model.state_dict()) is reduced
        data = safe.to_safe(model)
        right = engine(model).evaluate([task(engine(model), STRUCTURES["alloy"])])[0]
        for said in (True, False):  # as models say themselves, and so files of older versions
            again = safe.from_safe(changed(data, use_reduced_cg=said), "cpu")
            assert again.use_reduced_cg is reduced
            found = engine(again).evaluate([task(engine(again), STRUCTURES["alloy"])])[0]
            assert found.energy == pytest.approx(right.energy, rel=1e-13)
            np.testing.assert_allclose(found.forces, right.forces, atol=1e-11)
    kept.write_bytes(data)
    assert load(spec(path=kept)).info.backend.startswith("fused")


def test_a_state_with_too_few_matrices():
    low = {"hidden": "4x0e", "max_ell": 1, "correlation": 2}
    state = make_model(**low).state_dict()
    few = {key: value for key, value in state.items() if not key.endswith("U_matrix_2")}
    with pytest.raises(ValueError, match="the state has fewer U matrices than the model"), basis.made_with(few):
        make_model(**low)
    assert make_model(**low).state_dict().keys() == state.keys()


def test_contractions_that_are_not_mace_torchs_own():
    model = make_model(**ARCHITECTURES["one layer"])
    for product in model.products:
        product.symmetric_contractions = torch.nn.Linear(1, 1)
        product.symmetric_contractions.contraction_degree = 3  # mace-torch asks it for that
    with pytest.raises(ValueError, match="its contractions are not mace-torch's own"):
        safe.to_safe(model)


def test_a_pickle_of_modules_that_are_not_installed(tmp_path, monkeypatch):
    path, module = tmp_path / "mine.model", types.ModuleType("cuequivariance_elsewhere")
    module.Linear = type("Linear", (), {"__module__": module.__name__})
    with monkeypatch.context() as elsewhere:
        elsewhere.setitem(sys.modules, module.__name__, module)
        torch.save(module.Linear(), path)
    with pytest.raises(EngineError, match="is made of cuEquivariance's modules, which can't be imported: ") as caught:
        load(spec(path=path))
    assert caught.value.code == "model-load"
    assert "convert_cueq_e3nn" in caught.value.hint


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_workers_load_it_and_unpickle_nothing(tmp_path, monkeypatch):
    conversion = load(spec(path=EMBEDDED_MODEL, convert=True))
    with pytest.raises(EngineError, match="evaluates nothing"):
        conversion.prepare(None)
    assert conversion.memory() is None  # the worker's loop asks any engine
    monkeypatch.setattr(torch, "load", None)
    loaded = load(spec(path=tmp_path / safe.FILE_NAME))
    assert loaded.info.backend.startswith("fused"), loaded.info.note
    with pytest.raises(EngineError, match="NoneType"):
        load(spec(path=EMBEDDED_MODEL))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_model_without_shift_has_faster_code_in_this_form(tmp_path, dtype):
    model, kept = make_model(**ARCHITECTURES["without shift"], dtype=getattr(torch, dtype)), tmp_path / safe.FILE_NAME
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kept.write_bytes(safe.to_safe(model))
    assert type(model).__name__ == "MACE" and model.state_dict().keys() == state.keys()  # the original is as it was
    loaded = load(spec(dtype, kept))
    assert loaded.info.backend.startswith("fused"), loaded.info.note


def test_what_can_not_be_described_stays_as_it_is(tmp_path):
    model = make_model(**ARCHITECTURES["one layer"])
    model.__class__ = type("MACELES", (type(model),), {})
    with pytest.raises(EngineError, match="stays a pickle: ValueError: a MACELES can't be described"):
        safe.convert(model, spec())
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_evaluated_stays_as_it_is(tmp_path):
    """It is a model all the same, which its weights are kept for."""
    model = make_model(**ARCHITECTURES["one layer"])
    model.products[0].register_forward_hook(lambda *given: given[-1][:0])
    with pytest.raises(EngineError, match="stays a pickle: ") as caught:
        safe.convert(model, spec())
    assert caught.value.code == "unsupported"
    assert not list(tmp_path.iterdir())


# --- what becomes of a file that was pulled


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Have a file be what was pulled as `mine`; its entry."""
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path / "state"))
    entry = Entry(family="mace", url="https://files.invalid/mine.model")

    def keep(content, pinned=store.FIRST_USE):
        path = tmp_path / "pulled"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
            path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        folder = store.own_folder()
        original = store.copy_in(path, folder, folder / "mine.copy", ".model")
        record = Record(original=original, url=entry.url, source="there", pinned=pinned, when="now")
        store.write_record(folder, "mine", record)
        return entry

    return keep


def stored_files(tmp_path):
    return sorted(path.suffix for path in (tmp_path / "state/weights").iterdir())


class _Runs:
    """In a pickle: a model, and code that is run when it is read."""

    def __init__(self, model, code):
        self.parts = {"model": model, "code": code}

    def __reduce__(self):
        return (eval, ("exec(code) or model", self.parts))


def test_whether_it_is_the_same_is_not_for_the_models_worker_to_say(keep, tmp_path):
    """It computes what its state does not say, and has its process find everything right."""
    code = """
from rootstockd.worker.engines import differences
differences.Difference.within = lambda *given: True
differences.compare = lambda *given: differences.Difference(0.0, 0.0, 0.0, 0.0, 1.0)
model.products[0].register_forward_hook(lambda *given: given[-1] * 1.001)
"""
    entry = keep(_Runs(make_model(**ARCHITECTURES["one layer"]), code))
    stored = with_safe_form("mine", entry, print)
    assert "not converted, so workers run what is in the file: rebuilt, it differs by" in stored.record.note
    assert stored.record.safe is None
    assert stored_files(tmp_path) == [".json", ".model"]


def test_what_is_no_model_is_not_kept(keep, tmp_path):
    entry = keep(b"<html>Please log in</html>")
    with pytest.raises(
        StoreError, match="there has no model, and was not kept: .* is not a MACE model that mace-torch"
    ):
        with_safe_form("mine", entry, print)
    assert stored_files(tmp_path) == []


def test_what_is_no_model_but_the_right_file(keep, tmp_path):
    """It may be one for another version of mace-torch."""
    entry = keep({"not": "a model"}, pinned="the user")
    with pytest.raises(StoreError, match="class dict, so .*\nIt is the file that the user means, so it is kept"):
        with_safe_form("mine", entry, print)
    assert stored_files(tmp_path) == [".json", ".model"]


def test_who_adds_a_model_is_told_that_it_stays_code(keep, tmp_path):
    keep(make_model(**UNKNOWN_GATE))
    said = []
    add("own", tmp_path / "pulled", {"family": "mace"}, "", said.append)
    note = "not converted, so workers run what is in the file: model 'own' stays a pickle: ValueError: its gate is"
    assert any(line.startswith(note) for line in said), said


def test_a_model_that_is_removed_while_it_is_converted(keep, tmp_path):
    """The removal waits, and nothing comes back after it."""
    entry = keep(make_model(**UNKNOWN_GATE))
    command = [sys.executable, "-m", "rootstockd", "models", "remove", "mine", "--socket", str(tmp_path / "none.sock")]
    removals = []

    def remove(_):
        removals.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert removals[0].stdout.readline() == "another command is working on mine; waiting for it\n"

    assert "stays a pickle" in with_safe_form("mine", entry, remove).record.note
    with removals[0] as removal:
        assert "mine was removed" in removal.stdout.read()
    assert removal.returncode == 0
    assert stored_files(tmp_path) == []
    with pytest.raises(StoreError, match="mine was removed again by another command"):
        with_safe_form("mine", entry, print)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda computed: computed.clear(), "other structures"),
        (lambda computed: computed.pop(), "other structures"),
        (lambda computed: computed[1].update(forces=[[0.0, 0.0, 0.0]]), "other structures"),
        (lambda computed: computed[1].update(energy=float("nan")), "it differs by"),
        (lambda computed: computed[1].update(virial=[[1e-3, 0.0, 0.0]] * 3), "it differs by"),
    ],
)
def test_numbers_that_are_not_those_of_the_same_model(change, words):
    def numbers(change=lambda _: None):
        row = [0.0, 0.0, 0.0]
        computed = [{"energy": 1.0, "forces": [row, row], "virial": [row] * 3} for _ in range(3)]
        change(computed)
        return _NUMBERS.validate_json(json.dumps({"float64": computed}))

    assert _compared(numbers(), numbers()) == "bit for bit, in 3 comparisons"
    for rebuilt, original in ((numbers(change), numbers()), (numbers(), numbers(change))):
        with pytest.raises(ModelLoadError, match=words):
            _compared(rebuilt, original)


def test_a_gate_of_ones_own():
    with pytest.raises(EngineError, match="its gate is .*, which is not mace-torch's"):
        safe.convert(make_model(**UNKNOWN_GATE), spec())


def changed(data: bytes, **config) -> bytes:
    """The file with another configuration."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"]["rootstockd"])
    described["config"] |= config
    header["__metadata__"]["rootstockd"] = json.dumps(described)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_a_configuration_names_mace_torchs_own_blocks_and_nothing_else(tmp_path):
    data = safe.to_safe(make_model(**ARCHITECTURES["one layer"]))
    path = tmp_path / "changed"
    safe.from_safe(changed(data), "cpu")
    for name in ("torch", "Activation", "simplify_if_compile", "nothing"):  # the first three are there, and no blocks
        path.write_bytes(changed(data, interaction_cls=name))
        with pytest.raises(EngineError, match="is not a MACE model"):
            load(spec(path=path))


def test_a_file_that_is_cut_off(tmp_path):
    data, path = safe.to_safe(make_model(**ARCHITECTURES["one layer"])), tmp_path / "short"
    for length in (0, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(EngineError, match="is not a MACE model"):
            load(spec(path=path))


class _Marks:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_what_is_called_so_is_never_unpickled(tmp_path):
    """Whatever a model that was being converted has written there."""
    path = tmp_path / "evil.safetensors"
    path.write_bytes(pickle.dumps(_Marks(str(tmp_path / "ran"))))
    with pytest.raises(EngineError, match="is not a MACE model"):
        load(spec(path=path))
    with pytest.raises(StoreError, match="is not of that form"):
        _safe_form(path, 1000)
    assert not (tmp_path / "ran").exists()
