"""MACE with cuEquivariance's modules in place of e3nn's, against mace-torch on the CPU.

    python by_cuequivariance.py PACKAGES DEVICE

PACKAGES is the folder where cuequivariance-torch lies, which most MACE workers had better not import; DEVICE is `cpu`
or `cuda`. cuEquivariance's kernels are for GPUs; on a CPU it computes the same polynomials in plain torch, with the
same layouts and, where the sum over neighbours is a part of the product, the same indices. Both forms are tried there,
on a GPU the one that mace-torch has on it, in ordinary passes and in recorded ones.

Prints a line of JSON for each: architecture, structure, whether the sum is part of the product, how far it is off,
whether that is rounding, and how many recorded passes there are.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

sys.path.append(sys.argv[1])
warnings.simplefilter("ignore")

import cuequivariance_torch  # noqa: E402
import mace.cli.convert_e3nn_cueq as conversion  # noqa: E402
import torch  # noqa: E402
from mace.modules import wrapper_ops  # noqa: E402
from test_mace_backends import ARCHITECTURES, STRUCTURES, engine, make_model, task  # noqa: E402

from rootstockd.worker.engines.differences import TOLERANCE, compare  # noqa: E402
from rootstockd.worker.engines.mace import begin_cuda, captured, timing  # noqa: E402
from rootstockd.worker.engines.mace.cueq import converted  # noqa: E402
from rootstockd.worker.engines.mace.device import DeviceBackend  # noqa: E402
from rootstockd.worker.engines.mace.reference import ReferenceBackend  # noqa: E402

WHOLE = {"use_reduced_cg": False}  # as mace_run_train has it
TRIED = (
    *(("as MACE-MP-0 medium", {}), ("density, as the embedded model", {})),
    *(("two heads", {}), ("repulsion and Agnesi", {})),
    *(("as MACE-MP-0 medium", WHOLE), ("density, as the embedded model", WHOLE)),
)
DEVICE = sys.argv[2]
ON_GPU = DEVICE != "cpu"
LOW = {"hidden": "32x0e + 32x1o" if ON_GPU else "4x0e + 4x1o", "max_ell": 2, "correlation": 2}
"""Orders that are converted in a second; those of MACE-MP-0 take half a minute each."""

captured.WORTHWHILE, captured.SEEN, timing.TIMED = (
    float("inf"),
    -1000,
    1,
)  # each shape is recorded when it first comes


class Polynomial(cuequivariance_torch.SegmentedPolynomial):
    """One that says how many weights an edge has, as on a GPU its kernels do, whatever computes it."""

    def __init__(self, polynomial: Any, **options: Any) -> None:
        super().__init__(polynomial, **options)
        self.m.buffer_num_segments, self.m.operand_extent = [1], polynomial.inputs[0].size


settings = conversion.CuEquivarianceConfig
torch.set_default_dtype(torch.float64)
if ON_GPU:
    begin_cuda("test")
else:
    wrapper_ops.cuet.SegmentedPolynomial = Polynomial
for architecture, more in TRIED:
    options = ARCHITECTURES[architecture] | LOW | more
    model = make_model(**options)
    of, reference = engine(model), ReferenceBackend(model, "cpu")
    for fused in (True,) if ON_GPU else (False, True):
        # mace-torch has it so on a GPU
        conversion.CuEquivarianceConfig = lambda **given: settings(**given | {"conv_fusion": fused})  # noqa: B023
        twin = converted(make_model(**options).to(DEVICE), DEVICE)
        assert hasattr(twin.interactions[0], "conv_fusion") is fused
        backend = DeviceBackend(twin, "cuequivariance")
        for name in ("alloy", "wire", "molecule", "left-handed", "an atom alone"):
            structure = task(of, STRUCTURES[name], head=model.heads[-1])
            right = reference.evaluate([structure])[0]
            for _ in range(2):  # the second is a replay
                difference = compare(backend.evaluate([structure])[0], right)
                within = difference.within(TOLERANCE["float64"])
                said = {"architecture": architecture, "structure": name, "fused": fused, "off": str(difference)}
                print(json.dumps({**said, "within": within, "recorded": len(backend._captures._buckets)}), flush=True)
        assert not backend.note, backend.note
