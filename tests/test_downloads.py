"""Downloads from a server that goes wrong, and what comes of them in the store."""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from fileserver import serving
from rootstock_client.errors import ModelLoadError
from rootstockd.models import pull as module
from rootstockd.models import store
from rootstockd.models.availability import located
from rootstockd.models.catalogue import Entry
from rootstockd.models.download import ATTEMPTS, DownloadError, Known, download
from rootstockd.models.pull import Wishes, pull
from rootstockd.models.whole_files import StoreError, lock

DATA = os.urandom(300_000)
OTHER = os.urandom(250_000)
FILE = "/models/some.model"


@pytest.fixture
def server():
    with serving() as server:
        server.files[FILE] = DATA
        yield server


@pytest.fixture
def fetch(server, tmp_path):
    """Download the server's file; what came of it, and what was said."""
    path, heard = tmp_path / "part", []

    def fetch(checksum_known=True, size=None, timeout=(5, 5), path=path):
        download(
            server.url(FILE),
            path,
            Known(checksum_known, size),
            progress=lambda done, total: heard.append((done, total)),
            say=heard.append,
            pause=0.01,
            timeout=timeout,
        )
        return path.read_bytes()

    fetch.path, fetch.heard = path, heard
    return fetch


def test_a_file(server, fetch):
    assert fetch(checksum_known=False) == DATA
    assert fetch.heard[0] == (0, len(DATA))
    assert fetch.heard[-1] == (len(DATA), len(DATA))
    assert [path.name for path in fetch.path.parent.iterdir()] == ["part"]
    assert server.requests[0]["Accept-Encoding"] == "identity"
    assert server.requests[0]["User-Agent"].startswith("rootstockd/")


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_a_connection_that_breaks_off_is_gone_on_with(server, fetch, how):
    server.faults += [f"{how} 98304", f"{how} 49152", f"{how} 0"]
    assert fetch(checksum_known=False) == DATA
    if how == "cut":
        assert server.ranges == ["all", "bytes=98304-", "bytes=147456-", "bytes=147456-"]
    else:  # a reset may take with it what was underway
        assert len(server.ranges) == 4
    assert any("trying again" in str(text) for text in fetch.heard)


def test_progress_gives_new_attempts(server, fetch):
    server.faults += ["cut 16384"] * (2 * ATTEMPTS)
    assert fetch() == DATA


def test_without_progress_it_is_given_up_and_the_next_call_goes_on(server, fetch):
    server.faults += ["cut 98304"] + ["503"] * (ATTEMPTS - 1)
    with pytest.raises(DownloadError, match="503.*98304 bytes are kept"):
        fetch()
    assert not server.faults
    assert fetch() == DATA
    assert server.ranges[-1] == "bytes=98304-"


def test_a_file_that_changes_in_between_is_fetched_anew(server, fetch):
    server.faults += ["cut 98304"] + ["503"] * (ATTEMPTS - 1)
    with pytest.raises(DownloadError):
        fetch()
    server.files[FILE] = OTHER
    assert fetch() == OTHER
    assert server.ranges[-1] == "bytes=98304-"


def test_a_part_of_another_address_is_not_gone_on_with(server, fetch):
    server.faults += ["cut 98304"] + ["503"] * (ATTEMPTS - 1)
    with pytest.raises(DownloadError):
        fetch()
    note = fetch.path.with_name("part.from")
    note.write_text(note.read_text().replace(FILE, "/elsewhere"))
    assert fetch() == DATA
    assert server.ranges[-1] == "all"


@pytest.mark.parametrize("version", ["last-modified", "nothing"])
def test_what_tells_versions(server, fetch, version):
    server.always |= {"no-etag", version}
    server.faults += ["cut 98304"]
    assert fetch() == DATA
    assert server.ranges == ["all", "all" if version == "nothing" else "bytes=98304-"]


def test_a_server_that_ignores_ranges(server, fetch):
    server.always.add("ignore-range")
    server.faults += ["cut 98304", "cut 196608"]
    assert fetch() == DATA


def test_a_server_that_ignores_ranges_and_never_gets_further(server, fetch):
    server.always.add("ignore-range")
    server.faults += ["cut 98304", "cut 49152"] * ATTEMPTS
    with pytest.raises(DownloadError):
        fetch()
    assert len(server.requests) == ATTEMPTS


def test_another_range_than_was_asked_for(server, fetch):
    server.faults += ["cut 98304", "wrong-range"]
    assert fetch() == DATA
    assert server.ranges == ["all", "bytes=98304-", "all"]


