"""Tell whether two faces are of the same person, and find whose face it is among many.

    python verify.py --ckpt best.pt                              # the checkpoint's data: EER, submission.csv
    python verify.py --ckpt best.pt --data DIR --out my.csv
    python verify.py --ckpt best.pt one.jpg two.jpg              # a score, and same or different
    python verify.py --ckpt best.pt --pairs FILE --images DIR    # any list of pairs, the homework's or LFW's
    python verify.py --ckpt best.pt --gallery known --probes unknown     # who each probe is, or nobody of the gallery
    python verify.py --ckpt best.pt --images DIR --save-embeddings z.npy # a folder's embeddings, with a listing
    python verify.py --ckpt best.pt --export face.pt2            # the model as a program that needs torch alone
    python verify.py --ckpt a.pt b.pt --out both.csv             # each alone, then the mean of their scores
    python verify.py --ckpt a.pt scores.csv --plots DIR          # ROC curves over each other, histograms, hard pairs
    python verify.py --compare runs/*                            # a table of what was tried

An image and its mirror image go through the backbone; the mean of the two outputs is the embedding. The score of a
pair is the cosine of its two embeddings. Each distinct image is embedded once, in float32 (products in TF32 on GPUs
that have it), so that scores depend neither on the batch size nor on the order of the pairs.
"""
import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import data
import eer
import losses
import models

VERSION = 1                                                 # of the checkpoint's layout
CHECKPOINT_KEYS = {"args", "names", "spec", "model", "ema", "loss"}
NOBODY = "n000000"                                          # the older Kaggle's answer for a stranger
RED = "#d1495b"


# ---- Checkpoints -------------------------------------------------------------------------------------------------

def device(name):
    """name, for argparse's type, if tensors can be made there."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"'{name}' is no device of this machine; leave it out") from None
    return name


def load(path):
    """A checkpoint of train.py as a dictionary. Nothing in the file is executed.

    ValueError in one line for a file that is missing, damaged, foreign, or from a newer version.
    """
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such checkpoint; train one with train.py, or name another")
    with open(data.regular(path), "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # of a pickle's protocol; our error says enough
        try:
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()                  # torch itself looks at no checksum
            if broken:
                raise zipfile.BadZipFile(broken)
            file.seek(0)
            ckpt = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as e:                              # half a dozen kinds, by where the file is broken
            why = "damaged"
            if "weights_only" in str(e).lower():
                why = "holds more than tensors, not opened"
            raise ValueError(f"{path}: not a checkpoint of train.py ({why}); name a best.pt or last.pt") from None
    version = ckpt.get("face_checkpoint") if isinstance(ckpt, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path}: not a checkpoint of train.py; name a best.pt or last.pt that it wrote")
    if version > VERSION:
        raise ValueError(f"{path}: written by a newer version of these scripts; update them")
    check_fields(ckpt, path)
    ckpt["args"].setdefault("crop", 1.0)                    # which the first checkpoints lack
    return ckpt


def build(ckpt, device="cpu", path="this checkpoint"):
    """(backbone, loss) of a checkpoint on a device, both in eval mode. path: what to call it in an error."""
    args = ckpt["args"]
    check_backbone(ckpt, path)
    check_loss(ckpt, ckpt["spec"], path)
    net = models.make(args["arch"], args["dim"], args["size"])
    criterion = losses.make(ckpt["spec"], args["dim"], len(ckpt["names"]))
    net.load_state_dict(ckpt["model"] if ckpt["ema"] is None else ckpt["ema"])
    try:
        criterion.load_state_dict(ckpt["loss"])
    except RuntimeError:                                    # dozens of lines, one a tensor
        raise misfit(path, "loss", ckpt["spec"]) from None
    return net.to(device).eval(), criterion.to(device).eval()


def misfit(path, field, what):
    return ValueError(f"{path}: its {field} weights do not fit {what}; it comes from another version of these scripts:"
                      " train again")


# ---- Checkpoints: the check of all that one holds ----------------------------------------------------------------

ARGUMENT_TEXTS = "arch", "loss", "data"
ARGUMENT_RANGES = {"dim": (int, 1, 65536), "size": (int, 32, 256), "holdout": (float, 0, 0.9),
                   "seed": (int, 0, 2 ** 31 - 1), "crop": (float, 0.1, 1)}
ANY = 2.0 ** 53                                             # more than any run counts
COUNT_RANGES = {"step": (int, 0, ANY), "images": (int, 1, ANY), "seen": (int, 0, ANY), "spent": (float, 0, ANY)}

# What only resuming looks at.
RESUMING_KEYS = {"step", "best", "images", "opt", "scaler", "log", "sums"}
TRAINING_RANGES = {"epochs": (int, 1, ANY), "batch_size": (int, 2, ANY), "per_person": (int, 2, ANY),
                   "lr": (float, 0, ANY), "weight_decay": (float, 0, ANY), "warmup": (float, 0, 1),
                   "clip": (float, 0, ANY), "ema": (float, 0, 1), "save_every": (float, 0, ANY)}
OPTIONAL_RANGES = {"lr_end": (float, 0, 1), **dict.fromkeys(data.AUGMENT, (float, 0, 90))}     # older runs lack some
TRAINING_SWITCHES = "shard", "freeze", "compile"
LOG_COLUMNS = {"epoch", "step", "loss", "lr", "acc", "eer", "auc", "pair_acc", "img_per_s", "seconds"}
GROUP_RANGES = {"lr": (float, 0, ANY), "weight_decay": (float, 0, ANY), "momentum": (float, 0, 1)}
KEPT_BY_ADAM = {"step", "exp_avg", "exp_avg_sq"}
# The class of each --opt, and what it keeps of a parameter in each of its groups.
OPTIMIZERS = {"adamw": (torch.optim.AdamW, [KEPT_BY_ADAM] * 2),
              "muon": (torch.optim.AdamW, [KEPT_BY_ADAM, KEPT_BY_ADAM, {"step", "momentum_buffer"}]),
              "sgd": (torch.optim.SGD, [{"momentum_buffer"}] * 2)}


@contextlib.contextmanager
def checking(path):
    """Inside, a demand() that is not met is a ValueError in one line that names the file."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"{path}: damaged, {e}; name another best.pt or last.pt") from None


def demand(right, field, wanted):
    """ValueError unless a checkpoint's field is right."""
    if not right:
        raise ValueError(f"its {field} is not {wanted}")


def demand_keys(fields, keys, field):
    demand(isinstance(fields, dict), field, "a dictionary")
    missing = sorted(keys - fields.keys())
    demand(not missing, field, f"complete: no {', '.join(missing)}")


def demand_ranges(fields, ranges, prefix=""):
    """Each field that is there is a number of the kind and range that ranges gives for its name."""
    for name, (kind, low, high) in ranges.items():
        if name in fields:
            what = "a whole number" if kind is int else "a number"
            demand(is_number(fields[name], kind, low, high), prefix + name, f"{what} in {low:g}..{high:g}")


def is_number(value, kind, low, high):
    return type(value) in (int, kind) and low <= value <= high


def is_text(value):
    return isinstance(value, str) and len(value) < 4096 and "\0" not in value


def are_texts(values):
    return isinstance(values, list) and all(map(is_text, values))


def is_tensor(value):
    """A tensor of numbers in memory, neither sparse nor one that has a shape only."""
    return torch.is_tensor(value) and value.layout == torch.strided and value.device.type == "cpu"


def check_fields(ckpt, path):
    """ValueError in one line for a field that is missing, of a wrong type, or outside its range."""
    with checking(path):
        demand_keys(ckpt, CHECKPOINT_KEYS, "content")
        args, names = ckpt["args"], ckpt["names"]
        demand_keys(args, ARGUMENT_RANGES.keys() - {"crop"}, "args")
        for name in ARGUMENT_TEXTS:
            demand(is_text(args.get(name)), f"args.{name}", "a text")
        demand(args["arch"] in models.ARCHS, "args.arch", "one of train.py's --arch help")
        demand_ranges(args, ARGUMENT_RANGES, "args.")
        demand_ranges(ckpt, COUNT_RANGES)
        demand(is_text(ckpt["spec"]), "spec", "a text")
        demand(are_texts(names) and names, "names", "a list of people")
        demand(are_texts(ckpt.get("frozen", [])), "frozen", "a list of texts")
        check_weights(ckpt["model"], "model")
        check_weights(ckpt["loss"], "loss")
        if ckpt["ema"] is not None:
            check_weights(ckpt["ema"], "ema")
        if ckpt.get("val") is not None:
            check_validation(ckpt["val"])


def check_weights(weights, field):
    demand(isinstance(weights, dict), field, "a dictionary of tensors")
    for name, value in weights.items():
        demand(is_text(name) and is_tensor(value), f"{field}.{name}", "a tensor")
        demand(value.isfinite().all(), f"{field}.{name}", "finite; the weights diverged")


def check_validation(val):
    demand_keys(val, {"labels", "scores"}, "val")
    labels, scores = val["labels"], val["scores"]
    for name, value in ("labels", labels), ("scores", scores):
        demand(is_tensor(value) and value.ndim == 1 and not value.requires_grad, f"val.{name}", "a tensor of one axis")
    demand(labels.dtype in (torch.int32, torch.int64), "val.labels", "a tensor of whole numbers")
    demand(labels.unique().tolist() == [0, 1], "val.labels", "of ones and zeros")
    demand(scores.dtype in (torch.float32, torch.float64), "val.scores", "a tensor of floats")
    demand(len(scores) == len(labels), "val.scores", "as long as val.labels")
    demand(scores.isfinite().all(), "val.scores", "finite")
    demand(is_text(val.get("mark", "")), "val.mark", "a text")


def check_backbone(ckpt, path):
    """ValueError unless the weights have the backbone's shapes. It is made without memory: a wrong size may ask for
    any amount."""
    args = ckpt["args"]
    with torch.device("meta"):
        wanted = shapes(models.make(args["arch"], args["dim"], args["size"]).state_dict())
    for field in ("model", "ema"):
        if ckpt[field] is not None and shapes(ckpt[field]) != wanted:
            raise misfit(path, field, f"{args['arch']}, --dim {args['dim']} and --size {args['size']}")


def shapes(weights):
    return {name: value.shape for name, value in weights.items()}


