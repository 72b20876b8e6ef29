"""Adapters that PEFT wrote change the weights as PEFT does; those that do not fit are refused."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrain.lora.peft_format import read_adapter
from mtrain.lora.plan import Adapter
from tests.lora.peft_folders import (
    changes_of,
    hf_model,
    make_plan,
    random_values,
    save_with_peft,
    table_of,
    uniform_plan,
    weights_of,
    write_adapter,
)
from tests.tiny import make_checkpoint

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DENSE = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 8, "layers.0.*up_proj": 2},
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 3, r"layers.\d+.self_attn.k_proj": 7},
    },
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "alpha_pattern": {"q_proj": 1}},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "saved projections": {
        "target_modules": ["o_proj"],
        "modules_to_save": ["gate_proj", "up_proj"],
    },
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
}
EXPERTS = {
    "converted": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "all": {"target_modules": "all-linear", "use_rslora": True},
    "gate_up": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "down": {"target_modules": ["o_proj"], "target_parameters": ["down_proj"]},
    "both": {
        "target_modules": ["v_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.0.mlp.experts.gate_up_proj": 3},
    },
    "router": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.gate.weight"],
        "rank_pattern": {"mlp.gate.weight": 3},
        "alpha_pattern": {"gate.weight": 5},
    },
    "dense linears as parameters": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.up_proj.weight"],
        "alpha_pattern": {"up_proj.weight": 5},
    },
}


FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILIES = [
    *((name, {"target_modules": "all-linear"}) for name in ("glm4", "gemma3", "phi3", "gpt2")),
    *(
        (name, {"target_modules": "all-linear", "use_rslora": True})
        for name in ("deepseek_v3_groups", "mixtral", "glm4_moe", "qwen3_next_moe")
    ),
    *(
        (name, {"target_modules": "all-linear", "target_parameters": FUSED})
        for name in ("qwen2_moe", "gpt_oss_moe")
    ),
    (
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.gate.weight"],
            "rank_pattern": {"mlp.gate.weight": 3},
            "alpha_pattern": {"layers.0.mlp.gate.weight": 5},
        },
    ),
    ("mixtral", {"target_modules": ["w1", "w2", "w3", "gate"]}),
    ("gpt_oss_moe", {"target_modules": ["o_proj"], "target_parameters": ["mlp.router.weight"]}),
    ("gpt_oss_moe", {"target_modules": [], "target_parameters": FUSED[:1]}),
    ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate"]}),
    ("deepseek_v3", {"target_modules": ["kv_b_proj"], "modules_to_save": ["mlp.gate", "q_a_proj"]}),
    ("qwen2_moe", {"target_modules": ["q_proj"], "modules_to_save": ["shared_expert_gate"]}),
    ("gpt2", {"target_modules": ["c_proj"], "modules_to_save": ["wpe", "ln_1"]}),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("a"), "qwen3", num_hidden_layers=2)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("b"), "qwen3_moe_mixed", num_hidden_layers=3)


def check_like_peft(folder, adapter, config):
    expected = save_with_peft(folder, adapter, r=4, **config)
    stored = read_adapter(adapter, table_of(folder))
    before = weights_of(hf_model(folder))
    with stored.open() as source:
        changes = changes_of(
            stored.lora, lambda name: source.slices(name)[:], table_of(folder), before
        )
    changes = {name: change for name, change in changes.items() if change.any()}
    assert changes.keys() == expected.keys()
    for name, change in changes.items():
        torch.testing.assert_close(change, expected[name], rtol=1e-5, atol=2e-6)
    return stored


@pytest.mark.parametrize("config", DENSE.values(), ids=DENSE.keys())
def test_an_adapter_of_peft_changes_the_weights_as_peft_does(dense, tmp_path, config):
    stored = check_like_peft(dense, tmp_path / "adapter", config)
    assert stored.base == str(dense)
    assert stored.dtype == "float32"


@pytest.mark.parametrize("config", EXPERTS.values(), ids=EXPERTS.keys())
def test_fused_experts_change_the_weights_as_in_peft(mixed, tmp_path, config):
    check_like_peft(mixed, tmp_path / "adapter", config)


@pytest.mark.parametrize(("name", "config"), FAMILIES, ids=str)
def test_adapters_of_every_family_change_the_weights_as_in_peft(name, config, tmp_path):
    # The fourth layer of Qwen3-Next is the first with attention.
    folder = make_checkpoint(tmp_path / "m", name, num_hidden_layers=4 if "next" in name else 2)
    check_like_peft(folder, tmp_path / "adapter", config)


def test_gate_and_up_that_share_one_a_both_get_all_of_it(mixed, tmp_path):
    config = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    lora = check_like_peft(mixed, tmp_path / "adapter", config).lora
    assert [linear.adapters for linear in lora.linears] == [(Adapter(rank=4, alpha=8.0),) * 2]
    assert lora.linears[0].layers == (0, 2)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_blocks_that_peft_fused_from_single_experts_are_taken_apart(mixed, tmp_path, use_rslora):
    adapter = Adapter(rank=4, alpha=6.0, use_rslora=use_rslora)
    lora = make_plan(table_of(mixed), lambda name, _: adapter if "experts" in name else None)
    values = random_values(lora, table_of(mixed))
    folder = write_adapter(tmp_path / "a", lora, table_of(mixed), values, layout="fused")
    stored = read_adapter(folder, table_of(mixed))
    assert stored.lora == lora
    with stored.open() as source:
        assert all(torch.equal(source.slices(name)[:], values[name]) for name in values)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("seed", range(6))
def test_what_we_write_is_read_back_the_same(mixed, tmp_path, layout, seed):
    """Ranks and alphas of every projection drawn by chance, in every layer of their own."""
    table = table_of(mixed)
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def choose(name, layer):
        if number(0, 4) == 0:
            return None
        rank = number(1, 7)
        # Gate and up of the experts have to have one scale.
        alpha = rank * 2.0 if ".experts." in name else float(number(1, 9))
        return Adapter(rank=rank, alpha=alpha, use_rslora=False)

    lora = make_plan(table, choose)
    values = random_values(lora, table)
    folder = write_adapter(tmp_path / "a", lora, table, values, layout=layout)
    stored = read_adapter(folder, table)
    assert stored.lora == lora
    with stored.open() as source:
        assert all(torch.equal(source.slices(name)[:], values[name]) for name in values)


@pytest.fixture
def adapter(dense, tmp_path):
    lora = uniform_plan(table_of(dense), *LINEARS, modules_to_save=("lm_head.weight",))
    values = random_values(lora, table_of(dense))
    return write_adapter(tmp_path / "adapter", lora, table_of(dense), values)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def changed(name, make):
    return lambda tensors: {**tensors, name: make(tensors.get(name))}


def without(*names):
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


DAMAGED = {
    "no A": (without(f"{Q}.lora_A.weight"), rf"has {Q}\.lora_B\.weight, but no {Q}\.lora_A"),
    "no B": (without(f"{Q}.lora_B.weight"), rf"has {Q}\.lora_A\.weight, but no {Q}\.lora_B"),
    "other width": (
        changed(f"{Q}.lora_A.weight", lambda a: torch.zeros(4, 63)),
        r"q_proj\.lora_A\.weight has shape \[4, 63\], expected \[rank, 64\]",
    ),
    "other height": (
        changed(f"{Q}.lora_B.weight", lambda b: torch.zeros(4, 127).t().contiguous()),
        r"q_proj\.lora_B\.weight has shape \[127, 4\], expected \[128, 4\]",
    ),
    "transposed": (
        changed(f"{Q}.lora_A.weight", lambda a: a.t().contiguous()),
        r"has shape \[64, 4\], expected \[rank, 64\]",
    ),
    "one axis": (changed(f"{Q}.lora_A.weight", torch.flatten), r"has shape \[256\]"),
    "rank zero": (
        changed(f"{Q}.lora_A.weight", lambda a: torch.zeros(0, 64)),
        "with a rank from 1 to",
    ),
    "more layers": (
        renamed("layers.1.", "layers.40."),
        r"does not fit the model, which has 2 layers: nothing there takes base_model\.model\.model"
        r"\.layers\.40\..* and 4 more",
    ),
    "unknown key": (changed("base_model.model.x", lambda _: torch.zeros(1)), "nothing there takes"),
    "a name of torch": (renamed(".lora_A.weight", ".lora_A.default.weight"), "but no"),
    "DoRA": (
        changed(f"{Q}.lora_magnitude_vector.weight", lambda _: torch.zeros(128)),
        "DoRA is not built",
    ),
    "a bias": (changed(f"{Q}.lora_B.bias", lambda _: torch.zeros(128)), "nothing there takes"),
    "integers": (changed(f"{Q}.lora_A.weight", torch.Tensor.char), "is I8; quantised"),
    "8 bits": (
        changed(f"{Q}.lora_A.weight", lambda a: a.to(torch.float8_e4m3fn)),
        "is F8_E4M3; quantised",
    ),
    "no saved module": (
        without("base_model.model.lm_head.weight"),
        "'modules_to_save' names lm_head, of which no weight is there",
    ),
    "a saved module of another size": (
        changed("base_model.model.lm_head.weight", lambda w: torch.zeros(132, 64)),
        r"lm_head\.weight has shape \[132, 64\], expected \[131, 64\]",
    ),
    "a weight that is not named": (
        changed("base_model.model.model.norm.weight", lambda _: torch.zeros(64)),
        r"model\.norm\.weight, which 'modules_to_save' does not name",
    ),
    "no factors": (
        lambda tensors: {"base_model.model.lm_head.weight": torch.zeros(131, 64)},
        "no factors",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_file_that_does_not_fit_is_refused(dense, adapter, damage, reason):
    path = adapter / "adapter_model.safetensors"
    save_file(damage(load_file(path)), path)
    with pytest.raises(ValueError, match=reason) as caught:
        read_adapter(adapter, table_of(dense))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def set_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("changes", [{"r": 8}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_a_config_with_another_rank_is_refused(dense, adapter, changes):
    set_config(adapter, **changes)
    with pytest.raises(
        ValueError, match=r"q_proj has rank [28] there, and rank 4 in adapter_model"
    ):
        read_adapter(adapter, table_of(dense))


def test_the_adapter_of_another_model_is_refused(adapter, tmp_path):
    other = make_checkpoint(tmp_path / "other", "llama", hidden_size=128, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"has shape \[4, 64\], expected \[rank, 128\]"):
        read_adapter(adapter, table_of(other))


def expert_file(mixed, folder, change, *, layout="per_expert"):
    table = table_of(mixed)
    adapter = Adapter(rank=4, alpha=6.0)
    lora = make_plan(table, lambda name, _: adapter if "experts" in name else None)
    write_adapter(folder, lora, table, random_values(lora, table), layout=layout)
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return folder


EXPERT = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("layout", "change", "reason"),
    [
        (
            "per_expert",
            without(f"{EXPERT}.2.up_proj.lora_A.weight", f"{EXPERT}.2.up_proj.lora_B.weight"),
            "experts.2.up_proj has no adapter, and .*experts.0.up_proj one of rank 4",
        ),
        (
            "per_expert",
            lambda tensors: (
                tensors
                | {
                    f"{EXPERT}.1.up_proj.lora_A.weight": torch.zeros(2, 64),
                    f"{EXPERT}.1.up_proj.lora_B.weight": torch.zeros(48, 2),
                }
            ),
            "experts.1.up_proj has an adapter of rank 2, and .* one of rank 4",
        ),
        (
            "per_expert",
            renamed("experts.3.", "experts.4."),
            "experts.3.gate_proj has no adapter",
        ),
        (
            "fused",
            changed(f"{EXPERT}.lora_A.weight", lambda a: a[:-1].clone()),
            r"has shape .*, expected \[n, 64\] and \[96, n\] or \[n, 48\] and \[64, n\]",
        ),
        ("fused", without(f"{EXPERT}.base_layer.lora_B.weight"), "but no"),
        ("fused", renamed(".base_layer", ".base_layer.base_layer"), "nothing there"),
        (
            "fused",
            lambda tensors: (
                tensors
                | {
                    f"{EXPERT}.{expert}.down_proj.lora_{half}.weight": torch.zeros(shape)
                    for expert in range(4)
                    for half, shape in (("A", (4, 48)), ("B", (64, 4)))
                }
            ),
            "has experts of layer 0 twice",
        ),
    ],
    ids=["missing", "other rank", "other expert", "cut", "half", "too deep", "twice"],
)
def test_experts_that_do_not_fit_are_refused(mixed, tmp_path, layout, change, reason):
    folder = expert_file(mixed, tmp_path / "a", change, layout=layout)
    with pytest.raises(ValueError, match=reason):
        read_adapter(folder, table_of(mixed))


def test_experts_of_a_layer_need_one_alpha(mixed, tmp_path):
    folder = expert_file(mixed, tmp_path / "a", lambda tensors: tensors)
    set_config(folder, alpha_pattern={"experts.1.up_proj": 3})
    with pytest.raises(ValueError, match="different alphas"):
        read_adapter(folder, table_of(mixed))


def test_pickle_is_never_opened(dense, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin can run code and is never opened"):
        read_adapter(adapter, table_of(dense))
    (adapter / "adapter_model.bin").unlink()
    os.mkfifo(weights)
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        read_adapter(adapter, table_of(dense))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 10**12) + b"{}"],
)
def test_a_file_that_is_no_safetensors_is_refused(dense, adapter, content):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: "):
        read_adapter(adapter, table_of(dense))


def test_reading_needs_no_torch_unless_experts_are_fused(dense, adapter):
    program = (
        "import json, sys; from pathlib import Path; from mtrain.bridge.plan import weight_table; "
        "from mtrain.lora.peft_format import read_adapter; "
        "table = weight_table(json.loads(Path(sys.argv[1], 'config.json').read_text())); "
        "read_adapter(Path(sys.argv[2]), table); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, dense, adapter], check=True)
