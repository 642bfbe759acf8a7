# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy", "pillow>=10.1", "scipy", "pytest"]
# ///
"""
Tests of all scripts: pytest test_all.py (minutes, on a laptop's CPU); pytest -k slow test_all.py (the default runs).
Each test's name is a claim. Tests against the official code's outputs need ../shared/golden and skip without it.
"""
import argparse, ast, contextlib, difflib, hashlib, importlib, io, itertools, json, math, os, pickle, re, shutil, signal
import struct, subprocess, sys, tarfile, tempfile, threading, time, types, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg, stats
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)              # the networks here are tiny
close, nn = torch.testing.assert_close, torch.nn
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
METHODS = ['ct', 'ict', 'ect', 'sct', 'scm', 'tcm']
SCRIPTS = METHODS + ['fid']
MODULES = {name: importlib.import_module(name) for name in METHODS}
fid = importlib.import_module('fid')
ct, ict, ect, sct, scm, tcm = (MODULES[name] for name in METHODS)

GOLDEN = HERE.parent / 'shared' / 'golden'
JPEGS = HERE.parent / 'shared' / 'cifar10-jpeg-10k.zip'
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason='needs ../shared/golden, outputs of the official code')
needs_jpegs = pytest.mark.skipif(not JPEGS.exists(), reason='needs ../shared/cifar10-jpeg-10k.zip')
GPU = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
needs_gpu = pytest.mark.skipif(GPU.type == 'cpu' and 'GPU_CHECK' not in os.environ,
                               reason='needs a GPU (GPU_CHECK=cpu tries the check itself without one)')
slow = pytest.mark.skipif(not any('slow' in word for word in sys.argv), reason='slow: pytest -k slow test_all.py')
every_method = pytest.mark.parametrize('name', METHODS)

METHOD_NAMES = {'CONFIG', 'CHOICES', 'f', 'Loss', 'sample'}     # the only names whose text may differ between scripts,
OWN = {'ct': {'Block', 'UNet'}, 'ict': {'Block', 'UNet'}, 'ect': {'generate'},  # by few lines, where own networks or
       'sct': {'generate', 'write_samples'},                    # sampler enters: NCSN++, segments, double normalisation
       'scm': {'Block', 'DDPMpp', 'MPBlock', 'EDM2UNet', 'UNet', 'generate', 'write_samples'}}
TINY = '--ch 8 --mult 1,2 --blocks 1 --attn 4 --batch 8 --log_every 2 --dropout 0 --lr 1e-3'.split()
PHASES = {'ct': ['--metric', 'l2'], 'ict': [], 'ect': ['--warmup', '4', '--lr_warmup', '1e-3'],
          'sct': ['--warmup', '4', '--lr_warmup', '1e-3'],
          'scm': [*'--warmup 4 --lr_warmup 1e-3 --opt_warmup Adam --dropout_warmup 0 --H 4'.split()],
          'tcm': ['--warmup', '3', '--lr_warmup', '1e-3', '--stage1', '3', '--lr_stage1', '1e-3']}
STILL = ['--stage1', '1', '--lr_stage1', '1e-12']       # tcm: one step that changes nothing


# ------------------------------------------------------------------------------------------------------- tools

def pictures(n=40, side=8, seed=0):
    """n smooth random images, uint8 (n, side, side, 3)"""
    small = np.random.default_rng(seed).integers(0, 256, (n, 2, 2, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(a).resize((side, side), Image.BILINEAR)) for a in small])


def zipped(path, images, labels=None):
    """A .zip of PNG pictures as EDM's dataset_tool.py writes it, with dataset.json if there are labels -> path"""
    names = [f'{i // 10:05d}/img{i:08d}.png' for i in range(len(images))]
    with zipfile.ZipFile(path, 'w') as archive:
        for name, image in zip(names, images):
            with archive.open(name, 'w') as file: Image.fromarray(image).save(file, 'PNG')
        archive.writestr('__MACOSX/._x.png', b'junk')
        if labels is not None: archive.writestr('dataset.json', json.dumps(dict(labels=[*zip(names, labels.tolist())])))
    return path


def deep_rgb():
    """A PNG of 8 x 8 with 16 bits a channel, which Pillow would read as 8 bits"""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress((b'\0' + bytes(8 * 6)) * 8)) + chunk(b'IEND', b''))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in each test, whose handlers of signals do not outlive it"""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    torch.manual_seed(0)
    yield
    for s, handler in handlers.items(): signal.signal(s, handler)


@pytest.fixture(scope='session')
def data(tmp_path_factory): return zipped(tmp_path_factory.mktemp('data') / 'small.zip', pictures(), np.arange(40) % 4)


def run(name, *argv, env=None, cwd=None, timeout=300):
    """The script as a user starts it -> CompletedProcess"""
    env = os.environ | dict(OMP_NUM_THREADS='1') | (env or {})
    argv = [sys.executable, HERE / f'{name}.py', *map(str, argv)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout)


def go(name, *argv):
    """The script's main in this process; returns the checkpoint it left."""
    argv = list(map(str, argv))
    MODULES[name].main(argv)
    return torch.load(Path(argv[argv.index('--out') + 1]) / 'latest.pt', weights_only=True)


def fails(capfd, code, name, *argv):
    """The script's main ends with the exit code and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as end: MODULES[name].main(list(map(str, argv)))
    lines = [line for line in capfd.readouterr().err.strip().splitlines() if not line.startswith('fetching ')]
    assert end.value.code == code and len(lines) == 1, (end.value.code, lines)
    return lines[0]


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key in a: close(a[key], b[key], msg=lambda m: f'{key}: {m}', **tolerance)


def config(name, *argv): return MODULES[name].config(['--out', f'{tempfile.gettempdir()}/nowhere/run', *map(str, argv)])


def generator(seed): return torch.Generator().manual_seed(seed)


def golden_of(name):
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f'{name}.npz').items() if v.dtype.kind in 'fiu'}


def toy(a=0.7, s=1.5, axis=3): return lambda x, c_noise, labels=None: a * torch.tanh(s * x) + 0.1 * x.flip(axis)


class Toy(nn.Module):
    def __init__(self, a, s, axis):
        super().__init__()
        self.a, self.s, self.axis = nn.Parameter(torch.tensor(a)), s, axis

    def forward(self, x, c_noise, labels=None): return self.a * torch.tanh(self.s * x) + 0.1 * x.flip(self.axis)


# ------------------------------------------------------------------------------------------------------ family

def pieces(name):
    """{top-level name: its source text}"""
    source, found = (HERE / f'{name}.py').read_text(), {}
    for node in ast.parse(source).body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else \
            [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []
        found |= {n: ast.get_source_segment(source, node) for n in names}
    return found


def test_a_name_that_two_methods_share_has_the_same_text_and_place():
    texts, order = {}, {}
    for name in METHODS:
        shared = pieces(name)
        for n, text in shared.items():
            if n not in METHOD_NAMES | OWN.get(name, set()):
                assert texts.setdefault(n, text) == text, f'{n} in {name}.py has drifted'
        order[name] = list(shared)
    for name, own in OWN.items():
        for n in own:
            shared = pieces('ect')['DDPMpp'] if n == 'UNet' and name != 'scm' else texts[n]     # one class for all
            lines = difflib.ndiff(shared.splitlines(), pieces(name)[n].splitlines())
            changed = [line for line in lines if line[0] in '+-' and line[1:].strip()]
            assert 0 < len(changed) <= 32, (name, n, len(changed))
    for n in OWN['ct']: assert pieces('ct')[n] == pieces('ict')[n]
    for a in METHODS:
        for b in METHODS:
            assert [n for n in order[a] if n in order[b]] == [n for n in order[b] if n in order[a]], f'order: {a}, {b}'


def test_scripts_import_the_standard_library_and_four_packages():
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((HERE / f'{name}.py').read_text())):
            roots = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for root in (r.split('.')[0] for r in roots):
                assert root in sys.stdlib_module_names | {'torch', 'numpy', 'PIL', 'scipy'}, (name, root)


@every_method
def test_every_knob_is_used_and_explained(name, capsys):
    source, module = (HERE / f'{name}.py').read_text(), MODULES[name]
    table = source.index('\nCONFIG =')
    body = source[:table] + source[source.index('\n)', table):]
    with pytest.raises(SystemExit) as end: module.main(['--help'])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for knob in module.CONFIG | module.FLAGS:
        assert re.search(rf'cfg\.{knob}\b|\'{knob}\'', body), f'--{knob} of {name}.py is not used'
        assert f'--{knob}' in text
    for knob, (*columns, meaning) in module.CONFIG.items():
        assert len(columns) in (1, 3) and isinstance(meaning, str) and meaning, knob


@pytest.mark.skipif(not shutil.which('diff'), reason='needs diff')
def test_what_a_reader_sees_side_by_side_is_what_the_readme_says():
    readme = (HERE / 'README.md').read_text()
    for a, b in (('ct', 'ict'), ('ict', 'ect'), ('ect', 'sct'), ('ect', 'scm'), ('ect', 'tcm')):
        diff = subprocess.run(['diff', '-U0', HERE / f'{a}.py', HERE / f'{b}.py'], capture_output=True).stdout
        changed = sum(line[:1] in (b'+', b'-') for line in diff.splitlines()) - 2
        assert f'{a} to {b} {changed}' in readme.replace('\n', ' '), f'{a} to {b}: {changed} changed lines'
    lines = (HERE / 'ect.py').read_text().splitlines()
    parts = [(int(a), int(b), text) for a, b, text in re.findall(r'^(?:ect.py)? +(\d+)-(\d+) +(.*)', readme, re.M)]
    assert parts[0][0] == 1 and parts[-1][1] == len(lines) and all(a[1] + 1 == b[0] for a, b in zip(parts, parts[1:]))
    for (first, _, text), banner in zip(parts[1:], ('method', 'recipe', 'From here on', "EDM's checkpoints")):
        assert banner in lines[first - 1] and lines[first - 1].startswith('# ')
    for name in METHODS:                # the method is on the first screens
        source = (HERE / f'{name}.py').read_text().splitlines()
        assert next(i for i, line in enumerate(source, 1) if line.startswith('def f(')) < 76
        assert max(map(len, source)) <= 120


# -------------------------------------------------------------------------------------------------- identities

@every_method
def test_f_is_the_identity_where_there_is_no_noise(name):
    x = torch.randn(3, 3, 8, 8)
    start = {'ct': 0.002, 'ict': 0.002}.get(name, 0.0)
    if name != 'scm': x_0 = MODULES[name].f(lambda x, c, y=None: torch.ones_like(x), x, torch.full((3,), start))
    else: x_0 = MODULES[name].f(lambda x, c, y=None: torch.ones_like(x), x, torch.zeros(3))
    close(x_0, x, rtol=0, atol=1e-7)


@pytest.mark.parametrize('name', ['ect', 'tcm'])
def test_f_is_edms_preconditioning(name):
    x, t = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0.002, 0.5, 3.0, 80.0], dtype=torch.float64)
    seen = {}

    def net(x, c_noise, labels=None):
        seen.update(std=x.std(), c_noise=c_noise)
        return x.flip(2)

    for shape in ((4,), (4, 1, 1, 1)):
        out = MODULES[name].f(net, x, t.view(shape))
        for i, s in enumerate(t.tolist()):
            root = math.sqrt(s * s + 0.25)
            close(out[i], 0.25 / root**2 * x[i] + 0.5 * s / root * (x[i] / root).flip(1))
        close(seen['c_noise'], t.log() / 4)


def test_shift_is_that_of_the_official_evaluation():
    """Official sums of f in train and eval mode for x = sin(.37 i), F(x, c) = .5 tanh x + .1 sin 4c; in the sampler."""
    x = torch.from_numpy(np.sin(.37 * np.arange(192))).float().view(4, 3, 4, 4)
    net = lambda x, c, y=None: 0.5 * torch.tanh(x) + 0.1 * torch.sin(4 * c).view(-1, 1, 1, 1)
    for module in (ect, sct):
        for shift, sums in ((0, [1.888374, 2.412153, -.09456861, -2.276912]),
                            (.003, [1.87829, 2.424541, -.09264047, -2.276827])):
            out = module.f(net, x, torch.tensor([.003, .1, .821, 80]), shift=shift)
            np.testing.assert_allclose(out.sum((1, 2, 3)), sums, rtol=2e-6, atol=2e-6)
        g = generator(0)
        z, n = torch.randn(2, 2, 3, 4, 4, generator=g).double()
        t, s = torch.full((2,), 80.0), torch.full((2,), 0.821)
        two = module.f(net, module.f(net, 80 * z, t, shift=.003) + 0.821 * n, s, shift=.003)
        close(module.sample(net, z, (80, 0.821), noise=[n], shift=.003), two, rtol=1e-6, atol=1e-6)
        assert (module.sample(net, z, (80, 0.821), noise=[n]) - two).abs().max() > 1e-4
        assert module.CONFIG['shift'][:3] == (0.0, 0.003, 0.0)


def test_ect_maps_t_to_r_as_tabulated():
    """The official mapping's values: rows are stages, columns t = .01, .1, 1, 10, 80."""
    table = {(2, 0): [0, 0, 0, 4.99818409, 40], (2, 1): [0, 0, .212117157, 7.49909204, 60],
             (2, 2): [.00377499979, .0399979187, .606058579, 8.74954602, 70],
             (2, 7): [.00980546874, .098124935, .987689331, 9.96092331, 79.6875],
             (256, 0): [.00980546874, .098124935, .987689331, 9.96092331, 79.6875]}
    normal = (torch.tensor([.01, .1, 1, 10, 80], dtype=torch.float64).log() + 1.1) / 2
    for (q, stage), r in table.items():
        cfg = config('ect', '--data', 'cifar10', '--q', q)
        loss = ect.Loss(toy(), cfg, None)
        for step in (stage * cfg.d, (stage + 1) * cfg.d - 1):
            close(loss.levels(torch.special.ndtr(normal), step)[1], torch.tensor(r).double(), rtol=1e-6, atol=1e-9)


