"""Every loss of face recognition, from softmax to UniFace, each a formula and a few lines.

    python train.py --loss help                       # all of them, with default arguments
    python train.py --loss arcface:s=32,m=0.4
    python train.py --loss "ce+0.003*center"          # a weighted sum
    criterion = losses.make("ce+0.05*contrastive:m=1", dim=512, classes=8631)
    loss = criterion(embeddings, labels)              # (B, D), (B,) -> scalar

x is an embedding, w_j the weight vector of class j, x^ and w^ their unit vectors, t = cos theta = x^.w^_y the cosine
with the own class y, C the number of classes, D the dimension. Sums over a batch are means unless said. sample=0.1:
only a tenth of the classes, the batch's own among them, takes part in a step (see class_weights). s and m shown as
auto follow the set of images (see automatic); arcface:s=64,m=0.5 is ArcFace as published.

A loss here is a function that hangs its state (class weights, centres, learned scalars) on `self`, a Term, and
returns its formula (x, y) -> scalar. arcface, for one, is called once, when the loss is made, and passes through

    softmax_with      which keeps s and the margin for later,
    class_weights     which hangs self.weight (C, D) and self.logits on self;

what it returns then runs in each step:

    logits (B, C) = s x^.w^_j           class_weights, Cosines
    the column of each own class y      Term.own
    its s t becomes s psi(t)            margin_softmax
    log sum_j e^{l_j} - l_y, the mean   cross_entropy

Everything is computed in float32 at least, whatever the backbone used: with s = 64, cosines from bf16 put the logits
off by 0.1, and in fp16 a zero vector normalises to NaN. (On GPUs train.py lets products be TF32: off by 0.004.)

In several processes every one calls a loss with the whole batch, (B, D) and (B,), so that pairs, centres and running
means are those of one process. make(..., share=(r, N)) divides what has a row a class: process r holds classes
rC/N..(r+1)C/N and logits (B, C/N); loss and gradients are those of the undivided head. Replicated values enter the
divided computation by Enter and leave it by Total, Megatron-LM's f and g (1909.08053, section 3).
"""
import difflib
import functools
import inspect
import math
import re
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ---- What they share: unit vectors, one margin, one cross-entropy, class weights -----------------------------

def unit(x):
    """x / ||x|| along the last axis; zero stays zero, and has no gradient instead of an infinite one."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.masked_fill(norm < 1e-6, math.inf)


class Cosines(torch.autograd.Function):
    """x w^T / ||w||: (B, D), (C, D) -> (B, C). Equals x @ unit(w).T, for which autograd makes eight arrays of the
    size of w, half of a head's time. Divided by ||w|| are the products, never w."""

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
        along = torch.linalg.vecdot(to_w, w) * inverse ** 2             # only the part across w turns it
        return grad @ w, to_w.addcmul_(w, along[:, None], value=-1)


def psi(t, m1=1.0, m2=0.0, m3=0.0):
    """The margin of SphereFace (m1), ArcFace (m2) and CosFace (m3) in one: psi(m1 theta + m2) - m3 of the cosine t.
    psi(a) = (-1)^k cos a - 2k with k = floor(a / pi) continues the cosine so that it falls strictly for every angle;
    cos(theta + m) alone rises again beyond pi - m. m2 and m3 may be tensors with gradient; t has none, see
    margin_softmax()."""
    a = m1 * t.clamp(-1, 1).acos() + m2
    k = torch.floor(a / math.pi)
    return (1 - 2 * (k % 2)) * a.cos() - 2 * k - m3


class Own(NamedTuple):
    """The own class of each image of a batch: its column (B,) among the classes at hand, and whether it is here
    (B, 1), which it always is unless classes are divided among processes. In one process read total(x) as x and
    where(self.here, 0) as nothing."""
    column: torch.Tensor
    here: torch.Tensor
    divided: bool

    def total(self, x):
        return Total.apply(x) if self.divided else x

    def rows(self, w):
        """(B, D): each image's row of a table of classes."""
        return self.total(w[self.column].where(self.here, 0))

    def of(self, logits):
        """(B, 1): each image's own logit. By index, as gather() would keep all logits for its gradient."""
        mine = logits[torch.arange(len(logits), device=logits.device), self.column]
        return self.total(mine[:, None].where(self.here, 0))

    def put(self, a, value):
        """a (B, C), which has no gradient, with a number in place of each image's own class."""
        return a.scatter_(1, j := self.column[:, None], a.gather(1, j).masked_fill_(self.here, value))

    def add(self, logits, more):
        """Add more (B, 1) to the own logits, in place: the gradient passes through untouched, nothing is copied."""
        more = Enter.apply(more) if self.divided else more
        return logits.scatter_add_(1, self.column[:, None], more.where(self.here, 0))

    def logsumexp(self, logits):
        local = logits.logsumexp(1, True)
        return (every(local) if self.divided else local).logsumexp(1)


def cross_entropy(logits, own, smooth=0.0):
    """Mean of log sum_j e^{l_j} - l_y; the own class's share is 1 - smooth, and smooth that of all equally."""
    if not own.divided:
        return F.cross_entropy(logits, own.column, label_smoothing=smooth)
    target = own.of(logits)[:, 0]
    if smooth:
        total, n = own.total(torch.stack([logits.sum(1), torch.full_like(target, logits.shape[1])]))
        target = (1 - smooth) * target + smooth * total / n
    return (own.logsumexp(logits) - target).mean()


def margin_softmax(logits, own, s, target):
    """Cross-entropy of logits (B, C) = s cos after the own class's cosine t became target(t). s: number or (B, 1).
    What is added has no gradient to t, so that the own logit keeps that of the plain cosine (characteristic gradient
    detachment, SphereFace-R, 2109.05565; what the well-known ArcFace code does as well). The exact one, m1 sin(a) /
    sin(theta), is infinite at the poles, where half of the public implementations give NaN; and above 1 it pulls to the
    own class harder than it pushes from the others, so that a high learning rate collapses all faces into one
    direction (README)."""
    with torch.no_grad():
        t = own.of(logits) / s
    return cross_entropy(own.add(logits, s * (target(t) - t)), own)


