# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.10", "numpy", "pillow>=10.1", "scipy", "pytest"]
# ///
"""
Tests of all scripts: pytest test_all.py takes minutes on a laptop's CPU; pytest -k slow test_all.py, hours.
Each test's name is a claim. A method of your own is one more entry of METHODS: the frame's tests run on it.
"""
import argparse, ast, contextlib, difflib, functools, gc, hashlib, importlib, inspect, io
import itertools, json, math, multiprocessing, os, pickle, pickletools, re, shutil, signal, subprocess
import sys, tarfile, tempfile, threading, time, types, zipfile, zlib
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.distributed.run import parse_args
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(int(os.environ.get('THREADS', 1)))        # the networks here are tiny
close, nn = torch.testing.assert_close, torch.nn
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

Method = namedtuple('Method', 'phases own')
METHODS = {     # name: (flags with which ten steps pass through all phases, names whose text is its own)
    'ct': Method('--metric l2', {'UNet', 'write_samples'}),
    'ict': Method('', {'UNet'}),
    'ect': Method('--warmup 4 --lr_warmup 1e-3', set()),
    'sct': Method('--warmup 4 --lr_warmup 1e-3', {'write_samples'}),
    'scm': Method('--warmup 4 --lr_warmup 1e-3 --opt_warmup Adam --dropout_warmup 0 --H 4',
                  {'Block', 'MPBlock', 'UNet', 'write_samples'}),
    'tcm': Method('--warmup 3 --lr_warmup 1e-3 --stage1 3 --lr_stage1 1e-3', set()),
}
COMMON = {'CONFIG', 'CHOICES', 'SIGNED', 'f', 'Loss', 'sample'}           # own in all
TINY = '--ch 8 --mult 1,2 --blocks 1 --attn 4 --batch 8 --log_every 2 --dropout 0 --lr 1e-3'.split()
MODULES = {name: importlib.import_module(name) for name in METHODS}
fid = importlib.import_module('fid')
ct, ict, ect, sct, scm, tcm = (MODULES[name] for name in 'ct ict ect sct scm tcm'.split())

GOLDEN = HERE / '.ci' / 'golden'        # outputs of the official code: see the first test
SHARED = HERE.parent / 'shared'         # what is too large to travel with the project
GPU = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
needs_gpu = pytest.mark.skipif(GPU.type == 'cpu' and 'GPU_CHECK' not in os.environ,
                               reason='needs a GPU (GPU_CHECK=cpu tries the check itself without one)')
slow = pytest.mark.skipif(not any('slow' in word for word in sys.argv), reason='slow: pytest -k slow')
every_method = pytest.mark.parametrize('name', METHODS)

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def pictures(n=40, side=8, seed=0):
    """n smooth random images, uint8 (n, 3, side, side)"""
    small = torch.randint(0, 256, (n, 3, 2, 2), generator=generator(seed)).float()
    return nn.functional.interpolate(small, (side, side), mode='bilinear').round().to(torch.uint8)

def saved(path, images, labels=None):
    """A data file -> path"""
    torch.save((images, labels), path)
    return path

@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A data file of 40 pictures, ten of each of 4 classes -> path"""
    return saved(tmp_path_factory.mktemp('data') / 'small.pt', pictures(), torch.arange(40) % 4)

def short(name):
    """Flags of a small network that passes through all phases in ten steps"""
    return [*TINY, *METHODS[name].phases.split()]

def run(name, *argv, env=None, cwd=None, timeout=300):
    """The script as a user starts it -> CompletedProcess"""
    env = os.environ | dict(OMP_NUM_THREADS='1') | (env or {})
    argv = [sys.executable, HERE / f'{name}.py', *map(str, argv)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout)

def go(name, *argv):
    """The script's main in this process -> the checkpoint it left"""
    argv = list(map(str, argv))
    MODULES[name].main(argv)
    return torch.load(Path(argv[argv.index('--out') + 1]) / 'latest.pt', weights_only=True)

def fails(capfd, code, name, *argv):
    """The script's main ends with the exit code and one line on stderr -> that line"""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end: MODULES[name].main(list(map(str, argv)))
    lines = capfd.readouterr().err.strip().splitlines()
    assert end.value.code == code and len(lines) == 1, (end.value.code, lines)
    return lines[0]

def config(name, *argv):
    """Of a run that has not begun"""
    return MODULES[name].config(['--out', f'{tempfile.gettempdir()}/nowhere/run', *map(str, argv)])

def generator(seed): return torch.Generator().manual_seed(seed)

def golden_of(name):
    """The numbers in .ci/golden/name.npz -> {key: tensor}"""
    arrays = np.load(GOLDEN / f'{name}.npz').items()
    return {key: torch.from_numpy(v) for key, v in arrays if v.dtype.kind in 'fiu'}

def pickled(name):
    """Path of a golden pickle. The test skips if it is too large to travel with the project and not there."""
    for folder in (GOLDEN, SHARED / 'golden'):
        if (folder / f'{name}.pkl').exists(): return folder / f'{name}.pkl'
    pytest.skip(f'needs ../shared/golden/{name}.pkl')

def assert_same(a, b, **tolerance):
    """Of two dictionaries of tensors"""
    assert a.keys() == b.keys()
    for key in a: close(a[key], b[key], msg=lambda m: f'{key}: {m}', **tolerance)

def toy(a=0.7, s=1.5, axis=3):
    """The network of the golden losses, a formula. Toy: a is its only weight."""
    return lambda x, c_noise, labels=None: a * torch.tanh(s * x) + 0.1 * x.flip(axis)

class Toy(nn.Module):
    def __init__(self, a, s, axis):
        super().__init__()
        self.a, self.s, self.axis = nn.Parameter(torch.tensor(a)), s, axis

    def forward(self, x, c_noise, labels=None): return toy(self.a, self.s, self.axis)(x, c_noise)

# ------------------------------------------------------------------------------------------ methods

EPS = torch.finfo(torch.float32).eps
CPU = torch.device('cpu')

def uniform(u, other=.99):
    """u (B,) as the level's column of a loss's uniform numbers (B, 2); no boundary sample of tcm's"""
    return torch.stack([u.double(), torch.full_like(u.double(), other)], 1)

def drawn(loss, t):
    """The uniform numbers (B, 2) of which a loss makes lognormal levels t (B,), tcm's within its limits"""
    cfg = loss.cfg
    ends = (cfg.t_min, cfg.t_max) if hasattr(cfg, 't_min') else (1e-99, 1e99)
    low, high, t = (stats.norm.cdf((np.log(s) - cfg.P_mean) / cfg.P_std) for s in (*ends, t.double().numpy()))
    return uniform(torch.from_numpy((t - low) / (high - low)))

def loss_of(name, *argv, net=None, data=None):
    """The loss of a run with these flags, for toy() or another network"""
    return MODULES[name].Loss(net or toy(), config(name, *argv), data)

def random_net(name, *argv):
    """A tiny network with random weights, the same in each call, in float64"""
    net, g = MODULES[name].UNet(config(name, *TINY, '--res', 8, *argv)).double().eval(), generator(0)
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * .3
    return net

