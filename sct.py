# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy", "pillow>=10.1", "scipy"]
# ///
"""
sct.py  Stable consistency tuning (Wang et al. 2024, arXiv:2410.18958).

Tunes a diffusion model into f(x_t, t) -> x_0, the end of the probability-flow ODE, by

    min E  w(t, r) d( f(x_t, t), stopgrad f(x_r, r) ),     x_t = x + t z,  x_r = m + r (x_t - m) / t,  r < t,

where ECT has x for m. Here m is the mean of x given x_t over reference images y_1, ..., y_n, one of which is x:

    m = sum_i w_i y_i,     w_i = softmax_i( -|x_t - y_i|^2 / (2 t^2) ).

Given x_t and the set, w_i is the probability that x_t was made from y_i. So E[m | x_t] = E[x | x_t] for every n, with
less variance; n = 1 is ECT. d is the unsquared L2 norm over the whole image, and r approaches t in stages a = 1, 2,
...: r = max(0, t (1 - n(t) / q^a)), n(t) = 1 + k sigmoid(-b t). t is the standard deviation of the noise, in units of
images in [-1, 1].

    python sct.py                                   # embedded digits: diffusion warm-up, then SCT, pictures
    python sct.py --data cifar10 --gpus 8           # ECT's CIFAR-10 recipe; references: all images
    python sct.py --data imagenet64 --gpus 8        # ECT's ImageNet-64 recipe; references: all images of x's class
    python sct.py --out runs/sct-cifar10 --sample 50000 --nfe 2 --guidance 1.5 --save samples.npz
    python sct.py --edges 0.5,2,6 --ts 20 --out runs/sct-phased         # four segments of t: samples take four steps

Differs from ect.py only in: m, a schedule to choose, segments of t, guidance by the network's own earlier average.
There is no official code, and the paper's equations were not at hand. From its abstract, captions, reviews: the four
ideas, and that all images are the best references. From ECT's code: what the knobs cite. Derived: m (weights of
Stable Target Field, Xu et al. 2023), the segments (as in multistep consistency models). Our choices:
- References: all images, if conditional those of x's class; for the digits the step's batch (--refs). They stay uint8,
  5000 at once become float32: 0.3 GB a process at 32 x 32; on ImageNet-64, class by class, 0.2 GB, beside the 16 GB of
  the data set, which go to the GPU if a third of its free memory holds them. Where r = 0 the target is m.
- The target from the same weights (a summary of the paper says their average), levels, schedule, w, d, c, recipe,
  network and evaluation are ECT's (ect.py). What makes the paper's schedule smoother is unknown; --smooth 1 is ECT's
  with the real exponent 1 + step / d, equal to it where a stage begins; it ends at n / (256 q).
- In phased training r stays at or above the lower edge s of t's segment and (s/t) x_t + (1 - s/t) f is trained.
  The sampler steps past each edge, to eta times it, along the same line; the paper's edges and eta are unknown.
- Guidance: f_weak + w (f - f_weak), f_weak the average weights at half the training; the paper's w is unknown.
"""
import argparse, contextlib, copy, csv, glob, hashlib, io, json, logging, math, os, pickle, signal, socket, sys, tarfile
import time, warnings, zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn             # imported after a group exists, it would keep that alive until exit
import torch.multiprocessing as mp
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import affine_grid, avg_pool2d, conv2d, grid_sample, interpolate, one_hot, silu

# ------------------------------------------------------------------------------------------------------ method

SD = 0.5                                # sigma_d, the standard deviation of the data


def f(net, x, t, labels=None, s=0, shift=0):
    """Consistency function: x (B, 3, H, W) at noise level t (B,) or (B, 1, 1, 1) -> estimate of x_0, or in phased
    training of x_s, s (B, 1, 1, 1) the lower edge of t's segment; like x.

    EDM's preconditioning [Karras et al. 2022, Table 1], so f(x, 0) = x; net is the raw network F. Samples may use
    a shift of t in two of its factors."""
    t = t.to(x).view(-1, 1, 1, 1)
    c_skip = SD**2 / ((t - shift)**2 + SD**2)
    c_out = (t - shift) * SD / (t**2 + SD**2).sqrt()
    c_in = 1 / (t**2 + SD**2).sqrt()
    c_noise = t.flatten().log() / 4
    x_0 = c_skip * x + c_out * net(c_in * x, c_noise, labels)
    ratio = s / t.clamp(min=1e-9)       # 0 at t = 0, not 0 / 0
    return ratio * x + (1 - ratio) * x_0


