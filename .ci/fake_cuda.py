"""Usage, from the project's root: python .ci/fake_cuda.py [--syncs] [script ...]  -> exit 1 and one line if a device or dtype error appears.

Runs train() (every phase, a resume, micro-batches, one process, the first of eight on torch's fake process group with
DistributedDataParallel left out), write_samples() and fid.py's extract() with tensors that only pretend to be on cuda:0: shapes,
strides, dtypes, devices and autocast are those of CUDA, there are no values. Tensors of the CPU are real. --syncs lists
what waits for the GPU in an ordinary training step. Not shown: kernels, numbers, NCCL, races, memory, speed.
"""
import argparse, collections, contextlib, importlib, io, logging, math, os, sys, tempfile, threading, traceback, warnings
from pathlib import Path

sys.path.insert(0, os.getcwd())
sys.dont_write_bytecode = True
import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

aten, GPU = torch.ops.aten, torch.device('cuda', 0)
torch.set_num_threads(1)
logging.getLogger('torch').setLevel(logging.ERROR)

# ------------------------------------------------------------------------------------- what pretends to be a driver

class Generator:
    """torch.Generator, of the CPU whatever the device asked for; says so to the mode, which checks it."""

    def __new__(cls, device='cpu'):
        g = REAL_GENERATOR('cpu')
        if torch.device(device).type == 'cuda': GPU_GENERATORS.append(g)
        return g


REAL_GENERATOR, GPU_GENERATORS = torch.Generator, collections.deque(maxlen=64)
torch.Generator = Generator
torch.cuda._lazy_init = lambda: None
torch.cuda.is_available = lambda: sys._getframe(1).f_code.co_filename.startswith(os.getcwd())     # torch itself must not believe it
torch.cuda.is_bf16_supported = lambda *a, **k: True
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.manual_seed_all = torch.cuda.manual_seed = lambda seed: None
torch.cuda.get_rng_state = lambda device='cuda': torch.zeros(16, dtype=torch.uint8)
torch.cuda.set_rng_state = lambda state, device='cuda': None
torch.cuda.mem_get_info = lambda device=None: (80 << 30, 80 << 30)
torch.cuda.max_memory_allocated = lambda device=None: 0
torch.cuda.current_device = lambda: 0
torch.cuda.device_count = lambda: 8
torch.cuda.set_device = lambda device: None
torch.Tensor.pin_memory = lambda self: self


def apply(self, fn, recurse=True):
    """Module.to() without torch's swapping of tensor classes, which weak references forbid: new Parameters where something changes."""
    for child in self.children(): child._apply(fn)
    for table in (self._parameters, self._buffers):
        for name, old in table.items():
            if old is None: continue
            with torch.no_grad(): new = fn(old)
            if new is not old: table[name] = torch.nn.Parameter(new, old.requires_grad) if table is self._parameters else new
    return self


torch.nn.Module._apply = apply


def backward(self, gradient=None, *_, **__):
    """Tensor.backward() in Python: torch's engine asks a driver for streams. Node by node, as engine.cpp, with its checks of
    the gradients' shape, dtype and device; hooks do not run."""
    if not is_cuda(self): return REAL_BACKWARD(self, gradient)
    root, waiting, grads = self.grad_fn, collections.Counter(), collections.defaultdict(dict)
    todo, found = [root], {root}
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is None: continue
            waiting[node] += 1
            if node not in found: found.add(node); todo.append(node)
    grads[root][self.output_nr], todo = torch.ones_like(self), [root]
    with torch.no_grad():
        while todo:
            node = todo.pop()
            inputs = grads.pop(node, {})
            if hasattr(node, 'variable'):                       # AccumulateGrad
                leaf, g = node.variable, inputs.get(0)
                if g is not None: leaf.grad = g.clone(memory_format=torch.preserve_format) if leaf.grad is None else leaf.grad + g
                continue
            wanted = node._input_metadata
            outputs = node(*[inputs.get(i) for i in range(len(wanted))]) if inputs else [None] * len(node.next_functions)
            outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
            for g, (after, i) in zip(outputs, node.next_functions):
                if after is None: continue
                if g is not None:
                    like = after._input_metadata[i] if not hasattr(after, 'variable') else after.variable
                    if g.shape != like.shape: g = g.sum_to_size(like.shape)
                    if g.device != like.device:
                        raise RuntimeError(f'{node.name()} returned an invalid gradient: expected {like.device}, got {g.device}')
                    if g.dtype != like.dtype: g = g.to(like.dtype)
                    grads[after][i] = grads[after][i] + g if i in grads[after] else g
                waiting[after] -= 1
                if not waiting[after]: todo.append(after)


