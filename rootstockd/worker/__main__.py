"""`python -S .../rootstockd/worker/__main__.py FD SPEC [CONFINEMENT]`: a worker, started by the daemon alone.

FD is the descriptor of its end of the socket, SPEC that of a file which has a ModelSpec as JSON (arguments are for all
users to read), CONFINEMENT what `confine` takes as JSON; without it the worker keeps its rights. `import MODULES
CONFINEMENT` imports the modules of a JSON list, no more: so a build of an environment is tried.

The file is run by its path, with any Python: of the tree that it lies in only `rootstockd.worker` becomes importable,
and what the daemon needs can't get in the way of what the engine needs. With -S Python runs nothing of what is
installed before the worker has given its rights away.
"""

import sys

if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # this folder: what lies in it is no top-level module

import contextlib
import faulthandler
import fcntl
import importlib.util
import json
import logging
import os
import signal
import site
import socket
import traceback
import types
from pathlib import Path


def make_importable() -> None:
    """Have this folder be the package `rootstockd.worker`, and nothing be importable that lies beside it."""
    folder = Path(__file__).absolute().parent
    outer = types.ModuleType("rootstockd")
    outer.__path__ = []
    sys.modules["rootstockd"] = outer
    spec = importlib.util.spec_from_file_location(
        "rootstockd.worker", str(folder / "__init__.py"), submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["rootstockd.worker"] = package
    spec.loader.exec_module(package)
    outer.worker = package  # type: ignore[attr-defined]


def enter_environment() -> None:
    """Make what is installed importable, as Python does at its start without -S.

    This is the first that runs code of packages: their `.pth` files, `sitecustomize`, `usercustomize`.
    """
    site.main()
    if not sys.flags.ignore_environment:
        return
    # a built environment is held: its folder is locked as long as this process lives, and not removed meanwhile...
    with contextlib.suppress(OSError):  # not every file system has locks
        fcntl.flock(os.open(sys.prefix, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH | fcntl.LOCK_NB)
    # ...and its own packages go before modules that the operator adds
    tree = Path(__file__).absolute().parent.parent.parent.resolve()
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path += [path for path in added if path and Path(path).resolve() != tree]


def work() -> None:
    """Be a worker; does not return."""
    from rootstockd.worker.confine import confine, die_with_parent
    from rootstockd.worker.memory import limit_memory, open_peak
    from rootstockd.worker.version import PROTOCOL, SLOT_LAYOUT

    # a terminal's Ctrl-C, and what Slurm sends to all processes of a job, is for the daemon, which then drains
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # the daemon reads what is printed, and has the time and the worker's name before each line of its log
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    faulthandler.enable()
    channel = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(channel)
    # first: all that comes after, the other arguments too, may be of another version
    channel.send(b"V" + json.dumps({"protocol": PROTOCOL, "slots": SLOT_LAYOUT}).encode())
    limit_memory()
    open_peak()
    with os.fdopen(int(sys.argv[2]), "rb") as file:
        spec = file.read()
    missing = confine(**json.loads(sys.argv[3])) if len(sys.argv) > 3 else None  # noqa: PLR2004

    status = 1
    try:
        enter_environment()
        from rootstockd.worker.compiled import remove_broken

        # only now: numpy is a package, and starts threads when it is imported
        from rootstockd.worker.engines import ModelSpec
        from rootstockd.worker.loop import main, send

        if missing is not None:
            send(channel, b"C", {"missing": missing})
            remove_broken(Path(os.environ["NUMBA_CACHE_DIR"]))  # its model's own, as whatever a confined worker writes
        status = main(channel, ModelSpec(**json.loads(spec)))
    except BaseException:  # whatever it is, the process must end, and threads that an engine left must not keep it
        with contextlib.suppress(Exception):
            traceback.print_exc()
    with contextlib.suppress(Exception):  # the log may be full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # torch's own teardown takes long and has nothing left to do


def try_imports() -> None:
    """Import modules with a worker's rights. Python's own error says which can't be."""
    from rootstockd.worker.confine import confine

    confine(**json.loads(sys.argv[3]))
    enter_environment()
    for module in json.loads(sys.argv[2]):
        importlib.import_module(module)


if __name__ == "__main__":
    make_importable()
    if sys.argv[1] == "import":
        try_imports()
    else:
        work()
