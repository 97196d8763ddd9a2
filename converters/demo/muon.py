"""The optimizer Muon (Jordan et al. 2024) in fp32: momentum whose steps are orthogonalised.

PyTorch's own takes matrices alone and computes in bf16, which CPUs without it emulate slowly. Here
convolutions are matrices (out, in * h * w).
"""

import torch


def orthogonalised(matrix, steps=5):
    """About U V^T of the singular value decomposition, by a quintic Newton-Schulz iteration with the
    coefficients of the paper."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Steps have the size of AdamW's (Liu et al. 2025), so that both take the same learning rate."""

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                mean = state["mean"].mul_(group["momentum"]).add_(p.grad)
                ahead = p.grad.add(mean, alpha=group["momentum"])
                step = orthogonalised(ahead.flatten(1))
                size = 0.2 * max(step.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(step.view_as(p), alpha=-group["lr"] * size)
