"""Faces in, pictures out: find a data set, decode it once, hand out augmented batches.

    python data.py --data DIR           # what is in DIR: counts, images a person, sizes, unreadable files

DIR is found, not configured. It may be, or lie above,

    cls_data/{train,dev,test}/images/* + labels.txt     '<file> <integer>' a line (homework, 2025 and later)
    cls_data/{train,dev}/<person>/*                     (homework, 2024)
    <person>/*                                          any folder with one sub-folder a person

with ver_data/* and val_pairs, test_pairs beside or inside it: .txt ('<image> <image> [0|1]', no header) or .csv
(commas, a header). Without val_pairs, some people are held out by seed, and the pairs are drawn from them.

An image is decoded once, brought upright to RGB as a viewer shows it, cropped to its central square, and put as
uint8 (S, S, 3) into a pack: one memory-mapped file, named after a digest of the files it came from. A batch is
gathered from the pack by index and augmented on the device, each image with random numbers of its own.
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
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps

try:
    import fcntl
except ImportError:                     # Windows has no such locks: two runs must not share a folder there
    fcntl = None

SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
warnings.simplefilter("error", Image.DecompressionBombWarning)


# ---- Files: what lies where, and who is on it ----------------------------------------------------------------

class Pairs(NamedTuple):
    """Pairs to verify: files[left[i]] against files[right[i]].

    labels (n,): 1 for one person, 0 for two people; None where the labels are not known. path: the
    file they were read from. folds (n,): the number of each pair's fold in LFW's pairs.txt.
    """
    files: list
    left: np.ndarray
    right: np.ndarray
    labels: np.ndarray | None
    path: Path | None = None
    folds: np.ndarray | None = None


class Split(NamedTuple):
    """The images of train, dev or test. labels (n,): their classes; None where they are not known.
    """
    files: list
    labels: np.ndarray | None


class FaceSet(NamedTuple):
    """A data set, as load() finds it. names: of the people, class c is names[c]. note: a line about
    what was decided."""
    root: Path
    names: list
    train: Split
    dev: Split | None
    test: Split | None
    val_pairs: Pairs | None
    test_pairs: Pairs | None
    note: str


def read_lines(path):
    """(number, text) of the lines that are not blank; a BOM, CRLF and names in any encoding are all
    right."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, line.strip()


def checked_path(folder, name, where):
    """folder/name as a string. ValueError when that leaves the folder or is not there."""
    path = os.path.join(folder, name)
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"{where}: '{name}' leaves {folder}; name images inside it")
    if not os.path.isfile(path):
        raise ValueError(f"{where}: no image '{name}' in {folder}; copy it there or delete the line")
    return path


def read_labels(folder):
    """(files, labels) of a folder with images/ and labels.txt; labels are the file's own integers.
    """
    images = os.path.join(folder, "images")
    line_of, files, labels = {}, [], []
    for i, line in read_lines(os.path.join(folder, "labels.txt")):
        where = f"{folder}/labels.txt:{i}"
        columns = line.rsplit(None, 1)                      # a file's name may have spaces
        if len(columns) != 2 or not columns[1].isdecimal():
            raise ValueError(f"{where}: '{line}' is not '<file> <label>' with a label of 0, 1, 2, ...")
        name, label = columns
        if name in line_of:
            raise ValueError(f"{where}: '{name}' stands on line {line_of[name]} already; keep one of them")
        if " " in name and not os.path.isfile(os.path.join(images, name)):  # more likely a column too many
            raise ValueError(f"{where}: '{line}' has {len(line.split())} columns, and no image has the name"
                             f" '{name}'; write '<file> <label>'")
        line_of[name] = i
        files.append(checked_path(images, name, where))
        labels.append(int(label))
    return files, labels


def images_in(folder):
    """The image files that lie in a folder itself."""
    return sorted(e.path for e in os.scandir(folder) if os.path.splitext(e.name)[1].lower() in SUFFIXES)


def read_people(folder):
    """(files, labels) of a folder with one sub-folder a person; labels are the sub-folders' names.
    """
    files, labels = [], []
    for name in sorted(os.listdir(folder)):
        person = os.path.join(folder, name)
        if name != "ver_data" and os.path.isdir(person):
            images = images_in(person)
            files += images
            labels += [name] * len(images)
    return files, labels


def read_split(folder):
    """(files, labels) of a folder in any layout. ([], None) where there is no such folder. labels
    are None for images/ without labels.txt, and for images that lie in the folder itself."""
    if os.path.isfile(os.path.join(folder, "labels.txt")):
        return read_labels(folder)
    if not os.path.isdir(folder):
        return [], None
    files, labels = read_people(folder)
    if set(labels) <= {"images"}:                           # nobody has a sub-folder here
        return files or images_in(folder), None
    return files, labels


def read_labelled(folder):
    """read_split() of a folder that must have images of known people."""
    files, labels = read_split(folder)
    if not labels:
        raise ValueError(f"{folder}: no labelled training images; expected labels.txt and images/, or one sub-folder"
                         " of images a person, there or in cls_data/train")
    return files, labels


def find_lfw_image(folder, name, number):
    """The name below folder of LFW's image: name/name_0007 and a suffix; '.*' where there is none.
    """
    stem = f"{name}/{name}_{int(number):04d}"
    for suffix in [".jpg"] + sorted(SUFFIXES):              # .jpg first, as nearly all have it
        if os.path.isfile(os.path.join(folder, stem + suffix)):
            return stem + suffix
    return stem + ".*"


def read_lfw(path, folder):
    """(rows, folds) of LFW's pair lists, with rows as read_pairs() has them. The first line is 'n'
    or 'folds<tab>n'. Each fold has n lines 'name i j', two images of one person, then n lines 'name
    i name j'."""
    head, *lines = read_lines(path)
    numbers = ["1"] + head[1].split()                       # one fold where the line is 'n' alone
    folds, n = map(int, numbers[-2:])
    if len(lines) != 2 * folds * n:
        raise ValueError(f"{path}: {len(lines)} pairs, but the first line announces {folds} x 2 x {n}; fetch it again")
    rows = []
    for i, line in lines:
        fields = line.split("\t" if "\t" in line else None)
        label = "0"
        if len(fields) == 3:
            label = "1"
            fields.insert(2, fields[0])                     # the second image is of the same person
        if len(fields) != 4 or not (fields[1] + fields[3]).isdecimal():
            raise ValueError(f"{path}:{i}: '{line}'; LFW's lines are 'name i j' or 'name i name j'")
        left, right = find_lfw_image(folder, *fields[:2]), find_lfw_image(folder, *fields[2:])
        rows.append((i, [left, right, label]))
    if folds == 1:
        return rows, None
    return rows, np.arange(len(rows)) // (2 * n)


def read_pairs(path, folder):
    """Pairs from a .txt or .csv file whose image names are relative to folder: '<image> <image>
    [0|1]' lines, or LFW's lists, known by their first line of nothing but numbers."""
    is_csv = str(path).lower().endswith(".csv")
    rows, folds = [], None
    for i, line in read_lines(path):
        columns = line.split("," if is_csv else None)
        rows.append((i, [c.strip() for c in columns]))
    if is_csv:
        rows = rows[1:]                                     # without the header
    elif rows and "".join(rows[0][1]).isdecimal():
        rows, folds = read_lfw(path, folder)
    if not rows:
        raise ValueError(f"{path}: no pairs in it; write '<image> <image> <0|1>' a line")
    width = len(rows[0][1])
    number_of, left, right, labels = {}, [], [], []
    for i, row in rows:
        where = f"{path}:{i}"
        if len(row) != width or width not in (2, 3):
            raise ValueError(f"{where}: {len(row)} columns; write two images and, in every line or none, 0 or 1")
        if width == 3:
            if row[2] not in ("0", "1"):
                raise ValueError(f"{where}: label '{row[2]}'; write 1 for the same person, 0 for two people")
            labels.append(int(row[2]))
        for name, side in zip(row, (left, right)):
            file = checked_path(folder, name, where)
            side.append(number_of.setdefault(file, len(number_of)))
    if len(set(labels)) == 1:
        raise ValueError(f"{path}: every pair has label {labels[0]}; an EER needs pairs of both kinds")
    labels = np.array(labels) if labels else None
    return Pairs(list(number_of), np.array(left), np.array(right), labels, Path(path), folds)


