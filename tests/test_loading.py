"""Which backend the next worker does without."""

import pytest

from rootstock_client.errors import DeviceFailedError, LimitError, ModelLoadError
from rootstockd.processes.worker_process import End
from rootstockd.supervision.loading import Loading

CRASHED, KILLED = End("it was ended by signal 11", blamed=True), End("somebody killed it", blamed=False)


@pytest.mark.parametrize(
    ("end", "reported", "how"),
    [
        (CRASHED, None, CRASHED.how),
        (KILLED, None, None),
        (KILLED, DeviceFailedError("CUDA error: illegal instruction."), "CUDA error: illegal instruction."),
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


def test_how_long_it_took_is_known_until_it_is_loaded_again():
    loading = Loading()
    assert loading.seconds is None
    loading.begin()
    took = loading.done()
    assert 0 < took <= loading.elapsed
    assert loading.seconds == took
    loading.begin("starting")
    assert loading.seconds == took