def test_tcm_maps_t_to_r_as_tabulated():
    """t = .01, .1, 1, 10, 79; from stage 9 the ratio is at its limit."""
    t = torch.tensor([.01, .1, 1, 10, 79], dtype=torch.float64)
    n = 1 + 8 / (1 + np.exp(t.numpy()))
    loss = tcm.Loss(toy(), config('tcm', '--data', 'cifar10'), None)
    low, high = stats.norm.cdf([(math.log(s) + 1.1) / 2 for s in (0.002, 80)])
    u = torch.from_numpy((stats.norm.cdf((t.log() + 1.1) / 2) - low) / (high - low))
    for a, ratio in ((0, .5), (1, .75), (2, .875), (8, 1 - 2**-9), (9, .999)):
        got_t, r = loss.levels(u, a * 25_000)
        close(got_t, t, rtol=1e-9, atol=0)
        close(r, torch.from_numpy(np.maximum(t.numpy() * (1 - (1 - ratio) * n), 1e-6)), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize('name', ['ect', 'sct'])
def test_stages_of_ect_end_at_n_over_256_however_long_the_run(name):
    """The printed 25,000 steps a stage for 200k on CIFAR-10, 100k on ImageNet-64; the one-hour run's single stage."""
    for argv, d in (('--data cifar10', 50_000), ('--data cifar10 --steps 200000', 25_000),
                    ('--data cifar10 --q 256 --steps 8000', 8000), ('--data imagenet64 --warmup 0', 25_000),
                    ('--data imagenet64 --init none', 12_500), ('--data cifar10 --init none --steps 211', 2)):
        argv = argv.split() + ['--warmup', 200] * ('211' in argv)
        cfg = config(name, *argv)
        loss = MODULES[name].Loss(toy(), cfg, None)
        assert cfg.d == d
        t, r = loss.levels(torch.tensor([0.3, 0.9]), cfg.steps - 1)
        if '211' not in argv: close(1 - r / t, (1 + 8 * torch.sigmoid(-t)) / 256, rtol=1e-9, atol=0)
        else: assert (r < t).all()


@every_method
def test_r_is_below_t_and_never_falls_from_stage_to_stage(name):
    if name == 'scm': pytest.skip('continuous time has no r')
    cfg = config(name)
    loss, u, before = MODULES[name].Loss(toy(), cfg, None), torch.linspace(0.001, 0.999, 999), 0
    start, length = getattr(cfg, 'warmup', 0), getattr(cfg, 'stage1', cfg.steps)
    for step in range(start, start + length, 100):
        t, r = loss.levels(u, step)
        assert (r < t).all() and (r >= 0).all()
        if name in ('ect', 'tcm'): assert (r >= before).all()
        before = r


def test_ect_draws_the_lognormal():
    loss, u = ect.Loss(toy(), config('ect', '--data', 'cifar10'), None), torch.linspace(0.0001, 0.9999, 2001).double()
    t = loss.levels(u, 0)[0]
    np.testing.assert_allclose(stats.norm(-1.1, 2.0).cdf(t.log()), u, atol=1e-9)
    assert t.max() > 80                 # not truncated


def test_tcm_draws_truncated_laws_and_boundary_samples():
    cfg = config('tcm', '--data', 'cifar10')
    loss, u = tcm.Loss(toy(), cfg, None), (torch.arange(4000).double() + 0.5) / 4000
    t = loss.levels(u, 0)[0]
    law = stats.truncnorm((math.log(0.002) + 1.1) / 2, (math.log(80) + 1.1) / 2, -1.1, 2.0)
    np.testing.assert_allclose(law.cdf(t.log()), u, atol=1e-8)
    t, r = loss.levels(u, cfg.stage1)
    assert (t[:1000] == 1).all() and (t[1000:] >= 1).all() and (t <= 80).all() and (t[1000:] == 1).sum() <= 1
    student = stats.t(0.01, 0, 0.2)
    low, high = student.cdf([0, math.log(80)])
    np.testing.assert_allclose((student.cdf(t[1000:].log()) - low) / (high - low), (u[1000:] - .25) / .75, atol=1e-7)
    official = [1.00604, 1.04298, 1.22115, 2.52355, 24.6497]                    # quantiles of the official code's draw
    np.testing.assert_allclose(np.quantile(t[1000:], [.05, .25, .5, .75, .95]), official, rtol=5e-3)
    assert (r[:1000] < 1).all() and abs(float(t[r >= 1].min()) - 1.0031566) < 2e-4


def test_stages_of_tcm_follow_each_other():
    cfg = config('tcm', '--data', 'cifar10', '--init', 'none', '--warmup', 10, '--stage1', 20, '--steps', 60)
    loss = tcm.Loss(toy(), cfg, None)
    assert [loss.phase(s) for s in (0, 9, 10, 29, 30)] == [('diffusion', 0, 5e-4, 512), ('diffusion', 0, 5e-4, 512),
        ('stage 1', 10, 1e-4, 512), ('stage 1', 10, 1e-4, 512), ('stage 2', 30, 5e-5, 1024)]
    cfg = config('tcm', '--data', 'imagenet64', '--warmup', 0)
    loss = tcm.Loss(toy(), cfg, None)
    assert loss.phase(0)[2:] == (1e-3, 2048) and loss.phase(8000)[2] == 5e-4
    assert abs(loss.phase(cfg.stage1 + 78_000)[2] - 5e-4 / 4) < 1e-12           # lr decay counts on over both stages
    (_, decay), = loss.averages(None, 999)
    assert abs(decay - .982181667) < 1e-8                                       # power-function EMA at step 1000


def test_stage_2_of_a_given_checkpoint_goes_on_where_its_stage_1_ended(capfd, tmp_path):
    """Levels, learning rate and power-form average of the whole run, whatever came before --init; else a refusal. In a
    run with a warm-up the average counts from the start of stage 1."""
    u = torch.linspace(0.01, 0.99, 99)
    for data, extra in (('cifar10', []), ('imagenet64', ['--ema_gamma', 16.97])):
        whole = tcm.Loss(toy(), config('tcm', '--data', data, '--init', 'x.pkl', *extra), None)
        first = whole.stage2
        argv = ['--data', data, '--init', 'x.pkl', '--stage1', 0, *extra]
        part = tcm.Loss(toy(), config('tcm', *argv, '--before', first), None)
        for step in (0, 1, 20_000, 100_000):
            for a, b in zip(part.levels(u, step), whole.levels(u, first + step)): assert torch.equal(a, b)
            assert part.phase(step)[2:] == whole.phase(first + step)[2:] and part.phase(step)[0] == 'stage 2'
            assert part.averages(None, step)[0][1] == whole.averages(None, first + step)[0][1]
        with pytest.raises(SystemExit): tcm.Loss(toy(), config('tcm', *argv), (torch.zeros(1), None))
        assert 'say with --before how many steps of stage 1' in capfd.readouterr().err
    warm = tcm.Loss(toy(), config('tcm', '--ema_gamma', 16.97, '--warmup', 500, '--stage1', 100), None)
    for step, n in ((0, 1), (499, 500), (500, 1), (599, 100), (600, 101)):
        assert abs(warm.averages(None, step)[0][1] - (1 - 1 / n)**17.97) < 1e-12


def test_stage_2_of_tcm_starts_from_the_averages_of_stage_1_and_keeps_them_frozen(data, tmp_path):
    argv = ['--data', data, *TINY, *PHASES['tcm'], '--ema', 0.5, '--out', tmp_path]
    average = go('tcm', *argv, '--steps', 6)['ema']         # warm-up 3, stage 1 3
    state = go('tcm', *argv, '--steps', 8)
    assert {float(s['step']) for s in state['opt']['state'].values()} == {2}            # its optimiser is a new one
    saved = state['loss']
    assert_same({k[8:]: v for k, v in saved.items() if k[:8] == 'teacher.'}, average, rtol=0, atol=0)
    assert all((saved[f'net.{k}'] - average[k]).abs().max() < 0.02 for k in average)    # two steps of lr 1e-3 away
    assert any((saved[f'net.{k}'] != average[k]).any() for k in average)


@needs_golden
def test_power_form_averages_are_the_official_codes():
    """Decays of the printed steps, and the average of a walk of weights, whatever the warm-up before it."""
    v, gammas = golden_of('phema'), dict(zip(*(np.load(GOLDEN / 'phema.npz')[k].round(9) for k in ('stds', 'exps'))))
    for name in ('ect', 'sct', 'scm', 'tcm'):
        for std, decays in zip(gammas, v['betas']):
            cfg = config(name, '--ema_gamma', gammas[std], '--warmup', 30)
            loss = MODULES[name].Loss(toy(), cfg, None)
            for step, decay in zip(v['steps'].tolist(), decays.tolist()):
                assert abs(loss.averages(None, 30 + step - 1)[0][1] - decay) < 1e-9
    for i, std in enumerate(v['walk_stds'].tolist()):
        loss = ect.Loss(toy(), config('ect', '--ema_gamma', gammas[round(std, 9)], '--warmup', 0), None)
        ema = torch.full_like(v['walk'][0], 99.)                # the start is forgotten at once
        for step, weights in enumerate(v['walk']):
            ema = ema.lerp(weights, 1 - loss.averages(None, step)[0][1])
            close(ema, v['walk_emas'][step, i], rtol=1e-5, atol=1e-6)


def test_learning_rate_anneals_to_zero_in_each_stage():
    for name in ('ect', 'tcm'):
        cfg = config(name, '--anneal', 1, '--warmup', 10, '--steps', 110, '--lr', 2e-3,
                     *(['--lr_stage1', 1e-3, '--stage1', 20] if name == 'tcm' else []))
        loss = MODULES[name].Loss(toy(), cfg, None)
        got = [loss.phase(s)[2] for s in (0, 9, 10, 20, 29, 30, 70, 109)]
        stages = dict(ect=[2, 1.8, 1.62, 1.6, 0.8, 0.02], tcm=[1, 0.5, 0.05, 2, 1, 0.025])[name]
        np.testing.assert_allclose(got, [cfg.lr_warmup, cfg.lr_warmup, *(v / 1000 for v in stages)])


# ----------------------------------------------------------------------------------------------------- oracles

@needs_golden
@pytest.mark.parametrize('name, arch', [(n, a) for n in METHODS for a in MODULES[n].CHOICES['arch'] if 'pp' in a])
def test_network_and_pickle_reader_agree_with_edm(name, arch):
    golden = np.load(GOLDEN / f'edm_{arch}_tiny.npz')
    x, sigma, D, F = (torch.from_numpy(golden[k]) for k in ('x', 'sigma', 'D', 'F'))
    net = MODULES[name].load_edm(GOLDEN / f'edm_{arch}_tiny.pkl').eval()
    s = sigma.view(-1, 1, 1, 1)
    close(net(x / (s**2 + 0.25).sqrt(), sigma.log() / 4), F, rtol=1e-5, atol=2e-5)
    if name in ('ect', 'sct', 'tcm'): close(MODULES[name].f(net, x, sigma), D, rtol=1e-5, atol=2e-5)


@every_method
def test_network_gives_edms_numbers_without_a_file(name):
    """Sums of EDM's outputs for weights set by a rule on EDM's parameter names."""
    net = MODULES[name].UNet(config(name, '--res', 16, '--ch', 16, '--mult', '2,2', '--blocks', 1, '--attn', 8,
                                    '--arch', 'ddpmpp')).eval()
    places = dict(zip((f'enc.{i}.' for i in range(4)), ('16x16_conv', '16x16_block0', '8x8_down', '8x8_block0')))
    places |= dict(zip((f'dec.{i}.' for i in range(7)), ('8x8_in0', '8x8_in1', '8x8_block0', '8x8_block1', '16x16_up',
                                                         '16x16_block0', '16x16_block1')))
    places = {k: f'model.{k[:4]}{v}.' for k, v in places.items()}
    places |= {'map0.': 'model.map_layer0.', 'map1.': 'model.map_layer1.', 'norm.': 'model.dec.16x16_aux_norm.',
               'out.': 'model.dec.16x16_aux_conv.'}
    edm = {k: next(v + k[len(p):] for p, v in places.items() if k.startswith(p)) for k, _ in net.named_parameters()}
    order = sorted([*edm.values(), 'model.map_augment.weight'])
    assert len(order) == 143
    for k, p in net.named_parameters():
        v = torch.sin(0.1 * torch.arange(p.numel()).double() + order.index(edm[k])).view(p.shape).float()
        one = 'norm' in edm[k] and k.endswith('weight')
        p.data = v / math.sqrt(p[0].numel()) if p.ndim > 1 else one + 0.1 * v
    x = torch.from_numpy(np.sin(.37 * np.arange(2 * 768))).float().view(2, 3, 16, 16)
    F = net(x, torch.full((2,), -0.2))
    np.testing.assert_allclose([F.sum().item(), F.abs().sum().item()], [45.780182, 335.00463], rtol=0, atol=2e-3)
    if name not in ('ect', 'sct', 'tcm'): return
    for sigma, total, size in ((.002, 5.1030822, 978.00429), (.5, 19.107908, 485.44458), (80., 39.84572, 184.14354)):
        D = MODULES[name].f(net, x, torch.full((2,), sigma))
        np.testing.assert_allclose([D.sum().item(), D.abs().sum().item()], [total, size], rtol=0, atol=5e-6 * size)


@needs_golden
def test_ect_loss_agrees_with_the_official_code():
    golden = golden_of('ect_losses')
    u = torch.special.ndtr(golden['normal'].double())
    for q, stage in ((2, 0), (2, 1), (2, 3), (2, 7), (256, 0)):
        for c in (0.0, 0.03):
            cfg = config('ect', '--data', 'cifar10', '--q', q, '--c', c)
            loss = ect.Loss(toy(), cfg, None)
            t, r = loss.levels(u, stage * cfg.d)
            close(t.float(), golden['ect_t'], rtol=1e-6, atol=0)
            close(r.float(), golden[f'ect_q{q}_s{stage}_r'], rtol=1e-5, atol=1e-7)
            value = loss(golden['x'], None, u, golden['eps'], stage * cfg.d)
            close(value, golden[f'ect_q{q}_s{stage}_c{c}_loss'], rtol=1e-5, atol=0)


@needs_golden
def test_tcm_losses_agree_with_the_official_code():
    """At the ratio limit two float32 outputs 5e-5 apart are subtracted: there 2e-7 in that distance is tolerated."""
    golden = golden_of('tcm_losses')
    student, teacher = toy(0.6, 1.4, 2), toy()

    def check(loss, t, stage, expected):
        t = t.double()
        r = (t - t * max(2.0**-(stage + 1), 0.001) * (1 + 8 * torch.sigmoid(-t))).clamp(min=1e-6)
        value = loss.pair(golden['x'], None, golden['eps'], t, r, stage * 25_000)
        slack = 2e-7 * loss.weight(t, r)
        assert ((value - expected).abs() <= 1e-5 * expected + slack).all(), value / expected - 1

    for stage in (0, 3, 12):
        loss = tcm.Loss(teacher, config('tcm', '--data', 'cifar10'), None)
        check(loss, torch.exp(2 * golden['normal'] - 1.1), stage, golden[f'tcm1_s{stage}_loss'])
    for stage in (0, 3, 9):
        for weight, flag, c in (('default', '1/(t-r)', 1e-8), ('cout_sq', '1/c_out^2', 0.06)):
            cfg = config('tcm', '--data', 'cifar10', '--stage1', 0, '--weight', flag, '--c', c)
            loss, key = tcm.Loss(student, cfg, None), f'tcm_s{stage}_{weight}'
            loss.teacher = teacher
            t = torch.cat([torch.ones(2), golden[f'{key}_t']])
            check(loss, t, stage, torch.cat([golden[f'{key}_boundary'], golden[f'{key}_loss']]))


def test_ect_loss_by_hand():
    """Official values for x = sin(.37 i), F(x, c) = .5 tanh x + .1 sin 4c: no file. And a scalar re-derivation."""
    i = np.arange(192)
    x = torch.from_numpy(np.sin(.37 * i)).float().view(4, 3, 4, 4)
    g = generator(0)
    normal, z = torch.randn(4, 1, 1, 1, generator=g), torch.randn(4, 3, 4, 4, generator=g)
    net = lambda x, c, y=None: 0.5 * torch.tanh(x) + 0.1 * torch.sin(4 * c).view(-1, 1, 1, 1)
    u = torch.special.ndtr(normal.double().flatten())
    for q, stage, c, expected in (
            (2, 0, 0., [.0774222, 6.787966, 7.51666, 3.612115]), (2, 3, 0., [.04572298, 7.451389, 7.594917, 2.300768]),
            (256, 0, 0., [.04394069, 7.553102, 7.587823, 1.956249]),
            (2, 3, .06, [.007719982, 6.415124, .6349387, 2.020987])):
        loss = ect.Loss(net, config('ect', '--data', 'cifar10', '--q', q, '--c', c, '--d', 25_000), None)
        close(loss(x, None, u, z, stage * 25_000), torch.tensor(expected), rtol=2e-5, atol=0)
        for b, t in enumerate(torch.exp(2 * normal.flatten().double() - 1.1).tolist()):
            r = max(0, t * (1 - (1 + 8 / (1 + math.exp(t))) / q**(stage + 1)))

            def D(v, s):
                if not s: return v
                root = math.sqrt(s * s + .25)
                return .25 * v / root**2 + .5 * s / root * (.5 * math.tanh(v / root) + .1 * math.sin(math.log(s)))
            values = zip(x[b].flatten().tolist(), z[b].flatten().tolist())
            S = sum((D(v + t * e, t) - D(v + r * e, r))**2 for v, e in values)
            exact = loss(x.double(), None, u, z.double(), stage * 25_000)[b]
            assert abs((math.sqrt(S + c * c) - c) / (t - r) / exact - 1) < 1e-9
    loss, t = ect.Loss(net, config('ect', '--data', 'imagenet64', '--warmup', 0), None), torch.tensor([.3, 2.])
    close(loss.weight(t, t / 2), 1 / t**2 + 4)


def test_warmup_is_edms_loss():
    for name in ('ect', 'tcm'):
        loss = MODULES[name].Loss(toy(), config(name, '--warmup', 5), None)
        x, z = torch.randn(2, 2, 3, 8, 8)
        u = torch.tensor([0.5, 0.9])
        t = torch.from_numpy(np.exp(-1.2 + 1.2 * stats.norm.ppf(u.double())))
        s = t.float().view(-1, 1, 1, 1)
        expected = ((s**2 + .25) / (.5 * s)**2 * (MODULES[name].f(toy(), x + s * z, t) - x)**2).mean((1, 2, 3))
        close(loss(x, None, u, z, 4), expected)


@pytest.mark.parametrize('name', ['ict', 'ect', 'tcm'])
def test_gradient_flows_through_f_at_t_alone(name):
    net, f = Toy(0.6, 1.4, 2).double(), MODULES[name].f
    cfg = config(name, '--data', 'cifar10', *dict(ect=[], tcm=['--stage1', 0], ict=['--c', 0])[name])
    loss = MODULES[name].Loss(net, cfg, None)
    x, z = torch.randn(2, 4, 3, 8, 8).double()
    t, r = torch.tensor([1.2, 2, 5, 70]).double(), torch.tensor([1.1, 1.5, 4, 69]).double()
    loss.pair(x, None, z, t, r, 0).mean().backward()
    target, h = f(net, x + r.view(-1, 1, 1, 1) * z, r).detach(), 1e-6

    def value(a):
        d = f(toy(a, 1.4, 2), x + t.view(-1, 1, 1, 1) * z, t) - target
        return float((d.flatten(1).norm(dim=1) / (t - r)).mean())
    assert abs(float(net.a.grad) - (value(0.6 + h) - value(0.6 - h)) / 2 / h) < 1e-4
    assert name != 'tcm' or loss.teacher.a.grad is None


@pytest.mark.parametrize('name', ['ict', 'ect', 'tcm'])
def test_student_and_target_share_dropout_masks(name):
    """With r = t and equal weights the outputs cancel only if the masks are the same, for the frozen network too."""
    more = {'ict': [], 'ect': ['--warmup', 0], 'tcm': ['--warmup', 0, '--stage1', 0, '--t_transition', 2]}[name]
    if name != 'ict': more += ['--weight', '1/(t-r)']
    cfg = config(name, *TINY, '--res', 8, '--dropout', 0.5, *more)
    loss = MODULES[name].Loss(MODULES[name].UNet(cfg), cfg, None)
    for p in loss.net.parameters(): nn.init.normal_(p, std=0.2)
    if name == 'tcm': loss.begin(loss.net)
    x, z = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    t = torch.tensor([1.0, 1.5, 3, 60])
    apart = loss.pair(x, None, z, t, t * 0.999, 10**6)
    near = loss.pair(x, None, z, t, t * (1 - 1e-6), 10**6)
    assert ((near * 1e-6) < 1e-3 * (1 + apart)).all()
    loss.net.eval()                     # without dropout the student differs from a teacher that keeps it
    if name == 'tcm': assert (loss.pair(x, None, z, t, t * (1 - 1e-6), 10**6) * 1e-6)[:2].min() > 1e-2


def test_tcm_weighs_the_two_means_as_the_paper():
    """Stratified u: the objective's mean is that of ordinary samples + w_boundary times that of boundary samples."""
    cfg = config('tcm', '--data', 'cifar10', '--stage1', 0)
    loss, u = tcm.Loss(toy(0.6, 1.4, 2), cfg, None), (torch.arange(64) + 0.5) / 64
    loss.teacher = toy()
    x, z = torch.randn(64, 3, 8, 8), torch.randn(64, 3, 8, 8)
    t, r = loss.levels(u, 0)
    each = loss.pair(x, None, z, t, r, 0)
    close(loss(x, None, u, z, 0).mean(), each[16:].mean() + 0.1 * each[:16].mean())
    loss.teacher = toy(0.0)             # only targets with r < t' come from it
    changed = loss.pair(x, None, z, t, r, 0) != each
    assert (changed == (r < 1)).all() and changed.sum() > 16


# ------------------------------------------------------------------------------------------------- ct.py, ict.py

def ct_loss(*argv, net=None): return ct.Loss(net or toy(), config('ct', '--metric', 'l2', *argv), None)


def test_ct_and_ict_f_is_edms_shifted_by_eps():
    x, t = torch.randn(5, 3, 8, 8).double(), torch.tensor([0.002, 0.01, 0.5, 3.0, 80.0]).double()
    net = lambda v, c, labels=None: v.flip(2) + c.view(-1, 1, 1, 1)
    for m in (ct, ict):
        out = m.f(net, x, t)
        for i, s in enumerate(t.tolist()):
            root = math.sqrt(s * s + 0.25)
            F = (x[i] / root).flip(1) + math.log(s) / 4
            close(out[i], 0.25 / ((s - 0.002)**2 + 0.25) * x[i] + 0.5 * (s - 0.002) / root * F)


def test_ct_schedules_are_the_codes():
    """N(k), mu(k) of the official code for CIFAR-10 and ImageNet-64, and the paper's mu, with N in place of N - 1."""
    table = {
        (150, .9): ([2, 3, 3, 6, 17, 54, 107, 151],
                    [.81, .9, .9, .958731516, .986916281, .996032025, .998014040, .998596179],
                    [.9, .932169752, .932169752, .965489385, .987681151, .996105363, .998032582, .998605470]),
        (200, .95): ([2, 3, 4, 8, 23, 72, 143, 201],
                     [.9025, .95, .966382530, .985451638, .995347828, .998556162, .999277820, .999487199],
                     [.95, .966382530, .974679434, .987258545, .995549646, .998576201, .999282869, .999489749])}
    for (s1, mu0), (N, mu, paper) in table.items():
        loss = ct_loss('--data', 'cifar10', '--s1', s1, '--mu0', mu0)
        got = [loss.schedule(k) for k in (0, 1, 100, 1000, 10_000, 100_000, 400_000, 800_000)]
        assert [n for n, _ in got] == N
        np.testing.assert_allclose([m for _, m in got], mu, rtol=1e-8)
        np.testing.assert_allclose([m**((n - 1) / n) for n, m in got], paper, rtol=1e-8)
    changes = [k for k in range(1, 3000) if loss.schedule(k)[0] != loss.schedule(k - 1)[0]]
    assert changes[:8] == [1, 100, 238, 416, 634, 892, 1189, 1525]


@needs_golden
def test_ct_agrees_with_the_official_code():
    golden = golden_of('ct_losses')
    close(ct.f(toy(), golden['f_in'], golden['f_t']), golden['f_out'], rtol=1e-5, atol=1e-6)
    for N in (2, 18, 151):
        for metric in ('l1', 'l2'):
            loss = ct_loss('--data', 'cifar10', '--metric', metric)
            loss.target, n = toy(0.6, 1.4, 2), N - 2 - golden[f'ct_N{N}_idx'].double()
            value = loss.pair(golden['x'], None, golden['eps'], ct.grid(loss.cfg, n + 1, N), ct.grid(loss.cfg, n, N), 0)
            close(value, golden[f'ct_N{N}_{metric}_loss'], rtol=1e-5, atol=0)
    schedule = np.load(GOLDEN / 'ct_schedule_s0_2_s1_150_mu0_0.9_K800k.npz')
    loss = ct_loss('--data', 'cifar10')
    np.testing.assert_allclose([loss.schedule(int(k))[::-1] for k in schedule['k']], schedule['mu_N'], rtol=1e-12)


def test_ct_loss_and_distillation_by_hand():
    """Official values for x = sin(.37 i), z = cos(.73 i), F(x, c) = a tanh x + b sin 4c: need no file."""
    i = np.arange(192)
    x, z = (torch.from_numpy(v).float().view(4, 3, 4, 4) for v in (np.sin(.37 * i), np.cos(.73 * i)))
    net = lambda a, b: lambda x, c, y=None: a * torch.tanh(x) + b * torch.sin(4 * c).view(-1, 1, 1, 1)
    for N, metric, index, expected in (
            (2, 'l2', (0, 0, 0, 0), (.5363175, .513984, .5359547, .4950424)),
            (3, 'l2', (0, 1, 1, 0), (.02215735, .4365847, .4484162, .02013305)),
            (18, 'l2', (7, 3, 12, 16), (.002330448, .001426676, .01246989, 2.150493e-05)),
            (18, 'l1', (7, 3, 12, 16), (.04367539, .02958374, .09067624, .003863227)),
            (18, 'cd', (7, 3, 12, 16), (.001478034, .001388875, .008561571, 2.987868e-06))):
        loss = ct_loss('--data', 'cifar10', '--metric', metric.replace('cd', 'l2'), net=net(.5, .1))
        n = N - 2 - torch.tensor(index).double()
        loss.target, loss.teacher = net(.4, .2), net(.7, -.3) if metric == 'cd' else None
        value = loss.pair(x, None, z, ct.grid(loss.cfg, n + 1, N), ct.grid(loss.cfg, n, N), 0)
        close(value, torch.tensor(expected), rtol=3e-5, atol=0)


def test_ct_grid_is_karras_and_pairs_are_equally_likely():
    grid = ct.grid(config('ct', '--t_max', 80), torch.arange(10).double(), 10)
    karras = [.002, .0204353, .116639, .469979, 1.50174, 4.06612, 9.7232, 21.1087, 42.4152, 80]
    np.testing.assert_allclose(grid, karras, rtol=1e-5)
    loss = ct_loss('--steps', 1000, '--s0', 9, '--s1', 9)
    t, r = loss.levels((torch.arange(800) + 0.5) / 800, 0)
    close(t.unique(), ct.grid(loss.cfg, torch.arange(1, 9).double(), 9))
    assert t.unique(return_counts=True)[1].tolist() == [100] * 8 == r.unique(return_counts=True)[1].tolist()


def test_heun_step_follows_the_ode_of_gaussian_data():
    """Data N(m, s^2): D(x, t) = m + s^2 (x - m) / (s^2 + t^2); the ODE keeps (x - m) / sqrt(s^2 + t^2). Order 3."""
    m, s = 0.3, 0.7
    loss = ct_loss()

    def teacher(v, c_noise, labels=None):       # the raw network whose preconditioned output is D
        t = (4 * c_noise).exp().view(-1, 1, 1, 1)
        x = v * (t**2 + .25).sqrt()
        return (m + s**2 * (x - m) / (s**2 + t**2) - .25 / (t**2 + .25) * x) * (t**2 + .25).sqrt() / (.5 * t)
    loss.teacher, x = teacher, torch.randn(1, 3, 4, 4, dtype=torch.float64)
    error = []
    for r in (1.9, 1.95):
        t, r = torch.full((1, 1, 1, 1), 2.0).double(), torch.full((1, 1, 1, 1), r).double()
        exact = m + (x - m) * ((s**2 + r**2) / (s**2 + t**2)).sqrt()
        error.append(float((loss.heun(x, t, r, None) - exact).norm() / (x - m).norm()))
    assert error[0] < 1e-5 and 7 < error[0] / error[1] < 9


def test_ct_target_follows_after_the_optimiser_step(data, tmp_path, monkeypatch):
    """target_k+1 = mu(k) target_k + (1 - mu(k)) net_k+1, from target_0 = net_0; the EMA has its own decay."""
    argv = ['--data', data, *TINY, '--metric', 'l2', '--s0', 2, '--s1', 2, '--mu0', 0.25, '--ema', 0.9]
    seen, write = [], ct.write

    def keep(path, writer):
        write(path, writer)
        if path.name == 'latest.pt': seen.append(torch.load(path, weights_only=True)['loss'])
    monkeypatch.setattr(ct, 'write', keep)
    saved = go('ct', *argv, '--steps', 2, '--save_every', 1, '--out', tmp_path)
    cfg = argparse.Namespace(**saved['config'])
    start, loss = ct.new_network(cfg).state_dict(), ct.Loss(toy(), cfg, None)
    mu = [loss.schedule(k)[1] for k in (0, 1)]
    assert 0.05 < mu[0] < mu[1] < 0.6
    for k, v in start.items():
        target = mu[0] * v + (1 - mu[0]) * seen[0][f'net.{k}']
        close(seen[0][f'target.{k}'], target, rtol=1e-5, atol=1e-7)
        close(seen[1][f'target.{k}'], mu[1] * target + (1 - mu[1]) * seen[1][f'net.{k}'], rtol=1e-5, atol=1e-7)
        ema = 0.9 * (0.9 * v + 0.1 * seen[0][f'net.{k}']) + 0.1 * seen[1][f'net.{k}']
        close(saved['ema'][k], ema, rtol=1e-5, atol=1e-7)



def test_lpips_against_a_slow_derivation(tmp_path):
    """Random weights in the files' layout; convolutions by unfold in float64, heads and norms pixel by pixel."""
    g, plan, vgg, heads, i, cin = generator(0), (2, 2, 3, 3, 3), {}, {}, 0, 3
    for block, depth in enumerate(plan):
        width = (64, 128, 256, 512, 512)[block]
        for _ in range(depth):
            vgg[f'features.{i}.weight'] = torch.randn(width, cin, 3, 3, generator=g) * (2 / 9 / cin)**0.5
            vgg[f'features.{i}.bias'] = torch.randn(width, generator=g) * 0.1
            i, cin = i + 2, width
        i += 1
        heads[f'lin{block}.model.1.weight'] = torch.rand(1, width, 1, 1, generator=g)
    a, b = torch.rand(2, 2, 3, 32, 32, generator=g) * 2 - 1
    value = ct.LPIPS(vgg, heads)(a, b)

    def features(x):
        x = nn.functional.interpolate((x.double() + 1) / 2, (224, 224), mode='bilinear', align_corners=False)
        mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]]).double().view(2, 3, 1, 1)
        x = (x - mean) / std
        layers = iter(sorted((int(k.split('.')[1]) for k in vgg if k.endswith('weight'))))
        for block, depth in enumerate(plan):
            if block: x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
            for j in (next(layers) for _ in range(depth)):
                w = vgg[f'features.{j}.weight'].double()
                h = (w.flatten(1) @ nn.functional.unfold(x, 3, padding=1)).unflatten(2, x.shape[2:])
                x = (h + vgg[f'features.{j}.bias'].double().view(-1, 1, 1)).clamp(min=0)
            yield x / x.square().sum(1, keepdim=True).sqrt()
    layers = zip(heads.values(), features(a[:1]), features(b[:1]))
    expected = sum((h.double() * (p - q)**2).sum(1).mean((1, 2)) for h, p, q in layers)
    close(value[:1].double(), expected, rtol=1e-4, atol=0)
    assert ct.LPIPS(vgg, heads)(a, a).abs().max() == 0 and not ct.LPIPS(vgg, heads).state_dict()


def test_lpips_without_its_weights_names_the_files(monkeypatch, capfd, tmp_path):
    def no_route(*args, **kw): raise OSError('no route to host')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_route)
    monkeypatch.chdir(tmp_path)
    line = fails(capfd, 2, 'ct', '--metric', 'lpips', '--out', tmp_path / 'run')
    assert 'vgg16-397923af.pth' in line and 'datasets/' in line


def test_edits_keep_what_is_known():
    y, net = torch.rand(3, 3, 16, 16) * 1.6 - 0.8, toy()
    gray = torch.tensor([0.2989, 0.5870, 0.1140]).view(3, 1, 1)
    keeps = {'colour': lambda v: (v * gray).sum(1), 'superres': lambda v: nn.functional.avg_pool2d(v, 2),
             'inpaint': lambda v: v[..., :4]}
    for kind, keep in keeps.items():
        A, inverse, known = ct.edit_map(kind, 16)
        close(inverse(A(y)), y, rtol=0, atol=1e-6)
        close(A(y).square().sum(), y.square().sum(), rtol=1e-5, atol=0)
        start, x = ct.edit(net, y, A, inverse, known, [80., 5., .5, .002], generator=generator(0))
        close(keep(x), keep(y), rtol=0, atol=1e-6)
        assert (x - y).abs().max() > 0.01 and (start - y).abs().max() > 0.01
    Q = ct.orthogonal(torch.tensor([0.2989, 0.5870, 0.1140]))
    np.testing.assert_allclose(Q, [[.4471, -.8204, .3564], [.8781, .4785, 0], [.1705, -.3129, -.9343]], atol=1e-4)


def test_multistep_ends_and_slerp():
    z, noise = torch.randn(2, 2, 3, 8, 8)
    for m in (ct, ict):
        close(m.sample(toy(), z, [80., .002], noise=[noise]), m.sample(toy(), z, [80.]), rtol=0, atol=1e-6)
        x = m.sample(toy(), z, [80.])
        expected = m.f(toy(), x + (0.821**2 - 0.002**2)**0.5 * noise, torch.full((2,), 0.821)).clamp(-1, 1)
        close(m.sample(toy(), z, [80., .821], noise=[noise]), expected)
    a, b = z
    close(ct.slerp(a, b, 0.0), a)
    close(ct.slerp(a, b, 1.0), b)
    unit = lambda v: v.flatten() / v.norm()
    middle = unit(ct.slerp(unit(a), unit(b), 0.5))
    close(middle @ unit(a), middle @ unit(b))


def test_the_readme_samples_from_python(tmp_path):
    go('ect', *TINY, '--res', 16, '--steps', 1, '--warmup', 1, '--out', tmp_path / 'runs' / 'ect-glyphs')
    code = re.search(r'^import torch, ect\n.*?(?=```)', (HERE / 'README.md').read_text(), re.M | re.S)[0]
    done = subprocess.run([sys.executable, '-c', f'{code}print(*x.shape, x.abs().max() < 9)'], capture_output=True,
                          text=True, cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(HERE)))
    assert done.stdout == '4 3 16 16 tensor(True)\n', done.stderr


def test_edit_writes_pictures(data, tmp_path, capfd):
    go('ct', '--data', data, *TINY, *PHASES['ct'], '--steps', 2, '--out', tmp_path / 'run')
    assert run('ct', '--out', tmp_path / 'run', '--edit=inpaint').returncode == 0
    for kind in ('inpaint', 'colour', 'superres', 'interpolate'):
        if kind != 'inpaint': ct.edit_pictures(['--out', str(tmp_path / 'run'), '--edit', kind])
        assert Image.open(tmp_path / 'run' / f'edit-{kind}.png').size[0] == 20 * 48
    capfd.readouterr()
    for argv, message in ((['none'], 'invalid choice'), (['superres', '--res', '12'], 'sides that 8 divides, not 12')):
        with pytest.raises(SystemExit): ct.edit_pictures(['--out', str(tmp_path / 'run'), '--edit', *argv])
        assert message in capfd.readouterr().err


def test_distillation_starts_from_its_teacher(data, tmp_path):
    teacher = go('ect', '--data', data, *TINY, '--warmup', 4, '--steps', 4, '--out', tmp_path / 'teacher')
    argv = ['--data', data, '--teacher', tmp_path / 'teacher' / 'latest.pt', *PHASES['ct'], '--out', tmp_path / 'cd']
    saved = go('ct', *argv, '--batch', 4, '--lr', 1e-12, '--steps', 2)
    for part in ('teacher', 'net', 'target'):
        for k, v in teacher['ema'].items(): close(saved['loss'][f'{part}.{k}'], v, rtol=0, atol=1e-6)
    assert saved['config']['ch'] == 8
    assert go('ct', *argv, '--steps', 4)['step'] == 4


def test_ict_schedule_proposal_and_weight_are_the_papers():
    loss = ict.Loss(toy(), config('ict', '--data', 'cifar10'), None)
    doublings = {0: 11, 49_999: 11, 50_000: 21, 100_000: 41, 150_000: 81, 200_000: 161, 250_000: 321, 300_000: 641,
                 350_000: 1281, 399_999: 1281}
    assert {k: loss.schedule(k) for k in doublings} == doublings
    u = (torch.arange(10**6) + 0.5) / 10**6
    t, r = loss.levels(u, 0)
    p = [.0626329925, .18173698, .245501422, .213494447, .142446058, .0806046217, .0410799062, .0195800922,
         .00894386841, .00397961221]
    np.testing.assert_allclose(r.unique(return_counts=True)[1] / 10**6, p, atol=2e-6)
    close(r.unique(), ict.grid(loss.cfg, torch.arange(10).double(), 11))
    close(t.unique(), ict.grid(loss.cfg, torch.arange(1, 11).double(), 11))
    t, r = loss.levels(u, 399_999)
    assert abs(float(r.log().mean()) + 1.093057) < 1e-4
    assert abs(1 / float((t - r).min()) - 25584.7238) < 0.01
    assert abs(1 / float((t - r)[t == t.max()][0]) - 2.93603127) < 1e-6


def test_ict_loss_by_hand():
    loss, net = ict.Loss(toy(), config('ict', '--data', 'cifar10'), None), toy()
    x, z = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    t, r = torch.tensor([.02, 1.5, 80]).double(), torch.tensor([.002, 1.2, 60]).double()
    value = loss.pair(x, None, z, t, r, 0)
    near, far = (ict.f(net, x + s.view(-1, 1, 1, 1) * z, s) for s in (r, t))
    for b, S in enumerate((far - near).square().sum((1, 2, 3)).tolist()):
        c = 0.00054 * math.sqrt(192)
        assert abs(float(value[b]) * float(t[b] - r[b]) - (math.sqrt(S + c * c) - c)) < 1e-12
    assert abs(0.00054 * math.sqrt(3 * 32 * 32) - 0.029929838) < 1e-8


# ---------------------------------------------------------------------------------------------------------- sct

def scalars(*values): return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def test_posterior_mean_of_two_points_is_tanh_and_tweedies_score():
    x, t = torch.linspace(-3, 3, 50).double().requires_grad_(), 0.7
    m = sct.posterior_mean(x.view(-1, 1, 1, 1), scalars(*[t] * 50), [scalars(-0.6, 0.6)]).flatten()
    close(m, 0.6 * torch.tanh(0.6 * x / t**2).detach(), rtol=1e-12, atol=1e-14)
    density = torch.logsumexp(torch.stack([-(x - a)**2 / 2 / t**2 for a in (-0.6, 0.6)]), 0)
    score, = torch.autograd.grad(density.sum(), x)
    close((m - x.detach()) / t**2, score, rtol=1e-10, atol=1e-12)


def test_posterior_mean_is_unbiased_for_every_number_of_references():
    """Enumeration: x uniform on three points, the other references drawn with and without replacement; the same set
    without x is biased. The variance given x_t falls with n."""
    points, x_t, t = [-1.0, 0.3, 0.9], 0.4, 0.8
    likelihood = np.exp([-(x_t - p)**2 / 2 / t**2 for p in points])
    posterior = likelihood / likelihood.sum()
    exact, spread = posterior @ points, []

    def mean(refs): return sct.posterior_mean(scalars(x_t), scalars(t), map(scalars, refs)).item()

    def expected(sets, power=1):
        """Of the mean of a set's images, or its power, for (own image, the others of its set) each as likely"""
        per = [np.mean([mean([points[i] for i in s])**power for o, s in sets if o == own]) for own in range(3)]
        return posterior @ per

    for n in range(1, 5):
        drawn = [(own, (own, *others)) for own in range(3) for others in np.ndindex(*[3] * (n - 1))]
        kinds = [drawn, [(own, sorted(set(s))) for own, s in drawn]]    # with replacement; distinct
        if n < 4: kinds += [[(s[0], s) for s in itertools.permutations(range(3), n)]]           # without replacement
        for sets in kinds: assert abs(expected(sets) - exact) < 1e-12, n
        spread.append(expected(drawn, 2) - exact**2)
        if n > 1: assert abs(expected([(own, s[1:]) for own, s in drawn]) - exact) > 0.02
    assert all(b < 0.9 * a for a, b in zip(spread, spread[1:])), spread


def test_posterior_mean_at_its_ends_in_any_order_and_in_float32():
    g = generator(0)
    y, z = torch.rand(64, 3, 32, 32, generator=g) * 2 - 1, torch.randn(64, 3, 32, 32, generator=g)
    for t in (1e-3, 0.1, 3.0, 12.0, 80.0):
        t = torch.full((64, 1, 1, 1), t)
        m = sct.posterior_mean(y + t * z, t, [y])
        exact = sct.posterior_mean((y + t * z).double(), t.double(), [y.double()])
        assert m.isfinite().all() and (m - exact).abs().max() < 2e-3
        close(sct.posterior_mean(y + t * z, t, y.flip(0).split(10)), m, rtol=0, atol=2e-3)
        if t[0] <= 0.1: close(m, y, rtol=0, atol=0)        # x alone, exactly
    far = torch.full((64, 1, 1, 1), 1e6)
    close(sct.posterior_mean(y + far * z, far, [y]), y.mean(0, keepdim=True).expand(64, -1, -1, -1), atol=1e-3, rtol=0)


