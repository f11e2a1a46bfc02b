"""MACE: mace-torch as the reference, and beside it whatever is faster and was found to give the same numbers.

A backend is compared with the reference when the model loads (`checks.structures`), and on the first structure of every
session, whose answer is the reference's own unless it is large and a part was compared. One that differs at loading is
switched off, and of those that agree the fastest is used (`selection`); one that differs on a session's structure is
not used for that session: others' structures, which may be ill-conditioned, are no reason to take it from all.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import numpy as np
import torch

from rootstockd.worker import stages
from rootstockd.worker.engines import (
    EngineBrokenError,
    EngineError,
    EngineInfo,
    ModelSpec,
    Result,
    Task,
    check_system,
    choose_head,
    guarded,
    raise_if_gpus,
    read_weights,
)
from rootstockd.worker.engines import System as Wanted
from rootstockd.worker.engines.deterministic import deterministic, fuse_nothing
from rootstockd.worker.engines.differences import TOLERANCE, compare
from rootstockd.worker.engines.mace import checks, safe
from rootstockd.worker.engines.mace.candidates import Backend, NotApplicableError, backends_for
from rootstockd.worker.engines.mace.reference import Check, ReferenceBackend, System, heads_of, mace
from rootstockd.worker.engines.mace.selection import Selection, warm
from rootstockd.worker.failures import describe, in_disorder, out_of_memory
from rootstockd.worker.memory import gpu_memory

log = logging.getLogger(__name__)

REMEMBERED = 100_000
"""Sessions' systems whose first structure was compared; past that all are forgotten, and compared again."""
TRIES = 10
"""Structures that are compared of a system with elements that have no neighbours in them, which say nothing of those;
further ones only when they have some."""


