"""
fuzz.py  Damaged and hostile files against the scripts of a checkout.

    cd <project root>; python .ci/fuzz.py SECONDS [--seed N] [--kind NAME] [--case I] [--keep FOLDER] [--workers N]

Prints one line of figures on stdout; one line per distinct breach on stderr; exit 1 if there was any. First every fixed
hostile file once (3 minutes on two cores), then random damage to a good file of every kind in turn, for SECONDS. A case is a function
of (--seed, kind, number): `--seed 0 --kind npz --case 17` repeats it and shows what it printed. --keep FOLDER keeps the
files that did it. Each case runs in a forked child, with a limit of memory (3 GB more than the parent) and time (40 s).

What counts as a breach (the promise: one line on stderr that names the culprit, exit code 2, nothing else touched):
  code       something of the file's choice ran             crash      the process died of a signal
  outside    a file was written or changed elsewhere        lost       the checkpoint changed although it was refused
  hang       40 s were not enough                           memory     more than 1.5 GB were used
  silent     damaged (the format has a checksum, or bytes are missing) and taken as good, with other content
  accepted   a hostile file that must be refused was taken  traceback  an exception reached the user
  lines      not exactly one line on stderr                 exit       refused with another exit code than 2
  unnamed    the line does not name the file at fault
Not a breach: damage in bytes no checksum guards (.npy, BMP, labels in JSON, .log) that leaves a well-formed file. Told as
a figure of its own, "unguarded": other content from damage to a zip's directory of names alone (it has no checksum: a
picture called .pnf is none), from bytes missing inside a PNG's IDAT (Pillow does not look at its sums), a JPEG or an EDM pickle
(no checksum). Lines before ours of libtiff's own, and of CPython's unpickler ("deallocated bytearray").
"""
import argparse, contextlib, faulthandler, gzip, hashlib, io, json, logging, os, pickle, random, re, resource, shutil, signal
import struct, sys, tarfile, tempfile, time, types, warnings, zipfile, zlib
from collections import Counter, OrderedDict
from pathlib import Path

ROOT = Path.cwd()
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import torch
from PIL import Image

torch.set_num_threads(1)
MEMORY, TIME = 3 << 30, 40
TINY = '--ch 8 --mult 1,2 --blocks 1 --attn 4 --batch 4 --log_every 1 --dropout 0 --lr 1e-3 --device cpu'.split()

# --------------------------------------------------------------------------------------------------------- seeds

def pictures(n=12, side=8, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (n, 2, 2, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(a).resize((side, side), Image.BILINEAR)) for a in small])


def encoded(a, kind, **kw):
    b = io.BytesIO()
    Image.fromarray(a).save(b, kind, **kw)
    return b.getvalue()


def zipped(entries, method=zipfile.ZIP_STORED):
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w', method) as z:
        for name, data in entries: z.writestr(name, data)
    return b.getvalue()


def npz(compressed=False, **arrays):
    b = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(b, **arrays)
    return b.getvalue()


def bomb_zip(name, first, megabytes):
    """A zip of one entry: first, then megabytes of zeros."""
    c = zlib.compressobj(9, wbits=-15)
    body = c.compress(first) + c.flush(zlib.Z_FULL_FLUSH)
    body += (c.compress(bytes(1 << 20)) + c.flush(zlib.Z_FULL_FLUSH)) * megabytes + c.flush()
    crc = zlib.crc32(first)
    for _ in range(megabytes): crc = zlib.crc32(bytes(1 << 20), crc)
    head = struct.pack('<HHHHHIIIHH', 20, 0, 8, 0, 33, crc, len(body), len(first) + (megabytes << 20), len(name), 0)
    local = b'PK\3\4' + head + name.encode() + body
    central = b'PK\1\2' + struct.pack('<H', 20) + head + struct.pack('<HHHII', 0, 0, 0, 0, 0) + name.encode()
    return local + central + b'PK\5\6' + struct.pack('<HHHHIIH', 0, 0, 1, 1, len(central), len(local), 0)


def npy(a):
    b = io.BytesIO()
    np.save(b, a)
    return b.getvalue()


def cifar_tar(n=3, mode='w:gz'):
    b, rng = io.BytesIO(), np.random.default_rng(1)
    with tarfile.open(fileobj=b, mode=mode) as t:
        for k in range(1, n + 1):
            rows = rng.integers(0, 256, (2, 3073), dtype=np.uint8)
            rows[:, 0] %= 10
            info = tarfile.TarInfo(f'cifar-10-batches-bin/data_batch_{k}.bin')
            info.size = rows.size
            t.addfile(info, io.BytesIO(rows.tobytes()))
    return b.getvalue()


class Persist:                          # EDM's layout, without EDM
    def __init__(self, meta): self.meta = meta
    def __reduce__(self): return sys.modules['torch_utils.persistence']._reconstruct_persistent_obj, (self.meta,)


def edm_pickle(m, top=None, edm2=False, **overrides):
    mod = types.ModuleType('torch_utils.persistence')
    def _reconstruct_persistent_obj(meta): return None
    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = 'torch_utils.persistence', '_reconstruct_persistent_obj'
    mod._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules['torch_utils'], sys.modules['torch_utils.persistence'] = types.ModuleType('torch_utils'), mod
    kw = dict(img_resolution=8, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], label_dim=0,
              embedding_type='positional', encoder_type='standard', decoder_type='standard', dropout=0.1) | overrides
    shape = dict(res=8, arch='edm2' if edm2 else 'ddpmpp', ch=8, blocks=1, mult=(1, 2), attn=(4,), head_dim=8 if edm2 else 0, cond=0, classes=1, dropout_res=9)
    torch.manual_seed(0)
    net = m.UNet(argparse.Namespace(**shape, fourier=16.0, dropout=0.0))
    if edm2: kw = dict(img_resolution=8, img_channels=3, label_dim=0, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=8)
    state = dict(_init_kwargs=kw, _parameters=OrderedDict(net.state_dict()), _buffers={}, _modules=OrderedDict())
    song = Persist(dict(type='class', version=6, module_src='raise SystemExit', class_name='UNet' if edm2 else 'SongUNet', state=state))
    state = dict(_parameters={}, _buffers={}, _modules=OrderedDict(**{'unet' if edm2 else 'model': song}))
    ema = Persist(dict(type='class', version=6, module_src='raise SystemExit', class_name='EDMPrecond', state=state))
    return pickle.dumps(dict(ema=ema) | (top or {}), 4)


# --------------------------------------------------------------------------------------------------------- damage

