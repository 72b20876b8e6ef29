import dataclasses

import torch

from mtrain.training.batch import BatchCounts, count_batches, to_device
from tests.training.rig import documents, packed, rows


def test_a_pack_is_counted_without_its_padding():
    made = documents(2)  # of 5 and 8 tokens
    assert count_batches([packed(made, length=20)]) == BatchCounts(
        num_micro_batches=1,
        num_samples=2,
        num_tokens=13,
        num_padded_tokens=20,
        num_attention_pairs=5 * 6 // 2 + 8 * 9 // 2,
    )


def test_padding_in_several_documents_is_not_counted_either():
    batch = packed(documents(2), length=20)
    bounds = torch.tensor([0, 5, 13, 17, 20], dtype=torch.int32)
    split = dataclasses.replace(batch, cu_seqlens=bounds)
    assert count_batches([split]) == count_batches([batch])


def test_rows_are_counted_and_counts_add_up():
    single = documents(1, shortest=5)
    counts = count_batches([rows(single, length=8), rows(single, length=16)])
    assert counts == BatchCounts(
        num_micro_batches=2,
        num_samples=2,
        num_tokens=10,
        num_padded_tokens=24,
        num_attention_pairs=30,
    )


def test_a_batch_of_padding_counts_as_nothing():
    batch = dataclasses.replace(packed(documents(1), length=8), num_tokens=0, sample_ids=())
    assert count_batches([batch]) == BatchCounts(num_micro_batches=1, num_padded_tokens=8)


def test_tensors_move_and_the_rest_stays():
    batch = to_device(packed(documents(2)), torch.device("meta"))
    assert batch.input_ids.is_meta
    assert batch.labels.is_meta
    assert batch.label_positions.is_meta
    assert batch.position_ids.is_meta
    assert batch.cu_seqlens.is_meta
    assert (batch.num_tokens, batch.sample_ids) == (13, (0, 1))
    assert to_device(rows(documents(2)), torch.device("meta")).cu_seqlens is None
