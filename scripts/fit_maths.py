#!/usr/bin/env python3
"""Fits the constants of kernels/math.hpp: GELU's normal distribution as an odd rational function, exp
as a polynomial.

Both are weighted minimax fits, found by iteratively reweighted least squares (Lawson's algorithm, with
the denominator of the previous round as the linearisation for the rational one). Needs NumPy. Prints
C++ constants, lowest power first, and the error of the fit in exact arithmetic.
"""
import math

import numpy as np


def chebyshev_points(low, high, count=4001):
    return low + (high - low) * (np.cos(np.linspace(0, np.pi, count)) + 1) / 2


def fit_rational(x, f, importance, numerator, denominator, rounds=300):
    """Coefficients of P(x) / Q(x) ~ f with Q(0) = 1, minimising max |P/Q - f| * importance."""
    scale = np.abs(x).max()
    u = x / scale
    weights, q = np.ones_like(u), np.ones_like(u)
    best = (np.inf, None, None)
    for _ in range(rounds):
        row_weight = np.sqrt(weights) * importance / np.abs(q)
        columns = [u**i for i in range(numerator + 1)]
        columns += [-f * u**i for i in range(1, denominator + 1)]
        matrix = np.stack(columns, 1) * row_weight[:, None]
        solution = np.linalg.lstsq(matrix, f * row_weight, rcond=1e-18)[0]
        p = solution[: numerator + 1]
        q_coefficients = np.concatenate([[1.0], solution[numerator + 1 :]])
        q = np.polyval(q_coefficients[::-1], u)
        error = importance * np.abs(np.polyval(p[::-1], u) / q - f)
        if error.max() < best[0]:
            best = (
                error.max(),
                p / scale ** np.arange(numerator + 1),
                q_coefficients / scale ** np.arange(denominator + 1),
            )
        weights = weights * (error + 1e-16)
        weights /= weights.sum()
    return best


def show(name, error, *lists):
    print(f"// {name}: error {error:.1e} before rounding")
    for coefficients in lists:
        print("{" + ", ".join(f"{float(c):.9g}f" for c in coefficients) + "}")


def main():
    x = chebyshev_points(1e-3, 5.2)
    distribution = np.array([0.5 * math.erf(v / math.sqrt(2)) for v in x]) / x
    # An error of the quotient is multiplied by x twice on its way into GELU.
    importance = x * np.maximum(x, 0.3) / np.maximum(x, 1)
    show("(Phi(x) - 1/2) / x, in x^2, up to |x| = 5.2",
         *fit_rational(x * x, distribution, importance, 4, 5))

    r = chebyshev_points(-math.log(2) / 2, math.log(2) / 2)
    # (exp(r) - 1 - r) / r^2, so that exp(0) is exactly 1.
    r = r[np.abs(r) > 1e-4]
    tail = (np.expm1(r) - r) / r**2
    error, polynomial, _ = fit_rational(r, tail, r**2 / np.exp(r), 4, 0)
    show("(exp(r) - 1 - r) / r^2, up to |r| = log(2) / 2", error, polynomial)


if __name__ == "__main__":
    main()
