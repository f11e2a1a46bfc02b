"""A daemon's settings from several files, variables and flags: which counts, where it comes from, and what is shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import rootstock_client
import rootstockd
from conftest import ALL_OF_RICH, RunningDaemon
from conftest import rootstockd as command
from rootstock_client import RootstockClient
from rootstockd.host.devices import choose_devices
from rootstockd.settings.config import Config, Settings, SettingsFile
from rootstockd.settings.config_file import ConfigError, all_settings, reloadable
from rootstockd.settings.config_layers import (
    OTHER_VARIABLES,
    VARIABLES,
    make_config,
    read_again,
    take_over,
    unknown_variables,
)

DEFAULTS = {"socket": "/run/x/rootstockd.sock", "devices": ["cpu"]}
TABLE = Path(__file__).parent.parent / "docs" / "configuration.md"

AS_USER = f"""
import os, sys
from rootstockd.cli import main
list(main.commands.values())
{ALL_OF_RICH}
import rootstockd.models.catalogue
if int(sys.argv[1]) != os.geteuid():
    os.setgroups([])
    os.setgid(int(sys.argv[1]))
    os.setuid(int(sys.argv[1]))
main(sys.argv[2:])
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of a site and of a user, empty and open to all; nothing is set by the environment."""
    for name in [name for name in os.environ if name in VARIABLES]:
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="rootstockd-") as made:
        folder = Path(made)
        for path in (folder, folder / "site", folder / "home", folder / "home/rootstockd"):
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
        monkeypatch.setenv("ROOTSTOCKD_SITE", str(folder / "site"))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "home"))
        yield folder


@pytest.fixture
def user(folder: Path) -> int:
    """Whoever runs a daemon of their own; nobody in particular where the tests run as root."""
    uid = os.geteuid() or 12345
    for path in (folder / "home", folder / "home/rootstockd"):
        os.chown(path, uid, -1)
    return uid


def write(path: Path, text: str, owner: int = -1) -> None:
    path.write_text(text)
    path.chmod(0o644)
    os.chown(path, owner, -1)


def run_as(uid: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_USER, str(uid), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        env={**os.environ, **environment},
    )


def shown(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def combined(*texts: str, tmp_path: Path, variables: dict[str, str] | None = None, **flags: object) -> Config:
    """Settings from files, the weakest first, with variables and flags over them."""
    files = []
    for number, text in enumerate(texts):
        write(tmp_path / f"{number}.toml", text)
        files.append(SettingsFile(path=tmp_path / f"{number}.toml"))
    return make_config(tuple(files), variables or {}, flags, DEFAULTS)


def test_the_later_goes_before_the_earlier(tmp_path: Path) -> None:
    config = combined(
        'max_atoms = 1\nmax_sessions = 1\nbatch_atoms = 1\nmodels = ["a", "b"]\n[limits]\nsessions = 1\natoms = 1\n'
        "[users.alice]\nsessions = 1\nshare = 1\n",
        'max_sessions = 2\nbatch_atoms = 2\nmodels = ["c"]\n[limits]\natoms = 2\n[users.alice]\nshare = 2\n',
        tmp_path=tmp_path,
        variables={"ROOTSTOCKD_BATCH_ATOMS": "3", "ROOTSTOCKD_LIMITS__QUEUED": "3", "ROOTSTOCKD_MAX_ATOMS": ""},
        batch_atoms=4,
        log_file=None,
    )
    assert (config.max_atoms, config.max_sessions, config.batch_atoms) == (1, 2, 4)
    assert config.models == ("c",)  # a list is taken whole
    assert config.limits.model_dump() == {"sessions": 1, "queued": 3, "atoms": 2, "models": 8, "share": 1.0}
    assert (config.users["alice"].sessions, config.users["alice"].share) == (1, 2)
    first, second = (str(tmp_path / name) for name in ("0.toml", "1.toml"))
    assert config.origins == {
        "max_atoms": first,
        "limits.sessions": first,
        "users.alice.sessions": first,
        "max_sessions": second,
        "models": second,
        "limits.atoms": second,
        "users.alice.share": second,
        "limits.queued": "ROOTSTOCKD_LIMITS__QUEUED",
        "batch_atoms": "command line",
    }
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_variables_are_of_all_kinds(tmp_path: Path) -> None:
    said = {
        "ROOTSTOCKD_CONFINE": "false",
        "ROOTSTOCKD_KEEP_ALIVE": "1.5",
        "ROOTSTOCKD_LOG_FILE": "log",
        "ROOTSTOCKD_ACCESS__SOCKET_GROUP": "chem",
        "ROOTSTOCKD_SOCKET": "/a/b.sock",
    }
    config = combined(tmp_path=tmp_path, variables=said)
    assert (config.confine, config.keep_alive, config.log_file) == (False, 1.5, Path("log").absolute())
    assert (config.access.socket_group, config.socket) == ("chem", Path("/a/b.sock"))
    assert combined(tmp_path=tmp_path, variables={"ROOTSTOCKD_KEEP_ALIVE": "forever"}).keep_alive == "forever"


def test_whatever_is_wrong_is_blamed_on_where_it_stands(tmp_path: Path) -> None:
    said = {"ROOTSTOCKD_LIMITS__SHARE": "much"}
    with pytest.raises(ConfigError) as caught:
        combined("max_atom = 1", "= 1", "[limits]\nshare = 0", tmp_path=tmp_path, variables=said, max_sessions=0)
    words = str(caught.value).splitlines()
    starts = (
        "ROOTSTOCKD_LIMITS__SHARE: limits.share: ",
        "max_sessions: ",
        *(f"configuration {tmp_path}/{n}" for n in "012"),
    )
    assert len(words) == len(starts)
    assert all(line.startswith(start) for line, start in zip(words, starts, strict=True)), words


def test_variables_that_mean_nothing() -> None:
    names = [
        "ROOTSTOCKD_MAX_ATOM",
        "ROOTSTOCKD_MODELS",
        "ROOTSTOCKD_ROOT",
        "ROOTSTOCKD_STATE",
        "ROOTSTOCKD_SOCKET",
        "HOME",
    ]
    assert unknown_variables(names) == [
        "the variable ROOTSTOCKD_MAX_ATOM has no effect; did you mean ROOTSTOCKD_MAX_ATOMS?",
        "the variable ROOTSTOCKD_MODELS has no effect: 'models' is more than one value, and set in a file.",
        "the variable ROOTSTOCKD_ROOT has no effect.",
    ]


def test_all_variables_that_the_packages_read_are_known() -> None:
    folders = [Path(str(module.__file__)).parent for module in (rootstockd, rootstock_client)]
    texts = [path.read_text() for folder in folders for path in folder.rglob("*.py")]
    read = {name for text in texts for name in re.findall(r'"(ROOTSTOCKD_[A-Z_]*[A-Z])"', text)}
    assert {"ROOTSTOCKD_STATE", "ROOTSTOCKD_SOCKET"} <= read
    assert read <= {*VARIABLES, *OTHER_VARIABLES}


def test_what_is_taken_over_and_what_is_not(tmp_path: Path) -> None:
    before = combined(
        "batch_atoms = 1\nmax_sessions = 1\n[access]\nsocket_group = 'a'\nusers = ['b']", tmp_path=tmp_path
    )
    write(
        tmp_path / "0.toml",
        "max_atoms = 2\nmax_sessions = 2\n[access]\nsocket_group = 'c'\nusers = ['d']\n[users.e]\nshare = 2",
    )
    fresh = read_again(before)
    after = take_over(before, fresh)
    assert (after.batch_atoms, after.max_atoms, after.max_sessions) == (1, 1_000_000, 2)
    assert (after.access.socket_group, after.access.users, after.users["e"].share) == ("a", ("d",), 2)
    assert "max_atoms" not in after.origins
    assert read_again(after) == fresh
    (tmp_path / "0.toml").unlink()
    with pytest.raises(ConfigError, match="it is gone"):
        read_again(after)


def test_a_users_own_daemon(folder: Path, user: int) -> None:
    """It takes defaults from the site, and never who may use it, nor the port of the site's daemon."""
    write(
        folder / "site/config.toml",
        "max_atoms = 1\nmax_sessions = 1\nmetrics = '127.0.0.1:9746'\nmetrics_users = true\n[limits]\nsessions = 1\n"
        "[access]\ngroups = ['root']\n",
    )
    write(folder / "site/cpu.toml", "nonsense = 1\n")
    write(folder / "home/rootstockd/config.toml", "max_atoms = 2\n[limits]\natoms = 2\n", user)
    write(folder / "home/rootstockd/cpu.toml", "batch_atoms = 3\n", user)
    show = ("config", "show", "--json", "--instance", "cpu")
    said = shown(run_as(user, *show))
    settings = said["settings"]
    assert [settings[name] for name in ("max_atoms", "max_sessions", "batch_atoms")] == [2, 1, 3]
    assert (settings["limits"]["sessions"], settings["limits"]["atoms"]) == (1, 2)
    assert settings["access"]["groups"] == []
    assert (settings["metrics"], settings["metrics_users"]) == (None, False)
    assert said["origins"]["limits.sessions"] == str(folder / "site/config.toml")
    (folder / "site/config.toml").chmod(0o600)
    if os.geteuid() == 0:  # else it is the user's own
        assert shown(run_as(user, *show))["settings"]["max_sessions"] == 10_000


