"""One contestant in a process of its own: `python child.py JSON`.

It takes one JSON command a line on stdin and answers with one JSON line on stdout. Every contestant is run by this
one file, whichever environment's Python that takes (Rootstock's has neither this package nor rootstock_client), so
all of them move the same atoms in the same way and time the same call.

==================================== ==================================================================================
command                              answer
==================================== ==================================================================================
{"do": "system", "natoms": N}        {}: from now on N copper atoms
{"do": "steps", "count": K}          {"seconds": [...]}: K steps, each with new positions
{"do": "run", "seconds": T}          {"seconds": [...], "elapsed": t}: as many steps as fit into T
{"do": "result", "step": K}          {"energy": eV, "forces": eV/Å, "backend": ...}: at the positions of the Kth step
{"do": "quit"}                       {}, and it ends
==================================== ==================================================================================
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HEADER = 12
CELLS = 144  # the cell and its inverse
STARTUP = 60.0
AMPLITUDE = 0.12  # Å
PERIODS = 100, 200  # steps
"""How atoms move: with these one has gone 0.25 Å, and a list with a skin of 0.5 Å is at its end, every 25 to 40 steps,
as in MD of copper at 300 K with 1 to 2 fs."""


def receive(sock: socket.socket, view: memoryview) -> None:
    """Fill `view`; EOFError where the stream ends."""
    have = 0
    while have < len(view):
        size = sock.recv_into(view[have:])
        if size == 0:
            raise EOFError
        have += size


def repeats(natoms: int) -> tuple[int, int, int]:
    """The most cubic block of 4-atom cells that has at least `natoms` atoms, and just those where that is a block."""
    cells = -(-natoms // 4)
    if natoms % 4 == 0:
        for a in range(round(cells ** (1 / 3)), 0, -1):
            if cells % a == 0:
                rest = cells // a
                b = next(b for b in range(round(rest**0.5), 0, -1) if rest % b == 0)
                if rest // b <= 2 * a:
                    return a, b, rest // b
    side = 1
    while 4 * side**3 < natoms:
        side += 1
    return side, side, side


def copper(natoms: int) -> Any:
    """So many atoms of fcc copper, periodic; cut off a larger block where no block has that many."""
    from ase.build import bulk  # noqa: PLC0415 - not every contestant needs ASE

    return (bulk("Cu", cubic=True) * repeats(natoms))[:natoms]


def noop_calculator() -> Any:
    """What ASE's own peers call at the far end: zeros at once, in the way an ASE calculator gives them."""
    import numpy as np  # noqa: PLC0415
    from ase.calculators.calculator import Calculator, all_changes  # noqa: PLC0415

    class Noop(Calculator):  # type: ignore[misc]
        implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012 - ASE's way

        def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
            del properties, system_changes
            self.atoms = atoms.copy()
            zeros = np.zeros((len(atoms), 3))
            self.results = {"energy": 0.0, "free_energy": 0.0, "forces": zeros, "stress": np.zeros(6)}

    return Noop()


