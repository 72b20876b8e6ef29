"""Who sorts tokens for their exchange."""

import pytest

from mtrain.config.moe import MoEConfig, resolve_permute_fusion


@pytest.mark.parametrize(
    ("given", "backend", "expected"),
    [
        (None, "te", True),
        (None, "torch", False),
        (True, "torch", True),
        (True, "te", True),
        (False, "te", False),
        (False, "torch", False),
    ],
)
def test_transformer_engine_sorts_where_it_computes_unless_told(given, backend, expected) -> None:
    moe = MoEConfig(moe_permute_fusion=given, moe_z_loss_coeff=0.5)
    found = resolve_permute_fusion(moe, backend=backend)
    assert found.moe_permute_fusion is expected
    assert found.moe_z_loss_coeff == 0.5
