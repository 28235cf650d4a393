"""What does the risk look like on a line or a plane through the parameters?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sharpness import _saving, _tensors
from sharpness._arguments import ensure, of_a_risk, positive, require, whole
from sharpness._results import Cost, Reading, Result, Status, counted
from sharpness._run import Deadline, Run
from sharpness.measures.directions import (
    Network,
    between,
    parameters_of,
    principal,
    random_directions,
    unexplained,
)
from sharpness.measures.eigenvalues import eigenpairs
from sharpness.risk.empirical import EmpiricalRisk

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharpness.report.figures import Figure

Directions = Literal["random", "eigenvectors", "between", "trajectory"]
_MARGIN = 0.25  # around the networks that a picture shows, of their extent
_SAME = 1e-4  # relative: f at theta in a file of points and now


@dataclass(frozen=True, kw_only=True)
class LossPlane(Result):
    """f and accuracy at theta + x u + y v on a grid; on a line without y and v.

    Near theta f is about `value` + slopes.z + z.curvatures z / 2, z = (x, y).
    """

    axes: tuple[tuple[float, ...], ...]  # the x, and the y
    values: np.ndarray  # (x, y) or (x,) f; NaN where it is, or was not evaluated
    accuracies: np.ndarray | None  # same shape, in [0, 1]; None without classes
    num_evaluated: int  # points, with those from a file
    names: tuple[str, ...]  # of the directions
    directions: Tensor = field(repr=False, compare=False)  # (1 or 2, n): u, v
    value: float  # f(theta)
    slopes: tuple[float, ...]  # along u, v; NaN where not asked for
    curvatures: tuple[tuple[float, ...], ...]  # u.Hu, u.Hv; v.Hu, v.Hv
    networks: tuple[tuple[float, ...], ...]  # coordinates of those that were given
    unexplained: tuple[float, ...]  # how far off the plane each is, of its way from theta

    @property
    def model(self) -> np.ndarray:
        """The quadratic model of f on the grid, in the shape of `values`."""
        z = np.stack(np.meshgrid(*self.axes, indexing="ij"), -1)
        bent = np.einsum("...i,ij,...j", z, np.array(self.curvatures), z)
        found: np.ndarray = self.value + z @ np.array(self.slopes) + bent / 2
        return found

    @property
    def deviation(self) -> float:
        """How far f is from its model, over how far from f(theta): both mean squares.

        0 where f is quadratic; over the points where it is finite.
        """
        seen = np.isfinite(self.values)
        with np.errstate(all="ignore"):
            off, way = self.values[seen] - self.model[seen], self.values[seen] - self.value
            ratio = np.mean(off**2) / np.mean(way**2) if len(way) else math.nan
            return float(np.sqrt(ratio))

    def _rows(self) -> Iterable[Reading]:
        """Lowest f, curvatures along the directions, deviation from the model."""
        lost = int((~np.isfinite(self.values)).sum()) - self.values.size
        lost += self.num_evaluated
        evidence = f"of {counted(self.num_evaluated, 'point')}"
        evidence += f", {lost} without a number" if lost else ""
        if np.isfinite(self.values).any():
            at = np.unravel_index(np.nanargmin(self.values), self.values.shape)
            place = ", ".join(f"{c[i]:.3g}" for c, i in zip(self.axes, at, strict=True))
            evidence += f", at ({place}); at the centre {self.value:.4g}"
            yield Reading(name="lowest f", value=float(self.values[at]), evidence=evidence)
        else:
            yield Reading(name="lowest f", value=math.nan, evidence=evidence)
        if not self.settings["quadratic"]:
            return
        for i, name in enumerate(self.names):
            yield Reading(
                name=f"curvature, {name}",
                value=self.curvatures[i][i],
                evidence="by a product",
                axis="curvature, loss / coordinate²",
            )
        yield Reading(
            name="deviation",
            value=self.deviation,
            evidence="of f from its quadratic model, over that from f(theta)",
        )
        if self.settings["directions"] == "trajectory":
            yield Reading(
                name="unexplained",
                value=max(self.unexplained),
                evidence="farthest network: distance from the plane over that from theta",
            )

    def drawn(self) -> tuple[Sequence[str], list[tuple[float, ...]]]:
        """Coordinates, loss, quadratic model and accuracy of each point, a row each."""
        columns = [(f"{name} ({self.settings['unit']})") for name in self.names]
        shown = {"loss": self.values}
        if self.settings["quadratic"]:
            shown["quadratic model"] = self.model
        if self.accuracies is not None:
            shown["accuracy"] = self.accuracies
        places = product(*self.axes)
        numbers = zip(*(each.ravel().tolist() for each in shown.values()), strict=True)
        rows = [(*at, *found) for at, found in zip(places, numbers, strict=True)]
        return [*columns, *shown], rows

    def plot(self, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
        """Loss, its quadratic model (dashed) and accuracy; a matplotlib figure.

        Where f is no number there is hatching. Circles are networks that were given.

        Args:
            path: where the PNG goes, if anywhere.
            ax: where to draw instead of on a new figure.
        """
        from sharpness.report import landscapes

        draw = landscapes.line_plot if self.values.ndim == 1 else landscapes.plane_plot
        return draw(
            self.axes,
            self.values,
            self.accuracies,
            path,
            ax=ax,
            names=[f"{name} ({self.settings['unit']})" for name in self.names],
            model=self.model if self.settings["quadratic"] else None,
            marks=self.networks,
            unexplained=self.unexplained,
            title=_title(self),
        )


@of_a_risk
def loss_plane(
    risk: EmpiricalRisk,
    directions: Directions | Tensor = "random",
    networks: Sequence[Network] = (),
    *,
    dims: int | None = None,
    num_points: int = 21,
    extent: float | None = None,
    quadratic: bool = True,
    seed: int = 0,
    at_once: int | None = None,
    points_file: str | Path | None = None,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> LossPlane:
    r"""Risk and accuracy on a line or a plane through theta, with the quadratic model.

    $$f(\theta + x u + y v)$$

    A plane is two directions of n: what is not in it is not seen, and random directions
    show a mean of the spectrum, not its top. Buffers stay those of the model: with
    `batchnorm="running"` BatchNorm's statistics fit theta alone; a risk with `"batch"` or
    `"recalibrated"` has those of each point.

    Args:
        risk: f and theta, the centre.
        directions: `"random"`: normal draws, each filter as long as that of theta
            (biases and normalisation layers stay; `measures.directions` has the rules);
            `"eigenvectors"`: of the largest eigenvalues of the Hessian; `"between"`: to
            one of `networks`, or the plane through two; `"trajectory"`: principal
            directions of `networks`, such as the checkpoints of a training, as seen from
            theta; or a tensor (n,) or (1 or 2, n) of your own. All but random and own
            ones are orthonormal.
        networks: networks, state dicts or flat parameters (n,), shown on the plane.
        dims: 1 for a line, 2 for a plane; None: a plane, or between one network a line.
        num_points: along each direction, >= 2; an odd number has theta on the grid.
        extent: largest coordinate. By default 1; for eigenvectors where the model
            has risen by 1 + f; with networks a box around them.
        quadratic: take the quadratic model of f at theta, too.
        seed: of the random directions, or of the eigenvectors' start.
        at_once: points a pass; None goes by `risk.points_at_once()`.
        points_file: a CSV file that finished points are written to, x, y, loss and
            accuracy; where it has some of the same plane these are not evaluated again.
        max_seconds: no pass begins later than this.
        progress: show a bar; by default on a terminal.

    Returns:
        `LossPlane`, after an interrupt or the end of the time with NaN where nothing
        was evaluated. Points at which f is not finite stay as they are.

    Raises:
        ValueError: an argument outside its range, networks that span no plane, a file of
            another plane.

    Cost: a forward pass a point, for loss and accuracy together, one more for f(theta),
    and with `quadratic` a gradient and `dims` products; `"eigenvectors"` those of
    `eigenpairs`. With `batchnorm="recalibrated"` the model holds the statistics fixed.

    References:
        Li et al. (2018), arXiv:1712.09913 (filter normalisation, trajectories); Garipov
        et al. (2018), arXiv:1802.10026 (the plane through three networks).
    """
    num_points = whole("num_points", num_points, 2, "21 are usual.")
    extent = None if extent is None else positive("extent", extent)
    at_once = None if at_once is None else whole("at_once", at_once, 1)
    if dims is None:
        dims = 1 if isinstance(directions, str) and len(networks) == 1 else 2
    made = _Made(risk, directions, networks, whole("dims", dims, 1), seed, progress)
    axes = made.grid(num_points, extent)
    grid = _Grid(risk, made.directions, axes, points_file)
    several, deadline = at_once or risk.points_at_once(), Deadline(max_seconds)
    model = _Model(risk, made.directions)
    first = Run("products", max_seconds=deadline.left, progress=False, ranks=risk.ranks)
    with first:
        if quadratic:
            model.take(first)
    run = Run(
        "points",
        max_seconds=deadline.left,
        total=grid.num_left,
        progress=progress,
        ranks=risk.ranks,
    )
    with run:
        if first.status is Status.INTERRUPTED:
            run.stop(first.status)
        for block in grid.blocks(several):
            run.step(len(block))
            grid.evaluate(block, several)
    return LossPlane(
        axes=axes,
        values=grid.values,
        accuracies=grid.accuracies if risk.is_classification else None,
        num_evaluated=len(grid.done),
        names=made.names,
        directions=made.directions.cpu(),
        value=grid.value,
        slopes=model.slopes,
        curvatures=model.curvatures,
        networks=made.places,
        unexplained=made.unexplained,
        status=Status.worst(first.status, run.status, finite=math.isfinite(grid.value)),
        cost=made.cost
        + Cost(
            forwards=1 + run.num_steps,
            gradients=min(1, first.num_steps),
            products=max(0, first.num_steps - 1),
            seconds=first.seconds + run.seconds,
        ),
        settings={
            "directions": made.kind,
            "unit": made.unit,
            "num_points": num_points,
            "extent": extent,
            "quadratic": quadratic,
            "seed": seed,
            "at_once": several,
        },
    )


# -- inside ----------------------------------------------------------------------------


class _Made:
    """Directions (k, n), what they are called, and where the networks lie."""

    def __init__(
        self,
        risk: EmpiricalRisk,
        directions: Directions | Tensor,
        networks: Sequence[Network],
        dims: int,
        seed: int,
        progress: bool | None,
    ) -> None:
        self._risk, self.cost, self._rise = risk, Cost(), 1.0
        self.places: tuple[tuple[float, ...], ...] = ()
        self.unexplained: tuple[float, ...] = ()
        self.unit = "filter norms"
        require(dims <= 2, "dims", "be 1 or 2", dims)
        if isinstance(directions, Tensor):
            self.kind, self.unit = "own", "times its length"
            self.directions = self._own(directions)
            dims = len(self.directions)
            self.names = ("u", "v")[:dims]
            return
        self.kind = str(directions)
        kinds = get_args(Directions)
        contract = f"be a tensor or one of {', '.join(kinds)}"
        require(directions in kinds, "directions", contract, directions)
        self._check(networks, dims)
        if directions == "random":
            self.directions = random_directions(risk, dims, seed)
            self.names = ("random 1", "random 2")[:dims]
            return
        self.unit = "distance"
        if directions == "eigenvectors":
            self._of_eigenvectors(dims, seed, progress)
        else:
            self._of_networks(networks, dims)

    def grid(self, num: int, extent: float | None) -> tuple[tuple[float, ...], ...]:
        """The coordinates along each direction."""
        ends = [(-self._rise, self._rise)] * len(self.directions)
        if self.places:
            ends = _box(np.array([*self.places, [0.0] * len(self.directions)]))
        if extent is not None:
            ends = [(-extent, extent)] * len(self.directions)
        return tuple(_between(low, high, num) for low, high in ends)

    def _check(self, networks: Sequence[Network], dims: int) -> None:
        num, asked = len(networks), self.kind in ("between", "trajectory")
        contract = "be given for 'between' and 'trajectory' alone"
        ensure(asked or not num, "networks", contract, f"{num} with {self.kind!r}")
        if asked:
            least = {"between": "1 for a line or 2 for a plane", "trajectory": "at least 2"}
            fits = num == dims if self.kind == "between" else num >= 2
            contract = f"hold {least[self.kind]}"
            ensure(fits, "networks", contract, f"{num} with dims={dims}")

    def _own(self, given: Tensor) -> Tensor:
        rows = given.detach().reshape(1, -1) if given.ndim == 1 else given.detach()
        sound = rows.ndim == 2 and len(rows) in (1, 2) and rows.shape[1] == self._risk.n
        contract = f"have shape (n,) or (1 or 2, n) with n={self._risk.n}"
        ensure(sound, "directions", contract, str(tuple(given.shape)))
        return rows.to(self._risk.theta)

    def _of_eigenvectors(self, dims: int, seed: int, progress: bool | None) -> None:
        pairs = eigenpairs(self._risk, dims, seed=seed, progress=progress)
        got = f"{len(pairs.eigenvectors)} of them ({pairs.status})"
        ensure(len(pairs.eigenvectors) == dims, "directions", f"have {dims}", got)
        self.directions = pairs.eigenvectors.to(self._risk.theta)
        self.names = ("eigenvector 1", "eigenvector 2")[:dims]
        self.cost = pairs.cost
        top, value = abs(pairs.lambda_max), self._risk.value()
        rise = math.sqrt(2 * (1 + abs(value)) / top) if top > 0 else math.nan
        self._rise = rise if math.isfinite(rise) else 1.0

    def _of_networks(self, networks: Sequence[Network], dims: int) -> None:
        risk = self._risk
        flat = [parameters_of(risk, network, "networks") for network in networks]
        offsets = torch.stack(flat) - risk.theta
        if self.kind == "between":
            self.directions = between(offsets)
            self.names = ("towards network 1", "across, towards network 2")[:dims]
        else:
            self.directions = principal(offsets, dims)
            self.names = ("principal 1", "principal 2")[:dims]
        places, share = unexplained(offsets, self.directions)
        self.places, self.unexplained = tuple(map(tuple, places)), tuple(share)


def _box(points: np.ndarray) -> list[tuple[float, float]]:
    """Around points (m, k), with a margin; not flatter than a fifth of its width."""
    low, high = points.min(0), points.max(0)
    least = (high - low).max() / 5
    pad = np.maximum(_MARGIN * (high - low), (least - (high - low)) / 2)
    return list(zip((low - pad).tolist(), (high + pad).tolist(), strict=True))


def _between(low: float, high: float, num: int) -> tuple[float, ...]:
    """Equally spaced, both ends exactly, and 0 where it should be one."""
    step = (high - low) / (num - 1)
    found = [low + i * step for i in range(num - 1)] + [high]
    return tuple(0.0 if abs(x) < 1e-9 * step else x for x in found)


class _Grid:
    """The points of a grid, in memory and in a file, and what is still to be done."""

    def __init__(
        self,
        risk: EmpiricalRisk,
        directions: Tensor,
        axes: Sequence[Sequence[float]],
        path: str | Path | None,
    ) -> None:
        self._risk, self._directions = risk, directions
        self.values = np.full([len(axis) for axis in axes], math.nan)
        self.accuracies = self.values.copy()
        self._all = list(zip(product(*axes), np.ndindex(self.values.shape), strict=True))
        self.value = risk.value()
        self.done: dict[tuple[float, ...], tuple[float, float]] = {}
        self._file = None
        if path is not None:
            plane = _tensors.mixed(0, risk.theta, directions, *_bits(axes))
            self._file = _PointsFile(Path(path), plane, self.value, len(axes))
            self.done = self._file.read()
            for point, index in self._all:
                if point in self.done:
                    self.values[index], self.accuracies[index] = self.done[point]

    @property
    def num_left(self) -> int:
        """Points that are not done."""
        return self.values.size - len(self.done)

    def blocks(self, size: int) -> Iterator[list[tuple[Any, Any]]]:
        """The points that are not done, so many at a time."""
        left = [each for each in self._all if each[0] not in self.done]
        for start in range(0, len(left), size):
            yield left[start : start + size]

    def evaluate(self, block: Sequence[tuple[Any, Any]], at_once: int) -> None:
        """Take f and accuracy at these, and keep them."""
        risk = self._risk
        places = torch.tensor([point for point, _ in block], dtype=torch.float64)
        thetas = risk.theta + places.to(risk.theta) @ self._directions
        found = zip(*(part.tolist() for part in risk.values(thetas, at_once)), strict=True)
        new = dict(zip((point for point, _ in block), found, strict=True))
        for point, index in block:
            self.values[index], self.accuracies[index] = new[point]
        self.done |= new
        if self._file is not None:
            self._file.add(new)


class _PointsFile:
    """Finished points as CSV under a line that says of which plane."""

    def __init__(self, path: Path, plane: int, value: float, dims: int) -> None:
        self._path, self._plane, self._value = path, f"{plane:08x}", value
        self._columns = [*("x", "y")[:dims], "loss", "accuracy"]

    def read(self) -> dict[tuple[float, ...], tuple[float, float]]:
        """What is there; a torn last line is taken off.

        Raises:
            ValueError: the file is of another plane, or of none.
        """
        text = self._path.read_text() if self._path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        if not lines:
            lines = [f"# loss_plane {self._plane} f {self._value!r}", self._names]
        words = lines[0].split()
        sound = lines[0].startswith("# loss_plane ") and len(words) == 5
        sound = sound and words[2] == self._plane and self._names in lines[1:2]
        sound = sound and _close(float(words[4]), self._value)
        contract, got = "hold points of this plane", f"others in {self._path}"
        ensure(sound, "points_file", contract, got, "Name a new file, or delete it.")
        _saving.write(self._path, "".join(f"{line}\n" for line in lines).encode())
        rows = [tuple(map(float, line.split(","))) for line in lines[2:]]
        return {row[:-2]: row[-2:] for row in rows}  # type: ignore[misc]

    def add(self, points: dict[tuple[float, ...], tuple[float, float]]) -> None:
        """Append some."""
        rows = (",".join(map(repr, (*at, *found))) for at, found in points.items())
        with self._path.open("a") as file:
            file.write("".join(f"{row}\n" for row in rows))

    @property
    def _names(self) -> str:
        return ",".join(self._columns)


def _bits(axes: Sequence[Sequence[float]]) -> list[Tensor]:
    return [torch.tensor(axis, dtype=torch.float64) for axis in axes]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_SAME) or (math.isnan(a) and math.isnan(b))


class _Model:
    """Slope and curvature of f at theta along directions."""

    def __init__(self, risk: EmpiricalRisk, directions: Tensor) -> None:
        self._risk, self._directions = risk, directions
        unknown = (math.nan,) * len(directions)
        self.slopes: tuple[float, ...] = unknown
        self.curvatures: tuple[tuple[float, ...], ...] = (unknown,) * len(directions)

    def take(self, run: Run) -> None:
        """From a gradient and a product for each direction."""
        rows, dot = list(self._directions), _tensors.dot64
        run.step()
        gradient = self._risk.gradient(freeze_batchnorm=True)
        self.slopes = tuple(float(dot(row, gradient)) for row in rows)
        products = []
        for row in rows:
            run.step()
            products.append(self._risk.hvp(row))
        square = np.array([[float(dot(u, hv)) for hv in products] for u in rows])
        self.curvatures = tuple(map(tuple, ((square + square.T) / 2).tolist()))


def _title(plane: LossPlane) -> str:
    if not plane.settings["quadratic"] or not math.isfinite(plane.deviation):
        return ""
    return (
        f"dashed: quadratic model at the centre, off by {plane.deviation:.2g} of the rise"
    )
