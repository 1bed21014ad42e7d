"""Train a network to recognise faces.

    python train.py --loss arcface --arch resnet34              # on data/, or on synthetic faces if there is none
    python train.py --data HW2p2_S25 --loss "ce+0.003*center" --epochs 30
    python train.py --data HW2p2_S25 --init best.pt --loss arcface      # go on under another loss
    python train.py --resume --out runs/arcface_resnet34        # go on after an interruption
    python train.py --loss help; python train.py --arch help    # what there is
    torchrun --standalone --nproc_per_node 8 train.py --shard           # eight GPUs, the result of one

Writes OUT/best.pt (lowest validation EER), last.pt, log.csv, args.json and curves.png, and links best.pt here.

Everything random is a function of (seed, epoch) or (seed, step): the order of the images, their augmentation,
dropout, random margins. Nothing random is stored, and a resumed run equals an uninterrupted one: bit for bit on a CPU,
on GPUs as nearly as their atomic additions allow, and with the same --amp.

In reading order: arguments; the run; the loop; optimizers; data; the run's folder; several processes, which nobody
with one GPU needs; main. To change the schedule of the learning rate see lr_factor(), what is saved Run.state() and
save_last(), one step train_step(), how batches are drawn data.epoch_batches(), default margins
losses.default_scale_and_margin().
"""
import argparse
import contextlib
import copy
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import data
import losses
import models
import verify

MAY_CHANGE = {"epochs", "steps", "out", "resume", "save_every", "data", "device", "shard", "amp"}   # when resuming
LONG_RUN_EPOCHS = 16                    # runs at least this long use stronger augmentation
SHOWN_OF_DEV = 10_000                   # images of dev, about, that the accuracy after an epoch is measured on,
SHOWN_OF_TRAIN = 20_000                 # and of train, for losses without class weights
DEFAULT_LR = {"adamw": 1e-3, "muon": 4e-3, "sgd": 0.1}
SMALL_SET = 50_000                      # images; fewer want smaller steps and much more weight decay
COLUMNS = dict(epoch="{:.0f}", step="{:.0f}", loss="{:.3f}", lr="{:.2e}", acc="{:.2%}", eer="{:.2%}", auc="{:.2%}",
               pair_acc="{:.2%}", img_per_s="{:.0f}", seconds="{:.0f}")


# ---- Arguments -------------------------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """For argparse's type: a number of that kind in low..high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is outside {low}..{high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def parser_of_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.usage
    default_device = "cuda" if torch.cuda.is_available() else "cpu"

    g = parser.add_argument_group("data")
    g.add_argument("--data", default="data", help="data set, or a folder above it [data; if absent, synthetic faces]")
    g.add_argument("--size", type=number(int, 32, 256), help="side of the input in pixels, 32..256 [the set's own]")
    g.add_argument("--crop", type=number(float, 0.1, 1), default=1.0, help="share of the image's side that is seen,"
                   " around its centre [1]")
    g.add_argument("--holdout", type=number(float, 0, 0.9), default=0.1, help="share of the people with several"
                   " images, two at least, held out for validation where the set has no val_pairs; 0 trains on all and"
                   " saves the last epoch as best [0.1]")

    g = parser.add_argument_group("model and loss")
    g.add_argument("--arch", default="resnet34", help="backbone; 'help' lists them [resnet34]")
    g.add_argument("--dim", type=number(int, 1, 65536), default=512, help="length of the embedding [512]")
    g.add_argument("--loss", default="arcface", help="a loss or a weighted sum such as 'ce+0.003*center' or"
                   " 'arcface:s=30,m=0.3'; 'help' lists them [arcface]")
    g.add_argument("--shard", action="store_true", help="divide the loss's class weights among torchrun's processes,"
                   " for very many people")
    g.add_argument("--init", metavar="CKPT", help="start from the backbone of this checkpoint, even if it was"
                   " trained on other people")
    g.add_argument("--freeze", action="store_true", help="with --init: train only the loss's weights and layers that"
                   " the checkpoint lacks")

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=number(int, 1), default=8, help="passes over the training images [8]")
    g.add_argument("--steps", type=number(int, 1), help="stop after this many steps in all; the schedule stays that"
                   " of --epochs, and --resume goes on [none]")
    g.add_argument("--batch-size", type=number(int, 2), help="images a step [128; 64 for fewer than 50,000 images]")
    g.add_argument("--per-person", type=number(int, 2), default=4, help="images a person in the batches of losses on"
                   " pairs and triplets [4]")
    g.add_argument("--opt", choices=["adamw", "muon", "sgd"], default="adamw", help="AdamW; Muon for convolutions and"
                   " AdamW for the rest; or SGD with Nesterov momentum 0.9 [adamw]")
    g.add_argument("--lr", type=number(float, 0), help="peak learning rate, for muon that of AdamW's part [0.001 for"
                   " adamw, 0.004 for muon, 0.1 for sgd]")
    g.add_argument("--weight-decay", type=number(float, 0), help="on matrices and kernels, not on those that muon"
                   " turns, norms, biases and learned scalars [0.05 for adamw and muon, 1 for fewer than 50,000 images;"
                   " 5e-4 for sgd]")
    g.add_argument("--warmup", type=number(float, 0, 1), default=0.1, help="share of the steps with rising rate [0.1]")
    g.add_argument("--lr-end", type=number(float, 0, 1), default=0.0, help="share of the peak rate that is left after"
                   " the last step; above 0 is of use with --ema, which averages the noise away [0]")
    g.add_argument("--clip", type=number(float, 0), default=5.0, help="largest norm of the gradient, 0 for any [5]")
    g.add_argument("--ema", type=number(float, 0, 1), default=0.0, help="decay of the moving average of the backbone's"
                   " weights that is evaluated and saved, 0 for none [0]")

    g = parser.add_argument_group("augmentation, 0 switches each off")
    for name, (short, long, meaning) in data.AUGMENT.items():
        default = f"{short}" if short == long else f"{short}; {long} from {LONG_RUN_EPOCHS} epochs on"
        largest = 90 if name == "rotate" else 1
        g.add_argument(f"--{name}", type=number(float, 0, largest), help=f"{meaning} [{default}]")

    g = parser.add_argument_group("the run")
    g.add_argument("--out", help="folder of results [runs/<loss>_<arch>, numbered when taken]")
    g.add_argument("--resume", action="store_true", help="go on from OUT/last.pt with its arguments")
    g.add_argument("--save-every", type=number(float, 0), default=600.0, metavar="SECONDS", help="write last.pt at"
                   " least this often [600]")
    g.add_argument("--seed", type=number(int, 0, 2 ** 31 - 1), default=0, help="of everything random [0]")
    g.add_argument("--device", default=default_device, type=verify.device, help="[%(default)s]")
    g.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="precision of the backbone;"
                   " auto is bf16 where the hardware multiplies it, else fp16 on CUDA, else off [auto]")
    g.add_argument("--compile", action="store_true", help="torch.compile the backbone and the augmentation; needs"
                   " a C++ compiler")
    return parser


