# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "scipy"]
# ///
"""
tcm.py  Truncated consistency models (Lee et al. 2024, arXiv:2410.14895).

Stage 1 is ECT (ect.py). Stage 2 trains f(x_t, t) only on the truncated range t >= t', t' = t_transition, by

    min E  w(t, r) d( f(x_t, t), stopgrad f(x_r, r) )  +  w_boundary E  w(t', r) d( f(x_t', t'), f_1(x_r, r) ),

where f(x_r, r) is the frozen stage-1 network f_1 wherever r < t', so that the student need not learn to denoise there.
x_t = x + t z, x_r = x + r z; d is the L2 norm over the image, smoothed by c (pseudo-Huber). r = t - t (1 - ratio) n(t),
n(t) = 1 + k sigmoid(-b t), ratio = min(1 - q^-a, ratio_limit) in the a-th period of d steps, counted over both stages.
t is the standard deviation of the noise, in units of images in [-1, 1].

    python tcm.py                                   # embedded digits: diffusion warm-up, both stages, pictures
    python tcm.py --data cifar10 --gpus 8           # the paper's CIFAR-10 recipe, from EDM's checkpoint
    python tcm.py --out runs/tcm-cifar10 --sample 50000 --nfe 2 --save samples.npz

Differs from ect.py only in: t truncated to [t_min, t_max], the limit on ratio, r >= 1e-6 (stage 1); the frozen network,
boundary samples and a truncated Student-t for ln t (stage 2); the stages' batches and learning rates; the gradient
limit and, on ImageNet-64, the EMA.

Sources: the paper, and its code NVlabs/TCM (b132239). Where they leave a choice or we differ:
- As in the code, all targets with r < t' come from f_1, not those of boundary samples alone, and f_1 keeps its dropout,
  with the student's mask.
- Each sample is at the boundary with probability boundary_prob (the code: a fixed share of each GPU's batch), and the
  two means are written as weights 1 / (1 - p) and w_boundary / p. So the result does not depend on the batch's split.
- The lengths of the stages are ours: the code's are upper bounds (3M and 800k steps).
- The ImageNet-64 recipe uses a DDPM++ of about EDM2-S's size from scratch, not EDM2's network and checkpoint.
- The diffusion warm-up for runs without a checkpoint is EDM's loss: lengths and learning rates are ours.
"""
import argparse, contextlib, copy, csv, functools, hashlib, io, json, math, os, pickle, signal, socket, sys
import tarfile, time, warnings, zipfile, zlib
from collections import Counter, OrderedDict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn             # imported after a group exists, it would keep that alive until exit
import torch.multiprocessing as mp
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import special
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, grid_sample, affine_grid, avg_pool2d, one_hot, silu

# ------------------------------------------------------------------------------------------------------ config

EDM = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl'

