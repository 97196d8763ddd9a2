#!/usr/bin/env python3
"""Fits the constants of kernels/math.hpp: erf as an odd rational function, exp as a polynomial.

Both are minimax fits in the relative error, found by iteratively reweighted least squares (Lawson's
algorithm, with the denominator of the previous round as the linearisation for the rational one).
Needs NumPy. Prints C++ constants and the error of the fit in exact arithmetic.
"""
import math

import numpy as np


def chebyshev_points(low, high, count=4001):
    return low + (high - low) * (np.cos(np.linspace(0, np.pi, count)) + 1) / 2


def fit_rational(x, f, numerator, denominator, rounds=80):
    """Coefficients of P(x) / Q(x) ~ f with Q(0) = 1, minimising max |P/Q/f - 1|."""
    scale = x.max()
    u = x / scale
    weights, q = np.ones_like(u), np.ones_like(u)
    best = (np.inf, None, None)
    for _ in range(rounds):
        row_weight = np.sqrt(weights) / np.abs(f * q)
        columns = [u**i for i in range(numerator + 1)]
        columns += [-f * u**i for i in range(1, denominator + 1)]
        matrix = np.stack(columns, 1) * row_weight[:, None]
        solution = np.linalg.lstsq(matrix, f * row_weight, rcond=1e-18)[0]
        p_coefficients = solution[: numerator + 1]
        q_coefficients = np.concatenate([[1.0], solution[numerator + 1 :]])
        q = np.polyval(q_coefficients[::-1], u)
        error = np.abs(np.polyval(p_coefficients[::-1], u) / q / f - 1)
        if error.max() < best[0]:
            best = (
                error.max(),
                p_coefficients / scale ** np.arange(numerator + 1),
                q_coefficients / scale ** np.arange(denominator + 1),
            )
        weights = weights * (error + 1e-14)
        weights /= weights.sum()
    return best


def show(name, error, *lists):
    print(f"// {name}: relative error {error:.1e} before rounding")
    for coefficients in lists:
        print("{" + ", ".join(f"{float(c):.9g}f" for c in coefficients) + "}")


def main():
    z = chebyshev_points(1e-3, 3.85)
    erf_over_z = np.array([math.erf(v) for v in z]) / z
    show("erf(z) / z, in z^2, up to |z| = 3.85", *fit_rational(z * z, erf_over_z, 5, 5))

    r = chebyshev_points(-math.log(2) / 2, math.log(2) / 2)
    # (exp(r) - 1 - r) / r^2, so that exp(0) is exactly 1.
    r = r[np.abs(r) > 1e-4]
    tail = (np.expm1(r) - r) / r**2
    scale = np.abs(r).max()
    weights = np.ones_like(r)
    best = (np.inf, None)
    for _ in range(80):
        row_weight = np.sqrt(weights) * r**2 / np.exp(r)
        matrix = np.stack([(r / scale) ** i for i in range(5)], 1) * row_weight[:, None]
        c = np.linalg.lstsq(matrix, tail * row_weight, rcond=1e-18)[0]
        error = np.abs((np.polyval(c[::-1], r / scale) - tail) * r**2 / np.exp(r))
        if error.max() < best[0]:
            best = (error.max(), c / scale ** np.arange(5))
        weights = weights * (error + 1e-14)
        weights /= weights.sum()
    show("(exp(r) - 1 - r) / r^2, up to |r| = log(2) / 2", *best)


if __name__ == "__main__":
    main()
