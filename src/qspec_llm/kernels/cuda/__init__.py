"""The GPU backend: CUDA C++ for the linears and the hot small kernels, Triton for the rest.

    backend.py     what `kernels.get_backend("cuda")` returns; refuses where it cannot run
    device.py      which GPU, and why not
    compile.py     CUDA C++ to running kernels, with a cache on disk
    layout.py      how stored tensors are arranged, and back
    linear.py      linears: checks, and which kernel computes them
    direct.py      generated rows (direct.cu); form.py: how a view reads a tensor
    split.py, wide.py   several of them, and many, on Hopper (split.cu, wide.cu)
    activations.py, tables.py, prompt.py   quantisation; embedding rows; prompt rows
    check.py       every kernel of a model against the reference, when it is loaded
    matrices.py    the linears' kernels, or the reference's arithmetic for what they do not take
    rows.py        RMSNorm and SwiGLU (rows.cu)
    attention.py   RoPE, the write of K and V, and attention of generated rows (attention.cu)
    ops.py         the operations of the contract, one by one
    step.py        a whole forward pass with fused kernels, equal to the operations bit for bit
    persistent.py  all layers of a row in one kernel, on Hopper (persistent.cu), likewise

NVIDIA GPUs from Ampere on. Importing this package, or anything in it but `backend`, needs no GPU.
"""
