"""The command `rootstockd`, also as `python -m rootstockd`."""

import sys
from importlib.util import find_spec

NEEDS = (
    *("click", "fastapi", "platformdirs", "prometheus_client", "psutil", "pydantic", "pynvml", "requests", "rich"),
    *("tomlkit", "uv", "uvicorn", "uvloop"),
)
"""Modules of the extra `daemon`: some of them may be there for another reason."""


def main() -> None:
    """Run the command, or say what it takes to have it: a client's installation holds no daemon."""
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        sys.exit(
            f"rootstockd: this is an installation for clients, without {', '.join(missing)}.\n"
            "Install the daemon with its needs: pip install 'rootstockd[daemon]'"
        )
    from rootstockd.cli import main as command  # noqa: PLC0415

    command(prog_name="rootstockd")


if __name__ == "__main__":
    main()
