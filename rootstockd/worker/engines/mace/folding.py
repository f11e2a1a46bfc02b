"""The parts of a mace-torch model that are evaluated in another order, as modules that stand in for its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from e3nn import o3

from rootstockd.worker.engines import Array
from rootstockd.worker.engines.mace import kernels
from rootstockd.worker.engines.mace.graph import Graph
from rootstockd.worker.engines.mace.radial import PAIR, NotApplicableError, RadialTables

_DEGREES = 3
_NOTHING = 1e-12
"""Coefficients below this are zeros that were computed."""


class Now:
    """What the replaced modules must know of the evaluation under way, beside their arguments.

    Args:
        graph: the structures.
        elements: (N,) which of the model's elements each atom is.
        lengths: (E, 1) of the edges, on the way to whose derivative everything is.
    """

    def __init__(self, graph: Graph, elements: Array, lengths: torch.Tensor) -> None:
        self.graph, self.elements, self.lengths = graph, elements, lengths
        present, self.by_element = np.unique(elements, return_inverse=True)
        self.present: list[int] = present.tolist()
        # rows of each element, one after another, and the way back
        order = np.argsort(self.by_element, kind="stable")
        self.rows = torch.from_numpy(order)
        self.back = torch.from_numpy(np.argsort(order, kind="stable"))
        self.counts: list[int] = np.bincount(self.by_element).tolist()

    @cached_property
    def pairs(self) -> tuple[Array, Array]:
        """(E,) the number of the pair of elements that each edge joins (see `radial.PAIR`), and which there are."""
        sender, receiver = self.elements[self.graph.sender], self.elements[self.graph.receiver]
        pairs = PAIR * np.minimum(sender, receiver) + np.maximum(sender, receiver)
        return pairs, np.flatnonzero(np.bincount(pairs, minlength=1))


class Shared:
    """Where the modules of one model find `Now`."""

    now: Now


# --- convolution


class Convolution(torch.nn.Module):
    """Stands in for a block's `conv_tp`, by mace-torch's own hook for fused ones.

    Args:
        product: the e3nn tensor product.
        radial: the weights of its paths.
        shared: where `Now` is.
        constant: the senders' features don't depend on positions, as in the first layer.
    """

    def __init__(self, product: Any, radial: RadialTables, shared: Shared, *, constant: bool) -> None:
        super().__init__()
        channels = {mul for mul, _ in [*product.irreps_in1, *product.irreps_out]}
        if len(channels) != 1 or any(mul != 1 for mul, _ in product.irreps_in2):
            raise NotApplicableError("a tensor product of unequal channels")
        self.channels = channels.pop()
        self.inputs = [ir.dim for _, ir in product.irreps_in1]
        self.outputs = [ir.dim for _, ir in product.irreps_out]
        self.radial, self.shared, self.constant = radial, shared, constant
        radial.shape = (len(product.instructions), self.channels)
        self.plan = _plan(product, self.inputs, self.outputs, radial.dtype)

    def forward(
        self, features: torch.Tensor, harmonics: torch.Tensor, _weights: torch.Tensor, _edges: torch.Tensor
    ) -> torch.Tensor:
        h = _rows_first(features, self.inputs, self.channels)
        return _channels_first(_Convolve.apply(h, harmonics, self.shared.now.lengths, self), self.outputs)


class Unused(torch.nn.Module):
    """Stands in for a block's radial network, whose weights the convolution has in tables."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _rows_first(x: torch.Tensor, sizes: list[int], channels: int) -> torch.Tensor:
    """From e3nn's layout (channels x components, irrep after irrep) to (N, rows, channels).

    Args:
        x: (N, features).
        sizes: components of each irrep.
        channels: of each irrep.
    """
    # split, because the derivative of a slice is an array of zeros with the slice in it
    pieces = x.split([channels * size for size in sizes], 1)
    parts = [piece.reshape(len(x), channels, size).transpose(1, 2) for piece, size in zip(pieces, sizes)]
    return (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).contiguous()


