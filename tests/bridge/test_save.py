"""Round trips through real models on real ranks (T24)."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from xxhash import xxh3_128

from mtrain.bridge.file_plan import plan_files
from mtrain.bridge.plan import weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.save import lookup_in, save_weights
from mtrain.bridge.slices import tensors_by_name
from mtrain.bridge.written import record_file
from mtrain.parallel import ParallelLayout
from tests.megatron import form_of, load_model, read_config
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint

DENSE_LAYOUTS = [
    {},
    {"world_size": 2},
    {"world_size": 2, "tp_size": 2},
    {"world_size": 4, "tp_size": 4},
    {"world_size": 2, "pp_size": 2},
    {"world_size": 4, "pp_size": 4},
    {"world_size": 4, "tp_size": 2, "pp_size": 2},
    {"world_size": 4, "pp_size": 2, "vpp_size": 2},
    {"world_size": 2, "pp_size": 2, "num_layers_in_first_stage": 1},
]
MOE_LAYOUTS = [
    {"world_size": 4, "ep_size": 4},
    {"world_size": 4, "tp_size": 2, "ep_size": 2},
    {"world_size": 4, "tp_size": 2, "ep_size": 2, "etp_size": 2},
    {"world_size": 4, "ep_size": 2, "etp_size": 2},
    {"world_size": 4, "tp_size": 4, "ep_size": 2},
    {"world_size": 4, "pp_size": 2, "vpp_size": 2, "ep_size": 2},
]
CASES = [
    *(("qwen2_tied", sizes) for sizes in DENSE_LAYOUTS),
    *(("qwen3", sizes) for sizes in DENSE_LAYOUTS),
    *((name, DENSE_LAYOUTS[6]) for name in ("llama", "llama3_tied", "mistral", "qwen2")),
    *(("qwen3_moe_mixed", sizes) for sizes in [*DENSE_LAYOUTS[:-1], *MOE_LAYOUTS]),
    ("qwen3_moe", MOE_LAYOUTS[1]),
    *((name, DENSE_LAYOUTS[6]) for name in ("glm4", "gemma3", "phi3", "gpt2", "deepseek_v2")),
    *((name, DENSE_LAYOUTS[3]) for name in ("glm4", "phi3", "gpt2", "deepseek_v3")),
    *((name, MOE_LAYOUTS[2]) for name in ("mixtral", "qwen2_moe", "glm4_moe", "gpt_oss_moe")),
    *((name, MOE_LAYOUTS[5]) for name in ("deepseek_v3_groups", "qwen3_next_moe", "gpt_oss_moe")),
    ("qwen3_next_moe", MOE_LAYOUTS[1]),
    ("mimo", DENSE_LAYOUTS[6]),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Makes each tiny checkpoint once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name):
        path = folder / name
        if not path.exists() and name == "mimo":
            make_checkpoint_with_next_tokens(path, name)
        return path if path.exists() else make_checkpoint(path, name)

    return get


def digest(chunks):
    """Hash of all weights of a rank."""
    total = hashlib.sha256()
    for named in tensors_by_name(chunks):
        for tensor in named.values():
            total.update(tensor.detach().view(torch.uint8).numpy())
    return total.hexdigest()


def load_and_save(state, source, target, max_shard_size, bucket_bytes, dtype=torch.float32):
    chunks = load_model(state, source, dtype=dtype)
    table = weight_table(read_config(source))
    before = digest(chunks)
    written = save_weights(
        lookup_in(tensors_by_name(chunks)),
        target,
        table=table,
        form=form_of(source, table),
        state=state,
        dtype=dtype,
        max_shard_size=max_shard_size,
        bucket_bytes=bucket_bytes,
    )()
    assert digest(chunks) == before, "saving changed live weights"
    return written


def tensors_of(folder: Path):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, tensor in load_file(path).items():
            assert key not in found
            found[key] = tensor
    return found


def assert_same_tensors(folder, other):
    ours, theirs = tensors_of(folder), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert ours[key].shape == tensor.shape
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.shows("save")
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_load_then_save_gives_the_same_bytes(checkpoints, tmp_path, name, sizes):
    """T24: in buckets so small that tensors are cut, into several files."""
    source = checkpoints(name)
    answers = run_ranks(ParallelLayout(**sizes), load_and_save, source, tmp_path, 150_000, 10_000)
    assert_same_tensors(tmp_path, source)
    written = [file for files in answers for file in files]
    assert sorted(file.name for file in written) == sorted(path.name for path in tmp_path.iterdir())
    assert open_checkpoint(tmp_path).notes == ()


def test_the_files_that_a_rank_wrote_are_recorded_with_their_hashes(checkpoints, tmp_path):
    """T21: without a second look at the files."""
    layout = ParallelLayout(world_size=4, tp_size=2, ep_size=2)
    source = checkpoints("qwen3_moe_mixed")
    answers = run_ranks(layout, load_and_save, source, tmp_path, 150_000, 10_000)
    assert "model.safetensors.index.json" in {file.name for file in answers[0]}
    for file in (file for files in answers for file in files):
        assert replace(file, tensors={}) == record_file(tmp_path, tmp_path / file.name)
        stored = load_file(tmp_path / file.name) if file.tensors else {}
        assert {name: tensor.digest for name, tensor in file.tensors.items()} == {
            name: xxh3_128(tensor.numpy()).hexdigest() for name, tensor in stored.items()
        }


def test_one_file_needs_no_index(checkpoints, tmp_path):
    source = checkpoints("qwen3_moe_mixed")
    ((file,),) = run_ranks(ParallelLayout(), load_and_save, source, tmp_path, 10**9, 10**9)
    assert file.name == "model.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same_tensors(tmp_path, source)


def test_bfloat16_stays_bfloat16(tmp_path):
    """T24"""
    source = make_checkpoint(tmp_path / "source", "qwen2_tied", dtype="bfloat16")
    target = tmp_path / "target"
    target.mkdir()
    layout = ParallelLayout(world_size=2, tp_size=2)
    run_ranks(layout, load_and_save, source, target, 10**9, 10**9, torch.bfloat16)
    assert_same_tensors(target, source)


def test_the_index_states_the_size_and_every_tensor(checkpoints, tmp_path):
    source = checkpoints("qwen3")
    run_ranks(ParallelLayout(), load_and_save, source, tmp_path, 150_000, 10**9)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = tensors_of(source)
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert list(index["weight_map"]) == sorted(tensors)


def test_transformers_reloads_what_was_saved(checkpoints, tmp_path):
    """T45: no missing and no unexpected key, the same logits."""
    from transformers import AutoModelForCausalLM

    source = checkpoints("qwen3_moe_mixed")
    layout = ParallelLayout(world_size=4, tp_size=2, ep_size=2)
    run_ranks(layout, load_and_save, source, tmp_path, 150_000, 10_000)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    saved, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(source)
    words = torch.arange(8)[None]
    assert torch.equal(saved(words).logits, original(words).logits)


def save_computed(state, source, target):
    """Saves tensors that exist only while they are asked for, as a merge would."""
    (tensors,) = tensors_by_name(load_model(state, source))
    table = weight_table(read_config(source))

    def doubled(chunk, name, expert):
        assert expert is None
        return tensors[name].detach() * 2

    return save_weights(
        doubled,
        target,
        table=table,
        form=form_of(source, table),
        state=state,
        dtype=torch.float32,
        max_shard_size=10**9,
    )()


def test_tensors_may_be_computed_when_they_are_asked_for(checkpoints, tmp_path):
    source = checkpoints("qwen3")
    run_ranks(ParallelLayout(world_size=2, tp_size=2), save_computed, source, tmp_path)
    saved = tensors_of(tmp_path)
    assert all(torch.equal(saved[key], 2 * value) for key, value in tensors_of(source).items())


def save_or_say_which_file_failed(state, source, target):
    try:
        load_and_save(state, source, target, 150_000, 10_000)
    except FileExistsError as error:
        return Path(error.filename).name
    return "saved"


def test_a_rank_that_cannot_write_does_not_hold_up_the_others(checkpoints, tmp_path):
    source = checkpoints("qwen3_moe_mixed")
    layout = ParallelLayout(world_size=4, tp_size=2, ep_size=2)
    table = weight_table(read_config(source))
    taken = plan_files(table, layout=layout, dtype="F32", max_shard_size=150_000)[0]
    (tmp_path / taken.name).write_bytes(b"")
    answers = run_ranks(layout, save_or_say_which_file_failed, source, tmp_path)
    assert answers[taken.writer] == taken.name
    assert answers.count("saved") == 3
