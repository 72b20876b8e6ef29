"""LoRA trains what PEFT trains: losses, gradients and values, step by step and in every layout.

The judge is PEFT on the Hugging Face model, from the same A and B, one document at a time. Experts,
which transformers 5 keeps in one parameter, get one linear each there, as in the checkpoint.
"""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.save import lookup_in, save_weights
from mtrain.bridge.slices import tensors_by_name
from mtrain.config import MoEConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from mtrain.config.tuner import TunerConfig
from mtrain.lora.attach import attach_adapters
from mtrain.lora.merge import merged_lookup
from mtrain.lora.plan import adapter_table
from mtrain.lora.targets import choose_targets
from mtrain.lora.weights import adapter_lookup, initialize_adapters, load_adapters
from mtrain.parallel import ParallelLayout
from mtrain.training.optimizer import build_optimizer, build_scheduler
from mtrain.training.step import train_step
from mtrain.training.wrap import unwrap, wrap_chunks
from tests.megatron import load_model, packed_inputs, read_config
from tests.ranks import run_ranks
from tests.test_invariance import PACKED, VOCAB, batches_of_rank, layout
from tests.tiny import make_checkpoint

STEPS = 5
OPTIMIZER = OptimizerConfig(
    lr=1e-3, lr_decay_style="constant", clip_grad=0.0, weight_decay=0.1, adam_eps=1e-8
)
EVERYTHING = ("all-linear",)


class Values(dict):
    """Factors by PEFT's names, as a source to load from."""

    def slices(self, name):
        return self[name]


def random_factors(table, lora, *, seed=7):
    """A and B that are both not zero, so that all gradients show from the first step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = hf_tensors(adapter_table(table, lora))
    return Values({n: torch.randn(s, generator=generator) * 0.1 for n, s in shapes.items()})


def plan_of(folder, **tuner):
    table = weight_table(read_config(folder))
    defaults = {"target_modules": EVERYTHING, "lora_rank": 4, "lora_alpha": 6.0}
    return table, choose_targets(table, TunerConfig(**defaults | tuner))


def attached(state, folder, table, lora, values=None, **options):
    chunks = load_model(state, folder, **options)
    dtype = options.get("dtype", torch.float32)
    common = {"table": table, "state": state, "backend": "torch"}
    attach_adapters(chunks, lora, dtype=dtype, dropout=0.0, **common)
    if values is None:
        initialize_adapters(chunks, lora, seed=0, **common)
    else:
        load_adapters(chunks, values, lora, **common)
    return chunks


def gathered(state, lookup, output, table):
    """Tensors of all ranks by their Hugging Face names, on rank 0; {} on the others."""
    if state.is_first_rank:
        output.mkdir(parents=True)
    torch.distributed.barrier()
    options = {"state": state, "backend": "torch", "dtype": torch.float32, "max_shard_size": 10**9}
    save_weights(lookup, output, table=table, **options)
    torch.distributed.barrier()
    found = {}
    if state.is_first_rank:
        for file in output.glob("*.safetensors"):
            found |= load_file(file)
    return found


def train(state, folder, tuner, values, output, training=None):
    """Losses, gradient norms, gradients of the first step, and factors after all steps."""
    table, lora = plan_of(folder, **tuner)
    factors = adapter_table(table, lora)
    no_balance = MoEConfig(moe_aux_loss_coeff=(0.0,))
    bare = attached(state, folder, table, lora, values, moe=no_balance, training=training)
    before = {name: t.clone() for name, t in bare[0].named_parameters() if not t.requires_grad}
    # Without the distributed optimizer every rank has whole gradients to look at.
    parallel = ParallelConfig(use_distributed_optimizer=False)
    chunks = wrap_chunks(bare, parallel=parallel, grad_reduce_in_fp32=True)
    optimizer = build_optimizer(chunks, OPTIMIZER)
    scheduler = build_scheduler(optimizer, OPTIMIZER, total_steps=STEPS)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batches = batches_of_rank(state, PACKED, step)
        result = train_step(chunks, optimizer, scheduler, batches, state=state, step=step)
        sums = result.sums / state.layout.tp_size
        torch.distributed.all_reduce(sums)
        losses.append((sums[0] / sums[2]).item())
        norms.append(result.grad_norm)
        if step == 0:
            main = [
                {n: t.main_grad for n, t in chunk.named_parameters() if t.requires_grad}
                for chunk in bare
            ]
            gradients = gathered(state, lookup_in(main), output / "gradients", factors)
    assert all(torch.equal(bare[0].get_parameter(name), before[name]) for name in before)
    values = gathered(
        state, adapter_lookup(bare, dtype=torch.float32), output / "values", factors
    )
    return losses, norms, gradients, values


class SeparateExperts(torch.nn.Module):
    """The experts of a Hugging Face layer as linears, which PEFT can adapt one by one."""

    class Expert(torch.nn.Module):
        def __init__(self, gate_up, down):
            super().__init__()
            gate, up = gate_up.chunk(2)
            for name, weight in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
                linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
                linear.weight = torch.nn.Parameter(weight.detach().clone())
                setattr(self, name, linear)

        def forward(self, x):
            gated = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(gated)

    def __init__(self, experts):
        super().__init__()
        weights = zip(experts.gate_up_proj, experts.down_proj, strict=True)
        for number, (gate_up, down) in enumerate(weights):
            self.add_module(str(number), self.Expert(gate_up, down))

    def forward(self, hidden, chosen, weights):
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self.children()):
            rows, which = torch.where(chosen == number)
            scaled = expert(hidden[rows]) * weights[rows, which, None]
            output = output.index_add(0, rows, scaled)
        return output


class Judge(torch.nn.Module):
    """A Hugging Face model that PEFT takes as it is, without its conversion of fused experts."""

    def __init__(self, folder):
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model, self.lm_head = model.model, model.lm_head
        for layer in self.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts = SeparateExperts(layer.mlp.experts)

    def forward(self, input_ids):
        return self.lm_head(self.model(input_ids).last_hidden_state)


def peft_model(folder, config, values):
    model = peft.get_peft_model(Judge(folder), config)
    result = peft.set_peft_model_state_dict(model, dict(values))
    assert not result.unexpected_keys
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == values.keys()
    return model, trained


def train_with_peft(folder, config, values):
    """The same training by PEFT and torch's AdamW."""
    model, trained = peft_model(folder, config, values)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=1e-3, betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2),
        eps=1e-8, weight_decay=0.1,
    )
    losses, norms, first = [], [], {}
    state = _OneRank()
    for step in range(STEPS):
        total, num_labels = 0.0, 0
        optimizer.zero_grad()
        batches = batches_of_rank(state, PACKED, step)
        num_labels = sum(int((batch.labels != -100).sum()) for batch in batches)
        for batch in batches:
            lengths = batch.cu_seqlens.diff().tolist()
            for ids, labels in zip(
                batch.input_ids[0].split(lengths), batch.labels[0].split(lengths), strict=True
            ):
                logits = model(ids[None])[0]
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                (loss / num_labels).backward()
                total += loss.item()
        losses.append(total / num_labels)
        gradients = {name: parameter.grad for name, parameter in trained.items()}
        norms.append(torch.stack([g.norm() for g in gradients.values()]).norm().item())
        first = first or {name: gradient.clone() for name, gradient in gradients.items()}
        optimizer.step()
    return losses, norms, first, {name: p.detach().clone() for name, p in trained.items()}