def history(monkeypatch, name, *argv):
    """go, but with a checkpoint after each step, without pictures -> {steps done: checkpoint}"""
    m, kept = MODULES[name], {}
    blank, save = lambda cfg, *a: torch.zeros(100, 3, cfg.res, cfg.res, dtype=torch.uint8), m.Run.save
    def keep(self, done):
        save(self, done)
        kept[done] = torch.load(Path(self.cfg.out, 'latest.pt'), weights_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(m, 'generate', blank)
        patch.setattr(m.Run, 'save', keep)
        go(name, *argv, '--save_every', 1)
    return kept

def part(state, prefix):
    """The tensors in a state dictionary whose names begin so -> {rest of the name: tensor}"""
    return {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}

def wide(v): return v.view(-1, 1, 1, 1)

def scalars(*values): return wide(torch.tensor(values, dtype=torch.float64))

def wave():
    """x (4, 3, 4, 4), and (a, b) -> a network F that sees the noise level, of printed official values"""
    x = torch.from_numpy(np.sin(.37 * np.arange(192))).float().view(4, 3, 4, 4)
    return x, lambda a, b: lambda x, c, y=None: a * torch.tanh(x) + b * torch.sin(4 * wide(c))

def test_the_golden_numbers_are_those_that_were_made():
    """The scripts are compared with .ci/golden: inputs and outputs of the official code, EDM 008a4e5, EDM2
    4bf8162, ECT 4311059 (on ImageNet-64 75aa88a), TCM b132239, openai/consistency_models e32b69e. It was run
    once, unchanged, on a CPU in float32, with an array of the file in place of each random draw. Networks of
    the files *_losses.npz are formulas, toy() and toy(.6, 1.4, 2), the latter TCM's student and CT's target;
    others are small, with random weights, pickled by the official code. The source text in such a pickle was
    replaced by a line that raises: nothing in it may run. inception.npz has outputs of pytorch-fid's network
    for weights drawn by a rule, phema.npz EDM2's averages of a walk. All are numbers, no code or weights of
    others. The pickles above a megabyte are in ../shared; without it their tests skip."""
    digest = hashlib.sha256(b''.join(path.read_bytes() for path in sorted(GOLDEN.iterdir())))
    assert digest.hexdigest() == '66ff5a3d639f83247048513924cbc1e8b05e96446edfa60ca6773ed2a8f07995'

# ---------------------------------------------------------------------------- f, its sampler, schedules

@pytest.mark.parametrize('name, shift, flag', [
    *((name, .002, {}) for name in ('ct', 'ict')), *((name, 0, {}) for name in ('ect', 'sct', 'tcm')),
    *((name, .003, dict(shift=.003)) for name in ('ect', 'sct'))])
def test_f_is_edms_preconditioning_shifted_where_the_code_shifts_it(name, shift, flag):
    x, t = torch.randn(5, 3, 8, 8).double(), torch.tensor([.002, .01, .5, 3, 80]).double()
    net = lambda v, c, labels: v.flip(2) + wide(c + labels)
    for levels in (t, wide(t)):
        out = MODULES[name].f(net, x, levels, torch.arange(5), **flag)
        for i, s in enumerate(t.tolist()):
            root = math.sqrt(s * s + .25)
            F = (x[i] / root).flip(1) + math.log(s) / 4 + i
            close(out[i], .25 / ((s - shift)**2 + .25) * x[i] + .5 * (s - shift) / root * F)

@pytest.mark.parametrize('name', ['ect', 'sct'])
def test_f_has_the_sums_of_the_official_evaluation(name):
    (x, net), t = wave(), torch.tensor([.003, .1, .821, 80])
    sums = MODULES[name].f(net(.5, .1), x.double(), t, shift=.003).sum((1, 2, 3))
    np.testing.assert_allclose(sums, [1.87829, 2.424541, -.09264047, -2.276827], rtol=1e-5)

@pytest.mark.parametrize('name, t_min, limit, flag', [
    ('ect', 0, math.inf, dict(shift=.003)), ('sct', 0, math.inf, dict(shift=.003)), ('tcm', 0, math.inf, {}),
    ('ct', .002, 1, {}), ('ict', .002, 1, {})])
def test_sampler_is_its_formula(name, t_min, limit, flag):
    """f of noise, then of its result with fresh noise up to each level; of ct and ict within [-1, 1] and from
    t_min, where a further step changes nothing; of ect and sct with CIFAR-10's shift, unless cfg has none."""
    m, cfg, (z, a, b) = MODULES[name], config(name, '--data', 'cifar10'), torch.randn(3, 2, 3, 8, 8).double()
    f = lambda x, t: m.f(toy(), x, x.new_full((2,), t), **flag).clamp(-limit, limit)
    x, sample = f(80 * z, 80.), lambda ts, *noise: m.sample(toy(), z, ts, None, noise, cfg)
    close(sample([80.]), x)
    three = f(f(x + (5**2 - t_min**2)**.5 * a, 5.) + (.821**2 - t_min**2)**.5 * b, .821)
    close(sample([80., 5., .821], a, b), three)
    if t_min: close(sample([80., t_min], a), x, rtol=0, atol=1e-6)
    if flag: assert (m.sample(toy(), z, [80., 5., .821], noise=[a, b]) - three).abs().max() > 1e-4

@pytest.mark.parametrize('column, data', [*enumerate(['glyphs', 'cifar10', 'imagenet64'])])
@every_method
def test_a_third_of_a_recipe_the_recipe_and_three_times_it_train_in_every_step(name, column, data, capfd):
    """Over the whole schedule, with a warm-up and without: noise levels are finite, float32 tells t from r,
    learning rates and decays are such, and the last phase begins; or the run is refused in one line."""
    u = torch.cat([torch.linspace(0, 1, 300)[1:-1], torch.logspace(-9, -3, 9), 1 - torch.logspace(-7, -3, 9)])
    u, whole, net = torch.stack([u.double(), torch.arange(len(u)) % 4 / 4 + .1], 1), {}, Toy(.6, 1.4, 2)
    steps, metric = config(name, '--data', data).steps, ['--metric', 'l2'] * (name == 'ct')
    for n, init in itertools.product((steps, steps // 3, 3 * steps), ('none', 'x.pkl')):
        try: loss = loss_of(name, '--data', data, '--init', init, '--steps', n, *metric, net=net)
        except SystemExit as end:       # of a third, whose warm-up takes more
            line = capfd.readouterr().err
            assert n < steps and end.code == 2 and re.search(rf'^.*--steps {n}: .* \d+\n$', line), line
            continue
        grid = {round(n * i / 150) for i in range(150)} | {n - 2, n - 1}
        grid |= {loss.phase(s)[1] + i for s in grid for i in (-1, 0, 1)} - {-1}
        names, before = [], {}
        for step in sorted(s for s in grid if s < n):
            phase, first, lr, batch = loss.phase(step)
            names += [phase] if phase not in names else []
            assert first <= step and 0 <= lr < math.inf and (lr > 0 or step == first) and batch >= 1
            assert all(0 <= decay <= 1 for _, decay in loss.averages(net, step))
            if phase == 'diffusion': continue
            levels = loss.levels(u, step)
            t, r = levels if isinstance(levels, tuple) else (levels, 0 * levels)
            assert t.isfinite().all() and (t.float() > r.float()).all() and (r >= 0).all(), (step, n, init)
            if name in ('ect', 'sct', 'tcm'): assert (r >= before.get(phase, 0)).all()      # never falls
            before[phase] = r
        assert names == whole.setdefault(init, names) and names[-1] == loss.phase(10**9)[0]
        assert (names[0] == 'diffusion') == bool(getattr(loss.cfg, 'warmup', 0))

@pytest.mark.parametrize('command, words', [
    ('ct --metric l2 --s0 9 --s1 8', '--s0 9'), ('ct --metric l2 --t_max .002', '--t_max 0.002'),
    ('ct --metric l2 --mu0 1', '--mu0 1'), ('ct --metric l2 --mu 1', '--mu 1'), ('ict --s0 0', '--s0 0'),
    ('ect --q 1', '--q 1'), ('sct --q .5', '--q 0.5'), ('tcm --q 1', '--q 1'), ('sct --refs 5', '--refs 5'),
    ('sct --edges 2,1', '--edges'), ('sct --edges 0,1', '--edges'), ('scm --ts 2,1', '--ts'),
    ('tcm --t_max 1', '--t_transition'), ('tcm --boundary_prob 1', '--boundary_prob 1')])
def test_a_method_refuses_in_one_line_what_has_no_meaning_in_it(command, words, capfd):
    name, *argv = command.split()
    with pytest.raises(SystemExit) as end: loss_of(name, *argv)
    line = capfd.readouterr().err
    assert end.value.code == 2 and line.count('\n') == 1 and line.startswith(f'{name}.py: {words}'), line

@pytest.mark.parametrize('name', ['ect', 'sct'])
@pytest.mark.parametrize('argv, length', [
    ('--data cifar10', 50_000), ('--data cifar10 --steps 200000', 25_000), ('--data imagenet64', 25_000),
    ('--data cifar10 --q 256 --steps 8000', 8000), ('--data imagenet64 --init none', 12_500),
    ('--data cifar10 --steps 211', 211 / 8), ('--steps 20000', 17_000 / 8), ('--double 300', 300),
    ('--init x.pkl', 6500 / 8), ('--double 7', 7), ('--steps 4000 --q 3', 1000 * math.log(3, 256))])
def test_stages_of_ect_end_at_n_over_256_however_long_the_run(name, argv, length):
    """25,000 steps a stage are printed for 200k on CIFAR-10, and for 100k on ImageNet-64."""
    loss, u = loss_of(name, *argv.split()), uniform(torch.linspace(.01, .99, 99))
    t, r = loss.levels(u, loss.cfg.steps - 1)
    last = loss.cfg.q**math.ceil(math.log(256, loss.cfg.q))             # 256, unless q is no root of it
    close(1 - r / t, (1 + 8 * torch.sigmoid(-t)) / last)
    begins = [loss.cfg.warmup + math.ceil(a * length) for a in range(math.ceil(math.log(256, loss.cfg.q)))]
    levels = [loss.levels(u, s)[1][-1].item() for begin in begins for s in (begin - 1, begin)]
    assert abs(loss.double - length) < 1e-6 and len({*levels[1:]}) == len(begins)

STUDENT = stats.t(.01, 0, .2)           # of ln t in tcm's second stage, between 1 and 80

@pytest.mark.parametrize('name, data, step, cdf', [
    ('ect', 'cifar10', 0, stats.norm(-1.1, 2).cdf), ('sct', 'imagenet64', 0, stats.norm(-.8, 1.6).cdf),
    ('tcm', 'cifar10', 0, stats.truncnorm((math.log(.002) + 1.1) / 2, (math.log(80) + 1.1) / 2, -1.1, 2).cdf),
    ('tcm', 'cifar10', 250_000, lambda v: (STUDENT.cdf(v) - .5) / (STUDENT.cdf(math.log(80)) - .5)),
    ('scm', 'cifar10', 0, stats.norm(-1.2, 1.2).cdf), ('scm', 'cifar10', 400_000, stats.norm(-1, 1.4).cdf),
    ('scm', 'imagenet64', 0, stats.norm(-.8, 1.6).cdf),
    ('scm', 'imagenet64', 1_048_576, stats.norm(-1, 1.6).cdf)])
def test_levels_are_drawn_from_the_papers_law(name, data, step, cdf):
    u = (torch.arange(4000).double() + .5) / 4000
    t = loss_of(name, '--data', data).levels(uniform(u), step)
    sigma = .5 * t.tan() if name == 'scm' else t[0]
    np.testing.assert_allclose(cdf(sigma.log()), u, atol=1e-6)
    assert sigma.dtype == torch.float64 and (name != 'tcm' or sigma.max() <= 80)

def test_tcm_draws_boundary_samples_with_a_coin_of_their_own():
    loss, u = loss_of('tcm', '--data', 'cifar10'), (torch.arange(4000).double() + .5) / 4000
    t, r = loss.levels(uniform(u), loss.stage2)
    official = [1.00604, 1.04298, 1.22115, 2.52355, 24.6497]        # quantiles of the official code's draw
    np.testing.assert_allclose(np.quantile(t, [.05, .25, .5, .75, .95]), official, rtol=5e-3)
    assert abs(float(t[r >= 1].min()) - 1.0031566) < 2e-4
    both, boundary = loss.levels(torch.stack([u, u.flip(0)], 1), loss.stage2), u.flip(0) < .25
    assert torch.equal(both[0], torch.where(boundary, 1., t)) and (both[1][boundary] < 1).all()

def test_stages_of_tcm_follow_each_other():
    loss = loss_of('tcm', *'--data cifar10 --init none --warmup 10 --stage1 20 --steps 60'.split())
    assert [loss.phase(s) for s in (9, 10, 29, 30)] == [
        ('diffusion', 0, 5e-4, 512), *[('stage 1', 10, 1e-4, 512)] * 2, ('stage 2', 30, 5e-5, 1024)]
    loss = loss_of('tcm', '--data', 'imagenet64')
    assert loss.phase(0)[2:] == (1e-3, 2048) and loss.phase(8000)[2] == 5e-4
    assert abs(loss.phase(loss.stage2 + 78_000)[2] - 5e-4 / 4) < 1e-12      # lr decays on over both stages

@pytest.mark.parametrize('data', ['cifar10', 'imagenet64'])
def test_stage_2_of_a_given_checkpoint_goes_on_where_its_stage_1_ended(data, capfd):
    """Levels, learning rate and power-form average of the whole run, whatever came before --init"""
    argv, u = ['--data', data, '--init', 'x.pkl'], uniform(torch.linspace(.01, .99, 99), .2)
    whole = loss_of('tcm', *argv)
    rest = loss_of('tcm', *argv, '--stage1', 0, '--before', whole.stage2)
    for step in (0, 1, 20_000, 100_000):
        a, b = ([*torch.stack(m.levels(u, s)).tolist(), m.phase(s)[::2], m.averages(None, s)[0][1]]
                for m, s in ((rest, step), (whole, whole.stage2 + step)))
        assert a == b
    with pytest.raises(SystemExit): loss_of('tcm', *argv, '--stage1', 0, data=(torch.zeros(1), None))
    assert 'say with --before how many steps of stage 1' in capfd.readouterr().err

def test_stage_2_of_tcm_starts_from_averages_of_stage_1_and_keeps_them_frozen(data, tmp_path, monkeypatch):
    argv = ['--data', data, *short('tcm'), '--ema', .5, '--steps', 8, '--out', tmp_path]
    kept = history(monkeypatch, 'tcm', *argv)                   # warm-up 3, stage 1 3
    average, after = kept[6]['ema'], kept[8]['loss']
    assert {float(s['step']) for s in kept[8]['opt']['state'].values()} == {2}  # its optimiser is a new one
    assert_same(part(after, 'teacher.'), average, rtol=0, atol=0)
    moved = [(after[f'net.{k}'] - average[k]).abs().max() for k in average]
    assert 0 < max(moved) < .02         # two steps of lr 1e-3 away

@pytest.mark.parametrize('name', ['ect', 'sct', 'scm', 'tcm'])
def test_power_form_averages_are_the_official_codes(name):
    """Decays of the printed steps, and the average of a walk of weights, whatever the warm-up before it."""
    v = golden_of('phema')
    losses = [loss_of(name, '--ema_gamma', gamma, '--warmup', 30) for gamma in v['exps'].tolist()]
    decays = [[loss.averages(None, 30 + k)[0][1] for k in (v['steps'] - 1).tolist()] for loss in losses]
    np.testing.assert_allclose(decays, v['betas'], rtol=0, atol=1e-8)
    for i, std in enumerate(v['walk_stds']):
        loss, ema = losses[(v['stds'] - std).abs().argmin()], torch.full_like(v['walk'][0], 99.)
        for step, weights in enumerate(v['walk']):
            ema = ema.lerp(weights, 1 - loss.averages(None, 30 + step)[0][1])
            close(ema, v['walk_emas'][step, i], rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('name, more, stages', [
    ('ect', [], [2, 1.8, 1.62, 1.6, .8, .02]),
    ('tcm', ['--lr_stage1', 1e-3, '--stage1', 20], [1, .5, .05, 2, 1, .025])])
def test_learning_rate_anneals_to_zero_in_each_stage(name, more, stages):
    loss = loss_of(name, *'--anneal 1 --warmup 10 --steps 110 --lr 2e-3 --lr_warmup 4e-3'.split(), *more)
    got = [loss.phase(s)[2] for s in (0, 9, 10, 20, 29, 30, 70, 109)]
    np.testing.assert_allclose(got, [.004, .004, *(v / 1000 for v in stages)])

# ---------------------------------------------------------------------------------- losses of ect and tcm

def agree_but_for_cancellation(value, expected, w, roundings=8):
    """Both are w |f(x_t) - f(x_r)|. In float32 each f, of about unit size, is off by some roundings, so
    their small difference is too."""
    apart = (value.double() - expected.double()).abs()
    assert (apart <= 1e-5 * expected + roundings * EPS * w).all(), value / expected - 1

def agree_with_official(loss, v, t, r, step, expected):
    """In float64, so that all rounding is the official code's, the same on every machine; then in float32."""
    w, x, z = loss.weight(t, r), v['x'], v['eps']
    exact = loss.pair(x.double(), None, z.double(), t, r, step)
    agree_but_for_cancellation(exact, expected, w)
    agree_but_for_cancellation(loss.pair(x, None, z, t, r, step), exact, w, 16)

@pytest.mark.parametrize('c', [0., .03])
@pytest.mark.parametrize('q, stage', [(2, 0), (2, 1), (2, 3), (2, 7), (256, 0)])
def test_ect_loss_agrees_with_the_official_code(q, stage, c):
    v, step = golden_of('ect_losses'), stage * 25_000
    loss = loss_of('ect', '--data', 'cifar10', '--q', q, '--c', c, '--double', 25_000)
    u = drawn(loss, v['ect_t'])
    t, r = loss.levels(u, step)
    close(r.float(), v[f'ect_q{q}_s{stage}_r'], rtol=1e-5, atol=1e-7)
    agree_with_official(loss, v, t, r, step, v[f'ect_q{q}_s{stage}_c{c}_loss'])
    assert torch.equal(loss(v['x'], None, u, v['eps'], step), loss.pair(v['x'], None, v['eps'], t, r, step))

def test_tcm_losses_agree_with_the_official_code():
    v, first = golden_of('tcm_losses'), loss_of('tcm', '--data', 'cifar10')
    def check(loss, t, stage, expected):                        # from stage 9 on the ratio is at its limit
        t, r = first.levels(drawn(first, t), min(stage, 9) * 25_000)
        agree_with_official(loss, v, t, r, stage * 25_000, expected)
    for stage in (0, 3, 12): check(first, torch.exp(2 * v['normal'] - 1.1), stage, v[f'tcm1_s{stage}_loss'])
    for stage, (kind, flags) in itertools.product((0, 3, 9), dict(
            default='--weight 1/(t-r) --c 1e-8', cout_sq='--weight 1/c_out^2 --c .06').items()):
        loss = loss_of('tcm', *f'--data cifar10 --stage1 0 {flags}'.split(), net=toy(.6, 1.4, 2))
        loss.teacher, key = toy(), f'tcm_s{stage}_{kind}'
        check(loss, torch.cat([torch.ones(2), v[f'{key}_t']]), stage,
              torch.cat([v[f'{key}_boundary'], v[f'{key}_loss']]))

@pytest.mark.parametrize('q, stage, c, official', [
    (2, 0, 0., [.0774222, 6.787966, 7.51666, 3.612115]),
    (2, 3, 0., [.04572298, 7.451389, 7.594917, 2.300768]),
    (256, 0, 0., [.04394069, 7.553102, 7.587823, 1.956249]),
    (2, 3, .06, [.007719982, 6.415124, .6349387, 2.020987])])
def test_ect_loss_by_hand(q, stage, c, official):
    """A scalar derivation, and official values"""
    (x, net), g = wave(), generator(0)
    normal, z = torch.randn(4, generator=g).double(), torch.randn(4, 3, 4, 4, generator=g).double()
    loss = loss_of('ect', '--data', 'cifar10', '--q', q, '--c', c, '--double', 25_000, net=net(.5, .1))
    value = loss(x.double(), None, uniform(torch.special.ndtr(normal)), z, stage * 25_000)
    def D(v, s):
        if not s: return v
        root = math.sqrt(s * s + .25)
        return .25 * v / root**2 + .5 * s / root * (.5 * math.tanh(v / root) + .1 * math.sin(math.log(s)))
    for b, t in enumerate(torch.exp(2 * normal - 1.1).tolist()):
        r = max(0, t * (1 - (1 + 8 / (1 + math.exp(t))) / q**(stage + 1)))
        values = zip(x[b].flatten().tolist(), z[b].flatten().tolist())
        S = sum((D(v + t * e, t) - D(v + r * e, r))**2 for v, e in values)
        assert abs((math.sqrt(S + c * c) - c) / (t - r) / value[b] - 1) < 1e-9
        agree_but_for_cancellation(value[b], torch.tensor(official[b]), 1 / (t - r))
    t = scalars(.3, 2)
    for m in ('ect', 'sct', 'tcm'): close(loss_of(m, '--data', 'imagenet64').weight(t, t / 2), 1 / t**2 + 4)

@pytest.mark.parametrize('name', ['ect', 'sct', 'tcm'])
def test_warmup_is_edms_loss(name):
    (x, z), u = torch.randn(2, 2, 3, 8, 8).double(), torch.tensor([.5, .9]).double()
    t = torch.from_numpy(np.exp(-1.2 + 1.2 * stats.norm.ppf(u)))
    error = MODULES[name].f(toy(), x + wide(t) * z, t) - x
    expected = (t**2 + .25) / (.5 * t)**2 * error.square().mean((1, 2, 3))
    close(loss_of(name, '--warmup', 5)(x, None, uniform(u), z, 4), expected)

@pytest.mark.parametrize('name, argv', [('ict', ['--c', 0]), ('ect', []), ('sct', ['--refs', 1]),
                                        ('tcm', ['--stage1', 0, '--c', 0])])
def test_gradient_flows_through_f_at_t_alone(name, argv):
    net, f, h = Toy(.6, 1.4, 2).double(), MODULES[name].f, 1e-5
    loss, (x, z) = loss_of(name, '--data', 'cifar10', *argv, net=net), torch.randn(2, 4, 3, 8, 8).double()
    t, r = torch.tensor([3, 4, 9, 70]).double(), torch.tensor([1.1, 1.5, 4, 40]).double()
    loss.pair(x, None, z, t, r, 0).mean().backward()
    target = f(net, x + wide(r) * z, r).detach()
    def value(a):
        distance = (f(toy(a, 1.4, 2), x + wide(t) * z, t) - target).flatten(1).norm(dim=1)
        return float((distance / (t - r)).mean())
    a = net.a.item()
    close(net.a.grad.item(), (value(a + h) - value(a - h)) / 2 / h, rtol=1e-6, atol=0)
    assert name != 'tcm' or loss.teacher.a.grad is None

@pytest.mark.parametrize('name, argv', [
    ('ict', ''), ('ect', '--warmup 0 --weight 1/(t-r)'), ('sct', '--warmup 0 --weight 1/(t-r) --refs 1'),
    ('tcm', '--warmup 0 --weight 1/(t-r) --stage1 0 --t_transition 2')])
def test_student_and_target_share_dropout_masks(name, argv):
    """As r nears t outputs near each other if the dropout masks are equal, the frozen network's too."""
    net, (x, z) = random_net(name, '--dropout', .5, *argv.split()).train().float(), torch.randn(2, 4, 3, 8, 8)
    loss, t = loss_of(name, *argv.split(), net=net), torch.tensor([1., 1.5, 3, 60]).double()
    distance = lambda gap: loss.pair(x, None, z, t, t * (1 - gap), 10**6) * t * gap
    assert (distance(1e-6) < .01 * distance(.01)).all()
    net.eval()                          # without dropout the student differs from a teacher that keeps it
    if name == 'tcm': assert distance(1e-6)[:2].min() > .1 * distance(.01)[:2].min()

def test_tcm_weighs_the_two_means_as_the_paper():
    """Stratified u: the mean is that of ordinary samples + w_boundary times that of boundary samples."""
    u, (x, z) = (torch.arange(64).double() + .5) / 64, torch.randn(2, 64, 3, 8, 8)
    loss, u = loss_of('tcm', '--data', 'cifar10', '--stage1', 0, net=toy(.6, 1.4, 2)), torch.stack([u, u], 1)
    loss.teacher = toy()
    t, r = loss.levels(u, 0)
    each = loss.pair(x, None, z, t, r, 0)
    close(loss(x, None, u, z, 0).mean(), each[16:].mean() + .1 * each[:16].mean())
    loss.teacher = toy(0.)              # only targets with r < t' come from it
    changed = loss.pair(x, None, z, t, r, 0) != each
    assert (changed == (r < 1)).all() and changed.sum() > 16 and not changed.all()

# ---------------------------------------------------------------------------------------------- ct and ict

def ct_loss(*argv, net=None): return loss_of('ct', '--data', 'cifar10', '--metric', 'l2', *argv, net=net)

def test_ct_schedules_are_the_codes():
    """N(k), mu(k) on CIFAR-10; on ImageNet-64 printed values, and the paper's mu: N in place of N - 1."""
    v, loss = np.load(GOLDEN / 'ct_schedule_s0_2_s1_150_mu0_0.9_K800k.npz'), ct_loss()
    np.testing.assert_allclose([loss.schedule(int(k))[::-1] for k in v['k']], v['mu_N'], rtol=1e-12)
    loss, ks = ct_loss('--s1', 200, '--mu0', .95), (0, 1, 100, 1000, 10_000, 100_000, 400_000, 800_000)
    table = np.array([[2, .9025, .95], [3, .95, .966382530], [4, .966382530, .974679434],
                      [8, .985451638, .987258545], [23, .995347828, .995549646], [72, .998556162, .998576201],
                      [143, .999277820, .999282869], [201, .999487199, .999489749]])
    got = [(N, mu, mu**((N - 1) / N)) for N, mu in map(loss.schedule, ks)]
    np.testing.assert_allclose(got, table, rtol=1e-8)

@pytest.mark.parametrize('metric, power', [('l1', 1), ('l2', .5)])
@pytest.mark.parametrize('N', [2, 18, 151])
def test_ct_agrees_with_the_official_code(N, metric, power):
    """Up to the power, that of a difference of two f, each off by some roundings of numbers of about 1"""
    v, loss = golden_of('ct_losses'), ct_loss('--metric', metric)
    close(ct.f(toy(), v['f_in'].double(), v['f_t']).float(), v['f_out'], rtol=1e-5, atol=1e-6)
    loss.target, n = toy(.6, 1.4, 2), N - 2 - v[f'ct_N{N}_idx'].double()
    args = None, v['eps'], ct.grid(loss.cfg, n + 1, N), ct.grid(loss.cfg, n, N), 0
    exact, expected = loss.pair(v['x'].double(), *args)**power, v[f'ct_N{N}_{metric}_loss']**power
    close(exact, expected.double(), rtol=1e-5, atol=4 * EPS)
    close(loss.pair(v['x'], *args)**power, exact.float(), rtol=1e-5, atol=8 * EPS)

@pytest.mark.parametrize('cd, official', [(0, (.002330448, .001426676, .01246989, 2.150493e-05)),
                                          (1, (.001478034, .001388875, .008561571, 2.987868e-06))])
def test_ct_loss_and_distillation_have_the_official_values(cd, official):
    (x, net), n = wave(), 16 - torch.tensor([7, 3, 12, 16]).double()
    loss, z = ct_loss(net=net(.5, .1)), torch.from_numpy(np.cos(.73 * np.arange(192))).view(4, 3, 4, 4)
    loss.target, loss.teacher = net(.4, .2), net(.7, -.3) if cd else None
    value = loss.pair(x.double(), None, z, ct.grid(loss.cfg, n + 1, 18), ct.grid(loss.cfg, n, 18), 0)
    close(value, torch.tensor(official).double(), rtol=1e-4, atol=0)

def test_ct_grid_is_karras_and_pairs_are_equally_likely():
    karras = [.002, .0204353, .116639, .469979, 1.50174, 4.06612, 9.7232, 21.1087, 42.4152, 80]
    loss, i = ct_loss('--steps', 1000, '--s0', 9, '--s1', 9), torch.arange(10).double()
    for m in (ct, ict): np.testing.assert_allclose(m.grid(loss.cfg, i, 10), karras, rtol=1e-5)
    t, r = loss.levels(uniform((torch.arange(800) + .5) / 800), 0)
    close(t.unique(), ct.grid(loss.cfg, torch.arange(1, 9).double(), 9))
    assert t.unique(return_counts=True)[1].tolist() == [100] * 8 == r.unique(return_counts=True)[1].tolist()

def test_heun_step_follows_the_ode_of_gaussian_data():
    """Data N(m, s^2): D(x, t) = m + s^2 (x - m) / (s^2 + t^2); the ODE keeps (x - m) / sqrt(s^2 + t^2)."""
    m, s, loss, error = .3, .7, ct_loss(), []
    def teacher(v, c_noise, labels=None):       # the raw network whose preconditioned output is D
        t = wide((4 * c_noise).exp())
        x = v * (t**2 + .25).sqrt()
        return (m + s**2 * (x - m) / (s**2 + t**2) - .25 / (t**2 + .25) * x) * (t**2 + .25).sqrt() / (.5 * t)
    loss.teacher, x, t = teacher, torch.randn(1, 3, 4, 4).double(), scalars(2.)
    for r in (scalars(1.9), scalars(1.95)):
        exact = m + (x - m) * ((s**2 + r**2) / (s**2 + t**2)).sqrt()
        error.append(float((loss.heun(x, t, r, None) - exact).norm() / (x - m).norm()))
    assert error[0] < 1e-5 and 7 < error[0] / error[1] < 9

def test_ct_target_follows_after_the_optimiser_step(data, tmp_path, monkeypatch):
    """target_k+1 = mu(k) target_k + (1 - mu(k)) net_k+1, from target_0 = net_0; the EMA has its own decay."""
    argv = ['--data', data, *TINY, *'--metric l2 --s0 2 --s1 2 --mu0 .25 --ema .9 --steps 2'.split()]
    kept = history(monkeypatch, 'ct', *argv, '--out', tmp_path)
    cfg = argparse.Namespace(**kept[2]['config'])
    target, loss = ct.new_network(cfg).state_dict(), ct.Loss(toy(), cfg, None)
    ema = target
    for k in (0, 1):
        (_, mu), net = loss.schedule(k), part(kept[k + 1]['loss'], 'net.')
        target = {name: mu * v + (1 - mu) * net[name] for name, v in target.items()}
        ema = {name: .9 * v + .1 * net[name] for name, v in ema.items()}
        assert .05 < mu < .6
        assert_same(part(kept[k + 1]['loss'], 'target.'), target, rtol=1e-5, atol=1e-6)
        assert_same(kept[k + 1]['ema'], ema, rtol=1e-5, atol=1e-6)

def test_lpips_against_a_slow_derivation():
    """Random weights in the files' layout; convolutions by unfold in float64; float32 whatever --amp is"""
    plan, vgg, heads, i, cin = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), {}, {}, 0, 3
    for block, (width, depth) in enumerate(plan):
        for _ in range(depth):
            vgg[f'features.{i}.weight'] = torch.randn(width, cin, 3, 3) * (2 / 9 / cin)**.5
            vgg[f'features.{i}.bias'] = torch.randn(width) * .1
            i, cin = i + 2, width
        i += 1
        heads[f'lin{block}.model.1.weight'] = torch.rand(1, width, 1, 1)
    a, b = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    def features(x):
        x = nn.functional.interpolate((x.double() + 1) / 2, (224, 224), mode='bilinear', align_corners=False)
        mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]]).double().view(2, 3, 1, 1)
        x, layers = (x - mean) / std, iter(vgg.values())        # weight, bias, weight, ...
        for block, (width, depth) in enumerate(plan):
            if block: x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
            for weight, bias in ((next(layers).double(), next(layers).double()) for _ in range(depth)):
                h = (weight.flatten(1) @ nn.functional.unfold(x, 3, padding=1)).unflatten(2, x.shape[2:])
                x = (h + bias.view(-1, 1, 1)).clamp(min=0)
            yield x / x.square().sum(1, keepdim=True).sqrt()
    layers = zip(heads.values(), features(a), features(b))
    expected = sum((h.double() * (p - q)**2).sum(1).mean((1, 2)) for h, p, q in layers)
    metric = ct.LPIPS(vgg, heads)
    with torch.autocast('cpu', torch.bfloat16): value = metric(a, b)
    close(value.double(), expected, rtol=1e-4, atol=0)
    assert metric(a, a).abs().max() == 0 and not metric.state_dict()

@pytest.mark.parametrize('kind, keep', [
    ('colour', lambda v: (v * torch.tensor([.2989, .5870, .1140]).view(3, 1, 1)).sum(1)),
    ('inpaint', lambda v: v[..., :4]), ('superres', lambda v: nn.functional.avg_pool2d(v, 2))])
def test_edits_keep_what_is_known(kind, keep):
    y, (A, inverse, known) = torch.rand(3, 3, 16, 16).double() * 1.6 - .8, ct.edit_map(kind, 16)
    close(inverse(A(y)), y, rtol=0, atol=2e-5)                  # orthogonal in float32
    start, x = ct.edit(toy(), y, A, inverse, known, [80., 5., .5, .002], generator=generator(0))
    close(keep(x), keep(y), rtol=0, atol=2e-5)
    assert (x - y).abs().max() > .01 and (start - y).abs().max() > .01
    printed = [[.4471, -.8204, .3564], [.8781, .4785, 0], [.1705, -.3129, -.9343]]          # the paper's
    np.testing.assert_allclose(ct.orthogonal(torch.tensor([.2989, .5870, .1140])), printed, atol=1e-4)

def test_edit_writes_pictures_and_interpolates_on_the_sphere(data, tmp_path):
    go('ct', '--data', data, *short('ct'), '--steps', 2, '--out', tmp_path)
    for kind, columns in dict(inpaint=3, colour=3, superres=3, interpolate=20).items():
        go('ct', '--data', data, '--out', tmp_path, '--sample', 3, '--edit', kind)
        assert Image.open(tmp_path / f'edit-{kind}.png').size == (48 * columns, 48 * 3)
    a, b = (v.flatten() / v.norm() for v in torch.randn(2, 3, 8, 8).double())
    points = torch.stack([ct.slerp(a, b, s) for s in (0., .5, 1.)])
    close(points[::2] @ torch.stack([a, b]).T, torch.stack([a, b]) @ torch.stack([a, b]).T)
    close(points.norm(dim=1), torch.ones(3).double())
    close(points[1] @ a, points[1] @ b)

@pytest.mark.parametrize('name, flag, parts', [('ct', '--cd', ['teacher', 'net', 'target']),
                                               ('scm', '--scd', ['teacher', 'net'])])
def test_distillation_starts_from_its_teacher(name, flag, parts, data, tmp_path, capfd):
    teacher = go('ect', '--data', data, *TINY, '--warmup', 4, '--steps', 4, '--out', tmp_path / 'teacher')
    argv = ['--data', data, flag, 1, *'--batch 4 --lr 1e-12 --steps 2 --out'.split(), tmp_path / 'new']
    if name == 'ct':
        argv += ['--metric', 'l2']
        assert 'name the diffusion model with --init' in fails(capfd, 2, 'ct', *argv)
    after = go(name, *argv, '--init', tmp_path / 'teacher' / 'latest.pt')
    assert after['config']['ch'] == 8 and after['config']['arch'] == 'ddpmpp'
    for prefix in parts: assert_same(part(after['loss'], f'{prefix}.'), teacher['ema'], rtol=0, atol=1e-6)

def test_ict_schedule_proposal_and_weight_are_the_papers():
    loss, u = loss_of('ict', '--data', 'cifar10'), uniform((torch.arange(10**6) + .5) / 10**6)
    doublings = {0: 11, 49_999: 11, 50_000: 21, 100_000: 41, 150_000: 81, 200_000: 161, 250_000: 321,
                 300_000: 641, 350_000: 1281, 399_999: 1281}
    assert {k: loss.schedule(k) for k in doublings} == doublings
    t, r = loss.levels(u, 0)
    p = [.0626329925, .18173698, .245501422, .213494447, .142446058, .0806046217, .0410799062, .0195800922,
         .00894386841, .00397961221]
    np.testing.assert_allclose(r.unique(return_counts=True)[1] / 10**6, p, atol=2e-6)
    grid = ict.grid(loss.cfg, torch.arange(11).double(), 11)
    close(torch.cat([r.unique(), t.unique()]), torch.cat([grid[:-1], grid[1:]]))
    t, r = loss.levels(u, 399_999)
    assert abs(float(r.log().mean()) + 1.093057) < 1e-4
    assert abs(1 / float((t - r).min()) - 25584.7238) < .01
    assert abs(1 / float((t - r)[t == t.max()][0]) - 2.93603127) < 1e-6

def test_ict_loss_by_hand():
    (x, z), c = torch.randn(2, 3, 3, 8, 8).double(), .00054 * math.sqrt(192)
    t, r = torch.tensor([.02, 1.5, 80]).double(), torch.tensor([.002, 1.2, 60]).double()
    far, near = (ict.f(toy(), x + wide(s) * z, s) for s in (t, r))
    S = (far - near).square().sum((1, 2, 3))
    value = loss_of('ict', '--data', 'cifar10').pair(x, None, z, t, r, 0)
    close(value, ((S + c * c).sqrt() - c) / (t - r))

# -------------------------------------------------------------------------------------------------- sct

def sct_loss(*argv, data=None, net=None):
    flags = '--data cifar10 --init none --warmup 0 --refs 0 --double 25000'.split()
    return loss_of('sct', *flags, *argv, data=data, net=net)

def test_posterior_mean_is_unbiased_for_every_number_of_references():
    """Enumeration: x uniform on three points, other references with and without replacement; the same set
    without x is biased. The variance given x_t falls with n."""
    points, x_t, t = [-1., .3, .9], .4, .8
    likelihood = np.exp([-(x_t - p)**2 / 2 / t**2 for p in points])
    posterior = likelihood / likelihood.sum()
    exact, spread, x_t, t, points = posterior @ points, [], *map(scalars, (x_t, t)), [*map(scalars, points)]
    def mean(refs): return sct.posterior_mean(x_t, t, [points[i] for i in refs]).item()
    def expected(sets, power=1):
        """Of a set's mean, or its power, for (own image, its set) each as likely"""
        return posterior @ [np.mean([mean(s)**power for o, s in sets if o == own]) for own in range(3)]
    for n in range(1, 5):
        drawn = [(own, (own, *others)) for own in range(3) for others in np.ndindex(*[3] * (n - 1))]
        kinds = [drawn, [(own, sorted(set(s))) for own, s in drawn]]    # with replacement; distinct
        if n < 4: kinds += [[(s[0], s) for s in itertools.permutations(range(3), n)]]           # without
        for sets in kinds: assert abs(expected(sets) - exact) < 1e-12, n
        spread.append(expected(drawn, 2) - exact**2)
        if n > 1: assert abs(expected([(own, s[1:]) for own, s in drawn]) - exact) > .02
    assert all(b < .9 * a for a, b in zip(spread, spread[1:])), spread

