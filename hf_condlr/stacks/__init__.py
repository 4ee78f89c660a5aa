"""Factors of equal shape as one stack (L, m, r): what the manifold step does to them before and after an optimizer.

Everything is batched over the L layers. Where the host runs ahead of the device nothing is read back in a step that
finds the factors as the last one left them: choices are masks, and flags of factors whose gradient or update is not
finite stay on the device until somebody asks. Factors that are new, or that somebody else has written, are looked at.

Factors may be sharded by rows. What then must be summed over the processes, r×r blocks and flags, the methods yield to
`shards.run`; of one process's own, everything is the sum already.
"""

from hf_condlr.stacks.bases import BasisStack
from hf_condlr.stacks.cores import CoreStack
from hf_condlr.stacks.grouping import basis_stacks, core_stacks, moving_factors

__all__ = ["BasisStack", "CoreStack", "basis_stacks", "core_stacks", "moving_factors"]
