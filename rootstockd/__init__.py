"""rootstockd: warm machine-learned interatomic potentials behind one daemon a node."""

__version__ = "0.1.0"
