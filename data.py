"""Faces in, pictures out: find a data set, decode it once, hand out augmented batches.

    python data.py --data DIR           # what is in DIR: counts, images a person, sizes, unreadable files
    python data.py --data DIR --prepare OUT --landmarks FILE        # cut faces out of photographs; --help tells more

DIR is found, not configured. It may be, or lie above,

    cls_data/{train,dev,test}/images/* + labels.txt     '<file> <integer>' a line (homework, 2025 and later)
    cls_data/{train,dev}/<person>/*                     (homework, 2024)
    <person>/*                                          any folder with one sub-folder a person

with ver_data/* and val_pairs, test_pairs beside or inside it: .txt ('<image> <image> [0|1]', no header) or .csv
(commas; a header, or none). Without val_pairs, some people are held out by seed, and the pairs are drawn from them.

An image is decoded once, brought upright to RGB as a viewer shows it, cropped to its central square, and put as
uint8 (S, S, 3) into a pack: one memory-mapped file, named after a digest of the files it came from, with a checksum.
A batch is gathered from the pack by index and augmented on the device, each image with random numbers of its own.

Ignored: hidden files and folders, those of operating systems (__MACOSX), and runs of train.py. Files without an
image's suffix are skipped, counted and named.
"""
import argparse
import codecs
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import math
import mmap
import os
import random
import re
import shutil
import sys
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
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
LEFT_BEHIND = "__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "lost+found", "$RECYCLE.BIN"     # beside hidden files
MAX_UNREADABLE = 0.01                                      # share of a set; more of it is an error in training
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
    """A data set, as load() finds it. names: of the people, class c is names[c]. note: a line for
    the user: people held out, files skipped."""
    root: Path
    names: list
    train: Split
    dev: Split | None
    test: Split | None
    val_pairs: Pairs | None
    test_pairs: Pairs | None
    note: str


def read_lines(path):
    """(number, text) of the lines that are not blank; a BOM, UTF-16, CRLF and names in any encoding
    are all right."""
    encoding, errors = "utf-8-sig", "surrogateescape"
    with open(regular(path), "rb") as f:
        if f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):         # as PowerShell writes
            encoding, errors = "utf-16", "replace"
    with open(path, encoding=encoding, errors=errors) as f:
        for number, line in enumerate(f, 1):
            if "\0" in line:
                raise ValueError(f"{path}:{number}: a zero byte; save the list as UTF-8 text")
            if line.strip():
                yield number, line.strip()


def is_number(text):
    """Whether text is 0, 1, 2, ..., and fits 64 bits."""
    return text.isdecimal() and len(text) <= 18


def find_image(folder, name):
    """The path of folder/name; None where there is nothing. The name may begin with the folder's
    own, and spell an accent in either of Unicode's ways (macOS splits it from its letter)."""
    own_name = os.path.basename(os.path.abspath(folder))
    for below in (name, name.removeprefix(own_name + "/")):
        for form in (below, unicodedata.normalize("NFC", below), unicodedata.normalize("NFD", below)):
            path = os.path.join(folder, form)
            if os.path.isfile(path) or os.path.islink(path):        # a dangling link: pack() calls it unreadable
                return path
    return None


def checked_path(folder, name, where):
    """find_image(folder, name). ValueError when that leaves the folder or is not there."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"{where}: '{name}' leaves {folder}; name images inside it")
    path = find_image(folder, name)
    if not path:
        raise ValueError(f"{where}: no image '{name:.200}' in {folder}; copy it there or delete the line")
    return path


def read_labels(folder):
    """(files, labels) of a folder with images/ and labels.txt; labels are the file's own integers.
    """
    images = os.path.join(folder, "images")
    label_of = {}
    for i, line in read_lines(os.path.join(folder, "labels.txt")):
        where = f"{folder}/labels.txt:{i}"
        columns = line.rsplit(None, 1)                      # a file's name may have spaces
        if len(columns) != 2 or not is_number(columns[1]):
            raise ValueError(f"{where}: '{line:.200}' is not '<file> <label>' with a label of 0, 1, 2, ...")
        name, label = columns
        file = checked_path(images, name, where)
        if file in label_of:
            raise ValueError(f"{where}: '{name}' stands on an earlier line already; keep one of them")
        label_of[file] = int(label)
    return list(label_of), list(label_of.values())


def is_image(name):
    """Whether a file's name ends as an image's."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_left_behind(name):
    """Whether a file or folder is hidden or a system's: no image, and no person's."""
    return name.startswith(".") or name in LEFT_BEHIND


def sub_folders(folder):
    """Names of the sub-folders that may be people's: not what is_left_behind(), nor runs of
    train.py."""
    names = []
    for path in sorted(Path(folder).iterdir()):
        is_run = os.path.exists(path / "log.csv") or os.path.exists(path / "last.pt")
        if path.is_dir() and not is_run and not is_left_behind(path.name):
            names.append(path.name)
    return names


def images_in(folder, skipped=None):
    """The image files that lie in a folder itself. skipped: a list that gets the files which have
    no image's suffix."""
    images = []
    for entry in os.scandir(folder):
        if is_left_behind(entry.name):
            continue
        if is_image(entry.name):
            images.append(entry.path)
        elif skipped is not None and not entry.is_dir(follow_symlinks=False):
            skipped.append(entry.path)
    return sorted(images)


def read_people(folder, skipped=None):
    """(files, labels) of a folder with one sub-folder a person; labels are the sub-folders' names.
    skipped: as in images_in(); it gets sub-folders without images as well."""
    files, labels = [], []
    for name in sub_folders(folder):
        if name != "ver_data":
            images = images_in(os.path.join(folder, name), skipped)
            if skipped is not None and not images:
                skipped.append(os.path.join(folder, name))
            files += images
            labels += [name] * len(images)
    return files, labels


def read_split(folder, skipped=None):
    """(files, labels) of a folder in any layout. ([], None) where there is no such folder. labels
    are None for images/ without labels.txt, and for images that lie in the folder itself. skipped:
    as in images_in(); it gets images beside the people's folders as well."""
    if os.path.lexists(os.path.join(folder, "labels.txt")):
        return read_labels(folder)
    if not os.path.isdir(folder):
        return [], None
    files, labels = read_people(folder, skipped)
    if not files:
        return images_in(folder, skipped), None
    if skipped is not None:
        skipped += images_in(folder)
    return files, None if set(labels) == {"images"} else labels


def why_skipped(file):
    """The reason for a file in read_split()'s list of skipped ones."""
    if os.path.isdir(file):
        return "folders without images of their own"
    return "beside the people's folders" if is_image(file) else "without an image's suffix"


