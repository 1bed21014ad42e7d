"""The sanity suite: no network, no data, no GPU, under two minutes on two cores.

    python test_all.py                  # everything; the last line counts, the exit code is 0 only if all passed
    python test_all.py resume losses    # the tests whose names contain one of these words
    python test_all.py slow_losses_memorise_people_through_train slow_losses_cost       # minutes: by full name only

A test compares with something that cannot be wrong in the same way: a closed form, brute force in Python,
torchvision with copied weights, the same run without the interruption.
"""
import ast
import csv
import errno
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import reprlib
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import unicodedata
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from copy import copy, deepcopy
from fractions import Fraction
from functools import cache, partial
from io import BytesIO, StringIO
from itertools import combinations, product
from math import inf, nan
from os import environ
from pathlib import Path
from shutil import copytree, rmtree
from types import SimpleNamespace
from unittest import mock

# The tests named cuda and slow_bench see the GPU when asked for by name; the others want equal bits and fork(): a CPU.
GPU_HIDDEN = len(sys.argv) == 1 or any("cuda" not in word and word != "slow_bench" for word in sys.argv[1:])
GPUS_GIVEN = environ.get("CUDA_VISIBLE_DEVICES")
if GPU_HIDDEN:
    environ["CUDA_VISIBLE_DEVICES"] = ""
IN_PARALLEL = len(sys.argv) == 1 and (os.cpu_count() or 1) > 1

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from numpy.random import default_rng
from PIL import Image, ImageOps
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
CHANNELS_LAST = {"memory_format": torch.channels_last}
patched = mock.patch.object


# ---- Helpers -------------------------------------------------------------------------------------------------

class Skip(Exception):
    """Raised by a test that this machine cannot run."""


def to_double(value):
    """A tensor, array, list or number as a tensor of float64, without its gradient."""
    if torch.is_tensor(value):
        value = value.detach()
    return torch.as_tensor(np.asarray(value)).double()


def close(a, b, tolerance=1e-10):
    """a and b differ by at most tolerance, relative or absolute."""
    a, b = to_double(a), to_double(b)
    assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def raises(fragment, call, *args, kind=ValueError):
    """The call ends in an error of this kind, of one line that contains the fragment."""
    try:
        call(*args)
    except (kind, SystemExit) as e:
        assert isinstance(e, kind) and fragment in str(e) and "\n" not in str(e)
    else:
        raise AssertionError(f"no error about '{fragment}'")


def words(*argv):
    """The arguments of a command line: a string may hold several, a path is one."""
    found = []
    for argument in argv:
        if isinstance(argument, Path):
            found.append(str(argument))
        else:
            found += str(argument).split()
    return found


def ended(cwd, script, *argv):
    """(exit code, stdout, stderr) of a script's command line, in this process."""
    exit_code, out, err = 0, StringIO(), StringIO()
    with (chdir(cwd), patched(sys, "argv", [script.__name__, *argv]),
          redirect_stdout(out), redirect_stderr(err), ExitStack() as at_end):
        for number in signal.SIGINT, signal.SIGTERM:        # train.py has handlers of its own
            at_end.callback(signal.signal, number, signal.getsignal(number))
        try:
            runpy.run_path(script.__file__, run_name="__main__")
        except SystemExit as e:
            exit_code = e.code or 0
    return exit_code, out.getvalue(), err.getvalue()


def run(cwd, script, *argv, code=0):
    """(stdout, stderr) of a command line that ends with this exit code; with 2, stderr is one line."""
    exit_code, out, err = ended(cwd, script, *words(*argv))
    assert exit_code == code, (out, err)
    if code == 2:
        assert err.startswith("error: ") and err.count("\n") == 1
    return out, err


def refused(cwd, script, *argv):
    """The line with which a script refuses its arguments."""
    return run(cwd, script, *argv, code=2)[1]


def write_text(path, *parts):
    path.write_text("".join(parts))


def table(text):
    """The rows of a table with two columns, which two spaces or more divide."""
    return [re.split("  +", line.strip(), maxsplit=1) for line in text.strip().splitlines()]


def read_csv(path):
    """The rows of a CSV file as dictionaries of strings."""
    with path.open() as file:
        return list(csv.DictReader(file))


def full(*arguments):
    """In place of a system call: the answer of a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- Fixtures ------------------------------------------------------------------------------------------------

@cache
def faces():
    """A small set of synthetic faces in the homework's layout, made once; read-only for the tests."""
    folder = Path(tempfile.mkdtemp(prefix="faces"))
    data.synthesise(folder / "set", people=10, images=6, size=32)
    return folder / "set"


def decoded(files):
    return np.stack([data.decode(file, 32) for file in files])


def random_images(n, size=32):
    return default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def small_net():
    return models.make("swiftface", 16, 32)


def own_copy(tmp):
    """faces() in a folder of the test's own, without its packs."""
    return copytree(faces(), tmp / "set", ignore=shutil.ignore_patterns(".packs"))


TINY = "--arch swiftface --dim 16 --batch-size 16 --lr 0.02 --amp off"


def tiny(cwd, *more, code=0, epochs=2):
    """(stdout, stderr) of train.main on faces() with a small network."""
    return run(cwd, train, "--data", faces(), TINY, "--epochs", epochs, *more, code=code)


@cache
def trained():
    """The folder of a run on faces(), with a small best.pt; for reading only."""
    tiny(faces().parent, "--out run", epochs=1)
    return faces().parent / "run"


def checkpoint():
    return verify.load(trained() / "best.pt")


# ---- eer.py --------------------------------------------------------------------------------------------------

def many_pairs(cases, smallest):
    """(labels, scores) of `smallest` to 61 pairs, of both kinds; every second case has many ties."""
    rng = default_rng(0)
    for case in range(cases):
        n = rng.integers(smallest, 62)
        labels = rng.permutation(np.append([0, 1], rng.integers(0, 2, n - 2)))
        scores = rng.normal(size=n) + rng.normal() * labels
        if case % 2:
            scores = scores.round(case % 3)
        yield labels, scores


def share_accepted(scores, threshold):
    """An exact fraction, by counting."""
    accepted = (scores >= threshold).tolist()
    return Fraction(sum(accepted), len(accepted))


def accuracy(labels, scores, threshold):
    return np.mean((scores >= threshold) == labels)


def test_eer_is_the_crossing_of_the_interpolated_roc():
    """Against the anti-diagonal, point by point in exact fractions."""
    for labels, scores in many_pairs(200, 3):
        far = tar = 0
        for cut in np.unique(scores)[::-1]:
            far0, tar0 = far, tar
            far = share_accepted(scores[labels == 0], cut)
            tar = share_accepted(scores[labels == 1], cut)
            if far + tar >= 1:
                break
        fraction = (1 - far0 - tar0) / (far + tar - far0 - tar0)
        rate, threshold = eer.eer(labels, scores)
        close(rate, float(far0 + fraction * (far - far0)), 1e-12)
        assert scores.min() <= threshold <= scores.max()


def test_eer_of_perfect_inverted_and_constant_scores():
    labels = np.repeat([0, 1], 50)
    for sign, rate in (1, 0), (-1, 1), (0, 0.5):
        assert eer.eer(labels, sign * labels)[0] == rate


def test_eer_report_equals_counting():
    for labels, scores in many_pairs(40, 3):
        report = eer.report(labels, scores)
        genuine, impostor = scores[labels == 1], scores[labels == 0]
        higher, equal = genuine[:, None] > impostor, genuine[:, None] == impostor
        close(report["auc"], np.mean(higher + 0.5 * equal))
        close(report["acc"], max(accuracy(labels, scores, cut) for cut in [*scores, np.inf]))
        close(report["far"], np.mean(impostor >= report["threshold"]))
        close(report["frr"], np.mean(genuine < report["threshold"]))
        assert math.isnan(report["tar@far=1e-3"])           # some sixty impostors cannot tell
        assert " - " in eer.show(report)


def test_eer_report_interpolates_tar_at_far():
    for labels, scores in many_pairs(40, 40):
        far, tar, cuts = eer.roc(labels, scores)
        i = np.searchsorted(far, 0.1, "right")
        slope = (tar[i] - tar[i - 1]) / (far[i] - far[i - 1])
        reported = eer.report(labels, scores)["tar@far=1e-1"]
        close(reported, tar[i - 1] + slope * (0.1 - far[i - 1]))
        if len(cuts) > len(scores):                         # no two alike: the ROC is all steps
            close(reported, tar[far <= 0.1].max())


def test_eer_interval_covers_the_true_rate():
    rng = default_rng(1)
    covered = 0
    for _ in range(400):                                    # two normals 3 apart: true EER 6.68 %
        genuine, impostor = np.sort(rng.normal([[3], [0]], 1, (2, 200)))
        low, high = eer.interval(eer.crossing(genuine, impostor)[0], 200, 200)
        covered += low <= 0.0668072 <= high
    assert 0.91 < covered / 400 < 0.98


def test_eer_at_far_is_the_lowest_threshold_that_keeps_a_far():
    for labels, scores in many_pairs(80, 3):
        impostor = scores[labels == 0]
        for far in 0.001, 0.1, 0.29:
            threshold = eer.at_far(labels, scores, far)
            lower = np.nextafter(threshold, -9)
            assert np.mean(impostor >= threshold) <= far < np.mean(impostor >= lower)


def test_eer_best_threshold_lies_in_the_widest_of_the_best_gaps():
    for labels, scores in many_pairs(80, 20):
        cuts = np.unique(scores)
        ends = cuts[0], cuts[-1] + 1                        # accept all, refuse all: gaps of width 0
        middles, gaps = np.append((cuts[1:] + cuts[:-1]) / 2, ends), np.append(np.diff(cuts), (0, 0))
        accuracies = np.array([accuracy(labels, scores, middle) for middle in middles])
        threshold = eer.best_threshold(labels, scores)
        close(accuracy(labels, scores, threshold), accuracies.max())
        widest = gaps[accuracies > accuracies.max() - 1e-9].max()
        if widest > 0:
            nearest = np.abs(middles - threshold).argmin()
            close([gaps[nearest], middles[nearest]], [widest, threshold], 1e-9)


def test_eer_best_threshold_may_accept_or_refuse_all():
    for labels, scores in many_pairs(200, 3):
        for number in np.float64, np.float32, int:
            scores = scores.astype(number)
            best = accuracy(labels, scores, eer.best_threshold(labels, scores))
            close(best, eer.report(labels, scores)["acc"])
    labels, scores = np.repeat([0, 1, 0], [1, 1, 9]), np.repeat([-1, 0], [1, 10])
    assert eer.best_threshold(labels, scores) > 0           # 10 of 11 by refusing all
    assert eer.best_threshold(1 - labels, scores) == -1     # and by accepting all


def test_eer_folds_take_their_threshold_from_the_other_folds():
    for labels, scores in many_pairs(40, 20):
        folds, each = np.arange(len(labels)) % 4, []
        for fold in range(4):
            own, rest = folds == fold, folds != fold
            threshold = eer.best_threshold(labels[rest], scores[rest])
            each.append(accuracy(labels[own], scores[own], threshold))
        close(eer.folds_accuracy(labels, scores, folds), [np.mean(each), np.std(each, ddof=1) / 2])


def test_eer_reads_csv_files_and_names_the_bad_line(tmp):
    file = tmp / "c.csv"
    for content in b"\xef\xbb\xbfscore,label\r\n0.5,1\r\n\r\n-1,0\r\n", b"1,0.5\n0,-1\n":
        file.write_bytes(content)
        assert np.array_equal(eer.read(file), [[1, 0], [0.5, -1]])
    for content, place in (
            (b"1,0.5\n0,zero\n", "c.csv:2"),
            (b"1,0.5\n\x80\x02,\"\n", "c.csv:2"),
            (b"2,0.5\n", "c.csv:1"),
            (b"1,nan\n", "c.csv:1"),
            (b"\n", "c.csv: no scores"),
            (b"1,0.5\n", "c.csv: no scores"),
            (b'1,"' + b"0" * 200_000, "c.csv: field")):
        file.write_bytes(content)
        raises(place, eer.read, file)


def test_eer_refuses_what_has_no_eer():
    raises("label 2", eer.eer, [0, 2], [0.0, 1.0])
    raises("both kinds", eer.eer, [1, 1], [0.0, 1.0])
    raises("pair 1 has score nan", eer.eer, [0, 1], [0.0, nan])
    raises("3 labels but 2 scores", eer.eer, [0, 1, 1], [0.0, 1.0])


def test_eer_compares_files_in_a_table(tmp):
    write_text(tmp / "a.csv", "1,0.9\n0,0.1\n1,0.8\n0,0.2\n")
    write_text(tmp / "b.csv", "1,0.9\n0,0.1\n1,0.2\n0,0.8\n")
    out, _ = run(tmp, eer, "a.csv b.csv")
    head, _, a, b = [line.split() for line in out.splitlines()]
    assert head[1:4:2] == ["scores", "EER"]
    assert a[1:4:2] == ["a.csv", "0.00"] and b[1:4:2] == ["b.csv", "50.00"]
    assert a[-2] == "-"                                     # two impostors cannot tell FAR 1e-2