def check_loss(ckpt, spec, path):
    """ValueError unless as many numbers were saved as a loss of this spec has, before it is made: a wrong k or too
    many people would ask for any amount of memory."""
    people, saved = len(ckpt["names"]), numel(ckpt["loss"])
    for k in re.findall(r"\bk=(\d{1,20})", spec):          # centres a person
        if int(k) > max(saved, 1024):
            raise misfit(path, "loss", f"{spec} and {people} people")
    try:
        # with each person the number grows by the same amount
        of_two = numel(losses.make(spec, ckpt["args"]["dim"], 2).state_dict())
        of_three = numel(losses.make(spec, ckpt["args"]["dim"], 3).state_dict())
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if saved != of_two + (people - 2) * (of_three - of_two):
        raise misfit(path, "loss", f"{spec} and {people} people")


def numel(weights):
    return sum(value.numel() for value in weights.values())


def check_resumable(ckpt, path):
    """ValueError in one line unless train.py can go on from what load() has read."""
    if not RESUMING_KEYS <= ckpt.keys():
        raise ValueError(f"{path} is not the last.pt of a run, for it lacks"
                         f" {', '.join(sorted(RESUMING_KEYS - ckpt.keys()))}; start anew, perhaps with --init {path}")
    check_loss(ckpt, ckpt["args"]["loss"], path)
    check_backbone(ckpt, path)
    with checking(path):
        check_arguments(ckpt["args"])
        check_optimizer(ckpt)
        check_progress(ckpt)


def check_arguments(args):
    demand_keys(args, {*TRAINING_RANGES, *TRAINING_SWITCHES, "amp", "init", "opt", "steps"}, "args")
    demand_ranges(args, TRAINING_RANGES | OPTIONAL_RANGES, "args.")
    for name in TRAINING_SWITCHES:
        demand(isinstance(args[name], bool), f"args.{name}", "true or false")
    demand(args["amp"] in ["auto", "bf16", "fp16", "off"], "args.amp", "a precision")
    demand(args["opt"] in list(OPTIMIZERS), "args.opt", "adamw, muon or sgd")
    demand(args["init"] is None or is_text(args["init"]), "args.init", "a text")
    demand(args["steps"] is None or is_number(args["steps"], int, 1, ANY), "args.steps", "a whole number")


def check_optimizer(ckpt):
    """ValueError unless opt and scaler are what the optimizer of args.opt and a gradient scaler save."""
    kind, kept_of_groups = OPTIMIZERS[ckpt["args"]["opt"]]
    defaults = kind([torch.zeros(1)]).defaults
    demand_keys(ckpt["opt"], {"state", "param_groups"}, "opt")
    state, groups, wanted = ckpt["opt"]["state"], ckpt["opt"]["param_groups"], len(kept_of_groups)
    demand(isinstance(groups, list) and len(groups) == wanted, "opt.param_groups", f"a list of {wanted}")
    numbers, kept = [], []                                  # of all parameters
    for group, kept_of_each in zip(groups, kept_of_groups):
        demand_keys(group, {"params", "lr", "weight_decay"}, "opt.param_groups")
        demand(isinstance(group["params"], list), "opt.param_groups.params", "a list")
        for name in group.keys() & defaults.keys() - GROUP_RANGES.keys() - {"nesterov", "fused"}:
            demand(repr(group[name]) == repr(defaults[name]), f"opt.param_groups.{name}", defaults[name])
        demand_ranges(group, GROUP_RANGES, "opt.param_groups.")
        numbers += group["params"]
        kept += [kept_of_each] * len(group["params"])
    demand(repr(numbers) == repr(list(range(len(numbers)))), "opt.param_groups.params", "0, 1, 2, ...")

    demand(isinstance(state, dict), "opt.state", "a dictionary")
    allowed = {value.shape for weights in (ckpt["model"], ckpt["loss"]) for value in weights.values()}
    for number, values in state.items():
        demand(is_number(number, int, 0, len(kept) - 1), "opt.state", "of numbered parameters")
        demand_keys(values, kept[number], f"opt.state[{number}]")
        for name in kept[number]:
            value, field = values[name], f"opt.state[{number}].{name}"
            demand(is_tensor(value) and value.is_floating_point(), field, "a tensor of floats")
            demand(value.shape in allowed | {()}, field, "of a weight's shape")

    scaler = ckpt["scaler"]
    demand(isinstance(scaler, dict), "scaler", "a dictionary")
    for name, value in scaler.items():
        demand(is_number(value, float, 0, ANY), f"scaler.{name}", "a number")


def check_progress(ckpt):
    sums, log, last_step = ckpt["sums"], ckpt["log"], ckpt["step"]
    demand(type(ckpt["best"]) in (int, float), "best", "a number")      # infinite before the first, NaN without pairs
    right = is_tensor(sums) and sums.shape == (3,) and sums.dtype == torch.float32
    demand(right and sums.isfinite().all(), "sums", "three finite floats")
    demand(isinstance(log, list) and len(log) <= last_step, "log", "a list of rows, one an epoch")
    for i, row in enumerate(log):
        demand_keys(row, LOG_COLUMNS, f"log[{i}]")
        demand_ranges(row, {"epoch": (int, i + 1, i + 1), "step": (int, i + 1, last_step)}, f"log[{i}].")
        for name in LOG_COLUMNS:
            demand(type(row[name]) in (int, float), f"log[{i}].{name}", "a number")


# ---- Embeddings and scores ---------------------------------------------------------------------------------------

class Embedder(torch.nn.Module):
    """uint8 images (B, S, S, 3) -> embeddings (B, D): the backbone, and what stands before and behind it.

    project is the loss's own last layer, where it has one. mirror: mean of the embeddings of image and mirror image,
    their concat, or none. unit: to unit length, or as they are.
    """

    def __init__(self, net, project=None, mirror="mean", unit=True):
        super().__init__()
        self.net, self.mirror, self.unit = net, mirror, unit
        self.project = project or torch.nn.Identity()

    def forward(self, x):
        x = data.normalise(x)
        z = self.project(self.net(x))
        if self.mirror != "none":
            z_mirror = self.project(self.net(x.flip(3)))
            z = torch.cat([z, z_mirror], 1) if self.mirror == "concat" else (z + z_mirror) / 2
        return F.normalize(z.float()) if self.unit else z.float()


def check_images(images, size):
    """ValueError unless images are data.Images or uint8 (N, S, S, 3), of a model's size where that is told."""
    if isinstance(images, data.Images):
        height = width = images.size
    else:
        shape, found = np.shape(images), getattr(images, "dtype", type(images).__name__)
        if found != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"images of type {found} and shape {tuple(shape)}; give uint8 (N, S, S, 3), or any images"
                             " to verify.Verifier")
        _, height, width, _ = shape
    if size and (height, width) != (size, size):
        raise ValueError(f"images of {height}x{width} pixels, but the model is of size {size}: resize them, as"
                         " verify.Verifier does")


@torch.no_grad()
def embed(model, images, project=None, mirror="mean", unit=True, batch_size=None, rows=None, quiet=False):
    """uint8 images (N, S, S, 3), an array or data.Images -> embeddings (N, D) float32 on the CPU.

    rows selects images by number; project, mirror and unit are Embedder's; quiet: show no progress line. ValueError
    for images of another type or size than the model's, and if an embedding is not finite.
    With several processes each embeds a part of the images, and all receive all embeddings.
    """
    check_images(images, getattr(model, "size", None))
    device = next(model.parameters()).device
    net = models.fold(model).to(memory_format=data.memory_format(device))
    embedder = Embedder(net, project, mirror, unit)
    if batch_size is None:
        batch_size = 64 if device.type == "cpu" else 256    # larger batches overflow a CPU's cache
    if rows is None:
        rows = np.arange(len(images))
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    bounds = losses.shard_bounds(len(rows), world_size)
    local_rows = rows[bounds[rank]:bounds[rank + 1]]
    batches = np.split(local_rows, range(batch_size, len(local_rows), batch_size))

    parts, done = [], 0
    progress = data.Progress("embedding", len(local_rows))
    for index, x in data.batches(images, batches, device):
        parts.append(embedder(x).cpu())
        done += len(index)
        if not quiet:
            progress.update(done)
    z = torch.cat(parts)
    if world_size > 1:
        z = losses.gather_rows(z, bounds[rank], len(rows))

    bad = torch.nonzero(~z.isfinite().all(1))
    if len(bad):
        raise ValueError(f"image {int(rows[bad[0, 0]])} has an embedding that is not finite; the weights diverged:"
                         " train again with a lower --lr, or with --amp off")
    return z


def metric_of(criterion, name=None):
    """(project, similarity) of a metric, each None where there is nothing to do or the cosine is meant.

    name: cosine or euclidean (minus the distance) of the backbone's embeddings, or learned, the loss's own last layer
    and score. None: learned where the loss has it, otherwise cosine.
    """
    if name == "cosine":
        return None, None
    if name == "euclidean":
        return None, minus_distance
    if name == "learned" and not (criterion.score or criterion.has_projection):
        raise ValueError(f"--metric learned: {criterion.spec} learned no metric; use cosine or euclidean")
    if not criterion.score:
        return criterion.project, None
    device = next(criterion.parameters()).device

    def similarity(a, b):
        return criterion.score(a.to(device), b.to(device)).cpu()
    return criterion.project, similarity


def minus_distance(a, b):
    return -(a.double() - b.double()).norm(dim=-1)


def score(a, b, similarity=None):
    """Scores (...) float64 of the embeddings a and b (..., D), row by row.

    similarity maps two arrays of embeddings (..., D) to (...); None is the cosine of unit embeddings.
    """
    scores = (a.double() * b.double()).sum(-1) if similarity is None else similarity(a, b)
    return scores.detach().double().numpy()


def centroids(z, labels, classes):
    """Unit mean embedding (classes, D) of each class of unit embeddings z (N, D); zero for absent classes."""
    sums = z.new_zeros(classes, z.shape[1])
    return F.normalize(sums.index_add_(0, torch.from_numpy(labels), z))


