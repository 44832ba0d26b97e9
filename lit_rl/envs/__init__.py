"""An environment id and its wrappers -> one batched environment, whatever the backend.

`EnvConfig` is the `env:` section of a YAML file; `EnvConfig.make()` returns the batched environment whose
contract `lit_rl.envs.vector` states. Backends and environment packages are imported only when chosen.
"""

from lit_rl.envs.config import EnvConfig

__all__ = ["EnvConfig"]
