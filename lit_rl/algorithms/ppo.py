"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) over any trunk.

One update reads from top to bottom in `LitPPO.training_step`.

Shapes: E environments; N sequences of T steps a rollout, M of them a minibatch. Where every step stands
alone (a memoryless trunk), each is a sequence of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from statistics import fmean
from typing import Literal

import lightning as L
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor

from lit_rl import keys
from lit_rl.algorithms.base import LitAgent
from lit_rl.algorithms.fused_ppo import FusedPPOLoss, fused_ppo_loss
from lit_rl.algorithms.gradients import average_and_clip, backward, is_plain_fused_adam, optimizer_step
from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError, check_range
from lit_rl.losses import approx_kl, clip_fraction, ppo_loss
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.agent import TrunkFactory
from lit_rl.models.normalization import RewardScale, reduce_sum, world_size
from lit_rl.ranks import together
from lit_rl.returns import discounted_return, explained_variance, generalized_advantage
from lit_rl.trunks import MLP

LEARNT_FROM = (
    keys.OBSERVATION,
    keys.ACTION,
    keys.LOG_PROB,
    keys.VALUE,
    keys.IS_INIT,
    keys.ADVANTAGE,
    keys.VALUE_TARGET,
)


class LitPPO(LitAgent):
    """PPO with clipped surrogate, GAE and exact memory.

    Minibatches are made of whole sequences, each replayed from the trunk state that the rollout had at
    its start, with the resets inside it: at the first minibatch of the first epoch every ratio is 1.

    Args:
        env: the environment, for its spaces.
        trunk: the architecture (makes a trunk for a number of input features); `mlp` if absent.
        total_frames: environment frames to train for.
        num_epochs: passes over each rollout.
        num_minibatches: optimizer steps a pass.
        gamma: discount.
        gae_lambda: lambda of GAE.
        clip: epsilon of the clipped surrogate.
        clip_final: clip at the end of training, reached linearly; `clip` if absent.
        value_clip: how far a value may move in one update; unlimited if absent.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        entropy_coef_final: the weight at the end of training, reached linearly; `entropy_coef` if absent.
        normalize_advantage: to mean 0 and standard deviation 1 in each minibatch (over all processes).
        max_grad_norm: the gradient's norm is clipped to this.
        target_kl: no further epoch once the approximate KL exceeds this.
        lr: Adam's learning rate.
        trunk_lr: that of the trunk's parameters; `lr` if absent.
        anneal_lr: learning rates fall linearly to 0.
        value_trunk: whether policy and value share encoder and trunk.
        encoder_width: features of a linear + ReLU layer before the trunk; none if absent.
        normalize_observation: by running mean and standard deviation.
        normalize_reward: divide by the running standard deviation of the discounted return.
        squash: tanh-squash continuous actions to their bounds; clip them if not.
        log_std: initial log standard deviation of continuous actions.
        compile_loss: torch.compile the loss of a minibatch. It needs a C++ compiler and time at the start,
            and takes the place of compiled loops; `make bench` tells whether it pays where you are.

    Raises:
        UserError: unsupported spaces, sizes that do not divide, losses that are not finite.
    """

    def __init__(
        self,
        env: EnvConfig,
        trunk: TrunkFactory | None = None,
        *,
        total_frames: int = 500_000,
        num_epochs: int = 4,
        num_minibatches: int = 4,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip: float = 0.2,
        clip_final: float | None = None,
        value_clip: float | None = None,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
        entropy_coef_final: float | None = None,
        normalize_advantage: bool = True,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        lr: float = 2.5e-4,
        trunk_lr: float | None = None,
        anneal_lr: bool = True,
        value_trunk: Literal["shared", "separate"] = "shared",
        encoder_width: int | None = None,
        normalize_observation: bool = False,
        normalize_reward: bool = False,
        squash: bool = False,
        log_std: float = 0.0,
        compile_loss: bool = False,
    ) -> None:
        super().__init__(env.id, total_frames=total_frames, lr=lr, trunk_lr=trunk_lr, anneal_lr=anneal_lr)
        check_range({"num_epochs": num_epochs, "num_minibatches": num_minibatches}, 1)
        check_range({"encoder_width": encoder_width}, 1, 2**16)
        check_range({"gamma": gamma, "gae_lambda": gae_lambda}, 0, 1)
        check_range({"max_grad_norm": max_grad_norm, "target_kl": target_kl}, 0, above=True)
        check_range({"clip": clip, "value_clip": value_clip}, 0, 1e6, above=True)
        check_range({"clip_final": clip_final}, 0, 1e6)
        coefs = {"entropy_coef": entropy_coef, "entropy_coef_final": entropy_coef_final}
        check_range({"value_coef": value_coef} | coefs, 0)
        check_range({"log_std": log_std}, -20, 20)
        observation_space, action_space = env.spaces()
        if (squash or log_std) and not isinstance(action_space, spaces.Box):
            raise UserError(
                f"squash and log_std are for continuous actions, not {action_space}: leave them out"
            )
        self.agent: ActorCritic = ActorCritic(
            observation_space,
            action_space,
            trunk or MLP,
            value_trunk=value_trunk,
            encoder_width=encoder_width,
            normalize_observation=normalize_observation,
            squash=squash,
            log_std=log_std,
        )
        self.num_epochs = num_epochs
        self.num_minibatches = num_minibatches
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.clip = (clip, clip if clip_final is None else clip_final)
        self.value_clip = value_clip
        self.value_coef = value_coef
        self.entropy_coef = (entropy_coef, entropy_coef if entropy_coef_final is None else entropy_coef_final)
        self.normalize_advantage = normalize_advantage
        self.max_grad_norm = max_grad_norm
        self.target_kl = target_kl
        self.reward_scale = RewardScale() if normalize_reward else None
        self._return_carry: Tensor | None = None
        self._minibatch_loss = torch.compile(self._loss) if compile_loss else self._loss
        self._ready_at = time.perf_counter()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameter_groups(), eps=1e-5, fused=True)

    def check_data(self, data: L.LightningDataModule) -> None:
        """Raises `UserError` where the rollouts of `data` do not divide into minibatches."""
        if not isinstance(data, RolloutDataModule):
            raise UserError(
                f"LitPPO learns from rollouts, not from {type(data).__name__}: use RolloutDataModule"
            )
        frames = data.env.num_envs * data.rollout_length
        length = 1 if self.agent.is_memoryless else data.sequence_length or data.rollout_length
        if (frames // length) % self.num_minibatches:
            unit = "steps" if length == 1 else f"sequences of {length} steps"
            raise UserError(
                f"a rollout is {frames // length} {unit} ({data.env.num_envs} x {data.rollout_length}): they "
                f"do not divide into {self.num_minibatches} minibatches; change num_minibatches, num_envs, "
                "rollout_length or sequence_length"
            )

    def on_fit_start(self) -> None:
        self.check_data(self.data)

    def on_train_epoch_start(self) -> None:
        self._ready_at = time.perf_counter()

    # ------------------------------------------------------------------ one update

    def training_step(self, rollout: TensorDict, batch_idx: int) -> None:
        learning_from = time.perf_counter()
        steps_ET = rollout[keys.STEPS]
        self.set_learning_rates()
        schedule = self._schedule()
        self.frames += steps_ET.numel() * self.trainer.world_size

        self._add_advantages(steps_ET)
        steps_NT, state_N = self._sequences(steps_ET.select(*LEARNT_FROM), rollout[keys.TRUNK_STATE])
        metrics = together(lambda: self._learn(steps_NT, state_N, **schedule))
        # Only now: a rollout and its update must see the same features.
        self.agent.update_normalization(steps_ET[keys.OBSERVATION])

        self._log_rollout(steps_ET, metrics, learning_from)
        if self.frames >= self.total_frames:
            self.trainer.should_stop = True

    def _schedule(self) -> dict[str, float]:
        """The coefficients of the loss for the share of the budget that is spent."""
        spent = self.progress
        (clip, clip_final), (entropy, entropy_final) = self.clip, self.entropy_coef
        return {
            "clip": clip + (clip_final - clip) * spent,
            "entropy_coef": entropy + (entropy_final - entropy) * spent,
        }

    def _add_advantages(self, steps_ET: TensorDict) -> None:
        """Adds advantage and value target ``[E, T]``, from rewards scaled where that is asked for."""
        reward = steps_ET[keys.REWARD]
        terminated, truncated = steps_ET[keys.TERMINATED], steps_ET[keys.TRUNCATED]
        if self.reward_scale is not None:
            carry = torch.zeros_like(reward[:, 0]) if self._return_carry is None else self._return_carry
            sums, self._return_carry = discounted_return(
                reward, terminated | truncated, carry, gamma=self.gamma
            )
            self.reward_scale.update(sums)
            reward = self.reward_scale(reward)
        steps_ET[keys.ADVANTAGE], steps_ET[keys.VALUE_TARGET] = generalized_advantage(
            reward,
            steps_ET[keys.VALUE],
            steps_ET[keys.NEXT_VALUE],
            terminated,
            truncated,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
        )

    def _sequences(self, steps_ET: TensorDict, state_EK: TensorDict) -> tuple[TensorDict, TensorDict]:
        """What minibatches are drawn from: steps ``[N, T]`` and the trunk state ``[N]`` at their start."""
        frames = steps_ET.numel()
        if self.agent.is_memoryless:
            return steps_ET.reshape(frames, 1), self.agent.initial_state(frames)
        N = state_EK.numel()
        return steps_ET.reshape(N, frames // N), state_EK.reshape(N)

    def _learn(
        self, steps_NT: TensorDict, state_N: TensorDict, clip: float, entropy_coef: float
    ) -> dict[str, float]:
        """Epochs of minibatches; returns the means of what was measured, over all minibatches."""
        N, M = len(steps_NT), len(steps_NT) // self.num_minibatches
        # Plain dictionaries: looking into a TensorDict costs as much as a small operation.
        columns_NT = {key: steps_NT[key] for key in LEARNT_FROM}
        # Not through Lightning's wrappers of backward and step, which cost as much as the step itself.
        optimizer = self.trainer.optimizers[0]
        parameters = list(self.agent.parameters())
        fused_loss = self._fused_loss(M) if is_plain_fused_adam(optimizer) else None
        memoryless = [self.agent.initial_state(M)] * self.num_minibatches if self.agent.is_memoryless else []
        losses: list[Tensor] = []
        grad_norms: list[float] = []
        log_ratios: list[Tensor] = []
        for _epoch in range(self.num_epochs):
            order = torch.randperm(N, device=steps_NT.device)
            shuffled_NT = {key: select(column, order) for key, column in columns_NT.items()}
            if self.normalize_advantage:
                advantage_NT = shuffled_NT[keys.ADVANTAGE]
                shuffled_NT[keys.ADVANTAGE] = normalized(advantage_NT, self.num_minibatches)
            minibatches = zip(*(column.split(M) for column in shuffled_NT.values()), strict=True)
            states = memoryless if self.agent.is_memoryless else state_N[order].split(M)
            for columns_MT, state_M in zip(minibatches, states, strict=True):
                steps_MT = dict(zip(LEARNT_FROM, columns_MT, strict=True))
                if fused_loss is not None:
                    loss, measured, log_ratio_MT = fused_loss(steps_MT, clip, entropy_coef)
                else:
                    loss, measured, log_ratio_MT = self._minibatch_loss(steps_MT, state_M, clip, entropy_coef)
                    backward(loss)
                grad_norms.append(average_and_clip(parameters, self.max_grad_norm))
                if not math.isfinite(grad_norms[-1]):
                    raise UserError(self._not_finite(loss, measured))
                optimizer_step(optimizer)
                for parameter in parameters:
                    parameter.grad = None
                losses += measured.values()
                log_ratios.append(log_ratio_MT)
            if self.target_kl is not None:
                kl = reduce_sum(approx_kl(torch.stack(log_ratios[-self.num_minibatches :])))
                if kl > self.target_kl * self.trainer.world_size:
                    break
        self.count_optimizer_steps(len(grad_norms))
        means = torch.stack(losses).view(-1, len(measured)).mean(0).tolist()
        log_ratio = torch.stack(log_ratios)
        return dict(zip(measured, means, strict=True)) | {
            "grad_norm": fmean(grad_norms),
            "approx_kl": approx_kl(log_ratio).item(),
            "clip_fraction": clip_fraction(log_ratio.exp(), clip).item(),
            # 0 where the update sees what the rollout saw: memory, resets and normalisation alike.
            "first_ratio_deviation": (log_ratios[0].exp() - 1).abs().max().item(),
        }

    def _loss(
        self, steps_MT: Mapping[str, Tensor], state_M: TensorDict, clip: float, entropy_coef: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of one minibatch; detached, its parts and the log ratio ``[M, T]``.

        Of small MLPs `lit_rl.algorithms.fused_ppo` says the same without autograd.
        """
        params, value, _ = self.agent(steps_MT[keys.OBSERVATION], state_M, steps_MT[keys.IS_INIT])
        log_prob, entropy = self.agent.policy.log_prob_and_entropy(params, steps_MT[keys.ACTION])
        terms = ppo_loss(
            log_prob,
            value,
            entropy,
            old_log_prob=steps_MT[keys.LOG_PROB],
            old_value=steps_MT[keys.VALUE],
            advantage=steps_MT[keys.ADVANTAGE],
            target=steps_MT[keys.VALUE_TARGET],
            clip=clip,
            value_clip=self.value_clip,
            value_coef=self.value_coef,
            entropy_coef=entropy_coef,
        )
        loss = terms.loss  # Schulman et al. 2017, eq. 9: policy_loss + c_1 value_loss - c_2 entropy
        measured = {
            "policy_loss": terms.policy_loss,
            "value_loss": terms.value_loss,
            "entropy": terms.entropy,
        }
        auxiliary = self.agent.auxiliary_loss()
        if auxiliary is not None:
            loss = loss + auxiliary
            measured["auxiliary_loss"] = auxiliary.detach()
        return loss, measured, terms.log_ratio

    def _fused_loss(self, rows: int) -> FusedPPOLoss | None:
        """What gives loss and gradients of so many steps at once, where there is such a thing.

        It reads weights where they lie, so it is for an optimizer that changes them in place.
        """
        if getattr(self._minibatch_loss, "__func__", None) is not LitPPO._loss:
            return None
        return fused_ppo_loss(self.agent, rows, value_clip=self.value_clip, value_coef=self.value_coef)

    def _not_finite(self, loss: Tensor, measured: dict[str, Tensor]) -> str:
        bad = [key for key, value in measured.items() if not value.isfinite()]
        where = (
            ", ".join(bad) if bad else "the gradient (of a finite loss)" if loss.isfinite() else "the loss"
        )
        return (
            f"{where} is not finite at {self.frames} frames; this optimizer step was not taken and the last "
            "checkpoint is whole: lower the learning rate, or normalise observations and rewards"
        )

    # ------------------------------------------------------------------ what a rollout tells

    def _log_rollout(self, steps_ET: TensorDict, metrics: dict[str, float], learning_from: float) -> None:
        """One record a rollout; losses and the like are those of this process, episodes those of all."""
        now = time.perf_counter()
        frames = steps_ET.numel() * self.trainer.world_size
        collecting, learning = learning_from - self._ready_at, now - learning_from
        record = {f"train/{key}": value for key, value in metrics.items()}
        record["train/explained_variance"] = explained_variance(
            steps_ET[keys.VALUE], steps_ET[keys.VALUE_TARGET]
        ).item()
        record |= self.episode_means(self.finished(steps_ET))
        record |= self.state_of_training(frames, collecting, learning)
        self.log_frames(record)
        self._ready_at = time.perf_counter()


def select(column_N: Tensor | TensorDict, order: Tensor) -> Tensor | TensorDict:
    """``column_N[order]``, for a tensor the quicker way."""
    return column_N.index_select(0, order) if isinstance(column_N, Tensor) else column_N[order]


def normalized(advantage_NT: Tensor, num_minibatches: int = 1) -> Tensor:
    """Mean 0 and standard deviation 1 in each minibatch (N / num_minibatches rows) of all processes."""
    rows = advantage_NT.reshape(num_minibatches, -1)
    count = rows.shape[1] * world_size()
    mean = reduce_sum(rows.sum(1, keepdim=True)) / count
    variance = reduce_sum((rows - mean).square().sum(1, keepdim=True)) / count
    return ((rows - mean) / (variance.sqrt() + 1e-8)).view_as(advantage_NT)