class MaceEngine:
    """A MACE model on one device.

    Args:
        model: the model, on its device and in its dtype.
        spec: what was asked for.
        reference: mace-torch.
        candidates: what is faster, as a rule the fastest first; one that gives the reference's numbers is used.
        why: what is in the way of faster ones.
    """

    def __init__(
        self, model: Any, spec: ModelSpec, reference: Backend, candidates: Sequence[Backend], why: str = ""
    ) -> None:
        self._name, self._dtype = spec.name, spec.dtype
        self._trusted: dict[Check, bool] = {}
        self._agreed: dict[tuple[object, ...], frozenset[int]] = {}
        """Elements that had neighbours in a session's structures in which the fast backend agreed, by the rest of
        their `Check`."""
        self._lonely: Counter[Check] = Counter()
        """How many structures of a system were compared, while it has elements that are not among those."""
        self._doubted: WeakSet[System] = WeakSet()
        """Systems that do without the fast backend, as long as they are there."""
        self._doubts, self._doubt_of, self._heard = 0, "", ""
        """Of how many sessions they are, why the last of them does, and what the fast backend has said last."""
        self._reference = reference
        self._elements = [int(z) for z in model.atomic_numbers]
        self._heads = tuple(heads_of(model))
        self._understood = _understood(model)
        self._embedded: dict[str, dict[str, Any]] = getattr(model, "embedding_specs", None) or {}
        self._cutoff = float(model.r_max)
        self._versions = f"mace-torch {mace.__version__}, torch {torch.__version__}, {spec.device}"
        selection = Selection(spec, reference, self._elements, self._heads)
        self._fast, notes = selection.best(candidates)
        self._why = "; ".join(filter(None, [why, *notes]))
        self._info = EngineInfo(
            properties=("energy", "free_energy", "forces", "stress", "energies"),
            elements=tuple(self._elements),
            heads=self._heads,
            backend=f"{(self._fast or reference).name} ({self._versions})",
            note=self._why,
        )

    @property
    def info(self) -> EngineInfo:
        """What it says of itself; another object when the fast backend says something else, or others do without it."""
        doubts = len({system.session for system in self._doubted}) if self._doubts or self._doubted else 0
        heard = "" if self._fast is None else self._fast.note
        if (doubts, heard) != (self._doubts, self._heard):
            self._doubts, self._heard = doubts, heard
            self._info = replace(self._info, note=self._note())
        return self._info

    def prepare(self, system: Wanted) -> System:
        """What the backends need to know."""
        check_system(self._name, self._info, system, self._understood)
        head = choose_head(self._name, self._heads, system.head)
        assert head is not None  # every MACE has heads
        elements = tuple(sorted(set(system.numbers.tolist())))
        tolerance = TOLERANCE[self._dtype] if system.tolerance is None else system.tolerance
        # mace-torch's own defaults for what a structure does not say: no charge, a singlet
        properties = {
            "total_charge": 0.0 if system.charge is None else system.charge,
            "total_spin": 1.0 if system.spin is None else system.spin,
        }
        self._check_categories(properties)
        return System(
            numbers=system.numbers,
            pbc=system.pbc,
            head=head,
            head_index=self._heads.index(head),
            properties=properties,
            exact=system.exact,
            tolerance=tolerance,
            session=system.session,
            check=(elements, system.session, system.pbc, head, tolerance),
        )

    def _check_categories(self, properties: dict[str, float]) -> None:
        """Refuse charges and spins that the model knows no category for: mace-torch would take the nearest below.

        Raises:
            EngineError: there is one.
        """
        for key, how in self._embedded.items():
            if how["type"] != "categorical" or (value := properties.get(key)) is None:
                continue
            least, count = -how.get("offset", 0), how["num_classes"]
            if value % 1 or not least <= value < least + count:
                word = key.rpartition("_")[2]
                raise EngineError(
                    "unsupported",
                    f"model {self._name!r} knows whole numbers from {least} to {least + count - 1} for the {word}, and "
                    f"this is {value!r}",
                    f"Round it, if it was summed up; or leave the {word} out.",
                )

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """Evaluate exact ones alone and by the reference, first structures by both, all others in one pass."""
        return guarded(self._evaluate, tasks)

    def memory(self) -> int | None:
        """What torch has of the GPU."""
        return gpu_memory()

    def _evaluate(self, tasks: list[Task]) -> list[Result]:
        results: dict[int, Result] = {}
        together = []
        for index, task in enumerate(tasks):
            system: System = task.system
            if system.exact:
                with deterministic():
                    # with stress mace-torch has other shifts, by rounding: whoever asks for it, bits are the same
                    results[index] = self._reference.evaluate([replace(task, stress=True)])[0]
            elif self._fast is not None and (trusted := self._trust(task)) is not True:
                if trusted is None:
                    results[index] = self._first(task, self._fast)
                else:
                    self._doubted.add(system)
                    results[index] = self._reference.evaluate([task])[0]
            else:
                together.append(index)
        if together:
            results.update(zip(together, self._together([tasks[index] for index in together])))
        return [results[index] for index in range(len(tasks))]

    def _together(self, tasks: list[Task]) -> list[Result]:
        """In one pass; or each by whatever can, where one of them is nothing for the fast backend."""
        try:
            return (self._fast or self._reference).evaluate(tasks)
        except NotApplicableError:
            if len(tasks) == 1:
                return self._reference.evaluate(tasks)
            return [result for task in tasks for result in self._together([task])]

    # --- checks

    def _trust(self, task: Task) -> bool | None:
        """Whether a structure gets the fast backend; None if it is to be compared.

        That is not needed where all of its elements were in others of the session that agreed; nor, when TRIES of its
        system have been compared, where all that have neighbours in it were.
        """
        check: Check = task.system.check
        if (trusted := self._trusted.get(check)) is not None:
            return trusted
        agreed = self._agreed.get(check[1:], frozenset())
        enough = agreed.issuperset(check[0]) or (
            self._lonely[check] >= TRIES and agreed.issuperset(checks.joined(task, self._cutoff))
        )
        return True if enough else None

    def _first(self, task: Task, fast: Backend) -> Result:
        """A session's first structure, or one with elements that are new to it, or had no neighbours so far."""
        system: System = task.system
        task = replace(task, stress=True, energies=True)  # so that whatever may be asked for later is compared
        sample, reference = self._sampled(task)
        whole = reference if sample is task else None
        if not _finite(reference):  # two atoms on one spot: the next structure says more of the fast one
            return whole or self._reference.evaluate([task])[0]
        trusted: bool | None
        try:
            difference = compare(fast.evaluate([sample])[0], reference)
            trusted = difference.within(system.tolerance) or (None if difference.may_be_rounding else False)
            why = f"{fast.name} differs from {self._reference.name} by {difference}"
            if trusted and whole is None:
                whole = fast.evaluate([task])[0]
        except Exception as error:  # the reference has answered
            broken = isinstance(error, EngineBrokenError) or in_disorder(error)
            if broken or (out_of_memory(error) and whole is None):
                raise
            no_verdict = isinstance(error, NotApplicableError) or out_of_memory(error)  # says nothing of its numbers
            trusted, why = None if no_verdict else False, f"{fast.name}: {type(error).__name__}: {error}"
        if trusted is not None:  # else the next structure is compared
            self._remember(task, sample, "" if trusted else why)
        return whole or self._reference.evaluate([task])[0]

    def _sampled(self, task: Task) -> tuple[Task, Result]:
        """The structure, or a piece of it, and what the reference makes of it."""
        sample = checks.piece(task, self._cutoff)
        try:
            return sample, self._reference.evaluate([sample])[0]
        except Exception as error:
            if not out_of_memory(error):
                raise
        # it takes more memory than the fast one, and what it took is free only here
        sample = checks.piece(task, self._cutoff, checks.FEW)
        return sample, self._reference.evaluate([sample])[0]

    def _remember(self, task: Task, sample: Task, why: str) -> None:
        """A structure was compared, or a part of it; `why` it differs, if it does."""
        system: System = task.system
        if len(self._trusted) + len(self._lonely) >= REMEMBERED:
            for kept in (self._trusted, self._agreed, self._lonely):
                kept.clear()
        if not why:
            elements, *others = system.check
            self._lonely[system.check] += 1
            agreed = self._agreed.get(key := tuple(others), frozenset()) | checks.joined(sample, self._cutoff)
            if sample is not task and self._lonely[system.check] > TRIES:  # parts may leave out whatever has neighbours
                agreed |= checks.joined(task, self._cutoff)
            self._agreed[key] = agreed
            if agreed.issuperset(elements):
                self._trusted[system.check] = True
                del self._lonely[system.check]
            return
        self._trusted[system.check] = False
        atoms = len(sample.positions)
        allowed = "" if system.tolerance == TOLERANCE[self._dtype] else f" (its tolerance is {system.tolerance:.1e})"
        self._doubt_of = f"{why}, on a structure of {atoms} atoms of session {system.session}{allowed}"
        self._doubted.add(system)
        log.warning("model %r: %s; it gets %s for its like", self._name, self._doubt_of, self._reference.name)

    def _note(self) -> str:
        """All that people should know."""
        whose = "1 session's systems" if self._doubts == 1 else f"{self._doubts} sessions' systems"
        doubt = f"{whose} are computed by {self._reference.name}; the last: {self._doubt_of}" if self._doubts else ""
        return "; ".join(filter(None, [self._why, doubt, self._heard]))


