"""Programs that dial in, for tests: `python stand_in.py WAY [SOCKET]`, of the standard library alone.

They bind each atom to the origin by a spring, in atomic units. `aims` and `vasp`, where it is as stiff as the element's
number, are fakes of FHI-aims and VASP: they read the input of these, and answer as their documents and patches say. In
`aims` and `electrons` charge and spin shift the energy. Others do what no program should.
"""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

NUMBERS = {"H": 1, "O": 8, "Si": 14, "Cu": 29}


class Client:
    """i-PI's client."""

    def __init__(self, name):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(f"/tmp/ipi_{name}")

    def read(self, size):
        data = b""
        while len(data) < size:
            chunk = self.socket.recv(size - len(data))
            if not chunk:
                sys.exit("the driver has gone")
            data += chunk
        return data

    def header(self):
        return self.read(12).decode().strip()

    def write(self, header, data=b""):
        self.socket.sendall(header.ljust(12).encode() + data)

    def structure(self):
        cell = struct.unpack("<9d", self.read(72))
        self.read(72)
        (natoms,) = struct.unpack("<i", self.read(4))
        return cell, list(struct.unpack(f"<{3 * natoms}d", self.read(24 * natoms)))

    def answer(self, energy, forces, virial=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), behind=b""):
        natoms = len(forces) // 3
        numbers = struct.pack(f"<di{3 * natoms}d9d", energy, natoms, *forces, *virial)
        self.write("FORCEREADY", numbers + struct.pack("<i", 0) + behind)


def serve(name, stiffness, *, shift=0.0, asks=True, before=lambda positions: None, answer=Client.answer):
    """Be a client until EXIT.

    Args:
        stiffness: of each atom's spring.
        shift: of the energy.
        asks: for INIT, as most do; otherwise it is ready from the beginning.
        before: what it does with each structure.
        answer: how it does so.
    """
    client, data = Client(name), None
    while (header := client.header()) != "EXIT":
        if header == "STATUS":
            client.write("NEEDINIT" if asks else "READY" if data is None else "HAVEDATA")
        elif header == "INIT":
            _, size = struct.unpack("<ii", client.read(8))
            client.read(size)
            asks = False
        elif header == "POSDATA":
            _, data = client.structure()
            before(data)
        elif header == "GETFORCE":
            springs = [k for k in stiffness for _ in range(3)] if stiffness else [1.0] * len(data)
            assert len(springs) == len(data)
            energy = shift + sum(0.5 * k * x * x for k, x in zip(springs, data, strict=True))
            answer(client, energy, [-k * x for k, x in zip(springs, data, strict=True)])
            data = None
        else:
            sys.exit(f"no such message: {header}")
    print("bye")


def aims():
    """FHI-aims, a fake: `use_pimd_wrapper UNIX:NAME PORT` in control.in, and what geometry.in has; it asks for INIT."""
    control = [line.split() for line in Path("control.in").read_text().splitlines()]
    (address,) = [words[1] for words in control if words[:1] == ["use_pimd_wrapper"]]
    species = [words[1] for words in control if words[:1] == ["species"]]
    (charge,) = [float(words[1]) for words in control if words[:1] == ["charge"]]
    atoms = [line.split()[4] for line in Path("geometry.in").read_text().splitlines() if line.startswith("atom ")]
    assert set(atoms) == set(species)
    assert address.startswith("UNIX:")
    serve(address[5:], [NUMBERS[symbol] for symbol in atoms], shift=charge)


def vasp():
    """VASP with i-PI's patch, a fake: IBRION = 23, INET and IHOST in INCAR; it never asks for INIT."""
    incar = dict(line.split(" = ") for line in Path("INCAR").read_text().splitlines() if line)
    assert (incar["IBRION"], incar["INET"]) == ("23", "0")
    lines = Path("POSCAR").read_text().splitlines()
    kinds = zip(lines[5].split(), lines[6].split(), strict=True)
    symbols = [symbol for symbol, count in kinds for _ in range(int(count))]
    assert len(lines) == 8 + len(symbols)
    assert Path("POTCAR").read_text().split() == lines[5].split(), "a POTCAR of other elements, or in another order"
    serve(incar["IHOST"], [NUMBERS[symbol] for symbol in symbols], asks=False)


