"""The window attention of the PyTorch reference, in the ways that people run it."""

import torch
import torch.nn.functional as F

import tiny_vit


class ExplicitAttention(tiny_vit.WindowAttention):
    """Scores, bias, softmax and values one by one, as TinyViT's and LiteMedSAM's own code has it."""

    def forward(self, x):
        windows, tokens, dim = x.shape
        qkv = self.qkv(self.norm(x)).view(windows, tokens, self.heads, 3, dim // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + self.attention_biases[:, self.distance]
        y = scores.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(windows, tokens, dim))


class NestedBlock(tiny_vit.TinyViTBlock):
    """Attention among the real tokens of each window in nested tensors: nothing is padded, and the
    result is another. Nested tensors take no biases in attention, so that windows go one by one there."""

    def attend(self, x):
        batch, _, dim = x.shape
        side, window, attn = self.resolution, self.window, self.attn
        x = x.view(side, side, dim)
        windows, biases = [], []
        bias = attn.attention_biases[:, attn.distance].unflatten(1, (window, window)).unflatten(3, (window, window))
        for top in range(0, side, window):
            for left in range(0, side, window):
                part = x[top : top + window, left : left + window]
                h, w = part.shape[:2]
                windows.append(part.reshape(-1, dim))
                biases.append(bias[:, :h, :w, :h, :w].flatten(3).flatten(1, 2))
        nested = torch.nested.nested_tensor(windows)
        qkv = attn.qkv(F.layer_norm(nested, (dim,), attn.norm.weight, attn.norm.bias))
        attended = []
        for one, mask in zip(qkv.unbind(), biases):
            q, k, v = one.view(-1, attn.heads, 3, dim // attn.heads).permute(2, 1, 0, 3)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            attended.append(y.transpose(0, 1).reshape(-1, dim))
        parts = iter(attn.proj(torch.nested.nested_tensor(attended)).unbind())
        out = torch.empty_like(x)
        for top in range(0, side, window):
            for left in range(0, side, window):
                part = out[top : top + window, left : left + window]
                part.copy_(next(parts).view(part.shape))
        return out.view(batch, -1, dim)


def use(model, kind, replacement):
    """Makes every module of class `kind` one of class `replacement`."""
    for module in model.modules():
        if type(module) is kind:
            module.__class__ = replacement
    return model
