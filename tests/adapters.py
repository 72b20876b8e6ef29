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


def plan_of(folder, **tuner):
    """The weight table of a checkpoint and the plan of an adapter for it."""
    table = weight_table(read_config(folder))
    defaults = {"target_modules": ("all-linear",), "lora_rank": 4, "lora_alpha": 6.0}
    return table, choose_targets(table, TunerConfig(**defaults | tuner))


def attached(state, folder, lora, values=None, *, adapter_dtype=None, dropout=0.0, **options):
    """The chunks of this rank with adapters: fresh ones, or with values."""
    chunks = load_model(state, folder, **options)
    dtype = adapter_dtype or options.get("dtype", torch.float32)
    backend = options.get("backend", "torch")
    common = {"table": weight_table(read_config(folder)), "state": state, "backend": backend}
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
    options = {"state": state, "backend": "torch", "dtype": torch.float32, "max_shard_size": 10**9}
    save_weights(lookup, output, table=table, **options)()
    torch.distributed.barrier()
    return load_all(output) if state.is_first_rank else {}


def load_all(folder):
    """The tensors of all files in a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


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
    trained = {
        name.replace(".modules_to_save", "").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == values.keys()
    return model, trained
