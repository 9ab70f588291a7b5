"""The Triton side of the kernel families, one file each: launcher, table of configurations, kernels.

Shapes, meaning and errors are those of the family's entry in `headrace_kernels`, which checks its arguments and then
finds the launcher here through `dispatch`, so that Triton is loaded only where it runs. What no kernel here takes, a
launcher hands to `reference`, whose parts are families again.
"""
