"""The sanity suite: no network, no data, no GPU, under two minutes on two cores.

    python test_all.py                  # everything; the last line counts, the exit code is 0 only if all passed
    python test_all.py resume losses    # the tests whose names contain one of these words
    python test_all.py slow_losses_memorise_people_through_train slow_losses_cost       # minutes: by full name only

A test compares with something that cannot be wrong in the same way: a closed form, brute force in Python,
torchvision with copied weights, the same run without the interruption.
"""
import ast
import contextlib
import copy
import csv
import errno
import functools
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if "slow_bench" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # equal bits and forked processes are a CPU's

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eer
import losses
import models
import train
import verify

HERE = Path(__file__).resolve().parent


class Skip(Exception):
    """Raised by a test that this machine cannot run."""


def close(a, b, tolerance=1e-10, what=""):
    a, b = (torch.as_tensor(np.asarray(v.detach() if torch.is_tensor(v) else v)).double() for v in (a, b))
    assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), f"{what} {a} is not {b}"


def raises(fragment, call, *args):
    """The call ends in a ValueError of one line that contains the fragment."""
    try:
        call(*args)
    except ValueError as e:
        assert fragment in str(e) and "\n" not in str(e), f"expected '{fragment}' in: {e}"
    else:
        raise AssertionError(f"no ValueError about '{fragment}'")


def run(script, *argv, cwd, code=0):
    """(stdout, stderr) of a script's command line, in this process; with exit code 2, stderr is one line."""
    ended, out, err = 0, io.StringIO(), io.StringIO()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.chdir(cwd), mock.patch.object(sys, "argv", [script.__name__, *map(str, argv)]), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script.__file__, run_name="__main__")
        except SystemExit as e:
            ended = e.code or 0
    for s, handler in handlers.items():
        signal.signal(s, handler)
    out, err = out.getvalue(), err.getvalue()
    assert ended == code and (code != 2 or err.startswith("error: ") and err.count("\n") == 1), (argv, ended, out, err)
    return out, err


@functools.cache
def faces():
    """A small set of synthetic faces in the homework's layout, made once; read-only for the tests."""
    folder = Path(tempfile.mkdtemp(prefix="faces"))
    data.synthesise(folder / "set", people=10, images=6, size=32)
    return folder / "set"


TINY = "--arch", "swiftface", "--dim", 16, "--batch-size", 16, "--lr", 0.02, "--amp", "off"


def tiny(cwd, *more, code=0, epochs=2):
    """train.main on the small set with a small network."""
    return run(train, "--data", faces(), *TINY, "--epochs", epochs, *more, cwd=cwd, code=code)


def full(*arguments):
    """What a full disk answers."""
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- eer.py --------------------------------------------------------------------------------------------------

def test_eer_is_the_crossing_of_the_interpolated_roc():
    """Against the anti-diagonal, point by point in exact fractions."""
    rng = np.random.default_rng(0)
    for case in range(200):
        y = rng.permutation(np.r_[0, 1, rng.integers(0, 2, rng.integers(1, 60))])
        s = rng.normal(size=len(y)) + y * rng.normal()
        s = s.round(case % 3) if case % 2 else s                                # half of them with many ties
        points = [[Fraction(int(sum(s[y == kind] >= cut)), int(sum(y == kind))) for kind in (0, 1)]
                  for cut in np.r_[np.inf, np.unique(s)[::-1]]]
        (f0, t0), (f1, t1) = next(two for two in itertools.pairwise(points) if sum(two[1]) >= 1)
        rate, threshold = eer.eer(y, s)
        close(rate, float(f0 + (1 - f0 - t0) / (f1 + t1 - f0 - t0) * (f1 - f0)), 1e-12)
        assert s.min() <= threshold <= s.max()
    y = np.repeat([0, 1], 50)
    assert [eer.eer(y, sign * y)[0] for sign in (1, -1, 0)] == [0, 1, 0.5]


def test_eer_report():
    rng = np.random.default_rng(1)
    y, s = rng.integers(0, 2, 300), rng.normal(size=300).round(1)
    s += y
    r, (far, tar, cut) = eer.report(y, s), eer.roc(y, s)
    g, i = s[y == 1], s[y == 0]
    close(r["auc"], np.mean((g[:, None] > i) + 0.5 * (g[:, None] == i)))
    close(r["acc"], max(np.mean((s >= c) == y) for c in cut))
    close([r["far"], r["frr"]], [np.mean(i >= r["threshold"]), np.mean(g < r["threshold"])])
    b = np.searchsorted(far, 0.1, "right")
    close(r["tar@far=1e-1"], tar[b - 1] + (tar[b] - tar[b - 1]) * (0.1 - far[b - 1]) / (far[b] - far[b - 1]))
    assert math.isnan(r["tar@far=1e-3"]) and " - " in eer.show(r)              # 150 impostors cannot tell
    s = y + rng.normal(size=300)                            # no two alike: the ROC is all steps
    far, tar, _ = eer.roc(y, s)
    close(eer.report(y, s)["tar@far=1e-1"], tar[far <= 0.1].max())
    covered = 0
    for _ in range(400):                                    # two normals 3 apart: true EER 6.68 %
        g, i = np.sort(rng.normal(3, 1, 200)), np.sort(rng.normal(0, 1, 200))
        low, high = eer.interval(eer.crossing(g, i)[0], 200, 200)
        covered += low <= 0.0668072 <= high
    assert 0.91 < covered / 400 < 0.98, covered


def test_eer_thresholds_by_brute_force():
    """at_far, best_threshold and LFW's folds against all thresholds there are."""
    rng = np.random.default_rng(2)
    for case in range(40):
        y = rng.permutation(np.r_[0, 1, 0, 1, rng.integers(0, 2, 40)])
        s = (rng.normal(size=44) + y).round(1 + case % 2)
        for far in (0.001, 0.1, 0.29):
            t = eer.at_far(y, s, far)
            assert np.mean(s[y == 0] >= t) <= far < np.mean(s[y == 0] >= np.nextafter(t, -9)), (case, far)
        cuts = np.unique(s)
        between, gap = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts)
        accuracy = np.array([np.mean((s >= t) == y) for t in between])
        t = eer.best_threshold(y, s)
        close(np.mean((s >= t) == y), accuracy.max())
        close(gap[np.abs(between - t).argmin()], gap[accuracy > accuracy.max() - 1e-9].max(), 1e-9)     # the widest
        folds = np.arange(44) % 4
        each = [np.mean((s[folds == f] >= eer.best_threshold(y[folds != f], s[folds != f])) == y[folds == f])
                for f in range(4)]
        close(eer.folds_accuracy(y, s, folds), [np.mean(each), np.std(each, ddof=1) / 2])
    y, s = np.tile([1, 0], 40), np.tile([0.9, 0.1], 40)
    assert eer.folds_accuracy(y, s, np.arange(80) // 8) == (1, 0) and eer.best_threshold(y, s) == 0.5


def test_eer_reads_and_compares_files_and_refuses(tmp):
    for content in (b"\xef\xbb\xbfscore,label\r\n0.5,1\r\n\r\n-1,0\r\n", b"1,0.5\n0,-1\n"):
        (tmp / "c.csv").write_bytes(content)
        assert np.array_equal(eer.read(tmp / "c.csv"), [[1, 0], [0.5, -1]])
    for content, where in ((b"1,0.5\n0,zero\n", "c.csv:2"), (b"1,0.5\n\x80\x02,\"\n", "c.csv:2"),
                           (b"2,0.5\n", "c.csv:1"), (b"1,nan\n", "c.csv:1"), (b"\n", "c.csv: no scores"),
                           (b"1,0.5\n", "c.csv: no scores"), (b'1,"' + b"0" * 200_000, "c.csv: field")):
        (tmp / "c.csv").write_bytes(content)
        raises(where, eer.read, tmp / "c.csv")
    for fragment, *bad in (("label 2", [0, 2], [0.0, 1.0]), ("both kinds", [1, 1], [0.0, 1.0]),
                           ("pair 1 has score nan", [0, 1], [0.0, math.nan]),
                           ("3 labels but 2 scores", [0, 1, 1], [0.0, 1.0])):
        raises(fragment, eer.eer, *bad)
    (tmp / "a.csv").write_text("1,0.9\n0,0.1\n1,0.8\n0,0.2\n")
    (tmp / "b.csv").write_text("1,0.9\n0,0.1\n1,0.2\n0,0.8\n")
    out, _ = run(eer, "a.csv", "b.csv", cwd=tmp)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines()]
    assert rows[0][:2] == ["scores", "EER"] and [r[1] for r in rows[2:]] == ["0.00 %", "50.00 %"], out
    assert rows[2][-1] == "-"                               # two impostors cannot tell FAR 1e-2


# ---- data.py -------------------------------------------------------------------------------------------------

