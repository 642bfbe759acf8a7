# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "scipy"]
# ///
"""
fid.py  Frechet inception distance (Heusel et al. 2017, arXiv:1706.08500) and its companions, as the papers print them.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

between Gaussians fitted to the 2048 pooled features of the Inception network of 2015 for 50,000 samples and for a
reference; lower is better. In the same pass: FID_inf, its limit for endless samples, extrapolated in 1/n (Chong and
Forsyth 2020); the inception score (Salimans et al. 2016; 10 splits in order); KID x 1000 (Binkowski et al. 2018; 100
subsets of 1000); precision and recall (Kynkaanniemi et al. 2019; k = 3, in the same features, not VGG's). A metric
without its input (KID, precision and recall need features, a published statistics file has only mu and sigma; FID_inf
needs 10,000 samples) is '-' or left out.

    python fid.py samples.npz                               # 32 x 32: against CIFAR-10's training images
    python fid.py runs/*/samples.npz                        # a table, fid-samples.png and fid-curves.png
    python fid.py seed0.npz seed1.npz seed2.npz --mean      # files of one folder are one model: mean, sd, minimum
    python fid.py samples.npz --ref photos/ --num 10000     # any folder, .zip, .npz, .npy, .pt, CIFAR .tar.gz
    python fid.py runs/*/samples.npz --model dinov2         # FD-DINOv2 (Stein et al. 2023): ViT-L/14, class token
    python fid.py runs/*/samples.npz --weights random       # no download: random features, not FID

Conventions are those of EDM, ECT, TCM, ADM and torch-fidelity: TensorFlow 1's bilinear resize to 299, (x - 128) / 128,
covariance over n - 1. Where codes differ:
- pytorch-fid resizes on PyTorch's grid and scales to [-1, 1], clean-fid resizes by an antialiased bicubic: --resize
  pytorch-fid, --resize clean. The figures are not comparable, so the choice is in every file and mixing is refused.
- EDM, ECT, pytorch-fid take scipy's sqrtm of S_1 S_2, complex and off by 4e-4 if n < 2048. We take the singular values
  of A_1^T A_2, S_i = A_i A_i^T: real, exact. ECT and TCM divide by n: 2e-5 of the traces at n = 50,000.
- The network runs in float32 without TF32, its statistics in float64.
- FD-DINOv2 resizes as EDM2, by PyTorch's antialiased bicubic; dgm-eval resizes by Pillow's, rounded to uint8.
- EDM reports the smallest of three FIDs; --mean prints mean, standard deviation and minimum.
"""
import argparse, csv, hashlib, http.client, io, json, math, os, pickle, re, shutil, sys, tarfile, time
import urllib.request, zipfile, zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import affine_grid, avg_pool2d, batch_norm, gelu, grid_sample, interpolate, max_pool2d, pad
from torch.nn.functional import relu, scaled_dot_product_attention

METHOD = Path(__file__).stem


def stop(message, code=2):
    """One line on stderr (from the first process only) and the exit code: 2 for bad input, 1 for a failed run."""
    if os.environ.get('RANK', '0') == '0': print(f'{METHOD}.py:', *str(message).split(), file=sys.stderr, flush=True)
    sys.exit(code)


def note(text):
    """A warning, on stderr."""
    print(f'{METHOD}.py: {text}', file=sys.stderr, flush=True)


