"""Every loss of face recognition, from softmax to UniFace, each a formula and a few lines.

    python train.py --loss help                       # all of them, with default arguments
    python train.py --loss arcface:s=32,m=0.4
    python train.py --loss "ce+0.003*center"          # a weighted sum
    criterion = losses.make("ce+0.05*contrastive:m=1", dim=512, classes=8631)
    loss = criterion(embeddings, labels)              # (B, D), (B,) -> scalar

x is an embedding, w_j the weight vector of class j, x^ and w^ are their unit vectors. t = cos theta = x^.w^_y is the
cosine with the true class y. C is the number of classes, D the dimension. Losses are averaged over the batch.
sample=0.1: only a tenth of the classes, with all those of the batch, takes part in a step (draw_classes).
s and m shown as auto follow from the number of classes and images (default_scale_and_margin); arcface:s=64,m=0.5 is
ArcFace as published.

A loss is an nn.Module: __init__ takes its arguments, forward takes (x, y) and returns a scalar. To add one, write the
class and a line in LOSSES, or in BALANCED if it compares the images of a batch. One step of ArcFace:

    s x^                                    unit
    logits (B, C) = s x^.w^_j               ClassWeights.compare, Cosines
    the logit s t of the true class         Target.own_logit
    it becomes s psi(t)                     MarginSoftmax.forward, psi, Target.add_
    mean of log sum_j e^{l_j} - l_y         Target.cross_entropy

Everything is computed in float32 at least, whatever the backbone used: with s = 64, cosines from bf16 change the
logits by 0.1, and in fp16 a zero vector normalises to NaN. (On GPUs train.py allows TF32 products: they change logits
by 0.004.)

Several processes: see "Class weights divided among processes". With one process that section is never used.
"""
import argparse
import difflib
import inspect
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ---- ArcFace: unit vectors, one margin, cross-entropy, class weights -----------------------------------------

def unit(x):
    """x / ||x|| along the last axis. A zero vector stays zero, with gradient zero instead of infinity."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.masked_fill(norm < 1e-6, math.inf)


class Cosines(torch.autograd.Function):
    """x w^T / ||w||: (B, D), (C, D) -> (B, C). Equals x @ unit(w).T, for which autograd would make eight arrays of the
    size of w, half of a head's time. Here the products are divided by ||w||, never w itself."""

    @staticmethod
    def forward(ctx, x, w):
        norm = w.norm(dim=1)
        inverse = 1 / norm.masked_fill(norm < 1e-6, math.inf)
        ctx.save_for_backward(x, w, inverse)
        return (x @ w.T).mul_(inverse)

    @staticmethod
    def backward(ctx, grad):
        x, w, inverse = ctx.saved_tensors
        grad = grad * inverse
        to_w = grad.T @ x
        # The length of w does not matter: remove the part of the gradient along w.
        along = torch.linalg.vecdot(to_w, w) * inverse ** 2
        return grad @ w, to_w.addcmul_(w, along[:, None], value=-1)


def psi(t, m1=1.0, m2=0.0, m3=0.0):
    """The margins of SphereFace (m1), ArcFace (m2) and CosFace (m3) in one. Its argument t is the cosine. The formulas
    of papers have psi of an angle: psi(m1 theta + m2) - m3, where psi(a) = (-1)^k cos a - 2k with k = floor(a / pi)
    continues the cosine so that it falls for every angle; cos(theta + m) alone rises again beyond pi - m. m2 and m3
    may be tensors with gradient; callers detach t."""
    a = m1 * t.clamp(-1, 1).acos() + m2                                 # rounding puts cosines beyond 1
    k = torch.floor(a / math.pi)
    sign = 1 - 2 * (k % 2)
    return sign * a.cos() - 2 * k - m3


def psi_slope(t, m1=1.0, m2=0.0):
    """The derivative of psi(t): m1 |sin(m1 theta + m2)| / sin theta. It has no bound at theta = 0 and pi, where
    sin theta is taken to be 0.001, about what float32 can tell of a cosine near 1."""
    theta = t.clamp(-1, 1).acos()
    a = m1 * theta + m2
    return m1 * a.sin().abs() / theta.sin().clamp_min(1e-3)


class Target(NamedTuple):
    """The true class of each image of a batch: its column (B,) in logits (B, n)."""
    column: torch.Tensor

    def own_logit(self, logits):
        """(B, 1): the logit of the true class. By index, because gather() keeps all logits for its gradient."""
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, self.column][:, None]

    def add_(self, logits, more):
        """Add more (B, 1) to the own logits, in place: nothing is copied, and gradients pass unchanged."""
        return logits.scatter_add_(1, self.column[:, None], more)

    def fill_(self, a, value):
        """Put value in place of each image's true class. a (B, n) has no gradient."""
        return a.scatter_(1, self.column[:, None], value)

    def row_sum(self, a):
        """(B, 1): the sum over all classes."""
        return a.sum(1, keepdim=True)

    def logsumexp(self, logits):
        """(B,): log sum_j e^{l_j} over all classes."""
        return logits.logsumexp(1)

    def weight_rows(self, w):
        """(B, D): the row of each image's true class."""
        return w[self.column]

    def cross_entropy(self, logits, smooth=0.0):
        """Mean of log sum_j e^{l_j} - l_y. Label smoothing: all classes share the fraction smooth of the target."""
        return F.cross_entropy(logits, self.column, label_smoothing=smooth)


class ClassWeights(nn.Module):
    """Base of the losses with a weight vector w_j for each class, and by itself the cross-entropy of s cos_j.
    weight (C, D). sample < 1: this part of the classes takes part in a training step, by draw_classes().
    k > 1: class j has k weights, rows j, C + j, ... classes: their number; divided among processes, a Shard."""
    scale = None                        # s: the length x^ gets; None leaves x its own
    product = Cosines.apply             # of x and the class weights
    class_parameters = ("weight",)      # those that have k rows for each class
    expected = None                     # the loss at random initialisation, where a closed form is known

    def __init__(self, dim, classes, sample=1.0, k=1):
        super().__init__()
        self.dim, self.classes, self.sample, self.k = dim, classes, sample, k
        self.sharded = isinstance(classes, Shard)
        self.target = ShardedTarget if self.sharded else Target
        self.class_start = classes.start if self.sharded else 0
        self.weight = nn.Parameter(self.class_rows(dim))

    def initialise(self, rows):
        """Random directions of length about 1."""
        return rows.normal_().mul_(self.dim ** -0.5)

    def class_rows(self, columns):
        """(k C, columns) with initial values."""
        if self.sharded:
            return local_class_rows(self, columns)
        return self.initialise(torch.empty(self.k * self.classes, columns))

    def compare(self, x, y=None):
        """(logits, target): s x^.w^_j (B, n) of the n classes that take part, and the Target of labels y; without
        labels, of all classes and None. s multiplies x^, not the cosines, which saves an array (B, C)."""
        w, target = self.weight, None
        if self.scale is not None:
            x = self.scale * unit(x)
        if y is not None:
            column = y - self.class_start                               # class_start is 0 in one process
            if self.sample < 1 and self.training:
                w, column = draw_classes(self, y)
            target = self.target(column)
        if self.sharded:
            x = CopyToShards.apply(x)
        return self.product(x, w), target

    def to_shards(self, x):
        """x, its gradient being the sum of what the processes find; x itself in one process."""
        return CopyToShards.apply(x) if self.sharded else x

    def logits(self, x):
        """(B, C), without margin."""
        return self.compare(x)[0]

    def forward(self, x, y):
        logits, target = self.compare(x, y)
        return target.cross_entropy(logits)

    def expected_loss(self, s, t=0.0):
        """The first loss, that of random unit vectors, whose cosines are N(0, 1/D): -s t + ln C + s^2/2D, t being what
        the own cosine 0 becomes. None where the largest term rules the sum over classes."""
        log_c = math.log(max(round(self.sample * self.classes), 1))
        if s * s < 1.5 * self.dim * log_c:
            return -s * t + log_c + s * s / (2 * self.dim)


class MarginSoftmax(ClassWeights):
    """Base of the losses with a margin: cross-entropy of s cos_j, where the true class has s psi(t) for s t.
    What is added has no gradient to t, so that the own logit keeps the gradient of the plain cosine (characteristic
    gradient detachment, SphereFace-R, 2109.05565; the well-known ArcFace code does it as well). The exact gradient is
    infinite at theta = 0 and pi, where half of the public implementations give NaN; exact=true has it, with a bound
    (psi_slope)."""

    def __init__(self, dim, classes, s, sample=1.0, k=1, m1=1.0, m2=0.0, m3=0.0, exact=False):
        super().__init__(dim, classes, sample, k)
        self.scale, self.margins, self.exact = s, (m1, m2, m3), exact
        own = psi(torch.zeros(()), m1, m2, m3)
        self.expected = self.expected_loss(s, float(own))

    def forward(self, x, y, margins=None):
        """margins: (m1, m2, m3), numbers or (B, 1), where they depend on the batch."""
        m1, m2, m3 = margins or self.margins
        logits, target = self.compare(x, y)
        own = target.own_logit(logits)
        t = own.detach() / self.scale   # the cosine with the true class
        more = self.scale * (psi(t, m1, m2, m3) - t)
        if self.exact:
            more = more + (psi_slope(t, m1, m2) - 1) * (own - own.detach())         # 0, with a gradient
        return target.cross_entropy(target.add_(logits, more))