def picture(path, value=0, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(value).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(a).save(path)
    return path


def homework(root):
    """The smallest set in the homework's layout; labels with gaps, names with spaces and accents. Returns the paths
    of labels.txt and val_pairs.txt."""
    train_rows = "a b.jpg 3", "é.jpg 3", "c.jpg 7", "d.jpg 9"
    for i, row in enumerate(train_rows):
        picture(root / "cls_data/train/images" / row[:-2], i)
    for i, name in enumerate("abc"):
        picture(root / f"ver_data/{name}.jpg", i)
    labels, pairs = root / "cls_data/train/labels.txt", root / "val_pairs.txt"
    labels.write_text("\n".join(train_rows))
    pairs.write_text("a.jpg b.jpg 1\nb.jpg c.jpg 0\n")
    return labels, pairs


def test_data_layouts(tmp):
    labels, _ = homework(tmp / "above/HW")
    labels.write_bytes("\ufeffa b.jpg 3\r\n\r\n\u00e9.jpg 3\r\nc.jpg 7 \r\nd.jpg 9\r\n".encode())
    picture(tmp / "above/HW/cls_data/dev/images/x.png")
    (tmp / "above/HW/cls_data/dev/labels.txt").write_text("x.png 7\n")
    picture(tmp / "above/HW/cls_data/test/images/y.png")                        # test without labels (Fall 2026)
    (tmp / "above/HW/test_pairs.csv").write_text("image1,image2\nc.jpg,a.jpg\n")
    d = data.load(tmp / "above")
    assert d.root.name == "HW" and d.names == ["3", "7", "9"] and d.train[1].tolist() == [0, 0, 1, 2]
    assert d.dev[1].tolist() == [1] and d.test[1] is None and len(d.test[0]) == 1 and not d.note
    assert d.val_pairs.labels.tolist() == [1, 0] and len(d.val_pairs.files) == 3
    one, two = (Path(d.test_pairs.files[side[0]]).name for side in (d.test_pairs.left, d.test_pairs.right))
    assert d.test_pairs.labels is None and (one, two) == ("c.jpg", "a.jpg")
    for i, person in enumerate(["Ann", "Bo", "Cy", "Di", "Ed"]):                # Fall 2024, and a plain folder
        for k in range(1 if person == "Ed" else 3):
            for top in ("F24/cls_data/train", "plain/nested"):
                picture(tmp / top / person / f"{k}.png", 10 * i + k)
    d = data.load(tmp / "plain", holdout=0.4, seed=1)
    assert "held out" in d.note and len(d.names) == 3 and "Ed" in d.names
    for *pair, same in zip(d.val_pairs.left, d.val_pairs.right, d.val_pairs.labels):
        people = {Path(d.val_pairs.files[i]).parent.name for i in pair}
        assert len(people) == 2 - same and not people & set(d.names)
    picture(tmp / "plain/nested/ver_data/0.png")                                # nobody's folder
    assert len(data.load(tmp / "plain", holdout=0).train[0]) == 13
    assert len(data.load(tmp / "F24", holdout=0).names) == 5


def test_data_refuses(tmp):
    """Every complaint names the place."""
    labels, pairs = homework(tmp / "HW")
    for file, cases in ((labels, (
            ("gone.jpg 1\n", "labels.txt:1: no image 'gone.jpg'"), ("c.jpg 1 2\n", "3 columns"),
            ("c.jpg -1\n", "labels.txt:1"), ("c.jpg 1.5\n", "labels.txt:1"), ("c.jpg\n", "labels.txt:1"),
            ("c.jpg 1\nd.jpg 2\nc.jpg 3\n", "labels.txt:3: 'c.jpg' stands on line 1"), ("c.jpg,1\n", "labels.txt:1"),
            ("../x.jpg 1\n", "leaves"), ("/x.jpg 1\n", "leaves"), ("c.jpg 1\nd.jpg 1\n", "one person"),
            ("\n", "no labelled"))), (pairs, (
            ("a.jpg gone.jpg 1\n", "val_pairs.txt:1: no image 'gone.jpg'"), ("", "no pairs"),
            ("a.jpg b.jpg 2\n", "label '2'"), ("a.jpg ../val_pairs.txt 1\n", "leaves"), ("a.jpg /a.jpg 1\n", "leaves"),
            ("a.jpg b.jpg\n", "val_pairs.txt:1: no label"),
            ("a.jpg b.jpg 1\nb.jpg c.jpg\n", "val_pairs.txt:2: 2 columns"),
            ("a.jpg b.jpg 1\na.jpg c.jpg 1\n", "every pair has label 1")))):
        good = file.read_text()
        for text, fragment in cases:
            file.write_text(text)
            raises(fragment, data.load, tmp / "HW")
        file.write_text(good)
    (tmp / "empty").mkdir()
    homework(tmp / "both/one"), homework(tmp / "both/two")
    picture(tmp / "few/Ann/1.png"), picture(tmp / "few/Bo/1.png")
    for folder, fragment in (("nothing", "no such folder"), ("HW/val_pairs.txt", "no such folder"),
                             ("empty", "no labelled training images"), ("both", "several data sets"),
                             ("few", "too few to hold")):
        raises(fragment, data.load, tmp / folder)


def test_data_reads_lfw_lists(tmp):
    people = {"Ann_A": (".jpg", ".png", ".jpeg"), "Bo": (".jpg", ".jpg"), "C_D": (".webp",)}
    for name, ends in people.items():
        for i, end in enumerate(ends, 1):
            picture(tmp / f"lfw/{name}/{name}_{i:04d}{end}", i)

    def read(text):
        (tmp / "t.txt").write_text(text)
        return data.read_pairs(tmp / "t.txt", tmp / "lfw")

    p = read("2\nAnn_A\t1\t3\nBo\t1\t2\nAnn_A\t2\tC_D\t1\nBo\t2\tAnn_A\t1\n")
    assert [[os.path.basename(p.files[i]) for i in side] for side in (p.left, p.right)] == [
        ["Ann_A_0001.jpg", "Bo_0001.jpg", "Ann_A_0002.png", "Bo_0002.jpg"],
        ["Ann_A_0003.jpeg", "Bo_0002.jpg", "C_D_0001.webp", "Ann_A_0001.jpg"]]
    assert p.labels.tolist() == [1, 1, 0, 0] and p.folds is None and len(p.files) == 6
    fold = "Ann_A\t1\t2\nBo\t1\tAnn_A\t3\n"
    p = read("3\t1\n" + fold * 3)
    assert p.labels.tolist() == [1, 0] * 3 and p.folds.tolist() == [0, 0, 1, 1, 2, 2]
    for text, fragment in (("3\t1\n" + fold, "2 pairs, but the first line announces 3 x 2 x 1"),
                           ("1\nAnn_A\t1\t2\nBo\t1\tx\n", "t.txt:3: 'Bo"),
                           ("1\nAnn_A\t1\t9\nBo\t1\tC_D\t1\n", "t.txt:2: no image"),
                           ("1\n..\t1\t2\nBo\t1\tC_D\t1\n", "leaves")):
        raises(fragment, read, text)


def test_data_describes_a_set(tmp):
    for person, n in (("Ann", 3), ("Bo", 1), ("Cy", 2)):
        for i in range(n):
            picture(tmp / f"set/{person}/{i}.png", 10 * n + i, (32, 32))
    shutil.copy(tmp / "set/Ann/0.png", tmp / "set/Cy/9.png")
    x = np.stack([data.decode(f, 32) for f in data.read_people(tmp / "set")[0]])
    out, _ = run(data, "--data", "set", "--holdout", 0, "--sheet", "sheet.png", cwd=tmp)
    mean, deviation = (" ".join(f"{v:.4f}" for v in f(x.reshape(-1, 3) / 255, axis=0)) for f in (np.mean, np.std))
    for part in ("7 images, 0 unreadable", "3 people with 1 to 3 images, median 3", "Cy/9.png = Ann/0.png",
                 "duplicates: 1 images", f"mean {mean}, standard deviation {deviation}"):
        assert part in out, (part, out)
    sheet = np.asarray(Image.open(tmp / "sheet.png"))
    places = np.lib.stride_tricks.sliding_window_view(sheet[:, :900, 0], (1, 64))[:, ::4].reshape(-1, 64)
    for face in x:                                          # every face is on it, twice as large
        row = np.asarray(Image.fromarray(face).resize((64, 64), Image.LANCZOS))[5, :, 0]
        assert (places == row).all(1).any()


def colours(image):
    """For each colour of lines, the (n, 2) places, row and column, where an image has it."""
    a = np.asarray(image).astype(int)
    each = [[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in data.COLOURS_OF_LINES]
    return [np.argwhere(np.abs(a - c).max(2) < 30) for c in each]


def test_data_plot_puts_things_where_they_belong():
    def drawn(series, axes=""):
        return np.asarray(data.plot(None, [("", "", "", series, axes)]))

    def centres(axes, *points):
        image = drawn({f"_{i}": ([x], [y], "points") for i, (x, y) in enumerate(points)}, axes)
        return np.array([places.mean(0)[::-1] for places in colours(image)[:len(points)]])

    for axes, *points in (("", (0, 8), (5, 9), (10, 10)), ("logx", (0.01, 8), (1, 9), (100, 10)),
                          ("logx logy", (0.01, 1), (1, 10), (100, 100))):
        close(centres(axes, *points), [(52, 258), (229, 146), (406, 34)], 0.04, axes)
    one, two, three = centres("equal", (0, 0), (3, 0), (0, 3))                  # right angle, equal sides
    close(two[0] - one[0], one[1] - three[1], 0.03)
    assert abs(one[1] - two[1]) < 2 and abs(one[0] - three[0]) < 2
    for bad in (0, -1, math.nan, math.inf):                 # what has no place on the axes is left out
        with_it, without = ({"": (xs, ys)} for xs, ys in (([0.01, bad, 100], [8, 9, 10]), ([0.01, 100], [8, 10])))
        assert np.array_equal(drawn(with_it, "logx"), drawn(without, "logx")), bad
    close(data.ticks(-3, 2, log=True), np.arange(-3, 3))
    close(10 ** data.ticks(0, 1, log=True), [1, 2, 5, 10])
    a = drawn({"": ([0, 1, 2], [0, 1], "bars")}).astype(int)
    blue = a[..., 2] - a[..., 0] > 40                       # only the right half is filled, to the top
    assert blue[40:250, 240:400].all() and not blue[40:250, 60:220].any()


def test_data_shows_images_as_a_viewer_does(tmp):
    a = np.zeros((40, 40, 3), np.uint8)
    a[:20] = 200, 100, 50                                                       # upper half coloured
    upright, wide, exif = Image.fromarray(a), Image.new("RGB", (80, 40), "red"), Image.Exif()
    exif[0x0112] = 6                                                            # stored turned, shown upright
    upright.rotate(90).save(tmp / "exif.png", exif=exif)
    upright.quantize(4).save(tmp / "palette.png")
    upright.save(tmp / "plain.webp", lossless=True)
    wide.paste(upright, (20, 0))                                                # the central square, not squeezed
    wide.save(tmp / "wide.png")
    Image.fromarray(a[..., 0]).save(tmp / "grey.png")
    Image.fromarray(np.dstack([a, np.zeros((40, 40), np.uint8)])).save(tmp / "clear.png")       # on white paper
    deep = np.arange(1600).reshape(40, 40, 1) * 40
    Image.fromarray(deep[..., 0].astype(np.uint16)).save(tmp / "deep.png")
    for name, want in (("exif.png", a), ("palette.png", a), ("plain.webp", a), ("wide.png", a),
                       ("clear.png", a * 0 + 255), ("grey.png", a[..., :1]), ("deep.png", np.round(deep / 257))):
        error = np.abs(data.decode(tmp / name, 40) - want.astype(float)).max()
        assert error <= 2 * (name in ("exif.png", "palette.png")), (name, error)
    half = (tmp / "wide.png").read_bytes()[:90]
    for name, content, why in (("bomb.jpg", b"P6 60000 60000 255 " * 9, "exceeds limit"), ("cut.png", half, ""),
                               ("text.png", b"no image", "identify"), ("empty.jpg", b"", "identify")):
        (tmp / name).write_bytes(content)
        raises(f"{name}: not a readable image", data.decode, tmp / name, 40)
        raises(why, data.decode, tmp / name, 40)
    assert data.decode(picture(tmp / "sliver.png", 3, (1, 99)), 40).shape == (40, 40, 3)        # odd, but an image


def test_data_pack(tmp):
    files = [str(picture(tmp / f"{i}.png", i, (30 + i % 3, 32))) for i in range(101)]
    cache = tmp / "cache"
    cache.mkdir()
    images, good = data.pack(files, 32, cache)
    assert isinstance(images.rows, np.memmap) and len(good) == 101
    inner, _ = data.pack(files, 16, cache, crop=0.5)                            # beside the other, not in its place
    assert (inner[[2]][0] == np.asarray(Image.open(files[2]).convert("RGB"))[8:24, 8:24]).all()
    assert len(list(cache.glob("*.npy"))) == 2
    assert (images[np.array([5, 3])] == np.stack([data.decode(files[i], 32) for i in (5, 3)])).all()
    with mock.patch.object(data, "decode", side_effect=AssertionError):         # found again, not decoded again
        data.pack(files, 32, cache)
    with mock.patch.object(shutil, "disk_usage", lambda p: SimpleNamespace(free=0)):
        for f in cache.iterdir():
            f.unlink()
        stream, _ = data.pack(files, 32, cache)                                 # no room: streams, the same pixels
        assert stream.rows is None and (stream[np.arange(9)] == images[np.arange(9)]).all()
    with mock.patch.object(os, "posix_fallocate", full):                        # less room than was told: likewise
        assert data.pack(files, 32, cache)[0].rows is None and not list(cache.glob("*.npy"))
    picture(Path(files[7]), 999, (32, 32))                                      # changed: rebuilt, the old one gone
    Path(files[8]).write_bytes(b"no image")
    with contextlib.redirect_stderr(io.StringIO()) as err:
        images, good = data.pack(files, 32, cache)
    assert (images[[7]][0] == data.decode(files[7], 32)).all() and len(list(cache.glob("*.npy"))) == 1
    assert 8 not in good and len(good) == 100 and "1 of 101" in err.getvalue()
    with mock.patch.object(data, "decode", side_effect=KeyboardInterrupt), contextlib.suppress(KeyboardInterrupt):
        Path(files[9]).touch()                                                  # a killed build leaves nothing
        (cache / "train-64-0.1.tmp").touch()                                    # nor does one killed before
        data.pack(files, 32, cache)
    assert len(list(cache.glob("*.npy"))) == 1 and not list(cache.glob("*.tmp"))
    Path(files[10]).write_bytes(b"")
    raises("2 of 101", data.pack, files, 32, cache)


def test_data_augment():
    from torchvision.transforms import functional as T
    x = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    none, plain = dict.fromkeys(data.AUGMENT, 0), data.normalise(x)
    every = {name: long for name, (_, long, _) in data.AUGMENT.items()}
    close(data.augment(x, none), plain, 1e-6)
    close(data.augment(x, none | {"mirror": 1}), plain.flip(3), 1e-4)
    torch.manual_seed(3)
    a, b = data.augment(x, every), data.augment(x, every)
    torch.manual_seed(3)
    assert torch.equal(a, data.augment(x, every)) and not torch.equal(a, b) and a.abs().max() <= 1
    torch.manual_seed(3)
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):      # the product that the compiler fuses
        close(data.augment(x, every, look=lambda *rows: data.pixels(*rows)), a, 1e-6)
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).view(1, 32, 1, 1).expand(200, 32, 32, 3)  # bright below
    up, down = data.augment(ramp, every | {"erase": 0}).mean((1, 3))[:, [4, 27]].T
    assert (down > up).all()                                                    # never upside down
    with mock.patch.object(torch, "rand", lambda *s, **k: torch.full(s, 0.9)):  # dice: 0.8 in -1..1
        blocks = x[:, :8, :8].repeat_interleave(4, 1).repeat_interleave(4, 2)   # the mean grey is of every fourth pixel
        for name in ("brightness", "contrast", "saturation"):
            theirs = getattr(T, f"adjust_{name}")(blocks.permute(0, 3, 1, 2).float() / 255, 1 + 0.8 * 0.5) * 2 - 1
            close(data.augment(blocks, none | {name: 0.5}), theirs, 3e-3, name)
        ours = data.augment(x, none | dict(rotate=20, shift=0.1, zoom=0.2))
    turn, shift = math.radians(0.8 * 20), torch.full((2, 1), 2 * 0.8 * 0.1)
    theta = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) * 1.2 ** 0.8
    grid = F.affine_grid(torch.cat([theta, shift], 1).expand(64, 2, 3), (64, 3, 32, 32), align_corners=False)
    theirs = F.grid_sample(plain, grid, "nearest", "border", align_corners=False)
    assert ((ours - theirs).abs() < 1e-5).double().mean() > 0.998
    erased = (data.augment(x, none | {"erase": 1}) == 0).all(1).flatten(1).double().mean(1)
    assert (erased > 0.005).all() and (erased < 0.17).all()


def test_data_order():
    labels = np.repeat(np.arange(30), [1] * 10 + [3] * 10 + [9] * 10)
    rows = np.arange(len(labels))
    plain = train.order(labels, rows, 16, 0, 0)
    assert plain.shape == (8, 16) and len(np.unique(plain)) == 128
    assert (plain == train.order(labels, rows, 16, 0, 0)).all() and (plain != train.order(labels, rows, 16, 0, 1)).any()
    assert train.order(labels, rows[:5], 16, 0, 0).shape == (1, 5)              # fewer images than a batch
    epochs = [train.order(labels, rows, 16, 0, e, per_person=4) for e in range(30)]
    assert all((labels[e.reshape(-1, 4)] == labels[e.reshape(-1, 4)[:, :1]]).all() for e in epochs)
    assert set(np.concatenate(epochs).ravel()) == set(rows)                     # nobody is left out for good


def test_data_homework_classes(tmp):
    homework(tmp)
    T = torchvision.transforms
    t = T.Compose([T.Resize((32, 32)), T.ToTensor()])
    for dataset, shape, want in (
            (data.ImageDataset(tmp / "cls_data/train", t), (4, 3, 32, 32), [3, 3, 7, 9]),
            (data.ImagePairDataset(tmp / "ver_data", tmp / "val_pairs.txt", t), (2, 3, 32, 32), [1, 0])):
        *images, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
        assert [x.shape for x in images] == [shape] * len(images) and labels.tolist() == want


def test_data_synthetic_faces_are_a_real_task(tmp):
    for name in "ab":
        data.synthesise(tmp / name, people=8, images=2, size=32)
    before = (tmp / "b/answers.txt").stat()
    data.synthesise(tmp / "b", people=8, images=1, size=32)                     # another was first: its set stays
    assert (tmp / "b/answers.txt").stat() == before and len(list(tmp.iterdir())) == 2
    files = [p.relative_to(tmp / "a") for p in (tmp / "a").rglob("*") if p.is_file()]
    assert len(files) > 16 and all((tmp / "a" / f).read_bytes() == (tmp / "b" / f).read_bytes() for f in files)
    pairs = data.load(faces()).val_pairs
    x = torch.from_numpy(np.stack([data.decode(f, 32) for f in pairs.files])).float().flatten(1)
    for z in (x, x - x.mean(1, keepdim=True)):
        assert eer.eer(pairs.labels, verify.score(F.normalize(z), pairs))[0] > 0.25


# ---- train.py and verify.py ----------------------------------------------------------------------------------

def test_train_writes_what_it_promises(tmp):
    out, _ = tiny(tmp, "--crop", 0.8)
    folder = tmp / "runs/arcface_swiftface"
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [r["epoch"] for r in rows] == ["1", "2"] and list(rows[0]) == list(train.COLUMNS) and "first loss" in out
    assert all(math.isfinite(float(v)) for r in rows for v in r.values())
    assert (tmp / "best.pt").resolve() == (folder / "best.pt").resolve()
    assert not verify.load(folder / "last.pt")["sums"].any()                    # each epoch's loss is its own
    best = verify.load(tmp / "best.pt")["best"]
    assert best == min(float(r["eer"]) for r in rows)
    out, _ = run(verify, cwd=tmp)                                               # --ckpt best.pt is the default
    assert f"EER {100 * best:.2f} %" in out
    assert {f.name.split("-")[0] for f in (faces() / ".packs").glob("*-32x08-*.npy")} > {"train", "val_pairs"}
    pairs, kept = data.load(faces()).val_pairs, verify.load(tmp / "best.pt")["val"]["scores"]
    out, _ = run(verify, pairs.files[pairs.left[0]], pairs.files[pairs.right[0]], cwd=tmp)      # the pair's own score
    close(float(out.split()[1].strip(":;")), float(kept[0]), 1e-4)
    head, *lines = (tmp / "submission.csv").read_text().splitlines()
    wanted = len((faces() / "test_pairs.txt").read_text().splitlines())
    assert head == "ID,Label" and [line.split(",")[0] for line in lines] == [str(i) for i in range(wanted)]
    tiny(tmp, epochs=1)                                                         # a second run takes its own folder
    assert (tmp / "runs/arcface_swiftface_2/best.pt").exists()
    tiny(tmp, "--out", folder, code=2)
    assert list(csv.DictReader((folder / "log.csv").open())) == rows


RUNS = {"sgd, margin": ("--opt", "sgd"), "adamw, buffers, ema": ("--lr", "1e-3", "--loss", "curricular", "--ema", ".9"),
        "balanced, sum": ("--loss", "ce+0.1*triplet+0.003*center", "--per-person", "2", "--ema", ".5"),
        "drawn margins, drop-path": ("--loss", "elastic", "--arch", "convnext_atto")}