def _channels_first(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The way back."""
    parts = [piece.transpose(1, 2).reshape(len(x), -1) for piece in x.split(sizes, 1)]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _plan(product: Any, inputs: list[int], outputs: list[int], dtype: torch.dtype) -> tuple[Array, ...]:
    """The Clebsch-Gordan coefficients of all paths as the loops want them: see `kernels.convolve`."""
    input_row = np.cumsum([0, *inputs])
    output_row = np.cumsum([0, *outputs])
    harmonic = [part.start for part in product.irreps_in2.slices()]
    paths, groups, rows, terms, harmonics = [0], [], [0], [], []
    cg: list[float] = []
    for instruction in product.instructions:
        if instruction.connection_mode != "uvu" or not instruction.has_weight:
            raise NotApplicableError(f"a tensor product in mode {instruction.connection_mode}")
        one, two, out = instruction.i_in1, instruction.i_in2, instruction.i_out
        degrees = (product.irreps_in1[one].ir.l, product.irreps_in2[two].ir.l, product.irreps_out[out].ir.l)
        table = o3.wigner_3j(*degrees, dtype=torch.float64).numpy() * float(instruction.path_weight)
        for a in range(table.shape[0]):
            groups.append(int(input_row[one]) + a)
            for c in range(table.shape[2]):
                begin = len(cg)
                for b in np.flatnonzero(np.abs(table[a, :, c]) > _NOTHING):
                    harmonics.append(harmonic[two] + int(b))
                    cg.append(table[a, b, c])
                if len(cg) > begin:
                    terms.append((int(output_row[out]) + c, begin, len(cg)))
            rows.append(len(terms))
        paths.append(len(groups))
    return (
        np.array(paths, np.int64),
        np.array(groups, np.int64),
        np.array(rows, np.int64),
        np.array(terms, np.int64),
        np.array(harmonics, np.int64),
        np.array(cg, _numpy(dtype)),
    )


def _numpy(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, y: torch.Tensor, lengths: torch.Tensor, of: Convolution) -> torch.Tensor:
        now = of.shared.now
        out = torch.empty((h.shape[0], sum(of.outputs), of.channels), dtype=h.dtype)
        y = y.contiguous()
        ctx.of, ctx.now, ctx.radial = of, now, of.radial.look_up(lengths.numpy(), now)
        kernels.convolve(now.graph.first, now.graph.sender, h.numpy(), y.numpy(), *ctx.radial, *of.plan, out.numpy())
        ctx.save_for_backward(h, y)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        of, now = ctx.of, ctx.now
        h, y = ctx.saved_tensors
        by_y, by_x = torch.zeros_like(y), torch.empty((len(y), 1), dtype=y.dtype)
        wanted = not of.constant
        by_h = torch.zeros((kernels.threads(), *(h.shape if wanted else (1, 1, 1))), dtype=h.dtype)
        kernels.convolve_back(
            now.graph.first, now.graph.sender, h.numpy(), y.numpy(), *ctx.radial, *of.plan,
            grad.contiguous().numpy(), by_y.numpy(), by_x.numpy()[:, 0], by_h.numpy(), wanted,
        )  # fmt: skip
        return by_h.sum(0) if wanted else None, by_y, by_x * of.radial.per_length, None


# --- contraction


class Contraction(torch.nn.Module):
    """Stands in for a block's `symmetric_contractions`.

    Args:
        original: mace-torch's.
        shared: where `Now` is.
    """

    def __init__(self, original: Any, shared: Shared) -> None:
        super().__init__()
        self.shared = shared
        parts = list(getattr(original, "contractions", ()))
        if not parts or any(part.correlation > _DEGREES for part in parts):
            raise NotApplicableError("a symmetric contraction of a kind, or a correlation, that is not known")
        self.outputs: list[int] = []
        terms: list[tuple[int, ...]] = []
        self._folds: list[tuple[torch.Tensor, torch.Tensor]] = []
        components = 0
        for part in parts:
            size = 1
            for degree in range(1, part.correlation + 1):
                tensor = part.U_tensors(degree).double()
                if tensor.dim() == degree + 1:
                    tensor = tensor[None]
                size = tensor.shape[0]
                index, matrix = _monomials(tensor, degree)
                terms += [(components + m, *rows) for m, *rows in index]
                weights = (
                    part.weights_max if degree == part.correlation else part.weights[part.correlation - 1 - degree]
                )
                self._folds.append((matrix, weights.detach()))
            self.outputs.append(size)
            components += size
        self.components = components
        self.terms = np.array(terms, np.int64).reshape(-1, 4)
        self.slopes, powers = _slopes(self.terms)
        self._dtype = self._folds[0][1].dtype
        self.powers = powers.astype(_numpy(self._dtype))
        self.agnostic = self._folds[0][1].shape[0] == 1
        self._coefficients: dict[int, torch.Tensor] = {}
        self._stacks: dict[tuple[int, ...], Array] = {}

    def coefficients(self, elements: Sequence[int]) -> Array:
        """(elements, terms, K) of these elements, folded when first asked for."""
        stack = self._stacks.get(tuple(elements))
        if stack is None:
            for element in elements:
                if element not in self._coefficients:
                    folded = [matrix @ weights[element].double() for matrix, weights in self._folds]
                    self._coefficients[element] = torch.cat(folded).to(self._dtype)
            if len(self._stacks) > 64:  # noqa: PLR2004 - sessions with other elements each, for weeks
                self._stacks.clear()
            stack = torch.stack([self._coefficients[element] for element in elements]).numpy()
            self._stacks[tuple(elements)] = stack
        return stack

    def forward(self, messages: torch.Tensor, _attributes: torch.Tensor) -> torch.Tensor:
        rows = messages.transpose(1, 2).contiguous()
        return _channels_first(_Contract.apply(rows, self), self.outputs)


def _monomials(tensor: torch.Tensor, degree: int) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """The distinct monomials of a U tensor (components, rows^degree, paths), and what each takes of each path."""
    shape = tensor.shape
    indices = torch.nonzero(tensor.abs().amax(-1) > _NOTHING)
    found: dict[tuple[int, ...], torch.Tensor] = {}
    for index in indices.tolist():
        key = (index[0], *sorted(index[1:]), *[-1] * (_DEGREES - degree))
        value = tensor[tuple(index)]
        found[key] = found[key] + value if key in found else value.clone()
    keys = sorted(found)
    return keys, torch.stack([found[key] for key in keys]) if keys else torch.zeros((0, shape[-1]), dtype=torch.float64)


def _slopes(terms: Array) -> tuple[Array, Array]:
    """The derivative of each term by each of its rows: see `kernels.contract_back`."""
    slopes, powers = [], []
    for number, (component, *rows) in enumerate(terms.tolist()):
        factors = [row for row in rows if row >= 0]
        for row in sorted(set(factors)):
            rest = factors.copy()
            rest.remove(row)
            slopes.append((number, component, row, *rest, *[-1] * (2 - len(rest))))
            powers.append(factors.count(row))
    return np.array(slopes, np.int64).reshape(-1, 5), np.array(powers)


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, of: Contraction) -> torch.Tensor:
        now = of.shared.now
        ctx.of = of
        ctx.element = np.zeros(len(rows), np.int64) if of.agnostic else now.by_element
        ctx.coefficients = of.coefficients([0] if of.agnostic else now.present)
        out = torch.empty((rows.shape[0], of.components, rows.shape[2]), dtype=rows.dtype)
        kernels.contract(ctx.element, rows.numpy(), of.terms, ctx.coefficients, out.numpy())
        ctx.save_for_backward(rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        of, out = ctx.of, torch.empty_like(rows)
        kernels.contract_back(
            ctx.element, rows.numpy(), of.slopes, of.powers, ctx.coefficients, grad.contiguous().numpy(), out.numpy()
        )
        return out, None


# --- products with one-hot elements


class ByElement(torch.nn.Module):
    """Stands in for a block's `skip_tp`: a linear map of the features for each element.

    Args:
        product: e3nn's fully connected tensor product with one-hot elements.
        shared: where `Now` is.
    """

    def __init__(self, product: Any, shared: Shared) -> None:
        super().__init__()
        self.shared, self.inputs = shared, product.irreps_in1
        self.outputs = product.irreps_out
        self.maps: list[tuple[int, int, torch.Tensor]] = []
        at = 0
        if len(product.irreps_in2) != 1 or not hasattr(product, "weight") or product.weight.numel() == 0:
            raise NotApplicableError("a tensor product with elements of an unknown kind")
        for instruction in product.instructions:
            if instruction.connection_mode != "uvw":
                raise NotApplicableError(f"a tensor product with elements in mode {instruction.connection_mode}")
            shape = instruction.path_shape
            weight = product.weight[at : at + int(np.prod(shape))].view(shape).detach()
            at += weight.numel()
            degree = product.irreps_in1[instruction.i_in1].ir.l
            scale = float(instruction.path_weight) * float(o3.wigner_3j(degree, 0, degree)[0, 0, 0])
            # (elements, in, out), contiguous for each element
            folded = (weight.double() * scale).to(weight.dtype).transpose(0, 1).contiguous()
            self.maps.append((instruction.i_in1, instruction.i_out, folded))

    def forward(self, features: torch.Tensor, _attributes: torch.Tensor) -> torch.Tensor:
        now, count = self.shared.now, len(features)
        alone = len(now.present) == 1
        x = features if alone else features[now.rows]
        results: list[torch.Tensor | None] = [None] * len(self.outputs)
        inputs = self.inputs.slices()
        for one, out, weight in self.maps:
            mul, ir = self.inputs[one]
            rows = x[:, inputs[one]].reshape(count, mul, ir.dim).transpose(1, 2)
            parts = [part @ weight[z] for part, z in zip(rows.split(now.counts), now.present)]
            mapped = (parts[0] if alone else torch.cat(parts)).transpose(1, 2).reshape(count, -1)
            before = results[out]
            results[out] = mapped if before is None else before + mapped
        filled = [
            x.new_zeros((count, mul * ir.dim)) if result is None else result
            for result, (mul, ir) in zip(results, self.outputs)
        ]
        joined = torch.cat(filled, 1) if len(filled) > 1 else filled[0]
        return joined if alone else joined[now.back]
