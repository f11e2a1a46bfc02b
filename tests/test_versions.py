"""What is written in two places is the same in both."""

from __future__ import annotations

from pathlib import Path

import rootstock_client
import rootstockd

ROOT = Path(__file__).parent.parent


def test_version() -> None:
    assert rootstock_client.__version__ == rootstockd.__version__
    assert f"version: {rootstockd.__version__}\n" in (ROOT / "CITATION.cff").read_text().replace('"', "")
