"""Fast computations, each beside a plain version that a test holds it to, in value and gradient.

A model calls one function and never asks which of the two runs. The function decides. It runs its kernel in

    cpu.py        on a CPU, except while torch.compile traces, or if autocast leaves its tensors with different dtypes;
                  `linear` without autocast and gradients only, if few rows meet a large matrix
    depth.py      on a CPU, except while torch.compile traces, under autocast and in bf16;
                  `weighted_sum` everywhere except while torch.compile traces
    rope.py       everywhere except while torch.compile traces
    attention.py  on a CPU and on CUDA, if it has a fused kernel for the shapes; `attend_with_depth` for whole windows
                  only
    bf16.py       in `bf16.products` on a CPU, except while torch.compile traces; the others compute in fp32 there

`linear` has no plain version here, since that is F.linear.
"""
