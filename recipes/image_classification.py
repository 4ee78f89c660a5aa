"""Fine-tune a small ViT dense, at low rank, or at low rank with bounded condition numbers, and attack the result.

    accelerate launch recipes/image_classification.py --method dense --epochs 6 --output_dir outputs/dense
    accelerate launch recipes/image_classification.py --method condlr --pretrained outputs/dense

A JSON or YAML file with the same names may be the only argument. The data are the 1,797 handwritten 8×8 digits that
scikit-learn carries. Every method sweeps the same learning rates; validation accuracy alone chooses one of them, and
only that model meets the test split and the attacks. Needs `pip install 'hf_condlr[demo]'`.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from hf_condlr import CondLRConfig, attach_manifold_step, condition_report, get_robust_lowrank_model, to_dense_model
from hf_condlr.attacks import PGD, PixelModel

METHODS = ("dense", "lowrank", "condlr")


@dataclass
class Arguments:
    """What the command line, or a JSON or YAML file, may set."""

    method: str = field(default="condlr", metadata={"help": "dense; lowrank: U, S, V free; condlr: κ(S) ≤ 1 + tau."})
    pretrained: str | None = field(
        default=None, metadata={"help": "Dense checkpoint to start from; none: from scratch."}
    )
    rank_ratio: float = field(default=0.2, metadata={"help": "Rank of each layer as a share of its full rank."})
    tau: float = field(default=0.1, metadata={"help": "Tolerance of condlr: condition numbers stay ≤ 1 + tau."})
    conditioning_warmup_ratio: float = field(
        default=0.3,
        metadata={"help": "Share of the training in which condlr's bound falls from the start's κ to 1 + tau."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        metadata={"help": "Of AdamW, to try. Orthonormal factors want several times a dense weight's."},
    )
    epochs: int = field(default=15, metadata={"help": "Passes over the training split, for each learning rate."})
    batch_size: int = field(default=32, metadata={"help": "Samples of an optimizer step, all processes together."})
    seed: int = field(default=0, metadata={"help": "Of random weights and the order of samples; the splits are fixed."})
    epsilons: list[float] = field(
        default_factory=lambda: [0.05, 0.1], metadata={"help": "ℓ∞ radii of the attacks, for pixels in [0, 1]."}
    )
    pgd_steps: int = field(default=10, metadata={"help": "Gradient steps of an attack."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many, for a try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate and test on so many, for a try."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of result, picture and model; outputs/METHOD if not given."}
    )

    def __post_init__(self) -> None:
        for name in ("learning_rates", "epsilons"):  # YAML reads 1e-3 as text
            setattr(self, name, sorted(float(value) for value in getattr(self, name)))
        self.output_dir = self.output_dir or f"outputs/{self.method}"
        rates, start, warmup = self.learning_rates, self.pretrained, self.conditioning_warmup_ratio
        rule = f"method must be one of {', '.join(METHODS)}"
        _require(self.method in METHODS, rule, self.method, "Choose one of them.")
        rule = "learning_rates must hold at least one number, all > 0"
        _require(rates and all(0 < x < math.inf for x in rates), rule, rates, "Give several, 1e-3 3e-3 1e-2 say.")
        rule = "pretrained must be the folder of a checkpoint, with config.json"
        found = start is None or (Path(start) / "config.json").is_file()
        _require(found, rule, start, "Make one with --method dense --output_dir FOLDER.")
        _require(0 <= warmup <= 1, "conditioning_warmup_ratio must be in [0, 1]", warmup, "0 bounds κ from the start.")
        for name in ("epochs", "batch_size", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be ≥ 1", value, "Raise it.")
        self.attacks()  # the library checks what it is given: now, not after the training
        self.condlr_config()

    def attacks(self) -> list[PGD]:
        return [PGD(epsilon=epsilon, norm="linf", steps=self.pgd_steps) for epsilon in self.epsilons]

    def condlr_config(self) -> CondLRConfig:
        return CondLRConfig(target_modules="all-linear", rank_ratio=self.rank_ratio, tau=self.tau)


def _require(condition: object, rule: str, received: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{rule}; received {received!r}. {remedy}")


def load_data(args: Arguments) -> dict[str, TensorDataset]:
    """Digits as pixels in [0, 1], (N, 1, 8, 8): 45 % train, 15 % validation, 40 % test, whatever the seed."""
    pixels, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=0.4, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=0)
    indices = {
        "train": train[: args.max_train_samples],
        "validation": validation[: args.max_eval_samples],
        "test": test[: args.max_eval_samples],
    }
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    return {name: TensorDataset(x[chosen], y[chosen]) for name, chosen in indices.items()}


def build_model(args: Arguments) -> ViTForImageClassification:
    """The dense start, and for the low-rank methods its layers' truncated SVD."""
    if args.pretrained is not None:
        model = ViTForImageClassification.from_pretrained(args.pretrained)
    else:
        config = ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=10,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
        )
        model = ViTForImageClassification(config)
    if args.method != "dense":
        model = get_robust_lowrank_model(model, args.condlr_config())
    return model


