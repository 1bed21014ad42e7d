"""Faces in, pictures out: find a data set, decode it once, hand out augmented batches.

    python data.py --data DIR           # what is in DIR: counts, images a person, sizes, unreadable files

DIR is found, not configured. It may be, or lie above,

    cls_data/{train,dev,test}/images/* + labels.txt     '<file> <integer>' a line (homework, 2025 and later)
    cls_data/{train,dev}/<person>/*                     (homework, 2024)
    <person>/*                                          any folder with one sub-folder a person

with ver_data/* and val_pairs, test_pairs beside or inside it: .txt ('<image> <image> [0|1]', no header) or .csv
(commas, a header). A set without val_pairs holds people out by seed and draws the pairs from them.

An image is decoded once, brought upright to RGB as a viewer shows it, cropped to its central square, and put as
uint8 (S, S, 3) into a pack: one memory-mapped file, named after a digest of the files it came from. A batch is
gathered from the pack by index and augmented on the device, each image by its own dice.
"""
import argparse
import contextlib
import errno
import hashlib
import io
import itertools
import math
import mmap
import os
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

try:
    import fcntl
except ImportError:                                         # Windows: two runs must not share a folder there
    fcntl = None

SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
warnings.simplefilter("error", Image.DecompressionBombWarning)


# ---- Files: what lies where, and who is on it ----------------------------------------------------------------

class Pairs(NamedTuple):
    """Pairs to verify: files[left[i]] against files[right[i]]; labels (n,) of 0/1, or None where not told; folds
    (n,) the number of each pair's fold, in LFW's pairs.txt."""
    files: list
    left: np.ndarray
    right: np.ndarray
    labels: np.ndarray | None
    path: Path | None = None
    folds: np.ndarray | None = None


def lines(path):
    """(number, text) of the lines that are not blank; a BOM, CRLF and names in any encoding are all right."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as f:
        yield from ((i, line.strip()) for i, line in enumerate(f, 1) if line.strip())


def within(folder, name, where):
    """folder/name as a string. ValueError when that leaves the folder or is not there."""
    path = os.path.join(folder, name)
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"{where}: '{name}' leaves {folder}; name images inside it")
    if not os.path.isfile(path):
        raise ValueError(f"{where}: no image '{name}' in {folder}; copy it there or delete the line")
    return path


def read_labels(folder):
    """(files, labels) of a folder with images/ and labels.txt; labels are the file's own integers."""
    seen, files, labels, images = {}, [], [], os.path.join(folder, "images")
    for i, line in lines(os.path.join(folder, "labels.txt")):
        where, (name, label) = f"{folder}/labels.txt:{i}", ["", *line.rsplit(None, 1)][-2:]
        if not label.isdecimal() or not name:
            raise ValueError(f"{where}: '{line}' is not '<file> <label>' with a label of 0, 1, 2, ...")
        if name in seen:
            raise ValueError(f"{where}: '{name}' stands on line {seen[name]} already; keep one of them")
        if " " in name and not os.path.isfile(os.path.join(images, name)):
            raise ValueError(f"{where}: '{line}' has {len(line.split())} columns, and no image has the name '{name}';"
                             " write '<file> <label>'")
        seen[name] = i
        files.append(within(images, name, where))
        labels.append(int(label))
    return files, labels


def images_in(folder):
    """The image files that lie in a folder itself."""
    return sorted(e.path for e in os.scandir(folder) if os.path.splitext(e.name)[1].lower() in SUFFIXES)


def read_people(folder):
    """(files, labels) of a folder with one sub-folder a person; labels are the sub-folders' names."""
    people = sorted((e.name, e.path) for e in os.scandir(folder) if e.is_dir() and e.name != "ver_data")
    found = [(file, name) for name, path in people for file in images_in(path)]
    return [file for file, _ in found], [name for _, name in found]


def read_split(folder):
    """(files, labels) of a folder in any layout; labels None for images/ without labels.txt and for images that lie in
    the folder itself; ([], None) for no folder."""
    if os.path.isfile(os.path.join(folder, "labels.txt")):
        return read_labels(folder)
    if not os.path.isdir(folder):
        return [], None
    files, labels = read_people(folder)
    return (files or images_in(folder), None) if set(labels) <= {"images"} else (files, labels)


def read_labelled(folder):
    """read_split() of a folder that must have images of known people."""
    files, labels = read_split(folder)
    if not labels:
        raise ValueError(f"{folder}: no labelled training images; expected labels.txt and images/, or one sub-folder"
                         " of images a person, there or in cls_data/train")
    return files, labels


def read_lfw(path, folder):
    """(rows, folds) of LFW's pair lists, as in read_pairs(): a first line 'n', or 'folds<tab>n', then for each fold n
    lines 'name i j', two images of one person, and n lines 'name i name j'. Image i is folder/name/name_000i.*"""
    (_, head), *rest = lines(path)
    folds, n = map(int, ["1", *head.split()][-2:])          # one fold where the line is 'n' alone
    if len(rest) != 2 * folds * n:
        raise ValueError(f"{path}: {len(rest)} pairs, but the first line announces {folds} x 2 x {n}; fetch it again")
    rows = []
    for i, line in rest:
        f = line.split("\t" if "\t" in line else None)
        if len(f) not in (3, 4) or not (f[1].isdecimal() and f[-1].isdecimal()):
            raise ValueError(f"{path}:{i}: '{line}'; LFW's lines are 'name i j' or 'name i name j'")
        stems = [f"{name}/{name}_{int(k):04d}" for name, k in ((f[0], f[1]), (f[-2] if len(f) == 4 else f[0], f[-1]))]
        names = [next((s + end for end in (".jpg", *SUFFIXES) if os.path.isfile(os.path.join(folder, s + end))),
                      s + ".*") for s in stems]
        rows.append((i, [*names, "1" if len(f) == 3 else "0"]))
    return rows, np.arange(len(rows)) // (2 * n) if folds > 1 else None


