"""A short run of the chaos benchmark: everything at once, and nothing differs, fails or stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
if not (REPOSITORY / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not here: this is no checkout", allow_module_level=True)

SECONDS = float(os.environ.get("ROOTSTOCKD_CHAOS_SECONDS", "20"))


@pytest.mark.timeout(SECONDS + 600)
def test_chaos(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--seconds", str(SECONDS), "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    faults = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + faults
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert result["evaluations"]["total"] > 0
    assert result["faults"]["total"] > 0
