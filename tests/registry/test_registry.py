"""Names lead to classes through package metadata; what is broken breaks only when it is chosen."""

import json

import pytest

from lit_rl import __version__, registry
from lit_rl.errors import UserError
from lit_rl.registry import TrunkEntry
from lit_rl.trunks import GRU, MLP


def test_core_registers_its_own_trunks():
    core = {e.name: e for e in registry.entries() if e.package == "lit-rl"}
    assert set(core) == {"gru", "lstm", "mlp"}
    assert registry.load("lit-rl/gru") is GRU
    assert registry.class_path("mlp") == "lit_rl.trunks.mlp.MLP"


@pytest.mark.parametrize("name", ["lit-rl/mlp", "lit_rl/mlp", "Lit.RL/mlp"])
def test_package_names_are_compared_as_pip_does(name):
    assert registry.find(name).target == "lit_rl.trunks.mlp:MLP"


def test_class_path_passes_through_and_loads():
    assert registry.class_path("some.where.Else") == "some.where.Else"
    assert registry.load("lit_rl.trunks.mlp.MLP") is MLP
    with pytest.raises(UserError, match=r"'some.where.Else' cannot be imported: ModuleNotFoundError"):
        registry.load("some.where.Else")


def test_unknown_name_lists_close_matches_and_known_names():
    with pytest.raises(
        UserError, match=r"^unknown trunk 'grru'; did you mean gru\b.*\? known: .*gru, .*lstm, .*mlp"
    ):
        registry.find("grru")
    with pytest.raises(UserError, match=r"^unknown trunk 'zzz'; known: "):
        registry.find("zzz")
    with pytest.raises(UserError, match=r"^unknown trunk 'lit-rl/grru'; did you mean lit-rl/gru"):
        registry.find("lit-rl/grru")
    with pytest.raises(UserError, match=r"^unknown trunk 'other/gru'"):
        registry.find("other/gru")


def fake_package(site, folder, name, entry_points):
    info = site / f"{folder}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def test_one_distribution_seen_twice_counts_once(tmp_path, monkeypatch):
    fake_package(tmp_path / "a", "twice-9.0", "twice", "[lit_rl.trunks]\ndouble = first:A\n")
    fake_package(tmp_path / "b", "Twice-9.0", "Twice", "[lit_rl.trunks]\ndouble = second:B\n")
    monkeypatch.syspath_prepend(tmp_path / "b")
    monkeypatch.syspath_prepend(tmp_path / "a")
    assert registry.find("double") == TrunkEntry("double", "first:A", "twice", "9.0")


def test_malformed_metadata_breaks_nothing_else(tmp_path, monkeypatch):
    fake_package(tmp_path, "odd-9.0", "odd", "[lit_rl.trunks]\nno target at all\nspaced = not a : target\n")
    fake_package(tmp_path, "headless-9.0", "headless", "x = y\n[lit_rl.trunks]\nlost = a:B\n")
    fake_package(tmp_path, "foreign-9.0", "foreign", "what is this\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.load("gru") is GRU
    with pytest.raises(UserError, match=r"'spaced' of odd 9.0 \(not a : target\) is broken: .*uninstall odd"):
        registry.load("spaced")
    assert {e.name for e in registry.entries() if e.package == "odd"} == {"no target at all", "spaced"}
    assert [e.name for e in registry.entries() if e.package == "headless"] == ["(unreadable)"]


@pytest.mark.parametrize("file", ["METADATA", "entry_points.txt"])
def test_metadata_that_is_no_text_breaks_nothing_else(file, tmp_path, monkeypatch):
    fake_package(tmp_path, "latin-9.0", "latin", "[lit_rl.trunks]\nlost = a:B\n")
    path = tmp_path / "latin-9.0.dist-info" / file
    path.write_bytes(path.read_bytes() + b"Author: Andr\xe9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.load("gru") is GRU
    shown = {"METADATA": [], "entry_points.txt": ["(unreadable)"]}
    assert [e.name for e in registry.entries() if e.package == "latin"] == shown[file]


LOAD_EACH = """
import json, sys
from lit_rl import __version__, registry
from lit_rl.errors import UserError
outcome = {}
for name in sys.argv[1:]:
    try:
        outcome[name] = registry.load(name).__qualname__
    except UserError as error:
        outcome[name] = str(error)
print(json.dumps(outcome))
"""

BROKEN = {
    "wants_missing": "ModuleNotFoundError: No module named 'a_module_that_nobody_installed'",
    "raises": "RuntimeError: two lines",
    "no_module": "ModuleNotFoundError: No module named 'lit_rl_nowhere'",
    "no_attribute": "AttributeError: module 'lit_rl_broken.plain' has no attribute 'Absent'",
    "no_trunk": "does not subclass lit_rl.trunks.base.Trunk",
    "no_class": "does not subclass lit_rl.trunks.base.Trunk",
}


@pytest.fixture(scope="module")
def outcome(broken_and_clashing, run_python):
    """What `load` says to each name where the broken and the clashing package are installed."""
    names = [*BROKEN, "gru", "lit-rl/gru", "lit-rl-clashing/gru", "lstm"]
    done = run_python("-c", LOAD_EACH, *names, site=broken_and_clashing)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plugin_is_named_with_version_target_and_cause(outcome, name):
    message = outcome[name]
    assert f"trunk {name!r} of lit-rl-broken 1.2.3 (lit_rl_" in message
    assert BROKEN[name] in message
    assert "\n" not in message


def test_broken_and_clashing_packages_leave_the_others_alone(outcome):
    assert outcome["lstm"] == "LSTM"


def test_clash_names_both_packages_and_each_can_be_selected(outcome):
    assert f"lit-rl {__version__}" in outcome["gru"]
    assert "Lit_RL.Clashing 4.5" in outcome["gru"]
    assert "write Lit_RL.Clashing/gru or lit-rl/gru" in outcome["gru"]
    assert outcome["lit-rl/gru"] == "GRU"
    assert outcome["lit-rl-clashing/gru"] == "OtherGRU"
