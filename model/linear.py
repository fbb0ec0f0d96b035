"""Linear layers; on a CPU, where no gradient is wanted, with oneDNN's product and the GELU inside it.

oneDNN is the library that torch's own compiler calls for float32 on a CPU. Eager torch calls MKL, which on AMD
reaches 85 to 90 % of oneDNN's rate, and its tanh-GELU costs as much as a tenth of the product before it
(tests/bench/README.md, 2). N tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """x @ weight.T + bias. x: [..., N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., N, C'] in x's dtype."""
        if _fused(x):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)

    def forward_gelu(self, x: Tensor) -> Tensor:
        """The same, then the tanh form of GELU."""
        if _fused(x):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")
        return F.gelu(super().forward(x), approximate="tanh")


def _fused(x: Tensor) -> bool:
    return _ONEDNN and not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32
