"""What ranks load: in which precision, and adapters on top."""

from pathlib import Path

import pytest
import torch

from mtrain.cli.adapter_source import open_adapter
from mtrain.cli.loading import load_adapter, load_model
from mtrain.cli.model_source import open_source
from mtrain.config import ModelConfig, ParallelConfig, SftConfig, TunerConfig
from tests.lora.peft_folders import load_with_peft, logits_of, save_with_peft
from tests.megatron import SINGLE
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), "qwen3")


def logits(state, folder: Path, adapters: tuple[str, ...] | None):
    """Logits of the model with an adapter, or without one, and what is trained."""
    config = SftConfig(
        model=ModelConfig(model=str(folder)),
        tuner=TunerConfig(tuner_type="lora", adapters=adapters or ()),
    )
    source = open_source(config.model, ParallelConfig(), world_size=1, download=False)
    chunks = load_model(
        config, source, state, backend="torch", training=config.training, dtype=torch.float32
    )
    if adapters is not None:
        adapter = open_adapter(config, source)
        options = {"dtype": torch.float32, "dropout": 0.5, "seed": 0}
        load_adapter(chunks, adapter, source, state, **options)
    (model,) = chunks
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        output = model.eval()(ids, torch.arange(12).expand(2, -1))
    return output, trained


def test_a_fresh_adapter_leaves_the_logits_as_they_are(folder) -> None:
    """T44: bit for bit."""
    [(base, everything)] = run_ranks(SINGLE, logits, folder, None)
    [(ours, trained)] = run_ranks(SINGLE, logits, folder, ())
    assert torch.equal(ours, base)
    assert len(everything) > len(trained) > 0
    assert all(name.endswith((".adapter.lora_a", ".adapter.lora_b")) for name in trained)


def test_an_adapter_of_peft_does_what_it_does_there(folder, tmp_path) -> None:
    save_with_peft(folder, tmp_path, r=2, lora_alpha=3, target_modules=["k_proj", "up_proj"])
    [(ours, _)] = run_ranks(SINGLE, logits, folder, (str(tmp_path),))
    expected = logits_of(load_with_peft(folder, tmp_path))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    [(base, _)] = run_ranks(SINGLE, logits, folder, None)
    assert (expected - base).abs().max() > 1e-2, "the adapter must matter in this test"