def find_pairs(root, name):
    """The pairs of root/name.txt or .csv, there or in ver_data; None where there are none."""
    ver_data = root / "ver_data"
    images = ver_data if ver_data.is_dir() else root
    for folder in (root, ver_data):
        for suffix in (".txt", ".csv"):
            path = folder / (name + suffix)
            if path.is_file():
                return read_pairs(path, images)
    return None


def find_root(path):
    """The folder at or below path that holds cls_data or the people's folders."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; --data takes the folder that holds cls_data or people's folders")
    for pattern in ("cls_data", "*/cls_data", "*/*/cls_data", "*/*/*/cls_data"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            sets = ", ".join(str(f.parent) for f in found)
            raise ValueError(f"{path}: several data sets ({sets}); name one of them")
        if found:
            return found[0].parent
    while True:                                             # a folder with nothing but a folder is gone through
        inside = [e for e in path.iterdir() if e.is_dir() and e.name[0] != "."]
        if len(inside) != 1 or read_people(path)[0]:
            return path
        path = inside[0]


def hold_out(files, labels, share, seed):
    """(rest, Pairs): a share of the people with two images or more leaves the training set; rest
    are the rows that stay. All genuine pairs of these people (up to 10 a person, 5,000 in all) and
    as many impostor pairs are drawn."""
    rng = np.random.default_rng(seed)

    def draw(items, most):
        return [items[i] for i in rng.permutation(len(items))[:most]]

    rows_of = {}
    for row, person in enumerate(labels):
        rows_of.setdefault(person, []).append(row)
    several = [p for p in rows_of if len(rows_of[p]) > 1]
    # an impostor pair takes two people, and so does training
    n = min(max(2, round(share * len(several))), len(rows_of) - 2)
    if n < 2 or len(several) < 2:
        raise ValueError(f"{len(rows_of)} people, {len(several)} of them with two images or more, are too few to hold"
                         " two out for validation; add people, or a val_pairs.txt, or train with --holdout 0")
    held_out = draw(several, n)
    genuine, impostor = [], []
    for person in held_out:
        genuine += draw(list(itertools.combinations(rows_of[person], 2)), 10)
    genuine = draw(genuine, 5000)                           # in random order, also where there are fewer
    for _ in genuine:
        one, two = rng.choice(len(held_out), 2, replace=False)
        impostor.append([rng.choice(rows_of[held_out[one]]), rng.choice(rows_of[held_out[two]])])
    # an image that is in several pairs is listed once
    rows, position = np.unique(genuine + impostor, return_inverse=True)
    left, right = position.reshape(-1, 2).T
    for person in held_out:
        del rows_of[person]
    rest = sorted(itertools.chain(*rows_of.values()))
    return rest, Pairs([files[i] for i in rows], left, right, np.repeat([1, 0], len(genuine)))


def number_classes(files, labels, class_of):
    """Split of (files, labels) with the people's numbers for their names; None where there are no
    files."""
    if not files:
        return None
    if labels is None:
        return Split(files, None)
    for file, name in zip(files, labels):
        if name not in class_of:
            raise ValueError(f"{file} is of '{name}', who is not in the training set; take it out or add images of"
                             " that person to train")
    return Split(files, np.array([class_of[name] for name in labels]))


def load(path, holdout=0.1, seed=0):
    """FaceSet of what --data names. Without val_pairs, a share holdout of the people is held out
    for them. ValueError, naming file, line and remedy, for what cannot be used."""
    root, note = find_root(path), ""
    splits = root / "cls_data"
    files, labels = read_labelled(splits / "train" if splits.is_dir() else root)
    val_pairs = find_pairs(root, "val_pairs")
    if val_pairs and val_pairs.labels is None:
        raise ValueError(f"{val_pairs.path}:1: no label; write '<image> <image> <0|1>', and what has no labels to"
                         " test_pairs")
    if val_pairs is None and holdout:
        people = len(set(labels))
        rest, val_pairs = hold_out(files, labels, holdout, seed)
        files = [files[i] for i in rest]
        labels = [labels[i] for i in rest]
        note = (f"no val_pairs: {people - len(set(labels))} of {people} people held out (seed {seed}) for"
                f" {len(val_pairs.labels)} validation pairs")
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"{root}: one person in all; add another, a classifier needs two at least")
    class_of = {name: c for c, name in enumerate(names)}
    train = number_classes(files, labels, class_of)
    # without cls_data there are no such folders, and both are None
    dev = number_classes(*read_split(splits / "dev"), class_of)
    test = number_classes(*read_split(splits / "test"), class_of)
    test_pairs = find_pairs(root, "test_pairs")
    return FaceSet(root, list(map(str, names)), train, dev, test, val_pairs, test_pairs, note)


# ---- Packs: images decoded once ------------------------------------------------------------------------------

def rgb(file):
    """A PIL image in RGB as a viewer shows it: EXIF rotation, palettes, grey, 16 bit, alpha (over
    white)."""
    with Image.open(file) as im:
        im = ImageOps.exif_transpose(im)
        if im.mode.startswith(("I", "F")):                  # 16-bit PNG and TIFF: convert() would clip at 255
            grey = np.asarray(im, np.float32)
            if grey.max() > 255:
                grey = grey / 257
            im = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
        if im.has_transparency_data:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        return im.convert("RGB")


def decode(file, size, crop=1.0):
    """uint8 (size, size, 3): of an image's central square the inner part, crop of its side.
    ValueError naming the file if it cannot be read."""
    try:
        return np.asarray(ImageOps.fit(rgb(file), (size, size), Image.BICUBIC, (1 - crop) / 2))
    except Exception as e:                                  # Pillow raises a dozen kinds on broken files
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"{file}: not a readable image ({reason})") from None


def measure(file):
    """(width, height) by an image's header, None where there is none; pack() is what counts the
    unreadable."""
    try:
        with Image.open(file) as im:
            return im.size
    except Exception:
        return None


def native_size(files):
    """The side in pixels that most of the first hundred images have, within 32..256; 112 if none is
    readable."""
    sides = Counter(min(s) for s in map(measure, files[:100]) if s)
    if not sides:
        return 112
    return min(256, max(32, sides.most_common(1)[0][0]))


def release_pages(rows):
    """Let go of the pages of a memory map; every page ever read would count as resident memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        rows._mmap.madvise(mmap.MADV_DONTNEED)


class Images:
    """uint8 faces (n, S, S, 3) indexed by an array of row numbers: rows of a pack, or files decoded
    as asked."""

    def __init__(self, files, size, rows=None, crop=1.0):
        self.files, self.size, self.rows, self.crop = files, size, rows, crop
        self.rows_read = 0

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if self.rows is None:
            with ThreadPoolExecutor() as pool:
                return np.stack(list(pool.map(lambda i: decode(self.files[i], self.size, self.crop), index)))
        self.rows_read += len(index)
        if self.rows_read * self.size ** 2 * 3 > 2 ** 28:   # every 256 MiB
            release_pages(self.rows)
            self.rows_read = 0
        return self.rows[index]