@pytest.mark.parametrize('cond, flip', [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_all_references_in_chunks_give_the_plain_formula(cond, flip):
    """12,000 images, so that 5000 at once are several chunks, in float64 by the definition; and what any process holds
    of the batch gives the same."""
    n, images = 12_000, torch.randint(0, 256, (12_000, 3, 2, 2), dtype=torch.uint8, generator=generator(1))
    classes = (torch.arange(n) * 7919 % n < 11_000).long() if cond else None
    loss = sct_loss('--refs', 'inf', '--cond', cond, '--flip', flip, '--res', 2, '--mult', 1, data=(images, classes))
    index, t = torch.arange(0, n, 1000), torch.tensor([.3, .5, .7, 1, 1.5, 2, 2.5, 3, 4, 6, 9, 80]).view(-1, 1, 1, 1)
    x, y = images[index].float() / 127.5 - 1, images.double() / 127.5 - 1
    labels = classes[index] if cond else None
    x_t = x + t * torch.randn(12, 3, 2, 2, generator=generator(2))
    m = loss.mean(x, x_t, labels, t, 0)
    if flip: y, classes = torch.cat([y, y.flip(3)]), torch.cat([classes, classes]) if cond else None
    distance = (x_t.double()[:, None] - y).square().sum((2, 3, 4))
    logits = -distance / 2 / t.view(-1, 1).double()**2
    if cond: logits = logits.masked_fill(labels[:, None] != classes, -math.inf)
    close(m, torch.einsum('bn,nchw->bchw', logits.softmax(1), y).float(), rtol=0, atol=1e-5)
    assert (m - x).abs().amax((1, 2, 3))[-1] > 0.1
    part = loss.mean(x[1::2], x_t[1::2], labels[1::2] if cond else None, t[1::2], 0)
    close(part, m[1::2], rtol=0, atol=1e-6)


def sct_loss(*argv, data=None, net=None):
    cfg = config('sct', '--data', 'cifar10', '--init', 'none', '--warmup', 0, '--refs', 0, '--d', 25_000, *argv)
    return sct.Loss(net or toy(), cfg, data)


def seen_by(loss):
    """Makes the loss record what its network is given -> list of (input, time)"""
    seen, net = [], loss.net
    loss.net = lambda x, c, y=None: seen.append((x, c)) or net(x, c, y)
    return seen


def test_sct_target_lies_between_x_t_and_the_mean():
    """The three forms of x_r, for the whole batch as references; r = 0 gives the mean itself, r = t gives x_t."""
    loss = sct_loss()
    x, z = torch.randn(2, 5, 3, 4, 4).double()
    t = torch.tensor([0.1, 0.5, 1, 2, 9]).double()
    for r in (0.5 * t, t * 0.999, t):
        seen = seen_by(loss := sct_loss())
        loss.pair(x, None, z, t, r, 0)
        x_r = seen[0][0] * (r.view(-1, 1, 1, 1)**2 + 0.25).sqrt()
        x_t = x + t.view(-1, 1, 1, 1) * z
        logits = torch.tensor([[-(a - b).square().sum() / 2 / s**2 for b in x] for a, s in zip(x_t, t)])
        m = torch.einsum('bn,nchw->bchw', logits.softmax(1), x)
        ratio = (r / t).view(-1, 1, 1, 1)
        close(x_r, ratio * x_t + (1 - ratio) * m, rtol=1e-10, atol=1e-10)
        close(x_r, x_t + (r - t).view(-1, 1, 1, 1) * (x_t - m) / t.view(-1, 1, 1, 1), rtol=1e-9, atol=1e-9)
    value = loss.pair(x, None, z, t, torch.zeros(5).double(), 0)
    expected = torch.linalg.vector_norm(sct.f(toy(), x_t, t) - m, dim=(1, 2, 3)) / t
    close(value, expected, rtol=1e-10, atol=0)
    assert (m - x).abs().amax((1, 2, 3))[-1] > 0.5          # not the sample itself


def test_sct_gradient_reaches_the_student_at_t_only():
    net = Toy(0.7, 1.5, 3).double()
    x, z = torch.randn(2, 4, 3, 4, 4).double()
    t, r = torch.tensor([0.3, 1, 2, 6]).double(), torch.tensor([0, 0.5, 1.9, 3]).double()
    sct_loss(net=net).pair(x, None, z, t, r, 0).sum().backward()
    got, net.a.grad = net.a.grad.clone(), None
    tb, rb = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
    m = sct.posterior_mean(x + tb * z, tb, [x])
    x_r = m + rb * (x + tb * z - m) / tb
    target = torch.where(rb > 0, sct.f(net, x_r, r.clamp(min=1e-9)), x_r).detach()
    (torch.linalg.vector_norm(sct.f(net, x + tb * z, t) - target, dim=(1, 2, 3)) / (t - r)).sum().backward()
    close(got, net.a.grad, rtol=1e-8, atol=0)


def test_sct_with_one_reference_is_ect_bit_for_bit(data, tmp_path):
    flags = ['--data', data, *TINY, *PHASES['ect'], '--steps', 14, '--d', 3, '--dropout', 0.2]
    a = go('ect', *flags, '--out', tmp_path / 'ect')
    b = go('sct', *flags, '--out', tmp_path / 'sct', '--refs', 1)
    assert_same(a['ema'], b['ema'], rtol=0, atol=0)
    c = go('sct', *flags, '--out', tmp_path / 'sct0')
    assert any((a['ema'][k] != c['ema'][k]).any() for k in a['ema'])


def test_sct_schedule_is_ects_where_a_stage_begins():
    u = torch.linspace(0.01, 0.99, 99)
    smooth, staged = sct_loss('--smooth', 1), sct_loss()
    e = ect.Loss(toy(), config('ect', '--data', 'cifar10', '--d', 25_000), None)
    for a in range(8):
        step = a * 25_000
        close(smooth.levels(u, step)[1], e.levels(u, step)[1], rtol=1e-12, atol=0)
        half, before, after = (smooth.levels(u, step + s)[1] for s in (12_500, 12_499, 12_501))
        assert (before <= half).all() and (half <= after).all() and (half > e.levels(u, step)[1]).any()
        close(staged.levels(u, step + 24_999)[1], e.levels(u, step)[1], rtol=0, atol=0)
        t = torch.exp(torch.special.ndtri(u.double()) * 2 - 1.1)
        r = (t - t * (1 + 8 / (1 + t.exp())) * 2**-(a + 1.5)).clamp(min=0)
        close(half, r, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('cond, flip, refs', [
    (0, 0, 0), (0, 0, 12), (0, 1, 30), (0, 0, 99), (0, 1, 'inf'), (1, 0, 9), (1, 1, 99), (1, 1, 'inf'), (1, 0, 0)])
def test_reference_set_holds_the_batch_once_and_others_of_its_classes(cond, flip, refs):
    images = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8, generator=generator(1))
    labels = torch.arange(40) % 4
    argv = ['--batch', 8, '--refs', refs, '--flip', flip, '--cond', cond, '--res', 4, '--micro', 3]
    loss = sct_loss(*argv, data=(images, labels))

    def bytes_of(c, step):
        y = torch.cat([*loss.references(c, step, 'cpu')])
        return [a.numpy().tobytes() for a in ((y + 1) * 127.5).round().to(torch.uint8)]
    for step in (3, 4):
        index, _, flips = sct.draw(loss.cfg, 40, 8, step)
        for c in labels[index].unique().tolist() if cond else [0]:
            mine = [(i, f) for i, f in zip(index, flips) if not cond or labels[i] == c]
            own = [(images[i].flip(2) if f else images[i]).numpy().tobytes() for i, f in mine]
            got, members = bytes_of(c, step), (10 if cond else 40) * (1 + flip)
            assert got == bytes_of(c, step)
            if not refs: assert got == own; continue
            assert len(set(got)) == len(got) == min(float(refs), members) and set(own) <= set(got)
    assert refs == 'inf' or set(bytes_of(0, 5)) != set(bytes_of(0, 4)) or refs == 99


def test_every_image_of_a_reference_set_is_equally_likely_to_be_the_sample():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 1, 1)
    loss = sct_loss('--batch', 2, '--refs', 3, '--res', 1, '--mult', '1', data=(images, None))
    count = {}
    for step in range(6000):
        index = sct.draw(loss.cfg, 5, 2, step)[0]
        y, = loss.references(0, step, 'cpu')
        key = tuple(sorted(((y[:, 0, 0, 0] + 1) * 127.5).round().tolist()))
        count.setdefault(key, [0, 0, 0])[key.index(index[0].item())] += 1
    assert len(count) == 10
    assert min(stats.chisquare(v).pvalue for v in count.values()) > 1e-3


@pytest.mark.parametrize('refs', [0, 9, 'inf'])
def test_reference_set_does_not_depend_on_processes_or_micro_batches(refs, data, tmp_path):
    flags = ['--data', data, *TINY, *PHASES['sct'], *f'--steps 10 --cond 1 --flip 1 --refs {refs} --device cpu'.split()]
    whole = go('sct', *flags, '--out', tmp_path / 'a')
    parts = go('sct', *flags, '--out', tmp_path / 'b', '--micro', 3)
    assert_same(whole['ema'], parts['ema'], rtol=1e-3, atol=2e-6)
    assert run('sct', *flags, '--out', tmp_path / 'c', '--gpus', 2).returncode == 0
    two = torch.load(tmp_path / 'c' / 'latest.pt', weights_only=True)
    assert_same(whole['ema'], two['ema'], rtol=1e-3, atol=2e-6)


def test_sct_target_varies_less_the_more_references():
    """The variance over x of the target point x_r given x_t, on glyphs at t = 4: 600 of them are the data, so that the
    posterior is known. ECT : SCT with 32 : with all."""
    images = sct.glyphs(16, 600)[0].double() / 127.5 - 1
    g = generator(0)
    t, variance = scalars(4.0), {}
    for refs in (1, 32, 600):
        errors = []
        for trial in range(60):
            order = torch.randperm(600, generator=generator(trial))[:32]
            x_t = images[order[:1]] + 4 * torch.randn(1, 3, 16, 16, generator=generator(trial)).double()
            m = sct.posterior_mean(x_t, t, [images[order[:refs]] if refs < 600 else images])
            errors.append((m - sct.posterior_mean(x_t, t, [images])).square().sum().item())
        variance[refs] = np.mean(errors)
    print('mean squared distance of the target from its conditional mean:', variance)
    assert variance[600] < 1e-12 < variance[32] < 0.8 * variance[1]


def test_phases_keep_r_and_the_target_within_the_segment():
    loss = sct_loss('--edges', '0.5,2,6', '--refs', 1)
    u = torch.linspace(0.001, 0.999, 999)
    t, r = loss.levels(u, 0)
    edges = np.array([0, 0.5, 2, 6])
    lower = torch.from_numpy(edges[np.searchsorted(edges, t.numpy()) - 1])
    assert (r >= lower).all() and (r < t).all() and (r == lower).any() and (r > lower).any()
    plain = sct_loss('--refs', 1).levels(u, 0)[1]
    assert torch.equal(r, torch.maximum(plain, lower))
    assert loss.edge(torch.tensor([0.5, 0.500001, 2.0, 80.0]).double()).tolist() == [0, 0.5, 0.5, 6]
    x, s = torch.randn(3, 3, 4, 4).double(), scalars(0.5, 2, 6)
    close(sct.f(toy(), x, s, None, s), x, rtol=1e-12, atol=1e-12)         # f(x, s, s) = x
    close(sct.f(toy(), x, s + 1, None, 0 * s), sct.f(toy(), x, s + 1))     # one segment: CM
    z, t = torch.randn(3, 3, 4, 4).double(), torch.tensor([0.3, 1.0, 4.0]).double()
    s, tb = loss.edge(t), t.view(-1, 1, 1, 1)
    target = x + s.view(-1, 1, 1, 1) * z                    # at the edge: the point x_r itself
    line = (s / t).view(-1, 1, 1, 1)
    out = line * (x + tb * z) + (1 - line) * sct.f(toy(), x + tb * z, t)
    expected = torch.linalg.vector_norm(out - target, dim=(1, 2, 3)) / (t - s)
    close(loss.pair(x, None, z, t, s, 0), expected, rtol=1e-10, atol=0)


def test_edge_skipping_sampler_is_its_formula():
    z, edges, eta = torch.randn(2, 3, 4, 4).double(), [0.5, 2.0], 0.8
    x, t = 20 * z, 20.0
    for s in (2.0, 0.5, 0.0):
        h = sct.f(toy(), x, torch.full((2,), t), None, torch.full((2, 1, 1, 1), s).double())    # to the edge
        x, t = x + (eta * s - t) / (s - t) * (h - x), eta * s                                   # and past it
    close(sct.sample(toy(), z, [20.0], edges=edges, eta=eta), x, rtol=1e-6, atol=1e-6)         # times are float32
    close(sct.sample(toy(), z, [20.0], edges=[*edges, 20.0, 80.0], eta=eta), x, rtol=1e-6, atol=1e-6)
    a = torch.randn(1, 3, 4, 4).double()

    def point_mass(x, c, y=None):           # the raw network whose denoiser is a everywhere
        t = torch.exp(4 * c).view(-1, 1, 1, 1)
        return (a - 0.25 / (t**2 + 0.25).sqrt() * x) * (t**2 + 0.25).sqrt() / (0.5 * t)
    for edges, eta in (([], 1.0), ([1.0], 1.0), ([0.3, 1.0, 5.0], 0.7)):
        close(sct.sample(point_mass, z, [20.0], edges=edges, eta=eta), a.expand(2, -1, -1, -1), rtol=1e-5, atol=1e-5)


def test_guidance_mixes_the_two_predictions():
    x, t = torch.randn(3, 3, 4, 4).double(), torch.tensor([0.2, 1, 30]).double()
    strong, weak = toy(0.7), toy(0.2, 0.5, 2)
    for w in (0.0, 1.0, 1.7):
        mixed = sct.f(sct.Guided(strong, weak, w), x, t)
        low, high = sct.f(weak, x, t), sct.f(strong, x, t)
        close(mixed, low + w * (high - low), rtol=1e-12, atol=1e-12)
    c = t.log() / 4
    assert torch.equal(sct.Guided(strong, weak, 1.0)(x, c), strong(x, c))
    assert torch.equal(sct.Guided(strong, strong, 3.0)(x, c), strong(x, c))


def test_weak_model_is_the_average_half_way_and_guides_samples(data, tmp_path, capfd):
    flags = ['--data', data, *TINY, *PHASES['sct'], '--refs', 8, '--anneal', 0]
    saved = go('sct', *flags, '--steps', 14, '--out', tmp_path / 'a')
    half = go('sct', *flags, '--steps', 9, '--out', tmp_path / 'b')          # warm-up 4, then half of 10
    assert_same({k[5:]: v for k, v in saved['loss'].items() if k[:5] == 'weak.'}, half['ema'], rtol=0, atol=0)
    images = {}
    for w in (1, 1.5):
        go('sct', '--out', tmp_path / 'a', '--sample', 6, '--guidance', w)
        images[w] = np.load(tmp_path / 'a' / 'samples.npz')['arr_0'].astype(int)
    assert (images[1] != images[1.5]).any()
    go('sct', *flags, '--steps', 5, '--weak', 0, '--out', tmp_path / 'c')
    capfd.readouterr()
    guided, fresh = ['--sample', 4, '--guidance', 2], ['--data', data, *TINY, '--out', tmp_path / 'd']
    assert 'has no weak model yet' in fails(capfd, 2, 'sct', '--out', tmp_path / 'c', *guided)
    assert 'has no weak model yet' in fails(capfd, 2, 'sct', '--out', tmp_path / 'a', *guided, '--steps', 99)
    assert '--refs 5.0: 0, 1, or at least the batch' in fails(capfd, 2, 'sct', *fresh, '--refs', 5)
    for edges, message in (('2,1', 'must be positive and rise'), ('0,1', 'cannot be 0.0'), ('-1,2', 'cannot be -1.0')):
        assert message in fails(capfd, 2, 'sct', *fresh, f'--edges={edges}')


def test_phased_run_samples_in_as_many_steps_as_segments(data, tmp_path, monkeypatch):
    go('sct', '--data', data, *TINY, *PHASES['sct'], '--steps', 8, '--edges', '0.5,2', '--ts', 20, '--out', tmp_path)
    levels, f = [], sct.f
    monkeypatch.setattr(sct, 'f', lambda net, x, t, *a, **kw: levels.append(round(t[0].item(), 6)) or f(net, x, t))
    sct.main(['--out', str(tmp_path), '--sample', '4', '--eta', '0.9'])
    assert levels == [20, 1.8, 0.45]


# ---------------------------------------------------------------------------------------------------------- scm

class EDMToy(nn.Module):
    """A raw network of EDM's kind; `edm` tells scm.py to give it EDM's time and to turn its sign"""
    edm = True

    def forward(self, x, c, labels=None): return 0.7 * torch.tanh(1.5 * x) + 0.1 * torch.sin(3 * c).view(-1, 1, 1, 1)


def scm_loss(net, *argv, step=None):
    cfg = config('scm', '--warmup', 10, '--H', 100, '--dropout', 0, *argv)
    return scm.Loss(net, cfg, None).double()


def scm_inputs(n=4, side=8):
    x, z = torch.randn(2, n, 3, side, side, dtype=torch.float64) * torch.tensor([0.5, 1]).view(2, 1, 1, 1, 1).double()
    return x, z, torch.linspace(0.05, 1.54, n).double()


def on_path(x, z, t):
    cos, sin = t.cos().view(-1, 1, 1, 1), t.sin().view(-1, 1, 1, 1)
    return cos * x + sin * 0.5 * z, cos * 0.5 * z - sin * x, cos, sin


def test_trigflow_ends_variance_and_edms_map():
    x, z, t = scm_inputs()
    assert torch.equal(scm.f(toy(), x, torch.zeros(4)), x)
    close(scm.f(toy(), x, torch.full((4,), math.pi / 2)), -0.5 * toy()(2 * x, None), rtol=1e-6, atol=1e-6)
    x_t = on_path(0.5 * torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64), t)[0]
    assert (x_t.flatten(1).std(1) * 2 - 1).abs().max() < 0.03
    net, sigma = EDMToy(), 0.5 * t.tan()
    close(scm.f(net, t.cos().view(-1, 1, 1, 1) * x, t), ect.f(net, x, sigma), rtol=1e-10, atol=1e-10)
    close(scm.f(net, x, t.view(-1, 1, 1, 1)), scm.f(net, x, t), rtol=0, atol=0)


@pytest.mark.parametrize('arch', scm.CHOICES['arch'])
def test_tangent_is_the_derivative_of_f_along_the_trajectory(arch):
    """Against central differences of f(x_t, t), against torch's own forward mode with the paper's tangent, and against
    the discrete-time difference, whose error is of the order of the step."""
    net, (x, z, t) = random_net('scm', '--arch', arch, '--cond', 1, '--classes', 3), scm_inputs()
    loss, y = scm_loss(net), torch.tensor([0, 1, 2, 0])
    out, g = loss.tangent(x, y, z, t, 110)
    x_t, dx, cos, sin = on_path(x, z, t)
    close(out, scm.F(net, x_t, t, y), rtol=1e-12, atol=1e-12)
    h = 1e-5
    ahead, behind = (scm.f(net, on_path(x, z, t + s)[0], t + s, y) for s in (h, -h))
    close(g / cos, (ahead - behind) / 2 / h, rtol=1e-5, atol=3e-6)
    tangents = cos * sin * dx, (cos * sin * 0.5).flatten()
    _, J = torch.func.jvp(lambda v, s: scm.F(net, 0.5 * v, s, y), (x_t / 0.5, t), tangents)
    for step, r in ((10, 0), (60, 0.5), (110, 1), (500, 1)):
        expected = -cos**2 * (0.5 * out - dx) - r * (cos * sin * x_t + J)
        close(loss.tangent(x, y, z, t, step)[1], expected, rtol=1e-9, atol=1e-9)
    errors = []
    for h in (1e-3, 1e-4):
        back = math.cos(h) * x_t - math.sin(h) * dx         # DDIM, exact for one pair (x, z)
        close(back, on_path(x, z, t - h)[0], rtol=1e-9, atol=1e-9)
        errors.append(((scm.f(net, x_t, t, y) - scm.f(net, back, t - h, y)) / math.sin(h) - g / cos).abs().max().item())
    assert 7 < errors[0] / errors[1] < 13


def test_forward_mode_is_torchs_own_in_float32_and_with_dropout():
    for arch in scm.CHOICES['arch']:
        net = random_net('scm', '--arch', arch, '--head_dim', 8).float()
        x, z, t = (v.float() for v in scm_inputs())
        out, g = scm_loss(net).float().tangent(x, None, z, t.double(), 110)
        x_t, dx, cos, sin = on_path(x, z, t)
        value, J = torch.func.jvp(lambda v, s: net(2 * v, s) if 'scm' in arch else scm.F(net, v, s), (x_t, t),
                                  (0.5 * cos * sin * dx, (0.5 * cos * sin).flatten()))
        close(out, value, rtol=1e-4, atol=1e-4)
        close(g, -cos**2 * (0.5 * value - dx) - cos * sin * x_t - J, rtol=1e-3, atol=1e-3 * J.abs().max().item())
    net = random_net('scm', '--dropout', 0.5).train()
    x, z, t = scm_inputs()
    loss = scm_loss(net, '--dropout', 0.5)
    torch.manual_seed(3)
    _, g = loss.tangent(x, None, z, t, 110)
    ends = []
    for s in (1e-5, -1e-5):
        torch.manual_seed(3)
        ends.append(scm.f(net, on_path(x, z, t + s)[0], t + s))
    close(g / on_path(x, z, t)[2], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=3e-6)


def test_the_tangent_leaves_compiled_code_alone():
    """torch.compile cannot take forward mode: torch 2.11 raised an error on a GPU, 2.14 gives up late."""
    net, (x, z, t), graphs = random_net('scm'), scm_inputs(), []
    net.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    net(x, t)
    frames = dict(torch._dynamo.utils.counters['frames'])
    _, g = scm_loss(net).tangent(x, None, z, t, 110)
    assert len(graphs) == 1 and torch._dynamo.utils.counters['frames'] == frames
    close(g, scm_loss(random_net('scm')).tangent(x, None, z, t, 110)[1])


def test_half_precision_would_spoil_the_tangent():
    """The median relative error of g against float64, by precision of the network: why --amp leaves it alone."""
    net, (x, z, t), error = random_net('scm'), scm_inputs(64), {}
    exact = scm_loss(net).tangent(x, None, z, t, 110)[1]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        low = random_net('scm').to(dtype)
        loss = scm_loss(lambda x, t, y=None: low(x.to(dtype), t.to(dtype)).double())
        difference = loss.tangent(x, None, z, t, 110)[1] - exact
        error[dtype] = (difference.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).median().item()
    print('error of g:', error)
    single, half, brain = error.values()
    assert single < 1e-5 and half < 0.3 * brain and brain > 1e-3


def test_gradient_is_that_of_the_consistency_objective():
    """grad of |F - F_- - g|^2 / 2 is grad of w f . df/dt with w = 1 / (sigma_d tan t), so nothing need be divided by
    sigma_d tan t again; before the tangent warm-up it is that of cos(t)^2 / (2 sigma_d) |sigma_d F - dx/dt|^2."""
    net, (x, z, t) = random_net('scm'), scm_inputs()
    loss, weights = scm_loss(net), list(net.parameters())
    x_t, dx, cos, sin = on_path(x, z, t)
    for step in (10, 110):
        out, g = loss.tangent(x, None, z, t, step)
        got = torch.autograd.grad(((out - out.detach() - g)**2).sum() / 2, weights)
        if step == 10: other = (cos**2 * (0.5 * scm.F(net, x_t, t) - dx)**2).sum() / (2 * 0.5)
        else: other = (scm.f(net, x_t, t) * (g / cos) / (0.5 * t.tan().view(-1, 1, 1, 1))).sum()
        for a, b in zip(got, torch.autograd.grad(other, weights)): close(a, b, rtol=1e-7, atol=1e-8)


def test_scm_loss_by_hand_with_every_bound_and_its_weight():
    x, z, t = scm_inputs()
    u = torch.special.ndtr(((0.5 * t.tan()).log() + 1) / 1.4)
    for how in ('l2', 'rms', 'clip'):
        loss = scm_loss(toy(), '--data', 'cifar10', '--tangent', how, '--warmup', 10, '--H', 100)
        loss.w.weight.data = torch.randn(1, 128).double() * 0.1
        loss.w.bias.data += 0.7
        close(loss.levels(u, 10), t, rtol=1e-9, atol=0)
        _, g = loss.tangent(x, None, z, t, 60)
        size = g.flatten(1).norm(dim=1)
        bounded = {'l2': g / (size.view(-1, 1, 1, 1) + 0.1), 'rms': g / (size.view(-1, 1, 1, 1) / 192**0.5 + 0.1),
                   'clip': g.clip(-1, 1)}[how]
        if how == 'l2': assert (bounded.flatten(1).norm(dim=1) < 1).all()
        angles = [[s * 10000**(-i / 63) for i in range(64)] for s in t.tolist()]
        features = torch.tensor([[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles])
        w = (loss.w.weight @ features.double().T + loss.w.bias).flatten()
        value = loss(x, None, u, z, 60)
        close(value, w.exp() * bounded.flatten(1).square().mean(1) - w, rtol=1e-6, atol=1e-6)
    loss = scm_loss(toy(), '--data', 'cifar10', '--adaptive', 0)
    loss.w.bias.data += 0.7
    g = loss.tangent(x, None, z, t, 110)[1]
    bounded = g / (g.flatten(1).norm(dim=1) + .1).view(-1, 1, 1, 1)
    close(loss(x, None, u, z, 110), bounded.square().mean((1, 2, 3)), rtol=1e-9, atol=0)


def test_scm_moves_f_against_its_drift():
    """The gradient of the loss is -2 exp(w) / D of bounded g . dF."""
    net, (x, z, t) = Toy(0.7, 1.5, 3).double(), scm_inputs()
    loss, u = scm_loss(net, '--data', 'cifar10'), torch.special.ndtr(((0.5 * t.tan()).log() + 1) / 1.4)
    loss.w.bias.data += 0.7
    loss(x, None, u, z, 110).sum().backward()
    out, g = loss.tangent(x, None, z, t, 110)
    g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 0.1)
    expected, = torch.autograd.grad(-2 * math.exp(0.7) / 192 * (g * out).sum(), net.a)
    close(net.a.grad, expected, rtol=1e-6, atol=0)
    assert expected.abs() > 1e-4


def test_adaptive_weight_is_at_rest_where_weight_times_error_is_one():
    x, z, t = scm_inputs(1)
    loss = scm_loss(toy(), '--data', 'cifar10')
    u = torch.special.ndtr(((0.5 * t.tan()).log() + 1) / 1.4)
    g = loss.tangent(x, None, z, t, 110)[1]
    loss.w.bias.data = -((g / (g.norm() + 0.1)).square().mean()).log().view(1)
    loss(x, None, u, z, 110).sum().backward()
    assert loss.w.bias.grad.abs() < 1e-12


def test_tangent_vanishes_where_theory_says():
    """A point mass, whose consistency function is constant; Gaussian data, whose diffusion model is F = 0 and whose
    consistency function is the identity. A zero tangent makes no NaN."""
    x, z, t = scm_inputs()
    a = x[:1].expand(4, -1, -1, -1)
    point = lambda v, s, y=None: (s.cos().view(-1, 1, 1, 1) * 0.5 * v - a) / (0.5 * s.sin().view(-1, 1, 1, 1))
    close(scm.f(point, x, t), a, rtol=1e-9, atol=1e-9)
    assert scm_loss(point).tangent(a, None, z, t, 110)[1].abs().max() < 1e-9
    distils = scm_loss(point, '--scd', 1)
    assert distils.tangent(a, None, z, t, 110)[1].abs().max() < 1e-9
    gauss = lambda v, s, y=None: -v * (s / 2).tan().view(-1, 1, 1, 1)
    close(scm.f(gauss, x, t), x, rtol=1e-9, atol=1e-9)
    loss = scm_loss(gauss, '--scd', 1)
    loss.teacher = zero = lambda v, s, y=None: torch.zeros_like(v)
    assert loss.tangent(x, None, z, t, 110)[1].abs().max() < 1e-12
    value = loss(x, None, torch.rand(4), z, 110)
    assert value.isfinite().all() and value.abs().max() < 1e-12
    loss.net = zero
    x_t, _, cos, sin = on_path(x, z, t)
    close(loss.tangent(x, None, z, t, 110)[1], -cos * sin * x_t, rtol=1e-9, atol=1e-12)


def test_sct_tangent_has_the_sd_tangent_as_its_mean():
    """Two points +-A: the velocity's mean given x_t is the diffusion optimum's, so the mean of g is the distilled g."""
    A, net = 0.4, random_net('scm')
    t, x_t = torch.tensor([0.5, 1.2]).double(), 0.3 * torch.randn(2, 3, 8, 8).double()
    cos, sin = t.cos().view(-1, 1, 1, 1), t.sin().view(-1, 1, 1, 1)
    x_t = x_t.mean((1, 2, 3), keepdim=True).expand(2, 3, 8, 8) + 0 * x_t        # both points are constant images
    logit = (A * cos * x_t / (0.25 * sin**2)).sum((1, 2, 3), keepdim=True)
    mean, plus = A * torch.tanh(logit).expand_as(x_t), torch.sigmoid(2 * logit)
    noise_of = lambda s: (x_t - cos * s) / (0.5 * sin)
    g = {s: scm_loss(net).tangent(torch.full_like(x_t, s), None, noise_of(s), t, 110)[1] for s in (A, -A)}
    loss = scm_loss(toy(), '--scd', 1)
    loss.net, noise = net, (x_t - cos * mean) / sin
    loss.teacher = lambda v, s, y=None: (cos * noise - sin * mean) / 0.5
    got = loss.tangent(torch.full_like(x_t, A), None, noise_of(A), t, 110)[1]
    close(plus * g[A] + (1 - plus) * g[-A], got, rtol=1e-8, atol=1e-9)
    assert (g[A] - g[-A]).abs().max() > 0.1


def test_times_are_lognormal_and_the_sampler_is_trigflows():
    loss, u = scm_loss(toy(), '--data', 'cifar10'), torch.linspace(0.001, 0.999, 999)
    for step, law in ((0, stats.norm(-1.2, 1.2)), (10, stats.norm(-1.0, 1.4))):
        t = loss.levels(u, step)
        assert (t > 0).all() and (t < math.pi / 2).all() and t.dtype == torch.float64
        np.testing.assert_allclose(law.cdf((0.5 * t.tan()).log()), u, atol=1e-6)
    ts = scm.CONFIG['ts'][1]
    assert abs(ts[0] - math.atan(80 / 0.5)) < 1e-7 and ts[1] == 1.1
    z, n = torch.randn(2, 2, 3, 8, 8).double()
    x = scm.f(toy(), 0.5 * z, torch.full((2,), ts[0]))
    close(scm.sample(toy(), z, ts[:1]), x)
    two = scm.f(toy(), math.cos(1.1) * x + math.sin(1.1) * 0.5 * n, torch.full((2,), 1.1))
    close(scm.sample(toy(), z, ts, noise=[n]), two)


