"""Lets transformers import its tokenizers alone, in a process that only prepares data.

The one thing to know: transformers imports torch wherever it finds it, which takes longer than
everything else that tokenising needs. Only a process that never computes may hide it: the one that
starts ranks, and workers.
"""

import logging
import sys

__all__ = ["hide_torch"]


def hide_torch() -> None:
    """Makes torch look as if it were not installed, unless this process has imported it already."""
    if "torch" in sys.modules:
        return
    # Python's own way to say that a module is not there: `import torch` is an ImportError.
    sys.modules["torch"] = None
    logging.getLogger("transformers").addFilter(_is_about_something_else)


def _is_about_something_else(record: logging.LogRecord) -> bool:
    """False for the advice of transformers to install torch."""
    return not record.getMessage().startswith("PyTorch was not found")
