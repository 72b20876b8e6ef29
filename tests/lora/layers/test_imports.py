"""Whichever module of a program comes first, Megatron-Core is imported with its CPU stand-ins."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["layers.factors", "merge"])
def test_adapters_may_be_imported_first(module):
    code = (
        f"import mtrain.lora.{module}, mtrain.model.build, torch\n"
        "from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu\n"
        "weighted_swiglu(torch.ones(2, 4), torch.ones(2, 1))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