def test_heun_in_trigflow_is_edms_sampler():
    net, z, n = EDMToy(), torch.randn(3, 3, 4, 4).double(), 18
    got = scm.heun(net, z, math.atan(160), n)
    sigmas = [(80**(1 / 7) + i / (n - 1) * (0.002**(1 / 7) - 80**(1 / 7)))**7 for i in range(n)] + [0.0]
    x = 0.5 * z / math.cos(math.atan(160))
    slope = lambda x, s: (x - ect.f(net, x, torch.full((3,), s).double())) / s
    for s, r in zip(sigmas, sigmas[1:]):
        d = slope(x, s)
        x, before = x + (r - s) * d, x
        if r: x = before + (r - s) * (d + slope(x, r)) / 2
    close(got, x, rtol=1e-8, atol=1e-8)


def test_double_normalisation_is_its_formula():
    torch.manual_seed(0)
    block = scm.Block(8, 12, config('scm', '--ch', 4), 4).double()
    for p in block.parameters(): p.data = torch.randn_like(p) * 0.4
    x, e = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 16).double()
    h = nn.functional.silu(block.norm0(x))
    h = block.norm1(block.conv0(h))
    s, b = (v / v.pow(2).mean(1, keepdim=True).sqrt() for v in block.affine(e).split(12, 1))
    h = h * s[:, :, None, None] + b[:, :, None, None]
    expected = (block.conv1(nn.functional.silu(h)) + block.skip(x)) * 0.5**0.5
    close(block(x, e), expected, rtol=1e-6, atol=1e-6)
    net = scm.UNet(config('scm', '--data', 'cifar10'))
    assert net.freqs.max() == 1 and not net.edm          # t in radians, slow features
    assert scm.UNet(config('scm', '--data', 'cifar10', '--arch', 'ddpmpp')).edm


def test_stages_of_scm(data, tmp_path):
    """The diffusion model is kept as teacher where the second stage begins, and the weight starts anew; the same run
    samples both models; ect.py's warm-up can be distilled."""
    cfg = config('scm', '--data', 'cifar10')
    loss = scm.Loss(toy(), cfg, None)
    assert loss.phase(0) == ('diffusion', 0, 0.0, 512) and loss.phase(400_000) == ('sct', 400_000, 1e-4, 512)
    assert abs(loss.phase(9766)[2] - 0.5e-3) < 1e-7 and loss.phase(20_000)[2] == 1e-3        # a ramp of 10 M images
    assert abs(loss.averages(None, 5)[0][1] - 0.5**(512 / 5e5)) < 1e-5      # half-life 500,000 images
    deep = scm.Loss(toy(), config('scm', '--data', 'imagenet64'), None)
    first = deep.cfg.warmup
    assert abs(deep.phase(first + 140_000)[2] - 0.5e-4) < 1e-12 and abs(deep.phase(140_000)[2] - 0.5e-2) < 1e-12
    assert abs(deep.phase(first + 1000)[2] - 1e-4 * 2.048e6 / 1e7) < 1e-12 and deep.phase(first)[2] == 0
    assert abs(deep.averages(None, first + 999)[0][1] - (1 - 1 / 1000)**17.97) < 1e-12
    gamma = deep.cfg.ema_gamma_warmup
    assert abs(deep.averages(None, 999)[0][1] - (1 - 1 / 1000)**(gamma + 1)) < 1e-12
    assert abs(((gamma + 1) / (gamma + 2)**2 / (gamma + 3))**0.5 - 0.075) < 1e-4        # relative standard deviation
    u = torch.linspace(0.001, 0.999, 999)
    for step, law in ((0, stats.norm(-0.8, 1.6)), (first, stats.norm(-1.0, 1.6))):
        np.testing.assert_allclose(law.cdf((0.5 * deep.levels(u, step).tan()).log()), u, atol=1e-6)
    for loss, step, kind, beta2, eps in ((loss, 0, 'Adam', 0.999, 1e-8), (loss, 400_000, 'RAdam', 0.99, 1e-8),
                                         (deep, 0, 'Adam', 0.99, 1e-11), (deep, first, 'Adam', 0.99, 1e-11)):
        opt = loss.optimiser([nn.Parameter(torch.zeros(2))], step)
        assert type(opt).__name__ == kind and opt.defaults['betas'] == (0.9, beta2) and opt.defaults['eps'] == eps
    flags = ['--data', data, *TINY, *PHASES['scm'], '--ema', 0.3, '--lr', 0.01]
    warm = go('scm', *flags, '--steps', 4, '--out', tmp_path / 'a')
    both = go('scm', *flags, '--steps', 15, '--out', tmp_path / 'a')
    teacher = {k[8:]: v for k, v in both['loss'].items() if k[:8] == 'teacher.'}
    assert_same(teacher, warm['ema'], rtol=0, atol=0)
    for heun in (0, 3):
        go('scm', '--out', tmp_path / 'a', '--sample', 4, '--heun', heun, '--save', tmp_path / f'{heun}.npz')
    net = scm.UNet(cfg := scm.config(['--out', str(tmp_path / 'a'), '--heun', '3'])).eval()
    net.load_state_dict(teacher)
    expected = scm.generate(cfg, net, torch.arange(4), [1.5458015], torch.device('cpu')).permute(0, 2, 3, 1)
    assert (np.load(tmp_path / '3.npz')['arr_0'] == expected.numpy()).all()
    assert (np.load(tmp_path / '0.npz')['arr_0'] != expected.numpy()).any()
    e = go('ect', '--data', data, *TINY, *PHASES['ect'], '--steps', 4, '--out', tmp_path / 'ect')
    e_file = tmp_path / 'ect' / 'latest.pt'
    scd = go('scm', '--data', data, *TINY, '--teacher', e_file, '--steps', 3, '--out', tmp_path / 'b')
    assert_same({k[8:]: v for k, v in scd['loss'].items() if k[:8] == 'teacher.'}, e['ema'], rtol=0, atol=0)
    assert scd['config']['arch'] == 'ddpmpp'
    argv = list(map(str, ['--init', e_file, '--out', tmp_path / 'c', '--sample', 4, '--heun', 3]))
    scm.main([*argv, '--save', str(tmp_path / 'e.npz')])        # ect.py's diffusion model, whatever stands beside it
    net = scm.new_network(cfg := scm.config(argv)).eval()
    expected = scm.generate(cfg, net, torch.arange(4), [1.5458015], torch.device('cpu')).permute(0, 2, 3, 1)
    assert (np.load(tmp_path / 'e.npz')['arr_0'] == expected.numpy()).all()


def test_dropout_and_weight_of_each_stage():
    net = scm.UNet(config('scm', *TINY, '--res', 8))
    loss = scm.Loss(net, config('scm', *TINY, '--dropout', 0.25, '--dropout_warmup', 0.125, '--warmup', 5), None)
    x, z, u = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.rand(4)
    for step, p in ((0, 0.125), (5, 0.25)):
        loss(x, None, u, z, step).sum().backward()
        assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {p}
    loss.w.weight.data += 1
    loss.begin(net)
    assert loss.w.weight.abs().max() == 0 == loss.w.bias


# -------------------------------------------------------------------------------------------------------- EDM2

EDM2_METHODS = ['ect', 'sct', 'tcm', 'scm']


@needs_golden
@pytest.mark.parametrize('name', EDM2_METHODS)
@pytest.mark.parametrize('which', ['cond', 'uncond', 'defaults'])
def test_edm2_network_and_pickle_reader_agree_with_the_official_code(name, which):
    v, module = golden_of(f'edm2_{which}'), MODULES[name]
    net, y, close_to = module.load_edm(GOLDEN / f'edm2_{which}.pkl').eval(), v.get('labels'), dict(rtol=1e-5, atol=2e-5)
    assert sum(p.numel() for p in net.parameters()) == v['n_params_unet']
    if which == 'defaults':             # what official files leave out
        assert [vars(net.cfg)[k] for k in ('mult', 'blocks', 'attn', 'head_dim')] == [(1, 2, 3, 4), 3, (16, 8), 64]
    close(net(v['c_in_x'], v['c_noise'], y), v['F'], **close_to)
    if name == 'scm': return
    close(module.f(net, v['x'], v['sigma'], y), v['D'], **close_to)
    if y is not None: close(module.f(net, v['x'], v['sigma']), v['D_no_label'], **close_to)
    net.train()                         # no dropout in it; a step begins, first pass, backward pass, second pass
    net.normalise()
    D = module.f(net, v['x'], v['sigma'], y)
    close(D, v['train_D'], **close_to)
    (D - v['x0']).square().mean().backward()
    norms, expected = torch.stack([p.grad.norm() for p in net.parameters()]), v['train_grad_norms'][:-1]    # logvar: 0
    close(norms.double(), expected.double(), rtol=1e-5, atol=1e-8)
    sums = torch.stack([p.double().square().sum() for p in net.parameters()])
    close(sums, v['train_param_sqsum'][:-1].double(), rtol=1e-5, atol=0)
    net.normalise()
    close(module.f(net, v['x'], v['sigma'], y), v['train_D_2nd'], **close_to)


@needs_golden
def test_edm2_blocks_agree_with_the_official_code():
    v = golden_of('edm2_parts')
    for name in EDM2_METHODS:
        m = MODULES[name]
        close(m.unit(0.01 * v['a'], 1), v['pixel_norm'])
        close(m.mp_sum(v['a'], v['b'][:, :6], 0.3), v['mp_sum3'])
        conv, linear = m.MPConv(6, 5, 3, 3), m.MPConv(6, 5)
        conv.weight.data, linear.weight.data = v['conv_w'], v['lin_w']
        close(conv(v['a'], 0.7), v['conv_eval'])
        close(linear(v['a'][:, :, 0, 0], 1.3), v['lin_eval'])
        conv.weight.data = m.unit(conv.weight.data)
        close(conv.weight.data, v['conv_w_after'])
        close(conv(v['a'], 0.7), v['conv_train'])
        for block in ('enc', 'down', 'dec', 'up', 'floor', 'clipped'):
            weights = [w for k, w in v.items() if k.startswith(f'{block}/')]
            x, e, y = (v[f'{block}_{k}'] for k in ('x', 'emb', 'y'))
            heads = int(v[f'{block}_heads'])
            cfg = config(name, '--arch', 'edm2', '--ch', e.shape[1], '--mult', '1', '--dropout', 0,
                         '--head_dim', y.shape[1] // max(heads, 1))
            net = m.MPBlock(x.shape[1], y.shape[1], cfg, 8, block in ('dec', 'up', 'floor'), bool(heads),
                            block if block in ('down', 'up') else None).eval()
            for p, w in zip(net.parameters(), weights, strict=True): p.data = w.view_as(p)
            close(net(x, e), y, rtol=1e-5, atol=1e-5 * y.abs().max().item())


@needs_golden
def test_edm2_drops_out_where_the_official_code_does():
    golden, v = golden_of('edm2_dropout'), golden_of('edm2_cond')
    x, sigma, y = v['x'], v['sigma'], v['labels']
    for name in ('ect', 'sct', 'tcm'):
        donor = MODULES[name].load_edm(GOLDEN / 'edm2_cond.pkl')
        for limit, key in ((math.inf, 'D_all'), (8, 'D_8')):
            net = MODULES[name].UNet(argparse.Namespace(**vars(donor.cfg) | dict(dropout=0.4, dropout_res=limit)))
            net.load_state_dict(donor.state_dict())
            net.normalise()
            torch.manual_seed(7)
            close(MODULES[name].f(net, x, sigma, y), golden[key], rtol=1e-5, atol=2e-5)


def edm2_loss(name, *argv, gain=1.0):
    """Loss on the golden network as a step finds it, ImageNet-64's recipe."""
    m = MODULES[name]
    net = m.load_edm(GOLDEN / 'edm2_cond.pkl')
    loss = m.Loss(net, config(name, '--data', 'imagenet64', '--init', 'none', '--warmup', 0, *argv), None)
    for p in net.parameters(): p.data *= gain if p.ndim == 0 else 1
    net.normalise()
    return loss, net


@needs_golden
def test_ect_on_edm2_agrees_with_the_official_code():
    v = golden_of('ect_edm2')
    for stage in range(4):
        loss, net = edm2_loss('ect')
        t = v['t'].double()
        u = torch.special.ndtr((t.log() + 0.8) / 1.6)
        level, r = loss.levels(u, stage * loss.cfg.d)
        close(level.float(), v['t'], rtol=1e-5, atol=0)
        close(r.float(), v[f's{stage}_r'], rtol=2e-5, atol=1e-6)
        value = loss.pair(v['x0'], v['labels'], v['eps'], t, v[f's{stage}_r'].double(), stage * loss.cfg.d)
        close(value, v[f's{stage}_loss'], rtol=1e-4, atol=0)
        value.mean().backward()
        norms = torch.stack([p.grad.norm() for p in net.parameters()]).double()
        close(norms, v[f's{stage}_grad_norms'].double(), rtol=1e-3, atol=1e-5)
    net = ect.load_edm(GOLDEN / 'edm2_cond.pkl').eval()
    D = ect.f(net, v['x0'] + v['D_t'].view(-1, 1, 1, 1) * v['eps'], v['D_t'], v['labels'])
    close(D, v['D'], rtol=1e-5, atol=2e-5)


@needs_golden
def test_tcm_on_edm2_agrees_with_the_official_code():
    v = golden_of('tcm_edm2')
    for stage in range(6):
        loss, net = edm2_loss('tcm', '--stage1', 100_000)
        t, r = v['stage1_t'], v[f'stage1_s{stage}_r']
        ratio = min(1 - loss.cfg.q**-(stage + 1), loss.cfg.ratio_limit)
        close((t - t * (1 - ratio) * (1 + 8 * torch.sigmoid(-t))).clamp(min=1e-6), r, rtol=1e-9, atol=0)
        value = loss.pair(v['x0'], v['labels'], v['eps'], t, r, stage * loss.cfg.d)
        close(value.double(), v[f'stage1_s{stage}_loss'], rtol=2e-4, atol=0)
        value.mean().backward()
        total = sum(p.grad.double().square().sum() for p in net.parameters()).sqrt()
        close(total, v[f'stage1_s{stage}_grad_norm'], rtol=1e-4, atol=0)
    loss, net = edm2_loss('tcm', '--stage1', 0, gain=0.9)
    loss.teacher = tcm.load_edm(GOLDEN / 'edm2_cond.pkl').requires_grad_(False)
    t = torch.cat([torch.ones(2).double(), v['stage2_t']])
    r = (t - t * (1 - loss.cfg.ratio_limit) * (1 + 8 * torch.sigmoid(-t))).clamp(min=1e-6)
    value = loss.pair(v['x0'], v['labels'], v['eps'], t, r, 10**6)
    close(value[:2].double(), v['stage2_boundary'], rtol=1e-4, atol=0)
    close(value[2:].double(), v['stage2_loss'], rtol=1e-4, atol=0)
    (value[2:].mean() + 0.1 * value[:2].mean()).backward()
    total = sum(p.grad.double().square().sum() for p in net.parameters()).sqrt()
    close(total, v['stage2_grad_norm'], rtol=1e-4, atol=0)


class Persistent:
    """An object of NVIDIA's persistence module, to be written again as it was read."""

    def __init__(self, meta): self.meta = meta

    def __reduce__(self): return sys.modules['torch_utils.persistence']._reconstruct_persistent_obj, (self.meta,)


@pytest.fixture
def persistence(monkeypatch):
    for name in ('torch_utils', 'torch_utils.persistence', 'dnnlib', 'dnnlib.util'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    def _reconstruct_persistent_obj(meta): return Persistent(meta)
    _reconstruct_persistent_obj.__module__ = 'torch_utils.persistence'
    _reconstruct_persistent_obj.__qualname__ = '_reconstruct_persistent_obj'
    sys.modules['torch_utils.persistence']._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules['dnnlib.util'].EasyDict = type('EasyDict', (dict,), dict(__module__='dnnlib.util'))


@needs_golden
def test_snapshots_in_ects_and_tcms_layout_are_read(persistence, tmp_path):
    """ECT writes dict(ema), TCM dict(ema, loss_fn, ...) with the network under another name, both in float32."""
    with open(GOLDEN / 'edm2_cond.pkl', 'rb') as file: official = pickle.load(file)      # ours
    expected = ect.load_edm(GOLDEN / 'edm2_cond.pkl').state_dict()
    ema = official['ema'].meta
    walk = [ema['state']['_modules'][k] for k in ema['state']['_modules']]
    while walk:                         # to float32, in place
        at = walk.pop()
        state = at.meta['state'] if isinstance(at, Persistent) else vars(at)
        for group in ('_parameters', '_buffers'):
            state[group] = {k: w if w is None else w.float() for k, w in state[group].items()}
        walk += state['_modules'].values()
    (tmp_path / 'ect.pkl').write_bytes(pickle.dumps(dict(ema=Persistent(ema))))
    modules = ema['state']['_modules']
    tcms = ema | dict(class_name='ECMPrecond', state=ema['state'] | dict(_modules=dict(model=modules['unet'])))
    (tmp_path / 'tcm.pkl').write_bytes(pickle.dumps(dict(ema=Persistent(tcms), loss_fn=official['loss_fn'],
                                                         augment_pipe=None, dataset_kwargs={})))
    for name, layout in itertools.product(EDM2_METHODS, ('ect', 'tcm')):
        assert_same(MODULES[name].load_edm(tmp_path / f'{layout}.pkl').state_dict(), expected, rtol=0, atol=0)


@needs_golden
@pytest.mark.parametrize('name, which', [(n, 'edm2_cond') for n in EDM2_METHODS] + [('ect', 'edm_ddpmpp_tiny'),
                                                                                   ('ict', 'edm_ncsnpp_tiny')])
def test_a_published_network_is_sampled_without_a_run(name, which, tmp_path, monkeypatch):
    """--init X.pkl --sample: res and classes come from the file, knobs from the nearest column, nothing of a run."""
    monkeypatch.chdir(tmp_path)
    m, pkl = MODULES[name], GOLDEN / f'{which}.pkl'
    argv = ['--init', str(pkl), '--sample', '12', '--nfe', '2', '--seed', '5', '--save', str(tmp_path / 's.npz')]
    m.main(argv)
    found, net = np.load(tmp_path / 's.npz'), m.load_edm(pkl).eval()
    cond = net.cfg.cond
    def normals(i):
        g = generator(m.seed_of(argparse.Namespace(seed=5), 0, i))
        return torch.stack([torch.randn(3, 16, 16, generator=g) for _ in range(2)])
    z, noise = torch.stack([normals(i) for i in range(12)], 1)
    y = torch.arange(12) % 10 if cond else None
    ts = m.CONFIG['ts'][0]
    x = m.sample(net, z, ts, y, [noise]).mul(127.5).add(128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert np.abs(found['arr_0'].astype(int) - x.numpy().astype(int)).max() <= 1        # other batches, other rounding
    assert ('arr_1' in found) == bool(cond) and not Path('runs').exists()


@pytest.mark.parametrize('ch, weights', [(128, 124_710_949), (192, 280_209_381), (256, 497_803_173), (320, 777_492_325),
                                         (384, 1_119_276_837)])
def test_edm2_has_as_many_weights_as_the_papers_sizes(ch, weights):
    for name in ('ect', 'sct', 'tcm', 'scm'):
        arch = ['--arch', 'edm2'] if name == 'scm' else []
        with torch.device('meta'): net = MODULES[name].UNet(config(name, '--data', 'imagenet64', '--ch', ch, *arch))
        assert sum(p.numel() for p in net.parameters()) == weights - 128        # of the uncertainty
    blocks = [b for b in net.modules() if isinstance(b, scm.MPBlock)]
    assert len(blocks) == 36 and sum(bool(b.heads) for b in blocks) == 15
    assert sum(isinstance(b.dropout, nn.Dropout) for b in blocks) == 4 + 4 + 6 + 5


@pytest.mark.parametrize('name, arch', [('ect', 'edm2'), ('sct', 'edm2'), ('tcm', 'edm2'), ('scm', 'edm2'),
                                        ('scm', 'scm-edm2')])
def test_edm2_trains_resumes_and_samples(name, arch, data, tmp_path):
    """Bit for bit after a resume; before each step the rows of each weight are brought to length 1, and the averages
    follow the weights as the optimiser left them."""
    argv = ['--data', data, *TINY, *PHASES[name], '--arch', arch, '--cond', 1, '--dropout', 0.3]
    go(name, *argv, '--steps', 5, '--out', tmp_path / 'a')
    parts = go(name, *argv, '--steps', 10, '--out', tmp_path / 'a')
    whole = go(name, *argv, '--steps', 10, '--out', tmp_path / 'b')
    assert_same(parts['ema'], whole['ema'], rtol=0, atol=0)
    still = [*argv, '--steps', 11, '--lr', 1e-12, *(['--lr_stage1', 1e-12] if name == 'tcm' else [])]
    after = go(name, *still, '--out', tmp_path / 'a')
    for k, w in after['loss'].items():
        if k.startswith('net.') and k.endswith('weight'):
            close(w.square().flatten(1).mean(1).sqrt(), torch.full((len(w),), 1 - 1e-4), rtol=1e-5, atol=0)
    rms = torch.cat([w.square().flatten(1).mean(1).sqrt() for k, w in after['ema'].items() if k.endswith('weight')])
    assert (rms - 1).abs().max() > 1e-3
    go(name, '--out', tmp_path / 'a', '--sample', 4)
    assert np.load(tmp_path / 'a' / 'samples.npz')['arr_0'].shape == (4, 8, 8, 3)


def test_double_normalisation_in_edm2_is_its_formula():
    torch.manual_seed(0)
    cfg = config('scm', '--arch', 'scm-edm2', '--ch', 8, '--mult', '1', '--dropout', 0)
    block = scm.MPBlock(8, 12, cfg, 8, True).double()
    x, e = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 8).double()
    n = lambda v, dim: v / (1e-4 + v.square().mean(dim, keepdim=True).sqrt())
    W = lambda layer: n(layer.weight.flatten(1), 1).view_as(layer.weight) / layer.weight[0].numel()**0.5
    act = lambda v: nn.functional.silu(v) / 0.596
    h = nn.functional.conv2d(act(x), W(block.conv0), padding=1)
    s, b = (e @ W(block.affine).T).split(12, 1)
    h = act(n(h, 1) * n(s, 1)[:, :, None, None] + n(b, 1)[:, :, None, None])
    h = nn.functional.conv2d(h, W(block.conv1), padding=1)
    expected = (0.7 * nn.functional.conv2d(x, W(block.skip)) + 0.3 * h) / 0.58**0.5
    close(block(x, e), expected, rtol=1e-9, atol=1e-9)
    net = scm.UNet(config('scm', '--data', 'imagenet64', '--ch', 8, '--arch', 'scm-edm2'))
    assert not net.edm and not hasattr(net.enc[1], 'gain') and net.freqs.max() == 1 and net.freqs.min() == 1e-4
    t, k = torch.tensor([0.3]), 1e4 ** (-torch.arange(4) / 3)
    expected = torch.cat([(t * k).cos(), (t * k).sin()])[None]
    close((torch.outer(t, net.freqs) + net.phases).cos(), expected, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize('names, argv, weights', [
    ('ect sct tcm', [], 55_732_739), ('ct ict', [], 56_395_523), ('ict', ['--blocks', 8], 97_610_499)])
def test_networks_of_the_papers_have_as_many_weights(names, argv, weights):
    for name in names.split():
        with torch.device('meta'): net = MODULES[name].UNet(config(name, '--data', 'cifar10', *argv))
        assert sum(p.numel() for p in net.parameters()) == weights


def random_net(name, *argv):
    cfg = config(name, *TINY, '--res', 8, *argv)
    net = MODULES[name].UNet(cfg).double().eval()
    g = generator(0)
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3
    return net


@pytest.mark.parametrize('name, arch', [('ect', 'ddpmpp'), ('ict', 'ncsnpp'), ('ect', 'edm2')])
def test_network_has_a_forward_mode_derivative(name, arch):
    fourier = ['--fourier', 1] if arch == 'ncsnpp' else []
    net = random_net(name, '--arch', arch, '--cond', 1, '--classes', 3, '--head_dim', 8, *fourier)
    x, v = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    t, w = torch.rand(2).double(), torch.randn(2).double()
    y = torch.tensor([0, 2])
    _, tangent = torch.func.jvp(lambda x, t: net(x, t, y), (x, t), (v, w))
    h = 1e-5
    close(tangent, (net(x + h * v, t + h * w, y) - net(x - h * v, t - h * w, y)) / 2 / h, rtol=1e-5, atol=1e-6)


def test_labels_matter_only_to_a_conditional_network():
    x, t = torch.randn(2, 3, 8, 8).double(), torch.rand(2).double()
    net = random_net('ect', '--cond', 1, '--classes', 3)
    assert (net(x, t, torch.tensor([0, 0])) - net(x, t, torch.tensor([0, 1])))[1].abs().max() > 1e-3
    net = random_net('ect')
    assert torch.equal(net(x, t), net(x, t, torch.tensor([0, 1])))


@pytest.mark.parametrize('name', ['ect', 'tcm'])
def test_sampler_is_its_formula(name):
    f, net, z, e1, e2 = MODULES[name].f, toy(), *torch.randn(3, 2, 3, 8, 8)
    T = lambda t: torch.full((2,), t)
    x = f(net, 80 * z, T(80.))
    close(MODULES[name].sample(net, z, [80.]), x)
    x = f(net, x + 5 * e1, T(5.))
    x = f(net, x + 0.821 * e2, T(.821))
    close(MODULES[name].sample(net, z, [80., 5., .821], noise=[e1, e2]), x)


# -------------------------------------------------------------------------------------------------------- data

def test_glyphs_are_a_function_of_the_seed_and_show_all_classes():
    images, labels = ect.glyphs(16, 500, 3)
    assert images.shape == (500, 3, 16, 16) and images.dtype == torch.uint8 and labels.bincount().tolist() == [50] * 10
    assert torch.equal(images, ect.glyphs(16, 500, 3)[0]) and not torch.equal(images, ect.glyphs(16, 500, 4)[0])
    contrast = images.float().flatten(1).std(1)
    assert contrast.min() > 10          # no digit in the colour of its ground


def make_data(folder, images, labels):
    """The same images in every format that --data takes."""
    zipped(folder / 'edm.zip', images, labels)
    zipfile.ZipFile(folder / 'edm.zip').extractall(folder / 'tree')
    rows = np.concatenate([labels.astype(np.uint8)[:, None], images.transpose(0, 3, 1, 2).reshape(len(images), -1)], 1)
    with tarfile.open(folder / 'cifar-10-binary.tar.gz', 'w:gz') as tar:
        for k, part in enumerate(np.array_split(rows, 5)):
            info = tarfile.TarInfo(f'cifar-10-batches-bin/data_batch_{k + 1}.bin')
            info.size = part.nbytes
            tar.addfile(info, io.BytesIO(part.tobytes()))
        tar.addfile(tarfile.TarInfo('cifar-10-batches-bin/test_batch.bin'))
    return 'tree', 'edm.zip', 'cifar-10-binary.tar.gz'


def test_every_format_gives_the_same_tensor(tmp_path):
    images, labels = pictures(25, 32), np.arange(25) % 7
    for form in make_data(tmp_path, images, labels):
        cfg = config('ect', '--data', tmp_path / form, '--cond', 1)
        got, got_labels = ect.load_data(cfg)
        assert torch.equal(got, torch.from_numpy(images.transpose(0, 3, 1, 2))), form
        assert got_labels.tolist() == labels.tolist(), form
        assert (cfg.res, cfg.ch, cfg.init) == (32, 128, 'none') and cfg.warmup > 0     # CIFAR-10's column


def test_pictures_of_other_modes_and_sizes(tmp_path, capfd):
    Image.new('L', (8, 8), 77).save(tmp_path / 'a.png')
    Image.new('RGBA', (8, 8), (255, 0, 0, 0)).save(tmp_path / 'b.png')
    images, _ = ect.load_data(config('ect', '--data', tmp_path))
    assert (images[0] == 77).all() and (images[1] == 255).all() and not capfd.readouterr().out
    picture = Image.new('RGB', (20, 10), 'blue')
    picture.paste('red', (0, 0, 3, 10))
    picture.save(tmp_path / 'c.png')
    images, _ = ect.load_data(config('ect', '--data', tmp_path))
    assert images.shape == (3, 3, 8, 8) and images[2, 0].max() < 9 < 200 < images[2, 2].min()      # red is cut off
    assert '1 of 3 pictures cropped and resized to side 8' in capfd.readouterr().out
    assert ect.load_data(config('ect', '--data', tmp_path, '--res', 16))[0].shape == (3, 3, 16, 16)
    (tmp_path / 'c.png').unlink()
    for content, message in ((b'no picture', ''), (deep_rgb(), ': ValueError a RGB picture of 16 bits')):
        (tmp_path / 'd.png').write_bytes(content)
        line = fails(capfd, 2, 'ect', '--data', tmp_path, '--out', tmp_path / 'run')
        assert f'd.png cannot be read{message}' in line
    Image.new('I;16', (8, 8)).save(tmp_path / 'd.png')
    assert 'picture of 16 bits' in fails(capfd, 2, 'ect', '--data', tmp_path, '--out', tmp_path / 'run')
    (tmp_path / 'd.png').unlink()
    if hasattr(os, 'mkfifo'): os.mkfifo(tmp_path / 'd.png')                    # would block who opens it
    assert len(ect.load_data(config('ect', '--data', tmp_path))[0]) == 2
    Image.new('CMYK', (8, 8), (255, 0, 0, 0)).save(tmp_path / 'e.jpg')         # ILSVRC2012 holds some
    assert ect.load_data(config('ect', '--data', tmp_path))[0][2, :, 4, 4].tolist() == [0, 255, 255]


def adm_crop(a, res):
    """ADM's crop of an array (H, W, 3) in numpy: means of 2 x 2, then Pillow's bicubic (a = -1/2, widened when it
    shrinks) as two products with matrices, each result rounded to 8 bits."""
    def byte(x): return np.clip(np.floor(x + 0.5), 0, 255)

    def matrix(n, m):                   # (m, n)
        scale = n / m
        centre, wide = (np.arange(m)[:, None] + 0.5) * scale, max(scale, 1)
        x = np.abs((np.arange(n)[None] + 0.5 - centre) / wide)
        w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        return w / w.sum(1, keepdims=True)

    def box(n):                         # (n // 2, n); the middle of an odd side is on an edge, where rounding decides
        scale, i = n / (n // 2), np.arange(n)
        centre = (np.arange(n // 2)[:, None] + 0.5) * scale
        low, high = ((centre + side * scale / 2 + 0.5).astype(int) for side in (-1, 1))
        x = (i - centre + 0.5) * (1 / scale)
        inside = (x > -0.5) & (x <= 0.5) & (low <= i) & (i < high)
        return inside / inside.sum(1, keepdims=True)
    a = a.astype(float)
    while min(a.shape[:2]) >= 2 * res:
        a = byte(np.einsum('yh,hwc->ywc', box(a.shape[0]), byte(np.einsum('xw,hwc->hxc', box(a.shape[1]), a))))
    h, w = (int(round(side * res / min(a.shape[:2]))) for side in a.shape[:2])
    a = byte(np.einsum('xw,hwc->hxc', matrix(a.shape[1], w), a))
    a = byte(np.einsum('yh,hwc->ywc', matrix(a.shape[0], h), a))
    return a[(h - res) // 2:, (w - res) // 2:][:res, :res]


@pytest.mark.parametrize('size', [(8, 8), (16, 16), (33, 20), (50, 75), (37, 101), (15, 9), (8, 21), (5, 7), (99, 64)])
def test_pictures_are_cropped_as_adm_does(size):
    image = Image.fromarray(pictures(1, 128, size[0])[0]).resize(size, Image.BICUBIC)
    got = np.asarray(ect.crop(image, 8))
    assert got.shape == (8, 8, 3) and np.abs(got - adm_crop(np.asarray(image), 8)).max() <= 1      # fixed-point sums
    if size == (8, 8): assert (got == np.asarray(image)).all()


def test_class_folders_are_labels_and_an_explicit_side_picks_the_column(tmp_path):
    for i, name in enumerate(['n02', 'n01', 'n10']):
        for j in range(i + 1):
            (tmp_path / 'a' / name).mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (100, 80), (50 * i, 0, 0)).save(tmp_path / 'a' / name / f'{j}.JPEG')
    cfg = config('ect', '--data', tmp_path / 'a', '--res', 64)
    images, labels = ect.load_data(cfg)
    assert (cfg.res, cfg.cond, cfg.mult) == (64, 1, ect.CONFIG['mult'][2]) and cfg.init == 'none'
    assert labels.tolist() == [0, 0, 1, 2, 2, 2] and images.shape == (6, 3, 64, 64)
    assert [round(v / 50) for v in images[:, 0, 32, 32].tolist()] == [1, 1, 0, 2, 2, 2]
    assert config('ect', '--data', tmp_path / 'a', '--res', 16).ch == ect.CONFIG['ch'][0]
    (tmp_path / 'a' / 'dataset.json').write_text('{"labels": null}')          # says that there are none
    assert config('ect', '--data', tmp_path / 'a', '--res', 64).cond == 0
    for name in ('n01', 'n10'): shutil.rmtree(tmp_path / 'a' / name)
    (tmp_path / 'a' / 'dataset.json').unlink()
    assert ect.load_data(config('ect', '--data', tmp_path / 'a', '--res', 64))[1] is None


def test_imagenet64_is_cropped_from_class_folders_or_read_from_edm2s_zip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zipped(tmp_path / 'source.zip', pictures(20, 64), np.arange(20) % 5)
    (tmp_path / 'datasets').mkdir()
    (tmp_path / 'source.zip').rename('datasets/img64.zip')
    images, labels = ect.load_data(config('ect', '--data', 'imagenet64'))
    assert images.shape == (20, 3, 64, 64) and labels.tolist() == [i % 5 for i in range(20)]
    for i in range(3):
        (tmp_path / 'train' / str(i)).mkdir(parents=True)
        Image.new('RGB', (150, 99)).save(tmp_path / 'train' / str(i) / 'x.JPEG')
    (tmp_path / 'datasets' / 'imagenet64').symlink_to(tmp_path / 'train')
    images, labels = ect.load_data(config('ect', '--data', 'imagenet64'))
    assert images.shape == (3, 3, 64, 64) and labels.tolist() == [0, 1, 2]


def count_decodes(monkeypatch):
    decode, seen = ect.decode, []
    monkeypatch.setattr(ect, 'decode', lambda *args: seen.append(args) or decode(*args))
    return seen


def test_pictures_are_decoded_once_and_again_when_they_change(tmp_path, monkeypatch):
    seen, path = count_decodes(monkeypatch), zipped(tmp_path / 'a[1].zip', pictures(20), np.arange(20) % 3)
    load = lambda *argv: ect.load_data(config('ect', '--data', path, '--cond', 1, *argv))
    first, labels = load()
    monkeypatch.setattr(ect, 'pictures', None)              # the second start does not open the source
    again, labels_again = load()
    assert torch.equal(first, again) and torch.equal(labels, labels_again) and len(seen) == 1
    monkeypatch.undo()
    seen = count_decodes(monkeypatch)
    assert load('--res', 16)[0].shape[-1] == 16 and load()[0].shape[-1] == 8 and len(seen) == 1
    old = path.stat().st_mtime_ns - 10**12                  # another file, older than what was decoded
    zipped(path, pictures(20, seed=1), np.arange(20) % 4)
    os.utime(path, ns=(old, old))
    other, labels = load()
    assert not torch.equal(first, other) and labels.max() == 3 and len(seen) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a[1].zip', 'a[1].zip.16.decoded', 'a[1].zip.8.decoded']
    path = tmp_path / 'tree'
    zipfile.ZipFile(tmp_path / 'a[1].zip').extractall(path)
    for change in (lambda: None, (path / '00000/img00000000.png').unlink, (path / 'dataset.json').unlink,
                   lambda: Image.new('RGB', (8, 8)).save(path / '00001' / 'new.png')):
        n = len(seen)
        change()
        load()
        load()
        assert len(seen) == n + 1
    assert np.load(tmp_path / 'tree.8.decoded', mmap_mode='r').shape == (20, 3, 8, 8)


def test_a_read_only_folder_leaves_what_is_decoded_in_datasets(tmp_path, monkeypatch):
    zipped(tmp_path / 'a.zip', pictures(20))
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    cfg, seen = config('ect', '--data', '../a.zip'), count_decodes(monkeypatch)
    monkeypatch.setattr(os, 'access', lambda *args: False)
    for _ in range(2): assert len(ect.load_data(cfg)[0]) == 20
    assert len(seen) == 1 and [p.name for p in tmp_path.rglob('*.decoded')] == ['a.zip.8.decoded']
    assert (tmp_path / 'here' / 'datasets' / 'a.zip.8.decoded').exists()


def test_a_damaged_picture_or_file_of_pictures_is_named_and_nothing_is_left(tmp_path, capfd):
    folder = tmp_path / 'a'
    folder.mkdir()
    for i, image in enumerate(pictures(600)): Image.fromarray(image).save(folder / f'{i:03d}.png')
    for name in ('550', '555'): (folder / f'{name}.png').write_bytes((folder / '000.png').read_bytes()[:60])
    assert 'a/550.png cannot be read' in fails(capfd, 2, 'ect', '--data', folder, '--out', tmp_path / 'run')
    (folder / '000.png').write_bytes(b'no picture')
    assert 'a/000.png cannot be read' in fails(capfd, 2, 'ect', '--data', folder, '--out', tmp_path / 'run')
    assert os.listdir(tmp_path) == ['a']
    for name in ('000', '550', '555'): (folder / f'{name}.png').unlink()
    ect.load_data(config('ect', '--data', folder))
    left = (tmp_path / 'a.8.decoded').read_bytes()
    for cut in (0, 50, 5000, -1):
        (tmp_path / 'a.8.decoded').write_bytes(left[:cut])
        line = fails(capfd, 2, 'ect', '--data', folder, '--out', tmp_path / 'run')
        assert 'a.8.decoded cannot be read' in line and line.endswith('delete it'), line
    (tmp_path / 'b').mkdir()
    path = tmp_path / 'b' / make_data(tmp_path / 'b', pictures(25, 32), np.arange(25) % 7)[2]
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:-8] + b'wrong sum'):     # in gzip's last bytes, behind the last member
        path.write_bytes(content)
        assert f'{path.name} cannot be read' in fails(capfd, 2, 'ect', '--data', path, '--out', tmp_path / 'run')


def slow_decoder(tmp_path, name, delay=0.02):
    """A process that loads 300 pictures, slowly -> Popen"""
    code = f"""
import sys, time, ect
crop = ect.crop
ect.crop = lambda *args: time.sleep({delay}) or crop(*args)
images, labels = ect.load_data(ect.config(['--data', {str(name)!r}, '--out', '/nowhere', '--cond', '1']))
print(int(images.long().sum()), labels.sum().item())"""
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(HERE))
    return subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=env)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, getattr(signal, 'SIGKILL', None)])