def parse_args():
    """(arguments, checkpoint to go on from, lock of its folder); the latter two are None for a new run."""
    parser = parser_of_arguments()
    args = parser.parse_args()
    if args.resume or restarted_by_torchrun(args):
        return resumed_arguments(parser, args)
    check_arguments(args)
    if args.lr is None:
        args.lr = DEFAULT_LR[args.opt]
    for name, (short, long, _) in data.AUGMENT.items():
        if getattr(args, name) is None:
            setattr(args, name, long if args.epochs >= LONG_RUN_EPOCHS else short)
    if args.amp == "auto":
        args.amp = precision(torch.device(args.device))
    return args, None, None


def check_arguments(args):
    """Report wrong arguments before slow work starts."""
    criterion = losses.make(args.loss, args.dim, 2)
    if criterion.balanced and args.batch_size is not None and args.batch_size < 2 * args.per_person:
        raise ValueError(f"--batch-size {args.batch_size}: {args.loss} needs two people with --per-person"
                         f" {args.per_person} images in a batch; give at least {2 * args.per_person}")
    if args.arch not in models.ARCHS:
        models.make(args.arch)
    if args.shard and os.environ.get("WORLD_SIZE", "1") == "1":
        raise ValueError("--shard divides class weights among processes, and there is one; start several with torchrun")
    if args.freeze and not args.init:
        raise ValueError("--freeze needs --init CKPT; there is nothing trained to freeze")
    if args.init:
        args.init = os.path.abspath(args.init)                  # paths in a checkpoint are absolute
        verify.load(args.init)
    if args.out:
        check_out(Path(args.out), Path(args.data))
    check_compiler(args)


def check_out(out, faces):
    """ValueError if the run cannot write to out, or would add to the images of the set."""
    if (out / "last.pt").exists():
        raise ValueError(f"{out} holds a run already; --resume it, or give another --out")
    nearest = out
    while not nearest.exists():
        nearest = nearest.absolute().parent
    if not nearest.is_dir():
        raise ValueError(f"{out}: {nearest} is a file, not a folder; give another --out")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{out}: {nearest} is read-only; give another --out")
    if faces.exists() and Path(os.path.realpath(faces)) in Path(os.path.realpath(out)).parents:
        raise ValueError(f"--out {out} lies inside --data {faces}, whose folders are people; give another --out")


def check_compiler(args):
    compilers = [os.environ.get("CXX", "g++"), "clang++", "cl"]
    if args.compile and not any(map(shutil.which, compilers)):
        raise ValueError("--compile needs a C++ compiler; install g++, or start a run without it")


def resumed_arguments(parser, args):
    """As parse_args(): the run's own arguments are the defaults, and what the user gives must agree with them."""
    out = args.out or str(run_dir(args, resume=True))
    run_lock = None
    if os.environ.get("RANK", "0") == "0" and Path(out).is_dir():
        run_lock = data.lock(out)
    ckpt = verify.load(Path(out) / "last.pt")
    verify.check_resumable(ckpt, Path(out) / "last.pt")
    kept = {k: v for k, v in ckpt["args"].items() if k not in ("out", "resume", "device", "steps")}
    parser.set_defaults(**kept)
    args = parser.parse_args()
    args.out = out
    if args.init:
        args.init = os.path.abspath(args.init)                  # as check_arguments() does
    if args.amp == "auto":                                      # here: as before, whatever this device would choose
        args.amp = ckpt["args"]["amp"]
    differing = []
    for name, value in ckpt["args"].items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            differing.append(f"--{name.replace('_', '-')} (it has {value})")
    if differing:
        raise ValueError(f"cannot resume {out} with another {', '.join(differing)}; leave it out, or start anew")
    check_compiler(args)
    return args, ckpt, run_lock


