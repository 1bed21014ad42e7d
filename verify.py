"""Tell whether two faces are of the same person, and who of many a face is.

    python verify.py --ckpt best.pt                              # the checkpoint's data: EER, submission.csv
    python verify.py --ckpt best.pt --data DIR --out my.csv
    python verify.py --ckpt best.pt one.jpg two.jpg              # a score, and same or different
    python verify.py --ckpt best.pt --pairs FILE --images DIR    # any list of pairs, the homework's or LFW's
    python verify.py --ckpt best.pt --gallery known --probes unknown     # who each probe is, or nobody of the gallery
    python verify.py --ckpt a.pt b.pt --out both.csv             # each, and together: the mean of their scores
    python verify.py --ckpt a.pt scores.csv --plots DIR          # ROC curves over each other, histograms, hard pairs
    python verify.py --compare runs/*                            # a table of what was tried

An image and its mirror image go through the backbone; the mean of the two outputs is the embedding. The score of a
pair is the cosine of its two embeddings. Each distinct image is embedded once, in float32 (products in TF32 on GPUs
that have it), so that scores depend neither on the batch size nor on the order of the pairs.
"""
import argparse
import csv
import hashlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import eer
import losses
import models

VERSION = 1                                                 # of the checkpoint's layout
CHECKPOINT_KEYS = {"args", "names", "spec", "model", "ema", "loss"}
ARGUMENT_KEYS = {"arch", "dim", "size", "loss", "data", "holdout", "seed"}
NOBODY = "n000000"                                          # the older Kaggle's answer for a stranger
GREEN, RED = "#3a9d5d", "#d1495b"


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
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # of a pickle's protocol; our error says enough
        try:
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
    missing = CHECKPOINT_KEYS - ckpt.keys() or ARGUMENT_KEYS - ckpt["args"].keys()
    if missing:
        raise ValueError(f"{path}: damaged, it lacks {', '.join(sorted(missing))}; name another best.pt or last.pt")
    ckpt["args"].setdefault("crop", 1.0)                    # which the first checkpoints lack
    return ckpt


def build(ckpt, device="cpu"):
    """(backbone, loss) of a checkpoint on a device, both in eval mode."""
    args = ckpt["args"]
    net = models.make(args["arch"], args["dim"], args["size"])
    criterion = losses.make(ckpt["spec"], args["dim"], len(ckpt["names"]))
    try:
        net.load_state_dict(ckpt["ema"] or ckpt["model"])
        criterion.load_state_dict(ckpt["loss"])
    except RuntimeError:                                    # dozens of lines, one a tensor
        raise ValueError(f"the checkpoint's weights do not fit {args['arch']} and {args['loss']}; it comes from"
                         " another version of these scripts: train again") from None
    return net.to(device).eval(), criterion.to(device).eval()


# ---- Embeddings and scores ---------------------------------------------------------------------------------------

@torch.no_grad()
def embed(model, images, project=None, mirror="mean", unit=True, batch_size=None, rows=None):
    """uint8 images (N, S, S, 3), an array or data.Images -> embeddings (N, D) on the CPU, unit vectors or as they are.

    rows selects images by number. mirror: mean of the embeddings of image and mirror image, their concat, or none.
    project is the loss's own last layer, where it has one. ValueError if an embedding is not finite.
    With several processes each embeds a part of the images, and all receive all embeddings.
    """
    device = next(model.parameters()).device
    net = models.fold(model).to(memory_format=torch.channels_last)
    if project is None:
        project = torch.nn.Identity()
    if batch_size is None:
        batch_size = 64 if device.type == "cpu" else 256    # more does not stay in a CPU's cache
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
        x = data.normalise(x)
        z = project(net(x))
        if mirror != "none":
            z_mirror = project(net(x.flip(3)))
            z = torch.cat([z, z_mirror], 1) if mirror == "concat" else (z + z_mirror) / 2
        parts.append(z.float().cpu())
        done += len(index)
        progress.update(done)
    z = torch.cat(parts)
    if world_size > 1:
        z = losses.gather_rows(z, bounds[rank], len(rows))

    bad = torch.nonzero(~z.isfinite().all(1))
    if len(bad):
        raise ValueError(f"image {int(rows[bad[0, 0]])} has an embedding that is not finite; the weights diverged:"
                         " train again with a lower --lr, or with --amp off")
    return F.normalize(z) if unit else z


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


