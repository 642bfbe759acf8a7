# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy", "pillow>=10.1"]
# ///
"""
fid.py  Frechet inception distance (Heusel et al. 2017, arXiv:1706.08500) and its companions, as the papers
print them; and the one place where pictures are read: --pack makes the data file of a training run.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

between Gaussians fitted to the 2048 pooled features of the Inception network of 2015 for 50,000 samples and
for a reference; lower is better. In the same pass: FID_inf, its limit for endless samples, extrapolated in 1/n
(Chong and Forsyth 2020; from 10,000 samples on); the inception score (Salimans et al. 2016; 10 splits in
order); KID x 1000 (Binkowski et al. 2018; 100 subsets of 1000); precision and recall (Kynkaanniemi et al. 2019;
k = 3, in the same features, not VGG's). A published reference has only mu and sigma: then the last three are
left out.

    python fid.py --pack photos                         # a folder or .zip of pictures -> datasets/photos.pt
    python fid.py runs/*/samples.npz                    # each against the data that its run was trained on
    python fid.py samples.npz --ref photos --num 10000  # a folder, .zip, .npz, .pt, or published statistics
    python fid.py a/0.npz a/1.npz a/2.npz --mean        # one model: mean, sd and minimum, which EDM reports

Samples of the embedded digits are compared with digits, in closed form (class Digits): FD-digits, the Frechet
distance in 35 features of variance 1. sure: share of samples that look like one digit. share_min, share_max: of
the rarest and the commonest digit, 0.1 in the data. colour_min, colour_max: standard deviation of the mean
colour over the data's, least and most varied channel.

Conventions are those of EDM, EDM2, ECT, TCM and ADM: TensorFlow 1's bilinear resize to 299, (x - 128) / 128,
covariance over n - 1, statistics in float64. Where codes differ:
- The network is in true float32 here. EDM's and EDM2's evaluators set no flag, so their convolutions may use
  TF32; ECT's main branch and TCM switch it off.
- pytorch-fid resizes on PyTorch's grid and scales to [-1, 1], clean-fid by an antialiased bicubic: --resize
  pytorch-fid, --resize clean. The figures are not comparable, so the choice is in every file, mixing is refused.
- EDM, ECT, pytorch-fid take scipy's sqrtm of S_1 S_2, complex and off by 4e-4 if n < 2048. We take the singular
  values of A_1^T A_2, S_i = A_i A_i^T: real, exact. ECT and TCM divide by n: 2e-5 of the traces at n = 50,000.
- ImageNet-64: EDM2's statistics of all training images, which ECT, TCM and sCM use. CT's FIDs are of ADM's
  evaluator and its reference batch, VIRTUAL_imagenet64_labeled.npz: give it as --ref.
- Our scripts sample equally many images of each class, in turn; EDM2 and TCM draw classes at random, ECT from
  the labels of the data.
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

METHOD = Path(__file__).stem

# ------------------------------------------------------------------------------------------ reading and writing

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

# ----------------------------------------------------------------------------------------------------- pictures

Image.init()
SUFFIXES = '.png .jpg .jpeg .jfif .mpo .webp .avif .bmp .gif .tif .tiff'.split()
FORMATS = [kind for kind in ('PNG', 'JPEG', 'WEBP', 'AVIF', 'BMP', 'GIF', 'TIFF') if kind in Image.OPEN]
NEEDED = '; pictures are in a folder, .zip, .npz of arr_0 (N, H, W, 3), .pt, or the binary .tar.gz of CIFAR-10'


def files_of(path):
    """Names of the files in a folder or .zip, in order, and a function that reads one. Hidden files and folders
    do not count, linked ones do; nothing of an archive is written to the disk."""
    if path.is_dir():
        found = [(name, path / name) for name in glob.glob('**', root_dir=path, recursive=True)]
        places = {name.replace(os.sep, '/'): file for name, file in found if file.is_file() or not file.exists()}
        read = Path.read_bytes
    else:
        archive = zipfile.ZipFile(path)
        if any(member.file_size > 2**28 for member in archive.infolist()): raise ValueError('a member exceeds 256 MB')
        places = {name.replace('\\', '/'): name for name in archive.namelist()}
        read = archive.read
    names = sorted(name for name in places if '/.' not in f'/{name}' and name[-1] != '/')
    return names, lambda name: read(places[name])


def folder_labels(names):
    """Classes of pictures by their folders, in order of the folders' names: the first level that has several.
    -> labels (N,), -1 for pictures that lie beside these folders; names of the classes, none if all lie together"""
    folders = [PurePosixPath(name).parent.parts for name in names]
    level = len(os.path.commonprefix(folders))
    tops = [parts[level] if len(parts) > level else '' for parts in folders]
    classes = sorted(set(tops) - {''})
    if len(classes) < 2: return np.full(len(names), -1), []
    return np.array([classes.index(top) if top else -1 for top in tops]), classes


def listed_labels(names, tables):
    """Labels (N,) that EDM's dataset.json gives to pictures, -1 where it gives none. tables: {its name: content}.
    It may lie in any folder; names in it are relative to that."""
    listed = [(str(PurePosixPath(table).parent / name), label) for table, content in tables.items()
              for name, label in json.loads(content)['labels'] or []]
    number = dict(listed)
    if len(number) < len(listed): raise ValueError('dataset.json gives a picture two labels')
    labels = np.array([number.get(name, -1) for name in names]).reshape(len(names))
    return labels.astype(np.int64, casting='safe')


def arrays(path):
    """An .npz (arr_0, arr_1), a .pt that --pack made, or CIFAR-10's binary .tar.gz -> images uint8 (N, H, W, 3),
    labels (N,) or None"""
    if path.suffix == '.pt':            # stays on the disk
        images, labels = torch.load(path, mmap=True, weights_only=True)
        images, labels = images.permute(0, 2, 3, 1).numpy(), None if labels is None else labels.numpy()
    elif path.suffix == '.npz':
        file = np.load(path)
        images, labels = file['arr_0'], file['arr_1'] if 'arr_1' in file else None
    else:
        with tarfile.open(path) as archive:
            batches = sorted((m for m in archive if Path(m.name).match('data_batch_*.bin')), key=lambda m: m.name)
            if not batches: raise ValueError('it holds no data_batch_*.bin: take the binary version of CIFAR-10')
            rows = np.frombuffer(b''.join(archive.extractfile(m).read() for m in batches), np.uint8)
            while archive.fileobj.read(2**20): pass             # to its end, where gzip's checksum is
        rows = rows.reshape(-1, 3073)
        images, labels = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(f'it holds {images.dtype} {images.shape}, not uint8 (N, H, W, 3)')
    return images, labels


def pictures(path):
    """What a path holds -> path; names of its pictures, in order; picture(name), a PIL Image; labels(), a function
    to labels (N,) or None and names of the classes; others, the kinds of other files, counted."""
    path = Path(path)
    if not path.exists(): stop(f'there is no {path}')
    if path.suffix in ('.gz', '.npz', '.pt') and path.is_file():
        images, labels = arrays(path)
        return SimpleNamespace(path=path, names=range(len(images)), picture=lambda i: Image.fromarray(images[i]),
                               labels=lambda: (labels, []), others={})
    files, read = files_of(path)
    names = [name for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES]
    tables = [name for name in files if PurePosixPath(name).name == 'dataset.json']
    if not names: raise ValueError(f'it holds no pictures ({" ".join(SUFFIXES)})')

    def labels():
        if not tables: return folder_labels(names)
        return listed_labels(names, {table: read(table) for table in tables}), []
    return SimpleNamespace(
        path=path, names=names, picture=lambda name: Image.open(io.BytesIO(read(name)), formats=FORMATS), labels=labels,
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
    """Pictures -> uint8 (N, 3, res, res). Several at once, in pieces, so that no more memory is used than these."""
    images, sizes, n = np.empty((len(found.names), 3, res, res), np.uint8), Counter(), len(found.names)

    def fill(i):
        image = found.picture(found.names[i])
        images[i] = pixels(image, res)
        return image.size
    start = told = time.time()
    with ThreadPoolExecutor() as pool:
        for first in range(0, n, 1000):
            piece = range(n)[first:first + 1000]
            results = pool.map(fill, piece)
            for i in piece:
                with reading(f'{found.path}/{found.names[i]}'): sizes[next(results)] += 1
            if time.time() > told + 20:
                told, done = time.time(), piece[-1] + 1
                note(f'{found.path}: {done} of {n} pictures, {(told - start) * (n / done - 1):.0f} s left')
    other, small = n - sizes[res, res], sum(sizes[size] for size in sizes if min(size) < res)
    if other: note(f'{found.path}: {other} of {n} pictures cropped and resized to {res} x {res}, {small} enlarged')
    return torch.from_numpy(images)


def load_images(path, res=0):
    """All images of a path: uint8 (N, 3, res, res), of the shorter side of the first one if res is 0."""
    with reading(path, NEEDED): found = pictures(path)
    return decoded(found, res or side_of(found))


def class_list(labels, classes):
    """Which classes have which numbers, as text. Numbers that are left out end the program."""
    n, numbers = Counter(labels.tolist()), sorted({*labels.tolist()} - {-1})
    if numbers != [*range(len(numbers))]:
        raise ValueError(f'its labels are {numbers[0]} to {numbers[-1]}, {len(numbers)} of them: they must be '
                         '0, 1, 2, ..., each with a picture')
    if not numbers: return 'no classes'
    text = [f'{name} -> {i}' for i, name in enumerate(classes)] or [str(i) for i in numbers]
    if len(text) > 12: text[8:-2] = ['...']
    without = f'; {n[-1]} WITHOUT a label, so that training is unconditional' if n[-1] else ''
    return f'{len(numbers)} classes ({", ".join(text)}){without}'


def pack(path, res, save):
    """Writes the pictures of a path as a data file: (images uint8 (N, 3, res, res), labels int64 (N,) or None)."""
    name = Path(os.path.abspath(path))
    save = Path(save or f'datasets/{name.name if name.is_dir() else name.stem.removesuffix(".tar")}.pt')
    if save.suffix != '.pt': stop(f'--save {save}: the name of a data file ends in .pt')
    if save.exists(): stop(f'{save} exists: delete it, or give another name by --save')
    with reading(path, NEEDED):
        found = pictures(path)
        labels, classes = found.labels()
        if labels is None: labels = np.full(len(found.names), -1)
        labels = labels.astype(np.int64, casting='safe')
        text = class_list(labels, classes)
    res, n = res or max((s for s in (16, 32, 64) if s <= side_of(found)), default=16), len(found.names)
    print(f'{path}: {n} pictures, {text}; to be {res} x {res}, {n * 3 * res**2 / 1e9:.2g} GB of memory', flush=True)
    if found.others:
        print('left out, of other kinds:', ', '.join(f'{count} {kind}' for kind, count in found.others.most_common(20)))
    with written(save) as file:
        data = decoded(found, res), torch.from_numpy(labels) if labels.max() >= 0 else None
        torch.save(data, file)
    print(f'{save}: {n} images of side {res}. To train on them:\npython ect.py --data {save}')

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
        stop(f'{path} is no data file: python fid.py --pack {path}, then --data with the .pt that it names')
    with reading(path, f'; --data is {", ".join(DATA)}, or from: python fid.py --pack PATH --save FILE.pt'):
        images, labels = torch.load(path, mmap=True, weights_only=True)
        n, res = len(images), images.shape[-1]
        if (images.dtype, images.shape) != (torch.uint8, (n, 3, res, res)):
            raise ValueError(f'its images are {images.dtype} {tuple(images.shape)}')
        if labels is not None and (labels.dtype, labels.shape) != (torch.int64, (n,)):
            raise ValueError(f'its labels are {labels.dtype} {tuple(labels.shape)}')
    return images, labels


def main(argv=None):
    parser = argparse.ArgumentParser('fid.py', allow_abbrev=False)
    parser.error = lambda message: stop(f'{message}; see --help')
    add = parser.add_argument
    add('paths', nargs='*'); add('--pack', type=Path); add('--res', type=int, default=0); add('--save', default='')
    cfg = parser.parse_args(argv)
    pack(cfg.pack, cfg.res, cfg.save)

if __name__ == '__main__': main()
