"""The manual pages are those of the command as it is."""

import runpy
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from rootstockd.cli import main

MAN = Path(__file__).parent.parent / "docs/man"


def test_they_are_up_to_date() -> None:
    pages = dict(runpy.run_path(str(MAN / "generate.py"))["pages"]())
    assert {path.name: path.read_text() for path in MAN.glob("man1/*")} == pages, "run `make man`"
    assert {"rootstockd.1", "rootstockd-start.1", "rootstockd-models-pull.1"} <= set(pages)


@pytest.mark.skipif(shutil.which("man") is None, reason="there is no man")
def test_they_can_be_read() -> None:
    done = subprocess.run(
        ["man", "--warnings", "-l", MAN / "man1/rootstockd-doctor.1"], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    for heading in ("NAME", "SYNOPSIS", "OPTIONS", "ENVIRONMENT", "EXIT STATUS", "SEE ALSO"):
        assert f"\n{heading}\n" in done.stdout


@pytest.mark.parametrize(
    "group", [main, *(command for command in main.commands.values() if isinstance(command, click.Group))]
)
def test_no_list_of_commands_cuts_a_sentence(group: click.Group) -> None:
    text = group.get_help(click.Context(group, info_name="rootstockd", terminal_width=80))
    assert "..." not in text.partition("Commands:")[2]