@torch.no_grad()
def closed_set(net, criterion, probes, train, classes, per_centroid=8):
    """(top-1, top-5) accuracy in 0..1 of probes, an ImageSet.

    By the loss's logits without margin where it has class weights, otherwise by the nearest centroid of up to
    per_centroid images a person of train, an ImageSet.
    """
    k = min(5, classes)
    if criterion.weight is not None:
        z = embed(net, probes.images, unit=False, rows=probes.rows)
        device = criterion.weight.device
        ranked = torch.cat([criterion.top(part.to(device), k).cpu() for part in z.split(1024)])
    else:
        people = data.rows_of_people(train.labels, train.rows)
        few = np.concatenate([rows[:per_centroid] for rows in people])
        z = embed(net, train.images, criterion.project, rows=few)
        centres = centroids(z, train.labels[few], classes)
        z = embed(net, probes.images, criterion.project, rows=probes.rows)
        _, ranked = search(centres.numpy(), z, k)
    hits = np.asarray(ranked) == probes.labels[probes.rows][:, None]        # (N, k)
    return float(hits[:, 0].mean()), float(hits.any(1).mean())


# ---- Search: the nearest of a gallery ----------------------------------------------------------------------------

@torch.no_grad()
def search(gallery, probes, k=5, block=4096, similarity=None):
    """The k best rows of gallery (N, D) for each of probes (P, D): (scores (P, k) float32, row numbers (P, k)).

    Best first, equal scores by row number; k is N if N is less. Exact: all inner products are computed, or
    similarity(probe (D,), gallery (n, D)) -> (n,). gallery is an array or memory map in float32 or float16. In memory
    are no more than `block` of its rows and their scores for 1,024 probes.
    """
    if len(probes) > 1024:                                  # their scores of one block would be too many
        parts = torch.as_tensor(probes).split(1024)
        scores, rows = zip(*[search(gallery, part, k, block, similarity) for part in parts])
        return np.concatenate(scores), np.concatenate(rows)
    probes = torch.as_tensor(probes).float()
    k = min(k, len(gallery))
    block = max(block, k)
    best = np.empty((len(probes), 0), np.float32)           # (P, k) from the first block on, as best_rows
    best_rows = np.empty((len(probes), 0), np.int64)
    progress = data.Progress("searching", len(gallery), "embeddings")
    for start in range(0, len(gallery), block):
        g = torch.from_numpy(np.array(gallery[start:start + block], np.float32))
        if similarity is None:
            scores = probes @ g.T                           # (P, n)
        else:
            scores = torch.stack([similarity(p, g) for p in probes]).float()
        if start == 0:                                      # just below the k-th best: all that equal it enter
            kth_best = scores.topk(k)[0][:, -1:]
            floor = torch.nextafter(kth_best, torch.tensor(-np.inf))
        hopeful = torch.nonzero(scores.amax(1) > floor[:, 0]).flatten()     # few probes, after the first blocks
        i, column = torch.nonzero(scores[hopeful] > floor[hopeful], as_tuple=True)
        # The best so far and the candidates behind them, sorted by probe, then the highest score, then the row.
        probe = np.append(np.repeat(np.arange(len(probes)), best.shape[1]), hopeful[i])
        value = np.append(best, scores[hopeful[i], column])
        row = np.append(best_rows, column + start)
        order = np.lexsort((row, -value, probe))
        first = np.searchsorted(probe[order], np.arange(len(probes)))
        keep = order[first[:, None] + np.arange(k)]         # (P, k)
        best, best_rows = value[keep], row[keep]
        floor = torch.from_numpy(best[:, -1:])              # only a higher score can enter from here on
        if isinstance(gallery, np.memmap):
            data.release_pages(gallery)
        progress.update(start + len(g))
    return best, best_rows


# ---- The one evaluation ------------------------------------------------------------------------------------------

class Scores(NamedTuple):
    """Scored pairs: labels (n,) of 0/1 or None, scores (n,), digest by pairs_digest() or None where not known."""
    labels: np.ndarray | None
    scores: np.ndarray
    digest: str | None


class Evaluation(NamedTuple):
    """What evaluate() found."""
    metrics: dict               # of eer.report() for val_pairs; dev_acc1, dev_acc5, test_acc1, test_acc5 in 0..1
    scores: dict                # Scores of val_pairs and test_pairs
    embeddings: dict            # of the images of val_pairs and test_pairs, (N, D) each


def evaluate(net, criterion, sets, classes, metric=None, mirror="mean", per_centroid=8):
    """Used by train.py after each epoch and by verify.py, so that both give the same numbers.

    sets maps train, dev and test to data.ImageSet, val_pairs and test_pairs to data.PairSet; any may be missing.
    per_centroid: training images a person, at most, where the loss has no class weights to compare dev with.
    """
    net = models.fold(net)                                  # once for all sets
    metrics, scores, embeddings = {}, {}, {}
    for name in ("val_pairs", "test_pairs"):
        if name in sets:
            scores[name], embeddings[name] = score_pairs(net, criterion, sets[name], metric, mirror)
    if "val_pairs" in sets:
        metrics = eer.report(scores["val_pairs"].labels, scores["val_pairs"].scores)
    for name in ("dev", "test"):
        if name in sets:
            top1, top5 = closed_set(net, criterion, sets[name], sets.get("train"), classes, per_centroid)
            metrics.update({f"{name}_acc1": top1, f"{name}_acc5": top5})
    return Evaluation(metrics, scores, embeddings)


def score_pairs(net, criterion, pair_set, metric=None, mirror="mean"):
    """(Scores, embeddings (N, D)) of a data.PairSet."""
    images, pairs = pair_set
    project, similarity = metric_of(criterion, metric)
    z = embed(net, images, project, mirror)
    scores = score(z[pairs.left], z[pairs.right], similarity)
    return Scores(pairs.labels, scores, pairs_digest(pairs)), z


def pairs_digest(pairs):
    """A digest of which images (folder and file) are paired in which order, wherever the set lies."""
    names = ["/".join(Path(file).parts[-2:]) for file in pairs.files]
    paired = [names[i] for i in np.append(pairs.left, pairs.right)]
    return hashlib.sha256(os.fsencode("\n".join(paired))).hexdigest()[:16]


# ---- From Python: the Verifier -----------------------------------------------------------------------------------

class Verifier:
    """A trained model to use in one's own program.

        verifier = verify.Verifier("best.pt")
        z = verifier.embed(["one.jpg", "two.jpg"])          # (2, D)
        verifier.score("one.jpg", "two.jpg"), verifier.same("one.jpg", "two.jpg", far=1e-2)

    An image is a path, a PIL image, or a uint8 array (H, W, 3) in RGB or (H, W) in grey, of any size: its central
    square is brought to size pixels as in training. Anything else is a ValueError that names the item. As in
    training the image should show one face, cut out like those that the model has learned from.
    """

    def __init__(self, path="best.pt", device=None):
        """path: a checkpoint of train.py. device: None takes a GPU if there is one."""
        ckpt = load(path)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        net, criterion = build(ckpt, device, path)
        self.path, self.net = path, models.fold(net)
        self.size, self.crop = ckpt["args"]["size"], ckpt["args"]["crop"]
        self.project, self.similarity = metric_of(criterion)
        self.known = validation_scores(ckpt, criterion)

    def embed(self, images):
        """Unit embeddings (N, D) float32 of an image, N = 1, or of a list of N images."""
        if not isinstance(images, (list, tuple)):
            images = [images]
        if not images:
            raise ValueError("an empty list; give one image or more")
        items = [checked_image(i, image) for i, image in enumerate(images)]
        faces = data.Images(items, self.size, None, self.crop)
        return embed(self.net, faces, self.project, quiet=True).numpy()

    def score(self, a, b):
        """How alike a and b are, the higher the more: the cosine in -1..1, or what the loss has learned.

        A float for two images or embeddings (D,); (N,) float64 for two lists of images or arrays of embeddings
        (N, D), row by row. Embeddings are float arrays and may have any length; ValueError if shapes differ.
        """
        a, b = self.embeddings_of(a), self.embeddings_of(b)
        if a.shape != b.shape:
            raise ValueError(f"embeddings of the shapes {tuple(a.shape)} and {tuple(b.shape)}; give as many of both")
        scores = score(a, b, self.similarity)
        return scores if scores.ndim else float(scores)

    def embeddings_of(self, x):
        """Unit embeddings (N, D), or (D,) of a single one, as a tensor."""
        if isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.ndim in (1, 2):
            z = np.array(x, np.float32)
        elif isinstance(x, (list, tuple)):
            z = self.embed(x)
        else:
            z = self.embed(x)[0]
        return F.normalize(torch.from_numpy(z), dim=-1)

    def threshold(self, far=None):
        """Where the validation EER is, or the lowest that keeps the false accept rate far on validation. ValueError
        for far outside 0..1, and for a checkpoint without validation scores."""
        if far is not None and not 0 < far < 1:
            raise ValueError(f"far={far}: a rate lies between 0 and 1; give 1e-3 for one in a thousand")
        if self.known is None:
            raise ValueError(f"{self.path} has no threshold, for it has no validation scores; choose one of your own"
                             " for score()")
        threshold, _ = threshold_of(self.known, far)
        return threshold

    def same(self, a, b, far=None):
        """Whether a and b are of one person: score(a, b) >= threshold(far). bool, or bool (N,)."""
        return self.score(a, b) >= self.threshold(far)


def checked_image(i, image):
    """The i-th image of a list, a path or a PIL image; ValueError if it is none of what Verifier takes."""
    if isinstance(image, (str, os.PathLike)):
        return image
    found = type(image).__name__
    try:
        if isinstance(image, Image.Image):
            image.load()                                    # PIL decodes only here, so a broken file fails here
            if not all(image.size):
                raise ValueError(f"an image of {image.width}x{image.height} pixels")
            return image
        if isinstance(image, np.ndarray):
            found = f"an array {image.shape} of {image.dtype}"
            if image.dtype == np.uint8 and image.ndim > 1 and image.size and image.shape[2:] in ((), (3,)):
                return Image.fromarray(image)
    except Exception as e:                                  # as in data.decode()
        found = " ".join(str(e).split()) or type(e).__name__
    raise ValueError(f"image {i}: {found}; give a path, a PIL image, or a uint8 array (H, W, 3) or (H, W)")


# ---- Files: scores and embeddings --------------------------------------------------------------------------------

