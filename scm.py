# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.10", "numpy", "pillow>=10.1", "scipy"]
# ///
"""
scm.py  Continuous-time consistency models: sCT and sCD (Lu & Song 2024, "Simplifying, Stabilizing and Scaling
Continuous-Time Consistency Models", arXiv:2410.11081).

Trains f(x_t, t) = cos(t) x_t - sin(t) sigma_d F(x_t/sigma_d, t) -> x_0, x_t = cos(t) x + sin(t) sigma_d z, by

    min E  exp(w(t)) / D |F - F_- - g / (|g| + c)|^2 - w(t),         F_- = stopgrad F, D values in an image,
    g = -cos(t)^2 (sigma_d F_- - dx_t/dt) - r (cos(t) sin(t) x_t + sigma_d cos(t) sin(t) dF_-/dt).

r rises to 1 in H steps; g is then cos(t) df/dt along the trajectory: the target moves f against its drift.
dx_t/dt = cos(t) sigma_d z - sin(t) x in training (sCT), sigma_d F_teacher(x_t/sigma_d, t) in distillation
(sCD). w is learnt. t is an angle in [0, pi/2]; the noise's standard deviation is sigma_d tan(t).

    python scm.py                                   # embedded digits: diffusion warm-up, then sCT, pictures
    python scm.py --data cifar10 --gpus 8           # the paper's CIFAR-10 recipe; --scd 1 --dropout 0: sCD
    python scm.py --data imagenet64 --gpus 8        # its ImageNet-64 recipe, size S
    python scm.py --data datasets/photos.pt         # your own, after: python fid.py --pack photos
    python scm.py --data cifar10 --init edm-cifar10-32x32-uncond-vp.pkl --scd 1 --dropout 0 --steps 400000
    python scm.py --out runs/scm-cifar10 --sample 50000 --nfe 2 --save samples.npz
    python scm.py --out runs/scm-cifar10 --sample 50000 --heun 18       # of the diffusion model, 35 passes

Source: the paper, version 2, Algorithm 1 and appendices; there is no official code. Choices:
- g is bounded, as in Algorithm 1 (4.2: df/dt), by its plain norm; --tangent rms divides that by sqrt(D), clip
  bounds each value. The text's weight 1 / (sigma_d tan t) is in g already, as its factor cos(t).
- w is a linear layer on 128 features of t, zero at the start of each stage. The warm-up minimises the same of
  sigma_d F - dx_t/dt. On CIFAR-10 EDM has w = 0, sums over pixels (so Adam's eps weighs less), averages over
  0.05 x the images seen at first, and augments; its own checkpoint can replace ours.
- On CIFAR-10 the second stage's length and the first's levels are not printed: a reproduction's, and EDM's.
- g is computed without autocast (TF32 unless --amp off), as in bf16 it would be some per cent off, and not
  compiled, as forward mode cannot be: fp16, the paper's on ImageNet-64, and --compile are for the warm-up.
- --arch ddpmpp and edm2 are EDM's networks by the exact map t = arctan(sigma / sigma_d), F = -F_EDM, and take
  their weights; edm2's fast features of t have been called unstable. scm-edm2 is the paper's: slow features,
  double normalisation by EDM2's norm (1e-4 outside the root; the pixel norm cited has 1e-8 within). At size S
  it has 293.9 million weights (printed: EDM2's 280.2), normalised before each step of both stages.
"""
import argparse, contextlib, copy, io, math, os, pickle, sys, tarfile, time, warnings, zipfile
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.autograd.forward_ad as fwd
import torch.distributed as dist
import torch.distributed.nn             # imported later, by DistributedDataParallel, it may abort at the end
import torch.multiprocessing as mp
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import affine_grid, avg_pool2d, conv2d, grid_sample, group_norm, one_hot, silu

# -------------------------------------------------------------------------------------------- method

SD = 0.5                                # sigma_d, the standard deviation of the data


def F(net, x, t, labels=None):
    """The network's output F(x / sigma_d, t) for x (B, 3, H, W) at time t (B,): sigma_d F estimates dx_t/dt.

    EDM's networks get their own time ln(sigma) / 4 and give -F [App. B]."""
    if not getattr(net, 'edm', False): return net(x / SD, t, labels)
    return -net(x / SD, (SD * t.tan()).log() / 4, labels)


def f(net, x, t, labels=None):
    """Consistency function: x (B, 3, H, W) at time t (B,) or (B, 1, 1, 1) -> estimate of x_0, like x.

    TrigFlow [eq. 5], so f(x, 0) = x. net is the raw network F. The diffusion model's denoiser is the same."""
    t = t.to(x).view(-1, 1, 1, 1)
    return t.cos() * x - t.sin() * SD * F(net, x, t.flatten(), labels)


class Loss(nn.Module):
    """The objective at the top of this file; self.teacher is the diffusion model."""

    def __init__(self, net, cfg, data):
        super().__init__()
        self.net, self.cfg, self.teacher = net, cfg, frozen(net)
        if cfg.steps < cfg.warmup: stop(f'--steps {cfg.steps}: the warm-up alone takes {cfg.warmup}')
        check_times(cfg.ts)
        version = tuple(map(int, torch.__version__.split('.')[:2]))
        if version < (2, 9): stop(f'torch {torch.__version__}: before 2.9 the tangent is wrong under dropout')
        if isinstance(net, nn.Module): self.teacher.eval()
        self.w = nn.Linear(128, 1)
        self.register_buffer('freqs', 1e4 ** (-torch.arange(64) / 63), persistent=False)
        self.reset()

    def reset(self):
        nn.init.zeros_(self.w.weight)
        nn.init.zeros_(self.w.bias)

    def forward(self, x, labels, u, z, step):
        """x (B, 3, H, W) in [-1, 1], labels (B,) or None, u uniform (B, 2), z normal like x -> loss (B,)."""
        cfg, warmup, t = self.cfg, step < self.cfg.warmup, self.levels(u, step)
        for layer in self.modules():
            if isinstance(layer, nn.Dropout): layer.p = cfg.dropout_warmup if warmup else cfg.dropout
        if warmup:
            _, _, x_t, dx = path(x, z, t)
            error = SD * F(self.net, x_t, t.to(x), labels) - dx
        else:
            out, g = self.tangent(x, labels, z, t, step)
            size = torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True)
            if cfg.tangent == 'rms': size = size / x[0].numel()**0.5
            g = g.clamp(-1, 1) if cfg.tangent == 'clip' else g / (size + cfg.c)
            error = out - out.detach() - g
        a = torch.outer(t.to(x), self.freqs)
        with float32(x): w = self.w(torch.cat([a.cos(), a.sin()], 1)).squeeze(1) * cfg.adaptive
        return w.exp() * error.square().mean((1, 2, 3)) - w

    def levels(self, u, step):
        """u uniform (B, 2), of which column 0 is used -> times t (B,), float64."""
        cfg = self.cfg
        mean, std = (cfg.P_mean_warmup, cfg.P_std_warmup) if step < cfg.warmup else (cfg.P_mean, cfg.P_std)
        sigma = torch.exp(mean + std * torch.special.ndtri(u[:, 0]))
        return torch.arctan(sigma / SD)

    def tangent(self, x, labels, z, t, step):
        """F with its graph, and g before it is bounded: x, z (B, 3, H, W), t (B,) -> both like x.

        One forward pass of dual numbers gives F and J = sigma_d cos(t) sin(t) dF/dt. The factors enter with
        the tangents: dF/dt alone may overflow in inner layers near t = 0 and pi/2 [5.1]."""
        cos, sin, x_t, dx = path(x, z, t)
        t = t.to(x)
        with float32(x):
            if self.cfg.scd:
                with torch.no_grad(): dx = SD * F(self.teacher, x_t, t, labels)
            speed = SD * cos * sin
            with fwd.dual_level(), ForwardMode(), torch.compiler.set_stance('force_eager'):
                dual = F(self.net, fwd.make_dual(x_t, speed * dx), fwd.make_dual(t, speed.flatten()), labels)
                out, J = fwd.unpack_dual(dual)
        J = 0 if J is None else J.detach()
        r = min(1, (step - self.cfg.warmup) / self.cfg.H) if self.cfg.H else 1
        g = -cos**2 * (SD * out.detach() - dx) - r * (cos * sin * x_t + J)
        return out, g

    def phase(self, step):
        """-> name, first step, learning rate, images per step"""
        cfg, warmup = self.cfg, step < self.cfg.warmup
        name, first = ('diffusion', 0) if warmup else ('scd' if cfg.scd else 'sct', cfg.warmup)
        lr, ramp = (cfg.lr_warmup, cfg.ramp_warmup) if warmup else (cfg.lr, cfg.ramp)
        lr /= max((step - first) / cfg.t_ref, 1)**0.5
        if ramp: lr *= min((step - first) * cfg.batch / ramp, 1)
        if cfg.anneal and not warmup: lr *= (cfg.steps - step) / (cfg.steps - cfg.warmup)
        return name, first, lr, cfg.batch

    def optimiser(self, weights, step):
        """A new one, as the phase of step begins; its learning rate is set in each step."""
        cfg = self.cfg
        kind, beta2 = (cfg.opt_warmup, cfg.beta2_warmup) if step < cfg.warmup else (cfg.opt, cfg.beta2)
        return getattr(torch.optim, kind)(weights, betas=(0.9, beta2), eps=cfg.eps, foreach=True)

    def begin(self, ema):
        """Called as a phase begins, which starts from the averaged weights of the last, sCD's teacher."""
        self.net.load_state_dict(ema.state_dict())
        self.teacher.load_state_dict(ema.state_dict())
        self.reset()

    def averages(self, ema, step):
        """-> [(network that follows self.net, decay)], called after each step."""
        cfg = self.cfg
        gamma, first = (cfg.ema_gamma_warmup, 0) if step < cfg.warmup else (cfg.ema_gamma, cfg.warmup)
        return [(ema, (1 - 1 / (step - first + 1))**(gamma + 1) if gamma else cfg.ema)]