def read_labelled(folder, skipped=None):
    """read_split() of a folder that must have images of known people."""
    files, labels = read_split(folder, skipped)
    if not labels:
        raise ValueError(f"{folder}: no labelled training images; expected labels.txt and images/, or one sub-folder"
                         " of images a person, there or in cls_data/train")
    return files, labels


def find_lfw_image(folder, name, number):
    """The name below folder of LFW's image: name/name_0007 and a suffix; '.*' where there is none.
    """
    stem = f"{name}/{name}_{int(number):04d}"
    for suffix in [".jpg"] + sorted(SUFFIXES):              # .jpg first, as nearly all have it
        for written in (suffix, suffix.upper()):
            if find_image(folder, stem + written):
                return stem + written
    return stem + ".*"


def read_lfw(path, folder):
    """(rows, folds) of LFW's pair lists, with rows as read_pairs() has them. The first line is 'n'
    or 'folds<tab>n'. Each fold has n lines 'name i j', two images of one person, then n lines 'name
    i name j'."""
    (_, head), *lines = read_lines(path)
    numbers = ["1"] + head.split()                          # one fold where the line is 'n' alone
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
        if len(fields) != 4 or not is_number(fields[1]) or not is_number(fields[3]):
            raise ValueError(f"{path}:{i}: '{line:.200}'; LFW's lines are 'name i j' or 'name i name j'")
        left, right = find_lfw_image(folder, *fields[:2]), find_lfw_image(folder, *fields[2:])
        rows.append((i, [left, right, label]))
    if folds == 1:
        return rows, None
    return rows, np.arange(len(rows)) // (2 * n)


def is_header(row, folder):
    """Whether no cell of a pair list's first row is a label, or the name of an image."""
    for cell in row:
        if is_image(cell) or cell in ("0", "1") or find_image(folder, cell):
            return False
    return True


def read_pairs(path, folder):
    """Pairs from a .txt or .csv file whose image names are relative to folder: '<image> <image>
    [0|1]' lines, or LFW's lists, known by their first line of nothing but numbers. A .csv may have
    a header."""
    is_csv = str(path).lower().endswith(".csv")
    rows, folds = [], None
    for i, line in read_lines(path):
        columns = line.split("," if is_csv else None)
        rows.append((i, [c.strip() for c in columns]))
    if rows and not is_csv and is_number("".join(rows[0][1])):
        rows, folds = read_lfw(path, folder)
    elif rows and is_header(rows[0][1], folder):
        number, cells = rows.pop(0)
        if not is_csv:
            raise ValueError(f"{path}:{number}: '{' '.join(cells):.200}' names no image in {folder}; if it is a header,"
                             " delete the line")
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


def list_names(name):
    """The files that may hold the pairs of val_pairs or test_pairs; the course says test_pair, too.
    """
    return f"{name}.txt", f"{name}.csv", f"{name[:-1]}.txt", f"{name[:-1]}.csv"


def find_pairs(root, name):
    """The pairs of one of list_names(name), in root or in ver_data; None where there are none."""
    ver_data = root / "ver_data"
    images = ver_data if ver_data.is_dir() else root
    for folder in (root, ver_data):
        for file in list_names(name):
            if os.path.lexists(folder / file):
                return read_pairs(folder / file, images)
    return None


