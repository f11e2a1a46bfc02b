"""mace-torch without what it imports for training alone."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import rootstockd

pytest.importorskip("mace")

MODEL = Path(rootstockd.__file__).parent / "models/embedded/mace-emt-small.model"
MACE = "from rootstockd.worker.engines import mace"


def run(program: str) -> str:
    """What a program prints, in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_only_training_needs_is_not_imported_and_is_there_for_whoever_asks_later():
    program = f"""
        {MACE}
        import sys, torch
        torch.load("{MODEL}", weights_only=False)
        from rootstockd.worker.engines.mace.imports import LEFT_OUT
        print([name for name in (*LEFT_OUT, "pandas", "matplotlib", "torch._dynamo") if name in sys.modules])
        import h5py, scipy.signal, torchmetrics, mace.cli.visualise_train, torch._dynamo
        assert issubclass(h5py.File, h5py.Group)
        assert scipy.signal.find_peaks([0, 1, 0])[0].tolist() == [1]
        print(mace.cli.visualise_train.TrainingPlotter.__module__)
    """
    assert run(program).splitlines() == ["[]", "mace.cli.visualise_train"]


def test_exact_does_not_import_a_compiler():
    program = f"""
        {MACE}
        import sys, torch
        from rootstockd.worker.engines.deterministic import deterministic
        with deterministic():
            print(torch.are_deterministic_algorithms_enabled())
        left = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        print(*left, "torch._inductor.config" in sys.modules)
        import torch._inductor.config as compiler
        with deterministic():
            print(compiler.deterministic)
        print(compiler.deterministic)
    """
    assert run(program).splitlines() == ["True", "False False False", "True", "False"]


def test_what_is_left_out_fails_when_it_is_used():
    program = f"""
        {MACE}
        from mace.tools.train import MACELoss  # a Metric of torchmetrics
        try:
            MACELoss(None)
        except ImportError as error:
            print(error)
    """
    assert "is left out of workers" in run(program)
