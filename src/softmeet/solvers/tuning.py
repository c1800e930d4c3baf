"""The constants of ``meet``'s solvers that were chosen by measurement; ``benchmarks/tuning.py`` measures each again.

Other constants in this folder bound rounding errors, memory or loops, and no speed depends on them.
"""

# Multiplications v D² for one full Hessian up to which it costs less than dense steps: at any tolerance, and at one
# below ``FINE``, where dense steps take many. Up to the third, a row that dense steps leave open is tried with it.
HESSIAN, HESSIAN_WHERE_FINE, HESSIAN_AS_RESCUE = 2**27, 2**32, 2**38
FINE = 1e-5
# Heavy tokens of a row, whose curvature is exact: at least so many, and so many for a column of all heads. From the
# third step on they double, up to a share of the vocabulary and a number.
HEAVY, HEAVY_PER_COLUMN, HEAVY_SHARE, HEAVY_AT_MOST = 256, 5 / 12, 1 / 4, 2048
# Tokens drawn for the curvature of the tail: at least so many, and so many for a column; what is added to its diagonal.
TAIL, TAIL_PER_COLUMN, TAIL_RIDGE = 8192, 4, 1e-3
# Steps of conjugate gradients for a direction, at most; the share of the residual that they leave; the masses that
# their preconditioner has exactly.
CONJUGATE_STEPS, CONJUGATE_REDUCTION, PRECONDITIONED = 64, 0.1, 96
# Newton's method on a step's coefficients ends where it promises less than this share of what was gained before.
ENOUGH = 0.02
# The least share of its estimated gap that a row is taken to have left after a step; the fall of f, in estimated gaps,
# beyond which the estimate is not believed; steps without progress after which a row gives up.
LEFT, FORETOLD, PATIENCE = 0.25, 2.0, 2
# By how much a bound exceeds the estimated gap before the first one tells, and the most that is believed of one.
LOOSE, LOOSEST = 1.5, 8.0
# The tolerance, per unit of price, that vectors in single precision can tell, and the share of it that they aim at.
SINGLE, KEPT = 5e-5, 0.98
# Tokens that take up what a direction leaves of the moments: at least so many, and so many for a column of the head.
REPAIRED, REPAIRED_PER_COLUMN = 512, 2
