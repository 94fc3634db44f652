"""The PyTorch worker of `benchmark.py train`: the same network and train step in plain PyTorch.

It prints a JSON line when it is ready. For each line that it reads, a number of steps, it prints their
seconds.
"""

import argparse
import copy
import json
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch_improved import ImprovedUNet


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, temb_dim, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.temb_proj = nn.Linear(temb_dim, c_out)
        self.norm2 = nn.GroupNorm(32, c_out, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(32, c, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj(h)


class UNet(nn.Module):
    """The UNet of the DDIM code."""

    def __init__(self, resolution, channels, ch, ch_mult, num_res_blocks, attn_resolutions, dropout):
        super().__init__()
        self.ch, temb = ch, 4 * ch
        self.dense = nn.Sequential(nn.Linear(ch, temb), nn.SiLU(), nn.Linear(temb, temb))
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        c, skips = ch, [ch]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, m in enumerate(ch_mult):
            attends = resolution >> i in attn_resolutions
            level = nn.ModuleDict({"blocks": nn.ModuleList(), "attn": nn.ModuleList()})
            for _ in range(num_res_blocks):
                level["blocks"].append(ResnetBlock(c, ch * m, temb, dropout))
                c = ch * m
                level["attn"].append(Attention(c) if attends else nn.Identity())
                skips.append(c)
            if i < len(ch_mult) - 1:
                level["resample"] = nn.Conv2d(c, c, 3, stride=2)
                skips.append(c)
            self.down.append(level)
        self.mid = nn.ModuleList([ResnetBlock(c, c, temb, dropout), Attention(c), ResnetBlock(c, c, temb, dropout)])
        for i, m in reversed(list(enumerate(ch_mult))):
            attends = resolution >> i in attn_resolutions
            level = nn.ModuleDict({"blocks": nn.ModuleList(), "attn": nn.ModuleList()})
            for _ in range(num_res_blocks + 1):
                level["blocks"].append(ResnetBlock(c + skips.pop(), ch * m, temb, dropout))
                c = ch * m
                level["attn"].append(Attention(c) if attends else nn.Identity())
            if i:
                level["resample"] = nn.Conv2d(c, c, 3, padding=1)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(32, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, channels, 3, padding=1)

    def forward(self, x, t):
        half = self.ch // 2
        frequencies = torch.exp(torch.arange(half, device=x.device) * (-math.log(10000) / (half - 1)))
        angles = t.float()[:, None] * frequencies
        temb = self.dense(torch.cat([angles.sin(), angles.cos()], 1))
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for block, attn in zip(level["blocks"], level["attn"], strict=True):
                h = attn(block(h, temb))
                skips.append(h)
            if "resample" in level:
                h = level["resample"](F.pad(h, (0, 1, 0, 1)))
                skips.append(h)
        h = self.mid[2](self.mid[1](self.mid[0](h, temb)), temb)
        for level in self.up:
            for block, attn in zip(level["blocks"], level["attn"], strict=True):
                h = attn(block(torch.cat([h, skips.pop()], 1), temb))
            if "resample" in level:
                h = level["resample"](F.interpolate(h, scale_factor=2.0))
        return self.conv_out(F.silu(self.norm_out(h)))


def skip_ratio(alpha_bar, skip):
    """c_t of L_skip at each timestep: √(1−α_skip)/√α_skip (S²-DMs, eq. 12), of ᾱ [T]."""
    alpha_skip = alpha_bar / torch.cat([torch.ones_like(alpha_bar[:skip]), alpha_bar])[: len(alpha_bar)]
    return ((1 - alpha_skip) / alpha_skip).sqrt()


# The networks of `config.model.name`, and what each reads of the settings.
_UNET_SETTINGS = ("resolution", "channels", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout")
NETWORKS = {
    "unet": (UNet, _UNET_SETTINGS),
    "improved_unet": (ImprovedUNet, (*_UNET_SETTINGS, "num_heads", "scale_shift_norm", "t_offset")),
}


def make_network(s):
    """The network of the settings on their device."""
    network, names = NETWORKS[s["network"]]
    layout = torch.channels_last if s["channels_last"] else torch.contiguous_format
    return network(**{name: s[name] for name in names}).to(_device(s), memory_format=layout)


def _device(s):
    return "cuda" if s["device"] == "gpu" else "cpu"


def make_step(s):
    """A function that does a train step and returns its loss, and the network's number of parameters."""
    device, model = _device(s), make_network(s)
    update, _ = make_update(s, model)
    image_shape = s["channels"], s["resolution"], s["resolution"]
    num_images = min(1024, 2**28 // math.prod(image_shape))
    images = torch.randint(0, 256, (num_images, *image_shape), dtype=torch.uint8, device=device)

    def step():
        batch, K = s["batch"], s["K"]
        x0 = images[torch.randint(0, num_images, (batch,), device=device)].float() / 127.5 - 1
        if s["random_flip"]:
            x0 = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x0.flip(3), x0)
        t = torch.randint(0, 1000 - K + 1, (batch,), device=device)
        return update(x0, t, torch.randn(batch * K, *image_shape, device=device))

    return step, sum(p.numel() for p in model.parameters())


def make_update(s, model):
    """A train step on images [B, C, H, W], timesteps [B] and noise [B·K, C, H, W] → loss; and the model of the EMA."""
    on_gpu, device = s["device"] == "gpu", _device(s)
    layout = torch.channels_last if s["channels_last"] else torch.contiguous_format
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=s["lr"], fused=on_gpu)
    network = torch.compile(model) if s["compile"] else model
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    c = skip_ratio(alpha_bar, s["skip"]).float().to(device)
    alpha_bar = alpha_bar.float().to(device)
    weights, averages = list(model.parameters()), list(average.parameters())

    def update(x0, t, noise):
        batch, K, image_shape = len(x0), s["K"], x0.shape[1:]
        levels = (t[:, None] + torch.arange(K, device=device)).flatten()
        a = alpha_bar[levels][:, None, None, None]
        x_t = a.sqrt() * x0.repeat_interleave(K, 0) + (1 - a).sqrt() * noise
        with torch.autocast(device, dtype=torch.bfloat16, enabled=s["dtype"] == "bfloat16"):
            eps = network(x_t.contiguous(memory_format=layout), levels).float()
        eps, noise = (value.reshape(batch, K, *image_shape) for value in (eps, noise))
        loss = (eps[:, 0] - noise[:, 0]).square().sum((1, 2, 3)).mean()
        if s["skip"]:
            scaled = c[t][:, None, None, None] * eps[:, 0]
            loss = s["tau"] * loss + (1 - s["tau"]) * (noise[:, 0] - scaled).square().sum((1, 2, 3)).mean()
        if K > 1:
            loss = loss + s["lam"] * ((eps - noise).sum(1).square() / K**2).sum((1, 2, 3)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if s["grad_clip"]:
            torch.nn.utils.clip_grad_norm_(weights, s["grad_clip"])
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - s["ema_decay"])
        return loss

    return update, average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", help="JSON, as `workers.torch_settings` makes it")
    s = json.loads(parser.parse_args().settings)
    on_gpu = s["device"] == "gpu"
    if not on_gpu:
        torch.set_num_threads(s["threads"])
    torch.manual_seed(0)
    step, parameters = make_step(s)
    began = time.perf_counter()
    step().item()
    ready = {"parameters": parameters, "first_step": time.perf_counter() - began}
    print(json.dumps({**ready, "version": torch.__version__}), flush=True)
    # cuDNN measures its algorithms in the next step: the first run, which does not count, and while nothing else runs.
    torch.backends.cudnn.benchmark = on_gpu
    for line in sys.stdin:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        # Waits for the device.
        loss.item()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
