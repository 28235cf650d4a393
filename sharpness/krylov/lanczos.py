"""Lanczos tridiagonalisation of a symmetric matrix, and what its Ritz values prove."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sharpness._ranks import Vectors
from sharpness._results import NonFiniteProductError
from sharpness.krylov.basis import Basis

Which = Literal["LA", "SA", "LM", "BE"]
_COLUMNS = 1 << 15  # of vectors that are turned at once
WHICH: tuple[str, ...] = get_args(Which)
Score = Callable[[np.ndarray], np.ndarray]
_ARRAYS = ("projected", "coupling", "defects", "alphas", "betas", "dropped", "numbers")


@dataclass(frozen=True)
class Tridiagonal:
    """T of a run from its start up to the first restart of any kind."""

    alphas: np.ndarray  # (m,)
    betas: np.ndarray  # (m,): m-1 off-diagonal entries, then the remainder's norm

    @property
    def invariant(self) -> bool:
        """Whether the Krylov space of the start is exhausted."""
        return bool(len(self.betas)) and self.betas[-1] == 0.0

    def shortened(self, m: int) -> Tridiagonal:
        """That of the first m steps."""
        return Tridiagonal(self.alphas[:m], self.betas[:m])

    def nodes_and_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Gauss quadrature for the start's spectral measure: Ritz values, weights."""
        nodes, vectors = _linalg().eigh_tridiagonal(self.alphas, self.betas[:-1])
        return nodes, vectors[0] ** 2


@dataclass(frozen=True)
class LanczosState:
    """An orthonormal basis Q (m, n) with A Q^T = Q^T T + q b^T, q orthogonal to Q.

    Without a thick restart T is tridiagonal and b = (0, ..., 0, beta).

    `noise` is the Frobenius norm of what `Q A Q^T` has beside T. It would be 0 in exact
    arithmetic with a symmetric A, so it measures both rounding and the asymmetry of the
    products, and shifts eigenvalues by at most itself.

    Where Q is held in a narrow type, every row is a rounded one and the relation misses, in
    row i, a vector of norm `defects[i]` at most: what rounding moved the next direction by,
    times its beta, and what a restart lost.
    """

    projected: np.ndarray  # T, (m, m)
    coupling: np.ndarray  # b, (m,)
    defects: np.ndarray  # (m,) zeros where Q has the products' type
    noise: float
    num_products: int
    num_random: int  # random starts after the first, each after an invariant space
    newest: int  # rows from here on came after the last restart of any kind
    first: Tridiagonal
    dropped: np.ndarray  # Ritz values that thick restarts have dropped
    log_betas: float  # sum of the logarithms of all remainders' norms
    store: Basis = field(repr=False, compare=False)

    @property
    def m(self) -> int:
        """Size of the basis."""
        return len(self.coupling)

    @property
    def basis(self) -> Tensor:
        """Q, (m, n); overwritten by a thick restart."""
        return self.store.rows(self.m)

    @property
    def invariant(self) -> bool:
        """Whether the space is invariant: every Ritz value is an eigenvalue."""
        return not self.coupling.any()


