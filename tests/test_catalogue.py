"""The catalogue of models."""

import grp
import importlib.util
import os
import pwd
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from rootstock_client.errors import UnknownModelError
from rootstockd.models import catalogue as catalogue_module
from rootstockd.models.catalogue import Catalogue, CatalogueError, Entry
from rootstockd.settings import state_dir
from rootstockd.settings.config import SettingsFile
from rootstockd.settings.config_file import ConfigError, read_config_file
from rootstockd.settings.state_dir import StateError, own_state, site_folder, state_dirs

EMT = 'family = "ase"\narguments = { calculator = "ase.calculators.emt:EMT" }\n'

PIN = f'sha256 = "{"0" * 64}"\n'


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "more.toml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_what_the_package_brings():
    catalogue = Catalogue.load()
    assert {"mace-emt-small", "emt", "lj"} <= set(catalogue)
    assert len(catalogue) == len(list(catalogue))
    weights = catalogue["mace-emt-small"].weights
    assert weights is not None
    assert weights.is_absolute() and weights.is_file()
    assert catalogue["emt"].arguments == {"calculator": "ase.calculators.emt:EMT"}


def test_more_files_add_and_override_entry_by_entry(write):
    first = write(f"[mine]\n{EMT}description = 'first'\n[emt]\n{EMT}description = 'ours'\n", "1.toml")
    second = write(f"[mine]\n{EMT}description = 'second'\n", "2.toml")
    catalogue = Catalogue.load([first, second])
    assert catalogue["mine"].description == "second"
    assert catalogue["emt"].description == "ours"
    assert catalogue["emt"].elements == ()  # the whole entry, not key by key
    assert catalogue["lj"] == Catalogue.load()["lj"]


def test_relative_weights_start_at_their_file(write, tmp_path):
    path = write(
        f'[a]\nfamily = "mace"\nweights = "sub/a.model"\n{PIN}[b]\nfamily = "mace"\nweights = "/abs/b.model"\n{PIN}'
    )
    catalogue = Catalogue.load([path])
    assert catalogue["a"].weights == tmp_path / "sub/a.model"
    assert catalogue["b"].weights == Path("/abs/b.model")


def test_weights_need_their_sha256_which_is_told(write, tmp_path):
    path = write('[a]\nfamily = "mace"\nweights = "a.model"\n')
    with pytest.raises(CatalogueError, match=f"there is no file {tmp_path}/a.model"):
        Catalogue.load([path])
    (tmp_path / "a.model").write_bytes(b"abc")
    with pytest.raises(CatalogueError, match="model 'a': weights need a sha256") as caught:
        Catalogue.load([path])
    line = str(caught.value).splitlines()[-1]
    assert line == 'sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"'
    path = write(f'[a]\nfamily = "mace"\nweights = "a.model"\n{line}\n')
    assert Catalogue.load([path])["a"].sha256 in line