CONFIG = dict(                          # knob = (the CIFAR-10 recipe, meaning [source])
    steps=(500_000, 'optimiser steps in all, warm-up and stage 1 included [ours]'),
    warmup=(0, 'steps of diffusion training (EDM loss) before'),
    stage1=(250_000, 'steps of stage 1 [ours]'),
    batch=(1024, 'images per step over all processes in stage 2 [README]'),
    batch_stage1=(0.5, 'images per step before stage 2, as a multiple of batch [README: 512]'),
    lr=(5e-5, 'learning rate of stage 2 [README]'),
    lr_stage1=(1e-4, 'learning rate of stage 1 [README]'),
    lr_warmup=(5e-4, 'learning rate of the diffusion warm-up'),
    opt=('RAdam', 'optimiser [README]', 'RAdam', 'Adam'),
    beta2=(0.999, 'second moment decay of the optimiser'),
    t_ref=(0, 'lr / sqrt(max(step / t_ref, 1)) in stage 2; 0: constant lr'),
    t_ref_stage1=(0, 'the same in stage 1'),
    anneal=(0, '1: the learning rate falls linearly to 0 in each stage'),
    ema=(0.9999, 'decay of the averaged weights used for sampling [README]'),
    ema_gamma=(0.0, 'decay (1 - 1/step)^(ema_gamma + 1) instead of ema; 0: ema'),
    clip=(1e6, 'gradient norm limit [ct_training_loop.py]'),
    P_mean=(-1.1, 'stage 1: ln t ~ N(P_mean, P_std^2) on [t_min, t_max] [loss.py]'),
    P_std=(2.0, ''),
    t_min=(0.002, 'smallest t [loss.py]'),
    t_max=(80.0, 'largest t'),
    q=(2.0, 'ratio = 1 - q^-a in period a [README]'),
    d=(25_000, 'steps per period [README: double_iter]'),
    ratio_limit=(0.999, 'upper limit of ratio [README]'),
    k=(8.0, 'n(t) = 1 + k sigmoid(-b t) [loss.py]'),
    b=(1.0, ''),
    c=(1e-8, 'pseudo-Huber constant [README]'),
    weight=('1/(t-r)', 'w(t, r); 1/c_out^2 = 1/t^2 + 1/sigma_d^2', '1/(t-r)', '1/c_out^2'),
    t_transition=(1.0, "t', the lower end of stage 2 [README]"),
    boundary_prob=(0.25, "probability of t = t' in stage 2 [README]"),
    w_boundary=(0.1, 'weight of the boundary loss [README]'),
    mu=(0.0, "stage 2: (ln t - mu) / sigma is Student-t with nu degrees of freedom, on [t', t_max] [README]"),
    sigma=(0.2, ''),
    nu=(0.01, ''),
    ts=('80,0.821', 'noise levels of the sampler, largest first; --nfe K uses the first K'),
    init=('none', 'starting weights: none, a checkpoint of ours, or an EDM .pkl by path or URL'),
    res=(0, 'image side; 0: that of the data; given: centre-crop and resize to it'),
    flip=(0, '1: random horizontal flips'),
    cond=(0, '1: class-conditional'),
    classes=(10, 'classes of a conditional network (counted in the data)'),
    arch=('ddpmpp', 'EDM network', 'ddpmpp', 'ncsnpp'),
    fourier=(16.0, 'scale of the Fourier time embedding of ncsnpp'),
    ch=(128, 'channels at full resolution'),
    mult=('2,2,2', 'channel multipliers, full resolution first'),
    blocks=(4, 'residual blocks per resolution'),
    attn=('16', 'resolutions with attention'),
    head_dim=(0, 'channels per attention head; 0: one head'),
    dropout=(0.2, 'dropout rate, the same mask for f(x_t, t) and its target [run_ecm.sh]'),
    seed=(0, 'every random number is a function of (seed, step)'),
    save_every=(10_000, 'steps between checkpoints and sample grids'),
    log_every=(100, 'steps between status lines'),
)
PRESET = dict(                          # what each --data changes
    glyphs=dict(steps=6100, warmup=2800, stage1=2000, batch=32, batch_stage1=1.0, lr=1.2e-3, lr_stage1=1.2e-3,
                lr_warmup=2e-3, anneal=1, ema=0.998, P_mean=0.0, P_std=1.3, t_max=20.0, d=300, c=0.03,
                weight='1/c_out^2', mu=0.9, sigma=0.7, nu=1.0, ts='20,1',
                ch=32, mult='1,1,2', blocks=1, attn='8', dropout=0.0, save_every=1000, log_every=50),
    cifar10=dict(init=EDM, warmup=200_000),
    imagenet64=dict(steps=200_000, warmup=50_000, stage1=50_000, batch=1024, batch_stage1=2.0, lr=5e-4, lr_stage1=1e-3,
                    lr_warmup=1e-3, opt='Adam', beta2=0.99, t_ref=8000, t_ref_stage1=2000, ema_gamma=16.97,
                    P_mean=-0.8, P_std=1.6, q=4.0, d=10_000, ratio_limit=0.9961, c=0.06, weight='1/c_out^2',
                    ts='80,1.526', cond=1, classes=1000, ch=192, mult='1,2,3,4', blocks=3, attn='16,8', head_dim=64,
                    dropout=0.4, save_every=5000),
)
FLAGS = dict(                           # how to run; the same in every script
    data=('glyphs', 'glyphs, cifar10, imagenet64, or a folder, .zip, .npz, .npy, or CIFAR binary .tar.gz'),
    out=('', 'run folder [runs/<method>-<data>]'),
    gpus=(1, 'processes, one per GPU'),
    device=('auto', 'cpu leaves the GPUs alone', 'auto', 'cpu'),
    micro=(0, 'most images one process holds at once; 0: its whole share'),
    amp=('auto', 'auto is fp16 on a GPU, off on the CPU', 'auto', 'off', 'fp16', 'bf16'),
    compile=(False, 'torch.compile the network'),
    sample=(0, 'write this many samples of the run in --out and stop'),
    nfe=(1, 'network evaluations per sample'),
    save=('', 'where the samples go: an .npz, or a folder of PNG [<out>/samples.npz]'),
    label=(-1, 'class of all samples; -1: all classes equally'),
)
SIDE = dict(glyphs=16, cifar10=32, imagenet64=64)
METHOD = Path(__file__).stem


def stop(message, code=2):
    """One line on stderr (from the first process only) and the exit code: 2 for bad input, 1 for a failed run."""
    if os.environ.get('RANK', '0') == '0': print(f'{METHOD}.py:', *str(message).split(), file=sys.stderr, flush=True)
    sys.exit(code)


def numbers(text):
    """'80,0.821' -> [80.0, 0.821]"""
    try: return [float(word) for word in text.split(',')]
    except ValueError: stop(f'"{text}" is not a list of numbers like 80,0.821')