def test_whoever_is_stopped_while_decoding_leaves_no_half_of_it(number, tmp_path):
    path = zipped(tmp_path / 'a.zip', pictures(600), np.arange(600) % 7)
    job = slow_decoder(tmp_path, path)
    while job.poll() is None and not list(tmp_path.glob('*.part')): time.sleep(0.01)
    time.sleep(0.3)
    job.send_signal(number)
    _, error = job.communicate(timeout=60)
    if number == signal.SIGKILL: assert [p.suffix for p in tmp_path.glob('a.zip.*')] == ['.part']
    else:
        assert job.returncode == 128 + number and error.count('\n') == 1 and 'signal while it decoded' in error, error
        assert os.listdir(tmp_path) == ['a.zip']
    assert len(ect.load_data(config('ect', '--data', path))[0]) == 600


def test_two_machines_decode_the_same_at_once_in_one_folder_or_in_two(tmp_path, monkeypatch):
    images, crop = pictures(600), ect.crop
    for folder in ('a', 'b'): (tmp_path / folder).mkdir()
    zipped(tmp_path / 'a' / 'x.zip', images, np.arange(600) % 7)
    shutil.copy(tmp_path / 'a' / 'x.zip', tmp_path / 'b' / 'x.zip')
    monkeypatch.setattr(ect, 'crop', lambda *args: time.sleep(0.06) or crop(*args))         # begins later, is slower
    for other in ('a', 'b'):
        for old in tmp_path.rglob('*.decoded'): old.unlink()
        job = slow_decoder(tmp_path, tmp_path / 'a' / 'x.zip', 0.015)
        while job.poll() is None and not list(tmp_path.rglob('*.part')): time.sleep(0.01)
        time.sleep(0.5)
        got, _ = ect.load_data(config('ect', '--data', tmp_path / other / 'x.zip'))
        out, error = job.communicate(timeout=60)
        assert out.split() == [str(images.sum(dtype=int)), str(sum(i % 7 for i in range(600)))], error
        assert torch.equal(got, tensor(images))
        left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob('x.zip.*'))
        assert left == [f'{folder}/x.zip.8.decoded' for folder in sorted({'a', other})]


def test_what_another_run_has_mapped_is_not_replaced(tmp_path):
    """A file that another machine maps and that is replaced on a network file system would end that machine's run."""
    path = zipped(tmp_path / 'a.zip', pictures(600), np.arange(600) % 7)
    job = slow_decoder(tmp_path, path, 0.002)
    while job.poll() is None and not list(tmp_path.glob('*.part')): time.sleep(0.01)
    ect.load_data(config('ect', '--data', path))
    before = (tmp_path / 'a.zip.8.decoded').stat().st_ino
    assert job.poll() is None
    job.communicate(timeout=60)
    assert (tmp_path / 'a.zip.8.decoded').stat().st_ino == before and len(os.listdir(tmp_path)) == 2


def test_the_loop_does_not_wait_for_rows_that_take_less_time_than_a_step():
    waits, made, last, steps = [], [], time.time(), range(3, 13)
    for step, row in zip(steps, ect.ahead(lambda step: time.sleep(0.05) or made.append(step) or step, steps)):
        waits.append(time.time() - last)
        assert step == row and made in ([*steps[:step - 2]], [*steps[:step - 1]])      # one ahead at most
        time.sleep(0.15)
        last = time.time()
    assert waits[0] > 0.04 and max(waits[1:]) < 0.03, waits
    with pytest.raises(ZeroDivisionError): list(ect.ahead(lambda step: 1 // (5 - step), steps))
    assert not [t.name for t in threading.enumerate() if 'ThreadPool' in t.name]


# ---------------------------------------------------------------------------------------------------- training

@every_method
def test_the_loss_falls_on_a_fixed_batch(name):
    cfg = config(name, *TINY, *PHASES[name], '--res', 8)
    torch.manual_seed(0)
    loss = MODULES[name].Loss(MODULES[name].UNet(cfg), cfg, None)
    step = getattr(cfg, 'warmup', 0)
    opt = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], 3e-3)
    x, u, z = torch.randn(16, 3, 8, 8) * 0.5, torch.rand(16), torch.randn(16, 3, 8, 8)
    losses = []
    for _ in range(40):
        value = loss(x, None, u, z, step).mean()
        opt.zero_grad(), value.backward(), opt.step()
        losses.append(value.item())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3]), losses


@every_method
def test_no_average_hangs_on_a_graph_that_grows_with_each_step(name, data, tmp_path, monkeypatch):
    module, seen = MODULES[name], []
    averages = module.Loss.averages

    def watched(self, ema, step):
        pairs = averages(self, ema, step)
        seen.extend(p for net, _ in pairs for p in net.parameters())
        return pairs

    monkeypatch.setattr(module.Loss, 'averages', watched)
    go(name, '--data', data, *TINY, *PHASES[name], '--steps', 9, '--out', tmp_path)
    assert len(seen) >= 9 and all(p.is_leaf and p.grad_fn is None for p in seen)


@every_method
def test_a_step_sees_the_images_labels_and_flips_that_were_drawn(name, data, tmp_path, monkeypatch):
    module, seen = MODULES[name], []
    forward = module.Loss.forward
    monkeypatch.setattr(module.Loss, 'forward', lambda self, *args: seen.append(args) or forward(self, *args))
    saved = go(name, '--data', data, *TINY, *PHASES[name], '--steps', 2, '--flip', 1, '--cond', 1, '--out', tmp_path)
    cfg = argparse.Namespace(**saved['config'])
    for x, labels, u, z, step in seen:
        (index, u_drawn, flips), z_drawn = module.draw(cfg, 40, 8, step), module.draw_z(cfg, 8, step, 'cpu')
        images = torch.from_numpy(pictures()[index]).permute(0, 3, 1, 2).float() / 127.5 - 1
        assert torch.equal(x, torch.stack([image.flip(2) if flip else image for image, flip in zip(images, flips)]))
        assert labels.tolist() == (index % 4).tolist() and torch.equal(u, u_drawn) and torch.equal(z, z_drawn)
    assert len(seen) == 2 and 0 < flips.sum() < 8


@every_method
def test_stop_and_resume_is_bitwise_the_same_run(name, data, tmp_path, monkeypatch):
    argv = ['--data', data, *TINY, *PHASES[name], '--dropout', 0.3]
    whole, report = go(name, *argv, '--steps', 9, '--out', tmp_path / 'whole'), MODULES[name].report
    for last in (2, 4, 6):              # the status line of this step is followed by a signal
        def interrupted(cfg, row, left):
            report(cfg, row, left)
            if row['step'] == last: signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(MODULES[name], 'report', interrupted)
        with pytest.raises(SystemExit): go(name, *argv, '--steps', 9, '--out', tmp_path / 'parts')
    monkeypatch.setattr(MODULES[name], 'report', report)
    parts = go(name, *argv, '--steps', 9, '--out', tmp_path / 'parts')
    assert_same(whole['loss'], parts['loss'], rtol=0, atol=0)
    assert_same(whole['ema'], parts['ema'], rtol=0, atol=0)
    assert any((whole['ema'][k] != whole['loss'][f'net.{k}']).any() for k in whole['ema'])


@every_method
def test_processes_and_micro_batches_do_not_change_the_run(name, data, tmp_path):
    """Processes of --gpus for all, of torchrun for one: what starts them has the same text in all."""
    flags = ['--data', data, *TINY, *PHASES[name], '--steps', 8, '--device', 'cpu', '--out']
    one = go(name, *flags, tmp_path / 'one')
    others = [go(name, *flags, tmp_path / 'micro', '--micro', 3)]
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    for before, after in [([], ('--gpus', 2)), (torchrun, ('--micro', 2))][:1 + (name == 'tcm')]:
        out = tmp_path / f'{len(before)}'
        argv = [sys.executable, *before, HERE / f'{name}.py', *flags, out, *after]
        env = os.environ | dict(OMP_NUM_THREADS='1')
        done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
        others.append(torch.load(out / 'latest.pt', weights_only=True))
    for other in others:
        assert_same(one['loss'], other['loss'], rtol=1e-4, atol=1e-6)
        assert other['step'] == 8


@every_method
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='counts threads in Linux')
def test_the_thread_that_fetches_rows_starts_no_threads_of_its_own(name, tmp_path):
    """torch's own gathering would: a second set of OpenMP threads, which made default runs 2.4 times as slow."""
    code = f'''
import os, sys
sys.path.insert(0, {str(HERE)!r})
import {name} as m
report, count = m.report, []
m.report = lambda *args: count.append(len(os.listdir("/proc/self/task")))
for m.ahead in (map, m.ahead): m.main(sys.argv[1:] + ["--out", f"run{{len(count)}}"])
print("threads", count[0], count[-1])
'''
    argv = [*TINY, *PHASES[name], '--batch', 64, '--steps', 6, '--device', 'cpu', '--log_every', 6]
    done = subprocess.run([sys.executable, '-c', code, *map(str, argv)], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env=os.environ | dict(OMP_NUM_THREADS='4'))
    assert done.returncode == 0, done.stderr
    alone, both = map(int, re.search(r'threads (\d+) (\d+)', done.stdout).groups())
    assert both - alone <= 1, (alone, both)


@every_method
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='reads the names of threads from Linux')
def test_no_thread_of_a_process_group_outlives_it(name):
    """torch._dynamo, which optimisers import when first used, would keep the group: an abort at exit, now and then."""
    code = f"""
import os, {name} as m
m.dist.init_process_group('gloo', store=m.dist.HashStore(), rank=0, world_size=1)
layer = m.nn.Linear(2, 2)
step = m.nn.parallel.DistributedDataParallel(layer)
step(m.torch.ones(1, 2)).sum().backward()
m.torch.optim.RAdam(layer.parameters()).step()
threads = lambda: ' '.join(open(f'/proc/self/task/{{t}}/comm').read().strip() for t in os.listdir('/proc/self/task'))
print('gloo' in threads())
del step
m.dist.destroy_process_group()
print('gloo' in threads())"""
    done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.split() == ['True', 'False'], done.stderr


@every_method
def test_mixed_precision_trains_and_its_scaler_is_saved(name, data, tmp_path):
    for amp in ('bf16', 'fp16'):
        saved = go(name, '--data', data, *TINY, *PHASES[name], '--steps', 8, '--amp', amp, '--out', tmp_path / amp)
        assert all(v.isfinite().all() for v in saved['ema'].values())
        assert bool(saved['scaler']) == (amp == 'fp16')
        assert all(v.dtype == torch.float32 for v in saved['ema'].values())
    for amp, run_at, steps in (('fp16', 'fp16', 10), ('off', 'fp16', 12), ('fp16', 'bf16', 10)):        # goes on
        go(name, '--data', data, *TINY, *PHASES[name], '--steps', steps, '--amp', amp, '--out', tmp_path / run_at)


@pytest.mark.parametrize('name, arch', [('ect', 'ddpmpp'), ('tcm', 'ddpmpp'), ('ect', 'edm2')])
def test_half_precision_gradients_are_those_of_float32(name, arch):
    cfg = config(name, *TINY, '--arch', arch, '--warmup', 0, '--res', 8, *(['--stage1', 0] if name == 'tcm' else []))
    loss, u = MODULES[name].Loss(MODULES[name].UNet(cfg), cfg, None), torch.rand(16)
    x, z = torch.randn(2, 16, 3, 8, 8)
    for p in loss.net.parameters(): nn.init.normal_(p, std=0.1)
    grads = {}
    for amp in ('off', 'fp16', 'bf16'):
        cfg.amp = amp
        with MODULES[name].autocast(cfg, torch.device('cpu')): value = loss(x, None, u, z, 0).mean()
        grads[amp] = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(loss.net.parameters()))])
    for amp, error in (('fp16', 0.02), ('bf16', 0.2)):
        assert (grads[amp] - grads['off']).norm() < error * grads['off'].norm()


class RoundedTo10Bits(torch.overrides.TorchFunctionMode):
    """TF32 on any machine: operands of convolutions and products are rounded to 10 bits, sums stay float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def rounded(v):
            if not torch.is_tensor(v) or v.dtype != torch.float32: return v
            return ((v.view(torch.int32) + 0x1000) & ~0x1fff).view(torch.float32)
        if func in (nn.functional.conv2d, nn.functional.linear, torch.einsum, torch.Tensor.matmul):
            args = [rounded(a) for a in args[:2]] + list(args[2:]) if func != torch.einsum else [*map(rounded, args)]
        return func(*args, **kwargs or {})


def rounding_errors(net, images, times=(0.1, 1, 5, 20), stages=(4, 8, 16)):
    """Error of f(x_t) - f(x_r) relative to its own size, against float64 -> {precision: (times, stages)}"""
    x = images / 127.5 - 1
    z, exact, errors = torch.randn(x.shape, generator=generator(1)), {}, {}
    ways = dict(exact=contextlib.nullcontext, off=contextlib.nullcontext, tf32=RoundedTo10Bits,
                fp16=lambda: torch.autocast('cpu', torch.float16), bf16=lambda: torch.autocast('cpu', torch.bfloat16))
    for name, way in ways.items():
        dtype = torch.float64 if name == 'exact' else torch.float32
        net, x, z, table = net.to(dtype), x.to(dtype), z.to(dtype), torch.zeros(len(times), len(stages))
        for (i, t), (j, a) in itertools.product(enumerate(times), enumerate(stages)):
            r = t * (1 - (1 + 8 / (1 + math.exp(t))) / 2**a)
            if r <= 0: continue         # the target is the image
            t_, r_ = (torch.full((len(x),), v, dtype=torch.float64) for v in (t, r))
            with way(), torch.no_grad(): got = ect.f(net, x + t * z, t_) - ect.f(net, x + r * z, r_)
            expected = exact.setdefault((t, a), got)
            table[i, j] = ((got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).median()
        if name != 'exact': errors[name] = table
    return errors


def test_late_stages_need_true_float32(tmp_path):
    """What rounding does to f(x_t) - f(x_r), by precision and stage, on a briefly trained network: half precision and
    TF32 drown late stages in noise, float32 reaches them all. pytest -s prints it."""
    saved = go('ect', *'--steps 80 --warmup 80 --lr_warmup 5e-3 --ch 16 --log_every 50 --out'.split(), tmp_path)
    net = ect.UNet(argparse.Namespace(**saved['config'])).eval()
    net.load_state_dict({k[4:]: v for k, v in saved['loss'].items()})
    errors = rounding_errors(net, ect.glyphs(16, 8)[0].float())
    print({name: [[f'{v:.2g}' for v in row] for row in table.tolist()] for name, table in errors.items()})
    off, tf32, fp16, bf16 = errors.values()
    assert off[:, 1].max() < 2e-3 and off[:, 2].max() < 0.5         # stages 8 and 16
    assert fp16[:, 0].max() < 0.3 and min(fp16[1:, 2].min(), tf32[1:, 2].min()) > 1
    for table in errors.values():       # each stage doubles it
        growth = table[:, 1] / table[:, 0]
        assert 2**3 < growth.min() and growth.max() < 2**5
    assert 0.1 < (tf32 / fp16)[:, 1].min() and (tf32 / fp16)[:, 1].max() < 1.5 and (bf16 / fp16)[:, 1].min() > 3


@every_method
def test_amp_off_means_no_tf32_anywhere(name, monkeypatch, tmp_path):
    """The switches as a process with a GPU sets them, for convolutions and for matrix products, by --amp; the recipe's
    own: the papers' CIFAR-10 runs are float32."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(MODULES[name], 'load_data', lambda cfg: None)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    for amp, tf32 in (('tf32', True), (None, False), ('fp16', True), ('off', False)):
        seen = []
        monkeypatch.setattr(MODULES[name], 'train', lambda *a: seen.append(
            (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)))
        argv = ['--data', 'cifar10', '--init', 'none', *(['--metric', 'l2'] if name == 'ct' else [])]
        MODULES[name].process(0, config(name, *argv, *(['--amp', amp] if amp else [])))
        assert seen == [(tf32, tf32)]
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[0], before[2]
    torch.set_float32_matmul_precision(before[1])
    assert MODULES[name].CONFIG['amp'][1] == 'off'


@every_method
def test_checkpoint_is_plain_data_that_stands_alone(name, data, tmp_path):
    saved = go(name, '--data', data, *TINY, *PHASES[name], '--steps', 8, '--out', tmp_path / 'run')
    module, cfg = MODULES[name], saved['config']
    assert saved['method'] == name and saved['step'] == 8 and cfg['ch'] == 8 and set(module.CONFIG) <= set(cfg)
    net = module.UNet(argparse.Namespace(**cfg))
    net.load_state_dict(saved['ema'])   # no prefixes
    files = {'latest.pt', 'log.csv', 'data.png', *(f'samples-{k:06d}.png' for k in [8])}
    assert files == {path.name for path in (tmp_path / 'run').iterdir()}
    rows = (tmp_path / 'run' / 'log.csv').read_text().splitlines()
    assert rows[0].startswith('step,phase,loss') and len(rows) == 5
    cfg = config(name, '--out', tmp_path / 'run')
    for file, rows in (('samples-000008.png', 10), ('data.png', 5)):
        grid = np.asarray(Image.open(tmp_path / 'run' / file))
        assert grid.shape == (48 * rows, 48 * 20, 3)
        cells = grid[::6, ::6].reshape(rows, 8, 20, 8, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 8, 8)
        if rows == 10:                  # one step above two
            for k in (1, 2):
                drawn = module.generate(cfg, net.eval(), torch.arange(100), cfg.ts[:k], torch.device('cpu'))
                assert np.array_equal(cells[100 * (k - 1):100 * k], drawn)
        else: assert np.array_equal(cells[[0, -1]], pictures()[[0, -1]].transpose(0, 3, 1, 2))


def test_a_status_row_tells_means_since_the_last_and_the_pace(data, tmp_path, monkeypatch):
    told, clock = {1: [], 4: []}, iter(range(10**6))            # every look at the clock takes a second
    monkeypatch.setattr(ect, 'time', argparse.Namespace(time=lambda: next(clock)))
    losses, forward = [], ect.Loss.forward

    def watched(self, *args):
        losses.append(forward(self, *args))
        return losses[-1]
    monkeypatch.setattr(ect.Loss, 'forward', watched)
    for every, rows in told.items():
        monkeypatch.setattr(ect, 'report', lambda cfg, row, left: rows.append(row | dict(left=left)))
        argv = ['--data', data, *TINY, '--warmup', 4, '--steps', 12, '--log_every', every]
        go('ect', *argv, '--out', tmp_path / str(every))
    assert [row['loss'] for row in told[1]] == pytest.approx([loss.mean().item() for loss in losses[:12]], rel=1e-5)
    assert [row['step'] for row in told[4]] == [4, 8, 12]
    for i, row in enumerate(told[4]):
        for column in ('loss', 'grad_norm'):
            assert row[column] == pytest.approx(np.mean([r[column] for r in told[1][4 * i:4 * i + 4]]), rel=1e-5)
        assert row['images_per_second'] == 4 * 8 and row['left'] == (12 - row['step']) * 2 / 4 and row['skipped'] == 0


@every_method
def test_init_from_our_checkpoint_takes_its_shape(name, data, tmp_path):
    before = go(name, '--data', data, *TINY, *PHASES[name], '--steps', 4, '--out', tmp_path / 'a')
    still = ['--steps', 1, '--batch', 4, '--lr', 1e-12, '--ema', 0.9, *(STILL if name == 'tcm' else [])]
    after = go(name, '--data', data, '--init', tmp_path / 'a' / 'latest.pt', *still, '--out', tmp_path / 'b')
    assert after['config']['ch'] == 8 and after['config'].get('warmup', 0) == 0
    assert_same(after['ema'], before['ema'], rtol=0, atol=1e-6)


@needs_golden
@every_method
def test_init_from_an_edm_pickle(name, tmp_path):
    pkl, source = GOLDEN / 'edm_ddpmpp_tiny.pkl', zipped(tmp_path / 'd.zip', pictures(16, 16))
    after = go(name, '--data', source, '--init', pkl, '--steps', 1, '--batch', 4, '--lr', 1e-12,
               *(STILL if name == 'tcm' else []), '--out', tmp_path / 'run')
    assert after['config']['mult'] == (1, 2) and after['config']['ch'] == 32
    assert_same(after['ema'], MODULES[name].load_edm(pkl).state_dict(), rtol=0, atol=1e-6)


