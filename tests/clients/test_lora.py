"""LoRA by PEFT: the frozen base keeps its weights and takes no state, the adapters move."""

import pytest

from relfisher import AdamWOptions

pytest.importorskip("peft")

import torch
from amp import network
from hf_gpt2 import gpt2
from lora import adapted, train
from peft import LoraConfig, get_peft_model
from synthetic import gratings, progressions
from torch.nn.functional import cross_entropy

from relfisher import RNGD

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def parts(model):
    """Return copies of the frozen parameters and of the adapters, by name."""
    found = {False: {}, True: {}}
    for name, parameter in model.named_parameters():
        found[parameter.requires_grad][name] = parameter.detach().clone()
    return found[False], found[True]


def assert_only_adapters_moved(model, optimizer, before):
    frozen, adapters = parts(model)
    assert frozen
    assert all(torch.equal(value, before[0][name]) for name, value in frozen.items())
    assert all("lora_" in name and not torch.equal(value, before[1][name]) for name, value in adapters.items())
    assert not [parameter for parameter, state in optimizer.state.items() if state and not parameter.requires_grad]
    assert len(optimizer.state_dict()["state"]) <= len(adapters)


def test_adapters_turn_a_frozen_gpt2():
    base = gpt2()
    optimizer = RNGD(base, fallback=AdamWOptions(lr=1e-2))
    up = train(base, optimizer, progressions(256, steps=(1,)), epochs=6)
    optimizer.close()
    model = adapted(base)
    before = parts(model)
    optimizer = RNGD(model)
    down = train(model, optimizer, progressions(256, steps=(-1,)), epochs=6)
    assert_only_adapters_moved(model, optimizer, before)
    assert up[-1] < up[0] / 2
    assert down[-1] < down[0] / 2


def test_adapters_of_linear_layers_move_alone():
    model = get_peft_model(network(), LoraConfig(r=4, target_modules=["1", "3"]))
    before = parts(model)
    optimizer = RNGD(model, lr=0.1)
    images, labels = gratings(128, size=8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_only_adapters_moved(model, optimizer, before)
    assert losses[-1] < losses[0] / 2