def write(path, writer):
    """The whole file or nothing: writer fills a temporary file, which then takes path's place."""
    part = Path(f'{path}.part')
    try:
        with open(part, 'wb') as file: writer(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        stop(f'cannot write {path}: {error}', 1)

# ----------------------------------------------------------------------------------------------------- networks

def avg(x): return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def top(x): return max_pool2d(x, 3, 1, 1)


def half(x): return max_pool2d(x, 3, 2)


class Norm(nn.Module):
    """Batch normalisation by stored statistics, whatever the mode of the network."""

    def __init__(self, ch):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(ch)), nn.Parameter(torch.zeros(ch))
        self.register_buffer('running_mean', torch.zeros(ch))
        self.register_buffer('running_var', torch.ones(ch))

    def forward(self, x): return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class Conv(nn.Module):
    """Convolution, normalisation, ReLU. kernel '3', '1x7' (height x width), or '3/2', with stride 2 and no padding."""

    def __init__(self, cin, cout, kernel, padded=True):
        super().__init__()
        size, _, stride = kernel.partition('/')
        size = [int(k) for k in size.split('x')] * (1 if 'x' in size else 2)
        padding = [k // 2 if padded and not stride else 0 for k in size]
        self.conv, self.bn = nn.Conv2d(cin, cout, size, int(stride or 1), padding, bias=False), Norm(cout)

    def forward(self, x): return relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        """The normalisation into the convolution: the same function, faster."""
        scale = self.bn.weight.double() / (self.bn.running_var.double() + 1e-3).sqrt()
        shift = self.bn.bias.double() - self.bn.running_mean.double() * scale
        self.conv.weight.data = (self.conv.weight * scale.view(-1, 1, 1, 1)).to(self.conv.weight)
        self.conv.bias, self.bn = nn.Parameter(shift.float(), False), nn.Identity()


class Mixed(nn.Module):
    """Branches side by side, their outputs concatenated. A branch is a chain of convolutions, 'name channels kernel',
    and poolings; the two that '+' joins have the same input."""

    def __init__(self, cin, *branches):
        super().__init__()
        self.branches, self.width = [], 0
        for branch in branches:
            chain, width = [], cin
            for step in branch.split(', '):
                names, before = [], width
                for name, *shape in map(str.split, step.split(' + ')):
                    names.append(name)
                    if not shape: continue
                    width = int(shape[0]) + (width if len(names) > 1 else 0)
                    self.add_module(name, Conv(before, int(shape[0]), shape[1]))
                chain.append(names)
            self.branches.append(chain)
            self.width += width

    def forward(self, x):
        outs, pools = [], dict(avg=avg, top=top, half=half)
        for chain in self.branches:
            h = x
            for names in chain: h = torch.cat([(pools.get(n) or getattr(self, n))(h) for n in names], 1)
            outs.append(h)
        return torch.cat(outs, 1)


class Inception(nn.Module):
    """The network of inception-2015-12-05, with the parameter names of pytorch-fid's file: uint8 images (N, 3, H, W) ->
    features (N, 2048), logits (N, 1008) without bias, as the inception score takes them."""

    def __init__(self, resize='tf'):
        super().__init__()
        self.resize, self.dim = resize, 2048
        self.Conv2d_1a_3x3 = Conv(3, 32, '3/2')
        self.Conv2d_2a_3x3 = Conv(32, 32, '3', padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, '3')
        self.Conv2d_3b_1x1 = Conv(64, 80, '1')
        self.Conv2d_4a_3x3 = Conv(80, 192, '3', padded=False)
        double = 'branch3x3dbl_1 64 1, branch3x3dbl_2 96 3, branch3x3dbl_3 96 3'
        width = 192
        for letter, pool in zip('bcd', (32, 64, 64)):
            block = Mixed(width, 'branch1x1 64 1', 'branch5x5_1 48 1, branch5x5_2 64 5', double,
                          f'avg, branch_pool {pool} 1')
            self.add_module(f'Mixed_5{letter}', block)
            width = block.width
        self.Mixed_6a = Mixed(width, 'branch3x3 384 3/2', double + '/2', 'half')
        for letter, c in zip('bcde', (128, 160, 160, 192)):
            self.add_module(f'Mixed_6{letter}', Mixed(
                768, 'branch1x1 192 1', f'branch7x7_1 {c} 1, branch7x7_2 {c} 1x7, branch7x7_3 192 7x1',
                f'branch7x7dbl_1 {c} 1, branch7x7dbl_2 {c} 7x1, branch7x7dbl_3 {c} 1x7, branch7x7dbl_4 {c} 7x1, '
                'branch7x7dbl_5 192 1x7', 'avg, branch_pool 192 1'))
        self.Mixed_7a = Mixed(
            768, 'branch3x3_1 192 1, branch3x3_2 320 3/2', 'branch7x7x3_1 192 1, branch7x7x3_2 192 1x7, '
            'branch7x7x3_3 192 7x1, branch7x7x3_4 192 3/2', 'half')
        for letter, width, pool in (('b', 1280, 'avg'), ('c', 2048, 'top')):    # the last pools by maximum
            self.add_module(f'Mixed_7{letter}', Mixed(
                width, 'branch1x1 320 1', 'branch3x3_1 384 1, branch3x3_2a 384 1x3 + branch3x3_2b 384 3x1',
                'branch3x3dbl_1 448 1, branch3x3dbl_2 384 3, branch3x3dbl_3a 384 1x3 + branch3x3dbl_3b 384 3x1',
                f'{pool}, branch_pool 192 1'))
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False)

    def input(self, x):
        """uint8 (N, 3, H, W) -> (N, 3, 299, 299), in the way of --resize"""
        x, size = x.float(), x.shape[-2:]
        if self.resize == 'pytorch-fid': return interpolate(x, (299, 299), mode='bilinear') / 127.5 - 1
        if self.resize == 'clean':      # Pillow's bicubic
            x = interpolate(x, (299, 299), mode='bicubic', antialias=True).clamp(0, 255)
        else:                           # TensorFlow 1: pixel i of 299 lies at i * size / 299, beyond the edge the edge
            x = interpolate(pad(x, (0, 1, 0, 1), 'replicate'), (300, 300), mode='bilinear', align_corners=True)
        return (x[..., :299, :299] - 128) / 128

    def forward(self, x):
        x = self.input(x).contiguous(memory_format=torch.channels_last)
        for name, layer in self.named_children():
            if name in ('Conv2d_3b_1x1', 'Mixed_5b'): x = half(x)
            if name != 'fc': x = layer(x)
        x = x.mean((2, 3))
        return x, x @ self.fc.weight.T


class DINOv2(nn.Module):
    """DINOv2's ViT (Oquab et al. 2023; ViT-L/14 by default) with the parameter names of its files: uint8 images
    (N, 3, H, W) -> normalised class token (N, dim), None."""

    def __init__(self, dim=1024, depth=24, heads=16):
        super().__init__()
        group, norm = nn.ModuleDict, lambda: nn.LayerNorm(dim, eps=1e-6)
        scale = lambda: nn.ParameterDict(dict(gamma=torch.ones(dim)))
        self.heads, self.dim = heads, dim
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, dim))
        self.patch_embed = group(dict(proj=nn.Conv2d(3, dim, 14, 14)))
        self.blocks = nn.ModuleList(group(dict(
            norm1=norm(), attn=group(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim))), ls1=scale(),
            norm2=norm(), mlp=group(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim))), ls2=scale()))
            for _ in range(depth))
        self.norm = norm()
        self.requires_grad_(False)

    def forward(self, x):
        x = interpolate(x.float() / 255, (224, 224), mode='bicubic', antialias=True)
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        x = self.patch_embed.proj((x - mean) / std).flatten(2).mT                       # (N, 256, dim)
        N, _, dim = x.shape
        places = self.pos_embed[:, 1:].mT.reshape(1, dim, 37, 37)
        places = interpolate(places, scale_factor=16.1 / 37, mode='bicubic').flatten(2).mT      # 16.1: as the official
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(N, -1, -1), x + places], 1)
        for b in self.blocks:
            qkv = b.attn.qkv(b.norm1(x)).view(N, -1, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
            x = x + b.ls1.gamma * b.attn.proj(scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(N, -1, dim))
            x = x + b.ls2.gamma * b.mlp.fc2(gelu(b.mlp.fc1(b.norm2(x))))
        return self.norm(x)[:, 0], None

# ------------------------------------------------------------------------------------------------------ weights

FILES = dict(                           # model: url, bytes, sha256, other names in use
    inception=('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
               'pt_inception-2015-12-05-6726825d.pth', 95_628_359,
               '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2',
               'weights-inception-2015-12-05-6726825d.pth'),
    dinov2=('https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth', 1_217_586_395,
            'd5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428'),
)
CIFAR10 = ('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz', 170_052_171,
           'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd')
EDM_REFS = 'https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/'     # mu, sigma of whole training sets; no hash published


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''): digest.update(block)
    return digest.hexdigest()


