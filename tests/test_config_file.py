"""Settings from a TOML file, and the words for those that are wrong."""

from pathlib import Path

import pytest

from rootstockd.config import Config
from rootstockd.config_file import ConfigError, make_config

DEFAULTS = {"socket": "/run/x/rootstockd.sock", "devices": ["cpu"]}


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write


def test_flags_go_before_the_file_and_the_file_before_defaults(write):
    file = write('models = ["emt"]\nmax_atoms = 10\nbatch_atoms = 7\nsocket = "/a/b.sock"\n')
    config = make_config({"max_atoms": 20, "models": None}, file, DEFAULTS)
    assert (config.max_atoms, config.models, config.batch_atoms) == (20, ("emt",), 7)
    assert config.socket == Path("/a/b.sock")
    assert config.devices[0].kind == "cpu"
    assert config.file == file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_atom = 3", "no setting 'max_atom'; did you mean 'max_atoms'?"),
        ("xyzzy = 3", "no setting 'xyzzy'; there are: "),
        ('max_atoms = "many"', "max_atoms: "),
        ("max_atoms = -1", "max_atoms: "),
        ('devices = ["cpu", "cuda:0"]', "devices: Value error, a daemon computes on CPUs or on GPUs, not on both"),
        ('devices = ["cpu:1", "cpu:1"]', "devices: Value error, a device is named twice"),
        ('devices = ["tpu"]', "devices.0.name: "),
        ("devices = []", "devices: "),
        ("keep_alive = -1", "keep_alive."),
        ('keep_alive = "a while"', "keep_alive."),
        ("max_atoms = ", "config.toml: "),
        ("[access]\nuser = ['a']", "no setting 'access.user'; did you mean 'users'?"),
        ("[users.alice]\nsesions = 2", "no setting 'users.alice.sesions'; did you mean 'sessions'?"),
        ("[users.alice]\nshare = 0", "users.alice.share: "),
    ],
)
def test_what_is_wrong_is_said(write, text, words):
    with pytest.raises(ConfigError) as caught:
        make_config({}, write(text), DEFAULTS)
    assert words in str(caught.value)
    assert "config.toml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        make_config({}, tmp_path / "none.toml", DEFAULTS)


def test_a_wrong_flag_is_not_blamed_on_the_file(write):
    with pytest.raises(ConfigError) as caught:
        make_config({"max_atoms": -1}, write(""), DEFAULTS)
    assert "config.toml" not in str(caught.value)


def test_relative_paths_start_at_the_file(write):
    file = write('catalogues = ["more.toml", "/abs.toml"]\nlog_file = "log"\nsocket = "run/d.sock"\n')
    config = make_config({}, file, DEFAULTS)
    assert config.catalogues == (file.parent / "more.toml", Path("/abs.toml"))
    assert (config.log_file, config.socket) == (file.parent / "log", file.parent / "run/d.sock")


def test_devices_and_keep_alive_survive_the_way_to_the_daemon(write):
    config = make_config({}, write('devices = ["cuda:0", "MIG-1-2"]\nkeep_alive = 3\n'), DEFAULTS)
    assert [str(device) for device in config.devices] == ["cuda:0", "MIG-1-2"] and config.keep_alive == 3
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert make_config({}, write('keep_alive = "forever"'), DEFAULTS).keep_alive == "forever"
