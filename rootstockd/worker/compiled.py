"""What numba keeps in a model's cache: whether there is a place for it, and whether it can still be read.

Numba takes a file that can't be read for an error of whatever it was compiled for, at each start, and one that can't be
written likewise. Such as can't be read are left by a power loss: names are on the disk then, and what was written is
not: zeros are read there, of the whole file or of blocks of it.
"""

from __future__ import annotations

import io
import logging
import os
import pickletools
from pathlib import Path

from rootstockd.worker.files import read_regular

log = logging.getLogger(__name__)

_PICKLES = {".nbi": 2, ".nbc": 1}
"""Files of numba's by their suffixes, and how many pickles one of them has: an index begins with a version."""
_LOST = bytes(512)
"""The smallest block of a disk, with nothing in it. Numba makes nothing of MACE with more than 72 zeros in a row."""

ROOM = 2**25
"""Bytes of disk without which nothing is kept. MACE takes 1.4 to 2.5 MB, and several models may be loading."""
FILES = 256
"""Files that a disk must have room for besides, where it counts them. MACE makes some 60."""


def why_not_kept(folder: Path) -> str:
    """Why what is compiled is not kept, in words; empty where it is.

    Args:
        folder: the cache; it is made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(folder)
    except OSError as error:
        return error.strerror or str(error)
    if (free := disk.f_bavail * disk.f_frsize) < ROOM:
        return f"{free / 1e6:.1f} MB are free where {ROOM / 1e6:.0f} MB have to be"
    if disk.f_files and disk.f_favail < FILES:
        return f"{disk.f_favail} more files can be made there where it has to be {FILES}"
    return ""


def remove_broken(folder: Path) -> None:
    """Remove what is none of numba's files any more, so that it is compiled anew.

    Args:
        folder: the cache; there may be none yet.
    """
    broken = [file for file in folder.glob("*/*") if file.suffix in _PICKLES and not _is_whole(file)]
    for file in broken:
        file.unlink(missing_ok=True)
    if broken:
        log.warning("%s had %d broken files, which were removed: they are compiled anew", folder, len(broken))


def _is_whole(file: Path) -> bool:
    try:
        content = read_regular(file)
        pickles = io.BytesIO(content)
        for _ in range(_PICKLES[file.suffix]):
            for _ in pickletools.genops(pickles):
                pass
    except Exception:  # garbage has it fail in any way
        return False
    return _LOST not in content