def write_csv(path, header, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    data.write(path, text.getvalue())


def write_submission(path, scores, root):
    """A row id,score for each test pair; header and ids are those of the set's sample submission.

    ValueError if there are samples of other lengths only, or a score is not finite.
    """
    header, ids = read_sample(root, len(scores))
    finite = np.isfinite(scores)
    if not finite.all():
        raise ValueError(f"pair {np.argmin(finite)} has a score that is not finite, so {path} is not"
                         " written; the weights diverged: train again with a lower --lr")
    write_csv(path, header, zip(ids, map(repr, scores.tolist())))


def read_sample(root, n):
    """(header, ids) of the sample submission in root that has n rows; without any, ID,Label and 0, 1, 2, ..."""
    others = []
    for sample in sorted(Path(root).glob("*[sS]ample*[sS]ubmission*.csv")):
        rows = list(csv.reader(line for _, line in data.read_lines(sample)))
        if len(rows) == n + 1 and all(len(row) == 2 for row in rows):
            return rows[0], [name for name, _ in rows[1:]]
        others.append(f"{sample}: {max(len(rows) - 1, 0)} rows")
    if others:
        raise ValueError(f"{', '.join(others)}, but there are {n} test pairs; a sample has a header and two columns:"
                         " remove it, or bring the test pairs that belong to it")
    return ["ID", "Label"], range(n)


class Embedded(NamedTuple):
    """Embeddings z (N, D), the files they are of, and the people's names, (N,) or None where not told."""
    z: np.ndarray
    files: list
    names: list | None


def save_embeddings(path, embedded):
    """Write path, in float16 if it ends in .f16.npy, and beside it a .txt with lines of image, tab, name."""
    dtype = np.float16 if path.stem.endswith(".f16") else np.float32
    listing = path.with_suffix(".txt")
    names = embedded.names or [""] * len(embedded.files)
    for name in [*embedded.files, *names]:
        if re.search(r"[\t\r\n]", name):
            raise ValueError(f"{name!r} has a tab or a line break, which {listing} cannot hold; rename it")
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(embedded.z, dtype))
    data.write(path, buffer.getbuffer())
    lines = map("{}\t{}\n".format, embedded.files, names)
    data.write(listing, "".join(lines))


def check_replaceable(path):
    """ValueError if save_embeddings(path) would overwrite files that it has not written itself."""
    listing = path.with_suffix(".txt")
    if not (path.exists() or listing.exists()):
        return
    try:
        rows = len(np.load(data.regular(path), mmap_mode="r"))
        lines = data.regular(listing).read_bytes().split(b"\n")[:-1]
        is_ours = len(lines) == rows and all(b"\t" in line for line in lines)
    except Exception:                                       # as in load_embeddings()
        is_ours = False
    if not is_ours:
        raise ValueError(f"--save-embeddings writes {path} and {listing}, and what lies there is not of that kind;"
                         " give another name")


def load_embeddings(path):
    """Embedded as save_embeddings() wrote it; z stays on the disk, as a memory map of any kind of number."""
    try:
        z = np.load(data.regular(path), mmap_mode="r")
    except OSError:
        raise
    except Exception:                                       # half a dozen kinds, by where the file is broken
        raise ValueError(f"{path}: not what --save-embeddings wrote; save it anew") from None
    if not isinstance(z, np.ndarray) or z.dtype.kind not in "biuf":
        raise ValueError(f"{path}: not an array of numbers; save it anew with --save-embeddings")
    listing = Path(path).with_suffix(".txt")
    rows = [line.partition("\t") for _, line in data.read_lines(listing)]
    if z.ndim != 2 or not 0 < len(z) == len(rows):
        raise ValueError(f"{listing}: {len(rows)} lines, but {path} has the shape {z.shape}; save them anew")
    check_unit_rows(path, z)
    files, _, names = zip(*rows)
    return Embedded(z, files, names if any(names) else None)


def check_unit_rows(path, z, block=4096):
    """ValueError for a row that is not of length 1: one 25 times as long would win every search."""
    for start in range(0, len(z), block):
        lengths = np.linalg.norm(z[start:start + block].astype(np.float64), axis=1)
        wrong = ~(np.abs(lengths - 1) < 0.01)               # so is NaN
        if wrong.any():
            row = np.argmax(wrong)
            raise ValueError(f"{path}: row {start + row} has the length {lengths[row]:.4g}; rows are unit vectors:"
                             " divide each by its length, or save them anew")
        if isinstance(z, np.memmap):
            data.release_pages(z)


def load_or_embed(net, trained, folder, project, mirror, max_unreadable=data.MAX_UNREADABLE):
    """Embedded images of a folder in any layout, of one file, or of a .npy file of save_embeddings().

    trained: the checkpoint's arguments.
    """
    if folder.endswith(".npy"):
        embedded = load_embeddings(folder)
        check_same_model(net, trained, folder, embedded, project, mirror)
        return embedded
    if os.path.isfile(folder):                              # one image
        files, labels, folder = [folder], None, os.path.dirname(folder) or "."
    else:
        skipped = []
        files, labels = data.read_split(folder, skipped)
        if skipped:
            print(f"{folder}: {len(skipped)} skipped, such as {skipped[0]}, {data.why_skipped(skipped[0])}",
                  file=sys.stderr)
    embedded, _ = embed_files(net, trained, folder, files, labels, project, mirror, max_unreadable)
    return embedded


def check_same_model(net, trained, path, embedded, project, mirror):
    """ValueError if the first image, where it is still there, is embedded otherwise than it was saved."""
    file = embedded.files[0]
    if not os.path.isfile(file):
        return
    image = data.Images([file], trained["size"], None, trained["crop"])
    z = embed(net, image, project, mirror, quiet=True).numpy()[0]
    saved = np.asarray(embedded.z[0], np.float32)
    if len(z) == len(saved) and z @ saved < 0.99:
        raise ValueError(f"{path}: saved with another checkpoint, --mirror or --metric, as the embedding of its first"
                         f" image, {file}, tells; save it anew")


def embed_files(net, trained, folder, files, labels, project, mirror, max_unreadable=data.MAX_UNREADABLE):
    """(Embedded, why the unreadable are left out) of a folder's files; labels of each, or None."""
    if not files:
        raise ValueError(f"{folder}: no such folder, or no images in it and its sub-folders; name another")
    cache = data.cache_folder(folder)
    images, rows = data.pack(files, trained["size"], cache, "faces", trained["crop"], max_unreadable)
    z = embed(net, images, project, mirror, rows=rows).numpy()
    names = [str(labels[i]) for i in rows] if labels else None
    return Embedded(z, [files[i] for i in rows], names), list(images.unreadable.values())


def embed_folder(net, criterion, ckpt, args, threshold_from):
    """--save-embeddings of all of --images: a folder in any layout, or a text file that lists files, a line each,
    relative to its own folder. What was left out is listed in FILE.skipped.txt, with the reason."""
    folder, skipped = args.images, []
    if os.path.isfile(folder):
        listing, folder = folder, os.path.dirname(folder) or "."
        files = [os.path.join(folder, line) for _, line in data.read_lines(listing)]
        skipped = [f"{file}: no such file" for file in files if not os.path.isfile(file)]
        files, labels = list(filter(os.path.isfile, files)), None
    else:
        files, labels = data.read_split(folder, skipped)
        skipped = [f"{file}: {data.why_skipped(file)}" for file in skipped]
    project, _ = metric_of(criterion, args.metric)
    embedded, unreadable = embed_files(net, ckpt["args"], folder, files, labels, project, args.mirror, 0.99)
    path = args.save_embeddings
    save_embeddings(path, embedded)
    skipped += unreadable
    text = f"{len(embedded.z)} images of {args.images}: {path}, listed in {path.with_suffix('.txt')}"
    reasons = path.with_suffix(".skipped.txt")
    reasons.unlink(missing_ok=True)                         # of an earlier time
    if skipped:
        data.write(reasons, "\n".join(skipped) + "\n")
        text += f"; {len(skipped)} skipped, see {reasons}"
    return Outcome(dict(images=len(embedded.z), skipped=skipped), text, {})


# ---- Files: the model for other programs -------------------------------------------------------------------------

def export(net, project, size, mirror="mean"):
    """A torch.export program of a model on the CPU: uint8 (B, size, size, 3), any B -> unit embeddings (B, D) float32.

    Embedder with all its parts, batch norms folded. Whoever loads it needs torch alone.
    """
    embedder = Embedder(models.fold(net).cpu(), project, mirror)
    images = torch.zeros(2, size, size, 3, dtype=torch.uint8)       # of 1 image, B would not stay free
    with torch.no_grad():
        return torch.export.export(embedder, (images,), dynamic_shapes=({0: torch.export.Dim("B")},))


def export_checkpoint(net, criterion, ckpt, args, threshold_from):
    """Write --export, and say how to use it."""
    net, criterion = net.cpu().requires_grad_(False), criterion.cpu().requires_grad_(False)
    project, similarity = metric_of(criterion, args.metric)
    size, buffer = ckpt["args"]["size"], io.BytesIO()
    torch.export.save(export(net, project, size, args.mirror), buffer)
    data.write(args.export, buffer.getbuffer())
    known = threshold_scores(net, criterion, ckpt, args, threshold_from)
    threshold, why = threshold_of(known, args.far)
    text = (f"{args.export}: uint8 (B, {size}, {size}, 3) -> unit embeddings (B, D), with"
            f" torch.export.load('{args.export}').module()\nthreshold {threshold:.4f}, {why}")
    if ckpt["args"]["crop"] < 1:
        text += f"\ncut images to the inner {ckpt['args']['crop']:g} of their side first: --crop is not in the program"
    if similarity:
        text += f"\nthe threshold is not of cosines: the score of {criterion.spec} is no part of the program"
    return Outcome(dict(size=size, threshold=threshold), text, {})


# ---- Decisions: the threshold ------------------------------------------------------------------------------------

