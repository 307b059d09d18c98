"""Where the compiled step finds what it is told: indices into its tables.

`dims` has whole numbers, `numbers` float32 ones, `blocks` a row per block (in `packing.Packed`), `plan` a row
per matrix (products.py).
"""

from __future__ import annotations

(
    WIDTH,
    STRIDE,
    LAYERS,
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    HEAD_STRIDE,
    MLP_STRIDE,
    QKV_STRIDE,
    LOGIT_STRIDE,
    NORM,
    ACTIVATION,
    QK_NORM,
    PAIRS,
    ANGLE_ROWS,
    PAGES,
    BF16_CACHE,
    POSITIONS,
    PARALLEL,
    DIMS,
) = range(20)
"""Indices into `dims`. Strides are widths rounded up to 32, heads apart. PAIRS: pairs of features of a head
that are rotated. ANGLE_ROWS: positions whose angles are there. POSITIONS is the place of the position table
in `vectors`, -1 without one. PARALLEL: whether attention and MLP read the same residual stream."""
EPS, EMBED_SCALE, SCORE_SCALE, SCORE_CAP, BRANCH_SCALE, LOGIT_CAP, NUMBERS = range(7)
"""Indices into `numbers`. A cap of 0 means none. BRANCH_SCALE: factor on the inputs of the two matrices that
write to the residual stream."""
RMS, LAYER = range(2)
NO_QK_NORM, HEAD_QK_NORM, WHOLE_QK_NORM = range(3)
"""Queries and keys are normalised not at all, per head, over all heads together."""
SWIGLU, GELU_TANH, RELU2, GEGLU, GELU = range(5)
QKV, OUTPUT, UP, DOWN, MATRICES = range(5)
"""Matrices of a layer in the plan; then follow the output matrix and the token table (once more, where they
are one)."""
(
    ATTENTION_NORM,
    MLP_NORM,
    QUERY_NORM,
    KEY_NORM,
    ATTENTION_OUT_NORM,
    MLP_OUT_NORM,
    WINDOW,
    ANGLES,
    BLOCK_COLUMNS,
) = range(9)
"""Columns of `blocks`: places of norm vectors in `vectors` (-1: none; the last row has the final norm in the
first column), how many tokens a token attends to (0: all), which table of rotary angles (-1: none)."""
ALONE = 4
"""Up to so many rows every thread normalises and rounds all of them for itself."""