def _finite(result: Result) -> bool:
    return bool(np.isfinite(result.energy) and np.isfinite(result.forces).all())


def _understood(model: Any) -> tuple[str, ...]:
    """Which of charge and spin the model looks at; others get them from mace-torch and leave them alone."""
    names = {"total_charge", "total_spin"} if type(model).__name__ == "PolarMACE" else set()
    names |= set(getattr(model, "embedding_specs", None) or ())
    return tuple(word for word in ("charge", "spin") if f"total_{word}" in names)


def load(spec: ModelSpec) -> MaceEngine | safe.Conversion:
    """Load a MACE model file, a pickle or of the form that is not code (`safe`).

    With the argument `convert` the model, of either form, is written in that form, beside what it computes.

    Raises:
        EngineError: the file is missing or is no MACE model, or the device is not there.
    """
    if spec.device.startswith("cuda"):
        begin_cuda(spec.name)
    weights = read_weights(spec)
    dtype = {"float32": torch.float32, "float64": torch.float64}[spec.dtype]
    try:
        model = _model_in(weights, spec)
        if spec.arguments.get("convert"):
            return safe.convert(model, spec)
        model = model.to(device=spec.device, dtype=dtype)
        torch.set_default_dtype(dtype)
        for parameter in model.parameters():
            parameter.requires_grad = False
        reference = ReferenceBackend(model, spec.device)
    except EngineError:
        raise
    except Exception as error:
        raise_if_gpus(spec, error, f"model {spec.name!r} can't be put on {spec.device}: {describe(error)}")
        if isinstance(error, ImportError) and (error.name or "").startswith("cuequivariance"):
            raise EngineError(
                "model-load",
                f"model {spec.name!r}: {spec.weights} is made of cuEquivariance's modules, which can't be imported: "
                f"{error}",
                "Where they can, `mace.cli.convert_cueq_e3nn.run` makes a model of mace-torch's own modules of it, "
                "which can be loaded anywhere; or install cuequivariance-torch (docs/environments.md).",
            ) from error
        text = f"model {spec.name!r}: {spec.weights} is not a MACE model that mace-torch {mace.__version__} can read"
        # one that names code that is not here may be a model to another version
        code = "model-load" if isinstance(error, (ImportError, AttributeError)) else "not-a-model"
        raise EngineError(code, f"{text}: {error}") from error
    stages.begin(stages.CHECKS)
    try:
        warm(reference, model)
        return MaceEngine(model, spec, reference, *backends_for(model, spec))
    except RuntimeError as error:
        raise_if_gpus(spec, error, f"model {spec.name!r} can't be computed on {spec.device}: {describe(error)}")
        raise