def same(a, b, path=""):
    """Two checkpoints are bit for bit alike, but for the clock."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a.keys() - {"seconds", "spent", "img_per_s", "out", "steps", "resume"}:
            same(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (u, v) in enumerate(zip(a, b)):
            same(u, v, f"{path}/{i}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b or a != a, f"{path}: {a} != {b}"


def interrupted(number, step):
    """A signal that comes while this step is at work."""
    real, calls = data.augment, itertools.count(1)

    def augment(*args):
        if next(calls) == step:
            os.kill(os.getpid(), number)
        return real(*args)
    return mock.patch.object(data, "augment", augment)


def test_train_resumed_equals_uninterrupted(tmp):
    """After --steps, and after SIGINT and SIGTERM, which finish the step, save and say how to go on."""
    stops = (1, None), (2, signal.SIGINT), (3, None), (5, signal.SIGTERM)       # of 6 steps; 3 is an epoch's end
    with mock.patch.dict(models.CONVNEXT, atto=((1, 1, 1, 1), 16, 0.5)):                        # small, drops much
        for i, ((name, flags), (step, number)) in enumerate(zip(RUNS.items(), stops)):
            whole, parts = f"whole{i}", f"parts{i}"
            tiny(tmp, *flags, "--out", whole)
            if number:
                with interrupted(number, step):
                    assert f"--resume --out {parts}" in tiny(tmp, *flags, "--out", parts, code=130)[0]
            else:
                tiny(tmp, *flags, "--out", parts, "--steps", step)
            assert verify.load(tmp / parts / "last.pt")["step"] == step
            run(train, "--resume", "--out", parts, "--steps", 99, cwd=tmp)
            for file in ("last.pt", "best.pt"):
                same(verify.load(tmp / whole / file), verify.load(tmp / parts / file), f"{name}: {file}")
    _, err = run(train, "--resume", "--out", "parts0", "--lr", ".5", "--seed", 3, cwd=tmp, code=2)
    assert "--lr" in err and "--seed" in err and "--loss" not in err


class NoCopies(TorchDispatchMode):
    """Sees that no operation copies from one device to another."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert function is not torch.ops.aten._to_copy.default or out.device == args[0].device
        return out


def test_train_does_not_wait_for_the_device(tmp):
    """No .item(), float(), int() or bool() of a tensor per step, no numbers copied there: on a GPU each would wait."""
    with FakeTensorMode(), NoCopies():                      # a GPU of which only the shapes are there
        x = torch.empty(8, 32, 32, 3, dtype=torch.uint8, device="cuda")
        assert data.augment(x, {name: long for name, (_, long, _) in data.AUGMENT.items()}).device.type == "cuda"
    counts = []
    for steps in (1, 2):
        calls = []
        with mock.patch.object(verify, "evaluate", lambda *a: {}), contextlib.ExitStack() as stack:
            for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
                real = getattr(torch.Tensor, name)
                stack.enter_context(mock.patch.object(
                    torch.Tensor, name, lambda t, *a, real=real, name=name: calls.append(name) or real(t, *a)))
            tiny(tmp, "--out", f"n{steps}", "--steps", steps, "--ema", ".9", "--loss", "adaface")
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0, counts


def test_train_steps_as_a_plain_loop_does(tmp):
    """Schedule, decay, clipping, moving average, saving: six steps against a loop without any of train.py's helpers."""
    with mock.patch.object(data, "write", wraps=data.write) as write:
        tiny(tmp, "--loss", "cosface", "--opt", "sgd", "--clip", 0.5, "--ema", 0.9, "--save-every", 0, "--out", "run")
    assert [c.args[0].name for c in write.call_args_list].count("last.pt") == 1 + 6 + 2     # start, steps, epochs
    ckpt, (files, labels) = verify.load(tmp / "run/last.pt"), data.load(faces()).train
    images, strength = np.stack([data.decode(f, 32) for f in files]), {k: v[0] for k, v in data.AUGMENT.items()}
    torch.manual_seed(0)
    net = models.make("swiftface", 16, 32).to(memory_format=torch.channels_last)
    head = losses.make("cosface", 16, 10, images=len(files))
    params, average = [*net.parameters(), *head.parameters()], copy.deepcopy(net)
    speed = [torch.zeros_like(p) for p in params]
    todo = np.concatenate([train.order(labels, np.arange(len(files)), 16, 0, epoch) for epoch in (0, 1)])
    for step, index in enumerate(todo):
        train.dice(0, step, 0)
        x = data.augment(torch.from_numpy(images[index]), strength)
        grads = torch.autograd.grad(head(net(x), torch.from_numpy(labels[index])), params)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert norm > 0.5
        lr = 0.02 * (1 if step == 0 else 0.5 + 0.5 * math.cos(math.pi * (step - 1) / 5))
        with torch.no_grad():
            for p, g, v in zip(params, grads, speed):
                g = g * 0.5 / norm + (5e-4 * p if p.ndim > 1 else 0)
                v.mul_(0.9).add_(g)
                p -= lr * (g + 0.9 * v)
            for a, w in zip(average.parameters(), net.parameters()):
                a.lerp_(w, 9 / (10 + step))
    for kind, module in (("model", net), ("ema", average), ("loss", head)):
        for name, value in module.named_parameters():
            close(ckpt[kind][name], value, 1e-4, (kind, name))
    tiny(tmp, "--steps", 1, "--out", "adam")
    assert verify.load(tmp / "adam/last.pt")["args"]["weight_decay"] == 1       # few images
    assert (tmp / "adam/log.csv").read_text().splitlines()[1].startswith("1,1,")     # stopped in the first epoch


def test_train_half_precision(tmp):
    """By the hardware, and in the backbone alone; scaling the loss changes neither clipping nor step."""
    for fast, generation, cpu, gpu in (True, (8, 0), "bf16", "bf16"), (False, (7, 5), "off", "fp16"):
        with mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", lambda: fast, create=True), \
                mock.patch.object(torch.cuda, "get_device_capability", lambda device: generation):
            assert [train.precision(torch.device(d)) for d in ("cpu", "cuda")] == [cpu, gpu]
    real, moved = losses.Loss.forward, {}
    torch.manual_seed(0)
    start = models.make("swiftface", 16, 32).state_dict()
    for amp, dtype in ("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16):
        seen, scaler = [], functools.partial(torch.amp.GradScaler, init_scale=64.0)
        with mock.patch.object(torch.amp, "GradScaler", scaler), mock.patch.object(
                losses.Loss, "forward", lambda m, x, y: seen.append(x.dtype) or real(m, x, y)):
            tiny(tmp, "--amp", amp, "--clip", 0.01, "--opt", "sgd", "--lr", 1, "--steps", 1, "--out", amp)
        assert seen == [dtype]
        after = verify.load(tmp / amp / "last.pt")["model"]
        moved[amp] = torch.cat([(after[k] - v).flatten() for k, v in start.items() if "weight" in k])
        assert F.cosine_similarity(moved[amp], moved["off"], 0) > 0.9, amp
        assert abs(moved[amp].norm() / moved["off"].norm() - 1) < 0.1, amp


def test_train_names_a_loss_that_is_not_finite(tmp):
    real, calls = losses.Loss.forward, itertools.count(1)
    for out, step, forward in (
            ("nan", 5, lambda *a: real(*a) * (math.nan if next(calls) == 5 else 1)),
            ("slope", 1, lambda *a: real(*a) + (0 * a[1].square().sum()).sqrt())):      # only the gradient is infinite
        with mock.patch.object(losses.Loss, "forward", forward):
            _, err = tiny(tmp, "--out", out, "--steps", step, code=2)
        ckpt = verify.load(tmp / out / "last.pt")
        assert f"not finite at step {step}" in err and ckpt["step"] < step
        assert all(torch.isfinite(v).all() for v in ckpt["model"].values())


def test_train_loses_nothing_it_saved(tmp):
    """A full disk, a killed write and a second process leave last.pt, best.pt and log.csv whole."""
    (tmp / "a").mkdir()
    (tmp / "a/log.csv").touch()                             # of a run that was killed before its first save
    tiny(tmp, "--out", "a", epochs=1)
    whole = {f.name: f.read_bytes() for f in (tmp / "a").iterdir()}
    more = "--resume", "--out", "a", "--epochs", 2
    with mock.patch.object(os, "fsync", full):
        for script, *argv in ((train, *more), (verify, "--ckpt", "a/best.pt", "--out", "a/log.csv")):
            assert ": No space left on device; make room" in run(script, *argv, cwd=tmp, code=2)[1]
    with data.lock(tmp / "a"):
        for argv, answer in ((more, "another run is at work"), (more[1:], "holds a run already")):
            assert answer in tiny(tmp, *argv, code=2)[1]
    assert whole == {f.name: f.read_bytes() for f in (tmp / "a").iterdir()}
    (tmp / "a/last.pt.1.tmp").touch()
    run(train, *more, cwd=tmp)
    with contextlib.chdir(tmp), mock.patch.object(os, "symlink", full):         # a file system without links
        os.unlink("best.pt"), Path("best.pt").write_text("the user's own")
        assert not train.link(tmp / "a/best.pt") and Path("best.pt").read_text() == "the user's own"
        os.unlink("best.pt")
        assert train.link(tmp / "a/log.csv") and train.link(tmp / "a/best.pt")
        assert Path("best.pt").read_bytes() == (tmp / "a/best.pt").read_bytes()
    train.link.__defaults__[0].clear()
    assert not list(tmp.glob("a/*.tmp")) and len((tmp / "a/log.csv").read_text().splitlines()) == 3


def test_train_twice_at_once(tmp):
    """Two processes, one new data set: one pack, two folders, the same result."""
    shutil.copytree(faces(), tmp / "set", ignore=shutil.ignore_patterns(".packs"))

    def task(rank):
        del os.environ["RANK"], os.environ["WORLD_SIZE"]                        # they know nothing of each other
        return run(train, "--data", "set", *TINY, "--epochs", 1, cwd=tmp)[1]

    assert processes(2, task, tmp) == ["", ""]
    same(*(verify.load(tmp / f"runs/arcface_swiftface{end}/last.pt") for end in ("", "_2")))
    assert len(list(tmp.glob("set/.packs/*.npy"))) == 3 and not list(tmp.rglob("*.tmp"))


def test_train_fine_tunes(tmp):
    tiny(tmp, "--loss", "ce", "--out", "first", epochs=1)
    other = verify.load(tmp / "first/best.pt")              # of other people and another loss: only the backbone counts
    torch.save(other | {"names": ["Ann", "Bo"], "loss": {}}, tmp / "first/best.pt")
    init = "--init", "first/best.pt"
    tiny(tmp, *init, "--freeze", "--loss", "tpe:k=8", "--out", "second", epochs=1)
    first, second = (verify.load(tmp / f / "best.pt") for f in ("first", "second"))
    same(first["model"], second["model"])                                       # frozen, batch statistics included
    run(train, "--resume", "--out", "second", "--epochs", 2, cwd=tmp)
    same(first["model"], verify.load(tmp / "second/last.pt")["model"])          # still frozen
    net, criterion = verify.build(second)
    assert not torch.equal(second["loss"]["terms.0.projection"], torch.eye(8, 16))
    assert verify.embed(net, np.zeros((3, 32, 32, 3), np.uint8), criterion.project).shape == (3, 8)
    assert "new: neck" in tiny(tmp, *init, "--dim", 8, "--freeze", "--out", "third", epochs=1)[0]
    assert "swiftface, not a resnet34" in tiny(tmp, *init, "--arch", "resnet34", code=2)[1]
    assert "--init" in tiny(tmp, "--freeze", code=2)[1]


def test_train_spares_scalars_from_decay_and_follows_the_schedule(tmp):
    with mock.patch.object(torch.optim, "SGD", side_effect=torch.optim.SGD) as sgd:
        tiny(tmp, "--loss", "normface", "--opt", "sgd", epochs=1)
    decayed, spared = sgd.call_args.args[0]
    assert sum(p.numel() for g in (decayed, spared) for p in g["params"]) > 3e5 and len(decayed["params"]) > 10
    assert all(p.ndim > 1 for p in decayed["params"]) and decayed["weight_decay"] > 0
    assert all(p.ndim <= 1 for p in spared["params"]) and spared["weight_decay"] == 0
    assert any(p.ndim == 0 for p in spared["params"])                           # the learned scale
    shares = [train.rate(i, 100, 0.1) for i in range(100)]
    assert shares[0] == 0.1 and max(shares) == shares[9] == 1 and shares[10:] == sorted(shares[10:], reverse=True)
    close(shares[55], 0.5)


def test_train_refuses(tmp):
    (tmp / "file").touch()
    for fragment, *flags in (
            ("--lr", "--lr", -1), ("--lr", "--lr", "nan"), ("--lr", "--lr", "inf"), ("--lr", "--lr"),
            ("--size", "--size", 7), ("--colour", "--colour", 1), ("--epochs", "--epochs", 0),
            ("--epochs", "--epochs", 1.5), ("--steps", "--steps", 0), ("--holdout", "--holdout", 2),
            ("--ema", "--ema", 2), ("--seed", "--seed", -1), ("--dim", "--dim", 0), ("--dim", "--dim", 10 ** 12),
            ("--batch", "--batch-size", 1), ("more", "more"), ("'adamw'", "--opt", "rms"),
            ("cuda:99", "--device", "cuda:99"), ("meta", "--device", "meta"), ("'arcface'", "--loss", "arcfac"),
            ("resnet3", "--arch", "resnet35"), ("unknown argument 'n'", "--loss", "arcface:n=1"),
            ("s=-1", "--loss", "arcface:s=-1"), ("no such folder", "--data", "nowhere"),
            ("last.pt", "--resume", "--out", "x"), ("x.pt: no such", "--init", "x.pt"), ("file: ", "--out", "file"),
            ("file/x: ", "--out", "file/x")):
        _, err = tiny(tmp, *flags, code=2)
        assert fragment in err, (flags, err)
    assert not (tmp / "runs").exists() and not (tmp / "best.pt").exists()
    (tmp / "taken").mkdir(), (tmp / "taken/last.pt").touch()
    shutil.copytree(faces(), tmp / "new", ignore=shutil.ignore_patterns(".packs"))
    with mock.patch.object(shutil, "which", lambda name: None):
        for fragment, *flags in (("C++ compiler", "--compile"), ("holds a run", "--out", "taken"),
                                 ("--init", "--freeze")):
            assert fragment in run(train, "--data", "new", *flags, cwd=tmp, code=2)[1]
    assert not (tmp / "new/.packs").exists()                # before minutes of decoding
    with mock.patch.object(data, "load", lambda *a: torch.empty(1 << 50)):
        assert "out of memory" in run(train, "--data", "new", cwd=tmp, code=2)[1]
    illegal = mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access was encountered"))
    try:
        data.cli(illegal)
    except (RuntimeError, SystemExit) as e:
        ended = e
    assert isinstance(ended, RuntimeError)                  # not a lack of memory: the trace is wanted


def test_verify_refuses_strange_checkpoints(tmp):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp / "executed"),)

    (tmp / "run").mkdir()
    (tmp / "evil.pt").write_bytes(pickle.dumps(Evil()))
    for name, content in (("evil2", {"x": Evil()}), ("other", {"state_dict": {}}), ("newer", {"face_checkpoint": 99}),
                          ("bare", {"face_checkpoint": 1, "x": torch.zeros(9999)})):
        torch.save(content, tmp / f"{name}.pt")
    (tmp / "cut.pt").write_bytes((tmp / "bare.pt").read_bytes()[:9000])
    (tmp / "none.pt").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)        # a warning would be a line of its own
        for name in ("missing", "evil", "evil2", "other", "newer", "cut", "bare", "none"):
            if name != "missing":
                shutil.copy(tmp / f"{name}.pt", tmp / "run/last.pt")
            for script, *argv in ((verify, "--ckpt", f"{name}.pt"), (train, "--resume", "--out", "run"), (
                    train, "--data", faces(), "--arch", "mobilefacenet", "--size", 32, "--init", f"{name}.pt")):
                assert argv[-1] in run(script, *argv, cwd=tmp, code=2)[1], (name, argv)
    assert not (tmp / "executed").exists() and not (tmp / "runs").exists()


def noise(n):
    return np.random.default_rng(0).integers(0, 255, (n, 32, 32, 3), np.uint8)


