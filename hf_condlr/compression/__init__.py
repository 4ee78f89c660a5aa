"""`compress`: a trained model becomes small and well conditioned, with a report of what that costs."""

from hf_condlr.compression.arguments import CompressionArguments
from hf_condlr.compression.entry import Compressed, compress
from hf_condlr.compression.report import CompressionReport

__all__ = ["Compressed", "CompressionArguments", "CompressionReport", "compress"]