@every_method
def test_nan_stops_the_run_and_keeps_the_checkpoint(name, data, tmp_path, capfd):
    argv = ['--data', data, *TINY, *PHASES[name], '--out', tmp_path / 'run']
    go(name, *argv, '--steps', 2)
    before = (tmp_path / 'run' / 'latest.pt').read_bytes()
    capfd.readouterr()
    line = fails(capfd, 1, name, *argv, '--steps', 60, *(['--lr_warmup', 1e30] if name in ('ect', 'tcm') else []),
                 '--lr', 1e30, '--save_every', 1000)
    assert re.search(r'gradients not finite in steps \d+ to \d+', line)
    assert (tmp_path / 'run' / 'latest.pt').read_bytes() == before


@every_method
def test_a_failed_write_leaves_the_old_file(name, tmp_path, capfd):
    path = tmp_path / 'latest.pt'
    path.write_bytes(b'old')

    def full_disk(file):
        file.write(b'half of the new one')
        raise OSError(28, 'No space left on device')
    def as_torch_puts_it(file):
        try: full_disk(file)
        finally: raise RuntimeError('unexpected pos')
    for writer in (full_disk, as_torch_puts_it):
        with pytest.raises(OSError, match='No space left'): MODULES[name].write(path, writer)
    assert path.read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == ['latest.pt']


@pytest.mark.skipif(sys.platform == 'win32', reason='needs limits on the size of files')
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(data, tmp_path):
    """Files may not grow beyond 100 kB."""
    argv = ['--data', data, *TINY, '--warmup', 4, '--out', tmp_path / 'run']
    go('ect', *argv, '--steps', 2)
    before = (tmp_path / 'run' / 'latest.pt').read_bytes()
    code = f"""import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = {['ect.py', *map(str, argv), '--steps', '4']}
runpy.run_path({str(HERE / 'ect.py')!r}, run_name='__main__')"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert '[Errno 27]' in done.stderr and len(before) > 100_000
    assert (tmp_path / 'run' / 'latest.pt').read_bytes() == before
    assert not list((tmp_path / 'run').glob('*.part'))


@pytest.mark.parametrize('gpus', [1, 2])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes(gpus, number, data, tmp_path):
    argv, pipe = ['--data', data, *TINY, '--warmup', 100], subprocess.PIPE
    more = ['--steps', 100_000, '--device', 'cpu', '--gpus', gpus, '--out', tmp_path / 'run']
    job = subprocess.Popen([sys.executable, HERE / 'ect.py', *map(str, [*argv, *more])], stdout=pipe, stderr=pipe,
                           text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    for line in job.stdout:
        if ' 10 ' in line: break
    job.send_signal(number)
    time.sleep(0.02)
    job.send_signal(number)                                     # an impatient second one changes nothing
    _, error = job.communicate(timeout=60)
    assert job.returncode == 128 + number, (job.returncode, error)
    step = torch.load(tmp_path / 'run' / 'latest.pt', weights_only=True)['step']
    assert step >= 10 and f'stopped by a signal and saved at step {step}' in error
    whole = go('ect', *argv, '--steps', step + 2, '--device', 'cpu', '--out', tmp_path / 'whole')
    parts = go('ect', *argv, '--steps', step + 2, '--device', 'cpu', '--out', tmp_path / 'run')
    assert_same(whole['loss'], parts['loss'], rtol=1e-4, atol=1e-6)


def started(name, *argv, patch=''):
    """The script as a process of its own, whose `m` the lines of patch may have changed -> Popen"""
    code = f"""import os, signal, sys, time
sys.path.insert(0, {str(HERE)!r})
import {name} as m
{patch}
if __name__ == '__main__': m.main(sys.argv[1:])"""
    file = Path(tempfile.mkdtemp(), f'{name}_patched.py')
    file.write_text(code)
    return subprocess.Popen([sys.executable, file, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))


def until(job, text):
    for line in job.stdout:
        if text in line: return
    raise AssertionError(job.stderr.read())


def log_steps(folder): return [int(line.split(',')[0]) for line in (folder / 'log.csv').read_text().splitlines()[1:]]


def test_a_killed_run_resumes_bitwise_without_double_rows_and_a_folder_has_one_run(data, tmp_path, capfd):
    argv = ['--data', data, *TINY, '--warmup', 8, '--save_every', 10, '--log_every', 1, '--out']
    job = started('ect', *argv, tmp_path / 'run', '--steps', 24, patch="""report = m.report
def slow(cfg, row, left):
    report(cfg, row, left)
    if row['step'] == 14: print('here', flush=True), time.sleep(60)
m.report = slow""")
    until(job, 'here')
    assert 'another run is at work in' in fails(capfd, 2, 'ect', *argv, tmp_path / 'run', '--steps', 24)
    assert log_steps(tmp_path / 'run')[-1] == 14
    job.kill(), job.wait()
    parts, whole = (go('ect', *argv, tmp_path / out, '--steps', 24) for out in ('run', 'whole'))
    assert_same(whole['loss'] | whole['ema'], parts['loss'] | parts['ema'], rtol=0, atol=0)
    assert log_steps(tmp_path / 'run') == list(range(1, 25))
    (tmp_path / 'run' / 'latest.pt').unlink()
    go('ect', *argv, tmp_path / 'run', '--steps', 3)
    assert log_steps(tmp_path / 'run') == [1, 2, 3]


@slow
@every_method
def test_slow_thirty_kills_at_random_moments_change_nothing(name, data, tmp_path):
    argv = ['--data', data, *TINY, *PHASES[name], '--dropout', 0.3, '--save_every', 1, '--log_every', 1, '--steps', 60]
    rng, kills = np.random.default_rng(0), 0
    while kills < 30:
        job = started(name, *argv, '--out', tmp_path / 'run')
        if rng.random() < 0.9: until(job, ' steps ')
        time.sleep(rng.uniform(0, 0.4))
        job.kill()
        assert job.wait() == -signal.SIGKILL, 'it ended before 30 kills'
        kills += 1
    at = torch.load(tmp_path / 'run' / 'latest.pt', weights_only=True)['step']
    parts, whole = (go(name, *argv, '--out', tmp_path / out) for out in ('run', 'whole'))
    assert_same(whole['loss'] | whole['ema'], parts['loss'] | parts['ema'], rtol=0, atol=0)
    assert log_steps(tmp_path / 'run') == list(range(1, 61)) and not list((tmp_path / 'run').glob('*.part'))
    print(f'{name}: {kills} kills survived, the last at step {at} of 60')


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='finds the processes of a run in Linux')
@pytest.mark.parametrize('rank', [0, pytest.param(1, marks=slow)])
def test_a_process_that_dies_ends_the_run_with_the_reason(rank, data, tmp_path):
    job = started('ect', '--data', data, *TINY, '--steps', 100_000, '--gpus', 2, '--device', 'cpu', '--out', tmp_path)
    until(job, ' 10 ')
    pids = Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split()
    pids = [int(pid) for pid in pids if 'spawn_main' in Path(f'/proc/{pid}/cmdline').read_text()]
    began = time.time()
    os.kill(pids[rank], signal.SIGKILL)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 137 and error.strip() == f'ect.py: process {rank} was ended by SIGKILL', error
    print(f'ended {time.time() - began:.0f} s later')


LOAD = """def broken(cfg):
    if os.environ['RANK'] in {ranks}: {what}
    return load(cfg)
load, m.load_data = m.load_data, broken"""


@pytest.mark.parametrize('ranks, what, code, words', [
    ('1', "m.stop('it refuses')", 2, 'ect.py: it refuses'),
    pytest.param('0', "m.stop('it refuses')", 2, 'ect.py: it refuses', marks=slow),
    pytest.param('01', "raise OSError('disk')", 1, 'ect.py: disk. What was saved in', marks=slow),
    pytest.param('1', "raise RuntimeError('out of memory')", 1, 'out of memory', marks=slow)])
def test_what_one_of_several_processes_says_is_told_once_and_alone(ranks, what, code, words, data, tmp_path):
    """A traceback is left to errors that nobody foresaw."""
    job = started('ect', '--data', data, *TINY, '--steps', 4, '--gpus', 2, '--device', 'cpu', '--out', tmp_path / 'run',
                  patch=LOAD.format(ranks=repr(ranks), what=what))
    _, error = job.communicate(timeout=60)
    assert job.returncode == code and error.count(words) == 1, error
    assert len(error.strip().splitlines()) == 1 or words == 'out of memory', error


def test_more_processes_than_images_of_a_step_are_refused(data, tmp_path):
    done = run('ect', '--data', data, *TINY, '--batch', 1, '--gpus', 2, '--device', 'cpu', '--out', tmp_path / 'run')
    assert (done.returncode, done.stderr) == (2, 'ect.py: 2 processes for a batch of 1\n')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_data_is_read_while_sampling_and_during_a_checkpoint(number, data, tmp_path, monkeypatch, capfd):
    argv, load, save = ['--data', data, *TINY, '--warmup', 4, '--out', tmp_path / 'run'], ect.load_data, torch.save

    def hit(function, times=1):
        def wrapped(*args):
            for _ in range(times): signal.raise_signal(number)
            return function(*args)
        return wrapped
    monkeypatch.setattr(ect, 'load_data', hit(load))
    assert f'ended by {number.name}' in fails(capfd, 128 + number, 'ect', *argv, '--steps', 4)
    assert not (tmp_path / 'run').exists()
    monkeypatch.setattr(ect, 'load_data', load)
    monkeypatch.setattr(torch, 'save', hit(save, 2))            # an impatient second one changes nothing
    line = fails(capfd, 128 + number, 'ect', *argv, '--steps', 8, '--save_every', 4)
    assert 'stopped by a signal and saved at step 5' in line
    assert torch.load(tmp_path / 'run' / 'latest.pt', weights_only=True)['step'] == 5
    monkeypatch.setattr(ect, 'generate', hit(ect.generate))
    assert f'ended by {number.name}' in fails(capfd, 128 + number, 'ect', '--out', tmp_path / 'run', '--sample', 10)
    assert not list((tmp_path / 'run').glob('samples.npz*'))


def test_a_closed_pipe_is_one_line(data, tmp_path):
    job = started('ect', '--data', data, *TINY, '--warmup', 4, '--steps', 100_000, '--out', tmp_path)       # | head -2
    job.stdout.readline(), job.stdout.readline(), job.stdout.close()
    error = job.stderr.read()
    assert job.wait(60) == 1 and 'Broken pipe' in error and len(error.splitlines()) == 1, error


def test_a_folder_that_may_not_be_written_to_is_refused_at_once(data, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(os, 'access', lambda *args: False)
    assert 'is no folder one may write to' in fails(capfd, 2, 'ect', '--data', data, '--out', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('argv, message', [
    ('--data nowhere.zip', 'nowhere.zip cannot be read: FileNotFoundError'), ('--steps 0', '--steps cannot be 0'),
    ('--step 5', 'unrecognized'), ('--batch x', 'invalid int value'), ('--amp fp8', 'invalid choice'),
    ('--ts 80,x', 'invalid numbers value'), ('--nfe 3', '--nfe 3 needs'), ('--res 18', 'cannot be halved'),
    ('--sample 4', 'no checkpoint'), ('--dropout 1', '--dropout cannot be 1.0: dropout rate in [0, 1)'),
    ('--lr nan', '--lr cannot be nan'), ('--res -1', '--res cannot be -1'), ('--ts 1,2', 'noise levels fall'),
    ('--ts 80,nan', '--ts cannot be nan'), ('--mult 1,0', '--mult cannot be 0.0'), ('--ch 7', 'no network has'),
    ('--head_dim 3', 'no network has'), ('--P_mean inf', '--P_mean cannot be inf'), ('--flip 2', 'invalid choice'),
    ('--blocks 100', '--blocks cannot be 100'),
    ('--out {tmp}/file', '{tmp}/file is no folder one may write to'), ('--save {tmp}/file/s.npz', 'file is no folder'),
    ('--label 3', 'no such class'), ('--gpus 64', 'this machine has'),
    ('--gpus 999 --device cpu', 'this machine has'), ('--data {here}/README.md', 'folder, .zip or .tar.gz'),
    ('--data {tmp}', 'it holds no pictures'), ('--data {data} --cond 1 --init {tmp}/x.pt', 'x.pt cannot be read'),
    ('--init {here}/test_all.py', 'test_all.py cannot be read'), ('--init {here}/no.pkl', 'no.pkl cannot be read'),
    ('--data {tmp}/broken.zip', 'broken.zip cannot be read: BadZipFile'),
    ('--data {tmp}/unlabelled.zip --cond 1', 'has no labels'),
    ('--data {tmp}/python.tar.gz', 'it holds no data_batch_*.bin: take the binary version'),
    ('--data imagenet64 --init none', 'datasets/img64.zip cannot be read'),
])
def test_bad_input_is_one_line_and_leaves_nothing(argv, message, data, tmp_path, capfd):
    folder = tmp_path / 'data'
    folder.mkdir()
    (folder / 'file').touch()
    if 'broken' in argv: (folder / 'broken.zip').write_bytes(b'PK not a zip')
    if 'unlabelled' in argv: zipped(folder / 'unlabelled.zip', pictures(4))
    if 'python' in argv: tarfile.open(folder / 'python.tar.gz', 'w:gz').close()
    argv = argv.format(here=HERE, tmp=folder, data=data).split()
    line = fails(capfd, 2, 'ect', '--out', tmp_path / 'run', *argv)
    assert message.format(tmp=folder) in line and not (tmp_path / 'run').exists()


# what every knob takes of -1, 0, 2, inf, nan and a word; the others are refused; NOT: where a letter means else
TAKES = {'-1': {'seed', 'label', 'P_mean', 'P_mean_warmup', 'mu'},
         'inf': {'clip', 't_ref', 't_ref_stage1', 'refs', 'dropout_res'},
         '0': set('micro seed attn P_mean warmup stage1 anneal beta2 ema ema_gamma c cond flip head_dim dropout '
                  'k dropout_warmup mu boundary_prob ratio_limit refs smooth weak adaptive scd heun d ramp ramp_warmup '
                  'before shift P_mean_warmup beta2_warmup ema_gamma_warmup'.split()),
         '2': set('gpus nfe seed steps warmup stage1 batch batch_stage1 micro lr lr_warmup lr_stage1 t_ref '
                  't_ref_stage1 clip c P_mean P_std q d k b ts classes mult blocks attn head_dim save_every log_every '
                  'rho s0 N t_max fourier ema_gamma H heun refs edges eta guidance nu sigma w_boundary mu '
                  't_transition ramp ramp_warmup before shift eps dropout_res P_mean_warmup P_std_warmup '
                  'ema_gamma_warmup'.split())}
WORDS = {'out', 'save', 'init', 'teacher'}              # and any text
NOT = {('ct', 'mu', '-1'), ('ct', 'mu', '2'), ('scm', 'c', '0'), ('scm', 'ts', '2'), ('tcm', 'clip', 'inf'),
       ('tcm', 'd', '0')}


def walk(name):
    """Every knob and flag of the script with odd values, and whether that has a meaning"""
    for knob, word in itertools.product(MODULES[name].FLAGS | MODULES[name].CONFIG, [*TAKES, 'nan', 'word']):
        if knob not in ('compile', 'sample'):
            yield knob, word, knob in WORDS or knob in TAKES.get(word, ()) and (name, knob, word) not in NOT


@every_method
def test_every_knob_takes_what_has_a_meaning_and_refuses_the_rest_in_one_line(name, capfd):
    for knob, word, right in walk(name):
        try: config(name, f'--{knob}={word}', *(['--ch', 8] if knob == 'head_dim' else []))
        except SystemExit as end:
            lines = capfd.readouterr().err.splitlines()
            assert end.code == 2 and len(lines) == 1 and knob in lines[0] and not right, (knob, word, lines)
        else: assert right, f'--{knob} {word} of {name}.py is taken'


@slow
@every_method
def test_slow_what_every_knob_takes_runs_or_ends_in_one_line(name, data, tmp_path, monkeypatch, capfd):
    """Some steps of a small network in every phase, without pictures; a learning rate of 2 may end in NaN."""
    monkeypatch.setattr(MODULES[name], 'generate', lambda cfg, net, index, *_: torch.zeros(len(index), 3, 8, 8))
    monkeypatch.setattr(MODULES[name], 'picture_grid', lambda *args: None)
    monkeypatch.chdir(tmp_path)
    phases, ran = [re.sub('^[34]$', '1', word) for word in PHASES[name]], 0
    for knob, word, right in walk(name):
        if not right or knob == 'gpus' or knob in WORDS: continue
        argv = ['--data', data, *TINY, *phases, '--steps', 4, '--save_every', 2, f'--{knob}={word}', '--out', 'run']
        try: go(name, *argv)
        except SystemExit as end:
            assert (knob, end.code) in (('lr', 1), ('refs', 2)), (knob, word, capfd.readouterr().err)
        shutil.rmtree('run', ignore_errors=True)
        ran += 1
    print(f'{name}: {ran} values ran')


def test_pillows_warnings_about_readable_pictures_are_not_printed_by_any_thread(tmp_path):
    """TIFFs whose width is given twice; the threads that decode warn whenever they like."""
    for i, image in enumerate(pictures(600, 16)):
        Image.fromarray(image).save(tmp_path / f'{i}.tif')
        tiff = bytearray((tmp_path / f'{i}.tif').read_bytes())
        at = int.from_bytes(tiff[4:8], 'little') + 2            # the first entry: tag 256, one number of 32 bits
        tiff[at:at + 12] = struct.pack('<HHIHH', 256, 3, 2, 16, 16)
        (tmp_path / f'{i}.tif').write_bytes(tiff)
    with pytest.warns(UserWarning, match='tag 256 had too many entries'): Image.open(tmp_path / '0.tif').load()
    done = run('ict', '--data', tmp_path, *TINY, '--steps', 1, '--out', tmp_path / 'run')
    assert done.returncode == 0 and not done.stderr, done.stderr
    at = tiff.index(struct.pack('<HHI', 277, 3, 1))             # samples per pixel, of which Pillow's logger speaks too
    tiff[at:at + 12] = struct.pack('<HHIHH', 277, 3, 1, 100, 0)
    (tmp_path / '7.tif').write_bytes(tiff)
    done = run('ict', '--data', tmp_path, '--out', tmp_path / 'other')
    assert done.returncode == 2 and re.fullmatch(r'.*7\.tif cannot be read.*\n', done.stderr), done.stderr


@pytest.mark.parametrize('labels', [[-1, 0], [0.5, 1], [None, 1], ['a', 'b'], [10**9, 0], [[0], [1]], [1]])
def test_labels_that_are_no_classes_are_refused(labels, tmp_path, capfd):
    zipped(tmp_path / 'x.zip', pictures(2))
    with zipfile.ZipFile(tmp_path / 'x.zip', 'a') as archive:
        names = [name for name in archive.namelist() if name.startswith('0')]
        archive.writestr('dataset.json', json.dumps(dict(labels=list(zip(names, labels)))))
    line = fails(capfd, 2, 'ect', '--data', tmp_path / 'x.zip', '--cond', 1, '--out', tmp_path / 'run')
    assert 'its labels must be whole numbers' in line or len(labels) == 1 and 'x.zip cannot be read' in line


def test_flags_that_do_not_fit_the_checkpoint(data, tmp_path, capfd):
    argv = ['--data', data, *TINY, '--warmup', 4, '--out', tmp_path / 'run']
    go('ect', *argv, '--steps', 2)
    before = (tmp_path / 'run' / 'latest.pt').read_bytes()
    capfd.readouterr()
    assert 'do the flags fit it?' in fails(capfd, 2, 'ect', *argv, '--ch', 16, '--steps', 4)
    assert 'is a run of ect.py' in fails(capfd, 2, 'tcm', '--out', tmp_path / 'run')
    argv = ['--out', tmp_path / 'run', '--sample', 4, '--save', tmp_path / 's.png']
    assert 'give an .npz or a folder' in fails(capfd, 2, 'ect', *argv) and not (tmp_path / 's.png').exists()
    (tmp_path / 'run' / 'latest.pt').write_bytes(before[:5000])
    assert 'latest.pt cannot be read' in fails(capfd, 2, 'ect', *argv)


@every_method
def test_torch_that_computes_wrong_gradients_is_refused(name, tmp_path, monkeypatch, capfd):
    """Seen with 2.8, 2.9, 2.10: the tests of half-precision gradients and of scm's tangent fail there."""
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.10.1+cu128'))
    assert 'torch 2.10.1+cu128 computes wrong' in fails(capfd, 2, name, '--out', tmp_path / 'run')
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.11.0'))
    config(name, '--out', tmp_path / 'run')


# -------------------------------------------------------------------------------------------------------- safety

@every_method
def test_a_pickle_runs_nothing(name, tmp_path, capfd):
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/owned',)
    for content in (dict(ema=Evil()), Evil()):
        (tmp_path / 'evil.pkl').write_bytes(pickle.dumps(content))
        with pytest.raises(SystemExit) as end: MODULES[name].load_edm(tmp_path / 'evil.pkl')
        assert end.value.code == 2 and 'evil.pkl cannot be read' in capfd.readouterr().err
    torch.save(dict(method=name, step=0, x=Evil()), tmp_path / 'latest.pt')
    with pytest.raises(SystemExit): MODULES[name].read_checkpoint(tmp_path)
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize('name', ['ect', 'fid'])
def test_no_program_in_a_picture_runs(name, tmp_path, monkeypatch, capfd):
    """PostScript under the name of a PNG, with a stand-in for Ghostscript in the path."""
    (tmp_path / 'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n')
    (tmp_path / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n'
    with zipfile.ZipFile(tmp_path / 'd.zip', 'w') as archive:
        for i in range(3): archive.writestr(f'{i}.png', postscript)
    with pytest.raises(SystemExit):
        if name == 'fid': fid.survey(tmp_path / 'd.zip')
        ect.load_data(config('ect', '--data', tmp_path / 'd.zip', '--res', 8))
    assert '0.png cannot be read' in capfd.readouterr().err and not (tmp_path / 'ran').exists()


def test_a_checkpoint_brings_its_knobs_and_nothing_else(data, tmp_path, capfd):
    saved = go('ect', '--data', data, *TINY, *PHASES['ect'], '--steps', 2, '--out', tmp_path / 'run')
    path, config_of = tmp_path / 'run' / 'latest.pt', saved['config']
    torch.save(saved | dict(config=config_of | dict(save=str(tmp_path / 'elsewhere.npz'))), path)
    go('ect', '--out', tmp_path / 'run', '--sample', 2)
    assert (tmp_path / 'run' / 'samples.npz').exists() and not (tmp_path / 'elsewhere.npz').exists()
    broken = [{k: v for k, v in saved.items() if k != part} for part in ('config', 'step', 'method')]
    broken += [saved | dict(config=[1]), saved | dict(step='x'), saved | dict(step=-5), torch.zeros(3)]
    broken += [saved | dict(config=config_of | change) for change in (
        dict(mult=5), dict(ts=None), dict(steps='many'), dict(opt='lr_scheduler'), dict(blocks=10**9), dict(lr=-1.0))]
    for content in broken:
        torch.save(content, path)
        line = fails(capfd, 2, 'ect', '--out', tmp_path / 'run', '--sample', 2)
        assert re.search(r'latest.pt(:| cannot be read:)', line), line
    for change, message in ((dict(mult=(0.01, 2.0)), 'run: no network has [0, 16]'), (dict(res=9), 'run: side 9 ')):
        torch.save(saved | dict(config=config_of | change), path)
        assert message in fails(capfd, 2, 'ect', '--out', tmp_path / 'run', '--sample', 2)
    torch.save(saved | dict(config=config_of | dict(blocks=10**9)), path)
    line = fails(capfd, 2, 'ect', '--data', data, '--init', path, '--out', tmp_path / 'other', '--steps', 2)
    assert 'latest.pt: --blocks cannot be 1000000000' in line


def test_pickles_of_absurd_shape_are_refused_at_once(persistence, tmp_path, capfd):
    """Modules that hold each other twice, forty deep; a thousand million blocks; nested tuples for a name."""
    def song(modules, **kw):
        kw = dict(img_resolution=8, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4]) | kw
        state = dict(_init_kwargs=kw, _parameters={}, _buffers={}, _modules=modules)
        model = Persistent(dict(class_name='SongUNet', state=state))
        return pickle.dumps(dict(ema=Persistent(dict(state=dict(_modules=dict(model=model))))))
    node, names = Persistent(dict(state=dict(_parameters={}, _buffers={}, _modules={}))), (0,)
    for _ in range(40): node = Persistent(dict(state=dict(_parameters={}, _buffers={}, _modules=dict(a=node, b=node))))
    for _ in range(60): names = names, names
    for content in (song(dict(a=node)), song({}, num_blocks=10**9), song({}, embedding_type=names)):
        (tmp_path / 'x.pkl').write_bytes(content)
        began = time.time()
        with pytest.raises(SystemExit): ect.load_edm(tmp_path / 'x.pkl')
        assert 'x.pkl cannot be read' in capfd.readouterr().err and time.time() - began < 5


def test_statistics_of_pointers_are_refused(tmp_path, capfd):
    """Arrays of objects, whose bytes the file gives, in the two ways that a pickle can make one."""
    op = lambda module, name: b'c' + module.encode() + b'\n' + name.encode() + b'\n'
    text = lambda word: b'X' + struct.pack('<I', len(word)) + word.encode()
    dtype = op('numpy', 'dtype') + b'(' + text('O') + b'I00\nI01\ntR' + b'(I3\n' + text('|') + b'NNNI-1\nI-1\nI0\ntb'
    scalar = op('numpy.core.multiarray', 'scalar') + b'(' + dtype + b'C\x08' + b'A' * 8 + b'tR'
    array = op('numpy.core.multiarray', '_reconstruct') + b'(' + op('numpy', 'ndarray') + b'(I0\nt' + b'C\x01btR' + \
        b'(I1\n(I1\nt' + dtype + b'I00\nC\x08' + b'A' * 8 + b'tb'
    for value in (scalar, array):
        body = b'\x80\x02}' + text('fid') + b'}(' + text('mu') + value + text('sigma') + value + b'us.'
        (tmp_path / 'x.pkl').write_bytes(body)
        with pytest.raises(SystemExit): fid.read_statistics(tmp_path / 'x.pkl')
        assert 'not numbers' in capfd.readouterr().err


def test_a_flipped_bit_and_a_bomb_are_refused(data, tmp_path, capfd):
    go('ect', '--data', data, *TINY, *PHASES['ect'], '--steps', 2, '--out', tmp_path / 'run')
    path = tmp_path / 'run' / 'latest.pt'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for argv in (['--out', tmp_path / 'run'], ['--out', tmp_path / 'other', '--init', path]):
        assert 'wrong checksum' in fails(capfd, 2, 'ect', *argv, '--sample', 2)
    with zipfile.ZipFile(tmp_path / 'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        with archive.open('0.png', 'w') as member:
            for _ in range(257): member.write(bytes(2**20))
    assert 'exceeds 256 MB' in fails(capfd, 2, 'ect', '--data', tmp_path / 'bomb.zip', '--out', tmp_path / 'b')
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8, 3), }\n"
    with zipfile.ZipFile(tmp_path / 's.npz', 'w') as archive:
        archive.writestr('arr_0.npy', b'\x93NUMPY\1\0' + struct.pack('<H', len(header)) + header + bytes(192))
    with pytest.raises(SystemExit): fid.survey(tmp_path / 's.npz')
    assert 's.npz cannot be read' in capfd.readouterr().err


def test_a_damaged_log_is_named(tmp_path, capfd):
    (tmp_path / 'log.csv').write_text('step,phase,loss,grad_norm\n1,ect,0.5,x\n')
    with pytest.raises(SystemExit): fid.read_log(tmp_path / 'log.csv')
    assert 'log.csv cannot be read' in capfd.readouterr().err
    (tmp_path / 'log.csv').write_text('step,phase,loss,grad_norm\n')       # a run that has said nothing yet
    fid.curves(dict(a=fid.read_log(tmp_path / 'log.csv')), tmp_path / 'c.png')


def test_a_download_is_checked_and_its_failure_says_what_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    with pytest.raises(SystemExit): ect.fetch('http://127.0.0.1:9/some/file.bin')
    assert 'put it at datasets/file.bin' in capfd.readouterr().err
    Path('datasets').mkdir(exist_ok=True)
    Path('datasets/file.bin').write_bytes(b'abc')
    sha256 = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
    assert ect.fetch('http://127.0.0.1:9/some/file.bin', sha256) == Path('datasets/file.bin')
    with pytest.raises(SystemExit): ect.fetch('http://127.0.0.1:9/some/file.bin', '0' * 64)
    assert 'is damaged' in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------- sampling

@every_method
def test_samples_become_the_nearest_levels(name, monkeypatch):
    k = torch.arange(256)
    x = torch.stack([k / 127.5 - 1 + off / 127.5 for off in (-0.49, 0, 0.49)]).view(1, 3, 16, 16)
    monkeypatch.setattr(MODULES[name], 'sample', lambda *args, **kw: x)
    cfg = config(name, '--out', 'nowhere')
    draw = lambda: MODULES[name].generate(cfg, None, torch.arange(1), cfg.ts[:1], torch.device('cpu'))
    assert torch.equal(draw().flatten(), k.repeat(3).byte())
    x = torch.tensor([-9., -1.01, 1.01, 9.]).repeat(192).view(1, 3, 16, 16)
    assert draw().flatten()[:4].tolist() == [0, 0, 255, 255]