class Term(nn.Module):
    """One loss of a sum: its formula, and the state that the formula hangs here. No deepcopy: the copy's formula would
    still use this one's state; make a second and load_state_dict."""
    logits = score = project = expected = None

    def __init__(self, formula, dim, classes, share=(0, 1), images=math.inf, **arguments):
        super().__init__()
        self.loss, self.dim, self.classes = formula, dim, classes
        self.first, self.end = edges(classes, share[1])[share[0]:][:2]
        self.held, self.divided = self.end - self.first, share[1] > 1
        self.register_parameter("weight", None)
        auto = automatic(formula, classes, images)
        auto = {k: auto[k] for k, default in defaults_of(formula).items() if default is None}
        self.arguments = auto | arguments
        self.forward = formula(self, **self.arguments)

    def holds(self, classes):
        """Which of these class numbers are held here."""
        return (classes >= self.first) & (classes < self.end)

    def enter(self, x):
        return Enter.apply(x) if self.divided else x

    def own(self, y, chosen=None):
        """Own of labels y among the classes held here; chosen: the numbers, in order, of those that take part."""
        here = self.holds(y) if self.divided else torch.ones_like(y, dtype=torch.bool)
        column = y - self.first if chosen is None else torch.searchsorted(chosen, y)
        return Own(column.where(here, 0), here[:, None], self.divided)

    def per_class(self, fill, *shape, k=1):
        """Parameter (k C, *shape) initialised by fill; this process keeps the rows j, C + j, ... of its own classes j.
        Drawn in blocks of a multiple of 16 numbers, for which torch's generator gives the numbers of one great draw: a
        class starts alike however many processes there are, and the whole is nowhere in memory."""
        n, block = k * self.classes, 2 ** 16
        if not self.divided:
            return nn.Parameter(fill(torch.empty(n, *shape)))
        parts, ends = [], [*range(0, max(1, n - block + 1), block), n]
        for low, high in zip(ends, ends[1:]):
            here = self.holds(torch.arange(low, high) % self.classes)
            parts.append(fill(torch.empty(high - low, *shape))[here])
        p = nn.Parameter(torch.cat(parts))
        p.per_class = k                                                 # tells train.py how to put it together
        return p

    def class_weights(self, scaled, loss=None, sample=1.0, k=1):
        """Hang class weights (C, D) and the margin-free logits scaled(x).w^_j on self; the scale multiplies x^, not the
        cosines: one (B, C) array less. Returns (x, y, ...) -> loss(logits, the Own of y among their columns, ...).
        sample < 1: in training, only that share of the classes takes part, the batch's and random others (Partial FC,
        An et al. 2021, 2010.05222). k > 1: class j has k weights, in rows j, C + j, ...; the nearest counts."""
        self.weight = self.per_class(lambda w: w.normal_().mul_(self.dim ** -0.5), self.dim, k=k)

        def closest(x, w):
            logits = Cosines.apply(self.enter(scaled(x)), w)
            return logits.unflatten(1, (k, -1)).max(1)[0] if k > 1 else logits

        def step(x, y, *more):
            w, chosen = self.weight, None
            if sample < 1 and self.training:
                n = min(self.classes, max(round(sample * self.classes), len(y)))
                draw = torch.rand(self.classes, device=x.device).index_fill_(0, y, 2.0)     # the batch's come first
                chosen = draw.topk(n)[1].sort()[0]
                chosen = chosen[self.holds(chosen)] if self.divided else chosen
                if not len(chosen):
                    raise ValueError(f"none of the {n} sampled classes fell to process {dist.get_rank()}; use a larger"
                                     " sample= or fewer processes")
                w = w.unflatten(0, (k, -1))[:, chosen - self.first].flatten(0, 1)
            return loss(closest(x, w), self.own(y, chosen), *more)
        self.logits = lambda x: closest(x, self.weight)
        return step

    def linear_softmax(self, scaled, smooth=0.0):
        """Cross-entropy of a plain linear layer, logits w_j.scaled(x) + b_j."""
        bound = self.dim ** -0.5                                        # as nn.Linear
        self.weight = self.per_class(lambda w: w.uniform_(-bound, bound), self.dim)
        self.bias = self.per_class(lambda b: b.uniform_(-bound, bound))
        self.logits = lambda x: F.linear(self.enter(scaled(x)), self.weight, self.bias)
        return lambda x, y: cross_entropy(self.logits(x), self.own(y), smooth)

    def at_start(self, s, sample=1.0, t=0.0):
        """Expected first loss, that of random unit vectors, whose cosines are N(0, 1/D): -s t + ln C + s^2/2D, t being
        what the own cosine 0 becomes, as long as the sum over classes is not ruled by its largest term."""
        log_c = math.log(max(round(sample * self.classes), 1))
        if s * s < 1.5 * self.dim * log_c:
            self.expected = -s * t + log_c + s * s / (2 * self.dim)

    def softmax_with(self, s, sample=1.0, margins=None, k=1, learn=False, **fixed):
        """A normalised head: cross-entropy over s cos, with psi(t, **fixed) for the own class's cosine t, or, where its
        margins depend on the batch, psi(t, **margins(x)), fixed being those of the start. Without margins, t stays."""
        self.s = nn.Parameter(torch.tensor(s)) if learn else s

        def loss(logits, own, m):
            return margin_softmax(logits, own, self.s, lambda t: psi(t, **m)) if m else cross_entropy(logits, own)
        step = self.class_weights(lambda x: self.s * unit(x), loss, sample, k)
        if k == 1:
            self.at_start(s, sample, float(psi(torch.zeros(()), **fixed)) if fixed else 0.0)
        return lambda x, y: step(x, y, margins(x) if margins else fixed)


# ---- Softmax and its normalised forms ------------------------------------------------------------------------

def ce(self, smooth=0.0):
    """Softmax cross-entropy: logits w_j.x + b_j, label smoothing on request.
    What DeepFace (2014), DeepID and VGGFace trained with. Norms carry class frequency and image quality, so judge it
    by the cosine, not by the distance of raw embeddings. No smoothing with margins: they cancel."""
    self.expected = math.log(self.classes)
    return self.linear_softmax(lambda x: x, smooth)


def modified(self):
    """Modified softmax: unit weights, no bias, free norm: logits ||x|| cos_j (Liu et al. 2017, 1704.08063, eq. 4).
    A-softmax with m = 1; decision by angle alone, but easy images still win by a long x."""
    return self.class_weights(lambda x: x, cross_entropy)


def l2softmax(self, alpha=16.0, learn=False):
    """L2-constrained softmax: logits w_j.(alpha x^) + b_j (Ranjan et al. 2017, 1703.09507).
    Features on a sphere of radius alpha, weights free. With the others at their mean, the own class's probability is
    p = e^alpha / (e^alpha + C - 2) (section 3.3): alpha is raised to where that is 0.9, if it is lower (11.3 at C =
    8,631), as it cannot converge below. Learned (learn=true), it drifts up; the paper's best are fixed ones."""
    alpha = max(alpha, math.log(max(9 * (self.classes - 2), 1)))
    self.alpha = nn.Parameter(torch.tensor(alpha)) if learn else alpha
    return self.linear_softmax(lambda x: self.alpha * unit(x))