class Loss(nn.Module):
    """The objective at the top of this file; self.weak is the average kept for guidance."""

    def __init__(self, net, cfg, data):
        super().__init__()
        self.net, self.cfg, self.data, self.weak = net, cfg, data, frozen(net) if cfg.weak else None
        cfg.d = cfg.d or max(1, math.ceil((cfg.steps - cfg.warmup) * math.log(cfg.q, 256)))
        self.edges = torch.tensor([0.0, *cfg.edges], dtype=torch.float64)
        if (self.edges.diff() <= 0).any(): stop(f'--edges {cfg.edges}: they must be positive and rise')
        if 1 < cfg.refs < cfg.batch: stop(f'--refs {cfg.refs}: 0, 1, or at least the batch, {cfg.batch}, or inf')
        if cfg.refs != 1 and data:      # image numbers of each class
            classes = data[1] if cfg.cond else torch.zeros(len(data[0]), dtype=torch.int64)
            self.members = classes.argsort(stable=True).split(classes.bincount().tolist())

    def forward(self, x, labels, u, z, step):
        """x (B, 3, H, W) in [-1, 1], labels (B,) or None, u uniform (B,), z normal like x -> loss per sample (B,)."""
        if step < self.cfg.warmup: return diffusion_loss(self.net, x, labels, u, z)
        t, r = self.levels(u, step)
        return self.pair(x, labels, z, t, r, step)

    def levels(self, u, step):
        """u uniform (B,) -> noise levels t > r (B,), float64."""
        cfg = self.cfg
        t = torch.exp(cfg.P_mean + cfg.P_std * torch.special.ndtri(u.double()))
        a = (step - cfg.warmup) / cfg.d + 1
        if not cfg.smooth: a = int(a)
        n = 1 + cfg.k * torch.sigmoid(-cfg.b * t)
        r = (t * (1 - n / cfg.q**a)).clamp(min=self.edge(t))
        return t, r

    def edge(self, t):
        """The lower edge of t's segment, 0 without phases: s_m for t in (s_m, s_m+1], like t."""
        edges = self.edges.to(t)
        return edges[(torch.searchsorted(edges, t.contiguous()) - 1).clamp(min=0)]

    def weight(self, t, r):
        """w(t, r) (B,): 1/(t - r), or 1/c_out^2, EDM's weight."""
        return 1 / (t - r) if self.cfg.weight == '1/(t-r)' else (t**2 + SD**2) / (t * SD)**2

    def pair(self, x, labels, z, t, r, step):
        """Weighted distance of f(x_t, t) and its target at r -> (B,)."""
        w = self.weight(t, r).to(x, non_blocking=True)          # from float64: t - r is small
        t, r, s = (v.to(x, non_blocking=True).view(-1, 1, 1, 1) for v in (t, r, self.edge(t)))
        x_t = x + t * z
        m = x if self.cfg.refs == 1 else self.mean(x, x_t, labels, t, step)
        x_r = m + r * (z + (x - m) / t)                         # z + (x - m) / t = (x_t - m) / t
        with torch.no_grad(), same_dropout(x):
            target = torch.where(r > s, f(self.net, x_r, r.clamp(min=1e-6), labels, s), x_r)
        distance = torch.linalg.vector_norm(f(self.net, x_t, t, labels, s) - target, dim=(1, 2, 3))
        if self.cfg.c: distance = (distance**2 + self.cfg.c**2).sqrt() - self.cfg.c
        return w * distance

    def mean(self, x, x_t, labels, t, step):
        """m of each sample, like x, from the references of its class."""
        cfg, m = self.cfg, torch.empty_like(x)
        whole = not cfg.micro and not dist.is_initialized()     # x is the step's whole batch
        y = labels.cpu() if cfg.cond else torch.zeros(len(x), dtype=torch.int64)       # waits for the GPU
        for c in y.unique().tolist():
            own = (y == c).nonzero().squeeze(1).to(x.device, non_blocking=True)
            chunks = [x[own]] if whole and not cfg.refs else self.references(c, step, x.device)
            m[own] = posterior_mean(x_t[own], t[own], chunks)
        return m

    def references(self, c, step, device):
        """Yields the step's references of class c, the same in every process, up to 5000 at a time (n, 3, H, W). Every
        image among them is equally likely to be x, which makes m unbiased."""
        cfg, images, members = self.cfg, self.data[0], 2 * self.members[c]      # 2 i is image i,
        if cfg.flip: members = torch.cat([members, members + 1])                # 2 i + 1 its mirror image
        if cfg.refs < math.inf: members = self.some_of(members, step)
        for numbers in members.split(5000):
            y = images[(numbers // 2).to(images.device, non_blocking=True)].to(device, non_blocking=True)
            y, flip = y.float() / 127.5 - 1, (numbers % 2 > 0).to(device, non_blocking=True).view(-1, 1, 1, 1)
            yield torch.where(flip, y.flip(3), y)

    def some_of(self, members, step):
        """Of these numbers those in the step's batch; or its distinct ones and others at random, --refs in all."""
        cfg, g = self.cfg, torch.Generator().manual_seed(seed_of(self.cfg, 999, step))
        index, _, flips = draw(cfg, len(self.data[0]), cfg.batch, step)
        batch = 2 * index + flips
        own = batch[torch.isin(batch, members)]
        if not cfg.refs: return own
        own = own.unique()
        rest = members[~torch.isin(members, own)]
        return torch.cat([own, rest[torch.randperm(len(rest), generator=g)[:max(int(cfg.refs) - len(own), 0)]]])

    def phase(self, step):
        """-> name, first step, learning rate, images per step"""
        cfg = self.cfg
        if step < cfg.warmup: return 'diffusion', 0, cfg.lr_warmup, cfg.batch
        lr = cfg.lr / max((step - cfg.warmup) / cfg.t_ref, 1)**0.5
        if cfg.anneal: lr *= (cfg.steps - step) / (cfg.steps - cfg.warmup)
        return 'sct', cfg.warmup, lr, cfg.batch

    def optimiser(self, weights, step):
        """A new one, as a phase begins; its learning rate is set in each step."""
        return getattr(torch.optim, self.cfg.opt)(weights, betas=(0.9, self.cfg.beta2), foreach=True)

    def begin(self, ema):
        """Called as a phase begins: it starts from the averaged weights of the last."""
        self.net.load_state_dict(ema.state_dict())

    def averages(self, ema, step):
        """-> [(network that follows self.net, decay)], called after each step."""
        if self.weak and step == weak_step(self.cfg): self.weak.load_state_dict(ema.state_dict())
        power = (1 - 1 / (step - self.phase(step)[1] + 1))**(self.cfg.ema_gamma + 1)
        return [(ema, power if self.cfg.ema_gamma else self.cfg.ema)]


@torch.no_grad()
def posterior_mean(x_t, t, chunks):
    """Mean of x given x_t = x + t z if x is one of the references, each as likely: x_t (B, 3, H, W), t (B, 1, 1, 1),
    chunks of references, (n, 3, H, W) each -> (B, 3, H, W). The softmax over all is summed chunk by chunk, relative to
    the largest weight so far, in float32 without TF32; |x_t|^2, common to all weights, would cancel badly: left out."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    x, t, total, mean = x_t.flatten(1), t.flatten(1), 0, 0
    top = torch.full_like(t, -math.inf)
    with torch.autocast(x_t.device.type, enabled=False):
        for y in chunks:
            y = y.flatten(1).to(x)
            logits = (x @ y.T - y.square().sum(1) / 2) / t**2
            last, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
            w, scale = (logits - top).exp(), (last - top).exp()
            total, mean = scale * total + w.sum(1, keepdim=True), scale * mean + w @ y
    torch.set_float32_matmul_precision(before)
    return (mean / total).view_as(x_t)


def weak_step(cfg): return cfg.warmup + int(cfg.weak * (cfg.steps - cfg.warmup))


def frozen(net):
    """A copy of the network that does not train; a plain function stands for itself."""
    return copy.deepcopy(net).requires_grad_(False) if isinstance(net, nn.Module) else net


def diffusion_loss(net, x, labels, u, z):
    """EDM's loss [Karras et al. 2022, Table 1], of the warm-up: ln t ~ N(-1.2, 1.2^2), weight 1/c_out^2 -> (B,)."""
    t = torch.exp(-1.2 + 1.2 * torch.special.ndtri(u.double()))
    w = ((t**2 + SD**2) / (t * SD)**2).to(x, non_blocking=True)
    t = t.to(x, non_blocking=True).view(-1, 1, 1, 1)
    return w * (f(net, x + t * z, t, labels) - x).square().mean((1, 2, 3))


@contextlib.contextmanager
def same_dropout(x):
    """The next forward pass on x's device draws the dropout masks that were drawn inside."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []): yield


class Guided(nn.Module):
    """A network and a weak one, as one network: F_weak + w (F - F_weak), and so the same of f."""

    def __init__(self, net, weak, w):
        super().__init__()
        self.net, self.weak, self.w = net, weak, w

    def forward(self, x, c_noise, labels=None):
        return torch.lerp(self.weak(x, c_noise, labels), self.net(x, c_noise, labels), self.w)


@torch.no_grad()
def sample(net, z, ts, labels=None, noise=None, edges=(), eta=1.0, shift=0):
    """Standard normal z (B, 3, H, W) -> images in about [-1, 1]: one network evaluation for each noise level in ts.
    With edges, of a phased network: one for each segment below ts[0], without noise, stopping at eta times an edge."""
    if edges: ts = [ts[0]] + [eta * s for s in reversed(edges) if s < ts[0]]
    x = ts[0] * z
    for i, t in enumerate(ts):
        x_0 = f(net, x, torch.full((len(z),), t), labels, shift=shift)
        if i == len(ts) - 1: return x_0
        s = ts[i + 1]
        x = s / t * x + (1 - s / t) * x_0 if edges else x_0 + s * (torch.randn_like(z) if noise is None else noise[i])

# ------------------------------------------------------------------------------------------------------ recipe

EDM = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl'
EDM2 = 'https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img64-s-1073741-0.075.pkl'

CONFIG = dict(      # (glyphs,    cifar10,      imagenet64,   meaning [source]), or one value for all three
    steps=(         6500,         400_000,      100_000,      'optimiser steps in all [README: 100k, 200k, 400k]'),
    warmup=(        3000,         200_000,      50_000,       'of these, diffusion training; 0: none, as with --init'),
    batch=(         32,           128,          128,          'images per step over all processes [run_ecm.sh]'),
    lr=(            1.2e-3,       1e-4,         1e-3,         'learning rate [run_ecm.sh]'),
    lr_warmup=(     2e-3,         5e-4,         1e-3,         'learning rate of the warm-up'),
    opt=(           'RAdam',      'RAdam',      'Adam',       'optimiser [run_ecm.sh]'),
    beta2=(         0.999,        0.999,        0.99,         'second moment decay, in [0, 1)'),
    t_ref=(         math.inf,     math.inf,     2000,         'lr / sqrt(max(step / t_ref, 1))'),
    anneal=(        1,            0,            0,            '1: lr falls linearly to 0 after the warm-up'),
    ema=(           0.998,        0.9999,       0.9999,       'decay of the average, in [0, 1) [ct_train.py]'),
    ema_gamma=(     0.0,          0.0,          16.97,        'decay (1 - 1/step)^(ema_gamma + 1), std 0.05; 0: ema'),
    clip=(          math.inf,                                 'gradient norm limit'),
    P_mean=(        0.0,          -1.1,         -0.8,         'ln t ~ N(P_mean, P_std^2) [loss.py]; may be negative'),
    P_std=(         1.3,          2.0,          1.6,          'its standard deviation'),
    refs=(          0.0,          math.inf,     math.inf,     'references per class; inf: all; 0: the batch; 1: ECT'),
    smooth=(        0,                                        "1: r approaches t continuously; 0: in ECT's stages"),
    edges=(         (),                                       'phased: inner edges of the segments of t, as 0.5,2,6'),
    eta=(           1.0,                                      'phased: samples step to eta times each edge'),
    weak=(          0.5,                                      'part, in [0, 1), of training before f_weak is kept'),
    guidance=(      1.0,                                      'w: samples of f_weak + w (f - f_weak)'),
    q=(             2.0,          2.0,          4.0,          '1 - r/t is n(t) / q^a in stage a, q > 1 [loss.py]'),
    d=(             400,          0,            0,            'steps per stage; 0: 1 - r/t ends at n/256 [run_ecm.sh]'),
    k=(             8.0,                                      'n(t) = 1 + k sigmoid(-b t) [loss.py]; 0: n = 1'),
    b=(             1.0,                                      'rate in n(t) [loss.py]'),
    c=(             0.03,         0.0,          0.06,         'pseudo-Huber constant; 0: the plain norm [ct_train.py]'),
    weight=(        '1/c_out^2',  '1/(t-r)',    '1/c_out^2',  'w(t, r); 1/c_out^2 = 1/t^2 + 1/sigma_d^2'),
    shift=(         0.0,          0.003,        0.0,          'samples: t - shift in c_skip and c_out [networks.py]'),
    ts=(            (20, 1),      (80, 0.821),  (80, 1.526),  'noise levels of the sampler, the first --nfe of them'),
    init=(          'none',       EDM,          EDM2,         'none, our checkpoint, EDM, EDM2, ECT, TCM .pkl'),
    res=(           16,           32,           64,           'image side'),
    flip=(          0,                                        '1: random horizontal flips'),
    cond=(          0,            0,            1,            '1: class-conditional'),
    classes=(       10,           10,           1000,         'classes if conditional (counted in the data)'),
    arch=(          'ddpmpp',     'ddpmpp',     'edm2',       'network'),
    ch=(            32,           128,          192,          'channels at full resolution'),
    mult=(          (1, 1, 2),    (2, 2, 2),    (1, 2, 3, 4), 'channel multipliers, full resolution first'),
    blocks=(        1,            4,            3,            'residual blocks per resolution, < 100'),
    attn=(          (8,),         (16,),        (16, 8),      'resolutions with attention; 0: none'),
    head_dim=(      0,            0,            64,           'channels per attention head; 0: one head'),
    dropout=(       0.0,          0.2,          0.4,          'dropout rate in [0, 1) [run_ecm.sh]'),
    dropout_res=(   math.inf,     math.inf,     16,           'largest resolution with dropout [ct_train.py]'),
    amp=(           'off',        'off',        'tf32',       'precision on a GPU; off: float32. On a CPU: off'),
    seed=(          0,                                        'of all random numbers; may be negative'),
    save_every=(    1000,         10_000,       5000,         'steps between checkpoints and sample grids'),
    log_every=(     50,           100,          100,          'steps between status lines'),
)
CHOICES = dict(weight=('1/(t-r)', '1/c_out^2'), arch=('ddpmpp', 'edm2'),
               opt=('RAdam', 'Adam'), amp=('off', 'tf32', 'fp16', 'bf16'), device=('auto', 'cpu'))

# === From here on the scripts are the same, but for networks (ct, ict; scm), editing (ct), samplers (ect, sct, scm) ===

# ----------------------------------------------------------------------------------------------------- network

SHAPE = 'arch ch mult blocks attn head_dim'.split()             # the knobs that come with --init


def init(layer, gain=1.0):
    """EDM's initialisation: Xavier-uniform weights times gain, zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def norm(ch): return nn.GroupNorm(math.gcd(min(32, ch // 4), ch), ch, eps=1e-6)


class Block(nn.Module):
    """EDM's residual block with optional resampling (turn 'up' or 'down') and self-attention."""

    def __init__(self, cin, cout, cfg, res, attention=False, turn=None):
        super().__init__()
        self.cin, self.cout, self.turn = cin, cout, turn
        self.heads = attention and (max(1, cout // cfg.head_dim) if cfg.head_dim else 1)
        self.norm0 = norm(cin)
        self.conv0 = init(nn.Conv2d(cin, cout, 3, padding=1))
        self.affine = init(nn.Linear(4 * cfg.ch, cout))
        self.norm1 = norm(cout)
        self.dropout = nn.Dropout(cfg.dropout) if res <= cfg.dropout_res else nn.Identity()
        self.conv1 = init(nn.Conv2d(cout, cout, 3, padding=1), 1e-5)
        self.skip = init(nn.Conv2d(cin, cout, 1)) if cin != cout or turn else nn.Identity()
        if attention:
            self.norm2 = norm(cout)
            self.qkv = init(nn.Conv2d(cout, 3 * cout, 1), 0.2**0.5)
            self.proj = init(nn.Conv2d(cout, cout, 1), 1e-5)

    def forward(self, x, e):
        h = silu(self.norm0(x))
        if self.turn == 'down': h, x = avg_pool2d(h, 2), avg_pool2d(x, 2)
        if self.turn == 'up': h, x = interpolate(h, scale_factor=2), interpolate(x, scale_factor=2)
        h = self.conv0(h) + self.affine(e)[:, :, None, None]
        h = self.conv1(self.dropout(silu(self.norm1(h))))
        x = (h + self.skip(x)) * 0.5**0.5
        if self.heads:                  # explicit softmax: fused kernels have no forward mode, for scm.py
            B, C, H, W = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(B * self.heads, C // self.heads, 3, H * W).unbind(2)
            w = torch.einsum('bcq,bck->bqk', q, k / (C // self.heads)**0.5).softmax(-1)
            x = (self.proj(torch.einsum('bqk,bck->bcq', w, v).reshape(B, C, H, W)) + x) * 0.5**0.5
        return x


class DDPMpp(nn.Module):
    """EDM's DDPM++ [Song et al. 2021; EDM networks.py SongUNet] without augmentation input:
    (x (B, 3, H, W), c_noise (B,), labels (B,) or None) -> (B, 3, H, W). cfg: SHAPE, res, cond, classes,
    dropout, dropout_res. Parameters stand in the order of EDM's, so its weights load by position."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, emb, half = cfg, 4 * cfg.ch, cfg.ch // 2
        self.register_buffer('freqs', 1e4 ** (-torch.arange(half) / (half - 1)), persistent=False)
        self.classes = cfg.classes if cfg.cond else 0
        if self.classes: self.map_label = init(nn.Linear(self.classes, cfg.ch))
        self.map0, self.map1 = init(nn.Linear(cfg.ch, emb)), init(nn.Linear(emb, emb))

        widths, ch = [int(cfg.ch * m) for m in cfg.mult], cfg.ch
        self.enc, self.dec = nn.ModuleList([init(nn.Conv2d(3, ch, 3, padding=1))]), nn.ModuleList()
        for level, width in enumerate(widths):
            res = cfg.res >> level
            if level: self.enc.append(Block(ch, ch, cfg, res, turn='down'))
            for _ in range(cfg.blocks):
                self.enc.append(Block(ch, width, cfg, res, res in cfg.attn))
                ch = width
        skips = [cfg.ch, *(layer.cout for layer in self.enc[1:])]
        for level, width in reversed(list(enumerate(widths))):
            res = cfg.res >> level
            if level == len(widths) - 1: self.dec += [Block(ch, ch, cfg, res, True), Block(ch, ch, cfg, res)]
            else: self.dec.append(Block(ch, ch, cfg, res, turn='up'))
            for i in range(cfg.blocks + 1):
                self.dec.append(Block(ch + skips.pop(), width, cfg, res, i == cfg.blocks and res in cfg.attn))
                ch = width
        self.norm, self.out = norm(ch), init(nn.Conv2d(ch, 3, 3, padding=1), 1e-5)

    def forward(self, x, c_noise, labels=None):
        with torch.autocast(x.device.type, enabled=False):     # the embedding stays in float32
            a = torch.outer(c_noise.to(x), self.freqs)
            e = torch.cat([a.sin(), a.cos()], 1)
            if self.classes: e = e + self.map_label(one_hot(labels, self.classes).to(x) * self.classes**0.5)
            e = silu(self.map1(silu(self.map0(e))))
        skips = [self.enc[0](x)]
        for layer in self.enc[1:]: skips.append(layer(skips[-1], e))
        x = skips[-1]
        for layer in self.dec:
            if layer.cin != x.shape[1]: x = torch.cat([x, skips.pop()], 1)
            x = layer(x, e)
        return self.out(silu(self.norm(x))).to(a.dtype)


def unit(x, dim=None):
    """x over its root mean square along dim (all but the first), plus 1e-4; measured in float32 or better."""
    dim = dim or tuple(range(1, x.ndim))
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (1e-4 + norm * (norm.numel() / x.numel())**0.5).to(x.dtype)


def mp_silu(x): return silu(x) / 0.596


def mp_sum(a, b, t): return ((1 - t) * a + t * b) / ((1 - t)**2 + t**2)**0.5


class MPConv(nn.Module):
    """EDM2's only layer with weights, a convolution or (without kernel) linear; no bias, normalised in every use."""

    def __init__(self, cin, cout, *kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *kernel))

    def forward(self, x, gain=1.0):
        with torch.autocast(x.device.type, enabled=False):     # weights and linear layers in float32
            w = unit(self.weight) * (gain / self.weight[0].numel()**0.5)
            if w.ndim == 2: return x @ w.T
        return conv2d(x, w, padding=w.shape[-1] // 2)


class MPBlock(nn.Module):
    """EDM2's residual block of the encoder or decoder, with optional resampling and self-attention."""

    def __init__(self, cin, cout, cfg, res, decoder, attention=False, turn=None):
        super().__init__()
        self.cin, self.cout, self.decoder, self.turn = cin, cout, decoder, turn
        self.heads = attention and (cout // cfg.head_dim if cfg.head_dim else 1)
        self.gain = nn.Parameter(torch.zeros(()))
        self.conv0 = MPConv(cin if decoder else cout, cout, 3, 3)
        self.affine = MPConv(int(cfg.ch * max(cfg.mult)), cout)
        self.conv1 = MPConv(cout, cout, 3, 3)
        self.dropout = nn.Dropout(cfg.dropout) if res <= cfg.dropout_res else nn.Identity()
        self.skip = MPConv(cin, cout, 1, 1) if cin != cout else nn.Identity()
        if self.heads:
            self.qkv, self.proj = MPConv(cout, 3 * cout, 1, 1), MPConv(cout, cout, 1, 1)

    def forward(self, x, e):
        if self.turn == 'down': x = avg_pool2d(x, 2)
        if self.turn == 'up': x = interpolate(x, scale_factor=2)
        if not self.decoder: x = unit(self.skip(x), 1)
        h = self.conv0(mp_silu(x))
        h = h * (1 + self.affine(e, self.gain)).to(h.dtype)[:, :, None, None]
        h = self.conv1(self.dropout(mp_silu(h)))
        if self.decoder: x = self.skip(x)
        x = mp_sum(x, h, 0.3)
        if self.heads:
            B, C, H, W = x.shape
            q, k, v = unit(self.qkv(x).reshape(B * self.heads, C // self.heads, 3, H * W), 1).unbind(2)
            w = torch.einsum('bcq,bck->bqk', q, k / (C // self.heads)**0.5).softmax(-1)
            x = mp_sum(x, self.proj(torch.einsum('bqk,bck->bcq', w, v).reshape(B, C, H, W)), 0.3)
        return x.clamp(-256, 256)


class EDM2UNet(nn.Module):
    """EDM2's network, config G [Karras et al. 2024; networks_edm2.py] without its uncertainty: arguments and order of
    parameters as above. normalise() once before each step in place of the code's overwriting within forward."""

    def __init__(self, cfg):
        super().__init__()
        widths = [int(cfg.ch * m) for m in cfg.mult]
        self.cfg, ch, emb = cfg, widths[0], max(widths)
        self.classes = cfg.classes if cfg.cond else 0
        self.gain = nn.Parameter(torch.zeros(()))
        self.register_buffer('freqs', 2 * math.pi * torch.randn(ch))
        self.register_buffer('phases', 2 * math.pi * torch.rand(ch))
        self.map_noise = MPConv(ch, emb)
        if self.classes: self.map_label = MPConv(self.classes, emb)

        self.enc, self.dec = nn.ModuleList([MPConv(4, ch, 3, 3)]), nn.ModuleList()      # an image and a plane of ones
        for level, width in enumerate(widths):
            res = cfg.res >> level
            if level: self.enc.append(MPBlock(ch, ch, cfg, res, False, turn='down'))
            for _ in range(cfg.blocks):
                self.enc.append(MPBlock(ch, width, cfg, res, False, res in cfg.attn))
                ch = width
        skips = [widths[0], *(layer.cout for layer in self.enc[1:])]
        for level, width in reversed(list(enumerate(widths))):
            res = cfg.res >> level
            if level < len(widths) - 1: self.dec.append(MPBlock(ch, ch, cfg, res, True, turn='up'))
            else: self.dec += [MPBlock(ch, ch, cfg, res, True, True), MPBlock(ch, ch, cfg, res, True)]
            for _ in range(cfg.blocks + 1):
                self.dec.append(MPBlock(ch + skips.pop(), width, cfg, res, True, res in cfg.attn))
                ch = width
        self.out = MPConv(ch, 3, 3, 3)

    @torch.no_grad()
    def normalise(self):
        """Forced weight normalisation."""
        for layer in self.modules():
            if isinstance(layer, MPConv): layer.weight.copy_(unit(layer.weight))

    def forward(self, x, c_noise, labels=None):
        with torch.autocast(x.device.type, enabled=False):     # the embedding stays in float32
            e = self.map_noise(2**0.5 * (torch.outer(c_noise.to(x), self.freqs) + self.phases).cos())
            if self.classes:
                hot = x.new_zeros(1, self.classes) if labels is None else one_hot(labels, self.classes).to(x)
                e = mp_sum(e, self.map_label(hot * self.classes**0.5), 0.5)
            e = mp_silu(e)
        skips = [self.enc[0](torch.cat([x, torch.ones_like(x[:, :1])], 1))]
        for layer in self.enc[1:]: skips.append(layer(skips[-1], e))
        x = skips[-1]
        for layer in self.dec:
            if layer.cin != x.shape[1]:
                y = skips.pop()         # both parts contribute equally
                x = torch.cat([v * (layer.cin / (2 * v.shape[1]))**0.5 for v in (x, y)], 1)
            x = layer(x, e)
        return self.out(x, self.gain).to(e.dtype)


def UNet(cfg):
    """The raw network F of cfg.arch."""
    return (EDM2UNet if cfg.arch == 'edm2' else DDPMpp)(cfg)

# -------------------------------------------------------------------------------------------------------- data

@contextlib.contextmanager
def reading(file, advice=''):
    """Whatever fails in here, while a file of unknown content is read, ends the program with one line about it, without
    the warnings that libraries give before."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: yield
        except Exception as error: stop(f'{file} cannot be read: {type(error).__name__} {str(error)[:300]}{advice}')


def fetch(url, sha256=None):
    """Path of the file at url in ./datasets, downloaded if it is not there; its sha256 is checked always."""
    path = Path('datasets', url.rsplit('/', 1)[1])
    if not path.exists():
        print(f'fetching {url} to {path}', file=sys.stderr, flush=True)
        with reading(url, f': put it at {path}'):
            path.parent.mkdir(exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        stop(f'{path} is damaged, its sha256 is not {sha256}: delete it and start again')
    return path


def pictures(path):
    """A folder or .zip of pictures, or CIFAR-10's binary .tar.gz -> names, sorted; a function from a name to its PIL
    Image; labels (N,), of EDM's dataset.json or else of the top folders in order if there are several, or None"""
    path, classes = Path(path), {}
    if path.name.endswith('.tar.gz'):
        with tarfile.open(path) as archive:
            batches = sorted((m for m in archive if Path(m.name).match('data_batch_*.bin')), key=lambda m: m.name)
            if not batches: raise ValueError('it holds no data_batch_*.bin: take the binary version of CIFAR-10')
            rows = np.frombuffer(b''.join(archive.extractfile(m).read() for m in batches), np.uint8).reshape(-1, 3073)
            while archive.fileobj.read(2**20): pass             # to its end, where gzip's checksum is
        planes = rows[:, 1:].reshape(-1, 3, 32, 32)
        return range(len(rows)), lambda i: Image.fromarray(planes[i].transpose(1, 2, 0)), rows[:, 0]
    kinds = '.png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm'.split()
    formats = 'PNG JPEG WEBP BMP GIF TIFF PPM'.split()          # whatever a file is called: PostScript is a program
    archive = None if path.is_dir() else zipfile.ZipFile(path)
    if archive and any(i.file_size > 2**28 for i in archive.infolist()): raise ValueError('a member exceeds 256 MB')
    files = archive.namelist() if archive else [p.relative_to(path).as_posix() for p in path.rglob('*') if p.is_file()]
    content = archive.read if archive else lambda name: (path / name).read_bytes()
    names = sorted(n for n in files if Path(n).suffix.lower() in kinds and Path(n).name[0] != '.')
    if not names: raise ValueError(f'it holds no pictures ({" ".join(kinds)})')
    if 'dataset.json' in files: classes = dict(json.loads(content('dataset.json'))['labels'] or [])
    labels = np.array([classes[name] for name in names]) if classes else None
    tops = [os.path.dirname(name).split('/')[0] for name in names]
    if 'dataset.json' not in files and len(set(tops)) > 1: labels = np.unique(tops, return_inverse=True)[1]
    return names, lambda name: Image.open(io.BytesIO(content(name)), formats=formats), labels


def glyphs(res=16, n=20_000, seed=0):
    """n digits in Pillow's built-in font, in random pose, size, place and colours, light on dark: a function of seed.
    -> images uint8 (n, 3, res, res), labels int64 (n,)"""
    font, masks, g = ImageFont.load_default(size=36), [], torch.Generator().manual_seed(seed)
    for digit in '0123456789':
        canvas = Image.new('L', (48, 48))
        ImageDraw.Draw(canvas).text((24, 24), digit, 255, font, anchor='mm', stroke_width=1)
        masks.append(np.asarray(canvas))
    masks, labels = torch.tensor(np.stack(masks))[:, None] / 255, torch.arange(n) % 10
    spread = torch.tensor([0.08, 0.08, 0.05, 0.04, 0.04])[:, None]
    angle, shear, size, dx, dy = (torch.rand(5, n, generator=g) * 2 - 1) * spread
    cos, sin = 0.7 * size.exp() * angle.cos(), 0.7 * size.exp() * angle.sin()
    pose = torch.stack([cos, shear * cos - sin, dx, sin, shear * sin + cos, dy], 1).view(n, 2, 3)
    ink = torch.cat([grid_sample(masks[l], affine_grid(p, (len(l), 1, 2 * res, 2 * res), False), align_corners=False)
                     for l, p in zip(labels.split(2000), pose.split(2000))])
    ground, stroke = 0.4 * torch.rand(n, 3, 1, 1, generator=g), 1 - 0.4 * torch.rand(n, 3, 1, 1, generator=g)
    images = torch.lerp(ground, stroke, avg_pool2d(ink, 2))
    return (images * 255).round().to(torch.uint8), labels


def crop(image, res):
    """ADM's crop: halved by a box filter while twice too large, then bicubic to the shorter side, the middle of it."""
    while min(image.size) >= 2 * res: image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = res / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - res) // 2, (image.height - res) // 2
    return image.crop((left, top, left + res, top + res))


def stamp(path):
    """Text that changes with a file, or with the entries of a folder; what lies deeper in it is not looked at."""
    stats = [path.stat(), *(p.lstat() for p in (sorted(path.iterdir()) if path.is_dir() else []))]
    return hashlib.sha256(repr([(s.st_mtime_ns, s.st_size) for s in stats]).encode()).hexdigest()


def decoded(path, res='*'):
    """What decode() left for path as it is now: images (N, 3, res, res), mapped, not read, and its notes; or None."""
    for folder in (path.parent, Path('datasets')):
        for file in folder.glob(f'{glob.escape(path.name)}.{res}.decoded'):
            with reading(file, ': delete it'):
                images = np.load(file, mmap_mode='c')
                notes = json.loads(np.fromfile(file, np.uint8, offset=images.offset + images.nbytes).tobytes())
            if notes['stamp'] == stamp(path): return torch.from_numpy(images), notes
    return None


def decode(path, res):
    """Writes <path>.<res>.decoded, or, where that folder is read-only, the same in ./datasets, whole or not at all: the
    pictures of path as a .npy (N, 3, res, res), and behind it notes in JSON -> what decoded() returns. Pictures other
    than squares of that side are cropped; transparent parts become white."""
    with reading(path):
        before, (names, picture, labels) = stamp(path), pictures(path)
        with reading(f'{path}/{names[0]}'): side = min(picture(names[0]).size)
    if labels is not None and (labels.dtype.kind not in 'iu' or labels.ndim > 1 or not
                               0 <= labels.min() <= labels.max() < 100_000):
        stop(f'{path}: its labels must be whole numbers from 0 to 99,999')

    def pixels(name):
        image = picture(name)
        deep = ';16' in str(getattr(image, 'tile', ''))
        if deep or image.mode not in ('RGB', '1', 'L', 'P', 'LA', 'PA', 'RGBA', 'CMYK'):
            raise ValueError(f'a {image.mode} picture{" of 16 bits" * deep}: convert it to 8-bit RGB')
        if image.mode != 'RGB':
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
        return image.size != (res, res), np.asarray(crop(image, res)).transpose(2, 0, 1).tobytes()

    folder = path.parent if os.access(path.parent, os.W_OK) else Path('datasets')
    folder.mkdir(exist_ok=True)
    whole = folder / f'{path.name}.{res}.decoded'
    part, cropped = Path(f'{whole}.{socket.gethostname()}-{os.getpid()}.part'), 0
    leave = lambda number, frame: stop(f'stopped by a signal while it decoded {path}', 128 + number)
    handlers = {s: signal.signal(s, leave) for s in (signal.SIGINT, signal.SIGTERM)}
    start = told = time.time()
    try:
        with open(part, 'wb') as file, ThreadPoolExecutor() as pool:
            shape = len(names), 3, res, res
            np.lib.format.write_array_header_1_0(file, dict(descr='|u1', fortran_order=False, shape=shape))
            for first in range(0, len(names), 256):
                rows = pool.map(pixels, names[first:first + 256])
                for name in names[first:first + 256]:
                    with reading(f'{path}/{name}'): other, row = next(rows)
                    cropped += other
                    file.write(row)
                if time.time() > told + 10:
                    told, done = time.time(), min(first + 256, len(names))
                    left = timedelta(seconds=round((told - start) * (len(names) / done - 1)))
                    print(f'{path}: {done} of {len(names)} pictures decoded, {left} left', file=sys.stderr, flush=True)
            notes = dict(stamp=before, side=side, labels=None if labels is None else labels.tolist())
            file.write(json.dumps(notes).encode())
        if not decoded(path, res): os.replace(part, whole)     # else a run that was faster may have its own mapped
    finally:
        part.unlink(missing_ok=True)
        for s, handler in handlers.items(): signal.signal(s, handler)
    if cropped: print(f'{path}: {cropped} of {len(names)} pictures cropped and resized to side {res}')
    return decoded(path, res) or stop(f'{path} changed while it was read: start again')


def look(path):
    """-> side of the first picture of a path, whether they have labels."""
    found = decoded(path)
    if found: return found[1]['side'], found[1]['labels'] is not None
    names, picture, labels = pictures(path)
    with reading(f'{path}/{names[0]}'): return min(picture(names[0]).size), labels is not None


def load_data(cfg):
    """-> images uint8 (N, 3, res, res), labels int64 (N,) or None (None if cfg.cond is 0)."""
    path = cfg.data
    if path == 'cifar10': path = fetch('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
                                       'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd')
    if path == 'imagenet64':            # the class folders of ILSVRC2012, or EDM2's dataset_tool.py's .zip of them
        path = 'datasets/imagenet64' if Path('datasets/imagenet64').is_dir() else 'datasets/img64.zip'
    if path == 'glyphs': images, labels = glyphs(cfg.res)
    else:
        path = Path(os.path.abspath(path))
        with reading(path): found = decoded(path, cfg.res)
        images, notes = found or decode(path, cfg.res)
        labels = None if notes['labels'] is None else torch.tensor(notes['labels'])
    if cfg.cond and labels is None: stop(f'{path} has no labels, in dataset.json or by class folders: use --cond 0')
    return images, labels if cfg.cond else None

# ---------------------------------------------------------------------------------------------------- training

def seed_of(cfg, stream, i):
    """Seed of the random numbers of step (or image) i. Streams: 0 samples, 1 and 2 training, 3 + rank dropout."""
    return (1000 * cfg.seed + stream) * 100_000_007 + i


def draw(cfg, n, batch, step):
    """What a step draws on the host, for the whole batch and whatever the processes: image numbers, u, flips."""
    g = torch.Generator().manual_seed(seed_of(cfg, 1, step))
    index, u = torch.randint(n, (batch,), generator=g), torch.rand(batch, generator=g, dtype=torch.float64)
    return index, u, torch.rand(batch, generator=g) < 0.5 * cfg.flip


def draw_z(cfg, batch, step, device):
    """The noise of a step, likewise, on the device."""
    g = torch.Generator(device).manual_seed(seed_of(cfg, 2, step))
    return torch.randn(batch, 3, cfg.res, cfg.res, generator=g, device=device)


def ahead(make, steps):
    """make(step) for each step in turn; a thread makes the next while the caller works with this one."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(make, steps[0])
        for step in steps[1:]:
            made, job = job.result(), pool.submit(make, step)
            yield made
        yield job.result()


def load(path):
    """What torch.save wrote, as plain data, and only if its checksums are right: torch does not look at them."""
    if zipfile.ZipFile(path).testzip(): raise zipfile.BadZipFile('wrong checksum')
    return torch.load(path, map_location='cpu', weights_only=True)


def read_checkpoint(out):
    """The run's checkpoint, this script's, or None: a dict of method, step, config, loss, ema, opt, scaler."""
    path = Path(out, 'latest.pt')
    if not os.path.exists(path): return None
    with reading(path, ': move it away, or give another --out'):
        saved = load(path)
        if saved['method'] != METHOD: stop(f'{out} is a run of {saved["method"]}.py: give another --out')
        step, recipe = int(saved['step']), saved['config']      # the knobs and nothing else: not --save, say
        recipe = {k: type(v[0])(recipe[k]) for k, v in CONFIG.items()} | dict(data=recipe['data'])
        check(recipe, f'{path}: ')
        if step < 0: raise ValueError(f'its step is {step}')
    return saved | dict(step=step, config=recipe)


def write(path, writer):
    """The whole file or nothing: writer fills a temporary file, which then takes path's place."""
    part = Path(f'{path}.part')
    try:
        with open(part, 'wb') as file: writer(file)
        os.replace(part, path)
    except RuntimeError as error: raise OSError(f'{path}: {error.__context__ or error}')     # torch.save, disk full
    finally: part.unlink(missing_ok=True)


def donor(path):
    """What --init names, a .pkl or the checkpoint of any of the scripts: its knobs (a dict) and averaged weights."""
    with reading(path):
        if path.endswith('.pkl'): net = load_edm(path)
        else:
            saved = load(path)
            return saved['config'], saved['ema']
    return vars(net.cfg), net.state_dict()


def new_network(cfg):
    """A fresh UNet, or the one that --init names, whose shape then enters cfg."""
    torch.manual_seed(cfg.seed)
    if cfg.init == 'none': return UNet(cfg)
    knobs, state = donor(cfg.init)
    with reading(cfg.init):
        shape = {name: knobs[name] for name in SHAPE}
        check(shape, f'{cfg.init}: ')
        vars(cfg).update(shape)
        net = UNet(cfg)
        net.load_state_dict(state)
    return net


def autocast(cfg, device):
    """The context of a forward pass with --amp."""
    dtype = dict(fp16=torch.float16, bf16=torch.bfloat16).get(cfg.amp)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def train(cfg, data, rank, world, device):
    """Every phase of the run in cfg.out, from its checkpoint if there is one."""
    out, (images, labels), saved = Path(cfg.out), data, read_checkpoint(cfg.out)
    if device.type == 'cuda' and images.numel() < torch.cuda.mem_get_info()[0] / 3: images = images.to(device)
    if cfg.cond: cfg.classes = int(labels.max()) + 1
    net = (UNet(cfg) if saved else new_network(cfg)).to(device)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    loss_fn = Loss(net, cfg, (images, labels)).to(device)
    weights = [p for p in loss_fn.parameters() if p.requires_grad]
    start, logged = saved['step'] if saved else 0, 0
    opt, scaler = loss_fn.optimiser(weights, start), torch.amp.GradScaler(device.type, enabled=cfg.amp == 'fp16')
    if saved:
        with reading(out / 'latest.pt', ': do the flags fit it?'):
            for part, name in ((loss_fn, 'loss'), (ema, 'ema'), (opt, 'opt')): part.load_state_dict(saved[name])
            if saved['scaler']: scaler.load_state_dict(saved['scaler'])
            logged = saved['log']
    if cfg.compile: net.compile(dynamic=False)
    step_fn = loss_fn if world == 1 else nn.parallel.DistributedDataParallel(loss_fn, broadcast_buffers=False)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / 'log.csv', 'a')                        # held, so that a folder has one run at a time
        with contextlib.suppress(ImportError):                  # of Windows
            import fcntl
            try: fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError: stop(f'another run is at work in {out}: give another --out')
            except OSError as error: print(f'{out} cannot be locked ({error}): keep other runs out of it')
        log.truncate(min(logged, log.tell()))                   # without what a killed run wrote after its checkpoint
        for part in out.glob('*.part'): part.unlink()           # or was writing
        print(f'{METHOD} on {cfg.data}: {len(images)} images of side {cfg.res}, {sum(map(torch.numel, weights)):,} '
              f'weights, {world} x {device.type}, amp {cfg.amp}, steps {start} to {cfg.steps}, in {out}', flush=True)
        picture_grid(images[torch.linspace(0, len(images) - 1, 100).long().to(images.device)], out / 'data.png')

    halt = []                           # signals received: save and leave
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda number, frame: halt.append(number))
    total, last, since, steps = torch.zeros(4, device=device), start, time.time(), range(start, cfg.steps)

    def share(step):
        """This process's share of a step: uint8 images, labels, u, flips. On the host numpy gathers them: torch would
        start threads for this thread too, and both sets wait for each other on the same cores."""
        index, u, flips = (v[rank::world] for v in draw(cfg, len(images), loss_fn.phase(step)[3], step))
        if images.is_cuda: x = images[index.to(device, non_blocking=True)]
        else: x = torch.from_numpy(images.numpy()[index.numpy()])
        if x.device != device: x = x.pin_memory()
        return x, labels[index] if cfg.cond else None, u, flips

    shares = map(share, steps) if images.is_cuda else ahead(share, steps)
    for step, (images8, classes, u, flips) in zip(steps, shares):
        phase, first, lr, batch = loss_fn.phase(step)
        if batch < world: stop(f'{world} processes for a batch of {batch}')
        if step == first:
            loss_fn.begin(ema)
            opt = loss_fn.optimiser(weights, step)
        for group in opt.param_groups: group['lr'] = lr
        if 'edm2' in cfg.arch: net.normalise()

        z = draw_z(cfg, batch, step, device)[rank::world]       # below, non_blocking copies never wait
        torch.manual_seed(seed_of(cfg, 3 + rank, step))         # dropout
        opt.zero_grad()
        micro = cfg.micro or batch
        for i in range(0, len(u), micro):
            rows = slice(i, i + micro)
            flip = flips[rows].to(device, non_blocking=True).view(-1, 1, 1, 1)
            x = images8[rows].to(device, non_blocking=True).float() / 127.5 - 1
            x = torch.where(flip, x.flip(3), x)
            y = classes[rows].to(device, non_blocking=True) if cfg.cond else None
            with contextlib.nullcontext() if world == 1 or i + micro >= len(u) else step_fn.no_sync():
                with autocast(cfg, device): loss = step_fn(x, y, u[rows], z[rows], step).sum() / batch
                scaler.scale(loss * world).backward()           # DistributedDataParallel averages over processes
            total[0] += loss.detach()
        scaler.unscale_(opt)
        norm = nn.utils.clip_grad_norm_(weights, cfg.clip)
        fine = norm.isfinite()          # if not: the scaler of fp16 skips the step; other runs end at the status line
        total[1:3] += torch.stack([torch.where(fine, norm, 0.0), (~fine).float()]) / world      # equal in all processes
        scaler.step(opt)
        scaler.update()
        with torch.no_grad():           # or each average hangs on a graph that grows with every step
            for average, decay in loss_fn.averages(ema, step):
                torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)

        done = step + 1
        save = done % cfg.save_every == 0 or done == cfg.steps
        if not save and done % cfg.log_every and not (halt and world == 1): continue    # several halt at a status line
        total[3] = len(halt)
        if world > 1: dist.all_reduce(total)
        loss, norm, skipped, halting = total.tolist()
        count, skipped = done - last, round(skipped)
        if not math.isfinite(loss) or skipped and cfg.amp != 'fp16' or skipped == count >= 20:
            raise FloatingPointError(f'loss {loss / count:.4g}, {skipped} gradients not finite in steps {last} to '
                                     f'{done}: lower --lr, or use --amp off')
        if rank == 0:
            row = dict(step=done, phase=phase, loss=loss / count, grad_norm=norm / max(count - skipped, 1), lr=lr,
                       images_per_second=count * batch / (time.time() - since), skipped=skipped)
            report(cfg, row, (cfg.steps - done) * (time.time() - since) / count)
            if save or halting:
                recipe = {k: v for k, v in vars(cfg).items() if k == 'data' or k not in FLAGS}
                state = dict(method=METHOD, step=done, config=recipe, loss=loss_fn.state_dict(), ema=ema.state_dict(),
                             opt=opt.state_dict(), scaler=scaler.state_dict(), log=log.seek(0, 2))
                write(out / 'latest.pt', lambda file: torch.save(state, file))
                grids = [generate(cfg, ema, torch.arange(100), cfg.ts[:k], device) for k in (1, 2) if k <= len(cfg.ts)]
                picture_grid(torch.cat(grids), out / f'samples-{done:06d}.png')
        if halting:
            if world > 1: dist.barrier()                        # the checkpoint is written before anyone leaves
            stop(f'stopped by a signal and saved at step {done} in {out}: the same command resumes',
                 128 + (halt or [signal.SIGTERM])[0])
        last, since = done, time.time()
        total.zero_()
    if rank == 0:
        print(f'pictures: {out}/samples-{cfg.steps:06d}.png (one-step samples above two-step), {out}/data.png\n'
              f'next: python {METHOD}.py --out {out} --sample 1000 --nfe 2', flush=True)


def report(cfg, row, left):
    """One status line, in place on a terminal, and one row of log.csv. left: seconds to the end at this pace."""
    with open(Path(cfg.out, 'log.csv'), 'a', newline='') as file:
        if not file.tell(): csv.writer(file).writerow(row)
        csv.writer(file).writerow([f'{v:.6g}' if isinstance(v, float) else v for v in row.values()])
    memory = f'  {torch.cuda.max_memory_allocated() / 1e9:.1f} GB' if torch.cuda.is_available() else ''
    line = (f'{row["phase"]:9s} {row["step"]:7d} {100 * row["step"] / cfg.steps:3.0f}%  loss {row["loss"]:<8.4g} '
            f'|g| {row["grad_norm"]:<8.3g} {row["images_per_second"]:6.0f} img/s{memory}  '
            f'{timedelta(seconds=round(left))} left' + f'  {row["skipped"]} skipped' * bool(row['skipped']))
    live = sys.stdout.isatty()
    print('\r' * live + line.ljust(100 * live), end='\n' if not live or row['step'] == cfg.steps else '', flush=True)

# ---------------------------------------------------------------------------------------------------- sampling

def classes_of(cfg, index):
    """Labels of the samples numbered index (N,): all classes in turn, or --label."""
    return index % cfg.classes if cfg.label < 0 else torch.full_like(index, cfg.label)


def generate(cfg, net, index, ts, device):
    """Samples numbered index (N,) -> uint8 (N, 3, res, res). Their noise is a function of (seed, index)."""
    def normals(i):
        g = torch.Generator().manual_seed(seed_of(cfg, 0, i))
        return torch.stack([torch.randn(3, cfg.res, cfg.res, generator=g) for _ in ts])
    z, *noise = torch.stack([normals(i) for i in index.tolist()], 1).to(device)
    labels = classes_of(cfg, index).to(device) if cfg.cond else None
    with autocast(cfg, device): x = sample(net, z, ts, labels, noise, cfg.edges, cfg.eta, cfg.shift)
    if not x.isfinite().all(): raise FloatingPointError('the network returns NaN')
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)      # to the nearest level, as EDM does


def picture_grid(images, path, columns=20):
    """uint8 (N, 3, H, W) -> PNG with `columns` images to a row, small ones enlarged."""
    n, c, h, w = images.shape
    scale, rows = max(1, 48 // h), n // columns
    grid = images.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    image = Image.fromarray(grid.cpu().numpy()).resize((columns * w * scale, rows * h * scale), Image.NEAREST)
    write(path, lambda file: image.save(file, 'PNG'))


def write_samples(cfg, data, rank, world, device):
    """--sample N images of the run's EMA weights, as .npz (arr_0 (N, H, W, 3), arr_1 labels) or a folder of PNG."""
    save, start = Path(cfg.save or Path(cfg.out, 'samples.npz')), time.time()
    if save.suffix not in ('.npz', ''): stop(f'--save {save}: give an .npz or a folder')
    net = new_network(cfg).to(device).requires_grad_(False).eval()
    if cfg.guidance != 1:
        saved = read_checkpoint(Path(cfg.init).parent)
        if not saved or not cfg.weak or saved['step'] <= weak_step(cfg):
            stop(f'--guidance: {cfg.init} has no weak model yet: --weak')
        net = Guided(net, copy.deepcopy(net), cfg.guidance)
        net.weak.load_state_dict({k[5:]: v for k, v in saved['loss'].items() if k[:5] == 'weak.'})
    if cfg.compile: net.compile(dynamic=False)
    images = torch.zeros(cfg.sample, 3, cfg.res, cfg.res, dtype=torch.uint8, device=device)
    ts = cfg.ts[:cfg.nfe]
    for rows in torch.arange(rank, cfg.sample, world).split(cfg.micro or (500 if device.type == 'cuda' else 50)):
        images[rows.to(device)] = generate(cfg, net, rows, ts, device)
        done = (int(rows[-1]) + 1) / cfg.sample
        if rank == 0 and sys.stdout.isatty():
            print(f'\r{100 * done:3.0f}%  {(time.time() - start) * (1 / done - 1):.0f} s left ', end='', flush=True)
    if world > 1: dist.all_reduce(images)                       # an image is zero in all processes but its own
    if rank: return
    images = images.permute(0, 2, 3, 1).cpu().numpy()
    labels = dict(arr_1=classes_of(cfg, torch.arange(cfg.sample)).numpy()) if cfg.cond else {}
    (save.parent if save.suffix else save).mkdir(parents=True, exist_ok=True)
    if save.suffix: write(save, lambda file: np.savez(file, arr_0=images, **labels))
    else:
        for i, image in enumerate(map(Image.fromarray, images)):
            write(save / f'{i:06d}.png', lambda file: image.save(file, 'PNG'))
    print(f'{cfg.sample} samples of {cfg.init} from noise levels {ts} in {time.time() - start:.0f} s: {save}')

# ------------------------------------------------------------------------------------------- EDM's checkpoints

class Record(dict):
    """Stands in for every object of an EDM pickle but tensors: keeps what it is given, has no behaviour."""
    args = ()

    def __init__(self, *args): self.args = args

    def __setstate__(self, state): self.state = state


class EDMUnpickler(pickle.Unpickler):
    """Reads an EDM .pkl (layout: its torch_utils/persistence.py) as data: tensors, and Records for all else. None of
    the source text in it runs."""

    TENSORS = {
        'torch._utils._rebuild_parameter': lambda data, requires_grad, hooks: data,
        'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
        'torch.storage._load_from_bytes': lambda b: torch.load(io.BytesIO(b), map_location='cpu', weights_only=True),
    }

    def find_class(self, module, name): return self.TENSORS.get(f'{module}.{name}', Record)


def load_edm(path_or_url):
    """A .pkl of EDM, EDM2, ECT or TCM -> UNet with its `ema` weights, of the shape found in it (knobs in net.cfg). Left
    out are EDM's augmentation input, whose zeros in use add nothing, and EDM2's uncertainty, used by its own loss only.
    Any other file ends the program."""
    path = fetch(path_or_url) if '://' in str(path_or_url) else path_or_url
    with reading(path), open(path, 'rb') as file:
        parts = EDMUnpickler(file).load()['ema'].args[0]['state']['_modules']
        meta = parts['unet' if 'unet' in parts else 'model'].args[0]
        args = dict(model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, attn_resolutions=[16], label_dim=0,
                    embedding_type='positional', encoder_type='standard', decoder_type='standard', dropout=0.1,
                    channels_per_head=0)
        if meta['class_name'] == 'UNet':        # EDM2's
            args |= dict(model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3, attn_resolutions=[16, 8],
                         dropout=0.0, channels_per_head=64)
        args |= meta['state']['_init_kwargs']
        kind = (meta['class_name'], args['embedding_type'], args['encoder_type'], args['decoder_type'])
        if not all(isinstance(k, str) for k in kind) or args['num_blocks'] > 99: raise ValueError('it holds no network')
        arch = {('SongUNet', 'positional', 'standard', 'standard'): 'ddpmpp',
                ('SongUNet', 'fourier', 'residual', 'standard'): 'ncsnpp',
                ('UNet', 'positional', 'standard', 'standard'): 'edm2'}.get(kind)
        if arch not in CHOICES['arch']: raise ValueError(f'it holds a {kind}, not one of {CHOICES["arch"]}')
        net = UNet(argparse.Namespace(
            res=args['img_resolution'], arch=arch, ch=args['model_channels'], mult=tuple(args['channel_mult']),
            blocks=args['num_blocks'], attn=tuple(args['attn_resolutions']), head_dim=args['channels_per_head'],
            cond=int(args['label_dim'] > 0), classes=max(1, args['label_dim']), dropout=args['dropout'],
            dropout_res=math.inf, fourier=16.0))

        def tensors(state):             # depth first, as in state_dict()
            for group in ('_parameters', '_buffers'):
                yield from (v for name, v in state[group].items() if v is not None and name != 'resample_filter')
            for name, module in state.pop('_modules').items():      # popped: one module may be held twice
                if name != 'map_augment': yield from tensors(module.args[0]['state'] if module.args else module.state)

        net.load_state_dict(dict(zip(net.state_dict(), tensors(meta['state']), strict=True)))
    return net

# ------------------------------------------------------------------------------------------------ command line

METHOD = Path(__file__).stem
DATA = ('glyphs', 'cifar10', 'imagenet64')
FLAGS = dict(                           # how to run
    data=('glyphs', 'glyphs, cifar10, imagenet64, or a folder or .zip of pictures, or CIFAR-10\'s binary .tar.gz'),
    out=('', 'run folder [runs/<method>-<data>]'),
    gpus=(1, 'processes, one per GPU'),
    device=('auto', 'cpu leaves the GPUs alone'),
    micro=(0, 'most images one process holds at once; 0: its whole share'),
    compile=(False, 'torch.compile the network'),
    sample=(0, 'write this many samples of the run in --out and stop'),
    nfe=(1, 'network evaluations per sample'),
    save=('', 'where the samples go: an .npz, or a folder of PNG [<out>/samples.npz]'),
    label=(-1, 'class of all samples, in [0, classes); -1: all classes equally'),
)


def stop(message, code=2):
    """One line on stderr and the exit code: 2 for bad input, 1 for a failed run, 128 + n for signal n. Of several
    processes the first says it; if it has not failed, it does not end the others, and they speak for themselves."""
    rank = int(os.environ.get('RANK', 0))
    if rank and code < 128:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5 + rank)
    if not rank or code < 128: print(f'{METHOD}.py:', *str(message).split(), file=sys.stderr, flush=True)
    sys.exit(code)


def numbers(text):
    """'80,0.821' -> (80.0, 0.821)"""
    return tuple(float(word) for word in text.split(','))


def check(values, where=''):
    """Ends the program if a value is out of range. The range is read off the meaning in the tables: '> 1', '< 100',
    'below pi/2', 'in [0, 1)', 'may be negative', '0: ...' (0 is allowed); other numbers are positive."""
    for name, value in values.items():
        *table, meaning = {**FLAGS, **CONFIG}[name]
        low = -math.inf if 'negative' in meaning else 1 if '> 1' in meaning else 0
        high = 1 if '0, 1)' in meaning else 100 if '< 100' in meaning else math.inf
        if 'below pi/2' in meaning: high = math.pi / 2
        for v in value if isinstance(value, tuple) else (value,):
            zero = v == 0 and ('[0, ' in meaning or '0: ' in meaning)
            fits = low < v < high or zero if isinstance(v, (int, float)) else v in CHOICES.get(name, (v,))
            if value not in table and not fits: stop(f'{where}--{name} cannot be {v}: {meaning}')


def config(argv=None):
    """Knobs and flags as a Namespace: the column of CONFIG for --data (a path: of its image size, from scratch), or the
    config of the checkpoint in --out; then argv. Bad values end the program."""
    if torch.__version__ < '2.11':      # autocast drops gradients; before 2.9, forward mode is wrong under dropout
        stop(f'torch {torch.__version__} computes wrong gradients here: install 2.11 or later')
    parser = argparse.ArgumentParser(f'{METHOD}.py', allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: stop(f'{message}; see --help')
    knobs = {**FLAGS, **CONFIG}
    for name, (value, *more, meaning) in knobs.items():
        choices = (0, 1) if meaning[:3] in ('0: ', '1: ') else CHOICES.get(name)
        kind = dict(type=numbers if isinstance(value, tuple) else type(value), choices=choices)
        if value is False: kind = dict(action='store_true')
        parser.add_argument(f'--{name}', help=f'{meaning} [{", ".join(map(str, (value, *more)))}]', **kind)
    given = vars(parser.parse_args(argv))
    check(given)
    cfg = {name: value for name, (value, _) in FLAGS.items()} | given
    cfg['out'] = cfg['out'] or f'runs/{METHOD}-{Path(cfg["data"]).name.split(".")[0]}'
    saved, column, own = read_checkpoint(cfg['out']), cfg['data'], {}
    samples_init = cfg['sample'] and 'init' in given            # of the network named, not of a run
    if saved and not samples_init:
        cfg |= saved['config'] | given
        if cfg['sample']: cfg['init'] = str(Path(cfg['out'], 'latest.pt'))
    elif cfg['sample'] and not samples_init:
        stop(f'no checkpoint in {cfg["out"]}: train first, or name the run with --out or a network with --init')
    else:
        if samples_init: own = {k: v for k, v in donor(cfg['init'])[0].items() if k in ('res', 'cond', 'classes')}
        elif column not in DATA:
            with reading(column, f': --data is {", ".join(DATA)}, or a folder, .zip or .tar.gz of pictures'):
                side, labelled = look(Path(os.path.abspath(column)))
                own = dict(res=cfg.get('res') or side, init='none')
            if not labelled: own['cond'] = 0
        if own: column = min(DATA, key=lambda name: abs(math.log(CONFIG['res'][DATA.index(name)] / own['res'])))
        cfg |= {k: v[DATA.index(column) if len(v) == 4 else 0] for k, v in CONFIG.items()} | own | given
        if cfg['init'] == 'none': cfg['init'] = cfg.get('teacher', 'none')     # distillation starts from its teacher
        if cfg['init'] != 'none': cfg['warmup'] = given.get('warmup', 0)       # the checkpoint is the diffusion model
    if cfg['device'] == 'cpu' or not torch.cuda.is_available(): cfg['amp'] = given.get('amp', 'off')
    halvings, widths = len(cfg['mult']) - 1, [int(cfg['ch'] * m) for m in cfg['mult']]
    run = f'{cfg["out"]}: ' if saved and not samples_init else ''
    if cfg['res'] % 2**halvings: stop(f'{run}side {cfg["res"]} cannot be halved {halvings} times: see --res, --mult')
    if cfg['ch'] < 4 or cfg['ch'] % 2 or any(w < 1 or w % max(1, w // (cfg['head_dim'] or w)) for w in widths):
        stop(f'{run}no network has {widths} channels: --ch is even, 4 or more; --head_dim divides --ch times --mult')
    for low, high in (('s0', 's1'), ('t_min', 't_transition'), ('t_transition', 't_max')):
        if cfg.get(low, 0) > cfg.get(high, math.inf): stop(f'--{low} {cfg[low]} is above --{high} {cfg[high]}')
    target = Path(cfg['save'] or cfg['out']).absolute()
    places = [target.parent if target.suffix == '.npz' else target, *target.parents]
    folder = next(place for place in places if os.path.exists(place))
    if not (folder.is_dir() and os.access(folder, os.W_OK)): stop(f'{target}: {folder} is no folder one may write to')
    if list(cfg['ts']) != sorted(cfg['ts'], reverse=True): stop(f'--ts {cfg["ts"]}: noise levels fall')
    if len(cfg['ts']) < cfg['nfe']: stop(f'--nfe {cfg["nfe"]} needs as many noise levels, --ts is {cfg["ts"]}')
    if cfg['label'] >= cfg['classes'] * cfg['cond']: stop(f'--label {cfg["label"]}: the network has no such class')
    return argparse.Namespace(**cfg)


def process(local, cfg):
    """One process of a run: of torchrun, which sets LOCAL_RANK, RANK and WORLD_SIZE, or of --gpus."""
    if mp.parent_process(): signal.signal(signal.SIGINT, signal.SIG_DFL)        # the parent answers
    if 'LOCAL_RANK' not in os.environ: os.environ.update(RANK=str(local), WORLD_SIZE=str(cfg.gpus))
    rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    device = torch.device('cuda', local) if torch.cuda.is_available() and cfg.device == 'auto' else torch.device('cpu')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = cfg.amp == 'off'       # on an H100 1.5 times as fast, in tf32 and fp16 no gain
        torch.backends.cudnn.allow_tf32 = cfg.amp != 'off'
        torch.set_float32_matmul_precision('highest' if cfg.amp == 'off' else 'high')
    elif world > 1: torch.set_num_threads(max(1, os.cpu_count() // world))
    if world > 1:
        warnings.filterwarnings('ignore', '`broadcast_buffers`')    # its successor is missing before torch 2.15
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=timedelta(hours=12))   # decoding
    warnings.filterwarnings('ignore', module='PIL')     # reading() does not reach the threads that decode
    logging.getLogger('PIL').setLevel(logging.CRITICAL)     # what we refuse is told in one line
    turn = (rank > 0) + (local > 0)     # files are made by the first process of all, then by the first of each machine
    try:
        for _ in range(turn): dist.barrier()
        data = None if cfg.sample else load_data(cfg)
        if '://' in cfg.init and not Path(cfg.out, 'latest.pt').exists(): fetch(cfg.init)
        for _ in range(2 - turn if world > 1 else 0): dist.barrier()
        (write_samples if cfg.sample else train)(cfg, data, rank, world, device)
    except (FloatingPointError, OSError) as error: stop(f'{error}. What was saved in {cfg.out} is whole', 1)
    except RuntimeError:
        if world > 1: time.sleep(5)     # should another process have failed, its reason is the one to be told
        raise
    finally:
        if world > 1: dist.destroy_process_group()


def main(argv=None):
    for s in (signal.SIGINT, signal.SIGTERM):                   # until train() handles them
        signal.signal(s, lambda number, frame: stop(f'ended by {signal.Signals(number).name}', 128 + number))
    cfg = config(argv)
    if cfg.gpus == 1 or 'LOCAL_RANK' in os.environ: return process(int(os.environ.get('LOCAL_RANK', 0)), cfg)
    most = torch.cuda.device_count() if cfg.device == 'auto' else max(2, os.cpu_count())
    if cfg.gpus > most: stop(f'--gpus {cfg.gpus}: this machine has {most}; --device cpu runs processes on its cores')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]))
    logging.getLogger('torch.multiprocessing').setLevel(logging.ERROR)          # says whom it ends when one fails
    group = mp.spawn(process, (cfg,), cfg.gpus, join=False)
    for s in (signal.SIGINT, signal.SIGTERM):                   # the processes save, then all end
        signal.signal(s, lambda number, frame: [os.kill(p.pid, number) for p in group.processes if p.is_alive()])
    try:
        while not group.join(): pass
    except mp.ProcessExitedException as error:
        if error.exit_code > 0: sys.exit(error.exit_code)       # and has said why
        stop(f'process {error.error_index} was ended by {error.signal_name}', 128 - error.exit_code)


if __name__ == '__main__':
    main()
