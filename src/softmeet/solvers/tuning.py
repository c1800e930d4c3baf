"""The constants of ``meet``'s solvers that were chosen by measurement; ``benchmarks/tuning.py`` measures each again.

Comments give head passes a row with bounds and on estimates at half and at double the value, on rows shaped after a
pretrained pair (v = 32,768, two heads of 512 columns; 11.3 and 5.0 as it is) or of the wide family (14.4 and 8.8).
Other constants in this folder bound rounding errors, memory and loops: halved or doubled they change neither.
"""

# Multiplications v D² for one full Hessian up to which it costs less than dense steps: at any tolerance, and at one
# below ``FINE``, where dense steps take many (benchmarks/solver.py). Up to the third, a row that dense steps leave open
# is tried with it: a few seconds a step.
HESSIAN, HESSIAN_WHERE_FINE, HESSIAN_AS_RESCUE = 2**27, 2**32, 2**38
FINE = 1e-5
# A row whose estimated gap is so many tolerances gets no bound from a full Hessian: it would not end there.
FAR = 10.0
# Heavy tokens of a row, whose curvature is exact: at least so many (wide: 16.7 and 10.6, 14.9 and 9.0), and so many for
# a column of all heads (pair: 11.8 and 5.8, 9.1 and 4.6, at the price of twice the rows in every product).
HEAVY, HEAVY_PER_COLUMN, HEAVY_PER_COLUMN_FOR_BOUNDS = 256, 5 / 12, 5 / 6
# From the third step on they double, up to a share of the vocabulary (wide: 16.5 and 8.6, 14.7 and 8.9) and a number
# (pair: 11.7 and 5.0, 11.4 and 5.0).
HEAVY_SHARE, HEAVY_AT_MOST = 1 / 4, 2048
# Tokens drawn for the curvature of the tail, at least (pair: 11.6 and 5.5, 10.3 and 4.8; every new pair of heads pays).
TAIL = 8192
# The share of the residual that conjugate gradients leave of a direction (wide: 14.4 and 8.8, 14.4 and 9.9), and the
# masses that their preconditioner has exactly (wide: 14.4 and 9.6, 14.4 and 8.8).
CONJUGATE_REDUCTION, PRECONDITIONED = 0.1, 96
# The least share of its estimated gap that a row is taken to have left after a step (wide: 14.4 and 6.5, 14.4 and 10.5)
# and the fall of f, in estimated gaps, beyond which the estimate is not believed (14.4 and 11.9, 14.4 and 7.7). On
# peaked rows, where estimates fail, smaller shares and larger falls end rows early.
LEFT, FORETOLD = 0.25, 2.0
# By how much a bound exceeds the estimated gap before the first one tells (pair: 12.4, 10.7; wide: 15.4, 14.0), and
# the most that is believed of one (pair: 11.2, 11.3; wide: 14.4, 14.7).
LOOSE, LOOSEST = 1.5, 8.0
# Tokens that take up what a direction leaves of the moments: at least so many (wide: 14.7, 14.6), and so many for a
# column of the head (pair: 12.2, 10.0, at the price of larger systems).
REPAIRED, REPAIRED_PER_COLUMN = 512, 4
