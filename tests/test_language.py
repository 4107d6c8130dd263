"Mixtures in a language model: what is counted, replaced, trained and measured, against doing it by hand."
import pytest
import torch
from torch import nn

from sharetie.attention import Block
from sharetie.language import active_weights, auxiliary_loss, expert_loads, replace_feedforward_, train_language
from sharetie.moe import MoE, load_balancing_loss, router_z_loss
from sharetie.routing import Balanced, ExpertChoice, TopK
from sharetie.transformer import CharacterModel, share_layers_, train_characters

TEXT = torch.arange(3000) * 7919 % 96


def model(make=lambda dim: MoE(dim, 8, 4, 2), layers=2, **options):
    torch.manual_seed(0)
    return replace_feedforward_(CharacterModel(dim=16, layers=layers, hidden=4), make, **options)


def test_a_network_that_does_the_same_changes_nothing():
    torch.manual_seed(0)
    lm = CharacterModel(dim=16, layers=3)
    x, before, old = TEXT[None, :20], lm(TEXT[None, :20]), [block.feedforward for block in lm.blocks]
    again = iter(old)
    assert replace_feedforward_(lm, lambda dim: next(again)) is lm and torch.equal(lm(x), before)


@pytest.mark.parametrize("every, where", [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [1, 4]), (9, [4])])
def test_every_so_many_blocks_counted_from_the_last(every, where):
    lm = model(layers=5, every=every)
    assert [i for i, block in enumerate(lm.blocks) if isinstance(block.feedforward, MoE)] == where


def test_replacing_is_whole_or_not_at_all():
    made = iter([nn.Identity(), 3])
    lm = CharacterModel(dim=16, layers=2)
    old = [block.feedforward for block in lm.blocks]
    with pytest.raises(TypeError, match="make: a function that makes a module is expected, got 3"): replace_feedforward_(lm, lambda dim: next(made))
    assert all(block.feedforward is before for block, before in zip(lm.blocks, old))
    share_layers_(lm)
    with pytest.raises(ValueError, match="model: one whose blocks share no feed-forward weights is expected, got CharacterModel"): replace_feedforward_(lm, MoE)
    with pytest.raises(ValueError, match="model: one with blocks is expected, got Linear"): replace_feedforward_(nn.Linear(2, 2), MoE)
    with pytest.raises(TypeError, match="model: a module is expected"): replace_feedforward_(3, MoE)
    with pytest.raises(TypeError, match="make: a function of the width is expected, got 3"): replace_feedforward_(CharacterModel(), 3)
    with pytest.raises(ValueError, match="every: a whole number of at least 1 is expected, got 0"): replace_feedforward_(CharacterModel(), MoE, 0)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"shared_experts": 2}, {"bias": True, "expert": "gelu"}])
def test_active_weights_are_those_that_have_a_gradient_for_one_token(k, options):
    torch.manual_seed(1)
    layer = MoE(16, 8, 4, k, **options)
    layer(torch.randn(1, 16)).sum().backward()
    used = sum((p.grad.flatten(1) != 0).any(1).sum().item() * p[0].numel() for p in layer.experts.parameters())
    rest = sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("experts"))
    counts = active_weights(layer)
    assert counts == (sum(p.numel() for p in layer.parameters()), used + rest)


def test_active_weights_of_models():
    dense = CharacterModel(dim=16, layers=2)
    assert active_weights(dense).stored == active_weights(dense).active == sum(p.numel() for p in dense.parameters())
    choice = model(lambda dim: MoE(dim, 8, 4, 1, router=ExpertChoice(dim, 4, 1)))
    assert active_weights(choice).stored - active_weights(choice).active == 2 * 3 * 3 * 8 * 16
    with pytest.raises(TypeError, match="model: a module"): active_weights(None)