def read_pairs(path, folder):
    """Pairs from a .txt or .csv file whose image names are relative to folder: '<image> <image> [0|1]' lines, or
    what LFW has, known by its first line of nothing but numbers."""
    comma, folds = str(path).lower().endswith(".csv"), None
    rows = [(i, [c.strip() for c in line.split("," if comma else None)]) for i, line in lines(path)][comma:]
    if rows and not comma and "".join(rows[0][1]).isdecimal():
        rows, folds = read_lfw(path, folder)
    if not rows:
        raise ValueError(f"{path}: no pairs in it; write '<image> <image> <0|1>' a line")
    width, number, sides, labels = len(rows[0][1]), {}, [], []
    for i, row in rows:
        where = f"{path}:{i}"
        if len(row) != width or width not in (2, 3):
            raise ValueError(f"{where}: {len(row)} columns; write two images and, in every line or none, 0 or 1")
        if row[2:] not in ([], ["0"], ["1"]):
            raise ValueError(f"{where}: label '{row[2]}'; write 1 for the same person, 0 for two people")
        sides.append([number.setdefault(within(folder, name, where), len(number)) for name in row[:2]])
        labels += map(int, row[2:])
    left, right = np.array(sides).T
    if labels and len(set(labels)) == 1:
        raise ValueError(f"{path}: every pair has label {labels[0]}; an EER needs pairs of both kinds")
    return Pairs(list(number), left, right, np.array(labels) if labels else None, Path(path), folds)


def find_pairs(root, name):
    """The pairs of root/name.txt or .csv, there or in ver_data; None where there are none."""
    spots = [root / sub / f"{name}{end}" for sub in ("", "ver_data") for end in (".txt", ".csv")]
    path = next((p for p in spots if p.is_file()), None)
    images = root / "ver_data" if (root / "ver_data").is_dir() else root
    return read_pairs(path, images) if path else None


def find_root(path):
    """The folder at or below path that holds cls_data or the people's folders."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; --data takes the folder that holds cls_data or people's folders")
    found = next((hits for d in range(4) if (hits := sorted(path.glob("*/" * d + "cls_data")))), [])
    if len(found) > 1:
        raise ValueError(f"{path}: several data sets ({', '.join(str(f.parent) for f in found)}); name one of them")
    if found:
        return found[0].parent
    while len(inside := [e for e in os.scandir(path) if e.is_dir() and e.name[0] != "."]) == 1 \
            and not read_people(path)[0]:
        path = Path(inside[0].path)
    return path


def hold_out(files, labels, share, seed):
    """(rest, Pairs): a share of the people with two images or more leaves the training set, and all their genuine
    pairs (up to 10 a person, 5,000 in all) and as many impostor pairs are drawn from them."""
    images = {}
    for i, person in enumerate(labels):
        images.setdefault(person, []).append(i)
    rng = np.random.default_rng(seed)
    several = [p for p in images if len(images[p]) > 1]
    n = min(max(2, round(share * len(several))), len(images) - 2)
    if n < 2 or len(several) < 2:
        raise ValueError(f"{len(images)} people, {len(several)} of them with two images or more, are too few to hold"
                         " two out for validation; add people, or a val_pairs.txt, or train with --holdout 0")
    held = [several[i] for i in rng.permutation(len(several))[:n]]
    genuine = []
    for p in held:
        both = list(itertools.combinations(images[p], 2))
        genuine += [both[i] for i in rng.permutation(len(both))[:10]]
    genuine = [genuine[i] for i in rng.permutation(len(genuine))[:5000]]
    impostor = [tuple(rng.choice(images[held[p]]) for p in rng.choice(len(held), 2, replace=False))
                for _ in genuine]
    ids, ends = np.unique(np.array(genuine + impostor), return_inverse=True)
    rest = sorted(i for p in images.keys() - held for i in images[p])
    return rest, Pairs([files[i] for i in ids], *ends.reshape(-1, 2).T, np.repeat([1, 0], len(genuine)))


def load(path, holdout=0.1, seed=0):
    """Everything --data names: root; names (of the identities, class c is names[c]); train, dev, test, each
    (files, labels (n,)) or None, labels None where not told; val_pairs, test_pairs (Pairs or None); note, a line
    about what was decided. ValueError, naming file, line and remedy, for what cannot be used."""
    root = find_root(path)
    splits = root / "cls_data" if (root / "cls_data").is_dir() else None
    train = read_labelled(splits / "train" if splits else root)
    val, note = find_pairs(root, "val_pairs"), ""
    if val and val.labels is None:
        raise ValueError(f"{val.path}:1: no label; write '<image> <image> <0|1>', and what has no labels to test_pairs")
    if val is None and holdout:
        rest, val = hold_out(*train, holdout, seed)
        before = len(set(train[1]))
        train = [[column[i] for i in rest] for column in train]
        note = (f"no val_pairs: {before - len(set(train[1]))} of {before} people held out (seed {seed}) for"
                f" {len(val.labels)} validation pairs")
    names = sorted(set(train[1]))
    if len(names) < 2:
        raise ValueError(f"{root}: one person in all; add another, a classifier needs two at least")
    number = {name: c for c, name in enumerate(names)}

    def numbered(files, labels):
        if not labels:
            return (files, None) if files else None
        for file, name in zip(files, labels):
            if name not in number:
                raise ValueError(f"{file} is of '{name}', who is not in the training set; take it out or add images of"
                                 " that person to train")
        return files, np.array([number[name] for name in labels])

    dev, test = (splits and numbered(*read_split(splits / s)) for s in ("dev", "test"))
    return SimpleNamespace(root=root, names=list(map(str, names)), train=numbered(*train), dev=dev, test=test,
                           val_pairs=val, test_pairs=find_pairs(root, "test_pairs"), note=note)


# ---- Images: decoded once, kept in a pack ---------------------------------------------------------------------

def rgb(file):
    """A PIL image in RGB as a viewer shows it: EXIF rotation, palettes, grey, 16 bit, alpha (over white)."""
    with Image.open(file) as im:
        im = ImageOps.exif_transpose(im)
        if im.mode.startswith(("I", "F")):                  # 16-bit PNG and TIFF: convert() would clip at 255
            a = np.asarray(im, np.float32)
            im = Image.fromarray((a / (257 if a.max() > 255 else 1)).round().clip(0, 255).astype(np.uint8))
        if im.has_transparency_data:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        return im.convert("RGB")


def decode(file, size, crop=1.0):
    """uint8 (size, size, 3): of an image's central square the inner part, crop of its side. ValueError naming the file
    if it cannot be read."""
    try:
        return np.asarray(ImageOps.fit(rgb(file), (size, size), Image.BICUBIC, (1 - crop) / 2))
    except Exception as e:                                  # Pillow raises a dozen kinds on broken files
        raise ValueError(f"{file}: not a readable image ({' '.join(str(e).split()) or type(e).__name__})") from None


def measure(file):
    """(width, height) by an image's header, None where there is none; pack() is what counts the unreadable."""
    try:
        with Image.open(file) as im:
            return im.size
    except Exception:
        return None


