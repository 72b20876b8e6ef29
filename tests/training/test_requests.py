import pytest

from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.requests import Answer, RankRequests
from tests.ranks import run_ranks

SIGTERM, SIGUSR1 = 15, 10


def ask(state: ParallelState, stops: list[int], writing: list[bool]) -> list[Answer]:
    requests = RankRequests(state.world)
    answers = []
    # Twice, so that an answer does not outlive its question.
    for stop, is_writing in ((stops[state.rank], writing[state.rank]), (0, False)):
        requests.ask(stop, is_writing=is_writing)
        answers.append(requests.answer())
    return answers


@pytest.mark.parametrize(
    ("stops", "writing", "answer"),
    [
        ([0, 0], [False, False], Answer(stop=0, is_writing=False)),
        ([0, SIGTERM], [False, True], Answer(stop=SIGTERM, is_writing=True)),
        ([SIGUSR1, SIGTERM], [True, True], Answer(stop=SIGTERM, is_writing=True)),
    ],
)
def test_every_rank_knows_what_any_rank_says(stops, writing, answer):
    """T30: a signal that came to one rank."""
    layout = ParallelLayout(world_size=2)
    for answers in run_ranks(layout, ask, stops, writing):
        assert answers == [answer, Answer(stop=0, is_writing=False)]
