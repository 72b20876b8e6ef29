from pathlib import Path
from types import SimpleNamespace

from mtrain.cli.notices import finished_notice, start_notice, stop_notice
from mtrain.parallel import ParallelLayout


def test_the_first_line_says_what_is_trained_and_how_it_is_split():
    layout = ParallelLayout(world_size=4, tp_size=2)
    run = SimpleNamespace(
        state=SimpleNamespace(layout=layout),
        inputs=SimpleNamespace(source=SimpleNamespace(family=SimpleNamespace(name="Qwen3"))),
        backend="torch",
    )
    line = start_notice(run, trained="7 weights", folder=Path("out"))
    assert line.startswith("Qwen3: 7 weights are trained on ")
    assert line.endswith("(TP 2 DP 2, torch backend); checkpoints go to out")


def test_a_finished_run_says_how_to_go_on():
    point = SimpleNamespace(folder=Path("out/checkpoint-9"), trainer=SimpleNamespace(step=9))
    assert "the run is finished: out/checkpoint-9 has 9 of 8 steps" in finished_notice(
        point, total_steps=8
    )


def test_a_stopped_run_says_by_what_and_how_to_go_on():
    """T30."""
    assert stop_notice(15).startswith("stopped by SIGTERM after a save; the same command with ")
