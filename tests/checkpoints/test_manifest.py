"""What `config.json` states of a checkpoint, read by one parser."""

import json
import math

import pytest

from hf_condlr.checkpoints.manifest import Manifest
from hf_condlr.checkpoints.restore import weight_files
from hf_condlr.errors import CheckpointError
from tests import models
from tests.checkpoints.checkpoint_models import Q, convert


def test_the_manifest_survives_json(tmp_path):
    model = convert("vit", models.vit(), tau="inf")
    model.save_pretrained(tmp_path)
    _, manifest = weight_files(tmp_path)
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict(), allow_nan=False))) == manifest
    assert manifest.layers[Q].tau == manifest.layers[Q].bound == math.inf


LAYER = {"r": 2, "form": "factored", "tau": "inf", "center": "nearest", "orthonormal": True, "bound": "inf"}
MANIFEST = {
    "quant_method": "condlr",
    "format": 1,
    "weights": "condlr.safetensors",
    "sha256": {},
    "layers": {"a": LAYER},
}


def nested(depth):
    values = []
    for _ in range(depth):
        values = [values]
    return values


@pytest.mark.parametrize(
    "changed",
    [
        *({"layers": value} for value in (None, 3, [], [LAYER], {"a": None}, {"a": []}, {"a": {}}, {"": LAYER})),
        *({"layers": {name: LAYER}} for name in ("__class__", "a.__dict__", "a..b", "a b", "a/b", ".a")),
        *({"layers": {"a": LAYER | {"r": value}}} for value in (0, -1, 1.5, "2", True, None, [2])),
        *({"layers": {"a": LAYER | {"tau": value}}} for value in (-1, "nan", "x", None, [], 10**400)),
        *({"layers": {"a": LAYER | {"bound": value}}} for value in (0.5, "nan", {}, 10**400)),
        *({"layers": {"a": LAYER | {"center": value}}} for value in ("x", None, [], 3)),
        {"layers": {"a": LAYER | {"form": []}}},
        {"layers": {"a": LAYER | {"bound": 1.1, "orthonormal": False}}},
        *({"weights": value} for value in (None, 3, [], "", "model.safetensors", "condlr.safetensors/x")),
        *({"sha256": value} for value in (None, 3, ["x"], {"condlr.safetensors": 3}, {"x": "0" * 64})),
        *({"config": value} for value in (3, "x", [1], {"r": "x"}, {"shape": "round"}, {"r": nested(2000)})),
        *({"format": value} for value in (None, "1", 2, [])),
        {"more": 1},
    ],
)
def test_odd_values_are_one_error(changed):
    assert Manifest.from_dict(MANIFEST).layers["a"].r == 2
    with pytest.raises(CheckpointError):
        Manifest.from_dict(MANIFEST | changed)


@pytest.mark.parametrize("values", [None, [], "condlr", 3])
def test_a_manifest_is_an_object(values):
    with pytest.raises(CheckpointError, match="format None"):
        Manifest.from_dict(values)
