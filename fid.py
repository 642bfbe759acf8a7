# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy", "pillow>=10.1"]
# ///
"""
fid.py  Frechet inception distance (Heusel et al. 2017, arXiv:1706.08500) and its companions, as the papers print them.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

between Gaussians fitted to the 2048 pooled features of the Inception network of 2015 for 50,000 samples and for a
reference; lower is better. In the same pass: FID_inf, its limit for endless samples, extrapolated in 1/n (Chong and
Forsyth 2020; from 10,000 samples on); the inception score (Salimans et al. 2016; 10 splits in order); KID x 1000
(Binkowski et al. 2018; 100 subsets of 1000); precision and recall (Kynkaanniemi et al. 2019; k = 3, in the same
features, not VGG's). A published statistics file has only mu and sigma: with it the last three are left out.

    python fid.py samples.npz                               # 32 x 32: against CIFAR-10's training images
    python fid.py runs/*/samples.npz                        # a table, fid-samples.png and fid-curves.png
    python fid.py a/0.npz a/1.npz a/2.npz --mean            # one model: mean, sd and minimum, which EDM reports
    python fid.py samples.npz --ref photos/ --num 10000     # any folder or .zip of pictures, .npz, CIFAR-10's .tar.gz
    python fid.py runs/*/samples.npz --model dinov2         # FD-DINOv2 (Stein et al. 2023): ViT-L/14, class token

16 x 16 samples, of the digits that the scripts train on by default, need no download: --model digits, the default
there, is a small classifier of these digits, trained on the spot and kept in ./datasets. FD-digits is the same distance
in 70 features of variance 1: 64 that it learns and, since a classifier need not see colour or grain, each channel's
mean and mean difference of neighbouring pixels; comparable for equal `weights` only. sure: share of samples that are
one digit with a probability above 0.5. share_min, share_max: of the rarest and the commonest digit, 0.1 in the data.
colour_min, colour_max: standard deviation of the mean colour over the data's, least and most varied channel.

Conventions are those of EDM, ECT, TCM, ADM and torch-fidelity: TensorFlow 1's bilinear resize to 299, (x - 128) / 128,
covariance over n - 1, network in float32 without TF32, statistics in float64. Where codes differ:
- pytorch-fid resizes on PyTorch's grid and scales to [-1, 1], clean-fid resizes by an antialiased bicubic: --resize
  pytorch-fid, --resize clean. The figures are not comparable, so the choice is in every file and mixing is refused.
- EDM, ECT, pytorch-fid take scipy's sqrtm of S_1 S_2, complex and off by 4e-4 if n < 2048. We take the singular values
  of A_1^T A_2, S_i = A_i A_i^T: real, exact. ECT and TCM divide by n: 2e-5 of the traces at n = 50,000.
- FD-DINOv2 resizes as EDM2, by PyTorch's antialiased bicubic; dgm-eval resizes by Pillow's, rounded to uint8.
"""
import argparse, contextlib, csv, hashlib, io, itertools, json, math, os, pickle, re, signal, sys, tarfile, time
import warnings, zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import affine_grid, avg_pool2d, batch_norm, cross_entropy, gelu, grid_sample, interpolate
from torch.nn.functional import pad, relu, scaled_dot_product_attention

METHOD = Path(__file__).stem

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

# ----------------------------------------------------------------------------------------------------- networks

class Conv(nn.Module):
    """Convolution, batch normalisation by stored statistics, ReLU."""

    def __init__(self, cin, cout, size, stride=1, padding='same'):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, size, stride, padding, bias=False)
        self.bn = nn.ParameterDict({k: torch.ones(cout) for k in ('weight', 'bias', 'running_mean', 'running_var')})

    def forward(self, x):
        x = self.conv(x)
        if self.bn is not None:
            x = batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, eps=1e-3)
        return relu(x, inplace=True)

    def fold(self):
        """The normalisation into the convolution: the same function, faster."""
        scale = self.bn.weight.double() / (self.bn.running_var.double() + 1e-3).sqrt()
        shift = self.bn.bias.double() - self.bn.running_mean.double() * scale
        self.conv.weight.data = (self.conv.weight * scale.view(-1, 1, 1, 1)).to(self.conv.weight)
        self.conv.bias, self.bn = nn.Parameter(shift.float(), False), None


