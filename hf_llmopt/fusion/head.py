"""An output head where only the best token of each row counts.

Greedy decoding reads one number of a row of logits: where the largest stands. An int8 copy of the weight, half of what
the head reads, tells every logit but for an error with a strict bound: with `w = q + e` and `x = a + r`, where `a` is x
rounded to int8, of few rows the sum of x and what is left of it, each rounded,

    |w x - q a| <= |e| |x| + |q| |r|      (Cauchy and Schwarz, twice)

Outputs whose upper bound stays below the best lower bound cannot win. The few that are left, some dozens of a hundred
thousand, are multiplied with the weight itself, by the product that serves the head otherwise: the largest logit is the
same to the last bit, and so is the token. All others are estimates, so who looks at logits gets the whole product.
"""

from __future__ import annotations

import weakref
from functools import partial
from random import Random
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..kernels import cpu
from ..kernels.arguments import Grid
from ..kernels.race import best_seconds
from ..kernels.weight import pack
from ..kv_cache.transfer import free_bytes
from .kinds import Forward, fits, inside, plain_linear

LEAST = 1 << 25  # bytes of a weight: smaller ones may stay in a cache, and cost little
ROWS = (8, 4, 2, 1)  # of a pass, tried in this order
GPU_ROWS = 16  # likewise on a GPU
FEW = 4  # rows up to which a second part costs next to nothing
PARTS = 2
# Passes in which the copy would have served, until it is made: among the first calls, which set up other things too.
PASSES = 16
PART = 1 << 18  # elements of the weight that are worked on at a time: they stay in the cache
GPU_PART = 1 << 24  # likewise on a GPU, whose launches would cost more than its work
LEAST_SIZE = 1e-15  # of the largest output: squares of smaller numbers may vanish
SHARE = 32  # one of so many outputs may be left
PAUSE = 64  # passes after one in which more were left, twice as many each time
TILE = 16  # outputs that the product computes alike: those behind the last whole tile may differ in the last bits