def score(z, pairs, similarity=None):
    """Scores (n,) float64 of pairs; row i of the embeddings z (N, D) belongs to pairs.files[i].

    similarity maps two arrays of embeddings (..., D) to (...); None is the cosine of unit embeddings.
    """
    a, b = z[pairs.left], z[pairs.right]
    scores = (a.double() * b.double()).sum(1) if similarity is None else similarity(a, b)
    return scores.detach().double().numpy()


def centroids(z, labels, classes):
    """Unit mean embedding (classes, D) of each class of unit embeddings z (N, D); zero for absent classes."""
    sums = z.new_zeros(classes, z.shape[1])
    return F.normalize(sums.index_add_(0, torch.from_numpy(labels), z))


@torch.no_grad()
def closed_set(net, criterion, probes, train, classes):
    """(top-1, top-5) accuracy in 0..1 of probes, an ImageSet.

    By the loss's logits without margin where it has class weights, otherwise by the nearest centroid of up to
    8 images a person of train, an ImageSet.
    """
    k = min(5, classes)
    if criterion.weight is not None:
        z = embed(net, probes.images, unit=False, rows=probes.rows)
        device = criterion.weight.device
        ranked = torch.cat([criterion.top(part.to(device), k).cpu() for part in z.split(1024)])
    else:
        rows = train.rows[np.argsort(train.labels[train.rows], kind="stable")]
        people = np.split(rows, np.flatnonzero(np.diff(train.labels[rows])) + 1)
        few = np.concatenate([rows[:8] for rows in people])
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
        g = torch.from_numpy(np.array(gallery[start:start + block])).float()
        if similarity is None:
            scores = probes @ g.T                           # (P, n)
        else:
            scores = torch.stack([similarity(p, g) for p in probes]).float()
        if start == 0:                                      # just below the k-th best: all that equal it enter
            kth_best = scores.topk(k)[0][:, -1:]
            floor = torch.nextafter(kth_best, torch.tensor(-np.inf))
        probe, column, value = above_floor(scores, floor)   # the candidates, and with them the best so far
        probe = np.append(np.repeat(np.arange(len(probes)), best.shape[1]), probe)
        value = np.append(best, value)
        row = np.append(best_rows, column + start)
        order = np.lexsort((row, -value, probe))            # by probe, then the highest score, then the row
        first = np.searchsorted(probe[order], np.arange(len(probes)))
        keep = order[first[:, None] + np.arange(k)]         # (P, k)
        best, best_rows = value[keep], row[keep]
        floor = torch.from_numpy(best[:, -1:])              # only a higher score can enter from here on
        if isinstance(gallery, np.memmap):
            data.release_pages(gallery)
        progress.update(start + len(g))
    return best, best_rows


def above_floor(scores, floor):
    """(probe, column, score), each (m,): the scores (P, n) above the probe's floor (P, 1), which are few.

    To find them without a look at each, the n columns are folded to 64 rows of n / 64 cells: column c goes to row
    c // cells of cell c % cells. One maximum over the rows then rules out the 64 columns of a cell at once.
    """
    missing = -scores.shape[1] % 64
    if missing:
        scores = F.pad(scores, (0, missing), value=-np.inf)
    folded = scores.view(len(scores), 64, -1)               # (P, 64, cells)
    cells = folded.shape[2]
    probe, cell = torch.nonzero(folded.amax(1) > floor, as_tuple=True)
    inside = folded[probe, :, cell]                         # (cells with a score above, 64)
    i, row = torch.nonzero(inside > floor[probe], as_tuple=True)
    column = row * cells + cell[i]
    return probe[i].numpy(), column.numpy(), inside[i, row].numpy()


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


