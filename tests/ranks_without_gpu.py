"""Imported by the fork server before all else: the processes it forks are CPU ranks on any machine.

The one thing to know: it must come before torch, which counts GPUs once, and a process that has
asked a GPU anything cannot be forked into one that uses it. Transformer Engine asks while it is
imported, and Megatron-Core does other things where it finds it.
"""

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""
# An import of what is None there fails as one of what is missing.
sys.modules["transformer_engine"] = None  # type: ignore[assignment]