def find_root(path):
    """The folder at or below path that holds cls_data or the people's folders."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; --data takes the folder that holds cls_data or people's folders")
    found = []
    for pattern in ("cls_data", "*/cls_data", "*/*/cls_data", "*/*/*/cls_data"):
        if found and pattern.startswith("*/*/*"):           # it would list the folders of all people of that set
            break
        for folder in sorted(path.glob(pattern)):
            if not any(map(is_left_behind, folder.relative_to(path).parts)):
                found.append(folder)
    if len(found) > 1:
        raise ValueError(f"{path}: several data sets, as {found[0].parent} and {found[1].parent}; name one that holds"
                         " no other, or move one away")
    if found:
        return found[0].parent
    while True:                                             # a folder with nothing but a folder is gone through
        inside = sub_folders(path)
        if len(inside) != 1 or read_people(path)[0]:
            return path
        for name in [*list_names("val_pairs"), *list_names("test_pairs")]:
            if os.path.lexists(path / name):
                raise ValueError(f"{path / name}: the people's folders are in {path / inside[0]}; move the list there")
        path = path / inside[0]


def hold_out(files, labels, share, seed):
    """(people, Pairs): a share of the people with two images or more, drawn to leave the training set.
    Genuine pairs of theirs (up to 10 a person, 5,000 in all) and as many impostor pairs are drawn."""
    rng = np.random.default_rng(seed)

    def draw(items, most):
        return [items[i] for i in rng.permutation(len(items))[:most]]

    rows_of = {}
    for row, person in enumerate(labels):
        rows_of.setdefault(person, []).append(row)
    several = [p for p in rows_of if len(rows_of[p]) > 1]
    # at least two people are held out, for impostor pairs, and two are left to train on
    n = min(max(2, round(share * len(several))), len(rows_of) - 2)
    if n < 2 or len(several) < 2:
        raise ValueError(f"{len(rows_of)} people, {len(several)} of them with two images or more, are too few to hold"
                         " two out for validation; add people, or a val_pairs.txt, or train with --holdout 0")
    held_out = draw(several, n)
    genuine, impostor = [], []
    for person in held_out:
        own = rows_of[person]
        pairs = math.comb(len(own), 2)                      # can be a million: draw their numbers, do not list them
        for pair in rng.choice(pairs, min(pairs, 10), replace=False).tolist():
            second = (1 + math.isqrt(1 + 8 * pair)) // 2    # pairs 0 (0, 1), 1 (0, 2), 2 (1, 2), 3 (0, 3), ...
            first = pair - math.comb(second, 2)
            genuine.append((own[first], own[second]))
    genuine = draw(genuine, 5000)                           # in random order, also where there are fewer
    for _ in genuine:
        one, two = rng.choice(len(held_out), 2, replace=False)
        impostor.append([rng.choice(rows_of[held_out[one]]), rng.choice(rows_of[held_out[two]])])
    # an image that is in several pairs is listed once
    rows, position = np.unique(genuine + impostor, return_inverse=True)
    left, right = position.reshape(-1, 2).T
    same = np.repeat([1, 0], len(genuine))
    return set(held_out), Pairs([files[i] for i in rows], left, right, same)


def number_classes(files, labels, class_of):
    """Split of (files, labels) with class numbers in place of names; None without files."""
    if not files:
        return None
    if labels is None:
        return Split(files, None)
    for file, name in zip(files, labels):
        if name not in class_of:
            raise ValueError(f"{file} is of '{name}', who is not in the training set; take it out or add images of"
                             " that person to train")
    return Split(files, np.array([class_of[name] for name in labels]))


def without_people(files, labels, people):
    """(files, labels) of everybody else; labels may be None."""
    if labels is None:
        return files, None
    rest = [i for i, name in enumerate(labels) if name not in people]
    return [files[i] for i in rest], [labels[i] for i in rest]


def describe_missing(root, skipped, lists):
    """Pair lists that load() did not find and files that it skipped: lines for FaceSet.note. lists: {name:
    Pairs or None}."""
    notes = []
    for name, pairs in lists.items():
        if pairs is None and (root / "ver_data").is_dir():
            notes.append(f"ver_data, but no {name}: looked for {', '.join(list_names(name))}")
    skipped_for = {}
    for file in sorted(skipped):
        skipped_for.setdefault(why_skipped(file), []).append(os.path.relpath(file, root))
    for why, files in skipped_for.items():
        more = ", ..." if len(files) > 3 else ""
        notes.append(f"{len(files)} skipped, {why}: {', '.join(files[:3])}{more}")
    return notes


def load(path, holdout=0.1, seed=0):
    """FaceSet of what --data names. Without val_pairs, a share holdout of the people is held out
    for them. ValueError, naming file, line and remedy, for what cannot be used."""
    root, skipped = find_root(path), []
    splits = root / "cls_data"
    files, labels = read_labelled(splits / "train" if splits.is_dir() else root, skipped)
    # without cls_data there are no such folders, and both are ([], None)
    others = [read_split(splits / "dev", skipped), read_split(splits / "test", skipped)]
    val_pairs, test_pairs = find_pairs(root, "val_pairs"), find_pairs(root, "test_pairs")
    notes = describe_missing(root, skipped, {"val_pairs": val_pairs, "test_pairs": test_pairs})
    if val_pairs and val_pairs.labels is None:
        raise ValueError(f"{val_pairs.path}:1: no label; write '<image> <image> <0|1>', and what has no labels to"
                         " test_pairs")
    if val_pairs is None and holdout:
        people, val_pairs = hold_out(files, labels, holdout, seed)
        notes.append(f"no val_pairs: {len(people)} of {len(set(labels))} people held out with all their images"
                     f" (seed {seed}) for {len(val_pairs.labels)} validation pairs")
        files, labels = without_people(files, labels, people)
        others = [without_people(*split, people) for split in others]
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"{root}: one person in all; add another, a classifier needs two at least")
    class_of = {name: c for c, name in enumerate(names)}
    train = number_classes(files, labels, class_of)
    dev, test = [number_classes(*split, class_of) for split in others]
    return FaceSet(root, list(map(str, names)), train, dev, test, val_pairs, test_pairs, "; ".join(notes))


def file_state(file):
    """(length in bytes, time of change) of a file; (-1, 0) if it cannot be read, such as a dangling link."""
    try:
        state = os.stat(file)
    except OSError:
        return -1, 0
    return state.st_size, state.st_mtime_ns


def set_digest(faces):
    """16 hex digits over what training and validation rest on: names below the root and lengths of
    their files, labels, pairs. A set that is moved or copied keeps its digest."""
    digest = hashlib.sha256()
    parts = [faces.train]
    if faces.val_pairs:
        parts.append(faces.val_pairs[:4])                   # files, left, right, labels
    for files, *numbers in parts:
        for file in files:
            name = str(file).removeprefix(str(faces.root))
            name = os.path.join("/", name)                  # alike where the root is "."
            digest.update(os.fsencode(f"{name}\0{file_state(file)[0]}\n"))
        for column in numbers:
            digest.update(np.asarray(column, np.int64).tobytes())
    return digest.hexdigest()[:16]


# ---- Packs: images decoded once ------------------------------------------------------------------------------

def upright(im):
    """A PIL image turned as its EXIF data say, of which nothing else is read."""
    im.load()                                               # TIFFs are turned while they are loaded
    orientation = 1
    with contextlib.suppress(Exception):                    # odd EXIF data are no reason to do without the pixels
        orientation = im.getexif().get(0x0112, 1)
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
             7: "TRANSVERSE", 8: "ROTATE_90"}
    if orientation in turns:
        return im.transpose(Image.Transpose[turns[orientation]])
    return im


def to_8_bits(im):
    """A grey image of whole numbers or floats as one of 8 bits, where convert() would clip at 255.
    White is the smallest usual value (1, 255, 65535, 2 ** 31 - 1) that no pixel exceeds."""
    grey = np.asarray(im, np.float64)
    whites = (1, 255, 65535) if im.mode == "F" else (255, 65535, 2 ** 31 - 1)
    fitting = [white for white in whites if grey.max() <= white]    # none for NaN
    if not fitting or grey.min() < -0.01 * fitting[0]:      # a little below black: of resampling
        raise ValueError(f"pixels from {grey.min():g} to {grey.max():g}")
    return Image.fromarray((grey * 255 / fitting[0]).round().clip(0, 255).astype(np.uint8))


def png_pixels(content):
    """The bytes of a PNG without the chunks that tell nothing about its pixels: text, profiles."""
    kept, i = content[:8], 8
    while i < len(content):
        end = i + 12 + int.from_bytes(content[i:i + 4], "big")      # length, type, data, checksum
        if content[i + 4:i + 8] in (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"):
            kept += content[i:end]
        i = end
    return kept


def to_rgb(im):
    """A PIL image in RGB as a viewer shows it: EXIF rotation, palettes, grey, 16 bit, alpha (over
    white)."""
    im = upright(im)
    if im.mode.startswith(("I", "F")):                      # 16-bit PNG, and TIFF
        im = to_8_bits(im)
    if im.has_transparency_data:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return im.convert("RGB")


def rgb(file):
    """to_rgb() of an image file. A PNG whose text or profile is odd is read without them."""
    regular(file)
    try:
        with Image.open(file) as im:
            return to_rgb(im)
    except Exception:
        content = Path(file).read_bytes()
        if content.startswith(b"\x89PNG"):
            with contextlib.suppress(Exception), Image.open(io.BytesIO(png_pixels(content))) as im:
                return to_rgb(im)
        raise


def decode(file, size, crop=1.0):
    """uint8 (size, size, 3) of a file, or of a PIL image: of its central square the inner part,
    crop of its side. ValueError naming the file if it cannot be read."""
    try:
        im = to_rgb(file) if isinstance(file, Image.Image) else rgb(file)
        return np.asarray(ImageOps.fit(im, (size, size), Image.BICUBIC, (1 - crop) / 2))
    except Exception as e:                                  # Pillow raises a dozen kinds on broken files
        message = f"{file}: not a readable image ({str(e) or type(e).__name__})"
        raise ValueError(" ".join(message.split())) from None       # one line, as a file's name may have breaks


def measure(file):
    """(width, height) by an image's header, None where it is not readable; pack() is what counts
    the unreadable."""
    with contextlib.suppress(Exception):
        with Image.open(regular(file)) as im:
            return im.size
    with contextlib.suppress(Exception):
        return rgb(file).size
    return None


def native_size(files):
    """The side in pixels that most of the first hundred images have, within 32..256; 112 if none is
    readable."""
    sides = Counter(min(s) for s in map(measure, files[:100]) if s)
    side = max(sides, key=sides.get, default=112)
    return min(256, max(32, side))


def release_pages(memmap):
    """Tell the system that pages read so far may go; else resident memory grows to the pack's size."""
    if hasattr(mmap, "MADV_DONTNEED"):
        memmap._mmap.madvise(mmap.MADV_DONTNEED)