class ArcFace(MarginSoftmax):
    """ArcFace: own logit s cos(theta + m) (Deng et al. 2019, 1801.07698). m in radians: 0.5 is 28.6 degrees.
    If the loss stays at 15 to 20, lower the learning rate. Without m=: 0.5, but 0.3 below 10,000 people, 0.15 if
    images are few (default_scale_and_margin)."""

    # make() replaces None; the class by itself needs s and m.
    def __init__(self, dim, classes, s=None, m=None, exact=False, sample=1.0):
        super().__init__(dim, classes, s, sample, m2=m, exact=exact)


# ---- Softmax and its normalised forms ------------------------------------------------------------------------

class CrossEntropy(ClassWeights):
    """Softmax cross-entropy: logits w_j.x + b_j, label smoothing on request.
    What DeepFace (2014), DeepID and VGGFace trained with. Norms carry class frequency and image quality, so judge it
    by the cosine, not by the distance of raw embeddings. No smoothing with margins: they cancel."""
    class_parameters = ("weight", "bias")

    def __init__(self, dim, classes, smooth=0.0):
        super().__init__(dim, classes)
        self.smooth, self.expected = smooth, math.log(classes)
        self.bias = nn.Parameter(self.class_rows(1).flatten())

    def initialise(self, rows):
        bound = self.dim ** -0.5                                        # as nn.Linear
        return rows.uniform_(-bound, bound)

    def product(self, x, w):
        return F.linear(x, w, self.bias)

    def forward(self, x, y):
        logits, target = self.compare(x, y)
        return target.cross_entropy(logits, self.smooth)


class L2Softmax(CrossEntropy):
    """L2-constrained softmax: logits w_j.(alpha x^) + b_j (Ranjan et al. 2017, 1703.09507).
    Features on a sphere of radius alpha, weights free. With the others at their mean, the true class's probability is
    p = e^alpha / (e^alpha + C - 2) (section 3.3): alpha is raised to where that is 0.9, if it is lower (11.3 at C =
    8,631), as it cannot converge below. Learned (learn=true), it drifts up; the paper's best are fixed ones."""

    def __init__(self, dim, classes, alpha=16.0, learn=False):
        super().__init__(dim, classes)
        self.expected = None
        least = math.log(max(9 * (classes - 2), 1))
        self.alpha = max(alpha, least)
        if learn:
            self.alpha = nn.Parameter(torch.tensor(self.alpha))
            self.bias = self._parameters.pop("bias")                    # after alpha, as in checkpoints' optimizers

    @property
    def scale(self):
        return self.alpha


class Modified(ClassWeights):
    """Modified softmax: unit weights, no bias, free norm: logits ||x|| cos_j (Liu et al. 2017, 1704.08063, eq. 4).
    A-softmax with m = 1; decision by angle alone, but easy images still win by a long x."""

    def __init__(self, dim, classes):           # its arguments are those of --loss: neither sample= nor k=
        super().__init__(dim, classes)


class NormFace(ClassWeights):
    """NormFace: logits s cos_j, s learned (Wang et al. 2017, 1704.06369).
    With s = 1 the loss cannot fall below ln(1 + (C - 1) e^(-C/(C-1))), 8.1 at C = 8,631: the scale is what makes
    cosines trainable. The authors fine-tuned softmax models with it."""

    def __init__(self, dim, classes, s=20.0, learn=True, sample=1.0):
        super().__init__(dim, classes, sample)
        self.s, self.expected = s, self.expected_loss(s)
        if learn:
            self.s = nn.Parameter(torch.tensor(s))

    @property
    def scale(self):
        return self.s


def coco(dim, classes, s=30.0, centroids=False, sample=1.0):
    """COCO, congenerous cosine: logits s cos_j with a fixed s (Liu et al. 2017, 1710.00870).
    NormFace with a constant: the centroids of the first version became normalised weights. centroids=true is that
    first version, a loss on batches (CentroidCOCO)."""
    if centroids:
        if sample != 1:
            raise ValueError("sample= needs class weights")
        return CentroidCOCO(s)
    return NormFace(dim, classes, s, False, sample)


class VMF(ClassWeights):
    """von Mises-Fisher mixture: log C_D(k_j) + k_j cos_j, concentrations k_j learned (Hasnat 2017, 1706.04264).
    shared=true has one k: the normaliser C_D cancels and it is NormFace. I_{D/2-1} overflows, so log C_D comes from
    the uniform asymptotic expansion of Bessel's function (Abramowitz, Stegun 9.7.7), good for D >= 8."""
    scale = 1.0

    def __init__(self, dim, classes, s=30.0, shared=False):
        super().__init__(dim, classes)
        self.shared, self.expected = shared, self.expected_loss(s)
        log_k = torch.tensor([s]).log()
        if not shared:
            self.class_parameters = ("weight", "log_k")
            log_k = self.weight.new_full(self.weight.shape[:1], math.log(s))
        self.log_k = nn.Parameter(log_k)
        self.shift = float(self.log_c(torch.tensor(s)))                 # cancels; keeps numbers small

    def log_c(self, k):
        v = max(self.dim / 2 - 1, 0.5)
        root = torch.sqrt(v * v + k * k)
        return v * torch.log(v + root) - root + 0.5 * torch.log(root)

    def compare(self, x, y=None):
        cosine, target = super().compare(x, y)
        log_k = self.to_shards(self.log_k) if self.shared else self.log_k
        k = log_k.exp()
        logits = cosine * k
        return logits.add_(self.log_c(k) - self.shift), target


class AdaCos(ClassWeights):
    """AdaCos: NormFace without a scale to choose (Zhang et al. 2019, 1905.00292).
    Starts at s = sqrt 2 ln(C - 1); dynamic: s = ln(mean_i sum_{j != y} e^{s cos_j}) / cos(min(pi/4, median theta)), so
    it falls as angles shrink. s is a buffer: as a Python number, elsewhere, it is lost on resuming."""
    scale = 1.0

    def __init__(self, dim, classes, dynamic=True, sample=1.0):
        super().__init__(dim, classes, sample)
        s = math.sqrt(2) * math.log(max(classes - 1, 2))
        self.register_buffer("s", torch.tensor(s))
        self.dynamic, self.expected = dynamic, self.expected_loss(float(self.s))

    def logits(self, x):
        return self.s * super().logits(x)

    def forward(self, x, y):
        cosine, target = self.compare(x, y)
        if self.dynamic and self.training:
            with torch.no_grad():
                theta = target.own_logit(cosine).clamp(-1, 1).acos()
                median = theta.median().clamp_max(math.pi / 4)
                others = target.logsumexp(target.fill_(self.s * cosine, -math.inf))
                log_mean = others.logsumexp(0) - math.log(len(y))
                self.s.copy_(log_mean.clamp_min(1) / median.cos())
        # A clone: the next step changes s, perhaps before this one's backward().
        return target.cross_entropy(cosine.mul_(self.s.clone()))


# ---- Margins -------------------------------------------------------------------------------------------------

class LSoftmax(ClassWeights):
    """L-softmax: own logit ||w_y|| ||x|| psi(m theta) (Liu et al. 2016, 1612.02295).
    The first margin. Does not converge from scratch without annealing: the own logit is
    norms (lambda t + psi(m theta)) / (1 + lambda), and lambda falls from base to low in the first half of the run.
    gamma > 0: by steps, whatever the run's length (lambda_at_step); published for MNIST: gamma=2.5e-5,low=0."""
    product = staticmethod(F.linear)
    published_gamma = 2.5e-5

    def __init__(self, dim, classes, m=4, base=1000.0, low=5.0, gamma=0.0, power=35.0):
        super().__init__(dim, classes)
        self.m, self.base, self.low, self.gamma, self.power = m, base, low, gamma, power
        # A buffer, so that a resumed run does not start the annealing again.
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.run_length = None          # in steps, by Loss.set_run_length()

    def lambda_at_step(self, n):
        """1 + lambda falls by equal factors until half of the run is done: the margin's part in the logit, of
        which it is the inverse, rises so. By steps: max(low, base (1 + gamma n)^-power), as published."""
        if self.run_length and not self.gamma:
            done = (2 * n / self.run_length).clamp_max(1)
            lam = (1 + self.base) ** (1 - done) * (1 + self.low) ** done - 1
        else:
            gamma = self.gamma or self.published_gamma
            lam = self.base * (1 + gamma * n) ** -self.power
        return lam.clamp_min(self.low)

    def norms(self, x, target):
        own = target.weight_rows(self.weight)
        return x.norm(dim=1) * own.norm(dim=1)

    def forward(self, x, y):
        self.step += self.training      # evaluation does not count
        lam = self.lambda_at_step(self.step.to(x.dtype))
        logits, target = self.compare(x, y)
        norms = self.norms(x, target).clamp_min(1e-6)[:, None]
        t = (target.own_logit(logits) / norms).detach()
        wanted = (lam * t + psi(t, self.m)) / (1 + lam)
        return target.cross_entropy(target.add_(logits, norms * (wanted - t)))


class ASoftmax(LSoftmax):
    """A-softmax, SphereFace as published: own logit ||x|| psi(m theta), unit weights.
    Liu et al. 2017, 1704.08063. The annealing ends at lambda = 5, a sixth of the margin; low=0 is all of it. Published:
    gamma=0.12. sphereface needs none."""
    product = Cosines.apply
    published_gamma = 0.12

    def __init__(self, dim, classes, m=4, base=1000.0, low=5.0, gamma=0.0, power=1.0):
        super().__init__(dim, classes, m, base, low, gamma, power)

    def norms(self, x, target):
        return x.norm(dim=1)


