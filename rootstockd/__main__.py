"""The command `rootstockd`, also as `python -m rootstockd`."""

import contextlib
import io
import os
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

NEEDS = (
    *("fastapi", "h11", "platformdirs", "prometheus_client", "psutil", "pydantic", "pynvml", "requests"),
    *("rich", "tomlkit", "uv", "uvicorn", "uvloop"),
)
"""Modules of the extra `daemon`: some of them may be there for another reason."""
FOR_CLIENTS = ("attach", "--version")
"""What does without them: `attach` runs where a driver does."""


def main() -> None:
    """Run the command; that of another installation, or say what it takes to have it, if this one is a client's."""
    _open_closed()
    for stream in (sys.stdout, sys.stderr):  # of another encoding than UTF-8, it lacks some characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        for other in _next_in_path():
            with contextlib.suppress(OSError):  # it is of an interpreter that is not there, or not for this user
                os.execv(other, [other, *sys.argv[1:]])  # noqa: S606 - whatever the user would have called
        if not any(word in FOR_CLIENTS for word in sys.argv[1:2]):
            sys.exit(
                f"rootstockd: this installation is for clients only, without {', '.join(missing)}.\n"
                f"It has {' and '.join(FOR_CLIENTS)}. For the rest call the daemon's command by its path, such as "
                "/opt/rootstockd/bin/rootstockd, or install what it needs: pip install 'rootstockd[daemon]'"
            )
    from rootstockd.cli import main as command  # noqa: PLC0415
    from rootstockd.worker.failures import disk_full  # noqa: PLC0415

    try:
        command(prog_name="rootstockd")
    except OSError as error:
        if not disk_full(error):
            raise
        # what is left to be written can't be, and Python would try once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        at = f"{error.filename}: " if error.filename else ""
        sys.exit(f"Error: {at}{error.strerror}. Make room and try again.")


def _open_closed() -> None:
    """Have standard streams that are closed be /dev/null, or libraries and workers wrote into what is opened next."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode)  # noqa: SIM115 - for as long as the process lives
            os.set_inheritable(stream.fileno(), True)  # noqa: FBT003 - the os module has no other way
            setattr(sys, name, stream)


def _next_in_path() -> Iterator[str]:
    """The commands that this one hides from whoever has several in their PATH."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    here = os.path.dirname(sys.argv[0])  # noqa: PTH120 - as PATH spells it
    behind = folders[folders.index(here) + 1 :] if here in folders else folders
    own = Path(sysconfig.get_path("scripts")).resolve()
    found = (Path(folder, "rootstockd") for folder in behind)
    return (str(path) for path in found if path.resolve().parent != own and os.access(path, os.X_OK))


if __name__ == "__main__":
    main()
