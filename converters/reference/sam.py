"""SAM in PyTorch behind any image encoder: what microtome is compared with, and what is fine-tuned.

Follows the paper (Segment Anything, Kirillov et al. 2023) and names its modules as the original checkpoints do, so
that `load_state_dict` takes them with strict=True. Any configuration that architecture.infer_config returns can be
built; its image encoder is the class ImageEncoder of the module here that has its kind's name.
"""

import importlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from layer_norm_2d import LayerNorm2d


class PositionEncoding(nn.Module):
    """Random Fourier features of positions in [0, 1]^2 (Tancik et al. 2020)."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def forward(self, positions):
        phase = 2 * math.pi * ((2 * positions - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([phase.sin(), phase.cos()], -1)


class PromptEncoder(nn.Module):
    def __init__(self, config, resolution):
        super().__init__()
        dim, channels = config["image_encoder"]["embed_dim"], config["mask_in_chans"]
        self.frame = config["input"]["frame"]
        self.resolution = resolution
        self.pe_layer = PositionEncoding(dim // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, channels // 4, 2, 2),
            LayerNorm2d(channels // 4),
            nn.GELU(),
            nn.Conv2d(channels // 4, channels, 2, 2),
            LayerNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, dim, 1),
        )
        self.no_mask_embed = nn.Embedding(1, dim)

    def dense_position(self):
        """(1, dim, resolution, resolution)"""
        centres = (torch.arange(self.resolution) + 0.5) / self.resolution
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        grid = torch.stack([x, y], -1).to(self.no_mask_embed.weight)
        return self.pe_layer(grid).permute(2, 0, 1)[None]

    def points(self, positions, labels):
        """positions (B, N, 2) as x, y in pixels of the frame, labels (B, N): 1 inside, 0 outside, -1 padding."""
        tokens = self.pe_layer((positions + 0.5) / self.frame)
        tokens = torch.where((labels == -1)[..., None], torch.zeros_like(tokens), tokens)
        kinds = torch.cat([self.not_a_point_embed.weight, self.point_embeddings[0].weight,
                           self.point_embeddings[1].weight])
        return tokens + kinds[labels + 1]

    def boxes(self, boxes):
        """boxes (B, 4) as x0, y0, x1, y1 in pixels of the frame"""
        tokens = self.pe_layer((boxes.view(-1, 2, 2) + 0.5) / self.frame)
        corners = torch.cat([self.point_embeddings[2].weight, self.point_embeddings[3].weight])
        return tokens + corners

    def forward(self, boxes=None, points=None, labels=None, masks=None):
        """Returns tokens (B, N, dim) and a dense embedding (B or 1, dim, resolution, resolution)."""
        parts = []
        if points is not None:
            if boxes is None:  # the model is trained with one padding point where there is no box
                points = F.pad(points, (0, 0, 0, 1))
                labels = F.pad(labels, (0, 1), value=-1)
            parts.append(self.points(points, labels))
        if boxes is not None:
            parts.append(self.boxes(boxes))
        if masks is not None:
            dense = self.mask_downscaling(masks)
        else:
            dense = self.no_mask_embed.weight[:, :, None, None]
            dense = dense.expand(1, -1, self.resolution, self.resolution)
        if not parts:  # a mask says all
            parts.append(masks.new_zeros(len(masks), 0, self.no_mask_embed.embedding_dim))
        return torch.cat(parts, 1), dense


class Attention(nn.Module):
    def __init__(self, dim, heads, downsample=1):
        super().__init__()
        inner = dim // downsample
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q, k, v):
        def split(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            split(self.q_proj(q)), split(self.k_proj(k)), split(self.v_proj(v))
        )
        return self.out_proj(y.transpose(1, 2).flatten(2))


class TwoWayMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayLayer(nn.Module):
    def __init__(self, dim, decoder, first):
        super().__init__()
        heads, downsample, epsilon = decoder["heads"], decoder["attention_downsample"], decoder["norm_epsilon"]
        self.first = first
        self.self_attn = Attention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, epsilon)
        self.cross_attn_token_to_image = Attention(dim, heads, downsample)
        self.norm2 = nn.LayerNorm(dim, epsilon)
        self.mlp = TwoWayMlp(dim, decoder["mlp_dim"])
        self.norm3 = nn.LayerNorm(dim, epsilon)
        self.norm4 = nn.LayerNorm(dim, epsilon)
        self.cross_attn_image_to_token = Attention(dim, heads, downsample)

    def forward(self, queries, keys, query_position, key_position):
        if self.first:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_position
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)
        q, k = queries + query_position, keys + key_position
        queries = self.norm2(queries + self.cross_attn_token_to_image(q, k, keys))
        queries = self.norm3(queries + self.mlp(queries))
        q = queries + query_position
        keys = self.norm4(keys + self.cross_attn_image_to_token(k, q, queries))
        return queries, keys


class TwoWayTransformer(nn.Module):
    def __init__(self, dim, decoder):
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayLayer(dim, decoder, first=i == 0) for i in range(decoder["depth"])
        )
        self.final_attn_token_to_image = Attention(
            dim, decoder["heads"], decoder["attention_downsample"]
        )
        self.norm_final_attn = nn.LayerNorm(dim, decoder["norm_epsilon"])

    def forward(self, image, image_position, tokens):
        """image (B, dim, h, w), tokens (B, N, dim)"""
        keys = image.flatten(2).transpose(1, 2)
        key_position = image_position.flatten(2).transpose(1, 2)
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, key_position)
        attended = self.final_attn_token_to_image(queries + tokens, keys + key_position, keys)
        return self.norm_final_attn(queries + attended), keys


class MLP(nn.Module):
    def __init__(self, dim, hidden, out, depth):
        super().__init__()
        widths = [dim] + [hidden] * (depth - 1) + [out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, decoder = config["image_encoder"]["embed_dim"], config["decoder"]
        masks = decoder["multimask_outputs"] + 1
        self.transformer = TwoWayTransformer(dim, decoder)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(masks, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, 2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(dim, dim, dim // 8, 3) for _ in range(masks)
        )
        self.iou_prediction_head = MLP(dim, decoder["iou_hidden"], masks, decoder["iou_depth"])

    def forward(self, embedding, position, tokens, dense, multimask=False):
        """embedding and position (1, dim, h, w), tokens (B, N, dim), dense (B or 1, dim, h, w) to
        masks (B, 1 or 3, 4h, 4w), logits, and IoU predictions (B, 1 or 3)."""
        batch = tokens.shape[0]
        output = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([output.expand(batch, -1, -1), tokens], 1)
        image = (embedding + dense).expand(batch, -1, -1, -1)
        queries, keys = self.transformer(image, position, tokens)
        upscaled = self.output_upscaling(keys.transpose(1, 2).unflatten(2, embedding.shape[-2:]))
        filters = torch.stack(
            [mlp(queries[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1
        )
        masks = torch.einsum("bnc,bchw->bnhw", filters, upscaled)
        iou = self.iou_prediction_head(queries[:, 0])
        chosen = slice(1, None) if multimask else slice(0, 1)
        return masks[:, chosen], iou[:, chosen]


class Sam(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        encoder = importlib.import_module(config["image_encoder"]["kind"])
        self.image_encoder = encoder.ImageEncoder(config["image_encoder"])
        self.prompt_encoder = PromptEncoder(config, self.image_encoder.resolution)
        self.mask_decoder = MaskDecoder(config)

    def decode(self, embedding, multimask=False, **prompts):
        """Masks and IoU predictions of prompts (see PromptEncoder) on one image's embedding."""
        tokens, dense = self.prompt_encoder(**prompts)
        position = self.prompt_encoder.dense_position()
        return self.mask_decoder(embedding, position, tokens, dense, multimask)

    def forward(self, image, boxes):
        """image (1, 3, side, side), normalised, boxes (B, 4) in pixels of the frame."""
        return self.decode(self.image_encoder(image), boxes=boxes)
