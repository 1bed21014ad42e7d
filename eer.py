"""How good a face verifier is: equal error rate and the rest of the ROC, in numpy alone.

    python eer.py scores.csv ...        # columns label,score; 1 = same person, a higher score = more alike

    from eer import eer, report
    rate, threshold = eer(labels, scores)       # eer in 0..1, not in percent

A pair is accepted when score >= threshold. FAR = accepted impostors / impostors (the ROC's FPR),
FRR = rejected genuine pairs / genuine pairs (1 - TPR, and TPR is what face recognition calls TAR).
The EER is where the ROC, a polyline through one point per DISTINCT score, crosses TPR = 1 - FPR: the rule of
the homework (sklearn's roc_curve, interpolated, brentq), solved exactly instead of by iteration. Two common
shortcuts give other values: the threshold nearest to FAR = FRR, and the mean of FAR and FRR there.
"""
import csv
import os
import sys
from bisect import bisect

import numpy as np

FARS = "1e-4", "1e-3", "1e-2", "1e-1"


# ---- From sorted scores --------------------------------------------------------------------------------------

def split(labels, scores):
    """Sorted genuine (P,) and impostor (N,) scores. ValueError for labels other than 0 and 1,
    scores that are not finite, unequal lengths, or a kind of pair that does not occur."""
    labels, scores = np.asarray(labels).ravel(), np.asarray(scores).ravel()
    if labels.shape != scores.shape:
        raise ValueError(f"{len(labels)} labels but {len(scores)} scores; give one score a pair")
    same = labels == 1
    bad = np.flatnonzero(~same & (labels != 0))
    if len(bad):
        raise ValueError(f"pair {bad[0]} has label {labels[bad[0]]}; use 1 (same person) or 0 (different)")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ValueError(f"pair {bad[0]} has score {scores[bad[0]]}; look for NaN in the embeddings")
    if same.all() or not same.any():
        raise ValueError(f"{same.sum()} genuine and {(~same).sum()} impostor pairs; an EER needs both kinds")
    return np.sort(scores[same]), np.sort(scores[~same])


def accepted(scores, threshold):
    """The share of sorted scores that are >= threshold, a scalar or an array."""
    return (len(scores) - np.searchsorted(scores, threshold)) / len(scores)


def rates(genuine, impostor, threshold):
    """(FAR, TAR) of accepting score >= threshold, from sorted scores; threshold a scalar or an
    array."""
    return accepted(impostor, threshold), accepted(genuine, threshold)


def curve(genuine, impostor):
    """roc() from sorted scores."""
    thresholds = np.append(np.unique(np.concatenate((genuine, impostor))), np.inf)[::-1]
    far, tar = rates(genuine, impostor, thresholds)
    return far, tar, thresholds


def crossing(genuine, impostor):
    """(EER, threshold) from sorted scores. TAR + FAR falls strictly from one distinct score to the
    next higher, so the place where it falls below 1 is found by bisection, without the whole ROC.
    """
    def deficit(threshold):
        return 1 - sum(rates(genuine, impostor, threshold))

    below, above = -np.inf, np.inf              # the highest score with TAR + FAR >= 1, and the next higher one
    for scores in (genuine, impostor):
        i = bisect(scores, 0, key=deficit)
        if i > 0:
            below = max(below, scores[i - 1])
    for scores in (genuine, impostor):
        i = np.searchsorted(scores, below, "right")
        if i < len(scores):
            above = min(above, scores[i])
    far1, tar1 = rates(genuine, impostor, below)
    far0, tar0 = rates(genuine, impostor, above)                    # (0, 0) at infinity
    fraction = (1 - far0 - tar0) / (far1 + tar1 - far0 - tar0)      # of the way from above to below
    rate = float(far0 + fraction * (far1 - far0))
    if above == np.inf:
        return rate, float(below)
    return rate, float(above + fraction * (float(below) - float(above)))