class SphereFace(MarginSoftmax):
    """SphereFace on the unit sphere: own logit s psi(m theta) (SphereFace-R, Liu et al. 2021, 2109.05565).
    Without psi, as in some code, the logit rises again beyond pi/m = 106 degrees."""

    def __init__(self, dim, classes, s=30.0, m=1.7, exact=False, sample=1.0):
        super().__init__(dim, classes, s, sample, m1=m, exact=exact)


class AMSoftmax(MarginSoftmax):
    """AM-softmax: own logit s (cos theta - m) (Wang et al. 2018, 1801.05599)."""

    def __init__(self, dim, classes, s=30.0, m=0.35, exact=False, sample=1.0):
        super().__init__(dim, classes, s, sample, m3=m, exact=exact)


class CosFace(MarginSoftmax):
    """CosFace: own logit s (cos theta - m) (Wang et al. 2018, 1801.09414); am with s and m by the set.
    The margin with the fewest troubles: its gradient does not depend on the angle."""

    def __init__(self, dim, classes, s=None, m=None, exact=False, sample=1.0):
        super().__init__(dim, classes, s, sample, m3=m, exact=exact)


class Combined(MarginSoftmax):
    """Combined margin: own logit s (cos(m1 theta + m2) - m3) (ArcFace's paper, eq. 4).
    m1 multiplies, m2 adds to the angle, m3 to the cosine. (The course write-up prints cos(theta + m1) + m2; a plus
    there would make the task easier.)"""

    def __init__(self, dim, classes, s=None, m1=1.0, m2=0.3, m3=0.2, exact=False, sample=1.0):
        super().__init__(dim, classes, s, sample, 1, m1, m2, m3, exact)


class Curricular(ClassWeights):
    """CurricularFace: ArcFace, and negatives with cos_j > cos(theta + m) become cos_j (r + cos_j).
    Huang et al. 2020, 2004.00288. r, the running mean of the own cosine, updated before use, rises: easy first."""

    def __init__(self, dim, classes, s=None, m=None, momentum=0.01, sample=1.0):
        super().__init__(dim, classes, sample)
        self.scale, self.m, self.momentum = s, m, momentum
        self.register_buffer("r", torch.zeros(()))

    def forward(self, x, y):
        s = self.scale
        logits, target = self.compare(x, y)
        with torch.no_grad():
            t = target.own_logit(logits) / s
            wanted = s * psi(t, m2=self.m)
            if self.training:
                self.r.lerp_(t.mean(), self.momentum)
            # A hard logit l becomes l (r + l/s) = slope l - l^2/s with slope = r + 2 l/s, its derivative: products
            # with constants, so that autograd keeps one array (B, C) and not three. Easy ones: slope 1, no square.
            easy = target.fill_(logits <= wanted, True)
            slope = torch.add(self.r, logits, alpha=2 / s).masked_fill_(easy, 1)
            hard = logits.masked_fill(easy, 0)
        logits.mul_(slope).addcmul_(hard, hard, value=-1 / s)
        del easy, slope, hard                                           # memory for the cross-entropy
        return target.cross_entropy(target.add_(logits, wanted - s * t))


class SubCenter(MarginSoftmax):
    """Sub-center ArcFace: k weights a class, cos_j the largest of their cosines (Deng et al. 2020, ECCV).
    Mislabelled images gather at a minor centre; a person's few images scatter over all three: k = 1, ArcFace, for
    small sets. k times the head's cost and memory."""

    def __init__(self, dim, classes, s=None, m=None, k=3, sample=1.0):
        super().__init__(dim, classes, s, sample, k, m2=m)
        if k > 1:
            self.expected = None

    def product(self, x, w):
        cosine = Cosines.apply(x, w).unflatten(1, (self.k, -1))         # (B, k, n)
        return cosine.max(1)[0]


class AdaFace(MarginSoftmax):
    """AdaFace: the norm tells image quality; own logit s (cos(theta - m z) - m (1 + z)).
    Kim et al. 2022, 2204.00964. z = clip(h (||x|| - mean) / deviation, -1, 1), no gradient. h = 0 is CosFace, z = -1
    ArcFace. The deviation is the biased one: of a batch of one the other is NaN, for good in the running statistics.
    Below angle 0 psi goes on rising; the authors' code stops at 1."""

    def __init__(self, dim, classes, s=None, m=0.4, h=0.333, momentum=0.01, sample=1.0):
        super().__init__(dim, classes, s, sample, m3=m)
        self.m, self.h, self.momentum = m, h, momentum
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def forward(self, x, y):
        norm = x.detach().norm(dim=1, keepdim=True)
        norm = norm.clamp(1e-3, 100)
        if self.training:
            self.mean.lerp_(norm.mean(), self.momentum)
            self.std.lerp_(norm.std(correction=0), self.momentum)
        z = self.h * (norm - self.mean) / (self.std + 1e-3)
        z = z.clamp(-1, 1)              # quality: -1 poor, 1 good
        m2, m3 = -self.m * z, self.m * (1 + z)
        return super().forward(x, y, (1, m2, m3))


class MagFace(MarginSoftmax):
    """MagFace: own logit s cos(theta + m(a)), a = ||x||, and lam mean(1/a + a/high^2).
    Meng et al. 2021, 2103.06627. m(a) is linear from (low, m_low) to (high, m_high). Neither part is detached: the
    margin pulls norms down, the second term, a reward for long x, up. Norms below low are clamped, which learns
    nothing, and a last batch norm makes them about sqrt D: for D < 100 low=1,high=51."""

    def __init__(self, dim, classes, s=None, low=10.0, high=110.0, m_low=0.45, m_high=0.8, lam=35.0,
                 sample=1.0):
        super().__init__(dim, classes, s, sample)
        if not 0 < low < high:
            raise ValueError("1/a has no bound at low=0, and high is the larger one")
        self.low, self.high, self.m_low, self.lam = low, high, m_low, lam
        self.rise = (m_high - m_low) / (high - low)                     # of the margin, per unit of norm
        self.expected = None

    def norm(self, x):
        return x.norm(dim=1, keepdim=True).clamp(self.low, self.high)

    def forward(self, x, y):
        m = self.m_low + self.rise * (self.norm(x) - self.low)
        loss = super().forward(x, y, (1, m, 0))
        term = 1 / self.norm(x) + self.norm(x) / self.high ** 2
        return loss + self.lam * term.mean()


class ElasticFace(MarginSoftmax):
    """ElasticFace: the margin of each image and step is drawn from N(m, sigma).
    Boutros et al. 2022, 2109.09416. kind=arc adds it to the angle, kind=cos subtracts it from the cosine: give
    m=0.35 with it, auto is an angle. sigma = 0 is ArcFace or CosFace. In evaluation the margin is m."""

    def __init__(self, dim, classes, s=None, m=None, sigma=0.05, kind="arc", sample=1.0):
        margin = {"m2": m} if kind == "arc" else {"m3": m}
        super().__init__(dim, classes, s, sample, **margin)
        self.m, self.sigma, self.kind = m, sigma, kind

    def forward(self, x, y):
        noise = torch.randn(len(x), 1, device=x.device, dtype=x.dtype)
        m = self.m + self.sigma * self.training * noise                 # training is 0 or 1
        margins = (1, m, 0) if self.kind == "arc" else (1, 0, m)
        return super().forward(x, y, margins)


def one_against_rest(logits, target, gap, alpha, beta):
    """mean_i alpha softplus(gap - l_iy) + beta sum_{j != y} softplus(l_ij): C yes-or-no questions instead of one choice
    among C. softplus, not log(1 + exp), which overflows."""
    own = target.own_logit(logits)
    others = target.row_sum(F.softplus(logits)) - F.softplus(own)
    return (alpha * F.softplus(gap - own) + beta * others).mean()


class SphereFace2(ClassWeights):
    """SphereFace2: C binary classifiers r g(cos_j) + b -+ r m, g(c) = 2 ((c+1)/2)^t - 1.
    Wen et al. 2022, 2108.01513, variant C: margin on both signs. alpha weighs the true class against all others, lw / r
    the whole. b is learned and starts where the loss of orthogonal embeddings is least, a closed form."""

    def __init__(self, dim, classes, r=40.0, m=0.4, t=3, alpha=0.7, lw=50.0):
        super().__init__(dim, classes)
        self.scale = (2 * r) ** (1 / t) / 2                             # q in 2 r ((c+1)/2)^t = (q c + q)^t
        self.r, self.margin, self.t, self.alpha, self.lw = r, r * m, t, alpha, lw
        z = alpha / ((1 - alpha) * max(classes - 1, 1))
        middle = math.log(z) / 2 - r * (2 * 0.5 ** t - 1)
        sinh = (1 - z) / (2 * math.sqrt(z)) * math.exp(r * m)
        half = math.asinh(sinh)
        self.b = nn.Parameter(torch.tensor(middle - half))

    def compare(self, x, y=None):
        """h^t + b - r, with labels + r m. h = q c + q has h^t by slope = t h^(t-1), the derivative: h slope, less its
        part 1 - 1/t, has this value and gradient; pow() would keep one array (B, C) more."""
        h, target = super().compare(x, y)
        h.add_(self.scale)
        slope = h.detach().pow(self.t - 1).mul_(self.t)
        h.mul_(slope)
        h.sub_(h.detach(), alpha=1 - 1 / self.t)
        shift = self.to_shards(self.b) - self.r
        if target:
            shift = shift + self.margin
        return h.add_(shift), target

    def forward(self, x, y):
        logits, target = self.compare(x, y)
        loss = one_against_rest(logits, target, 2 * self.margin, self.alpha, 1 - self.alpha)
        return self.lw / self.r * loss


