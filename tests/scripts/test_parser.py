"""`ScriptParser`: a file first, the command line after it, mistakes in one line, and a help that can be read."""

from dataclasses import dataclass, field

import pytest

from hf_condlr import AttackArguments, CondLRTrainingArguments, ModelArguments, ScriptParser, require_one_group


@dataclass
class Arguments:
    """Options of this test."""

    names: list[str] = field(default_factory=list, metadata={"help": "Several."})
    size: int | None = field(default=None, metadata={"help": "A size."})
    mapping: str | None = field(default=None, metadata={"help": "YAML."})


def parse(*words):
    return ScriptParser((Arguments, CondLRTrainingArguments), description="A test.").parse(words)


def refused(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.partition("error: ")[2]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.yaml", "learning_rate: 1e-3\nnames: [0.1, 2/255]\nbf16: false\nsize: null\nmapping: {a: 1, b: [2]}\n"),
        ("run.json", '{"learning_rate": 0.001, "names": [0.1, "2/255"], "bf16": false, "mapping": {"a": 1, "b": [2]}}'),
    ],
)
def test_a_file_comes_first_and_the_command_line_wins(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    ours, training = parse(str(tmp_path / file), "--learning_rate", "3e-3", "--output_dir", str(tmp_path), "--use_cpu")
    assert (ours.names, ours.size, ours.mapping) == (["0.1", "2/255"], None, '{"a": 1, "b": [2]}')
    assert (training.learning_rate, training.bf16, training.use_cpu) == (3e-3, False, True)  # YAML takes 1e-3 for text


def test_a_mistake_is_one_line(tmp_path, capsys):
    for name, text in {"list": "- 1", "bad": "a: [1", "unknown": "learning_rat: 1e-3"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    files = {name: str(tmp_path / f"{name}.yaml") for name in ("list", "bad", "unknown", "gone")}
    assert "list.yaml must hold options and their values; received [1]" in refused(capsys, files["list"])
    assert "expected ',' or ']'" in refused(capsys, files["bad"])
    assert "No such file" in refused(capsys, files["gone"])
    assert refused(capsys, files["unknown"]) == (
        "unknown option --learning_rat; did you mean --learning_rate? (--help lists the options)"
    )
    assert "argument --size: invalid int value: 'x'" in refused(capsys, "--size", "x").replace("/--size", "")
    wrong = refused(capsys, "--conditioning_warmup_ratio", "2", "--output_dir", str(tmp_path), "--use_cpu")
    assert wrong.startswith("conditioning_warmup_ratio must lie in [0, 1]; received 2.0")


def test_the_help_has_the_scripts_options_apart_from_the_trainers(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    own = capsys.readouterr().out
    assert (
        "A test." in own and "Options of this test:" in own and "--size" in own and "--conditioning_warmup_ratio" in own
    )
    assert "--learning_rate" not in own and "--weight-decay" not in own and "--help_trainer" in own
    assert len(own.splitlines()) < 100
    with pytest.raises(SystemExit):
        parse("--help_trainer")
    trainers = capsys.readouterr().out
    assert "--learning_rate" in trainers and "--size" not in trainers and "--conditioning_warmup_ratio" not in trainers


def test_every_group_of_the_package_has_a_title_and_every_option_a_help(capsys):
    with pytest.raises(SystemExit):
        ScriptParser((ModelArguments, AttackArguments)).parse(["--help"])
    said = capsys.readouterr().out
    assert "Model: which one, and what becomes of its linear layers:" in said and "Attacks: on the trained" in said
    assert "(default: None)" not in said


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as accelerate/ddp_cpu.yaml without --use_cpu true
    require_one_group(2)
    with pytest.raises(ValueError, match=r"2 processes were started and must work as one group; received 1 in a group"):
        require_one_group(1)
