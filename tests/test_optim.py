"""The optimizer and its engine: accumulation, averaged weights, what decays, Muon, rates."""

import copy

import pytest
import torch
from torch import nn

from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.fine_tuning import freeze
from mmvit.training import OptimizerConfig, Processes, TrainConfig
from mmvit.training.engine import TorchEngine
from mmvit.training.muon import Muon
from mmvit.training.optim import Optimizer, layer_scales, rate_scale, split_parameters

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
MODEL = ClassifierConfig(
    image_size=16,
    patch_size=8,
    num_classes=4,
    core=TransformerConfig(width=16, depth=2, num_heads=2, dropout=0.2),
)


def test_four_small_passes_equal_one_large(tmp_path):
    batch = {"pixels": torch.randn(8, 3, 16, 16), "labels": torch.arange(8) % 4}
    model = MODEL.model_copy(update={"core": MODEL.core.model_copy(update={"dropout": 0.0})})
    weights = []
    for accumulation in (1, 4):
        torch.manual_seed(0)
        settings = TrainConfig(batch_size=8, accumulation=accumulation, precision="fp32", clip_norm=0.5)
        engine = TorchEngine(Classifier(model), settings, OptimizerConfig(warmup_steps=1), ALONE)
        for number in (1, 2, 3):
            for part in range(accumulation):
                size = 8 // accumulation
                rows = slice(part * size, (part + 1) * size)
                loss, _ = engine.loss({name: tensor[rows] for name, tensor in batch.items()})
                engine.backward(loss)
            norm = engine.step(number)
        weights.append((norm, engine.model.state_dict()))
    (norm, large), (small_norm, small) = weights
    assert small_norm == pytest.approx(norm, rel=1e-4)
    for name in large:
        torch.testing.assert_close(small[name], large[name], rtol=1e-3, atol=1e-5)


def test_average_follows_the_weights_with_warm_up():
    torch.manual_seed(0)
    engine = TorchEngine(
        Classifier(MODEL), TrainConfig(ema_decay=0.5, precision="fp32"), OptimizerConfig(lr=0.1), ALONE
    )
    expected = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    batch = {"pixels": torch.randn(8, 3, 16, 16), "labels": torch.arange(8) % 4, "keys": ["a"] * 8}
    for number in range(1, 12):
        loss, _ = engine.loss(batch)
        engine.backward(loss)
        engine.step(number)
        decay = min(0.5, (1 + number) / (10 + number))
        for name, tensor in engine.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    with engine.evaluating() as model:
        assert not model.training
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name])
    assert engine.model.training


def test_weights_that_should_not_decay_do_not():
    model = Classifier(MODEL)
    decayed, plain, matrices = split_parameters(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in matrices} == {
        name for name, p in model.named_parameters() if name.startswith("core.") and p.ndim == 2
    }
    assert all(p.ndim == 1 or names[id(p)].startswith(("cls_token", "positions.")) for p in plain)
    assert "head.weight" in {names[id(p)] for p in decayed}
    assert len(decayed) + len(plain) + len(matrices) == len(names)
    for name in ("adamw", "muon", "sgd", "lars"):
        parts = Optimizer(model, OptimizerConfig(name=name, weight_decay=0.2), total_steps=1).parts
        groups = [group for part in parts for group in part.param_groups]
        decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        assert {decay[id(parameter)] for parameter in plain} == {0}
        assert {decay[id(parameter)] for parameter in [*decayed, *matrices]} == {0.2}
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    tied["head"].weight = tied["embedding"].weight
    assert [len(part) for part in split_parameters(tied)] == [0, 2, 0]


@pytest.mark.parametrize("stem", ["patch", "residual"])
def test_muon_trains_hidden_layers_and_resumes(stem):
    torch.manual_seed(0)
    config = OptimizerConfig(name="muon", lr=0.01, warmup_steps=0, weight_decay=0.0)
    shape = MODEL.model_copy(update={"stem": stem, "stem_blocks": (1, 0, 1)})
    model = Classifier(shape)
    optimizer = Optimizer(model, config, total_steps=10)
    batch = {"pixels": torch.randn(8, 3, 16, 16), "labels": torch.arange(8) % 4}

    def step(model: Classifier, optimizer: Optimizer, number: int) -> float:
        model.eval()  # without dropout
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.set_rate(number)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step(model, optimizer, number) for number in range(1, 6)]
    assert losses[-1] < losses[0]
    twin = Classifier(shape)
    twin.load_state_dict(model.state_dict())
    other = Optimizer(twin, config, total_steps=10)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step(twin, other, 6) == step(model, optimizer, 6)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(UserError, match=r"trained with muon, but optimizer\.name is now adamw"):
        Optimizer(twin, OptimizerConfig(), total_steps=10).load_state_dict(optimizer.state_dict())
    with pytest.raises(UserError, match="trains hidden layers, and Linear marks none"):
        Optimizer(nn.Linear(2, 2), config, total_steps=10)
    freeze(twin, ["core", "stem"])
    with pytest.raises(UserError, match="trains hidden layers, and all of them are frozen; use --optimizer"):
        Optimizer(twin, config, total_steps=10)