def test_verify_scores_are_the_same_in_any_batch_and_order():
    torch.manual_seed(0)
    net, images = models.make("swiftface", 16, 32).eval(), noise(21)
    z, x = verify.embed(net, images), data.normalise(torch.from_numpy(images))
    close(z.norm(dim=1), np.ones(21), 1e-6)
    close(z, verify.embed(net, images, batch_size=4), 1e-5)
    close(z[[7, 2]], verify.embed(net, images, rows=np.array([7, 2])), 1e-5)
    with torch.no_grad():
        close(z, F.normalize(net(x) + net(x.flip(3))), 1e-5)
        close(verify.embed(net, images, mirror="none"), F.normalize(net(x)), 1e-5)
        net.trunk[0].weight[0, 0, 0, 0] = math.nan
    raises("not finite", verify.embed, net, images)


def test_verify_closed_set_and_submission(tmp):
    labels, images, net = np.array([0, 0, 1, 2]), noise(4), models.make("swiftface", 16, 32).eval()
    for spec in ("cosface", "triplet"):
        criterion = losses.make(spec, 16, 3)
        if criterion.weight is not None:
            criterion.weight.data.copy_(verify.centroids(verify.embed(net, images), labels, 3))
        known = images, labels, np.arange(4)
        assert verify.closed_set(net, criterion, known, known, 3) == (1.0, 1.0), spec
    (tmp / "sample_submission.csv").write_text("id,match\n0,0\n1,0\n")
    verify.write_submission(tmp / "s.csv", np.array([0.1, -1 / 3]), tmp)
    assert (tmp / "s.csv").read_text() == f"id,match\n0,0.1\n1,{-1 / 3!r}\n"
    raises("2 rows, but there are 3", verify.write_submission, tmp / "s.csv", np.zeros(3), tmp)
    raises("not finite", verify.write_submission, tmp / "t.csv", np.array([0, math.nan]), tmp)
    assert not (tmp / "t.csv").exists()


def test_verify_search_is_brute_force():
    rng = np.random.default_rng(0)
    for case in range(60):                                  # small integers: exact in any order, and full of ties
        n, p, k = rng.integers(1, 400), rng.integers(1, 9), rng.integers(1, 12)
        gallery = rng.integers(-2, 3, (n, 4)).astype((np.float16, np.float32)[case % 2])
        probes = rng.integers(-2, 3, (p, 4)).astype(np.float32)
        every = probes @ gallery.T.astype(np.float32)
        wanted = np.argsort(-every, axis=1, kind="stable")[:, :k]
        scores, rows = verify.search(gallery, probes, k, block=int(rng.integers(1, 130)))
        assert (rows == wanted).all() and (scores == np.take_along_axis(every, wanted, 1)).all(), case
    scores, rows = verify.search(gallery, np.repeat(probes, 1100, 0)[:1100], 3)                 # two loads of probes
    assert (rows == wanted[:1, :3]).all()
    distance = verify.search(gallery, probes, 5, 64, lambda p, g: -(p - g).norm(dim=1))[0]
    close(distance, -np.sort(np.linalg.norm(probes[:, None] - gallery, axis=2), 1)[:, :5], 1e-6)


def test_verify_search_keeps_memory_bounded(tmp):
    """From a memory map of 64 MB in float16 no more than a few blocks are ever in memory."""
    if not Path("/proc/self/status").exists():
        raise Skip("no /proc to read the resident memory from")
    rng, largest, forget = np.random.default_rng(0), [], data.forget
    gallery = np.lib.format.open_memmap(tmp / "g.npy", "w+", np.float16, (1 << 20, 32))
    where = rng.choice(len(gallery), 20, replace=False)
    gallery[:] = 0
    gallery[where] = probes = rng.normal(size=(20, 32)).astype(np.float16)
    gallery.flush()
    del gallery

    def resident(rows):
        forget(rows)
        largest.append(int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]))

    with mock.patch.object(data, "forget", resident):
        rows = verify.search(np.load(tmp / "g.npy", mmap_mode="r"), probes.astype(np.float32), 1)[1]
    assert (rows[:, 0] == where).all() and len(largest) == 256
    assert max(largest) - largest[0] < 16 << 10, largest    # KB; all of the map would be 64 MB


def test_verify_metrics():
    torch.manual_seed(0)
    pairs, z = data.Pairs(list("abcd"), np.array([0, 1, 2]), np.array([1, 2, 3]), None), F.normalize(torch.randn(4, 8))

    def scores(spec, name):
        return verify.score(z, pairs, verify.metric_of(losses.make(spec, 8, 3), name)[1])

    close(scores("siamese", "euclidean"), -np.sqrt(2 - 2 * scores("ce", "cosine")), 1e-6)
    siamese, tse = losses.make("siamese", 8, 3), losses.make("tse:k=3", 8, 3)
    for name in (None, "learned"):
        close(verify.score(z, pairs, verify.metric_of(siamese, name)[1]), siamese.score(z[:3], z[1:]), 1e-6)
        assert verify.metric_of(tse, name)[0](z).shape == (4, 3)
    assert verify.metric_of(tse, "cosine") == (None, None)
    raises("arcface:s=30.0,m=0.3 learned no metric", verify.metric_of, losses.make("arcface:s=30", 8, 3), "learned")


def test_verify_identification_by_brute_force():
    rng = np.random.default_rng(0)
    for case in range(20):
        scores, hits, mated = rng.normal(size=90).round(1), rng.random((90, 5)) < 0.3, rng.random(90) < 0.6
        hits &= (hits.cumsum(1) == 1) & mated[:, None]
        got, others = verify.identification(scores, hits, mated), np.sort(scores[~mated])[::-1]
        close(got["rank1"], hits[mated, 0].sum() / mated.sum())
        close(got["rank5"], hits.any(1).sum() / mated.sum())
        for far, name in ((1e-3, "1e-3"), (1e-2, "1e-2"), (1e-1, "1e-1")):
            wanted = max(np.mean(hits[mated, 0] & (scores[mated] > t)) for t in np.r_[others, others - 1]
                         if np.mean(others > t) <= far)
            value = got[f"dir@far={name}"]
            assert math.isnan(value) if far * len(others) < 1 else abs(value - wanted) < 1e-12, (case, far)


@functools.cache
def trained():
    """A small checkpoint on the small set, its folder a run's; for reading only."""
    tiny(faces().parent, "--out", "run", epochs=1)
    return faces().parent / "run"


def judged(cwd, *flags):
    """What verify.py says about trained() as an object."""
    return json.loads(run(verify, "--ckpt", trained() / "best.pt", "--json", *flags, cwd=cwd)[0])


def test_verify_identifies(tmp):
    """The older Kaggle: five known people with three images, eight probes, three of them of strangers. By hand: unit
    mean of each person's unit embeddings, all cosines, the best, or n000000 below the threshold."""
    files, labels = data.read_labels(faces() / "cls_data/train")
    of = [[f for f, q in zip(files, labels) if q == p] for p in range(8)]
    for p, images in enumerate(of):
        for folder in ("unknown_dev", "unknown_test"):
            (tmp / folder).mkdir(exist_ok=True)
            shutil.copy(images[4], tmp / f"{folder}/{p:03d}.jpg")
        for f in images[:3] if p < 5 else ():
            (tmp / f"known/n{p}").mkdir(parents=True, exist_ok=True)
            shutil.copy(f, tmp / f"known/n{p}")
    truth = [f"n{p}" if p < 5 else "n000000" for p in range(8)]
    (tmp / "verification_dev.csv").write_text("id,label\n" + "".join(f"{i},{t}\n" for i, t in enumerate(truth)))
    flags = "--gallery", "known", "--probes", "unknown_dev"
    got = judged(tmp, *flags, "--plots", "plots", "--save-embeddings", "g.npy")
    net, _ = verify.build(ckpt := verify.load(trained() / "best.pt"))

    def z(files):
        return verify.embed(net, np.stack([data.decode(f, 32) for f in files])).numpy()

    known = np.stack([z(images[:3]).sum(0) for images in of[:5]])
    cosine = z([images[4] for images in of]) @ (known / np.linalg.norm(known, axis=1)[:, None]).T
    scores, best = ckpt["val"]["scores"].numpy(), cosine.argmax(1)
    threshold = eer.eer(ckpt["val"]["labels"].numpy(), scores)[1]
    answers = [f"n{c}" if s >= threshold else "n000000" for c, s in zip(best, cosine.max(1))]
    rows = (tmp / "identification.csv").read_text().split()
    assert rows == ["id,label", *(f"{i},{a}" for i, a in enumerate(answers))]
    close([p["score"] for p in got["probes"]], cosine.max(1), 1e-5)
    close([got["threshold"], got["rank1"]], [threshold, np.mean(best[:5] == range(5))])
    close(got["accuracy"], np.mean([a == t for a, t in zip(answers, truth)]))
    assert got["rank5"] == 1 and (got["mated"], got["unmated"]) == (5, 3) and got["dir@far=1e-1"] is None
    assert [n["nearest"][0] for n in got["probes"]] == [f"n{c}" for c in best]
    assert Image.open(tmp / "plots/ranks.png").size[1] > 8 * 96
    # embeddings in a file serve as gallery; a folder of test probes has no truth, though a CSV lies beside it
    listing = [line.split("\t")[1] for line in (tmp / "g.txt").read_text().splitlines()]
    assert listing == [f"n{p}" for p in range(5) for _ in "abc"] and np.load(tmp / "g.npy").shape == (15, 16)
    again = judged(tmp, "--gallery", "g.npy", "--probes", "unknown_test", "--far", "1e-3", "--out", "far.csv")
    assert "rank1" not in again and [p["nearest"] for p in again["probes"]] == [p["nearest"] for p in got["probes"]]
    close(again["threshold"], scores[ckpt["val"]["labels"] == 0].max(), 1e-9)   # 10 impostors: above them all
    (tmp / "verification_dev.csv").write_text("id,label\n0,n1\n")
    assert "verification_dev.csv: 1 rows for the 8 images" in run(
        verify, "--ckpt", trained() / "best.pt", *flags, cwd=tmp, code=2)[1]


def test_verify_protocols(tmp):
    """Two images, LFW's folds, a threshold from another file, JSON, pictures; against the functions beneath."""
    ckpt, val = trained() / "best.pt", data.load(faces()).val_pairs
    for i, k in itertools.product(range(10), (1, 2)):
        (tmp / f"lfw/p{i}").mkdir(parents=True, exist_ok=True)
        shutil.copy(val.files[i if k == 1 else i - 1], tmp / f"lfw/p{i}/p{i}_000{k}.jpg")
    genuine = [f"p{i}\t1\t2\n" for i in range(10)]
    impostor = [f"p{i}\t1\tp{(i + 1) % 10}\t1\n" for i in range(10)]
    (tmp / "pairs.txt").write_text("5\t2\n" + "".join(
        line for f in range(0, 10, 2) for line in genuine[f:f + 2] + impostor[f:f + 2]))
    (tmp / "dev.txt").write_text("10\n" + "".join(genuine + impostor))
    (tmp / "homework.csv").write_text("a,b,label\n" + "".join(
        f"{os.path.basename(val.files[i])},{os.path.basename(val.files[j])},{y}\n"
        for i, j, y in zip(val.left, val.right, val.labels)))
    lfw = "--pairs", "pairs.txt", "--images", "lfw"
    homework = "--pairs", "homework.csv", "--images", faces() / "ver_data"
    got = judged(tmp, *lfw, "--plots", "plots")
    labels, scores = eer.read(tmp / "plots/scores.csv")
    assert {p.name for p in (tmp / "plots").iterdir()} == {"roc.png", "scores.png", "hardest.png", "scores.csv"}
    close([got["folds_acc"], got["folds_error"]], eer.folds_accuracy(labels, scores, np.arange(20) // 4))
    close(got["eer"], eer.eer(labels, scores)[0])
    assert got["tar@far=1e-1"] is not None and got["tar@far=1e-2"] is None
    moved = judged(tmp, *lfw, "--threshold-from", "dev.txt")["threshold_from"]
    t = eer.best_threshold(labels, scores)                  # the same pairs in another order
    close([moved[k] for k in ("threshold", "acc", "far", "frr")], [
        t, np.mean((scores >= t) == labels), np.mean(scores[labels == 0] >= t), np.mean(scores[labels == 1] < t)], 1e-5)
    whole, stored = judged(tmp, *homework), verify.load(ckpt)
    close(whole["eer"], stored["best"])
    labels, cosines = (stored["val"][k].numpy() for k in ("labels", "scores"))
    for flags, scores in ((("--metric", "cosine"), cosines), (("--metric", "euclidean"), -np.sqrt(2 - 2 * cosines)),
                          (("--far", 0.2), cosines)):
        one = judged(tmp, *(val.files[side[0]] for side in (val.left, val.right)), *flags)
        close(one["score"], scores[0], 1e-4)
        close([one["genuine_lower"], one["impostor_higher"]],
              [np.mean(scores[labels == 1] < one["score"]), np.mean(scores[labels == 0] >= one["score"])])
        close(one["threshold"], eer.at_far(labels, scores, 0.2) if "--far" in flags else eer.eer(labels, scores)[1])
        assert one["same"] == (one["score"] >= one["threshold"])
    assert list(judged(tmp, *val.files[:2], "--mirror", "none")) == ["score"]   # no scores of that in the checkpoint
    concat = judged(tmp, *homework, "--mirror", "concat", "--save-embeddings", "z.f16.npy")
    z = np.load(tmp / "z.f16.npy")
    assert z.dtype == np.float16 and z.shape == (len(val.files), 32) and concat["genuine"] == whole["genuine"]
    text, _ = run(verify, "--ckpt", ckpt, *val.files[:2], cwd=tmp)              # images may follow --ckpt
    assert "of a hundred genuine validation pairs" in text
    for fragment, *flags in (("--far 2", "--far", 2), ("--gallery", "--probes", "x"), ("1 images; give two", "a.jpg"),
                             ("no metric", "--metric", "learned"), ("no such folder", "--gallery", "none")):
        assert fragment in run(verify, "--ckpt", ckpt, *flags, cwd=tmp, code=2)[1]


def test_verify_compares(tmp):
    """Several checkpoints and score files over each other; a sorted table of runs; closed sets, combined score."""
    (tmp / "other.csv").write_text("1,0.9\n0,0.1\n1,0.2\n0,0.8\n")
    got = judged(tmp, "--ckpt", trained() / "best.pt", "other.csv", "--plots", "p")
    assert list(got) == ["run", "other"] and got["other"]["eer"] == 0.5 and (tmp / "p/roc.png").stat().st_size > 5000
    one, d = got["run"], data.load(faces())
    close(one["combined"], 0.5 * one["dev_acc1"] + 0.5 * (1 - one["eer"]))
    assert not (tmp / "submission.csv").exists() and one["dev_acc5"] >= one["dev_acc1"]
    net, criterion = verify.build(verify.load(trained() / "best.pt"))
    logits = criterion.logits(verify.embed(net, np.stack([data.decode(f, 32) for f in d.test[0]]), unit=False))
    close(one["test_acc1"], np.mean(logits.argmax(1).numpy() == d.test[1]))
    every = [trained() / "best.pt", trained() / "last.pt"]
    images = np.stack([data.decode(f, 32) for f in d.val_pairs.files])
    each = [verify.scored(*verify.build(verify.load(c)), images, d.val_pairs)[0] for c in every]
    both = judged(tmp, "--ckpt", *every, "--out", "both.csv", "--threshold-from", *every[::-1][1:])["together"]
    close(both["eer"], eer.eer(d.val_pairs.labels, np.mean(each, 0))[0])
    close(both["threshold_from"]["threshold"], eer.best_threshold(d.val_pairs.labels, each[0]), 1e-6)
    assert len((tmp / "both.csv").read_text().splitlines()) == len(d.test_pairs.left) + 1
    assert "same test pairs" in run(verify, "--ckpt", *every, "--pairs", faces() / "val_pairs.txt", "--images",
                                    faces() / "ver_data", "--out", "none.csv", cwd=tmp, code=2)[1]
    p, stored = d.val_pairs, verify.load(every[0])["val"]["mark"]
    assert stored == verify.mark(p._replace(files=[f"/moved/{f}" for f in p.files])) != verify.mark(d.test_pairs)
    one, other = ((p.labels, s, m) for s, m in zip(each, (stored, verify.mark(d.test_pairs))))
    assert verify.together([one, other]) is None and verify.together([one, (p.labels, each[1], None)])
    tiny(tmp, "--loss", "ce", "--dim", 2, "--out", "flat", epochs=1)
    (tmp / "empty").mkdir()
    out, err = run(verify, "--compare", "flat", trained(), "empty", "--json", cwd=tmp)
    runs = json.loads(out)["runs"]
    assert "left out: empty/best.pt" in err and {r["run"]: r["loss"] for r in runs} == {
        "flat": "ce", str(trained()): "arcface:s=12.4,m=0.3"} and runs[0]["EER"] <= runs[1]["EER"]
    weights = [p.numel() for m in verify.build(verify.load(tmp / "flat/best.pt")) for p in m.parameters()]
    assert next(r["parameters"] for r in runs if r["loss"] == "ce") == sum(weights)
    run(verify, "--ckpt", "flat/best.pt", "--plots", "p2", cwd=tmp)             # ten colours on the plane
    assert all(len(places) > 20 for places in colours(Image.open(tmp / "p2/embeddings.png")))


# ---- Several processes --------------------------------------------------------------------------------------

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(n, task, folder):
    """The results of task(rank) in n processes, forked from this one, that torch.distributed will find."""
    if not hasattr(os, "fork"):
        raise Skip("no fork() on this system")
    folder, port = Path(tempfile.mkdtemp(dir=folder)), free_port()

    def work(rank):
        torch.set_num_threads(1)
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port))
        torch.save(task(rank), folder / str(rank))

    every = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(n)]
    for step in ("start", "join"):
        for p in every:
            getattr(p, step)()
    assert not any(p.exitcode for p in every), every
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(n)]


