"""What kernels and their twins are told, besides the tensor they work on."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """A norm over the last axis.

    Attributes:
        weight: `[width]`, or `None`.
        bias: `[width]`, or `None`.
        width: Length of the axis.
        epsilon: Added to the mean square.
        centre: LayerNorm (Ba et al. 2016) instead of RMSNorm (Zhang and Sennrich 2019).
        variant: Where models round, and what they multiply with: 0 weight times the rounded quotient (Llama), 1 one
            plus weight, in float32 (Gemma, Nemotron), 2 weight in float32 (OLMo 2, gpt-oss). LayerNorm never rounds
            in between.
    """

    weight: Tensor | None
    bias: Tensor | None
    width: int
    epsilon: float
    centre: bool = False
    variant: int = 0


class Grid(NamedTuple):
    """A quantized weight in no particular layout.

    `w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g])`, g the group of input k.

    Attributes:
        codes: uint8 `[outputs, inputs]`, each below `2**bits`; or float8_e4m3fn, which are numbers and have no zeros.
        scales: `[outputs, groups]`, in any floating-point format.
        zeros: uint8 `[outputs, groups]`, at most `2**bits`; `None` for `2**(bits - 1)` everywhere (symmetric), and for
            0 with float8 codes.
        bits: Of a code.
        index: Group of each input, int32 `[inputs]`; `None` where they follow one another, `inputs / groups` each.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    bits: int = 4
    index: Tensor | None = None  # type: ignore[assignment]  # a tuple's method of that name is not missed


class Product(NamedTuple):
    """`factor * (x @ weight^T + bias)`.

    Attributes:
        weight: `[outputs, inputs]`, a tensor; a quantized one as a `Grid` for the twin, as a `BlockedWeight` for C.
        bias: `[outputs]`, or `None`.
        factor: On the product.
        group: Inputs whose activations share an int8 scale where the weight is quantized; 0 leaves them as they are.
    """

    weight: Any
    bias: Tensor | None = None
    factor: float = 1.0
    group: int = 0


class PageFormat(NamedTuple):
    """How quantized pages hold a token's keys or values, `[1, bytes]` of uint8 in its slot.

    All heads' codes come first, then a scale of each head, and with 4 bits its lowest value too, both bfloat16.

    Attributes:
        name: `"int8"`: `scale * code`, -127 to 127. `"fp8"`: `scale * code`, e4m3. `"int4"`: `low + scale * code`, 0 to
            15; byte i holds elements i and, in its high half, i + width / 2.
        bits: Of a code.
        parts: Numbers beside a head's codes.
        rotates: Keys are multiplied by a Hadamard matrix before, and queries too: that spreads a channel with large
            values over all (QuaRot, Ashkboos et al. 2024), and leaves products as they are.
    """

    name: str
    bits: int = 8
    parts: int = 1
    rotates: bool = False

    def row_bytes(self, kv_heads: int, width: int) -> int:
        """Bytes of a slot."""
        return kv_heads * (width * self.bits // 8 + 2 * self.parts)


PAGE_FORMATS = {form.name: form for form in (PageFormat("int8"), PageFormat("fp8"), PageFormat("int4", 4, 2, True))}


class Shape(NamedTuple):
    """Key and value heads of a layer, and their widths."""

    kv_heads: int
    key_dim: int
    value_dim: int


TILED = 5  # measured: from this length of a span on, tiles are faster on the CPU for most shapes of heads


class Seen(NamedTuple):
    """The keys and values that single query tokens attend to.

    Attributes:
        keys: All slots of the layer, `[slots, kv_heads, key_dim]`; `[slots, 1, bytes]` if pages are quantized.
        values: `[slots, kv_heads, value_dim]`; likewise.
        table: Page ids of each request, int32 `[requests, pages]`.
        items: Per query token (row of `table`, first visible token, end of the visible tokens), int32 `[tokens, 3]`.
            Those with the same row follow one another and are a span, the shortest first.
        page_size: Tokens per page.
        longest: The most keys a query sees.
        scaling: Factor on the dot products.
        softcap: `c` in `c * tanh(score / c)`, or `None`.
        sinks: `[heads]`, or `None`.
        tiled: Tokens of a span from which on C computes it tile by tile; a query of a shorter one by itself. The two
            differ by rounding.
        form: Of quantized pages.
        coded: What quantized pages hold.
        tree: Bits, int32 `[tokens]`, or `None`: bit j says whether the query sees token `end - 1 - j`. Tokens before
            those 32 are seen. A draft's tokens, which stand one behind the other, see their own branch of a tree by it.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    items: Tensor
    page_size: int
    longest: int
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    tiled: int = TILED
    form: PageFormat | None = None
    coded: Shape | None = None
    tree: Tensor | None = None

    @property
    def shape(self) -> Shape:
        """Heads and widths of what the pages hold."""
        return self.coded or Shape(self.keys.shape[1], self.keys.shape[2], self.values.shape[2])


class Turns(NamedTuple):
    """Rotary embedding of a pass (Su et al. 2021), and where its keys go.

    Attributes:
        cosine: `[tokens, rotated]`, `rotated` at most a head's width; `None` for no rotation. In float32 beside another
            format, nothing is rounded in between.
        sine: Likewise.
        slots: Slot of each token, int64 `[tokens]`.
        pairs: 0 elements i and i + rotated / 2 turn together; 1 elements 2i and 2i + 1; 2 likewise, by entry i of
            cosine and sine.
    """

    cosine: Tensor | None
    sine: Tensor | None
    slots: Tensor
    pairs: int = 0


class Layer(NamedTuple):
    """A decoder layer; kernels/cpu/layer.c has the formulas.

    Attributes:
        norms: Before attention, of queries, of keys, after attention, before the MLP, after the MLP; `None` where the
            model has none. Norms of queries and keys are as wide as a head or as all heads.
        products: Query, key, value, output, gate, up, down. Key and value `None`: the first gives query, key and value
            of one head after the other. Up `None`: an MLP without a gate.
        kind: Name of the activation, see `reference.gated`.
        parallel: The MLP reads 0 the sum of input and attention, 1 the input, 2 what the attention reads.
    """

    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None, Norm | None, Norm | None]
    products: tuple[Product, Product | None, Product | None, Product, Product, Product | None, Product]
    kind: str
    parallel: int = 0


class Stage(NamedTuple):
    """A layer of a pass: what it computes, from which keys, at which positions, with how many query heads.

    `told` is what C is told of the layer alone, if that is known from earlier passes.
    """

    layer: Layer
    seen: Seen
    turns: Turns
    heads: int
    told: tuple[int | float, ...] | None = None