class Images:
    """uint8 faces (n, S, S, 3) indexed by an array of row numbers: pixels (n, S, S, 3) of a pack, or files decoded
    as asked."""

    def __init__(self, files, size, pixels, crop):
        self.files, self.size, self.pixels, self.crop = files, size, pixels, crop
        self.unreadable = {}                                # {number: why}, where pack() has read them all
        self.rows_read = 0

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if self.pixels is None:
            with ThreadPoolExecutor() as pool:
                images = pool.map(lambda i: decode(self.files[i], self.size, self.crop), index)
                return np.stack(list(images))
        self.rows_read += len(index)
        if self.rows_read * self.size ** 2 * 3 > 2 ** 30:   # every GiB
            release_pages(self.pixels)
            self.rows_read = 0
        return self.pixels[index]


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


def reserve(f, shape):
    """Begin the new file f as the .npy file of a uint8 array. Returns whether the disk has room for it."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, math.prod(shape) + 128)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return False                                    # other errors: it cannot reserve space; go on without
    np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return True


def decode_all(files, out, size, crop, what):
    """Decode all files, and write them to the file out if not None. Returns a line
    'number<tab>reason' for each unreadable one, which is written as black."""
    black = np.zeros((size, size, 3), np.uint8)

    def decode_one(i):
        try:
            return decode(files[i], size, crop), ""
        except ValueError as e:
            return black, f"{i}\t{e}\n"

    unreadable, progress = "", Progress(f"decoding {what}", len(files))
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(files), 512):             # a block at a time: a slow disk must not fill the memory
            block = range(first, min(first + 512, len(files)))
            for i, (image, line) in zip(block, pool.map(decode_one, block)):
                unreadable += line
                if out:
                    out.write(image)
                progress.update(i + 1)
    return unreadable


def pack_name(files, size, what, crop):
    """The name of a pack: its kind and a digest of every file's path, length and time, so that
    changed files get a new pack."""
    kind = f"{what}-{size}"
    if crop != 1:
        kind += f"x{crop:g}".replace(".", "")
    digest = hashlib.sha256(f"3 {size}".encode())           # 3: of how images are decoded
    for file in files:
        length, changed = file_state(file)
        digest.update(os.fsencode(f"{os.path.abspath(file)}\0{length} {changed}\n"))
    return f"{kind}-{digest.hexdigest()[:16]}"


def checksum(target, lines):
    """The last line of a listing: over the lines before, and the pack if there is one. CRC32 takes
    half a second a GB, where BLAKE2 takes 1.7 s."""
    crc = zlib.crc32(lines)
    if os.path.lexists(target):
        with open(regular(target), "rb") as f:
            for block in iter(functools.partial(f.read, 1 << 22), b""):
                crc = zlib.crc32(block, crc)
    return b"crc32\t%08x\n" % crc


def read_pack(target, listing, has_room):
    """(pixels (n, S, S, 3), {number: why that image is unreadable}) of a pack, None where anything is
    wrong with it. pixels are None where they were not written, for want of room, or cannot be mapped."""
    try:
        content = Path(regular(listing)).read_bytes()
        lines, mark, digits = content.rpartition(b"crc32\t")
        if mark + digits != checksum(target, lines):
            return None
    except OSError:
        return None
    unreadable, pixels = {}, None
    for line in lines.decode("utf-8", "surrogateescape").splitlines():
        number, _, reason = line.partition("\t")
        unreadable[int(number)] = reason
    if target.exists():
        with contextlib.suppress(OSError):                  # ENODEV: this file system has no memory maps
            pixels = np.load(target, mmap_mode="r")
    elif has_room:                                          # there was none when the listing was written
        return None
    return pixels, unreadable


def build_pack(target, listing, has_room, files, size, crop, what):
    """Decode files into a pack and its listing, and remove older packs of its kind. Returns whether
    there was room for it."""
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    for damaged in (target, listing):
        damaged.unlink(missing_ok=True)
    try:
        with open(temporary, "wb") as out:
            has_room = has_room and reserve(out, (len(files), size, size, 3))
            lines = decode_all(files, out if has_room else None, size, crop, what)
        if has_room:
            os.replace(temporary, target)
        lines = lines.encode("utf-8", "surrogateescape")
        write(listing, lines + checksum(target, lines))
    except OSError as e:
        e.filename = e.filename or str(temporary)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if has_room:
        kind, _ = target.name.rsplit("-", 1)
        for old in target.parent.glob(f"{kind}-*"):         # a process that has it mapped can go on reading it
            if not old.name.startswith(target.stem):
                with contextlib.suppress(OSError):          # on Windows it stays, too
                    old.unlink()
    return has_room


def pack(files, size, cache, what="images", crop=1.0, max_unreadable=MAX_UNREADABLE):
    """(Images, rows (k,)): the files as decode() has them, and the numbers of the readable ones.

    Unreadable files are listed beside the pack; a share of more than max_unreadable is a
    ValueError. A pack appears by renaming, whole or not at all, and replaces the last of its kind;
    if it is damaged, by the checksum at the end of its listing, it is made anew.
    Where the disk has no room, the files are only checked now and decoded anew for each batch.
    """
    name = pack_name(files, size, what, crop)
    target, listing = cache / f"{name}.npy", cache / f"{name}.unreadable.txt"
    has_room = len(files) * size * size * 3 < 0.9 * shutil.disk_usage(cache).free   # bytes
    found = read_pack(target, listing, has_room)
    if not found:
        with lock(cache, wait=True):                        # of two runs one decodes, the other finds it done
            found = read_pack(target, listing, has_room)
            if not found:
                has_room = build_pack(target, listing, has_room, files, size, crop, what)
                found = read_pack(target, listing, has_room)
    if not found:
        raise ValueError(f"{target}: not as it was written a moment ago; check the disk")
    pixels, unreadable = found
    message = f"{len(unreadable)} of {len(files)} {what} are unreadable"
    if len(unreadable) > max_unreadable * len(files):
        first = unreadable[min(unreadable)]
        raise ValueError(f"{first}; {message}, at most {max_unreadable:.0%} may be: see {listing}, then mend them, or"
                         " remove them from the set")
    if unreadable:
        print(f"{message} and left out: {listing}", file=sys.stderr)
    readable = np.setdiff1d(np.arange(len(files)), list(unreadable))
    images = Images(files, size, pixels, crop)
    images.unreadable = unreadable
    return images, readable


# ---- Batches: drawn, gathered one ahead, augmented on the device ---------------------------------------------

def epoch_batches(labels, rows, batch_size, seed, epoch, per_person=0):
    """(steps, batch) row numbers of an epoch, fixed by seed and epoch: the rows shuffled, an incomplete last batch
    dropped; or, with per_person = K, batches of P people x K images, see batches_of_people()."""
    rng = np.random.default_rng((seed, epoch))
    rows = rng.permutation(rows)
    if per_person:
        return batches_of_people(labels, rows, batch_size, per_person, rng)
    steps = max(1, len(rows) // batch_size)
    return np.resize(rows, (steps, min(batch_size, len(rows))))


def batches_of_people(labels, rows, batch_size, per_person, rng):
    """(steps, P * K) of rows in random order: P = batch_size // K people, K = per_person images of each.
    All people are drawn equally often on average. Nobody is in a batch twice unless there are fewer than P.
    Who has fewer than K images appears with repeated ones, which are augmented differently."""
    if batch_size < 2 * per_person:
        raise ValueError(f"--batch-size {batch_size} cannot hold two people with --per-person {per_person} images each;"
                         f" give {2 * per_person} or more, or fewer a person")
    images_of = rows_of_people(labels, rows)                # of each in random order
    groups = max(2, math.ceil(len(rows) / per_person))      # groups of K images; together about len(rows)
    people = min(batch_size // per_person, groups)
    steps = groups // people
    drawn = []                                              # the people of each batch
    while len(drawn) < steps:
        everybody = rng.permutation(len(images_of))
        everybody = np.resize(everybody, max(people, len(everybody)))
        batches = len(everybody) // people
        drawn += everybody[:batches * people].reshape(batches, people).tolist()
    drawn = np.ravel(drawn[:steps])
    times = np.bincount(drawn, minlength=len(images_of))
    images = [np.resize(own, (n, per_person)) for own, n in zip(images_of, times)]
    result = np.empty((len(drawn), per_person), rows.dtype)
    # images has all groups of the first person, then those of the second, ...: argsort tells where these were drawn
    result[np.argsort(drawn, kind="stable")] = np.concatenate(images)
    return result.reshape(steps, people * per_person)


def rows_of_people(labels, rows):
    """The rows of each person, a list of arrays, in the order in which rows has them. labels are of all images."""
    rows = rows[np.argsort(labels[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1)


def batches(images, order, device, local_rows=slice(None)):
    """For each index array of order: (index (B,), uint8 images (B, S, S, 3)) on the device, or only
    the images local_rows of the batch. A thread gathers the next batch meanwhile; for CUDA into
    pinned memory: only from there is the copy asynchronous."""
    is_cuda = device.type == "cuda"

    def fetch(index):
        tensors = [torch.from_numpy(index), torch.from_numpy(images[index[local_rows]])]
        if is_cuda:
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
                yield [t.to(device, non_blocking=is_cuda) for t in ready.result()]


def memory_format(device):
    """How networks and images lie in memory: channels_last, which is faster; not on Apple's MPS,
    where versions of torch that we allow get batch norm's backward wrong in it."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def normalise(x):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in -1..1 (mean 0.5, deviation 0.5), in
    memory_format()."""
    x = x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return x.contiguous(memory_format=memory_format(x.device))


# Strengths of each augmentation, in short runs and from 16 epochs on, and what it means. On 6,820
# images the milder were worth two points of EER after 6 epochs, the stronger more than two after 24.
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
    # outside the image: the pixel at its edge
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
# name; and position (S,), how far each pixel of a row or column is from the middle. Columns of u:
# 0 rotation, 1 zoom, 2 mirror, 3 and 4 shift, 5 brightness, 6 contrast, 7 saturation; of the erased
# box 8 and 9 half the sides, 10 and 11 the centre, 12 whether there is one.

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

def regular(path):
    """path. OSError for a pipe, a device or a folder: to open one may wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def write(path, content):
    """Write bytes, or text as read_lines() reads it, so that path has the old content or the new,
    never half: to a temporary file that is flushed and renamed."""
    path = Path(regular(path))                              # /dev/null is not for replacing
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
    f = open(regular(Path(folder, ".lock")), "a")
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
        seconds = max(now - self.started, 1e-9)
        left = timedelta(seconds=int(seconds * (self.total - done) / done))
        print(f"\r{self.what} {done}/{self.total}, {done / seconds:.0f} {self.unit}/s, {left} left\x1b[K",
              end="\n" if is_last else "", file=sys.stderr, flush=True)


