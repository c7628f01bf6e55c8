"""Triton kernels for everything on the GPU but the linears.

    launch.py       options of a launch; how dependent launches overlap
    norms.py        RMSNorm with the residual add before it and the quantisation after it
    rope.py         RMSNorm of heads, RoPE and the write of K and V
    attention.py    generated positions: the context split at fixed places, partial results merged
    prompt.py       prompt positions: tiles of rows over tiles of keys
    swiglu.py       silu(gate) * up with the quantisation after it
    tokens.py       the most likely token, acceptance, and where the next rows sit

Row independence: every reduction has a fixed shape and order, given by constants of the model
alone. Results are rounded where the reference rounds them.
"""
