"""The parts of a mace-torch model that are evaluated in another order, each with its derivative.

Features of N atoms are arrays (N, rows, channels): irrep after irrep, and in each its components one after another.
Each part has `forward` and `backward`, which turns the derivative of the energy by what `forward` gave into that by
what it was given; what depends on edges is added to the `Pass`. Neither leaves anything for torch's autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from e3nn import o3

from rootstockd.worker.engines import Array
from rootstockd.worker.engines.mace import kernels
from rootstockd.worker.engines.mace.candidates import NotApplicableError
from rootstockd.worker.engines.mace.passes import NOTHING, Elements, Pass
from rootstockd.worker.engines.mace.radial import RadialTables, numpy_type

_DEGREES = 3


def channels(*irreps: Any) -> int:
    """Of each irrep, where all have as many.

    Raises:
        NotApplicableError: they have not.
    """
    found = {mul for each in irreps for mul, _ in each}
    if len(found) != 1:
        raise NotApplicableError("irreps of unequal channels")
    return int(found.pop())


def row_slices(irreps: Any, count: int = 0) -> list[slice]:
    """The rows of each irrep; with `count` channels in each, where an irrep has several times as many."""
    widths = [ir.dim * (mul // count if count else 1) for mul, ir in irreps]
    return [slice(end - width, end) for end, width in zip(np.cumsum(widths).tolist(), widths)]


def to_e3nn(x: torch.Tensor, irreps: Any) -> torch.Tensor:
    """From (N, rows, channels) to e3nn's layout: (N, features), and in each irrep channels x components."""
    parts = [x[:, rows].transpose(1, 2).reshape(len(x), -1) for rows in row_slices(irreps)]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def from_e3nn(x: torch.Tensor, irreps: Any) -> torch.Tensor:
    """The way back."""
    parts = [
        x[:, part].reshape(len(x), mul, ir.dim).transpose(1, 2) for part, (mul, ir) in zip(irreps.slices(), irreps)
    ]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()


# --- linear maps


@dataclass(frozen=True)
class Map:
    """From some rows to some others, of one irrep.

    Args:
        inputs: rows, component after component, and of each component one or several copies.
        outputs: likewise.
        weight: (elements, copies x channels, copies x channels); of one element if it is the same for all.
        components: of the irrep.
    """

    inputs: slice
    outputs: slice
    weight: torch.Tensor
    components: int


class Linear:
    """A linear map of features, irrep by irrep, which may depend on the atom's element.

    Args:
        maps: no two with the same rows on either side.
        inputs: how many rows there are.
        outputs: how many rows there shall be; those that no map gives are zero.
    """

    def __init__(self, maps: list[Map], inputs: int, outputs: int) -> None:
        self._maps, self._inputs, self._outputs = maps, inputs, outputs
        one, filled = maps[0], sum(_width(one.inputs) for one in maps)
        self._by_element = any(len(one.weight) > 1 for one in maps)
        self._channels = one.weight.shape[1] * one.components // _width(one.inputs)
        self._out = one.weight.shape[2] * one.components // _width(one.outputs)
        self._fills = sum(_width(one.outputs) for one in maps) == outputs, filled == inputs
        # of each map, forwards and backwards, the weights of each element
        self._weights = [(list(one.weight), [weight.T for weight in one.weight]) for one in maps]

    def forward(self, x: torch.Tensor, elements: Elements) -> torch.Tensor:
        """From (N, inputs, channels) to (N, outputs, channels)."""
        return self._apply(x, elements, back=False)

    def backward(self, grad: torch.Tensor, elements: Elements) -> torch.Tensor:
        """The derivative by the inputs."""
        return self._apply(grad, elements, back=True)

    def _apply(self, x: torch.Tensor, elements: Elements, *, back: bool) -> torch.Tensor:
        rows, width = (self._inputs, self._channels) if back else (self._outputs, self._out)
        several = self._by_element and len(elements.present) > 1
        if several:
            x = x[elements.order]
        make = x.new_empty if self._fills[back] else x.new_zeros
        out = make((len(x), rows, width))
        for one, both in zip(self._maps, self._weights):
            source, target = (one.outputs, one.inputs) if back else (one.inputs, one.outputs)
            size = one.components
            flat = x[:, source].reshape(len(x) * size, -1)
            weights = [both[back][z] for z in elements.present] if self._by_element else both[back]
            parts = flat.split([count * size for count in elements.counts]) if several else [flat]
            mapped = [part @ weight for part, weight in zip(parts, weights)]
            out[:, target] = (torch.cat(mapped) if several else mapped[0]).view(len(x), _width(target), width)
        return out[elements.back] if several else out