@pytest.mark.parametrize("wrong", ["abc", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\\n"])
def test_a_sha256_that_is_none(write, wrong):
    with pytest.raises(CatalogueError, match="model 'a': sha256: it has 64 hexadecimal digits"):
        Catalogue.load([write(f'[a]\nfamily = "mace"\nweights = "a.model"\nsha256 = "{wrong}"\n')])


def test_weights_that_are_not_those_that_are_meant(write, tmp_path):
    path = write(f'[a]\nfamily = "mace"\nweights = "a.model"\nsize = 4\n{PIN}')
    assert Catalogue.load([path]).warnings() == [f"model 'a': there is no file {tmp_path}/a.model"]
    (tmp_path / "a.model").write_bytes(b"abc")
    assert Catalogue.load([path]).warnings() == [f"model 'a': {tmp_path}/a.model has 3 bytes, and its entry says 4"]
    (tmp_path / "a.model").write_bytes(b"abcd")
    assert Catalogue.load([path]).warnings() == []
    long = "a" * 300  # there can be none, as below a folder that is closed to us
    path = write(f'[a]\nfamily = "mace"\nweights = "{long}"\n{PIN}')
    assert Catalogue.load([path]).warnings() == [f"model 'a': there is no file {tmp_path}/{long}"]


def test_hidden_models_are_not_suggested():
    with pytest.raises(UnknownModelError) as caught:
        Catalogue.load().resolve("nop")
    assert "noop" not in str(caught.value)


def test_aliases(write):
    catalogue = Catalogue.load([write(f'[long-name]\n{EMT}aliases = ["short", "shorter"]\n')])
    entry = catalogue["long-name"]
    assert catalogue.resolve("short") == ("long-name", entry)
    assert catalogue.resolve("long-name") == ("long-name", entry)
    assert catalogue["shorter"] is entry
    assert "short" in catalogue
    assert "short" not in list(catalogue)


def test_an_alias_does_not_hide_a_model(write):
    """`emt` is what the catalogue lists as emt, whatever else would like to be called so."""
    catalogue = Catalogue.load([write(f'[impostor]\n{EMT}aliases = ["emt"]\n')])
    assert catalogue.resolve("emt")[0] == "emt"


@pytest.mark.parametrize(
    ("name", "suggested"),
    [("mace-emt-smal", "mace-emt-small"), ("MACE-EMT-SMAL", "mace-emt-small"), ("ent", "emt"), ("nick", "nickname")],
)
def test_the_nearest_names_are_suggested(write, name, suggested):
    catalogue = Catalogue.load([write(f'[proper]\n{EMT}aliases = ["nickname"]\n')])
    with pytest.raises(UnknownModelError) as caught:
        catalogue.resolve(name)
    assert repr(name) in caught.value.message
    assert re.search(rf"Did you mean .*\b{suggested}\b.*\?", caught.value.hint)
    assert "There are: emt, lj, mace-emt-small, proper." in caught.value.hint
    with pytest.raises(KeyError):
        catalogue[name]


def test_a_name_in_other_letters_is_meant():
    with pytest.raises(UnknownModelError, match=r"Did you mean mace-emt-small\? "):
        Catalogue.load().resolve("MACE-EMT-Small")


def test_names_that_begin_so_are_suggested_first():
    with pytest.raises(UnknownModelError) as caught:
        Catalogue.load().resolve("mace-mp")
    assert re.search("Did you mean mace-mp-[^?]* or mace-mp-[^?]* or mace-mp-", caught.value.hint)


@pytest.mark.parametrize("name", ["../models/mine.pt", "mine.model"])
def test_a_file_is_no_name(name):
    with pytest.raises(UnknownModelError) as caught:
        Catalogue.load().resolve(name)
    assert caught.value.hint.startswith("A client names a model, never a file: `rootstockd models add")


def test_what_was_added_since_it_was_read(tmp_path, monkeypatch):
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path))
    catalogue = Catalogue.load()
    (tmp_path / "models.toml").write_text(f"[mine]\n{EMT}")
    with pytest.raises(UnknownModelError, match="`rootstockd reload`"):
        catalogue.resolve("mine")
    with pytest.raises(UnknownModelError, match="There are"):
        catalogue.resolve("yours")
    assert Catalogue.load().resolve("mine")[0] == "mine"


def test_a_thousand_that_ask_for_a_name_that_is_none_look_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path))
    monkeypatch.setattr("rootstockd.models.catalogue._LOOKED", 60.0)
    looks = []
    for what in ("has_environment", "_times"):
        true = getattr(catalogue_module, what)
        monkeypatch.setattr(f"rootstockd.models.catalogue.{what}", lambda *a, true=true: looks.append(a) or true(*a))
    catalogue = Catalogue.load()
    said = set()
    for number in range(1000):
        with pytest.raises(UnknownModelError) as caught:
            catalogue.resolve("yours")
        said.add(caught.value.hint)
        if not number:
            once = len(looks)
    assert len(looks) == once and len(said) == 1
    (tmp_path / "models.toml").write_text(f"[yours]\n{EMT}")
    monkeypatch.setattr("rootstockd.models.catalogue._LOOKED", 0.0)
    with pytest.raises(UnknownModelError, match="`rootstockd reload`"):
        catalogue.resolve("yours")


@pytest.mark.parametrize("name", ["q" * 5000, "nequip", "gpt4"])
def test_a_name_like_none_gets_the_list(name):
    with pytest.raises(UnknownModelError) as caught:
        Catalogue.load().resolve(name)
    assert "Did you mean" not in caught.value.hint
    assert "There are: emt, lj" in caught.value.hint
    assert "sevennet-0" not in caught.value.hint  # nobody has built its environment
    assert "rootstockd models list" in caught.value.hint
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[mine\n", "line 1"),
        (f"[mine]\n{EMT}colour = 'red'\n", "model 'mine': there is no field colour"),
        ("[mine]\n", "model 'mine': family is missing"),
        ("[mine]\nfamily = 'os.system'\n", "model 'mine': family: 'os.system' is not a family: small letters"),
        (f"[mine]\n{EMT}dtype = 'float16'\n", "model 'mine': dtype"),
        (f"[mine]\n{EMT}elements = 'Cu'\n", "model 'mine': elements"),
        ("mine = 1\n", "model 'mine': 1 is not a table of fields"),
        ("[mine]\nfamily = 'ase'\n[mine]\n", "mine is set twice, again in line 3"),
        (b"[mine]\nfamily = 'ase'\ndescription = '\xe9t\xe9'\n", "utf-8"),
    ],
)
def test_a_file_that_can_not_be_used_is_named_with_what_is_wrong(write, text, wrong):
    path = write(text)
    with pytest.raises(CatalogueError, match=re.escape(wrong)) as caught:
        Catalogue.load([path])
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CatalogueError, match=re.escape(f"{tmp_path}/none.toml: No such file or directory.")):
        Catalogue.load([tmp_path / "none.toml"])


