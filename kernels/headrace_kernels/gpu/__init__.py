"""The Triton side of the kernel families, one file each: launcher, table of configurations, kernels.

Shapes, meaning and errors are those of the family's entry in `headrace_kernels`, which checks its arguments and then
calls the launcher here. Entries import this package where they call it, so that Triton is loaded only where it runs;
nothing here imports an entry.
"""