def test_all_of_it_was_there_already(server, fetch):
    server.faults += ["cut 98304"] + ["503"] * (ATTEMPTS - 1)
    with pytest.raises(DownloadError):
        fetch()
    with fetch.path.open("ab") as file:  # killed between the last byte and the name
        file.write(DATA[98_304:])
    assert fetch() == DATA
    assert server.ranges[-1] == "bytes=300000-"


def test_more_than_all_of_it_is_there(server, fetch):
    server.faults += ["cut 98304"] + ["503"] * (ATTEMPTS - 1)
    with pytest.raises(DownloadError):
        fetch()
    with fetch.path.open("ab") as file:
        file.write(DATA)
    assert fetch() == DATA
    assert server.ranges[-2:] == ["bytes=398304-", "all"]


def test_a_body_that_is_compressed_all_the_same(server, fetch):
    server.faults += ["gzip"]
    assert fetch(checksum_known=False) == DATA


def test_chunks_cut_off(server, fetch):
    server.faults += ["chunked 100000", "chunked"]
    assert fetch(checksum_known=False) == DATA


def test_a_body_whose_end_can_not_be_told(server, fetch):
    server.faults += ["no-length"]
    with pytest.raises(DownloadError, match="does not say how long the file is.*--sha256"):
        fetch(checksum_known=False)
    server.faults += ["no-length"]
    assert fetch(checksum_known=True) == DATA


@pytest.mark.parametrize(
    ("fault", "words"), [("404", "404 Not Found"), ("403", "403 Forbidden"), ("html", "a web page came")]
)
def test_what_will_not_pass_is_not_tried_again(server, fetch, fault, words):
    server.faults += [fault]
    with pytest.raises(DownloadError, match=words):
        fetch()
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", ["408", "429", "500", "502", "503", "504"])
def test_what_may_pass_is_waited_for(server, fetch, status):
    server.faults += [status]
    assert fetch() == DATA


def test_how_long_the_server_wants_to_be_left_alone(server, fetch):
    server.faults += ["503 1"]
    fetch()
    said = next(text for text in fetch.heard if isinstance(text, str))
    assert "503 Service Unavailable; trying again in 1.0 s" in said


def test_redirects(server, fetch):
    server.files["/other/place"] = DATA
    server.faults += ["redirect /other/place", "cut 98304", "redirect /other/place"]
    assert fetch() == DATA
    assert server.ranges == ["all", "all", "bytes=98304-", "bytes=98304-"]


def test_a_redirect_without_end(server, fetch):
    server.faults += [f"redirect {FILE}"] * 100
    with pytest.raises(DownloadError, match="redirects"):
        fetch()


def test_a_server_that_falls_silent(server, fetch):
    server.faults += ["stall"]
    assert fetch(timeout=(5, 0.3)) == DATA
    assert any("timed out" in str(text) for text in fetch.heard)


def test_nobody_listens(fetch, server):
    with pytest.raises(DownloadError, match="Connection refused"):
        download("http://127.0.0.1:1/x", fetch.path, Known(True), progress=print, say=fetch.heard.append, pause=0.01)


def test_a_name_that_nobody_knows(fetch, monkeypatch):
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(DownloadError) as caught:
        download("http://files.invalid/x", fetch.path, Known(True), progress=print, say=fetch.heard.append, pause=0.01)
    assert re.search(r"the name files\.invalid can't be looked up: [A-Z].* name", str(caught.value)), caught.value
    assert "https_proxy" in str(caught.value) and "--mirror" in str(caught.value)
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:80")
    with pytest.raises(DownloadError, match="the proxy's name can't be looked up"):
        download("http://files.invalid/x", fetch.path, Known(True), progress=print, say=fetch.heard.append, pause=0.01)


def test_a_proxy_of_the_environment(server, fetch, monkeypatch):
    server.files["http://files.invalid/x.model"] = DATA
    monkeypatch.setenv("HTTP_PROXY", server.url(""))
    monkeypatch.setenv("http_proxy", server.url(""))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    download("http://files.invalid/x.model", fetch.path, Known(True), progress=lambda *_: None, say=print)
    assert fetch.path.read_bytes() == DATA