def native_size(files):
    """The side most of the first hundred images have, within 32..256."""
    sides = Counter(min(s) for s in map(measure, files[:100]) if s)
    return min(256, max(32, sides.most_common(1)[0][0])) if sides else 112


def progress(what, done, total, since, unit="images", every=[0.0]):
    """One line with rate and time left, rewritten at most five times a second, only on a terminal."""
    now = time.monotonic()
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" and (now - every[0] > 0.2 or done == total):
        every[0], rate = now, done / max(now - since, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((total - done) / max(rate, 1e-9)))
        print(f"\r{what} {done}/{total}, {rate:.0f} {unit}/s, {left} left\x1b[K", end="\n" if done == total else "",
              file=sys.stderr, flush=True)


def forget(rows):
    """Let go of the pages of a memory map; every page ever read would count as resident memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        rows._mmap.madvise(mmap.MADV_DONTNEED)


class Images:
    """uint8 faces (n, S, S, 3) indexed by an array of row numbers: rows of a pack, or files decoded as asked."""

    def __init__(self, files, size, rows=None, crop=1.0):
        self.files, self.size, self.rows, self.crop, self.touched = files, size, rows, crop, 0

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if self.rows is None:
            with ThreadPoolExecutor() as pool:
                return np.stack(list(pool.map(lambda i: decode(self.files[i], self.size, self.crop), index)))
        self.touched += len(index)
        if self.touched * self.size ** 2 * 3 > 2 ** 28:
            forget(self.rows)
            self.touched = 0
        return self.rows[index]


def cache_folder(root):
    """Where packs are kept: root/.packs, or the user's cache where the data is read-only (as Kaggle's is)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    mark = hashlib.sha256(os.fsencode(Path(root).resolve())).hexdigest()[:12]
    for folder in (Path(root) / ".packs", home / "face-packs" / mark):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise ValueError(f"{root} is read-only and so is {home}; set XDG_CACHE_HOME to a folder with room for packs")


def reserve(path, shape):
    """A new memory-mapped uint8 array in path, its blocks promised by the disk, for writing to a mapped page that has
    none kills the process; None where there is no room, or no such thing as a memory map."""
    rows = None
    try:
        rows = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return None
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):                     # a disk that makes no promises
            raise
    return rows


def pack(files, size, cache, what="images", crop=1.0, spare=0.01):
    """(Images, good (k,)): the files as decode() has them and the rows of the readable ones. Unreadable files are
    listed beside the pack; more than a share of spare are a ValueError. The pack's name holds a digest of every file's
    path, length and time, so changed files get a new one, and the last of its kind goes; it appears by renaming, whole
    or not at all. Where the disk has no room the files are only checked now and decoded anew for each batch."""
    digest = hashlib.sha256(f"1 {size}".encode())
    kind = f"{what}-{size}" + f"x{crop:g}".replace(".", "") * (crop != 1)
    for f in files:
        s = os.stat(f)
        digest.update(os.fsencode(f"{os.path.abspath(f)}\0{s.st_size} {s.st_mtime_ns}\n"))
    stem = cache / f"{kind}-{digest.hexdigest()[:16]}"
    target, listing = stem.with_suffix(".npy"), stem.with_suffix(".unreadable.txt")
    with lock(cache, wait=True):                            # of two runs one decodes, the other finds it done
        room = len(files) * size * size * 3 < 0.9 * shutil.disk_usage(cache).free
        if not listing.exists() or room and not target.exists():
            temporary = stem.with_suffix(f".{os.getpid()}.tmp")
            try:
                rows = reserve(temporary, (len(files), size, size, 3)) if room else None

                def one(i):
                    try:
                        a = decode(files[i], size, crop)
                    except ValueError as e:
                        return f"{i}\t{e}\n"
                    if rows is not None:
                        rows[i] = a
                    return ""

                bad, since = "", time.monotonic()
                with ThreadPoolExecutor() as pool:
                    for i, line in enumerate(pool.map(one, range(len(files))), 1):
                        bad += line
                        progress(f"decoding {what}", i, len(files), since)
                write(listing, bad)
                if rows is not None:
                    rows.flush()
                    os.replace(temporary, target)
                    for old in cache.glob(f"{kind}-*"):
                        if not old.name.startswith(stem.name):  # who still has it mapped keeps it until the end
                            old.unlink(missing_ok=True)
            finally:
                temporary.unlink(missing_ok=True)
        bad = [line.split("\t", 1) for _, line in lines(listing)]
        rows = np.load(target, mmap_mode="r") if target.exists() else None
    if len(bad) > spare * len(files):
        raise ValueError(f"{bad[0][1]}; {len(bad)} of {len(files)} {what} are unreadable, at most {spare:.0%} may be:"
                         f" see {listing}, then mend them, or remove them from the set")
    if bad:
        print(f"{len(bad)} of {len(files)} {what} are unreadable and left out: {listing}", file=sys.stderr)
    good = np.setdiff1d(np.arange(len(files)), [int(i) for i, _ in bad])
    return Images(files, size, rows, crop), good


# ---- Batches: gathered one ahead, augmented on the device -----------------------------------------------------

def batches(images, order, device, part=slice(None)):
    """For each index array of order: (index (B,), uint8 images (B, S, S, 3)) on the device, of the images only a part
    of the batch if so wished. The next batch is already under way: gathered by a thread into pinned memory, copied
    without waiting."""
    def fetch(index):
        both = torch.from_numpy(index), torch.from_numpy(images[index[part]])
        if device.type != "cuda":
            return both
        with torch.cuda.device(device):                     # this thread's is another
            return [t.pin_memory() for t in both]

    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for index in itertools.chain(order, [None]):
            ready, ahead = ahead, None if index is None else pool.submit(fetch, index)
            if ready:
                yield [t.to(device, non_blocking=True) for t in ready.result()]