class Copy:
    """A weight rounded to int8, with what the rounding changed.

    Args:
        weight: `[outputs, inputs]`, finite.

    Attributes:
        kernel: The rounded weight.
        error: Norm of what each output lost, float32 `[outputs]`.
        size: Largest norm of the rounded outputs.
    """

    def __init__(self, weight: Tensor) -> None:
        outputs, inputs = weight.shape
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales, self.error, sizes = torch.empty(3, outputs, dtype=torch.float32, device=weight.device)
        at_once = max(1, (GPU_PART if weight.is_cuda else PART) // inputs)
        for start in range(0, outputs, at_once):
            part = slice(start, start + at_once)
            wide = weight[part].float()
            scales[part] = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            near = torch.round(wide / scales[part, None])
            codes[part] = near + 128
            near *= scales[part, None]
            sizes[part], self.error[part] = near.norm(dim=1), (wide - near).norm(dim=1)
        self.size = float(sizes.max())
        self.kernel: Any = pack(Grid(codes, scales[:, None], bits=8))
        self._mark = _mark(weight)
        self._place = Random().randrange(inputs)
        self._column = weight[:, self._place].clone()

    @classmethod
    def of(cls, weight: Tensor) -> Copy | None:
        """The copy of a weight, which all engines share; `None` if it cannot be made, or memory is short."""
        found = _copies.get(_mark(weight))
        if found is None or not found.is_of(weight):
            if free_bytes(weight.device) < 4 * weight.numel() or not weight.isfinite().all():
                return None
            try:
                found = cls(weight)
            except (RuntimeError, MemoryError):  # memory is shorter than it said
                return None
            if found.size < LEAST_SIZE:
                return None
            _copies[_mark(weight)] = found
        return found

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is what it was.

        On a CPU a number of each output shows writes that torch does not count; a GPU would have to be waited for.
        """
        same = self._mark == _mark(weight)
        return same and (weight.is_cuda or torch.equal(weight[:, self._place], self._column))

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in self.kernel.tensors.values())


_copies: WeakValueDictionary[tuple[object, ...], Copy] = WeakValueDictionary()


def _mark(weight: Tensor) -> tuple[object, ...]:
    version = -1 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.shape, weight.dtype


class Screened:
    """The replacement of a head, which is asked for the best tokens or for logits (`inside.best`).

    Args:
        head: Which `takes` says yes to.
        whole: Its product.
        limit: Rows up to which that is ours.

    Attributes:
        copy: Of its weight, once there is one.
        returned: Whether the model returns what the head gives it, as it is: a bound on numbers that are scaled or
            capped on their way says nothing of what they become.
    """

    def __init__(self, head: nn.Module, whole: Forward, limit: int) -> None:
        self.copy: Copy | None = None
        self.returned = False
        self._head: Any = weakref.ref(head)
        self._whole = whole
        self._limit = limit
        self._inputs: int = head.in_features  # type: ignore[assignment]
        self._passes = 0  # that could have been screened before there was a copy
        self._mark: tuple[object, ...] = ()  # of the weight that was copied, or could not be
        self._pause, self._length = 0, PAUSE

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        y = self._best(x) if inside.best and self.returned and self._serves(x) else self._whole(x)
        inside.given = y, -1 if y.is_inference() else y._version
        return y

    @staticmethod
    def takes(head: Any) -> bool:
        """Whether a module is such a head, and large enough."""
        return plain_linear(head) and head.bias is None and head.weight.nbytes >= LEAST

    def see(self, logits: Tensor) -> None:
        """Compare what the model returned with what the head gave in this thread's pass."""
        given, inside.given = inside.given, None
        if given is not None:
            self.returned = given[0] is logits and given[1] == (-1 if logits.is_inference() else logits._version)

    def refresh(self) -> None:
        """Drop a copy of a weight that is another now."""
        if self.copy is not None and not self.copy.is_of(self._weight()):
            self.forget()

    def forget(self) -> None:
        """Drop the copy."""
        if self.copy is not None:
            _copies.pop(self._mark, None)
        self.copy, self._mark = None, ()

    def _weight(self) -> Tensor:
        weight: Tensor = self._head().weight
        return weight.detach()

    def _serves(self, x: Tensor) -> bool:
        weight = self._weight()
        if x.numel() > min(self._limit, ROWS[0]) * self._inputs or not fits(x, weight):
            return False
        if self._pause:
            self._pause -= 1
            return False
        if self._mark != _mark(weight):
            self._passes += 1
            if self._passes < PASSES:
                return False
            self._take_copy(weight)
        return self.copy is not None

    def _take_copy(self, weight: Tensor) -> None:
        """Get a copy, and find up to how many rows it is of use."""
        self._passes = 0
        self.copy, self._mark = Copy.of(weight), _mark(weight)
        if self.copy is not None:
            x = torch.linspace(-1, 1, self._inputs, dtype=weight.dtype, device="cpu")
            self._limit = next((rows for rows in ROWS if rows <= self._limit and self._pays(x.repeat(rows, 1))), 0)
            self._pause, self._length = 0, PAUSE
        if not self._limit:
            self.copy = None

    def _pays(self, x: Tensor) -> bool:
        ours, theirs = best_seconds([partial(self._best, x), partial(self._whole, x)], rounds=3)
        return ours < theirs

    def _best(self, x: Tensor) -> Tensor:
        """Logits of which the largest of each row are right, and no other is as large."""
        copy, weight = self.copy, self._weight()
        assert copy is not None
        kernel = copy.kernel
        rows = x.reshape(-1, self._inputs)
        rest = wide = rows.float()
        parts = []
        for _ in range(PARTS if len(rows) <= FEW else 1):
            parts.append(kernel.rounded(rest, kernel.share))
            rest = rest - parts[-1]
        estimates = cpu.quantized_linear(torch.cat(parts), kernel, group=kernel.share)
        # Norms, and products of either kind, are sums of `inputs` numbers in float32.
        rounding = self._inputs * torch.finfo(torch.float32).eps
        spread = wide.norm(dim=1) * (1 + rounding)
        slack = copy.size * (rest.norm(dim=1) + rounding * spread)
        logits, places = cpu.leaders(estimates, copy.error, spread, slack, x.dtype, len(weight) // SHARE)
        if places is None:
            self._pause, self._length = self._length, 2 * self._length
            return self._whole(x)
        whole = len(weight) - len(weight) % TILE
        places = places[places < whole]
        again = places[-1:].expand(-len(places) % TILE)
        places = torch.cat([places, again, torch.arange(whole, len(weight), device="cpu")])
        logits.index_copy_(1, places, cpu.linear(rows, weight.index_select(0, places)))
        return logits.view(*x.shape[:-1], -1)


class ScreenedOnGPU(Screened):
    """The same where layers are launched: nothing waits for the device, and a graph may record it.

    There the estimates are products of x as it is, and however many outputs are left, a kernel multiplies those.

    Args:
        head: Which `takes` says yes to.
        whole: Its product.
    """

    def __init__(self, head: nn.Module, whole: Forward) -> None:
        super().__init__(head, whole, GPU_ROWS)

    def _serves(self, x: Tensor) -> bool:
        weight = self._weight()
        if x.numel() > self._limit * self._inputs or x.dtype != weight.dtype or torch.is_grad_enabled():
            return False
        if self._mark != _mark(weight):
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            self.copy, self._mark = Copy.of(weight), _mark(weight)
        return self.copy is not None

    def _best(self, x: Tensor) -> Tensor:
        from ..kernels.triton.leaders import settle  # Triton may be missing where nothing is launched

        copy = self.copy
        assert copy is not None
        rows = x.reshape(-1, self._inputs).contiguous()
        made = settle(copy.kernel.product(rows), rows, self._weight(), copy.error, copy.size)
        return made.view(*x.shape[:-1], -1)