# ---- From labels and scores ----------------------------------------------------------------------------------

def eer(labels, scores):
    """(EER in 0..1, threshold). labels (n,) of 0/1, scores (n,), higher = same person. Exact with
    ties, in O(n log n). Between two scores the threshold is interpolated as the ROC is. Raises as
    split() does."""
    return crossing(*split(labels, scores))


def roc(labels, scores):
    """(FAR, TAR, threshold), each (k + 1,) for k distinct scores, from (0, 0) at infinity to (1,
    1)."""
    return curve(*split(labels, scores))


def at_far(labels, scores, far):
    """The lowest threshold that accepts at most a share far of the impostors; just above the
    highest of their scores where there are fewer than 1/far."""
    _, impostor = split(labels, scores)
    may_pass = int(far * len(impostor) * (1 + 1e-12))               # 0.29 * 100 is a little below 29
    highest_rejected = np.append(-np.inf, impostor)[-1 - may_pass]
    return float(np.nextafter(highest_rejected, np.inf))


def best_threshold(labels, scores):
    """The threshold of highest accuracy: half-way between two neighbouring scores, of several
    equally good ones in the widest gap, and of those the highest. Where nothing between two scores
    is as good: the lowest score, which accepts all pairs, or just above the highest, which refuses
    all."""
    far, tar, upper = roc(labels, scores)
    prior = np.mean(np.asarray(labels) == 1)                        # the share of genuine pairs
    accuracy = prior * tar + (1 - prior) * (1 - far)
    # all thresholds in (lower, upper] are equally good; the two ends count as gaps of width 0
    upper[0] = np.nextafter(np.asarray(scores).max(), np.inf)
    lower = np.append(upper[1:], upper[-1])
    lower[0] = upper[0]
    best = np.flatnonzero(accuracy > accuracy.max() - 1e-12)
    i = best[np.argmax(upper[best] - lower[best])]
    if upper[i] == lower[i]:                                        # no gap; half of 5e-324 would be 0
        return float(upper[i])
    return float(upper[i] / 2 + lower[i] / 2)


def folds_accuracy(labels, scores, folds):
    """(mean, standard error) of the accuracies of the folds, the threshold of each being the best
    of the others: LFW's protocol (Huang et al. 2007). folds (n,) numbers each pair's fold."""
    labels, scores, folds = map(np.asarray, (labels, scores, folds))
    accuracies = []
    for fold in np.unique(folds):
        own = folds == fold
        threshold = best_threshold(labels[~own], scores[~own])
        accuracies.append(np.mean((scores[own] >= threshold) == labels[own]))
    return float(np.mean(accuracies)), float(np.std(accuracies, ddof=1) / len(accuracies) ** 0.5)


def interval(rate, genuine, impostor):
    """95 % confidence interval of an EER from so many genuine and impostor pairs: Wilson's (1927),
    for the 4PN/(P+N) trials that give the variance (1/P + 1/N) rate (1 - rate) / 4 of the mean of
    FAR and FRR. It assumes independent pairs; for pairs that share people or images the true
    interval is wider."""
    z, n = 1.9599639845400536, 4 * genuine * impostor / (genuine + impostor)        # z: a normal's 97.5 % quantile
    centre = rate + z * z / (2 * n)
    half = z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def report(labels, scores):
    """Every figure of scored pairs, all rates in 0..1: eer, its 95 % interval eer_low..eer_high,
    threshold (at the EER), far and frr there, auc, acc (at the best threshold of these same pairs,
    hence optimistic), 'tar@far=1e-3' and its like (ROC interpolated, the homework's TPR@FPR; NaN
    where there are fewer than 1/FAR impostors to measure it with), genuine, impostor (counts)."""
    genuine, impostor = split(labels, scores)
    p, n = len(genuine), len(impostor)
    rate, threshold = crossing(genuine, impostor)
    far, tar = rates(genuine, impostor, threshold)
    low, high = interval(rate, p, n)
    fars, tars, _ = curve(genuine, impostor)
    accuracy = (tars * p + (1 - fars) * n) / (p + n)
    area = np.sum(np.diff(fars) * (tars[1:] + tars[:-1]) / 2)       # under the ROC, by trapezia
    result = dict(eer=rate, eer_low=low, eer_high=high, threshold=threshold, far=float(far), frr=float(1 - tar),
                  auc=float(area), acc=float(accuracy.max()), genuine=p, impostor=n)
    for name in FARS:
        far = float(name)
        tar = np.interp(far, fars, tars)                            # where the ROC is vertical, its upper end
        result[f"tar@far={name}"] = float(tar) if far * n >= 1 else np.nan
    return result