def test_experts_that_layers_share_count_once():
    layers = nn.ModuleList(MoE(8, 4, 6, k) for k in (1, 2))
    layers[1].experts = layers[0].experts
    experts, routers = 6 * 3 * 4 * 8, 2 * 6 * 8
    assert active_weights(layers) == (experts + routers, experts // 3 + routers)
    layers = nn.ModuleList(MoE(8, 4, 6, 1) for _ in range(2))
    layers[1].experts.w_in = layers[0].experts.w_in  # one stack alone
    assert active_weights(layers) == (experts * 4 // 3 + routers, experts * 4 // 18 + routers)


def test_losses_add_up_over_layers():
    lm = model(layers=3)
    with pytest.raises(ValueError, match="model: one that has seen a batch is expected, got CharacterModel"): auxiliary_loss(lm, .1)
    lm(TEXT[None, :20])
    routings = [block.feedforward.routing for block in lm.blocks]
    expected = sum(.1 * load_balancing_loss(r) + .01 * router_z_loss(r) for r in routings)
    assert auxiliary_loss(lm, .1, .01).item() == pytest.approx(expected.item())
    assert auxiliary_loss(CharacterModel(), .1) == 0
    for name in ("balance", "z"):
        with pytest.raises(ValueError, match=f"{name}: a finite number of at least 0"): auxiliary_loss(lm, **{name: -1})


def test_training_is_that_of_characters_without_mixtures():
    models = [CharacterModel(dim=16, layers=1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    train_characters(models[0], TEXT, 4, seed=3)
    train_language(models[1], TEXT, 4, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters()))


def test_training_moves_biases_and_minds_the_loss():
    lm = model(lambda dim: MoE(dim, 8, 4, 2, router=Balanced(dim, 4, 2, rate=.5)))
    train_language(lm, TEXT, 3)
    assert all(block.feedforward.router.bias.abs().max() >= .5 for block in lm.blocks)
    states = []
    for balance in (0, 0, 1.):
        lm = model()
        train_language(lm, TEXT, 3, balance=balance)
        states.append(lm.blocks[0].feedforward.router.gate.weight)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    for name, bad in {"steps": 0, "balance": -1, "rate": 0}.items():
        with pytest.raises(ValueError, match=f"{name}: "): train_language(lm, TEXT, **{"steps": 1} | {name: bad})
    with pytest.raises(TypeError, match="model: a module"): train_language(None, TEXT, 1)


def test_loads_are_those_of_one_large_batch():
    lm = model().train()
    found = expert_loads(lm, TEXT, length=30)
    assert lm.training and found.shape == (2, 4)
    lm(TEXT.view(100, 30))
    for block, row in zip(lm.blocks, found):
        counts = block.feedforward.routing.counts()
        assert torch.allclose(row, counts / counts.double().mean())
    assert torch.allclose(found.mean(1), torch.ones(2, dtype=torch.double))


def test_loads_of_what_has_none():
    with pytest.raises(ValueError, match="model: one with a MoE is expected, got CharacterModel"): expert_loads(CharacterModel(), TEXT)
    sizes = iter([4, 5])
    mixed = model(lambda dim: MoE(dim, 8, next(sizes), 1, router="topk"))
    with pytest.raises(ValueError, match=r"model: one with as many experts in each layer is expected, got \[4, 5\]"): expert_loads(mixed, TEXT)
    with pytest.raises(ValueError, match="length: a whole number from 1 to 2999 is expected, got 3000"): expert_loads(model(), TEXT, 3000)
    with pytest.raises(TypeError, match="model: a module"): expert_loads(3, TEXT)


def test_a_model_with_mixtures_is_causal():
    lm = model(lambda dim: MoE(dim, 8, 4, 1, router=TopK(dim, 4, 1, renormalize=False), shared_experts=1)).eval()
    x = TEXT[None, :20].clone()
    before = lm(x)
    x[0, 12:] = 3
    assert torch.allclose(lm(x)[0, :12], before[0, :12], atol=1e-5) and isinstance(lm.blocks[0], Block)