def evaluate(net, criterion, sets, classes, metric=None, mirror="mean"):
    """The one evaluation: of train.py after each epoch, and of verify.py for val, dev and test alike.

    sets maps train, dev and test to data.ImageSet, val_pairs and test_pairs to data.PairSet; any may be missing.
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
            top1, top5 = closed_set(net, criterion, sets[name], sets.get("train"), classes)
            metrics.update({f"{name}_acc1": top1, f"{name}_acc5": top5})
    return Evaluation(metrics, scores, embeddings)


def score_pairs(net, criterion, pair_set, metric=None, mirror="mean"):
    """(Scores, embeddings (N, D)) of a data.PairSet."""
    images, pairs = pair_set
    project, similarity = metric_of(criterion, metric)
    z = embed(net, images, project, mirror)
    return Scores(pairs.labels, score(z, pairs, similarity), pairs_digest(pairs)), z


def pairs_digest(pairs):
    """A digest of which images (folder and file) are paired in which order, wherever the set lies."""
    names = ["/".join(Path(file).parts[-2:]) for file in pairs.files]
    paired = [names[i] for i in np.append(pairs.left, pairs.right)]
    return hashlib.sha256(os.fsencode("\n".join(paired))).hexdigest()[:16]


# ---- Files: scores and embeddings --------------------------------------------------------------------------------

def write_csv(path, header, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    data.write(path, text.getvalue())


def write_submission(path, scores, root):
    """A row ID,score for each test pair, counted from 0; the header is that of the set's sample submission.

    ValueError if the sample has another length or a score is not finite.
    """
    header = ["ID", "Label"]
    for sample in sorted(Path(root).glob("*sample*submission*.csv")):
        (_, first), *rest = data.read_lines(sample)
        if len(rest) != len(scores):
            raise ValueError(f"{sample}: {len(rest)} rows, but there are {len(scores)} test pairs; the sample is"
                             " of another set: remove it, or bring the test pairs that belong to it")
        header = first.split(",")
    finite = np.isfinite(scores)
    if not finite.all():
        raise ValueError(f"pair {np.argmin(finite)} has a score that is not finite, so {path} is not"
                         " written; the weights diverged: train again with a lower --lr")
    write_csv(path, header, enumerate(map(repr, scores.tolist())))


class Embedded(NamedTuple):
    """Embeddings z (N, D), the files they are of, and the people's names, (N,) or None where not told."""
    z: np.ndarray
    files: list
    names: list | None


def save_embeddings(path, embedded):
    """Write path, in float16 if it ends in .f16.npy, and beside it a .txt with lines of image, tab, name."""
    path = Path(path).with_suffix(".npy")
    dtype = np.float16 if path.stem.endswith(".f16") else np.float32
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(embedded.z, dtype))
    data.write(path, buffer.getbuffer())
    names = embedded.names or [""] * len(embedded.files)
    lines = map("{}\t{}\n".format, embedded.files, names)
    data.write(path.with_suffix(".txt"), "".join(lines))


def load_embeddings(path):
    """Embedded as save_embeddings() wrote it; z stays on the disk, as a memory map."""
    try:
        z = np.load(path, mmap_mode="r")
    except (EOFError, ValueError):
        raise ValueError(f"{path}: not what --save-embeddings wrote; save it anew") from None
    listing = Path(path).with_suffix(".txt")
    rows = [line.partition("\t") for _, line in data.read_lines(listing)]
    if z.ndim != 2 or not 0 < len(z) == len(rows):
        raise ValueError(f"{listing}: {len(rows)} lines, but {path} has the shape {z.shape}; save them anew")
    files, _, names = zip(*rows)
    return Embedded(z, files, names if any(names) else None)


