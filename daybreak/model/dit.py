"""The denoiser: a transformer over image patches that guesses the clean image.

    x_hat = DiT(x_t, t, text)

Queries come from image tokens, keys and values from text and image tokens. Text tokens are never
updated: each block projects its own keys and values from the same ones. Time enters a block as six
vectors (shift, scale and gate for the attention and for the MLP). Parameter names, shapes and
arithmetic are those of diffusers' `PRXTransformer2DModel`, so an export renames no weight.

Precision  weights are float32; blocks run in `compute` (bfloat16 where the hardware is fast in it);
           time, rotary angles, normalisation and the last projection run in float32.
Letters    b images, n image tokens, l words, h width, a heads, d width of a head, c channels.
Source     PRX: huggingface.co/blog/Photoroom/prx-part1-architectures; modulation: arXiv 2212.09748;
           bottleneck patch embedding: arXiv 2511.13720.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from daybreak.model import backward, product, tread
from daybreak.model.text import Text
from daybreak.model.tread import Route

FEATURES = 256  # number of sinusoids that encode a scalar
ROPE_BASE = 10_000.0
SHORT = 256  # up to so many tokens, a CPU in bfloat16 does not use the fused attention kernel


class Config(BaseModel):
    """Size of the denoiser. `bottleneck = 0` embeds a patch with a single linear layer.

    `resolution` adds an embedding of the picture's height and width to the time vector. `native` is
    the side in pixels of the pictures that the model is meant for: patches of smaller pictures, in
    earlier stages, get the rotary positions that the same places have in a native picture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch: int = Field(default=32, gt=0)
    bottleneck: int = Field(default=256, ge=0)
    width: int = Field(default=1792, gt=0)
    depth: int = Field(default=16, gt=0)
    heads: int = Field(default=28, gt=0)
    mlp: float = Field(default=3.5, gt=0)
    resolution: bool = False
    native: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _heads_fit(self) -> "Config":
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        if self.head_width % 4:
            raise ValueError(
                f"width / heads = {self.head_width} is not a multiple of 4, "
                "which rotary positions on two axes need"
            )
        return self

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    def stretch(self, height: int, width: int) -> float:
        """How many native patches one patch covers along a side: 1, or 2, 4, ... if smaller.

        The power of two nearest to native / sqrt(height width), so that it is the same for all
        aspect ratios of one resolution.
        """
        if not self.native:
            return 1.0
        return max(1.0, 2.0 ** round(math.log2(self.native / math.sqrt(height * width))))

    @property
    def mlp_width(self) -> int:
        """Inner width of the MLP."""
        return int(self.width * self.mlp)


class Tapped(NamedTuple):
    """The output tokens of a block: all of them, or those that the route keeps (`kept`)."""

    block: int
    tokens: Float[Tensor, "b k d"]
    kept: Int[Tensor, "b k"] | None


class Prediction(NamedTuple):
    """The predicted clean image, float32, and the tokens of the tapped blocks."""

    x: Float[Tensor, "b c h w"]
    tapped: tuple[Tapped, ...] = ()


class Linear(nn.Linear):
    """A linear map in the precision of its input, whatever the precision of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return product.linear(x, self.weight.to(x.dtype), bias)


def silent(linear: Linear) -> Linear:
    """Set a layer to zero, so that its output is zero at initialisation."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def rope(
    rows: int,
    columns: int,
    head_width: int,
    device: torch.device | str = "cpu",
    stretch: float = 1.0,
) -> Float[Tensor, "n d"]:
    """Return cosine and sine of each token's rotary angles, interleaved, (rows * columns, d).

    The first half of a head rotates with the row, the second with the column; pair j of an axis
    rotates by 10000^(-4j/d) per position. Patch i has position (i + 1/2) stretch - 1/2, the centre
    of the `stretch` native patches that it covers. Angles are computed in float64.
    """
    pairs = head_width // 4
    frequency = ROPE_BASE ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    row, column = (
        ((torch.arange(side, dtype=torch.float64, device=device) + 0.5) * stretch - 0.5)[:, None]
        * frequency
        for side in (rows, columns)
    )
    angle = torch.cat(
        (
            row[:, None].expand(rows, columns, pairs),
            column[None].expand(rows, columns, pairs),
        ),
        dim=-1,
    ).flatten(0, 1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(-2).float()


class HeadNorm(nn.Module):
    """RMSNorm over the width of a head, in float32, with one learned scale shared by all heads.

    With `angles` the result is rotated (`backward.rotate`), still in float32.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(
        self, x: Float[Tensor, "b a n d"], angles: Float[Tensor, "... n d"] | None = None
    ) -> Float[Tensor, "b a n d"]:
        return backward.head_norm(x, self.weight, angles)


def bias_of(mask: Bool[Tensor, "b k"], dtype: torch.dtype) -> Float[Tensor, "b 1 1 k"]:
    """The bias added to attention scores: zero where the mask is True, else minus infinity.

    Computed once for all blocks: given a mask, each would convert it, forward and backward.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)[:, None, None]