def steps(cwd, n, *flags, stop=0):
    """The losses of each step of train.main on the small set in n processes, which all must have the same, up to a
    SIGTERM to the last of them. The network is a layer or two: rounding grows tenfold a step in a deep one with batch
    norm, in one process as well."""
    def net(arch, dim, size):
        return models.FaceNet([nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU()],
                              [nn.Flatten(), nn.Linear(8 * 49, dim), nn.BatchNorm1d(dim)])

    def task(rank):
        seen, real = [], losses.Loss.forward

        def forward(*args):
            value = real(*args)
            seen.append(value.item())
            return value
        with mock.patch.object(losses.Loss, "forward", forward), mock.patch.multiple(data, plot=lambda *a: 0), \
                mock.patch.object(models, "make", net), interrupted(signal.SIGTERM, stop if rank == n - 1 else 0):
            tiny(cwd, "--batch-size", 15, "--per-person", 3, *flags, code=130 * (stop > 0))
        return seen

    faces()
    every = processes(n, task, cwd)
    assert all(seen == every[0] for seen in every)
    return every[0]


def test_distributed_training_equals_one_process(tmp):
    """Twenty steps in 1, 2 and 4 processes, of unequal parts of the batch and of the classes, and handed over from four
    to one to two of them. Mining takes all triplets: which are semi-hard may turn on a rounding error."""
    flags = ("--loss", "curricular:sample=0.8+0.1*triplet:mining=all+0.003*center", "--ema", ".9", "--epochs", 5,
             "--opt", "sgd", "--lr", 5e-3, "--out")
    runs = {n: steps(tmp, n, *flags, n, *["--shard"] * (n > 1)) for n in (1, 2, 4)}
    runs["chain"] = (steps(tmp, 4, *flags, "chain", "--shard", stop=5)
                     + steps(tmp, 1, *flags, "chain", "--resume", "--steps", 8)
                     + steps(tmp, 2, *flags, "chain", "--resume", "--steps", 20, "--shard"))
    assert len(runs[1]) == 20
    one = verify.load(tmp / "1/last.pt")
    for out, seen in runs.items():
        close(seen, runs[1], 1e-5, out)
        many = verify.load(tmp / f"{out}/last.pt")
        for kind in ("model", "loss", "ema"):
            for name, value in one[kind].items():
                close(value, many[kind][name], 1e-3, (out, name))
        for row, other in zip(one["log"], many["log"]):
            close(*([r[k] for k in ("loss", "eer", "auc", "acc")] for r in (row, other)), 1e-5, out)


DIVIDED = ("ce", "ce:smooth=0.1", "modified", "l2softmax:learn=true", "normface", "coco", "vmf", "vmf:shared=true",
           "adacos", "lsoftmax", "asoftmax", "sphereface", "am", "cosface", "arcface", "combined", "curricular",
           "subcenter", "adaface", "magface", "elastic", "sphereface2", "uniface", "circle_class", "groupface",
           "ce+regular", "subcenter+regular+0.1*triplet+0.01*center+uniform")


def test_distributed_batch_norm_and_heads_equal_the_undivided(tmp):
    """Each loss with class weights, 13 classes over two processes: loss, gradients, buffers, logits after two steps."""
    with_weights = {n for n in losses.LOSSES if loss_of(with_partner(n)).weight is not None} - set(SHAPES)
    assert with_weights <= {*",".join(DIVIDED).replace("+", ",").replace(":", ",").split(",")}

    def after_two_steps(spec, share):
        """(value, gradient, best classes, buffers), {parameter: (k per class, value, gradient)}, (B, C) arrays."""
        torch.manual_seed(0)
        z, y = (torch.randn(10, 8).double() * 2).requires_grad_(), torch.tensor([0, 5, 5, 6, 7, 12, 12, 3, 1, 6])
        torch.manual_seed(1)
        head = losses.make(spec, 8, 13, share).double()
        with Arrays((10, 13)) as arrays:
            for step in range(2):
                torch.manual_seed(step)
                value = head(z, y)
                value.backward()
        params = {n: (getattr(p, "per_class", 0), p.detach(), p.grad) for n, p in head.named_parameters()}
        return (value, z.grad, head.eval().top(z, 5), *head.buffers()), params, arrays.most

    def task(rank):
        torch.distributed.init_process_group("gloo")
        norm, same_norm = nn.BatchNorm2d(5).double(), nn.BatchNorm2d(5).double()
        x, weights = (torch.randn(7, 5, 3, 3, generator=torch.Generator().manual_seed(i)).double() + 3 for i in (0, 1))
        part = slice(*[(0, 4), (4, 7)][rank])
        z, mine = x.clone().requires_grad_(), x[part].clone().requires_grad_()
        whole, divided = norm(z), train.synchronised(same_norm, mine)
        (whole * weights).sum().backward()
        (divided * weights[part]).sum().backward()
        for a, b in ((divided, whole[part]), (mine.grad, z.grad[part]), *zip(same_norm.buffers(), norm.buffers())):
            close(a, b, 1e-9)
        for spec in (*DIVIDED, *(f"{n}:sample=0.6" for n in SAMPLED)):
            values, params, most = after_two_steps(spec, (0, 1))
            values2, params2, most2 = after_two_steps(spec, (rank, 2))
            assert most2 == 0 and (most > 0) == ("sample" not in spec), spec    # divided: no (B, C)
            for a, b in zip(values, values2, strict=True):
                close(b, a, 1e-9, spec)
            for n, (k, *have) in params2.items():
                for mine, every in zip(have, params[n][1:]):
                    if k:
                        every = every.unflatten(0, (k, -1))[:, [0, 6][rank]:[6, 13][rank]].flatten(0, 1)
                    close(mine, every, 1e-9, (spec, n))
            assert any(k for k, *_ in params2.values()), spec
        return True

    assert processes(2, task, tmp) == [True] * 2
    parts = []
    for share in ((0, 1), (0, 3), (1, 3), (2, 3)):          # drawn in several blocks
        torch.manual_seed(0)
        parts.append(losses.make("subcenter:k=2", 3, 100_001, share).weight.detach().unflatten(0, (2, -1)))
    assert torch.equal(torch.cat(parts[1:], 1), parts[0])


# ---- models.py -----------------------------------------------------------------------------------------------

def trunk_of_torchvision(arch):
    """torchvision's layers up to the last feature map, on the meta device."""
    with torch.device("meta"):
        extra = {"aux_logits": False, "init_weights": False} if arch == "googlenet" else {}
        net = getattr(torchvision.models, arch.replace("netv2", "net_v2"))(weights=None, **extra)
    if hasattr(net, "features"):
        return net.features
    return nn.Sequential(*(m for name, m in net.named_children() if name not in ("avgpool", "dropout", "fc")))


def on_meta(arch, dim=512, size=112):
    with torch.device("meta"):
        return models.make(arch, dim, size)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_models_agree_with_torchvision():
    for arch in ("resnet101", "resnet152", "convnext_small", "convnext_base", "convnext_large"):
        want, got = trunk_of_torchvision(arch).state_dict(), on_meta(arch).trunk.state_dict()
        assert [v.shape for v in got.values()] == [v.shape for v in want.values()], arch
    for arch in ("resnet18", "resnet34", "resnet50", "convnext_tiny", "mobilenetv2", "alexnet", "vgg11", "vgg16",
                 "googlenet"):
        torch.manual_seed(0)
        want, got = trunk_of_torchvision(arch), models.make(arch).trunk
        with torch.no_grad():                               # scales, biases, statistics with an effect
            for p in got.parameters():
                if p.dim() in (1, 3):
                    p += 0.2 * torch.rand_like(p)
            got(torch.randn(4, 3, 64, 64))
        values = [value.clone() for value in got.state_dict().values()]
        assert [v.shape for v in want.state_dict().values()] == [v.shape for v in values], arch
        assert [p.shape for p in want.parameters()] == [p.shape for p in got.parameters()], arch
        want.load_state_dict(dict(zip(want.state_dict(), values)), assign=True)
        for size, training in ((64, True), (72, False)):
            images, outputs = torch.randn(2, 3, size, size), []
            for net in (want, got):
                torch.manual_seed(1)                        # drop-path must draw the same numbers
                with torch.no_grad():
                    outputs.append(net.train(training)(images))
            error = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
            assert outputs[0].std() > 0 and error < 1e-5, (arch, size, error.item())


def test_models_counts():
    for arch, dim, size, channels, want in (                # channels of the image as published
            ("lenetpp", 2, 32, 1, 799394), ("lightcnn9", 256, 128, 1, 5480864), ("lightcnn29", 256, 128, 1, 12573280),
            ("iresnet18", 512, 112, 3, 24025600), ("iresnet34", 512, 112, 3, 34139328),
            ("iresnet50", 512, 112, 3, 43590848), ("iresnet100", 512, 112, 3, 65156160),
            ("mobilefacenet", 128, 112, 3, 1003136), ("sphere20", 512, 112, 3, 22666944 + 512 * 7 * 512)):
        net = on_meta(arch, dim, size)
        assert count(net) - (3 - channels) * next(net.parameters())[:, 0].numel() == want, arch
    head = {"resnet18": 11.69, "resnet34": 21.80, "resnet50": 25.56, "resnet101": 44.55, "resnet152": 60.19,
            "seresnet50": 28.09, "seresnet101": 49.33, "googlenet": 6.62, "mobilenetv2": 3.50,
            "convnext_atto": 3.70, "convnext_femto": 5.22, "convnext_pico": 9.05, "convnext_nano": 15.59,
            "convnext_tiny": 28.59, "convnext_small": 50.22, "convnext_base": 88.59, "convnext_large": 197.77}
    for arch, want in head.items():                         # the trunk and a 1000-class head
        trunk = on_meta(arch).trunk
        width = 1024 if arch == "googlenet" else [*trunk.parameters()][-1].shape[0]
        norm = 2 * width if "convnext" in arch else 0
        assert round((count(trunk) + norm + 1000 * width + 1000) / 1e6, 2) == want, arch
    for arch, want in {"alexnet": 2469696, "vgg11": 9220480, "vgg16": 14714688}.items():
        assert count(on_meta(arch).trunk) == want, arch
    for arch, dim, size, want in (
            ("iresnet18", 512, 112, 2.6), ("iresnet34", 512, 112, 4.5), ("iresnet50", 512, 112, 6.3),
            ("iresnet100", 512, 112, 12.1), ("mobilefacenet", 128, 112, 0.221), ("mobilenetv2", 1280, 224, 0.301),
            ("googlenet", 1024, 224, 1.498), ("resnet50", 2048, 224, 4.089), ("convnext_tiny", 768, 224, 4.456),
            ("convnext_pico", 512, 224, 1.4)):
        net = on_meta(arch, dim, size)                      # at 224: dim is the map's width, the head's input
        got = models.macs(net, size) if size < 224 else models.macs(net.trunk, size) + 1000 * dim
        assert round(got / 1e9, len(str(want).split(".")[1])) == want, arch
    net = models.make("mobilefacenet", 32, 32).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert models.macs(net, 32) == models.macs(on_meta("mobilefacenet", 32, 32), 32) and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net(torch.randn(2, 3, 32, 32)).std() > 0.5       # the layers that counting skips are back


def test_models_train_save_and_load():
    """Three steps of plain SGD, which keeps nothing beside the gradients: the largest has 197 million weights."""
    torch.manual_seed(0)
    wave, labels = torch.linspace(0, 12, 32).sin(), torch.arange(8) % 2         # lying and standing stripes
    images = torch.where(labels[:, None, None, None] == 0, wave[:, None], wave) + 0.1 * torch.randn(8, 3, 32, 32)
    for arch in models.ARCHS:
        torch.manual_seed(0)
        net, head, seen = models.make(arch, dim=16, size=32).train(), nn.Linear(16, 2), []
        # On 1x1 maps the loss of deep nets of batch norm is rough: all images, and tiny steps of the backbone.
        rough = arch.startswith(("resnet", "seresnet", "googlenet", "lightcnn", "mobilenetv2"))
        optimizer = torch.optim.SGD([{"params": net.parameters(), "lr": 1e-5 if rough else 0.05},
                                     {"params": head.parameters(), "lr": 0.2}])
        some = slice(8 if rough else 4)
        for step in range(4):
            torch.manual_seed(1)                            # the same dropout each time
            with torch.set_grad_enabled(step < 3):
                loss = F.cross_entropy(head(4 * F.normalize(net(images[some]))), labels[some])
            seen.append(loss.item())
            if step == 3:
                break
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()
        assert seen[3] < seen[0], (arch, seen)
        state = net.state_dict()
        if count(net) < 3e7:                                # through a file, where the clock allows it
            torch.save(state, file := io.BytesIO())
            file.seek(0)
            state = torch.load(file)
        twin = on_meta(arch, 16, 32)
        twin.load_state_dict(state, assign=True)
        with torch.no_grad():
            assert torch.equal(net.eval()(images[:1]), twin.eval()(images[:1])), arch


SMALL = ("lenetpp", "alexnet", "vgg11", "googlenet", "lightcnn29", "resnet18", "seresnet50", "sphere10",
         "iresnet18", "iresnet_se18", "mobilenetv2", "mobilefacenet", "convnext_atto")