class Lanczos:
    """A run: ask for `direction()`, multiply it, `absorb` the product; then again.

    Each vector is freed from the ones it is known to overlap with (two, in the plain
    recurrence), then from all rows of the basis, then again where that took away more
    than half of it. One pass alone leaves an overlap of 8e-4 in float32 after 80 steps,
    this leaves 5e-7, at two readings of the basis a step.

    Where the space is invariant, a random vector orthogonal to it carries on; that is
    also how further copies of a repeated eigenvalue are found.

    `state` is always whole: an interrupt anywhere leaves the last one that was.

    Args:
        v0: start (n,), not necessarily normalised; its type and device are the basis'.
        generator: of random starts after an invariant space.
        num_first: rows that the first block of the basis holds.
        basis_size: most rows; the caller restarts before they are exceeded.
        vectors: how the processes share them; then `v0` and every vector here is this
            one's part. None: this process has them whole.
        dtype: of the rows that are held; by default that of `v0`.

    Cost: one product and 4 m n operations a step; memory m n.
    """

    def __init__(
        self,
        v0: Tensor,
        generator: torch.Generator,
        num_first: int = 16,
        basis_size: int | None = None,
        vectors: Vectors | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._vectors = vectors or Vectors(v0.numel())
        self.n, self._length = self._vectors.n, v0.numel()
        self._eps = torch.finfo(v0.dtype).eps
        self._generator = generator
        self._next: Tensor | None = self._normalised(v0)
        self._scale = 0.0
        self._tridiagonal = True  # no restart of any kind so far
        none = np.empty(0)
        basis = Basis(v0, num_first, basis_size or self.n, self._vectors, dtype)
        basis.rounded(self._next)
        first = Tridiagonal(none, none)
        self.state = LanczosState(
            np.empty((0, 0)), none, none, 0.0, 0, 0, 0, first, none, 0.0, basis
        )

    @property
    def is_whole(self) -> bool:
        """Whether the basis spans the whole of R^n: there is no further direction."""
        return self.state.m == self.n

    def direction(self) -> Tensor:
        """The unit vector (n,) whose product comes next."""
        if self._next is None:
            like = self.state.store[0]
            draw = self._normalised(self._vectors.normal(like, self._generator))
            store, m = self.state.store, self.state.m
            for _ in range(2):
                store.subtract(draw, store.overlaps(draw, m))
            self._next = self._normalised(draw)
            self.state.store.rounded(self._next)
        return self._next

    def absorb(self, product: Tensor, owned: bool = False) -> None:
        """Take A times `direction()` in; `owned`: its memory may become the next one's.

        Raises:
            NonFiniteProductError: it is not finite; the state stays as it was.
        """
        s, q, m = self.state, self.direction(), self.state.m
        w = product if owned else product.clone()
        del product
        alpha = s.store.put(m, q, w)
        # Straight after a restart it overlaps with all of Q, else with one row beside q.
        straight = s.newest == m
        also = s.coupling if straight else s.coupling[-1:]
        known = torch.from_numpy(np.append(also, alpha)).to(w)
        overlaps, before = s.store.subtract_last(w, m + 1, known)
        if not np.isfinite(alpha + before):
            raise NonFiniteProductError("the product is not finite")
        beta = s.store.subtract(w, overlaps)
        drift = np.asarray(overlaps.cpu().numpy())
        if beta < before / 2:
            more = s.store.overlaps(w, m + 1)
            beta, drift = s.store.subtract(w, more), drift + more.cpu().numpy()
        alpha += float(drift[m])
        self._scale = max(self._scale, abs(alpha) + beta)
        # A remainder of the size of rounding is no direction.
        if not beta > 10 * self._eps * self._scale or m + 1 == self.n:
            beta = 0.0
        outside = (s.noise**2 + 2 * float(drift[:m] @ drift[:m])) ** 0.5
        coupling = np.zeros(m + 1)
        coupling[m] = beta
        self._next = w.div_(beta) if beta else None
        lost = beta * s.store.rounded(self._next) if self._next is not None else 0.0
        self.state = replace(
            s,
            projected=_bordered(s.projected, s.coupling, alpha),
            coupling=coupling,
            defects=np.append(s.defects, lost),
            noise=max(outside, self._eps * self._scale),
            num_products=s.num_products + 1,
            num_random=s.num_random + (m > 0 and not s.coupling.any()),
            newest=m if m and not s.coupling.any() else s.newest,
            first=self._longer_first(alpha, beta),
            log_betas=s.log_betas + (math.log(beta) if beta else -math.inf),
        )

    def frozen(self) -> dict[str, Tensor]:
        """All that `thawed` needs to go on from here: small things, and two of length n.

        `basis` (m, n) and `next` (n,), or (0,) after an invariant space, in this process's
        part.
        """
        s = self.state
        numbers = [s.noise, s.num_products, s.num_random, s.newest, s.log_betas]
        numbers += [self._scale, self._tridiagonal, self._next is not None]
        arrays = {
            "projected": s.projected,
            "coupling": s.coupling,
            "defects": s.defects,
            "alphas": s.first.alphas,
            "betas": s.first.betas,
            "dropped": s.dropped,
            "numbers": np.array(numbers, dtype=float),
        }
        return {
            **{name: torch.from_numpy(np.array(array)) for name, array in arrays.items()},
            "basis": s.store.held(s.m),
            "next": s.store[0].new_empty(0) if self._next is None else self._next,
            "generator": self._generator.get_state(),
        }

    def fits(self, saved: Mapping[str, Tensor]) -> bool:
        """Whether `thawed` can go on from it: nothing lacks, all is finite and fits."""
        if not saved.keys() >= {*_ARRAYS, "basis", "next", "generator"}:
            return False
        basis, numbers = saved["basis"], saved["numbers"]
        m, j, n = basis.shape[0] if basis.ndim else 0, saved["alphas"].numel(), self._length
        num_next = n if numbers.numel() == 8 and bool(numbers[7]) else 0
        shapes = {"projected": (m, m), "coupling": (m,), "defects": (m,), "basis": (m, n)}
        shapes |= {"alphas": (j,), "betas": (j,), "dropped": (saved["dropped"].numel(),)}
        shapes |= {"numbers": (8,), "next": (num_next,)}
        if any(saved[name].shape != shape for name, shape in shapes.items()):
            return False
        if any(saved[name].dtype != torch.float64 for name in _ARRAYS):
            return False
        small = [saved[name] for name in shapes if name not in ("basis", "numbers")]
        finite = all(bool(part.isfinite().all()) for part in [*small, *basis])
        noise, products, random, newest, logs, scale = numbers[:6].tolist()
        sound = math.isfinite(noise + products + random + scale) and logs < math.inf
        counts = products >= m > 0 and random >= 0 and 0 <= newest <= m
        return finite and sound and counts and _is_state(saved["generator"])

    def thawed(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `frozen` gave, on a run like that one."""
        arrays = {name: tensor.numpy() for name, tensor in saved.items() if name in _ARRAYS}
        noise, products, random, newest, logs, *of_run = arrays["numbers"].tolist()
        store = self.state.store
        for i, row in enumerate(saved["basis"]):
            store[i] = row
        self._generator.set_state(saved["generator"])
        self._scale, self._tridiagonal, has_next = of_run[0], bool(of_run[1]), of_run[2]
        self._next = saved["next"].to(store[0]) if has_next else None
        self.state = LanczosState(
            arrays["projected"],
            arrays["coupling"],
            arrays["defects"],
            noise,
            int(products),
            int(random),
            int(newest),
            Tridiagonal(arrays["alphas"], arrays["betas"]),
            arrays["dropped"],
            logs,
            store,
        )

    def restart(self, kept: np.ndarray) -> None:
        """Shrink the basis to Ritz vectors (thick restart, Wu and Simon 2000).

        The next direction stays, so nothing that was learnt of them is lost.

        Args:
            kept: which Ritz values, as positions in ascending order.
        """
        s = self.state
        theta, vectors = _eigh(s)
        with _uninterrupted():
            lost = s.store.combine(vectors[:, kept].T)
            self._tridiagonal = False
            self.state = replace(
                s,
                projected=np.diag(theta[kept]),
                coupling=s.coupling @ vectors[:, kept],
                defects=_together(s.defects, vectors[:, kept])
                + (self._scale + np.abs(theta[kept])) * lost,
                newest=len(kept),
                dropped=np.append(s.dropped, np.delete(theta, kept)),
            )

    def ended(self, coefficients: np.ndarray) -> Tensor:
        """Combinations (l, n) of the basis in the products' type; the basis is given up.

        They are made orthonormal, by the nearest such vectors: narrow rows are orthonormal
        up to their rounding.
        """
        found = self.state.store.combined(coefficients)
        self.state.store.clear()
        self._next = None
        rows = list(found)
        gram = [[self._vectors.dot(a, b) for b in rows] for a in rows]
        sizes, turns = np.linalg.eigh(np.array(gram))
        mixing = torch.from_numpy(turns / np.sqrt(sizes) @ turns.T).to(found)
        for part in found.split(_COLUMNS, dim=1):
            part.copy_(mixing @ part)
        return found

    def _normalised(self, v: Tensor) -> Tensor:
        return v / v.new_tensor(self._vectors.norm(v))

    def _longer_first(self, alpha: float, beta: float) -> Tridiagonal:
        first = self.state.first
        if not self._tridiagonal or first.invariant:
            return first
        return Tridiagonal(np.append(first.alphas, alpha), np.append(first.betas, beta))


def _is_state(saved: Tensor) -> bool:
    """Whether a generator can be set to it."""
    try:
        torch.Generator().set_state(saved)
    except (RuntimeError, TypeError):
        return False
    return True


def wanted(theta: np.ndarray, k: int, which: str) -> np.ndarray:
    """Positions, among ascending Ritz values, of the k asked for; largest first."""
    m = len(theta)
    if which == "LM":
        chosen = set(_best(np.abs(theta), k).tolist())
    else:
        at_top = _at_top(k, which)
        chosen = {*range(max(0, m - at_top), m), *range(min(m, k - at_top))}
    return np.array(sorted(chosen, reverse=True), dtype=int)


def thick(theta: np.ndarray, k: int, which: str) -> np.ndarray:
    """Positions of the Ritz values that a thick restart keeps: the k, and then some."""
    return wanted(theta, k + (len(theta) - k) // 2, which)


def thresholds(values: np.ndarray, allowed: np.ndarray, which: str) -> tuple[float, float]:
    """Beyond which no value is among those asked for: above the first, below the second.

    Args:
        values: (k,) those asked for, largest first.
        allowed: (k,) what each may be off by.
        which: as in `wanted`.

    Returns:
        Infinite where that end was not asked for.
    """
    if which == "LM":
        least = int(np.abs(values).argmin())
        reach = float(abs(values[least]) + allowed[least])
        return reach, -reach
    at_top = _at_top(len(values), which)
    low, high = values + allowed, values - allowed
    above = float(low[at_top - 1]) if at_top else np.inf
    return above, float(high[at_top]) if at_top < len(values) else -np.inf


def _ends(k: int, which: str) -> list[tuple[Score, int]]:
    """What is large at each end asked for, and how many are wanted there."""
    if which == "LM":
        return [(np.abs, k)]
    at_top = _at_top(k, which)
    ends: list[tuple[Score, int]] = [(np.positive, at_top), (np.negative, k - at_top)]
    return [end for end in ends if end[1]]


def _at_top(k: int, which: str) -> int:
    return {"LA": k, "SA": 0, "BE": -(-k // 2)}[which]


def _best(scores: np.ndarray, num: int) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:num]


@dataclass(frozen=True)
class RitzPairs:
    """All Ritz values of a state, ascending, with what is known of each."""

    values: np.ndarray  # (m,)
    residuals: np.ndarray  # (m,) ||A v - value v||
    couplings: np.ndarray  # (m,) the part of it along the next direction: all, in one type
    bounds: np.ndarray  # (m,) distance to the nearest eigenvalue of A is at most this
    coefficients: np.ndarray  # (m, m) eigenvectors in the basis, one a row

    def at(self, positions: np.ndarray) -> RitzPairs:
        """Some of them, in that order."""
        return RitzPairs(
            self.values[positions],
            self.residuals[positions],
            self.couplings[positions],
            self.bounds[positions],
            self.coefficients[positions],
        )


def ritz_pairs(state: LanczosState) -> RitzPairs:
    """The Ritz pairs of a state, with error bounds.

    A residual r proves that an eigenvalue lies within r of the Ritz value (not that it
    is the i-th). Where every other Ritz interval is more than 2 r away, the Ritz value
    is accurate to r^2 / gap (Kato-Temple; Parlett, The Symmetric Eigenvalue Problem,
    section 11.7), as far as the gap seen in the Krylov space is the gap of A.
    """
    theta, vectors = _eigh(state)
    couplings = np.abs(state.coupling @ vectors)
    residuals = np.hypot(couplings, _together(state.defects, vectors))
    bounds = state.noise + _tightened(theta, residuals)
    return RitzPairs(theta, residuals, couplings, bounds, vectors.T)


def _together(defects: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Norms of combinations (m, l) of what the rows miss.

    Rounding errors of different rows are all but orthogonal: a root of a sum of squares.
    That is a guess, for when to stop; what is reported is measured by products.
    """
    return np.asarray(np.sqrt(np.square(vectors).T @ np.square(defects)))


def _tightened(theta: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    if len(theta) == 1:
        return residuals  # nothing is known of a gap
    distance = np.abs(theta[:, None] - theta[None, :]) - residuals[None, :]
    np.fill_diagonal(distance, np.inf)
    # A bulk at 0 is the rule and may be unseen: no gap reaches beyond it.
    gap = np.minimum(distance.min(axis=1), np.abs(theta))
    resolved = gap > 2 * residuals
    tightened = residuals.copy()
    np.divide(residuals**2, gap, out=tightened, where=resolved)
    return tightened


def meets(state: LanczosState, k: int, tol: float, which: str = "LA") -> bool:
    """Whether the k Ritz values at the end asked for are accurate to `tol`.

    Every bound is at most what is `allowed`, and the interval of the next Ritz value
    stays outside: while it reaches further, an eigenvalue may still emerge there.
    """
    if state.m == state.store.n or state.m < k:
        return state.m >= k
    # An invariant space says nothing of what lies outside it, further copies of its
    # eigenvalues included: the next random start must bring nothing beyond the k-th.
    if state.invariant and state.num_random == 0:
        return False
    pairs = ritz_pairs(state)
    return all(_end_meets(state, pairs, *end, tol) for end in _ends(k, which))


def _end_meets(
    state: LanczosState, pairs: RitzPairs, score: Score, k: int, tol: float
) -> bool:
    scores = score(pairs.values)
    order = _best(scores, state.m)
    best, rest = order[:k], order[k:]
    if state.num_random:
        newest = np.linalg.eigvalsh(state.projected[state.newest :, state.newest :])
        if score(newest).max() > scores[best[-1]] + state.noise:
            return False
    errors = allowed(pairs.values[best], state.noise, tol)
    if (pairs.bounds[best] > errors).any():
        return False
    reach = scores[rest[0]] + pairs.residuals[rest[0]] if len(rest) else -np.inf
    return bool(reach <= scores[best[-1]] + errors[-1])


def allowed(values: np.ndarray, noise: float, tol: float) -> np.ndarray:
    """What each value may be off by: `tol` times itself, or two noises if it is a zero.

    A zero is what two noises hide: that of the products, which every bound contains, and
    a residual of the same size.
    """
    sizes = np.abs(values)
    return np.where(sizes > 2 * noise, tol * sizes, 2 * noise)


def christoffel(x: float, first: Tridiagonal) -> float:
    """Sum of p_j(x)^2, j = 0..m, by the three-term recurrence; inf on overflow."""
    total, previous, current, before = 1.0, 0.0, 1.0, 0.0
    for alpha, beta in zip(first.alphas, first.betas, strict=True):
        previous, current = current, ((x - alpha) * current - before * previous) / beta
        before = beta
        total += current * current
        if total > 1e100:
            return np.inf
    return float(total)


def _eigh(state: LanczosState) -> tuple[np.ndarray, np.ndarray]:
    t = state.projected
    diagonal, off = np.diag(t), np.diag(t, 1)
    if np.count_nonzero(t) == np.count_nonzero(diagonal) + 2 * np.count_nonzero(off):
        values, vectors = _linalg().eigh_tridiagonal(diagonal, off)
    else:
        values, vectors = _linalg().eigh(t)
    return values, vectors


def _linalg() -> Any:
    """SciPy's, loaded when it is needed: half a second that an import need not take."""
    import scipy.linalg

    return scipy.linalg


def _bordered(t: np.ndarray, coupling: np.ndarray, alpha: float) -> np.ndarray:
    return np.block([[t, coupling[:, None]], [coupling[None, :], np.array([[alpha]])]])


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is None:
        yield  # no interrupt of Python's can arrive
        return
    handler, caught = signal.getsignal(signal.SIGINT), False

    def catch(*_: object) -> None:
        nonlocal caught
        caught = True

    signal.signal(signal.SIGINT, catch)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        signal.raise_signal(signal.SIGINT)
