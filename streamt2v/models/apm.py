"""The appearance preservation module (APM, arXiv 2403.14773 section 4.2): an anchor frame joins the text.

The anchor's CLIP embedding becomes a few image tokens (AppearanceTokens); in every text cross-attention of the UNet a
learned amount of a mixture of text and image tokens is added to the text tokens (TokenMixing).
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AppearanceTokens(nn.Module):
    """Expand an image embedding into tokens beside the text: reshape(W2 silu(W1 e + b1) + b2)."""

    def __init__(self, embed_dim: int, hidden_dim: int, num_tokens: int, context_dim: int) -> None:
        super().__init__()
        self.config = {
            "embed_dim": embed_dim,
            "hidden_dim": hidden_dim,
            "num_tokens": num_tokens,
            "context_dim": context_dim,
        }
        self.linear_1 = nn.Linear(embed_dim, hidden_dim)
        self.linear_2 = nn.Linear(hidden_dim, num_tokens * context_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map embeddings [B, embed_dim], or several anchors' [B, n, embed_dim], to [B, num_tokens, context_dim]."""
        if embedding.ndim == 3:
            embedding = embedding.mean(dim=1)
        tokens = self.linear_2(F.silu(self.linear_1(embedding)))
        return tokens.unflatten(-1, (self.config["num_tokens"], -1))


class TokenMixing(nn.Module):
    """Mix image tokens into the text tokens of one attention layer.

    With c = [text; image] (S x D): T' = T + silu(alpha) LayerNorm(conv(c)). The convolution takes tokens as channels
    and slides along the feature axis D. alpha starts at 0, where silu is 0 too: a fresh layer changes nothing.
    """

    def __init__(self, text_tokens: int, image_tokens: int, context_dim: int) -> None:
        super().__init__()
        self.text_tokens = text_tokens
        self.alpha = nn.Parameter(torch.zeros(()))
        self.conv = nn.Conv1d(text_tokens + image_tokens, text_tokens, 3, padding=1)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, context: Tensor) -> Tensor:
        """Map text and image tokens [B, text + image, D] to mixed text tokens [B, text, D]."""
        return context[:, : self.text_tokens] + F.silu(self.alpha) * self.norm(self.conv(context))
