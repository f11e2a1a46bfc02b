"""Settings from TOML files, and the words for those that are wrong."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from rootstockd.environments.specification import SpecificationError, read_specification
from rootstockd.models.catalogue import CatalogueError, read_catalogue
from rootstockd.settings.config import Config, SettingsFile
from rootstockd.settings.config_file import ConfigError, read_config_file
from rootstockd.settings.config_layers import make_config
from rootstockd.settings.toml_file import MOST_BYTES, MOST_PARTS, read_toml

DEFAULTS = {"socket": "/run/x/rootstockd.sock", "devices": ["cpu"]}
KEY = ".".join(MOST_PARTS * "a")
"""As long as a key may be."""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write


def named(path: Path, flags: dict[str, object] | None = None) -> Config:
    return make_config((SettingsFile(path=path, named=True),), {}, flags or {}, DEFAULTS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_atom = 3", "no setting 'max_atom'; did you mean 'max_atoms'?"),
        ("xyzzy = 3", "no setting 'xyzzy'; there are: "),
        ("[xyzzy]", "no setting 'xyzzy'; there are: "),
        ("bogus2 = 3", "no setting 'bogus2'; there are: socket, devices"),
        ("broken = 3", "no setting 'broken'; there are: socket, devices"),
        ("sessions = 3", "no setting 'sessions'; did you mean 'limits.sessions'?"),
        ("[limits]\nmax_sessions = 3", "no setting 'limits.max_sessions'; did you mean 'max_sessions'?"),
        ("files = []", "no setting 'files'; "),
        ('max_atoms = "many"', "max_atoms: 'many' is not an integer."),
        ("max_atoms = -1", "max_atoms: -1 is less than 1."),
        *(
            (f"{name} = 1_000_000_001", f"{name}: 1000000001 is more than 1000000000.")
            for name in ("max_atoms", "total_atoms", "max_sessions", "batch_atoms", "limits.sessions", "limits.queued")
        ),
        ("[users.a]\natoms = 1_000_000_001", "users.a.atoms: 1000000001 is more than 1000000000."),
        (f"worker_memory = {2**63}", f"worker_memory: {2**63} is more than {2**50}."),
        (f"device_memory = {2**63}", f"device_memory: {2**63} is more than {2**50}."),
        *(
            (
                f'[access]\n{name} = ["a", "b\\u0000"]',
                f"access.{name}.1: 'b\\x00' is no name: it has control characters.",
            )
            for name in ("users", "groups", "admins")
        ),
        ('access.socket_group = "a\\n"', "access.socket_group: 'a\\n' is no name: it has control characters."),
        ('[users."a\\u0000"]\nsessions = 3', "users: 'a\\x00' is no name: it has control characters."),
        ('models = ["\\u001b[1m"]', "models.0: '\\x1b[1m' is no name: it has control characters."),
        ('catalogues = ["a", "b\\u0000"]', "catalogues.1: 'b\\x00' is no path: it has a NUL."),
        *(
            (f'{name} = "{path}\\u0000b"', f"{name}: '{path}\\x00b' is no path: it has a NUL.")
            for name in ("socket", "log_file")
            for path in ("/a", "a", "~a")
        ),
        ("hang_timeout = 1e-9", "hang_timeout: 1e-09 is less than 0.1."),
        ("load_timeout = 0.01", "load_timeout: 0.01 is less than 0.1."),
        ("limits = 5", "limits: 5 is not a table of fields."),
        ('devices = ["cpu", "cuda:0"]', "devices: a daemon computes on CPUs or on GPUs, not on both"),
        ('devices = ["cpu:1", "cpu:1"]', "devices: a device is named twice"),
        ('devices = ["cpu", "tpu"]', "devices.1: 'tpu' is not a device: cpu, cpu:1, cuda:0, or the UUID"),
        ("devices = []", "devices: there is none, and at least one is needed."),
        ('metrics = "9746"', "metrics: '9746' is not HOST:PORT, such as 127.0.0.1:9746 (ports end at 65535)."),
        ('metrics = "127.0.0.1:65536"', "metrics: '127.0.0.1:65536' is not HOST:PORT"),
        ('device_memory = "8GB"', "device_memory: '8GB' has a unit; write it in bytes: 8_000_000_000."),
        ('worker_memory = "1.5 GiB"', "worker_memory: '1.5 GiB' has a unit; write it in bytes: 1_610_612_736."),
        ('drain_timeout = "60s"', "drain_timeout: '60s' has a unit; write it in seconds: 60."),
        ('keep_alive = "1h"', "keep_alive: '1h' has a unit; write it in seconds: 3_600."),
        ('keep_alive = "8GB"', "keep_alive: '8GB' is not a number; it can also be 'forever'."),
        *(
            (
                f"{name} = inf",
                f"{name}: inf is not a finite number; where there shall be no limit, write a large one: 1e9.",
            )
            for name in ("room_timeout", "drain_timeout", "hang_timeout", "load_timeout")
        ),
        ('socket = ""', "socket: it names no file."),
        ('log_file = ""', "log_file: it names no file."),
        ('socket = "a.control"', "socket: a.control is what another file of the daemon is called; call it a.sock."),
        ('socket = "a.lock"', "socket: a.lock is what another file of the daemon is called; call it a.sock."),
        ("keep_alive = true", "keep_alive: true is not a number."),
        ("device_memory = true", "device_memory: true is not a number."),
        ("max_atoms = true", "max_atoms: true is not a number."),
        ("[limits]\nqueued = false", "limits.queued: false is not a number."),
        ("[users.alice]\nshare = true", "users.alice.share: true is not a number."),
        ("max_atoms = 3\nmax_sessions = 4\nmax_atoms = 5\n", "config.toml: max_atoms is set twice, again in line 3."),
        ("[limits]\natoms = 3\natoms = 5", "config.toml: atoms is set twice, again in line 3."),
        ("models = []\nmodels = [\n'emt',\n]\n", "config.toml: models is set twice, again in line 2."),
        ("[users.a]\natoms = 3\n[users.a]\n", "config.toml: users.a is set twice, again in line 3."),
        ("keep_alive = -1", "keep_alive: -1 is less than 0; it can also be 'forever'."),
        ('keep_alive = "a while"', "keep_alive: 'a while' is not a number; it can also be 'forever'."),
        ("max_atoms = ", "config.toml: "),
        ("[limits]\nshare = 0", "limits.share: 0 is less than 0.001."),
        ("[limits]\nshare = 1e-310", "limits.share: 1e-310 is less than 0.001."),
        ("[limits]\nshare = 1e308", "limits.share: 1e+308 is more than 1000"),
        ("[access]\nuser = ['a']", "no setting 'access.user'; did you mean 'access.users'?"),
        ("[limits]\nsesions = 2", "no setting 'limits.sesions'; did you mean 'limits.sessions'?"),
        ("[users.alice]\nsesions = 2", "no setting 'users.alice.sesions'; did you mean 'users.alice.sessions'?"),
        ("[users.alice]\nshare = 0", "users.alice.share: "),
    ],
)
def test_what_is_wrong_is_said(write, text, words):
    with pytest.raises(ConfigError) as caught:
        named(write(text))
    assert words in str(caught.value)
    assert "config.toml" in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(write):
    with pytest.raises(ConfigError) as caught:
        named(write("keep_alive = 7\nmax_atom = 3\nmax_sessions = 0\n[limits]\nshare = 0"), {"batch_atoms": -1})
    lines = str(caught.value).splitlines()
    assert caught.value.rest.keep_alive == 7  # what is right can be looked at
    assert [line.rpartition(".toml: ")[2].split(":")[0] for line in lines] == [
        "batch_atoms",
        "max_sessions",
        "limits.share",
        "there is no setting 'max_atom'; did you mean 'max_atoms'?",
    ]
    assert "config.toml" not in lines[0]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        named(tmp_path / "none.toml")


def test_a_file_that_all_may_write_is_refused(write):
    path = write("")
    path.chmod(0o646)
    with pytest.raises(ConfigError, match="chmod o-w"):
        named(path)
    named(Path(os.devnull))  # which is no file, and sets nothing


def test_a_path_that_json_has_no_words_for():
    with pytest.raises(ConfigError, match=r"socket: '/a\\udcff\.sock' is not UTF-8\."):
        make_config((), {}, {"socket": Path(os.fsdecode(b"/a\xff.sock"))}, DEFAULTS)


def test_variables_are_checked_as_files_are():
    with pytest.raises(ConfigError, match=r"^ROOTSTOCKD_ACCESS__SOCKET_GROUP: access.socket_group: 'a\\n' is no name"):
        make_config((), {"ROOTSTOCKD_ACCESS__SOCKET_GROUP": "a\n"}, {}, DEFAULTS)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="it is a folder, and no file"):
        named(tmp_path)
    with pytest.raises(CatalogueError, match="it is a folder, and no file"):
        read_catalogue(tmp_path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.toml")
    with pytest.raises(ConfigError, match="it is no regular file"):
        named(tmp_path / "config.toml")


@pytest.mark.parametrize(
    "text",
    [f"x = {3000 * '['}{3000 * ']'}", f"x = {3000 * '{a = '}1{3000 * '}'}", f"users{3000 * '.a'} = 1"],
    ids=["lists", "tables", "key"],
)
def test_nesting_without_end_is_an_error_like_others(write, text):
    path = write(text)
    with pytest.raises(ConfigError, match=r"config\.toml: "):
        named(path)
    with pytest.raises(CatalogueError, match=r"config\.toml: "):
        read_catalogue(path)
    with pytest.raises(SpecificationError, match=r"config\.toml: "):
        read_specification(path)


def test_a_file_is_read_up_to_a_size(tmp_path):
    """A large one of nothing takes no room on disk, and would take all of the memory."""
    path = tmp_path / "config.toml"
    path.write_text("#" * MOST_BYTES)
    assert read_toml(path) == {}
    with path.open("wb") as file:
        file.truncate(100_000_000)
    words = r"config\.toml: it has more than 524,288 bytes\."
    tracemalloc.start()
    with pytest.raises(ConfigError, match=words):
        named(path)
    assert tracemalloc.get_traced_memory()[1] < 10 * MOST_BYTES
    tracemalloc.stop()
    with pytest.raises(CatalogueError, match=words):
        read_catalogue(path)
    with pytest.raises(SpecificationError, match=words):
        read_specification(path)


@pytest.mark.parametrize(
    "text",
    [
        "a.KEY = 1",
        "[a.KEY]",
        "[[ a.KEY ]]",
        "x = [1.5, {a.KEY = 1}]",
        "'a' " + 16 * """.'' . "=#]" """ + "= 1",
        r"""x = "\\" # '''""" + "\na.KEY = 1",
        r'x = """\"""" # \\"""""' + "\na.KEY = 1",
        r"x = '\'" + "\ny = ''''a\\''''\na.KEY = 1",
    ],
)
def test_keys_have_only_so_many_parts(write, text):
    with pytest.raises(ValueError, match=r"^a key of it has more than 32 parts\.$"):
        read_toml(write(text.replace("KEY", KEY)))
    read_toml(write(text.replace("a.KEY", KEY).replace("'a' .", "")))


