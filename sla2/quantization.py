"""Quantisers: which numerics the sparse branch's forward has in training and at inference (paper section 5).

The backward is always full precision. QAT trains with the low-bit forward; PTQ, the paper's "w/o QAT", meets it at inference only.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantizer:
    """Precisions of `sla2_kernels.sparse_attention`: `none`, `int8` (INT8 QK, FP8 PV) or `fp8` (both FP8)."""

    training: str
    inference: str

    def precision(self, training: bool) -> str:
        return self.training if training else self.inference


NO_QUANTIZATION = Quantizer("none", "none")
PTQ_INT8 = Quantizer("none", "int8")
QAT_INT8 = Quantizer("int8", "int8")
PTQ_FP8 = Quantizer("none", "fp8")
QAT_FP8 = Quantizer("fp8", "fp8")