@pytest.fixture
def certificate(tmp_path):
    """A certificate for this machine, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl here")
    path = tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    named = ["-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", tmp_path / "c"]
    subprocess.run([*made, *named], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + (tmp_path / "c").read_bytes())
    return path


def test_over_tls(server, fetch, certificate, monkeypatch):
    """Certificates count, and from https nothing leads to http."""
    with serving(certificate) as secure:
        secure.files[FILE] = DATA
        monkeypatch.setattr(server, "url", secure.url)
        with pytest.raises(DownloadError, match="its certificate is not accepted"):
            fetch()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        secure.faults += [f"redirect http://127.0.0.1:{server.port}{FILE}"]
        with pytest.raises(DownloadError, match="anybody on the way could change"):
            fetch()
        assert not fetch.path.exists() and not server.requests  # it did not even go there
        assert fetch() == DATA


@pytest.mark.parametrize("fault", ["no-total", "other-total"])
def test_the_rest_of_a_file_of_another_length(server, fetch, fault):
    """What was said of the whole file counts, and what says another is no part of it."""
    server.faults += ["cut 49152", fault]
    assert fetch() == DATA
    assert server.ranges == ["all", "bytes=49152-", *["all"] * (fault == "other-total")]


def test_a_full_disk(server, fetch, tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match=f"no room in {tmp_path}"):
        fetch(path=tmp_path / "full")


def test_a_pipe_in_place_of_the_part_file_is_not_waited_for(server, fetch, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.from")
    with pytest.raises(DownloadError, match="No such device or address"):
        fetch(path=tmp_path / "pipe")


def test_a_file_larger_than_the_disk(server, fetch, monkeypatch):
    free = os.statvfs(fetch.path.parent).f_bavail * os.statvfs(fetch.path.parent).f_frsize
    monkeypatch.setitem(server.files, FILE, _Huge(free * 2))
    with pytest.raises(DownloadError, match=r"no room.*MB are needed"):
        fetch(size=free * 2)
    assert fetch.path.stat().st_size == 0


def test_a_file_larger_than_any_model(fetch, server, monkeypatch):
    monkeypatch.setitem(server.files, FILE, _Huge((16 << 30) + 1))
    with pytest.raises(DownloadError, match="more than 16 GiB, as no model has"):
        fetch()
    assert not fetch.path.exists()


@pytest.mark.parametrize("fault", ["chunked", "no-length", "gzip"])
def test_more_than_was_expected_is_not_written(fetch, server, fault):
    """Where the server does not say how much will come, it is stopped as soon as it is too much."""
    server.faults += [fault]
    with pytest.raises(DownloadError, match="more than the 100000 bytes that were expected"):
        fetch(size=100_000)
    assert not fetch.path.exists()
    assert max(done for done, _ in fetch.heard) <= 100_000


class _Huge(bytes):
    """Says that it is larger than it is."""

    def __new__(cls, size):
        made = super().__new__(cls, b"x" * 1000)
        made.size = size
        return made

    def __getitem__(self, key):
        return self

    def __len__(self):
        return self.size


# --- into the store


@pytest.fixture
def state(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def entry(server):
    return Entry(family="mace", url=server.url(FILE))


def wishes(**more):
    heard = []
    made = Wishes(accept=lambda _: True, say=heard.append, progress=lambda *_: None, pause=0.01, **more)
    made.__dict__["heard"] = heard
    return made


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_first_file_is_pinned(server, state, entry):
    stored = pull("mine", entry, wishes())
    assert stored.weights == state / "weights" / f"{digest(DATA)}.model"
    assert stored.weights.read_bytes() == DATA
    assert stored.record.pinned == "its first use"
    assert (stored.weights.stat().st_mode & 0o777, state.stat().st_mode & 0o777) == (0o644, 0o755)
    assert located("mine", entry).sha256 == digest(DATA)
    assert pull("mine", entry, wishes()) == stored
    assert len(server.requests) == 1
    stored.weights.unlink()
    server.files[FILE] = OTHER
    with pytest.raises(StoreError, match=f"{digest(OTHER)}, where {digest(DATA)} was expected"):
        pull("mine", entry, wishes())
    assert not stored.weights.exists()
    server.files[FILE] = DATA
    assert pull("mine", entry, wishes()).weights.read_bytes() == DATA


def test_the_catalogue_knows_the_right_file(server, state, entry):
    right = entry.model_copy(update={"sha256": digest(DATA).upper()})
    wrong = entry.model_copy(update={"sha256": digest(OTHER)})
    assert pull("mine", right, wishes()).record.pinned == "the catalogue"
    with pytest.raises(StoreError, match="is not the file that is meant"):
        pull("other", wrong, wishes())
    assert store.find("other") is None
    assert not list(state.glob("weights/other.part*"))
    with pytest.raises(StoreError, match="which file is the right one"):
        pull("mine", right, wishes(sha256=digest(OTHER)))


def test_the_user_knows_the_right_file(server, state, entry):
    with pytest.raises(StoreError, match="is not the file that is meant"):
        pull("mine", entry, wishes(sha256=digest(OTHER)))
    assert pull("mine", entry, wishes(sha256=digest(DATA))).record.pinned == "the user"


def test_a_body_that_is_corrupted_on_the_way(server, state, entry):
    server.faults += ["corrupt"]
    right = entry.model_copy(update={"sha256": digest(DATA)})
    with pytest.raises(StoreError, match="damaged on the way"):
        pull("mine", right, wishes())
    assert pull("mine", right, wishes()).weights.read_bytes() == DATA


def test_pieces_that_do_not_fit_are_fetched_anew(server, state, entry):
    """The server says that the file is the same, and it is not."""
    server.always |= {"no-etag", "last-modified"}
    right = entry.model_copy(update={"sha256": digest(DATA)})
    server.files[FILE] = OTHER
    server.faults += ["cut 98304"] + ["503"] * (ATTEMPTS - 1)
    with pytest.raises(DownloadError):
        pull("mine", right, wishes())
    server.files[FILE] = DATA
    assert pull("mine", right, wishes()).weights.read_bytes() == DATA
    assert server.ranges[-2:] == ["bytes=98304-", "all"]


def test_of_another_size_than_the_catalogue_says(server, state, entry):
    with pytest.raises(DownloadError, match="300000 bytes, where 299999 were expected"):
        pull("mine", entry.model_copy(update={"size": 299_999}), wishes())


def test_another_address_is_another_file(server, state, entry):
    pull("mine", entry, wishes())
    moved = entry.model_copy(update={"url": server.url("/new.model")})
    assert store.weights_of("mine", moved) is None
    server.files["/new.model"] = OTHER
    assert pull("mine", moved, wishes()).weights.read_bytes() == OTHER


def test_two_at_once(server, state, entry):
    """The second waits, and finds what the first has pulled."""
    server.faults += ["hold 100000"]
    hopes, found = [wishes(), wishes()], []
    threads = [threading.Thread(target=lambda hope=hope: found.append(pull("mine", entry, hope))) for hope in hopes]
    threads[0].start()
    assert server.holding.wait(20)
    threads[1].start()
    for _ in range(1000):
        if hopes[1].heard:
            break
        threading.Event().wait(0.02)
    assert hopes[1].heard == ["another command is working on mine; waiting for it"]
    server.go.set()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1
    assert found[0] == found[1]
    assert not list(state.glob("weights/*.lock"))


def test_one_at_a_time_though_every_lock_is_removed(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(30):
            with lock(tmp_path, "mine", lambda _: None):
                inside.append(1)
                most.append(len(inside))
                threading.Event().wait(0.0001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 180
    assert not list(tmp_path.iterdir())


def test_one_file_of_two_models(server, state, entry):
    pull("mine", entry, wishes())
    pull("yours", entry, wishes())
    assert len(server.requests) == 1
    folder = state / "weights"
    assert store.remove(folder, "mine") == 0
    assert located("yours", entry).weights.is_file()
    (folder / "damaged.json").write_text("no record")
    with pytest.raises(StoreError, match="damaged"):  # which may have the same file
        store.remove(folder, "yours")
    assert located("yours", entry).weights.is_file()
    (folder / "damaged.json").unlink()
    assert store.remove(folder, "yours") == len(DATA)
    assert not list(folder.glob("*.model"))


@pytest.mark.parametrize("kind", ["folder", "home", "url"])
def test_a_mirror_and_nothing_else(server, state, entry, tmp_path, monkeypatch, kind):
    offline = entry.model_copy(update={"url": "http://files.invalid/a%20b/some.model?raw=true"})
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    mirror = {"folder": str(tmp_path), "home": f"~/{tmp_path.name}", "url": server.url("/mirror/")}[kind]
    with pytest.raises((StoreError, DownloadError), match="some.model") as caught:
        pull("mine", offline, wishes(mirror=mirror))
    if kind != "url":
        assert str(caught.value) == (
            f"the mirror has no {tmp_path}/some.model, which would be its copy of {offline.url}."
        )
    (tmp_path / "some.model").write_bytes(DATA)
    server.files["/mirror/some.model"] = DATA
    stored = pull("mine", offline, wishes(mirror=mirror))
    assert stored.weights.read_bytes() == DATA
    assert stored.record.url == offline.url
    assert stored.record.source == (server.url("/mirror/some.model") if kind == "url" else f"{tmp_path}/some.model")


def test_a_mirror_with_another_file(server, state, entry, tmp_path):
    (tmp_path / "some.model").write_bytes(OTHER)
    with pytest.raises(StoreError, match="not the file that is meant"):
        pull("mine", entry, wishes(mirror=str(tmp_path), sha256=digest(DATA)))


@pytest.mark.parametrize("known", ["checksum", "the catalogue's own", ""])
@pytest.mark.parametrize("name", ["somev1_0model", "some-v1_0.model"])
def test_what_mace_torch_has_downloaded_is_copied(server, state, tmp_path, monkeypatch, name, known):
    """Where it is known which file it is: others' may be called so, too, as mace_run_train calls all of them."""
    entry = Entry(family="mace", url=server.url("/x/some-v1_0.model"))
    server.files["/x/some-v1_0.model"] = DATA
    if known == "the catalogue's own":
        monkeypatch.setattr(module, "_well_known", lambda: {entry.url})
    cached = tmp_path / "cache/mace" / name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(DATA)
    stored = pull("mine", entry, wishes(sha256=digest(DATA) if known == "checksum" else ""))
    assert stored.record.source == (str(cached) if known else entry.url)
    assert stored.weights.read_bytes() == DATA
    assert bool(server.requests) is not bool(known)