def test_a_key_of_thousands_of_parts_takes_no_memory(write):
    path = write("a" + 20_000 * ".a" + " = 1")
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"config\.toml: a key of it has more than 32 parts\."):
        named(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "# a.KEY",
        "x = 'a.KEY'",
        r'x = "\"a.KEY" # b',
        "x = '''\n'a.KEY''''",
        'x = """\n\\"""a.KEY"""""',
        f"x = [{99 * '1.5, '}]",
        f"x = [\n{99 * '1.5, {a.b = 2.5}, '}]",
    ],
)
def test_dots_elsewhere_are_no_parts_of_keys(write, text):
    assert len(read_toml(write(text.replace("KEY", KEY)))) == text.startswith("x")


@pytest.mark.parametrize("line", ["[" + 5_000 * " ", 100_000 * " ", 100_000 * "["], ids=["table", "blanks", "brackets"])
def test_a_key_that_is_there_twice_is_found_at_once(write, line):
    path = write(f'a = 1\na = """\n{line}\n"""')
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"^a is set twice, again in line 2\.$"):
        read_toml(path)
    assert time.monotonic() - begun < 5


def test_of_many_wrong_settings_some_are_named(write):
    path = write("max_atoms = 7\n" + "".join(f"a{number} = 1\n" for number in range(30_000)))
    begun = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        read_config_file(SettingsFile(path=path))
    assert time.monotonic() - begun < 20
    *first, last = str(caught.value).splitlines()
    assert len(first) == 50 and "there is no setting 'a49'" in first[-1]
    assert last == f"configuration {path}: more is wrong than is listed here."
    assert caught.value.rest == {"max_atoms": 7}


def test_relative_paths_start_at_the_file(write):
    file = write('catalogues = ["more.toml", "/abs.toml"]\nlog_file = "log"\nsocket = "run/d.sock"\n')
    config = named(file)
    assert config.catalogues == (file.parent / "more.toml", Path("/abs.toml"))
    assert (config.log_file, config.socket) == (file.parent / "log", file.parent / "run/d.sock")


def test_a_wave_is_a_home(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = named(write('catalogues = ["~/more.toml"]\nlog_file = "~/log"\nsocket = "~/d.sock"\n'))
    assert (config.log_file, config.socket) == (Path("/home/me/log"), Path("/home/me/d.sock"))
    assert config.catalogues == (Path("/home/me/more.toml"),)


def test_devices_and_keep_alive_survive_the_way_to_the_daemon(write):
    config = named(write('devices = ["cuda:0", "MIG-1-2"]\nkeep_alive = 3\n'))
    assert [str(device) for device in config.devices] == ["cuda:0", "MIG-1-2"] and config.keep_alive == 3
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert named(write('keep_alive = "forever"')).keep_alive == "forever"
