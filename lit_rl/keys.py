"""Every TensorDict key, named once.

A rollout is ``{STEPS: [E, T] TensorDict, TRUNK_STATE: [E, K] TensorDict}``: T steps of E environments, cut
into K sequences each, and the trunk's memory only at the start of each sequence. A step holds:

- ``observation``: what the policy saw, a tensor or (for Dict spaces) a nested TensorDict
- ``action``: as the policy sampled it, before squashing or clipping to the bounds
- ``log_prob``, ``value``: of the policy that acted
- ``reward``: the environment's own, before any scaling
- ``terminated``, ``truncated``: how the step ended its episode, if it did
- ``is_init``: this observation is the first of an episode
- ``next_value``: V of the true next observation; at a truncation that of the last observation of the
  ended episode, never of the one after the reset; 0 where it terminated
- ``episode_return``, ``episode_length``, ``episode_success``: NaN but where an episode ended (and, for
  success, the environment told)

The learner adds ``advantage`` and ``value_target``.

A batch of windows (off-policy) is ``{WINDOWS: [W] TensorDict, EPISODES: [E, T] TensorDict}``. A window is
``{STEPS: [L] TensorDict, TRUNK_STATE: []}``, the memory (where it is kept) at the window's start. Its steps
hold observation, action, reward, terminated and is_init as above, and

- ``has_action``: false for the true last observation of a truncated episode, on which no action was taken
- ``latent``: what the trunk made of the observation when acting, where it is kept

The episodes are the last three entries of a rollout's step.
"""

WINDOWS = "windows"
EPISODES = "episodes"

STEPS = "steps"
TRUNK_STATE = "trunk_state"

OBSERVATION = "observation"
ACTION = "action"
LOG_PROB = "log_prob"
VALUE = "value"
NEXT_VALUE = "next_value"
REWARD = "reward"
TERMINATED = "terminated"
TRUNCATED = "truncated"
IS_INIT = "is_init"
HAS_ACTION = "has_action"
LATENT = "latent"

ADVANTAGE = "advantage"
VALUE_TARGET = "value_target"
EPISODE_RETURN = "episode_return"
EPISODE_LENGTH = "episode_length"
EPISODE_SUCCESS = "episode_success"