def frozen(net):
    """A copy of the network that does not train; a plain function stands for itself."""
    return copy.deepcopy(net).requires_grad_(False) if isinstance(net, nn.Module) else net


def path(x, z, t):
    """x, z (B, 3, H, W), t (B,) -> cos t, sin t (B, 1, 1, 1), x_t and its velocity given x and z, like x."""
    cos, sin = (v.to(x).view(-1, 1, 1, 1) for v in (t.cos(), t.sin()))
    return cos, sin, cos * x + sin * SD * z, cos * SD * z - sin * x


warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')       # forward mode makes use of it


class ForwardMode(torch.overrides.TorchFunctionMode):
    """Context: forward-mode derivatives in fewer operations than torch's, with the same results and no graph.
    A convolution's is one convolution (torch adds one with the zero tangent of the weights). The Jacobian of
    group normalisation is symmetric before its gain: the fused backward gives it. Halves a step's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x, dx = fwd.unpack_dual(args[0]) if func in (conv2d, group_norm) else (None, None)
        if dx is None: return func(*args, **kwargs)
        if func is conv2d:
            y = func(x, *args[1:], **kwargs)
            with torch.no_grad(): dy = func(dx, args[1], None, *args[3:], **kwargs)
            return fwd.make_dual(y, dy)
        groups, gain, bias, eps = args[1], kwargs['weight'], kwargs['bias'], kwargs['eps']
        x, dx = x.contiguous(), dx.contiguous()     # as the kernels need them
        backward, sizes = torch.ops.aten.native_group_norm_backward, (*x.shape[:2], x[0, 0].numel(), groups)
        y, mean, rstd = torch.native_group_norm(x, gain, bias, *sizes, eps)
        with torch.no_grad():
            dy = backward(dx, x, mean, rstd, None, *sizes, (True, False, False))[0] * gain.view(-1, 1, 1)
        return fwd.make_dual(y, dy)


def diffusion_weights(path):
    """Weights of the diffusion model in a checkpoint: its average in the warm-up, its teacher after that."""
    saved = load(path)
    if saved.get('step', 0) <= saved['config'].get('warmup', 0): return saved['ema']
    return {name[8:]: v for name, v in saved['loss'].items() if name.startswith('teacher.')}


def check_times(ts):
    if max(ts) >= math.pi / 2: stop(f'--ts {ts}: here times are angles below pi/2')


@torch.no_grad()
def sample(net, z, ts, labels=None, noise=None, cfg=None):
    """Standard normal z (B, 3, H, W) -> images in about [-1, 1]: f at time ts[0] of noise alone, then of its
    result with fresh noise (B, 3, H, W) at each further time."""
    check_times(ts)
    if cfg and cfg.heun: return heun(net, z, ts[0], cfg.heun, labels)
    x = f(net, SD * z, z.new_full((len(z),), ts[0]), labels)
    for i, t in enumerate(ts[1:]):
        z = torch.randn_like(z) if noise is None else noise[i]
        x = f(net, math.cos(t) * x + math.sin(t) * SD * z, z.new_full((len(z),), t), labels)
    return x


@torch.no_grad()
def heun(net, z, t_max, n, labels=None):
    """Standard normal z -> images by n steps of DPM-Solver-2S in TrigFlow, 2 n - 1 passes of a diffusion
    model, on EDM's grid (rho 7, sigma from 0.002) from time t_max [G.1]. It is EDM's Heun sampler."""
    low, high = 0.002 ** (1 / 7), (SD * math.tan(t_max)) ** (1 / 7)
    ts = [math.atan((high + i / max(n - 1, 1) * (low - high))**7 / SD) for i in range(n)] + [0.0]

    def eps(x, t):                      # the noise in x, and F
        out = SD * F(net, x, z.new_full((len(z),), t), labels)
        return math.sin(t) * x + math.cos(t) * out, out

    x = SD * z
    for s, t in zip(ts, ts[1:]):
        noise, out = eps(x, s)
        x = math.cos(s - t) * x - math.sin(s - t) * out         # DDIM
        if t: x = x - math.sin(s - t) / (2 * math.cos(s)) * (eps(x, t)[0] - noise)
    return x

# -------------------------------------------------------------------------------------------- recipe

CONFIG = dict(   # (glyphs,   cifar10,     imagenet64,   meaning [source]), or one value for all three
    steps=(      5050,        800_000,     1_448_576,    'optimiser steps in all [Table 4: warmup + 400k]'),
    warmup=(     2600,        400_000,     1_048_576,    'of these, diffusion training [G.1, Table 4]'),
    batch=(      32,          512,         2048,         'images per step, all processes [G.1, Table 4]'),
    lr=(         5e-4,        1e-4,        1e-4,         'learning rate [G.2, Table 4]'),
    lr_warmup=(  2e-3,        1e-3,        1e-2,         'learning rate of the warm-up [G.1, Table 4]'),
    ramp=(       0,           0,           10_000_000,   'images in which lr rises [G.2: as EDM2]'),
    ramp_warmup=(0,           10_000_000,  10_000_000,   'the same in the warm-up [EDM, EDM2]'),
    opt=(        'RAdam',     'RAdam',     'Adam',       'optimiser [G.2]'),
    opt_warmup=( 'RAdam',     'Adam',      'Adam',       'optimiser of the warm-up [G.1]'),
    beta2=(      0.99,                                   'decay of the second moment [G.2]'),
    beta2_warmup=(0.99,       0.999,       0.99,         'the same in the warm-up [G.1]'),
    eps=(        1e-8,        1e-8,        1e-11,        'epsilon of both optimisers [G.1, G.2]'),
    t_ref=(      math.inf,    math.inf,    35_000,       'lr / sqrt(max(step / t_ref, 1)) [Table 4]'),
    anneal=(     1,           0,           0,            '1: lr falls linearly to 0 after the warm-up'),
    ema=(        0.998,       0.99929,     0.99717,      'decay of the average [G.2: 0.5 M images]'),
    ema_gamma=(  0.0,         0.0,         16.97,        'decay (1 - 1/step)^(ema_gamma + 1); 0: ema'),
    ema_gamma_warmup=(0.0,    0.0,         10.289,       'the same in the warm-up, std 0.075 [Table 4]'),
    clip=(       math.inf,                               'gradient norm limit'),
    P_mean=(     -1.0,                                   'of ln(sigma_d tan t) [G.2, Table 4]'),
    P_std=(      1.4,         1.4,         1.6,          'its standard deviation'),
    P_mean_warmup=(-1.2,      -1.2,        -0.8,         'the same in the warm-up [EDM; Table 4]'),
    P_std_warmup=(1.2,        1.2,         1.6,          'its standard deviation'),
    H=(          300,         10_000,      10_000,       'steps in which the second half of g enters [G.2]'),
    c=(          0.1,                                    'g / (|g| + c) [Algorithm 1]'),
    tangent=(    'l2',                                   'g is bounded by its norm, rms, or value by value'),
    adaptive=(   1,                                      '0: w(t) = 0'),
    scd=(        0,                                      '1: distil the diffusion model (sCD); 0: sCT'),
    heun=(       0,                                      'samples: diffusion, in N steps of DPM-Solver'),
    ts=(         (1.5458015, 1.1), (1.5645464, 1.1), (1.5645464, 1.1), 'times of samples [5.2, G.2]'),
    init=(       'none',                                 'none, our checkpoint, EDM, EDM2, ECT, TCM .pkl'),
    res=(        16,          32,          64,           'image side'),
    flip=(       0,                                      '1: random horizontal flips'),
    cond=(       0,           0,           1,            '1: class-conditional'),
    classes=(    10,          10,          1000,         'classes if conditional (counted in the data)'),
    arch=(       'scm',       'scm',       'scm-edm2',   'network: this to head_dim come with --init'),
    ch=(         32,          128,         192,          'channels at full resolution'),
    mult=(       (1, 1, 2),   (2, 2, 2),   (1, 2, 3, 4), 'channel multipliers, full resolution first'),
    blocks=(     1,           4,           3,            'residual blocks per resolution'),
    attn=(       (8,),        (16,),       (16, 8),      'resolutions with attention'),
    head_dim=(   0,           0,           64,           'channels per attention head; 0: one head'),
    dropout=(    0.0,         0.2,         0.45,         'dropout rate of sCT [G.2, Table 4; sCD: 0]'),
    dropout_res=(math.inf,    math.inf,    16,           'largest resolution with dropout [Table 4]'),
    dropout_warmup=(0.0,      0.13,        0.0,          'dropout rate of the warm-up [G.1, Table 4]'),
    amp=(        'off',       'off',       'fp16',       'precision on a GPU; off: float32. On a CPU: off'),
    seed=(       0,                                      'of all random numbers'),
    save_every=( 1000,        10_000,      5000,         'steps between checkpoints and sample grids'),
    log_every=(  50,          100,         100,          'steps between status lines'),
)
CHOICES = dict(tangent=('l2', 'rms', 'clip'), arch=('scm', 'scm-edm2', 'ddpmpp', 'edm2'), adaptive=(0, 1),
               scd=(0, 1), opt=('RAdam', 'Adam'), opt_warmup=('RAdam', 'Adam'), anneal=(0, 1),
               amp=('off', 'tf32', 'fp16', 'bf16'), flip=(0, 1), cond=(0, 1), device=('auto', 'cpu'))
SIGNED = 'P_mean P_mean_warmup seed label'.split()      # numbers that may be negative

# ==== From here on all six scripts have one text, but for networks (ct, ict, scm), LPIPS and edits (ct), and
# ==== a line of write_samples (ct, sct, scm). What looks unused here serves another of them.

# ------------------------------------------------------------------------------------------- network

SHAPE = 'arch ch mult blocks attn head_dim'.split()     # knobs that come with --init
SAME, DOWN, UP = nn.Identity(), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)


def init(layer, gain=1.0):
    """EDM's initialisation: Xavier-uniform weights times gain, zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def norm(ch): return nn.GroupNorm(math.gcd(min(32, ch // 4), ch), ch, eps=1e-6)


