"""``lit-rl trunks list | check | new``: what is printed, written and refused."""

import pytest
import torch

from lit_rl import __version__, trunk_commands
from lit_rl.errors import UserError

LIST = """
import sys
from lit_rl.trunk_commands import main
code = main(["list"])
assert not {"torch", "lit_rl.trunks", "lit_rl_broken", "lit_rl_clashing"} & set(sys.modules)
sys.exit(code)
"""


def test_list_reads_metadata_only_and_shows_clash_and_breakage(run_python, broken_and_clashing):
    done = run_python("-c", LIST, site=broken_and_clashing)
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["NAME", "PACKAGE", "VERSION", "CLASS", "STATUS"]
    rows = [line.split(maxsplit=4) for line in lines]
    clash = "clash with {}: select {}"
    for row in (
        [
            "gru",
            "Lit_RL.Clashing",
            "4.5",
            "lit_rl_clashing:OtherGRU",
            clash.format("lit-rl", "Lit_RL.Clashing/gru"),
        ],
        [
            "gru",
            "lit-rl",
            __version__,
            "lit_rl.trunks.recurrent:GRU",
            clash.format("Lit_RL.Clashing", "lit-rl/gru"),
        ],
        ["lstm", "lit-rl", __version__, "lit_rl.trunks.recurrent:LSTM", "ok"],
        ["no_module", "lit-rl-broken", "1.2.3", "lit_rl_nowhere:Anything", "broken: module not found"],
        ["raises", "lit-rl-broken", "1.2.3", "lit_rl_broken.raises:Anything", "ok"],
    ):
        assert row in rows


def test_list_shows_a_target_that_is_none(tmp_path, monkeypatch, capsys):
    info = tmp_path / "odd-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 9.0\n")
    (info / "entry_points.txt").write_text("[lit_rl.trunks]\nspaced = what:ever:this\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert trunk_commands.main(["list"]) == 0
    assert "broken: target is not pkg.mod:Class" in capsys.readouterr().out


def test_check_prints_a_line_for_each_check_and_the_counts(capsys):
    assert trunk_commands.main(["check", "mlp", "--option", "d_model=3", "--option", "activation=relu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    skipped = [] if torch.cuda.is_available() else ["skipped cuda: no CUDA device here"]
    assert [line for line in lines if not line.startswith("passed  ")] == skipped
    assert last == f"{len(lines) - len(skipped)} passed, 0 failed, {len(skipped)} skipped"


FAULTY = """
from lit_rl.trunks import GRU


class Faulty(GRU):
    def forward(self, x, state, is_init):
        return super().forward(x, state, is_init & False)
"""


def test_check_of_a_faulty_trunk_says_what_where_and_exits_with_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "faulty_trunk.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    assert trunk_commands.main(["check", "faulty_trunk.Faulty"]) == 1
    out = capsys.readouterr().out
    assert "failed  reset starts afresh: resets at t=0, row 0, episode from t=0: y is off by" in out
    assert "passed  values agree" in out
    assert " 2 failed" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "grru"], "unknown trunk 'grru'; did you mean gru"),
        (
            ["check", "mlp", "--option", "depth=3"],
            "'mlp' has no option 'depth'; it has d_model, n_layers, act",
        ),
        (["check", "mlp", "--option", "n_layers"], "'n_layers' is not KEY=VALUE"),
        (
            ["check", "mlp", "--option", "n_layers=0"],
            "cannot be built with {'n_layers': 0}: ValueError: n_layers",
        ),
        (["check", "lit_rl.registry.TrunkEntry"], "does not subclass lit_rl.trunks.base.Trunk"),
        (["new", "gru"], "'gru' of lit-rl"),
        (["new", "two words"], "use letters, digits"),
        (["new", "1st"], "use letters, digits"),
        (["new", "a--b"], "use letters, digits"),
        (["new", "../up"], "use letters, digits"),
        (["new", "none"], "its class None means something else"),
        (["new", "trunk"], "its class Trunk means something else"),
        (["new", "fine", "--path", "nowhere"], "No such file or directory; choose another --path"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        trunk_commands.main(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_new_package_installs_and_passes_its_own_tests(tmp_path, run_python, install, capsys):
    assert trunk_commands.main(["new", "leaky-memory", "--path", str(tmp_path)]) == 0
    folder = tmp_path / "lit-rl-leaky-memory"
    assert str(folder) in capsys.readouterr().out
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {"pyproject.toml", "README.md", "lit_rl_leaky_memory.py", "tests/test_leaky_memory.py"}

    install(folder, into=tmp_path / "site")
    done = run_python("-m", "pytest", "-q", site=tmp_path / "site", cwd=folder)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


def test_new_takes_no_installed_package_away(tmp_path, monkeypatch):
    """It may have other trunks than the one that it is called after."""
    info = tmp_path / "site" / "lit_rl_mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lit_rl_mine\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(UserError, match="the package lit-rl-mine is installed already"):
        trunk_commands.main(["new", "mine", "--path", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_new_refuses_an_existing_folder_and_leaves_it_alone(tmp_path):
    mine = tmp_path / "lit-rl-mine" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        trunk_commands.main(["new", "mine", "--path", str(tmp_path)])
    assert [path.name for path in mine.parent.iterdir()] == ["notes.txt"]
