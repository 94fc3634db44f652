"""improved-diffusion's UNet in plain PyTorch, for `torch_worker.py`, with the published names of its weights."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-5)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, emb, dropout, scale_shift):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * c_out if scale_shift else c_out))
        last = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.out_layers = nn.Sequential(norm(c_out), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h, emb = self.in_layers(x), self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        flat = x.flatten(2)
        # The channels are those of the first head's q, k and v, then the second's.
        qkv = self.qkv(self.norm(flat)).unflatten(1, (self.heads, 3, -1)).transpose(3, 4)
        h = F.scaled_dot_product_attention(*qkv.unbind(2)).transpose(2, 3).flatten(1, 2)
        return (flat + self.proj_out(h)).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Layers(nn.Sequential):
    """Layers one after another, those that read the embedding with it."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class ImprovedUNet(nn.Module):
    """The UNet of improved-diffusion (Nichol & Dhariwal 2021)."""

    def __init__(
        self,
        resolution,
        channels,
        ch,
        ch_mult,
        num_res_blocks,
        attn_resolutions,
        dropout,
        num_heads,
        scale_shift_norm,
        t_offset,
    ):
        super().__init__()
        self.ch, self.t_offset, emb, last = ch, t_offset, 4 * ch, len(ch_mult) - 1

        def block(c_in, c_out, *more):
            return Layers(ResBlock(c_in, c_out, emb, dropout, scale_shift_norm), *more)

        def attention(level):
            attends = resolution >> level in attn_resolutions
            return [AttentionBlock(ch * ch_mult[level], num_heads)] if attends else []

        self.time_embed = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        c, skips = ch, [ch]
        self.input_blocks = nn.ModuleList([Layers(nn.Conv2d(channels, ch, 3, padding=1))])
        for i, m in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                self.input_blocks.append(block(c, ch * m, *attention(i)))
                c = ch * m
                skips.append(c)
            if i != last:
                self.input_blocks.append(Layers(Downsample(c)))
                skips.append(c)
        middle = ResBlock(c, c, emb, dropout, scale_shift_norm)
        self.middle_block = block(c, c, AttentionBlock(c, num_heads), middle)
        self.output_blocks = nn.ModuleList()
        for i, m in reversed(list(enumerate(ch_mult))):
            for j in range(num_res_blocks + 1):
                up = [Upsample(ch * m)] if i and j == num_res_blocks else []
                self.output_blocks.append(block(c + skips.pop(), ch * m, *attention(i), *up))
                c = ch * m
        self.out = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1))
        for name, parameter in self.named_parameters():
            if "out_layers.3." in name or ".proj_out." in name or name.startswith("out.2."):
                nn.init.zeros_(parameter)

    def forward(self, x, t):
        half = self.ch // 2
        frequencies = torch.exp(torch.arange(half, device=x.device) * (-math.log(10000) / half))
        angles = (t.float() + self.t_offset)[:, None] * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        h, skips = x, []
        for layers in self.input_blocks:
            h = layers(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for layers in self.output_blocks:
            h = layers(torch.cat([h, skips.pop()], 1), emb)
        return self.out(h)
