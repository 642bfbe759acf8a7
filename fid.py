# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.10", "numpy", "pillow>=10.1", "scipy"]
# ///
"""
fid.py  Frechet inception distance (Heusel et al. 2017, arXiv:1706.08500) and its companions, as the papers
print them; and the one place where pictures are read: --pack makes the data file of a training run of them.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

between Gaussians fitted to the 2048 pooled features of the Inception network of 2015 for 50,000 samples and
for a reference; lower is better. In the same pass: FID_inf, its limit for endless samples, extrapolated in
1/n (Chong and Forsyth 2020; from 10,000 samples on); the inception score (Salimans et al. 2016; 10 splits in
order); KID x 1000 (Binkowski et al. 2018; 100 subsets of 1000); precision and recall (Kynkaanniemi et al.
2019; k = 3, in the same features, not VGG's). The last three need images, not a published reference.

    python fid.py --pack photos                         # a folder or .zip of pictures -> datasets/photos.pt
    python fid.py runs/*/samples.npz                    # each against the data that its run was trained on
    python fid.py samples.npz --ref photos --num 10000  # a folder, .zip, .npz, .pt, or published statistics
    python fid.py a/0.npz a/1.npz a/2.npz --mean        # one model: mean, sd and minimum, which EDM reports

Samples of the embedded digits are compared with digits, in closed form: FD-digits is the same distance in 35
features (class Digits). sure: share of samples that look like one digit. share_min, share_max: of the rarest
and the commonest digit, 0.1 in the data. colour_min, colour_max: standard deviation of the mean colour over
the data's, of the least and the most varied channel.

Conventions are those of EDM, EDM2, ECT, TCM, ADM: TensorFlow 1's bilinear resize to 299, (x - 128) / 128,
covariance over n - 1, statistics in float64. Where codes differ:
- The network is in true float32 here. ECT's main branch and TCM switch TF32 off as well; EDM's and EDM2's
  evaluators set no flag, so that convolutions on a GPU may use it.
- pytorch-fid resizes on PyTorch's grid and scales to [-1, 1], clean-fid resizes by an antialiased bicubic:
  their figures and statistics are not comparable with these.
- EDM, ECT, pytorch-fid take scipy's sqrtm of S_1 S_2, complex and off by 4e-4 if n < 2048. We take the
  singular values of A_1^T A_2, S_i = A_i A_i^T: real, exact. ECT and TCM divide by n: 2e-5 of the traces.
- imagenet64 is EDM2's statistics of all training images. CT's FIDs on ImageNet-64 are of ADM's evaluator and
  its reference batch: --ref VIRTUAL_imagenet64_labeled.npz.
- Our scripts sample all classes in turn, equally often; theirs draw the class of each sample at random.
"""
import argparse, contextlib, functools, glob, hashlib, io, itertools, json, logging, math, os, pickle, sys
import tarfile, time, warnings, zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.functional import affine_grid, avg_pool2d, batch_norm, grid_sample, interpolate, pad, relu

METHOD = Path(__file__).stem
WEIGHTS = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
           'pt_inception-2015-12-05-6726825d.pth')
WEIGHTS_SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
PUBLISHED = dict(                       # mu, sigma of whole training sets; no hash is published
    cifar10='https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz',
    imagenet64='https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img64.pkl')

# -------------------------------------------------------------------------------------------------- distances

