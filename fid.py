# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "scipy"]
# ///
"""
fid.py  Frechet inception distance (Heusel et al. 2017, arXiv:1706.08500) and its companions, as the papers print them.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

between Gaussians fitted to the 2048 features of the Inception network of 2015 for 50,000 samples and for a reference;
lower is better. In the same pass: FID_inf, its limit for endless samples, extrapolated in 1/n (Chong and Forsyth 2020);
inception score (Salimans et al. 2016; 10 splits); KID x 1000 (Binkowski et al. 2018; 100 subsets of 1000); precision
and recall (Kynkaanniemi et al. 2019; k = 3, not VGG's features). A metric without its input is '-' or left out: FID_inf
needs 10,000 samples, and published statistics hold no features.

    python fid.py samples.npz                               # 32 x 32: against CIFAR-10's training images
    python fid.py runs/*/samples.npz                        # a table, fid-samples.png and fid-curves.png
    python fid.py seed0.npz seed1.npz seed2.npz --mean      # files of one folder are one model: mean, sd, minimum
    python fid.py samples.npz --ref photos/ --num 10000     # any folder or .zip of pictures, .npz, CIFAR-10's .tar.gz
    python fid.py runs/*/samples.npz --model dinov2         # FD-DINOv2 (Stein et al. 2023): ViT-L/14, class token

16 x 16 samples are taken for digits, the scripts' default data, and need no download: --model digits is a small
classifier of these, trained on the spot and kept in ./datasets. Its columns, comparable for equal `weights` only:
- FD-digits: d^2 in 70 features of unit variance: 64 learned and, since a classifier need not see colour or grain, the
  mean of each channel and its mean difference of neighbours.
- sure: share of samples that are one digit with p > 0.5. share_min, share_max: of the rarest and commonest digit.
- colour_min, colour_max: standard deviation of the images' mean colour over the data's, smallest and largest channel.

Conventions are those of EDM, ECT, TCM, ADM and torch-fidelity: TensorFlow 1's bilinear resize to 299, (x - 128) / 128,
covariance over n - 1, float32 without TF32 in the network, float64 after it. Where codes differ:
- pytorch-fid resizes on PyTorch's grid, clean-fid by an antialiased bicubic: other figures, mixing them is refused.
- EDM, ECT, pytorch-fid take scipy's sqrtm of S_1 S_2, complex and off by 4e-4 if n < 2048. We take the singular values
  of A_1^T A_2, S_i = A_i A_i^T: real, exact. ECT and TCM divide by n: 2e-5 of the traces at n = 50,000.
- FD-DINOv2 resizes as EDM2, by PyTorch's antialiased bicubic; dgm-eval by Pillow's, rounded to uint8.
"""
import argparse, contextlib, csv, functools, hashlib, io, itertools, json, math, os, pickle, re, sys, tarfile, time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.functional import affine_grid, avg_pool2d, batch_norm, cross_entropy, gelu, grid_sample, interpolate
from torch.nn.functional import max_pool2d, pad, relu, scaled_dot_product_attention

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


def digit_columns(features, fc):
    """Features of Digits (N, 70) or None -> share of images that are surely one digit, of the rarest, the commonest."""
    if features is None: return dict.fromkeys(('sure', 'share_min', 'share_max'))
    p = fc(torch.from_numpy(features)).softmax(1)
    shares = p.argmax(1).bincount(minlength=10) / len(p)
    sure = (p.amax(1) > 0.5).float().mean()
    return dict(sure=sure.item(), share_min=shares.min().item(), share_max=shares.max().item())

# ----------------------------------------------------------------------------------------------------- networks

class Norm(nn.Module):
    """Batch normalisation by stored statistics, whatever the mode of the network."""

    def __init__(self, ch):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(ch)), nn.Parameter(torch.zeros(ch)), 1e-3
        self.register_buffer('running_mean', torch.zeros(ch))
        self.register_buffer('running_var', torch.ones(ch))

    def forward(self, x): return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class Conv(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, cin, cout, size, stride=1, padding='same'):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(cin, cout, size, stride, padding, bias=False), Norm(cout)

    def forward(self, x): return relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        """The normalisation into the convolution: the same function, faster."""
        self.eval()
        self.conv, self.bn = nn.utils.fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