class Arm:
    """A contestant that is an ASE calculator; others override `system` and `step`.

    Args:
        options: what the command line said. With `stress` a step has energy, forces and stress, which is what
            MACECalculator always computes, and without it forces and energy.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.atoms: Any = None
        self.backend: str | None = None
        self._lattice: Any = None
        self._step = 0

    def calculator(self) -> Any:
        """The calculator for the next system; called for each."""
        raise NotImplementedError

    def system(self, natoms: int) -> None:
        """Take up a system of so many atoms."""
        self.atoms = copper(natoms)
        self._lattice = self.atoms.positions.copy()
        self._phases, self._periods = self._motion()
        self._step = 0
        self.atoms.calc = self.calculator()

    def _motion(self) -> Any:
        """Phase and period of each atom's oscillation in each direction."""
        import numpy as np  # noqa: PLC0415

        rng = np.random.default_rng(self.options.get("seed", 1))
        return rng.uniform(0, 2 * np.pi, self._lattice.shape), rng.uniform(*PERIODS, self._lattice.shape)

    def place(self, step: int) -> Any:
        """The positions of a step: the same for all contestants, and never the same twice for one."""
        import numpy as np  # noqa: PLC0415

        return self._lattice + AMPLITUDE * np.sin(2 * np.pi * step / self._periods + self._phases)

    def move(self) -> None:
        """New positions."""
        self._step += 1
        self.atoms.positions[:] = self.place(self._step)

    def step(self) -> float:
        """One step; its seconds."""
        self.move()
        start = time.perf_counter()
        if self.options.get("stress"):
            self.atoms.get_stress()  # and with it, in one evaluation, the forces
        self.atoms.get_forces()
        return time.perf_counter() - start

    def result(self, step: int) -> dict[str, Any]:
        """What it computes at the positions of a step."""
        self.atoms.positions[:] = self.place(step)
        forces = self.atoms.get_forces().tolist()
        return {"energy": float(self.atoms.get_potential_energy()), "forces": forces, "backend": self.backend}

    def close(self) -> None:
        """Whatever must be ended."""


class NoopInProcess(Arm):
    """ASE's own layer, with nothing behind it."""

    def calculator(self) -> Any:
        return noop_calculator()


class Rootstockd(Arm):
    """Options: socket, model, dtype (the model's own if there is none)."""

    def calculator(self) -> Any:
        from rootstock_client import RootstockClient  # noqa: PLC0415

        client = RootstockClient(self.options["socket"])
        return client.calculator(self.options["model"], dtype=self.options.get("dtype"))

    def result(self, step: int) -> dict[str, Any]:
        return {**super().result(step), "backend": self.atoms.calc.backend}


class Wire(Rootstockd):
    """Connection.evaluate alone: positions are in Bohr and the message's head is made before the clock runs."""

    def system(self, natoms: int) -> None:
        import numpy as np  # noqa: PLC0415

        from rootstock_client import ipi  # noqa: PLC0415
        from rootstock_client.connection import Connection  # noqa: PLC0415
        from rootstock_client.units import BOHR  # noqa: PLC0415

        super().system(natoms)
        cell = self.atoms.cell.array / BOHR
        self._head = ipi.posdata_head(cell, np.linalg.inv(cell), natoms)
        numbers, pbc, want = self.atoms.numbers.tolist(), [True] * 3, ["energy", "forces"]
        init = {"rootstock": 1, "model": self.options["model"], "numbers": numbers, "pbc": pbc, "want": want}
        self._init = json.dumps(init).encode()
        self._positions = [self.place(step) / BOHR for step in range(3)]
        self._forces = np.empty_like(self._positions[0])
        self._connection = Connection(Path(self.options["socket"]))

    def step(self) -> float:
        self._step += 1
        positions = self._positions[self._step % len(self._positions)]
        start = time.perf_counter()
        self._connection.evaluate(self._init, self._head, positions, self._forces)
        return time.perf_counter() - start