@pytest.mark.parametrize('t', [1e-3, .1, 3., 12., 80., 1e6])
def test_posterior_mean_in_float32_in_any_order_and_at_its_ends(t):
    y, t = torch.rand(64, 3, 32, 32) * 2 - 1, torch.full((64, 1, 1, 1), t)
    x_t = y + t * torch.randn_like(y)
    m = sct.posterior_mean(x_t, t, [y])
    exact = sct.posterior_mean(x_t.double(), t.double(), [y.double()]).float()
    for found in (m, sct.posterior_mean(x_t, t, y.flip(0).split(10))): close(found, exact, rtol=0, atol=2e-3)
    if t[0] < 1: close(m, y, rtol=0, atol=0)                # x alone, exactly
    if t[0] > 99: close(m, y.mean(0, keepdim=True).expand_as(y), rtol=0, atol=1e-3)

@pytest.mark.parametrize('cond, flip', [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_all_references_in_chunks_give_the_plain_formula(cond, flip):
    """12,000 images, so that 5000 at once are several chunks; also of the part of a batch in a process"""
    images = torch.randint(0, 256, (12_000, 3, 2, 2), dtype=torch.uint8)
    classes = (torch.arange(12_000) * 7919 % 12_000 < 11_000).long()
    argv = ['--refs', 'inf', '--cond', cond, '--flip', flip, '--res', 2, '--mult', 1]
    loss, y = sct_loss(*argv, data=(images, classes)), images.double() / 127.5 - 1
    x, labels, t = y[::1000], classes[::1000], scalars(.3, .5, .7, 1, 1.5, 2, 2.5, 3, 4, 6, 9, 80)
    x_t = x + t * torch.randn(12, 3, 2, 2)
    m = loss.mean(x.float(), x_t.float(), labels if cond else None, t.float(), 0)
    if flip: y, classes = torch.cat([y, y.flip(3)]), torch.cat([classes, classes])
    logits = -(x_t[:, None] - y).square().sum((2, 3, 4)) / 2 / t.view(-1, 1)**2
    if cond: logits = logits.masked_fill(labels[:, None] != classes, -math.inf)
    close(m, torch.einsum('bn,nchw->bchw', logits.softmax(1), y).float(), rtol=0, atol=2e-5)
    assert (m - x).abs().amax((1, 2, 3))[-1] > .1
    x, x_t, labels, t = (v[1::2] for v in (x.float(), x_t.float(), labels, t.float()))
    close(loss.mean(x, x_t, labels if cond else None, t, 0), m[1::2], rtol=0, atol=2e-5)

def test_sct_target_lies_between_x_t_and_the_mean():
    """The three forms of x_r, for the whole batch as references; r = 0 gives the mean itself, r = t x_t."""
    (x, z), t, seen = torch.randn(2, 5, 3, 4, 4).double(), torch.tensor([.1, .5, 1, 2, 9]).double(), []
    net, x_t = lambda v, c, y=None: seen.append(v) or toy()(v, c), x + wide(t) * z
    logits = torch.tensor([[-(a - b).square().sum() / 2 / s**2 for b in x] for a, s in zip(x_t, t)])
    m = torch.einsum('bn,nchw->bchw', logits.softmax(1), x)
    for r in (.5 * t, t * .999, t):
        sct_loss(net=net).pair(x, None, z, t, r, 0)
        x_r, ratio = seen[-2] * (wide(r)**2 + .25).sqrt(), wide(r / t)
        close(x_r, ratio * x_t + (1 - ratio) * m)
        close(x_r, x_t + wide(r - t) * (x_t - m) / wide(t))
    expected = torch.linalg.vector_norm(sct.f(toy(), x_t, t) - m, dim=(1, 2, 3)) / t
    close(sct_loss().pair(x, None, z, t, 0 * t, 0), expected)
    assert (m - x).abs().amax((1, 2, 3))[-1] > .5           # not the sample itself

@pytest.mark.parametrize('step', range(0, 225_000, 25_000))
def test_sct_with_one_reference_is_ect_bit_for_bit(step):
    (x, z), u = torch.randn(2, 8, 3, 8, 8), torch.rand(8, 2).double()
    flags, values = '--data cifar10 --init none --warmup 10000 --dropout .2'.split(), []
    for name, refs in (('ect', []), ('sct', ['--refs', 1]), ('sct', ['--refs', 0])):
        torch.manual_seed(1)
        net = random_net('ect', '--dropout', .2).train().float()
        values.append(loss_of(name, *flags, *refs, net=net)(x, None, u, z, step))
    assert torch.equal(values[0], values[1]) and (step < 10_000) == torch.equal(values[0], values[2])

def test_smooth_schedule_is_that_of_ect_where_a_stage_begins():
    u, smooth, staged = uniform(torch.linspace(.01, .99, 99)), sct_loss('--smooth', 1), sct_loss()
    t = torch.exp(torch.special.ndtri(u[:, 0]) * 2 - 1.1)
    for a in range(7):                  # in the eighth both stand still
        step = a * 25_000
        begin, before, half, after = (smooth.levels(u, step + s)[1] for s in (0, 12_499, 12_500, 12_501))
        close(begin, staged.levels(u, step)[1])
        assert (before <= half).all() and (half <= after).all() and (half > begin).any()
        close(half, (t * (1 - (1 + 8 / (1 + t.exp())) * 2**-(a + 1.5))).clamp(min=0))

@pytest.mark.parametrize('cond, flip, refs', [
    (0, 0, 0), (0, 0, 12), (0, 1, 30), (0, 0, 99), (0, 1, 'inf'), (1, 0, 0), (1, 0, 9), (1, 1, 'inf')])
def test_reference_set_holds_the_batch_once_and_others_of_its_classes(cond, flip, refs):
    data = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8), torch.arange(40) % 4
    argv = ['--batch', 8, '--refs', refs, '--flip', flip, '--cond', cond, '--res', 4, '--micro', 3]
    loss = sct_loss(*argv, data=data)
    def bytes_of(y): return [a.numpy().tobytes() for a in ((y + 1) * 127.5).round().to(torch.uint8)]
    def members(c, step): return bytes_of(torch.cat([*loss.references(c, step, 'cpu')]))
    for step in (3, 4):
        x, labels, _, _ = sct.draw(loss.cfg, data, 8, step, 0, 1, CPU)
        for c in labels.unique().tolist() if cond else [0]:
            got, own = members(c, step), bytes_of(x[labels == c] if cond else x)
            assert got == members(c, step)
            if not refs: assert sorted(got) == sorted(own); continue
            assert len(set(got)) == len(got) == min(float(refs), (10 if cond else 40) * (1 + flip))
            assert set(own) <= set(got)
    assert refs in ('inf', 99) or set(members(0, 5)) != set(members(0, 4))

def test_every_image_of_a_reference_set_is_equally_likely_to_be_the_sample():
    data = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 1, 1), None
    loss = sct_loss('--batch', 2, '--refs', 3, '--res', 1, '--mult', 1, data=data)
    number, count = lambda x: ((x[:, 0, 0, 0] + 1) * 127.5).round().tolist(), {}
    for step in range(4000):
        x = sct.draw(loss.cfg, data, 2, step, 0, 1, CPU)[0]
        key = tuple(sorted(number(torch.cat([*loss.references(0, step, 'cpu')]))))
        count.setdefault(key, [0, 0, 0])[key.index(number(x)[0])] += 1
    assert len(count) == 10 and min(stats.chisquare(v).pvalue for v in count.values()) > 1e-3

def test_phases_keep_r_and_the_target_within_the_segment():
    loss, u = sct_loss('--edges', '0.5,2,6', '--refs', 1), uniform(torch.linspace(.001, .999, 999))
    t, r = loss.levels(u, 0)
    edges = np.array([0, .5, 2, 6])
    lower = torch.from_numpy(edges[np.searchsorted(edges, t.numpy()) - 1])
    assert (r >= lower).all() and (r < t).all() and (r == lower).any() and (r > lower).any()
    assert torch.equal(r, torch.maximum(sct_loss('--refs', 1).levels(u, 0)[1], lower))
    assert loss.edge(torch.tensor([.5, .500001, 2., 80.]).double()).tolist() == [0, .5, .5, 6]
    (x, z), s = torch.randn(2, 3, 3, 4, 4).double(), scalars(.5, 2, 6)
    close(sct.f(toy(), x, s, None, s), x)               # f(x, s, s) = x
    close(sct.f(toy(), x, s + 1, None, 0 * s), sct.f(toy(), x, s + 1))          # one segment: CM
    t = torch.tensor([.3, 1, 4]).double()
    s, x_t = loss.edge(t), x + wide(t) * z
    line, target = wide(s / t), x + wide(s) * z                                 # at the edge x_r itself
    out = line * x_t + (1 - line) * sct.f(toy(), x_t, t)
    expected = torch.linalg.vector_norm(out - target, dim=(1, 2, 3)) / (t - s)
    close(loss.pair(x, None, z, t, s, 0), expected)

def test_edge_skipping_sampler_is_its_formula():
    z, a, eta = torch.randn(2, 3, 4, 4).double(), torch.randn(1, 3, 4, 4).double(), .8
    cfg = lambda edges, eta: argparse.Namespace(edges=edges, eta=eta, shift=0)
    x, t = 20 * z, 20.
    for s in (2., .5, 0.):
        h = sct.f(toy(), x, x.new_full((2,), t), None, x.new_full((2, 1, 1, 1), s))             # to the edge
        x, t = x + (eta * s - t) / (s - t) * (h - x), eta * s                                   # and past it
    for edges in ((.5, 2.), (.5, 2., 20., 80.)):
        close(sct.sample(toy(), z, [20.], cfg=cfg(edges, eta)), x)
    def point_mass(x, c, y=None):       # the raw network whose denoiser is a everywhere
        t = wide(torch.exp(4 * c))
        return (a - .25 / (t**2 + .25).sqrt() * x) * (t**2 + .25).sqrt() / (.5 * t)
    for edges, eta in (((), 1.), ((1.,), 1.), ((.3, 1., 5.), .7)):
        close(sct.sample(point_mass, z, [20.], cfg=cfg(edges, eta)), a.expand_as(z), rtol=1e-5, atol=1e-5)

def test_guidance_mixes_the_two_predictions():
    x, t = torch.randn(3, 3, 4, 4).double(), torch.tensor([.2, 1, 30]).double()
    strong, weak, c = toy(.7), toy(.2, .5, 2), t.log() / 4
    for w in (0., 1., 1.7):
        low, high = sct.f(weak, x, t), sct.f(strong, x, t)
        close(sct.f(sct.Guided(strong, weak, w), x, t), low + w * (high - low))
    assert torch.equal(sct.Guided(strong, strong, 3.)(x, c), strong(x, c))

def test_weak_model_is_the_average_half_way_and_guides_samples(data, tmp_path, capfd, monkeypatch):
    flags, images = ['--data', data, *short('sct'), '--refs', 8], {}
    kept = history(monkeypatch, 'sct', *flags, '--steps', 14, '--out', tmp_path / 'a')
    assert_same(part(kept[14]['loss'], 'weak.'), kept[9]['ema'], rtol=0, atol=0)    # warm-up 4, half of 10
    for w in (1, 1.5):
        go('sct', '--out', tmp_path / 'a', '--sample', 6, '--guidance', w)
        images[w] = np.load(tmp_path / 'a' / 'samples.npz')['arr_0']
    assert (images[1] != images[1.5]).any()
    for when in (0, 1):
        history(monkeypatch, 'sct', *flags, '--steps', 5, '--weak', when, '--out', tmp_path / f'{when}')
        argv = ['--out', tmp_path / f'{when}', '--sample', 4, '--guidance', 2]
        assert 'has no weak model yet' in fails(capfd, 2, 'sct', *argv)

# -------------------------------------------------------------------------------------------------- scm

def edm_toy(x, c, labels=None): return wave()[1](.7, .1)(1.5 * x, c)

edm_toy.edm = True                      # a network of EDM's kind: it gets EDM's time, and its sign is turned

def scm_loss(net, *argv):
    return loss_of('scm', *'--warmup 10 --H 100 --dropout 0'.split(), *argv, net=net).double()

def scm_inputs(n=4):
    x, z = torch.randn(2, n, 3, 8, 8).double() * scalars(.5, 1).unsqueeze(1)
    return x, z, torch.linspace(.05, 1.54, n).double()

def on_path(x, z, t):
    cos, sin = wide(t.cos()), wide(t.sin())
    return cos * x + sin * .5 * z, cos * .5 * z - sin * x, cos, sin

def test_trigflow_ends_variance_and_edms_map():
    (x, _, t), net = scm_inputs(), edm_toy
    assert torch.equal(scm.f(toy(), x, torch.zeros(4)), x)
    close(scm.f(toy(), x, x.new_full((4,), math.pi / 2)), -.5 * toy()(2 * x, None))
    x_t = on_path(.5 * torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64), t)[0]
    assert (x_t.flatten(1).std(1) * 2 - 1).abs().max() < .03
    close(scm.f(net, wide(t.cos()) * x, t), ect.f(net, x, .5 * t.tan()))
    close(scm.f(net, x, wide(t)), scm.f(net, x, t), rtol=0, atol=0)

@pytest.mark.parametrize('arch', scm.CHOICES['arch'])
def test_tangent_is_the_derivative_of_f_along_the_trajectory(arch):
    """Against central differences of f(x_t, t), and torch's own forward mode with the paper's tangent"""
    net = random_net('scm', *f'--arch {arch} --cond 1 --classes 3 --head_dim 8'.split())
    (x, z, t), loss, y, h = scm_inputs(), scm_loss(net), torch.tensor([0, 1, 2, 0]), 1e-5
    out, g = loss.tangent(x, y, z, t, 110)
    x_t, dx, cos, sin = on_path(x, z, t)
    close(out, scm.F(net, x_t, t, y))
    ahead, behind = (scm.f(net, on_path(x, z, t + s)[0], t + s, y) for s in (h, -h))
    close(g / cos, (ahead - behind) / 2 / h, rtol=1e-5, atol=1e-5)
    tangents = cos * sin * dx, (cos * sin * .5).flatten()
    _, J = torch.func.jvp(lambda v, s: scm.F(net, .5 * v, s, y), (x_t / .5, t), tangents)
    for step, r in ((10, 0), (60, .5), (110, 1), (500, 1)):
        expected = -cos**2 * (.5 * out - dx) - r * (cos * sin * x_t + J)
        close(loss.tangent(x, y, z, t, step)[1], expected)
    distil = scm_loss(toy(), '--scd', 1)                # dx_t/dt = sigma_d F_teacher(x_t / sigma_d, t)
    distil.net, distil.teacher = net, lambda v, s, y: dx / .5 + (v - x_t / .5) + wide(s - t)
    close(distil.tangent(x, y, z, t, 110)[1], g)

def test_tangent_is_that_of_the_dropout_masks_drawn():
    net, (x, z, t) = random_net('scm', '--dropout', .5).train(), scm_inputs()
    def seeded(function, *args): return torch.manual_seed(3) and function(*args)
    _, g = seeded(scm_loss(net, '--dropout', .5).tangent, x, None, z, t, 110)
    ahead, behind = (seeded(scm.f, net, on_path(x, z, t + s)[0], t + s) for s in (1e-5, -1e-5))
    close(g / wide(t.cos()), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-5)

def test_the_tangent_leaves_compiled_code_alone_and_is_in_float32_whatever_amp_is():
    """torch.compile cannot take forward mode: torch 2.11 raised an error on a GPU, 2.14 gives up late."""
    net, (x, z, t), graphs = random_net('scm').float(), (v.float() for v in scm_inputs()), []
    plain = scm_loss(net).float().tangent(x, None, z, t, 110)
    net.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    net(x, t)
    frames = dict(torch._dynamo.utils.counters['frames'])
    with torch.autocast('cpu', torch.bfloat16): mixed = scm_loss(net).float().tangent(x, None, z, t, 110)
    assert len(graphs) == 1 and torch._dynamo.utils.counters['frames'] == frames
    for a, b in zip(plain, mixed): close(a, b)

def test_gradient_is_that_of_the_consistency_objective():
    """grad of |F - F_- - g|^2 / 2 is grad of w f . df/dt with w = 1 / (sigma_d tan t), so nothing need be
    divided by sigma_d tan t again; with r = 0 it is that of cos(t)^2 / (2 sigma_d) |sigma_d F - dx/dt|^2."""
    net, (x, z, t) = random_net('scm'), scm_inputs()
    loss, weights = scm_loss(net), list(net.parameters())
    x_t, dx, cos, sin = on_path(x, z, t)
    for step in (10, 110):
        out, g = loss.tangent(x, None, z, t, step)
        got = torch.autograd.grad(((out - out.detach() - g)**2).sum() / 2, weights)
        if step == 10: other = (cos**2 * (.5 * scm.F(net, x_t, t) - dx)**2).sum() / (2 * .5)
        else: other = (scm.f(net, x_t, t) * (g / cos) / (.5 * wide(t.tan()))).sum()
        for a, b in zip(got, torch.autograd.grad(other, weights)): close(a, b, rtol=1e-6, atol=1e-7)

@pytest.mark.parametrize('how, adaptive', [('l2', 1), ('rms', 1), ('clip', 1), ('l2', 0)])
def test_scm_loss_by_hand_with_its_bound_and_weight(how, adaptive):
    """Its gradient is -2 exp(w) / D of bounded g . dF; that of w is 0 where exp(w) = 1 / error."""
    net, (x, z, t) = Toy(.7, 1.5, 3).double(), scm_inputs()
    loss = scm_loss(net, '--data', 'cifar10', '--tangent', how, '--adaptive', adaptive)
    loss.w.weight.data = torch.randn(1, 128).double() * .1
    u = drawn(loss, .5 * t.tan())
    out, g = loss.tangent(x, None, z, t, 60)
    size = wide(g.flatten(1).norm(dim=1))
    g = dict(l2=g / (size + .1), rms=g / (size / 192**.5 + .1), clip=g.clip(-1, 1))[how]
    angles = torch.outer(t, torch.tensor([10000**(-i / 63) for i in range(64)]).double())
    w = adaptive * (torch.cat([angles.cos(), angles.sin()], 1) @ loss.w.weight[0]).detach()
    error = g.square().mean((1, 2, 3))
    value = loss(x, None, u, z, 60)
    close(value, w.exp() * error - w, rtol=1e-5, atol=1e-5)     # its frequencies are of float32
    got, to_w = torch.autograd.grad(value.sum(), [net.a, loss.w.bias])
    close(got, torch.autograd.grad((-2 * wide(w.exp()) * g * out).sum() / 192, net.a)[0], rtol=1e-4, atol=0)
    close(to_w, adaptive * (w.exp() * error - 1).sum()[None], rtol=1e-4, atol=1e-5)

def test_tangent_vanishes_where_theory_says():
    """A point mass, whose consistency function is constant; Gaussian data, whose diffusion model is F = 0 and
    whose consistency function is the identity. A zero tangent makes no NaN."""
    x, z, t = scm_inputs()
    a = x[:1].expand(4, -1, -1, -1)
    point = lambda v, s, y=None: (wide(s.cos()) * .5 * v - a) / (.5 * wide(s.sin()))
    close(scm.f(point, x, t), a)
    for scd in (0, 1): assert scm_loss(point, '--scd', scd).tangent(a, None, z, t, 110)[1].abs().max() < 1e-9
    gauss, loss = lambda v, s, y=None: -v * wide((s / 2).tan()), scm_loss(toy(), '--scd', 1)
    close(scm.f(gauss, x, t), x)
    loss.net, loss.teacher = gauss, lambda v, s, y=None: torch.zeros_like(v)
    assert loss.tangent(x, None, z, t, 110)[1].abs().max() < 1e-12
    assert loss(x, None, torch.rand(4, 2).double(), z, 110).abs().max() < 1e-12
    loss.net = loss.teacher
    x_t, _, cos, sin = on_path(x, z, t)
    close(loss.tangent(x, None, z, t, 110)[1], -cos * sin * x_t)

def test_samplers_of_scm_are_trigflows_and_edms():
    (z, n), net = torch.randn(2, 2, 3, 8, 8).double(), edm_toy
    x = scm.f(toy(), .5 * z, z.new_full((2,), 1.5))
    close(scm.sample(toy(), z, [1.5]), x)
    two = scm.f(toy(), math.cos(1.1) * x + math.sin(1.1) * .5 * n, z.new_full((2,), 1.1))
    close(scm.sample(toy(), z, [1.5, 1.1], noise=[n], cfg=config('scm')), two)
    t_max = scm.CONFIG['ts'][1][0]
    assert abs(t_max - math.atan(80 / .5)) < 1e-7
    high = .5 * math.tan(t_max)
    sigmas = [(high**(1 / 7) + i / 17 * (.002**(1 / 7) - high**(1 / 7)))**7 for i in range(18)] + [0.]
    x, slope = .5 * z / math.cos(t_max), lambda x, s: (x - ect.f(net, x, x.new_full((2,), s))) / s
    for s, r in zip(sigmas, sigmas[1:]):
        x, before, d = x + (r - s) * slope(x, s), x, slope(x, s)
        if r: x = before + (r - s) * (d + slope(x, r)) / 2
    close(scm.sample(net, z, [t_max], cfg=argparse.Namespace(heun=18)), x)

def test_double_normalisation_is_its_formula():
    block, silu = scm.Block(config('scm', '--ch', 4), 8, 12, 4).double(), nn.functional.silu
    for p in block.parameters(): p.data = torch.randn_like(p) * .4
    x, e = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 16).double()
    h = block.norm1(block.conv0(silu(block.norm0(x))))
    s, b = (v / v.pow(2).mean(1, keepdim=True).sqrt() for v in block.affine(e).split(12, 1))
    h = h * s[:, :, None, None] + b[:, :, None, None]
    close(block(x, e), (block.conv1(silu(h)) + block.skip(x)) * .5**.5, rtol=1e-6, atol=1e-6)
    net = scm.UNet(config('scm'))
    assert net.freqs.max() == 1 and not net.edm         # t in radians, slow features
    assert scm.UNet(config('scm', '--arch', 'ddpmpp')).edm

def test_phases_of_scm_have_their_own_rate_optimiser_average_and_dropout():
    small, deep = loss_of('scm', '--data', 'cifar10'), loss_of('scm', '--data', 'imagenet64')
    first, gamma = deep.cfg.warmup, deep.cfg.ema_gamma_warmup
    assert small.phase(0) == ('diffusion', 0, 0., 512) and small.phase(400_000) == ('sct', 400_000, 1e-4, 512)
    for loss, step, lr in ((small, 9766, 5e-4), (small, 20_000, 1e-3), (deep, 140_000, 5e-3),
                           (deep, first, 0), (deep, first + 1000, 2.048e-5), (deep, first + 140_000, 5e-5)):
        assert abs(loss.phase(step)[2] - lr) <= 1e-4 * lr       # ramps of 10 M images
    for loss, step, decay in ((small, 5, .5**(512 / 5e5)),                      # half-life 500,000 images
                              (deep, 999, .999**(gamma + 1)), (deep, first + 999, .999**17.97)):
        assert abs(loss.averages(None, step)[0][1] - decay) < 1e-5
    assert abs(((gamma + 1) / (gamma + 2)**2 / (gamma + 3))**.5 - .075) < 1e-4  # relative standard deviation
    for loss, step, kind, beta2, eps in ((small, 0, 'Adam', .999, 1e-8), (small, 400_000, 'RAdam', .99, 1e-8),
                                         (deep, 0, 'Adam', .99, 1e-11), (deep, first, 'Adam', .99, 1e-11)):
        opt = loss.optimiser([nn.Parameter(torch.zeros(2))], step)
        assert (type(opt).__name__, opt.defaults['betas'], opt.defaults['eps']) == (kind, (.9, beta2), eps)
    net = scm.UNet(config('scm', *TINY, '--res', 8))
    loss = loss_of('scm', *TINY, *'--dropout .25 --dropout_warmup .125 --warmup 5'.split(), net=net)
    for step, p in ((0, .125), (5, .25)):
        loss(torch.randn(4, 3, 8, 8), None, torch.rand(4, 2).double(), torch.randn(4, 3, 8, 8), step)
        assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {p}
    loss.w.weight.data += 1
    loss.begin(net)
    assert loss.w.weight.abs().max() == 0 == loss.w.bias