average = functools.partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = functools.partial(max_pool2d, kernel_size=3, stride=1, padding=1)
halve = functools.partial(max_pool2d, kernel_size=3, stride=2)


class Mixed(nn.Module):
    """Branches side by side on (N, cin, H, W), their outputs concatenated: convolutions name=(cin, cout, size, stride,
    padding), where branch5x5_2 continues branch5x5_1; and the pooling, which branch_pool continues if there is one."""

    def __init__(self, pool, **convs):
        super().__init__()
        for name, shape in convs.items(): self.add_module(name, Conv(*shape))
        self.pool = pool

    def forward(self, x):
        ends = {}
        for name, conv in self.named_children():
            branch = name.split('_')[0]
            if branch != 'branch': ends[branch] = conv(ends.get(branch, x))
        pooled = self.pool(x)
        return torch.cat([*ends.values(), self.branch_pool(pooled) if hasattr(self, 'branch_pool') else pooled], 1)


class Mixed7(Mixed):
    """The last two: two of the branches end in two convolutions side by side."""

    def forward(self, x):
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                          self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """The network of inception-2015-12-05, with the parameter names of pytorch-fid's file: uint8 images (N, 3, H, W) ->
    features (N, 2048), logits (N, 1008) without bias, as the inception score takes them."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 1, 0)
        for letter, cin, cpool in (('b', 192, 32), ('c', 256, 64), ('d', 288, 64)):
            self.add_module(f'Mixed_5{letter}', Mixed(
                average, branch1x1=(cin, 64, 1), branch5x5_1=(cin, 48, 1), branch5x5_2=(48, 64, 5),
                branch3x3dbl_1=(cin, 64, 1), branch3x3dbl_2=(64, 96, 3), branch3x3dbl_3=(96, 96, 3),
                branch_pool=(cin, cpool, 1)))
        self.Mixed_6a = Mixed(halve, branch3x3=(288, 384, 3, 2, 0), branch3x3dbl_1=(288, 64, 1),
                              branch3x3dbl_2=(64, 96, 3), branch3x3dbl_3=(96, 96, 3, 2, 0))
        for letter, ch in (('b', 128), ('c', 160), ('d', 160), ('e', 192)):
            self.add_module(f'Mixed_6{letter}', Mixed(
                average, branch1x1=(768, 192, 1), branch7x7_1=(768, ch, 1), branch7x7_2=(ch, ch, (1, 7)),
                branch7x7_3=(ch, 192, (7, 1)), branch7x7dbl_1=(768, ch, 1), branch7x7dbl_2=(ch, ch, (7, 1)),
                branch7x7dbl_3=(ch, ch, (1, 7)), branch7x7dbl_4=(ch, ch, (7, 1)), branch7x7dbl_5=(ch, 192, (1, 7)),
                branch_pool=(768, 192, 1)))
        self.Mixed_7a = Mixed(
            halve, branch3x3_1=(768, 192, 1), branch3x3_2=(192, 320, 3, 2, 0), branch7x7x3_1=(768, 192, 1),
            branch7x7x3_2=(192, 192, (1, 7)), branch7x7x3_3=(192, 192, (7, 1)), branch7x7x3_4=(192, 192, 3, 2, 0))
        for letter, cin, pool in (('b', 1280, average), ('c', 2048, maximum)):
            self.add_module(f'Mixed_7{letter}', Mixed7(
                pool, branch1x1=(cin, 320, 1), branch3x3_1=(cin, 384, 1), branch3x3_2a=(384, 384, (1, 3)),
                branch3x3_2b=(384, 384, (3, 1)), branch3x3dbl_1=(cin, 448, 1), branch3x3dbl_2=(448, 384, 3),
                branch3x3dbl_3a=(384, 384, (1, 3)), branch3x3dbl_3b=(384, 384, (3, 1)), branch_pool=(cin, 192, 1)))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):               # TensorFlow 1: pixel i of 299 lies at i * size / 299, beyond the edge the edge
        x = interpolate(pad(x.float(), (0, 1, 0, 1), 'replicate'), (300, 300), mode='bilinear', align_corners=True)
        x = ((x[..., :299, :299] - 128) / 128).contiguous(memory_format=torch.channels_last)
        for name, layer in self.named_children():
            if name in ('Conv2d_3b_1x1', 'Mixed_5b'): x = halve(x)
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
        self.heads = heads
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
    """A classifier of the glyphs: uint8 images (N, 3, 16, 16) -> features (N, 70) of unit variance over the glyphs: 64
    learned, and the sharpness and the mean of each channel; logits (N, 10)"""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64),
            nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 64))
        self.norm, self.fc = nn.BatchNorm1d(70, affine=False), nn.Linear(70, 10)

    def forward(self, x):
        x = x.float() / 127.5 - 1
        sharpness = x.diff(dim=2).abs().mean((2, 3)) + x.diff(dim=3).abs().mean((2, 3))
        features = self.norm(torch.cat([self.body(x), sharpness, x.mean((2, 3))], 1))
        return features, self.fc(features)


def digits():
    """-> Digits, as kept in ./datasets or trained now: on digits of a fixed seed that is not the reference's, with some
    noise, or it would be sure of any noise too."""
    path, net = Path('datasets/digits.pt'), Digits()
    if not path.exists():
        note(f'training a classifier of the digits, to be kept at {path}')
        torch.manual_seed(0)
        net, (images, labels) = Digits(), glyphs(seed=1)
        optimiser = torch.optim.Adam(net.parameters(), 1e-3)
        for rows in torch.cat([torch.randperm(len(images)) for epoch in range(4)]).split(128):
            noise = 12 * torch.rand(len(rows), 1, 1, 1) * torch.randn(len(rows), 3, 16, 16)
            loss = cross_entropy(net(images[rows] + noise)[1], labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        path.parent.mkdir(exist_ok=True)
        write(path, lambda file: torch.save(net.state_dict(), file))
    with reading(path, ': delete it to train anew'): net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval().requires_grad_(False)

# -------------------------------------------------------------------------------------------- files and weights

METHOD = Path(__file__).stem
WEIGHTS = dict(                         # model: url, sha256
    inception=('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
               'pt_inception-2015-12-05-6726825d.pth',
               '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'),
    dinov2=('https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth',
            'd5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428'))
RESIZE = dict(inception='tf', dinov2='bicubic 224', digits='none')


def stop(message, code=2):
    """One line on stderr (from the first process only) and the exit code: 2 for bad input, 1 for a failed run."""
    if os.environ.get('RANK', '0') == '0': print(f'{METHOD}.py:', *str(message).split(), file=sys.stderr, flush=True)
    sys.exit(code)


def note(text): print(f'{METHOD}.py: {text}', file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading(file, advice=''):
    """Whatever fails in here, while a file of unknown content is read, ends the program with one line about it."""
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
        print(f'fetching {url} to {path}', flush=True)
        with reading(url, f': put it at {path}'):
            path.parent.mkdir(exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        stop(f'{path} is damaged, its sha256 is not {sha256}: delete it and start again')
    return path


def sha256_of(files):
    """Of the content of the files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, 'rb') as file:
            for block in iter(lambda: file.read(1 << 20), b''): digest.update(block)
    return digest.hexdigest()