def normface(self, s=20.0, learn=True, sample=1.0):
    """NormFace: logits s cos_j, s learned (Wang et al. 2017, 1704.06369).
    With s = 1 the loss cannot fall below ln(1 + (C - 1) e^(-C/(C-1))), 8.1 at C = 8,631: the scale is what makes
    cosines trainable. The authors fine-tuned softmax models with it."""
    return self.softmax_with(s, sample, learn=learn)


def coco(self, s=30.0, sample=1.0):
    """COCO, congenerous cosine: logits s cos_j with a fixed s (Liu et al. 2017, 1710.00870).
    The centroids of the first version became normalised weights: NormFace with a constant."""
    return self.softmax_with(s, sample)


def vmf(self, s=30.0, shared=False):
    """von Mises-Fisher mixture: log C_D(k_j) + k_j cos_j, concentrations k_j learned (Hasnat 2017, 1706.04264).
    shared=true has one k: the normaliser C_D cancels and it is NormFace. I_{D/2-1} overflows, so log C_D comes from
    the uniform asymptotic expansion of Bessel's function (Abramowitz, Stegun 9.7.7), good for D >= 8."""
    self.class_weights(unit)
    cosines_of, v = self.logits, max(self.dim / 2 - 1, 0.5)
    self.log_k = nn.Parameter(torch.tensor([s]).log()) if shared else self.per_class(lambda k: k.fill_(math.log(s)))

    def log_c(k):
        root = torch.sqrt(v * v + k * k)
        return v * torch.log(v + root) - root + 0.5 * torch.log(root)
    shift = float(log_c(torch.tensor(s)))                               # cancels; keeps numbers small

    def logits(x):
        k = (self.enter(self.log_k) if shared else self.log_k).exp()
        return (cosines_of(x) * k).add_(log_c(k) - shift)
    self.logits = logits
    self.at_start(s)
    return lambda x, y: cross_entropy(logits(x), self.own(y))


def adacos(self, dynamic=True, sample=1.0):
    """AdaCos: NormFace without a scale to choose (Zhang et al. 2019, 1905.00292).
    Starts at s = sqrt 2 ln(C - 1); dynamic: s = ln(mean_i sum_{j != y} e^{s cos_j}) / cos(min(pi/4, median theta)), so
    it falls as angles shrink. s is a buffer: as a Python number, elsewhere, it is lost on resuming."""
    def loss(c, own):
        if dynamic and self.training:
            with torch.no_grad():
                middle = own.of(c).clamp(-1, 1).acos().median().clamp_max(math.pi / 4)
                others = own.logsumexp(own.put(self.s * c, -math.inf)).logsumexp(0) - math.log(len(c))
                self.s.copy_(others.clamp_min(1) / middle.cos())
        return cross_entropy(c.mul_(self.s.clone()), own)               # a clone: the buffer moves on
    formula = self.class_weights(unit, loss, sample)
    cosines_of, self.logits = self.logits, lambda x: self.s * cosines_of(x)
    self.register_buffer("s", torch.tensor(math.sqrt(2) * math.log(max(self.classes - 1, 2))))
    self.at_start(float(self.s), sample)
    return formula


# ---- Margins -------------------------------------------------------------------------------------------------

def annealed(self, norms, m, base, gamma, power, low):
    """Own logit norms(x, own) (lambda t + psi(m theta)) / (1 + lambda), lambda = max(low, base (1 + gamma n)^-power)
    at step n, a buffer, so that a resumed run does not start the annealing again."""
    self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def formula(x, y):
        self.step += self.training
        lam, own = (base * (1 + gamma * self.step.to(x.dtype)) ** -power).clamp_min(low), self.own(y)
        return margin_softmax(self.logits(x), own, norms(x, own).clamp_min(1e-6)[:, None],
                              lambda t: (lam * t + psi(t, m)) / (1 + lam))
    return formula


def lsoftmax(self, m=4, base=1000.0, gamma=2.5e-5, power=35.0, low=0.0):
    """L-softmax: own logit ||w_y|| ||x|| psi(m theta) (Liu et al. 2016, 1612.02295).
    The first margin. Does not converge from scratch without the annealing, here that for MNIST's 20,000 steps."""
    self.class_weights(unit)
    self.logits = lambda x: F.linear(self.enter(x), self.weight)
    return annealed(self, lambda x, own: x.norm(dim=1) * own.rows(self.weight).norm(dim=1), m, base, gamma, power, low)


def asoftmax(self, m=4, base=1000.0, gamma=0.12, power=1.0, low=5.0):
    """A-softmax, SphereFace as published: own logit ||x|| psi(m theta), unit weights.
    Liu et al. 2017, 1704.08063. The annealing ends at lambda = 5, a sixth of the margin. sphereface needs none."""
    self.class_weights(lambda x: x)
    return annealed(self, lambda x, own: x.norm(dim=1), m, base, gamma, power, low)


def sphereface(self, s=30.0, m=1.7, sample=1.0):
    """SphereFace on the unit sphere: own logit s psi(m theta) (SphereFace-R, Liu et al. 2021, 2109.05565).
    Without psi, as in some code, the logit rises again beyond pi/m = 106 degrees."""
    return self.softmax_with(s, sample, m1=m)


def am(self, s=30.0, m=0.35, sample=1.0):
    """AM-softmax: own logit s (cos theta - m) (Wang et al. 2018, 1801.05599)."""
    return self.softmax_with(s, sample, m3=m)


def cosface(self, s=None, m=None, sample=1.0):
    """CosFace: own logit s (cos theta - m) (Wang et al. 2018, 1801.09414); am with s and m by the set.
    The margin with the fewest troubles: its gradient does not depend on the angle."""
    return am(self, s, m, sample)


def arcface(self, s=None, m=None, sample=1.0):
    """ArcFace: own logit s cos(theta + m) (Deng et al. 2019, 1801.07698). m in radians: 0.5 is 28.6 degrees.
    Flat at 15-20 means too high a learning rate, not a bug. m = 0.3 for noisy or small sets."""
    return self.softmax_with(s, sample, m2=m)


def combined(self, s=None, m1=1.0, m2=0.3, m3=0.2, sample=1.0):
    """Combined margin: own logit s (cos(m1 theta + m2) - m3) (ArcFace's paper, eq. 4).
    m1 multiplies, m2 adds to the angle, m3 to the cosine. (The course write-up prints cos(theta + m1) + m2; a plus
    there would make the task easier.)"""
    return self.softmax_with(s, sample, m1=m1, m2=m2, m3=m3)