REAL_BACKWARD, torch.Tensor.backward = torch.Tensor.backward, backward


def is_cuda(x): return isinstance(x, FakeTensor) and x.device.type == 'cuda'


class Mode(TorchDispatchMode):
    """CPU tensors are computed; what has to do with cuda goes to FakeTensorMode. Notes what makes the host wait."""

    WAITS = ('nonzero', 'masked_select', '_unique2', 'unique_dim', 'unique_consecutive', 'bincount', 'equal', 'repeat_interleave.Tensor')

    def __init__(self, where):
        super().__init__()
        self.fake, self.where, self.log, self.ops, self.names = FakeTensorMode(allow_non_fake_inputs=True), where, collections.Counter(), 0, collections.Counter()

    def note(self, kind):
        frame, line = sys._getframe(2), '(autograd)'
        while frame:
            name = Path(frame.f_code.co_filename).name
            if name == f'{self.where}.py': line = f'{name}:{frame.f_lineno} {frame.f_code.co_name}'; break
            frame = frame.f_back
        self.log[line, kind] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        cuda = [x for x in tensors if is_cuda(x)]
        to = kwargs.get('device')
        to = torch.device(to) if to is not None else None
        if not cuda and (to is None or to.type != 'cuda') and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily(): return func(*args, **kwargs)
        self.ops += 1
        name = func.__name__
        self.names[name] += 1
        generator = kwargs.get('generator')
        if generator is not None and generator.initial_seed() not in [g.initial_seed() for g in GPU_GENERATORS]:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
        if func is aten._local_scalar_dense.default:
            self.note('item: waits')
            kind = args[0].dtype
            return True if kind == torch.bool else 0.0 if kind.is_floating_point else 0
        if any(name.startswith(w) for w in self.WAITS): self.note(f'{name}: waits')
        if func is aten._to_copy.default and cuda and to is not None and to.type == 'cpu':
            self.note('device to host: waits')
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get('dtype') or args[0].dtype)
        if func is aten.copy_.default and not is_cuda(args[0]):
            self.note('device to host: waits')
            return args[0]
        if func in (aten._to_copy.default, aten.copy_.default) and not all(map(is_cuda, tensors)):
            source = args[0] if func is aten._to_copy.default else args[1]
            waits = not (kwargs.get('non_blocking') or func is aten.copy_.default and len(args) > 2 and args[2])
            size = source.numel() * source.element_size()
            self.note(f'host to device, {"waits" if waits else "non_blocking, pageable"}, {size} bytes')
        if func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.index_put.default):
            for i in args[1]:
                if i is not None and i.dtype in (torch.bool, torch.uint8): self.note('mask index: waits')
                if i is not None and not is_cuda(i): self.note('index from the host: waits')
        if name.startswith('where.') and not all(map(is_cuda, tensors)): self.note('where with a scalar of the host: waits')
        with self.fake: return func(*args, **kwargs)


@contextlib.contextmanager
def pretending(where):
    mode = Mode(where)
    with mode.fake, mode: yield mode

# ---------------------------------------------------------------------------------------------------------- the runs