def threshold_scores(net, criterion, ckpt, args, threshold_from):
    """Scores that a threshold is chosen on: of threshold_from, a list of pairs or another checkpoint of the same loss,
    otherwise of the checkpoint's validation pairs. None where the checkpoint has no scores of this metric."""
    if threshold_from and threshold_from.endswith(".pt"):
        loss = ckpt["args"]["loss"]
        ckpt = load(threshold_from)
        if ckpt["args"]["loss"] != loss:                    # not the spec: s and m may differ with the people
            raise ValueError(f"{threshold_from} is of --loss {ckpt['args']['loss']}, whose scores are others; name one"
                             " of the same loss")
    elif threshold_from:
        folder = args.images or "."
        pairs = data.read_pairs(threshold_from, folder)
        if pairs.labels is None:
            raise ValueError(f"{threshold_from}: pairs without labels; a threshold needs 0 or 1 in each line")
        pair_set = pack_pairs(pairs, ckpt["args"], data.cache_folder(folder), "threshold_pairs")
        scores, _ = score_pairs(net, criterion, pair_set, args.metric, args.mirror)
        return scores
    return validation_scores(ckpt, criterion, args.metric, args.mirror)


def validation_scores(ckpt, criterion, metric=None, mirror="mean"):
    """Scores of a checkpoint's validation pairs; None where it has none of this metric."""
    val = ckpt.get("val")
    if not val or mirror != "mean":
        return None
    stored = Scores(val["labels"].numpy(), val["scores"].numpy(), val.get("mark"))
    learned = criterion.score or criterion.has_projection
    if metric in (None, "learned" if learned else "cosine"):
        return stored
    if metric == "euclidean" and not learned:               # of unit vectors: the cosine tells it
        return stored._replace(scores=-np.sqrt(np.maximum(2 - 2 * stored.scores, 0)))
    return None


def threshold_of(known, far):
    """(threshold, why) from threshold_scores(): the EER's, or with far the lowest that keeps that false accept rate."""
    if known is None:
        return -np.inf, ("the checkpoint has no threshold: only the best.pt of a run with validation pairs has, for the"
                         " metric that it was trained with; give --threshold-from")
    labels, scores, _ = known
    if not far:
        rate, threshold = eer.eer(labels, scores)
        return threshold, f"where the EER is {eer.percent(rate)}"
    why = f"for FAR {far:g}"
    impostors = int((labels == 0).sum())
    if far * impostors < 1:
        why += f"; {impostors} impostor pairs cannot tell so low a rate, it lies above them all"
    return eer.at_far(labels, scores, far), why


def metrics_at(known, judged, far):
    """(metrics, text) of judged Scores at the threshold that known Scores choose: the most accurate, or with far the
    lowest that keeps that false accept rate."""
    labels, scores, _ = known
    threshold = eer.at_far(labels, scores, far) if far else eer.best_threshold(labels, scores)
    labels, scores, _ = judged
    far, tar = eer.rates(*eer.split(labels, scores), threshold)
    accuracy = np.mean((scores >= threshold) == (labels == 1))
    text = (f"at threshold {threshold:.4f} of --threshold-from: accuracy {eer.percent(accuracy)},"
            f" FAR {eer.percent(far)}, FRR {eer.percent(1 - tar)}")
    return dict(threshold=threshold, acc=accuracy, far=far, frr=1 - tar), text


# ---- Decisions: two images ---------------------------------------------------------------------------------------

def compare_images(net, criterion, ckpt, args, threshold_from):
    """The score of two image files, the decision, and how many validation pairs lie beyond such a score."""
    images = data.Images(args.files, ckpt["args"]["size"], None, ckpt["args"]["crop"])
    pair = data.Pairs(args.files, np.array([0]), np.array([1]), None)
    scored, _ = score_pairs(net, criterion, data.PairSet(images, pair), args.metric, args.mirror)
    score = float(scored.scores[0])
    known = threshold_scores(net, criterion, ckpt, args, threshold_from)
    threshold, why = threshold_of(known, args.far)
    if known is None:
        return Outcome(dict(score=score), f"score {score:.4f}; {why}", {})
    genuine, impostor = eer.split(known.labels, known.scores)
    source = threshold_from or "validation"
    same, lower, higher = score >= threshold, np.mean(genuine < score), np.mean(impostor >= score)
    answer = "same person" if same else "different people"
    result = dict(score=score, same=same, threshold=threshold, genuine_lower=lower, impostor_higher=higher)
    text = (f"score {score:.4f}: {answer} (threshold {threshold:.4f}, {why})\n"
            f"of a hundred genuine pairs of {source} {100 * lower:.3g} score lower, of a hundred impostor pairs"
            f" {100 * higher:.3g} as high or higher ({len(genuine)} and {len(impostor)} pairs)")
    folders = {Path(os.path.abspath(file)).parent.name for file in args.files}
    for name in sorted(folders & trained_people(ckpt)):
        text += f"\nnote: the network was trained on images of {name}: such a score says little about new people"
    return Outcome(result, text, {})


# ---- Decisions: one among many -----------------------------------------------------------------------------------

def identify(net, criterion, ckpt, args, threshold_from):
    """The best match of each probe in the gallery, or none. Writes --out and its scores, and ranks.png with --plots."""
    # Embed the gallery and the probes.
    project, similarity = metric_of(criterion, args.metric)
    gallery = load_or_embed(net, ckpt["args"], args.gallery, project, args.mirror)
    if args.save_embeddings:
        save_embeddings(args.save_embeddings, gallery)
    if not args.probes:
        text = f"{len(gallery.z)} images of {args.gallery}: {args.save_embeddings or 'give --probes'}"
        return Outcome(dict(images=len(gallery.z)), text, {})
    calibration = threshold_scores(net, criterion, ckpt, args, threshold_from)
    if calibration is None:
        raise ValueError(f"--probes: {threshold_of(None, None)[1]}")
    people = one_per_person(gallery, args.pool)
    probes = load_or_embed(net, ckpt["args"], args.probes, project, args.mirror, 0)     # ids are numbers of images
    if people.z.shape[1] != probes.z.shape[1]:
        raise ValueError(f"{args.gallery}: {people.z.shape[1]} numbers an embedding, but the probes have"
                         f" {probes.z.shape[1]}; save it anew with this checkpoint")
    if not probes.names and os.path.isdir(args.probes):
        probes = probes._replace(names=probe_labels(Path(args.probes), len(probes.files)))

    # The five best matches of each probe, and nobody below the threshold.
    _, rows_of_each = np.unique(people.names, return_counts=True)
    k = 4 * rows_of_each.max() + 1                          # among so many rows are five people
    scores, found_rows = search(people.z, np.array(probes.z, np.float32), k, similarity=similarity)
    scores, found_rows = best_of_people(people.names, scores, found_rows)   # (P, 5)
    threshold, why = search_threshold(calibration, args.far or 0.01, len(people.names))
    best = scores[:, 0]
    accepted = best >= threshold
    predicted = people.names[found_rows]                    # (P, 5)

    # Write who was found, a row a probe.
    answers = np.where(accepted, predicted[:, 0], NOBODY)
    out = Path(args.out)
    write_csv(out, ["id", "label"], enumerate(answers))
    entries, lines, rows = [], [], []
    for i, file in enumerate(probes.files):
        match = str(answers[i]) if accepted[i] else None
        entries.append(dict(image=file, match=match, score=float(best[i]), nearest=predicted[i].tolist()))
        lines.append(f"{file}  {match or 'no match'}  {best[i]:.4f}")
        second = "", ""                                     # where the gallery has one person
        if predicted.shape[1] > 1:
            second = predicted[i, 1], scores[i, 1]
        rows.append([file, answers[i], best[i], *second])
    out_scores = out.with_name(f"{out.stem}_scores.csv")
    write_csv(out_scores, ["file", "label", "score", "second", "second_score"], rows)
    result = dict(threshold=threshold, probes=entries)
    compared = "the means of a person's images" if args.pool == "mean" else "each single image"
    lines.append(f"{len(answers)} probes among {len(set(people.names))} people, compared with {compared}: {out},"
                 f" {out_scores}\nthreshold {threshold:.4f}, {why}")

    # Where the probes' people are known: how often it was right.
    if probes.names:
        hits = predicted == np.array(probes.names)[:, None]
        mated = np.isin(probes.names, people.names)
        rates = identification(best, hits, mated)
        rates["accuracy"] = np.mean(np.where(mated, hits[:, 0] & accepted, ~accepted))
        result.update(rates)
        shown = [f"{name} {v if isinstance(v, int) else eer.percent(v)}" for name, v in rates.items()]
        lines.append("   ".join(shown))
        lines += note_trained(ckpt, np.array(probes.names), mated, hits[:, 0])
    if args.plots:
        draw_ranks(args.plots / "ranks.png", probes, people, scores, found_rows, answers)
    return Outcome(result, "\n".join(lines), {})


def trained_people(ckpt):
    """The names of the people that a network was trained on, but for numbers, which are alike in all sets."""
    return {name for name in ckpt["names"] if not name.isdecimal()}


def note_trained(ckpt, names, mated, hits):
    """A line if some of the mated probes show people that the network was trained on."""
    trained = mated & np.isin(names, list(trained_people(ckpt)))
    if not trained.any():
        return []
    line = f"note: {trained.sum()} of the {mated.sum()} mated probes show people that the network was trained on"
    others = mated & ~trained
    if others.any():
        line += f"; of the {others.sum()} others rank1 is {eer.percent(np.mean(hits[others]))}"
    return [line]


def search_threshold(known, far, size):
    """(threshold, why) that leaves a stranger a chance of far to find anybody in a gallery of size rows.

    It takes his comparisons for independent: each may accept him at a rate of 1 - (1 - far)^(1/size), for which
    threshold_of() asks the scores of known impostors. This is an approximation: those are of single pairs, and the
    mean of a person's images scores somewhat higher with strangers, too.
    """
    per_pair = -np.expm1(np.log1p(-far) / size)             # exact for small rates
    threshold, why = threshold_of(known, per_pair)
    impostors = int((known.labels == 0).sum())
    if per_pair * impostors < 1:                            # a stranger may lie above them all, too
        why += f", so a stranger may find somebody at a rate of {1 - (1 - 1 / (impostors + 1)) ** size:.2g}"
    return threshold, (f"that a stranger finds anybody at a rate of {far:g}: in each comparison"
                       f" 1 - (1 - {far:g})^(1/{size}) = {per_pair:.3g}; {why}")


def best_of_people(names, scores, rows, k=5):
    """(scores, rows), (P, k) each, of the best row of each of the k best people; k is their number if that is less."""
    k, keep = min(k, len(set(names))), []
    for found in rows:
        _, first = np.unique(names[found], return_index=True)               # where each person's best row stands
        keep.append(np.sort(first)[:k])
    return np.take_along_axis(scores, np.array(keep), 1), np.take_along_axis(rows, np.array(keep), 1)


