"""The thin client of rootstockd: standard library and numpy, and ASE where an ASE calculator is wanted.

>>> from rootstock_client import RootstockClient
>>> atoms.calc = RootstockClient().calculator("mace-emt-small")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rootstock_client.errors import (
    ConnectionLostError,
    DaemonNotFoundError,
    ProtocolError,
    RootstockError,
)

if TYPE_CHECKING:
    from rootstock_client.client import RootstockClient

__all__ = [
    "ConnectionLostError",
    "DaemonNotFoundError",
    "ProtocolError",
    "RootstockClient",
    "RootstockError",
    "__version__",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> type[RootstockClient]:
    """RootstockClient, imported when it is first asked for: commands do without numpy, which takes long."""
    if name != "RootstockClient":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rootstock_client.client import RootstockClient  # noqa: PLC0415

    globals()[name] = RootstockClient
    return RootstockClient