class UniFace(ClassWeights):
    """UniFace: one learned threshold b for all classes: softplus of -(s (t - m) - b) and of s cos_j - b.
    Zhou et al. 2023, ICCV. Verification needs that every genuine score lies above one b and every impostor's below."""

    def __init__(self, dim, classes, s=None, m=0.4, lam=1.0, sample=1.0):
        super().__init__(dim, classes, sample)
        self.scale, self.m, self.lam = s, m, lam
        self.b = nn.Parameter(torch.tensor(math.log(10 * classes)))

    def forward(self, x, y):
        logits, target = self.compare(x, y)
        logits.sub_(self.to_shards(self.b))
        return one_against_rest(logits, target, self.scale * self.m, 1.0, self.lam)


class CircleClass(ClassWeights):
    """Circle loss over classes: gamma [1+m-t]+ (t-(1-m)) against gamma [cos_j+m]+ (cos_j-m).
    Sun et al. 2020, 2002.10857. The weights [.]+ carry no gradient: it fights the logits. 20-70 is a normal loss."""

    def __init__(self, dim, classes, gamma=256.0, m=0.25, sample=1.0):
        super().__init__(dim, classes, sample)
        self.scale, self.m = math.sqrt(gamma), m                        # sqrt gamma for each of the two factors

    def forward(self, x, y):
        s, m = self.scale, self.m
        logits, target = self.compare(x, y)
        own = target.own_logit(logits)  # s t
        weight = (s * (1 + m) - own.detach()).relu()
        own = weight * (own - s * (1 - m))
        weights = (logits.detach() + s * m).relu_()
        target.fill_(weights, 0)        # add_() below puts the own logit in its place
        logits.sub_(s * m).mul_(weights)
        return target.cross_entropy(target.add_(logits, own))


class GroupFace(MarginSoftmax):
    """GroupFace: the embedding gains a group-aware part, x + sum_k p_k V_k x, p = softmax(G x).
    Kim et al. 2020, 2005.10497. ArcFace on the sum, plus lam CE(p, k*): k* = argmax (p_k - E p_k)/K + 1/K balances the
    groups nobody labelled. The sum is the embedding at inference too; it costs k D x D products beside the head."""

    def __init__(self, dim, classes, k=4, lam=0.1, s=None, m=None, sample=1.0):
        super().__init__(dim, classes, s, sample, m2=m)
        self.lam, self.expected = lam, None
        self.groups = nn.Linear(dim, k)
        self.parts = nn.Parameter(torch.randn(k, dim, dim) * 0.1 * dim ** -0.5)
        self.register_buffer("usage", torch.full((k,), 1 / k))

    def project(self, x):
        parts = F.linear(x, self.parts.flatten(0, 1))                   # (B, k D)
        parts = parts.unflatten(1, (len(self.usage), -1))
        p = self.groups(x).softmax(1)
        return x + (p[:, None] @ parts)[:, 0]

    def compare(self, x, y=None):
        return super().compare(self.project(x), y)

    def forward(self, x, y):
        scores = self.groups(x)
        p = scores.softmax(1).detach()
        if self.training:
            self.usage.lerp_(p.mean(0), 0.1)
        loss = super().forward(x, y)
        wanted = (p - self.usage).argmax(1)                             # k*, the group with the most room
        return loss + self.lam * F.cross_entropy(scores, wanted)


# ---- Pairs, triplets, batches: train.py gives these P people x K images --------------------------------------

def same_and_other(y):
    """Masks (B, B): pairs of one person, without the diagonal; pairs of two people."""
    same = y[:, None] == y
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    return same ^ itself, ~same


def cosines(x):
    """(B, B) of a batch with itself."""
    x = unit(x)
    return x @ x.T


def distances(x):
    """Distances (B, B) of unit embeddings, sqrt(2 - 2 cos); the clamp keeps the gradient finite at zero."""
    return (2 - 2 * cosines(x)).clamp_min(1e-12).sqrt()


def mean_where(values, mask):
    """Mean over the mask; 0 with a gradient of 0 where the mask is empty."""
    return values.where(mask, 0).sum() / mask.sum().clamp_min(1)


def lse_where(values, mask):
    """log(sum exp) of each row over the mask; very negative, not -inf, where a row has none."""
    return values.masked_fill(~mask, -1e9).logsumexp(1)


class DoubleMargin(nn.Module):
    """Contrastive with two margins: [d - m_p]+^2 for one person, [m_n - d]+^2 for two.
    Genuine pairs are not crushed into a point. No values are standard; these are 23 and 74 degrees."""

    def __init__(self, m_p=0.4, m_n=1.2, weight=1.0):
        super().__init__()
        self.m_p, self.m_n, self.weight = m_p, m_n, weight

    def forward(self, x, y):
        d = distances(x)
        same, other = same_and_other(y)
        genuine = mean_where((d - self.m_p).relu() ** 2, same)
        impostor = mean_where((self.m_n - d).relu() ** 2, other)
        return self.weight * (genuine + impostor)


class Contrastive(DoubleMargin):
    """Contrastive, max-margin: d^2/2 for one person, [m - d]+^2 / 2 for two (Hadsell et al. 2006, CVPR).
    d of unit embeddings (0..2); genuine and impostor pairs are averaged apart, or the many impostors drown the few.
    (A lecture prints max(0, m - D^2); Hadsell's hinge is on the distance and squared afterwards.)"""

    def __init__(self, m=1.0):
        super().__init__(0.0, m, 0.5)


class Siamese(nn.Module):
    """DeepFace's siamese metric: p(same) = sigmoid(b - sum_k w_k |x^1_k - x^2_k|), w >= 0 learned.
    Taigman et al. 2014, CVPR. Logistic loss, genuine and impostor pairs averaged apart. verify.py --metric learned."""

    def __init__(self, dim):
        super().__init__()
        self.axes = nn.Parameter(torch.zeros(dim))
        self.b = nn.Parameter(torch.tensor(math.sqrt(dim)))

    def weighted(self, x):
        return 1.4 * F.softplus(self.axes) * unit(x)                    # w = 0.97 at first

    def score(self, a, b):
        difference = self.weighted(a) - self.weighted(b)
        return self.b - difference.abs().sum(-1)

    def forward(self, x, y):
        z = self.weighted(x)
        logit = self.b - torch.cdist(z, z, p=1)
        same, other = same_and_other(y)
        genuine = mean_where(F.softplus(-logit), same)
        impostor = mean_where(F.softplus(logit), other)
        return genuine + impostor


def mean_of_triplets(cost, q, y, mining, costly_only=False):
    """Mean of cost(q_an - q_ap) over triplets of anchor, positive, negative. q (B, B) is higher for closer pairs.
    hard: the farthest positive and the closest negative of each anchor. semihard: for each genuine pair the closest
    negative that is farther than the positive or, if there is none, the farthest negative of all. all: every triplet;
    costly_only: of these the ones that cost something. All take memory for a few B^2 numbers."""
    same, other = same_and_other(y)
    if mining == "all":
        total, costly = SumOfTriplets.apply(cost, q, same, other)
        number = costly if costly_only else (same.sum(1) * other.sum(1)).sum()
        return total / number.clamp_min(1)
    # 1e4 and -1e4 are outside of any q, and finite in a gradient
    if mining == "hard":
        closest = q.masked_fill(~other, -1e4).amax(1)
        farthest = q.masked_fill(~same, 1e4).amin(1)
        return mean_where(cost(closest - farthest), same.any(1) & other.any(1))
    negatives = q.masked_fill(~other, 1e4).sort(1)[0]                   # of each anchor, the farthest first
    rank = torch.searchsorted(negatives.detach(), q.detach())           # how many are farther than this pair
    chosen = negatives.gather(1, (rank - 1).clamp_min(0))
    return mean_where(cost(chosen - q), same & other.any(1, keepdim=True))


class SumOfTriplets(torch.autograd.Function):
    """(sum of cost(q_an - q_ap), number of those above 0) over all triplets: B genuine pairs at a time, each with all
    negatives of its anchor. The gradient is found along the way, so that nothing of a pair must be kept. nonzero()
    makes the CPU wait for a GPU, once a step; the other losses never do."""

    @staticmethod
    def forward(ctx, cost, q, same, other):
        total, costly, grad = q.new_zeros(()), 0, torch.zeros_like(q)
        anchors, positives = same.nonzero(as_tuple=True)
        for anchor, positive in zip(anchors.split(len(q)), positives.split(len(q))):
            with torch.enable_grad():
                q_here = q.detach().requires_grad_()
                gap = q_here[anchor] - q_here[anchor, positive][:, None]            # (pairs, B)
                costs = cost(gap).where(other[anchor], 0)
                part = costs.sum()
            total += part
            costly = costly + (costs > 0).sum()
            grad += torch.autograd.grad(part, q_here)[0]
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(costly)
        return total, costly

    @staticmethod
    def backward(ctx, grad_of_total, _):
        return None, grad_of_total * ctx.saved_tensors[0], None, None