def one_per_person(gallery, pool):
    """Embedded, for each person, the mean of his images, and the first of his files; names as an array. With pool
    "none" the gallery's images as they are.

    Images without names are each a person of their own, named after the file, with its path where two are alike.
    """
    names = gallery.names
    if names is None:
        names = [Path(file).stem for file in gallery.files]
        if len(set(names)) < len(names):
            names = gallery.files
    people, first, labels = np.unique(names, return_index=True, return_inverse=True)
    if pool == "none" or len(people) == len(names):         # as it is, for it may be larger than memory
        return gallery._replace(names=np.array(names))
    z = torch.from_numpy(np.array(gallery.z, np.float32))
    z = centroids(z, labels, len(people)).numpy()
    return Embedded(z, [gallery.files[i] for i in first], people)


def probe_labels(folder, n):
    """Who the n images of a flat folder are, where the older Kaggle's CSV beside it tells; never for a test folder."""
    for path in (folder.with_name("verification_dev.csv"), folder.with_name("dev_identities.csv")):
        if not path.is_file() or "test" in folder.name:
            continue
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            labels = [row.get("label") for row in csv.DictReader(file)]
        if len(labels) != n or None in labels:
            raise ValueError(f"{path}: {len(labels)} rows for the {n} images of {folder}; it takes a column label"
                             " and a row for each image, in the order of their names")
        return labels
    return None


def identification(scores, hits, mated):
    """Rates in 0..1 of a search (Phillips, Grother and Micheals 2011).

    scores (P,) of the best match; hits (P, k), whether match k is right; mated (P,), whether that person is in the
    gallery. rank1, rank5: of the mated probes. 'dir@far=1e-2' and its like, detection and identification rate: the
    mated probes whose first match is right and above the threshold that a share far of the others exceeds; NaN where
    fewer than 1/far others cannot tell.
    """
    unmated = int((~mated).sum())
    if not mated.any():
        return dict(mated=0, unmated=unmated)
    first = hits[mated, 0]
    rates = dict(rank1=first.mean(), rank5=hits[mated, :5].any(1).mean(), mated=int(mated.sum()), unmated=unmated)
    for name in eer.FARS[1:]:
        far, rate = float(name), np.nan
        if far * unmated >= 1:
            rate = np.mean(first & (scores[mated] >= eer.at_far(mated, scores, far)))
        rates[f"dir@far={name}"] = rate
    return rates


# ---- Pictures and tables -----------------------------------------------------------------------------------------

def draw_scores(folder, scores_of):
    """roc.png, with the DET curve, and scores.png of {name: Scores}."""
    roc, det, histograms = {}, {}, []
    for colour, (name, (labels, scores, _)) in enumerate(scores_of.items()):
        rate, threshold = eer.eer(labels, scores)
        far, tar, _ = eer.roc(labels, scores)
        curve, point = f"{name}, EER {eer.percent(rate)}", f"_{name}"
        roc[curve] = 100 * far, 100 * tar, "line", colour
        det[curve] = 100 * far, 100 * (1 - tar), "line", colour
        roc[point] = [100 * rate], [100 * (1 - rate)], "points", colour
        det[point] = [100 * rate], [100 * rate], "points", colour
        histograms.append((name, "score", "% of the pairs", histogram(labels, scores, threshold)))
    data.plot(folder / "roc.png", [
        ("ROC; dot: equal error rate", "false accept rate, %", "true accept rate, %", roc, "logx"),
        ("DET; dot: equal error rate", "false accept rate, %", "false reject rate, %", det, "logx logy")], 480, 360)
    data.plot(folder / "scores.png", histograms)


def histogram(labels, scores, threshold):
    """The series of scores.png: percent of the impostor and of the genuine pairs, and the threshold."""
    edges = np.linspace(scores.min(), scores.max() + 1e-9, 41)
    genuine, impostor = eer.split(labels, scores)
    genuine = 100 * np.histogram(genuine, edges)[0] / len(genuine)
    impostor = 100 * np.histogram(impostor, edges)[0] / len(impostor)
    top = max(genuine.max(), impostor.max())
    return {"impostor": (edges, impostor, "bars", 1), "genuine": (edges, genuine, "bars", 0),
            f"threshold {threshold:.3f}": ([threshold, threshold], [0, top], "line", 3)}


def draw_hardest(folder, pair_set, scores, threshold):
    """hardest.png: the impostor pairs of highest and the genuine pairs of lowest score, framed where they are on the
    wrong side of the threshold; and scores.csv of all pairs."""
    images, pairs = pair_set
    genuine = pairs.labels == 1
    wrong = (scores >= threshold) != genuine

    def tile(i):
        ends = [pairs.left[i], pairs.right[i]]
        left, right = images[ends]
        gap = np.full_like(left, 255)[:, :images.size // 24 + 1]
        names = "\n".join(Path(pairs.files[end]).stem for end in ends)
        return np.concatenate([left, gap, right], 1), f"{scores[i]:.3f}\n{names}", RED if wrong[i] else None

    def section(title, chosen, error, ranked):
        heading = f"{title}: {wrong[chosen].sum()} of {chosen.sum()} are {error}"
        return heading, 4, [tile(i) for i in ranked[chosen[ranked]][:8]]

    order = np.argsort(scores, kind="stable")
    data.sheet(folder / "hardest.png", f"The hardest pairs; framed: errors at threshold {threshold:.4f}", [
        section("two people, most alike", ~genuine, "accepted", order[::-1]),
        section("one person, least alike", genuine, "rejected", order)])
    write_csv(folder / "scores.csv", ["label", "score"], zip(pairs.labels, map(repr, scores.tolist())))


def draw_ranks(path, probes, people, scores, found, answers):
    """Eight probes, each with the people found (P, k) for it and their scores (P, k). Of the answers (P,) only errors
    are framed: a wrong name, and the right one where it is not the answer."""
    heading, tiles = "the first is the answer unless 'no match'", []
    if probes.names:
        heading += "; framed: a wrong answer, or the right person where not the answer"
    for i in np.unique(np.linspace(0, len(probes.files) - 1, 8).astype(int)):
        file = probes.files[i]
        truth = probes.names[i] if probes.names else None
        tiles.append((data.decode(file, 112), f"probe\n{truth or Path(file).stem}", None))
        verdict = ", no match" if answers[i] == NOBODY else ""
        for person, score in zip(found[i], scores[i]):
            name = people.names[person]
            wrong = truth and (name == answers[i]) != (name == truth)
            colour = RED if wrong else None
            tiles.append((data.decode(people.files[person], 112), f"{score:.3f}{verdict}\n{name}", colour))
            verdict = ""
    title = "Probes and the five nearest of the gallery"
    data.sheet(path, title, [(heading, 1 + found.shape[1], tiles)])


def embedding_panel(net, criterion, train):
    """(chart, collapse()) of the 2-D embeddings of the first ten people's training images, class weights as rays."""
    rows = train.rows[train.labels[train.rows] < 10][:2000]
    labels, weight = train.labels[rows], None
    people = np.unique(labels)
    z = embed(net, train.images, mirror="none", unit=False, rows=rows).numpy()
    radius, series = np.linalg.norm(z, axis=1).max(), {}
    if criterion.weight is not None:
        weight = criterion.weight[people].detach().cpu().numpy()
    for i, c in enumerate(people):
        if weight is not None:
            x, y = weight[i] / np.linalg.norm(weight[i]) * radius
            series[f"_ray {c}"] = [0, x], [0, y], "line", c
        x, y = z[labels == c].T
        series[f"_{c}"] = x, y, "points", c
    chart = criterion.spec, "first number of the embedding", "second", series, "equal"
    return chart, collapse(z, labels, weight)


def collapse(z, labels, weight=None):
    """Neural collapse (Papyan, Han, Donoho 2020, 2008.08186) of embeddings z (N, D) of C people; all tend to 0.

    nc1: the scatter within people over that between them, tr(S_within pinv(S_between)) / C. nc2: how far the cosines
    of the centred means are from -1 / (C - 1), on average. nc3: |W/|W| - M/|M||^2 of the weight (C, D) and the means.
    """
    people, number = np.unique(labels, return_inverse=True)
    means = np.stack([z[labels == c].mean(0) for c in people])
    centred = means - means.mean(0)
    within = z - means[number]
    between = centred.T @ centred / len(people)
    nc1 = np.trace(within.T @ within / len(z) @ np.linalg.pinv(between)) / len(people)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(len(people), dtype=bool)]
    numbers = dict(nc1=float(nc1), nc2=float(np.mean(np.abs(cosines + 1 / (len(people) - 1)))))
    if weight is not None:
        difference = weight / np.linalg.norm(weight) - centred / np.linalg.norm(centred)
        numbers["nc3"] = float(np.sum(difference ** 2))
    return numbers


def compare(folders):
    """Runs of train.py, lowest validation EER first, with every argument in which they differ: (result, table)."""
    found = []
    for folder in map(Path, folders):
        try:
            found.append(summary(folder))
        except (ValueError, OSError) as e:
            print("left out:", e, file=sys.stderr)
    if not found:
        raise ValueError(f"{' '.join(folders)}: no run of train.py with a best.pt and a log.csv; name runs/*")
    found.sort(key=lambda run_and_args: np.nan_to_num(run_and_args[0]["EER"], nan=2))
    runs, arguments = zip(*found)
    names = {name for args in arguments for name in args} - {"arch", "loss", "out", "resume"}
    for name in sorted(names):
        values = [str(args.get(name)) for args in arguments]
        if len(set(values)) > 1:
            for run, value in zip(runs, values):
                run[f"--{name.replace('_', '-')}"] = value
    shown = {float: eer.percent, int: "{:,}".format, str: str}
    rows = [[shown[type(value)](value) for value in run.values()] for run in runs]
    return {"runs": runs}, eer.table([list(runs[0]), *rows])