def network(cfg):
    """-> the network of --model with its weights, folded; the first digits of the sha256 of the weights"""
    if cfg.model == 'digits': return digits(), sha256_of(['datasets/digits.pt'])[:8]
    url, sha256 = WEIGHTS[cfg.model]
    path, net = cfg.weights or fetch(url, sha256), Inception() if cfg.model == 'inception' else DINOv2()
    with reading(path):
        if sha256_of([path]) != sha256: raise ValueError(f'its sha256 is not {sha256}, of {url.rsplit("/", 1)[1]}')
        net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
    for layer in net.modules():
        if isinstance(layer, Conv): layer.fold()
    return net.to(memory_format=torch.channels_last), sha256[:8]

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


def pictures(path):
    """A folder or .zip of pictures with EDM's dataset.json if there, or CIFAR-10's binary .tar.gz -> names, sorted; a
    function from a name to its PIL Image; labels (N,) or None"""
    path, classes = Path(path), {}
    if path.name.endswith('.tar.gz'):
        with tarfile.open(path) as archive:
            batches = sorted((m for m in archive if Path(m.name).match('data_batch_*.bin')), key=lambda m: m.name)
            if not batches: raise ValueError('it holds no data_batch_*.bin: take the binary version of CIFAR-10')
            rows = np.frombuffer(b''.join(archive.extractfile(m).read() for m in batches), np.uint8).reshape(-1, 3073)
        planes = rows[:, 1:].reshape(-1, 3, 32, 32)
        return range(len(rows)), lambda i: Image.fromarray(planes[i].transpose(1, 2, 0)), rows[:, 0]
    kinds = '.png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm'.split()
    archive = None if path.is_dir() else zipfile.ZipFile(path)
    files = archive.namelist() if archive else [p.relative_to(path).as_posix() for p in path.rglob('*')]
    content = archive.read if archive else lambda name: (path / name).read_bytes()
    names = sorted(n for n in files if Path(n).suffix.lower() in kinds and Path(n).name[0] != '.')
    if not names: raise ValueError(f'it holds no pictures ({" ".join(kinds)})')
    if 'dataset.json' in files: classes = dict(json.loads(content('dataset.json'))['labels'] or [])
    labels = np.array([classes[name] for name in names]) if classes else None
    return names, lambda name: Image.open(io.BytesIO(content(name))), labels


