"""Settings of the C libraries under PyTorch that make training on a CPU faster. Import before torch.

- OpenMP's threads spin after each parallel region, on the cores that the scan's own threads need. Put to
  sleep at once they wake too late for the next region, most of all in a virtual machine, and a step has
  hundreds. So they spin for a fraction of a millisecond and then sleep.
- glibc gives every large tensor's memory back to Linux, which fills it with zeros for the next one. Kept,
  it is used again as it is.

What the user has set in the environment stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # GNU's, which PyTorch brings along on Linux
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"         # for any other

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_THRESHOLD, 2**30)
        glibc.mallopt(M_TRIM_THRESHOLD, -1)  # never: to give gigabytes back takes longer than many a step
