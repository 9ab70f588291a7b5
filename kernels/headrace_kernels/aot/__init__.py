"""Compile every kernel ahead of time, for NVIDIA's sm_90 and AMD's gfx942, on a machine that has neither.

`python -m headrace_kernels.aot` records what the families' `aot_cases()` launch, compiles each launch exactly as a
launch on the GPU would, and reads from the machine code how many registers and how much shared memory it takes,
whether it spills, and whether it multiplies on matrix units without one product waiting for the next. It fails when
one of that went wrong, with the installed Triton or with another one that it is given.
"""
