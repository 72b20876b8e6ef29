import numpy as np
import pytest

from mtrain.data.encode import Encoded
from mtrain.data.storage import TokenizedDataset, write_samples


def make_samples(rng, count):
    lengths = rng.integers(1, 50, count)
    return [
        Encoded(
            rng.integers(0, 2**31 - 1, n, dtype=np.int32),
            rng.integers(-100, 9, n, dtype=np.int32),
            f"f.jsonl, line {index}",
            False,
        )
        for index, n in enumerate(lengths)
    ]


def test_what_is_written_is_read_across_chunks(tmp_path):
    samples = make_samples(np.random.default_rng(0), 23)
    write_samples(tmp_path / "d", [samples[:10], [], samples[10:11], samples[11:]])
    dataset = TokenizedDataset(tmp_path / "d")
    assert len(dataset) == 23
    assert dataset.lengths.dtype == np.int32
    for index, sample in enumerate(samples):
        assert np.array_equal(dataset[index].input_ids, sample.input_ids)
        assert np.array_equal(dataset[index].labels, sample.labels)
        assert dataset.lengths[index] == len(sample.input_ids)
        assert dataset.place(index) == sample.place


def test_samples_are_read_in_any_order(tmp_path):
    samples = make_samples(np.random.default_rng(0), 23)
    write_samples(tmp_path / "d", [samples[:10], samples[10:11], samples[11:]])
    dataset = TokenizedDataset(tmp_path / "d")
    indices = np.array([22, 0, 10, 10, 11, 9])
    found = dataset.samples(indices)
    assert [sample.input_ids.tolist() for sample in found] == [
        samples[index].input_ids.tolist() for index in indices
    ]
    assert [sample.labels.tolist() for sample in found] == [
        samples[index].labels.tolist() for index in indices
    ]
    assert dataset.samples(indices[:0]) == []
    with pytest.raises(IndexError, match="samples 3 to 23 of 23"):
        dataset.samples(np.array([4, 23, 3]))


def test_the_file_is_one_of_hugging_face_datasets(tmp_path):
    import datasets

    samples = make_samples(np.random.default_rng(0), 4)
    write_samples(tmp_path / "d", [samples[:3], samples[3:]])
    dataset = datasets.Dataset.from_file(str(tmp_path / "d" / "data.arrow"))
    ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    place = datasets.Value("string")
    assert dataset.features == {"input_ids": ids, "labels": ids, "length": number, "place": place}
    assert dataset["labels"][3] == samples[3].labels.tolist()


def test_reading_does_not_copy(tmp_path):
    write_samples(tmp_path / "d", [make_samples(np.random.default_rng(0), 4)])
    ids = TokenizedDataset(tmp_path / "d")[2].input_ids
    assert ids.dtype == np.int32
    assert not ids.flags["OWNDATA"]
    assert not ids.flags["WRITEABLE"]


def test_an_index_outside_is_an_error(tmp_path):
    write_samples(tmp_path / "d", [make_samples(np.random.default_rng(0), 4)])
    dataset = TokenizedDataset(tmp_path / "d")
    for index in (-1, 4):
        with pytest.raises(IndexError, match="of 4"):
            dataset[index]


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no prepared data"):
        TokenizedDataset(tmp_path)