def electrons():
    """A program whose input says charge and spin."""
    name, charge, spin = Path("input").read_text().split()
    serve(name, [], shift=float(charge) + float(spin) / 8)


def far(positions):
    """Whether the first atom is where programs get into trouble."""
    return abs(positions[0]) > 50


def die_far_off(positions):
    if far(positions):
        print("no convergence has been achieved")
        sys.exit(7)


def die_after_three(count=[0]):  # noqa: B006 - it counts
    count[0] += 1
    if count[0] > 3:
        os.abort()


def answer_twice(client, energy, forces):
    """Behind the answer stands the beginning of another, of a structure that it has not seen."""
    client.answer(energy, forces, behind=b"READY       FORCEREADY  ")


def with_numbers(change):
    return lambda client, energy, forces: client.answer(*change(energy, forces))


def denied():
    """Say what a program can't do, and end."""
    attempts = {
        "network": lambda: socket.socket(socket.AF_INET),
        "write": lambda: Path("/tmp/written-by-a-program").touch(),
        "signal": lambda: os.kill(int(os.environ["VICTIM"]), 0),
        "guard": lambda: os.kill(os.getppid(), 0),
        "mode": lambda: Path("input").chmod(0o777),
        "namespace": lambda: subprocess.run(["unshare", "--user", "true"], check=True, stderr=subprocess.DEVNULL),
    }
    for name, attempt in attempts.items():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            attempt()
            print("could", name)
    print("that was all")
    sys.exit(1)


def meet(count, name):
    """A function that waits until so many of a worker's programs are at work at the same time, and what undoes it."""
    group, own = name.split("/")
    mark = Path("/dev/shm", f"{group}-{own}")

    def wait(positions):
        mark.touch()
        deadline = time.monotonic() + 30
        while len(list(mark.parent.glob(f"{group}-*"))) < count:
            if time.monotonic() > deadline:
                sys.exit("nobody came")
            time.sleep(0.01)

    return wait, lambda: mark.unlink(missing_ok=True)


def main(way, name=""):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # one that tidies up
    if way in ("aims", "vasp", "electrons", "denied"):
        globals()[way]()
    elif way == "dies":
        sys.exit("no licence was found")
    elif way == "never":
        time.sleep(1000)
    elif way == "garbage":
        client = Client(name)  # kept, or its socket would be closed at once
        client.socket.sendall(b"\xff" * 1000)
        time.sleep(1000)
    elif way == "twice":
        client = Client(name)
        with contextlib.suppress(OSError):
            Client(name)
            client.socket.close()  # the second was taken: the first is worth nothing
        client.socket.close()
        sys.exit("nobody was there for the second")
    elif way == "tidy":
        segment = Path("/dev/shm", name.replace("/", "-"))  # as an MPI has
        segment.touch()
        ballast = bytearray(os.urandom(2**20) * 64)
        try:
            serve(name, [])
        finally:
            segment.unlink()
            del ballast
    elif way == "meet":
        wait, leave = meet(2, name)
        try:
            serve(name, [], before=wait)
        finally:
            leave()
    elif way == "slain" and not (before := Path.cwd().parent / "slain").exists():
        before.touch()  # the next one of this worker lives
        os.kill(os.getpid(), signal.SIGKILL)
    elif way == "ranks":
        ranks = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        print(ranks.pid)
        serve(name, [])
    else:
        serve(
            name,
            [],
            before={
                "mortal": lambda positions: die_after_three(),
                "choosy": die_far_off,
                "hangs": lambda positions: time.sleep(1000 * far(positions)),
            }.get(way, lambda positions: None),
            answer={
                "nan": with_numbers(lambda energy, forces: (energy, [float("nan"), *forces[1:]])),
                "infinite": with_numbers(lambda energy, forces: (float("inf"), forces)),
                "short": with_numbers(lambda energy, forces: (energy, forces[3:])),
                "long": with_numbers(lambda energy, forces: (energy, [*forces, 0.0, 0.0, 0.0])),
                "surplus": answer_twice,
                "no virial": with_numbers(lambda energy, forces: (energy, forces, [0.0] * 9)),
            }.get(way, Client.answer),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
