"""What no training loop can be faster than: the environment alone, and a bare loop of the same networks.

The bare loop is what one would write in a script: no Lightning, TorchRL or checks, no normalisation of
rewards and no logs; networks, environments and sizes are those of the configuration, distributions torch's.

Shapes: E environments, T steps, M sequences of a minibatch.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

from lit_rl.algorithms import LitDQN, LitPPO
from lit_rl.benchmarks.throughput.clock import Clock
from lit_rl.cli import LitRLCLI
from lit_rl.collectors.base import to_tensor
from lit_rl.data import ReplayDataModule, RolloutDataModule
from lit_rl.errors import UserError
from lit_rl.models.heads import Gaussian


def environment_alone(run: LitRLCLI, seconds: float) -> dict[str, float]:
    """Steps a second with random actions drawn beforehand."""
    env = run.datamodule.env.make(seed=0)
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(256)]
    clock = Clock(seconds)
    while not clock.is_over:
        for action in actions:
            env.step(action)
        clock.batch(len(actions) * env.num_envs)
    env.close()
    return {"steps/s": clock.speed}


def bare_loop(run: LitRLCLI, seconds: float) -> dict[str, float]:
    """Steps a second of the whole loop, and of its collecting alone.

    Raises:
        UserError: there is no bare loop for such a learner.
    """
    if isinstance(run.model, LitPPO):
        return _bare_ppo(run.model, run.datamodule, Clock(seconds))
    if isinstance(run.model, LitDQN) and run.model.agent.is_memoryless:
        return _bare_dqn(run.model, run.datamodule, Clock(seconds))
    raise UserError("the bare loop knows PPO, and DQN without memory: leave this configuration out")


# ------------------------------------------------------------------ PPO


def _bare_ppo(model: LitPPO, data: RolloutDataModule, clock: Clock) -> dict[str, float]:
    env, agent = data.env.make(seed=0), model.agent
    E, T = env.num_envs, data.rollout_length
    length = data.sequence_length or T
    optimizer = torch.optim.Adam(agent.parameters(), lr=model.lr, eps=1e-5, fused=True)
    collecting = 0.0
    observation, _ = env.reset(seed=0)
    is_init, state = torch.ones(E, dtype=torch.bool), agent.initial_state(E)
    while not clock.is_over:
        start = time.perf_counter()
        steps: list[tuple[Any, ...]] = []
        states = []
        with torch.no_grad():
            for t in range(T):
                if t % length == 0:
                    states.append(state)
                seen = _map(lambda leaf: torch.from_numpy(leaf).clone(), observation)
                params, value, state = agent(
                    _map(lambda leaf: leaf.unsqueeze(1), seen), state, is_init.unsqueeze(1)
                )
                chosen = _distribution(agent.policy, params.squeeze(1))
                action = chosen.sample()
                observation, reward, terminated, truncated, _ = env.step(agent.to_env(action).numpy())
                ended = torch.from_numpy(terminated | truncated)
                reward = torch.from_numpy(reward).float()
                steps.append(
                    (seen, is_init, action, chosen.log_prob(action), value.squeeze(1), reward, ended)
                )
                is_init = ended
            now = _map(lambda leaf: leaf.unsqueeze(1), to_tensor(observation))
            next_value = agent(now, state, is_init.unsqueeze(1))[1].squeeze(1)
        if clock.has_started:
            collecting += time.perf_counter() - start

        seen_t, *columns = zip(*steps, strict=True)
        is_init_ET, action_ET, log_prob_ET, value_ET, reward_ET, ended_ET = (
            torch.stack(column, 1) for column in columns
        )
        advantage_ET = torch.zeros_like(value_ET)
        carry = torch.zeros(E)
        for t in reversed(range(T)):
            goes_on = 1.0 - ended_ET[:, t].float()
            delta = reward_ET[:, t] + model.gamma * next_value * goes_on - value_ET[:, t]
            carry = delta + model.gamma * model.gae_lambda * goes_on * carry
            advantage_ET[:, t] = carry
            next_value = value_ET[:, t]
        columns_ET = (
            _map(lambda *leaves: torch.stack(leaves, 1), *seen_t),
            *(is_init_ET, action_ET, log_prob_ET, advantage_ET, advantage_ET + value_ET),
        )
        N = E * T if agent.is_memoryless else E * T // length
        columns_N = [
            _map(lambda leaf, N=N: leaf.reshape(N, -1, *leaf.shape[2:]), part) for part in columns_ET
        ]
        state_N = agent.initial_state(N) if agent.is_memoryless else torch.stack(states, 1).reshape(N)
        for _ in range(model.num_epochs):
            for index in torch.randperm(N).split(N // model.num_minibatches):
                minibatch = [_map(lambda leaf, index=index: leaf[index], part) for part in columns_N]
                _learn_ppo(model, optimizer, minibatch, state_N[index])
        clock.batch(E * T)
    env.close()
    return {"steps/s": clock.speed, "collecting steps/s": clock.frames / collecting}


def _learn_ppo(model: LitPPO, optimizer: torch.optim.Optimizer, minibatch: list[Any], state: Any) -> None:
    seen, is_init, action, old_log_prob, advantage, target = minibatch
    params, value, _ = model.agent(seen, state, is_init)
    chosen = _distribution(model.agent.policy, params)
    ratio = (chosen.log_prob(action) - old_log_prob).exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = ratio.clamp(1 - model.clip[0], 1 + model.clip[0])
    policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
    value_loss = 0.5 * (value - target).square().mean()
    loss = policy_loss + model.value_coef * value_loss - model.entropy_coef[0] * chosen.entropy().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.agent.parameters(), model.max_grad_norm)
    optimizer.step()


def _distribution(head: Any, params: Tensor) -> Distribution:
    if isinstance(head, Gaussian):
        return Independent(Normal(params, head.log_std.exp().expand_as(params)), 1)
    return Categorical(logits=params)


# ------------------------------------------------------------------ DQN


def _bare_dqn(model: LitDQN, data: ReplayDataModule, clock: Clock) -> dict[str, float]:
    env, agent = data.env.make(seed=0), model.agent
    E, size = env.num_envs, data.buffer_size // env.num_envs
    optimizer = torch.optim.Adam(agent.parameters(), lr=model.lr, fused=True)
    space = env.single_observation_space
    seen, after = (np.zeros((size, E, *(space.shape or ())), space.dtype) for _ in range(2))
    action_of, reward_of = np.zeros((size, E), np.int64), np.zeros((size, E), np.float32)
    ended_of = np.zeros((size, E), bool)
    state, no = agent.initial_state(E), torch.zeros(E, 1, dtype=torch.bool)
    observation, _ = env.reset(seed=0)
    count, collecting = 0, 0.0

    def values(network: Any, rows: np.ndarray) -> Tensor:
        M = len(rows)
        out, _, _ = network(torch.from_numpy(rows)[:, None], agent.initial_state(M), no[:1].expand(M, 1))
        return network.head.values(out)[:, 0]

    while not clock.is_over:
        start = time.perf_counter()
        for _ in range(data.steps_per_block):
            with torch.no_grad():
                out, _, state = agent(torch.from_numpy(observation)[:, None], state, no)
                action = agent.head.values(out)[:, 0].argmax(-1).numpy()
            explores = np.random.rand(E) < model.exploration_rate[1]
            action = np.where(explores, np.random.randint(agent.num_actions, size=E), action)
            at = count % size
            seen[at], action_of[at] = observation, action
            observation, reward_of[at], ended_of[at], _, info = env.step(action)
            after[at] = info.get("final_obs", observation)
            count += 1
        if clock.has_started:
            collecting += time.perf_counter() - start
        if count * E < model.learning_starts:
            continue
        for _ in range(model.updates_per_block):
            drawn = (
                np.random.randint(min(count, size), size=model.batch_size),
                np.random.randint(E, size=model.batch_size),
            )
            with torch.no_grad():
                best = values(model.target, after[drawn]).amax(1)
                goes_on = 1.0 - torch.from_numpy(ended_of[drawn]).float()
                target = torch.from_numpy(reward_of[drawn]) + model.loss.gamma * goes_on * best
            chosen = torch.from_numpy(action_of[drawn])[:, None]
            loss = F.smooth_l1_loss(values(agent, seen[drawn]).gather(1, chosen)[:, 0], target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(agent.parameters(), model.max_grad_norm)
            optimizer.step()
        clock.batch(data.steps_per_block * E)
    env.close()
    return {"steps/s": clock.speed, "collecting steps/s": clock.frames / collecting}


def _map(fn: Any, *observations: Any) -> Any:
    """`fn` of each leaf, of a plain observation or of a mapping."""
    first = observations[0]
    if not isinstance(first, dict):
        return fn(*observations)
    return {key: fn(*(observation[key] for observation in observations)) for key in first}