def test_the_machines_daemon_reads_no_users_file(folder: Path, user: int) -> None:
    write(folder / "site/config.toml", "max_sessions = 1\n[access]\ngroups = ['root']\n")
    write(folder / "site/cpu.toml", "max_sessions = 2\n")
    write(folder / "home/rootstockd/config.toml", "nonsense = 2\n", user)
    show = ("config", "show", "--json", "--instance", "cpu", "--socket", "/run/rootstockd/cpu.sock")
    for uid in {user, os.geteuid()}:
        said = shown(run_as(uid, *show))
        assert [Path(file["path"]).parent for file in said["files"]] == [folder / "site"] * 2
        assert (said["settings"]["max_sessions"], said["settings"]["access"]["groups"]) == (2, ["root"])
    if os.geteuid() == 0:
        (folder / "site/config.toml").chmod(0o600)
        done = run_as(user, *show)  # it must not be as if nobody were kept out
        assert done.returncode == 1
        file = folder / "site/config.toml"
        assert re.search(rf"configuration {file}: {user} may not read it: chgrp \S+ {file}; chmod 640", done.stderr)


def test_files_that_others_may_write_are_refused(folder: Path, user: int) -> None:
    mine = folder / "home/rootstockd/config.toml"
    write(mine, "", user)
    assert run_as(user, "config", "show", "--device", "cpu").returncode == 0
    mine.chmod(0o666)
    done = run_as(user, "config", "show", "--device", "cpu")
    assert (done.returncode, "chmod o-w" in done.stderr) == (1, True)