def float32(x):
    """Context in which layers compute in float32 whatever --amp is."""
    return torch.autocast(x.device.type, enabled=False)


def attend(qkv, heads, normalise=SAME):
    """Self-attention, qkv (B, 3 C, H, W) -> (B, C, H, W). Written out, since torch's fused kernels lack the
    forward-mode derivative that scm.py takes."""
    B, C, H, W = len(qkv), qkv.shape[1] // 3, *qkv.shape[2:]
    q, k, v = normalise(qkv.reshape(B * heads, C // heads, 3, H * W)).unbind(2)
    w = torch.einsum('bcq,bck->bqk', q, k / q.shape[1]**0.5).softmax(-1)
    return torch.einsum('bqk,bck->bcq', w, v).reshape(B, C, H, W)


def class_vector(labels, classes, e):
    """Labels (B,) -> one-hot vectors (B, classes) like e, of mean square 1; None, no class -> zeros."""
    return e.new_zeros(1, classes) if labels is None else one_hot(labels, classes).to(e) * classes**0.5


class Block(nn.Module):
    """EDM's residual block, with optional resampling and attention. e: the embedding of t and class. With
    double_norm, sCM's norm(h) pixelnorm(s(e)) + pixelnorm(b(e)) in place of norm(h + b(e)) [4.1]."""

    def __init__(self, cfg, cin, cout, res, attention=False, resample=SAME):
        super().__init__()
        self.cout, self.resample = cout, resample
        self.takes_skip, self.heads = False, attention and max(1, cout // (cfg.head_dim or cout))
        self.double_norm = cfg.arch == 'scm'
        self.norm0 = norm(cin)
        self.conv0 = init(nn.Conv2d(cin, cout, 3, padding=1))
        self.affine = init(nn.Linear(4 * cfg.ch, 2 * cout if self.double_norm else cout))
        self.norm1 = norm(cout)
        self.dropout = nn.Dropout(cfg.dropout) if res <= cfg.dropout_res else SAME
        self.conv1 = init(nn.Conv2d(cout, cout, 3, padding=1), 1e-5)
        self.skip = SAME if cin == cout and resample is SAME else init(nn.Conv2d(cin, cout, 1))
        if attention:
            self.norm2 = norm(cout)
            self.qkv = init(nn.Conv2d(cout, 3 * cout, 1), 0.2**0.5)
            self.proj = init(nn.Conv2d(cout, cout, 1), 1e-5)

    def forward(self, x, e):
        with float32(x): shift = self.affine(e)[:, :, None, None]
        h = self.conv0(self.resample(silu(self.norm0(x))))
        if self.double_norm:            # scale and shift of mean square 1 over the channels
            scale, shift = (v / (v.square().mean(1, keepdim=True) + 1e-8).sqrt() for v in shift.chunk(2, 1))
            h = self.norm1(h) * scale + shift
        else: h = self.norm1(h + shift)
        h = self.conv1(self.dropout(silu(h)))
        x = (h + self.skip(self.resample(x))) * 0.5**0.5
        if self.heads:
            qkv = self.qkv(self.norm2(x))
            with float32(x): h = attend(qkv.to(e.dtype), self.heads)
            x = (self.proj(h) + x) * 0.5**0.5
        return x


class Body(nn.Module):
    """What DDPM++ and EDM2's network share: an encoder, and a decoder that joins the encoder's outputs."""

    def build(self, cfg, first, ch, block, decoder_block, attend_in_all):
        """first: a layer with ch outputs. attend_in_all: in all decoder blocks of a level, or in the last."""
        levels = [(cfg.res >> i, int(cfg.ch * m)) for i, m in enumerate(cfg.mult)]
        lowest = levels[-1][0]
        self.enc, self.dec, skips = nn.ModuleList([first]), nn.ModuleList(), [ch]
        for res, width in levels:
            if res < cfg.res: self.enc.append(block(cfg, ch, ch, res, resample=DOWN))
            for _ in range(cfg.blocks):
                self.enc.append(block(cfg, ch, width, res, res in cfg.attn))
                ch = width
        skips += [layer.cout for layer in self.enc[1:]]
        self.dec += [decoder_block(cfg, ch, ch, lowest, True), decoder_block(cfg, ch, ch, lowest)]
        for res, width in reversed(levels):
            if res > lowest: self.dec.append(decoder_block(cfg, ch, ch, res, resample=UP))
            for i in range(cfg.blocks + 1):
                attention = res in cfg.attn and (attend_in_all or i == cfg.blocks)
                self.dec.append(decoder_block(cfg, ch + skips.pop(), width, res, attention))
                self.dec[-1].takes_skip = True
                ch = width

    def run(self, x, e):
        """x: what the first layer reads; e: the embedding of t and class -> the last block's output."""
        skips = [self.enc[0](x)]
        for block in self.enc[1:]: skips.append(block(skips[-1], e))
        x = skips[-1]
        for block in self.dec:
            if block.takes_skip: x = self.join(x, skips.pop())
            x = block(x, e)
        return x


class DDPMpp(Body):
    """EDM's DDPM++ [networks.py SongUNet] without augmentation input: (x (B, 3, H, W), c_noise (B,), labels
    (B,) or None) -> (B, 3, H, W). Its parameters stand in the order of EDM's, to be loaded by position."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.classes, ch = cfg, cfg.classes if cfg.cond else 0, cfg.ch
        self.register_buffer('freqs', 1e4 ** (-torch.arange(ch // 2) / (ch // 2 - 1)), persistent=False)
        if self.classes: self.map_label = init(nn.Linear(self.classes, ch))
        self.map0, self.map1 = init(nn.Linear(ch, 4 * ch)), init(nn.Linear(4 * ch, 4 * ch))
        self.build(cfg, init(nn.Conv2d(3, ch, 3, padding=1)), ch, Block, Block, attend_in_all=False)
        ch = self.dec[-1].cout
        self.norm, self.out = norm(ch), init(nn.Conv2d(ch, 3, 3, padding=1), 1e-5)

    def join(self, x, skip): return torch.cat([x, skip], 1)

    def forward(self, x, c_noise, labels=None):
        with float32(x):
            a = torch.outer(c_noise.to(x), self.freqs)
            e = torch.cat([a.sin(), a.cos()], 1)
            if self.classes: e = e + self.map_label(class_vector(labels, self.classes, e))
            e = silu(self.map1(silu(self.map0(e))))
        return self.out(silu(self.norm(self.run(x, e)))).to(e.dtype)


def unit(x, dim=None):
    """x over its root mean square along dim (all but the first), plus 1e-4; measured in float32 or better."""
    dim = dim or tuple(range(1, x.ndim))
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)
    rms = norm / (x.numel() / norm.numel())**0.5
    return x / (1e-4 + rms).to(x.dtype)


def mp_sum(a, b, t): return torch.lerp(a, b, t) / ((1 - t)**2 + t**2)**0.5


class MPConv(nn.Module):
    """EDM2's only layer with weights: a convolution or (no kernel) linear, no bias, normalised in use."""

    def __init__(self, cin, cout, *kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *kernel))

    def forward(self, x, gain=1.0):
        with float32(x):                # weights and linear layers
            w = unit(self.weight) * (gain / self.weight[0].numel()**0.5)
            if w.ndim == 2: return x @ w.T
        return conv2d(x, w, padding=w.shape[-1] // 2)


class MPBlock(nn.Module):
    """EDM2's residual block, of the encoder or of the decoder; double_norm as above, in EDM2's own norm."""

    def __init__(self, cfg, cin, cout, res, attention=False, resample=SAME, decoder=False):
        super().__init__()
        self.cout, self.resample, self.decoder = cout, resample, decoder
        self.takes_skip, self.heads = False, attention and cout // (cfg.head_dim or cout)       # may be 0
        self.double_norm = cfg.arch == 'scm-edm2'
        if not self.double_norm: self.gain = nn.Parameter(torch.zeros(()))
        self.conv0 = MPConv(cin if decoder else cout, cout, 3, 3)
        self.affine = MPConv(int(cfg.ch * max(cfg.mult)), 2 * cout if self.double_norm else cout)
        self.conv1 = MPConv(cout, cout, 3, 3)
        self.dropout = nn.Dropout(cfg.dropout) if res <= cfg.dropout_res else SAME
        self.skip = MPConv(cin, cout, 1, 1) if cin != cout else SAME
        if self.heads: self.qkv, self.proj = MPConv(cout, 3 * cout, 1, 1), MPConv(cout, cout, 1, 1)

    def forward(self, x, e):
        with float32(x): x = self.resample(x)                   # else autocast turns halves into float32
        if not self.decoder: x = unit(self.skip(x), 1)
        h = self.conv0(silu(x) / 0.596)
        if self.double_norm:
            scale, shift = (unit(v, 1).to(h.dtype)[:, :, None, None] for v in self.affine(e).chunk(2, 1))
            h = unit(h, 1) * scale + shift
        else: h = h * (1 + self.affine(e, self.gain)).to(h.dtype)[:, :, None, None]
        h = self.conv1(self.dropout(silu(h) / 0.596))
        if self.decoder: x = self.skip(x)
        x = mp_sum(x, h, 0.3)
        if self.heads: x = mp_sum(x, self.proj(attend(self.qkv(x), self.heads, lambda v: unit(v, 1))), 0.3)
        return x.clamp(-256, 256)


class EDM2UNet(Body):
    """EDM2's network, config G [Karras et al. 2024; networks_edm2.py] without uncertainty; shapes as above.
    The code normalises the weights themselves within forward; here normalise() does, before each step."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.classes = cfg, cfg.classes if cfg.cond else 0
        ch, emb = int(cfg.ch * cfg.mult[0]), int(cfg.ch * max(cfg.mult))
        self.gain = nn.Parameter(torch.zeros(()))
        self.register_buffer('freqs', 2 * math.pi * torch.randn(ch))
        self.register_buffer('phases', 2 * math.pi * torch.rand(ch))
        self.map_noise = MPConv(ch, emb)
        if self.classes: self.map_label = MPConv(self.classes, emb)
        self.build(cfg, MPConv(4, ch, 3, 3), ch, MPBlock, partial(MPBlock, decoder=True), attend_in_all=True)
        self.out = MPConv(self.dec[-1].cout, 3, 3, 3)

    @torch.no_grad()
    def normalise(self):
        for layer in self.modules():
            if isinstance(layer, MPConv): layer.weight.copy_(unit(layer.weight))

    def join(self, x, skip):
        """Both contribute equally."""
        ch = x.shape[1] + skip.shape[1]
        return torch.cat([v * (ch / (2 * v.shape[1]))**0.5 for v in (x, skip)], 1)

    def forward(self, x, c_noise, labels=None):
        with float32(x):
            e = self.map_noise(2**0.5 * (torch.outer(c_noise.to(x), self.freqs) + self.phases).cos())
            if self.classes: e = mp_sum(e, self.map_label(class_vector(labels, self.classes, e)), 0.5)
            e = silu(e) / 0.596
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)        # a plane of ones: there is no bias
        return self.out(self.run(x, e), self.gain).to(e.dtype)


def UNet(cfg):
    """The raw network F of cfg.arch; edm: EDM's or EDM2's own, see F."""
    net = (EDM2UNet if 'edm2' in cfg.arch else DDPMpp)(cfg)
    net.edm = not cfg.arch.startswith('scm')
    if cfg.arch == 'scm-edm2':          # slow features of t, as in DDPM++ [4.1]: cosines, then sines
        half = len(net.freqs) // 2
        net.freqs = (1e4 ** (-torch.arange(half) / (half - 1))).repeat(2)
        net.phases = torch.tensor([0, -math.pi / 2]).repeat_interleave(half)
    return net

# ---------------------------------------------------------------------------------------------- data

DATA = ('glyphs', 'cifar10', 'imagenet64')
CIFAR = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
CIFAR_SHA256 = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'


@contextlib.contextmanager
def reading(file, advice=''):
    """A context for reading a file of unknown content: what fails in it ends the program with one line, or,
    if DEBUG is set in the environment, with Python's traceback."""
    try: yield
    except Exception as error:
        if 'DEBUG' in os.environ: raise
        stop(f'{file} cannot be read: {type(error).__name__} {str(error)[:300]}{advice}')


@contextlib.contextmanager
def written(path):
    """An open file, which takes path's place when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    try:
        with open(part, 'wb') as file: yield file
        os.replace(part, path)
    finally: part.unlink(missing_ok=True)


def fetch(url, sha256=None):
    """Path of the file at url, in ./datasets, downloaded if it is not there."""
    path = Path('datasets', url.rsplit('/', 1)[1])
    path.parent.mkdir(exist_ok=True)
    with reading(url, f': put it at {path}'):
        if not path.exists(): torch.hub.download_url_to_file(url, str(path), sha256)
    return path


def glyphs(res=16, n=20_000, seed=0):
    """n digits in Pillow's built-in font, in random pose, size, place and colours, light on dark: a function
    of seed. -> images uint8 (n, 3, res, res), labels int64 (n,)"""
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
    ink = [grid_sample(masks[l], affine_grid(p, (len(l), 1, 2 * res, 2 * res), False), align_corners=False)
           for l, p in zip(labels.split(2000), pose.split(2000))]
    ground, stroke = 0.4 * torch.rand(n, 3, 1, 1, generator=g), 1 - 0.4 * torch.rand(n, 3, 1, 1, generator=g)
    images = torch.lerp(ground, stroke, avg_pool2d(torch.cat(ink), 2))
    return (images * 255).round().to(torch.uint8), labels


def cifar10():
    """CIFAR-10's training images and labels, from its binary archive."""
    with reading(path := fetch(CIFAR, CIFAR_SHA256)), tarfile.open(path) as tar:
        batches = [tar.extractfile(f'cifar-10-batches-bin/data_batch_{i}.bin').read() for i in range(1, 6)]
    rows = torch.frombuffer(bytearray(b''.join(batches)), dtype=torch.uint8).view(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def data_file(path):
    """What torch.save((images, labels), path) wrote: images uint8 (N, 3, res, res), which stay on the disk,
    and labels int64 (N,) or None."""
    if path.exists() and path.suffix != '.pt':
        stop(f'{path} is no data file. Make one: python fid.py --pack {path}, which names the next command')
    with reading(path, f'; --data is {", ".join(DATA)}, or a .pt file that python fid.py --pack PATH makes'):
        images, labels = torch.load(path, mmap=True, weights_only=True)
        n, res = len(images), images.shape[-1]
        found = [(v.dtype, v.shape) for v in (images, labels) if v is not None]
        if not n or found != [(torch.uint8, (n, 3, res, res)), (torch.int64, (n,))][:len(found)]:
            raise ValueError(f'its images and labels are {found}')
    return images, labels


def classes_in(labels):
    """How many classes labels (N,) name, or 0 if not each of 0, 1, ... to the highest is there."""
    found = torch.arange(0) if labels is None else labels.unique()
    return len(found) if torch.equal(found, torch.arange(len(found))) else 0


def load_data(cfg):
    """-> images uint8 (N, 3, res, res), labels int64 (N,) or, if cfg.cond is 0, None."""
    if cfg.data == 'glyphs': images, labels = glyphs(cfg.res)
    elif cfg.data == 'cifar10': images, labels = cifar10()
    else: images, labels = data_file(Path('datasets/imagenet64.pt' if cfg.data == 'imagenet64' else cfg.data))
    if images.shape[2] != cfg.res: stop(f'--res {cfg.res}: the images of {cfg.data} are of {images.shape[2]}')
    if not cfg.cond: return images, None
    if classes_in(labels) != cfg.classes:
        stop(f'{cfg.data} has no labels, or not all of 0, 1, ... to {cfg.classes - 1}: use --cond 0')
    return images, labels

# ------------------------------------------------------------------------------------------ training

def seed_of(cfg, stream, i):
    """Seed for step (or image) i. Streams: 0 samples, 1 and 2 training, 3 + rank dropout."""
    return ((1000 * cfg.seed + stream) * 100_000_007 + i) % 2**64


def draw(cfg, data, batch, step, rank, world, device):
    """What a step trains on: x in [-1, 1], labels or None, u, z, on the device. All processes draw the whole
    batch, a function of (seed, step), and each takes every world-th row of it."""
    def sent(v): return v.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else v

    images, labels = data
    g = torch.Generator().manual_seed(seed_of(cfg, 1, step))
    index = torch.randint(len(images), (batch,), generator=g)
    u0 = torch.rand(batch, generator=g, dtype=torch.float64)
    flip = torch.rand(batch, generator=g) < 0.5 * cfg.flip
    u1 = torch.rand(batch, generator=g, dtype=torch.float64)
    g = torch.Generator(device).manual_seed(seed_of(cfg, 2, step))
    z = torch.randn(batch, 3, cfg.res, cfg.res, generator=g, device=device)
    index, u, flip, z = (v[rank::world] for v in (index, torch.stack([u0, u1], 1), flip, z))
    x = sent(images[index]).float() / 127.5 - 1
    x = torch.where(sent(flip).view(-1, 1, 1, 1), x.flip(3), x)
    return x, sent(labels[index]) if cfg.cond else None, sent(u), z


def autocast(cfg, device):
    """Context of a forward pass with --amp. No cache: before torch 2.11 the student would find in it weights
    that were cast for its target, without a graph."""
    dtype = dict(fp16=torch.float16, bf16=torch.bfloat16).get(cfg.amp)
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


def load(path):
    """A checkpoint of any of the scripts; of an EDM .pkl its config and weights (ema)."""
    with reading(path, '; a checkpoint of ours is expected, or a .pkl of EDM, EDM2, ECT or TCM'):
        if str(path).endswith('.pkl'):
            net = load_edm(path)
            return dict(config=vars(net.cfg), ema=net.state_dict())
        if zipfile.ZipFile(path).testzip(): raise ValueError('it is damaged')   # torch does not look
        saved = torch.load(path, map_location='cpu', weights_only=True)
        if not {'config', 'ema'} <= set(saved): raise ValueError('it holds no config and ema')
    return saved


def new_network(cfg):
    """A fresh UNet, or the one that --init names, whose shape then enters cfg."""
    torch.manual_seed(cfg.seed % 2**64)
    if cfg.init == 'none': return UNet(cfg)
    saved = load(cfg.init)
    classes, theirs = (knobs['classes'] * knobs['cond'] for knobs in (vars(cfg), saved['config']))
    if classes != theirs: stop(f'--init {cfg.init} knows {theirs} classes, this run {classes}: see --cond')
    vars(cfg).update({knob: saved['config'][knob] for knob in SHAPE})
    net = UNet(cfg)
    with reading(cfg.init, f'; do its arch and --res {cfg.res} fit?'): net.load_state_dict(saved['ema'])
    return net


class Run:
    """What one process of a training run holds: the networks, the loss, the optimiser."""

    def __init__(self, cfg, data, rank, world, device):
        """From the checkpoint in cfg.out, or else from the start."""
        latest = Path(cfg.out, 'latest.pt')
        saved = load(latest) if latest.exists() else None
        self.cfg, self.data, self.rank, self.world, self.device = cfg, data, rank, world, device
        self.net = (UNet(cfg) if saved else new_network(cfg)).to(device)
        self.ema = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.loss = Loss(self.net, cfg, data).to(device)
        self.weights = [p for p in self.loss.parameters() if p.requires_grad]
        self.start, self.log = (saved['step'], saved['log']) if saved else (0, '')
        self.opt = self.loss.optimiser(self.weights, self.start)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == 'fp16')
        if saved:
            self.loss.load_state_dict(saved['loss'])
            self.ema.load_state_dict(saved['ema'])
            self.opt.load_state_dict(saved['opt'])
            if saved['scaler']: self.scaler.load_state_dict(saved['scaler'])    # it is empty without fp16
        if cfg.compile: self.net.compile(dynamic=False)
        self.parallel_loss = nn.parallel.DistributedDataParallel(self.loss) if world > 1 else self.loss
        self.parallel_loss.broadcast_buffers = False            # they are the same in all processes

    def step(self, step):
        """One optimiser step -> loss and norm of the gradient, on the device, (2,). Nothing in it waits for a
        GPU, but for the scaler of fp16."""
        cfg, total = self.cfg, 0
        _, first, lr, batch = self.loss.phase(step)
        if step == first:
            self.loss.begin(self.ema)
            self.opt = self.loss.optimiser(self.weights, step)
        for group in self.opt.param_groups: group['lr'] = lr
        if 'edm2' in cfg.arch: self.net.normalise()

        x, y, u, z = draw(cfg, self.data, batch, step, self.rank, self.world, self.device)
        torch.manual_seed(seed_of(cfg, 3 + self.rank, step))    # dropout
        self.opt.zero_grad()
        micro = cfg.micro or len(x)
        for i in range(0, len(x), micro):
            rows, last = slice(i, i + micro), i + micro >= len(x)
            with contextlib.nullcontext() if last or self.world == 1 else self.parallel_loss.no_sync():
                labels = y[rows] if cfg.cond else None
                with autocast(cfg, self.device):
                    loss = self.parallel_loss(x[rows], labels, u[rows], z[rows], step).sum() / batch
                self.scaler.scale(loss * self.world).backward()     # gradients are averaged over processes
            total = total + loss.detach()
        self.scaler.unscale_(self.opt)
        norm = nn.utils.clip_grad_norm_(self.weights, cfg.clip)
        self.scaler.step(self.opt)
        self.scaler.update()
        with torch.no_grad():           # or each average hangs on a graph that grows with every step
            for average, decay in self.loss.averages(self.ema, step):
                torch._foreach_lerp_(list(average.parameters()), list(self.net.parameters()), 1 - decay)
        return torch.stack([total, norm])

    def report(self, step, loss, norm, seconds):
        """A status line, and a row of log.csv. loss, norm: means since the last; seconds: of a step."""
        skips = self.cfg.amp == 'fp16' and self.scaler.get_scale() > 1e-6       # steps that overflow
        if not math.isfinite(loss) or not (skips or math.isfinite(norm)):
            stop(f'loss {loss:.4g}, gradient norm {norm:.4g} up to step {step + 1}: lower --lr', 1)
        phase, _, lr, batch = self.loss.phase(step)
        row = dict(step=step + 1, phase=phase, loss=f'{loss:.5g}', grad_norm=f'{norm:.4g}', lr=f'{lr:.4g}',
                   images_per_second=f'{batch / seconds:.4g}')
        if not self.log: self.log = ','.join(row) + '\n'
        self.log += ','.join(map(str, row.values())) + '\n'
        Path(self.cfg.out, 'log.csv').write_text(self.log)
        left = timedelta(seconds=round(seconds * (self.cfg.steps - step - 1)))
        print('  '.join(f'{name} {value}' for name, value in row.items()), f' {left} left', flush=True)

    def save(self, done):
        """The checkpoint and a picture of samples after `done` steps."""
        cfg, out = self.cfg, Path(self.cfg.out)
        state = dict(method=METHOD, step=done, config={knob: vars(cfg)[knob] for knob in ('data', *CONFIG)},
                     loss=self.loss.state_dict(), ema=self.ema.state_dict(), opt=self.opt.state_dict(),
                     scaler=self.scaler.state_dict(), log=self.log)
        with written(out / 'latest.pt') as file: torch.save(state, file)
        grids = [generate(cfg, self.ema, torch.arange(100), cfg.ts[:k], self.device) for k in (1, 2)]
        picture_grid(torch.cat(grids), out / f'samples-{done:06d}.png')


def train(cfg, data, rank, world, device):
    """All phases of the run in cfg.out, from its checkpoint if there is one."""
    run, images, out = Run(cfg, data, rank, world, device), data[0], Path(cfg.out)
    if rank == 0:
        picture_grid(images[torch.linspace(0, len(images) - 1, 100).long()], out / 'data.png')
        Path(out, 'log.csv').write_text(run.log)
        classes = f'{cfg.classes} classes' if cfg.cond else 'no classes'
        weights = f'{sum(p.numel() for p in run.weights):,} weights'
        print(f'{METHOD} on {cfg.data}: {len(images)} images of side {cfg.res}, {classes}, {world} x '
              f'{device.type}, amp {cfg.amp}, {weights}, steps {run.start} to {cfg.steps}')
    total, last, since = torch.zeros(2, device=device), run.start, time.time()
    for step in range(run.start, cfg.steps):
        total += run.step(step)
        done = step + 1
        saves = done % cfg.save_every == 0 or done == cfg.steps
        if not (saves or done % cfg.log_every == 0 or run.loss.phase(done)[1] == done): continue
        if world > 1: dist.all_reduce(total[:1])                # the norm is the same in all
        loss, norm = (total / (done - last)).tolist()
        if rank == 0:
            run.report(step, loss, norm, (time.time() - since) / (done - last))
            if saves: run.save(done)
        last, since = done, time.time()
        total.zero_()
    if rank == 0:
        print(f'pictures: {out}/samples-{cfg.steps:06d}.png, one-step samples above two-step, {out}/data.png')
        print(f'next: python {METHOD}.py --out {out} --sample 10000')

# ------------------------------------------------------------------------------------------ sampling

def classes_of(cfg, index):
    """Labels of the samples numbered index (N,): --label, or all classes in turn."""
    return index % cfg.classes if cfg.label < 0 else torch.full_like(index, cfg.label)


def generate(cfg, net, index, ts, device):
    """Samples numbered index (N,) -> uint8 (N, 3, res, res). Their noise is a function of (seed, index)."""
    images = []
    for part in index.split(cfg.micro or 50):
        gs = [torch.Generator().manual_seed(seed_of(cfg, 0, i)) for i in part.tolist()]
        z, *noise = [torch.stack([torch.randn(3, cfg.res, cfg.res, generator=g) for g in gs]).to(device)
                     for _ in ts]
        labels = classes_of(cfg, part).to(device) if cfg.cond else None
        with autocast(cfg, device): x = sample(net, z, ts, labels, noise, cfg)
        if not x.isfinite().all(): stop('the network returns NaN', 1)
        images.append((x * 127.5 + 128).clamp(0, 255).to(torch.uint8))          # to the nearest, as EDM does
    return torch.cat(images)


def picture_grid(images, path, columns=20):
    """uint8 (N, 3, H, W) -> PNG with `columns` images to a row, small ones enlarged."""
    n, c, h, w = images.shape
    scale, rows = max(1, 48 // h), n // columns
    grid = images.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    image = Image.fromarray(grid.cpu().numpy()).resize((columns * w * scale, rows * h * scale), Image.NEAREST)
    with written(path) as file: image.save(file, 'PNG')


def write_samples(cfg, rank, world, device):
    """--sample N images of the average weights: .npz (arr_0 (N, H, W, 3), arr_1 labels) or folder of PNG."""
    path, ts, start = Path(cfg.save or f'{cfg.out}/samples.npz'), cfg.ts[:cfg.nfe], time.time()
    net = new_network(cfg).to(device).eval()
    if cfg.heun: net.load_state_dict(diffusion_weights(cfg.init))
    if cfg.compile: net.compile(dynamic=False)
    index = torch.arange(cfg.sample)
    images = torch.zeros(cfg.sample, 3, cfg.res, cfg.res, dtype=torch.uint8, device=device)
    images[rank::world] = generate(cfg, net, index[rank::world], ts, device)
    if world > 1: dist.all_reduce(images)                       # the others' are zero
    if rank: return
    images = images.permute(0, 2, 3, 1).cpu().numpy()
    if path.suffix == '.npz':
        labels = dict(arr_1=classes_of(cfg, index).numpy()) if cfg.cond else {}
        with written(path) as file: np.savez(file, arr_0=images, **labels)
    else:
        path.mkdir(parents=True)
        for i, image in enumerate(images): Image.fromarray(image).save(path / f'{i:06d}.png')
    print(f'{cfg.sample} samples of {cfg.init} at noise levels {ts} in {time.time() - start:.0f} s: {path}')
    print(f'next: python fid.py {path}')

# ---------------------------------------------------------------------------------- EDM's checkpoints

class Record(dict):
    """Stands in for every object of a pickle but tensors: keeps what it is given, has no behaviour."""
    args = ()

    def __init__(self, *args): self.args = args

    def __setstate__(self, state): self.state = state


class EDMUnpickler(pickle.Unpickler):
    """Reads a .pkl (layout: EDM's torch_utils/persistence.py) as data: none of the code in it runs."""

    TENSORS = {
        'torch._utils._rebuild_parameter': lambda data, requires_grad, hooks: data,
        'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
        'torch.storage._load_from_bytes': lambda b: torch.load(io.BytesIO(b), 'cpu', weights_only=True),
    }

    def find_class(self, module, name): return self.TENSORS.get(f'{module}.{name}', Record)


def load_edm(path_or_url):
    """A .pkl of EDM, EDM2, ECT or TCM -> UNet with its `ema` weights, of the shape found in it (in net.cfg).
    EDM's augmentation input, which is zero in use, and EDM2's uncertainty are left out."""
    path = fetch(path_or_url) if '://' in str(path_or_url) else path_or_url
    with open(path, 'rb') as file: parts = EDMUnpickler(file).load()['ema'].args[0]['state']['_modules']
    unet = parts['unet' if 'unet' in parts else 'model'].args[0]
    args = dict(label_dim=0, embedding_type='positional', model_channels=128, channel_mult=[1, 2, 2, 2],
                num_blocks=4, attn_resolutions=[16], channels_per_head=0)
    if unet['class_name'] == 'UNet':    # EDM2's
        args |= dict(embedding_type='edm2', model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3,
                     attn_resolutions=[16, 8], channels_per_head=64)
    args = argparse.Namespace(**args | unet['state']['_init_kwargs'])
    arch = dict(positional='ddpmpp', fourier='ncsnpp', edm2='edm2')[args.embedding_type]
    if unet['class_name'] not in ('UNet', 'SongUNet') or arch not in CHOICES['arch']:
        raise ValueError(f'its network is {unet["class_name"]}, {arch}, not one of {CHOICES["arch"]}')
    net = UNet(argparse.Namespace(
        arch=arch, res=args.img_resolution, ch=args.model_channels, mult=tuple(args.channel_mult), fourier=16,
        blocks=args.num_blocks, attn=tuple(args.attn_resolutions), head_dim=args.channels_per_head, dropout=0,
        cond=int(args.label_dim > 0), classes=max(1, args.label_dim), dropout_res=0))

    def tensors(state):                 # in the order of state_dict(), as EDM's; tests compare the outputs
        for group in ('_parameters', '_buffers'):
            yield from (v for k, v in state[group].items() if v is not None and k != 'resample_filter')
        for name, part in state['_modules'].items():
            inner = part.args[0]['state'] if part.args else part.state          # EDM's class, or torch's
            if name != 'map_augment': yield from tensors(inner)

    net.load_state_dict(dict(zip(net.state_dict(), tensors(unet['state']), strict=True)))
    return net

# -------------------------------------------------------------------------------------- command line

METHOD = Path(__file__).stem
FLAGS = dict(                           # how to run
    data=('glyphs', 'glyphs, cifar10, imagenet64, or a .pt file of images made by fid.py --pack'),
    out=('', 'run folder [runs/<method>-<data>]'),
    gpus=(1, 'processes, one per GPU'),
    device=('auto', 'cpu leaves the GPUs alone'),
    micro=(0, 'most images one process holds at once; 0: its whole share'),
    compile=(False, 'torch.compile the network; training on a GPU does, unless --amp off'),
    sample=(0, 'write this many samples of the run in --out, or of the network --init, and stop'),
    nfe=(1, 'network evaluations per sample'),
    save=('', 'where the samples go: an .npz, or a new folder of PNG [<out>/samples.npz]'),
    label=(-1, 'class of all samples; -1: all classes in turn'),
)


def stop(message, code=2):
    """Ends the program with one line on stderr: code 2 for bad input, 1 for a failure."""
    print(f'{METHOD}.py:', *str(message).split(), file=sys.stderr, flush=True)
    sys.exit(code)


def numbers(text): return tuple(float(word) for word in text.split(','))


def parse(argv):
    """-> {flag or knob: value}, of those that argv gives"""
    parser = argparse.ArgumentParser(f'{METHOD}.py', allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = stop
    for name, (*values, meaning) in {**FLAGS, **CONFIG}.items():
        kind = float if any(isinstance(value, float) for value in values) else type(values[0])
        how = dict(type=numbers if kind is tuple else kind, choices=CHOICES.get(name))
        if kind is bool: how = dict(action='store_true')
        defaults = ', '.join(map(str, values)).replace('%', '%%')
        parser.add_argument(f'--{name}', help=f'{meaning.replace("%", "%%")} [{defaults}]', **how)
    return vars(parser.parse_args(argv))


def knobs_of_checkpoint(path, given, fixed, advice):
    """The knobs in a checkpoint of this script, or a .pkl. Those in fixed cannot be given otherwise."""
    saved = load(path)
    if saved.get('method', METHOD) != METHOD: stop(f'{path} is of {saved["method"]}.py: {advice}')
    for name in given.keys() & fixed & saved['config'].keys():
        if given[name] != saved['config'][name]:
            stop(f'--{name} {given[name]}: it is {saved["config"][name]} in {path}. {advice}')
    return {knob: value for knob, value in saved['config'].items() if knob in ('data', *CONFIG)}


def config(argv=None):
    """Flags and knobs as a Namespace. Each is from the first of these that has it: argv; the run in --out, or
    the network that is sampled; the data file; the column of CONFIG."""
    given = parse(argv)
    if 'data' in given: given['data'] = str(Path(given['data']))
    flags = {name: value for name, (value, meaning) in FLAGS.items()} | given
    gpu = torch.cuda.is_available() and flags['device'] == 'auto'
    latest = Path(flags['out'] or f'runs/{METHOD}-{Path(flags["data"]).stem}', 'latest.pt')
    begun = latest.exists() and not flags['sample']

    decided, column = {}, None
    if flags['sample']:
        fixed, init = {'res', 'cond', 'classes', *SHAPE}, given.setdefault('init', str(latest))
        decided = knobs_of_checkpoint(init, given, fixed, 'Only that network can be sampled')
    elif begun:                         # its recipe is fixed, but for knobs of the machine
        fixed = {'data', *CONFIG} - {'amp', 'save_every', 'log_every'}
        decided = knobs_of_checkpoint(latest, given, fixed, f'To go on from it: --out NEW --init {latest}')
    elif flags['data'] in DATA: column = DATA.index(flags['data'])
    else:
        images, labels = data_file(Path(flags['data']))
        classes = classes_in(labels)
        decided = dict(init='none', res=images.shape[-1], cond=int(classes > 0), classes=max(1, classes))
        if not gpu: column = 0          # a network for a CPU
    if column is None: column = min(range(3), key=lambda i: abs(CONFIG['res'][i] - decided['res']))
    recipe = {name: values[column if len(values) > 1 else 0] for name, (*values, meaning) in CONFIG.items()}
    cfg = argparse.Namespace(**flags | recipe | decided | given)
    cfg.out, cfg.device = str(latest.parent), 'cuda' if gpu else 'cpu'

    if cfg.init != 'none' and not latest.exists():
        cfg.warmup = given.get('warmup', 0)                     # --init is the diffusion model
        if given.keys() & set(SHAPE): stop(f'--{" --".join(SHAPE)}: these come with --init {cfg.init}')
    if not gpu: cfg.amp = given.get('amp', 'off')
    elif cfg.amp != 'off' and not cfg.sample: cfg.compile = True        # half as fast again on an H100
    if dist.is_torchelastic_launched(): cfg.gpus = int(os.environ['WORLD_SIZE'])
    elif flags['device'] == 'auto' and cfg.gpus > max(1, torch.cuda.device_count()):
        stop(f'--gpus {cfg.gpus}: this machine has {torch.cuda.device_count()}. On its cores: --device cpu')
    check(cfg)
    return cfg


def check(cfg):
    """Ends the program where values have no meaning or do not fit each other."""
    positive = 'steps batch lr clip res ch mult blocks ts gpus nfe save_every log_every'.split()
    for name, value in vars(cfg).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, str): continue
            if math.isnan(number) or number < 0 and name not in SIGNED or number == 0 and name in positive:
                stop(f'--{name} {number}: it must be {"above" if name in positive else "at least"} 0')
    halvings, save = len(cfg.mult) - 1, Path(cfg.save)
    if cfg.res % 2**halvings: stop(f'--res {cfg.res} cannot be halved {halvings} times: see --mult')
    if cfg.gpus > min(cfg.batch, cfg.sample or cfg.batch): stop('--gpus: fewer images than processes')
    if list(cfg.ts) != sorted(cfg.ts, reverse=True): stop(f'--ts {cfg.ts}: noise levels fall')
    if cfg.nfe > len(cfg.ts): stop(f'--nfe {cfg.nfe} needs as many noise levels in --ts {cfg.ts}')
    if cfg.label >= cfg.classes * cfg.cond: stop(f'--label {cfg.label}: there is no such class')
    if cfg.save and save.is_dir(): stop(f'--save {save}: that folder is there already')
    if save.suffix not in ('', '.npz'): stop(f'--save {save}: an .npz, or a folder without a dot in its name')
    if Path(cfg.out).is_file(): stop(f'--out {cfg.out}: that is a file')


def process(local, cfg):
    """One process of a run, the one numbered local on its machine."""
    sys.stdout.reconfigure(errors='replace')                    # a console may lack the letters of a name
    rank, world = int(os.environ['RANK']) if dist.is_torchelastic_launched() else local, cfg.gpus
    device = torch.device('cuda', local) if cfg.device == 'cuda' else torch.device('cpu')
    if cfg.device == 'cuda':
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = cfg.amp == 'off'       # on an H100 1.5 times as fast, else no gain
        torch.backends.cudnn.allow_tf32 = cfg.amp != 'off'
        torch.set_float32_matmul_precision('highest' if cfg.amp == 'off' else 'high')
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    elif world > 1: torch.set_num_threads(max(1, os.cpu_count() // world))
    if world > 1:
        dist.init_process_group('nccl' if cfg.device == 'cuda' else 'gloo', rank=rank, world_size=world)
    if cfg.sample: write_samples(cfg, rank, world, device)
    else: train(cfg, load_data(cfg), rank, world, device)
    if world > 1: dist.destroy_process_group()


def main(argv=None):
    try:
        cfg = config(argv)
        if dist.is_torchelastic_launched(): process(int(os.environ['LOCAL_RANK']), cfg)
        elif cfg.gpus == 1: process(0, cfg)
        else:
            if not cfg.sample: load_data(cfg)                   # what is to be downloaded is, once
            if '://' in cfg.init: fetch(cfg.init)
            os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(10_000 + os.getpid() % 20_000))
            mp.spawn(process, (cfg,), cfg.gpus, daemon=True)
    except KeyboardInterrupt: stop('interrupted; the same command goes on from the last checkpoint', 130)
    except mp.ProcessExitedException as error:
        if error.exit_code > 0: sys.exit(error.exit_code)       # it has said why
        stop(error, 1)


if __name__ == '__main__':
    main()