def precision(device):
    """The fastest precision that the hardware supports: bf16 on Ampere and later and on CPUs with AVX512-BF16 or AMX,
    fp16 on older GPUs."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    cpu_has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "bf16" if cpu_has_bf16 and cpu_has_bf16() else "off"


# ---- The run: what it trains, what is saved and what is loaded --------------------------------------------------

def build_modules(args, classes, images, device, processes, ckpt):
    """(backbone, loss) for so many classes and training images; ckpt is the checkpoint to go on from, or None."""
    torch.manual_seed(args.seed)
    net = models.make(args.arch, args.dim, args.size).to(device, memory_format=data.memory_format(device))
    shard = (processes.rank, processes.world_size) if args.shard else (0, 1)
    if classes < shard[1]:
        raise ValueError(f"--shard: {classes} people cannot be divided among {shard[1]} processes; leave it out")
    criterion = losses.make(args.loss, args.dim, classes, shard, images).to(device)
    if processes.world_size > 1:
        models.synchronise_batch_norms(net)
    if ckpt:
        for name, p in net.named_parameters():
            p.requires_grad_(name not in ckpt.get("frozen", ()))
    elif args.init:
        start_from(net, args.init, args.arch, args.freeze)
    return net, criterion


def start_from(net, path, arch, freeze):
    """Load what fits of a checkpoint's backbone into net; with freeze, only what did not fit stays trainable."""
    ckpt = verify.load(path)
    if ckpt["args"]["arch"] != arch:
        raise ValueError(f"{path} is a {ckpt['args']['arch']}, not a {arch}; give --arch {ckpt['args']['arch']}")
    given = ckpt["ema"] or ckpt["model"]
    fitting = {}
    for name, value in net.state_dict().items():
        if name in given and given[name].shape == value.shape:
            fitting[name] = given[name]
    net.load_state_dict(fitting, strict=False)
    new = [name for name, _ in net.named_parameters() if name not in fitting]
    print(f"backbone from {path}" + (f"; new: {', '.join(new)}" if new else ""))
    if freeze:
        for name, p in net.named_parameters():
            if name in fitting:
                p.requires_grad_(False)


class Run:
    """A run of train.py. faces is the data set (data.FaceSet), train its training images (data.ImageSet).

    What it trains: net, criterion. With what: opt, scaler. What is evaluated: eval_net, net itself or with --ema its
    moving average. How far it has come: step (steps done), best (the lowest EER), log (a row for each whole epoch),
    epoch_stats. What save_last() writes, load() reads."""

    def __init__(self, args, net, criterion, faces, train, device, processes):
        self.args, self.faces, self.train, self.device, self.processes = args, faces, train, device, processes
        self.net, self.criterion, self.eval_net = net, criterion, net
        if args.ema:
            self.eval_net = copy.deepcopy(net).requires_grad_(False)
            self.averaged = split_by_kind(self.eval_net), split_by_kind(net)     # lists made once, not at each step
        self.trainable = [p for p in [*net.parameters(), *criterion.parameters()] if p.requires_grad]
        if not self.trainable:
            raise ValueError(f"nothing to train: the backbone is frozen and {args.loss} has no weights of its own")

        small_set = len(train.rows) < SMALL_SET
        if args.batch_size is None:
            args.batch_size = 64 if small_set else 128
        if args.weight_decay is None:
            adamw_decay = 1.0 if small_set else 0.05
            args.weight_decay = 5e-4 if args.opt == "sgd" else adamw_decay
        self.opt = make_optimizer(args, net, self.trainable)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

        self.per_person = min(args.per_person, len(train.rows)) if criterion.balanced else 0
        # Every epoch has this shape. batch_size may be less than args.batch_size: in a tiny set, or P people x K.
        self.steps_per_epoch, self.batch_size = self.batches_of_epoch(0).shape
        self.total_steps = args.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, args.steps or self.total_steps)
        criterion.set_run_length(self.total_steps)
        self.local_rows = rows_of_process(self.batch_size, processes)
        self.labels = torch.from_numpy(train.labels).to(device)
        self.strength = {name: getattr(args, name) for name in data.AUGMENT}

        self.ddp_net = data_parallel(net, processes)            # what train_step() calls: net, perhaps wrapped
        self.augment_kernel = data.augment_kernel
        if args.compile:
            self.ddp_net = torch.compile(self.ddp_net)
            self.augment_kernel = torch.compile(data.augment_kernel, dynamic=False)

        self.step, self.best, self.log = 0, math.inf, []
        self.seen_before = 0                                    # images that --init's checkpoint had seen
        self.data_digest = data.set_digest(faces)
        self.epoch_stats = torch.zeros(3, device=device)        # of this epoch: sum of losses, steps, first bad step
        self.epoch_began = self.saved_at = time.monotonic()
        self.stopping = False                                   # Ctrl-C or SIGTERM came
        self.writer = ThreadPoolExecutor(1)
        self.writing = self.writer.submit(lambda: None)         # what is being written, see save(): nothing yet
        self.best_is_copied = False                             # see link_best()
        self.busy_noted = False                                 # see note_busy_machine()

    @property
    def out(self):
        return Path(self.args.out)

    def batches_of_epoch(self, epoch):
        """Row numbers (steps, batch) of all steps of an epoch."""
        args, train = self.args, self.train
        return data.epoch_batches(train.labels, train.rows, args.batch_size, args.seed, epoch, self.per_person)

    def autocast(self):
        dtype = torch.float16 if self.args.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, self.args.amp != "off")

    # What is saved. best.pt holds what verify.py needs, last.pt what resuming needs as well.

    def state(self):
        """What both checkpoints hold, with the class rows of all processes where --shard divides them.
        To save more, add it here and read it in load(): tensors, numbers, strings, lists and dictionaries of them."""
        loss_state = map_loss_rows(losses.gather_class_rows, self, self.criterion.state_dict())
        frozen = [name for name, p in self.net.named_parameters() if not p.requires_grad]
        ema = self.eval_net.state_dict() if self.args.ema else None
        return {"face_checkpoint": verify.VERSION, "args": vars(self.args), "names": self.faces.names,
                "images": len(self.train.rows), "spec": self.criterion.spec, "frozen": frozen,
                "model": self.net.state_dict(), "ema": ema, "loss": loss_state, "step": self.step, "best": self.best,
                "seen": self.seen_before + self.step * self.batch_size, "data_digest": self.data_digest}

    def save_best(self, validation):
        """Write OUT/best.pt. validation: the Scores of the validation pairs, or None."""
        ckpt = self.state()
        ckpt["val"] = None
        if validation is not None:
            ckpt["val"] = {"labels": torch.from_numpy(validation.labels), "scores": torch.from_numpy(validation.scores),
                           "mark": validation.digest}
        self.save("best.pt", ckpt)

    def save_last(self):
        """Write OUT/last.pt."""
        ckpt = self.state()
        opt_state = map_optimizer_rows(losses.gather_class_rows, self, self.opt.state_dict())
        # spent: seconds of this epoch
        ckpt |= {"opt": opt_state, "scaler": self.scaler.state_dict(), "log": self.log, "sums": self.epoch_stats,
                 "spent": time.monotonic() - self.epoch_began}
        self.save("last.pt", ckpt)
        self.saved_at = time.monotonic()

    def save(self, name, ckpt):
        """Write OUT/name atomically, by process 0, in a thread: training goes on meanwhile."""
        if self.processes.rank == 0:
            buffer = io.BytesIO()
            torch.save(ckpt, buffer)
            self.writing.result()                               # of the file before; raises what went wrong with it
            self.writing = self.writer.submit(data.write, self.out / name, buffer.getbuffer())

    def finish_writing(self):
        """Wait until all is written; then no process needs the others any more."""
        self.writing.result()
        barriers(1)

    def load(self, ckpt):
        """Go on from what save_last() wrote."""
        path = self.out / "last.pt"
        if ckpt["names"] != self.faces.names or ckpt["images"] != len(self.train.rows):
            raise ValueError(f"{self.args.data} has changed since {path}: {ckpt['images']} images of"
                             f" {len(ckpt['names'])} people then, {len(self.train.rows)} of {len(self.faces.names)}"
                             " now; start a new run")
        if ckpt["spec"] != self.criterion.spec:
            raise ValueError(f"{path} was trained with {ckpt['spec']}, and --loss {self.args.loss} now means"
                             f" {self.criterion.spec}; put the loss's defaults back, or start anew")
        if ckpt.get("data_digest", self.data_digest) != self.data_digest:
            raise ValueError(f"{self.args.data} has changed since {path}: other files, labels or validation pairs;"
                             f" start a new run, perhaps with --init {path}")
        try:
            self.net.load_state_dict(ckpt["model"])
            self.criterion.load_state_dict(map_loss_rows(losses.shard_class_rows, self, ckpt["loss"]))
            self.opt.load_state_dict(map_optimizer_rows(losses.shard_class_rows, self, ckpt["opt"]))
            if ckpt["scaler"]:                                  # empty if that precision needed none
                self.scaler.load_state_dict(ckpt["scaler"])
            if self.args.ema:
                self.eval_net.load_state_dict(ckpt["ema"])
            self.step, self.best, self.log = ckpt["step"], ckpt["best"], ckpt["log"]
            self.seen_before = verify.images_seen(ckpt) - self.step * self.batch_size
            self.epoch_stats = ckpt["sums"].to(self.device)
        except (KeyError, RuntimeError, ValueError):
            raise ValueError(f"{path} is not the last.pt of this version's run; start anew, perhaps with --init"
                             f" {path}") from None
        self.epoch_began -= ckpt.get("spent", 0.0)              # the seconds that the interrupted epoch had taken

    def check_finite(self):
        """ValueError if a loss or a weight was not finite. Called rarely: it makes the CPU wait for the GPU."""
        finite = torch.stack([p.isfinite().all() for p in self.trainable]).all()
        bad_step = int(self.epoch_stats[2])
        if not bad_step and not finite:
            bad_step = self.step
        remedy = (f"lower --lr ({self.args.lr:g}), lengthen --warmup, or try --amp off; {self.out}/last.pt is from"
                  " before")
        if bad_step:
            raise ValueError(f"the loss or a weight was not finite at step {bad_step}: {remedy}")
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise ValueError(f"by step {self.step} the gradients in fp16 were not finite at any scale, and these steps"
                             f" were skipped: {remedy}")