def test_a_file_that_is_named_is_the_only_one(folder: Path) -> None:
    for path in (folder / "site/config.toml", folder / "home/rootstockd/config.toml"):
        write(path, "nonsense = 1\n")
    write(folder / "mine.toml", "max_sessions = 3\n")
    for given in (("--config", str(folder / "mine.toml")), ()):
        environment = {} if given else {"ROOTSTOCKD_CONFIG": str(folder / "mine.toml")}
        said = shown(run_as(os.geteuid(), "config", "show", "--json", "--device", "cpu", *given, **environment))
        assert said["settings"]["max_sessions"] == 3
        assert said["files"] == [{"path": str(folder / "mine.toml"), "there": True}]
        assert run_as(os.geteuid(), "config", "check", *given[1:], **environment).returncode == 0


@pytest.mark.parametrize("said", [("--device", "auto"), ("--instance", "auto")])
def test_whoever_says_auto_says_which_devices(folder: Path, said: tuple[str, str]) -> None:
    write(folder / "mine.toml", 'devices = ["cpu:1"]\n')
    told = shown(command("config", "show", "--json", *said, "--config", folder / "mine.toml"))
    assert told["settings"]["devices"] == [str(device) for device in choose_devices()]
    assert told["origins"]["devices"] == "command line"


