"""Reading a model's file: what was hashed is what gets loaded, and nothing else is."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import sha256
from rootstockd.worker.engines import EngineError, ModelSpec, read_weights
from rootstockd.worker.files import digest_of


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """So many bytes more than this process has by now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def spec(path: Path, digest: str) -> ModelSpec:
    return ModelSpec("mine", "mace", "cpu", "float64", str(path), digest)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "mine.model"
    path.write_bytes(os.urandom(100_000))
    return path


def test_the_right_file(weights):
    assert read_weights(spec(weights, sha256(weights))) == weights.read_bytes()


@pytest.mark.parametrize("how", ["longer", "shorter", "one bit", "empty", "another"])
def test_a_file_that_is_not_the_one_meant(weights, how):
    digest, data = sha256(weights), weights.read_bytes()
    changed = {"longer": data + b"\0", "shorter": data[:-1], "empty": b"", "another": os.urandom(len(data))}
    changed["one bit"] = bytes([data[0] ^ 1]) + data[1:]
    weights.write_bytes(changed[how])
    with pytest.raises(EngineError) as caught:
        read_weights(spec(weights, digest))
    assert caught.value.code == "model-load"
    for word in ("'mine'", str(weights), digest, sha256(weights)):
        assert word in caught.value.message
    assert f'sha256 = "{sha256(weights)}"' in caught.value.hint


def test_another_file_that_does_not_fit_the_memory_is_told_so_as_well(weights):
    """Models are unloaded for the one that is meant."""
    digest = sha256(weights)
    with limited_memory(256 * 2**20):
        os.truncate(weights, 2**30)
        with pytest.raises(EngineError, match="the file is another"):
            read_weights(spec(weights, digest))
        with pytest.raises(MemoryError):
            read_weights(spec(weights, digest_of(weights)))


def test_without_a_hash_nothing_is_loaded(weights):
    with pytest.raises(EngineError, match="not loaded"):
        read_weights(spec(weights, ""))


@pytest.mark.parametrize("kind", ["nothing", "folder", "fifo", "device", "unreadable"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / "mine.model"
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "unreadable":
            path = Path("/proc/self/mem")  # root can read any file that is one
    with pytest.raises(EngineError, match=str(path)) as caught:
        read_weights(spec(path, "0" * 64))
    assert caught.value.code == "model-load"
