"""A recipe's options: one dataclass field each, from flag, environment, file or default, in that order."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from samestep.launcher import contract
from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.command_line.options import Option, load, misspelt, peek, table
from samestep.launcher.contract import UsageError
from samestep.train import TrainConfig


@dataclass
class MyConfig(TrainConfig):
    """A recipe's own."""

    width: int = 64
    epochs: int = 3
    kind: Literal["small", "large"] = "small"
    dropout: float = 0.5
    mask: bool = False
    tags: tuple[str, ...] = ()


def given(*argv: str, environ: dict[str, str] | None = None, kind: type[Any] = MyConfig) -> Any:
    return load(kind, argv, environ or {})


def test_defaults_are_the_dataclasses() -> None:
    assert given() == MyConfig()


def test_each_source_wins_over_the_next(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("width = 3\nglobal_batch_size = 5\nseed = 9\n")
    environ = {"SAMESTEP_WIDTH": "2", "SAMESTEP_GLOBAL_BATCH_SIZE": "4"}
    config = given("--width", "1", "--config", str(file), environ=environ)
    assert (config.width, config.global_batch_size, config.seed, config.epochs) == (1, 4, 9, 3)


def test_a_variable_that_is_nearly_an_option_is_named_and_others_are_left_alone() -> None:
    fine = [
        "SAMESTEP_WIDTH",
        "SAMESTEP_FENCE",
        "SAMESTEP_PORT_80_TCP",
        "SAMESTEP_SERVICE_HOST",
        "SAMESTEP_CLUSTER",
        "EPOCH",
    ]
    wrong = ["SAMESTEP_EPOCH", "SAMESTEP_GLOBAL_BATCHSIZE", "SAMESTEP_WITDH"]
    told = misspelt(MyConfig, dict.fromkeys([*fine, *wrong], "1"))
    assert told == [
        "SAMESTEP_EPOCH in the environment sets nothing: did you mean SAMESTEP_EPOCHS?",
        "SAMESTEP_GLOBAL_BATCHSIZE in the environment sets nothing: did you mean SAMESTEP_GLOBAL_BATCH_SIZE?",
        "SAMESTEP_WITDH in the environment sets nothing: did you mean SAMESTEP_WIDTH?",
    ]


def test_the_file_may_be_named_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("width = 3")
    assert given(environ={"SAMESTEP_CONFIG": str(tmp_path / "run.toml")}).width == 3


@pytest.mark.parametrize("flag", ["--global-batch-size", "--global_batch_size"])
def test_flags_have_both_spellings(flag: str) -> None:
    assert given(flag, "7").global_batch_size == 7
    assert given(f"{flag}=7").global_batch_size == 7


@pytest.mark.parametrize("key", ["global-batch-size", "global_batch_size"])
def test_file_keys_have_both_spellings(tmp_path: Path, key: str) -> None:
    (tmp_path / "run.toml").write_text(f"{key} = 7")
    assert given("--config", str(tmp_path / "run.toml")).global_batch_size == 7


def test_values_keep_their_underscores_and_dashes() -> None:
    assert given("--run-dir", "my_run-1/a_b").run_dir == Path("my_run-1/a_b")
    assert given("--resume=__latest__").resume == "__latest__"


def test_each_type_is_read_as_what_it_is(tmp_path: Path) -> None:
    config = given("--num-workers", "4", "--dropout", "1e-3", "--mask", "--kind", "large", "--max-steps", "3")
    assert (config.num_workers, config.dropout, config.mask, config.kind, config.max_steps) == (
        4,
        1e-3,
        True,
        "large",
        3,
    )
    assert given("--num-workers", "auto").num_workers == "auto"
    (tmp_path / "run.toml").write_text('mask = true\ntags = ["a", "b"]\nnum_workers = 2\ndropout = 0.25')
    config = given("--config", str(tmp_path / "run.toml"))
    assert (config.mask, config.tags, config.num_workers, config.dropout) == (True, ("a", "b"), 2, 0.25)
    assert given(environ={"SAMESTEP_MASK": "true", "SAMESTEP_NUM_WORKERS": "3"}).num_workers == 3


@pytest.mark.parametrize(
    ("argv", "words", "hint"),
    [
        (["--widht", "3"], "--widht", "--width"),
        (["--global-batchsize", "3"], "--global-batchsize", "--global-batch-size"),
        (["--xyzzy", "3"], "--xyzzy", ""),
        (["extra"], "extra", ""),
        (["--width", "wide"], "width.*wide", ""),
        (["--width", "1.5"], "--width.*whole.*1.5", ""),
        (["--global_batch_size=0.5"], "--global-batch-size.*whole.*0.5", ""),
        (["--max-steps", "2.5"], "--max-steps.*whole.*2.5", ""),
        (["--num-workers", "2.5"], "--num-workers.*whole.*2.5", ""),
        (["--dropout", "half"], "dropout.*half", ""),
        (["--kind", "medium"], "medium.*kind", ""),
        (["--num-workers", "many"], "num-workers.*many", ""),
        (["--width"], "width", ""),
        (["--global-batch-size", "0"], "--global-batch-size.*at least 1.*0", ""),
        (["--epochs", "-1"], "--epochs.*at least 0.*-1", ""),
        (["--shards", "0"], "--shards.*at least 1.*0", ""),
        (["--clip-grad-norm", "0"], "--clip-grad-norm.*above 0.*0", ""),
        (["--clip-grad-norm", "nan"], "--clip-grad-norm.*above 0.*nan", ""),
        (["--seed", "-1"], "--seed.*-1", ""),
        (["--seed", str(2**63)], "--seed.*below 2", ""),
        (["--num-workers", "-1"], "num-workers.*-1", ""),
    ],
    ids=" ".join,
)
def test_a_mistake_on_the_command_line_names_the_option_and_the_value(argv: list[str], words: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){words}") as raised:
        given(*argv)
    assert len(str(raised.value).splitlines()) <= 4
    assert hint in raised.value.hint


def test_of_a_flag_given_twice_the_last_counts_and_lists_collect() -> None:
    config = given(*"--epochs 4 --epochs=5 --no-mask --mask --width wide --width 3 --tags a --tags b".split())
    assert (config.epochs, config.mask, config.width, config.tags) == (5, True, 3, ("a", "b"))


def test_a_wrong_value_in_the_environment_names_the_variable() -> None:
    with pytest.raises(UsageError, match=r"SAMESTEP_GLOBAL_BATCH_SIZE.*four"):
        given(environ={"SAMESTEP_GLOBAL_BATCH_SIZE": "four"})


def test_a_fraction_is_never_rounded_wherever_it_comes_from(tmp_path: Path) -> None:
    """3.0 is a whole number, 3.5 is not."""
    assert given("--width", "3.0").width == 3
    with pytest.raises(UsageError, match=r"--epochs.*whole.*2\.5.*environment"):
        given(environ={"SAMESTEP_EPOCHS": "2.5"})
    (tmp_path / "run.toml").write_text("width = 3.5")
    with pytest.raises(UsageError, match=r"width.*3\.5"):
        given("--config", str(tmp_path / "run.toml"))
    assert given("--width", "3", "--config", str(tmp_path / "run.toml")).width == 3


def test_an_empty_variable_is_not_set() -> None:
    assert given(environ={"SAMESTEP_WIDTH": ""}).width == 64


def test_an_option_called_like_a_variable_of_the_launchers_has_its_own_value_under_each_launcher() -> None:
    @dataclass
    class Genetic(TrainConfig):
        generation: int = 5
        token: str = "<pad>"

    environ = {"SAMESTEP_GENERATION": "0", "SAMESTEP_TOKEN": "that of the run", "SAMESTEP_SEED": "3"}
    config = given(environ=environ, kind=Genetic)
    assert (config.generation, config.token, config.seed) == (5, "<pad>", 3)
    assert given("--generation", "6", environ=environ, kind=Genetic).generation == 6


def test_all_that_the_launcher_tells_a_rank_is_no_option() -> None:
    """But for the run directory and the file of options, which are."""
    told = {value for name, value in vars(contract).items() if name.startswith("ENV_")}
    assert told - contract.NOT_OPTIONS == {contract.ENV_RUN_DIR, contract.ENV_CONFIG}


@pytest.mark.parametrize(
    ("text", "words"),
    [("widht = 3", "widht"), ("width = ", "TOML"), ('width = "wide"', "width"), ("[model]\nwidth = 3", "model")],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        given("--config", str(tmp_path / "run.toml"))


def test_an_unknown_key_of_the_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("widht = 3")
    with pytest.raises(UsageError) as raised:
        given("--config", str(tmp_path / "run.toml"))
    assert "width" in raised.value.hint


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        given("--config", "nowhere.toml")


def test_a_file_that_is_not_utf_8_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"width = 3  # \xff\n")
    with pytest.raises(UsageError, match="expected to be valid TOML"):
        given("--config", str(tmp_path / "run.toml"))


def test_a_file_that_spells_an_option_two_ways_is_refused_with_both(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("log-every = 1\nlog_every = 5\n")
    with pytest.raises(UsageError, match="to set each option once, but has log-every and log_every") as raised:
        given("--config", str(tmp_path / "run.toml"))
    assert "drop one of them" in raised.value.hint


def test_a_file_that_names_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("config = 'other.toml'\nwidth = 3\n")
    with pytest.raises(UsageError, match=r"run\.toml .* has config, which names another file"):
        given("--config", str(tmp_path / "run.toml"))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfwidth = 3\r\nrun_dir = 'here'\r\n")
    config = given("--config", str(tmp_path / "run.toml"))
    assert (config.width, config.run_dir) == (3, Path("here"))
    assert Recipe("r.py", ("--config", str(tmp_path / "run.toml"))).run_dir({}) == Path("here")


@pytest.mark.parametrize("text", ["run_dir = ''", "run_dir = 5", "run-dir = ['a']"])
def test_a_path_that_is_empty_or_no_string_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    for words in (["--config", str(tmp_path / "run.toml")], ["--run-dir", ""], ["--weights="]):
        with pytest.raises(UsageError, match="is expected to be a path, but is"):
            given(*words)


@dataclass(kw_only=True)
class Needy(TrainConfig):
    """Has an option without default."""

    data: Path
    rate: Annotated[float, Option("learning rate", "1/step")]


def test_required_options_can_come_from_anywhere() -> None:
    config = given("--data", "x", environ={"SAMESTEP_RATE": "0.5"}, kind=Needy)
    assert (config.data, config.rate) == (Path("x"), 0.5)


def test_a_missing_required_option_is_named() -> None:
    with pytest.raises(UsageError, match="--rate"):
        given("--data", "x", kind=Needy)


def test_a_new_default_keeps_the_inherited_help(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {flag: (environ, default, text) for flag, environ, default, text in table(MyConfig)}
    inherited = {flag: text for flag, _, _, text in table(TrainConfig)}
    assert rows["--epochs"] == ("SAMESTEP_EPOCHS", "3", inherited["--epochs"])
    assert "total epochs" in inherited["--epochs"]
    with pytest.raises(SystemExit) as raised:
        given("--help")
    assert raised.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "total epochs of the run" in " ".join(shown.split())
    assert "--width" in shown


def test_every_option_has_help() -> None:
    assert [flag for flag, _, _, text in table(TrainConfig) if not text] == []


def test_loading_one_recipe_leaves_the_next_alone() -> None:
    given("--epochs", "9")
    assert given(kind=TrainConfig).epochs == 1
    assert {flag: default for flag, _, default, _ in table(TrainConfig)}["--epochs"] == "1"


def test_peek_reads_somebody_elses_flags_without_judging_them() -> None:
    tokens = ["--what", "--run_dir", "a", "x", "--run-dir=b", "--run-dirs", "c"]
    assert peek(tokens, "run-dir") == "b"
    assert peek(["--run-dir"], "run-dir") is None
    assert peek([], "run-dir") is None


def test_print_config_is_answered_once_by_rank_zero_and_creates_nothing(start: Any) -> None:
    ended = start("small", "--print-config", "--epochs", 7, ranks=2)
    assert ended.codes == [0, 0], ended.stderrs
    assert "flag --epochs" in ended.stdout
    assert tomllib.loads(ended.stdout)["epochs"] == 7
    assert (ended.cwd / "rank-1.out").read_text() == ""
    assert not any(path.is_dir() for path in ended.cwd.iterdir())


def test_help_of_a_recipe_tells_its_own_options_from_those_of_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        given("--help")
    common, own = capsys.readouterr().out.split("Options of this recipe alone")
    assert "--epochs" in common
    assert all(f"--{name}" in own for name in ("width", "kind", "dropout", "mask", "tags"))
    assert "--seed" not in own