average, maximum, halve = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)


class Mixed(nn.Module):
    """Branches side by side, their outputs concatenated. A branch is a list of layers; its convolutions are called
    branch_1, branch_2, ..., a lone one branch. A pair has one input and two outputs: branch_2a, branch_2b."""

    def __init__(self, **branches):
        super().__init__()
        self.branches = list(branches.values())
        for branch, layers in branches.items():
            convs = [layer for layer in layers if layer not in (average, maximum, halve)]
            for i, layer in enumerate(convs, 1):
                name = f'{branch}_{i}' if len(convs) > 1 else branch
                if isinstance(layer, Conv): self.add_module(name, layer)
                else: self.add_module(f'{name}a', layer[0]), self.add_module(f'{name}b', layer[1])

    def forward(self, x):
        outs = []
        for layers in self.branches:
            h = x
            for layer in layers: h = torch.cat([l(h) for l in layer], 1) if isinstance(layer, tuple) else layer(h)
            outs.append(h)
        return torch.cat(outs, 1)


class Inception(nn.Module):
    """The network of inception-2015-12-05, with the parameter names of pytorch-fid's file: uint8 images (N, 3, H, W) ->
    features (N, 2048), logits (N, 1008) without bias, as the inception score takes them."""

    def __init__(self, resize='tf'):
        super().__init__()
        self.resize, self.dim = resize, 2048
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 1, 0)
        for letter, cin, pool in ('b', 192, 32), ('c', 256, 64), ('d', 288, 64):                   # 35 x 35
            self.add_module(f'Mixed_5{letter}', Mixed(
                branch1x1=[Conv(cin, 64, 1)],
                branch5x5=[Conv(cin, 48, 1), Conv(48, 64, 5)],
                branch3x3dbl=[Conv(cin, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)],
                branch_pool=[average, Conv(cin, pool, 1)]))
        self.Mixed_6a = Mixed(branch3x3=[Conv(288, 384, 3, 2, 0)],
                              branch3x3dbl=[Conv(288, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3, 2, 0)],
                              branch_pool=[halve])
        for letter, ch in ('b', 128), ('c', 160), ('d', 160), ('e', 192):                          # 17 x 17
            self.add_module(f'Mixed_6{letter}', Mixed(
                branch1x1=[Conv(768, 192, 1)],
                branch7x7=[Conv(768, ch, 1), Conv(ch, ch, (1, 7)), Conv(ch, 192, (7, 1))],
                branch7x7dbl=[Conv(768, ch, 1), Conv(ch, ch, (7, 1)), Conv(ch, ch, (1, 7)), Conv(ch, ch, (7, 1)),
                              Conv(ch, 192, (1, 7))],
                branch_pool=[average, Conv(768, 192, 1)]))
        self.Mixed_7a = Mixed(branch3x3=[Conv(768, 192, 1), Conv(192, 320, 3, 2, 0)],
                              branch7x7x3=[Conv(768, 192, 1), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1)),
                                           Conv(192, 192, 3, 2, 0)],
                              branch_pool=[halve])
        for letter, cin, pool in ('b', 1280, average), ('c', 2048, maximum):                       # 8 x 8
            self.add_module(f'Mixed_7{letter}', Mixed(
                branch1x1=[Conv(cin, 320, 1)],
                branch3x3=[Conv(cin, 384, 1), (Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1)))],
                branch3x3dbl=[Conv(cin, 448, 1), Conv(448, 384, 3), (Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1)))],
                branch_pool=[pool, Conv(cin, 192, 1)]))
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False)      # stored statistics have no derivative

    def input(self, x):
        """uint8 (N, 3, H, W) -> (N, 3, 299, 299), in the way of --resize"""
        x = x.float()
        if self.resize == 'pytorch-fid': return interpolate(x, (299, 299), mode='bilinear') / 127.5 - 1
        if self.resize == 'clean':      # Pillow's bicubic
            x = interpolate(x, (299, 299), mode='bicubic', antialias=True).clamp(0, 255)
        else:                           # TensorFlow 1: pixel i of 299 lies at i * size / 299, beyond the edge the edge
            x = interpolate(pad(x, (0, 1, 0, 1), 'replicate'), (300, 300), mode='bilinear', align_corners=True)
        return (x[..., :299, :299] - 128) / 128

    def forward(self, x):
        x = self.input(x).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
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


