"Small models with tied weights, for the tests of what treats weights after training."
import torch
import torch.nn.functional as F
from torch import nn

from sharetie.embeddings import ScaledEmbedding
from sharetie.making import tie_
from sharetie.views import Transpose


class Words(nn.Module):
    "A table that is embedding and output layer."
    def __init__(self, words=20, width=8):
        super().__init__()
        self.embedding, self.head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight
    def forward(self, x): return self.head(self.embedding(x).tanh())


class Reused(nn.Module):
    "One module under two names."
    def __init__(self, width=5):
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = self.a
    def forward(self, x): return self.b(self.a(x).relu())


class Convs(nn.Module):
    "Two convolutions on one Parameter."
    def __init__(self, channels=2):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(self.a(x).relu())


class Coder(nn.Module):
    "A decoder that is the encoder's transpose, as no layer knows."
    def __init__(self, width=6, code=3):
        super().__init__()
        self.encoder = nn.Linear(width, code)
    def forward(self, x): return F.linear(self.encoder(x).relu(), self.encoder.weight.T)


DRAW = torch.Generator().manual_seed(1)  # the same inputs in whatever order tests are imported
TIED = [(Words, torch.arange(4))] + [(build, torch.randn(shape, generator=DRAW)) for build, shape in ((Reused, (3, 5)), (Convs, (1, 2, 4, 4)), (Coder, (4, 6)))]


# The same as layers that are replaced by others

class Speaker(nn.Module):
    "A table that is embedding and output layer, with a layer between."
    def __init__(self, kind=nn.Embedding, declared=True, words=20, width=8):
        super().__init__()
        self.table, self.body, self.head = kind(words, width), nn.Linear(width, width), nn.Linear(width, words, bias=False)
        if declared: tie_(self, ["table.weight", "head.weight"])
        else: self.head.weight = self.table.weight
    def forward(self, x): return self.head(self.body(self.table(x)).tanh())


class Strided(nn.Module):
    "Two convolutions on one Parameter, with other strides."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=False)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(self.a(x).relu())


def reused(width=4):
    "A stack with one layer at two places."
    layer = nn.Linear(width, width)
    return nn.Sequential(layer, nn.Tanh(), layer)


def autoencoder(width=6, code=4):
    "A decoder whose layer is declared to be the encoder's transpose."
    model = nn.Sequential(nn.Linear(width, code), nn.Tanh(), nn.Linear(code, width))
    tie_(model, ["0.weight", "2.weight"], map=Transpose())
    return model


TIED_LAYERS = {  # a function that makes the model, an input, and how many weights it stores
    "words": (Speaker, torch.arange(4), 2), "scaled": (lambda: Speaker(ScaledEmbedding), torch.arange(4), 2),
    "undeclared": (lambda: Speaker(declared=False), torch.arange(4), 2), "reused": (lambda: Reused(6), torch.randn(3, 6), 1),
    "convs": (Strided, torch.randn(1, 6, 5, 5), 1), "coder": (lambda: Coder(6, 4), torch.randn(2, 6), 1),
    "autoencoder": (autoencoder, torch.randn(2, 6), 1)}


def tasks(n):
    "Tied models with data of `n` examples and a loss, {name: (make, data, loss)}."
    ids, maps = (lambda: torch.randint(6, (n,))), (lambda: torch.rand(n, 2, 4, 4))
    return {"words": (lambda: Speaker(words=6, width=3), lambda: (ids(), ids()), F.cross_entropy), "twice": (Convs, lambda: (maps(), maps()), F.mse_loss),
            "reused": (reused, lambda: (torch.rand(n, 4), torch.rand(n, 4)), F.mse_loss),
            "autoencoder": (lambda: autoencoder(5, 3), lambda: (torch.rand(n, 5), torch.rand(n, 5)), F.mse_loss)}


def functional(f, **layers):
    "A module whose forward is a function of itself and the input."
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items(): setattr(self, name, layer)
        def forward(self, x): return f(self, x)
    return Functional()