def curricular(self, s=None, m=None, momentum=0.01, sample=1.0):
    """CurricularFace: ArcFace, and negatives with cos_j > cos(theta + m) become cos_j (r + cos_j).
    Huang et al. 2020, 2004.00288. r, the running mean of the own cosine, updated before use, rises: easy first."""
    def loss(logits, own):
        with torch.no_grad():                   # torch.where(easy, l, l (r + l/s)), l (r + l/s) = slope l - l^2/s:
            t = own.of(logits) / s              # one array is kept, not three
            target = s * psi(t, m2=m)
            if self.training:
                self.r.lerp_(t.mean(), momentum)
            easy = own.put(logits <= target, True)
            slope = torch.add(self.r, logits, alpha=2 / s).masked_fill_(easy, 1)
            hard = logits.masked_fill(easy, 0)
        logits.mul_(slope).addcmul_(hard, hard, value=-1 / s)
        del easy, slope, hard
        return cross_entropy(own.add(logits, target - s * t), own)
    self.register_buffer("r", torch.zeros(()))
    return self.class_weights(lambda x: s * unit(x), loss, sample)


def subcenter(self, s=None, m=None, k=3, sample=1.0):
    """Sub-center ArcFace: k weights a class, cos_j the largest of their cosines (Deng et al. 2020, ECCV).
    Mislabelled images gather at a minor centre; a person's few images scatter over all three: k = 1, ArcFace, for
    small sets. k times the head's cost and memory."""
    return self.softmax_with(s, sample, k=k, m2=m)


def adaface(self, s=None, m=0.4, h=0.333, momentum=0.01, sample=1.0):
    """AdaFace: the norm tells image quality; own logit s (cos(theta - m z) - m (1 + z)).
    Kim et al. 2022, 2204.00964. z = clip(h (||x|| - mean) / deviation, -1, 1), no gradient. h = 0 is CosFace, z = -1
    ArcFace. The deviation is the biased one: of a batch of one the other is NaN, for good in the running statistics.
    Below angle 0 psi goes on rising; the authors' code stops at 1."""
    self.register_buffer("mean", torch.tensor(20.0))
    self.register_buffer("std", torch.tensor(100.0))

    @torch.no_grad()
    def margins(x):
        norm = x.norm(dim=1, keepdim=True).clamp(1e-3, 100)
        if self.training:
            self.mean.lerp_(norm.mean(), momentum)
            self.std.lerp_(norm.std(correction=0), momentum)
        z = (h * (norm - self.mean) / (self.std + 1e-3)).clamp(-1, 1)
        return {"m2": -m * z, "m3": m * (1 + z)}
    return self.softmax_with(s, sample, margins, m3=m)


def magface(self, s=None, low=10.0, high=110.0, m_low=0.45, m_high=0.8, lam=35.0, sample=1.0):
    """MagFace: own logit s cos(theta + m(a)), a = ||x||, and lam mean(1/a + a/high^2).
    Meng et al. 2021, 2103.06627. m(a) is linear from (low, m_low) to (high, m_high). Neither part is detached: the
    margin pulls norms down, the second term, a reward for long x, up. Norms below low are clamped, which learns
    nothing, and a last batch norm makes them about sqrt D: for D < 100 low=1,high=51."""
    def norm(x):
        return x.norm(dim=1, keepdim=True).clamp(low, high)
    rise = (m_high - m_low) / (high - low)
    formula = self.softmax_with(s, sample, lambda x: {"m2": m_low + rise * (norm(x) - low)})
    self.expected = None
    return lambda x, y: formula(x, y) + lam * (1 / norm(x) + norm(x) / high ** 2).mean()


def elastic(self, s=None, m=None, sigma=0.05, kind="arc", sample=1.0):
    """ElasticFace: the margin of each image and step is drawn from N(m, sigma).
    Boutros et al. 2022, 2109.09416. kind=arc adds it to the angle, kind=cos subtracts it from the cosine: give
    m=0.35 with it, auto is an angle. sigma = 0 is ArcFace or CosFace. In evaluation the margin is m."""
    margin = {"arc": "m2", "cos": "m3"}[kind]

    def drawn(x):
        return {margin: m + sigma * self.training * torch.randn(len(x), 1, device=x.device, dtype=x.dtype)}
    return self.softmax_with(s, sample, drawn, **{margin: m})


def one_against_rest(logits, own, gap, alpha, beta):
    """mean_i alpha softplus(gap - l_iy) + beta sum_{j != y} softplus(l_ij): C yes-or-no questions instead of one choice
    among C. softplus, not log(1 + exp), which overflows."""
    mine, total = own.of(logits), own.total(F.softplus(logits).sum(1, keepdim=True))
    return (alpha * F.softplus(gap - mine) + beta * (total - F.softplus(mine))).mean()


def sphereface2(self, r=40.0, m=0.4, t=3, alpha=0.7, lw=50.0):
    """SphereFace2: C binary classifiers r g(cos_j) + b -+ r m, g(c) = 2 ((c+1)/2)^t - 1.
    Wen et al. 2022, 2108.01513, variant C: margin on both signs. alpha weighs the own class against all others, lw / r
    the whole. b is learned and starts where the loss of orthogonal embeddings is least, a closed form."""
    q = (2 * r) ** (1 / t) / 2                                          # 2 r ((c+1)/2)^t = (q c + q)^t
    self.class_weights(lambda x: q * unit(x))
    cosines_of, z = self.logits, alpha / ((1 - alpha) * max(self.classes - 1, 1))
    self.b = nn.Parameter(torch.tensor(math.log(z) / 2 - r * (2 * 0.5 ** t - 1)
                                       - math.asinh((1 - z) / (2 * math.sqrt(z)) * math.exp(r * m))))

    def logits(x, margin=0.0):
        h = cosines_of(x).add_(q)                   # h^t + b - r + margin; pow() would keep one array (B, C) more
        slope = h.detach().pow(t - 1).mul_(t)       # h slope, less its part 1 - 1/t, is h^t
        h.mul_(slope)
        return h.sub_(h.detach(), alpha=1 - 1 / t).add_(self.enter(self.b) - r + margin)
    self.logits = logits
    return lambda x, y: lw / r * one_against_rest(logits(x, r * m), self.own(y), 2 * r * m, alpha, 1 - alpha)


def uniface(self, s=None, m=0.4, lam=1.0, sample=1.0):
    """UniFace: one learned threshold b for all classes: softplus of -(s (t - m) - b) and of s cos_j - b.
    Zhou et al. 2023, ICCV. Verification needs that every genuine score lies above one b and every impostor's below."""
    formula = self.class_weights(lambda x: s * unit(x), lambda logits, own: one_against_rest(
        logits.sub_(self.enter(self.b)), own, s * m, 1.0, lam), sample)
    self.b = nn.Parameter(torch.tensor(math.log(10 * self.classes)))
    return formula