INTS = [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, 1 << 40, (1 << 62), (1 << 63) - 1]
WORDS = ('-1 0 1 255 1e400 null NaN Infinity 1.5 99999999999999999999 123456789 "x" [] {} [1,2] true |O8 <f8 >u2 |S4 '
         '(0,0) (8,8,3) (9999999999,8,8,3) , ; : ( { [').split()


def damage(data, r):
    """-> damaged bytes, what was done, whether bytes went missing"""
    n, op = len(data), r.random()
    if n < 2: return data + b'\0', 'append', False
    if op < 0.30:
        k = r.randrange(n) if r.random() < 0.7 else max(0, n - r.randrange(1, min(n, 64) + 1))
        return data[:k], f'cut at {k} of {n}', True
    b = bytearray(data)
    spot = lambda: r.choice([r.randrange(n), r.randrange(min(n, 300)), n - 1 - r.randrange(min(n, 300))])
    if op < 0.65:
        at = sorted(spot() for _ in range(r.randint(1, 4)))
        for i in at: b[i] ^= 1 << r.randrange(8)
        return bytes(b), f'bit flips at {at} of {n}', False
    if op < 0.78:
        size, order, i = r.choice([1, 2, 4, 8]), r.choice('<>'), spot()
        b[i:i + size] = (r.choice(INTS) & ((1 << 8 * size) - 1)).to_bytes(size, 'little' if order == '<' else 'big')
        return bytes(b), f'{size}-byte integer at {i} of {n}', False
    i, length = spot(), r.choice([1, 2, 4, 16, 100, 1000])
    if op < 0.85:
        fill = r.choice([b'\0', b'\xff'])
        b[i:i + length] = fill * len(b[i:i + length])
        return bytes(b), f'{length} bytes of {fill!r} at {i} of {n}', False
    if op < 0.93: return bytes(b[:i] + b[i + length:]), f'{length} bytes out at {i} of {n}', True
    return bytes(b[:i] + b[i:i + length] + b[i:]), f'{length} bytes twice at {i} of {n}', False


def damage_text(data, r):
    """A word of a text for another, or damage to its bytes."""
    if r.random() < 0.3: return damage(data, r)
    text = data.decode('latin1')
    tokens = list(re.finditer(r'"[^"]*"|\'[^\']*\'|[-+.\w]+|[^\s\w]', text))
    if not tokens: return damage(data, r)
    for _ in range(r.randint(1, 2)):
        t, word = r.choice(tokens), r.choice(WORDS)
        text = text[:t.start()] + word + text[t.end():]
        if len(tokens) < 2: break
        tokens = list(re.finditer(r'"[^"]*"|\'[^\']*\'|[-+.\w]+|[^\s\w]', text)) or tokens
    return text.encode('latin1'), f'a word replaced by {word}', False


def damage_npy(data, r):
    """A word of an .npy's header for another, its length put right."""
    size = struct.unpack('<H', data[8:10])[0]
    header, what, _ = damage_text(data[10:10 + size], r)
    header = header[:65535]
    major = bytes([r.choice([1, 1, 1, 2, 3, 4])])
    length = struct.pack('<H', len(header)) if major == b'\1' else struct.pack('<I', len(header))
    return data[:6] + major + data[7:8] + length + header + data[10 + size:], f'.npy header, {what}', False


def damage_png(data, r):
    """A chunk's content damaged, its CRC put right."""
    out, i, chunks = data[:8], 8, []
    while i < len(data):
        size = struct.unpack('>I', data[i:i + 4])[0]
        chunks.append([data[i + 4:i + 8], data[i + 8:i + 8 + size]])
        i += 12 + size
    if r.random() < 0.3: chunks.insert(r.randrange(1, len(chunks)), [r.choice([b'tRNS', b'PLTE', b'iCCP', b'zTXt', b'eXIf', b'gAMA', b'acTL', b'fcTL', b'pHYs', b'cHRM', b'iTXt']), r.randbytes(r.choice([0, 1, 5, 9, 32]))])
    k = r.randrange(len(chunks))
    chunks[k][1], what, _ = damage(chunks[k][1], r)
    for kind, content in chunks: out += struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    return out, f'chunk {chunks[k][0]}, {what}', False


def inside(data, r, pick, how, method=zipfile.ZIP_STORED):
    """An entry of a zip damaged, the zip written anew."""
    with zipfile.ZipFile(io.BytesIO(data)) as z: entries = [(n, z.read(n)) for n in z.namelist()]
    k = r.choice([i for i, (n, _) in enumerate(entries) if pick(n)])
    content, what, _ = how(entries[k][1], r)
    entries[k] = entries[k][0], content
    return zipped(entries, method), f'{entries[k][0]}: {what}', False


def unguarded(good, bad):
    """Whether the bytes that differ are such that neither the format nor the library that reads it guards them."""
    same = next((i for i, (a, b) in enumerate(zip(good, bad)) if a != b), min(len(good), len(bad)))
    if good[:2] == b'PK': return not bad.endswith(good[struct.unpack('<I', good[-6:-2])[0]:])   # the zip's directory
    if good[:4] == b'\x89PNG': return same >= good.index(b'IDAT') and bad.endswith(good[-12:])
    if good[:2] == b'\xff\xd8': return bad.endswith(good[-2:])
    return good[:2] == b'\x80\x04' and bad.endswith(good[-100:])                         # a pickle, not cut short

# --------------------------------------------------------------------------------------------------------- targets

def sha(*things):
    h = hashlib.sha256()
    for t in things: h.update(repr(None if t is None else (tuple(t.shape), t.dtype)).encode() + (b'' if t is None else t.numpy().tobytes()))
    return h.hexdigest()


def sha_state(saved):
    h = hashlib.sha256()
    def walk(v):
        if isinstance(v, torch.Tensor): h.update(repr((v.shape, v.dtype)).encode() + v.contiguous().view(-1).numpy().tobytes())
        elif isinstance(v, dict):
            for k, x in v.items(): h.update(repr(k).encode()); walk(x)
        elif isinstance(v, (list, tuple)): [walk(x) for x in v]
        else: h.update(repr(v).encode())
    walk(saved)
    return h.hexdigest()


def data_target(path, m, extra=()):
    """The data, as the script sees it; where it is new, a step of training on it."""
    def go(first=None):
        warnings.filterwarnings('ignore', module='PIL')     # as process() does
        logging.getLogger('PIL').setLevel(logging.CRITICAL)
        images, notes = m.decode(Path(path).absolute(), 8)
        found = sha(images, None if notes['labels'] is None else torch.tensor(notes['labels']))
        if first is not None and found != first:
            phases = {'tcm': ['--stage1', '0'], 'ct': ['--metric', 'l2']}.get(m.METHOD, [])
            m.main(['--data', str(path), '--res', '8', '--out', 'out', '--steps', '1', '--cond', str(int(notes['labels'] is not None)), *phases, *TINY, *extra])
        return found
    return go