class Digits(nn.Module):
    """A classifier of the glyphs: uint8 images (N, 3, 16, 16) -> features (N, 70), each of variance 1 over the glyphs:
    64 learned, difference of neighbouring pixels and mean of each channel; logits (N, 10)"""

    def __init__(self):
        super().__init__()
        self.dim = 70
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Flatten(), nn.Linear(2048, 64))
        self.norm, self.fc = nn.BatchNorm1d(70, affine=False), nn.Linear(70, 10)

    def forward(self, x):
        x = x.float() / 127.5 - 1
        contrast = x.diff(dim=2).abs().mean((2, 3)) + x.diff(dim=3).abs().mean((2, 3))
        features = self.norm(torch.cat([self.body(x), contrast, x.mean((2, 3))], 1))
        return features, self.fc(features)


def stop(message, code=2):
    """One line on stderr and the exit code: 2 for bad input, 1 for a failed run, 128 + n for signal n. Of several
    processes the first says it; if it has not failed, it does not end the others, and they speak for themselves."""
    rank = int(os.environ.get('RANK', 0))
    if rank and code < 128:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5 + rank)
    if not rank or code < 128: print(f'{METHOD}.py:', *str(message).split(), file=sys.stderr, flush=True)
    sys.exit(code)


def note(text): print(f'{METHOD}.py: {text}', file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading(file, advice=''):
    """Whatever fails in here, while a file of unknown content is read, ends the program with one line about it, without
    the warnings that libraries give before."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: yield
        except Exception as error: stop(f'{file} cannot be read: {type(error).__name__} {str(error)[:300]}{advice}')


def write(path, writer):
    """The whole file or nothing: writer fills a temporary file, which then takes path's place."""
    part = Path(f'{path}.part')
    try:
        with open(part, 'wb') as file: writer(file)
        os.replace(part, path)
    except RuntimeError as error: raise OSError(f'{path}: {error.__context__ or error}')     # torch.save, disk full
    finally: part.unlink(missing_ok=True)


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


WEIGHTS = dict(                         # model: url, sha256
    inception=('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
               'pt_inception-2015-12-05-6726825d.pth',
               '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'),
    dinov2=('https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth',
            'd5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428'))
CIFAR10 = ('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
           'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd')
NVLABS = 'https://nvlabs-fi-cdn.nvidia.com/'    # mu, sigma of whole training sets, EDM's and EDM2's; no hash published
DIGITS = Path('datasets/digits.pt')


def digits():
    """-> Digits, trained on glyphs of another seed than the reference's and kept in ./datasets"""
    torch.manual_seed(0)
    net = Digits()
    if not DIGITS.exists():
        print(f'training a classifier of the digits, to be kept at {DIGITS}', file=sys.stderr, flush=True)
        (images, labels), optimizer = glyphs(seed=1), torch.optim.Adam(net.parameters(), 1e-3)
        for rows in itertools.chain(*(torch.randperm(len(images)).split(128) for _ in range(2))):
            loss = cross_entropy(net(images[rows])[1], labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        DIGITS.parent.mkdir(exist_ok=True)
        write(DIGITS, lambda file: torch.save(net.state_dict(), file))
    with reading(DIGITS, '; delete it to train anew'): net.load_state_dict(torch.load(DIGITS, weights_only=True))
    return net.eval().requires_grad_(False)


def network(cfg):
    """-> the network of --model with its weights, folded; first digits of the sha256 of the weights' file"""
    if cfg.model == 'digits': return digits(), hashlib.sha256(DIGITS.read_bytes()).hexdigest()[:8]
    net = Inception(cfg.resize) if cfg.model == 'inception' else DINOv2()
    url, sha256 = WEIGHTS[cfg.model]
    path = Path(cfg.weights) if cfg.weights else fetch(url, sha256)
    with reading(path): digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256: stop(f'{path} has not the sha256 {sha256} of {url.rsplit("/", 1)[1]}')
    net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
    for layer in net.modules():
        if isinstance(layer, Conv): layer.fold()
    return net.requires_grad_(False).to(memory_format=torch.channels_last), sha256[:8]

# ------------------------------------------------------------------------------------------------------- images

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


def each_image(path, rows=None):
    """The images of a path, or those numbered rows, one by one (50,000 of side 256 are 10 GB): name, PIL Image"""
    if path.suffix.lower() != '.npz':
        names, picture, _ = pictures(path)
        for i in range(len(names)) if rows is None else rows:
            with reading(f'{path}/{names[i]}'): yield names[i], picture(names[i])
        return
    file = zipfile.ZipFile(path).open('arr_0.npy')
    major, minor = np.lib.format.read_magic(file)
    shape, fortran, dtype = getattr(np.lib.format, f'read_array_header_{major}_{minor}')(file)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
        stop(f'{path} holds {dtype} {shape}{" in Fortran order" * fortran}, not uint8 (N, H, W, 3)')
    if math.prod(shape[1:]) > 2**28: raise ValueError(f'images of {shape[1]} x {shape[2]} exceed 256 MB')
    wanted = None if rows is None else set(rows)
    for i in range(shape[0] if rows is None else max(wanted, default=-1) + 1):
        data = file.read(math.prod(shape[1:]))
        if wanted is None or i in wanted: yield i, Image.frombytes('RGB', (shape[2], shape[1]), data)


def survey(path):
    """Looks at all images of a path -> path, n, size [H, W], sha256 of the pixels, meta None (no statistics yet). What
    would make a silent difference ends the program: alpha, 16 bits, CMYK, mixed sizes, floats."""
    path, digests, kinds, size = Path(path), [], Counter(), None
    if not path.exists(): stop(f'there is no {path}')
    with reading(path, '; images are an .npz, a folder or .zip of pictures, or the binary .tar.gz of CIFAR-10'):
        for name, image in each_image(path):
            alpha, deep = 'A' in image.mode or 'transparency' in image.info, ';16' in str(getattr(image, 'tile', ''))
            if image.mode not in ('RGB', 'L', 'P', '1') or alpha or deep:
                kind = image.mode + ' picture' + ' with alpha' * alpha + ' of 16 bits' * deep
                stop(f'{path}/{name} is a {kind}: convert it to 8-bit RGB or grey')
            size = size or image.size
            if image.size != size: stop(f'{path}/{name} is of size {image.size}, those before it {size}')
            with reading(f'{path}/{name}'): digests.append(hashlib.sha256(image.convert('RGB').tobytes()).digest())
            kinds.update([image.format, 'grey' if image.mode in ('L', '1') else 'colour'])
    if len(digests) < 2: stop(f'{path} holds {len(digests)} images: two are the least')
    n, same = len(digests), len(digests) - len(set(digests))
    if same: note(f'{path}: {same} of {n} images are duplicates of another')
    if 'JPEG' in kinds: note(f'{path} holds {kinds["JPEG"]} JPEG: compression changes the distance; use PNG')
    if 'grey' in kinds: note(f'{path}: {kinds["grey"]} grey pictures repeated to 3 channels')
    sha256 = hashlib.sha256(b''.join(digests)).hexdigest()
    return SimpleNamespace(path=path, n=n, size=[size[1], size[0]], sha256=sha256, meta=None)


def load_images(path):
    """All images of a path: uint8 (N, 3, H, W)"""
    images = [np.asarray(image.convert('RGB')) for _, image in each_image(Path(path))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

# --------------------------------------------------------------------------------------------------- statistics

def number(kind, *copy):
    """np.dtype of numbers. One of objects, made from bytes, would hold pointers of the file's choice."""
    if np.dtype(kind).kind not in 'fiu': raise pickle.UnpicklingError(f'it holds {kind}, not numbers')
    return np.dtype(kind, *copy)


class Arrays(pickle.Unpickler):
    """Reads EDM2's statistics, a pickle of dicts of numpy arrays; any other name in it is an error."""

    KNOWN = {
        'numpy.ndarray': np.ndarray, 'numpy.dtype': number,
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
    .pkl -> mu, sigma, features or None, meta, n and size [H, W] or None; None if path is something else"""
    path = Path(path)
    if not path.is_file() or path.suffix not in ('.npz', '.pkl', '.fid'): return None
    with reading(path):
        if path.suffix == '.pkl':
            with open(path, 'rb') as file: found = Arrays(file).load()['fd_dinov2' if model == 'dinov2' else 'fid']
        else: found = np.load(path, allow_pickle=False)
        if not {'mu', 'sigma'} <= set(found): return None
        mu, sigma = (np.asarray(found[k], np.float64) for k in ('mu', 'sigma'))
        meta = dict(json.loads(str(found['meta']))) if 'meta' in found else {}
        features = found['features'] if 'features' in found else None
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        stop(f'{path} holds mu {mu.shape}, sigma {sigma.shape}: not finite statistics')
    way = re.search('_(clean|legacy_pytorch|legacy_tensorflow)_', path.name)       # clean-fid's file names
    if way and not meta: meta['resize'] = dict(clean='clean', legacy_pytorch='pytorch-fid').get(way[1], 'tf')
    return SimpleNamespace(mu=mu, sigma=sigma, features=features, meta=meta, n=meta.get('n'), size=meta.get('size'))


def extract(rank, world, net, images, rows, cfg, features, sums):
    """Process `rank` of `world` fills in its share of the features that are kept (at most 50,000, dim), and the sum of
    the outer products of (1, feature) over its images: 1.28 million features would be 10 GB."""
    device = torch.device('cuda', rank) if torch.cuda.is_available() and cfg.device == 'auto' else torch.device('cpu')
    if world > 1 and device.type == 'cpu': torch.set_num_threads(max(1, os.cpu_count() // world))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    net, batch = net.to(device), cfg.batch or (8 if device.type == 'cpu' else 128)
    start, told, source = time.time(), time.time(), each_image(images.path, rows[rank::world])
    every, total = math.ceil(len(rows) / len(features)), sums[rank].to(device)
    for first in range(rank, len(rows), world * batch):
        mine = range(first, len(rows), world)[:batch]
        x = torch.from_numpy(np.stack([np.asarray(next(source)[1].convert('RGB')) for _ in mine]))
        with torch.inference_mode():
            x = net(x.to(device).permute(0, 3, 1, 2))[0]
            ones = pad(x.double(), (1, 0), value=1.0)
            total.addmm_(ones.T, ones)
            for i, feature in zip(mine, x.cpu()):
                if i % every == 0: features[i // every] = feature
        done = min(mine[-1] + world, len(rows))
        if rank == 0 and (done == len(rows) or time.time() > told + 20):
            told, pace = time.time(), done / (time.time() - start)
            note(f'{images.path}: {done} of {len(rows)} images, {pace:.1f}/s, {(len(rows) - done) / pace:.0f} s left')
    sums[rank] = total


def statistics(images, num, net, weights, cfg):
    """What read_statistics returns, of num of the images (0: all), kept beside them; features of 50,000 at most"""
    n = num or images.n
    rows = np.sort(np.random.RandomState(0).permutation(images.n)[:n])         # EDM's choice of a subset
    cache = Path(f'{images.path}.{"-".join(filter(None, (cfg.model, cfg.resize)))}.fid')
    meta = dict(format=2, model=cfg.model, resize=cfg.resize, weights=weights, n=n, of=images.n, size=images.size,
                sha256=images.sha256)
    found = read_statistics(cache)
    if found and meta.items() <= found.meta.items(): return found
    features = torch.zeros(len(range(0, n, math.ceil(n / 50_000))), net.dim).share_memory_()
    sums = torch.zeros(cfg.gpus, net.dim + 1, net.dim + 1, dtype=torch.float64).share_memory_()
    job = cfg.gpus, net, images, rows, cfg, features, sums
    if cfg.gpus == 1: extract(0, *job)
    else: torch.multiprocessing.spawn(extract, job, cfg.gpus)
    sums = sums.sum(0).numpy()
    if not np.isfinite(sums).all(): stop(f'{images.path}: the network returns NaN', 1)
    meta |= dict(source=str(images.path), cov='n-1', date=time.strftime('%Y-%m-%d'), torch=torch.__version__)
    mu = sums[0, 1:] / n
    found = dict(mu=mu, sigma=(sums[1:, 1:] - n * np.outer(mu, mu)) / (n - 1), features=features.numpy())
    if os.access(cache.parent, os.W_OK): write(cache, lambda file: np.savez(file, meta=json.dumps(meta), **found))
    else: note(f'{cache.parent} is read-only: the statistics of {images.path} are not kept')
    return SimpleNamespace(meta=meta, n=n, size=images.size, **found)

# --------------------------------------------------------------------------------------------------- comparison

def reference(cfg, size):
    """Settles --model and --resize -> name of the reference, if 50,000 samples are due, its images or statistics"""
    name = cfg.ref or {16: 'glyphs', 32: 'cifar10', 64: 'imagenet64'}.get(size[0])
    if not name: stop(f'the samples are {size[1]} x {size[0]}: name what to compare them with by --ref')
    cfg.model = cfg.model or ('digits' if size == [16, 16] and name == 'glyphs' and not cfg.weights else 'inception')
    if cfg.model != 'inception': cfg.resize = ''
    if cfg.model == 'digits' and (size != [16, 16] or cfg.weights):
        stop('--model digits is for images of 16 x 16, and trains its own weights')
    path, named = name, name in ('glyphs', 'cifar10', 'imagenet64') and not Path(name).exists()
    if named and name == 'glyphs':
        path = Path('datasets/glyphs.npz')
        path.parent.mkdir(exist_ok=True)
        write(path, lambda file: np.savez(file, glyphs()[0].permute(0, 2, 3, 1)))
    elif named and cfg.resize == 'tf':
        path = fetch(NVLABS + dict(cifar10='edm/fid-refs/cifar10-32x32.npz',
                                   imagenet64='edm2/dataset-refs/img64.pkl')[name])
    elif named: path = fetch(*CIFAR10) if name == 'cifar10' else Path('datasets/img64.zip')
    elif '://' in name: path = fetch(name)
    found = read_statistics(path, cfg.model)
    published = named and name != 'glyphs' or bool(found and 'weights' not in found.meta)
    return name, published, found or survey(path)


def compatible(meta, path, cfg, weights):
    """Ends the program if statistics were made in another way than these flags say."""
    for key, here in dict(model=cfg.model, resize=cfg.resize, weights=weights).items():
        if meta.get(key, here) != here: stop(f'{path} was made with {key} {meta[key]}, not {here}')
    if not {'weights', 'resize'} & set(meta):
        note(f'{path} does not say how it was made: assumed {cfg.model} {cfg.resize}')


def evaluate(sample, reference, net, cfg):
    """-> {column: value}; a metric without its input is None"""
    x, y, mu, sigma = sample.features, reference.features, reference.mu, reference.sigma
    if sample.mu.shape != mu.shape:
        stop(f'the reference has {len(mu)} features, the samples {len(sample.mu)}: not of one network')
    kind = dict(inception='FID', dinov2='FD-DINOv2', digits='FD-digits')[cfg.model]
    row = {kind: frechet(sample.mu, sample.sigma, mu, sigma)}
    if kind == 'FD-digits':
        row |= dict.fromkeys('sure share_min share_max colour_min colour_max'.split())
        if x is not None:
            p = net.fc(torch.from_numpy(x)).softmax(1)
            shares = p.argmax(1).bincount(minlength=10) / len(p)
            spread = np.sqrt(np.diag(sample.sigma) / np.diag(sigma))[-3:]
            row |= dict(sure=(p.amax(1) > 0.5).float().mean().item(), share_min=shares.min().item(),
                        share_max=shares.max().item(), colour_min=spread.min(), colour_max=spread.max())
        return row | dict(n=sample.n)
    row[f'{kind}_inf'] = frechet_inf(x, mu, sigma) if x is not None and len(x) >= 10_000 else None
    if kind == 'FID': row['IS'] = inception_score(x, net.fc.weight) if x is not None and len(x) >= 10 else None
    both = x is not None and y is not None and min(len(x), len(y)) > 3
    row['KID x1000' if kind == 'FID' else 'KD x1000'] = 1000 * kernel_distance(x, y) if both else None
    row['precision'], row['recall'] = precision_recall(y, x) if both else (None, None)
    return row | dict(n=sample.n)


def table(rows):
    """Aligned text of [{column: [values]}]: mean, and sd and minimum where there are several; * marks the best."""
    columns = [c for c in rows[0] if any(row[c] != [None] * len(row[c]) for row in rows)]
    equal = len(rows) > 1 and len({n for row in rows for n in row['n']}) == 1

    def cell(row, c):
        values = row[c]
        if c in ('model', 'n'): return ' '.join(dict.fromkeys('-' if v is None else str(v) for v in values))
        if None in values: return '-'
        text, means = f'{np.mean(values):.3f}', [np.mean(r[c]) for r in rows if None not in r[c]]
        if len(values) > 1: text += f' +- {np.std(values, ddof=1):.3f} (min {min(values):.3f})'
        if not equal or c.startswith(('share', 'colour')): return text
        best = max(means) if c in ('IS', 'precision', 'recall', 'sure') else min(means)
        return text + ('*' if np.mean(values) == best else ' ')
    grid = [columns, *([cell(row, c) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    return '\n'.join('  '.join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:]))]).rstrip()
                     for line in grid)


def sheet(rows, path):
    """Contact sheet: the first 16 images of each row, {name: what survey returns}, small ones enlarged."""
    font, gap, size = ImageFont.load_default(size=15), 6, next(iter(rows.values())).size
    height, width = (side * max(1, 48 // size[0]) for side in size)
    left = max(int(font.getlength(name)) for name in rows) + 3 * gap
    canvas = Image.new('RGB', (left + 16 * width, len(rows) * (height + gap) + gap), 'white')
    for y, (name, images) in zip(itertools.count(gap, height + gap), rows.items()):
        ImageDraw.Draw(canvas).text((left - 2 * gap, y + height // 2), name, 'black', font, anchor='rm')
        for i, (_, image) in enumerate(each_image(images.path, range(min(16, images.n)))):
            canvas.paste(image.convert('RGB').resize((width, height), Image.NEAREST), (left + i * width, y))
    write(path, lambda file: canvas.save(file, 'PNG'))


def read_log(path):
    """log.csv -> its rows, [{column: value}], with the network passes so far of a batch: a backward pass is two"""
    costs, passes, last = {'diffusion': 3, 'stage 2': 5, 'scd': 5, 'cd': 6}, 0, 0          # of a step; of others 4
    with reading(path), open(path, newline='') as file:
        rows = [dict(phase=row['phase'], **{k: float(row[k]) for k in ('step', 'loss', 'grad_norm')})
                for row in csv.DictReader(file)]
    for row in rows:
        passes, last = passes + costs.get(row['phase'], 4) * (row['step'] - last), row['step']
        row['passes'] = passes
    return rows


def curves(logs, path):
    """Loss and gradient norm of {name: rows of log.csv} against network passes, logarithmic; lines break where a phase,
    so the loss, ends."""
    font, (width, height, left, gap) = ImageFont.load_default(size=14), (640, 300, 64, 30)
    canvas = Image.new('RGB', (left + width + gap, 2 * (height + gap) + gap + 24 * len(logs)), 'white')
    draw, colours = ImageDraw.Draw(canvas), '#1f6fb4 #d95f02 #1b8a5a #a6306e #7a5195 #8c6d1f #444444 #17a2b8'.split()
    last = max((row['passes'] for rows in logs.values() for row in rows), default=1)
    for y0, column in ((gap, 'loss'), (2 * gap + height, 'grad_norm')):
        shown = lambda row: 0 < row[column] < math.inf
        values = [row[column] for rows in logs.values() for row in rows if shown(row)] or [1.0]
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
        place = lambda passes, v: (left + width * passes / last, y0 + height * (high - math.log10(v)) / (high - low))
        draw.text((left, y0 - 4), column, 'black', font, anchor='lb')
        for power in range(low, high + 1):
            y = place(0, 10.0 ** power)[1]
            draw.line((left, y, left + width, y), '#dddddd')
            draw.text((left - 8, y), f'{10.0 ** power:g}', 'black', font, anchor='rm')
        for colour, rows in zip(itertools.cycle(colours), logs.values()):
            for _, phase in itertools.groupby(rows, lambda row: row['phase']):
                points = [place(row['passes'], row[column]) for row in phase if shown(row)]
                if len(points) > 1: draw.line(points, colour, 2)
        draw.text((left + width, y0 + height + 4), f'{last:g} network passes', 'black', font, anchor='rt')
    for i, (colour, name) in enumerate(zip(itertools.cycle(colours), logs)):
        draw.text((left, y0 + height + gap + 24 * i), name, colour, font, anchor='lt')
    write(path, lambda file: canvas.save(file, 'PNG'))

# ------------------------------------------------------------------------------------------------- command line

def config(argv):
    parser = argparse.ArgumentParser('fid.py', allow_abbrev=False)
    parser.error = lambda message: stop(f'{message}; see --help')
    add = parser.add_argument
    add('paths', nargs='+', help='samples: .npz, .zip, a folder of pictures, a run folder (its samples.npz)')
    add('--ref', default='', help='cifar10, imagenet64, glyphs [by size], or images or statistics by path or URL')
    add('--num', type=int, default=0, help='images of each; fewer are an error [published reference: 50000, else all]')
    add('--model', default='', choices=('inception', 'dinov2', 'digits'), help='[digits for glyphs, else inception]')
    add('--weights', '--inception', default='', help='weight file of the model [in ./datasets, or downloaded there]')
    add('--resize', default='tf', choices=('tf', 'pytorch-fid', 'clean'), help='convention of inception [tf]')
    add('--mean', action='store_true', help='files of one folder are samples of one model: mean, sd, minimum')
    add('--json', action='store_true', help='print JSON')
    add('--out', default='fid', help='pictures of a comparison: <out>-samples.png, <out>-curves.png from log.csv [fid]')
    add('--gpus', type=int, default=1, help='processes, one per GPU')
    add('--device', default='auto', choices=('auto', 'cpu'))
    add('--batch', type=int, default=0, help='images at once [128 on a GPU, 8 on the CPU, which is fastest]')
    cfg = parser.parse_args(argv)
    if cfg.num < 0 or cfg.batch < 0 or cfg.gpus < 1: stop('--num, --batch and --gpus must be positive')
    if cfg.gpus > max(1, torch.cuda.device_count()) and cfg.device == 'auto':
        stop(f'--gpus {cfg.gpus}: this machine has {torch.cuda.device_count()}; --device cpu runs them on the CPU')
    return cfg


def main(argv=None):
    cfg = config(argv)
    paths = [str(Path(p, 'samples.npz')) if Path(p, 'latest.pt').exists() else p for p in dict.fromkeys(cfg.paths)]
    samples = {p: read_statistics(p, cfg.model) or survey(p) for p in paths}
    ref_name, published, ref = reference(cfg, next((s.size for s in samples.values() if s.size), [32, 32]))
    named, num = samples | {ref_name: ref}, cfg.num or 50_000 * published
    sizes = {tuple(s.size): f'{name} {s.size[1]} x {s.size[0]}' for name, s in named.items() if s.size}
    if len(sizes) > 1: stop(f'these are not of one size: {", ".join(sizes.values())}')
    few, path = min((num if s.n is None else s.n, path) for path, s in samples.items())
    if few < num: stop(f'{path} holds {few} images, fewer than {num}: make more, or lower --num')
    if (num or few) < 2048: note(f'{num or few} images bias the distance upwards: compare equal numbers only')
    net, weights = network(cfg)
    for name, found in named.items():
        if found.meta is not None: compatible(found.meta, name, cfg, weights)
    target = statistics(ref, 0, net, weights, cfg) if ref.meta is None else ref
    models, shown = {}, {}
    for path, found in samples.items():
        name = str(Path(path).parent) if cfg.mean else path.removesuffix('/samples.npz')
        if found.meta is None:
            shown.setdefault(name, found)
            found = statistics(found, num, net, weights, cfg)
        for column, value in evaluate(found, target, net.cpu(), cfg).items():
            models.setdefault(name, dict(model=[name])).setdefault(column, []).append(value)
    rows = list(models.values())
    about = dict(reference=ref_name, reference_n=target.n, model=cfg.model, weights=weights, resize=cfg.resize)
    if cfg.json: print(json.dumps(about | dict(models=rows), indent=1))
    else: print(table(rows), ', '.join(f'{k} {v}' for k, v in about.items() if v), sep='\n')
    if len(rows) == 1: return
    logs = {name: images.path.parent / 'log.csv' for name, images in shown.items()}
    logs = {name: read_log(log) for name, log in logs.items() if log.exists()}
    if logs: curves(logs, f'{cfg.out}-curves.png')
    if ref.meta is None: shown['reference'] = ref
    if shown: sheet(shown, f'{cfg.out}-samples.png')
    print('pictures:', f'{cfg.out}-samples.png' * bool(shown), f'{cfg.out}-curves.png' * bool(logs), file=sys.stderr)


if __name__ == '__main__':
    try: main()
    except OSError as error: stop(error, 1)
    except torch.OutOfMemoryError as error: stop(f'out of GPU memory, lower --batch: {error}', 1)
