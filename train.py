"""Train a network to recognise faces.

    python train.py --loss arcface --arch resnet34              # on data/, or on synthetic faces if there is none
    python train.py --data HW2p2_S25 --loss "ce+0.003*center" --epochs 30
    python train.py --data HW2p2_S25 --init best.pt --loss arcface      # go on under another loss
    python train.py --resume --out runs/arcface_resnet34        # go on after an interruption
    python train.py --loss help; python train.py --arch help    # what there is
    torchrun --nproc_per_node 8 train.py --loss arcface --shard         # eight processes do what one does

Writes OUT/best.pt (lowest validation EER), OUT/last.pt, OUT/log.csv, OUT/curves.png and links best.pt here.

Everything random is a function of (seed, epoch) or (seed, step): the order of the images, their augmentation,
dropout, margins that are drawn. Nothing random is stored, and a resumed run equals an uninterrupted one.

Under torchrun each process takes its rows of the batch through the backbone (DistributedDataParallel, batch norm
over all of them); the embeddings of all are put together with gradient, and every process computes the loss of the
whole batch, as one process would. Process 0 alone prints and writes.
"""
import argparse
import copy
import functools
import io
import math
import os
import re
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import losses
import models
import verify

FREE = {"epochs", "steps", "out", "resume", "save_every", "data", "device", "shard"}     # may differ when resuming
LONG = 16                               # epochs, from which on the augmentation is stronger
RESTARTS = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")    # how often torchrun --max-restarts began anew
COLUMNS = dict(epoch="{:.0f}", step="{:.0f}", loss="{:.3f}", lr="{:.2e}", acc="{:.2%}", eer="{:.2%}", auc="{:.2%}",
               pair_acc="{:.2%}", img_per_s="{:.0f}", seconds="{:.0f}")


