"""What tests of LoRA share: adapters on tiny models, and PEFT as the judge."""

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.save import save_weights
from mtrain.config.tuner import TunerConfig
from mtrain.lora.layers.attach import attach_adapters
from mtrain.lora.plan import adapter_table
from mtrain.lora.targets import choose_targets
from mtrain.lora.weights import initialize_adapters, load_adapters
from tests.megatron import load_model, read_config


class Values(dict):
    """Factors by PEFT's names, as a source to load from."""

    def slices(self, name):
        return self[name]


def random_factors(table, lora, *, seed=7):
    """A and B that are both not zero, so that all gradients show from the first step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = hf_tensors(adapter_table(table, lora))
    return Values({n: torch.randn(s, generator=generator) * 0.1 for n, s in shapes.items()})


def plan_of(folder, *, num_next_tokens=0, **tuner):
    """The weight table of a checkpoint and the plan of an adapter for it."""
    table = weight_table(read_config(folder), num_next_tokens)
    defaults = {"target_modules": ("all-linear",), "lora_rank": 4, "lora_alpha": 6.0}
    return table, choose_targets(table, TunerConfig(**defaults | tuner))


def attached(state, folder, lora, values=None, *, adapter_dtype=None, dropout=0.0, **options):
    """The chunks of this rank with adapters: fresh ones, or with values."""
    chunks = load_model(state, folder, **options)
    dtype = adapter_dtype or options.get("dtype", torch.float32)
    table = weight_table(read_config(folder), options.get("num_next_tokens", 0))
    common = {"table": table, "state": state}
    attach_adapters(chunks, lora, dtype=dtype, dropout=dropout, **common)
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
    options = {"state": state, "dtype": torch.float32, "max_shard_size": 10**9}
    save_weights(lookup, output, table=table, **options)()
    torch.distributed.barrier()
    return load_all(output) if state.is_first_rank else {}


def load_all(folder):
    """The tensors of all files in a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


class Expert(torch.nn.Module):
    """One expert of a Hugging Face layer; its linears have the names that they have in files."""

    def __init__(self, experts, number, names):
        super().__init__()
        self._activate = _activation(experts)
        self._names = names
        for name, (weight, bias) in zip(names, _projections(experts, number), strict=True):
            linear = torch.nn.Linear(*reversed(weight.shape), bias=bias is not None)
            linear.weight = torch.nn.Parameter(weight.detach().clone())
            if bias is not None:
                linear.bias = torch.nn.Parameter(bias.detach().clone())
            self.add_module(name, linear)

    def forward(self, x):
        gate, up, down = (self.get_submodule(name) for name in self._names)
        return down(self._activate(gate(x), up(x)))


def _projections(experts, number):
    """Weight and bias of gate, up and down of one expert."""
    gate_up, down = experts.gate_up_proj[number], experts.down_proj[number]
    if not hasattr(experts, "gate_up_proj_bias"):
        gate, up = gate_up.chunk(2)
        return (gate, None), (up, None), (down, None)
    # gpt-oss: transposed, and columns of gate and up take turns.
    biases = experts.gate_up_proj_bias[number], experts.down_proj_bias[number]
    gate, up = ((gate_up.t()[part::2], biases[0][part::2]) for part in (0, 1))
    return gate, up, (down.t(), biases[1])


def _activation(experts):
    if hasattr(experts, "act_fn"):
        return lambda gate, up: experts.act_fn(gate) * up
    return lambda gate, up: experts._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))


class SeparateExperts(torch.nn.Module):
    """The experts of a Hugging Face layer as linears, which PEFT can adapt one by one."""

    def __init__(self, experts, names):
        super().__init__()
        for number in range(experts.num_experts):
            self.add_module(str(number), Expert(experts, number, names))

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
        self.is_mixtral = model.config.model_type == "mixtral"
        self.prefix = model.base_model_prefix
        self.add_module(self.prefix, model.base_model)
        self.lm_head = model.lm_head
        names = ("w1", "w3", "w2") if self.is_mixtral else ("gate_proj", "up_proj", "down_proj")
        for name, module in list(self.named_modules()):
            if name.endswith(".experts"):
                self.set_submodule(name, SeparateExperts(module, names))

    def forward(self, input_ids):
        return self.lm_head(self.get_submodule(self.prefix)(input_ids).last_hidden_state)

    def name_of(self, name):
        """The name here of a tensor that has another one in files."""
        return name.replace(".block_sparse_moe.", ".mlp.") if self.is_mixtral else name


def peft_model(folder, config, values):
    judge = Judge(folder)
    names = {judge.name_of(name): name for name in values}
    model = peft.get_peft_model(judge, config)
    result = peft.set_peft_model_state_dict(
        model, {here: values[name] for here, name in names.items()}
    )
    assert not result.unexpected_keys
    trained = {
        name.replace(".modules_to_save", "").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == names.keys()
    return model, {names[here]: parameter for here, parameter in trained.items()}
