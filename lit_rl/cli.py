"""The command line: YAML and options -> objects -> fit, validate, test, predict. The only assembler."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lit_rl import arguments, checkpoints, messages, ranks
from lit_rl.algorithms import LitPPO
from lit_rl.algorithms.base import LitAgent
from lit_rl.callbacks import (
    AttentionMaps,
    EpisodeWriter,
    EvaluationVideo,
    FrameProgress,
    RunLogger,
    RunRecord,
    StopOnSignal,
    Stopped,
)
from lit_rl.data import EnvDataModule, RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError
from lit_rl.memory import keep_freed_memory

LOGS = Path("logs")
# What an evaluation takes from the checkpoint's configuration; the Trainer is the present command's own.
FROM_CHECKPOINT = ("seed_everything", "name", "model", "data", "env", "episodes", "greedy")


class LitRLCLI(LightningCLI):
    """LightningCLI with an `env` section, trunks by name, runs in ``logs/NAME/version_N``, whole checkpoints.

    Constructing it parses and builds; `run` executes the subcommand.
    """

    def __init__(self, args: list[str]) -> None:
        self._classes = arguments.chosen_classes(args[1:], {"model": LitPPO, "data": RolloutDataModule})
        super().__init__(
            LitAgent,
            EnvDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults={
                "max_epochs": -1,
                "devices": 1,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "enable_autolog_hparams": False,  # `RunRecord` logs them, with the final metrics
                **launched_by_torchrun(),
            },
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "parser_mode": arguments.MODE},
            args=args,
        )

    # ------------------------------------------------------------------ options

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=int, default=1, help="Seed of all random states.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(EnvConfig, "env")
        parser.add_argument(
            "--name", type=str, default="run", help="The run's folder is logs/NAME/version_N."
        )
        parser.add_argument("--episodes", type=int, default=20, help="How many an evaluation runs.")
        parser.add_argument(
            "--greedy", type=bool, default=True, help="Evaluate the policy's mode, else samples."
        )
        parser.add_argument("--video", type=str | None, help="test: folder for a video of one episode.")
        parser.add_argument("--output", type=str | None, help="predict: folder for the episodes.")
        parser.add_argument("--torch_threads", type=int, default=1, help="Torch's threads in each process.")
        parser.set_defaults({section: {"class_path": path} for section, path in self._classes.items()})
        for target, source in arguments.LINKED.items():
            parser.link_arguments(source, target.replace(".", ".init_args.", 1))

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":  # Lightning's words are of what is not to be had here
                action.help = "A checkpoint's path, or last or best: the newest whole one of the run --name."
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        self.subcommand = self.config["subcommand"]
        arguments.check_options(self.options, {"env": EnvConfig, "trainer": L.Trainer})

    def _parse_ckpt_path(self) -> None:
        """Nothing: `with_checkpoint_config` has brought in the checkpoint's configuration."""

    @property
    def options(self) -> Namespace:
        """The subcommand's configuration."""
        assert self.subcommand is not None
        return self.config[self.subcommand]

    def config_text(self) -> str:
        """The resolved configuration as YAML, which `--config` reads again."""
        assert self.subcommand is not None
        return self._subcommand_parsers[self.subcommand].dump(self.options, skip_none=False)

    # ------------------------------------------------------------------ objects

    def before_instantiate_classes(self) -> None:
        prepare_process(self.options.torch_threads)
        if self.subcommand == "fit" and self.options.ckpt_path in ("last", "best"):
            self.options.ckpt_path = self._newest_checkpoint(self.options.ckpt_path)
        elif self.subcommand != "fit" and self.options.ckpt_path is None and self.options.config is None:
            raise UserError(f"{self.subcommand} needs a trained agent: give --ckpt_path P (or last, or best)")
        self.version: str | None = None
        self.checkpoint: Mapping[str, Any] | None = None
        if self.options.ckpt_path is not None:
            path = Path(self.options.ckpt_path)
            self.checkpoint = checkpoints.load(path)
            # A run that goes on keeps its folder, and so its curves.
            run = path.resolve().parent.parent
            if path.parent.name == "checkpoints" and run.parent == (LOGS / self.options.name).resolve():
                self.version = run.name
        self._check_folders()
        # Lightning neither prints metrics nor keeps episodes in memory that are on disk.
        for unused in ("verbose", "return_predictions"):
            if unused in self.options:
                self.options[unused] = False

    def _newest_checkpoint(self, which: str) -> str | None:
        """The path of the run's `last` or `best` checkpoint, None if it has none; says which it is."""
        run = LOGS / self.options.name
        found = checkpoints.newest_whole(run, which, versions="*")
        if found is None:
            say(f"no whole checkpoint under {run}: from the start")
            return None
        say(f"from {found}" + ("" if found.stem == which else " (last.ckpt is missing or damaged)"))
        return str(found)

    def _check_folders(self) -> None:
        if self.subcommand == "fit":
            arguments.check_folder(LOGS / self.options.name)
            trainer = self.options.trainer
            if trainer.logger is False and trainer.enable_checkpointing is not False:
                raise UserError(
                    "trainer.logger false leaves checkpoints without a folder of their own: set "
                    "trainer.enable_checkpointing false, too, or keep the logger"
                )
        for option, subcommand, new in (("video", "test", False), ("output", "predict", True)):
            folder = self.options[option]
            if folder is not None and self.subcommand != subcommand:
                raise UserError(
                    f"--{option} is an option of {subcommand}, {self.subcommand} has no use for it"
                )
            if folder is not None:
                arguments.check_folder(Path(folder), new=new)
        if self.subcommand == "predict" and self.options.output is None:
            raise UserError("predict writes episodes to disk: say where with --output DIR")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        assert self.subcommand is not None
        configured = self.config_init[self.subcommand]["trainer"]
        fits = self.subcommand == "fit"
        if configured["logger"] is None:
            kwargs["logger"] = fits and RunLogger(LOGS, name=self.options.name, version=self.version)
        kwargs["callbacks"] = [*listed(configured["callbacks"]), *self._callbacks(configured)]
        kwargs["plugins"] = [*listed(configured["plugins"]), checkpoints.AtomicCheckpointIO()]
        kwargs["enable_progress_bar"] = fits and configured["enable_progress_bar"] is not False
        return super().instantiate_trainer(**kwargs)

    def _callbacks(self, configured: Namespace) -> list[L.Callback]:
        if self.subcommand == "predict":
            return [EpisodeWriter(Path(self.options.output))]
        if self.subcommand != "fit":
            return [EvaluationVideo(self.options.video and Path(self.options.video))]
        callbacks: list[L.Callback] = [
            RunRecord(self.config_text()),
            EvaluationVideo(),
            AttentionMaps(),
            StopOnSignal(),
        ]
        if configured["enable_progress_bar"] is not False:
            callbacks.append(FrameProgress())
        if configured["enable_checkpointing"] is not False:
            best = ModelCheckpoint(
                filename="best",
                monitor="val/return",
                mode="max",
                save_on_train_epoch_end=False,
                enable_version_counter=False,
            )
            callbacks += [best, checkpoints.LastCheckpoint()]
        return callbacks

    def after_instantiate_classes(self) -> None:
        """What does not fit together is refused here, before anything is written."""
        self.model.check_precision(self.trainer.precision)
        if getattr(self.trainer.strategy, "_start_method", "popen") != "popen":
            raise UserError(
                "processes of this strategy keep what became of a run to themselves: set --trainer.strategy "
                "to ddp"
            )
        if self.checkpoint is not None:
            self.model.check_checkpoint(self.checkpoint)
        if self.subcommand == "fit":
            self._check_going_on(self.checkpoint or {})
            self.model.check_data(self.datamodule)

    def _check_going_on(self, checkpoint: Mapping[str, Any]) -> None:
        env_id, total_frames = self.options.env.id, self.model.total_frames
        trained_on = checkpoint.get("environment", env_id)
        if trained_on != env_id:
            raise UserError(
                f"the checkpoint was trained on {trained_on}, not on {env_id}: go on with that, or start "
                "anew without --ckpt_path"
            )
        if checkpoint.get("frames", 0) >= total_frames:
            say(f"all {total_frames:,} frames are trained: raise --model.total_frames to go on")

    # ------------------------------------------------------------------ subcommands

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: `run` does it, so that what fails while building is told from what fails while running."""

    def run(self) -> None:
        assert self.subcommand is not None
        try:
            super()._run_subcommand(self.subcommand)
        except SIGTERMException:
            raise
        except BaseException as error:
            if not ranks.peer_is_gone(error):
                for process in self._started():  # they would wait for this one
                    process.kill()
            raise

    def _started(self) -> list[subprocess.Popen]:
        """The other processes, where this one has started them."""
        return getattr(self.trainer.strategy.launcher, "procs", [])

    def exit_code_of_others(self) -> int:
        """Of the first process that this one has started and that failed; 1 where another started them."""
        codes = [process.wait() for process in self._started()]
        return next((code if code > 0 else 128 - code for code in codes if code), 1)

    def after_fit(self) -> None:
        trainer = self.trainer
        self._say_evaluation("val")
        folder = trainer.log_dir  # asks all processes: every one must come by
        if folder is not None and trainer.loggers and trainer.is_global_zero:
            run = Path(os.path.relpath(folder))
            for title, path in (
                ("learning curve", run / "learning_curve.png"),
                ("checkpoint", run / "checkpoints" / "last.ckpt"),
            ):
                if path.exists():
                    say(f"{title}: {path}")
            say(f"watch: tensorboard --logdir {LOGS}")

    def after_validate(self) -> None:
        self._say_evaluation("val")

    def after_test(self) -> None:
        self._say_evaluation("test")

    def after_predict(self) -> None:
        say(f"episodes: {self.options.output}")

    def _say_evaluation(self, stage: str) -> None:
        metrics = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        if f"{stage}/return" not in metrics:
            return
        how = "greedy" if self.options.greedy else "sampled"
        line = f"evaluation: return {metrics[f'{stage}/return']:.1f} +- {metrics[f'{stage}/return_std']:.1f}"
        if f"{stage}/success" in metrics:
            line += f", success {metrics[f'{stage}/success']:.2f}"
        line += f", length {metrics[f'{stage}/length']:.1f}"
        episodes, frames = self.model.evaluated
        when = "" if frames == self.model.frames else f" after {frames:,} frames"
        say(f"{line} ({episodes} {how} episodes of {self.options.env.id}{when})")


def prepare_process(torch_threads: int) -> None:
    """What holds for all arithmetic and memory of this process."""
    # Adam's momenta of units that fell silent decay to denormal numbers, which arithmetic is slow on.
    # Threads take this over from the one that starts them.
    torch.set_flush_denormal(True)
    torch.set_num_threads(torch_threads)
    keep_freed_memory()


def listed(given: Any) -> list[Any]:
    """What the Trainer takes as one object, several or none."""
    return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]


def say(text: str) -> None:
    """Prints, in one of the processes of a run."""
    if ranks.is_first():
        print(text, flush=True)


def launched_by_torchrun() -> dict[str, Any]:
    """Trainer defaults that fit the processes which torchrun (or `fabric run`) has started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    defaults = {"accelerator": "auto", "devices": local, "num_nodes": world // local, "strategy": "ddp"}
    # What `fabric run` was told.
    told = {name: os.environ.get(f"LT_{name.upper()}") for name in ("accelerator", "strategy", "precision")}
    return defaults | {name: value for name, value in told.items() if value is not None}


def with_checkpoint_config(argv: list[str]) -> list[str]:
    """An evaluation's options, after those of the run that made its checkpoint.

    `last` and `best` stand for the newest whole checkpoint of the run `--name`, or of all runs.
    """
    subcommand, *options = argv
    named = {
        key: value for key, value in arguments.pairs(options) if key in ("--ckpt_path", "--name", "--config")
    }
    if subcommand == "fit" or "--ckpt_path" not in named:
        return argv
    if "--config" in named and named["--ckpt_path"] in ("last", "best"):
        raise UserError(
            f"--ckpt_path {named['--ckpt_path']} brings its own configuration: leave out --config"
        )
    path: Path | None = Path(named["--ckpt_path"])
    if named["--ckpt_path"] in ("last", "best"):
        root, versions = (LOGS / named["--name"], "*") if "--name" in named else (LOGS, "**")
        path = checkpoints.newest_whole(root, named["--ckpt_path"], versions=versions)
        if path is None:
            raise UserError(f"no whole checkpoint under {root}: train one with lit-rl fit, or give its path")
    assert path is not None
    config = checkpoints.load(path).get("config")
    if config is None:
        return [*argv, "--ckpt_path", str(path)]
    kept = {key: value for key, value in yaml.safe_load(config).items() if key in FROM_CHECKPOINT}
    # `--config` takes a file or its contents.
    return [subcommand, "--config", yaml.safe_dump(kept), *options, "--ckpt_path", str(path)]


def build(argv: list[str]) -> LitRLCLI:
    """Everything the command names, built and ready to run; raises `UserError` for whatever does not fit."""
    argv = arguments.long_options(argv)
    try:
        return LitRLCLI(arguments.resolve_options(with_checkpoint_config(argv)))
    except UserError:
        raise
    except Exception as error:
        raise _in_one_line(error, argv) from error


def _in_one_line(error: Exception, argv: list[str]) -> UserError:
    """The message of whatever went wrong while parsing and building."""
    links: list[BaseException] = [error]
    while (link := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(link)
    for link in links:
        if isinstance(link, UserError):
            return link
    configs = " and ".join(value for key, value in arguments.pairs(argv[1:]) if key == "--config")
    if isinstance(error, ArgumentError):
        return UserError(f"{messages.one_line(str(error), configs)}; see lit-rl {argv[0]} --help")
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{configs} is not UTF-8 text ({error})")
    # jsonargparse wraps what a constructor raises.
    wrapped = next((link for link in links if not str(link).startswith("Does not validate")), error)
    return UserError(f"{messages.one_line(str(wrapped), configs)} ({type(wrapped).__name__})")


def main(argv: list[str]) -> int:
    """Runs one of fit, validate, test and predict; returns the exit code."""
    for noisy in ("lightning.pytorch", "lightning.fabric", "torchrl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Lightning speaks of worker processes, which loaders of rollouts and episodes have no use for.
    warnings.filterwarnings("ignore", module="lightning")
    ranks.end_with_rank_0()
    cli = build(argv)
    try:
        cli.run()
    except (MisconfigurationException, MemoryError, OSError) as error:
        raise UserError(f"{str(error) or 'out of memory'} ({type(error).__name__})") from error
    except SIGTERMException as error:
        signum = error.signum if isinstance(error, Stopped) else signal.SIGTERM
        savers = cli.trainer.checkpoint_callbacks if argv[0] == "fit" else []
        saves = any(isinstance(saver, checkpoints.LastCheckpoint) for saver in savers)
        say(f"stopped by {signum.name}" + ("; --ckpt_path last goes on" if saves else ""))
        return 128 + signum
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        if is_out_of_memory(error):
            raise UserError("out of memory: make batches, windows or the network smaller") from error
        if ranks.peer_is_gone(error):
            return cli.exit_code_of_others()  # they have said why
        if not raised_by_lightning(error):
            raise
        raise UserError(f"{error} ({type(error).__name__}): see the options of trainer") from error
    finally:
        ranks.leave()
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch got no memory, on a device or, where its error has no type of its own, on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


def raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning's own code refused something: its Trainer checks some options only when it runs."""
    module = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return module.partition(".")[0] == "lightning"