def test_a_run_of_scm_keeps_its_diffusion_model_and_samples_both(data, tmp_path, monkeypatch):
    flags = ['--data', data, *short('scm'), *'--ema .3 --lr .01 --steps 12 --out'.split(), tmp_path]
    kept, images = history(monkeypatch, 'scm', *flags), {}
    assert_same(part(kept[12]['loss'], 'teacher.'), kept[4]['ema'], rtol=0, atol=0)
    for heun in (0, 3):
        argv = ['--out', tmp_path, '--sample', 4, '--heun', heun]
        go('scm', *argv)
        images[heun] = np.load(tmp_path / 'samples.npz')['arr_0']
    net = scm.UNet(cfg := scm.config(list(map(str, argv)))).eval()
    net.load_state_dict(kept[4]['ema'])
    expected = scm.generate(cfg, net, torch.arange(4), cfg.ts[:1], CPU).permute(0, 2, 3, 1).numpy()
    assert (images[3] == expected).all() and (images[0] != expected).any()

# ------------------------------------------------------------------------------------------------- EDM2

EDM2_METHODS = ['ect', 'sct', 'tcm', 'scm']
ALIKE = dict(rtol=1e-5, atol=2e-5)      # outputs of a network in float32

@pytest.mark.parametrize('name', EDM2_METHODS)
@pytest.mark.parametrize('which', ['cond', 'uncond', 'defaults'])
def test_edm2_network_and_pickle_reader_agree_with_the_official_code(name, which):
    v, m = golden_of(f'edm2_{which}'), MODULES[name]
    net, y = m.load_edm(pickled(f'edm2_{which}')).eval(), v.get('labels')
    assert sum(p.numel() for p in net.parameters()) == v['n_params_unet']
    shape = [vars(net.cfg)[k] for k in ('mult', 'blocks', 'attn', 'head_dim')]      # not in the files
    assert which != 'defaults' or shape == [(1, 2, 3, 4), 3, (16, 8), 64]
    close(net(v['c_in_x'], v['c_noise'], y), v['F'], **ALIKE)
    if name == 'scm': return
    close(m.f(net, v['x'], v['sigma'], y), v['D'], **ALIKE)
    if y is not None: close(m.f(net, v['x'], v['sigma']), v['D_no_label'], **ALIKE)
    net.train()                         # no dropout in it; a step, a pass forward and back, and a second one
    net.normalise()
    D = m.f(net, v['x'], v['sigma'], y)
    close(D, v['train_D'], **ALIKE)
    (D - v['x0']).square().mean().backward()
    close(gradient_norms(net).double(), v['train_grad_norms'][:-1], rtol=1e-4, atol=1e-7)
    sums = torch.stack([p.double().square().sum() for p in net.parameters()])
    close(sums, v['train_param_sqsum'][:-1], rtol=1e-5, atol=0)
    net.normalise()
    close(m.f(net, v['x'], v['sigma'], y), v['train_D_2nd'], **ALIKE)

def gradient_norms(net): return torch.stack([p.grad.norm() for p in net.parameters()])

@pytest.mark.parametrize('name', EDM2_METHODS)
def test_edm2_blocks_agree_with_the_official_code(name):
    v, m = golden_of('edm2_parts'), MODULES[name]
    close(m.unit(.01 * v['a'], 1), v['pixel_norm'])
    close(m.mp_sum(v['a'], v['b'][:, :6], .3), v['mp_sum3'])
    conv, linear = m.MPConv(6, 5, 3, 3), m.MPConv(6, 5)
    conv.weight.data, linear.weight.data = v['conv_w'], v['lin_w']
    close(conv(v['a'], .7), v['conv_eval'])
    close(linear(v['a'][:, :, 0, 0], 1.3), v['lin_eval'])
    conv.weight.data = m.unit(conv.weight.data)
    close(conv.weight.data, v['conv_w_after'])
    close(conv(v['a'], .7), v['conv_train'])
    for block in ('enc', 'down', 'dec', 'up', 'floor', 'clipped'):
        x, e, y, heads = (v[f'{block}_{k}'] for k in ('x', 'emb', 'y', 'heads'))
        cfg = config(name, *f'--arch edm2 --mult 1 --dropout 0 --ch {e.shape[1]}'.split(),
                     '--head_dim', y.shape[1] // max(int(heads), 1))
        resample, decoder = dict(down=m.DOWN, up=m.UP).get(block, m.SAME), block in ('dec', 'up', 'floor')
        net = m.MPBlock(cfg, x.shape[1], y.shape[1], 8, bool(heads), resample, decoder).eval()
        for p, w in zip(net.parameters(), part(v, f'{block}/').values(), strict=True): p.data = w.view_as(p)
        close(net(x, e), y, rtol=1e-5, atol=1e-5 * y.abs().max().item())

@pytest.mark.parametrize('name', ['ect', 'sct', 'tcm'])
@pytest.mark.parametrize('limit, key', [(math.inf, 'D_all'), (8, 'D_8')])
def test_edm2_drops_out_where_the_official_code_does(name, limit, key):
    v, m = golden_of('edm2_cond'), MODULES[name]
    given = m.load_edm(pickled('edm2_cond'))
    net = m.UNet(argparse.Namespace(**vars(given.cfg) | dict(dropout=.4, dropout_res=limit)))
    net.load_state_dict(given.state_dict())
    net.normalise()
    torch.manual_seed(7)
    close(m.f(net, v['x'], v['sigma'], v['labels']), golden_of('edm2_dropout')[key], **ALIKE)

def edm2_loss(name, *argv, gain=1.):
    """The loss of ImageNet-64's recipe on the golden network as a step finds it, and the golden numbers, in
    float64, so that all rounding is the official code's"""
    net = MODULES[name].load_edm(pickled('edm2_cond')).double()
    loss = loss_of(name, *'--data imagenet64 --init none --warmup 0'.split(), *argv, net=net)
    for p in net.parameters(): p.data *= gain if p.ndim == 0 else 1
    net.normalise()
    return loss, {k: w.double() if w.is_floating_point() else w for k, w in golden_of(f'{name}_edm2').items()}

@pytest.mark.parametrize('stage', range(4))
def test_ect_on_edm2_agrees_with_the_official_code(stage):
    loss, v = edm2_loss('ect')
    t, r = loss.levels(drawn(loss, v['t']), step := math.ceil(stage * loss.double))
    close(r, v[f's{stage}_r'], rtol=2e-5, atol=1e-6)
    value = loss.pair(v['x0'], v['labels'], v['eps'], t, v[f's{stage}_r'], step)
    close(value, v[f's{stage}_loss'], rtol=3e-4, atol=0)
    value.mean().backward()
    close(gradient_norms(loss.net), v[f's{stage}_grad_norms'], rtol=1e-3, atol=1e-5)
    net = ect.load_edm(pickled('edm2_cond')).double().eval()
    close(ect.f(net, v['x0'] + wide(v['D_t']) * v['eps'], v['D_t'], v['labels']), v['D'], **ALIKE)

def test_tcm_on_edm2_agrees_with_the_official_code():
    for stage in range(6):
        loss, v = edm2_loss('tcm', '--stage1', 100_000)
        t, r = loss.levels(drawn(loss, v['stage1_t']), step := stage * 10_000)
        close(r, v[f'stage1_s{stage}_r'], rtol=1e-7, atol=0)
        value = loss.pair(v['x0'], v['labels'], v['eps'], t, r, step)
        close(value, v[f'stage1_s{stage}_loss'], rtol=3e-4, atol=0)
        value.mean().backward()
        close(gradient_norms(loss.net).norm(), v[f'stage1_s{stage}_grad_norm'], rtol=3e-4, atol=0)
    t, r = loss.levels(drawn(loss, torch.cat([torch.ones(2), v['stage2_t']])), 90_000)          # at the limit
    loss, v = edm2_loss('tcm', '--stage1', 0, gain=.9)
    loss.teacher = tcm.load_edm(pickled('edm2_cond')).double().requires_grad_(False)
    value = loss.pair(v['x0'], v['labels'], v['eps'], t, r, 10**6)
    close(value, torch.cat([v['stage2_boundary'], v['stage2_loss']]), rtol=3e-4, atol=0)
    (value[2:].mean() + .1 * value[:2].mean()).backward()
    close(gradient_norms(loss.net).norm(), v['stage2_grad_norm'], rtol=3e-4, atol=0)

@pytest.mark.parametrize('name', EDM2_METHODS)
def test_snapshots_in_tcms_layout_are_read(name, tmp_path):
    """TCM's network has another name in it."""
    ours, theirs, load = pickled('edm2_defaults'), tmp_path / 'tcm.pkl', MODULES[name].load_edm
    renamed = ours.read_bytes().replace(b'\x8c\x04unet', b'\x8c\x05model')
    theirs.write_bytes(pickletools.optimize(renamed))           # which counts the bytes anew
    assert_same(load(ours).state_dict(), load(theirs).state_dict(), rtol=0, atol=0)

@pytest.mark.parametrize('name, which', [('scm', 'edm2_defaults'), ('ect', 'edm2_cond'),
                                         ('ict', 'edm_ncsnpp_tiny')])
def test_a_published_network_is_sampled_without_a_run(name, which, tmp_path, monkeypatch):
    """--init X.pkl --sample: size and classes come from the file, knobs from the nearest column."""
    m, pkl = MODULES[name], str(pickled(which))
    monkeypatch.chdir(tmp_path)
    m.main(argv := ['--init', pkl, *'--sample 12 --nfe 2 --save s.npz'.split()])
    found, net, cfg = np.load('s.npz'), m.load_edm(pkl).eval(), m.config(argv)
    expected = m.generate(cfg, net, torch.arange(12), m.CONFIG['ts'][[16, 32, 64].index(net.cfg.res)], CPU)
    assert (found['arr_0'] == expected.permute(0, 2, 3, 1).numpy()).all()
    assert ('arr_1' in found) == bool(net.cfg.cond) and not Path('runs').exists()

@pytest.mark.parametrize('name, arch', [*((name, 'edm2') for name in EDM2_METHODS), ('scm', 'scm-edm2')])
def test_edm2s_weights_are_normalised_before_each_step_not_after(name, arch, data, tmp_path, monkeypatch):
    seen, forward = [], MODULES[name].Loss.forward
    def rms(named): return torch.cat([w.square().flatten(1).mean(1)**.5 for k, w in named if 'weight' in k])
    def see(self, *args): return seen.append(rms(self.net.named_parameters())) or forward(self, *args)
    monkeypatch.setattr(MODULES[name].Loss, 'forward', see)
    argv = *short(name), '--arch', arch, *'--ema 0 --opt Adam --lr .1 --anneal 0 --steps 8'.split()
    after = go(name, '--data', data, *argv, '--out', tmp_path)
    for size in seen: close(size, torch.ones_like(size), rtol=0, atol=1e-3)     # unit() adds 1e-4
    assert len(seen) == 8 and (rms(after['ema'].items()) - 1).abs().max() > 3e-3
    assert_same(after['ema'], part(after['loss'], 'net.'), rtol=0, atol=0)      # what the optimiser left

def test_double_normalisation_in_edm2_is_its_formula():
    cfg = config('scm', *'--arch scm-edm2 --ch 8 --mult 1 --dropout 0'.split())
    block, conv = scm.MPBlock(cfg, 8, 12, 8, decoder=True).double(), nn.functional.conv2d
    x, e = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 8).double()
    n = lambda v, dim: v / (1e-4 + v.square().mean(dim, keepdim=True).sqrt())
    W = lambda layer: n(layer.weight.flatten(1), 1).view_as(layer.weight) / layer.weight[0].numel()**.5
    act = lambda v: nn.functional.silu(v) / .596
    s, b = (n(v, 1)[:, :, None, None] for v in (e @ W(block.affine).T).split(12, 1))
    h = act(n(conv(act(x), W(block.conv0), padding=1), 1) * s + b)
    h = conv(h, W(block.conv1), padding=1)
    close(block(x, e), (.7 * conv(x, W(block.skip)) + .3 * h) / .58**.5)
    net = scm.UNet(config('scm', *'--data imagenet64 --ch 8 --arch scm-edm2'.split()))
    angles = .3 * 1e4 ** (-torch.arange(4) / 3)                 # slow features of t = .3
    close((.3 * net.freqs + net.phases).cos(), torch.cat([angles.cos(), angles.sin()]), rtol=1e-5, atol=1e-6)
    assert not net.edm and not hasattr(net.enc[1], 'gain')

# ---------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize('name, arch', [('ct', 'ncsnpp'), ('ict', 'ncsnpp'), *(
    (name, 'ddpmpp') for name in ('ct', 'ict', 'ect', 'sct', 'scm', 'tcm'))])
def test_network_and_pickle_reader_agree_with_edm(name, arch):
    v, m = golden_of(f'edm_{arch}_tiny'), MODULES[name]
    net = m.load_edm(pickled(f'edm_{arch}_tiny')).eval()
    close(net(v['x'] / (wide(v['sigma'])**2 + .25).sqrt(), v['sigma'].log() / 4), v['F'], **ALIKE)
    if name in ('ect', 'sct', 'tcm'): close(m.f(net, v['x'], v['sigma']), v['D'], **ALIKE)

@pytest.mark.parametrize('name', ['ct', 'ict', 'ect', 'sct', 'scm', 'tcm'])
def test_network_gives_edms_numbers_without_a_file(name):
    """Sums of EDM's outputs for weights set by a rule on EDM's parameter names."""
    argv = '--res 16 --ch 16 --mult 2,2 --blocks 1 --attn 8 --arch ddpmpp'.split()
    net, places = MODULES[name].UNet(config(name, *argv)), {
        'map0.': 'map_layer0.', 'map1.': 'map_layer1.', 'norm.': 'dec.16x16_aux_norm.',
        'out.': 'dec.16x16_aux_conv.'}
    for side, blocks in (('enc', '16x16_conv 16x16_block0 8x8_down 8x8_block0'),
                         ('dec', '8x8_in0 8x8_in1 8x8_block0 8x8_block1 16x16_up 16x16_block0 16x16_block1')):
        places |= {f'{side}.{i}.': f'{side}.{block}.' for i, block in enumerate(blocks.split())}
    edm = {k: next(v + k[len(p):] for p, v in places.items() if k.startswith(p)) for k in net.state_dict()}
    order = sorted([*edm.values(), 'map_augment.weight'])
    for k, p in net.named_parameters():
        v = torch.sin(.1 * torch.arange(p.numel()).double() + order.index(edm[k])).view(p.shape).float()
        one = 'norm' in edm[k] and k.endswith('weight')
        p.data = v / math.sqrt(p[0].numel()) if p.ndim > 1 else one + .1 * v
    net, x = net.double().eval(), torch.from_numpy(np.sin(.37 * np.arange(2 * 768))).view(2, 3, 16, 16)
    outputs = [(net(x, x.new_full((2,), -.2)), 45.780182, 335.00463)]
    if name in ('ect', 'sct', 'tcm'):
        outputs += [(MODULES[name].f(net, x, x.new_full((2,), sigma)), *sums) for sigma, *sums in (
            (.002, 5.1030822, 978.00429), (.5, 19.107908, 485.44458), (80., 39.84572, 184.14354))]
    for y, total, size in outputs:
        assert abs(y.sum() - total) < 5e-5 * size and abs(y.abs().sum() - size) < 5e-5 * size

@pytest.mark.parametrize('names, argv, weights', [
    ('ect sct tcm', '--data cifar10', 55_732_739), ('ct ict', '--data cifar10', 56_395_523),
    ('ict', '--data cifar10 --blocks 8', 97_610_499),
    *(('ect sct tcm scm', f'--data imagenet64 --arch edm2 --ch {ch}', n - 128) for ch, n in (   # uncertainty
        (128, 124710949), (192, 280209381), (256, 497803173), (320, 777492325), (384, 1119276837)))])
def test_networks_of_the_papers_have_as_many_weights(names, argv, weights):
    for m in (MODULES[name] for name in names.split()):
        with torch.device('meta'): net = m.UNet(config(m.METHOD, *argv.split(), '--init', 'none'))
        assert sum(p.numel() for p in net.parameters()) == weights
        if 'edm2' not in argv: continue
        blocks = [b for b in net.modules() if isinstance(b, m.MPBlock)]
        assert len(blocks) == 36 and sum(bool(b.heads) for b in blocks) == 15
        assert sum(isinstance(b.dropout, nn.Dropout) for b in blocks) == 4 + 4 + 6 + 5

@pytest.mark.parametrize('arch', ['ddpmpp', 'edm2'])
def test_labels_matter_to_a_conditional_network_alone_and_none_is_no_class(arch):
    x, t, y = torch.randn(2, 3, 8, 8).double(), torch.rand(2).double(), torch.tensor([0, 1])
    for cond in (1, 0):
        net = random_net('ect', *f'--arch {arch} --cond {cond} --classes 3'.split())
        first, each, none = net(x, t, 0 * y), net(x, t, y), net(x, t)
        assert torch.equal(each[0], first[0])
        for other in (first, none): assert ((other - each)[1].abs().max() > 1e-3) == cond
        if cond: net.map_label.weight.data *= 0
        close(net(x, t, y), none)

# ------------------------------------------------------------------------------------------ frame

README = (HERE / 'README.md').read_text()
SECTIONS = 'method recipe network data training sampling checkpoints line'.split()      # by their last words
LIKE = dict(ct=('ict', 263), ict=('ect', 362), sct=('ect', 201), scm=('ect', 378), tcm=('ect', 186))

def source(name): return (HERE / f'{name}.py').read_text()

def pieces(name):
    """{top-level name: its source text}"""
    found, lines = {}, source(name).splitlines()
    for node in ast.parse(source(name)).body:
        targets = [n.id for t in getattr(node, 'targets', []) for n in ast.walk(t) if isinstance(n, ast.Name)]
        text = '\n'.join(lines[node.lineno - 1:node.end_lineno])
        found |= dict.fromkeys([node.name] if hasattr(node, 'name') else targets, text)
    return found

def test_a_name_that_two_scripts_share_has_the_same_text_and_place():
    found, texts = {name: pieces(name) for name in METHODS}, {}
    for name in METHODS:
        for n in found[name].keys() - COMMON - {'SIGNED'} - METHODS[name].own:
            assert texts.setdefault(n, found[name][n]) == found[name][n], f'{n} in {name}.py has drifted'
        for n in METHODS[name].own:     # by few lines, where a network or a sampler of its own enters
            shared = found['ect']['DDPMpp' if n == 'UNet' and name != 'scm' else n]     # theirs is one class
            lines = difflib.ndiff(shared.splitlines(), found[name][n].splitlines())
            assert 0 < sum(line[0] in '+-' and line[1:].strip() != '' for line in lines) <= 32, (name, n)
    assert found['ct']['UNet'] == found['ict']['UNet']
    for a, b in itertools.permutations(METHODS, 2):
        assert [n for n in found[a] if n in found[b]] == [n for n in found[b] if n in found[a]], (a, b)
    for n in pieces('fid').keys() & texts.keys() - {'config', 'main', 'pieces'}:
        assert pieces('fid')[n] == texts[n], f'{n} in fid.py has drifted'

@pytest.mark.parametrize('name', [*METHODS, 'fid'])
def test_a_script_has_short_lines_no_unused_import_and_its_method_on_the_first_screens(name):
    text, tree, packages = source(name), ast.parse(source(name)), set()
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
            assert (alias.asname or alias.name).split('.')[0] in used, f'{alias.name} is not used'
            packages.add((getattr(node, 'module', None) or alias.name).split('.')[0].replace('PIL', 'pillow'))
    declared = set(re.findall(r'"(\w+)[^"]*"', re.search(r'^# dependencies = (.*)', text, re.M)[1]))
    assert packages - sys.stdlib_module_names <= declared <= {'torch', 'numpy', 'pillow', 'scipy'}
    assert text.split('"""')[0] == source('ect').split('"""')[0] and max(map(len, text.splitlines())) <= 110
    if name != 'fid':
        assert re.findall(rf'^# -.* ({"|".join(SECTIONS)})$', text, re.M) == SECTIONS
        assert text[:text.index('\ndef f(')].count('\n') < 75
    if name in LIKE and shutil.which('diff'):
        files = [HERE / f'{script}.py' for script in (name, LIKE[name][0])]
        diff = subprocess.run(['diff', '-U0', *files], capture_output=True, text=True).stdout
        assert sum(line[:1] in ('+', '-') for line in diff.splitlines()) - 2 <= LIKE[name][1]

@every_method
def test_every_knob_has_one_value_or_three_and_a_meaning_and_is_used(name, capsys):
    text, module = source(name), MODULES[name]
    start = text.index('\nCONFIG =')
    body = text[:start] + text[text.index('\n)', start):]
    with pytest.raises(SystemExit) as end: module.main(['--help'])
    shown = capsys.readouterr().out
    for knob, (*values, meaning) in (module.CONFIG | module.FLAGS).items():
        assert re.search(rf'cfg\.{knob}\b|\'{knob}\'', body), f'--{knob} of {name}.py is not used'
        assert f'--{knob}' in shown and len(values) in (1, 3) and isinstance(meaning, str) and meaning
        argv = [f'--{knob}', '1']       # torchrun takes what abbreviates a flag of its own
        assert end.value.code == 0 and parse_args([f'{name}.py', *argv]).training_script_args == argv

TOY = '''class Loss(nn.Module):
    def __init__(self, net, cfg, data):
        super().__init__()
        self.net, self.cfg = net, cfg
    def levels(self, u, step):
        low = self.cfg.low if step < 4 else 1
        return low * (self.cfg.high / low)**u[:, 0]
    def forward(self, x, labels, u, z, step):
        t = self.levels(u, step).to(x).view(-1, 1, 1, 1)
        return (f(self.net, x + t * z, t, labels) - x).abs().mean((1, 2, 3)) * (1 + u[:, 1]).to(x)
    def phase(self, step): return ('low', 'high')[step >= 4], 4 * (step >= 4), self.cfg.lr, self.cfg.batch
    def optimiser(self, weights, step): return torch.optim.Adam(weights)
    def begin(self, ema): self.net.load_state_dict(ema.state_dict())
    def averages(self, ema, step): return [(ema, self.cfg.ema)]
'''

