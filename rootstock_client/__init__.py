"""The thin client of rootstockd: standard library and numpy, and ASE where an ASE calculator is wanted.

>>> from rootstock_client import RootstockClient
>>> atoms.calc = RootstockClient().calculator("mace-emt-small")  # doctest: +SKIP
"""

from rootstock_client.client import RootstockClient
from rootstock_client.errors import (
    ConnectionLostError,
    DaemonNotFoundError,
    ProtocolError,
    RootstockError,
)

__all__ = [
    "ConnectionLostError",
    "DaemonNotFoundError",
    "ProtocolError",
    "RootstockClient",
    "RootstockError",
    "__version__",
]

__version__ = "0.1.0"
