"""How fast decoders write with a cache, and without: the table of docs/generate.md.

Tokens a second of one thread's CPU time, its prompt included: one text, greedily up to a length of 256 tokens, weights
as initialized. Both must write the same.

    python tools/generation_speed.py
"""

import time

import torch

from nlm import build_model, generate
from nlm.build import parse_config
from nlm.model import Transformer

TOKENS = {24: 240, 1000: 16}
"""So many of the 256, by layers."""
SHAPES = {
    24: {"dim": 256, "n_heads": 4, "vocab_size": 4096, "seq_len": 256},
    1000: {"dim": 64, "n_heads": 2, "vocab_size": 512, "seq_len": 256},
}


def model_of(n_layers: int, seq_len: int, **shape: int) -> Transformer:
    table = {
        "model": {"n_layers": n_layers, **shape, "scheme": {"name": "pre_ln"}},
        "train": {"steps": 1, "batch_tokens": seq_len, "seq_len": seq_len},
        "optim": {"lr": 1e-3},
        "data": {"train": "none"},
        "log": {"dir": "none"},
    }
    return build_model(parse_config(table)).eval()


def cached(model: Transformer, prompt: list[int]) -> tuple[int, ...]:
    ((text,),) = generate(model, [prompt], temperature=0, max_tokens=model.seq_len - len(prompt))
    return text.tokens


@torch.no_grad()
def recomputed(model: Transformer, prompt: list[int]) -> tuple[int, ...]:
    text = list(prompt)
    while len(text) < model.seq_len:
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return tuple(text[len(prompt) :])


def main() -> None:
    torch.set_num_threads(1)
    for n_layers, shape in SHAPES.items():
        model, n, said = model_of(n_layers, **shape), TOKENS[n_layers], set()
        for way in (cached, recomputed):
            began = time.process_time()
            said.add(way(model, list(range(model.seq_len - n))))
            print(f"{n_layers} layers, {n} tokens, {way.__name__}: {n / (time.process_time() - began):.2f} tokens/s")
        assert len(said) == 1, "the two do not write the same"


if __name__ == "__main__":
    main()