def test_a_method_in_a_copy_of_ect_passes_every_test_of_the_frame(tmp_path):
    """Its text is ect.py's with another docstring, Loss and knobs; it is registered by a line of METHODS."""
    for path in [*HERE.glob('*.py'), HERE / 'README.md', *Path(__file__).parent.glob('*.py')]:
        shutil.copy(path, tmp_path)
    text = source('ect')
    text = text[:text.index('class Loss')] + TOY + text[text.index('@torch.no_grad()\ndef sample'):]
    text = text.split('"""', 2)[0] + '"""The smallest method."""' + text.split('"""', 2)[2]
    text = text.replace(', cfg.shift if cfg else 0)', ')')
    gone = 'warmup|lr_warmup|opt|beta2|t_ref|anneal|ema_gamma|P_mean|P_std|q|double|k|b|c|weight|shift'
    text = re.sub(rf'^    ({gone})=\(.*\n', '', text, flags=re.M).replace('CONFIG = dict(', '''CONFIG = dict(
    low=(1, 0.05, 0.02, '100 % of t are above'), high=(20.0, 'and below'),
   ''', 1)
    (tmp_path / 'toymethod.py').write_text(text)
    file = next(path for path in tmp_path.glob('*.py') if '\nMETHODS = {' in path.read_text())
    entry = "\nMETHODS = {\n    'toymethod': Method('--low 0.1', set()),"
    file.write_text(file.read_text().replace('\nMETHODS = {', entry))
    argv = [sys.executable, '-m', 'pytest', '-q', '-k', 'toymethod or two_scripts_share', Path(__file__).name]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=900,
                          env=os.environ | dict(SCRIPTS=str(tmp_path), OMP_NUM_THREADS='1'))
    assert done.returncode == 0 and int(re.search(r'(\d+) passed', done.stdout)[1]) > 11, done.stdout

def test_cifar10_is_downloaded_checked_and_read_from_its_archive(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    images, labels, archive = pictures(20, 32), torch.arange(20) % 10, tmp_path / 'cifar.tar.gz'
    with tarfile.open(archive, 'w:gz') as tar:
        for i in range(5):
            rows = torch.cat([labels[4 * i:4 * i + 4, None].byte(), images[4 * i:4 * i + 4].flatten(1)], 1)
            info = tarfile.TarInfo(f'cifar-10-batches-bin/data_batch_{i + 1}.bin')
            info.size = rows.numel()
            tar.addfile(info, io.BytesIO(rows.numpy().tobytes()))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    flags = [*short('ect'), *'--data cifar10 --init none --steps 5'.split()]
    for url, expected in (('http://127.0.0.1:9/cifar.tar.gz', sha256), (archive.as_uri(), '0' * 64)):
        for name, value in (('CIFAR', url), ('CIFAR_SHA256', expected)): monkeypatch.setattr(ect, name, value)
        with pytest.raises(SystemExit) as end: ect.main(flags)
        assert end.value.code == 2 and 'put it at datasets/cifar.tar.gz' in capfd.readouterr().err
        assert not list(Path('datasets').iterdir()) and not Path('runs').exists()
    monkeypatch.setattr(ect, 'CIFAR_SHA256', sha256)
    for cond in (0, 1):
        got, classes = ect.load_data(config('ect', *flags, '--cond', cond))
        assert torch.equal(got, images) and (torch.equal(classes, labels) if cond else classes is None)
    Path('datasets/cifar.tar.gz').write_bytes(archive.read_bytes()[:2000])
    assert 'cifar.tar.gz cannot be read' in fails(capfd, 2, 'ect', *flags)

def test_a_data_file_says_its_size_and_classes_and_stays_on_the_disk(tmp_path, monkeypatch):
    maps, four, columns = Path('/proc/self/maps'), torch.arange(12) % 4, ect.CONFIG
    for labels, classes in ((four, 4), (None, 0), (four * 2, 0), (four + 1, 0), (four - 1, 0), (four * 0, 1)):
        path = saved(tmp_path / 'a.pt', pictures(12, 32), labels)
        cfg = config('ect', '--data', path)
        assert (cfg.res, cfg.cond, cfg.classes, cfg.init) == (32, classes > 0, max(1, classes), 'none')
        assert (cfg.ch, cfg.steps) == (columns['ch'][0], columns['steps'][0])   # without a GPU the digits'
        images, got = ect.load_data(cfg)
        assert torch.equal(images, pictures(12, 32)) and (not maps.exists() or str(path) in maps.read_text())
        assert torch.equal(got, labels) if classes else got is None
        assert ect.load_data(config('ect', '--data', path, '--cond', 0))[1] is None
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for res, column in ((8, 0), (23, 0), (32, 1), (47, 1), (64, 2), (256, 2)):
        cfg = config('ect', '--data', saved(tmp_path / 'a.pt', pictures(4, res)), '--mult', '1')
        assert (cfg.ch, cfg.P_mean) == (columns['ch'][column], columns['P_mean'][column])

# ------------------------------------------------------------------------------------------------ training

@pytest.fixture(scope='session')
def runs(data, tmp_path_factory):
    """Name -> folder of a run of nine steps"""
    @functools.cache
    def of(name):
        out = tmp_path_factory.mktemp(name)
        go(name, '--data', data, *short(name), '--steps', 9, '--out', out)
        return out
    return of

@pytest.fixture
def forked(monkeypatch):
    """The processes of --gpus come from a server that has imported torch, which takes most of their time."""
    start = functools.partial(torch.multiprocessing.start_processes, start_method='forkserver')
    multiprocessing.set_forkserver_preload(['torch', 'torch._dynamo'])
    monkeypatch.setattr(torch.multiprocessing, 'spawn', start)

def rows_of(folder):                    # of log.csv, without their pace
    return [line.rsplit(',', 1)[0] for line in (folder / 'log.csv').read_text().splitlines()]

def interrupted(monkeypatch, name, at, *argv):
    """A run in which Ctrl-C is pressed as it has written the row of step `at`"""
    report = MODULES[name].Run.report

    def pressed(self, step, *args):
        report(self, step, *args)
        if step + 1 == at: signal.raise_signal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(MODULES[name].Run, 'report', pressed)
        go(name, *argv)
    assert end.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler        # so pytest answers it, too

@every_method
def test_a_step_sees_what_was_drawn_and_leaves_no_tensor_behind(name, data, tmp_path, monkeypatch):
    """An average with a grad_fn would hang on a graph that grows with every step."""
    module, seen, alive, flips = MODULES[name], [], [], []
    forward, averages = module.Loss.forward, module.Loss.averages

    def watched(self, ema, step):
        pairs = averages(self, ema, step)
        assert all(p.grad_fn is None for net in (self, *dict(pairs)) for p in net.parameters())
        alive.append(sum(issubclass(type(v), torch.Tensor) for v in gc.get_objects()))
        return pairs
    monkeypatch.setattr(module.Loss, 'forward', lambda self, *args: seen.append(args) or forward(self, *args))
    monkeypatch.setattr(module.Loss, 'averages', watched)
    go(name, '--data', data, *short(name), '--steps', 10, '--flip', 1, '--out', tmp_path)
    assert alive[-1] - alive[-2] <= 8, alive                    # four in `seen` and what they are rows of
    images = pictures().float() / 127.5 - 1
    for x, labels, u, z, step in seen:
        for row, label in zip(x, labels):
            plain, flipped = ((v == row).flatten(1).all(1).nonzero() for v in (images, images.flip(3)))
            assert label == torch.cat([plain, flipped])[0, 0] % 4
            flips.append(len(flipped))
        assert u.shape == (len(x), 2) and u.dtype == torch.float64 and z.shape == x.shape
    assert 0.2 < np.mean(flips) < 0.8 and len({args[2].sum().item() for args in seen}) == len(seen) == 10

@every_method
def test_a_run_that_was_broken_off_ends_bitwise_as_a_whole_one_and_rows_stand_once(
        name, data, tmp_path, monkeypatch, capfd):
    argv = ['--data', data, *short(name), '--dropout', 0.3, '--steps', 9, '--save_every', 2, '--log_every', 1]
    whole, folder = go(name, *argv, '--out', tmp_path / 'whole'), tmp_path / 'parts'
    for at in (3, 5, 7): interrupted(monkeypatch, name, at, *argv, '--out', folder)
    assert len(rows_of(folder)) == 8    # a row more than the checkpoint has
    parts = go(name, *argv, '--out', folder)
    assert capfd.readouterr().err.count('interrupted; the same command goes on') == 3
    for part in ('loss', 'ema'): assert_same(whole[part], parts[part], rtol=0, atol=0)
    rows = rows_of(tmp_path / 'whole')
    assert rows == rows_of(folder) and [row.split(',')[0] for row in rows[1:]] == [*'123456789']

@every_method
def test_processes_and_micro_batches_do_not_change_the_run(name, data, tmp_path, forked):
    """Batches of 7: one of two processes has a micro-batch more. What starts them has one text in all."""
    flags = ['--data', data, *short(name), '--batch', 7, '--steps', 8, '--device', 'cpu', '--out']
    one = go(name, *flags, tmp_path / 'one')
    go(name, *flags, tmp_path / 'micro', '--micro', 3)
    go(name, *flags, tmp_path / 'gpus', '--micro', 3, '--gpus', 2)
    if name == 'tcm':
        start = [sys.executable, *'-m torch.distributed.run --standalone --nproc-per-node 2'.split()]
        start += [HERE / 'tcm.py', *flags, tmp_path / 'torchrun']
        subprocess.run([*map(str, start)], check=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    for folder in tmp_path.iterdir():
        other = torch.load(folder / 'latest.pt', weights_only=True)
        assert_same(one['loss'], other['loss'], rtol=1e-4, atol=1e-6)
        for rows in zip(one['log'].splitlines()[1:], other['log'].splitlines()[1:], strict=True):
            a, b = ([float(v) for v in row.split(',')[2:5]] for row in rows)
            assert a == pytest.approx(b, rel=1e-3)

@every_method
def test_mixed_precision_trains_and_goes_on_with_its_scaler(name, data, tmp_path, monkeypatch):
    argv = ['--data', data, *short(name), *'--steps 9 --save_every 6 --log_every 1 --amp fp16 --out'.split()]
    whole = go(name, *argv, tmp_path / 'whole')
    assert all(v.isfinite().all() and v.dtype != torch.float16 for v in whole['ema'].values())
    if name != 'ect': return            # what follows has one text in all
    interrupted(monkeypatch, name, 7, *argv, tmp_path / 'parts')
    parts = go(name, *argv, tmp_path / 'parts')
    for part in ('loss', 'ema'): assert_same(whole[part], parts[part], rtol=0, atol=0)
    assert whole['scaler'] == parts['scaler'] != {}
    interrupted(monkeypatch, name, 7, *argv, tmp_path / 'off', '--amp', 'off')
    go(name, *argv, tmp_path / 'off')

@pytest.mark.parametrize('name, arch', [('ect', 'ddpmpp'), ('tcm', 'ddpmpp'), ('ect', 'edm2')])
def test_half_precision_gradients_are_those_of_float32(name, arch):
    """Though the target's pass, without gradients, is first: a cache would keep what that has cast."""
    flags = [*'--warmup 0 --steps 8 --res 8 --arch'.split(), arch, *['--stage1', 0] * (name == 'tcm')]
    cfg = config(name, *TINY, *flags)
    loss, u = MODULES[name].Loss(MODULES[name].UNet(cfg), cfg, None), torch.rand(16, 2).double()
    (x, z), grads, weights = torch.randn(2, 16, 3, 8, 8), {}, list(loss.net.parameters())
    for p in weights: nn.init.normal_(p, std=0.1)
    for cfg.amp in ('off', 'fp16', 'bf16'):
        with MODULES[name].autocast(cfg, torch.device('cpu')): value = loss(x, None, u, z, 0).mean()
        grads[cfg.amp] = torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])
    for amp, error in (('fp16', 0.05), ('bf16', 0.4)):
        assert (grads[amp] - grads['off']).norm() < error * grads['off'].norm()

@every_method
def test_amp_off_means_no_tf32_anywhere(name, monkeypatch):
    module, seen, cudnn, products = MODULES[name], [], torch.backends.cudnn, torch.backends.cuda.matmul
    for part in ('allow_tf32', 'benchmark'): monkeypatch.setattr(cudnn, part, False)
    for part in ('is_available', 'set_device'): monkeypatch.setattr(torch.cuda, part, lambda *_: True)
    monkeypatch.setattr(module, 'load_data', lambda cfg: None)
    monkeypatch.setattr(module, 'train', lambda *_: seen.append((cudnn.allow_tf32, products.allow_tf32)))
    for amp in (['--amp', 'tf32'], ['--amp', 'off'], ['--amp', 'fp16'], []):
        argv = ['--data', 'cifar10', '--init', 'none', *METHODS[name].phases.split(), *amp]
        module.process(0, config(name, *argv))
    torch.set_float32_matmul_precision('highest')
    assert seen == [(True, True), (False, False), (True, True), (False, False)]

@every_method
def test_checkpoint_is_plain_data_and_nothing_is_drawn_in_more_than_micro_images(
        name, data, tmp_path, monkeypatch):
    module, sizes, sample, drawn = MODULES[name], [], MODULES[name].sample, []
    monkeypatch.setattr(module, 'sample', lambda net, z, *args: sizes.append(len(z)) or sample(net, z, *args))
    state = go(name, '--data', data, *short(name), '--steps', 9, '--micro', 30, '--out', tmp_path)
    assert max(sizes) == 30 and sum(sizes) == 200
    cfg = argparse.Namespace(**state['config'], micro=0, label=-1, device='cpu')
    assert (state['method'], state['step'], cfg.ch, cfg.classes) == (name, 9, 8, 4)
    assert set(state['config']) == {'data', *module.CONFIG}
    assert (tmp_path / 'log.csv').read_text() == state['log']
    assert {path.suffix for path in tmp_path.iterdir()} == {'.pt', '.csv', '.png'}
    net = module.UNet(cfg).eval()
    net.load_state_dict(state['ema'])   # no prefixes
    for ts in (cfg.ts[:1], cfg.ts[:2]):
        drawn.append(module.generate(cfg, net, torch.arange(100), ts, torch.device('cpu')))
    grid = np.asarray(Image.open(tmp_path / 'samples-000009.png'))[::6, ::6].reshape(10, 8, 20, 8, 3)
    cells = torch.from_numpy(grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, 8, 8).astype(int))
    assert max(sizes) == 50 and (cells - torch.cat(drawn)).abs().max() <= 1     # one step above two

def test_a_status_row_tells_means_since_the_last_and_the_pace_of_one_phase(data, tmp_path, monkeypatch):
    losses, forward = [], tcm.Loss.forward
    clock = types.SimpleNamespace(time=itertools.count().__next__)      # a second between two looks
    monkeypatch.setattr(tcm, 'time', clock)
    monkeypatch.setattr(tcm.Loss, 'forward', lambda *args: losses.append(forward(*args)) or losses[-1])
    state = go('tcm', '--data', data, *short('tcm'), '--steps', 12, '--log_every', 5, '--out', tmp_path)
    rows = [line.split(',') for line in state['log'].splitlines()[1:]]
    ends = dict(zip((3, 5, 6, 10, 12), ('diffusion', 'stage 1', 'stage 1', 'stage 2', 'stage 2')))
    assert {int(row[0]): row[1] for row in rows} == ends
    for first, last, row in zip((0, *ends), ends, rows):
        mean = np.mean([loss.mean().item() for loss in losses[first:last]])
        assert [float(row[2]), float(row[5])] == pytest.approx([mean, 8 * (last - first)], rel=1e-3)

@pytest.mark.parametrize('name, ours', [*((name, True) for name in METHODS), ('ect', False), ('ict', False)])
def test_init_takes_shape_and_weights_from_our_checkpoint_and_from_edms(name, ours, runs, data, tmp_path):
    init, ch = (runs(name) / 'latest.pt', 8) if ours else (pickled('edm_ddpmpp_tiny'), 32)
    still = ['--init', init, *'--steps 1 --batch 4 --lr 1e-12 --ema 0.9 --out'.split(), tmp_path / 'run']
    if name == 'tcm': still += ['--stage1', 1, '--lr_stage1', 1e-12]
    after = go(name, '--data', data if ours else saved(tmp_path / 'd.pt', pictures(16, 16)), *still)
    assert [after['config'].get(knob, 0) for knob in ('ch', 'mult', 'warmup')] == [ch, (1, 2), 0]
    assert_same(after['ema'], MODULES[name].load(init)['ema'], rtol=0, atol=1e-6)

@pytest.mark.parametrize('part', ['loss', 'gradient'])
def test_nan_ends_the_run_before_anything_is_saved(part, data, tmp_path, monkeypatch, capfd):
    def broken(self, x, labels, u, z, step):
        value = forward(self, x, labels, u, z, step)
        if step == 5 and part == 'gradient': value = value + (self.net.out.weight * 0).square().sum().sqrt()
        return value * math.nan if step == 5 and part == 'loss' else value
    forward = ect.Loss.forward
    monkeypatch.setattr(ect.Loss, 'forward', broken)
    argv = ['--data', data, *short('ect'), '--steps', 12, '--save_every', 4, '--out', tmp_path]
    assert 'gradient norm nan up to step 6: lower --lr' in fails(capfd, 1, 'ect', *argv)
    assert torch.load(tmp_path / 'latest.pt', weights_only=True)['step'] == 4
    assert not (tmp_path / 'samples-000008.png').exists()

def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(data, tmp_path, monkeypatch):
    resource, path = pytest.importorskip('resource'), tmp_path / 'latest.pt'
    argv = [*short('ect'), *'--steps 6 --save_every 2 --log_every 1 --out'.split(), tmp_path, '--data', data]
    interrupted(monkeypatch, 'ect', 3, *argv)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))             # bytes of a file
    try:
        with pytest.raises((OSError, RuntimeError)) as end: go('ect', *argv)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'Errno 27' in f'{end.value}{end.value.__context__}' and len(before) > 100_000
    assert path.read_bytes() == before and not list(tmp_path.glob('*.part'))

@pytest.mark.parametrize('name, kills', [
    ('ect', 2), *(pytest.param(name, 30, marks=slow, id=f'slow-{name}') for name in METHODS)])
def test_kills_at_random_moments_change_nothing(name, kills, data, tmp_path):
    folder, rng, steps = tmp_path / 'run', np.random.default_rng(0), 10 + 5 * kills
    flags = f'--dropout 0.3 --save_every 1 --log_every 1 --steps {steps} --data {data} --out'
    argv = [*short(name), *flags.split()]
    for _ in range(kills):
        job = subprocess.Popen([*map(str, [sys.executable, HERE / f'{name}.py', *argv, folder])], text=True,
                               stdout=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS='1'))
        next(line for line in job.stdout if ' steps ' in line)
        time.sleep(rng.uniform(0, 0.4))
        job.kill()
        assert job.wait() == -signal.SIGKILL, 'it ended before all kills'
    parts, whole = (go(name, *argv, out) for out in (folder, tmp_path / 'whole'))
    for part in ('loss', 'ema'): assert_same(whole[part], parts[part], rtol=0, atol=0)
    assert rows_of(folder) == rows_of(tmp_path / 'whole') and not list(folder.glob('*.part'))

def test_a_process_that_fails_ends_the_run_with_its_reason(wrong, data, tmp_path, forked, capfd):
    argv, out = ['--data', data, *'--batch 2 --gpus 2 --device cpu --out'.split()], tmp_path / 'run'
    with pytest.raises(SystemExit) as end: go('ect', *argv, out, '--init', wrong / 'state.pt')
    assert end.value.code == 2 and not out.exists()

    def kill():
        while not (out / 'data.png').exists(): time.sleep(0.1)
        multiprocessing.active_children()[0].kill()
    threading.Thread(target=kill).start()
    with pytest.raises(SystemExit) as end: go('ect', *argv, out)
    assert end.value.code == 1 and 'terminated with signal SIGKILL' in capfd.readouterr().err

# --------------------------------------------------------------------------------------- refusals, samples

def other_than(name, knob, value):
    """Text of another value of the knob"""
    if knob in MODULES[name].CHOICES: return next(c for c in MODULES[name].CHOICES[knob] if c != value)
    if isinstance(value, str): return 'other.pt'
    return '3,1' if isinstance(value, tuple) else '7' if math.isinf(value) else value + 1

@every_method
def test_the_recipe_of_a_run_is_fixed_when_it_begins(name, runs, data, tmp_path, monkeypatch, capfd):
    """A phase passed over, another teacher, data, length, shape: whatever differs is named."""
    latest, machine = runs(name) / 'latest.pt', {'amp', 'save_every', 'log_every'}
    before, recipe = latest.read_bytes(), torch.load(latest, weights_only=True)['config']
    monkeypatch.setattr(MODULES[name], 'load', functools.cache(MODULES[name].load))
    changed = {knob: other_than(name, knob, recipe[knob]) for knob in recipe.keys() - machine}
    changed['data'] = saved(tmp_path / data.name, pictures(40, 8, seed=1), torch.arange(40) % 4)
    argv = ['--data', data, '--out', latest.parent]
    for knob, value in changed.items():
        line = fails(capfd, 2, name, *argv, f'--{knob}={value}')
        assert f'--{knob} ' in line and f'it is {recipe[knob]} in {latest}. To go on from it' in line
        assert line.endswith(f'--out NEW --init {latest}')
    line = fails(capfd, 2, 'ict' if name != 'ict' else 'ct', *argv)
    assert f'latest.pt is of {name}.py' in line and latest.read_bytes() == before
    text = {k: ','.join(map(str, v)) if isinstance(v, tuple) else v for k, v in recipe.items() if v != ()}
    flags = '--amp bf16 --save_every 7 --log_every 9 --micro 2 --gpus 2 --device cpu --compile'.split()
    for given in ([], [f'--{knob}={value}' for knob, value in text.items()], flags):
        cfg = vars(MODULES[name].config(['--out', str(latest.parent), *given]))
        assert all(cfg[knob] == recipe[knob] for knob in recipe.keys() - machine)

@pytest.fixture(scope='session')
def wrong(tmp_path_factory):
    """A folder of what people give to --data and --init by mistake"""
    folder, (images, labels) = tmp_path_factory.mktemp('wrong'), (pictures(4), torch.arange(4))
    files = dict(
        floats=(images.float(), None), one=images, grey=(images[:, :1], None), long=(images, labels.int()),
        wide=(images[..., :4], None), few=(images, labels[:3]), rows=(images.permute(0, 2, 3, 1), None),
        three=(images, labels, 1), bare=(images, None), gaps=(images, labels * 2), state=dict(x=images))
    for name, content in files.items(): torch.save(content, folder / f'{name}.pt')
    for name in ('text.pt', 'text.pkl', 'file', 'x.zip', 'x.npz'): (folder / name).write_text('words')
    (folder / 'empty').mkdir()
    return folder

