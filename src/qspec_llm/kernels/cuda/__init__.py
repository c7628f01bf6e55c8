"""The GPU backend: CUDA C++ for the linears, Triton for the rest, on NVIDIA GPUs from Ampere on.

    backend.py   what `kernels.get_backend("cuda")` returns; refuses where it cannot run
    device.py    which GPU, and why not
    matrices.py  packed tensors: arranged for the kernels, or kept as stored where no kernel fits
    ops.py       the operations of the contract, one by one
    step.py      a whole forward pass with fused kernels, equal to the operations bit for bit

Importing this package, or anything in it but `backend`, needs no GPU.
"""
