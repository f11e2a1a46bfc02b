"""Passes of one shape, recorded once and replayed: on a GPU by CUDA graphs, which spare the host all launches.

A recorded pass has fixed shapes, and reads and writes fixed places. So there are buckets of shapes, a quarter larger
from one to the next, and what lacks to a bucket's shape is filled up with ghosts: atoms that no other atom sees.
"""

from __future__ import annotations

import copy
import logging
import math
import weakref
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np
import torch

from rootstockd.worker.engines import Array
from rootstockd.worker.engines.mace.budget import Size
from rootstockd.worker.engines.mace.resident import Graph
from rootstockd.worker.engines.mace.timing import part_of
from rootstockd.worker.failures import describe, out_of_memory

log = logging.getLogger(__name__)

MOST = 40
"""Shapes that are recorded at once: batches of 1 to 32 jobs of 64 atoms are of 17, or twice as many, as their edges
are now more, now fewer. Beside the pool, which they share, each keeps some 50 bytes an edge."""
SEEN = 2
"""A shape is recorded the second time that it comes; for each that has been recorded before, one time later, so that
recording, which takes as long as a dozen passes, never becomes what most of the time goes into."""
WORTHWHILE = 0.95
"""Replaying must take less than this part of evaluating."""
FAILURES = 2
"""After as many failures nothing more is recorded."""
LACKS = 2
"""After memory lacked as often for recording a shape, neither it nor a larger one is recorded."""
GHOSTS, CROWD = 8, 800
"""A bucket's first atoms are ghosts: 8 at least, and one for 800 of its edges. Up to a third of these end at ghosts,
and what torch makes of an atom's edges it adds up one by one."""
_WARM_UP = 3
_MOVED = 0.01
"""Å; so far from those that were recorded are the positions on which a replay is compared: none of them is baked in."""

Pass = Callable[[torch.Tensor, Graph, torch.Tensor], torch.Tensor]
"""Makes rows of positions (N, 3), a graph, and ghosts (E,): which ghost an edge that counts for nothing becomes."""
Eagerly = Callable[[torch.Tensor], Array]
"""Makes rows of positions (N, 3) on the host."""


def _sizes(least: int, most: int) -> list[int]:
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + sizes[-1] // 32 * 8)
    return sizes


_SIZES = _sizes(32, 2**40)


def padded(count: int) -> int:
    """The smallest bucket for as many atoms or edges."""
    return _SIZES[bisect_left(_SIZES, count)]