def _width(rows: slice) -> int:
    return int(rows.stop - rows.start)


def linear(module: Any, scale: float = 1.0, mid: Sequence[slice] | None = None, count: int = 0) -> Linear:
    """An e3nn linear map.

    Args:
        module: e3nn's.
        scale: what the result is to be multiplied by.
        mid: the rows of each output's inputs, if these are not one after another: see `Convolution`.
        count: the channels of a row of outputs, if irreps have several times as many.
    """
    irreps_in, irreps_out = module.irreps_in, module.irreps_out
    if getattr(module, "bias", None) is not None and module.bias.numel():
        raise NotApplicableError("a linear map with biases")
    inputs, outputs = row_slices(irreps_in), row_slices(irreps_out, count)
    weights: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for _, instruction, weight in module.weight_views(yield_instruction=True):
        folded = weight.detach().double() * (float(instruction.path_weight) * scale)
        weights.setdefault(instruction.i_out, []).append((instruction.i_in, folded))
    maps = []
    for out, parts in weights.items():
        if mid is None and len(parts) > 1:
            raise NotApplicableError("a linear map that mixes irreps")
        of = inputs[parts[0][0]] if mid is None else mid[out]
        joined = torch.cat([weight for _, weight in sorted(parts, key=lambda part: part[0])])
        maps.append(Map(of, outputs[out], joined.to(module.weight.dtype)[None], irreps_out[out].ir.dim))
    return Linear(maps, inputs[-1].stop, outputs[-1].stop)


def by_element(product: Any) -> Linear:
    """A fully connected tensor product with one-hot elements: a linear map for each element.

    Args:
        product: e3nn's.
    """
    if len(product.irreps_in2) != 1 or not hasattr(product, "weight") or product.weight.numel() == 0:
        raise NotApplicableError("a tensor product with elements of an unknown kind")
    inputs, outputs = row_slices(product.irreps_in1), row_slices(product.irreps_out)
    maps, at = [], 0
    for instruction in product.instructions:
        if instruction.connection_mode != "uvw":
            raise NotApplicableError(f"a tensor product with elements in mode {instruction.connection_mode}")
        shape = instruction.path_shape
        weight = product.weight[at : at + int(np.prod(shape))].view(shape).detach()
        at += weight.numel()
        ir = product.irreps_in1[instruction.i_in1].ir
        scale = float(instruction.path_weight) * float(o3.wigner_3j(ir.l, 0, ir.l)[0, 0, 0])
        # (elements, in, out), contiguous for each element
        folded = (weight.double() * scale).to(weight.dtype).transpose(0, 1).contiguous()
        maps.append(Map(inputs[instruction.i_in1], outputs[instruction.i_out], folded, ir.dim))
    return Linear(maps, inputs[-1].stop, outputs[-1].stop)


# --- convolution


