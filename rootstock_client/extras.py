"""What comes with a result beside its numbers."""

from __future__ import annotations

import binascii
import json

import numpy as np

from rootstock_client.errors import ProtocolError
from rootstock_client.ipi import FloatArray


def read_extras(text: bytes, natoms: int) -> tuple[str | None, str | None, FloatArray]:
    """What computed, its fingerprint, and per-atom energies, shape (natoms,), in Hartree.

    Args:
        text: the extras.
        natoms: of how many atoms energies were asked for.

    Raises:
        ProtocolError: the extras are no such thing.
    """
    try:
        extras = json.loads(text or b"{}")
        backend, fingerprint = extras.get("backend"), extras.get("fingerprint")
        values = np.frombuffer(binascii.a2b_base64(extras["energies"] if natoms else b""), "<f8")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ProtocolError(f"extras that can't be read: {text[:80]!r}.") from error
    if values.shape != (natoms,) or not np.isfinite(values).all():
        raise ProtocolError(f"extras without {natoms} per-atom energies: {text[:80]!r}.")
    return backend, fingerprint, values
