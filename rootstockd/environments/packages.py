"""What is installed in a virtual environment, and whether it is still as it was installed."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

from rootstockd.words import so_many
from rootstockd.worker.files import read_regular


class Recorded(NamedTuple):
    """How a file was installed, as far as that was noted down."""

    size: int | None
    digest: str
    """Such as `sha256=` and that in URL-safe base64 without padding; may be empty."""


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

    def files(self) -> dict[str, Recorded]:
        """What was installed, by its path; empty without a record.

        (importlib.metadata leaves out, from Python 3.12 on, what is not there any more.)
        """
        try:
            rows = list(csv.reader(_text(self.info / "RECORD").splitlines()))
        except csv.Error:
            return {}
        here = self.info.parent
        return {
            os.path.normpath(here / file): Recorded(int(size) if size.isdecimal() else None, digest)
            for file, digest, size, *_ in ([*row, "", ""] for row in rows if row)
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


def damage(packages: list[Package], *, digests: bool = False) -> dict[Package, str]:
    """What is not as it was installed, in words, by package. A file that several have may be as any of them has it.

    Args:
        packages: all of an environment.
        digests: compare what is in files of the right size as well.
    """
    recorded = {package: package.files() for package in packages}
    every: defaultdict[str, set[Recorded]] = defaultdict(set)
    for files in recorded.values():
        for file, how in files.items():
            every[file].add(how)
    found = {}
    for package, files in recorded.items():
        if words := _damage(package, files, every, digests) if files else f"{package.label} has no record of its files":
            found[package] = words
    return found


def _damage(
    package: Package,
    files: dict[str, Recorded],
    every: dict[str, set[Recorded]],
    digests: bool,  # noqa: FBT001
) -> str:
    lost, changed = [], []
    for file, how in files.items():
        if file.endswith(".pyc"):
            continue
        name = os.path.relpath(file, package.info.parent)
        try:
            now = os.stat(file).st_size
        except OSError:
            lost.append(name)
        else:
            alike = [one for one in every[file] if one.size in (None, now)]
            if not alike:
                changed.append(f"{name} ({now} bytes where {how.size} were installed)")
            elif digests and all(one.digest for one in alike) and _digest(file) not in {one.digest for one in alike}:
                changed.append(name)
    words = [f"lacks {len(lost)} of its files, such as {lost[0]}"] if lost else []
    if changed:
        words.append(f"has {so_many(len(changed), 'file')} that changed, such as {changed[0]}")
    return f"{package.label} {' and '.join(words)}" if words else ""


def _digest(file: str) -> str:
    try:
        digest = hashlib.sha256(read_regular(file)).digest()
    except OSError:
        return ""
    return f"sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def _text(file: Path) -> str:
    try:
        return read_regular(file).decode(errors="replace")
    except OSError:
        return ""