def config(argv=None):
    """Knobs and flags as a Namespace: CONFIG, then PRESET of --data (a path: of its image size, from scratch), or the
    config of the checkpoint in --out; then argv. Bad values end the program."""
    parser = argparse.ArgumentParser(f'{METHOD}.py', allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: stop(f'{message}; see --help')
    for name, (value, text, *choices) in {**FLAGS, **CONFIG}.items():
        how = dict(action='store_true') if value is False else dict(type=type(value), choices=choices or None)
        parser.add_argument(f'--{name}', help=f'{text} [{value}]', **how)
    given = vars(parser.parse_args(argv))
    cfg = {name: spec[0] for name, spec in {**FLAGS, **CONFIG}.items()} | given
    cfg['out'] = cfg['out'] or f'runs/{METHOD}-{Path(cfg["data"]).name.split(".")[0]}'
    saved = read_checkpoint(cfg['out'])
    if saved: cfg |= saved['config'] | given
    elif cfg['sample']: stop(f'no checkpoint in {cfg["out"]}: train first, or name the run with --out')
    else:
        recipe, side = cfg['data'], cfg['res'] or SIDE.get(cfg['data'])
        if recipe not in SIDE:
            images, labels = read(cfg['data'], cfg['res'])
            side = images.shape[-1]
            recipe = min(SIDE, key=lambda name: abs(math.log(SIDE[name] / side)))
        cfg |= PRESET[recipe]
        if recipe != cfg['data']: cfg |= dict(init='none', cond=cfg['cond'] and int(labels is not None))
        cfg |= given | dict(res=side, resize='res' in given)
        if cfg['init'] == 'none': cfg['init'] = cfg.get('teacher', 'none')     # distillation starts from its teacher
        if cfg['init'] != 'none': cfg['warmup'] = given.get('warmup', 0)       # the checkpoint is the diffusion model
    for name in 'steps batch lr lr_warmup ch blocks save_every log_every nfe gpus res'.split():
        if cfg.get(name, 1) <= 0: stop(f'--{name} must be positive, not {cfg[name]}')
    for name in 'ema dropout'.split():
        if not 0 <= cfg[name] < 1: stop(f'--{name} must be in [0, 1), not {cfg[name]}')
    halvings = len(numbers(cfg['mult'])) - 1
    if cfg['res'] % 2**halvings: stop(f'side {cfg["res"]} cannot be halved {halvings} times: change --res or --mult')
    if len(numbers(cfg['ts'])) < cfg['nfe']: stop(f'--nfe {cfg["nfe"]} needs as many noise levels, --ts is {cfg["ts"]}')
    if cfg['label'] >= cfg['classes'] * cfg['cond']: stop(f'--label {cfg["label"]}: the network has no such class')
    return argparse.Namespace(**cfg)

# ------------------------------------------------------------------------------------------------------ method

SD = 0.5                                # sigma_d, the standard deviation of the data


def f(net, x, t, labels=None):
    """Consistency function: x (B, 3, H, W) at noise level t (B,) or (B, 1, 1, 1) -> estimate of x_0, like x.

    EDM's preconditioning [Karras et al. 2022, Table 1], so f(x, 0) = x; net is the raw network F."""
    t = t.to(x).view(-1, 1, 1, 1)
    c_skip, c_out, c_in = SD**2 / (t**2 + SD**2), t * SD / (t**2 + SD**2).sqrt(), 1 / (t**2 + SD**2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t.flatten().log() / 4, labels)


class Loss(nn.Module):
    """The objectives at the top of this file; self.teacher is f_1. data is unused."""

    def __init__(self, net, cfg, data):
        super().__init__()
        self.net, self.cfg, self.teacher = net, cfg, frozen(net)
        self.stage2 = cfg.warmup + cfg.stage1

    def phase(self, step):
        """-> name, first step, learning rate, images per step. A phase starts from the EMA weights of the last one."""
        cfg, early = self.cfg, max(1, round(self.cfg.batch * self.cfg.batch_stage1))
        if step < cfg.warmup: return 'diffusion', 0, cfg.lr_warmup, early
        lr, t_ref = (cfg.lr, cfg.t_ref) if step >= self.stage2 else (cfg.lr_stage1, cfg.t_ref_stage1)
        if t_ref: lr /= max((step - cfg.warmup) / t_ref, 1)**0.5
        first, end = (self.stage2, cfg.steps) if step >= self.stage2 else (cfg.warmup, self.stage2)
        if cfg.anneal: lr *= (end - step) / (end - first)
        return ('stage 2', first, lr, cfg.batch) if step >= self.stage2 else ('stage 1', first, lr, early)

    def begin(self, ema):
        """Called as a phase begins."""
        self.net.load_state_dict(ema.state_dict())
        self.teacher.load_state_dict(ema.state_dict())

    def averages(self, ema, step):
        """-> [(network that follows self.net, decay)], called after each step."""
        power = (1 - 1 / (step + 1))**(self.cfg.ema_gamma + 1)
        return [(ema, power if self.cfg.ema_gamma else self.cfg.ema)]

    def levels(self, u, step):
        """u uniform (B,) -> noise levels t > r (B,), float64. In the warm-up r = 0, ln t ~ N(-1.2, 1.2^2) as EDM.
        In stage 2 u < boundary_prob gives t = t'."""
        cfg, u = self.cfg, u.double()
        if step < cfg.warmup: return torch.exp(-1.2 + 1.2 * torch.special.ndtri(u)), torch.zeros_like(u)
        if step < self.stage2:
            low, high = special.ndtr((np.log([cfg.t_min, cfg.t_max]) - cfg.P_mean) / cfg.P_std)
            t = torch.exp(cfg.P_mean + cfg.P_std * torch.special.ndtri(low + (high - low) * u))
        else:
            ends = np.log([cfg.t_transition, cfg.t_max])
            low, high = special.stdtr(cfg.nu, (ends - cfg.mu) / cfg.sigma)
            rest = ((u - cfg.boundary_prob) / (1 - cfg.boundary_prob)).clamp(min=0)     # uniform again, or 0 for t'
            quantile = torch.from_numpy(special.stdtrit(cfg.nu, (low + (high - low) * rest).cpu().numpy())).to(u.device)
            t = torch.exp(cfg.mu + cfg.sigma * quantile).clamp(cfg.t_transition, cfg.t_max)
        ratio = min(1 - cfg.q**-((step - cfg.warmup) // cfg.d + 1), cfg.ratio_limit)
        return t, (t - t * (1 - ratio) * (1 + cfg.k * torch.sigmoid(-cfg.b * t))).clamp(min=1e-6)

    def pair(self, x, labels, z, t, r, step):
        """Weighted distance of f(x_t, t) and its target at r -> (B,), before the weight of the boundary loss."""
        w = self.weight(t, r, step).to(x, non_blocking=True)    # from float64: t - r may be t / 1000
        t, r = (v.to(x, non_blocking=True).view(-1, 1, 1, 1) for v in (t, r))
        x_t, x_r = x + t * z, x + r * z
        if step < self.cfg.warmup: return w * (f(self.net, x_t, t, labels) - x).square().mean((1, 2, 3))
        with torch.no_grad():
            with same_dropout(x): target = f(self.net, x_r, r, labels)
            if step >= self.stage2:
                with same_dropout(x): boundary = f(self.teacher, x_r, r, labels)
                target = torch.where(r < self.cfg.t_transition, boundary, target)
        distance = torch.linalg.vector_norm(f(self.net, x_t, t, labels) - target, dim=(1, 2, 3))
        if self.cfg.c: distance = (distance**2 + self.cfg.c**2).sqrt() - self.cfg.c
        return w * distance

    def weight(self, t, r, step):
        """w(t, r) (B,): 1/(t - r), or 1/c_out^2, EDM's weight, also of the warm-up."""
        if step >= self.cfg.warmup and self.cfg.weight == '1/(t-r)': return 1 / (t - r)
        return (t**2 + SD**2) / (t * SD)**2

    def forward(self, x, labels, u, z, step):
        """x (B, 3, H, W) in [-1, 1], labels (B,) or None, u uniform (B,), z normal like x -> loss per sample (B,)."""
        t, r = self.levels(u, step)
        loss, p = self.pair(x, labels, z, t, r, step), self.cfg.boundary_prob
        if step < self.stage2: return loss
        return loss * torch.where(u < p, self.cfg.w_boundary / (p or 1), 1 / (1 - p)).to(x, non_blocking=True)


def frozen(net):
    """A copy of the network that does not train; a plain function stands for itself."""
    return copy.deepcopy(net).requires_grad_(False) if isinstance(net, nn.Module) else net


@contextlib.contextmanager
def same_dropout(x):
    """The next forward pass on x's device draws the dropout masks that were drawn inside."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []): yield


@torch.no_grad()
def sample(net, z, ts, labels=None, noise=None):
    """Standard normal z (B, 3, H, W) -> images in about [-1, 1]: one network evaluation for each noise level in ts."""
    x = f(net, ts[0] * z, torch.full((len(z),), ts[0]), labels)
    for i, t in enumerate(ts[1:]):
        x = x + t * (torch.randn_like(z) if noise is None else noise[i])
        x = f(net, x, torch.full((len(z),), t), labels)
    return x

# ----------------------------------------------------------------------------------------------------- network

def init(layer, gain=1.0):
    """EDM's initialisation: Xavier-uniform weights times gain, zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def norm(ch): return nn.GroupNorm(math.gcd(min(32, ch // 4), ch), ch, eps=1e-6)


def resample(x, taps, up, pad):
    """Up or down by two with the separable low-pass filter whose taps (of sum 1) are given."""
    kernel, conv = (4 * taps.outer(taps), conv_transpose2d) if up else (taps.outer(taps), conv2d)
    return conv(x, kernel.expand(x.shape[1], 1, -1, -1), stride=2, padding=pad, groups=x.shape[1])


class Block(nn.Module):
    """EDM's residual block with optional resampling (turn 'up' or 'down') and self-attention."""

    def __init__(self, cin, cout, emb, dropout, heads, turn, taps):
        super().__init__()
        self.cin, self.heads, self.turn = cin, heads, turn
        self.register_buffer('taps', torch.tensor(taps) / sum(taps), persistent=False)
        self.norm0 = norm(cin)
        self.conv0 = init(nn.Conv2d(cin, cout, 3, padding=1))
        self.affine = init(nn.Linear(emb, cout))
        self.norm1 = norm(cout)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = init(nn.Conv2d(cout, cout, 3, padding=1), 1e-5)
        self.skip = init(nn.Conv2d(cin, cout, 1)) if cin != cout or turn else nn.Identity()
        if heads:
            self.norm2 = norm(cout)
            self.qkv = init(nn.Conv2d(cout, 3 * cout, 1), 0.2**0.5)
            self.proj = init(nn.Conv2d(cout, cout, 1), 1e-5)

    def forward(self, x, e):
        h = silu(self.norm0(x))
        if self.turn: h, x = (resample(v, self.taps, self.turn == 'up', (len(self.taps) - 1) // 2) for v in (h, x))
        h = self.conv0(h) + self.affine(e)[:, :, None, None]
        h = self.conv1(self.dropout(silu(self.norm1(h))))
        x = (h + self.skip(x)) * 0.5**0.5
        if self.heads:                  # explicit softmax: the fused kernels have no forward-mode derivative
            B, C, H, W = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(B * self.heads, C // self.heads, 3, H * W).unbind(2)
            w = torch.einsum('bcq,bck->bqk', q, k / (C // self.heads)**0.5).softmax(-1)
            x = (self.proj(torch.einsum('bqk,bck->bcq', w, v).reshape(B, C, H, W)) + x) * 0.5**0.5
        return x


class Residual(nn.Conv2d):
    """NCSN++'s second input: the image, then this layer's own output, halved and added to the features."""

    def __init__(self, cin, cout, taps):
        super().__init__(cin, cout, 3, padding=2)               # the filter has no padding of its own
        self.register_buffer('taps', torch.tensor(taps) / sum(taps), persistent=False)

    def forward(self, aux, x):
        return (x + resample(super().forward(aux), self.taps, False, 0)) * 0.5**0.5


class UNet(nn.Module):
    """EDM's DDPM++ or NCSN++ [Song et al. 2021; EDM networks.py SongUNet] without augmentation input:
    (x (B, 3, H, W), c_noise (B,), labels (B,) or None) -> (B, 3, H, W). cfg: arch ch mult blocks attn head_dim ...
    Parameters stand in the order of EDM's, so its weights load by position."""

    def __init__(self, cfg):
        super().__init__()
        ncsnpp, taps = cfg.arch == 'ncsnpp', (1, 3, 3, 1) if cfg.arch == 'ncsnpp' else (1, 1)
        half, emb = cfg.ch if ncsnpp else cfg.ch // 2, 4 * cfg.ch
        self.scale = 2 * math.pi if ncsnpp else 1.0
        freqs = torch.randn(half) * cfg.fourier if ncsnpp else 1e4 ** (-torch.arange(half) / (half - 1))
        self.register_buffer('freqs', freqs, persistent=ncsnpp)
        self.classes = cfg.classes if cfg.cond else 0
        if self.classes: self.map_label = init(nn.Linear(self.classes, 2 * half))
        self.map0, self.map1 = init(nn.Linear(2 * half, emb)), init(nn.Linear(emb, emb))

        def block(cin, cout, attention=False, turn=None):
            heads = attention and (max(1, cout // cfg.head_dim) if cfg.head_dim else 1)
            return Block(cin, cout, emb, cfg.dropout, heads, turn, taps)

        widths = [cfg.ch * int(m) for m in numbers(cfg.mult)]
        attn = [cfg.res >> level in numbers(cfg.attn) for level in range(len(widths))]
        self.enc, self.dec = nn.ModuleList([init(nn.Conv2d(3, cfg.ch, 3, padding=1))]), nn.ModuleList()
        skips, ch, aux = [cfg.ch], cfg.ch, 3
        for level, width in enumerate(widths):
            if level:
                self.enc.append(block(ch, ch, turn='down'))
                if ncsnpp: self.enc.append(init(Residual(aux, ch, taps))); aux = ch
                skips.append(ch)
            for _ in range(cfg.blocks):
                self.enc.append(block(ch, width, attn[level]))
                ch = width
                skips.append(ch)
        for level, width in reversed(list(enumerate(widths))):
            if level == len(widths) - 1: self.dec += [block(ch, ch, True), block(ch, ch)]
            else: self.dec.append(block(ch, ch, turn='up'))
            for i in range(cfg.blocks + 1):
                self.dec.append(block(ch + skips.pop(), width, i == cfg.blocks and attn[level]))
                ch = width
        self.norm, self.out = norm(ch), init(nn.Conv2d(ch, 3, 3, padding=1), 1e-5)

    def forward(self, x, c_noise, labels=None):
        with torch.autocast(x.device.type, enabled=False):     # the embedding stays in float32
            a = torch.outer(c_noise.to(x), self.scale * self.freqs)
            e = torch.cat([a.sin(), a.cos()], 1)
            if self.classes: e = e + self.map_label(one_hot(labels, self.classes).to(x) * self.classes**0.5)
            e = silu(self.map1(silu(self.map0(e))))
        skips, aux = [], x
        for layer in self.enc:
            if isinstance(layer, Residual): x = skips[-1] = aux = layer(aux, x)
            else:
                x = layer(x, e) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        for layer in self.dec:
            if layer.cin != x.shape[1]: x = torch.cat([x, skips.pop()], 1)
            x = layer(x, e)
        return self.out(silu(self.norm(x))).to(a.dtype)

# ------------------------------------------------------------------------------------------------ EDM's pickles

class Record:
    """Stands in for every object of an EDM pickle: holds its state, has no behaviour."""

    def __init__(self, state=None): self.__dict__.update(state or {})
    __setstate__ = __init__


class EDMUnpickler(pickle.Unpickler):
    """Reads the tensors and settings of an EDM .pkl (layout: its torch_utils/persistence.py) and runs none of the
    source text in it. A name that is not on this list is an error."""

    KNOWN = {
        'torch_utils.persistence._reconstruct_persistent_obj': Record,
        'torch.nn.modules.container.ModuleDict': Record,
        'dnnlib.util.EasyDict': dict,
        'collections.OrderedDict': OrderedDict,
        'builtins.set': set,
        'torch._utils._rebuild_parameter': lambda data, requires_grad, hooks: data,
        'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
        'torch.storage._load_from_bytes': lambda b: torch.load(io.BytesIO(b), map_location='cpu', weights_only=True),
        'numpy.dtype': np.dtype,
        'numpy.core.multiarray.scalar': lambda dtype, data: np.frombuffer(data, dtype)[0],
        'numpy._core.multiarray.scalar': lambda dtype, data: np.frombuffer(data, dtype)[0],
    }

    def find_class(self, module, name):
        if f'{module}.{name}' in self.KNOWN: return self.KNOWN[f'{module}.{name}']
        raise pickle.UnpicklingError(f'it names {module}.{name}, which no EDM network needs')


def load_edm(path_or_url):
    """An EDM .pkl -> UNet with its `ema` weights, of the shape found in it (as knobs in net.shape). The augmentation
    input is left out: the zeros it gets in use add nothing."""
    path = fetch(path_or_url) if '://' in str(path_or_url) else path_or_url
    try:
        with open(path, 'rb') as file: song = EDMUnpickler(file).load()['ema'].state['_modules']['model']
        args = dict(model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, attn_resolutions=[16], label_dim=0,
                    embedding_type='positional', encoder_type='standard', decoder_type='standard', dropout=0.1)
        args |= song.state['_init_kwargs']
        kind = (song.class_name, args['embedding_type'], args['encoder_type'], args['decoder_type'])
        arch = {('SongUNet', 'positional', 'standard', 'standard'): 'ddpmpp',
                ('SongUNet', 'fourier', 'residual', 'standard'): 'ncsnpp'}[kind]
        shape = dict(res=args['img_resolution'], arch=arch, ch=args['model_channels'], blocks=args['num_blocks'],
                     mult=','.join(map(str, args['channel_mult'])), attn=','.join(map(str, args['attn_resolutions'])),
                     head_dim=0, cond=int(args['label_dim'] > 0), classes=args['label_dim'])
        net = UNet(argparse.Namespace(**shape, fourier=16.0, dropout=args['dropout']))

        def tensors(state):             # depth first, as in state_dict()
            for group in ('_parameters', '_buffers'):
                yield from (v for name, v in state[group].items() if v is not None and name != 'resample_filter')
            for name, module in state['_modules'].items():
                if name != 'map_augment': yield from tensors(vars(module).get('state', vars(module)))

        net.load_state_dict(dict(zip(net.state_dict(), tensors(song.state), strict=True)))
    except (OSError, EOFError, LookupError, AttributeError, TypeError, ValueError, RuntimeError,
            pickle.UnpicklingError) as error:
        stop(f'{path} is no DDPM++ or NCSN++ pickle of EDM: {type(error).__name__} {error}')
    net.shape = shape
    return net


def fetch(url, sha256=None):
    """Path of the file at url: in ./datasets or torch.hub's cache, or downloaded there; sha256 is checked always."""
    name, cache = url.rsplit('/', 1)[1], Path(torch.hub.get_dir(), 'checkpoints')
    path = next((p for p in (Path('datasets', name), cache / name) if p.exists()), cache / name)
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            print(f'fetching {url} to {path}', flush=True)
            torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error: stop(f'cannot fetch {url} ({error}): put it at datasets/{name}')
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        stop(f'{path} is damaged, its sha256 is not {sha256}: delete it and start again')
    return path

# -------------------------------------------------------------------------------------------------------- data

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


def read_pictures(path):
    """A folder or zip of pictures, sorted by name, with EDM's dataset.json if there -> number, iterator of (name, RGB
    Image), labels or None. Grey and palette pictures become RGB, transparent parts white; it says so."""
    archive = None if path.is_dir() else zipfile.ZipFile(path)
    files = archive.namelist() if archive else [p.relative_to(path).as_posix() for p in path.rglob('*')]
    content = archive.read if archive else lambda name: (path / name).read_bytes()
    kinds = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm')
    names = sorted(n for n in files if n.lower().endswith(kinds) and n[:8] != '__MACOSX' and Path(n).name[0] != '.')
    classes = dict(json.loads(content('dataset.json'))['labels'] or []) if 'dataset.json' in files else {}
    if not names: stop(f'{path} holds no pictures ({" ".join(kinds)})')

    def pictures():
        converted = Counter()
        for name in names:
            image = Image.open(io.BytesIO(content(name)))
            if image.mode not in ('RGB', '1', 'L', 'P', 'LA', 'PA', 'RGBA'):
                stop(f'{path}/{name} is a {image.mode} picture: convert it to 8-bit RGB')
            if image.mode != 'RGB':
                converted[image.mode] += 1
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            yield f'{path}/{name}', image.convert('RGB')
        for mode, count in converted.items(): print(f'{path}: {count} pictures of mode {mode} converted to RGB')

    return len(names), pictures(), np.array([classes[n] for n in names]) if classes else None


def read_arrays(path):
    """.npy, .npz or CIFAR's binary tarball -> number, iterator of (name, RGB Image), labels or None"""
    if path.suffix == '.npy': images, labels = np.load(path, allow_pickle=False), None
    elif path.suffix == '.npz':
        arrays = np.load(path, allow_pickle=False)
        images = next(arrays[k] for k in ['images', 'arr_0', 'samples', *arrays] if k in arrays)
        labels = next((arrays[k] for k in ('labels', 'arr_1') if k in arrays), None)
    else:
        with tarfile.open(path) as archive:
            batches = sorted((m for m in archive if Path(m.name).match('data_batch_*.bin')), key=lambda m: m.name)
            if not batches: stop(f'{path} holds no data_batch_*.bin: take the binary version of CIFAR-10')
            rows = np.frombuffer(b''.join(archive.extractfile(m).read() for m in batches), np.uint8).reshape(-1, 3073)
        images, labels = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
    if images.ndim == 3: images = images[..., None]
    if images.ndim == 4 and images.shape[3] not in (1, 3): images = images.transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        stop(f'{path} holds {images.dtype} {images.shape}, not uint8 images (N, H, W, 3) or (N, 3, H, W)')
    if images.shape[3] == 1: print(f'{path}: grey images repeated to 3 channels')
    pictures = ((f'{path}[{i}]', Image.fromarray(a.repeat(3 // a.shape[2], 2))) for i, a in enumerate(images))
    return len(images), pictures, labels


@functools.lru_cache(1)
def read(path, res):
    """A folder, .zip, .npz, .npy or CIFAR .tar.gz -> images uint8 (N, 3, H, W), labels int64 (N,) or None.
    The images must be squares of one size; with res > 0 they are centre-cropped and resized to it."""
    path = Path(path)
    if not path.exists(): stop(f'there is no {path}: --data is glyphs, cifar10, imagenet64 or a path')
    if not (path.is_dir() or path.name.lower().endswith(('.zip', '.npz', '.npy', '.tar.gz', '.tgz'))):
        stop(f'{path} is no folder, .zip, .npz, .npy or .tar.gz')
    try:
        count, pictures, labels = (read_pictures if path.is_dir() or path.suffix == '.zip' else read_arrays)(path)
        images = np.empty((0, 0, 0, 3), np.uint8)
        for i, (name, image) in enumerate(pictures):
            if res and image.size != (res, res): image = ImageOps.fit(image, (res, res), Image.LANCZOS)
            if not i: images = np.empty((count, image.height, image.width, 3), np.uint8)
            if image.size != images.shape[2:0:-1] or image.width != image.height:
                stop(f'{name} is {image.width} x {image.height}, the first is {images.shape[2]} x {images.shape[1]}: '
                     'they must be squares of one size; --res N centre-crops and resizes them')
            images[i] = image
        labels = None if labels is None else torch.from_numpy(labels.astype(np.int64).reshape(count))
    except (OSError, ValueError, EOFError, KeyError, StopIteration, Image.DecompressionBombError, tarfile.TarError,
            zipfile.BadZipFile, zlib.error) as error:
        stop(f'{path} cannot be read: {type(error).__name__} {error}')
    if not count: stop(f'{path} holds no images')
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), labels


def load_data(cfg):
    """-> images uint8 (N, 3, H, W), labels int64 (N,) or None (None if cfg.cond is 0)"""
    path = cfg.data
    if path == 'cifar10': path = fetch('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
                                       'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd')
    if path == 'imagenet64': path = 'datasets/imagenet-64x64.zip'       # written by EDM's dataset_tool.py
    images, labels = glyphs(cfg.res) if path == 'glyphs' else read(str(path), cfg.res if cfg.resize else 0)
    if cfg.cond and labels is None: stop(f'{path} has no labels (dataset.json, or labels in the .npz): use --cond 0')
    return images, labels if cfg.cond else None

# ---------------------------------------------------------------------------------------------------- training

def seed_of(cfg, stream, i):
    """Seed of the random numbers of step (or image) i. Streams: 0 samples, 1 and 2 training, 3 + rank dropout."""
    return (1000 * cfg.seed + stream) * 100_000_007 + i


def draw(cfg, n, batch, step, device):
    """Everything random in a step but dropout, for the whole batch and whatever the processes: image numbers, u, flips
    (on the host), z (on the device)."""
    host = torch.Generator().manual_seed(seed_of(cfg, 1, step))
    here = torch.Generator(device).manual_seed(seed_of(cfg, 2, step))
    index, u = torch.randint(n, (batch,), generator=host), torch.rand(batch, generator=host, dtype=torch.float64)
    flips = torch.rand(batch, generator=host) < 0.5 * cfg.flip
    return index, u, flips, torch.randn(batch, 3, cfg.res, cfg.res, generator=here, device=device)


def load_checkpoint(path):
    """A checkpoint of any of the scripts as a dict (method, step, config, loss, ema, opt, scaler), or None."""
    try: return torch.load(path, map_location='cpu', weights_only=True) if Path(path).exists() else None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        stop(f'{path} is damaged or no checkpoint: {str(error)[:200]}')


def read_checkpoint(out):
    """The checkpoint of the run folder, which must be this script's."""
    saved = load_checkpoint(Path(out, 'latest.pt'))
    if saved and saved['method'] != METHOD: stop(f'{out} is a run of {saved["method"]}.py: give another --out')
    return saved


def write(path, writer):
    """The whole file or nothing: writer fills a temporary file, which then takes path's place."""
    part = Path(f'{path}.part')
    try:
        with open(part, 'wb') as file: writer(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        stop(f'cannot write {path}: {error}', 1)


def new_network(cfg):
    """A fresh UNet, or the one that --init names, whose shape then enters cfg."""
    torch.manual_seed(cfg.seed)
    if cfg.init == 'none': return UNet(cfg)
    if cfg.init.endswith('.pkl'):
        donor = load_edm(cfg.init)
        shape, state = donor.shape, donor.state_dict()
    else:
        donor = load_checkpoint(cfg.init) or stop(f'--init: there is no {cfg.init}')
        shape = {k: donor['config'][k] for k in 'res arch ch mult blocks attn head_dim cond classes'.split()}
        state = donor['ema']
    for name in ('res', 'cond', 'classes')[:2 + cfg.cond]:
        here = getattr(cfg, name)
        if shape[name] != here: stop(f'--init {cfg.init} has {name} {shape[name]}, this run has {here}')
    vars(cfg).update(shape, classes=cfg.classes)
    net = UNet(cfg)
    net.load_state_dict(state)
    return net


def precision(cfg, device):
    """-> off, fp16 or bf16, and a maker of autocast contexts. auto: off on the CPU, fp16 on a GPU, since two nearby
    outputs are subtracted and it keeps three more bits than bf16."""
    amp = cfg.amp if cfg.amp != 'auto' else 'fp16' if device.type == 'cuda' else 'off'
    dtype = torch.bfloat16 if amp == 'bf16' else torch.float16
    return amp, lambda: torch.autocast(device.type, dtype, enabled=amp != 'off')


def train(cfg, data, rank, world, device):
    """Every phase of the run in cfg.out, from its checkpoint if there is one."""
    out, (images, labels), saved = Path(cfg.out), data, read_checkpoint(cfg.out)
    if cfg.cond: cfg.classes = int(labels.max()) + 1
    net = (UNet(cfg) if saved else new_network(cfg)).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    loss_fn = Loss(net, cfg, data).to(device)
    weights = [p for p in loss_fn.parameters() if p.requires_grad]
    new_optimiser = lambda: getattr(torch.optim, cfg.opt)(weights, lr=cfg.lr, betas=(0.9, cfg.beta2), foreach=True)
    amp, autocast = precision(cfg, device)
    opt, scaler, start = new_optimiser(), torch.amp.GradScaler(device.type, enabled=amp == 'fp16'), 0
    if saved:
        try:
            for part, name in ((loss_fn, 'loss'), (ema, 'ema'), (opt, 'opt')): part.load_state_dict(saved[name])
            if saved['scaler'] and amp == 'fp16': scaler.load_state_dict(saved['scaler'])
        except (RuntimeError, ValueError) as error: stop(f'{out}/latest.pt does not fit these flags: {error}')
        start = saved['step']
        if start >= cfg.steps: stop(f'{out} is complete, step {start}: --steps N goes on, --sample N draws from it', 0)
    if cfg.compile: net.compile(dynamic=False)
    step_fn = loss_fn if world == 1 else nn.parallel.DistributedDataParallel(loss_fn, broadcast_buffers=False)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        size = sum(p.numel() for p in weights)
        print(f'{METHOD} on {cfg.data}: {len(images)} images of side {cfg.res}, {size:,} weights, '
              f'{world} x {device.type}, amp {amp}, steps {start} to {cfg.steps}, in {out}', flush=True)
        picture_grid(images[torch.linspace(0, len(images) - 1, 100).long().to(images.device)], out / 'data.png')

    halt = []                           # signals received: save and leave at the next step all processes agree on
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda number, frame: halt.append(number))
    total, bad, last, since = torch.zeros(3, device=device), torch.tensor(math.inf, device=device), start, time.time()
    for step in range(start, cfg.steps):
        phase, first, lr, batch = loss_fn.phase(step)
        if batch < world: stop(f'{world} processes for a batch of {batch}')
        if step == first:
            loss_fn.begin(ema)
            opt = new_optimiser()
        for group in opt.param_groups: group['lr'] = lr

        index, u, flips, z = draw(cfg, len(images), batch, step, device)    # below, non_blocking copies never wait
        torch.manual_seed(seed_of(cfg, 3 + rank, step))         # dropout
        shares = torch.arange(rank, batch, world).split(cfg.micro or batch)
        opt.zero_grad()
        for rows in shares:
            mine, flip = index[rows].to(images.device, non_blocking=True), flips[rows].to(device, non_blocking=True)
            x = images[mine].to(device).float() / 127.5 - 1
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x).contiguous(memory_format=torch.channels_last)
            y = labels[index[rows]].to(device, non_blocking=True) if cfg.cond else None
            noise = z[rows.to(device, non_blocking=True)]
            with contextlib.nullcontext() if world == 1 or rows is shares[-1] else step_fn.no_sync():
                with autocast(): loss = step_fn(x, y, u[rows], noise, step).sum() / batch
                scaler.scale(loss * world).backward()           # DistributedDataParallel averages over processes
            total[0] += loss.detach()
        scaler.unscale_(opt)
        norm = nn.utils.clip_grad_norm_(weights, cfg.clip)
        fine = norm.isfinite()          # if not: the scaler of fp16 skips the step; other runs end at the status line
        total[1:] += torch.stack([torch.where(fine, norm, 0.0), (~fine).float()])
        bad = torch.where(fine, bad, bad.clamp(max=step))
        scaler.step(opt)
        scaler.update()
        for average, decay in loss_fn.averages(ema, step):
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)

        done, halting = step + 1, bool(halt)
        save = done % cfg.save_every == 0 or done == cfg.steps
        status = save or done % cfg.log_every == 0
        if world > 1:
            if not status and device.type != 'cpu': continue    # to ask the other GPUs at every step would stall them
            votes = torch.tensor(float(halting), device=device)
            dist.all_reduce(votes)
            halting = votes.item() > 0
        if not (status or halting): continue
        if world > 1: dist.all_reduce(total[:1])                # the loss; the gradient is the same everywhere
        count, (loss, norm, skipped) = done - last, total.tolist()
        if not math.isfinite(loss) or skipped and amp != 'fp16' or skipped == count >= 20:
            raise FloatingPointError(f'loss {loss / count:.4g}, gradient not finite at step {bad.item():.0f}; '
                                     f'the checkpoint in {out} is from before. Lower --lr, or use --amp off')
        if rank == 0:
            row = dict(step=done, phase=phase, loss=loss / count, grad_norm=norm / max(count - skipped, 1), lr=lr,
                       images_per_second=count * batch / (time.time() - since), skipped=int(skipped))
            report(cfg, row, (cfg.steps - done) * (time.time() - since) / count)
            if save or halting:
                recipe = {k: v for k, v in vars(cfg).items() if k == 'data' or k not in FLAGS}
                state = dict(method=METHOD, step=done, config=recipe, loss=loss_fn.state_dict(), ema=ema.state_dict(),
                             opt=opt.state_dict(), scaler=scaler.state_dict())
                write(out / 'latest.pt', lambda file: torch.save(state, file))
                ts = numbers(cfg.ts)
                grids = [generate(cfg, ema, torch.arange(100), ts[:k], device) for k in (1, 2) if k <= len(ts)]
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
    log = Path(cfg.out, 'log.csv')
    new = not log.exists()
    with open(log, 'a', newline='') as file:
        if new: csv.writer(file).writerow(row)
        csv.writer(file).writerow([f'{v:.6g}' if isinstance(v, float) else v for v in row.values()])
    memory = f'  {torch.cuda.max_memory_allocated() / 2**30:.1f} GB' if torch.cuda.is_available() else ''
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
    with precision(cfg, device)[1](): x = sample(net, z, ts, labels, noise)
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
    saved, save, start = read_checkpoint(cfg.out), Path(cfg.save or Path(cfg.out, 'samples.npz')), time.time()
    if save.suffix not in ('.npz', ''): stop(f'--save {save}: give an .npz or a folder')
    net = UNet(cfg).to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    net.load_state_dict(saved['ema'])
    if cfg.compile: net.compile(dynamic=False)
    images = torch.zeros(cfg.sample, 3, cfg.res, cfg.res, dtype=torch.uint8, device=device)
    ts = numbers(cfg.ts)[:cfg.nfe]
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
    print(f'{cfg.sample} samples of step {saved["step"]} from noise levels {ts} in {time.time() - start:.0f} s: {save}')

# -------------------------------------------------------------------------------------------------------- main

def process(local, cfg, port=None):
    """One process of a run: of torchrun (it sets RANK), of --gpus (port is given), or the only one."""
    if port:
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(local), WORLD_SIZE=str(cfg.gpus))
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = torch.device('cuda', local) if torch.cuda.is_available() and cfg.device == 'auto' else torch.device('cpu')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision('high')              # TF32, also where amp is off
    elif world > 1: torch.set_num_threads(max(1, os.cpu_count() // world))
    if world > 1:
        warnings.filterwarnings('ignore', '`broadcast_buffers`')    # its successor is missing before torch 2.15
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        if local: dist.barrier()                                # one process of a machine downloads for all
    if '://' in cfg.init and not Path(cfg.out, 'latest.pt').exists(): fetch(cfg.init)
    data = None
    if not cfg.sample:
        images, labels = load_data(cfg)
        read.cache_clear()
        if device.type == 'cuda' and images.numel() < torch.cuda.mem_get_info()[0] / 3: images = images.to(device)
        data = images, labels
    if world > 1 and not local: dist.barrier()
    try: (write_samples if cfg.sample else train)(cfg, data, rank, world, device)
    except FloatingPointError as error: stop(str(error), 1)
    except torch.OutOfMemoryError as error: sys.exit(f'{METHOD}.py: out of GPU memory, lower --micro: {error}')
    finally:
        if world > 1: dist.destroy_process_group()


def main(argv=None):
    cfg = config(argv)
    if 'RANK' in os.environ: return process(int(os.environ['LOCAL_RANK']), cfg)
    if cfg.gpus == 1: return process(0, cfg)
    if cfg.device == 'auto' and torch.cuda.device_count() < cfg.gpus:
        stop(f'--gpus {cfg.gpus}: this machine has {torch.cuda.device_count()}; --device cpu runs them on the CPU')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    group = mp.spawn(process, (cfg, port), cfg.gpus, join=False)
    for s in (signal.SIGINT, signal.SIGTERM):                   # the processes save, then all end
        signal.signal(s, lambda number, frame: [os.kill(pid, number) for pid in group.pids()])
    try:
        while not group.join(): pass
    except mp.ProcessExitedException as error: sys.exit(error.exit_code)


if __name__ == '__main__':
    main()