def obtain(url, size=None, sha256=None, *names, hint=''):
    """Path of the file at url: in ./datasets or torch.hub's cache under any of its names, or downloaded there; a
    download that broke off is taken up again. sha256 is checked always."""
    names, cache = (url.rsplit('/', 1)[1], *names), Path(torch.hub.get_dir(), 'checkpoints')
    path = next((p for n in names for p in (Path('datasets', n), cache / n) if p.exists()), cache / names[0])
    facts = f'{url}, {size:,} bytes, sha256 {sha256}' if sha256 else url
    if not path.exists():
        try:
            part = Path(f'{path}.part')
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f'fetching {facts} to {path}', file=sys.stderr, flush=True)
            have = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
            if not size or have < size:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    with open(part, 'ab' if answer.status == 206 else 'wb') as file: shutil.copyfileobj(answer, file)
                if answer.length: raise OSError(f'{answer.length:,} bytes are missing, the same command goes on')
            if sha256 and sha256_of(part) != sha256:
                part.unlink()
                stop(f'{url}: what came has another sha256 than {sha256}, deleted: start again', 1)
            os.replace(part, path)
        except (OSError, http.client.HTTPException) as error:
            stop(f'cannot fetch {facts} ({error}): put it at {path} or datasets/{names[0]}{hint}')
    if sha256 and sha256_of(path) != sha256: stop(f'{path} has not the sha256 {sha256}: delete it and start again')
    return path


def randomise(net):
    """He-normal weights of a fixed seed; the first filters of zero mean (edges, not flat colour), normalisations set by
    what they see of 24 random pictures that mix five scales, biases 1: most units pass the ReLU, so that like images
    have like features. Chosen for ranking glyphs sensibly; a function of nobody's data."""
    g = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        if p.ndim > 1: p.data = torch.randn(p.shape, generator=g) * (2 / p[0].numel()) ** 0.5
        if name == 'Conv2d_1a_3x3.conv.weight': p.data -= p.mean((2, 3), keepdim=True)
        if name.endswith('bn.bias'): p.data.fill_(1)

    def measure(layer, inputs):
        h = layer.conv(inputs[0])
        layer.bn.running_mean, layer.bn.running_var = h.mean((0, 2, 3)), h.var((0, 2, 3))
    hooks = [m.register_forward_pre_hook(measure) for m in net.modules() if isinstance(m, Conv)]
    x = sum(a * interpolate(torch.randn(24, 3, side, side, generator=g), (32, 32), mode='bicubic')
            for side, a in ((1, 36), (2, 30), (4, 30), (8, 24), (32, 9)))
    net((x + 128).clamp(0, 255).to(torch.uint8))
    for hook in hooks: hook.remove()


def network(cfg):
    """-> the network of --model with its weights, folded; first digits of the weights' sha256, or 'random'"""
    net = Inception(cfg.resize) if cfg.model == 'inception' else DINOv2()
    if cfg.weights == 'random':
        randomise(net)
        label = 'random'
    else:
        url, size, sha256, *names = FILES[cfg.model]
        hint = ', or name it with --weights FILE; --weights random does without, its figures are no FID'
        path = Path(cfg.weights) if cfg.weights else obtain(url, size, sha256, *names, hint=hint)
        if not path.is_file(): stop(f'--weights: there is no {path}')
        if sha256_of(path) != sha256: stop(f'{path} has not the sha256 {sha256} of {url.rsplit("/", 1)[1]}')
        net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
        label = sha256[:8]
    for layer in net.modules():
        if isinstance(layer, Conv): layer.fold()
    return net.to(memory_format=torch.channels_last), label

# ---------------------------------------------------------------------------------------------------- distances