# ---- The loop --------------------------------------------------------------------------------------------------

def lr_factor(step, total, warmup, end=0.0):
    """Share of the peak learning rate, asked for at each step by train_step(): a linear warm-up, then half a cosine
    down to end. total is that of --epochs, so that more epochs when resuming stretch the cosine."""
    warmup_steps = max(1, round(warmup * total))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total - warmup_steps)
    return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * done))


AUGMENTATION, DROPOUT, LOSS = 0, 1, 2 ** 31     # what a step draws random numbers for; dropout: 1 + rank, below 2 ** 31


def seed_step(*key):
    """Seed torch with a hash of the key, because the CPU's generator uses only 32 bits of its seed."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def train_step(run, x, labels):
    """One step of gradient descent: uint8 images (b, S, S, 3) of this process, labels (B,) of the whole batch -> loss.

    In several processes each takes its rows of the batch through the backbone; the embeddings of all are put together
    with gradient, and every process computes the loss of the whole batch, as one process would."""
    args = run.args
    seed_step(args.seed, run.step, AUGMENTATION)                # of the whole batch, alike in all processes
    first_row = run.local_rows.start
    x = data.augment(x, run.strength, (first_row, run.batch_size), run.augment_kernel)
    seed_step(args.seed, run.step, DROPOUT + run.processes.rank)
    with run.autocast():
        z = run.ddp_net(x)                                      # (b, dim)
    z = gather_embeddings(z, first_row, run.batch_size)         # (B, dim)
    seed_step(args.seed, run.step, LOSS)                        # random margins and classes, alike in all processes
    loss = run.criterion(z, labels)                             # in float32, outside autocast

    for group in run.opt.param_groups:
        group["lr"] = args.lr * lr_factor(run.step, run.total_steps, args.warmup, args.lr_end)
    run.opt.zero_grad()
    run.scaler.scale(loss).backward()
    if args.clip:
        run.scaler.unscale_(run.opt)
        clip_gradients(run, args.clip)
    run.scaler.step(run.opt)
    run.scaler.update()
    if args.ema:
        decay = min(args.ema, (1 + run.step) / (10 + run.step))         # low at first: the weights change fast
        update_average(run.averaged, decay)
    run.step += 1
    return loss.detach()


def train_one_epoch(run, epoch):
    """The steps of an epoch, from run.step on, that are not done yet. False if --steps ended it early."""
    set_train_mode(run)
    first_step, epoch_start = run.step, epoch * run.steps_per_epoch
    order = run.batches_of_epoch(epoch)[first_step - epoch_start:run.last_step - epoch_start]
    progress = data.Progress(f"epoch {epoch + 1}", order.size)
    # index (B,): rows of the whole batch. x: the images of it that are this process's.
    for index, x in data.batches(run.train.images, order, run.device, run.local_rows):
        loss = train_step(run, x, run.labels[index])
        note_loss(run, loss)
        progress.update((run.step - first_step) * run.batch_size)
        save_due = time.monotonic() - run.saved_at > run.args.save_every
        stopping, save_due = all_reduce_max(run.stopping, save_due)
        if stopping or save_due:
            run.check_finite()
            run.save_last()
        if stopping:
            run.finish_writing()
            print(f"\nstopped at step {run.step}; go on with: python train.py --resume --out {run.out}")
            sys.exit(130)
    run.check_finite()
    return run.step == (epoch + 1) * run.steps_per_epoch


def set_train_mode(run):
    """Dropout and batch statistics as in training; with --freeze only in layers with trainable weights, so that dropout
    is as in evaluation."""
    run.net.train()
    if run.args.freeze:
        for module in run.net.modules():
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()


def split_by_kind(net):
    """(what can be averaged, what can only be copied) of a network's state."""
    values = list(net.state_dict().values())
    return [v for v in values if v.is_floating_point()], [v for v in values if not v.is_floating_point()]