REMEDIES = {
    errno.ENOSPC: "make room there, or write elsewhere",
    errno.ENOENT: "check the name",
    errno.ENOMEM: "free memory, or ask for less with a smaller --batch-size or --size",
    errno.EMFILE: "raise 'ulimit -n'",
    errno.EROFS: "name a folder that can be written to",
    errno.EIO: "check the disk",
    errno.EACCES: "change its permissions, or name another"}


class Output:
    """stdout or stderr. When it is closed or nobody reads it any more, the work goes on unheard. That the disk it goes
    to is full, cli() reports at the end."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        self.disk_is_full = False
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self.stream.reconfigure(errors="backslashreplace")      # a name that cannot be shown is shown escaped

    def __getattr__(self, name):                            # fileno, isatty, encoding, ...
        return getattr(self.stream, name)

    def attempt(self, method, *arguments):
        try:
            getattr(self.stream, method)(*arguments)
        except (OSError, ValueError) as e:
            self.disk_is_full = getattr(e, "errno", None) == errno.ENOSPC
            null = open(os.devnull, "w")
            with contextlib.suppress(OSError, ValueError):  # what it has not yet written follows
                os.dup2(null.fileno(), self.stream.fileno())
            self.stream = null

    def write(self, text):
        self.attempt("write", text)

    def flush(self):
        self.attempt("flush")


def check_start():
    """ValueError for what argparse, or a library, would answer with a traceback."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the working folder has been deleted; cd to one that exists") from None
    for argument in sys.argv[1:]:
        if argument.startswith("--") and argument.endswith("=--"):      # an empty list to argparse
            usage(f"{argument[:-3]}: '--' is no value")


