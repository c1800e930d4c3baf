"""The constants of ``meet``'s solvers that were chosen by measurement.

``benchmarks/solver.py tuning`` measures those of dense steps again. Comments give its passes over all heads per row at
half and at double the value of a constant: "14.5 and 10.6, 15.0 and 9.0" is 14.5 with proved bounds on the gap and 10.6
with estimates of it at half, 15.0 and 9.0 at double; "9.9, 8.5" has bounds alone. "pair": rows shaped after a
pretrained pair (v = 32,768, two heads of 512 columns), which take 8.3 and 5.0 at the values below. "wide": the wide
family, 14.5 and 8.8. Other constants in this folder bound rounding errors, memory and loops.
"""

# The full Hessian is used up to ``HESSIAN`` multiplications v D² per row and step; for a tolerance below ``FINE``, at
# which dense steps take many, up to ``HESSIAN_WHERE_FINE``. Up to ``HESSIAN_AS_RESCUE`` rows that dense steps leave
# NOT_CONVERGED are solved again with it, at seconds per step. No command varies them.
HESSIAN, HESSIAN_WHERE_FINE, HESSIAN_AS_RESCUE = 2**27, 2**32, 2**38
FINE = 1e-5
# A row whose estimated gap is more than this multiple of the tolerance is not bounded by the full Hessian: no bound
# could end it yet.
FAR = 10.0
# Heavy tokens of a row, whose curvature is exact: their least number (wide: 14.5 and 10.6, 15.0 and 9.0), and their
# number per column of all heads: in decoding (pair: 8.3 and 5.8, 8.3 and 4.6, at the price of twice the rows in every
# product), and where a bound is to end the row (pair: 10.0, 7.4; wide: 14.4, 15.0; at the same price).
HEAVY, HEAVY_PER_COLUMN, HEAVY_PER_COLUMN_FOR_BOUNDS = 256, 5 / 12, 5 / 6
# From the third step on heavy tokens double with each step, up to a share of the vocabulary (wide: 16.5 and 8.6, 14.8
# and 8.9) and an absolute number (pair: 9.1 and 5.0, 8.4 and 5.0).
HEAVY_SHARE, HEAVY_AT_MOST = 1 / 4, 2048
# The fewest tokens drawn for the tail's curvature (pair: 8.7 and 5.5, 7.9 and 4.8; every new set of heads pays).
TAIL = 8192
# The share of the residual at which conjugate gradients for a direction stop (pair: 7.9 and 4.8, 8.3 and 5.3; wide:
# 14.5 and 8.8, 14.7 and 9.9), and how many masses their preconditioner has exactly (wide: 14.5 and 9.6, 14.5 and 8.8).
CONJUGATE_REDUCTION, PRECONDITIONED = 0.1, 96
# The estimated gap after a step is at least ``LEFT`` times that before (wide: 14.5 and 6.5, 14.5 and 10.5); if f falls
# by more than ``FORETOLD`` times the estimate, the fall takes its place (wide: 14.5 and 11.9, 14.5 and 7.7). On peaked
# rows estimates are poor, and a smaller ``LEFT`` or a larger ``FORETOLD`` ends rows on less.
LEFT, FORETOLD = 0.25, 2.0
# The ratio of a bound on the gap to its estimate that is assumed before a first bound is known (pair: 9.9, 8.5; wide:
# 15.5, 13.8), and the largest ratio that is taken from a known bound (pair: 8.3, 8.3; wide: 14.5, 15.0).
LOOSE, LOOSEST = 1.5, 8.0
# The heaviest tokens of a member that make up the moments' difference that a direction leaves (certificate.py): their
# least number (wide: 14.4, 14.2), and their number per column of the head (pair: 9.1, 7.2, with larger systems).
REPAIRED, REPAIRED_PER_COLUMN = 512, 4
