"""`condlr` on the command line: what each command writes and says, and errors without tracebacks."""

import json
from importlib.metadata import entry_points, version

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from hf_condlr import (
    CompressionReport,
    CondLRConfig,
    RobustnessReport,
    condition_report,
    evaluate_robustness,
    get_robust_lowrank_model,
    load_split,
)
from hf_condlr.cli import main
from hf_condlr.layers import FoldedLayer, InferenceLayer, LowRankLayer, PivotedLayer
from hf_condlr.robustness.attacks import make_attacks
from tests import models

load = AutoModelForImageClassification.from_pretrained


def output(model):
    with torch.no_grad():
        return model(**models.pixels()).logits


@pytest.fixture
def dense(tmp_path):
    models.vit().save_pretrained(tmp_path / "dense")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def factored(tmp_path):
    get_robust_lowrank_model(models.vit(), CondLRConfig(rank_ratio=0.5)).save_pretrained(tmp_path / "factored")
    return tmp_path / "factored"


def call(*words):
    return main([str(word) for word in words])


def test_convert(dense, tmp_path, capsys):
    options = "--rank_ratio 0.5 --tau inf --target_modules fc1 fc2 --head dense --rank_multiple 3"
    assert call("convert", dense, tmp_path / "out", *options.split()) == 0
    said = capsys.readouterr().out
    assert "4 layers converted" in said and f"wrote {tmp_path / 'out'}" in said
    model = load(tmp_path / "out")
    assert [type(m).__name__ for m in model.modules() if isinstance(m, LowRankLayer)] == ["LowRankLinear"] * 4
    fc1 = model.vit.layers[0].mlp.fc1
    assert fc1.tau == float("inf") and fc1.r % 3 == 0
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()  # of the model it was made from


