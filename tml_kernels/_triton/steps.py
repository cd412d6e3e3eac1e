"""Columns of a matrix that `weight_tile.accumulate` takes at a time, for those who launch it."""

# By the kernels' name for a format. A width that is no multiple needs masks.
STEP = {
    "plain": 64, "fp8": 128, "fp8_channel": 128, "int4": 256, "int4_f16": 256, "mxfp4": 256,
    "nvfp4": 256,
}  # fmt: skip
