"""The finer probes' arithmetic: fixed numbers that the specification and the kernels share. None is a setting."""

# The probes multiply integers. Largest magnitudes of a query's, of a pooled key's difference from the mean of its block, with
# room for that mean's rounding, and of the mean, with room for its two bytes' rounding.
QUERY_LEVELS, KEY_LEVELS, CENTRE_LEVELS = 127, 126, 32000
# The smallest step that integers are multiplied with; numbers below half of it count as zero. Its reciprocal fits a float32.
SMALLEST_STEP = 2.0**-100
# Of every so many neighbouring pooled keys of a block the largest logit counts in a query's normaliser. What the others add is
# reckoned from the block's mean, which saves three exponentials of four: with all of them the probe took half as long again at
# 256K tokens, and with one for each block alone a trained model needed half as many blocks again for the same answers
# (benchmarks/results/integers-2026-11-29-h200.txt).
NORMALISER_GROUP = 4
# What "blend" multiplies the geometric mean of a block's shares with; the larger of that and the largest share is compared with
# alpha. The largest is for what one query alone needs, the mean for what all look at a little.
MEAN_WEIGHT = 16.0
