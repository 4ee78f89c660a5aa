"""Which engines of accelerate the manifold step can train under."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType, parse_flag_from_env

from hf_condlr.errors import OptimizerError

USE_FSDP = "ACCELERATE_USE_FSDP"


FSDP2 = "Use FSDP2 (fsdp=True, or recipes/accelerate/fsdp2.yaml), which shards factors by rows, or DDP."


def check_engine(args: Any, accelerator: Any) -> None:
    """Refuse engines under which factors are no matrices any more, or not those that were asked for.

    Args:
        args: `TrainingArguments`.
        accelerator: The Trainer's.

    Raises:
        OptimizerError: DeepSpeed; FSDP1; an FSDP2 that accelerate silently replaced; or one of its options with which
            weights would be wrong or pickled.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise OptimizerError(
            "factors must be matrices, and DeepSpeed's ZeRO steps flattened partitions of them",
            received="DeepSpeed",
            remedy=FSDP2,
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type != DistributedType.FSDP or plugin is None:
        # `accelerate launch` with a configuration of FSDP tells of it in the environment alone.
        if args.fsdp or parse_flag_from_env(USE_FSDP):
            raise OptimizerError(
                "fsdp=True must shard: accelerate does so on GPUs only, and silently takes DDP elsewhere",
                received=f"{'fsdp=True' if args.fsdp else f'{USE_FSDP}=true'} on {accelerator.device.type}",
                remedy=f"Leave fsdp out, of accelerate's configuration too, and {USE_FSDP} unset for DDP, or call "
                "fully_shard and attach_manifold_step in a loop of your own.",
            )
        return
    if plugin.fsdp_version != 2:
        raise OptimizerError(
            "factors must be matrices, and FSDP1 flattens them", received="FSDP of version 1", remedy=FSDP2
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise OptimizerError(
            "checkpoints must hold no pickle, as accelerate's sharded ones do",
            received=f"{plugin.state_dict_type}",
            remedy="Set the state_dict_type FULL_STATE_DICT; a loop of your own saves shards with save_sharded.",
        )
    if plugin.cpu_ram_efficient_loading:
        raise OptimizerError(
            "every process must hold the weights that are converted and checked",
            received="cpu_ram_efficient_loading=True, with which only the first one loads them",
            remedy="Set it to False; from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N)) loads a "
            "factored checkpoint straight into shards.",
        )
