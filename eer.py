"""Judge a face verifier: equal error rate and the rest of the ROC, in numpy alone.

    python eer.py scores.csv ...        # columns label,score; 1 = same person, a higher score = more alike

    from eer import eer, report
    rate, threshold = eer(labels, scores)       # eer in 0..1, not in percent

A pair is accepted when score >= threshold. FAR = accepted impostors / impostors (the ROC's FPR),
FRR = rejected genuine pairs / genuine pairs (1 - TPR, and TPR is what face recognition calls TAR).
The EER is where the ROC, a polyline through one point per DISTINCT score, crosses TPR = 1 - FPR: the rule of
the homework (sklearn's roc_curve, interpolated, brentq), solved exactly instead of by iteration. Two shortcuts
in common use differ from it: the threshold nearest to FAR = FRR, and the mean of FAR and FRR there.
"""
import csv
import sys
from bisect import bisect

import numpy as np

FARS = "1e-4", "1e-3", "1e-2", "1e-1"


def split(labels, scores):
    """Sorted genuine (P,) and impostor (N,) scores. ValueError for labels other than 0 and 1, scores that are
    not finite, unequal lengths, or a kind of pair that does not occur."""
    labels, scores = np.asarray(labels).ravel(), np.asarray(scores).ravel()
    if labels.shape != scores.shape:
        raise ValueError(f"{len(labels)} labels but {len(scores)} scores; give one score a pair")
    same = labels == 1
    if len(bad := np.flatnonzero(~same & (labels != 0))):
        raise ValueError(f"pair {bad[0]} has label {labels[bad[0]]}; use 1 (same person) or 0 (different)")
    if len(bad := np.flatnonzero(~np.isfinite(scores))):
        raise ValueError(f"pair {bad[0]} has score {scores[bad[0]]}; look for NaN in the embeddings")
    if same.all() or not same.any():
        raise ValueError(f"{same.sum()} genuine and {(~same).sum()} impostor pairs; an EER needs both kinds")
    return np.sort(scores[same]), np.sort(scores[~same])


def rates(genuine, impostor, threshold):
    """(FAR, TAR) of accepting score >= threshold, from sorted scores; threshold a scalar or an array."""
    return tuple((len(s) - np.searchsorted(s, threshold)) / len(s) for s in (impostor, genuine))


def crossing(genuine, impostor):
    """(EER, threshold) from sorted scores. TAR + FAR falls strictly from score to score, so where it falls below 1
    is found by bisection among the genuine and among the impostor scores; no ROC is built."""
    def lacking(threshold):
        far, tar = rates(genuine, impostor, threshold)
        return 1 - (tar + far)

    both = genuine, impostor                        # below: the highest score at which TAR + FAR >= 1; above: the next
    below = max(s[i - 1] for s in both if (i := bisect(s, 0, key=lacking)))
    above = min((s[i] for s in both if (i := np.searchsorted(s, below, "right")) < len(s)), default=np.inf)
    (far1, tar1), (far0, tar0) = (rates(genuine, impostor, s) for s in (below, above))      # (0, 0) at infinity
    part = (1 - far0 - tar0) / (far1 + tar1 - far0 - tar0)          # of the way from above to below
    threshold = below if above == np.inf else above + part * (float(below) - float(above))
    return float(far0 + part * (far1 - far0)), float(threshold)


def eer(labels, scores):
    """(EER in 0..1, threshold). labels (n,) of 0/1, scores (n,), higher = same person. Exact with ties, in
    O(n log n). Between two scores the threshold is interpolated as the ROC is. Raises as split() does."""
    return crossing(*split(labels, scores))


def roc(labels, scores):
    """(FAR, TAR, threshold), each (k + 1,) for k distinct scores, from (0, 0) at infinity to (1, 1)."""
    return curve(*split(labels, scores))


def curve(genuine, impostor):
    """roc() from sorted scores."""
    thresholds = np.append(np.unique(np.concatenate((genuine, impostor))), np.inf)[::-1]
    return (*rates(genuine, impostor, thresholds), thresholds)


def at_far(labels, scores, far):
    """The lowest threshold that accepts at most a share far of the impostors; above them all where they are fewer
    than 1/far."""
    impostor = split(labels, scores)[1]
    rank = int(far * len(impostor) * (1 + 1e-12))                   # so many may be accepted
    return float(np.nextafter(np.append(-np.inf, impostor)[len(impostor) - rank], np.inf))


