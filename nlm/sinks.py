"""Where a run's numbers and pictures are shown beside its own folder: TensorBoard, Weights & Biases, MLflow,
Prometheus.

All get the same, under a number of names that does not grow with depth. A run that goes on does so in the run that it
began there, whose identifier is kept in its folder.
"""

import json
import time
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

from nlm.config import Config, ConfigError, MlflowConfig, PrometheusConfig, WandbConfig, dotted

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


class Prometheus(Sink):
    """Serves the scalars of the last logged step, at http://HOST:PORT/metrics, in Prometheus's text format or in
    OpenMetrics, whichever is asked for. Pictures it has none."""

    def __init__(self, run: Path, config: Config, start: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        choice = config.log.prometheus or PrometheusConfig()
        self._gauge, self._info = GaugeMetricFamily, InfoMetricFamily
        self._labels = {"run": run.name}
        self._facts = facts(config)
        self._last: tuple[int, dict[str, float], float] | None = None  # replaced as a whole: another thread reads it
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)  # type: ignore[arg-type]
        try:
            self._server, self._thread = start_http_server(choice.port, choice.host, registry)
        except OSError as error:
            raise ConfigError(
                [
                    f"log.prometheus: cannot listen at {choice.host}:{choice.port} ({error.strerror or error}); set "
                    "another log.prometheus.port, or host"
                ]
            ) from None

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._last = step, dict(scalars), time.time()

    def picture(self, step: int, name: str, picture: Picture) -> None:
        pass

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks at every request: metric families, of scalars of one name and other parts one."""
        yield self._info("nlm_run", "What is trained.", value=self._labels | self._facts)
        if self._last is None:
            return
        step, scalars, at = self._last
        families: dict[str, Any] = {}
        for key, value in ({"step": step, "logged": at} | scalars).items():
            key, _, part = key.partition("/")
            name, unit, factor, text = GAUGES.get(key) or (key, "", 1, f"{key} of metrics.jsonl.")
            family = families.setdefault(key, self._gauge(f"nlm_{name}", text, unit=unit))
            label = {PART_LABELS.get(key, "direction"): part} if part else {}
            family.add_sample(family.name, self._labels | label, value * factor)
        yield from families.values()

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


GAUGES = {
    "step": ("step", "", 1, "The last logged step."),
    "logged": ("logged_timestamp", "seconds", 1, "When that was, since the epoch of Unix."),
    "loss": ("loss", "", 1, "Training loss of a batch, nats a token."),
    "grad_norm": ("grad_norm", "", 1, "Norm of the gradient, before clipping."),
    "lr": ("learning_rate", "", 1, "Learning rate."),
    "step_s": ("step_seconds", "seconds", 1, "Time of a step, the mean since the last logged one."),
    "tokens_s": ("tokens_per_second", "", 1, "Target tokens a second, of all ranks."),
    "peak_memory_gib": ("peak_memory_bytes", "bytes", 2**30, "Peak memory of the rank that speaks."),
    "tflops_per_rank": ("flops_per_second", "", 1e12, "Model FLOPs a second, of one rank."),
    "mfu": ("mfu_ratio", "ratio", 1, "Model FLOPs over the peak of the device."),
    "epoch": ("epoch", "", 1, "Passes over the corpus, or over a source of it."),
    "rows": ("rows", "", 1, "Rows read, of a source."),
    "validation_loss": ("validation_loss", "", 1, "Validation loss, nats a token."),
    "validation_perplexity": ("validation_perplexity", "", 1, "exp of the validation loss."),
    "validation_bits_per_byte": ("validation_bits_per_byte", "", 1, "Validation loss in bits a byte of text."),
    "validation_accuracy": ("validation_accuracy_ratio", "ratio", 1, "Share of masked tokens that are told right."),
    "bleu": ("bleu", "", 1, "BLEU of translations of the validation pairs, of 100."),
    "chrf": ("chrf", "", 1, "chrF of translations of the validation pairs, of 100."),
}
"""Name, unit, how many of it make one of ours, and help, by the name in `metrics.jsonl`."""
PART_LABELS = {"epoch": "source", "rows": "source"}
"""Of a scalar `name/part`, what a part is, where it is not a direction of translation."""


def facts(config: Config) -> dict[str, str]:
    """Of a config, what tells runs apart at a glance."""
    model, train = config.model, config.train
    return {
        "scheme": model.scheme.name,
        "architecture": model.architecture,
        "n_layers": str(model.n_all_layers),
        "dim": str(model.dim),
        "seq_len": str(train.seq_len),
        "batch_tokens": str(train.batch_tokens),
        "steps": str(train.steps),
        "precision": train.precision,
        "optimizer": config.optim.name,
        "ranks": str(config.parallel.ranks),
    }


EXTRAS: dict[str, tuple[str, type[Sink]]] = {
    "wandb": ("wandb", Wandb),
    "mlflow": ("mlflow", Mlflow),
    "prometheus": ("prometheus_client", Prometheus),
}
"""The library and what uses it, by the name of the key in [log] and of the extra that brings the library."""


def refuse_missing_libraries(config: Config) -> None:
    """Errors: ConfigError."""
    if config.evaluate.translations and find_spec("sacrebleu") is None:
        raise ConfigError(["evaluate.translations: needs sacreBLEU; pip install 'nlm[translation]', or set 0"])
    if missing := {name: EXTRAS[name][0] for name in _chosen(config) if find_spec(EXTRAS[name][0]) is None}:
        raise ConfigError(
            f"log.{name}: the library {library} is not installed; pip install 'nlm[{name}]', or remove the table"
            for name, library in missing.items()
        )


def sinks(run: Path, config: Config, start: int) -> Iterator[Sink]:
    """Those that the config asks for."""
    if config.log.tensorboard:
        yield TensorBoard(run, config, start)
    for name in _chosen(config):
        yield EXTRAS[name][1](run, config, start)


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