def load_or_embed(net, trained, folder, project, mirror):
    """Embedded images of a folder in any layout, or those of a .npy file of save_embeddings().

    trained: the checkpoint's arguments.
    """
    if folder.endswith(".npy"):
        return load_embeddings(folder)
    files, labels = data.read_split(folder)
    if not files:
        raise ValueError(f"{folder}: no such folder, or no images in it and its sub-folders; name another")
    images, rows = data.pack(files, trained["size"], data.cache_folder(folder), "faces", trained["crop"])
    z = embed(net, images, project, mirror, rows=rows).numpy()
    names = [str(labels[i]) for i in rows] if labels else None
    return Embedded(z, [files[i] for i in rows], names)


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
        pairs = data.read_pairs(threshold_from, args.images)
        if pairs.labels is None:
            raise ValueError(f"{threshold_from}: pairs without labels; a threshold needs 0 or 1 in each line")
        size, crop, cache = ckpt["args"]["size"], ckpt["args"]["crop"], data.cache_folder(args.images)
        images, _ = data.pack(pairs.files, size, cache, "threshold_pairs", crop, max_unreadable=0)
        scores, _ = score_pairs(net, criterion, data.PairSet(images, pairs), args.metric, args.mirror)
        return scores
    val = ckpt.get("val")
    if not val or args.mirror != "mean":
        return None
    stored = Scores(val["labels"].numpy(), val["scores"].numpy(), val.get("mark"))
    learned = criterion.score or criterion.has_projection
    if args.metric in (None, "learned" if learned else "cosine"):
        return stored
    if args.metric == "euclidean" and not learned:          # of unit vectors: the cosine tells it
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
        return threshold, f"where the validation EER is {eer.percent(rate)}"
    why = f"for FAR {far:g} on validation"
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
    same, lower, higher = score >= threshold, np.mean(genuine < score), np.mean(impostor >= score)
    answer = "same person" if same else "different people"
    result = dict(score=score, same=same, threshold=threshold, genuine_lower=lower, impostor_higher=higher)
    return Outcome(result, (
        f"score {score:.4f}: {answer} (threshold {threshold:.4f}, {why})\n"
        f"of a hundred genuine validation pairs {100 * lower:.3g} score lower, of a hundred impostor pairs"
        f" {100 * higher:.3g} as high or higher ({len(genuine)} and {len(impostor)} pairs)"), {})


# ---- Decisions: one among many -----------------------------------------------------------------------------------

def identify(net, criterion, ckpt, args, threshold_from):
    """The best match of each probe in the gallery, or none. Writes --out, and ranks.png with --plots."""
    project, similarity = metric_of(criterion, args.metric)
    gallery = load_or_embed(net, ckpt["args"], args.gallery, project, args.mirror)
    if args.save_embeddings:
        save_embeddings(args.save_embeddings, gallery)
    if not args.probes:
        text = f"{len(gallery.z)} images of {args.gallery}: {args.save_embeddings or 'give --probes'}"
        return Outcome(dict(images=len(gallery.z)), text, {})
    people = one_per_person(gallery)
    probes = load_or_embed(net, ckpt["args"], args.probes, project, args.mirror)
    if people.z.shape[1] != probes.z.shape[1]:
        raise ValueError(f"{args.gallery}: {people.z.shape[1]} numbers an embedding, but the probes have"
                         f" {probes.z.shape[1]}; save it anew with this checkpoint")
    if not probes.names:
        probes = probes._replace(names=probe_labels(Path(args.probes), len(probes.files)))
    scores, found = search(people.z, np.array(probes.z, np.float32), similarity=similarity)         # (P, 5)
    known = threshold_scores(net, criterion, ckpt, args, threshold_from)
    threshold, why = threshold_of(known, args.far)

    best = scores[:, 0]
    accepted = best >= threshold
    predicted = people.names[found]                         # (P, 5)
    answers = np.where(accepted, predicted[:, 0], NOBODY)
    out = args.out or "identification.csv"
    write_csv(out, ["id", "label"], enumerate(answers))
    entries, lines = [], []
    for i, file in enumerate(probes.files):
        match = str(answers[i]) if accepted[i] else None
        entries.append(dict(image=file, match=match, score=float(best[i]), nearest=predicted[i].tolist()))
        lines.append(f"{file}  {match or 'no match'}  {best[i]:.4f}")
    result = dict(threshold=threshold, probes=entries)
    lines.append(f"{len(answers)} probes among {len(people.names)} people: {out}; threshold {threshold:.4f}, {why}")
    if probes.names:
        hits = predicted == np.array(probes.names)[:, None]
        mated = np.isin(probes.names, people.names)
        rates = identification(best, hits, mated)
        rates["accuracy"] = np.mean(np.where(mated, hits[:, 0] & accepted, ~accepted))
        result.update(rates)
        shown = [f"{name} {v if isinstance(v, int) else eer.percent(v)}" for name, v in rates.items()]
        lines.append("   ".join(shown))
    if args.plots:
        draw_ranks(args.plots / "ranks.png", probes, people, scores, found, threshold)
    return Outcome(result, "\n".join(lines), {})


