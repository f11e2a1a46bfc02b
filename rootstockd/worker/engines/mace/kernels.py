"""The loops of a fused MACE evaluation, compiled by numba: no array of edges times paths times channels ever exists.

Four operations and their derivatives. Shapes: N atoms, E edges sorted by receiver, K channels, P paths of the tensor
product, S spherical harmonics, H rows of a sender's features, C rows of a message, M components of a product.

*Harmonics* (`harmonics`, `harmonics_back`): Y of an edge's direction, as polynomials in its components.

*Convolution* (`convolve`, `convolve_back`), where W are polynomials of the edge's length, piece by piece:
``A[i, c, k] = sum over edges (j -> i) of sum over a, b of cg[path, a, b, c] h[j, a, k] Y[edge, b] W[edge, path, k]``

*Density* (`add_up`, `add_up_back`): one such polynomial, summed over an atom's edges.

*Contraction* (`contract`, `contract_back`): a polynomial in the rows of one atom's message, channel by channel, whose
coefficients depend on the element: ``B[i, m, k] = sum over terms of coefficient[element, term, k] x A A A``.

Everything here is deterministic for a given number of threads.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numba
import numpy as np
from numba.core.errors import NumbaSystemWarning

from rootstockd.worker.compiled import why_not_kept

# a confined worker has no /dev/shm for the lock that would guard other processes' use of numba: there are none
warnings.filterwarnings("ignore", "Could not obtain multiprocessing lock", NumbaSystemWarning)

_FOLDER = os.environ.get("NUMBA_CACHE_DIR")
"""None: beside this file, or wherever numba finds a place."""
KEEP = _FOLDER is None or not why_not_kept(Path(_FOLDER))
"""Whether what is compiled is kept for the next worker."""
DEGREE = 7
"""Of the polynomials in `tables`; a constant, so that loops over it are unrolled."""
# No slice of an array is made in an inner loop: numba counts references to each, which takes as long as the loop.
# Sums may be reordered, so that they vectorise; NaN and infinities keep their meaning.
_REORDER = {"reassoc", "contract", "nsz"}


BLOCK = 64
"""Edges whose harmonics are formed together: loops over them vectorise, and what is between fits the cache."""


@numba.njit(parallel=True, fastmath=_REORDER, cache=KEEP)
def harmonics(vectors, parents, axes, begins, monomials, coefficients, lengths, y):
    """Lengths of edges, and spherical harmonics of their directions.

    Args:
        vectors: (E, 3).
        parents: (monomials,) the monomial that each is a multiple of, an earlier one; the first is 1.
        axes: (monomials,) by which component of the direction.
        begins: (S + 1,) each harmonic's first term.
        monomials: (terms,) of each term.
        coefficients: (terms,) of each term.
        lengths: (E,), overwritten.
        y: (E, S), overwritten; NaN where a length is zero.
    """
    edges = vectors.shape[0]
    for block in numba.prange((edges + BLOCK - 1) // BLOCK):
        begin = block * BLOCK
        count = min(BLOCK, edges - begin)
        unit, powers, total = np.empty((3, BLOCK)), np.empty((parents.shape[0], BLOCK)), np.empty(BLOCK)
        for e in range(count):
            a, b, c = vectors[begin + e, 0], vectors[begin + e, 1], vectors[begin + e, 2]
            lengths[begin + e] = np.sqrt(a * a + b * b + c * c)
        _powers(vectors, lengths, parents, axes, begin, count, unit, powers)
        for s in range(begins.shape[0] - 1):
            total[:] = 0.0
            for term in range(begins[s], begins[s + 1]):
                factor, power = coefficients[term], powers[monomials[term]]
                for e in range(count):
                    total[e] += factor * power[e]
            for e in range(count):
                y[begin + e, s] = total[e]


@numba.njit(fastmath=_REORDER, error_model="numpy", cache=KEEP)
def _powers(vectors, lengths, parents, axes, begin, count, unit, powers):
    """Directions of a block's edges, and the monomials in their components."""
    for e in range(count):
        for axis in range(3):
            unit[axis, e] = vectors[begin + e, axis] / lengths[begin + e]
        powers[0, e] = 1.0
    for m in range(1, parents.shape[0]):
        parent, component, power = powers[parents[m]], unit[axes[m]], powers[m]
        for e in range(count):
            power[e] = parent[e] * component[e]