def circle_class(self, gamma=256.0, m=0.25, sample=1.0):
    """Circle loss over classes: gamma [1+m-t]+ (t-(1-m)) against gamma [cos_j+m]+ (cos_j-m).
    Sun et al. 2020, 2002.10857. The weights [.]+ carry no gradient: it fights the logits. 20-70 is a normal loss."""
    root = math.sqrt(gamma)                                             # for either of the two factors

    def loss(c, own):
        t = own.of(c)
        target = (root * (1 + m) - t.detach()).relu() * (t - root * (1 - m))
        weights = own.put((c.detach() + root * m).relu_(), 0)
        return cross_entropy(own.add(c.sub_(root * m).mul_(weights), target), own)
    return self.class_weights(lambda x: root * unit(x), loss, sample)


def groupface(self, k=4, lam=0.1, s=None, m=None, sample=1.0):
    """GroupFace: the embedding gains a group-aware part, x + sum_k p_k V_k x, p = softmax(G x).
    Kim et al. 2020, 2005.10497. ArcFace on the sum, plus lam CE(p, k*): k* = argmax (p_k - E p_k)/K + 1/K balances the
    groups nobody labelled. The sum is the embedding at inference too; it costs k D x D products beside the head."""
    formula = self.softmax_with(s, sample, m2=m)
    free, self.expected = self.logits, None
    self.groups = nn.Linear(self.dim, k)
    self.parts = nn.Parameter(torch.randn(k, self.dim, self.dim) * 0.1 * self.dim ** -0.5)
    self.register_buffer("usage", torch.full((k,), 1 / k))

    def project(x):
        parts = F.linear(x, self.parts.flatten(0, 1)).unflatten(1, (k, -1))             # (B, k, D)
        return x + (self.groups(x).softmax(1)[:, None] @ parts)[:, 0]
    self.project, self.logits = project, lambda x: free(project(x))

    def with_groups(x, y):
        scores = self.groups(x)
        p = scores.softmax(1).detach()
        if self.training:
            self.usage.lerp_(p.mean(0), 0.1)
        return formula(project(x), y) + lam * F.cross_entropy(scores, (p - self.usage).argmax(1))
    return with_groups


# ---- Pairs, triplets, batches: train.py gives these P people x K images --------------------------------------

def same_and_other(y):
    """Masks (B, B): pairs of one person, without the diagonal; pairs of two people."""
    same = y[:, None] == y
    return same ^ torch.eye(len(y), dtype=torch.bool, device=y.device), ~same


def cosines(x):
    """(B, B) of a batch with itself."""
    x = unit(x)
    return x @ x.T


def distances(x):
    """Distances (B, B) of unit embeddings, sqrt(2 - 2 cos); the clamp keeps the gradient finite at zero."""
    return (2 - 2 * cosines(x)).clamp_min(1e-12).sqrt()


def over_pairs(values, formula):
    """formula(values (B, B), same, other) of the values, a function of x, and the two masks."""
    return lambda x, y: formula(values(x), *same_and_other(y))


def mean_where(values, mask):
    """Mean over the mask; 0 with a gradient of 0 where the mask is empty."""
    return values.where(mask, 0).sum() / mask.sum().clamp_min(1)


def lse_where(values, mask):
    """log(sum exp) of each row over the mask; very negative, not -inf, where a row has none."""
    return values.masked_fill(~mask, -1e9).logsumexp(1)


def contrastive(self, m=1.0):
    """Contrastive, max-margin: d^2/2 for one person, [m - d]+^2 / 2 for two (Hadsell et al. 2006, CVPR).
    d of unit embeddings (0..2); genuine and impostor pairs are averaged apart, or the many impostors drown the few.
    (A lecture prints max(0, m - D^2); Hadsell's hinge is on the distance and squared afterwards.)"""
    return double_margin(self, 0.0, m, weight=0.5)


def double_margin(self, m_p=0.4, m_n=1.2, weight=1.0):
    """Contrastive with two margins: [d - m_p]+^2 for one person, [m_n - d]+^2 for two.
    Genuine pairs are not crushed into a point. No values are standard; these are 23 and 74 degrees."""
    return over_pairs(distances, lambda d, same, other: weight * (
        mean_where((d - m_p).relu() ** 2, same) + mean_where((m_n - d).relu() ** 2, other)))


def marginal(self, theta=1.2, xi=0.3):
    """Marginal loss: mean over pairs of [xi -+ (theta - d^2)]+, minus for one person (Deng et al. 2017, CVPRW).
    The distance is squared (0..4). Meant to be added to ce."""
    return over_pairs(cosines, lambda s, same, other: mean_where(
        (xi - torch.where(same, 1.0, -1.0) * (theta - 2 + 2 * s)).relu(), same | other))


def triplets(q, y, mining, cost, nonzero=False):
    """Mean cost(q_an - q_ap) over triplets of anchor, positive, negative; q (B, B) is higher for closer pairs.
    all: every triplet (those of nonzero cost if so wished). hard: the farthest positive and the closest negative of
    each anchor. semihard: for each genuine pair the closest negative that is farther than the positive, or, if there
    is none, the farthest negative of all. all and semihard take memory for B^3 numbers."""
    same, other = same_and_other(y)
    if mining == "hard":
        near, far = q.masked_fill(~other, -1e4).amax(1), q.masked_fill(~same, 1e4).amin(1)
        return mean_where(cost(near - far), same.any(1) & other.any(1))
    gap = q[:, None, :] - q[:, :, None]                                                 # (a, p, n)
    valid = same[:, :, None] & other[:, None, :]
    if mining == "semihard":
        beyond = gap.masked_fill(~(valid & (gap < 0)), -1e4).amax(2)
        easiest = gap.masked_fill(~valid, 1e4).amin(2)
        return mean_where(cost(torch.where(beyond > -1e4, beyond, easiest)), valid.any(2))
    value = cost(gap)
    return mean_where(value, valid & (value > 0) if nonzero else valid)


def triplet(self, m=0.2, mining="semihard"):
    """Triplet: [d_ap^2 - d_an^2 + m]+ on unit embeddings, mining=all/hard/semihard.
    Schroff et al. 2015, 1503.03832. hard from scratch collapses: all embeddings equal, loss exactly m. Start semihard
    or from a softmax model. all averages the non-zero triplets, so its loss hovers near m even while it learns."""
    return lambda x, y: triplets(2 * cosines(x) - 2, y, mining, lambda gap: (gap + m).relu(), nonzero=True)


def hinge(self, m=0.2, mining="all"):
    """Hinge on cosines: max(s_n - s_p + m, 0); the triplet loss with half the scale, over all triplets."""
    return lambda x, y: triplets(cosines(x), y, mining, lambda gap: (gap + m).relu())