def train(
    args: Arguments, learning_rate: float, data: TensorDataset, accelerator: Accelerator, bar: tqdm
) -> PixelModel:
    """One training from the start, at one learning rate; returns the model without accelerate's wrapping."""
    set_seed(args.seed)
    pixels = data.tensors[0]
    model = PixelModel(build_model(args), mean=pixels.mean().item(), std=pixels.std().item())
    # No weight decay: it would act on W in the dense model and on S in a factored one, a second difference.
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    loader = DataLoader(data, batch_size=args.batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = args.epochs * len(loader)
    scheduler = accelerator.prepare(get_cosine_schedule_with_warmup(optimizer, steps // 10, steps))
    if args.method == "condlr":
        # All there is to do: from here on every optimizer.step() ends on the manifold, with κ(S) within the bound.
        attach_manifold_step(optimizer, model, warmup_steps=round(args.conditioning_warmup_ratio * steps))

    model.train()
    for _ in range(args.epochs):
        for inputs, labels in loader:
            loss = F.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        bar.set_postfix(learning_rate=f"{learning_rate:g}", loss=f"{loss.item():.3f}")
        bar.update()
    return accelerator.unwrap_model(model)


def evaluate(model: PixelModel, data: TensorDataset, accelerator: Accelerator, attack: PGD | None = None) -> dict:
    """Accuracy, mean loss and the number of samples they come from, over all processes."""
    # Not the wrapped model: an attack differentiates with respect to pixels, and has no gradients to share.
    model.eval()
    correct, losses = [], []
    for inputs, labels in accelerator.prepare(DataLoader(data, batch_size=256)):
        if attack is not None:
            inputs = attack(model, inputs, labels)
        with torch.no_grad():
            logits = model(inputs)
        outcome = (logits.argmax(-1) == labels, F.cross_entropy(logits, labels, reduction="none"))
        for kept, values in zip((correct, losses), accelerator.gather_for_metrics(outcome), strict=True):
            kept.append(values)  # without the samples that were repeated to fill the last batch
    hits, loss = torch.cat(correct), torch.cat(losses).mean().item()
    return {
        "accuracy": hits.float().mean().item(),
        "loss": loss if math.isfinite(loss) else None,  # JSON has no NaN
        "samples": len(hits),
    }


def sweep(args: Arguments, data: dict[str, TensorDataset], accelerator: Accelerator) -> tuple[PixelModel, list[dict]]:
    """The model of the learning rate that validates best, and the record of all of them, best first."""
    runs = []
    with tqdm(
        total=len(args.learning_rates) * args.epochs,
        desc=args.method,
        unit="epoch",
        disable=not accelerator.is_main_process,
    ) as bar:
        for learning_rate in args.learning_rates:
            start = time.perf_counter()
            model = train(args, learning_rate, data["train"], accelerator, bar)
            seconds = time.perf_counter() - start
            validation = evaluate(model, data["validation"], accelerator)
            runs.append(({"learning_rate": learning_rate, "seconds": seconds, "validation": validation}, model))
            accelerator.free_memory()
    runs.sort(key=lambda run: _rank(run[0]["validation"]))
    return runs[0][1], [record for record, _ in runs]


def _rank(validation: dict) -> tuple[float, float]:
    """Clean accuracy decides; among equals, the loss."""
    return -validation["accuracy"], math.inf if validation["loss"] is None else validation["loss"]


def describe(model: PixelModel, method: str) -> dict:
    """Size and condition numbers: κ of every linear weight but the classifier's, as trained."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if method == "dense":  # σ_max/σ_min over all singular values; over the r of its rank in a factored layer
        linear = {n: m for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "classifier"}
        spectra = {name: torch.linalg.svdvals(layer.weight.detach().double()) for name, layer in linear.items()}
        kappa = {name: (sigma[0] / sigma[-1]).item() for name, sigma in spectra.items()}
        return {"parameters": parameters, "dense_parameters": parameters, "condition_numbers": kappa}
    report = condition_report(model.model).to_dict()
    return {
        "parameters": parameters,
        "dense_parameters": report["dense_parameters"],
        "condition_numbers": {layer["name"]: layer["condition_number"] for layer in report["layers"]},
    }


def save(model: PixelModel, result: dict, args: Arguments) -> None:
    """The record, the picture of the condition numbers, and the model."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    if args.method != "dense":
        condition_report(model.model).plot(folder / "condition.png")
    # Multiplied out, an ordinary checkpoint: any transformers program loads it, and κ and the outputs are kept.
    to_dense_model(model.model).save_pretrained(folder)


def main(args: Arguments) -> None:
    """Sweep, test the chosen model, write the result."""
    start = time.perf_counter()
    disable_progress_bar()  # transformers' own, at every loading of a checkpoint
    accelerator = Accelerator(
        # Several processes on a CPU are one group only if it is asked for: else each would train alone, unnoticed.
        cpu=not torch.accelerator.is_available(),
        # batch_size counts all processes together: their number changes neither the steps nor the best learning rate.
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    data = load_data(args)
    model, runs = sweep(args, data, accelerator)
    chosen = runs[0]["learning_rate"]
    rates = args.learning_rates
    if len(rates) > 1 and chosen in (rates[0], rates[-1]):
        accelerator.print(f"Note: {chosen:g} is at the edge of {rates}: a wider sweep may find a better one.")

    test = data["test"]
    result = {
        "arguments": asdict(args),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "train_samples": len(data["train"]),
        "sweep": sorted(runs, key=lambda run: run["learning_rate"]),
        "learning_rate": chosen,
        "clean": evaluate(model, test, accelerator),
        "robust": [{"epsilon": a.epsilon, **evaluate(model, test, accelerator, a)} for a in args.attacks()],
        **describe(model, args.method),
        "seconds": time.perf_counter() - start,
    }
    robust = ", ".join(f"{attack['accuracy']:.1%} at ε = {attack['epsilon']:g}" for attack in result["robust"])
    accelerator.print(
        f"{args.method}, learning rate {chosen:g}: {result['clean']['accuracy']:.1%} clean, {robust}, on "
        f"{result['clean']['samples']} test samples -> {args.output_dir}"
    )
    if accelerator.is_main_process:
        save(model, result, args)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def parse() -> Arguments:
    """From the command line, or from one JSON or YAML file; a mistake is said in one line."""
    parser = HfArgumentParser(Arguments, description=__doc__.splitlines()[0])
    file = sys.argv[1] if len(sys.argv) == 2 else ""
    try:
        if file.endswith((".yaml", ".yml")):
            return parser.parse_yaml_file(file)[0]
        if file.endswith(".json"):
            return parser.parse_json_file(file)[0]
        return parser.parse_args_into_dataclasses()[0]
    except ValueError as error:  # the library's errors about arguments are ValueErrors too
        parser.error(str(error))


if __name__ == "__main__":
    main(parse())