def update_average(averaged, decay):
    """average = decay average + (1 - decay) weights, in one call for all tensors. averaged is Run's."""
    (averages, copies), (weights, counts) = averaged
    torch._foreach_lerp_(averages, weights, 1 - decay)
    if copies:                                                  # without batch norm there are none
        torch._foreach_copy_(copies, counts)


@torch.no_grad()
def note_loss(run, loss):
    """Add a step's loss to the epoch's, without waiting for the device; the very first one is printed."""
    is_first_bad = ~torch.isfinite(loss) & (run.epoch_stats[2] == 0)
    bad_step = torch.where(is_first_bad, run.step, 0)
    run.epoch_stats += torch.stack([loss, torch.ones_like(loss), bad_step])
    if run.step == 1:
        text = f"first loss {float(loss):.2f}"
        expected = run.criterion.expected(run.batch_size)
        if expected and not run.args.init:
            text += f"; with random weights about {expected:.2f} is expected"
        print(text)
        for note in [*run.criterion.notes(), *note_outweighed(run.criterion.first_parts)]:
            print(f"note: {note}")


def note_outweighed(parts):
    """A line if one part of a sum is a hundred times another at the start: the smaller one has no say then."""
    parts = sorted((float(value), text) for text, value in parts)
    (least, small), (most, large) = parts[0], parts[-1]
    if most <= 100 * least or least <= 0:
        return []
    return [f"at the start {large} is {most:.3g} and {small} is {least:.3g}: the former decides alone; change a weight"]


def finish_epoch(run, epoch, sets, whole):
    """Validation, a row of the log, best.pt, last.pt. An epoch that --steps cut short is finished by --resume."""
    seconds = time.monotonic() - run.epoch_began
    if not whole:
        run.save_last()
    people = len(run.faces.names)
    per_centroid = min(8, max(1, SHOWN_OF_TRAIN // people))     # 8 is what verify.py takes
    found = verify.evaluate(run.eval_net, run.criterion, sets, people, per_centroid=per_centroid)
    # verify's names differ: its dev_acc1 is the log's acc, its acc the log's pair_acc.
    metrics = dict.fromkeys(["dev_acc1", "eer", "auc", "acc"], math.nan) | found.metrics
    steps = run.step - epoch * run.steps_per_epoch
    row = dict(
        epoch=epoch + 1, step=run.step, loss=float(run.epoch_stats[0] / run.epoch_stats[1]),
        lr=run.opt.param_groups[0]["lr"], acc=metrics["dev_acc1"], eer=metrics["eer"], auc=metrics["auc"],
        pair_acc=metrics["acc"], img_per_s=steps * run.batch_size / seconds,
        seconds=seconds + (run.log[-1]["seconds"] if run.log else 0))
    print_row(row, with_names=not run.log)
    note_busy_machine(run, row)

    is_best = not row["eer"] >= run.best                        # "not >=": NaN, without validation pairs, is best too
    is_best = is_best and (whole or not run.log)                # of epochs cut short only the first is saved
    if is_best:
        if whole:
            run.best = row["eer"]
        run.save_best(found.scores.get("val_pairs"))
    if run.processes.rank == 0:
        write_log(run.out, [*run.log, row])
    if whole:
        run.log.append(row)
        run.epoch_stats.zero_()
        run.epoch_began = time.monotonic()
        run.save_last()
    if is_best and run.processes.rank == 0:
        link_best(run)


def note_busy_machine(run, row):
    """Say once that an epoch ran at less than a third of the run's best rate, and what helps."""
    best_rate = max([previous["img_per_s"] for previous in run.log], default=0)
    if row["img_per_s"] < best_rate / 3 and not run.busy_noted:
        run.busy_noted = True
        threads = max(1, torch.get_num_threads() // 2)
        print(f"note: {row['img_per_s']:.0f} images/s, after {best_rate:.0f} in an earlier epoch: other work runs on"
              f" this machine; fewer threads may be quicker: stop, then OMP_NUM_THREADS={threads} python train.py"
              f" --resume --out {run.out}")


def print_row(row, with_names):
    if with_names:
        print("  ".join(f"{name:>9}" for name in COLUMNS))
    cells = []
    for name, form in COLUMNS.items():
        cells.append("-" if math.isnan(row[name]) else form.format(row[name]))
    print("  ".join(f"{cell:>9}" for cell in cells))


def write_log(out, log):
    """OUT/log.csv, a row an epoch, and OUT/curves.png: loss, accuracy and EER over epochs."""
    verify.write_csv(out / "log.csv", COLUMNS, [[row[name] for name in COLUMNS] for row in log])
    epochs = [row["epoch"] for row in log]
    panels = []
    for title, unit, key, scale in [("training loss", "", "loss", 1), ("accuracy on dev, closed set", "%", "acc", 100),
                                    ("EER on validation pairs", "%", "eer", 100)]:
        values = [scale * row[key] for row in log]
        panels.append((title, "epoch", unit, {"": (epochs, values)}, "wholex"))
    data.plot(out / "curves.png", panels)


# ---- Optimizers -------------------------------------------------------------------------------------------------

def make_optimizer(args, net, params):
    """AdamW, SGD or Muon for params. Matrices and kernels decay, norms, biases and learned scalars do not.
    Tell verify.check_optimizer() of a new optimizer and of settings other than torch's defaults: else --resume takes
    last.pt for damaged."""
    kernels = []
    if args.opt == "muon":
        if not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules()):
            raise ValueError(f"--opt muon keeps the lengths of kernels, which only batch norm makes good, and"
                             f" {args.arch} has none; give --opt adamw")
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d) and module.groups == 1 and module.weight.requires_grad:
                kernels.append(module.weight)
    turned = set(kernels)
    others = [p for p in params if p not in turned]
    matrices = [p for p in others if p.shape[1:].numel() > 1]   # (C, 1) and (C, 1, 1) count as vectors
    vectors = [p for p in others if p.shape[1:].numel() <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]

    if args.opt == "muon":
        return Muon(groups, kernels, args.lr)
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, args.lr, fused=True)
    opt = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)
    # If fp16 skips the first step, the fused kernel leaves the buffers unfilled and reads them at the next.
    for p in params:
        opt.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return opt


