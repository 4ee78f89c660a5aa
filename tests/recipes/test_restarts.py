"""The image recipe, killed and started again with the same command: it ends where an uninterrupted run ends."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.recipes.recipe_runs import METHODS, SMALL, launch, load, read, train, words

pytest.importorskip("sklearn")
# Whatever is random: order, dropout, augmentation, random starts of attacks in training. 8 steps, half an epoch each 2.
RANDOM = {
    "config_overrides": [SMALL["config_overrides"][0].replace("}", ", hidden_dropout_prob: 0.1}")],
    "horizontal_flip": True,
    "crop_padding": 1,
    "adversarial_attack": "pgd",
    "adversarial_epsilon": 0.05,
    "adversarial_steps": 1,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}
STEPS = 8


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    load("digits").write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """{method: output folder of an uninterrupted training}."""
    root = tmp_path_factory.mktemp("whole")
    return {m: train(root / m, method=m, dataset_name=digits, **RANDOM) for m in METHODS}


def outcome(folder):
    """Final metrics but times."""
    metrics = read(folder / "all_results.json")
    kinds = ("accuracy", "loss", "kappa_max")
    return {name: value for name, value in metrics.items() if name.endswith(kinds) and name != "train_loss"}


def interrupted(whole, folder, step):
    """An output folder as it was while the checkpoint after `step` was written: half of it is there."""
    folder.mkdir()
    for name in ("settings.json", *(f"checkpoint-{i}" for i in range(2, step + 1, 2))):
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, folder / name)
    half = folder / f"checkpoint-{step}"
    (half / "trainer_state.json").write_text('{"epoch": 1.')
    (half / "optimizer.pt").unlink()
    for weights in half.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(whole, digits, tmp_path, caplog, method):
    out = tmp_path / "out"
    interrupted(whole[method], out, step=6)
    train(out, method=method, dataset_name=digits, **RANDOM)
    assert f"going on from {out}/checkpoint-4" in caplog.text
    assert outcome(out) == pytest.approx(outcome(whole[method]), rel=1e-6)
    assert read(out / "train_results.json")["train_steps_before"] == 4


def test_a_killed_process_goes_on(whole, digits, tmp_path, caplog):
    out = tmp_path / "out"
    options = SMALL | RANDOM | {"dataset_name": digits, "output_dir": out}
    command, environment = launch("cpu.yaml", "image_classification.py", *words(**options))
    process = subprocess.Popen(  # a group of its own: accelerate starts a process that is to die too
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-2" / "trainer_state.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "test_results.json").exists()
    train(out, dataset_name=digits, **RANDOM)
    assert f"going on from {out}/checkpoint-" in caplog.text
    assert outcome(out) == pytest.approx(outcome(whole["condlr"]), rel=1e-6)


def test_a_finished_training_is_not_trained_again(whole, digits, tmp_path, caplog):
    out = shutil.copytree(whole["condlr"], tmp_path / "out")
    trained, before = (out / "train_results.json").read_text(), (out / f"checkpoint-{STEPS}").stat().st_mtime
    train(out, dataset_name=digits, epsilons=0.05, attack_steps=1, **RANDOM)  # attacks may be asked for afterwards
    assert f"going on from {out}/checkpoint-{STEPS}" in caplog.text
    assert (out / "train_results.json").read_text() == trained
    assert (out / f"checkpoint-{STEPS}").stat().st_mtime == before
    again = outcome(out)
    assert again.pop("test_accuracy_pgd_linf_0.05", None) is None and again.pop("test_robust_accuracy") <= 1
    assert again == pytest.approx(outcome(whole["condlr"]), rel=1e-6)


# ------------------------------------------------------------------------------------------- which checkpoint it is


@pytest.fixture
def choose(whole, tmp_path):
    """The checkpoint that the recipe would go on from, with the settings of the finished one but for `changes`."""
    image_classification, restart = load("image_classification"), load("restart")

    def choose(folder, resume=None, **changes):
        options = SMALL | RANDOM | {"dataset_name": "d", "output_dir": folder, "resume_from_checkpoint": resume}
        _, _, args = image_classification.parse(words(**options | changes))
        return restart.checkpoint_to_resume(args, {"dataset_name": "d"})

    return choose


def test_the_choice_of_a_checkpoint(whole, choose, tmp_path, caplog):
    out = tmp_path / "out"
    assert choose(out) is None  # nothing there: a first start
    with pytest.raises(ValueError, match=r"true needs a whole checkpoint in output_dir; received '.*out'"):
        choose(out, "true")
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(whole["condlr"] / name, out / name)
    assert choose(out) == choose(out, "auto") == choose(out, "true") == str(out / "checkpoint-4")
    assert choose(out, str(out / "checkpoint-2")) == str(out / "checkpoint-2")
    with pytest.raises(
        ValueError, match=r"must go on with its own settings; received 'learning_rate 0.003 → 0.01, seed"
    ):
        choose(out, learning_rate=0.01, seed=5)
    assert choose(out, logging_steps=3, per_device_eval_batch_size=4) == str(out / "checkpoint-4")  # trains the same
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    assert choose(out) == str(out / "checkpoint-2")
    assert "checkpoint-4 holds no optimizer" in caplog.text
    (out / "checkpoint-2-copy").mkdir()
    assert choose(out, "false") is None
    assert [path.name for path in out.glob("check*")] == ["checkpoint-2-copy"]  # else a restart would go on from them
