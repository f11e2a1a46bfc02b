"""What is installed in a virtual environment, and whether it is still as it was installed."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from rootstockd.words import so_many


@dataclass(frozen=True)
class Package:
    """An installed package: its folder `NAME-VERSION.dist-info`, of which any file may be damaged."""

    info: Path
    name: str
    """Normalized; empty where what says so is damaged."""
    version: str

    @property
    def label(self) -> str:
        """Name and version as its folder has them."""
        return self.info.name.removesuffix(".dist-info").replace("-", " ", 1)

    @property
    def distribution(self) -> str:
        """Its name as its folder has it, for where METADATA is damaged."""
        return self.label.partition(" ")[0]

    def files(self) -> dict[str, int | None]:
        """The paths of what was installed, and how many bytes each had, if that was recorded; empty without a record.

        (importlib.metadata leaves out, from Python 3.12 on, what is not there any more.)
        """
        try:
            rows = list(csv.reader(_text(self.info / "RECORD").splitlines()))
        except csv.Error:
            return {}
        sizes = {row[0]: row[2] if len(row) > 2 else "" for row in rows if row}  # noqa: PLR2004
        here = self.info.parent
        return {
            os.path.normpath(here / file): int(size) if size.isdecimal() else None
            for file, size in sizes.items()
            if "\0" not in file
        }


def site_packages(path: Path) -> Path:
    """Where a virtual environment has its packages."""
    return next(path.glob("lib/python3*/site-packages"), path / "lib/python3/site-packages")


def installed(path: Path) -> list[Package]:
    """All packages of a virtual environment."""
    found = []
    for info in sorted(site_packages(path).glob("*.dist-info")):
        headers = HeaderParser().parsestr(_text(info / "METADATA"))
        name = headers.get("Name", "").lower().replace("_", "-").replace(".", "-")
        found.append(Package(info, name, headers.get("Version", "")))
    return found


def damage(packages: list[Package]) -> dict[Package, str]:
    """What is not as it was installed, in words, by package. A file that several have may be as any of them has it."""
    recorded = {package: package.files() for package in packages}
    sizes: defaultdict[str, set[int | None]] = defaultdict(set)
    for files in recorded.values():
        for file, size in files.items():
            sizes[file].add(size)
    found = {}
    for package, files in recorded.items():
        if words := _damage(package, files, sizes) if files else f"{package.label} has no record of its files":
            found[package] = words
    return found


def _damage(package: Package, files: dict[str, int | None], sizes: dict[str, set[int | None]]) -> str:
    lost, changed = [], []
    for file, size in files.items():
        if file.endswith(".pyc"):
            continue
        name = os.path.relpath(file, package.info.parent)
        try:
            now = os.stat(file).st_size
        except OSError:
            lost.append(name)
        else:
            if not sizes[file] & {None, now}:
                changed.append(f"{name} ({now} bytes where {size} were installed)")
    words = [f"lacks {len(lost)} of its files, such as {lost[0]}"] if lost else []
    if changed:
        words.append(f"has {so_many(len(changed), 'file')} that changed, such as {changed[0]}")
    return f"{package.label} {' and '.join(words)}" if words else ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
