"""Path-integral MD of copper with i-PI, whose beads go through rootstockd in one batch.

Start a daemon first: `rootstockd start --model mace-emt-small`. Then `pip install ipi` and `python pimd_ipi.py`, in an
environment that has the client; it need not have the daemon. It writes i-PI's input, starts i-PI, and has `rootstockd
attach` give its connection to the daemon. The kinetic energy is more than the classical 3/2 kT by what the nuclei's
quantum nature adds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from ase import units
from ase.build import bulk

INPUT = """<simulation verbosity='quiet' safe_stride='100000' sockets_prefix='{folder}/'>
  <output prefix='pimd'>
    <properties stride='1' filename='out'>
      [step, conserved{{electronvolt}}, potential{{electronvolt}}, kinetic_cv{{electronvolt}}]
    </properties>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>1</seed></prng>
  <ffsocket name='rootstockd' mode='unix' pbc='False'>
    <address>driver</address> <latency>1e-3</latency> <batch_size>{beads}</batch_size>
  </ffsocket>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='ase' units='angstrom'>init.xyz</file>
      <velocities mode='thermal' units='kelvin'>{temperature}</velocities>
    </initialize>
    <forces><force forcefield='rootstockd'/></forces>
    <ensemble><temperature units='kelvin'>{temperature}</temperature></ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'>1</timestep>
        <thermostat mode='pile_l'><tau units='femtosecond'>50</tau></thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""


def simulate(folder: Path, options: argparse.Namespace) -> np.ndarray:
    """Run i-PI in a folder, and `rootstockd attach` beside it until it ends.

    Returns:
        For each step, after one column of their numbers: conserved, potential and kinetic energy of all atoms, in eV.
    """
    atoms = bulk("Cu", cubic=True) * 2
    atoms.rattle(0.02, seed=1)
    atoms.write(folder / "init.xyz")
    text = INPUT.format(folder=folder, steps=options.steps, beads=options.beads, temperature=options.temperature)
    (folder / "input.xml").write_text(text)
    attach = [
        *(sys.executable, "-m", "rootstockd", "attach", str(folder / "driver"), "--model", options.model),
        *("--structure", str(folder / "init.xyz")),  # i-PI does not say which elements its atoms are
    ]
    log = folder / "i-pi.log"
    with log.open("w") as file, subprocess.Popen(["i-pi", "input.xml"], cwd=folder, stdout=file, stderr=file) as driver:
        attached = subprocess.run(attach, check=False).returncode
        if attached:  # i-PI would wait for another engine
            driver.kill()
    if attached:
        raise SystemExit(attached)  # it has said why
    if driver.returncode:
        raise SystemExit(f"i-PI has failed:\n{log.read_text()}")
    return np.loadtxt(folder / "pimd.out")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mace-emt-small", help="catalogue name")
    parser.add_argument("--steps", type=int, default=200, help="steps of 1 fs")
    parser.add_argument("--beads", type=int, default=16, help="of the ring polymer")
    parser.add_argument("--temperature", type=float, default=100.0, help="K")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="pimd-") as folder:  # a short path: sockets' names end at 107 bytes
        _, conserved, _, kinetic = simulate(Path(folder), options).T
    equilibrated = kinetic[len(kinetic) // 2 :] / 32  # eV/atom
    result = {
        "steps": options.steps,
        "kinetic_ev_per_atom": float(equilibrated.mean()),
        "classical_ev_per_atom": 1.5 * units.kB * options.temperature,
        "drift_mev_per_atom": 1000 * float(np.abs(conserved - conserved[0]).max()) / 32,
    }
    print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