def test_eer_command_neither_waits_for_a_pipe_nor_for_a_reader(tmp):
    os.mkfifo(tmp / "pipe.csv")
    err = refused(tmp, eer, "pipe.csv")
    assert "pipe.csv: not a regular file" in err
    write_text(tmp / "a.csv", "1,0.9\n0,0.1\n")
    done = subprocess.run(f"{sys.executable} {eer.__file__} a.csv | true; exit ${{PIPESTATUS[0]}}", shell=True,
                          executable="/bin/bash", cwd=tmp, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- data.py -------------------------------------------------------------------------------------------------

def picture(path, seed=0, size=(40, 40)):
    """An image of noise, width times height; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = default_rng(seed).bytes(3 * math.prod(size))
    Image.frombytes("RGB", size, noise).save(path)
    return path


def pictures(folder, *names):
    for i, name in enumerate(names):
        picture(folder / name, i)


def homework(root):
    """The smallest set in the homework's layout; labels with gaps, names with spaces and accents. Returns the paths
    of labels.txt and val_pairs.txt."""
    pictures(root / "cls_data/train/images", "a b.jpg", "é.jpg", "c.jpg", "d.jpg")
    pictures(root / "ver_data", "a.jpg", "b.jpg", "c.jpg")
    labels, pairs = root / "cls_data/train/labels.txt", root / "val_pairs.txt"
    labels.write_text("a b.jpg 3\né.jpg 3\nc.jpg 7\nd.jpg 9")
    pairs.write_text("a.jpg b.jpg 1\nb.jpg c.jpg 0\n")
    return labels, pairs


def people_folder(root):
    """Four people with three images, and Ed with one."""
    for person in "Ann", "Bo", "Cy", "Di":
        pictures(root / person, "0.png", "1.png", "2.png")
    picture(root / "Ed/0.png")


def refuses(file, root, cases):
    """load() names the fragment when file has the text."""
    for text, fragment in cases.items():
        file.write_text(text)
        raises(fragment, data.load, root)


def test_data_loads_the_homeworks_layout_from_above(tmp):
    root = tmp / "above/HW"
    labels, _ = homework(root)
    labels.write_bytes("\ufeffa b.jpg 3\r\n\r\n\u00e9.jpg 3\r\nc.jpg 7 \r\nd.jpg 9\r\n".encode())
    picture(root / "cls_data/dev/images/x.png")
    write_text(root / "cls_data/dev/labels.txt", "x.png 7\n")
    picture(root / "cls_data/test/images/y.png")            # test without labels (Fall 2026)
    write_text(root / "test_pairs.csv", "image1,image2\nc.jpg,a.jpg\n")
    found = data.load(tmp / "above")
    assert found.root == root and not found.note
    assert found.names == ["3", "7", "9"] and found.train.labels.tolist() == [0, 0, 1, 2]
    assert found.dev.labels.tolist() == [1]
    assert found.test.labels is None and len(found.test.files) == 1
    assert found.val_pairs.labels.tolist() == [1, 0] and len(found.val_pairs.files) == 3
    files, left, right, labels, *_ = found.test_pairs
    assert [Path(file).name for file in files] == ["c.jpg", "a.jpg"]
    assert left == [0] and right == [1] and labels is None


def test_data_loads_one_folder_a_person(tmp):
    people_folder(tmp / "F24/cls_data/train")               # Fall 2024
    people_folder(tmp / "plain/nested")
    picture(tmp / "plain/nested/ver_data/0.png")            # nobody's folder
    assert len(data.load(tmp / "F24", holdout=0).names) == 5
    assert len(data.load(tmp / "plain", holdout=0).train.files) == 13


def test_data_holds_whole_people_out(tmp):
    people_folder(tmp / "nested")
    found = data.load(tmp, holdout=0.4, seed=1)
    assert "held out" in found.note and len(found.names) == 3 and "Ed" in found.names
    pairs = found.val_pairs
    for left, right, same in zip(pairs.left, pairs.right, pairs.labels):
        people = {Path(pairs.files[i]).parent.name for i in (left, right)}
        assert len(people) == 2 - same and not people & set(found.names)


def test_data_holds_dev_and_test_out_with_the_people(tmp):
    for split in "train", "dev", "test":
        people_folder(tmp / "cls_data" / split)
    found = data.load(tmp, holdout=0.4, seed=1)
    assert len(found.names) == 3
    for split in found.train, found.dev, found.test:
        assert {Path(file).parent.name for file in split.files} == set(found.names)
        assert len(split.files) == len(split.labels) == 7
    assert "2 of 5 people held out with all their images" in found.note


def test_data_draws_people_as_before_and_pairs_without_listing_all():
    labels = np.repeat(np.arange(9), [6000, 1, 2, 3, 4, 5, 6, 2, 2])
    files = [str(i) for i in range(len(labels))]
    tracemalloc.start()
    for seed in range(5):
        held_out, pairs = data.hold_out(files, labels, 0.5, seed)
        several = np.delete(np.arange(9), 1)
        people = several[default_rng(seed).permutation(8)[:4]].tolist()
        assert held_out == set(people)
        rows = np.array(pairs.files, int)
        left, right = labels[rows[pairs.left]], labels[rows[pairs.right]]
        assert ((left == right) == pairs.labels).all() and set(left) <= set(people)
        same = pairs.labels == 1
        drawn = {frozenset(pair) for pair in zip(pairs.left[same], pairs.right[same])}
        assert len(drawn) == same.sum() == pairs.labels.size // 2               # none twice
        counts = np.bincount(left[same], minlength=9)[people]
        close(counts, [min(10, math.comb((labels == person).sum(), 2)) for person in people])
    assert tracemalloc.get_traced_memory()[1] < 2 ** 24     # all pairs of 6,000 images are 2 GB
    tracemalloc.stop()


def test_data_pair_lists_lose_no_line_to_a_header(tmp):
    homework(tmp)
    for text, count in (
            ("a.jpg,b.jpg,1\nb.jpg,c.jpg,0\n", 2),
            ("image1,image2,label\na.jpg,b.jpg,1\nb.jpg,c.jpg,0\n", 2),
            ("a.jpg,b.jpg\nb.jpg,c.jpg\nc.jpg,a.jpg\n", 3),
            (",\na.jpg,b.jpg\n", 1)):
        write_text(tmp / "list.csv", text)
        pairs = data.read_pairs(tmp / "list.csv", tmp / "ver_data")
        assert len(pairs.left) == count and Path(pairs.files[0]).name == "a.jpg"
    write_text(tmp / "list.csv", "gone.jpg,b.jpg\na.jpg,b.jpg\n")
    raises("list.csv:1: no image 'gone.jpg'", data.read_pairs, tmp / "list.csv", tmp / "ver_data")


def test_data_finds_pairs_by_the_courses_other_names(tmp):
    _, pairs = homework(tmp)
    assert "no test_pairs: looked for test_pairs.txt, test_pairs.csv, test_pair.txt" in data.load(tmp).note
    text = pairs.read_text()
    pairs.unlink()
    write_text(tmp / "val_pair.csv", "one,two,same\n" + text.replace(" ", ","))
    write_text(tmp / "ver_data/test_pair.txt", "ver_data/a.jpg ver_data/b.jpg\n")
    found = data.load(tmp)
    assert found.val_pairs.labels.tolist() == [1, 0] and not found.note
    assert [Path(file).name for file in found.test_pairs.files] == ["a.jpg", "b.jpg"]
    with chdir(tmp / "ver_data"):
        for folder in ".", f"{tmp}/ver_data/":
            assert len(data.read_pairs("test_pair.txt", folder).files) == 2


def test_data_reads_lists_however_they_are_encoded(tmp):
    labels, pairs = homework(tmp)
    decomposed = partial(unicodedata.normalize, "NFD")      # as macOS spells accents, in a file's name or in a list
    (tmp / "cls_data/train/images/é.jpg").rename(tmp / "cls_data/train/images" / decomposed("é.jpg"))
    (tmp / "ver_data/a.jpg").rename(tmp / "ver_data/ä.jpg")
    texts = labels.read_text(), decomposed(pairs.read_text().replace("a.jpg", "ä.jpg"))
    for encoding in "utf-16", "utf-8":
        labels.write_text(texts[0], encoding)
        pairs.write_text(texts[1], encoding)
        found = data.load(tmp)
        assert len(found.train.files) == 4 and len(found.val_pairs.labels) == 2


def test_data_takes_nothing_left_behind_for_a_person(tmp):
    people_folder(tmp / "set/people")
    for name in ".ipynb_checkpoints/1.png", "__MACOSX/Ann/1.png", "run/curves.png", "Ann/._0.png":
        picture(tmp / "set/people" / name)
    picture(tmp / "set/old/curves.png")
    for run_file in "people/run/log.csv", "old/last.pt":
        (tmp / "set" / run_file).touch()
    found = data.load(tmp / "set", holdout=0)
    assert found.root == tmp / "set/people" and found.names == ["Ann", "Bo", "Cy", "Di", "Ed"]
    assert len(found.train.files) == 13 and not found.note
    homework(tmp / "above/HW")
    (tmp / "above/__MACOSX/HW/cls_data").mkdir(parents=True)
    assert data.load(tmp / "above").root == tmp / "above/HW"


def test_data_counts_and_names_what_it_skipped(tmp):
    people_folder(tmp)
    picture(tmp / "loose.png")
    for name in "Ann/a.heic", "Bo/b", "Bo/c", "Cy/d.txt", "list.txt":
        (tmp / name).touch()
    note = data.load(tmp).note
    assert "4 skipped, without an image's suffix: Ann/a.heic, Bo/b, Bo/c, .." in note
    assert "1 skipped, beside the people's folders: loose.png" in note and "list.txt" not in note
    pictures(tmp, "mix/images/1.png", "mix/2.png")
    pictures(tmp, "deep/Ann/1.png", "deep/Bo/2019/1.png")
    skipped = []
    assert data.read_split(tmp / "deep", skipped)[1] == ["Ann"] and skipped == [f"{tmp}/deep/Bo"]
    assert data.why_skipped(skipped[0]) == "folders without images of their own"
    skipped = []
    assert data.read_split(tmp / "mix", skipped) == ([f"{tmp}/mix/images/1.png"], None)
    assert skipped == [f"{tmp}/mix/2.png"]
    out, _ = run(tmp, data, "--data . --sheet sheet.png")
    assert "Ann/a.heic" in out


def test_data_calls_a_link_that_leads_nowhere_unreadable(tmp):
    homework(tmp)
    images = tmp / "cls_data/train/images"
    (images / "c.jpg").unlink()
    (images / "c.jpg").symlink_to("nothing.jpg")
    (images / "d.jpg").unlink()
    (images / "d.jpg").symlink_to("d.jpg")                  # a loop
    people_folder(tmp / "people")
    (tmp / "people/Ann/3.png").symlink_to("3.png")
    for folder, rows in (tmp, [0, 1]), (tmp / "people", [0, 1, 2]):
        files = data.load(folder, holdout=0).train.files[:4]
        assert len(files) == 4
        with redirect_stderr(StringIO()):
            _, readable = data.pack(files, 32, data.cache_folder(folder), max_unreadable=0.5)
        assert readable.tolist() == rows
        raises("not a readable image", data.pack, files, 32, data.cache_folder(folder))


def test_data_digest_of_a_set_knows_its_files_labels_and_pairs(tmp):
    labels, pairs = homework(tmp / "a")
    copytree(tmp / "a", tmp / "b")
    whole = data.set_digest(data.load(tmp / "a"))
    assert re.fullmatch("[0-9a-f]{16}", whole) and data.set_digest(data.load(tmp / "b")) == whole
    with chdir(tmp / "a"):
        assert data.set_digest(data.load(".")) == whole
    digests = {whole}
    for file, text in ((labels, "a b.jpg 3\né.jpg 3\nc.jpg 7\nd.jpg 7"),
                       (labels, "a b.jpg 3\né.jpg 3\nc.jpg 7"),
                       (pairs, "a.jpg b.jpg 1\nc.jpg b.jpg 0\n")):
        file.write_text(text)
        digests.add(data.set_digest(data.load(tmp / "a")))
    picture(tmp / "a/ver_data/b.jpg", 9, (41, 40))
    assert len(digests | {data.set_digest(data.load(tmp / "a"))}) == 5


def test_data_names_the_line_and_the_fault_of_labels_txt(tmp):
    labels, _ = homework(tmp)
    refuses(labels, tmp, {
        "gone.jpg 1\n": "labels.txt:1: no image 'gone.jpg'",
        "c.jpg 1 2\n": "labels.txt:1: no image 'c.jpg 1'",
        "c.jpg -1\n": "labels.txt:1",
        "c.jpg 1.5\n": "labels.txt:1",
        "c.jpg,1\n": "labels.txt:1",
        "c.jpg\n": "labels.txt:1",
        "c.jpg 1\nd.jpg 2\nc.jpg 3\n": "labels.txt:3: 'c.jpg' stands on an earlier line",
        "c.jpg " + "1" * 5000: "labels.txt:1",
        "c.jpg\0 1\n": "labels.txt:1: a zero byte",
        "../x.jpg 1\n": "leaves",
        "/x.jpg 1\n": "leaves",
        "c.jpg 1\nd.jpg 1\n": "one person",
        "\n": "no labelled"})


def test_data_names_the_line_and_the_fault_of_val_pairs_txt(tmp):
    _, pairs = homework(tmp)
    refuses(pairs, tmp, {
        "a.jpg gone.jpg 1\n": "val_pairs.txt:1: no image 'gone.jpg'",
        "": "no pairs",
        "a.jpg b.jpg 2\n": "label '2'",
        "a.jpg ../val_pairs.txt 1\n": "leaves",
        "a.jpg /a.jpg 1\n": "leaves",
        "a.jpg b.jpg\n": "val_pairs.txt:1: no label",
        "one two same\na.jpg b.jpg 1\n": "val_pairs.txt:1: 'one two same' names no image",
        "a.jpg b.jpg 1\nb.jpg c.jpg\n": "val_pairs.txt:2: 2 columns",
        "a.jpg b.jpg 1\na.jpg c.jpg 1\n": "every pair has label 1"})


def test_data_refuses_folders_that_are_no_set(tmp):
    homework(tmp / "both/one")
    homework(tmp / "both/two")
    pictures(tmp, "few/Ann/1.png", "few/Bo/1.png")
    (tmp / "empty").mkdir()
    raises("no such folder", data.load, tmp / "nothing")
    raises("no such folder", data.load, tmp / "both/one/val_pairs.txt")
    raises("no labelled training images", data.load, tmp / "empty")
    raises("several data sets", data.load, tmp / "both")
    homework(tmp / "both/one/more/two")
    raises(f"several data sets, as {tmp}/both/one and {tmp}/both/one/more/two", data.load, tmp / "both/one")
    raises("too few to hold", data.load, tmp / "few")
    pictures(tmp, "above/people/Ann/1.png", "above/people/Bo/1.png")
    (tmp / "above/val_pairs.txt").touch()
    raises("above/val_pairs.txt: the people's folders are in", data.load, tmp / "above")


def test_data_reads_lfw_lists(tmp):
    pictures(tmp / "lfw", "Ann_A/Ann_A_0001.jpg", "Ann_A/Ann_A_0002.png", "Ann_A/Ann_A_0003.jpeg",
             "Bo/Bo_0001.jpg", "Bo/Bo_0002.JPG", "C_D/C_D_0001.webp")

    def read(text):
        write_text(tmp / "t.txt", text)
        return data.read_pairs(tmp / "t.txt", tmp / "lfw")

    pairs = read("2\nAnn_A\t1\t3\nBo\t1\t2\nAnn_A\t2\tC_D\t1\nBo\t2\tAnn_A\t1\n")
    names = np.array([Path(file).name for file in pairs.files])
    assert names[pairs.left].tolist() == ["Ann_A_0001.jpg", "Bo_0001.jpg", "Ann_A_0002.png", "Bo_0002.JPG"]
    assert names[pairs.right].tolist() == ["Ann_A_0003.jpeg", "Bo_0002.JPG", "C_D_0001.webp", "Ann_A_0001.jpg"]
    assert pairs.labels.tolist() == [1, 1, 0, 0] and pairs.folds is None and len(names) == 6
    fold = "Ann_A\t1\t2\nBo\t1\tAnn_A\t3\n"
    pairs = read("3\t1\n" + fold * 3)
    assert pairs.labels.tolist() == [1, 0] * 3 and pairs.folds.tolist() == [0, 0, 1, 1, 2, 2]
    raises("2 pairs, but the first line announces 3 x 2 x 1", read, "3\t1\n" + fold)
    raises("t.txt:3: 'Bo", read, "1\nAnn_A\t1\t2\nBo\t1\tx\n")
    raises("t.txt:3: 'Bo", read, "1\nAnn_A\t1\t2\nBo\t1\t" + "1" * 5000)
    raises("names no image", read, "1" * 5000 + "\nAnn_A\t1\t2\n")
    raises("t.txt:2: no image", read, "1\nAnn_A\t1\t9\nBo\t1\tC_D\t1\n")
    raises("leaves", read, "1\n..\t1\t2\nBo\t1\tC_D\t1\n")


def test_data_describes_a_set_and_shows_it(tmp):
    for i, name in enumerate("Ann/0 Ann/1 Ann/2 Bo/0 Cy/0 Cy/1".split()):
        picture(tmp / f"set/{name}.png", i, (32, 32))
    shutil.copy(tmp / "set/Ann/0.png", tmp / "set/Cy/9.png")
    x = decoded(data.read_people(tmp / "set")[0])
    out, _ = run(tmp, data, "--data set --holdout 0 --sheet sheet.png")
    colours = x.reshape(-1, 3) / 255
    mean = " ".join(f"{v:.4f}" for v in colours.mean(0))
    deviation = " ".join(f"{v:.4f}" for v in colours.std(0))
    for part in ("7 images, 0 unreadable", "3 people with 1 to 3 images, median 3", "Cy/9.png = Ann/0.png",
                 "duplicates: 1 images", f"mean {mean}, standard deviation {deviation}"):
        assert part in out
    sheet = Image.open(tmp / "sheet.png").tobytes()
    for face in x:                                          # every face is on it, twice as large
        twice = Image.fromarray(face).resize((64, 64), Image.LANCZOS)
        assert twice.crop((0, 5, 64, 6)).tobytes() in sheet
    write_text(tmp / "set/Bo/1.png", "no image")
    out, err = run(tmp, data, "--data set --holdout 0 --sheet sheet.png")
    assert "8 images, 1 unreadable" in out and "at most 1% may be unreadable in training" in out
    assert "1 of 8 train are unreadable" in err


def colours(image):
    """For each colour of lines, the (n, 2) places, row and column, where an image has it."""
    image, places = np.asarray(image).astype(int), []
    for colour in data.COLOURS_OF_LINES:
        red_green_blue = list(bytes.fromhex(colour[1:]))
        distance = np.abs(image - red_green_blue).max(2)
        places.append(np.argwhere(distance < 30))
    return places


def drawn(series, axes=""):
    return np.asarray(data.plot(None, [("", "", "", series, axes)])).astype(int)


def centres(axes, *points):
    """Where a chart shows each point: (n, 2), column and row."""
    series = {}
    for i, (x, y) in enumerate(points):
        series[f"_{i}"] = [x], [y], "points"
    places = colours(drawn(series, axes))
    return np.array([places[i].mean(0)[::-1] for i in range(len(points))])


def test_data_plot_puts_points_where_they_belong():
    want = (52, 258), (229, 146), (406, 34)
    close(centres("", (0, 8), (5, 9), (10, 10)), want, 0.04)
    close(centres("logx", (0.01, 8), (1, 9), (100, 10)), want, 0.04)
    close(centres("logx logy", (0.01, 1), (1, 10), (100, 100)), want, 0.04)
    corner, right, upper = centres("equal", (0, 0), (3, 0), (0, 3))             # a right angle with equal sides
    close(right[0] - corner[0], corner[1] - upper[1], 0.03)
    close(right[1], corner[1], 2 / 300)
    close(upper[0], corner[0], 2 / 420)


def test_data_plot_leaves_out_what_has_no_place_on_the_axes():
    without = drawn({"": ([0.01, 100], [8, 10])}, "logx")
    for bad in 0, -1, nan, inf:
        assert np.array_equal(drawn({"": ([0.01, bad, 100], [8, 9, 10])}, "logx"), without)


def test_data_plot_fills_bars_and_ticks_logarithms():
    close(data.ticks(-3, 2, log=True), np.arange(-3, 3))
    close(10 ** data.ticks(0, 1, log=True), [1, 2, 5, 10])
    image = drawn({"": ([0, 1, 2], [0, 1], "bars")})
    blue = image[..., 2] - image[..., 0] > 40               # only the right half is filled, to the top
    assert blue[40:250, 240:400].all() and not blue[40:250, 60:220].any()


def test_data_shows_images_as_a_viewer_does(tmp):
    a = np.zeros((40, 40, 3), np.uint8)
    a[:20] = 200, 100, 50                                   # upper half coloured
    upright, wide = Image.fromarray(a), Image.new("RGB", (80, 40), "red")
    upright.quantize(4).save(tmp / "palette.png")
    upright.save(tmp / "plain.webp", lossless=True)
    wide.paste(upright, (20, 0))                            # the central square, not squeezed
    wide.save(tmp / "wide.png")
    upright.getchannel(0).save(tmp / "grey.png")
    upright.putalpha(0)                                     # on white paper
    upright.save(tmp / "clear.png")
    deep = np.arange(1600).reshape(40, 40) * 40
    Image.fromarray(deep.astype(np.uint16)).save(tmp / "deep.png")
    for name, want, tolerance in (
            ("palette.png", a, 2), ("plain.webp", a, 0), ("wide.png", a, 0), ("clear.png", 255, 0),
            ("grey.png", a[..., :1], 0), ("deep.png", np.round(deep[..., None] / 257), 0)):
        error = np.abs(data.decode(tmp / name, 40) - np.float64(want)).max()
        assert error <= tolerance
    sliver = picture(tmp / "sliver.png", 3, (1, 99))        # odd, but an image
    assert data.decode(sliver, 40).shape == (40, 40, 3)


def test_data_shows_long_integers_and_floats_in_their_full_range(tmp):
    ramp = np.linspace(0, 1, 1600).reshape(40, 40)
    for name, pixels in (
            ("unit", np.float32(ramp)),
            ("bytes", np.float32(ramp * 255)),
            ("words", np.int32(ramp * 65535)),
            ("long", np.int32(ramp * (2 ** 31 - 1)))):
        Image.fromarray(pixels).save(tmp / f"{name}.tif")
        error = np.abs(data.decode(tmp / f"{name}.tif", 40) - ramp[..., None] * 255).max()
        assert error <= 0.51
    for name, value in ("nan", nan), ("inf", inf), ("negative", -1), ("large", 1e9):
        pixels = np.where(ramp > 0.5, value, ramp)
        Image.fromarray(np.float32(pixels)).save(tmp / f"{name}.tif")
        with warnings.catch_warnings(action="error"):
            raises(f"{name}.tif: not a readable image (pixels from", data.decode, tmp / f"{name}.tif", 40)


def png_chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_data_shows_images_whose_metadata_are_odd(tmp):
    plain = picture(tmp / "plain.png", 1)
    want, content = data.decode(plain, 40), plain.read_bytes()
    long_text = zlib.compress(bytes(2 ** 24))
    odd = (png_chunk(b"zTXt", b"a\0\0" + long_text),
           png_chunk(b"iTXt", b"a\0\1\0\0\0" + long_text),
           png_chunk(b"iCCP", b"a\0\7strange"))
    for i, chunk in enumerate(odd):
        for place in 33, len(content) - 12:                 # after the header, before the end
            plain.write_bytes(content[:place] + chunk + content[place:])
            assert (data.decode(plain, 40) == want).all() and data.measure(plain) == (40, 40)
    turned = Image.Exif()
    turned[0x0112] = 6
    exif = turned.tobytes()
    Image.open(BytesIO(content)).save(tmp / "turned.png", exif=exif)
    with patched(Image.Exif, "tobytes", side_effect=ValueError):                # a tag that cannot be rewritten
        assert (data.decode(tmp / "turned.png", 40) == np.rot90(want, -1)).all()
    Image.open(BytesIO(content)).save(tmp / "odd.png", exif=exif[:9])
    assert (data.decode(tmp / "odd.png", 40) == want).all()


def test_data_turns_images_as_pillow_does(tmp):
    upright = Image.open(picture(tmp / "plain.png", 1))
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in "png", "tif":                         # Pillow turns TIFFs by itself
            file = tmp / f"turned.{suffix}"
            upright.save(file, exif=exif)
            theirs = ImageOps.exif_transpose(Image.open(file))
            assert data.rgb(file).tobytes() == theirs.tobytes()


def test_data_opens_regular_files_only(tmp):
    """Each of these would wait for ever."""
    labels, pairs = homework(tmp)
    files = [f"{tmp}/ver_data/{name}.jpg" for name in "abc"]
    cache = data.cache_folder(tmp)
    images, _ = data.pack(files, 32, cache)
    for kind in "*.npy", "*.txt":
        for file in cache.glob(kind):
            file.unlink()
            os.mkfifo(file)
        assert (data.pack(files, 32, cache)[0][[0, 1, 2]] == images[[0, 1, 2]]).all()
    for file in tmp / "ver_data/a.jpg", pairs, labels, cache / ".lock", tmp / "out":
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    raises("a.jpg: not a readable image (", data.decode, files[0], 32)
    assert data.measure(files[0]) is None
    for call in (lambda: data.load(tmp), lambda: data.read_pairs(pairs, tmp), lambda: data.lock(cache),
                 lambda: data.write(tmp / "out", b"")):
        raises(f"not a regular file: '{tmp}/", call, kind=OSError)


def test_data_names_the_unreadable_image(tmp):
    half = picture(tmp / "whole.png").read_bytes()[:90]
    for name, content, reason in (
            ("bomb.jpg", b"P6 60000 60000 255 " * 9, "(Image size (3600000000 pixels) exceeds limit"),
            ("cut.png", half, ""),
            ("text.png", b"no image", "(cannot identify"),
            ("empty.jpg", b"", "(cannot identify")):
        (tmp / name).write_bytes(content)
        raises(f"{name}: not a readable image {reason}", data.decode, tmp / name, 40)


def files_and_pack(tmp):
    """(101 image files, an empty folder, a function that packs the files there)."""
    cache = tmp / "cache"
    cache.mkdir()
    files = [str(picture(tmp / f"{i}.png", i, (30 + i % 3, 32))) for i in range(101)]
    return files, cache, partial(data.pack, files, 32, cache)


def packs_in(cache):
    return len(list(cache.glob("*.npy")))


def test_data_pack_decodes_once(tmp):
    files, cache, pack = files_and_pack(tmp)
    images, rows = pack()
    assert isinstance(images.pixels, np.memmap) and len(rows) == 101
    assert (images[[5, 3]] == [data.decode(files[5], 32), data.decode(files[3], 32)]).all()
    inner, _ = data.pack(files, 16, cache, crop=0.5)        # beside the other, not in its place
    assert (inner[[2]][0] == np.asarray(Image.open(files[2]))[8:24, 8:24]).all()
    assert packs_in(cache) == 2
    with patched(data, "decode", side_effect=AssertionError):
        pack()                                              # found again, not decoded again


def test_data_pack_decodes_as_asked_where_the_disk_is_full(tmp):
    files, cache, pack = files_and_pack(tmp)
    with patched(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0)):
        images, _ = pack()
    assert images.pixels is None
    assert (images[range(9)] == [data.decode(file, 32) for file in files[:9]]).all()
    with patched(os, "posix_fallocate", full):              # less room than was told
        assert pack()[0].pixels is None and not packs_in(cache)


def test_data_pack_follows_changed_files_and_leaves_out_the_unreadable(tmp):
    files, cache, pack = files_and_pack(tmp)
    pack()
    picture(Path(files[7]), 999, (32, 32))
    Path(files[8]).write_bytes(b"no image")
    with redirect_stderr(StringIO()) as err:
        images, rows = pack()
    assert (images[[7]][0] == data.decode(files[7], 32)).all() and packs_in(cache) == 1
    assert 8 not in rows and len(rows) == 100 and "1 of 101" in err.getvalue()
    Path(files[10]).write_bytes(b"")
    raises("2 of 101", pack)


def test_data_pack_leaves_nothing_half_built(tmp):
    files, cache, pack = files_and_pack(tmp)
    pack()
    Path(files[9]).touch()
    (cache / "train-64-0.1.tmp").touch()                    # of a build that was killed before
    with patched(data, "decode", side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
        pack()
    assert packs_in(cache) == 1 and not list(cache.glob("*.tmp"))


def as_npy(array):
    """The bytes of a .npy file."""
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_data_pack_is_made_anew_when_damaged(tmp):
    files, cache, pack = files_and_pack(tmp)
    del files[12:]
    Path(files[8]).write_bytes(b"no image")
    with redirect_stderr(StringIO()):
        images, rows = pack(max_unreadable=0.1)
        want = images[rows]
        target, listing = next(cache.glob("*.npy")), next(cache.glob("*.txt"))
        whole, lines = target.read_bytes(), listing.read_bytes()
        for file, content in (
                (target, bytes(len(whole))),
                (target, b""),
                (target, whole[:-1]),
                (target, whole + b"0"),
                (target, whole[:-999] + b"flipped" + whole[-992:]),
                (target, b"PK" + whole),
                (target, as_npy(np.zeros((12, 16, 16, 3), np.uint8))),
                (target, as_npy(np.zeros((12, 32, 32, 3), np.float32))),
                (listing, b""),
                (listing, lines + b"0\tme\n"),
                (listing, lines.replace(b"8\t", b"9\t")),
                (listing, b"\xff\n")):
            file.write_bytes(content)
            images, readable = pack(max_unreadable=0.1)
            assert readable.tolist() == rows.tolist() and (images[rows] == want).all()
            assert packs_in(cache) == 1
        listing.unlink()
        assert pack(max_unreadable=0.1)[1].tolist() == rows.tolist()
        with patched(data, "decode", side_effect=AssertionError):
            pack(max_unreadable=0.1)


def test_data_pack_takes_names_with_line_breaks(tmp):
    files, cache, pack = files_and_pack(tmp)
    for i in 3, 4:
        broken = tmp / f"a\n5\tb\r{i}.png"
        Path(files[i]).rename(broken)
        files[i] = str(broken)
    Path(files[4]).write_bytes(b"no image")
    for _ in range(2):
        with redirect_stderr(StringIO()):
            _, rows = pack()
        assert np.setdiff1d(range(101), rows).tolist() == [4]
    Path(files[3]).write_bytes(b"no image")
    raises("2 of 101", pack)


def test_data_pack_needs_no_memory_map(tmp):
    files, cache, pack = files_and_pack(tmp)
    no_map = patched(np, "memmap", side_effect=OSError(errno.ENODEV, "No such device"))
    with no_map:
        images, rows = pack()
        want = [data.decode(files[5], 32), data.decode(files[3], 32)]
        assert (images[[5, 3]] == want).all() and len(rows) == 101
    assert pack()[0].pixels is not None
    Path(files[1]).touch()
    real, renamed = os.replace, []

    def replace(old, new):                                  # Windows: it must be neither open nor mapped
        held = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert str(old) not in held and str(old) not in Path("/proc/self/maps").read_text()
        renamed.append(old)
        real(old, new)

    with patched(os, "replace", replace), no_map:
        pack()
    assert renamed


NO_CHANGE = dict.fromkeys(data.AUGMENT, 0)
WEAK = {name: short for name, (short, _, _) in data.AUGMENT.items()}
STRONG = {name: long for name, (_, long, _) in data.AUGMENT.items()}


def noise():
    torch.manual_seed(0)
    return torch.randint(256, (64, 32, 32, 3)).byte()


def dice_of(value):
    """Every random number of augment() is value, in 0..1."""
    return patched(torch, "rand", lambda *shape, device: torch.full(shape, value))


def test_data_augment_is_a_function_of_the_generator():
    x = noise()
    close(data.augment(x, NO_CHANGE), data.normalise(x), 1e-6)
    torch.manual_seed(3)
    first, second = data.augment(x, STRONG), data.augment(x, STRONG)
    assert not torch.equal(first, second) and first.abs().max() <= 1
    torch.manual_seed(3)
    assert torch.equal(first, data.augment(x, STRONG))
    torch.manual_seed(3)
    with patched(torch.compiler, "is_compiling", lambda: True):                 # the product that the compiler fuses
        close(data.augment(x, STRONG, kernel=lambda *rows: data.augment_kernel(*rows)), first, 1e-6)


def test_data_augment_mirrors_but_never_turns_upside_down():
    x = noise()
    close(data.augment(x, NO_CHANGE | {"mirror": 1}), data.normalise(x).flip(3), 1e-4)
    ramp = torch.arange(0, 256, 8).byte().view(1, 32, 1, 1)                     # bright below
    ramp = ramp.expand(200, 32, 32, 3)
    rows = data.augment(ramp, STRONG | {"erase": 0}).mean((1, 3))
    assert (rows[:, 27] > rows[:, 4]).all()


def test_data_augment_changes_colours_as_torchvision_does():
    blocks = noise()[:, :8, :8].repeat_interleave(4, 1).repeat_interleave(4, 2)     # mean grey: every fourth pixel's
    for name in "brightness", "contrast", "saturation":
        with dice_of(0.9):                                  # 0.8 in -1..1
            ours = data.augment(blocks, NO_CHANGE | {name: 0.5})
        adjust = getattr(torchvision.transforms.functional, f"adjust_{name}")
        theirs = adjust(blocks.permute(0, 3, 1, 2) / 255, 1 + 0.8 * 0.5)
        close(ours, theirs * 2 - 1, 3e-3)


def test_data_augment_moves_pixels_as_grid_sample_does():
    x = noise()
    with dice_of(0.9):
        ours = data.augment(x, NO_CHANGE | dict(rotate=20, shift=0.1, zoom=0.2))
    angle, shift = math.radians(0.8 * 20), 2 * 0.8 * 0.1
    cos, sin = math.cos(angle) * 1.2 ** 0.8, math.sin(angle) * 1.2 ** 0.8
    theta = torch.tensor([[cos, -sin, shift], [sin, cos, shift]]).expand(64, 2, 3)
    grid = F.affine_grid(theta, (64, 3, 32, 32), align_corners=False)
    theirs = F.grid_sample(data.normalise(x), grid, "nearest", "border", align_corners=False)
    assert ((ours - theirs).abs() < 1e-5).double().mean() > 0.998


def test_data_augment_erases_a_box():
    grey = (data.augment(noise(), NO_CHANGE | {"erase": 1}) == 0).all(1)
    share = grey.double().mean((1, 2))
    assert (share > 0.005).all() and (share < 0.17).all()
    assert torch.equal(grey, grey.any(1, True) & grey.any(2, True))             # a box: whole rows by whole columns


def test_data_epoch_batches_are_a_permutation_by_seed_and_epoch():
    labels, rows = np.zeros(130, int), np.arange(130)
    batches = data.epoch_batches(labels, rows, 16, 0, 0)
    assert batches.shape == (8, 16) and len(np.unique(batches)) == 128
    assert (batches == data.epoch_batches(labels, rows, 16, 0, 0)).all()
    assert (batches != data.epoch_batches(labels, rows, 16, 0, 1)).any()
    assert data.epoch_batches(labels, rows[:5], 16, 0, 0).shape == (1, 5)       # fewer images than a batch


def test_data_epoch_batches_of_k_images_a_person_leave_nobody_out():
    labels = np.repeat(np.arange(30), [1] * 10 + [3] * 10 + [9] * 10)
    rows, seen = np.arange(130), set()
    for epoch in range(30):
        seen.update(data.epoch_batches(labels, rows, 16, 0, epoch, per_person=4).ravel())
    assert seen == set(rows)


def test_data_epoch_batches_hold_distinct_people():
    uneven = np.repeat(np.arange(41), [900] + [10] * 40)    # one person has most of the images
    three, two = np.arange(3).repeat(20), np.arange(2).repeat(3)
    for labels, batch_size, people in (
            (uneven, 16, 4),
            (uneven, 10, 2),
            (uneven, 8, 2),
            (uneven, 150, 37),
            (three, 24, 3),
            (two, 64, 2)):
        rows, seen = np.arange(len(labels)), set()
        for epoch in range(9):
            batches = data.epoch_batches(labels, rows, batch_size, 0, epoch, per_person=4)
            assert abs(batches.size - len(rows)) < batch_size + 4
            for batch in labels[batches]:
                groups = batch.reshape(-1, 4)
                assert (groups == groups[:, :1]).all() and len(np.unique(groups)) == people
            seen.update(labels[batches].ravel())
        assert seen == set(labels)
    for flag in "--batch-size 7", "--per-person 4":
        raises(flag, data.epoch_batches, uneven, np.arange(1300), 7, 0, 0, 4)


def test_data_copies_without_waiting_from_pinned_memory_only():
    images, copies = np.zeros((4, 8, 8, 3), np.uint8), []

    def spy(self, device, non_blocking=False):
        copies.append((device.type, non_blocking))
        return self

    pinned = patched(torch.Tensor, "pin_memory", lambda self: self)
    on_device = patched(torch.cuda, "device", nullcontext)
    with patched(torch.Tensor, "to", spy), pinned, on_device:
        for device in "cpu", "mps", "cuda":
            list(data.batches(images, [np.arange(2)], torch.device(device)))
    assert set(copies) == {("cpu", False), ("mps", False), ("cuda", True)}
    formats = [data.memory_format(torch.device(device)) for device in ("mps", "cpu", "cuda")]
    assert formats == [torch.contiguous_format, torch.channels_last, torch.channels_last]
    x = noise()
    with patched(data, "memory_format", return_value=torch.contiguous_format):
        assert data.normalise(x).is_contiguous() and not data.normalise(x).is_contiguous(**CHANNELS_LAST)
    assert data.normalise(x).is_contiguous(**CHANNELS_LAST)


def cli_of(main, *argv, stdout=None, stderr=None):
    """(exit code, what stderr says, stdout, stderr) of data.cli(main) with such streams in place of the real ones."""
    err = stderr or StringIO()
    with patched(sys, "argv", ["a.py", *argv]):
        with redirect_stdout(stdout or StringIO()), redirect_stderr(err):
            try:
                data.cli(main)
                code = 0
            except SystemExit as e:
                code = e.code
            print("later")
            print("later", file=sys.stderr, flush=True)
    return code, err.getvalue() if isinstance(err, StringIO) else ""


def unread_pipe():
    end, start = os.pipe()
    os.close(end)
    return os.fdopen(start, "w", 1)


def test_data_cli_goes_on_when_nobody_reads():
    done = []

    def work():
        for _ in range(9):
            print("step", flush=True)
            print("step", file=sys.stderr)
        assert not sys.stderr.isatty() and not sys.stdout.isatty()
        data.Progress("decoding", 1).update(1)
        done.append(1)

    closed_stream = StringIO()
    closed_stream.close()
    for stream in unread_pipe(), closed_stream:
        assert cli_of(work, stdout=stream)[0] == 0
    assert cli_of(work, stderr=unread_pipe())[0] == 0
    for name in "stdout", "stderr":
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            with patched(sys, name, None), patched(sys, "argv", ["a.py"]):
                data.cli(work)
    assert len(done) == 5

    def fail():
        raise ValueError("no")

    assert cli_of(fail, stderr=unread_pipe())[0] == 2


def test_data_cli_works_on_and_reports_a_full_disk_at_the_end(tmp):
    def work():
        print("step", flush=True)
        (tmp / "result").touch()

    with open("/dev/full", "w") as full:
        code, said = cli_of(work, stdout=full)
    assert code == 2 and said.startswith("error: what was printed: No space left on device; make room")
    assert (tmp / "result").exists()


def test_data_cli_refuses_before_work(tmp):
    def out_of_memory():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    code, said = cli_of(out_of_memory)
    assert code == 2 and "--batch-size" in said
    for argument in "--data=--", "--holdout=--":
        code, said = cli_of(lambda: 1 / 0, argument)
        assert code == 2 and said.startswith(f"error: {argument[:-3]}: '--' is no value") and said.count("\n") == 2
    assert cli_of(lambda: 0, "--loss=ce", "--")[0] == 0
    gone, here = tmp / "gone", os.getcwd()
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        code, said = cli_of(lambda: 1 / 0)
    finally:
        os.chdir(here)
    assert code == 2 and "working folder has been deleted" in said


def test_data_homework_classes_work_in_a_data_loader(tmp):
    homework(tmp)
    transform = torchvision.transforms.ToTensor()
    images = data.ImageDataset(tmp / "cls_data/train", transform)
    pairs = data.ImagePairDataset(tmp / "ver_data", tmp / "val_pairs.txt", transform)
    x, labels = next(iter(torch.utils.data.DataLoader(images, batch_size=4)))
    assert x.shape == (4, 3, 40, 40) and labels.tolist() == [3, 3, 7, 9]
    one, two, match = next(iter(torch.utils.data.DataLoader(pairs, batch_size=4)))
    assert one.shape == two.shape == (2, 3, 40, 40) and match.tolist() == [1, 0]


def test_data_synthesise_writes_the_same_set_for_a_seed(tmp):
    for name in "ab":
        data.synthesise(tmp / name, people=8, images=2, size=32)
    files = [path.relative_to(tmp / "a") for path in (tmp / "a").rglob("*.*")]
    assert len(files) > 16
    for file in files:
        assert (tmp / "a" / file).read_bytes() == (tmp / "b" / file).read_bytes()
    before = (tmp / "b/answers.txt").stat()
    data.synthesise(tmp / "b", people=8, images=1, size=32)                     # another was first: its set stays
    assert (tmp / "b/answers.txt").stat() == before and len(list(tmp.iterdir())) == 2


def test_data_synthetic_faces_are_a_real_task():
    """Raw pixels, with or without their mean, do not tell people apart."""
    pairs = data.load(faces()).val_pairs
    x = torch.from_numpy(decoded(pairs.files)).float().flatten(1)
    for z in x, x - x.mean(1, keepdim=True):
        z = F.normalize(z)
        assert eer.eer(pairs.labels, verify.score(z[pairs.left], z[pairs.right]))[0] > 0.25


# ---- data.py: photographs to faces ---------------------------------------------------------------------------

ARCFACE = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])


def smooth_photograph(path, width, height):
    """Slow waves of colour, in which neighbouring pixels hardly differ. Returns the image as float64."""
    y, x = np.mgrid[:height, :width]
    period = max(12, min(width, height) / 9)
    waves = [np.sin(x / period + channel) * np.cos(y / period - channel) for channel in range(3)]
    image = np.stack(waves, 2) * 60 + 120
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.round().astype(np.uint8)).save(path)
    return image.round()


def turned_face(scale, angle, shift, rng):
    """Five landmarks: ArcFace's, scaled, turned, shifted, and each up to 3 % of the face off."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return ARCFACE @ np.array([(c, s), (-s, c)]) + shift + rng.uniform(-3, 3, (5, 2)) * scale


def umeyama(source, target):
    """(2, 3) similarity transform with the least squares of target - A source, by the paper's SVD."""
    source_mean, target_mean = source.mean(0), target.mean(0)
    covariance = (target - target_mean).T @ (source - source_mean) / len(source)
    u, d, v = np.linalg.svd(covariance)
    sign = np.array([1, np.linalg.det(u) * np.linalg.det(v)])
    rotation = (u * sign) @ v
    scale = (d * sign).sum() / (source - source_mean).var(0).sum()
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])


def brute_force_pixels(image, points, size):
    """(rows, columns, colours) of 500 pixels of the face that lie well within the photograph, each bilinear in
    float64; the middle of a pixel is a whole number."""
    transform = umeyama(points, ARCFACE * size / 112)
    back = np.linalg.inv(np.vstack([transform, (0, 0, 1)]))
    height, width, _ = image.shape
    pixels = []
    for row, column in default_rng(0).integers(0, size, (500, 2)):
        x, y, _ = back @ (column, row, 1)
        if not (3 < x < width - 4 and 3 < y < height - 4):
            continue
        i, j = int(y), int(x)
        top = image[i, j] * (j + 1 - x) + image[i, j + 1] * (x - j)
        bottom = image[i + 1, j] * (j + 1 - x) + image[i + 1, j + 1] * (x - j)
        pixels.append((row, column, top * (i + 1 - y) + bottom * (y - i)))
    rows, columns, colours = zip(*pixels)
    return np.array(rows), np.array(columns), np.array(colours)


def write_landmarks(path, landmarks, separator=" "):
    """Lines '<name> <ten numbers>' of {name: points (5, 2)}."""
    lines = []
    for name, points in landmarks.items():
        numbers = [f"{number:.4f}" for number in points.ravel()]
        lines.append(separator.join([name, *numbers]) + "\n")
    write_text(path, *lines)


def prepare(tmp, *flags, code=0):
    return run(tmp, data, "--data photos --prepare out", *flags, code=code)


def opened(path):
    return np.asarray(Image.open(path)).astype(float)


def test_prepare_by_landmarks_equals_brute_force_in_float64(tmp):
    rng = default_rng(0)
    images, landmarks = {}, {}
    cases = (1, 0, (60, 50)), (0.6, 0.5, (90, 40)), (1.9, -0.4, (10, 80)), (3.4, 0.2, (30, 10)), (7.5, -3, (900, 800))
    for i, (scale, angle, shift) in enumerate(cases):
        name = f"Ann B/{i}.png"
        side = round(250 * max(1, scale / 2))
        images[name] = smooth_photograph(tmp / "photos" / name, side, side + 20)
        landmarks[name] = turned_face(scale, angle, shift, rng)
    for size, separator in (112, " "), (80, ", "):
        write_landmarks(tmp / "points.txt", landmarks, separator)
        prepare(tmp, "--landmarks points.txt --size", size)
        transforms = data.read_landmarks(tmp / "points.txt", tmp / "photos")
        for name, points in landmarks.items():
            face = np.asarray(data.cut_face(str(tmp / "photos" / name), size, None, transforms)).astype(float)
            rows, columns, expected = brute_force_pixels(images[name], points, size)
            difference = np.abs(face[rows, columns] - expected).max()
            assert len(rows) > 300 and difference < 2.5     # Pillow cuts fractions off
            written = opened(tmp / "out" / name.replace(".png", ".jpg"))
            assert written.shape == face.shape and np.abs(written - face).mean() < 1.5
        rmtree(tmp / "out")


def test_prepare_reduces_large_photographs_without_aliasing(tmp):
    chessboard = np.indices((700, 700)).sum(0) % 2 * 255
    (tmp / "photos/Ann").mkdir(parents=True)
    Image.fromarray(chessboard.astype(np.uint8)).save(tmp / "photos/Ann/0.png")
    write_landmarks(tmp / "points.txt", {"Ann/0.png": ARCFACE * 6})
    prepare(tmp, "--landmarks points.txt")
    assert np.abs(opened(tmp / "out/Ann/0.jpg") - 127).max() < 12


def test_prepare_is_black_beyond_the_photograph(tmp):
    image = smooth_photograph(tmp / "photos/Ann/0.png", 60, 60)
    write_landmarks(tmp / "points.txt", {"Ann/0.png": ARCFACE - (40, 30)})      # the photograph begins at (40, 30)
    prepare(tmp, "--landmarks points.txt")
    by_landmarks = opened(tmp / "out/Ann/0.jpg")
    rmtree(tmp / "out")
    prepare(tmp, "--box=-40,-30,72,82")
    by_box = opened(tmp / "out/Ann/0.jpg")
    for face in by_landmarks, by_box:
        assert face[:24].max() < 3 and face[:, :40].max() < 3 and face[96:].max() < 3
        # with nothing to scale or turn it is the photograph itself; JPEG's blocks of eight cross the border
        assert np.abs(face[32:88, 40:96] - image[2:58, :56]).max() < 5


def test_prepare_gives_lfws_crop_back_by_box_and_by_landmarks(tmp):
    """Faces enlarged to 134 pixels and put at (58, 50) of 250x250, where LFW's funnelled images have them."""
    rng = default_rng(1)
    faces_in, landmarks = {}, {}
    (tmp / "photos/Ann").mkdir(parents=True)
    for i in range(4):
        name = f"Ann/{i}.png"
        faces_in[name] = Image.fromarray(data.face(data.person(rng), rng, 112))
        photo = Image.new("RGB", (250, 250), (90, 120, 30))
        photo.paste(faces_in[name].resize((134, 134), Image.BICUBIC), (58, 50))
        photo.save(tmp / "photos" / name)
        landmarks[name] = (ARCFACE + 0.5) * 134 / 112 - 0.5 + (58, 50)
    write_landmarks(tmp / "points.txt", landmarks)
    for flags in "--box 58,50,192,184", "--landmarks points.txt":
        prepare(tmp, flags)
        for name, face in faces_in.items():
            found = opened(tmp / "out" / name.replace(".png", ".jpg"))
            difference = {}
            for move in product((-1, 0, 1), (-1, 0, 1)):
                moved = np.roll(np.asarray(face, float), move, (0, 1))
                difference[move] = np.abs(found - moved)[4:-4, 4:-4].mean()
            assert min(difference, key=difference.get) == (0, 0) and difference[0, 0] < 4
        rmtree(tmp / "out")


def test_prepare_by_box_equals_pillows_crop_and_resize(tmp):
    path = tmp / "photos/Ann/0.png"
    smooth_photograph(path, 90, 120)
    prepare(tmp, "--box 10,20,80,90 --size 56")
    face = Image.open(path).crop((10, 20, 80, 90)).resize((56, 56), Image.LANCZOS)
    assert np.abs(opened(tmp / "out/Ann/0.jpg") - np.asarray(face)).max() < 5
    for box in "10,20,80,91", "80,20,10,90", "10,20,80", "a,b,c,d":
        assert "square" in prepare(tmp, "--box", box, code=2)[1]