class ImageSet(NamedTuple):
    """A packed Split: its images, labels (n,) of all, and rows (k,), the numbers of the readable
    ones."""
    images: Images
    labels: np.ndarray | None
    rows: np.ndarray


class PairSet(NamedTuple):
    """Packed Pairs: the images of pairs.files, and the pairs."""
    images: Images
    pairs: Pairs


def cache_folder(root):
    """Where packs are kept: root/.packs, or the user's cache where the data is read-only (as
    Kaggle's is)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    digest = hashlib.sha256(os.fsencode(Path(root).resolve())).hexdigest()
    for folder in (Path(root) / ".packs", home / "face-packs" / digest[:12]):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise ValueError(f"{root} is read-only and so is {home}; set XDG_CACHE_HOME to a folder with room for packs")


def reserve(path, shape):
    """A new memory-mapped uint8 array in path; None where the disk has no room. Disk blocks are
    allocated first: writing to a mapped page without one kills the process (SIGBUS)."""
    rows = None
    try:
        rows = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return None
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):     # file systems that cannot allocate, or cannot map
            raise
    return rows


def decode_all(files, rows, size, crop, what):
    """Decode all files, into rows (n, S, S, 3) if not None. Returns a line 'number<tab>reason' for
    each unreadable."""
    def decode_one(i):
        try:
            image = decode(files[i], size, crop)
        except ValueError as e:
            return f"{i}\t{e}\n"
        if rows is not None:
            rows[i] = image
        return ""

    unreadable, progress = "", Progress(f"decoding {what}", len(files))
    with ThreadPoolExecutor() as pool:
        for i, line in enumerate(pool.map(decode_one, range(len(files))), 1):
            unreadable += line
            progress.update(i)
    return unreadable


def pack_name(files, size, what, crop):
    """(kind, name) of a pack: the name is the kind and a digest of every file's path, length and
    time, so that changed files get a new pack."""
    kind = f"{what}-{size}"
    if crop != 1:
        kind += f"x{crop:g}".replace(".", "")
    digest = hashlib.sha256(f"1 {size}".encode())
    for file in files:
        s = os.stat(file)
        digest.update(os.fsencode(f"{os.path.abspath(file)}\0{s.st_size} {s.st_mtime_ns}\n"))
    return kind, f"{kind}-{digest.hexdigest()[:16]}"


def pack(files, size, cache, what="images", crop=1.0, max_unreadable=0.01):
    """(Images, rows (k,)): the files as decode() has them, and the numbers of the readable ones.

    Unreadable files are listed beside the pack; a share of more than max_unreadable is a
    ValueError. A pack appears by renaming, whole or not at all, and replaces the last of its kind.
    Where the disk has no room, the files are only checked now and decoded anew for each batch.
    """
    kind, name = pack_name(files, size, what, crop)
    target, listing = cache / f"{name}.npy", cache / f"{name}.unreadable.txt"
    temporary = cache / f"{name}.{os.getpid()}.tmp"
    with lock(cache, wait=True):                            # of two runs one decodes, the other finds it done
        has_room = len(files) * size * size * 3 < 0.9 * shutil.disk_usage(cache).free  # bytes
        # a listing without a pack is of a time when the disk had no room
        if not listing.exists() or has_room and not target.exists():
            try:
                rows = reserve(temporary, (len(files), size, size, 3)) if has_room else None
                write(listing, decode_all(files, rows, size, crop, what))
                if rows is not None:
                    rows.flush()
                    os.replace(temporary, target)
                    for old in cache.glob(f"{kind}-*"):     # who still has it mapped keeps it until the end
                        if not old.name.startswith(name):
                            old.unlink(missing_ok=True)
            finally:
                temporary.unlink(missing_ok=True)
        unreadable = [line.split("\t", 1) for _, line in read_lines(listing)]
        rows = np.load(target, mmap_mode="r") if target.exists() else None
    message = f"{len(unreadable)} of {len(files)} {what} are unreadable"
    if len(unreadable) > max_unreadable * len(files):
        raise ValueError(f"{unreadable[0][1]}; {message}, at most {max_unreadable:.0%} may be: see {listing}, then mend"
                         " them, or remove them from the set")
    if unreadable:
        print(f"{message} and left out: {listing}", file=sys.stderr)
    readable = np.setdiff1d(np.arange(len(files)), [int(i) for i, _ in unreadable])
    return Images(files, size, rows, crop), readable


# ---- Batches: drawn, gathered one ahead, augmented on the device ---------------------------------------------

def epoch_batches(labels, rows, batch_size, seed, epoch, per_person=0):
    """(steps, batch) row numbers of an epoch, a function of seed and epoch: a permutation of rows;
    or, with per_person = K, batches of P people x K images. Who has fewer than K images appears
    with repeated ones, which are augmented differently."""
    rng = np.random.default_rng((seed, epoch))
    rows = rng.permutation(rows)
    if per_person:
        # people together, the images of each in random order
        rows = rows[np.argsort(labels[rows], kind="stable")]
        first_of_person = np.flatnonzero(np.diff(labels[rows])) + 1
        groups = []
        for images in np.split(rows, first_of_person):
            n = math.ceil(len(images) / per_person)
            groups.append(np.resize(images, (n, per_person)))
        groups = rng.permutation(np.concatenate(groups))    # (groups, per_person)
        rows = groups[:math.ceil(len(rows) / per_person)].ravel()  # an epoch has as many images as before
    steps = max(1, len(rows) // batch_size)
    return np.resize(rows, (steps, min(batch_size, len(rows))))


def batches(images, order, device, local_rows=slice(None)):
    """For each index array of order: (index (B,), uint8 images (B, S, S, 3)) on the device, or only
    the images local_rows of the batch. A thread gathers the next batch meanwhile, into pinned
    memory that is copied without waiting."""
    def fetch(index):
        tensors = [torch.from_numpy(index), torch.from_numpy(images[index[local_rows]])]
        if device.type == "cuda":
            with torch.cuda.device(device):                 # a new thread starts on GPU 0
                tensors = [t.pin_memory() for t in tensors]
        return tensors

    with ThreadPoolExecutor(1) as pool:
        pending = None
        for index in itertools.chain(order, [None]):
            ready = pending                                 # gathered while the last batch was in use
            if index is not None:
                pending = pool.submit(fetch, index)
            if ready:
                yield [t.to(device, non_blocking=True) for t in ready.result()]


def normalise(x):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in -1..1 (mean 0.5, deviation 0.5), channels_last.
    """
    return x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


# Strengths of each augmentation, in short runs and from 16 epochs on, and what it means. On 6,820
# images the milder were worth two points of EER after 6 epochs, the stronger more than two after 24
# (README).
AUGMENT = dict(
    mirror=(0.5, 0.5, "probability of a mirror image"),
    rotate=(4, 10, "largest rotation, degrees"),
    shift=(0.02, 0.05, "largest shift, share of the side"),
    zoom=(0.04, 0.1, "largest zoom in or out, share"),
    brightness=(0.08, 0.2, "brightness factor within 1 -+ this"),
    contrast=(0.08, 0.2, "contrast likewise"),
    saturation=(0.08, 0.2, "saturation likewise"),
    erase=(0.0, 0.3, "probability of erasing a rectangle"))