def normalise(x):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in -1..1 (mean 0.5, deviation 0.5), channels_last."""
    return x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


# Strengths of each augmentation, in short runs and from 16 epochs on, and what it means. On 6,820 images the milder
# were worth two points of EER after 6 epochs, the stronger more than two after 24 (README).
AUGMENT = dict(
    mirror=(0.5, 0.5, "probability of a mirror image"), rotate=(4, 10, "largest rotation, degrees"),
    shift=(0.02, 0.05, "largest shift, share of the side"), zoom=(0.04, 0.1, "largest zoom in or out, share"),
    brightness=(0.08, 0.2, "brightness factor within 1 -+ this"), contrast=(0.08, 0.2, "contrast likewise"),
    saturation=(0.08, 0.2, "saturation likewise"), erase=(0.0, 0.3, "probability of erasing a rectangle"))


def pixels(out, x, x_of_column, x_of_row, y_of_column, y_of_row, matrix, offset, kept):
    """Into out (B, 3, S, S) what augment() does to each pixel of x (B, S, S, 3): look up, colour, erase. Columns are
    (B, 1, S), rows (B, S, 1), int32, the matrix (B, 3, 3), the offset (B,), kept (B, 2, S). A dozen passes over memory,
    one if compiled (train.py --compile)."""
    b, side = x.shape[:2]
    index, row = ((c + r).clamp_(0, (side << 16) - 1).bitwise_right_shift_(16)
                  for c, r in ((x_of_column, x_of_row), (y_of_column, y_of_row)))
    first = torch.arange(0, b * side * side, side * side, dtype=torch.int32, device=x.device)[:, None, None]
    index.add_(row, alpha=side).add_(first)                                     # (B, S, S)
    planes = torch.stack([p.index_select(0, index.view(-1)) for p in x.reshape(-1, 3).T])
    planes = planes.view(3, b, -1).transpose(0, 1).float()                      # (B, 3, S * S)
    if torch.compiler.is_compiling():                       # a library's matrix product would be a pass of its own
        out.copy_((matrix[..., None] * planes[:, None]).sum(2).view_as(out))
    else:
        torch.bmm(matrix, planes, out=out.view(b, 3, -1))
    out.add_(offset[:, None, None, None]).clamp_(-1, 1)
    out.mul_(torch.maximum(kept[:, 0, :, None], kept[:, 1, None])[:, None])


def augment(x, strength, part=None, look=pixels):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in -1..1, each image by its own dice (torch's generator).
    part = (first, total): x are the rows from first on of a batch of total, with the dice that they have there.
    One look-up of the nearest pixel does mirror, rotation, zoom and shift; one 3x3 matrix the colours. Never upside
    down. Coordinates are integers, in 1/65536 pixel: half the time of grid_sample or less, and the same EER.
    look: pixels, or torch.compile(pixels)."""
    (b, side, *_), s, (first, total) = x.shape, SimpleNamespace(**strength), part or (0, len(x))
    u = torch.rand(total, 13, device=x.device)[first:first + b] * 2 - 1         # all the dice, in -1..1
    angle, scale = u[:, 0] * math.radians(s.rotate), torch.exp(u[:, 1] * math.log1p(s.zoom))
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    flip = torch.where(u[:, 2] < 2 * s.mirror - 1, -1.0, 1.0)
    at = torch.arange(side, device=x.device) - (side - 1) / 2

    def lines(across, down, shift):                         # what a column and what a row add to a coordinate
        middle = ((side / 2 + side * s.shift * shift) * 65536).int()[:, None]
        across, down = ((step[:, None] * at * 65536).int() for step in (across, down))
        return across[:, None], (down + middle)[:, :, None]

    where = *lines(cos * flip, -sin, u[:, 3]), *lines(sin * flip, cos, u[:, 4])
    # y = brightness x; y = contrast y + (1 - contrast) mean grey; y = saturation y + (1 - saturation) grey of y.
    # The mean is that of every fourth pixel of every fourth row.
    grey = torch.cat([u.new_full((1,), share) for share in (0.299, 0.587, 0.114)])      # no copy to wait for
    bright, contrast, colour = (1 + dice * most for dice, most in zip(
        u[:, 5:8].T, (s.brightness, s.contrast, s.saturation)))
    matrix = (bright * contrast)[:, None, None] * (colour[:, None, None] * torch.eye(3, device=x.device)
                                                   + (1 - colour)[:, None, None] * grey) / 127.5
    offset = (1 - contrast) * bright * (x[:, ::4, ::4].float().mean((1, 2)) @ grey) / 127.5 - 1
    half, centre = 0.25 + 0.15 * u[:, 8:10, None], u[:, 10:12, None]            # a grey box of 10..40 % a side
    chosen = (u[:, 12] < 2 * s.erase - 1)[:, None, None]
    kept = 1 - ((at * 2 / side - centre).abs() < half * chosen).float()         # (B, 2, S)

    out = u.new_empty(b, 3, side, side)
    block = 32 if x.device.type == "cpu" and look is pixels else b              # what a CPU's cache holds
    for rows in zip(*(t.split(block) for t in (out, x, *where, matrix, offset, kept))):
        look(*rows)
    return out


# ---- Synthetic faces: for a machine without data ---------------------------------------------------------------

# Synthetic faces: outlines filled from back to front. A point is x + iy in a square of -1..1, y down, eyes
# near -0.08i as in a 112x112 ArcFace crop. PERSON is who it is, SHOT what a photograph changes: ranges, drawn
# from uniformly. No row of PERSON tells people apart, SHOT outweighs them in raw pixels: it takes learning.
PERSON = dict(
    head=(.64, .84), chin=(.84, .97), jaw=(.03, .4), square=(.62, .95), ear=(.09, .19), ear_y=(-.06, .14),
    eye_x=(.26, .38), eye_y=(-.14, -.02), eye_w=(.12, .18), eye_h=(.45, .8), tilt=(-.3, .25), lash=(.06, .2),
    iris_r=(.38, .56), lid=(0, .4), brow_y=(.14, .29), brow_w=(.13, .21), brow_h=(.006, .04), arch=(0, .1),
    slant=(-.03, .03), nose_y=(.16, .38), nose_w=(.06, .14), nose_h=(.04, .1), mouth_y=(.5, .66),
    mouth_w=(.15, .3), upper=(.02, .08), lower=(.02, .09), corner=(-.03, .04), rouge=(0, .7), bald=(0, 1),
    line=(-.72, -.36), temple=(-.35, .1), boxy=(1.5, 7), lock=(0, .35), lock_x=(-.7, .7), volume=(0, .16),
    curl=(0, .07), mane=(0, 1.1), beard=(0, 1), chop=(.1, .7), stubble=(0, .8), specs=(0, 1), frame=(.4, 1))