def projected_triplets(self, k, cost, mining):
    """Triplets on W x^ (k numbers), inner products as in the papers. W starts as the first k axes and is part of the
    embedding ever after; another term of a sum sees x itself."""
    self.projection = nn.Parameter(torch.eye(k or min(self.dim, 128), self.dim))
    self.project = lambda x: F.linear(unit(x), self.projection)
    return lambda x, y: triplets((z := self.project(x)) @ z.T, y, mining, cost)


def tse(self, m=0.1, k=0, mining="all"):
    """Triplet similarity embedding: [a.n - a.p + m]+ of W x^ (Sankaranarayanan et al. 2016, 1602.03418).
    A linear W with k rows (0: 128, or the dimension if lower) for frozen features: --init CKPT --freeze."""
    return projected_triplets(self, k, lambda gap: (gap + m).relu(), mining)


def tpe(self, k=0, mining="all"):
    """Triplet probabilistic embedding: -log e^{a.p} / (e^{a.p} + e^{a.n}) of W x^.
    The same authors, 2016, 1604.05417. = softplus(a.n - a.p), tse with a soft hinge. For frozen features, as tse."""
    return projected_triplets(self, k, F.softplus, mining)


def npair(self, reg=0.002):
    """N-pair: cross-entropy over a_i.p_j, one (a, p) a person, plus reg mean ||x||^2 (Sohn 2016, NIPS).
    a, p: a person's first two images of the batch. Raw inner products: cosines barely train without a scale."""
    def formula(x, y):
        same = y[:, None] == y
        earlier = same.tril(-1).sum(1)                                  # how many of this person came before
        anchor, pair = (earlier == 0) & (same.sum(1) > 1), same & (earlier == 1)
        scores = x @ x[pair.int().argmax(1)].T                          # column j: the second of j's person
        rows = lse_where(scores, anchor.expand_as(same)) - scores.diagonal()
        return mean_where(rows, anchor) + reg * x.square().sum(1).mean()
    return formula


def supcon(self, tau=0.1):
    """SupCon: -mean_p log e^{cos_ip/tau} / sum_{a != i} e^{cos_ia/tau} (Khosla et al. 2020, 2004.11362).
    Mean over anchors i; those without a positive are left out. The anchor itself never stands in the sum."""
    def formula(s, same, other):
        log_p = s / tau - lse_where(s / tau, same | other)[:, None]
        return mean_where(-(log_p * same).sum(1) / same.sum(1).clamp_min(1), same.any(1))
    return over_pairs(cosines, formula)


def circle(self, gamma=80.0, m=0.4):
    """Circle loss on pairs: softplus(LSE_n gamma [s_n+m]+ (s_n-m) + LSE_p -gamma [1+m-s_p]+ (s_p-(1-m))).
    LSE_n and LSE_p are the log-sum-exp of an anchor's pairs with others and with itself. Sun et al. 2020, 2002.10857.
    (The course write-up prints the positive term without the minus before gamma; that would push genuine pairs
    apart.) The weights [.]+ carry no gradient. gamma=256, m=0.25 for large batches."""
    def formula(s, same, other):
        negative = lse_where(gamma * (s.detach() + m).relu() * (s - m), other)
        positive = lse_where(-gamma * (1 + m - s.detach()).relu() * (s - (1 - m)), same)
        return mean_where(F.softplus(negative + positive), same.any(1) & other.any(1))
    return over_pairs(cosines, formula)


def multisim(self, alpha=2.0, beta=50.0, base=0.5):
    """Multi-similarity: ln(1 + sum_p e^{alpha (base - s_p)})/alpha + ln(1 + sum_n e^{beta (s_n - base)})/beta.
    s_p, s_n: an anchor's cosines, genuine and impostor. Wang et al. 2019, 1904.06627, without its mining."""
    a, b = 1 / alpha, 1 / beta
    return over_pairs(cosines, lambda s, same, other: (a * F.softplus(lse_where(-alpha * (s - base), same))
                                                       + b * F.softplus(lse_where(beta * (s - base), other))).mean())


def siamese(self):
    """DeepFace's siamese metric: p(same) = sigmoid(b - sum_k w_k |x^1_k - x^2_k|), w >= 0 learned.
    Taigman et al. 2014, CVPR. Logistic loss, genuine and impostor pairs averaged apart. verify.py --metric learned."""
    self.axes, self.b = nn.Parameter(torch.zeros(self.dim)), nn.Parameter(torch.tensor(math.sqrt(self.dim)))

    def weighted(x):
        return 1.4 * F.softplus(self.axes) * unit(x)                    # w = 0.97 at first
    self.score = lambda a, b: self.b - (weighted(a) - weighted(b)).abs().sum(-1)
    return over_pairs(lambda x: self.b - torch.cdist(z := weighted(x), z, p=1), lambda logit, same, other: (
        mean_where(F.softplus(-logit), same) + mean_where(F.softplus(logit), other)))


# ---- Terms to add to another loss ----------------------------------------------------------------------------

def centres(self, alpha):
    """Hang running centres (C, D), zero at first, on self. Returns move(x, y) -> each image's centre (B, D) before and
    after this batch's update c_j -= alpha sum_{i: y=j} (c_j - x_i) / (1 + n_j), with gradient to x; in training it also
    stores them. The published rule: autograd's own would lack the 1 / (1 + n_j)."""
    self.register_buffer("c", torch.zeros(self.classes, self.dim))

    def move(x, y):
        same = (y[:, None] == y).to(x.dtype)
        n, old = same.sum(1, keepdim=True), self.c[y]
        if self.training:
            self.c.index_add_(0, y, alpha * (x.detach() - old) / (1 + n))
        return old, old + alpha * (same @ x - n * old) / (1 + n)
    return move


def center(self, alpha=0.5):
    """Center loss: mean ||x - c_y||^2 / 2, centres by the published rule (Wen et al. 2016, ECCV).
    0.003 * center, on raw x, next to ce. No parameters: autograd's gradient of c is not the paper's update."""
    move = centres(self, alpha)
    return lambda x, y: (x - move(x.detach(), y)[0]).square().sum(1).mean() / 2


def center_invariant(self, alpha=0.5):
    """Center-invariant: mean (||c_y||^2 - mean_k ||c_k||^2)^2 / 4 gives rare classes the norm of the others.
    Wu et al. 2017, ACM MM. (A lecture prints it without the outer square, which would have no minimum.) x is reached
    through its share in the moved centre. Raw x; 1e-5 * center_invariant, with ce and center."""
    move = centres(self, alpha)

    def formula(x, y):
        mean = self.c.square().sum(1).mean()                            # of all classes, before the move
        return (move(x, y)[1].square().sum(1) - mean).square().mean() / 4
    return formula


