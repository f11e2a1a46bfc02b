"""The loops of a fused MACE evaluation, compiled by numba: no array of edges times paths times channels ever exists.

Two operations and their derivatives. Shapes: N atoms, E edges sorted by receiver, K channels, P paths of the tensor
product, S spherical harmonics, H rows of a sender's features, C rows of a message, M components of a product.

*Convolution* (`convolve`, `convolve_back`), where W are polynomials of the edge's length, piece by piece:
``A[i, c, k] = sum over edges (j -> i) of sum over a, b of cg[path, a, b, c] h[j, a, k] Y[edge, b] W[edge, path, k]``

*Contraction* (`contract`, `contract_back`): a polynomial in the rows of one atom's message, channel by channel, whose
coefficients depend on the element: ``B[i, m, k] = sum over terms of coefficient[element, term, k] x A A A``.

Everything here is deterministic for a given number of threads.
"""

from __future__ import annotations

import warnings

import numba
import numpy as np
from numba.core.errors import NumbaSystemWarning

# a confined worker has no /dev/shm for the lock that would guard other processes' use of numba: there are none
warnings.filterwarnings("ignore", "Could not obtain multiprocessing lock", NumbaSystemWarning)

DEGREE = 7
"""Of the polynomials in `tables`; a constant, so that loops over it are unrolled."""
# sums may be reordered, so that they vectorise; NaN and infinities keep their meaning
_REORDER = {"reassoc", "contract", "nsz"}


@numba.njit(parallel=True, fastmath=_REORDER, cache=True)
def convolve(first, sender, h, y, tables, piece, x, paths, groups, rows, terms, harmonics, cg, out):
    """Messages.

    Args:
        first: (N + 1,) each receiver's first edge.
        sender: (E,) atom that each edge comes from.
        h: (N, H, K) senders' features.
        y: (E, S) spherical harmonics.
        tables: (pieces, DEGREE + 1, P, K) coefficients of the radial weights, of x^0 first.
        piece: (E,) which piece an edge's length lies in.
        x: (E,) where in it, from -1 to 1.
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
        message = out[i]
        message[:] = 0
        for e in range(first[i], first[i + 1]):
            table, at, feature = tables[piece[e]], x[e], h[sender[e]]
            for path in range(paths.shape[0] - 1):
                for k in range(channels):
                    value = table[DEGREE, path, k]
                    for power in range(DEGREE - 1, -1, -1):
                        value = table[power, path, k] + at * value
                    weight[k] = value
                for group in range(paths[path], paths[path + 1]):
                    for k in range(channels):
                        product[k] = weight[k] * feature[groups[group], k]
                    for term in range(rows[group], rows[group + 1]):
                        angular = h.dtype.type(0)
                        for b in range(terms[term, 1], terms[term, 2]):
                            angular += cg[b] * y[e, harmonics[b]]
                        row = message[terms[term, 0]]
                        for k in range(channels):
                            row[k] += angular * product[k]


@numba.njit(parallel=True, fastmath=_REORDER, cache=True)
def convolve_back(
    first,
    sender,
    h,
    y,
    tables,
    piece,
    x,
    paths,
    groups,
    rows,
    terms,
    harmonics,
    cg,
    grad,
    grad_y,
    grad_x,
    grad_h,
    wants_h,
):
    """Derivatives of `convolve` by y, x and h; arguments as there, and

    Args:
        grad: (N, C, K) derivative by the messages.
        grad_y: (E, S), added to.
        grad_x: (E,), overwritten.
        grad_h: (threads, N, H, K), added to; each thread has its own, because edges of many receivers share a sender.
        wants_h: whether `grad_h` is wanted.
    """
    channels = h.shape[2]
    threads = grad_h.shape[0]
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
                table, at, feature = tables[piece[e]], x[e], h[j]
                by_x = zero
                for path in range(paths.shape[0] - 1):
                    for k in range(channels):
                        value, rise = table[DEGREE, path, k], zero
                        for power in range(DEGREE - 1, -1, -1):
                            rise = value + at * rise
                            value = table[power, path, k] + at * value
                        weight[k] = value
                        slope[k] = rise
                    for group in range(paths[path], paths[path + 1]):
                        source = groups[group]
                        for k in range(channels):
                            product[k] = weight[k] * feature[source, k]
                            total[k] = zero
                        for term in range(rows[group], rows[group + 1]):
                            angular, by_angular = zero, zero
                            for b in range(terms[term, 1], terms[term, 2]):
                                angular += cg[b] * y[e, harmonics[b]]
                            row = grad[i, terms[term, 0]]
                            for k in range(channels):
                                total[k] += angular * row[k]
                                by_angular += row[k] * product[k]
                            for b in range(terms[term, 1], terms[term, 2]):
                                grad_y[e, harmonics[b]] += cg[b] * by_angular
                        for k in range(channels):
                            by_x += total[k] * feature[source, k] * slope[k]
                        if wants_h:
                            by_feature = grad_h[thread, j, source]
                            for k in range(channels):
                                by_feature[k] += total[k] * weight[k]
                grad_x[e] = by_x


@numba.njit(parallel=True, fastmath=_REORDER, cache=True)
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
        atom, result, of_element = a[i], out[i], coefficients[element[i]]
        result[:] = 0
        for term in range(terms.shape[0]):
            row, factor = result[terms[term, 0]], of_element[term]
            one, two, three = terms[term, 1], terms[term, 2], terms[term, 3]
            if three >= 0:
                for k in range(channels):
                    row[k] += factor[k] * atom[one, k] * atom[two, k] * atom[three, k]
            elif two >= 0:
                for k in range(channels):
                    row[k] += factor[k] * atom[one, k] * atom[two, k]
            else:
                for k in range(channels):
                    row[k] += factor[k] * atom[one, k]


@numba.njit(parallel=True, fastmath=_REORDER, cache=True)
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
        atom, result, of_element = a[i], grad_a[i], coefficients[element[i]]
        result[:] = 0
        for slope in range(slopes.shape[0]):
            factor, by_row = of_element[slopes[slope, 0]], grad[i, slopes[slope, 1]]
            row, power = result[slopes[slope, 2]], powers[slope]
            one, two = slopes[slope, 3], slopes[slope, 4]
            if two >= 0:
                for k in range(channels):
                    row[k] += power * factor[k] * by_row[k] * atom[one, k] * atom[two, k]
            elif one >= 0:
                for k in range(channels):
                    row[k] += power * factor[k] * by_row[k] * atom[one, k]
            else:
                for k in range(channels):
                    row[k] += factor[k] * by_row[k]


def use_threads(count: int) -> None:
    """Use so many threads, or as many as there are."""
    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))


def threads() -> int:
    """How many threads the kernels use."""
    return int(numba.get_num_threads())
