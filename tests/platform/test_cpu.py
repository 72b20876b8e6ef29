import importlib

import pytest
import torch

from mtrain.platform.cpu import eager_fusions, hidden_module, install_cpu_stand_ins

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the stand-ins act only where there is no GPU"
)


@pytest.fixture(autouse=True)
def stand_ins():
    install_cpu_stand_ins()


def test_tensors_asked_for_on_cuda_are_on_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.ones(1).cuda().device.type == "cpu"
    assert torch.ones(1).to("cuda").device.type == "cpu"
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"


def test_a_default_device_still_holds():
    """transformers builds models under the meta device; its rotary frequencies were garbage."""
    with torch.device("meta"):
        assert torch.arange(3).device.type == "meta"
        assert torch.empty(3).device.type == "meta"


def test_optimizers_see_the_type_names_that_they_compare():
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_random_state_of_cuda_is_that_of_the_cpu():
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)


def test_fused_functions_stay_plain_while_megatron_is_imported():
    def function(x):
        return x

    compile_function = torch.compile
    with eager_fusions():
        assert torch.compile(function) is function
        assert torch.compile(dynamic=True)(function) is function
    assert torch.compile is compile_function


def test_a_hidden_library_is_not_found_for_a_while(tmp_path, monkeypatch):
    (tmp_path / "some_library.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden_module("some_library"), pytest.raises(ImportError):
        importlib.import_module("some_library")
    library = importlib.import_module("some_library")
    with hidden_module("some_library"):
        assert importlib.import_module("some_library") is library


def test_token_dispatch_gets_split_sizes_that_gloo_accepts():
    from mtrain.platform.device import prepare_megatron

    prepare_megatron()
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moved = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2, 3]), as_numpy=True)
    assert moved.tolist() == [2, 3]
    assert not torch.is_tensor(moved)
    assert moe_utils.te_general_gemm is None