class Hinge(nn.Module):
    """Hinge on cosines: max(s_n - s_p + m, 0); the triplet loss with half the scale, over all triplets."""

    def __init__(self, m=0.2, mining="all"):
        super().__init__()
        self.m, self.mining = m, mining

    def cost(self, gap):
        return (gap + self.m).relu()

    def forward(self, x, y):
        return mean_of_triplets(self.cost, cosines(x), y, self.mining)


class Triplet(Hinge):
    """Triplet: [d_ap^2 - d_an^2 + m]+ on unit embeddings, mining=all/hard/semihard.
    Schroff et al. 2015, 1503.03832. hard from scratch collapses: all embeddings equal, loss exactly m. Start semihard
    or from a softmax model. all averages the non-zero triplets, so its loss hovers near m even while it learns."""

    def __init__(self, m=0.2, mining="semihard"):
        super().__init__(m, mining)

    def forward(self, x, y):
        q = 2 * cosines(x) - 2          # -d^2
        return mean_of_triplets(self.cost, q, y, self.mining, costly_only=True)


class TSE(Hinge):
    """Triplet similarity embedding: [a.n - a.p + m]+ of W x^ (Sankaranarayanan et al. 2016, 1602.03418).
    A linear W with k rows (0: 128, or the dimension if lower) for frozen features: --init CKPT --freeze.
    W starts as the first k axes and is part of the embedding ever after; another term of a sum sees x itself."""

    def __init__(self, dim, m=0.1, k=0, mining="all"):
        super().__init__(m, mining)
        self.projection = nn.Parameter(torch.eye(k or min(dim, 128), dim))

    def project(self, x):
        return F.linear(unit(x), self.projection)

    def forward(self, x, y):
        z = self.project(x)
        return mean_of_triplets(self.cost, z @ z.T, y, self.mining)


class TPE(TSE):
    """Triplet probabilistic embedding: -log e^{a.p} / (e^{a.p} + e^{a.n}) of W x^.
    The same authors, 2016, 1604.05417. = softplus(a.n - a.p), tse with a soft hinge. For frozen features, as tse."""

    def __init__(self, dim, k=0, mining="all"):
        super().__init__(dim, 0.0, k, mining)

    def cost(self, gap):
        return F.softplus(gap)


class NPair(nn.Module):
    """N-pair: cross-entropy over a_i.p_j, one (a, p) a person, plus reg mean ||x||^2 (Sohn 2016, NIPS).
    a, p: a person's first two images of the batch. Raw inner products: cosines barely train without a scale."""

    def __init__(self, reg=0.002):
        super().__init__()
        self.reg = reg

    def forward(self, x, y):
        same = y[:, None] == y
        earlier = same.tril(-1).sum(1)                                  # how many of this person came before
        anchor = (earlier == 0) & (same.sum(1) > 1)
        second = (same & (earlier == 1)).int().argmax(1)
        scores = x @ x[second].T                                        # column j: the second of j's person
        rows = lse_where(scores, anchor) - scores.diagonal()
        norms = x.square().sum(1)
        return mean_where(rows, anchor) + self.reg * norms.mean()


class Range(nn.Module):
    """Range loss: alpha sum over people of the harmonic mean of their k largest distances + beta [m - d^2]+.
    d: the smallest distance of two people's centres. Zhang et al. 2016, 1611.08976. 0.01 * range.
    For long tails: a person's few farthest pairs count, not all. On unit embeddings, m = 1 is 60 degrees."""

    def __init__(self, k=2, alpha=1.0, beta=1.0, m=1.0):
        super().__init__()
        self.k, self.alpha, self.beta, self.m = k, alpha, beta, m

    def forward(self, x, y):
        same, other = same_and_other(y)
        first = ~same.tril().any(1)                                     # one image stands for each person
        person = first[:, None] & ~other                                # (person, image)
        pairs = person[:, :, None] & same.triu()                        # (person, i, j)
        d = distances(x).where(pairs, 0).flatten(1)
        d = d.topk(min(self.k, d.shape[1]), 1)[0]                       # each one's farthest pairs; 0: no pair
        there = d > 0
        inverse = (1 / d.where(there, math.inf)).sum(1)
        intra = there.sum(1) / inverse.where(inverse > 0, 1)            # harmonic means, one a person
        own = (~other).to(x.dtype)
        centre = own @ unit(x) / own.sum(1, keepdim=True)               # of the image's own person
        apart = (centre[:, None] - centre).square().sum(2)
        gap = apart.masked_fill(~other, 1e4).amin()
        return self.alpha * intra.sum() + self.beta * (self.m - gap).relu()


class Marginal(nn.Module):
    """Marginal loss: mean over pairs of [xi -+ (theta - d^2)]+, minus for one person (Deng et al. 2017, CVPRW).
    The distance is squared (0..4). Meant to be added to ce."""

    def __init__(self, theta=1.2, xi=0.3):
        super().__init__()
        self.theta, self.xi = theta, xi

    def forward(self, x, y):
        same, other = same_and_other(y)
        sign = torch.where(same, 1.0, -1.0)
        cost = self.xi - sign * (self.theta - 2 + 2 * cosines(x))       # d^2 = 2 - 2 cos
        return mean_where(cost.relu(), same | other)


class MultiSimilarity(nn.Module):
    """Multi-similarity: ln(1 + sum_p e^{alpha (base - s_p)})/alpha + ln(1 + sum_n e^{beta (s_n - base)})/beta.
    s_p, s_n: an anchor's cosines, genuine and impostor. Wang et al. 2019, 1904.06627, without its mining."""

    def __init__(self, alpha=2.0, beta=50.0, base=0.5):
        super().__init__()
        self.alpha, self.beta, self.base = alpha, beta, base
        self.a, self.b = 1 / alpha, 1 / beta                            # here, so that make() refuses a 0

    def forward(self, x, y):
        s = cosines(x) - self.base
        same, other = same_and_other(y)
        genuine = self.a * F.softplus(lse_where(-self.alpha * s, same))
        impostor = self.b * F.softplus(lse_where(self.beta * s, other))
        return (genuine + impostor).mean()


class SupCon(nn.Module):
    """SupCon: -mean_p log e^{cos_ip/tau} / sum_{a != i} e^{cos_ia/tau} (Khosla et al. 2020, 2004.11362).
    Mean over anchors i; those without a positive are left out. The anchor itself never stands in the sum."""

    def __init__(self, tau=0.1):
        super().__init__()
        self.tau = tau

    def forward(self, x, y):
        s = cosines(x)
        same, other = same_and_other(y)
        total = lse_where(s / self.tau, same | other)
        log_p = s / self.tau - total[:, None]
        each = -(log_p * same).sum(1) / same.sum(1).clamp_min(1)
        return mean_where(each, same.any(1))


class Circle(nn.Module):
    """Circle loss on pairs: softplus(LSE_n gamma [s_n+m]+ (s_n-m) + LSE_p -gamma [1+m-s_p]+ (s_p-(1-m))).
    LSE_n and LSE_p are the log-sum-exp of an anchor's impostor and genuine pairs. Sun et al. 2020, 2002.10857.
    (The course write-up prints the positive term without the minus before gamma; that would push genuine pairs
    apart.) The weights [.]+ carry no gradient. gamma=256, m=0.25 for large batches."""

    def __init__(self, gamma=80.0, m=0.4):
        super().__init__()
        self.gamma, self.m = gamma, m

    def forward(self, x, y):
        s, m = cosines(x), self.m
        same, other = same_and_other(y)
        negative = self.gamma * (s.detach() + m).relu() * (s - m)
        weight = (1 + m - s.detach()).relu()
        positive = -self.gamma * weight * (s - (1 - m))
        total = lse_where(negative, other) + lse_where(positive, same)
        return mean_where(F.softplus(total), same.any(1) & other.any(1))


class CentroidCOCO(nn.Module):
    """COCO as first published: softmax over the people of the batch, logits s cos(x, c_k), c_k their centroids.
    Liu et al. 2017, 1702.06890. It has no class weights; gradients reach an image through its centroid as well."""

    def __init__(self, s):
        super().__init__()
        self.s = s

    def forward(self, x, y):
        same = y[:, None] == y
        centroids = unit(same.to(x.dtype) @ x)                          # of each image's person; the sum will do
        logits = self.s * unit(x) @ centroids.T
        # One column a person, that of the first image.
        repeated = same.tril(-1).any(1)
        return F.cross_entropy(logits.masked_fill(repeated, -math.inf), same.int().argmax(1))


# ---- Terms to add to another loss ----------------------------------------------------------------------------

class Center(nn.Module):
    """Center loss: mean ||x - c_y||^2 / 2, centres by the published rule (Wen et al. 2016, ECCV).
    0.003 * center, on raw x, next to ce. No parameters: autograd's gradient of c is not the paper's update, it would
    lack the 1 / (1 + n_j). Centres (C, D) start at zero."""

    def __init__(self, dim, classes, alpha=0.5):
        super().__init__()
        self.alpha = alpha
        self.register_buffer("c", torch.zeros(classes, dim))

    def move(self, x, y):
        """Each image's centre (B, D) before and after this batch's update c_j -= alpha sum_{i: y=j} (c_j - x_i) /
        (1 + n_j), with gradient to x. In training the update is stored."""
        same = (y[:, None] == y).to(x.dtype)
        n, old = same.sum(1, keepdim=True), self.c[y]                   # n: how many of this class are here
        if self.training:
            step = self.alpha * (x.detach() - old) / (1 + n)            # one image's; index_add_ sums them
            self.c.index_add_(0, y, step)
        return old, old + self.alpha * (same @ x - n * old) / (1 + n)

    def forward(self, x, y):
        old = self.move(x.detach(), y)[0]
        return (x - old).square().sum(1).mean() / 2


