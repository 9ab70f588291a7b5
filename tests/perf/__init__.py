"""Benchmarks: apart from the tests, and run by hand."""

import os

# Read by OpenMP when torch is imported. As in a worker (headrace_core.worker.threads): a thread of torch's that spins
# behind an operation keeps a core from the kernels that come next, for milliseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# And its weights lie on huge pages (headrace_core.process.use_huge_pages).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