def orthogonalise(x):
    """Matrices (K, n, m) with their singular values brought near 1 and their singular vectors kept.

    A Newton-Schulz step puts each singular value v through 3.4445 v - 4.7750 v^3 + 2.0315 v^5 (Jordan et al. 2024).
    Three steps bring those above a fiftieth of the matrix's norm to 0.68..1.21, which is near enough."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT                           # x x^T is the smaller product then
    x = x / (length(x) + 1e-7)
    for _ in range(3):
        gram = x @ x.mT                                         # (K, n, n)
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x


def length(x):
    """Frobenius norms (K, 1, 1) of matrices (K, n, m)."""
    return torch.linalg.matrix_norm(x, keepdim=True)


class Muon(torch.optim.AdamW):
    """AdamW for groups; for the kernels of convolutions Muon (Jordan et al. 2024), with lengths that stay:

        b = momentum b + g
        o = orthogonalise(g + momentum b), as a matrix (out, in k k)
        w = w - angle |w| o / |o|, then brought back to the length it had

    angle, in radians by which a kernel turns, is 20 lr. Batch norm after a convolution undoes any change of its
    kernel's length, so weight decay would do nothing. torch.optim.Muon takes matrices only and keeps no lengths."""

    def __init__(self, groups, kernels, lr, momentum=0.6):
        super().__init__([*groups, {"params": kernels, "weight_decay": 0.0}], lr, fused=True)
        self.momentum = momentum
        self._step_supports_amp_scaling = False                 # GradScaler is to leave out the whole step
        for p in kernels:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            self.state[p]["step"] = torch.zeros(())             # AdamW looks for it when it loads a state

    @torch.no_grad()
    def step(self):
        groups, kernel_group = self.param_groups[:-1], self.param_groups[-1]
        of_shape = {}                                           # kernels of one shape are turned together
        for p in kernel_group["params"]:
            if p.grad is not None:
                of_shape.setdefault(p.shape, []).append(p)
        for kernels in of_shape.values():
            self.turn(kernels, angle=20 * kernel_group["lr"])
        self.param_groups = groups
        try:
            super().step()
        finally:
            self.param_groups = [*groups, kernel_group]

    def turn(self, kernels, angle):
        updates = []
        for p in kernels:
            buffer = self.state[p]["momentum_buffer"]
            buffer.mul_(self.momentum).add_(p.grad)
            updates.append(p.grad.add(buffer, alpha=self.momentum).flatten(1))
        direction = orthogonalise(torch.stack(updates))         # (K, out, in k k)
        weights = torch.stack([p.flatten(1) for p in kernels])
        turned = weights - angle * length(weights) * direction / (length(direction) + 1e-7)
        turned = turned * (length(weights) / length(turned))
        for p, value in zip(kernels, turned):
            p.copy_(value.view_as(p))


# ---- Data ------------------------------------------------------------------------------------------------------