class Images:
    """The images of a path, looked over at once and read when needed: n, size (H, W), sha256 of the content. Whatever
    would make a silent difference ends the program: alpha, 16 bits, CMYK, mixed sizes, floats."""

    def __init__(self, path):
        self.path, self.array, self.names, files = Path(path), None, [], [path]
        with reading(path, ': images are a folder or .zip of pictures, an .npz, or CIFAR-10\'s .tar.gz'):
            if self.path.suffix.lower() == '.npz':
                self.array = np.load(path, allow_pickle=False)['arr_0']
                self.n, *self.size, channels = self.array.shape
                if self.array.dtype != np.uint8 or channels != 3 or not self.n:
                    raise ValueError(f'it holds {self.array.dtype} {self.array.shape}, not uint8 images (N, H, W, 3)')
            else:
                self.names, self.picture, _ = pictures(path)
                self.n, self.size = len(self.names), [*self.picture(self.names[0]).size[::-1]]
                if self.path.is_dir(): files = [self.path / name for name in self.names]
            self.sha256 = sha256_of(files)
        for name in self.names:         # only the headers are read
            with reading(f'{self.path}/{name}'):
                image = self.picture(name)
                deep, alpha = ';16' in str(getattr(image, 'tile', '')), 'transparency' in image.info
                if image.mode not in ('RGB', 'L', 'P', '1') or deep or alpha:
                    kind = image.mode + ' of 16 bits' * deep + ' with alpha' * alpha
                    raise ValueError(f'it is {kind}: convert it to 8-bit RGB or grey')
                if self.size != [image.height, image.width]:
                    raise ValueError(f'it is {image.width} x {image.height}, unlike the first, {self.names[0]}')

    def pick(self, rows):
        """The images numbered rows one after the other, each uint8 (H, W, 3)."""
        if self.array is not None: yield from (self.array[i] for i in rows)
        for name in [self.names[i] for i in rows] if self.names else []:
            with reading(f'{self.path}/{name}'): image = np.asarray(self.picture(name).convert('RGB'))
            yield image


def load_images(path):
    """All images of a path: uint8 (N, 3, H, W)"""
    images = Images(path)
    return torch.stack([torch.tensor(a) for a in images.pick(range(images.n))]).permute(0, 3, 1, 2).contiguous()