def test_what_is_shown_is_a_file_that_says_the_same(folder: Path) -> None:
    write(folder / "odd.toml", 'keep_alive = 5\nmodels = ["emt"]\n[users."a.b c"]\nshare = 0.5\n[limits]\nqueued = 9\n')
    environment = {**os.environ, "ROOTSTOCKD_LIMITS__ATOMS": "77"}
    given = ("--device", "cpu", "--max-atoms", "9")
    first = command("config", "show", "--config", folder / "odd.toml", *given, env=environment)
    assert re.search(r"^max_atoms = 9 +# command line$", first.stdout, re.MULTILINE)
    assert re.search(r"^atoms = 77 +# ROOTSTOCKD_LIMITS__ATOMS$", first.stdout, re.MULTILINE)
    assert re.search(rf"^queued = 9 +# {folder}/odd.toml$", first.stdout, re.MULTILINE)
    assert re.search(r"^# batch_atoms is not set +# default$", first.stdout, re.MULTILINE)
    write(folder / "shown.toml", first.stdout)
    show = ("config", "show", "--config")
    said = shown(command(*show, folder / "odd.toml", "--json", *given, env=environment))["settings"]
    assert said["users"]["a.b c"]["share"] == 0.5
    assert shown(command(*show, folder / "shown.toml", "--json"))["settings"] == said
    bare = command(*show, folder / "shown.toml", "--no-origins").stdout
    assert "default" not in bare
    write(folder / "bare.toml", bare)
    assert shown(command(*show, folder / "bare.toml", "--json"))["settings"] == said