class Worker(Arm):
    """A worker of rootstockd without the daemon: from `E` to `E` over its socket, positions already in the slot."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        import dataclasses  # noqa: PLC0415

        from rootstockd.environments.finding import beside_the_daemon  # noqa: PLC0415
        from rootstockd.host.handed_over import handed_over  # noqa: PLC0415
        from rootstockd.processes.worker_process import worker_command  # noqa: PLC0415
        from rootstockd.worker.engines import ModelSpec  # noqa: PLC0415

        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spec = ModelSpec("noop", "noop", "cpu", "float64")
        with handed_over(json.dumps(dataclasses.asdict(spec))) as file:
            descriptors = [theirs.fileno(), file.fileno()]
            command = [*worker_command(beside_the_daemon("noop")), *map(str, descriptors)]
            self._process = subprocess.Popen(command, pass_fds=descriptors)
        theirs.close()
        said = [b"V"]
        while said[-1] != b"R":  # before that it says how far it has come
            said.append(self._channel.recv(65536)[:1])
            assert said[-1] in (b"V", b"P", b"R"), said
        self._number = 0

    def system(self, natoms: int) -> None:
        from rootstockd.worker.slots import Slot  # noqa: PLC0415

        super().system(natoms)
        self._number += 1
        slot = Slot.create(natoms)
        slot.numbers[:] = self.atoms.numbers
        slot.cells[0] = self.atoms.cell.array
        slot.positions[0] = self.atoms.positions
        fields: dict[str, Any] = {"slot": self._number, "natoms": natoms, "frames": 1, "pbc": [True] * 3}
        fields.update(charge=None, spin=None, head=None, exact=False, tolerance=None, session=0)
        fields.update(stress=False, energies=False)
        self._channel.send(b"A" + json.dumps(fields).encode())
        socket.send_fds(self._channel, [b"M"], [slot.fd])

    def calculator(self) -> Any:
        return None

    def step(self) -> float:
        message = b"E" + self._number.to_bytes(4, "little")
        start = time.perf_counter()
        self._channel.send(message)
        answer = self._channel.recv(65536)
        seconds = time.perf_counter() - start
        assert answer == message
        return seconds

    def close(self) -> None:
        self._channel.close()
        self._process.wait()


class Echo(Arm):
    """The floor: the bytes of a step each way over a Unix socket, to a process that does nothing with them."""

    def system(self, natoms: int) -> None:
        if self.atoms is not None:
            self.close()
        super().system(natoms)
        request = HEADER + CELLS + 4 + 24 * natoms + HEADER
        reply = HEADER + 8 + 4 + 24 * natoms + 72 + 4
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        options = {"arm": "echo-server", "fd": theirs.fileno(), "request": request, "reply": reply}
        arguments = [sys.executable, __file__, json.dumps(options)]
        self._process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()])
        theirs.close()
        self._buffers: list[Any] = [
            bytes(HEADER + CELLS + 4),
            memoryview(self._lattice).cast("B"),
            bytes(HEADER),
        ]
        self._answer = memoryview(bytearray(reply))

    def calculator(self) -> Any:
        return None

    def step(self) -> float:
        start = time.perf_counter()
        sent = self._sock.sendmsg(self._buffers)
        for buffer in self._buffers:
            if sent < len(buffer):
                self._sock.sendall(memoryview(buffer)[sent:])
                sent = 0
            else:
                sent -= len(buffer)
        receive(self._sock, self._answer)
        return time.perf_counter() - start

    def close(self) -> None:
        if self.atoms is not None:
            self._sock.close()
            self._process.wait()


def serve_echo(options: dict[str, Any]) -> None:
    """The echo's far end."""
    sock = socket.socket(fileno=options["fd"])
    request, reply = memoryview(bytearray(options["request"])), bytes(options["reply"])
    with contextlib.suppress(EOFError, OSError):
        while True:
            receive(sock, request)
            sock.sendall(reply)


class SocketIO(Arm):
    """ASE's SocketIOCalculator here, its SocketClient with a no-op calculator in another process."""

    _calculator: Any = None

    def calculator(self) -> Any:
        from ase.calculators.socketio import SocketIOCalculator  # noqa: PLC0415

        self.close()
        name = f"rootstockd-benchmark-{os.getpid()}"
        self._calculator = SocketIOCalculator(unixsocket=name, timeout=STARTUP)
        options = {"arm": "socketio-client", "name": name, "natoms": len(self.atoms)}
        self._process = subprocess.Popen([sys.executable, __file__, json.dumps(options)])
        return self._calculator

    def close(self) -> None:
        if self._calculator is not None:
            self._calculator.close()
            self._process.wait()


def serve_socketio(options: dict[str, Any]) -> None:
    """ASE's SocketClient."""
    from ase.calculators.socketio import SocketClient, SocketClosed  # noqa: PLC0415

    atoms = copper(options["natoms"])
    atoms.calc = noop_calculator()
    with contextlib.suppress(SocketClosed, ConnectionError):
        SocketClient(unixsocket=options["name"]).run(atoms, use_stress=False)