def _model_in(weights: bytes, spec: ModelSpec) -> Any:
    """The model that a file has.

    Raises:
        ValueError: it has none, and what it is instead; or whatever comes of unpickling it.
    """
    if not weights:
        raise ValueError("it is empty")
    if spec.weights.endswith(safe.SUFFIX):  # by its name, not its content: nothing called so is ever unpickled
        model = safe.from_safe(weights, spec.device)
    elif weights[:100].lstrip().startswith(b"<"):
        raise ValueError("it begins with <: it looks like a web page, such as one that came in place of a download")
    else:
        # weights are code: the catalogue, which is the operator's, says which file this is, and what is in it
        model = torch.load(io.BytesIO(weights), map_location=spec.device, weights_only=False)
    if not hasattr(model, "atomic_numbers"):
        what = f"it holds an object of class {type(model).__name__}"
        if isinstance(model, dict):
            what += ", so it looks like a checkpoint: the .model file is wanted that mace_run_train writes beside it"
        raise ValueError(what)
    return model


def begin_cuda(name: str) -> None:
    """Have CUDA begin, in a way that gives the same bits each time to whoever asks for that.

    Raises:
        EngineError: there is none, or it can't.
    """
    if torch.version.cuda is None:
        raise EngineError(
            "model-load",
            f"model {name!r}: torch {torch.__version__} is not built for CUDA",
            "Install a CUDA build of torch beside the daemon, or start it with `--device cpu`.",
        )
    try:
        torch.cuda.init()
    except Exception as error:
        raise EngineError(
            "device",
            f"model {name!r}: torch {torch.__version__} can't begin to use CUDA: {describe(error)}",
            "`rootstockd doctor` looks at the driver. If that is well, `confine = false` in the model's entry of the "
            "catalogue tells whether CUDA lacks a right that workers give away (SECURITY.md).",
        ) from error
    fuse_nothing()
