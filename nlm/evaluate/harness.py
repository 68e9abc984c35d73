"""lm-evaluation-harness: a checkpoint of any scheme, in any layout without a pipeline, as a model of its.

`nlm evaluate CHECKPOINT --tasks …` runs its tasks. So does its own command, which learns of nlm by
`python -m nlm.evaluate.harness --model nlm --model_args checkpoint=RUN/checkpoints/step-00000100 --tasks …`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nlm.data.lookup import find_tokenizer
from nlm.data.tokenizer import Tokenizer, load_tokenizer
from nlm.evaluate.greedy import greedy
from nlm.evaluate.load import Loader, evaluation_config
from nlm.evaluate.predictions import predictions
from nlm.evaluate.text import reading
from nlm.evaluate.windows import Row, joined
from nlm.mesh import Mesh
from nlm.parallel.engine import Inference
from nlm.runtime import pick_device

NEW_TOKENS = 256
"""That a task generates if it does not say how many, as of the harness's own models."""
Request = tuple[Any, list[int], list[int]]
"""What it is of, the tokens of the context, and those of the continuation."""


class Harness(TemplateLM):  # type: ignore[misc]
    """An `inference` and its tokenizer or, for the harness's own command, a `checkpoint` in one process.

    Contexts are `window` tokens long at most, and lose their beginning; the mark that ends a document stands where a
    text has no context. `device` is what the command names even where there is none such: the model is on this rank's
    GPU or on the CPU, as everywhere in nlm.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        tokenizer: str | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        *,
        inference: Inference | None = None,
        coder: Tokenizer | None = None,
        window: int | None = None,
        after_each: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        if inference is None or coder is None:
            if checkpoint is None:
                raise ValueError("expected checkpoint=RUN/checkpoints/step-…")
            rows = int(batch_size) if batch_size and str(batch_size).isdecimal() else None
            config = evaluation_config(Path(checkpoint), (), rows)
            coder = load_tokenizer(find_tokenizer(config.data, tokenizer))
            inference = Loader(Mesh(config.parallel, pick_device())).load(Path(checkpoint), config)
        self.inference, self.coder, self.after_each = inference, coder, after_each
        self.window = reading(inference.config, window, tasks=True).window

    @property
    def eot_token_id(self) -> int:
        return self.coder.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.coder.encode([string])[0].tolist()  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each token once, in windows that follow one another without overlap, as the harness's own models have it."""
        windows: list[Request] = []
        for i, request in enumerate(requests):
            found = get_rolling_token_windows(self.tok_encode(request.args[0]), self.eot_token_id, self.window, 1)
            windows += [(i, *make_disjoint_window(window)) for window in found]
        totals = [0.0] * len(requests)
        for (i, _, _), (loglikelihood, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += loglikelihood
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation, and whether it is the one that the model finds likeliest, token by token."""
        tp, size = self.inference.mesh.tp, self.inference.config.batch_rows
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(order), size):
            some = order[start : start + size]
            rows = []
            for _, context, continuation in (requests[i] for i in some):
                if not len(continuation) <= self.window:
                    raise ValueError(f"a continuation of {len(continuation)} tokens is longer than {self.window}")
                rows.append(Row(np.array([*context, *continuation][-self.window - 1 :]), len(continuation)))
            longest = max(len(row.tokens) for row in rows) - 1
            batch = joined(rows, len(rows), longest + -longest % (tp.size if tp.sequence else 1))
            seen, scored = predictions(self.inference, batch), batch.scored
            assert scored is not None
            for i, loss, correct, counted in zip(some, seen.loss.cpu(), seen.correct.cpu(), scored, strict=True):
                found[i] = -float(loss[counted].double().sum()), bool(correct[counted].all())
            self.after_each()
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The most likely tokens one by one, up to a stop sequence, which is left out, or the end of the document.

        Errors: ValueError for tasks that draw their tokens, and for more of them than the context holds.
        """
        found = []
        for context, given in (request.args for request in requests):
            options = normalize_gen_kwargs(given, NEW_TOKENS)
            n, stops = options["max_gen_toks"], [stop for stop in options["until"] if stop]
            if options.get("do_sample") or options.get("temperature"):
                raise ValueError("generate_until: only the most likely continuation is made; set do_sample: false")
            if n >= self.window:
                raise ValueError(
                    f"generate_until: expected max_gen_toks below the context's {self.window}, got {n}; set it in the "
                    "task's generation_kwargs"
                )

            def ends(tokens: list[int], stops: list[str] = stops) -> bool:
                text = self.coder.decode(tokens)
                return tokens[-1] == self.eot_token_id or any(stop in text for stop in stops)

            tokens = (self.tok_encode(context) or [self.eot_token_id])[-(self.window - n) :]
            text = self.coder.decode(greedy(self.inference, tokens, n, ends))
            found.append(min((text.split(stop)[0] for stop in stops), key=len, default=text))
            self.after_each()
        return found


def run_tasks(
    model: Harness, names: Sequence[str], include_path: str | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Metrics by task: those in the folder `include_path` alone, or else those that the harness brings, which fetch
    their data; of each at most `limit` examples. Errors: ValueError for a task that is not there."""
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if missing := [name for name in names if not manager.match_tasks([name])]:
        raise ValueError(
            f"--tasks: no task is called {', '.join(missing)}; there are {', '.join(manager.all_tasks[:20])}"
        )
    found = simple_evaluate(model, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0)
    assert found is not None, "it is None on other ranks than the first, and the model says it is the first"
    return {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }


register_model("nlm")(Harness)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