def cli(main):
    """Run a script's main(): a ValueError or OSError is one line on stderr and exit code 2."""
    out = Output(sys.stdout)
    sys.stdout, sys.stderr = out, Output(sys.stderr)
    try:
        check_start()
        main()
        out.flush()
        if out.disk_is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "what was printed")
        return
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


def ticks(low, high, log=False, whole=False):
    """Round numbers within low..high, at most six; log: the powers of ten, with 2 and 5 between over a
    short range; whole: whole ones."""
    if log:
        powers = np.arange(math.floor(low), math.ceil(high) + 1)
        between = [1, 2, 5] if high - low < 3 else [1]
        marks = np.add.outer(powers, np.log10(between)).ravel()
        return marks[(marks > low - 1e-9) & (marks < high + 1e-9)]
    raw = (high - low) / 5 or 1.0
    steps = 10.0 ** math.floor(math.log10(raw)) * np.array([1, 2, 5, 10])  # of which the smallest that suffices
    step = steps[steps >= raw * 0.999][0]
    if whole:
        step = max(step, 1)
    return np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step


def read_series(number, logs, xs, ys, kind="line", colour=None):
    """(points (n, 2), kind, colour) of a series of plot(): the points that have a place on the
    axes. logs: which axes are logarithmic; number: the colour by default."""
    if kind == "bars":                                      # their outline, from the axis and back to it
        axis = 0.5 if logs[1] else 0                        # so that on a logarithmic axis 1 is seen
        ys = np.maximum(ys, axis)
        xs, ys = np.repeat(xs, 2), np.concatenate([[axis], np.repeat(ys, 2), [axis]])
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


def draw_axes(pen, frame, logs, whole_x):
    """Grid lines and their numbers, then the two axes."""
    left, bottom = frame.origin
    right, top = frame.origin + frame.size
    for axis, log in enumerate(logs):
        for value in ticks(frame.low[axis], frame.high[axis], log, whole_x and axis == 0):
            x, y = frame.to_canvas(np.array([value, value]))    # of which this axis needs one
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
    points = np.concatenate([p for p, _, _ in drawn])
    if not len(points):
        points = np.zeros((1, 2))
    left, middle, top = x + 156, x + 57 + width / 2, 102
    size = np.array([width - 198, height - 228])
    low, high = value_range(points, axes, size)
    frame = Frame(np.array([left, height - 126]), size * (1, -1), low, high)
    draw_axes(pen, frame, logs, "wholex" in axes)
    pen.text((middle, 30), title, INK, ImageFont.load_default(13 * ZOOM), "mt")
    pen.text((middle, height - 24), x_label, INK, anchor="mb")
    pen.text((left, top - 12), y_label, INK, anchor="lb")
    for shown, kind, colour in drawn:
        draw_series(pen, frame.to_canvas(shown), kind, colour)
    if names and len(drawn) > 1:
        draw_legend(pen, names, frame, frame.to_canvas(points))


def plot(path, panels, width=420, height=300):
    """Charts side by side as a PNG, each of width times height pixels; path None: as a PIL image.

    A panel: (title, x label, y label, series, axes); axes, optional, may contain logx, logy, wholex
    (no ticks between whole numbers) and equal (a unit is as long in x as in y). series: {name: (xs,
    ys, kind, colour)}; kind, optional: line, points or bars (xs are the n + 1 edges); colour,
    optional: its number in COLOURS_OF_LINES. What has no place on the axes is left out. Names are
    shown where there are several series, but for those that begin with _.
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
        image = Image.fromarray(image)
        image = image.resize((round(image.width * side / image.height), side), Image.LANCZOS)
    width, height, lines = image.width, image.height, caption.splitlines()
    framed = ImageOps.expand(image, 3, colour or "white")
    tile = ImageOps.expand(framed, (1, 1, 1, 1 + 14 * len(lines)), "white")
    pen = ImageDraw.Draw(tile)
    pen.font = ImageFont.load_default(11)
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
            width = max(width, ImageFont.load_default(13).getlength(heading) + 24)
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


def face(p, rng, size):
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
    root = Path(os.path.realpath(root))
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


# ---- Photographs to faces ------------------------------------------------------------------------------------

# Where ArcFace's faces of 112x112 have the left eye, the right eye, the tip of the nose and the
# corners of the mouth, left and right as seen in the picture. A point is x + iy, and 0 is the middle
# of the first pixel.
TEMPLATE = np.array([
    38.2946 + 51.6963j, 73.5318 + 51.5014j, 56.0252 + 71.7366j, 41.5493 + 92.3655j, 70.7299 + 92.2041j])


def similarity(points):
    """(a, b), complex: a z + b brings five points z to TEMPLATE, the best by least squares (Umeyama,
    IEEE PAMI 1991); a turns and scales. ValueError if the points are no face's."""
    if not (abs(points) < 1e6).all():                       # nor is NaN
        raise ValueError("a point is a million pixels away, or is none")
    from_middle = points - points.mean()
    # on a line these have one direction or the opposite one, so their squares have one direction
    if abs((from_middle ** 2).sum()) >= 0.999 * (abs(from_middle) ** 2).sum():
        raise ValueError("the five points are equal, or on one line")
    equations = np.stack([points, np.ones(5)], 1)
    a, b = np.linalg.lstsq(equations, TEMPLATE, rcond=None)[0]
    if not 1 / 20 <= abs(a) <= 20:
        raise ValueError(f"112 pixels of the face would be {112 / abs(a):.3g} of the photograph")
    distance = abs(a * points + b - TEMPLATE)
    if (distance ** 2).mean() > 20 ** 2:                    # a profile has 15, a mirror image 22
        raise ValueError("not x and y of left eye, right eye, nose, left and right corner of the mouth"
                         " as seen in the picture")
    return a, b


def read_landmarks(path, root):
    """{file: similarity()} of lines '<photograph> <ten numbers>', x and y of five points, with blanks
    or commas between. Photographs are named relative to root."""
    found = {}
    for i, line in read_lines(path):
        where = f"{path}:{i}"
        fields = re.fullmatch(r"(.+?)" + r"[\s,]+([-+.\w]+)" * 10, line)
        if not fields:
            raise ValueError(f"{where}: '{line}' is not '<photograph> <x and y of five points>'")
        file = checked_path(root, os.path.normpath(fields[1]), where)
        if file in found:
            raise ValueError(f"{where}: a second face in '{fields[1]}'; keep the line of the person that is meant")
        try:
            numbers = np.array(fields.groups()[1:], float)
            found[file] = similarity(numbers.view(complex))
        except ValueError as e:
            raise ValueError(f"{where}: {e}; mend the line, or delete it to leave the photograph out") from None
    return found


