"""Speed of nlm, as ratios measured in alternation: `python tools/bench.py (peers | depth | statistics)`.

Every contender is a process of its own that waits its turn, so that they share the machine's moods but not
their memory. Reported are medians over the rounds of CPU seconds a step (all threads) and of wall seconds, the
ratio to the first contender (above 1: faster), and the peak resident memory of each process.

  peers       24 layers, D=128, seq 256, vocabulary 8192, fp32, forward + backward + AdamW: Hugging Face Llama with
              sdpa against the same model in nlm (pre_ln, rmsnorm, swiglu, rope), eager and compiled
  depth       quickstart's width at 100 and at 1,000 layers; the target is at most 1.1 × 10 times the time
  statistics  1,000 layers, every step recorded and written to `layers/`, against none; recording every 10th step
              costs a tenth of the difference
"""

import argparse
import json
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlm.build import build_model, parse_config
from nlm.config import Config
from nlm.evaluate.loss import summed_loss
from nlm.model import weights
from nlm.optim import adamw, clip_gradients, projection
from nlm.parallel.compile import compile_model
from nlm.runtime import keep_freed_memory, peak_memory_gib, pick_device
from nlm.statistics.record import LayerStatistics
from nlm.statistics.store import LayerWriter

Step = Callable[[int], None]
"""Trains one step; the argument counts them."""

PEERS = {"vocab_size": 8192, "dim": 128, "n_layers": 24, "n_heads": 4, "ffn_dim": 344}
WIDTH = {"vocab_size": 512, "dim": 64, "n_heads": 2, "ffn_dim": 128, "activation": "relu"}


def config(model: dict[str, Any], seq_len: int) -> Config:
    return parse_config(
        {
            "model": {"scheme": {"name": "pre_ln"}} | model,
            "train": {"steps": 1, "batch_tokens": seq_len, "seq_len": seq_len},
            "optim": {"lr": 1e-4},
            "data": {"train": "-"},
            "log": {"dir": "-"},
        }
    )


def batch(vocab_size: int, rows: int, seq_len: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (rows, seq_len + 1), generator=generator).to(pick_device())


def nlm_peer(compiled: bool) -> Step:
    keep_freed_memory()
    model = build_model(
        config(PEERS | {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"}, 256), device=pick_device()
    )
    optimizer, rows = adamw(model, config(PEERS, 256).optim), batch(PEERS["vocab_size"], 4, 256)
    if compiled:
        compile_model(model)

    def step(_: int) -> None:
        (summed_loss(model, rows) / rows[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def llama_peer() -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=PEERS["vocab_size"],
        hidden_size=PEERS["dim"],
        num_hidden_layers=PEERS["n_layers"],
        num_attention_heads=PEERS["n_heads"],
        num_key_value_heads=PEERS["n_heads"],
        intermediate_size=PEERS["ffn_dim"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(settings).to(pick_device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = batch(PEERS["vocab_size"], 4, 256)

    def step(_: int) -> None:
        F.cross_entropy(model(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def deep(n_layers: int, record: bool = False) -> Step:
    """As `nlm train` steps: clipping, projection and, to record, statistics."""
    keep_freed_memory()
    settings = config(WIDTH | {"n_layers": n_layers}, 64)
    model = build_model(settings, device=pick_device())
    parameters = [parameter for _, parameter, _ in weights(model)]
    optimizer, project, rows = adamw(model, settings.optim), projection(model), batch(WIDTH["vocab_size"], 16, 64)
    layer_statistics = LayerStatistics(model)
    contexts = ExitStack()
    scratch = Path(contexts.enter_context(tempfile.TemporaryDirectory()))
    writer = contexts.enter_context(LayerWriter(scratch, n_layers, 0))

    def step(i: int) -> None:
        signals: list[Tensor] | None = [] if record else None
        (summed_loss(model, rows, signals) / rows[:, 1:].numel()).backward()
        _, norms = clip_gradients(parameters, 1.0)
        if signals is not None:
            layer_statistics.before_update()
        optimizer.step()
        project()
        optimizer.zero_grad()
        if signals is not None:
            writer.write(i, layer_statistics.vectors(signals, norms))

    return step


# name of the benchmark -> steps a turn, contender -> what makes its step
BENCHES: dict[str, tuple[int, dict[str, tuple[Callable[..., Step], tuple[Any, ...]]]]] = {
    "peers": (
        4,
        {"Llama, transformers": (llama_peer, ()), "nlm": (nlm_peer, (False,)), "nlm, compiled": (nlm_peer, (True,))},
    ),
    "depth": (2, {"1,000 layers": (deep, (1000,)), "100 layers": (deep, (100,))}),
    "statistics": (1, {"none recorded": (deep, (1000,)), "every step recorded": (deep, (1000, True))}),
}


def contender(connection: Connection, make: Callable[..., Step], arguments: tuple[Any, ...], threads: int) -> None:
    """Answers each number of steps with (CPU s, wall s, peak GiB) a step, until it is sent 0."""
    torch.set_num_threads(threads)
    step, count, device = make(*arguments), 0, pick_device()
    while n := connection.recv():
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(n):
            step(count)
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        connection.send((cpu / n, wall / n, peak_memory_gib(device)))


def race(bench: str, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """One record a contender. The first turn of each, which warms up and compiles, is not counted."""
    context = mp.get_context("spawn")
    steps, entries = BENCHES[bench]
    runners = {}
    for name, (make, arguments) in entries.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=contender, args=(theirs, make, arguments, threads), daemon=True)
        process.start()
        runners[name] = (process, ours, [])
    for _ in range(rounds + 1):
        for _, connection, turns in runners.values():
            connection.send(steps)
            turns.append(connection.recv())
    first: dict[str, float] = {}
    for name, (process, connection, turns) in runners.items():
        connection.send(0)
        process.join()
        cpu, wall = (statistics.median(turn[i] for turn in turns[1:]) for i in (0, 1))
        first = first or {"cpu": cpu, "wall": wall}
        yield {
            "contender": name,
            "cpu_s": round(cpu, 4),
            "wall_s": round(wall, 4),
            "cpu_ratio": round(first["cpu"] / cpu, 3),
            "wall_ratio": round(first["wall"] / wall, 3),
            "peak_gib": round(turns[-1][2], 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for record in race(options.bench, options.rounds, options.threads):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