def load_data(args):
    """(faces, sets): what --data names, and its images decoded: {"train", "dev": ImageSet, "val_pairs": PairSet}."""
    if args.data == "data" and not Path("data").exists():       # not when resuming: a checkpoint's paths are absolute
        print("no data/ folder and no --data: rendering synthetic faces into data/ and training on those")
        data.synthesise("data")
    args.data = os.path.abspath(args.data)
    faces = data.load(args.data, args.holdout, args.seed)
    if args.size is None:
        args.size = data.native_size(faces.train.files)
    sets = verify.pack_sets(faces, ["train", "dev", "val_pairs"], vars(args))
    if "dev" in sets:                                           # only shown; verify.py counts all of them
        every = max(1, len(sets["dev"].rows) // SHOWN_OF_DEV)
        sets["dev"] = sets["dev"]._replace(rows=sets["dev"].rows[::every])
    return faces, sets


# ---- The run's folder ------------------------------------------------------------------------------------------

def run_dir(args, resume=False):
    """runs/<loss>_<arch>, then _2, _3, ...: the first that is free, or to resume the last that holds a run."""
    base = Path("runs") / re.sub(r"[^\w.+-]+", "_", f"{args.loss}_{args.arch}")
    folder, taken = base, []
    while (folder / "log.csv").exists():
        taken.append(folder)
        folder = Path(f"{base}_{len(taken) + 1}")
    if not resume:
        return folder
    taken = [folder for folder in taken if (folder / "last.pt").exists()]
    if not taken:
        raise ValueError(f"{base}: no run to resume; name its folder with --out")
    return taken[-1]


def create_run_dir(args):
    """(folder, lock) of a new run. Creating log.csv exclusively stops two new runs from sharing a folder; the lock
    stops two that resume. With --out, a run that was killed before its first save leaves its folder free."""
    while True:
        out = Path(args.out) if args.out else run_dir(args)
        out.mkdir(parents=True, exist_ok=True)
        log = out / "log.csv"
        try:
            run_lock = data.lock(out)
            killed_early = log.exists() and not log.stat().st_size and not (out / "last.pt").exists()
            if args.out and data.fcntl and killed_early:
                log.unlink()
            open(log, "x").close()
            return out, run_lock
        except FileExistsError:
            if args.out:
                raise ValueError(f"{out} holds a run already; --resume it, or give another --out") from None
        except ValueError:                                      # another run is at work there
            if args.out:
                raise


def link_best(run):
    """Let best.pt in the working folder point to the run's best; a file of the user's own is left alone."""
    best, here = run.out / "best.pt", Path("best.pt")
    if here.exists() and not here.is_symlink() and not run.best_is_copied:
        if os.path.realpath(here) != os.path.realpath(best):
            print(f"best.pt here is not a link of ours and stays as it is; the new one is {best}")
        return
    temporary = Path(f"best.pt.{os.getpid()}.tmp")
    try:
        os.symlink(os.path.relpath(best), temporary)
        os.replace(temporary, here)
    except OSError:                                             # a file system without links
        try:
            run.writing.result()                                # best.pt may be on its way to the disk
            data.write(here, best.read_bytes())
            run.best_is_copied = True                           # so the next best may replace it
        except OSError as e:                                    # the link is a convenience, no reason to stop
            print(f"no best.pt here ({e.strerror}); it is {best}")


# ---- Several processes: torchrun starts them, and together they do what one would --------------------------------

RESTARTS = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")    # how often torchrun --max-restarts began anew


class Processes(NamedTuple):
    """This process among those of torchrun."""
    rank: int                                                   # 0 .. world_size - 1; 0 alone prints and writes
    world_size: int
    local_rank: int                                             # on its own machine


def find_processes():
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    if world_size > 1 and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)                       # before anything is put on the first one
    return Processes(rank, world_size, local_rank)


def restarted_by_torchrun(args):
    return RESTARTS != "0" and args.out is not None and Path(args.out, "last.pt").exists()


def connect(args, processes):
    """The device of this process, after it has met the others."""
    rank, world_size, local_rank = processes
    device = torch.device(args.device)
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and local_rank >= gpus:
        raise ValueError(f"--nproc_per_node: this machine has {gpus} GPUs; start no more processes, or --device cpu")
    if world_size == 1:
        return device
    backend = "gloo"
    if device.type == "cuda":
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
    # Long, as one process may decode for hours while the others wait; a dead one closes its connections at once.
    store = dist.PrefixStore(RESTARTS, next(dist.rendezvous("env://"))[0])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(days=1))

    def report(kind, error, trace):
        if kind is RuntimeError and "gloo" in str(error):
            print(f"process {rank} ends, for another did", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)
    sys.excepthook = report
    return device


def all_reduce_max(*flags):
    """The largest of each process's flags (integers): what one has noticed, all act on at the same step."""
    if not dist.is_initialized():
        return flags
    largest = torch.tensor([int(flag) for flag in flags])       # on the CPU: no GPU synchronisation
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def barriers(turns):
    """Wait for all processes, so many times; every process must call this equally often."""
    for _ in range(turns):
        all_reduce_max(0)


@contextlib.contextmanager
def one_after_another(processes):
    """Rank 0 prepares the data, then one process on every other node; the rest find it cached."""
    if processes.rank == 0:
        turn = 0
    elif processes.local_rank == 0:
        turn = 1
    else:
        turn = 2
    barriers(turn)
    yield
    barriers(2 - turn)


def rows_of_process(batch_size, processes):
    """The slice of a batch that goes through this process's backbone."""
    rank, world_size, _ = processes
    if batch_size < world_size:
        raise ValueError(f"a batch of {batch_size} images cannot be divided among {world_size} processes; use fewer")
    return slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


def data_parallel(net, processes):
    """net, in several processes with the mean of their gradients."""
    if processes.world_size == 1 or not any(p.requires_grad for p in net.parameters()):
        return net
    ddp_net = torch.nn.parallel.DistributedDataParallel(net)
    ddp_net.broadcast_buffers = False                           # they are alike, by synchronised batch norm
    return ddp_net


def gather_embeddings(z, first_row, batch_size):
    """(batch_size, D) embeddings of all processes, from our rows z; gradients flow back to each."""
    if not dist.is_initialized():
        return z
    if z.requires_grad:
        z.register_hook(lambda grad: grad * dist.get_world_size())      # DistributedDataParallel takes the mean
    return losses.gather_rows(z.float(), first_row, batch_size)


