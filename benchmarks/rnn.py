"""`Unrolled` against PyTorch's recurrent layers, and against loops written by hand.

Forward and backward of one batch, one thread on a CPU. Where PyTorch has a kernel for many steps of a cell, the
peer is its layer, also on packed sequences of several lengths; for cells of one's own, and where no weights are
shared, the peer is a plain loop over the steps. The aim is a ratio of at most 1.3.
"""
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from _measure import keep, machine, medians
from sharetie.unrolled import Unrolled

LIMIT = 1.3
BATCH, STEPS, INPUTS, WIDTH = 32, 50, 64, 128


class Peephole(nn.Module):
    "A cell that PyTorch does not have."
    def __init__(self, inputs, width):
        super().__init__()
        self.gate, self.new = nn.Linear(inputs + width, width), nn.Linear(inputs + width, width)
        self.width = width

    def forward(self, x, state):
        if state is None: state = x.new_zeros(len(x), self.width)
        both = torch.cat([x, state], 1)
        return torch.lerp(state, self.new(both).tanh(), self.gate(both).sigmoid())


def backward(out, modules):
    "One backward pass, with no gradient left behind."
    out.sum().backward()
    for p in modules.parameters(): p.grad = None


def layers(device):
    "(Name, ours, peer) of PyTorch's cells that share all steps."
    x, lengths = torch.randn(BATCH, STEPS, INPUTS, device=device), torch.randint(STEPS // 4, STEPS + 1, (BATCH,))
    for name in ("RNN", "GRU", "LSTM"):
        ours = Unrolled(getattr(nn, f"{name}Cell")(INPUTS, WIDTH), STEPS).to(device)
        layer = getattr(nn, name)(INPUTS, WIDTH, batch_first=True).to(device)
        layer.load_state_dict({f"{key.removeprefix('cells.0.')}_l0": p for key, p in ours.state_dict().items()})
        def packed(layer=layer):
            out, _ = layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            return pad_packed_sequence(out, batch_first=True, total_length=STEPS)[0]
        torch.testing.assert_close(ours(x, lengths=lengths)[0], packed(), atol=1e-4, rtol=1e-4)
        yield f"{name}, nn.{name}", lambda ours=ours: backward(ours(x)[0], ours), lambda layer=layer: backward(layer(x)[0], layer)
        yield f"{name}, several lengths, nn.{name} packed", lambda ours=ours: backward(ours(x, lengths=lengths)[0], ours), lambda layer=layer, packed=packed: backward(packed(), layer)


def loops(device):
    "(Name, ours, peer) of cells that have to be looped, or that share nothing."
    x = torch.randn(BATCH, STEPS, INPUTS, device=device)
    def by_hand(cells, x):
        outputs, state = [], None
        for cell, step in zip(cells, x.unbind(1)):
            state = cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)
    for name, cell, sharing in [("own cell, shared, loop by hand", Peephole(INPUTS, WIDTH), "all"), ("own cell, nothing shared, loop by hand", Peephole(INPUTS, WIDTH), "none"),
                                ("LSTM, nothing shared, loop by hand", nn.LSTMCell(INPUTS, WIDTH), "none"), ("LSTM, blocks of 10, loop by hand", nn.LSTMCell(INPUTS, WIDTH), 10)]:
        ours = Unrolled(cell, STEPS, sharing).to(device)
        torch.testing.assert_close(ours(x)[0], by_hand(ours.cells, x), atol=1e-4, rtol=1e-4)
        yield name, lambda ours=ours: backward(ours(x)[0], ours), lambda ours=ours: backward(by_hand(ours.cells, x), ours)


def main(device):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for name, ours, peer in (*layers(device), *loops(device)):
        times = medians({"ours": ours, "peer": peer}, device)
        rows.append({"": name, "ours, ms": 1e3 * times["ours"], "peer, ms": 1e3 * times["peer"], "ours / peer": times["ours"] / times["peer"], "limit": LIMIT})
    keep(f"rnn_{device.type}", rows, runs=20, batch=BATCH, steps=STEPS, inputs=INPUTS, width=WIDTH, machine=machine(device))


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available(): main(torch.device(name))
    if not torch.cuda.is_available(): print("no CUDA device: the GPU ratios were not measured")