SHOT = dict(
    roll=(-.13, .13), yaw=(-.24, .24), pitch=(-.1, .1), zoom=(.92, 1.06), dx=(-.07, .07), dy=(-.07, .07),
    smile=(-.01, .11), gape=(-.06, .08), lift=(-.02, .03), squint=(.75, 1.1), gaze=(.2, .7), prop=(0, 1),
    sun=(0, 6.28), relief=(.2, .8), exposure=(-.4, .2), warmth=(-.16, .2), gamma=(.75, 1.3), blur=(-.6, .6))
COLOURS = dict(                                              # each person's is a blend, mostly of one or two
    skin=[(255, 222, 196), (236, 184, 142), (178, 122, 84), (110, 72, 52)],
    hair=[(178, 176, 174), (28, 22, 26), (92, 56, 34), (150, 94, 48), (236, 206, 146), (176, 74, 36)],
    iris=[(66, 40, 24), (130, 84, 40), (84, 130, 70), (66, 128, 186)], metal=[(24, 22, 26), (214, 170, 70)])
TURN, OVER, LINE = np.linspace(0, 2 * np.pi, 32), np.linspace(.12, -3.26, 40), np.linspace(-1, 1, 31)
BUMP = 1 - LINE ** 2


def oval(centre, rx, ry, power=1., turn=TURN):               # a superellipse: power < 1 is boxy
    c, s = np.cos(turn), np.sin(turn)
    return centre + rx * np.sign(c) * abs(c) ** power + 1j * ry * np.sign(s) * abs(s) ** power


def between(x, top, bottom):
    return np.append(x + 1j * top, (x + 1j * bottom)[::-1])


def person(rng) -> SimpleNamespace:
    """Somebody new: a value for each row of PERSON, a colour for each of COLOURS, moles or freckles."""
    p = SimpleNamespace(**{k: rng.uniform(*row) for k, row in PERSON.items()})
    vars(p).update({k: rng.dirichlet([.2] * len(row)) @ row for k, row in COLOURS.items()})
    p.spots = rng.uniform((-.5, 0), (.5, .35), (rng.choice((0, 0, 0, 1, 2, 12)), 2)) @ (1, 1j)
    return p


def face(p, rng, size: int = 64) -> np.ndarray:
    """A photograph of person p: (size, size, 3) uint8, a function of p and the generator's state alone."""
    q = SimpleNamespace(**{k: rng.uniform(*row) for k, row in SHOT.items()})
    wall = rng.integers(30, 226, (*rng.integers(1, 6, 2), 3), np.uint8)
    canvas = Image.fromarray(wall).resize((size * 3,) * 2, Image.BILINEAR)    # and reduced: anti-aliasing
    pen, skin, hair, haired = ImageDraw.Draw(canvas), p.skin, p.hair, p.bald > .1
    turn, shift, swing = q.zoom * np.exp(1j * q.roll), 1 + q.dx + 1j + 1j * q.dy, q.yaw + 1j * q.pitch

    def paint(colour, outline, depth=0., twice=False, when=True):                  # depth is what yaw moves
        for z in [outline, -outline.conj()][:(1 + twice) * when]:
            z = ((z + depth * swing) * turn + shift) * (size * 1.5)
            pen.polygon(z.view(float).tolist(), fill=tuple(map(int, colour)))

    def skull(turn):
        return oval(0, p.head * (1 - p.jaw * np.maximum(np.sin(turn), 0) ** 2), p.chin, p.square, turn)

    paint(hair * .8, oval(-.1j, p.head + .1 + p.volume, .3 + p.mane, .7), -.1, when=haired and p.mane > .5)
    paint(skin * .78, between(LINE * .4, .5, 1.4), -.1)                            # neck
    paint(skin, oval(p.head + 1j * p.ear_y, p.ear, .19), -.12, True)
    paint(skin, skull(TURN))
    for spot in p.spots:
        paint(skin * .72, oval(spot, .02, .02), .5)
    beard, chops = hair + (skin - hair) * p.stubble, 1j * (p.mouth_y + .15 - p.chop * LINE ** 4)
    paint(beard, np.append(skull(TURN[1:16]) * 1.02, LINE * p.head * .92 + chops), when=p.beard > .72)
    y = p.line + (p.temple - p.line) * abs(LINE) ** p.boxy + p.lock * np.exp(-((LINE - p.lock_x) / .16) ** 2)
    x = LINE * p.head * (1 - (np.minimum(y, 0) / p.chin) ** 2) ** (p.square / 2)
    puff = 1.02 + p.volume * np.clip(.25 - np.sin(OVER), .1, 1) + p.curl * (1 + np.sin(12 * OVER))
    paint(hair, np.append(skull(OVER) * puff, x + 1j * y), .03, when=haired)
    eye, lean, tall = p.eye_x + 1j * p.eye_y, p.eye_w * np.exp(1j * p.tilt), p.eye_h * q.squint
    lid, fold = tall * BUMP ** .55, .3 + .6 * p.lid
    paint(skin * (.95 - p.lid), between(LINE * 1.15, -lid - fold, .7 * lid) * lean + eye, .46, True)
    paint((244, 240, 236), between(LINE, -lid, .7 * lid) * lean + eye, .46, True)
    for r, colour in (1, p.iris * .6), (.8, p.iris), (.45, (16, 12, 12)), (.25, (255, 255, 255)):
        disc = oval(.25j * (r - 1), r * p.iris_r, r * p.iris_r)
        disc.imag = disc.imag.clip(-.85 * tall, .6 * tall)                         # the lids cut the iris
        paint(colour, disc * lean + eye, q.gaze, True)
    paint(hair * .3, between(LINE * 1.05, -lid - p.lash, .05 - lid) * lean + eye, .46, True)
    y, half = p.eye_y - p.brow_y - q.lift - p.arch * BUMP + p.slant * LINE, p.brow_h * (1.4 - LINE)
    paint(hair * .7, between(p.eye_x + LINE * p.brow_w, y - half, y + half), .48, True)
    for light, x, y, rx, ry in (.8, .5, .2, .7, .7), (.93, 0, 0, .8, 1), (.45, .5, .6, .3, .2):    # nose
        nose = oval(p.nose_w * x + 1j * (p.nose_y + p.nose_h * y), p.nose_w * rx, p.nose_h * ry)
        paint(skin * light, nose, .58, True)
    x, gap = LINE * (p.mouth_w + .5 * max(q.smile, 0)), max(q.gape, 0) * BUMP
    y = p.mouth_y - (p.corner + q.smile) * (LINE ** 2 - .4) - gap / 2
    lips = skin * (.85, .6, .62) * (1 - p.rouge) + np.multiply((196, 40, 62), p.rouge)
    paint(lips, between(x, y - p.upper * BUMP ** .7, y + 1.5 * gap + p.lower * BUMP), .5)
    paint((70, 18, 22), between(x * .95, y - .007, y + 1.5 * gap + .007), .5)
    paint((246, 242, 236), between(x * .8, y, y + np.minimum(gap, .06 * BUMP)), .5, when=q.gape > .02)
    paint(beard, between(x * 1.15, y - p.upper - .08 * BUMP ** .5, y - .6 * p.upper), .55, when=p.beard > .86)
    glass, worn, black = oval(eye, .2, .17, p.frame), p.specs > .75 and q.prop > .08, q.prop > .97
    paint(p.metal, np.append(glass, glass * .82 + eye * .18), .55, True, worn)
    paint(p.metal * .3, glass, .55, True, black)                                   # sunglasses
    paint(p.metal, between(LINE * .13, p.eye_y - .04, p.eye_y), .58, when=worn or black)
    paint(wall[0, 0], skull(TURN[18:31]) * 1.2, when=.9 < q.prop < .94)            # cap

    # light from one side on a round head, its colour, the camera's tone curve and noise
    canvas = canvas.reduce(3).filter(ImageFilter.GaussianBlur(max(q.blur, 0) * size / 64))
    x, y = np.linspace(-1, 1, size) - q.dx, np.linspace(-1, 1, size)[:, None] - q.dy
    light = .8 * np.clip(np.cos(q.sun) * x + np.sin(q.sun) * y, -1, 1) + .6 * np.clip(1 - x * x - y * y, 0, 1)
    light = np.maximum(1 + q.relief * (light - .3), .15)[..., None] * np.exp([q.warmth, 0, -q.warmth])
    image = np.float32(canvas) / 255 * np.float32(light * np.exp(q.exposure))
    image = image ** q.gamma + .015 * rng.standard_normal(image.shape, np.float32)
    return (image * 255).clip(0, 255).astype(np.uint8)


