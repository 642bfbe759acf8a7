# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy", "pillow>=10.1"]
# ///
"""
fid.py  Frechet inception distance (Heusel et al. 2017, arXiv:1706.08500) and its companions, as the papers
print them; and the place where pictures are read: --pack makes the data file of a training run of them.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

between Gaussians fitted to the 2048 pooled features of the Inception network of 2015 for 50,000 samples and for
a reference; lower is better. In the same pass: FID_inf, its limit for endless samples, extrapolated in 1/n
(Chong and Forsyth 2020; from 10,000 samples on); the inception score (Salimans et al. 2016; 10 splits in order);
KID x 1000 (Binkowski et al. 2018; 100 subsets of 1000); precision and recall (Kynkaanniemi et al. 2019; k = 3,
in the same features, not VGG's). With a published reference, of mu and sigma only, the last three are left out.

    python fid.py --pack photos                         # a folder or .zip of pictures -> datasets/photos.pt
    python fid.py runs/*/samples.npz                    # each against the data that its run was trained on
    python fid.py samples.npz --ref photos --num 10000  # a folder, .zip, .npz, .pt, or published statistics
    python fid.py a/0.npz a/1.npz a/2.npz --mean        # one model: mean, sd and minimum, which EDM reports

Samples of the embedded digits are compared with digits, in closed form: FD-digits is the same distance in 35
features of variance 1 (class Digits). sure: share of samples that look like one digit. share_min, share_max: of
the rarest and the commonest digit, 0.1 in the data. colour_min, colour_max: standard deviation of the mean
colour over the data's, of the least and the most varied channel.

Conventions are those of EDM, EDM2, ECT, TCM and ADM: TensorFlow 1's bilinear resize to 299, (x - 128) / 128,
covariance over n - 1, statistics in float64. Where codes differ:
- Here the network is in true float32. ECT's main branch and TCM also switch TF32 off; EDM's and EDM2's
  evaluators set no flag, so that convolutions on a GPU may use it.
- pytorch-fid resizes on PyTorch's grid and scales to [-1, 1], clean-fid resizes by an antialiased bicubic:
  --resize pytorch-fid, --resize clean. The figures are not comparable, and mixing is refused.
- EDM, ECT, pytorch-fid take scipy's sqrtm of S_1 S_2, complex and off by 4e-4 if n < 2048. We take the singular
  values of A_1^T A_2, S_i = A_i A_i^T: real, exact. ECT and TCM divide by n: 2e-5 of the traces at n = 50,000.
- imagenet64 is EDM2's statistics of all training images. CT's FIDs on ImageNet-64 are of ADM's evaluator and
  reference batch: --ref VIRTUAL_imagenet64_labeled.npz.
- Our scripts sample all classes in turn, so equally often; theirs draw the class of each sample at random.
"""
import argparse, contextlib, csv, functools, glob, hashlib, io, itertools, json, math, os, pickle, re, sys
import tarfile, time, zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.functional import affine_grid, avg_pool2d, batch_norm, grid_sample, interpolate, pad, relu
from torch.nn.utils.fusion import fuse_conv_bn_weights

METHOD = Path(__file__).stem

# -------------------------------------------------------------------------------------------------- distances

