"""Relax many structures with Dask: on this machine, or on the nodes of a Slurm cluster.

`python screening_dask.py` relaxes 200 random alloys here, and with `--nodes 4 --slurm=--gres=gpu:1` in four jobs. There
need be no daemon: the workers start their node's, and stop it at the end. A structure that fails costs only itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from ase.build import bulk
from ase.optimize import FIRE
from distributed import Client, LocalCluster, as_completed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rootstock_client.dask import RootstockPlugin, calculator

ELEMENTS = ["Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au"]


def relax(seed: int, model: str) -> dict[str, Any]:
    """Relax the atoms of a random alloy on an fcc lattice; what a worker does.

    Returns:
        The seed, the formula, the energy (eV per atom) and how many evaluations it took.
    """
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", a=3.9, cubic=True) * 2  # 32 atoms
    atoms.symbols = rng.choice(ELEMENTS, len(atoms))
    atoms.rattle(0.05, rng=rng)
    atoms.calc = calculator(model)
    optimizer = FIRE(atoms, logfile=None)
    if not optimizer.run(fmax=0.05, steps=300):
        raise RuntimeError(f"structure {seed}, {atoms.symbols}: not converged to 0.05 eV/Å in 300 steps")
    return {
        "seed": seed,
        "formula": str(atoms.symbols),
        "energy": atoms.get_potential_energy() / len(atoms),
        "evaluations": optimizer.nsteps + 1,
    }


def make_cluster(options: argparse.Namespace) -> Any:
    """Workers in processes of this machine, or one in each of so many Slurm jobs."""
    if not options.nodes:
        return LocalCluster(n_workers=options.workers, threads_per_worker=options.threads, dashboard_address=":0")
    from dask_jobqueue import SLURMCluster  # pip install dask-jobqueue  # noqa: PLC0415

    return SLURMCluster(
        n_workers=options.nodes,
        cores=options.threads,
        processes=1,
        memory=options.memory,
        walltime=options.time,
        job_extra_directives=options.slurm,
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mace-emt-small", help="catalogue name")
    parser.add_argument("--count", type=int, default=200, help="how many structures")
    parser.add_argument("--workers", type=int, default=2, help="worker processes on this machine")
    parser.add_argument("--threads", type=int, default=4, help="structures at a time in each worker")
    parser.add_argument("--nodes", type=int, default=0, help="Slurm jobs instead, one worker in each")
    parser.add_argument(
        "--slurm", action="append", default=[], help="a directive for them, such as --slurm=--gres=gpu:1"
    )
    parser.add_argument("--memory", default="8GB", help="memory of each, without the model's on the GPU")
    parser.add_argument("--time", default="01:00:00", help="time limit of each")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()

    results: list[dict[str, Any]] = []
    failures: list[str] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with make_cluster(options) as cluster, Client(cluster) as client, Progress(*columns) as progress:
        client.register_plugin(RootstockPlugin(start=["--model", options.model]))
        client.wait_for_workers(1)
        bar = progress.add_task("", total=options.count)
        start = time.perf_counter()
        futures = client.map(relax, range(options.count), model=options.model)
        done = as_completed(futures, with_results=True, raise_errors=False)
        del futures  # each is let go when its result is here: nothing is computed twice if its node dies later
        for future, result in done:
            if future.status == "finished":
                results.append(result)
            else:
                failures.append(str(future.exception()))
                progress.console.print(failures[-1], style="red", markup=False)
            evaluations = sum(result["evaluations"] for result in results)
            seconds = time.perf_counter() - start
            rates = f"{len(results) / seconds:.1f} structures/s, {evaluations / seconds:.0f} evaluations/s"
            progress.update(bar, advance=1, description=rates)
        client.unregister_worker_plugin(RootstockPlugin.name)  # the daemons end before Slurm cancels their jobs
    print(f"{len(results)} relaxed, {len(failures)} failed, {seconds:.1f} s: {rates}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "results": results, "failures": failures}))


if __name__ == "__main__":
    main()