# ---- Text and command line -----------------------------------------------------------------------------------

def percent(share):
    return "-" if np.isnan(share) else f"{100 * share:.2f} %"


def show(r):
    """The lines of a report() for a person to read; percent, a dash where the pairs cannot tell."""
    tars = "   ".join(f"{k[4:]} {percent(v)}" for k, v in r.items() if "@" in k)
    return (f"EER {percent(r['eer'])}  (95 % interval {100 * r['eer_low']:.2f} to {100 * r['eer_high']:.2f}; "
            f"{r['genuine']} genuine, {r['impostor']} impostor pairs)\n"
            f"at threshold {r['threshold']:.4f}: FAR {percent(r['far'])}, FRR {percent(r['frr'])}\n"
            f"AUC {percent(r['auc'])}   best accuracy {percent(r['acc'])}\nTAR at {tars}")


def table(rows):
    """Rows of text, the first of which is the head, as a Markdown table with straight columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * (width + 2) for width in widths]
    lines.insert(1, f"|{'|'.join(rule)}|")
    return "\n".join(lines)


def read(path):
    """(labels, scores) from a CSV file with columns label,score; a header may name them, in any
    order."""
    rows, labels, scores = [], [], []
    if os.path.exists(path) and not os.path.isfile(path):           # reading a pipe may wait for ever
        raise ValueError(f"{path}: not a regular file; name a CSV file of label,score")
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as f:
            for line, row in enumerate(csv.reader(f), 1):
                if any(row):
                    rows.append((line, [cell.strip() for cell in row]))
    except csv.Error as e:
        raise ValueError(f"{path}: {e}; write lines of label,score") from None
    head = [cell.lower() for cell in rows[0][1]] if rows else []
    has_head = "label" in head and "score" in head
    if has_head:
        del rows[0]
    else:
        head = ["label", "score"]
    for line, row in rows:
        try:
            cells = dict(zip(head, row, strict=not has_head))
            label, score = float(cells["label"]), float(cells["score"])
        except (ValueError, KeyError):
            label = None
        if label not in (0, 1) or not np.isfinite(score):
            raise ValueError(f"{path}:{line}: found {','.join(row)[:60]!r}; write label,score, as in 1,0.83")
        labels.append(label)
        scores.append(score)
    if len(set(labels)) < 2:
        raise ValueError(f"{path}: no scores of both kinds in it; write lines of label,score, of 1 and of 0")
    return np.array([labels, scores])


def main():
    if len(sys.argv) < 2:
        raise ValueError("give a CSV file of scores, or several; --help tells more")
    if sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    reports = {path: report(*read(path)) for path in sys.argv[1:]}
    if len(reports) == 1:
        print(show(*reports.values()))
        return
    rows = [("scores", "EER", "AUC", "accuracy", "TAR at FAR 1e-2")]
    for path, r in reports.items():
        rows.append([path] + [percent(r[key]) for key in ("eer", "auc", "acc", "tar@far=1e-2")])
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:                                         # nobody reads on, as after | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as e:
        text = f"{e.filename or 'what was printed'}: {e.strerror}; name another" if isinstance(e, OSError) else e
        print("error:", text, file=sys.stderr)
        sys.exit(2)