def augment_kernel(out, x, of_column, of_row, matrix, offset, erase_mask):
    """What augment() does to each pixel of x (B, S, S, 3), into out (B, 3, S, S): look up, colour,
    erase.

    of_column (B, 2, 1, S) and of_row (B, 2, S, 1): see source_offsets(). matrix (B, 3, 3) and
    offset (B, 1, 1): see colour_matrix(). erase_mask (B, 2, S): see erase_masks(). A dozen passes
    over memory, one if compiled (train.py --compile).
    """
    b, side = x.shape[:2]
    # beyond the edge: its pixel
    source = (of_column + of_row).clamp_(0, (side << 16) - 1).bitwise_right_shift_(16)
    column, row = source.unbind(1)                          # (B, S, S) each
    image = torch.arange(0, b * side * side, side * side, dtype=torch.int32, device=x.device)
    index = column.add(row, alpha=side).add_(image[:, None, None]).view(-1)
    # one channel at a time: rows of three bytes are slow to gather
    channels = torch.stack([c.index_select(0, index) for c in x.reshape(-1, 3).T])
    channels = channels.view(3, b, -1).transpose(0, 1).float()                  # (B, 3, S * S)
    if torch.compiler.is_compiling():                       # a library's matrix product would be a pass of its own
        out.copy_((matrix[..., None] * channels[:, None]).sum(2).view_as(out))
    else:
        torch.bmm(matrix, channels, out=out.view(b, 3, -1))
    out.add_(offset[:, None]).clamp_(-1, 1)
    out.mul_(torch.maximum(erase_mask[:, 0, :, None], erase_mask[:, 1, None])[:, None])


# The three functions below take u (B, 13, 1, 1), random numbers in -1..1; most, the strengths by
# name; and position (S,), how far each pixel of a row or column is from the middle.

def source_offsets(u, most, position):
    """Where each pixel comes from, by mirror, rotation, zoom and shift: its place (x, y) in the
    source, in 1/65536 pixel, is of_column (B, 2, 1, S) + of_row (B, 2, S, 1), int32."""
    side = len(position)
    angle = u[:, 0] * math.radians(most.rotate)
    scale = torch.exp(u[:, 1] * math.log1p(most.zoom))
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    mirror = torch.where(u[:, 2] < 2 * most.mirror - 1, -1.0, 1.0)
    per_column = torch.stack([cos * mirror, sin * mirror], 1)                   # (B, 2, 1, 1)
    per_row = torch.stack([-sin, cos], 1)
    middle = side / 2 + side * most.shift * u[:, 3:5]
    of_column = per_column * position * 65536
    of_row = per_row * position[:, None] * 65536
    return of_column.int(), of_row.int() + (middle * 65536).int()


def colour_matrix(u, most, x):
    """(matrix (B, 3, 3), offset (B, 1, 1)) that change brightness, contrast and saturation of uint8
    images x and bring them to -1..1: y = brightness x; y = contrast y + (1 - contrast) mean grey; y
    = saturation y + (1 - saturation) grey of y. The mean is that of every fourth pixel of every
    fourth row."""
    brightness = 1 + u[:, 5] * most.brightness
    contrast = 1 + u[:, 6] * most.contrast
    saturation = 1 + u[:, 7] * most.saturation
    grey = torch.cat([u.new_full((1,), share) for share in (0.299, 0.587, 0.114)])      # made on the device: no copy
    saturate = saturation * torch.eye(3, device=x.device) + (1 - saturation) * grey
    mean_grey = x[:, ::4, ::4].float().mean((1, 2), True) @ grey
    offset = (1 - contrast) * brightness * mean_grey / 127.5 - 1
    return brightness * contrast * saturate / 127.5, offset


def erase_masks(u, most, position):
    """(B, 2, S): 0 in the rows and in the columns of the box, 10..40 % a side, that some images
    lose."""
    half, centre = 0.25 + 0.15 * u[:, 8:10, 0], u[:, 10:12, 0]
    chosen = u[:, 12] < 2 * most.erase - 1
    distance = (position * 2 / len(position) - centre).abs()
    return 1 - (distance < half * chosen).float()


