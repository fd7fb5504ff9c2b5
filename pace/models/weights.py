"""A checkpoint's tensors as operators: each taken once, checked, packed in parallel, and its pages given back.

Never two copies in memory: rows are packed a few megabytes at a time, straight from the mapped file.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from tqdm import tqdm

from pace.errors import ModelError
from pace.ops import GatedMLP, Linear, LMHead, OperatorConfig, RMSNorm
from pace.ops.registry import Dtype
from pace.reference.arrays import Array, Float, bfloat16, float32
from pace.reference.pack_linear import PANEL, PackedLinear

from .checkpoint import Checkpoint

SLAB_BYTES = 32 << 20
PACKED = (bfloat16, float32)  # what pack_linear takes
STORED = (*PACKED, np.dtype(np.float16), np.dtype(np.float64))
# What some checkpoints hold and no model reads: tables that are computed from the configuration.
COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")


class Weights:
    """Use as a context: on leaving it without an error, every tensor must have been taken."""

    def __init__(self, checkpoint: Checkpoint, dtype: Dtype, operators: OperatorConfig, progress: bool = False) -> None:
        self.checkpoint, self.dtype, self.operators = checkpoint, dtype, operators
        self.nbytes = 0  # of everything packed
        self._left = {name for name in checkpoint.names() if not name.endswith(COMPUTED)}
        total = sum(np.prod(checkpoint.shape(name), dtype=np.int64) for name in self._left) * dtype.itemsize
        self._bar = tqdm(
            total=int(total), unit="B", unit_scale=True, desc="loading", disable=not progress, leave=False, delay=0.3
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if error is None and self._left:
            some = ", ".join(sorted(self._left)[:3])
            raise ModelError(
                f"{self.checkpoint.path} holds {len(self._left)} tensors that its model_type does not have ({some}): "
                "its config.json and its weights are of different models"
            )

    def ignore(self, name: str) -> None:
        """Leave a tensor out on purpose."""
        self._left.discard(name)

    def vector(self, name: str, size: int) -> Float:
        """A norm's weight or a bias, (size,); float32 whatever the model's dtype."""
        self._take(name, (size,))
        values = self.checkpoint.read(name).astype(np.float32)
        if np.isnan(values).any():
            raise self._damaged(name)
        self._count(values)
        return values

    def linear(
        self, operator: str, names: Sequence[str], rows: Sequence[int], columns: int, bias: bool = False
    ) -> Linear:
        """One linear layer of the weights NAME.weight (and NAME.bias), one below the other."""
        packed = self._packed(operator, [f"{name}.weight" for name in names], rows, columns)
        biases = [self.vector(f"{name}.bias", count) for name, count in zip(names, rows, strict=True)] if bias else None
        return Linear(operator, self.operators, self.dtype, packed, np.concatenate(biases) if biases else None)

    def gated_mlp(
        self, gate: str, up: str, down: str, hidden: int, inner: int, activation: str, bias: bool
    ) -> GatedMLP:
        """gate and up are (inner, hidden), down is (hidden, inner); with `bias` all three have one."""
        for name in (gate, up):
            self._check(f"{name}.weight", (inner, hidden))
        gate_up = PackedLinear.empty(inner, hidden, self.dtype, gated=True)
        for first, name in enumerate((gate, up)):
            self._pack("mlp", f"{name}.weight", (inner, hidden), gate_up, first, 2)
        biases = [self.vector(f"{name}.bias", inner) for name in (gate, up)] if bias else None
        return GatedMLP(
            self.operators,
            self.dtype,
            gate_up,
            self._packed("mlp", [f"{down}.weight"], [hidden], inner),
            activation,
            np.concatenate(biases) if biases else None,
            self.vector(f"{down}.bias", hidden) if bias else None,
        )

    def rms_norm(self, name: str, size: int, eps: float) -> RMSNorm:
        return RMSNorm(self.operators, self.dtype, self.vector(f"{name}.weight", size), eps)

    def lm_head(self, embedding: str, head: str, vocabulary: int, hidden: int, tied: bool) -> LMHead:
        """Two tables of (vocabulary, hidden); one for both where they are tied."""
        table = self._packed("lm_head", [embedding], [vocabulary], hidden)
        if tied:
            self.ignore(head)
        packed = table if tied else self._packed("lm_head", [head], [vocabulary], hidden)
        return LMHead(self.operators, self.dtype, table, packed)

    def _packed(self, operator: str, names: Sequence[str], rows: Sequence[int], columns: int) -> PackedLinear:
        for name, count in zip(names, rows, strict=True):  # before memory is taken for what may be absurd
            self._check(name, (count, columns))
        packed = PackedLinear.empty(sum(rows), columns, self.dtype)
        if any(count % PANEL for count in rows[:-1]):  # a weight that ends within a panel: only toy models have it
            for name, count in zip(names, rows, strict=True):
                self._take(name, (count, columns))
            whole = np.concatenate([self.checkpoint.read(name).astype(np.float32) for name in names])
            self._pack_rows(operator, " and ".join(names), whole, packed, 0, 1)
            return packed
        first = 0
        for name, count in zip(names, rows, strict=True):
            self._pack(operator, name, (count, columns), packed, first, 1)
            first += count // PANEL
        return packed

    def _pack(
        self,
        operator: str,
        name: str,
        shape: tuple[int, int],
        into: PackedLinear,
        first_panel: int,
        panel_step: int,
    ) -> None:
        self._take(name, shape)
        rows, columns = shape
        slab = max(SLAB_BYTES // (columns * 4) // PANEL, 1) * PANEL
        for start in range(0, rows, slab):
            part = self.checkpoint.read_rows(name, start, min(start + slab, rows))
            self._pack_rows(operator, name, part, into, first_panel + start // PANEL * panel_step, panel_step)
            self.checkpoint.release(name)

    def _pack_rows(
        self, operator: str, name: str, rows: Array, into: PackedLinear, first_panel: int, panel_step: int
    ) -> None:
        if rows.dtype not in PACKED:
            rows = rows.astype(np.float32)
        try:
            self.operators.resolve(operator, self.dtype).pack_linear(rows, into, first_panel, panel_step)
        except ValueError as error:
            if "holds NaN" not in str(error):
                raise
            raise self._damaged(name) from None
        self._count(rows)

    def _take(self, name: str, shape: tuple[int, ...]) -> None:
        self._check(name, shape)
        self._left.discard(name)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._left:
            raise ModelError(
                f"{self.checkpoint.path} lacks tensor {name}: its download is not whole, or its config.json wrong"
            )
        actual = self.checkpoint.shape(name)
        if actual != shape:
            raise ModelError(f"{name} in {self.checkpoint.path} has shape {actual}; its config.json makes it {shape}")
        if self.checkpoint.dtype(name) not in STORED:
            raise ModelError(
                f"{name} in {self.checkpoint.path} is of dtype {self.checkpoint.dtype(name)}; supported are "
                f"{', '.join(map(str, STORED))}: convert it"
            )

    def _count(self, values: Array) -> None:
        size = values.size * self.dtype.itemsize
        self.nbytes += size
        self._bar.update(size)

    def _damaged(self, name: str) -> ModelError:
        return ModelError(f"{name} in {self.checkpoint.path} holds NaN: the file is damaged, download it again")