def frechet(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians, means (D,), covariances (D, D), which may be singular:
    tr (S1 S2)^(1/2) is the sum of the singular values of A1^T A2, S = A A^T. Eigenvalues that are rounding
    are dropped in each S; dropping those of the product would not be harmless."""
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
    """exp of the mean KL divergence between the classes' probabilities of an image and of all; 10 splits."""
    def one(x):
        p = (torch.from_numpy(x).double() @ weight.double().T).log_softmax(1)
        return (p.exp() * (p - p.logsumexp(0) + math.log(len(p)))).sum(1).mean().exp().item()
    n = len(features)
    return float(np.mean([one(features[n * i // 10:n * (i + 1) // 10]) for i in range(10)]))


def kernel_distance(x, y):
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, mean over 100 pairs of
    random subsets of the features x (N, D), y (M, D)."""
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

# -------------------------------------------------------------------------------------------------- Inception

class Conv(nn.Module):
    """Convolution, batch normalisation by stored statistics, ReLU."""

    def __init__(self, cin, cout, size, stride=1, padding='same'):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, size, stride, padding, bias=False)
        names = 'weight', 'bias', 'running_mean', 'running_var'
        self.bn = nn.ParameterDict({name: torch.ones(cout) for name in names})

    def forward(self, x):
        bn = self.bn
        x = batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-3)
        return relu(x, inplace=True)


average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
maximum, halve = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)


class Mixed(nn.Module):
    """Branches side by side, their outputs concatenated. A branch is a list of layers; its convolutions are
    called branch_1, branch_2, ..., a lone one branch. Two in a pair have one input: branch_2a, branch_2b."""

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

    def __init__(self):
        super().__init__()
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
        """uint8 (N, 3, H, W) -> (N, 3, 299, 299) in [-1, 1): TensorFlow 1's resize, whose pixel i lies at
        i * size / 299, or on the edge"""
        x = pad(x.float(), (0, 1, 0, 1), 'replicate')
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


def contrast(images):
    """uint8 (n, 3, 16, 16) -> float64 (n, 3, 256), each channel without its mean; and their sum (n, 256), of
    length 1, or 0 for one colour: the outline"""
    x = images.double().flatten(2)
    x = x - x.mean(2, keepdim=True)
    return x, x.sum(1) / (x.sum(1).norm(dim=1, keepdim=True) + 1)


class Digits:
    """Judges images of 16 x 16 by the embedded digits, without training. A channel of a glyph, less its mean,
    is one outline, of class and pose, times a contrast above 0, and the outlines of a class lie near a plane
    through 0, here of 6 dimensions: the principal directions of 2000 glyphs."""

    def __init__(self):
        images, labels = glyphs(seed=1)                         # the reference has seed 0
        outlines = contrast(images)[1]
        of_class = [outlines[labels == digit] for digit in range(10)]
        self.means = torch.stack([rows.mean(0) for rows in of_class], 1)                # (256, 10)
        self.planes = torch.cat([principal(rows, 6) for rows in of_class], 1)           # (256, 60)
        self.centre = outlines.mean(0)
        self.axes = principal(outlines - self.centre, 16)                               # (256, 16)
        self.reference = self.features(glyphs()[0])
        self.n = len(self.reference)

    def left(self, images):
        """Share of an image's variance that the plane of each class leaves: (n, 10). 1 for one colour, and
        for a negative of the class."""
        x, outlines = contrast(images)
        found = (x @ self.planes).square().sum(1).view(len(x), 10, 6).sum(2)
        left = 1 - found / (x.square().sum((1, 2))[:, None] + 1)
        return torch.where(outlines @ self.means > 0, left, 1)

    def features(self, images):
        """uint8 (n, 3, 16, 16) -> float64 (n, 35): 16 principal components of the outline (pose, variety,
        blur); belief in each class, of sum 1 (which digits, half-formed ones); standard deviation, grain and
        mean of each channel (contrast, noise, colour)."""
        def of_some(images):
            x, belief = images.double(), self.left(images).clamp(min=1e-6)**-2
            grain = x.diff(dim=2).abs().mean((2, 3)) + x.diff(dim=3).abs().mean((2, 3))
            return torch.cat([(contrast(images)[1] - self.centre) @ self.axes, x.std((2, 3)), grain,
                              belief / belief.sum(1, keepdim=True), x.mean((2, 3))], 1)
        return torch.cat([of_some(part) for part in images.split(5000)])

    def judge(self, images):
        """uint8 (n, 3, 16, 16) -> {column of the table: value}. FD-digits is in features of variance 1 over
        the glyphs. An image is sure to be of its best class if that plane leaves less than 0.15, and less
        than half of what the next plane leaves."""
        left, order = torch.cat([self.left(part) for part in images.split(5000)]).sort(1)
        sure = (left[:, 0] < 0.15) & (left[:, 0] < left[:, 1] / 2)
        shares = order[:, 0].bincount(minlength=10).double() / len(images)
        scale = self.reference.std(0)
        features, reference = ((v / scale).numpy() for v in (self.features(images), self.reference))
        colour = features[:, -3:].std(0, ddof=1)
        return {'FD-digits': frechet(*gaussian(features), *gaussian(reference)),
                'sure': sure.double().mean().item(), 'share_min': shares.min().item(),
                'share_max': shares.max().item(), 'colour_min': colour.min(), 'colour_max': colour.max()}

# --------------------------------------------------------------------------------------------------- pictures

FORMATS = {'PNG', 'JPEG', 'WEBP', 'AVIF', 'BMP', 'GIF', 'TIFF'} & {*Image.registered_extensions().values()}
SUFFIXES = '.png .jpg .jpeg .jfif .mpo .webp .bmp .gif .tif .tiff .avif'.split()
NEEDED = '; images are in a folder, .zip, .npz (arr_0: N, H, W, 3), .pt, or the binary .tar.gz of CIFAR-10'


def stop(message, code=2):
    """Ends the program with one line on stderr: code 2 for bad input, 1 for a failure."""
    print(f'{METHOD}.py:', *str(message).split(), file=sys.stderr, flush=True)
    sys.exit(code)


def note(text): print(f'{METHOD}.py: {text}', file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading(file, advice=''):
    """A context for reading a file of unknown content: what fails in it ends the program with one line, or,
    if DEBUG is set in the environment, with Python's traceback."""
    try: yield
    except Exception as error:
        if 'DEBUG' in os.environ: raise
        stop(f'{file} cannot be read: {type(error).__name__} {str(error)[:300]}{advice}')


@contextlib.contextmanager
def whole(path):
    """An open file, which takes path's place when it is complete. Several processes may write one path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        with open(part, 'wb') as file: yield file
        os.replace(part, path)
    except RuntimeError as error: raise OSError(f'{path}: {error.__context__ or error}')    # disk full
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


def arrays(path):
    """An .npz (arr_0, arr_1), a .pt (images, labels), which stays on the disk, or CIFAR-10's binary .tar.gz
    -> images uint8 (N, 3, H, W), labels (N,) or None"""
    if path.suffix == '.pt':
        images, labels = torch.load(path, mmap=True, weights_only=True)
        images, labels = images.permute(0, 2, 3, 1).numpy(), None if labels is None else labels.numpy()
    elif path.suffix == '.npz':
        file = np.load(path)
        images, labels = file['arr_0'], file['arr_1'] if 'arr_1' in file else None
    else:
        with tarfile.open(path) as archive:
            batches = sorted(name for name in archive.getnames() if Path(name).match('data_batch_*.bin'))
            if not batches: raise ValueError('it holds no data_batch_*.bin: take the binary version')
            data = b''.join(archive.extractfile(name).read() for name in batches)
            while archive.fileobj.read(2**20): pass             # to its end, where gzip's checksum is
        rows = np.frombuffer(data, np.uint8).reshape(-1, 3073)
        images, labels = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(f'its images are {images.dtype} {images.shape}, not uint8 (N, H, W, 3)')
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


def files_of(path):
    """Names of the files in a folder or .zip, in order, and a function that reads one. Hidden files and
    folders do not count, linked ones do; nothing of an archive is written anywhere."""
    if path.is_dir():
        found = {name: path / name for name in glob.glob('**', root_dir=path, recursive=True)}
        places = {name.replace(os.sep, '/'): file for name, file in found.items()
                  if file.is_file() or not file.exists()}       # what links to nothing fails when it is read
        if any(name.count('/') > 30 for name in places): raise ValueError('a link in it leads back to it')
        read = Path.read_bytes
    else:
        archive = zipfile.ZipFile(path)
        places, read = {name.replace('\\', '/'): name for name in archive.namelist()}, archive.read
    names = sorted(name for name in places if '/.' not in f'/{name}' and name[-1] != '/')
    return names, lambda name: read(places[name])


def crop(image, res):
    """ADM's crop: halved by a box filter while twice too large, then bicubic to the shorter side, cut."""
    while min(image.size) >= 2 * res: image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = res / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - res) // 2, (image.height - res) // 2
    return image.crop((left, top, left + res, top + res))


class Pictures:
    """The pictures that a path holds, in the order of their names."""

    def __init__(self, path):
        self.path, self.images, self.others = Path(path), None, set()
        if not self.path.exists(): stop(f'there is no {path}')
        if self.path.is_file() and self.path.suffix in ('.gz', '.npz', '.pt'):
            self.images, self.given_labels = arrays(self.path)
            self.names = range(len(self.images))
            return
        files, self.read = files_of(self.path)
        self.names = [name for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES]
        self.tables = [name for name in files if PurePosixPath(name).name == 'dataset.json']
        self.others = set(files) - set(self.names) - set(self.tables)
        if not self.names: raise ValueError(f'it holds no pictures ({" ".join(SUFFIXES)})')

    def open(self, name):
        if self.images is not None: return Image.fromarray(self.images[name].transpose(1, 2, 0))
        return Image.open(io.BytesIO(self.read(name)), formats=[*FORMATS])

    def side(self):
        """The shorter side of the first picture"""
        with reading(f'{self.path}/{self.names[0]}'): return min(self.open(self.names[0]).size)

    def pixels(self, name, res):
        """A picture as uint8 (3, res, res): held as the camera was, on white where it is transparent, and
        cropped; and its size before that"""
        image = self.open(name)
        if image.mode[0] in 'IF' or ';16' in str(getattr(image, 'tile', '')):
            raise ValueError(f'it is {image.mode} of more than 8 bits: convert it to 8-bit RGB or grey')
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
        return np.asarray(crop(image.convert('RGB'), res)).transpose(2, 0, 1), image.size

    def decode(self, res):
        """All pictures as uint8 (N, 3, res, res), several at once, in no more memory than that"""
        n, sizes, shape = len(self.names), Counter(), (len(self.names), 3, res, res)
        if self.images is not None and self.images.shape == shape: return torch.from_numpy(self.images)
        images = np.empty(shape, np.uint8)
        with ThreadPoolExecutor() as pool:
            for piece in pieces(n, self.path):
                names = self.names[piece.start:piece.stop]
                results = pool.map(lambda name: self.pixels(name, res), names)
                for i, name in zip(piece, names):
                    with reading(f'{self.path}/{name}'): images[i], size = next(results)
                    sizes[size] += 1
        other, small = n - sizes[res, res], sum(count for size, count in sizes.items() if min(size) < res)
        if other: note(f'{self.path}: {other} of {n} cropped and resized to {res} x {res}, {small} enlarged')
        return torch.from_numpy(images)

    def labels(self):
        """Labels (N,), -1: none, and names of the classes. Of an array those that it has; else what EDM's
        dataset.json says, wherever it lies; else folders, on the first level of them that has several."""
        none = [-1] * len(self.names)
        if self.images is not None: return none if self.given_labels is None else self.given_labels, []
        if self.tables:
            listed = [(str(PurePosixPath(table).parent / name), label) for table in self.tables
                      for name, label in json.loads(self.read(table))['labels'] or []]
            number = dict(listed)
            if len(number) < len(listed): raise ValueError('dataset.json gives a picture two labels')
            return [number.get(name, -1) for name in self.names], []
        for level in itertools.zip_longest(*(PurePosixPath(name).parts[:-1] for name in self.names)):
            folders = sorted(set(level) - {None})
            number = {folder: i for i, folder in enumerate(folders)}
            if len(folders) > 1: return [number.get(folder, -1) for folder in level], folders
        return none, []


def load_images(path, res=0):
    """All images of a path: uint8 (N, 3, res, res); 0: the shorter side of the first one"""
    with reading(path, NEEDED): found = Pictures(path)
    return found.decode(res or found.side())


def checked(labels, names, n):
    """Labels of n pictures, names of classes -> labels int64 (n,), None if all lack one; what to say of it"""
    labels = np.array(labels).astype(np.int64, casting='safe')
    used, missing = np.unique(labels[labels != -1]), (labels == -1).sum()
    if labels.shape != (n,): raise ValueError(f'labels {labels.shape} for {n} pictures')
    if missing == n: return None, 'no labels'
    if used.tolist() != list(range(len(used))):
        raise ValueError(f'its {len(used)} labels lie between {used[0]} and {used[-1]}: they must be 0, 1, 2 '
                         'and so on, none left out')
    classes = [f'{name} -> {i}' for i, name in enumerate(names)] or [f'0 to {used[-1]}']
    if len(classes) > 20: classes[10:-2] = ['...']
    without = f', but {missing} pictures have NO LABEL: training is without labels' if missing else ''
    return torch.from_numpy(labels), f'{len(used)} classes ({", ".join(classes)}){without}'


def pack(path, res, save):
    """Makes a data file of what a path holds: images uint8 (N, 3, res, res), labels int64 (N,) or None."""
    with reading(path, NEEDED):
        found = Pictures(path)
        n, place = len(found.names), Path(os.path.abspath(path))
        labels, about = checked(*found.labels(), n)
    save = Path(save or f'datasets/{place.name if place.is_dir() else place.stem.removesuffix(".tar")}.pt')
    if save.suffix != '.pt': stop(f'--save {save}: the name of a data file ends in .pt')
    if save.exists(): stop(f'{save} exists: delete it, or --save another')
    res = res or max((side for side in (16, 32, 64) if side <= found.side()), default=16)
    print(f'{path}: {n} pictures, {about}; {n * 3 * res**2 / 1e6:.1f} MB at {res} x {res}', flush=True)
    kinds = Counter(PurePosixPath(name).suffix or name for name in sorted(found.others)).most_common(20)
    if kinds: print('left out:', ', '.join(f'{count} {kind}' for kind, count in kinds), flush=True)
    with whole(save) as file: torch.save((found.decode(res), labels), file)
    print(f'{save}: {n} images of side {res}\nnext: python ect.py --data {save}')

# ------------------------------------------------------------------------------------------------- statistics

class Arrays(pickle.Unpickler):
    """Reads EDM2's statistics, a pickle of dicts of arrays of numbers; anything else in it is an error."""

    KNOWN = dict(
        ndarray=np.ndarray, _reconstruct=np.zeros(0).__reduce__()[0],
        dtype=lambda kind, *copy: np.dtype(dict(f4='f4', f8='f8', i8='i8')[kind], *copy),      # no objects
        scalar=lambda dtype, data: np.frombuffer(data, dtype)[0])

    def find_class(self, module, name):
        if module.split('.')[0] == 'numpy' and name in self.KNOWN: return self.KNOWN[name]
        raise pickle.UnpicklingError(f'it names {module}.{name}, which no statistics need')


def published(path):
    """Statistics of other programs: EDM's, ADM's or pytorch-fid's .npz, EDM2's .pkl -> mu, sigma, no features
    and no n; None if the path is something else"""
    if path.suffix not in ('.npz', '.pkl', '.fid'): return None
    if path.suffix != '.pkl': found = np.load(path)
    else:
        with open(path, 'rb') as file: found = Arrays(file).load()['fid']
    if not {'mu', 'sigma'} <= set(found): return None
    if '_clean_' in path.name or '_legacy_pytorch_' in path.name: raise ValueError('made by another resize')
    mu, sigma = (np.asarray(found[name], np.float64) for name in ('mu', 'sigma'))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not np.isfinite(mu.sum() + sigma.sum()):
        raise ValueError(f'its mu {mu.shape} and sigma {sigma.shape} are no finite statistics')
    return SimpleNamespace(mu=mu, sigma=sigma, features=None, n=None)


@functools.cache
def network():
    """Inception with its weights"""
    path = fetch(WEIGHTS, WEIGHTS_SHA256)
    if hashlib.sha256(path.read_bytes()).hexdigest() != WEIGHTS_SHA256:
        stop(f'{path} is damaged, its sha256 is not {WEIGHTS_SHA256}: delete it')
    net = Inception()
    net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
    return net.to(memory_format=torch.channels_last)


def extract(net, images, name):
    """Images (N, 3, H, W) -> their features float32 (N, 2048)"""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    net, batch, features = net.to(device), 8 if device.type == 'cpu' else 128, []       # 8: the fastest there
    for piece in pieces(len(images), name):
        parts = images[piece.start:piece.stop].split(batch)
        with torch.inference_mode(): features += [net(part.to(device))[0].cpu() for part in parts]
    features = torch.cat(features).numpy()
    if not np.isfinite(features).all(): stop(f'{name}: the network returns NaN', 1)
    return features


def statistics(path, images):
    """mu, sigma and number n of the images of a path, features of at most 50,000. They are kept beside it and
    found again by the sha256 of the pixels."""
    cache, key = Path(f'{path}.inception.fid'), hashlib.sha256(images.numpy()).hexdigest()
    if cache.exists():
        try: found = dict(np.load(cache))
        except Exception as error:
            note(f'{cache} is damaged, and made again: {type(error).__name__} {str(error)[:100]}')
            found = {}
        if str(found.pop('key', '')) == key: return SimpleNamespace(n=len(images), **found)
    features = extract(network(), images, path)
    mu, sigma = gaussian(features)
    found = dict(mu=mu, sigma=sigma, features=features[::math.ceil(len(images) / 50_000)])
    if os.access(cache.parent, os.W_OK):
        with whole(cache) as file: np.savez(file, key=key, **found)
    else: note(f'{cache.parent} is read-only: the statistics of {path} are not kept')
    return SimpleNamespace(n=len(images), **found)

# ------------------------------------------------------------------------------------------------- comparison

def reference_of(path, side):
    """What samples are compared with without --ref: what their run was trained on, else by their size"""
    latest, name = path.parent / 'latest.pt', {32: 'cifar10', 64: 'imagenet64'}.get(side)
    if latest.exists():
        with reading(latest):
            name = torch.load(latest, 'cpu', mmap=True, weights_only=True)['config']['data']
        if name not in ('glyphs', *PUBLISHED) and not Path(name).exists():
            stop(f'{path} is of a run on {name}, which is not here: say by --ref where it is')
    elif name: note(f'{path} is compared with {name}, by its size: --ref says otherwise')
    else: stop(f'{path} holds images of {side} x {side}, beside no latest.pt of a run: say by --ref what to '
               'compare them with (glyphs: the embedded digits)')
    return name


@functools.cache
def target(ref, side):
    """What samples of a side are compared with: Digits, or the statistics of the reference"""
    if ref == 'glyphs': return Digits()
    path = fetch(PUBLISHED.get(ref, ref)) if ref in PUBLISHED or '://' in ref else Path(ref)
    with reading(path): found = published(path)
    return found or statistics(path, load_images(path, side))


def evaluate(sample, reference):
    """Statistics of both -> {column of the table: value}; a measure without its input is None"""
    x, y, mu, sigma = sample.features, reference.features, reference.mu, reference.sigma
    if sample.mu.shape != mu.shape: stop(f'the reference has {len(mu)} features, not {len(sample.mu)}')
    pairs = y is not None and min(len(x), len(y)) > 3
    precision, recall = precision_recall(y, x) if pairs else (None, None)
    return {'FID': frechet(sample.mu, sample.sigma, mu, sigma),
            'FID_inf': frechet_inf(x, mu, sigma) if len(x) >= 10_000 else None,
            'IS': inception_score(x, network().fc.weight.cpu()) if len(x) >= 10 else None,
            'KID x1000': 1000 * kernel_distance(x, y) if pairs else None,
            'precision': precision, 'recall': recall}


def judge(path, ref, num):
    """Samples of a path -> the first of them, and {column of the table: value}"""
    images = load_images(path)
    n, side = len(images), images.shape[2]
    ref = ref or reference_of(path, side)
    if ref == 'glyphs' and side != 16: stop(f'{path}: glyphs are 16 x 16, these images {side} x {side}')
    if n < max(num, 2): stop(f'{path} holds {n} images, fewer than {max(num, 2)}')
    reference = target(ref, side)
    num = num or (n if reference.n else 50_000)
    if n < num: stop(f'{path} holds {n} images, fewer than {num}, of which published FIDs are: see --num')
    copies = n - len({hash(image.tobytes()) for image in images.numpy()})
    if copies: note(f'{path}: {copies} of {n} images are copies of another')
    if num < 2048: note(f'{path}: {num} images bias the distance upwards: compare equal numbers only')
    if num < n: images = images[np.sort(np.random.RandomState(0).permutation(n)[:num])]         # EDM's choice
    row = reference.judge(images) if ref == 'glyphs' else evaluate(statistics(path, images), reference)
    return images[:16], row | dict(n=num, reference=ref, reference_n=reference.n)


def table(rows):
    """Aligned text of [{column: [values]}]: mean, and sd and minimum of several values. * marks the best, if
    all rows are of equally many samples and have one reference."""
    words = 'model', 'n', 'reference', 'reference_n'
    found = dict.fromkeys(c for row in rows for c, values in row.items() if None not in values)
    measures = [c for c in found if c not in words]
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
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in grid]
    return '\n'.join(map('  '.join, lines))


def sheet(rows, path):
    """Contact sheet of {name: images uint8 (16, 3, H, W)}, each enlarged or reduced to 64 x 64"""
    font, gap, size = ImageFont.load_default(size=15), 6, 64
    left = max(int(font.getlength(name)) for name in rows) + 3 * gap
    canvas = Image.new('RGB', (left + 16 * size, len(rows) * (size + gap) + gap), 'white')
    for y, (name, images) in zip(itertools.count(gap, size + gap), rows.items()):
        ImageDraw.Draw(canvas).text((left - 2 * gap, y + size // 2), name, 'black', font, anchor='rm')
        for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            canvas.paste(Image.fromarray(image).resize((size, size), Image.NEAREST), (left + i * size, y))
    with whole(path) as file: canvas.save(file, 'PNG')

# ----------------------------------------------------------------------------------------------- command line

def config(argv):
    parser = argparse.ArgumentParser('fid.py', allow_abbrev=False)
    parser.error = lambda message: stop(f'{message}; see --help')
    add = parser.add_argument
    add('paths', nargs='*', help='samples: .npz, .zip, a folder of pictures, a run folder (its samples.npz)')
    add('--pack', help='make a data file for training of this folder, .zip, .npz or .tar.gz, and stop')
    add('--res', type=int, default=0, help='side of its images [16, 32 or 64, not above the first]')
    add('--save', help='its name [datasets/<name>.pt]')
    add('--ref', help='cifar10, imagenet64, glyphs, or images or statistics by path or URL '
        '[what the run was trained on, else by size]')
    add('--num', type=int, default=0, help='samples to judge [published reference: 50000, else all]')
    add('--mean', action='store_true', help='files of one folder are samples of one model: mean, sd, minimum')
    add('--json', action='store_true', help='print JSON')
    add('--out', type=Path, default='fid.png', help='contact sheet, if there are several samples [fid.png]')
    cfg = parser.parse_args(argv)
    if bool(cfg.paths) == bool(cfg.pack): stop('give samples to judge, or pictures to --pack; see --help')
    if cfg.paths and (cfg.res or cfg.save): stop('--res and --save belong to --pack')
    if min(cfg.num, cfg.res) < 0: stop('--num and --res are positive')
    for path in cfg.paths:
        if not Path(path).exists(): stop(f'there is no {path}')
    return cfg


def main(argv=None):
    sys.stdout.reconfigure(errors='replace')                    # a console may lack the letters of a name
    warnings.filterwarnings('ignore', module='PIL')             # a refusal is one line, without Pillow's own
    logging.getLogger('PIL').setLevel(logging.CRITICAL)
    cfg = config(argv)
    if cfg.pack: return pack(cfg.pack, cfg.res, cfg.save)
    rows, shown = {}, {}
    for path in map(Path, dict.fromkeys(cfg.paths)):
        if (path / 'latest.pt').exists(): path /= 'samples.npz'
        name = str(path.parent) if cfg.mean else str(path).removesuffix('/samples.npz')
        images, values = judge(path, cfg.ref, cfg.num)
        shown.setdefault(name, images)
        row = rows.setdefault((name, values['reference']), dict(model=[name]))
        for column, value in values.items(): row.setdefault(column, []).append(value)
    rows = list(rows.values())
    print(json.dumps(dict(models=rows), indent=1) if cfg.json else table(rows))
    if len(rows) > 1:
        sheet(shown, cfg.out)
        note(f'contact sheet: {cfg.out}')


if __name__ == '__main__':
    try: main()
    except KeyboardInterrupt: stop('interrupted', 130)
    except OSError as error: stop(error, 1)
