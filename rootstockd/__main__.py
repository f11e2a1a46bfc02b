"""The command `rootstockd`, also as `python -m rootstockd`."""

import sys


def main() -> None:
    """Run the command, or say what it takes to have it: a client's installation holds no daemon."""
    try:
        from rootstockd.cli import main as command  # noqa: PLC0415
    except ModuleNotFoundError as error:
        sys.exit(f"rootstockd: {error}.\nInstall the daemon with its needs: pip install 'rootstockd[daemon]'")
    command(prog_name="rootstockd")


if __name__ == "__main__":
    main()
