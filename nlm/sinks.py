"""Where a run's numbers and pictures are shown beside its own folder: TensorBoard, Weights & Biases, MLflow.

All get the same, under a number of names that does not grow with depth. A run that goes on does so in the run that it
began there, whose identifier is kept in its folder.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nlm.config import Config, ConfigError, MlflowConfig, WandbConfig, dotted

Picture = NDArray[np.uint8]
"""[height width 3]."""


class Sink(AbstractContextManager["Sink"], ABC):
    """Gets what is logged. A run that goes on after step `start` makes the later steps again."""

    @abstractmethod
    def __init__(self, run: Path, config: Config, start: int) -> None: ...

    @abstractmethod
    def scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    @abstractmethod
    def picture(self, step: int, name: str, picture: Picture) -> None: ...


class TensorBoard(Sink):
    def __init__(self, run: Path, config: Config, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None)
        # SummaryWriter.add_hparams would write them to a run of their own.
        shown = {
            name: value for name, value in parameters(config).items() if isinstance(value, bool | int | float | str)
        }
        writer = self._board._get_file_writer()
        for summary in hparams(shown, {"loss": None, "validation_loss": None}):
            writer.add_summary(summary)
        self._board.add_text("config", "".join(f"    {line}\n" for line in config.to_toml().splitlines()), start)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        self._board.add_image(name, picture, step, dataformats="HWC")

    def __exit__(self, *_: object) -> None:
        self._board.close()


class Wandb(Sink):
    def __init__(self, run: Path, config: Config, start: int) -> None:
        import wandb

        choice = config.log.wandb or WandbConfig()
        self._image = wandb.Image
        self._run = wandb.init(
            project=choice.project,
            entity=choice.entity,
            mode=choice.mode,
            dir=run,
            name=run.name,
            id=_identifier(run, "wandb", lambda: token_hex(4)),
            resume="allow",
            config=config.model_dump(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Its own step may not go back, as a run does that goes on from a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def picture(self, step: int, name: str, picture: Picture) -> None:
        self._run.log({"step": step, name: self._image(picture)})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


class Mlflow(Sink):
    def __init__(self, run: Path, config: Config, start: int) -> None:
        from mlflow import MlflowClient

        choice = config.log.mlflow or MlflowConfig(tracking_uri="")
        self._client = client = MlflowClient(choice.tracking_uri)
        experiment = client.get_experiment_by_name(choice.experiment)
        number = experiment.experiment_id if experiment else client.create_experiment(choice.experiment)
        self._id = _identifier(run, "mlflow", lambda: client.create_run(number, run_name=run.name).info.run_id)
        client.update_run(self._id, status="RUNNING")
        known = client.get_run(self._id).data.params
        given = {name: str(value) for name, value in parameters(config).items()}
        for name in given.keys() - known.keys():
            client.log_param(self._id, name, given[name])
        for name in (name for name in given.keys() & known.keys() if given[name] != known[name]):
            client.set_tag(self._id, f"changed.{name}", given[name])  # a parameter is for ever

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self._id, name, value, step=step)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        self._client.log_image(self._id, picture, key=name, step=step)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._client.set_terminated(self._id, "FINISHED" if kind is None else "FAILED")


EXTRAS: dict[str, type[Sink]] = {"wandb": Wandb, "mlflow": Mlflow}
"""By the name of the key in [log], of the library and of the extra that brings it."""


def refuse_missing_libraries(config: Config) -> None:
    """Errors: ConfigError."""
    if config.evaluate.translations and find_spec("sacrebleu") is None:
        raise ConfigError(["evaluate.translations: needs sacreBLEU; pip install 'nlm[translation]', or set 0"])
    if missing := [name for name in _chosen(config) if find_spec(name) is None]:
        raise ConfigError(
            f"log.{name}: the library {name} is not installed; pip install 'nlm[{name}]', or remove the table"
            for name in missing
        )


def sinks(run: Path, config: Config, start: int) -> Iterator[Sink]:
    """Those that the config asks for."""
    if config.log.tensorboard:
        yield TensorBoard(run, config, start)
    for name in _chosen(config):
        yield EXTRAS[name](run, config, start)


def _chosen(config: Config) -> list[str]:
    return [name for name in EXTRAS if getattr(config.log, name) is not None]


def pixels(figure: Figure) -> Picture:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def parameters(config: Config) -> dict[str, Any]:
    """Every key that has a value, under its dotted name."""
    return dict(dotted(config.model_dump(exclude_none=True)))


def _identifier(run: Path, name: str, make: Any) -> str:
    """Of this run there: the one it has, or a new one."""
    path = run / "sinks.json"
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if name not in known:
        known[name] = make()
        path.write_text(json.dumps(known) + "\n", encoding="utf-8")
    return known[name]