class CenterInvariant(Center):
    """Center-invariant: mean (||c_y||^2 - mean_k ||c_k||^2)^2 / 4 gives rare classes the norm of the others.
    Wu et al. 2017, ACM MM. (A lecture prints it without the outer square, which would have no minimum.) x is reached
    through its share in the moved centre. Raw x; 1e-5 * center_invariant, with ce and center."""

    def forward(self, x, y):
        mean = self.c.square().sum(1).mean()                            # of all classes, before the move
        moved = self.move(x, y)[1]
        return (moved.square().sum(1) - mean).square().mean() / 4


class Ring(nn.Module):
    """Ring loss: lam/2 mean (||x|| - R)^2 pulls norms to a learned R (Zheng et al. 2018, 1803.00130).
    0.01 * ring. R starts at the first batch's mean norm; started at 1, as elsewhere, it collapses the norms."""

    def __init__(self, lam=1.0):
        super().__init__()
        self.lam = lam
        self.radius = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x, y):
        norm = x.norm(dim=1)
        with torch.no_grad():
            start = norm.mean()
            self.radius.copy_(torch.where(self.radius < 0, start, self.radius))     # without a synchronisation
        return self.lam / 2 * (norm - self.radius).square().mean()


class Uniform(Center):
    """UniformFace: mean over pairs of images of two people of 1 / (1 + ||c_a - c_b||), centres on the sphere.
    Duan et al. 2019, CVPR. Spreads people evenly, those of the batch: C^2 pairs are too many. With class weights."""

    def forward(self, x, y):
        moved = self.move(unit(x), y)[1]
        closeness = 1 / (1 + distances(moved))
        return mean_where(closeness, y[:, None] != y)