def test_models_sizes_memory_format_autocast_and_fold():
    for arch in SMALL:
        torch.manual_seed(0)
        net, images = models.make(arch, dim=8, size=48), torch.randn(4, 3, 48, 48)
        with torch.no_grad():
            for _ in range(3):                              # statistics away from 0 and 1
                net(images)
            net.eval()
            want, folded = net(images), models.fold(net)
            norms = [m for m in folded.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
            assert len(norms) == (9 if "iresnet" in arch else 0), arch      # before a convolution they stay
            assert (folded(images) - want).abs().max() < 1e-5 * want.abs().max(), arch
            assert torch.equal(net(images), want), arch     # fold works on a copy
            for side in (32, 80):
                assert net(torch.randn(1, 3, side, side)).shape == (1, 8), (arch, side)
            last = net.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
            assert (last - want).abs().max() < 1e-4 * want.abs().max(), arch
        for kind in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", kind):
                out = net.train()(images[:2, :, :32, :32])
            assert out.isfinite().all(), (arch, kind)
        out.float().square().mean().backward()              # not in float16: that takes minutes on a CPU
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad), arch
        for block in net.modules():
            if isinstance(block, models.ConvNeXtBlock):
                nn.init.ones_(block.scale)
        outputs = []
        for seed in (1, 2, 1) if arch in ("iresnet18", "convnext_atto") else ():    # dropout, drop-path: of the
            torch.manual_seed(seed)                                                 # global generator alone
            outputs.append(net(images))
        assert not outputs or torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1]), arch


def test_models_make_answers_mistakes():
    for words, *arguments in (("resnet50", "resnt50"), ("iresnet_se50", "iresnet_se5"), ("nearest", None),
                              ("dimension", "resnet18", 0), ("32..256", "resnet18", 8, 31),
                              ("32..256", "resnet18", 8, 257)):
        raises(words, models.make, *arguments)
    for arch, size in itertools.product(SMALL, (33, 100, 255)):
        net, sides = on_meta(arch, 8, size), []
        for m in net.modules():
            if isinstance(m, models.Fit):                   # a net of this size pools only to bound its neck
                m.register_forward_hook(lambda m, x, y: sides.append((x[0].shape[-1], y.shape[-1])))
        assert models.macs(net, size) > 0
        assert all(a == b or a > b == 4 for a, b in sides) and sides, (arch, size, sides)
    assert [line.split()[0] for line in models.table().splitlines()[1:]] == list(models.ARCHS)


# ---- losses.py -----------------------------------------------------------------------------------------------

CLASS_HEADS = ("modified normface coco vmf adacos lsoftmax asoftmax sphereface am cosface arcface combined curricular "
               "subcenter adaface magface elastic sphereface2 uniface circle_class groupface").split()
SAMPLED = [n for n, f in losses.FORMULAS.items() if "sample" in inspect.signature(f).parameters]
SHAPES = "range ring uniform center center_invariant".split()                   # terms that alone make no embedding


def loss_of(spec, dim=8, classes=6, double=True, seed=0):
    torch.manual_seed(seed)
    published = lambda f, *_: {"s": 64.0, "m": 0.35 if f is losses.cosface else 0.5}
    with mock.patch.object(losses, "automatic", published):
        module = losses.make(spec, dim, classes)
    return module.double() if double else module


def with_partner(name):
    return ("ce+" if name in SHAPES or name == "regular" else "") + name


def people(people=4, each=3, dim=8, seed=1):
    torch.manual_seed(seed)
    return (torch.randn(people * each, dim).double() * 2).requires_grad_(), torch.arange(people).repeat(each)


@contextlib.contextmanager
def logits_seen():
    """A list that receives (logits, labels) of each cross-entropy, of classes or of one against the rest."""
    seen = []

    def watch(f):
        def watched(logits, y, *args, **keywords):
            seen.append((logits.detach().clone(), getattr(y, "column", y)))
            return f(logits, y, *args, **keywords)
        return watched
    with mock.patch.object(F, "cross_entropy", watch(F.cross_entropy)), \
            mock.patch.object(losses, "one_against_rest", watch(losses.one_against_rest)):
        yield seen


def test_losses_equal_each_other_at_special_parameters():
    for a, b in (("combined:m1=1,m2=0,m3=0", "normface:s=64,learn=false"), ("combined:m2=0.5,m3=0", "arcface"),
                 ("combined:m2=0,m3=0.35", "cosface"), ("combined:s=30,m1=1.7,m2=0,m3=0", "sphereface"),
                 ("am:s=64", "cosface"), ("normface:s=30", "coco"),
                 ("adaface:h=0,m=0.35", "cosface"), ("elastic:sigma=0", "arcface"),
                 ("elastic:sigma=0,kind=cos,m=0.35", "cosface"), ("subcenter:k=1", "arcface"),
                 ("magface:m_low=0.5,m_high=0.5,lam=0", "arcface"), ("vmf:shared=true", "coco"),
                 ("adacos:dynamic=false", f"coco:s={math.sqrt(2) * math.log(5)!r}"),
                 ("asoftmax:base=1e14", "modified"), ("asoftmax:m=1", "modified"), ("tse:m=0.3,k=8", "hinge:m=0.3"),
                 ("elastic", "arcface")):
        one, two = loss_of(a), loss_of(b)
        one.train(a != "elastic")                                               # its noise is for training only
        for p, q in zip(one.parameters(), two.parameters()):
            p.data = q.data.clone()
        x, y = people()
        r, t = one(x, y), two(x, y)
        close(r, t, 1e-6)                                                       # some constants are float32's
        close(*(torch.autograd.grad(v, x)[0] for v in (r, t)), tolerance=1e-6)
    x, y = people()
    ada, arc = loss_of("adaface:m=0.4").eval(), loss_of("arcface:m=0.4")
    ada.terms[0].mean.fill_(1e6), ada.terms[0].std.fill_(1.0)                   # every norm is far below: z = -1
    close(ada(x, y), arc(x, y))
    group, lam, arc = loss_of("groupface:lam=0.1").eval(), loss_of("groupface:lam=0").eval(), loss_of("arcface")
    for g in (group, lam):
        g.terms[0].parts.data.zero_()
        g.weight.data = arc.weight.data
    close(lam(x, y), arc(x, y))
    p = group.terms[0].groups(x)
    close(group(x, y) - arc(x, y), 0.1 * F.cross_entropy(p, (p.softmax(1) - 0.25).argmax(1)))
    w = losses.unit(arc.weight).detach()[:3]                                    # no negative is hard on its own weight
    close(loss_of("curricular")(w, torch.arange(3)), arc(w, torch.arange(3)))
    mag, a = loss_of("magface:m_low=0.5,m_high=0.5,low=1,high=50"), x.norm(dim=1).clamp(1, 50)
    close(mag(x, y), arc(x, y) + 35 * (1 / a + a / 2500).mean())
    pairs = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    close(loss_of("npair:reg=0")(x[:8], pairs), F.cross_entropy(x[:4] @ x[4:8].T, torch.arange(4)))
    two = losses.cosines(x[:8]).fill_diagonal_(-math.inf) / 0.1
    close(loss_of("supcon")(x[:8], pairs), F.cross_entropy(two, (torch.arange(8) + 4) % 8))
    vmf, k = loss_of("vmf:s=20"), 20.0                                          # d log C_D / dk = -I_{v+1}/I_v
    vmf.logits(x)[0, 2].backward()
    three, four = (sum((k / 2) ** (2 * i + v) / math.gamma(i + 1) / math.gamma(i + v + 1) for i in range(60))
                   for v in (3, 4))
    cos = losses.unit(x[0]) @ losses.unit(vmf.weight[2])
    close(vmf.terms[0].log_k.grad[2], k * (cos - four / three), 5e-3)


def by_hand(x, y):
    """name -> value, by loops over Python numbers."""
    def mean(v):
        return sum(v) / max(len(v), 1)

    def plus(v):
        return max(v, 0.0)

    def soft(v):
        return math.log1p(math.exp(v))

    def dot(i, j):
        return float(x[i] @ x[j])

    def shared(i, f, others):                               # the sum of exp f over others of image i
        return sum(math.exp(f(s[i][j])) for j in others[i])

    n, u = range(len(y)), losses.unit(x)
    s = [[float(u[i] @ u[j]) for j in n] for i in n]
    d = [[float((u[i] - u[j]).norm()) for j in n] for i in n]
    same = [(i, j) for i in n for j in n if i != j and y[i] == y[j]]
    other = [(i, j) for i in n for j in n if y[i] != y[j]]
    P, N = ([[j for a, j in pairs if a == i] for i in n] for pairs in (same, other))
    both = [a for a in n if P[a] and N[a]]
    triples = {"all": [(a, p, q) for a, p in same for q in N[a]], "semihard": [],
               "hard": [(a, min(P[a], key=lambda p: s[a][p]), max(N[a], key=lambda q: s[a][q])) for a in both]}
    for a, p in same:
        if N[a]:
            far = [q for q in N[a] if s[a][q] < s[a][p]]
            q = max(far, key=lambda q: s[a][q]) if far else min(N[a], key=lambda q: s[a][q])
            triples["semihard"].append((a, p, q))
    gaps = {mining: [s[a][q] - s[a][p] for a, p, q in some] for mining, some in triples.items()}
    tri = {mining: [plus(2 * gap + 0.2) for gap in some] for mining, some in gaps.items()}      # d^2 = 2 - 2 s
    people, intra = {c: [i for i in n if y[i] == c] for c in y.tolist()}, 0.0
    for c in people:
        worst = sorted((d[i][j] for i, j in same if i < j and y[i] == c), reverse=True)[:2]
        intra += len(worst) / sum(1 / v for v in worst) if worst else 0
    mid = [u[some].mean(0) for some in people.values()]
    inter = min((float((a - b).norm()) ** 2 for i, a in enumerate(mid) for b in mid[:i]), default=9.0)
    first = [some for some in people.values() if len(some) > 1]
    rest = [[a for a in n if a != i] for i in n]
    con = [-mean([s[i][p] / 0.1 - math.log(shared(i, lambda c: c / 0.1, rest)) for p in P[i]]) for i in n if P[i]]
    cir = [soft(math.log(shared(i, lambda c: 80 * plus(c + 0.4) * (c - 0.4), N))
                + math.log(shared(i, lambda c: -80 * plus(1.4 - c) * (c - 0.6), P))) for i in both]
    mul = [math.log1p(shared(i, lambda c: -2 * (c - 0.5), P)) / 2
           + math.log1p(shared(i, lambda c: 50 * (c - 0.5), N)) / 50 for i in n]
    l1 = [[math.sqrt(8) - 1.4 * math.log(2) * float((u[i] - u[j]).abs().sum()) for j in n] for i in n]
    return {
        "contrastive": mean([d[i][j] ** 2 / 2 for i, j in same]) + mean([plus(1 - d[i][j]) ** 2 / 2 for i, j in other]),
        "double_margin": mean([plus(d[i][j] - 0.4) ** 2 for i, j in same])
        + mean([plus(1.2 - d[i][j]) ** 2 for i, j in other]),
        "marginal": mean([plus(0.3 - 1.2 + d[i][j] ** 2) for i, j in same]
                         + [plus(0.3 + 1.2 - d[i][j] ** 2) for i, j in other]),
        "triplet:mining=all": mean([v for v in tri["all"] if v > 0]), "triplet:mining=hard": mean(tri["hard"]),
        "triplet": mean(tri["semihard"]), "hinge": mean([plus(v + 0.2) for v in gaps["all"]]),
        "hinge:mining=hard": mean([plus(v + 0.2) for v in gaps["hard"]]),
        "tse:k=8": mean([plus(v + 0.1) for v in gaps["all"]]), "tpe:k=8": mean([soft(v) for v in gaps["all"]]),
        "npair": mean([math.log(sum(math.exp(dot(v[0], w[1])) for w in first)) - dot(v[0], v[1]) for v in first])
        + 0.002 * mean([dot(i, i) for i in n]),
        "supcon": mean(con), "circle": mean(cir), "multisim": mean(mul), "range": intra + plus(1 - inter),
        "siamese": mean([soft(-l1[i][j]) for i, j in same]) + mean([soft(l1[i][j]) for i, j in other]),
        "uniform": mean([1 / (1 + d[i][j]) for i, j in other]) if not same else None}


def test_losses_of_pairs_and_triplets_agree_with_loops():
    for labels in ([0, 1, 2, 3] * 3, [0] * 5 + [1] * 3 + [2, 2, 3, 4], [5] * 12, list(range(12))):
        x, y = people(seed=len(set(labels)))[0], torch.tensor(labels)
        x.data[4] = x.data[0] + 0.1                                             # close, by an angle in any margin
        for spec, want in by_hand(x.detach(), y).items():
            if want is not None:
                close(loss_of(spec, classes=12)(x, y), want, 1e-6 if "circle" in spec else 1e-7, spec)


def test_losses_terms_follow_the_published_rules():
    x, y = people()[0], torch.tensor([0] * 5 + [1] * 3 + [2, 2, 3, 3])
    center, invariant, ring = loss_of("center"), loss_of("center_invariant"), loss_of("ring")
    c, each = torch.zeros(6, 8).double(), [torch.nonzero(y == k)[:, 0] for k in range(6)]
    for step in range(3):
        z = (x * (1 + step)).detach().requires_grad_()
        value = center(z, y)
        close(value, sum((z[i] - c[y[i]]).square().sum() for i in range(12)) / 24)
        close(torch.autograd.grad(value, z)[0], (z - c[y]).detach() / 12)
        mean = c.square().sum(1).mean()
        c = torch.stack([old - 0.5 * (old - z.detach()[some]).sum(0) / (1 + len(some)) for old, some in zip(c, each)])
        close(invariant(z, y), sum((c[y[i]].square().sum() - mean) ** 2 for i in range(12)) / 48)
        close(center.terms[0].c, c), close(invariant.terms[0].c, c)
    assert center.eval()(x, y) == center(x, y)                                  # evaluation moves nothing
    norm = x.norm(dim=1)
    for scale in (1, 2):
        close(ring(scale * x, y), (scale * norm - norm.mean()).square().mean() / 2)
    reg = loss_of("ce+regular")
    w = losses.unit(reg.weight.detach())
    near = [max(float(w[a] @ w[b]) for b in range(6) if b != a) for a in y.tolist()]
    close(reg(x, y) - loss_of("ce")(x, y), sum(near) / 12)
    adacos = loss_of("adacos")
    cos, s0 = losses.unit(x) @ losses.unit(adacos.weight).T, float(adacos.terms[0].s)
    mean = sum(math.exp(s0 * cos.detach()[i, j]) for i in range(12) for j in range(6) if j != y[i]) / 12
    theta = sorted(math.acos(cos.detach()[i, y[i]]) for i in range(12))[5]
    adacos(x, y)
    close(adacos.terms[0].s, math.log(mean) / math.cos(min(theta, math.pi / 4)), 1e-7)
    mine, hot, still = cos.gather(1, y[:, None]), F.one_hot(y, 6) > 0, cos.detach()      # the fast ones, plainly
    angle = mine.acos() + 0.5
    target = torch.where(angle < math.pi, angle.cos(), -2 - angle.cos()).detach() + mine - mine.detach()
    for name, mine, rest in (
            ("curricular", target, cos * torch.where(cos > target, 0.01 * mine.mean().detach() + cos, 1)),
            ("circle_class", 4 * (1.25 - still) * (cos - 0.75), 4 * (still + 0.25).relu() * (cos - 0.25))):
        pair = F.cross_entropy(64 * torch.where(hot, mine, rest), y), loss_of(name)(x, y)
        close(*pair)
        close(*(torch.autograd.grad(v, x, retain_graph=True)[0] for v in pair), tolerance=1e-6)
    for spec, n in itertools.product(("sphereface2", "sphereface2:alpha=0.8,r=64,m=0.5"), (2, 3, 8)):
        two = loss_of(spec, classes=n)                                         # b starts where orthogonal x like it
        two.weight.data = torch.eye(2, 8).double()[[0] * n]
        close(torch.autograd.grad(two(torch.eye(8).double()[4:6], torch.tensor([0, 1])), two.terms[0].b)[0], 0, 1e-4)
    two, uni = loss_of("sphereface2"), loss_of("uniface")
    close(two.logits(x), 40 * (2 * ((cos + 1) / 2) ** 3 - 1) + two.terms[0].b)
    questions = F.softplus(torch.where(hot, -1, 1) * (two.logits(x) + 40 * 0.4 * torch.where(hot, -1, 1)))
    close(two(x, y), (questions * torch.where(hot, 0.7, 0.3)).sum() / 12 * 50 / 40, 1e-6)
    questions = F.softplus(torch.where(hot, -1, 1) * (uni.logits(x) - math.log(60) - 64 * 0.4 * hot))
    close(uni(x, y), questions.sum() / 12, 1e-6)


