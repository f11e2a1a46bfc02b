"""Where models go and who goes for them, how GPUs are named, and what is remembered: without a daemon."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootstockd.fleet.device_manager import DeviceManager
from rootstockd.fleet.measured import FILE, HEAVY, LIGHT, Measured, Measurements
from rootstockd.fleet.placement import DeviceSpace, Resident, first_to_go, place, place_replica, shift, stays, to_evict
from rootstockd.host.devices import DeviceError, Gpu, Memory, find_devices, process_memory, visible_gpus
from rootstockd.processes.folders import WorkerFolders
from rootstockd.settings.config import Config, Device
from rootstockd.supervision.memory_use import CONTEXT, taken
from rootstockd.supervision.pace import SPAN, Pace
from rootstockd.worker.engines import ModelSpec

GB = 10**9

residents = st.builds(
    Resident,
    number=st.integers(0, 10**6),
    memory=st.integers(0, 50),
    last_use=st.floats(-1000, 0),
    idle=st.booleans(),
    kept=st.booleans(),
)
budgets = st.none() | st.integers(0, 120)


@st.composite
def spaces(draw: Callable[..., object]) -> list[DeviceSpace]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        inside = draw(st.lists(residents, max_size=6, unique_by=lambda resident: resident.number))
        found.append(DeviceSpace(number, draw(budgets), draw(st.floats(0, 3)), tuple(inside)))
    return found


# --- placement


@given(spaces(), st.integers(0, 130))
def test_a_model_goes_where_it_fits_once_who_goes_has_gone(devices: list[DeviceSpace], need: int) -> None:
    plan = place(need, devices)
    if plan is None:
        for space in devices:
            assert space.free + sum(resident.memory for resident in space.residents if resident.idle) < need
        return
    space = devices[plan.space]
    assert space.free + sum(resident.memory for resident in plan.evicted) >= need
    assert all(resident.idle and resident in space.residents for resident in plan.evicted)
    for spared in plan.evicted:  # nobody goes for nothing
        assert space.free + sum(t.memory for t in plan.evicted if t is not spared) < need
    if any(space.free >= need for space in devices):
        assert plan.evicted == ()


@given(spaces(), st.integers(0, 130))
def test_what_was_to_be_kept_goes_last(devices: list[DeviceSpace], need: int) -> None:
    plan = place(need, devices)
    if plan is None or not any(resident.kept for resident in plan.evicted):
        return
    for space in devices:  # nowhere is it enough that the others go
        assert to_evict(need, stays(space)) is None


@given(spaces(), st.integers(0, 130))
def test_of_the_idle_the_least_recently_used_goes(devices: list[DeviceSpace], need: int) -> None:
    for space in devices:
        evicted = to_evict(need, space)
        if not evicted:
            continue
        # whoever was used before the last to go and stays had nothing that helped
        last = max((t.kept, t.last_use) for t in evicted)
        earlier = [t for t in space.residents if t.idle and (t.kept, t.last_use) < last and t not in evicted]
        free = space.free + sum(t.memory for t in evicted)
        newest = max(evicted, key=lambda t: (t.kept, t.last_use))
        assert sum(t.memory for t in earlier) + free - newest.memory < need


@given(spaces(), st.integers(0, 130))
def test_a_replica_costs_nobody_anything(devices: list[DeviceSpace], need: int) -> None:
    plan = place_replica(need, devices)
    if plan is not None:
        assert plan.evicted == () and devices[plan.space].free >= need and devices[plan.space].load < 0.5


def test_models_spread_over_devices_with_room() -> None:
    devices = [DeviceSpace(number, 100, 0.0) for number in range(4)]
    where = []
    for number in range(8):
        plan = place(10, devices)
        assert plan is not None
        where.append(plan.space)
        space = devices[plan.space]
        devices[plan.space] = DeviceSpace(
            space.number, 100, 0.0, (*space.residents, Resident(number, 10, 0.0, idle=True))
        )
    assert sorted(where[:4]) == sorted(where[4:]) == [0, 1, 2, 3]


def test_nobody_goes_for_nothing_nor_one_who_was_to_be_kept_where_another_may() -> None:
    small, large = Resident(1, 10, -9.0, idle=True), Resident(2, 50, -1.0, idle=True)
    assert to_evict(40, DeviceSpace(0, 60, 0.0, (small, large))) == (large,)
    kept = Resident(3, 50, -99.0, idle=True, kept=True)
    assert place(40, [DeviceSpace(0, 50, 0.0, (kept,)), DeviceSpace(1, 50, 1.0, (large,))]).space == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(("limit", "now", "then"), [(None, 5, 95), (50, 5, 50), (2, 2, 2)])  # GB
def test_what_other_programs_have_is_not_there_and_may_be_later(limit: int | None, now: int, then: int) -> None:
    gpu = Device(name="cuda:0", uuid="GPU-1")
    spaces = DeviceManager(Config(socket=Path("/s"), devices=(gpu,), device_memory=limit and limit * GB))
    spaces._gpus[gpu.name] = Memory(total=100 * GB, free=10 * GB)
    (space,) = spaces.now([], [])
    assert (space.free, space.left(kept=True)) == (now * GB, then * GB)
    assert ("beside other programs" in spaces.describe([space], [])) == (now < then)


def test_what_a_worker_has_of_a_gpu_is_what_the_driver_says_or_else_what_it_says_itself() -> None:
    gpu = Memory(total=100 * GB, free=10 * GB, by_pid={7: 3 * GB})
    assert taken(gpu, 7, told=2 * GB) == 3 * GB
    assert taken(gpu, 8, told=2 * GB) == 2 * GB + CONTEXT
    assert taken(gpu, 8, told=0) == 0, "nothing is known"


def test_a_gpu_that_does_not_answer_is_nobodys_choice() -> None:
    gpus = tuple(Device(name=f"cuda:{i}", uuid=f"GPU-{i}") for i in range(3))
    spaces = DeviceManager(Config(socket=Path("/s"), devices=gpus))
    spaces._gpus.update({gpu.name: Memory(total=100 * GB, free=50 * GB) for gpu in (gpus[0], gpus[2])})
    assert [space.number for space in spaces.now([], [])] == [0, 2]
    spaces._gpus.clear()  # where the driver tells of none there is no limit that is known
    assert [space.free for space in spaces.now([], [])] == [math.inf] * 3


def test_a_device_with_less_to_do_goes_first() -> None:
    busy, calm = DeviceSpace(0, None, 0.9), DeviceSpace(1, None, 0.1, (Resident(1, 5, 0.0, idle=True),))
    assert place(1, [busy, calm]).space == 1  # type: ignore[union-attr]


@given(st.lists(residents, max_size=6))
def test_who_goes_first(inside: list[Resident]) -> None:
    first = first_to_go(inside)
    if first is None:
        assert not any(resident.idle for resident in inside)
    else:
        assert first.idle
        assert all((first.kept, first.last_use) <= (t.kept, t.last_use) for t in inside if t.idle)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=5))
def test_shares_of_work_come_closer_and_come_to_rest(queues: list[int]) -> None:
    for _ in range(300):
        if (moved := shift(queues)) is None:
            break
        source, target, count = moved
        assert count > 0
        before = max(queues) - min(queues)
        queues[source] -= count
        queues[target] += count
        assert max(queues) - min(queues) <= before
    assert max(queues) - min(queues) <= 1


# --- GPUs by name

A, B = Gpu("GPU-aaaa-1", "H100"), Gpu("GPU-bbbb-2", "H100")
PARTS = (Gpu("MIG-cccc-1", "H100 1g"), Gpu("MIG-cccc-2", "H100 2g"))
C = Gpu("GPU-cccc-3", "H100", PARTS)
MACHINE = [A, B, C]


@pytest.mark.parametrize(
    ("variable", "seen"),
    [
        (None, [A, B, *PARTS]),
        ("", []),
        ("-1", []),
        ("1", [B]),
        ("1,0", [B, A]),
        (" 1 , 0 ", [B, A]),
        ("0,7,1", [A]),  # what is behind an entry that means nothing is not seen
        ("0,0", [A]),
        ("2", [PARTS[0]]),  # a number means the first part
        ("GPU-b", [B]),
        ("GPU-", []),  # more than one
        ("MIG-cccc-2,GPU-aaaa-1", [PARTS[1], A]),
        ("NoDevFiles", []),
    ],
)
def test_what_a_program_sees(variable: str | None, seen: list[Gpu]) -> None:
    assert visible_gpus(MACHINE, variable) == seen


def named(*names: str) -> tuple[Device, ...]:
    return tuple(Device(name=name) for name in names)


def test_numbers_are_relative_to_what_is_seen_and_uuids_are_not() -> None:
    lost = [A, Gpu("", "does not answer: GPU is lost"), B]
    assert [device.uuid for device in find_devices(named("cuda:2"), lost, None)] == [B.uuid], "B keeps its number"
    with pytest.raises(DeviceError, match="cuda:1 does not answer"):
        find_devices(named("cuda:0", "cuda:1"), lost, None)
    found = find_devices(named("cuda:0", "cuda:1", "GPU-cccc-3"), MACHINE, "1,0")
    assert [device.uuid for device in found] == [B.uuid, A.uuid, PARTS[0].uuid]
    assert [str(device) for device in found] == ["cuda:0", "cuda:1", "GPU-cccc-3"]
    assert found[0].environment == {"CUDA_VISIBLE_DEVICES": B.uuid}
    assert find_devices(found, [], "") == found  # found once is found
    assert find_devices(named("MIG-cccc-2"), MACHINE, None)[0].uuid == "MIG-cccc-2"


@pytest.mark.parametrize(
    ("names", "variable", "words"),
    [
        (("cuda:4",), None, r"no GPU 4.*0 \(H100, GPU-aaaa-1\).*3 \(H100 2g, MIG-cccc-2\)"),
        (("cuda:1",), "1", r"no GPU 1.*with CUDA_VISIBLE_DEVICES=1.*0 \(H100, GPU-bbbb-2\)"),
        (("GPU-x",), None, "^this machine has no GPU GPU-x; "),
        (("MIG-c",), None, "^several GPUs begin with MIG-c; "),
        (("cuda:0", "GPU-aaaa-1"), None, "are the same, GPU-aaaa-1"),
        (("cuda:0",), "", "found.*: none"),
    ],
)
def test_devices_that_are_not_there(names: tuple[str, ...], variable: str | None, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        find_devices(named(*names), MACHINE, variable)


@pytest.mark.parametrize("name", ["cpu", "cpu:3", "cuda:0", "GPU-8932f937-d72c-4106", "MIG-GPU-8932f937/1/0"])
def test_names_of_devices(name: str) -> None:
    assert str(Device.model_validate(name)) == name
    assert Device.model_validate(name).kind == ("cpu" if name.startswith("cpu") else "cuda")


@pytest.mark.parametrize("name", ["", "gpu", "cpu:", "cpu:-1", "cuda", "0", "GPU-", "GPU-a\nb", "cuda:1,2"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="is not a device"):
        Device.model_validate(name)


# --- how fast, and how much


def test_a_pace_is_that_of_the_last_seconds() -> None:
    pace = Pace()
    assert (pace.rate, pace.load) == (0.0, 0.0)
    pace.sample(0.0, 0, 0.0)
    assert pace.rate == 0.0
    for second in range(1, 31):
        pace.sample(float(second), 10 * second, 0.5 * second)
    assert pace.rate == pytest.approx(10) and pace.load == pytest.approx(0.5)
    for second in range(31, 32 + int(SPAN)):
        pace.sample(float(second), 300, 15.0)
    assert (pace.rate, pace.load) == (0.0, 0.0)


def test_memory_of_a_process_that_is_there_and_one_that_is_not() -> None:
    mine = process_memory(os.getpid())
    assert mine is not None and 2**22 < mine < 2**40
    assert process_memory(2**22 + 1) is None


def test_the_memory_of_processes_with_any_name_however_deep() -> None:
    """What a model calls its process, and what it starts, is its own affair."""
    script = (
        "import ctypes, os, signal\n"
        "ctypes.CDLL(None).prctl(15, b'RssAnon:\\x0c\\xff\\xfe')\n"
        "for _ in range(700):\n"
        "    if os.fork():\n"
        "        os.wait()\n"
        "        os._exit(0)\n"
        "print('deep', flush=True)\n"
        "signal.pause()\n"
    )
    command = [sys.executable, "-I", "-S", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"deep\n"
            found = process_memory(process.pid)
            assert found is not None and found > 700 * 10**6
        finally:
            os.killpg(process.pid, signal.SIGKILL)


SPEC = ModelSpec("m", "ase", "cpu", "float64", arguments={"calculator": "x:Y"})
SEEN = Measured(loaded=100, memory=200, load_seconds=3.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def test_what_was_measured_is_remembered(folder: Path) -> None:
    first = Measurements()
    assert first.get(SPEC, "cpu") is None and not first.unsaved
    first.put(SPEC, "cpu", SEEN)
    assert first.unsaved
    first.save()
    assert not first.unsaved and [path.name for path in folder.iterdir()] == [FILE]
    second = Measurements()
    assert second.get(SPEC, "cpu") == SEEN
    # whatever may make a difference does
    for other in (
        ModelSpec("m", "ase", "cpu", "float32", arguments=SPEC.arguments),
        ModelSpec("m", "ase", "cpu", "float64", arguments={"calculator": "x:Z"}),
        ModelSpec("m", "ase", "cpu", "float64", sha256="0" * 64, arguments=SPEC.arguments),
    ):
        assert second.get(other, "cpu") is None
    assert second.get(SPEC, "NVIDIA H100") is None
    moved = ModelSpec("m", "ase", "cpu", "float64", weights="/elsewhere", confine=False, arguments=SPEC.arguments)
    assert second.get(moved, "cpu") == SEEN


def test_others_may_look_into_the_folder_whatever_the_umask(folder: Path) -> None:
    """What root's daemon makes is where weights for everybody come next."""
    measurements = Measurements()
    measurements.put(SPEC, "cpu", SEEN)
    before = os.umask(0o077)
    try:
        measurements.save()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_what_is_compiled_is_kept_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """002 is that of users with groups of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0o002)
    try:
        folders = WorkerFolders(SPEC)
    finally:
        os.umask(before)
    assert not folders.unkept
    folders.remove()


def test_two_daemons_do_not_overwrite_each_other(folder: Path) -> None:
    first, second = Measurements(), Measurements()
    first.put(SPEC, "cpu", SEEN)
    first.save()
    second.put(SPEC, "gpu", SEEN)
    second.save()
    third = Measurements()
    assert third.get(SPEC, "cpu") == third.get(SPEC, "gpu") == SEEN


def test_what_was_never_seen_is_guessed(folder: Path) -> None:
    """By the smallest of its kin that was seen, and by its weights."""
    measurements = Measurements()
    ase = ModelSpec("a", "ase", "cpu", "float64", environment="ase")
    other = ModelSpec("o", "ase", "cpu", "float64", environment="sevennet")
    assert measurements.guess(ase, "cpu", 0) == LIGHT and measurements.guess(other, "cpu", 10) == HEAVY + 20
    measurements.put(other, "cpu", SEEN)
    measurements.put(dataclasses.replace(other, name="larger"), "cpu", Measured(loaded=150, memory=900, load_seconds=1))
    new = dataclasses.replace(other, name="new")
    assert measurements.guess(new, "cpu", 10) == SEEN.loaded + 20
    assert measurements.guess(new, "NVIDIA H100", 10) == HEAVY + 20
    assert measurements.guess(ase, "cpu", 0) == LIGHT
    measurements.save()
    stored = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**stored, "no key": SEEN.model_dump(), "[]": SEEN.model_dump()}))
    assert Measurements().guess(new, "cpu", 10) == SEEN.loaded + 20


def test_a_little_more_or_less_is_the_same(folder: Path) -> None:
    measurements = Measurements()
    measurements.put(SPEC, "cpu", SEEN)
    measurements.save()
    measurements.put(SPEC, "cpu", Measured(loaded=101, memory=205, load_seconds=3.1))
    assert not measurements.unsaved
    measurements.put(SPEC, "cpu", Measured(loaded=101, memory=300, load_seconds=3.1))
    assert measurements.unsaved


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": {"loaded": -1}}', '{"a": 3}', "\x00\xff", "null"])
def test_a_damaged_file_is_as_good_as_none(folder: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    (folder / FILE).write_text(content)
    measurements = Measurements()
    assert measurements.get(SPEC, "cpu") is None
    assert "is ignored" in caplog.text
    measurements.put(SPEC, "cpu", SEEN)
    measurements.save()
    assert Measurements().get(SPEC, "cpu") == SEEN


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_is_as_good_as_none(folder: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    if kind == "fifo":
        os.mkfifo(folder / FILE)
    else:
        (folder / FILE).symlink_to("/dev/zero")
    measurements = Measurements()
    assert f"{folder / FILE} can't be read and is ignored: [Errno 22] it is no regular file" in caplog.text
    measurements.put(SPEC, "cpu", SEEN)
    measurements.save()
    assert Measurements().get(SPEC, "cpu") == SEEN


def test_where_nothing_can_be_written_it_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file where the folder should be")
    measurements = Measurements()
    for memory in (100, 1000):
        measurements.put(SPEC, "cpu", Measured(loaded=100, memory=memory, load_seconds=1.0))
        measurements.save()
    assert caplog.text.count("can't be saved") == 1
    known = measurements.get(SPEC, "cpu")
    assert known is not None and known.memory == 1000


def test_what_could_not_be_written_is_written_later(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And when it fails once more after that, it is said once more."""
    measurements = Measurements()
    for memory in (1000, 2000):
        folder.write_text("a file where the folder should be")
        for kind in ("cpu", "gpu"):
            measurements.put(SPEC, kind, Measured(loaded=100, memory=memory, load_seconds=1.0))
        assert measurements.unsaved
        measurements.save()
        assert measurements.unsaved and not measurements.due, "not at once"
        newest = Measured(loaded=100, memory=memory + 500, load_seconds=1.0)
        measurements.put(SPEC, "cpu", newest)
        folder.unlink()
        measurements.save()
        assert not measurements.unsaved
        later = Measurements()
        assert later.get(SPEC, "cpu") == newest and later.get(SPEC, "gpu") == measurements.get(SPEC, "gpu") is not None
        (folder / FILE).unlink()
        folder.rmdir()
    assert caplog.text.count("can't be saved") == 2


def test_numbers_that_are_none_are_not_believed(folder: Path) -> None:
    folder.mkdir()
    text = json.dumps({"k": {"loaded": 1, "memory": 1, "load_seconds": math.inf}})
    (folder / FILE).write_text(text)
    assert Measurements().get(SPEC, "cpu") is None
