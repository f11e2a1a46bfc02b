"""No word of a client's gets to a file, an import or a shell: names are looked up in the catalogue and nowhere else.

Each name here would, if anything took it for a path or a program, make a file: the trap, which stays away.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk

from conftest import RunningDaemon
from rootstock_client import RootstockClient, ipi
from rootstock_client.control import request
from rootstock_client.errors import (
    InvalidInitError,
    RootstockError,
    UnknownModelError,
    UnsupportedError,
)

SYSTEM: dict[str, Any] = {"rootstock": 1, "numbers": [29], "pbc": [True] * 3}


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def trapped(start_shared_daemon: Callable[..., RunningDaemon], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon, a malicious model file, and the file that shows that it was loaded."""
    folder = tmp_path_factory.mktemp("names")
    sprung, evil = folder / "sprung", folder / "evil.model"
    evil.write_bytes(pickle.dumps(Trap(sprung)))
    (folder / "trap.py").write_text(f"open({os.fspath(sprung)!r}, 'w')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        # unconfined, or it could not make the file even if it were loaded
        (folder / "more.toml").write_text(
            '[open]\nfamily = "ase"\nconfine = false\narguments = { calculator = "ase.calculators.emt:EMT" }\n'
        )
        daemon = start_shared_daemon(
            "--catalogue", str(folder / "more.toml"), "--model", "open", "--model", "mace-emt-small"
        )
    return daemon, folder


def names(folder: Path) -> list[str]:
    evil, sprung = folder / "evil.model", folder / "sprung"
    return [
        str(evil),
        os.path.relpath(evil, "/"),
        f"file://{evil}",
        f"../../../../../../../..{evil}",
        "../../x",
        "/etc/passwd",
        "embedded/mace-emt-small.model",
        "catalogue.toml",
        "trap",
        "trap:Trap",
        "__import__('trap')",
        "__import__",
        "ase",
        "mace",
        f"$(touch {sprung})",
        f"`touch {sprung}`",
        f"; touch {sprung};",
        f"| touch {sprung}",
        "%s%s%s%n",
        "{0.__class__}",
        "emt\0",
        "\0",
        "",
        " emt",
        "emt\n",
        "EMT",
        "émt",
        "\ud800",
        "\u202etme",
        "x" * 200,
        "constructor",
        "[emt]",
    ]


def ask(daemon: RunningDaemon, **fields: Any) -> RootstockError:
    """INIT with these fields, one structure, and the error that comes of it."""
    # by hand: the client's own calculator might not let everything pass
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(daemon.socket))
        sock.sendall(ipi.init_frame(json.dumps(SYSTEM | fields).encode()))
        sock.sendall(ipi.posdata_head(np.eye(3) * 9, np.eye(3), 1) + np.zeros(3).tobytes() + ipi.GETFORCE)
        got = b""
        while len(got) < 16 or len(got) < 16 + int.from_bytes(got[12:16], "little"):
            piece = sock.recv(65536)
            assert piece, got
            got += piece
    assert got[:12] == b"ERROR       ", got[:100]
    return RootstockError.from_json(got[16:])


def test_the_trap_springs(trapped: Any, tmp_path: Path) -> None:
    """Or the tests below would say nothing."""
    for number, program in enumerate(("import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))", "import trap")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "evil.model").write_bytes(pickle.dumps(Trap(folder / "sprung")))
        (folder / "trap.py").write_text(f"open({os.fspath(folder / 'sprung')!r}, 'w')\n")
        subprocess.run([sys.executable, "-c", program, folder / "evil.model"], check=True, cwd=folder)
        assert (folder / "sprung").exists()


def test_models(trapped: Any) -> None:
    daemon, folder = trapped
    for name in names(folder):
        error = ask(daemon, model=name)
        assert isinstance(error, UnknownModelError | InvalidInitError), (name, error)
        assert len(error.message) < 500
    assert isinstance(ask(daemon, model="x" * 100_000), InvalidInitError)
    for wrong in (None, 1, [], ["emt"], {"emt": 1}, True):
        assert isinstance(ask(daemon, model=wrong), InvalidInitError), wrong
    assert not (folder / "sprung").exists()
    assert {model["name"] for model in daemon.client().status()["models"]} == {"open", "mace-emt-small"}


@pytest.mark.parametrize("model", ["open", "mace-emt-small"])
def test_heads(trapped: Any, model: str) -> None:
    """They are compared with those that a model has; EMT has none."""
    daemon, folder = trapped
    for name in names(folder):
        error = ask(daemon, model=model, head=name)
        assert isinstance(error, UnsupportedError | InvalidInitError), (name, error)
    assert not (folder / "sprung").exists()


def test_dtypes_and_what_else_init_may_say(trapped: Any) -> None:
    daemon, folder = trapped
    for name in names(folder):
        assert isinstance(ask(daemon, model="open", dtype=name), InvalidInitError)
        assert isinstance(ask(daemon, model="open", want=[name]), InvalidInitError)
    for field in ("weights", "family", "device", "arguments", "calculator", "sha256", "confine", "__class__"):
        assert isinstance(ask(daemon, model="open", **{field: str(folder / "evil.model")}), InvalidInitError)
    assert not (folder / "sprung").exists()


def test_the_control_socket(trapped: Any) -> None:
    """It has eight routes; those that take a name look it up in the catalogue."""
    daemon, folder = trapped
    routes = request(daemon.socket, "GET", "/openapi.json")["paths"]
    assert {(route, *sorted(methods)) for route, methods in routes.items()} == {
        ("/v1/status", "get"),
        ("/v1/models", "get"),
        ("/v1/loading", "get"),
        ("/metrics", "get"),
        ("/v1/load", "post"),
        ("/v1/unload", "post"),
        ("/v1/stop", "post"),
        ("/v1/reload", "post"),
    }
    for name in names(folder):
        with pytest.raises(RootstockError):
            request(daemon.socket, "POST", "/v1/stop", {"force": name})
        for route in ("/v1/load", "/v1/unload"):
            with pytest.raises(RootstockError):
                request(daemon.socket, "POST", route, {"model": name})
    assert daemon.client().status()["state"] == "ready"
    assert not (folder / "sprung").exists()


def test_a_client_works_beside_all_this(trapped: Any) -> None:
    daemon, _ = trapped
    atoms = bulk("Cu")
    atoms.calc = RootstockClient(daemon.socket).calculator("open")
    assert np.isfinite(atoms.get_potential_energy())
