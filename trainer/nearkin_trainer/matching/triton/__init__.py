"""The Triton backend of `location_maxima`, for CUDA devices (optional install: `nearkin-trainer[triton]`).

backend  the differentiable operation and what it asks of the device
kernels  three kernels: lengths of locations, maxima, and the gradient of one side
"""