def arguments():
    def number(kind, low, high=math.inf):
        def parse(text):
            value = kind(text)
            if not low <= value <= high or value == math.inf:
                raise argparse.ArgumentTypeError(f"{text} is outside {low}..{high}")
            return value
        parse.__name__ = kind.__name__
        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.usage
    g = parser.add_argument_group("data")
    g.add_argument("--data", default="data", help="data set, or a folder above it [data; if absent, synthetic faces]")
    g.add_argument("--size", type=number(int, 32, 256), help="side of the input in pixels, 32..256 [the set's own]")
    g.add_argument("--crop", type=number(float, 0.1, 1), default=1.0, help="share of the image's side that is seen,"
                   " around its centre [1]")
    g.add_argument("--holdout", type=number(float, 0, 0.9), default=0.1, help="share of the people held out for"
                   " validation where the set has no val_pairs; 0 trains on all and saves the last epoch as best [0.1]")
    g = parser.add_argument_group("model and loss")
    g.add_argument("--arch", default="resnet34", help="backbone; 'help' lists them [resnet34]")
    g.add_argument("--dim", type=number(int, 1, 65536), default=512, help="length of the embedding [512]")
    g.add_argument("--loss", default="arcface", help="a loss or a weighted sum such as 'ce+0.003*center' or"
                   " 'arcface:s=30,m=0.3'; 'help' lists them [arcface]")
    g.add_argument("--shard", action="store_true", help="divide the loss's class weights among torchrun's processes,"
                   " for very many people")
    g.add_argument("--init", metavar="CKPT", help="start from the backbone of this checkpoint, whoever its"
                   " people were")
    g.add_argument("--freeze", action="store_true", help="with --init: train only the loss's weights and layers that"
                   " the checkpoint lacks")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=number(int, 1), default=8, help="passes over the training images [8]")
    g.add_argument("--steps", type=number(int, 1), help="stop after this many steps in all; the schedule stays that"
                   " of --epochs, and --resume goes on [none]")
    g.add_argument("--batch-size", type=number(int, 2), help="images a step [128; 64 for fewer than 50,000 images]")
    g.add_argument("--per-person", type=number(int, 2), default=4, help="images a person in the batches of losses on"
                   " pairs and triplets [4]")
    g.add_argument("--opt", choices=["adamw", "sgd"], default="adamw", help="AdamW, or SGD with Nesterov momentum"
                   " 0.9 [adamw]")
    g.add_argument("--lr", type=number(float, 0), help="peak learning rate [0.001 for adamw, 0.1 for sgd]")
    g.add_argument("--weight-decay", type=number(float, 0), help="on matrices and kernels, not on norms, biases and"
                   " learned scalars [0.05 for adamw, 1 for fewer than 50,000 images; 5e-4 for sgd]")
    g.add_argument("--warmup", type=number(float, 0, 1), default=0.1, help="share of the steps with rising rate [0.1]")
    g.add_argument("--clip", type=number(float, 0), default=5.0, help="largest norm of the gradient, 0 for any [5]")
    g.add_argument("--ema", type=number(float, 0, 1), default=0.0, help="decay of the moving average of the weights"
                   " that is evaluated and saved, 0 for none [0]")
    g = parser.add_argument_group("augmentation, 0 switches each off")
    for name, (short, long, meaning) in data.AUGMENT.items():
        g.add_argument(f"--{name}", type=number(float, 0, 90 if name == "rotate" else 1),
                       help=f"{meaning} [{short}" + f"; {long} from {LONG} epochs on" * (short != long) + "]")
    g = parser.add_argument_group("the run")
    g.add_argument("--out", help="folder of results [runs/<loss>_<arch>, numbered when taken]")
    g.add_argument("--resume", action="store_true", help="go on from OUT/last.pt with its arguments")
    g.add_argument("--save-every", type=number(float, 0), default=600.0, metavar="SECONDS", help="write last.pt at"
                   " least this often [600]")
    g.add_argument("--seed", type=number(int, 0, 2 ** 31 - 1), default=0, help="of everything random [0]")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=verify.device,
                   help="[%(default)s]")
    g.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="precision of the backbone;"
                   " auto is bf16 where the hardware multiplies it, else fp16 on GPUs [auto]")
    g.add_argument("--compile", action="store_true", help="torch.compile the backbone and the augmentation; needs"
                   " a C++ compiler")
    args = parser.parse_args()
    if args.resume or RESTARTS != "0" and args.out and Path(args.out, "last.pt").exists():
        # The run's own arguments, unless the user insists.
        args.out = args.out or str(folder_of(args, resume=True))
        held = os.environ.get("RANK", "0") == "0" and Path(args.out).is_dir() and data.lock(args.out)
        ckpt = verify.load(Path(args.out) / "last.pt")
        parser.set_defaults(**{k: v for k, v in ckpt["args"].items() if k not in ("out", "resume", "device", "steps")})
        out, args = args.out, parser.parse_args()
        args.out, args.amp = out, ckpt["args"]["amp"] if args.amp == "auto" else args.amp
        other = [k for k, v in ckpt["args"].items() if k not in FREE and getattr(args, k) != v]
        if other:
            raise ValueError(f"cannot resume {out} with another " + ", ".join(
                f"--{k.replace('_', '-')} (it has {ckpt['args'][k]})" for k in other) + "; leave it out, or start anew")
        return args, ckpt, held
    args.lr = args.lr if args.lr is not None else {"sgd": 0.1, "adamw": 1e-3}[args.opt]
    for name, strengths in data.AUGMENT.items():
        if getattr(args, name) is None:
            setattr(args, name, strengths[args.epochs >= LONG])
    args.amp = precision(torch.device(args.device)) if args.amp == "auto" else args.amp
    losses.make(args.loss, args.dim, 2)                     # mistakes come before minutes of work
    if args.arch not in models.ARCHS:
        models.make(args.arch)
    if args.freeze and not args.init:
        raise ValueError("--freeze needs --init CKPT; there is nothing trained to freeze")
    if args.init:
        verify.load(args.init)
    if args.out and Path(args.out, "last.pt").exists():
        raise ValueError(f"{args.out} holds a run already; --resume it, or give another --out")
    return args, None, None


