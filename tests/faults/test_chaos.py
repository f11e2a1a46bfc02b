"""A short run of the chaos benchmark: everything at once, and nothing differs, fails or stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
if not (REPOSITORY / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not here: this is no checkout", allow_module_level=True)

from benchmarks import chaos  # noqa: E402

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


def told(**words: object) -> chaos.Tally:
    tally = chaos.Tally()
    tally.told({"session": 1, "model": "emt", "exact": True, "evaluations": 25, "off": None})
    if words:
        tally.told({"session": 1, "model": "emt", "exact": True, "evaluations": 25, **words})
    return tally


NOTHING: dict[str, int] = {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((told(off=1e-12), Counter(), NOTHING, 0, 0), "1 rounds differ"),
        ((told(error="ConnectionLostError", message="m"), Counter(), NOTHING, 0, 0), "jobs saw errors"),
        ((told(error="EvaluationError", message="m"), Counter(), NOTHING, 0, 0), "given up after 0 faults"),
        ((told(descriptors_left=1), Counter(), NOTHING, 0, 0), "left with descriptors"),
        ((told(), Counter(), {"slots": 1}, 0, 0), "left with more than before"),
        ((told(), Counter(), NOTHING, 1e9, 0), "grew by 1000 MB"),
        ((told(), Counter(), NOTHING, 0, 2), "2 processes outlived"),
    ],
)
def test_the_verdict_on_what_is_wrong(arguments: tuple[Any, ...], words: str) -> None:
    (wrong,) = chaos.verdict(*arguments)
    assert words in wrong


def test_the_verdict_on_what_is_right() -> None:
    given_up = told(error="EvaluationError", message="m")  # two workers were killed over it: that is said, not hidden
    assert chaos.verdict(given_up, Counter({"worker killed": 2}), NOTHING, 1e6, 0) == []