def test_muon_has_its_own_rate_and_decays_like_adamw():
    """Weights without a gradient only decay, each at the rate of its optimizer."""
    model = Classifier(MODEL)
    nn.init.ones_(model.head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for muon_lr, factor in ((0.2, 1 - 0.2 * 0.3), (None, 1 - 0.1 * 0.3)):
        model.load_state_dict(before)
        config = OptimizerConfig(
            name="muon", lr=0.1, muon_lr=muon_lr, weight_decay=0.3, warmup_steps=0, schedule="constant"
        )
        optimizer = Optimizer(model, config, total_steps=2)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.set_rate(1)
        optimizer.step()
        for name in ("core.blocks.0.mlp.up.weight", "head.weight"):
            expected = before[name] * (factor if name.startswith("core") else 1 - 0.1 * 0.3)
            torch.testing.assert_close(model.state_dict()[name], expected)


def test_muon_sees_a_kernel_as_a_matrix():
    torch.manual_seed(0)
    kernel, matrix = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.zeros(4, 18))
    matrix.data.copy_(kernel.detach().flatten(1))
    optimizers = [Muon([{"params": [each]}], lr=0.1, weight_decay=0.1) for each in (kernel, matrix)]
    for _ in range(3):
        gradient = torch.randn(4, 2, 3, 3)
        kernel.grad, matrix.grad = gradient.contiguous(memory_format=torch.channels_last), gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(kernel.flatten(1), matrix)
    assert kernel.grad is None
    with pytest.raises(ValueError, match="cannot be seen as a matrix"):
        Muon([{"params": [nn.Parameter(kernel.detach().contiguous(memory_format=torch.channels_last))]}])


@pytest.mark.parametrize("stack", [2**24, 40 * 24])
def test_muon_in_stacks_is_that_of_torch(stack, monkeypatch):
    monkeypatch.setattr("mmvit.training.muon.STACK", stack)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(24, 40), (40, 24), (24, 40), (32, 32), (24, 40)]]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = [Muon([{"params": ours}], **settings)]
    optimizers.append(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings))
    for number in range(3):
        for index, (mine, peer) in enumerate(zip(ours, theirs, strict=True)):
            unused = index == 4 and number == 0
            mine.grad = None if unused else torch.randn(mine.shape)
            peer.grad = mine.grad
        for optimizer in optimizers:
            optimizer.step()
    for mine, peer in zip(ours, theirs, strict=True):
        assert (mine - peer).abs().max() < 0.01  # of three steps of up to 0.3, in bfloat16 either way
    assert ours[4].shape == optimizers[0].state_dict()["state"][4]["momentum_buffer"].shape


def test_settings_of_the_optimizer_may_change_on_resume():
    model = Classifier(MODEL)
    state = Optimizer(
        model, OptimizerConfig(weight_decay=0.1, betas=(0.9, 0.95)), total_steps=10
    ).state_dict()
    resumed = Optimizer(model, OptimizerConfig(weight_decay=0.3, betas=(0.9, 0.99)), total_steps=10)
    resumed.load_state_dict(state)
    [adamw] = resumed.parts
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]
    assert adamw.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.25, 0.5, 0.75, 0.55, 0.1]),
        ("linear", [0.25, 0.5, 0.75, 0.55, 0.1]),
        ("constant", [0.25, 0.5, 0.75, 1, 1]),
    ],
)
def test_rate_warms_up_and_ends_at_its_final_ratio(schedule, expected):
    config = OptimizerConfig(warmup_steps=3, schedule=schedule, final_lr_ratio=0.1)
    assert [rate_scale(step, 13, config) for step in (1, 2, 3, 8, 13)] == pytest.approx(expected)


def test_layers_learn_the_slower_the_lower_they_are():
    model = Classifier(MODEL)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in ("adamw", "sgd", "lars", "muon"):
        config = OptimizerConfig(name=optimizer, lr=0.1, layer_decay=0.5, warmup_steps=0)
        rates = {}
        for part in Optimizer(model, config, total_steps=10).parts:
            for group in part.param_groups:
                rates |= {names[id(p)]: group["lr"] for p in group["params"]}
        assert rates.keys() == set(names.values())
        for name, rate in rates.items():
            layers = {"core.blocks.1": 1, "core.blocks.0": 2, "head": 0, "core.norm": 0}
            below = next((n for start, n in layers.items() if name.startswith(start)), 3)
            assert rate == pytest.approx(0.1 * 0.5**below), name
    with pytest.raises(UserError, match="layer_decay needs a core of blocks, and Linear has none"):
        Optimizer(nn.Linear(2, 2), OptimizerConfig(layer_decay=0.9), total_steps=10)


