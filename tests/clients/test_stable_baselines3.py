"""stable-baselines3 makes the optimizer from the parameters of its policy, and saves and loads both."""

import pytest

pytest.importorskip("stable_baselines3")

import torch
from stable_baselines3 import PPO

from relfisher import RNGD
from relfisher.responses import TanhBernoulli

pytestmark = [
    pytest.mark.filterwarnings("ignore:RNGD observes:UserWarning"),
    # The policy calls its last layers from methods of its own.
    pytest.mark.filterwarnings("ignore:linear response for some layers:UserWarning"),
]


def agent():
    return PPO(
        "MlpPolicy",
        "CartPole-v1",
        policy_kwargs={"optimizer_class": RNGD, "net_arch": [8]},
        learning_rate=1e-2,
        n_steps=64,
        n_epochs=2,
        seed=0,
        device="cpu",
    )


def test_a_policy_learns_with_the_activations_of_its_layers():
    optimizer = agent().learn(128).policy.optimizer
    roles = {layer.name: layer.role for layer in optimizer.layers}
    assert roles["mlp_extractor.policy_net.0"].response == TanhBernoulli()
    assert roles["action_net"] is not None
    assert optimizer.health.skipped_steps == 0


def test_a_saved_agent_goes_on(tmp_path):
    first = agent().learn(64)
    first.save(tmp_path / "agent")
    second = PPO.load(tmp_path / "agent", env=first.get_env())
    for mine, other in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(mine, other)
    before = second.policy.optimizer.state_dict()["param_groups"][0]["iteration"]
    assert before == first.policy.optimizer.param_groups[0]["iteration"] > 0
    second.learn(64, reset_num_timesteps=False)
    assert second.policy.optimizer.param_groups[0]["iteration"] > before
