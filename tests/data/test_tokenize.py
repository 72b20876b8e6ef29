import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from mtrain.config.data import DataConfig, TemplateConfig
from mtrain.data import tokenize
from mtrain.data.storage import TokenizedDataset
from mtrain.data.template import load_tokenizer
from mtrain.data.tokenize import prepare_datasets
from tests.data.tiny_tokenizer import save_tokenizer


def write_rows(path, texts):
    rows = [{"query": f"q {text}", "response": f"answer {text}"} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def model_dir(tmp_path):
    return save_tokenizer(tmp_path / "model")


def prepare(tmp_path, *datasets, template=None, **data):
    return prepare_datasets(
        DataConfig(dataset=datasets, **data),
        template or TemplateConfig(),
        model_dir=tmp_path / "model",
        cache_dir=tmp_path / "cache",
        show_progress=False,
    )


def answers(tmp_path, folder):
    tokenizer, dataset = load_tokenizer(tmp_path / "model"), TokenizedDataset(folder)
    labels = [dataset[index].labels for index in range(len(dataset))]
    return [tokenizer.decode(row[row >= 0]).removesuffix("<|im_end|>") for row in labels]


def test_every_row_is_stored_once_and_found_again(tmp_path, model_dir):
    path = write_rows(tmp_path / "rows.jsonl", range(9))
    first = prepare(tmp_path, path)
    assert sorted(answers(tmp_path, first.train)) == [f"answer {n}" for n in range(9)]
    assert (first.validation, first.report.reused) == (None, False)
    again = prepare(tmp_path, path)
    assert again.report.reused
    assert (again.train, again.report.train) == (first.train, first.report.train)


def test_changed_contents_or_settings_are_prepared_anew(tmp_path, model_dir):
    path = write_rows(tmp_path / "rows.jsonl", range(4))
    folders = {prepare(tmp_path, path).train}
    folders.add(prepare(tmp_path, path, template=TemplateConfig(system="x")).train)
    folders.add(prepare(tmp_path, path, template=TemplateConfig(max_length=99)).train)
    folders.add(prepare(tmp_path, path, data_seed=1).train)
    write_rows(tmp_path / "rows.jsonl", range(5))
    folders.add(prepare(tmp_path, path).train)
    assert len(folders) == 5


def test_the_cache_can_be_passed_by(tmp_path, model_dir):
    path = write_rows(tmp_path / "rows.jsonl", range(4))
    prepare(tmp_path, path)
    anew = prepare(tmp_path, path, load_from_cache_file=False)
    assert not anew.report.reused
    assert len(answers(tmp_path, anew.train)) == 4


def test_order_is_the_files_unless_shuffled(tmp_path, model_dir):
    path = write_rows(tmp_path / "rows.jsonl", range(9))
    in_order = [f"answer {n}" for n in range(9)]
    kept = prepare(tmp_path, path, dataset_shuffle=False)
    assert answers(tmp_path, kept.train) == in_order
    shuffled = answers(tmp_path, prepare(tmp_path, path).train)
    assert shuffled != in_order
    assert sorted(shuffled) == in_order


def test_a_split_is_disjoint_complete_and_the_same_again(tmp_path, model_dir):
    path = write_rows(tmp_path / "rows.jsonl", range(10))
    result = prepare(tmp_path, path, split_dataset_ratio=0.2)
    train, validation = (answers(tmp_path, f) for f in (result.train, result.validation))
    assert (len(train), len(validation)) == (8, 2)
    assert len({*train, *validation}) == 10
    again = prepare(tmp_path, path, split_dataset_ratio=0.2, load_from_cache_file=False)
    assert answers(tmp_path, again.validation) == validation
    with pytest.raises(ValueError, match="leaves no training row of 10"):
        prepare(tmp_path, path, split_dataset_ratio=0.99)


def test_validation_data_of_its_own_is_kept_in_order(tmp_path, model_dir):
    train = write_rows(tmp_path / "a.jsonl", range(5))
    other = write_rows(tmp_path / "b.jsonl", range(100, 105))
    result = prepare(tmp_path, train, val_dataset=(other,))
    assert answers(tmp_path, result.validation) == [f"answer {n}" for n in range(100, 105)]


def test_counts_sample_each_source(tmp_path, model_dir):
    first = write_rows(tmp_path / "a.jsonl", range(10))
    second = write_rows(tmp_path / "b.jsonl", range(100, 102))
    result = prepare(
        tmp_path,
        f"{first}#3",
        f"{second}#4",
        "swift/self-cognition#5",
        model_name=("N",),
        model_author=("A",),
    )
    texts = answers(tmp_path, result.train)
    assert result.report.train.rows == len(texts) == 12
    assert sorted(t for t in texts if t.startswith("answer 10")) == [
        *["answer 100"] * 2,
        *["answer 101"] * 2,
    ]


def test_a_bad_line_ends_it_or_is_counted(tmp_path, model_dir):
    """T27."""
    path = tmp_path / "rows.jsonl"
    write_rows(path, range(3))
    path.write_text(path.read_text() + '{"query": null, "response": "r"}\n{"query": NaN}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 4: query must be text, found null"):
        prepare(tmp_path, str(path))
    report = prepare(tmp_path, str(path), skip_bad_lines=True).report.train
    assert (report.kept, report.bad_rows) == (3, 2)


def test_a_file_of_bad_lines_alone_is_refused(tmp_path, model_dir):
    """T27."""
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 3)
    with pytest.raises(ValueError, match=r"no usable row \(3 bad lines\)"):
        prepare(tmp_path, str(path), skip_bad_lines=True)


def test_too_long_rows_are_counted(tmp_path, model_dir):
    path = write_rows(tmp_path / "rows.jsonl", ["a", "b" * 60, "c"])
    report = prepare(tmp_path, path, template=TemplateConfig(max_length=60)).report
    assert (report.train.kept, report.train.too_long, report.max_length) == (2, 1, 60)
    cut = TemplateConfig(max_length=60, truncation_strategy="left")
    report = prepare(tmp_path, path, template=cut).report.train
    assert (report.kept, report.truncated, report.longest) == (3, 1, 60)


def test_a_pack_bounds_documents(tmp_path, model_dir):
    path = write_rows(tmp_path / "rows.jsonl", ["a", "b" * 60])
    report = prepare(tmp_path, path, packing=True, packing_length=60).report
    assert (report.max_length, report.train.too_long) == (60, 1)


def test_nothing_left_says_why(tmp_path, model_dir):
    path = write_rows(tmp_path / "rows.jsonl", ["<|im_end|>"] * 3)
    with pytest.raises(ValueError, match=r"0 of 3 rows kept; 3 refused .* end-of-turn token"):
        prepare(tmp_path, path)


def test_no_dataset_is_refused(tmp_path, model_dir):
    with pytest.raises(ValueError, match="--dataset is missing"):
        prepare(tmp_path)


def test_an_interrupted_preparation_is_not_taken_for_a_finished_one(tmp_path, model_dir):
    path = write_rows(tmp_path / "rows.jsonl", range(3))
    folder = prepare(tmp_path, path).train.parent
    (folder / "report.json").unlink()
    folder.with_suffix(".partial").mkdir()
    result = prepare(tmp_path, path)
    assert not result.report.reused
    assert len(TokenizedDataset(result.train)) == 3


def test_worker_processes_give_the_same_rows_in_the_same_order(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr(tokenize, "_CHUNK_ROWS", 1)
    path = write_rows(tmp_path / "rows.jsonl", range(20))
    alone = answers(tmp_path, prepare(tmp_path, path).train)
    result = prepare(tmp_path, path, dataset_num_proc=2, load_from_cache_file=False)
    assert answers(tmp_path, result.train) == alone


def test_of_many_that_ask_at_once_one_prepares_and_the_others_use_it(tmp_path, model_dir):
    """The lock belongs to an open file, so threads stand in for the processes of a node."""
    path = write_rows(tmp_path / "rows.jsonl", range(3))
    # One that asks after the first has finished is right to prepare again.
    together = Barrier(3)

    def ask():
        together.wait()
        return prepare(tmp_path, path, load_from_cache_file=False)

    with ThreadPoolExecutor(3) as executor:
        futures = [executor.submit(ask) for _ in range(3)]
    results = [future.result() for future in futures]
    assert sorted(result.report.reused for result in results) == [False, True, True]
    assert len({result.train for result in results}) == 1
    assert len(TokenizedDataset(results[0].train)) == 3
