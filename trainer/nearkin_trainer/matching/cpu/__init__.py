"""The CPU backend of `location_maxima`.

backend       the differentiable operation, its threads and its memory
kernels       the loops, compiled by Numba at first use and cached on disk
instructions  the vector instructions those loops need, written as LLVM
"""