def checkpoint_target(path, m, resume):
    def go(first=None):
        run = str(Path(path).parent)
        if resume: m.main(['--out', run, '--steps', '3', '--device', 'cpu', '--save_every', '100000'])
        else: m.main(['--out', run, '--sample', '2', '--save', 'out.npz', '--device', 'cpu'])
        return sha_state(torch.load('before.pt', map_location='cpu', weights_only=True)) if Path('before.pt').exists() else ''
    return go


def init_target(path, m):
    def go(first=None):
        phases = {'tcm': ['--stage1', '0'], 'ct': ['--metric', 'l2']}.get(m.METHOD, [])
        m.main(['--data', 'good.zip', '--out', 'out', '--steps', '1', '--init', str(path), *phases, *TINY])
        return sha_state(torch.load(path, map_location='cpu', weights_only=True)['ema'])
    return go


def edm_target(path, m):
    def go(first=None):
        net = m.load_edm(str(path))
        return sha_state(net.state_dict())
    return go


def fid_target(*argv, fid):
    def go(first=None):
        out = io.StringIO()
        with contextlib.redirect_stdout(out): fid.main([*map(str, argv), '--json', '--device', 'cpu'])
        models = json.loads(out.getvalue())['models']
        return hashlib.sha256(json.dumps([{k: v for k, v in m.items() if k != 'model'} for m in models]).encode()).hexdigest()
    return go


class Small(torch.nn.Module):
    dim = 15

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(15, 10)

    def forward(self, x):
        q = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)
        return torch.cat([q, q[:, :3] * q[:, 3:6]], 1), None

# ---------------------------------------------------------------------------------------------------------- child