class Rootstock(Arm):
    """Rootstock itself. Options: root, checkpoint."""

    _calculator: Any = None

    def calculator(self) -> Any:
        from rootstock import RootstockCalculator  # type: ignore[import-not-found]  # noqa: PLC0415

        if self._calculator is None:
            self._calculator = RootstockCalculator(
                root=self.options["root"], checkpoint=self.options["checkpoint"], device="cpu"
            )
        return self._calculator

    def close(self) -> None:
        if self._calculator is not None:
            self._calculator.close()


class Mace(Arm):
    """mace-torch's own calculator in this process. Options: weights, dtype, device."""

    _calculator: Any = None

    def calculator(self) -> Any:
        if self._calculator is None:
            from mace.calculators import MACECalculator  # noqa: PLC0415

            self._calculator = MACECalculator(
                model_paths=self.options["weights"],
                device=self.options["device"],
                default_dtype=self.options["dtype"],
            )
        return self._calculator


class SameBackend(Arm):
    """What a worker computes with, in this process: its engine, its ModelSpec. Options: spec."""

    _engine: Any = None
    _system: Any = None
    _last: Any = None

    def calculator(self) -> Any:
        return None

    def system(self, natoms: int) -> None:
        from rootstockd.worker.engines import ModelSpec, System  # noqa: PLC0415
        from rootstockd.worker.engines.loading import load_engine  # noqa: PLC0415

        super().system(natoms)
        if self._engine is None:
            self._engine = load_engine(ModelSpec(**self.options["spec"]))
        self._system = self._engine.prepare(System(self.atoms.numbers, (True, True, True)))

    def _task(self, step: int) -> Any:
        from rootstockd.worker.engines import Task  # noqa: PLC0415

        return Task(
            self._system,
            self.atoms.cell.array,
            self.place(step),
            stress=self.options.get("stress", False),
            energies=False,
        )

    def step(self) -> float:
        self._step += 1
        task = self._task(self._step)
        start = time.perf_counter()
        self._last = self._engine.evaluate([task])[0]
        return time.perf_counter() - start

    def result(self, step: int) -> dict[str, Any]:
        found = self._last if step == self._step else self._engine.evaluate([self._task(step)])[0]
        return {"energy": found.energy, "forces": found.forces.tolist(), "backend": found.backend or None}


ARMS: dict[str, type[Arm]] = {
    "noop in process": NoopInProcess,
    "rootstockd": Rootstockd,
    "wire": Wire,
    "worker": Worker,
    "echo": Echo,
    "ASE SocketIO": SocketIO,
    "Rootstock": Rootstock,
    "MACECalculator": Mace,
    "MACECalculator, float64": Mace,
    **dict.fromkeys(("same backend", "chosen backend", "chosen backend, no stress", "next backend"), SameBackend),
}


def obey(arm: Arm, command: dict[str, Any]) -> dict[str, Any]:
    """Do one command; its answer."""
    what = command["do"]
    if what == "system":
        arm.system(command["natoms"])
    elif what == "steps":
        seconds = [arm.step() for _ in range(command["count"])]
        return {"seconds": list(array.array("d", seconds))}
    elif what == "run":
        start = time.perf_counter()
        seconds = []
        while (elapsed := time.perf_counter() - start) < command["seconds"] or not seconds:
            seconds.append(arm.step())
        return {"seconds": seconds, "elapsed": elapsed}
    elif what == "result":
        return arm.result(command["step"])
    elif what == "quit":
        arm.close()
    return {}


def main() -> None:
    """Run the contestant that the command line names."""
    options = json.loads(sys.argv[1])
    if options["arm"] == "echo-server":
        return serve_echo(options)
    if options["arm"] == "socketio-client":
        return serve_socketio(options)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    arm = ARMS[options["arm"]](options)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(obey(arm, command)), file=out, flush=True)
        if command["do"] == "quit":
            return None
    arm.close()
    return None


if __name__ == "__main__":
    main()
