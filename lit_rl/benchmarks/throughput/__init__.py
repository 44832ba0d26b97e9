"""``lit-rl bench throughput``: steps a second of whole training runs, where they go, and what is above them.

- `ours`: a run as the command starts it, with the share of each phase.
- `ceilings`: the environment alone, and a bare loop of the same networks.
- `peers`: the same settings in another library.
- `command`: all of them turn about, each in a process of its own; table, CSV, JSON, picture.
"""
