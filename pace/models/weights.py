"""A checkpoint's tensors as operators: each taken once, checked, packed in parallel, and its pages given back.

Never two copies in memory: rows are packed a few megabytes at a time, straight from the mapped file.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
from tqdm import tqdm

from pace.errors import ModelError
from pace.ops import MLP, Embedding, LayerNorm, Linear, LMHead, MoE, OperatorConfig, RMSNorm
from pace.ops.mlp import in_panels
from pace.ops.registry import Dtype
from pace.reference.arrays import Array, Float, bfloat16, float32
from pace.reference.pack_experts import BLOCK as MXFP4_BLOCK
from pace.reference.pack_experts import MXFP4, PackedExperts
from pace.reference.pack_linear import PANEL, PackedLinear

from .checkpoint import Checkpoint

SLAB_BYTES = 32 << 20
NAMED = 3  # of the tensors that are wrong
MXFP4_STORED = (np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e8m0fnu))
PACKED = (bfloat16, float32)  # what pack_linear takes
STORED = (*PACKED, np.dtype(np.float16), np.dtype(np.float64))
# What some checkpoints hold and no model reads: tables that are computed from the configuration.
COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")


class Weights:
    """Use as a context, which ends the progress bar. ModelError for a tensor that is not as it is asked for."""

    def __init__(self, checkpoint: Checkpoint, dtype: Dtype, operators: OperatorConfig, progress: bool = False) -> None:
        self.checkpoint, self.dtype, self.operators = checkpoint, dtype, operators
        self.nbytes = 0  # of everything packed
        self.expert_bytes, self.chosen_share = 0, 1.0  # of these, the experts', and how many of them a token chooses
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

    def ignore(self, name: str) -> None:
        """Leave a tensor out on purpose."""
        self._left.discard(name)

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of that name, which was not taken yet."""
        return name in self._left

    def vector(self, name: str, size: int) -> Float:
        """A norm's weight or a bias, (size,); float32 whatever the model's dtype."""
        return self.array(name, (size,))

    def array(self, name: str, shape: tuple[int, ...]) -> Float:
        """A small tensor as it is; float32 whatever the model's dtype."""
        values = self._read(name, shape)
        self._count(values)
        return values

    def linear(
        self, operator: str, names: Sequence[str], rows: Sequence[int], columns: int, bias: bool = False
    ) -> Linear:
        """One linear layer of the weights NAME.weight (and NAME.bias), one below the other."""
        packed = self._packed(operator, [f"{name}.weight" for name in names], rows, columns)
        biases = [self.vector(f"{name}.bias", count) for name, count in zip(names, rows, strict=True)] if bias else None
        weight = self._prepared(operator, packed)
        return Linear(operator, self.operators, self.dtype, weight, np.concatenate(biases) if biases else None)

    def reshaped_linear(
        self,
        operator: str,
        name: str,
        shape: tuple[int, ...],
        to_rows: Callable[[Float], Float],
        bias: str | None = None,
    ) -> Linear:
        """One linear layer of a small tensor that does not lie as (out, in), which `to_rows` makes of it. bias: its
        name.
        """
        rows = np.ascontiguousarray(to_rows(self._read(name, shape)))
        packed = PackedLinear.empty(len(rows), rows.shape[1], self.dtype)
        self._pack_rows(operator, name, rows, packed, 0, 1)
        weight = self._prepared(operator, packed)
        return Linear(operator, self.operators, self.dtype, weight, self.vector(bias, len(rows)) if bias else None)

    def gated_mlp(self, gate_up: Sequence[str], down: str, hidden: int, inner: int, activation: str, bias: bool) -> MLP:
        """gate_up: two weights (inner, hidden), or one that has both, gate's rows before up's; down: (hidden, inner);
        with `bias` all have one.
        """
        fused = len(gate_up) == 1
        shape = (2 * inner if fused else inner, hidden)
        for name in gate_up:
            self._check(f"{name}.weight", shape)
        packed = PackedLinear.empty(inner, hidden, self.dtype, gated=True)
        for half in range(2):
            name = f"{gate_up[half * (not fused)]}.weight"
            self._pack("mlp", name, packed, half, 2, half * inner * fused, inner)
        for name in gate_up:
            self._take(f"{name}.weight", shape)
        biases = [self.vector(f"{name}.bias", shape[0]) for name in gate_up] if bias else None
        up_bias = np.concatenate(biases) if biases else None
        return self._mlp(packed, up_bias, down, hidden, inner, activation, bias)

    def plain_mlp(self, up: str, down: str, hidden: int, inner: int, activation: str, bias: bool) -> MLP:
        """up is (inner, hidden), down is (hidden, inner)."""
        packed = self._packed("mlp", [f"{up}.weight"], [inner], hidden)
        up_bias = self.vector(f"{up}.bias", inner) if bias else None
        return self._mlp(packed, up_bias, down, hidden, inner, activation, bias)

    def _mlp(
        self, up: PackedLinear, up_bias: Float | None, down: str, hidden: int, inner: int, activation: str, bias: bool
    ) -> MLP:
        weights = self._prepared("mlp", up, self._packed("mlp", [f"{down}.weight"], [hidden], inner))
        down_bias = self.vector(f"{down}.bias", hidden) if bias else None
        return MLP(self.operators, self.dtype, weights, activation, up_bias, down_bias)

    def moe(
        self, name: str, hidden: int, inner: int, experts: int, chosen: int, alpha: float, limit: float, mxfp4: bool
    ) -> MoE:
        """NAME.router and NAME.experts, `chosen` for each token. mxfp4: whether they are stored so, and stay so."""
        router = self._packed("moe", [f"{name}.router.weight"], [experts], hidden)
        router_bias = self.vector(f"{name}.router.bias", experts)
        gate_up, down = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
        biases = self.array(f"{gate_up}_bias", (experts, 2 * inner))  # gate and up take turns
        made = MoE(
            self.operators,
            self.dtype,
            router,
            router_bias,
            self._experts(gate_up, experts, inner, hidden, mxfp4, gated=True),
            self._experts(down, experts, hidden, inner, mxfp4, gated=False),
            np.concatenate((biases[:, 0::2], biases[:, 1::2]), axis=1),
            self.array(f"{down}_bias", (experts, hidden)),
            chosen,
            alpha,
            limit,
        )
        self.expert_bytes += made.gate_up.nbytes + made.down.nbytes
        self.chosen_share = chosen / experts
        return made

    def _experts(self, name: str, count: int, rows: int, columns: int, mxfp4: bool, gated: bool) -> PackedExperts:
        """Weights (rows, columns), or two of them whose rows take turns; one expert at a time.

        Stored as (experts, columns, rows), or as MXFP4 in blocks along the columns, and their scales.
        """
        if mxfp4 and columns % MXFP4_BLOCK:
            raise ModelError(f"{name} in {self.checkpoint.path} has {columns} columns; MXFP4 needs multiples of 32")
        stored_rows, blocks = rows * (1 + gated), columns // MXFP4_BLOCK
        shapes: dict[str, tuple[int, ...]] = {name: (count, columns, stored_rows)}
        if mxfp4:
            shapes = {
                f"{name}_blocks": (count, stored_rows, blocks, MXFP4_BLOCK // 2),
                f"{name}_scales": (count, stored_rows, blocks),
            }
        for each, shape in shapes.items():
            self._check(each, shape, MXFP4_STORED if mxfp4 else STORED)
        packed = PackedExperts.empty(count, rows, columns, MXFP4 if mxfp4 else self.dtype, gated)
        for expert in range(count):
            self._pack_expert(list(shapes), packed, expert)
        for each, shape in shapes.items():
            self._take(each, shape, MXFP4_STORED if mxfp4 else STORED)
        return packed

    def _pack_expert(self, names: Sequence[str], into: PackedExperts, expert: int) -> None:
        """names: the weights' alone, or the blocks' and the scales'."""
        weight, *scales = (self.checkpoint.read_rows(name, expert, expert + 1)[0] for name in names)
        if not scales:
            weight = weight.T if weight.dtype in PACKED else weight.T.astype(np.float32)
        steps = 2 if into.gated else 1
        pack = self.operators.resolve("moe", self.dtype).pack_experts
        for first in range(steps):
            rows = weight[first::steps]
            try:
                given = [each[first::steps] for each in scales]
                pack(
                    rows if scales else np.ascontiguousarray(rows),
                    into,
                    expert,
                    *given,
                    first_panel=first,
                    panel_step=steps,
                )
            except ValueError as error:
                if "holds" not in str(error):
                    raise
                raise self._damaged(names[-1], str(error).partition("holds ")[2]) from None
        for name, array in zip(names, (weight, *scales), strict=True):
            self.checkpoint.release(name)
            self._count(array, array.nbytes if scales else None)

    def rms_norm(self, name: str, size: int, eps: float, offset: float = 0.0) -> RMSNorm:
        """offset: what is added to the weight."""
        weight = self.vector(f"{name}.weight", size)
        return RMSNorm(self.operators, self.dtype, weight + np.float32(offset) if offset else weight, eps)

    def layer_norm(self, name: str, size: int, eps: float) -> LayerNorm:
        weight, bias = (self.vector(f"{name}.{which}", size) for which in ("weight", "bias"))
        return LayerNorm(self.operators, self.dtype, weight, bias, eps)

    def embedding(self, name: str, rows: int, columns: int) -> Embedding:
        """A table of (rows, columns), NAME.weight."""
        return Embedding(self.operators, self.dtype, self._packed("embedding", [f"{name}.weight"], [rows], columns))

    def lm_head(
        self,
        embedding: str,
        head: str,
        vocabulary: int,
        hidden: int,
        tied: bool,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> LMHead:
        """Two tables of (vocabulary, hidden), NAME.weight; one for both where they are tied. bias: of the head."""
        packed = table = self._packed("embedding", [f"{embedding}.weight"], [vocabulary], hidden)
        if tied:
            self.ignore(f"{head}.weight")
        else:
            packed = self._prepared("lm_head", self._packed("lm_head", [f"{head}.weight"], [vocabulary], hidden))
        head_bias = self.vector(f"{head}.bias", vocabulary) if bias else None
        return LMHead(self.operators, self.dtype, table, packed, head_bias, scale, softcap)

    def _prepared(self, operator: str, *packed: PackedLinear) -> Any:
        """As the operator's backend multiplies with them; what is given is no longer kept."""
        return self.operators.resolve(operator, self.dtype).prepare(*packed)

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
            self._pack(operator, name, packed, first, 1, 0, count)
            self._take(name, (count, columns))
            first += count // PANEL
        return packed

    def _pack(
        self, operator: str, name: str, into: PackedLinear, first_panel: int, panel_step: int, begin: int, count: int
    ) -> None:
        """Rows begin … begin + count of a tensor."""
        slab = max(SLAB_BYTES // (into.in_features * 4) // PANEL, 1) * PANEL
        for start in range(0, count, slab):
            part = self.checkpoint.read_rows(name, begin + start, begin + min(start + slab, count))
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

    def _read(self, name: str, shape: tuple[int, ...]) -> Float:
        self._take(name, shape)
        values = self.checkpoint.read(name).astype(np.float32)
        if np.isnan(values).any():
            raise self._damaged(name)
        return values

    def _take(self, name: str, shape: tuple[int, ...], dtypes: Sequence[Dtype] = STORED) -> None:
        self._check(name, shape, dtypes)
        self._left.discard(name)

    def _check(self, name: str, shape: tuple[int, ...], dtypes: Sequence[Dtype] = STORED) -> None:
        if (problem := self._problem(name, shape, dtypes)) is not None:
            raise ModelError(f"{self.checkpoint.path}: {problem}")

    def _problem(self, name: str, shape: tuple[int, ...], dtypes: Sequence[Dtype]) -> str | None:
        """What keeps a tensor from being taken."""
        if name not in self._left:
            return f"tensor {name} is not there"
        if (actual := self.checkpoint.shape(name)) != shape:
            return f"{name} has shape {actual}, and config.json makes it {shape}"
        if (dtype := self.checkpoint.dtype(name)) not in dtypes:
            return f"{name} is of dtype {dtype}; supported are {', '.join(map(str, dtypes))}"
        return None

    def _count(self, values: Array, size: int | None = None) -> None:
        """size: in bytes, where it is not that of so many numbers of the model's dtype."""
        size = values.size * self.dtype.itemsize if size is None else size
        self.nbytes += size
        self._bar.update(size)

    def _damaged(self, name: str, what: str = "NaN") -> ModelError:
        return ModelError(f"{name} in {self.checkpoint.path} holds {what}: the file is damaged, download it again")


class Survey(Weights):
    """Takes nothing, and finds all that is wrong: a model is built of it first, of memory that is never touched."""

    def __init__(self, checkpoint: Checkpoint, dtype: Dtype, operators: OperatorConfig) -> None:
        super().__init__(checkpoint, dtype, operators)
        self._problems: dict[str, str] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is not None and not (self._problems and isinstance(error, MemoryError)):
            return
        if error is None:
            left = sorted(self._left - set(self._problems))
            self._problems |= {name: f"{name} is not of this model_type" for name in left}
        if self._problems:
            named, more = list(self._problems.values())[:NAMED], len(self._problems) - NAMED
            raise ModelError(
                f"{self.checkpoint.path} and its config.json do not fit: {'; '.join(named)}"
                f"{f'; and {more} more tensors' if more > 0 else ''}. Download both again"
            ) from None

    def _read(self, name: str, shape: tuple[int, ...]) -> Float:
        self._take(name, shape)
        return np.zeros(shape, np.float32)

    def _check(self, name: str, shape: tuple[int, ...], dtypes: Sequence[Dtype] = STORED) -> None:
        if name not in self._problems and (problem := self._problem(name, shape, dtypes)) is not None:
            self._problems[name] = problem

    def _prepared(self, operator: str, *packed: PackedLinear) -> Any:
        return in_panels(*packed)

    def _packed(self, operator: str, names: Sequence[str], rows: Sequence[int], columns: int) -> PackedLinear:
        for name, count in zip(names, rows, strict=True):
            self._take(name, (count, columns))
        return PackedLinear.empty(sum(rows), columns, self.dtype)

    def _pack(
        self, operator: str, name: str, into: PackedLinear, first_panel: int, panel_step: int, begin: int, count: int
    ) -> None:
        pass

    def _pack_rows(
        self, operator: str, name: str, rows: Array, into: PackedLinear, first_panel: int, panel_step: int
    ) -> None:
        pass

    def _pack_expert(self, names: Sequence[str], into: PackedExperts, expert: int) -> None:
        pass