def precision(device):
    """What the hardware is quick at: bf16 on Ampere and later and CPUs with AVX512-BF16 or AMX, fp16 on older GPUs."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "off"


def folder_of(args, resume=False):
    """runs/<loss>_<arch>, then _2, _3, ...: the first that is free, or to resume the last that holds a run."""
    base = Path("runs") / re.sub(r"[^\w.+-]+", "_", f"{args.loss}_{args.arch}")
    taken = []
    while (folder := base if not taken else Path(f"{base}_{len(taken) + 1}")).joinpath("log.csv").exists():
        taken.append(folder)
    if resume and not taken:
        raise ValueError(f"{base}: no run to resume; name its folder with --out")
    return taken[-1] if resume else folder


def claim(args):
    """(folder, lock) of a new run. The exclusive creation of log.csv keeps two runs from sharing a folder, the lock
    two that resume; a run that was killed before its first save leaves its folder free."""
    while True:
        out = Path(args.out) if args.out else folder_of(args)
        out.mkdir(parents=True, exist_ok=True)
        log = out / "log.csv"
        try:
            held = data.lock(out)
            if args.out and data.fcntl and not (out / "last.pt").exists() and log.exists() and not log.stat().st_size:
                log.unlink()
            open(log, "x").close()
            return out, held
        except FileExistsError:
            if args.out:
                raise ValueError(f"{out} holds a run already; --resume it, or give another --out") from None
        except ValueError:                                  # at work there
            if args.out:
                raise


def save(path, ckpt):
    if dist.is_initialized() and dist.get_rank():
        return
    buffer = io.BytesIO()
    torch.save(ckpt, buffer)
    data.write(path, buffer.getbuffer())


def link(best, copied=[]):
    """Let best.pt in the working folder point to the run's best; a file of the user's own is left alone."""
    here = Path("best.pt")
    if here.exists() and not here.is_symlink() and not copied:
        return here.resolve() == best.resolve()
    temporary = Path(f"best.pt.{os.getpid()}.tmp")
    try:
        os.symlink(os.path.relpath(best), temporary)
        os.replace(temporary, here)
    except OSError:                                         # a file system without links
        data.write(here, best.read_bytes())
        copied.append(here)                                 # so the next best may replace it
    return True


def order(labels, rows, batch, seed, epoch, per_person=0):
    """Row numbers (steps, batch) of one epoch: a permutation of rows; or, with per_person = K, batches of P people
    x K images, where people with fewer than K images appear with repeated ones (augmented differently)."""
    rng = np.random.default_rng((seed, epoch))
    rows = rng.permutation(rows)
    if per_person:
        rows = rows[np.argsort(labels[rows], kind="stable")]
        people = np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1)
        groups = np.concatenate([np.resize(r, (-(-len(r) // per_person), per_person)) for r in people])
        rows = rng.permutation(groups)[:-(-len(rows) // per_person)].ravel()
    steps = max(1, len(rows) // batch)
    return np.resize(rows, (steps, min(batch, len(rows))))


def dice(*key):
    """Seed torch with a hash of the key, for a CPU's generator looks at 32 bits of its seed only."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def rate(step, total, warmup):
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine to zero."""
    rise = max(1, round(warmup * total))
    return (step + 1) / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, total - rise))


def start_from(net, path, arch, freeze):
    """Load what fits of a checkpoint's backbone into net; with freeze, only what did not fit stays trainable."""
    ckpt = verify.load(path)
    if ckpt["args"]["arch"] != arch:
        raise ValueError(f"{path} is a {ckpt['args']['arch']}, not a {arch}; give --arch {ckpt['args']['arch']}")
    own, given = net.state_dict(), ckpt["ema"] or ckpt["model"]
    fits = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    net.load_state_dict(fits, strict=False)
    new = [k for k, _ in net.named_parameters() if k not in fits]
    print(f"backbone from {path}" + (f"; new: {', '.join(new)}" if new else ""))
    for k, p in net.named_parameters():
        if freeze and k in fits:
            p.requires_grad_(False)


def agreed(*flags):
    """The largest of each process's flags (integers): what one has noticed, all act on at the same step."""
    if dist.is_initialized():
        dist.all_reduce(flags := torch.tensor([0, *flags]), dist.ReduceOp.MAX)      # on the CPU: no wait for a GPU
        return flags[1:].tolist()
    return flags


def wait(turns):
    """Let so many other groups of processes go first; each calls this as often for us."""
    for _ in range(turns):
        agreed()