def attempt(go, folder, first=None):
    """go() in a child with the limits -> verdict parts: how it ended, its output, digest, seconds, megabytes"""
    out, err, result = folder / '.out', folder / '.err', folder / '.result'
    result.unlink(missing_ok=True)
    start = time.time()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.chdir(folder)
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', closefd=False)
            size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(TIME)
            try:
                digest = go(first)
                Path(result).write_text(digest)
                code = 0
            except SystemExit as end: code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 99
            sys.stdout.flush(), sys.stderr.flush()
        finally: os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    read = lambda p: p.read_bytes()[-20000:].decode('utf-8', 'replace') if p.exists() else ''
    return dict(code=os.waitstatus_to_exitcode(status), out=read(out), err=read(err), seconds=time.time() - start,
                digest=result.read_text() if result.exists() else None, mb=usage.ru_maxrss // 1024)


def judge(end, kind, first, missing, names, owned=False):
    """-> None, or (sort of breach, what)"""
    lines = [l for l in end['err'].splitlines() if l.strip()]
    while len(lines) > 1 and lines[0].startswith('fid.py: ') and re.search('repeated to 3|bias|duplicates|JPEG|does not say|images, .*/s', lines[0]): lines.pop(0)
    while len(lines) > 1 and re.search(r'\d+ of \d+ images, .*/s', lines[0]): lines.pop(0)
    while len(lines) > 1 and re.match(r'_?TIFF\w+: |LZW\w+: |MissingRequired: |tempfile.tif: ', lines[0]): lines.pop(0)
    while len(lines) > 1 and re.match('SystemError: deallocated bytearray|Exception ignored in', lines[0]): lines.pop(0)
    while len(lines) > 2 and 'DecompressionBombWarning' in lines[0]: del lines[:2]     # Pillow's, of huge pictures
    if owned: return 'code', 'it ran something'
    if end['code'] == -signal.SIGALRM: return 'hang', f'{TIME} s'
    if end['code'] < 0: return 'crash', signal.Signals(-end['code']).name
    if end['code'] == 99 or 'Traceback (most recent' in end['err']:
        frames = [f'{Path(a).name}:{b}' for a, b in re.findall(r'File "([^"]+)", line \d+, in (\S+)', end['err'])
                  if str(ROOT) in a and 'fuzz.py' not in a]
        return 'traceback', f'{(lines or [""])[-1][:110]} in {frames[-1] if frames else "?"}'
    if end['mb'] > 1500: return 'memory', f'{end["mb"]} MB'
    if end['code'] == 0:
        if first == 'refuse': return 'accepted', end['out'].strip().splitlines()[-1][:80] if end['out'].strip() else ''
        if end['digest'] == first or first is None or (end['digest'] is None and lines): return None
        if kind.get('checked') or missing: return 'silent', f'other content, {"bytes missing" if missing else "checksum ignored"}'
        return None
    if len(lines) != 1: return 'lines', f'{len(lines)}: {lines[0][:110] if lines else ""}'
    if end['code'] != 2: return 'exit', f'{end["code"]}: {lines[0][:110]}'
    if not any(n in lines[0] for n in names):
        return 'unnamed', re.sub(r'0x\w+|\S*/(?=\w)|\d+', '#', lines[0])[:110]
    return None

# ---------------------------------------------------------------------------------------------------------- kinds

def build(base):
    """The good files in base, and -> {kind: dict(file, target(path, method), how, checked, names)}"""
    methods = {n: __import__(n) for n in 'ect scm tcm sct ict ct'.split()}
    fid = __import__('fid')
    fid.network = lambda cfg: (Small(), 'random' if cfg.weights == 'random' else '6726825d')
    ect, kinds, ims = methods['ect'], {}, pictures()
    labels = np.arange(12) % 3
    names = [f'{i:02d}.png' for i in range(12)]
    table = json.dumps(dict(labels=[[n, int(l)] for n, l in zip(names, labels)])).encode()
    pngs = [(n, encoded(a, 'PNG')) for n, a in zip(names, ims)]
    (base / 'good.npz').write_bytes(npz(arr_0=ims, labels=labels))
    (base / 'good.zip').write_bytes(zipped([*pngs, ('dataset.json', table)]))

    def add(kind, file, content, target, how=damage, checked=False, names=None, **more):
        kinds[kind] = dict(file=file, content=content, target=target, how=how, checked=checked, names=names or [file], **more)

    data = lambda path, m: data_target(path, m)
    stored, deflated = zipped([*pngs, ('dataset.json', table)]), zipped([*pngs, ('dataset.json', table)], zipfile.ZIP_DEFLATED)
    add('zip', 'd.zip', stored, data, checked=True)
    add('zip-deflate', 'd.zip', deflated, data, checked=True)
    add('zip-lzma', 'd.zip', zipped([*pngs, ('dataset.json', table)], zipfile.ZIP_LZMA), data, checked=True)
    is_png, is_json = lambda n: n.endswith('.png'), lambda n: n == 'dataset.json'
    add('zip-png-inside', 'd.zip', stored, data, lambda d, r: inside(d, r, is_png, damage_png))
    add('zip-json-inside', 'd.zip', stored, data, lambda d, r: inside(d, r, is_json, damage_text))
    full = npz(arr_0=ims, labels=labels)
    add('tar', 'd.tar.gz', cifar_tar(), data, checked=True)
    plain = cifar_tar(mode='w')
    regz = lambda d, r: (lambda x: (gzip.compress(x[0], 1), 'tar inside, ' + x[1], False))(damage(d, r))
    add('tar-inside', 'd.tar.gz', plain, data, regz, first=gzip.compress(plain, 1))
    # one damaged picture in a folder of good ones
    kw = dict(JPEG=dict(quality=90), WEBP=dict(lossless=True), TIFF=dict(compression='tiff_lzw'), GIF={}, BMP={}, PPM={}, PNG={})
    ext = dict(JPEG='jpg', WEBP='webp', TIFF='tif', GIF='gif', BMP='bmp', PPM='ppm', PNG='png')
    big = pictures(2, 32, 5)
    for form, opts in kw.items():
        good = encoded(big[0], form, **opts)
        add(f'folder-{ext[form]}', f'folder/1.{ext[form]}', good, lambda path, m: data_target(Path(path).parent, m),
            names=[f'1.{ext[form]}'], beside={'folder/0.png': encoded(big[1], 'PNG')})
    add('folder-png-chunk', 'folder/1.png', encoded(big[0], 'PNG'), lambda path, m: data_target(Path(path).parent, m), damage_png,
        names=['1.png'], beside={'folder/0.png': encoded(big[1], 'PNG')})
    add('folder-json', 'folder/dataset.json', json.dumps(dict(labels=[['0.png', 0], ['1.png', 1]])).encode(),
        lambda path, m: data_target(Path(path).parent, m), damage_text, names=['dataset.json', 'folder'],
        beside={f'folder/{i}.png': encoded(pictures()[i], 'PNG') for i in (0, 1)})
    # checkpoints
    for m in (ect, methods['scm'], methods['tcm']):
        phases = ['--warmup', '1', *(['--stage1', '0'] if m is methods['tcm'] else [])]
        def train(first=None, m=m, phases=phases):
            m.main(['--data', str(base / 'good.zip'), '--out', f'run-{m.METHOD}', '--steps', '2', *phases, *TINY])
            return ''
        end = attempt(train, base)
        assert end['code'] == 0, end['err']
    for name, m in methods.items():
        content = (base / f'run-{name}' / 'latest.pt').read_bytes() if (base / f'run-{name}').exists() else None
        if content is None: continue
        run = lambda path, _, m=m: checkpoint_target(path, m, False)
        again = lambda path, _, m=m: checkpoint_target(path, m, True)
        is_pkl = lambda n: n.endswith('data.pkl')
        small_inside = lambda d, r: inside(d, r, is_pkl, damage)
        at = f'run-{name}/latest.pt'
        add(f'{name}-pt-sample', at, content, run, checked=True, names=['latest.pt', f'run-{name}'], keeps=True)
        add(f'{name}-pt-resume', at, content, again, checked=True, names=['latest.pt', f'run-{name}'], keeps=True)
        add(f'{name}-pt-inside', at, content, run, small_inside, names=['latest.pt', f'run-{name}'], keeps=True)
        if name == 'ect':
            add('init-pt', 'x.pt', content, init_target, checked=True)
            add('init-pt-inside', 'x.pt', content, init_target, small_inside)
    edm = edm_pickle(ect)
    add('edm-pkl', 'x.pkl', edm, edm_target)
    spots = [m.start() for m in re.finditer(rb'\xad\xf5|\x80\x02|cls|_rebuild|_load_from|\x8c|\x94', edm)]
    def near(d, r):
        b = bytearray(d)
        for _ in range(r.randint(1, 3)):
            i = min(len(b) - 1, r.choice(spots) + r.randrange(16))
            b[i] = r.choice([b[i] ^ 1 << r.randrange(8), r.randrange(256)])
        return bytes(b), 'bytes near opcodes', False
    add('edm-pkl-opcodes', 'x.pkl', edm, edm_target, near)
    add('edm2-pkl', 'x.pkl', edm_pickle(ect, edm2=True), edm_target)
    add('edm2-pkl-opcodes', 'x.pkl', edm_pickle(ect, edm2=True), edm_target, near)
    # fid.py
    as_sample = lambda path, m: fid_target(path, '--ref', 'good.npz', '--weights', 'random', fid=fid)
    as_ref = lambda path, m: fid_target('good.npz', '--ref', path, '--num', '12', fid=fid)
    add('fid-npz', 's.npz', full.replace(b'labels', b'lobels'), as_sample, checked=True)
    add('fid-npz-inside', 's.npz', full, as_sample, lambda d, r: inside(d, r, lambda n: 'arr' in n, damage_npy))
    add('fid-zip', 's.zip', zipped(pngs), as_sample, checked=True)
    add('fid-png-inside', 's.zip', zipped(pngs), as_sample, lambda d, r: inside(d, r, is_png, damage_png))
    add('fid-tar', 's.tar.gz', cifar_tar(), lambda path, m: fid_target(path, '--ref', 'cifar.npz', '--weights', 'random', fid=fid), checked=True)
    (base / 'cifar.npz').write_bytes(npz(arr_0=pictures(8, 32, 3)))
    b = io.BytesIO()
    torch.save(torch.from_numpy(ims.transpose(0, 3, 1, 2).copy()), b)
    rng = np.random.default_rng(0)
    f = rng.normal(size=(40, 15))
    mu, sigma = f.mean(0), np.cov(f.T)
    add('fid-stats-npz', 'stat.npz', npz(mu=mu, sigma=sigma), as_ref, checked=True)
    add('fid-stats-inside', 'stat.npz', npz(mu=mu, sigma=sigma), as_ref, lambda d, r: inside(d, r, lambda n: True, damage_npy))
    add('fid-stats-pkl', 'stat.pkl', pickle.dumps(dict(fid=dict(mu=mu, sigma=sigma))), as_ref)
    end = attempt(as_ref('good.npz', None), base)
    end = attempt(fid_target('good.npz', '--ref', 'good.npz', '--weights', 'random', fid=fid), base)
    assert end['code'] == 0, end['err']
    kept = next(base.glob('good.npz*.fid'))
    add('fid-kept', kept.name, kept.read_bytes(), lambda path, m: fid_target('good.npz', '--ref', 'cifar8.npz', '--weights', 'random', fid=fid),
        checked=True, names=[kept.name])
    (base / 'cifar8.npz').write_bytes(npz(arr_0=pictures(8, 8, 3)))
    for p in base.glob('*.fid'): p.unlink()
    log = 'step,phase,loss,grad_norm,lr,images_per_second,skipped\r\n' + ''.join(f'{i},ect,{1 / i},{2 / i},0.1,100,0\r\n' for i in range(1, 6))
    add('fid-log', 'a/log.csv', log.encode(), lambda path, m: fid_target('a', 'b', '--ref', 'good.npz', '--weights', 'random', fid=fid), damage_text,
        names=['log.csv'], beside={'a/samples.npz': npz(arr_0=ims), 'b/samples.npz': npz(arr_0=ims[::-1].copy()), 'a/latest.pt': b'', 'b/latest.pt': b''})
    return kinds, methods, fid


# --------------------------------------------------------------------------------------------------------- hostile

def hostile(base, methods, fid):
    """Fixed files that must be refused: (name, file, content, target)"""
    ect, found = methods['ect'], []
    add = lambda name, file, content, target=None: found.append((name, file, content, target or (lambda p: data_target(p, ect))))
    op = lambda module, name: b'c' + module.encode() + b'\n' + name.encode() + b'\n'
    text = lambda s: b'X' + struct.pack('<I', len(s)) + s.encode()
    edm, stats = lambda p: edm_target(p, ect), lambda p: fid_target('good.npz', '--ref', p, '--num', '12', fid=fid)
    full_init = lambda p: init_target(p, ect)
    # callables that no file needs, in every way a pickle can name one
    calls = {'os.system': op('os', 'system'), 'posix.system': op('posix', 'system'), 'eval': op('builtins', 'eval'), 'getattr': op('builtins', 'getattr'),
             'dotted': b'\x8c\x02os\x8c\x06system\x93', 'in torch': op('torch.serialization', 'os.system'), 'in numpy': op('numpy', 'os.system')}
    for name, get in calls.items():
        body = b'\x80\x04' + get + b'(' + text('touch owned') + b'tR.'
        add(f'pickle {name}', 'x.pkl', body, edm)
        add(f'stats {name}', 'x.pkl', body, stats)
        add(f'init {name}', 'x.pt', body, full_init)
    # an object array made from bytes: a dtype whose state says that it holds no references
    dtype = op('numpy', 'dtype') + b'(' + text('O') + b'I00\nI01\ntR' + b'(I3\n' + text('|') + b'NNNI-1\nI-1\nI0\ntb'
    body = b'\x80\x02' + op('numpy.core.multiarray', 'scalar') + b'(' + dtype + b'C\x08' + b'A' * 8 + b'tR.'
    add('pickle dtype without flags', 'x.pkl', body, edm)
    add('stats dtype without flags', 'x.pkl', body, stats)
    array = op('numpy.core.multiarray', '_reconstruct') + b'(' + op('numpy', 'ndarray') + b'(I0\nt' + b'C\x01btR' + \
        b'(I1\n(I1\nt' + dtype + b'I00\nC\x08' + b'A' * 8 + b'tb'
    add('stats array of pointers', 'x.pkl', b'\x80\x02}' + text('fid') + b'}(' + text('mu') + array + text('sigma') + array + b'us.', stats)
    size = op('numpy', 'dtype') + b'(' + text('V8') + b'I00\nI01\ntR' + b'(I3\n' + text('|') + b'NNNI1000000000\nI1\nI0\ntb'
    add('pickle dtype of a GB', 'x.pkl', b'\x80\x02' + op('numpy.core.multiarray', 'scalar') + b'(' + size + b'C\x08' + b'A' * 8 + b'tR.', edm)
    # memory and time
    add('pickle memo index 2^31', 'x.pkl', b'\x80\x02Nr\xff\xff\xff\x7f.', edm)
    add('stats memo index 2^31', 'x.pkl', b'\x80\x02Nr\xff\xff\xff\x7f.', stats)
    add('pickle of 2^62 bytes', 'x.pkl', b'\x80\x04\x8e' + struct.pack('<Q', 1 << 62) + b'.', edm)
    add('pickle of 8 GB', 'x.pkl', b'\x80\x04\x8e' + struct.pack('<Q', 8 << 30) + b'.', edm)
    add('stats ndarray of 64 GB', 'x.pkl', b'\x80\x02' + op('numpy', 'ndarray') + b'((L64000000000L\nt' + text('u1') + b'tR.', stats)
    class M:                            # modules that hold each other twice
        pass
    def dag(depth):
        node = Persist(dict(class_name='X', state=dict(_parameters={}, _buffers={}, _modules={})))
        for _ in range(depth): node = Persist(dict(class_name='X', state=dict(_parameters={}, _buffers={}, _modules=dict(a=node, b=node))))
        return node
    kw = dict(img_resolution=8, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
    def song(state, **overrides):
        state = dict(_init_kwargs=kw | overrides, _parameters={}, _buffers={}, _modules={}) | state
        model = Persist(dict(class_name='SongUNet', state=state))
        return pickle.dumps(dict(ema=Persist(dict(class_name='EDMPrecond', state=dict(_modules=dict(model=model))))), 4)
    edm_pickle(ect)
    add('pickle of 2^40 empty modules', 'x.pkl', song(dict(_modules=dict(a=dag(40)))), edm)
    add('pickle of a million channels', 'x.pkl', song({}, model_channels=1_000_000), edm)
    add('pickle of 10^9 blocks', 'x.pkl', song({}, num_blocks=10**9), edm)
    add('pickle of no channels', 'x.pkl', song({}, model_channels=0), edm)
    add('pickle of half a channel', 'x.pkl', song({}, model_channels=8.5), edm)
    add('pickle of huge multipliers', 'x.pkl', song({}, channel_mult=[10**9]), edm)
    add('pickle of classes', 'x.pkl', song({}, label_dim=10**10), edm)
    lists = [0]
    for _ in range(40): lists = [lists, lists]
    add('pickle of 2^40 multipliers', 'x.pkl', song({}, channel_mult=lists), edm)
    tuples = (0,)
    for _ in range(60): tuples = (tuples, tuples)
    add('pickle with a tuple of 2^60', 'x.pkl', song({}, embedding_type=tuples), edm)
    deep = b'\x80\x04' + b']' * 100_000 + b'a' * 99_999 + b'.'
    add('pickle of 10^5 nested lists', 'x.pkl', deep, edm)
    # arrays
    head = lambda text, v=1: b'\x93NUMPY' + bytes([v, 0]) + struct.pack('<H' if v == 1 else '<I', len(text)) + text.encode()
    for name, shape in dict(tera='(1000000000000, 8, 8, 3)', huge=f'({1 << 63}, 8, 8, 3)', wrap=f'({1 << 40}, {1 << 40}, 8, 3)', negative='(-4, 8, 8, 3)',
                            zero='(4, 0, 0, 3)', gigabytes='(100000000, 8, 8, 3)').items():
        for kind in ('npy', 'npz'):
            body = head(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n") + bytes(192)
            body = body if kind == 'npy' else zipped([('arr_0.npy', body)])
            add(f'{kind} of shape {name}', f'd.{kind}', body)
            add(f'fid {kind} of shape {name}', f'd.{kind}', body, lambda p: fid_target(p, '--ref', 'good.npz', '--weights', 'random', fid=fid))
    good = npy(pictures())
    for name, text_ in dict(tokens="{'descr': '|u1', 'fortran_order': False, 'shape': (12, 8, 8, 3, }", nest='(' * 9000, lone="'", indent='  1\n 2\n', py2="{'descr': '|u1', 'fortran_order': False, 'shape': (12L, 8L, '").items():
        add(f'npy header {name}', 'd.npy', head(text_) + bytes(100))
    add('npz that is an npy', 'd.npz', good)
    add('npy that is an npz', 'd.npy', npz(arr_0=pictures()))
    add('npz with a text for images', 'd.npz', zipped([('images', b'hello')]))
    add('npz with a text for labels', 'd.npz', zipped([('images.npy', good), ('labels', b'hello')]))
    add('npz of nothing', 'd.npz', zipped([]))
    add('npz of objects', 'd.npz', npz(arr_0=np.array([{}, []], object)))
    lab = lambda name, labels: add(f'labels {name}', 'd.npz', npz(images=pictures(), labels=labels), lambda p: labelled(p, ect))
    def labelled(p, m): return lambda first=None: m.main(['--data', str(p), '--out', 'out', '--steps', '1', '--cond', '1', *TINY]) or 'x'
    lab('negative', np.arange(12) - 1); lab('float', np.arange(12) / 7); lab('nan', np.full(12, np.nan)); lab('huge', np.arange(12) + (1 << 40))
    lab('2^31', np.arange(12) + (1 << 31)); lab('too few', np.arange(5)); lab('one-hot', np.eye(12)); lab('words', np.array(['a'] * 12)); lab('complex', np.arange(12) * 1j)
    lab('numbers as words', np.array(['1'] * 12)); lab('scalar', np.array(3)); lab('dates', np.arange(12).astype('M8[s]')); lab('uint64', np.full(12, 2**64 - 1, np.uint64))
    lab('objects', np.array([None] * 12, object))
    pngs = [(f'{i}.png', encoded(a, 'PNG')) for i, a in enumerate(pictures()[:4])]
    tab = lambda name, content: add(f'json {name}', 'd.zip', zipped([*pngs, ('dataset.json', content if isinstance(content, bytes) else json.dumps(content).encode())]), lambda p: labelled(p, ect))
    row = lambda *v: dict(labels=[[n, x] for (n, _), x in zip(pngs, v)])
    tab('null', row(0, None, 1, 2)); tab('float', row(0, 1.5, 1, 2)); tab('negative', row(0, -1, 1, 2)); tab('huge', row(0, 1, 1, 10**9)); tab('2^70', row(0, 1, 1, 2**70))
    tab('nan', b'{"labels": [["0.png", NaN], ["1.png", 0], ["2.png", 1], ["3.png", 1]]}'); tab('words', row('0', '1', '1', '2')); tab('lists', row([0], [1], [1], [2]))
    tab('missing one', dict(labels=[['0.png', 0], ['1.png', 1]])); tab('a list', [1, 2]); tab('a number', 5); tab('labels a number', dict(labels=5)); tab('triples', dict(labels=[['0.png', 0, 0]]))
    tab('no labels key', dict(a=1)); tab('text', b'not json'); tab('deep', b'[' * 200_000); tab('null text', b'null'); tab('utf-16', json.dumps(row(0, 1, 1, 2)).encode('utf-16-le')[:-1])
    tab('dict of lists', dict(labels={'0.png': 0})); tab('empty', b'')
    # pictures
    one = lambda name, file, content: add(f'picture {name}', 'd.zip', zipped([pngs[0], (file, content)]))
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(owned) (w) file closefile\nshowpage\n%%EOF\n'
    one('PostScript called .png', '1.png', eps)
    add('fid PostScript called .png', 's.zip', zipped([(f'{i}.png', eps) for i in range(3)]), lambda p: fid_target(p, '--ref', 'good.npz', '--weights', 'random', fid=fid))
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    def bomb(w, h, mode=2, depth=8):
        z = zlib.compressobj(9)
        row = bytes(1 + w * 3)
        body = b''.join(z.compress(row * 64) for _ in range(h // 64)) + z.flush()
        return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, depth, mode, 0, 0, 0)) + chunk(b'IDAT', body) + chunk(b'IEND', b'')
    claims = lambda w, h: b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes(100))) + chunk(b'IEND', b'')
    one('that claims 2^31 squared', '1.png', claims(2**31 - 1, 2**31 - 1)); one('that claims 13000 squared', '1.png', claims(13000, 13000)); one('of side 0', '1.png', claims(0, 0))
    add('first picture claims 13000 squared', 'd.zip', zipped([('0.png', claims(13000, 13000))] + [(f'1{i}.png', pngs[0][1]) for i in range(5000)]))
    add('a bomb of 12000 squared', 'd.zip', zipped([('0.png', bomb(12032, 12032))] + [(f'1{i}.png', pngs[0][1]) for i in range(200)]))
    one('gif of 65535 squared', '1.gif', b'GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;')
    one('of text', '1.png', b'no picture'); one('empty', '1.png', b''); one('1 x 1', '1.png', encoded(np.zeros((1, 1, 3), np.uint8), 'PNG')); one('not square', '1.png', encoded(np.zeros((8, 9, 3), np.uint8), 'PNG'))
    one('CMYK', '1.jpg', (lambda b: (Image.new('CMYK', (8, 8)).save(b, 'JPEG'), b.getvalue())[1])(io.BytesIO())); one('16 bits grey', '1.png', encoded(np.full((8, 8), 1000, np.uint16), 'PNG'))
    deep16 = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress((b'\0' + bytes(48)) * 8)) + chunk(b'IEND', b'')
    one('16 bits RGB', '1.png', deep16)
    # zips and tars
    add('zip bomb of 2.5 GB', 'd.zip', bomb_zip('0.png', b'', 2500))
    add('npz bomb of 2.5 GB', 'd.npz', bomb_zip('arr_0.npy', head(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({(2500 << 20) // 192}, 8, 8, 3), }}\n"), 2500))
    enc = bytearray(zipped(pngs))
    for sig, at in ((b'PK\3\4', 6), (b'PK\1\2', 8)):
        for hit in re.finditer(re.escape(sig), bytes(enc)): enc[hit.start() + at] |= 1
    add('zip with a password', 'd.zip', bytes(enc))
    odd = bytearray(zipped(pngs))
    for sig, at in ((b'PK\3\4', 8), (b'PK\1\2', 10)):
        for hit in re.finditer(re.escape(sig), bytes(odd)): odd[hit.start() + at:hit.start() + at + 2] = b'\x63\0'
    add('zip of method 99', 'd.zip', bytes(odd))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        add('zip of one name twice', 'd.zip', zipped([pngs[0], (pngs[0][0], pngs[1][1])]))
    def tar(*members):
        b = io.BytesIO()
        with tarfile.open(fileobj=b, mode='w:gz') as t:
            for name, kind, link, data in members:
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.size = kind, link, len(data)
                t.addfile(info, io.BytesIO(data))
        return b.getvalue()
    add('tar with a folder for a batch', 'd.tar.gz', tar(('data_batch_1.bin', tarfile.DIRTYPE, '', b'')))
    add('tar with a link to itself', 'd.tar.gz', tar(('data_batch_1.bin', tarfile.SYMTYPE, 'data_batch_1.bin', b'')))
    add('tar with a link out', 'd.tar.gz', tar(('data_batch_1.bin', tarfile.SYMTYPE, '/etc/passwd', b'')))
    add('tar with a pipe', 'd.tar.gz', tar(('data_batch_1.bin', tarfile.FIFOTYPE, '', b'')))
    add('tar of nothing', 'd.tar.gz', tar())
    sparse = tarfile.TarInfo('data_batch_1.bin')
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    raw = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    raw[483:495] = b'%011o\0' % (3073 * 1_500_000)
    raw[148:156] = b' ' * 8
    raw[148:156] = b'%06o\0 ' % sum(raw[:512])
    add('tar of 4.6 GB of nothing', 'd.tar.gz', gzip.compress(bytes(raw) + bytes(1024)))
    # checkpoints
    saved = torch.load(base / 'run-ect/latest.pt', weights_only=True)
    def pt(change):
        b, s = io.BytesIO(), dict(saved)
        s = change(s)
        torch.save(s, b)
        return b.getvalue()
    run = lambda p: checkpoint_target(p, ect, False)
    again = lambda p: checkpoint_target(p, ect, True)
    setc = lambda **kw: lambda s: s | dict(config=s['config'] | kw)
    drop = lambda k: lambda s: {a: b for a, b in s.items() if a != k}
    cases = dict(tensor=lambda s: torch.zeros(3), list=lambda s: [1], text=lambda s: 'x', empty=lambda s: {}, number=lambda s: 3, no_method=drop('method'), no_config=drop('config'), no_ema=drop('ema'),
                 config_list=lambda s: s | dict(config=[1]), mult_number=setc(mult=5), steps_text=setc(steps='x'), ch_huge=setc(ch=10**6), ema_none=setc(ema=None), ts_none=setc(ts=None),
                 ema_shape=lambda s: s | dict(ema={k: v[..., :1] for k, v in s['ema'].items()}), ema_list=lambda s: s | dict(ema=[1]), ema_text=lambda s: s | dict(ema={k: 'x' for k in s['ema']}),
                 blocks_huge=setc(blocks=10**9), res_huge=setc(res=2**20), arch=setc(arch='scm'), method_list=lambda s: s | dict(method=[1]))
    for name, change in cases.items():
        body = pt(change)
        add(f'latest.pt {name}', 'run-ect/latest.pt', body, run)
        if name in ('tensor', 'list', 'empty', 'no_config', 'no_ema', 'ema_shape', 'ema_list', 'ema_text', 'ch_huge'): add(f'--init {name}', 'x.pt', body, full_init)
    for name, change in dict(no_opt=drop('opt'), no_step=drop('step'), no_scaler=drop('scaler'), no_loss=drop('loss'), opt_list=lambda s: s | dict(opt=[1]), opt_empty=lambda s: s | dict(opt={}),
                             step_text=lambda s: s | dict(step='x'), step_negative=lambda s: s | dict(step=-5), opt_name=setc(opt='lr_scheduler')).items():
        add(f'resume {name}', 'run-ect/latest.pt', pt(change), again)
    outside = lambda name: str(base.parent / ('outside-' + re.sub(r'\W+', '-', name)))
    add('latest.pt that names --save', 'run-ect/latest.pt', pt(setc(save=outside('latest.pt that names --save') + '/s.npz')),
        lambda p: lambda first=None: ect.main(['--out', 'run-ect', '--sample', '2', '--device', 'cpu']) or 'x')
    add('latest.pt that names --out', 'run-ect/latest.pt', pt(setc(out=outside('latest.pt that names --out') + '/run', data='good.npz')),
        lambda p: lambda first=None: (os.makedirs('runs', exist_ok=True), os.rename('run-ect', 'runs/ect-good'), ect.main(['--data', 'good.zip', '--steps', '3', '--device', 'cpu'])) and 'x')
    return found


TAKEN = ('a bomb of 12000 squared', 'picture 1 x 1', 'picture not square', 'picture CMYK', 'zip of one name twice',        # cropped, converted,
         'latest.pt that names --save', 'latest.pt that names --out')                                                     # or ignored


def run_hostile(case, base, work, keep):
    name, file, content, target = case
    folder = work / 'hostile'
    outside = base.parent / ('outside-' + re.sub(r'\W+', '-', name))
    for f in (folder, outside): shutil.rmtree(f, ignore_errors=True)
    shutil.copytree(base, folder)
    bin_ = folder / 'bin'
    bin_.mkdir()
    (bin_ / 'gs').write_text(f'#!/bin/sh\ntouch {folder}/owned\nexit 1\n')      # stands for Ghostscript
    (bin_ / 'gs').chmod(0o755)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    go = target(Path(file))
    def with_path(first=None):
        os.environ['PATH'] = f'{bin_}:{os.environ["PATH"]}'
        return go(first)
    end = attempt(with_path, folder, 'refuse')
    owned = (folder / 'owned').exists()
    may = name in TAKEN and end['code'] == 0
    breach = None if may else judge(end, {}, 'refuse', False, [Path(file).name, Path(file).stem, Path(file).parent.name or '?', *(['0.png', '1.png', '1.gif', '1.jpg'] if 'picture' in name or 'bomb' in name else [])], owned)
    if outside.exists() and any(outside.rglob('*')): breach = 'outside', 'it wrote ' + ' '.join(str(p.name) for p in outside.rglob('*'))
    if breach is None and not may and (folder / 'out').exists(): breach = 'left', 'a run folder'
    if breach and keep: (keep / re.sub(r'\W+', '-', name)).write_bytes(content)
    return breach, end

# ------------------------------------------------------------------------------------------------------------ main

def run_case(kind, name, i, seed, base, work, methods, firsts, keep):
    r, folder = random.Random(f'{seed}-{name}-{i}'), work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for f in ('good.npz', 'good.zip', 'cifar.npz', 'cifar8.npz'): shutil.copy(base / f, folder / f)
    for f, content in kind.get('beside', {}).items():
        (folder / f).parent.mkdir(exist_ok=True)
        (folder / f).write_bytes(content)
    path = folder / kind['file']
    path.parent.mkdir(exist_ok=True)
    m = methods[r.choice(sorted(methods))] if name.startswith(('zip', 'npz', 'npy', 'tar', 'folder')) else methods['ect']
    content, what, missing = kind['how'](kind['content'], r) if i >= 0 else (kind.get('first', kind['content']), 'nothing', False)
    path.write_bytes(content)
    (folder / 'before.pt').write_bytes(content)
    go = kind['target'](Path(kind['file']), m)
    end = attempt(go, folder, firsts.get(name))
    if i < 0: return end
    same = kind['how'] is damage and content == kind['content']
    breach = None if same else judge(end, kind, firsts[name], missing, [Path(n).name for n in kind['names']] + [Path(kind['file']).name])
    if breach and breach[0] == 'silent' and 'json' in name: breach = None
    if breach and breach[0] == 'silent' and kind['how'] is damage and unguarded(kind['content'], content): breach = 'unguarded', breach[1]
    if not breach and end['code'] == 2 and kind.get('keeps') and path.read_bytes() != content: breach = 'lost', 'latest.pt changed'
    if not breach and end['code'] == 2:
        left = [p.name for p in folder.rglob('*') if p.suffix == '.part' or p.name == 'out']
        if left: breach = 'left', ' '.join(left)
    if breach and keep: (keep / f'{name}-{i}-{Path(kind["file"]).name}').write_bytes(content)
    return breach, what, end, m.METHOD


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('seconds', type=float)
    parser.add_argument('--seed', default='0')
    parser.add_argument('--kind', default='')
    parser.add_argument('--case', type=int)
    parser.add_argument('--keep', type=Path)
    parser.add_argument('--workers', type=int, default=os.cpu_count())
    args = parser.parse_args()
    top = Path(tempfile.mkdtemp(prefix='fuzz-')).resolve()
    begin = time.time()
    base = top / 'base'
    base.mkdir()
    if args.keep: args.keep.mkdir(parents=True, exist_ok=True); args.keep = args.keep.resolve()
    try:
        t = time.time()
        kinds, methods, fid = build(base)
        if os.environ.get('FUZZ_TIMES'): print('build', time.time() - t, file=sys.stderr)
        fixed = hostile(base, methods, fid) if not args.kind or args.kind == 'hostile' else []
        for p in base.glob('.*'): p.unlink()
        if os.environ.get('FUZZ_TIMES'): print('hostile', time.time() - t, file=sys.stderr)
        kinds = {k: v for k, v in kinds.items() if not args.kind or k == args.kind}
        firsts = {}
        for name, kind in kinds.items():
            end = run_case(kind, name, -1, args.seed, base, top / 'first', methods, {}, None)
            if end['code'] or not end['digest']: sys.exit(f'fuzz.py: the good {name} fails: {end["err"]}')
            firsts[name] = end['digest']
        if args.case is not None and args.kind in kinds:
            breach, what, end, method = run_case(kinds[args.kind], args.kind, args.case, args.seed, base, top, methods, firsts, args.keep)
            print(f'{args.kind} {args.case} ({method}): {what} -> {breach}, exit {end["code"]}, {end["seconds"]:.1f} s, {end["mb"]} MB\n{end["err"]}')
            sys.exit(bool(breach))
        if args.case is not None:
            breach, end = run_hostile(fixed[args.case], base, top, args.keep)
            print(f'hostile {args.case} ({fixed[args.case][0]}) -> {breach}, exit {end["code"]}, {end["seconds"]:.1f} s, {end["mb"]} MB\n{end["err"]}')
            sys.exit(bool(breach))

        def worker(w):
            log = []
            own = top / f'w{w}'
            for k, case in enumerate(fixed):
                if k % args.workers != w: continue
                breach, end = run_hostile(case, base, own, args.keep)
                log.append((f'hostile', k, case[0], breach, end['code'], ''))
            deadline, i = time.time() + args.seconds, w
            while time.time() < deadline and kinds:
                for name, kind in kinds.items():
                    if time.time() > deadline: break
                    breach, what, end, method = run_case(kind, name, i, args.seed, base, own, methods, firsts, args.keep)
                    log.append((name, i, what, breach, end['code'], method))
                i += args.workers
            (top / f'log{w}').write_bytes(pickle.dumps(log))

        pids = []
        for w in range(args.workers):
            pid = os.fork()
            if not pid:
                try: worker(w)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                finally: os._exit(0)
            pids.append(pid)
        for pid in pids: os.waitpid(pid, 0)
        log = [row for w in range(args.workers) for row in pickle.loads((top / f'log{w}').read_bytes())]
    finally: shutil.rmtree(top, ignore_errors=True)
    seen, counts = {}, Counter()
    loose = sum(breach is not None and breach[0] == 'unguarded' for _, _, _, breach, *_ in log)
    for name, i, what, breach, code, method in log:
        if breach and breach[0] != 'unguarded':
            counts[breach[0]] += 1
            key = (name if name != 'hostile' else what, breach[0], re.sub(r'\d+', '#', breach[1]))
            seen.setdefault(key, [0, name, i, what, breach, method])[0] += 1
    for n, name, i, what, breach, method in sorted(seen.values(), key=lambda v: (v[4][0], v[1])):
        print(f'{breach[0]:9s} x{n:<4d} {name} {i} {method} ({what}): {breach[1]}', file=sys.stderr)
    refused, taken = sum(c == 2 for *_, c, _ in log), sum(c == 0 for *_, c, _ in log)
    print(f'fuzz: {len(log)} cases of {len(kinds)} kinds ({len(fixed)} hostile files), {time.time() - begin:.0f} s: {refused} refused, {taken} taken ({loose} unguarded), '
          f'{sum(counts.values())} breaches' + (f' in {len(seen)} sorts: ' + ', '.join(f'{v} {k}' for k, v in counts.most_common()) if counts else ''))
    sys.exit(bool(counts))


if __name__ == '__main__':
    main()