@pytest.mark.parametrize('argv, message', [
    ('--data nowhere.pt', 'nowhere.pt cannot be read: FileNotFoundError'), ('--step 5', 'unrecognized'),
    *((f'--data {{wrong}}{x}', f'python fid.py --pack {{wrong}}{x}') for x in ('', '/x.zip', '/x.npz')),
    *((f'--data {{wrong}}/{x}.pt', f'{x}.pt cannot be read')
      for x in 'floats one grey long wide few rows state three text'.split()),
    ('--data {wrong}/bare.pt --cond 1', 'no labels'), ('--data {wrong}/gaps.pt --cond 1', 'not all of 0, 1'),
    ('--data {data} --res 16', '--res 16: the images of {data} are of 8'),
    ('--data {data} --classes 7', 'not all of 0, 1, ... to 6'),
    ('--data imagenet64 --init none', 'datasets/imagenet64.pt cannot be read: FileNotFoundError'),
    ('--steps 0', '--steps 0: it must be above 0'), ('--q 1', 'above 1'), ('--amp fp8', 'invalid choice'),
    ('--ts 80,x', 'invalid numbers'), ('--ts 1,2', 'noise levels fall'), ('--ts 80,nan', '--ts nan'),
    ('--mult 1,0', '--mult 0'), ('--nfe 3', '--nfe 3 needs'), ('--res 18', 'cannot be halved'),
    ('--lr nan', '--lr nan'), ('--ema -1', '--ema -1'), ('--label 3', 'no such class'),
    ('--data {data} --label 4', 'no such class'), ('--gpus 64', 'machine has'), ('--gpus -1', '--gpus -1'),
    ('--gpus 2 --device cpu --batch 1', 'fewer images than processes'), ('--out {wrong}/file', 'is a file'),
    ('--sample 4', 'latest.pt cannot be read'), ('--steps 8 --warmup 9', '--steps 8: the warm-up alone'),
    *((f'--init {{wrong}}/{x}', f'{x} cannot be read')
      for x in 'no.pt no.pkl text.pt text.pkl file x.zip floats.pt'.split()),
    ('--init {wrong}/state.pt', 'ValueError it holds no config and ema; a checkpoint of ours is expected'),
    ('--data {data} --init {run}/latest.pt --cond 0', '/latest.pt knows 4 classes, this run 0'),
    *((f'--data {{data}} --init {{run}}/latest.pt --{x}', 'these come with --init')
      for x in ('ch 8', 'arch edm2', 'mult 1,2')),
    *((f'--out {{run}} --sample {x}', message) for x, message in (
        ('4 --save x.jpg', 'an .npz, or a folder'), ('4 --save {wrong}/empty', 'is there already'),
        ('4 --nfe 3', '--nfe 3 needs'), ('4 --label 4', 'no such class'), ('4 --cond 0', 'it is 1 in'),
        ('4 --ch 16', 'it is 8 in'), ('-1', '--sample -1')))])
