"""L-BFGS with a strong Wolfe line search, for many independent problems at once. Pure maths.

torch's own optimiser takes one problem, or several as one whose steps they share. Here every problem has
its own step length, history and end; one evaluation serves all that are not done. Nocedal and Wright,
Numerical Optimization (2006), algorithms 7.4, 3.5 and 3.6.

Shapes: G problems, N unknowns each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Points (g, N) of the problems numbered (g,) -> values (g,) and gradients (g, N).
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_ARMIJO, _CURVATURE = 1e-4, 0.9
_LONGEST_SEARCH = 20
_GROW = 10.0


@dataclass(frozen=True)
class Minimum:
    """Result: points (G, N), values (G,), and the number of evaluations."""

    points: Tensor
    values: Tensor
    evaluations: int


@dataclass
class _History:
    """Last pairs of steps and gradient changes, and each problem's scale of the initial inverse Hessian."""

    most: int
    pairs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # s, y, 1 / s.y or 0
    scale: Tensor | None = None

    def add(self, s: Tensor, y: Tensor) -> None:
        """Add a pair (G, N); ignore it in problems where its curvature is not positive."""
        sy, yy = _dot(s, y), _dot(y, y)
        good = sy > 1e-10 * yy
        if self.scale is None:
            self.scale = torch.ones_like(sy)
        self.scale = torch.where(good, sy / yy.clamp_min(1e-30), self.scale)
        rho = torch.where(good, 1 / sy.clamp_min(1e-30), torch.zeros_like(sy))
        self.pairs.append((s, y, rho))
        del self.pairs[: -self.most]

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the direction -H g (G, N) by the two-loop recursion."""
        q, alphas = gradient.clone(), []
        for s, y, rho in reversed(self.pairs):
            alpha = rho * _dot(s, q)
            q.addcmul_(alpha[:, None], y, value=-1.0)
            alphas.append(alpha)
        if self.scale is not None:
            q *= self.scale[:, None]
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            q.addcmul_((alpha - rho * _dot(y, q))[:, None], s)
        return q.neg_()


@dataclass(frozen=True)
class _Point:
    """Point along a search direction: step t, value f and slope (G,), gradient g (G, N)."""

    t: Tensor
    f: Tensor
    slope: Tensor
    g: Tensor

    def replaced(self, where: Tensor, other: _Point) -> _Point:
        """Replace it by `other` in the problems of the mask `where`."""
        return _Point(
            torch.where(where, other.t, self.t),
            torch.where(where, other.f, self.f),
            torch.where(where, other.slope, self.slope),
            torch.where(where[:, None], other.g, self.g),
        )


def minimise(
    evaluate: Evaluate,
    start: Tensor,
    *,
    iterations: int,
    history: int = 8,
    tolerance: float = 1e-7,
) -> Minimum:
    """Minimise G problems from `start` (G, N).

    A problem is done when a step gains less than `tolerance` of its value, its gradient vanishes, or it is
    no longer finite; then it stays at its last point.
    """
    x = start.clone()
    everyone = torch.arange(len(x), device=x.device)
    f, g = evaluate(x, everyone)
    count, done = 1, ~torch.isfinite(f)
    past = _History(history)
    for iteration in range(iterations):
        done = done | (g.abs().amax(1) <= 1e-12)
        if bool(done.all()):
            break
        d = past.direction(g)
        slope = _dot(d, g)
        # Not a descent direction: restart from the gradient.
        uphill = (slope >= 0) | ~torch.isfinite(slope)
        d = torch.where(uphill[:, None], -g, d)
        slope = _dot(d, g)
        first = (1 / g.abs().sum(1).clamp_min(1e-30)).clamp_max(1.0)
        step = torch.where(uphill, first, torch.ones_like(f)) if iteration else first
        here = _Point(torch.zeros_like(f), f, slope, g)
        found, used = _search(evaluate, x, here, d, step, ~done)
        count += used
        moved = found.t[:, None] * d
        gain = f - found.f
        past.add(moved, found.g - g)
        x, f, g = x + moved, found.f, found.g
        done = done | (gain <= tolerance * f.abs().clamp_min(1e-12))
    return Minimum(x, f, count)


def _search(
    evaluate: Evaluate, x: Tensor, here: _Point, d: Tensor, t: Tensor, active: Tensor
) -> tuple[_Point, int]:
    """Search a step along d (G, N) for every active problem; those that find none stay where they are.

    In every problem `low` is the best point so far next to the minimum, and `high` the other end of the
    bracket once there is one ("zooming").
    """
    f0, slope0 = here.f, here.slope
    best, low, high = here, here, here
    zooming = torch.zeros_like(active)
    count, searching, t = 0, active.clone(), t.clone()
    for _ in range(_LONGEST_SEARCH):
        numbers = searching.nonzero()[:, 0]
        if not len(numbers):
            break
        f, g = torch.full_like(f0, torch.inf), torch.zeros_like(d)
        f[numbers], g[numbers] = evaluate((x + t[:, None] * d)[numbers], numbers)
        count += 1
        slope = _dot(g, d)
        f = torch.where(torch.isfinite(f) & torch.isfinite(slope), f, torch.inf)
        new = _Point(t, f, slope, g)
        high_f = (f > f0 + _ARMIJO * t * slope0) | ((f >= low.f) & (low.t > 0))
        best = best.replaced(searching & ~high_f & (f < best.f), new)
        searching = searching & (high_f | (slope.abs() > -_CURVATURE * slope0))
        # Where the slope changed sign, the minimum is between this point and the last low one.
        turned = ~high_f & torch.where(zooming, slope * (high.t - low.t) >= 0, slope >= 0)
        high = high.replaced(searching & turned, low).replaced(searching & high_f, new)
        low = low.replaced(searching & ~high_f, new)
        zooming = zooming | (searching & (high_f | turned))
        t = torch.where(zooming, _between(low, high), t * _GROW)
        narrow = (high.t - low.t).abs() * d.abs().amax(1) < 1e-9
        searching = searching & ~(zooming & narrow)
    return best, count


def _between(low: _Point, high: _Point) -> Tensor:
    """Return the minimum of the cubic through two points with their slopes, kept off both ends."""
    a, b = low.t, high.t
    d1 = low.slope + high.slope - 3 * (low.f - high.f) / (a - b)
    square = d1 * d1 - low.slope * high.slope
    d2 = square.clamp_min(0).sqrt() * (b - a).sign()
    cubic = b - (b - a) * ((high.slope + d2 - d1) / (high.slope - low.slope + 2 * d2))
    good = torch.isfinite(cubic) & (square >= 0)
    middle = (a + b) / 2
    left, right = torch.minimum(a, b), torch.maximum(a, b)
    room = 0.1 * (right - left)
    return torch.where(good, torch.maximum(torch.minimum(cubic, right - room), left + room), middle)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)