def test_compress(dense, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    options = f"--ratio 0.4 --tau 1 --output {out} --attack pgd-linf --epsilon 1/255 --steps 2 --target_modules fc1 fc2"
    assert call("compress", dense, "--dataset", pictures, *options.split()) == 0
    report = CompressionReport.load(out)
    said = capsys.readouterr().out
    assert str(report) in said and f"wrote {out}: " in said
    assert list(report.dense.robust) == ["pgd-linf, ε = 1/255"] and report.tau == 1
    assert condition_report(load(out)).max_condition_number <= 2 * (1 + 1e-4)
    assert len(condition_report(load(out)).layers) == 4
    options = f"--max_drop 50 --form pivoted --output {out}2 --attack none --sequential_calibration False"
    assert call("compress", dense, "--dataset", pictures, *options.split()) == 0
    assert CompressionReport.load(f"{out}2").max_drop == 50
    settings = json.loads((tmp_path / "out2" / "stages" / "settings.json").read_text())
    assert settings["sequential_calibration"] is False and settings["robust"] is False
    options = f"--ratio 0.4 --output {out}3 --attack none --robust --recovery_steps 1"
    assert call("compress", dense, "--dataset", pictures, *options.split()) == 0
    assert CompressionReport.load(f"{out}3").recovery_steps == 1
    settings = json.loads((tmp_path / "out3" / "stages" / "settings.json").read_text())
    assert settings["robust"] is True and settings["adversarial_epsilon"] == pytest.approx(2 / 255)


def test_convert_with_calibration_data(dense, pictures, tmp_path):
    options = "--compression_ratio 0.4 --init_weights fisher --rank_allocation fisher --conditioned_start --tau 1"
    assert call("convert", dense, tmp_path / "out", *options.split(), "--dataset", pictures, "--batch_size", 4) == 0
    assert condition_report(load(tmp_path / "out")).max_condition_number <= 2 * (1 + 1e-4)
    assert load(tmp_path / "out").condlr.config.init_weights == "fisher"


def test_convert_from_a_saved_config(dense, tmp_path):
    CondLRConfig(r=3, target_modules=r".*\.fc1").save_pretrained(tmp_path / "config")
    assert call("convert", dense, tmp_path / "out", "--config", tmp_path / "config") == 0
    assert load(tmp_path / "out").vit.layers[1].mlp.fc1.r == 3


def test_report(factored, tmp_path, capsys):
    assert call("report", factored, "--plot", tmp_path / "spectra.png") == 0
    assert "vit.layers.0.attention.q_proj" in capsys.readouterr().out
    assert (tmp_path / "spectra.png").stat().st_size > 1000
    assert call("report", factored, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(condition_report(load(factored)).to_dict()))


@pytest.fixture
def pictures(tmp_path):
    return models.write_pictures(tmp_path / "pictures")


def test_attack(factored, pictures, tmp_path, capsys):
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(factored)
    options = ("--dataset", pictures, "--attack", "pgd-linf", "fgsm", "--epsilon", "2/255", "4/255", "--steps", 3)
    written = ("--output_dir", tmp_path / "out", "--plot", tmp_path / "curve.png")
    assert call("attack", factored, *options, "--checks", "quick", *written) == 0
    said = capsys.readouterr().out
    assert "factored@" in said and ": 12 samples, clean" in said and "checks: " in said
    report = RobustnessReport.load(tmp_path / "out" / "report.json")
    assert [(a.name, a.epsilon) for a in report.attacks] == [
        (name, k / 255) for name in ("pgd-linf", "fgsm") for k in (2, 4)
    ]
    assert report.attacks[0].settings["steps"] == 3 and (tmp_path / "curve.png").stat().st_size > 1000
    assert str(report) in said
    direct = evaluate_robustness(
        load(factored),
        load_split(pictures),
        make_attacks(["pgd-linf", "fgsm"], ["2/255", "4/255"], steps=3),
        processor=ViTImageProcessorPil.from_pretrained(factored),
        checks=False,
    )
    assert [a.survived for a in direct.attacks] == [a.survived for a in report.attacks]
    few = ("--dataset", pictures / "test.parquet", "--max_samples", 5, "--checks", "none", "--json")
    assert call("attack", factored, *few) == 0  # the standard attacks
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 5 and found["checks"] == [] and len(found["attacks"]) == 6


def test_fold_and_densify(factored, tmp_path):
    expected = output(load(factored))
    assert call("fold", factored, tmp_path / "folded") == 0
    folded = load(tmp_path / "folded")
    assert any(isinstance(module, FoldedLayer) for module in folded.modules())
    assert call("fold", factored, tmp_path / "pivoted", "--form", "pivoted") == 0
    pivoted = load(tmp_path / "pivoted")
    assert any(isinstance(module, PivotedLayer) for module in pivoted.modules())
    assert torch.allclose(output(pivoted), expected, atol=1e-5)
    assert call("densify", factored, tmp_path / "dense") == 0
    plain = load(tmp_path / "dense")
    assert not any(isinstance(module, (InferenceLayer, LowRankLayer)) for module in plain.modules())
    assert torch.allclose(output(folded), expected, atol=1e-5)
    assert torch.allclose(output(plain), expected, atol=1e-5)
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    assert call("densify", tmp_path / "folded", factored) == 0  # over factors, which go
    assert torch.allclose(output(load(factored)), expected, atol=1e-5)
    assert not list(factored.glob("condlr*"))


def test_export(factored, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    assert call("export", factored, tmp_path / "vit.onnx") == 0
    assert f"{(tmp_path / 'vit.onnx').stat().st_size:,} bytes" in capsys.readouterr().out


def test_an_unreachable_hub_is_said_without_a_traceback(factored, monkeypatch, capsys):
    def fail(*_, **__):
        raise HfHubHTTPError.__bases__[0]("no such host")  # of the HTTP library in use

    monkeypatch.setattr("hf_condlr.cli.models.AutoConfig.from_pretrained", fail)
    assert call("push", factored, "me/vit") == 1
    assert capsys.readouterr().err.startswith("condlr push: the Hub cannot be reached: no such host.")


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("architectures", [["pipeline"], ["AutoConfig"], ["Trainer"], [], ["A", "B"], None])
def test_architectures_must_name_one_model_class(architectures, dense, capsys):
    edit_config(dense, architectures=architectures)
    assert call("report", dense) == 1
    assert "must name one model class of transformers" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("architectures", [3]), ("hidden_size", "x"), ("num_hidden_layers", [1])])
def test_a_config_with_a_value_of_another_type_is_refused(name, value, dense, capsys):
    edit_config(dense, **{name: value})
    assert call("report", dense) == 1
    error = capsys.readouterr().err
    assert "config.json must" in error and name in error