TINY = '--batch 8 --ch 16 --blocks 1 --mult 1,2 --attn 8 --res 16 --log_every 1000 --save_every 1000 --ts 20,1'.split()
PHASES = dict(ect='--warmup 2 --steps 4', sct='--warmup 2 --steps 4', scm='--warmup 2 --steps 4 --ts 1.5,1.1 --H 2',
              tcm='--warmup 2 --stage1 2 --steps 6', ict='--steps 2', ct='--steps 2')
VARIANTS = dict(                        # more flags by script
    ct=['--metric lpips', '--metric l2 --teacher T', '--metric lpips --dropout 0.1 --cond 1', '--metric l1 --arch ddpmpp'],
    ict=['--dropout 0.1', '--cond 1 --arch ddpmpp'],
    ect=['--dropout 0.1', '--cond 1', '--weight 1/(t-r) --c 0 --flip 1', '--arch edm2 --cond 1 --dropout 0.1', '--arch edm2 --micro 4 --dropout_res 8'],
    sct=['--dropout 0.1', '--cond 1 --refs 32 --flip 1', '--edges 0.5,2', '--refs 1', '--micro 4', '--cond 1 --refs inf', '--arch edm2 --cond 1'],
    scm=['--dropout 0.1 --dropout_warmup 0.1', '--scd 1', '--arch ddpmpp --tangent rms', '--cond 1', '--teacher T',
         '--adaptive 0 --tangent clip', '--head_dim 16', '--arch edm2 --cond 1', '--arch scm-edm2 --cond 1', '--opt_warmup Adam --ramp 100'],
    tcm=['--dropout 0.1', '--cond 1', '--ema_gamma 5 --t_ref 2', '--arch edm2 --cond 1'])


class Stop(Exception): pass


def load(name):
    m = importlib.import_module(name)
    def stop(message, code=2):
        raise Stop(str(message))
    m.stop = stop
    m.write = lambda path, writer: None if Path(path).suffix == '.pt' else writer(io.BytesIO())
    if hasattr(m, 'LPIPS'): m.torch_load, m.fetch = None, lambda url, *a: url
    return m


def vgg(url):
    """Random weights in the shapes of LPIPS's two files"""
    if 'vgg16' in url:
        widths, state, i, cin = (64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512, 'M', 512, 512, 512), {}, 0, 3
        for w in widths:
            if w == 'M': i += 1; continue
            state |= {f'features.{i}.weight': torch.randn(w, cin, 3, 3) * 0.01, f'features.{i}.bias': torch.zeros(w)}
            i, cin = i + 2, w
        return state
    return {f'lin{i}.model.1.weight': torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}


def drive(name, m, flags, amp, device, folder, world=1, host_images=False, resume=None, syncs=None):
    """One training run -> number of operations on cuda."""
    phase = ['setup']
    argv = ['--data', 'glyphs', *TINY, *PHASES[name].split(), *flags.split(), '--amp', amp, '--out', str(folder)]
    teacher = '--teacher' in argv
    cfg = m.config(argv)
    cfg.resize, images = 0, torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(64) % 10 if cfg.cond else None
    new_network, real_load, read, draw = m.new_network, torch.load, m.read_checkpoint, m.draw
    if teacher:
        m.new_network = lambda c: (torch.manual_seed(0), m.UNet(c))[1]
    torch.load = lambda f, *a, **k: vgg(f) if str(f).startswith('http') else real_load(f, *a, **k)
    m.read_checkpoint = lambda out: resume
    warned = []
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('always')
        warnings.filterwarnings('ignore', 'Accessing the data pointer of FakeTensor')
        try:
            with pretending(name) if device.type == 'cuda' else contextlib.nullcontext() as mode:
                phase_of = m.Loss.phase
                def told(self, step):
                    found = phase_of(self, step)
                    phase[0] = f'{found[0]}, step {step}'
                    if mode and syncs is not None:
                        syncs.setdefault(found[0], []).append(collections.Counter(mode.log)); mode.log.clear()
                    return found
                m.Loss.phase = told
                try:
                    torch.cuda.mem_get_info = lambda device=None: (0 if host_images else 80 << 30, 80 << 30)
                    m.train(cfg, (images, labels), 0, world, device)
                    if mode and syncs is not None: syncs['end'] = [collections.Counter(mode.log)]
                finally: m.Loss.phase = phase_of
            return cfg, mode.ops if mode else 0, [w for w in caught]
        except Stop as error:
            raise RuntimeError(f'{phase[0]}: stop({error})') from error
        except Exception as error:
            error.phase = phase[0]
            raise
        finally:
            m.new_network, torch.load, m.read_checkpoint, m.draw = new_network, real_load, read, draw