def test_prepare_names_file_and_line_of_bad_landmarks(tmp):
    pictures(tmp / "photos", "Ann/0.png", "Ann/1.png")
    path = tmp / "points.txt"
    good = "Ann/1.png 38 51 73 51 56 71 41 92 70 92\n"
    # "left eye": once y stands before x, once the right eye and corner before the left ones
    for line, fragment in table("""
            Ann/0.png 5 5 5 5 5 5 5 5 5 5                             equal
            Ann/0.png 1 1 2 2 3 3 4 4 5 5                             one line
            Ann/0.png 10 20 70 50 40 35 12 21 66 48                   one line
            Ann/0.png 1.0 1 1.9 1 1.5 1.6 1.1 2.2 1.8 2.2             112 pixels
            Ann/0.png 900 900 2900 900 1900 2100 1000 3200 2800 3200  112 pixels
            Ann/0.png 51 38 51 73 71 56 92 41 92 70                   left eye
            Ann/0.png 73 51 38 51 56 71 70 92 41 92                   left eye
            Ann/0.png nan 51 73 51 56 71 41 92 70 92                  a point
            Ann/0.png 1e300 51 73 51 56 71 41 92 70 92                a point
            Ann/0.png 38 51 73 51 56 71 41 92 70                      five points
            Ann/0.png 38 51 73 51 nose 71 41 92 70 92                 nose
            Ann/9.png 38 51 73 51 56 71 41 92 70 92                   Ann/9.png
            ../0.png 38 51 73 51 56 71 41 92 70 92                    leaves
            Ann/1.png,38,51,73,51,56,71,41,92,70,92                   a second face"""):
        path.write_text(good + line)
        message = prepare(tmp, "--landmarks points.txt", code=2)[1]
        assert "points.txt:2: " in message and fragment in message
        assert sorted(os.listdir(tmp)) == ["photos", "points.txt"]


def test_prepare_lists_what_it_leaves_out(tmp):
    pictures(tmp / "photos", "Ann/0.png", "Ann/1.png", "Bo/0.png", "Cy/0.png")
    (tmp / "photos/Bo/1.png").write_bytes(b"no image")
    write_landmarks(tmp / "points.txt", {
        "Ann/0.png": ARCFACE / 3, "./Bo/0.png": ARCFACE / 3, "Bo/1.png": ARCFACE, "Cy/0.png": ARCFACE + 500})
    out, err = prepare(tmp, "--landmarks points.txt")
    assert "2 faces from 5 photographs" in out and "3 left out" in err
    listing = (tmp / "out/left_out.txt").read_text()
    for name, reason in ("Ann/1.png", "no landmarks"), ("Bo/1.png", "image file"), ("Cy/0.png", "black"):
        assert re.search(f"{name}\t.*{reason}", listing)
    files, labels = data.read_people(tmp / "out")
    assert labels == ["Ann", "Bo"] and [Path(file).name for file in files] == ["0.jpg", "0.jpg"]
    message = prepare(tmp, "--landmarks points.txt", code=2)[1]
    assert "there already" in message and data.read_people(tmp / "out")[0] == files
    picture(tmp / "photos/Ann/0.jpg")
    rmtree(tmp / "out")
    assert "both would be 0.jpg" in prepare(tmp, "--box 0,0,9,9", code=2)[1]


def test_prepare_takes_lfws_lists_of_people(tmp):
    people_folder(tmp / "photos")
    pictures(tmp / "photos", "Ana 2/0.png", "0000045/0.png", "7/0.png")
    for text, people in {
            "2\nAnn\t3\nEd\t1\n": ["Ann", "Ed"],
            "2\n1\nBo\t3\n2\nCy\t3\nDi\t3\n": ["Bo", "Cy", "Di"],
            "3\nAna 2\n0000045\n7 1\n": ["0000045", "7", "Ana 2"]}.items():     # names that end in numbers
        write_text(tmp / "people.txt", text)
        (tmp / "out").mkdir()                               # an empty folder is as good as none
        prepare(tmp, "--people people.txt")
        assert sorted(os.listdir(tmp / "out")) == people
        assert (tmp / "out" / people[0] / "0.png").read_bytes() == (tmp / "photos" / people[0] / "0.png").read_bytes()
        rmtree(tmp / "out")
    write_text(tmp / "people.txt", "1\nZoe\t3\n")
    assert "people.txt:2: no folder 'Zoe'" in prepare(tmp, "--people people.txt", code=2)[1]
    for flags in "--people x", "--box 0,0,9,9", "--as people":
        assert "--prepare" in refused(tmp, data, "--data photos", flags)
    (tmp / "photos/Nobody").mkdir()
    write_text(tmp / "people.txt", "Nobody\n")
    assert "people.txt: names nobody with a photograph" in prepare(tmp, "--people people.txt", code=2)[1]
    for flags in "--augment", "--holdout 0.5", "--sheet s.png":
        assert "does nothing with --prepare" in prepare(tmp, flags, code=2)[1]
    for share in "10", "-1", "nan", "inf":
        assert f"--holdout {share} is outside 0..0.9" in refused(tmp, data, "--data photos --holdout", share)
    assert "--size: does nothing" in prepare(tmp, "--size 0", code=2)[1]
    assert "--size 0" in prepare(tmp, "--size 0 --box 0,0,9,9", code=2)[1]


def test_prepare_as_homework_always_draws_the_same_and_keeps_people_apart(tmp):
    counts = [1, 2, 3, 4, 5] * 6
    person_of = {}                                          # by an image's bytes
    for i, count in enumerate(counts):
        for n in range(count):
            path = picture(tmp / f"photos/person {i:02d}/{n}.png", 100 * i + n, (12, 12))   # names as others have
            person_of[path.read_bytes()] = i
    prepare(tmp, "--as homework")
    found = data.load(tmp / "out")
    train = {person_of[Path(file).read_bytes()] for file in found.train.files}
    dev = [person_of[Path(file).read_bytes()] for file in found.dev.files]
    assert len(found.names) == len(train) == 20 and set(dev) == {p for p in train if counts[p] >= 4}
    answers = (tmp / "out/answers.txt").read_text().split()
    held_out = []
    for pairs, labels in (found.val_pairs, found.val_pairs.labels), (found.test_pairs, answers):
        people = [person_of[Path(file).read_bytes()] for file in pairs.files]
        for left, right, same in zip(pairs.left, pairs.right, labels):
            assert (people[left] == people[right]) == bool(int(same)) and pairs.files[left] != pairs.files[right]
        held_out.append(set(people))
    val, test = held_out
    assert not val & test and not (val | test) & train and found.test_pairs.labels is None
    digest = data.hashlib.sha256()
    for name in "cls_data/train/labels.txt", "val_pairs.txt", "test_pairs.txt", "answers.txt":
        digest.update((tmp / "out" / name).read_bytes())
    assert digest.hexdigest()[:16] == "a641a30acc928568"


def test_prepare_charts_have_ticks_at_whole_numbers_and_show_single_people(tmp):
    close(data.ticks(1, 3, whole=True), [1, 2, 3])
    close(data.ticks(1, 24, whole=True), [5, 10, 15, 20])
    halves, wholes = [(drawn({"": ([1, 3], [0, 9])}, axes)[150] < 240).all(1).sum() for axes in ("", "wholex")]
    assert halves > wholes                                  # of the grid's lines across row 150
    bars = {"": ([0.5, 1.5, 3.5, 7.5], [1000, 0, 1], "bars")}
    pixels = drawn(bars, "logx logy")
    filled = (np.abs(pixels - pixels[150, 60]).max(2) < 9).sum(0)
    assert filled[60] > 200 and filled[250] == 0 and filled[390] > 10


# ---- train.py ------------------------------------------------------------------------------------------------

def test_train_writes_what_it_promises_and_verify_follows_its_checkpoint(tmp):
    out, _ = tiny(tmp, "--crop 0.8")
    assert "first loss" in out
    folder = tmp / "runs/arcface_swiftface"
    rows = read_csv(folder / "log.csv")
    assert [r["epoch"] for r in rows] == ["1", "2"]
    assert list(rows[0]) == list(train.COLUMNS)
    for row in rows:
        assert all(math.isfinite(float(v)) for v in row.values())
    assert (tmp / "best.pt").resolve() == (folder / "best.pt").resolve()
    assert not verify.load(folder / "last.pt")["sums"].any()                    # each epoch's loss is its own
    ckpt = verify.load(tmp / "best.pt")
    assert ckpt["best"] == min(float(r["eer"]) for r in rows)
    packs = (faces() / ".packs").glob("*-32x08-*.npy")
    assert {f.name.split("-")[0] for f in packs} > {"train", "val_pairs"}

    out, _ = run(tmp, verify)                                                   # --ckpt best.pt is the default
    assert f"EER {100 * ckpt['best']:.2f} %" in out
    out, _ = run(tmp, verify, *first_pair())
    score = out.splitlines()[1].split()[1].strip(":;")
    close(float(score), float(ckpt["val"]["scores"][0]), 1e-4)
    wanted = len((faces() / "test_pairs.txt").read_text().splitlines())
    submission = read_csv(tmp / "submission.csv")
    assert list(submission[0]) == ["ID", "Label"]
    assert [row["ID"] for row in submission] == [str(i) for i in range(wanted)]

    tiny(tmp, epochs=1)                                                         # a second run takes its own folder
    assert (tmp / "runs/arcface_swiftface_2/best.pt").exists()
    tiny(tmp, "--out", folder, code=2)
    assert read_csv(folder / "log.csv") == rows


RUNS = (
    "--opt sgd",
    "--lr 1e-3 --loss curricular --ema .9",                                     # AdamW; a loss with buffers
    "--loss ce+0.1*triplet+0.003*center --per-person 2 --arch sphere4 --lr 1e-3 --ema .5",      # no batch norm
    "--loss elastic --arch convnext_atto",                                      # draws margins and paths
    "--opt muon --loss cosface --lr-end .3 --ema .9")


def same(a, b):
    """Two checkpoints are bit for bit alike, but for the clock."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a.keys() - {"seconds", "spent", "img_per_s", "out", "steps", "resume"}:
            same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        for u, v in zip(a, b, strict=True):
            same(u, v)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        both_nan = a != a and b != b
        assert a == b or both_nan


def same_runs(whole, parts):
    for file in "last.pt", "best.pt":
        same(verify.load(whole / file), verify.load(parts / file))
    same(read_csv(whole / "log.csv"), read_csv(parts / "log.csv"))
    assert not list(parts.glob("*.tmp"))


def interrupted(number, step):
    """A signal that comes while this step is at work."""
    real, calls = data.augment, itertools.count(1)

    def augment(*args):
        if next(calls) == step:
            os.kill(os.getpid(), number)
        return real(*args)
    return patched(data, "augment", augment)


def test_train_resumed_equals_uninterrupted(tmp):
    """After --steps, and after SIGINT and SIGTERM, which finish the step, save and say how to go on."""
    stops = (1, None), (2, signal.SIGINT), (3, None), (6, signal.SIGTERM), (4, None)    # of 6 steps, 3 an epoch
    with mock.patch.dict(models.CONVNEXT, atto=((1, 1, 1, 1), 16, 0.5)):        # small, drops much
        for i, (flags, (step, number)) in enumerate(zip(RUNS, stops)):
            whole, parts = tmp / f"whole{i}", tmp / f"parts{i}"
            tiny(tmp, flags, "--out", whole)
            if number:
                with interrupted(number, step):
                    out, _ = tiny(tmp, flags, "--out", parts, code=130)
                assert f"--resume --out {parts}" in out
            else:
                tiny(tmp, flags, "--out", parts, "--steps", step)
            assert verify.load(parts / "last.pt")["step"] == step
            run(tmp, train, "--resume --out", parts, "--steps 99")
            same_runs(whole, parts)
    err = refused(tmp, train, "--resume --out parts0 --lr .5 --seed 3")
    assert "--lr" in err and "--seed" in err and "--loss" not in err


class NoCopies(TorchDispatchMode):
    """Sees that no operation copies from one device to another."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert function is not torch.ops.aten._to_copy.default or out.device == args[0].device
        return out


@contextmanager
def waits_counted():
    """A list of the calls that would wait for a GPU."""
    calls = []

    def counted(name):
        real = getattr(torch.Tensor, name)

        def call(tensor, *args):
            calls.append(name)
            return real(tensor, *args)
        return patched(torch.Tensor, name, call)
    with ExitStack() as stack:
        for name in "item tolist __float__ __int__ __bool__ cpu numpy".split():
            stack.enter_context(counted(name))
        yield calls


def test_train_does_not_wait_for_the_device(tmp):
    """No .item(), float(), int() or bool() of a tensor per step, no numbers copied there: on a GPU each would wait."""
    with FakeTensorMode(), NoCopies():                      # a GPU of which only the shapes are there
        x = torch.empty(8, 32, 32, 3, dtype=torch.uint8, device="cuda")
        assert data.augment(x, STRONG).device.type == "cuda"
    counts = []
    nothing = verify.Evaluation({}, {}, {})
    for steps in 1, 2:
        with patched(verify, "evaluate", lambda *a, **options: nothing), waits_counted() as calls:
            tiny(tmp, "--out", f"n{steps}", "--steps", steps, "--ema .9 --loss adaface")
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def plain_loop(images, labels, epochs):
    """(net, average, head) after SGD with Nesterov momentum, by a loop without any of train.py's helpers."""
    torch.manual_seed(0)
    net = small_net().to(memory_format=torch.channels_last)
    head = losses.make("cosface", 16, 10, images=len(images))
    params, average = [*net.parameters(), *head.parameters()], deepcopy(net)
    speed = [torch.zeros_like(p) for p in params]
    for step, index in enumerate(np.concatenate(epochs)):
        train.seed_step(0, step, 0)
        x = data.augment(torch.from_numpy(images[index]), WEAK)
        loss = head(net(x), torch.from_numpy(labels[index]))
        grads = torch.autograd.grad(loss, params)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert norm > 0.5
        lr = 0.02
        if step > 0:
            lr *= 0.5 + 0.5 * math.cos(math.pi * (step - 1) / 5)
        with torch.no_grad():
            for p, g, v in zip(params, grads, speed):
                g = g * 0.5 / norm
                if p.ndim > 1:
                    g = g + 5e-4 * p
                v.mul_(0.9).add_(g)
                p -= lr * (g + 0.9 * v)
            for a, w in zip(average.parameters(), net.parameters()):
                a.lerp_(w, 9 / (10 + step))
    return net, average, head


def test_train_steps_as_a_plain_loop_does(tmp):
    """Schedule, decay, clipping, moving average, saving: six steps against a loop without any of train.py's helpers."""
    with patched(data, "write", wraps=data.write) as write:
        tiny(tmp, "--loss cosface --opt sgd --clip 0.5 --ema 0.9 --save-every 0 --out run")
    written = [call.args[0].name for call in write.call_args_list]
    assert written.count("last.pt") == 1 + 6 + 2            # start, steps, epochs
    files, labels = data.load(faces()).train
    epochs = [data.epoch_batches(labels, np.arange(len(files)), 16, 0, epoch) for epoch in (0, 1)]
    net, average, head = plain_loop(decoded(files), labels, epochs)
    ckpt = verify.load(tmp / "run/last.pt")
    for kind, module in ("model", net), ("ema", average), ("loss", head):
        for name, value in module.named_parameters():
            close(ckpt[kind][name], value, 1e-4)


def test_train_follows_the_size_of_the_set_and_logs_a_first_epoch_cut_short(tmp):
    tiny(tmp, "--steps 1 --out adam")
    assert verify.load(tmp / "adam/last.pt")["args"]["weight_decay"] == 1       # few images
    assert (tmp / "adam/log.csv").read_text().splitlines()[1].startswith("1,1,")


def test_train_amp_auto_follows_the_hardware():
    for fast, generation, cpu, gpu in (True, (8, 0), "bf16", "bf16"), (False, (7, 5), "off", "fp16"):
        with patched(torch.cpu, "_is_avx512_bf16_supported", lambda: fast, create=True), \
                patched(torch.cuda, "get_device_capability", lambda device: generation):
            assert [train.precision(torch.device(d)) for d in ("cpu", "cuda")] == [cpu, gpu]


def fp16_scale(factor):
    """The factor by which fp16 multiplies the loss at first."""
    return patched(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=factor))


def test_train_half_precision_is_the_backbones_alone(tmp):
    """Scaling the loss changes neither clipping nor step."""
    real, moved = losses.Loss.forward, {}
    torch.manual_seed(0)
    start = small_net().state_dict()
    for amp, dtype in ("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16):
        seen = []

        def forward(module, x, y):
            seen.append(x.dtype)
            return real(module, x, y)
        with fp16_scale(64.0), patched(losses.Loss, "forward", forward):
            tiny(tmp, f"--amp {amp} --clip 0.01 --opt sgd --lr 1 --steps 1 --out {amp}")
        assert seen == [dtype]
        after = verify.load(tmp / amp / "last.pt")["model"]
        moved[amp] = torch.cat([(after[k] - v).flatten() for k, v in start.items() if "weight" in k])
        assert F.cosine_similarity(moved[amp], moved["off"], 0) > 0.9
        assert abs(moved[amp].norm() / moved["off"].norm() - 1) < 0.1


def test_train_names_a_loss_that_is_not_finite_and_fp16_that_skipped_every_step(tmp):
    real, calls = losses.Loss.forward, itertools.count(1)

    def nan_at_step_5(*args):
        factor = nan if next(calls) == 5 else 1
        return real(*args) * factor

    def infinite_slope(module, x, y):
        return real(module, x, y) + (0 * x.square().sum()).sqrt()

    for out, flags, forward, saved, message in (
            ("nan", "--steps 5", nan_at_step_5, 3, "not finite at step 5"),
            ("slope", "--steps 1", infinite_slope, 0, "not finite at step 1"),
            ("fp16", "--amp fp16", infinite_slope, 0, "by step 3.*skipped.*--amp off")):
        with patched(losses.Loss, "forward", forward), fp16_scale(4.0):
            _, err = tiny(tmp, flags, "--out", out, code=2)
        ckpt = verify.load(tmp / out / "last.pt")
        assert re.search(message, err) and ckpt["step"] == saved
        assert all(torch.isfinite(v).all() for v in ckpt["model"].values())


def test_train_loses_nothing_it_saved(tmp):
    """A full disk, a killed write and a second process leave last.pt, best.pt and log.csv whole."""
    (tmp / "a").mkdir()
    (tmp / "a/log.csv").touch()                             # of a run that was killed before its first save
    tiny(tmp, "--out a", epochs=1)
    whole = {f.name: f.read_bytes() for f in (tmp / "a").iterdir()}
    more = "--resume --out a --epochs 2"
    with patched(os, "fsync", full):
        for script, flags in (train, more), (verify, "--ckpt a/best.pt --out a/log.csv"):
            assert "No space left on device; make room" in refused(tmp, script, flags)
    with data.lock(tmp / "a"):
        assert "another run is at work" in refused(tmp, train, more)
    assert whole == {f.name: f.read_bytes() for f in (tmp / "a").iterdir()}
    (tmp / "a/last.pt.1.tmp").touch()
    run(tmp, train, more)
    assert not list(tmp.glob("a/*.tmp")) and len(read_csv(tmp / "a/log.csv")) == 2


def test_train_links_best_leaves_the_users_own_file_alone_and_goes_on_where_neither_link_nor_copy_can_be(tmp):
    best = SimpleNamespace(out=tmp / "run", best_is_copied=False, writing=mock.Mock())
    best.out.mkdir()
    out = StringIO()
    with chdir(tmp), patched(os, "symlink", full), redirect_stdout(out):
        Path("best.pt").write_text("the user's own")
        train.link_best(best)
        assert "stays as it is" in out.getvalue() and Path("best.pt").read_text() == "the user's own"
        os.unlink("best.pt")
        for content in "first", "second":                   # a copy of ours is replaced by the next
            (best.out / "best.pt").write_text(content)
            train.link_best(best)
            assert Path("best.pt").read_text() == content
        with patched(data, "write", full):
            train.link_best(best)
    assert f"no best.pt here (No space left on device); it is {tmp}/run/best.pt" in out.getvalue()


def test_train_twice_at_once_decodes_once(tmp):
    """Two processes, one new data set: one pack, two folders, the same result."""
    own_copy(tmp)

    def task(rank):
        del environ["RANK"], environ["WORLD_SIZE"]          # they know nothing of each other
        return tiny(tmp, "--data set", epochs=1)[1]

    assert processes(2, task, tmp) == ["", ""]
    same(*(verify.load(tmp / f"runs/arcface_swiftface{end}/last.pt") for end in ("", "_2")))
    assert len(list(tmp.glob("set/.packs/*.npy"))) == 3 and not list(tmp.rglob("*.tmp"))


def test_train_fine_tunes_another_runs_backbone(tmp):
    first = checkpoint()                                    # of other people and another loss: only the backbone counts
    torch.save(first | {"names": ["Ann", "Bo"], "loss": {}}, tmp / "first.pt")
    tiny(tmp, "--init first.pt --freeze --loss tpe:k=8 --out second", epochs=1)
    second = verify.load(tmp / "second/best.pt")
    same(first["model"], second["model"])                                       # frozen, batch statistics included
    run(tmp, train, "--resume --out second --epochs 2")
    same(first["model"], verify.load(tmp / "second/last.pt")["model"])          # still frozen
    net, criterion = verify.build(second)
    assert not torch.equal(second["loss"]["terms.0.projection"], torch.eye(8, 16))
    assert verify.embed(net, np.zeros((3, 32, 32, 3), np.uint8), criterion.project).shape == (3, 8)
    assert "new: neck" in tiny(tmp, "--init first.pt --dim 8 --freeze --out third", epochs=1)[0]
    args = first["args"] | {"arch": "iresnet18"}
    weights = models.make("iresnet18", 16, 32).state_dict()
    torch.save(first | {"args": args, "model": weights, "ema": None}, tmp / "iresnet.pt")
    net = models.make("iresnet18", 8, 32)                   # the scale of its last batch norm stays 1
    with redirect_stdout(StringIO()):
        train.start_from(net, tmp / "iresnet.pt", "iresnet18", freeze=True)
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trainable and not any(name.endswith("5.weight") for name in trainable)
    assert "swiftface, not a resnet34" in tiny(tmp, "--init first.pt --arch resnet34", code=2)[1]


def test_train_lists_losses_and_architectures_wherever_help_stands(tmp):
    with patched(losses, "table", lambda: "losses"), patched(models, "table", lambda: "backbones"):
        for flags, name in table("""
                --loss=help                  losses
                --loss help --arch resnet34  losses
                --arch help --loss ce        backbones"""):
            assert run(tmp, train, flags)[0] == f"{name}\n"


def test_train_learning_rate_warms_up_then_falls_as_a_cosine():
    shares = [train.lr_factor(i, 100, 0.1) for i in range(100)]
    assert shares[0] == 0.1 and max(shares) == shares[9] == 1
    assert shares[10:] == sorted(shares[10:], reverse=True)
    close(shares[55], 0.5)
    with_end = [train.lr_factor(i, 100, 0.1, end=0.3) for i in range(100)]
    assert with_end[:10] == shares[:10]
    for share, value in zip(shares[10:], with_end[10:]):
        close(value, 0.3 + 0.7 * share)


def test_train_muon_brings_singular_values_near_one_and_keeps_the_vectors():
    for n, m in (12, 40), (40, 12), (8, 8):
        u, s, v = torch.linalg.svd(torch.randn(2, n, m), full_matrices=False)
        values = torch.linspace(1, 0.1, s.shape[1])
        x = u * values @ v
        found = u.mT @ train.orthogonalise(x) @ v.mT                            # diagonal, if the vectors are kept
        diagonal = found.diagonal(dim1=1, dim2=2)
        close(found, torch.diag_embed(diagonal), 1e-5)
        assert 0.68 < diagonal.min() and diagonal.max() < 1.21
        close(train.length(x).flatten(), values.norm().expand(2), 1e-6)


def muon_of_three_kernels():
    """(kernels, two of one shape; a matrix and a bias; the Muon of all of them)."""
    kernels = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4, 3, 3), (6, 4, 3, 3), (5, 6, 1, 1))]
    others = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))]
    groups = [{"params": [others[0]], "weight_decay": 0.5}, {"params": [others[1]], "weight_decay": 0.0}]
    return kernels, others, train.Muon(groups, kernels, 0.01)


def draw_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_train_muon_turns_kernels_by_the_formula_and_gives_the_rest_to_adamw():
    kernels, others, opt = muon_of_three_kernels()
    copies = [nn.Parameter(p.detach().clone()) for p in others]
    adamw = torch.optim.AdamW([{"params": [copies[0]], "weight_decay": 0.5}, {"params": [copies[1]]}], 0.01,
                              weight_decay=0, fused=True)
    opt.param_groups[-1]["lr"] = 0.3 / 20
    momenta = [0.0, 0.0, 0.0]
    for seed in range(3):
        before = [w.detach().clone() for w in kernels]
        draw_gradients(kernels + others, seed)
        for p, q in zip(copies, others):
            p.grad = q.grad.clone()
        opt.step()
        adamw.step()
        for i, (w, old) in enumerate(zip(kernels, before)):
            momenta[i] = 0.6 * momenta[i] + w.grad
            update = (w.grad + 0.6 * momenta[i]).flatten(1)
            o = train.orthogonalise(update[None])[0].view_as(w)
            new = old / old.norm() - 0.3 * o / o.norm()
            close(w, new / new.norm() * old.norm(), 1e-5)
        same(copies, others)


def test_train_muon_goes_on_from_its_saved_state_and_leaves_out_a_step_that_is_not_finite():
    kernels, others, opt = muon_of_three_kernels()
    draw_gradients(kernels + others, 0)
    opt.step()
    saved = deepcopy((kernels, others, opt.state_dict()))
    draw_gradients(kernels + others, 1)
    opt.step()
    after = deepcopy((kernels, others, opt.state_dict()))

    kernels, others, opt = muon_of_three_kernels()
    with torch.no_grad():
        for p, value in zip(kernels + others, saved[0] + saved[1]):
            p.copy_(value)
    opt.load_state_dict(saved[2])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    draw_gradients(kernels + others, 1)
    others[1].grad[0] = inf
    scaler.step(opt)
    same((kernels, others, opt.state_dict()), saved)
    draw_gradients(kernels + others, 1)
    opt.step()
    same((kernels, others, opt.state_dict()), after)


def test_train_optimizers_spare_norms_biases_and_scalars_and_muon_takes_kernels_alone():
    net, criterion = models.make("mobilefacenet", 16, 32), loss_of("normface")
    stem = next(net.parameters()).requires_grad_(False)
    params = [p for p in [*net.parameters(), *criterion.parameters()] if p.requires_grad]
    for name, groups in ("sgd", 2), ("adamw", 2), ("muon", 3):
        args = SimpleNamespace(opt=name, lr=4e-3, weight_decay=0.05)
        decayed, spared, *kernels = train.make_optimizer(args, net, params).param_groups
        assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
        assert len(decayed["params"]) > 1 and all(p.ndim > 1 for p in decayed["params"])
        assert all(p.ndim <= 1 for p in spared["params"])
        assert any(p.ndim == 0 for p in spared["params"])                       # the learned scale
        numbers = [len(group["params"]) for group in (decayed, spared, *kernels)]
        assert len(numbers) == groups and sum(numbers) == len(params)
    assert numbers[2] > 5
    for p in kernels[0]["params"]:
        assert p.ndim == 4 and p is not stem and p.shape[1] > 1                 # not depthwise
    sphere = models.make("sphere4", 16, 32)
    args.arch = "sphere4"
    raises("sphere4 has none", train.make_optimizer, args, sphere, list(sphere.parameters()))
    args.opt, one_class = "adamw", torch.nn.Parameter(torch.zeros(1, 16))       # a process's only row with --shard
    decayed, _ = train.make_optimizer(args, net, [one_class]).param_groups
    assert len(decayed["params"]) == 1


def test_train_refuses_in_one_line_before_any_work(tmp):
    for flags in ("--lr -1|--lr nan|--lr inf|--lr|--size 7|--colour 1|--epochs 0|--epochs 1.5|--steps 0|--holdout 2"
                  "|--ema 2|--seed -1|--dim 0|--dim 1000000000000|--batch-size 1|--device meta").split("|"):
        assert flags.split()[0] in tiny(tmp, flags, code=2)[1]
    for flags, fragment in table("""
            more                 more
            --opt rms            'adamw'
            --device cuda:99     cuda:99
            --loss arcfac        'arcface'
            --loss arcface:n=1   unknown argument 'n'
            --loss arcface:s=-1  s=-1
            --arch resnet35      resnet3
            --data nowhere       no such folder
            --resume --out x     last.pt
            --init x.pt          x.pt: no such"""):
        assert fragment in tiny(tmp, flags, code=2)[1]
    assert not (tmp / "runs").exists() and not (tmp / "best.pt").exists()

    own_copy(tmp)
    (tmp / "file").touch()
    (tmp / "taken").mkdir()
    (tmp / "taken/last.pt").touch()
    with patched(shutil, "which", lambda name: None):
        for flags, fragment in table("""
                --compile      C++ compiler
                --freeze       --init
                --out taken    holds a run
                --out file     not a folder
                --out file/x   not a folder
                --out set/run  lies inside --data"""):
            assert fragment in refused(tmp, train, "--data set", flags)
    assert not (tmp / "set/.packs").exists()                # before minutes of decoding


def test_train_out_of_memory_is_one_line_and_other_runtime_errors_keep_their_trace(tmp):
    with patched(data, "load", lambda *a: torch.empty(1 << 50)):
        assert "out of memory" in refused(tmp, train, "--data", faces())
    illegal = mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access was encountered"))
    raises("illegal memory access", data.cli, illegal, kind=RuntimeError)


def test_train_resumes_elsewhere_and_on_a_moved_set_but_not_on_one_that_changed(tmp):
    own_copy(tmp)
    tiny(tmp, "--data set --out run", epochs=1)
    for name, what in ("cls_data/train/labels.txt", "59 of 10 now"), ("val_pairs.txt", "or validation pairs"):
        lines = (tmp / "set" / name).read_text()
        write_text(tmp / "set" / name, lines[lines.index("\n") + 1:])           # without the first
        error = refused(tmp, train, "--resume --out run --epochs 2")
        assert "has changed since run/last.pt" in error and what in error
        write_text(tmp / "set" / name, lines)
    (tmp / "elsewhere").mkdir()
    run(tmp / "elsewhere", train, "--resume --out", tmp / "run", "--epochs 2")
    assert not (tmp / "elsewhere/data").exists()            # a checkpoint's paths are absolute: nothing was made
    os.rename(tmp / "set", tmp / "moved")
    run(tmp, train, "--resume --out run --data moved --epochs 3")
    assert len(read_csv(tmp / "run/log.csv")) == 3


def test_train_notes_arguments_that_are_hardly_meant_and_a_network_too_large_for_so_few_images(tmp):
    out, _ = tiny(tmp, "--loss arcface:m=30 --arch alexnet --size 96 --steps 1")
    assert re.search("note: .*radians", out) and "note: for so few images on a CPU" in out
    assert re.search("note: .*decides alone", tiny(tmp, "--loss ce+100*center --steps 1")[0])
    assert "note:" not in tiny(tmp, "--loss ce+0.003*center --steps 1")[0]
    assert "note: for so few" not in tiny(tmp, "--size 96 --steps 1")[0]


def test_train_shows_a_dash_for_what_was_not_measured(tmp):
    people_folder(tmp / "people")
    out, _ = tiny(tmp, "--data people --holdout 0 --out run", epochs=1)
    assert "nan" not in out and out.splitlines()[-2].split()[4:8] == ["-"] * 4


def test_train_writes_its_arguments_and_counts_the_images_seen(tmp):
    first = checkpoint()
    assert json.loads((trained() / "args.json").read_text()) == first["args"]
    assert first["seen"] == 3 * 16
    tiny(tmp, "--init", trained() / "best.pt", "--out second --steps 2")
    run(tmp, train, "--resume --out second --steps 99")
    assert verify.load(tmp / "second/last.pt")["seen"] == (3 + 6) * 16
    del first["seen"]                                       # as in a checkpoint from before it was counted
    assert verify.images_seen(first) == 3 * 16


def test_train_names_a_busy_machine_once():
    slow, fast = {"img_per_s": 30.0}, {"img_per_s": 100.0}
    busy = SimpleNamespace(log=[fast], busy_noted=False, out="run")
    with redirect_stdout(StringIO()) as out:
        for row in fast, slow, slow:
            train.note_busy_machine(busy, row)
    assert out.getvalue().count("OMP_NUM_THREADS") == 1


