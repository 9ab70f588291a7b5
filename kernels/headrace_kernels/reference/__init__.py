"""The plain-torch side of the kernel families, one file each: what a CPU runs where nothing is compiled for it.

A family's function is its specification, or a formulation of it that is faster on a CPU. Shapes, meaning and errors are
those of the family's entry in `headrace_kernels`, which checks its arguments and then finds the function here through
`dispatch`. What is made of other families calls their entries, so that each part runs on the best backend it has.
"""