def read_names(path, root):
    """The people in LFW's lists (peopleDevTrain.txt, people.txt): lines '<name> <number of images>',
    and among them lines of one number, which count the people that follow."""
    people, names = set(sub_folders(root)), set()
    for i, line in read_lines(path):
        name = re.sub(r"\s+\d+$", "", line)
        if line in people:                                  # a name may be a number, or end in one
            names.add(line)
        elif name in people:
            names.add(name)
        elif not line.isdecimal():
            raise ValueError(f"{path}:{i}: no folder '{name}' in {root}; copy it there or delete the line")
    return names


def align(photo, transform, size):
    """PIL image (size, size) of a photograph under the transform (a, b) of similarity()."""
    a, b = np.multiply(transform, size / 112)
    reduction = max(1, int(1 / abs(a)))
    if reduction > 1:                                       # else pixels between the samples would be lost
        photo = photo.reduce(reduction)
    # Pillow asks for the way back, and its 0 is the corner of the first pixel
    middle = 0.5 + 0.5j
    turn = 1 / a / reduction
    shift = (middle - (middle + b) / a) / reduction
    way_back = (turn.real, -turn.imag, shift.real, turn.imag, turn.real, shift.imag)
    return photo.transform((size, size), Image.AFFINE, way_back, Image.BICUBIC)


def cut_face(file, size, box, landmarks):
    """PIL image (size, size) of a photograph's face, by its box (left, top, right, bottom) or by
    read_landmarks(), black beyond the photograph. None without either: it is a face as it is."""
    photo = rgb(file)
    if box:
        face = photo.crop(box).resize((size, size), Image.LANCZOS)
    elif landmarks is None:
        return None
    elif file not in landmarks:
        raise ValueError("no landmarks")
    else:
        face = align(photo, landmarks[file], size)
    if not face.getbbox():
        raise ValueError("black: the face is not in the photograph")
    return face


