import pytest

from tests.ranks import close_pool


@pytest.fixture(scope="session", autouse=True)
def ranks_end_with_the_session():
    yield
    close_pool()
