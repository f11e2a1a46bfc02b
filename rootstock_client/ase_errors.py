"""Our errors as ASE has its own: whoever catches `CalculationFailed` catches an evaluation that has failed here.

They are the very same classes, which get ASE's as bases when this module is imported; calculators do. In `errors.py`
they can't: the daemon and commands have that too, and ASE's calculators take 0.1 s to import. What says that there is
no daemon, or another potential, is none of ASE's: scripts that pass over structures that fail would pass over all.
"""

from __future__ import annotations

import copyreg
from typing import Any

from ase.calculators.calculator import (
    CalculationFailed,
    CalculatorError,
    CalculatorSetupError,
    PropertyNotImplementedError,
)

from rootstock_client.errors import (
    EvaluationError,
    InvalidInitError,
    InvalidStructureError,
    LimitError,
    ModelLoadError,
    RootstockError,
    UnknownElementError,
    UnknownModelError,
    UnsupportedError,
)

OF_ASE: dict[type[RootstockError], type[Exception]] = {
    EvaluationError: CalculationFailed,
    InvalidStructureError: CalculationFailed,
    InvalidInitError: CalculatorSetupError,
    UnknownModelError: CalculatorSetupError,
    UnknownElementError: CalculatorSetupError,
    ModelLoadError: CalculatorSetupError,
    LimitError: CalculatorError,
    UnsupportedError: PropertyNotImplementedError,
}
"""What each is, and what derives from it."""


def _again(kind: type[RootstockError], *arguments: str) -> RootstockError:
    """An error from its pickle. By its place whoever unpickles it has this module, and can catch it as ASE's."""
    return kind(*arguments)


def _reduced(error: RootstockError) -> tuple[Any, ...]:
    return _again, (type(error), *error.args), error.__dict__


for _ours, _ases in OF_ASE.items():
    _ours.__bases__ = (*(base for base in _ours.__bases__ if not issubclass(_ases, base)), _ases)
for _ours in RootstockError.by_code.values():
    copyreg.pickle(_ours, _reduced)