def test_check_says_what_would_keep_it_from_starting(folder: Path) -> None:
    write(folder / "good.toml", 'models = ["emt"]\n[access]\nusers = ["nobody-of-that-name"]\n')
    done = command("config", "check", folder / "good.toml")
    assert done.returncode == 0, done.stderr
    assert "access.users: there is no user 'nobody-of-that-name' on this machine" in done.stdout
    assert f"a daemon can start with {folder}/good.toml" in done.stdout
    write(folder / "fine.toml", 'models = ["emt"]\n')
    assert f"nothing is wrong with {folder}/fine.toml" in command("config", "check", folder / "fine.toml").stdout
    done = command("config", "check", "--instance", "99", folder / "good.toml")
    assert (done.returncode, "devices: this machine has no GPU 99" in done.stderr) == (1, True)
    write(folder / "bad.toml", 'models = ["emtt"]\n[access]\nsocket_group = "no-such-group"\n')
    done = command("config", "check", folder / "bad.toml", env={**os.environ, "ROOTSTOCKD_MAX_ATOM": "1"})
    assert done.returncode == 1
    assert "did you mean ROOTSTOCKD_MAX_ATOMS?" in done.stdout
    for words in ("models: there is no model 'emtt'.", "access.socket_group: there is no group 'no-such-group'"):
        assert words in done.stderr
    (folder / "file").touch()
    write(folder / "bad.toml", 'max_atom = 3\nmodels = ["emtt"]\nlog_file = "file/log"\nmetrics = "192.0.2.1:9746"\n')
    done = command("config", "check", folder / "bad.toml")
    assert "no setting 'max_atom'; did you mean 'max_atoms'?" in done.stderr  # which hides nothing else
    for words in (
        "models: there is no model 'emtt'.",
        f"log_file: can't write {folder}/file/log: Not a directory.",
        "metrics: this machine can't listen at 192.0.2.1: Cannot assign requested address.",
    ):
        assert words in done.stderr
    write(folder / "bad.toml", 'catalogues = ["more.toml"]\n')
    done = command("config", "check", folder / "bad.toml")
    assert (
        f"catalogue {folder}/more.toml: No such file or directory. It is named by `catalogues` of {folder}/bad.toml."
        in done.stderr
    )
    write(folder / "more.toml", '[x]\nfamily = "mace"\nwights = "x.model"\n')
    assert (
        f"catalogue {folder}/more.toml: model 'x': there is no field wights; did you mean weights?"
        in command("config", "check", folder / "bad.toml").stderr
    )


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("sevennet-0", "environment 'sevennet' was not built"),
        ("nothing", """model 'nothing': its arguments need calculator = "module:Class"."""),
        ("half", """model 'half': its arguments need calculator = "module:Class"."""),
        ("asee", "model 'asee': there is no family asee; did you mean ase?\n"),
        ("strange", "model 'strange': there is no family cp2k; there are ase, ipi, mace"),
        ("gone", "model 'gone': there is no file"),
    ],
)
def test_check_says_which_models_can_not_be_loaded(folder: Path, model: str, words: str) -> None:
    """It keeps a daemon from starting, or where others can be loaded it is worth a warning."""
    write(
        folder / "more.toml",
        '[nothing]\nfamily = "ase"\n[asee]\nfamily = "asee"\n[strange]\nfamily = "cp2k"\n'
        '[half]\nfamily = "ase"\narguments = { calculator = "ase.calculators.emt:" }\n'
        f'[gone]\nfamily = "mace"\nweights = "gone.model"\nsha256 = "{"0" * 64}"\n',
    )
    write(folder / "bad.toml", f'catalogues = ["more.toml"]\nmodels = ["{model}"]\n')
    done = command("config", "check", folder / "bad.toml")
    assert done.returncode == 1 and f"models: {words}" in done.stderr
    write(folder / "good.toml", f'catalogues = ["more.toml"]\nmodels = ["{model}", "emt"]\n')
    done = command("config", "check", folder / "good.toml")
    assert done.returncode == 0 and f"models: {words}" in done.stdout
    assert "a daemon can start with" in done.stdout
    if model in ("nothing", "half", "asee", "strange"):
        listed = command("models", "list", "--catalogue", folder / "more.toml").stdout
        assert re.search(rf"^{model} .* wrong entry ", listed, re.MULTILINE)