class _OneRank:
    layout = ParallelLayout()
    coordinates = ParallelLayout().coordinates(0)


def lora_config(**changes):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6.0, "target_modules": names, "lora_dropout": 0.0} | changes
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """(folder, start values, PEFT's training) of a family, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = make_checkpoint(tmp_path_factory.mktemp(name), name)
            values = random_factors(*plan_of(folder))
            made[name] = folder, values, train_with_peft(folder, lora_config(), values)
        return made[name]

    return get


def assert_same(ours, expected):
    losses, norms, gradients, values = ours
    expected_losses, expected_norms, expected_gradients, expected_values = expected
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for mine, theirs in ((gradients, expected_gradients), (values, expected_values)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5, msg=name)


ONE = ParallelLayout()
CASES = [
    *((name, "one", ONE) for name in ("llama", "qwen2", "qwen3_tied", "qwen3_moe_mixed")),
    ("qwen2", "tp2", layout(tp_size=2)),
    ("qwen3_tied", "tp4_more_ranks_than_groups", layout(tp_size=4)),
    ("qwen3_tied", "pp2_vpp2", layout(pp_size=2, vpp_size=2)),
    ("llama", "tp2_pp2", layout(tp_size=2, pp_size=2)),
    ("qwen3_moe_mixed", "dp2", layout(world_size=2)),
    ("qwen3_moe_mixed", "ep2", layout(ep_size=2)),
    ("qwen3_moe_mixed", "etp2", layout(tp_size=2, etp_size=2)),
    ("qwen3_moe_mixed", "tp2_ep2", layout(tp_size=2, ep_size=2)),
    ("qwen3_moe_mixed", "tp2_etp2_ep2", layout(tp_size=2, etp_size=2, ep_size=2)),
    ("qwen3_moe_mixed", "pp2_ep2", layout(pp_size=2, ep_size=2)),
]


@pytest.mark.parametrize(
    ("name", "sizes"), [pytest.param(n, s, id=f"{n}-{label}") for n, label, s in CASES]
)
def test_training_is_that_of_peft(name, sizes, judged, tmp_path):
    """T40 for LoRA: every layout repeats PEFT's losses, gradients and values."""
    folder, values, expected = judged(name)
    results = run_ranks(sizes, train, folder, {}, values, tmp_path)
    assert all(result[:2] == results[0][:2] for result in results), "ranks disagree"
    assert_same(results[0], expected)
