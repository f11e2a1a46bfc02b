"""Rootstock in an environment of its own, with one model that does nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import platformdirs

VERSION = "1.6.4"
CHECKPOINT = "noop"
TIMEOUT = 600

# Rootstock's installer wants uv and a network; an environment directory is all that its calculator looks for.
ENVIRONMENT = '''"""A calculator that does nothing."""

CHECKPOINTS = {"noop": "noop"}


def setup(checkpoint, device):
    import numpy as np
    from ase.calculators.calculator import Calculator, all_changes

    class Noop(Calculator):
        implemented_properties = ["energy", "free_energy", "forces", "stress"]

        def calculate(self, atoms=None, properties=None, system_changes=all_changes):
            self.atoms = atoms.copy()
            zeros = np.zeros((len(atoms), 3))
            self.results = {"energy": 0.0, "free_energy": 0.0, "forces": zeros, "stress": np.zeros(6)}

    return Noop()
'''


def python_of(root: Path) -> Path:
    """The interpreter of that environment; the client runs in it too."""
    return root / "envs" / CHECKPOINT / "bin" / "python"


def rootstock(*, make: bool) -> tuple[Path | None, str]:
    """The root of an installation, made now if there is none in the cache; and its version, or why there is none."""
    root = Path(platformdirs.user_cache_dir("rootstockd-benchmarks")) / f"rootstock-{VERSION}"
    environment = root / "envs" / CHECKPOINT
    source = environment / "env_source.py"
    if not source.exists():
        if not make:
            return None, "not measured, it has no environment yet"
        try:
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run(
                [sys.executable, "-m", "venv", environment], check=True, capture_output=True, timeout=TIMEOUT
            )
            install: list[str | Path] = [python_of(root), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
            package = f"rootstock=={VERSION}"
            subprocess.run([*install, package], check=True, capture_output=True, timeout=TIMEOUT)
            (root / "environments").mkdir()
            (root / "environments" / f"{CHECKPOINT}.py").write_text(ENVIRONMENT)
            source.write_text(ENVIRONMENT)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or b""
            return (
                None,
                f"not measured, its environment could not be made: {said.decode()[-300:] or type(error).__name__}",
            )
    return root, VERSION