def test_check_says_where_no_socket_can_be(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    for place, words in (
        ("x" * 100 + "/a.sock", "is too long; Unix sockets allow 107 bytes."),
        (".", f"socket: {folder} is not a socket, and a daemon leaves it alone."),
        ("file/a.sock", f"socket: can't make {folder}/file/a.sock: Not a directory."),
        ("open/a.sock", f"socket: the folder {folder}/open belongs to somebody else, or others may write to it."),
    ):
        write(folder / "bad.toml", f'socket = "{place}"\n')
        done = command("config", "check", folder / "bad.toml")
        assert (done.returncode, words in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("link", ["config.toml", "."])
def test_a_link_to_what_is_not_there_opens_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    """Such as a share that is not mounted, with the file or its folder; not at a start, a reload or a check."""
    share = folder / "share"
    share.mkdir(mode=0o755)
    write(share / "config.toml", '[access]\nusers = ["root"]\n')
    site = folder / "linked"
    if link == ".":
        site.symlink_to(share)
    else:
        site.mkdir(mode=0o755)
        (site / link).symlink_to(share / link)
    monkeypatch.setenv("ROOTSTOCKD_SITE", str(site))
    files = (SettingsFile(path=site / "config.toml"),)
    running = make_config(files, {}, {}, DEFAULTS)
    assert running.access.users == ("root",)
    share.rename(folder / "elsewhere")
    for read in (lambda: make_config(files, {}, {}, DEFAULTS), lambda: read_again(running)):
        with pytest.raises(ConfigError, match="and that is not there: bring it back"):
            read()
    done = command("config", "check")
    assert (done.returncode, f"{site / link} is a link to {share}" in done.stderr) == (1, True), done.stdout


def test_a_daemon_that_runs(
    folder: Path, start_daemon: Callable[..., RunningDaemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has, what has changed since, what reload takes over, and what restart does."""
    place = folder / "site/config.toml"
    write(place, "max_sessions = 7\n[limits]\nsessions = 3\n")
    monkeypatch.setenv("ROOTSTOCKD_LIMITS__ATOMS", "1000")
    daemon = start_daemon("--max-atoms", "500")
    monkeypatch.delenv("ROOTSTOCKD_LIMITS__ATOMS")

    def running(*options: str) -> subprocess.CompletedProcess[str]:
        return command("config", "show", "--running", *options, "--socket", daemon.socket)

    before = shown(running("--json"))
    assert before["changed"] == {}
    assert before["settings"]["limits"]["atoms"] == 1000
    assert before["origins"]["limits.atoms"] == "ROOTSTOCKD_LIMITS__ATOMS"
    assert before["origins"]["max_sessions"] == str(place)
    assert before["origins"]["max_atoms"] == "command line"

    write(
        place,
        "max_sessions = 8\nbatch_atoms = 9\nmax_atoms = 11\n[limits]\nsessions = 3\natoms = 12\n"
        "[users.root]\nshare = 2\n",
    )
    said = running().stdout
    assert re.search(rf"^max_sessions = 7 +# {place}; 8 \({place}\) after a reload$", said, re.MULTILINE)
    assert re.search(rf"^# batch_atoms is not set +# default; 9 \({place}\) after a restart$", said, re.MULTILINE)
    assert re.search(r"^max_atoms = 500 +# command line$", said, re.MULTILINE)
    assert f"# users.root.share: 2.0 ({place}) after a reload\n" in said
    assert "take effect only with a restart: batch_atoms" in daemon.run("reload").stdout
    after = shown(running("--json"))
    assert after["settings"]["max_sessions"] == 8
    assert after["changed"] == {"batch_atoms": {"value": 9, "origin": str(place), "needs": "restart"}}

    write(place, "max_session = 8\n")
    for done in (daemon.run("reload"), running()):
        assert (done.returncode, "did you mean 'max_sessions'?" in done.stderr) == (1, True)
    place.unlink()
    assert "it is gone" in daemon.run("reload").stderr
    place.symlink_to(folder / "share/config.toml")  # which is not mounted
    assert f"{place} is a link to {folder}/share/config.toml, and that is not there" in daemon.run("reload").stderr
    place.unlink()
    os.mkfifo(place, 0o644)
    assert "it is no regular file" in daemon.run("reload").stderr
    place.unlink()
    write(place, f"max_sessions = 9\na{20_000 * '.a'} = 1\n")
    assert f"configuration {place}: a key of it has more than 32 parts." in daemon.run("reload").stderr
    with place.open("wb") as file:
        file.truncate(100_000_000)
    assert f"configuration {place}: it has more than 524,288 bytes." in daemon.run("reload").stderr
    assert psutil.Process(daemon.client().status()["pid"]).memory_info().rss < 200_000_000
    place.unlink()
    assert daemon.client().status()["config"]["max_sessions"] == 8

    write(place, "batch_atoms = 9\n")
    assert daemon.run("restart").returncode == 0
    new = shown(running("--json"))
    assert (new["settings"]["batch_atoms"], new["settings"]["max_sessions"], new["changed"]) == (9, 10_000, {})
    assert (new["settings"]["limits"]["atoms"], new["settings"]["max_atoms"]) == (1000, 500)
    done = running("--max-atoms", "3")
    assert (done.returncode, "takes only --socket" in done.stderr) == (2, True)


def test_what_a_file_says_no_more_does_not_outlast_a_restart(folder: Path) -> None:
    address, file, log = folder / "a.sock", folder / "mine.toml", folder / "log"
    write(file, f'devices = ["cpu:1"]\nlog_file = "{log}"\n')
    done = command("start", "--socket", address, "--config", file)
    assert done.returncode == 0, done.stderr
    try:
        write(file, "")
        shows = ("config", "show", "--running", "--json", "--socket", address)
        changed = shown(command(*shows))["changed"]
        assert {name: change["origin"] for name, change in changed.items()} == {
            "devices": "default",
            "log_file": "default",
        }
        assert command("restart", "--socket", address).returncode == 0
        after = shown(command(*shows))
        assert after["settings"]["devices"] != ["cpu:1"] and after["settings"]["log_file"] != str(log)
        assert after["changed"] == {}
    finally:
        command("stop", "--socket", address)


def test_the_log_of_a_daemon_that_ended_is_where_the_files_say(folder: Path) -> None:
    address, log = folder / "a.sock", folder / "the.log"
    for place in ("site", "home/rootstockd"):  # root's daemon reads the one, a user's own the other
        write(folder / place / "config.toml", f'log_file = "{log}"\n')
    assert command("start", "--device", "cpu", "--socket", address).returncode == 0
    assert command("stop", "--socket", address).returncode == 0
    done = command("logs", "--socket", address)
    assert done.returncode == 0 and "stopped" in done.stdout, done.stderr


def test_a_home_in_options_and_variables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave `~` alone behind `=` and in quotes."""
    home, here = folder / "h", folder / "here"
    for place in (home, here):
        place.mkdir()
    write(home / "more.toml", '[mine]\nfamily = "noop"\n')
    write(home / "mine.toml", "max_atoms = 17\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    options = ("--socket=~/run/a.sock", "--config=~/mine.toml", "--catalogue=~/more.toml", "--log-file=~/the.log")
    done = command("start", "--device", "cpu", *options)
    try:
        assert done.returncode == 0, done.stderr
        assert f"socket  {home}/run/a.sock\nlog     {home}/the.log\n" in done.stdout
        monkeypatch.setenv("ROOTSTOCKD_SOCKET", "~/run/a.sock")
        running = shown(command("config", "show", "--running", "--json"))["settings"]
        assert (running["max_atoms"], running["catalogues"]) == (17, [f"{home}/more.toml"])
        assert RootstockClient().status()["state"] == "ready"
    finally:
        command("stop", "--socket", home / "run/a.sock")
    monkeypatch.setenv("ROOTSTOCKD_LOG_FILE", "~/other.log")
    said = shown(command("config", "show", "--json", "--device", "cpu"))["settings"]
    assert (said["socket"], said["log_file"]) == (f"{home}/run/a.sock", f"{home}/other.log")
    assert not list(here.iterdir())


def kind_of(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A setting's type, as the document says it."""
    schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "anyOf" in schema:
        return " or ".join(kind_of(one, definitions) for one in schema["anyOf"] if one.get("type") != "null")
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if schema["type"] == "array":
        return f"list of {kind_of(schema['items'], definitions).replace('object', 'string')}s"
    return "path" if schema.get("format") == "path" else str(schema["type"])


def test_the_document_has_all_settings_as_they_are() -> None:
    rows = [line.split("|")[1:-1] for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    said = {name.strip(" `"): [cell.strip() for cell in rest] for name, *rest in rows}
    assert list(said) == [".".join(path) if path != ("users",) else "users.NAME" for path, _ in all_settings()]
    whole = Settings.model_json_schema()
    for path, field in all_settings():
        name = ".".join(path)
        if name == "users":
            continue
        schema: dict[str, Any] = whole
        for part in path:
            schema = schema["properties"][part]
            if "$ref" in schema and part != path[-1]:
                schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
        kind, default, reload, _ = said[name]
        assert kind == kind_of(schema, whole["$defs"]), name
        assert (reload == "reload") == reloadable(name), name
        if name not in ("socket", "devices", "log_file"):  # which are found out at the start
            value = field.default
            assert default == ("not set" if value is None else f"`{json.dumps(value)}`"), name