def test_bad_input_is_one_line(argv, message, wrong, runs, data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    places = dict(wrong=wrong, data=data, run=runs('ect'))
    line = fails(capfd, 2, 'ect', '--out', tmp_path / 'run', *argv.format(**places).split())
    assert message.format(**places) in line and not [*tmp_path.iterdir(), *(wrong / 'empty').iterdir()]

def test_a_user_with_a_poor_console_a_stray_environment_and_a_long_seed_trains(data, tmp_path):
    shutil.copy(data, tmp_path / 'снимки.pt')
    done = run('ect', '--data', 'снимки.pt', *short('ect'), '--steps', 6, '--seed', 10**30, cwd=tmp_path,
               env=dict(PYTHONIOENCODING='ascii', LOCAL_RANK='0', MASTER_PORT='x'))
    assert done.returncode == 0 and not done.stderr and 'ect on ??????.pt: 40' in done.stdout, done.stderr

def test_hostile_and_damaged_files_run_nothing_and_are_refused(runs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    class Evil:
        def __reduce__(self): return os.system, ('touch owned',)
    evil, latest = Evil(), runs('ect') / 'latest.pt'
    state, content = torch.load(latest, weights_only=True), bytearray(latest.read_bytes())
    files = {'0.pkl': pickle.dumps(dict(ema=evil)), '1.pkl': pickle.dumps(evil), '2.pt': content[:5000]}
    content[len(content) // 2] ^= 1
    for file, bad in [*files.items(), ('latest.pt', content)]: Path(file).write_bytes(bad)
    for file, bad in (('4.pt', state | dict(x=evil)), ('5.pt', (pictures(), evil))): torch.save(bad, file)
    given = [f'--init {file}' for file in (*files, '4.pt', 'latest.pt')]
    for argv in (*given, '--data 5.pt', '--out .', '--out . --sample 2'):
        assert re.search(r'\.(pt|pkl) cannot be read', fails(capfd, 2, 'ect', '--out', 'run', *argv.split()))
    assert not Path('owned').exists() and not Path('run').exists()

def test_a_checkpoint_brings_its_knobs_and_nothing_else(runs, tmp_path):
    state = torch.load(runs('ect') / 'latest.pt', weights_only=True)
    flags = dict(save=str(tmp_path / 'elsewhere.npz'), nfe=2, label=1, device='x', gpus=10**6, sample=7)
    del state['config']['c'], state['config']['shift']          # an older one may lack knobs
    torch.save(state | dict(config=state['config'] | flags), tmp_path / 'latest.pt')
    for argv in ([], ['--sample', '2']):
        cfg = ect.config(['--out', str(tmp_path), *argv])
        assert (cfg.save, cfg.nfe, cfg.label, cfg.device, cfg.gpus) == ('', 1, -1, config('ect').device, 1)
        assert cfg.sample == 2 * len(argv[1:]) and (cfg.c, cfg.shift) == (0.03, 0.0)

@every_method
def test_samples_become_the_nearest_levels(name, monkeypatch):
    k, cfg = torch.arange(256), config(name)
    near = torch.stack([k + off for off in (-0.49, 0, 0.49)]) / 127.5 - 1
    for x, levels in ((near, k.repeat(3)), (near - 2.01, k.repeat(3) * 0), (near + 9, k.repeat(3) * 0 + 255)):
        monkeypatch.setattr(MODULES[name], 'sample', lambda *args, **kw: x.view(1, 3, 16, 16))
        drawn = MODULES[name].generate(cfg, None, torch.arange(1), cfg.ts[:1], torch.device('cpu'))
        assert torch.equal(drawn.flatten(), levels.byte())

@every_method
def test_image_i_is_a_function_of_seed_and_i(name, runs, tmp_path, monkeypatch, forked):
    def draw(n, *argv, nfe=2, save='s.npz'):
        where = [] if '--init' in argv else ['--out', runs(name)]
        argv = ['--sample', n, *argv, *where, '--nfe', nfe, '--save', tmp_path / save]
        MODULES[name].main([*map(str, argv)])
        return np.load(tmp_path / 's.npz')
    def near(a, b): return np.abs(a.astype(int) - b).max() <= 1
    monkeypatch.chdir(tmp_path)
    images, labels = draw(16).values()
    assert (images.dtype, images.shape, labels.tolist()) == (np.uint8, (16, 8, 8, 3), [0, 1, 2, 3] * 4)
    assert len({image.tobytes() for image in images}) == 16
    part = draw(5, '--micro', 2, '--init', runs(name) / 'latest.pt')            # without a run
    assert near(part['arr_0'], images[:5]) and not (tmp_path / 'runs').exists()
    for other in (draw(5, '--seed', 1), draw(5, nfe=1)): assert not near(other['arr_0'], images[:5])
    same = draw(5, '--label', 2)
    assert same['arr_1'].tolist() == [2] * 5 and near(same['arr_0'][2:3], images[2:3])
    draw(16, '--gpus', 2, '--device', 'cpu', save='png')
    files = sorted((tmp_path / 'png').iterdir())
    assert len(files) == 16 and near(np.stack([np.asarray(Image.open(file)) for file in files]), images)

def test_each_last_line_names_the_next_command_from_pictures_to_fid(tmp_path, monkeypatch, capfd):
    """A folder given to ect.py names --pack, that names training, that names sampling, that names fid.py."""
    monkeypatch.chdir(tmp_path)
    for i, image in enumerate(pictures(12, 16)):
        path = tmp_path / 'photos' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    said = fails(capfd, 2, 'ect', '--data', 'photos')
    for module, small in ((fid, []), (ect, [*short('ect'), '--steps', '6']), (ect, ['--nfe', '2'])):
        argv = re.findall(rf'python {module.__name__}\.py ([^,;]*)', said)[-1]
        module.main([re.sub('^10000$', '20', word) for word in argv.split()] + small)
        said = capfd.readouterr().out.strip().splitlines()[-1]
    images, labels = np.load(re.fullmatch(r'next: python fid.py (\S+\.npz)', said)[1]).values()
    assert images.shape == (20, 16, 16, 3) and labels.tolist() == [0, 1] * 10

# ----------------------------------------------------------------------------------------------- README, slow

LEGIBLE = dict(ct=(0.3, 30, 0.4, 30), ict=(0.6, 15, 0.8, 15), ect=(0.6, 6, 0.85, 4), sct=(0.6, 6, 0.85, 4),
               scm=(0.5, 15, 0.7, 15), tcm=(0.6, 8, 0.8, 8))
PASSES = dict(ct=[4], ict=[4], ect=[3, 4], sct=[3, 4], scm=[3, 4], tcm=[3, 4, 5])       # of a step, by phase

@slow
@pytest.mark.parametrize('name, seed', [*((name, None) for name in LEGIBLE), *(('scm', i) for i in range(5))])
def test_slow_default_run_leaves_legible_digits_and_scm_is_stable(name, seed, tmp_path):
    """The least share of sure digits and the greatest FD-digits, in one step and two; scm: and five seeds."""
    brief = [] if seed is None else ['--seed', seed, *'--warmup 400 --steps 1200 --H 100'.split()]
    done = run(name, *brief, '--out', tmp_path, env=dict(OMP_NUM_THREADS=str(os.cpu_count())), timeout=2400)
    assert done.returncode == 0, done.stderr
    rows = [line.split(',') for line in (tmp_path / 'log.csv').read_text().splitlines()[1:]]
    losses, norms = np.array([row[2:4] for row in rows if row[1] == rows[-1][1]], float).T
    print(f'{name} {brief}: gradient norms {norms}; losses {losses}')
    assert not brief or norms.max() < 4 * np.median(norms) and losses[-1] < losses[0]
    limits = (0.2, 100, 0.2, 100) if brief else LEGIBLE[name]
    for nfe, sure, distance in ((1, *limits[:2]), (2, *limits[2:])):
        go(name, '--out', tmp_path, '--sample', 2000, '--nfe', nfe, '--save', tmp_path / f'{nfe}.npz')
        row = fid.Digits().judge(fid.load_images(tmp_path / f'{nfe}.npz'))
        print(nfe, row)
        assert row['sure'] > sure and row['FD-digits'] < distance
        assert brief or row['share_min'] > 0.04 and row['share_max'] < 0.22 and row['colour_min'] > 0.65

@pytest.mark.parametrize('name', PASSES)
def test_a_step_costs_as_many_passes_as_the_readme_counts(name):
    cfg = config(name, *short(name), '--steps', 30, *['--refs', 1] * (name == 'sct'))
    net = MODULES[name].UNet(cfg)
    loss, (x, z), u = MODULES[name].Loss(net, cfg, None), torch.randn(2, 4, 3, 16, 16), torch.rand(4, 2)

    def operations(work):               # of convolutions and products
        with FlopCounterMode(display=False) as counter: work()
        return counter.get_total_flops()
    one, starts = operations(lambda: net(x, u[:, 0])), sorted({loss.phase(step)[1] for step in range(30)})
    costs = [operations(lambda: loss(x, None, u.double(), z, step).sum().backward()) for step in starts]
    assert [cost / one for cost in costs] == pytest.approx(PASSES[name], rel=0.02)

@pytest.mark.skipif('--d 0' in README or not shutil.which('bash'), reason='an old README, or no bash')
def test_the_commands_in_the_readme_are_right_and_its_comparison_is_of_equal_budgets(tmp_path, monkeypatch):
    text = re.sub(r'\$\(\(.*?\)\)|\$\w+', '7', README)
    for name, flags in re.findall(r'\b(\w+)\.py((?: +--\w+(?: +[\w/.*,]+)?)+)', text):
        if name in METHODS: MODULES[name].parse([re.sub('^[A-Z]$', '7', word) for word in flags.split()])
    monkeypatch.chdir(tmp_path)
    block, spent = re.search(r'```\w*\n(for P in .*?)```', README, re.S)[1], {}
    for word, value in (('P in ', 120), ('seed in ', 0), ('--sample ', 20)):
        block = re.sub(rf'{word}[0-9 ]+\b', f'{word}{value}', block)
    function = f'python() {{ if [ "$1" = -c ]; then {sys.executable} "$@"; else echo "$@"; fi; }}\n'
    said = subprocess.run(['bash', '-euc', function + block], capture_output=True, text=True)
    *commands, (script, path, *flags) = map(str.split, said.stdout.splitlines())
    for file, *argv in commands:
        name, shape = file.removesuffix('.py'), '--ch 8 --mult 1,2 --attn 4'.split()
        state = go(name, *argv, *shape * (not {'--init', '--sample'} & set(argv)))
        parts = [state['config'].get(knob, 0) for knob in ('warmup', 'stage1')[:len(PASSES[name]) - 1]]
        parts.append(state['step'] - sum(parts))
        spent[Path(argv[argv.index('--out') + 1]).name] = np.dot(parts, PASSES[name])
    total = {name: spent[name] + spent['diffusion'] * (name not in ('ct', 'ict')) for name in PASSES}
    assert total == pytest.approx(dict.fromkeys(PASSES, 120), abs=4)
    fid.main([*map(str, sorted(Path().glob(path))), *flags])
    assert script == 'fid.py' and not said.stderr

# ----------------------------------------------------------------------------------------- reading of pictures

def png(image):
    """uint8 (3, H, W) -> its PNG"""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, 'PNG')
    return file.getvalue()

def stored(path, images, names, **others):
    """Pictures of these names, and other files, in a new .zip or a folder -> path"""
    files = {name: png(image) for name, image in zip(names, images)} | others
    if path.endswith('.zip'):
        with zipfile.ZipFile(path, 'w') as archive:
            for name, content in files.items(): archive.writestr(name, content)
    else:
        for name, content in files.items():
            Path(path, name).parent.mkdir(parents=True, exist_ok=True)
            Path(path, name).write_bytes(content)
    return path

def npz(**images):
    for name, x in images.items(): np.savez(f'{name}.npz', x.permute(0, 2, 3, 1).numpy())

def packed(path, *argv):
    """What `fid.py --pack path` makes -> images, labels"""
    with tempfile.TemporaryDirectory() as folder:
        fid.main(['--pack', path, '--save', f'{folder}/x.pt', *map(str, argv)])
        return torch.load(f'{folder}/x.pt', weights_only=True)

def refuses(capfd, *argv):
    """fid.py ends with code 2 and a line on stderr, which is returned; notes may stand before it"""
    capfd.readouterr()
    fid.target.cache_clear()
    with pytest.raises(SystemExit) as end: fid.main(list(map(str, argv)))
    *notes, line = capfd.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and line.startswith('fid.py: '), (end.value.code, line)
    assert all('by its size' in text or 'bias the distance' in text for text in notes), notes
    return line

def deep_png(colour, channels):
    """A PNG of 8 x 8 with 16 bits a channel"""
    def chunk(kind, data): return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    head, rows = bytes([0, 0, 0, 8, 0, 0, 0, 8, 16, colour, 0, 0, 0]), (b'\0' + bytes(16 * channels)) * 8
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which the test is in"""
    monkeypatch.chdir(tmp_path)
    return tmp_path

def test_every_format_holds_the_same_images_and_labels(here, capfd):
    x, y = pictures(25, 32), torch.arange(25) % 7
    names = [f'{i // 10:05d}/img{i:08d}.png' for i in range(25)]
    stored('edm.zip', x, names, **{'dataset.json': json.dumps(dict(labels=[*zip(names, y.tolist())]))})
    folders = [f'{"abcdefg"[label]}/{i}.png' for i, label in enumerate(y)]
    stored('tree', x, folders)
    np.savez('a.npz', arr_0=x.permute(0, 2, 3, 1), arr_1=y)
    saved('a.pt', x, y)
    rows = torch.cat([y.byte()[:, None], x.flatten(1)], 1).numpy()
    with tarfile.open('cifar-10-binary.tar.gz', 'w:gz') as archive:
        for i in (3, 1, 2, 5, 4):
            member, data = tarfile.TarInfo(f'cifar-10-batches-bin/data_batch_{i}.bin'), rows[5 * i - 5:5 * i].tobytes()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    for path in ('edm.zip', 'tree', 'a.npz', 'a.pt', 'cifar-10-binary.tar.gz'):
        i = sorted(range(25), key=lambda i: folders[i]) if path == 'tree' else slice(None)
        got_x, got_y = packed(path)
        assert torch.equal(got_x, x[i]) and torch.equal(got_y, y[i]) and got_y.dtype == torch.int64, path
        assert torch.equal(fid.load_images(path), x[i]), path
    whole = Path('cifar-10-binary.tar.gz').read_bytes()
    for content in (whole[:-1], whole[:-8] + b'wrong sum'):     # behind the last member
        Path('cifar-10-binary.tar.gz').write_bytes(content)
        assert 'cifar-10-binary.tar.gz cannot be read' in refuses(capfd, '--pack', 'cifar-10-binary.tar.gz')

def adm_crop(a, res):
    """ADM's crop of an array (H, W, 3) in numpy: means of 2 x 2 while a side is twice too large, then Pillow's bicubic
    (a = -1/2, widened when it shrinks) as two products with matrices, each result rounded to 8 bits."""
    def matrix(n, m):                   # (m, n)
        scale = n / m
        centre, wide = (np.arange(m)[:, None] + 0.5) * scale, max(scale, 1)
        x = np.abs((np.arange(n)[None] + 0.5 - centre) / wide)
        w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        return w / w.sum(1, keepdims=True)

    def byte(x): return np.clip(np.floor(x + 0.5), 0, 255)
    a = a.astype(float)
    while min(a.shape[:2]) >= 2 * res:
        for axis in (1, 0): a = byte((a.take(range(0, a.shape[axis], 2), axis) + a.take(range(1, a.shape[axis], 2), axis)) / 2)
    h, w = (int(round(side * res / min(a.shape[:2]))) for side in a.shape[:2])
    a = byte(np.einsum('xw,hwc->hxc', matrix(a.shape[1], w), a))
    a = byte(np.einsum('yh,hwc->ywc', matrix(a.shape[0], h), a))
    return a[(h - res) // 2:, (w - res) // 2:][:res, :res]

@pytest.mark.parametrize('size', [(8, 8), (16, 16), (34, 20), (48, 80), (36, 100), (15, 9), (8, 21), (5, 7), (96, 64)])
def test_pictures_are_cropped_as_adm_does(size):
    image = Image.fromarray(pictures(1, 128, size[0])[0].permute(1, 2, 0).numpy()).resize(size, Image.BICUBIC)
    got = np.asarray(fid.crop(image, 8))
    assert got.shape == (8, 8, 3) and np.abs(got - adm_crop(np.asarray(image), 8)).max() <= 1      # fixed-point sums
    if size == (8, 8): assert (got == np.asarray(image)).all()

@pytest.mark.parametrize('names, labels, said', [
    ('n10/a.png n02/a.png n02/b.JPG n1/x/y.png', [0, 0, 1, 2], '3 classes (n02 -> 0, n1 -> 1, n10 -> 2)'),
    ('photos/cat/0.png photos/dog/0.png', [0, 1], '2 classes (cat -> 0, dog -> 1)'),
    ('cat/0.png dog/0.png .ipynb_checkpoints/0.png cat/.hidden.png __MACOSX/cat/._0.png', [0, 1], '(cat -> 0, dog'),
    ('cat/0.png dog/0.png top.png', [0, 1, -1], '1 pictures have NO LABEL'),
    ('only/0.png only/1.png', None, 'no labels'), ('0.png 1.png', None, 'no labels'),
    (' '.join(f'{i:03d}/0.png' for i in range(30)), [*range(30)], '30 classes (000 -> 0, 001 -> 1'),
])
@pytest.mark.parametrize('form', ['folder', 'slash.zip', 'backslash.zip'])
def test_class_folders_are_labels_in_the_order_of_their_names_which_are_said(names, labels, said, form, here, capfd):
    names = names.split()
    images = pictures(len(names), 16)
    stored(form, images, [name.replace('/', '\\') for name in names] if 'back' in form else names)
    visible = sorted(name for name in names if '/.' not in f'/{name}')
    x, y = packed(form)
    assert torch.equal(x, torch.stack([images[names.index(name)] for name in visible]))
    assert (y if y is None else y.tolist()) == labels
    out = capfd.readouterr().out
    assert f'{len(visible)} pictures' in out and said in out and len(out) < 700

def test_links_count_but_what_leads_nowhere_or_back_is_an_error(here, capfd):
    stored('else', pictures(3, 16), ['0.png', '1.png', '2.png'])
    stored('d', pictures(1, 16), ['cat/0.png'])
    os.symlink(here / 'else', 'd/dog')
    os.symlink(here / 'else' / '0.png', 'd/cat/1.png')
    if hasattr(os, 'mkfifo'): os.mkfifo('d/cat/2.png')          # would block who opens it
    assert packed('d')[1].tolist() == [0, 0, 1, 1, 1]
    os.remove('else/0.png')
    assert 'd/cat/1.png cannot be read: FileNotFoundError' in refuses(capfd, '--pack', 'd')
    os.symlink(here / 'd', 'd/dog/back')
    assert 'd cannot be read: ValueError a link in it leads back to it' in refuses(capfd, '--pack', 'd')

@pytest.mark.parametrize('labels, expected', [
    ([('0.png', 1), ('1.png', 0), ('2.png', 1), ('gone.png', 7)], [1, 0, 1]),
    ([('0.png', 1), ('2.png', 0)], [1, -1, 0]), (None, None), ([], None),
    ([('0.png', 1), ('1.png', 2), ('2.png', 2)], 'its 2 labels lie between 1 and 2'),
    ([('0.png', 0), ('1.png', 2), ('2.png', 2)], 'its 2 labels lie between 0 and 2'),
    ([('0.png', -5), ('1.png', 0), ('2.png', 1)], 'its 3 labels lie between -5 and 1'),
    ([('0.png', 0), ('1.png', 1), ('1.png', 0)], 'dataset.json gives a picture two labels'),
    ([('0.png', 0.5), ('1.png', 1), ('2.png', 0)], 'd.zip cannot be read: TypeError'),
    ([('0.png', [0, 1]), ('1.png', [1, 0]), ('2.png', [0, 1])], 'd.zip cannot be read: ValueError'),
    ([('0.png', 'cat'), ('1.png', 'dog'), ('2.png', 'cat')], 'd.zip cannot be read: TypeError'),
])
def test_dataset_json_gives_labels_wherever_it_lies_and_all_numbers_are_used(labels, expected, here, capfd):
    names = [f'a/b/{i}.png' for i in range(3)]
    stored('d.zip', pictures(3, 16), names, **{'a/b/dataset.json': json.dumps(dict(labels=labels))})
    assert fid.load_images('d.zip').shape == (3, 3, 16, 16)     # nobody asks for labels of what is judged
    if isinstance(expected, str): assert expected in refuses(capfd, '--pack', 'd.zip') and os.listdir() == ['d.zip']
    else:
        y = packed('d.zip')[1]
        assert (y if y is None else y.tolist()) == expected
        assert ('1 pictures have NO LABEL' in capfd.readouterr().out) == (expected == [1, -1, 0])

def test_pictures_are_as_the_camera_was_held_on_white_and_of_every_kind(here):
    up, exif = Image.new('RGB', (32, 32), 'blue'), Image.Exif()
    up.paste('red', (0, 0, 32, 16))
    exif[0x0112] = 6
    os.mkdir('d')
    for name in ('0.jpg', '0.png'): up.rotate(90).save(f'd/{name}', exif=exif)
    up.save('d/1.JPEG', 'MPO', save_all=True, append_images=[up.resize((8, 8))])        # as phones make them
    up.convert('CMYK').save('d/2.jpg')
    kinds = ['bmp', 'gif', 'tif', *[kind for kind in ('webp', 'avif') if f'.{kind}' in Image.registered_extensions()]]
    for kind in kinds: up.save(f'd/3.{kind}')
    x = fid.load_images('d')
    assert len(x) == 4 + len(kinds)
    for image in x: assert image[0, :12].min() > 190 > 60 > image[0, 20:].max() and image[2, 20:].min() > 190
    grey, colour = Image.new('L', (32, 32), 77), Image.new('RGB', (32, 32), (9, 99, 199))
    def with_alpha(image, mode, alpha): return Image.merge(mode, [*image.split(), Image.new('L', (32, 32), alpha)])
    for i, (image, key, expected) in enumerate([
            (grey, {}, (77, 77, 77)), (colour.quantize(4), {}, (9, 99, 199)), (grey.convert('1'), {}, (0, 0, 0)),
            (with_alpha(colour, 'RGBA', 0), {}, 'white'), (with_alpha(colour, 'RGBA', 128), {}, (131, 177, 227)),
            (with_alpha(grey, 'LA', 0), {}, 'white'), (grey, dict(transparency=77), 'white'),
            (colour, dict(transparency=(9, 99, 199)), 'white'), (colour.quantize(4), dict(transparency=0), 'white')]):
        os.mkdir(f'{i}')
        image.save(f'{i}/x.png', **key)
        expected = torch.tensor((255, 255, 255) if expected == 'white' else expected).view(3, 1, 1)
        if image.mode != '1': assert (fid.load_images(f'{i}')[0] - expected).abs().max() <= 1, i
        else: assert fid.load_images(f'{i}').unique().tolist() == [0, 255]

@pytest.mark.parametrize('name, content, message', [
    ('deep.png', deep_png(0, 1), 'of more than 8 bits'), ('deep.png', deep_png(2, 3), 'it is RGB of more than 8 bits'),
    ('deep.png', deep_png(6, 4), 'it is RGBA of more than 8 bits'), ('deep.png', deep_png(4, 2), 'of more than 8 bits'),
    ('f.tif', Image.new('F', (8, 8)), 'it is F of more than 8 bits'), ('i.tif', Image.new('I;16', (8, 8)), 'than 8 bits'),
    ('text.png', b'no picture', 'UnidentifiedImageError'), ('cut.png', png(torch.randint(256, (3, 9, 9)).byte())[:-60], ''),
    ('eps.png', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'UnidentifiedImageError'),     # is a program
], ids=str)
def test_a_picture_that_cannot_be_meant_is_named_and_nothing_is_left(name, content, message, here, capfd):
    stored('d', pictures(30, 8), [f'{i:02d}.png' for i in range(30)])
    if isinstance(content, bytes): Path('d', f'25-{name}').write_bytes(content)
    else: content.save(f'd/25-{name}')
    line = refuses(capfd, '--pack', 'd', '--res', 8)
    assert f'd/25-{name} cannot be read: ' in line and message in line
    assert {*os.listdir()} <= {'d', 'datasets'} and not list(here.glob('datasets/*'))

def test_packing_says_sizes_kinds_and_how_far_it_is_and_never_overwrites(here, capfd, monkeypatch):
    names = [f'{i:04d}.png' for i in range(1001)]
    stored('my.photos', pictures(1001, 16), names, **{'a.txt': b'', 'b.txt': b'', 'c.heic': b'', 'LICENSE': b''})
    stored('my.photos', pictures(1, 100), ['0500.png'])
    stored('my.photos', pictures(1, 9), ['0501.png'])
    clock = itertools.count(0, 25)
    with monkeypatch.context() as patch:
        patch.setattr(time, 'time', lambda: next(clock))
        fid.main(['--pack', 'my.photos/'])
    out, err = capfd.readouterr()
    assert 'my.photos/: 1001 pictures, no labels; 0.8 MB at 16 x 16' in out
    assert 'left out: 2 .txt, 1 LICENSE, 1 .heic' in out and '1000 of 1001 images, 0 s left' in err
    assert '2 of 1001 cropped and resized to 16 x 16, 1 enlarged' in err
    assert out.splitlines()[-1] == 'next: python ect.py --data datasets/my.photos.pt'
    before = Path('datasets/my.photos.pt').read_bytes()
    assert 'datasets/my.photos.pt exists' in refuses(capfd, '--pack', 'my.photos', '--res', 8)
    assert Path('datasets/my.photos.pt').read_bytes() == before and len(os.listdir('datasets')) == 1
    images, labels = torch.load('datasets/my.photos.pt', mmap=True, weights_only=True)
    assert images.shape == (1001, 3, 16, 16) and labels is None
    for side, res, *flags in ((50, 32), (15, 16), (64, 64), (200, 64), (50, 40, '--res', 40)):
        assert packed(stored(f'{side}', pictures(2, side), 'a.png b.png'.split()), *flags)[0].shape == (2, 3, res, res)
    stored('x.zip', pictures(2, 16), ['../../evil.png', '/tmp/evil-of-fid.png'])
    fid.main(['--pack', 'x.zip'])
    assert not any(Path(name).exists() for name in ('../../evil.png', '../evil.png', 'evil.png', '/tmp/evil-of-fid.png'))

def test_a_data_file_is_whole_or_not_there_and_only_its_images_are_in_memory(here, monkeypatch):
    stored('d', pictures(2500, 8), [f'{i:04d}.png' for i in range(2500)])
    made, pieces, pixels = [], [], fid.Pictures.pixels
    def watched(self, name, res):
        made.append(name)
        return pixels(self, name, res)
    for piece in fid.pieces(2500, 'd'): pieces.append(len(piece))
    monkeypatch.setattr(fid.Pictures, 'pixels', watched)
    monkeypatch.setattr(fid, 'pieces', lambda n, name: (made.clear() or range(i, i + 100) for i in range(0, n, 100)))
    fid.load_images('d')
    assert pieces == [1000, 1000, 500] and len(made) <= 100     # the next ones are not begun before these are kept
    def full(*argv): raise RuntimeError('unexpected pos') from OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError): fid.main(['--pack', 'd', '--save', 'x/y.pt'])
    assert not os.listdir('x')

@pytest.mark.parametrize('argv, message', [
    ('', 'give samples to judge, or pictures to --pack'), ('r.npz --pack d', 'give samples to judge, or pictures'),
    ('r.npz --res 8', '--res and --save belong to --pack'), ('--pack d --res -1', '--num and --res are positive'),
    ('--pack d --save d.npz', 'the name of a data file ends in .pt'), ('--pack nowhere', 'there is no nowhere'),
    ('--pack empty', 'it holds no pictures'), ('--pack readme.md', 'images are in a folder, .zip, .npz'),
    ('--pack float.npz', 'its images are float64 (6, 8, 8, 3)'), ('--pack flat.npz', 'its images are uint8 (6, 192)'),
    ('--pack first.npz', 'its images are uint8 (6, 8, 3, 8)'), ('--pack none.npz', 'its images are uint8 (0, 8, 8, 3)'),
    ('--pack object.npz', 'object.npz cannot be read: ValueError Object arrays'), ('--pack cut.npz', 'cut.npz cannot be read'),
    ('--pack huge.npz', 'huge.npz cannot be read'), ('--pack labels.npz', 'labels (5,) for 6 pictures'),
    ('--pack state.pt', 'state.pt cannot be read'), ('--pack evil.pt', 'evil.pt cannot be read: UnpicklingError'),
    ('--pack text.zip', 'text.zip cannot be read: BadZip'), ('names.npz', 'names.npz cannot be read: KeyError'),
    ('nowhere.npz', 'there is no nowhere.npz'), ('r.npz --ref nowhere', 'there is no nowhere'),
    ('r.npz --ref mu.npz', 'mu (4,) and sigma (3, 3) are no finite'), ('r.npz --ref nan.npz', 'are no finite statistics'),
    ('r.npz --ref a_clean_b.npz', 'made by another resize'), ('r.npz --ref evilmu.npz', 'ValueError Object arrays'),
    ('r.npz --ref evil.pkl --num 9', 'evil.pkl cannot be read: UnpicklingError it names posix.system'),
    ('r.npz --ref numpy.pkl --num 9', 'UnpicklingError it names numpy.load'), ('r.npz --ref object.pkl', 'cannot be read: KeyError'),
    ('run', 'run/latest.pt cannot be read: UnpicklingError'), ('r.npz --num x', 'invalid int value'),
    ('r.npz --ref r.npz --num 50', 'r.npz holds 40 images, fewer than 50'), ('one.npz --ref glyphs', 'one.npz holds 1 images'),
    ('r.npz --ref glyphs', 'glyphs are 16 x 16, these images 8 x 8'),
    ('r.npz', 'r.npz holds images of 8 x 8, beside no latest.pt of a run: say by --ref'),
    ('small.npz', 'small.npz holds images of 16 x 16, beside no latest.pt'),
    ('c.npz', 'cannot be read: OSError no network here: put it at datasets/cifar10-32x32.npz'),
    ('r.npz --ref r.npz', '6726825d.pth cannot be read: OSError no network here: put it at datasets/pt_inception-2015'),
])
def test_bad_input_of_fid_is_one_line_and_nothing_in_it_runs(argv, message, here, monkeypatch, capfd):
    class Evil:
        def __reduce__(self): return os.system, (f'touch {here}/owned',)
    x, objects = pictures(6, 8).permute(0, 2, 3, 1).numpy(), np.array([Evil()], object)
    for name, array in dict(float=x / 255, flat=x.reshape(6, -1), first=x.swapaxes(2, 3), none=x[:0], cut=x,
                            object=objects).items(): np.savez(f'{name}.npz', array)
    for name, mu, sigma in (('mu', np.zeros(4), np.zeros((3, 3))), ('nan', np.full(5, np.nan), np.zeros((5, 5))),
                            ('a_clean_b', np.zeros(5), np.eye(5)), ('evilmu', objects, np.eye(1))):
        np.savez(f'{name}.npz', mu=mu, sigma=sigma)
    np.savez('labels.npz', x, np.arange(5))
    np.savez('names.npz', a=x)
    os.mkdir('run')
    npz(r=pictures(40, 8), one=pictures(1, 16), small=pictures(9, 16), c=pictures(9, 32), **{'run/samples': pictures(9, 8)})
    Path('cut.npz').write_bytes(Path('cut.npz').read_bytes()[:900])
    with zipfile.ZipFile('huge.npz', 'w') as archive, archive.open('arr_0.npy', 'w') as file:
        np.lib.format.write_array_header_1_0(file, dict(descr='|u1', fortran_order=False, shape=(2, 10**7, 8, 3)))
    torch.save(dict(a=1, b=2, c=3), 'state.pt')
    torch.save((Evil(), None), 'evil.pt')
    torch.save(dict(config=dict(data=Evil())), 'run/latest.pt')
    for name, content in dict(evil=pickle.dumps(dict(fid=Evil())), numpy=b'\x80\x04cnumpy\nload\n.',
                              object=pickle.dumps(dict(fid=dict(mu=objects)), 4)).items():
        Path(f'{name}.pkl').write_bytes(content)
    os.mkdir('empty')
    stored('d', pictures(2, 8), ['0.png', '1.png'], **{'../readme.md': b'PK #', '../text.zip': b'PK #'})
    def no_network(*args, **kw): raise OSError('no network here')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    line = refuses(capfd, *argv.split())
    assert message in line and not Path('owned').exists() and not list(here.glob('datasets/*')), line

# --------------------------------------------------------------------------------------------------------- fid

class Small(nn.Module):
    """Stands in for Inception where features are not the matter: means of quarters of the channels, and products."""

    def __init__(self):
        super().__init__()
        self.calls, self.fc = 0, nn.Linear(15, 10)

    def forward(self, x):
        self.calls += len(x)
        q = nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)
        return torch.cat([q, q[:, :3] * q[:, 3:6]], 1), None

@pytest.fixture
def small(monkeypatch, here):
    """fid.py with the network Small, in an empty folder with a reference and samples, 40 images each"""
    net = Small()
    monkeypatch.setattr(fid, 'network', lambda: net)
    npz(ref=pictures(40, 8, 1), s=pictures(40, 8, 2))
    return net

def score(capfd, *argv):
    """What fid.py --json prints, as [{column: value}], and its stderr"""
    capfd.readouterr()
    fid.target.cache_clear()
    fid.main([*map(str, argv), '--json'])
    out, err = capfd.readouterr()
    return [{column: value[0] for column, value in row.items()} for row in json.loads(out)['models']], err

def of(x): return x.mean(0), np.cov(x.T)

def test_inception_has_the_tensors_of_pytorch_fids_file_and_agrees_with_its_network(here, monkeypatch):
    """Also image by image, read from a file of weights, whose sha256 is checked"""
    net, state, golden = fid.Inception(), {}, golden_of('inception')
    for j, (k, old) in enumerate(sorted(net.state_dict().items())):
        v = torch.randn(old.shape, generator=generator(1000 + j))
        if k.endswith(('running_var', 'bn.weight')): state[k] = 1 + 0.1 * v.abs()
        else: state[k] = 0.1 * v if v.ndim == 1 else v * (2 / v[0].numel())**0.5
    assert len(state) == 472 and sum(v.numel() for v in state.values()) == 23_885_392
    for name, shape in {
            'Conv2d_4a_3x3.conv.weight': (192, 80, 3, 3), 'Mixed_5d.branch_pool.bn.running_var': (64,),
            'Mixed_6a.branch3x3.conv.weight': (384, 288, 3, 3), 'Mixed_6b.branch7x7dbl_3.conv.weight': (128, 128, 1, 7),
            'Mixed_6e.branch7x7_3.conv.weight': (192, 192, 7, 1), 'Mixed_7a.branch7x7x3_4.bn.bias': (192,),
            'Mixed_7c.branch3x3_2a.conv.weight': (384, 384, 1, 3), 'fc.bias': (1008,)}.items():
        assert state[name].shape == shape, name
    net.load_state_dict(state, strict=True)
    for got, expected in zip(net(golden['images']), (golden['features'], golden['logits'])):
        close(got, expected, rtol=1e-4, atol=1e-4)
    os.mkdir('datasets')
    path = Path('datasets', fid.WEIGHTS.rsplit('/', 1)[1])
    torch.save(state, path)
    with pytest.raises(SystemExit): fid.network()
    monkeypatch.setattr(fid, 'WEIGHTS_SHA256', hashlib.sha256(path.read_bytes()).hexdigest())
    alone = torch.cat([fid.network()(image[None])[0] for image in golden['images']])
    fid.network.cache_clear()
    close(alone, golden['features'], rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('n', [16, 32, 64, 299, 512])
def test_the_resize_is_that_of_tensorflow_1(n):
    """A ramp tells the grid: samples at i n / 299, and beyond the edge the edge"""
    ramp, i = torch.arange(n).clamp(max=255).to(torch.uint8).expand(1, 3, n, n), np.arange(299)
    for x, axis in ((ramp, 3), (ramp.mT, 2)):
        got = fid.Inception.input(None, x).movedim(axis, 3)[0, 1, 7].double().numpy() * 128 + 128
        np.testing.assert_allclose(got, (i * n / 299).clip(0, min(n - 1, 255)), atol=0.02 if n > 256 else 2e-3)

def test_frechet_is_exact_also_for_singular_covariances():
    """In closed form, turned, against the singular values of centred samples, and 0 for itself"""
    rng = np.random.default_rng(0)
    a, b, m = rng.uniform(0, 2, 300), rng.uniform(0, 2, 300), rng.standard_normal(300)
    a[:120] = b[80:200] = 0             # exact zeros, not the same
    a[250:] = 1e-7                      # small, but no rounding
    expected = (m**2).sum() + ((a**0.5 - b**0.5)**2).sum()
    for q in (np.eye(300), np.linalg.qr(rng.standard_normal((300, 300)))[0]):
        assert abs(fid.frechet(m, q * a @ q.T, 0 * m, q * b @ q.T) - expected) < 1e-9 * expected
    assert fid.frechet(m, 0 * q, 0 * m, np.diag(b)) == pytest.approx((m**2).sum() + b.sum())
    for n in (100, 2000):
        x, y = (rng.standard_normal((n, 300)) * np.geomspace(1, 0.03, 300) @ q for q in rng.standard_normal((2, 300, 300)) / 17)
        cx, cy = ((v - v.mean(0)) / (n - 1)**0.5 for v in (x, y))
        cross = np.linalg.svd(cx @ cy.T, compute_uv=False).sum()
        exact = ((x.mean(0) - y.mean(0))**2).sum() + (cx**2).sum() + (cy**2).sum() - 2 * cross
        assert fid.frechet(*of(x), *of(y)) == pytest.approx(exact, rel=1e-9) == fid.frechet(*of(y), *of(x))
        assert abs(fid.frechet(*of(x), *of(x))) < 1e-9

def test_frechet_inf_is_the_intercept_over_one_over_n():
    """Features whose distance is about c + 40 / n: the line meets the axis nearer the truth than the whole sample."""
    mu, sigma = np.zeros(40), np.eye(40)
    x = (np.random.default_rng(0).standard_normal((12_000, 40)) * 1.05).astype(np.float32)
    truth, plain, limit = 40 * 0.05**2, fid.frechet(*of(x), mu, sigma), fid.frechet_inf(x, mu, sigma)
    assert abs(limit - truth) < 0.5 * (plain - truth) and plain > truth
    draw, sizes = np.random.RandomState(0), np.linspace(5000, 12_000, 15).astype(int)
    values = [fid.frechet(*of(x[draw.choice(12_000, size, replace=False)].astype(float)), mu, sigma) for size in sizes]
    assert limit == pytest.approx(stats.linregress(1 / sizes, values).intercept, rel=1e-6)

def test_inception_score_and_kernel_distance_are_their_definitions_term_by_term():
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
    x, y = (rng.standard_normal((n, 4)).astype(np.float32) + shift for n, shift in ((13, 0), (9, 0.5)))
    k, draw, values = lambda a, b: (float(a @ b) / 4 + 1)**3, np.random.RandomState(0), []
    for _ in range(100):
        a, b = (v[draw.choice(len(v), 9, replace=False)].astype(float) for v in (x, y))
        same = sum(k(u[i], u[j]) for u in (a, b) for i in range(9) for j in range(9) if i != j) / (9 * 8)
        values.append(same - 2 * np.mean([[k(p, q) for q in b] for p in a]))
    assert fid.kernel_distance(x, y) == pytest.approx(np.mean(values), rel=1e-9)

def test_precision_and_recall_count_the_balls_of_the_third_neighbour():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((60, 3)).astype(np.float32)
    fake = (0.5 * rng.standard_normal((50, 3)) + 0.9).astype(np.float32)

    def share(x, y):
        def d(a, b): return np.sqrt(((a.astype(float)[:, None] - b.astype(float)[None])**2).sum(-1))
        return np.mean([any(d(p[None], c[None])[0, 0] <= np.sort(d(c[None], y)[0])[3] for c in y) for p in x])
    got = fid.precision_recall(real, fake)
    assert got == pytest.approx((share(fake, real), share(real, fake))) and 1 > got[0] > got[1] + 0.1 > 0.1

def test_statistics_are_those_of_numpy_on_edms_subset_and_every_second_feature_of_many_is_kept(small, capfd):
    """EDM shuffles all numbers by seed 0 and takes the first."""
    images, order = pictures(2300, 8), np.arange(2300)
    npz(a=images)
    np.random.RandomState(0).shuffle(order)
    score(capfd, 'a.npz', '--ref', 'ref.npz', '--num', 2000)
    some, many = images[np.sort(order[:2000])], torch.randint(256, (50_003, 3, 2, 2), dtype=torch.uint8)
    for path, used, every in (('a.npz', some, 1), ('b', many, 2)):
        found, x = fid.statistics(path, used), small(used)[0].double().numpy()
        np.testing.assert_allclose(found.mu, x.mean(0), rtol=0, atol=1e-7)
        np.testing.assert_allclose(found.sigma, np.cov(x.T), rtol=0, atol=1e-7)
        np.testing.assert_allclose(found.features, x[::every], rtol=0, atol=1e-6)
    assert small.calls == 40 + 2000 + 2000 + 2 * 50_003         # those of a.npz were found again

def test_results_are_kept_by_content_and_a_damaged_file_of_them_is_made_again_aloud(small, capfd, monkeypatch):
    first, err = score(capfd, 's.npz', '--ref', 'ref.npz')
    assert small.calls == 80 and 'damaged' not in err
    cache, calls = Path('s.npz.inception.fid'), 80
    kept, written = cache.read_bytes(), cache.stat().st_mtime_ns
    assert score(capfd, 's.npz', '--ref', 'ref.npz')[0] == first and small.calls == 80
    assert cache.stat().st_mtime_ns == written                  # not written again
    for damaged in (kept[:0], kept[:300], kept[:-1], kept[:600] + b'?' + kept[601:], b'text'):
        cache.write_bytes(damaged)
        again, err = score(capfd, 's.npz', '--ref', 'ref.npz')
        calls += 40
        assert again == first and small.calls == calls and 's.npz.inception.fid is damaged, and made again' in err
        assert cache.stat().st_size == len(kept)
    npz(ref=pictures(40, 8, 3))                                 # the same name, size and length
    assert score(capfd, 's.npz', '--ref', 'ref.npz')[0] != first and small.calls == calls + 40
    monkeypatch.setattr(os, 'access', lambda *a: False)
    _, err = score(capfd, 's.npz', '--ref', 'ref.npz', '--num', 20)
    assert 'is read-only: the statistics of s.npz are not kept' in err and small.calls == calls + 60
    assert cache.stat().st_size == len(kept)

def test_several_fids_at_once_in_one_folder_all_end_well(here):
    for k in range(3): npz(**{f's{k}': pictures(30, 8, k)})
    code = f"""import sys; sys.path.insert(0, {str(HERE)!r})
import fid, torch
class Small(torch.nn.Module):
    def forward(self, x): return x.flatten(1)[:, ::13].float() / 255, None
net = Small()
net.fc = torch.nn.Linear(15, 10)
torch.nn.init.ones_(net.fc.weight)
fid.network = lambda: net
fid.main(['s0.npz', 's1.npz', 's2.npz', '--ref', 's0.npz'])"""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    jobs = [subprocess.Popen([sys.executable, '-c', code], **pipes) for _ in range(3)]
    said = [(*job.communicate(), job.returncode) for job in jobs]
    assert [code for *_, code in said] == [0] * 3, said
    assert len({out for out, *_ in said}) == 1 and not list(here.glob('*.part')) and len(list(here.glob('*.fid'))) == 3
    for k in range(3): assert np.load(f's{k}.npz.inception.fid')['mu'].shape == (15,)

def test_statistics_files_of_edm_adm_and_edm2_are_read_and_want_50000_samples(small, capfd):
    direct, _ = score(capfd, 's.npz', '--ref', 'ref.npz')
    ours = np.load('ref.npz.inception.fid')
    mu, sigma = ours['mu'], ours['sigma']
    assert mu.dtype == sigma.dtype == np.float64
    np.savez('edm.npz', mu=mu, sigma=sigma)
    np.savez('adm.npz', arr_0=np.zeros((4, 8, 8, 3), np.uint8), mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3, :3])
    for count in (40, np.int64(40)):
        content = dict(num_images=count, fid=dict(mu=mu, sigma=sigma), fd_dinov2=dict(mu=2 * mu, sigma=sigma))
        Path(f'edm2{type(count).__name__}.pkl').write_bytes(pickle.dumps(content, 4))
    for name in ('edm.npz', 'adm.npz', 'edm2int.pkl', 'edm2int64.pkl', 'ref.npz.inception.fid'):
        (row,), _ = score(capfd, 's.npz', '--ref', name, '--num', 40)
        assert row['FID'] == direct[0]['FID'] and row['IS'] == direct[0]['IS'] and row['KID x1000'] is None, name
    assert 's.npz holds 40 images, fewer than 50000' in refuses(capfd, 's.npz', '--ref', 'edm.npz')
    np.savez('edm.npz', mu=mu[:9], sigma=sigma[:9, :9])
    assert 'has 9 features, not 15' in refuses(capfd, 's.npz', '--ref', 'edm.npz', '--num', 40)

def test_the_reference_is_what_the_run_was_trained_on_else_by_size(small, capfd):
    def run_on(name, data, images):
        Path('runs', name).mkdir(parents=True, exist_ok=True)
        torch.save(dict(method='ect', step=1, config=dict(data=data)), f'runs/{name}/latest.pt')
        npz(**{f'runs/{name}/samples': images})
    saved('photos.pt', pictures(60, 24))
    saved('small.pt', pictures(50, 16), torch.arange(50))
    run_on('photos', 'photos.pt', pictures(40, 24, 5))
    run_on('small', 'small.pt', pictures(40, 16, 5))
    run_on('digits', 'glyphs', fid.glyphs(16, 40, 5)[0])
    stored('runs/photos/png', pictures(3, 24, 6), ['0.png', '1.png', '2.png'])
    rows, err = score(capfd, 'runs/photos', 'runs/small/samples.npz', 'runs/digits', 'runs/photos/png')
    assert [(row['model'], row['reference'], row['reference_n'], row['n']) for row in rows] == [
        ('runs/photos', 'photos.pt', 60, 40), ('runs/small', 'small.pt', 50, 40), ('runs/digits', 'glyphs', 20_000, 40),
        ('runs/photos/png', 'photos.pt', 60, 3)] and 'by its size' not in err
    assert rows[0]['FID'] > 0 < rows[0]['KID x1000'] and 'FID' not in rows[2] and rows[2]['sure'] > 0.99
    assert Path('photos.pt.inception.fid').exists() and not list(Path('runs/digits').glob('*.fid'))
    fid.main(['runs/photos', 'runs/digits', 'runs/small'])
    text = capfd.readouterr().out       # no best across references
    assert '*' not in text and text.splitlines()[2].split()[-2:] == ['glyphs', '20000']
    assert score(capfd, 'runs/small', '--ref', 'glyphs')[0][0]['sure'] == 0
    os.remove('photos.pt')
    line = 'runs/photos/samples.npz is of a run on photos.pt, which is not here: say by --ref where it is'
    assert line in refuses(capfd, 'runs/photos')
    os.mkdir('datasets')
    statistics = dict(mu=np.zeros(15), sigma=np.eye(15))
    np.savez('datasets/cifar10-32x32.npz', **statistics)
    Path('datasets/img64.pkl').write_bytes(pickle.dumps(dict(num_images=9, fid=statistics), 4))
    for side, name in ((32, 'cifar10'), (64, 'imagenet64')):
        npz(s=pictures(40, side))
        rows, err = score(capfd, 's.npz', '--num', 40)
        assert rows[0]['reference'] == name and f's.npz is compared with {name}, by its size' in err
        run_on('known', name, pictures(40, side))
        rows, err = score(capfd, 'runs/known', '--num', 40)
        assert rows[0]['reference'] == name and 'by its size' not in err

def test_own_pictures_of_odd_sizes_are_compared_at_the_size_of_the_samples_aloud(small, capfd):
    for i, (image, (h, w)) in enumerate(zip(pictures(60, 50), [(50, 50), (50, 37), (20, 30), (24, 24)] * 15)):
        stored('photos', [image[:, :h, :w]], [f'{"ab"[i % 2]}/{i:02d}.png'])
    npz(s=pictures(40, 24, 1))
    (row,), err = score(capfd, 's.npz', '--ref', 'photos')
    assert row['reference_n'] == 60 and 'photos: 45 of 60 cropped and resized to 24 x 24, 15 enlarged' in err
    features = [small(x)[0].double().numpy() for x in (fid.load_images('s.npz'), fid.load_images('photos', 24))]
    assert row['FID'] == pytest.approx(fid.frechet(*of(features[0]), *of(features[1])), rel=1e-6)
    (row,), err = score(capfd, 'photos', '--ref', 'photos')
    assert abs(row['FID']) < 1e-9 and 'photos: 45 of 60 cropped and resized to 50 x 50, 45 enlarged' in err

def test_table_and_contact_sheet_of_several_and_copies_are_said(small, capfd):
    def row(name, values, n, p, ref='r'):
        k = len(values)
        return dict(model=[name], FID=values, IS=[None] * k, precision=[p] * k, share_min=[p] * k, sure=[0.] * k,
                    n=[n] * k, reference=[ref] * k, reference_n=[9] * k)
    head, a, longer = fid.table([row('a', [3., 1., 2.], 50000, .7), row('longer', [1.5] * 3, 50000, .6)]).splitlines()
    assert head.split() == 'model FID precision share_min sure n reference reference_n'.split() and len(a) == len(longer)
    assert '2.000 +- 1.000 (min 1.000) ' in a and '1.500 +- 0.000 (min 1.500)*' in longer
    assert '0.700)*' in a and '0.600)*' not in longer and (a + longer).count('*') == 4
    for other in (row('b', [1.5], 200, .6), row('b', [1.5], 100, .6, 'another')):
        assert '*' not in fid.table([row('a', [3.], 100, .7), other])
    for k, name in enumerate(('a/0', 'a/1', 'b/0')):
        Path(name).parent.mkdir(exist_ok=True)
        npz(**{name: pictures(40, 8, k)})
    npz(twice=pictures(20, 8).repeat(2, 1, 1, 1))
    _, err = score(capfd, 'a/0.npz', 'b/0.npz', 'twice.npz', '--ref', 'ref.npz', '--out', 'x.png')
    assert err.count('copies') == 1 and 'twice.npz: 20 of 40 images are copies of another' in err
    picture = np.asarray(Image.open('x.png'))
    first = pictures(40, 8, 2)[0].permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)           # second row, enlarged
    assert picture.shape[0] == 3 * 70 + 6 and (picture[76:140, -16 * 64:-15 * 64] == first).all()
    fid.main('a/0.npz a/1.npz b/0.npz --ref ref.npz --mean'.split())
    head, a, b = capfd.readouterr().out.splitlines()
    assert a.split()[0] == 'a' and '(min ' in a and '(min ' not in b and Path('fid.png').exists()

@pytest.fixture(scope='module')
def digits(): return fid.Digits()

def damaged_digits(n):
    """{name: uint8 (n, 3, 16, 16)}, of a seed of their own"""
    held_out, labels = fid.glyphs(16, n, 2)
    x, g = held_out.float(), generator(3)
    mean, grain = x.mean((2, 3), keepdim=True), torch.randn(x.shape, generator=g)
    def blur(k): return nn.functional.avg_pool2d(nn.functional.pad(x, (k // 2,) * 4, 'replicate'), k, 1)
    kinds = {
        'held out': x, 'grain of 4': x + 4 * grain, 'red + 20': x + torch.tensor([20, 0, 0]).view(3, 1, 1),
        'grain of 8': x + 8 * grain, 'no fours': x[labels != 4].repeat(2, 1, 1, 1)[:n], 'contrast 0.8': mean + .8 * (x - mean),
        'grey': x.mean(1, keepdim=True).expand_as(x), 'grain of 16': x + 16 * grain, 'two mixed': (x + x.roll(1, 0)) / 2,
        'blur 3': blur(3), 'mirrored': x.flip(3), 'contrast 0.5': mean + .5 * (x - mean), 'blur 5': blur(5),
        'inverted': 255 - x, 'one colour': mean.expand_as(x), 'noise': torch.randint(256, x.shape, generator=g)}
    return {name: image.round().clamp(0, 255).byte() for name, image in kinds.items()}

def test_held_out_digits_are_recognised_and_damage_is_ranked(digits):
    images, labels = fid.glyphs(16, 10_000, 2)
    assert (digits.left(images).argmin(1) == labels).double().mean() > 0.999
    rows = {name: digits.judge(images) for name, images in damaged_digits(2000).items()}
    for name, row in rows.items(): print(f'{row["FD-digits"]:7.3f} {row["sure"]:.3f} {name}')
    d, sure = ({name: row[column] for name, row in rows.items()} for column in ('FD-digits', 'sure'))
    assert d.pop('held out') < 0.12 and min(d.values()) > 0.3 and max(d, key=d.get) == 'noise'
    for names in ('grain of 4, grain of 8, grain of 16', 'contrast 0.8, contrast 0.5', 'blur 3, blur 5, inverted, noise',
                  'red + 20, no fours, two mixed, mirrored, one colour, noise'):
        for a, b in itertools.pairwise(names.split(', ')): assert 1.5 * d[a] < d[b], (a, b)
    for name in ('held out', 'grain of 8', 'contrast 0.5', 'grey', 'no fours'): assert sure[name] > 0.99, name
    for name in ('noise', 'inverted', 'one colour', 'blur 5'): assert sure[name] < 0.02, name
    for name in ('blur 3', 'two mixed', 'mirrored'): assert 0.02 < sure[name] < 0.9, name
    assert rows['no fours']['share_min'] == 0 and rows['no fours']['share_max'] > 0.11
    assert all(abs(rows['held out'][f'share_{side}'] - 0.1) < 0.002 for side in ('min', 'max'))
    assert all(abs(rows['held out'][f'colour_{side}'] - 1) < 0.05 for side in ('min', 'max'))
    assert abs(rows['grey']['colour_min'] - 0.62) < 0.05

def figures_of_digits(digits):
    """Measures of three sets of 3000 images, for a comparison of machines: (3, 6)"""
    x, g = fid.glyphs(16, 3000, 2)[0], generator(0)
    noise = torch.randint(-8, 9, x.shape, generator=g)
    return np.array([[*digits.judge(v).values()] for v in (x, x // 2 + 60, (x + noise).clamp(0, 255).byte())])

def test_fd_digits_is_the_same_to_four_digits_on_machines_that_round_differently(digits):
    """Here, on plain instructions, and where these figures were made; Pillow 10.1 differs by 3e-5."""
    expected = [[0.04237080, 1, 0.1, 0.1, 0.9779771, 0.9813985], [19.6170057, 1, 0.1, 0.1, 0.4889784, 0.4908279],
                [0.69607864, 1, 0.1, 0.1, 0.9760025, 0.9789625]]
    np.testing.assert_allclose(figures_of_digits(digits), expected, rtol=2e-4)
    code = f"""import sys; sys.path.insert(0, {str(HERE)!r})
import fid, torch, numpy as np; generator = lambda seed: torch.Generator().manual_seed(seed)
{inspect.getsource(figures_of_digits)}
print(figures_of_digits(fid.Digits()).tolist())"""
    other = os.environ | dict(ATEN_CPU_CAPABILITY='default', OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=other)
    np.testing.assert_allclose(json.loads(done.stdout), expected, rtol=2e-4)

# ----------------------------------------------------------------------------------------------------- GPU
# pytest -s -k test_gpu test_all.py prints what it measures. GPU_CHECK=cpu: on a CPU, in toy size.

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

@contextlib.contextmanager
def waits(mode):
    """In here, what waits for the GPU is an 'error', or as usual ('default')."""
    if GPU.type == 'cpu': return (yield)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try: yield
    finally: torch.cuda.set_sync_debug_mode(before)

def switch(amp):
    """As a process of the scripts does"""
    torch.backends.cudnn.benchmark = amp == 'off'
    torch.backends.cudnn.allow_tf32 = amp != 'off'
    torch.set_float32_matmul_precision('highest' if amp == 'off' else 'high')

def first_step(name, arch, device, amp):
    """Loss (16,) and gradient of a step of the last phase, random network -> on the CPU, float64"""
    module, cfg = MODULES[name], config(name, *short(name), '--res', 16, '--cond', 1, '--arch', arch)
    cfg.amp = amp
    switch(amp)
    torch.manual_seed(0)
    loss, (x, z) = module.Loss(module.UNet(cfg), cfg, None).to(device), torch.randn(2, 16, 3, 16, 16)
    for p in loss.parameters(): p.data = 0.1 * torch.randn(p.shape).to(device)
    inputs = [v.to(device) for v in (x / 2, torch.arange(16) % 10, torch.rand(16, 2).double(), z)]
    step = sum(getattr(cfg, knob, 0) for knob in ('warmup', 'stage1', 'H'))     # scm: all of the tangent
    with module.autocast(cfg, device): value = loss(*inputs, step)
    (1024 * value.mean()).backward()    # as the scaler of fp16 does
    grads = [p.grad.flatten() / 1024 for p in loss.parameters() if p.grad is not None]
    return value.detach().double().cpu(), torch.cat(grads).double().cpu()

@needs_gpu
@pytest.mark.parametrize('name, arch', [(n, a) for n in METHODS for a in MODULES[n].CHOICES['arch']])
def test_gpu_step_is_that_of_the_cpu(name, arch, say):
    value, grad = first_step(name, arch, torch.device('cpu'), 'off')
    for amp, limit in (('off', 1e-4), ('tf32', 0.1), ('fp16', 0.1), ('bf16', 0.2)):
        low_value, low_grad = first_step(name, arch, GPU, amp)
        say(f'{name} {arch}, {amp}: error of a loss against the CPU', relative(low_value, value), limit)
        say(f'{name} {arch}, {amp}: error of its gradient', relative(low_grad, grad), limit)

def moved(name, argv, state):
    """The way of all weights from where a run by argv started to its checkpoint"""
    module, cfg = MODULES[name], config(name, *argv)
    first = module.Loss(module.new_network(cfg), cfg, None).state_dict()
    return torch.cat([(v.cpu().double() - first[k].double()).flatten() for k, v in state['loss'].items()])

@needs_gpu
@every_method
def test_gpu_trains_in_every_precision_without_waits_and_resumes(name, data, tmp_path, monkeypatch, say):
    """The scaler of fp16 may wait, and sct for the classes of its references. Resumed not to the bit: some of
    cuDNN's kernels add in any order."""
    module, step, interrupted = MODULES[name], MODULES[name].Run.step, []

    def watched(run, i):
        if interrupted == [i]: raise KeyboardInterrupt
        with waits('default' if run.cfg.amp == 'fp16' else 'error'): return step(run, i)
    monkeypatch.setattr(module.Run, 'step', watched)
    monkeypatch.setattr(nn.Module, 'compile', lambda self, **how: None)        # it would take minutes, and waits
    if GPU.type == 'cuda':              # a wait is told
        with pytest.raises(RuntimeError), waits('error'): torch.ones(1, device=GPU).item()
    argv = ['--data', data, *short(name), *'--steps 10 --save_every 5 --cond 0 --amp'.split()]
    for amp in ('off', 'tf32', 'fp16', 'bf16'):
        for arch in module.CHOICES['arch'] if '16' in amp else module.CONFIG['arch'][:1]:
            run = go(name, *argv, amp, '--arch', arch, '--out', tmp_path / amp / arch)
            bad = sum((~v.isfinite()).sum().item() for v in run['loss'].values())
            say(f'{name} {arch}, {amp}: weights not finite after 10 steps without waits', bad, 0)
            if amp == 'off': whole = moved(name, argv[:-1], run)
    interrupted.append(7)
    with pytest.raises(SystemExit): go(name, *argv, 'off', '--out', tmp_path / 'parts')
    interrupted.clear()
    parts = moved(name, argv[:-1], go(name, *argv, 'off', '--out', tmp_path / 'parts'))
    say(f'{name}: way of the weights in 10 steps, the 8th interrupted', relative(parts, whole), 1e-3)

@needs_gpu
@pytest.mark.parametrize('name, way', [('ect', '--micro 3'), ('ect', '--gpus 2'), ('ect', '--compile'),
                                       ('scm', '--compile')])
def test_gpu_run_is_the_same_in_micro_batches_processes_and_compiled(name, way, data, tmp_path, say):
    if way == '--gpus 2' and torch.cuda.device_count() < 2: pytest.skip('there are not two GPUs')
    argv = ['--data', data, *short(name), '--steps', 8, '--amp', 'off']
    one, other = (moved(name, argv, go(name, *argv, *more, '--out', tmp_path / f'{len(more)}'))
                  for more in ([], way.split()))
    say(f'{name} {way}: way of the weights in 8 steps against one process', relative(other, one), 1e-3)

@needs_gpu
def test_gpu_compiled_student_and_target_share_dropout_masks(say):
    """They are two graphs, one of which has no gradient."""
    switch('off')
    cfg, t = config('ect', *short('ect'), '--dropout', 0.5), torch.ones(8, device=GPU).double()
    net, (x, z) = ect.UNet(cfg).to(GPU), torch.randn(2, 8, 3, 16, 16, device=GPU)
    for p in net.parameters(): nn.init.normal_(p, std=0.1)
    net.compile(dynamic=False, backend=BACKEND)
    loss = ect.Loss(net, cfg, None)
    near, far = (loss.pair(x, None, z, t, r, 5).mean().item() for r in (t - 1e-6, t - 0.1))
    say('ect --compile: loss at r = t over that at r = 0.9 t', near / far, 1e-2)

# Speed. By the clock a pass takes also what Python needs to start its kernels, 40 us each on a slow host, and
# more than they take themselves in fp16. So the kernels' own time stands beside it.

OPERATIONS = dict(cifar10=127.1e9, imagenet64=604.8e9)          # an image, both ways, by torch's counter
BACKEND = 'inductor' if GPU.type == 'cuda' else 'aot_eager'

def clock(work):
    """Median of five after three to warm up -> seconds, {kernel: seconds} of one more, GB at most"""
    def once():
        began = time.perf_counter()
        work()
        if GPU.type == 'cuda': torch.cuda.synchronize()
        return time.perf_counter() - began
    for _ in range(3): once()           # in the first cuDNN tunes, with more memory
    if GPU.type == 'cuda': torch.cuda.reset_peak_memory_stats()
    seconds, memory = sorted(once() for _ in range(5))[2], torch.cuda.max_memory_allocated() / 1e9
    kernels, kind = {}, getattr(torch.profiler.ProfilerActivity, GPU.type.upper())
    with torch.profiler.profile(activities=[kind]) as trace: once()
    for event in trace.events():
        if event.device_type.name == GPU.type.upper():
            kernels[event.name] = kernels.get(event.name, 0) + event.time_range.elapsed_us() / 1e6
    return seconds, kernels, memory

def recipe(network, batch, amp, *argv):
    """Knobs of ect's column; on a CPU those of a tiny network"""
    tiny = [*TINY[:8], '--res', 16, '--head_dim', 0, '--classes', 10] * (GPU.type == 'cpu')
    switch(amp)
    return config('ect', '--data', network, '--init', 'none', '--batch', batch, '--amp', amp, *tiny, *argv)

def timed(network, batch, amp, last=False, compiled=False, lock=contextlib.nullcontext()):
    """A pass of a recipe's network, forward and backward -> clock(), error of compiled code's gradient"""
    if GPU.type == 'cpu': batch = 2
    cfg, gradients = recipe(network, batch, amp, '--dropout', 0), []
    torch.manual_seed(0)
    with GPU: net = ect.UNet(cfg).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    for p in net.parameters():
        if p.ndim > 1: nn.init.normal_(p, std=p[0].numel()**-0.5)
        else: nn.init.constant_(p, 0.5)
    x, t = torch.randn(batch, 3, cfg.res, cfg.res, device=GPU), torch.rand(batch, device=GPU)
    y = torch.arange(batch, device=GPU) % cfg.classes if cfg.cond else None

    def work():
        net.zero_grad()
        with ect.autocast(cfg, GPU): loss = net(x, t, y).square().mean()
        (1024 * loss).backward()
    for _ in range(2 * compiled):
        work()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        if len(gradients) == 1: net.compile(dynamic=False, backend=BACKEND)
    error = relative(*gradients) if compiled else None
    gradients.clear()
    torch.cuda.empty_cache()
    with lock: return *clock(work), error

@needs_gpu
def test_gpu_speed_of_networks_and_compiled_code_agrees(monkeypatch, say):
    monkeypatch.setenv('TORCHINDUCTOR_COMPILE_THREADS', '3')
    where = torch.cuda.get_device_name() if GPU.type == 'cuda' else 'CPU in place of a GPU'
    say(f'{torch.cuda.device_count()} x {where}; torch {torch.__version__}, CUDA {torch.version.cuda}')
    products, size = {}, 8192 if GPU.type == 'cuda' else 64
    for amp, dtype in dict(off=None, tf32=None, fp16=torch.float16, bf16=torch.bfloat16).items():
        switch(amp)
        a, b = torch.randn(2, size, size, device=GPU, dtype=dtype)
        products[amp] = 2 * size**3 / clock(lambda: a @ b)[0]
        say(f'product of matrices, {amp}: {products[amp] / 1e12:.0f} TFLOP/s')
    eager = [('cifar10', batch, amp) for batch in (64, 128, 16) for amp in products]
    eager += [('imagenet64', 32, amp) for amp in ('tf32', 'fp16', 'bf16')]      # float32 tunes half a minute
    eager += [(*case, True) for case in eager if case[1] in (32, 64) and case[2] != 'off']
    cases = [('cifar10', 64, amp, False, True) for amp in ('off', 'tf32', 'fp16')]
    cases += [('imagenet64', 32, amp, False, True) for amp in ('tf32', 'fp16')]

    def rows():
        for case in eager: yield *case, timed(*case)
        context = multiprocessing.get_context('spawn')          # code is compiled side by side, timed in turn
        with context.Manager() as manager, ProcessPoolExecutor(len(cases), context) as pool:
            found = pool.map(timed, *zip(*cases), itertools.repeat(manager.Lock()))
            for case in cases: yield *case, next(found)
    for network, batch, amp, *way, (seconds, kernels, memory, error) in rows():
        own, what = sum(kernels.values()), f'{network}, batch {batch}, {amp}'
        what += ', channels_last' * (way == [True]) + ', compiled' * (way == [False, True])
        say(f'{what}: {batch / seconds:.0f} images/s by the clock, {batch / own:.0f} by the kernels, '
            f'{OPERATIONS[network] * batch / own / products[amp]:.0%} of the product, {memory:.1f} GB')
        if error is not None: say(f'{what}: error of the gradient', error, 1e-3 if amp == 'off' else 0.1)
        torch.cuda.empty_cache()

@needs_gpu
@pytest.mark.parametrize('network, batch, amp', [('cifar10', 64, 'off'), ('imagenet64', 32, 'tf32')])
def test_gpu_speed_of_a_step_and_its_ten_longest_kernels(network, batch, amp, tmp_path, say):
    cfg = recipe(network, batch, amp, '--warmup', 0, '--out', tmp_path)
    data = torch.randint(256, (512, 3, cfg.res, cfg.res), dtype=torch.uint8), torch.arange(512) % cfg.classes
    run, steps = ect.Run(cfg, data, 0, 1, GPU), itertools.count()
    seconds, kernels, memory = clock(lambda: run.step(next(steps)))
    own = sum(kernels.values())
    say(f'ect, step of {network}, batch {batch}, {amp}: {batch / seconds:.0f} images/s, {memory:.1f} GB; '
        f'the GPU works {own * 1000:.0f} of {seconds * 1000:.0f} ms')
    for name in sorted(kernels, key=kernels.get)[:-11:-1]: say(f'{kernels[name] / own:6.1%} {name[:90]}')