class Convolution:
    """A block's `conv_tp`, summed over neighbours.

    Args:
        product: the e3nn tensor product.
        mixer: the linear map behind it.
        radial: the weights of its paths.
        constant: the senders' features don't depend on positions, as in the first layer.
    """

    def __init__(self, product: Any, mixer: Any, radial: RadialTables, *, constant: bool) -> None:
        if any(mul != 1 for mul, _ in product.irreps_in2) or mixer.irreps_in.dim != product.irreps_out.dim:
            raise NotApplicableError("a tensor product of an unknown kind")
        self._radial, self._constant = radial, constant
        first, starts, strides = _interleaved(mixer)
        self.mid = first
        self._rows = sum(ir.dim for _, ir in product.irreps_out)
        self._plan = _plan(product, starts, strides, radial.dtype)

    def forward(self, h: torch.Tensor, now: Pass) -> torch.Tensor:
        """Messages.

        Args:
            h: (N, H, K) features.
            now: the pass.

        Returns:
            (N, C, K): for each of the mixer's irreps component after component, and of each one row a path.
        """
        out = h.new_empty((len(h), self._rows, h.shape[2]))
        tables = self._radial.look_up(now)
        graph = now.graph
        kernels.convolve(graph.first, graph.sender, now.lengths, h.numpy(), now.y, *tables, *self._plan, out.numpy())
        now.kept[self] = h, tables
        return out

    def backward(self, grad: torch.Tensor, now: Pass) -> torch.Tensor | None:
        """The derivative by the features, unless they are constant."""
        h, tables = now.kept.pop(self)
        graph, wanted = now.graph, not self._constant
        by_h = h.new_zeros((kernels.threads(), *(h.shape if wanted else (1, 1, 1))))
        kernels.convolve_back(
            graph.first, graph.sender, now.lengths, h.numpy(), now.y, *tables, *self._plan,
            grad.numpy(), now.by_y, now.by_length, by_h.numpy(), wanted,
        )  # fmt: skip
        return by_h.sum(0) if wanted else None


def _interleaved(mixer: Any) -> tuple[list[slice], list[int], list[int]]:
    """Where rows of messages lie so that the map behind them reads all copies of a component at once.

    Returns:
        For each of the mixer's outputs the rows of all its inputs; for each of its inputs the first row and the step
        from one component to the next.
    """
    groups: dict[int, list[int]] = {out: [] for out in range(len(mixer.irreps_out))}
    for instruction in mixer.instructions:
        groups[instruction.i_out].append(instruction.i_in)
    slices, at = [], 0
    starts, strides = [-1] * len(mixer.irreps_in), [0] * len(mixer.irreps_in)
    for out, (_, ir) in enumerate(mixer.irreps_out):
        of = sorted(groups[out])
        for place, one in enumerate(of):
            starts[one], strides[one] = at + place, len(of)
        slices.append(slice(at, at + len(of) * ir.dim))
        at += len(of) * ir.dim
    if at != sum(ir.dim for _, ir in mixer.irreps_in):
        raise NotApplicableError("messages that are read twice, or not at all")
    return slices, starts, strides


def _plan(product: Any, starts: list[int], strides: list[int], dtype: torch.dtype) -> tuple[Array, ...]:
    """The Clebsch-Gordan coefficients of all paths as the loops want them: see `kernels.convolve`."""
    input_row = [rows.start for rows in row_slices(product.irreps_in1)]
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
            groups.append(input_row[one] + a)
            for c in range(table.shape[2]):
                begin = len(cg)
                for b in np.flatnonzero(np.abs(table[a, :, c]) > NOTHING):
                    harmonics.append(harmonic[two] + int(b))
                    cg.append(table[a, b, c])
                if len(cg) > begin:
                    terms.append((starts[out] + c * strides[out], begin, len(cg)))
            rows.append(len(terms))
        paths.append(len(groups))
    return (
        np.array(paths, np.int64),
        np.array(groups, np.int64),
        np.array(rows, np.int64),
        np.array(terms, np.int64),
        np.array(harmonics, np.int64),
        np.array(cg, numpy_type(dtype)),
    )