def sampled(name, m, flags, amp, folder, saved):
    """write_samples and generate of a checkpoint"""
    cfg = m.config(['--data', 'glyphs', *TINY, *PHASES[name].split(), *flags.split(), '--amp', amp, '--out', str(folder)])
    cfg.sample, cfg.nfe, cfg.save = 10, 2, str(folder / 's.npz')
    read, m.read_checkpoint = m.read_checkpoint, lambda out: saved | dict(step=99)
    try:
        with contextlib.redirect_stdout(io.StringIO()), pretending(name) as mode: m.write_samples(cfg, None, 0, 1, GPU)
        return mode.ops
    finally: m.read_checkpoint = read


def checkpoint(m, name, flags, folder):
    """A real checkpoint of a run on the CPU, two steps before the end of training"""
    found = []
    write, m.write = m.write, lambda path, writer: found.append(buffer) if (buffer := io.BytesIO()) is not None and (
        Path(path).suffix == '.pt') and writer(buffer) is None else None
    try: drive(name, m, flags + f' --steps {int(PHASES[name].split("--steps ")[1].split()[0]) - 1}', 'off', torch.device('cpu'), folder)
    finally: m.write = write
    found[-1].seek(0)
    return torch.load(found[-1], map_location='cpu', weights_only=True)


def show(title, log):
    small = sum(n for (_, kind), n in log.items() if 'waits' not in kind)
    print(f'-- {title}: {small} small copies that do not wait')
    for (line, kind), n in log.items():
        if 'waits' in kind: print(f'   {n} x {line}: {kind}')


class Parallel(torch.nn.Module):
    """DistributedDataParallel without its reducer, which hangs on hooks of torch's engine"""

    def __init__(self, module, **kwargs):
        super().__init__()
        self.module = module
        for p in module.parameters():
            if p.requires_grad and not is_cuda(p): raise RuntimeError('DistributedDataParallel of a parameter on the CPU')

    def forward(self, *args): return self.module(*args)
    def no_sync(self): return contextlib.nullcontext()


@contextlib.contextmanager
def eight():
    """The collectives of eight processes, of which this is the first"""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    real, torch.nn.parallel.DistributedDataParallel = torch.nn.parallel.DistributedDataParallel, Parallel
    torch.distributed.init_process_group('fake', rank=0, world_size=8, store=FakeStore())
    try: yield
    finally:
        torch.distributed.destroy_process_group()
        torch.nn.parallel.DistributedDataParallel = real


