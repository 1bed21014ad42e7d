"""The sanity suite: no network, no data, no GPU, under two minutes on two cores.

    python test_all.py                  # everything; the last line counts, the exit code is 0 only if all passed
    python test_all.py resume losses    # the tests whose names contain one of these words
    python test_all.py slow_losses_memorise_people_through_train slow_losses_cost       # minutes: by full name only

A test compares with something that cannot be wrong in the same way: a closed form, brute force in Python,
torchvision with copied weights, the same run without the interruption.
"""
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
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
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


def raises(fragment, call, *args, **keywords):
    """The call ends in a ValueError of one line that contains the fragment."""
    try:
        call(*args, **keywords)
    except ValueError as e:
        assert fragment in str(e) and "\n" not in str(e), f"expected '{fragment}' in: {e}"
        return
    raise AssertionError(f"no ValueError about '{fragment}'")


def run(script, *argv, cwd):
    """(exit code, stdout, stderr) of a script's command line, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(cwd)
    try:
        with mock.patch.object(sys, "argv", [script.__name__, *map(str, argv)]), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                data.cli(script.main)
                code = 0
            except SystemExit as e:
                code = e.code or 0
    finally:
        os.chdir(before)
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return code, out.getvalue(), err.getvalue()


@functools.cache
def faces():
    """A small set of synthetic faces in the homework's layout, made once; read-only for the tests."""
    folder = Path(tempfile.mkdtemp(prefix="faces"))
    data.synthesise(folder / "set", people=10, images=6, size=32)
    return folder / "set"


def tiny(cwd, *more, code=0, epochs=2):
    """train.main on the small set with a small network."""
    got = run(train, "--data", faces(), "--arch", "swiftface", "--dim", 16, "--epochs", epochs, "--batch-size", 16,
              "--lr", 0.02, "--amp", "off", *more, cwd=cwd)
    assert got[0] == code, got
    return got


def full(*arguments):
    """What a full disk answers."""
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- eer.py --------------------------------------------------------------------------------------------------

def crossing_by_hand(labels, scores):
    """The interpolated ROC against the anti-diagonal, point by point in exact fractions."""
    from fractions import Fraction
    p, n = sum(labels), len(labels) - sum(labels)
    points = [(Fraction(0), Fraction(0))]
    for cut in sorted(set(scores), reverse=True):
        points.append((Fraction(sum(s >= cut and not y for y, s in zip(labels, scores)), n),
                       Fraction(sum(s >= cut and y for y, s in zip(labels, scores)), p)))
    for (f0, t0), (f1, t1) in itertools.pairwise(points):
        if t1 + f1 >= 1:
            return float(f0 + (1 - f0 - t0) / (f1 + t1 - f0 - t0) * (f1 - f0))


def test_eer_is_the_crossing_of_the_interpolated_roc():
    rng = np.random.default_rng(0)
    for case in range(200):
        y = rng.permutation(np.r_[0, 1, rng.integers(0, 2, rng.integers(1, 60))])
        s = rng.normal(size=len(y)) + y * rng.normal()
        s = s.round(case % 3) if case % 2 else s                                # half of them with many ties
        rate, threshold = eer.eer(y, s)
        close(rate, crossing_by_hand(y.tolist(), s.tolist()), 1e-12)
        assert s.min() <= threshold <= s.max()
    y = np.repeat([0, 1], 50)
    assert eer.eer(y, y)[0] == 0 and eer.eer(y, -y)[0] == 1 and eer.eer(y, 0 * y)[0] == 0.5


def test_eer_report():
    rng = np.random.default_rng(1)
    y, s = rng.integers(0, 2, 300), rng.normal(size=300).round(1)
    s += y
    r, (far, tar, cut) = eer.report(y, s), eer.roc(y, s)
    g, i = s[y == 1], s[y == 0]
    close(r["auc"], np.mean((g[:, None] > i) + 0.5 * (g[:, None] == i)))
    close(r["acc"], max(np.mean((s >= c) == y) for c in cut))
    close([r["far"], r["frr"]], [np.mean(i >= r["threshold"]), np.mean(g < r["threshold"])])
    close(r["tar@far=1e-1"], tar[far <= 0.1][-1] + (tar[far > 0.1][0] - tar[far <= 0.1][-1])
          * (0.1 - far[far <= 0.1][-1]) / (far[far > 0.1][0] - far[far <= 0.1][-1]))
    assert math.isnan(r["tar@far=1e-3"]) and " - " in eer.show(r)              # 150 impostors cannot tell
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
        cuts = np.unique(s)
        for far in (0.001, 0.1, 0.29):
            t = eer.at_far(y, s, far)
            assert np.mean(s[y == 0] >= t) <= far < np.mean(s[y == 0] >= np.nextafter(t, -9)), (case, far)
        between = (cuts[1:] + cuts[:-1]) / 2
        accuracy, gap = np.array([np.mean((s >= t) == y) for t in between]), np.diff(cuts)
        t = eer.best_threshold(y, s)
        best = accuracy > accuracy.max() - 1e-9
        close(np.mean((s >= t) == y), accuracy.max())
        close(gap[np.abs(between - t).argmin()], gap[best].max(), 1e-9)         # of equals, the widest gap
        folds = np.arange(44) % 4
        each = [np.mean((s[folds == f] >= eer.best_threshold(y[folds != f], s[folds != f])) == y[folds == f])
                for f in range(4)]
        close(eer.folds_accuracy(y, s, folds), [np.mean(each), np.std(each, ddof=1) / 2])
    y, s = np.tile([1, 0], 40), np.tile([0.9, 0.1], 40)
    assert eer.folds_accuracy(y, s, np.arange(80) // 8) == (1, 0) and eer.best_threshold(y, s) == 0.5


def test_eer_compares_score_files(tmp):
    (tmp / "a.csv").write_text("1,0.9\n0,0.1\n1,0.8\n0,0.2\n")
    (tmp / "b.csv").write_text("1,0.9\n0,0.1\n1,0.2\n0,0.8\n")
    done = subprocess.run([sys.executable, HERE / "eer.py", "a.csv", "b.csv"], cwd=tmp, capture_output=True, text=True)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert rows[0][:2] == ["scores", "EER"] and [r[1] for r in rows[2:]] == ["0.00 %", "50.00 %"], done
    assert rows[2][-1] == "-"                               # two impostors cannot tell FAR 1e-2


def test_eer_refuses():
    raises("label 2", eer.eer, [0, 2], [0.0, 1.0])
    raises("both kinds", eer.eer, [1, 1], [0.0, 1.0])
    raises("pair 1 has score nan", eer.eer, [0, 1], [0.0, math.nan])
    raises("3 labels but 2 scores", eer.eer, [0, 1, 1], [0.0, 1.0])


def test_eer_reads_csv(tmp):
    (tmp / "a.csv").write_bytes(b"\xef\xbb\xbfscore,label\r\n0.5,1\r\n\r\n-1,0\r\n")
    (tmp / "b.csv").write_text("1,0.5\n0,-1\n")
    for name in ("a.csv", "b.csv"):
        labels, scores = eer.read(tmp / name)
        assert labels.tolist() == [1, 0] and scores.tolist() == [0.5, -1]
    for content, where in ((b"1,0.5\n0,zero\n", "c.csv:2"), (b"1,0.5\n\x80\x02,\"\n", "c.csv:2"),
                           (b"\n", "c.csv: no scores")):
        (tmp / "c.csv").write_bytes(content)
        raises(where, eer.read, tmp / "c.csv")


# ---- data.py -------------------------------------------------------------------------------------------------

def picture(path, value=0, size=(40, 40), **keywords):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(value).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(a).save(path, **keywords)
    return path


def homework(root, train_rows=("a b.jpg 3", "é.jpg 3", "c.jpg 7", "d.jpg 9"), pairs="a.jpg b.jpg 1\nb.jpg c.jpg 0\n"):
    """The smallest set in the homework's layout; labels with gaps, names with spaces and accents."""
    for i, row in enumerate(train_rows):
        picture(root / "cls_data/train/images" / row.rpartition(" ")[0], i)
    (root / "cls_data/train/labels.txt").write_text("\n".join(train_rows))
    for i, name in enumerate("abc"):
        picture(root / f"ver_data/{name}.jpg", i)
    (root / "val_pairs.txt").write_text(pairs)
    return root


def test_data_layouts(tmp):
    homework(tmp / "above/HW")
    (tmp / "above/HW/cls_data/train/labels.txt").write_bytes(
        "\ufeffa b.jpg 3\r\n\r\n\u00e9.jpg 3\r\nc.jpg 7 \r\nd.jpg 9\r\n".encode())
    picture(tmp / "above/HW/cls_data/dev/images/x.png")
    (tmp / "above/HW/cls_data/dev/labels.txt").write_text("x.png 7\n")
    picture(tmp / "above/HW/cls_data/test/images/y.png")                        # test without labels (Fall 2026)
    (tmp / "above/HW/test_pairs.csv").write_text("image1,image2\nc.jpg,a.jpg\n")
    d = data.load(tmp / "above")
    assert d.root.name == "HW" and d.names == ["3", "7", "9"] and d.train[1].tolist() == [0, 0, 1, 2]
    assert d.dev[1].tolist() == [1] and d.test[1] is None and len(d.test[0]) == 1 and not d.note
    assert d.val_pairs.labels.tolist() == [1, 0] and len(d.val_pairs.files) == 3
    assert d.test_pairs.labels is None and [Path(d.test_pairs.files[i]).name for i in
                                            (d.test_pairs.left[0], d.test_pairs.right[0])] == ["c.jpg", "a.jpg"]
    for i, person in enumerate(["Ann", "Bo", "Cy", "Di", "Ed"]):                # Fall 2024, and a plain folder
        for k in range(1 if person == "Ed" else 3):
            for top in ("F24/cls_data/train", "plain/nested"):
                picture(tmp / top / person / f"{k}.png", 10 * i + k)
    d = data.load(tmp / "plain", holdout=0.4, seed=1)
    assert "held out" in d.note and len(d.names) == 3 and "Ed" in d.names
    people = [{Path(f).parent.name for f in (d.val_pairs.files[a], d.val_pairs.files[b])}
              for a, b in zip(d.val_pairs.left, d.val_pairs.right)]
    assert all((len(p) == 1) == bool(y) and not p & set(d.names) for p, y in zip(people, d.val_pairs.labels))
    assert len(data.load(tmp / "plain", holdout=0).train[0]) == 13
    assert len(data.load(tmp / "F24", holdout=0).names) == 5


def test_data_refuses(tmp):
    """Every complaint names the place and comes before anything is written."""
    def labels(text):
        (tmp / "HW/cls_data/train/labels.txt").write_text(text)
        return lambda: data.load(tmp / "HW")

    def pairs(text):
        (tmp / "HW/val_pairs.txt").write_text(text)
        return lambda: data.load(tmp / "HW")

    homework(tmp / "HW")
    good = (tmp / "HW/cls_data/train/labels.txt").read_text()
    for text, fragment in (("gone.jpg 1\n", "labels.txt:1: no image 'gone.jpg'"), ("c.jpg 1 2\n", "3 columns"),
                           ("c.jpg -1\n", "labels.txt:1"), ("c.jpg 1.5\n", "labels.txt:1"), ("c.jpg\n", "labels.txt:1"),
                           ("c.jpg 1\nd.jpg 2\nc.jpg 3\n", "labels.txt:3: 'c.jpg' stands on line 1"),
                           ("../x.jpg 1\n", "leaves"), ("/x.jpg 1\n", "leaves"), ("c.jpg,1\n", "labels.txt:1"),
                           ("c.jpg 1\nd.jpg 1\n", "one person"), ("\n", "no labelled")):
        raises(fragment, labels(text))
    labels(good)
    for text, fragment in (("a.jpg gone.jpg 1\n", "val_pairs.txt:1: no image 'gone.jpg'"), ("", "no pairs"),
                           ("a.jpg b.jpg 2\n", "label '2'"), ("a.jpg ../val_pairs.txt 1\n", "leaves"),
                           ("a.jpg /a.jpg 1\n", "leaves"), ("a.jpg b.jpg\n", "val_pairs.txt:1: no label"),
                           ("a.jpg b.jpg 1\nb.jpg c.jpg\n", "val_pairs.txt:2: 2 columns"),
                           ("a.jpg b.jpg 1\na.jpg c.jpg 1\n", "every pair has label 1")):
        raises(fragment, pairs(text))
    raises("no such folder", data.load, tmp / "nothing")
    raises("no such folder", data.load, tmp / "HW/val_pairs.txt")
    (tmp / "empty").mkdir()
    raises("no labelled training images", data.load, tmp / "empty")
    for name in ("one", "two"):
        homework(tmp / f"both/{name}")
    raises("several data sets", data.load, tmp / "both")
    picture(tmp / "few/Ann/1.png"), picture(tmp / "few/Bo/1.png")
    raises("too few to hold", data.load, tmp / "few")


def test_data_reads_lfw_lists(tmp):
    people = {"Ann_A": (".jpg", ".png", ".jpeg"), "Bo": (".jpg", ".jpg"), "C_D": (".webp",)}
    for name, ends in people.items():
        for i, end in enumerate(ends, 1):
            picture(tmp / f"lfw/{name}/{name}_{i:04d}{end}", i)
    (tmp / "dev.txt").write_text("2\nAnn_A\t1\t3\nBo\t1\t2\nAnn_A\t2\tC_D\t1\nBo\t2\tAnn_A\t1\n")
    p = data.read_pairs(tmp / "dev.txt", tmp / "lfw")
    names = [[os.path.relpath(p.files[i], tmp / "lfw") for i in side] for side in (p.left, p.right)]
    assert names == [["Ann_A/Ann_A_0001.jpg", "Bo/Bo_0001.jpg", "Ann_A/Ann_A_0002.png", "Bo/Bo_0002.jpg"],
                     ["Ann_A/Ann_A_0003.jpeg", "Bo/Bo_0002.jpg", "C_D/C_D_0001.webp", "Ann_A/Ann_A_0001.jpg"]]
    assert p.labels.tolist() == [1, 1, 0, 0] and p.folds is None and len(p.files) == 6
    fold = "Ann_A\t1\t2\nBo\t1\tAnn_A\t3\n"
    (tmp / "pairs.txt").write_text("3\t1\n" + fold * 3)
    p = data.read_pairs(tmp / "pairs.txt", tmp / "lfw")
    assert p.labels.tolist() == [1, 0] * 3 and p.folds.tolist() == [0, 0, 1, 1, 2, 2]
    for text, fragment in (("3\t1\n" + fold, "2 pairs, but the first line announces 3 x 2 x 1"),
                           ("1\nAnn_A\t1\t2\nBo\t1\tx\n", "t.txt:3: 'Bo"),
                           ("1\nAnn_A\t1\t9\nBo\t1\tC_D\t1\n", "t.txt:2: no image"),
                           ("1\n..\t1\t2\nBo\t1\tC_D\t1\n", "leaves")):
        (tmp / "t.txt").write_text(text)
        raises(fragment, data.read_pairs, tmp / "t.txt", tmp / "lfw")


def test_data_describes_a_set(tmp):
    for person, n in (("Ann", 3), ("Bo", 1), ("Cy", 2)):
        for i in range(n):
            picture(tmp / f"set/{person}/{i}.png", 10 * n + i, (32, 32))
    shutil.copy(tmp / "set/Ann/0.png", tmp / "set/Cy/9.png")
    x = np.stack([data.decode(f, 32) for f in data.read_people(tmp / "set")[0]]).reshape(-1, 3) / 255
    code, out, _ = run(data, "--data", "set", "--holdout", 0, "--sheet", "sheet.png", cwd=tmp)
    assert code == 0 and "7 images, 0 unreadable" in out and "3 people with 1 to 3 images, median 3" in out, out
    assert "mean " + " ".join(f"{v:.4f}" for v in x.mean(0)) + ", standard deviation " + " ".join(
        f"{v:.4f}" for v in x.std(0)) in out, out
    assert "duplicates: 1 images" in out and "Cy/9.png = Ann/0.png" in out, out
    sheet = np.asarray(Image.open(tmp / "sheet.png"))
    for i in range(7):                                      # every face is on it, twice as large
        face = Image.fromarray(data.decode(data.read_people(tmp / "set")[0][i], 32)).resize((64, 64), Image.LANCZOS)
        assert (np.lib.stride_tricks.sliding_window_view(sheet[:, :900, 0], (1, 64))[::1, ::4].reshape(-1, 64)
                == np.asarray(face)[5, :, 0]).all(1).any(), i


def test_data_plot_puts_things_where_they_belong():
    def centres(axes, *points):
        """Where the points' colours are in the picture: (n, 2), columns and rows."""
        series = {f"_{i}": ([x], [y], "points") for i, (x, y) in enumerate(points)}
        a = np.asarray(data.plot(None, [("", "", "", series, axes)])).astype(int)
        each = [[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in data.COLOURS_OF_LINES[:len(points)]]
        return np.array([np.argwhere(np.abs(a - c).max(2) < 30).mean(0)[::-1] for c in each])
    for axes, a, b, c in (("", (0, 8), (5, 9), (10, 10)), ("logx", (0.01, 8), (1, 9), (100, 10)),
                          ("logx logy", (0.01, 1), (1, 10), (100, 100))):
        close(centres(axes, a, b, c), [(52, 258), (229, 146), (406, 34)], 0.04, axes)
    one, two, three = centres("equal", (0, 0), (3, 0), (0, 3))                  # right angle, equal sides
    close(two[0] - one[0], one[1] - three[1], 0.03)
    assert abs(one[1] - two[1]) < 2 and abs(one[0] - three[0]) < 2
    for bad in (0, -1, math.nan, math.inf):                 # what has no place on the axes is left out
        xs, ys = [0.01, bad, 100], [8, 9, 10]
        assert (np.asarray(data.plot(None, [("", "", "", {"": (xs, ys)}, "logx")])) == np.asarray(
            data.plot(None, [("", "", "", {"": (xs[::2], ys[::2])}, "logx")]))).all(), bad
    close(data.ticks(-3, 2, log=True), np.arange(-3, 3))
    close(10 ** data.ticks(0, 1, log=True), [1, 2, 5, 10])
    a = np.asarray(data.plot(None, [("", "", "", {"": ([0, 1, 2], [0, 1], "bars")})]))
    blue = (a[..., 2].astype(int) - a[..., 0] > 40)         # only the right half is filled, to the top
    assert blue[40:250, 240:400].all() and not blue[40:250, 60:220].any()


def test_data_shows_images_as_a_viewer_does(tmp):
    a = np.zeros((40, 40, 3), np.uint8)
    a[:20] = 200, 100, 50                                                       # upper half coloured
    upright = Image.fromarray(a)
    exif = Image.Exif()
    exif[0x0112] = 6                                                            # stored turned, shown upright
    upright.rotate(90).save(tmp / "exif.png", exif=exif)
    upright.quantize(4).save(tmp / "palette.png")
    upright.save(tmp / "plain.webp", lossless=True)
    for name in ("exif.png", "palette.png", "plain.webp"):
        assert np.abs(data.decode(tmp / name, 40).astype(int) - a).max() <= 2, name
    Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)).save(tmp / "deep.png")
    close(data.decode(tmp / "deep.png", 40)[..., 1], np.round(np.arange(1600).reshape(40, 40) * 40 / 257), 1e-9)
    Image.fromarray(a[..., 0]).save(tmp / "grey.png")
    assert (data.decode(tmp / "grey.png", 40) == a[..., :1]).all()
    Image.fromarray(np.dstack([a, np.full((40, 40), 0, np.uint8)])).save(tmp / "clear.png")
    assert (data.decode(tmp / "clear.png", 40) == 255).all()                    # transparent: white paper
    wide = Image.new("RGB", (80, 40), "red")
    wide.paste(upright, (20, 0))
    wide.save(tmp / "wide.png")
    assert (data.decode(tmp / "wide.png", 40) == a).all()                       # the central square, not squeezed
    half = (tmp / "wide.png").read_bytes()[:90]
    for name, content, why in (("bomb.jpg", b"P6 60000 60000 255 " * 9, "exceeds limit"), ("cut.png", half, ""),
                               ("text.png", b"no image", "identify"), ("empty.jpg", b"", "identify")):
        (tmp / name).write_bytes(content)
        for fragment in (f"{name}: not a readable image", why):
            raises(fragment, data.decode, tmp / name, 40)
    assert data.decode(picture(tmp / "sliver.png", 3, (1, 99)), 40).shape == (40, 40, 3)        # odd, but an image