def augment(x, strength, part=None, kernel=augment_kernel):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in -1..1, each image with random numbers of its own
    (torch's generator).

    strength: {name: number} for each of AUGMENT. part = (first, total): x are the rows from first
    on of a batch of total, and get the random numbers that they have there. kernel: augment_kernel,
    or torch.compile(augment_kernel). One look-up of the nearest pixel does mirror, rotation, zoom
    and shift; one 3x3 matrix the colours. Coordinates are integers: half the time of grid_sample or
    less, and the same EER.
    """
    b, side = x.shape[:2]
    first, total = part or (0, b)
    # drawn for the whole batch, so that it does not matter how it is divided
    u = torch.rand(total, 13, device=x.device)[first:first + b, :, None, None] * 2 - 1
    most = SimpleNamespace(**strength)
    position = torch.arange(side, device=x.device) - (side - 1) / 2
    erase_mask = erase_masks(u, most, position)
    tensors = [x, *source_offsets(u, most, position), *colour_matrix(u, most, x), erase_mask]
    out = u.new_empty(b, 3, side, side)
    block = 32 if x.device.type == "cpu" and kernel is augment_kernel else b     # what a CPU's cache holds
    for i in range(0, b, block):
        kernel(out[i:i + block], *[t[i:i + block] for t in tensors])
    return out


# ---- The homework's two classes, for an ordinary DataLoader --------------------------------------------------

def transformed(file, transform):
    """transform(PIL image), or the image itself where transform is None."""
    image = rgb(file)
    return transform(image) if transform else image


class ImageDataset(torch.utils.data.Dataset):
    """(transform(PIL image), label) of a split such as cls_data/train, in either layout. Labels are
    those of labels.txt, or the sub-folders' numbers in alphabetical order."""

    def __init__(self, root, transform=None):
        self.files, self.labels = read_labelled(root)
        self.classes, self.transform = sorted(set(self.labels)), transform
        if isinstance(self.labels[0], str):
            self.labels = np.searchsorted(self.classes, self.labels).tolist()

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return transformed(self.files[i], self.transform), self.labels[i]


class ImagePairDataset(torch.utils.data.Dataset):
    """(transform(image 1), transform(image 2), match) of a pairs file whose names are relative to
    root; match is 1 for the same person, 0 for two, and left out where the file does not tell."""

    def __init__(self, root, pairs_file, transform=None):
        self.pairs, self.transform = read_pairs(pairs_file, root), transform

    def __len__(self):
        return len(self.pairs.left)

    def __getitem__(self, i):
        files, left, right, labels, *_ = self.pairs
        one = transformed(files[left[i]], self.transform)
        two = transformed(files[right[i]], self.transform)
        if labels is None:
            return one, two
        return one, two, int(labels[i])


# ---- Shared by the scripts -----------------------------------------------------------------------------------

def write(path, content):
    """Write bytes, or text as read_lines() reads it, so that path has the old content or the new,
    never half: to a temporary file that is flushed and renamed."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:                                    # its own text names the temporary file, or none
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):                  # already renamed, or the folder does not exist
            temporary.unlink()


def lock(folder, wait=False):
    """Keep other processes out of folder until the file returned is closed or this process ends, in
    any way, and remove what dead processes left half-written. If another process is in there:
    ValueError, or wait for its end. Does nothing where the system has no locks."""
    f = open(Path(folder, ".lock"), "a")
    try:
        fcntl.flock(f, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        for old in Path(folder).glob("*.[0-9]*.tmp"):
            old.unlink(missing_ok=True)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is at work there; wait for its end, or give another --out") from None
    except (OSError, AttributeError):                       # this file system has no locks, or fcntl is None
        pass
    return f


class Progress:
    """One line with rate and time left: on a terminal, of process 0, at most five times a second
    and at the end."""

    def __init__(self, what, total, unit="images"):
        self.what, self.total, self.unit = what, total, unit
        self.started, self.printed = time.monotonic(), 0.0
        self.visible = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"

    def update(self, done):
        now, is_last = time.monotonic(), done == self.total
        if not self.visible or now - self.printed <= 0.2 and not is_last:
            return
        self.printed = now
        rate = done / max(now - self.started, 1e-9)
        seconds = (self.total - done) / max(rate, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds))
        print(f"\r{self.what} {done}/{self.total}, {rate:.0f} {self.unit}/s, {left} left\x1b[K",
              end="\n" if is_last else "", file=sys.stderr, flush=True)


REMEDIES = {
    errno.ENOSPC: "make room there, or write elsewhere",
    errno.ENOENT: "check the name",
    errno.EACCES: "change its permissions, or name another"}


def cli(main):
    """Run a script's main(): a ValueError or OSError is one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):                  # a name that cannot be shown is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except (ValueError, OSError) as e:
        text = str(e)
        if getattr(e, "strerror", None):
            text = f"{e.strerror}; {REMEDIES.get(e.errno, 'name another')}"
            if e.filename:
                text = f"{e.filename}: {text}"
    except (RuntimeError, MemoryError) as e:                # torch's is a RuntimeError, and an illegal access too
        if not (isinstance(e, MemoryError) or re.search("(out of|allocate|enough) memory", str(e))):
            raise
        text = "out of memory; in training a smaller --batch-size or --size needs less"
    except KeyboardInterrupt:
        sys.exit(130)
    print("error:", " ".join(text.split()), file=sys.stderr)
    sys.exit(2)


def usage(message):
    """For parser.error: one line instead of every flag there is."""
    raise ValueError(f"{message}; --help tells")


# ---- Pictures: charts and contact sheets ---------------------------------------------------------------------

INK, GRID = "#303438", "#e3e6e8"
COLOURS_OF_LINES = "#1f6fb2 #d1495b #3a9d5d #e08e1b #6f4fa8 #2a9d9d #a05a2c #c75fa4 #7a8288 #9aa51d".split()
ZOOM = 3


# A canvas is ZOOM times as large as its picture, and reduced at the end, which makes lines smooth.
# All lengths below are in pixels of the canvas.

class Frame(NamedTuple):
    """A chart's rectangle: origin, its lower left corner on the canvas; size, from there to the
    upper right one (y is negative, for the canvas counts downwards); low and high, the values at
    these corners. All are arrays (x, y)."""
    origin: np.ndarray
    size: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def to_canvas(self, points):
        """(n, 2) places on the canvas of points (n, 2)."""
        return self.origin + (points - self.low) / (self.high - self.low) * self.size


def ticks(low, high, log=False):
    """Round numbers, at most six, that span low..high; log: of the powers of ten, or with 2 and 5
    between."""
    if log:
        powers = np.arange(math.floor(low), math.ceil(high) + 1)
        between = [1, 2, 5] if high - low < 3 else [1]
        marks = np.add.outer(powers, np.log10(between)).ravel()
        return marks[(marks > low - 1e-9) & (marks < high + 1e-9)]
    raw = (high - low) / 5 or 1.0
    steps = 10.0 ** math.floor(math.log10(raw)) * np.array([1, 2, 5, 10])  # of which the smallest that suffices
    step = steps[steps >= raw * 0.999][0]
    return np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step


def read_series(number, logs, xs, ys, kind="line", colour=None):
    """(points (n, 2), kind, colour) of a series of plot(): the points that have a place on the
    axes. logs: which axes are logarithmic; number: the colour by default."""
    if kind == "bars":                                      # their outline, from the axis and back to it
        xs, ys = np.repeat(xs, 2), np.concatenate([[0], np.repeat(ys, 2), [0]])
    points = np.array([xs, ys], float).T
    with np.errstate(divide="ignore", invalid="ignore"):
        points[:, logs] = np.log10(points[:, logs])
    if colour is None:
        colour = number
    points = points[np.isfinite(points).all(1)]
    return points, kind, COLOURS_OF_LINES[colour % len(COLOURS_OF_LINES)]


def value_range(points, axes, size):
    """(low, high), each (x, y), of the values that a chart of a size in pixels shows."""
    low, high = points.min(0), points.max(0)
    if "equal" in axes:
        centre = (low + high) / 2
        half = 0.53 * size * ((high - low) / size).max()    # 6 % more than the points take
        low, high = centre - half, centre + half
    elif "logy" not in axes and low[1] < 0.5 * high[1]:
        low[1] = min(low[1], 0)                             # start at zero unless that hides all
    return low, np.where(high > low, high, low + 1)         # a single value gets a range, too


def draw_axes(pen, frame, logs):
    """Grid lines and their numbers, then the two axes."""
    left, bottom = frame.origin
    right, top = frame.origin + frame.size
    for axis, log in enumerate(logs):
        for value in ticks(frame.low[axis], frame.high[axis], log):
            x, y = frame.to_canvas(value)
            line, place, anchor = (x, top, x, bottom), (x, bottom + 15), "mt"
            if axis == 1:
                line, place, anchor = (left, y, right, y), (left - 15, y), "rm"
            number = 10 ** value if log else value
            pen.line(line, GRID, ZOOM)
            pen.text(place, f"{number:.4g}", INK, anchor=anchor)
    pen.line((left, top, left, bottom, right, bottom), INK, ZOOM)


def draw_series(pen, places, kind, colour):
    """A series at its places (n, 2) on the canvas."""
    radius = 7.5
    if kind == "bars":
        pen.polygon(places.ravel().tolist(), colour + "60", colour, 2)
        return
    if kind == "line" and len(places) > 1:
        moved = (np.diff(places.round(), axis=0) != 0).any(1)
        places = places[np.append(True, moved)]             # points that fall on one pixel are drawn once
        pen.line(places.ravel().tolist(), colour, 2 * ZOOM, "curve")
        if len(places) == 2 or len(places) >= 40:           # as it is straight, or smooth: no dots
            return
    elif kind == "points" and len(places) == 1:
        radius = 13.5                                       # a mark, such as that of the EER
    elif kind == "points":
        colour += "90"                                      # translucent, as many points may overlap
    for x, y in places:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def draw_legend(pen, names, frame, places):
    """{name: colour} in the corner of the frame that hides the fewest of places (n, 2)."""
    left, bottom = frame.origin
    right, top = frame.origin + frame.size
    size = np.array([max(map(pen.textlength, names)), 42 * len(names) - 6])
    xs, ys = (right - size[0] - 18, left + 18), (top + 9, bottom - size[1] - 18)
    corners = np.array(list(itertools.product(xs, ys)))
    inner = places - corners[:, None]                       # (4, n, 2)
    hidden = (inner > -24) & (inner < size + 24)
    corner = corners[hidden.all(2).sum(1).argmin()]         # the first of the best
    pen.rectangle([*corner - (12, 6), *corner + size + (12, 6)], "#ffffffc0")
    for i, (name, colour) in enumerate(names.items()):
        pen.text(corner + (0, 42 * i), name, colour, anchor="lt")


def draw_panel(pen, x, width, height, title, x_label, y_label, series, axes=""):
    """A panel of plot() on the canvas, width times height from x on."""
    logs = ["logx" in axes, "logy" in axes]
    drawn, names = [], {}
    for i, (name, given) in enumerate(series.items()):
        drawn.append(read_series(i, logs, *given))
        if name[:1] != "_":                                 # not for the legend
            names[name] = drawn[i][2]
    points = np.concatenate([p for p, _, _ in drawn] + [np.empty((0, 2))])
    if not len(points):
        points = np.zeros((1, 2))
    left, middle, top = x + 156, x + 57 + width / 2, 102
    size = np.array([width - 198, height - 228])
    low, high = value_range(points, axes, size)
    frame = Frame(np.array([left, height - 126]), size * (1, -1), low, high)
    draw_axes(pen, frame, logs)
    pen.text((middle, 30), title, INK, ImageFont.load_default(13 * ZOOM), "mt")
    pen.text((middle, height - 24), x_label, INK, anchor="mb")
    pen.text((left, top - 12), y_label, INK, anchor="lb")
    for shown, kind, colour in drawn:
        draw_series(pen, frame.to_canvas(shown), kind, colour)
    if names and len(drawn) > 1:
        draw_legend(pen, names, frame, frame.to_canvas(points))


def plot(path, panels, width=420, height=300):
    """Charts side by side as a PNG, each of width times height pixels; path None: as a PIL image.

    A panel: (title, x label, y label, series, axes); axes, optional, may contain logx, logy and
    equal (a unit is as long in x as in y). series: {name: (xs, ys, kind, colour)}; kind, optional:
    line, points or bars (xs are the n + 1 edges); colour, optional: its number in COLOURS_OF_LINES.
    What has no place on the axes is left out. Names are shown where there are several series, but
    for those that begin with _.
    """
    width, height = width * ZOOM, height * ZOOM
    canvas = Image.new("RGB", (width * len(panels), height), "white")
    pen = ImageDraw.Draw(canvas, "RGBA")
    pen.font = ImageFont.load_default(11 * ZOOM)
    for i, panel in enumerate(panels):
        draw_panel(pen, i * width, width, height, *panel)
    return save_png(path, canvas.reduce(ZOOM))


def save_png(path, canvas):
    """canvas, written to path if that is not None."""
    if path:
        buffer = io.BytesIO()
        canvas.save(buffer, "PNG")
        write(path, buffer.getvalue())
    return canvas


def draw_tile(image, caption, colour, side):
    """A tile of sheet() with 4 pixels around it; the lines of the caption are cut to the picture's
    width."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.ascontiguousarray(image))
        image = image.resize((round(image.width * side / image.height), side), Image.LANCZOS)
    width, height, lines = image.width, image.height, caption.splitlines()
    tile = Image.new("RGB", (width + 8, height + 14 * len(lines) + 8), "white")
    pen = ImageDraw.Draw(tile)
    pen.font = ImageFont.load_default(11)
    if colour:
        pen.rectangle((1, 1, width + 6, height + 6), colour)
    tile.paste(image, (4, 4))
    for i, text in enumerate(lines):
        while pen.textlength(text) > width and len(text) > 3:
            text = text.rstrip("…")[:-1] + "…"
        pen.text((4 + width / 2, height + 9 + 14 * i), text, INK, anchor="mt")
    return tile


def sheet(path, title, sections, side=96):
    """Pictures with captions as a PNG; path None: as a PIL image. A section: (heading, columns,
    tiles). A tile: (uint8 array (h, w, 3), shown `side` pixels high, or a PIL image as it is;
    caption of one line or more; colour of its frame or None)."""
    headings, placed = [], []
    width, y = ImageFont.load_default(11).getlength(title) * 1.5 + 24, 40
    for heading, columns, tiles in sections:
        if heading:
            headings.append((heading, (12, y + 10)))
            y += 26
        for i in range(0, len(tiles), columns):
            x, height = 8, 0
            for tile in tiles[i:i + columns]:
                tile = draw_tile(*tile, side)
                placed.append((tile, (x, y)))
                x += tile.width
                height = max(height, tile.height)
            width = max(width, x + 8)
            y += height
        y += 8
    canvas = Image.new("RGB", (int(width), y + 4), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((12, 14), title, INK, ImageFont.load_default(16), "lt")
    for heading, place in headings:
        pen.text(place, heading, INK, ImageFont.load_default(13), "lt")
    for tile, place in placed:
        canvas.paste(tile, place)
    return save_png(path, canvas)


# ---- Synthetic faces: for a machine without data -------------------------------------------------------------

# A face is outlines, filled from back to front. A point is x + iy in a square of -1..1, y down,
# with the eyes near -0.08i as in a 112x112 ArcFace crop. PERSON says who it is and SHOT what a
# photograph changes. A row: name, lowest and highest value, meaning. No row of PERSON alone tells
# people apart, and in raw pixels SHOT outweighs them all: telling people apart takes learning.
PERSON = """
head     .64   .84   half the width of the skull
chin     .84   .97   half its height
jaw      .03   .4    how much narrower it is at the chin
square   .62   .95   1 for an ellipse, less for a box
ear      .09   .19   half the width of an ear
ear_y   -.06   .14
eye_x    .26   .38   the middle of an eye
eye_y   -.14  -.02
eye_w    .12   .18   half its width
eye_h    .45   .8    its height, in widths
tilt    -.3    .25   its slope, radians
lash     .06   .2    upper lashes
iris_r   .38   .56   radius, in halves of the eye's width
lid      0     .4    height and shade of the upper lid
brow_y   .14   .29   above the eye
brow_w   .13   .21   half its length
brow_h   .006  .04   half its thickness
arch     0     .1
slant   -.03   .03
nose_y   .16   .38   its tip
nose_w   .06   .14
nose_h   .04   .1
mouth_y  .5    .66
mouth_w  .15   .3    half its width
upper    .02   .08   thickness of the lips
lower    .02   .09
corner  -.03   .04   how far the corners are up
rouge    0     .7    colour of the lips, from skin to red
bald     0     1     below .1: no hair
line    -.72  -.36   the hair's lower edge on the forehead
temple  -.35   .1    and at the temples
boxy    1.5    7     how sharp the corner between them is
lock     0     .35   a lock on the forehead: how far down
lock_x  -.7    .7    and where
volume   0     .16   thickness of the hair
curl     0     .07   depth of its waves
mane     0     1.1   above .5: long hair behind the head
beard    0     1     above .72: a beard, above .86: a moustache
chop     .1    .7    how far up the cheeks the beard goes
stubble  0     .8    how much skin is seen through it
specs    0     1     above .75: glasses
frame    .4    1     their shape, from boxy to round
"""
SHOT = """
roll    -.13   .13   radians
yaw     -.24   .24   what is near the camera moves sideways
pitch   -.1    .1    and up or down
zoom     .92  1.06
dx      -.07   .07
dy      -.07   .07
smile   -.01   .11
gape    -.06   .08   above 0: the mouth is open
lift    -.02   .03   of the brows
squint   .75  1.1    height of the eyes, a factor
gaze     .2    .7    how far the irises move with yaw
prop     0     1     below .08: glasses taken off, .9 to .94: a cap, above .97: sunglasses
sun      0    6.28   where the light comes from, radians
relief   .2    .8    how much of it comes from there
exposure -.4   .2    of the camera: powers of e
warmth  -.16   .2    from blue to red light
gamma    .75  1.3
blur    -.6    .6    radius in 1/64 of the side
"""
COLOURS = dict(                                             # each person's is a blend, mostly of one or two
    skin="#ffdec4 #ecb88e #b27a54 #6e4834",
    hair="#b2b0ae #1c161a #5c3822 #965e30 #ecce92 #b04a24",
    iris="#422818 #825428 #548246 #4280ba",
    metal="#18161a #d6aa46")
TURN = np.linspace(0, 2 * np.pi, 32)                        # all around
OVER = np.linspace(.12, -3.26, 40)                          # from ear to ear over the top
LINE = np.linspace(-1, 1, 31)                               # from side to side
BUMP = 1 - LINE ** 2                                        # 0 at the sides, 1 in the middle


def oval(centre, rx, ry, power=1., turn=TURN):
    """A superellipse; with power < 1 it is boxy."""
    c, s = np.cos(turn), np.sin(turn)
    return centre + rx * np.sign(c) * abs(c) ** power + 1j * ry * np.sign(s) * abs(s) ** power


def between(x, top, bottom):
    """The outline of what lies between two lines, y = top and y = bottom, over x."""
    return np.append(x + 1j * top, (x + 1j * bottom)[::-1])


def skull(p, turn):
    """The head's outline at angles turn."""
    radius = p.head * (1 - p.jaw * np.maximum(np.sin(turn), 0) ** 2)
    return oval(0, radius, p.chin, p.square, turn)


def both(colour, outline, depth):
    """The layers of an outline and of its mirror image."""
    return (colour, outline, depth), (colour, -outline.conj(), depth)


# The parts of a face yield layers (colour, outline, depth). Yaw and pitch move a layer by its
# depth, which is how far it lies before the head's axis.

def head(p):
    """What does not move in the face: neck, ears, skull, spots, beard, hair."""
    if p.bald > .1 and p.mane > .5:
        yield p.hair * .8, oval(-.1j, p.head + .1 + p.volume, .3 + p.mane, .7), -.1  # long hair
    yield p.skin * .78, between(LINE * .4, .5, 1.4), -.1    # the neck
    yield from both(p.skin, oval(p.head + 1j * p.ear_y, p.ear, .19), -.12)  # ears
    yield p.skin, skull(p, TURN), 0
    for spot in p.spots:
        yield p.skin * .72, oval(spot, .02, .02), .5
    if p.beard > .72:
        chops = 1j * (p.mouth_y + .15 - p.chop * LINE ** 4)
        top = LINE * p.head * .92 + chops
        yield p.beard_colour, np.append(skull(p, TURN[1:16]) * 1.02, top), 0
    if p.bald > .1:
        y = p.line + (p.temple - p.line) * abs(LINE) ** p.boxy  # where the hair begins
        y = y + p.lock * np.exp(-((LINE - p.lock_x) / .16) ** 2)
        x = LINE * p.head * (1 - (np.minimum(y, 0) / p.chin) ** 2) ** (p.square / 2)
        # a factor
        puff = 1.02 + p.volume * np.clip(.25 - np.sin(OVER), .1, 1) + p.curl * (1 + np.sin(12 * OVER))
        yield p.hair, np.append(skull(p, OVER) * puff, x + 1j * y), .03


def eyes(p, q):
    """Eyes and brows. An eye is drawn around 0, one long on either side, then turned, scaled and
    put in its place."""
    lean = p.eye_w * np.exp(1j * p.tilt)
    tall = p.eye_h * q.squint
    lid, fold = tall * BUMP ** .55, .3 + .6 * p.lid

    def on_eyes(colour, outline, depth=.46):
        return both(colour, outline * lean + p.eye, depth)

    yield from on_eyes(p.skin * (.95 - p.lid), between(LINE * 1.15, -lid - fold, .7 * lid))  # upper lid
    yield from on_eyes((244, 240, 236), between(LINE, -lid, .7 * lid))  # white
    # the iris's rim, the iris, the pupil, a glint
    for r, colour in ((1, p.iris * .6), (.8, p.iris), (.45, (16, 12, 12)), (.25, (255, 255, 255))):
        disc = oval(.25j * (r - 1), r * p.iris_r, r * p.iris_r)
        disc.imag = disc.imag.clip(-.85 * tall, .6 * tall)  # the lids cut the iris
        yield from on_eyes(colour, disc, q.gaze)
    yield from on_eyes(p.hair * .3, between(LINE * 1.05, -lid - p.lash, .05 - lid))  # lashes
    y = p.eye_y - p.brow_y - q.lift - p.arch * BUMP + p.slant * LINE
    half = p.brow_h * (1.4 - LINE)
    yield from both(p.hair * .7, between(p.eye_x + LINE * p.brow_w, y - half, y + half), .48)  # brows


def nose_and_mouth(p, q):
    """The nose, the lips, what is seen between them, and a moustache."""
    # its wings, its tip, the nostrils
    for light, x, y, rx, ry in ((.8, .5, .2, .7, .7), (.93, 0, 0, .8, 1), (.45, .5, .6, .3, .2)):
        centre = p.nose_w * x + 1j * (p.nose_y + p.nose_h * y)
        yield from both(p.skin * light, oval(centre, p.nose_w * rx, p.nose_h * ry), .58)
    gap = max(q.gape, 0) * BUMP
    x = LINE * (p.mouth_w + .5 * max(q.smile, 0))
    y = p.mouth_y - (p.corner + q.smile) * (LINE ** 2 - .4) - gap / 2
    inside = y + 1.5 * gap
    lips = p.skin * (.85, .6, .62) * (1 - p.rouge) + np.multiply((196, 40, 62), p.rouge)
    yield lips, between(x, y - p.upper * BUMP ** .7, inside + p.lower * BUMP), .5  # both lips
    yield (70, 18, 22), between(x * .95, y - .007, inside + .007), .5  # the gap between them
    if q.gape > .02:                                        # teeth
        yield (246, 242, 236), between(x * .8, y, y + np.minimum(gap, .06 * BUMP)), .5
    if p.beard > .86:                                       # a moustache
        yield p.beard_colour, between(x * 1.15, y - p.upper - .08 * BUMP ** .5, y - .6 * p.upper), .55


def glasses_and_cap(p, q, cap):
    """What is put on in some photographs; cap: its colour."""
    glass = oval(p.eye, .2, .17, p.frame)
    worn, dark = p.specs > .75 and q.prop > .08, q.prop > .97
    if worn:
        yield from both(p.metal, np.append(glass, glass * .82 + p.eye * .18), .55)
    if dark:                                                # sunglasses
        yield from both(p.metal * .3, glass, .55)
    if worn or dark:
        yield p.metal, between(LINE * .13, p.eye_y - .04, p.eye_y), .58  # the bridge
    if .9 < q.prop < .94:
        yield cap, skull(p, TURN[18:31]) * 1.2, 0


def draw_from(rng, table):
    """An object with a number for each row of a table such as SHOT, drawn uniformly from its range.
    """
    drawn = SimpleNamespace()
    for row in table.strip().splitlines():
        name, low, high = row.split()[:3]
        setattr(drawn, name, rng.uniform(float(low), float(high)))
    return drawn


def person(rng):
    """Somebody new: a number for each row of PERSON, a colour for each of COLOURS, moles or
    freckles."""
    p = draw_from(rng, PERSON)
    for name, row in COLOURS.items():
        colours = [ImageColor.getrgb(colour) for colour in row.split()]
        setattr(p, name, rng.dirichlet([.2] * len(colours)) @ colours)
    p.eye = p.eye_x + 1j * p.eye_y
    p.beard_colour = p.hair + (p.skin - p.hair) * p.stubble
    spots = rng.choice((0, 0, 0, 1, 2, 12))
    p.spots = rng.uniform((-.5, 0), (.5, .35), (spots, 2)) @ (1, 1j)
    return p


def expose(canvas, q, rng):
    """uint8 image of the painted canvas: light from one side on a round head, its colour, the
    camera's tone curve and noise."""
    size = canvas.width
    canvas = canvas.filter(ImageFilter.GaussianBlur(max(q.blur, 0) * size / 64))
    across = np.linspace(-1, 1, size)
    x, y = across - q.dx, across[:, None] - q.dy
    side = np.clip(np.cos(q.sun) * x + np.sin(q.sun) * y, -1, 1)
    front = np.clip(1 - x * x - y * y, 0, 1)
    light = np.maximum(1 + q.relief * (.8 * side + .6 * front - .3), .15)[..., None]
    light = light * np.exp([q.warmth, 0, -q.warmth])        # (size, size, 3)
    image = np.float32(canvas) / 255 * np.float32(light * np.exp(q.exposure))
    image = image ** q.gamma + .015 * rng.standard_normal(image.shape, np.float32)
    return (image * 255).clip(0, 255).astype(np.uint8)


def face(p, rng, size=64):
    """A photograph of person p: (size, size, 3) uint8, a function of p and the generator's state
    alone."""
    q = draw_from(rng, SHOT)
    wall = rng.integers(30, 226, (*rng.integers(1, 6, 2), 3), np.uint8)
    canvas = Image.fromarray(wall).resize((size * 3, size * 3), Image.BILINEAR)   # and reduced: anti-aliasing
    pen = ImageDraw.Draw(canvas)
    turn, shift = q.zoom * np.exp(1j * q.roll), 1 + q.dx + 1j + 1j * q.dy
    swing = q.yaw + 1j * q.pitch
    layers = itertools.chain(head(p), eyes(p, q), nose_and_mouth(p, q), glasses_and_cap(p, q, wall[0, 0]))
    for colour, outline, depth in layers:
        z = ((outline + depth * swing) * turn + shift) * (size * 1.5)
        pen.polygon(z.view(float).tolist(), fill=tuple(map(int, colour)))
    return expose(canvas.reduce(3), q, rng)


def synthesise(root, people=200, images=11, size=64, seed=0):
    """Write the homework's layout to root, not there yet: `people`, 8 or more, with `images` each
    in train and one in dev and test; others behind val_pairs.txt, yet others behind test_pairs.txt
    (whose labels are answers.txt)."""
    root = Path(root).resolve()
    draft = root.with_name(f"{root.name}.{os.getpid()}.part")
    rng = np.random.default_rng(seed)

    def shoot(p, file):
        (draft / file).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(face(p, rng, size))
        image.save(draft / file, quality=92, subsampling=0)     # JPEG as in the homework; irises keep colour
        return Path(file).name

    def write_lines(file, lines):
        (draft / file).write_text("\n".join(lines) + "\n")

    try:
        crowd = [person(rng) for _ in range(people)]
        for split, count in (("train", images), ("dev", 1), ("test", 1)):
            lines = []
            for n in range(count * people):
                name = shoot(crowd[n % people], f"cls_data/{split}/images/{split}_{n:06d}.jpg")
                lines.append(f"{name} {n % people}")
            write_lines(f"cls_data/{split}/labels.txt", lines)
        for split in ("val", "test"):
            lines, shots = [], []
            for k, p in enumerate([person(rng) for _ in range(people // 4)]):
                shots.append([shoot(p, f"ver_data/{split}_{k:04d}_{n}.jpg") for n in range(5)])
            for k, own in enumerate(shots):
                for n in range(5):                          # an image meets its person's last one, then a stranger's
                    stranger = shots[k - rng.integers(1, len(shots))]
                    lines.append(f"{own[n]} {own[n - 1]} 1")
                    lines.append(f"{own[n]} {stranger[rng.integers(5)]} 0")
            rng.shuffle(lines)
            if split == "test":
                write_lines("answers.txt", [line[-1] for line in lines])
                lines = [line[:-2] for line in lines]
            write_lines(f"{split}_pairs.txt", lines)
        draft.rename(root)                                  # at the end: never half a set
    except OSError:
        if not (root / "answers.txt").exists():             # else another process was first, with the same images
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# ---- Command line --------------------------------------------------------------------------------------------

def describe(split, unreadable):
    """A Split or Pairs in words: numbers of images, of unreadable ones, of people or pairs; sizes
    in pixels."""
    files, labels = split.files, split.labels
    sizes = Counter(filter(None, map(measure, files[:1000])))
    common = ", ".join(f"{n} of {width}x{height}" for (width, height), n in sizes.most_common(3))
    sample = "of the first 1,000 " if len(files) > 1000 else ""
    text = f"{len(files)} images, {unreadable} unreadable; {sample}{common}"
    if isinstance(split, Pairs):
        text += f"; {len(split.left)} pairs"
        if labels is not None:
            text += f", {labels.sum()} genuine"
    elif labels is not None:
        counts = np.unique(labels, return_counts=True)[1]
        text += (f"; {len(counts)} people with {counts.min()} to {counts.max()} images, median {np.median(counts):g},"
                 f" {(counts == 1).sum()} of them with one")
    return text


def compare_images(packs, root):
    """One reading of packs {name: (Images, rows)}: (mean, deviation, duplicates). mean and standard
    deviation (3,) are of the training images' colours in 0..1, duplicates the lines about images
    that are equal once decoded."""
    mean, square, first_with, duplicates = 0, 0, {}, []
    for name, (images, rows) in packs.items():
        progress = Progress(f"comparing {name}", len(rows))
        for i in range(0, len(rows), 64):                   # that many fit in memory
            block = images[rows[i:i + 64]]
            if name == "train":
                colours = block.reshape(-1, 3) / 255
                share = len(block) / len(rows)
                mean += share * colours.mean(0)
                square += share * (colours ** 2).mean(0)
            for row, image in zip(rows[i:], block):
                file = os.path.relpath(images.files[row], root)
                first = first_with.setdefault(hashlib.sha256(image).digest(), file)
                if first != file:
                    duplicates.append(f"{file} = {first}")
            progress.update(i + len(block))
    return mean, (square - mean ** 2) ** 0.5, duplicates


def draw_contact_sheet(path, faces, images, rows, augmented):
    """A chart of how many images people have, over 72 training images drawn at random, as training
    sees them if augmented."""
    tiles = images[np.random.default_rng(0).permutation(rows)[:72]]
    heading = "drawn at random"
    if augmented:
        heading = "as training sees them"
        x = augment(torch.from_numpy(tiles), {name: long for name, (_, long, _) in AUGMENT.items()})
        tiles = ((x + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    counts = np.bincount(faces.train.labels)
    width = math.ceil(counts.max() / 40)                    # at most 41 bars, of whole numbers
    edges = np.arange(0, counts.max() + width + 1, width)
    bars = {"": (edges - 0.5, np.histogram(counts, edges)[0], "bars")}
    chart = plot(None, [("images a person", "images", "people", bars)], 12 * 72, 240)
    title = f"{faces.root.name}: {len(rows)} training images of {len(faces.names)} people"
    sheet(path, title, [("", 1, [(chart, "", None)]), (heading, 12, [(tile, "", None) for tile in tiles])], 64)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage
    parser.add_argument("--data", default="data", help="the set's folder or one above it [data]")
    parser.add_argument("--holdout", type=float, default=0.1, help="as in train.py [0.1]")
    parser.add_argument("--augment", action="store_true", help="draw the contact sheet as a long run sees the images")
    parser.add_argument("--sheet", default="contact.png", help="where the contact sheet goes [contact.png]")
    args = parser.parse_args()
    faces = load(args.data, args.holdout)
    size, cache = native_size(faces.train.files), cache_folder(faces.root)
    print(f"{faces.root}: {faces.note}" if faces.note else faces.root)
    packs = {}
    for name in ("train", "dev", "test", "val_pairs", "test_pairs"):
        split = getattr(faces, name)
        if split:
            images, rows = packs[name] = pack(split.files, size, cache, name)
            print(f"{name}: {describe(split, len(images) - len(rows))}")
    mean, deviation, duplicates = compare_images(packs, faces.root)
    print("train, 0..1: mean {:.4f} {:.4f} {:.4f}, standard deviation {:.4f} {:.4f} {:.4f} (red, green, blue)".format(
        *mean, *deviation))
    print(f"duplicates: {len(duplicates)} images equal an earlier one once decoded")
    for line in duplicates[:10]:
        print(f"    {line}")
    if len(duplicates) > 10:
        print("    ...")
    draw_contact_sheet(args.sheet, faces, *packs["train"], args.augment)
    print(f"contact sheet: {args.sheet}")


if __name__ == "__main__":
    cli(main)