def attend(
    q: Float[Tensor, "b a n d"],
    k: Float[Tensor, "b a k d"],
    v: Float[Tensor, "b a k d"],
    bias: Float[Tensor, "b 1 1 k"],
) -> Float[Tensor, "b a n d"]:
    """softmax(q k^T / sqrt(d) + bias) v; a key whose bias is minus infinity is ignored.

    Short sequences in bfloat16 on a CPU use `backward.attention`: there the backward pass of the
    fused kernel costs up to 2.5 times as much as two products and a softmax (docs/performance.md).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return backward.attention(q, k, v, bias)


class Attention(nn.Module):
    """Image tokens attend to text tokens and to one another; only image tokens have positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        width = config.width
        self.img_qkv_proj = Linear(width, 3 * width, bias=False)
        self.txt_kv_proj = Linear(width, 2 * width, bias=False)
        self.norm_q = HeadNorm(config.head_width)
        self.norm_k = HeadNorm(config.head_width)
        self.norm_added_k = HeadNorm(config.head_width)
        self.to_out = nn.ModuleList([Linear(width, width, bias=False)])

    def forward(
        self,
        x: Float[Tensor, "b n h"],
        words: Float[Tensor, "b l h"],
        bias: Float[Tensor, "b 1 1 k"],
        angles: Float[Tensor, "... n d"],
    ) -> Float[Tensor, "b n h"]:
        q, k, v = rearrange(
            self.img_qkv_proj(x), "b n (three a d) -> three b a n d", three=3, a=self.heads
        ).unbind(0)
        word_k, word_v = rearrange(
            self.txt_kv_proj(words), "b l (two a d) -> two b a l d", two=2, a=self.heads
        ).unbind(0)
        k = torch.cat((self.norm_added_k(word_k), self.norm_k(k, angles)), dim=2)
        answer = attend(self.norm_q(q, angles), k, torch.cat((word_v, v), dim=2), bias)
        projected: Tensor = self.to_out[0](rearrange(answer, "b a n d -> b n (a d)"))
        return projected


class Modulation(nn.Module):
    """Time vector to six vectors: shift, scale and gate, for the attention and for the MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = silent(Linear(width, 6 * width))

    def forward(self, time: Float[Tensor, "b h"]) -> tuple[Float[Tensor, "b 1 h"], ...]:
        six: Tensor = self.lin(F.silu(time))
        return six[:, None].chunk(6, dim=-1)


class Block(nn.Module):
    """x += gate Attention(u), then x += gate MLP(u); each u = (1 + scale) LayerNorm(x) + shift."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.gate_proj = Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = Linear(config.mlp_width, config.width, bias=False)
        self.modulation = Modulation(config.width)

    def forward(
        self,
        x: Float[Tensor, "b n h"],
        words: Float[Tensor, "b l h"],
        bias: Float[Tensor, "b 1 1 k"],
        time: Float[Tensor, "b h"],
        angles: Float[Tensor, "... n d"],
    ) -> Float[Tensor, "b n h"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)
        u = backward.modulate(x, scale1, shift1)
        x = x + gate1 * self.attention(u, words, bias, angles)
        u = backward.modulate(x, scale2, shift2)
        down = self.down_proj.weight.to(x.dtype)
        return x + gate2 * backward.gated(self.gate_proj(u), self.up_proj(u), down)