def broadcast_replicated(criterion):
    """Give all processes the loss's values of process 0, except divided rows, in case rounding made them differ."""
    if not dist.is_initialized():
        return
    for name, value in [*criterion.named_parameters(), *criterion.named_buffers()]:
        if name not in criterion.rows_per_class:
            dist.broadcast(value.detach(), 0)


def map_loss_rows(move, run, loss_state):
    """loss_state with move, losses.gather_class_rows or shard_class_rows, applied to each tensor that --shard divides:
    they are saved whole, and any number of processes goes on with them."""
    moved = dict(loss_state)
    for name, k in run.criterion.rows_per_class.items():
        moved[name] = move(loss_state[name], k, len(run.faces.names))
    return moved


def map_optimizer_rows(move, run, opt_state):
    """As map_loss_rows(), for what the optimizer keeps of the divided parameters."""
    rows_per_class = run.criterion.rows_per_class
    k_of_param = {p: rows_per_class[name] for name, p in run.criterion.named_parameters() if name in rows_per_class}
    params = [p for group in run.opt.param_groups for p in group["params"]]
    state = {}
    for number, values in opt_state["state"].items():
        state[number] = dict(values)
        k = k_of_param.get(params[number])
        for name, value in values.items():
            if k and torch.is_tensor(value) and value.ndim > 0:         # skips scalars: AdamW's count of steps
                state[number][name] = move(value, k, len(run.faces.names))
    return {**opt_state, "state": state}


def clip_gradients(run, max_norm):
    """Clip the global gradient norm to max_norm. The squared norms of divided gradients are summed over processes."""
    rows_per_class = run.criterion.rows_per_class
    divided = {p for name, p in run.criterion.named_parameters() if name in rows_per_class}
    with_grad = [p for p in run.trainable if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p not in divided])
    if divided:
        squared = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p in divided]).square()
        norm = norm.hypot(losses.ReduceSum.apply(squared).sqrt())
    torch.nn.utils.clip_grads_with_norm_(run.trainable, max_norm, norm)


# ---- main ------------------------------------------------------------------------------------------------------

def stop_after_step(run):
    """Ctrl-C and SIGTERM let the step finish, then save. A second one ends at once."""
    def request_stop(number, frame):
        run.stopping = True
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)


def print_run(run):
    args, faces = run.args, run.faces
    net_size = sum(p.numel() for p in run.net.parameters())
    loss_size = 0                                               # of all processes
    for name, p in run.criterion.named_parameters():
        k = run.criterion.rows_per_class.get(name)
        loss_size += p[0].numel() * k * len(faces.names) if k else p.numel()
    note = f"; {faces.note}" if faces.note else ""
    print(f"{faces.root}: {len(run.train.rows)} images of {len(faces.names)} people at {args.size}x{args.size}{note}")
    print(f"{args.arch}, {net_size / 1e6:.2f} M parameters, and {run.criterion.spec}, {loss_size / 1e6:.2f} M;"
          f" {run.device}, amp {args.amp}; {args.epochs} epochs of {run.steps_per_epoch} steps of {run.batch_size};"
          f" {run.out}")
    if run.device.type == "cpu" and len(run.train.rows) < SMALL_SET and args.size >= 96 and "swift" not in args.arch:
        # Measured on LFW, see docs/architectures.md.
        print("note: for so few images on a CPU a small network is quicker and better: --arch swiftface --size 96"
              " --epochs 20 --lr 2e-3 --loss cosface has 7.0 % EER on LFW after 12 minutes, resnet34 11.8 % after 45")


def main():
    for flag, module in {"--loss": losses, "--arch": models}.items():
        if f"{flag}=help" in sys.argv or (flag, "help") in zip(sys.argv, sys.argv[1:]):
            print(module.table())
            return
    processes = find_processes()
    args, ckpt, run_lock = parse_args()
    device = connect(args, processes)
    torch.set_float32_matmul_precision("high")                  # TF32 for products outside autocast
    torch.backends.cudnn.benchmark = True

    # Faces: found, decoded once, memory-mapped.
    with one_after_another(processes):
        faces, sets = load_data(args)

    # What is trained, and where it begins: in a folder of its own, or with the last save of an earlier run.
    train = sets["train"]
    net, criterion = build_modules(args, len(faces.names), len(train.rows), device, processes, ckpt)
    run = Run(args, net, criterion, faces, train, device, processes)
    if ckpt:
        run.load(ckpt)
    else:
        if processes.rank == 0:
            out, run_lock = create_run_dir(args)
            args.out = str(out)
        if processes.world_size > 1:
            shared = [args.out]
            dist.broadcast_object_list(shared)
            args.out = shared[0]
        if args.init:
            run.seen_before = verify.images_seen(verify.load(args.init))
    print_run(run)
    stop_after_step(run)
    if not ckpt:
        run.save_last()                                         # from here on --resume finds something
    if processes.rank == 0:
        data.write(run.out / "args.json", json.dumps(vars(args), indent=1) + "\n")

    for epoch in range(len(run.log), args.epochs):
        ends_within = run.last_step < (epoch + 1) * run.steps_per_epoch         # by --steps
        if run.log and ends_within and run.step >= run.last_step:
            break                                               # a whole epoch without a row goes on to its evaluation
        broadcast_replicated(criterion)
        whole = train_one_epoch(run, epoch)
        finish_epoch(run, epoch, sets, whole)
        if not whole:                                           # --steps is reached
            break

    run.finish_writing()
    pairs_option = "" if faces.val_pairs or faces.test_pairs else " --pairs FILE --images DIR"
    print(f"done: python verify.py --ckpt {run.out}/best.pt{pairs_option}")
    if processes.world_size > 1:
        dist.destroy_process_group()
    del run_lock                                                # held until here


if __name__ == "__main__":
    data.cli(main)