@pytest.mark.parametrize(
    ("settings", "name", "first"),
    [
        ({"positions_at": "every_layer"}, "layer_positions.{}.", 1),
        ({"positions": "relative_1d", "patch_dropout": 0.0}, "relative.tables.{}", 0),
    ],
)
def test_positions_of_a_block_learn_as_the_block(settings, name, first):
    core = MODEL.core.model_copy(update={"depth": 3})
    model = Classifier(MODEL.model_copy(update={"core": core, **settings}))
    scales, parameters = layer_scales(model, 0.5), dict(model.named_parameters())
    for number in range(3 - first):
        own = next(p for full, p in parameters.items() if full.startswith(name.format(number)))
        block = parameters[f"core.blocks.{number + first}.norm1.weight"]
        assert scales[id(own)] == scales[id(block)]


def test_adamw_is_that_of_the_formula():
    layer = nn.Linear(2, 1, bias=False)
    config = OptimizerConfig(lr=0.1, betas=(0.5, 0.8), eps=0.3, weight_decay=0.2, warmup_steps=0)
    optimizer = Optimizer(layer, config.model_copy(update={"schedule": "constant"}), total_steps=3)
    weight, mean, square = layer.weight.detach().clone(), torch.zeros(1, 2), torch.zeros(1, 2)
    for number in (1, 2, 3):
        gradient = torch.tensor([[1.0, -number]])
        layer.weight.grad = gradient.clone()
        optimizer.set_rate(number)
        optimizer.step()
        mean, square = 0.5 * mean + 0.5 * gradient, 0.8 * square + 0.2 * gradient**2
        step = (mean / (1 - 0.5**number)) / ((square / (1 - 0.8**number)).sqrt() + 0.3)
        weight = weight * (1 - 0.1 * 0.2) - 0.1 * step
        torch.testing.assert_close(layer.weight.detach(), weight)


def test_sgd_is_that_of_the_formula():
    layer = nn.Linear(2, 1, bias=False)
    config = OptimizerConfig(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.2, warmup_steps=0)
    optimizer = Optimizer(layer, config.model_copy(update={"schedule": "constant"}), total_steps=3)
    weight, velocity = layer.weight.detach().clone(), torch.zeros(1, 2)
    for number in (1, 2, 3):
        gradient = torch.tensor([[1.0, -number]])
        layer.weight.grad = gradient.clone()
        optimizer.set_rate(number)
        optimizer.step()
        velocity = 0.5 * velocity + gradient + 0.2 * weight
        weight = weight - 0.1 * velocity
        torch.testing.assert_close(layer.weight.detach(), weight)


def test_lars_is_that_of_the_formula():
    """Rates by layer for what decays; biases take plain momentum steps (BYOL, 2006.07733)."""
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.bias)
    config = OptimizerConfig(
        name="lars", lr=0.5, momentum=0.5, weight_decay=0.2, trust=0.01, warmup_steps=0, schedule="constant"
    )
    optimizer = Optimizer(layer, config, total_steps=3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    velocities = [torch.zeros(2, 2), torch.zeros(2)]
    for number in (1, 2, 3):
        gradient = torch.tensor([[1.0, -number], [0.5, 2.0]])
        layer.weight.grad, layer.bias.grad = gradient.clone(), gradient[0].clone()
        optimizer.set_rate(number)
        optimizer.step()
        update = gradient + 0.2 * weight
        velocities[0] = 0.5 * velocities[0] + update * 0.01 * weight.norm() / update.norm()
        velocities[1] = 0.5 * velocities[1] + gradient[0]
        weight, bias = weight - 0.5 * velocities[0], bias - 0.5 * velocities[1]
        torch.testing.assert_close(layer.weight.detach(), weight)
        torch.testing.assert_close(layer.bias.detach(), bias)


def test_lars_moves_weights_of_zeros_by_their_gradient():
    layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(layer.weight)
    config = OptimizerConfig(name="lars", lr=0.5, warmup_steps=0, schedule="constant")
    optimizer = Optimizer(layer, config, total_steps=1)
    layer.weight.grad = torch.tensor([[1.0, -2.0]])
    optimizer.set_rate(1)
    optimizer.step()
    assert layer.weight.tolist() == [[-0.5, 1.0]]