def test_code_of_a_repository_runs_only_with_the_flag(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (dense / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import ViTConfig, ViTForImageClassification\n"
        "class OwnConfig(ViTConfig):\n    model_type = 'own-vit'\n"
        "class OwnModel(ViTForImageClassification):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnModel"}
    edit_config(dense, model_type="own-vit", auto_map=auto_map, architectures=["OwnModel"])
    assert call("convert", dense, tmp_path / "out", "--r", 2) == 1
    assert not (tmp_path / "ran").exists()
    assert call("convert", dense, tmp_path / "out", "--r", 2, "--trust_remote_code") == 0
    assert (tmp_path / "ran").exists()


def test_a_folded_model_is_named_as_such(factored, tmp_path, capsys):
    assert call("fold", factored, tmp_path / "folded") == 0
    assert call("report", tmp_path / "folded") == 0
    assert "κ at most" in capsys.readouterr().out
    assert call("fold", tmp_path / "folded", tmp_path / "again") == 1
    assert "folded" in capsys.readouterr().err


COMPRESS = ("--dataset", "{data}", "--output", "{out}", "--ratio", 0.4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert", "{dense}", "{out}"), "exactly one of r, rank_ratio, compression_ratio must be given"),
        (("convert", "{dense}", "{out}", "--r", 99), r"received r=99"),
        (("convert", "{dense}", "{out}", "--config", "{dense}"), "condlr_config.json"),
        (("convert", "{dense}", "{out}", "--config", "c", "--r", 2), "--config holds all settings; received r"),
        (("convert", "{dense}", "{out}", "--r", 2, "--init_weights", "fisher"), "no calibration_data"),
        (("convert", "{dense}", "{out}", "--r", 2, "--max_length", 9), "these need --dataset; received --max_length"),
        (("convert", "{dense}", "{out}", "--r", 2, "--dataset", "{data}"), "with calibration_data"),
        (("compress", "{dense}", "--dataset", "{data}", "--output", "{out}"), "exactly one of ratio and max_drop"),
        (("compress", "{dense}", *COMPRESS, "--steps", 3), "--attack and --epsilon belong together"),
        (("compress", "{dense}", *COMPRESS, "--attack", "none", "--steps", 3), "--attack none takes no budgets"),
        (("report", "{dense}"), "the model must have factored layers"),
        (("fold", "{dense}", "{out}"), "the model must have factored layers"),
        (("densify", "{dense}", "{out}"), "the model must have factored layers"),
        (("push", "{dense}", "me/x"), "the model must have factored layers"),
        (("report", "{out}"), "MODEL must be a folder, or a name on the Hub; received {out}, which is not a folder"),
        (("convert", "{dense}", "{out}", "--r", 2, "--target_modules", "*fc"), "fc"),
        (("convert", "{dense}", "{dense}", "--r", 2), "OUT must be another folder than MODEL"),
        (("attack", "{dense}", "--dataset", "{data}", "--attack", "fgsm"), "--attack and --epsilon belong together"),
        (
            ("attack", "{dense}", "--dataset", "{data}", "--steps", 3),
            "further options of attacks need them; received only --steps",
        ),
        (
            ("attack", "{dense}", "--dataset", "{data}", "--attack", "fgsm", "--epsilon", "8:255"),
            "epsilon must be a number or a fraction; received '8:255'",
        ),
        (("attack", "{dense}", "--dataset", "{data}", "--split", "dev"), "has the splits train, test; received split="),
        (
            ("attack", "{dense}", "--dataset", "{data}", "--attack", "characters", "--epsilon", 0.1),
            "attacks must take what the data set holds, images; received characters",
        ),
    ],
)
def test_an_error_is_said_without_a_traceback(words, message, dense, pictures, tmp_path, capsys):
    places = {"dense": str(dense), "data": str(pictures), "out": str(tmp_path / "out")}
    assert call(*(str(word).format(**places) for word in words)) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"condlr {words[0]}: ")  # behind the bars of what reads data
    assert message.format(**places) in said
    assert not (tmp_path / "out").exists()


def test_damage_is_said(factored, capsys):
    path = factored / "condlr.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert call("report", factored) == 1
    assert "must be those that were saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [(), ("conver",), ("convert",), ("report", "m", "--jso"), ("convert", "m", "o", "--r", "x"), ("fold", "m", "")],
)
def test_a_wrong_call_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        call(*words)
    assert exit_.value.code == 2
    assert "usage: condlr" in capsys.readouterr().err


def test_the_version_is_that_of_the_installed_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        call("--version")
    assert capsys.readouterr().out == f"condlr {version('hf_condlr')}\n"


def test_the_command_is_installed_and_its_help_teaches(capsys):
    (script,) = entry_points(group="console_scripts", name="condlr")
    with pytest.raises(SystemExit, match="0"):
        script.load()(["--help"])
    said = capsys.readouterr().out
    for command in ("compress", "convert", "report", "attack", "fold", "densify", "export", "push"):
        assert f"condlr {command} " in said  # an example each
        with pytest.raises(SystemExit, match="0"):
            call(command, "--help")
        assert "MODEL" in capsys.readouterr().out
