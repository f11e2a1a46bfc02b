"""A mace-torch interaction, from features of atoms to messages between them, and the way back: two kinds.

All but the parts of `folding` is of each atom by itself. What depends on elements alone, as in the first layer, is
computed once for each element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import silu

from rootstockd.worker.engines.mace.candidates import NotApplicableError
from rootstockd.worker.engines.mace.folding import (
    Convolution,
    Density,
    Linear,
    by_element,
    channels,
    from_e3nn,
    linear,
    row_slices,
    to_e3nn,
)
from rootstockd.worker.engines.mace.passes import Elements, Pass
from rootstockd.worker.engines.mace.radial import RadialTables

_MIXING = {f"RealAgnostic{kind}InteractionBlock" for kind in ("", "Residual", "Density", "DensityResidual")}
_GATED = "RealAgnosticResidualNonLinearInteractionBlock"


class Interaction(Protocol):
    """What a layer needs of its interaction. Features are (N, rows, channels)."""

    def forward(self, h: torch.Tensor, now: Pass) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From features of the layer before to messages, and to what the layer adds to its own, if anything."""

    def backward(self, by_messages: torch.Tensor, by_skipped: torch.Tensor, now: Pass) -> torch.Tensor | None:
        """From the derivatives by these to that by the features, unless they are constant."""

    def forget(self) -> None:
        """Keep nothing that was made for the elements of structures."""


def interaction_of(model: Any, block: Any, dtype: torch.dtype, *, first: bool, use_skip: bool) -> Interaction:
    """An interaction of a model.

    Args:
        model: mace-torch's.
        block: its interaction.
        dtype: the model's.
        first: it is the first layer's: its features are those of elements, and don't depend on positions.
        use_skip: the product behind it adds what skips the interaction, if it is of a kind that has that.

    Raises:
        NotApplicableError: it is of a kind that is not known here.
    """
    kind = type(block).__name__
    if kind == _GATED:
        return _Gated(model, block, dtype, first=first, use_skip=use_skip)
    if kind not in _MIXING:
        raise NotApplicableError(f"an interaction of class {kind}")
    return _Mixing(model, block, dtype, first=first, use_skip=use_skip)