# --------------------------------------------------------------------------------------------------- statistics

class Arrays(pickle.Unpickler):
    """Reads EDM2's statistics, a pickle of dicts of numpy arrays; any other name in it is an error."""
    KNOWN = {
        'numpy.ndarray': np.ndarray, 'numpy.dtype': np.dtype,
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
    .pkl -> Namespace of mu, sigma, features or None, meta, n, size; or None if path is something else."""
    path = Path(path)
    if not path.is_file() or path.suffix not in ('.npz', '.pkl', '.fid'): return None
    with reading(path), open(path, 'rb') as file:
        if path.suffix == '.pkl': found = Arrays(file).load()['fd_dinov2' if model == 'dinov2' else 'fid']
        else: found = np.load(file, allow_pickle=False)
        if not {'mu', 'sigma'} <= set(found): return None
        mu, sigma = (np.asarray(found[k], np.float64) for k in ('mu', 'sigma'))
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f'it holds mu {mu.shape}, sigma {sigma.shape}: not finite statistics')
        meta = dict(json.loads(str(found['meta']))) if 'meta' in found else {}
        features = found['features'] if 'features' in found else None
    way = re.search('_(clean|legacy_pytorch|legacy_tensorflow)_', path.name)       # clean-fid's file names
    if way and not meta: meta['resize'] = dict(clean='clean', legacy_pytorch='pytorch-fid').get(way[1], 'tf')
    return argparse.Namespace(mu=mu, sigma=sigma, features=features, meta=meta, n=meta.get('n'), size=meta.get('size'))


def extract(images, rows, net, cfg):
    """Features (len(rows), D) of the images numbered rows, and how many of these are copies of another."""
    gpu, n, live = torch.cuda.is_available() and cfg.device == 'auto', len(rows), sys.stderr.isatty()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device, batch = torch.device('cuda' if gpu else 'cpu'), cfg.batch or (128 if gpu else 8)
    start, told, source, net = time.time(), time.time(), images.pick(rows), net.to(device)
    features, different, done = [], set(), 0
    while done < n:
        block = np.stack(list(itertools.islice(source, batch)))
        different.update(hashlib.sha256(image.tobytes()).digest() for image in block)
        x = torch.from_numpy(block).to(device).permute(0, 3, 1, 2)
        with torch.inference_mode(): features.append(net(x)[0].cpu().numpy())
        done += len(block)
        if live or time.time() > told + 60 or done == n:
            told, pace = time.time(), (time.time() - start) / done
            text = f'{images.path}: {done} of {n} images, {1 / pace:.1f} img/s, {(n - done) * pace / 60:.1f} min left  '
            print('\r' * live + text, end='' if live and done < n else '\n', file=sys.stderr, flush=True)
    features = np.concatenate(features)
    if not np.isfinite(features).all(): stop(f'{images.path}: the network returns NaN', 1)
    return features, n - len(different)


def statistics(images, num, net, weights, cfg):
    """What read_statistics gives, of num of the images (0: all), from the file beside them or computed and put there;
    features of more than 50,000 images are not kept."""
    n = num or images.n
    cache = Path(f'{images.path}.{cfg.model}.fid')
    key = dict(format=2, model=cfg.model, resize=RESIZE[cfg.model], weights=weights, n=n, of=images.n, size=images.size,
               sha256=images.sha256)
    found = read_statistics(cache)
    if found and {k: found.meta.get(k) for k in key} == key: return found
    rows = np.sort(np.random.RandomState(0).permutation(images.n)[:n])         # EDM's choice of a subset
    features, copies = extract(images, rows, net, cfg)
    if copies: note(f'{images.path}: {copies} of {n} images are duplicates of another')
    meta = key | dict(source=str(images.path), duplicates=copies, cov='n-1', torch=torch.__version__)
    mu, sigma = gaussian(features)
    kept = dict(mu=mu, sigma=sigma, meta=json.dumps(meta)) | (dict(features=features) if n <= 50_000 else {})
    if os.access(cache.parent, os.W_OK): write(cache, lambda file: np.savez(file, **kept))
    else: note(f'{cache.parent} is read-only: the statistics of {images.path} are not kept')
    return argparse.Namespace(mu=mu, sigma=sigma, features=features, meta=meta, n=n, size=images.size)

# --------------------------------------------------------------------------------------------------- comparison

def reference(name, cfg):
    """-> the Images or statistics that --ref stands for, and whether these are published, for 50,000 samples"""
    path, published = name, not Path(name).exists() and name in ('cifar10', 'imagenet64')
    if published and cfg.model == 'inception':
        file = dict(cifar10='cifar10-32x32.npz', imagenet64='imagenet-64x64.npz')[name]
        path = fetch(f'https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/{file}')          # no hash was published
    elif published: path = 'datasets/' + dict(cifar10='cifar-10-binary.tar.gz', imagenet64='imagenet-64x64.zip')[name]
    elif '://' in name: path = fetch(name)
    elif name == 'glyphs' and not Path(name).exists():
        path = Path('datasets/glyphs.npz')
        path.parent.mkdir(exist_ok=True)
        if not path.exists(): write(path, lambda file: np.savez(file, glyphs()[0].permute(0, 2, 3, 1).numpy()))
    found = read_statistics(path, cfg.model)
    return found or Images(path), published or bool(found and 'weights' not in found.meta)


def evaluate(sample, ref, net, cfg):
    """-> {column: value}; a metric without its input is None"""
    x, y, kind = sample.features, ref.features, dict(inception='FID', dinov2='FD-DINOv2', digits='FD-digits')[cfg.model]
    if sample.mu.shape != ref.mu.shape:
        stop(f'the reference has {len(ref.mu)} features, the samples {len(sample.mu)}: not of one network')
    row = {kind: frechet(sample.mu, sample.sigma, ref.mu, ref.sigma)}
    if cfg.model == 'digits':
        spread = np.sqrt(np.diag(sample.sigma)[-3:] / np.diag(ref.sigma)[-3:])         # of the mean colours
        return row | digit_columns(x, net.fc) | dict(colour_min=spread.min(), colour_max=spread.max(), n=sample.n)
    row[f'{kind}_inf'] = frechet_inf(x, ref.mu, ref.sigma) if x is not None and len(x) >= 10_000 else None
    if kind == 'FID': row['IS'] = inception_score(x, net.fc.weight) if x is not None and len(x) >= 10 else None
    both = x is not None and y is not None and min(len(x), len(y)) > 3
    row['KID x1000' if kind == 'FID' else 'KD x1000'] = 1000 * kernel_distance(x, y) if both else None
    row['precision'], row['recall'] = precision_recall(y, x) if both else (None, None)
    return row | dict(n=sample.n)


def table(rows):
    """Aligned text of [{column: [values]}]: mean, and sd and minimum where there are several; * marks the best."""
    columns = [c for c in rows[0] if any(row[c] != [None] * len(row[c]) for row in rows)]
    best = dict(IS=max, precision=max, recall=max, sure=max)
    best |= {c: min for c in columns if c.startswith(('FID', 'FD', 'KID', 'KD'))}
    equal = len(rows) > 1 and len({n for row in rows for n in row['n']}) == 1

    def cell(row, c):
        values = row[c]
        if c in ('model', 'n'): return ' '.join(dict.fromkeys('-' if v is None else str(v) for v in values))
        if None in values: return '-'
        text = f'{np.mean(values):.3f}'
        if len(values) > 1: text += f' +- {np.std(values, ddof=1):.3f} (min {min(values):.3f})'
        if not equal or c not in best: return text
        means = [np.mean(r[c]) for r in rows if None not in r[c]]
        return text + ('*' if np.mean(values) == best[c](means) else ' ')
    grid = [columns, *([cell(row, c) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    return '\n'.join('  '.join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:]))]).rstrip()
                     for line in grid)

# ----------------------------------------------------------------------------------------------------- pictures

def sheet(rows, path):
    """Contact sheet of {name: [images uint8 (H, W, 3)]}, small ones enlarged."""
    font, gap = ImageFont.load_default(size=15), 6
    left = max(int(font.getlength(name)) for name in rows) + 3 * gap
    strips = [Image.fromarray(np.concatenate(images, 1)) for images in rows.values()]
    strips = [ImageOps.scale(s, max(1, 48 // s.height), Image.NEAREST) for s in strips]
    width, height = left + max(s.width for s in strips), sum(s.height + gap for s in strips) + gap
    canvas, y = Image.new('RGB', (width, height), 'white'), gap
    for name, strip in zip(rows, strips):
        ImageDraw.Draw(canvas).text((left - 2 * gap, y + strip.height // 2), name, 'black', font, anchor='rm')
        canvas.paste(strip, (left, y))
        y += strip.height + gap
    write(path, lambda file: canvas.save(file, 'PNG'))


def curves(logs, path):
    """Loss and gradient norm over the steps, logarithmic, from {name: rows of log.csv}; a line breaks where a phase
    ends, since the objectives of two phases have no common scale."""
    font, (width, height, left, gap) = ImageFont.load_default(size=14), (640, 300, 64, 30)
    colours = '#1f6fb4 #d95f02 #1b8a5a #a6306e #7a5195 #8c6d1f #444444 #17a2b8'.split() * len(logs)
    canvas = Image.new('RGB', (left + width + gap, 2 * (height + gap) + gap + 24 * len(logs)), 'white')
    pen = ImageDraw.Draw(canvas)
    last = max(float(row['step']) for rows in logs.values() for row in rows)
    for top, column in ((gap, 'loss'), (2 * gap + height, 'grad_norm')):
        values = [float(row[column]) for rows in logs.values() for row in rows]
        values = [math.log10(v) for v in values if 0 < v < math.inf] or [0.0]
        low, high = math.floor(min(values)), math.floor(max(values)) + 1
        place = lambda step, v: (left + width * step / last, top + height * (high - math.log10(v)) / (high - low))
        pen.text((left, top - 4), column, 'black', font, anchor='lb')
        for power in range(low, high + 1):
            y = place(0, 10.0 ** power)[1]
            pen.line((left, y, left + width, y), '#dddddd')
            pen.text((left - 8, y), f'{10.0 ** power:g}', 'black', font, anchor='rm')
        for rows, colour in zip(logs.values(), colours):
            for _, phase in itertools.groupby(rows, lambda row: row['phase']):
                points = [(float(row['step']), float(row[column])) for row in phase]
                pen.line([place(step, v) for step, v in points if 0 < v < math.inf], colour, 2)
    pen.text((left + width, top + height + 10), f'step {last:g}', 'black', font, anchor='rt')
    for k, (name, colour) in enumerate(zip(logs, colours)):
        y = top + height + gap + 12 + 24 * k
        pen.line((left, y, left + 30, y), colour, 3)
        pen.text((left + 40, y), name, 'black', font, anchor='lm')
    write(path, lambda file: canvas.save(file, 'PNG'))

# ------------------------------------------------------------------------------------------------- command line

def config(argv):
    parser = argparse.ArgumentParser('fid.py', allow_abbrev=False)
    parser.error = lambda message: stop(f'{message}; see --help')
    add = parser.add_argument
    add('paths', nargs='+', help='samples: .npz, .zip, a folder of pictures, a run folder (its samples.npz)')
    add('--ref', default='', help='cifar10, imagenet64, glyphs, or images or statistics by path or URL [by size]')
    add('--num', type=int, default=0, help='images of each; fewer are an error [50000 for a published --ref, or all]')
    add('--model', default='', choices=('inception', 'dinov2', 'digits'), help='[inception; digits for 16 x 16 glyphs]')
    add('--weights', '--inception', default='', help='weight file of the model [in ./datasets, or downloaded there]')
    add('--mean', action='store_true', help='files of one folder are samples of one model: mean, sd, minimum')
    add('--json', action='store_true', help='print JSON')
    add('--out', default='fid', help='pictures of a comparison: <out>-samples.png, <out>-curves.png from log.csv [fid]')
    add('--device', default='auto', choices=('auto', 'cpu'))
    add('--batch', type=int, default=0, help='images at once [128 a GPU; 8 on the CPU, which is fastest]')
    cfg = parser.parse_args(argv)
    if cfg.num < 0 or cfg.batch < 0: stop('--num and --batch must be positive')
    return cfg


def main(argv=None):
    cfg = config(argv)
    paths = [str(Path(p, 'samples.npz')) if Path(p, 'latest.pt').exists() else p for p in dict.fromkeys(cfg.paths)]
    samples = [read_statistics(p, cfg.model) or Images(p) for p in paths]
    size = next((s.size for s in samples if s.size), [32, 32])
    name = cfg.ref or {16: 'glyphs', 32: 'cifar10', 64: 'imagenet64'}.get(size[0])
    if not name: stop(f'the samples are {size[1]} x {size[0]}: name what to compare them with by --ref')
    cfg.model = cfg.model or ('digits' if name == 'glyphs' and not cfg.weights else 'inception')
    if cfg.model == 'digits' and size != [16, 16]: stop(f'--model digits is for 16 x 16, not {size[1]} x {size[0]}')
    ref, published = reference(name, cfg)
    if ref.n == 1: stop(f'{name} holds one image')
    num = cfg.num or 50_000 * published
    for found, path in zip(samples, paths):
        n = found.n or num
        if n < max(num, 2): stop(f'{path} holds {n} images, fewer than {max(num, 2)}: make more, or lower --num')
        if (num or n) < 2048: note(f'{path}: {num or n} images are few: biased upwards, compare equal numbers only')
    net, weights = network(cfg)
    way = dict(model=cfg.model, resize=RESIZE[cfg.model], weights=weights)
    for found, path in zip([*samples, ref], [*paths, name]):
        if found.size not in (None, size): stop(f'{path} is of size {found.size}, the samples are of {size}')
        if isinstance(found, Images): continue
        for key in way.keys() & found.meta.keys():
            if found.meta[key] != way[key]: stop(f'{path} was made with {key} {found.meta[key]}, not {way[key]}')
        if not found.meta: note(f'{path} does not say how it was made: assumed like this')
    target = statistics(ref, 0, net, weights, cfg) if isinstance(ref, Images) else ref
    models, shown = {}, {}
    for found, path in zip(samples, paths):
        model = str(Path(path).parent) if cfg.mean else path
        if isinstance(found, Images):
            shown.setdefault(model, found)
            found = statistics(found, num, net, weights, cfg)
        for column, value in evaluate(found, target, net, cfg).items():
            models.setdefault(model, {}).setdefault(column, []).append(value)
    folders = [Path(model).parent.name for model in models]
    names = dict(zip(models, folders if len(set(folders)) == len(models) > 1 else models))
    rows = [dict(model=[names[model]]) | row for model, row in models.items()]
    about = dict(reference=name, reference_n=target.n) | way
    if cfg.json: print(json.dumps(about | dict(models=rows), indent=1))
    else: print(table(rows), ', '.join(f'{k} {v}' for k, v in about.items() if v), sep='\n')
    if len(rows) == 1: return
    rows = {names[model]: images for model, images in shown.items()}
    logs = {model: images.path.parent / 'log.csv' for model, images in rows.items()}
    logs = {model: list(csv.DictReader(log.read_text().splitlines())) for model, log in logs.items() if log.exists()}
    if isinstance(ref, Images): rows['reference'] = ref
    if rows: sheet({model: list(i.pick(range(min(16, i.n)))) for model, i in rows.items()}, f'{cfg.out}-samples.png')
    if logs: curves(logs, f'{cfg.out}-curves.png')
    note(f'pictures: {cfg.out}-samples.png {cfg.out}-curves.png' if logs else f'picture: {cfg.out}-samples.png')


if __name__ == '__main__':
    try: main()
    except OSError as error: stop(error, 1)
    except torch.OutOfMemoryError as error: stop(f'out of GPU memory, lower --batch: {error}', 1)