class Density:
    """A block's division of messages by offset + scale x the density of neighbours.

    Args:
        radial: the density of one neighbour at each distance.
    """

    def __init__(self, radial: RadialTables, offset: float = 1.0, scale: float = 1.0) -> None:
        self._radial, self._offset, self._scale = radial, offset, scale

    def forward(self, messages: torch.Tensor, now: Pass) -> torch.Tensor:
        """(N, rows, channels), as are the messages, which are changed."""
        tables, density = self._radial.look_up(now), np.empty(len(messages))
        kernels.add_up(now.graph.first, now.lengths, *tables, density)
        inverse = torch.from_numpy(1.0 / (self._offset + self._scale * density)).to(messages.dtype)[:, None, None]
        messages *= inverse
        now.kept[self] = tables, inverse, messages
        return messages

    def backward(self, grad: torch.Tensor, now: Pass) -> torch.Tensor:
        """The derivative by the messages."""
        tables, inverse, messages = now.kept.pop(self)
        grad = grad * inverse
        by_density = -self._scale * (grad * messages).sum((1, 2)).double().numpy()
        kernels.add_up_back(now.graph.first, now.lengths, *tables, by_density, now.by_length)
        return grad


# --- contraction


class Contraction:
    """A block's `symmetric_contractions`: products of an atom's messages.

    Args:
        original: mace-torch's.
    """

    def __init__(self, original: Any) -> None:
        parts = list(getattr(original, "contractions", ()))
        if not parts or any(part.correlation > _DEGREES for part in parts):
            raise NotApplicableError("a symmetric contraction of a kind, or a correlation, that is not known")
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
            components += size
        self.components = components
        self.terms = np.array(terms, np.int64).reshape(-1, 4)
        self.slopes, powers = _slopes(self.terms)
        self._dtype = self._folds[0][1].dtype
        self.powers = powers.astype(numpy_type(self._dtype))
        self.agnostic = self._folds[0][1].shape[0] == 1
        self.forget()

    def forget(self) -> None:
        """Keep no coefficients."""
        elements, channels = self._folds[0][1].shape[0], self._folds[0][1].shape[-1]
        self._rows = np.full(elements, -1)
        """Each element's row of the coefficients; -1 where they have not been folded."""
        self._coefficients = np.empty((0, len(self.terms), channels), numpy_type(self._dtype))

    def coefficients(self, elements: Sequence[int]) -> tuple[Array, Array]:
        """Each element's row, and (rows, terms, K) coefficients, folded when these elements are first asked for."""
        missing = [element for element in elements if self._rows[element] < 0]
        if missing:
            folded = [
                torch.cat([matrix @ weights[element].double() for matrix, weights in self._folds])
                .to(self._dtype)
                .numpy()
                for element in missing
            ]
            begin = len(self._coefficients)
            self._coefficients = np.concatenate([self._coefficients, folded])
            self._rows[missing] = begin + np.arange(len(missing))  # last: there may be no memory for these
        return self._rows, self._coefficients

    def forward(self, messages: torch.Tensor, now: Pass) -> torch.Tensor:
        """From (N, C, K) messages to (N, M, K)."""
        rows, coefficients = self.coefficients([0] if self.agnostic else now.elements.present)
        element = np.zeros(len(messages), np.int64) if self.agnostic else rows[now.elements.each]
        out = messages.new_empty((len(messages), self.components, messages.shape[2]))
        kernels.contract(element, messages.numpy(), self.terms, coefficients, out.numpy())
        now.kept[self] = element, coefficients, messages
        return out

    def backward(self, grad: torch.Tensor, now: Pass) -> torch.Tensor:
        """The derivative by the messages."""
        element, coefficients, messages = now.kept.pop(self)
        out = torch.empty_like(messages)
        kernels.contract_back(
            element, messages.numpy(), self.slopes, self.powers, coefficients, grad.numpy(), out.numpy()
        )
        return out


def _monomials(tensor: torch.Tensor, degree: int) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """The distinct monomials of a U tensor (components, rows^degree, paths), and what each takes of each path."""
    shape = tensor.shape
    indices = torch.nonzero(tensor.abs().amax(-1) > NOTHING)
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