def frechet(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians, means (D,), covariances (D, D), which may be singular:
    tr (S1 S2)^(1/2) is the sum of the singular values of A1^T A2, S = A A^T. Eigenvalues that are rounding are
    dropped in each S; dropping those of the product would not be harmless."""
    def root(sigma):
        w, v = np.linalg.eigh(sigma)
        keep = w > w[-1] * len(w) * np.finfo(np.float64).eps
        return v[:, keep] * np.sqrt(w[keep])
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    product = root(sigma1).T @ root(sigma2)
    cross = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def gaussian(features):
    """Features (N, D) -> mean (D,), covariance (D, D) in float64, in blocks: 50,000 are 0.8 GB in float64."""
    mu = features.mean(0, dtype=np.float64)
    blocks = (b - mu for b in np.array_split(features, len(features) // 2000 + 1))
    return mu, sum(b.T @ b for b in blocks) / (len(features) - 1)


def frechet_inf(features, mu, sigma):
    """Limit of the distance for endless samples, the reference (mu, sigma) fixed: the intercept of a line in
    1/n through 15 random subsets of 5000 to all of the features (N, D)."""
    rng, sizes = np.random.RandomState(0), np.linspace(5000, len(features), 15).astype(int)
    subsets = (features[rng.choice(len(features), size, replace=False)] for size in sizes)
    return float(np.polyfit(1 / sizes, [frechet(*gaussian(s), mu, sigma) for s in subsets], 1)[1])


def inception_score(features, weight):
    """exp of the mean KL divergence between the classes' probabilities of an image and of all, of 10 splits."""
    def one(x):
        p = (torch.from_numpy(x).double() @ weight.double().T).log_softmax(1)
        return (p.exp() * (p - p.logsumexp(0) + math.log(len(p)))).sum(1).mean().exp().item()
    n = len(features)
    return float(np.mean([one(features[n * i // 10:n * (i + 1) // 10]) for i in range(10)]))


def kernel_distance(x, y):
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3: mean over 100 pairs of random
    subsets of the features x (N, D), y (M, D)."""
    rng, m = np.random.RandomState(0), min(1000, len(x), len(y))
    def one():
        a, b = (torch.from_numpy(v[rng.choice(len(v), m, replace=False)]).double() for v in (x, y))
        aa, bb, ab = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        return ((aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (m * (m - 1)) - 2 * ab.mean()).item()
    return float(np.mean([one() for _ in range(100)]))


def precision_recall(real, fake, k=3):
    """Share of fake within the k-neighbour balls of real, and the reverse."""
    real, fake = torch.from_numpy(real), torch.from_numpy(fake)
    def covered(x, y):                  # share of x in the balls of y, whose centres are their own neighbours
        radius = torch.cat([torch.cdist(b, y).topk(k + 1, largest=False).values[:, k] for b in y.split(1000)])
        inside = torch.cat([(torch.cdist(b, y) <= radius).any(1) for b in x.split(1000)])
        return float(inside.double().mean())
    return covered(fake, real), covered(real, fake)

# --------------------------------------------------------------------------------------------------- Inception

class Conv(nn.Module):
    """Convolution, batch normalisation by stored statistics, ReLU."""

    def __init__(self, cin, cout, size, stride=1, padding='same'):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, size, stride, padding, bias=False)
        names = 'weight', 'bias', 'running_mean', 'running_var'
        self.bn = nn.ParameterDict({name: torch.ones(cout) for name in names})

    def forward(self, x):
        x, bn = self.conv(x), self.bn
        if bn is not None: x = batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-3)
        return relu(x, inplace=True)

    def fold(self):
        """The normalisation into the convolution: the same function, faster."""
        self.conv.weight, self.conv.bias = fuse_conv_bn_weights(
            self.conv.weight, None, self.bn.running_mean, self.bn.running_var, 1e-3, self.bn.weight, self.bn.bias)
        self.bn = None


average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
maximum, halve = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)


class Mixed(nn.Module):
    """Branches side by side, their outputs concatenated. A branch is a list of layers; its convolutions are
    called branch_1, branch_2, ..., a lone one branch. A pair of convolutions shares its input, and both outputs
    count: branch_2a, branch_2b."""

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
            for layer in layers:
                h = torch.cat([one(h) for one in layer], 1) if isinstance(layer, tuple) else layer(h)
            outs.append(h)
        return torch.cat(outs, 1)


class Inception(nn.Module):
    """The network of inception-2015-12-05, with the parameter names of pytorch-fid's file: uint8 images
    (N, 3, H, W) -> features (N, 2048), logits (N, 1008) without bias, as the inception score takes them."""

    def __init__(self, resize='tf'):
        super().__init__()
        self.resize = resize
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 1, 0)
        for letter, cin, pool in ('b', 192, 32), ('c', 256, 64), ('d', 288, 64):        # 35 x 35
            self.add_module(f'Mixed_5{letter}', Mixed(
                branch1x1=[Conv(cin, 64, 1)],
                branch5x5=[Conv(cin, 48, 1), Conv(48, 64, 5)],
                branch3x3dbl=[Conv(cin, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)],
                branch_pool=[average, Conv(cin, pool, 1)]))
        self.Mixed_6a = Mixed(
            branch3x3=[Conv(288, 384, 3, 2, 0)],
            branch3x3dbl=[Conv(288, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3, 2, 0)],
            branch_pool=[halve])
        for letter, ch in ('b', 128), ('c', 160), ('d', 160), ('e', 192):               # 17 x 17
            self.add_module(f'Mixed_6{letter}', Mixed(
                branch1x1=[Conv(768, 192, 1)],
                branch7x7=[Conv(768, ch, 1), Conv(ch, ch, (1, 7)), Conv(ch, 192, (7, 1))],
                branch7x7dbl=[Conv(768, ch, 1), Conv(ch, ch, (7, 1)), Conv(ch, ch, (1, 7)),
                              Conv(ch, ch, (7, 1)), Conv(ch, 192, (1, 7))],
                branch_pool=[average, Conv(768, 192, 1)]))
        self.Mixed_7a = Mixed(
            branch3x3=[Conv(768, 192, 1), Conv(192, 320, 3, 2, 0)],
            branch7x7x3=[Conv(768, 192, 1), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1)),
                         Conv(192, 192, 3, 2, 0)],
            branch_pool=[halve])
        for letter, cin, pool in ('b', 1280, average), ('c', 2048, maximum):            # 8 x 8
            self.add_module(f'Mixed_7{letter}', Mixed(
                branch1x1=[Conv(cin, 320, 1)],
                branch3x3=[Conv(cin, 384, 1), (Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1)))],
                branch3x3dbl=[Conv(cin, 448, 1), Conv(448, 384, 3),
                              (Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1)))],
                branch_pool=[pool, Conv(cin, 192, 1)]))
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False)      # stored statistics have no derivative

    def input(self, x):
        """uint8 (N, 3, H, W) -> (N, 3, 299, 299), in the way of --resize"""
        x = x.float()
        if self.resize == 'pytorch-fid': return interpolate(x, (299, 299), mode='bilinear') / 127.5 - 1
        if self.resize == 'clean':      # Pillow's bicubic
            x = interpolate(x, (299, 299), mode='bicubic', antialias=True).clamp(0, 255)
        else:                           # TensorFlow 1: pixel i of 299 lies at i * size / 299, or on the edge
            x = pad(x, (0, 1, 0, 1), 'replicate')
            x = interpolate(x, (300, 300), mode='bilinear', align_corners=True)[..., :299, :299]
        return (x - 128) / 128

    def forward(self, x):
        x = self.input(x).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return x, x @ self.fc.weight.T


# ----------------------------------------------------------------------------------------------------- digits

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


def principal(rows, count):
    """(n, D) -> orthonormal directions (D, count) in which these rows are largest"""
    return torch.linalg.eigh(rows.T @ rows)[1][:, -count:]


def centred(images):
    """uint8 (n, 3, 16, 16) -> float64 (n, 3, 256), each channel without its mean"""
    x = images.double().flatten(2)
    return x - x.mean(2, keepdim=True)


def outline(images):
    """uint8 (n, 3, 16, 16) -> float64 (n, 256), the sum of the channels, of length 1; 0 for one colour"""
    x = centred(images).sum(1)
    return x / (x.norm(dim=1, keepdim=True) + 1)


class Digits:
    """Judges images of 16 x 16 by the embedded digits, without training. A channel of a glyph, less its mean, is
    one outline, of class and pose, times a contrast above 0, and the outlines of a class lie near a plane
    through 0, here of 6 dimensions: the principal directions of 2000 glyphs."""

    def __init__(self):
        images, labels = glyphs(seed=1)                         # the reference has seed 0
        outlines = outline(images)
        of_class = [outlines[labels == digit] for digit in range(10)]
        self.means = torch.stack([rows.mean(0) for rows in of_class], 1)                # (256, 10)
        self.planes = torch.cat([principal(rows, 6) for rows in of_class], 1)           # (256, 60)
        self.centre = outlines.mean(0)
        self.axes = principal(outlines - self.centre, 16)                               # (256, 16)
        self.reference = self.features(glyphs()[0])

    def left(self, images):
        """Share of an image's variance that the plane of each class leaves: (n, 10). 1 for one colour, and for
        a negative of the class."""
        x = centred(images)
        found = (x @ self.planes).square().sum(1).view(len(x), 10, 6).sum(2)
        left = 1 - found / (x.square().sum((1, 2))[:, None] + 1)
        return torch.where(x.sum(1) @ self.means > 0, left, 1)

    def features(self, images):
        """uint8 (n, 3, 16, 16) -> float64 (n, 35): 16 principal components of the outline (pose, variety, blur);
        belief in each class, of sum 1 (which digits, half-formed ones); standard deviation, grain and mean of
        each channel (contrast, noise, colour)."""
        parts = []
        for some in images.split(5000):
            belief, x = self.left(some).clamp(min=1e-6)**-2, some.double()
            grain = x.diff(dim=2).abs().mean((2, 3)) + x.diff(dim=3).abs().mean((2, 3))
            parts.append(torch.cat([(outline(some) - self.centre) @ self.axes, belief / belief.sum(1, keepdim=True),
                                    x.std((2, 3)), grain, x.mean((2, 3))], 1))
        return torch.cat(parts)

    def judge(self, images):
        """uint8 (n, 3, 16, 16) -> {column of the table: value}. An image is sure to be of its best class if the
        plane of that leaves less than 0.15, and less than half of what the plane of the next leaves."""
        left, order = torch.cat([self.left(some) for some in images.split(5000)]).sort(1)
        shares = order[:, 0].bincount(minlength=10) / len(images)
        sure = ((left[:, 0] < 0.15) & (left[:, 0] < left[:, 1] / 2)).double().mean()
        scale = self.reference.std(0)
        features, reference = ((v / scale).numpy() for v in (self.features(images), self.reference))
        colour = features[:, -3:].std(0)
        row = dict(sure=sure, share_min=shares.min(), share_max=shares.max(),
                   colour_min=colour.min(), colour_max=colour.max())
        return {'FD-digits': frechet(*gaussian(features), *gaussian(reference)),
                **{name: value.item() for name, value in row.items()}}

# --------------------------------------------------------------------------------------------------- pictures

Image.init()
FORMATS = [kind for kind in 'PNG JPEG WEBP AVIF BMP GIF TIFF'.split() if kind in Image.OPEN]    # AVIF: Pillow 11.3
SUFFIXES = '.png .jpg .jpeg .jfif .mpo .webp .avif .bmp .gif .tif .tiff'.split()
NEEDED = '; images are in a folder, .zip, .npz of arr_0 (N, H, W, 3), .pt, or the binary .tar.gz of CIFAR-10'


def stop(message, code=2):
    """Ends the program with one line on stderr: code 2 for bad input, 1 for a failure."""
    print(f'{METHOD}.py:', *str(message).split(), file=sys.stderr, flush=True)
    sys.exit(code)


def note(text): print(f'{METHOD}.py: {text}', file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading(file, advice=''):
    """Whatever fails in here, where a file of unknown content is read, ends the program with one line."""
    try: yield
    except Exception as error:
        stop(f'{file} cannot be read: {type(error).__name__} {str(error)[:300]}{advice}')


@contextlib.contextmanager
def written(path):
    """An open file, which takes path's place when it is complete. Several processes may write one path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
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


def pieces(n, name):
    """Ranges of at most 1000 numbers that make up range(n). Says now and then how far it is."""
    start = told = time.time()
    for first in range(0, n, 1000):
        piece = range(first, min(first + 1000, n))
        yield piece
        if time.time() > told + 20:
            told, done = time.time(), piece.stop
            note(f'{name}: {done} of {n} images, {(told - start) * (n / done - 1):.0f} s left')


def files_of(path):
    """Names of the files in a folder or .zip, in order, and a function that reads one. Hidden files and folders
    do not count, linked ones do; nothing of an archive is written anywhere."""
    if path.is_dir():
        found = {name: path / name for name in glob.glob('**', root_dir=path, recursive=True)}
        places = {name.replace(os.sep, '/'): file for name, file in found.items()
                  if file.is_file() or not file.exists()}                       # a link that leads nowhere is named
        read = Path.read_bytes
    else:
        archive = zipfile.ZipFile(path)
        places, read = {name.replace('\\', '/'): name for name in archive.namelist()}, archive.read
    names = sorted(name for name in places if '/.' not in f'/{name}' and name[-1] != '/')
    return names, lambda name: read(places[name])


def folder_labels(names):
    """Labels (N,) of pictures by their folders, on the first level that has several, in order of their names, -1
    for pictures beside these; {class: label}, empty if all pictures lie together"""
    folders = [PurePosixPath(name).parent.parts for name in names]
    for level in itertools.zip_longest(*folders, fillvalue=''):
        classes = {folder: i for i, folder in enumerate(sorted(set(level) - {''}))}
        if len(classes) > 1: return [classes.get(folder, -1) for folder in level], classes
    return [-1] * len(names), {}


def listed_labels(names, tables):
    """Labels (N,) that EDM's dataset.json gives to pictures, -1 where it gives none. tables: {its name: content}.
    It may lie in any folder; the names in it are relative to that."""
    listed = [(str(PurePosixPath(table).parent / name), label) for table, content in tables.items()
              for name, label in json.loads(content)['labels'] or []]
    labels = dict(listed)
    if len(labels) < len(listed): raise ValueError('dataset.json gives a picture two labels')
    return [labels.get(name, -1) for name in names], {}


def arrays(path):
    """An .npz (arr_0, arr_1), a .pt (images, labels), which stays on the disk, or CIFAR-10's binary .tar.gz ->
    images uint8 (N, 3, H, W), labels (N,) or None"""
    if path.suffix == '.pt':
        images, labels = torch.load(path, mmap=True, weights_only=True)
        images, labels = images.numpy(), None if labels is None else labels.numpy()
    elif path.suffix == '.npz':
        file = np.load(path)
        images, labels = file['arr_0'], file['arr_1'] if 'arr_1' in file else None
        if images.ndim == 4: images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    else:
        with tarfile.open(path) as archive:
            batches = sorted((m for m in archive if Path(m.name).match('data_batch_*.bin')), key=lambda m: m.name)
            if not batches: raise ValueError('it holds no data_batch_*.bin: take the binary version of CIFAR-10')
            data = b''.join(archive.extractfile(m).read() for m in batches)
            while archive.fileobj.read(2**20): pass             # to its end, where gzip's checksum is
        rows = np.frombuffer(data, np.uint8).reshape(-1, 3073)
        images, labels = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.size:
        raise ValueError(f'its images are {images.dtype} {images.shape}')
    return images, labels


def pictures(path):
    """What a path holds -> its path; names, in order; picture(name), a PIL Image; labels(), labels (N,) or None
    and {class: label}; others, the kinds of other files, counted; images (N, 3, H, W) or None, if decoded yet"""
    path = Path(path)
    if not path.exists(): stop(f'there is no {path}')
    if path.suffix in ('.gz', '.npz', '.pt') and path.is_file():
        images, labels = arrays(path)
        return SimpleNamespace(path=path, names=range(len(images)), images=images, labels=lambda: (labels, {}),
                               picture=lambda i: Image.fromarray(images[i].transpose(1, 2, 0)), others={})
    files, read = files_of(path)
    names = [name for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES]
    tables = [name for name in files if PurePosixPath(name).name == 'dataset.json']
    if not names: raise ValueError(f'it holds no pictures ({" ".join(SUFFIXES)})')

    def labels(): return listed_labels(names, {t: read(t) for t in tables}) if tables else folder_labels(names)
    return SimpleNamespace(
        path=path, names=names, images=None, labels=labels,
        picture=lambda name: Image.open(io.BytesIO(read(name)), formats=FORMATS),
        others=Counter(PurePosixPath(name).suffix or name for name in set(files) - set(names) - set(tables)))


def crop(image, res):
    """ADM's crop: halved by a box filter while twice too large, then bicubic to the shorter side, its middle."""
    while min(image.size) >= 2 * res: image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = res / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - res) // 2, (image.height - res) // 2
    return image.crop((left, top, left + res, top + res))


def pixels(image, res):
    """PIL Image -> uint8 (3, res, res): held as the camera was, on white where it is transparent, cropped"""
    if image.mode[0] in 'IF' or ';16' in str(getattr(image, 'tile', '')):
        raise ValueError(f'it is a {image.mode} picture of more than 8 bits: convert it to 8-bit RGB or grey')
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    return np.asarray(crop(image.convert('RGB'), res)).transpose(2, 0, 1)


def side_of(found):
    """The shorter side of the first picture"""
    with reading(f'{found.path}/{found.names[0]}'): return min(found.picture(found.names[0]).size)


def decoded(found, res):
    """All pictures -> uint8 (N, 3, res, res), several at once, in no more memory than that"""
    n, sizes = len(found.names), Counter()
    if found.images is not None and found.images.shape[2:] == (res, res): return torch.from_numpy(found.images)
    images = np.empty((n, 3, res, res), np.uint8)

    def fill(i):
        picture = found.picture(found.names[i])
        images[i] = pixels(picture, res)
        return picture.size
    with ThreadPoolExecutor() as pool:
        for piece in pieces(n, found.path):
            filled = pool.map(fill, piece)
            for i in piece:
                with reading(f'{found.path}/{found.names[i]}'): sizes[next(filled)] += 1
    other, small = n - sizes[res, res], sum(sizes[size] for size in sizes if min(size) < res)
    if other: note(f'{found.path}: {other} of {n} pictures cropped and resized to {res} x {res}, {small} enlarged')
    return torch.from_numpy(images)


def load_images(path, res=0):
    """All images of a path: uint8 (N, 3, res, res); 0: the shorter side of the first one"""
    with reading(path, NEEDED): found = pictures(path)
    return decoded(found, res or side_of(found))


def labels_of(found):
    """-> labels int64 (N,) or None, and what to say about them. Numbers that are left out are an error."""
    labels, classes = found.labels()
    labels = np.array([-1] if labels is None else labels).astype(np.int64, casting='safe')
    used = np.unique(labels[labels != -1])
    if not used.size: return None, 'no labels'
    if labels.shape != (len(found.names),) or used.tolist() != list(range(len(used))):
        raise ValueError(f'its {len(used)} labels are {used.min()} to {used.max()}: they must be 0, 1, 2, ..., one to a picture, without a gap')
    names = [f'{name} -> {i}' for name, i in classes.items()] or [f'0 to {used.max()}']
    if len(names) > 12: names[8:-2] = ['...']
    text = f'{len(used)} classes ({", ".join(names)})'
    missing = (labels == -1).sum()
    if missing: text += f', but {missing} pictures have no label, so that training will be without labels'
    return torch.from_numpy(labels), text


def pack(path, res, save):
    """Writes the pictures of a path as a data file: (images uint8 (N, 3, res, res), labels int64 (N,) or None)."""
    with reading(path, NEEDED):
        found = pictures(path)
        labels, about = labels_of(found)
    whole, n = Path(os.path.abspath(path)), len(found.names)
    save = Path(save or f'datasets/{whole.name if whole.is_dir() else whole.stem.removesuffix(".tar")}.pt')
    if save.suffix != '.pt': stop(f'--save {save}: the name of a data file ends in .pt')
    if save.exists(): stop(f'{save} exists: delete it, or --save another')
    res = res or max((s for s in (16, 32, 64) if s <= side_of(found)), default=16)
    print(f'{path}: {n} pictures, {about}; as {res} x {res} they take {n * 3 * res**2 / 2**20:.0f} MB of memory')
    if found.others: print('left out:', ', '.join(f'{n} {kind}' for kind, n in Counter(found.others).most_common(20)), flush=True)
    with written(save) as file: torch.save((decoded(found, res), labels), file)
    print(f'{save}: {n} images of side {res}. To train on them:\npython ect.py --data {save}')

# ------------------------------------------------------------------------------------------------- statistics

WEIGHTS = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
           'pt_inception-2015-12-05-6726825d.pth')
WEIGHTS_SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
CIFAR = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
CIFAR_SHA256 = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
PUBLISHED = dict(                       # mu, sigma of whole training sets; no hash is published
    cifar10='https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz',
    imagenet64='https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img64.pkl')


def numeric(kind, *copy):
    """np.dtype of numbers. One of objects, made from bytes, would hold pointers of the file's choice."""
    if np.dtype(kind).kind not in 'fiu': raise pickle.UnpicklingError(f'it holds {kind}, not numbers')
    return np.dtype(kind, *copy)


class Arrays(pickle.Unpickler):
    """Reads EDM2's statistics, a pickle of dicts of numpy arrays; any other name in it is an error."""

    KNOWN = {
        'numpy.ndarray': np.ndarray, 'numpy.dtype': numeric,
        'multiarray._reconstruct': np.zeros(0).__reduce__()[0],
        'multiarray.scalar': lambda dtype, data: np.frombuffer(data, dtype)[0],
        'numeric._frombuffer': lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(shape, order=order),
    }

    def find_class(self, module, name):
        short = f'{re.sub("^numpy._?core.", "", module)}.{name}'
        if short in self.KNOWN: return self.KNOWN[short]
        raise pickle.UnpicklingError(f'it names {module}.{name}, which no statistics need')


def read_statistics(path):
    """A file of mu and sigma: EDM's, ADM's, pytorch-fid's or clean-fid's .npz, EDM2's .pkl, or ours (.fid), with
    features and meta, how they were made -> mu, sigma, features or None, meta; None if path is no such file"""
    if not path.is_file() or path.suffix not in ('.npz', '.pkl', '.fid'): return None
    if path.suffix == '.pkl':
        with open(path, 'rb') as file: found = Arrays(file).load()['fid']
    else: found = np.load(path)
    if not {'mu', 'sigma'} <= set(found): return None
    mu, sigma = (np.asarray(found[name], np.float64) for name in ('mu', 'sigma'))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not np.isfinite(mu.sum() + sigma.sum()):
        raise ValueError(f'mu {mu.shape} and sigma {sigma.shape} are no finite statistics')
    meta = json.loads(str(found['meta'])) if 'meta' in found else {}
    way = re.search('_(clean|legacy_pytorch|legacy_tensorflow)_', path.name)            # clean-fid's names
    if way and not meta: meta['resize'] = dict(clean='clean', legacy_pytorch='pytorch-fid').get(way[1], 'tf')
    features = found['features'] if 'features' in found else None
    return SimpleNamespace(mu=mu, sigma=sigma, features=features, meta=meta)


@functools.cache
def network(resize):
    """Inception with its weights, folded"""
    path = fetch(WEIGHTS)
    with reading(path): digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256: stop(f'{path} is damaged, its sha256 is not {WEIGHTS_SHA256}: delete it')
    net = Inception(resize)
    net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
    for layer in net.modules():
        if isinstance(layer, Conv): layer.fold()
    return net.to(memory_format=torch.channels_last)


def extract(net, images, name):
    """Images (N, 3, H, W) -> mean and covariance of their features in float64; the features, every k-th of more
    than 50,000, since those of ImageNet would be 10 GB."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    net, n, every = net.to(device), len(images), math.ceil(len(images) / 50_000)
    batch, total, outer, kept = 8 if device.type == 'cpu' else 128, 0, 0, []            # 8 is fastest on a CPU
    for piece in pieces(n, name):
        parts = images[piece.start:piece.stop].split(batch)
        with torch.inference_mode(): x = torch.cat([net(part.to(device))[0] for part in parts])
        total, outer = total + x.double().sum(0), outer + x.double().T @ x.double()
        kept.append(x.cpu()[-piece.start % every::every])
    if not outer.isfinite().all(): stop(f'{name}: the network returns NaN', 1)
    mu = total / n
    return mu.cpu().numpy(), ((outer - n * mu.outer(mu)) / (n - 1)).cpu().numpy(), torch.cat(kept).numpy()


def fingerprint(images, path):
    """sha256 of images (N, 3, H, W). Says how many are alike, as when two processes had one seed."""
    digests = [hashlib.sha256(image).digest() for image in images.numpy()]
    alike = len(digests) - len(set(digests))
    if alike: note(f'{path}: {alike} of {len(digests)} images are duplicates of another')
    return hashlib.sha256(b''.join(digests)).hexdigest()


def subset(images, num):
    """num of the images (0: all), as EDM chooses them: the first of a random order, in the old order"""
    if not num: return images
    return images[np.sort(np.random.RandomState(0).permutation(len(images))[:num])]


def kept_statistics(cache, meta):
    """What read_statistics finds in a file of ours, if it was made as meta says; else None."""
    if not cache.exists(): return None
    try: found = read_statistics(cache)
    except Exception as error:
        note(f'{cache} is damaged and made again: {type(error).__name__} {str(error)[:100]}')
        return None
    return found if found and meta.items() <= found.meta.items() else None


def statistics(path, side, num, resize):
    """What read_statistics returns, of num of the images of a path (0: all). They are kept beside the images, and
    found again by the sha256 of the pixels."""
    images, cache = load_images(path, side), Path(f'{path}.inception-{resize}.fid')
    meta = dict(format=3, resize=resize, weights=WEIGHTS_SHA256[:8], n=num or len(images), of=len(images), side=side,
                sha256=fingerprint(images, path))
    found = kept_statistics(cache, meta)
    if found: return found
    mu, sigma, features = extract(network(resize), subset(images, num), path)
    meta |= dict(source=str(path), cov='n-1', date=time.strftime('%Y-%m-%d'), torch=torch.__version__)
    if os.access(cache.parent, os.W_OK):
        with written(cache) as file: np.savez(file, meta=json.dumps(meta), mu=mu, sigma=sigma, features=features)
    else: note(f'{cache.parent} is read-only: the statistics of {path} are not kept')
    return SimpleNamespace(mu=mu, sigma=sigma, features=features, meta=meta)

# ------------------------------------------------------------------------------------------------- comparison

def reference_of(path, side):
    """What samples are compared with unless --ref is given: what their run was trained on, else by their size"""
    latest, name = path.parent / 'latest.pt', {32: 'cifar10', 64: 'imagenet64'}.get(side)
    if latest.exists():
        with reading(latest): name = torch.load(latest, 'cpu', mmap=True, weights_only=True)['config']['data']
        if name in ('glyphs', *PUBLISHED) or Path(name).exists(): return name
        stop(f'{path} is of a run on {name}, which is not here: say by --ref where it is')
    if not name: stop(f'{path} holds images of {side} x {side}, and no latest.pt of a run lies beside it: say by --ref '
                      'what to compare them with (glyphs: the embedded digits)')
    note(f'{path} is compared with {name}, by its size: --ref says otherwise')
    return name


@functools.cache
def source_of(ref, resize):
    """Path of a reference; its statistics if it is a file of them, else None"""
    if ref in PUBLISHED and resize == 'tf': path = fetch(PUBLISHED[ref])
    elif ref == 'cifar10': path = fetch(CIFAR, CIFAR_SHA256)
    elif ref == 'imagenet64': path = Path('datasets/imagenet64.pt')
    else: path = fetch(ref) if '://' in ref else Path(ref)
    if not path.exists(): stop(f'there is no {path}')
    with reading(path): found = read_statistics(path)
    if found and not {'weights', 'resize'} & set(found.meta):
        note(f'{path} does not say how it was made: assumed as by --resize {resize}')
    return path, found


@functools.cache
def target(ref, side, resize):
    """What samples are compared with: Digits, or the statistics of the reference"""
    if ref == 'glyphs': return Digits()
    path, found = source_of(ref, resize)
    return found or statistics(path, side, 0, resize)


def survey(path, cfg):
    """Samples, before any are judged -> path; n, how many; side; ref, what they are compared with; num, how many
    of them are to be judged, 0: all"""
    path = Path(path, 'samples.npz') if Path(path, 'latest.pt').exists() else Path(path)
    with reading(path, NEEDED): found = pictures(path)
    n, side, num = len(found.names), side_of(found), cfg.num
    ref = cfg.ref or reference_of(path, side)
    if ref == 'glyphs' and side != 16: stop(f'{path}: glyphs are 16 x 16, these images {side} x {side}')
    source, given = source_of(ref, cfg.resize) if ref != 'glyphs' else (ref, None)
    if given:
        for key, here in dict(resize=cfg.resize, weights=WEIGHTS_SHA256[:8], side=side).items():
            made = given.meta.get(key, here)
            if made != here: stop(f'{source} was made with {key} {made}, not {here} as {path}')
        if 'n' not in given.meta: num = num or 50_000           # published
    if n < max(2, num): stop(f'{path} holds {n} images, fewer than {max(2, num)}: make more, or lower --num')
    if (num or n) < 2048: note(f'{path}: {num or n} images bias the distance upwards: compare equal numbers only')
    return SimpleNamespace(path=path, n=n, side=side, ref=ref, num=num)


def evaluate(sample, reference, weight):
    """Statistics of both -> {column of the table: value}; a measure without its input is None"""
    x, y, mu, sigma = sample.features, reference.features, reference.mu, reference.sigma
    if sample.mu.shape != mu.shape: stop(f'the reference has {len(mu)} features, not {len(sample.mu)}')
    pairs = y is not None and min(len(x), len(y)) > 3
    precision, recall = precision_recall(y, x) if pairs else (None, None)
    return {'FID': frechet(sample.mu, sample.sigma, mu, sigma),
            'FID_inf': frechet_inf(x, mu, sigma) if len(x) >= 10_000 else None,
            'IS': inception_score(x, weight) if len(x) >= 10 else None,
            'KID x1000': 1000 * kernel_distance(x, y) if pairs else None,
            'precision': precision, 'recall': recall}


def judge(sample, resize):
    """Samples as survey() found them -> {column of the table: value}"""
    reference = target(sample.ref, sample.side, resize)
    if sample.ref != 'glyphs':
        found = statistics(sample.path, sample.side, sample.num, resize)
        row, reference_n = evaluate(found, reference, network(resize).fc.weight.cpu()), reference.meta.get('n')
    else:
        images, reference_n = load_images(sample.path), len(reference.features)
        fingerprint(images, sample.path)
        row = reference.judge(subset(images, sample.num))
    return row | dict(n=sample.num or sample.n, reference=sample.ref, reference_n=reference_n)


def table(rows):
    """Aligned text of [{column: [values]}]: mean, and sd and minimum of several values. * marks the best, if all
    rows are of equally many samples and have one reference."""
    words = 'model', 'n', 'reference', 'reference_n'
    measures = [c for c in dict.fromkeys(c for row in rows for c in row if any(row[c])) if c not in words]
    equal = len(rows) > 1 and len({(row['reference'][0], n) for row in rows for n in row['n']}) == 1

    def cell(row, c):
        values = row.get(c, [None])
        if None in values: return '-'
        if c in words: return ' '.join(dict.fromkeys(map(str, values)))
        text, means = f'{np.mean(values):.3f}', [np.mean(r[c]) for r in rows if None not in r.get(c, [None])]
        if len(values) > 1: text += f' +- {np.std(values, ddof=1):.3f} (min {min(values):.3f})'
        if not equal or c.startswith(('share', 'colour')): return text
        best = max(means) if c in ('IS', 'precision', 'recall', 'sure') else min(means)
        return text + ('*' if np.mean(values) == best else ' ')
    columns = [words[0], *measures, *words[1:]]
    grid = [columns, *([cell(row, c) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    return '\n'.join('  '.join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:]))])
                     for line in grid)


def losses_of(log):
    """log.csv -> step and log of the loss of each line, those of one phase in one list"""
    rows = list(csv.DictReader(log.read_text().splitlines()))
    return [[(float(row['step']), math.log(loss)) for row in phase if (loss := abs(float(row['loss']))) > 0]
            for _, phase in itertools.groupby(rows, lambda row: row['phase'])]


def sheet(samples, path):
    """Contact sheet: for each of {name: samples} 16 images, enlarged or reduced to 64 x 64."""
    font, gap, size = ImageFont.load_default(size=15), 6, 64
    left = max(int(font.getlength(name)) for name in samples) + 3 * gap
    canvas = Image.new('RGB', (left + 16 * size, len(samples) * (size + gap) + gap), 'white')
    for y, (name, sample) in zip(itertools.count(gap, size + gap), samples.items()):
        found = pictures(sample.path)
        ImageDraw.Draw(canvas).text((left - 2 * gap, y + size // 2), name, 'black', font, anchor='rm')
        for i, picture in enumerate(found.names[:16]):
            image = crop(found.picture(picture).convert('RGB'), sample.side)
            canvas.paste(image.resize((size, size), Image.NEAREST), (left + i * size, y))
    with written(path) as file: canvas.save(file, 'PNG')

# ----------------------------------------------------------------------------------------------- command line

def config(argv):
    parser = argparse.ArgumentParser('fid.py', allow_abbrev=False)
    parser.error = lambda message: stop(f'{message}; see --help')
    add = parser.add_argument
    add('paths', nargs='*', help='samples: .npz, .zip, a folder of pictures, a run folder (its samples.npz)')
    add('--pack', type=Path, help='make the data file of a run of this folder, .zip, .npz or .tar.gz, and stop')
    add('--res', type=int, default=0, help='side of its images [the largest of 16, 32, 64 not above the first one]')
    add('--save', default='', help='its name [datasets/<name>.pt]')
    add('--ref', default='', help='what to compare with: cifar10, imagenet64, glyphs, or images or statistics by path '
        'or URL [what the run was trained on, else by size]')
    add('--num', type=int, default=0, help='samples to judge; fewer are an error [published reference: 50000, else all]')
    add('--resize', default='tf', choices=('tf', 'pytorch-fid', 'clean'), help='convention of Inception [tf]')
    add('--mean', action='store_true', help='files of one folder are samples of one model: mean, sd, minimum')
    add('--json', action='store_true', help='print JSON')
    add('--out', type=Path, default=Path('fid.png'), help='contact sheet of a comparison of several [fid.png]')
    cfg = parser.parse_args(argv)
    if bool(cfg.paths) == bool(cfg.pack): stop('give samples to judge, or pictures to --pack; see --help')
    if cfg.paths and (cfg.res or cfg.save): stop('--res and --save belong to --pack')
    if min(cfg.num, cfg.res) < 0: stop('--num and --res are positive')
    return cfg


def main(argv=None):
    cfg = config(argv)
    if cfg.pack: return pack(cfg.pack, cfg.res, cfg.save)
    samples, rows = [survey(path, cfg) for path in dict.fromkeys(cfg.paths)], {}
    shown = {}
    for sample in samples:
        name = str(sample.path.parent) if cfg.mean else str(sample.path).removesuffix('/samples.npz')
        shown.setdefault(name, sample)
        for column, value in judge(sample, cfg.resize).items():
            rows.setdefault((name, sample.ref), dict(model=[name])).setdefault(column, []).append(value)
    rows = list(rows.values())
    print(json.dumps(dict(resize=cfg.resize, models=rows), indent=1) if cfg.json else table(rows))
    if len(rows) > 1:
        sheet(shown, cfg.out)
        note(f'contact sheet: {cfg.out}')


if __name__ == '__main__':
    try: main()
    except KeyboardInterrupt: stop('interrupted', 130)
    except OSError as error: stop(error, 1)
