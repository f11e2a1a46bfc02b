"""The same structure in a form that neighbour lists take well: atoms near the origin, short cells, narrow gaps."""

from __future__ import annotations

import numpy as np
from ase.geometry.minkowski_reduction import minkowski_reduce

from rootstockd.worker.engines import Array
from rootstockd.worker.lattice import normals, spanned

_SKEWED = 0.1
"""A cell whose volume is less than this part of the product of its lengths is reduced."""

NEAR = 30.0
"""Å. Without pbc mace-torch takes 20 ms to list the neighbours of an atom that is so far from the origin, and 0.9 s at
100 Å; float32 has a rounding of 1e-6 Å there."""

_ROOMY = 4e6
"""Cubes of the cutoff's width into which mace-torch divides a cell in some 20 ms, and takes 20 MB for."""

_FAR = 1e6
"""Å; structures so far from the origin are brought there, or how many cells away they are would be no integer."""

_NOWHERE = 1e15
"""Å; so far away a position has no digits left to say where it is across."""


def manageable(cell: Array, positions: Array, pbc: tuple[bool, bool, bool], cutoff: float) -> tuple[Array, Array]:
    """A periodic cell and positions with the same neighbours at the same distances, such that no list explodes.

    Lattice vectors without pbc become normals of the others, so long that nothing has neighbours along them. Wide gaps
    along them are narrowed, so that an atom that flew off costs nothing; a cell so skewed that a sphere reaches many of
    its images is reduced.
    """
    positions = np.ascontiguousarray(positions)
    periodic = [axis for axis in range(3) if pbc[axis]]
    if periodic:
        cell = _reduced(cell, pbc)
    if len(periodic) == 3:  # noqa: PLR2004 - of three
        return cell, positions
    whole = cell.copy()
    for axis, normal in zip((axis for axis in range(3) if not pbc[axis]), normals(cell[periodic])):
        along = positions @ normal
        ordered = np.sort(along)
        if (np.diff(ordered) > 2.0 * cutoff).any() or not abs(ordered[0]) < _FAR:
            moved = _narrowed(along, 2.0 * cutoff)
            across = positions - along[:, None] * normal
            across -= (across @ normal)[:, None] * normal  # what rounding left of a long way
            across[np.abs(along) > _NOWHERE] = 0.0
            positions, along = across + moved[:, None] * normal, moved
        whole[axis] = normal * (np.ptp(along) + 3.0 * cutoff)
    return whole, positions


def _narrowed(along: Array, widest: float) -> Array:
    """Places along one line, from 0 on, in the same order, with no gap that is wider than that."""
    order = np.argsort(along, kind="stable")
    moved = np.empty(len(order))
    moved[order] = np.minimum(np.diff(along[order], prepend=along[order[0]]), widest).cumsum()
    return moved


def _reduced(cell: Array, pbc: tuple[bool, bool, bool]) -> Array:
    """A cell of the same lattice with short vectors, where this one is so skewed that a search would be long."""
    vectors = cell[list(pbc)]
    if spanned(vectors) > _SKEWED * np.prod(np.linalg.norm(vectors, axis=1)):
        return cell
    return np.ascontiguousarray(minkowski_reduce(cell, pbc=pbc)[0])


def is_awkward(cell: Array, positions: Array, pbc: tuple[bool, bool, bool], cutoff: float) -> bool:
    """Whether mace-torch's own neighbour lists take long over a structure, or much memory, lose digits, or can't do it.

    Lattice vectors without pbc it replaces by long ones along the axes.
    """
    furthest = np.abs(positions).max(initial=0.0)
    if furthest > NEAR:
        return True
    vectors = np.where(np.array(pbc)[:, None], cell, np.eye(3) * (furthest + 1.0) * 5.0 * cutoff)
    volume = abs(np.linalg.det(vectors))
    return bool(volume < _SKEWED * np.prod(np.linalg.norm(vectors, axis=1)) or volume > _ROOMY * cutoff**3)


def gathered(cell: Array, positions: Array, pbc: tuple[bool, bool, bool], cutoff: float) -> tuple[Array, Array]:
    """A `manageable` structure with its atoms about the origin; its cell is periodic along all three vectors.

    For lists that have bins wherever between the origin and an atom one could be, that look for neighbours in as many
    images as thin layers of a skewed cell have, and for float32, which has the fewer digits for where an atom is the
    further away that is.
    """
    cell, positions = manageable(cell, positions, pbc, cutoff)
    cell, positions, whole = _closed_up(cell, positions, pbc, cutoff)
    fractions = positions @ np.linalg.inv(cell)
    # atoms keep together along what is not periodic: across a boundary float32 has fewer digits for their distance
    middle = (fractions.max(axis=0) + fractions.min(axis=0)) / 2
    return cell, positions - np.where(whole, middle, np.round(fractions)) @ cell


def _closed_up(
    cell: Array, positions: Array, pbc: tuple[bool, bool, bool], cutoff: float
) -> tuple[Array, Array, tuple[bool, ...]]:
    """The same neighbours in a cell whose wide gaps along vectors with pbc are narrowed, as in the others they are.

    Returns:
        The cell; positions; and along which vectors atoms are together, none the other side of a boundary.
    """
    inverse = np.linalg.inv(cell)
    fractions = positions @ inverse
    whole, lengths = [not periodic for periodic in pbc], np.ones(3)
    for axis in range(3):
        widest = float(2.0 * cutoff * np.linalg.norm(inverse[:, axis]))
        inside = fractions[:, axis] % 1.0
        ordered = np.sort(inside)
        gaps = np.diff(ordered, append=ordered[0] + 1.0)
        if not pbc[axis] or gaps.max() <= widest:
            continue
        first = ordered[(gaps.argmax() + 1) % len(ordered)]  # behind the widest
        fractions[:, axis] = _narrowed((inside - first) % 1.0, widest)
        lengths[axis], whole[axis] = fractions[:, axis].max() + widest, True
    if lengths.min() == 1.0:
        return cell, positions, tuple(whole)
    return cell * lengths[:, None], fractions @ cell, tuple(whole)
