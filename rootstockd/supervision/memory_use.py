"""What a model takes of its device's memory."""

from __future__ import annotations

from dataclasses import dataclass

from rootstockd.host.devices import Memory

CONTEXT = 500 * 10**6
"""Bytes that CUDA has of a GPU for a process, beside what torch has."""


@dataclass
class MemoryUse:
    """Bytes of one model, by its worker of now; 0 as long as a number is not known."""

    set_aside: int = 0
    """That it was given on its device."""
    loaded: int = 0
    """When its worker had loaded it."""
    now: int = 0
    peak: int = 0
    """At most."""
    told: int = 0
    """Of a GPU that its worker says it has, which is torch's part of it."""

    def begin(self) -> None:
        """Begin anew, with a worker of which nothing is known yet."""
        self.loaded = self.now = self.peak = self.told = 0

    def end(self) -> None:
        """Forget the worker, which has ended."""
        self.now = 0

    def measured(self, now: int, *, ready: bool) -> bool:
        """Note what it takes.

        Args:
            now: bytes.
            ready: it is loaded.

        Returns:
            Whether it is known only now what it takes when it has loaded.
        """
        self.now, self.peak = now, max(self.peak, now)
        fresh = ready and now > 0 and not self.loaded
        if fresh:
            self.loaded = now
        return fresh

    def claimed(self, *, ready: bool) -> int:
        """Bytes that others can't have: until it was measured as loaded, what was set aside for it, if that is more."""
        return self.now if ready and self.loaded else max(self.now, self.set_aside)


def taken(gpu: Memory, pid: int, told: int) -> int:
    """Bytes that a worker has of a GPU; 0 as long as that is not known.

    Args:
        gpu: what the driver says, which in a container tells of no process, or by numbers of another namespace.
        pid: the worker's.
        told: what it says itself, which is torch's part of it.
    """
    return gpu.by_pid.get(pid, told and told + CONTEXT)
