"""MACE models in a form that is not code: the same numbers, and nothing in it that runs."""

import json
import os
import pickle
import struct

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mace")
pytest.importorskip("safetensors")

from test_mace_backends import ARCHITECTURES, STRUCTURES, engine, make_model, task  # noqa: E402

from conftest import EMBEDDED_MODEL, sha256  # noqa: E402
from rootstockd.models.convert import _take  # noqa: E402
from rootstockd.models.store import StoreError  # noqa: E402
from rootstockd.worker.engines import EngineError, ModelSpec  # noqa: E402
from rootstockd.worker.engines.mace import load, safe  # noqa: E402


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
    ["as MACE-MP-0 small", "density, as the embedded model", "one layer", "two heads", "repulsion and Agnesi"],
)
def test_the_same_numbers(architecture):
    model = make_model(**ARCHITECTURES[architecture])
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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_workers_load_it_and_unpickle_nothing(tmp_path, monkeypatch):
    conversion = load(spec(path=EMBEDDED_MODEL, convert=True))
    assert "bit for bit" in conversion.info.note
    with pytest.raises(EngineError, match="evaluates nothing"):
        conversion.prepare(None)
    monkeypatch.setattr(torch, "load", None)
    loaded = load(spec(path=tmp_path / safe.FILE_NAME))
    assert loaded.info.backend.startswith("fused"), loaded.info.note
    with pytest.raises(EngineError, match="NoneType"):
        load(spec(path=EMBEDDED_MODEL))


def test_what_can_not_be_described_stays_as_it_is(tmp_path):
    with pytest.raises(EngineError, match="stays a pickle: ValueError: a MACE can't be described"):
        safe.convert(make_model(**ARCHITECTURES["without shift"]), spec())
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_another_when_it_is_rebuilt(tmp_path):
    model = make_model(**ARCHITECTURES["one layer"])
    model.products[0].register_forward_hook(lambda *given: given[-1] * 1.001)
    with pytest.raises(EngineError, match="stays a pickle: rebuilt, it differs by"):
        safe.convert(model, spec())
    assert not list(tmp_path.iterdir())


def test_a_gate_of_ones_own():
    with pytest.raises(EngineError, match="its gate is .*, which is not mace-torch's"):
        safe.convert(make_model(gate=torch.nn.functional.softplus), spec())


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
        _take(path, tmp_path, tmp_path / "copy", ".safetensors", 1000)
    assert not (tmp_path / "ran").exists()
