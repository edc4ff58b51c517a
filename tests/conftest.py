"""Settings of all tests."""

import os

# Workers of pytest-xdist share the cores. If each started a pool of threads for all cores, in torch
# or BLAS, the pools would wait for each other, and tests would take three times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Arrays that inherit NumPy's docstrings, which are no examples of ours.
collect_ignore = ["cupy_double"]
