"""Which devices there are, and what a confined worker can't do for itself."""

from pathlib import Path

import pytest

from rootstockd.devices import make_device_files


@pytest.mark.parametrize("there", [False, True])
def test_the_file_that_cuda_would_have_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """By NVIDIA's program, with its privileges, and only where it is missing."""
    told, uvm = tmp_path / "told", tmp_path / "nvidia-uvm"
    program = tmp_path / "nvidia-modprobe"
    program.write_text(f'#!/bin/sh\necho "$@" > {told}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if there:
        uvm.touch()
    make_device_files(uvm)
    assert there is not told.exists()
    if not there:
        assert told.read_text() == "-u -c 0\n"


def test_where_that_program_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    make_device_files(tmp_path / "nvidia-uvm")
