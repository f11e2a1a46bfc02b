"""Which backend the next worker does without."""

import pytest

from rootstock_client.errors import DeviceFailedError, LimitError, ModelLoadError
from rootstockd.processes.ends import End
from rootstockd.supervision.loading import Loading

CRASHED, KILLED = End("it was ended by signal 11", blamed=True), End("somebody killed it", blamed=False)


@pytest.mark.parametrize(
    ("end", "reported", "how"),
    [
        (CRASHED, None, CRASHED.how),
        (KILLED, None, None),
        (KILLED, DeviceFailedError("CUDA error: illegal instruction."), "CUDA error: illegal instruction"),
        (CRASHED, LimitError("no memory."), None),
        (CRASHED, ModelLoadError("no such file."), None),
    ],
)
def test_a_backend_is_dropped_for_what_it_did_and_no_more(end, reported, how):
    loading = Loading()
    loading.begin("starting")
    assert not loading.drop_backend(end, reported), "none is being tried"
    loading.trying = "fused"
    assert loading.drop_backend(end, reported) == (how is not None)
    assert loading.without == ({"fused": how} if how else {})
    loading.begin("starting")
    assert not loading.trying, "the next worker is not there yet"
    assert loading.without == ({"fused": how} if how else {}), "and will do without, too"


def test_where_memory_lacks_all_is_tried_once_more_and_then_one_backend_after_the_other_is_done_without():
    loading, lack = Loading(), LimitError("no memory.")
    loading.begin("starting")
    assert not loading.lacked_memory(lack), "none is being tried"
    for trying, without in (
        ("fused", {}),
        ("fused", {"fused": "no memory"}),
        ("by edges", {"fused": "no memory", "by edges": "no memory"}),
    ):
        loading.trying = trying
        assert loading.lacked_memory(lack)
        loading.begin("starting")
        assert loading.without == without


@pytest.mark.parametrize("how", ["done", "begin"])
def test_what_lacked_memory_is_tried_again_when_the_model_was_there_or_has_left(how):
    loading = Loading()
    loading.without["slow"] = CRASHED.how
    for _ in range(2):
        loading.trying = "fused"
        loading.lacked_memory(LimitError("no memory."))
    assert len(loading.without) == 2
    getattr(loading, how)()
    assert loading.without == {"slow": CRASHED.how}
    loading.trying = "fused"
    assert loading.lacked_memory(LimitError("no memory."))
    assert loading.without == {"slow": CRASHED.how}, "it may have been for a moment"


def test_how_long_it_took_is_known_until_it_is_loaded_again():
    loading = Loading()
    assert loading.seconds is None
    loading.begin()
    took = loading.done()
    assert 0 < took <= loading.elapsed
    assert loading.seconds == took
    loading.begin("starting")
    assert loading.seconds == took
