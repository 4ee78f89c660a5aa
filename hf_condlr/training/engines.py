"""The engines of accelerate that the manifold step can train under."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env

from hf_condlr.errors import OptimizerError, require

USE_FSDP = "ACCELERATE_USE_FSDP"
REMEDY = "Use FSDP2 (fully_shard, or accelerate with fsdp_version: 2), which shards by rows, or DDP."


def check_engine(args: Any, accelerator: Any = None) -> None:
    """Refuse engines under which factors are not matrices, and an FSDP with which weights would be wrong or pickled.

    Args:
        args: `TrainingArguments`.
        accelerator: The Trainer's; accelerate's state of this process by default.

    Raises:
        OptimizerError: DeepSpeed; FSDP1; an FSDP2 that accelerate silently replaced; or one of its options.
    """
    accelerator = AcceleratorState() if accelerator is None else accelerator
    engine = accelerator.distributed_type
    zero = "factors must be matrices, and DeepSpeed's ZeRO steps flattened partitions of them"
    _require(engine != DistributedType.DEEPSPEED, zero, "DeepSpeed", REMEDY)
    plugin = getattr(getattr(accelerator, "state", accelerator), "fsdp_plugin", None)
    if engine != DistributedType.FSDP or plugin is None:
        # `accelerate launch` with a configuration of FSDP sets environment variables only.
        _require(
            not (args.fsdp or parse_flag_from_env(USE_FSDP)),
            "fsdp=True must shard: accelerate does so on GPUs only, and silently takes DDP elsewhere",
            f"{'fsdp=True' if args.fsdp else f'{USE_FSDP}=true'} on {accelerator.device.type}",
            f"Leave fsdp out, of accelerate's configuration too, and {USE_FSDP} unset for DDP, or call fully_shard and "
            "attach_manifold_step in your own loop.",
        )
        return
    _require(plugin.fsdp_version == 2, "factors must be matrices, and FSDP1 flattens them", "FSDP of version 1", REMEDY)
    kind, lazy = str(plugin.state_dict_type), plugin.cpu_ram_efficient_loading
    pickled = "checkpoints must hold no pickle, as accelerate's sharded ones do"
    _require("FULL_STATE_DICT" in kind, pickled, kind, "Set the state_dict_type FULL_STATE_DICT.")
    every = "every process must hold the weights that are converted and checked"
    _require(not lazy, every, "cpu_ram_efficient_loading=True", "Set it to False.")


def _require(condition: bool, rule: str, received: str, remedy: str) -> None:
    require(condition, rule, received=received, remedy=remedy, error=OptimizerError)
