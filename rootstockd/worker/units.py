"""The two constants between engines' units (eV, Å) and a slot's atomic units (Hartree, Bohr).

The same numbers as in ``rootstock_client.units``, which a worker's environment does not have.
"""

BOHR = 0.5291772105638411
"""One Bohr in Å (CODATA 2014, as ``ase.units``)."""

HARTREE = 27.211386024367243
"""One Hartree in eV (CODATA 2014, as ``ase.units``)."""