@every_method
def test_image_i_is_a_function_of_seed_and_i(name, data, tmp_path):
    run_at = ['--data', data, *TINY, *PHASES[name], '--cond', 1, '--out', tmp_path / 'run']
    go(name, *run_at, '--steps', 8)

    def draw(*argv):
        go(name, '--out', tmp_path / 'run', '--sample', *argv, '--nfe', 2, '--save', tmp_path / 's.npz')
        return np.load(tmp_path / 's.npz')
    base = draw(16)
    assert base['arr_0'].shape == (16, 8, 8, 3) and base['arr_0'].dtype == np.uint8
    assert base['arr_1'].tolist() == [0, 1, 2, 3] * 4
    assert len({image.tobytes() for image in base['arr_0']}) == 16
    near = lambda a, b: np.abs(a.astype(int) - b).max() <= 1
    assert near(draw(5, '--micro', 2)['arr_0'], base['arr_0'][:5])
    assert not near(draw(5, '--seed', 1)['arr_0'], base['arr_0'][:5])
    for label in (0, 2): assert draw(4, '--label', label)['arr_1'].tolist() == [label] * 4
    argv = '--sample 16 --nfe 2 --gpus 2 --device cpu --save'.split()
    done = run(name, '--out', tmp_path / 'run', *argv, tmp_path / 'png')
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / 'png').iterdir())
    assert len(files) == 16 and near(np.stack([np.asarray(Image.open(f)) for f in files]), base['arr_0'])


# ----------------------------------------------------------------------------------------- real pictures, GPU, slow

@needs_jpegs
@every_method
def test_real_pictures_train_resume_and_sample(name, tmp_path):
    (tmp_path / 'x.zip').symlink_to(JPEGS)                  # what is decoded lands beside the link
    argv = ['--data', tmp_path / 'x.zip', *'--ch 16 --blocks 1 --batch 8 --cond 1'.split(), *PHASES[name],
            '--out', tmp_path / 'run']
    go(name, *argv, '--steps', 4)
    saved = go(name, *argv, '--steps', 8)
    assert saved['config']['classes'] == 10 and saved['config']['res'] == 32
    go(name, '--out', tmp_path / 'run', '--sample', 3)
    assert np.load(tmp_path / 'run' / 'samples.npz')['arr_0'].shape == (3, 32, 32, 3)


# ---- the GPU check: `pytest -s -k gpu test_all.py` prints a line for each claim, with its measured value and its limit

@pytest.fixture
def say(capfd):
    """Prints a line of the table, whatever pytest captures, and holds a value to its limit."""
    def line(text, value=None, limit=None):
        capfd.readouterr()              # what the scripts have printed
        mark = '--' if limit is None else 'ok' if value <= limit else 'FAILED'
        if limit is not None: text += f': {value:.3g}, at most {limit:g}'
        with capfd.disabled(): print(f'\n{mark:8s}{text}', end='', flush=True)
        assert mark != 'FAILED', text
    return line


def relative(a, b): return ((a - b).norm() / b.norm()).item()


def moved(name, argv, saved):
    """The way of all weights from where a run by argv started to its checkpoint."""
    module, cfg = MODULES[name], config(name, *argv[:-1])
    first = module.Loss(module.new_network(cfg), cfg, None).state_dict()
    return torch.cat([(v.cpu().double() - first[k].double()).flatten() for k, v in saved['loss'].items()])


@pytest.mark.skipif(not (HERE / '.ci').exists(), reason='needs .ci/fake_cuda.py')
@pytest.mark.parametrize('name', [pytest.param(name, marks=[slow] * (name not in ('ict', 'fid'))) for name in SCRIPTS])
def test_on_a_pretended_cuda_no_device_or_dtype_is_wrong_and_steps_wait_as_told(name):
    """Training, sampling and fid.py on tensors that only pretend to be on cuda:0. In a step wait the scaler of fp16 and
    sct.py, for the classes of its references; nothing else."""
    argv = [sys.executable, '.ci/fake_cuda.py', '--syncs', name]
    done = subprocess.run(argv, cwd=HERE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and 'no device or dtype error' in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    steps = re.findall(r'-- (.*: (.*), one step: .*\n)((?: .*\n)*)', done.stdout)
    for what, phase, waits in steps:
        expected = ('fp16' in what) + (name == phase == 'sct' and '--cond 1' in what)
        assert sum(map(int, re.findall(r'^ +(\d+) x', waits, re.M))) == expected, what + waits
    assert len(steps) > 1 or name == 'fid'
    print(done.stdout.splitlines()[-1])


@needs_gpu
def test_gpu_is_named(say):
    where = torch.cuda.get_device_name() if GPU.type == 'cuda' else 'GPU, the CPU stands for one'
    say(f'{torch.cuda.device_count()} x {where}; torch {torch.__version__}, CUDA {torch.version.cuda}')


def first_step(name, arch, device, amp):
    """Loss (16,) and gradient, on the CPU in float64, of a step behind the warm-up; network and images are random"""
    module = MODULES[name]
    cfg = config(name, *TINY, *PHASES[name], '--res', 16, '--cond', 1, '--amp', amp, '--arch', arch)
    torch.manual_seed(0)
    loss = module.Loss(module.UNet(cfg), cfg, None)
    for p in loss.parameters(): nn.init.normal_(p, std=0.1)
    (x, z), u, y = torch.randn(2, 16, 3, 16, 16), torch.rand(16).double(), torch.arange(16) % 10
    loss.to(device)
    torch.backends.cudnn.allow_tf32 = amp != 'off'
    torch.set_float32_matmul_precision('highest' if amp == 'off' else 'high')
    with module.autocast(cfg, device):
        value = loss(0.5 * x.to(device), y.to(device), u, z.to(device), getattr(cfg, 'warmup', 0))
    value.mean().backward()
    grads = [p.grad.flatten() for p in loss.parameters() if p.grad is not None]
    return value.detach().double().cpu(), torch.cat(grads).double().cpu()


@needs_gpu
@pytest.mark.parametrize('name, arch', [(n, a) for n in METHODS for a in MODULES[n].CHOICES['arch']])
def test_gpu_step_is_that_of_the_cpu(name, arch, say):
    value, grad = first_step(name, arch, torch.device('cpu'), 'off')
    for amp, limit in (('off', 1e-4), ('tf32', 0.05), ('fp16', 0.05), ('bf16', 0.1)):
        low_value, low_grad = first_step(name, arch, GPU, amp)
        say(f'{name} {arch}, {amp}: error of the loss of a step against the CPU', relative(low_value, value), limit)
        say(f'{name} {arch}, {amp}: error of its gradient', relative(low_grad, grad), limit)


@needs_gpu
@every_method
def test_gpu_trains_every_phase_in_every_precision(name, data, tmp_path, say):
    for amp in ('off', 'tf32', 'fp16', 'bf16'):
        saved = go(name, '--data', data, *TINY, *PHASES[name], '--steps', 12, '--amp', amp, '--out', tmp_path / amp)
        bad = sum((~v.isfinite()).sum().item() for v in saved['loss'].values())
        say(f'{name}, {amp}: weights not finite after 12 steps of all phases', bad, 0)


@needs_gpu
@every_method
def test_gpu_resumes_where_it_stopped(name, data, tmp_path, monkeypatch, say):
    """Not to the bit: cuDNN picks its kernels anew in each process, and some of them add in any order."""
    argv, report = ['--data', data, *TINY, *PHASES[name], '--amp', 'off', '--steps', 9, '--out'], MODULES[name].report
    whole = go(name, *argv, tmp_path / 'whole')

    def interrupted(cfg, row, left):
        report(cfg, row, left)
        if row['step'] == 4: signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(MODULES[name], 'report', interrupted)
    with pytest.raises(SystemExit): go(name, *argv, tmp_path / 'parts')
    parts = go(name, *argv, tmp_path / 'parts')
    say(f'{name}: way of the weights in 5 + 4 steps against 9',
        relative(moved(name, argv, parts), moved(name, argv, whole)), 1e-3)


@needs_gpu
@pytest.mark.parametrize('name', ['ect', 'scm'])
def test_gpu_run_is_that_of_micro_batches_of_two_gpus_and_compiled(name, data, tmp_path, say):
    argv, ways = ['--data', data, *TINY, *PHASES[name], '--steps', 8, '--amp', 'off', '--out'], {'--micro 3': []}
    if torch.cuda.device_count() > 1:
        ways |= {'--gpus 2': [], 'torchrun': '-m torch.distributed.run --standalone --nproc-per-node 2'.split()}
    ways['--compile'] = []
    one = moved(name, argv, go(name, *argv, tmp_path / 'one'))
    for way, before in ways.items():
        after = way.split() if way.startswith('--') else []
        command = [sys.executable, *before, HERE / f'{name}.py', *argv, tmp_path / way, *after]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        saved = torch.load(tmp_path / way / 'latest.pt', weights_only=True, map_location='cpu')
        say(f'{name} {way}: way of the weights in 8 steps against one process',
            relative(moved(name, argv, saved), one), 1e-3)
    if '--gpus 2' not in ways: say(f'{name} --gpus 2 and torchrun: not tried, there are not two GPUs')


@needs_gpu
def test_gpu_tangent_is_torchs_own_and_that_of_the_cpu(say):
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    for arch in scm.CHOICES['arch']:
        net, (x, z, t), g = random_net('scm', '--arch', arch, '--head_dim', 8).float(), scm_inputs(), {}
        for device in (torch.device('cpu'), GPU):
            x, z = x.float().to(device), z.float().to(device)
            g[device.type] = scm_loss(net.to(device)).float().tangent(x, None, z, t, 110)[1].cpu()
        x_t, dx, cos, sin = (v.to(x) for v in on_path(x.cpu().double(), z.cpu().double(), t))
        value, J = torch.func.jvp(lambda v, s: net(2 * v, s) if 'scm' in arch else scm.F(net, v, s), (x_t, t.to(x)),
                                  (0.5 * cos * sin * dx, (0.5 * cos * sin).flatten()))
        own = (-cos**2 * (0.5 * value - dx) - cos * sin * x_t - J).cpu()
        say(f'scm, {arch}: error of the tangent g against torch.func.jvp', relative(g[GPU.type], own), 1e-3)
        say(f'scm, {arch}: error of the tangent g against the CPU', relative(g[GPU.type], g['cpu']), 1e-3)


@needs_gpu
@pytest.mark.parametrize('network, batch', [('CIFAR-10', 64), ('CIFAR-10', 256), ('glyphs', 32)])
def test_gpu_speed_memory_and_waiting(network, batch, tmp_path, monkeypatch, say):
    """Steps 11 to 20 timed by the script; in 21 to 25 the spans of all kernels."""
    source = zipped(tmp_path / 'd.zip', pictures(512, 32)) if network == 'CIFAR-10' else 'glyphs'
    argv = ['--data', source, '--batch', batch, '--warmup', 1, '--log_every', 5, '--out', tmp_path / 'run']
    if GPU.type == 'cpu': argv += TINY[:8]
    kind = torch.profiler.ProfilerActivity
    trace = torch.profiler.profile(activities=[kind.CUDA if GPU.type == 'cuda' else kind.CPU])
    report, rates, times = ect.report, {}, {}

    def watched(cfg, row, left):
        report(cfg, row, left)
        rates[row['step']] = row['images_per_second']
        if row['step'] == 20: trace.start()
        times[row['step']] = time.time()
        if row['step'] == 25: trace.stop()
    monkeypatch.setattr(ect, 'report', watched)
    if GPU.type == 'cuda': torch.cuda.reset_peak_memory_stats()
    try: go('ect', *argv, '--steps', 25)
    except torch.OutOfMemoryError: pytest.skip(f'the {network} network at batch {batch} does not fit this GPU')
    spans = sorted((e.time_range.start, e.time_range.end) for e in trace.events()
                   if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation)
    busy, last = 0, 0
    for start, end in spans: busy, last = busy + max(0, end - max(start, last)), max(end, last)
    waits = 1 - busy / 1e6 / (times[25] - times[20])
    memory = torch.cuda.max_memory_allocated() / 1e9 if GPU.type == 'cuda' else 0
    what = f'ect, {network} network, batch {batch}'
    say(f'{what}: {(rates[15] + rates[20]) / 2:.0f} images/s in float32, {memory:.2f} GB')
    if GPU.type == 'cuda': say(f'{what}: share of time the GPU waits', waits, 1 if network == 'glyphs' else 0.1)


@needs_gpu
def test_gpu_speed_of_fid(say):
    net, images = fid.Inception(), torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, device=GPU)
    for layer in net.modules():
        if isinstance(layer, fid.Conv): layer.fold()
    net, count = net.to(GPU, memory_format=torch.channels_last).eval(), 20 if GPU.type == 'cuda' else 1
    with torch.inference_mode():
        net(images)[0].sum().item()
        began = time.time()
        for _ in range(count): features = net(images)[0]
        features.sum().item()
    say(f'fid.py, Inception, batch 64: {64 * count / (time.time() - began):.0f} images/s')


def judged(folder, *paths):
    """What `python fid.py paths` prints on digits, as [{column: value}]"""
    done = run('fid', *paths, '--json', cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    return [{k: v[0] for k, v in row.items()} for row in json.loads(done.stdout)['models']]


@slow
@every_method
def test_slow_default_run_leaves_legible_digits_of_all_classes_and_colours(name, tmp_path):
    began = time.time()
    done = run(name, '--out', tmp_path / 'run', env={'OMP_NUM_THREADS': str(os.cpu_count())}, timeout=1200)
    assert done.returncode == 0, done.stderr
    minutes = (time.time() - began) / 60
    for nfe in (1, 2):
        go(name, '--out', tmp_path / 'run', '--sample', 2000, '--nfe', nfe, '--save', tmp_path / f'{nfe}.npz')
    for nfe, row in zip((1, 2), judged(tmp_path, '1.npz', '2.npz')):
        print(f'{name}, {nfe} steps, {minutes:.1f} min:', {k: v for k, v in row.items() if k != 'model'})
        least = {'ct': (0.7, 0.8), 'scm': (0.78, 0.9)}.get(name, (0.87, 0.93))
        assert row['sure'] > least[nfe - 1] and 0.65 < row['colour_min'] < row['colour_max'] < 1.2
        assert row['share_min'] > 0.04 and row['share_max'] < 0.22


@slow
def test_slow_scm_is_stable_for_five_seeds(tmp_path):
    """Warm-up and sCT, shorter than the default: no loss or gradient runs away, and the digits come."""
    def trace(seed):
        out = tmp_path / str(seed)
        done = run('scm', '--seed', seed, '--warmup', 400, '--steps', 1200, '--H', 100, '--out', out, timeout=1800)
        assert done.returncode == 0, done.stderr
        rows = [line.split(',') for line in (out / 'log.csv').read_text().splitlines()[1:]]
        return [float(row[3]) for row in rows if row[1] == 'sct'], [float(row[2]) for row in rows if row[1] == 'sct']

    with ThreadPoolExecutor(2) as pool: traces = list(pool.map(trace, range(5)))
    for seed in range(5): go('scm', '--out', tmp_path / str(seed), '--sample', 500)
    rows = judged(tmp_path, *(f'{seed}/samples.npz' for seed in range(5)))
    for (norms, losses), row in zip(traces, rows):
        norms_text = ' '.join(f'{v:.3g}' for v in norms)
        print(f'seed {row["model"]}: {row["sure"]:.3f} sure; gradient norm {norms_text}; last loss {losses[-1]:.3f}')
        assert max(norms) < 4 * np.median(norms) and losses[-1] < losses[0] and row['sure'] > 0.4


# --------------------------------------------------------------------------------------------------------- fid

class Small(nn.Module):
    """Stands in for Inception where features are not the matter: means of quarters of the channels, and products."""
    dim = 15

    def __init__(self):
        super().__init__()
        self.calls, self.fc = 0, nn.Linear(15, 10)

    def forward(self, x):
        self.calls += len(x)
        q = nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)
        return torch.cat([q, q[:, :3] * q[:, 3:6]], 1), None


@pytest.fixture
def small(monkeypatch, tmp_path):
    """fid.py with the network Small, in an empty folder with a reference and samples, 40 images each."""
    net = Small()
    monkeypatch.setattr(fid, 'network', lambda cfg: (net, '6726825d'))
    monkeypatch.chdir(tmp_path)
    arrays(ref=pictures(40, 8, 1), s=pictures(40, 8, 2))
    return net


def arrays(**images):
    for name, array in images.items(): np.savez(f'{name}.npz', array)


def score(capfd, *argv):
    """What fid.py --json prints, and its stderr"""
    capfd.readouterr()
    fid.main([*map(str, argv), '--json'])
    out, err = capfd.readouterr()
    return json.loads(out), err


def refuses(capfd, *argv):
    capfd.readouterr()
    with pytest.raises(SystemExit) as end: fid.main(list(map(str, argv)))
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith('fid.py: '), (end.value.code, line)
    return line


def settings(**kw):
    given = dict(model='inception', resize='tf', weights='', device='cpu', gpus=1, batch=0)
    return argparse.Namespace(**given | kw)


def tensor(images): return torch.from_numpy(images).permute(0, 3, 1, 2)


def correlated(n, d, seed=0):
    """n correlated features (n, d), some eigenvalues a thousand times others"""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * np.geomspace(1, 0.03, d) @ rng.standard_normal((d, d)) / d**0.5
    return np.maximum(x + 0.3, 0)


def of(x): return x.mean(0), np.cov(x.T)


def test_fid_shares_names_with_the_methods_only_in_the_same_text():
    shared, ours = pieces('ect'), pieces('fid')
    common = ours.keys() & shared.keys() - {'config', 'main'}
    for name in common: assert ours[name] == shared[name], f'{name} has drifted'
    assert {'stop', 'reading', 'write', 'fetch', 'pictures', 'glyphs'} <= common


def test_fid_inception_has_the_tensors_of_pytorch_fids_file():
    state = fid.Inception().state_dict()
    assert len(state) == 472 and sum(v.numel() for v in state.values()) == 23_885_392
    for name, shape in {
            'Conv2d_4a_3x3.conv.weight': (192, 80, 3, 3), 'Mixed_5d.branch_pool.bn.running_var': (64,),
            'Mixed_6a.branch3x3.conv.weight': (384, 288, 3, 3), 'Mixed_6b.branch7x7dbl_3.conv.weight': (128, 128, 1, 7),
            'Mixed_6e.branch7x7_3.conv.weight': (192, 192, 7, 1), 'Mixed_7a.branch7x7x3_4.bn.bias': (192,),
            'Mixed_7c.branch3x3_2a.conv.weight': (384, 384, 1, 3), 'fc.bias': (1008,)}.items():
        assert state[name].shape == shape, name


@pytest.fixture(scope='module')
def inception():
    """Inception with the weights of the golden file."""
    net, state = fid.Inception(), {}
    for j, (k, old) in enumerate(sorted(net.state_dict().items())):
        v = torch.randn(old.shape, generator=generator(1000 + j))
        if k.endswith(('running_var', 'bn.weight')): state[k] = 1 + 0.1 * v.abs()
        else: state[k] = 0.1 * v if v.ndim == 1 else v * (2 / v[0].numel())**0.5
    net.load_state_dict(state, strict=True)
    return net.requires_grad_(False)


@needs_golden
def test_inception_agrees_with_pytorch_fids_network_also_folded_and_image_by_image(inception):
    golden = golden_of('inception')
    features, logits = inception(golden['images'])
    close(features, golden['features'], rtol=1e-4, atol=1e-4)
    close(logits, golden['logits'], rtol=1e-4, atol=1e-4)
    for layer in inception.modules():
        if isinstance(layer, fid.Conv): layer.fold()
    net = inception.to(memory_format=torch.channels_last)
    assert net.Mixed_7c.branch_pool.conv.bias is not None
    alone = torch.cat([net(image[None])[0] for image in golden['images']])
    close(alone, golden['features'], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('n', [16, 32, 64, 299, 512])
def test_resizes_are_those_of_their_namesakes(n):
    """A ramp tells the grid: TensorFlow 1 samples at i n / 299, PyTorch at (i + 1/2) n / 299 - 1/2; clean: Pillow's."""
    ramp, i, last = torch.arange(n).clamp(max=255).to(torch.uint8).expand(1, 3, n, n), np.arange(299), min(n - 1, 255)
    for resize, place, scale, shift in (('tf', i * n / 299, 128, 128),
                                        ('pytorch-fid', (i + 0.5) * n / 299 - 0.5, 127.5, 127.5)):
        for x, axis in ((ramp, 3), (ramp.mT, 2)):
            got = fid.Inception(resize).input(x).movedim(axis, 3)[0, 1, 7].double().numpy() * scale + shift
            np.testing.assert_allclose(got, place.clip(0, last), atol=0.02 if n > 256 else 2e-3)
    noise = np.random.default_rng(n).integers(0, 256, (n, n), dtype=np.uint8)
    clean = np.asarray(Image.fromarray(noise.astype(np.float32)).resize((299, 299), Image.BICUBIC)).clip(0, 255)
    got = fid.Inception('clean').input(torch.from_numpy(noise).expand(1, 3, n, n))[0, 2] * 128 + 128
    np.testing.assert_allclose(got, clean, atol=5e-3)


# ---- the distance

def test_frechet_of_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    a, b, m = rng.uniform(0, 2, 300), rng.uniform(0, 2, 300), rng.standard_normal(300)
    a[:120] = b[80:200] = 0             # exact zeros, not the same
    a[250:] = 1e-7                      # small, but no rounding
    expected = (m**2).sum() + ((a**0.5 - b**0.5)**2).sum()
    assert abs(fid.frechet(m, np.diag(a), 0 * m, np.diag(b)) - expected) < 1e-9 * expected
    q = np.linalg.qr(rng.standard_normal((300, 300)))[0]
    assert abs(fid.frechet(m, q * a @ q.T, 0 * m, q * b @ q.T) - expected) < 1e-9 * expected
    assert fid.frechet(m, 0 * q, 0 * m, np.diag(b)) == pytest.approx((m**2).sum() + b.sum())


def test_frechet_is_zero_for_itself_symmetric_and_sqrtms_value_at_full_rank():
    for n in (60, 400, 3000):
        mu, sigma = of(correlated(n, 300))
        assert abs(fid.frechet(mu, sigma, mu, sigma)) < 1e-9
    x, y = of(correlated(3000, 100, 1)), of(correlated(3000, 100, 2) + 0.1)
    d = fid.frechet(*x, *y)
    assert abs(d - fid.frechet(*y, *x)) < 1e-10
    exact = ((x[0] - y[0])**2).sum() + np.trace(x[1] + y[1] - 2 * linalg.sqrtm(x[1] @ y[1]).real)
    assert d == pytest.approx(exact, rel=1e-9)


def singular_value_distance(x, y):
    """From the singular values of the centred samples themselves, which need no root of a covariance."""
    cx, cy = ((v - v.mean(0)) / (len(v) - 1)**0.5 for v in (x.astype(float), y.astype(float)))
    cross = np.linalg.svd(cx @ cy.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)).astype(float)**2).sum() + (cx**2).sum() + (cy**2).sum() - 2 * cross


def test_frechet_is_exact_for_fewer_images_than_features():
    x, y = correlated(100, 300, 1), correlated(150, 300, 2) + 0.05
    assert abs(fid.frechet(*of(x), *of(y)) - singular_value_distance(x, y)) < 1e-9


def test_frechet_inf_is_the_intercept_over_one_over_n():
    """Features whose distance is about c + 40 / n: the line meets the axis nearer the truth than the whole sample."""
    mu, sigma = np.zeros(40), np.eye(40)
    x = (np.random.default_rng(0).standard_normal((12_000, 40)) * 1.05).astype(np.float32)
    truth, plain, limit = 40 * 0.05**2, fid.frechet(*of(x), mu, sigma), fid.frechet_inf(x, mu, sigma)
    assert abs(limit - truth) < 0.5 * (plain - truth) and plain > truth
    draw, sizes, values = np.random.RandomState(0), np.linspace(5000, 12_000, 15).astype(int), []
    for size in sizes:
        some = x[draw.choice(12_000, size, replace=False)].astype(float)
        roots = np.sqrt(np.linalg.eigvalsh(np.cov(some.T)))
        values.append((some.mean(0)**2).sum() + (roots**2).sum() + 40 - 2 * roots.sum())
    line = stats.linregress(1 / sizes, values)
    assert limit == pytest.approx(line.intercept, rel=1e-6)


def test_inception_score_is_the_definition_split_by_split():
    rng, weight = np.random.default_rng(0), torch.randn(7, 5)
    x, scores = rng.standard_normal((103, 5)).astype(np.float32), []
    for i in range(10):
        e = np.exp(x[103 * i // 10:103 * (i + 1) // 10].astype(float) @ weight.double().numpy().T)
        p = e / e.sum(1, keepdims=True)
        terms = [p[j, c] * math.log(p[j, c] / p[:, c].mean()) for j in range(len(p)) for c in range(7)]
        scores.append(math.exp(sum(terms) / len(p)))
    assert fid.inception_score(x, weight) == pytest.approx(np.mean(scores), rel=1e-9)
    classes = np.eye(10, dtype=np.float32)[np.arange(200) % 10]                 # ten, each certain, in turn: 10
    assert fid.inception_score(classes, torch.eye(10) * 100) == pytest.approx(10)


def test_kernel_distance_is_the_unbiased_estimator_over_subsets():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((13, 4)).astype(np.float32), rng.standard_normal((9, 4)).astype(np.float32) + 0.5
    k, draw, values = lambda a, b: (float(a @ b) / 4 + 1)**3, np.random.RandomState(0), []
    for _ in range(100):
        a, b = (v[draw.choice(len(v), 9, replace=False)].astype(float) for v in (x, y))
        same = sum(k(u[i], u[j]) for u in (a, b) for i in range(9) for j in range(9) if i != j) / (9 * 8)
        values.append(same - 2 * np.mean([[k(p, q) for q in b] for p in a]))
    assert fid.kernel_distance(x, y) == pytest.approx(np.mean(values), rel=1e-9)
    z = rng.standard_normal((4000, 4)).astype(np.float32)
    assert abs(fid.kernel_distance(z[:2000], z[2000:])) < 0.02 < fid.kernel_distance(z[:2000], z[2000:] + 0.3)


def test_precision_and_recall_count_the_balls_of_the_third_neighbour():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((60, 3)).astype(np.float32)
    fake = (0.5 * rng.standard_normal((50, 3)) + 0.9).astype(np.float32)

    def d(a, b): return np.sqrt(((a.astype(float)[:, None] - b.astype(float)[None])**2).sum(-1))

    def share(x, y):
        return np.mean([any(d(p[None], c[None])[0, 0] <= np.sort(d(c[None], y)[0])[3] for c in y) for p in x])
    got = fid.precision_recall(real, fake)
    assert got == pytest.approx((share(fake, real), share(real, fake))) and 1 > got[0] > got[1] + 0.1 > 0.1


def test_dinov2_is_the_published_transformer():
    """Built anew from torch's own attention module, with random weights, at 3 heads and 2 blocks."""
    g = generator(1)
    net = fid.DINOv2(24, 2, 3)
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=g) * (0.5 if p.ndim == 1 else 0.2)
    state, x = net.state_dict(), torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=g)
    assert {'pos_embed', 'mask_token', 'blocks.1.ls2.gamma', 'blocks.0.attn.qkv.bias', 'blocks.1.mlp.fc2.weight',
            'patch_embed.proj.weight'} <= set(state)
    assert state['pos_embed'].shape == (1, 1370, 24) and len(state) == 5 + 2 * 14 + 2
    assert len(fid.DINOv2(8, 24, 2).state_dict()) == 343

    def normalised(plane, mean, std):   # Pillow's bicubic, in floats
        plane = Image.fromarray(plane.numpy().astype(np.float32)).resize((224, 224), Image.BICUBIC)
        return (np.asarray(plane) / 255 - mean) / std
    moments = (0.485, 0.229), (0.456, 0.224), (0.406, 0.225)
    z = np.array([[normalised(plane, *m) for plane, m in zip(image, moments)] for image in x])
    z = torch.tensor(z, dtype=torch.float32).unfold(2, 14, 14).unfold(3, 14, 14)                # (2, 3, 16, 16, 14, 14)
    z = torch.einsum('bchwij,dcij->bhwd', z, state['patch_embed.proj.weight']) + state['patch_embed.proj.bias']
    places = state['pos_embed'][0, 1:].view(37, 37, 24).permute(2, 0, 1)[None]
    places = nn.functional.interpolate(places, scale_factor=(16.1 / 37,) * 2, mode='bicubic')
    z = (z + places[0].permute(1, 2, 0)).view(2, 256, 24)
    z = torch.cat([(state['cls_token'] + state['pos_embed'][:, :1]).expand(2, 1, 24), z], 1)

    def linear(v, k): return v @ state[f'{k}.weight'].T + state[f'{k}.bias']

    def norm(v, k):
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return v * state[f'{k}.weight'] + state[f'{k}.bias']
    for b in ('blocks.0.', 'blocks.1.'):
        attention = nn.MultiheadAttention(24, 3, batch_first=True)
        names = dict(in_proj_weight='qkv.weight', in_proj_bias='qkv.bias')
        names |= {'out_proj.weight': 'proj.weight', 'out_proj.bias': 'proj.bias'}
        attention.load_state_dict({k: state[f'{b}attn.{v}'] for k, v in names.items()})
        h = norm(z, b + 'norm1')
        z = z + state[b + 'ls1.gamma'] * attention(h, h, h, need_weights=False)[0]
        h = linear(norm(z, b + 'norm2'), b + 'mlp.fc1')
        z = z + state[b + 'ls2.gamma'] * linear(h * 0.5 * (1 + torch.erf(h / 2**0.5)), b + 'mlp.fc2')
    close(net(x)[0], norm(z, 'norm')[:, 0], rtol=1e-4, atol=1e-4)