def range_(self, k=2, alpha=1.0, beta=1.0, m=1.0):
    """Range loss: alpha sum over people of the harmonic mean of their k largest distances + beta [m - d^2]+.
    d: the smallest distance of two people's centres. Zhang et al. 2016, 1611.08976. 0.01 * range.
    For long tails: a person's few farthest pairs count, not all. On unit embeddings, m = 1 is 60 degrees."""
    def formula(x, y):
        same, other = same_and_other(y)
        first = ~same.tril().any(1)                                     # one image stands for each person
        pairs = first[:, None, None] & (y[:, None] == y)[:, :, None] & same.triu()      # (person, i, j)
        d = distances(x).where(pairs, 0).flatten(1)
        d = d.topk(min(k, d.shape[1]), 1)[0]                            # each one's farthest pairs; 0: no pair
        inverse = (1 / d.where(d > 0, math.inf)).sum(1)
        intra = ((d > 0).sum(1) / inverse.where(inverse > 0, 1)).sum()
        share = (y[:, None] == y).to(x.dtype)
        middle = share @ unit(x) / share.sum(1, keepdim=True)           # own person's centre
        gap = (middle[:, None] - middle).square().sum(2).masked_fill(~other, 1e4).amin()
        return alpha * intra + beta * (m - gap).relu()
    return formula


def ring(self, lam=1.0):
    """Ring loss: lam/2 mean (||x|| - R)^2 pulls norms to a learned R (Zheng et al. 2018, 1803.00130).
    0.01 * ring. R starts at the first batch's mean norm; started at 1, as elsewhere, it collapses the norms."""
    self.radius = nn.Parameter(torch.tensor(-1.0))

    def formula(x, y):
        norm = x.norm(dim=1)
        with torch.no_grad():
            self.radius.copy_(torch.where(self.radius < 0, norm.mean(), self.radius))
        return lam / 2 * (norm - self.radius).square().mean()
    return formula


def uniform(self, alpha=0.5):
    """UniformFace: mean over pairs of images of two people of 1 / (1 + ||c_a - c_b||), centres on the sphere.
    Duan et al. 2019, CVPR. Spreads people evenly, those of the batch: C^2 pairs are too many. With class weights."""
    move = centres(self, alpha)
    return lambda x, y: mean_where(1 / (1 + distances(move(unit(x), y)[1])), y[:, None] != y)


def regular(self):
    """RegularFace: mean over classes of the cosine to the nearest other class weight (Zhao et al. 2019, CVPR).
    Acts on the partner's class weights; over the batch's classes, so (B, C), never (C, C). "ce+regular"."""
    def formula(x, y):
        w, own = self.head[0].weight[:self.held], self.own(y)           # of subcenter's the first of each class
        near = Cosines.apply(self.enter(unit(own.rows(w))), w)
        near = own.add(near, torch.full_like(near[:, :1], -4)).max(1, True)[0]
        return (every(near) if self.divided else near).max(1)[0].mean()
    return formula


# ---- Several processes: each holds some of the classes ---------------------------------------------------------

def all_reduced(x):
    dist.all_reduce(x := x.clone(memory_format=torch.contiguous_format))
    return x


class Total(torch.autograd.Function):
    """The sum over processes of a partial result; the gradient to each part is that of the sum."""
    forward = staticmethod(lambda ctx, x: all_reduced(x))
    backward = staticmethod(lambda ctx, grad: grad)


class Enter(torch.autograd.Function):
    """A value that all processes have goes into what each computes for its classes; their gradients are summed."""
    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, grad: all_reduced(grad))


def every(x):
    """(B, N n): the x (B, n) of all N processes, side by side."""
    n, r = x.shape[1], dist.get_rank()
    return Total.apply(F.pad(x, (r * n, (dist.get_world_size() - r - 1) * n)))


# ---- One expression: "ce+0.003*center:alpha=0.5" -------------------------------------------------------------

BALANCED = (contrastive, double_margin, marginal, triplet, hinge, tse, tpe, npair, supcon, circle, multisim,
            siamese, range_)                    # of pairs: these want several images a person in the batch
FORMULAS = {f.__name__.rstrip("_"): f for f in (
    ce, modified, l2softmax, normface, coco, vmf, adacos, lsoftmax, asoftmax, sphereface, am, cosface, arcface,
    combined, curricular, subcenter, adaface, magface, elastic, sphereface2, uniface, circle_class, groupface,
    *BALANCED, center, center_invariant, ring, uniform, regular)}

ALIASES = {"softmax": "ce", "amsoftmax": "am", "angular": "asoftmax", "vggface": "ce", "deepface": "siamese",
           "deepid2": "ce+0.05*contrastive", "facenet": "triplet:mining=semihard,m=0.2", "npairs": "npair",
           "centerloss": "ce+0.003*center", "centerinvariant": "ce+0.003*center+1e-5*center_invariant",
           "rangeloss": "ce+0.01*range", "marginalloss": "ce+marginal", "ringloss": "ce+0.01*ring",
           "uniformface": "sphereface+uniform", "regularface": "asoftmax+regular"}

CHOICES = {key: {word: word for word in words.split()} for key, words in (
    ("mining", "all hard semihard"), ("kind", "arc cos"))}
POSITIVE = {"s", "tau", "gamma", "k", "r", "t", "power", "low", "high", "sample"}      # where 0 makes no sense
AT_MOST_1 = {"sample", "smooth", "momentum"}


