"""Tell whether two faces are of the same person, and who of many a face is.

    python verify.py --ckpt best.pt                              # the checkpoint's data: EER, submission.csv
    python verify.py --ckpt best.pt --data DIR --out my.csv
    python verify.py --ckpt best.pt one.jpg two.jpg              # a score, and same or different
    python verify.py --ckpt best.pt --pairs FILE --images DIR    # any list of pairs, the homework's or LFW's
    python verify.py --ckpt best.pt --gallery known --probes unknown     # who each probe is, or nobody of the gallery
    python verify.py --ckpt a.pt b.pt --out both.csv             # each, and together: the mean of their scores
    python verify.py --ckpt a.pt scores.csv --plots DIR          # ROC curves over each other, histograms, hard pairs
    python verify.py --compare runs/*                            # a table of what was tried

An image and its mirror go through the backbone, their mean is the embedding; a pair's score is the cosine of its
two embeddings. Each distinct image is embedded once, in float32 (products in TF32 on GPUs that have it), so that
scores depend neither on the batch size nor on the order of the pairs.
"""
import argparse
import csv
import hashlib
import io
import json
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import eer
import losses
import models

VERSION = 1                                                  # of the checkpoint's layout


def device(name):
    """name, for argparse's type, if something can be computed there."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"'{name}' is no device of this machine; leave it out") from None
    return name


def load(path):
    """A checkpoint of train.py as a dictionary. Nothing in the file is executed; ValueError in one line for a
    file that is truncated, foreign, or from a newer version."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such checkpoint; train one with train.py, or name another")
    with open(path, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # of a pickle's protocol; the error says enough
        try:
            ckpt = torch.load(f, map_location="cpu", weights_only=True)
        except Exception as e:                               # half a dozen kinds, by where the file is broken
            why = "holds more than tensors, not opened" if "weights_only" in str(e).lower() else "damaged"
            raise ValueError(f"{path}: not a checkpoint of train.py ({why}); name a best.pt or last.pt") from None
    if not isinstance(ckpt, dict) or not isinstance(ckpt.get("face_checkpoint"), int):
        raise ValueError(f"{path}: not a checkpoint of train.py; name a best.pt or last.pt that it wrote")
    if ckpt["face_checkpoint"] > VERSION:
        raise ValueError(f"{path}: written by a newer version of these scripts; update them")
    if lacks := ({"args", "names", "spec", "model", "ema", "loss"} - ckpt.keys()
                 or {"arch", "dim", "size", "loss", "data", "holdout", "seed"} - ckpt["args"].keys()):
        raise ValueError(f"{path}: damaged, it lacks {', '.join(sorted(lacks))}; name another best.pt or last.pt")
    return ckpt


def build(ckpt, device="cpu"):
    """(backbone, loss module) of a checkpoint, in eval mode."""
    a = ckpt["args"]
    net = models.make(a["arch"], a["dim"], a["size"])
    criterion = losses.make(ckpt["spec"], a["dim"], len(ckpt["names"]))
    try:
        net.load_state_dict(ckpt["ema"] or ckpt["model"])
        criterion.load_state_dict(ckpt["loss"])
    except RuntimeError:                                    # dozens of lines, one a tensor
        raise ValueError(f"the checkpoint's weights do not fit {a['arch']} and {a['loss']}; it comes from another"
                         " version of these scripts: train again") from None
    return net.to(device).eval(), criterion.to(device).eval()


@torch.no_grad()
def embed(model, images, project=None, mirror="mean", unit=True, batch_size=None, rows=None):
    """uint8 images (N, S, S, 3), an array or data.Images -> unit embeddings (N, D) on the CPU, or the
    unnormalised ones with unit=False. rows selects images by number. mirror: mean of the embeddings of image and
    mirror image, their concat, or none. project is the loss's own last layer, where it has one.
    ValueError if an embedding is not finite. Under torchrun each process embeds a part, and all receive all."""
    device = next(model.parameters()).device
    batch_size = batch_size or (64 if device.type == "cpu" else 256)    # a CPU's cache holds no more
    net = models.fold(model).to(memory_format=torch.channels_last)      # in eval mode, batch-norms folded away
    rows, since, out = np.arange(len(images)) if rows is None else np.asarray(rows), time.monotonic(), []
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = slice(len(rows) * rank // world, len(rows) * (rank + 1) // world)
    todo = rows[mine]
    for _, x in data.batches(images, np.split(todo, range(batch_size, len(todo), batch_size)), device):
        x = data.normalise(x)
        z = [net(v) for v in ([x] if mirror == "none" else [x, x.flip(3)])]
        z = [project(v) for v in z] if project else z
        out.append((torch.cat(z, 1) if mirror == "concat" else sum(z) / len(z)).float().cpu())
        data.progress("embedding", min(len(out) * batch_size, len(todo)), len(todo), since)
    z = torch.cat(out)
    if world > 1:
        dist.all_reduce(z := F.pad(z, (0, 0, mine.start, len(rows) - mine.stop)))
    bad = torch.nonzero(~torch.isfinite(z).all(1))
    if len(bad):
        raise ValueError(f"image {int(rows[bad[0, 0]])} has an embedding that is not finite; the weights diverged:"
                         " train again with a lower --lr, or with --amp off")
    return F.normalize(z) if unit else z


def metric_of(criterion, name=None):
    """(project, similarity) of a metric: cosine or euclidean (minus the distance) of the backbone's embeddings, or
    learned, the loss's own last layer and score. None: learned where the loss has it, otherwise cosine."""
    if name == "learned" and not (criterion.score or criterion.projections):
        raise ValueError(f"--metric learned: {criterion.spec} learned no metric; use cosine or euclidean")
    if name in (None, "learned"):
        device = next((w.device for w in criterion.parameters()), "cpu")
        return criterion.project, criterion.score and (lambda a, b: criterion.score(a.to(device), b.to(device)).cpu())
    return None, (lambda a, b: -(a.double() - b.double()).norm(dim=-1)) if name == "euclidean" else None


def score(z, pairs, learned=None):
    """Scores (n,) float64 of pairs over embeddings z, row i of which belongs to pairs.files[i]. learned, or another
    similarity, maps two arrays of embeddings (..., D) to (...); None is the cosine."""
    a, b = z[torch.from_numpy(pairs.left)], z[torch.from_numpy(pairs.right)]
    s = learned(a, b) if learned else (a.double() * b.double()).sum(1)
    return s.detach().double().numpy()


def scored(net, criterion, images, pairs, metric=None, mirror="mean"):
    """(scores (n,), embeddings (N, D)) of pairs, the images of which are images."""
    project, similarity = metric_of(criterion, metric)
    z = embed(net, images, project, mirror)
    return score(z, pairs, similarity), z


def centroids(z, labels, classes):
    """Unit mean embedding (classes, D) of each class of unit embeddings z (N, D); zero for absent classes."""
    return F.normalize(z.new_zeros(classes, z.shape[1]).index_add_(0, torch.from_numpy(labels), z))


@torch.no_grad()
def search(gallery, probes, k=5, block=4096, similarity=None):
    """The k best of gallery (N, D) for each of probes (P, D): (scores (P, k) float32, row numbers (P, k)), best first,
    equal scores by row number; k is N if N is less. Exact: all inner products are computed, or similarity(probe (D,),
    gallery (n, D)) -> (n,). gallery is an array or memory map in float32 or float16; `block` of its rows, as many
    columns of scores and no more are in memory, for 1024 probes at a time.
    Kept from block to block: best, best_at (P, k), and floor, each probe's k-th best. Only scores above it can enter; a
    block is folded to 64 rows, so that one maximum rules out 64 columns."""
    if len(probes) > 1024:
        parts = [search(gallery, part, k, block, similarity) for part in torch.as_tensor(probes).split(1024)]
        return tuple(np.concatenate(part) for part in zip(*parts))
    k, probes = min(k, len(gallery)), torch.as_tensor(probes).float()
    rows = np.repeat(np.arange(len(probes)), k)
    floor, block, since = None, min(-(-max(block, k) // 64) * 64, len(gallery)), time.monotonic()
    read, room = torch.from_numpy(np.empty_like(gallery[:block])), torch.empty(len(probes) * block)     # used again
    for start in range(0, len(gallery), block):
        n = min(block, len(gallery) - start)
        read.numpy()[:n] = gallery[start:start + n]
        g = read[:n].float()
        s = torch.stack([similarity(p, g) for p in probes]).float() if similarity else torch.mm(
            probes, g.T, out=room[:len(probes) * n].view(-1, n))                 # (P, n)
        if floor is None:
            who, where = torch.nonzero(s >= s.topk(k)[0][:, -1:], as_tuple=True)
            who, where, value = who.numpy(), where.numpy(), s[who, where].numpy()
        else:
            s = (F.pad(s, (0, -n % 64), value=-np.inf) if n % 64 else s).view(len(s), 64, -1)
            who, cell = torch.nonzero(s.amax(1) > floor, as_tuple=True)
            value = s[who, :, cell]                                              # (n, 64)
            i, j = torch.nonzero(value > floor[who], as_tuple=True)
            where = (j * s.shape[2] + cell[i]).numpy() + start
            who, value = who[i].numpy(), value[i, j].numpy()
            who, where = np.append(rows, who), np.append(best_at, where)
            value = np.append(best, value)
        order = np.lexsort((where, -value, who))
        first = np.searchsorted(who[order], np.arange(len(probes)))
        keep = order[first[:, None] + np.arange(k)]                              # (P, k)
        best, best_at = value[keep], where[keep]
        floor = torch.from_numpy(best[:, -1:])
        if isinstance(gallery, np.memmap):
            data.forget(gallery)
        data.progress("searching", min(start + block, len(gallery)), len(gallery), since, "embeddings")
    return best, best_at


@torch.no_grad()
def closed_set(net, criterion, probe, train, classes):
    """(top-1, top-5) accuracy in 0..1 of probe = (Images, labels, rows): the loss's margin-free logits where it
    has class weights, otherwise the nearest centroid of up to 8 training images a person."""
    images, labels, rows = probe
    if criterion.weight is not None:
        z = embed(net, images, unit=False, rows=rows)
        device = criterion.weight.device
        ranked = torch.cat([criterion.top(b.to(device), min(5, classes)).cpu() for b in z.split(1024)])
    else:
        t_images, t_labels, t_rows = train
        order = t_rows[np.argsort(t_labels[t_rows], kind="stable")]
        starts = np.searchsorted(t_labels[order], t_labels[order])                  # of each one's own class
        few = order[np.arange(len(order)) - starts < 8]
        middle = centroids(embed(net, t_images, criterion.project, rows=few), t_labels[few], classes)
        z = embed(net, images, criterion.project, rows=rows)
        ranked = torch.cat([(b @ middle.T).topk(min(5, classes), 1)[1] for b in z.split(1024)])
    hits = ranked == torch.from_numpy(labels[rows])[:, None]
    return hits[:, 0].double().mean().item(), hits.any(1).double().mean().item()


def evaluate(net, criterion, sets, classes, metric=None, mirror="mean"):
    """The one evaluation, of train.py after each epoch and of verify.py. sets maps val_pairs to (Images, Pairs)
    and train, dev to (Images, labels, rows), None where missing. Returns a dictionary: the keys of eer.report(),
    scores and embeddings where there are validation pairs, acc1 and acc5 where there is a dev set."""
    out = {}
    if sets.get("val_pairs"):
        images, pairs = sets["val_pairs"]
        out["scores"], out["embeddings"] = scored(net, criterion, images, pairs, metric, mirror)
        out |= eer.report(pairs.labels, out["scores"])
    if sets.get("dev"):
        out["acc1"], out["acc5"] = closed_set(net, criterion, sets["dev"], sets["train"], classes)
    return out


def pack(files, args, cache, what, spare=0.01):
    """data.pack() as a checkpoint's args say."""
    return data.pack(files, args["size"], cache, what, args.get("crop", 1.0), spare)


def pack_pairs(pairs, args, cache, what):
    """(Images, Pairs) of a list of pairs, every image of which must be readable."""
    return pack(pairs.files, args, cache, what, 0)[0], pairs


def mark(pairs):
    """A digest of which images (folder and file) are paired in which order, wherever the set lies."""
    names = ["/".join(Path(pairs.files[i]).parts[-2:]) for side in (pairs.left, pairs.right) for i in side]
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:16]


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    data.write(path, text.getvalue())


def write_submission(path, scores, root):
    """ID,score rows, 0-based, in the order of the pairs; header and length as in the set's sample submission."""
    header = ["ID", "Label"]
    for sample in sorted(Path(root).glob("*sample*submission*.csv")):
        rows = [line.split(",") for _, line in data.lines(sample)]
        if len(rows) - 1 != len(scores):
            raise ValueError(f"{sample}: {len(rows) - 1} rows, but there are {len(scores)} test pairs; the sample is"
                             " of another set: remove it, or bring the test pairs that belong to it")
        header = rows[0]
    if not np.isfinite(scores).all():
        raise ValueError(f"pair {int(np.argmin(np.isfinite(scores)))} has a score that is not finite, so {path} is not"
                         " written; the weights diverged: train again with a lower --lr")
    write_csv(path, header, enumerate(map(repr, scores.tolist())))


# ---- Decisions: a threshold, two images, one among many --------------------------------------------------------

def known_pairs(net, criterion, ckpt, args):
    """(labels, scores, mark) that a threshold is chosen on: of --threshold-from, a list of pairs or another checkpoint
    of the same loss, or of the checkpoint's validation pairs; None where neither has scores of this metric."""
    if args.threshold_from and args.threshold_from.endswith(".pt"):
        other = load(args.threshold_from)
        if other["args"]["loss"] != ckpt["args"]["loss"]:   # not the spec: s and m may differ with the people
            raise ValueError(f"{args.threshold_from} is of --loss {other['args']['loss']}, whose scores are others;"
                             " name one of the same loss")
        ckpt = other
    elif args.threshold_from:
        pairs = data.read_pairs(args.threshold_from, args.images)
        if pairs.labels is None:
            raise ValueError(f"{args.threshold_from}: pairs without labels; a threshold needs 0 or 1 in each line")
        images, _ = pack_pairs(pairs, ckpt["args"], data.cache_folder(args.images), "threshold_pairs")
        return pairs.labels, scored(net, criterion, images, pairs, args.metric, args.mirror)[0], mark(pairs)
    if not ckpt.get("val") or args.mirror != "mean":
        return None
    labels, scores, of = ckpt["val"]["labels"].numpy(), ckpt["val"]["scores"].numpy(), ckpt["val"].get("mark")
    if args.metric in (None, own := "learned" if criterion.score or criterion.projections else "cosine"):
        return labels, scores, of
    euclidean = (args.metric, own) == ("euclidean", "cosine")
    return (labels, -np.sqrt(np.maximum(2 - 2 * scores, 0)), of) if euclidean else None


def threshold_of(known, far):
    """(threshold, why) from known_pairs(): the EER's, or the lowest that keeps a false accept rate."""
    if not known:
        return -np.inf, ("the checkpoint has no threshold: only the best.pt of a run with validation pairs has, for the"
                         " metric that it was trained with; give --threshold-from")
    labels, scores, _ = known
    if not far:
        rate, threshold = eer.eer(labels, scores)
        return threshold, f"where the validation EER is {eer.percent(rate)}"
    n = int((labels == 0).sum())
    return eer.at_far(labels, scores, far), f"for FAR {far:g} on validation" + (
        "" if far * n >= 1 else f"; {n} impostor pairs cannot tell so low a rate, it lies above them all")


def two_images(net, criterion, ckpt, args):
    """The score of two image files and what the validation pairs say about it: (result, text, {})."""
    a = ckpt["args"]
    images = np.stack([data.decode(f, a["size"], a.get("crop", 1.0)) for f in args.files])
    pairs = data.Pairs(args.files, np.array([0]), np.array([1]), None)
    s = float(scored(net, criterion, images, pairs, args.metric, args.mirror)[0][0])
    known = known_pairs(net, criterion, ckpt, args)
    threshold, why = threshold_of(known, args.far)
    if not known:
        return dict(score=s), f"score {s:.4f}; {why}", {}
    genuine, impostor = eer.split(*known[:2])
    same, lower, higher = s >= threshold, np.mean(genuine < s), np.mean(impostor >= s)
    return dict(score=s, same=same, threshold=threshold, genuine_lower=lower, impostor_higher=higher), (
        f"score {s:.4f}: {'same person' if same else 'different people'} (threshold {threshold:.4f}, {why})\n"
        f"of a hundred genuine validation pairs {100 * lower:.3g} score lower, of a hundred impostor pairs"
        f" {100 * higher:.3g} as high or higher ({len(genuine)} and {len(impostor)} pairs)"), {}


def save_embeddings(path, z, files, names=None):
    """z (N, D) as path, in float16 if that ends in .f16.npy, and beside it a .txt: image, tab, identity if known."""
    path, buffer = Path(path).with_suffix(".npy"), io.BytesIO()
    np.save(buffer, np.asarray(z, np.float16 if path.stem.endswith(".f16") else np.float32))
    data.write(path, buffer.getbuffer())
    data.write(path.with_suffix(".txt"), "".join(f"{f}\t{n}\n" for f, n in zip(files, names or [""] * len(files))))


def embedded(net, ckpt, args, folder, project):
    """(embeddings (N, D), files, identities or None) of a folder in any layout, or of what save_embeddings() wrote."""
    if str(folder).endswith(".npy"):
        try:
            z, listing = np.load(folder, mmap_mode="r"), Path(folder).with_suffix(".txt")
        except (EOFError, ValueError):
            raise ValueError(f"{folder}: not what --save-embeddings wrote; save it anew") from None
        rows = [row.partition("\t") for _, row in data.lines(listing)]
        if z.ndim != 2 or not 0 < len(z) == len(rows):
            raise ValueError(f"{listing}: {len(rows)} lines, but {folder} has the shape {z.shape}; save them anew")
        names = [name for _, _, name in rows]
        return z, [f for f, _, _ in rows], names if any(names) else None
    files, names = data.read_split(folder)
    if not files:
        raise ValueError(f"{folder}: no such folder, or no images in it and its sub-folders; name another")
    images, good = pack(files, ckpt["args"], data.cache_folder(folder), "faces")
    z = embed(net, images, project, args.mirror, rows=good).numpy()
    return z, [files[i] for i in good], names and [str(names[i]) for i in good]


def truth_of(folder, n):
    """Who n flat probes are, where the older Kaggle's CSV beside their folder tells; not beside a test folder."""
    for path in (Path(folder).parent / name for name in ("verification_dev.csv", "dev_identities.csv")):
        if path.is_file() and "test" not in Path(folder).name:
            with open(path, newline="", encoding="utf-8-sig") as f:
                labels = [row.get("label") for row in csv.DictReader(f)]
            if len(labels) != n or None in labels:
                raise ValueError(f"{path}: {len(labels)} rows for the {n} images of {folder}; it takes a column label"
                                 " and a row for each image, in the order of their names")
            return labels


def identification(scores, hits, mated):
    """Rates in 0..1 of a search: scores (P,) of the best match, hits (P, k) whether match k is right, mated (P,)
    whether the gallery holds that person. rank1, rank5: of the mated probes. 'dir@far=1e-2' and its like: detection
    and identification, the mated probes whose first match is right and above the threshold that a share far of the
    others exceeds (Phillips, Grother and Micheals 2011); NaN where fewer than 1/far others cannot tell."""
    others, first = int((~mated).sum()), hits[mated, 0]
    if not mated.any():
        return dict(mated=0, unmated=others)
    out = dict(rank1=first.mean(), rank5=hits[mated, :5].any(1).mean(), mated=int(mated.sum()), unmated=others)
    for f in eer.FARS[1:]:
        out[f"dir@far={f}"] = np.nan if float(f) * others < 1 else np.mean(
            first & (scores[mated] >= eer.at_far(mated, scores, float(f))))
    return out


def identify(net, criterion, ckpt, args):
    """The best match of each probe, or none: (result, text, {}). Writes --out, and ranks.png with --plots."""
    project, similarity = metric_of(criterion, args.metric)
    z, files, names = embedded(net, ckpt, args, args.gallery, project)
    if args.save_embeddings:
        save_embeddings(args.save_embeddings, z, files, names)
    if not args.probes:
        return dict(images=len(z)), f"{len(z)} images of {args.gallery}: {args.save_embeddings or 'give --probes'}", {}
    people, first, labels = np.unique(names or [Path(f).stem for f in files], return_index=True, return_inverse=True)
    if len(people) < len(z):
        z = centroids(torch.from_numpy(np.array(z, np.float32)), labels, len(people)).numpy()
    else:                                                                        # as it is, perhaps beyond memory
        people, first = people[labels], np.arange(len(z))
    p, probes, truth = embedded(net, ckpt, args, args.probes, project)
    if p.shape[1] != z.shape[1]:
        raise ValueError(f"{args.gallery}: {z.shape[1]} numbers an embedding, but the probes have {p.shape[1]}; save it"
                         " anew with this checkpoint")
    truth = truth or truth_of(args.probes, len(probes))
    scores, found = search(z, np.array(p, np.float32), 5, similarity=similarity)         # (P, 5)
    threshold, why = threshold_of(known_pairs(net, criterion, ckpt, args), args.far)
    right, told = scores[:, 0] >= threshold, people[found]
    answers, out = np.where(right, told[:, 0], "n000000"), args.out or "identification.csv"
    write_csv(out, ["id", "label"], enumerate(answers))
    result = dict(threshold=threshold, probes=[
        dict(image=f, match=str(a) if ok else None, score=float(s), nearest=n.tolist())
        for f, a, ok, s, n in zip(probes, answers, right, scores[:, 0], told)])
    text = [f"{r['image']}  {r['match'] or 'no match'}  {r['score']:.4f}" for r in result["probes"]]
    text.append(f"{len(probes)} probes among {len(people)} people: {out}; threshold {threshold:.4f}, {why}")
    hits = np.zeros(found.shape, bool)
    if truth:
        hits, mated = told == np.array(truth)[:, None], np.isin(truth, people)
        rates = identification(scores[:, 0], hits, mated)
        rates["accuracy"] = np.mean(np.where(mated, hits[:, 0] & right, ~right))
        result |= rates
        text.append("   ".join(f"{k} {v if isinstance(v, int) else eer.percent(v)}" for k, v in rates.items()))
    if args.plots:
        tiles = []
        for i in np.unique(np.linspace(0, len(probes) - 1, 8).astype(int)):
            tiles.append((data.decode(probes[i], 112), f"probe\n{truth[i] if truth else Path(probes[i]).stem}", None))
            for j, s, hit in zip(found[i], scores[i], hits[i]):
                caption = f"{s:.3f}{'' if s >= threshold else ', no match'}\n{people[j]}"
                colour = "#3a9d5d" if hit else "#d1495b" if truth and s >= threshold else None
                tiles.append((data.decode(files[first[j]], 112), caption, colour))
        data.sheet(plots(args) / "ranks.png", "Probes and the five nearest people of the gallery", [
            (f"threshold {threshold:.4f}" + "; green: that person, red: accepted, but somebody else" * bool(truth),
             1 + found.shape[1], tiles)])
    return result, "\n".join(text), {}


# ---- Pictures and tables ---------------------------------------------------------------------------------------

def plots(args):
    Path(args.plots).mkdir(parents=True, exist_ok=True)
    return Path(args.plots)


def draw_scores(folder, judged):
    """roc.png and scores.png of judged: {name: (labels, scores, mark)}."""
    roc, det, panels = {}, {}, []
    for i, (name, (labels, scores, _)) in enumerate(judged.items()):
        (rate, threshold), (far, tar, _) = eer.eer(labels, scores), eer.roc(labels, scores)
        for series, tars, at in ((roc, tar, 1 - rate), (det, 1 - tar, rate)):
            series[f"{name}, EER {eer.percent(rate)}"] = 100 * far, 100 * tars, "line", i
            series[f"_{name}"] = [100 * rate], [100 * at], "points", i
        edges = np.linspace(scores.min(), scores.max() + 1e-9, 41)
        bars = [100 * np.histogram(scores[labels == y], edges)[0] / (labels == y).sum() for y in (0, 1)]
        panels.append((name, "score", "% of the pairs", {
            "impostor": (edges, bars[0], "bars", 1), "genuine": (edges, bars[1], "bars", 0),
            f"threshold {threshold:.3f}": ([threshold] * 2, [0, np.max(bars)], "line", 3)}))
    data.plot(folder / "roc.png", [
        ("ROC; dot: equal error rate", "false accept rate, %", "true accept rate, %", roc, "logx"),
        ("DET; dot: equal error rate", "false accept rate, %", "false reject rate, %", det, "logx logy")], 480, 360)
    data.plot(folder / "scores.png", panels)


def draw_hardest(path, images, pairs, scores, threshold):
    """The impostor pairs of highest and the genuine pairs of lowest score; those on the wrong side are framed."""
    def tile(i):
        files = [Path(pairs.files[side[i]]).stem for side in (pairs.left, pairs.right)]
        one, two = images[[pairs.left[i], pairs.right[i]]]
        both = np.concatenate([one, np.full_like(one, 255)[:, :images.size // 24 + 1], two], 1)
        wrong = (scores[i] >= threshold) != pairs.labels[i]
        return both, f"{scores[i]:.3f}\n{files[0]}\n{files[1]}", "#d1495b" if wrong else None

    order, same = np.argsort(scores, kind="stable"), pairs.labels == 1
    data.sheet(path, f"The hardest pairs; framed: errors at threshold {threshold:.4f}", [
        (f"{what}: {((scores >= threshold) != same)[same == y].sum()} of {(same == y).sum()} are {error}", 4,
         [tile(i) for i in ranked[same[ranked] == y][:8]])
        for what, y, error, ranked in (("two people, most alike", False, "accepted", order[::-1]),
                                       ("one person, least alike", True, "rejected", order))])


def plane(net, criterion, train):
    """A panel of 2-D embeddings of the first ten people's training images, and their class weights as rays."""
    images, labels, rows = train
    rows = rows[labels[rows] < 10][:2000]
    z, series = embed(net, images, mirror="none", unit=False, rows=rows).numpy(), {}
    for c in np.unique(labels[rows]):
        if criterion.weight is not None:
            ray = F.normalize(criterion.weight[c].detach().cpu(), dim=0).numpy() * np.linalg.norm(z, axis=1).max()
            series[f"_ray {c}"] = [0, ray[0]], [0, ray[1]], "line", c
        series[f"_{c}"] = *z[labels[rows] == c].T, "points", c
    return criterion.spec, "first number of the embedding", "second", series, "equal"


def compare(folders):
    """Runs of train.py, lowest validation EER first: (result, Markdown table)."""
    runs = []
    for folder in map(Path, folders):
        try:
            ckpt, log = load(folder / "best.pt"), list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
            modules, row = build(ckpt), next(r for r in log if int(r["step"]) == ckpt["step"])
        except (ValueError, OSError, StopIteration, KeyError) as e:
            lacks = isinstance(e, (StopIteration, KeyError))
            print("left out:", f"{folder}: log.csv lacks the step of best.pt" if lacks else e, file=sys.stderr)
            continue
        val = ckpt.get("val") and [ckpt["val"][k].numpy() for k in ("labels", "scores")]
        r = eer.report(*val) if val else {"eer": np.nan, "tar@far=1e-2": np.nan}
        runs.append({"run": str(folder), "loss": modules[1].spec, "arch": ckpt["args"]["arch"], "epochs": len(log),
                     "EER": r["eer"], "TAR at FAR 1e-2": r["tar@far=1e-2"],
                     "accuracy on dev": float(row["acc"]),
                     "seconds": round(float(log[-1]["seconds"])),
                     "parameters": sum(w.numel() for m in modules for w in m.parameters())})
    if not runs:
        raise ValueError(f"{' '.join(folders)}: no run of train.py with a best.pt and a log.csv; name runs/*")
    runs.sort(key=lambda r: np.nan_to_num(r["EER"], nan=2))
    shown = {float: eer.percent, int: "{:,}".format, str: str}
    return {"runs": runs}, eer.table([list(runs[0])] + [[shown[type(v)](v) for v in r.values()] for r in runs])


# ---- Command line ----------------------------------------------------------------------------------------------

def moved(known, labels, scores, far):
    """(accuracy, FAR and FRR as a dictionary, a line about them) at the threshold that known pairs choose: the best, or
    with far the lowest that keeps that rate."""
    threshold = eer.at_far(*known[:2], far) if far else eer.best_threshold(*known[:2])
    far, tar = eer.rates(*eer.split(labels, scores), threshold)
    acc = np.mean((scores >= threshold) == (labels == 1))
    return dict(threshold=threshold, acc=acc, far=far, frr=1 - tar), (
        f"at threshold {threshold:.4f} of --threshold-from: accuracy {eer.percent(acc)}, FAR {eer.percent(far)}, FRR"
        f" {eer.percent(1 - tar)}")


def together(lists):
    """(labels, mean scores, mark) of (labels, scores, mark) each; None where they are known to be of other pairs."""
    labels, scores, marks = zip(*lists)
    alike = all(np.array_equal(each, labels[0]) for each in labels) and len({m for m in marks if m}) < 2
    return (labels[0], np.mean(scores, 0), marks[0]) if alike else None


def tell(result, text, as_json):
    if as_json:
        print(json.dumps(json.loads(json.dumps(result), parse_constant=lambda name: None)))    # NaN becomes null
    else:
        print(text)


def judge(net, criterion, ckpt, args):
    """A checkpoint on pairs and, on its own data set, on dev and test: (result, text, drawn). drawn holds what is left
    to do: judged, known, test, each (labels, scores, mark); val (Images, Pairs, scores) to draw the hardest of; train
    (Images, labels, rows); set, the (path, root) of the test pairs."""
    a, classes = ckpt["args"], len(ckpt["names"])
    if args.pairs:
        pairs, faces = data.read_pairs(args.pairs, args.images), {"root": Path(args.images)}
        faces["test_pairs" if pairs.labels is None else "val_pairs"] = pairs
    else:
        faces = vars(data.load(args.data or a["data"], a["holdout"], a["seed"]))
    sets = {k: faces[k] for k in ("val_pairs", "test_pairs") if faces.get(k)}
    if not sets:
        raise ValueError(f"{faces['root']}: neither val_pairs nor test_pairs; give --pairs and --images")
    cache = data.cache_folder(faces["root"])
    sets = {k: pack_pairs(pairs, a, cache, k) for k, pairs in sets.items()}
    if faces.get("names") == ckpt["names"]:
        drawing = bool(args.plots) and a["dim"] == 2
        for k in ("train", "dev", "test") if criterion.weight is None or drawing else ("dev", "test"):
            files, labels = faces[k] or (None, None)
            if labels is not None:
                images, good = pack(files, a, cache, k)
                sets[k] = images, labels, good
    lines, embeddings, drawn, result = [faces.get("note")], [], {"train": sets.get("train")}, {}
    if "val_pairs" in sets:
        images, pairs = sets["val_pairs"]
        result = evaluate(net, criterion, {"val_pairs": sets["val_pairs"]}, classes, args.metric, args.mirror)
        scores = result.pop("scores")
        drawn |= {"val": (images, pairs, scores), "judged": (pairs.labels, scores, mark(pairs))}
        embeddings.append((result.pop("embeddings"), pairs.files))
        lines += [pairs.path and str(pairs.path), eer.show(result)]
        if pairs.folds is not None:
            mean, error = eer.folds_accuracy(pairs.labels, scores, pairs.folds)
            result |= dict(folds_acc=mean, folds_error=error)
            lines.append(f"accuracy over {len(set(pairs.folds))} folds {100 * mean:.2f} +- {100 * error:.2f} %"
                         " (standard error; each at the threshold that is best on the others)")
        if args.threshold_from:
            if not (known := known_pairs(net, criterion, ckpt, args)):
                raise ValueError(f"{args.threshold_from}: no validation scores of this metric; name another best.pt")
            drawn["known"] = known
            result["threshold_from"], line = moved(known, pairs.labels, scores, args.far)
            lines.append(line)
    for k in [k for k in ("dev", "test") if k in sets]:
        result[f"{k}_acc1"], result[f"{k}_acc5"] = top = closed_set(net, criterion, sets[k], sets.get("train"), classes)
        lines.append(f"{k}, closed set: top-1 {eer.percent(top[0])}, top-5 {eer.percent(top[1])}")
    if {"dev_acc1", "eer"} <= set(result):
        result["combined"] = 0.5 * result["dev_acc1"] + 0.5 * (1 - result["eer"])
        lines.append(f"combined score, 0.5 top-1 on dev + 0.5 (1 - EER): {result['combined']:.4f}")
    if "test_pairs" in sets:
        images, pairs = sets["test_pairs"]
        scores, z = scored(net, criterion, images, pairs, args.metric, args.mirror)
        embeddings.append((z, pairs.files))
        drawn |= {"test": (None, scores, mark(pairs)), "set": (pairs.path, faces["root"])}
    if args.save_embeddings:
        z, files = zip(*embeddings)
        save_embeddings(args.save_embeddings, torch.cat(z), sum(files, []))
    return result, "\n".join(filter(None, lines)), drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.usage
    parser.add_argument("files", nargs="*", metavar="IMAGE", help="two images to compare")
    parser.add_argument("--ckpt", nargs="+", default=["best.pt"], help="checkpoint of train.py; several, and CSV files"
                        " of label,score, are judged one by one and by the mean of their scores [best.pt]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=device,
                        help="[%(default)s]")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="print a table of these folders of train.py")
    g = parser.add_argument_group("what to judge")
    g.add_argument("--data", help="data set to evaluate [the one the checkpoint was trained with]")
    g.add_argument("--pairs", help="pairs to score instead of a data set's: the homework's .txt or .csv, LFW's lists")
    g.add_argument("--images", default=".", help="folder that the names in --pairs are relative to [.]")
    g.add_argument("--gallery", metavar="DIR", help="known people: a folder each, or flat, or --save-embeddings' .npy")
    g.add_argument("--probes", metavar="DIR", help="images to find in the gallery, likewise; sub-folders, or a"
                   " verification_dev.csv beside the folder, tell who they are")
    g = parser.add_argument_group("how")
    g.add_argument("--metric", choices=["cosine", "euclidean", "learned"], help="similarity of two embeddings [learned"
                   " where the loss has one, otherwise cosine]")
    g.add_argument("--mirror", choices=["mean", "concat", "none"], default="mean",
                   help="what becomes of the embeddings of an image and its mirror image [mean]")
    g.add_argument("--far", type=float, help="decide at the threshold of this false accept rate, 1e-3 say [the EER's]")
    g.add_argument("--threshold-from", metavar="FILE", nargs="+", help="choose the threshold on these labelled pairs,"
                   " images in --images, or on the validation pairs of a best.pt, one for each --ckpt: of pairs the"
                   " most accurate, otherwise the EER's [the checkpoint's own pairs]")
    g = parser.add_argument_group("what to write")
    g.add_argument("--out", help="scores of test pairs, or the probes' names [submission.csv, identification.csv; none"
                   " for several checkpoints]")
    g.add_argument("--plots", metavar="DIR", help="roc.png, scores.png, hardest.png and scores.csv; ranks.png for"
                   " --probes; embeddings.png for checkpoints of --dim 2 [none]")
    g.add_argument("--save-embeddings", metavar="FILE.npy", help="the embeddings of the pairs' or the gallery's images,"
                   " with FILE.txt listing the images; float16 for FILE.f16.npy [no]")
    g.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    images = [c for c in args.ckpt if os.path.splitext(c)[1].lower() in data.SUFFIXES]      # --ckpt C one.jpg two.jpg
    args.files, args.ckpt = args.files + images, [c for c in args.ckpt if c not in images]
    if len(args.files) not in (0, 2):
        raise ValueError(f"{len(args.files)} images; give two to compare")
    if args.far is not None and not 0 < args.far < 1:
        raise ValueError(f"--far {args.far:g}: a rate lies between 0 and 1; give 1e-3 for one in a thousand")
    if args.save_embeddings and (len(args.ckpt) > 1 or args.files):
        raise ValueError("--save-embeddings takes one checkpoint, and pairs or a gallery")
    from_each = args.threshold_from or [None]
    if len(from_each) not in (1, len(args.ckpt)):
        raise ValueError(f"--threshold-from: {len(from_each)} files for {len(args.ckpt)} checkpoints; give one each")
    folder = Path(args.out or "submission.csv").resolve().parent
    if not (args.compare or args.files or os.access(folder, os.W_OK)):
        raise ValueError(f"{args.out or os.getcwd()}: that folder is not there or is read-only; give another --out")
    if args.probes and not args.gallery:
        raise ValueError("--probes needs --gallery, the images of known people")
    mode = two_images if args.files else identify if args.gallery else judge
    if mode is not judge and (len(args.ckpt) != 1 or args.ckpt[0].endswith(".csv")):
        raise ValueError(f"--ckpt {' '.join(args.ckpt)}: this takes one checkpoint")
    if args.plots:
        plots(args)
    if args.compare:
        return tell(*compare(args.compare), args.json)
    torch.set_float32_matmul_precision("high")              # TF32, as in training
    done, planes = {}, []                                   # name -> (result, text, drawn), see judge()
    for path, args.threshold_from in zip(args.ckpt, from_each * (len(args.ckpt) if len(from_each) == 1 else 1)):
        own = Path(path).resolve()
        name = own.parent.name if own.stem in ("best", "last") and own.parent.name not in done else own.stem
        name = path if name in done else name
        if path.endswith(".csv"):
            labels, scores = eer.read(path)
            r = eer.report(labels, scores)
            done[name] = r, eer.show(r), {"judged": (labels, scores, None)}
            continue
        ckpt = load(path)
        net, criterion = build(ckpt, args.device)
        if args.mirror == "concat" and criterion.score and args.metric in (None, "learned"):
            raise ValueError(f"--mirror concat: {criterion.spec} learned a metric of single embeddings; use mean")
        done[name] = mode(net, criterion, ckpt, args)
        if args.plots and ckpt["args"]["dim"] == 2 and (train := done[name][2].get("train")):
            planes.append(plane(net, criterion, train))

    results = {name: result for name, (result, _, _) in done.items()}
    texts = [f"{name}:\n{text}" if len(done) > 1 else text for name, (_, text, _) in done.items()]
    judged = {name: drawn["judged"] for name, (_, _, drawn) in done.items() if "judged" in drawn}
    known, tests = ([drawn[k] for _, _, drawn in done.values() if k in drawn] for k in ("known", "test"))
    drawn = done[name][2]
    if len(judged) > 1 and (both := together(judged.values())):
        judged["together"], results["together"] = both, eer.report(*both[:2])
        texts.append(f"together, the mean of their scores:\n{eer.show(results['together'])}")
        if len(known) == len(done) and (of := together(known)):
            results["together"]["threshold_from"], line = moved(of, *both[:2], args.far)
            texts.append(line)
    if args.plots and judged:
        draw_scores(plots(args), judged)
        if "val" in drawn and len(done) == 1:
            images, pairs, scores = drawn["val"]
            draw_hardest(plots(args) / "hardest.png", images, pairs, scores, results[name]["threshold"])
            write_csv(plots(args) / "scores.csv", ["label", "score"], zip(pairs.labels, map(repr, scores.tolist())))
    if planes:
        data.plot(plots(args) / "embeddings.png", planes, 300, 300)
    tell(next(iter(results.values())) if len(results) == 1 else results, "\n".join(filter(None, texts)), args.json)
    if mode is judge and (args.out or tests and len(done) == 1):
        if len(tests) < len(done) or not (mean := together(tests)):
            raise ValueError(f"--out {args.out}: not every checkpoint has the same test pairs, so nothing is written;"
                             " leave it out, or name one set with --data, or --pairs without labels")
        out, (path, root) = args.out or "submission.csv", drawn["set"]
        write_submission(out, mean[1], root)
        if not args.json:
            print(f"{len(mean[1])} pairs of {path} scored: {out}")


if __name__ == "__main__":
    data.cli(main)