# ---- verify.py: checkpoints, embeddings, scores ----------------------------------------------------------------

def strange_checkpoints(folder):
    """Names of files in folder that are no checkpoints of ours; one of them would make folder/executed if run."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "executed"),)

    (folder / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": Evil()}, folder / "evil2.pt")
    torch.save({"state_dict": {}}, folder / "other.pt")
    torch.save({"face_checkpoint": 99}, folder / "newer.pt")
    torch.save({"face_checkpoint": 1, "x": torch.zeros(9999)}, folder / "bare.pt")
    (folder / "cut.pt").write_bytes((folder / "bare.pt").read_bytes()[:9000])
    (folder / "none.pt").touch()
    return [path.name for path in folder.glob("*.pt")]


def test_verify_and_train_refuse_strange_checkpoints_in_one_line(tmp):
    names = strange_checkpoints(tmp)
    (tmp / "run").mkdir()
    with warnings.catch_warnings(action="always", category=UserWarning):        # it would be a line of its own
        for name in ("missing.pt", *names):
            if name in names:
                shutil.copy(tmp / name, tmp / "run/last.pt")
            assert name in refused(tmp, verify, "--ckpt", name)
            assert "run/last.pt" in refused(tmp, train, "--resume --out run")
            assert name in refused(tmp, train, "--init", name, "--arch mobilefacenet --size 32 --data", faces())
    assert not (tmp / "executed").exists() and not (tmp / "runs").exists()


def test_verify_embeddings_are_the_same_in_any_batch_and_order():
    net = small_net().eval()
    images = random_images(21)
    x = data.normalise(torch.from_numpy(images))
    z = verify.embed(net, images)
    close(z.norm(dim=1), np.ones(21), 1e-6)
    close(z, verify.embed(net, images, batch_size=4), 1e-5)
    close(z[[7, 2]], verify.embed(net, images, rows=np.array([7, 2])), 1e-5)
    with torch.no_grad():
        close(z, F.normalize(net(x) + net(x.flip(3))), 1e-5)
        close(verify.embed(net, images, mirror="none"), F.normalize(net(x)), 1e-5)
        net.trunk[0].weight[0, 0, 0, 0] = nan
    raises("not finite", verify.embed, net, images)


def test_verify_closed_set_knows_the_images_that_the_classes_were_made_of():
    net, images = small_net().eval(), random_images(4)
    labels = np.array([0, 0, 1, 2])
    known = data.ImageSet(images, labels, np.arange(4))
    by_weight = losses.make("cosface", 16, 3)
    by_weight.weight.data = verify.centroids(verify.embed(net, images), labels, 3)
    by_centroid = losses.make("triplet", 16, 3)
    assert verify.closed_set(net, by_weight, known, known, 3) == (1, 1)
    assert verify.closed_set(net, by_centroid, known, known, 3) == (1, 1)
    other = data.ImageSet(images, np.array([0, 0, 0, 2]), np.arange(4))
    of_first_images = verify.closed_set(net, by_centroid, other, other, 3, per_centroid=1)
    z = verify.embed(net, images)
    nearest = (z @ z[[0, 3]].T).argmax(1)                   # the centroids are the first images of two people
    assert of_first_images[0] == np.mean(nearest.numpy() == [0, 0, 0, 1])


def test_verify_submission_has_header_and_ids_of_the_sample_that_fits_or_is_refused(tmp):
    def write(*scores):
        verify.write_submission(tmp / "s.csv", np.array(scores), tmp)

    raises("not finite", write, 0, nan)
    assert not (tmp / "s.csv").exists()
    write_text(tmp / "a_sample_submission.csv", "id,label\nx,0\n")
    write_text(tmp / "sampleSubmission.csv", "name,match\np7,0\n\np9,0\n")
    write(0.1, -1 / 3)
    assert (tmp / "s.csv").read_text() == f"name,match\np7,0.1\np9,{-1 / 3!r}\n"
    raises("a_sample_submission.csv: 1 rows", write, 0, 0, 0)
    raises("sampleSubmission.csv: 2 rows, but there are 3", write, 0, 0, 0)


def test_verify_metrics_are_what_their_names_say():
    def scores(criterion, name):
        _, similarity = verify.metric_of(criterion, name)
        return verify.score(z[:3], z[1:], similarity)

    z = F.normalize(torch.randn(4, 8))
    siamese = losses.make("siamese", 8, 3)
    distance_of_cosine = np.sqrt(2 - 2 * scores(losses.make("ce", 8, 3), "cosine"))
    close(scores(siamese, "euclidean"), -distance_of_cosine, 1e-6)
    tse = losses.make("tse:k=3", 8, 3)
    for name in None, "learned":
        close(scores(siamese, name), siamese.score(z[:3], z[1:]), 1e-6)
        project, _ = verify.metric_of(tse, name)
        assert project(z).shape == (4, 3)
    assert verify.metric_of(tse, "cosine") == (None, None)
    arcface = losses.make("arcface:s=30", 8, 3)
    raises("arcface:s=30.0,m=0.3 learned no metric", verify.metric_of, arcface, "learned")


# ---- verify.py: search -----------------------------------------------------------------------------------------

def few_values(rng, *shape):
    """Small integers: their products are exact in any order, and full of ties."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def test_verify_search_is_brute_force_ties_included():
    rng = default_rng(0)
    for i in range(60):
        gallery, probes = few_values(rng, rng.integers(1, 400), 4), few_values(rng, rng.integers(1, 9), 4)
        k, block = rng.integers(1, [12, 130])
        products = probes @ gallery.T
        wanted = np.argsort(-products, axis=1, kind="stable")[:, :k]
        if i % 2:
            gallery = gallery.astype(np.float16)
        scores, rows = verify.search(gallery, probes, k, block)
        assert (rows == wanted).all()
        assert (scores == np.take_along_axis(products, wanted, 1)).all()


def test_verify_search_takes_any_number_of_probes_and_any_similarity():
    rng = default_rng(0)
    gallery, probes = few_values(rng, 300, 4), few_values(rng, 8, 4)
    _, rows = verify.search(gallery, np.repeat(probes[:1], 1100, 0), 3)         # more than are searched at once
    wanted = np.argsort(-gallery @ probes[0], kind="stable")[:3]
    assert len(rows) == 1100 and (rows == wanted).all()
    scores, _ = verify.search(gallery, probes, 5, 64, lambda one, many: -(one - many).norm(dim=1))
    distances = np.linalg.norm(probes[:, None] - gallery, axis=2)
    close(scores, -np.sort(distances, 1)[:, :5], 1e-6)


def test_verify_search_keeps_no_more_than_a_few_blocks_of_a_memory_map(tmp):
    def measured(rows):
        release_pages(rows)
        resident.append(int(re.search(r"RssFile:\s+(\d+)", status.read_text())[1]))

    status, resident, release_pages = Path("/proc/self/status"), [], data.release_pages
    if not status.exists():
        raise Skip("no /proc to read the resident memory from")
    rng = default_rng(0)
    gallery = np.lib.format.open_memmap(tmp / "g.npy", "w+", np.float16, (1 << 20, 32))     # 64 MB
    where = rng.choice(len(gallery), 20, replace=False)
    probes = rng.normal(size=(20, 32)).astype(np.float16)
    gallery[:] = 0
    gallery[where] = probes
    gallery.flush()
    del gallery
    with patched(data, "release_pages", measured):
        mapped = np.load(tmp / "g.npy", mmap_mode="r")
        _, rows = verify.search(mapped, probes.astype(np.float32), 1)
    assert (rows[:, 0] == where).all()
    assert len(resident) == 256
    assert max(resident) - resident[0] < 16 << 10           # KB


def detection_rate(scores, right, mated, far):
    """Brute force: the most mated probes whose first match is right and above a threshold that keeps the rate."""
    others, best = scores[~mated], 0
    for threshold in [*others, *(others - 1)]:
        if np.mean(others > threshold) <= far:
            best = max(best, np.mean(right & (scores[mated] > threshold)))
    return best


def test_verify_identification_rates_are_brute_force():
    rng = default_rng(0)
    for _ in range(20):
        scores = rng.normal(size=90).round(1)
        hits, mated = rng.random((90, 5)) < 0.3, rng.random(90) < 0.6
        hits &= (hits.cumsum(1) == 1) & mated[:, None]
        right = hits[mated, 0]
        rates = verify.identification(scores, hits, mated)
        close(rates["rank1"], right.sum() / mated.sum())
        close(rates["rank5"], hits.any(1).sum() / mated.sum())
        for name in "1e-3", "1e-2", "1e-1":
            far, rate = float(name), rates[f"dir@far={name}"]
            if far * sum(~mated) < 1:
                assert math.isnan(rate)
            else:
                close(rate, detection_rate(scores, right, mated, far), 1e-12)


# ---- verify.py: its command line -------------------------------------------------------------------------------

def judge(cwd, *flags, code=0):
    """(stdout, stderr) of verify.py on trained()."""
    return run(cwd, verify, "--ckpt", trained() / "best.pt", *flags, code=code)


def answer(cwd, *flags):
    """What verify.py says about trained(), as an object."""
    out, _ = judge(cwd, "--json", *flags)
    return json.loads(out)


def refusal(cwd, *flags):
    """The line that verify.py ends with."""
    return judge(cwd, *flags, code=2)[1]


def val_scores():
    """(labels, scores) of the validation pairs in trained()'s best.pt."""
    val = checkpoint()["val"]
    return val["labels"].numpy(), val["scores"].numpy()


KAGGLE_TRUTH = "n0 n1 n2 n3 n4 n000000 n000000 n000000".split()


@cache
def older_kaggle():
    """A folder: known has five people with three images each; unknown_dev and unknown_test, alike, a fourth image of
    these and one of three strangers. The labels of unknown_dev lie beside it."""
    folder, images = faces().parent / "kaggle", faces() / "cls_data/train/images"
    (folder / "unknown_dev").mkdir(parents=True)
    for p in range(8):                                      # train_0000kp.jpg is image k of person p
        shutil.copy(images / f"train_00004{p}.jpg", folder / f"unknown_dev/{p}.jpg")
        if p < 5:
            (folder / f"known/n{p}").mkdir(parents=True)
            for file in images.glob(f"train_0000[012]{p}.jpg"):
                shutil.copy(file, folder / f"known/n{p}")
    copytree(folder / "unknown_dev", folder / "unknown_test")
    rows = [f"{p},{name}\n" for p, name in enumerate(KAGGLE_TRUTH)]
    write_text(folder / "verification_dev.csv", "id,label\n", *rows)
    return folder


@cache
def identified():
    """What verify.py says about the probes of older_kaggle(); it writes identification.csv, plots and g.npy there."""
    folder = older_kaggle()
    return answer(folder, "--gallery known --probes unknown_dev --plots plots --save-embeddings g.npy")


def embedded_by_hand():
    """Unit embeddings of older_kaggle(): (5, 3, 16) of the known people's images, (8, 16) of the probes."""
    net, _ = verify.build(checkpoint())
    files = sorted(older_kaggle().glob("known/*/*.jpg")) + sorted(older_kaggle().glob("unknown_dev/*.jpg"))
    z = verify.embed(net, decoded(files))
    return z[:15].view(5, 3, 16), z[15:]


def test_verify_identifies_probes_as_by_hand():
    found, folder = identified(), older_kaggle()
    known, probes = embedded_by_hand()
    cosines = probes @ F.normalize(known.sum(1)).T          # with the unit means of unit embeddings
    best, nearest = map(torch.Tensor.numpy, cosines.max(1))
    threshold = eer.at_far(*val_scores(), 1 - 0.99 ** (1 / 5))      # of five people none in 99 of 100 searches
    names = np.array([f"n{p}" for p in nearest])
    answers = np.where(best >= threshold, names, "n000000")
    rows = read_csv(folder / "identification.csv")
    assert rows == [{"id": str(i), "label": name} for i, name in enumerate(answers)]
    close([probe["score"] for probe in found["probes"]], best, 1e-5)
    assert [probe["nearest"][0] for probe in found["probes"]] == names.tolist()
    close(found["threshold"], threshold)
    close(found["rank1"], np.mean(nearest[:5] == range(5)))
    close(found["accuracy"], np.mean(answers == KAGGLE_TRUTH))
    assert found["mated"] == 5 and found["unmated"] == 3
    assert found["dir@far=1e-1"] is None
    assert Image.open(folder / "plots/ranks.png").height > 8 * 96


def test_verify_saved_embeddings_serve_as_gallery():
    found, folder = identified(), older_kaggle()
    lines = (folder / "g.txt").read_text().splitlines()
    names = [line.split("\t")[1] for line in lines]
    assert names == list(np.repeat(KAGGLE_TRUTH[:5], 3))
    assert np.load(folder / "g.npy").shape == (15, 16)
    again = answer(folder, "--gallery g.npy --probes unknown_test --far 1e-3 --out far.csv")
    for probe, probe_again in zip(found["probes"], again["probes"], strict=True):
        assert probe["nearest"] == probe_again["nearest"]
    assert "rank1" not in again                             # of test probes nothing is known, whatever lies beside
    labels, scores = val_scores()
    close(again["threshold"], scores[labels == 0].max(), 1e-9)                  # of so few impostors: above them all


def test_verify_names_nobody_without_a_threshold(tmp):
    folder = older_kaggle()
    error = refusal(tmp, "--mirror none --gallery", folder / "known", "--probes", folder / "unknown_dev")
    assert "has no threshold" in error and "--threshold-from" in error and not any(tmp.iterdir())


def test_verify_searches_one_image_and_tells_of_images_beside_the_people(tmp):
    probe = older_kaggle() / "unknown_dev/0.jpg"
    copytree(older_kaggle() / "known", tmp / "known")
    shutil.copy(probe, tmp / "known/loose.jpg")
    out, err = judge(tmp, "--json --gallery known --probes", probe)
    (found,) = json.loads(out)["probes"]
    close(found["score"], identified()["probes"][0]["score"], 1e-5)
    assert "known: 1 skipped, such as known/loose.jpg, beside the people's folders" in err
    out, _ = judge(tmp / "known", "--images . --save-embeddings ../z.npy")
    assert "15 images of ." in out and np.load(tmp / "z.npy").shape == (15, 16)
    assert (tmp / "z.skipped.txt").read_text() == "./loose.jpg: beside the people's folders\n"


def test_verify_numbers_all_probes_or_none(tmp):
    folder = older_kaggle()
    (tmp / "probes").mkdir()
    for i in range(101):
        shutil.copy(folder / "unknown_dev/0.jpg", tmp / f"probes/{i:03d}.jpg")
    (tmp / "probes/050.jpg").write_bytes(b"")
    assert "050.jpg" in refusal(tmp, "--probes probes --gallery", folder / "known")
    assert not (tmp / "identification.csv").exists()


def test_verify_overwrites_nothing_that_it_reads(tmp):
    shutil.copy(trained() / "best.pt", tmp / "best.pt")
    shutil.copy(older_kaggle() / "unknown_dev/0.jpg", tmp / "a.jpg")
    for flags in "--out best.pt", "--export best.pt", "--gallery g --probes a.jpg --out a.jpg":
        assert "this command reads it" in refused(tmp, verify, flags)


def test_verify_notes_that_other_people_are_held_out_now(tmp):
    people_folder(tmp / "people")
    tiny(tmp, "--data people --holdout 0.4 --out run", epochs=1)
    assert "has changed since training" not in run(tmp, verify, "--ckpt run/best.pt")[0]
    pictures(tmp, "people/Aaa/1.png", "people/Aaa/2.png")
    assert "has changed since training" in run(tmp, verify, "--ckpt run/best.pt")[0]


def test_verify_refuses_labels_of_other_probes(tmp):
    folder = older_kaggle()
    copytree(folder / "unknown_dev", tmp / "unknown_dev")
    write_text(tmp / "verification_dev.csv", "id,label\n0,n1\n")
    error = refusal(tmp, "--probes unknown_dev --gallery", folder / "known")
    assert "verification_dev.csv: 1 rows for the 8 images" in error


@cache
def lfw():
    """A folder with lfw/, ten people with two images each, and the same pairs twice in LFW's formats: pairs.txt of
    five folds and dev.txt without."""
    folder, files = faces().parent / "lfw_set", data.load(faces()).val_pairs.files
    for i in range(10):
        (folder / f"lfw/p{i}").mkdir(parents=True)
        shutil.copy(files[i], folder / f"lfw/p{i}/p{i}_0001.jpg")
        shutil.copy(files[i - 1], folder / f"lfw/p{i}/p{i}_0002.jpg")
    genuine = [f"p{i}\t1\t2\n" for i in range(10)]
    impostor = [f"p{i}\t1\tp{(i + 1) % 10}\t1\n" for i in range(10)]
    folds = []
    for i in range(0, 10, 2):
        folds += genuine[i:i + 2] + impostor[i:i + 2]
    write_text(folder / "pairs.txt", "5\t2\n", *folds)
    write_text(folder / "dev.txt", "10\n", *genuine, *impostor)
    return folder


