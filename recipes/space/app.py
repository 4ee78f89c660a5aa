r"""Models side by side in a browser: an input of one's own, an attack, the predictions, and κ of each layer.

    make demo && python recipes/space/app.py       # or: MODELS="out/dense out/small" python recipes/space/app.py

`MODELS` names two or three classifiers of images, or of texts, by folders or names on the Hub; by default those that
`make demo` wrote. `EXAMPLES` is a folder of images, or a file with a text on each line. Copy this folder to a Space and
change it: it needs no other file.
"""

import io
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_condlr import condition_report, is_factored
from hf_condlr.robustness.attacks import PGD, CharacterAttack, PixelModel, TextModel

DEMO = Path("outputs/demo/seed0")
COLORS = ("#666666", "#d1802f", "#2b6cb0", "#3f8f5f")
SHOWN = 224  # pixels of a picture's shorter side in the browser, at least
STEPS = 10
NOTE = (
    "The attack tries to change each model's own prediction of the input. A prediction that survives it here may fall "
    "to a stronger attack. κ = σ_max/σ_min of a layer's weight, of a factored layer over its rank."
)


@dataclass
class Classifier:
    """A model with what turns inputs into its own."""

    name: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, source: str) -> "Classifier":
        """Read a model and its processor from a folder or the Hub."""
        config = AutoConfig.from_pretrained(source)
        of_texts = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
        auto, processor = AutoModelForImageClassification, AutoImageProcessor
        if of_texts:
            auto, processor = AutoModelForSequenceClassification, AutoTokenizer
        model = auto.from_pretrained(source).eval()
        return cls(source.rstrip("/").rpartition("/")[2], model, processor.from_pretrained(source))

    @property
    def takes(self) -> str:
        """`pixels` or `texts`."""
        return "texts" if hasattr(self.processor, "tokenize") else "pixels"

    @cached_property
    def attacked(self) -> Any:
        """The model as a map from pixels of [0, 1], or from texts, to logits."""
        if self.takes == "texts":
            return TextModel(self.model, self.processor)
        return PixelModel.from_processor(self.model, self.processor)

    @torch.no_grad()
    def probabilities(self, batch: Any) -> torch.Tensor:  # (classes,)
        """Of the only sample of a batch."""
        return self.attacked(batch).softmax(-1)[0]

    def named(self, probabilities: torch.Tensor) -> dict[str, float]:
        """What `gr.Label` shows."""
        return {str(self.model.config.id2label[i]): float(p) for i, p in enumerate(probabilities)}

    def pixels(self, image: PIL.Image.Image) -> torch.Tensor:  # (1, c, h, w)
        """An image of any size and mode as pixels of [0, 1]."""
        config = self.model.config
        image = image.convert("RGB" if getattr(config, "num_channels", 3) == 3 else "L")
        if not getattr(self.processor, "do_resize", True):
            size = config.image_size
            width, height = (size, size) if isinstance(size, int) else size[::-1]
            image = image.resize((width, height), PIL.Image.Resampling.BOX)
        return self.processor(image, do_normalize=False, return_tensors="pt")["pixel_values"]

    def attack(self, given: Any, epsilon: float) -> tuple[Any, dict[str, float], dict[str, float]]:
        """The attacked input, and the predictions before and after."""
        batch = [given] if self.takes == "texts" else self.pixels(given)
        before = self.probabilities(batch)
        if epsilon > 0:
            attack = CharacterAttack(epsilon) if self.takes == "texts" else PGD(epsilon, steps=STEPS)
            batch = attack(self.attacked, batch, before.argmax()[None])
        shown = batch[0] if self.takes == "texts" else picture(batch[0])
        return shown, self.named(before), self.named(self.probabilities(batch))

    def condition_numbers(self) -> list[float]:
        """κ of each linear weight but the head's, from input to output; of a factored model its factored layers."""
        if is_factored(self.model):
            return [layer.condition_number for layer in condition_report(self.model).layers]
        linear = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        hidden = [m for m in linear if m.out_features != self.model.config.num_labels]
        return [torch.linalg.cond(m.weight.detach().double()).item() for m in hidden]


