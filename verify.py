"""Tell whether two faces are of the same person.

    python verify.py --ckpt best.pt                              # the checkpoint's data: EER, submission.csv
    python verify.py --ckpt best.pt --data DIR --out my.csv
    python verify.py --ckpt best.pt one.jpg two.jpg              # a score, and same or different
    python verify.py --ckpt best.pt --pairs FILE --images DIR    # any list of pairs

An image and its mirror go through the backbone, their mean is the embedding; a pair's score is the cosine of its
two embeddings. Each distinct image is embedded once, in float32, so that scores depend neither on the batch size
nor on the order of the pairs.
"""
import argparse
import csv
import io
import os
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
    if lacks := ({"args", "names", "model", "ema", "loss"} - ckpt.keys()
                 or {"arch", "dim", "size", "loss", "data", "holdout", "seed"} - ckpt["args"].keys()):
        raise ValueError(f"{path}: damaged, it lacks {', '.join(sorted(lacks))}; name another best.pt or last.pt")
    return ckpt


def build(ckpt, device="cpu"):
    """(backbone, loss module) of a checkpoint, in eval mode."""
    a = ckpt["args"]
    net = models.make(a["arch"], a["dim"], a["size"])
    criterion = losses.make(a["loss"], a["dim"], len(ckpt["names"]))
    try:
        net.load_state_dict(ckpt["ema"] or ckpt["model"])
        criterion.load_state_dict(ckpt["loss"])
    except RuntimeError:                                    # dozens of lines, one a tensor
        raise ValueError(f"the checkpoint's weights do not fit {a['arch']} and {a['loss']}; it comes from another"
                         " version of these scripts: train again") from None
    return net.to(device).eval(), criterion.to(device).eval()


@torch.no_grad()
def embed(model, images, project=None, mirror="mean", unit=True, batch_size=256, rows=None):
    """uint8 images (N, S, S, 3), an array or data.Images -> unit embeddings (N, D) on the CPU, or the
    unnormalised ones with unit=False. rows selects images by number. mirror: mean of the embeddings of image and
    mirror image, their concat, or none. project is the loss's own last layer, where it has one.
    ValueError if an embedding is not finite. Under torchrun each process embeds a part, and all receive all."""
    device = next(model.parameters()).device
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


def score(z, pairs, learned=None):
    """Scores (n,) float64 of pairs over embeddings z, row i of which belongs to pairs.files[i]."""
    a, b = z[torch.from_numpy(pairs.left)], z[torch.from_numpy(pairs.right)]
    s = learned(a, b) if learned else (a.double() * b.double()).sum(1)
    return s.detach().double().numpy()


def centroids(z, labels, classes):
    """Unit mean embedding (classes, D) of each class of unit embeddings z (N, D); zero for absent classes."""
    return F.normalize(z.new_zeros(classes, z.shape[1]).index_add_(0, torch.from_numpy(labels), z))


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


def evaluate(net, criterion, sets, classes):
    """The one evaluation, of train.py after each epoch and of verify.py. sets maps val_pairs to (Images, Pairs)
    and train, dev to (Images, labels, rows), None where missing. Returns a dictionary: the keys of eer.report()
    and scores where there are validation pairs, acc1 and acc5 where there is a dev set."""
    out = {}
    if sets.get("val_pairs"):
        images, pairs = sets["val_pairs"]
        out["scores"] = score(embed(net, images, criterion.project), pairs, criterion.score)
        out.update(eer.report(pairs.labels, out["scores"]))
    if sets.get("dev"):
        out["acc1"], out["acc5"] = closed_set(net, criterion, sets["dev"], sets["train"], classes)
    return out


def pack_pairs(pairs, size, cache, what):
    """(Images, Pairs) of a list of pairs, every image of which must be readable."""
    images, good = data.pack(pairs.files, size, cache, what)
    if len(good) < len(images):
        bad = pairs.files[np.setdiff1d(np.arange(len(images)), good)[0]]
        raise ValueError(f"{pairs.path or what}: {bad} is not a readable image, and no pair can be left out; mend it")
    return images, pairs


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
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *enumerate(map(repr, scores.tolist()))])
    data.write(Path(path), text.getvalue().encode())


def two_images(net, criterion, ckpt, files):
    """Print the score of two image files and what the checkpoint's validation pairs say about it."""
    images = np.stack([data.decode(f, ckpt["args"]["size"]) for f in files])
    pairs = data.Pairs(list(files), np.array([0]), np.array([1]), None)
    s = score(embed(net, images, criterion.project), pairs, criterion.score)[0]
    if not ckpt.get("val"):
        print(f"score {s:.4f}; the checkpoint has no threshold: only the best.pt of a run with validation pairs has")
        return
    labels, scores = (ckpt["val"][k].numpy() for k in ("labels", "scores"))
    rate, threshold = eer.eer(labels, scores)
    print(f"score {s:.4f}: {'same person' if s >= threshold else 'different people'} (threshold {threshold:.4f},"
          f" where the validation EER is {100 * rate:.2f} %)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.usage
    parser.add_argument("files", nargs="*", metavar="IMAGE", help="two images to compare")
    parser.add_argument("--ckpt", default="best.pt", help="checkpoint of train.py [best.pt]")
    parser.add_argument("--data", help="data set to evaluate [the one the checkpoint was trained with]")
    parser.add_argument("--pairs", help="file of pairs to score instead of a data set's")
    parser.add_argument("--images", default=".", help="folder that the names in --pairs are relative to [.]")
    parser.add_argument("--out", default="submission.csv", help="where the scores of unlabelled pairs go"
                        " [submission.csv]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=device,
                        help="[%(default)s]")
    args = parser.parse_args()
    if len(args.files) not in (0, 2):
        raise ValueError(f"{len(args.files)} images; give two to compare")
    if not os.access(Path(args.out).resolve().parent, os.W_OK):
        raise ValueError(f"{args.out}: its folder is not there or is read-only; give another --out")
    ckpt = load(args.ckpt)
    a = ckpt["args"]
    net, criterion = build(ckpt, args.device)
    if args.files:
        return two_images(net, criterion, ckpt, args.files)
    if args.pairs:
        pairs, root = data.read_pairs(args.pairs, args.images), Path(args.images)
        sets = {"val_pairs" if pairs.labels is not None else "test_pairs": pairs}
        faces = None
    else:
        faces = data.load(args.data or a["data"], a["holdout"], a["seed"])
        root, sets = faces.root, {k: getattr(faces, k) for k in ("val_pairs", "test_pairs") if getattr(faces, k)}
        if not sets:
            raise ValueError(f"{root}: neither val_pairs nor test_pairs; give --pairs and --images")
    cache = data.cache_folder(root)
    sets = {k: pack_pairs(p, a["size"], cache, k) for k, p in sets.items()}
    if "val_pairs" in sets:
        print(f"{sets['val_pairs'][1].path or faces.note}\n"
              + eer.show(evaluate(net, criterion, {"val_pairs": sets["val_pairs"]}, len(ckpt["names"]))))
    if "test_pairs" in sets:
        images, pairs = sets["test_pairs"]
        scores = score(embed(net, images, criterion.project), pairs, criterion.score)
        write_submission(args.out, scores, root)
        print(f"{len(scores)} pairs of {pairs.path} scored: {args.out}")


if __name__ == "__main__":
    data.cli(main)