def synthesise(root, people: int = 200, images: int = 11, size: int = 64, seed: int = 0) -> None:
    """Write the homework's layout to root, not there yet: `people`, 8 or more, with `images` each in train and one in
    dev and test; others behind val_pairs.txt, yet others behind test_pairs.txt (whose labels are answers.txt)."""
    root = Path(root).resolve()
    draft, rng = root.with_name(f"{root.name}.{os.getpid()}.part"), np.random.default_rng(seed)

    def shoot(p, file):                                      # JPEG as in the homework; irises keep colour
        (draft / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(face(p, rng, size)).save(draft / file, quality=92, subsampling=0)
        return Path(file).name

    def table(file, rows):
        (draft / file).write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))

    try:
        crowd = [person(rng) for _ in range(people)]
        for split, count in ("train", images), ("dev", 1), ("test", 1):
            table(f"cls_data/{split}/labels.txt", [
                (shoot(crowd[n % people], f"cls_data/{split}/images/{split}_{n:06d}.jpg"), n % people)
                for n in range(count * people)])
        for split, columns in ("val", 3), ("test", 2):      # an image meets its next one, then a stranger's
            crowd = enumerate([person(rng) for _ in range(people // 4)])
            shots = [[shoot(p, f"ver_data/{split}_{k:04d}_{n}.jpg") for n in range(5)] for k, p in crowd]
            rows = [row for k, own in enumerate(shots) for n in range(5) for row in (
                (own[n], own[n - 1], 1), (own[n], shots[k - rng.integers(1, len(shots))][rng.integers(5)], 0))]
            rng.shuffle(rows)
            table(f"{split}_pairs.txt", [row[:columns] for row in rows])
        table("answers.txt", [row[2:] for row in rows])
        draft.rename(root)                                  # at the end: never half a set
    except OSError:
        if not (root / "answers.txt").exists():             # no other process was first, with the same images
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# ---- Pictures -------------------------------------------------------------------------------------------------

INK, GRID, COLOURS_OF_LINES = "#303438", "#e3e6e8", ("#1f6fb2", "#d1495b", "#3a9d5d", "#e08e1b", "#6f4fa8", "#2a9d9d",
                                                     "#a05a2c", "#c75fa4", "#7a8288", "#9aa51d")


def ticks(low, high, log=False):
    """Round numbers, at most six, that span low..high; log: of the powers of ten, or with 2 and 5 between."""
    if log:
        powers = np.arange(math.floor(low), math.ceil(high) + 1)
        marks = np.add.outer(powers, np.log10([1, 2, 5] if high - low < 3 else [1])).ravel()
        return marks[(marks > low - 1e-9) & (marks < high + 1e-9)]
    raw = (high - low) / 5 or 1.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    return np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step


def plot(path, panels, width=420, height=300):
    """Charts side by side as a PNG; path None: as a PIL image. A panel: (title, x label, y label, series, axes); axes
    may name logx, logy and equal (a unit is as long in x as in y). series: {name: (xs, ys, kind, colour)}, kind line,
    points or bars (xs are the n + 1 edges) and the number of the colour optional. What has no place on the axes is left
    out; names are shown where there are several, but for those that begin with _. Drawn at three times the size and
    reduced, so that lines are smooth."""
    k = 3
    canvas = Image.new("RGB", (width * len(panels) * k, height * k), "white")
    pen = ImageDraw.Draw(canvas, "RGBA")
    font, bold = (ImageFont.load_default(size * k) for size in (11, 13))
    for column, (title, x_label, y_label, given, *axes) in enumerate(panels):
        axes, series = " ".join(axes), []
        logs = ["logx" in axes, "logy" in axes]
        for i, (name, (xs, ys, *more)) in enumerate(given.items()):
            kind, colour = [*more, *("line", i)[len(more):]]
            if kind == "bars":                              # the outline of the bars, from the axis and back to it
                xs, ys = np.repeat(xs, 2), np.concatenate([[0], np.repeat(ys, 2), [0]])
            xy = np.array([xs, ys], float).T.reshape(-1, 2)
            with np.errstate(divide="ignore", invalid="ignore"):
                xy[:, logs] = np.log10(xy[:, logs])
            series.append((name, xy[np.isfinite(xy).all(1)], kind, COLOURS_OF_LINES[colour % len(COLOURS_OF_LINES)]))
        points = np.concatenate([*(xy for _, xy, _, _ in series), np.empty((0, 2))])
        points = points if len(points) else np.zeros((1, 2))
        low, high = points.min(0), points.max(0)
        left, right, top, bottom = (column * width + 52) * k, ((column + 1) * width - 14) * k, 34 * k, (height - 42) * k
        if "equal" in axes:
            centre, half = (low + high) / 2, np.array([right - left, bottom - top]) * 0.53
            half *= ((high - low) / (2 * half)).max() * 1.06
            low, high = centre - half, centre + half
        elif not logs[1]:
            low[1] = min(low[1], 0) if low[1] < 0.5 * high[1] else low[1]       # start at zero unless that hides all
        high = np.where(high > low, high, low + 1)

        def at(xy):
            share = (np.asarray(xy, float).reshape(-1, 2) - low) / (high - low)
            return np.array([left, bottom]) + share * (right - left, top - bottom)

        for axis, log in enumerate(logs):
            for v in ticks(low[axis], high[axis], log=log):
                (px, py), text = at([v, v])[0], f"{10 ** v if log else v:.4g}"
                pen.line([(left, py), (right, py)] if axis else [(px, bottom), (px, top)], GRID, k)
                pen.text((left - 5 * k, py) if axis else (px, bottom + 5 * k), text, INK, font, "rm" if axis else "mt")
        pen.line([(left, top), (left, bottom), (right, bottom)], INK, k)
        pen.text(((left + right) / 2, 10 * k), title, INK, bold, "mt")
        pen.text(((left + right) / 2, (height - 8) * k), x_label, INK, font, "mb")
        pen.text((left, top - 4 * k), y_label, INK, font, "lb")
        for name, xy, kind, colour in series:
            place = at(xy)
            if kind == "line" and len(place) > 1:           # points that fall on one pixel are drawn once
                place = place[np.append(True, (np.diff(place.round(), axis=0) != 0).any(1))]
                pen.line(list(map(tuple, place)), colour, 2 * k, "curve")
            elif kind == "bars":
                pen.polygon(list(map(tuple, place)), colour + "60", colour, 2)
            r = (4.5 if kind == "points" and len(place) == 1 else 2.5) * k
            for px, py in place if kind == "points" or kind == "line" and len(place) in {1, *range(3, 40)} else ():
                pen.ellipse((px - r, py - r, px + r, py + r), colour + "90" * (kind == "points" and len(place) > 1))
        names = [(name, colour) for name, _, _, colour in series if len(series) > 1 and name[:1] != "_"]
        if names:                                           # in the corner that hides least
            w, h = max(pen.textlength(n, font) for n, _ in names), (14 * len(names) - 2) * k
            corners = itertools.product((right - w - 6 * k, left + 6 * k), (top + 3 * k, bottom - h - 6 * k))
            x, y = min(corners, key=lambda c: ((at(points) > np.subtract(c, 8 * k))
                                               & (at(points) < np.add(c, (w + 8 * k, h + 8 * k)))).all(1).sum())
            pen.rectangle((x - 4 * k, y - 2 * k, x + w + 4 * k, y + h + 2 * k), "#ffffffc0")
            for i, (name, colour) in enumerate(names):
                pen.text((x, y + 14 * i * k), name, colour, font, "lt")
    return save_png(path, canvas.reduce(k))


def save_png(path, canvas):
    """canvas, written to path if that is not None."""
    if path:
        buffer = io.BytesIO()
        canvas.save(buffer, "PNG")
        write(path, buffer.getvalue())
    return canvas


def sheet(path, title, sections, side=96):
    """Pictures with captions as a PNG. A section: (heading, columns, tiles); a tile: (uint8 array (h, w, 3), shown
    `side` pixels high, or a PIL image as it is; caption of one line or more; colour of its frame or None)."""
    font, bold, big = (ImageFont.load_default(size) for size in (11, 13, 16))
    gap, rows, y, width = 8, [], 44, font.getlength(title) * 1.5 + 24
    for heading, columns, tiles in sections:
        rows.append((y, heading))
        y += 26 if heading else 0
        for i in range(0, len(tiles), columns):
            x, line = 12, tiles[i:i + columns]
            for image, caption, colour in line:
                if not isinstance(image, Image.Image):
                    image = Image.fromarray(np.ascontiguousarray(image))
                    image = image.resize((round(image.width * side / image.height), side), Image.LANCZOS)
                rows.append((y, x, image, caption.split("\n"), colour))
                x += image.width + gap
            width = max(width, x + 4)
            y += max(row[2].height + 14 * len(row[3]) * bool(row[3][0]) for row in rows[-len(line):]) + gap
        y += gap
    canvas = Image.new("RGB", (int(width), y), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((12, 14), title, INK, big, "lt")
    for y, x, *tile in rows:
        if not tile:
            pen.text((12, y + 6), x, INK, bold, "lt")
            continue
        image, caption, colour = tile
        if colour:
            pen.rectangle((x - 3, y - 3, x + image.width + 2, y + image.height + 2), colour)
        canvas.paste(image, (x, y))
        for i, text in enumerate(caption):
            while font.getlength(text) > image.width and len(text) > 3:
                text = text.rstrip("…")[:-1] + "…"
            pen.text((x + image.width / 2, y + image.height + 5 + 14 * i), text, INK, font, "mt")
    return save_png(path, canvas)


# ---- The homework's two classes, for an ordinary DataLoader ---------------------------------------------------

class ImageDataset(torch.utils.data.Dataset):
    """(transform(PIL image), label) of a split such as cls_data/train, in either layout. Labels are those of
    labels.txt, or the sorted sub-folders' numbers."""

    def __init__(self, root, transform=None):
        self.files, self.labels = read_labelled(root)
        self.classes, self.transform = sorted(set(self.labels)), transform or (lambda im: im)
        if isinstance(self.labels[0], str):
            self.labels = np.searchsorted(self.classes, self.labels).tolist()

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(rgb(self.files[i])), self.labels[i]


class ImagePairDataset(torch.utils.data.Dataset):
    """(transform(image 1), transform(image 2), match) of a pairs file whose names are relative to root; match is
    1 for the same person, 0 for two, and left out where the file does not tell."""

    def __init__(self, root, pairs_file, transform=None):
        self.pairs, self.transform = read_pairs(pairs_file, root), transform or (lambda im: im)

    def __len__(self):
        return len(self.pairs.left)

    def __getitem__(self, i):
        p = self.pairs
        both = [self.transform(rgb(p.files[side[i]])) for side in (p.left, p.right)]
        return (*both, int(p.labels[i])) if p.labels is not None else tuple(both)


# ---- Shared by the scripts ------------------------------------------------------------------------------------

def write(path, content):
    """Write bytes, or text as lines() reads it, through a temporary file, flushed and renamed: path has the old or the
    new, never half."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    content = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:                                    # whose own text does not name the file
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):                  # gone, or in no folder
            temporary.unlink()


def lock(folder, wait=False):
    """Keep other processes out of folder until the file returned is closed or this process dies, however it dies, and
    remove what dead ones left half-written. ValueError if another is in there, unless told to wait for its end.
    Where the system has no locks there is none."""
    f = open(Path(folder, ".lock"), "a")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        for old in Path(folder).glob("*.[0-9]*.tmp"):
            old.unlink(missing_ok=True)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is at work there; wait for its end, or give another --out") from None
    except (OSError, AttributeError):
        pass
    return f


# ---- Command line ---------------------------------------------------------------------------------------------

REMEDIES = {errno.ENOSPC: "make room there, or write elsewhere", errno.ENOENT: "check the name",
            errno.EACCES: "change its permissions, or name another"}


def cli(main):
    """Run a script's main(): a ValueError or OSError is one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):                  # a name that cannot be shown is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError) as e:
        text = str(e)
        if getattr(e, "strerror", None):
            text = f"{e.filename}: " * bool(e.filename) + f"{e.strerror}; {REMEDIES.get(e.errno, 'name another')}"
        print("error:", " ".join(text.split()), file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as e:                # torch's is a RuntimeError, and an illegal access too
        if not (isinstance(e, MemoryError) or re.search("(out of|allocate|enough) memory", str(e))):
            raise
        print("error: out of memory; in training a smaller --batch-size or --size needs less", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def usage(message):
    """For parser.error: one line instead of every flag there is."""
    raise ValueError(f"{message}; --help tells")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage
    parser.add_argument("--data", default="data", help="the set's folder or one above it [data]")
    parser.add_argument("--holdout", type=float, default=0.1, help="as in train.py [0.1]")
    parser.add_argument("--augment", action="store_true", help="draw the contact sheet as a long run sees the images")
    parser.add_argument("--sheet", default="contact.png", help="where the contact sheet goes [contact.png]")
    args = parser.parse_args()
    faces = load(args.data, args.holdout)
    size, cache = native_size(faces.train[0]), cache_folder(faces.root)
    print(f"{faces.root}{': ' + faces.note if faces.note else ''}")
    packs = []
    for name in ("train", "dev", "test", "val_pairs", "test_pairs"):
        if not (split := getattr(faces, name)):
            continue
        pairs = isinstance(split, Pairs)
        files, labels = (split.files, split.labels) if pairs else split
        images, good = pack(files, size, cache, name)
        packs.append((name, images, good))
        sides = Counter(filter(None, map(measure, files[:1000])))
        text = f"{name}: {len(files)} images, {len(files) - len(good)} unreadable; " + (
            "of the first 1,000 " * (len(files) > 1000)) + ", ".join(
            f"{count} of {width}x{height}" for (width, height), count in sides.most_common(3))
        if pairs:
            text += f"; {len(split.left)} pairs" + (f", {labels.sum()} genuine" if labels is not None else "")
        elif labels is not None:
            each = np.unique(labels, return_counts=True)[1]
            text += (f"; {len(each)} people with {each.min()} to {each.max()} images, median {np.median(each):g},"
                     f" {(each == 1).sum()} of them with one")
        print(text)
    # one reading of all packs: the training images' colours, and images that are equal byte for byte
    colour, first, again = [], {}, []
    for name, images, good in packs:
        since = time.monotonic()
        for rows in np.split(good, range(256, len(good), 256)):
            block = images[rows]
            if name == "train":
                v = torch.from_numpy(block).view(-1, 3).float() / 255
                colour.append(torch.stack([v.mean(0), v.square().mean(0)]).double() * len(rows) / len(good))
            for i, image in zip(rows, block):
                file = os.path.relpath(images.files[i], faces.root)
                if (other := first.setdefault(hashlib.sha256(image).digest(), file)) != file:
                    again.append(f"{file} = {other}")
            progress(f"comparing {name}", int(np.searchsorted(good, rows[-1])) + 1, len(good), since)
    mean, square = sum(colour)
    print("train, 0..1: mean {:.4f} {:.4f} {:.4f}, standard deviation {:.4f} {:.4f} {:.4f} (red, green, blue)".format(
        *mean, *(square - mean ** 2).sqrt()))
    print(f"duplicates: {len(again)} images equal an earlier one once decoded"
          + "".join(f"\n    {line}" for line in again[:10]) + "\n    ..." * (len(again) > 10))

    _, images, good = packs[0]
    x = torch.from_numpy(images[np.random.default_rng(0).permutation(good)[:72]])
    if args.augment:
        x = augment(x, {name: long for name, (_, long, _) in AUGMENT.items()})
        x = ((x + 1) * 127.5).byte().permute(0, 2, 3, 1)
    each = np.bincount(faces.train[1])
    width = -(-each.max() // 40)                                                # at most 41 bars, of whole numbers
    edges = np.arange(0, each.max() + width + 1, width)
    bars = {"": (edges - 0.5, np.histogram(each, edges)[0], "bars")}
    chart = plot(None, [("images a person", "images", "people", bars)], 12 * 72, 240)
    sheet(args.sheet, f"{faces.root.name}: {len(good)} training images of {len(faces.names)} people", [
        ("", 1, [(chart, "", None)]), ("as training sees them" if args.augment else "drawn at random", 12,
                                       [(image, "", None) for image in x.numpy()])], 64)
    print(f"contact sheet: {args.sheet}")


if __name__ == "__main__":
    cli(main)