def write_faces(file_of, size, box, landmarks):
    """Write cut_face() of file_of[target] to each target, or a copy where that is None. Returns the
    lines 'file<tab>reason' of what could not be used.

    Faces are JPEG, as the lists of LFW and the homework call them and a third of PNG's bytes; of
    quality 95 and with all of the colour.
    """
    def write_face(target):
        file = file_of[target]
        try:
            face = cut_face(file, size, box, landmarks)
        except Exception as e:                              # as in decode()
            reason = " ".join(str(e).split()) or type(e).__name__
            return [f"{file}\t{reason}"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if face:
            face.save(target, quality=95, subsampling=0)
        else:
            shutil.copyfile(file, target)
        return []

    left_out, progress = [], Progress("preparing", len(file_of))
    with ThreadPoolExecutor() as pool:
        for i, lines in enumerate(pool.map(write_face, file_of), 1):
            left_out += lines
            progress.update(i)
    return left_out


def draw_pairs(people, rows_of, rng):
    """[((row, row), same)] of people's images, rows_of[person]: at most 8 genuine pairs a person and
    491 in all, and 509 impostor pairs for every 491."""
    genuine, impostor = [], set()
    for person in people:
        count = math.comb(len(rows_of[person]), 2)
        for k in rng.sample(range(count), min(8, count)):   # the k-th pair, without a list of all
            pairs = itertools.combinations(rows_of[person], 2)
            genuine.append(next(itertools.islice(pairs, k, None)))
    genuine = rng.sample(genuine, min(491, len(genuine)))
    while len(impostor) < round(len(genuine) * 509 / 491):
        one, two = rng.sample(people, 2)
        impostor.add((rng.choice(rows_of[one]), rng.choice(rows_of[two])))
    same = [1] * len(genuine) + [0] * len(impostor)
    drawn = list(zip(genuine + sorted(impostor), same))
    rng.shuffle(drawn)
    return drawn


def lay_out_homework(source, root):
    """Move the images of source, a folder a person, to the homework's layout in root; always alike.

    320 people with several images and 400 with one, or a third of fewer people, are held out: half of
    them for val_pairs.txt, half for test_pairs.txt, whose labels are answers.txt. The others train; of
    four images or more the last is dev's. Of LFW's 4,038 training people this makes the HW of docs/benchmarks.md.
    """
    files, people = read_people(source)
    rng = random.Random(2025)
    rows_of = {}
    for row, person in enumerate(people):
        rows_of.setdefault(person, []).append(row)
    several = [p for p in rows_of if len(rows_of[p]) > 1]
    single = [p for p in rows_of if len(rows_of[p]) == 1]
    if len(several) < 12:
        raise ValueError(f"{len(several)} people have several images; --as homework takes 12 of them or more")
    several = rng.sample(several, min(320, len(several) // 3))
    single = rng.sample(single, min(400, len(single) // 3))
    lines, row_of = {"answers.txt": []}, {}                 # by the name of a list, or of an image's new file
    for label, person in enumerate(sorted(rows_of.keys() - (several + single))):
        rows = rows_of[person]
        for row in rows:
            split = "dev" if row == rows[-1] and len(rows) >= 4 else "train"
            listing = lines.setdefault(f"cls_data/{split}/labels.txt", [])
            name = f"{split}_{len(listing):06d}{Path(files[row]).suffix}"
            row_of[f"cls_data/{split}/images/{name}"] = row
            listing.append(f"{name} {label}")

    def anonymous(row):
        """The image's name in ver_data, which does not tell who it is."""
        file = Path(files[row])
        text = file.name
        while True:
            name = hashlib.sha1(os.fsencode(text)).hexdigest()[:8] + file.suffix
            if row_of.setdefault(f"ver_data/{name}", row) == row:
                return name
            text = f"{people[row]}/{text}"                  # another person's image is called the same

    middle, middle_single = len(several) // 2, len(single) // 2
    halves = {
        "val_pairs.txt": several[:middle] + single[:middle_single],
        "test_pairs.txt": several[middle:] + single[middle_single:]}
    for listing, half in halves.items():
        lines[listing] = []
        for (left, right), same in draw_pairs(half, rows_of, rng):
            line = f"{anonymous(left)} {anonymous(right)}"
            if listing == "val_pairs.txt":
                line += f" {same}"
            else:
                lines["answers.txt"].append(f"{same}")
            lines[listing].append(line)
    for target, row in row_of.items():
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        os.replace(files[row], root / target)
    for name, listing in lines.items():
        write(root / name, "\n".join(listing) + "\n")


def prepare(person_of, out, size, box, landmarks, homework):
    """Write the faces of photographs {file: person} to the folder out, new or empty: a folder a person,
    or the homework's layout. left_out.txt there lists what could not be used. See cut_face(); without
    box and landmarks the files are copied."""
    out = Path(os.path.realpath(out))
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: there already; name a new folder")
    draft = out.with_name(f"{out.name}.{os.getpid()}.part")
    faces, file_of = draft / "people", {}
    for file, person in person_of.items():
        target = faces / person / Path(file).name
        if box or landmarks is not None:
            target = target.with_suffix(".jpg")
        if target in file_of:
            raise ValueError(f"{file_of[target]} and {file}: both would be {target.name}; rename one")
        file_of[target] = file
    try:
        left_out = write_faces(file_of, size, box, landmarks)
        if len(left_out) == len(person_of):
            raise ValueError(f"{left_out[0]}; none of {len(left_out)} photographs can be used")
        if homework:
            lay_out_homework(faces, draft / "homework")
            faces = draft / "homework"
        if left_out:
            write(faces / "left_out.txt", "\n".join(left_out) + "\n")
        if out.exists():
            out.rmdir()
        faces.rename(out)                                   # at the end: never half a set
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"{out}: {len(person_of) - len(left_out)} faces from {len(person_of)} photographs")
    if left_out:
        print(f"{len(left_out)} left out, named in {out}/left_out.txt: {left_out[0]}, ...", file=sys.stderr)


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


def colours_and_duplicates(packs, root):
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
                digest = hashlib.sha256(image).digest()
                first = first_with.setdefault(digest, file)
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
        strength = {name: long for name, (_, long, _) in AUGMENT.items()}
        x = augment(torch.from_numpy(tiles), strength)
        tiles = ((x + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    counts = np.bincount(faces.train.labels)
    if counts.max() < 100:
        axes, edges = "wholex", np.arange(counts.max() + 2)
    else:                                                   # 1, 2 to 3, 4 to 7, ...: few people have very many
        axes, edges = "logx logy", 2 ** np.arange(int(math.log2(counts.max())) + 2)
    bars = {"": (edges - 0.5, np.histogram(counts, edges)[0], "bars")}
    chart = plot(None, [("images a person", "images", "people", bars, axes)], 12 * 72, 240)
    title = f"{faces.root.resolve().name}: {len(rows)} training images of {len(faces.names)} people"
    faces_shown = [(tile, "", None) for tile in tiles]
    sheet(path, title, [("", 1, [(chart, "", None)]), (heading, 12, faces_shown)], 64)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage
    parser.add_argument("--data", default="data", help="the set's folder or one above it [data]")
    parser.add_argument("--holdout", type=float, default=0.1, help="as in train.py [0.1]")
    parser.add_argument("--augment", action="store_true", help="draw the contact sheet as a long run sees the images")
    parser.add_argument("--sheet", default="contact.png", help="where the contact sheet goes [contact.png]")
    group = parser.add_argument_group("photographs to faces")
    group.add_argument("--prepare", metavar="OUT", help="write the faces of --data, a folder a person, to a new folder;"
                       " without --box or --landmarks the images are copied")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--box", metavar="L,T,R,B", help="where the faces are: left, top, right, bottom, in pixels")
    where.add_argument("--landmarks", metavar="FILE", help="where they are: lines '<person>/<photograph> <numbers>',"
                       " x and y of left eye, right eye, nose, left and right corner of the mouth, seen in the picture")
    group.add_argument("--size", type=int, help="side of a face in pixels [112]")
    group.add_argument("--people", metavar="FILE", help="only these people: LFW's peopleDevTrain.txt or people.txt")
    group.add_argument("--as", dest="layout", choices=["people", "homework"],
                       help="a folder a person, or train, dev and pairs drawn for the homework's layout [people]")
    args = parser.parse_args()
    asked = args.box or args.landmarks or args.size or args.people or args.layout
    if asked and not args.prepare:
        parser.error("--box, --landmarks, --size, --people and --as need --prepare OUT")
    for name in ("holdout", "augment", "sheet"):
        if args.prepare and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} does nothing with --prepare; leave it out")
    if not 0 <= args.holdout <= 0.9:
        parser.error(f"--holdout {args.holdout:g} is outside 0..0.9")
    return args


def prepare_set(args):
    """What --prepare and the flags with it ask for."""
    box, landmarks = None, None
    root = find_root(args.data)
    person_of = dict(zip(*read_people(root)))
    if args.people:
        names = read_names(args.people, root)
        person_of = {file: person for file, person in person_of.items() if person in names}
        if not person_of:
            raise ValueError(f"{args.people}: names nobody with a photograph in {root}; name other people")
    if not person_of:
        raise ValueError(f"{root}: no photographs; --prepare takes one sub-folder of photographs a person")
    if args.size is not None and not (args.box or args.landmarks):
        raise ValueError("--size: does nothing without --box or --landmarks, for images are copied as they are; leave"
                         " it out")
    if args.size is not None and not 8 <= args.size <= 1024:
        raise ValueError(f"--size {args.size}: 8 to 1024 pixels are possible")
    if args.box:
        fields = re.fullmatch(r"(-?\d+),(-?\d+),(-?\d+),(-?\d+)", args.box)
        box = fields and tuple(map(int, fields.groups()))
        if not box or box[2] <= box[0] or box[2] - box[0] != box[3] - box[1]:
            raise ValueError(f"--box {args.box}: not left,top,right,bottom of a square in pixels")
    if args.landmarks:
        landmarks = read_landmarks(args.landmarks, root)
    prepare(person_of, args.prepare, args.size or 112, box, landmarks, args.layout == "homework")


def main():
    args = parse_args()
    if args.prepare:
        return prepare_set(args)
    faces = load(args.data, args.holdout)
    size, cache = native_size(faces.train.files), cache_folder(faces.root)
    print(f"{faces.root}: {faces.note}" if faces.note else faces.root)
    packs = {}
    for name in ("train", "dev", "test", "val_pairs", "test_pairs"):
        split = getattr(faces, name)
        if split:
            packs[name] = pack(split.files, size, cache, name, max_unreadable=0.99)
            images, rows = packs[name]
            unreadable = len(images) - len(rows)
            print(f"{name}: {describe(split, unreadable)}")
            most = 0 if isinstance(split, Pairs) else MAX_UNREADABLE
            if unreadable > most * len(images):
                print(f"    at most {most:.0%} may be unreadable in training; mend or remove them")
    mean, deviation, duplicates = colours_and_duplicates(packs, faces.root)
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