class _Tables:
    """The tables of an interaction."""

    def __init__(self, model: Any, ends: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        self._model, self._ends = model, ends
        self._made: list[RadialTables] = []

    def weights(self, block: Any, count: int) -> RadialTables:
        """Of the tensor product, for so many channels."""
        return self._make(block.conv_tp_weights, (len(block.conv_tp.instructions), count), lambda x: x)

    def density(self, block: Any) -> RadialTables:
        """Of one neighbour; as in the blocks' own forward."""
        return self._make(block.density_fn, (1, 1), lambda x: torch.tanh(x**2))

    def forget(self) -> None:
        """Keep none that depend on elements."""
        for tables in self._made:
            tables.forget()

    def _make(
        self, network: Any, shape: tuple[int, int], finish: Callable[[torch.Tensor], torch.Tensor]
    ) -> RadialTables:
        self._made.append(RadialTables(self._model, network, shape, finish, self._ends))
        return self._made[-1]


def _of_elements(model: Any, irreps: Any, dtype: torch.dtype) -> tuple[torch.Tensor, Elements]:
    """The features of each of the model's elements."""
    every = Elements(np.arange(len(model.atomic_numbers)))
    return from_e3nn(model.node_embedding(torch.eye(every.count, dtype=dtype)), irreps), every


class _Mixing:
    """Messages are mixed, after the convolution, and divided by a number or a density; arguments: `interaction_of`."""

    def __init__(self, model: Any, block: Any, dtype: torch.dtype, *, first: bool, use_skip: bool) -> None:
        kind, conv = type(block).__name__, block.conv_tp
        count = channels(conv.irreps_in1, conv.irreps_out, block.linear.irreps_out)
        self._tables = _Tables(model)
        self._convolution = Convolution(conv, block.linear, self._tables.weights(block, count), constant=first)
        self._density, scale = None, 1.0
        if "Density" in kind:
            self._density = Density(self._tables.density(block))
        else:
            scale = 1.0 / float(block.avg_num_neighbors)
        self._mix = linear(block.linear, scale, self._convolution.mid)
        self._skip = by_element(block.skip_tp)
        self._up = linear(block.linear_up)
        self._residual = "Residual" in kind
        self._uses_skip = self._residual and use_skip
        self._constant: tuple[torch.Tensor, torch.Tensor] | None = None
        if first:
            features, every = _of_elements(model, conv.irreps_in1, dtype)
            skipped = self._skip.forward(features, every) if self._uses_skip else features
            self._constant = self._up.forward(features, every), skipped

    def forget(self) -> None:
        self._tables.forget()

    def forward(self, h: torch.Tensor, now: Pass) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._constant is not None:
            up, skipped = (table[now.elements.each] for table in self._constant)
        else:
            up = self._up.forward(h, now.elements)
            skipped = self._skip.forward(h, now.elements) if self._uses_skip else h
        messages = self._mix.forward(self._convolution.forward(up, now), now.elements)
        if self._density is not None:
            messages = self._density.forward(messages, now)
        if not self._residual:
            messages = self._skip.forward(messages, now.elements)
        return messages, skipped if self._uses_skip else None

    def backward(self, by_messages: torch.Tensor, by_skipped: torch.Tensor, now: Pass) -> torch.Tensor | None:
        if not self._residual:
            by_messages = self._skip.backward(by_messages, now.elements)
        if self._density is not None:
            by_messages = self._density.backward(by_messages, now)
        by_up = self._convolution.backward(self._mix.backward(by_messages, now.elements), now)
        if by_up is None:
            return None
        by_h = self._up.backward(by_up, now.elements)
        return by_h.add_(self._skip.backward(by_skipped, now.elements)) if self._uses_skip else by_h


class _Gated:
    """Messages are mixed, divided by a density, added to the receiver's features, gated and mixed again.

    Weights of the convolution depend on the elements at both ends. Arguments: `interaction_of`.
    """

    def __init__(self, model: Any, block: Any, dtype: torch.dtype, *, first: bool, use_skip: bool) -> None:
        conv = block.conv_tp
        one_hot = torch.eye(len(model.atomic_numbers), dtype=dtype)
        self._tables = _Tables(model, (block.source_embedding(one_hot), block.target_embedding(one_hot)))
        weights = self._tables.weights(block, channels(conv.irreps_in1, conv.irreps_out))
        self._convolution = Convolution(conv, block.linear_1, weights, constant=first)
        self._density = Density(self._tables.density(block), float(block.alpha), float(block.beta))
        count = channels(block.linear_2.irreps_in)
        self._mix = linear(block.linear_1, 1.0, self._convolution.mid, count)
        self._around = linear(block.linear_res, 1.0, None, count)
        self._gate = Gate(block.equivariant_nonlin, block.linear_2.irreps_in, count, dtype)
        self._mix_again = linear(block.linear_2)
        self._skip: Linear | None = linear(block.skip_tp) if use_skip else None
        self._up = linear(block.linear_up)
        self._constant: list[torch.Tensor] | None = None
        if first:
            features, every = _of_elements(model, block.linear_up.irreps_in, dtype)
            up = self._up.forward(features, every)
            self._constant = [up, self._around.forward(up, every)]
            if self._skip is not None:
                self._constant.append(self._skip.forward(features, every))

    def forget(self) -> None:
        self._tables.forget()

    def forward(self, h: torch.Tensor, now: Pass) -> tuple[torch.Tensor, torch.Tensor | None]:
        elements, skipped = now.elements, None
        if self._constant is not None:
            up, around, *others = (table[elements.each] for table in self._constant)
            skipped = others[0] if others else None
        else:
            up = self._up.forward(h, elements)
            around = self._around.forward(up, elements)
            if self._skip is not None:
                skipped = self._skip.forward(h, elements)
        mixed = self._mix.forward(self._convolution.forward(up, now), elements)
        # what the density keeps for its way back stays as it is
        messages = self._gate.forward(self._density.forward(mixed, now) + around, now)
        return self._mix_again.forward(messages, elements), skipped

    def backward(self, by_messages: torch.Tensor, by_skipped: torch.Tensor, now: Pass) -> torch.Tensor | None:
        elements = now.elements
        by_sum = self._gate.backward(self._mix_again.backward(by_messages, elements), now)
        by_mixed = self._density.backward(by_sum, now)
        by_up = self._convolution.backward(self._mix.backward(by_mixed, elements), now)
        if by_up is None:
            return None
        by_h = self._up.backward(by_up.add_(self._around.backward(by_sum, elements)), elements)
        return by_h if self._skip is None else by_h.add_(self._skip.backward(by_skipped, elements))


class Gate:
    """A block's `equivariant_nonlin`: SiLU of scalars, and sigmoids of others times the rows of each higher irrep.

    Args:
        module: e3nn's, or mace-torch's own.
        irreps: of what it gives, scalars first; what it takes has a further scalar for each of the others.
        count: channels of each.
        dtype: the model's.

    Raises:
        NotApplicableError: it is something else.
    """

    def __init__(self, module: Any, irreps: Any, count: int, dtype: torch.dtype) -> None:
        self._gates = len(irreps) - 1
        self._rows = [slice(rows.start + self._gates, rows.stop + self._gates) for rows in row_slices(irreps)[1:]]
        inputs = module.irreps_in
        if inputs[0].dim != len(irreps) * count or list(inputs[1:]) != list(irreps[1:]) or irreps[0].ir.l != 0:
            raise NotApplicableError(f"a gate from {inputs} to {irreps}")
        # both functions are multiplied by constants, which differ from one version of e3nn to another
        x = torch.linspace(-2.0, 2.0, inputs.dim, dtype=dtype)[None]
        expected = module(x)
        self._factors = 1.0, 1.0
        rows = from_e3nn(x[:, inputs[0].dim :], inputs[1:]) if self._gates else x.new_empty((1, 0, count))
        mine = torch.cat([x[:, : inputs[0].dim].reshape(1, len(irreps), count), rows], 1)
        found, wanted = to_e3nn(self._apply(mine), irreps), expected
        ratios = (wanted / found)[0].split([count, found.shape[1] - count])
        self._factors = float(ratios[0].median()), float(ratios[1].median()) if self._gates else 1.0
        error = (to_e3nn(self._apply(mine), irreps) - wanted).abs().max()
        if not float(error) <= 100 * torch.finfo(dtype).eps:
            raise NotApplicableError(f"a gate that differs by {float(error):.1e}")

    def _apply(self, x: torch.Tensor) -> torch.Tensor:
        gates = torch.sigmoid(x[:, 1 : 1 + self._gates]) * self._factors[1]
        parts = [silu(x[:, :1]) * self._factors[0]]
        parts += [x[:, rows] * gates[:, number, None] for number, rows in enumerate(self._rows)]
        return torch.cat(parts, 1)

    def forward(self, x: torch.Tensor, now: Pass) -> torch.Tensor:
        """From (N, 1 scalar + gates + rows, K) to (N, 1 scalar + rows, K)."""
        now.kept[self] = x
        return self._apply(x)

    def backward(self, grad: torch.Tensor, now: Pass) -> torch.Tensor:
        """The derivative by what it was given."""
        x = now.kept.pop(self)
        out = torch.empty_like(x)
        sigmoid = torch.sigmoid(x[:, : 1 + self._gates])
        scalar, own = x[:, 0], sigmoid[:, 0]
        out[:, 0] = grad[:, 0] * (self._factors[0] * own * (1.0 + scalar * (1.0 - own)))
        for number, rows in enumerate(self._rows):
            gate = sigmoid[:, 1 + number]
            by_rows = grad[:, rows.start - self._gates : rows.stop - self._gates]
            out[:, rows] = by_rows * (self._factors[1] * gate[:, None])
            by_gate = (by_rows * x[:, rows]).sum(1)
            out[:, 1 + number] = by_gate * (self._factors[1] * gate * (1.0 - gate))
        return out