def synchronised(norm, x):
    """A batch norm's forward with the statistics of all processes; torch.nn.SyncBatchNorm is for GPUs only."""
    if not norm.training:
        return type(norm).forward(norm, x)
    def total(v):
        return losses.Enter.apply(losses.Total.apply(v))                # a sum over processes in both directions

    dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    x = x if x.dtype == torch.float64 else x.float()
    mean, n = total(torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])).split([x.shape[1], 1])
    mean = mean / n
    x = x - mean.view(shape)
    var = total(x.square().sum(dims)) / n
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * n / (n - 1), norm.momentum)
    return x * (norm.weight * (var + norm.eps).rsqrt()).view(shape) + norm.bias.view(shape)


def together(z, first, total):
    """(total, D) embeddings of all processes, from the rows z that begin at first; gradients flow back to each."""
    if z.requires_grad:
        z.register_hook(lambda grad: grad * dist.get_world_size())      # DistributedDataParallel takes the mean
    return losses.Total.apply(F.pad(z.float(), (0, 0, first, total - first - len(z))))


def whole(t, k, classes):
    """On process 0, the rows (k C, ...) of a tensor of which each process has those of its classes; see per_class."""
    t = t.detach().cpu().unflatten(0, (k, -1)).contiguous()
    if dist.get_rank():
        dist.send(t, 0)
        return t
    ends, parts = losses.edges(classes, dist.get_world_size()), [t]
    for r in range(1, dist.get_world_size()):
        parts.append(t.new_empty(k, ends[r + 1] - ends[r], *t.shape[2:]))
        dist.recv(parts[-1], r)
    return torch.cat(parts, 1).flatten(0, 1)


def ours(t, k, classes):
    """Of the whole rows (k C, ...), those of this process's classes."""
    first, end = losses.edges(classes, dist.get_world_size())[dist.get_rank():][:2]
    return t.unflatten(0, (k, -1))[:, first:end].flatten(0, 1)


def regroup(f, classes, criterion, opt, loss, state):
    """f, which is whole or ours, of each tensor of the loss's and the optimizer's state that --shard divides: they are
    saved whole, and any number of processes goes on with them."""
    per_class = {name: getattr(p, "per_class", 0) for name, p in criterion.named_parameters()}
    in_opt = [getattr(p, "per_class", 0) for g in opt.param_groups for p in g["params"]]
    return {n: f(v, k, classes) if (k := per_class.get(n)) else v for n, v in loss.items()}, state | {"state": {
        i: {n: f(v, k, classes) if (k := in_opt[i]) and torch.is_tensor(v) and v.ndim else v for n, v in s.items()}
        for i, s in state["state"].items()}}


def clip(params, most):
    """Scale the gradients to a norm of at most most. Divided parameters count with what all processes have."""
    ours, divided = ([p.grad for p in params if p.grad is not None and hasattr(p, "per_class") == d] for d in (0, 1))
    norm = torch.nn.utils.get_total_norm(ours)
    if divided:
        norm = norm.hypot(losses.Total.apply(torch.nn.utils.get_total_norm(divided).square()).sqrt())
    torch.nn.utils.clip_grads_with_norm_(params, most, norm)


def curves(log):
    """The panels of curves.png: loss, and accuracy and EER in percent, over epochs."""
    x = [r["epoch"] for r in log]
    return [(title, "epoch", unit, {"": (x, [scale * r[key] for r in log])}) for title, unit, key, scale in (
        ("training loss", "", "loss", 1), ("accuracy on dev, closed set", "%", "acc", 100),
        ("EER on validation pairs", "%", "eer", 100))]