def ghosts_of(edges: int) -> int:
    """How many ghosts a bucket of so many edges has."""
    return max(GHOSTS, edges // CROWD)


def host_array(rows: torch.Tensor) -> Array:
    """A device's tensor as an array; waits for all that the device was told to do."""
    if rows.device.type == "cpu":
        return np.asarray(rows.numpy())
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    torch.cuda.current_stream(rows.device).synchronize()
    return np.asarray(host.numpy())


class Recorder:
    """Records functions of tensors that stay where they are. All that is of CUDA alone is in here.

    What it records shares one pool of memory, so together they take little more than the largest of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.leaks = False
        """A pool may stay for as long as the process: nothing should be recorded any more."""
        self.held = 0
        """Bytes of the pool: what is evaluated otherwise can't have them."""
        self.renew()

    def renew(self) -> None:
        """Leave the pool to what was recorded so far. The stream stays: cuBLAS keeps memory for each, for good."""
        self._pool = None if self._stream is None else torch.cuda.graph_pool_handle()
        if not self.leaks:
            self.held = 0

    def apart(self) -> Recorder:
        """One with a pool of its own, whose memory is free again with what it has recorded."""
        other = copy.copy(self)
        other.renew()
        return other

    def answer_for(self, trial: Recorder) -> None:
        """What was tried apart may have left a pool for good."""
        if trial.leaks and trial is not self:
            self.leaks = True
            self.held += trial.held

    def record(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """What does the same again and again; on a CPU the function itself.

        Raises:
            RuntimeError: it does what can't be recorded, or there is not enough memory.
        """
        if self._stream is None:
            return function
        usual, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(usual)
        try:
            with torch.cuda.stream(self._stream):  # for what is compiled or allocated at the first times
                for _ in range(_WARM_UP):
                    function()
        finally:
            usual.wait_stream(self._stream)
        before, begun, failed = torch.cuda.memory_reserved(self._device), False, 0
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                begun = True
                before = torch.cuda.memory_reserved(self._device)  # less than that: torch has given back what it can
                try:
                    result = function()
                except BaseException as error:
                    failed = id(error)
                    raise
        except BaseException as error:
            if not begun:
                self._end_what_hardly_began()
            elif id(error) != failed:  # it is another one's: torch could not end it
                self._end()
            raise
        finally:
            torch.cuda.set_stream(usual)  # torch leaves it at the other one where recording was broken off
            self.held += max(0, torch.cuda.memory_reserved(self._device) - before)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    def _end(self) -> None:
        """End by hand what torch could not end: to its allocator something is still being recorded.

        Newer versions of torch have told it (pytorch/pytorch#180395). Of these some release the pool, too (#190348),
        and others don't; to release it once too often would end the process.
        """
        if self._was_open():
            torch._C._cuda_releasePool(self._device.index, self._pool)  # noqa: SLF001
            # to torch's allocator of pinned memory it is still being recorded, and can't be once more
            self._pool = torch.cuda.graph_pool_handle()
        else:
            self.leaks = True

    def _end_what_hardly_began(self) -> None:
        """End by hand what was broken off before anything was recorded: as a rule nothing has begun.

        Where the pool was open already nobody knows who releases it, as above.
        """
        self.leaks = self._was_open() or self.leaks

    def _was_open(self) -> bool:
        """Whether torch's allocator took something to be recorded into the pool; now it does not."""
        try:
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)  # noqa: SLF001
        except RuntimeError:
            return False
        return True


class Bucket:
    """The passes of one shape.

    Args:
        atoms: of the shape, ghosts among them.
        edges: of the shape.
        like: a graph of the model on its device.
    """

    def __init__(self, atoms: int, edges: int, like: Graph) -> None:
        self._positions = like.shifts.new_zeros((atoms, 3))
        self._begin = ghosts_of(edges)
        """The place of the first atom that is none."""
        self._ghosts = torch.arange(edges, device=like.edges.device) % self._begin
        self._graph = Graph(
            torch.zeros_like(like.attributes[:1]).repeat(atoms, 1),
            like.heads.new_zeros(atoms),
            self._ghosts[:, None].repeat(1, 2),
            like.shifts.new_full((edges, 3), math.inf),
            0.0,
        )
        self._graph.attributes[:, 0] = 1.0
        self._last: Callable[[], Graph | None] = lambda: None
        self._replay: Callable[[], torch.Tensor] | None = None

    def record(self, recorder: Recorder, evaluate: Pass) -> None:
        """Record the pass over what was put in.

        Raises:
            RuntimeError: see `Recorder.record`.
        """
        self._replay = None  # before another is made: they are as large
        self._replay = recorder.record(lambda: evaluate(self._positions, self._graph, self._ghosts))

    def put(self, graph: Graph, positions: torch.Tensor) -> None:
        """Put atoms behind the ghosts, and of the graph what was not there at the last pass.

        Atoms of an earlier pass that are left behind them have no edges any more.
        """
        begin, edges, own = self._begin, len(graph.edges), self._graph
        end = begin + len(positions)
        self._positions[begin:end].copy_(positions, non_blocking=True)
        if graph is self._last():
            return
        self._last = lambda: None  # until all of it is there
        own.attributes[begin:end] = graph.attributes
        own.heads[begin:end] = graph.heads
        torch.add(graph.edges, begin, out=own.edges[:edges])
        own.shifts[:edges] = graph.shifts
        own.edges[edges:] = self._ghosts[edges:, None]
        own.shifts[edges:] = math.inf
        self._last = weakref.ref(graph)  # others keep it, if it comes again

    def rows(self, graph: Graph, positions: torch.Tensor) -> Array:
        """The rows of a graph's atoms at these positions."""
        assert self._replay is not None
        self.put(graph, positions)
        return host_array(self._replay()[self._begin : self._begin + len(positions)])


class Captures:
    """Decides which passes are recorded and replayed, and has all others evaluated.

    A shape is recorded when it has come before; it is replayed from then on if a replay gave what an evaluation gave,
    of other positions than were recorded, and was faster. What fails is not tried again; for want of memory not after
    the second time, nor is anything larger, until all memory is given back.

    Args:
        evaluate: the pass that is recorded: without a word to the host.
        tolerance: how far forces may differ from the evaluation's, in eV/Å, and by this part of the largest.
        may_keep: says whether a pass's memory may stay taken for replays of it.
    """

    def __init__(self, evaluate: Pass, tolerance: float, may_keep: Callable[[Size], bool]) -> None:
        self._evaluate, self._tolerance, self._may_keep = evaluate, tolerance, may_keep
        self._buckets: OrderedDict[tuple[int, int], Bucket] = OrderedDict()  # the least recently used first
        self._seen: Counter[tuple[int, int]] = Counter()
        self._refused: set[tuple[int, int]] = set()
        self._lacked: Counter[tuple[int, int]] = Counter()
        """How often memory lacked for recording a shape."""
        self._recorded = self._failures = 0
        self._recorder: Recorder | None = None
        self._failure = self._lack = ""

    def have(self, size: Size) -> bool:
        """Whether a pass of this size would be replayed."""
        return _shape(size) in self._buckets

    def rows(self, graph: Graph, positions: torch.Tensor, eagerly: Eagerly) -> Array:
        """The rows of a pass.

        Args:
            graph: its graph.
            positions: (N, 3) float64, Å, on the host.
            eagerly: evaluates it without any of this.
        """
        if self._failures >= FAILURES:
            return eagerly(positions)
        shape = _shape(size := Size(len(positions), len(graph.edges)))
        if (bucket := self._buckets.get(shape)) is not None:
            self._buckets.move_to_end(shape)
            return bucket.rows(graph, positions)
        rows = eagerly(positions)
        self._seen[shape] += 1
        due = self._seen[shape] >= SEEN + self._recorded and not (shape in self._refused or self._too_large(shape))
        if due and np.isfinite(rows).all() and self._may_keep(size):
            self._record(shape, graph, positions, eagerly)
        return rows

    @property
    def note(self) -> str:
        """What people should know of it."""
        return "; ".join(filter(None, [self._failure, self._lack]))

    @property
    def held(self) -> int:
        """Bytes that are there for replays alone."""
        if self._recorder is None or not (self._buckets or self._recorder.leaks):
            return 0  # a pool without graphs in it is torch's to give back
        return self._recorder.held

    def forget(self) -> None:
        """Give all memory back; what comes again may be recorded again, if not soon."""
        self._buckets.clear()
        self._seen.clear()
        self._lacked.clear()
        self._lack = ""
        if self._recorder is not None:
            self._recorder.renew()

    def _record(self, shape: tuple[int, int], graph: Graph, positions: torch.Tensor, eagerly: Eagerly) -> None:
        """Record a shape, compare, and measure."""
        self._recorded += 1
        recorder = self._begin(graph.edges.device)
        # what others' graphs are in never shrinks: so what may be refused is tried in another pool before
        first = recorder.apart() if self._buckets else recorder
        why, broken, memory_lacked = "", False, False
        try:
            bucket = Bucket(*shape, graph)
            bucket.put(graph, positions)
            moved = positions + _MOVED * torch.arange(positions.numel()).reshape(-1, 3).sin()
            right = eagerly(moved)
            why = self._recorded_wrongly(bucket, first, graph, moved, right)
            if not why and not part_of(lambda: bucket.rows(graph, positions), lambda: eagerly(positions)) < WORTHWHILE:
                self._refused.add(shape)
                return
            if not why and first is not recorder:
                why = self._recorded_wrongly(bucket, recorder, graph, moved, right)
        except Exception as error:  # the pass itself has been answered
            broken, (why, memory_lacked) = True, _reason(error)
        recorder.answer_for(first)
        if memory_lacked and not recorder.leaks:
            self._lacks(shape)
        elif why:
            if broken:  # not before here, where what the recording had in its hands is free
                self.forget()
            self._fail(shape, why, FAILURES if recorder.leaks else 1)
        else:
            self._buckets[shape] = bucket
            if len(self._buckets) > MOST:
                self._buckets.popitem(last=False)

    def _begin(self, device: torch.device) -> Recorder:
        """The recorder whose pool all share."""
        if self._recorder is None:
            self._recorder = Recorder(device)
        elif not self._buckets:  # a pool without graphs in it is none any more
            self._recorder.renew()
        return self._recorder

    def _recorded_wrongly(
        self, bucket: Bucket, recorder: Recorder, graph: Graph, moved: torch.Tensor, right: Array
    ) -> str:
        """Record what was put into a bucket; how its replay at other positions is off what is right there, if it is."""
        bucket.record(recorder, self._evaluate)
        difference = np.abs(bucket.rows(graph, moved) - right).max()
        if difference <= self._tolerance * max(1.0, np.abs(right[:, 1:]).max()):
            return ""
        return f"replayed, it differs by {difference:.1e}"

    def _lacks(self, shape: tuple[int, int]) -> None:
        """Memory lacks for recording a shape; all others stay, whose memory is a pool that it would have shared."""
        del self._seen[shape]
        self._lacked[shape] += 1
        if self._too_large(shape):
            which = f"passes of about {_described(shape)} and larger ones"
            self._lack = f"{which} are not replayed as CUDA graphs: memory lacks for recording them"
            log.warning("%s", self._lack)

    def _too_large(self, shape: tuple[int, int]) -> bool:
        return any(
            times >= LACKS and shape[0] >= atoms and shape[1] >= edges for (atoms, edges), times in self._lacked.items()
        )

    def _fail(self, shape: tuple[int, int], why: str, failures: int) -> None:
        self._refused.add(shape)
        self._failures += failures
        which = f"passes of up to {_described(shape)} are not"
        if self._failures >= FAILURES:
            which = "no pass is"
            self.forget()
        self._failure = f"{which} replayed as a CUDA graph: {why}"
        log.warning("%s", self._failure)


def _shape(size: Size) -> tuple[int, int]:
    """The bucket for a pass: its atoms, ghosts among them, and its edges."""
    edges = padded(size.edges)
    return padded(ghosts_of(edges) + size.atoms), edges


def _described(shape: tuple[int, int]) -> str:
    return f"{shape[0] - ghosts_of(shape[1])} atoms and {shape[1]} edges"


def _reason(error: BaseException) -> tuple[str, bool]:
    """What an error came of, and whether memory lacked: recording that was broken off has an error of its own.

    In words alone: errors have the frames in their hands that they went through, and all tensors in those.
    """
    memory_lacked, first = False, error
    while True:
        memory_lacked = memory_lacked or out_of_memory(first)
        if first.__context__ is None:
            return describe(first).partition("\n")[0], memory_lacked
        first = first.__context__
