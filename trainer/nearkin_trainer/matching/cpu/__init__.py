"""The CPU backend of `location_maxima`.

backend       the differentiable operation, its threads and its memory
layout        how maps lie in memory for the loops
maxima        the forward loops, compiled by Numba at first use and cached on disk
gradients     the backward loops
instructions  the vector instructions of forward, written as LLVM
exchanges     those of backward
memory        large results in memory that serves again
"""
