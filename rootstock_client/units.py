"""The two constants between ASE's units (eV, Å) and the wire's atomic units (Hartree, Bohr).

CODATA 2014 as ASE computes them (``ase.units``). Client and worker must use the very same numbers, so that a
position travels to the engine and back without changing; a test compares both with ASE.
"""

BOHR = 0.5291772105638411
"""One Bohr in Å."""

HARTREE = 27.211386024367243
"""One Hartree in eV."""