def one_per_person(gallery):
    """Embedded, for each person, the mean of his images, and the first of his files; names as an array.

    Images without names are each a person of their own, named after the file.
    """
    names = gallery.names or [Path(file).stem for file in gallery.files]
    people, first, labels = np.unique(names, return_index=True, return_inverse=True)
    if len(people) == len(names):                           # as it is, for it may be larger than memory
        return gallery._replace(names=np.array(names))
    z = torch.from_numpy(np.array(gallery.z, np.float32))
    z = centroids(z, labels, len(people)).numpy()
    return Embedded(z, [gallery.files[i] for i in first], people)


def probe_labels(folder, n):
    """Who the n images of a flat folder are, where the older Kaggle's CSV beside it tells; never for a test folder."""
    for path in (folder.with_name("verification_dev.csv"), folder.with_name("dev_identities.csv")):
        if not path.is_file() or "test" in folder.name:
            continue
        with open(path, newline="", encoding="utf-8-sig") as file:
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


def draw_ranks(path, probes, people, scores, found, threshold):
    """Eight probes, each with the people found (P, k) for it and their scores (P, k)."""
    heading, tiles = f"threshold {threshold:.4f}", []
    if probes.names:
        heading += "; green: that person, red: accepted, but somebody else"
    for i in np.unique(np.linspace(0, len(probes.files) - 1, 8).astype(int)):
        file = probes.files[i]
        truth = probes.names[i] if probes.names else None
        tiles.append((data.decode(file, 112), f"probe\n{truth or Path(file).stem}", None))
        for person, score in zip(found[i], scores[i]):
            name, verdict, colour = people.names[person], "", None
            if score < threshold:
                verdict = ", no match"
            elif truth:
                colour = RED
            if name == truth:
                colour = GREEN
            tiles.append((data.decode(people.files[person], 112), f"{score:.3f}{verdict}\n{name}", colour))
    title = "Probes and the five nearest people of the gallery"
    data.sheet(path, title, [(heading, 1 + found.shape[1], tiles)])


def embedding_panel(net, criterion, train):
    """A chart of the 2-D embeddings of the first ten people's training images, their class weights as rays."""
    rows = train.rows[train.labels[train.rows] < 10][:2000]
    labels = train.labels[rows]
    z = embed(net, train.images, mirror="none", unit=False, rows=rows).numpy()
    radius, series = np.linalg.norm(z, axis=1).max(), {}
    for c in np.unique(labels):
        if criterion.weight is not None:
            x, y = F.normalize(criterion.weight[c].detach().cpu(), dim=0).numpy() * radius
            series[f"_ray {c}"] = [0, x], [0, y], "line", c
        x, y = z[labels == c].T
        series[f"_{c}"] = x, y, "points", c
    return criterion.spec, "first number of the embedding", "second", series, "equal"


def compare(folders):
    """Runs of train.py, lowest validation EER first: (result, Markdown table)."""
    runs = []
    for folder in map(Path, folders):
        try:
            runs.append(summary(folder))
        except (ValueError, OSError) as e:
            print("left out:", e, file=sys.stderr)
    if not runs:
        raise ValueError(f"{' '.join(folders)}: no run of train.py with a best.pt and a log.csv; name runs/*")
    runs.sort(key=lambda run: np.nan_to_num(run["EER"], nan=2))
    shown = {float: eer.percent, int: "{:,}".format, str: str}
    rows = [[shown[type(value)](value) for value in run.values()] for run in runs]
    return {"runs": runs}, eer.table([list(runs[0]), *rows])