def test_verify_lfw_pairs_give_accuracy_over_folds_pictures_and_rates_at_the_threshold_of_other_pairs(tmp):
    found = answer(lfw(), "--pairs pairs.txt --images lfw --threshold-from dev.txt --plots", tmp / "plots")
    labels, scores = eer.read(tmp / "plots/scores.csv")
    accuracy, error = eer.folds_accuracy(labels, scores, np.arange(20) // 4)
    close(found["folds_acc"], accuracy)
    close(found["folds_error"], error)
    close(found["eer"], eer.eer(labels, scores)[0])
    assert found["tar@far=1e-1"] is not None
    assert found["tar@far=1e-2"] is None
    assert set(os.listdir(tmp / "plots")) == {"roc.png", "scores.png", "hardest.png", "scores.csv"}
    moved = found["threshold_from"]
    threshold = eer.best_threshold(labels, scores)          # dev.txt has the same pairs in another order
    accepted = scores >= threshold
    close(moved["threshold"], threshold, 1e-5)
    close(moved["acc"], np.mean(accepted == labels))
    close(moved["far"], np.mean(accepted[labels == 0]))
    close(moved["frr"], np.mean(~accepted[labels == 1]))


def lfw_pairs():
    return "--pairs", lfw() / "pairs.txt", "--images", lfw() / "lfw"


def check_decision(tmp, flags, scores, threshold):
    """verify.py's decision on the first validation pair, of all of which scores and threshold are given."""
    labels, _ = val_scores()
    one = answer(tmp, flags, *first_pair())
    score = one["score"]
    close(score, scores[0], 1e-4)
    close(one["threshold"], threshold)
    assert one["same"] == (score >= one["threshold"])
    close(one["genuine_lower"], np.mean(scores[labels == 1] < score))
    close(one["impostor_higher"], np.mean(scores[labels == 0] >= score))


def first_pair():
    val = data.load(faces()).val_pairs
    return Path(val.files[val.left[0]]), Path(val.files[val.right[0]])


def test_verify_two_images_are_judged_by_the_validation_pairs(tmp):
    labels, cosines = val_scores()
    distances = -np.sqrt(2 - 2 * cosines)
    check_decision(tmp, "--metric cosine", cosines, eer.eer(labels, cosines)[1])
    check_decision(tmp, "--metric euclidean", distances, eer.eer(labels, distances)[1])
    check_decision(tmp, "--far 0.2", cosines, eer.at_far(labels, cosines, 0.2))
    no_threshold = answer(tmp, "--mirror none", *first_pair())                  # of that the checkpoint has no scores
    assert list(no_threshold) == ["checkpoint", "score"]
    text, _ = judge(tmp, *first_pair())                     # images may follow --ckpt
    assert "of a hundred genuine pairs of validation" in text
    assert "for FAR" in judge(tmp, "--far 0.1 --threshold-from", trained() / "best.pt", *first_pair())[0]


def test_verify_scores_the_homeworks_pairs_as_training_did_and_saves_embeddings(tmp):
    val, lines = data.load(faces()).val_pairs, (faces() / "val_pairs.txt").read_text()
    write_text(tmp / "pairs.csv", "a,b,label\n", lines.replace(" ", ","))
    pairs, images = "--pairs pairs.csv --images", faces() / "ver_data"
    found = answer(tmp, pairs, images)
    close(found["eer"], checkpoint()["best"])
    concat = answer(tmp, "--mirror concat --save-embeddings z.f16.npy " + pairs, images)
    assert concat["genuine"] == found["genuine"]
    z = np.load(tmp / "z.f16.npy")
    assert z.dtype == np.float16
    assert z.shape == (len(val.files), 32)
    answer(tmp, "--save-embeddings y.f16", pairs, images)
    assert np.load(tmp / "y.f16.npy").dtype == np.float16


def test_verify_refuses_arguments_that_do_not_go_together(tmp):
    assert "--far 2" in refusal(tmp, "--far 2")
    assert "--gallery" in refusal(tmp, "--probes x")
    assert "1 images; give two" in refusal(tmp, "a.jpg")
    assert "no metric" in refusal(tmp, "--metric learned")
    assert "no such folder" in refusal(tmp, "--gallery none")
    unlabelled = "--threshold-from", trained() / "best.pt", "--pairs", faces() / "test_pairs.txt"
    assert "pairs without labels" in refusal(tmp, *unlabelled, "--images", faces() / "ver_data")


def test_verify_judges_checkpoint_and_score_file_side_by_side(tmp):
    write_text(tmp / "other.csv", "1,0.9\n0,0.1\n1,0.2\n0,0.8\n")
    found = answer(tmp, "--plots plots --ckpt", trained() / "best.pt", "other.csv")
    assert list(found) == ["run", "other"]
    assert found["other"]["eer"] == 0.5
    assert min(map(len, colours(Image.open(tmp / "plots/roc.png"))[:2])) > 300  # a curve each
    assert not (tmp / "submission.csv").exists()
    one, test = found["run"], data.load(faces()).test
    close(one["combined"], 0.5 * one["dev_acc1"] + 0.5 * (1 - one["eer"]))
    net, criterion = verify.build(checkpoint())
    logits = criterion.logits(verify.embed(net, decoded(test.files), unit=False))
    hits = logits.topk(5)[1].numpy() == test.labels[:, None]
    close([one["test_acc1"], one["test_acc5"]], [hits[:, 0].mean(), hits.any(1).mean()])


def test_verify_names_several_checkpoints_by_what_tells_them_apart():
    for paths, names in table("""
            a/best.pt b/last.pt c.csv    a b c
            a/best.pt a/last.pt          a/best a/last
            a/run/best.pt b/run/best.pt  a/run/best b/run/best"""):
        assert verify.short_names([Path(path) for path in paths.split()]) == names.split()
    assert verify.short_names([Path("a.pt"), Path("a.pt")]) == [Path("a.pt"), Path("a.pt")]
    names = verify.short_names([Path("together.csv"), Path("b/best.pt")])       # the mean's name is taken by none
    assert "together" not in names and len(set(names)) == 2


def test_verify_several_checkpoints_together_are_the_mean_of_their_scores(tmp):
    best, last = trained() / "best.pt", trained() / "last.pt"
    found, scores = data.load(faces()), []
    val = found.val_pairs
    for path in best, last:
        net, criterion = verify.build(verify.load(path))
        scored, _ = verify.score_pairs(net, criterion, data.PairSet(decoded(val.files), val))
        scores.append(scored.scores)
    both = answer(tmp, "--out both.csv --threshold-from", best, "--ckpt", best, last)["together"]
    close(both["eer"], eer.eer(val.labels, np.mean(scores, 0))[0])
    close(both["threshold_from"]["threshold"], eer.best_threshold(val.labels, scores[0]), 1e-6)
    assert len(read_csv(tmp / "both.csv")) == len(found.test_pairs.left)
    pairs = "--pairs", faces() / "val_pairs.txt", "--images", faces() / "ver_data"
    assert "same test pairs" in refusal(tmp, "--out none.csv", *pairs, "--ckpt", best, last)


def test_verify_only_scores_of_the_same_pairs_have_a_mean():
    def mean(*digests):
        outcomes = []
        for i, digest in enumerate(digests):
            scores = verify.Scores(val.labels, np.full(len(val.labels), i), digest)
            outcomes.append(verify.Outcome({}, "", {"val_pairs": scores}))
        return verify.mean_scores(outcomes, "val_pairs")

    val, test = data.load(faces()).val_pairs, data.load(faces()).test_pairs
    stored, other = checkpoint()["val"]["mark"], verify.pairs_digest(test)
    elsewhere = val._replace(files=[f"/moved/{file}" for file in val.files])
    assert verify.pairs_digest(elsewhere) == stored != other
    assert mean(stored, other) is None
    assert (mean(stored, None).scores == 0.5).all()         # a file of scores does not tell its pairs


def test_verify_compares_runs_in_a_sorted_table_and_draws_the_plane(tmp):
    tiny(tmp, "--loss ce --dim 2 --lr 0.03 --out flat", epochs=1)
    (tmp / "empty").mkdir()
    out, err = run(tmp, verify, "--compare flat", trained(), "empty --json")
    assert "left out: empty/best.pt" in err
    one, two = json.loads(out)["runs"]
    assert one["EER"] <= two["EER"]
    flat, other = (one, two) if one["run"] == "flat" else (two, one)
    assert flat["loss"] == "ce" and other["run"] == str(trained()) and other["loss"] == "arcface:s=12.4,m=0.3"
    assert flat["--lr"] == "0.03" and other["--lr"] == "0.02" and "--seed" not in flat      # where they differ
    assert flat["images seen"] == other["images seen"] == 48
    net, criterion = verify.build(verify.load(tmp / "flat/best.pt"))
    assert flat["parameters"] == count(net) + count(criterion)
    run(tmp, verify, "--ckpt flat/best.pt --plots plots")
    for places in colours(Image.open(tmp / "plots/embeddings.png")):
        assert len(places) > 20                             # one colour a person


# ---- verify.py: what it refuses, before anything is lost -------------------------------------------------------

def with_field(ckpt, path, value):
    """A copy of a checkpoint with another value at args/size, log/0/epoch and their like."""
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
    changed = holder = copy(ckpt)
    for key in parents:
        holder[key] = copy(holder[key])
        holder = holder[key]
    holder[last] = value
    return changed


def check_refused(ckpt, field):
    """The checks of load() and check_resumable() refuse the checkpoint in one line that names file and field."""
    def check():
        verify.check_fields(ckpt, "x.pt")
        verify.check_resumable(ckpt, "x.pt")
    raises(field, check)


FIELDS = """args args/size args/dim args/seed args/epochs args/batch_size args/lr args/warmup args/crop args/holdout
    args/rotate args/arch args/loss args/data args/opt args/amp args/shard args/steps args/init names names/0 step
    images spent best spec model loss ema frozen log log/0 log/0/epoch log/0/step log/0/loss sums scaler opt opt/state
    opt/state/0 opt/state/0/exp_avg opt/param_groups opt/param_groups/0 opt/param_groups/0/betas
    opt/param_groups/0/params""".split()
FITTING = dict(table("""
    args/steps  None
    args/init   None abc
    ema         None
    frozen      []
    scaler      {}
    args/data   abc
    names/0     abc
    args/shard  True
    best        nan -1
    log         []
    spec        abc
    opt/state   {}
    log/0/loss  nan -1"""))


def test_verify_refuses_any_wrong_field_of_a_checkpoint_and_names_it():
    ckpt = verify.load(trained() / "last.pt")
    verify.check_resumable(ckpt, "last.pt")
    for path in FIELDS:
        field = path.split("/")[-1]
        if path == "args/loss" or field.isdecimal():
            field = "x.pt"                                  # losses.make() names it in its own words
        for value in nan, -1, None, "abc", [], {}, True, torch.zeros(2), {"x": "y"}, [[]]:
            text = "tensor" if torch.is_tensor(value) else str(value)
            if text not in FITTING.get(path, "").split():
                check_refused(with_field(ckpt, path, value), field)


def test_verify_refuses_fields_outside_their_range_and_too_large_losses_at_once(tmp):
    ckpt = verify.load(trained() / "last.pt")
    started = time.process_time()
    for path, value in (("args/size", 31), ("args/dim", 65536), ("args/holdout", 1.5),
                        ("spec", "tse:k=100000000"), ("names", ["x"] * 10 ** 6), ("args/seed", 2 ** 40)):
        changed = with_field(ckpt, path, value)
        torch.save(changed, tmp / "x.pt")
        error = refusal(tmp, "--ckpt x.pt")
        assert "x.pt" in error
    check_refused(with_field(ckpt, "args/loss", "tse:k=100000000"), "tse:k=100000000")
    assert time.process_time() - started < 60
    for old in "data_digest", "seen", "spent":              # which older ones lack
        del ckpt[old]
    del ckpt["args"]["crop"]
    torch.save(ckpt, tmp / "old.pt")
    verify.check_resumable(verify.load(tmp / "old.pt"), "old.pt")


def test_verify_refuses_validation_scores_that_are_none(tmp):
    ckpt = checkpoint()
    nans = torch.full((20,), nan)
    for path, value in (("val", "abc"), ("val", {}), ("val/labels", torch.full((20,), 2)), ("val/scores", nans),
                        ("val/scores", torch.zeros(3)), ("val/labels", torch.zeros(20)), ("val/mark", 5)):
        torch.save(with_field(ckpt, path, value), tmp / "x.pt")
        raises("its val", verify.load, tmp / "x.pt")


def test_train_resume_refuses_a_wrong_field_and_leaves_last_pt(tmp):
    copytree(trained(), tmp / "run")
    for path, value in ("log", [5]), ("step", "x"), ("sums", torch.zeros(2)), ("args/lr", []):
        torch.save(with_field(verify.load(trained() / "last.pt"), path, value), tmp / "run/last.pt")
        before = (tmp / "run/last.pt").read_bytes()
        error = refused(tmp, train, "--resume --out run")
        assert "last.pt" in error and path.split("/")[-1] in error
        assert (tmp / "run/last.pt").read_bytes() == before


def test_verify_refuses_flipped_bits_of_a_checkpoint(tmp):
    content, rng = (trained() / "best.pt").read_bytes(), default_rng(0)
    wanted, flips = checkpoint(), 0
    for place in rng.integers(0, len(content), 40):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        (tmp / "x.pt").write_bytes(flipped)
        try:
            found = verify.load(tmp / "x.pt")
        except ValueError as e:
            assert "x.pt: not a checkpoint of train.py (damaged)" in str(e)
            flips += 1
        else:                                               # in what lies between the files of the archive
            same(found, wanted)
    assert flips > 20


def test_verify_reads_regular_files_only(tmp):
    for name in "x.pt", "x.npy":
        os.mkfifo(tmp / name)
    write_text(tmp / "x.txt", "a\t\n")
    (tmp / "folder.pt").mkdir()
    assert "not a regular file" in refusal(tmp, "--ckpt x.pt")
    assert "not a regular file" in refusal(tmp, "--ckpt folder.pt")
    assert "not a regular file" in refusal(tmp, "--gallery x.npy --probes", older_kaggle() / "unknown_dev")


def test_verify_save_embeddings_overwrites_its_own_files_only(tmp):
    for text in "1\t2\n", "a.jpg b.jpg\n", "":
        write_text(tmp / "mine.txt", text)
        assert "give another name" in refusal(tmp, "--save-embeddings mine.npy", *lfw_pairs())
        assert (tmp / "mine.txt").read_text() == text and not (tmp / "mine.npy").exists()
    np.save(tmp / "other.npy", np.zeros(3))
    assert "give another name" in refusal(tmp, "--save-embeddings other.npy", *lfw_pairs())
    for _ in range(2):
        judge(tmp, "--save-embeddings ours.npy", *lfw_pairs())
    write_text(tmp / "ours.txt", "a list of pairs\n" * len(np.load(tmp / "ours.npy")))
    assert "give another name" in refusal(tmp, "--save-embeddings ours.npy", *lfw_pairs())


def test_verify_takes_unit_rows_of_any_number_type_and_refuses_others(tmp):
    write_text(tmp / "g.txt", *(f"{i}.jpg\tp{i}\n" for i in range(4)))
    unit = np.eye(4)
    for dtype in np.int64, np.int8, np.float16, np.float32, np.float64, ">f4":
        np.save(tmp / "g.npy", unit.astype(dtype))
        found = verify.load_embeddings(tmp / "g.npy")
        assert isinstance(found.z, np.memmap) and found.z.dtype == dtype
        _, rows = verify.search(found.z, unit, 1)
        assert rows[:, 0].tolist() == [0, 1, 2, 3]
    for wrong in 25, 0, nan, inf:
        np.save(tmp / "g.npy", np.where(np.arange(4)[:, None] == 2, wrong * unit, unit))
        raises("g.npy: row 2 has the length", verify.load_embeddings, tmp / "g.npy")
    for content in b"PK\3\4garbage", b'\x93NUMPY\1\0\x08\0{"a":(((':
        (tmp / "g.npy").write_bytes(content)
        raises("not what --save-embeddings wrote", verify.load_embeddings, tmp / "g.npy")
        raises("give another name", verify.check_replaceable, tmp / "g.npy")
    raises("a tab or a line break", verify.save_embeddings, tmp / "t.npy", verify.Embedded(unit, ["a\tb"] * 4, None))
    for strange in unit.astype(complex), unit.astype(str), unit.astype(object):
        np.save(tmp / "g.npy", strange)
        raises("save it anew", verify.load_embeddings, tmp / "g.npy")


USELESS = """--far 0.1|--images x|--pool none|--data x --pairs y|--gallery g --far 0.1|--gallery g --plots p
    --gallery g --out o|--pairs p --pool none|--compare r --mirror none|--compare r --metric cosine|--compare r --out o
    --gallery g --data x|--gallery g --probes p --pairs q|--export e --out o|--images x --save-embeddings e --far 0.1
    --ckpt a.pt s.csv --threshold-from x|--ckpt s.csv --metric cosine|--ckpt s.csv --out o|--pairs p --far 0.1
    a.jpg b.jpg --out o|a.jpg b.jpg --plots p|a.jpg b.jpg --data x"""


def test_verify_refuses_flags_that_do_nothing(tmp):
    for flags in USELESS.replace("\n", "|").split("|"):
        assert "does nothing" in refused(tmp, verify, flags)
    assert not any(tmp.iterdir())


def test_verify_says_first_which_model_it_is(tmp):
    (tmp / "best.pt").symlink_to(trained() / "best.pt")
    text, _ = run(tmp, verify, "--ckpt best.pt", *first_pair())
    first = text.splitlines()[0]
    assert first.startswith(f"{trained()}/best.pt: epoch 1, step 3, arcface:s=12.4,m=0.3, swiftface, 20")
    told = answer(tmp, *first_pair())["checkpoint"]
    assert told["run"] == str(trained()) and told["epoch"] == 1 and told["arch"] == "swiftface"


def test_verify_writes_before_it_prints_and_where_it_writes_only(tmp):
    def access(path, mode):
        return real(path, mode) and Path(path) != tmp

    real = os.access
    with patched(os, "access", access):
        judge(tmp, *first_pair())                           # writes nothing
        judge(tmp, *lfw_pairs())
        assert "its folder is not there or is read-only" in refusal(tmp)
        assert "its folder is not there or is read-only" in refusal(tmp, "--gallery g --probes p")
    text, _ = judge(tmp, "--out s.csv")
    assert text.splitlines()[-1].endswith("scored: s.csv")


def test_verify_writes_its_files_though_nobody_reads(tmp):
    command = sys.executable, *words(Path(verify.__file__), "--ckpt", trained() / "best.pt", "--out s.csv")
    done = subprocess.run(command, stdout=unread_pipe(), stderr=subprocess.PIPE, cwd=tmp, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(read_csv(tmp / "s.csv")) == len(data.load(faces()).test_pairs.left)


def test_verify_says_why_no_submission_is_written(tmp):
    error = refusal(tmp, "--out s.csv", *lfw_pairs())
    assert "no submission is written" in error and "has labels" in error
    copytree(faces(), tmp / "set")
    for file in (tmp / "set").glob("test_pairs*"):
        file.unlink()
    text, _ = judge(tmp, "--data set")
    assert "no submission is written, for" in text and "test_pairs.txt" in text and "test_pair.csv" in text
    assert "none of test_pairs.txt" in refusal(tmp, "--data set --out s.csv")
    assert not (tmp / "s.csv").exists() and not (tmp / "submission.csv").exists()


# ---- verify.py: in other people's programs ---------------------------------------------------------------------

@cache
def verifier():
    """verify.Verifier of trained()'s best.pt, whose size is 32."""
    return verify.Verifier(trained() / "best.pt", "cpu")


def test_verifier_embeds_paths_pictures_and_arrays_of_any_size_as_the_command_line_does(tmp):
    rng = default_rng(0)
    grey = rng.integers(0, 256, (50, 40), np.uint8)
    wide = rng.integers(0, 256, (40, 90, 3), np.uint8)
    Image.fromarray(grey).save(tmp / "0.png")
    Image.fromarray(wide).convert("CMYK").save(tmp / "1.tif")
    turned = Image.fromarray(wide)
    turned.getexif()[0x0112] = 6                            # rotated by 90 degrees
    turned.save(tmp / "2.png", exif=turned.getexif())
    Image.fromarray(grey).convert("RGBA").save(tmp / "3.png")
    write_text(tmp / "notes.txt", "not a face")
    judge(tmp, "--save-embeddings z.npy --images", tmp)
    files = [tmp / name for name in ("0.png", "1.tif", "2.png", "3.png")]
    wanted = np.load(tmp / "z.npy")
    listed = [line.strip() for line in (tmp / "z.txt").read_text().splitlines()]
    assert listed == [str(file) for file in files]
    assert (tmp / "z.skipped.txt").read_text().startswith(f"{tmp}/notes.txt: ")
    close(verifier().embed(files), wanted, 1e-6)
    close(verifier().embed([Image.open(file) for file in files]), wanted, 1e-6)
    close(verifier().embed([grey]), wanted[:1], 1e-6)
    close(verifier().embed(wide), wanted[1:2], 1e-6)
    z = verifier().embed(str(files[2]))
    assert z.shape == (1, 16) and z.dtype == np.float32 and verifier().size == 32
    close(z, wanted[2:3], 1e-6)


def test_verifier_refuses_what_is_no_image_and_names_it():
    face = np.zeros((9, 9, 3), np.uint8)
    truncated = BytesIO()
    Image.fromarray(random_images(1)[0]).save(truncated, "png")
    broken = Image.open(BytesIO(truncated.getvalue()[:300]))
    shapes = face[None], face[0, 0], face[:, :, :1], face[9:], Image.new("RGB", (0, 0))
    for item in (*shapes, face / 255, 7, None, broken):
        raises("image 1: ", verifier().embed, [face, item])
    raises("empty list", verifier().embed, [])
    raises("none.jpg", verifier().embed, ["none.jpg"])
    raises("far=2", verifier().threshold, 2)
    raises("(2, 16) and (3, 16)", verifier().score, np.ones((2, 16)), np.ones((3, 16)))


def test_verifier_scores_and_decides_as_the_command_line_does(tmp):
    one, two = first_pair()
    for far in None, 0.2:
        said = answer(tmp, f"--far {far}" if far else "", one, two)
        close(verifier().score(one, two), said["score"], 1e-6)
        close(verifier().threshold(far), said["threshold"])
        same = verifier().same(one, two, far)
        assert type(same) is bool and same == said["same"]
    z = verifier().embed([one, two])
    close(verifier().score(z[0], z[1]), verifier().score(one, two), 1e-6)
    scores = verifier().score(z, 3 * z[::-1])               # any length
    close(scores, [said["score"]] * 2, 1e-6)
    assert verifier().same([one, two], [two, one]).shape == (2,)
    without = checkpoint() | {"val": None}
    torch.save(without, tmp / "without.pt")
    raises("no threshold", verify.Verifier(tmp / "without.pt").threshold)


def test_verify_embed_refuses_floats_and_other_sizes():
    net, images = models.make("swiftface", 16, 48), random_images(2)
    raises("32x32 pixels, but the model is of size 48", verify.embed, net, images)
    raises("type float64", verify.embed, net, images / 255)
    raises("shape (32, 32, 3)", verify.embed, net, images[0])
    raises("type Image", verify.embed, net, Image.fromarray(images[0]))
    raises("type list", verify.embed, net, [])


# ---- verify.py: folders, lists, export ---------------------------------------------------------------------------

def test_verify_embeds_a_list_of_files_and_says_what_it_skipped(tmp):
    folder = older_kaggle()
    copytree(folder / "known", tmp / "known")
    (tmp / "known/n0/broken.jpg").write_bytes(b"no picture")
    write_text(tmp / "list.txt", "known/n0/broken.jpg\nknown/n9/none.jpg\n" + f"{folder}/unknown_dev/0.jpg\n")
    found = answer(tmp, "--images list.txt --save-embeddings z.npy")
    assert found["images"] == 1
    close(np.load(tmp / "z.npy"), verifier().embed(folder / "unknown_dev/0.jpg"), 1e-6)
    missing, broken = (tmp / "z.skipped.txt").read_text().splitlines()
    assert "none.jpg: no such file" in missing and "broken.jpg: not a readable image" in broken
    out, _ = judge(tmp, "--images known --save-embeddings k.npy")
    assert "15 images of known" in out and "1 skipped, see k.skipped.txt" in out
    answer(tmp, "--gallery k.npy --probes", folder / "unknown_dev")             # the listing is a gallery's
    write_text(tmp / "only.txt", "known/n0/broken.jpg\n")
    assert "1 of 1 faces are unreadable" in refusal(tmp, "--images only.txt --save-embeddings y.npy")


LOAD_ALONE = """
import sys
import torch
program = torch.export.load("face.pt2").module()
torch.save([program(torch.load("x.pt")[:n]) for n in (1, 7)], "z.pt")
assert not {"verify", "models", "losses", "data"} & set(sys.modules)
"""


def test_verify_exports_a_program_that_needs_torch_alone(tmp):
    out, _ = judge(tmp, "--export face.pt2")
    assert "uint8 (B, 32, 32, 3)" in out
    x = torch.from_numpy(random_images(7))
    torch.save(x, tmp / "x.pt")
    subprocess.run([sys.executable, "-I", "-c", LOAD_ALONE], cwd=tmp, check=True)
    net, _ = verify.build(checkpoint())
    wanted = verify.embed(net, x.numpy())
    one, seven = torch.load(tmp / "z.pt")
    close(one, wanted[:1], 1e-5)
    close(seven, wanted, 1e-5)


def export_args(tmp):
    return SimpleNamespace(export=tmp / "face.pt2", metric=None, mirror="mean", far=None)


def test_verify_export_says_what_to_cut_before_the_program(tmp):
    ckpt = checkpoint()
    net, criterion = verify.build(ckpt)
    for crop, is_said in (1, False), (0.75, True):
        ckpt["args"]["crop"] = crop
        with patched(verify, "export"), patched(torch.export, "save"):          # these take seconds
            text = verify.export_checkpoint(net, criterion, ckpt, export_args(tmp), None).text
        assert ("inner 0.75" in text) == is_said


def check_export(arch, spec, size):
    """The exported program of a new network has the embeddings that verify.embed() has."""
    net, criterion = models.make(arch, 16, size), losses.make(spec, 16, 5).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0                           # one batch fills the statistics: deep ones overflow without
    with torch.no_grad():
        net.train()(torch.randn(4, 3, size, size))
    net.eval()
    x = random_images(3, size)
    program = verify.export(net, criterion.project, size).module()
    close(program(torch.from_numpy(x)), verify.embed(net, x, criterion.project), 1e-5)


def test_verify_export_holds_the_losss_own_projection():
    check_export("swiftface", "tse:k=3", 32)


def slow_verify_exports_all_architectures():
    for arch in models.ARCHS:
        check_export(arch, "ce", 64)


# ---- verify.py: who is it ----------------------------------------------------------------------------------------

def test_verify_search_threshold_leaves_a_stranger_the_chance_asked_for():
    rng = default_rng(0)
    impostors = (np.arange(100_000) + 0.5) / 100_000        # uniform, but exactly
    labels = np.repeat([1, 0], [10, 100_000])
    scores = np.append(np.full(10, 9.0), impostors)
    known = verify.Scores(labels, scores, None)
    for far, people in (0.01, 50), (0.1, 500), (0.3, 2):
        threshold, why = verify.search_threshold(known, far, people)
        searches = rng.random((10_000, people)).max(1)
        close(np.mean(searches >= threshold), far, 0.015)
        assert f"(1/{people}) = {1 - (1 - far) ** (1 / people):.3g}" in why
    threshold, why = verify.search_threshold(known, 1e-4, 1000)
    close(threshold, impostors.max())
    assert "100000 impostor pairs cannot tell" in why and "so a stranger may find somebody at a rate of 0.01" in why


def test_verify_pools_people_or_compares_single_images_and_tells_the_second_best():
    names = ["a", "a", "b"]
    gallery = verify.Embedded(np.eye(3, dtype=np.float32), ["1.jpg", "2.jpg", "3.jpg"], names)
    pooled = verify.one_per_person(gallery, "mean")
    single = verify.one_per_person(gallery, "none")
    close(pooled.z, [[0.5 ** 0.5, 0.5 ** 0.5, 0], [0, 0, 1]], 1e-6)
    assert pooled.names.tolist() == ["a", "b"]
    assert single.z is gallery.z and single.names.tolist() == names
    scores, rows = np.array([[4, 3, 2, 1], [8, 7, 6, 5]]), np.array([[1, 0, 2, 3], [3, 2, 1, 0]])
    scores, rows = verify.best_of_people(np.array(["a", "a", "b", "b"]), scores, rows)
    assert scores.tolist() == [[4, 2], [8, 6]] and rows.tolist() == [[1, 2], [3, 1]]
    scores, rows = verify.best_of_people(single.names, np.array([[3, 2, 1]]), np.array([[0, 1, 2]]))
    assert (scores.tolist(), rows.tolist()) == ([[3, 1]], [[0, 2]])
    scores, _ = verify.best_of_people(single.names[:2], np.array([[3, 2]]), np.array([[0, 1]]))
    assert scores.tolist() == [[3]]                         # of one person there is no second


def test_verify_takes_images_without_names_for_a_person_each():
    z = np.eye(3, dtype=np.float32)
    for files in ["a/1.jpg", "a/2.jpg", "b/3.jpg"], ["a/1.jpg", "b/1.jpg", "b/1.png"]:
        people = verify.one_per_person(verify.Embedded(z, files, None), "mean")
        assert len(people.z) == 3 and len(set(people.names)) == 3
    assert people.names.tolist() == files


def test_verify_refuses_a_gallery_of_another_checkpoint_while_its_images_are_there(tmp):
    known, probes = older_kaggle() / "known", older_kaggle() / "unknown_dev"
    answer(tmp, "--gallery", known, "--save-embeddings g.npy")
    found = answer(tmp, "--gallery g.npy --probes", probes)
    ckpt = checkpoint()
    torch.manual_seed(7)
    for name, value in ckpt["model"].items():
        if value.ndim > 1:
            ckpt["model"][name] = torch.randn_like(value) * value.std()
    torch.save(ckpt, tmp / "other.pt")
    err = refused(tmp, verify, "--ckpt other.pt --gallery g.npy --probes", probes)
    assert "g.npy: saved with another checkpoint" in err
    listing = (tmp / "g.txt").read_text()
    write_text(tmp / "g.txt", listing.replace(str(known), "gone"))              # now nothing can tell
    assert answer(tmp, "--gallery g.npy --probes", probes)["rank1"] == found["rank1"]


def test_verify_says_which_faces_the_network_was_trained_on(tmp):
    known, names = older_kaggle() / "known", "n0 somebody n2 n3 n4 n5 n6 n7 n8 n9".split()
    torch.save(checkpoint() | {"names": names}, tmp / "named.pt")
    out, _ = run(tmp, verify, "--ckpt named.pt --gallery", known, "--probes", known)
    assert "note: 12 of the 15 mated probes show people that the network was trained on; of the 3 others rank1" in out
    files = [sorted((known / name).iterdir())[0] for name in ("n0", "n1")]
    out, _ = run(tmp, verify, "--ckpt named.pt", *files)
    assert "trained on images of n0" in out and "images of n1" not in out
    out, _ = judge(tmp, *files)                             # people who are numbers: nothing to say
    assert "note:" not in out


def test_verify_judges_a_closed_set_of_the_same_people_only(tmp):
    data.synthesise(tmp / "other", people=10, images=6, size=32, seed=9)
    assert data.load(tmp / "other").names == checkpoint()["names"]              # "0", "1", ... both
    found = answer(tmp, "--data other")
    assert "eer" in found and "dev_acc1" not in found
    copytree(faces(), tmp / "moved")
    assert "dev_acc1" in answer(tmp, "--data moved")


def test_verify_writes_scores_beside_the_names(tmp):
    folder = older_kaggle()
    out, _ = judge(folder, "--pool none --out who.csv --gallery known --probes unknown_dev")
    assert "each single image" in out
    known, probes = embedded_by_hand()
    best_of = torch.einsum("pd,nid->pni", probes, known).amax(2).numpy()        # of each person
    rows = read_csv(folder / "who_scores.csv")
    labels = [row["label"] for row in read_csv(folder / "who.csv")]
    assert [row["label"] for row in rows] == labels
    assert [Path(row["file"]).name for row in rows] == [f"{i}.jpg" for i in range(8)]
    close([float(row["score"]) for row in rows], best_of.max(1), 1e-5)
    for row, person_scores in zip(rows, best_of):
        if row["second"]:
            second = int(row["second"][1:])
            second_score = float(row["second_score"])
            close(person_scores[second], second_score, 1e-5)
            close(np.sort(person_scores)[-2], second_score, 1e-5)


def test_verify_frames_only_wrong_answers_among_ranks():
    gallery = verify.Embedded(None, first_pair(), np.array(["n0", "n1"]))
    probes = verify.Embedded(None, first_pair()[:1] * 3, ["n0", "n0", "stranger"])
    scores, found = np.array([[0.9, 0.1]] * 3), np.array([[0, 1]] * 3)
    with patched(data, "sheet") as sheet:
        verify.draw_ranks("ranks.png", probes, gallery, scores, found, np.array(["n0", "n000000", "n0"]))
    (_, _, tiles), = sheet.call_args[0][2]
    framed = [bool(colour) for _, _, colour in tiles]
    assert framed == [False, False, False, False, True, False, False, True, False]
    assert "no match" in tiles[4][1] and "no match" not in tiles[1][1]


def test_verify_neural_collapse_is_zero_where_it_is_complete():
    simplex = np.eye(4) - 0.25
    labels = np.repeat(np.arange(4), 5)
    numbers = verify.collapse(simplex[labels] + 7, labels, 3 * simplex)
    close(list(numbers.values()), np.zeros(3), 1e-10)
    rng = default_rng(0)
    noisy = verify.collapse(simplex[labels] + rng.normal(size=(20, 4)), labels)
    assert noisy["nc1"] > 0.1 and noisy["nc2"] > 0.01 and "nc3" not in noisy


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
        environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
        environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            torch.save(task(rank), folder / str(rank))
        except Exception as e:
            print(values_where_it_failed(e))
            raise

    fork, workers = multiprocessing.get_context("fork"), []
    for rank in range(n):
        workers.append(fork.Process(target=work, args=(rank,)))
        workers[rank].start()
    for worker in workers:
        worker.join()
        assert not worker.exitcode, worker
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(n)]


def shallow_net(arch, dim, size):
    """In place of models.make: rounding grows tenfold a step in a deep network with batch norm, in one process too."""
    trunk = [nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU()]
    return models.FaceNet(trunk, [nn.Flatten(), nn.Linear(8 * 49, dim), nn.BatchNorm1d(dim)])


def losses_of_steps(cwd, n, flags, stop=0):
    """The losses of each step of train.main on the small set in n processes, which all must have the same, up to a
    SIGTERM to the last of them."""
    def task(rank):
        seen, real = [], losses.Loss.forward

        def forward(*args):
            value = real(*args)
            seen.append(value.item())
            return value

        with (patched(losses.Loss, "forward", forward), patched(data, "plot"),
              patched(models, "make", shallow_net),
              interrupted(signal.SIGTERM, stop if rank == n - 1 else 0)):
            tiny(cwd, "--batch-size 15 --per-person 3", flags, code=130 * bool(stop))
        return seen

    faces()
    every = processes(n, task, cwd)
    assert every == every[:1] * n
    return every[0]


def test_distributed_training_equals_one_process(tmp):
    """Twenty steps in 1, 2 and 4 processes, of unequal parts of the batch and of the classes, and handed over from four
    to one to two of them. Mining takes all triplets: which are semi-hard may turn on a rounding error."""
    flags = ("--loss curricular:sample=0.8+0.1*triplet:mining=all+0.003*center --ema .9 --epochs 5 --opt sgd --lr 5e-3"
             " --out ")
    runs = {"1": losses_of_steps(tmp, 1, flags + "1")}
    for n in "24":
        runs[n] = losses_of_steps(tmp, int(n), flags + n + " --shard")
    runs["chain"] = losses_of_steps(tmp, 4, flags + "chain --shard", stop=5)
    runs["chain"] += losses_of_steps(tmp, 1, flags + "chain --resume --steps 8")
    runs["chain"] += losses_of_steps(tmp, 2, flags + "chain --resume --steps 20 --shard")
    assert len(runs["1"]) == 20
    one = verify.load(tmp / "1/last.pt")
    for out, seen in runs.items():
        close(seen, runs["1"], 1e-5)
        many = verify.load(tmp / out / "last.pt")
        for kind in "model", "loss", "ema":
            for name, value in one[kind].items():
                close(value, many[kind][name], 1e-3)
        for row, other in zip(one["log"], many["log"]):
            for key in "loss", "eer", "auc", "acc":
                close(row[key], other[key], 1e-5)


def test_distributed_muon_equals_one_process(tmp):
    """Four steps in one process, in two with divided classes, and in two and then one."""
    flags = "--loss cosface --opt muon --lr 1e-3 --epochs 1 --out "
    one = losses_of_steps(tmp, 1, flags + "one")
    two = losses_of_steps(tmp, 2, flags + "two --shard")
    chain = losses_of_steps(tmp, 2, flags + "chain --shard", stop=2)
    chain += losses_of_steps(tmp, 1, flags + "chain --resume")
    assert len(one) == 4
    close(two, one, 1e-4)
    close(chain, one, 1e-4)


def test_distributed_batch_norm_equals_that_of_the_whole_batch(tmp):
    """Outputs, gradients and running statistics of unequal parts of a batch."""
    def task(rank):
        torch.distributed.init_process_group("gloo")
        torch.manual_seed(0)
        x, weights = torch.randn(2, 7, 5, 3, 3).double() + 3
        norm, net = nn.BatchNorm2d(5).double(), nn.Sequential(nn.BatchNorm2d(5)).double()
        models.synchronise_batch_norms(net)
        rows = [slice(0, 4), slice(4, 7)][rank]
        z, mine = x.clone().requires_grad_(), x[rows].clone().requires_grad_()
        whole, part = norm(z), net(mine)
        (whole * weights).sum().backward()
        (part * weights[rows]).sum().backward()
        close(part, whole[rows], 1e-9)
        close(mine.grad, z.grad[rows], 1e-9)
        for a, b in zip(net.buffers(), norm.buffers(), strict=True):
            close(a, b, 1e-9)
        close(net.eval()(x), norm.eval()(x), 1e-9)

    processes(2, task, tmp)


def two_steps(spec, shard):
    """(head, what all processes have alike, how many (B, C) arrays lived at once), 13 classes, two steps."""
    torch.manual_seed(0)
    z = (2 * torch.randn(10, 8).double()).requires_grad_()
    y = torch.tensor([0, 5, 5, 6, 7, 12, 12, 3, 1, 6])
    torch.manual_seed(1)
    head = losses.make(spec, 8, 13, shard).double()
    with Arrays((10, 13)) as arrays:
        for step in range(2):
            torch.manual_seed(step)
            value = head(z, y)
            value.backward()
    alike = [value, z.grad, head.eval().top(z, 5)]
    return head, alike + list(head.buffers()), arrays.most


def test_distributed_heads_equal_the_undivided(tmp):
    """Each loss with class weights, over two processes: loss, gradients, buffers, best classes after two steps."""
    specs = [*HEADS, *(f"{name}:sample=0.6" for name in SAMPLED), "ce:smooth=0.1", "l2softmax:learn=true",
             "vmf:shared=true", "arcface:exact=true", "ce+regular", "subcenter+regular+0.1*triplet+0.01*center+uniform"]

    def task(rank):
        torch.distributed.init_process_group("gloo")
        start, end = [(0, 6), (6, 13)][rank]
        for spec in specs:
            one, want, most = two_steps(spec, (0, 1))
            divided, have, most_divided = two_steps(spec, (rank, 2))
            assert most_divided == 0                                            # no (B, C)
            assert (most > 0) == ("sample" not in spec)
            for a, b in zip(have, want, strict=True):
                close(a, b, 1e-9)
            whole = dict(one.named_parameters())
            for name, p in divided.named_parameters():
                k = divided.rows_per_class.get(name)
                for a, b in (p, whole[name]), (p.grad, whole[name].grad):
                    if k:
                        b = b.unflatten(0, (k, -1))[:, start:end].flatten(0, 1)
                    close(a, b, 1e-9)
            assert divided.rows_per_class and not one.rows_per_class

    processes(2, task, tmp)


def test_distributed_class_weights_start_alike_however_many_processes():
    parts = []
    for shard in (0, 1), (0, 3), (1, 3), (2, 3):            # drawn in several blocks
        torch.manual_seed(0)
        weight = losses.make("subcenter:k=2", 3, 100_001, shard).weight.detach()
        parts.append(weight.unflatten(0, (2, -1)))
    assert torch.equal(torch.cat(parts[1:], 1), parts[0])


def test_distributed_class_rows_are_gathered_and_handed_out(tmp):
    """Two rows for each of 13 classes; and a divided loss is pickled with its place."""
    whole = torch.arange(26 * 3).view(26, 3)

    def task(rank):
        torch.distributed.init_process_group("gloo")
        mine = losses.shard_class_rows(whole, 2, 13)
        classes = [slice(0, 6), slice(6, 13)][rank]
        assert torch.equal(mine, torch.cat([whole[:13][classes], whole[13:][classes]]))
        head = losses.make("arcface", 3, 13, (rank, 2))
        x, y = torch.eye(3), torch.tensor([0, 5, 12])
        assert pickle.loads(pickle.dumps(head))(x, y) == deepcopy(head)(x, y) == head(x, y)
        return losses.gather_class_rows(mine, 2, 13)

    assert torch.equal(processes(2, task, tmp)[0], whole)


# ---- models.py -----------------------------------------------------------------------------------------------

def on_meta(arch, dim=512, size=112):
    """The network without values: for shapes and counts."""
    with torch.device("meta"):
        return models.make(arch, dim, size)


def trunk_of_torchvision(arch):
    """torchvision's layers up to the last feature map, without values."""
    options = {"aux_logits": False, "init_weights": False} if arch == "googlenet" else {}
    with torch.device("meta"):
        net = torchvision.models.get_model(arch.replace("netv2", "net_v2"), **options)
    if hasattr(net, "features"):
        return net.features
    layers = [m for name, m in net.named_children() if name not in ("avgpool", "dropout", "fc")]
    return nn.Sequential(*layers)


def count(module):
    return sum(p.numel() for p in module.parameters())


def shapes(tensors):
    return [t.shape for t in tensors]


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def test_models_large_trunks_have_torchvisions_shapes():
    for arch in "resnet101", "resnet152", "convnext_small", "convnext_base", "convnext_large":
        want, got = trunk_of_torchvision(arch).state_dict(), on_meta(arch).trunk.state_dict()
        assert shapes(got.values()) == shapes(want.values())


def test_models_trunks_compute_what_torchvisions_compute():
    """With our weights copied by position, in training and in evaluation."""
    def output(net, images, training):
        torch.manual_seed(1)                                # drop-path must draw the same numbers
        with torch.no_grad():
            return net.train(training)(images)

    for arch in "resnet18 resnet34 resnet50 convnext_tiny mobilenetv2 alexnet vgg11 vgg16 googlenet".split():
        torch.manual_seed(0)
        theirs, ours = trunk_of_torchvision(arch), models.make(arch).trunk
        with torch.no_grad():                               # scales, biases, statistics with an effect
            for p in ours.parameters():
                if p.dim() in (1, 3):
                    p += 0.2 * torch.rand_like(p)
            ours(torch.randn(4, 3, 64, 64))
        assert shapes(theirs.parameters()) == shapes(ours.parameters())
        values = deepcopy(ours.state_dict()).values()
        by_position = zip(theirs.state_dict(), values, strict=True)
        theirs.load_state_dict(dict(by_position), assign=True)
        for size, training in (64, True), (72, False):
            images = torch.randn(2, 3, size, size)
            want = output(theirs, images, training)
            error = relative_error(output(ours, images, training), want)
            assert want.std() > 0 and error < 1e-5


# ---- Counts as published

PARAMETERS = """
    lenetpp         2    32     799394
    lightcnn9     256   128    5480864
    lightcnn29    256   128   12573280
    iresnet18     512   112   24025600
    iresnet34     512   112   34139328
    iresnet50     512   112   43590848
    iresnet100    512   112   65156160
    mobilefacenet 128   112    1003136
    sphere20      512   112   24501952"""                   # dim, size, parameters; sphere20: published for 112x96
OF_GREY_IMAGES = ("lenetpp", "lightcnn9", "lightcnn29")     # published for one channel; here all have three
TRUNK_PARAMETERS = {"alexnet": 2469696, "vgg11": 9220480, "vgg16": 14714688}
MILLIONS_WITH_HEAD = """
    resnet18 11.69, resnet34 21.80, resnet50 25.56, resnet101 44.55, resnet152 60.19, seresnet50 28.09,
    seresnet101 49.33, googlenet 6.62, mobilenetv2 3.50, convnext_atto 3.70, convnext_femto 5.22, convnext_pico 9.05,
    convnext_nano 15.59, convnext_tiny 28.59, convnext_small 50.22, convnext_base 88.59, convnext_large 197.77"""
GIGA_MACS = dict(re.findall(r"(\w+) ([\d.]+)", """
    iresnet18 2.6, iresnet34 4.5, iresnet50 6.3, iresnet100 12.1, mobilefacenet 0.221, mobilenetv2 0.301,
    googlenet 1.498, resnet50 4.089, convnext_tiny 4.456, convnext_pico 1.4"""))        # with the head at 224 pixels


def check_macs(arch, got):
    """To as many digits as are published."""
    digits = len(GIGA_MACS[arch].split(".")[1])
    assert f"{got / 1e9:.{digits}f}" == GIGA_MACS[arch]


def test_models_have_the_published_parameters_and_macs():
    for line in PARAMETERS.strip().splitlines():
        arch, *numbers = line.split()
        dim, size, want = map(int, numbers)
        net = on_meta(arch, dim, size)
        if arch in OF_GREY_IMAGES:
            want += next(net.parameters())[:, :2].numel()
        assert count(net) == want
        if arch in GIGA_MACS:
            check_macs(arch, models.macs(net, size))


def test_models_trunks_have_the_published_parameters_and_macs():
    for arch, want in TRUNK_PARAMETERS.items():
        assert count(on_meta(arch).trunk) == want
    for arch, want in re.findall(r"(\w+) ([\d.]+)", MILLIONS_WITH_HEAD):
        trunk = on_meta(arch).trunk
        *_, last = trunk.parameters()
        width = 1024 if arch == "googlenet" else len(last)  # of the map: there four branches, concatenated
        norm = 2 * width if "convnext" in arch else 0       # before the head, of 1000 classes
        assert f"{(count(trunk) + norm + 1000 * width + 1000) / 1e6:.2f}" == want
        if arch in GIGA_MACS:
            check_macs(arch, models.macs(trunk, 224) + 1000 * width)


def test_models_macs_leave_the_network_as_it_was():
    net = models.make("mobilefacenet", 32, 32).train()
    before = deepcopy(net.state_dict())
    assert models.macs(net, 32) == models.macs(on_meta("mobilefacenet", 32, 32), 32) and net.training
    assert all(map(torch.equal, net.state_dict().values(), before.values()))
    assert net(torch.randn(2, 3, 32, 32)).std() > 0.5       # the layers that counting skips are back


# ---- All of them train, and what training needs

def stripes():
    """Eight images of 32 pixels with noise, standing stripes with label 0 and lying ones with label 1."""
    torch.manual_seed(0)
    standing = torch.linspace(0, 12, 32).sin().expand(3, 32, 32)
    images = torch.stack([standing, standing.mT] * 4) + 0.1 * torch.randn(8, 3, 32, 32)
    return images, torch.tensor([0, 1] * 4)


def four_losses(net, images, labels, lr):
    """Before, between and after three steps of SGD, which keeps no state: the largest has 197 million weights."""
    head, seen = nn.Linear(16, 2), []
    optimizer = torch.optim.SGD([{"params": net.parameters(), "lr": lr}, {"params": head.parameters(), "lr": 0.2}])
    for step in range(4):
        torch.manual_seed(1)                                # the same dropout each time
        with torch.set_grad_enabled(step < 3):
            embeddings = F.normalize(net(images))
            loss = F.cross_entropy(head(4 * embeddings), labels)
        seen.append(loss.item())
        if step < 3:
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()
    return seen


def learn_and_load(archs):
    """Each network lowers its loss on stripes, and a twin with its weights embeds the same."""
    images, labels = stripes()
    for arch in archs:
        torch.manual_seed(0)
        net, n, lr = models.make(arch, dim=16, size=32).train(), 4, 0.05
        if arch.startswith(("resnet", "seresnet", "googlenet", "lightcnn", "mobilenetv2")):
            n, lr = 8, 1e-5                                 # batch norm on 1x1 maps: the loss is rough
        seen = four_losses(net, images[:n], labels[:n], lr)
        assert seen[3] < seen[0]
        twin = on_meta(arch, 16, 32)
        twin.load_state_dict(net.state_dict(), assign=True)
        with torch.no_grad():
            assert torch.equal(net.eval()(images[:1]), twin.eval()(images[:1]))


LEARNING = ("lenetpp alexnet vgg11 googlenet lightcnn9 resnet18 seresnet18 sphere10 iresnet18 iresnet_se18 "
            "mobilenetv2 mobilefacenet convnext_atto swiftface").split()


def test_models_of_each_family_learn_and_embed_the_same_after_loading():
    """The others are made of the same blocks: slow_models_others_learn has those."""
    learn_and_load(LEARNING)


SMALL = ("lenetpp alexnet googlenet lightcnn9 resnet18 seresnet50 sphere10 iresnet18 iresnet_se18 mobilenetv2 "
         "mobilefacenet convnext_atto").split()


def check_fold(net, images, norms_left):
    """fold makes an equal copy, once; the batch norms left stand before a convolution."""
    want, folded = net(images), models.fold(net)
    assert str(folded).count("BatchNorm") == norms_left and relative_error(folded(images), want) < 1e-9
    assert torch.equal(net(images), want) and not net.folded and models.fold(folded) is folded


def check_half_precision(net, images):
    for kind in torch.float16, torch.bfloat16:
        with torch.autocast("cpu", kind):
            out = net.train()(images)
        assert out.isfinite().all()
    out.float().square().mean().backward()                  # not in float16: that takes minutes on a CPU
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def check_seed(net, images):
    """Dropout and drop-path draw from the global generator alone."""
    for block in net.modules():
        if isinstance(block, models.ConvNeXtBlock):
            nn.init.ones_(block.scale)
    def output(seed):
        torch.manual_seed(seed)
        return net(images)

    assert torch.equal(output(1), output(1)) and not torch.equal(output(1), output(2))


def test_models_fold_and_run_in_other_sizes_memory_formats_and_precisions():
    for arch in SMALL:
        torch.manual_seed(0)
        net, images = models.make(arch, dim=8, size=48), torch.randn(4, 3, 48, 48)
        with torch.no_grad():
            for _ in range(3):                              # statistics away from 0 and 1
                net(images)
            want = net.eval()(images)
            check_fold(deepcopy(net).double(), images[:2].double(), 9 if "iresnet" in arch else 0)
            for side in 32, 80:
                assert net(torch.randn(1, 3, side, side)).shape == (1, 8)
            last = net.to(**CHANNELS_LAST)(images.to(**CHANNELS_LAST))
            assert relative_error(last, want) < 1e-4
        check_half_precision(net, images[:2, :, :32, :32])
        if arch in ("iresnet18", "convnext_atto"):
            check_seed(net, images)


# ---- Making one

def test_models_make_answers_mistakes():
    for words, *arguments in (("resnet50", "resnt50"), ("nearest", None),
                              ("dimension", "resnet18", 0), ("32..256", "resnet18", 8, 31),
                              ("32..256", "resnet18", 8, 257)):
        raises(words, models.make, *arguments)


def test_models_pool_at_their_own_size_only_to_bound_the_neck():
    real, sides = models.PoolTo.forward, []

    def forward(pool, x):
        y = real(pool, x)
        sides.append((x.shape[-1], y.shape[-1]))
        return y

    with patched(models.PoolTo, "forward", forward):
        for arch, size in product(SMALL, (33, 100, 255)):
            sides.clear()
            net, image = on_meta(arch, 8, size).eval(), torch.empty(1, 3, size, size, device="meta")
            assert net(image).shape == (1, 8) and sides
            assert all(a == b or a > b == 4 for a, b in sides)


def test_models_table_has_a_line_for_each():
    with patched(models, "macs", lambda *a: 0):             # counted in a test of their own
        names = [line.split()[0] for line in models.table().splitlines()[1:]]
    assert names == list(models.ARCHS)


# ---- losses.py -----------------------------------------------------------------------------------------------

HEADS = [name for name in losses.LOSSES if name != "regular" and losses.make(name, 8, 6).heads]      # class weights
SAMPLED = [name for name, cls in losses.LOSSES.items() if "sample" in losses.arguments_of(cls)]
SHAPES = "range ring uniform center center_invariant".split()                   # terms that alone make no embedding


def published(cls, *_):
    """In place of default_scale_and_margin()."""
    return {"s": 64.0, "m": 0.35 if cls is losses.CosFace else 0.5}


def loss_of(spec, dim=8, classes=6, double=True, seed=0):
    torch.manual_seed(seed)
    with patched(losses, "default_scale_and_margin", published):
        module = losses.make(spec, dim, classes)
    return module.double() if double else module


SPECS = [f"ce+{name}" if name in (*SHAPES, "regular") else name for name in losses.LOSSES]      # all, able to embed


def people(people=4, each=3, dim=8, seed=1):
    """Embeddings of float64 and labels."""
    torch.manual_seed(seed)
    x = 2 * torch.randn(people * each, dim).double()
    return x.requires_grad_(), torch.arange(people).repeat(each)


def cosines_of(head, x):
    return losses.unit(x) @ losses.unit(head.weight).T


def gradient(value, x):
    return torch.autograd.grad(value, x, retain_graph=True)[0]


@contextmanager
def logits_seen():
    """A list that receives (logits, labels) of each cross-entropy, of classes or of one against the rest."""
    seen = []

    def watch(f):
        def watched(logits, y, *args, **keywords):
            seen.append((logits.detach().clone(), getattr(y, "column", y)))
            return f(logits, y, *args, **keywords)
        return watched

    one_cross_entropy = patched(F, "cross_entropy", watch(F.cross_entropy))
    one_rest = patched(losses, "one_against_rest", watch(losses.one_against_rest))
    with one_cross_entropy, one_rest:
        yield seen


# Specs of the same formula, up to float32's constants.
EQUAL = f"""
    combined:m1=1,m2=0,m3=0             normface:s=64,learn=false
    combined:m2=0.5,m3=0                arcface
    combined:m2=0,m3=0.35               cosface
    combined:s=30,m1=1.7,m2=0,m3=0      sphereface
    am:s=64                             cosface
    normface:s=30                       coco
    adaface:h=0,m=0.35                  cosface
    elastic:sigma=0                     arcface
    elastic:sigma=0,kind=cos,m=0.35     cosface
    subcenter:k=1                       arcface
    magface:m_low=0.5,m_high=0.5,lam=0  arcface
    vmf:shared=true                     coco
    adacos:dynamic=false                coco:s={math.sqrt(2) * math.log(5)!r}
    asoftmax:base=1e14                  modified
    asoftmax:m=1                        modified
    tse:m=0.3,k=8                       hinge:m=0.3
    elastic                             arcface"""


def test_losses_equal_each_other_at_special_parameters():
    for a, b in table(EQUAL):
        one, two = loss_of(a), loss_of(b)
        one.train(a != "elastic")                                               # its noise is for training only
        for p, q in zip(one.parameters(), two.parameters()):
            p.data = q.data.clone()
        x, y = people()
        r, t = one(x, y), two(x, y)
        close(r, t, 1e-6)
        close(gradient(r, x), gradient(t, x), 1e-6)


def test_losses_with_a_margin_become_arcface():
    x, y = people()
    arc = loss_of("arcface")
    ada = loss_of("adaface:m=0.5").eval()
    ada.terms[0].mean.fill_(1e6)                                                # every norm is far below: z = -1
    ada.terms[0].std.fill_(1.0)
    close(ada(x, y), arc(x, y))
    w = losses.unit(arc.weight).detach()[:3]                                    # no negative is hard on its own weight
    own = torch.arange(3)
    close(loss_of("curricular")(w, own), arc(w, own))
    mag = loss_of("magface:m_low=0.5,m_high=0.5,low=1,high=50")
    a = x.norm(dim=1).clamp(1, 50)
    reward = 1 / a + a / 2500
    close(mag(x, y), arc(x, y) + 35 * reward.mean())


def test_losses_groupface_without_parts_is_arcface_and_balances_groups():
    x, y = people()
    arc = loss_of("arcface")
    group, alone = loss_of("groupface:lam=0.1").eval(), loss_of("groupface:lam=0").eval()
    for g in group, alone:
        g.terms[0].parts.data.zero_()
        g.weight.data = arc.weight.data
    close(alone(x, y), arc(x, y))
    scores = group.terms[0].groups(x)
    wanted = (scores.softmax(1) - 0.25).argmax(1)
    close(group(x, y) - arc(x, y), 0.1 * F.cross_entropy(scores, wanted))


def test_losses_npair_and_supcon_of_two_images_are_cross_entropies():
    x = people()[0][:8]
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    products = x[:4] @ x[4:].T
    close(loss_of("npair:reg=0")(x, y), F.cross_entropy(products, y[:4]))
    others = losses.cosines(x).fill_diagonal_(-inf)
    pairs = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    close(loss_of("supcon")(x, y), F.cross_entropy(others / 0.1, pairs))


def bessel(v, k):
    """Modified Bessel function I_v(k), by its series."""
    total = 0.0
    for i in range(60):
        power = (k / 2) ** (2 * i + v)
        total += power / math.gamma(i + 1) / math.gamma(i + v + 1)
    return total


def test_losses_vmf_has_the_normaliser_of_von_mises_and_fisher():
    x, k = people()[0], 20.0
    vmf = loss_of("vmf:s=20")
    vmf.logits(x)[0, 2].backward()
    cos = losses.unit(x[0]) @ losses.unit(vmf.weight[2])
    ratio = bessel(4, k) / bessel(3, k)                                         # (log C_D)' = -I_{v+1}/I_v
    close(vmf.terms[0].log_k.grad[2], k * (cos - ratio), 5e-3)


# ---- losses.py: pairs and triplets by loops ---------------------------------------------------------------------

def mean(values):
    values = list(values)
    return sum(values) / max(len(values), 1)


def plus(v):
    return max(v, 0.0)


def softplus(v):
    return math.log1p(math.exp(v))


class Loops:
    """A batch in Python numbers: people as lists of their images, distances near of genuine and far of impostor pairs,
    and the cosines positive and negative of each image with others."""
    def __init__(self, x, y, p=2):
        self.x, self.y, self.p = x, y, p
        self.u, self.n = losses.unit(x), range(len(y))
        self.near, self.far, self.people = [], [], {}
        self.positive = [[] for _ in y]
        self.negative = [[] for _ in y]
        for i in self.n:
            self.people.setdefault(int(y[i]), []).append(i)
        for i, j in itertools.permutations(self.n, 2):
            same = y[i] == y[j]
            distances = self.near if same else self.far
            cosines = self.positive if same else self.negative
            distances.append(self.distance(i, j))
            cosines[i].append(float(self.u[i] @ self.u[j]))

    def distance(self, i, j):
        difference = self.u[i] - self.u[j]
        return float(difference.norm(self.p))

    def anchors(self):
        """(positive, negative) of the images that have both."""
        return [both for both in zip(self.positive, self.negative) if all(both)]

    def gaps(self, mining):
        """Cosine of the negative less that of the positive, of the triplets chosen."""
        gaps = []
        for near, far in self.anchors():
            if mining == "hard":
                near, far = [min(near)], [max(far)]
            for p, q in product(near, far):
                semihard = max((s for s in far if s < p), default=min(far))
                if mining != "semihard" or q == semihard:
                    gaps.append(q - p)
        return gaps


def sum_exp(f, cosines):
    return sum(math.exp(f(s)) for s in cosines)


def contrastive(b):
    genuine = mean(d ** 2 / 2 for d in b.near)
    return genuine + mean(plus(1 - d) ** 2 / 2 for d in b.far)


def double_margin(b):
    genuine = mean(plus(d - 0.4) ** 2 for d in b.near)
    return genuine + mean(plus(1.2 - d) ** 2 for d in b.far)


def marginal(b):
    genuine = [plus(0.3 - 1.2 + d ** 2) for d in b.near]
    impostor = [plus(0.3 + 1.2 - d ** 2) for d in b.far]
    return mean(genuine + impostor)


def siamese(b):
    b = Loops(b.x, b.y, p=1)
    w, bias = 1.4 * math.log(2), math.sqrt(8)
    genuine = mean(softplus(w * d - bias) for d in b.near)
    return genuine + mean(softplus(bias - w * d) for d in b.far)


def triplet(b, mining):
    return mean(plus(2 * gap + 0.2) for gap in b.gaps(mining))                  # d^2 = 2 - 2 s


def triplet_all(b):
    costs = [plus(2 * gap + 0.2) for gap in b.gaps("all")]
    return mean(filter(None, costs))


def hinge(b, m, mining):
    return mean(plus(gap + m) for gap in b.gaps(mining))


def npair(b):
    rows = []
    pairs = [b.x[images[:2]] for images in b.people.values() if len(images) > 1]
    for anchor, positive in pairs:
        total = sum(math.exp(anchor @ other) for _, other in pairs)
        rows.append(math.log(total) - float(anchor @ positive))
    norms = [float(x @ x) for x in b.x]
    return mean(rows) + 0.01 * mean(norms)


def supcon(b):
    rows = []
    for positive, negative in zip(b.positive, b.negative):
        total = sum_exp(lambda s: s / 0.1, positive + negative)
        if positive:
            rows.append(math.log(total) - mean(positive) / 0.1)
    return mean(rows)


def circle(b):
    rows = []
    for positive, negative in b.anchors():
        apart = sum_exp(lambda s: 80 * plus(s + 0.4) * (s - 0.4), negative)
        together = sum_exp(lambda s: -80 * plus(1.4 - s) * (s - 0.6), positive)
        rows.append(softplus(math.log(apart) + math.log(together)))
    return mean(rows)


def multisim(b):
    rows = []
    for positive, negative in zip(b.positive, b.negative):
        apart = sum_exp(lambda s: 50 * (s - 0.5), negative)
        together = sum_exp(lambda s: -2 * (s - 0.5), positive)
        rows.append(math.log1p(together) / 2 + math.log1p(apart) / 50)
    return mean(rows)


def coco_of_centroids(b):
    rows = []
    centroids = {k: losses.unit(b.x[images].mean(0)) for k, images in b.people.items()}
    for i in b.n:
        logits = {k: 30 * float(b.u[i] @ c) for k, c in centroids.items()}
        total = sum(math.exp(s) for s in logits.values())
        rows.append(math.log(total) - logits[int(b.y[i])])
    return mean(rows)


def range_loss(b):
    intra = 0.0
    for images in b.people.values():
        pairs = combinations(images, 2)
        worst = sorted(itertools.starmap(b.distance, pairs))[-2:]
        if worst:
            intra += len(worst) / sum(1 / d for d in worst)
    centres = [b.u[images].mean(0) for images in b.people.values()]
    squares = [9.0]
    for p, q in combinations(centres, 2):
        squares.append(float((p - q).square().sum()))
    return intra + plus(1 - min(squares))


def uniform(b):
    """Of one image a person, whose centre moved from zero towards it."""
    if not b.near:
        return mean(1 / (1 + d) for d in b.far)


BY_HAND = {
    "contrastive": contrastive,
    "double_margin": double_margin,
    "marginal": marginal,
    "siamese": siamese,
    "triplet:mining=all": triplet_all,
    "triplet:mining=hard": lambda b: triplet(b, "hard"),
    "triplet": lambda b: triplet(b, "semihard"),
    "hinge": lambda b: hinge(b, 0.2, "all"),
    "hinge:mining=hard": lambda b: hinge(b, 0.2, "hard"),
    "tse:k=8": lambda b: hinge(b, 0.1, "all"),
    "tpe:k=8": lambda b: mean(map(softplus, b.gaps("all"))),
    "npair:reg=0.01": npair,
    "supcon": supcon,
    "circle": circle,
    "multisim": multisim,
    "range": range_loss,
    "uniform": uniform,
    "coco:centroids=true": coco_of_centroids,
}


LABELS = [
    [0, 1, 2, 3] * 3,
    [0] * 5 + [1] * 3 + [2, 2, 3, 4],
    [5] * 12,
    list(range(12)),
]


def test_losses_of_pairs_and_triplets_agree_with_loops():
    for labels in LABELS:
        y = torch.tensor(labels)
        x = people(seed=len(y.unique()))[0]
        x.data[4] = x.data[0] + 0.1                                             # close, by an angle in any margin
        batch = Loops(x.detach(), y)
        for spec, formula in BY_HAND.items():
            want = formula(batch)
            if want is not None:
                tolerance = 1e-6 if spec == "circle" else 1e-7
                close(loss_of(spec, classes=12)(x, y), want, tolerance)


def triplets_in_full(cost, q, y, mining, costly_only=False):
    """mean_of_triplets() by B^3 numbers."""
    same, other = losses.same_and_other(y)
    gap = q[:, None, :] - q[:, :, None]                                         # (a, p, n)
    valid = same[:, :, None] & other[:, None, :]
    if mining == "all":
        value = cost(gap)
        counts = valid & (value > 0) if costly_only else valid
        return losses.mean_where(value, counts)
    beyond = gap.masked_fill(~valid | (gap >= 0), -1e4).amax(2)
    easiest = gap.masked_fill(~valid, 1e4).amin(2)
    gap = torch.where(beyond > -1e4, beyond, easiest)
    return losses.mean_where(cost(gap), valid.any(2))


TRIPLETS = "triplet triplet:mining=all hinge hinge:mining=semihard tse tse:mining=semihard tpe".split()


def test_losses_triplets_equal_those_of_all_b3_numbers():
    for labels, spec in product(LABELS, TRIPLETS):
        (x, _), y, module = people(), torch.tensor(labels), loss_of(spec)
        have = module(x, y)
        with patched(losses, "mean_of_triplets", triplets_in_full):
            want = module(x, y)
        close(have, want)
        close(gradient(have, x), gradient(want, x))


def test_losses_triplets_take_memory_for_b2_numbers():
    one_person = torch.arange(96).clamp_max(32)                                 # has two thirds of the images
    for y, spec in product((torch.arange(96) // 4, one_person), TRIPLETS):
        x = torch.randn(96, 8, requires_grad=True)
        with Arrays((96, 96)) as seen:
            loss_of(spec, double=False)(x, y).backward()
        assert seen.largest <= 96 ** 2 and 0 < seen.most <= 9


# ---- losses.py: published rules, margins, gradients ---------------------------------------------------------------

def test_losses_centres_move_by_the_published_rule():
    x, y = people()[0], torch.tensor(LABELS[1])
    center, invariant = loss_of("center"), loss_of("center_invariant")
    c = torch.zeros(6, 8).double()
    for step in range(3):
        z = (x * (1 + step)).detach().requires_grad_()
        value = center(z, y)
        close(value, (z - c[y]).square().sum() / 24)
        close(gradient(value, z), (z - c[y]).detach() / 12)
        norms = c.square().sum(1)
        for k in range(6):
            mine = z.detach()[y == k]
            c[k] -= 0.5 * (c[k] - mine).sum(0) / (1 + len(mine))
        excess = c.square().sum(1)[y] - norms.mean()
        close(invariant(z, y), excess.square().sum() / 48)
        close(center.terms[0].c, c)
        close(invariant.terms[0].c, c)
    assert center.eval()(x, y) == center(x, y)                                  # evaluation moves nothing


def test_losses_ring_starts_at_the_first_batch_and_regular_sees_the_nearest_class():
    (x, y), ring = people(), loss_of("ring")
    norm = x.norm(dim=1)
    for scale in 1, 2:
        excess = scale * norm - norm.mean()
        close(ring(scale * x, y), excess.square().mean() / 2)
    reg = loss_of("ce+regular")
    cos = losses.cosines(reg.weight.detach()).fill_diagonal_(-2)
    near = [max(cos[k].tolist()) for k in y.tolist()]
    close(reg(x, y) - loss_of("ce")(x, y), sum(near) / 12)


def test_losses_adacos_follows_the_median_angle():
    (x, y), adacos = people(), loss_of("adacos")
    s = float(adacos.terms[0].s)
    cos = cosines_of(adacos, x).detach()
    hot = F.one_hot(y, 6) > 0
    total = sum(math.exp(s * c) for c in cos[~hot].tolist())
    theta = sorted(math.acos(c) for c in cos[hot].tolist())[5]
    adacos(x, y)
    want = math.log(total / 12) / math.cos(min(theta, math.pi / 4))
    close(adacos.terms[0].s, want, 1e-7)


def test_losses_curricular_and_circle_equal_their_plain_formulas():
    (x, y), head = people(), loss_of("curricular")
    cos, hot = cosines_of(head, x), F.one_hot(y, 6) > 0
    t, still = cos.gather(1, y[:, None]), cos.detach()
    angle = (t.acos() + 0.5).detach()
    target = torch.where(angle < math.pi, angle.cos(), -2 - angle.cos())
    target = target + t - t.detach()
    r = 0.01 * t.mean().detach()
    hard = torch.where(cos > target, r + cos, 1)
    own = 4 * (1.25 - still) * (cos - 0.75)
    rest = 4 * (still + 0.25).relu() * (cos - 0.25)
    plain = {"curricular": torch.where(hot, target, cos * hard), "circle_class": torch.where(hot, own, rest)}
    for name, logits in plain.items():
        want, have = F.cross_entropy(64 * logits, y), loss_of(name)(x, y)
        close(have, want)
        close(gradient(have, x), gradient(want, x), 1e-6)


def test_losses_sphereface2_starts_where_orthogonal_embeddings_like_it():
    x = torch.eye(8).double()[4:6]
    for spec, n in product(("sphereface2", "sphereface2:alpha=0.8,r=64,m=0.5"), (2, 3, 8)):
        two = loss_of(spec, classes=n)
        two.weight.data = torch.eye(8).double()[[0] * n]
        value = two(x, torch.tensor([0, 1]))
        close(gradient(value, two.terms[0].b), 0, 1e-4)


def test_losses_sphereface2_and_uniface_ask_yes_or_no_questions():
    (x, y), two, uni = people(), loss_of("sphereface2"), loss_of("uniface")
    half, hot = (cosines_of(two, x) + 1) / 2, F.one_hot(y, 6) > 0
    sign = torch.where(hot, -1, 1)
    logits = 40 * (2 * half ** 3 - 1) + two.terms[0].b
    close(two.logits(x), logits)
    questions = F.softplus(sign * logits + 40 * 0.4)
    weighed = questions * torch.where(hot, 0.7, 0.3)
    close(two(x, y), weighed.sum() / 12 * 50 / 40, 1e-6)
    logits = uni.logits(x) - math.log(60) - 64 * 0.4 * hot
    questions = F.softplus(sign * logits)
    close(uni(x, y), questions.sum() / 12, 1e-6)


MARGINS = [
    (1, 0, 0),
    (1, 0.5, 0),
    (1, 0, 0.35),
    (1.7, 0, 0),
    (4, 0, 0),
    (1.2, 0.4, 0.1),
    (0.9, 0.4, 0.15),
]
ANGLES = torch.linspace(0, math.pi, 2001).double()


def test_losses_psi_falls_on_all_angles_and_has_the_right_gradient():
    t = torch.linspace(-0.99, 0.99, 37).double()
    for m1, m2, m3 in MARGINS:
        angle = m1 * t.acos() + m2
        plain = torch.where(angle <= math.pi, angle.cos(), -angle.cos() - 2) - m3
        assert m1 > 2 or torch.allclose(losses.psi(t, m1, m2, m3), plain)
        falls = losses.psi(ANGLES.cos(), m1, m2, m3).diff() < 0
        assert falls.all()
    m2 = torch.linspace(-0.4, 0.9, 37).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m2: losses.psi(t, 1.3, m2, 0.2 + m2), m2)


def test_losses_margin_is_a_constant_for_the_gradient_even_at_the_poles():
    head, own = losses.ArcFace(2, 2, s=30, m=0.5), torch.zeros(3).long()
    poles = torch.tensor([[1, 0.2], [-1, 0.2], [0.3, 0.5]], requires_grad=True)
    head.compare = lambda x, y: (30 * x, losses.Target(y))
    value = head(poles, own)
    plain = 30 * poles.detach()
    plain[:, 0] = 30 * losses.psi(poles[:, 0].detach(), 1, 0.5)
    close(value, F.cross_entropy(plain, own), 1e-6)
    wrong = plain.softmax(1) - F.one_hot(own, 2)
    close(gradient(value, poles), 30 * wrong / 3, 1e-6)


EXACT = {
    "arcface": (1, 0.5, 0),
    "cosface": (1, 0, 0.35),
    "am:s=64": (1, 0, 0.35),
    "sphereface:s=64": (1.7, 0, 0),
    "combined": (1, 0.3, 0.2),
    "combined:m1=0.9,m2=0.4,m3=0.15": (0.9, 0.4, 0.15),
}


def test_losses_exact_gradient_is_that_of_the_margin_and_finite_at_the_poles():
    x, y = people(seed=4)
    for spec, (m1, m2, m3) in EXACT.items():
        exact = ",exact=true" if ":" in spec else ":exact=true"
        head, detached = loss_of(spec + exact), loss_of(spec)
        cos, own = cosines_of(head, x), y[:, None]
        angle = m1 * cos.gather(1, own).acos() + m2
        psi = torch.where(angle < math.pi, angle.cos(), -2 - angle.cos()) - m3
        want = F.cross_entropy(64 * cos.scatter(1, own, psi), y)
        have = head(x, y)
        close(have, want)
        close(have, detached(x, y))
        for t in x, head.weight:
            close(gradient(have, t), gradient(want, t), 1e-9)
        w = head.weight.detach()[y]
        poles = torch.cat([3 * w, -3 * w]).requires_grad_()
        at_poles = gradient(head(poles, torch.cat([y, y])), poles)
        assert at_poles.isfinite().all()
    t = ANGLES[1:-1].cos()
    closed_form = 0.9 * (0.9 * ANGLES[1:-1] + 0.4).sin().abs() / ANGLES[1:-1].sin()
    close(losses.psi_slope(t, 0.9, 0.4)[5:-5], closed_form[5:-5], 1e-7)


def annealed(spec, steps, run_length=None):
    """lambda of the first term after so many steps of training."""
    module = loss_of(spec)
    if run_length:
        module.set_run_length(run_length)
    module.terms[0].step.fill_(steps)
    return module.terms[0].lambda_at_step(module.terms[0].step.double())


def test_losses_annealing_follows_the_share_of_the_run():
    for name, length in product(("lsoftmax", "asoftmax"), (100, 100_000)):
        lam = [float(annealed(name, share * length // 100, length)) for share in range(0, 101, 5)]
        close([lam[0], lam[5], lam[10], lam[20]], [1000, math.sqrt(1001 * 6) - 1, 5, 5])
        assert lam == sorted(lam, reverse=True)
        assert float(annealed(f"{name}:low=0", length, length)) < 1e-9
    for length in None, 50:                                 # published: by steps
        close(annealed("asoftmax:gamma=0.12", 1000, length), 1000 / 121)
        close(annealed("lsoftmax:gamma=2.5e-5,low=0", 20_000, length), 1000 * 1.5 ** -35)
    close(annealed("asoftmax", 1000), 1000 / 121)                               # a length that was never told
    close(annealed("lsoftmax", 1000), 1000 * 1.025 ** -35)


def test_losses_annealed_logit_has_the_share_of_the_margin():
    (x, y), module = people(), loss_of("ce+asoftmax:low=0")
    module.set_run_length(8)
    head = module.terms[1]
    for _ in range(6):                                                          # more than half: the margin alone
        module.train()(x, y)
    cos, own = cosines_of(head, x), y[:, None]
    logits = x.norm(dim=1, keepdim=True) * cos.scatter(1, own, losses.psi(cos.gather(1, own), 4))
    close(head(x, y), F.cross_entropy(logits, y), 1e-7)


def test_losses_cosines_have_the_right_gradient():
    (x, _), (w, _) = people(5), people(7, seed=2)
    assert torch.autograd.gradcheck(losses.Cosines.apply, (x, w))
    close(losses.Cosines.apply(x, w), x @ losses.unit(w).T)


def test_losses_own_logits_fall_on_all_angles():
    x = 15 * torch.stack([ANGLES.cos(), -ANGLES.sin()], 1)
    y = torch.zeros(2001).long()
    for name in HEADS:
        head = loss_of(name, 2, 2).eval()
        with torch.no_grad(), logits_seen() as seen:
            head.weight.copy_(torch.tensor([1.0, 0.0]))                         # all on the first axis
            for p in getattr(head.terms[0], "parts", ()):
                p.zero_()
            head(x, y)
        fall = seen[0][0][:, 0].diff()
        assert (fall[:1900] < 0).all() and (fall <= 0).all()                    # sphereface2: a cube, flat at its end


def test_losses_expected_is_the_first_loss():
    torch.manual_seed(3)
    x, y = torch.randn(256, 512), torch.randint(0, 2000, (256,))
    stated = []
    for spec in (*losses.LOSSES, "ce+0.5*cosface:sample=0.2", "2*arcface", "arcface:sample=0.2", "elastic:kind=cos"):
        want = None if spec == "regular" else loss_of(spec, 512, 2000).expected()
        if want is not None:
            have = mean(loss_of(spec, 512, 2000, False, seed)(x, y).item() for seed in (0, 1))
            assert abs(have / want - 1) < 0.03
            stated.append(spec)
    assert len(stated) >= 14
    assert loss_of("normface:sample=0.1", 512, 2000).expected(256) is None      # 256 classes are drawn, not 200
    assert loss_of("normface:sample=0.1", 512, 2000).expected(200) is not None


# ---- losses.py: what holds for every loss -------------------------------------------------------------------------

def rename_classes(module, names):
    """Give class j's weights to class names[j]; there are six."""
    for p in module.parameters():
        if p.shape[:1] in ((6,), (18,)):
            rows = p.data.view(-1, 6, *p.shape[1:])
            rows[:, names] = rows.clone()


def test_losses_depend_on_no_order_of_images_or_classes():
    names = torch.tensor([3, 5, 0, 4, 1, 2])
    for name in SPECS:
        spec = "elastic:sigma=0" if name == "elastic" else name
        one, two, three = (loss_of(spec) for _ in range(3))
        x, y = people(4, 2)
        order = torch.randperm(8)
        if name == "npair":                                                     # takes a person's first two
            order = torch.tensor([2, 0, 3, 1, 6, 4, 7, 5])
        rename_classes(three, names)
        for _ in range(2):
            want = one(x, y)
            close(two(x[order], y[order]), want)
            close(three(x, names[y]), want)


def answers(module, x, y):
    """What a loss says in training and in evaluation, with the same random numbers."""
    torch.manual_seed(5)
    training = module.train()(x, y)
    return training, module.eval()(x, y), module.project(x).sum()


def after_steps(module, x, y):
    """The loss after two steps: buffers moved, and parameters."""
    module(x, y), module(x, y)
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module


def test_losses_copies_pickles_and_checkpoints_hold_the_whole_state_and_are_independent():
    for spec in (*SPECS, "regular+subcenter:k=2"):
        x, y = people(4, 2)
        one = after_steps(loss_of(spec), x, y)
        state = deepcopy(one.state_dict())
        for twin in deepcopy(one), pickle.loads(pickle.dumps(one)):
            want = answers(twin, x, y)
            after_steps(twin.train(), 2 * x, y)
            fresh = loss_of(spec, seed=9)                                       # the twin uses its own state
            fresh.load_state_dict(twin.state_dict())
            assert answers(twin, x, y) == answers(fresh, x, y)
            for key, value in one.state_dict().items():
                assert torch.equal(value, state[key])
        assert answers(one, x, y) == want


def test_losses_arcface_is_nine_named_calls_away():
    (x, y), head, calls = people(), loss_of("arcface"), []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == losses.__file__:
            calls.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        head(x, y)
    finally:
        sys.setprofile(None)
    assert calls[0] == "forward" and len(calls) <= 9
    assert all(map(str.isidentifier, calls))                # none is anonymous


def kinds(x, w):
    """Embeddings for which a loss could fail; w are the weights of their classes."""
    return {
        "random": x,
        "perfect": 3 * w,
        "opposite": -3 * w,
        "zero": 0 * x,
        "tiny": 1e-12 * x,
        "huge": 1e4 * x,
        "identical": torch.ones_like(x),
    }


def is_finite(module, x, y):
    """Value and gradients of a batch, under autocast to its type, with two losses, as in gradient accumulation."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16 if x.dtype == torch.float32 else x.dtype):
        value = module(x, y) + module(x, y)
    value.backward()
    assert value.dtype == torch.float32 and value.dim() == 0
    state = [value, x.grad, *module.buffers()]
    state += [p.grad for p in module.parameters() if p.grad is not None]
    for t in state:
        assert t.isfinite().all()


BATCHES = [
    (2, [0, 1] * 4),
    (2, [1]),
    (2, [0] * 8),
    (1000, [0, 1] * 4),
    (1000, list(range(8))),
]


def test_losses_are_finite_everywhere():
    for spec, (classes, labels) in product(SPECS, BATCHES):
        module, y = loss_of(spec, 16, classes, False), torch.tensor(labels)
        w = torch.eye(16)[y]
        if module.weight is not None:
            w = losses.unit(module.weight[y]).detach()
        for kind, x in kinds(torch.randn(len(y), 16), w).items():
            is_finite(module, x, y)
            if kind in ("random", "zero") and labels == [0, 1] * 4:
                is_finite(module, x.bfloat16(), y)
                is_finite(module, x.half(), y)


def pair_eer(module, x, y):
    """EER of all pairs of the batch, by the score that the loss learned or by the cosine."""
    i, j = torch.triu_indices(len(y), len(y), 1)
    with torch.no_grad():
        z = module.eval().project(x)
        s = module.score(z[i], z[j]) if module.score else losses.cosines(z)[i, j]
    same = y[i] == y[j]
    return eer.eer(same.numpy(), s.numpy())[0]


def test_losses_bring_four_people_to_eer_0():
    y = torch.arange(4).repeat(4)
    for spec in SPECS:
        module = loss_of("subcenter:k=1" if spec == "subcenter" else spec, 16, 4, False)
        x = 0.1 * torch.randn(4, 16)[y] + 0.11 * torch.randn(16, 16)
        x.requires_grad_()
        optimizer = torch.optim.Adam([x, *module.parameters()], 0.03)
        before = pair_eer(module, x, y)
        for _ in range(60):
            optimizer.zero_grad()
            order = torch.randperm(16)
            module.train()(x[order], y[order]).backward()
            optimizer.step()
        assert before > 0.02 and pair_eer(module, x, y) == 0
        if module.weight is not None:
            assert module.logits(x).argmax(1).equal(y)


# ---- losses.py: expressions, sampled classes, memory --------------------------------------------------------------

MISTAKES = """
    arcfase                did you mean 'arcface'
    arcface:mm=1           did you mean 'm'
    arcface:s              s without a value
    arcface:s=x            expected float
    arcface:s=0            positive
    arcface:m=-1           0 or more
    arcface:s=nan          finite
    triplet:mining=al      all or hard or semihard
    ce++center             cannot read
    modified:s=1           takes no arguments
    center+regular         ce+regular
    2*deepid2              stands for
    1e+*ce                 numbers
    1e999*ce               weight
    -1*ce                  weight
    facenet:m=1            stands for
    0.5*npair+regular      ce+regular
    groupface:k=1000       at most 100
    arcface:sample=2       at most 1
    arcface:sample=0       above 0
    normface:learn=maybe   expected bool
    subcenter:k=1.5        expected int
    tse+groupface          embedding
    tse+siamese            unchanged
    coco:centroids=true,sample=0.5  numbers
    sphereface2:alpha=1    numbers
    magface:low=9,high=9   numbers
    magface:low=99,high=9  numbers
    magface:low=0          numbers
    ce:smooth=3            0..1
    multisim:alpha=0       numbers
    arcface:s=3,s=4        twice
    tse:k=100000000        at most 8
    tpe:k=9                at most 8
    subcenter:k=100000000  at most 100
    sphereface2:t=101      at most 100
    asoftmax:m=4000        at most 100"""

EXPANDED = """
    Softmax               ce
    DeepID2               ce+0.05*contrastive
    ce + 1e-3 * center    ce+1e-3*center
    facenet               triplet:mining=semihard,m=0.2
    softmax:smooth=0.1    ce:smooth=0.1
    1e+0*ce+regular       1e+0*ce+regular
    normface:learn=FALSE  normface:learn=False
    arcface:m=0           arcface:s=9.1,m=0.0
    cosface               cosface:s=9.1,m=0.35"""


def test_losses_answer_mistakes_in_one_line():
    for spec, fragment in table(MISTAKES):
        raises(fragment, losses.make, spec, 8, 6)


def test_losses_expand_names_and_open_arguments():
    for spec, expanded in table(EXPANDED):
        assert losses.make(spec, 8, 6).spec == losses.make(expanded, 8, 6).spec == expanded
    assert losses.make("cosface", 8, 3318, images=6820).spec == "cosface:s=20.1,m=0.15"     # few images a person
    listed = re.findall(r"^  (\w+)", losses.table(), re.MULTILINE)
    assert listed == [*losses.LOSSES, *losses.ALIASES]
    assert losses.ArcFace(8, 6, s=64, m=0.5).weight.shape == (6, 8)


NOTES = """
    arcface:m=30       radians
    ce+elastic:m=2     radians
    combined:m2=28.6   radians
    magface:m_high=46  radians
    cosface:m=35       at most 1
    combined:m3=20     at most 1
    center             by itself
    0.1*ring+center    by itself
    range              by itself
    uniform            by itself"""


def test_losses_note_margins_and_terms_that_are_hardly_meant():
    for spec, words in table(NOTES):
        lines = losses.make(spec, 8, 6).notes()
        assert len(lines) == 1 and words in lines[0] and "\n" not in lines[0]
    for spec in (*SPECS, *losses.ALIASES, "arcface:m=1.5", "triplet:m=3", "combined:m1=0.9,m2=0.4,m3=0.15"):
        assert losses.make(spec, 8, 6).notes() == []


def test_losses_keep_the_parts_of_the_first_value():
    (x, y), module = people(), loss_of("ce+100*center")
    assert module.first_parts is None
    value = module(x, y)
    module(2 * x, y)
    (one, ce), (two, center) = module.first_parts
    assert (one, two) == ("ce", "100*center") and not center.requires_grad
    close(ce, loss_of("ce")(x, y))
    close(ce + center, value)


def test_losses_draw_the_lectures_figures(tmp):
    run(tmp, losses, "docs")
    sizes = {path.name: Image.open(path).size for path in (tmp / "docs").iterdir()}
    assert sizes == {"margins.png": (640, 420), "boundaries.png": (1500, 300), "gradients.png": (640, 420)}
    angle = losses.boundary_angle(math.radians(100), 4, 0, 0)                   # 4 a = 100 degrees - a
    close(math.degrees(angle), 20, 1e-3)
    angle = losses.boundary_angle(math.radians(100), 1, 0.5, 0)                 # a + 0.5 = 100 degrees - a
    close(math.degrees(angle), 50 - math.degrees(0.25), 1e-3)


def test_losses_sums_weigh_their_terms_and_say_what_they_have():
    x, y = people()
    ce, supcon = loss_of("ce")(x, y), loss_of("supcon")(x, y)
    close(loss_of("2*ce+0.5*supcon")(x, y), 2 * ce + 0.5 * supcon)
    triplet, tse = loss_of("triplet"), loss_of("arcface+0.1*tse:k=4")
    assert triplet.weight is None and not triplet.has_projection
    coco = loss_of("coco:centroids=true")
    assert coco.weight is None and coco.balanced
    assert tse.project(x).shape == (12, 4) and tse.has_projection
    assert tse.rows_per_class == {}                                             # nothing is divided
    balanced = [spec for spec in SPECS if losses.make(spec, 8, 6).balanced]
    assert balanced == ("contrastive double_margin marginal triplet hinge tse tpe npair supcon circle multisim "
                        "siamese ce+range").split()


def test_losses_sampled_classes_hold_the_batch():
    x, y = people(4, 3)[0], torch.tensor([39, 0, 7, 7, 8, 20, 39, 1, 2, 3, 4, 5])
    columns = {"0.5": 20, "0.01": 12, "1": 40}
    for name, (share, n) in product(SAMPLED, columns.items()):
        module = loss_of(f"{name}:sample={share}", classes=40)                  # never fewer columns than images
        with logits_seen() as seen:
            module(x, y).backward()
            some, _ = seen[0]
            seen.clear()
            module.eval()(x, y)                                                 # evaluation sees every class
        touched = module.weight.grad.view(-1, 40, 8).abs().sum((0, 2)) > 0
        every, labels = seen[0]
        assert some.shape[1] == n
        assert touched.sum() <= n and touched[y].all()
        assert every.shape == module.logits(x).shape == (12, 40)
        assert labels.equal(y)
    assert len(SAMPLED) >= 14


class Arrays(TorchDispatchMode):
    """Sees each tensor an operation makes: the largest, and how many (B, C) floats live at once."""
    def __init__(self, shape):
        super().__init__()
        self.shape, self.alive, self.most, self.largest = shape, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
                if t.shape == self.shape and t.element_size() >= 4:
                    storage = t.untyped_storage()
                    self.alive[storage._cdata] = StorageWeakRef(storage)
        for key, storage in list(self.alive.items()):
            if storage.expired():
                del self.alive[key]
        self.most = max(self.most, len(self.alive))
        return out


def test_losses_hold_few_arrays():
    y = torch.arange(16) % 8
    for spec in SPECS:
        module = loss_of(spec, 32, 3000, False)
        x = torch.randn(16, 32, requires_grad=True)
        with Arrays((16, 3000)) as seen:
            module(x, y).backward()
        k = 3 if spec == "subcenter" else 1
        assert seen.largest <= 3000 * 32 * k                # never C x C
        assert (module.weight is not None) <= seen.most <= 4


# ---- What a GPU does -----------------------------------------------------------------------------------------
# python test_all.py cuda: on the GPU that torch sees. DEVICE=cpu python test_all.py cuda: the same on the CPU.

def device_under_test():
    """DEVICE, or the GPU that torch sees; the test is skipped where there is neither."""
    if environ.get("DEVICE"):
        return torch.device(environ["DEVICE"])
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise Skip("no GPU is seen; DEVICE=cpu asks the CPU the same")


def left_out(what):
    print(f"        only a GPU can tell, left out: {what}", flush=True)


def losses_logged(folder):
    return [float(row["loss"]) for row in read_csv(folder / "log.csv")]


def test_gpu_has_its_own_tests_run_in_a_process_of_their_own():
    """In a full run, where the GPU is hidden from the others."""
    if not GPU_HIDDEN or not shutil.which("nvidia-smi"):
        raise Skip("no GPU is hidden here")
    environment = {name: value for name, value in environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if GPUS_GIVEN is not None:
        environment["CUDA_VISIBLE_DEVICES"] = GPUS_GIVEN
    done = subprocess.run([sys.executable, __file__, "cuda"], env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


def test_cuda_trains_in_both_precisions_with_both_optimizers(tmp):
    """A few epochs: the loss is finite and falls, the network lies on the device in its memory format."""
    device, nets, make = device_under_test(), [], models.make

    def noted(*args):
        nets.append(make(*args))
        return nets[-1]

    archs = ["swiftface"]
    if device.type == "cpu":
        left_out("resnet34 in fp16 and bf16")
    else:
        archs.append("resnet34")
    for arch, amp, opt in product(archs, ("fp16", "bf16"), ("adamw", "sgd")):
        out, lr = tmp / f"{arch}_{amp}_{opt}", 0.05 if opt == "sgd" else 2e-3
        flags = f"--arch {arch} --amp {amp} --opt {opt} --lr {lr} --weight-decay 0.05 --out {out.name}"
        with patched(models, "make", noted):
            tiny(tmp, flags, "--device", device, epochs=4)
            logged = losses_logged(out)
            assert len(logged) == 4 and all(map(math.isfinite, logged))
            assert logged[-1] < 0.9 * logged[0]
            weights = verify.load(out / "last.pt")["model"].values()
            assert all(w.isfinite().all() for w in weights)
            kernels = [p for p in nets[-1].parameters() if p.ndim == 4 and p.shape[1] > 1 < p.shape[2]]
            assert {p.device.type for p in kernels} == {device.type}
            assert all(p.is_contiguous(memory_format=data.memory_format(device)) for p in kernels)


@contextmanager
def no_waiting(device, first, last):
    """From the first to the last of these steps, nothing waits for the device: on CUDA that is an error, elsewhere
    the calls that would wait are counted. Augmentation is where a step begins."""
    augment, steps = data.augment, itertools.count(1)
    with waits_counted() as calls:
        def noted(*args):
            step = next(steps)
            if step == first:
                calls.clear()
            if device.type == "cuda" and step in (first, last):
                torch.cuda.set_sync_debug_mode("error" if step == first else "default")
            elif step == last:
                assert not calls
            return augment(*args)

        with patched(data, "augment", noted):
            try:
                yield
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
    assert next(steps) > last


def test_cuda_does_not_wait_between_steps(tmp):
    device = device_under_test()
    precisions = ["off"]
    if device.type == "cuda":
        precisions = ["fp16", "bf16"]
    else:
        left_out('torch.cuda.set_sync_debug_mode("error")')
    for number, loss in enumerate(("arcface", "triplet", "adaface:sample=0.5", "ce+0.003*center")):
        for amp in precisions:
            flags = f"--device {device} --amp {amp} --loss {loss} --out {number}{amp}"
            with no_waiting(device, 3, 7):
                tiny(tmp, flags, "--lr 1e-3 --batch-size 8 --per-person 2 --ema 0.9 --steps 7", epochs=1)


def difference(a, b):
    """The norm of the difference of two networks' states."""
    total = 0.0
    for name, value in a.items():
        if value.is_floating_point():
            total += float((value.double() - b[name].double()).square().sum())
    return math.sqrt(total)


def test_cuda_resumed_run_ends_as_the_uninterrupted_one(tmp):
    """On a CPU bit for bit. Sums by atomics differ on a GPU: a hundredth of the way travelled is allowed there."""
    device = device_under_test()
    torch.manual_seed(0)
    start = shallow_net("", 16, 32).state_dict()
    for opt, lr in ("sgd", 0.02), ("adamw", 1e-3):
        flags = f"--device {device} --opt {opt} --lr {lr} --ema 0.9"
        whole, parts = tmp / f"whole_{opt}", tmp / f"parts_{opt}"
        with patched(models, "make", shallow_net):
            tiny(tmp, flags, "--out", whole)
            tiny(tmp, flags, "--steps 2 --out", parts)
            run(tmp, train, "--resume --out", parts, "--steps 99 --device", device)
        whole, parts = (verify.load(folder / "last.pt") for folder in (whole, parts))
        if device.type == "cpu":
            same(whole, parts)
            continue
        assert whole["step"] == parts["step"] == 6
        far = difference(whole["model"], start)
        assert difference(whole["model"], parts["model"]) < 0.01 * far > 0
    if device.type == "cpu":
        left_out("how nearly a resumed run equals the whole one with a GPU's atomics")


def test_cuda_compiled_training_is_close_to_eager(tmp):
    device = device_under_test()
    if not has_compiler():
        raise Skip("no C++ compiler")
    limit = 20 if device.type == "cpu" else 300
    flags = ["--data", faces(), TINY, f"--device {device} --lr 1e-3 --epochs 2"]
    eager = seconds_of_train(tmp, "eager", flags, limit)
    compiled = seconds_of_train(tmp, "compiled", [*flags, "--compile"], limit)
    if not eager or not compiled:
        raise Skip(f"compiling takes over {limit} s here")
    close(losses_logged(tmp / "compiled"), losses_logged(tmp / "eager"), 0.02)


def test_cuda_embeds_as_the_cpu_does():
    device, images = device_under_test(), random_images(9)
    for arch in "swiftface", "resnet18", "mobilefacenet":
        torch.manual_seed(0)
        net = models.make(arch, 512, 32).eval()
        expected = verify.embed(net, images)
        z = verify.embed(net.to(device), images)
        assert z.device.type == "cpu"
        close(z, expected, 1e-3)
        close(z @ z.T, expected @ expected.T, 1e-3)


def test_cuda_exports_from_the_device(tmp):
    """The loss's projection goes to the CPU with the network."""
    device, x = device_under_test(), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    net, criterion = small_net().eval(), losses.make("tse:k=3", 16, 5).eval()
    expected = verify.embed(net, x.numpy(), criterion.project)
    ckpt = {"args": {"size": 32, "crop": 1.0}}
    with (patched(verify, "threshold_scores", lambda *_: None),
          patched(verify, "threshold_of", lambda *_: (0.5, "of a test"))):
        verify.export_checkpoint(net.to(device), criterion.to(device), ckpt, export_args(tmp), None)
    z = torch.export.load(tmp / "face.pt2").module()(x)
    assert not z.requires_grad
    close(z, expected, 1e-4)


def test_cuda_augments_as_the_cpu_does():
    """With the same random numbers; a pixel may fall to its neighbour where rounding decides."""
    device, x = device_under_test(), torch.arange(6 * 32 * 32 * 3).view(6, 32, 32, 3).remainder(251).byte()
    numbers = torch.rand(6, 13, generator=torch.Generator().manual_seed(0))
    with patched(torch, "rand", lambda *shape, device: numbers.to(device)):
        expected = data.augment(x, STRONG)
        found = data.augment(x.to(device), STRONG).cpu()
    differs = (found - expected).abs() > 1e-3
    assert differs.float().mean() < 0.01


def loss_and_gradients(head, x, y):
    """The loss of x and y, on the CPU, and the gradients of x and of the weights."""
    x = x.clone().requires_grad_()
    value = head(x, y)
    value.backward()
    gradients = [p.grad for p in head.parameters() if p.grad is not None]
    return [value.detach().cpu()] + [g.cpu() for g in (x.grad, *gradients)]


def test_cuda_losses_are_those_of_the_cpu():
    """Value and gradients of each loss, relative to the largest gradient."""
    device, y = device_under_test(), torch.arange(16) % 5
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    for spec in SPECS:
        if spec == "elastic":                               # it draws by a generator that each device has its own of
            continue
        head = loss_of(spec, 16, 10, double=False)
        moved = deepcopy(head).to(device)
        expected = loss_and_gradients(head, x, y)
        found = loss_and_gradients(moved, x.to(device), y.to(device))
        assert len(found) == len(expected)
        for ours, cpus in zip(found, expected):
            close(ours / cpus.abs().max().clamp_min(1), cpus / cpus.abs().max().clamp_min(1), 2e-3)


# What can be asked without a GPU.

def to_fake_gpu(module):
    """Inside a FakeTensorMode: put a module on a GPU of which only the shapes are there."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda"))
        for name, b in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
    return module


def test_train_losses_mix_no_devices_and_need_no_number_from_the_gpu():
    """Tensors of two devices, .item(), nonzero() and the like are errors with tensors that have shapes only."""
    for spec in (*SPECS, "adaface:sample=0.5", "hinge:mining=hard", "tse:mining=semihard"):
        if spec in ("hinge", "tse", "tpe"):                 # of all triplets: how many genuine pairs has the batch?
            continue
        head = losses.make(spec, 16, 10, images=100)
        with FakeTensorMode():
            to_fake_gpu(head)
            labels = torch.empty(16, dtype=torch.int64, device="cuda")
            for _ in range(2):                              # the first fills what is initialised by data
                value = head(torch.empty(16, 16, device="cuda"), labels)
            assert value.device.type == "cuda"


def test_train_sgd_survives_a_first_step_that_fp16_skips(tmp):
    """Memory that torch does not fill holds NaN here, as it may: momentum buffers must be there, zero, before."""
    def unfilled(tensor, **options):
        return torch.full_like(tensor, nan, **options)

    infinite_gradients = fp16_scale(2.0 ** 24)              # at first
    with infinite_gradients, patched(torch, "empty_like", unfilled), patched(models, "make", shallow_net):
        tiny(tmp, "--amp fp16 --opt sgd --out run", epochs=6)
    ckpt = verify.load(tmp / "run/last.pt")
    assert 1 < ckpt["scaler"]["scale"] < 2 ** 24            # steps were skipped, then some were made
    assert losses_logged(tmp / "run")[-1] < losses_logged(tmp / "run")[0]


def test_train_resumes_in_another_precision(tmp):
    copytree(trained(), tmp / "run")
    for epochs, amp in (2, "fp16"), (3, "fp16"), (4, "bf16"), (5, "off"):
        run(tmp, train, f"--resume --out run --epochs {epochs} --amp {amp}")
        ckpt = verify.load(tmp / "run/last.pt")
        assert ckpt["args"]["amp"] == amp and ckpt["step"] == 3 * epochs
        assert bool(ckpt["scaler"]) == (amp == "fp16")


def test_train_moving_average_is_the_plain_formula():
    net, average = small_net(), small_net()
    before = deepcopy(average.state_dict())
    for name, value in net.state_dict().items():
        if not value.is_floating_point():
            value.fill_(7)
    train.update_average((train.split_by_kind(average), train.split_by_kind(net)), 0.8)
    for name, value in net.state_dict().items():
        expected = value
        if value.is_floating_point():
            expected = 0.8 * before[name] + 0.2 * value
        close(average.state_dict()[name], expected, 1e-6)


def test_train_does_not_resume_under_another_default_margin(tmp):
    folder = trained()
    with patched(losses, "default_scale_and_margin", lambda *_: {"s": 9.0, "m": 0.4}):
        err = refused(tmp, train, "--resume --epochs 2 --out", folder)
    assert "was trained with arcface:" in err and "now means arcface:s=9.0,m=0.4" in err


# ---- Minutes, not seconds: run by name only --------------------------------------------------------------------

def four_people(folder):
    """Synthetic faces of four people, four each, in folder/set; the validation pairs are all pairs of them."""
    data.synthesise(folder / "made", people=8, images=4, size=32)
    made, there = folder / "made/cls_data/train", folder / "set/cls_data/train"
    copytree(made / "images", there / "images")
    copytree(made / "images", folder / "set/ver_data")
    rows = [line.split() for line in (made / "labels.txt").read_text().splitlines()]
    rows = [(name, person) for name, person in rows if int(person) < 4]
    labels = [f"{name} {person}\n" for name, person in rows]
    pairs = [f"{a} {b} {int(person == other)}\n" for (a, person), (b, other) in combinations(rows, 2)]
    write_text(there / "labels.txt", *labels)
    write_text(folder / "set/val_pairs.txt", *pairs)


MEMORISED_WITH = {"subcenter": ":k=1", "triplet": ":mining=all"}
MEMORISED_AT = {"l2softmax": 1e-2, "tse": 1e-2, "tpe": 1e-2, "npair": 1e-3}     # learning rates; the others' is 3e-3


def slow_losses_memorise_people_through_train(tmp):
    """Each loss, alone or with its partner, through train.py: EER 0 on four memorised people, and a resumed run
    ends as the whole one."""
    four_people(tmp)
    flags = "--data set --epochs 50 --dim 64 --batch-size 8 --per-person 2"
    for name in data.AUGMENT:
        flags += f" --{name} 0"
    missed = []
    for name in SPECS:
        spec = name.replace("+", "+0.01*") + MEMORISED_WITH.get(name, "")
        start = f"{flags} --lr {MEMORISED_AT.get(name, 3e-3)} --loss {spec}"
        whole, parts = tmp / name / "whole", tmp / name / "parts"
        with patched(os, "fsync"), patched(data, "plot"):
            tiny(tmp, start, "--steps 20 --out", whole)
            tiny(tmp, start, "--steps 7 --out", parts)
            run(tmp, train, "--resume --steps 20 --out", parts)
            same(verify.load(whole / "last.pt"), verify.load(parts / "last.pt"))
            run(tmp, train, "--resume --steps 100 --out", whole)
        best = verify.load(whole / "last.pt")["best"]
        print(f"    {spec}: EER {best:.3f}", flush=True)
        if best > 0:
            missed.append(spec)
        rmtree(tmp / name)
    assert not missed


def start_python(tmp, command):
    """A Python process of one thread in the folder tmp; its stderr goes to tmp/errors."""
    environment = environ | {"OMP_NUM_THREADS": "1"}
    with (tmp / "errors").open("w") as errors:
        return subprocess.Popen([sys.executable, *words(*command)], cwd=tmp, env=environment,
                                stdout=subprocess.DEVNULL, stderr=errors)


def seconds_of_train(tmp, out, flags, limit=None):
    """The seconds that train.py took, or None where it was killed (-9) at the limit."""
    started, child = time.monotonic(), start_python(tmp, [HERE / "train.py", "--out", out, *flags])
    with suppress(subprocess.TimeoutExpired):
        child.wait(limit)
    child.kill()
    assert child.wait() in (0, -9), (tmp / "errors").read_text()
    if child.returncode == 0:
        return time.monotonic() - started


def slow_kills(tmp):
    """Runs killed (-9) at twenty random times, start and saving included, and resumed end as the uninterrupted one."""
    rng = default_rng(0)
    for i, flags in enumerate(RUNS):
        whole, parts = tmp / f"whole{i}", tmp / f"parts{i}"
        start, resume = ["--data", faces(), TINY, "--epochs 20 --save-every 0", flags], ["--resume"]
        whole_run = seconds_of_train(tmp, whole, start)
        beginning = seconds_of_train(tmp, whole, resume)    # for nothing is left to do
        longest = beginning + (whole_run - beginning) / 12
        runs, kills, writing = 1, 0, 0
        while kills < 20 or not (parts / "last.pt").exists():
            begin = resume if (parts / "last.pt").exists() else start
            if seconds_of_train(tmp, parts, begin, rng.uniform(0, longest)) is None:
                kills += 1
                writing += any(parts.glob("*.tmp"))
            else:                                           # quicker than when it was timed: anew, with shorter lives
                same_runs(whole, parts)
                rmtree(parts)
                runs, kills, writing, longest = runs + 1, 0, 0, 0.9 * longest
        step = verify.load(parts / "last.pt")["step"]
        seconds_of_train(tmp, parts, resume)
        same_runs(whole, parts)
        assert len(read_csv(whole / "log.csv")) == 20
        print(f"    {flags}: {kills} kills, {writing} of them within a write, the last by step {step} of 60, in run"
              f" {runs}", flush=True)


CRASHING_TRAIN = f"""import os, sys
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
"""


def slow_distributed_torchrun(tmp):
    """torchrun itself: process 1 is killed in step 6, torchrun starts all again and they go on from the last save; then
    process 1 fails in step 10, and all end within seconds with its message."""
    write_text(tmp / "crash.py", CRASHING_TRAIN)
    launch = f"-m torch.distributed.run --nproc_per_node 2 --max-restarts 1 --master_port {free_port()} crash.py --data"
    command = launch, faces(), TINY, "--batch-size 15 --out o --loss cosface --shard"
    started, child = time.monotonic(), start_python(tmp, command)
    exit_code = child.wait(300)
    print(f"    {time.monotonic() - started:.0f} s, exit code {exit_code}")
    errors = (tmp / "errors").read_text()
    assert exit_code and "error: the fan is broken" in errors and "process 0 ends, for another did" in errors, errors
    assert verify.load(tmp / "o/last.pt")["step"] == 8, errors


# ---- Benchmarks: run by name only --------------------------------------------------------------------------------

def seconds(call, *args):
    started = time.perf_counter()
    call(*args)
    return time.perf_counter() - started


def training_step(net, opt, loss_of, x, amp="off"):
    """The loss, after a step of the plain loop; amp is train.py's, without a scaler."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    with torch.autocast(x.device.type, dtype, amp != "off"):
        z = net(x)
    loss = loss_of(z)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss


def peak_memory():
    """The largest resident memory of this process so far, MiB."""
    import resource                                         # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10


def cost_of_head(rank, n, shard, classes):
    """(MiB, kB, ms, loss) in process rank of n; see slow_distributed_classes."""
    before, sent, spent = peak_memory(), [], []
    if n > 1:
        torch.distributed.init_process_group("gloo")
    real, first, end = torch.distributed.all_reduce, 128 // n * rank, 128 // n * (rank + 1)

    def all_reduce(t, *args):                               # of n bytes sends 2 (N - 1) / N n of each process
        sent.append(t.numel() * t.element_size() * 2 * (n - 1) // n)
        return real(t, *args)

    def embeddings(x):
        return train.gather_embeddings(x[first:end].clone().requires_grad_(), first, 128)

    torch.manual_seed(0)
    head = losses.make("arcface", 512, classes, shard)
    opt = torch.optim.AdamW(head.parameters(), fused=True)
    x, y = torch.randn(128, 512), torch.randint(0, classes, (128,))
    with patched(torch.distributed, "all_reduce", all_reduce):
        for _ in range(6):
            started = time.perf_counter()
            loss = training_step(embeddings, opt, lambda z: head(z, y), x)
            spent.append(time.perf_counter() - started)
    return peak_memory() - before, sum(sent) / 6e3, 1e3 * np.median(spent[1:]), loss.item()


def slow_distributed_classes(tmp):
    """A step of the arcface head with AdamW, batch 128, dimension 512, in one process and in two: growth of the
    resident memory, bytes sent, median of five steps' time."""
    for classes in 10_000, 100_000, 1_000_000:
        loss_of_one = None
        for n, sharded in (1, False), (2, False), (2, True):
            if classes == 1_000_000 and n == 2 and not sharded:
                continue                                    # two whole copies of a million are 20 GB

            def task(rank):
                return cost_of_head(rank, n, (rank, n) if sharded else (0, 1), classes)

            memory, sent, ms, loss = processes(n, task, tmp)[0]
            loss_of_one = loss_of_one or loss
            close(loss, loss_of_one, 1e-4)
            print(f"    {classes:>9} classes, {n} processes, sharded {sharded:1}: {memory:7.0f} MiB, {sent:6.0f} kB,"
                  f" {ms:6.0f} ms, loss {loss:.4f}", flush=True)


class LinearSoftmax(nn.Linear):
    """What the heads are compared with."""

    def forward(self, x, y):
        return F.cross_entropy(super().forward(x), y)


def seconds_of_head(head, x, y):
    """Of forward and backward."""
    head.zero_grad()
    return seconds(lambda: head(x.detach().requires_grad_(), y).backward())


def slow_losses_cost():
    """Heads at 8,631 classes, batch 256, dimension 512: time of forward and backward over that of a linear layer with
    cross-entropy, medians of seven runs in turn, and how it grows with the number of classes."""
    x, y, linear, beyond = torch.randn(256, 512), torch.randint(0, 8631, (256,)), LinearSoftmax(512, 8631), {}
    for name in HEADS:
        head = losses.make(name, 512, 8631)
        times = np.array([(seconds_of_head(head, x, y), seconds_of_head(linear, x, y)) for _ in range(9)])[2:]
        ratio = np.median(times[:, 0] / times[:, 1])
        print(f"    {name:<13} {1e3 * np.median(times[:, 0]):6.0f} ms  {ratio:.2f} x linear + ce")
        if ratio > 1.5 and name not in ("subcenter", "groupface"):
            beyond[name] = round(float(ratio), 2)
    for classes, sample in product((10_000, 100_000, 1_000_000), (1, 0.1)):
        head, y = losses.make(f"cosface:sample={sample}", 512, classes), torch.randint(0, classes, (128,))
        seconds_of_head(head, x[:128], y)                   # to warm up
        ms = 1e3 * min(seconds_of_head(head, x[:128], y), seconds_of_head(head, x[:128], y))
        print(f"    cosface, {classes} classes, sample={sample}: {ms:.0f} ms")
        del head                                            # before the next is made
    assert not beyond


def slow_models_others_learn():
    """What test_models_of_each_family_learn promises, for the networks that it leaves out."""
    learn_and_load([arch for arch in models.ARCHS if arch not in LEARNING])


def slow_models_speed():
    """Images/s of each architecture at 112 pixels, batch 32, 8 where that takes long: a training step with AdamW in the
    precision that train.py picks, and embedding in float32 with the batch norms folded away; the better of two after
    one to warm up."""
    amp = train.precision(torch.device("cpu"))
    for arch in models.ARCHS:
        net = models.make(arch).to(**CHANNELS_LAST)
        opt = torch.optim.AdamW(net.parameters(), fused=True)
        x = torch.randn(32 if models.macs(net) < 2e9 else 8, 3, 112, 112).to(**CHANNELS_LAST)
        embed = torch.no_grad()(models.fold(net).to(**CHANNELS_LAST).forward)
        step = partial(training_step, net, opt, lambda z: z.float().square().mean(), amp=amp)
        rates = []
        for call in step, embed:
            call(x)                                         # to warm up
            best = min(seconds(call, x), seconds(call, x))
            rates.append(len(x) / best)
        print(f"{arch} {rates[0]:.0f} {rates[1]:.0f}", flush=True)


def race(arch, face_set, budget):
    """Train for so many seconds, the learning rate following the clock: (steps, validation EER)."""
    cpu, cache = torch.device("cpu"), data.cache_folder(face_set.root)
    files, labels = face_set.train
    size = 48 if arch == "swiftface" else 64
    images, rows = data.pack(files, size, cache, "train")
    pairs, _ = data.pack(face_set.val_pairs.files, size, cache, "val_pairs", max_unreadable=0)
    torch.manual_seed(0)
    net = models.make(arch, 512, size).to(**CHANNELS_LAST)
    head = losses.make("cosface:s=20,m=0.15", 512, len(face_set.names))
    opt = torch.optim.AdamW([*net.parameters(), *head.parameters()], weight_decay=0.05, fused=True)
    epochs = (data.epoch_batches(labels, rows, 64, 0, epoch) for epoch in itertools.count())
    amp, started, step = train.precision(cpu), time.monotonic(), 0
    for index, x in data.batches(images, itertools.chain.from_iterable(epochs), cpu):
        done = (time.monotonic() - started) / budget
        if done >= 1:
            break
        opt.param_groups[0]["lr"] = 2e-3 * train.lr_factor(round(1e6 * done), 10 ** 6, 0.1)
        y = torch.from_numpy(labels)[index]
        training_step(net, opt, lambda z: head(z, y), data.augment(x, WEAK), amp)
        step += 1
    sets = {"val_pairs": data.PairSet(pairs, face_set.val_pairs)}
    found = verify.evaluate(net.eval(), head, sets, len(face_set.names), mirror="none")
    return step, found.metrics["eer"]


def slow_models_race():
    """Every architecture for the same training seconds (SECONDS, 60) on the faces of the folder FACES, or data/, the
    schedule following the clock; then the validation EER. swiftface sees 48 pixels, the others 64. Or ARCHS only."""
    face_set = data.load(environ.get("FACES", "data"))
    for arch in environ.get("ARCHS", " ".join(models.ARCHS)).split():
        steps, eer_found = race(arch, face_set, float(environ.get("SECONDS", 60)))
        print(f"    {arch:<15} {steps:5} steps, EER {100 * eer_found:.1f} %", flush=True)


# slow_bench. A stage is a generator that yields the number of images of each of its batches.

def speed(stage, device):
    """(images/s of a stage, the share of its time that is left when the host has asked for all of its work)."""
    next(stage)                                             # to warm up
    wait_for(device)
    started, done = time.perf_counter(), sum(stage)
    host = time.perf_counter() - started
    wait_for(device)
    total = time.perf_counter() - started
    return done / total, 1 - host / total


def wait_for(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def contest(what, ours, peer, device):
    """Print our images/s and the peer's, medians of three rounds in turn; ours() and peer() begin a stage."""
    rates, ahead = np.empty((3, 2)), np.empty(3)
    for round in range(3):
        rates[round, 0], ahead[round] = speed(ours(), device)
        rates[round, 1], _ = speed(peer(), device)
    our_rate, peer_rate = np.median(rates, 0)
    ratio = np.median(rates[:, 0] / rates[:, 1])
    text = f"    {what:<30} {our_rate:8.0f} images/s, peer {peer_rate:6.0f}, {ratio:6.2f} x"
    if device.type != "cpu":
        text += f", host ahead {np.median(ahead):4.0%} of the time"
    print(text, flush=True)


def repeated(n, call, x):
    for _ in range(n):
        call(x)
        yield len(x)


def our_batches(packed, device, change):
    order = [default_rng(i).choice(len(packed), 128) for i in range(30)]
    for _, x in data.batches(packed, order, device):
        change(x)
        yield 128


def peers_batches(folder, device, steps):
    """torchvision's ImageFolder and transforms, and two workers."""
    images = torchvision.datasets.ImageFolder(folder, torchvision.transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(images, 128, True, num_workers=2, pin_memory=device.type == "cuda")
    for x, _ in loader:
        x.to(device, non_blocking=True)
        yield len(x)


def bench_data(folder, device):
    """From files to batches on the device."""
    data.synthesise(folder / "set", people=100, images=22, size=112)
    files, labels = data.read_split(folder / "set/cls_data/train")
    for f, y in zip(files, labels):
        person = folder / f"people/{y}"
        person.mkdir(parents=True, exist_ok=True)
        os.link(f, person / Path(f).name)
    T = torchvision.transforms
    plain = [T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]
    augmented = [T.RandomHorizontalFlip(), T.RandomAffine(10, (0.05, 0.05), (0.9, 1.1)), T.ColorJitter(0.2, 0.2, 0.2)]
    augmented += plain + [T.RandomErasing(0.2)]
    augment = partial(data.augment, strength={
        "mirror": 0.5, "rotate": 10, "shift": 0.05, "zoom": 0.1,
        "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "erase": 0.2})
    stages = [("gathered", len, plain), ("augmented", augment, augmented)]
    if has_compiler():
        compiled = partial(augment, kernel=torch.compile(data.augment_kernel, dynamic=False))
        stages.append(("the same, --compile", compiled, augmented))
    for side in 64, 112:
        packed, _ = data.pack(files, side, folder)
        for what, change, steps in stages:
            ours = partial(our_batches, packed, device, change)
            peer = partial(peers_batches, folder / "people", device, [T.Resize(side), *steps])
            contest(f"{what}, {side} pixels", ours, peer, device)


def has_compiler():
    return any(map(shutil.which, ("g++", "clang++", "cl")))


def trainer(net, head, x, fused):
    """A function that trains net and head one step on the images x, in the precision that train.py picks."""
    opt = torch.optim.AdamW([*net.parameters(), *head.parameters()], fused=fused)
    y, amp = torch.randint(0, 8631, (len(x),), device=x.device), train.precision(x.device)
    return partial(training_step, net, opt, lambda z: head(z.float(), y), amp=amp)


def bench_networks(device):
    """Training and embedding at 112 pixels against torchvision's ResNet-18 with the same neck in a plain loop."""
    batch, more = (64, 1) if device.type == "cpu" else (128, 10)
    x, form = torch.randn(batch, 3, 112, 112, device=device), data.memory_format(device)
    fast = x.to(memory_format=form)
    net, head = models.make("resnet18").to(device, memory_format=form), losses.make("ce", 512, 8631).to(device)
    peer, linear = torchvision.models.resnet18(), LinearSoftmax(512, 8631).to(device)
    peer.avgpool, peer.fc = nn.AdaptiveAvgPool2d(4), nn.Sequential(nn.Linear(8192, 512, False), nn.BatchNorm1d(512))
    peer.to(device)
    folded, frozen = models.fold(net).to(memory_format=form), deepcopy(peer).eval()
    peers_training = partial(repeated, 5 * more, trainer(peer, linear, x, False), x)
    contest("training", partial(repeated, 5 * more, trainer(net, head, fast, True), fast), peers_training, device)
    if has_compiler() and device.type != "cpu":             # compiling ResNet-18 takes a slow CPU ten minutes
        step = trainer(torch.compile(net), head, fast, True)
        contest("training, --compile", partial(repeated, 5 * more, step, fast), peers_training, device)
    with torch.no_grad():
        ours, peers = partial(repeated, 20 * more, folded, fast), partial(repeated, 20 * more, frozen, x)
        contest("embedding", ours, peers, device)


def bench_train(folder, device):
    """train.py itself on bench_data()'s set: images/s of its best epoch, augmentation, optimizer and all included."""
    length = "--epochs 1 --steps 8" if device.type == "cpu" else "--epochs 10"
    kinds = [""]
    if has_compiler() and device.type != "cpu":
        kinds.append("--compile")
    for number, kind in enumerate(kinds):
        run(folder, train, f"--data set --arch resnet18 --device {device} {length} {kind} --out run{number}")
        rate = max(float(row["img_per_s"]) for row in read_csv(folder / f"run{number}/log.csv"))
        print(f"    {f'train.py {kind}':<30} {rate:8.0f} images/s in its best epoch", flush=True)


def card(device):
    """What the device calls itself."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    with suppress(OSError, TypeError):
        cpus = Path("/proc/cpuinfo").read_text()
        return re.search("model name.*: (.*)", cpus)[1]
    return platform.processor()


def slow_bench(tmp):
    """What a user waits for, ours beside the peer's, on this machine (DEVICE, or the GPU, or the CPU), in turn, medians
    of three rounds: the data path, training and embedding, train.py itself, and our EER of many scores."""
    device = torch.device(environ.get("DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
    threads = torch.get_num_threads()
    print(f"    torch {torch.__version__}, {device}, {card(device)}, {threads} threads, amp {train.precision(device)}")
    torch.set_float32_matmul_precision("high")              # as the scripts do
    torch.backends.cudnn.benchmark = True
    bench_data(tmp, device)
    bench_networks(device)
    bench_train(tmp, device)
    labels, scores = default_rng(0).random(10_000_000) < 0.5, default_rng(1).random(10_000_000)
    print(f"    EER of ten million scores: {seconds(eer.eer, labels, scores):.2f} s")


# ---- slow_fuzz: broken input of every kind ---------------------------------------------------------------------
# A case is a kind and a number, from which all that is random in it follows: FUZZ="checkpoint 17" repeats one,
# FUZZ="checkpoint" one kind; FUZZ_CASES is how many of each kind there are, FUZZ_SEED makes others. Each runs in a
# process of its own.

PLAIN_WORDS = ("0|1|2|8|32|0.5|0.01|arcface|triplet|swiftface|euclidean|none|run|set|scores.csv"
               "|set/val_pairs.txt").split("|")
ODD_WORDS = ("|-1|3.5|nan|inf|-inf|1e400|999999999999999999999999999999|0x10|--|é|\udcff|a\nb|True|..|/|/dev/null"
             "|/dev/full|nowhere/x|run/best.pt|run/last.pt|set/ver_data|set/cls_data/train|faces.npy|cpu|cuda:99|off"
             "|set/val_pairs.txt/x|ce+|ce+ce|+|arcface:|arcface:m|arcface:m=|arcface:s=nan|0*ce|1e99*ce|cosine|learned"
             "|concat").split("|")
ODD_VALUES = [
    None, "", "abc", "../x", "\0", b"x", True, 1j,
    -1, 0, 1, 7, 10 ** 6, 10 ** 30, 0.5, -0.5, nan, inf,
    [], {}, (), [5], ["a", "b"], [[]], {"a": 1}, {5: "a"},
    torch.zeros(0), torch.zeros(3), torch.tensor(7), torch.tensor([True]),
    torch.full((2, 3), nan), torch.zeros(2, 3, dtype=torch.int8)]
ODD_LINES = (b"|\0|x|1 2 3 4|a.jpg|a.jpg b.jpg|a.jpg b.jpg 1|ID,Label|label,score|,,|1,nan|1,inf|2,0.5|-1,0.5|\xff\xfe"
             b"|\xef\xbb\xbf|'\"|=1+1|10\t300|7|\t|../../etc/passwd 0|/etc/passwd 0|images/x 0|x 1e9|x -1").split(b"|")
ODD_LINES += [b"x" * 70_000, b"0," + b"9" * 5000]
TINY_STEP = TINY + " --device cpu --epochs 1 --steps 1"
JUDGE = "--ckpt run/best.pt --device cpu"
COMMANDS = dict(table(f"""
    data     data --data set
    train    train --data set {TINY_STEP}
    resume   train --resume --out run --data set --epochs 2 --device cpu
    judge    verify {JUDGE} --data set
    last     verify --ckpt run/last.pt --data set --device cpu
    pairs    verify {JUDGE} --pairs set/val_pairs.txt --images set/ver_data
    search   verify {JUDGE} --gallery faces.npy --probes set/cls_data/dev
    folders  verify {JUDGE} --gallery set/cls_data/train --probes set/ver_data --plots plots
    two      verify {JUDGE} set/ver_data/val_0000_0.jpg set/ver_data/val_0001_1.jpg
    mean     verify {JUDGE} scores.csv --data set
    compare  verify --compare run
    eer      eer scores.csv"""))
ALL_COMMANDS = " ".join(COMMANDS)


@cache
def sound_folder():
    """What a case breaks a copy of: a set, a run, scores and embeddings, all sound."""
    folder = faces().parent / "fuzz"
    folder.mkdir()
    data.synthesise(folder / "set", people=8, images=3, size=32)
    run(folder, train, "--data set", TINY_STEP, "--steps 9 --out run")
    run(folder, verify, JUDGE, "--gallery set/cls_data/train --save-embeddings faces.npy")
    pairs = data.load(folder / "set").val_pairs
    rows = [f"{label},{i / 7}" for i, label in enumerate(pairs.labels)]
    write_text(folder / "scores.csv", "\n".join(["label,score", *rows]) + "\n")
    return folder


def pick(rng, items):
    return items[rng.integers(len(items))]


def pick_command(rng, names):
    """[script, its arguments] of one of the commands."""
    script, *flags = COMMANDS[pick(rng, names.split())].split()
    return [globals()[script], *flags]


def pick_file(rng, pattern):
    return pick(rng, sorted(file for file in Path().glob(pattern) if file.is_file()))


@cache
def flags_of(script):
    out, _ = run(tempfile.gettempdir(), script, "--help")
    return ["--help", *sorted(set(re.findall(r"(?m)^  (--[\w-]+)", out)))]


# The kinds: each breaks something in the working folder and returns the command to run.

def fuzz_arguments(rng):
    script, *argv = pick_command(rng, ALL_COMMANDS)
    for _ in range(rng.integers(1, 3)):
        words = ODD_WORDS if rng.random() < 0.5 else PLAIN_WORDS
        flag, value, how = pick(rng, flags_of(script)), pick(rng, words), rng.integers(4)
        if how == 0:
            argv.append(f"{flag}={value}")
        elif how == 1:
            argv.append(flag)
        else:
            argv += [flag, value]
    if script is train and "--steps" in argv[:-1]:          # however many are asked for, few are made
        argv += ["--steps", "2"]
    return script, *argv


def fuzz_checkpoint(rng):
    """A field of a checkpoint, at any depth, has an odd value or is missing."""
    path = Path("run") / pick(rng, ["last.pt", "best.pt"])
    ckpt = torch.load(path, weights_only=False)
    for _ in range(rng.integers(1, 3)):
        place, key = ckpt, pick(rng, list(ckpt))
        while isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
            key = pick(rng, list(place)) if isinstance(place, dict) else rng.integers(len(place))
        if rng.random() < 0.15:
            del place[key]
            break
        place[key] = pick(rng, ODD_VALUES)
    torch.save(ckpt, path)
    return pick_command(rng, "resume last" if path.stem == "last" else "judge two search mean")


def fuzz_bytes(rng):
    """Bytes of a file that the scripts wrote are flipped, cut off, zeroed or doubled."""
    patterns = "run/*.pt run/*.pt set/.packs/* faces.* run/*.csv run/*.json"
    path = pick_file(rng, pick(rng, patterns.split()))
    content = bytearray(path.read_bytes())
    how = pick(rng, "flip cut zero double noise empty".split())
    if how == "flip":
        for _ in range(rng.integers(1, 9)):
            if content:
                content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        del content[int(len(content) * rng.random()):]
    elif how == "zero":
        content[len(content) // 2:] = bytes(len(content) - len(content) // 2)
    elif how == "double":
        content *= 2
    else:
        content = bytearray(rng.bytes(len(content) if how == "noise" else 0))
    path.write_bytes(content)
    return pick_command(rng, "resume last judge pairs search train data compare")


def fuzz_text(rng):
    """Lines of a list are lost, doubled, replaced or changed."""
    listings = "set/cls_data/*/labels.txt set/val_pairs.txt set/test_pairs.txt scores.csv faces.txt"
    path = pick_file(rng, pick(rng, listings.split()))
    lines = path.read_bytes().split(b"\n")
    for _ in range(rng.integers(1, 4)):
        i, how = rng.integers(len(lines)), rng.integers(6)
        line = lines[i]
        if how == 0:
            del lines[i:i + rng.integers(1, len(lines) + 1)]
            lines.append(b"")
        elif how == 1:
            lines.insert(i, pick(rng, ODD_LINES))
        elif how == 2:
            lines[i] = pick(rng, ODD_LINES)
        elif how == 3:
            lines[i] = line + pick(rng, [b" ", b"\t", b",", b" 1"]) + pick(rng, ODD_LINES)
        elif how == 4:
            lines[i] = line[:rng.integers(len(line) + 1)]
        else:
            lines.insert(i, line)
    content = pick(rng, [b"\n", b"\r\n", b"\r"]).join(lines) if rng.random() < 0.3 else b"\n".join(lines)
    if rng.random() < 0.1:
        content = content.decode("latin-1").encode(pick(rng, ["utf-16", "utf-32", "utf-8-sig"]))
    path.write_bytes(content)
    readers = {"scores.csv": "eer mean", "faces.txt": "search"}
    return pick_command(rng, readers.get(path.name, "data train judge pairs resume"))


def picture_bytes(rng):
    """An image file of an odd format, size or mode, sometimes broken."""
    size = pick(rng, [(1, 1), (1, 40), (40, 1), (33, 35), (300, 2), (64, 64)])
    mode = pick(rng, "1 L LA P RGB RGBA CMYK YCbCr I I;16 F HSV LAB".split())
    kind = pick(rng, "PNG JPEG GIF TIFF BMP WEBP PPM ICO TGA JPEG2000".split())
    buffer = BytesIO()
    try:
        Image.new(mode, size).save(buffer, kind)
    except (OSError, ValueError, KeyError):                 # a format without this mode
        Image.new("RGB", size).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    for _ in range(pick(rng, [0, 0, 1, 5, 50])):
        content[rng.integers(len(content))] = int(rng.integers(256))
    return bytes(content[:pick(rng, [None, None, 5, len(content) // 2, len(content) - 1])])


def replace_with_something_odd(rng, path):
    """In place of a file: nothing, a folder, a pipe, a link that leads nowhere, round, or to a device."""
    path.unlink()
    how = pick(rng, "nothing folder pipe dangling loop device picture".split())
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "picture":
        path.write_bytes(picture_bytes(rng))
    elif how != "nothing":
        targets = dict(dangling="nowhere", loop=path.name, device=pick(rng, ["/dev/null", "/dev/zero", "/dev/full"]))
        path.symlink_to(targets[how])


def fuzz_images(rng):
    for _ in range(rng.integers(1, 4)):
        path = pick_file(rng, pick(rng, ["set/cls_data/*/images/*", "set/ver_data/*"]))
        if rng.random() < 0.6:
            path.write_bytes(picture_bytes(rng))
        else:
            replace_with_something_odd(rng, path)
    return pick_command(rng, "data train judge pairs folders resume two")


ODD_NAMES = (".hidden|._x.jpg|Thumbs.db|x y|x\ny|x\ty|é|\udcff|images|cls_data|ver_data|train|1|x.JPG|x|x.heic"
             "|labels.txt|x.npy|-x|" + "x" * 200).split("|")


def fuzz_folders(rng):
    """Files and folders are lost, added, renamed, or something else in their place."""
    for _ in range(rng.integers(1, 4)):
        inside = [Path("set"), *sorted(p for p in Path("set").rglob("*") if ".packs" not in p.parts and p.is_dir())]
        folder, name = pick(rng, inside), pick(rng, ODD_NAMES)
        how = pick(rng, "lose add fill rename link odd empty".split())
        if how == "lose":
            rmtree(folder)
            folder.mkdir(exist_ok=True, parents=True)
        elif how == "rename" and folder != Path("set") and not folder.with_name(name).exists():
            folder.rename(folder.with_name(name))
        elif how in ("link", "fill", "add"):
            new = folder / name
            if new.exists():
                continue
            if how == "link":
                new.symlink_to(pick(rng, ["..", ".", "nowhere", "/etc"]))
            elif how == "fill":
                new.mkdir()
                (new / pick(rng, ODD_NAMES)).write_bytes(picture_bytes(rng))
            else:
                new.write_bytes(picture_bytes(rng))
        elif how == "odd":
            found = pick(rng, ["set/*.txt", "set/*/*/labels.txt", "run/*", "faces.*", "scores.csv"])
            if any(path.is_file() for path in Path().glob(found)):
                replace_with_something_odd(rng, pick_file(rng, found))
        elif how == "empty":
            for file in folder.iterdir():
                if file.is_file():
                    file.unlink()
    return pick_command(rng, ALL_COMMANDS)


KINDS = {"arguments": fuzz_arguments, "checkpoint": fuzz_checkpoint, "bytes": fuzz_bytes, "text": fuzz_text,
         "images": fuzz_images, "folders": fuzz_folders}


def run_case(kind, number, folder, answer):
    """In a process of its own: break something in folder, run a command there; its outcome goes to the file answer."""
    os.setsid()                                             # no terminal, and nothing else to be killed with it
    torch.set_num_threads(1)
    os.chdir(folder)
    seed = int(environ.get("FUZZ_SEED", 0))
    rng = default_rng((list(KINDS).index(kind), number, seed))
    script, *argv = KINDS[kind](rng)
    command = [f"{script.__name__}.py", *map(str, argv)]
    before = {path: path.read_bytes() for path in Path("run").glob("*.pt") if path.is_file()}
    try:
        exit_code, _, err = ended(".", script, *command[1:])
    except BaseException:
        exit_code, err = "traceback", traceback.format_exc()
    lines, fault = err.splitlines(), ""
    if exit_code not in (0, 2, 130):
        fault = err[-1500:]
    elif exit_code == 2 and (not lines or not lines[-1].startswith("error: ")):
        fault = f"exit code 2 without a line of error: {err[-300:]}"
    elif exit_code == 2 and kind != "arguments" and any(path.read_bytes() != old for path, old in before.items()):
        fault = f"refused, and a checkpoint was overwritten: {lines[-1]}"
    answer.write_text(json.dumps([exit_code, shlex.join(command), fault or "\n".join(lines[-1:]), bool(fault)]))


def outcome_of_case(kind, number, folder, limit=30):
    """[exit code, command, text, whether that is a fault] of a case, which is killed at the limit in seconds."""
    home, answer = folder / "case", folder / "answer"
    copytree(sound_folder(), home, symlinks=True)
    answer.unlink(missing_ok=True)
    child = multiprocessing.get_context("fork").Process(target=run_case, args=(kind, number, home, answer))
    child.start()
    child.join(limit)
    hangs = child.is_alive()
    child.kill()
    child.join()
    rmtree(home, ignore_errors=True)
    if answer.exists():
        return json.loads(answer.read_text())
    if hangs:
        return ["hang", "", f"no end after {limit} s", True]
    return ["killed", "", f"the process ended with {child.exitcode}", True]


def slow_fuzz(tmp):
    """Some hundred broken inputs: no traceback, no hang, no exit code but 0, 2 and 130."""
    if not hasattr(os, "fork"):
        raise Skip("no fork() on this system")
    wanted, number = (environ.get("FUZZ", "") + "  ").split(" ")[:2]
    cases, faults = int(environ.get("FUZZ_CASES", 60)), []
    sound_folder()
    for script in data, train, verify, eer:
        flags_of(script)
    for kind in KINDS:
        if wanted not in ("", kind):
            continue
        counts = {}
        for i in [int(number)] if number else range(cases):
            code, command, text, fault = outcome_of_case(kind, i, tmp)
            counts[code] = counts.get(code, 0) + 1
            if fault or number:
                print(f'    FUZZ="{kind} {i}": {code}; {command}\n{text}', flush=True)
            if fault:
                faults.append(f"{kind} {i}")
        text = ", ".join(f"{n} x {code}" for code, n in sorted(counts.items(), key=str))
        print(f"    {kind}: {sum(counts.values())} cases, exit codes {text}", flush=True)
    assert not faults, f'{len(faults)} faults; FUZZ="{faults[0]}" python test_all.py slow_fuzz repeats one: {faults}'


# ---- README and the rest -------------------------------------------------------------------------------------

def row_of_loss(name, cls):
    """Its line in the table of losses: name, arguments but for sample, the docstring's first line."""
    arguments = []
    for argument, default in losses.arguments_of(cls).items():
        if argument != "sample":
            arguments.append(f"{argument}={'auto' if default is None else default}")
    about = cls.__doc__.splitlines()[0].replace("|", r"\|")
    return f"\n| `{name}` | {', '.join(arguments) or '-'} | {about} |\n"


def pages():
    return [HERE / "README.md", *sorted(HERE.glob("docs/*.md"))]


def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_and_docs_link_to_files_and_headings_that_exist():
    assert len((HERE / "README.md").read_text()) <= 12_000
    for page in pages():
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists()
            assert not anchor or anchor in anchors_of(target)


def test_readme_and_docs_use_flags_that_exist():
    known, found = {"eer": [], "test_all": []}, 0
    for script in data, train, verify:
        known[script.__name__] = flags_of(script)
    for page in pages():
        text = page.read_text().replace("\\\n", " ")
        for name, arguments in re.findall(r"\b(data|train|verify|eer|test_all)\.py ([^#\n;`|]*)", text):
            used = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", arguments))
            assert used <= set(known[name])
            found += 1
    assert found > 50


def test_readme_and_docs_have_a_row_for_each_architecture_loss_and_alias():
    text = "\n".join(page.read_text() for page in pages())
    rows = [f"| `{arch}` |" for arch in models.ARCHS]
    rows += [f"\n| `{alias}` | `{spec}` |\n" for alias, spec in losses.ALIASES.items()]
    rows += map(row_of_loss, losses.LOSSES, losses.LOSSES.values())
    missing = [row for row in rows if row not in text]
    assert not missing, f"the tables of README.md and docs/ lack {missing}"


def test_docs_name_the_losses_that_can_sample_classes():
    text = (HERE / "docs/losses.md").read_text()
    sentence = re.search(r"`sample=` have ([^.]*)\.", text)[1]
    assert re.findall(r"`(\w+)`", sentence) == SAMPLED


def imports_of(file):
    """The names of the packages that a script imports, ours among them."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_scripts_import_four_packages_at_most():
    allowed = set("torch torchvision numpy PIL data eer losses models train verify".split())
    for file in HERE.glob("*.py"):
        names = imports_of(file) - sys.stdlib_module_names
        assert names <= allowed
    assert "torchvision" not in imports_of(HERE / "models.py")


# ---- Running them --------------------------------------------------------------------------------------------

def values_where_it_failed(error):
    """The local variables of the test and of those functions here that it was in: for which case of a table it was."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 200
    lines = []
    for frame, _ in traceback.walk_tb(error.__traceback__.tb_next):
        if frame.f_globals is globals():
            lines += [f"    {name} = {brief.repr(value)}\n" for name, value in frame.f_locals.items()]
    return "".join(lines)


def outcome_of(name):
    """(seconds, "passed", "skipped" or "failed", why) of a test; test(tmp), if it asks for one, has a new folder."""
    torch.set_num_threads(1 if IN_PARALLEL else 2)                              # OMP_NUM_THREADS may say otherwise
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    test, started = globals()[name], time.monotonic()
    outcome, why = "passed", ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            test(*[Path(folder)] * len(inspect.signature(test).parameters))
        except Skip as e:
            outcome, why = "skipped", f": {e}"
        except Exception as e:
            outcome, why = "failed", "\n" + traceback.format_exc() + values_where_it_failed(e)
    return time.monotonic() - started, outcome, why


def run_tests(names):
    """True if all passed. Many tests are divided between two processes of one thread each."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    two = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, two:      # a folder for all that tests leave behind
        environ["TMPDIR"] = tempfile.tempdir = folder
        outcomes = two.map(outcome_of, names) if IN_PARALLEL else map(outcome_of, names)
        for name, (seconds, outcome, why) in zip(names, outcomes):
            counts[outcome] += 1
            print(f"{outcome:<7} {seconds:5.1f} s  {name[5:].replace('_', ' ')}{why}", flush=True)
    print(", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    return counts["failed"] == 0


def main():
    words, names = sys.argv[1:], []
    for name in globals():
        wanted = not words or any(word in name for word in words)
        if name in words and name.startswith("slow_") or name.startswith("test_") and wanted:
            names.append(name)
    sys.exit(0 if run_tests(names) else 1)


if __name__ == "__main__":
    main()
