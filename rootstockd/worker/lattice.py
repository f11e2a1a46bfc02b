"""What some lattice vectors span, and what they leave."""

from __future__ import annotations

import math

import numpy as np


def spanned(vectors: np.ndarray) -> float:
    """The length, area or volume that one to three vectors in rows span; 1 of none."""
    return math.sqrt(max(np.linalg.det(vectors @ vectors.T), 0.0))


def normals(vectors: np.ndarray) -> np.ndarray:
    """(3 - k, 3) orthonormal, and at right angles to k vectors in rows that are not parallel."""
    return np.linalg.svd(vectors)[2][len(vectors) :] if len(vectors) else np.eye(3)