def summary(folder):
    """What compare() tells of a run; ValueError or OSError where a file is missing or does not fit."""
    ckpt = load(folder / "best.pt")
    log = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    net, criterion = build(ckpt)
    val, metrics = ckpt.get("val"), {"eer": np.nan, "tar@far=1e-2": np.nan}
    if val:
        metrics = eer.report(val["labels"].numpy(), val["scores"].numpy())
    try:
        row = {int(row["step"]): row for row in log}[ckpt["step"]]
        return {"run": str(folder), "loss": criterion.spec, "arch": ckpt["args"]["arch"], "epochs": len(log),
                "EER": metrics["eer"], "TAR at FAR 1e-2": metrics["tar@far=1e-2"],
                "accuracy on dev": float(row["acc"]), "seconds": round(float(log[-1]["seconds"])),
                "parameters": sum(p.numel() for p in [*net.parameters(), *criterion.parameters()])}
    except KeyError:
        raise ValueError(f"{folder}: log.csv lacks the step of best.pt") from None


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
    if path.endswith(".csv"):
        return describe({"val_pairs": Scores(*eer.read(path), None)}, None)
    ckpt = load(path)
    net, criterion = build(ckpt, args.device)
    if args.mirror == "concat" and criterion.score and args.metric in (None, "learned"):
        raise ValueError(f"--mirror concat: {criterion.spec} learned a metric of single embeddings; use mean")
    answer = evaluate_checkpoint
    if args.files:
        answer = compare_images
    elif args.gallery:
        answer = identify
    return answer(models.fold(net), criterion, ckpt, args, threshold_from)


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
    draws_panel = args.plots and ckpt["args"]["dim"] == 2
    names = ["val_pairs", "test_pairs"]
    if faces.names == ckpt["names"]:
        names += ["dev", "test"]
        if draws_panel or criterion.weight is None:
            names.append("train")
    sets = pack_sets(faces, names, ckpt["args"])
    metrics, scores, embeddings = evaluate(net, criterion, sets, len(ckpt["names"]), args.metric, args.mirror)
    if args.save_embeddings:
        files = [file for name in embeddings for file in sets[name].pairs.files]
        z = torch.cat(list(embeddings.values()))
        save_embeddings(args.save_embeddings, Embedded(z, files, None))
    if draws_panel and "train" in sets:
        panel = embedding_panel(net, criterion, sets["train"])

    result, lines = {}, [faces.note]
    if "val_pairs" in sets:
        if threshold_from:
            scores["threshold"] = threshold_scores(net, criterion, ckpt, args, threshold_from)
            if scores["threshold"] is None:
                raise ValueError(f"{threshold_from}: no validation scores of this metric; name another best.pt")
        described = describe(scores, args.far, faces.val_pairs.folds)
        result = described.result
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


def find_faces(args, trained):
    """The data.FaceSet to evaluate: --pairs alone, --data, or what a checkpoint's arguments name."""
    if args.pairs:
        pairs = data.read_pairs(args.pairs, args.images)
        faces = data.FaceSet(Path(args.images), [], None, None, None, None, None, "")
        return faces._replace(test_pairs=pairs) if pairs.labels is None else faces._replace(val_pairs=pairs)
    faces = data.load(args.data or trained["data"], trained["holdout"], trained["seed"])
    if not (faces.val_pairs or faces.test_pairs):
        raise ValueError(f"{faces.root}: neither val_pairs nor test_pairs; give --pairs and --images")
    return faces


def pack_sets(faces, names, args):
    """The sets of evaluate(), of a data.FaceSet's parts called names, without those that have no labels to judge by.

    args: a dictionary with size and crop.
    """
    sets, cache = {}, data.cache_folder(faces.root)
    for name in names:
        part = getattr(faces, name)
        if isinstance(part, data.Pairs):
            images, _ = data.pack(part.files, args["size"], cache, name, args["crop"], max_unreadable=0)
            sets[name] = data.PairSet(images, part)
        elif part and part.labels is not None:
            images, rows = data.pack(part.files, args["size"], cache, name, args["crop"])
            sets[name] = data.ImageSet(images, part.labels, rows)
    return sets


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