def edges(classes, processes):
    """Where each process's classes begin; the last number is the end."""
    return [classes * r // processes for r in range(processes + 1)]


def defaults_of(formula):
    return {k: p.default for k, p in list(inspect.signature(formula).parameters.items())[1:]}


def automatic(formula, classes, images):
    """s and m for so many classes and training images, where an expression leaves them open. The published 64 and 0.5
    suit 10,000 people and more; 200 people ended at 6.8 % EER with them, at 3.6 % with these (README). s: four times
    sqrt 2 ln(C - 1), the least that works by AdaCos, up to 64: 30 for 200, 51 for 8,631. m of the angular margins: 0.3
    below 10,000. With fewer than five images a person, which are soon learned by heart, both are at most half of
    that: 3,318 people with 2.1 images ended at 18.1 % with s = 46, m = 0.3 and at 15.7 % with s = 20, m = 0.15."""
    few, least = images < 5 * classes, math.sqrt(2) * math.log(max(classes - 1, 3))
    usual = 0.35 if formula is cosface else 0.5 if classes >= 10_000 else 0.3
    return {"s": round(min(64.0, (1.75 if few else 4) * least), 1), "m": 0.15 if few else usual}


LOSSES = {name: functools.partial(Term, formula) for name, formula in FORMULAS.items()}


class Loss(nn.Module):
    """A weighted sum of terms, (weight, Term, text) each: (embeddings (B, D), labels (B,)) -> scalar.
    spec: the expression, aliases expanded. balanced: a term wants several images a person in the batch.
    weight (C, D) and logits(x) -> (B, C), margin-free: those of the first term with class weights, or None; where
    classes are divided, of the classes held here. top(x, k) -> (B, k): the numbers of the k best of all classes.
    project(x): the embedding to use at inference. score(a, b): a learned similarity, or None.
    expected(): the sum at random initialisation, None where no closed form is known."""

    def __init__(self, terms):
        super().__init__()
        self.scales, each, texts = zip(*terms)
        self.spec, self.terms = "+".join(texts), nn.ModuleList(each)
        self.balanced = any(t.loss in BALANCED for t in self.terms)
        self.score = next((t.score for t in self.terms if t.score), None)
        self.projections = [t.project for t in self.terms if t.project]
        if len(self.projections) > 1:
            raise ValueError(f"{self.spec}: two of these losses change the embedding, each its own way; use one")
        self.head = [next((t for t in self.terms if t.weight is not None), None)]       # in a list: not registered
        for t in self.terms:
            t.head = self.head
            if t.loss is regular and not self.head[0]:
                raise ValueError("regular acts on another loss's class weights; write for example ce+regular")

    weight = property(lambda self: self.head[0].weight if self.head[0] else None)

    def wide(self, x):
        return x if x.dtype == torch.float64 else x.float()

    def project(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.projections[0](self.wide(x)) if self.projections else self.wide(x)

    def logits(self, x):
        if not self.head[0]:
            raise ValueError(f"{self.spec} has no class weights, so no logits; use the nearest centroid")
        with torch.autocast(x.device.type, enabled=False):
            return self.head[0].logits(self.wide(x))

    def top(self, x, k):
        head = self.head[0]
        best, number = self.logits(x).topk(min(k, head.held), 1)
        if head.divided:
            pad = (0, k - best.shape[1])                                # a process may hold fewer than k
            best, number = every(F.pad(best, pad, value=-math.inf)), every(F.pad(number + head.first, pad))
            number = number.gather(1, best.topk(k, 1)[1])
        return number

    def expected(self):
        each = [t.expected for t in self.terms]
        return None if None in each else sum(s * e for s, e in zip(self.scales, each))

    def forward(self, x, y):
        with torch.autocast(x.device.type, enabled=False):
            return sum(scale * term(self.wide(x), y) for scale, term in zip(self.scales, self.terms))


def nearest(what, name, known):
    close = difflib.get_close_matches(name, known, 1, 0.4)
    answer = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
    return f"unknown {what} '{name}'; {answer}"


def value_of(key, text, default):
    """The value of key=text, of the default's type. ValueError for one that cannot be meant."""
    kind = float if default is None else type(default)
    words = {"true": True, "1": True, "false": False, "0": False} if kind is bool else CHOICES.get(key)
    try:
        if words:
            return words[text.lower()]
        value = kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{key}={text}: expected {' or '.join(CHOICES.get(key, [kind.__name__]))}") from None
    top = 1 if key in AT_MOST_1 else math.inf
    if not 0 <= value <= top or value == math.inf or value == 0 and key in POSITIVE and default != 0:
        raise ValueError(f"{key}={text}: must be " + ("in 0..1" if top == 1 else "finite and positive"
                                                      if key in POSITIVE else "finite and 0 or more"))
    return value


def written(name, arguments):
    return ":".join(filter(None, [name, ",".join(f"{k}={v}" for k, v in arguments.items())]))


def term_of(part, dim, classes, share, images):
    """(weight, Term, its text) of one part of an expression: [weight*]name[:key=value,key=value]."""
    match = re.fullmatch(r"(?:([0-9.eE+-]+)\*)?([A-Za-z]\w*)(?::(.*))?", part)
    if not match:
        raise ValueError(f"cannot read loss '{part}'; write [weight*]name[:key=value,key=value]")
    scale, name, rest = match.groups("")
    alias = ALIASES.get(name := name.lower())
    name = alias if alias in LOSSES else name
    if name not in LOSSES:
        raise ValueError(f"'{name}' stands for '{alias}'; write that to change its weights or arguments"
                         if alias else nearest("loss", name, [*LOSSES, *ALIASES]))
    defaults, given = defaults_of(FORMULAS[name]), {}
    for pair in filter(None, rest.split(",")):
        key, equals, text = pair.partition("=")
        if not defaults:
            raise ValueError(f"{name}: takes no arguments, not '{pair}'")
        if key not in defaults or not equals:
            raise ValueError(f"{name}: {nearest('argument', key, list(defaults))}")
        if key in given:
            raise ValueError(f"{name}: {key} is given twice")
        given[key] = value_of(key, text, defaults[key])
    try:
        factor, term = float(scale or 1), LOSSES[name](dim, classes, share, images, **given)
    except (ValueError, ArithmeticError):
        raise ValueError(f"{part}: no loss can be made of these numbers") from None
    if not 0 <= factor < math.inf:
        raise ValueError(f"{part}: the weight must be finite and 0 or more")
    return factor, term, f"{scale}*" * bool(scale) + written(name, term.arguments)


def make(spec, dim, classes, share=(0, 1), images=math.inf):
    """The loss module of an expression: term ('+' term)*, or a recipe's name among them. share: (process, processes)
    that class weights are divided among. images: how many there are to train on, for automatic arguments. A mistake is
    a ValueError of one line, with the nearest right name."""
    plus = re.compile(r"(?<![0-9.][eE])\+")                             # not the plus of 1e+3
    parts = [p for s in plus.split("".join(spec.split())) for p in plus.split(ALIASES.get(s.lower(), s))]
    return Loss([term_of(part, dim, classes, share, images) for part in parts])


def table():
    """The text of --loss help: names, default arguments, the first line of each docstring, recipes."""
    usage = {n: written(n, {k: "auto" if v is None else v for k, v in defaults_of(f).items()})
             for n, f in FORMULAS.items()}
    return "\n".join(["losses (a sum: 'ce+0.003*center', arguments: 'arcface:s=32,m=0.3')",
                      *(f"  {usage[n]:<62} {f.__doc__.splitlines()[0]}" for n, f in FORMULAS.items()), "recipes",
                      *(f"  {n:<20} = {e}" for n, e in ALIASES.items()),
                      "facenet wants --dim 128; tse and tpe want --init CKPT --freeze"])
