"""Metrics for node_exporter's textfile collector, where those of all programs of a machine come together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

OF_THE_EXPORTER = "process_"
"""What begins the names of metrics that node_exporter has of itself: a second of that name is an error to it."""


class _Given(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def for_textfile(text: str, socket: Path) -> str:
    """Metrics as that collector takes them.

    Args:
        text: what a daemon says, in Prometheus' text format.
        socket: the daemon's; it becomes a label, as there may be several daemons on a machine.
    """
    families = []
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(OF_THE_EXPORTER):
            family.samples = [
                sample._replace(labels={**sample.labels, "socket": str(socket)}) for sample in family.samples
            ]
            families.append(family)
    registry = CollectorRegistry()
    registry.register(_Given(families))
    return generate_latest(registry).decode()