class Regular(nn.Module):
    """RegularFace: mean over classes of the cosine to the nearest other class weight (Zhao et al. 2019, CVPR).
    Acts on the partner's class weights; over the batch's classes, so (B, C), never (C, C). "ce+regular"."""

    def __init__(self):
        super().__init__()
        self.partner = []               # [loss with class weights], set by Loss; in a list it is no part of this one

    def forward(self, x, y):
        head = self.partner[0]
        w = head.weight[:len(head.weight) // head.k]                    # of subcenter's the first of each class
        target = head.target(y - head.class_start)
        own = unit(target.weight_rows(w))
        cosine = Cosines.apply(head.to_shards(own), w)
        target.add_(cosine, torch.full_like(cosine[:, :1], -4))         # not the class itself
        nearest_cosine = cosine.max(1, True)[0]
        if head.sharded:
            nearest_cosine = gather_columns(nearest_cosine)
        return nearest_cosine.max(1)[0].mean()


# ---- A part of the classes a step ----------------------------------------------------------------------------

def draw_classes(head, y):
    """(w, column): the weights of a random part of the classes, with all those of the batch (Partial FC, An et
    al. 2021, 2010.05222), and where the labels y stand among them."""
    n = max(round(head.sample * head.classes), len(y))
    n = min(n, head.classes)
    draw = torch.rand(head.classes, device=y.device)
    draw.index_fill_(0, y, 2.0)         # the batch's come first
    chosen = draw.topk(n)[1].sort()[0]
    column = torch.searchsorted(chosen, y)
    if head.sharded:
        column = column - (chosen < head.class_start).sum()
        chosen = chosen[head.classes.is_local(chosen)] - head.class_start
    if not len(chosen):
        raise ValueError(f"none of the {n} sampled classes fell to process {dist.get_rank()}; use a larger"
                         " sample= or fewer processes")
    w = head.weight.unflatten(0, (head.k, -1))[:, chosen]               # (k, n, D)
    return w.flatten(0, 1), column


# ---- Class weights divided among processes -------------------------------------------------------------------
#
# Every process calls a loss with the whole batch, (B, D) and (B,), so that pairs, centres and running means
# are those of one process. Of N processes, number r holds the classes rC/N..(r+1)C/N, given as a Shard, and
# computes logits (B, C/N). Loss and gradients are those of the undivided head. What all processes have alike
# enters the divided computation by CopyToShards, and partial results leave it by ReduceSum: Megatron-LM's f
# and g (1909.08053, section 3).

def all_reduced(x):
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


class ReduceSum(torch.autograd.Function):
    """Sum of a partial result over processes. Forward: all-reduce; backward: identity."""

    @staticmethod
    def forward(ctx, x):
        return all_reduced(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class CopyToShards(torch.autograd.Function):
    """What all processes have goes into what each computes for its classes. Forward: identity; backward: all-reduce."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduced(grad)


def gather_rows(x, start, total):
    """(total, ...): the rows of all processes; x is ours, from row start on. The gradient to x is that of the sum."""
    after = total - start - len(x)
    padding = (0, 0) * (x.ndim - 1) + (start, after)                    # F.pad begins with the last axis
    return ReduceSum.apply(F.pad(x, padding))


def gather_columns(x):
    """(B, N n): the x (B, n) of all N processes, side by side."""
    n = x.shape[1]
    start, total = n * dist.get_rank(), n * dist.get_world_size()
    return gather_rows(x.T, start, total).T


def shard_bounds(classes, world_size):
    """Where the classes of each process begin; the last number is the end."""
    return [classes * rank // world_size for rank in range(world_size + 1)]


class Shard(int):
    """The number of all classes, where this process holds only those from start to end."""

    def __new__(cls, classes, rank=0, world_size=1):
        shard = super().__new__(cls, classes)
        shard.start, shard.end = shard_bounds(classes, world_size)[rank:rank + 2]
        return shard

    def is_local(self, labels):
        """Which of these classes this process holds."""
        return (labels >= self.start) & (labels < self.end)


class ShardedTarget(Target):
    """Target where each process has some of the columns; a column outside 0..n-1 is that of another process."""

    def local(self, n):
        """(Target, is_local (B, 1)): column 0 in place of those that other processes have."""
        is_local = (self.column >= 0) & (self.column < n)
        return Target(self.column.where(is_local, 0)), is_local[:, None]

    def own_logit(self, logits):
        target, is_local = self.local(logits.shape[1])
        return ReduceSum.apply(target.own_logit(logits).where(is_local, 0))

    def add_(self, logits, more):
        target, is_local = self.local(logits.shape[1])
        return target.add_(logits, CopyToShards.apply(more).where(is_local, 0))

    def fill_(self, a, value):
        target, is_local = self.local(a.shape[1])
        own = target.own_logit(a).masked_fill_(is_local, value)
        return a.scatter_(1, target.column[:, None], own)

    def row_sum(self, a):
        return ReduceSum.apply(a.sum(1, keepdim=True))

    def logsumexp(self, logits):
        return gather_columns(logits.logsumexp(1, True)).logsumexp(1)

    def weight_rows(self, w):
        target, is_local = self.local(len(w))
        return ReduceSum.apply(target.weight_rows(w).where(is_local, 0))

    def cross_entropy(self, logits, smooth=0.0):
        wanted = self.own_logit(logits)[:, 0]
        if smooth:
            n = torch.full_like(wanted, logits.shape[1])
            total, n = ReduceSum.apply(torch.stack([logits.sum(1), n]))
            wanted = (1 - smooth) * wanted + smooth * total / n
        return (self.logsumexp(logits) - wanted).mean()


def local_class_rows(head, columns):
    """Of the initial rows (k C, columns) of class weights those of this process. Drawn in blocks of a multiple of 16
    numbers, for which torch's generator gives the numbers of one great draw: a class starts alike however many
    processes there are, and the whole is nowhere in memory."""
    n, block = head.k * head.classes, 2 ** 16
    starts = range(0, max(1, n - block + 1), block)
    parts = []
    for start in starts:
        end = n if start == starts[-1] else start + block
        rows = head.initialise(torch.empty(end - start, columns))
        class_of_row = torch.arange(start, end) % head.classes
        parts.append(rows[head.classes.is_local(class_of_row)])
    return torch.cat(parts)


def gather_class_rows(t, k, classes):
    """On rank 0 the whole rows (k C, ...) of a tensor of which each process has those of its classes."""
    t = t.detach().cpu().unflatten(0, (k, -1))                          # (k, classes of this process, ...)
    t = t.contiguous()
    if dist.get_rank():
        dist.send(t, 0)
        return t
    bounds, parts = shard_bounds(classes, dist.get_world_size()), [t]
    for rank in range(1, dist.get_world_size()):
        num_classes = bounds[rank + 1] - bounds[rank]
        part = t.new_empty(k, num_classes, *t.shape[2:])
        dist.recv(part, rank)
        parts.append(part)
    return torch.cat(parts, 1).flatten(0, 1)


def shard_class_rows(t, k, classes):
    """Of the whole rows (k C, ...) those of this process's classes."""
    bounds = shard_bounds(classes, dist.get_world_size())
    parts = t.unflatten(0, (k, -1)).tensor_split(bounds[1:-1], 1)
    return parts[dist.get_rank()].flatten(0, 1)


# ---- The table -----------------------------------------------------------------------------------------------

# Losses of pairs: these want several images a person in the batch.
BALANCED = {
    "contrastive": Contrastive,
    "double_margin": DoubleMargin,
    "marginal": Marginal,
    "triplet": Triplet,
    "hinge": Hinge,
    "tse": TSE,
    "tpe": TPE,
    "npair": NPair,
    "supcon": SupCon,
    "circle": Circle,
    "multisim": MultiSimilarity,
    "siamese": Siamese,
    "range": Range,
}

# They shape an embedding that another loss makes.
ADDITIONS = Center, Ring, Range

# In the order of --loss help and of docs/losses.md.
LOSSES = {
    "ce": CrossEntropy,
    "modified": Modified,
    "l2softmax": L2Softmax,
    "normface": NormFace,
    "coco": coco,
    "vmf": VMF,
    "adacos": AdaCos,
    "lsoftmax": LSoftmax,
    "asoftmax": ASoftmax,
    "sphereface": SphereFace,
    "am": AMSoftmax,
    "cosface": CosFace,
    "arcface": ArcFace,
    "combined": Combined,
    "curricular": Curricular,
    "subcenter": SubCenter,
    "adaface": AdaFace,
    "magface": MagFace,
    "elastic": ElasticFace,
    "sphereface2": SphereFace2,
    "uniface": UniFace,
    "circle_class": CircleClass,
    "groupface": GroupFace,
    **BALANCED,
    "center": Center,
    "center_invariant": CenterInvariant,
    "ring": Ring,
    "uniform": Uniform,
    "regular": Regular,
}

# Other names and recipes. Another name takes arguments, a recipe takes none.
ALIASES = {
    "softmax": "ce",
    "amsoftmax": "am",
    "angular": "asoftmax",
    "vggface": "ce",
    "deepface": "siamese",
    "deepid2": "ce+0.05*contrastive",
    "facenet": "triplet:mining=semihard,m=0.2",
    "npairs": "npair",
    "centerloss": "ce+0.003*center",
    "centerinvariant": "ce+0.003*center+1e-5*center_invariant",
    "rangeloss": "ce+0.01*range",
    "marginalloss": "ce+marginal",
    "ringloss": "ce+0.01*ring",
    "uniformface": "sphereface+uniform",
    "regularface": "asoftmax+regular",
}


def default_scale_and_margin(cls, classes, images):
    """s and m for so many classes and training images, where an expression leaves them open. The published 64 and 0.5
    suit 10,000 people and more; 200 people ended at 6.8 % EER with them, at 3.6 % with these. s: four times
    sqrt 2 ln(C - 1), the least that works by AdaCos, up to 64: 30 for 200, 51 for 8,631. m of the angular margins: 0.3
    below 10,000. With fewer than five images a person, which are soon learned by heart, both are at most half of
    that: 3,318 people with 2.1 images ended at 18.1 % with s = 46, m = 0.3 and at 15.7 % with s = 20, m = 0.15."""
    factor, m = 4, 0.5
    if classes < 10_000:
        m = 0.3
    if cls is CosFace:
        m = 0.35
    if images < 5 * classes:            # few images a person
        factor, m = 1.75, 0.15
    least = math.sqrt(2) * math.log(max(classes - 1, 3))
    s = min(64.0, factor * least)
    return {"s": round(s, 1), "m": m}


# ---- One expression: "ce+0.003*center:alpha=0.5" -------------------------------------------------------------

class Loss(nn.Module):
    """A weighted sum of terms, (weight, module, text) each: (embeddings (B, D), labels (B,)) -> scalar.
    spec: the expression, aliases expanded. balanced: a term wants several images a person in the batch.
    weight (C, D) and logits(x) -> (B, C), margin-free: those of the first term with class weights, or None; where
    classes are divided, of the classes held here. top(x, k) -> (B, k): the numbers of the k best of all classes.
    project(x): the embedding to use at inference. score(a, b): a learned similarity, or None.
    first_parts: [(text, weighted value)] of the terms at the first call, to see whether one outweighs the others.
    rows_per_class: {name in state_dict: k} of the parameters that have k rows a class and are divided by shard."""

    def __init__(self, terms):
        super().__init__()
        self.factors, modules, self.texts = zip(*terms)
        self.spec, self.terms = "+".join(self.texts), nn.ModuleList(modules)
        self.first_parts = None
        on_pairs = (CentroidCOCO, *BALANCED.values())
        self.balanced = any(isinstance(term, on_pairs) for term in modules)
        # In plain lists: an attribute that is a module would be registered and saved a second time.
        self.heads = [term for term in modules if isinstance(term, ClassWeights)]
        self.projections = [term for term in modules if hasattr(term, "project")]
        self.has_projection = bool(self.projections)
        if len(self.projections) > 1:
            raise ValueError(f"{self.spec}: two of these losses change the embedding, each its own way; use one")
        if self.projections and self.score:
            raise ValueError(f"{self.spec}: one of these losses changes the embedding, and another learns a metric of"
                             " the unchanged one; use one")
        for term in modules:
            if isinstance(term, Regular):
                term.partner = self.heads
                if not self.heads:
                    raise ValueError("regular acts on another loss's class weights; write for example ce+regular")

    @property
    def rows_per_class(self):
        rows = {}
        for i, term in enumerate(self.terms):
            if term in self.heads and term.sharded:
                rows |= {f"terms.{i}.{name}": term.k for name in term.class_parameters}
        return rows

    @property
    def weight(self):
        return self.heads[0].weight if self.heads else None

    @property
    def score(self):
        for term in self.terms:
            if hasattr(term, "score"):
                return term.score

    def project(self, x):
        project = self.projections[0].project if self.projections else nn.Identity()
        return self.in_float32(project, x)

    def logits(self, x):
        if not self.heads:
            raise ValueError(f"{self.spec} has no class weights, so no logits; use the nearest centroid")
        return self.in_float32(self.heads[0].logits, x)

    def in_float32(self, f, x):
        with torch.autocast(x.device.type, enabled=False):
            return f(x.to(torch.promote_types(x.dtype, torch.float32)))

    def top(self, x, k):
        logits, head = self.logits(x), self.heads[0]
        best, number = logits.topk(min(k, logits.shape[1]), 1)
        if head.sharded:
            padding = (0, k - best.shape[1])                            # a process may hold fewer than k
            best = gather_columns(F.pad(best, padding, value=-math.inf))
            number = gather_columns(F.pad(number + head.class_start, padding))
            number = number.gather(1, best.topk(k, 1)[1])
        return number

    def expected(self, batch_size=1):
        """The sum at random initialisation, None where no closed form is known, or where a term may draw more classes
        than its sample= asks for, because the batch has more images."""
        total = 0
        for factor, term in zip(self.factors, self.terms):
            value = getattr(term, "expected", None)
            sample = getattr(term, "sample", 1)
            if value is None or sample < 1 and round(sample * term.classes) < batch_size:
                return None
            total += factor * value
        return total

    def set_run_length(self, steps):
        """Tell the terms how many steps the run has in all; call it before the first step, also when resuming."""
        for term in self.terms:
            term.run_length = steps

    def notes(self):
        """Lines of advice about what can be computed and is hardly meant."""
        lines = []
        for term in self.terms:
            lines += term.advice
        if all(isinstance(term, ADDITIONS) for term in self.terms):
            lines.append(f"{self.spec} makes no embedding by itself; add it to another loss, see the recipes in"
                         " --loss help")
        return lines

    def forward(self, x, y):
        total, parts = 0, []
        with torch.autocast(x.device.type, enabled=False):
            for factor, term, text in zip(self.factors, self.terms, self.texts):
                # Each term converts x for itself, so gradients of several terms add up in the backbone's type.
                x32 = x.to(torch.promote_types(x.dtype, torch.float32))
                part = factor * term(x32, y)
                total = total + part
                parts.append((text, part.detach()))
        if self.first_parts is None:
            self.first_parts = parts
        return total


def arguments_of(cls):
    """{argument: default} of a loss, as expressions give them."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("dim", "classes")}


def nearest(what, name, known):
    close = difflib.get_close_matches(name, known, 1, 0.4)
    answer = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
    return f"unknown {what} '{name}'; {answer}"


CHOICES = {"mining": ["all", "hard", "semihard"], "kind": ["arc", "cos"]}
POSITIVE = {"s", "tau", "gamma", "k", "r", "t", "power", "high", "sample"}      # where 0 makes no sense
AT_MOST_1 = {"sample", "smooth", "momentum"}
ANGLES = {"m2", "m_low", "m_high"}      # and m of these losses:
ANGULAR = {"arcface", "curricular", "subcenter", "elastic", "groupface"}


def parse_value(key, text, default, most):
    """The value of key=text, of the default's type; integers are at most `most`. ValueError for one that cannot be
    meant."""
    kind = float if default is None else type(default)
    words = CHOICES.get(key, [kind.__name__])
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is str:
            return words[words.index(text.lower())]
        value = kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{key}={text}: expected {' or '.join(words)}") from None
    highest, wanted = math.inf, "finite and 0 or more"
    if key in POSITIVE:
        wanted = "finite and positive"
    if key in AT_MOST_1:
        highest, wanted = 1, "above 0 and at most 1" if key in POSITIVE else "in 0..1"
    if kind is int:
        highest, wanted = most, f"{wanted}, at most {most}"
    wrong_zero = value == 0 and key in POSITIVE and default != 0
    if wrong_zero or value == math.inf or not 0 <= value <= highest:
        raise ValueError(f"{key}={text}: must be {wanted}")
    return value


def parse_arguments(name, text, dim):
    """{argument: value} of "key=value,key=value" for the loss of this name."""
    known, given = arguments_of(LOSSES[name]), {}
    most = dim if name in ("tse", "tpe") else 100                       # k is a dimension there
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if not known:
            raise ValueError(f"{name}: takes no arguments, not '{pair}'")
        if key in known and not equals:
            raise ValueError(f"{name}: {key} without a value; write {key}=VALUE")
        if key not in known:
            raise ValueError(f"{name}: {nearest('argument', key, list(known))}")
        if key in given:
            raise ValueError(f"{name}: {key} is given twice")
        given[key] = parse_value(key, value, known[key], most)
    return given


def advice_about(name, arguments):
    """Lines about margins beyond what an angle or a cosine can be, which are hardly meant."""
    lines = []
    for key, value in arguments.items():
        is_angle = key in ANGLES or (key == "m" and name in ANGULAR)
        is_cosine = key == "m3" or (key == "m" and name in ("am", "cosface", "uniface"))
        if is_angle and value > math.pi / 2:
            lines.append(f"{name}: {key}={value:g} is more than a right angle; {key} is in radians, 0.5 is 28.6"
                         " degrees")
        if is_cosine and value > 1:
            lines.append(f"{name}: {key}={value:g} is taken from a cosine, which is at most 1; 0.35 is usual")
    return lines


def format_spec(name, arguments):
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{name}:{text}" if text else name


def parse_term(part, dim, classes, images):
    """(weight, module, its text) of one part of an expression: [weight*]name[:key=value,key=value]."""
    match = re.fullmatch(r"(?:([0-9.eE+-]+)\*)?([A-Za-z]\w*)(?::(.*))?", part)
    if not match:
        raise ValueError(f"cannot read loss '{part}'; write [weight*]name[:key=value,key=value]")
    weight, name, text = match.groups("")
    alias = ALIASES.get(name.lower())
    name = alias if alias in LOSSES else name.lower()
    if name in ALIASES:
        raise ValueError(f"'{name}' stands for '{alias}'; write that to change its weights or arguments")
    if name not in LOSSES:
        raise ValueError(nearest("loss", name, [*LOSSES, *ALIASES]))
    cls, given = LOSSES[name], parse_arguments(name, text, dim)
    values = default_scale_and_margin(cls, classes, images)
    arguments = {key: values[key] for key, default in arguments_of(cls).items() if default is None}
    arguments |= given
    values |= {"dim": dim, "classes": classes}
    # Losses of pairs know neither dimension nor classes.
    needed = inspect.signature(cls).parameters.keys() & {"dim", "classes"}
    sizes = {key: values[key] for key in needed}
    # What is wrong for a formula shows as a division by zero or a logarithm of zero.
    try:
        factor, module = float(weight or 1), cls(**sizes, **arguments)
    except (ValueError, ArithmeticError):
        raise ValueError(f"{part}: no loss can be made of these numbers") from None
    if not 0 <= factor < math.inf:
        raise ValueError(f"{part}: the weight must be finite and 0 or more")
    module.advice = advice_about(name, arguments)
    prefix = f"{weight}*" if weight else ""
    return factor, module, prefix + format_spec(name, arguments)


def make(spec, dim, classes, shard=(0, 1), images=math.inf):
    """The Loss of an expression: term ('+' term)*, or a recipe's name among them. shard = (rank, world_size): hold only
    this process's part of the class weights. images: how many there are to train on, for automatic arguments. A mistake
    is a ValueError of one line, with the nearest right name."""
    rank, world_size = shard
    if world_size > 1:
        classes = Shard(classes, rank, world_size)
    plus = re.compile(r"(?<![0-9.][eE])\+")                             # not the plus of 1e+3
    spec = "".join(spec.split())                                        # without spaces
    recipes = [ALIASES.get(part.lower(), part) for part in plus.split(spec)]
    parts = plus.split("+".join(recipes))
    return Loss([parse_term(part, dim, classes, images) for part in parts])


def table():
    """The text of --loss help: names, default arguments, the first line of each docstring, recipes."""
    lines = ["losses (a sum: 'ce+0.003*center', arguments: 'arcface:s=32,m=0.3')"]
    for name, cls in LOSSES.items():
        arguments = arguments_of(cls)
        for key, default in arguments.items():
            if default is None:
                arguments[key] = "auto"
        lines.append(f"  {format_spec(name, arguments):<62} {cls.__doc__.splitlines()[0]}")
    lines.append("recipes")
    lines += [f"  {name:<20} = {expression}" for name, expression in ALIASES.items()]
    lines.append("facenet wants --dim 128; tse and tpe want --init CKPT --freeze")
    return "\n".join(lines)


# ---- Figures: python losses.py FOLDER ------------------------------------------------------------------------

MARGIN_CURVES = {                       # m1, m2, m3 of psi
    "no margin": (1, 0, 0),
    "A-softmax, m = 4": (4, 0, 0),
    "SphereFace, 1.7": (1.7, 0, 0),
    "ArcFace, 0.5": (1, 0.5, 0),
    "CosFace, 0.35": (1, 0, 0.35),
    "combined, 1, 0.3, 0.2": (1, 0.3, 0.2),
    "AdaFace, poor image": (1, 0.4, 0),
    "AdaFace, good image": (1, -0.4, 0.8),
}


def margins_panel():
    """The own logit over the angle, divided by the scale, down to -3."""
    angle, series = torch.linspace(0, math.pi, 361), {}
    for name, margins in MARGIN_CURVES.items():
        logit = psi(angle.cos(), *margins)
        shown = logit >= -3
        series[name] = angle.rad2deg()[shown].tolist(), logit[shown].tolist()
    return "Margins", "angle to the own class, degrees", "own logit / s", series


def gradients_panel():
    """How strongly the own logit pulls at the cosine: exact, and detached as by default."""
    angle, series = torch.linspace(0, math.pi, 721)[1:-1], {}
    series["detached, all margins"] = angle.rad2deg().tolist(), [1.0] * len(angle)
    for name in ("SphereFace, 1.7", "ArcFace, 0.5", "combined, 1, 0.3, 0.2"):
        m1, m2, _ = MARGIN_CURVES[name]
        slope = psi_slope(angle.cos(), m1, m2)
        shown = slope <= 5
        series[name + ", exact"] = angle.rad2deg()[shown].tolist(), slope[shown].tolist()
    return "Gradient of the own logit", "angle to the own class, degrees", "d logit / d cosine, / s", series


def boundary_angle(between, m1, m2, m3):
    """The largest angle to class 1 at which its logit, with the margin, exceeds that of class 2, whose weights are
    `between` away."""
    angle = torch.linspace(0, between, 10_001)
    wins = psi(angle.cos(), m1, m2, m3) > (between - angle).cos()
    return float(angle[wins][-1])


def ray(angle, length=1.0):
    """From 0 in the direction angle, for data.plot."""
    return [0, length * math.cos(angle)], [0, length * math.sin(angle)]


def boundary_panels():
    """The plane with the weights of two classes and where each class begins. A margin leaves a gap between them."""
    first, second = math.radians(145), math.radians(45)                 # where the weights point
    # Softmax: w1.x + b1 = w2.x + b2 with ||w1|| = 0.6, ||w2|| = 1, b2 - b1 = 0.1; a line that misses the origin.
    x = 0.6 * math.cos(first) - math.cos(second)
    y = 0.6 * math.sin(first) - math.sin(second)
    normal = torch.tensor([x, y])
    foot = 0.1 * normal / normal.square().sum()
    along = torch.stack([normal[1], -normal[0]]) / normal.norm()        # upwards
    line = torch.stack([foot - 0.3 * along, foot + along])
    series = {
        "weights of class 1": (*ray(first, 0.6), "line", 0),
        "weights of class 2": (*ray(second), "line", 1),
        "boundary": (*line.T.tolist(), "line", 8),
    }
    panels = [("Softmax", "", "", series, "equal")]
    for name in ("no margin", "A-softmax, m = 4", "ArcFace, 0.5", "CosFace, 0.35"):
        angle = boundary_angle(first - second, *MARGIN_CURVES[name])
        series = {
            "_weights of class 1": (*ray(first), "line", 0),
            "_weights of class 2": (*ray(second), "line", 1),
            "class 1 begins": (*ray(first - angle), "line", 2),
            "class 2 begins": (*ray(second + angle), "line", 3),
        }
        title = name.replace("no margin", "Modified softmax")
        panels.append((title, "", "", series, "equal"))
    return panels


def main():
    import data                         # only here: a loss needs no images

    parser = argparse.ArgumentParser(description="Draw the margins, boundaries and gradients of the losses.")
    parser.add_argument("folder", type=Path, help="where margins.png, boundaries.png and gradients.png go")
    parser.error = data.usage
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    data.plot(folder / "margins.png", [margins_panel()], 640, 420)
    data.plot(folder / "boundaries.png", boundary_panels(), 300, 300)
    data.plot(folder / "gradients.png", [gradients_panel()], 640, 420)


if __name__ == "__main__":
    from data import cli
    cli(main)
