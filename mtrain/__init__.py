"""mtrain fine-tunes Hugging Face checkpoints with Megatron-Core.

Importing this package imports neither torch nor megatron: the command line must answer at once.
"""

__version__ = "0.1.0"