def test_data_pack(tmp):
    files = [str(picture(tmp / f"{i}.png", i, (30 + i % 3, 32))) for i in range(101)]
    cache = tmp / "cache"
    cache.mkdir()
    images, good = data.pack(files, 32, cache)
    assert isinstance(images.rows, np.memmap) and len(good) == 101
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
    with mock.patch.object(data, "decode", side_effect=KeyboardInterrupt):      # a killed build leaves nothing
        Path(files[9]).touch()
        (cache / "train-64-0.1.tmp").touch()                                    # nor does one killed before
        with contextlib.suppress(KeyboardInterrupt):
            data.pack(files, 32, cache)
    assert len(list(cache.glob("*.npy"))) == 1 and not list(cache.glob("*.tmp"))
    Path(files[10]).write_bytes(b"")
    raises("2 of 101", data.pack, files, 32, cache)


def test_data_augment():
    x = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    none = dict.fromkeys(data.AUGMENT, 0)
    close(data.augment(x, none), data.normalise(x), 1e-6)
    close(data.augment(x, none | {"mirror": 1}), data.normalise(x).flip(3), 1e-4)
    full = dict(mirror=.5, rotate=10, shift=.05, zoom=.1, brightness=.2, contrast=.2, saturation=.2, erase=.2)
    assert full.keys() == data.AUGMENT.keys()
    torch.manual_seed(3)
    a = data.augment(x, full)
    torch.manual_seed(3)
    assert torch.equal(a, data.augment(x, full)) and not torch.equal(a, data.augment(x, full))
    assert a.abs().max() <= 1
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).view(1, 32, 1, 1).expand(200, 32, 32, 3)  # bright below
    up, down = (data.augment(ramp, full | {"erase": 0}) @ torch.full((32,), 1 / 32)).mean(1)[:, [4, 27]].T
    assert (down > up).all()                                                    # never upside down
    from torchvision.transforms import functional as T
    for name, step in (("brightness", T.adjust_brightness), ("contrast", T.adjust_contrast),
                       ("saturation", T.adjust_saturation)):
        with mock.patch.object(torch, "rand", lambda *s, **k: torch.full(s, 0.9)):      # dice: 0.8 in -1..1
            ours = data.augment(x, none | {name: 0.5})
        theirs = step(x.permute(0, 3, 1, 2).float() / 255, 1 + 0.8 * 0.5) * 2 - 1
        close(ours, theirs, 3e-3, name)
    with mock.patch.object(torch, "rand", lambda *s, **k: torch.full(s, 0.9)):
        ours = data.augment(x, none | dict(rotate=20, shift=0.1, zoom=0.2))
    turn, scale = math.radians(0.8 * 20), 1.2 ** 0.8
    theta = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) * scale
    theta = torch.cat([theta, torch.full((2, 1), 2 * 0.8 * 0.1)], 1).expand(64, 2, 3)
    theirs = F.grid_sample(data.normalise(x), F.affine_grid(theta, (64, 3, 32, 32), align_corners=False), "nearest",
                           "border", align_corners=False)
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
    for batch in train.order(labels, rows, 16, 0, 0, per_person=4):
        assert all(len(set(labels[batch[i:i + 4]])) == 1 for i in range(0, 16, 4))
    seen = np.concatenate([train.order(labels, rows, 16, 0, e, 4).ravel() for e in range(30)])
    assert set(seen) == set(rows)                                               # nobody is left out for good


def test_data_homework_classes(tmp):
    homework(tmp)
    t = torchvision.transforms.Compose([torchvision.transforms.Resize((32, 32)), torchvision.transforms.ToTensor()])
    loader = torch.utils.data.DataLoader(data.ImageDataset(tmp / "cls_data/train", t), batch_size=4)
    x, y = next(iter(loader))
    assert x.shape == (4, 3, 32, 32) and y.tolist() == [3, 3, 7, 9]
    pairs = data.ImagePairDataset(tmp / "ver_data", tmp / "val_pairs.txt", t)
    a, b, match = next(iter(torch.utils.data.DataLoader(pairs, batch_size=2)))
    assert a.shape == b.shape == (2, 3, 32, 32) and match.tolist() == [1, 0]


def test_data_synthetic_faces_are_a_real_task(tmp):
    data.synthesise(tmp / "a", people=8, images=2, size=32)
    data.synthesise(tmp / "b", people=8, images=2, size=32)
    before = (tmp / "b/answers.txt").stat()
    data.synthesise(tmp / "b", people=8, images=1, size=32)                     # another was first: its set stays
    assert (tmp / "b/answers.txt").stat() == before and len(list(tmp.iterdir())) == 2
    files = sorted(p.relative_to(tmp / "a") for p in (tmp / "a").rglob("*") if p.is_file())
    assert len(files) > 16 and all((tmp / "a" / f).read_bytes() == (tmp / "b" / f).read_bytes() for f in files)
    pairs = data.load(faces()).val_pairs
    x = torch.from_numpy(np.stack([data.decode(f, 32) for f in pairs.files])).float().flatten(1)
    for z in (x, x - x.mean(1, keepdim=True)):
        assert eer.eer(pairs.labels, verify.score(F.normalize(z), pairs))[0] > 0.25