def test_losses_margin_has_the_right_gradient_and_falls_on_all_angles():
    t, m2 = (torch.linspace(a, b, 37).double().requires_grad_() for a, b in ((-0.99, 0.99), (-0.4, 0.9)))
    angles = torch.linspace(0, math.pi, 2001).double()
    for m in ((1, 0, 0), (1, 0.5, 0), (1, 0, 0.35), (1.7, 0, 0), (4, 0, 0), (1.2, 0.4, 0.1), (0.9, 0.4, 0.15)):
        value = losses.psi(t, *m)
        angle = m[0] * t.detach().acos() + m[1]
        plain = torch.where(angle <= math.pi, angle.cos(), -angle.cos() - 2) - m[2]
        assert m[0] > 2 or torch.allclose(value, plain)
        assert (losses.psi(angles.cos(), *m).diff() < 0).all(), m
    assert torch.autograd.gradcheck(lambda m2: losses.psi(t.detach(), 1.3, m2, 0.2 + m2), (m2,))
    poles, own = torch.tensor([[1, 0.2], [-1, 0.2], [0.3, 0.5]], requires_grad=True), torch.zeros(3).long()
    head = loss_of("arcface").terms[0]
    margin = losses.margin_softmax(30 * poles, head.own(own), 30, lambda t: losses.psi(t, 1, 0.5))
    plain = (30 * poles).detach().clone()
    plain[:, 0] = 30 * losses.psi(poles[:, 0].detach(), 1, 0.5)
    want = 30 * (plain.softmax(1) - F.one_hot(own, 2)) / 3                      # as if the margin were a constant
    close(torch.autograd.grad(margin, poles)[0], want, 1e-6)
    x, w = torch.randn(5, 8).double().requires_grad_(), torch.randn(7, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(losses.Cosines.apply, (x, w))
    close(losses.Cosines.apply(x, w), x @ losses.unit(w).T)
    x, y = 15 * torch.stack([angles.cos(), -angles.sin()], 1), torch.zeros(2001).long()
    for name in CLASS_HEADS:
        head = loss_of(name, 2, 2).eval()
        with torch.no_grad(), logits_seen() as seen:
            head.weight.copy_(torch.tensor([1.0, 0.0]))                         # all on the first axis
            for p in getattr(head.terms[0], "parts", ()):
                p.zero_()
            head(x, y)
        fall = seen[0][0][:, 0].diff()
        assert (fall[:1900] < 0).all() and (fall <= 0).all(), name              # sphereface2: a cube, flat at its end


def test_losses_expected_is_the_first_loss():
    torch.manual_seed(3)
    x, y, stated = torch.randn(256, 512), torch.randint(0, 2000, (256,)), []
    for spec in (*losses.LOSSES, "ce+0.5*cosface:sample=0.2", "2*arcface", "arcface:sample=0.2", "elastic:kind=cos"):
        if spec != "regular" and (want := loss_of(spec, 512, 2000).expected()) is not None:
            got = sum(loss_of(spec, 512, 2000, False, k)(x, y).item() for k in range(2)) / 2
            assert abs(got / want - 1) < 0.03, (spec, got, want)
            stated.append(spec)
    assert len(stated) >= 14, stated


def test_losses_depend_on_no_order_and_survive_a_checkpoint():
    for name in losses.LOSSES:
        spec = with_partner(name) + (":sigma=0" if name == "elastic" else "")
        one, two, three, four = (loss_of(spec, seed=seed) for seed in (0, 0, 0, 9))
        x, y = people(4, 2)                                                     # npair takes a person's first two
        order, names = torch.randperm(8), torch.tensor([3, 5, 0, 4, 1, 2])
        if name == "npair":
            order = torch.tensor([2, 0, 3, 1, 6, 4, 7, 5])
        for p in three.parameters():
            if p.shape[:1] in ((6,), (18,)):
                q = p.data.clone().view(-1, 6, *p.shape[1:])
                p.data.view_as(q)[:, names] = q
        for _ in range(2):
            want = one(x, y)
            close(two(x[order], y[order]), want, what=name)
            close(three(x, names[y]), want, what=name)
        for p in (x, *one.parameters()):
            p.data += 0.1 * torch.randn_like(p)
        four.load_state_dict(one.state_dict())
        values = [(m(x, y), m.eval()(x, y), m.project(x).sum()) for m in (one, four) if torch.manual_seed(5)]
        assert values[0] == values[1] and values[0][0].dtype == torch.float64, (name, values)


def test_losses_are_finite_everywhere():
    kinds = {"random": lambda x, w: x, "perfect": lambda x, w: 3 * w, "opposite": lambda x, w: -3 * w,
             "zero": lambda x, w: 0 * x, "tiny": lambda x, w: 1e-12 * x, "huge": lambda x, w: 1e4 * x,
             "identical": lambda x, w: torch.ones_like(x)}
    half = [(d, k) for d in (torch.bfloat16, torch.float16) for k in ("random", "zero")]
    for name in losses.LOSSES:
        for classes, lists in (2, ([0, 1] * 4, [1], [0] * 8)), (1000, ([0, 1] * 4, list(range(8)))):
            module = loss_of(with_partner(name), 16, classes, False)
            w = torch.eye(16)[torch.arange(classes) % 16] if module.weight is None else losses.unit(
                module.weight[:classes]).detach()
            for labels in lists:
                y = torch.tensor(labels)
                for dtype, kind in (half if labels == lists[0] else []) + [(torch.float32, k) for k in kinds]:
                    x = kinds[kind](torch.randn(len(y), 16), w[y]).to(dtype).requires_grad_()
                    module.zero_grad()
                    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype):
                        value = module(x, y) + module(x, y)                     # twice, as in gradient accumulation
                    value.backward()
                    where = name, classes, labels, kind, dtype, value
                    assert value.dtype == torch.float32 and value.dim() == 0 and value.isfinite(), where
                    some = [p.grad for p in (x, *module.parameters()) if p.grad is not None]
                    assert all(v.isfinite().all() for v in (*some, *module.buffers())), where


def test_losses_bring_four_people_to_eer_0():
    y = torch.arange(4).repeat(4)
    i, j = torch.triu_indices(16, 16, 1)
    for name in losses.LOSSES:
        module, rates = loss_of(with_partner(name) + ":k=1" * (name == "subcenter"), 16, 4, False), []
        x = (0.1 * (torch.randn(4, 16)[y] + 1.1 * torch.randn(16, 16))).requires_grad_()
        optimizer = torch.optim.Adam([x, *module.parameters()], 0.03)
        for step in range(61):
            if step in (0, 60):
                with torch.no_grad():
                    z = module.eval().project(x)
                    s = module.score(z[i], z[j]) if module.score else losses.cosines(z)[i, j]
                    rates.append(eer.eer((y[i] == y[j]).numpy(), s.numpy())[0])
            module.train().zero_grad()
            x.grad, order = None, torch.randperm(16)
            module(x[order], y[order]).backward()
            optimizer.step()
        assert rates[0] > 0.02 and rates[1] == 0, (name, rates)
        assert module.weight is None or (module.logits(x).argmax(1) == y).all(), name


def test_losses_answer_mistakes_and_expand_names():
    for spec, words in (
            ("arcfase", "did you mean 'arcface'"), ("arcface:mm=1", "did you mean 'm'"), ("arcface:s", "argument"),
            ("arcface:s=x", "expected float"), ("arcface:s=0", "positive"), ("arcface:m=-1", "0 or more"),
            ("arcface:s=nan", "finite"), ("triplet:mining=al", "all or hard or semihard"),
            ("ce++center", "cannot read"), ("modified:s=1", "takes no arguments"),
            ("center+regular", "ce+regular"), ("2*deepid2", "stands for"),
            ("facenet:m=1", "stands for"), ("1e+*ce", "numbers"), ("-1*ce", "weight"), ("1e999*ce", "weight"),
            ("arcface:sample=2", "0..1"), ("arcface:sample=0", "0..1"), ("normface:learn=maybe", "expected bool"),
            ("subcenter:k=1.5", "expected int"), ("tse+groupface", "embedding"), ("", "cannot read"),
            ("sphereface2:alpha=1", "numbers"), ("magface:low=9,high=9", "numbers"), ("ce:smooth=3", "0..1"),
            ("multisim:alpha=0", "numbers"), ("0.5*npair+regular", "ce+regular"), ("arcface:s=3,s=4", "twice")):
        raises(words, losses.make, spec, 8, 6)
    for spec, expanded in (
            ("Softmax", "ce"), ("DeepID2", "ce+0.05*contrastive"), (" ce + 1e-3 * center ", "ce+1e-3*center"),
            ("facenet", "triplet:mining=semihard,m=0.2"), ("softmax:smooth=0.1", "ce:smooth=0.1"),
            ("1e+0*ce+regular", "1e+0*ce+regular"), ("normface:learn=FALSE", "normface:learn=False"),
            ("arcface:m=0", "arcface:s=9.1,m=0.0"), ("cosface", "cosface:s=9.1,m=0.35")):
        assert losses.make(spec, 8, 6).spec == losses.make(expanded, 8, 6).spec == expanded
    assert losses.make("cosface", 8, 3318, images=6820).spec == "cosface:s=20.1,m=0.15"     # few images a person
    assert [n for n in losses.LOSSES if losses.make(with_partner(n), 8, 6).balanced] == (
        "contrastive double_margin marginal triplet hinge tse tpe npair supcon circle multisim siamese range").split()
    assert all(f"  {n}" in losses.table() for n in (*losses.LOSSES, *losses.ALIASES))
    assert all(losses.make(a, 8, 6).spec for a in losses.ALIASES)
    x, y = people()
    close(loss_of("2*ce+0.5*supcon")(x, y), 2 * loss_of("ce")(x, y) + 0.5 * loss_of("supcon")(x, y))
    assert loss_of("triplet").weight is None and loss_of("arcface+0.1*tse:k=4").project(x).shape == (12, 4)


def test_losses_sampled_classes_hold_the_batch():
    x, y = people(4, 3)[0], torch.tensor([39, 0, 7, 7, 8, 20, 39, 1, 2, 3, 4, 5])
    for name, (share, n) in itertools.product(SAMPLED, (("0.5", 20), ("0.01", 12), ("1", 40))):
        module = loss_of(f"{name}:sample={share}", classes=40)                  # never fewer columns than images
        with logits_seen() as seen:
            module(x, y).backward()
            module.eval()(x, y)                                                 # evaluation sees every class
        rows = module.weight.grad.view(-1, 40, 8).abs().sum((0, 2)) > 0
        (some, _), (every, labels) = seen[0], seen[len(seen) // 2]
        assert some.shape[1] == n and rows.sum() <= n and rows[y].all(), (name, share)
        assert every.shape == module.logits(x).shape == (12, 40) and (labels == y).all(), name
    assert len(SAMPLED) >= 14


class Arrays(TorchDispatchMode):
    """Sees each tensor an operation makes: the largest, and how many (B, C) floats live at once."""
    def __init__(self, shape):
        super().__init__()
        self.shape, self.alive, self.most, self.largest = shape, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
                if t.shape == self.shape and t.element_size() >= 4:
                    storage = t.untyped_storage()
                    self.alive[storage._cdata] = StorageWeakRef(storage)
        self.alive = {k: r for k, r in self.alive.items() if not r.expired()}
        self.most = max(self.most, len(self.alive))
        return out


def test_losses_hold_few_arrays():
    y = torch.arange(16) % 8
    for name in losses.LOSSES:
        module, x = loss_of(with_partner(name), 32, 3000, False), torch.randn(16, 32, requires_grad=True)
        with Arrays((16, 3000)) as seen:
            module(x, y).backward()
        assert seen.largest <= 3000 * 32 * (3 if name == "subcenter" else 1), (name, seen.largest)      # never C x C
        assert seen.most <= 4, (name, seen.most)


# ---- Minutes, not seconds: run by name only --------------------------------------------------------------------

def slow_losses_memorise_people_through_train(tmp):
    """Each loss, alone or with its partner, through train.py: EER 0 on four memorised people, and a resumed run
    ends as the whole one."""
    data.synthesise(tmp / "made", people=8, images=4, size=32)
    shutil.copytree(tmp / "made/cls_data/train", tmp / "set/cls_data/train")
    shutil.copytree(tmp / "made/cls_data/train/images", tmp / "set/ver_data")
    labels = tmp / "set/cls_data/train/labels.txt"
    rows = [row for _, line in data.lines(labels) if int((row := line.split())[1]) < 4]
    labels.write_text("".join(f"{n} {y}\n" for n, y in rows))
    (tmp / "set/val_pairs.txt").write_text("".join(f"{a} {b} {int(y == z)}\n" for (a, y), (b, z)
                                                   in itertools.combinations(rows, 2)))
    plain = [part for name in data.AUGMENT for part in (f"--{name}", 0)]
    missed = []
    for name in losses.LOSSES:
        spec = ("ce+0.01*" if name in SHAPES or name == "regular" else "") + name
        spec += ":k=1" if name == "subcenter" else ":mining=all" if name == "triplet" else ""
        lr = dict(l2softmax=1e-2, tse=1e-2, tpe=1e-2, npair=1e-3).get(name, 3e-3)
        start = ("--data", tmp / "set", *TINY, "--dim", 64, "--batch-size", 8, "--per-person", 2, "--epochs", 50,
                 "--lr", lr, "--loss", spec, *plain)
        whole, parts = tmp / name / "whole", tmp / name / "parts"

        def go(out, stop, *flags):
            run(train, *flags, "--out", out, "--steps", stop, cwd=tmp)

        with mock.patch.object(os, "fsync", lambda f: None), mock.patch.object(data, "plot", lambda *a: None):
            go(whole, 20, *start)
            go(parts, 7, *start)
            go(parts, 20, "--resume")
            same(*(verify.load(out / "last.pt") for out in (whole, parts)), name)
            go(whole, 100, "--resume")
        best = verify.load(whole / "last.pt")["best"]
        print(f"    {spec}: EER {best:.3f}", flush=True)
        missed += [spec] * (best > 0)
        shutil.rmtree(tmp / name)
    assert not missed, missed


def slow_kills(tmp):
    """Runs killed (-9) at twenty random times, start and saving included, and resumed end as the uninterrupted one."""
    def go(seconds, *argv):
        """The time that train.py took, or None where it was killed before its end."""
        since = time.monotonic()
        with (tmp / "text.txt").open("w") as text:
            child = subprocess.Popen([sys.executable, HERE / "train.py", *map(str, argv)], cwd=tmp, stdout=text,
                                     stderr=text, env=os.environ | {"OMP_NUM_THREADS": "1"})
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds)
            child.kill()
        assert child.wait() in (0, -9), (tmp / "text.txt").read_text()[-2000:]
        return time.monotonic() - since if child.returncode == 0 else None

    rng = np.random.default_rng(0)
    for i, (name, flags) in enumerate(RUNS.items()):
        whole, parts = tmp / f"whole{i}", tmp / f"parts{i}"
        start = "--data", faces(), *TINY, "--epochs", 20, "--save-every", 0, *flags, "--out"
        resume, kills, writing = ("--resume", "--out"), 0, 0
        all_of_it, beginning = go(None, *start, whole), go(None, *resume, whole)
        longest, runs = beginning + (all_of_it - beginning) / 12, 1

        def check():
            for file in ("last.pt", "best.pt"):
                same(verify.load(whole / file), verify.load(parts / file), f"{name}: {file} after {kills} kills")
            one, two = (list(csv.DictReader((out / "log.csv").open())) for out in (whole, parts))
            same(one, two, name)
            assert len(one) == 20 and not list(parts.glob("*.tmp")), name

        while kills < 20 or not (parts / "last.pt").exists():
            if go(rng.uniform(0, longest), *(resume if (parts / "last.pt").exists() else start), parts):
                check()                                     # quicker than when it was timed: anew, with shorter lives
                shutil.rmtree(parts)
                kills, writing, longest, runs = 0, 0, 0.9 * longest, runs + 1
            else:
                kills, writing = kills + 1, writing + any(parts.glob("*.tmp"))
        at = verify.load(parts / "last.pt")["step"]
        go(None, *resume, parts)
        check()
        print(f"    {name}: {kills} kills, {writing} of them within a write, the last by step {at} of 60, in run {runs}",
              flush=True)


