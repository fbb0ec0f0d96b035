"""Linear layers; on a CPU, where no gradient is wanted, with oneDNN's product and the GELU inside it.

oneDNN is the library that torch's own compiler calls for float32 on a CPU. Eager torch calls MKL, which on AMD
reaches 85 to 90 % of oneDNN's rate, and its tanh-GELU costs as much as a tenth of the product before it
(tests/bench/README.md, 2). N tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import fixed_linear

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """x @ weight.T + bias. x: [..., N, C].

    fixed: a row's bits do not depend on how many others there are; for inference only.
    """

    fixed = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., N, C'] in x's dtype."""
        if self.fixed:
            return fixed_linear(x, self.weight, self.bias)
        return _linear(x, self.weight, self.bias)

    def forward_leading(self, x: Tensor, columns: int) -> Tensor:
        """The first `columns` columns of the result."""
        if self.fixed:
            # Cut afterwards: an image's values are to be the same beside a clip, which needs all of them.
            return fixed_linear(x, self.weight, self.bias)[..., :columns]
        return _linear(x, self.weight[:columns], None if self.bias is None else self.bias[:columns])

    def forward_gelu(self, x: Tensor) -> Tensor:
        """The same, then the tanh form of GELU."""
        if self.fixed:
            return fixed_linear(x, self.weight, self.bias, gelu=True)
        if _fused(x):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")
        return F.gelu(super().forward(x), approximate="tanh")


class InputLinear(Linear):
    """The same for rows that may end early, where all that would follow is 0. x: [..., N, at most C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., N, C'] in x's dtype."""
        if self.fixed:
            return fixed_linear(F.pad(x, (0, self.in_features - x.shape[-1])), self.weight, self.bias)
        return _linear(x, self.weight[:, : x.shape[-1]], self.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _fused(x):
        # Of a slice oneDNN takes its reference path, a thousand times as slow.
        return torch.ops.mkldnn._linear_pointwise(x, weight.contiguous(), bias, "none", [], "")
    return F.linear(x, weight, bias)


def _fused(x: Tensor) -> bool:
    return _ONEDNN and not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32