def best_threshold(labels, scores):
    """The threshold of highest accuracy: half-way between two neighbouring scores, of several equally good ones in
    the widest gap, and of those the highest."""
    far, tar, cut = roc(labels, scores)
    p = np.mean(np.asarray(labels) == 1)
    accuracy = (p * tar + (1 - p) * (1 - far))[1:-1]                # cut i lies between scores i and i + 1
    if not len(accuracy):                                           # all scores are equal
        return float(cut[-1])
    good = np.flatnonzero(accuracy > accuracy.max() - 1e-12)
    i = good[np.argmax(cut[1:-1][good] - cut[2:][good])]
    return float(cut[1 + i] / 2 + cut[2 + i] / 2)


def folds_accuracy(labels, scores, folds):
    """(mean, standard error) of the accuracies of the folds, the threshold of each being the best of the others:
    LFW's protocol (Huang et al. 2007). folds (n,) numbers each pair's fold."""
    labels, scores, folds = map(np.asarray, (labels, scores, folds))
    each = [np.mean((scores[own] >= best_threshold(labels[~own], scores[~own])) == labels[own])
            for own in (folds == f for f in np.unique(folds))]
    return float(np.mean(each)), float(np.std(each, ddof=1) / len(each) ** 0.5)


def interval(rate, genuine, impostor):
    """95 % confidence interval of an EER from so many genuine and impostor pairs: Wilson's, for the 4PN/(P+N)
    trials that give the variance (1/P + 1/N) rate (1 - rate) / 4 of the mean of FAR and FRR. It takes the pairs
    for independent; pairs that share people or images deserve a wider one."""
    z, n = 1.9599639845400536, 4 * genuine * impostor / (genuine + impostor)         # z: a normal's 97.5 % quantile
    centre, half = rate + z * z / (2 * n), z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def report(labels, scores):
    """What there is to say about scored pairs, all rates in 0..1: eer, its 95 % interval eer_low..eer_high,
    threshold (at the EER), far and frr there, auc, acc (at the best threshold of these same pairs, hence
    optimistic), 'tar@far=1e-3' and its like (ROC interpolated, the homework's TPR@FPR; NaN where there are
    fewer than 1/FAR impostors to measure it with), genuine, impostor (counts)."""
    genuine, impostor = split(labels, scores)
    p, n = len(genuine), len(impostor)
    rate, threshold = crossing(genuine, impostor)
    far, tar = (float(v) for v in rates(genuine, impostor, threshold))
    low, high = interval(rate, p, n)
    curve_far, curve_tar, _ = curve(genuine, impostor)
    out = dict(eer=rate, eer_low=low, eer_high=high, threshold=threshold, far=far, frr=1 - tar,
               auc=float(np.trapezoid(curve_tar, curve_far)),
               acc=float(((curve_tar * p + (1 - curve_far) * n) / (p + n)).max()), genuine=p, impostor=n)
    for f in FARS:
        tar = np.interp(float(f), curve_far, curve_tar)             # where the ROC is vertical, its upper end
        out[f"tar@far={f}"] = float(tar) if float(f) * n >= 1 else np.nan
    return out


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
    head, *lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    return "\n".join([head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines])


def read(path):
    """(labels, scores) from a CSV file with columns label,score; a header may name them, in any order."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as f:
            rows = [(i, [c.strip() for c in row]) for i, row in enumerate(csv.reader(f), 1) if any(row)]
    except csv.Error as e:
        raise ValueError(f"{path}: {e}; write lines of label,score") from None
    head = [c.lower() for c in rows[0][1]] if rows else []
    named, values = {"label", "score"} <= set(head), []
    for line, row in rows[named:]:
        try:
            cells = dict(zip(head if named else ("label", "score"), row, strict=not named))
            label, score = float(cells["label"]), float(cells["score"])
            if label not in (0, 1) or not np.isfinite(score):
                raise ValueError
            values.append([label, score])
        except (ValueError, KeyError):
            raise ValueError(f"{path}:{line}: found {','.join(row)[:60]!r}; write label,score, as in 1,0.83") from None
    if len({label for label, _ in values}) < 2:
        raise ValueError(f"{path}: no scores of both kinds in it; write lines of label,score, of 1 and of 0")
    return np.array(values).T


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    try:
        if len(sys.argv) < 2:
            raise ValueError("give a CSV file of scores, or several; --help tells more")
        found = {path: report(*read(path)) for path in sys.argv[1:]}
        print(table([("scores", "EER", "AUC", "accuracy", "TAR at FAR 1e-2")] + [
            (path, *(percent(r[k]) for k in ("eer", "auc", "acc", "tar@far=1e-2"))) for path, r in found.items()])
            if len(found) > 1 else show(*found.values()))
    except (OSError, ValueError) as e:
        print("error:", f"{e.filename}: {e.strerror}; name another" if isinstance(e, OSError) else e, file=sys.stderr)
        sys.exit(2)