@numba.njit(parallel=True, fastmath=_REORDER, error_model="numpy", cache=KEEP)
def harmonics_back(vectors, parents, axes, begins, monomials, coefficients, lengths, by_y, by_length, by_vectors):
    """Derivative of `harmonics` by the vectors; arguments as there, and

    Args:
        by_y: (E, S) derivative by the harmonics.
        by_length: (E,) derivative by the lengths.
        by_vectors: (E, 3), overwritten.
    """
    edges = vectors.shape[0]
    for block in numba.prange((edges + BLOCK - 1) // BLOCK):
        begin = block * BLOCK
        count = min(BLOCK, edges - begin)
        unit, powers, wanted = np.empty((3, BLOCK)), np.empty((parents.shape[0], BLOCK)), np.empty(BLOCK)
        by_unit, by_powers = np.zeros((3, BLOCK)), np.zeros((parents.shape[0], BLOCK))
        _powers(vectors, lengths, parents, axes, begin, count, unit, powers)
        for s in range(begins.shape[0] - 1):
            for e in range(count):
                wanted[e] = by_y[begin + e, s]
            for term in range(begins[s], begins[s + 1]):
                factor, by_power = coefficients[term], by_powers[monomials[term]]
                for e in range(count):
                    by_power[e] += factor * wanted[e]
        for m in range(parents.shape[0] - 1, 0, -1):
            by_power, parent, by_parent = by_powers[m], powers[parents[m]], by_powers[parents[m]]
            component, by_component = unit[axes[m]], by_unit[axes[m]]
            for e in range(count):
                by_parent[e] += by_power[e] * component[e]
                by_component[e] += by_power[e] * parent[e]
        for e in range(count):
            along = unit[0, e] * by_unit[0, e] + unit[1, e] * by_unit[1, e] + unit[2, e] * by_unit[2, e]
            length, outward = lengths[begin + e], by_length[begin + e]
            for axis in range(3):
                across = (by_unit[axis, e] - along * unit[axis, e]) / length
                by_vectors[begin + e, axis] = across + outward * unit[axis, e]


@numba.njit(inline="always")
def _place(length, scale, shortest, pieces):
    """The piece that a length lies in, and where in it, from -1 to 1."""
    at = (length - shortest) * scale
    piece = min(int(at), pieces - 1)
    return piece, 2.0 * (at - piece) - 1.0


@numba.njit(parallel=True, fastmath=_REORDER, cache=KEEP)
def convolve(
    first,
    sender,
    lengths,
    h,
    y,
    tables,
    begins,
    pieces,
    scale,
    shortest,
    paths,
    groups,
    rows,
    terms,
    harmonics,
    cg,
    out,
):
    """Messages.

    Args:
        first: (N + 1,) each receiver's first edge.
        sender: (E,) atom that each edge comes from.
        lengths: (E,).
        h: (N, H, K) senders' features.
        y: (E, S) spherical harmonics.
        tables: (tables x pieces, DEGREE + 1, P, K) coefficients of the radial weights, of x^0 first.
        begins: (E,) where each edge's table begins, or (0,) if there is but one.
        pieces: of each table.
        scale: 1 over the width of a piece.
        shortest: where the first piece begins.
        paths: (P + 1,) each path's first group.
        groups: (groups,) row of `h`.
        rows: (groups + 1,) each group's first term.
        terms: (terms, 3) row of `out`, and the first and last of its harmonics.
        harmonics: (harmonics,) column of `y`.
        cg: (harmonics,) coefficients.
        out: (N, C, K), overwritten.
    """
    channels = h.shape[2]
    for i in numba.prange(first.shape[0] - 1):
        weight = np.empty(channels, h.dtype)
        product = np.empty(channels, h.dtype)
        out[i] = 0
        for e in range(first[i], first[i + 1]):
            j = sender[e]
            piece, exactly = _place(lengths[e], scale, shortest, pieces)
            if begins.shape[0]:
                piece += begins[e]
            at = h.dtype.type(exactly)
            for path in range(paths.shape[0] - 1):
                for k in range(channels):
                    value = tables[piece, DEGREE, path, k]
                    for power in range(DEGREE - 1, -1, -1):
                        value = tables[piece, power, path, k] + at * value
                    weight[k] = value
                for group in range(paths[path], paths[path + 1]):
                    source = groups[group]
                    for k in range(channels):
                        product[k] = weight[k] * h[j, source, k]
                    for term in range(rows[group], rows[group + 1]):
                        angular = h.dtype.type(0)
                        for b in range(terms[term, 1], terms[term, 2]):
                            angular += cg[b] * y[e, harmonics[b]]
                        row = terms[term, 0]
                        for k in range(channels):
                            out[i, row, k] += angular * product[k]


@numba.njit(parallel=True, fastmath=_REORDER, cache=KEEP)
def convolve_back(
    first,
    sender,
    lengths,
    h,
    y,
    tables,
    begins,
    pieces,
    scale,
    shortest,
    paths,
    groups,
    rows,
    terms,
    harmonics,
    cg,
    grad,
    by_y,
    by_length,
    by_h,
    wants_h,
):
    """Derivatives of `convolve` by y, lengths and h; arguments as there, and

    Args:
        grad: (N, C, K) derivative by the messages.
        by_y: (E, S), added to.
        by_length: (E,), added to.
        by_h: (threads, N, H, K), added to; each thread has its own, because edges of many receivers share a sender.
        wants_h: whether `by_h` is wanted.
    """
    channels = h.shape[2]
    threads = by_h.shape[0]
    atoms = first.shape[0] - 1
    zero = h.dtype.type(0)
    for thread in numba.prange(threads):
        weight = np.empty(channels, h.dtype)
        slope = np.empty(channels, h.dtype)
        product = np.empty(channels, h.dtype)
        total = np.empty(channels, h.dtype)
        for i in range(atoms * thread // threads, atoms * (thread + 1) // threads):
            for e in range(first[i], first[i + 1]):
                j = sender[e]
                piece, exactly = _place(lengths[e], scale, shortest, pieces)
                if begins.shape[0]:
                    piece += begins[e]
                at, by_x = h.dtype.type(exactly), zero
                for path in range(paths.shape[0] - 1):
                    for k in range(channels):
                        value, rise = tables[piece, DEGREE, path, k], zero
                        for power in range(DEGREE - 1, -1, -1):
                            rise = value + at * rise
                            value = tables[piece, power, path, k] + at * value
                        weight[k] = value
                        slope[k] = rise
                    for group in range(paths[path], paths[path + 1]):
                        source = groups[group]
                        for k in range(channels):
                            product[k] = weight[k] * h[j, source, k]
                            total[k] = zero
                        for term in range(rows[group], rows[group + 1]):
                            angular, by_angular = zero, zero
                            for b in range(terms[term, 1], terms[term, 2]):
                                angular += cg[b] * y[e, harmonics[b]]
                            row = terms[term, 0]
                            for k in range(channels):
                                total[k] += angular * grad[i, row, k]
                                by_angular += grad[i, row, k] * product[k]
                            for b in range(terms[term, 1], terms[term, 2]):
                                by_y[e, harmonics[b]] += cg[b] * by_angular
                        for k in range(channels):
                            by_x += total[k] * h[j, source, k] * slope[k]
                        if wants_h:
                            for k in range(channels):
                                by_h[thread, j, source, k] += total[k] * weight[k]
                by_length[e] += 2.0 * scale * by_x


@numba.njit(parallel=True, fastmath=_REORDER, cache=KEEP)
def add_up(first, lengths, tables, begins, pieces, scale, shortest, out):
    """A function of lengths, summed over each atom's edges; arguments as in `convolve`, with one path and channel, and

    Args:
        out: (N,), overwritten.
    """
    for i in numba.prange(first.shape[0] - 1):
        total = 0.0
        for e in range(first[i], first[i + 1]):
            piece, at = _place(lengths[e], scale, shortest, pieces)
            if begins.shape[0]:
                piece += begins[e]
            value = np.float64(tables[piece, DEGREE, 0, 0])
            for power in range(DEGREE - 1, -1, -1):
                value = tables[piece, power, 0, 0] + at * value
            total += value
        out[i] = total


@numba.njit(parallel=True, fastmath=_REORDER, cache=KEEP)
def add_up_back(first, lengths, tables, begins, pieces, scale, shortest, grad, by_length):
    """Derivative of `add_up` by the lengths; arguments as there, and

    Args:
        grad: (N,) derivative by the sums.
        by_length: (E,), added to.
    """
    for i in numba.prange(first.shape[0] - 1):
        for e in range(first[i], first[i + 1]):
            piece, at = _place(lengths[e], scale, shortest, pieces)
            if begins.shape[0]:
                piece += begins[e]
            value, rise = np.float64(tables[piece, DEGREE, 0, 0]), 0.0
            for power in range(DEGREE - 1, -1, -1):
                rise = value + at * rise
                value = tables[piece, power, 0, 0] + at * value
            by_length[e] += 2.0 * scale * grad[i] * rise


@numba.njit(parallel=True, fastmath=_REORDER, cache=KEEP)
def contract(element, a, terms, coefficients, out):
    """Products of messages.

    Args:
        element: (N,) row of `coefficients`.
        a: (N, C, K) messages.
        terms: (terms, 4) component of `out`, then three rows of `a`, -1 for a factor of one.
        coefficients: (elements, terms, K).
        out: (N, M, K), overwritten.
    """
    channels = a.shape[2]
    for i in numba.prange(a.shape[0]):
        z = element[i]
        out[i] = 0
        for term in range(terms.shape[0]):
            row, one, two, three = terms[term, 0], terms[term, 1], terms[term, 2], terms[term, 3]
            if three >= 0:
                for k in range(channels):
                    out[i, row, k] += coefficients[z, term, k] * a[i, one, k] * a[i, two, k] * a[i, three, k]
            elif two >= 0:
                for k in range(channels):
                    out[i, row, k] += coefficients[z, term, k] * a[i, one, k] * a[i, two, k]
            else:
                for k in range(channels):
                    out[i, row, k] += coefficients[z, term, k] * a[i, one, k]


@numba.njit(parallel=True, fastmath=_REORDER, cache=KEEP)
def contract_back(element, a, slopes, powers, coefficients, grad, grad_a):
    """Derivative of `contract` by the messages; arguments as there, and

    Args:
        slopes: (slopes, 5) term, its component, the row that it is derived by, and the two rows that are left, -1 for a
            factor of one.
        powers: (slopes,) what the power of that row was.
        grad: (N, M, K) derivative by the products.
        grad_a: (N, C, K), overwritten.
    """
    channels = a.shape[2]
    for i in numba.prange(a.shape[0]):
        z = element[i]
        grad_a[i] = 0
        for slope in range(slopes.shape[0]):
            term, product, row = slopes[slope, 0], slopes[slope, 1], slopes[slope, 2]
            one, two, power = slopes[slope, 3], slopes[slope, 4], powers[slope]
            if two >= 0:
                for k in range(channels):
                    factor = power * coefficients[z, term, k] * grad[i, product, k]
                    grad_a[i, row, k] += factor * a[i, one, k] * a[i, two, k]
            elif one >= 0:
                for k in range(channels):
                    grad_a[i, row, k] += power * coefficients[z, term, k] * grad[i, product, k] * a[i, one, k]
            else:
                for k in range(channels):
                    grad_a[i, row, k] += coefficients[z, term, k] * grad[i, product, k]


def use_threads(count: int) -> None:
    """Use so many threads, or as many as there are."""
    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))


def threads() -> int:
    """How many threads the kernels use."""
    return int(numba.get_num_threads())