def test_addresses_of_the_catalogue_are_well_known():
    assert any(url.endswith(".model") and "mace" in url for url in module._well_known())


def test_weights_that_are_called_like_a_record(server, state):
    """What is stored of others can be told from them, and removed."""
    entry = Entry(family="noop", url=server.url("/x/weights.json"))
    server.files["/x/weights.json"] = b"{}"
    stored = pull("mine", entry, wishes())
    assert stored.weights.suffix == ".json" and [name for name, _ in store.all_stored()] == ["mine"]
    assert store.remove(stored.folder, "mine") == 2 and not list(stored.folder.glob("*.json"))


@pytest.mark.parametrize("why", ["another file", "others may write"])
def test_what_mace_torch_has_downloaded_is_not_believed(server, state, entry, tmp_path, why):
    cached = tmp_path / "cache/mace/somemodel"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(OTHER if why == "another file" else DATA)
    cached.chmod(0o666 if why == "others may write" else 0o644)
    hope = wishes(sha256=digest(DATA))
    assert pull("mine", entry, hope).record.source == entry.url
    assert str(cached) in hope.heard[0]


def test_a_licence(server, state, entry):
    strict = entry.model_copy(update={"accept_licence": True, "licence": "ASL"})
    asked = []
    no = Wishes(accept=lambda e: asked.append(e) or False, say=print, progress=print)
    yes = Wishes(accept=lambda e: asked.append(e) or True, say=print, progress=lambda *_: None)
    with pytest.raises(StoreError, match="the licence of mine was not accepted"):
        pull("mine", strict, no)
    assert not server.requests
    record = pull("mine", strict, yes).record
    assert record.licence_accepted.endswith("+00:00")
    Path(store.own_folder(), record.original.name).unlink()
    assert pull("mine", strict, no).record.licence_accepted == record.licence_accepted  # once is enough
    assert len(asked) == 2


@pytest.mark.parametrize("what", ["", "weights", "weights/mine.json"])
def test_a_store_that_others_can_write_is_not_believed(server, state, entry, what):
    pull("mine", entry, wishes())
    (state / what).chmod((state / what).stat().st_mode | 0o002)
    with pytest.raises(ModelLoadError, match="all users may write to"):
        located("mine", entry)


def test_what_was_not_pulled(state, entry):
    with pytest.raises(ModelLoadError, match="not on this machine") as caught:
        located("mine", entry)
    assert "rootstockd models pull mine" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_disk_without_room_for_the_record(tmp_path):
    """A file that no record has would stay for ever."""
    source, folder = tmp_path / "source", tmp_path / "small"
    source.write_bytes(DATA)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k,mode=755", "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        stored = store.copy_in(source, folder, folder / "mine.copy", ".model")
        with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        record = store.Record(original=stored, source="there", pinned="the user", when="now")
        with pytest.raises(StoreError, match="the record of mine was not kept: there is no room in"):
            store.write_record(folder, "mine", record)
        assert [path.name for path in folder.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)