def frechet(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians, means (D,), covariances (D, D). Exact also for singular covariances:
    tr (S1 S2)^(1/2) is the sum of the singular values of A1^T A2, S = A A^T. Eigenvalues that are rounding are dropped
    in each S; dropping those of the product would not be harmless."""
    def root(sigma):
        w, v = np.linalg.eigh(sigma)
        keep = w > w[-1] * len(w) * np.finfo(np.float64).eps
        return v[:, keep] * np.sqrt(w[keep])
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    product = root(sigma1).T @ root(sigma2)
    cross = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def gaussian(features):
    """Features (N, D) -> mean (D,), covariance (D, D) in float64, in blocks: 50,000 features are 0.8 GB in float64."""
    mu = features.mean(0, dtype=np.float64)
    blocks = (b - mu for b in np.array_split(features, len(features) // 2000 + 1))
    return mu, sum(b.T @ b for b in blocks) / (len(features) - 1)


def frechet_inf(features, mu, sigma):
    """Limit of the distance for endless samples, the reference (mu, sigma) fixed: the intercept of a line in 1/n
    through 15 random subsets of 5000 to all of the features (N, D)."""
    rng, sizes = np.random.RandomState(0), np.linspace(5000, len(features), 15).astype(int)
    subsets = (features[rng.choice(len(features), size, replace=False)] for size in sizes)
    return float(np.polyfit(1 / sizes, [frechet(*gaussian(s), mu, sigma) for s in subsets], 1)[1])


def inception_score(features, weight):
    """exp of the mean KL divergence between the class probabilities of an image and of all; mean of 10 splits."""
    def one(x):
        p = (torch.from_numpy(x).double() @ weight.double().T).log_softmax(1)
        return (p.exp() * (p - p.logsumexp(0) + math.log(len(p)))).sum(1).mean().exp().item()
    n = len(features)
    return float(np.mean([one(features[n * i // 10:n * (i + 1) // 10]) for i in range(10)]))


def kernel_distance(x, y):
    """Unbiased squared maximum mean discrepancy, kernel (x.y / D + 1)^3; mean over 100 pairs of random subsets."""
    rng, m = np.random.RandomState(0), min(1000, len(x), len(y))
    def one():
        a, b = (torch.from_numpy(v[rng.choice(len(v), m, replace=False)]).double() for v in (x, y))
        aa, bb, ab = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        return ((aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (m * (m - 1)) - 2 * ab.mean()).item()
    return float(np.mean([one() for _ in range(100)]))


def precision_recall(real, fake, k=3):
    """Share of fake within the k-neighbour balls of real, and the reverse."""
    real, fake = torch.from_numpy(real), torch.from_numpy(fake)
    def covered(x, y):                  # share of x in the balls of y; the centre is its own nearest neighbour
        radius = torch.cat([torch.cdist(b, y).topk(k + 1, largest=False).values[:, k] for b in y.split(1000)])
        return float(torch.cat([(torch.cdist(b, y) <= radius).any(1) for b in x.split(1000)]).double().mean())
    return covered(fake, real), covered(real, fake)

# ------------------------------------------------------------------------------------------------------- images

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


KINDS = '.png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm'.split()
BROKEN = (OSError, TypeError, ValueError, EOFError, KeyError, RuntimeError, SyntaxError, Image.DecompressionBombError,
          tarfile.TarError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)


class Images:
    """The images of a path, looked over at once and read when needed: n, size (H, W), sha256 of the content. Whatever
    would make a silent difference ends the program: alpha, 16 bits, CMYK, mixed sizes, floats of unstated range."""

    def __init__(self, path, span=None):
        self.path, self.span, self.size = Path(path), span, None
        self.glyphs = str(path) == 'glyphs' and not self.path.exists()
        self.pictures = self.path.is_dir() or self.path.suffix.lower() == '.zip'
        if self.glyphs: self.path = Path('datasets/glyphs')     # where its statistics will lie
        elif not self.path.exists(): stop(f'there is no {path}')
        try: (self.survey_pictures if self.pictures else self.survey_array)()
        except BROKEN as error: stop(f'{path} cannot be read: {type(error).__name__} {error}')
        if not self.n: stop(f'{path} holds no images')

    def files(self):
        """Sorted names of the pictures in a folder or zip, and what reads one."""
        archive = None if self.path.is_dir() else zipfile.ZipFile(self.path)
        names = archive.namelist() if archive else [p.relative_to(self.path).as_posix() for p in self.path.rglob('*')]
        names = sorted(n for n in names if Path(n).suffix.lower() in KINDS and n[:8] != '__MACOSX'
                       and Path(n).name[0] != '.')
        return names, archive.read if archive else lambda name: (self.path / name).read_bytes()

    def survey_pictures(self):
        (self.names, content), digest, kinds = self.files(), hashlib.sha256(), Counter()
        self.n = len(self.names)
        for name in self.names:
            data = content(name)
            digest.update(f'{name} {len(data)} '.encode() + data)
            try: image = Image.open(io.BytesIO(data))           # reads the header only
            except BROKEN as error: stop(f'{self.path}/{name} cannot be read: {error}')
            alpha, deep = 'A' in image.mode or 'transparency' in image.info, ';16' in str(image.tile)
            if image.mode not in ('RGB', 'L', 'P', '1') or alpha or deep:
                kind = image.mode + ' picture' + ' with alpha' * alpha + ' of 16 bits' * deep
                stop(f'{self.path}/{name} is a {kind}: convert it to 8-bit RGB or grey')
            self.size = self.size or (image.height, image.width)
            if self.size != (image.height, image.width):
                stop(f'{self.path}/{name} is {image.width} x {image.height}, {self.names[0]} is '
                     f'{self.size[1]} x {self.size[0]}: all must have one size')
            kinds[image.format] += 1
            kinds['grey'] += image.mode in ('L', '1')
        if kinds['JPEG']: note(f'{self.path} holds {kinds["JPEG"]} JPEG: compression changes the distance; use PNG')
        if kinds['grey']: note(f'{self.path}: {kinds["grey"]} grey pictures repeated to 3 channels')
        self.sha256 = digest.hexdigest()

    def array(self):
        """-> shape, dtype, and a function from sorted row numbers to an iterator of arrays"""
        kind = self.path.suffix.lower()
        if self.glyphs: array = glyphs()[0][:2000].numpy()     # enough for a trial
        elif kind == '.npz': return self.stream()
        elif kind == '.npy': array = np.load(self.path, mmap_mode='r', allow_pickle=False)
        elif kind in ('.pt', '.pth'):
            found = torch.load(self.path, map_location='cpu', weights_only=True, mmap=True)
            tensors = [v for v in (found.values() if isinstance(found, dict) else [found])
                       if isinstance(v, torch.Tensor) and v.ndim == 4]
            if len(tensors) != 1: stop(f'{self.path} holds {len(tensors)} tensors (N, ., ., .), not one')
            array = tensors[0].numpy()
        elif self.path.name.lower().endswith(('.tar.gz', '.tgz')):
            with tarfile.open(self.path) as archive:
                parts = sorted((m for m in archive if Path(m.name).match('data_batch_*.bin')), key=lambda m: m.name)
                if not parts: stop(f'{self.path} holds no data_batch_*.bin: take the binary version of CIFAR-10')
                data = b''.join(archive.extractfile(m).read() for m in parts)
            array = np.frombuffer(data, np.uint8).reshape(-1, 3073)[:, 1:].reshape(-1, 3, 32, 32)
        else: stop(f'{self.path} is no folder, .zip, .npz, .npy, .pt or CIFAR .tar.gz')
        return array.shape, array.dtype, lambda rows: (array[i] for i in rows)

    def stream(self):
        """array() of an .npz, image by image: 50,000 at side 256 are 10 GB."""
        archive = zipfile.ZipFile(self.path)
        names = {n.removesuffix('.npy'): n for n in archive.namelist()}
        key = next((k for k in ('arr_0', 'images', 'samples') if k in names), min(names) if len(names) == 1 else None)
        if key is None: stop(f'{self.path} holds {" ".join(names) or "nothing"}: call the images arr_0')

        def header(file):
            version = np.lib.format.read_magic(file)
            return getattr(np.lib.format, f'read_array_header_{version[0]}_{version[1]}')(file)
        with archive.open(names[key]) as file: shape, fortran, dtype = header(file)
        if fortran: stop(f'{self.path}: {key} is in Fortran order: save np.ascontiguousarray of it')

        def read(rows):
            with archive.open(names[key]) as file:
                header(file)
                wanted, count = set(rows), math.prod(shape[1:]) * dtype.itemsize
                for i in range(max(wanted) + 1):
                    data = file.read(count)
                    if i in wanted: yield np.frombuffer(data, dtype).reshape(shape[1:])
        return shape, dtype, read

    def survey_array(self):
        shape, dtype, _ = self.array()
        if len(shape) == 3: shape = (*shape, 1)
        last, first = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (3, 1))
        if last == first: stop(f'{self.path} holds {dtype} {shape}, not images (N, H, W, 3) or (N, 3, H, W)')
        self.n, self.size, self.first = shape[0], shape[2:] if first else shape[1:3], first
        if dtype.kind == 'f' and not self.span:
            stop(f'{self.path} holds {dtype} of unstated range: give --range=-1,1, --range=0,1 or --range=0,255')
        if dtype.kind != 'f' and dtype != np.uint8: stop(f'{self.path} holds {dtype}, not uint8')
        if 1 == shape[1 if first else 3]: note(f'{self.path}: grey images repeated to 3 channels')
        self.sha256 = hashlib.sha256(glyphs()[0].numpy().tobytes()).hexdigest() if self.glyphs else sha256_of(self.path)

    def pick(self, rows):
        """The images numbered rows (sorted) one after the other, each uint8 (H, W, 3)."""
        rows, i = [int(i) for i in rows], 0
        try:
            if self.pictures:
                content = self.files()[1]
                for i in rows: yield np.asarray(Image.open(io.BytesIO(content(self.names[i]))).convert('RGB'))
            else:
                for i, a in zip(rows, self.array()[2](rows)):
                    a = a.reshape(*a.shape, 1) if a.ndim == 2 else a.transpose(1, 2, 0) if self.first else a
                    if a.dtype != np.uint8: a = self.levels(i, a)
                    yield a.repeat(3 // a.shape[2], 2)
        except BROKEN as error:
            stop(f'{self.path}{f"/{self.names[i]}" * self.pictures} cannot be read: {type(error).__name__} {error}')

    def levels(self, i, a):
        """Floats in span to the nearest of 256 levels."""
        low, high = self.span
        a = 255 * (a.astype(np.float64) - low) / (high - low)
        if not (np.abs(a - 127.5) < 255).all():
            stop(f'{self.path}: image {i} holds NaN or values far outside the --range {low:g},{high:g}')
        return np.floor(a + 0.5).clip(0, 255).astype(np.uint8)


def load_images(path, span=None):
    """All images of a path: uint8 (N, 3, H, W). span: what float values run from and to"""
    images = Images(path, span)
    return torch.stack([torch.tensor(a) for a in images.pick(range(images.n))]).permute(0, 3, 1, 2).contiguous()

# --------------------------------------------------------------------------------------------------- statistics

class Arrays(pickle.Unpickler):
    """Reads EDM2's statistics, a pickle of dicts of numpy arrays; any other name in it is an error."""

    KNOWN = {
        'numpy.ndarray': np.ndarray,
        'numpy.dtype': np.dtype,
        'multiarray._reconstruct': np.zeros(0).__reduce__()[0],
        'multiarray.scalar': lambda dtype, data: np.frombuffer(data, dtype)[0],
        'numeric._frombuffer': lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(shape, order=order),
        '_codecs.encode': lambda text, _: text.encode('latin1'),
    }

    def find_class(self, module, name):
        short = f'{re.sub("^numpy._?core.", "", module)}.{name}'
        if short in self.KNOWN: return self.KNOWN[short]
        raise pickle.UnpicklingError(f'it names {module}.{name}, which no statistics need')


def read_statistics(path, model='inception'):
    """A file of mu and sigma, ours (with meta and features) or EDM's, ADM's, pytorch-fid's, clean-fid's .npz or EDM2's
    .pkl -> dict(mu, sigma, features or None, meta), or None if path is something else."""
    path = Path(path)
    if not path.is_file() or path.suffix not in ('.npz', '.pkl', '.fid'): return None
    try:
        if path.suffix == '.pkl':
            with open(path, 'rb') as file: found = Arrays(file).load()
            found = found[{'inception': 'fid', 'dinov2': 'fd_dinov2'}[model]]
        else:
            found = np.load(path, allow_pickle=False)
            if not {'mu', 'sigma'} <= set(found): return None
        mu, sigma = (np.asarray(found[k], np.float64) for k in ('mu', 'sigma'))
        meta = dict(json.loads(str(found['meta']))) if 'meta' in found else {}
        features = found['features'] if 'features' in found else None
    except (AttributeError, IndexError, *BROKEN) as error:
        stop(f'{path} cannot be read: {type(error).__name__} {error}')
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        stop(f'{path} holds mu {mu.shape}, sigma {sigma.shape}: not finite statistics')
    way = re.search('_(clean|legacy_pytorch|legacy_tensorflow)_', path.name)       # clean-fid's file names
    if way and not meta: meta['resize'] = dict(clean='clean', legacy_pytorch='pytorch-fid').get(way[1], 'tf')
    return dict(mu=mu, sigma=sigma, features=features, meta=meta)


def extract(rank, world, net, images, rows, cfg, out):
    """Process `rank` of `world`: features of its share of the rows, their sums, and what tells equal images apart."""
    device = torch.device('cuda', rank) if torch.cuda.is_available() and cfg.device == 'auto' else torch.device('cpu')
    if world > 1 and device.type == 'cpu': torch.set_num_threads(max(1, os.cpu_count() // world))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    net, mine, start, told, waiting = net.to(device), rows[rank::world], time.time(), time.time(), []
    place = {int(i): k for k, i in enumerate(out['keep'])}
    batch, pictures, live = cfg.batch or (8 if device.type == 'cpu' else 128), images.pick(mine), sys.stderr.isatty()
    for first in range(0, len(mine), batch):
        numbers = range(rank + first * world, rank + min(first + batch, len(mine)) * world, world)
        block = [next(pictures) for _ in numbers]
        for k, image in zip(numbers, block):
            out['digests'][k] = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:7], 'big')
        with torch.inference_mode(): f = net(torch.from_numpy(np.stack(block)).to(device).permute(0, 3, 1, 2))[0].cpu()
        if not f.isfinite().all(): stop(f'{images.path}: the network returns NaN', 1)
        for k, row in zip(numbers, f):
            if k in place: out['features'][place[k]] = row
        waiting.append(f)
        done = first + len(block)
        if sum(map(len, waiting)) >= 1000 or done == len(mine):   # large blocks: ten times faster than each batch
            f, waiting = torch.cat(waiting).double(), []
            out['sum'][rank] += f.sum(0)
            out['outer'][rank] += f.T @ f
        if rank == 0 and (live or time.time() > told + 60 or done == len(mine)):
            told, pace = time.time(), (time.time() - start) / done
            print('\r' * live + f'{images.path}: {min(done * world, len(rows))} of {len(rows)} images, '
                  f'{world / pace:.1f} img/s, {timedelta(seconds=round((len(mine) - done) * pace))} left  ',
                  end='' if live and done < len(mine) else '\n', file=sys.stderr, flush=True)


def statistics(images, num, net, weights, cfg):
    """-> dict(mu, sigma, features, meta) of num of the images (0: all), from the file beside them or computed and
    put there. Features are kept of 50,000 images at most."""
    n = num or images.n
    rows = np.random.RandomState(0).permutation(images.n)[:n]                  # EDM's choice of a subset
    way = [cfg.model, *[cfg.resize] * (cfg.model == 'inception'), *['random'] * (weights == 'random')]
    cache = Path(f'{images.path}.{"-".join(way)}.fid')
    key = dict(format=1, model=cfg.model, resize=cfg.resize if cfg.model == 'inception' else '', weights=weights,
               n=n, of=images.n, size=list(images.size), span=images.span, sha256=images.sha256)
    if cache.exists():
        found = read_statistics(cache)
        if found and {k: found['meta'].get(k) for k in key} == json.loads(json.dumps(key)): return found
    keep = np.unique(np.linspace(0, n - 1, min(n, 50_000)).astype(int))
    zeros = lambda *shape: torch.zeros(cfg.gpus, *shape, dtype=torch.float64)
    out = dict(keep=keep, sum=zeros(net.dim), outer=zeros(net.dim, net.dim), features=torch.zeros(len(keep), net.dim),
               digests=torch.zeros(n, dtype=torch.int64))
    job = cfg.gpus, net, images, np.sort(rows), cfg, out
    if cfg.gpus == 1: extract(0, *job)
    else:
        for name in ('sum', 'outer', 'features', 'digests'): out[name].share_memory_()
        try: mp.spawn(extract, job, cfg.gpus)
        except mp.ProcessExitedException as error: sys.exit(error.exit_code)
    same = n - len(out['digests'].unique())
    if same: note(f'{images.path}: {same} of {n} images are duplicates of another')
    mu = out['sum'].sum(0) / n
    sigma = (out['outer'].sum(0) - n * torch.outer(mu, mu)) / (n - 1)
    meta = key | dict(source=str(images.path), duplicates=same, cov='n-1', date=time.strftime('%Y-%m-%d'),
                      device='cuda' if torch.cuda.is_available() and cfg.device == 'auto' else 'cpu',
                      torch=torch.__version__, numpy=np.__version__)
    found = dict(mu=mu.numpy(), sigma=sigma.numpy(), features=out['features'].numpy(), meta=np.array(json.dumps(meta)))
    cache.parent.mkdir(exist_ok=True)
    if os.access(cache.parent, os.W_OK): write(cache, lambda file: np.savez(file, **found))
    else: note(f'{cache.parent} is read-only: the statistics of {images.path} are not kept')
    return found | dict(meta=meta)

# --------------------------------------------------------------------------------------------------- comparison

def evaluate(sample, reference, net, cfg):
    """-> {column: value}; a metric without its input is None"""
    x, y, n = sample['features'], reference['features'], sample['meta'].get('n')
    if sample['mu'].shape != reference['mu'].shape:
        stop(f'the reference has {len(reference["mu"])} features, the samples {len(sample["mu"])}: not of one network')
    kind = 'FD-random' if cfg.weights == 'random' else {'inception': 'FID', 'dinov2': 'FD-DINOv2'}[cfg.model]
    mu, sigma = reference['mu'], reference['sigma']
    row = {kind: frechet(sample['mu'], sample['sigma'], mu, sigma)}
    row[f'{kind}_inf'] = frechet_inf(x, mu, sigma) if x is not None and len(x) >= 10_000 else None
    if kind == 'FID': row['IS'] = inception_score(x, net.fc.weight) if x is not None and len(x) >= 10 else None
    both = x is not None and y is not None and min(len(x), len(y)) > 3
    row['KID x1000' if kind == 'FID' else 'KD x1000'] = 1000 * kernel_distance(x, y) if both else None
    row['precision'], row['recall'] = precision_recall(y, x) if both else (None, None)
    return row | dict(n=n)


def sheet(rows, path):
    """Contact sheet: rows of (name, images uint8 (H, W, 3)), small ones enlarged."""
    font, gap = ImageFont.load_default(size=15), 6
    side = rows[0][1][0].shape[0]
    scale = max(1, 48 // side)
    left = max(int(font.getlength(name)) for name, _ in rows) + 3 * gap
    strips = [np.concatenate(images, 1).repeat(scale, 0).repeat(scale, 1) for _, images in rows]
    width, height = max(s.shape[1] for s in strips), sum(s.shape[0] + gap for s in strips)
    canvas, y = Image.new('RGB', (left + width, height + gap), 'white'), gap
    for (name, _), strip in zip(rows, strips):
        ImageDraw.Draw(canvas).text((left - 2 * gap, y + strip.shape[0] // 2), name, 'black', font, anchor='rm')
        canvas.paste(Image.fromarray(strip), (left, y))
        y += strip.shape[0] + gap
    write(path, lambda file: canvas.save(file, 'PNG'))


COLOURS = '#1f6fb4 #d95f02 #1b8a5a #a6306e #7a5195 #8c6d1f #444444 #17a2b8'.split()


def curves(logs, path):
    """Loss and gradient norm over the steps, logarithmic, from [(name, rows of log.csv)]; a line breaks where a phase
    ends, since the objectives of two phases have no common scale."""
    font, (width, height, left, gap) = ImageFont.load_default(size=14), (640, 300, 64, 30)
    canvas = Image.new('RGB', (left + width + gap, 2 * (height + gap) + gap + 24 * len(logs)), 'white')
    draw = ImageDraw.Draw(canvas)
    last = max(float(row['step']) for _, rows in logs for row in rows)
    for panel, column in enumerate(('loss', 'grad_norm')):
        y0 = gap + panel * (height + gap)
        values = [float(row[column]) for _, rows in logs for row in rows]
        values = [v for v in values if 0 < v < math.inf] or [1.0]
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
        place = lambda step, v: (left + width * step / last, y0 + height * (high - math.log10(v)) / (high - low))
        draw.text((left, y0 - 4), column, 'black', font, anchor='lb')
        for power in range(low, high + 1):
            y = place(0, 10.0 ** power)[1]
            draw.line((left, y, left + width, y), '#dddddd')
            draw.text((left - 8, y), f'{10.0 ** power:g}', 'black', font, anchor='rm')
        for c, (_, rows) in enumerate(logs):
            points, phase = [], None
            for row in [*rows, dict(phase=None)]:
                if row['phase'] != phase:
                    if len(points) > 1: draw.line(points, COLOURS[c % len(COLOURS)], 2)
                    points, phase = [], row['phase']
                if phase is not None and 0 < float(row[column]) < math.inf:
                    points.append(place(float(row['step']), float(row[column])))
    for i in range(5):
        text, anchor = 'step ' * (i == 4) + f'{last * i / 4:g}', 'rt' if i == 4 else 'mt'
        draw.text((left + width * i / 4, y0 + height + 10), text, 'black', font, anchor=anchor)
    for c, (name, _) in enumerate(logs):
        y = y0 + height + gap + 12 + 24 * c
        draw.line((left, y, left + 30, y), COLOURS[c % len(COLOURS)], 3)
        draw.text((left + 40, y), name, 'black', font, anchor='lm')
    write(path, lambda file: canvas.save(file, 'PNG'))


def table(rows):
    """Aligned text of [{column: [values]}]: mean, and sd and minimum where there are several; * marks the best."""
    columns = [c for c in rows[0] if any(row[c] != [None] * len(row[c]) for row in rows)]
    best = {c: (max if c in ('IS', 'precision', 'recall') else min) for c in columns if c not in ('model', 'n')}
    equal = len(rows) > 1 and len({n for row in rows for n in row['n']}) == 1

    def cell(row, c):
        values = row[c]
        if c not in best: return ' '.join(dict.fromkeys('-' if v is None else str(v) for v in values))
        if None in values: return '-'
        means = [np.mean(r[c]) for r in rows if None not in r[c]]
        text = f'{np.mean(values):.3f}'
        if len(values) > 1: text += f' +- {np.std(values, ddof=1):.3f} (min {min(values):.3f})'
        return text + ('*' if equal and np.mean(values) == best[c](means) else ' ' * equal)
    grid = [columns, *([cell(row, c) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    return '\n'.join('  '.join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:]))]).rstrip()
                     for line in grid)

# --------------------------------------------------------------------------------------------------------- main

def config(argv):
    parser = argparse.ArgumentParser('fid.py', allow_abbrev=False)
    parser.error = lambda message: stop(f'{message}; see --help')
    add = parser.add_argument
    add('paths', nargs='+', help='samples: .npz, .npy, .pt, .zip, a folder of pictures, a run folder (its samples.npz)')
    add('--ref', default='', help='cifar10, imagenet64, glyphs, or images or statistics by path or URL '
                                  '[cifar10 for 32 x 32, imagenet64 for 64 x 64, glyphs for 16 x 16]')
    add('--num', type=int, default=0,
        help='images taken of each; fewer are an error [50000 for published references, else all]')
    add('--model', default='inception', choices=('inception', 'dinov2'))
    add('--weights', '--inception', default='', help='weight file of the model, or random [found or downloaded]')
    add('--resize', default='tf', choices=('tf', 'pytorch-fid', 'clean'), help='convention of the features [tf]')
    add('--range', default='', choices=('-1,1', '0,1', '0,255'), help='of float arrays, as --range=-1,1')
    add('--mean', action='store_true', help='files of one folder are samples of one model: mean, sd, minimum')
    add('--json', action='store_true', help='print JSON')
    add('--out', default='fid', help='pictures of a comparison: <out>-samples.png, <out>-curves.png from log.csv [fid]')
    add('--gpus', type=int, default=1, help='processes, one per GPU')
    add('--device', default='auto', choices=('auto', 'cpu'))
    add('--batch', type=int, default=0, help='images at once [128 on a GPU, 8 on the CPU, which is fastest]')
    cfg = parser.parse_args(argv)
    cfg.span = [float(v) for v in cfg.range.split(',')] if cfg.range else None
    if cfg.num < 0 or cfg.batch < 0 or cfg.gpus < 1: stop('--num, --batch and --gpus must be positive')
    if cfg.gpus > max(1, torch.cuda.device_count()) and cfg.device == 'auto':
        stop(f'--gpus {cfg.gpus}: this machine has {torch.cuda.device_count()}; --device cpu runs them on the CPU')
    return cfg


def reference(cfg, size):
    """-> name, whether published for 50,000 samples, and the Images or statistics that --ref stands for"""
    name = cfg.ref or {16: 'glyphs', 32: 'cifar10', 64: 'imagenet64'}.get(size[0])
    if not name: stop(f'the samples are {size[1]} x {size[0]}: name what to compare them with by --ref')
    path, named = name, not Path(name).exists()
    if named and name in ('cifar10', 'imagenet64'):
        edm = cfg.model == 'inception' and cfg.resize == 'tf' and cfg.weights != 'random'
        file, local = {'cifar10': ('cifar10-32x32.npz', 'cifar-10-binary.tar.gz'),
                       'imagenet64': ('imagenet-64x64.npz', 'imagenet-64x64.zip')}[name]
        if edm: path = obtain(EDM_REFS + file, hint=f', or compute it: --ref datasets/{local}')
        else: path = obtain(*CIFAR10) if name == 'cifar10' else Path('datasets', local)
    elif '://' in name: path = obtain(name)
    found = read_statistics(path, cfg.model)
    published = named and name != 'glyphs' or bool(found and 'weights' not in found['meta'])
    return name, published, found or Images(path, cfg.span)


def compatible(found, path, cfg, weights):
    """Ends the program if the statistics were made in another way than these flags say."""
    way = dict(model=cfg.model, resize=cfg.resize if cfg.model == 'inception' else '', weights=weights)
    for key, here in way.items():
        if found['meta'].get(key, here) != here: stop(f'{path} was made with {key} {found["meta"][key]}, not {here}')
    if 'weights' not in found['meta']:
        if weights == 'random': stop(f'{path} does not hold features of --weights random: take images as reference')
        if 'resize' not in found['meta']:
            note(f'{path} does not say how it was made: assumed {cfg.model} {cfg.resize}')


def main(argv=None):
    cfg = config(argv)
    paths = [str(Path(p, 'samples.npz')) if Path(p, 'latest.pt').exists() else p for p in dict.fromkeys(cfg.paths)]
    samples = [read_statistics(p, cfg.model) or Images(p, cfg.span) for p in paths]
    size_of = lambda found: found.size if isinstance(found, Images) else tuple(found['meta'].get('size', ()))
    sizes = {size_of(s): p for s, p in zip(samples, paths) if size_of(s)}
    size = next(iter(sizes), (32, 32))
    ref_name, published, ref = reference(cfg, size)
    if size_of(ref): sizes[size_of(ref)] = ref_name
    if isinstance(ref, Images) and ref.n < 2: stop(f'{ref_name} holds one image')
    if len(sizes) > 1: stop('these are not of one size: ' + ', '.join(f'{p} {s[1]} x {s[0]}' for s, p in sizes.items()))
    num, few = cfg.num or 50_000 * published, (50_000, '')
    for found, path in zip(samples, paths):
        n = found.n if isinstance(found, Images) else found['meta'].get('n', num)
        if n < max(num, 2): stop(f'{path} holds {n} images, fewer than {max(num, 2)}: make more, or lower --num')
        few = min(few, (num or n, path))
    if few[0] < 2048: note(f'{few[1]}: {few[0]} images, fewer than features: biased upwards, compare equal numbers')
    net, weights = network(cfg)
    for found, path in zip([ref, *samples], [ref_name, *paths]):
        if not isinstance(found, Images): compatible(found, path, cfg, weights)
    ref_images, ref = ref, statistics(ref, 0, net, weights, cfg) if isinstance(ref, Images) else ref
    models, shown = {}, {}
    for found, path in zip(samples, paths):
        name = str(Path(path).parent) if cfg.mean else path
        row = evaluate(statistics(found, num, net, weights, cfg) if isinstance(found, Images) else found, ref, net, cfg)
        for column, value in row.items(): models.setdefault(name, {}).setdefault(column, []).append(value)
        if isinstance(found, Images): shown.setdefault(name, found)
    rows = [dict(model=[name]) | row for name, row in zip(short(models), models.values())]
    m = ref['meta']
    about = dict(reference=ref_name, reference_n=m.get('n'), model=cfg.model, weights=weights,
                 resize=cfg.resize if cfg.model == 'inception' else 'bicubic 224',
                 label='random features, not FID' if weights == 'random' else '')
    if cfg.json: print(json.dumps(about | dict(models=rows), indent=1))
    else:
        print(table(rows))
        print(', '.join(f'{k} {v}' for k, v in about.items() if v))
    if len(rows) == 1: return
    names = [row['model'][0] for row in rows]
    strips = [(name, list(shown[m].pick(range(min(16, shown[m].n))))) for name, m in zip(names, models) if m in shown]
    if isinstance(ref_images, Images): strips.append(('reference', list(ref_images.pick(range(min(16, ref_images.n))))))
    if strips: sheet(strips, f'{cfg.out}-samples.png')
    logs = [(name, Path(shown[m].path.parent, 'log.csv')) for name, m in zip(names, models) if m in shown]
    logs = [(name, list(csv.DictReader(log.read_text().splitlines()))) for name, log in logs if log.exists()]
    if logs: curves(logs, f'{cfg.out}-curves.png')
    print('pictures:', f'{cfg.out}-samples.png' * bool(strips), f'{cfg.out}-curves.png' * bool(logs), file=sys.stderr)


def short(names):
    """Paths without the folders, and the file name, that all have in common."""
    parts = [Path(name).parts for name in names]
    if len(parts) > 1 and len({p[-1] for p in parts}) == 1: parts = [p[:-1] for p in parts]
    while len(parts) > 1 and len({p[0] for p in parts}) == 1 < min(map(len, parts)): parts = [p[1:] for p in parts]
    return [str(Path(*p)) for p in parts]


if __name__ == '__main__':
    try: main()
    except torch.OutOfMemoryError as error: stop(f'out of GPU memory, lower --batch: {error}', 1)