def main():
    if (topic := {"--loss": losses, "--arch": models}.get(sys.argv[-2:][0])) and sys.argv[-1] == "help":
        return print(topic.table())
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if rank:
        sys.stdout = open(os.devnull, "w")
    gpus = torch.cuda.device_count()
    if world > 1 and local < gpus:
        torch.cuda.set_device(local)                        # before anything is put on the first one
    args, ckpt, held = arguments()
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise ValueError("--compile needs a C++ compiler; install g++, or start a run without it")
    device = torch.device(args.device)
    if device.type == "cuda" and local >= gpus:
        raise ValueError(f"--nproc_per_node: this machine has {gpus} GPUs; start no more processes, or --device cpu")
    if world > 1:
        device = torch.device("cuda", local) if device.type == "cuda" else device
        # A dead peer closes its connections at once, so the time limit may be long: somebody decodes the images.
        store = dist.PrefixStore(RESTARTS, next(dist.rendezvous("env://"))[0])
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timedelta(days=1))
        sys.excepthook = lambda kind, e, trace: (
            print(f"process {rank} ends, for another did", file=sys.stderr) if kind is RuntimeError and "gloo" in str(e)
            else sys.__excepthook__(kind, e, trace))
    turn = 0 if rank == 0 else 1 if local == 0 else 2       # data are prepared once, or once a node, found by the rest
    torch.set_float32_matmul_precision("high")              # TF32 for what autocast leaves in float32
    torch.backends.cudnn.benchmark = True

    # Faces: found, decoded once, memory-mapped.
    wait(turn)
    if args.data == "data" and not Path("data").exists():
        print("no data/ folder and no --data: rendering synthetic faces into data/ and training on those")
        data.synthesise("data")
    faces = data.load(args.data, args.holdout, args.seed)
    files, labels = faces.train
    args.size = args.size or data.native_size(files)
    cache, classes = data.cache_folder(faces.root), len(faces.names)
    images, rows = verify.pack(files, vars(args), cache, "train")
    sets = {"train": (images, labels, rows)}
    if faces.dev and faces.dev[1] is not None:
        packed, good = verify.pack(faces.dev[0], vars(args), cache, "dev")
        sets["dev"] = packed, faces.dev[1], good
    if faces.val_pairs:
        sets["val_pairs"] = verify.pack_pairs(faces.val_pairs, vars(args), cache, "val_pairs")
    wait(2 - turn)
    y_all = torch.from_numpy(labels).to(device)

    # Network, loss, optimizer.
    torch.manual_seed(args.seed)
    net = models.make(args.arch, args.dim, args.size).to(device, memory_format=torch.channels_last)
    share = (rank, world) if args.shard else (0, 1)
    if classes < share[1]:
        raise ValueError(f"--shard: {classes} people cannot be divided among {world} processes; leave it out")
    criterion = losses.make(args.loss, args.dim, classes, share, len(rows)).to(device)
    if world > 1 and device.type == "cuda":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    elif world > 1:
        for module in net.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.forward = functools.partial(synchronised, module)
    if args.init and not ckpt:
        start_from(net, args.init, args.arch, args.freeze)
    for k, p in net.named_parameters() if ckpt else ():
        p.requires_grad_(k not in ckpt.get("frozen", ()))
    average = copy.deepcopy(net).requires_grad_(False) if args.ema else None
    learned = [p for p in (*net.parameters(), *criterion.parameters()) if p.requires_grad]
    if not learned:
        raise ValueError(f"nothing to train: the backbone is frozen and {args.loss} has no weights of its own")
    few = len(rows) < 50_000                                # these want smaller steps and much more decay (README)
    args.batch_size = args.batch_size or (64 if few else 128)
    if args.weight_decay is None:
        args.weight_decay = 5e-4 if args.opt == "sgd" else 1.0 if few else 0.05
    matrices, others = ([p for p in learned if (p.squeeze().ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    opt = (torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True) if args.opt == "sgd" else
           torch.optim.AdamW(groups, args.lr, fused=True))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    cast = torch.autocast(device.type, torch.float16 if args.amp == "fp16" else torch.bfloat16, args.amp != "off")

    per_person = min(args.per_person, len(rows)) if criterion.balanced else 0
    per_epoch, batch = order(labels, rows, args.batch_size, args.seed, 0, per_person).shape
    total_steps = args.epochs * per_epoch
    if batch < world:
        raise ValueError(f"a batch of {batch} images cannot be divided among {world} processes; use fewer")
    part = slice(batch * rank // world, batch * (rank + 1) // world)        # of the batch, through our backbone
    last_step = min(total_steps, args.steps or total_steps)
    strength = {name: getattr(args, name) for name in data.AUGMENT}

    # Where to begin: a folder of our own, or the last save of an earlier run.
    step, best, log, sums = 0, math.inf, [], torch.zeros(3, device=device)      # loss, steps, first bad step
    if ckpt:
        out = Path(args.out)
        if ckpt["names"] != faces.names or ckpt["images"] != len(rows):
            raise ValueError(f"{args.data} has changed since {out}/last.pt: {ckpt['images']} images of"
                             f" {len(ckpt['names'])} people then, {len(rows)} of {classes} now; start a new run")
        try:
            loss_state, opt_state = regroup(ours, classes, criterion, opt, ckpt["loss"], ckpt["opt"])
            for module, state in ((net, ckpt["model"]), (criterion, loss_state), (opt, opt_state),
                                  (scaler, ckpt["scaler"]), (average, ckpt["ema"])):
                if module is not None:
                    module.load_state_dict(state)
            step, best, log, sums = ckpt["step"], ckpt["best"], ckpt["log"], ckpt["sums"].to(device)
        except (KeyError, RuntimeError, ValueError):
            raise ValueError(f"{out}/last.pt is not the last.pt of this version's run; start anew, perhaps with --init"
                             f" {out}/last.pt") from None
    else:
        folder, held = claim(args) if rank == 0 else ("", None)
        if world > 1:
            dist.broadcast_object_list(name := [str(folder)])
            folder = name[0]
        args.out, out = str(folder), Path(folder)
    run = net
    if world > 1 and any(p.requires_grad for p in net.parameters()):
        run = torch.nn.parallel.DistributedDataParallel(net)
        run.broadcast_buffers = False                       # they are alike, by synchronised batch norm
    look = torch.compile(data.pixels, dynamic=False) if args.compile else data.pixels
    run = torch.compile(run) if args.compile else run
    n_net = sum(p.numel() for p in net.parameters())
    n_loss = sum(p[0].numel() * p.per_class * classes if hasattr(p, "per_class") else p.numel()
                 for p in criterion.parameters())           # of all processes
    print(f"{faces.root}: {len(rows)} images of {classes} people at {args.size}x{args.size}"
          + (f"; {faces.note}" if faces.note else ""))
    print(f"{args.arch}, {n_net / 1e6:.2f} M parameters, and {criterion.spec}, {n_loss / 1e6:.2f} M; {device}, amp"
          f" {args.amp}; {args.epochs} epochs of {per_epoch} steps of {batch}; {out}")

    # Ctrl-C and SIGTERM let the step finish, then save. A second one ends at once.
    stop = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))

    def checkpoint(**extra):
        """Everything that verify.py needs; with the optimizer's state and the log, everything that resuming needs."""
        loss, state = regroup(whole, classes, criterion, opt, criterion.state_dict(), extra.get("opt", {"state": {}}))
        return {"face_checkpoint": verify.VERSION, "args": vars(args), "names": faces.names, "images": len(rows),
                "spec": criterion.spec,
                "frozen": [k for k, p in net.named_parameters() if not p.requires_grad],
                "model": net.state_dict(), "ema": average.state_dict() if average else None,
                "loss": loss, "step": step, "best": best, **extra} | ({"opt": state} if "opt" in extra else {})

    def save_last():
        save(out / "last.pt", checkpoint(opt=opt.state_dict(), scaler=scaler.state_dict(), log=log, sums=sums,
                                         spent=time.monotonic() - began))
        agreed()                                            # nobody leaves before process 0 has written it

    def check(sums):
        """The loss must be finite; asked only now and then, for on a GPU asking means waiting."""
        finite = torch.stack([p.isfinite().all() for p in learned]).all()
        if (bad := int(sums[2]) or int(~finite) * step):
            raise ValueError(f"the loss or a weight was not finite at step {bad}: lower --lr ({args.lr:g}), lengthen"
                             f" --warmup, or try --amp off; {out}/last.pt is from before")

    saved = time.monotonic()
    began = saved - (ckpt or {}).get("spent", 0.0)          # of this epoch, with what an interrupted run gave it
    if not ckpt:
        save_last()                                         # from here on --resume finds something
    for epoch in range(len(log), args.epochs):
        if log and step >= last_step:
            break
        todo = order(labels, rows, args.batch_size, args.seed, epoch, per_person)
        todo = todo[step - epoch * per_epoch:last_step - epoch * per_epoch]
        for t in (*criterion.parameters(), *criterion.buffers()) if world > 1 else ():
            if not hasattr(t, "per_class"):                 # what all have alike, should rounding have parted it
                dist.broadcast(t.detach(), 0)
        net.train()
        for module in net.modules():                        # frozen layers keep their batch statistics too
            if args.freeze and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        since, first = time.monotonic(), step
        for index, x in data.batches(images, todo, device, part):   # (B,) of all, images of ours
            dice(args.seed, step, 0)                        # augmentation: the whole batch's, of which we take ours
            x = data.augment(x, strength, (part.start, batch), look)
            dice(args.seed, step, 1 + rank)                 # dropout
            for g in opt.param_groups:
                g["lr"] = args.lr * rate(step, total_steps, args.warmup)
            with cast:
                z = run(x)                                  # (B, dim), in several processes our rows of it
            z = together(z, part.start, batch) if world > 1 else z
            dice(args.seed, step, 2 ** 31)                  # margins and classes that are drawn, alike in all
            loss = criterion(z, y_all[index])
            opt.zero_grad()
            scaler.scale(loss).backward()
            if args.clip:
                scaler.unscale_(opt)
                clip(learned, args.clip)
            scaler.step(opt)
            scaler.update()
            if average:                                     # quick at first, when the weights still travel far
                decay = min(args.ema, (1 + step) / (10 + step))
                for a, w in zip(average.state_dict().values(), net.state_dict().values()):
                    a.lerp_(w, 1 - decay) if a.is_floating_point() else a.copy_(w)
            step += 1
            with torch.no_grad():
                sums += torch.stack([loss.detach(), torch.ones_like(loss),
                                     (~torch.isfinite(loss) & (sums[2] == 0)) * step])
            if step == 1:
                expected = criterion.expected()
                print(f"first loss {float(loss.detach()):.2f}" + (
                    f", of random embeddings and weights {expected:.2f} is expected" if expected else ""))
            data.progress(f"epoch {epoch + 1}", (step - first) * len(index), todo.size, since)
            end, due = agreed(len(stop), time.monotonic() - saved > args.save_every)
            if end or due:
                check(sums)
                save_last()
                saved = time.monotonic()
            if end:
                print(f"\nstopped at step {step}; go on with: python train.py --resume --out {out}")
                sys.exit(130)
        check(sums)
        seconds = time.monotonic() - began

        # The epoch's account: validation, one row, the checkpoints.
        partial = step < (epoch + 1) * per_epoch
        if partial:                                         # stopped by --steps: --resume finishes the epoch
            save_last()
        found = verify.evaluate(average or net, criterion, sets, classes)
        row = dict(epoch=epoch + 1, step=step, loss=float(sums[0] / sums[1]), lr=opt.param_groups[0]["lr"],
                   acc=found.get("acc1", math.nan), eer=found.get("eer", math.nan), auc=found.get("auc", math.nan),
                   pair_acc=found.get("acc", math.nan), img_per_s=(step - epoch * per_epoch) * batch / seconds,
                   seconds=seconds + (log[-1]["seconds"] if log else 0))
        if not log:
            print("  ".join(f"{c:>9}" for c in COLUMNS))
        print("  ".join(f"{form.format(row[c]):>9}" for c, form in COLUMNS.items()))
        better = not row["eer"] >= best                     # without validation pairs the last epoch counts as best
        if better and not (partial and log):
            best = best if partial else row["eer"]
            pairs = faces.val_pairs
            val = {"labels": torch.from_numpy(pairs.labels), "scores": torch.from_numpy(found["scores"]),
                   "mark": verify.mark(pairs)} if "scores" in found else None
            save(out / "best.pt", checkpoint(val=val))
            if rank == 0 and not link(out / "best.pt"):
                print(f"best.pt here is not a link of ours and stays as it is; the new one is {out}/best.pt")
        if rank == 0:
            verify.write_csv(out / "log.csv", COLUMNS, [[r[c] for c in COLUMNS] for r in (*log, row)])
            data.plot(out / "curves.png", curves([*log, row]))
        if partial:
            break
        log.append(row)
        sums.zero_()
        began = saved = time.monotonic()
        save_last()
    judged = faces.val_pairs or faces.test_pairs
    print(f"done: python verify.py --ckpt {out}/best.pt" + ("" if judged else " --pairs FILE --images DIR"))
    if world > 1:
        agreed()
        dist.destroy_process_group()


if __name__ == "__main__":
    data.cli(main)