def short_name(path, taken):
    """What to call a checkpoint: its run's folder if it is a best.pt or last.pt, otherwise the file's own name."""
    resolved = Path(path).resolve()
    name = resolved.stem
    if name in ("best", "last") and resolved.parent.name not in taken:
        name = resolved.parent.name
    return path if name in taken else name


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
    """Write the test pairs' scores, of several checkpoints their mean, where there are any or --out asks for them."""
    tests = mean_scores(outcomes, "test_pairs")
    if not args.out and (not tests or len(outcomes) > 1):
        return
    if not tests:
        raise ValueError(f"--out {args.out}: not every checkpoint has the same test pairs, so nothing is written;"
                         " leave it out, or name one set with --data, or --pairs without labels")
    out, faces = args.out or "submission.csv", outcomes[-1].faces
    write_submission(out, tests.scores, faces.root)
    if not args.json:
        print(f"{len(tests.scores)} pairs of {faces.test_pairs.path} scored: {out}")


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
    add("--images", default=".", help="folder that the names in --pairs are relative to [.]")
    add("--gallery", metavar="DIR", help="known people: a folder each, or flat, or --save-embeddings' .npy")
    add("--probes", metavar="DIR", help="images to find in the gallery, likewise; sub-folders, or a"
        " verification_dev.csv beside the folder, tell who they are")
    add = parser.add_argument_group("how").add_argument
    add("--metric", choices=["cosine", "euclidean", "learned"], help="similarity of two embeddings [learned where the"
        " loss has one, otherwise cosine]")
    add("--mirror", choices=["mean", "concat", "none"], default="mean", help="what becomes of the embeddings of an"
        " image and its mirror image [mean]")
    add("--far", type=float, help="decide at the threshold of this false accept rate, 1e-3 say [the EER's]")
    add("--threshold-from", metavar="FILE", nargs="+", default=[None], help="choose the threshold on these labelled"
        " pairs, images in --images, or on the validation pairs of a best.pt, one for each --ckpt: of pairs the most"
        " accurate, otherwise the EER's [the checkpoint's own pairs]")
    add = parser.add_argument_group("what to write").add_argument
    add("--out", help="scores of test pairs, or the probes' names [submission.csv, identification.csv; none for"
        " several checkpoints]")
    add("--plots", metavar="DIR", type=Path, help="roc.png, scores.png, hardest.png and scores.csv; ranks.png for"
        " --probes; embeddings.png for checkpoints of --dim 2 [none]")
    add("--save-embeddings", metavar="FILE.npy", help="the embeddings of the pairs' or the gallery's images, with"
        " FILE.txt listing the images; float16 for FILE.f16.npy [no]")
    add("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    images = [name for name in args.ckpt if os.path.splitext(name)[1].lower() in data.SUFFIXES]
    args.files += images                                    # they may follow: --ckpt C one.jpg two.jpg
    args.ckpt = [name for name in args.ckpt if name not in images]
    check(args)
    if len(args.threshold_from) == 1:                       # for all checkpoints
        args.threshold_from *= len(args.ckpt)
    return args


def check(args):
    """ValueError for arguments that do not go together."""
    if len(args.files) not in (0, 2):
        raise ValueError(f"{len(args.files)} images; give two to compare")
    if args.far is not None and not 0 < args.far < 1:
        raise ValueError(f"--far {args.far:g}: a rate lies between 0 and 1; give 1e-3 for one in a thousand")
    if args.save_embeddings and (len(args.ckpt) > 1 or args.files):
        raise ValueError("--save-embeddings takes one checkpoint, and pairs or a gallery")
    if len(args.threshold_from) not in (1, len(args.ckpt)):
        raise ValueError(f"--threshold-from: {len(args.threshold_from)} files for {len(args.ckpt)} checkpoints;"
                         " give one each")
    folder = Path(args.out or "submission.csv").resolve().parent
    if not (args.compare or args.files or os.access(folder, os.W_OK)):
        raise ValueError(f"{args.out or os.getcwd()}: that folder is not there or is read-only; give another --out")
    if args.probes and not args.gallery:
        raise ValueError("--probes needs --gallery, the images of known people")
    if (args.files or args.gallery) and (len(args.ckpt) != 1 or args.ckpt[0].endswith(".csv")):
        raise ValueError(f"--ckpt {' '.join(args.ckpt)}: this takes one checkpoint")


def main():
    args = parse_args()
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
    if args.compare:
        result, table = compare(args.compare)
        print_result(result, table, args.json)
        return

    # Each checkpoint and each file of scores, then the mean of all.
    torch.set_float32_matmul_precision("high")              # TF32, as in training
    outcomes = {}
    for path, threshold_from in zip(args.ckpt, args.threshold_from):
        name = short_name(path, outcomes)
        outcomes[name] = outcome_of(path, args, threshold_from)
    each = list(outcomes.values())
    mean = {"val_pairs": mean_scores(each, "val_pairs"), "threshold": mean_scores(each, "threshold")}
    if len(each) > 1 and mean["val_pairs"]:
        outcomes["together"] = describe(mean, args.far)

    # Pictures, text or JSON, the submission.
    if args.plots:
        draw(args.plots, outcomes)
    print_outcomes(outcomes, args.json)
    if not (args.files or args.gallery):
        submit(each, args)


if __name__ == "__main__":
    data.cli(main)
