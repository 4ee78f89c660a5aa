"""Which checkpoint a command that is given again resumes from."""

import json

import pytest

from hf_condlr import CondLRTrainingArguments, ModelArguments, checkpoint_to_resume


@pytest.fixture
def choose(tmp_path):
    def choose(resume=None, tau=0.1, **changes):
        options = {"learning_rate": 3e-3, "use_cpu": True, "resume_from_checkpoint": resume} | changes
        args = CondLRTrainingArguments(str(tmp_path / "out"), **options)
        return checkpoint_to_resume(args, ModelArguments("m", tau=tau))

    return choose


def write(folder, optimizer="optimizer.pt", state='{"global_step": 2}'):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(state)
    if optimizer:
        (folder / optimizer).write_text("")
    return str(folder)


def test_the_choice_of_a_checkpoint(choose, tmp_path, caplog):
    out = tmp_path / "out"
    assert choose() is None  # nothing there: a first start
    assert json.loads((out / "settings.json").read_text())["tau"] == 0.1
    with pytest.raises(ValueError, match=r"True needs a checkpoint in output_dir; received none in .*out"):
        choose("true")
    first, second = write(out / "checkpoint-2", "optimizer.bin"), write(out / "checkpoint-10")
    write(out / "checkpoint-12", state='{"epoch": 1.')
    write(out / "checkpoint-20-copy")
    assert choose() == choose("auto") == choose("true") == second
    assert "checkpoint-12 is incomplete" in caplog.text
    assert choose(first) == first
    assert choose(logging_steps=3, per_device_eval_batch_size=4) == second  # trains the same
    assert choose(save_only_model=True) is None  # nothing can be resumed without an optimizer


def test_other_settings_are_refused(choose, tmp_path):
    write(tmp_path / "out" / "checkpoint-2")
    choose()
    with pytest.raises(
        ValueError, match=r"own settings; received tau 0.1 → 0.2, learning_rate 0.003 → 0.01, seed 42 → 5"
    ):
        choose(tau=0.2, learning_rate=0.01, seed=5)
    (tmp_path / "out" / "checkpoint-2-copy").mkdir()
    assert choose("false", tau=0.2) is None
    assert [path.name for path in (tmp_path / "out").glob("check*")] == ["checkpoint-2-copy"]
    assert choose(tau=0.2) is None