def picture(pixels: torch.Tensor) -> PIL.Image.Image:
    """An image (c, h, w), with its pixels magnified where it is small."""
    array = (pixels.detach().numpy() * 255).round().astype(np.uint8)
    image = PIL.Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).convert("RGB")
    factor = max(1, SHOWN // min(image.size))
    return image.resize((image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST)


def draw(classifiers: list[Classifier]) -> PIL.Image.Image:
    """κ of each layer, a line for each model."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for classifier, color in zip(classifiers, COLORS, strict=False):
        kappa = classifier.condition_numbers()
        axes.plot(range(1, len(kappa) + 1), kappa, "o-", markersize=4, color=color, label=classifier.name)
    axes.set(yscale="log", xlabel="linear layer, from input to output", ylabel="κ(W)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _image(figure)


def _image(figure: Figure) -> PIL.Image.Image:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return PIL.Image.open(content)


def examples(takes: str, source: str | None) -> list[Any]:
    """Inputs to choose from: those of `EXAMPLES`, or test images of the demo's digits."""
    if takes == "texts":
        lines = Path(source).read_text(encoding="utf-8").splitlines() if source else []
        return [line for line in lines if line] or ["A moving film, and a funny one.", "Two hours that never end."]
    if source:
        return [PIL.Image.open(path) for path in sorted(Path(source).iterdir()) if path.suffix in (".png", ".jpg")]
    digits = DEMO.parent / "digits" / "test.parquet"
    if not digits.is_file():
        return []
    from datasets import Dataset

    rows = Dataset.from_parquet(str(digits)).take(8)["image"]
    return [picture(torch.tensor(np.asarray(image) / 255)[None]) for image in rows]


def build(sources: list[str], source_of_examples: str | None = None) -> gr.Blocks:
    """The page; its function is called `attack` in Gradio's API."""
    classifiers = [Classifier.load(source) for source in sources]
    kinds = {classifier.takes for classifier in classifiers}
    if len(kinds) != 1:
        raise ValueError(f"MODELS must all be classifiers of images, or all of texts; received {sorted(kinds)}")
    takes = kinds.pop()
    choices = examples(takes, source_of_examples)

    def attack(given: Any, epsilon: float) -> list[Any]:
        if given is None or given == "":
            raise gr.Error("Give an input, or choose an example.")
        return [value for classifier in classifiers for value in classifier.attack(given, epsilon)]

    with gr.Blocks(title="hf_condlr", analytics_enabled=False) as page:
        gr.Markdown(f"# Models under attack, side by side\n\n{NOTE}")
        with gr.Row():
            with gr.Column(min_width=220):
                if takes == "texts":
                    given = gr.Textbox(choices[0], label="Sentence", lines=3)
                    meaning, most, start = "share of the words that may get a typing error", 0.5, 0.2
                else:
                    first = choices[0] if choices else None
                    given = gr.Image(first, type="pil", format="png", label="Image", height=280)
                    meaning, most, start = "how much each pixel of [0, 1] may change", 0.2, 0.05
                epsilon = gr.Slider(0, most, start, step=0.005, label="ε", info=meaning)
                button = gr.Button("Attack", variant="primary")
                if choices:
                    gr.Examples(choices, given, label="Examples")
            outputs = []
            for classifier in classifiers:  # with what the first example gives
                shown, before, after = classifier.attack(choices[0], start) if choices else (None, None, None)
                with gr.Column(min_width=220):
                    gr.Markdown(f"### {classifier.name}\n{classifier.model.num_parameters():,} parameters")
                    if takes == "texts":
                        changed: Any = gr.Textbox(shown, label="Attacked sentence", lines=3)
                    else:
                        options: Any = {"type": "pil", "format": "png", "height": 280, "interactive": False}
                        changed = gr.Image(shown, label="Attacked image", **options)
                    outputs.append(changed)
                    for when, found in {"Before": before, "After": after}.items():
                        outputs.append(gr.Label(found, num_top_classes=3, label=f"{when} the attack"))
        gr.Markdown("### Condition number of each layer")
        gr.Image(draw(classifiers), show_label=False, format="png", interactive=False)
        button.click(attack, [given, epsilon], outputs, api_name="attack")
    return page


def main() -> None:
    """Serve the models named by the environment."""
    torch.set_num_threads(1)  # small models gain nothing from more
    default = " ".join(str(DEMO / name) for name in ("dense", "lowrank", "condlr"))
    page = build(os.environ.get("MODELS", default).split(), os.environ.get("EXAMPLES"))
    page.launch(theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]))  # none from elsewhere


if __name__ == "__main__":
    main()