# ---- digits

@pytest.fixture(scope='module')
def classifier_file(tmp_path_factory):
    """What fid.py has trained and kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('digits'))
        fid.digits()
        return fid.DIGITS.resolve()


@pytest.fixture
def classifier(classifier_file, tmp_path, monkeypatch):
    """The classifier's path, in an empty folder but for its file."""
    monkeypatch.chdir(tmp_path)
    fid.DIGITS.parent.mkdir()
    fid.DIGITS.write_bytes(classifier_file.read_bytes())
    return fid.DIGITS


def test_classifier_knows_held_out_digits_and_is_kept_as_plain_data(classifier, capfd):
    net, (images, labels) = fid.digits(), fid.glyphs(16, 2000, 2)
    assert 'training' not in capfd.readouterr().err
    features, logits = net(images)
    assert (logits.argmax(1) == labels).float().mean() > 0.995 and features.shape == (2000, 70)
    assert 0.8 < features.std(0).min() and features.std(0).max() < 1.2
    close(logits, net.fc(features))
    classifier.write_bytes(b'no weights')
    with pytest.raises(SystemExit): fid.digits()
    assert 'delete it to train anew' in capfd.readouterr().err


def test_digits_are_ranked_by_legibility_classes_colours_and_grain(classifier, capfd):
    """By FD-digits, and by the column that names the fault; bare, as a user types it."""
    held_out, labels = fid.glyphs(16, 2000, 2)
    x = held_out.float()
    kinds = dict(held_out=x, grain=x + 8 * torch.randn(x.shape), blur=nn.functional.avg_pool2d(x, 5, 1, 2),
                 noise=torch.randint(256, x.shape), red=x + torch.tensor([20, 0, 0]).view(3, 1, 1), dull=64 + 0.5 * x,
                 fours=x[labels != 4].repeat(2, 1, 1, 1)[:2000], few=x[:100].repeat(20, 1, 1, 1))
    for name, images in kinds.items():
        Path(name).mkdir()
        np.savez(f'{name}/samples.npz', images.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    result, err = score(capfd, *(f'{name}/samples.npz' for name in kinds))
    assert (result['model'], result['reference'], result['reference_n']) == ('digits', 'glyphs', 20_000)
    assert err.count('2000 images bias the distance upwards') == 1
    rows = {row['model'][0]: {k: v[0] for k, v in row.items()} for row in result['models']}
    for name, row in rows.items(): print(name, *(f'{k} {v:.3f}' for k, v in row.items() if k != 'model'))
    d = {name: row['FD-digits'] for name, row in rows.items()}
    assert d['held_out'] < 0.1 and all(v > 5 * d['held_out'] for name, v in d.items() if name != 'held_out')
    assert d['noise'] > 4 * d['blur'] > 12 * d['fours'] and rows['noise']['sure'] < 0.1
    assert rows['held_out']['sure'] > 0.995 and rows['held_out']['share_min'] > 0.095
    assert rows['fours']['share_min'] < 0.005 and rows['held_out']['share_max'] < 0.105 < rows['fours']['share_max']
    assert 0.45 < rows['dull']['colour_min'] < rows['dull']['colour_max'] < 0.55
    assert 0.95 < rows['held_out']['colour_min'] < rows['held_out']['colour_max'] < 1.05
    kept = np.load('held_out/samples.npz.digits.fid')           # of statistics alone some columns stay empty
    np.savez('statistics.npz', mu=kept['mu'], sigma=kept['sigma'])
    for paths in (['held_out/samples.npz', 'statistics.npz'], ['statistics.npz', 'held_out/samples.npz']):
        fid.main([*paths, '--ref', 'glyphs', '--model', 'digits'])
        lines = {line.split()[0]: line.split()[1:] for line in capfd.readouterr().out.splitlines()}
        assert lines['statistics.npz'][1:] == ['-'] * 6 and float(lines['held_out'][1]) > 0.995, lines


# ---- images and statistics

def test_every_format_holds_the_same_images_and_gives_the_same_statistics(small, capfd):
    images, rows = pictures(30, 32), []
    np.savez_compressed('a.npz', arr_0=images, arr_1=np.arange(30))
    for path in ('a.npz', *make_data(Path(), images, np.arange(30) % 7)):
        got = fid.load_images(path)
        assert got.dtype == torch.uint8 and torch.equal(got, tensor(images)), path
        rows += score(capfd, path, '--ref', 'a.npz', '--num', 20)[0]['models']
        assert rows[-1] | dict(model='') == rows[0] | dict(model=''), path
    assert rows[0]['n'] == [20] and rows[0]['FID'][0] > 1e-6


def test_grey_and_palette_pictures_are_read_and_grey_and_jpeg_are_said(tmp_path, capfd):
    colour = Image.fromarray(pictures(1, 16)[0])
    colour.quantize(16).save(tmp_path / '0.png')
    colour.convert('L').save(tmp_path / '1.png')
    palette, grey = fid.load_images(tmp_path).permute(0, 2, 3, 1).numpy()
    assert (palette == np.asarray(colour.quantize(16).convert('RGB'))).all()
    assert (grey == np.asarray(colour.convert('L'))[..., None]).all()
    colour.save(tmp_path / '2.jpg')
    fid.survey(tmp_path)
    err = capfd.readouterr().err
    assert '1 grey pictures' in err and '1 JPEG' in err


def test_statistics_are_those_of_numpy_on_edms_subset_whatever_the_batch(small):
    """EDM shuffles all numbers by seed 0 and takes the first."""
    images, order = pictures(2300, 8), np.arange(2300)
    arrays(a=images)
    np.random.RandomState(0).shuffle(order)
    features = small(tensor(images[np.sort(order[:2000])]))[0].double().numpy()
    for batch in (3, 64, 2000):
        found = fid.statistics(fid.survey('a.npz'), 2000, small, 'w', settings(batch=batch))
        os.remove('a.npz.inception-tf.fid')
        np.testing.assert_allclose(found.mu, features.mean(0), rtol=0, atol=1e-7)
        np.testing.assert_allclose(found.sigma, np.cov(features.T), rtol=0, atol=1e-7)
        np.testing.assert_allclose(found.features, features, rtol=0, atol=1e-6)


def test_of_more_than_50000_images_every_second_feature_is_kept_and_all_count(small, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (50_003, 2, 2, 3), dtype=np.uint8)
    arrays(a=images)
    features = small(tensor(images))[0].double().numpy()
    found = fid.statistics(fid.survey('a.npz'), 0, small, 'w', settings(batch=1000))
    np.testing.assert_allclose(found.mu, features.mean(0), rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.sigma, np.cov(features.T), rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.features, features[::2], rtol=0, atol=1e-6)


def test_results_are_kept_by_content_not_by_name(small, tmp_path, capfd):
    first, _ = score(capfd, 's.npz', '--ref', 'ref.npz')
    assert small.calls == 80
    again, _ = score(capfd, 's.npz', '--ref', 'ref.npz')
    assert small.calls == 80 and again == first
    score(capfd, 's.npz', '--ref', 'ref.npz', '--num', 20)                      # another subset of the samples
    assert small.calls == 100
    arrays(ref=pictures(40, 8, 3))                                              # the same name, size and length
    other, _ = score(capfd, 's.npz', '--ref', 'ref.npz', '--num', 20)
    assert small.calls == 140 and other['models'][0]['FID'] != first['models'][0]['FID']
    score(capfd, 's.npz', '--ref', 'ref.npz', '--num', 20, '--resize', 'clean')
    assert small.calls == 200 and sorted(p.name for p in tmp_path.glob('*.fid')) == [
        f'{name}.npz.inception-{way}.fid' for name in ('ref', 's') for way in ('clean', 'tf')]
    meta = json.loads(str(np.load('s.npz.inception-tf.fid')['meta']))
    assert dict(weights='6726825d', n=20, of=40, resize='tf', source='s.npz').items() <= meta.items()


def test_statistics_files_are_exchanged_with_edm_adm_and_edm2(small, capfd):
    direct = score(capfd, 's.npz', '--ref', 'ref.npz')[0]['models'][0]
    ours = dict(np.load('ref.npz.inception-tf.fid'))                               # as EDM reads a reference
    mu, sigma = ours['mu'], ours['sigma']
    assert mu.dtype == sigma.dtype == np.float64
    np.savez('edm.npz', mu=mu, sigma=sigma)
    np.savez('adm.npz', arr_0=pictures(4, 8, 9), mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3, :3])
    for protocol in (2, 4, 5):
        content = dict(num_images=np.int64(40), fid=dict(mu=mu, sigma=sigma), fd_dinov2=dict(mu=2 * mu, sigma=sigma))
        Path(f'edm2-{protocol}.pkl').write_bytes(pickle.dumps(content, protocol))
    assert (fid.read_statistics('edm2-4.pkl', 'dinov2').mu == 2 * mu).all()
    for name in ('edm.npz', 'adm.npz', 'edm2-2.pkl', 'edm2-4.pkl', 'edm2-5.pkl', 'ref.npz.inception-tf.fid'):
        result, err = score(capfd, 's.npz', '--ref', name, '--num', 40)
        (row,), foreign = result['models'], name[-3:] != 'fid'
        assert row['FID'] == direct['FID'] and row['IS'] == direct['IS'], name
        assert ('does not say how it was made' in err) == foreign and (row['KID x1000'] == [None]) == foreign
    assert 'holds 40 images, fewer than 50000' in refuses(capfd, 's.npz', '--ref', 'edm.npz')
    result, _ = score(capfd, 'ref.npz.inception-tf.fid', '--ref', 'ref.npz')       # samples may be statistics too
    assert abs(result['models'][0]['FID'][0]) < 1e-9


def test_statistics_made_in_another_way_are_refused(small, capfd, monkeypatch):
    score(capfd, 's.npz', '--ref', 'ref.npz')
    ours = 'ref.npz.inception-tf.fid'
    assert f'{ours} was made with resize tf, not clean' in refuses(capfd, 's.npz', '--ref', ours, '--resize', 'clean')
    assert f'{ours} was made with model inception' in refuses(capfd, 's.npz', '--ref', ours, '--model', 'dinov2')
    found = np.load(ours)
    for way, resize in (('clean', 'clean'), ('legacy_pytorch', 'pytorch-fid'), ('legacy_tensorflow', 'tf')):
        name, other = f'my_{way}_train_32.npz', 'pytorch-fid' if resize == 'tf' else 'tf'
        np.savez(name, mu=found['mu'], sigma=found['sigma'])
        line = refuses(capfd, 's.npz', '--num', 40, '--ref', name, '--resize', other)
        assert f'was made with resize {resize}, not {other}' in line
        score(capfd, 's.npz', '--num', 40, '--ref', name, '--resize', resize)
    np.savez('edm.npz', mu=found['mu'][:9], sigma=found['sigma'][:9, :9])
    assert 'not of one network' in refuses(capfd, 's.npz', '--ref', 'edm.npz', '--num', 40)
    monkeypatch.setattr(fid, 'network', lambda cfg: (small, 'other'))
    assert f'{ours} was made with weights 6726825d, not other' in refuses(capfd, 's.npz', '--ref', ours)


def bad_inputs():
    """One of every kind of bad input, by name"""
    good, noise = pictures(6, 8), np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)

    def save(name, image, ext='png', **kw):
        Path(name).mkdir()
        Image.fromarray(good[0]).save(f'{name}/0.png')
        image.save(f'{name}/1.{ext}', **kw)

    rgb = Image.fromarray(good[1])
    alpha = rgb.copy()
    alpha.putalpha(128)
    save('rgba', alpha)
    save('la', alpha.convert('LA'))
    save('tp', rgb.quantize(8), transparency=0)
    save('deep', Image.fromarray(np.full((8, 8), 1000, np.uint16)))
    save('cmyk', rgb.convert('CMYK'), ext='jpg')
    save('floatf', Image.fromarray(np.zeros((8, 8), np.float32)), ext='tif')
    save('mixed', rgb.resize((9, 8)))
    save('cut', Image.fromarray(noise[0]))
    Path('cut/1.png').write_bytes(Path('cut/1.png').read_bytes()[:-100])
    save('text', rgb)
    Path('text/1.png').write_bytes(b'no picture')
    save('deeprgb', rgb)
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    Path('deeprgb/1.png').write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress((b'\0' + bytes(8 * 6)) * 8)) + chunk(b'IEND', b''))
    Path('empty').mkdir()
    arrays(float=good / 255, int=good.astype(np.int64), object=np.array([{}, []], object), flat=good.reshape(6, -1),
           first=good.transpose(0, 3, 1, 2), none=good[:0], cut=noise, one=good[:1], other=pictures(6, 16))
    Path('cut.npz').write_bytes(Path('cut.npz').read_bytes()[:4000])
    with zipfile.ZipFile('huge.npz', 'w') as archive, archive.open('arr_0.npy', 'w') as file:        # or it says so
        np.lib.format.write_array_header_1_0(file, dict(descr='|u1', fortran_order=False, shape=(2, 10**8, 8, 3)))
    np.savez('names.npz', a=good, b=good)
    np.savez('fortran.npz', np.asfortranarray(good))
    np.savez('mu.npz', mu=np.zeros(4), sigma=np.zeros((3, 3)))
    np.savez('nanmu.npz', mu=np.full(15, np.nan), sigma=np.zeros((15, 15)))
    Path('text.zip').write_bytes(b'PK no zip')
    Path('readme.md').write_text('#')


@pytest.mark.parametrize('argv, message', [
    ('rgba', 'rgba/1.png is a RGBA picture with alpha'), ('la', 'la/1.png is a LA picture with alpha'),
    ('tp', 'tp/1.png is a P picture with alpha'), ('deep', 'deep/1.png is a I'),
    ('deeprgb', 'deeprgb/1.png is a RGB picture of 16 bits'), ('cmyk', 'cmyk/1.jpg is a CMYK picture'),
    ('floatf', 'floatf/1.tif is a F picture'), ('mixed', 'mixed/1.png is of size (9, 8), those before it (8, 8)'),
    ('empty', 'it holds no pictures'), ('text', 'text/1.png cannot be read'), ('cut', 'cut/1.png cannot be read'),
    ('float.npz', 'float.npz holds float64 (6, 8, 8, 3), not uint8'), ('int.npz', 'int.npz holds int64'),
    ('object.npz', 'object.npz holds object (2,)'), ('flat.npz', 'holds uint8 (6, 192), not uint8 (N, H, W, 3)'),
    ('first.npz', 'holds uint8 (6, 3, 8, 8)'), ('fortran.npz', 'in Fortran order'),
    ('huge.npz', 'images of 100000000 x 8 exceed 256 MB'),
    ('none.npz', 'none.npz holds 0 images'), ('cut.npz', 'cut.npz cannot be read'),
    ('names.npz', "names.npz cannot be read: KeyError \"There is no item named 'arr_0.npy'"),
    ('mu.npz', 'mu.npz holds mu (4,), sigma (3, 3)'), ('nanmu.npz', 'not finite statistics'),
    ('text.zip', 'text.zip cannot be read: BadZipFile'), ('readme.md', 'images are an .npz, a folder or .zip'),
    ('nowhere.npz', 'there is no nowhere.npz'), ('ref.npz --num 50', 'ref.npz holds 40 images, fewer than 50'),
    ('one.npz', 'one.npz holds 1 images'), ('ref.npz --ref one.npz', 'one.npz holds 1 images'),
    ('ref.npz --gpus 0', 'must be positive'), ('ref.npz --gpus 9', 'this machine has'),
    ('other.npz', 'these are not of one size: other.npz 16 x 16, ref.npz 8 x 8'),
    ('ref.npz --resize big', 'invalid choice'), ('ref.npz --ref', 'expected one argument'),
    ('ref.npz --model digits', '--model digits is for images of 16 x 16'),
    ('ref.npz --weights nowhere.pth', 'nowhere.pth cannot be read: FileNotFoundError'),
    ('ref.npz --weights readme.md', 'readme.md has not the sha256 6726825d0af5f729cebd5821db510b11b1cfad8'),
])
def test_bad_input_of_fid_is_one_line(argv, message, small, monkeypatch, tmp_path, capfd):
    bad_inputs()
    if '--weights' in argv:
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    line = refuses(capfd, *argv.split(), *([] if '--ref' in argv else ['--ref', 'ref.npz']))
    assert message in line and 'Traceback' not in line, line


def test_statistics_pickles_run_nothing(tmp_path, capfd):
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/owned',)
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps(dict(fid=Evil())))
    with pytest.raises(SystemExit) as end: fid.read_statistics(tmp_path / 'x.pkl')
    assert end.value.code == 2 and 'which no statistics need' in capfd.readouterr().err
    for name in ('mu', 'meta', 'features'):
        np.savez(tmp_path / 'x.npz', **{**dict(mu=np.zeros(4), sigma=np.eye(4)), name: np.array([Evil()], object)})
        with pytest.raises(SystemExit): fid.read_statistics(tmp_path / 'x.npz')
        assert 'x.npz cannot be read' in capfd.readouterr().err
    assert not (tmp_path / 'owned').exists()


def test_duplicates_and_few_images_are_said(small, capfd):
    arrays(twice=np.concatenate([pictures(20, 8, 2)] * 2))
    _, err = score(capfd, 'twice.npz', '--ref', 'ref.npz')
    assert 'twice.npz: 20 of 40 images are duplicates' in err and '40 images bias the distance upwards' in err
    assert 'ref.npz: ' not in err.replace('ref.npz: 40 of 40', '')


# ---- weights, references, output

def test_without_weights_and_network_the_error_says_everything(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arrays(a=pictures(4, 8), c=pictures(4, 32))
    def no_network(*args, **kw): raise OSError('no network here')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    line = refuses(capfd, 'a.npz', '--ref', 'a.npz')
    for part in ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-',
                 'put it at datasets/pt_inception-2015-12-05-6726825d.pth', 'no network here'):
        assert part in line, part
    line = refuses(capfd, 'c.npz')      # 32 x 32: EDM's CIFAR-10 statistics
    assert 'https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz' in line


def test_weights_are_checked_loaded_and_folded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, url = fid.Inception(), fid.WEIGHTS['inception'][0]
    torch.save(net.state_dict(), 'w.pth')
    digest = hashlib.sha256(Path('w.pth').read_bytes()).hexdigest()
    monkeypatch.setitem(fid.WEIGHTS, 'inception', (url, digest))
    Path('datasets').mkdir()
    Path('datasets', url.rsplit('/', 1)[1]).write_bytes(Path('w.pth').read_bytes())
    for weights in ('w.pth', ''):
        loaded, label = fid.network(settings(weights=weights))
        assert label == digest[:8] and torch.equal(loaded.fc.weight, net.fc.weight)
        assert loaded.Mixed_7c.branch_pool.bn is None and loaded.Mixed_7c.branch_pool.conv.bias is not None


def test_the_reference_follows_from_the_size_of_the_samples(small, capfd, monkeypatch):
    monkeypatch.setattr(fid, 'glyphs', lambda: (tensor(pictures(60, 16, 5)), None))
    arrays(s=pictures(40, 16))
    result, _ = score(capfd, 's.npz', '--model', 'inception')
    assert result['reference'] == 'glyphs' and result['reference_n'] == 60
    assert Path('datasets/glyphs.npz.inception-tf.fid').exists()
    np.savez('datasets/cifar10-32x32.npz', mu=np.zeros(15), sigma=np.eye(15))
    arrays(s=pictures(40, 32))
    assert 's.npz holds 40 images, fewer than 50000' in refuses(capfd, 's.npz')
    assert score(capfd, 's.npz', '--num', 40)[0]['reference'] == 'cifar10'
    statistics, urls, fetch = dict(mu=np.zeros(15), sigma=np.eye(15)), [], fid.fetch
    Path('datasets/img64.pkl').write_bytes(pickle.dumps(dict(num_images=9, fid=statistics)))         # EDM2's
    monkeypatch.setattr(fid, 'fetch', lambda url, *sha256: urls.append(url) or fetch(url, *sha256))
    arrays(s=pictures(40, 64))
    assert score(capfd, 's.npz', '--num', 40)[0]['reference'] == 'imagenet64'
    assert 'https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img64.pkl' in urls
    arrays(s=pictures(40, 24))
    assert 'the samples are 24 x 24: name what to compare them with by --ref' in refuses(capfd, 's.npz')


def test_table_is_aligned_marks_the_best_and_not_across_numbers():
    def row(name, values, n, p):
        k = len(values)
        return dict(model=[name], FID=values, IS=[None] * k, precision=[p] * k, share_min=[p] * k, n=[n] * k)
    text = fid.table([row('a', [3.0, 1.0, 2.0], 50000, 0.7), row('longer', [1.5] * 3, 50000, 0.6)])
    head, a, longer = text.splitlines()
    assert head.split() == ['model', 'FID', 'precision', 'share_min', 'n'] and len(a) == len(longer)
    assert '2.000 +- 1.000 (min 1.000) ' in a and '1.500 +- 0.000 (min 1.500)*' in longer
    assert '0.700)*' in a and '0.600)*' not in longer and text.count('*') == 2
    assert '*' not in fid.table([row('a', [3.0], 100, 0.7), row('b', [1.5], 200, 0.6)])
    assert '*' not in fid.table([row('a', [3.0], 100, 0.7)])


def test_a_comparison_of_runs_leaves_table_contact_sheet_and_curves(small, capfd):
    for k, name in enumerate(('ect', 'tcm')):
        run_at = Path('runs', name)
        run_at.mkdir(parents=True)
        torch.save({}, run_at / 'latest.pt')
        np.savez(run_at / 'samples.npz', arr_0=pictures(40, 8, k))
        rows = (f'{s},{"diffusion" if s < 5 else "stage 2"},{1 / s + k},{0 if s in (3, 8) else s},1e-3,9,0\n'
                for s in range(1, 9))
        (run_at / 'log.csv').write_text('step,phase,loss,grad_norm,lr,images_per_second,skipped\n' + ''.join(rows))
    fid.main('runs/ect runs/tcm/samples.npz --ref ref.npz'.split())             # a run folder stands for its samples
    out = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:3]] == ['model', 'runs/ect', 'runs/tcm'] \
        and out[1].count('*') + out[2].count('*') >= 4
    for part in ('reference ref.npz', 'weights 6726825d', 'resize tf', 'reference_n 40'): assert part in out[3]
    picture = np.asarray(Image.open('fid-samples.png'))
    first = pictures(40, 8, 1)[0].repeat(6, 0).repeat(6, 1)                     # second row, first image, enlarged
    y, left = 6 + 48 + 6, picture.shape[1] - 16 * 48
    assert (picture[y:y + 48, left:left + 48] == first).all() and picture.shape[0] == 3 * 54 + 6
    plot = np.asarray(Image.open('fid-curves.png'))
    for colour in ((0x1f, 0x6f, 0xb4), (0xd9, 0x5f, 0x02)):
        drawn = (plot == colour).all(-1)
        assert drawn.sum() > 200 and not drawn[:, 308:400].any()                # from pass 12 of 32 to 17
        assert drawn[:, 300:308].any() and drawn[:, 400:408].any()
    np.savez('runs/ect/again.npz', arr_0=pictures(40, 8, 5))
    files = [f'runs/{r}.npz' for r in ('ect/samples', 'tcm/samples', 'ect/again')]
    assert [len(r['FID']) for r in score(capfd, *files, '--ref', 'ref.npz', '--mean')[0]['models']] == [2, 1]


def test_a_read_only_folder_costs_the_cache_and_says_so(small, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda *a: False)
    _, err = score(capfd, 'ref.npz', '--ref', 'ref.npz')
    assert 'is read-only' in err and not list(tmp_path.glob('*.fid'))


def test_fid_runs_as_a_user_starts_it_and_two_processes_give_the_statistics_of_one(classifier):
    arrays(a=fid.glyphs(16, 51, 5)[0].permute(0, 2, 3, 1), b=pictures(40, 16, 2))
    done = run('fid', *'a.npz --model digits --ref b.npz --gpus 2 --device cpu --batch 3'.split())
    assert done.returncode == 0 and 'Warning' not in done.stderr and 'a.npz: 51 of 51 ' in done.stderr, done.stderr
    head, row, about = done.stdout.splitlines()
    assert head.split() == 'model FD-digits sure share_min share_max colour_min colour_max n'.split()
    features = [fid.digits()(fid.load_images(path))[0].numpy() for path in ('a.npz', 'b.npz')]
    for name, expected in zip('ab', features):
        np.testing.assert_allclose(np.load(f'{name}.npz.digits.fid')['features'], expected, rtol=1e-3, atol=1e-4)
    assert float(row.split()[1]) == pytest.approx(singular_value_distance(*features), rel=1e-3)


@pytest.mark.parametrize('name, passes', [('ct', [4]), ('ict', [4]), ('ect', [3, 4]), ('sct', [3, 4]), ('scm', [3, 4]),
                                          ('tcm', [3, 4, 5])])
def test_a_step_costs_as_many_passes_as_the_readme_counts(name, passes):
    """Operations of convolutions and products in a step of each phase, over those of a forward pass."""
    cfg = config(name, '--steps', 30, *['--warmup', 10] * (len(passes) > 1), *['--stage1', 10] * (name == 'tcm'))
    net = MODULES[name].UNet(cfg)
    loss, (x, z), u = MODULES[name].Loss(net, cfg, None), torch.randn(2, 4, 3, 16, 16), torch.rand(4)
    def operations(work):
        with FlopCounterMode(display=False) as counter: work()
        return counter.get_total_flops()
    one = operations(lambda: net(x, u))
    for phase, count in enumerate(passes):
        step = 10 * phase if len(passes) > 1 else 0
        if name == 'sct': cfg.refs = 1.0
        assert operations(lambda: loss(x, None, u, z, step).sum().backward()) / one == pytest.approx(count, rel=0.01)


@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_the_comparison_in_the_readme_runs_at_a_toy_budget(classifier, tmp_path, capfd):
    """Its commands, as bash expands them, on networks of 8 channels."""
    block = re.search(r'```\n(for P in .*?)```', (HERE / 'README.md').read_text(), re.S)[1]
    toy = block.replace('3000 12000', '120').replace('0 1 2;', '0;').replace('10000', '20')
    assert toy.count('120') == toy.count('in 0;') == toy.count('20 --nfe') == 1
    said = subprocess.run(['bash', '-euc', f'''python() {{
    if [ "$1" = -c ]; then {sys.executable} "$@"; else echo "$@"; fi
}}
{toy}'''], capture_output=True, text=True)
    assert not said.stderr
    *commands, last = [line.split() for line in said.stdout.splitlines()]
    small = '--ch 8 --mult 1,2 --attn 4 --device cpu'.split()
    steps = {}
    for script, *argv in commands:
        name = script.removesuffix('.py')
        saved = go(name, *argv, *small * ('--steps' in argv))
        steps[argv[argv.index('--out') + 1]] = saved['step'], saved['config']['ema']
    assert len(steps) == 7 and {ema for _, ema in steps.values()} == {0.8}
    passes = {Path(run).name: 4 * step for run, (step, _) in steps.items()} | {
        'diffusion': 3 * steps['runs/120/0/diffusion'][0],
        'tcm': 4 * 9 + 5 * (steps['runs/120/0/tcm'][0] - 9)}
    tuned = passes['diffusion']
    assert {passes['ct'], passes['ict']} == {120} == {tuned + passes[m] for m in ('ect', 'sct', 'scm')}
    assert tuned + passes['tcm'] == pytest.approx(120, abs=4)
    text = (HERE / 'README.md').read_text()
    claims = text[text.index('What the papers claim'):text.index('Two claims are')]
    ablations = re.findall(r'`(\w+)\.py (--[^`]*)`', claims)
    assert len(ablations) >= 9
    for name, flags in ablations: config(name, *re.sub(r'\$(T|\(\(.*?\)\))', '100', flags).split())

    snippet = re.search(r'python - << END\n(.*?)END\n', text, re.S)[1]
    for before, after in (('in 0, 1, 2', 'in 0,'), ('12000', '120'), ('1800', '18'), ('24)', '2)'), ('4000', '40'),
                          (" 'tcm-stage1',", '')):
        assert before in snippet
        snippet = snippet.replace(before, after)
    done = subprocess.run([sys.executable, '-'], input=snippet, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(HERE)})
    assert done.returncode == 0, done.stderr
    figures = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(figures) == 3 + 2 * 3 and min(figures) > 0
    assert last == ['fid.py', 'runs/*/*-[12]/*.npz', '--mean']
    found, _ = score(capfd, *sorted(Path().glob(last[1])), '--mean')
    assert [len(row['sure']) for row in found['models']] == [1] * 12


if __name__ == '__main__':
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