def main():
    argv = argparse.ArgumentParser()
    argv.add_argument('scripts', nargs='*', default=[])
    argv.add_argument('--syncs', action='store_true')
    argv.add_argument('--warnings', action='store_true')
    argv.add_argument('--trace', action='store_true', help='traceback of the first error')
    cfg = argv.parse_args()
    scripts = cfg.scripts or [n for n in 'ect ict tcm sct scm ct fid'.split() if Path(f'{n}.py').exists()]
    ops = runs = 0
    seen = collections.Counter()
    for name in scripts:
        label = name
        try:
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                if name == 'fid':
                    label = 'fid, extract'
                    ops += extract(folder)
                    runs += 1
                    continue
                m = load(name)
                for flags in VARIANTS[name]:
                    for amp in ('off', 'fp16', 'bf16') if flags == VARIANTS[name][0] else ('fp16',):
                        label = f'{name} {flags} --amp {amp}'
                        syncs = {} if cfg.syncs and flags == VARIANTS[name][0] else None
                        _, n, caught = drive(name, m, flags, amp, GPU, folder / 'a', syncs=syncs)
                        ops, runs = ops + n, runs + 1
                        for w in caught: seen[f'{name}: {w.category.__name__}: {str(w.message)[:160]}'] += 1
                        if syncs:
                            for phase, steps in syncs.items():
                                if phase == 'end' or len(steps) < 2: continue
                                show(f'{label}: {phase}, one step', steps[-1])
                            show(f'{label}: the last step, with its status line and pictures', syncs['end'][0])
                flags = VARIANTS[name][0]
                label = f'{name} {flags}, checkpoint on the CPU'
                saved = checkpoint(m, name, flags, folder / 'b')
                with eight():
                    label = f'{name} {flags} --amp fp16, first of eight processes'
                    syncs = {} if cfg.syncs else None
                    ops, runs = ops + drive(name, m, flags + ' --batch 32', 'fp16', GPU, folder / 'e', world=8, syncs=syncs)[1], runs + 1
                    for phase, steps in (syncs or {}).items():
                        if phase != 'end' and len(steps) > 1: show(f'{label}: {phase}, one step', steps[-1])
                for amp in ('off', 'fp16'):
                    label = f'{name} {flags} --amp {amp}, resumed'
                    ops, runs = ops + drive(name, m, flags, amp, GPU, folder / 'b', resume=saved)[1], runs + 1
                    label = f'{name} {flags} --amp {amp}, images on the host, --micro 3'
                    ops, runs = ops + drive(name, m, flags + ' --micro 3', amp, GPU, folder / 'c', host_images=True)[1], runs + 1
                    more = {'sct': ['', '--guidance 1.5'], 'scm': ['', '--heun 3']}.get(name, [''])
                    for extra in more:
                        label = f'{name} --sample --amp {amp} {extra}'
                        ops, runs = ops + sampled(name, m, flags + ' ' + extra, amp, folder / 'd', saved), runs + 1
        except Exception as error:
            if cfg.trace: traceback.print_exc()
            print(f'{label}, {getattr(error, "phase", "")}: {type(error).__name__}: {" ".join(str(error).split())[:300]}')
            sys.exit(1)
    if cfg.warnings:
        for text, count in seen.most_common(): print(f'{count} x {text}')
    print(f'{runs} runs, {ops:,} operations on fake CUDA tensors, no device or dtype error')


def extract(folder):
    import fid
    fid.torch = type(sys)('torch')          # fid.py's own torch, in which inference mode is no_grad: the operations arrive decomposed
    fid.torch.__dict__.update(torch.__dict__, inference_mode=torch.no_grad)
    cfg = argparse.Namespace(device='auto', batch=4, gpus=1, model='inception', resize='tf', weights='random')
    class Pictures:
        path = 'fake'
        def pick(self, rows): return iter(np.random.randint(0, 256, (len(rows), 32, 32, 3), np.uint8))
    ops = 0
    for way in ('tf', 'pytorch-fid', 'clean', 'dinov2'):
        net = fid.DINOv2(64, 2, 4) if way == 'dinov2' else fid.Inception(way)
        for layer in net.modules():
            if isinstance(layer, fid.Conv): layer.fold()
        net = net.to(memory_format=torch.channels_last)
        features, sums = torch.zeros(8, net.dim), torch.zeros(1, net.dim + 1, net.dim + 1, dtype=torch.float64)
        fid.each_image = lambda path, rows: ((i, Image.fromarray(np.random.randint(0, 256, (32, 32, 3)).astype(np.uint8))) for i in rows)
        with contextlib.redirect_stderr(io.StringIO()), pretending('fid') as mode:
            fid.extract(0, 1, net, Pictures(), np.arange(8), cfg, features, sums)
        ops += mode.ops
    return ops


if __name__ == '__main__': main()
