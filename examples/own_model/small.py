"""Models of one's own: a small residual network, and a small transformer. Each factory returns a `portnet.Model`."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import portnet


class Residual(nn.Module):
    """Two convolutions with batch normalisation, added to what came in."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return F.relu(x + self.body(x))


def pictures(n, seed):
    """Float32 noise with a class hidden in it: its channel means."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    images = rng.standard_normal((n, 3, 16, 16)) + np.eye(10, 3)[labels][:, :, None, None]
    return images.astype(np.float32), labels


def residual():
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        Residual(16),
        nn.MaxPool2d(2),
        Residual(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return portnet.Model(module=module, batch=pictures, loss=F.cross_entropy, learning_rate=0.01)


class Transformer(nn.Module):
    """One encoder layer over tokens, and the next token's logits ``(n, vocabulary, length)``."""

    def __init__(self, vocabulary=50, length=12, width=32):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        # Nothing may be drawn at random in training: devices draw differently.
        self.encoder = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        return self.head(self.encoder(self.tokens(tokens) + self.positions)).transpose(1, 2)


def sentences(n, seed):
    """Int64 counting tokens, and the token after each."""
    start = np.random.default_rng(seed).integers(0, 50, (n, 1))
    return (start + np.arange(12)) % 50, (start + np.arange(1, 13)) % 50


def transformer():
    return portnet.Model(module=Transformer(), batch=sentences, loss=F.cross_entropy, learning_rate=0.05)