def test_entries_can_not_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Entry(family="ase").family = "mace"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders of the site, of the state and of the user, each with a catalogue that has `mine`."""
    made = {"site": tmp_path / "site", "state": tmp_path / "state", "user": tmp_path / "config/rootstockd"}
    monkeypatch.setenv("ROOTSTOCKD_SITE", str(made["site"]))
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(made["state"]))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name, folder in made.items():
        folder.mkdir(parents=True)
        (folder / "models.toml").write_text(f"[mine]\n{EMT}description = '{name}'\n[{name}]\n{EMT}")
    return made


def test_layers(places, write):
    assert {"site", "state", "user", "emt"} <= set(Catalogue.load())
    named = write(f"[mine]\n{EMT}description = 'named'\n")
    assert Catalogue.load([named])["mine"].description == "named"
    for name in ("user", "state", "site"):
        catalogue = Catalogue.load()
        assert catalogue["mine"].description == name
        assert catalogue.origins["mine"] == places[name] / "models.toml"
        (places[name] / "models.toml").unlink()
    assert "mine" not in Catalogue.load()
    assert Catalogue.load().origins["emt"].name == "catalogue.toml"


@pytest.mark.parametrize("place", ["site", "state", "user"])
def test_a_catalogue_that_is_a_link_to_nothing_is_missed(places, place):
    """Such as a share that is not mounted: its models would be gone without a word."""
    path = places[place] / "models.toml"
    path.unlink()
    path.symlink_to(places[place] / "elsewhere.toml")
    with pytest.raises(CatalogueError, match=re.escape(f"{path} is a link to {places[place]}/elsewhere.toml, and")):
        Catalogue.load()


@pytest.mark.parametrize("place", ["site", "state", "user"])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_catalogue_that_others_could_write_is_refused(places, place, what):
    path = places[place] / ("models.toml" if what == "file" else "")
    path.chmod(path.stat().st_mode | 0o002)
    with pytest.raises(CatalogueError, match=re.escape(f"all users may write to {path}")):
        Catalogue.load()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", ["site", "state", "user"])
def test_a_catalogue_of_somebody_else_is_refused(places, place):
    path = places[place] / "models.toml"
    os.chown(path, 12345, -1)
    with pytest.raises(CatalogueError, match=rf"{path} belongs to another user \(12345\).* `chown root {path}`"):
        Catalogue.load()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_of_the_state_directory_that_is_named_is_believed_there(places):
    for path in (places["state"], places["state"] / "models.toml"):
        os.chown(path, 12345, -1)
    assert Catalogue.load()["mine"].description == "user"
    os.chown(places["user"] / "models.toml", 12345, -1)
    with pytest.raises(CatalogueError, match="belongs to another user"):
        Catalogue.load()


def test_a_named_catalogue_that_others_may_write(write):
    path = write(f"[mine]\n{EMT}")
    path.chmod(0o666)
    with pytest.raises(CatalogueError, match=f"all users may write to {path}.*: chmod o-w"):
        Catalogue.load([path])


def test_a_device_is_no_catalogue_and_keeps_its_mode(places, monkeypatch):
    with pytest.raises(CatalogueError, match="/dev/zero is neither a file nor a folder") as caught:
        Catalogue.load([Path("/dev/zero")])
    assert "chmod" not in str(caught.value)
    monkeypatch.setenv("ROOTSTOCKD_SITE", os.devnull)
    with pytest.raises(ConfigError, match=r"/dev/null is neither a file nor a folder.*: name another") as refused:
        read_config_file(SettingsFile(path=site_folder() / "config.toml"))
    assert "chmod" not in str(refused.value)


def test_a_home_that_no_shell_has_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, named in (("ROOTSTOCKD_STATE", own_state), ("ROOTSTOCKD_SITE", site_folder)):
        monkeypatch.setenv(variable, "~/kept")
        assert named() == tmp_path / "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_group_that_may_write_must_be_the_owners_own(write):
    path = write(f"[mine]\n{EMT}")
    path.chmod(0o664)
    mine = grp.getgrgid(pwd.getpwuid(os.geteuid()).pw_gid)
    assert (mine.gr_name, mine.gr_mem) == ("root", [])
    os.chown(path, -1, mine.gr_gid)
    assert "mine" in Catalogue.load([path])
    for gid, name in ((grp.getgrnam("daemon").gr_gid, "daemon"), (54321, "54321")):
        os.chown(path, -1, gid)
        with pytest.raises(CatalogueError, match=f"the group {name} may write to {path}.*: chmod g-w {path}"):
            Catalogue.load([path])
    path.chmod(0o644)
    assert "mine" in Catalogue.load([path])


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("useradd"), reason="only root can make users")
def test_a_group_is_not_private_that_is_another_users_first_one(tmp_path, monkeypatch):
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path))
    owner, mate = "rsd-owner", "rsd-mate"
    try:
        subprocess.run(["useradd", "--no-create-home", "--user-group", owner], check=True)
        user = pwd.getpwnam(owner)
        os.chown(tmp_path, user.pw_uid, user.pw_gid)
        tmp_path.chmod(0o775)
        assert state_dirs() == [tmp_path]
        subprocess.run(["useradd", "--no-create-home", "--gid", owner, mate], check=True)
        assert grp.getgrnam(owner).gr_mem == []
        state_dir._others_of.cache_clear()  # or it would be seen half a minute later
        with pytest.raises(StateError, match=f"the group {owner} may write to {tmp_path}"):
            state_dirs()
    finally:
        for name in (mate, owner):
            subprocess.run(["userdel", "--force", name], check=False, capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a group of its own everywhere")
def test_what_an_access_control_list_lets_others_do_is_not_the_groups(write):
    path = write(f"[mine]\n{EMT}")
    os.chown(path, -1, pwd.getpwuid(os.geteuid()).pw_gid)
    # the owner and uid 54321 may write, the group reads, all that is given is at most to write, others read
    entries = ((1, 6, -1), (2, 6, 54321), (4, 4, -1), (16, 6, -1), (32, 4, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", acl)
    except OSError:
        pytest.skip("this file system has no access control lists")
    assert path.stat().st_mode & 0o020
    with pytest.raises(CatalogueError, match="chmod g-w"):
        Catalogue.load([path])


def test_who_is_found_by_an_alias_no_more_is_warned_of(write):
    first = write(f'[a]\n{EMT}aliases = ["best", "only-a"]\n', "1.toml")
    second = write(f'[b]\n{EMT}aliases = ["best", "emt"]\n', "2.toml")
    assert Catalogue.load([first]).warnings() == []
    assert Catalogue.load([first, second]).warnings() == [
        "model 'a': its alias 'best' leads to model 'b'",
        "model 'b': its alias 'emt' leads to model 'emt'",
    ]


def test_an_alias_of_a_later_file_goes_first(write):
    first = write(f'[a]\n{EMT}aliases = ["best"]\n', "1.toml")
    second = write(f'[b]\n{EMT}aliases = ["best"]\n', "2.toml")
    assert Catalogue.load([first, second]).resolve("best")[0] == "b"
    assert Catalogue.load([second, first]).resolve("best")[0] == "a"
    with pytest.raises(CatalogueError, match="'best' is an alias of both 'a' and 'b'"):
        Catalogue.load([write(f'[a]\n{EMT}aliases = ["best"]\n[b]\n{EMT}aliases = ["best"]\n')])


def test_ranges_of_elements(write):
    catalogue = Catalogue.load([write(f'[a]\n{EMT}elements = ["H-Li", "Cu", "Ac-Th"]\n')])
    assert catalogue["a"].elements == ("H", "He", "Li", "Cu", "Ac", "Th")
    with pytest.raises(CatalogueError, match="there is no element H-Qq"):
        Catalogue.load([write(f'[a]\n{EMT}elements = ["H-Qq"]\n')])


@pytest.mark.parametrize("name", ["../x", "a/b", ".a", "", "a b", "é", "a" * 101])
def test_names_that_are_no_file_names(write, name):
    with pytest.raises(CatalogueError, match="a name has letters, digits and"):
        Catalogue.load([write(f"['{name}']\n{EMT}")])


def test_what_is_said_of_the_models_that_come_with_the_package():
    catalogue = Catalogue.load()
    urls = [entry.url for entry in catalogue.values() if entry.url]
    assert all(url.startswith("https://") for url in urls)
    for name, entry in catalogue.items():
        assert entry.description, name
        assert entry.licence, name
        assert entry.hidden or entry.elements or entry.url or name in {"lj", "chgnet-r2scan"}, name
        if entry.url:
            assert entry.computes and entry.citation, name
        if entry.licence == "ASL":
            assert entry.accept_licence and entry.licence_url, name
    mp = catalogue["mace-mp-0-medium"].elements
    assert len(mp) == 89
    assert {"Po", "At", "Rn", "Fr", "Ra", "Am"}.isdisjoint(mp)


def test_all_mace_models_that_mace_torch_names():
    mace = importlib.util.find_spec("mace")
    assert mace is not None and mace.origin is not None
    source = Path(mace.origin).with_name("calculators") / "foundations_models.py"
    named = set(re.findall(r'"(https://[^"]+\.model)"', source.read_text()))
    assert len(named) == 24
    assert named <= {entry.url for entry in Catalogue.load().values()}