def summary(folder):
    """What compare() tells of a run, and its arguments; ValueError or OSError where a file is missing or unfit."""
    ckpt = load(folder / "best.pt")
    log = read_log(folder)
    net, criterion = build(ckpt, path=folder / "best.pt")
    val, metrics = ckpt.get("val"), {"eer": np.nan, "tar@far=1e-2": np.nan}
    if val:
        metrics = eer.report(val["labels"].numpy(), val["scores"].numpy())
    try:
        row = {int(row["step"]): row for row in log}[ckpt["step"]]
        run = {"run": str(folder), "loss": criterion.spec, "arch": ckpt["args"]["arch"], "epochs": len(log),
               "EER": metrics["eer"], "TAR at FAR 1e-2": metrics["tar@far=1e-2"],
               "accuracy on dev": float(row["acc"]), "seconds": round(float(log[-1]["seconds"])),
               "images seen": images_seen(ckpt),
               "parameters": sum(p.numel() for p in [*net.parameters(), *criterion.parameters()])}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder}: log.csv lacks the step of best.pt or a column, or has no number there") from None
    return run, ckpt["args"]


def read_log(folder):
    with open(data.regular(folder / "log.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def images_seen(ckpt):
    """By a checkpoint's backbone in all; an older one knows of its own run only."""
    return ckpt.get("seen", ckpt.get("step", 0) * (ckpt["args"].get("batch_size") or 0))


def identity_of(path, ckpt):
    """(for --json, a line) which model a checkpoint is. best.pt is often a link: the run's own folder is named."""
    path = Path(os.path.realpath(path))                     # Path.resolve() fails on a link to itself
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    step, epoch = ckpt.get("step"), None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):         # a checkpoint may stand alone
        epoch = {int(row["step"]): int(row["epoch"]) for row in read_log(path.parent)}.get(step)
    told = dict(run=str(path.parent), file=path.name, epoch=epoch, step=step, loss=ckpt["spec"],
                arch=ckpt["args"]["arch"], date=date)
    where = f"step {step}" if epoch is None else f"epoch {epoch}, step {step}"
    return told, f"{path}: {where}, {told['loss']}, {told['arch']}, {date}"


# ---- Command line: one checkpoint or file of scores --------------------------------------------------------------

class Outcome(NamedTuple):
    """What is said about a checkpoint or a file of scores, and what is left to draw and to write."""
    result: dict                        # for --json
    text: str
    scores: dict                        # Scores of val_pairs and test_pairs; threshold, those of --threshold-from
    faces: data.FaceSet = None
    panel: tuple = None                 # of embedding_panel()


def outcome_of(path, args, threshold_from):
    """The Outcome of a checkpoint, or of a CSV file of label,score."""
    if holds_scores(path):
        return describe({"val_pairs": Scores(*eer.read(path), None)}, None)
    ckpt = load(path)
    net, criterion = build(ckpt, args.device, path)
    if args.mirror == "concat" and criterion.score and args.metric in (None, "learned"):
        raise ValueError(f"--mirror concat: {criterion.spec} learned a metric of single embeddings; use mean")
    answer = evaluate_checkpoint
    if args.export:
        answer = export_checkpoint
    elif args.files:
        answer = compare_images
    elif args.gallery:
        answer = identify
    elif embeds_folder(args):
        answer = embed_folder
    outcome = answer(models.fold(net), criterion, ckpt, args, threshold_from)   # all take the same arguments
    told, line = identity_of(path, ckpt)
    return outcome._replace(result={"checkpoint": told, **outcome.result}, text=f"{line}\n{outcome.text}")


def describe(scores, far, folds=None):
    """The Outcome of the val_pairs of {name: Scores}: eer.report(), LFW's accuracy over folds, and what holds at the
    threshold that the Scores named threshold choose, if there are any."""
    judged, known = scores["val_pairs"], scores.get("threshold")
    result = eer.report(judged.labels, judged.scores)
    text = eer.show(result)
    if folds is not None:
        mean, error = eer.folds_accuracy(judged.labels, judged.scores, folds)
        result.update(folds_acc=mean, folds_error=error)
        text += (f"\naccuracy over {len(set(folds))} folds {100 * mean:.2f} +- {100 * error:.2f} %"
                 " (standard error; each at the threshold that is best on the others)")
    if known:
        result["threshold_from"], line = metrics_at(known, judged, far)
        text += f"\n{line}"
    return Outcome(result, text, scores)


def evaluate_checkpoint(net, criterion, ckpt, args, threshold_from):
    """A checkpoint on a list of pairs, or on all that its own or another data set has."""
    faces, panel = find_faces(args, ckpt["args"]), None
    if threshold_from and not faces.val_pairs:
        raise ValueError("--threshold-from: does nothing for pairs without labels; leave it out")
    if faces.test_pairs and len(args.ckpt) == 1:
        check_writable(args.out or "submission.csv")
    draws_panel = args.plots and ckpt["args"]["dim"] == 2
    names = ["val_pairs", "test_pairs"]
    if same_people(faces, ckpt):
        names += ["dev", "test"]
        if draws_panel or criterion.weight is None:
            names.append("train")
    sets = pack_sets(faces, names, ckpt["args"])
    metrics, scores, embeddings = evaluate(net, criterion, sets, len(ckpt["names"]), args.metric, args.mirror)
    if args.save_embeddings:
        files = [file for name in embeddings for file in sets[name].pairs.files]
        z = torch.cat(list(embeddings.values()))
        save_embeddings(args.save_embeddings, Embedded(z, files, None))
    result, lines = {}, [faces.note]
    are_drawn = faces.val_pairs is not None and faces.val_pairs.path is None
    digest_then = ckpt.get("data_digest")
    if are_drawn and digest_then and not args.data and digest_then != data.set_digest(faces):
        lines.append(f"note: {faces.root} has changed since training: others may be held out now, and the network may"
                     " have been trained on them")
    if draws_panel and "train" in sets:
        panel, numbers = embedding_panel(net, criterion, sets["train"])
        result.update(numbers)
        lines.append("neural collapse of the training embeddings drawn (0: complete):\n    "
                     + "   ".join(f"{name} {value:.3g}" for name, value in numbers.items()))
    if "val_pairs" in sets:
        if threshold_from:
            scores["threshold"] = threshold_scores(net, criterion, ckpt, args, threshold_from)
            if scores["threshold"] is None:
                raise ValueError(f"{threshold_from}: no validation scores of this metric; name another best.pt")
        described = describe(scores, args.far, faces.val_pairs.folds)
        result.update(described.result)
        lines += [str(faces.val_pairs.path or ""), described.text]
        if args.plots and len(args.ckpt) == 1:
            draw_hardest(args.plots, sets["val_pairs"], scores["val_pairs"].scores, result["threshold"])
    result.update(metrics)
    for name in ("dev", "test"):
        if name in sets:
            top1, top5 = result[f"{name}_acc1"], result[f"{name}_acc5"]
            lines.append(f"{name}, closed set: top-1 {eer.percent(top1)}, top-5 {eer.percent(top5)}")
    if "eer" in result and "dev_acc1" in result:
        result["combined"] = 0.5 * result["dev_acc1"] + 0.5 * (1 - result["eer"])
        lines.append(f"combined score, 0.5 top-1 on dev + 0.5 (1 - EER): {result['combined']:.4f}")
    return Outcome(result, "\n".join(filter(None, lines)), scores, faces, panel)


def same_people(faces, ckpt):
    """Whether the classes of a set are the checkpoint's. Where people are numbers, which are alike in all sets, the
    files tell."""
    if faces.names != ckpt["names"]:
        return False
    if all(name.isdecimal() for name in faces.names) and "data_digest" in ckpt:
        return ckpt["data_digest"] == data.set_digest(faces)
    return True


def find_faces(args, trained):
    """The data.FaceSet to evaluate: --pairs alone, --data, or what a checkpoint's arguments name."""
    if args.pairs:
        folder = args.images or "."
        pairs = data.read_pairs(args.pairs, folder)
        val, test = (None, pairs) if pairs.labels is None else (pairs, None)
        return data.FaceSet(Path(folder), [], None, None, None, val, test, "")
    faces = data.load(args.data or trained["data"], trained["holdout"], trained["seed"])
    if not (faces.val_pairs or faces.test_pairs):
        looked_for = ", ".join([*data.list_names("val_pairs"), *data.list_names("test_pairs")])
        raise ValueError(f"{faces.root}: neither val_pairs nor test_pairs (looked for {looked_for}); give --pairs and"
                         " --images")
    return faces


def pack_sets(faces, names, args):
    """The sets of evaluate(), of a data.FaceSet's parts called names, without those that have no labels to judge by.

    args: a dictionary with size and crop.
    """
    sets, cache = {}, data.cache_folder(faces.root)
    for name in names:
        part = getattr(faces, name)
        if isinstance(part, data.Pairs):
            sets[name] = pack_pairs(part, args, cache, name)
        elif part and part.labels is not None:
            images, rows = data.pack(part.files, args["size"], cache, name, args["crop"])
            sets[name] = data.ImageSet(images, part.labels, rows)
    return sets


def pack_pairs(pairs, args, cache, what):
    images, _ = data.pack(pairs.files, args["size"], cache, what, args["crop"], max_unreadable=0)
    return data.PairSet(images, pairs)


# ---- Command line: all of them -----------------------------------------------------------------------------------

def mean_scores(outcomes, name):
    """The mean of all outcomes' Scores of that name; None where one has none, or has scored other pairs."""
    if not all(name in outcome.scores for outcome in outcomes):
        return None
    labels, scores, digests = zip(*[outcome.scores[name] for outcome in outcomes])
    alike = all(np.array_equal(each, labels[0]) for each in labels)
    if not alike or len(set(digests) - {None}) > 1:         # None: a file of scores does not tell its pairs
        return None
    return Scores(labels[0], np.mean(scores, 0), digests[0])


def short_names(paths):
    """What to call checkpoints and files of scores: file names, but of best.pt and last.pt the run's folder. With more
    of the path where two would be called alike."""
    resolved = [Path(os.path.realpath(path)) for path in paths]
    names = []
    for path in resolved:
        names.append(path.parent.name if path.stem in ("best", "last") else path.stem)
    for length in range(2, 9):
        if len(set(names)) == len(names) and "together" not in names:   # which is what their mean is called
            return names
        names = ["/".join(path.with_suffix("").parts[-length:]) for path in resolved]
    return paths


def draw(folder, outcomes):
    judged = {name: o.scores["val_pairs"] for name, o in outcomes.items() if "val_pairs" in o.scores}
    panels = [outcome.panel for outcome in outcomes.values() if outcome.panel]
    if judged:
        draw_scores(folder, judged)
    if panels:
        data.plot(folder / "embeddings.png", panels, 300, 300)


def print_outcomes(outcomes, as_json):
    results, texts = {}, []
    for name, (result, text, *_) in outcomes.items():
        results[name] = result
        title = "together, the mean of their scores" if name == "together" else name
        texts.append(f"{title}:\n{text}")
    if len(outcomes) > 1:
        result, text = results, "\n".join(texts)
    print_result(result, text, as_json)


def print_result(result, text, as_json):
    if as_json:
        strict = json.loads(json.dumps(result), parse_constant=lambda name: None)       # NaN becomes null
        text = json.dumps(strict)
    print(text)


def submit(outcomes, args):
    """Write the test pairs' scores, of several checkpoints their mean, where there are any or --out asks for them.
    A line about it, or None."""
    tests, faces = mean_scores(outcomes, "test_pairs"), outcomes[-1].faces
    if tests and (args.out or len(outcomes) == 1):
        out = args.out or "submission.csv"
        write_submission(out, tests.scores, faces.root)
        return f"{len(tests.scores)} pairs of {faces.test_pairs.path} scored: {out}"
    if len(outcomes) > 1 and args.out:
        raise ValueError(f"--out {args.out}: not every checkpoint has the same test pairs, so nothing is written;"
                         " leave it out, or name one set with --data, or --pairs without labels")
    if len(outcomes) > 1 or faces is None or args.pairs and not args.out:
        return None
    missing = f"{args.pairs} has labels, so they are no test pairs"
    if not args.pairs:
        missing = f"{faces.root} has none of {', '.join(data.list_names('test_pairs'))}"
    if args.out:
        raise ValueError(f"--out {args.out}: no submission is written, for {missing}; leave it out, or give --pairs"
                         " without labels")
    return f"no submission is written, for {missing}"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.usage
    add = parser.add_argument
    add("files", nargs="*", metavar="IMAGE", help="two images to compare")
    add("--ckpt", nargs="+", default=["best.pt"], help="checkpoint of train.py; several, and CSV files of label,score,"
        " are judged one by one and by the mean of their scores [best.pt]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=device, help="[%(default)s]")
    add("--compare", nargs="+", metavar="RUN", help="print a table of these folders of train.py")
    add = parser.add_argument_group("what to judge").add_argument
    add("--data", help="data set to evaluate [the one the checkpoint was trained with]")
    add("--pairs", help="pairs to score instead of a data set's: the homework's .txt or .csv, LFW's lists")
    add("--images", metavar="DIR", help="folder that the names in --pairs are relative to [.]; alone with"
        " --save-embeddings, what to embed: a folder, or a text file that lists images")
    add("--gallery", metavar="DIR", help="known people: a folder each, or flat, or --save-embeddings' .npy")
    add("--probes", metavar="DIR", help="images to find in the gallery, likewise, or one image; sub-folders, or a"
        " verification_dev.csv beside the folder, tell who they are")
    add("--pool", choices=["mean", "none"], default="mean", help="compare probes with the mean of a person's images in"
        " the gallery, or with each image [mean]")
    add = parser.add_argument_group("how").add_argument
    add("--metric", choices=["cosine", "euclidean", "learned"], help="similarity of two embeddings [learned where the"
        " loss has one, otherwise cosine]")
    add("--mirror", choices=["mean", "concat", "none"], default="mean", help="what becomes of the embeddings of an"
        " image and its mirror image [mean]")
    add("--far", type=float, help="with two images, --export or --threshold-from: decide at the threshold of this false"
        " accept rate, 1e-2 say [the EER's]; with --probes: the chance that a stranger finds anybody [0.01]")
    add("--threshold-from", metavar="FILE", nargs="+", default=[None], help="choose the threshold on these labelled"
        " pairs, images in --images, or on the validation pairs of a best.pt, one for each --ckpt: to judge pairs"
        " the most accurate, otherwise the EER's [the checkpoint's own pairs]")
    add = parser.add_argument_group("what to write").add_argument
    add("--out", help="scores of test pairs, or the probes' names [submission.csv, identification.csv; none for"
        " several checkpoints]")
    add("--plots", metavar="DIR", type=Path, help="roc.png, scores.png, hardest.png and scores.csv; ranks.png for"
        " --probes; embeddings.png for checkpoints of --dim 2 [none]")
    add("--save-embeddings", metavar="FILE.npy", type=Path, help="the embeddings of the pairs' or the gallery's images,"
        " with FILE.txt listing the images; float16 for FILE.f16.npy [no]")
    add("--export", metavar="FILE.pt2", help="the model as a program of torch.export: uint8 images (B, S, S, 3) to unit"
        " embeddings [no]")
    add("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    for option in (args.ckpt, args.threshold_from):         # they may follow: --ckpt C one.jpg two.jpg
        images = [name for name in option if name and os.path.splitext(name)[1].lower() in data.SUFFIXES]
        args.files += images
        option[:] = [name for name in option if name not in images]
    if args.save_embeddings:
        if args.save_embeddings.suffix != ".npy":
            args.save_embeddings = Path(f"{args.save_embeddings}.npy")
    if args.probes:
        args.out = args.out or "identification.csv"
    check(args)
    check_used(args, parser)
    if len(args.threshold_from) == 1:                       # for all checkpoints
        args.threshold_from *= len(args.ckpt)
    return args


def embeds_folder(args):
    """Whether --images is what to embed, not where the images of pairs lie."""
    other = args.pairs or args.gallery or args.data or args.threshold_from[0]
    return bool(args.save_embeddings and args.images and not other)


def takes_one_checkpoint(args):
    """Whether the answer is another than scores of a set's pairs."""
    return bool(args.files or args.gallery or args.export or embeds_folder(args))


def holds_scores(path):
    """Whether one of --ckpt is a CSV file of label,score."""
    return path.lower().endswith(".csv")


def check(args):
    """ValueError for arguments that do not go together."""
    if len(args.files) not in (0, 2):
        raise ValueError(f"{len(args.files)} images; give two to compare, or search with --gallery and --probes")
    if args.far is not None and not 0 < args.far < 1:
        raise ValueError(f"--far {args.far:g}: a rate lies between 0 and 1; give 1e-3 for one in a thousand")
    if args.save_embeddings and (len(args.ckpt) > 1 or args.files):
        raise ValueError("--save-embeddings takes one checkpoint, and pairs, a gallery or a folder of --images")
    if len(args.threshold_from) not in (1, len(args.ckpt)):
        raise ValueError(f"--threshold-from: {len(args.threshold_from)} files for {len(args.ckpt)} checkpoints;"
                         " give one each")
    if args.save_embeddings:
        check_replaceable(args.save_embeddings)
    for written in (args.out, args.save_embeddings, args.export):
        if written:
            check_writable(written)
            check_not_read(written, args)
    if args.probes and not args.gallery:
        raise ValueError("--probes needs --gallery, the images of known people")
    if args.threshold_from[0] and any(map(holds_scores, args.ckpt)):
        raise ValueError("--threshold-from: does nothing for a file of scores, which has none of other pairs; leave one"
                         " of them out")
    if takes_one_checkpoint(args) and (len(args.ckpt) != 1 or holds_scores(args.ckpt[0])):
        raise ValueError(f"--ckpt {' '.join(args.ckpt)}: this takes one checkpoint")


def check_writable(path):
    folder = Path(os.path.realpath(path)).parent
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{path}: its folder is not there or is read-only; name another")


def check_not_read(written, args):
    """ValueError if a file to write is one that the command reads."""
    for name in (*args.ckpt, *args.threshold_from, args.pairs, args.gallery, args.probes, args.images):
        if name and os.path.exists(name) and os.path.exists(written) and os.path.samefile(name, written):
            raise ValueError(f"{written}: this command reads it; name another")


def check_used(args, parser):
    """ValueError for an argument that has no say in what the others ask for."""
    what, used = "here", {"ckpt", "device", "metric", "mirror", "json"}
    if args.compare:
        what, used = "with --compare", {"compare", "device", "json"}
    elif all(map(holds_scores, args.ckpt)):
        what, used = "with files of scores only", {"ckpt", "device", "plots", "json"}
    elif args.export:
        what, used = "with --export", used | {"export", "far", "threshold_from"}
    elif args.files:
        what, used = "with two images", used | {"files", "far", "threshold_from"}
    elif args.gallery and args.probes:
        what = "with --probes"
        used |= {"gallery", "probes", "pool", "far", "threshold_from", "out", "plots", "save_embeddings"}
    elif args.gallery:
        what, used = "with --gallery without --probes", used | {"gallery", "save_embeddings"}
    elif embeds_folder(args):
        what, used = "with --images to embed", used | {"images", "save_embeddings"}
    else:
        used |= {"data", "threshold_from", "out", "plots", "save_embeddings"}
        if args.pairs:
            what, used = "with --pairs", used - {"data"} | {"pairs", "images"}
        if args.threshold_from[0]:
            used |= {"far"}
    if "threshold_from" in used and any(args.threshold_from):
        used |= {"images"}
    for name, value in vars(args).items():
        if name not in used and value and value != parser.get_default(name):
            flag = "two images" if name == "files" else "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: does nothing {what}; leave it out, or see --help for what it goes with")


def main():
    args = parse_args()
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
    if args.compare:
        print_result(*compare(args.compare), args.json)
        return

    # Each checkpoint and each file of scores, then the mean of all.
    torch.set_float32_matmul_precision("high")              # TF32, as in training
    outcomes = {}
    for name, path, threshold_from in zip(short_names(args.ckpt), args.ckpt, args.threshold_from):
        outcomes[name] = outcome_of(path, args, threshold_from)
    each = list(outcomes.values())
    mean = {"val_pairs": mean_scores(each, "val_pairs"), "threshold": mean_scores(each, "threshold")}
    if len(each) > 1 and mean["val_pairs"]:
        outcomes["together"] = describe(mean, args.far)

    # Pictures, text or JSON, the submission.
    if args.plots:
        draw(args.plots, outcomes)
    line = None
    try:
        if not takes_one_checkpoint(args):
            line = submit(each, args)
    finally:                                                # print even if submit() fails
        print_outcomes(outcomes, args.json)
    if line and not args.json:
        print(line)


if __name__ == "__main__":
    data.cli(main)