# ---- train.py and verify.py ----------------------------------------------------------------------------------

def test_train_writes_what_it_promises(tmp):
    code, out, _ = tiny(tmp)
    folder = tmp / "runs/arcface_swiftface"
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [r["epoch"] for r in rows] == ["1", "2"] and list(rows[0]) == list(train.COLUMNS)
    assert all(math.isfinite(float(v)) for r in rows for v in r.values())
    assert (tmp / "best.pt").resolve() == (folder / "best.pt").resolve() and "first loss" in out
    assert not verify.load(folder / "last.pt")["sums"].any()                    # each epoch's loss is its own
    best = verify.load(tmp / "best.pt")
    assert best["best"] == min(float(r["eer"]) for r in rows)
    code, out, _ = run(verify, cwd=tmp)                                         # --ckpt best.pt is the default
    assert code == 0 and f"EER {100 * best['best']:.2f} %" in out
    lines = (tmp / "submission.csv").read_text().splitlines()
    assert lines[0] == "ID,Label" and len(lines) == 1 + len((faces() / "test_pairs.txt").read_text().splitlines())
    assert [line.split(",")[0] for line in lines[1:]] == [str(i) for i in range(len(lines) - 1)]
    (tmp / "turned.txt").write_text("\n".join((faces() / "test_pairs.txt").read_text().splitlines()[::-1]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                    # another order, other workers
    run(verify, "--pairs", "turned.txt", "--images", faces() / "ver_data", "--out", "turned.csv", cwd=tmp)
    torch.set_num_threads(threads)
    turned = (tmp / "turned.csv").read_text().splitlines()[:0:-1]
    close(*([float(line.split(",")[1]) for line in some] for some in (lines[1:], turned)), 1e-5)
    tiny(tmp, epochs=1)                                                         # a second run takes its own folder
    assert (tmp / "runs/arcface_swiftface_2/best.pt").exists()
    assert list(csv.DictReader((folder / "log.csv").open())) == rows
    tiny(tmp, "--out", folder, code=2)


RUNS = {"sgd, margin": ("--opt", "sgd"), "adamw, buffers, ema": ("--lr", "1e-3", "--loss", "curricular", "--ema", ".9"),
        "balanced, sum": ("--loss", "ce+0.1*triplet+0.003*center", "--per-person", "2", "--ema", ".5"),
        "drawn margins, dropout": ("--loss", "elastic", "--arch", "mobilefacenet")}


def same(a, b, path=""):
    """Two checkpoints are bit for bit alike, but for the clock."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            if k not in ("seconds", "img_per_s", "out", "steps", "resume"):
                same(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (u, v) in enumerate(zip(a, b)):
            same(u, v, f"{path}/{i}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b or a != a, f"{path}: {a} != {b}"


def test_train_resumed_equals_uninterrupted(tmp):
    for i, (name, flags) in enumerate(RUNS.items()):
        whole, parts = tmp / f"whole{i}", tmp / f"parts{i}"
        tiny(tmp, *flags, "--out", whole)
        tiny(tmp, *flags, "--out", parts, "--steps", (1, 2, 3, 5)[i])           # of 6; 3 is an epoch's end
        assert run(train, "--resume", "--out", parts, "--steps", 99, cwd=tmp)[0] == 0
        for file in ("last.pt", "best.pt"):
            same(verify.load(whole / file), verify.load(parts / file), f"{name}: {file}")
    code, _, err = run(train, "--resume", "--out", parts, "--lr", ".5", "--seed", 3, cwd=tmp)
    assert code == 2 and "--lr" in err and "--seed" in err and "--loss" not in err


def test_train_stops_on_a_signal(tmp):
    """SIGINT and SIGTERM finish the step, save and say how to go on; the result is that of the whole run."""
    tiny(tmp, "--out", "whole")
    for number in (signal.SIGINT, signal.SIGTERM):
        real, calls = data.augment, itertools.count()

        def once(*args):
            if next(calls) == 2:
                os.kill(os.getpid(), number)
            return real(*args)

        out = f"stopped{number}"
        with mock.patch.object(data, "augment", once):
            _, text, _ = tiny(tmp, "--out", out, code=130)
        assert f"--resume --out {out}" in text and verify.load(tmp / out / "last.pt")["step"] == 3
        assert run(train, "--resume", "--out", out, cwd=tmp)[0] == 0
        same(verify.load(tmp / "whole/last.pt"), verify.load(tmp / out / "last.pt"))


def test_train_does_not_wait_for_the_device(tmp):
    """No .item(), float(), int() or bool() of a tensor per step: on a GPU each would wait for it."""
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
    assert counts[0] == counts[1], counts


def test_train_names_a_loss_that_is_not_finite(tmp):
    real, calls = losses.Loss.forward, itertools.count()
    with mock.patch.object(losses.Loss, "forward", lambda *a: real(*a) * (math.nan if next(calls) == 4 else 1)):
        _, _, err = tiny(tmp, "--out", "bad", code=2)
    assert "not finite at step 5" in err
    assert all(torch.isfinite(v).all() for v in verify.load(tmp / "bad/last.pt")["model"].values())
    with mock.patch.object(losses.Loss, "forward", lambda *a: real(*a) + (0 * a[1].square().sum()).sqrt()):
        _, _, err = tiny(tmp, "--out", "slope", "--steps", 1, code=2)           # a finite loss, an infinite gradient
    assert "not finite at step 1" in err and verify.load(tmp / "slope/last.pt")["step"] == 0


def test_train_loses_nothing_it_saved(tmp):
    """A full disk, a killed write and a second process leave last.pt, best.pt and log.csv whole."""
    (tmp / "a").mkdir()
    (tmp / "a/log.csv").touch()                             # of a run that was killed before its first save
    tiny(tmp, "--out", "a", epochs=1)
    whole = {f.name: f.read_bytes() for f in (tmp / "a").iterdir()}
    with mock.patch.object(os, "fsync", full):
        for name in ("train", "verify"):
            code, _, err = (run(train, "--resume", "--out", "a", "--epochs", 2, cwd=tmp) if name == "train" else
                            run(verify, "--ckpt", "a/best.pt", "--out", "a/log.csv", cwd=tmp))
            assert code == 2 and ": No space left on device; make room" in err and err.count("\n") == 1, err
    with data.lock(tmp / "a"):
        for resume in ((), ("--resume",)):
            assert "another run is at work" in tiny(tmp, *resume, "--out", "a", code=2)[2]
    assert whole == {f.name: f.read_bytes() for f in (tmp / "a").iterdir()}
    (tmp / "a/last.pt.1.tmp").touch()
    assert run(train, "--resume", "--out", "a", "--epochs", 2, cwd=tmp)[0] == 0 and not list(tmp.glob("a/*.tmp"))
    assert len((tmp / "a/log.csv").read_text().splitlines()) == 3


def test_train_twice_at_once(tmp):
    """Two processes, one new data set: one pack, two folders, the same result."""
    shutil.copytree(faces(), tmp / "set", ignore=shutil.ignore_patterns(".packs"))
    flags = ("--data", "set", "--arch", "swiftface", "--dim", 16, "--epochs", 1, "--batch-size", 16, "--amp", "off")
    both = [subprocess.Popen([sys.executable, HERE / "train.py", *map(str, flags)], cwd=tmp, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(p.communicate()[1], p.returncode) for p in both] == [("", 0)] * 2
    same(*(verify.load(tmp / f"runs/arcface_swiftface{end}/last.pt") for end in ("", "_2")))
    assert len(list(tmp.glob("set/.packs/*.npy"))) == 3 and not list(tmp.rglob("*.tmp"))


def test_train_fine_tunes(tmp):
    tiny(tmp, "--loss", "ce", "--out", "first", epochs=1)
    other = verify.load(tmp / "first/best.pt")              # of other people and another loss: only the backbone counts
    torch.save(other | {"names": ["Ann", "Bo"], "loss": {}}, tmp / "first/best.pt")
    _, out, _ = tiny(tmp, "--init", "first/best.pt", "--freeze", "--loss", "tpe:k=8", "--out", "second", epochs=1)
    first, second = (verify.load(tmp / f / "best.pt") for f in ("first", "second"))
    same(first["model"], second["model"])                                       # frozen, batch statistics included
    assert second["loss"]["terms.0.projection"].shape == (8, 16)
    assert not torch.equal(second["loss"]["terms.0.projection"], torch.eye(8, 16))
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    net, criterion = verify.build(second)
    assert verify.embed(net, images, criterion.project).shape == (3, 8)
    _, out, _ = tiny(tmp, "--init", "first/best.pt", "--dim", 8, "--freeze", "--out", "third", epochs=1)
    assert "new: neck" in out
    assert "swiftface, not a resnet34" in tiny(tmp, "--init", "first/best.pt", "--arch", "resnet34", code=2)[2]
    assert "--init" in tiny(tmp, "--freeze", code=2)[2]


def test_train_spares_scalars_from_decay_and_follows_the_schedule(tmp):
    seen = []
    real = torch.optim.SGD.__init__
    with mock.patch.object(torch.optim.SGD, "__init__", lambda self, groups, *a, **k: (
            seen.extend(groups), real(self, groups, *a, **k))[1]):
        tiny(tmp, "--loss", "normface", "--opt", "sgd", epochs=1)
    assert sum(p.numel() for g in seen for p in g["params"]) > 3e5 and len(seen[0]["params"]) > 10      # all of them
    assert all(p.ndim > 1 for p in seen[0]["params"]) and seen[0]["weight_decay"] > 0
    assert all(p.ndim <= 1 for p in seen[1]["params"]) and seen[1]["weight_decay"] == 0
    assert any(p.ndim == 0 for p in seen[1]["params"])                          # the learned scale
    shares = [train.rate(i, 100, 0.1) for i in range(100)]
    assert shares[0] == 0.1 and max(shares) == shares[9] == 1 and shares[10:] == sorted(shares[10:], reverse=True)
    close(shares[55], 0.5)


def test_train_refuses(tmp):
    (tmp / "file").touch()
    for flags, fragment in ((("--lr", -1), "--lr"), (("--lr", "nan"), "--lr"), (("--lr", "inf"), "--lr"),
                            (("--lr",), "--lr"), (("--size", 7), "--size"), (("--colour", 1), "--colour"),
                            (("--epochs", 0), "--epochs"), (("--epochs", 1.5), "--epochs"), (("--steps", 0), "--steps"),
                            (("--holdout", 2), "--holdout"), (("--ema", 2), "--ema"), (("--seed", -1), "--seed"),
                            (("--dim", 0), "--dim"), (("--dim", 10 ** 12), "--dim"), (("--batch-size", 1), "--batch"),
                            (("more",), "more"), (("--opt", "rms"), "'adamw'"),
                            (("--device", "cuda:99"), "cuda:99"), (("--device", "meta"), "meta"),
                            (("--loss", "arcfac"), "'arcface'"), (("--arch", "resnet35"), "resnet3"),
                            (("--loss", "arcface:n=1"), "unknown argument 'n'"), (("--loss", "arcface:s=-1"), "s=-1"),
                            (("--data", "nowhere"), "no such folder"), (("--resume", "--out", "x"), "last.pt"),
                            (("--init", "x.pt"), "x.pt: no such"), (("--out", "file"), "file: "),
                            (("--out", "file/x"), "file/x: ")):
        _, _, err = tiny(tmp, *flags, code=2)
        assert fragment in err and err.startswith("error: ") and err.count("\n") == 1, (flags, err)
    assert not (tmp / "runs").exists() and not (tmp / "best.pt").exists()


def test_verify_refuses_strange_checkpoints(tmp):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp / "executed"),)
    (tmp / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": Evil()}, tmp / "evil2.pt")
    torch.save({"state_dict": {}}, tmp / "other.pt")
    torch.save({"face_checkpoint": 99}, tmp / "newer.pt")
    torch.save({"face_checkpoint": 1, "x": torch.zeros(9999)}, tmp / "bare.pt")
    (tmp / "cut.pt").write_bytes((tmp / "bare.pt").read_bytes()[:9000])
    (tmp / "none.pt").touch()
    (tmp / "run").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)        # a warning would be a line of its own
        for name in ("evil", "evil2", "other", "newer", "cut", "bare", "none", "missing"):
            if name != "missing":
                shutil.copy(tmp / f"{name}.pt", tmp / "run/last.pt")
            for script, *argv in ((verify, "--ckpt", f"{name}.pt"), (train, "--resume", "--out", "run"), (
                    train, "--data", faces(), "--arch", "mobilefacenet", "--size", 32, "--init", f"{name}.pt")):
                code, _, err = run(script, *argv, cwd=tmp)
                assert code == 2 and argv[-1] in err and err.startswith("error: ") and err.count("\n") == 1, (argv, err)
    assert not (tmp / "executed").exists() and not (tmp / "runs").exists()


def test_verify_scores_are_the_same_in_any_batch_and_order(tmp):
    torch.manual_seed(0)
    net = models.make("swiftface", 16, 32).eval()
    images = np.random.default_rng(0).integers(0, 255, (21, 32, 32, 3), np.uint8)
    z = verify.embed(net, images)
    close(z.norm(dim=1), np.ones(21), 1e-6)
    close(z, verify.embed(net, images, batch_size=4), 1e-5)
    close(z[[7, 2]], verify.embed(net, images, rows=np.array([7, 2])), 1e-5)
    with torch.no_grad():
        x = data.normalise(torch.from_numpy(images))
        close(z, F.normalize(net(x) + net(x.flip(3))), 1e-5)
        close(verify.embed(net, images, mirror="none"), F.normalize(net(x)), 1e-5)
    with torch.no_grad():
        net.trunk[0].weight[0, 0, 0, 0] = math.nan
    raises("not finite", verify.embed, net, images)


def test_verify_closed_set_and_submission(tmp):
    labels = np.array([0, 0, 1, 2])
    images = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
    net = models.make("swiftface", 16, 32).eval()
    for spec in ("cosface", "triplet"):
        criterion = losses.make(spec, 16, 3)
        if criterion.weight is not None:
            with torch.no_grad():
                criterion.weight.copy_(verify.centroids(verify.embed(net, images), labels, 3))
        known = images, labels, np.arange(4)
        assert verify.closed_set(net, criterion, known, known, 3) == (1.0, 1.0), spec
    (tmp / "sample_submission.csv").write_text("id,match\n0,0\n1,0\n")
    verify.write_submission(tmp / "s.csv", np.array([0.1, -1 / 3]), tmp)
    assert (tmp / "s.csv").read_text() == f"id,match\n0,0.1\n1,{-1 / 3!r}\n"
    raises("2 rows, but there are 3", verify.write_submission, tmp / "s.csv", np.zeros(3), tmp)
    raises("not finite", verify.write_submission, tmp / "t.csv", np.array([0, math.nan]), tmp)
    assert not (tmp / "t.csv").exists()


# ---- Several processes --------------------------------------------------------------------------------------

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(n, task, folder):
    """The results of task(rank) in n processes, forked from this one, that torch.distributed will find."""
    if not hasattr(os, "fork"):
        raise Skip("no fork() on this system")
    pids, folder, port = [], Path(tempfile.mkdtemp(dir=folder)), free_port()
    for rank in range(n):
        if not (pid := os.fork()):
            code = 1
            try:
                torch.set_num_threads(1)
                os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                                   MASTER_PORT=str(port))
                torch.save(task(rank), folder / str(rank))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(codes), codes
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
            if len(seen) == stop and rank == n - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return value
        with mock.patch.object(losses.Loss, "forward", forward), mock.patch.multiple(data, plot=lambda *a: 0), \
                mock.patch.object(models, "make", net):
            tiny(cwd, "--batch-size", 15, "--per-person", 3, *flags, code=130 * (stop > 0))
        return seen

    faces()
    every = processes(n, task, cwd)
    assert all(seen == every[0] for seen in every)
    return every[0]


def test_distributed_training_equals_one_process(tmp):
    """Twenty steps in 1, 2 and 4 processes, of unequal parts of the batch and of the classes, and handed over from four
    to one to two of them. Mining takes all triplets: which are semi-hard may turn on a rounding error."""
    flags = ("--loss", "curricular:sample=0.8+0.1*triplet:mining=all+0.003*center", "--ema", ".9", "--epochs", 5, "--opt", "sgd",
             "--lr", 5e-3, "--out")
    runs = {n: steps(tmp, n, *flags, n, *["--shard"] * (n > 1)) for n in (1, 2, 4)}
    runs["chain"] = (steps(tmp, 4, *flags, "chain", "--shard", stop=7)
                     + steps(tmp, 1, *flags, "chain", "--resume", "--steps", 13)
                     + steps(tmp, 2, *flags, "chain", "--resume", "--steps", 20, "--shard"))
    assert len(runs[1]) == 20
    for out, seen in runs.items():
        close(seen, runs[1], 1e-5, out)
        one, many = (verify.load(tmp / f"{k}/last.pt") for k in (1, out))
        for kind in ("model", "loss", "ema"):
            for (name, a), b in zip(one[kind].items(), many[kind].values()):
                close(a, b, 1e-3, (out, name))
        for row, other in zip(one["log"], many["log"]):
            close(*([r[k] for k in ("loss", "eer", "auc", "acc")] for r in (row, other)), 1e-5, out)


DIVIDED = ("ce", "ce:smooth=0.1", "modified", "l2softmax:learn=true", "normface", "coco", "vmf", "vmf:shared=true",
           "adacos", "lsoftmax", "asoftmax", "sphereface", "am", "cosface", "arcface", "combined", "curricular",
           "subcenter", "adaface", "magface", "elastic", "sphereface2", "uniface", "circle_class", "groupface", "ce+regular",
           "subcenter+regular+0.1*triplet+0.01*center+uniform")


def test_distributed_heads_equal_the_undivided(tmp):
    """Each loss with class weights, 13 classes over two processes: loss, gradients, buffers, logits after two steps."""
    assert {n for n in losses.LOSSES if loss_of(with_partner(n)).weight is not None} - set(SHAPES) <= {
        re.split("[:+]", s)[-1] if s == "ce+regular" else re.split("[:+]", s)[0] for s in DIVIDED}
    specs = [*DIVIDED, *(f"{n}:sample=0.6" for n in SAMPLED)]

    def task(rank):
        torch.distributed.init_process_group("gloo")
        norm, same_norm = nn.BatchNorm2d(5).double(), nn.BatchNorm2d(5).double()
        x, weights = (torch.randn(7, 5, 3, 3, generator=torch.Generator().manual_seed(i)).double() + 3 for i in (0, 1))
        z, part = x.clone().requires_grad_(), slice(*[(0, 4), (4, 7)][rank])
        (norm(z) * weights).sum().backward()
        mine = x[part].clone().requires_grad_()
        value = train.synchronised(same_norm, mine)
        (value * weights[part]).sum().backward()
        close(value, F.batch_norm(x, None, None, training=True)[part], 1e-9)
        close(mine.grad, z.grad[part], 1e-9)
        for name, value in norm.state_dict().items():
            close(same_norm.state_dict()[name], value)
        for spec in specs:
            torch.manual_seed(0)
            x, y = torch.randn(10, 8).double() * 2, torch.tensor([0, 5, 5, 6, 7, 12, 12, 3, 1, 6])
            seen = []
            for share in (0, 1), (rank, 2):
                torch.manual_seed(1)
                head, z = losses.make(spec, 8, 13, share).double(), x.clone().requires_grad_()
                with Arrays((10, 13)) as arrays:
                    for step in range(2):
                        torch.manual_seed(step)
                        value = head(z, y)
                        value.backward()
                assert (arrays.most > 0) == (share[1] == 1 and "sample" not in spec), spec      # divided: no (B, C)
                best = head.eval().top(x, 5)
                params = {n: (getattr(p, "per_class", 0), p.detach(), p.grad) for n, p in head.named_parameters()}
                seen.append((value, z.grad, params, dict(head.named_buffers()), best))
            (v, g, params, buffers, top), (v2, g2, params2, buffers2, top2) = seen
            close(v2, v, 1e-9, spec), close(g2, g, 1e-9, spec)
            assert torch.equal(top, top2), spec
            for n in buffers:
                close(buffers2[n], buffers[n], 1e-9, (spec, n))
            for n, (k, *have) in params2.items():
                for mine, all_ in zip(have, params[n][1:]):
                    if k:
                        all_ = all_.unflatten(0, (k, -1))[:, [0, 6][rank]:[6, 13][rank]].flatten(0, 1)
                    close(mine, all_, 1e-9, (spec, n))
            assert any(k for k, *_ in params2.values()), spec
        return True

    assert processes(2, task, tmp) == [True] * 2
    whole, *parts = [(torch.manual_seed(0), losses.make("subcenter:k=2", 3, 100_001, share).weight.detach())[1]
                     for share in ((0, 1), (0, 3), (1, 3), (2, 3))]              # drawn in several blocks
    assert torch.equal(torch.cat([p.unflatten(0, (2, -1)) for p in parts], 1).flatten(0, 1), whole)
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
    rng = np.random.default_rng(0)
    gallery = np.lib.format.open_memmap(tmp / "g.npy", "w+", np.float16, (1 << 20, 32))
    gallery[:] = 0
    where = rng.choice(len(gallery), 20, replace=False)
    probes = rng.normal(size=(20, 32)).astype(np.float16)
    gallery[where] = probes
    gallery.flush()
    del gallery
    gallery, largest = np.load(tmp / "g.npy", mmap_mode="r"), []
    with mock.patch.object(data, "forget", lambda a, real=data.forget: (
            real(a), largest.append(int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1])))):
        if not Path("/proc/self/status").exists():
            raise Skip("no /proc to read the resident memory from")
        scores, rows = verify.search(gallery, probes.astype(np.float32), 1)
    assert (rows[:, 0] == where).all() and len(largest) == 256
    assert max(largest) - largest[0] < 16 << 10, largest    # KB; all of the map would be 64 MB


def test_verify_metrics(tmp):
    torch.manual_seed(0)
    pairs = data.Pairs(list("abcd"), np.array([0, 1, 2]), np.array([1, 2, 3]), None)
    z = F.normalize(torch.randn(4, 8))
    cosine = verify.score(z, pairs, verify.metric_of(losses.make("ce", 8, 3), "cosine")[1])
    euclid = verify.score(z, pairs, verify.metric_of(losses.make("siamese", 8, 3), "euclidean")[1])
    close(euclid, -np.sqrt(2 - 2 * cosine), 1e-6)
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
        for far in (1e-3, 1e-2, 1e-1):
            wanted = [np.mean(hits[mated, 0] & (scores[mated] > t)) for t in np.r_[others, others - 1]
                      if np.mean(others > t) <= far]
            value = got[f"dir@far={far:.0e}".replace("e-0", "e-")]
            assert math.isnan(value) if far * len(others) < 1 else abs(value - max(wanted)) < 1e-12, (case, far)


@functools.cache
def trained():
    """A small checkpoint on the small set, its folder a run's; for reading only."""
    cwd = faces().parent
    tiny(cwd, "--loss", "arcface", "--out", "run", epochs=1)
    return cwd / "run"


def known_and_unknown(tmp):
    """The older Kaggle: five known people with three images, eight probes, three of them of strangers."""
    files, labels = data.read_labels(faces() / "cls_data/train")
    of = {p: [f for f, q in zip(files, labels) if q == p] for p in range(8)}
    truth = [0, 1, 2, 3, 4, 5, 6, 7]
    for p in range(5):
        (tmp / f"known/n{p}").mkdir(parents=True)
        for f in of[p][:3]:
            shutil.copy(f, tmp / f"known/n{p}")
    for folder in ("unknown_dev", "unknown_test"):
        (tmp / folder).mkdir()
        for i, p in enumerate(truth):
            shutil.copy(of[p][4], tmp / f"{folder}/{i:03d}.jpg")
    (tmp / "verification_dev.csv").write_text("id,label\n" + "".join(
        f"{i},{f'n{p}' if p < 5 else 'n000000'}\n" for i, p in enumerate(truth)))
    return truth


def test_verify_identifies(tmp):
    truth, ckpt = known_and_unknown(tmp), trained() / "best.pt"
    flags = "--ckpt", ckpt, "--gallery", "known", "--probes", "unknown_dev"
    code, out, err = run(verify, *flags, "--json", "--plots", "plots", "--save-embeddings", "g.npy", cwd=tmp)
    assert code == 0, err
    got = json.loads(out)
    # by hand: unit mean of each person's unit embeddings, all cosines, the best, or n000000 below the threshold
    net, criterion = verify.build(verify.load(ckpt))

    def z(files):
        return verify.embed(net, np.stack([data.decode(f, 32) for f in files])).numpy()
    known = np.stack([z(sorted((tmp / f"known/n{p}").glob("*.jpg"))).sum(0) for p in range(5)])
    cosine = z(sorted((tmp / "unknown_dev").glob("*.jpg"))) @ (known / np.linalg.norm(known, axis=1)[:, None]).T
    val = verify.load(ckpt)["val"]
    threshold = eer.eer(val["labels"].numpy(), val["scores"].numpy())[1]
    answers = [f"n{c.argmax()}" if c.max() >= threshold else "n000000" for c in cosine]
    rows = (tmp / "identification.csv").read_text().split()
    assert rows == ["id,label", *(f"{i},{a}" for i, a in enumerate(answers))]
    close([p["score"] for p in got["probes"]], cosine.max(1), 1e-5)
    close([got["threshold"], got["rank1"]], [threshold, np.mean(cosine.argmax(1)[:5] == truth[:5])])
    close(got["accuracy"], np.mean([a == (f"n{p}" if p < 5 else "n000000") for a, p in zip(answers, truth)]))
    assert got["rank5"] == 1 and (got["mated"], got["unmated"]) == (5, 3) and got["dir@far=1e-1"] is None
    assert [n["nearest"][0] for n in got["probes"]] == [f"n{c}" for c in cosine.argmax(1)]
    assert Image.open(tmp / "plots/ranks.png").size[1] > 8 * 96
    # embeddings in a file serve as gallery; a folder of test probes has no truth, though a CSV lies beside it
    listing = [line.split("\t") for line in (tmp / "g.txt").read_text().splitlines()]
    assert [n for _, n in listing] == [f"n{p}" for p in range(5) for _ in "abc"]
    assert np.load(tmp / "g.npy").shape == (15, 16)
    again = json.loads(run(verify, "--ckpt", ckpt, "--gallery", "g.npy", "--probes", "unknown_test", "--far", "1e-3",
                           "--out", "far.csv", "--json", cwd=tmp)[1])
    assert "rank1" not in again and [p["nearest"] for p in again["probes"]] == [p["nearest"] for p in got["probes"]]
    close(again["threshold"], val["scores"][val["labels"] == 0].max(), 1e-9)    # 10 impostors: above them all
    (tmp / "verification_dev.csv").write_text("id,label\n0,n1\n")
    code, _, err = run(verify, "--ckpt", ckpt, "--gallery", "known", "--probes", "unknown_dev", cwd=tmp)
    assert code == 2 and "verification_dev.csv: 1 rows for the 8 images" in err


def test_verify_protocols(tmp):
    """Two images, LFW's folds, a threshold from another file, JSON, pictures; against the functions beneath."""
    ckpt, val = trained() / "best.pt", data.load(faces()).val_pairs
    names = [f"p{i}" for i in range(len(val.files))]
    for f, n in zip(val.files, names):
        (tmp / f"lfw/{n}").mkdir(parents=True)
        shutil.copy(f, tmp / f"lfw/{n}/{n}_0001.jpg")
        shutil.copy(f, tmp / f"lfw/{n}/{n}_0002.jpg")
    same, other = (np.flatnonzero(val.labels == y)[:10] for y in (1, 0))
    rows = [f"{names[val.left[i]]}\t1\t2\n" for i in same], [
        f"{names[val.left[i]]}\t1\t{names[val.right[i]]}\t1\n" for i in other]
    (tmp / "pairs.txt").write_text("5\t2\n" + "".join(
        "".join(rows[0][2 * f:2 * f + 2] + rows[1][2 * f:2 * f + 2]) for f in range(5)))
    (tmp / "dev.txt").write_text("10\n" + "".join(rows[0] + rows[1]))
    (tmp / "homework.csv").write_text("a,b,label\n" + "".join(f"{os.path.relpath(val.files[i], faces())},"
                                      f"{os.path.relpath(val.files[j], faces())},{y}\n" for i, j, y in
                                      zip(val.left, val.right, val.labels)))

    def ask(*flags):
        code, out, err = run(verify, "--ckpt", ckpt, "--json", *flags, cwd=tmp)
        assert code == 0, err
        return json.loads(out)
    got = ask("--pairs", "pairs.txt", "--images", "lfw", "--plots", "plots")
    with (tmp / "plots/scores.csv").open() as f:
        labels, scores = np.array([(int(r["label"]), float(r["score"])) for r in csv.DictReader(f)]).T
    assert {p.name for p in (tmp / "plots").iterdir()} == {"roc.png", "scores.png", "hardest.png", "scores.csv"}
    close([got["folds_acc"], got["folds_error"]], eer.folds_accuracy(labels, scores, np.arange(20) // 4))
    close(got["eer"], eer.eer(labels, scores)[0])
    assert got["tar@far=1e-1"] is not None and got["tar@far=1e-2"] is None
    moved = ask("--pairs", "pairs.txt", "--images", "lfw", "--threshold-from", "dev.txt")["threshold_from"]
    t = eer.best_threshold(labels, scores)                  # the same pairs in another order
    close([moved[k] for k in ("threshold", "acc", "far", "frr")], [
        t, np.mean((scores >= t) == labels), np.mean(scores[labels == 0] >= t), np.mean(scores[labels == 1] < t)], 1e-5)
    whole = ask("--pairs", "homework.csv", "--images", faces())
    stored = verify.load(ckpt)["val"]
    close(whole["eer"], verify.load(ckpt)["best"])
    labels, cosines = stored["labels"].numpy(), stored["scores"].numpy()
    for flags, scores in ((("--metric", "cosine"), cosines), (("--metric", "euclidean"), -np.sqrt(2 - 2 * cosines)),
                          (("--far", 0.2), cosines)):
        one = ask(*(val.files[side[0]] for side in (val.left, val.right)), *flags)
        close(one["score"], scores[0], 1e-4)
        close([one["genuine_lower"], one["impostor_higher"]],
              [np.mean(scores[labels == 1] < one["score"]), np.mean(scores[labels == 0] >= one["score"])])
        close(one["threshold"], eer.at_far(labels, scores, 0.2) if "--far" in flags else eer.eer(labels, scores)[1])
        assert one["same"] == (one["score"] >= one["threshold"])
    assert list(ask(*val.files[:2], "--mirror", "none")) == ["score"]           # no scores of that in the checkpoint
    concat = ask("--pairs", "homework.csv", "--images", faces(), "--mirror", "concat", "--save-embeddings", "z.f16.npy")
    z = np.load(tmp / "z.f16.npy")
    assert z.dtype == np.float16 and z.shape == (len(val.files), 32) and concat["genuine"] == whole["genuine"]
    _, text, _ = run(verify, "--ckpt", ckpt, *val.files[:2], cwd=tmp)           # images may follow --ckpt
    assert "of a hundred genuine validation pairs" in text
    for flags, fragment in ((("--far", 2), "--far 2"), (("--probes", "x"), "--gallery"),
                            (("--metric", "learned"), "no metric"), (("a.jpg",), "1 images; give two"),
                            (("--gallery", "none"), "no such folder")):
        code, _, err = run(verify, "--ckpt", ckpt, *flags, cwd=tmp)
        assert code == 2 and fragment in err and err.count("\n") == 1, err


def test_verify_compares(tmp):
    """Several checkpoints and score files over each other; a sorted table of runs; closed sets, combined score."""
    ckpt = trained() / "best.pt"
    (tmp / "other.csv").write_text("1,0.9\n0,0.1\n1,0.2\n0,0.8\n")
    code, out, err = run(verify, "--ckpt", ckpt, "other.csv", "--json", "--plots", "p", cwd=tmp)
    assert code == 0, err
    got = json.loads(out)
    assert list(got) == ["run", "other"] and got["other"]["eer"] == 0.5 and (tmp / "p/roc.png").stat().st_size > 5000
    one = got["run"]
    close(one["combined"], 0.5 * one["dev_acc1"] + 0.5 * (1 - one["eer"]))
    assert not (tmp / "submission.csv").exists() and one["dev_acc5"] >= one["dev_acc1"] and "test_acc1" in one
    d = data.load(faces())
    net, criterion = verify.build(verify.load(ckpt))
    logits = criterion.logits(verify.embed(net, np.stack([data.decode(f, 32) for f in d.test[0]]), unit=False))
    close(one["test_acc1"], np.mean(logits.argmax(1).numpy() == d.test[1]))
    tiny(tmp, "--loss", "ce", "--dim", 2, "--out", "flat", epochs=1)
    (tmp / "empty").mkdir()
    code, out, err = run(verify, "--compare", "flat", trained(), "empty", "--json", cwd=tmp)
    runs = json.loads(out)["runs"]
    assert "left out: empty/best.pt" in err and {r["run"] for r in runs} == {"flat", str(trained())}
    assert runs[0]["EER"] <= runs[1]["EER"] and {r["loss"] for r in runs} == {"ce", "arcface:s=12.4,m=0.3"}
    flat = next(r for r in runs if r["run"] == "flat")
    weights = [p.numel() for m in verify.build(verify.load(tmp / "flat/best.pt")) for p in m.parameters()]
    assert flat["parameters"] == sum(weights) and flat["loss"] == "ce"
    assert run(verify, "--ckpt", "flat/best.pt", "--plots", "p2", cwd=tmp)[0] == 0
    a = np.asarray(Image.open(tmp / "p2/embeddings.png")).astype(int)           # ten colours on the plane
    for colour in data.COLOURS_OF_LINES:
        assert (np.abs(a - [int(colour[i:i + 2], 16) for i in (1, 3, 5)]).max(2) < 30).sum() > 20, colour


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
    for arch in ("resnet18", "resnet34", "resnet50", "convnext_tiny", "mobilenetv2", "alexnet", "vgg11",
                 "vgg16", "googlenet"):
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
        for size in (64, 96):
            images = torch.randn(2, 3, size, size)
            for mode in (False, True):
                outputs = []
                for net in (want, got):
                    torch.manual_seed(1)                    # drop-path must draw the same numbers
                    with torch.no_grad():
                        outputs.append(net.train(mode)(images))
                error = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
                assert outputs[0].std() > 0 and error < 1e-5, (arch, size, mode, error.item())


def test_models_counts():
    # arch, dim, size, input channels as published, parameters
    face = [("lenetpp", 2, 32, 1, 799394), ("lightcnn9", 256, 128, 1, 5480864),
            ("lightcnn29", 256, 128, 1, 12573280),
            ("iresnet18", 512, 112, 3, 24025600), ("iresnet34", 512, 112, 3, 34139328),
            ("iresnet50", 512, 112, 3, 43590848), ("iresnet100", 512, 112, 3, 65156160),
            ("mobilefacenet", 128, 112, 3, 1003136), ("sphere20", 512, 112, 3, 22666944 + 512 * 7 * 512)]
    for arch, dim, size, channels, want in face:
        net = on_meta(arch, dim, size)
        first = next(net.parameters())
        assert count(net) - (3 - channels) * first[:, 0].numel() == want, arch
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
    for arch, dim, size, want in (("iresnet18", 512, 112, 2.6), ("iresnet34", 512, 112, 4.5),
                                  ("iresnet50", 512, 112, 6.3), ("iresnet100", 512, 112, 12.1),
                                  ("mobilefacenet", 128, 112, 0.221), ("mobilenetv2", 1280, 224, 0.301),
                                  ("googlenet", 1024, 224, 1.498), ("resnet50", 2048, 224, 4.089),
                                  ("convnext_tiny", 768, 224, 4.456), ("convnext_pico", 512, 224, 1.4)):
        net = on_meta(arch, dim, size)                      # at 224: dim is the map's width, the head's input
        got = models.macs(net, size) if size < 224 else models.macs(net.trunk, size) + 1000 * dim
        assert round(got / 1e9, len(str(want).split(".")[1])) == want, arch
    net = models.make("mobilefacenet", 32, 32).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert models.macs(net, 32) == models.macs(on_meta("mobilefacenet", 32, 32), 32) and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net(torch.randn(2, 3, 32, 32)).std() > 0.5       # the layers that counting skips are back


def test_models_train_save_and_load():
    torch.manual_seed(0)
    wave, labels = torch.linspace(0, 12, 32).sin(), torch.arange(8) % 2     # lying and standing stripes
    images = torch.where(labels[:, None, None, None] == 0, wave[:, None], wave[None, :])
    images = images + 0.1 * torch.randn(8, 3, 32, 32)
    for arch in models.ARCHS:
        torch.manual_seed(0)
        net, head = models.make(arch, dim=16, size=32).train(), nn.Linear(16, 2)
        # On 1x1 maps the loss of deep nets of batch norm is rough: all images, and tiny backbone steps.
        rough = arch.startswith(("resnet", "seresnet", "googlenet", "lightcnn", "mobilenetv2"))
        steps = torch.optim.SGD([{"params": net.parameters(), "lr": 1e-5 if rough else 0.05},
                                 {"params": head.parameters(), "lr": 0.2}])
        some, losses = slice(8 if rough else 4), []
        for step in range(4):
            torch.manual_seed(1)                            # the same dropout each time
            with torch.set_grad_enabled(step < 3):
                out = net(images[some])
                loss = nn.functional.cross_entropy(head(4 * nn.functional.normalize(out)), labels[some])
            losses.append(loss.item())
            if step < 3:
                steps.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1, error_if_nonfinite=True)
                steps.step()
        assert out.shape[1:] == (16,) and losses[-1] < losses[0], (arch, losses)
        state = net.state_dict()
        if count(net) < 3e7:                                # through a file, where the clock allows it
            file = io.BytesIO()
            torch.save(state, file)
            state = torch.load(io.BytesIO(file.getvalue()))
        twin = on_meta(arch, 16, 32)
        twin.load_state_dict(state, assign=True)
        with torch.no_grad():
            assert torch.equal(net.eval()(images[:1]), twin.eval()(images[:1])), arch


SMALL = ("lenetpp", "alexnet", "vgg11", "googlenet", "lightcnn29", "resnet18", "seresnet50", "sphere10",
         "iresnet18", "iresnet_se18", "mobilenetv2", "mobilefacenet", "convnext_atto")


def test_models_sizes_memory_format_autocast_and_fold():
    for arch in SMALL:
        torch.manual_seed(0)
        net = models.make(arch, dim=8, size=64)
        images = torch.randn(4, 3, 64, 64)
        with torch.no_grad():
            for _ in range(3):                              # statistics away from 0 and 1
                net(images)
            net.eval()
            want, folded = net(images), models.fold(net)
            norms = [m for m in folded.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
            assert len(norms) == (9 if "iresnet" in arch else 0), arch      # before a convolution they stay
            assert (folded(images) - want).abs().max() < 1e-5 * want.abs().max(), arch
            assert torch.equal(net(images), want), arch     # fold works on a copy
            for side in (32, 48, 80):
                assert net(torch.randn(2, 3, side, side)).shape == (2, 8), (arch, side)
            images = images.contiguous(memory_format=torch.channels_last)
            last = net.to(memory_format=torch.channels_last)(images)
            assert (last - want).abs().max() < 1e-4 * want.abs().max(), arch
        for kind in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", kind):
                out = net.train()(images[:2, :, :32, :32])
            assert out.isfinite().all(), (arch, kind)
        out.float().square().mean().backward()              # not in float16: that takes minutes on a CPU
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad), arch


def test_models_randomness_is_the_global_generators():
    for arch in ("iresnet18", "convnext_atto"):
        net, images = models.make(arch, 8, 32), torch.randn(4, 3, 32, 32)
        for block in net.modules():
            if isinstance(block, models.ConvNeXtBlock):
                nn.init.ones_(block.scale)
        outputs = []
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            outputs.append(net(images).detach())
        assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1]), arch


def test_models_make_answers_mistakes():
    for arguments, words in ((("resnt50",), "resnet50"), (("iresnet_se5",), "iresnet_se50"),
                             ((None,), "nearest"), (("resnet18", 0), "dimension"),
                             (("resnet18", 8, 31), "32..256"), (("resnet18", 8, 257), "32..256")):
        try:
            models.make(*arguments)
            raise AssertionError(arguments)
        except ValueError as error:
            assert words in str(error) and "\n" not in str(error), error
    for arch in SMALL:
        for size in (33, 100, 255):
            net, sides = on_meta(arch, 8, size), []
            for m in net.modules():
                if isinstance(m, models.Fit):               # a net of this size pools only to bound its neck
                    m.register_forward_hook(lambda m, x, y: sides.append((x[0].shape[-1], y.shape[-1])))
            assert models.macs(net, size) > 0
            assert all(a == b or a > b == 4 for a, b in sides) and sides, (arch, size, sides)
    lines = models.table().splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(models.ARCHS)


# ---- losses.py -----------------------------------------------------------------------------------------------

CLASS_HEADS = ("modified normface coco vmf adacos lsoftmax asoftmax sphereface am cosface arcface combined curricular "
               "subcenter adaface magface elastic sphereface2 uniface circle_class groupface").split()
SAMPLED = [n for n, f in losses.FORMULAS.items() if "sample" in losses.inspect.signature(f).parameters]
SHAPES = "range ring uniform center center_invariant".split()                   # terms that alone make no embedding


def loss_of(spec, dim=8, classes=6, double=True, seed=0):
    torch.manual_seed(seed)
    with mock.patch.object(losses, "automatic", lambda classes: {"s": 64.0, "m": 0.5}):         # as published
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
    seen, keep = [], (F.cross_entropy, losses.one_against_rest)

    def watch(f):
        return lambda logits, y, *a, **k: seen.append((logits.detach().clone(), getattr(y, "column", y))) or f(logits, y, *a, **k)
    F.cross_entropy, losses.one_against_rest = map(watch, keep)
    try:
        yield seen
    finally:
        F.cross_entropy, losses.one_against_rest = keep


def test_losses_equal_each_other_at_special_parameters():
    for a, b in (("combined:m1=1,m2=0,m3=0", "normface:s=64,learn=false"), ("combined:m2=0.5,m3=0", "arcface"),
                 ("combined:m2=0,m3=0.35", "cosface"), ("combined:s=30,m1=1.7,m2=0,m3=0", "sphereface"),
                 ("am:s=64", "cosface"), ("coco", "normface:s=30,learn=false"), ("normface:s=30", "coco"),
                 ("adaface:h=0,m=0.35", "cosface"), ("elastic:sigma=0", "arcface"),
                 ("elastic:sigma=0,kind=cos,m=0.35", "cosface"), ("subcenter:k=1", "arcface"),
                 ("magface:m_low=0.5,m_high=0.5,lam=0", "arcface"), ("vmf:shared=true", "coco"),
                 ("adacos:dynamic=false", f"coco:s={math.sqrt(2) * math.log(5)!r}"),
                 ("asoftmax:base=1e14", "modified"), ("asoftmax:m=1", "modified"), ("contrastive:m=1.1",
                 "double_margin:m_p=0,m_n=1.1,weight=0.5"), ("tse:m=0.3,k=8", "hinge:m=0.3"),
                 ("elastic", "arcface"), ("sphereface2:t=1", "sphereface2:t=1,lw=50")):
        one, two = loss_of(a), loss_of(b)
        if a == "elastic":                                                      # its noise is for training only
            one.eval()
        for p, q in zip(one.parameters(), two.parameters()):
            p.data = q.data.clone()
        x, y = people()
        r, t = one(x, y), two(x, y)
        close(r, t, 1e-6)                                                       # some constants are float32's
        close(*(torch.autograd.grad(v, x)[0] for v in (r, t)), tolerance=1e-6)
    x, y = people()
    ada, arc = loss_of("adaface:m=0.4"), loss_of("arcface:m=0.4")
    ada.terms[0].mean.fill_(1e6), ada.eval()                                    # every norm is far below: z = -1
    ada.terms[0].std.fill_(1.0)
    close(ada(x, y), arc(x, y))
    group, lam = loss_of("groupface:lam=0.1"), loss_of("groupface:lam=0")
    arc = loss_of("arcface")
    for g in (group, lam):
        g.terms[0].parts.data.zero_(), g.eval()
    lam.weight.data, group.weight.data = arc.weight.data, arc.weight.data
    close(lam(x, y), arc(x, y))
    p = group.terms[0].groups(x)
    close(group(x, y) - arc(x, y), 0.1 * F.cross_entropy(p, (p.softmax(1) - 0.25).argmax(1)))
    w = losses.unit(arc.weight)                                                 # no negative is hard on its own weight
    close(loss_of("curricular")(w.detach()[:3], y[:3] * 0 + torch.arange(3)), arc(w.detach()[:3], torch.arange(3)))
    mag = loss_of("magface:m_low=0.5,m_high=0.5,low=1,high=50")
    a = x.norm(dim=1).clamp(1, 50)
    close(mag(x, y), arc(x, y) + 35 * (1 / a + a / 2500).mean())
    tpe, s = loss_of("tpe:k=8"), losses.cosines(x)
    close(tpe(x, y), torch.stack([F.softplus(s[a, n] - s[a, p]) for a, p, n in all_triplets(y)]).mean())
    pairs = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    close(loss_of("npair:reg=0")(x[:8], pairs), F.cross_entropy(x[:4] @ x[4:8].T, torch.arange(4)))
    two = losses.cosines(x[:8]).fill_diagonal_(-math.inf) / 0.1
    close(loss_of("supcon")(x[:8], pairs), F.cross_entropy(two, (torch.arange(8) + 4) % 8))
    vmf, k = loss_of("vmf:s=20"), 20.0                                          # d log C_D / dk = -I_{v+1}/I_v
    vmf.logits(x)[0, 2].backward()
    bessel = lambda v: sum((k / 2) ** (2 * i + v) / math.gamma(i + 1) / math.gamma(i + v + 1) for i in range(60))  # noqa: E731
    cos = losses.unit(x[0]) @ losses.unit(vmf.weight[2])
    close(vmf.terms[0].log_k.grad[2], k * (cos - bessel(4) / bessel(3)) , 5e-3)


def all_triplets(y):
    n = range(len(y))
    return [(a, p, q) for a in n for p in n if p != a and y[p] == y[a] for q in n if y[q] != y[a]]


def by_hand(x, y):
    """name -> value, by loops over Python numbers."""
    n, u = range(len(y)), losses.unit(x)
    s = [[float(u[i] @ u[j]) for j in n] for i in n]
    d = [[float((u[i] - u[j]).norm()) for j in n] for i in n]
    same = [(i, j) for i in n for j in n if i != j and y[i] == y[j]]
    other = [(i, j) for i in n for j in n if y[i] != y[j]]
    P, N = ([[j for a, j in pairs if a == i] for i in n] for pairs in (same, other))
    mean = lambda v: sum(v) / max(len(v), 1)                                    # noqa: E731
    plus, soft, triples = (lambda v: max(v, 0.0)), (lambda v: math.log1p(math.exp(v))), all_triplets(y)
    semi = []
    for a, p in same:
        if N[a]:
            far = [q for q in N[a] if s[a][q] < s[a][p]]
            semi.append((a, p, max(far, key=lambda q: s[a][q]) if far else min(N[a], key=lambda q: s[a][q])))
    hard = [(a, min(P[a], key=lambda p: s[a][p]), max(N[a], key=lambda q: s[a][q])) for a in n if P[a] and N[a]]
    tri = lambda t, m=0.2: [plus(d[a][p] ** 2 - d[a][q] ** 2 + m) for a, p, q in t]             # noqa: E731
    gaps = lambda t: [s[a][q] - s[a][p] for a, p, q in t]                       # noqa: E731
    both = [a for a in n if P[a] and N[a]]
    people = sorted(set(y.tolist()))
    intra = 0.0
    for c in people:
        worst = sorted((d[i][j] for i, j in same if i < j and y[i] == c), reverse=True)[:2]
        intra += len(worst) / sum(1 / v for v in worst) if worst else 0
    mid = [sum(u[i] for i in n if y[i] == c) / sum(1 for i in n if y[i] == c) for c in people]
    inter = min((float((a - b).norm()) ** 2 for i, a in enumerate(mid) for b in mid[:i]), default=9.0)
    first = {c: [i for i in n if y[i] == c] for c in people}
    first = {c: v for c, v in first.items() if len(v) > 1}
    dot = lambda i, j: float(x[i] @ x[j])                                       # noqa: E731
    con = [-mean([s[i][p] / 0.1 - math.log(sum(math.exp(s[i][a] / 0.1) for a in n if a != i)) for p in P[i]])
           for i in n if P[i]]
    cir = [soft(math.log(sum(math.exp(80 * plus(s[i][j] + 0.4) * (s[i][j] - 0.4)) for j in N[i]))
                + math.log(sum(math.exp(-80 * plus(1.4 - s[i][p]) * (s[i][p] - 0.6)) for p in P[i]))) for i in both]
    mul = [math.log1p(sum(math.exp(-2 * (s[i][p] - 0.5)) for p in P[i])) / 2
           + math.log1p(sum(math.exp(50 * (s[i][j] - 0.5)) for j in N[i])) / 50 for i in n]
    axis = 1.4 * math.log(2)
    l1 = [[math.sqrt(8) - axis * float((u[i] - u[j]).abs().sum()) for j in n] for i in n]
    return {
        "contrastive": mean([d[i][j] ** 2 / 2 for i, j in same]) + mean([plus(1 - d[i][j]) ** 2 / 2 for i, j in other]),
        "double_margin": mean([plus(d[i][j] - 0.4) ** 2 for i, j in same]) + mean([plus(1.2 - d[i][j]) ** 2 for i, j in other]),
        "marginal": mean([plus(0.3 - 1.2 + d[i][j] ** 2) for i, j in same] + [plus(0.3 + 1.2 - d[i][j] ** 2) for i, j in other]),
        "triplet:mining=all": mean([v for v in tri(triples) if v > 0]), "triplet:mining=hard": mean(tri(hard)),
        "triplet": mean(tri(semi)), "hinge": mean([plus(v + 0.2) for v in gaps(triples)]),
        "hinge:mining=hard": mean([plus(v + 0.2) for v in gaps(hard)]),
        "tse:k=8": mean([plus(v + 0.1) for v in gaps(triples)]), "tpe:k=8": mean([soft(v) for v in gaps(triples)]),
        "npair": mean([math.log(sum(math.exp(dot(v[0], w[1])) for w in first.values())) - dot(v[0], v[1])
                       for v in first.values()]) + 0.002 * mean([dot(i, i) for i in n]),
        "supcon": mean(con), "circle": mean(cir), "multisim": mean(mul), "range": intra + plus(1 - inter),
        "siamese": mean([soft(-l1[i][j]) for i, j in same]) + mean([soft(l1[i][j]) for i, j in other]),
        "uniform": mean([1 / (1 + float((u[i] - u[j]).norm())) for i, j in other]) if not same else None}


def test_losses_of_pairs_and_triplets_agree_with_loops():
    for labels in ([0, 1, 2, 3] * 3, [0] * 5 + [1] * 3 + [2, 2, 3, 4], [5] * 12, list(range(12))):
        x, y = people(seed=len(set(labels)))[0], torch.tensor(labels)
        x.data[4] = x.data[0] + 0.1                                             # close, by an angle in any margin
        for spec, want in by_hand(x.detach(), y).items():
            if want is not None:
                close(loss_of(spec, classes=12)(x, y), want, 1e-6 if "circle" in spec else 1e-7)


def test_losses_terms_follow_the_published_rules():
    x, y = people()
    y = torch.tensor([0] * 5 + [1] * 3 + [2, 2, 3, 3])
    center, invariant, ring = loss_of("center"), loss_of("center_invariant"), loss_of("ring")
    c = torch.zeros(6, 8).double()
    for step in range(3):
        z = (x * (1 + step)).detach().requires_grad_()
        value = center(z, y)
        close(value, sum((z[i] - c[y[i]]).square().sum() for i in range(12)) / 24)
        close(torch.autograd.grad(value, z)[0], (z - c[y]).detach() / 12)
        mean = c.square().sum(1).mean()
        new = torch.stack([c[k] - 0.5 * sum([c[k] - z[i].detach() for i in range(12) if y[i] == k], torch.zeros(8).double())
                           / (1 + (y == k).sum()) for k in range(6)])
        close(invariant(z, y), sum((new[y[i]].square().sum() - mean) ** 2 for i in range(12)) / 48)
        c = new
        close(center.terms[0].c, c), close(invariant.terms[0].c, c)
    assert center.eval()(x, y) == center(x, y)                                  # evaluation moves nothing
    norm = x.norm(dim=1)
    close(ring(x, y), (norm - norm.mean()).square().mean() / 2)
    close(ring(2 * x, y), (2 * norm - norm.mean()).square().mean() / 2)
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
    for name, mine, rest in (("curricular", target, cos * torch.where(
            cos > target, 0.01 * mine.mean().detach() + cos, 1)),
            ("circle_class", 4 * (1.25 - still) * (cos - 0.75), 4 * (still + 0.25).relu() * (cos - 0.25))):
        pair = F.cross_entropy(64 * torch.where(hot, mine, rest), y), loss_of(name)(x, y)
        close(*pair)
        close(*(torch.autograd.grad(v, x, retain_graph=True)[0] for v in pair), tolerance=1e-6)
    for spec, value in (("sphereface2", lambda l, i, j: l - 40 * 0.4 if j == y[i] else l + 40 * 0.4),
                        ("uniface", lambda l, i, j: l - math.log(60) - (64 * 0.4 if j == y[i] else 0))):
        head = loss_of(spec)
        l, two = head.logits(x), spec == "sphereface2"
        total = sum(F.softplus(value(l[i, j], i, j) * (-1 if j == y[i] else 1)) * ((0.7 if j == y[i] else 0.3) if two else 1)
                    for i in range(12) for j in range(6))
        close(head(x, y), total / 12 * (50 / 40 if two else 1), 1e-6)
        if two:
            close(l, 40 * (2 * ((cos + 1) / 2) ** 3 - 1) + head.terms[0].b)


def test_losses_margin_has_the_right_gradient_and_falls_on_all_angles():
    t = torch.linspace(-0.99, 0.99, 37).double().requires_grad_()
    m2 = torch.linspace(-0.4, 0.9, 37).double().requires_grad_()
    for m in ((1, 0, 0), (1, 0.5, 0), (1, 0, 0.35), (1.7, 0, 0), (4, 0, 0), (1.2, 0.4, 0.1), (0.9, 0.4, 0.15)):
        value = losses.psi(t, *m)
        angle = m[0] * t.detach().acos() + m[1]
        plain = torch.where(angle <= math.pi, angle.cos(), -angle.cos() - 2) - m[2]
        assert m[0] > 2 or torch.allclose(value, plain)
        close(torch.autograd.grad(value.sum(), t)[0], torch.ones(37))           # detached: that of the cosine
    assert torch.autograd.gradcheck(lambda m2: losses.psi(t.detach(), 1.3, m2, 0.2 + m2), (m2,))
    for t in (1.0, -1.0):                                                       # where d acos is infinite
        t = torch.tensor(t, requires_grad=True)
        assert torch.autograd.grad(losses.psi(t, 1, 0.5), t)[0] == 1
    x, w = torch.randn(5, 8).double().requires_grad_(), torch.randn(7, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(losses.Cosines.apply, (x, w))
    close(losses.Cosines.apply(x, w), x @ losses.unit(w).T)
    angles = torch.linspace(0, math.pi, 2001).double()
    for m in ((1, 0, 0), (1, 0.5, 0), (1.7, 0, 0), (4, 0, 0), (1.2, 0.4, 0.1)):
        assert (losses.psi(angles.cos(), *m).diff() < 0).all(), m
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
    close(loss_of("2*arcface+0.5*ce", 512, 2000).expected(),
          2 * loss_of("arcface", 512, 2000).expected() + 0.5 * math.log(2000))


def test_losses_depend_on_no_order():
    for name in losses.LOSSES:
        spec = with_partner(name) + (":sigma=0" if name == "elastic" else "")
        one, two, three = loss_of(spec), loss_of(spec), loss_of(spec)
        x, y = people(4, 2)                                                      # npair takes a person's first two
        order, names = torch.randperm(8), torch.tensor([3, 5, 0, 4, 1, 2])
        if name == "npair":
            order = torch.tensor([2, 0, 3, 1, 6, 4, 7, 5])
        for p in three.parameters():
            if p.shape[:1] in ((6,), (18,)):
                q = p.data.clone().view(-1, 6, *p.shape[1:])
                p.data.view_as(q)[:, names] = q
        for _ in range(2):
            want = one(x, y)
            close(two(x[order], y[order]), want)
            close(three(x, names[y]), want)


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


def test_losses_survive_a_checkpoint_in_float64():
    for name in losses.LOSSES:
        x, y = people(4, 3)
        one, two = loss_of(with_partner(name)), loss_of(with_partner(name), seed=9)
        optimizer = torch.optim.SGD([x, *one.parameters()], 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            one(x, y).backward()
            optimizer.step()
        two.load_state_dict(one.state_dict())
        values = []
        for m in (one, two):
            torch.manual_seed(5)
            values += [m(x, y), m.eval()(x, y), m.project(x).sum()]
        assert values[0].dtype == torch.float64 and values[:3] == values[3:], (name, values)


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


def test_losses_answer_mistakes():
    for spec, words in (("arcfase", "did you mean 'arcface'"), ("arcface:mm=1", "did you mean 'm'"), ("arcface:s", "argument"),
                        ("arcface:s=x", "expected float"), ("arcface:s=0", "positive"), ("arcface:m=-1", "0 or more"),
                        ("arcface:s=nan", "finite"), ("triplet:mining=al", "all or hard or semihard"), ("ce++center", "cannot read"),
                        ("modified:s=1", "takes no arguments"), ("center+regular", "ce+regular"), ("2*deepid2", "stands for"),
                        ("facenet:m=1", "stands for"), ("1e+*ce", "numbers"), ("-1*ce", "weight"), ("1e999*ce", "weight"),
                        ("arcface:sample=2", "0..1"), ("arcface:sample=0", "0..1"), ("normface:learn=maybe", "expected bool"),
                        ("subcenter:k=1.5", "expected int"), ("tse+groupface", "embedding"), ("", "cannot read"),
                        ("sphereface2:alpha=1", "numbers"), ("magface:low=9,high=9", "numbers"),
                        ("ce:smooth=3", "0..1"), ("multisim:alpha=0", "numbers"),
                        ("0.5*npair+regular", "ce+regular"), ("arcface:s=3,s=4", "twice")):
        try:
            losses.make(spec, 8, 6)
        except ValueError as e:
            assert words in str(e) and "\n" not in str(e), (spec, str(e))
        else:
            raise AssertionError(spec)
    for spec, full in (("Softmax", "ce"), ("DeepID2", "ce+0.05*contrastive"), (" ce + 1e-3 * center ", "ce+1e-3*center"),
                       ("facenet", "triplet:mining=semihard,m=0.2"), ("softmax:smooth=0.1", "ce:smooth=0.1"),
                       ("1e+0*ce+regular", "1e+0*ce+regular"), ("normface:learn=FALSE", "normface:learn=False"),
                       ("arcface:m=0", "arcface:s=9.1,m=0.0"), ("cosface", "cosface:s=9.1")):
        module = losses.make(spec, 8, 6)
        assert module.spec == full and losses.make(module.spec, 8, 6).spec == full
    assert all(losses.make(with_partner(n), 8, 6).balanced == (n in
               "contrastive double_margin marginal triplet hinge tse tpe npair supcon circle multisim siamese range".split())
               for n in losses.LOSSES)
    assert all(f"  {n}" in losses.table() for n in (*losses.LOSSES, *losses.ALIASES))
    assert all(losses.make(a, 8, 6).spec for a in losses.ALIASES)
    x, y = people()
    close(loss_of("2*ce+0.5*supcon")(x, y), 2 * loss_of("ce")(x, y) + 0.5 * loss_of("supcon")(x, y))
    assert loss_of("triplet").weight is None and loss_of("arcface+0.1*tse:k=4").project(x).shape == (12, 4)


def test_losses_sampled_classes_hold_the_batch():
    x, y = people(4, 3)[0], torch.tensor([39, 0, 7, 7, 8, 20, 39, 1, 2, 3, 4, 5])
    for name in SAMPLED:
        for share, n in (("0.5", 20), ("0.01", 12), ("1", 40)):                 # never fewer columns than images
            module = loss_of(f"{name}:sample={share}", classes=40)
            with logits_seen() as seen:
                module(x, y).backward()
                rows = module.weight.grad.view(-1, 40, 8).abs().sum((0, 2)) > 0
                assert seen[0][0].shape[1] == n and rows.sum() <= n and rows[y].all(), (name, share)
                seen.clear()
                module.eval()(x, y)                                             # evaluation sees every class
                assert seen[0][0].shape == module.logits(x).shape == (12, 40), name
                assert (seen[0][1] == y).all(), name
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
    data.synthesise(tmp / "set", people=8, images=4, size=32)
    rows = [(n, y) for _, line in data.lines(tmp / "set/cls_data/train/labels.txt") for n, y in [line.split()]
            if int(y) < 4]
    (tmp / "set/cls_data/train/labels.txt").write_text("".join(f"{n} {y}\n" for n, y in rows))
    for split in ("dev", "test"):
        shutil.rmtree(tmp / f"set/cls_data/{split}")
    shutil.rmtree(tmp / "set/ver_data")
    shutil.copytree(tmp / "set/cls_data/train/images", tmp / "set/ver_data")
    (tmp / "set/val_pairs.txt").write_text("".join(f"{a} {b} {int(y == z)}\n" for (a, y), (b, z)
                                                   in itertools.combinations(rows, 2)))
    (tmp / "set/test_pairs.txt").unlink()
    quick = mock.patch.multiple(os, fsync=lambda f: None), mock.patch.multiple(data, plot=lambda *a: None)
    plain = [part for name in data.AUGMENT for part in (f"--{name}", 0)]
    missed = []
    for name in losses.LOSSES:
        spec = ("ce+0.01*" if name in SHAPES or name == "regular" else "") + name
        spec += ":k=1" if name == "subcenter" else ":mining=all" if name == "triplet" else ""
        lr = dict(l2softmax=1e-2, tse=1e-2, tpe=1e-2, npair=1e-3).get(name, 3e-3)
        flags = ("--data", tmp / "set", "--arch", "swiftface", "--dim", 64, "--batch-size", 8, "--per-person", 2,
                 "--epochs", 50, "--lr", lr, "--amp", "off", "--loss", spec, *plain)
        whole, parts = (tmp / name / out for out in ("whole", "parts"))
        with quick[0], quick[1]:
            for out, start, steps in ((whole, flags, 20), (parts, flags, 7), (parts, ["--resume"], 20),
                                      (whole, ["--resume"], 100)):
                if steps == 100:
                    same(*(verify.load(f / "last.pt") for f in (whole, parts)), name)
                assert run(train, *start, "--out", out, "--steps", steps, cwd=tmp)[0] == 0, name
        whole = verify.load(whole / "last.pt")
        print(f"    {spec}: EER {whole['best']:.3f}", flush=True)
        missed += [spec] * (whole["best"] > 0)
        shutil.rmtree(tmp / name)
    assert not missed, missed


def command(argv, cwd):
    """A run of train.py, in a process of its own."""
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv, sys.stdout, sys.stderr = ["train.py", *map(str, argv)], *(open("text.txt", "a"),) * 2
    data.cli(train.main)


def slow_kills(tmp):
    """Runs killed (-9) at twenty random times, start and saving included, and resumed end as the uninterrupted one."""
    rng, fork = np.random.default_rng(0), multiprocessing.get_context("forkserver")

    def go(seconds, *argv):
        child = fork.Process(target=command, args=(argv, tmp))
        since = time.monotonic()
        child.start()
        child.join(seconds)
        child.kill()
        child.join()
        assert child.exitcode in (0, -9), (tmp / "text.txt").read_text()[-2000:]
        return child.exitcode, time.monotonic() - since

    for i, (name, flags) in enumerate(RUNS.items()):
        whole, parts = tmp / f"whole{i}", tmp / f"parts{i}"
        start = ("--data", faces(), "--arch", "swiftface", "--dim", 16, "--epochs", 20, "--batch-size", 16,
                 "--lr", .02, "--amp", "off", "--save-every", 0, *flags, "--out")
        both = go(None, *start, whole)[1], go(None, "--resume", "--out", whole)[1]      # all of it, the start alone
        resume, kills, writing = ("--resume", "--out", parts), 0, 0
        while kills < 20:
            code, _ = go(rng.uniform(0, both[1] + (both[0] - both[1]) / 12),
                         *resume if (parts / "last.pt").exists() else (*start, parts))
            assert code == -9, f"{name}: over after {kills} kills"
            kills, writing = kills + 1, writing + any(parts.glob("*.tmp"))
        at = verify.load(parts / "last.pt")["step"]
        go(None, *resume)
        for file in ("last.pt", "best.pt"):
            same(verify.load(whole / file), verify.load(parts / file), f"{name}: {file}")
        rows = [[r | {"seconds": 0, "img_per_s": 0} for r in csv.DictReader((out / "log.csv").open())]
                for out in (whole, parts)]
        assert rows[0] == rows[1] and len(rows[0]) == 20 and not list(parts.glob("*.tmp")), name
        print(f"    {name}: {kills} kills, {writing} of them within a write, the last by step {at} of 60", flush=True)


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
    since = time.monotonic()
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1",
                        "--master_port", str(free_port()), "crash.py", "--data", faces(), "--arch", "swiftface", "--dim",
                        "16", "--batch-size", "15", "--amp", "off", "--out", "o", "--loss", "cosface", "--shard"],
                       cwd=tmp, capture_output=True, text=True, timeout=300)
    print(f"    {time.monotonic() - since:.0f} s, exit code {p.returncode}")
    assert p.returncode and "error: the fan is broken" in p.stderr and "process 0 ends, for another did" in p.stderr, p.stderr
    assert verify.load(tmp / "o/last.pt")["step"] == 8, p.stdout


def slow_distributed_classes(tmp):
    """A step of the arcface head with AdamW, batch 128, dimension 512, in one process and in two: growth of the resident
    memory, bytes sent (an all-reduce of n bytes sends 2 (N - 1) / N n each), median seconds of five."""
    import resource
    seen = {}
    for classes, n, shard in itertools.product((10_000, 100_000, 1_000_000), (1, 2), (False, True)):
        if shard == (n == 1) and n == 1 or classes == 1_000_000 and n == 2 and not shard:
            continue                                        # two whole copies of a million are 20 GB

        def task(rank):
            before, sent, spent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [0], []
            if n > 1:
                torch.distributed.init_process_group("gloo")
            real = torch.distributed.all_reduce

            def all_reduce(t, *args):
                sent[0] += t.numel() * t.element_size() * 2 * (n - 1) // n
                return real(t, *args)
            torch.manual_seed(0)
            head = losses.make("arcface", 512, classes, (rank, n) if shard else (0, 1))
            opt = torch.optim.AdamW(head.parameters(), fused=True)
            x, y, b = torch.randn(128, 512), torch.randint(0, classes, (128,)), 128 // n
            with mock.patch.object(torch.distributed, "all_reduce", all_reduce):
                for _ in range(6):
                    since, sent[0] = time.perf_counter(), 0
                    z = x[rank * b:rank * b + b].clone().requires_grad_()
                    loss = head(train.together(z, rank * b, 128) if n > 1 else z, y)
                    opt.zero_grad()
                    loss.backward()
                    opt.step()
                    spent.append(time.perf_counter() - since)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return after - before, sent[0], float(np.median(spent[1:])), loss.item()
        memory, sent, seconds, loss = processes(n, task, tmp)[0]
        close(loss, seen.setdefault(classes, loss), 1e-4, "the loss after six steps")
        print(f"    {classes:>9} classes, {n} processes{', --shard' * shard:<9}: {memory / 2 ** 10:7.0f} MiB,"
              f" {sent / 1e3:6.0f} kB,"
              f" {seconds * 1e3:6.0f} ms, loss {loss:.4f}", flush=True)


def slow_losses_cost():
    """Heads at 8,631 classes, batch 256, dimension 512: time of forward and backward over that of a linear layer with
    cross-entropy, medians of seven runs in turn, and how it grows with the number of classes."""
    def seconds(module, x, y):
        module.zero_grad()
        since = time.perf_counter()
        module(x.detach().requires_grad_(), y).backward()
        return time.perf_counter() - since

    class Plain(nn.Linear):
        def forward(self, x, y):
            return F.cross_entropy(super().forward(x), y)

    x, y, plain, over = torch.randn(256, 512), torch.randint(0, 8631, (256,)), Plain(512, 8631), {}
    for name in ("ce", *CLASS_HEADS):
        head = losses.make(name, 512, 8631)
        pairs = [(seconds(head, x, y), seconds(plain, x, y)) for _ in range(9)][2:]
        over[name] = np.median([a / b for a, b in pairs])
        print(f"    {name:<13} {1e3 * np.median([a for a, _ in pairs]):6.0f} ms  {over[name]:.2f} x linear + ce")
    for classes in (10_000, 100_000, 1_000_000):
        for sample in (1, 0.1):
            head, y = losses.make(f"cosface:sample={sample}", 512, classes), torch.randint(0, classes, (128,))
            spent = [seconds(head, x[:128], y) for _ in range(3)][1:]
            print(f"    cosface, {classes} classes, sample={sample}: {1e3 * min(spent):.0f} ms")
            del head
    beyond = {n: round(float(r), 2) for n, r in over.items() if r > 1.5 and n not in ("subcenter", "groupface")}
    assert not beyond, beyond


def slow_models_speed():
    """Images/s of each architecture at 112 pixels, batch 32, 8 where that takes long: a training step with AdamW in the
    precision that train.py picks, and embedding in float32 with the batch norms folded away; the better of two after
    one to warm up."""
    cast = train.precision(torch.device("cpu"))
    for arch in models.ARCHS:
        net = models.make(arch).to(memory_format=torch.channels_last)
        opt = torch.optim.AdamW(net.parameters(), fused=True)
        x = torch.randn(32 if models.macs(net) < 2e9 else 8, 3, 112, 112).to(memory_format=torch.channels_last)

        def step():
            with torch.autocast("cpu", torch.bfloat16, cast == "bf16"):
                z = net(x)
            opt.zero_grad()
            z.float().square().mean().backward()
            opt.step()

        def embed(folded=models.fold(net).to(memory_format=torch.channels_last)):
            with torch.no_grad():
                folded(x)

        rates = []
        for call in (step, embed):
            call()
            since = time.perf_counter(), call(), time.perf_counter(), call(), time.perf_counter()
            rates.append(len(x) / min(since[2] - since[0], since[4] - since[2]))
        print(f"{arch} {rates[0]:.0f} {rates[1]:.0f}", flush=True)


def slow_bench(tmp):
    """What a user waits for, ours beside the peer's, on this machine, in turn, medians of three rounds: the data path
    against ImageFolder, torchvision's transforms and two workers; training and embedding against torchvision's
    ResNet-18 with the same neck in a plain loop, at 112 pixels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, more = (128, 10) if device.type == "cuda" else (32, 1)
    with contextlib.redirect_stdout(None):
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

    def folder(*steps):
        for x, _ in torch.utils.data.DataLoader(torchvision.datasets.ImageFolder(tmp / "people", T.Compose(steps)), 128,
                                                True, num_workers=2, pin_memory=device.type == "cuda"):
            x.to(device, non_blocking=True)
            yield len(x)

    net, peer = models.make("resnet18"), torchvision.models.resnet18()
    peer.avgpool, peer.fc = nn.AdaptiveAvgPool2d(4), nn.Sequential(nn.Linear(8192, 512, False), nn.BatchNorm1d(512))
    heads = losses.make("ce", 512, 8631), nn.Linear(512, 8631)
    (net.to(device, memory_format=torch.channels_last), *(m.to(device) for m in (peer, *heads)))
    x, y = torch.randn(batch, 3, 112, 112, device=device), torch.randint(0, 8631, (batch,), device=device)
    fast = x.to(memory_format=torch.channels_last)

    def training(net, x, loss_of, opt):
        for _ in range(5 * more):
            with torch.autocast(device.type, torch.bfloat16, train.precision(device) == "bf16"):
                z = net(x)
            loss = loss_of(z)
            opt.zero_grad()
            loss.backward()
            opt.step()
            yield batch

    @torch.no_grad()
    def embedding(net, x):
        for _ in range(20 * more):
            net(x)
            yield batch

    def rate(stages):                                       # stages() yields the number of images of each batch
        steps = stages()
        next(steps)
        since, done = time.perf_counter(), sum(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return done / (time.perf_counter() - since)

    adamw = [torch.optim.AdamW([*n.parameters(), *h.parameters()], **how)
             for n, h, how in ((net, heads[0], {"fused": True}), (peer, heads[1], {}))]
    folded = models.fold(net).to(memory_format=torch.channels_last)
    frozen = copy.deepcopy(peer).eval()
    for what, a, b in (
            *((f"{what}, {side} pixels", functools.partial(ours, side, change), functools.partial(
                folder, T.Resize(side), *steps)) for side in packs for what, change, steps in (
                    ("gathered", lambda x: x, plain), ("augmented", lambda x: data.augment(x, strength), every))),
            ("training", lambda: training(net, fast, lambda z: heads[0](z, y), adamw[0]),
             lambda: training(peer, x, lambda z: F.cross_entropy(heads[1](z.float()), y), adamw[1])),
            ("embedding", lambda: embedding(folded, fast), lambda: embedding(frozen, x))):
        pairs = np.array([(rate(a), rate(b)) for _ in range(3)])
        print(f"    {what:<21} {np.median(pairs[:, 0]):8.0f} images/s, peer {np.median(pairs[:, 1]):6.0f},"
              f" {np.median(pairs[:, 0] / pairs[:, 1]):6.2f} x", flush=True)
    labels, scores = np.random.default_rng(0).random(10_000_000) < 0.5, np.random.default_rng(1).random(10_000_000)
    since = time.perf_counter()
    eer.eer(labels, scores)
    print(f"    EER of ten million scores: {time.perf_counter() - since:.2f} s")


# ---- README and the rest -------------------------------------------------------------------------------------

def test_readme_tables_are_complete():
    text = (HERE / "README.md").read_text()
    for what, names in (("loss", losses.LOSSES), ("architecture", models.ARCHS)):
        missing = [n for n in names if f"| `{n}` |" not in text]
        assert not missing, f"{what} table of README.md lacks {missing}"


def test_only_four_packages_are_imported():
    import ast
    allowed = {"torch", "torchvision", "numpy", "PIL", "data", "eer", "losses", "models", "train", "verify"}
    for file in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{file.name} imports {name}"
                assert file.name != "models.py" or top != "torchvision"


def main():
    torch.set_num_threads(min(2, os.cpu_count() or 1))
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
