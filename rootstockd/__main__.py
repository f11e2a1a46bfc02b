"""The command `rootstockd`, also as `python -m rootstockd`."""

import os
import sys
from importlib.util import find_spec

NEEDS = (
    *("click", "fastapi", "h11", "platformdirs", "prometheus_client", "psutil", "pydantic", "pynvml", "requests"),
    *("rich", "tomlkit", "uv", "uvicorn", "uvloop"),
)
"""Modules of the extra `daemon`: some of them may be there for another reason."""


def main() -> None:
    """Run the command, or say what it takes to have it: a client's installation holds no daemon."""
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        sys.exit(
            f"rootstockd: this installation is for clients only, without {', '.join(missing)}.\n"
            "Install the daemon with what it needs: pip install 'rootstockd[daemon]'"
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


if __name__ == "__main__":
    main()
