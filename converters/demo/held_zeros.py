"""Weights that were pruned stay zero while training goes on."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import architecture  # noqa: E402


class HeldZeros:
    """The zeros that the weights of `model`'s convolutions and linear layers have now."""

    def __init__(self, model):
        self.kept = {
            p: p != 0 for name, p in model.named_parameters()
            if name.endswith(".weight") and architecture.is_layer(name.removesuffix(".weight"), p.ndim)
        }

    @torch.no_grad()
    def clear_gradients(self):
        """Before a step: what they would learn moves neither them nor, by the gradients' norm, others."""
        for p, kept in self.kept.items():
            if p.grad is not None:
                p.grad.mul_(kept)

    @torch.no_grad()
    def clear_weights(self):
        """After a step: optimizers may move them all the same."""
        for p, kept in self.kept.items():
            p.mul_(kept)