def slow_distributed_torchrun(tmp):
    """torchrun itself: process 1 is killed in step 6, torchrun starts all again and they go on from the last save; then
    process 1 fails in step 10, and all end within seconds with its message."""
    (tmp / "crash.py").write_text(f"""import os, sys
sys.path.insert(0, {str(HERE)!r})
import data, train
real, calls = data.augment, []
def augment(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 6:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), 9)
        raise ValueError("the fan is broken")
    return real(*args)
data.augment = augment
data.cli(train.main)
""")
    since, torchrun = time.monotonic(), (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2,
                                         "--max-restarts", 1, "--master_port", free_port(), "crash.py")
    flags = "--data", faces(), *TINY, "--batch-size", 15, "--out", "o", "--loss", "cosface", "--shard"
    p = subprocess.run([*map(str, torchrun + flags)], cwd=tmp, capture_output=True, text=True, timeout=300)
    print(f"    {time.monotonic() - since:.0f} s, exit code {p.returncode}")
    for text in ("error: the fan is broken", "process 0 ends, for another did"):
        assert p.returncode and text in p.stderr, p.stderr
    assert verify.load(tmp / "o/last.pt")["step"] == 8, p.stdout


def slow_distributed_classes(tmp):
    """A step of the arcface head with AdamW, batch 128, dimension 512, in one process and in two: growth of the
    resident memory, bytes sent (an all-reduce of n bytes sends 2 (N - 1) / N n each), median seconds of five."""
    from resource import RUSAGE_SELF, getrusage
    seen = {}
    for classes, (n, shard) in itertools.product((10_000, 100_000, 1_000_000), ((1, False), (2, False), (2, True))):
        if (classes, n, shard) == (1_000_000, 2, False):
            continue                                        # two whole copies of a million are 20 GB

        def task(rank):
            before, sent, spent = getrusage(RUSAGE_SELF).ru_maxrss, [], []
            if n > 1:
                torch.distributed.init_process_group("gloo")
            real = torch.distributed.all_reduce

            def all_reduce(t, *args):
                sent.append(t.numel() * t.element_size() * 2 * (n - 1) // n)
                return real(t, *args)
            torch.manual_seed(0)
            head = losses.make("arcface", 512, classes, (rank, n) if shard else (0, 1))
            opt = torch.optim.AdamW(head.parameters(), fused=True)
            x, y, b = torch.randn(128, 512), torch.randint(0, classes, (128,)), 128 // n
            with mock.patch.object(torch.distributed, "all_reduce", all_reduce):
                for _ in range(6):
                    since = time.perf_counter()
                    z = x[rank * b:rank * b + b].clone().requires_grad_()
                    loss = head(train.together(z, rank * b, 128) if n > 1 else z, y)
                    opt.zero_grad()
                    loss.backward()
                    opt.step()
                    spent.append(time.perf_counter() - since)
            memory = getrusage(RUSAGE_SELF).ru_maxrss - before
            return memory / 2 ** 10, sum(sent) / 6e3, np.median(spent[1:]) * 1e3, loss.item()

        memory, sent, ms, loss = processes(n, task, tmp)[0]
        close(loss, seen.setdefault(classes, loss), 1e-4, "the loss after six steps")
        print(f"    {classes:>9} classes, {n} processes{', --shard' * shard:<9}: {memory:7.0f} MiB, {sent:6.0f} kB,"
              f" {ms:6.0f} ms, loss {loss:.4f}", flush=True)


def seconds(call):
    since = time.perf_counter()
    call()
    return time.perf_counter() - since


def slow_losses_cost():
    """Heads at 8,631 classes, batch 256, dimension 512: time of forward and backward over that of a linear layer with
    cross-entropy, medians of seven runs in turn, and how it grows with the number of classes."""
    def spent(module, x, y):
        module.zero_grad()
        return seconds(lambda: module(x.detach().requires_grad_(), y).backward())

    class Plain(nn.Linear):
        def forward(self, x, y):
            return F.cross_entropy(super().forward(x), y)

    x, y, plain, over = torch.randn(256, 512), torch.randint(0, 8631, (256,)), Plain(512, 8631), {}
    for name in ("ce", *CLASS_HEADS):
        head = losses.make(name, 512, 8631)
        ours, linear = np.array([(spent(head, x, y), spent(plain, x, y)) for _ in range(9)][2:]).T
        over[name] = np.median(ours / linear)
        print(f"    {name:<13} {1e3 * np.median(ours):6.0f} ms  {over[name]:.2f} x linear + ce")
    for classes, sample in itertools.product((10_000, 100_000, 1_000_000), (1, 0.1)):
        head, y = losses.make(f"cosface:sample={sample}", 512, classes), torch.randint(0, classes, (128,))
        ms = 1e3 * min([spent(head, x[:128], y) for _ in range(3)][1:])
        print(f"    cosface, {classes} classes, sample={sample}: {ms:.0f} ms")
        del head
    beyond = {n: round(float(r), 2) for n, r in over.items() if r > 1.5 and n not in ("subcenter", "groupface")}
    assert not beyond, beyond


def training_step(net, opt, loss_of, x, bf16):
    with torch.autocast(x.device.type, torch.bfloat16, bf16):
        z = net(x)
    loss = loss_of(z)
    opt.zero_grad()
    loss.backward()
    opt.step()


def slow_models_speed():
    """Images/s of each architecture at 112 pixels, batch 32, 8 where that takes long: a training step with AdamW in the
    precision that train.py picks, and embedding in float32 with the batch norms folded away; the better of two after
    one to warm up."""
    bf16, last = train.precision(torch.device("cpu")) == "bf16", dict(memory_format=torch.channels_last)
    for arch in models.ARCHS:
        net = models.make(arch).to(**last)
        folded, opt = models.fold(net).to(**last), torch.optim.AdamW(net.parameters(), fused=True)
        x = torch.randn(32 if models.macs(net) < 2e9 else 8, 3, 112, 112).to(**last)
        calls = (functools.partial(training_step, net, opt, lambda z: z.float().square().mean(), x, bf16),
                 torch.no_grad()(functools.partial(folded, x)))
        rates = [len(x) / min([seconds(call) for _ in range(3)][1:]) for call in calls]
        print(f"{arch} {rates[0]:.0f} {rates[1]:.0f}", flush=True)


def slow_models_race():
    """Every architecture for the same training seconds (SECONDS, 60) on the faces of the folder FACES, or data/, the
    schedule following the clock; then the validation EER. swiftface sees 48 pixels, the others 64. Or ARCHS only."""
    budget, faces = float(os.environ.get("SECONDS", 60)), data.load(os.environ.get("FACES", "data"))
    cpu, cache, (files, labels) = torch.device("cpu"), data.cache_folder(faces.root), faces.train
    strength = {name: short for name, (short, _, _) in data.AUGMENT.items()}
    for arch in os.environ.get("ARCHS", " ".join(models.ARCHS)).split():
        size = 48 if arch == "swiftface" else 64
        images, rows = data.pack(files, size, cache, "train")
        pairs = verify.pack_pairs(faces.val_pairs, {"size": size}, cache, "val_pairs")
        torch.manual_seed(0)
        net = models.make(arch, 512, size).to(memory_format=torch.channels_last)
        head = losses.make("cosface:s=20,m=0.15", 512, len(faces.names))
        opt = torch.optim.AdamW([*net.parameters(), *head.parameters()], weight_decay=0.05, fused=True)
        order = itertools.chain.from_iterable(train.order(labels, rows, 64, 0, epoch) for epoch in itertools.count())
        began, step, share = time.monotonic(), 0, 0.0
        for index, x in data.batches(images, itertools.takewhile(lambda _: share < 1, order), cpu):
            opt.param_groups[0]["lr"] = 2e-3 * train.rate(round(1e6 * share), 10 ** 6, 0.1)
            y = torch.from_numpy(labels)[index]
            training_step(net, opt, lambda z: head(z, y), data.augment(x, strength), train.precision(cpu) == "bf16")
            step, share = step + 1, min(1, (time.monotonic() - began) / budget)
        found = verify.evaluate(net.eval(), head, {"val_pairs": pairs}, len(faces.names), mirror="none")
        print(f"    {arch:<15} {step:5} steps, EER {100 * found['eer']:.1f} %", flush=True)


def slow_bench(tmp):
    """What a user waits for, ours beside the peer's, on this machine, in turn, medians of three rounds: the data path
    against ImageFolder, torchvision's transforms and two workers (--compile needs a C++ compiler); training and
    embedding against torchvision's ResNet-18 with the same neck in a plain loop, at 112 pixels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, more = (128, 10) if device.type == "cuda" else (64, 1)
    data.synthesise(tmp / "set", people=100, images=22, size=112)
    files, labels = data.read_split(tmp / "set/cls_data/train")
    for f, y in zip(files, labels):
        (tmp / f"people/{y}").mkdir(parents=True, exist_ok=True)
        os.link(f, tmp / f"people/{y}" / Path(f).name)
    packs = {side: data.pack(files, side, tmp)[0] for side in (64, 112)}
    order = [np.random.default_rng(i).choice(len(files), 128) for i in range(30)]
    strength = dict(mirror=.5, rotate=10, shift=.05, zoom=.1, brightness=.2, contrast=.2, saturation=.2, erase=.2)
    T = torchvision.transforms
    plain = [T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]
    every = [T.RandomHorizontalFlip(), T.RandomAffine(10, (0.05, 0.05), (0.9, 1.1)), T.ColorJitter(0.2, 0.2, 0.2),
             *plain, T.RandomErasing(0.2)]

    def ours(side, change):
        for _, x in data.batches(packs[side], order, device):
            change(x)
            yield 128

    def folder(side, steps):
        faces = torchvision.datasets.ImageFolder(tmp / "people", T.Compose([T.Resize(side), *steps]))
        for x, _ in torch.utils.data.DataLoader(faces, 128, True, num_workers=2, pin_memory=device.type == "cuda"):
            x.to(device, non_blocking=True)
            yield len(x)

    def repeated(n, call, *args):
        for _ in range(n * more):
            call(*args)
            yield batch

    def rate(stages):                                       # they yield the number of images of each batch
        next(stages)
        since, done = time.perf_counter(), sum(stages)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return done / (time.perf_counter() - since)

    net, peer, last = models.make("resnet18"), torchvision.models.resnet18(), dict(memory_format=torch.channels_last)
    peer.avgpool, peer.fc = nn.AdaptiveAvgPool2d(4), nn.Sequential(nn.Linear(8192, 512, False), nn.BatchNorm1d(512))
    head, linear = losses.make("ce", 512, 8631).to(device), nn.Linear(512, 8631).to(device)
    net.to(device, **last), peer.to(device)
    x, y = torch.randn(batch, 3, 112, 112, device=device), torch.randint(0, 8631, (batch,), device=device)
    fast, bf16 = x.to(**last), train.precision(device) == "bf16"
    folded, frozen = models.fold(net).to(**last), copy.deepcopy(peer).eval()
    adamw = [torch.optim.AdamW([*n.parameters(), *h.parameters()], fused=fused)
             for n, h, fused in ((net, head, True), (peer, linear, False))]
    part = functools.partial
    look = torch.compile(data.pixels, dynamic=False)
    contests = [(f"{what}, {side} pixels", part(ours, side, change), part(folder, side, steps))
                for side in packs for what, change, steps in (
                    ("gathered", lambda x: x, plain), ("augmented", lambda x: data.augment(x, strength), every),
                    ("the same, --compile", lambda x: data.augment(x, strength, look=look), every))]
    contests += [
        ("training", lambda: repeated(5, training_step, net, adamw[0], lambda z: head(z, y), fast, bf16),
         lambda: repeated(5, training_step, peer, adamw[1], lambda z: F.cross_entropy(linear(z.float()), y), x, bf16)),
        ("embedding", lambda: repeated(20, torch.no_grad()(folded.forward), fast),
         lambda: repeated(20, torch.no_grad()(frozen.forward), x))]
    for what, a, b in contests:
        pairs = np.array([(rate(a()), rate(b())) for _ in range(3)])
        print(f"    {what:<30} {np.median(pairs[:, 0]):8.0f} images/s, peer {np.median(pairs[:, 1]):6.0f},"
              f" {np.median(pairs[:, 0] / pairs[:, 1]):6.2f} x", flush=True)
    labels, scores = np.random.default_rng(0).random(10_000_000) < 0.5, np.random.default_rng(1).random(10_000_000)
    print(f"    EER of ten million scores: {seconds(lambda: eer.eer(labels, scores)):.2f} s")


# ---- README and the rest -------------------------------------------------------------------------------------

def test_readme_tables_are_complete_and_only_four_packages_imported():
    text = (HERE / "README.md").read_text()
    rows = [f"| `{n}` |" for n in models.ARCHS] + [f"\n| `{a}` | `{e}` |\n" for a, e in losses.ALIASES.items()]
    for name, formula in losses.FORMULAS.items():
        arguments = ", ".join(f"{k}={'auto' if v is None else v}" for k, v in losses.defaults_of(formula).items()
                              if k != "sample") or "-"
        about = formula.__doc__.splitlines()[0].replace("|", r"\|")
        rows.append(f"\n| `{name}` | {arguments} | {about} |\n")
    assert not (wrong := [row for row in rows if row not in text]), f"README.md's tables lack {wrong}"
    allowed = {"torch", "torchvision", "numpy", "PIL", "data", "eer", "losses", "models", "train", "verify"}
    for file in HERE.glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {a.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        assert names <= allowed | sys.stdlib_module_names, f"{file.name} imports {names - allowed}"
        assert file.name != "models.py" or "torchvision" not in names


def main():
    torch.set_num_threads(min(2, torch.get_num_threads()))                     # OMP_NUM_THREADS may say 1
    warnings.simplefilter("ignore")
    counts = dict(passed=0, failed=0, skipped=0)
    for name, test in list(globals().items()):
        wanted = any(word in name for word in sys.argv[1:] or [""])
        if not (name.startswith("test_") and wanted or name.startswith("slow_") and name in sys.argv[1:]):
            continue
        since = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                test(*[Path(folder)] * len(inspect.signature(test).parameters))
                outcome, why = "passed", ""
            except Skip as e:
                outcome, why = "skipped", f": {e}"
            except Exception:
                outcome, why = "failed", "\n" + traceback.format_exc()
        counts[outcome] += 1
        print(f"{outcome:<7} {time.monotonic() - since:5.1f} s  {name[5:].replace('_', ' ')}{why}", flush=True)
    if faces.cache_info().currsize:
        shutil.rmtree(faces().parent)
    print(", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
