"""Which devices there are, and what a confined worker can't do for itself."""

from pathlib import Path

import pytest

from rootstockd.host.devices import Gpu, default_names, hidden_driver, make_device_files


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


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, ("cuda:0",)),
        ({"CUDA_VISIBLE_DEVICES": "2,1"}, ("cuda:0",)),
        ({"CUDA_VISIBLE_DEVICES": "2,1", "SLURM_JOB_ID": "7"}, ("cuda:0", "cuda:1")),
        ({"SLURM_JOB_ID": "7"}, ("cuda:0",)),  # a Slurm that knows of no GPUs
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_JOB_ID": "7"}, ("cpu",)),  # how it says that the job has none
    ],
)
def test_the_devices_of_whoever_names_none(variables: dict[str, str], names: tuple[str, ...]) -> None:
    """A job in Slurm has all GPUs that it was given."""
    assert default_names([Gpu(f"GPU-{i}", "pretend") for i in range(4)], variables) == names


def test_without_gpus_it_is_the_cpu() -> None:
    assert default_names([], {}) == ("cpu",)


@pytest.mark.parametrize(
    ("variables", "loaded", "wrong"),
    [
        ({}, True, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, True, False),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True, False),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_JOB_ID": "7"}, True, False),
        ({"CUDA_VISIBLE_DEVICES": "0"}, False, False),  # left over from somewhere, where there never was a GPU
        ({"CUDA_VISIBLE_DEVICES": "0"}, True, True),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_ID": "7"}, False, False),  # a Slurm whose GPUs are another maker's
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_ID": "7"}, True, True),
    ],
)
def test_who_was_given_a_gpu_does_not_compute_on_the_cpu(
    variables: dict[str, str], loaded: bool, wrong: bool, tmp_path: Path
) -> None:
    version = tmp_path / "version"
    if loaded:
        version.touch()
    said = hidden_driver(variables, version)
    assert bool(said) is wrong
    assert not wrong or ("CUDA_VISIBLE_DEVICES is 0, and NVML" in said and "--device cpu" in said)