def sinusoids(x: Float[Tensor, " b"], features: int) -> Float[Tensor, "b f"]:
    """Return cosines, then sines, of x at frequencies that fall from 1 towards 1 / 10000."""
    half = features // 2
    steps = torch.arange(half, dtype=torch.float32, device=x.device)
    angle = x[:, None] * torch.exp(-math.log(10_000) * steps / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class Embedder(nn.Module):
    """Sinusoids to a vector of the network's width: a two-layer MLP, float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layer = Linear(FEATURES, width)
        self.out_layer = Linear(width, width)

    def forward(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b h"]:
        vector: Tensor = self.out_layer(F.silu(self.in_layer(features)))
        return vector


class ResolutionEmbedder(nn.Module):
    """Height and width of the picture, in pixels, to a vector that is added to the time vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = Embedder(width)

    def forward(self, x_t: Float[Tensor, "b c height width"]) -> Float[Tensor, "1 h"]:
        sides = [x_t.new_full((1,), side, dtype=torch.float32) for side in x_t.shape[-2:]]
        vector: Tensor = self.mlp(torch.cat([sinusoids(s, FEATURES // 2) for s in sides], dim=-1))
        return vector


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a projection to pixels, in float32."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), silent(Linear(width, 2 * width)))
        self.linear = silent(Linear(width, pixels))

    def forward(self, x: Float[Tensor, "b n h"], time: Float[Tensor, "b h"]) -> Tensor:
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, dim=-1)
        pixels: Tensor = self.linear(backward.modulate(x.float(), scale, shift))
        return pixels


class DiT(nn.Module):
    """The denoiser. `compute` is the precision of its blocks.

    With a `route`, blocks start, ..., stop - 1 see only the tokens that it keeps. `taps` are the
    blocks, counted from 0, whose output tokens are returned beside the prediction; for a block on
    the route these are the kept tokens.

    Shapes  x_t (b, c, height, width), sides multiples of the patch; t (b,); text of any length.
    Units   pixels [-1, 1]; t in [0, 1]. At initialisation x_hat = 0.
    Errors  einops.EinopsError if the patch does not divide the picture.
    """

    def __init__(
        self,
        config: Config,
        text_width: int,
        channels: int = 3,
        compute: torch.dtype = torch.float32,
        route: tread.Config | None = None,
    ) -> None:
        super().__init__()
        self.config, self.channels, self.text_width = config, channels, text_width
        self.compute = compute
        pixels = channels * config.patch**2
        self.img_in: nn.Module = (
            nn.Sequential(
                Linear(pixels, config.bottleneck), Linear(config.bottleneck, config.width)
            )
            if config.bottleneck
            else Linear(pixels, config.width)
        )
        self.time_in = Embedder(config.width)
        self.resolution_embedder = ResolutionEmbedder(config.width) if config.resolution else None
        self.txt_in = Linear(text_width, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, pixels)
        self.fuse = tread.Fusion(route, config.width) if route and route.kind == "sprint" else None
        self._tables: dict[tuple[int, int, torch.device, float], Tensor] = {}

    def _angles(
        self, rows: int, columns: int, device: torch.device, stretch: float
    ) -> Float[Tensor, "n d"]:
        """Return the rotary table of a resolution; each is computed once."""
        shape = rows, columns, device, stretch
        if shape not in self._tables:
            self._tables[shape] = rope(rows, columns, self.config.head_width, device, stretch)
        return self._tables[shape]

    def forward(
        self,
        x_t: Float[Tensor, "b c height width"],
        t: Float[Tensor, " b"],
        text: Text,
        route: Route | None = None,
        taps: tuple[int, ...] = (),
    ) -> Prediction:
        patch = self.config.patch
        rows, columns = x_t.shape[-2] // patch, x_t.shape[-1] // patch
        patches = rearrange(
            x_t, "b c (rows p) (columns q) -> b (rows columns) (c p q)", p=patch, q=patch
        )
        time = self.time_in(sinusoids(1000.0 * t.float(), FEATURES))
        if self.resolution_embedder is not None:
            time = time + self.resolution_embedder(x_t)
        stretch = self.config.stretch(*x_t.shape[-2:])
        angles = self._angles(rows, columns, x_t.device, stretch)
        bias = bias_of(F.pad(text.mask, (0, rows * columns), value=True), self.compute)

        x = self.img_in(patches.to(self.compute))
        words = self.txt_in(text.tokens.to(self.compute))
        block_time = time.to(self.compute)
        tapped = []

        def walk(
            first: int, stop: int, x: Tensor, angles: Tensor, kept: Tensor | None = None
        ) -> Tensor:
            seen = bias[..., : words.shape[1] + x.shape[1]]  # no image token is ever masked
            for i in range(first, stop):
                x = self.blocks[i](x, words, seen, block_time, angles)
                if i in taps:
                    tapped.append(Tapped(i, x, kept))
            return x

        if route is None and self.fuse is not None:
            route = self.fuse.whole(x)
        if route is None:
            x = walk(0, len(self.blocks), x, angles)
        else:
            x = walk(0, route.start, x, angles)
            turn = route.take(angles.expand(len(x), -1, -1))[:, None]
            walked = walk(route.start, route.stop, route.take(x), turn, route.kept)
            x = self.fuse(route, walked, x) if self.fuse else route.put(walked, into=x)
            x = walk(route.stop, len(self.blocks), x, angles)
        pixels = self.final_layer(x, time)

        return Prediction(
            rearrange(
                pixels,
                "b (rows columns) (c p q) -> b c (rows p) (columns q)",
                rows=rows,
                p=patch,
                q=patch,
            ),
            tuple(tapped),
        )
